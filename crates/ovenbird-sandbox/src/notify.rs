//! The owner recorder of the single-id level: answers the calls that one mapped id cannot do, and remembers what was meant.
//!
//! A seccomp filter sends the calls of [`calls`] to a thread of the engine ([`Recorder::serve`], `seccomp_unotify(2)`). Changes
//! of owner are recorded by inode; the real call then sets the owner to 0:0, which makes overlay copy the file into the upper
//! folder. `stat` shows what is recorded ([`crate::stat`]), so that a program which copies an owner copies the right one. Ids
//! of processes are made up per process, inherited from the parent when a process is first seen, so that a program which drops
//! its privileges sees that it did. A device node becomes an empty file with a record.
//! This is no security border: every process of the step is the same real user, and paths are resolved inside the step.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use libc::{c_int, c_long};

use crate::credentials::{Credentials, UNCHANGED};
use crate::memory;
use crate::owners::{self, Owners};
use crate::place::{Place, Target, errno};
use crate::stat::Question;
use crate::syscall::{self, check};

const IOCTL_RECV: u64 = 0xC050_2100;
const IOCTL_SEND: u64 = 0xC018_2101;
const IOCTL_ID_VALID: u64 = 0x4008_2102;
const IOCTL_ADD_DESCRIPTOR: u64 = 0x4018_2103;
/// The new descriptor is the answer (Linux 5.14).
const ADD_AND_SEND: u32 = 2;
const IOCTL_SET_FLAGS: u64 = 0x4008_2104;
/// Wakes the receiver on the sender's CPU (Linux 6.6): half the round trip.
const SYNC_WAKE_UP: u64 = 1;
const CONTINUE: u32 = 1;

/// Milliseconds until the end of the step is noticed when the kernel does not say.
const POLL: c_int = 50;
/// Deepest chain of parents that is followed for a process seen for the first time.
const PARENTS_MAX: usize = 64;

macro_rules! numbers {
    ($($name:ident)*) => { [$(libc::$name),*] };
}

/// The calls that are sent to the recorder.
pub(crate) fn calls() -> Vec<c_long> {
    let mut all = Vec::from(numbers! {
        SYS_fchown SYS_fchownat SYS_mknodat SYS_setuid SYS_setgid SYS_setreuid SYS_setregid SYS_setresuid SYS_setresgid SYS_setfsuid
        SYS_setfsgid SYS_setgroups SYS_getuid SYS_geteuid SYS_getgid SYS_getegid SYS_getresuid SYS_getresgid SYS_getgroups
    });
    // These are only noticed.
    all.extend(numbers! { SYS_chroot SYS_pivot_root SYS_setns });
    all.extend(numbers! { SYS_mkdirat SYS_symlinkat SYS_fstat SYS_newfstatat SYS_statx });
    #[cfg(target_arch = "x86_64")]
    all.extend(numbers! { SYS_chown SYS_lchown SYS_mknod SYS_mkdir SYS_symlink SYS_creat SYS_stat SYS_lstat });
    all
}

/// The calls that are sent when their flags (argument of that number) create a file.
pub(crate) fn opening_calls() -> Vec<(c_long, u32)> {
    vec![
        (libc::SYS_openat, 2),
        #[cfg(target_arch = "x86_64")]
        (libc::SYS_open, 1),
    ]
}

/// What is known of a process.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Known {
    credentials: Credentials,
    /// (device, inode) of the program, to notice the `exec` of a setuid one.
    program: (u64, u64),
    /// Clock ticks after boot; tells a new process with an old number apart.
    started: u64,
}

enum Answer {
    Value(i64),
    /// The call goes on as if nobody had looked.
    Kernel,
    /// The answer is this file; the flags are those of the call.
    File(OwnedFd, c_int),
}

type Answered = Result<Answer, c_int>;

pub(crate) struct Recorder {
    listener: OwnedFd,
    owners: Owners,
    user: Credentials,
    init: i32,
    processes: HashMap<i32, Known>,
    /// Some process is not root.
    mixed: bool,
}

