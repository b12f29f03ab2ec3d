//! What a path of the step is on the machine.
//!
//! Every component is looked at below the step's root folder: links are followed inside it, `..` does not leave it, mounts lead to
//! where their content is. In here a path of the step is absolute, without links, and without the last `/`, so the root is empty.
//! What folders and links were found is remembered: nothing but the step's own calls, which all come by, changes them.

use std::collections::HashMap;
use std::ffi::CString;
use std::io::{self, Write as _};

use libc::c_int;

use super::memory::c_path;
use crate::syscall::check;

const LINKS_MAX: usize = 40;
const KNOWN_MAX: usize = 1 << 16;
const NAME_MAX: usize = 255;
const PATH_MAX: usize = libc::PATH_MAX as usize;
/// What the kernel says of a file that has no name any more.
const DELETED: &[u8] = b" (deleted)";
const PROC: &[u8] = b"/proc";

/// What is at a path of the step.
#[derive(Clone, Debug)]
enum Known {
    /// No link.
    Plain,
    /// A folder that was gone through.
    Folder,
    Link(Vec<u8>),
    Mount(usize),
}

/// A part of the step's tree.
#[derive(Debug)]
struct Mounted {
    guest: Vec<u8>,
    host: Vec<u8>,
    read_only: bool,
    /// Only the step changes it.
    private: bool,
}

pub(super) struct Paths {
    /// The first is the root.
    mounts: Vec<Mounted>,
    known: HashMap<Vec<u8>, Known>,
    /// What could not be looked at (`EACCES`).
    closed: Vec<u8>,
}

/// Who asks.
#[derive(Clone, Copy)]
pub(super) struct Caller<'a> {
    pub(super) thread: i32,
    pub(super) process: i32,
    /// Its root folder, a path of the step.
    pub(super) root: &'a [u8],
    /// The program that a process of the step runs, a path of the step.
    pub(super) program: &'a dyn Fn(i32) -> Option<Vec<u8>>,
}

/// Where something is. It need not be there.
#[derive(Clone, Debug, Default)]
pub(super) struct Found {
    pub(super) host: Vec<u8>,
    /// `None`: a place that has no path in the step.
    pub(super) guest: Option<Vec<u8>>,
    pub(super) read_only: bool,
    /// It is what a mount has put there.
    pub(super) mounted: bool,
    /// Which part of the step's tree it is in.
    pub(super) part: usize,
    /// The kernel itself finds it by the same (relative) path.
    pub(super) native: bool,
}

/// Where a path without links is.
pub(super) struct Place {
    pub(super) host: Vec<u8>,
    /// It is what a mount has put there.
    pub(super) mounted: bool,
    pub(super) in_root: bool,
}

struct Walk {
    guest: Vec<u8>,
    host: Vec<u8>,
    mount: usize,
    opaque: bool,
}

impl Paths {
    pub(super) fn new(root: Vec<u8>) -> Paths {
        let mounts = vec![Mounted { guest: Vec::new(), host: root, read_only: false, private: true }];
        Paths { mounts, known: HashMap::new(), closed: Vec::new() }
    }

    /// Puts something of the machine at a path of the step.
    pub(super) fn mount(&mut self, guest: &[u8], host: Vec<u8>, read_only: bool, private: bool) {
        self.known.retain(|path, _| !is_below(path, guest));
        self.known.insert(guest.to_vec(), Known::Mount(self.mounts.len()));
        self.mounts.push(Mounted { guest: guest.to_vec(), host, read_only, private });
    }

    /// The step's path of what the machine has somewhere.
    pub(super) fn guest_of(&self, host: &[u8]) -> Option<Vec<u8>> {
        if host.ends_with(DELETED) || !host.starts_with(b"/") {
            return None;
        }
        // The last one of the longest; one that another mount hides is not in the table any more.
        let visible =
            |index: usize| index == 0 || matches!(self.known.get(&self.mounts[index].guest), Some(Known::Mount(at)) if *at == index);
        let best = (0..self.mounts.len()).filter(|index| is_below(host, &self.mounts[*index].host) && visible(*index));
        let mount = &self.mounts[best.max_by_key(|index| self.mounts[*index].host.len())?];
        let mut guest = mount.guest.clone();
        guest.extend_from_slice(&host[mount.host.len()..]);
        Some(guest)
    }

    /// What is at a path without links.
    pub(super) fn place(&self, guest: &[u8]) -> Place {
        let walk = self.at(guest);
        Place { mounted: walk.mount != 0 && self.mounts[walk.mount].guest == guest, in_root: walk.mount == 0, host: walk.host }
    }

