//! Seccomp filters, compiled once per process.
//!
//! The allow-list is Docker's default profile (`profiles/seccomp/default.json` of Moby) for its fourteen default capabilities.
//! Calls that the list does not know at all (a newer kernel) fail with `ENOSYS`, so that programs fall back; calls that it
//! refuses fail with `EPERM`. A foreign architecture (i386 on x86-64) gets `ENOSYS`: nothing is ever killed.
//! System call numbers become a binary search tree of ranges: about seven comparisons for each call.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;

use libc::{c_long, sock_filter, sock_fprog};

use crate::syscall::check;

#[cfg(target_arch = "x86_64")]
const ARCH: u32 = 0xC000_003E;
#[cfg(target_arch = "aarch64")]
const ARCH: u32 = 0xC000_00B7;

/// The first number above the list; all architectures share the numbers from 424 on.
const UNKNOWN_FROM: u32 = 467;
/// Every namespace flag of `clone`.
const CLONE_NAMESPACES: u32 = 0x7E02_0000;
const AF_VSOCK: u32 = 40;
/// `O_CREAT`, and the bit of `O_TMPFILE` that is not `O_DIRECTORY`.
const CREATING: u32 = libc::O_CREAT as u32 | 0o20_000_000;
/// Linux, Linux 32 bit, both with UNAME26, and "just ask".
const PERSONALITIES: [u32; 5] = [0x0, 0x8, 0x2_0000, 0x2_0008, 0xFFFF_FFFF];

const RET_ALLOW: u32 = 0x7FFF_0000;
const RET_ERRNO: u32 = 0x0005_0000;
const RET_NOTIFY: u32 = 0x7FC0_0000;
const RET_TRACE: u32 = 0x7FF0_0000;

const LOAD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_EQ: u16 = 0x15;
const JUMP_GE: u16 = 0x35;
const JUMP_SET: u16 = 0x45;
const RETURN: u16 = 0x06;

const NR: u32 = 0;
const ARCH_AT: u32 = 4;
/// Low word of the first argument (both architectures are little endian).
const ARG0: u32 = 16;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Action {
    Return(u32),
    Clone,
    Socket,
    Personality,
    /// To the listener when the argument (by number) has a flag that creates files.
    Creating(u32),
    /// To the tracer when the first argument is one of these.
    TraceWhen(&'static [u32]),
    /// To the tracer when the pointer in the argument (by number) is not NULL.
    TracePointer(u32),
    /// To the tracer when the first argument has one of the bits.
    TraceBits(u32),
}

/// Docker's filter.
pub(crate) fn docker() -> &'static [sock_filter] {
    static FILTER: OnceLock<Vec<sock_filter>> = OnceLock::new();
    FILTER.get_or_init(|| {
        let mut rules: Vec<(u32, Action)> = allowed().into_iter().map(|nr| (nr as u32, Action::Return(RET_ALLOW))).collect();
        rules.push((libc::SYS_clone as u32, Action::Clone));
        rules.push((libc::SYS_socket as u32, Action::Socket));
        rules.push((libc::SYS_personality as u32, Action::Personality));
        rules.push((libc::SYS_clone3 as u32, Action::Return(errno(libc::ENOSYS))));
        compile(rules, errno(libc::EPERM), errno(libc::ENOSYS), errno(libc::ENOSYS))
    })
}

/// Sends the calls that [`crate::notify`] answers to its listener.
pub(crate) fn recorder() -> &'static [sock_filter] {
    static FILTER: OnceLock<Vec<sock_filter>> = OnceLock::new();
    FILTER.get_or_init(|| {
        let always = crate::notify::calls().into_iter().map(|nr| (nr as u32, Action::Return(RET_NOTIFY)));
        let opening = crate::notify::opening_calls().into_iter().map(|(nr, argument)| (nr as u32, Action::Creating(argument)));
        let rules = always.chain(opening).collect();
        compile(rules, RET_ALLOW, RET_ALLOW, RET_ALLOW)
    })
}

