//! Runs one build step isolated from the machine, at the best level the machine allows.
//!
//! The only crate of the workspace with `unsafe`: raw system calls between `clone` and `exec`.
//! It must not know of Dockerfiles, caches or images. Linux only.

pub mod probe;
pub mod spec;

pub use probe::{Level, LevelStatus, Probe};
pub use spec::{Limits, Mount, MountSource, Network, Outcome, Root, SandboxError, Step, StepUser, Stream};
