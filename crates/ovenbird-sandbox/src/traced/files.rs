//! The calls that name files.

use std::ffi::CString;
use std::io;

use libc::{AT_FDCWD, AT_SYMLINK_NOFOLLOW, c_int, c_long};

use super::calls::FCHMODAT2;
use super::memory::c_path;
use super::modes::{self, look};
use super::paths::{Found, link_of};
use super::process::{After, Answered, Instead, Verdict, terminated};
use super::tracer::Tracer;
use crate::owners::{self, Owner, Seen};
use crate::place::Target;
use crate::stat::Question;

/// What the layer makes of it (`ovenbird_oci::layer`): only root of the machine may set the real one.
const CAPABILITY: &[u8] = b"security.capability";
const STASHED_CAPABILITY: &[u8] = b"user.ovenbird.capability";
/// `AT_EMPTY_PATH`.
const EMPTY: c_int = libc::AT_EMPTY_PATH;
/// Times that are words, not seconds (`UTIME_NOW`, `UTIME_OMIT`).
const NANOS_PER_MICRO: i64 = 1000;

impl Tracer {
    pub(super) fn file(&mut self, thread: i32, number: c_long, args: [u64; 6]) -> Answered {
        let dir = args[0] as c_int;
        let nofollow = |flags: u64| flags as c_int & AT_SYMLINK_NOFOLLOW != 0;
        match number {
            libc::SYS_fstat | libc::SYS_newfstatat | libc::SYS_statx => self.tell(thread, number, args),
            libc::SYS_openat => self.open(thread, dir, args[1], args[2] as c_int, 1),
            libc::SYS_faccessat => self.access(thread, dir, args[1], args[2] as c_int, 0),
            libc::SYS_faccessat2 => self.access(thread, dir, args[1], args[2] as c_int, args[3] as c_int),
            libc::SYS_readlinkat => self.read_link(thread, dir, args[1], args[2], args[3]),
            libc::SYS_getcwd => self.folder(thread, args[0], args[1]),
            libc::SYS_chdir => self.natively(thread, AT_FDCWD, args[0], true, 0),
            libc::SYS_truncate => self.changing(thread, AT_FDCWD, args[0], true, 0),
            libc::SYS_chroot => self.change_root(thread, args[0]),
            libc::SYS_mkdirat => self.make(thread, dir, args[1], 1),
            libc::SYS_mknodat => self.make_node(thread, dir, args[1], args[2] as u32, args[3], 1),
            libc::SYS_unlinkat => self.unlink(thread, dir, args[1], args[2] as c_int),
            libc::SYS_renameat2 => self.rename(thread, [dir, args[2] as c_int], [args[1], args[3]], args[4] as u32),
            libc::SYS_linkat => self.link(thread, [dir, args[2] as c_int], [args[1], args[3]], args[4] as c_int),
            libc::SYS_symlinkat => self.symlink(thread, args[0], args[1] as c_int, args[2]),
            libc::SYS_fchmod => {
                let found = self.descriptor(thread, dir)?;
                self.change_mode(thread, &found, args[1] as u32, true)
            }
            libc::SYS_fchmodat => {
                let found = self.find_at(thread, dir, args[1], true)?;
                self.change_mode(thread, &found, args[2] as u32, true)
            }
            FCHMODAT2 => {
                let found = self.target(thread, dir, args[1], !nofollow(args[3]), args[3] as c_int & EMPTY != 0)?;
                self.change_mode(thread, &found, args[2] as u32, !nofollow(args[3]))
            }
            libc::SYS_fchown => {
                let found = self.descriptor(thread, dir)?;
                self.change_owner(thread, &found, args[1] as u32, args[2] as u32, true)
            }
            libc::SYS_fchownat => {
                let found = self.target(thread, dir, args[1], !nofollow(args[4]), args[4] as c_int & EMPTY != 0)?;
                self.change_owner(thread, &found, args[2] as u32, args[3] as u32, !nofollow(args[4]))
            }
            libc::SYS_utimensat => {
                // Without a path it is about the descriptor, which is right as it is.
                if args[1] == 0 {
                    return Ok(Verdict::Kernel);
                }
                let found = self.target(thread, dir, args[1], !nofollow(args[3]), args[3] as c_int & EMPTY != 0)?;
                let times = self.words_at(thread, args[2], 4)?;
                self.change_times(thread, &found, times, !nofollow(args[3]))
            }
            libc::SYS_statfs => self.statfs(thread, args[0], args[1]),
            libc::SYS_setxattr | libc::SYS_removexattr => self.attribute(thread, args, true, true),
            libc::SYS_lsetxattr | libc::SYS_lremovexattr => self.attribute(thread, args, false, true),
            libc::SYS_getxattr => self.attribute(thread, args, true, false),
            libc::SYS_lgetxattr => self.attribute(thread, args, false, false),
            libc::SYS_fsetxattr | libc::SYS_fgetxattr | libc::SYS_fremovexattr => self.own_attribute(thread, args[1]),
            libc::SYS_listxattr => self.natively(thread, AT_FDCWD, args[0], true, 0),
            libc::SYS_llistxattr => self.natively(thread, AT_FDCWD, args[0], false, 0),
            // IN_DONT_FOLLOW
            libc::SYS_inotify_add_watch => self.natively(thread, AT_FDCWD, args[1], args[2] & 0x0200_0000 == 0, 1),
            libc::SYS_name_to_handle_at if args[4] as c_int & EMPTY != 0 => Ok(Verdict::Kernel),
            libc::SYS_name_to_handle_at => self.natively(thread, dir, args[1], args[4] as c_int & libc::AT_SYMLINK_FOLLOW != 0, 1),
            #[cfg(target_arch = "x86_64")]
            number => self.old_file(thread, number, args),
            #[cfg(not(target_arch = "x86_64"))]
            _ => Ok(Verdict::Kernel),
        }
    }

