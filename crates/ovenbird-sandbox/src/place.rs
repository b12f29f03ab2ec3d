//! The owner recorder's place in the step: the thread joins the step's mount namespace and opens what
//! callers' paths mean to them.

use std::ffi::CString;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use libc::c_int;

use crate::memory::{self, PATH_MAX};
use crate::owners::{self, Seen};
use crate::syscall::{self, c_bytes, check, here};

/// What the streams and a caller's own folder in `/proc` are in the folder of its number.
const OWN: [(&[u8], &str); 6] = [
    (b"/proc/self/", ""),
    (b"/proc/thread-self/", ""),
    (b"/dev/fd/", "fd/"),
    (b"/dev/stdin", "fd/0"),
    (b"/dev/stdout", "fd/1"),
    (b"/dev/stderr", "fd/2"),
];

pub(crate) struct Place {
    /// The machine's `/proc`.
    proc: OwnedFd,
    home: OwnedFd,
    /// The step's root with its device and inode, after joining.
    root: Option<(OwnedFd, (u64, u64))>,
    /// Some process may have a root of its own making. Looking that up would be a fifth of the time of a look.
    pub(crate) roots: bool,
}

/// A file that is ready for a look: arguments of an `*at` call.
pub(crate) struct Found<'a> {
    base: Base<'a>,
    path: CString,
    flags: c_int,
}

enum Base<'a> {
    Known(BorrowedFd<'a>),
    Opened(OwnedFd),
}

pub(crate) enum Target {
    Descriptor(i32),
    /// `path` is an address in the caller.
    Path {
        dir: i32,
        path: u64,
        follow: bool,
        empty: bool,
    },
}

pub(crate) struct Process {
    /// Thread group.
    pub(crate) pid: i32,
    pub(crate) parent: i32,
    /// Clock ticks after boot.
    pub(crate) started: u64,
}

impl Place {
    pub(crate) fn new() -> io::Result<Place> {
        let proc = syscall::openat(here(), c"/proc", libc::O_PATH | libc::O_DIRECTORY, 0)?;
        let home = syscall::openat(here(), c"/proc/thread-self/ns/mnt", libc::O_RDONLY, 0)?;
        Ok(Place { proc, home, root: None, roots: false })
    }

    pub(crate) fn leave(&mut self) {
        if self.root.take().is_some() {
            // Otherwise the step's mounts would live until this thread ends.
            let _ = syscall::setns(self.home.as_fd(), libc::CLONE_NEWNS);
        }
    }

    fn proc_file(&self, pid: i32, name: &str, flags: c_int) -> io::Result<OwnedFd> {
        syscall::openat(self.proc.as_fd(), &c_bytes(format!("{pid}/{name}").as_bytes())?, flags, 0)
    }

    fn proc_text(&self, pid: i32, name: &str) -> Option<String> {
        let file = std::fs::File::from(self.proc_file(pid, name, libc::O_RDONLY).ok()?);
        io::read_to_string(file).ok()
    }

    pub(crate) fn process(&self, thread: i32) -> Option<Process> {
        let status = self.proc_text(thread, "status")?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        let (pid, parent) = (field("Tgid:")?, field("PPid:")?);
        let stat = self.proc_text(pid, "stat")?;
        // The name in parentheses may hold anything; field 22 counts from 1, what follows it from 3.
        let started = stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()?;
        Some(Process { pid, parent, started })
    }

    pub(crate) fn umask(&self, pid: i32) -> u32 {
        let status = self.proc_text(pid, "status").unwrap_or_default();
        status.lines().find_map(|line| u32::from_str_radix(line.strip_prefix("Umask:")?.trim(), 8).ok()).unwrap_or(0o022)
    }

    /// ((device, inode), mode, record key) of a process's program.
    pub(crate) fn program(&self, pid: i32) -> Option<((u64, u64), u32, Seen)> {
        let file = self.proc_file(pid, "exe", libc::O_PATH).ok()?;
        let stat = syscall::stat(file.as_fd()).ok()?;
        let seen = owners::look(file.as_fd(), syscall::EMPTY).ok()?;
        Some(((stat.st_dev, stat.st_ino), stat.st_mode, seen))
    }

