//! [`Tree`] over a plain folder with ignore patterns: a local context.
//!
//! Folders are opened once, each from its parent's handle, and kept in a bounded cache.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use ovenbird_dockerfile::ignore::Patterns;
use ovenbird_oci::layer::untold_owner;
use rustix::fs::{AtFlags, Dir, Stat};
use rustix::io::Errno;

use super::tree::{Entry, Location, Tree, open_dir_at, open_dir_path};
use super::view::split;

/// Open folders a tree keeps; below the usual limit of 1,024 open files with several trees in use.
const MAX_HANDLES: usize = 128;
/// Paths that are known to be no folders.
const MAX_ABSENT: usize = 16 * 1024;

#[derive(Default)]
struct Cache {
    /// `None`: it is no folder.
    dirs: HashMap<OsString, Option<Arc<OwnedFd>>>,
    handles: usize,
}

/// A local context: a folder of somebody else, who may change it while it is read. Never leaves the folder; owners are 0:0.
pub struct Folder {
    dir: PathBuf,
    ignore: Patterns,
    /// Owners are those of the disk.
    owned: bool,
    /// Device and inode of a folder that nobody shall see.
    hidden: Option<(u64, u64)>,
    cache: Mutex<Cache>,
}

impl Folder {
    /// Of this folder and its ignore file. Nothing is opened yet.
    pub fn new(dir: impl Into<PathBuf>, ignore: Patterns) -> Self {
        Self { dir: dir.into(), ignore, owned: false, hidden: None, cache: Mutex::default() }
    }

    /// With the owners that the disk holds.
    #[must_use]
    pub fn with_owners(self) -> Self {
        Self { owned: true, ..self }
    }

    /// Leaves a folder below it out, wherever it is: as if it were not there. Known by device and inode, for it may have several paths.
    #[must_use]
    pub fn without(self, device: u64, inode: u64) -> Self {
        Self { hidden: Some((device, inode)), ..self }
    }

    fn cache(&self) -> std::sync::MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_hidden(&self, stat: &Stat) -> bool {
        self.hidden == Some((stat.st_dev, stat.st_ino))
    }

    fn describe(&self, stat: &Stat) -> Entry {
        let entry = Entry::from_stat(stat);
        let (uid, gid) = if self.owned { untold_owner(entry.uid, entry.gid) } else { (0, 0) };
        Entry { uid, gid, ..entry }
    }

    /// A folder that is there.
    fn existing_dir(&self, dir: &Path) -> io::Result<Arc<OwnedFd>> {
        split(dir)?;
        match self.open_dir(dir)? {
            Some(fd) => Ok(fd),
            None => Err(if self.find(dir)?.is_some() { Errno::NOTDIR } else { Errno::NOENT }.into()),
        }
    }

    fn open_dir(&self, path: &Path) -> io::Result<Option<Arc<OwnedFd>>> {
        let mut missing = Vec::new();
        let mut above = None;
        {
            let cache = self.cache();
            for folder in path.ancestors() {
                if let Some(known) = cache.dirs.get(folder.as_os_str()) {
                    above.clone_from(known);
                    if above.is_none() {
                        return Ok(None);
                    }
                    break;
                }
                missing.push(folder);
            }
        }
        while let Some(folder) = missing.pop() {
            let opened = match (&above, folder.file_name()) {
                (Some(above), Some(name)) => match open_dir_at(above, name) {
                    Ok(fd) if self.hidden.is_some() && self.is_hidden(&rustix::fs::fstat(&fd)?) => None,
                    Ok(fd) => Some(Arc::new(fd)),
                    Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => None,
                    Err(error) => return Err(error.into()),
                },
                _ => Some(Arc::new(open_dir_path(&self.dir)?)),
            };
            let mut cache = self.cache();
            if cache.handles >= MAX_HANDLES || cache.dirs.len() >= MAX_ABSENT {
                *cache = Cache::default();
            }
            cache.handles += usize::from(opened.is_some());
            cache.dirs.insert(folder.as_os_str().to_owned(), opened.clone());
            if opened.is_none() {
                return Ok(None);
            }
            above = opened;
        }
        Ok(above)
    }

    /// The entry's folder and its `stat`.
    fn find(&self, path: &Path) -> io::Result<Option<(Arc<OwnedFd>, Stat)>> {
        let (parent, name) = split(path)?.unwrap_or((path, OsStr::new(".")));
        let Some(dir) = self.open_dir(parent)? else { return Ok(None) };
        match rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if self.is_hidden(&stat) => Ok(None),
            Ok(stat) => Ok(Some((dir, stat))),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// What is in an open folder, sorted by bytes.
fn names(dir: &OwnedFd) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for item in Dir::read_from(dir)? {
        let item = item?;
        let name = OsStr::from_bytes(item.file_name().to_bytes());
        if name != "." && name != ".." {
            names.push(name.to_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

impl Tree for Folder {
    fn entry(&self, path: &Path) -> io::Result<Option<Entry>> {
        Ok(self.find(path)?.map(|(_, stat)| self.describe(&stat)))
    }

    fn names(&self, dir: &Path) -> io::Result<Vec<OsString>> {
        let dir = self.existing_dir(dir)?;
        names(&dir)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<(OsString, Entry)>> {
        let fd = self.existing_dir(dir)?;
        let names = names(&fd)?;
        let mut found = Vec::with_capacity(names.len());
        for name in names {
            match rustix::fs::statat(&fd, &name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) if self.is_hidden(&stat) => {}
                Ok(stat) => found.push((name, self.describe(&stat))),
                Err(Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(found)
    }

    fn ignored_by(&self, path: &Path) -> Option<&str> {
        if self.ignore.is_empty() { None } else { self.ignore.ignored_by(&path.to_string_lossy()) }
    }

    fn can_prune(&self, dir: &Path) -> bool {
        self.ignore.can_prune(&dir.to_string_lossy())
    }

    fn locate(&self, path: &Path) -> io::Result<Option<Location>> {
        let name = path.file_name().unwrap_or(OsStr::new(".")).to_owned();
        Ok(self.find(path)?.map(|(dir, _)| Location { dir, name }))
    }
}