    /// The calls that only the older machine has.
    #[cfg(target_arch = "x86_64")]
    fn old_file(&mut self, thread: i32, number: c_long, args: [u64; 6]) -> Answered {
        match number {
            libc::SYS_stat | libc::SYS_lstat => self.tell(thread, number, args),
            libc::SYS_open => self.open(thread, AT_FDCWD, args[0], args[1] as c_int, 0),
            libc::SYS_creat => self.open(thread, AT_FDCWD, args[0], libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC, 0),
            libc::SYS_access => self.access(thread, AT_FDCWD, args[0], args[1] as c_int, 0),
            libc::SYS_readlink => self.read_link(thread, AT_FDCWD, args[0], args[1], args[2]),
            libc::SYS_mkdir => self.make(thread, AT_FDCWD, args[0], 0),
            libc::SYS_mknod => self.make_node(thread, AT_FDCWD, args[0], args[1] as u32, args[2], 0),
            libc::SYS_unlink => self.unlink(thread, AT_FDCWD, args[0], 0),
            libc::SYS_rmdir => self.unlink(thread, AT_FDCWD, args[0], libc::AT_REMOVEDIR),
            libc::SYS_rename => self.rename(thread, [AT_FDCWD; 2], [args[0], args[1]], 0),
            libc::SYS_renameat => self.rename(thread, [args[0] as c_int, args[2] as c_int], [args[1], args[3]], 0),
            libc::SYS_link => self.link(thread, [AT_FDCWD; 2], [args[0], args[1]], 0),
            libc::SYS_symlink => self.symlink(thread, args[0], AT_FDCWD, args[1]),
            libc::SYS_chmod => {
                let found = self.find_at(thread, AT_FDCWD, args[0], true)?;
                self.change_mode(thread, &found, args[1] as u32, true)
            }
            libc::SYS_chown | libc::SYS_lchown => {
                let follow = number == libc::SYS_chown;
                let found = self.find_at(thread, AT_FDCWD, args[0], follow)?;
                self.change_owner(thread, &found, args[1] as u32, args[2] as u32, follow)
            }
            libc::SYS_utime => {
                let found = self.find_at(thread, AT_FDCWD, args[0], true)?;
                let times = self.words_at(thread, args[1], 2)?.map(|times| vec![times[0], 0, times[1], 0]);
                self.change_times(thread, &found, times, true)
            }
            libc::SYS_utimes => self.change_times_micros(thread, AT_FDCWD, args[0], args[1]),
            libc::SYS_futimesat if args[1] == 0 => Ok(Verdict::Kernel),
            libc::SYS_futimesat => self.change_times_micros(thread, args[0] as c_int, args[1], args[2]),
            _ => Ok(Verdict::Kernel),
        }
    }

