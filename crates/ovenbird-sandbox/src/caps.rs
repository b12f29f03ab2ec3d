//! Linux capabilities of a step.

use std::io;

use crate::syscall::check;

/// Docker's fourteen default capabilities, as bits of `include/uapi/linux/capability.h`.
pub(crate) const DOCKER: u64 = bit(0) // CHOWN
    | bit(1) // DAC_OVERRIDE
    | bit(3) // FOWNER
    | bit(4) // FSETID
    | bit(5) // KILL
    | bit(6) // SETGID
    | bit(7) // SETUID
    | bit(8) // SETPCAP
    | bit(10) // NET_BIND_SERVICE
    | bit(13) // NET_RAW
    | bit(18) // SYS_CHROOT
    | bit(27) // MKNOD
    | bit(29) // AUDIT_WRITE
    | bit(31); // SETFCAP

/// `CAP_SYS_ADMIN`.
pub(crate) const SYS_ADMIN: u32 = 21;
/// `CAP_SETGID`.
pub(crate) const SETGID: u32 = 6;
/// `CAP_SETUID`.
pub(crate) const SETUID: u32 = 7;
/// `CAP_SYS_RESOURCE`.
pub(crate) const SYS_RESOURCE: u32 = 24;
/// `CAP_SYS_CHROOT`.
pub(crate) const SYS_CHROOT: u32 = 18;

/// The kernel answers `EINVAL` from its own last one on.
const HIGHEST: u32 = 63;
const VERSION_3: u32 = 0x2008_0522;

const fn bit(cap: u32) -> u64 {
    1 << cap
}

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// The permitted capabilities of this thread.
pub(crate) fn permitted() -> io::Result<u64> {
    let mut header = Header { version: VERSION_3, pid: 0 };
    let mut data = [Data::default(); 2];
    // SAFETY: version 3 fills exactly two structs.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) })?;
    Ok(u64::from(data[0].permitted) | u64::from(data[1].permitted) << 32)
}

/// Whether this thread may use the capability.
pub(crate) fn has(cap: u32) -> bool {
    permitted().is_ok_and(|all| all & bit(cap) != 0)
}

/// Takes everything outside `keep` out of the bounding set and empties the ambient set (async-signal-safe).
pub(crate) fn bound(keep: u64) -> io::Result<()> {
    for cap in (0..=HIGHEST).filter(|cap| keep & bit(*cap) == 0) {
        // SAFETY: no pointers.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(cap), 0, 0, 0) } < 0 {
            let error = io::Error::last_os_error();
            if error.raw_os_error() == Some(libc::EINVAL) {
                break;
            }
            return Err(error);
        }
    }
    // SAFETY: no pointers. Kernels before 4.3 have no ambient set.
    unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as libc::c_ulong, 0, 0, 0) };
    Ok(())
}

/// Sets effective and permitted, clears inheritable as Docker does since 20.10.14 (async-signal-safe).
pub(crate) fn set(caps: u64) -> io::Result<()> {
    let mut header = Header { version: VERSION_3, pid: 0 };
    let low = Data { effective: caps as u32, permitted: caps as u32, inheritable: 0 };
    let high = Data { effective: (caps >> 32) as u32, permitted: (caps >> 32) as u32, inheritable: 0 };
    let data = [low, high];
    // SAFETY: version 3 reads exactly two structs.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) }).map(drop)
}