    /// The folder of the machine that holds a path, as far as it is the step's own.
    pub(super) fn own_part(&self, host: &[u8]) -> Option<usize> {
        let own = self.mounts.iter().filter(|mount| mount.private || !mount.read_only).map(|mount| &mount.host);
        own.filter(|own| is_below(host, own) && !is_below(own, PROC)).map(Vec::len).max()
    }

    /// The path of the machine that the last look was refused at.
    pub(super) fn closed(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.closed)
    }

    /// Forgets a file that is about to go.
    pub(super) fn forget(&mut self, guest: Option<&[u8]>) {
        let Some(guest) = guest else { return };
        match self.known.get(guest) {
            Some(Known::Folder) => self.forget_all(),
            Some(Known::Plain | Known::Link(_)) => drop(self.known.remove(guest)),
            Some(Known::Mount(_)) | None => {}
        }
    }

    fn forget_all(&mut self) {
        self.known.retain(|_, known| matches!(known, Known::Mount(_)));
    }

    fn remember(&mut self, walk: &Walk, known: Known) {
        if walk.opaque || !self.mounts[walk.mount].private {
            return;
        }
        if self.known.len() >= KNOWN_MAX {
            self.forget_all();
        }
        self.known.insert(walk.guest.clone(), known);
    }

    /// Where a path is. `dir` is what relative ones begin at: a descriptor or `AT_FDCWD`.
    pub(super) fn find(&mut self, caller: Caller<'_>, dir: c_int, path: &[u8], follow: bool) -> Result<Found, c_int> {
        if path.is_empty() {
            return Err(libc::ENOENT);
        }
        if path[0] == b'/' {
            return self.walk(caller, self.at(caller.root), path, follow);
        }
        let walk = self.begin(caller, dir)?;
        self.gone_through(&walk);
        self.walk(caller, walk, path, follow)
    }

    /// Whoever moves one of these folders must make us forget what is below it.
    fn gone_through(&mut self, walk: &Walk) {
        if walk.opaque || !self.mounts[walk.mount].private {
            return;
        }
        let mut path = &walk.guest[..];
        while !path.is_empty() && !matches!(self.known.get(path), Some(Known::Folder | Known::Mount(_))) {
            self.known.insert(path.to_vec(), Known::Folder);
            path = &path[..path.iter().rposition(|byte| *byte == b'/').unwrap_or(0)];
        }
    }

    /// What a descriptor (or the folder of work) is.
    pub(super) fn of_descriptor(&self, caller: Caller<'_>, descriptor: c_int) -> Result<Found, c_int> {
        let walk = self.begin(caller, descriptor)?;
        // Never by its path: the file may have another one by now, or none.
        let read_only = !walk.opaque && self.mounts[walk.mount].read_only;
        let host = link_of(caller.thread, descriptor);
        Ok(Found { host, guest: (!walk.opaque).then_some(walk.guest), read_only, mounted: false, part: walk.mount, native: false })
    }

    fn begin(&self, caller: Caller<'_>, dir: c_int) -> Result<Walk, c_int> {
        let link = link_of(caller.thread, dir);
        let host = read_link(&link).map_err(|_| libc::EBADF)?;
        Ok(match self.guest_of(&host) {
            Some(guest) => self.at(&guest),
            None => Walk { guest: Vec::new(), host: link, mount: 0, opaque: true },
        })
    }

    /// A path without links.
    fn at(&self, guest: &[u8]) -> Walk {
        let mut end = guest.len();
        let mount = loop {
            match self.known.get(&guest[..end]) {
                Some(Known::Mount(mount)) => break *mount,
                _ if end == 0 => break 0,
                _ => end = guest[..end].iter().rposition(|byte| *byte == b'/').unwrap_or(0),
            }
        };
        let Mounted { guest: from, host, .. } = &self.mounts[mount];
        let mut host = host.clone();
        host.extend_from_slice(&guest[from.len()..]);
        Walk { guest: guest.to_vec(), host, mount, opaque: false }
    }

    /// Puts a name below, or what is mounted there.
    fn enter(&self, walk: &mut Walk, name: &[u8]) -> Option<&Known> {
        walk.host.push(b'/');
        walk.host.extend_from_slice(name);
        if walk.opaque {
            return None;
        }
        walk.guest.push(b'/');
        walk.guest.extend_from_slice(name);
        let known = self.known.get(&walk.guest);
        if let Some(Known::Mount(mount)) = known {
            walk.mount = *mount;
            walk.host.clone_from(&self.mounts[*mount].host);
        }
        known
    }

    fn leave(&self, walk: &mut Walk, root: &[u8]) {
        if walk.opaque {
            walk.host.extend_from_slice(b"/..");
        } else if walk.guest != root && !walk.guest.is_empty() {
            let up = walk.guest.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
            if walk.guest == self.mounts[walk.mount].guest {
                *walk = self.at(&walk.guest[..up]);
            } else {
                walk.host.truncate(walk.host.iter().rposition(|byte| *byte == b'/').unwrap_or(0));
                walk.guest.truncate(up);
            }
        }
    }

    fn walk(&mut self, caller: Caller<'_>, mut walk: Walk, path: &[u8], follow: bool) -> Result<Found, c_int> {
        let mut pending = path.to_vec();
        let (mut at, mut links, mut mounted, mut folder) = (0, 0, false, false);
        let mut native = path[0] != b'/' && !walk.opaque;
        loop {
            while pending.get(at) == Some(&b'/') {
                at += 1;
            }
            if at == pending.len() {
                break;
            }
            let end = pending[at..].iter().position(|byte| *byte == b'/').map_or(pending.len(), |length| at + length);
            let last = pending[end..].iter().all(|byte| *byte == b'/');
            folder = last && end < pending.len();
            let name = &pending[at..end];
            mounted = false;
            if name == b"." || name == b".." {
                if name == b".." {
                    native = false;
                    self.leave(&mut walk, caller.root);
                }
                folder |= last;
                at = end;
                continue;
            }
            if name.len() > NAME_MAX || walk.host.len() > 2 * PATH_MAX {
                return Err(libc::ENAMETOOLONG);
            }
            let target = match self.enter(&mut walk, name) {
                Some(Known::Mount(_)) => {
                    (mounted, native) = (true, false);
                    at = end;
                    continue;
                }
                Some(Known::Folder) => None,
                Some(Known::Plain) if last => None,
                Some(Known::Link(target)) => {
                    if last && !follow && !folder {
                        break;
                    }
                    Some(target.clone())
                }
                _ if last && !follow && !folder => break,
                known => {
                    let plain = known.is_some();
                    let looked = self.look(caller, &mut walk, last);
                    if looked.as_ref().is_err_and(|error| *error == libc::EACCES) {
                        self.closed.clone_from(&walk.host);
                    }
                    match looked? {
                        Look::Nothing if last => None,
                        Look::Nothing => return Err(libc::ENOENT),
                        Look::Plain => {
                            // What is below tells whether it is a folder.
                            if !last || !plain {
                                self.remember(&walk, if last { Known::Plain } else { Known::Folder });
                            }
                            None
                        }
                        Look::Link(target) => {
                            self.remember(&walk, Known::Link(target.clone()));
                            Some(target)
                        }
                        Look::Moved => {
                            native = false;
                            None
                        }
                    }
                }
            };
            at = end;
            let Some(target) = target else { continue };
            (links, native) = (links + 1, false);
            if links > LINKS_MAX {
                return Err(libc::ELOOP);
            }
            if target.is_empty() {
                return Err(libc::ENOENT);
            }
            let mut next = target;
            next.extend_from_slice(&pending[end..]);
            if next[0] == b'/' {
                walk = self.at(caller.root);
            } else if walk.opaque {
                walk.host.truncate(walk.host.iter().rposition(|byte| *byte == b'/').unwrap_or(0));
            } else {
                self.leave(&mut walk, &[]);
            }
            (pending, at) = (next, 0);
        }
        if walk.host.is_empty() {
            walk.host.push(b'/');
        }
        if folder && !walk.host.ends_with(b"/") {
            walk.host.push(b'/');
        }
        let read_only = !walk.opaque && self.mounts[walk.mount].read_only;
        Ok(Found { host: walk.host, guest: (!walk.opaque).then_some(walk.guest), read_only, mounted, part: walk.mount, native })
    }

    /// Whether the last name of the walk is a link. In `/proc` it may lead somewhere at once.
    fn look(&self, caller: Caller<'_>, walk: &mut Walk, last: bool) -> Result<Look, c_int> {
        if !walk.opaque && is_below(&walk.guest, PROC) && self.of_process(caller, walk, last)? {
            return Ok(Look::Moved);
        }
        match read_link(&walk.host) {
            Ok(target) => Ok(Look::Link(target)),
            Err(error) => match error.raw_os_error() {
                Some(libc::EINVAL) => Ok(Look::Plain),
                Some(libc::ENOENT) => Ok(Look::Nothing),
                other => Err(other.unwrap_or(libc::EIO)),
            },
        }
    }

    /// The links of `/proc` that are none on a disk. True: the walk is where the link leads.
    fn of_process(&self, caller: Caller<'_>, walk: &mut Walk, last: bool) -> Result<bool, c_int> {
        let parts: Vec<&[u8]> = walk.guest[PROC.len()..].split(|byte| *byte == b'/').skip(1).collect();
        let number = |part: &[u8]| std::str::from_utf8(part).ok().and_then(|part| part.parse::<i32>().ok());
        let to = match parts[..] {
            [b"self"] => format!("/proc/{}", caller.process).into_bytes(),
            [b"thread-self"] => format!("/proc/{}/task/{}", caller.process, caller.thread).into_bytes(),
            [process, ref rest @ ..] if number(process).is_some() => {
                let rest = if let [b"task", _, rest @ ..] = rest { rest } else { rest };
                let program = || number(process).and_then(caller.program);
                match rest {
                    [b"exe"] if let Some(program) = program() => program,
                    [b"root"] if program().is_some() => caller.root.to_vec(),
                    [b"exe" | b"root" | b"cwd"] | [b"fd" | b"map_files", _] => {
                        let host = match read_link(&walk.host) {
                            Ok(host) => host,
                            Err(error) => return Err(error.raw_os_error().unwrap_or(libc::EIO)),
                        };
                        // The last one is the file itself, whatever its name is now.
                        if last && rest.len() == 2 {
                            walk.opaque = true;
                            return Ok(true);
                        }
                        match self.guest_of(&host) {
                            Some(guest) => guest,
                            None => {
                                walk.opaque = true;
                                return Ok(true);
                            }
                        }
                    }
                    [b"ns", _] if last => return Ok(true),
                    _ => return Ok(false),
                }
            }
            _ => return Ok(false),
        };
        *walk = self.at(&to);
        Ok(true)
    }

    /// What `readlink` says: of the links in `/proc`, what they are in the step.
    pub(super) fn target(&self, caller: Caller<'_>, found: &Found) -> Result<Vec<u8>, c_int> {
        let error = |error: io::Error| error.raw_os_error().unwrap_or(libc::EIO);
        let Some(guest) = found.guest.as_deref().filter(|guest| is_below(guest, PROC) && guest.len() > PROC.len()) else {
            return read_link(&found.host).map_err(error);
        };
        match &guest[PROC.len() + 1..] {
            b"self" => return Ok(caller.process.to_string().into_bytes()),
            b"thread-self" => return Ok(format!("{}/task/{}", caller.process, caller.thread).into_bytes()),
            _ => {}
        }
        let host = read_link(&found.host).map_err(error)?;
        if !host.starts_with(b"/") {
            return Ok(host);
        }
        let mut walk = Walk { guest: guest.to_vec(), host: found.host.clone(), mount: 0, opaque: false };
        let moved = self.of_process(caller, &mut walk, false)?;
        let inside = if moved && !walk.opaque { Some(walk.guest) } else { self.guest_of(&host) };
        Ok(inside.map_or(host, |inside| self.seen(caller, inside)))
    }

    /// A path as the caller sees it, which may have a root of its own.
    pub(super) fn seen(&self, caller: Caller<'_>, guest: Vec<u8>) -> Vec<u8> {
        let inner = if is_below(&guest, caller.root) { guest[caller.root.len()..].to_vec() } else { guest };
        if inner.is_empty() { b"/".to_vec() } else { inner }
    }
}

enum Look {
    Nothing,
    Plain,
    Link(Vec<u8>),
    /// The walk is somewhere else now.
    Moved,
}

/// Is a path a folder or below it?
fn is_below(path: &[u8], folder: &[u8]) -> bool {
    path.strip_prefix(folder).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
}

/// The link of a descriptor of a thread; `AT_FDCWD`: of its folder.
pub(super) fn link_of(thread: i32, descriptor: c_int) -> Vec<u8> {
    let mut link = Vec::with_capacity(32);
    // Writing to memory does not fail.
    let _ = if descriptor == libc::AT_FDCWD { write!(link, "/proc/{thread}/cwd") } else { write!(link, "/proc/{thread}/fd/{descriptor}") };
    link
}

fn read_link(path: &[u8]) -> io::Result<Vec<u8>> {
    let path: CString = c_path(path).map_err(io::Error::from_raw_os_error)?;
    let mut buffer = [0u8; PATH_MAX];
    // SAFETY: the buffer has the length that is passed.
    let n = check(unsafe { libc::readlink(path.as_ptr(), buffer.as_mut_ptr().cast(), buffer.len()) } as libc::c_long)?;
    Ok(buffer[..n as usize].to_vec())
}
