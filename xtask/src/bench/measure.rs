//! Time and peak memory of command lines.
//!
//! Memory is the kernel's own high-water mark of resident pages (`VmHWM`), read while the processes live: the largest process of the
//! client, and the sum of the daemon's. A control group's peak would count the page cache too, that is, every file read or written.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Of one run.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    /// From start to end, all commands.
    pub(super) seconds: f64,
    /// Bytes: the client's largest process and the daemon.
    pub(super) memory: u64,
}

/// Runs commands one after the other; their output is in `log`, and in the error when one fails.
pub(super) fn run(commands: &mut [Command], daemon: &[u32], log: &Path) -> Result<Sample, String> {
    // What earlier runs wrote is not this one's to wait for.
    rustix::fs::sync();
    for pid in daemon {
        // 5: set the high-water mark to what is resident now.
        let _ = fs::write(format!("/proc/{pid}/clear_refs"), "5");
    }
    let (mut seconds, mut client) = (0.0, 0);
    for command in commands {
        let (took, peak) = run_one(command, log)?;
        seconds += took;
        client = client.max(peak);
    }
    Ok(Sample { seconds, memory: client + daemon.iter().map(|pid| high_water(*pid)).sum::<u64>() })
}

fn run_one(command: &mut Command, log: &Path) -> Result<(f64, u64), String> {
    let failed = |error: std::io::Error| format!("cannot run {}: {error}", command.get_program().display());
    let file = File::create(log).map_err(failed)?;
    let second = file.try_clone().map_err(failed)?;
    let line = format!("{command:?}");
    let began = Instant::now();
    let mut child =
        command.stdin(Stdio::null()).stdout(file).stderr(second).spawn().map_err(|error| format!("cannot run {line}: {error}"))?;
    let ended = AtomicBool::new(false);
    let pid = child.id();
    let (status, seconds, peak) = std::thread::scope(|scope| {
        let watch = scope.spawn(|| watch(pid, &ended));
        let status = child.wait();
        let seconds = began.elapsed().as_secs_f64();
        ended.store(true, Ordering::Relaxed);
        (status, seconds, watch.join().unwrap_or(0))
    });
    match status {
        Ok(status) if status.success() => Ok((seconds, peak)),
        Ok(status) => {
            let text = fs::read_to_string(log).unwrap_or_default();
            let tail: Vec<&str> = text.lines().rev().take(15).collect();
            Err(format!("{line} ended with {status}:\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n")))
        }
        Err(error) => Err(format!("cannot wait for {line}: {error}")),
    }
}

/// Peak of the largest process of a tree until told to end.
fn watch(root: u32, ended: &AtomicBool) -> u64 {
    // A process's parent is looked up once, when it is new: a look at all of them is then one reading of a folder.
    let mut parents: HashMap<u32, u32> = HashMap::new();
    let mut peak = 0;
    let began = Instant::now();
    while !ended.load(Ordering::Relaxed) {
        for pid in processes() {
            let mut ancestor = pid;
            for _ in 0..64 {
                if ancestor == root {
                    peak = peak.max(high_water(pid));
                    break;
                }
                let parent = *parents.entry(ancestor).or_insert_with(|| parent(ancestor).unwrap_or(0));
                if parent <= 1 {
                    break;
                }
                ancestor = parent;
            }
        }
        // Short commands need close looks, long ones must not be disturbed.
        let pause = if began.elapsed() < Duration::from_millis(200) { 2 } else { 20 };
        std::thread::sleep(Duration::from_millis(pause));
    }
    peak
}

fn processes() -> impl Iterator<Item = u32> {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    all.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn parent(pid: u32) -> Option<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name before it may hold anything, brackets too.
    text.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// Processes whose parent is `pid`.
pub(super) fn children(pid: u32) -> Vec<u32> {
    processes().filter(|child| parent(*child) == Some(pid)).collect()
}

/// Name of the program that a process runs.
pub(super) fn program(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}

fn high_water(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()).and_then(|word| word.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// The middle value, or the mean of the middle two.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => sorted[odd / 2],
        even => f64::midpoint(sorted[even / 2 - 1], sorted[even / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_odd_and_even() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn a_run_has_time_and_memory() {
        let log = tempfile::NamedTempFile::new().unwrap();
        let mut sleep = Command::new("sleep");
        sleep.arg("0.05");
        let sample = run(&mut [sleep], &[std::process::id()], log.path()).unwrap();
        assert!(sample.seconds >= 0.05 && sample.seconds < 30.0, "{sample:?}");
        assert!(sample.memory > high_water(std::process::id()) / 2, "{sample:?}");
        let mut fails = Command::new("sh");
        fails.args(["-c", "echo why; exit 3"]);
        let error = run(&mut [fails], &[], log.path()).unwrap_err();
        assert!(error.contains("exit status: 3") && error.contains("why"), "{error}");
    }
}