    fn descriptor(&mut self, thread: i32, descriptor: c_int) -> Result<Found, c_int> {
        self.with_paths(thread, |paths, caller| paths.of_descriptor(caller, descriptor))
    }

    /// A path, or (empty, where that is allowed) the descriptor itself.
    fn target(&mut self, thread: i32, dir: c_int, at: u64, follow: bool, empty: bool) -> Result<Found, c_int> {
        let path = if at == 0 && empty { Vec::new() } else { self.memory(thread)?.read_string(at)? };
        if path.is_empty() && empty { self.descriptor(thread, dir) } else { self.find(thread, dir, &path, follow) }
    }

    /// Does it here, again as long as something stands in the way that would not stop root.
    fn act(&mut self, thread: i32, hosts: &[&[u8]], act: impl Fn() -> c_long) -> Result<i64, c_int> {
        loop {
            let result = act();
            if result >= 0 {
                return Ok(result);
            }
            let error = io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
            let hosts: Vec<Vec<u8>> = hosts.iter().map(|host| host.to_vec()).collect();
            if error != libc::EACCES || !self.open_up(thread, &hosts) {
                return Err(error);
            }
        }
    }

    /// The caller does it, with the machine's path.
    fn natively(&mut self, thread: i32, dir: c_int, at: u64, follow: bool, argument: usize) -> Answered {
        let found = self.find_at(thread, dir, at, follow)?;
        if is_open(&found, 0o700) {
            return Ok(Verdict::Kernel);
        }
        Ok(Instead::path(argument, found.host).then(After::Nothing))
    }

    fn changing(&mut self, thread: i32, dir: c_int, at: u64, follow: bool, argument: usize) -> Answered {
        let found = writable(self.find_at(thread, dir, at, follow)?)?;
        Ok(Instead::path(argument, found.host).then(After::Nothing))
    }

    /// Who owns what the thread makes at a path of the machine.
    pub(super) fn maker(&mut self, thread: i32, host: &[u8]) -> Result<(u32, u32), c_int> {
        let (uid, gid) = self.process(thread)?.credentials.maker();
        let name = host.iter().rposition(|byte| *byte != b'/').unwrap_or(0);
        let folder = &host[..host[..name].iter().rposition(|byte| *byte == b'/').unwrap_or(0)];
        Ok(match look(folder, true, owners::MASK) {
            Ok(looked) if u32::from(looked.stx_mode) & libc::S_ISGID != 0 => (uid, self.owners.get(&Seen::from(&looked)).1),
            _ => (uid, gid),
        })
    }

    /// Records who owns a file that was made.
    pub(super) fn note(&mut self, host: &[u8], follow: bool, (uid, gid): (u32, u32)) {
        if (uid, gid) != (0, 0)
            && let Ok(looked) = look(host, follow, owners::MASK)
        {
            self.owners.put(&Seen::from(&looked), uid, gid, None);
        }
    }

    fn open(&mut self, thread: i32, dir: c_int, at: u64, flags: c_int, argument: usize) -> Answered {
        let new = flags & libc::O_CREAT != 0;
        let follow = flags & libc::O_NOFOLLOW == 0 && !(new && flags & libc::O_EXCL != 0);
        let found = self.find_at(thread, dir, at, follow)?;
        let unnamed = flags & libc::O_TMPFILE == libc::O_TMPFILE;
        let missing = || look(&found.host, false, libc::STATX_TYPE).is_err();
        let writes = flags & libc::O_ACCMODE != libc::O_RDONLY || flags & libc::O_TRUNC != 0;
        if found.read_only && (writes || (new && missing())) {
            return Err(libc::EROFS);
        }
        let after = if unnamed {
            let mut inside = found.host.clone();
            inside.extend_from_slice(b"/x");
            After::Opened(self.maker(thread, &inside)?)
        } else if new && missing() {
            After::Made(found.host.clone(), self.maker(thread, &found.host)?)
        } else {
            if is_open(&found, 0o600) {
                return Ok(Verdict::Kernel);
            }
            After::Nothing
        };
        Ok(Instead::path(argument, found.host).then(after))
    }

