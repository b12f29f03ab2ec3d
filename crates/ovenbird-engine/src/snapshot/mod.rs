//! Snapshots: a root file system as a stack of diff folders, read without mounting anything.
//!
//! Only [`tree::Tree`] and what implements it know overlayfs' whiteout and opaque marks.

mod catalog;
pub mod content_hash;
pub mod folder;
pub mod overlaid;
pub mod stat_cache;
pub mod tree;
pub mod view;

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use catalog::Catalog;
use ovenbird_oci::layer::Owners;

/// One diff folder, immutable once made. See [`ovenbird_oci::layer`] for its form.
#[derive(Debug)]
pub struct LayerDir {
    /// The folder with the files.
    pub dir: PathBuf,
    /// Intended owners where the disk cannot hold them.
    pub owners: Owners,
    /// Read at the first look-up.
    catalog: OnceLock<Option<Catalog>>,
}

impl LayerDir {
    /// A finished diff folder.
    pub fn new(dir: impl Into<PathBuf>, owners: Owners) -> Self {
        Self { dir: dir.into(), owners, catalog: OnceLock::new() }
    }

    /// A diff folder that is being written: nothing of it is remembered.
    pub fn growing(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), owners: Owners::new(), catalog: OnceLock::from(None) }
    }

    fn catalog(&self) -> Option<&Catalog> {
        self.catalog.get_or_init(|| Catalog::read(&self.dir)).as_ref()
    }
}

/// A root file system: diff folders, **lowest first**. Empty is an empty root.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// Lowest first.
    pub layers: Vec<Arc<LayerDir>>,
}
