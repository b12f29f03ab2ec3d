//! Small files that somebody else made: settings, credentials, certificates.
//!
//! A pipe in such a place must not hang whoever reads it, and a device must not feed them for ever. `/dev/null` is taken for an empty
//! file: it is how people say that there is none.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use rustix::fs::OFlags;

/// What a link in the last place of a path is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Links {
    /// Followed.
    Follow,
    /// Refused.
    Refuse,
}

/// Opens a regular file, without waiting for anybody. `None`: it is `/dev/null`.
pub fn open(path: &Path, links: Links) -> io::Result<Option<File>> {
    let mut flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    if links == Links::Refuse {
        flags |= OFlags::NOFOLLOW;
    }
    let file = File::options().read(true).custom_flags(flags.bits().cast_signed()).open(path)?;
    let meta = file.metadata()?;
    if meta.file_type().is_char_device() && meta.rdev() == rustix::fs::makedev(1, 3) {
        return Ok(None);
    }
    if !meta.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
    }
    Ok(Some(file))
}

/// Reads a file of at most `limit` bytes.
pub fn read(path: &Path, limit: u64, links: Links) -> io::Result<Vec<u8>> {
    let Some(file) = open(path, links)? else { return Ok(vec![]) };
    let mut bytes = vec![];
    // Not what its length says: it may grow.
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("it is longer than {limit} bytes")));
    }
    Ok(bytes)
}

/// The same as text.
pub fn read_to_string(path: &Path, limit: u64, links: Links) -> io::Result<String> {
    String::from_utf8(read(path, limit, links)?).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("file"), "text").unwrap();
        std::os::unix::fs::symlink(path("file"), path("link")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, path("pipe"), rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
        let say = |path: &Path, limit, links| read_to_string(path, limit, links).unwrap_or_else(|e| format!("! {e}"));
        for (name, limit, links, expected) in [
            ("file", 4, Links::Refuse, "text"),
            ("file", 3, Links::Refuse, "! it is longer than 3 bytes"),
            ("link", 4, Links::Follow, "text"),
            ("link", 4, Links::Refuse, "! Too many levels of symbolic links (os error 40)"),
            ("pipe", 4, Links::Follow, "! it is no regular file"),
            (".", 4, Links::Follow, "! it is no regular file"),
            ("/dev/null", 4, Links::Follow, ""),
            ("/dev/zero", 4, Links::Follow, "! it is no regular file"),
        ] {
            assert_eq!(say(&path(name), limit, links), expected, "{name}");
        }
    }
}
