//! Pushes and pulls over connections that break, and how much memory a large layer takes.
//!
//! `cargo xtask toxic` runs them at length and keeps the table; a normal test run is small.

use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ovenbird_testing::Result;
use ovenbird_testing::command::{Level, Workspace, finish};
use ovenbird_testing::keeper::{Keeper, Keeps};
use ovenbird_testing::needs::{self, Need};
use ovenbird_testing::registry::{Options, Registry};
use ovenbird_testing::toxic::{Toxic, Toxics};

const MIB: u64 = 1 << 20;

/// A number from the environment, for the long runs.
fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// A row for the page.
fn row(what: &str, cells: &[String]) {
    let line = format!("| {what} | {} |\n", cells.join(" | "));
    print!("{line}");
    if let Some(path) = std::env::var_os("OVENBIRD_TOXIC_TABLE") {
        fs::OpenOptions::new().append(true).create(true).open(path).unwrap().write_all(line.as_bytes()).unwrap();
    }
}

/// A state folder with an image, `127.0.0.1:PORT/src:1`, that was pulled from a keeper.
struct Job {
    room: Workspace,
    state: PathBuf,
}

/// What the command told of broken transfers.
#[derive(Debug, Default, Clone, Copy)]
struct Breaks {
    count: u64,
    resumed: u64,
    retried: u64,
}

impl Job {
    fn new() -> Result<Self> {
        let room = Workspace::new(Level::Own)?;
        let state = room.path().join("state");
        Ok(Self { room, state })
    }

    fn ovenbird(&self, words: &[&str]) -> Command {
        let mut command = self.room.ovenbird();
        command.args(words).args(["--progress", "rawjson"]).arg("--root").arg(&self.state);
        command
    }

    /// Runs to the end, which must be a good one.
    fn run(&self, words: &[&str]) -> Result<Breaks> {
        let (code, text) = finish(&mut self.ovenbird(words), None, Duration::from_mins(20))?;
        assert_eq!(code, Some(0), "{words:?}: {}", text.lines().rev().take(5).collect::<Vec<_>>().join("\n"));
        let mut breaks = Breaks::default();
        for event in text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok()) {
            if event["event"] == "breaks" {
                let number = |name: &str| event[name].as_u64().unwrap();
                breaks.count += number("count");
                breaks.resumed += number("resumed");
                breaks.retried += number("retried");
            }
        }
        Ok(breaks)
    }
}

enum Server {
    Keeper(Keeper),
    Debian(Box<Registry>),
}

impl Server {
    fn port(&self) -> u16 {
        match self {
            Self::Keeper(keeper) => keeper.port(),
            Self::Debian(registry) => registry.port(),
        }
    }

    /// Empty again.
    fn next(self) -> Result<Self> {
        Ok(match self {
            Self::Keeper(keeper) => {
                keeper.clear();
                Self::Keeper(keeper)
            }
            Self::Debian(_) => Self::debian()?,
        })
    }

    fn debian() -> Result<Self> {
        Ok(Self::Debian(Box::new(Registry::start_with(Options { bases: &[], credentials: None })?)))
    }

    fn has(&self, repository: &str) -> bool {
        match self {
            Self::Keeper(keeper) => keeper.tag(repository, "1").is_some(),
            Self::Debian(registry) => {
                registry.storage().join(format!("repositories/{repository}/_manifests/tags/1/current/link")).is_file()
            }
        }
    }
}

