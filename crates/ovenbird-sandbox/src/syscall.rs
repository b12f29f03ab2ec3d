//! Thin names for the system calls that `std` and `libc` have no function for.
//!
//! Nothing here allocates or locks, so every function may also be called between `clone` and `exec`.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use libc::{c_char, c_int, c_long, c_uint, c_ulong, c_void};

pub(crate) const EMPTY: &CStr = c"";

pub(crate) const RESOLVE_NO_MAGICLINKS: u64 = 0x02;
pub(crate) const RESOLVE_IN_ROOT: u64 = 0x10;

const FSOPEN_CLOEXEC: c_uint = 1;
const FSMOUNT_CLOEXEC: c_uint = 1;
const FSCONFIG_SET_FLAG: c_uint = 0;
const FSCONFIG_SET_STRING: c_uint = 1;
const FSCONFIG_CMD_CREATE: c_uint = 6;
const MOVE_MOUNT_F_EMPTY_PATH: c_uint = 0x04;
const MOVE_MOUNT_T_EMPTY_PATH: c_uint = 0x40;
const OPEN_TREE_CLONE: c_uint = 1;
const OPEN_TREE_CLOEXEC: c_uint = libc::O_CLOEXEC as c_uint;
pub(crate) const AT_RECURSIVE: c_uint = 0x8000;

pub(crate) const ATTR_RDONLY: u64 = 0x01;
pub(crate) const ATTR_NOSUID: u64 = 0x02;
pub(crate) const ATTR_NODEV: u64 = 0x04;
pub(crate) const ATTR_NOEXEC: u64 = 0x08;

#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

#[repr(C)]
struct OpenHow {
    flags: u64,
    mode: u64,
    resolve: u64,
}

pub(crate) fn check(ret: c_long) -> io::Result<c_long> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

fn fd(ret: c_long) -> io::Result<OwnedFd> {
    let raw = check(ret)? as RawFd;
    // SAFETY: the kernel just made this descriptor for us and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

/// `openat2`; close-on-exec is always added.
pub(crate) fn openat2(dir: BorrowedFd<'_>, path: &CStr, flags: c_int, mode: u32, resolve: u64) -> io::Result<OwnedFd> {
    let how = OpenHow { flags: (flags | libc::O_CLOEXEC) as u64, mode: u64::from(mode), resolve };
    // SAFETY: both pointers are valid for the call; the size is that of the struct.
    fd(unsafe { libc::syscall(libc::SYS_openat2, dir.as_raw_fd(), path.as_ptr(), &raw const how, size_of::<OpenHow>()) })
}

/// `openat`, close-on-exec.
pub(crate) fn openat(dir: BorrowedFd<'_>, path: &CStr, flags: c_int, mode: u32) -> io::Result<OwnedFd> {
    // SAFETY: the path is a valid C string.
    fd(unsafe { c_long::from(libc::openat(dir.as_raw_fd(), path.as_ptr(), flags | libc::O_CLOEXEC, mode)) })
}

pub(crate) fn fsopen(fs: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: the name is a valid C string.
    fd(unsafe { libc::syscall(libc::SYS_fsopen, fs.as_ptr(), FSOPEN_CLOEXEC) })
}

pub(crate) fn fsconfig_string(fs: BorrowedFd<'_>, key: &CStr, value: &CStr) -> io::Result<()> {
    // SAFETY: valid C strings.
    check(unsafe { libc::syscall(libc::SYS_fsconfig, fs.as_raw_fd(), FSCONFIG_SET_STRING, key.as_ptr(), value.as_ptr(), 0) }).map(drop)
}

pub(crate) fn fsconfig_flag(fs: BorrowedFd<'_>, key: &CStr) -> io::Result<()> {
    let none = std::ptr::null::<c_char>();
    // SAFETY: valid C string.
    check(unsafe { libc::syscall(libc::SYS_fsconfig, fs.as_raw_fd(), FSCONFIG_SET_FLAG, key.as_ptr(), none, 0) }).map(drop)
}

/// Makes the superblock and a detached mount of it with the attributes.
pub(crate) fn fsmount(fs: BorrowedFd<'_>, attributes: u64) -> io::Result<OwnedFd> {
    let none = std::ptr::null::<c_char>();
    // SAFETY: no pointers but null ones.
    unsafe {
        check(libc::syscall(libc::SYS_fsconfig, fs.as_raw_fd(), FSCONFIG_CMD_CREATE, none, none, 0))?;
        fd(libc::syscall(libc::SYS_fsmount, fs.as_raw_fd(), FSMOUNT_CLOEXEC, attributes as c_uint))
    }
}

/// A detached copy of the mount (of the whole tree when `recursive`) at `path`.
pub(crate) fn clone_tree(dir: BorrowedFd<'_>, path: &CStr, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= AT_RECURSIVE;
    }
    if path.is_empty() {
        flags |= libc::AT_EMPTY_PATH as c_uint;
    }
    // SAFETY: valid C string.
    fd(unsafe { libc::syscall(libc::SYS_open_tree, dir.as_raw_fd(), path.as_ptr(), flags) })
}

