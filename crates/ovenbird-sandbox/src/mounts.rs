//! Detached mounts, and attaching them inside a hostile root.
//!
//! Targets are resolved with `openat2(RESOLVE_IN_ROOT)`: no symlink of an image can move a mount out of the root.
//! Missing targets are made and remembered by [`Stubs`], which takes them away again.

use std::collections::VecDeque;
use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::syscall::{self, c_bytes, c_path, check, here};

/// `fsconfig` takes values below 256 bytes.
const VALUE_MAX: usize = 255;
/// As many as the kernel follows.
const SYMLINKS_MAX: usize = 40;
/// `mount` takes one page of options.
const OPTIONS_MAX: usize = 4095;

/// `OVL_MAX_STACK` of the kernel.
const LOWERS_MAX: usize = 500;
/// As many as fit into one page of options by their short names (`/proc/self/fd/12345:`), with room for what stands beside them.
const LOWERS_MAX_CLASSIC: usize = (OPTIONS_MAX - 256) / 20;

/// The most lower folders that one overlay of this machine takes. Call it where a step would be run (after [`crate::enter`]).
pub fn lowers_max() -> usize {
    static MOST: OnceLock<usize> = OnceLock::new();
    *MOST.get_or_init(|| {
        let one_by_one = syscall::fsopen(c"overlay").and_then(|fs| syscall::fsconfig_string(fs.as_fd(), c"lowerdir+", c"/"));
        if one_by_one.is_ok() { LOWERS_MAX } else { LOWERS_MAX_CLASSIC }
    })
}

/// Mounts an overlay at `at`; without `upper` (and its work folder) it is read-only.
pub(crate) fn overlay(lowers: &[PathBuf], upper: Option<(&Path, &Path)>, at: &Path) -> io::Result<()> {
    match overlay_fd(lowers, upper) {
        Ok(mount) => {
            let target = open_path(at)?;
            syscall::attach(mount.as_fd(), target.as_fd())
        }
        // `lowerdir+` came with Linux 6.5.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS)) => {
            overlay_classic(lowers, upper, at).map_err(|_| error)
        }
        Err(error) => Err(error),
    }
}

fn overlay_fd(lowers: &[PathBuf], upper: Option<(&Path, &Path)>) -> io::Result<OwnedFd> {
    let fs = syscall::fsopen(c"overlay")?;
    let mut kept = Vec::new();
    for lower in lowers {
        syscall::fsconfig_string(fs.as_fd(), c"lowerdir+", &layer_name(lower, &mut kept)?)?;
    }
    if let Some((upper, work)) = upper {
        syscall::fsconfig_string(fs.as_fd(), c"upperdir", &layer_name(upper, &mut kept)?)?;
        syscall::fsconfig_string(fs.as_fd(), c"workdir", &layer_name(work, &mut kept)?)?;
        syscall::fsconfig_flag(fs.as_fd(), c"volatile")?;
    }
    syscall::fsconfig_flag(fs.as_fd(), c"userxattr")?;
    syscall::fsmount(fs.as_fd(), 0)
}

fn overlay_classic(lowers: &[PathBuf], upper: Option<(&Path, &Path)>, at: &Path) -> io::Result<()> {
    let mut kept = Vec::new();
    let mut options = b"userxattr,lowerdir=".to_vec();
    for (index, lower) in lowers.iter().enumerate() {
        if index > 0 {
            options.push(b':');
        }
        options.extend_from_slice(fd_name(lower, &mut kept)?.as_bytes());
    }
    if let Some((upper, work)) = upper {
        options.extend_from_slice(b",volatile,upperdir=");
        options.extend_from_slice(fd_name(upper, &mut kept)?.as_bytes());
        options.extend_from_slice(b",workdir=");
        options.extend_from_slice(fd_name(work, &mut kept)?.as_bytes());
    }
    if options.len() > OPTIONS_MAX {
        return Err(io::Error::from_raw_os_error(libc::E2BIG));
    }
    syscall::mount(c"overlay", &c_path(at)?, c"overlay", 0, &c_bytes(&options)?)
}

/// The layer's path, or a short name for it when overlay would misread it (too long, or characters that it gives a meaning).
fn layer_name(path: &Path, kept: &mut Vec<OwnedFd>) -> io::Result<CString> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() > VALUE_MAX || bytes.iter().any(|b| b"\\:,".contains(b)) {
        return c_bytes(fd_name(path, kept)?.as_bytes());
    }
    c_path(path)
}

fn fd_name(path: &Path, kept: &mut Vec<OwnedFd>) -> io::Result<String> {
    let fd = open_path(path)?;
    let name = format!("/proc/self/fd/{}", fd.as_raw_fd());
    kept.push(fd);
    Ok(name)
}

pub(crate) fn open_path(path: &Path) -> io::Result<OwnedFd> {
    syscall::openat(here(), &c_path(path)?, libc::O_PATH, 0)
}

