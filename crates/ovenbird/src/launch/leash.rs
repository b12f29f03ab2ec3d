//! A foreign program on a leash: nothing that it starts outlives who started it.
//!
//! Between the two is this program once more (`ovenbird leash`), a small parent. Its standard input is the leash: first come the bytes that
//! are for the foreign program, then nothing for as long as somebody holds the other end. When that is let go of, by a cancelled build as by one that
//! was killed, or when the foreign program has ended, everything that it started is killed: its process group, and what has left the
//! group, whose parent the small one becomes (it is their subreaper). It must not know what the program is for.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, WaitOptions, getpid, kill_process, kill_process_group, set_child_subreaper, waitid, waitpid,
};

/// This program, also when its file was replaced meanwhile.
const SELF: &str = "/proc/self/exe";
/// Name of the command that holds a leash.
pub const COMMAND: &str = "leash";
/// How long what is killed may take to be gone.
const GONE: Duration = Duration::from_secs(5);
/// How often it is looked whether it is.
const LOOK: Duration = Duration::from_millis(5);

/// A command that runs a program on a leash, which is for `input` bytes of what is written to it. Working directory and environment are those that
/// are set here.
pub(crate) fn command(program: &Path, input: usize) -> Command {
    let mut command = Command::new(SELF);
    command.arg0("ovenbird").arg(COMMAND).arg(input.to_string()).arg("--").arg(program).process_group(0);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// A program that runs on a leash. Let go of when it is dropped.
#[derive(Debug)]
pub(crate) struct Leashed {
    pub(crate) child: Child,
    /// Writes what is for the program, and gives the leash back.
    leash: Option<JoinHandle<Option<ChildStdin>>>,
}

impl Leashed {
    /// Starts what [`command`] made, and gives the program its input.
    pub(crate) fn start(command: &mut Command, input: Vec<u8>) -> std::io::Result<Self> {
        let mut child = command.spawn()?;
        let stdin = child.stdin.take();
        let leash = std::thread::spawn(move || {
            let mut stdin = stdin?;
            stdin.write_all(&input).and_then(|()| stdin.flush()).ok()?;
            Some(stdin)
        });
        Ok(Self { child, leash: Some(leash) })
    }

    /// How it ended; `None`: it goes on.
    pub(crate) fn ended(&mut self) -> std::io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }
}

impl Drop for Leashed {
    fn drop(&mut self) {
        // The small parent reads it all at once, whatever the program does.
        drop(self.leash.take().map(JoinHandle::join));
        let end = Instant::now() + GONE;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > end {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(LOOK);
        }
    }
}

/// The small parent: runs `program` until it ends or the leash is let go of. Gives its exit code; 128 and the signal for one that was killed.
pub fn hold(program: &OsStr, input: u64, mut leash: impl Read + Send + 'static) -> std::io::Result<u8> {
    // Without it only the process group is found: as far as the kernel lets us.
    let _ = set_child_subreaper(Some(getpid()));
    let mut child = start(Command::new(program).process_group(0).stdin(Stdio::piped()))?;
    let group = Pid::from_child(&child);
    let to_program = child.stdin.take();
    // Held while the group's number is certain to be its own.
    let over = Arc::new(Mutex::new(false));
    let watched = Arc::clone(&over);
    std::thread::spawn(move || {
        let mut bytes = vec![];
        let whole = (&mut leash).take(input).read_to_end(&mut bytes).is_ok_and(|read| read as u64 == input);
        if whole {
            // A program that does not read its input must not keep the leash from being watched.
            std::thread::spawn(move || drop(to_program.map(|mut pipe| pipe.write_all(&bytes))));
            let _ = std::io::copy(&mut leash, &mut std::io::sink());
        }
        let over = watched.lock().unwrap_or_else(PoisonError::into_inner);
        if !*over {
            let _ = kill_process_group(group, Signal::KILL);
        }
    });
    // Not reaped: until then nobody else has its number.
    while waitid(WaitId::Pid(group), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT).is_err_and(|errno| errno == rustix::io::Errno::INTR) {}
    {
        let mut over = over.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = kill_process_group(group, Signal::KILL);
        *over = true;
    }
    let status = child.wait();
    kill_orphans();
    let status = status?;
    Ok(u8::try_from(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))).unwrap_or(u8::MAX))
}

/// Starts a program. One that was written a moment ago may still be open for writing in a process that is just being started elsewhere.
fn start(command: &mut Command) -> std::io::Result<Child> {
    let end = Instant::now() + Duration::from_secs(1);
    loop {
        match command.spawn() {
            Err(error) if error.kind() == std::io::ErrorKind::ExecutableFileBusy && Instant::now() < end => std::thread::sleep(LOOK),
            other => return other,
        }
    }
}

/// Kills what has left the group, and what that has started: each becomes a child of this process when its parent is gone.
fn kill_orphans() {
    let end = Instant::now() + GONE;
    loop {
        let children = children();
        if children.is_empty() || Instant::now() > end {
            return;
        }
        for child in children {
            let _ = kill_process(child, Signal::KILL);
        }
        while matches!(waitpid(None, WaitOptions::NOHANG), Ok(Some(_))) {}
        std::thread::sleep(LOOK);
    }
}

/// Processes whose parent this one is.
fn children() -> Vec<Pid> {
    let own = getpid().as_raw_nonzero().to_string();
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let child = |name: &OsStr| {
        let pid = Pid::from_raw(name.to_str()?.parse().ok()?)?;
        let stat = std::fs::read_to_string(Path::new("/proc").join(name).join("stat")).ok()?;
        // `PID (NAME) STATE PARENT`, and a name may have anything in it.
        let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?;
        (parent == own).then_some(pid)
    };
    entries.filter_map(|entry| child(&entry.file_name())).collect()
}
