//! Intended owners of files at the single-id and traced levels, by inode.
//!
//! On disk everything belongs to the one id that there is. Inodes survive renames and hard links; a number that the file system
//! gives away again after a removal is told apart by its time of birth.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::mounts::open_in;
use crate::spec::{MountSource, Step};
use crate::syscall::{self, c_path, check};

/// Device node as (`st_mode`, major, minor). For a regular file or a folder, whose disk gives its owner more than was meant: the mode.
pub(crate) type Device = (u32, u32, u32);

/// uid, gid, and the device that an empty file stands for.
pub(crate) type Owner = (u32, u32, Option<Device>);

/// Is this the mode of a device node?
pub(crate) fn is_device(mode: u32) -> bool {
    matches!(mode & libc::S_IFMT, libc::S_IFCHR | libc::S_IFBLK)
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) struct Inode {
    device: (u32, u32),
    number: u64,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    uid: u32,
    gid: u32,
    node: Option<Device>,
    born: (i64, u32),
}

/// What was recorded of a step, or is known of its lower layers.
#[derive(Default, Clone, Debug)]
pub(crate) struct Owners {
    recorded: HashMap<Inode, Entry>,
    /// Lower layers never change while a step runs, so the inode alone identifies a file; copying up keeps it.
    lower: HashMap<Inode, Owner>,
    /// Lower files with several names: copying one up breaks the link and gives it a new number, so only its name is left.
    /// For that to be told from a new file of that name, the recorder notes every file that the step makes.
    linked: HashMap<PathBuf, Owner>,
    /// Something differs, or did, from what the disk says.
    differs: bool,
}

/// What a look at a file must ask `statx` for.
pub(crate) const MASK: u32 = libc::STATX_BASIC_STATS | libc::STATX_BTIME;

/// A file as `statx` shows it.
pub(crate) struct Seen {
    pub(crate) inode: Inode,
    born: (i64, u32),
    /// A file with other names.
    linked: bool,
}

/// `statx` without following; `path` may be empty for the descriptor itself.
pub(crate) fn look(dir: BorrowedFd<'_>, path: &std::ffi::CStr) -> io::Result<Seen> {
    // SAFETY: an all-zero statx is valid; the kernel fills it.
    let stat = unsafe {
        let mut stat: libc::statx = std::mem::zeroed();
        let flags = libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW;
        check(libc::syscall(libc::SYS_statx, dir.as_raw_fd(), path.as_ptr(), flags, MASK, &raw mut stat))?;
        stat
    };
    Ok(Seen::from(&stat))
}

impl From<&libc::statx> for Seen {
    /// Needs what is in [`MASK`].
    fn from(stat: &libc::statx) -> Seen {
        let inode = Inode { device: (stat.stx_dev_major, stat.stx_dev_minor), number: stat.stx_ino };
        let folder = u32::from(stat.stx_mode) & libc::S_IFMT == libc::S_IFDIR;
        Seen { inode, born: (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec), linked: stat.stx_nlink > 1 && !folder }
    }
}

impl Owners {
    /// The intended owner so far.
    pub(crate) fn get(&self, seen: &Seen) -> (u32, u32) {
        self.known(seen).map_or((0, 0), |(uid, gid, _)| (uid, gid))
    }

    /// The intended owner, and the device node that an empty file stands for, when anything is known of the file.
    pub(crate) fn known(&self, seen: &Seen) -> Option<Owner> {
        match self.recorded.get(&seen.inode) {
            Some(entry) if entry.born == seen.born => Some((entry.uid, entry.gid, entry.node)),
            _ => self.lower.get(&seen.inode).copied(),
        }
    }

    /// Files that the step makes must be [`set`](Self::set), even those of root.
    pub(crate) fn wants_all(&self) -> bool {
        !self.linked.is_empty()
    }

    /// Every file is what the disk says.
    pub(crate) fn is_plain(&self) -> bool {
        !self.differs
    }

