//! Memory of a traced process, through `/proc/PID/mem`: the filters of containers refuse `process_vm_readv`.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use libc::c_int;

const PAGE: u64 = 4096;
/// As much of a path as is read at first: nearly always all.
const FIRST: usize = 256;
pub(super) const PATH_MAX: usize = libc::PATH_MAX as usize;

/// The address space that a process had when it was opened: a new program has another one.
pub(super) struct Memory(File);

impl Memory {
    pub(super) fn open(process: i32) -> io::Result<Memory> {
        File::options().read(true).write(true).open(format!("/proc/{process}/mem")).map(Memory)
    }

    /// All of it, or `EFAULT`.
    pub(super) fn read(&self, at: u64, into: &mut [u8]) -> Result<(), c_int> {
        self.0.read_exact_at(into, at).map_err(|_| libc::EFAULT)
    }

    /// All of it, or `EFAULT`.
    pub(super) fn write(&self, at: u64, bytes: &[u8]) -> Result<(), c_int> {
        self.0.write_all_at(bytes, at).map_err(|_| libc::EFAULT)
    }

    pub(super) fn read_ids(&self, at: u64, count: usize) -> Result<Vec<u32>, c_int> {
        let mut bytes = vec![0u8; count * 4];
        self.read(at, &mut bytes)?;
        Ok(bytes.chunks_exact(4).map(|id| u32::from_ne_bytes([id[0], id[1], id[2], id[3]])).collect())
    }

    pub(super) fn write_ids(&self, at: u64, ids: &[u32]) -> Result<(), c_int> {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_ne_bytes()).collect();
        self.write(at, &bytes)
    }

    /// Numbers as long as a pointer.
    pub(super) fn read_words(&self, at: u64, count: usize) -> Result<Vec<u64>, c_int> {
        let mut bytes = vec![0u8; count * 8];
        self.read(at, &mut bytes)?;
        Ok(words(&bytes))
    }

    /// The string at an address, without its end.
    pub(super) fn read_string(&self, at: u64) -> Result<Vec<u8>, c_int> {
        let (mut out, mut step) = (Vec::with_capacity(FIRST), FIRST);
        while out.len() < PATH_MAX {
            let next = at.checked_add(out.len() as u64).ok_or(libc::EFAULT)?;
            let size = step.min((PAGE - next % PAGE) as usize).min(PATH_MAX - out.len());
            step = PATH_MAX;
            let from = out.len();
            out.resize(from + size, 0);
            self.read(next, &mut out[from..])?;
            if let Some(end) = out[from..].iter().position(|byte| *byte == 0) {
                out.truncate(from + end);
                return Ok(out);
            }
        }
        Err(libc::ENAMETOOLONG)
    }

    /// The pointers of a NULL-terminated array, without the NULL. A NULL array is an empty one.
    pub(super) fn read_pointers(&self, at: u64) -> Result<Vec<u64>, c_int> {
        let mut out = Vec::new();
        let mut next = at;
        while at != 0 {
            let count = ((PAGE - next % PAGE) / 8).max(1) as usize;
            let part = self.read_words(next, count)?;
            if let Some(end) = part.iter().position(|pointer| *pointer == 0) {
                out.extend(&part[..end]);
                break;
            }
            out.extend(part);
            if out.len() > ARGUMENTS_MAX {
                return Err(libc::E2BIG);
            }
            next += count as u64 * 8;
        }
        Ok(out)
    }

    /// As much as there is.
    pub(super) fn read_some(&self, at: u64, into: &mut [u8]) -> usize {
        let mut done = 0;
        while done < into.len() {
            match self.0.read_at(&mut into[done..], at + done as u64) {
                Ok(0) | Err(_) => break,
                Ok(n) => done += n,
            }
        }
        done
    }
}

/// More pointers than fit the kernel's own limit for arguments (`MAX_ARG_STRINGS` is larger, the stack is not).
const ARGUMENTS_MAX: usize = 1 << 20;

pub(super) fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|word| u64::from_ne_bytes([word[0], word[1], word[2], word[3], word[4], word[5], word[6], word[7]])).collect()
}

/// A path of the machine as a C string.
pub(super) fn c_path(path: &[u8]) -> Result<CString, c_int> {
    CString::new(path).map_err(|_| libc::EINVAL)
}
