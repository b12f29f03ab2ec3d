//! Every case at every level that this machine has: root, an ordinary user with subordinate ids, one without, chroot, and
//! an ordinary user who has given up every right.
//!
//! Each (case, level) is a test of its own and runs in a process of its own: this program again, as the level's user. It speaks the
//! protocol of the standard harness as far as cargo and nextest use it. What cannot run says why and passes.
#![allow(missing_docs, reason = "a test")]

mod calls;
mod cases;
mod fixture;
mod programs;
mod raw;

use std::io::{BufRead as _, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use ovenbird_sandbox::Level;

/// `case/level` that a child is to run.
pub(crate) const CASE: &str = "OVENBIRD_SANDBOX_CASE";
/// Long enough for a busy machine.
const DEATH: Duration = Duration::from_secs(20);

fn main() -> ExitCode {
    if let Ok(name) = std::env::var(CASE) {
        return match name.strip_prefix(raw::NAME) {
            Some(what) => raw::run(what),
            None if name == calls::NAME => calls::run(),
            None => child(&name),
        };
    }
    let args: Vec<String> = std::env::args().skip(1).collect();
    let has = |flag: &str| args.iter().any(|arg| arg == flag);
    let names = names();
    if has("--list") {
        if !has("--ignored") {
            for name in &names {
                println!("{name}: test");
            }
        }
        return ExitCode::SUCCESS;
    }
    let filters: Vec<&String> = args.iter().filter(|arg| !arg.starts_with('-')).collect();
    let wanted = |name: &str| {
        filters.is_empty() || filters.iter().any(|filter| if has("--exact") { *filter == name } else { name.contains(filter.as_str()) })
    };
    let mut failed = 0;
    for name in names.iter().filter(|name| wanted(name)) {
        match parent(name) {
            Ok(note) => println!("test {name} ... ok{note}"),
            Err(reason) => {
                failed += 1;
                println!("test {name} ... FAILED\n{reason}");
            }
        }
    }
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn names() -> Vec<String> {
    let mut names: Vec<String> =
        cases::all().iter().flat_map(|case| case.levels.iter().map(|level| format!("{}/{}", case.name, level.name()))).collect();
    names.extend(Level::ALL.map(|level| format!("{KILLED}/{}", level.name())));
    names
}

const KILLED: &str = "killed_engine_leaves_nothing";

fn split(name: &str) -> Option<(&str, Level)> {
    let (case, level) = name.rsplit_once('/')?;
    Some((case, Level::ALL.into_iter().find(|known| known.name() == level)?))
}

fn child(name: &str) -> ExitCode {
    let Some((case, level)) = split(name) else { return ExitCode::from(2) };
    if case == KILLED {
        return cases::run_for_ever(level);
    }
    match cases::all().iter().find(|known| known.name == case) {
        Some(case) => case.run(level),
        None => ExitCode::from(2),
    }
}

fn parent(name: &str) -> Result<String, String> {
    let (case, level) = split(name).ok_or("no such test")?;
    let mut command = match fixture::command(level) {
        Ok(command) => command,
        Err(reason) => return Ok(format!(" (skipped: {reason})")),
    };
    if let Some(reason) = cases::missing(case) {
        return Ok(format!(" (skipped: {reason})"));
    }
    command.env(CASE, name);
    if case == KILLED {
        return killed(&mut command, level).map(|()| String::new());
    }
    let output = command.output().map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(String::new());
    }
    Err(format!("{}\n{}{}", output.status, String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)))
}

/// Kills an engine in the middle of a step and looks for the step's processes.
fn killed(command: &mut Command, level: Level) -> Result<(), String> {
    let mark = format!("{}.{}", cases::FOR_EVER, level as u32 * 100_000 + std::process::id() % 100_000);
    let mut engine = command.env(cases::MARK, &mark).stdout(Stdio::piped()).spawn().map_err(|error| error.to_string())?;
    let (mut folder, mut line) = (String::new(), String::new());
    let mut stdout = BufReader::new(engine.stdout.take().ok_or("no stdout")?);
    stdout.read_line(&mut folder).and_then(|_| stdout.read_line(&mut line)).map_err(|error| error.to_string())?;
    if line != "running\n" {
        let _ = engine.kill();
        let _ = engine.wait();
        return Err(format!("the step did not start: {line:?}"));
    }
    let before = sleeping(&mark);
    engine.kill().map_err(|error| error.to_string())?;
    engine.wait().map_err(|error| error.to_string())?;
    if before < 3 {
        return Err(format!("{before} processes before the kill, not 3"));
    }
    let start = Instant::now();
    while sleeping(&mark) > 0 {
        if start.elapsed() > DEATH {
            return Err("the step outlived its engine".to_owned());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    std::fs::remove_dir_all(folder.trim_end()).map_err(|error| format!("{folder}: {error}"))
}

/// How many processes run `sleep MARK`.
fn sleeping(mark: &str) -> usize {
    let Ok(entries) = std::fs::read_dir("/proc") else { return 0 };
    entries
        .flatten()
        .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
        .filter(|line| line.split(|byte| *byte == 0).collect::<Vec<_>>().starts_with(&[b"sleep".as_slice(), mark.as_bytes()]))
        .count()
}