    /// Notes who is to own what is mounted in `root`. One folder at two places belongs to whom the later one says.
    pub(crate) fn add_mounts(&mut self, root: BorrowedFd<'_>, step: &Step) {
        let own = step.mounts.iter().filter_map(|mount| match &mount.source {
            MountSource::Secret { uid, gid, .. } | MountSource::Socket { uid, gid, .. } => Some((&mount.target, *uid, *gid)),
            _ => None,
        });
        for (target, uid, gid) in own.chain(step.mount_owners.iter().map(|(target, uid, gid)| (target, *uid, *gid))) {
            // Another mount may hide it.
            let Ok(mounted) = open_in(root, target, libc::O_PATH) else { continue };
            if (uid, gid) != (0, 0)
                && let Ok(seen) = look(mounted.as_fd(), syscall::EMPTY)
            {
                self.lower.insert(seen.inode, (uid, gid, None));
                self.differs = true;
            }
        }
    }

    pub(crate) fn set(&mut self, seen: &Seen, uid: u32, gid: u32, node: Option<Device>) {
        self.put(seen, uid, gid, node.or_else(|| self.known(seen).and_then(|known| known.2)));
    }

    /// Like [`set`](Self::set), but without a node it is none any more.
    pub(crate) fn put(&mut self, seen: &Seen, uid: u32, gid: u32, node: Option<Device>) {
        self.differs |= (uid, gid) != (0, 0) || node.is_some();
        self.recorded.insert(seen.inode, Entry { uid, gid, node, born: seen.born });
    }
}

/// The known owners of lower files by their inodes in the merged mount. Paths that are gone are skipped.
pub(crate) fn lower(merged: BorrowedFd<'_>, known: &[(PathBuf, u32, u32, Option<Device>)]) -> Owners {
    let mut owners = Owners::default();
    for (path, uid, gid, node) in known {
        let relative = path.strip_prefix("/").unwrap_or(path);
        if let Ok(seen) = c_path(relative).and_then(|path| look(merged, &path)) {
            owners.lower.insert(seen.inode, (*uid, *gid, *node));
            owners.differs |= (*uid, *gid, *node) != (0, 0, None);
            if seen.linked {
                owners.linked.insert(relative.to_owned(), (*uid, *gid, *node));
            }
        }
    }
    owners
}

/// The known owners of the files of a folder that a step changes in place: there, numbers of removed files come again.
pub(crate) fn of_folder(root: BorrowedFd<'_>, known: &[(PathBuf, u32, u32, Option<Device>)]) -> Owners {
    let mut owners = Owners::default();
    for (path, uid, gid, node) in known {
        if let Ok(seen) = c_path(path.strip_prefix("/").unwrap_or(path)).and_then(|path| look(root, &path)) {
            owners.put(&seen, *uid, *gid, *node);
        }
    }
    owners
}

/// The owners of everything in `upper` that are not what the disk says. `fallback` owns what the step made itself.
pub(crate) fn table(
    merged: BorrowedFd<'_>,
    upper: &Path,
    recorded: &Owners,
    fallback: (u32, u32),
) -> io::Result<Vec<(PathBuf, u32, u32, Option<Device>)>> {
    let mut files = Vec::new();
    // A new name of a lower file has another number in the merged mount than the old one; in the upper both are one file.
    let mut links = HashMap::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(upper.join(&folder))? {
            let entry = entry?;
            let path = folder.join(entry.file_name());
            let meta = entry.metadata()?;
            if meta.file_type().is_char_device() && meta.rdev() == 0 {
                continue; // a whiteout
            }
            if meta.is_dir() {
                folders.push(path.clone());
            }
            let seen = look(merged, &c_path(&path)?)?;
            let known = recorded.known(&seen).or_else(|| recorded.linked.get(&path).filter(|_| !meta.is_dir()).copied());
            if let Some(known) = known {
                links.insert(meta.ino(), known);
            }
            files.push((path, meta, known));
        }
    }
    let mut out = Vec::new();
    for (path, meta, known) in files {
        let linked = || links.get(&meta.ino()).filter(|_| meta.nlink() > 1 && !meta.is_dir()).copied();
        let (uid, gid, node) = match known.or_else(linked) {
            Some(known) => known,
            None if fallback != (0, 0) && !copied_up(&upper.join(&path)) => (fallback.0, fallback.1, None),
            None => (0, 0, None),
        };
        // The step may have changed the bits of the empty file since.
        let bits = |mode: u32| if is_device(mode) { meta.mode() & 0o7777 } else { mode & 0o7777 };
        let node = node.map(|(mode, major, minor)| (mode & libc::S_IFMT | bits(mode), major, minor));
        if (uid, gid) != (0, 0) || node.is_some() {
            out.push((path, uid, gid, node));
        }
    }
    out.sort();
    Ok(out)
}

