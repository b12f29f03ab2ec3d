//! Which system calls stop at the tracer: those that name files, tell or change ids, or tell owners.

use libc::c_long;

macro_rules! numbers {
    ($($name:ident)*) => { [$(libc::$name),*] };
}

/// `fchmodat2` and the calls on attributes by a path, which libc does not name.
pub(super) const FCHMODAT2: c_long = 452;
pub(super) const XATTR_AT: [c_long; 4] = [463, 464, 465, 466];

/// `prctl` operations that would shut the tracer out of the process, or that need capabilities which root in a container has.
pub(super) const PRCTL: [u32; 3] = [libc::PR_SET_DUMPABLE as u32, libc::PR_CAPBSET_DROP as u32, libc::PR_SET_SECUREBITS as u32];

pub(crate) fn always() -> Vec<c_long> {
    let mut all = Vec::from(numbers! {
        SYS_openat SYS_faccessat SYS_faccessat2 SYS_chdir SYS_fchmod SYS_fchmodat SYS_truncate SYS_mkdirat SYS_mknodat SYS_unlinkat SYS_renameat2
        SYS_linkat SYS_symlinkat SYS_readlinkat SYS_utimensat SYS_statfs SYS_setxattr SYS_lsetxattr SYS_fsetxattr SYS_getxattr SYS_lgetxattr
        SYS_fgetxattr SYS_listxattr SYS_llistxattr SYS_removexattr SYS_lremovexattr SYS_fremovexattr SYS_inotify_add_watch
        SYS_name_to_handle_at SYS_execve SYS_execveat SYS_getcwd SYS_chroot SYS_fstat SYS_newfstatat SYS_statx SYS_fchown SYS_fchownat
        SYS_setuid SYS_setgid SYS_setreuid SYS_setregid SYS_setresuid SYS_setresgid SYS_setfsuid SYS_setfsgid SYS_setgroups SYS_getuid
        SYS_geteuid SYS_getgid SYS_getegid SYS_getresuid SYS_getresgid SYS_getgroups SYS_capget SYS_capset SYS_bind SYS_connect
        SYS_getsockname SYS_getpeername SYS_uname
    });
    all.push(FCHMODAT2);
    #[cfg(target_arch = "x86_64")]
    all.extend(numbers! {
        SYS_open SYS_creat SYS_access SYS_chmod SYS_mkdir SYS_mknod SYS_rmdir SYS_unlink SYS_rename SYS_renameat SYS_link SYS_symlink SYS_readlink
        SYS_utime SYS_utimes SYS_futimesat SYS_stat SYS_lstat SYS_chown SYS_lchown
    });
    all
}

/// The calls that stop when their first argument has one of the values.
pub(crate) fn by_value() -> Vec<(c_long, &'static [u32])> {
    vec![(libc::SYS_prctl, &PRCTL)]
}

/// The calls that stop when the argument of that number is a pointer to something.
pub(crate) fn by_pointer() -> Vec<(c_long, u32)> {
    vec![(libc::SYS_sendto, 4)]
}

/// The calls that stop when their first argument has one of the bits: who asks for it would make a process that nobody traces.
pub(crate) fn by_bits() -> Vec<(c_long, u32)> {
    vec![(libc::SYS_clone, libc::CLONE_UNTRACED as u32)]
}

/// The calls that name files (or, `clone3`, what a new process shares) in ways that cannot be followed, and have an older sister:
/// programs fall back.
pub(crate) fn missing() -> Vec<c_long> {
    let mut all = vec![libc::SYS_openat2, libc::SYS_io_uring_setup, libc::SYS_clone3];
    all.extend(XATTR_AT);
    all
}
