//! The step's namespaces and mounts, made by a thread that has left the engine's mount namespace.
//!
//! The thread has a mount namespace of its own, so the engine never sees a mount of a step; the child shares it.
//! Ordinary code runs here. Only what needs the new pid namespace is left to [`crate::child`].

use std::ffi::CString;
use std::fs;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use crate::failure::{self, Context};
use crate::mounts::{self, Kind, Stubs};
use crate::remove::remove;
use crate::syscall::{self, c_bytes, c_path, check, here};
use crate::{Level, Mount, MountSource, Network, Root, SandboxError, Step, network};

/// Docker's default.
const SHM_SIZE: u64 = 64 * 1024 * 1024;
/// `tty` group of every distribution.
const PTS_OPTIONS: [(&std::ffi::CStr, &std::ffi::CStr); 2] = [(c"ptmxmode", c"0666"), (c"mode", c"0620")];

/// (name, major, minor).
pub(crate) const NODES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
/// (name, where it leads), in `/dev`.
pub(crate) const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];
/// Parts of `/sys` that Docker hides.
const MASKED_SYS: [&str; 2] = ["firmware", "devices/virtual/powercap"];

/// A root with nothing mounted on it yet.
pub(crate) struct Rooted {
    /// Root folder in this thread's mount namespace.
    pub(crate) root: OwnedFd,
    /// The same root without anything mounted on it, detached from every namespace.
    pub(crate) clean: OwnedFd,
    /// To be [removed](Stubs::remove) when the step is over, also after an error.
    pub(crate) stubs: Stubs,
}

/// What is left for [`crate::child`] to do, and for the engine to serve.
pub(crate) struct Filled {
    pub(crate) proc_target: OwnedFd,
    pub(crate) proc_fallback: OwnedFd,
    /// Sockets that are forwarded to the machine: (listener, where to).
    pub(crate) sockets: Sockets,
}

/// Folders below the step's scratch folder.
pub(crate) struct Scratch<'a>(pub(crate) &'a Path);

impl Scratch<'_> {
    pub(crate) fn root(&self) -> PathBuf {
        self.0.join("root")
    }
    fn private(&self) -> PathBuf {
        self.0.join("private")
    }
    fn empty(&self) -> PathBuf {
        self.0.join("empty")
    }
    fn mount(&self, index: usize) -> PathBuf {
        self.0.join(format!("mount-{index}"))
    }
    pub(crate) fn make(&self) -> io::Result<()> {
        for folder in [self.root(), self.private(), self.empty()] {
            fs::create_dir_all(folder)?;
        }
        Ok(())
    }
    /// Removes everything below, but not the folder itself. No mount may be left.
    pub(crate) fn clear(&self) {
        if let Ok(entries) = fs::read_dir(self.0) {
            for entry in entries.flatten() {
                // What cannot go now is found by the engine's own clean-up of the scratch folder.
                let _ = remove(&entry.path());
            }
        }
    }
}

/// Leaves the engine's namespaces; only this thread changes.
pub(crate) fn leave(step: &Step) -> Result<(), SandboxError> {
    let mut flags = libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    if step.network == Network::None {
        flags |= libc::CLONE_NEWNET;
    }
    syscall::unshare(flags).context(|| "unshare(mount, ipc, uts, network namespaces)".to_owned())?;
    make_private().context(|| "making the mounts private".to_owned())?;
    if step.network == Network::None {
        network::loopback_up().context(|| "switching the loopback device on".to_owned())?;
    }
    // SAFETY: pointer and length of a live slice.
    check(unsafe { libc::sethostname(step.hostname.as_ptr().cast(), step.hostname.len()) }.into())
        .context(|| format!("sethostname({:?})", step.hostname))?;
    Ok(())
}

pub(crate) fn make_private() -> io::Result<()> {
    syscall::mount(c"none", c"/", c"none", libc::MS_REC | libc::MS_PRIVATE, c"")
}