impl Recorder {
    /// `user`: who the step runs as; `init`: its first process.
    pub(crate) fn new(listener: OwnedFd, user: (u32, u32, Vec<u32>), init: i32, lower: Owners) -> Recorder {
        // SAFETY: no pointer. Older kernels do not know the flag and are just slower.
        unsafe { libc::ioctl(listener.as_raw_fd(), IOCTL_SET_FLAGS as _, SYNC_WAKE_UP) };
        let user = Credentials::new(user.0, user.1, user.2);
        let mixed = user.user.effective != 0 || user.group.effective != 0;
        Recorder { listener, owners: lower, user, init, processes: HashMap::new(), mixed }
    }

    /// Serves until the last process of the step is gone (or `stop`); call on a thread of its own.
    pub(crate) fn serve(mut self, stop: &AtomicBool) -> Owners {
        let place = Place::new();
        if let Ok(mut place) = place {
            while self.ready(stop) {
                self.next(&mut place);
            }
            place.leave();
        }
        self.owners
    }

    fn ready(&self, stop: &AtomicBool) -> bool {
        loop {
            let mut polled = libc::pollfd { fd: self.listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one live struct.
            let n = unsafe { libc::poll(&raw mut polled, 1, POLL) };
            if n > 0 {
                return polled.revents & libc::POLLIN != 0;
            }
            if n == 0 && stop.load(Ordering::Relaxed) {
                return false;
            }
            if n < 0 && io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                return false;
            }
        }
    }

    fn next(&mut self, place: &mut Place) {
        // SAFETY: the kernel wants it zeroed.
        let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the struct has the size that is part of the number.
        if unsafe { libc::ioctl(self.listener.as_raw_fd(), IOCTL_RECV as _, &raw mut call) } < 0 {
            return; // the caller was killed in between
        }
        let (val, error, flags) = match self.answer(place, &call) {
            Ok(Answer::Value(value)) => (value, 0, 0),
            Ok(Answer::Kernel) => (0, 0, CONTINUE),
            Ok(Answer::File(file, flags)) => {
                let newfd_flags = (flags & libc::O_CLOEXEC) as u32;
                let mut add =
                    libc::seccomp_notif_addfd { id: call.id, flags: ADD_AND_SEND, srcfd: file.as_raw_fd() as u32, newfd: 0, newfd_flags };
                // SAFETY: the struct has the size that is part of the number.
                if unsafe { libc::ioctl(self.listener.as_raw_fd(), IOCTL_ADD_DESCRIPTOR as _, &raw mut add) } >= 0 {
                    return; // answered
                }
                (0, -errno(&io::Error::last_os_error()), 0)
            }
            Err(errno) => (0, -errno, 0),
        };
        let mut answer = libc::seccomp_notif_resp { id: call.id, val, error, flags };
        // SAFETY: the struct has the size that is part of the number. Fails when the caller was killed.
        unsafe { libc::ioctl(self.listener.as_raw_fd(), IOCTL_SEND as _, &raw mut answer) };
    }

