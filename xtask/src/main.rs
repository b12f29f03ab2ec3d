//! Chores of the repository: `cargo xtask COMMAND`.

mod bench;
mod faults;
mod layout;
mod oracle;
mod packages;
mod self_image;
mod tidy;
mod toxic;

use std::path::Path;
use std::process::{Command, ExitCode};

use ovenbird_testing::base::Base;
use ovenbird_testing::dockerd::Dockerd;
use ovenbird_testing::kubernetes;
use ovenbird_testing::registry::{Options, Registry};
use ovenbird_testing::repository;

const USAGE: &str = "\
usage: cargo xtask COMMAND
  test                                      every test; installs the real servers they talk to
  self-image                                Ovenbird, static, in an image that it builds itself
  layout                                    which functions common builds run, for the linker (release builds)
  tidy                                      the laws of the house, over every source file
  cases [--level LEVEL] [-m REGEX]          the literate build cases (LEVEL: root, rootless, single-id, traced, worker, docker, docker-builder)
  oracle [--level LEVEL] [-m REGEX]         the same cases beside a current Docker Engine, image by image; with
         [--refusals]                       --refusals what both say where both refuse
  faults [N]                                kills (N of them), full disks, damaged files; prints a table
  toxic [--pushes N] [--size SIZE]          pushes over connections that break (20 of 1GiB), and the memory of a
        [--layer SIZE]                      push of one large layer (5GiB); prints a table
  bench [CASE…] [--write] …                 speed and memory beside other builders (`bench --help` for all)
  kubernetes build|start|stop               a Kubernetes of the tests, by hand; start prints its kubeconfig
  fixtures                                  make the base images of the tests, if they are not cached
  fuzz-smoke [SECONDS]                      every fuzz target for SECONDS (60)
";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.split_first() {
        Some((&"test", [])) => test(),
        Some((&"self-image", [])) => packages::install(&["build-essential"]).and_then(|()| self_image::build(repository())),
        Some((&"layout", [])) => layout::write(repository()),
        Some((&"tidy", [])) => tidy(),
        Some((&"cases", rest)) => cases(rest),
        Some((&"oracle", rest)) => oracle::run(rest),
        Some((&"faults", [])) => faults::run(200),
        Some((&"faults", [number])) if number.parse::<u32>().is_ok() => faults::run(number.parse().unwrap_or(200)),
        Some((&"toxic", rest)) => toxic::run(rest),
        Some((&"bench", ["--help" | "-h"])) => {
            print!("{}", bench::USAGE);
            Ok(())
        }
        Some((&"bench", rest)) => bench::run(rest),
        Some((&"kubernetes", [word])) => cluster(word),
        Some((&"fixtures", [])) => {
            fixtures();
            Ok(())
        }
        Some((&"fuzz-smoke", [])) => fuzz_smoke("60"),
        Some((&"fuzz-smoke", [seconds])) if seconds.parse::<u32>().is_ok() => fuzz_smoke(seconds),
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn tidy() -> Result<(), String> {
    let findings = tidy::check(repository()).map_err(|error| error.to_string())?;
    if findings.is_empty() { Ok(()) } else { Err(format!("{}\n{} findings", findings.join("\n"), findings.len())) }
}

fn cases(words: &[&str]) -> Result<(), String> {
    let (mut level, mut filter) = ("root", None);
    let mut rest = words.iter();
    while let Some(word) = rest.next() {
        match *word {
            "--level" => level = rest.next().ok_or("--level needs root, rootless, single-id, traced, worker, docker or docker-builder")?,
            "-m" => filter = Some(*rest.next().ok_or("-m needs a regular expression")?),
            other => return Err(format!("unknown argument {other:?}\n{USAGE}")),
        }
    }
    if level != "docker" {
        // The cases run the binary that is built beside the tests.
        run(Command::new(cargo()).args(["build", "--package", "ovenbird-cli"]))?;
    }
    let mut command = Command::new(cargo());
    command.args(["nextest", "run", "--package", "ovenbird-testing", "--test", "cases"]);
    if let Some(filter) = filter {
        command.args(["-E", &format!("test(/{}/)", filter.replace('/', "\\/"))]);
    }
    command.env("OVENBIRD_TESTS_LEVEL", level);
    if !level.starts_with("docker") {
        return run(&mut command);
    }
    // One engine for all cases, with the tests' registry in place of Docker Hub.
    let text = |error: ovenbird_testing::Error| error.to_string();
    let registry = Registry::start_with(Options { bases: &[Base::Busybox, Base::Debian], credentials: None }).map_err(text)?;
    let docker = Dockerd::start_with_mirror(Some(&format!("http://{}", registry.address()))).map_err(text)?;
    let outcomes = std::env::temp_dir().join(format!("ovenbird-outcomes-{}", std::process::id()));
    command.env("OVENBIRD_TESTS_OUTCOMES", &outcomes);
    let done = run(command.env("DOCKER_HOST", docker.host()).envs(docker.config().map(|config| ("DOCKER_CONFIG", config))));
    if level == "docker-builder" {
        summary(&std::fs::read_to_string(&outcomes).unwrap_or_default());
        let _ = std::fs::remove_file(&outcomes);
    }
    done
}

