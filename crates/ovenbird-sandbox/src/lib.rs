//! Runs one build step isolated from the machine, at the best level the machine allows.
//!
//! The only crate of the workspace with `unsafe`: raw system calls between `clone` and `exec`.
//! It must not know of Dockerfiles, caches or images. Linux only.

pub mod probe;
pub mod spec;

pub use probe::{Level, LevelStatus, Probe};
pub use spec::{Limits, Mount, MountSource, Network, Outcome, Root, SandboxError, Step, StepUser, Stream};

/// Moves this process into the level's namespaces; call once, early in `main`, while the process has one thread.
///
/// `Rootless` and `SingleId`: a user namespace with a mount namespace, after which this process is uid 0 there.
/// `Root`: a private mount namespace. `Chroot`: nothing.
pub fn enter(_level: Level) -> Result<(), SandboxError> {
    Ok(())
}

/// Runs one step to its end on the calling thread (which the step dies with). Output arrives through `output` while it runs.
/// Returns when every process of the step is dead and every mount is gone. `cancel` set to true kills the step.
pub fn run(
    _level: Level,
    _step: &Step,
    _output: &mut dyn FnMut(Stream, &[u8]),
    _cancel: &std::sync::atomic::AtomicBool,
) -> Result<Outcome, SandboxError> {
    Err(SandboxError::Impossible { reason: String::new() })
}
