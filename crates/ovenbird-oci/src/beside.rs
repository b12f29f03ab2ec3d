//! Temporary files and folders outside the state folder, most beside the place they are made for: `.ovenbird-partial-RANDOM`.
//!
//! Each is locked (`flock`) by its owner while it is being made, so what a killed process left is known: nobody has it locked. Who writes
//! into the same folder next removes it.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, OFlags};
use tempfile::{NamedTempFile, TempDir};

use crate::layer::remove_tree;

const PREFIX: &str = ".ovenbird-partial-";
const RANDOM: usize = 12;

/// A folder that is locked until it is dropped, and then removed.
#[derive(Debug)]
pub struct Folder {
    dir: TempDir,
    _lock: File,
}

impl Folder {
    /// Where.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Of any depth, and folders that nobody may read: what is in it may come from strangers.
        let _ = remove_tree(self.dir.path());
    }
}

/// Makes a file with these permissions (less the umask), to be renamed to its place.
pub fn file_in(folder: &Path, mode: u32) -> io::Result<NamedTempFile> {
    loop {
        let file =
            tempfile::Builder::new().prefix(PREFIX).rand_bytes(RANDOM).permissions(Permissions::from_mode(mode)).tempfile_in(folder)?;
        if is_ours(file.as_file(), file.path()) {
            return Ok(file);
        }
    }
}

/// Makes a folder.
pub fn folder_in(folder: &Path) -> io::Result<Folder> {
    loop {
        let dir = tempfile::Builder::new().prefix(PREFIX).rand_bytes(RANDOM).tempdir_in(folder)?;
        let lock = match File::open(dir.path()) {
            Ok(lock) => lock,
            // Somebody took it for a leftover at once.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        if is_ours(&lock, dir.path()) {
            return Ok(Folder { dir, _lock: lock });
        }
    }
}

/// Locks what was made just now, unless somebody took it for a leftover before. Where there are no locks nobody does.
fn is_ours(file: &File, path: &Path) -> bool {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Err(rustix::io::Errno::WOULDBLOCK) => false,
        _ => same(file, path),
    }
}

fn same(file: &File, path: &Path) -> bool {
    let (Ok(open), Ok(named)) = (file.metadata(), fs::symlink_metadata(path)) else { return false };
    (open.dev(), open.ino()) == (named.dev(), named.ino())
}

/// Removes what dead processes of this user left half made in a folder. What cannot be removed stays: it is in nobody's way.
pub fn clear(folder: &Path) {
    let user = rustix::process::geteuid().as_raw();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let random = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        if random.is_none_or(|random| random.len() != RANDOM || !random.bytes().all(|b| b.is_ascii_alphanumeric())) {
            continue;
        }
        let path = entry.path();
        // Neither a link is followed nor a pipe waited for.
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
        let Ok(file) = File::options().read(true).custom_flags(flags).open(&path) else { continue };
        let made_by_us = file.metadata().is_ok_and(|meta| meta.uid() == user && (meta.is_file() || meta.is_dir()));
        if made_by_us && rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() && same(&file, &path) {
            let _ = remove_tree(&path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn many_make_folders_while_others_clear() {
        let dir = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            let makers: Vec<_> =
                (0..4).map(|_| scope.spawn(|| (0..500).all(|_| folder_in(dir.path()).is_ok_and(|made| made.path().is_dir())))).collect();
            while makers.iter().any(|maker| !maker.is_finished()) {
                clear(dir.path());
            }
            assert!(makers.into_iter().all(|maker| maker.join().unwrap()));
        });
    }

    #[test]
    fn what_nobody_makes_any_more_goes() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let (file, folder) = (file_in(dir.path(), 0o666).unwrap(), folder_in(dir.path()).unwrap());
        fs::write(folder.path().join("x"), "").unwrap();
        let used = names(dir.path());
        assert_eq!(used.len(), 2);
        fs::write(at(".ovenbird-partial-abcdefABCDEF"), "half").unwrap();
        fs::create_dir_all(at(".ovenbird-partial-012345678901/deep/er")).unwrap();
        fs::set_permissions(at(".ovenbird-partial-012345678901/deep"), Permissions::from_mode(0o0)).unwrap();
        clear(dir.path());
        assert_eq!(names(dir.path()), used);
        drop((file, folder));
        assert!(names(dir.path()).is_empty());
        clear(&at("missing"));
    }

    #[test]
    fn deep_folders_go_too() {
        let dir = tempfile::tempdir().unwrap();
        let folder = folder_in(dir.path()).unwrap();
        let mut now = File::open(folder.path()).unwrap();
        for _ in 0..3_000 {
            rustix::fs::mkdirat(&now, "d", rustix::fs::Mode::from_raw_mode(0o700)).unwrap();
            now = rustix::fs::openat(&now, "d", OFlags::DIRECTORY, rustix::fs::Mode::empty()).unwrap().into();
        }
        drop((now, folder));
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn what_only_looks_alike_stays() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in [
            ".ovenbird-notes",
            ".ovenbird-partial-",
            ".ovenbird-partial-short",
            ".ovenbird-partial-toolongtobeone",
            ".ovenbird-partial-abc.efABCDEF",
        ] {
            fs::write(at(name), "mine").unwrap();
        }
        fs::create_dir(at("folder")).unwrap();
        symlink("folder", at(".ovenbird-partial-linklinklink")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            at(".ovenbird-partial-pipepipepipe"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        let all = names(dir.path());
        clear(dir.path());
        assert_eq!(names(dir.path()), all);
    }
}