/// Mounts the root. This thread must have [left](leave).
pub(crate) fn root(step: &Step) -> Result<Rooted, SandboxError> {
    let scratch = Scratch(&step.scratch);
    let at = scratch.root();
    let overlay = match &step.root {
        Root::Overlay { lowers, upper, work } => {
            let empty = [scratch.empty()];
            let lowers = if lowers.is_empty() { &empty[..] } else { lowers };
            mounts::overlay(lowers, Some((upper, work)), &at).context(|| {
                format!(
                    "mounting an overlay of {} layers with the upper folder {} (an upper folder on an overlay or NFS is not possible)",
                    lowers.len(),
                    upper.display()
                )
            })?;
            Some(upper.clone())
        }
        Root::Dir(folder) => {
            bind_at(folder, &at).context(|| format!("binding the root folder {}", folder.display()))?;
            None
        }
    };
    let root = mounts::open_path(&at).context(|| format!("opening {}", at.display()))?;
    let clean = syscall::clone_tree(root.as_fd(), syscall::EMPTY, false).context(|| "cloning the root mount".to_owned())?;
    // Without the links that may be on the way to the scratch folder.
    let real = fs::read_link(format!("/proc/self/fd/{}", root.as_raw_fd())).context(|| format!("resolving {}", at.display()))?;
    Ok(Rooted { root, clean, stubs: Stubs::new(overlay.map(|upper| (real, upper))) })
}

pub(crate) type Sockets = Vec<(std::os::unix::net::UnixListener, PathBuf)>;

/// Mounts everything on the root.
pub(crate) fn fill(level: Level, step: &Step, rooted: &mut Rooted) -> Result<Filled, SandboxError> {
    let scratch = Scratch(&step.scratch);
    let (root, stubs) = (rooted.root.as_fd(), &mut rooted.stubs);
    let mut sockets = Vec::new();
    let proc_target = target(root, "/proc", Kind::Folder, stubs)?;
    let proc_fallback = syscall::clone_tree(here(), c"/proc", true).context(|| "cloning /proc".to_owned())?;
    let dev_target = target(root, "/dev", Kind::Folder, stubs)?;
    dev(level, step, dev_target.as_fd()).context(|| "mounting /dev".to_owned())?;
    let sys_target = target(root, "/sys", Kind::Folder, stubs)?;
    sys(step, root, sys_target.as_fd()).context(|| "mounting /sys".to_owned())?;
    let private = scratch.private();
    mount_at(&mounts::filesystem(c"tmpfs", &[(c"mode", c"0700")], 0).context(|| "making a tmpfs".to_owned())?, &private)
        .context(|| "mounting a tmpfs".to_owned())?;
    for (index, (path, content)) in network::files(step, None).into_iter().enumerate() {
        let file = private.join(format!("etc-{index}"));
        write_file(&file, &content, 0o644, 0, 0).context(|| format!("writing {path}"))?;
        let tree = file_tree(&file, false).context(|| format!("mounting {path}"))?;
        let target = target(root, path, Kind::File, stubs)?;
        syscall::attach(tree.as_fd(), target.as_fd()).context(|| format!("mounting {path}"))?;
    }
    for (index, mount) in step.mounts.iter().enumerate() {
        let mounting = || format!("mounting {}", mount.target.display());
        let tree = tree(&scratch, index, mount, &mut sockets).context(mounting)?;
        let folder = syscall::stat(tree.as_fd()).context(mounting)?.st_mode & libc::S_IFMT == libc::S_IFDIR;
        let kind = if folder { Kind::Folder } else { Kind::File };
        let target = stubs.target(root, &mount.target, kind).map_err(|error| failure::target(&mount.target, error))?;
        syscall::attach(tree.as_fd(), target.as_fd()).context(mounting)?;
    }
    stubs.keep_folder(root, &step.cwd).map_err(|error| failure::cwd(&step.cwd, error))?;
    Ok(Filled { proc_target, proc_fallback, sockets })
}

fn mount_at(mount: &OwnedFd, at: &Path) -> io::Result<()> {
    syscall::attach(mount.as_fd(), mounts::open_path(at)?.as_fd())
}

fn bind_at(folder: &Path, at: &Path) -> io::Result<()> {
    mount_at(&mounts::bind(mounts::open_path(folder)?.as_fd(), false)?, at)
}

/// Writes a file of the private tmpfs. An owner that is not mapped (single id) is left out.
fn write_file(path: &Path, content: &[u8], mode: u32, uid: u32, gid: u32) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(content)?;
    own(path, uid, gid)?;
    file.set_permissions(fs::Permissions::from_mode(mode & 0o7777))
}

fn own(path: &Path, uid: u32, gid: u32) -> io::Result<()> {
    match chown(path, Some(uid), Some(gid)) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        other => other,
    }
}

fn file_tree(file: &Path, read_only: bool) -> io::Result<OwnedFd> {
    mounts::bind(mounts::open_path(file)?.as_fd(), read_only)
}

/// A mount point that every step has.
fn target(root: BorrowedFd<'_>, path: &'static str, kind: Kind, stubs: &mut Stubs) -> Result<OwnedFd, SandboxError> {
    stubs.target(root, Path::new(path), kind).map_err(|error| failure::needed(path, "making the mount point", error))
}