/// Pushes the same image again and again, each time to an empty registry and over other bad connections.
fn pushes(what: &str, mut server: Server, least_resumed: u64) -> Result<()> {
    let (pushes, size) = (number("OVENBIRD_TOXIC_PUSHES", 3), number("OVENBIRD_TOXIC_SIZE", 96 * MIB));
    let source = Keeper::start(Keeps::Bytes)?;
    source.make("src", "1", &[size * 5 / 8, size / 4, size / 16, size / 16], false)?;
    let image = format!("{}/src:1", source.address());
    let job = Job::new()?;
    job.run(&["pull", &image])?;
    drop(source);
    let (mut all, mut harm, start) = (Breaks::default(), ovenbird_testing::toxic::Harm::default(), Instant::now());
    for seed in 1..=pushes {
        let toxics = Toxics { seed, percent: 30, within: (size / 8).min(128 * MIB), up: 80, stall: Duration::from_millis(200) };
        let toxic = Toxic::start(server.port(), toxics)?;
        let breaks = job.run(&["push", &image, &format!("{}/app:1", toxic.address())])?;
        assert!(server.has("app"), "push {seed} said that it went well");
        let (one, was) = (toxic.harm(), harm);
        harm.connections = was.connections + one.connections;
        harm.cuts = was.cuts + one.cuts;
        harm.up = was.up + one.up;
        all.count += breaks.count;
        all.resumed += breaks.resumed;
        all.retried += breaks.retried;
        server = server.next()?;
    }
    let mib = |bytes: u64| format!("{}", bytes / MIB);
    row(
        what,
        &[
            format!("{pushes} × {} MiB", mib(size)),
            format!("{pushes}"),
            format!("{} of {}", harm.cuts, harm.connections),
            format!("{}", all.count),
            mib(all.resumed),
            mib(all.retried),
            mib(harm.up),
            format!("{:.0}", start.elapsed().as_secs_f64()),
        ],
    );
    // Which blob gets which connection is not decided by the seed: a few pushes may be lucky.
    assert!(pushes < 10 || (harm.cuts > 0 && all.resumed >= least_resumed), "{harm:?} {all:?}");
    Ok(())
}

#[test]
fn pushes_go_on_where_the_registry_is() -> Result<()> {
    pushes("keeps what arrived", Server::Keeper(Keeper::start(Keeps::Bytes)?), MIB)
}

#[test]
fn pushes_go_on_after_whole_requests() -> Result<()> {
    pushes("keeps whole requests", Server::Keeper(Keeper::start(Keeps::Requests)?), 0)
}

#[test]
fn pushes_to_a_registry_that_forgets() -> Result<()> {
    if !needs::available("pushes_to_a_registry_that_forgets", &[Need::Registry]) {
        return Ok(());
    }
    pushes("Debian's docker-registry 2.8", Server::debian()?, 0)
}

/// What a tag points at on a registry's disk.
fn tag(registry: &Registry, repository: &str, tag: &str) -> Option<String> {
    let link = registry.storage().join(format!("repositories/{repository}/_manifests/tags/{tag}/current/link"));
    fs::read_to_string(link).ok()
}

#[test]
fn one_build_under_all_names_or_none() -> Result<()> {
    if !needs::available("one_build_under_all_names_or_none", &[Need::Registry]) {
        return Ok(());
    }
    let start = |credentials| Registry::start_with(Options { bases: &[], credentials });
    let (one, two, closed) = (start(None)?, start(None)?, start(Some(("anna", "secret")))?);
    let job = Job::new()?;
    let context = job.room.path().join("context");
    fs::create_dir(&context).unwrap();
    let build = |content: &str, outputs: &[String]| {
        fs::write(context.join("Dockerfile"), "FROM scratch\nCOPY Dockerfile file /\n").unwrap();
        fs::write(context.join("file"), content).unwrap();
        let mut command = job.ovenbird(&["build", "--metadata-file", "metadata.json"]);
        command.args(outputs.iter().flat_map(|output| ["-o", output]));
        for name in [format!("{}/app:1", one.address()), format!("{}/app:latest", one.address())] {
            command.args(["-t", &name]);
        }
        finish(command.arg("context"), None, Duration::from_mins(2))
    };
    let outputs = ["type=registry".to_owned(), format!("type=registry,name={}/team/app:1", two.address())];
    let (code, text) = build("first", &outputs)?;
    assert_eq!(code, Some(0), "{text}");
    let metadata: serde_json::Value = serde_json::from_slice(&fs::read(job.room.path().join("metadata.json")).unwrap()).unwrap();
    let digest = metadata["containerimage.digest"].as_str().map(str::to_owned);
    assert_eq!(metadata["ovenbird"]["pushed"].as_array().map(Vec::len), Some(3), "{metadata}");
    assert_eq!(metadata["ovenbird"]["breaks"]["count"], 0);
    for found in [tag(&one, "app", "1"), tag(&one, "app", "latest"), tag(&two, "team/app", "1")] {
        assert_eq!(found, digest);
    }
    // One that lets nobody in.
    let outputs = [&outputs[..], &[format!("type=registry,name={}/app:1", closed.address())]].concat();
    let (code, text) = build("second", &outputs)?;
    assert_eq!(code, Some(7), "{text}");
    assert!(text.contains(&format!("{} refused the credentials", closed.address())), "{text}");
    assert!(text.contains("; no name was changed"), "{text}");
    for found in [tag(&one, "app", "1"), tag(&one, "app", "latest"), tag(&two, "team/app", "1")] {
        assert_eq!(found, digest, "nothing moved");
    }
    Ok(())
}

