//! Layers: a diff folder to a tar stream and back.
//!
//! A *diff folder* holds what one layer adds, in overlayfs form: a whiteout is a character device
//! 0/0, an opaque folder has the xattr `user.overlay.opaque=y` (also as root: mounts use
//! `userxattr`), every other `*.overlay.*` xattr is noise and never leaves the machine.
//! Where the file system cannot hold an owner, a device node or an xattr (one id mapped), an
//! [`Owners`] table beside the folder says what was meant.

mod compress;
mod pack;
mod search;
pub mod tar;
mod unpack;
mod walk;

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, OsString};
use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::store::{StoreError, remedy};
use crate::{Descriptor, Digest};

pub use compress::repack;
pub use pack::{Elsewhere, pack, pack_searched, search};
pub use search::{Found, Needles};
pub use unpack::{Lower, extract, unpack};
pub(crate) use unpack::{decompress, root_parts};
pub use walk::remove;

/// Longest path, with its end, that programs can open (PATH_MAX).
const MAX_PATH: usize = 4096;
/// Mark of a folder that hides the lower one.
const OPAQUE: &CStr = c"user.overlay.opaque";
/// Capabilities of a program.
const CAPABILITY: &CStr = c"security.capability";
/// Where they are kept when the file system lets us set no others; never in a layer.
const STASHED_CAPABILITY: &CStr = c"user.ovenbird.capability";

/// Intended metadata of one path, where the disk holds something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// User id in the image.
    pub uid: u32,
    /// Group id in the image.
    pub gid: u32,
    /// For a device node kept as an empty regular file: full `st_mode` (type and permissions) and device number (major, minor).
    /// For a regular file or a folder whose owner has more permissions on the disk than was meant: full `st_mode`, and zeros.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub node: Option<(u32, u32, u32)>,
}

impl Owner {
    /// The device node that an empty file stands for.
    pub fn device(&self) -> Option<(u32, u32, u32)> {
        self.node.filter(|(mode, ..)| matches!(FileType::from_raw_mode(*mode), FileType::CharacterDevice | FileType::BlockDevice))
    }

    /// The permissions of a regular file or a folder, where they are not those on the disk.
    pub fn permissions(&self) -> Option<u32> {
        self.node.map(|(mode, ..)| mode & 0o7777).filter(|_| self.device().is_none())
    }
}

/// User and group of a file of which no table says anything, by what the disk says: what an ordinary user has is root's in the image.
pub fn untold_owner(uid: u32, gid: u32) -> (u32, u32) {
    if rustix::process::geteuid().is_root() { (uid, gid) } else { (0, 0) }
}

/// Path relative to the diff folder (raw bytes) → intended metadata. Paths that are absent are what the disk says.
pub type Owners = BTreeMap<OsString, Owner>;

/// How a layer is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Plain tar.
    None,
    /// 256 KiB members, level 1–12, what does not shrink stored; same bytes for any number of threads.
    Gzip(u8),
    /// Level 1–22; same bytes for any number of threads.
    Zstd(u8),
}

/// `tar`, `gzip5`, `zstd3`: layers of the same files under the same name are the same bytes.
impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("tar"),
            Self::Gzip(level) => write!(f, "gzip{level}"),
            Self::Zstd(level) => write!(f, "zstd{level}"),
        }
    }
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

impl Packed {
    /// The blob.
    pub fn descriptor(&self) -> Descriptor {
        Descriptor::new(&self.media_type, self.digest, self.size)
    }
}

/// What can go wrong with a layer.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The file system refused.
    #[error("cannot {action} {}: {source}{}", path.display(), remedy(source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The tar or its compression cannot be read.
    #[error("the layer cannot be read: {reason}; get the image again, or from whoever made it")]
    Malformed {
        /// Why.
        reason: String,
    },
    /// Something in the diff folder cannot be expressed in a layer.
    #[error("cannot put {} in a layer: {reason}", path.display())]
    Unpackable {
        /// What.
        path: PathBuf,
        /// Why, and what to do.
        reason: &'static str,
    },
    /// An entry tries to leave the root.
    #[error("the layer entry {entry:?} leaves the root: {reason}; do not use this image")]
    Escape {
        /// Entry name.
        entry: String,
        /// How.
        reason: &'static str,
    },
    /// Bytes do not match the digest.
    #[error("the layer's content hashes to {actual}, not to {expected}; get the image again")]
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

impl LayerError {
    /// What is wrong, told of an archive that is no layer.
    pub fn of_archive(&self) -> String {
        match self {
            Self::Malformed { reason } => reason.clone(),
            Self::Escape { entry, reason } => format!("the entry {entry:?} leaves the root: {reason}"),
            other => other.to_string(),
        }
    }
}

/// Removes a file or a folder with everything in it, however deep and whatever its permissions; gone already is fine.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Err(io::ErrorKind::InvalidInput.into()) };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let folder = match rustix::fs::open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(folder) => folder,
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    walk::remove(folder.as_fd(), &CString::new(name.as_bytes())?)
}

/// How ids and nodes are put on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ownership {
    /// `chown` and `mknod` work (root, or a user namespace with ranges). A device other than a whiteout that cannot be made is recorded.
    Real,
    /// One id: owners and devices are recorded in the [`Owners`] table.
    Recorded,
    /// One id without rights over permissions: those that would shut the owner out are recorded too.
    Unprivileged,
}

impl Ownership {
    /// The permissions that a regular file or a folder gets on the disk, and what is to be recorded of those that were meant.
    pub fn permissions(self, folder: bool, mode: u32) -> (u32, Option<(u32, u32, u32)>) {
        let wanted = if folder { 0o700 } else { 0o600 };
        if self != Self::Unprivileged || mode & wanted == wanted {
            return (mode, None);
        }
        let kind = if folder { FileType::Directory } else { FileType::RegularFile };
        (mode | wanted, Some((kind.as_raw_mode() | mode & 0o7777, 0, 0)))
    }
}