fn dev(level: Level, step: &Step, target: BorrowedFd<'_>) -> io::Result<()> {
    let tmpfs = mounts::filesystem(c"tmpfs", &[(c"mode", c"0755"), (c"size", c"65536k")], syscall::ATTR_NOSUID)?;
    let dev = tmpfs.as_fd();
    for name in [c"pts", c"shm", c"mqueue"] {
        // SAFETY: constant string.
        check(unsafe { libc::mkdirat(dev.as_raw_fd(), name.as_ptr(), 0o755) }.into())?;
    }
    for (name, to) in LINKS {
        let (name, to) = (c_bytes(name.as_bytes())?, c_bytes(to.as_bytes())?);
        // SAFETY: valid C strings.
        check(unsafe { libc::symlinkat(to.as_ptr(), dev.as_raw_fd(), name.as_ptr()) }.into())?;
    }
    // Nodes of a tmpfs that a user namespace mounted cannot be opened even where mknod works.
    let mut binds = Vec::new();
    for (name, major, minor) in NODES {
        let c_name = c_bytes(name.as_bytes())?;
        let node = libc::makedev(major, minor);
        // SAFETY: valid C string.
        let made = level == Level::Root && unsafe { libc::mknodat(dev.as_raw_fd(), c_name.as_ptr(), libc::S_IFCHR | 0o666, node) } == 0;
        if made {
            // The umask must not show.
            // SAFETY: valid C string.
            check(unsafe { libc::fchmodat(dev.as_raw_fd(), c_name.as_ptr(), 0o666, 0) }.into())?;
        } else {
            drop(syscall::openat(dev, &c_name, libc::O_CREAT | libc::O_WRONLY, 0o666)?);
            binds.push(name);
        }
    }
    syscall::attach(dev, target)?;
    for name in binds {
        match mounts::open_path(&Path::new("/dev").join(name)) {
            Ok(source) => {
                let node = syscall::openat(dev, &c_bytes(name.as_bytes())?, libc::O_PATH, 0)?;
                syscall::attach(mounts::bind(source.as_fd(), false)?.as_fd(), node.as_fd())?;
            }
            // A container may lack /dev/tty or /dev/full.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    let private = syscall::ATTR_NOSUID | syscall::ATTR_NOEXEC;
    let pts = mounts::filesystem(c"devpts", &[PTS_OPTIONS[0], PTS_OPTIONS[1], (c"gid", c"5")], private)
        .or_else(|_| mounts::filesystem(c"devpts", &PTS_OPTIONS, private))?;
    syscall::attach(pts.as_fd(), syscall::openat(dev, c"pts", libc::O_PATH, 0)?.as_fd())?;
    let size = c_bytes(step.limits.shm_size.unwrap_or(SHM_SIZE).to_string().as_bytes())?;
    let shm = mounts::filesystem(c"tmpfs", &[(c"mode", c"1777"), (c"size", &size)], private | syscall::ATTR_NODEV)?;
    syscall::attach(shm.as_fd(), syscall::openat(dev, c"shm", libc::O_PATH, 0)?.as_fd())?;
    let mqueue = mounts::filesystem(c"mqueue", &[], private | syscall::ATTR_NODEV)?;
    syscall::attach(mqueue.as_fd(), syscall::openat(dev, c"mqueue", libc::O_PATH, 0)?.as_fd())
}

fn sys(step: &Step, root: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    let read_only = if step.insecure { 0 } else { syscall::ATTR_RDONLY };
    let attributes = read_only | syscall::ATTR_NOSUID | syscall::ATTR_NODEV | syscall::ATTR_NOEXEC;
    match mounts::filesystem(c"sysfs", &[], attributes) {
        Ok(sysfs) => {
            syscall::attach(sysfs.as_fd(), target)?;
            // Only the unified hierarchy is offered; a machine without it shows an empty folder.
            if let (Ok(cgroup), Ok(at)) =
                (mounts::filesystem(c"cgroup2", &[], attributes), mounts::open_in(sysfs.as_fd(), Path::new("fs/cgroup"), libc::O_PATH))
            {
                syscall::attach(cgroup.as_fd(), at.as_fd())?;
            }
        }
        // A user namespace that does not own the network namespace may not mount a sysfs.
        Err(_) => {
            let tree = syscall::clone_tree(here(), c"/sys", true)?;
            if read_only != 0 {
                syscall::add_attributes(tree.as_fd(), read_only, true)?;
            }
            syscall::attach(tree.as_fd(), target)?;
        }
    }
    if !step.insecure {
        let sys = mounts::open_in(root, Path::new("/sys"), libc::O_PATH)?;
        for path in MASKED_SYS {
            if let Ok(at) = mounts::open_in(sys.as_fd(), Path::new(path), libc::O_PATH | libc::O_DIRECTORY) {
                let empty = mounts::filesystem(c"tmpfs", &[(c"mode", c"0755")], syscall::ATTR_RDONLY)?;
                syscall::attach(empty.as_fd(), at.as_fd())?;
            }
        }
    }
    Ok(())
}

/// What is to be mounted, detached.
fn tree(scratch: &Scratch<'_>, index: usize, mount: &Mount, sockets: &mut Sockets) -> io::Result<OwnedFd> {
    match &mount.source {
        MountSource::Bind(path) => mounts::bind(mounts::open_path(path)?.as_fd(), mount.read_only),
        MountSource::Layers { lowers, subpath } => layers(scratch, index, lowers, subpath, mount.read_only),
        MountSource::Tmpfs { size } => {
            let size = size.map(|bytes| c_bytes(bytes.to_string().as_bytes())).transpose()?;
            let mut options = vec![(c"mode", c"1777")];
            if let Some(size) = &size {
                options.push((c"size", size));
            }
            let read_only = if mount.read_only { syscall::ATTR_RDONLY } else { 0 };
            mounts::filesystem(c"tmpfs", &options, read_only | syscall::ATTR_NOSUID | syscall::ATTR_NODEV)
        }
        MountSource::Secret { content, mode, uid, gid } => {
            let file = scratch.private().join(format!("secret-{index}"));
            // The single id is root inside and may read everything; the owner cannot be shown.
            write_file(&file, content, *mode, *uid, *gid)?;
            file_tree(&file, mount.read_only)
        }
        MountSource::Socket { path, mode, uid, gid } => {
            let file = scratch.private().join(format!("socket-{index}"));
            let listener = crate::socket::listen(scratch.private().as_path(), &format!("socket-{index}"))?;
            own(&file, *uid, *gid)?;
            fs::set_permissions(&file, fs::Permissions::from_mode(mode & 0o7777))?;
            sockets.push((listener, path.clone()));
            file_tree(&file, mount.read_only)
        }
    }
}

/// Merged layers; writes go to a throw-away folder in the scratch.
fn layers(scratch: &Scratch<'_>, index: usize, lowers: &[PathBuf], subpath: &Path, read_only: bool) -> io::Result<OwnedFd> {
    let base = match lowers {
        [only] if read_only => mounts::open_path(only)?,
        _ => {
            let folder = scratch.mount(index);
            let (merged, upper, work) = (folder.join("merged"), folder.join("upper"), folder.join("work"));
            for path in [&merged, &upper, &work] {
                fs::create_dir_all(path)?;
            }
            let empty = [scratch.empty()];
            let lowers = if lowers.is_empty() { &empty[..] } else { lowers };
            if let Some(top) = lowers.first().and_then(|top| fs::metadata(top).ok()) {
                fs::set_permissions(&upper, top.permissions())?;
            }
            mounts::overlay(lowers, Some((&upper, &work)), &merged)?;
            mounts::open_path(&merged)?
        }
    };
    mounts::bind(mounts::open_in(base.as_fd(), subpath, libc::O_PATH)?.as_fd(), read_only)
}

/// Finds the program as `execvp` would, inside the root. `Ok(None)`: not there.
pub(crate) fn find_program(root: BorrowedFd<'_>, step: &Step) -> io::Result<Option<CString>> {
    let Some(name) = step.args.first() else { return Ok(None) };
    if name.as_bytes().contains(&b'/') {
        return c_bytes(name.as_bytes()).map(Some);
    }
    if name.is_empty() {
        return Ok(None);
    }
    let path = step.env.iter().rev().find_map(|entry| entry.as_bytes().strip_prefix(b"PATH="));
    let path = path.unwrap_or(b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    for folder in path.split(|byte| *byte == b':') {
        let candidate = step.cwd.join(std::ffi::OsStr::from_bytes(folder)).join(name);
        let Ok(found) = mounts::open_in(root, &candidate, libc::O_PATH) else { continue };
        let stat = syscall::stat(found.as_fd())?;
        if stat.st_mode & libc::S_IFMT == libc::S_IFREG && stat.st_mode & 0o111 != 0 {
            return c_path(&candidate).map(Some);
        }
    }
    Ok(None)
}
