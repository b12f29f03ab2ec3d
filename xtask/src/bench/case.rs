//! The cases: what is prepared, what each builder does in its turn, and what of it is measured.

use std::fmt::Write as _;

use ovenbird_testing::registry::{Options, Registry};

use super::Bench;
use super::input::{Input, MIB};
use super::measure::Sample;
use super::peer::{Job, Peer, Shared};

/// Named results of one turn.
pub(super) type Samples = Vec<(&'static str, Sample)>;

/// One scenario; it may measure several things.
pub(super) struct Case {
    /// Name on the command line.
    pub(super) name: &'static str,
    /// What it measures, in order.
    pub(super) measures: &'static [&'static str],
    /// Makes the context, once for all builders and rounds.
    pub(super) prepare: fn(&Bench) -> Result<Input, String>,
    /// A builder's turn, from empty state.
    pub(super) run: fn(&Bench, &Input, &mut Peer) -> Result<Samples, String>,
    /// Is the least work that the context needs measured in the same run?
    pub(super) bound: bool,
    /// So many files that what one builder removes is felt by the next?
    pub(super) settle: bool,
}

/// All of them.
pub(super) const CASES: &[Case] = &[
    Case { name: "rebuild", measures: &["rebuild"], prepare: twelve_steps, run: rebuild, bound: false, settle: false },
    Case { name: "steps", measures: &["steps"], prepare: |bench| run_steps(bench, 20), run: uncached, bound: false, settle: false },
    Case {
        name: "context",
        measures: &["context-first", "context-unchanged", "context-touched", "context-changed"],
        prepare: |bench| many_files(bench, bench.sized(20_000)),
        run: context,
        bound: false,
        settle: true,
    },
    Case { name: "stages", measures: &["stages"], prepare: four_stages, run: uncached, bound: false, settle: false },
    Case {
        name: "large",
        measures: &["large"],
        prepare: |bench| large_files(bench, bench.sized(2048)),
        run: pushed,
        bound: true,
        settle: false,
    },
    Case { name: "base", measures: &["base"], prepare: large_base, run: pushed, bound: false, settle: false },
    Case { name: "cache", measures: &["cache"], prepare: twelve_steps, run: elsewhere, bound: false, settle: false },
    Case { name: "cold", measures: &["cold"], prepare: one_file, run: cold, bound: false, settle: false },
];

fn twelve_steps(bench: &Bench) -> Result<Input, String> {
    let input = Input::new(bench, "rebuild")?;
    input.files("src", 200, 100..3000)?;
    let base = bench.base("library/debian");
    input.dockerfile(&format!(
        "FROM {base}\nENV STAGE=bench\nWORKDIR /app\nRUN echo settings > settings\nCOPY src/d0/ src/\nRUN ls src > list\nLABEL step=7\n\
         RUN mkdir -p out && cp list out/\nUSER root\nENV LATER=yes\nCOPY src/ all/\nRUN find all -type f | wc -l > out/count\nCMD [\"cat\", \"out/count\"]\n"
    ))?;
    Ok(input)
}

/// `count` steps that each write a small file.
pub(super) fn run_steps(bench: &Bench, count: usize) -> Result<Input, String> {
    let input = Input::new(bench, "steps")?;
    let mut text = format!("FROM {}\n", bench.base("library/busybox"));
    for step in 1..=count {
        let _ = writeln!(text, "RUN echo {step} > /step-{step}");
    }
    input.dockerfile(&text)?;
    Ok(input)
}

/// `count` files of 0.1 to 3 kB.
pub(super) fn many_files(bench: &Bench, count: u64) -> Result<Input, String> {
    let input = Input::new(bench, "files")?;
    input.files("files", count, 100..3000)?;
    input.dockerfile("FROM scratch\nCOPY files/ /files/\n")?;
    Ok(input)
}

fn four_stages(bench: &Bench) -> Result<Input, String> {
    let input = Input::new(bench, "stages")?;
    let base = bench.base("library/busybox");
    let mut text = String::new();
    for stage in ["a", "b", "c", "d"] {
        let _ = writeln!(text, "FROM {base} AS {stage}\nRUN sleep 2 && echo {stage} > /{stage}");
    }
    let _ = writeln!(text, "FROM {base}");
    for stage in ["a", "b", "c", "d"] {
        let _ = writeln!(text, "COPY --from={stage} /{stage} /{stage}");
    }
    input.dockerfile(&text)?;
    Ok(input)
}

