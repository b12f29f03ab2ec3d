//! The step's first process, between `clone` and `exec`.
//!
//! It is a copy of one thread of a process with many: a lock that another thread held is held for ever. So nothing here
//! allocates, locks or panics; everything comes ready in [`Child`]. Failures go back through a pipe as (stage, errno).

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use libc::{c_char, c_int, c_long, c_ulong, sock_filter};

use crate::step::Process;
use crate::syscall::{self, check};
use crate::{caps, seccomp};

/// Where the child failed. The discriminants travel through the pipe.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub(crate) enum Stage {
    Start = 1,
    Stdio,
    Proc,
    Pivot,
    Mask,
    Limits,
    Bounding,
    Seccomp,
    Listener,
    Groups,
    Gid,
    Uid,
    Caps,
    Cwd,
    Exec,
}

impl Stage {
    pub(crate) fn from_number(number: u32) -> Option<Stage> {
        use Stage::{Bounding, Caps, Cwd, Exec, Gid, Groups, Limits, Listener, Mask, Pivot, Proc, Seccomp, Start, Stdio, Uid};
        [Start, Stdio, Proc, Pivot, Mask, Limits, Bounding, Seccomp, Listener, Groups, Gid, Uid, Caps, Cwd, Exec]
            .into_iter()
            .find(|stage| *stage as u32 == number)
    }

    /// What the message says failed.
    pub(crate) fn what(self) -> &'static str {
        match self {
            Stage::Start => "waiting for the engine",
            Stage::Stdio => "connecting the standard streams",
            Stage::Proc => "mounting /proc",
            Stage::Pivot => "changing the root",
            Stage::Mask => "hiding parts of /proc",
            Stage::Limits => "setrlimit",
            Stage::Bounding => "dropping capabilities from the bounding set",
            Stage::Seccomp => "loading the seccomp filter",
            Stage::Listener => "handing over the owner recorder's listener",
            Stage::Groups => "setgroups (are the group ids within the mapped range of /etc/subgid?)",
            Stage::Gid => "setgid (is the group id within the mapped range of /etc/subgid?)",
            Stage::Uid => "setuid (is the user id within the mapped range of /etc/subuid?)",
            Stage::Caps => "capset",
            Stage::Cwd => "entering the working directory",
            Stage::Exec => "exec",
        }
    }
}

/// Its own `/proc` of the pid namespace.
pub(crate) struct Proc {
    /// Mount point, `O_PATH`.
    pub(crate) target: RawFd,
    /// Detached copy of the machine's `/proc`, for kernels that refuse a fresh one.
    pub(crate) fallback: RawFd,
    /// Hide Docker's list of paths.
    pub(crate) mask: bool,
}

/// Everything a child needs, ready before `clone`. Pointers live as long as the thread that clones waits.
pub(crate) struct Child<'a> {
    pub(crate) program: &'a CStr,
    /// NULL-terminated.
    pub(crate) argv: *const *const c_char,
    /// NULL-terminated.
    pub(crate) envp: *const *const c_char,
    pub(crate) cwd: &'a CStr,
    /// stdin, stdout, stderr.
    pub(crate) stdio: [RawFd; 3],
    /// Errors go here.
    pub(crate) errors: RawFd,
    /// One byte arrives when the engine is ready; end of file when it died.
    pub(crate) go: RawFd,
    /// Sorted; every other descriptor above 2 is closed first.
    pub(crate) keep: &'a [RawFd],
    /// The new root folder, a mount point of this mount namespace (`O_PATH`).
    pub(crate) root: RawFd,
    /// `None`: no namespaces, plain `chroot`.
    pub(crate) proc: Option<Proc>,
    /// `None`: Docker's filter is not wanted.
    pub(crate) filter: Option<&'a [sock_filter]>,
    /// Owner recorder: its filter and the socket on which the listener is sent.
    pub(crate) recorder: Option<(&'a [sock_filter], RawFd)>,
    /// (resource, soft, hard).
    pub(crate) limits: &'a [(u32, libc::rlimit64)],
    /// Capabilities to keep; `None`: as they are.
    pub(crate) bounding: Option<u64>,
    /// (uid, gid); `None`: stay.
    pub(crate) ids: Option<(u32, u32)>,
    pub(crate) groups: &'a [u32],
    /// Effective and permitted for uid 0; `None`: as they are.
    pub(crate) caps: Option<u64>,
}

