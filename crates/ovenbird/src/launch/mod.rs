//! Where a worker runs: what starts `ovenbird worker` there and gives the pipe to it.
//!
//! A launcher knows nothing of builds. What it starts ends when its pipe is closed.

mod caller;
pub mod container;
pub mod kubernetes;
pub mod leash;
pub mod prefect;
pub mod process;
pub mod ssh;

use std::ffi::OsString;
use std::io::{Read, Write};
use std::time::Duration;

use crate::builder::Job;
use crate::error::Error;
use crate::report::BuildReport;

pub use container::{ContainerLauncher, ContainerPlace};
pub use kubernetes::{KubernetesLauncher, KubernetesPlace, KubernetesSettings};
pub use prefect::{PrefectLauncher, PrefectPlace, PrefectServer};
pub use process::ProcessLauncher;
pub use ssh::{Host, HostDefaults, SshLauncher};

/// What is started.
#[derive(Debug, Clone, Default)]
pub struct WorkerSpec {
    /// Flags of `ovenbird`, before `worker`.
    pub flags: Vec<OsString>,
    /// What follows `worker`.
    pub arguments: Vec<OsString>,
}

/// How a worker gets its source where it cannot be sent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ByReference {
    /// Repository for sources; `None`: that of the image.
    pub sources: Option<String>,
}

/// The pipe to a worker, and the worker's life.
pub struct Pipe {
    /// What it reads.
    pub to: Box<dyn Write + Send>,
    /// What it writes.
    pub from: Box<dyn Read + Send>,
    /// The worker itself.
    pub life: Box<dyn Life>,
}

impl std::fmt::Debug for Pipe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pipe")
    }
}

/// A worker that was started.
pub trait Life: Send {
    /// Waits for its end, at most so long. How it ended and what it said beside the pipe, for a message; `None`: it goes on.
    fn wait(&mut self, limit: Duration) -> Option<String>;
    /// Ends it now.
    fn kill(&mut self);
    /// Its last word has come. Is there nothing more to wait for?
    fn settled(&mut self) -> bool {
        false
    }
    /// After [`wait`](Self::wait): why it ended, where its place knows better than the pipe.
    fn cause(&mut self) -> Option<Error> {
        None
    }
    /// The build succeeded and the worker has ended: keeps of its place what was asked to be kept.
    fn keep(&mut self, _report: &BuildReport, _job: &Job) -> Result<(), Error> {
        Ok(())
    }
}

/// Starts workers in one kind of place.
pub trait Launcher: Sync {
    /// Starts one.
    fn launch(&self, spec: &WorkerSpec, job: &Job) -> Result<Pipe, Error>;
    /// Where, for messages: `on ssh://build1`.
    fn place(&self) -> String;
    /// How often a worker there must hear that its caller lives; `None`: the pipe's end is enough.
    fn heartbeat(&self) -> Option<Duration> {
        None
    }
    /// Do the caller's paths and sockets mean the same there?
    fn has_our_files(&self) -> bool {
        false
    }
    /// Where nothing can be streamed to a worker: how it gets its source. The pipe then carries an errand.
    fn by_reference(&self) -> Option<ByReference> {
        None
    }
}