/// A detached file system of a kind that needs only string options.
pub(crate) fn filesystem(kind: &CStr, options: &[(&CStr, &CStr)], attributes: u64) -> io::Result<OwnedFd> {
    let fs = syscall::fsopen(kind)?;
    for (key, value) in options {
        syscall::fsconfig_string(fs.as_fd(), key, value)?;
    }
    syscall::fsmount(fs.as_fd(), attributes)
}

/// A detached recursive bind mount of a file or folder.
pub(crate) fn bind(source: BorrowedFd<'_>, read_only: bool) -> io::Result<OwnedFd> {
    let tree = syscall::clone_tree(source, syscall::EMPTY, true)?;
    if read_only {
        syscall::add_attributes(tree.as_fd(), syscall::ATTR_RDONLY, true)?;
    }
    Ok(tree)
}

/// Opens `path` (absolute or relative) inside `root`, symlinks resolved inside it too.
pub(crate) fn open_in(root: BorrowedFd<'_>, path: &Path, flags: libc::c_int) -> io::Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    syscall::openat2(root, &c_path(path)?, flags, 0, syscall::RESOLVE_IN_ROOT | syscall::RESOLVE_NO_MAGICLINKS)
}

/// What stands at the end of a mount point that must be made.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Folder,
    File,
}

/// Mount points that were made for a step.
#[derive(Default)]
pub(crate) struct Stubs {
    made: Vec<Stub>,
    /// Folders that overlay copied into the upper only because a stub was made in them.
    copied: Vec<Copied>,
    /// Mount root of the step and its upper folder, when it is an overlay.
    overlay: Option<(PathBuf, PathBuf)>,
}

struct Stub {
    parent: OwnedFd,
    name: CString,
    folder: bool,
}

struct Copied {
    path: PathBuf,
    before: libc::stat,
}

impl Stubs {
    pub(crate) fn new(overlay: Option<(PathBuf, PathBuf)>) -> Self {
        Stubs { overlay, ..Stubs::default() }
    }

    /// Opens the mount point (`O_PATH`), making it and its parents when missing. The root itself is refused.
    pub(crate) fn target(&mut self, root: BorrowedFd<'_>, path: &Path, kind: Kind) -> io::Result<OwnedFd> {
        let fd = self.open_or_make(root, path, kind, true)?;
        let (at, top) = (syscall::stat(fd.as_fd())?, syscall::stat(root)?);
        if (at.st_dev, at.st_ino) == (top.st_dev, top.st_ino) {
            return Err(onto_root());
        }
        let is_folder = at.st_mode & libc::S_IFMT == libc::S_IFDIR;
        if is_folder != (kind == Kind::Folder) {
            return Err(io::Error::from_raw_os_error(if is_folder { libc::EISDIR } else { libc::ENOTDIR }));
        }
        Ok(fd)
    }

    /// Like `mkdir -p`: what it makes stays.
    pub(crate) fn keep_folder(&mut self, root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
        self.open_or_make(root, path, Kind::Folder, false)
    }

