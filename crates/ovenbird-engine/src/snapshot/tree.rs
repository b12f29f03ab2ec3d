//! Read-only access to a tree of files, whatever holds it.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

/// Type of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Regular file.
    File,
    /// Folder.
    Dir,
    /// Symbolic link.
    Symlink,
    /// Character device (major, minor).
    Char(u32, u32),
    /// Block device (major, minor).
    Block(u32, u32),
    /// Named pipe.
    Fifo,
    /// Socket (never copied into layers).
    Socket,
}

/// What is known of an entry without reading its content. Never follows a symlink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Type.
    pub kind: Kind,
    /// Permission bits with setuid, setgid, sticky (0o7777).
    pub mode: u32,
    /// Owner as meant in the image (the owners table applied).
    pub uid: u32,
    /// Group as meant in the image.
    pub gid: u32,
    /// Bytes.
    pub size: u64,
    /// Seconds and nanoseconds since 1970.
    pub mtime: (i64, u32),
    /// Where it really is on disk.
    pub disk: PathBuf,
    /// Device, inode and link count on disk, to find hard links.
    pub inode: (u64, u64, u64),
}

/// A tree. Paths are relative to its root, without `.` and `..`; the empty path is the root.
pub trait Tree: Send + Sync {
    /// The entry itself; `None` when there is nothing. Components before the last must be real folders (no symlink is followed).
    fn entry(&self, path: &Path) -> io::Result<Option<Entry>>;
    /// Names in a folder, sorted by bytes.
    fn names(&self, dir: &Path) -> io::Result<Vec<OsString>>;
    /// Is this path hidden by an ignore file? (Local contexts only.)
    fn is_ignored(&self, _path: &Path) -> bool {
        false
    }
    /// May a walk skip everything below this folder? (Local contexts only.)
    fn can_prune(&self, _dir: &Path) -> bool {
        false
    }
}
