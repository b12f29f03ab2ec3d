//! Layers: a diff folder to a tar stream and back.
//!
//! A *diff folder* holds what one layer adds, in overlayfs form: a whiteout is a character device
//! 0/0, an opaque folder has the xattr `user.overlay.opaque=y` (also as root: mounts use
//! `userxattr`), every other `*.overlay.*` xattr is noise and never leaves the machine.
//! Where the file system cannot hold an owner, a device node or an xattr (one id mapped), an
//! [`Owners`] table beside the folder says what was meant.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::Digest;
use crate::store::{Store, StoreError};

/// Intended metadata of one path, where the disk holds something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// User id in the image.
    pub uid: u32,
    /// Group id in the image.
    pub gid: u32,
    /// For a device node kept as an empty regular file: full `st_mode` (type and permissions) and device number (major, minor).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub node: Option<(u32, u32, u32)>,
}

/// Path relative to the diff folder (raw bytes) → intended metadata. Paths that are absent are what the disk says.
pub type Owners = BTreeMap<OsString, Owner>;

/// How a layer is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Plain tar.
    None,
    /// 1 MiB members, level 1–12; same bytes for any number of threads.
    Gzip(u8),
    /// Level 1–22; same bytes for any number of threads.
    Zstd(u8),
}

/// How a diff folder becomes a layer.
#[derive(Debug, Clone, Copy)]
pub struct PackOptions {
    /// Compression.
    pub compression: Compression,
    /// Set every mtime to this (seconds since 1970); `None` keeps whole seconds.
    pub mtime: Option<i64>,
    /// Compression threads.
    pub threads: usize,
}

/// A packed layer, its blob in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Packed {
    /// Digest of the uncompressed tar.
    pub diff_id: Digest,
    /// Digest of the blob.
    pub digest: Digest,
    /// Bytes of the blob.
    pub size: u64,
    /// Bytes of the tar.
    pub uncompressed: u64,
    /// Layer media type (OCI).
    pub media_type: String,
}

/// What can go wrong with a layer.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The file system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The tar or its compression cannot be read.
    #[error("the layer cannot be read: {reason}")]
    Malformed {
        /// Why.
        reason: String,
    },
    /// An entry tries to leave the root.
    #[error("the layer entry {entry:?} leaves the root: {reason}")]
    Escape {
        /// Entry name.
        entry: String,
        /// How.
        reason: &'static str,
    },
    /// Bytes do not match the digest.
    #[error("the layer's content hashes to {actual}, not to {expected}")]
    Mismatch {
        /// Wanted.
        expected: Digest,
        /// Got.
        actual: Digest,
    },
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// How ids and nodes are put on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ownership {
    /// `chown` and `mknod` work (root, or a user namespace with ranges). A device other than a whiteout that cannot be made is recorded.
    Real,
    /// One id: owners and devices are recorded in the [`Owners`] table.
    Recorded,
}

/// Packs the diff folder into a blob of `store`: sorted, PAX, hard links kept, whiteouts turned into OCI form.
pub fn pack(_dir: &Path, _owners: &Owners, _options: &PackOptions, _store: &Store) -> Result<Packed, LayerError> {
    Err(LayerError::Malformed { reason: "missing".into() })
}

/// Unpacks a layer blob (compression found by magic) into the empty folder `dir`; verifies `diff_id` when given.
/// `lower` finds a path in the layers below, for hard links that cross layers.
pub fn unpack(
    _blob: impl Read,
    _dir: &Path,
    _diff_id: Option<&Digest>,
    _ownership: Ownership,
    _lower: &dyn Fn(&Path) -> Option<PathBuf>,
) -> Result<Owners, LayerError> {
    Err(LayerError::Malformed { reason: "missing".into() })
}
