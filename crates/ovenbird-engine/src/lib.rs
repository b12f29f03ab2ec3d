//! The build engine: Dockerfile in, image out. One engine for every place.
//!
//! Layers of modules, imports go left to right only:
//! `event plan snapshot state | cache frontend | ops export | solve | build`.

pub mod build;
pub mod event;
pub mod frontend;
pub mod ops;
pub mod plan;
pub mod snapshot;

pub use build::{BuildInput, BuildOutput, Cancel};
pub use event::{Event, EventSink};