    pub(crate) fn open(&mut self, pid: i32, target: &Target) -> Result<OwnedFd, c_int> {
        match *target {
            Target::Descriptor(fd) => self.proc_file(pid, &format!("fd/{fd}"), libc::O_PATH).map_err(|_| libc::EBADF),
            Target::Path { dir, path, follow, empty } => {
                let name = memory::read_path(pid, path)?;
                if name.is_empty() {
                    if !empty {
                        return Err(libc::ENOENT);
                    }
                    let base = if dir == libc::AT_FDCWD {
                        self.proc_file(pid, "cwd", libc::O_PATH)
                    } else {
                        self.proc_file(pid, &format!("fd/{dir}"), libc::O_PATH)
                    };
                    return base.map_err(|_| libc::EBADF);
                }
                let flags = libc::O_PATH | if follow { 0 } else { libc::O_NOFOLLOW };
                let mut own = Vec::new();
                if follow && own_path(pid, name.as_bytes(), &mut own).ok_or(libc::ENOENT)? {
                    return syscall::openat(self.proc.as_fd(), &c_bytes(&own).map_err(|error| errno(&error))?, flags, 0)
                        .map_err(|error| errno(&error));
                }
                self.within(pid, dir, &name, |base, name| syscall::openat(base, name, flags, 0))
            }
        }
    }

    /// Runs `action` with the caller's root and folder.
    pub(crate) fn within(
        &mut self,
        pid: i32,
        dir: i32,
        name: &CString,
        action: impl FnOnce(BorrowedFd<'_>, &CString) -> io::Result<OwnedFd>,
    ) -> Result<OwnedFd, c_int> {
        self.join(pid).and_then(|()| self.joined(pid, dir, name, action)).map_err(|error| errno(&error))
    }

    fn joined(
        &self,
        pid: i32,
        dir: i32,
        name: &CString,
        action: impl FnOnce(BorrowedFd<'_>, &CString) -> io::Result<OwnedFd>,
    ) -> io::Result<OwnedFd> {
        let (root, ours) = self.root.as_ref().ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))?;
        let theirs = self.proc_file(pid, "root", libc::O_PATH)?;
        let base = match dir {
            _ if name.as_bytes().starts_with(b"/") => None,
            libc::AT_FDCWD => Some(self.proc_file(pid, "cwd", libc::O_PATH)?),
            dir => Some(self.proc_file(pid, &format!("fd/{dir}"), libc::O_PATH).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?),
        };
        // The caller is in a chroot of its own making.
        let elsewhere = *ours != identity(&syscall::stat(theirs.as_fd())?);
        if elsewhere {
            change_root(theirs.as_fd())?;
        }
        let result = action(base.as_ref().map_or(here(), AsFd::as_fd), name);
        if elsewhere {
            change_root(root.as_fd())?;
        }
        result
    }

    /// Moves this thread into the step's mount namespace, once.
    fn join(&mut self, pid: i32) -> io::Result<()> {
        if self.root.is_none() {
            syscall::unshare(libc::CLONE_FS)?;
            let theirs = self.proc_file(pid, "ns/mnt", libc::O_RDONLY)?;
            syscall::setns(theirs.as_fd(), libc::CLONE_NEWNS)?;
            // SAFETY: no pointers; the umask is this thread's own now. Callers' modes come with theirs taken off.
            unsafe { libc::umask(0) };
            let root = syscall::openat(here(), c"/", libc::O_PATH | libc::O_DIRECTORY, 0)?;
            let identity = identity(&syscall::stat(root.as_fd())?);
            self.root = Some((root, identity));
        }
        Ok(())
    }

