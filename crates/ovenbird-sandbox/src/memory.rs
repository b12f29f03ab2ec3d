//! Memory of the processes of a step, for the owner recorder: `process_vm_readv(2)` and `process_vm_writev(2)`.
//!
//! Whoever reads must ask afterwards whether the caller is still there: its number may belong to another process by then.

use std::ffi::{CStr, CString};

use libc::{c_int, c_long};

use crate::place::errno;
use crate::syscall::check;

/// No page is smaller, so a read that stays within this much of alignment cannot half fail.
const PAGE: u64 = 4096;
/// As much of a path as is read at first: nearly always all.
const FIRST: usize = 128;
pub(crate) const PATH_MAX: usize = libc::PATH_MAX as usize;

/// The path at an address.
pub(crate) fn read_path(pid: i32, at: u64) -> Result<CString, c_int> {
    read_name(pid, at, &mut [0; PATH_MAX]).map(CStr::to_owned)
}

/// `count` ids at an address.
pub(crate) fn read_ids(pid: i32, at: u64, count: usize) -> Result<Vec<u32>, c_int> {
    let mut bytes = vec![0u8; count * 4];
    if transfer(libc::SYS_process_vm_readv, pid, at, bytes.as_mut_ptr(), bytes.len())? != bytes.len() {
        return Err(libc::EFAULT);
    }
    Ok(bytes.chunks_exact(4).map(|id| u32::from_ne_bytes([id[0], id[1], id[2], id[3]])).collect())
}

/// Writes ids in a row.
pub(crate) fn write_ids(pid: i32, at: u64, ids: &[u32]) -> Result<(), c_int> {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_ne_bytes()).collect();
    write(pid, at, &bytes)
}

/// Writes all of it, or fails with `EFAULT`.
pub(crate) fn write(pid: i32, at: u64, bytes: &[u8]) -> Result<(), c_int> {
    let n = transfer(libc::SYS_process_vm_writev, pid, at, bytes.as_ptr().cast_mut(), bytes.len())?;
    if n == bytes.len() { Ok(()) } else { Err(libc::EFAULT) }
}

/// Room for one path of a caller.
pub(crate) type Room = [u8; PATH_MAX];

/// The string at an address of the caller.
pub(crate) fn read_name(pid: i32, at: u64, room: &mut Room) -> Result<&CStr, c_int> {
    let (mut have, mut step) = (0, FIRST);
    while have < PATH_MAX {
        let next = at.checked_add(have as u64).ok_or(libc::EFAULT)?;
        let size = step.min((PAGE - next % PAGE) as usize).min(PATH_MAX - have);
        step = PATH_MAX;
        let part = &mut room[have..have + size];
        if transfer(libc::SYS_process_vm_readv, pid, next, part.as_mut_ptr(), size)? != size {
            return Err(libc::EFAULT);
        }
        have += size;
        if CStr::from_bytes_until_nul(part).is_ok() {
            return CStr::from_bytes_until_nul(room).map_err(|_| libc::EFAULT);
        }
    }
    Err(libc::ENAMETOOLONG)
}

/// `process_vm_readv` or `process_vm_writev` of one piece.
fn transfer(number: c_long, pid: i32, at: u64, ours: *mut u8, size: usize) -> Result<usize, c_int> {
    let ours = libc::iovec { iov_base: ours.cast(), iov_len: size };
    let theirs = libc::iovec { iov_base: at as *mut libc::c_void, iov_len: size };
    // SAFETY: callers pass a live slice, which only the read writes to; the kernel checks the other address.
    match check(unsafe { libc::syscall(number, pid, &raw const ours, 1usize, &raw const theirs, 1usize, 0usize) }) {
        Ok(n) => Ok(n as usize),
        Err(error) => Err(errno(&error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_read_up_to_their_end_and_no_further() {
        let page = PAGE as usize;
        // Two pages for strings, and one that must not be touched.
        // SAFETY: a fresh mapping of three pages; the last one is closed.
        let start = unsafe {
            let start = libc::mmap(
                std::ptr::null_mut(),
                3 * page,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            assert_ne!(start, libc::MAP_FAILED);
            assert_eq!(libc::mprotect(start.byte_add(2 * page), page, libc::PROT_NONE), 0);
            start.cast::<u8>()
        };
        let pid = std::process::id() as i32;
        let rows: [(&str, usize, usize, Result<usize, c_int>); 8] = [
            ("short", 0, 3, Ok(3)),
            ("empty", 0, 0, Ok(0)),
            ("longer than the first piece", 5, 300, Ok(300)),
            ("over the border", page - 2, 200, Ok(200)),
            ("up to the last byte", 2 * page - 4, 3, Ok(3)),
            ("into the closed page", 2 * page - 4, 4, Err(libc::EFAULT)),
            ("the longest", 0, PATH_MAX - 1, Ok(PATH_MAX - 1)),
            ("too long", 0, PATH_MAX, Err(libc::ENAMETOOLONG)),
        ];
        for (name, at, length, want) in rows {
            // SAFETY: within the first two pages.
            unsafe {
                start.write_bytes(0, 2 * page);
                start.add(at).write_bytes(b'x', length);
            }
            let mut room = [b'?'; PATH_MAX];
            let got = read_name(pid, start as u64 + at as u64, &mut room).map(|name| name.to_bytes().len());
            assert_eq!(got, want, "{name}");
        }
        // SAFETY: the mapping from above, used by nobody any more.
        unsafe { libc::munmap(start.cast(), 3 * page) };
        assert_eq!(read_name(pid, 8, &mut [0; PATH_MAX]), Err(libc::EFAULT), "no memory there");
        assert_eq!(read_name(pid, u64::MAX - 2, &mut [0; PATH_MAX]), Err(libc::EFAULT), "no address");
        assert_eq!(write(pid, 8, b"x"), Err(libc::EFAULT), "no memory to write to");
    }
}
