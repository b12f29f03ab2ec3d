//! OCI image layouts and docker archives, to and from the store.

use std::io::{self, Read, Write};

use crate::store::Store;
use crate::{Descriptor, Reference};

/// What can go wrong with an archive.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// Reading or writing failed.
    #[error("the archive cannot be {action}: {source}")]
    Io {
        /// `read` or `written`.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Not what it should be.
    #[error("the archive is malformed: {reason}")]
    Malformed {
        /// Why.
        reason: String,
    },
    /// The store refused.
    #[error(transparent)]
    Store(#[from] crate::store::StoreError),
}

/// Writes an OCI layout as a tar (`index.json`, `oci-layout`, `blobs/`), with `names` as annotations
/// (`org.opencontainers.image.ref.name`, `io.containerd.image.name`). Deterministic.
pub fn write_oci(_store: &Store, _target: &Descriptor, _names: &[Reference], _out: &mut dyn Write) -> Result<(), ArchiveError> {
    Ok(())
}

/// Writes an OCI layout into a folder (made when missing, other images in its `index.json` are kept).
pub fn write_oci_dir(_store: &Store, _target: &Descriptor, _names: &[Reference], _dir: &std::path::Path) -> Result<(), ArchiveError> {
    Ok(())
}

/// Writes a docker archive that is also an OCI layout (`manifest.json` beside `index.json`), as `docker save` 25+ does. One platform only.
pub fn write_docker(_store: &Store, _target: &Descriptor, _names: &[Reference], _out: &mut dyn Write) -> Result<(), ArchiveError> {
    Ok(())
}

/// Reads an OCI layout tar or a docker archive (found by content; gzip allowed) into the store; every blob is verified.
/// Returns each image with its names.
pub fn read(_store: &Store, _archive: &mut dyn Read) -> Result<Vec<(Descriptor, Vec<Reference>)>, ArchiveError> {
    Ok(vec![])
}

/// Reads an OCI layout folder.
pub fn read_dir(_store: &Store, _dir: &std::path::Path) -> Result<Vec<(Descriptor, Vec<Reference>)>, ArchiveError> {
    Ok(vec![])
}