/// Files that Docker hides (`/dev/null` over them, or an empty folder).
const MASKED: [&CStr; 10] = [
    c"/proc/asound",
    c"/proc/acpi",
    c"/proc/interrupts",
    c"/proc/kcore",
    c"/proc/keys",
    c"/proc/latency_stats",
    c"/proc/timer_list",
    c"/proc/timer_stats",
    c"/proc/sched_debug",
    c"/proc/scsi",
];

/// Parts of `/proc` that Docker makes read-only.
const READ_ONLY: [&CStr; 5] = [c"/proc/bus", c"/proc/fs", c"/proc/irq", c"/proc/sys", c"/proc/sysrq-trigger"];

impl Process for Child<'_> {
    /// Becomes the step's program, or reports and exits.
    fn run(&self) -> ! {
        let (stage, error) = self.start();
        let message = [stage as u32, error.raw_os_error().unwrap_or(libc::EIO) as u32];
        // SAFETY: eight bytes of a live array; then the process ends.
        unsafe {
            libc::write(self.errors, message.as_ptr().cast(), size_of_val(&message));
            libc::_exit(127)
        }
    }
}

impl Child<'_> {
    fn start(&self) -> (Stage, io::Error) {
        match self.steps() {
            Ok(never) => match never {},
            Err(failure) => failure,
        }
    }

    fn steps(&self) -> Result<std::convert::Infallible, (Stage, io::Error)> {
        at(Stage::Start, self.wait())?;
        at(Stage::Stdio, self.stdio())?;
        if let Some(proc) = &self.proc {
            // Its own view of the cgroup tree; older kernels have none.
            let _ = syscall::unshare(libc::CLONE_NEWCGROUP);
            at(Stage::Proc, proc.mount())?;
            at(Stage::Pivot, self.pivot())?;
            if proc.mask {
                at(Stage::Mask, mask())?;
            }
        } else {
            at(Stage::Pivot, self.chroot())?;
        }
        for (resource, limit) in self.limits {
            let none = std::ptr::null::<libc::rlimit64>();
            // SAFETY: a live struct.
            at(Stage::Limits, check(unsafe { libc::syscall(libc::SYS_prlimit64, 0, *resource, &raw const *limit, none) }))?;
        }
        // SAFETY: no pointers.
        unsafe { libc::umask(0o022) };
        if let Some(keep) = self.bounding {
            at(Stage::Bounding, caps::bound(keep))?;
        }
        // Loading a filter needs CAP_SYS_ADMIN (no_new_privs would break sudo), so it comes before the ids change.
        if let Some((filter, socket)) = self.recorder {
            let listener = at(Stage::Seccomp, seccomp::load_with_listener(filter))?;
            at(Stage::Listener, send_descriptor(socket, listener))?;
        }
        // Entered as root, so that a folder of another user with mode 700 works, as in Docker.
        let entered = self.enter_cwd();
        if let Some(filter) = self.filter {
            at(Stage::Seccomp, seccomp::load(filter))?;
        }
        if let Some((uid, gid)) = self.ids {
            // Raw calls: those of the C library would try to change the engine's other threads too.
            // SAFETY: the slice lives; the others take numbers.
            unsafe {
                at(Stage::Groups, check(libc::syscall(libc::SYS_setgroups, self.groups.len(), self.groups.as_ptr())))?;
                at(Stage::Gid, check(libc::syscall(libc::SYS_setresgid, gid, gid, gid)))?;
                at(Stage::Uid, check(libc::syscall(libc::SYS_setresuid, uid, uid, uid)))?;
            }
        }
        if let (Some(caps), None | Some((0, _))) = (self.caps, self.ids) {
            at(Stage::Caps, caps::set(caps))?;
        }
        if entered.is_err() {
            at(Stage::Cwd, self.enter_cwd())?;
        }
        // SAFETY: NULL-terminated arrays of C strings that live in the parent's thread.
        unsafe { libc::execve(self.program.as_ptr(), self.argv, self.envp) };
        Err((Stage::Exec, io::Error::last_os_error()))
    }

    fn wait(&self) -> io::Result<()> {
        // SAFETY: no pointers.
        check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as c_ulong, 0, 0, 0) }.into())?;
        reset_signals();
        close_others(self.keep);
        let mut byte = 0u8;
        loop {
            // SAFETY: one byte of room.
            let n = unsafe { libc::read(self.go, (&raw mut byte).cast(), 1) };
            if n == 1 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if n == 0 || error.raw_os_error() != Some(libc::EINTR) {
                return Err(io::Error::from_raw_os_error(libc::ECANCELED));
            }
        }
    }

    fn stdio(&self) -> io::Result<()> {
        // SAFETY: no pointers; setsid gives the step a session of its own.
        unsafe { libc::setsid() };
        for (to, from) in self.stdio.iter().enumerate() {
            // SAFETY: no pointers. The sources are above 2.
            check(unsafe { libc::dup2(*from, to as c_int) }.into())?;
        }
        Ok(())
    }

    fn pivot(&self) -> io::Result<()> {
        let dot = c".".as_ptr();
        // SAFETY: constant strings.
        unsafe {
            check(libc::fchdir(self.root).into())?;
            if libc::syscall(libc::SYS_pivot_root, dot, dot) == 0 {
                // The old root now lies on top of the new one.
                check(libc::umount2(dot, libc::MNT_DETACH).into())?;
                return check(libc::chdir(c"/".as_ptr()).into()).map(drop);
            }
        }
        // Docker's seccomp profile refuses pivot_root even with CAP_SYS_ADMIN.
        syscall::mount(c".", c"/", c"none", libc::MS_MOVE, c"")?;
        // SAFETY: constant strings.
        unsafe {
            check(libc::chroot(dot).into())?;
            check(libc::chdir(c"/".as_ptr()).into()).map(drop)
        }
    }

    fn chroot(&self) -> io::Result<()> {
        // SAFETY: constant strings.
        unsafe {
            check(libc::fchdir(self.root).into())?;
            check(libc::chroot(c".".as_ptr()).into())?;
            check(libc::chdir(c"/".as_ptr()).into()).map(drop)
        }
    }

    fn enter_cwd(&self) -> io::Result<()> {
        // SAFETY: valid C string.
        check(unsafe { libc::chdir(self.cwd.as_ptr()) }.into()).map(drop)
    }
}

