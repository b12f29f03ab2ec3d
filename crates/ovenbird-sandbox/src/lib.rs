//! Runs one build step isolated from the machine, at the best level the machine allows.
//!
//! The only crate of the workspace with `unsafe`: raw system calls between `clone` and `exec`.
//! It must not know of Dockerfiles, caches or images. Linux only.
#![cfg(target_os = "linux")]
#![allow(unsafe_code, reason = "system calls that std does not offer, and everything between clone and exec")]

mod caps;
mod cgroup;
mod child;
mod chroot;
mod credentials;
mod failure;
mod idmap;
mod limits;
mod memory;
mod mounts;
mod network;
mod notify;
mod owners;
mod place;
mod prepare;
pub mod probe;
mod reap;
mod remove;
mod seccomp;
mod socket;
pub mod spec;
mod stat;
mod step;
mod syscall;
#[cfg(target_arch = "x86_64")]
mod traced;
#[cfg(not(target_arch = "x86_64"))]
#[path = "traced/elsewhere.rs"]
mod traced;

use std::sync::atomic::AtomicBool;

pub use mounts::lowers_max;
pub use probe::{Level, LevelStatus, Probe};
pub use spec::{DEFAULT_HOSTNAME, Limits, Mount, MountSource, Network, Outcome, Root, SandboxError, Step, StepUser, Stream};

/// Moves this process into the level's namespaces; call once, early in `main`, while the process has one thread.
///
/// `Rootless` and `SingleId`: a user namespace with a mount namespace, after which this process is uid 0 there.
/// `Root`: a private mount namespace. `Chroot` and `Traced`: nothing.
pub fn enter(level: Level) -> Result<(), SandboxError> {
    use failure::Context as _;
    match level {
        Level::Root => syscall::unshare(libc::CLONE_NEWNS)
            .and_then(|()| prepare::make_private())
            .context(|| "entering a private mount namespace".to_owned()),
        Level::Rootless | Level::SingleId => idmap::enter(level),
        Level::Chroot | Level::Traced => Ok(()),
    }
}

/// Runs one step to its end on the calling thread (which the step dies with). Output arrives through `output` while it runs.
/// Returns when every process of the step is dead and every mount is gone. `cancel` set to true kills the step.
pub fn run(level: Level, step: &Step, output: &mut dyn FnMut(Stream, &[u8]), cancel: &AtomicBool) -> Result<Outcome, SandboxError> {
    match level {
        Level::Chroot => chroot::run(step, output, cancel),
        Level::Traced => traced::run(step, output, cancel),
        Level::Root | Level::Rootless | Level::SingleId => step::run(level, step, output, cancel),
    }
}
