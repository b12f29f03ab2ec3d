//! Whether the traced level works here: a process is traced and stopped at a call, as a step is.

use std::io;
use std::os::fd::AsRawFd as _;

use super::ptrace::{self, Event};
use super::registers::Registers;
use crate::seccomp;
use crate::syscall::{self, check};

/// An id that nobody has.
const ANSWER: i64 = 0x7357_1D00;

/// What failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Failed {
    /// To be traced.
    Ptrace,
    /// To stop at a call.
    Filter,
}

/// Call in a process with one thread.
pub(crate) fn attempt() -> Result<(), (Failed, io::Error)> {
    let ptrace_failed = |error| (Failed::Ptrace, error);
    let (go, start) = syscall::pipe().map_err(ptrace_failed)?;
    // SAFETY: only system calls follow in the child, which ends with `_exit`.
    let child = check(unsafe { libc::fork() }.into()).map_err(ptrace_failed)? as i32;
    if child == 0 {
        let mut byte = 0u8;
        // SAFETY: one byte of room; numbers.
        unsafe {
            libc::close(start.as_raw_fd());
            let go = libc::read(go.as_raw_fd(), (&raw mut byte).cast(), 1) == 1;
            let one: libc::c_ulong = 1;
            let none: libc::c_ulong = 0;
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, one, none, none, none);
            let stopped = go && seccomp::load(seccomp::tracer()).is_ok() && libc::syscall(libc::SYS_getuid) == ANSWER;
            libc::_exit(if stopped { 0 } else { 1 })
        }
    }
    if let Err(error) = ptrace::seize(child) {
        drop(start);
        let _ = crate::reap::wait4(child);
        return Err(ptrace_failed(error));
    }
    // SAFETY: one byte of a constant.
    unsafe { libc::write(start.as_raw_fd(), [1u8].as_ptr().cast(), 1) };
    let mut ended = None;
    while let Some((thread, event)) = ptrace::next() {
        match event {
            Event::Gone { status, .. } => ended = Some(status),
            Event::Entry => {
                let _ = Registers::of(thread).and_then(|mut registers| {
                    registers.answer(ANSWER);
                    registers.give(thread)
                });
                let _ = ptrace::go_on(thread, 0);
            }
            Event::Signal(signal) => drop(ptrace::go_on(thread, signal)),
            _ => drop(ptrace::go_on(thread, 0)),
        }
    }
    if ended == Some(0) { Ok(()) } else { Err((Failed::Filter, io::Error::from_raw_os_error(libc::EPERM))) }
}
