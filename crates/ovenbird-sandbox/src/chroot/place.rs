//! Puts into a root folder what other levels would mount, and takes it out again.
//!
//! What stands in the way is set aside by a rename into the scratch folder and renamed back afterwards: content, mode, times and
//! inode are the same again. Parents keep their times. A step can also remove or rename the parents; a folder of the base that held
//! something placed is there again afterwards, as at the levels where its removal fails.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use super::copy::copy;
use crate::failure::{self, Context};
use crate::mounts::{self, Kind, Stubs};
use crate::remove::remove;
use crate::syscall::{self, c_bytes, check};
use crate::{Mount, MountSource, SandboxError, Step, network, prepare};

pub(crate) type Sockets = Vec<(UnixListener, PathBuf)>;

pub(crate) struct Placed<'a> {
    root: BorrowedFd<'a>,
    scratch: &'a Path,
    stubs: Stubs,
    /// Folders of the base that every step has.
    kept: Vec<(PathBuf, libc::stat)>,
    items: Vec<Item>,
}

struct Item {
    parent: OwnedFd,
    /// Where the parent is in the root, and what it was, when it was not made for the step.
    folder: Option<(PathBuf, libc::stat)>,
    name: CString,
    /// The original, in the scratch folder.
    aside: Option<PathBuf>,
    /// A writable folder that goes back to where it came from.
    origin: Option<Origin>,
}

struct Origin {
    path: PathBuf,
    about: fs::Metadata,
    /// Renamed here, so it must be renamed back; otherwise copied.
    moved: bool,
}

impl<'a> Placed<'a> {
    pub(crate) fn new(root: BorrowedFd<'a>, scratch: &'a Path) -> Self {
        Placed { root, scratch, stubs: Stubs::default(), kept: Vec::new(), items: Vec::new() }
    }

    /// Everything that the step wants. After an error, [`Placed::undo`] must be called too.
    pub(crate) fn fill(&mut self, step: &Step) -> Result<Sockets, SandboxError> {
        let mut sockets = Vec::new();
        for folder in ["/proc", "/sys"] {
            if let Ok(found) = mounts::open_in(self.root, Path::new(folder), libc::O_PATH | libc::O_NOFOLLOW | libc::O_DIRECTORY) {
                self.kept.push((folder.into(), syscall::stat(found.as_fd()).context(|| format!("looking at {folder}"))?));
            }
            let made = self.stubs.target(self.root, Path::new(folder), Kind::Folder);
            made.map_err(|error| failure::needed(folder, "making", error))?;
        }
        self.dev().map_err(|error| failure::needed("/dev", "filling", error))?;
        // A machine without /proc/sys has no name to offer; then nothing is added.
        let machine = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        for (path, content) in network::files(step, Some(machine.trim())) {
            self.put(Path::new(path), |at| fs::write(at, &content).and_then(|()| mode(at, 0o644)))
                .map_err(|error| failure::needed(path, "writing", error))?;
        }
        for (index, mount) in step.mounts.iter().enumerate() {
            sockets.extend(self.mount(index, mount)?);
        }
        self.stubs.keep_folder(self.root, &step.cwd).map_err(|error| failure::cwd(&step.cwd, error))?;
        Ok(sockets)
    }

    fn mount(&mut self, index: usize, mount: &Mount) -> Result<Option<(UnixListener, PathBuf)>, SandboxError> {
        let target = &mount.target;
        let placing = || format!("placing {}", target.display());
        let source = match &mount.source {
            MountSource::Bind(path) => Some(path.clone()),
            MountSource::Layers { lowers, subpath } => Some(self.layers(index, lowers, subpath).context(placing)?),
            _ => None,
        };
        let folder = match &source {
            Some(path) => fs::symlink_metadata(path).context(placing)?.is_dir(),
            None => matches!(mount.source, MountSource::Tmpfs { .. }),
        };
        self.fits(target, folder).map_err(|error| failure::target(target, error))?;
        let mut listener = None;
        let done = match (&mount.source, source) {
            (MountSource::Bind(path), _) if !mount.read_only => self.lend(target, path),
            (_, Some(from)) => self.put(target, |at| copy(&from, at)),
            (MountSource::Secret { content, mode: bits, uid, gid }, _) => self.put(target, |at| {
                fs::write(at, [])
                    .and_then(|()| mode(at, 0o600))
                    .and_then(|()| fs::write(at, content))
                    .and_then(|()| chown(at, Some(*uid), Some(*gid)))
                    .and_then(|()| mode(at, *bits))
            }),
            (MountSource::Socket { path, mode: bits, uid, gid }, _) => self.put(target, |at| {
                let (Some(folder), Some(name)) = (at.parent(), at.file_name()) else {
                    return Err(io::Error::from_raw_os_error(libc::EINVAL));
                };
                listener = Some((crate::socket::listen(folder, &name.to_string_lossy())?, path.clone()));
                chown(at, Some(*uid), Some(*gid)).and_then(|()| mode(at, *bits))
            }),
            (MountSource::Tmpfs { .. } | MountSource::Bind(_) | MountSource::Layers { .. }, None) => {
                self.put(target, |at| fs::create_dir(at).and_then(|()| mode(at, 0o1777)))
            }
        };
        done.context(placing)?;
        Ok(listener)
    }

