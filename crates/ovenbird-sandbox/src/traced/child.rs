//! The step's first process before it is one: a copy of one thread of the engine. Nothing here allocates or locks.

use std::ffi::CStr;
use std::io;
use std::os::fd::RawFd;

use libc::{c_char, c_int, c_ulong};

use crate::child::{self, Stage};
use crate::seccomp;
use crate::step::Process;
use crate::syscall::check;

pub(super) struct Child<'a> {
    pub(super) program: &'a CStr,
    /// NULL-terminated.
    pub(super) argv: *const *const c_char,
    /// NULL-terminated.
    pub(super) envp: *const *const c_char,
    pub(super) cwd: &'a CStr,
    /// stdin, stdout, stderr.
    pub(super) stdio: [RawFd; 3],
    /// Errors go here.
    pub(super) errors: RawFd,
    /// A byte goes here when it can be traced.
    pub(super) ready: RawFd,
    /// One byte arrives when it is traced; end of file when the engine died.
    pub(super) go: RawFd,
    /// Sorted; every other descriptor above 2 is closed first.
    pub(super) keep: &'a [RawFd],
    pub(super) limits: &'a [(u32, libc::rlimit64)],
    pub(super) filters: [&'a [libc::sock_filter]; 2],
}

impl Process for Child<'_> {
    fn run(&self) -> ! {
        let Err((stage, error)) = self.steps();
        let message = [stage as u32, error.raw_os_error().unwrap_or(libc::EIO) as u32];
        // SAFETY: eight bytes of a live array; then the process ends.
        unsafe {
            libc::write(self.errors, message.as_ptr().cast(), size_of_val(&message));
            libc::_exit(127)
        }
    }
}

impl Child<'_> {
    fn steps(&self) -> Result<std::convert::Infallible, (Stage, io::Error)> {
        let at = |stage: Stage| move |error: io::Error| (stage, error);
        self.wait().map_err(at(Stage::Start))?;
        // SAFETY: no pointers; setsid gives the step a session of its own.
        unsafe { libc::setsid() };
        for (to, from) in self.stdio.iter().enumerate() {
            // SAFETY: no pointers. The sources are above 2.
            check(unsafe { libc::dup2(*from, to as c_int) }.into()).map_err(at(Stage::Stdio))?;
        }
        for (resource, limit) in self.limits {
            let none = std::ptr::null::<libc::rlimit64>();
            // SAFETY: a live struct.
            check(unsafe { libc::syscall(libc::SYS_prlimit64, 0, *resource, &raw const *limit, none) }).map_err(at(Stage::Limits))?;
        }
        // SAFETY: no pointers.
        unsafe { libc::umask(0o022) };
        // SAFETY: numbers only.
        check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1 as c_ulong, 0 as c_ulong, 0 as c_ulong, 0 as c_ulong) }.into())
            .map_err(at(Stage::Seccomp))?;
        for filter in self.filters {
            seccomp::load(filter).map_err(at(Stage::Seccomp))?;
        }
        // From here on, paths are those of the step.
        // SAFETY: valid C string.
        check(unsafe { libc::chdir(self.cwd.as_ptr()) }.into()).map_err(at(Stage::Cwd))?;
        // SAFETY: NULL-terminated arrays of C strings that live in the parent's thread.
        unsafe { libc::execve(self.program.as_ptr(), self.argv, self.envp) };
        Err((Stage::Exec, io::Error::last_os_error()))
    }

    fn wait(&self) -> io::Result<()> {
        // SAFETY: numbers only. The engine itself may not be looked at by the step, this process must be.
        unsafe {
            check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as c_ulong, 0, 0, 0).into())?;
            check(libc::prctl(libc::PR_SET_DUMPABLE, 1 as c_ulong, 0, 0, 0).into())?;
        }
        child::reset_signals();
        child::close_others(self.keep);
        let mut byte = 1u8;
        // SAFETY: one byte of room.
        unsafe {
            libc::write(self.ready, (&raw const byte).cast(), 1);
            while libc::read(self.go, (&raw mut byte).cast(), 1) != 1 {
                let error = io::Error::last_os_error();
                if error.raw_os_error() != Some(libc::EINTR) {
                    return Err(io::Error::from_raw_os_error(libc::ECANCELED));
                }
            }
        }
        Ok(())
    }
}
