//! What builds: one trait, one implementation a technique.

mod context;
mod docker_engine;
mod engine;
mod gone;
mod kind;
mod library;
mod workshop;

use std::sync::Arc;

use ovenbird_engine::input::Exportable;
use ovenbird_engine::{Cancel, EventSink};
use ovenbird_oci::publish::Target;
use ovenbird_oci::registry::Breaks;
use ovenbird_oci::{Descriptor, Digest, Platform, Reference};

pub use docker_engine::DockerEngineBuilder;
pub use engine::{EngineBuilder, told};
pub(crate) use engine::{agents, options, secrets};
pub(crate) use gone::Gone;
pub use kind::BuilderKind;
pub use library::Library;
pub(crate) use library::VERSION_LABEL;

use crate::error::Error;
use crate::request::{BuildRequest, OutputKind};
use crate::source::SourceTree;
use crate::workflow::Base;

/// What runs beside a build: where its events go and what stops it.
#[derive(Clone)]
pub struct Job {
    /// Gets every event.
    pub sink: Arc<dyn EventSink>,
    /// Stops it.
    pub cancel: Cancel,
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job").field("cancel", &self.cancel).finish_non_exhaustive()
    }
}

/// A built image.
#[derive(Debug, Clone, PartialEq)]
pub struct Image {
    /// Manifest, or index for several platforms.
    pub target: Descriptor,
    /// Each platform: manifest and config digest.
    pub platforms: Vec<(Platform, Descriptor, Digest)>,
    /// Steps that ran.
    pub ran: usize,
    /// Steps that came from the cache.
    pub cached: usize,
    /// Time of everything in it, seconds since 1970; `None`: as it was.
    pub source_date_epoch: Option<i64>,
    /// What the caches of other machines may get of it.
    pub exportable: Exportable,
    /// Transfers that broke and went on.
    pub breaks: Breaks,
    /// What it was made from.
    pub bases: Vec<Base>,
}

/// Turns a source into an image and takes the image to where it was asked for.
pub trait Builder: Sync {
    /// Builds.
    fn build(&self, source: &SourceTree, request: &BuildRequest, job: &Job) -> Result<Image, Error>;
    /// Names the image on this machine.
    fn name(&self, image: &Image, names: &[Reference]) -> Result<(), Error>;
    /// Pushes it under all of these names, or under none. Tells what broke on the way and went on.
    fn publish(&self, image: &Image, to: &[Target], job: &Job) -> Result<Breaks, Error>;
    /// Writes it somewhere else.
    fn export(&self, image: &Image, output: &OutputKind, names: &[Reference], job: &Job) -> Result<(), Error>;
    /// Writes the caches that the request asks for; layers are mounted from `published` where they can be.
    fn export_caches(
        &self,
        image: &Image,
        source: &SourceTree,
        request: &BuildRequest,
        published: &[Reference],
        job: &Job,
    ) -> Result<(), Error>;
}
