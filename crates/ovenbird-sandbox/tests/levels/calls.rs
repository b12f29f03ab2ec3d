//! This program inside a step: raw calls of the `stat` family, and how each must end. Says what is wrong, or nothing.
#![allow(unsafe_code, reason = "bad addresses and flags are what this is about")]

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::process::ExitCode;

use libc::{AT_EMPTY_PATH, AT_FDCWD, AT_SYMLINK_NOFOLLOW, c_int, c_long};

/// In the place of a case's name.
pub(crate) const NAME: &str = "calls";
/// Some answers are the kernel's own.
pub(crate) const KERNEL: &str = "OVENBIRD_SANDBOX_KERNEL";
const BAD: *const u8 = std::ptr::without_provenance(8);

type Owner = Result<(u32, u32), c_int>;

fn answer(ret: c_long, uid: u32, gid: u32) -> Owner {
    if ret < 0 { Err(std::io::Error::last_os_error().raw_os_error().unwrap_or_default()) } else { Ok((uid, gid)) }
}

fn stat_at(dir: c_int, path: *const u8, flags: c_int) -> Owner {
    // SAFETY: the kernel checks the path; the struct is its own.
    unsafe {
        let mut out: libc::stat = std::mem::zeroed();
        answer(libc::syscall(libc::SYS_newfstatat, dir, path, &raw mut out, flags), out.st_uid, out.st_gid)
    }
}

fn statx(dir: c_int, path: *const u8, flags: c_int, mask: u32) -> Owner {
    // SAFETY: the kernel checks the path; the struct is its own.
    unsafe {
        let mut out: libc::statx = std::mem::zeroed();
        answer(libc::syscall(libc::SYS_statx, dir, path, flags, mask, &raw mut out), out.stx_uid, out.stx_gid)
    }
}

fn stat_fd(fd: c_int) -> Owner {
    // SAFETY: the struct is the kernel's own.
    unsafe {
        let mut out: libc::stat = std::mem::zeroed();
        answer(libc::syscall(libc::SYS_fstat, fd, &raw mut out), out.st_uid, out.st_gid)
    }
}

#[cfg(target_arch = "x86_64")]
fn old(number: c_long, path: *const u8) -> Owner {
    // SAFETY: the kernel checks the path; the struct is its own.
    unsafe {
        let mut out: libc::stat = std::mem::zeroed();
        answer(libc::syscall(number, path, &raw mut out), out.st_uid, out.st_gid)
    }
}

