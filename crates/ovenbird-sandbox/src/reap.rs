//! Follows a running step: passes its output on, watches for cancellation, collects how it ended.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::Stream;
use crate::syscall::{self, check};

/// How soon a cancelled step is killed, milliseconds.
const CANCEL_POLL: i32 = 25;
const BUFFER: usize = 64 * 1024;

/// A started process with its output pipes.
pub(crate) struct Running {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
    pub(crate) stdout: OwnedFd,
    pub(crate) stderr: OwnedFd,
    /// What kills everything: `SIGKILL` for the init of a pid namespace.
    pub(crate) kill: i32,
    pub(crate) reaped: bool,
}

/// How it ended.
pub(crate) struct Ended {
    /// `wait` status.
    pub(crate) status: i32,
    pub(crate) cancelled: bool,
    /// Bytes.
    pub(crate) max_rss: u64,
    pub(crate) cpu_micros: u64,
}

impl Running {
    /// Follows to the end. Everything that was written before the end has been passed on when this returns.
    pub(crate) fn follow(&mut self, output: &mut dyn FnMut(Stream, &[u8]), cancel: &AtomicBool) -> io::Result<Ended> {
        let pipes = Pipes { stdout: self.stdout.as_fd(), stderr: self.stderr.as_fd(), end: self.pidfd.as_fd() };
        // It may have ended just now.
        let cancelled = pipes.follow(output, cancel, || drop(syscall::signal(self.pidfd.as_fd(), self.kill)))?;
        let mut ended = self.wait()?;
        ended.cancelled = cancelled;
        Ok(ended)
    }

    fn wait(&mut self) -> io::Result<Ended> {
        let (status, usage) = wait4(self.pid)?;
        self.reaped = true;
        let micros = |time: libc::timeval| time.tv_sec as u64 * 1_000_000 + time.tv_usec as u64;
        let cpu_micros = micros(usage.ru_utime) + micros(usage.ru_stime);
        Ok(Ended { status, cancelled: false, max_rss: usage.ru_maxrss as u64 * 1024, cpu_micros })
    }
}

/// The output of a step.
pub(crate) struct Pipes<'a> {
    pub(crate) stdout: BorrowedFd<'a>,
    pub(crate) stderr: BorrowedFd<'a>,
    /// Ready (or closed at its other end) when every process of the step is dead.
    pub(crate) end: BorrowedFd<'a>,
}

impl Pipes<'_> {
    /// Passes everything on to the end; calls `kill` when the step is cancelled, and says whether it was.
    pub(crate) fn follow(&self, output: &mut dyn FnMut(Stream, &[u8]), cancel: &AtomicBool, kill: impl Fn()) -> io::Result<bool> {
        let mut cancelled = false;
        let mut open = [true, true];
        let mut buffer = vec![0u8; BUFFER];
        loop {
            if !cancelled && cancel.load(Ordering::Relaxed) {
                cancelled = true;
                kill();
            }
            let entry = |fd: i32, on: bool| libc::pollfd { fd: if on { fd } else { -1 }, events: libc::POLLIN, revents: 0 };
            let mut polled =
                [entry(self.stdout.as_raw_fd(), open[0]), entry(self.stderr.as_raw_fd(), open[1]), entry(self.end.as_raw_fd(), true)];
            // SAFETY: pointer and length of a live array.
            let ready = check(unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, CANCEL_POLL) }.into());
            match ready {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
                Ok(_) => {}
            }
            for (index, stream) in [Stream::Stdout, Stream::Stderr].into_iter().enumerate() {
                if polled[index].revents != 0 {
                    let fd = if index == 0 { self.stdout } else { self.stderr };
                    match read(fd, &mut buffer)? {
                        Some(0) => open[index] = false,
                        Some(n) => output(stream, &buffer[..n]),
                        None => {}
                    }
                }
            }
            if polled[2].revents != 0 {
                break;
            }
        }
        // All writers are dead; an engine thread that is forking may hold a copy of the pipe, so not until end of file.
        for (index, stream) in [Stream::Stdout, Stream::Stderr].into_iter().enumerate() {
            let fd = if index == 0 { self.stdout } else { self.stderr };
            while open[index] {
                match read(fd, &mut buffer)? {
                    Some(0) | None => open[index] = false,
                    Some(n) => output(stream, &buffer[..n]),
                }
            }
        }
        Ok(cancelled)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.reaped {
            let _ = syscall::signal(self.pidfd.as_fd(), self.kill);
            let _ = wait4(self.pid);
        }
    }
}

/// Waits for one child by pid, whichever thread made it.
pub(crate) fn wait4(pid: i32) -> io::Result<(i32, libc::rusage)> {
    let mut status = 0;
    // SAFETY: an all-zero usage is valid.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    loop {
        // SAFETY: both pointers are valid.
        match check(unsafe { libc::wait4(pid, &raw mut status, 0, &raw mut usage) }.into()) {
            Ok(_) => return Ok((status, usage)),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// Exit code, or 128 + signal.
pub(crate) fn exit_code(status: i32) -> i32 {
    if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { 128 + libc::WTERMSIG(status) }
}

/// `None`: nothing there now.
fn read(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    // SAFETY: pointer and length of a live slice.
    match check(unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) } as libc::c_long) {
        Ok(n) => Ok(Some(n as usize)),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A pipe whose read end does not block.
pub(crate) fn output_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = syscall::pipe()?;
    // SAFETY: no pointers.
    check(unsafe { libc::fcntl(read.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) }.into())?;
    Ok((read, write))
}