    fn access(&mut self, thread: i32, dir: c_int, at: u64, mode: c_int, flags: c_int) -> Answered {
        let follow = flags & AT_SYMLINK_NOFOLLOW == 0;
        let found = self.target(thread, dir, at, follow, flags & EMPTY != 0)?;
        let path = c_path(&found.host)?;
        if !follow {
            return look(&found.host, false, libc::STATX_TYPE).map(|_| Verdict::Answer(0));
        }
        // SAFETY: valid C string.
        let result = self.act(thread, &[&found.host], || unsafe { libc::syscall(libc::SYS_faccessat, AT_FDCWD, path.as_ptr(), mode) })?;
        if found.read_only && mode & libc::W_OK != 0 { Err(libc::EROFS) } else { Ok(Verdict::Answer(result)) }
    }

    fn read_link(&mut self, thread: i32, dir: c_int, at: u64, buffer: u64, room: u64) -> Answered {
        if room as c_int <= 0 {
            return Err(libc::EINVAL);
        }
        let found = self.target(thread, dir, at, false, true)?;
        let mut target = self.with_paths(thread, |paths, caller| paths.target(caller, &found))?;
        target.truncate(room as usize);
        self.memory(thread)?.write(buffer, &target)?;
        Ok(Verdict::Answer(target.len() as i64))
    }

    fn folder(&mut self, thread: i32, buffer: u64, room: u64) -> Answered {
        let folder = self.with_paths(thread, |paths, caller| {
            let guest = paths.of_descriptor(caller, AT_FDCWD)?.guest.ok_or(libc::ENOENT)?;
            Ok(terminated(&paths.seen(caller, guest)))
        })?;
        if (room as usize) < folder.len() {
            return Err(libc::ERANGE);
        }
        self.memory(thread)?.write(buffer, &folder)?;
        Ok(Verdict::Answer(folder.len() as i64))
    }

    fn change_root(&mut self, thread: i32, at: u64) -> Answered {
        let found = self.find_at(thread, AT_FDCWD, at, true)?;
        let looked = look(&found.host, true, libc::STATX_TYPE)?;
        if u32::from(looked.stx_mode) & libc::S_IFMT != libc::S_IFDIR {
            return Err(libc::ENOTDIR);
        }
        let process = self.process(thread)?;
        if process.credentials.user.effective != 0 {
            return Err(libc::EPERM);
        }
        process.root = found.guest.ok_or(libc::EPERM)?;
        Ok(Verdict::Answer(0))
    }

    /// The `stat` family.
    fn tell(&mut self, thread: i32, number: c_long, args: [u64; 6]) -> Answered {
        let Some(question) = Question::new(number, args) else { return Ok(Verdict::Kernel) };
        if question.is_invalid() {
            return Err(libc::EINVAL);
        }
        let (host, follow) = match question.target {
            Target::Descriptor(descriptor) => (link_of(thread, descriptor), true),
            Target::Path { dir, path, follow, empty } => {
                let name = if path == 0 && empty { Vec::new() } else { self.memory(thread)?.read_string(path)? };
                if name.is_empty() && empty { (link_of(thread, dir), true) } else { (self.find(thread, dir, &name, follow)?.host, follow) }
            }
        };
        let looked = loop {
            match look(&host, follow, question.mask()) {
                Err(libc::EACCES) if self.open_up(thread, std::slice::from_ref(&host)) => {}
                Err(libc::ENOENT) if matches!(question.target, Target::Descriptor(_)) => return Err(libc::EBADF),
                other => break other?,
            }
        };
        let owner = self.owner(&looked);
        let told = question.tell(looked, owner);
        self.memory(thread)?.write(question.buffer, told.as_bytes())?;
        Ok(Verdict::Answer(0))
    }

    /// Who a file is meant to belong to. What the disk's one user has is root's.
    pub(super) fn owner(&self, looked: &libc::statx) -> Owner {
        self.owners.known(&Seen::from(looked)).unwrap_or_else(|| {
            let ours = looked.stx_uid == self.disk.0;
            let gid = if ours || looked.stx_gid == self.disk.1 { 0 } else { looked.stx_gid };
            (if ours { 0 } else { looked.stx_uid }, gid, None)
        })
    }

