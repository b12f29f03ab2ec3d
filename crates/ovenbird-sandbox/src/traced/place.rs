//! What other levels mount: here, rows of the table of paths. Nothing of it is in the root folder but the mount points that had to be made.

use std::collections::VecDeque;
use std::ffi::{CString, OsStr};
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use super::modes;
use super::paths::{Caller, Paths};
use crate::chroot::copy;
use crate::failure::{self, Context as _};
use crate::mounts::{self, Stubs};
use crate::owners::{self, Owners, Seen};
use crate::prepare::{LINKS, NODES, Sockets};
use crate::syscall::{c_bytes, c_path};
use crate::{Mount, MountSource, SandboxError, Step, network};

const LINKS_MAX: usize = 40;
const SEARCH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

pub(super) struct Placed<'a> {
    pub(super) paths: Paths,
    pub(super) stubs: Stubs,
    pub(super) sockets: Sockets,
    scratch: &'a Path,
}

fn bytes(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

fn parts(path: &[u8]) -> VecDeque<Vec<u8>> {
    path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".").map(<[u8]>::to_vec).collect()
}

fn mode(path: &Path, bits: u32) -> io::Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(bits & 0o7777))
}

impl<'a> Placed<'a> {
    /// `root` and `scratch` are real paths, without links.
    pub(super) fn new(root: &Path, scratch: &'a Path) -> Placed<'a> {
        Placed { paths: Paths::new(bytes(root)), stubs: Stubs::default(), sockets: Vec::new(), scratch }
    }

    /// Everything that the step wants. After an error too, the stubs must be removed.
    pub(super) fn fill(&mut self, step: &Step) -> Result<(), SandboxError> {
        self.machine("/proc", false).map_err(|error| failure::needed("/proc", "making", error))?;
        self.machine("/sys", true).map_err(|error| failure::needed("/sys", "making", error))?;
        self.dev().map_err(|error| failure::needed("/dev", "filling", error))?;
        // A machine without /proc/sys has no name to offer; then nothing is added.
        let machine = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        for (index, (path, content)) in network::files(step, Some(machine.trim())).into_iter().enumerate() {
            let file = self.scratch.join(format!("etc-{index}"));
            fs::write(&file, content)
                .and_then(|()| mode(&file, 0o644))
                .and_then(|()| self.put(Path::new(path), &file, false, true))
                .map_err(|error| failure::needed(path, "writing", error))?;
        }
        for (index, mount) in step.mounts.iter().enumerate() {
            self.mount(index, mount)?;
        }
        let cwd = self.target(&step.cwd, true, false).map_err(|error| failure::cwd(&step.cwd, error))?;
        if fs::metadata(OsStr::from_bytes(&self.paths.place(&cwd).host)).is_ok_and(|about| !about.is_dir()) {
            return Err(failure::cwd(&step.cwd, io::Error::from_raw_os_error(libc::ENOTDIR)));
        }
        Ok(())
    }

    /// Who owns what was mounted.
    pub(super) fn own(&mut self, step: &Step, owners: &mut Owners) {
        let own = step.mounts.iter().filter_map(|mount| match &mount.source {
            MountSource::Secret { uid, gid, .. } | MountSource::Socket { uid, gid, .. } => Some((&mount.target, *uid, *gid)),
            _ => None,
        });
        for (target, uid, gid) in own.chain(step.mount_owners.iter().map(|(target, uid, gid)| (target, *uid, *gid))) {
            let Some(found) = self.find(&bytes(target)) else { continue };
            if let Ok(looked) = modes::look(&found, true, owners::MASK) {
                owners.set(&Seen::from(&looked), uid, gid, None);
            }
        }
    }

    fn find(&mut self, path: &[u8]) -> Option<Vec<u8>> {
        let own = std::process::id() as i32;
        let caller = Caller { thread: own, process: own, root: &[], program: &|_| None };
        self.paths.find(caller, libc::AT_FDCWD, path, true).ok().map(|found| found.host)
    }

    /// Finds the program as `execvp` would. `None`: not there.
    pub(super) fn program(&mut self, step: &Step) -> io::Result<Option<CString>> {
        let Some(name) = step.args.first().filter(|name| !name.is_empty()) else { return Ok(None) };
        if name.as_bytes().contains(&b'/') {
            return c_bytes(name.as_bytes()).map(Some);
        }
        let path = step.env.iter().rev().find_map(|entry| entry.as_bytes().strip_prefix(b"PATH=")).unwrap_or(SEARCH);
        for folder in path.split(|byte| *byte == b':') {
            let candidate = step.cwd.join(OsStr::from_bytes(folder)).join(name);
            let Some(found) = self.find(&bytes(&candidate)) else { continue };
            if fs::metadata(OsStr::from_bytes(&found)).is_ok_and(|about| about.is_file() && about.permissions().mode() & 0o111 != 0) {
                return c_path(&candidate).map(Some);
            }
        }
        Ok(None)
    }

    /// The machine's own, at the same path.
    fn machine(&mut self, path: &str, read_only: bool) -> io::Result<()> {
        let target = self.fitting(Path::new(path), true)?;
        self.paths.mount(&target, path.as_bytes().to_vec(), read_only, false);
        Ok(())
    }

    fn dev(&mut self) -> io::Result<()> {
        let dev = self.scratch.join("dev");
        fs::create_dir(&dev)?;
        mode(&dev, 0o755)?;
        for (name, bits) in [("shm", 0o1777), ("mqueue", 0o1777), ("pts", 0o755)] {
            fs::create_dir(dev.join(name)).and_then(|()| mode(&dev.join(name), bits))?;
        }
        for (name, to) in LINKS {
            symlink(to, dev.join(name))?;
        }
        let target = self.fitting(Path::new("/dev"), true)?;
        self.paths.mount(&target, bytes(&dev), false, true);
        for name in NODES.map(|(name, ..)| name).into_iter().chain(["pts"]) {
            // A container may lack /dev/tty or /dev/full: an empty file is the nearest thing.
            if name != "pts" {
                fs::write(dev.join(name), []).and_then(|()| mode(&dev.join(name), 0o666))?;
            }
            let node = Path::new("/dev").join(name);
            if fs::metadata(&node).is_ok() {
                let guest = [&target[..], b"/", name.as_bytes()].concat();
                self.paths.mount(&guest, bytes(&node), false, false);
            }
        }
        Ok(())
    }

    fn mount(&mut self, index: usize, mount: &Mount) -> Result<(), SandboxError> {
        let target = &mount.target;
        let placing = || format!("placing {}", target.display());
        let own = self.scratch.join(format!("mount-{index}"));
        // Of what is the step's alone, what was found is remembered.
        let (host, private) = match &mount.source {
            MountSource::Bind(path) => (fs::canonicalize(path).context(placing)?, false),
            MountSource::Layers { lowers, subpath } => (layers(&own, lowers, subpath, mount.read_only).context(placing)?, true),
            MountSource::Tmpfs { .. } => {
                fs::create_dir(&own).and_then(|()| mode(&own, 0o1777)).context(placing)?;
                (own, true)
            }
            MountSource::Secret { content, mode: bits, .. } => {
                fs::write(&own, [])
                    .and_then(|()| mode(&own, 0o600))
                    .and_then(|()| fs::write(&own, content))
                    .and_then(|()| mode(&own, *bits))
                    .context(placing)?;
                (own, true)
            }
            MountSource::Socket { path, mode: bits, .. } => {
                let listener = crate::socket::listen(self.scratch, &format!("mount-{index}")).context(placing)?;
                mode(&own, *bits).context(placing)?;
                self.sockets.push((listener, path.clone()));
                (own, true)
            }
        };
        let read_only = mount.read_only && !matches!(mount.source, MountSource::Socket { .. });
        self.put(target, &host, read_only, private).map_err(|error| failure::target(target, error))
    }

    fn put(&mut self, target: &Path, host: &Path, read_only: bool, private: bool) -> io::Result<()> {
        let guest = self.fitting(target, fs::metadata(host)?.is_dir())?;
        self.paths.mount(&guest, bytes(host), read_only, private);
        Ok(())
    }

    /// A mount needs a target of its kind, as at the other levels.
    fn fitting(&mut self, target: &Path, folder: bool) -> io::Result<Vec<u8>> {
        let guest = self.target(target, folder, true)?;
        if guest.is_empty() {
            return Err(mounts::onto_root());
        }
        let is_folder = fs::metadata(OsStr::from_bytes(&self.paths.place(&guest).host))?.is_dir();
        if is_folder == folder {
            Ok(guest)
        } else {
            Err(io::Error::from_raw_os_error(if is_folder { libc::EISDIR } else { libc::ENOTDIR }))
        }
    }

    /// The path without links; what is missing of it is made, and goes again when it is a mount point.
    fn target(&mut self, path: &Path, folder: bool, passing: bool) -> io::Result<Vec<u8>> {
        let mut ahead = parts(path.as_os_str().as_bytes());
        let (mut done, mut links) = (Vec::new(), 0);
        while let Some(name) = ahead.pop_front() {
            if name == b".." {
                done.truncate(done.iter().rposition(|byte| *byte == b'/').unwrap_or(0));
                continue;
            }
            let next = [&done[..], b"/", &name].concat();
            let place = self.paths.place(&next);
            let host = PathBuf::from(OsStr::from_bytes(&place.host));
            match fs::symlink_metadata(&host) {
                Ok(about) if about.is_symlink() && !place.mounted => {
                    links += 1;
                    if links > LINKS_MAX {
                        return Err(io::Error::from_raw_os_error(libc::ELOOP));
                    }
                    let to = fs::read_link(&host)?;
                    if to.has_root() {
                        done.clear();
                    }
                    for part in parts(to.as_os_str().as_bytes()).into_iter().rev() {
                        ahead.push_front(part);
                    }
                    continue;
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    let parent = host.parent().unwrap_or(Path::new("/"));
                    let parent = crate::syscall::openat(crate::syscall::here(), &c_path(parent)?, libc::O_RDONLY | libc::O_DIRECTORY, 0)?;
                    // In a cache folder that several steps share it stays, as at the other levels.
                    self.stubs.make(parent, c_bytes(&name)?, folder || !ahead.is_empty(), passing && place.in_root)?;
                }
                Err(error) => return Err(error),
            }
            done = next;
        }
        Ok(done)
    }
}

/// Where the files of a mount of layers are; a copy when the step may change them.
fn layers(own: &Path, lowers: &[PathBuf], subpath: &Path, read_only: bool) -> io::Result<PathBuf> {
    let base = match lowers {
        [only] if read_only => only,
        _ => {
            fs::create_dir(own)?;
            for lower in lowers.iter().rev() {
                copy::copy(lower, own)?;
            }
            own
        }
    };
    let found = mounts::open_in(mounts::open_path(base)?.as_fd(), subpath, libc::O_PATH)?;
    fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd()))
}