/// Half random bytes, half text.
pub(super) fn large_files(bench: &Bench, mib: u64) -> Result<Input, String> {
    let input = Input::new(bench, "large")?;
    input.random_file("data/random", mib / 2 * MIB)?;
    input.text_file("data/text", mib / 2 * MIB)?;
    input.dockerfile("FROM scratch\nCOPY data/ /data/\n")?;
    Ok(input)
}

/// About 300 MB compressed: Debian, and layers of files of 128 kB that compress as programs and texts do.
fn large_base(bench: &Bench) -> Result<Input, String> {
    let name = format!("{}/bench/base:latest", bench.bases.address());
    {
        let input = Input::new(bench, "base-of-base")?;
        input.random_files("random", bench.sized(1200), 128 << 10)?;
        input.text_files("text", bench.sized(2000), 128 << 10)?;
        let base = bench.base("library/debian");
        input.dockerfile(&format!("FROM {base}\nCOPY random/ /usr/lib/bench/\nCOPY text/ /usr/share/bench/\n"))?;
        let mut own = Peer::own(&super::own_binary());
        own.turn(&bench.state(), |own| own.build(&Job { context: input.folder(), tag: &name, cache: false, push: true, shared: None }))?;
    }
    let input = Input::new(bench, "base")?;
    input.dockerfile(&format!("FROM {name}\nRUN echo done > /done\n"))?;
    Ok(input)
}

fn one_file(bench: &Bench) -> Result<Input, String> {
    let input = Input::new(bench, "cold")?;
    input.text_file("hello", 100)?;
    input.dockerfile("FROM scratch\nCOPY hello /hello\n")?;
    Ok(input)
}

const LOCAL: &str = "bench.example/image:latest";

/// Built once, then measured again.
fn rebuild(_: &Bench, input: &Input, peer: &mut Peer) -> Result<Samples, String> {
    let job = Job { context: input.folder(), tag: LOCAL, cache: true, push: false, shared: None };
    peer.build(&job)?;
    Ok(vec![("rebuild", peer.build(&job)?)])
}

/// Measured when everything but the steps is there: the base image is, from an earlier build.
fn uncached(_: &Bench, input: &Input, peer: &mut Peer) -> Result<Samples, String> {
    let warm = input.folder().join("warm");
    peer.build(&Job { context: &warm, tag: "bench.example/warm:latest", cache: true, push: false, shared: None })?;
    let sample = peer.build(&Job { context: input.folder(), tag: LOCAL, cache: false, push: false, shared: None })?;
    Ok(vec![(input.name(), sample)])
}

fn context(_: &Bench, input: &Input, peer: &mut Peer) -> Result<Samples, String> {
    let job = Job { context: input.folder(), tag: LOCAL, cache: true, push: false, shared: None };
    let first = peer.build(&job)?;
    let unchanged = peer.build(&job)?;
    input.touch("files/d3/f7")?;
    let touched = peer.build(&job)?;
    input.change("files/d4/f9")?;
    let changed = peer.build(&job)?;
    Ok(vec![("context-first", first), ("context-unchanged", unchanged), ("context-touched", touched), ("context-changed", changed)])
}

/// Built from nothing and pushed to an empty registry.
fn pushed(_: &Bench, input: &Input, peer: &mut Peer) -> Result<Samples, String> {
    let registry = Registry::start_with(Options::default()).map_err(|error| error.to_string())?;
    let tag = format!("{}/bench/image:latest", registry.address());
    Ok(vec![(input.name(), peer.build(&Job { context: input.folder(), tag: &tag, cache: true, push: true, shared: None })?)])
}

/// Built and pushed with its cache; then again on a machine that has nothing.
fn elsewhere(_: &Bench, input: &Input, peer: &mut Peer) -> Result<Samples, String> {
    let registry = Registry::start_with(Options::default()).map_err(|error| error.to_string())?;
    let (first, second) = (format!("{}/bench/image:first", registry.address()), format!("{}/bench/image:second", registry.address()));
    let repository = format!("{}/bench/cache", registry.address());
    let shared = |read| Some(Shared { repository: &repository, image: &first, read });
    let job = Job { context: input.folder(), tag: &first, cache: true, push: true, shared: shared(false) };
    peer.build(&job)?;
    peer.move_on()?;
    Ok(vec![("cache", peer.build(&Job { tag: &second, shared: shared(true), ..job })?)])
}

fn cold(_: &Bench, input: &Input, peer: &mut Peer) -> Result<Samples, String> {
    Ok(vec![("cold", peer.cold_build(&Job { context: input.folder(), tag: LOCAL, cache: true, push: false, shared: None })?)])
}
