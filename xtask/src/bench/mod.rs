//! `cargo xtask bench`: Ovenbird and every other builder that the machine has, side by side in one run.
//!
//! Absolute times of a shared machine drift, so what counts is the ratio within one run: the builders take turns, in another
//! order every round, each with empty state of its own and the same warm page cache.

mod bound;
mod case;
mod growth;
mod input;
mod machine;
mod measure;
mod page;
mod peer;
mod record;
mod verdict;

use std::cell::Cell;
use std::path::PathBuf;
use std::process::Command;

use ovenbird_testing::base::Base;
use ovenbird_testing::dockerd::remove_with_mounts;
use ovenbird_testing::registry::{Options as RegistryOptions, Registry};
use ovenbird_testing::repository;

use self::case::{CASES, Case};
use self::growth::GROWTHS;
use self::measure::Sample;
use self::peer::Peer;
use self::record::{Entry, Records};

/// Of this command.
pub(crate) const USAGE: &str = "\
usage: cargo xtask bench [CASE…] [--peers A,B] [--runs N] [--scale 1,4,16] [--quick] [--write]
  CASE     rebuild steps context stages large base cache cold; growth-files growth-layers growth-steps growth-bytes (default: all)
  --peers  only these builders beside Ovenbird
  --runs   rounds (3)
  --scale  factors of the growth cases (1,4,16)
  --quick  inputs of a tenth and one round: does the bench itself work?
  --write  keep the results in docs/benchmarks
A Docker Engine beside the machine's own: OVENBIRD_BENCH_DOCKER=FOLDER, where its Debian packages are unpacked.
OVENBIRD_BIN=FILE measures that binary and builds none.
";

/// What was asked for.
#[derive(Debug)]
struct Options {
    cases: Vec<String>,
    peers: Option<Vec<String>>,
    runs: usize,
    scale: Vec<usize>,
    quick: bool,
    write: bool,
}

impl Options {
    fn parse(words: &[&str]) -> Result<Self, String> {
        let mut this = Self { cases: vec![], peers: None, runs: 3, scale: vec![1, 4, 16], quick: false, write: false };
        let mut words = words.iter().copied();
        while let Some(word) = words.next() {
            let mut value = |what: &str| words.next().ok_or(format!("{word} needs {what}\n{USAGE}"));
            match word {
                "--peers" => this.peers = Some(value("names of builders")?.split(',').map(str::to_owned).collect()),
                "--runs" => this.runs = number(value("a number")?)?,
                "--scale" => this.scale = value("factors")?.split(',').map(number).collect::<Result<_, _>>()?,
                "--quick" => (this.quick, this.runs) = (true, 1),
                "--write" => this.write = true,
                name if CASES.iter().any(|case| case.name == name) || GROWTHS.iter().any(|growth| growth.name == name) => {
                    this.cases.push(name.to_owned());
                }
                other => return Err(format!("there is no case or option {other:?}\n{USAGE}")),
            }
        }
        if this.quick && this.write {
            return Err("--quick measures too little to be kept: leave --write or --quick out".into());
        }
        Ok(this)
    }

    fn wants(&self, case: &str) -> bool {
        self.cases.is_empty() || self.cases.iter().any(|name| name == case)
    }
}

fn number(word: &str) -> Result<usize, String> {
    word.parse().ok().filter(|number| *number > 0).ok_or(format!("{word:?} is not a number above 0\n{USAGE}"))
}

/// What every case works with.
pub(super) struct Bench {
    /// Inputs, state of builders, logs.
    work: tempfile::TempDir,
    /// Holds the base images.
    bases: Registry,
    /// Inputs of a tenth.
    quick: bool,
    /// Turns so far.
    turns: Cell<u32>,
}

impl Bench {
    /// A count or size, smaller in a quick run.
    fn sized(&self, full: u64) -> u64 {
        if self.quick { full / 10 } else { full }
    }

    /// Name of a base image for `FROM`.
    fn base(&self, name: &str) -> String {
        format!("{}/{name}:latest", self.bases.address())
    }

    /// Where nobody was yet.
    fn state(&self) -> PathBuf {
        self.turns.set(self.turns.get() + 1);
        self.folder(&format!("state-{}", self.turns.get()))
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.work.path().join(name)
    }
}