    fn answer(&mut self, place: &mut Place, call: &libc::seccomp_notif) -> Answered {
        let args = call.data.args;
        let (a0, a1, a2) = (args[0] as u32, args[1] as u32, args[2] as u32);
        let pid = call.pid as i32;
        if let Some(question) = Question::new(call.data.nr.into(), args) {
            return self.show(place, call, &question);
        }
        match c_long::from(call.data.nr) {
            libc::SYS_fchown => self.change_owner(place, call, &Target::Descriptor(a0 as i32), a1, a2),
            libc::SYS_fchownat => {
                let target = Target::Path {
                    dir: a0 as i32,
                    path: args[1],
                    follow: args[4] as c_int & libc::AT_SYMLINK_NOFOLLOW == 0,
                    empty: args[4] as c_int & libc::AT_EMPTY_PATH != 0,
                };
                self.change_owner(place, call, &target, a2, args[3] as u32)
            }
            libc::SYS_mknodat => self.make_node(place, call, a0 as i32, args[1], a2, args[3]),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_chown => {
                self.change_owner(place, call, &Target::Path { dir: libc::AT_FDCWD, path: args[0], follow: true, empty: false }, a1, a2)
            }
            #[cfg(target_arch = "x86_64")]
            libc::SYS_lchown => {
                self.change_owner(place, call, &Target::Path { dir: libc::AT_FDCWD, path: args[0], follow: false, empty: false }, a1, a2)
            }
            #[cfg(target_arch = "x86_64")]
            libc::SYS_mknod => self.make_node(place, call, libc::AT_FDCWD, args[0], a1, args[2]),
            libc::SYS_chroot | libc::SYS_pivot_root | libc::SYS_setns => {
                place.roots = true;
                Ok(Answer::Kernel)
            }
            libc::SYS_openat => self.create(place, call, a0 as i32, args[1], a2 as c_int, args[3] as u32),
            libc::SYS_mkdirat => self.make_folder(place, call, a0 as i32, args[1], a2),
            libc::SYS_symlinkat => self.make_link(place, call, args[0], a1 as i32, args[2]),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_open => self.create(place, call, libc::AT_FDCWD, args[0], a1 as c_int, a2),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_creat => self.create(place, call, libc::AT_FDCWD, args[0], libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC, a1),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_mkdir => self.make_folder(place, call, libc::AT_FDCWD, args[0], a1),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_symlink => self.make_link(place, call, args[0], libc::AT_FDCWD, args[1]),
            libc::SYS_getgroups => {
                let groups = self.credentials(place, pid).groups;
                if a0 == 0 {
                    return Ok(Answer::Value(groups.len() as i64));
                }
                if (a0 as usize) < groups.len() {
                    return Err(libc::EINVAL);
                }
                memory::write_ids(pid, args[1], &groups)?;
                Ok(Answer::Value(groups.len() as i64))
            }
            libc::SYS_getuid | libc::SYS_geteuid | libc::SYS_getgid | libc::SYS_getegid | libc::SYS_getresuid | libc::SYS_getresgid
                if !self.mixed =>
            {
                Ok(Answer::Kernel)
            }
            libc::SYS_getuid => Ok(Answer::Value(self.credentials(place, pid).user.real.into())),
            libc::SYS_geteuid => Ok(Answer::Value(self.credentials(place, pid).user.effective.into())),
            libc::SYS_getgid => Ok(Answer::Value(self.credentials(place, pid).group.real.into())),
            libc::SYS_getegid => Ok(Answer::Value(self.credentials(place, pid).group.effective.into())),
            number @ (libc::SYS_getresuid | libc::SYS_getresgid) => {
                let credentials = self.credentials(place, pid);
                let ids = if number == libc::SYS_getresuid { credentials.user } else { credentials.group };
                for (at, id) in [(args[0], ids.real), (args[1], ids.effective), (args[2], ids.saved)] {
                    memory::write_ids(pid, at, &[id])?;
                }
                Ok(Answer::Value(0))
            }
            number => self.change_ids(place, pid, number, args),
        }
    }

    fn change_ids(&mut self, place: &mut Place, pid: i32, number: c_long, args: [u64; 6]) -> Answered {
        let mut now = self.known(place, pid);
        let value = now.credentials.change(number, args, |at, count| memory::read_ids(pid, at, count))?;
        if !self.mixed && now.credentials.is_root() {
            return Ok(Answer::Value(value));
        }
        if !self.mixed {
            self.mixed = true;
            // Filled in now that it matters.
            let group = place.process(pid);
            if let Some(process) = group {
                now.started = process.started;
                now.program = place.program(process.pid).map_or((0, 0), |program| program.0);
            }
        }
        if let Some(process) = place.process(pid) {
            self.processes.insert(process.pid, now);
        }
        Ok(Answer::Value(value))
    }

    fn initial(&self) -> Known {
        Known { credentials: self.user.clone(), program: (0, 0), started: 0 }
    }

    fn credentials(&mut self, place: &Place, thread: i32) -> Credentials {
        self.known(place, thread).credentials
    }

    fn known(&mut self, place: &Place, thread: i32) -> Known {
        if !self.mixed {
            return self.initial();
        }
        self.inherited(place, thread, PARENTS_MAX)
    }