impl Proc {
    fn mount(&self) -> io::Result<()> {
        // SAFETY: the parent keeps the descriptor open.
        let (target, fallback) = unsafe { (BorrowedFd::borrow_raw(self.target), BorrowedFd::borrow_raw(self.fallback)) };
        let attributes = syscall::ATTR_NOSUID | syscall::ATTR_NODEV | syscall::ATTR_NOEXEC;
        let fresh = syscall::fsopen(c"proc").and_then(|fs| {
            // SAFETY: the descriptor is ours.
            syscall::fsmount(unsafe { BorrowedFd::borrow_raw(fs.as_raw_fd()) }, attributes)
        });
        match fresh {
            // SAFETY: the descriptor is ours.
            Ok(mount) => syscall::attach(unsafe { BorrowedFd::borrow_raw(mount.as_raw_fd()) }, target),
            // A container whose own /proc is masked may not show a full one.
            Err(error) => syscall::attach(fallback, target).map_err(|_| error),
        }
    }
}

fn at<T>(stage: Stage, result: io::Result<T>) -> Result<T, (Stage, io::Error)> {
    result.map_err(|error| (stage, error))
}

/// Other steps of this engine wait for the end of their pipes: our copies must go now, not at `exec`. `keep` is sorted.
pub(crate) fn close_others(keep: &[RawFd]) {
    let mut from = 3u32;
    for fd in keep {
        let fd = *fd as u32;
        if fd > from {
            close_range(from, fd - 1);
        }
        from = from.max(fd + 1);
    }
    close_range(from, u32::MAX);
}

