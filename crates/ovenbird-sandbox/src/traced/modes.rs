//! Files that their owner may not read: root may, and the one user that there is must.

use libc::c_int;

use super::memory::c_path;
use crate::owners::{self, Owners, Seen};
use crate::syscall::check;

/// What the owner must have of a folder and of a file.
const FOLDER: u32 = 0o700;
const FILE: u32 = 0o600;

/// `statx` of a path of the machine.
pub(super) fn look(host: &[u8], follow: bool, mask: u32) -> Result<libc::statx, c_int> {
    let path = c_path(host)?;
    let flags = if follow { 0 } else { libc::AT_SYMLINK_NOFOLLOW };
    // SAFETY: an all-zero statx is valid; the kernel fills it.
    unsafe {
        let mut out: libc::statx = std::mem::zeroed();
        check(libc::syscall(libc::SYS_statx, libc::AT_FDCWD, path.as_ptr(), flags, mask, &raw mut out))
            .map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))?;
        Ok(out)
    }
}

/// Gives the owner of everything on the way to `host` (below its first `own` bytes) what he lacks, and records what was meant.
/// True: something was changed.
pub(super) fn open_up(owners: &mut Owners, host: &[u8], own: usize) -> bool {
    let mut changed = false;
    let ends = (own..=host.len()).filter(|end| *end == own || *end == host.len() || host[*end] == b'/');
    for end in ends {
        if end > 0 && host[end - 1] == b'/' {
            continue;
        }
        let Ok(looked) = look(&host[..end], false, owners::MASK) else { break };
        changed |= open_one(owners, &host[..end], &looked);
    }
    changed
}

/// The same for one file or folder.
pub(super) fn open_one(owners: &mut Owners, host: &[u8], looked: &libc::statx) -> bool {
    let mode = u32::from(looked.stx_mode);
    let wanted = match mode & libc::S_IFMT {
        libc::S_IFDIR => FOLDER,
        libc::S_IFREG => FILE,
        _ => return false,
    };
    if mode & wanted == wanted {
        return false;
    }
    let Ok(path) = c_path(host) else { return false };
    // SAFETY: valid C string.
    if unsafe { libc::chmod(path.as_ptr(), mode & 0o7777 | wanted) } < 0 {
        return false;
    }
    let seen = Seen::from(looked);
    let (uid, gid, node) = owners.known(&seen).unwrap_or_default();
    owners.put(&seen, uid, gid, node.or(Some((mode, 0, 0))));
    true
}

/// The mode was set: what was meant before does not count any more.
pub(super) fn set(owners: &mut Owners, host: &[u8], follow: bool) {
    let Ok(looked) = look(host, follow, owners::MASK) else { return };
    let seen = Seen::from(&looked);
    if let Some((uid, gid, Some((mode, ..)))) = owners.known(&seen)
        && !owners::is_device(mode)
    {
        owners.put(&seen, uid, gid, None);
    }
}
