//! The build engine: Dockerfile in, image out. One engine for every place.
//!
//! Layers of modules, imports go left to right only:
//! `event plan snapshot state input schedule | cache frontend trace | ops export | solve | build publish`.

pub mod build;
pub mod cache;
pub mod error;
pub mod event;
pub mod export;
pub mod frontend;
pub mod input;
pub mod ops;
pub mod plan;
pub mod prune;
pub mod publish;
pub mod schedule;
pub mod snapshot;
pub mod solve;
pub mod state;
pub mod trace;

pub use build::{Engine, EngineOptions};
pub use error::{BuildError, ErrorKind};
pub use event::{Event, EventSink};
pub use export::output::{Export, OutputFile, PathOrStdout};
pub use input::{BuildInput, BuildOutput, Cancel};
pub use prune::{Budget, CacheEntry, CacheKind, DiskUsage, PruneOptions, PruneReport};
pub use solve::identity::{ContentId, PlatformId};
