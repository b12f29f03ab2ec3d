//! Snapshots: a root file system as a stack of diff folders, read without mounting anything.
//!
//! Only [`tree::Tree`] and what implements it know overlayfs' whiteout and opaque marks.

pub mod stat_cache;
pub mod tree;
pub mod view;

use std::path::PathBuf;
use std::sync::Arc;

use ovenbird_oci::layer::Owners;

/// One diff folder, immutable once made. See [`ovenbird_oci::layer`] for its form.
#[derive(Debug, Clone)]
pub struct LayerDir {
    /// The folder with the files.
    pub dir: PathBuf,
    /// Intended owners where the disk cannot hold them.
    pub owners: Arc<Owners>,
}

/// A root file system: diff folders, **lowest first**. Empty is an empty root.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// Lowest first.
    pub layers: Vec<LayerDir>,
}
