//! `ptrace(2)` and `waitpid(2)`, by the names of what they do here.

use std::ffi::c_void;
use std::io;

use libc::c_int;

use crate::syscall::check;

const CONT: usize = 7;
pub(super) const GETREGS: usize = 12;
pub(super) const SETREGS: usize = 13;
const SYSCALL: usize = 24;
const GETEVENTMSG: usize = 0x4201;
const SEIZE: usize = 0x4206;
const LISTEN: usize = 0x4208;

const EVENT_FORK: i32 = 1;
const EVENT_VFORK: i32 = 2;
const EVENT_CLONE: i32 = 3;
const EVENT_EXEC: i32 = 4;
const EVENT_SECCOMP: i32 = 7;
const EVENT_STOP: i32 = 128;
/// `PTRACE_O_TRACESYSGOOD`, `…FORK`, `…VFORK`, `…CLONE`, `…EXEC`, `…SECCOMP`, `…EXITKILL`.
const OPTIONS: usize = 1 | 1 << EVENT_FORK | 1 << EVENT_VFORK | 1 << EVENT_CLONE | 1 << EVENT_EXEC | 1 << EVENT_SECCOMP | 1 << 20;
/// Marks the stop at the end of a call.
const CALL_BIT: c_int = 0x80;

/// Why a thread is reported.
#[derive(Debug)]
pub(super) enum Event {
    /// It is gone.
    Gone { status: c_int, usage: Box<libc::rusage> },
    /// At the entry of a call that the filter sends here.
    Entry,
    /// At the end of a call.
    End,
    /// It made a thread or a process.
    Made { vfork: bool },
    /// It has become another program.
    Exec,
    /// A signal is about to be delivered.
    Signal(c_int),
    /// It is stopped as a whole group is (`SIGSTOP`…).
    Group,
    /// A new one's first stop, or the end of a group's stop.
    Stop,
}

/// A request with plain numbers or a pointer to a struct of its own.
pub(super) fn request(what: usize, thread: i32, address: usize, data: *mut c_void) -> io::Result<()> {
    // SAFETY: callers pass what the request takes: numbers, or a pointer to a live struct of the right type.
    check(unsafe { libc::syscall(libc::SYS_ptrace, what, thread as usize, address, data) }).map(drop)
}

fn number(value: usize) -> *mut c_void {
    std::ptr::without_provenance_mut(value)
}

/// Traces a process and everything that it will start; it dies with this thread.
pub(super) fn seize(process: i32) -> io::Result<()> {
    request(SEIZE, process, 0, number(OPTIONS))
}

/// Goes on, with a signal or none (0).
pub(super) fn go_on(thread: i32, signal: c_int) -> io::Result<()> {
    request(CONT, thread, 0, number(signal as usize))
}

/// Goes on to the end of the call.
pub(super) fn go_to_end(thread: i32) -> io::Result<()> {
    request(SYSCALL, thread, 0, number(0))
}

/// Stays stopped, until something continues the group.
pub(super) fn stay(thread: i32) -> io::Result<()> {
    request(LISTEN, thread, 0, number(0))
}

/// The number that comes with an event.
pub(super) fn message(thread: i32) -> io::Result<i32> {
    let mut out: libc::c_ulong = 0;
    request(GETEVENTMSG, thread, 0, (&raw mut out).cast())?;
    Ok(out as i32)
}

/// The next event of any thread that this thread traces. `None`: there is none left.
pub(super) fn next() -> Option<(i32, Event)> {
    loop {
        let mut status = 0;
        // SAFETY: an all-zero usage is valid.
        let mut usage: Box<libc::rusage> = Box::new(unsafe { std::mem::zeroed() });
        // SAFETY: both pointers are valid. `__WNOTHREAD`: children of other threads are not ours to wait for.
        let got = unsafe { libc::wait4(-1, &raw mut status, libc::__WALL | libc::__WNOTHREAD, &raw mut *usage) };
        match check(got.into()) {
            Ok(thread) => return Some((thread as i32, event(status, usage))),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
}

fn event(status: c_int, usage: Box<libc::rusage>) -> Event {
    if !libc::WIFSTOPPED(status) {
        return Event::Gone { status, usage };
    }
    let signal = libc::WSTOPSIG(status);
    match status >> 16 {
        0 if signal == libc::SIGTRAP | CALL_BIT => Event::End,
        0 => Event::Signal(signal),
        EVENT_FORK | EVENT_CLONE => Event::Made { vfork: false },
        EVENT_VFORK => Event::Made { vfork: true },
        EVENT_EXEC => Event::Exec,
        EVENT_SECCOMP => Event::Entry,
        EVENT_STOP if signal != libc::SIGTRAP => Event::Group,
        _ => Event::Stop,
    }
}