/// Overlay notes on every file and folder in the upper where it was copied from.
fn copied_up(path: &Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { return false };
    // SAFETY: valid C strings; no buffer: only the size is asked for.
    unsafe { libc::lgetxattr(path.as_ptr(), c"user.overlay.origin".as_ptr(), std::ptr::null_mut(), 0) >= 0 }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn follows_renames_and_tells_new_files_apart() {
        let folder = tempfile::tempdir().unwrap();
        let open = || crate::mounts::open_path(folder.path()).unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["kept", "moved", "gone", "device", "root", "low", "linked", "replaced"] {
            fs::write(path(name), name).unwrap();
        }
        fs::hard_link(path("linked"), path("linked-too")).unwrap();
        fs::hard_link(path("replaced"), path("replaced-too")).unwrap();
        let mut owners = lower(
            open().as_fd(),
            &[("/low".into(), 7, 8, None), ("absent".into(), 1, 1, None), ("linked".into(), 9, 9, None), ("replaced".into(), 9, 9, None)],
        );
        let dir = open();
        let seen = |name: &std::ffi::CStr| look(dir.as_fd(), name).unwrap();
        owners.set(&seen(c"kept"), 1, 2, None);
        owners.set(&seen(c"moved"), 3, 4, None);
        owners.set(&seen(c"gone"), 5, 6, None);
        owners.set(&seen(c"device"), 0, 0, Some((libc::S_IFBLK, 7, 0)));
        owners.set(&seen(c"root"), 0, 0, None);
        assert_eq!(owners.get(&seen(c"low")), (7, 8));
        assert_eq!(owners.get(&seen(c"kept")), (1, 2));
        fs::rename(path("moved"), path("there")).unwrap();
        fs::remove_file(path("gone")).unwrap();
        for index in 0..50 {
            fs::write(path(&format!("new-{index}")), "may get the number of the removed file").unwrap();
        }
        assert!(owners.wants_all());
        // What copying up does to a file with several names, and what a step does that makes a new one.
        for name in ["linked", "replaced"] {
            fs::remove_file(path(name)).unwrap();
            fs::remove_file(path(&format!("{name}-too"))).unwrap();
            fs::write(path(name), "").unwrap();
        }
        owners.set(&seen(c"replaced"), 0, 0, None);
        fs::set_permissions(path("device"), fs::Permissions::from_mode(0o640)).unwrap();
        let table = table(dir.as_fd(), folder.path(), &owners, (0, 0)).unwrap();
        let want: Vec<(PathBuf, u32, u32, Option<Device>)> = vec![
            ("device".into(), 0, 0, Some((libc::S_IFBLK | 0o640, 7, 0))),
            ("kept".into(), 1, 2, None),
            ("linked".into(), 9, 9, None),
            ("low".into(), 7, 8, None),
            ("there".into(), 3, 4, None),
        ];
        assert_eq!(table, want);
    }
}