/// Stops at the calls that [`crate::traced`] answers or changes.
pub(crate) fn tracer() -> &'static [sock_filter] {
    static FILTER: OnceLock<Vec<sock_filter>> = OnceLock::new();
    FILTER.get_or_init(|| {
        use crate::traced::calls;
        let mut rules: Vec<(u32, Action)> = calls::always().into_iter().map(|nr| (nr as u32, Action::Return(RET_TRACE))).collect();
        rules.extend(calls::by_value().into_iter().map(|(nr, values)| (nr as u32, Action::TraceWhen(values))));
        rules.extend(calls::by_pointer().into_iter().map(|(nr, argument)| (nr as u32, Action::TracePointer(argument))));
        rules.extend(calls::by_bits().into_iter().map(|(nr, bits)| (nr as u32, Action::TraceBits(bits))));
        rules.extend(calls::missing().into_iter().map(|nr| (nr as u32, Action::Return(errno(libc::ENOSYS)))));
        compile(rules, RET_ALLOW, errno(libc::ENOSYS), errno(libc::ENOSYS))
    })
}

/// Loads a filter into this thread (async-signal-safe); needs `CAP_SYS_ADMIN` in the thread's user namespace, or `no_new_privs`.
pub(crate) fn load(filter: &[sock_filter]) -> io::Result<()> {
    let program = sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the program lives through the call.
    check(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) }).map(drop)
}

/// Loads a filter and returns the listener for its notifications (async-signal-safe).
pub(crate) fn load_with_listener(filter: &[sock_filter]) -> io::Result<OwnedFd> {
    let program = sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the program lives through the call.
    let load =
        |flags: libc::c_ulong| check(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) });
    // A call that is being answered is not interrupted by signals (Linux 5.19): nobody expects EINTR from `stat`.
    let fd = load(libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV)
        .or_else(|_| load(libc::SECCOMP_FILTER_FLAG_NEW_LISTENER))?;
    // SAFETY: a fresh descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

const fn errno(error: i32) -> u32 {
    RET_ERRNO | error as u32
}

const fn op(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}

