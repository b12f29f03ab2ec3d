//! Ovenbird, the product: what was asked ([`request`]), how this machine is set up ([`settings`]), where the source comes from
//! ([`source`]), what builds it ([`builder`]) and what runs the whole job ([`driver`]).
//!
//! Doors (command line, service, Python) call [`driver::Driver::run`] and render [`Error`] and [`BuildReport`].
//! It must not know of terminals or HTTP routes. Environment, home and clock are read in [`settings`] only.

pub mod builder;
pub mod choice;
pub mod deploy;
pub mod docker_engine;
pub mod driver;
pub mod error;
pub mod launch;
pub mod lint;
pub mod naming;
mod pieces;
pub mod project;
pub mod registry;
pub mod remote;
pub mod report;
pub mod request;
pub mod self_image;
pub mod settings;
pub mod source;
pub mod worker;
pub mod workflow;

pub use builder::{Builder, BuilderKind, DockerEngineBuilder, EngineBuilder, Image, Job, Library};
pub use driver::{Driver, LocalDriver};
pub use error::{Detail, Error, Kind};
pub use lint::lint;
pub use ovenbird_dockerfile::suggest;
pub use remote::RemoteDriver;
pub use report::BuildReport;
pub use request::BuildRequest;
pub use self_image::SelfImage;
pub use settings::{Environment, Settings};
