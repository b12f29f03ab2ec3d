//! What a small layer holds, in memory: most layers of a long chain of `COPY` hold a few files, and a
//! look-up that asked the disk for each layer would make the whole build cost their number squared.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags};

use super::view::{is_opaque, is_whiteout};

/// Most entries of a layer that is kept in memory; a larger one is asked on disk.
const MAX_ENTRIES: usize = 256;

/// What a layer has at a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mark {
    /// A folder; when opaque, it hides the layers below.
    Folder { opaque: bool },
    /// Something removed.
    Whiteout,
    /// A file, a link, a device…
    Other,
}

/// Everything in one small layer.
#[derive(Debug)]
pub(super) struct Catalog {
    marks: HashMap<PathBuf, Mark>,
}

impl Catalog {
    /// `None` when the layer is large, or not readable as a whole.
    pub(super) fn read(root: &Path) -> Option<Self> {
        let mut marks = HashMap::new();
        let mut open = vec![PathBuf::new()];
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        while let Some(path) = open.pop() {
            let real = if path.as_os_str().is_empty() { root.to_owned() } else { root.join(&path) };
            let fd = rustix::fs::openat(CWD, &real, flags, Mode::empty()).ok()?;
            for item in Dir::read_from(&fd).ok()? {
                let item = item.ok()?;
                let name = OsStr::from_bytes(item.file_name().to_bytes());
                if name == "." || name == ".." {
                    continue;
                }
                if marks.len() + open.len() >= MAX_ENTRIES {
                    return None;
                }
                let child = path.join(name);
                let (mut kind, mut whiteout) = (item.file_type(), false);
                if matches!(kind, FileType::CharacterDevice | FileType::Unknown) {
                    let stat = rustix::fs::statat(&fd, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
                    (kind, whiteout) = (FileType::from_raw_mode(stat.st_mode), is_whiteout(&stat));
                }
                match kind {
                    FileType::Directory => open.push(child),
                    _ => drop(marks.insert(child, if whiteout { Mark::Whiteout } else { Mark::Other })),
                }
            }
            marks.insert(path, Mark::Folder { opaque: is_opaque(&fd).ok()? });
        }
        Some(Self { marks })
    }

    pub(super) fn get(&self, path: &Path) -> Option<Mark> {
        self.marks.get(path).copied()
    }
}