    fn make(&mut self, thread: i32, dir: c_int, at: u64, argument: usize) -> Answered {
        let found = self.find_at(thread, dir, at, false)?;
        if found.read_only {
            return Err(if look(&found.host, false, libc::STATX_TYPE).is_ok() { libc::EEXIST } else { libc::EROFS });
        }
        let owner = self.maker(thread, &found.host)?;
        let after = After::Made(found.host.clone(), owner);
        Ok(Instead::path(argument, found.host).then(after))
    }

    fn make_node(&mut self, thread: i32, dir: c_int, at: u64, mode: u32, device: u64, argument: usize) -> Answered {
        if !owners::is_device(mode) {
            return self.make(thread, dir, at, argument);
        }
        if !self.is_root(thread) {
            return Err(libc::EPERM);
        }
        let found = writable(self.find_at(thread, dir, at, false)?)?;
        let (uid, gid) = self.maker(thread, &found.host)?;
        let mode = mode & !self.mask_of(thread);
        let path = c_path(&found.host)?;
        let flags = libc::O_CREAT | libc::O_EXCL | libc::O_NOFOLLOW | libc::O_WRONLY | libc::O_CLOEXEC;
        let opened = self.act(thread, &[&found.host], || {
            // SAFETY: valid C string.
            c_long::from(unsafe { libc::open(path.as_ptr(), flags, 0o600) })
        })?;
        // SAFETY: ours; the mask of the engine must not show.
        unsafe {
            libc::fchmod(opened as c_int, mode & 0o7777);
            libc::close(opened as c_int);
        }
        let seen = Seen::from(&look(&found.host, false, owners::MASK)?);
        // The call passes the old 32 bit encoding, which is that of `dev_t` for these widths.
        self.owners.put(&seen, uid, gid, Some((mode, libc::major(device), libc::minor(device))));
        Ok(Verdict::Answer(0))
    }

    /// The file mode creation mask of a thread.
    fn mask_of(&self, thread: i32) -> u32 {
        let status = std::fs::read_to_string(format!("/proc/{thread}/status")).unwrap_or_default();
        status.lines().find_map(|line| u32::from_str_radix(line.strip_prefix("Umask:")?.trim(), 8).ok()).unwrap_or(0o022)
    }

    fn unlink(&mut self, thread: i32, dir: c_int, at: u64, flags: c_int) -> Answered {
        let found = movable(self.find_at(thread, dir, at, false)?)?;
        let path = c_path(&found.host)?;
        self.paths.forget(found.guest.as_deref());
        // SAFETY: valid C string.
        self.act(thread, &[&found.host], || c_long::from(unsafe { libc::unlinkat(AT_FDCWD, path.as_ptr(), flags) })).map(Verdict::Answer)
    }

    fn rename(&mut self, thread: i32, dirs: [c_int; 2], at: [u64; 2], flags: u32) -> Answered {
        let from = movable(self.find_at(thread, dirs[0], at[0], false)?)?;
        let to = movable(self.find_at(thread, dirs[1], at[1], false)?)?;
        if from.part != to.part {
            return Err(libc::EXDEV);
        }
        let (from_path, to_path) = (c_path(&from.host)?, c_path(&to.host)?);
        self.paths.forget(from.guest.as_deref());
        self.paths.forget(to.guest.as_deref());
        let result = self.act(thread, &[&from.host, &to.host], || {
            // SAFETY: valid C strings.
            unsafe { libc::syscall(libc::SYS_renameat2, AT_FDCWD, from_path.as_ptr(), AT_FDCWD, to_path.as_ptr(), flags) }
        })?;
        Ok(Verdict::Answer(result))
    }

