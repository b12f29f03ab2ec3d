//! A worker as a process of this machine: the same program, with the same state directory.

use std::io::Read;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ovenbird_engine::Event;

use super::{Launcher, Life, Pipe, WorkerSpec};
use crate::builder::Job;
use crate::error::{Error, Kind};
use crate::worker::wire::shown;

/// This program, also when its file was replaced meanwhile.
const SELF: &str = "/proc/self/exe";

/// Most of what a worker says beside the pipe.
const MAX_SAID: usize = 16 << 10;

/// How often it is looked whether it has ended.
const LOOK: Duration = Duration::from_millis(5);

/// Starts this program once more.
#[derive(Debug, Clone, Copy, Default)]
pub struct ProcessLauncher;

impl Launcher for ProcessLauncher {
    fn launch(&self, spec: &WorkerSpec, job: &Job) -> Result<Pipe, Error> {
        job.sink.emit(Event::Message { text: format!("building {}", self.place()) });
        let mut command = Command::new(SELF);
        command.arg0("ovenbird").args(&spec.flags).arg("worker").args(&spec.arguments);
        start(command, "a worker process")
    }

    fn place(&self) -> String {
        "in a process of its own".into()
    }

    fn has_our_files(&self) -> bool {
        true
    }
}

/// Starts a program whose standard input and output are the pipe.
pub(super) fn start(mut command: Command, what: &str) -> Result<Pipe, Error> {
    // Ctrl-C is for the caller only, who then says it through the pipe.
    command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let cannot = |error: &std::io::Error| Error::from_chain(Kind::Driver, error).while_doing(format!("cannot start {what}"));
    let mut child = command.spawn().map_err(|error| cannot(&error))?;
    let (Some(to), Some(from), Some(beside)) = (child.stdin.take(), child.stdout.take(), child.stderr.take()) else {
        return Err(Error::new(Kind::Bug, format!("{what} was started without pipes")));
    };
    let said = Arc::new(Mutex::new(Vec::new()));
    let listener = Some(listen(beside, Arc::clone(&said)));
    Ok(Pipe { to: Box::new(to), from: Box::new(from), life: Box::new(Running { child, said, listener }) })
}

/// Keeps the end of what is said.
pub(super) fn listen(mut from: impl Read + Send + 'static, said: Arc<Mutex<Vec<u8>>>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut piece = [0; 4096];
        while let Ok(read @ 1..) = from.read(&mut piece) {
            let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
            said.extend_from_slice(&piece[..read]);
            let over = said.len().saturating_sub(MAX_SAID);
            said.drain(..over);
        }
    })
}

struct Running {
    child: Child,
    said: Arc<Mutex<Vec<u8>>>,
    listener: Option<JoinHandle<()>>,
}

impl Life for Running {
    fn wait(&mut self, limit: Duration) -> Option<String> {
        let end = Instant::now() + limit;
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) if Instant::now() < end => std::thread::sleep(LOOK),
                _ => return None,
            }
        };
        // What it started may keep its standard error open.
        while self.listener.as_ref().is_some_and(|listener| !listener.is_finished()) && Instant::now() < end {
            std::thread::sleep(LOOK);
        }
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let said = shown(said.trim_ascii(), MAX_SAID);
        Some(if said.is_empty() { format!("it ended with {status}") } else { format!("it ended with {status}: {said}") })
    }

    fn kill(&mut self) {
        let _ = self.child.kill();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
        let _ = self.child.wait();
    }
}