    fn inherited(&mut self, place: &Place, thread: i32, depth: usize) -> Known {
        let Some(process) = place.process(thread) else { return self.initial() };
        let known = self.processes.get(&process.pid).filter(|known| known.started == process.started).cloned();
        let mut now = match known {
            Some(known) => known,
            None if depth == 0 || process.pid == self.init || process.parent == 0 => self.initial(),
            None => self.inherited(place, process.parent, depth - 1),
        };
        now.started = process.started;
        if let Some((program, mode, seen)) = place.program(process.pid)
            && program != now.program
        {
            now.credentials.become_owner(mode, self.owners.get(&seen));
            now.program = program;
        }
        self.processes.insert(process.pid, now.clone());
        now
    }

    fn change_owner(&mut self, place: &mut Place, call: &libc::seccomp_notif, target: &Target, uid: u32, gid: u32) -> Answered {
        let pid = call.pid as i32;
        let file = place.open(pid, target)?;
        self.still_there(call)?;
        let seen = owners::look(file.as_fd(), syscall::EMPTY).map_err(|error| errno(&error))?;
        let old = self.owners.get(&seen);
        let credentials = self.credentials(place, pid);
        if !credentials.may_give(old, uid, gid) {
            return Err(libc::EPERM);
        }
        let flags = libc::AT_EMPTY_PATH;
        // SAFETY: valid C string.
        match check(unsafe { libc::fchownat(file.as_raw_fd(), syscall::EMPTY.as_ptr(), 0, 0, flags) }.into()) {
            Ok(_) => {}
            // Nodes of the machine that are bound into /dev, files of /proc: nothing that lands in a layer.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EPERM | libc::EINVAL)) => return Ok(Answer::Value(0)),
            Err(error) => return Err(errno(&error)),
        }
        let seen = owners::look(file.as_fd(), syscall::EMPTY).map_err(|error| errno(&error))?;
        let new = (if uid == UNCHANGED { old.0 } else { uid }, if gid == UNCHANGED { old.1 } else { gid });
        self.owners.set(&seen, new.0, new.1, None);
        Ok(Answer::Value(0))
    }

    /// The `stat` family. Only a file whose owner is not what the disk says costs more than a look; the kernel answers the rest,
    /// and everything that fails here, with its own error.
    fn show(&mut self, place: &mut Place, call: &libc::seccomp_notif, question: &Question) -> Answered {
        if self.owners.is_plain() {
            return Ok(Answer::Kernel);
        }
        let Some(told) = question.answer(place, call.pid as i32, &self.owners) else { return Ok(Answer::Kernel) };
        self.still_there(call)?;
        memory::write(call.pid as i32, question.buffer, told.as_bytes())?;
        Ok(Answer::Value(0))
    }

    fn make_node(&mut self, place: &mut Place, call: &libc::seccomp_notif, dir: i32, path: u64, mode: u32, device: u64) -> Answered {
        let kind = mode & libc::S_IFMT;
        if kind != libc::S_IFCHR && kind != libc::S_IFBLK {
            return self.make_file(place, call, dir, path, mode);
        }
        let pid = call.pid as i32;
        let credentials = self.credentials(place, pid);
        if credentials.user.effective != 0 {
            return Err(libc::EPERM);
        }
        let mode = mode & !place.umask(pid);
        let name = memory::read_path(pid, path)?;
        self.still_there(call)?;
        let file = place.within(pid, dir, &name, |base, name| {
            syscall::openat(base, name, libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW | libc::O_WRONLY, mode & 0o7777)
        })?;
        // SAFETY: no pointers. The umask of the engine must not show.
        unsafe { libc::fchmod(file.as_raw_fd(), mode & 0o7777) };
        let seen = owners::look(file.as_fd(), syscall::EMPTY).map_err(|error| errno(&error))?;
        // The call passes the old 32 bit encoding, which is that of `dev_t` for these widths.
        self.owners.set(
            &seen,
            credentials.user.effective,
            credentials.group.effective,
            Some((mode, libc::major(device), libc::minor(device))),
        );
        Ok(Answer::Value(0))
    }