    fn link(&mut self, thread: i32, dirs: [c_int; 2], at: [u64; 2], flags: c_int) -> Answered {
        let follow = flags & libc::AT_SYMLINK_FOLLOW != 0;
        let from = self.target(thread, dirs[0], at[0], follow, flags & EMPTY != 0)?;
        let to = writable(self.find_at(thread, dirs[1], at[1], false)?)?;
        // Not from one mount into another, least of all a secret into the layer.
        if from.guest.is_some() && from.part != to.part {
            return Err(libc::EXDEV);
        }
        let (from_path, to_path) = (c_path(&from.host)?, c_path(&to.host)?);
        // A descriptor's link in /proc stands for the file itself.
        let flags = if follow || flags & EMPTY != 0 { libc::AT_SYMLINK_FOLLOW } else { 0 };
        let result = self.act(thread, &[&from.host, &to.host], || {
            // SAFETY: valid C strings.
            c_long::from(unsafe { libc::linkat(AT_FDCWD, from_path.as_ptr(), AT_FDCWD, to_path.as_ptr(), flags) })
        })?;
        Ok(Verdict::Answer(result))
    }

    fn symlink(&mut self, thread: i32, target: u64, dir: c_int, at: u64) -> Answered {
        let target = c_path(&self.memory(thread)?.read_string(target)?)?;
        let found = writable(self.find_at(thread, dir, at, false)?)?;
        let path = c_path(&found.host)?;
        // SAFETY: valid C strings.
        let made = || c_long::from(unsafe { libc::symlinkat(target.as_ptr(), AT_FDCWD, path.as_ptr()) });
        let result = self.act(thread, &[&found.host], made)?;
        let owner = self.maker(thread, &found.host)?;
        self.note(&found.host, false, owner);
        Ok(Verdict::Answer(result))
    }

    fn change_mode(&mut self, thread: i32, found: &Found, mode: u32, follow: bool) -> Answered {
        if found.read_only {
            return Err(libc::EROFS);
        }
        let credentials = &self.process(thread)?.credentials;
        let maker = credentials.user.effective;
        if maker != 0 && self.owner(&look(&found.host, follow, owners::MASK)?).0 != maker {
            return Err(libc::EPERM);
        }
        let path = c_path(&found.host)?;
        if !follow && u32::from(look(&found.host, false, libc::STATX_TYPE)?.stx_mode) & libc::S_IFMT == libc::S_IFLNK {
            return Err(libc::EOPNOTSUPP);
        }
        // SAFETY: valid C string.
        let result = self.act(thread, &[&found.host], || c_long::from(unsafe { libc::chmod(path.as_ptr(), mode & 0o7777) }))?;
        modes::set(&mut self.owners, &found.host, follow);
        Ok(Verdict::Answer(result))
    }

    fn change_owner(&mut self, thread: i32, found: &Found, uid: u32, gid: u32, follow: bool) -> Answered {
        if found.read_only {
            return Err(libc::EROFS);
        }
        let follow = follow || found.host.starts_with(b"/proc/");
        let old = self.owner(&look(&found.host, follow, owners::MASK)?);
        if !self.process(thread)?.credentials.may_give((old.0, old.1), uid, gid) {
            return Err(libc::EPERM);
        }
        let path = c_path(&found.host)?;
        let flags = if follow { 0 } else { AT_SYMLINK_NOFOLLOW };
        let (own_uid, own_gid) = self.disk;
        // Nothing changes but what any change of owner clears: the bits that make a program run as its owner.
        // SAFETY: valid C string.
        let cleared = || c_long::from(unsafe { libc::fchownat(AT_FDCWD, path.as_ptr(), own_uid, own_gid, flags) });
        match self.act(thread, &[&found.host], cleared) {
            Ok(_) => {}
            // Nodes of the machine, files of /proc: nothing that lands in a layer.
            Err(libc::EPERM | libc::EINVAL) => return Ok(Verdict::Answer(0)),
            Err(error) => return Err(error),
        }
        let looked = look(&found.host, follow, owners::MASK)?;
        if u32::from(looked.stx_mode) & libc::S_IFMT == libc::S_IFREG {
            remove_capability(&path);
        }
        let pick = |new: u32, old: u32| if new == u32::MAX { old } else { new };
        self.owners.set(&Seen::from(&looked), pick(uid, old.0), pick(gid, old.1), None);
        Ok(Verdict::Answer(0))
    }

