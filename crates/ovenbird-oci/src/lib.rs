//! OCI formats: digests, references, platforms, images, layers, the blob store, archives, registries.
//!
//! Floor 0: it knows nothing of builds. `digest`, `reference`, `platform`, `image` and `publish` do no I/O;
//! `layer`, `archive`, `beside` and `regular_file` touch only the readers, writers, files and folders they are given; `store` stays
//! under its folder, `lease` in its file, `growth` in memory; `registry` and `keychain` talk to the network and to credential helpers.

pub mod archive;
pub mod beside;
pub mod digest;
pub mod growth;
pub mod image;
pub mod keychain;
pub mod layer;
pub mod lease;
pub mod platform;
pub mod publish;
pub mod reference;
pub mod registry;
pub mod regular_file;
pub mod store;

pub use digest::Digest;
pub use image::{Descriptor, ImageConfig, Index, Manifest};
pub use platform::Platform;
pub use reference::Reference;
