//! The `stat` family at the levels that record owners, told with the intended owner.
//!
//! At the single-id level the recorder looks at the file itself; when nothing else than what the disk says is known of it, the kernel goes on with the
//! call. Otherwise the recorder writes the struct. A caller that changes its path or its file in between deceives only itself.

use libc::{c_int, c_long};

use crate::owners::{self, Owner, Owners, Seen};
use crate::place::{Place, Target};

/// Hints that change no answer on a local file system.
const HINTS: c_int = libc::AT_NO_AUTOMOUNT | libc::AT_STATX_FORCE_SYNC | libc::AT_STATX_DONT_SYNC;
const FLAGS: c_int = libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW | HINTS;
/// `STATX__RESERVED`.
const RESERVED: u32 = 1 << 31;

/// What a caller asks for.
pub(crate) struct Question {
    pub(crate) target: Target,
    form: Form,
    pub(crate) flags: c_int,
    /// Address in the caller.
    pub(crate) buffer: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Form {
    Stat,
    /// With the mask of `statx`.
    Statx(u32),
}

/// The struct that the caller gets.
pub(crate) enum Told {
    Stat(libc::stat),
    Statx(libc::statx),
}

impl Question {
    /// `None`: the call is not of the family.
    pub(crate) fn new(number: c_long, args: [u64; 6]) -> Option<Question> {
        let at = |flags: u64| Target::Path {
            dir: args[0] as i32,
            path: args[1],
            follow: flags as c_int & libc::AT_SYMLINK_NOFOLLOW == 0,
            empty: flags as c_int & libc::AT_EMPTY_PATH != 0,
        };
        let (target, flags, form, buffer) = match number {
            libc::SYS_fstat => (Target::Descriptor(args[0] as i32), 0, Form::Stat, args[1]),
            libc::SYS_newfstatat => (at(args[3]), args[3], Form::Stat, args[2]),
            libc::SYS_statx => (at(args[2]), args[2], Form::Statx(args[3] as u32), args[4]),
            #[cfg(target_arch = "x86_64")]
            libc::SYS_stat | libc::SYS_lstat => {
                let follow = number == libc::SYS_stat;
                (Target::Path { dir: libc::AT_FDCWD, path: args[0], follow, empty: false }, 0, Form::Stat, args[1])
            }
            _ => return None,
        };
        Some(Question { target, form, buffer, flags: flags as c_int })
    }

    /// The kernel refuses the call for its flags alone.
    pub(crate) fn is_invalid(&self) -> bool {
        let both = libc::AT_STATX_FORCE_SYNC | libc::AT_STATX_DONT_SYNC;
        self.flags & !FLAGS != 0 || matches!(self.form, Form::Statx(mask) if mask & RESERVED != 0 || self.flags & both == both)
    }

    /// What must be asked of the file.
    pub(crate) fn mask(&self) -> u32 {
        owners::MASK | if let Form::Statx(mask) = self.form { mask } else { 0 }
    }

    /// `None`: the kernel's own answer is right.
    pub(crate) fn answer(&self, place: &mut Place, pid: i32, owners: &Owners) -> Option<Told> {
        if self.is_invalid() {
            return None;
        }
        let found = place.find(pid, &self.target)?;
        let look = found.look(self.mask()).ok()?;
        let owner = owners.known(&Seen::from(&look)).filter(|known| *known != (0, 0, None))?;
        Some(self.tell(look, owner))
    }

    /// The answer for a file that is meant to be `owner`'s.
    pub(crate) fn tell(&self, mut look: libc::statx, (uid, gid, node): Owner) -> Told {
        (look.stx_uid, look.stx_gid) = (uid, gid);
        if let Some((mode, major, minor)) = node {
            if owners::is_device(mode) {
                look.stx_mode = (mode & libc::S_IFMT) as u16 | look.stx_mode & !(libc::S_IFMT as u16);
                (look.stx_rdev_major, look.stx_rdev_minor) = (major, minor);
            } else {
                look.stx_mode = look.stx_mode & libc::S_IFMT as u16 | (mode & !libc::S_IFMT) as u16;
            }
        }
        if self.form == Form::Stat { Told::Stat(plain(&look)) } else { Told::Statx(look) }
    }
}

/// The kernel's `struct stat` of the same file; on both architectures that of `libc` is the same.
#[allow(clippy::cast_possible_wrap, clippy::useless_conversion, reason = "the widths of the fields differ between machines")]
fn plain(look: &libc::statx) -> libc::stat {
    // SAFETY: an all-zero stat is a valid value.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    stat.st_dev = libc::makedev(look.stx_dev_major, look.stx_dev_minor);
    stat.st_ino = look.stx_ino;
    stat.st_mode = u32::from(look.stx_mode);
    stat.st_nlink = look.stx_nlink.into();
    (stat.st_uid, stat.st_gid) = (look.stx_uid, look.stx_gid);
    stat.st_rdev = libc::makedev(look.stx_rdev_major, look.stx_rdev_minor);
    stat.st_size = look.stx_size as _;
    stat.st_blksize = look.stx_blksize as _;
    stat.st_blocks = look.stx_blocks as _;
    (stat.st_atime, stat.st_atime_nsec) = (look.stx_atime.tv_sec, look.stx_atime.tv_nsec.into());
    (stat.st_mtime, stat.st_mtime_nsec) = (look.stx_mtime.tv_sec, look.stx_mtime.tv_nsec.into());
    (stat.st_ctime, stat.st_ctime_nsec) = (look.stx_ctime.tv_sec, look.stx_ctime.tv_nsec.into());
    stat
}

impl Told {
    pub(crate) fn as_bytes(&self) -> &[u8] {
        let (start, size): (*const u8, usize) = match self {
            Told::Stat(stat) => (std::ptr::from_ref(stat).cast(), size_of_val(stat)),
            Told::Statx(stat) => (std::ptr::from_ref(stat).cast(), size_of_val(stat)),
        };
        // SAFETY: a live struct without implicit padding: what the kernel reserves has names.
        unsafe { std::slice::from_raw_parts(start, size) }
    }
}