const fn branch(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

fn compile(mut rules: Vec<(u32, Action)>, other: u32, unknown: u32, foreign: u32) -> Vec<sock_filter> {
    rules.sort_unstable_by_key(|(nr, _)| *nr);
    let other = Action::Return(other);
    // Ranges as (first number, action), each up to the next one.
    let mut ranges = vec![(0, other)];
    let mut push = |from: u32, action: Action| {
        let last = ranges.len() - 1;
        if ranges[last].0 == from {
            ranges[last].1 = action;
        } else if ranges[last].1 != action {
            ranges.push((from, action));
        }
    };
    for (index, (nr, action)) in rules.iter().enumerate() {
        push(*nr, *action);
        if rules.get(index + 1).is_none_or(|(next, _)| *next != nr + 1) {
            push(nr + 1, other);
        }
    }
    push(UNKNOWN_FROM, Action::Return(unknown));
    let mut out = vec![op(LOAD, ARCH_AT), branch(JUMP_EQ, ARCH, 1, 0), op(RETURN, foreign), op(LOAD, NR)];
    out.extend(tree(&ranges));
    out
}

fn tree(ranges: &[(u32, Action)]) -> Vec<sock_filter> {
    if let [(_, action)] = ranges {
        return leaf(*action);
    }
    let (low, high) = ranges.split_at(ranges.len() / 2);
    let (left, right) = (tree(low), tree(high));
    let at = high[0].0;
    let mut out = match u8::try_from(left.len()) {
        Ok(skip) => vec![branch(JUMP_GE, at, skip, 0)],
        Err(_) => vec![branch(JUMP_GE, at, 0, 1), op(JUMP, left.len() as u32)],
    };
    out.extend(left);
    out.extend(right);
    out
}

fn leaf(action: Action) -> Vec<sock_filter> {
    let (allow, refuse) = (op(RETURN, RET_ALLOW), op(RETURN, errno(libc::EPERM)));
    match action {
        Action::Return(value) => vec![op(RETURN, value)],
        Action::Clone => vec![op(LOAD, ARG0), branch(JUMP_SET, CLONE_NAMESPACES, 1, 0), allow, refuse],
        Action::Socket => vec![op(LOAD, ARG0), branch(JUMP_EQ, AF_VSOCK, 1, 0), allow, refuse],
        Action::Creating(argument) => {
            vec![op(LOAD, ARG0 + 8 * argument), branch(JUMP_SET, CREATING, 0, 1), op(RETURN, RET_NOTIFY), allow]
        }
        Action::TraceWhen(values) => {
            let count = values.len();
            let mut out = vec![op(LOAD, ARG0)];
            out.extend(values.iter().enumerate().map(|(index, value)| branch(JUMP_EQ, *value, (count - index) as u8, 0)));
            out.extend([allow, op(RETURN, RET_TRACE)]);
            out
        }
        Action::TracePointer(argument) => {
            let low = ARG0 + 8 * argument;
            let trace = op(RETURN, RET_TRACE);
            vec![op(LOAD, low), branch(JUMP_EQ, 0, 0, 2), op(LOAD, low + 4), branch(JUMP_EQ, 0, 1, 0), trace, allow]
        }
        Action::TraceBits(bits) => vec![op(LOAD, ARG0), branch(JUMP_SET, bits, 0, 1), op(RETURN, RET_TRACE), allow],
        Action::Personality => {
            let count = PERSONALITIES.len();
            let mut out = vec![op(LOAD, ARG0)];
            out.extend(PERSONALITIES.iter().enumerate().map(|(index, value)| branch(JUMP_EQ, *value, (count - index) as u8, 0)));
            out.extend([refuse, allow]);
            out
        }
    }
}

macro_rules! numbers {
    ($($name:ident)*) => { [$(libc::$name),*] };
}

fn allowed() -> Vec<c_long> {
    // io_pgetevents, which libc does not name everywhere.
    let mut all: Vec<c_long> = vec![if cfg!(target_arch = "x86_64") { 333 } else { 292 }];
    all.extend(numbers! {
        SYS_accept SYS_accept4 SYS_adjtimex SYS_bind SYS_brk SYS_capget SYS_capset SYS_chdir SYS_chroot SYS_clock_adjtime SYS_clock_getres
        SYS_clock_gettime SYS_clock_nanosleep SYS_close SYS_connect SYS_copy_file_range SYS_dup SYS_dup3 SYS_epoll_create1 SYS_epoll_ctl
        SYS_epoll_pwait SYS_eventfd2 SYS_execve SYS_execveat SYS_exit SYS_exit_group SYS_faccessat SYS_fadvise64 SYS_fallocate SYS_fanotify_mark
        SYS_fchdir SYS_fchmod SYS_fchmodat SYS_fchown SYS_fchownat SYS_fcntl SYS_fdatasync SYS_fgetxattr SYS_flistxattr SYS_flock
        SYS_fremovexattr SYS_fsetxattr SYS_fstat SYS_fstatfs SYS_fsync SYS_ftruncate SYS_futex SYS_getcpu SYS_getcwd SYS_getdents64
        SYS_getegid SYS_geteuid SYS_getgid SYS_getgroups SYS_getitimer SYS_getpeername SYS_getpgid SYS_getpid SYS_getppid SYS_getpriority
        SYS_getrandom SYS_getresgid SYS_getresuid SYS_getrlimit SYS_get_robust_list SYS_getrusage SYS_getsid SYS_getsockname SYS_getsockopt
        SYS_gettid SYS_gettimeofday SYS_getuid SYS_getxattr SYS_inotify_add_watch SYS_inotify_init1 SYS_inotify_rm_watch SYS_io_cancel
        SYS_ioctl SYS_io_destroy SYS_io_getevents SYS_ioprio_get SYS_ioprio_set SYS_io_setup SYS_io_submit SYS_kill
        SYS_lgetxattr SYS_linkat SYS_listen SYS_listxattr SYS_llistxattr SYS_lremovexattr SYS_lseek SYS_lsetxattr SYS_madvise SYS_membarrier
        SYS_memfd_create SYS_mincore SYS_mkdirat SYS_mknodat SYS_mlock SYS_mlock2 SYS_mlockall SYS_mmap SYS_mprotect SYS_mq_getsetattr
        SYS_mq_notify SYS_mq_open SYS_mq_timedreceive SYS_mq_timedsend SYS_mq_unlink SYS_mremap SYS_msgctl SYS_msgget SYS_msgrcv SYS_msgsnd
        SYS_msync SYS_munlock SYS_munlockall SYS_munmap SYS_name_to_handle_at SYS_nanosleep SYS_newfstatat SYS_openat SYS_pipe2 SYS_pkey_alloc
        SYS_pkey_free SYS_pkey_mprotect SYS_ppoll SYS_prctl SYS_pread64 SYS_preadv SYS_preadv2 SYS_prlimit64 SYS_process_vm_readv
        SYS_process_vm_writev SYS_pselect6 SYS_ptrace SYS_pwrite64 SYS_pwritev SYS_pwritev2 SYS_read SYS_readahead SYS_readlinkat SYS_readv
        SYS_recvfrom SYS_recvmmsg SYS_recvmsg SYS_remap_file_pages SYS_removexattr SYS_renameat SYS_renameat2 SYS_restart_syscall SYS_rseq
        SYS_rt_sigaction SYS_rt_sigpending SYS_rt_sigprocmask SYS_rt_sigqueueinfo SYS_rt_sigreturn SYS_rt_sigsuspend SYS_rt_sigtimedwait
        SYS_rt_tgsigqueueinfo SYS_sched_getaffinity SYS_sched_getattr SYS_sched_getparam SYS_sched_get_priority_max SYS_sched_get_priority_min
        SYS_sched_getscheduler SYS_sched_rr_get_interval SYS_sched_setaffinity SYS_sched_setattr SYS_sched_setparam SYS_sched_setscheduler
        SYS_sched_yield SYS_seccomp SYS_semctl SYS_semget SYS_semop SYS_semtimedop SYS_sendfile SYS_sendmmsg SYS_sendmsg SYS_sendto
        SYS_setfsgid SYS_setfsuid SYS_setgid SYS_setgroups SYS_setitimer SYS_setpgid SYS_setpriority SYS_setregid SYS_setresgid SYS_setresuid
        SYS_setreuid SYS_setrlimit SYS_set_robust_list SYS_setsid SYS_setsockopt SYS_set_tid_address SYS_setuid SYS_setxattr SYS_shmat
        SYS_shmctl SYS_shmdt SYS_shmget SYS_shutdown SYS_sigaltstack SYS_signalfd4 SYS_socketpair SYS_splice SYS_statfs SYS_statx SYS_symlinkat
        SYS_sync SYS_sync_file_range SYS_syncfs SYS_sysinfo SYS_tee SYS_tgkill SYS_timer_create SYS_timer_delete SYS_timer_getoverrun
        SYS_timer_gettime SYS_timer_settime SYS_timerfd_create SYS_timerfd_gettime SYS_timerfd_settime SYS_times SYS_tkill SYS_truncate
        SYS_umask SYS_uname SYS_unlinkat SYS_utimensat SYS_vmsplice SYS_wait4 SYS_waitid SYS_write SYS_writev
    });
    // pidfd_send_signal, pidfd_open, close_range, openat2, faccessat2, epoll_pwait2, landlock (3), memfd_secret,
    // process_mrelease, futex_waitv, cachestat, fchmodat2, map_shadow_stack, futex (3), statmount, listmount, mseal, *xattrat (4)
    all.extend([
        424, 434, 436, 437, 439, 441, 444, 445, 446, 447, 448, 449, 451, 452, 453, 454, 455, 456, 457, 458, 462, 463, 464, 465, 466,
    ]);
    #[cfg(target_arch = "x86_64")]
    all.extend(numbers! {
        SYS_access SYS_alarm SYS_arch_prctl SYS_chmod SYS_chown SYS_creat SYS_dup2 SYS_epoll_create SYS_epoll_wait SYS_epoll_ctl_old
        SYS_epoll_wait_old SYS_eventfd SYS_fork SYS_futimesat SYS_getdents SYS_getpgrp SYS_get_thread_area SYS_inotify_init SYS_lchown
        SYS_link SYS_lstat SYS_mkdir SYS_mknod SYS_modify_ldt SYS_open SYS_pause SYS_pipe SYS_poll SYS_readlink SYS_rename SYS_rmdir SYS_select
        SYS_set_thread_area SYS_signalfd SYS_stat SYS_symlink SYS_time SYS_unlink SYS_utime SYS_utimes SYS_vfork
    });
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a filter as the kernel would.
    fn eval(filter: &[sock_filter], arch: u32, nr: u32, arg0: u32) -> u32 {
        let (mut at, mut acc) = (0usize, 0u32);
        loop {
            let i = filter[at];
            at += 1;
            let jump = |yes: bool| usize::from(if yes { i.jt } else { i.jf });
            match i.code {
                LOAD => {
                    acc = match i.k {
                        NR => nr,
                        ARCH_AT => arch,
                        _ => arg0,
                    }
                }
                JUMP => at += i.k as usize,
                JUMP_EQ => at += jump(acc == i.k),
                JUMP_GE => at += jump(acc >= i.k),
                JUMP_SET => at += jump(acc & i.k != 0),
                RETURN => return i.k,
                code => panic!("unknown instruction {code}"),
            }
        }
    }

    #[test]
    fn docker_profile() {
        let (no, missing) = (errno(libc::EPERM), errno(libc::ENOSYS));
        let rows: &[(c_long, u32, u32)] = &[
            (libc::SYS_read, 0, RET_ALLOW),
            (libc::SYS_openat, 0, RET_ALLOW),
            (libc::SYS_chroot, 0, RET_ALLOW),
            (466, 0, RET_ALLOW),
            (libc::SYS_mount, 0, no),
            (libc::SYS_unshare, 0, no),
            (libc::SYS_bpf, 0, no),
            (libc::SYS_keyctl, 0, no),
            (425, 0, no),
            (libc::SYS_clone3, 0, missing),
            (467, 0, missing),
            (100_000, 0, missing),
            (libc::SYS_clone, libc::SIGCHLD as u32, RET_ALLOW),
            (libc::SYS_clone, libc::CLONE_NEWUSER as u32, no),
            (libc::SYS_clone, libc::CLONE_NEWNS as u32, no),
            (libc::SYS_socket, libc::AF_INET as u32, RET_ALLOW),
            (libc::SYS_socket, AF_VSOCK, no),
            (libc::SYS_personality, 0x8, RET_ALLOW),
            (libc::SYS_personality, 0xFFFF_FFFF, RET_ALLOW),
            (libc::SYS_personality, 0x40000, no),
        ];
        for (nr, arg0, want) in rows {
            assert_eq!(eval(docker(), ARCH, *nr as u32, *arg0), *want, "call {nr} with {arg0:#x}");
        }
        assert_eq!(eval(docker(), 0x4000_0003, 1, 0), missing, "i386 is not killed");
    }

    #[test]
    fn docker_profile_agrees_with_its_list() {
        let all = allowed();
        let special = [libc::SYS_clone, libc::SYS_socket, libc::SYS_personality, libc::SYS_clone3];
        for nr in 0..c_long::from(UNKNOWN_FROM) {
            if !special.contains(&nr) {
                let want = if all.contains(&nr) { RET_ALLOW } else { errno(libc::EPERM) };
                assert_eq!(eval(docker(), ARCH, nr as u32, 0), want, "call {nr}");
            }
        }
        assert!(docker().len() < 512, "the filter is {} long", docker().len());
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn tracer_takes_only_its_calls() {
        use crate::traced::calls;
        let (always, missing) = (calls::always(), calls::missing());
        for nr in 0..600 {
            let values = calls::by_value().into_iter().find(|(by, _)| *by == nr).map(|(_, values)| values);
            let pointer = calls::by_pointer().iter().any(|(by, _)| *by == nr);
            let bits = calls::by_bits().into_iter().find(|(by, _)| *by == nr).map_or(0, |(_, bits)| bits);
            for arg in [0, 1, libc::PR_SET_DUMPABLE as u32, libc::PR_SET_NAME as u32, (libc::CLONE_UNTRACED | libc::SIGCHLD) as u32] {
                let traced =
                    always.contains(&nr) || values.is_some_and(|values| values.contains(&arg)) || (pointer && arg != 0) || arg & bits != 0;
                let want = if missing.contains(&nr) || nr >= c_long::from(UNKNOWN_FROM) {
                    errno(libc::ENOSYS)
                } else if traced {
                    RET_TRACE
                } else {
                    RET_ALLOW
                };
                assert_eq!(eval(tracer(), ARCH, nr as u32, arg), want, "call {nr} with {arg}");
            }
        }
        assert_eq!(eval(tracer(), ARCH, libc::SYS_clone3 as u32, 0), errno(libc::ENOSYS), "its flags are in memory");
        assert_eq!(eval(tracer(), 0x4000_0003, 5, 0), errno(libc::ENOSYS), "i386 opens nothing");
        assert_eq!(eval(tracer(), ARCH, 0x4000_0002, 0), errno(libc::ENOSYS), "nor does x32");
    }

    #[test]
    fn recorder_takes_only_its_calls() {
        let calls = crate::notify::calls();
        let opening = crate::notify::opening_calls();
        for nr in 0..600 {
            let always = calls.contains(&nr);
            let opens = opening.iter().any(|(opening, _)| *opening == nr);
            for (arg, notify) in [
                (0, always),
                (libc::O_CREAT as u32, always || opens),
                (libc::O_TMPFILE as u32, always || opens),
                (libc::O_DIRECTORY as u32, always),
            ] {
                assert_eq!(eval(recorder(), ARCH, nr as u32, arg), if notify { RET_NOTIFY } else { RET_ALLOW }, "call {nr} with {arg:o}");
            }
        }
    }
}