#[test]
fn an_upload_that_advances_may_break_often() -> Result<()> {
    let (source, target) = (Keeper::start(Keeps::Bytes)?, Keeper::start(Keeps::Bytes)?);
    source.make("src", "1", &[96 * MIB], false)?;
    let (job, image) = (Job::new()?, format!("{}/src:1", source.address()));
    job.run(&["pull", &image])?;
    // No connection lives longer than 6 MiB.
    let toxic = Toxic::start(target.port(), Toxics { seed: 1, percent: 100, within: 6 * MIB, up: 100, stall: Duration::ZERO })?;
    let breaks = job.run(&["push", &image, &format!("{}/app:1", toxic.address())])?;
    assert!(target.tag("app", "1").is_some() && breaks.count > 12 && breaks.resumed > 48 * MIB, "{breaks:?}");
    Ok(())
}

#[test]
fn a_pull_goes_on_where_it_broke() -> Result<()> {
    let size = 64 * MIB;
    let source = Keeper::start(Keeps::Bytes)?;
    source.make("src", "1", &[size], false)?;
    let toxic = Toxic::start(source.port(), Toxics { seed: 3, percent: 100, within: 24 * MIB, up: 0, stall: Duration::ZERO })?;
    let breaks = Job::new()?.run(&["pull", &format!("{}/src:1", toxic.address())])?;
    assert!(breaks.count > 0 && breaks.resumed > MIB, "{breaks:?}");
    Ok(())
}

/// Runs the command and gives the most memory that it had, in KiB.
fn peak(command: &mut Command) -> u64 {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let errors = BufReader::new(child.stderr.take().unwrap());
    let told = std::thread::spawn(move || errors.lines().map_while(std::io::Result::ok).last());
    let status = format!("/proc/{}/status", child.id());
    let mut most = 0;
    let ended = loop {
        let text = fs::read_to_string(&status).unwrap_or_default();
        let now = text.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
        most = most.max(now.unwrap_or(0));
        if let Some(ended) = child.try_wait().unwrap() {
            break ended;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(ended.success(), "{:?}", told.join().unwrap());
    most
}

#[test]
fn a_large_layer_takes_little_memory() -> Result<()> {
    let size = number("OVENBIRD_TOXIC_LAYER", 300 * MIB);
    let source = Keeper::start(Keeps::Bytes)?;
    source.make("src", "1", &[size], true)?;
    let image = format!("{}/src:1", source.address());
    let job = Job::new()?;
    let pulled = peak(&mut job.ovenbird(&["pull", &image]));
    drop(source);
    let mut text = String::new();
    for keeps in [Keeps::Bytes, Keeps::Requests] {
        let target = Keeper::start(keeps)?;
        // Broken once or twice on the way.
        let toxic = Toxic::start(target.port(), Toxics { seed: 5, percent: 50, within: size, up: 90, stall: Duration::ZERO })?;
        let pushed = peak(&mut job.ovenbird(&["push", &image, &format!("{}/big:1", toxic.address())]));
        assert!(target.tag("big", "1").is_some());
        assert!(pushed < 100 << 10 && pulled < 100 << 10, "pushed: {pushed} KiB, pulled: {pulled} KiB");
        let _ = write!(text, "{}{}", if text.is_empty() { "" } else { " and " }, pushed >> 10);
    }
    row("peak memory", &[format!("1 × {} MiB", size / MIB), format!("push {} MiB", text.trim_end()), format!("pull {} MiB", pulled >> 10)]);
    Ok(())
}