/// Attaches a detached mount on what `target` refers to.
pub(crate) fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: valid C strings.
    check(unsafe { libc::syscall(libc::SYS_move_mount, mount.as_raw_fd(), EMPTY.as_ptr(), target.as_raw_fd(), EMPTY.as_ptr(), flags) })
        .map(drop)
}

/// Adds mount attributes to the mount behind the descriptor (and all below it when `recursive`).
pub(crate) fn add_attributes(mount: BorrowedFd<'_>, attributes: u64, recursive: bool) -> io::Result<()> {
    let attr = MountAttr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let flags = libc::AT_EMPTY_PATH as c_uint | if recursive { AT_RECURSIVE } else { 0 };
    // SAFETY: the struct lives through the call; its size is passed.
    check(unsafe {
        libc::syscall(libc::SYS_mount_setattr, mount.as_raw_fd(), EMPTY.as_ptr(), flags, &raw const attr, size_of::<MountAttr>())
    })
    .map(drop)
}

/// Classic `mount`.
pub(crate) fn mount(source: &CStr, target: &CStr, fs: &CStr, flags: c_ulong, data: &CStr) -> io::Result<()> {
    // SAFETY: valid C strings.
    check(c_long::from(unsafe { libc::mount(source.as_ptr(), target.as_ptr(), fs.as_ptr(), flags, data.as_ptr().cast::<c_void>()) }))
        .map(drop)
}

pub(crate) fn unshare(flags: c_int) -> io::Result<()> {
    // SAFETY: no pointers. Callers own the thread or process they change.
    check(c_long::from(unsafe { libc::unshare(flags) })).map(drop)
}

pub(crate) fn setns(ns: BorrowedFd<'_>, kind: c_int) -> io::Result<()> {
    // SAFETY: no pointers.
    check(c_long::from(unsafe { libc::setns(ns.as_raw_fd(), kind) })).map(drop)
}

/// What `fstat` says.
pub(crate) fn stat(fd: BorrowedFd<'_>) -> io::Result<libc::stat> {
    // SAFETY: an all-zero stat is a valid value.
    let mut out: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is valid; works for O_PATH descriptors too.
    check(c_long::from(unsafe { libc::fstat(fd.as_raw_fd(), &raw mut out) }))?;
    Ok(out)
}

/// `fstatat` without following a last symlink.
pub(crate) fn stat_at(dir: BorrowedFd<'_>, path: &CStr) -> io::Result<libc::stat> {
    // SAFETY: an all-zero stat is a valid value.
    let mut out: libc::stat = unsafe { std::mem::zeroed() };
    let flags = libc::AT_SYMLINK_NOFOLLOW | libc::AT_EMPTY_PATH;
    // SAFETY: the pointers are valid.
    check(c_long::from(unsafe { libc::fstatat(dir.as_raw_fd(), path.as_ptr(), &raw mut out, flags) }))?;
    Ok(out)
}

/// `SIGKILL` or another signal through a pidfd.
pub(crate) fn signal(pidfd: BorrowedFd<'_>, signal: c_int) -> io::Result<()> {
    let none = std::ptr::null::<c_void>();
    // SAFETY: a null siginfo is allowed.
    check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, none, 0) }).map(drop)
}

/// A pipe, both ends close-on-exec: (read, write).
pub(crate) fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends: [c_int; 2] = [-1; 2];
    // SAFETY: room for two descriptors.
    check(c_long::from(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) }))?;
    // SAFETY: fresh descriptors.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

/// The path as a C string; a NUL inside is `EINVAL`.
pub(crate) fn c_path(path: &std::path::Path) -> io::Result<std::ffi::CString> {
    c_bytes(std::os::unix::ffi::OsStrExt::as_bytes(path.as_os_str()))
}

/// The bytes as a C string; a NUL inside is `EINVAL`.
pub(crate) fn c_bytes(bytes: &[u8]) -> io::Result<std::ffi::CString> {
    std::ffi::CString::new(bytes).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// The current folder, for `*at` calls with absolute paths.
pub(crate) fn here() -> BorrowedFd<'static> {
    // SAFETY: AT_FDCWD is a constant that never gets closed.
    unsafe { BorrowedFd::borrow_raw(libc::AT_FDCWD) }
}
