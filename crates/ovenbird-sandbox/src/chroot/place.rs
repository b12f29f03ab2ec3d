//! Puts into a root folder what other levels would mount, and takes it out again.
//!
//! What stands in the way is set aside by a rename into the scratch folder and renamed back afterwards: content, mode, times and
//! inode are the same again. Parents keep their times.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use super::copy::{copy, remove};
use crate::failure::Context;
use crate::mounts::{self, Kind, Stubs};
use crate::syscall::{self, c_bytes, check};
use crate::{MountSource, SandboxError, Step, network, prepare};

pub(crate) type Sockets = Vec<(UnixListener, PathBuf)>;

pub(crate) struct Placed<'a> {
    root: BorrowedFd<'a>,
    scratch: &'a Path,
    stubs: Stubs,
    items: Vec<Item>,
}

struct Item {
    parent: OwnedFd,
    name: CString,
    /// The original, in the scratch folder.
    aside: Option<PathBuf>,
    /// A writable folder that goes back to where it came from.
    origin: Option<Origin>,
}

struct Origin {
    path: PathBuf,
    /// Renamed here, so it must be renamed back; otherwise copied.
    moved: bool,
}

impl<'a> Placed<'a> {
    pub(crate) fn new(root: BorrowedFd<'a>, scratch: &'a Path) -> Self {
        Placed { root, scratch, stubs: Stubs::default(), items: Vec::new() }
    }

    /// Everything that the step wants. After an error, [`Placed::undo`] must be called too.
    pub(crate) fn fill(&mut self, step: &Step) -> Result<Sockets, SandboxError> {
        let mut sockets = Vec::new();
        for folder in ["/proc", "/sys"] {
            self.stubs.target(self.root, Path::new(folder), Kind::Folder).context(|| format!("making {folder}"))?;
        }
        self.dev().context(|| "filling /dev".to_owned())?;
        // A machine without /proc/sys has no name to offer; then nothing is added.
        let machine = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        for (path, content) in network::files(step, Some(machine.trim())) {
            self.put(Path::new(path), |at| fs::write(at, &content).and_then(|()| mode(at, 0o644))).context(|| format!("writing {path}"))?;
        }
        for (index, mount) in step.mounts.iter().enumerate() {
            let target = &mount.target;
            let done = match &mount.source {
                MountSource::Bind(path) if mount.read_only => self.put(target, |at| copy(path, at)),
                MountSource::Bind(path) => self.lend(target, path),
                MountSource::Layers { lowers, subpath } => self.layers(index, target, lowers, subpath),
                MountSource::Tmpfs { .. } => self.put(target, |at| fs::create_dir(at).and_then(|()| mode(at, 0o1777))),
                MountSource::Secret { content, mode: bits, uid, gid } => self.put(target, |at| {
                    fs::write(at, [])
                        .and_then(|()| mode(at, 0o600))
                        .and_then(|()| fs::write(at, content))
                        .and_then(|()| chown(at, Some(*uid), Some(*gid)))
                        .and_then(|()| mode(at, *bits))
                }),
                MountSource::Socket { path, mode: bits, uid, gid } => {
                    let mut listener = None;
                    let done = self.put(target, |at| {
                        let (Some(folder), Some(name)) = (at.parent(), at.file_name()) else {
                            return Err(io::Error::from_raw_os_error(libc::EINVAL));
                        };
                        listener = Some(crate::socket::listen(folder, &name.to_string_lossy())?);
                        chown(at, Some(*uid), Some(*gid)).and_then(|()| mode(at, *bits))
                    });
                    sockets.extend(listener.map(|listener| (listener, path.clone())));
                    done
                }
            };
            done.context(|| format!("placing {}", target.display()))?;
        }
        self.stubs.keep_folder(self.root, &step.cwd).context(|| format!("making the working directory {}", step.cwd.display()))?;
        Ok(sockets)
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
            return Err(io::Error::other("the mount point is the root itself"));
        };
        let found = if folder == Path::new("/") || folder.as_os_str().is_empty() {
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
        self.items.push(Item { parent, name, aside, origin: None });
        Ok(at)
    }

    /// Puts a folder or file of the machine there, with its changes going back to it.
    fn lend(&mut self, target: &Path, from: &Path) -> io::Result<()> {
        let mut moved = false;
        self.put(target, |at| {
            moved = fs::rename(from, at).is_ok();
            if moved { Ok(()) } else { copy(from, at) }
        })?;
        if let Some(item) = self.items.last_mut() {
            item.origin = Some(Origin { path: from.to_owned(), moved });
        }
        Ok(())
    }

    fn layers(&mut self, index: usize, target: &Path, lowers: &[PathBuf], subpath: &Path) -> io::Result<()> {
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
        let real = fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd()))?;
        self.put(target, |at| copy(&real, at))
    }

    /// Everything as it was, last first. Goes on after an error and returns the first.
    pub(crate) fn undo(&mut self) -> Result<(), SandboxError> {
        let mut first = Ok(());
        while let Some(item) = self.items.pop() {
            let result = undo(&item).context(|| format!("taking {} out of the root again", item.name.to_string_lossy()));
            first = first.and(result);
        }
        self.stubs.remove();
        first
    }
}

fn undo(item: &Item) -> io::Result<()> {
    let at = within(&item.parent, &item.name);
    let before = syscall::stat(item.parent.as_fd())?;
    if let Some(origin) = &item.origin {
        if origin.moved {
            fs::rename(&at, &origin.path)?;
        } else {
            // First beside the old one: a full disk must not cost both.
            let beside = origin.path.with_extension("ovenbird-new");
            copy(&at, &beside)?;
            remove(&origin.path)?;
            fs::rename(&beside, &origin.path)?;
        }
    }
    remove(&at)?;
    if let Some(aside) = &item.aside {
        let parent = mounts::open_path(aside.parent().unwrap_or(Path::new("/")))?;
        let name = c_bytes(aside.file_name().unwrap_or_default().as_bytes())?;
        // SAFETY: valid C strings.
        check(unsafe { libc::renameat(parent.as_raw_fd(), name.as_ptr(), item.parent.as_raw_fd(), item.name.as_ptr()) }.into())?;
    }
    mounts::set_times(item.parent.as_fd(), &before)
}

fn within(parent: &OwnedFd, name: &CString) -> PathBuf {
    Path::new("/proc/self/fd").join(parent.as_raw_fd().to_string()).join(std::ffi::OsStr::from_bytes(name.as_bytes()))
}

fn mode(path: &Path, bits: u32) -> io::Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(bits & 0o7777))
}