    /// A mount needs a target of its kind, as at the other levels.
    fn fits(&self, target: &Path, folder: bool) -> io::Result<()> {
        let found = match mounts::open_in(self.root, target, libc::O_PATH) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(()),
            other => syscall::stat(other?.as_fd())?,
        };
        let top = syscall::stat(self.root)?;
        if (found.st_dev, found.st_ino) == (top.st_dev, top.st_ino) {
            return Err(mounts::onto_root());
        }
        let is_folder = found.st_mode & libc::S_IFMT == libc::S_IFDIR;
        if is_folder == folder { Ok(()) } else { Err(io::Error::from_raw_os_error(if is_folder { libc::EISDIR } else { libc::ENOTDIR })) }
    }

    fn dev(&mut self) -> io::Result<()> {
        self.put(Path::new("/dev"), |at| {
            fs::create_dir(at)?;
            mode(at, 0o755)?;
            for (name, bits) in [("shm", 0o1777), ("mqueue", 0o1777), ("pts", 0o755)] {
                fs::create_dir(at.join(name)).and_then(|()| mode(&at.join(name), bits))?;
            }
            for (name, to) in prepare::LINKS {
                symlink(to, at.join(name))?;
            }
            for (name, major, minor) in prepare::NODES {
                let path = at.join(name);
                let c_path = syscall::c_path(&path)?;
                // SAFETY: valid C string.
                if unsafe { libc::mknod(c_path.as_ptr(), libc::S_IFCHR | 0o666, libc::makedev(major, minor)) } < 0 {
                    // Without CAP_MKNOD an empty file is the nearest thing: it takes output and reads as empty.
                    fs::write(&path, [])?;
                }
                mode(&path, 0o666)?;
            }
            Ok(())
        })
    }

    /// Clears the way to `target` and lets `make` put something there.
    fn put(&mut self, target: &Path, make: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
        let at = self.clear(target)?;
        let Some(item) = self.items.last() else { return Ok(()) };
        let before = syscall::stat(item.parent.as_fd())?;
        make(&at)?;
        mounts::set_times(item.parent.as_fd(), &before)
    }

    /// Notes and sets aside what is at `target`; the path leads through a descriptor, so it stays inside the root.
    fn clear(&mut self, target: &Path) -> io::Result<PathBuf> {
        let (Some(folder), Some(name)) = (target.parent(), target.file_name()) else {
            return Err(mounts::onto_root());
        };
        let top = folder == Path::new("/") || folder.as_os_str().is_empty();
        let is_there = !top && mounts::open_in(self.root, folder, libc::O_PATH).is_ok();
        let found = if top {
            mounts::open_in(self.root, Path::new("/"), libc::O_PATH)?
        } else {
            self.stubs.target(self.root, folder, Kind::Folder)?
        };
        let parent = syscall::openat(found.as_fd(), c".", libc::O_RDONLY | libc::O_DIRECTORY, 0)?;
        let name = c_bytes(name.as_bytes())?;
        let at = within(&parent, &name);
        let before = syscall::stat(parent.as_fd())?;
        let mut aside = None;
        if syscall::stat_at(parent.as_fd(), &name).is_ok() {
            let to = self.scratch.join(format!("aside-{}", self.items.len()));
            fs::rename(&at, &to)?;
            aside = Some(to);
            mounts::set_times(parent.as_fd(), &before)?;
        }
        let folder = is_there.then(|| self.real(parent.as_fd())).transpose()?.map(|path| (path, before));
        self.items.push(Item { parent, folder, name, aside, origin: None });
        Ok(at)
    }

    /// Path of an open folder in the root, without links.
    fn real(&self, folder: BorrowedFd<'_>) -> io::Result<PathBuf> {
        let path = |fd: BorrowedFd<'_>| fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
        let (root, folder) = (path(self.root)?, path(folder)?);
        folder.strip_prefix(&root).map(Path::to_owned).map_err(|_| io::Error::other("the folder is outside of the root"))
    }

    /// Puts a folder or file of the machine there, with its changes going back to it.
    fn lend(&mut self, target: &Path, from: &Path) -> io::Result<()> {
        let about = fs::symlink_metadata(from)?;
        let mut moved = false;
        self.put(target, |at| {
            moved = fs::rename(from, at).is_ok();
            if moved { Ok(()) } else { copy(from, at) }
        })?;
        if let Some(item) = self.items.last_mut() {
            item.origin = Some(Origin { path: from.to_owned(), about, moved });
        }
        Ok(())
    }

    /// Where the files of a mount of layers are.
    fn layers(&self, index: usize, lowers: &[PathBuf], subpath: &Path) -> io::Result<PathBuf> {
        let merged;
        let base = match lowers {
            [only] => only,
            _ => {
                merged = self.scratch.join(format!("merged-{index}"));
                fs::create_dir(&merged)?;
                for lower in lowers.iter().rev() {
                    copy(lower, &merged)?;
                }
                &merged
            }
        };
        let found = mounts::open_in(mounts::open_path(base)?.as_fd(), subpath, libc::O_PATH)?;
        fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd()))
    }

    /// Everything as it was, last first. Goes on after an error and returns the first.
    pub(crate) fn undo(&mut self) -> Result<(), SandboxError> {
        let mut first = Ok(());
        while let Some(mut item) = self.items.pop() {
            let result = self.undo_item(&mut item).context(|| format!("taking {} out of the root again", item.name.to_string_lossy()));
            first = first.and(result);
        }
        for (path, before) in std::mem::take(&mut self.kept) {
            let result = self.again(&path, &before).context(|| format!("making {} again", path.display()));
            first = first.and(result.map(drop));
        }
        self.stubs.remove();
        first
    }

    fn undo_item(&mut self, item: &mut Item) -> io::Result<()> {
        let mut before = syscall::stat(item.parent.as_fd())?;
        let gone = before.st_nlink == 0;
        if let Some(origin) = &item.origin {
            origin.give_back(&within(&item.parent, &item.name))?;
        }
        if gone {
            let Some((path, was)) = item.folder.take() else { return Ok(()) };
            // Something else is there now: what the step did on purpose.
            let Some(folder) = self.again(&path, &was)? else { return Ok(()) };
            (item.parent, before) = (folder, was);
        }
        remove(&within(&item.parent, &item.name))?;
        if let Some(aside) = &item.aside {
            fs::rename(aside, within(&item.parent, &item.name))?;
        }
        mounts::set_times(item.parent.as_fd(), &before)
    }

    /// A folder that was in the root before: as it is when it is still one, else made again. `None`: there is something else.
    fn again(&mut self, path: &Path, before: &libc::stat) -> io::Result<Option<OwnedFd>> {
        match mounts::open_in(self.root, path, libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOTDIR | libc::ELOOP)) => return Ok(None),
            other => return other.map(Some),
        }
        let made = self.stubs.keep_folder(self.root, path)?;
        let folder = syscall::openat(made.as_fd(), c".", libc::O_RDONLY | libc::O_DIRECTORY, 0)?;
        // SAFETY: no pointers.
        unsafe {
            check(libc::fchown(folder.as_raw_fd(), before.st_uid, before.st_gid).into())?;
            check(libc::fchmod(folder.as_raw_fd(), before.st_mode & 0o7777).into())?;
        }
        Ok(Some(folder))
    }
}

impl Origin {
    /// What is at `at` goes back to where it came from. A folder that the step has removed comes back empty.
    fn give_back(&self, at: &Path) -> io::Result<()> {
        if fs::symlink_metadata(at).is_err() {
            remove(&self.path)?;
            if self.about.is_dir() {
                fs::create_dir(&self.path)?;
                chown(&self.path, Some(self.about.uid()), Some(self.about.gid()))?;
                mode(&self.path, self.about.mode())?;
            }
            return Ok(());
        }
        if self.moved {
            return fs::rename(at, &self.path);
        }
        // First beside the old one: a full disk must not cost both.
        let beside = self.path.with_extension("ovenbird-new");
        copy(at, &beside)?;
        remove(&self.path)?;
        fs::rename(&beside, &self.path)
    }
}

fn within(parent: &OwnedFd, name: &CString) -> PathBuf {
    Path::new("/proc/self/fd").join(parent.as_raw_fd().to_string()).join(std::ffi::OsStr::from_bytes(name.as_bytes()))
}

fn mode(path: &Path, bits: u32) -> io::Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(bits & 0o7777))
}