fn close_range(first: u32, last: u32) {
    // SAFETY: no pointers. Kernels before 5.9 fail: then everything of ours is closed by exec.
    unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
}

/// The engine ignores SIGPIPE and catches others; programs expect the defaults.
pub(crate) fn reset_signals() {
    for signal in 1..=64 {
        // SAFETY: SIG_DFL is always allowed; SIGKILL and SIGSTOP just fail.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: an initialised set.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// What Docker hides and protects below `/proc`. Paths that this kernel does not have are skipped.
fn mask() -> io::Result<()> {
    for path in READ_ONLY {
        let found = existing(syscall::mount(path, path, c"none", libc::MS_BIND | libc::MS_REC, c""))?;
        if found {
            let flags = libc::MS_BIND | libc::MS_REMOUNT | libc::MS_RDONLY | libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC;
            syscall::mount(c"none", path, c"none", flags, c"")?;
        }
    }
    for path in MASKED {
        match syscall::mount(c"/dev/null", path, c"none", libc::MS_BIND, c"") {
            Err(error) if error.raw_os_error() == Some(libc::ENOTDIR) => {
                existing(syscall::mount(c"tmpfs", path, c"tmpfs", libc::MS_RDONLY, c"mode=755"))?;
            }
            other => {
                existing(other)?;
            }
        }
    }
    Ok(())
}

fn existing(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT)) => Ok(false),
        Err(error) => Err(error),
    }
}

#[repr(C)]
struct Control {
    header: libc::cmsghdr,
    fd: RawFd,
    padding: u32,
}

fn send_descriptor(socket: RawFd, fd: OwnedFd) -> io::Result<()> {
    let raw = fd.into_raw_fd();
    let mut byte = 0u8;
    let mut data = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // SAFETY: an all-zero header is valid, everything it points to lives through the call.
    unsafe {
        let mut control = Control { header: std::mem::zeroed(), fd: raw, padding: 0 };
        control.header.cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as _;
        control.header.cmsg_level = libc::SOL_SOCKET;
        control.header.cmsg_type = libc::SCM_RIGHTS;
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut data;
        message.msg_iovlen = 1;
        message.msg_control = (&raw mut control).cast();
        message.msg_controllen = libc::CMSG_SPACE(size_of::<RawFd>() as u32) as _;
        let sent = check(libc::sendmsg(socket, &raw const message, 0) as c_long).map(drop);
        libc::close(raw);
        sent
    }
}

/// Receives what [`send_descriptor`] sent; `None` when the sender died first.
pub(crate) fn receive_descriptor(socket: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    let mut byte = 0u8;
    let mut data = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // SAFETY: an all-zero header is valid, everything it points to lives through the call.
    unsafe {
        let mut control: Control = std::mem::zeroed();
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut data;
        message.msg_iovlen = 1;
        message.msg_control = (&raw mut control).cast();
        message.msg_controllen = size_of::<Control>() as _;
        let n = check(libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) as c_long)?;
        if n == 0 || control.header.cmsg_type != libc::SCM_RIGHTS || message.msg_controllen == 0 {
            return Ok(None);
        }
        Ok(Some(OwnedFd::from_raw_fd(control.fd)))
    }
}