    fn open_or_make(&mut self, root: BorrowedFd<'_>, path: &Path, kind: Kind, remember: bool) -> io::Result<OwnedFd> {
        let first = open_in(root, path, libc::O_PATH);
        match first {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            other => return other,
        }
        let mut ahead: VecDeque<Vec<u8>> = parts(path.as_os_str());
        let mut done = PathBuf::from("/");
        let mut links = 0;
        while let Some(name) = ahead.pop_front() {
            if name == b".." {
                done.pop();
                continue;
            }
            let next = done.join(OsStr::from_bytes(&name));
            let parent = open_in(root, &done, libc::O_RDONLY | libc::O_DIRECTORY)?;
            let c_name = c_bytes(&name)?;
            match syscall::stat_at(parent.as_fd(), &c_name) {
                Ok(found) if found.st_mode & libc::S_IFMT == libc::S_IFLNK => {
                    links += 1;
                    if links > SYMLINKS_MAX {
                        return Err(io::Error::from_raw_os_error(libc::ELOOP));
                    }
                    let to = read_link(parent.as_fd(), &c_name)?;
                    if to.starts_with(b"/") {
                        done = PathBuf::from("/");
                    }
                    for part in parts(OsStr::from_bytes(&to)).into_iter().rev() {
                        ahead.push_front(part);
                    }
                    continue;
                }
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                    let folder = kind == Kind::Folder || !ahead.is_empty();
                    // A mount point inside another mount (a cache folder that several steps share) stays: taking it away would
                    // also take away what another step has mounted on it.
                    let own = syscall::stat(parent.as_fd())?.st_dev == syscall::stat(root)?.st_dev;
                    self.make(parent, c_name, folder, remember && own)?;
                }
                Err(error) => return Err(error),
            }
            done = next;
        }
        open_in(root, &done, libc::O_PATH)
    }

    /// Makes one mount point; with `remember` it is [removed](Stubs::remove) again.
    pub(crate) fn make(&mut self, parent: OwnedFd, name: CString, folder: bool, remember: bool) -> io::Result<()> {
        let before = syscall::stat(parent.as_fd())?;
        if remember {
            self.note_copies(parent.as_fd());
        }
        if folder {
            // SAFETY: valid C string.
            let made = check(unsafe { libc::mkdirat(parent.as_raw_fd(), name.as_ptr(), 0o755) }.into());
            if made.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EEXIST)) {
                // Another step was faster.
                return Ok(());
            }
            made?;
            // SAFETY: valid C string. The umask must not show.
            check(unsafe { libc::fchmodat(parent.as_raw_fd(), name.as_ptr(), 0o755, 0) }.into())?;
        } else {
            match syscall::openat(parent.as_fd(), &name, libc::O_CREAT | libc::O_EXCL | libc::O_WRONLY, 0o644) {
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => return Ok(()),
                made => drop(made?),
            }
        }
        if remember {
            set_times(parent.as_fd(), &before)?;
            self.made.push(Stub { parent, name, folder });
        }
        Ok(())
    }

    /// Remembers which folders of the upper exist only because of the next stub.
    fn note_copies(&mut self, parent: BorrowedFd<'_>) {
        let Some((mounted, upper)) = &self.overlay else { return };
        let Ok(path) = std::fs::read_link(format!("/proc/self/fd/{}", parent.as_raw_fd())) else { return };
        let Ok(inner) = path.strip_prefix(mounted) else { return };
        for folder in inner.ancestors().filter(|path| !path.as_os_str().is_empty()) {
            if std::fs::symlink_metadata(upper.join(folder)).is_ok() || self.copied.iter().any(|copied| copied.path == folder) {
                continue;
            }
            let Ok(full) = open_path(&mounted.join(folder)) else { continue };
            if let Ok(before) = syscall::stat(full.as_fd()) {
                self.copied.push(Copied { path: folder.to_owned(), before });
            }
        }
    }

    /// Removes what was made, unless the step put something there; times of the parents stay what they were.
    pub(crate) fn remove(&mut self) {
        for stub in self.made.drain(..).rev() {
            let Ok(before) = syscall::stat(stub.parent.as_fd()) else { continue };
            let untouched = stub.folder
                || syscall::stat_at(stub.parent.as_fd(), &stub.name)
                    .is_ok_and(|now| now.st_size == 0 && now.st_mode & libc::S_IFMT == libc::S_IFREG);
            let flags = if stub.folder { libc::AT_REMOVEDIR } else { 0 };
            // SAFETY: valid C string.
            if untouched && unsafe { libc::unlinkat(stub.parent.as_raw_fd(), stub.name.as_ptr(), flags) } == 0 {
                // The layer would differ by a time only; nothing else depends on it.
                let _ = set_times(stub.parent.as_fd(), &before);
            }
        }
    }

    /// Removes folders from the upper that hold nothing and say nothing new. The overlay must be unmounted.
    pub(crate) fn prune(&mut self) {
        let Some((_, upper)) = &self.overlay else { return };
        self.copied.sort_by_key(|copied| std::cmp::Reverse(copied.path.components().count()));
        for Copied { path, before } in self.copied.drain(..) {
            let full = upper.join(path);
            let Some(now) = open_path(&full).ok().and_then(|fd| syscall::stat(fd.as_fd()).ok()) else { continue };
            let same = (now.st_mode, now.st_uid, now.st_gid, now.st_mtime, now.st_mtime_nsec)
                == (before.st_mode, before.st_uid, before.st_gid, before.st_mtime, before.st_mtime_nsec);
            if same {
                // Fails when something is inside, which is the point.
                let _ = std::fs::remove_dir(&full);
            }
        }
    }
}

/// The refusal of a mount that would hide everything.
pub(crate) fn onto_root() -> io::Error {
    io::Error::other("the mount point is the root itself")
}

pub(crate) fn set_times(fd: BorrowedFd<'_>, to: &libc::stat) -> io::Result<()> {
    let times = [
        libc::timespec { tv_sec: to.st_atime, tv_nsec: to.st_atime_nsec },
        libc::timespec { tv_sec: to.st_mtime, tv_nsec: to.st_mtime_nsec },
    ];
    // SAFETY: two timespecs.
    check(unsafe { libc::futimens(fd.as_raw_fd(), times.as_ptr()) }.into()).map(drop)
}

fn parts(path: &OsStr) -> VecDeque<Vec<u8>> {
    path.as_bytes().split(|b| *b == b'/').filter(|part| !part.is_empty() && *part != b".").map(<[u8]>::to_vec).collect()
}

fn read_link(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0u8; libc::PATH_MAX as usize];
    // SAFETY: the buffer has the length that is passed.
    let n = check(unsafe { libc::readlinkat(dir.as_raw_fd(), name.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) } as libc::c_long)?;
    buffer.truncate(n as usize);
    Ok(buffer)
}