    /// Where the caller's target is, for [`Found::look`]. Opens nothing unless it must. `None`: let the kernel say what is wrong.
    pub(crate) fn find(&mut self, pid: i32, target: &Target) -> Option<Found<'_>> {
        let (dir, at, follow, empty) = match *target {
            Target::Descriptor(fd) => (fd, 0, true, true),
            Target::Path { dir, path, follow, empty } => (dir, path, follow, empty),
        };
        let mut room = [0; PATH_MAX];
        // A missing path may stand for an empty one (Linux 6.11).
        let name = if at != 0 || !empty { memory::read_name(pid, at, &mut room).ok()?.to_bytes() } else { &[] };
        let mut path = Vec::with_capacity(name.len() + 32);
        let base = |path: &mut Vec<u8>| if dir == libc::AT_FDCWD { write!(path, "{pid}/cwd") } else { write!(path, "{pid}/fd/{dir}") };
        if name.is_empty() {
            base(&mut path).ok()?;
            return if empty { Found::new(self.proc.as_fd(), path, 0) } else { None };
        }
        self.join(pid).ok()?;
        if self.roots && self.is_elsewhere(pid)? {
            let open = self.open(pid, target).ok()?;
            return Some(Found { base: Base::Opened(open), path: CString::default(), flags: libc::AT_EMPTY_PATH });
        }
        let flags = if follow { 0 } else { libc::AT_SYMLINK_NOFOLLOW };
        if name[0] != b'/' {
            base(&mut path).ok()?;
            path.push(b'/');
            path.extend_from_slice(name);
        } else if !own_path(pid, name, &mut path)? {
            return Found::new(here(), name.to_vec(), flags);
        }
        Found::new(self.proc.as_fd(), path, flags)
    }

    /// The caller has a root of its own making.
    fn is_elsewhere(&self, pid: i32) -> Option<bool> {
        let mut buffer = [0u8; 32];
        write!(&mut buffer[..31], "{pid}/root").ok()?;
        let path = std::ffi::CStr::from_bytes_until_nul(&buffer).ok()?;
        // SAFETY: an all-zero stat is a valid value.
        let mut theirs: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: the pointers are valid.
        check(unsafe { libc::fstatat(self.proc.as_raw_fd(), path.as_ptr(), &raw mut theirs, 0) }.into()).ok()?;
        Some(self.root.as_ref()?.1 != identity(&theirs))
    }
}

impl Found<'_> {
    fn new(base: BorrowedFd<'_>, path: Vec<u8>, flags: c_int) -> Option<Found<'_>> {
        Some(Found { base: Base::Known(base), path: CString::new(path).ok()?, flags })
    }

    fn base(&self) -> RawFd {
        match &self.base {
            Base::Known(base) => base.as_raw_fd(),
            Base::Opened(base) => base.as_raw_fd(),
        }
    }

    /// `statx`.
    pub(crate) fn look(&self, mask: u32) -> io::Result<libc::statx> {
        // SAFETY: an all-zero statx is valid; the kernel fills it.
        unsafe {
            let mut out: libc::statx = std::mem::zeroed();
            check(libc::syscall(libc::SYS_statx, self.base(), self.path.as_ptr(), self.flags, mask, &raw mut out))?;
            Ok(out)
        }
    }
}

/// What a path through the streams or through the caller's own folder in `/proc` is in the machine's `/proc`: the recorder's thread
/// has no number in the step's pid namespace, so its own `/proc/self` is nobody there. False: the path is another one.
/// `None`: such a path cannot be told.
fn own_path(pid: i32, name: &[u8], out: &mut Vec<u8>) -> Option<bool> {
    let Some((prefix, own)) = OWN.iter().find(|(prefix, _)| name.starts_with(prefix)) else { return Some(false) };
    // Above that folder is what belongs to the machine, not to the step.
    if name.windows(3).any(|part| part == b"/..") {
        return None;
    }
    write!(out, "{pid}/{own}").ok()?;
    out.extend_from_slice(&name[prefix.len()..]);
    Some(true)
}

/// (device, inode).
fn identity(stat: &libc::stat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

fn change_root(to: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: constant string; this thread has a root of its own.
    unsafe {
        check(libc::fchdir(to.as_raw_fd()).into())?;
        check(libc::chroot(c".".as_ptr()).into()).map(drop)
    }
}

/// The number of an error.
pub(crate) fn errno(error: &io::Error) -> c_int {
    error.raw_os_error().unwrap_or(libc::EIO)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_paths_never_leave_the_callers_folder() {
        let rows = [
            ("/etc/passwd", Some("")),
            ("/proc/7/fd/3", Some("")),
            ("/proc/self/fd/3", Some("42/fd/3")),
            ("/proc/thread-self/cwd/x", Some("42/cwd/x")),
            ("/dev/fd/3", Some("42/fd/3")),
            ("/dev/stdin", Some("42/fd/0")),
            ("/dev/stdout", Some("42/fd/1")),
            ("/dev/stderr", Some("42/fd/2")),
            ("/proc/self/../../etc/shadow", None),
            ("/dev/fd/..", None),
            ("/proc/self/..", None),
        ];
        for (name, want) in rows {
            let mut out = Vec::new();
            let got = own_path(42, name.as_bytes(), &mut out).map(|_| String::from_utf8(out).unwrap());
            assert_eq!(got.as_deref(), want, "{name}");
        }
    }
}
