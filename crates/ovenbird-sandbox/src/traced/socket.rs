//! Addresses of Unix sockets: paths of the step, in at most 108 bytes.

use std::collections::HashMap;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, symlink};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use libc::{c_int, c_long};

use super::process::{After, Answered, Instead, Verdict};
use super::tracer::Tracer;

/// `sun_path`.
const PATH: usize = 108;
const FAMILY: usize = size_of::<libc::sa_family_t>();
/// Larger than every address.
const ADDRESS_MAX: usize = 128;
/// Where links can be made that are short.
const SHORT: [&str; 2] = ["/tmp", "/dev/shm"];

/// Short names of folders whose path is too long for an address.
#[derive(Default)]
pub(super) struct Addresses {
    folder: Option<PathBuf>,
    /// Link by folder.
    links: HashMap<Vec<u8>, Vec<u8>>,
}

impl Addresses {
    /// A path of the machine, short enough.
    fn short(&mut self, host: Vec<u8>) -> Result<Vec<u8>, c_int> {
        if host.len() < PATH {
            return Ok(host);
        }
        let slash = host.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
        let (parent, name) = (&host[..slash], &host[slash..]);
        let mut link = match self.links.get(parent) {
            Some(link) => link.clone(),
            None => self.link(parent).ok_or(libc::ENAMETOOLONG)?,
        };
        link.extend_from_slice(name);
        if link.len() < PATH { Ok(link) } else { Err(libc::ENAMETOOLONG) }
    }

    fn link(&mut self, parent: &[u8]) -> Option<Vec<u8>> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        if self.folder.is_none() {
            let name = format!("ovenbird-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            let tried = SHORT.iter().map(|base| PathBuf::from(base).join(&name));
            self.folder = { tried }.find(|folder| fs::DirBuilder::new().mode(0o700).create(folder).is_ok());
        }
        let link = self.folder.as_ref()?.join(self.links.len().to_string());
        symlink(std::ffi::OsStr::from_bytes(parent), &link).ok()?;
        let link = link.as_os_str().as_bytes().to_vec();
        self.links.insert(parent.to_vec(), link.clone());
        Some(link)
    }

    /// The long path of a short one.
    fn long(&self, path: &[u8]) -> Vec<u8> {
        let found = self.links.iter().find_map(|(folder, link)| {
            let rest = path.strip_prefix(&link[..]).filter(|rest| rest.starts_with(b"/"))?;
            Some([&folder[..], rest].concat())
        });
        found.unwrap_or_else(|| path.to_vec())
    }
}

impl Drop for Addresses {
    fn drop(&mut self) {
        if let Some(folder) = &self.folder {
            // A few links of ours.
            let _ = fs::remove_dir_all(folder);
        }
    }
}

/// The path in an address, when it is one of a Unix socket that has one.
fn path_of(address: &[u8]) -> Option<&[u8]> {
    let family = libc::sa_family_t::from_ne_bytes(address.get(..FAMILY)?.try_into().ok()?);
    let path = address.get(FAMILY..)?;
    let end = path.iter().position(|byte| *byte == 0).unwrap_or(path.len());
    (c_int::from(family) == libc::AF_UNIX && end > 0).then_some(&path[..end])
}

fn address_of(path: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(ADDRESS_MAX);
    out.extend((libc::AF_UNIX as libc::sa_family_t).to_ne_bytes());
    out.extend_from_slice(path);
    out.push(0);
    out
}

impl Tracer {
    pub(super) fn address(&mut self, thread: i32, number: c_long, args: [u64; 6]) -> Answered {
        if matches!(number, libc::SYS_getsockname | libc::SYS_getpeername) {
            if args[1] == 0 || args[2] == 0 {
                return Ok(Verdict::Kernel);
            }
            let room = self.memory(thread)?.read_ids(args[2], 1)?[0] as usize;
            // Nothing changes but that we see the end.
            let unchanged = Instead { bytes: Vec::new(), ..Instead::bytes(0, Vec::new()) };
            return Ok(unchanged.then(After::Address(args[1], room)));
        }
        let at = if number == libc::SYS_sendto { 4 } else { 1 };
        let size = args[at + 1] as usize;
        if args[at] == 0 || size > ADDRESS_MAX || size <= FAMILY {
            return Ok(Verdict::Kernel);
        }
        let mut address = vec![0u8; size];
        self.memory(thread)?.read(args[at], &mut address)?;
        let Some(path) = path_of(&address) else { return Ok(Verdict::Kernel) };
        let found = self.find(thread, libc::AT_FDCWD, path, number != libc::SYS_bind)?;
        let after = if number == libc::SYS_bind {
            if found.read_only {
                return Err(libc::EROFS);
            }
            After::Made(found.host.clone(), self.maker(thread, &found.host)?)
        } else {
            After::Nothing
        };
        let address = address_of(&self.addresses.short(found.host.clone())?);
        let numbers = vec![(at + 1, address.len() as u64)];
        let instead = Instead { numbers, hosts: vec![found.host], ..Instead::bytes(at, address) };
        Ok(instead.then(after))
    }

    /// Puts the step's path where the kernel has put the machine's.
    pub(super) fn tell_address(&mut self, thread: i32, at: u64, room: usize) -> Result<(), c_int> {
        let mut address = vec![0u8; room.min(FAMILY + PATH)];
        self.memory(thread)?.read(at, &mut address)?;
        let Some(path) = path_of(&address) else { return Ok(()) };
        let host = self.addresses.long(path);
        let Some(guest) = self.paths.guest_of(&host) else { return Ok(()) };
        let mut told = address_of(&guest);
        told.resize(told.len().max(FAMILY + path.len()), 0);
        told.truncate(room);
        self.memory(thread)?.write(at, &told)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        let row = |family: c_int, path: &[u8]| [&(family as libc::sa_family_t).to_ne_bytes()[..], path].concat();
        let rows: [(Vec<u8>, Option<&[u8]>); 6] = [
            (row(libc::AF_UNIX, b"/run/x\0"), Some(b"/run/x")),
            (row(libc::AF_UNIX, b"/run/x"), Some(b"/run/x")),
            (row(libc::AF_UNIX, b"\0abstract"), None),
            (row(libc::AF_UNIX, b""), None),
            (row(libc::AF_INET, b"/run/x"), None),
            (vec![1], None),
        ];
        for (address, want) in rows {
            assert_eq!(path_of(&address), want, "{address:?}");
        }
        let mut addresses = Addresses::default();
        let long = [b"/".as_slice(), &[b'x'; 150], b"/socket"].concat();
        assert_eq!(addresses.short(b"/run/x".to_vec()), Ok(b"/run/x".to_vec()));
        let short = addresses.short(long.clone()).unwrap();
        assert!(short.len() < PATH && addresses.short(long.clone()).unwrap() == short);
        assert_eq!(addresses.long(&short), long);
        assert_eq!(addresses.short([b"/".as_slice(), &[b'x'; 150]].concat()), Err(libc::ENAMETOOLONG));
    }
}