    /// `mknod` of a pipe, a socket or a regular file, which the one id can do.
    fn make_file(&mut self, place: &mut Place, call: &libc::seccomp_notif, dir: i32, path: u64, mode: u32) -> Answered {
        let Some(owner) = self.maker(place, call) else { return Ok(Answer::Kernel) };
        let pid = call.pid as i32;
        let mode = mode & !place.umask(pid);
        let name = memory::read_path(pid, path)?;
        self.still_there(call)?;
        let made = place.within(pid, dir, &name, |base, name| {
            // SAFETY: valid C string.
            check(unsafe { libc::mknodat(base.as_raw_fd(), name.as_ptr(), mode, 0) }.into())?;
            syscall::openat(base, name, libc::O_PATH | libc::O_NOFOLLOW, 0)
        })?;
        self.made(&made, owner).map(|()| Answer::Value(0))
    }

    /// Who owns what the caller makes, when that must be noted.
    fn maker(&mut self, place: &Place, call: &libc::seccomp_notif) -> Option<(u32, u32)> {
        let credentials = self.credentials(place, call.pid as i32);
        Some((credentials.user.effective, credentials.group.effective)).filter(|owner| *owner != (0, 0) || self.owners.wants_all())
    }

    fn create(&mut self, place: &mut Place, call: &libc::seccomp_notif, dir: i32, path: u64, flags: c_int, mode: u32) -> Answered {
        let Some(owner) = self.maker(place, call) else { return Ok(Answer::Kernel) };
        let pid = call.pid as i32;
        let mode = mode & 0o7777 & !place.umask(pid);
        let name = memory::read_path(pid, path)?;
        self.still_there(call)?;
        let unnamed = flags & libc::O_TMPFILE == libc::O_TMPFILE;
        let exclusive = if unnamed { 0 } else { libc::O_EXCL };
        match place.within(pid, dir, &name, |base, name| syscall::openat(base, name, flags | exclusive, mode)) {
            Ok(file) => {
                self.made(&file, owner)?;
                Ok(Answer::File(file, flags))
            }
            // It exists: nothing is made.
            Err(libc::EEXIST) if flags & libc::O_EXCL == 0 => Ok(Answer::Kernel),
            Err(error) => Err(error),
        }
    }

    fn make_folder(&mut self, place: &mut Place, call: &libc::seccomp_notif, dir: i32, path: u64, mode: u32) -> Answered {
        let Some(owner) = self.maker(place, call) else { return Ok(Answer::Kernel) };
        let pid = call.pid as i32;
        let mode = mode & 0o7777 & !place.umask(pid);
        let name = memory::read_path(pid, path)?;
        self.still_there(call)?;
        let made = place.within(pid, dir, &name, |base, name| {
            // SAFETY: valid C string.
            check(unsafe { libc::mkdirat(base.as_raw_fd(), name.as_ptr(), mode) }.into())?;
            syscall::openat(base, name, libc::O_PATH | libc::O_NOFOLLOW, 0)
        })?;
        self.made(&made, owner).map(|()| Answer::Value(0))
    }

    fn make_link(&mut self, place: &mut Place, call: &libc::seccomp_notif, to: u64, dir: i32, path: u64) -> Answered {
        let Some(owner) = self.maker(place, call) else { return Ok(Answer::Kernel) };
        let pid = call.pid as i32;
        let (to, name) = (memory::read_path(pid, to)?, memory::read_path(pid, path)?);
        self.still_there(call)?;
        let made = place.within(pid, dir, &name, |base, name| {
            // SAFETY: valid C strings.
            check(unsafe { libc::symlinkat(to.as_ptr(), base.as_raw_fd(), name.as_ptr()) }.into())?;
            syscall::openat(base, name, libc::O_PATH | libc::O_NOFOLLOW, 0)
        })?;
        self.made(&made, owner).map(|()| Answer::Value(0))
    }

    fn made(&mut self, file: &OwnedFd, (uid, gid): (u32, u32)) -> Result<(), c_int> {
        let seen = owners::look(file.as_fd(), syscall::EMPTY).map_err(|error| errno(&error))?;
        self.owners.set(&seen, uid, gid, None);
        Ok(())
    }

    /// The process that asked has not been replaced by another with its number.
    fn still_there(&self, call: &libc::seccomp_notif) -> Result<(), c_int> {
        // SAFETY: the id lives through the call.
        let valid = unsafe { libc::ioctl(self.listener.as_raw_fd(), IOCTL_ID_VALID as _, &raw const call.id) } == 0;
        if valid { Ok(()) } else { Err(libc::EINTR) }
    }
}