    fn words_at(&mut self, thread: i32, at: u64, count: usize) -> Result<Option<Vec<u64>>, c_int> {
        if at == 0 { Ok(None) } else { self.memory(thread)?.read_words(at, count).map(Some) }
    }

    #[cfg(target_arch = "x86_64")]
    fn change_times_micros(&mut self, thread: i32, dir: c_int, at: u64, times: u64) -> Answered {
        let found = self.find_at(thread, dir, at, true)?;
        let mut times = self.words_at(thread, times, 4)?;
        for micros in times.iter_mut().flatten().skip(1).step_by(2) {
            let value = *micros as i64;
            if !(0..1_000_000).contains(&value) {
                return Err(libc::EINVAL);
            }
            *micros = (value * NANOS_PER_MICRO) as u64;
        }
        self.change_times(thread, &found, times, true)
    }

    /// `times` as seconds, nanoseconds, twice; `None`: now.
    fn change_times(&mut self, thread: i32, found: &Found, times: Option<Vec<u64>>, follow: bool) -> Answered {
        if found.read_only {
            return Err(libc::EROFS);
        }
        let follow = follow || found.host.starts_with(b"/proc/");
        let path = c_path(&found.host)?;
        let flags = if follow { 0 } else { AT_SYMLINK_NOFOLLOW };
        let times = times.map(|times| {
            let one = |at: usize| libc::timespec { tv_sec: times[at] as _, tv_nsec: times[at + 1] as _ };
            [one(0), one(2)]
        });
        let pointer = times.as_ref().map_or(std::ptr::null(), |times| times.as_ptr());
        // SAFETY: valid C string, two timespecs or NULL.
        let set = || c_long::from(unsafe { libc::utimensat(AT_FDCWD, path.as_ptr(), pointer, flags) });
        self.act(thread, &[&found.host], set).map(Verdict::Answer)
    }

    fn statfs(&mut self, thread: i32, at: u64, buffer: u64) -> Answered {
        let found = self.find_at(thread, AT_FDCWD, at, true)?;
        let path = c_path(&found.host)?;
        let mut told = [0u64; 64];
        let into = told.as_mut_ptr();
        // SAFETY: valid C string; more room than the struct has.
        let result = self.act(thread, &[&found.host], || unsafe { libc::syscall(libc::SYS_statfs, path.as_ptr(), into) })?;
        let bytes: Vec<u8> = told.iter().flat_map(|word| word.to_ne_bytes()).take(size_of::<libc::statfs>()).collect();
        self.memory(thread)?.write(buffer, &bytes)?;
        Ok(Verdict::Answer(result))
    }

    fn attribute(&mut self, thread: i32, args: [u64; 6], follow: bool, writes: bool) -> Answered {
        let found = self.find_at(thread, AT_FDCWD, args[0], follow)?;
        let found = if writes { writable(found)? } else { found };
        let name = self.memory(thread)?.read_string(args[1])?;
        let mut instead = Instead::path(0, found.host);
        if name == CAPABILITY {
            instead.bytes.push((1, terminated(STASHED_CAPABILITY)));
        }
        Ok(instead.then(After::Nothing))
    }

    fn own_attribute(&mut self, thread: i32, name: u64) -> Answered {
        if self.memory(thread)?.read_string(name)? != CAPABILITY {
            return Ok(Verdict::Kernel);
        }
        Ok(Instead::bytes(1, terminated(STASHED_CAPABILITY)).then(After::Nothing))
    }
}

/// A change of owner ends them.
fn remove_capability(path: &CString) {
    let name = c"user.ovenbird.capability";
    // SAFETY: valid C strings. Nearly always there is none.
    unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) };
}

/// The kernel may be left alone with it: it finds the same file, which gives its owner what root has.
fn is_open(found: &Found, wanted: u32) -> bool {
    found.native && look(&found.host, false, libc::STATX_MODE).is_ok_and(|looked| u32::from(looked.stx_mode) & wanted == wanted)
}

fn writable(found: Found) -> Result<Found, c_int> {
    if found.read_only { Err(libc::EROFS) } else { Ok(found) }
}

/// What may be removed and renamed: no mount.
fn movable(found: Found) -> Result<Found, c_int> {
    if found.mounted { Err(libc::EBUSY) } else { writable(found) }
}
