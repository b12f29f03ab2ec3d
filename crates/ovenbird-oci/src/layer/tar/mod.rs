//! The tar format: what layers and archives are made of. POSIX pax is written; ustar, pax, GNU and v7 are read.
//!
//! Only bytes: nothing here opens a path. Sources: POSIX.1-2017 pax; GNU tar manual, "Basic Tar Format" and "Storing Sparse Files".

mod read;
mod write;

pub use read::Reader;
pub use write::encode;

/// Size of a block.
pub const BLOCK: usize = 512;

/// Type of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Regular file.
    File,
    /// Hard link to an earlier entry.
    Link,
    /// Symbolic link.
    Symlink,
    /// Character device.
    Char,
    /// Block device.
    Block,
    /// Directory.
    Directory,
    /// Named pipe.
    Fifo,
}

/// Everything about an entry but its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Raw bytes as in the archive; directories end in `/`.
    pub path: Vec<u8>,
    /// Type.
    pub kind: Kind,
    /// Target of a link, raw.
    pub link: Vec<u8>,
    /// Permissions, setuid, setgid and sticky bits.
    pub mode: u32,
    /// User id.
    pub uid: u64,
    /// Group id.
    pub gid: u64,
    /// Seconds since 1970.
    pub mtime: i64,
    /// Fraction of a second in nanoseconds (read, never written).
    pub mtime_nanos: u32,
    /// Bytes of content.
    pub size: u64,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Extended attributes by name (`SCHILY.xattr.*` records).
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Header {
    /// A header of this path, with nothing else set.
    pub fn new(path: impl Into<Vec<u8>>, kind: Kind) -> Self {
        Self {
            path: path.into(),
            kind,
            link: vec![],
            mode: 0,
            uid: 0,
            gid: 0,
            mtime: 0,
            mtime_nanos: 0,
            size: 0,
            device: (0, 0),
            xattrs: vec![],
        }
    }
}

/// Zero bytes that follow content of this size.
pub const fn padding(size: u64) -> usize {
    (size.wrapping_neg() % BLOCK as u64) as usize
}