/// What came of the cases on `--builder docker`, and all that is not the same.
fn summary(outcomes: &str) {
    let mut counts = std::collections::BTreeMap::new();
    let mut listed = vec![];
    for line in outcomes.lines() {
        let mut fields = line.split('\t');
        let word = fields.next().unwrap_or_default();
        *counts.entry(word).or_insert(0) += 1;
        // A refusal that the case is about has no reason behind it.
        if word != "same" && !(word == "both-refuse" && fields.nth(1).is_none_or(str::is_empty)) {
            listed.push(line);
        }
    }
    listed.sort_unstable();
    println!("{}", listed.join("\n"));
    let counts: Vec<String> = counts.iter().map(|(word, count)| format!("{count} {word}")).collect();
    println!("{} cases: {}", outcomes.lines().count(), counts.join(", "));
}

/// Programs the tests talk to. A linker and a C compiler are what Rust needs anyway; they are here for minimal machines.
const TEST_PACKAGES: &[&str] = &[
    "acl",
    "apache2-utils",
    "attr",
    "build-essential",
    "busybox-static",
    "bzip2",
    "ca-certificates",
    "debootstrap",
    "docker-registry",
    "docker.io",
    "git",
    "git-lfs",
    "iproute2",
    "libcap2-bin",
    "lighttpd",
    "lighttpd-mod-openssl",
    "openssh-client",
    "openssh-server",
    "openssl",
    "python3-venv",
    "skopeo",
    "uidmap",
    "xz-utils",
    "zstd",
];

fn test() -> Result<(), String> {
    packages::install(TEST_PACKAGES)?;
    // Other vendors' packages may stand in their way; then the cluster's tests are skipped, and say what they lack.
    if let Err(error) = packages::install(&kubernetes::packages()) {
        eprintln!("kubernetes: {error}");
    }
    if Command::new(cargo()).args(["nextest", "--version"]).output().is_ok_and(|done| !done.status.success()) {
        run(Command::new(cargo()).args(["install", "--locked", "cargo-nextest"]))?;
    }
    run(Command::new(cargo()).args(["build", "--workspace"]))?;
    fixtures();
    run(Command::new(cargo()).args(["nextest", "run", "--workspace"]))
}

fn cluster(word: &str) -> Result<(), String> {
    let text = |error: ovenbird_testing::Error| error.to_string();
    match word {
        "build" => {
            packages::install(&kubernetes::packages())?;
            println!("{}", kubernetes::programs().map_err(text)?.display());
        }
        "start" => {
            packages::install(&kubernetes::packages())?;
            println!("export KUBECONFIG={}", kubernetes::start_by_hand().map_err(text)?.display());
        }
        "stop" => kubernetes::stop_by_hand().map_err(text)?,
        other => return Err(format!("unknown word {other:?}: expected build, start or stop")),
    }
    Ok(())
}

fn fixtures() {
    if kubernetes::missing().is_none() {
        match kubernetes::programs() {
            Ok(path) => println!("kubernetes: {}", path.display()),
            Err(error) => println!("kubernetes: not made: {error}"),
        }
    }
    for base in [Base::Busybox, Base::Debian] {
        // The tests that need it say why it is missing; this only saves them the wait.
        match base.layout() {
            Ok(path) => println!("{}: {}", base.repository(), path.display()),
            Err(error) => println!("{}: not made: {error}", base.repository()),
        }
    }
}

fn fuzz_smoke(seconds: &str) -> Result<(), String> {
    let fuzz = repository().join("fuzz");
    let mut targets: Vec<String> = std::fs::read_dir(fuzz.join("fuzz_targets"))
        .map_err(|error| format!("cannot list fuzz targets: {error}"))?
        .flatten()
        .filter_map(|entry| Path::new(&entry.file_name()).file_stem().map(|name| name.to_string_lossy().into_owned()))
        .collect();
    targets.sort();
    for target in targets {
        println!("== {target} for {seconds} s");
        // `cargo run` pins this process's toolchain; the sanitizers need a nightly one.
        let mut command = Command::new("rustup");
        command.args(["run", "nightly", "cargo", "fuzz", "run", &target, "--"]);
        command.args([&format!("-max_total_time={seconds}"), "-rss_limit_mb=2048", "-timeout=10"]);
        let command = command.current_dir(repository()).env_remove("RUSTUP_TOOLCHAIN").env_remove("CARGO").env_remove("RUSTC");
        run(command).map_err(|error| format!("{target}: {error} (needs a nightly toolchain and `cargo install cargo-fuzz`)"))?;
    }
    Ok(())
}

fn cargo() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".into())
}

fn run(command: &mut Command) -> Result<(), String> {
    let status = command.current_dir(repository()).status().map_err(|error| format!("cannot start {command:?}: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("{command:?} ended with {status}")) }
}