/// Runs the command.
pub(crate) fn run(words: &[&str]) -> Result<(), String> {
    let options = Options::parse(words)?;
    let text = |error: ovenbird_testing::Error| error.to_string();
    release_build()?;
    let (mut peers, missing) = peer::find(&own_binary(), options.peers.as_deref())?;
    for (name, reason) in &missing {
        println!("not measured: {name}: {reason}");
    }
    let work = tempfile::Builder::new().prefix("obb-").tempdir().map_err(|error| format!("cannot make a folder: {error}"))?;
    let bases = Registry::start_with(RegistryOptions { bases: &[Base::Busybox, Base::Debian], credentials: None }).map_err(text)?;
    let bench = Bench { work, bases, quick: options.quick, turns: Cell::new(0) };
    let about = machine::About::look(bench.work.path());
    println!("{}", about.describe());
    println!("load average at the start: {}", machine::load());
    let mut records = Records::default();
    let folder = repository().join("docs/benchmarks");
    // After each case: an hour's work is not lost with the last one.
    let keep = |records: &Records| if options.write { record::keep(&folder, &about, records, &missing) } else { Ok(()) };
    for case in CASES.iter().filter(|case| options.wants(case.name)) {
        measure_case(&bench, case, &mut peers, options.runs, &mut records)?;
        keep(&records)?;
    }
    let own = &mut peers[..1];
    for growth in GROWTHS.iter().filter(|growth| options.wants(growth.name)) {
        println!("== {} at {:?}", growth.name, options.scale);
        records.growths.extend(growth.run(&bench, &mut own[0], &options.scale)?);
        keep(&records)?;
    }
    println!("{}", page::render(&records));
    if options.write {
        println!("kept in {}", folder.display());
    }
    Ok(())
}

fn measure_case(bench: &Bench, case: &Case, peers: &mut [Peer], runs: usize, records: &mut Records) -> Result<(), String> {
    println!("== {}", case.name);
    let input = (case.prepare)(bench).map_err(|error| format!("{}: cannot prepare: {error}", case.name))?;
    let load = machine::load();
    let mut samples: Vec<(&str, String, Sample)> = vec![];
    let mut failed: Vec<(String, String)> = vec![];
    for round in 0..runs {
        // Another one is first in every round.
        for turn in 0..peers.len() {
            let peer = &mut peers[(turn + round) % peers.len()];
            if failed.iter().any(|(name, _)| *name == peer.name) {
                continue;
            }
            if case.settle && !bench.quick {
                machine::settle();
            }
            input.warm()?;
            let state = bench.state();
            let turn = peer.turn(&state, |peer| (case.run)(bench, &input, peer));
            if case.bound {
                // Gigabytes, in a few files.
                remove_with_mounts(&state);
            }
            match turn {
                Ok(found) => {
                    for (measure, sample) in found {
                        println!("{measure:18} {:18} {:8.3} s {:6} MB", peer.name, sample.seconds, sample.memory / 1_000_000);
                        samples.push((measure, peer.name.clone(), sample));
                    }
                }
                Err(error) if peer.is_own => return Err(format!("{}: {error}", case.name)),
                Err(error) => {
                    println!("{}: {} failed: {error}", case.name, peer.name);
                    failed.push((peer.name.clone(), error.lines().next().unwrap_or_default().to_owned()));
                }
            }
        }
    }
    let bound = if case.bound { Some(bound::measure(input.folder(), &bench.folder("bound"))?) } else { None };
    for measure in case.measures {
        let mut entry = Entry::new(measure, &load, bound.clone());
        for (_, name, sample) in samples.iter().filter(|(id, ..)| id == measure) {
            entry.add(name, *sample);
        }
        entry.failed.clone_from(&failed);
        records.cases.push(entry);
    }
    Ok(())
}

/// Builds Ovenbird as users get it, unless another binary is named.
fn release_build() -> Result<(), String> {
    if std::env::var_os("OVENBIRD_BIN").is_some() {
        return Ok(());
    }
    crate::run(Command::new(crate::cargo()).args(["build", "--release", "--locked", "--package", "ovenbird-cli"]))
}

/// The binary that is measured: `$OVENBIRD_BIN`, else the release build.
fn own_binary() -> PathBuf {
    if let Some(named) = std::env::var_os("OVENBIRD_BIN") {
        return named.into();
    }
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository().join("target"), |dir| repository().join(dir));
    target.join("release/ovenbird")
}
