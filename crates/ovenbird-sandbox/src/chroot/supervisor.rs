//! A process between engine and step that outlives neither: orphans of the step become its children, and it ends them all when the
//! step's program ends, when it is told to (`SIGTERM`), or when the engine dies (parent-death signal).
//!
//! Runs in a copy of a process with many threads: nothing allocates or locks.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use crate::child::{self, Child};
use crate::step::Process;

/// Process numbers are read in pieces of this many bytes.
const LIST: usize = 4096;

pub(crate) struct Supervisor<'a> {
    pub(crate) child: &'a Child<'a>,
    /// Sorted; everything else above 2 is closed.
    pub(crate) keep: &'a [RawFd],
    pub(crate) report: RawFd,
    /// The step is started when a byte comes from here: by then this process is in the groups whose limits the step must inherit.
    pub(crate) go: RawFd,
}

/// How the step's program ended.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Report {
    pub(crate) status: i32,
    /// Bytes.
    pub(crate) max_rss: u64,
    pub(crate) cpu_micros: u64,
}

/// `None`: the supervisor was killed.
pub(crate) fn read(report: &OwnedFd) -> Option<Report> {
    let mut out = Report::default();
    // SAFETY: room for one struct of plain numbers; all its writers are dead, so this does not wait.
    let n = unsafe { libc::read(report.as_raw_fd(), (&raw mut out).cast(), size_of::<Report>()) };
    (usize::try_from(n) == Ok(size_of::<Report>())).then_some(out)
}

impl Process for Supervisor<'_> {
    /// Never returns. All signals are blocked and stay so: they are fetched with `sigwait`.
    fn run(&self) -> ! {
        // SAFETY: numbers only.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM as libc::c_ulong, 0, 0, 0);
            libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1 as libc::c_ulong, 0, 0, 0);
        }
        child::close_others(self.keep);
        let mut byte = 0u8;
        // SAFETY: one byte of room; then the process ends if the engine has.
        unsafe {
            if libc::read(self.go, (&raw mut byte).cast(), 1) != 1 {
                libc::_exit(0);
            }
        }
        // SAFETY: a plain fork without the C library's handlers; the child never returns.
        let step = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD as libc::c_ulong, 0usize, 0usize, 0usize, 0usize) } as i32;
        if step == 0 {
            self.child.run();
        }
        for fd in self.keep {
            if *fd != self.report {
                // SAFETY: ours; the child has its copies. The engine waits for the end of these pipes.
                unsafe { libc::close(*fd) };
            }
        }
        let report = if step > 0 { wait(step) } else { Report { status: 127 << 8, ..Report::default() } };
        end_all();
        // SAFETY: one live struct; then the process ends.
        unsafe {
            libc::write(self.report, (&raw const report).cast(), size_of::<Report>());
            libc::_exit(0)
        }
    }
}

/// Until the step's program has ended or somebody asks for its end.
fn wait(step: i32) -> Report {
    // SAFETY: sets are initialised, pointers are valid.
    unsafe {
        let mut signals: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut signals);
        libc::sigaddset(&raw mut signals, libc::SIGCHLD);
        libc::sigaddset(&raw mut signals, libc::SIGTERM);
        loop {
            let mut status = 0;
            let mut usage: libc::rusage = std::mem::zeroed();
            let pid = libc::wait4(-1, &raw mut status, libc::WNOHANG, &raw mut usage);
            if pid == step {
                let micros = |time: libc::timeval| time.tv_sec as u64 * 1_000_000 + time.tv_usec as u64;
                return Report {
                    status,
                    max_rss: usage.ru_maxrss as u64 * 1024,
                    cpu_micros: micros(usage.ru_utime) + micros(usage.ru_stime),
                };
            }
            if pid > 0 {
                continue; // an orphan
            }
            if libc::sigwaitinfo(&raw const signals, std::ptr::null_mut()) == libc::SIGTERM {
                libc::kill(-step, libc::SIGKILL);
                libc::kill(step, libc::SIGKILL);
                return Report { status: libc::SIGKILL, ..Report::default() };
            }
        }
    }
}

/// Kills children until there are none: those of a killed child become ours.
fn end_all() {
    loop {
        kill_children();
        let mut status = 0;
        // SAFETY: a valid pointer.
        if unsafe { libc::wait4(-1, &raw mut status, 0, std::ptr::null_mut()) } < 0 {
            return;
        }
    }
}

fn kill_children() {
    // SAFETY: a constant string, a buffer with its length.
    unsafe {
        let list = libc::open(c"/proc/thread-self/children".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC);
        if list < 0 {
            return;
        }
        let mut buffer = [0u8; LIST];
        let mut pid: i32 = 0;
        loop {
            let n = libc::read(list, buffer.as_mut_ptr().cast(), LIST);
            if n <= 0 {
                break;
            }
            for byte in buffer.iter().take(n as usize) {
                if byte.is_ascii_digit() {
                    pid = pid.wrapping_mul(10).wrapping_add(i32::from(*byte - b'0'));
                } else {
                    // Never 0 or 1: those mean everybody.
                    if pid > 1 {
                        libc::kill(pid, libc::SIGKILL);
                    }
                    pid = 0;
                }
            }
        }
        libc::close(list);
    }
}