pub(crate) fn run() -> ExitCode {
    let (Ok(file), Ok(root)) = (File::open("/f"), File::open("/")) else { return ExitCode::from(3) };
    let (fd, root) = (file.as_raw_fd(), root.as_raw_fd());
    let f = c"/f".to_bytes_with_nul().as_ptr();
    let path = |text: &'static std::ffi::CStr| text.to_bytes_with_nul().as_ptr();
    let own = format!("/proc/self/fd/{fd}\0");
    let long = format!("/{}f\0", "./".repeat(3000));
    let deep = format!("/{}f\0", "./".repeat(2000));
    let basic = libc::STATX_BASIC_STATS;
    // SAFETY: the kernel checks the addresses.
    let (nowhere, nowhere_x) = unsafe {
        (
            answer(libc::syscall(libc::SYS_newfstatat, AT_FDCWD, f, BAD, 0), 0, 0),
            answer(libc::syscall(libc::SYS_statx, AT_FDCWD, f, 0, basic, BAD), 0, 0),
        )
    };
    let (file, folder) = (Ok((5, 6)), Ok((7, 8)));
    // The recorder of the single-id level leaves it to the kernel.
    let up = if std::env::var_os(KERNEL).is_some() { Ok((0, 0)) } else { file };
    let mut rows: Vec<(&str, Owner, Owner)> = vec![
        ("fstat", stat_fd(fd), file),
        ("fstat of nothing", stat_fd(99), Err(libc::EBADF)),
        ("fstat of -1", stat_fd(-1), Err(libc::EBADF)),
        ("absolute", stat_at(AT_FDCWD, f, 0), file),
        ("an absolute path needs no folder", stat_at(-1, f, 0), file),
        ("relative to the folder", stat_at(AT_FDCWD, path(c"../f"), 0), file),
        ("relative to a descriptor", stat_at(root, path(c"f"), 0), file),
        ("relative to nothing", stat_at(99, path(c"f"), 0), Err(libc::EBADF)),
        ("relative to a file", stat_at(fd, path(c"f"), 0), Err(libc::ENOTDIR)),
        ("empty path of a file", stat_at(fd, path(c""), AT_EMPTY_PATH), file),
        ("empty path of the folder", stat_at(AT_FDCWD, path(c""), AT_EMPTY_PATH), folder),
        ("empty path without the flag", stat_at(fd, path(c""), 0), Err(libc::ENOENT)),
        ("a link", stat_at(AT_FDCWD, path(c"/l"), AT_SYMLINK_NOFOLLOW), Ok((0, 0))),
        ("a link followed", stat_at(AT_FDCWD, path(c"/l"), 0), file),
        ("a loop", stat_at(AT_FDCWD, path(c"/loop"), 0), Err(libc::ELOOP)),
        ("a file as a folder", stat_at(AT_FDCWD, path(c"/f/"), 0), Err(libc::ENOTDIR)),
        ("nothing there", stat_at(AT_FDCWD, path(c"/nothing"), 0), Err(libc::ENOENT)),
        ("a bad flag", stat_at(AT_FDCWD, f, 8), Err(libc::EINVAL)),
        ("a bad path", stat_at(AT_FDCWD, BAD, 0), Err(libc::EFAULT)),
        ("a bad buffer", nowhere, Err(libc::EFAULT)),
        ("too long a path", stat_at(AT_FDCWD, long.as_ptr(), 0), Err(libc::ENAMETOOLONG)),
        ("nearly too long a path", stat_at(AT_FDCWD, deep.as_ptr(), 0), file),
        ("own descriptor by path", stat_at(AT_FDCWD, own.as_ptr(), 0), file),
        ("out of own descriptors ", stat_at(AT_FDCWD, path(c"/proc/self/fd/../../../f"), 0), up),
        ("statx", statx(AT_FDCWD, f, 0, basic), file),
        ("statx without a mask", statx(AT_FDCWD, f, 0, 0), file),
        ("statx of a descriptor", statx(fd, path(c""), AT_EMPTY_PATH, basic), file),
        ("statx relative", statx(root, path(c"f"), libc::AT_STATX_DONT_SYNC, basic), file),
        ("statx with both ways to sync", statx(AT_FDCWD, f, 0x6000, basic), Err(libc::EINVAL)),
        ("statx with a reserved bit", statx(AT_FDCWD, f, 0, 1 << 31), Err(libc::EINVAL)),
        ("statx with a bad buffer", nowhere_x, Err(libc::EFAULT)),
        ("statx of nothing", statx(AT_FDCWD, path(c"/nothing"), 0, basic), Err(libc::ENOENT)),
        ("a thread", std::thread::spawn(|| stat_at(AT_FDCWD, c"../f".to_bytes_with_nul().as_ptr(), 0)).join().unwrap_or(Err(0)), file),
    ];
    #[cfg(target_arch = "x86_64")]
    rows.extend([
        ("stat", old(libc::SYS_stat, path(c"/l")), file),
        ("lstat", old(libc::SYS_lstat, path(c"/l")), Ok((0, 0))),
        ("lstat of a file", old(libc::SYS_lstat, f), file),
        ("stat of an empty path", old(libc::SYS_stat, path(c"")), Err(libc::ENOENT)),
    ]);
    // Linux 6.11 knows it; whoever answers, there is but one right owner.
    let null = stat_at(fd, std::ptr::null(), AT_EMPTY_PATH);
    rows.push(("no path at all", null, if null == Err(libc::EFAULT) { null } else { file }));
    let wrong: Vec<_> = rows.into_iter().filter(|(_, got, want)| got != want).collect();
    for (name, got, want) in &wrong {
        println!("{name}: {got:?}, not {want:?}");
    }
    ExitCode::from(u8::from(!wrong.is_empty()))
}
