//! A layer, which anybody may have made, as a diff folder.
//!
//! Every path is walked component by component from the root's descriptor ([`Cursor`]); a symlink on the way is
//! read and followed inside the root, as `chroot` would. Names whose `..` lead above the root are refused.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Stat, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use crate::Digest;
use crate::digest::Hasher;

use super::tar::{Header, Kind, Reader};
use super::walk::{FOLDER, remove};
use super::{CAPABILITY, LayerError, MAX_PATH, OPAQUE, Owner, Owners, Ownership, STASHED_CAPABILITY};

/// Symlinks followed for one path, as in Linux.
const MAX_SYMLINKS: usize = 40;
/// Folders of the current path that stay open.
const OPEN: usize = 64;

/// What the layers below have at a path.
#[derive(Debug, Clone)]
pub struct Lower {
    /// Where it really is.
    pub path: PathBuf,
    /// What an [`Owners`] table says of it.
    pub owner: Option<Owner>,
}

/// Unpacks a layer blob (compression found by magic) into the empty folder `dir`; verifies `diff_id` when given.
/// `lower` finds a path in the layers below, for hard links that cross layers, and for folders and symlinks on the way to an
/// entry that the layer itself does not have.
///
/// A hard link to a file of a lower layer becomes a copy of it. On an error `dir` is left half filled: remove it.
pub fn unpack(
    blob: impl Read,
    dir: &Path,
    diff_id: Option<&Digest>,
    ownership: Ownership,
    lower: &dyn Fn(&Path) -> Option<Lower>,
) -> Result<Owners, LayerError> {
    apply(blob, dir, diff_id, ownership, lower, true)
}

/// Unpacks an ordinary archive (tar, plain or compressed by gzip or zstd) into `dir`, which may hold files already: names that begin
/// with `.wh.` mean nothing here. Guards against hostile archives as [`unpack`] does.
pub fn extract(archive: impl Read, dir: &Path, ownership: Ownership) -> Result<Owners, LayerError> {
    apply(archive, dir, None, ownership, &|_| None, false)
}

fn apply(
    blob: impl Read,
    dir: &Path,
    diff_id: Option<&Digest>,
    ownership: Ownership,
    lower: &dyn Fn(&Path) -> Option<Lower>,
    layer: bool,
) -> Result<Owners, LayerError> {
    let stream = Hashed { inner: decompress(blob).map_err(unreadable)?, hasher: diff_id.map(|_| Hasher::default()) };
    let mut unpacker = Unpacker {
        root: dir,
        cursor: Cursor::new(dir)?,
        ownership,
        lower,
        layer,
        owners: Owners::new(),
        folders: BTreeMap::new(),
        buffer: vec![0; 128 * 1024],
    };
    let mut reader = Reader::new(stream);
    while let Some(header) = reader.next().map_err(unreadable)? {
        unpacker.entry(header, &mut reader)?;
    }
    unpacker.finish_folders()?;
    let mut stream = reader.into_inner();
    // What follows the end of the archive counts for the digest.
    io::copy(&mut stream, &mut io::sink()).map_err(unreadable)?;
    if let (Some(expected), Some(hasher)) = (diff_id, stream.hasher) {
        let (actual, _) = hasher.finish();
        if actual != *expected {
            return Err(LayerError::Mismatch { expected: *expected, actual });
        }
    }
    Ok(unpacker.owners)
}

#[allow(clippy::needless_pass_by_value, reason = "given to map_err")]
fn unreadable(e: io::Error) -> LayerError {
    let reason = match e.kind() {
        io::ErrorKind::UnexpectedEof => "it is cut short".to_owned(),
        _ => e.to_string(),
    };
    LayerError::Malformed { reason }
}

/// The stream without its compression: gzip (several members), zstd (several frames) or none, by the first bytes.
pub(crate) fn decompress<'a>(mut blob: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut magic = Vec::with_capacity(4);
    blob.by_ref().take(4).read_to_end(&mut magic)?;
    let kind = magic.clone();
    let whole = BufReader::with_capacity(128 * 1024, io::Cursor::new(magic).chain(blob));
    Ok(match kind.as_slice() {
        [0x1f, 0x8b, ..] => Box::new(BufReader::with_capacity(128 * 1024, flate2::bufread::MultiGzDecoder::new(whole))),
        // A frame, or a skippable frame before it.
        [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => {
            Box::new(BufReader::with_capacity(128 * 1024, zstd::Decoder::with_buffer(whole)?))
        }
        _ => Box::new(whole),
    })
}

struct Hashed<R> {
    inner: R,
    hasher: Option<Hasher>,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&buffer[..n]);
        }
        Ok(n)
    }
}

/// Parts of a name below the root. Leading slashes and `.` mean nothing; `a/..` is nothing; `None` when it leads above the root.
pub(crate) fn root_parts(name: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut parts: Vec<Vec<u8>> = Vec::new();
    for part in name.split(|&b| b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop()?),
            _ => parts.push(part.to_vec()),
        }
    }
    Some(parts)
}

fn parts(name: &[u8], header: &Header, reason: &'static str) -> Result<Vec<Vec<u8>>, LayerError> {
    root_parts(name).ok_or_else(|| LayerError::Escape { entry: show(&header.path), reason })
}

/// A name for a message; a long one without its middle.
fn show(name: &[u8]) -> String {
    let text = |part: &[u8]| String::from_utf8_lossy(part).into_owned();
    match name.len() {
        ..=160 => text(name),
        length => format!("{}...{}", text(&name[..100]), text(&name[length - 50..])),
    }
}

fn c(name: &[u8]) -> Result<CString, LayerError> {
    CString::new(name).map_err(|_| LayerError::Malformed { reason: format!("the name {:?} contains a NUL byte", show(name)) })
}

/// A place below the root whose folders are open: the path holds no symlinks.
struct Cursor {
    root: OwnedFd,
    path: Vec<Vec<u8>>,
    /// Of the first [`OPEN`] folders of `path`; `last` is the folder itself when it is deeper.
    open: Vec<OwnedFd>,
    last: Option<OwnedFd>,
}

impl Cursor {
    fn new(dir: &Path) -> Result<Self, LayerError> {
        let root = rustix::fs::open(dir, FOLDER, Mode::empty()).map_err(|e| LayerError::Io {
            action: "open",
            path: dir.to_owned(),
            source: e.into(),
        })?;
        Ok(Self { root, path: vec![], open: vec![], last: None })
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.last.as_ref().or(self.open.last()).unwrap_or(&self.root).as_fd()
    }

    /// Enters a folder; not a symlink to one.
    fn push(&mut self, name: &[u8]) -> io::Result<()> {
        let fd = rustix::fs::openat(self.fd(), name, FOLDER, Mode::empty())?;
        if self.open.len() == self.path.len() && self.path.len() < OPEN {
            self.open.push(fd);
        } else {
            self.last = Some(fd);
        }
        self.path.push(name.to_vec());
        Ok(())
    }

    fn truncate(&mut self, length: usize) -> io::Result<()> {
        if length >= self.path.len() {
            return Ok(());
        }
        let tail: Vec<_> = self.path.get(OPEN.min(length)..length).unwrap_or_default().to_vec();
        self.path.truncate(length.min(OPEN));
        self.open.truncate(length);
        self.last = None;
        tail.iter().try_for_each(|name| self.push(name))
    }

    /// The path as bytes, and a name below it.
    fn join(&self, name: &[u8]) -> Vec<u8> {
        let mut path = self.path.join(&b'/');
        if !path.is_empty() && !name.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        path
    }
}

struct Unpacker<'a> {
    root: &'a Path,
    cursor: Cursor,
    ownership: Ownership,
    lower: &'a dyn Fn(&Path) -> Option<Lower>,
    /// A layer with whiteouts, or an ordinary archive?
    layer: bool,
    owners: Owners,
    /// Permissions and times of folders, given to them when their content is complete.
    folders: BTreeMap<Vec<u8>, (u32, Timestamps)>,
    buffer: Vec<u8>,
}

impl Unpacker<'_> {
    fn error(&self, action: &'static str, path: &[u8]) -> impl FnOnce(Errno) -> LayerError + use<> {
        let (root, path) = (self.root.to_owned(), path.to_owned());
        move |source| refused(action, &root, &path, source.into())
    }

    fn entry(&mut self, mut header: Header, reader: &mut Reader<impl Read>) -> Result<(), LayerError> {
        header.xattrs.retain(|(name, _)| may_hold(name));
        let mut parent = parts(&header.path, &header, "its name leads above the root with ..")?;
        let Some(name) = parent.pop() else {
            // The root itself: only a folder can stand for it, and only a layer may change it.
            if header.kind == Kind::Directory && self.layer {
                self.cursor.truncate(0).map_err(|e| self.io("open", b"", e))?;
                let root = rustix::io::fcntl_dupfd_cloexec(self.cursor.fd(), 0).map_err(self.error("open", b""))?;
                self.folder(&root, vec![], &header)?;
            }
            return Ok(());
        };
        if self.layer && parent.iter().any(|part| part.starts_with(b".wh.")) {
            if parent.iter().any(|part| part.starts_with(b".wh..wh.")) {
                return Ok(());
            }
            return Err(LayerError::Malformed { reason: format!("{:?} lies in something removed", show(&header.path)) });
        }
        if let Some(hidden) = name.strip_prefix(b".wh.").filter(|_| self.layer) {
            return self.whiteout(&header, parent, hidden);
        }
        let header = &header;
        self.resolve(header, parent)?;
        let path = self.cursor.join(&name);
        if path.len() >= MAX_PATH {
            return Err(LayerError::Malformed { reason: format!("the path {:?}... is longer than 4,096 bytes", show(&path)) });
        }
        let cname = c(&name)?;
        match header.kind {
            Kind::Directory => {
                let fd = self.make_folder(&cname, &path)?;
                self.folder(&fd, path, header)
            }
            Kind::File => {
                self.replace(&cname, &path)?;
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let fd = rustix::fs::openat(self.cursor.fd(), &cname, flags, Mode::RUSR | Mode::WUSR).map_err(self.error("make", &path))?;
                let file = self.content(File::from(fd), &path, reader)?;
                self.finish_file(&file, &path, header, None)
            }
            Kind::Symlink => {
                if header.link.is_empty() || header.link.len() >= MAX_PATH {
                    let reason = format!("the symlink {:?} has a target of {} bytes", show(&path), header.link.len());
                    return Err(LayerError::Malformed { reason });
                }
                self.replace(&cname, &path)?;
                rustix::fs::symlinkat(c(&header.link)?, self.cursor.fd(), &cname).map_err(self.error("make", &path))?;
                self.finish_other(&cname, &path, header, false)
            }
            Kind::Fifo => {
                self.replace(&cname, &path)?;
                rustix::fs::mknodat(self.cursor.fd(), &cname, FileType::Fifo, Mode::RUSR, 0).map_err(self.error("make", &path))?;
                self.finish_other(&cname, &path, header, true)
            }
            Kind::Char | Kind::Block => self.device(&cname, &path, header),
            Kind::Link => self.link(header, &name, &path),
        }
    }

    /// Moves the cursor to a folder. Missing ones are made.
    fn resolve(&mut self, header: &Header, parent: Vec<Vec<u8>>) -> Result<(), LayerError> {
        let common = self.cursor.path.iter().zip(&parent).take_while(|(a, b)| a == b).count();
        self.cursor.truncate(common).map_err(|e| self.io("open", &header.path, e))?;
        let mut pending: VecDeque<Vec<u8>> = parent.into_iter().skip(common).collect();
        let mut symlinks = 0;
        while let Some(part) = pending.pop_front() {
            if part == b".." {
                let up = self.cursor.path.len().saturating_sub(1);
                self.cursor.truncate(up).map_err(|e| self.io("open", &header.path, e))?;
                continue;
            }
            let path = self.cursor.join(&part);
            if path.len() >= MAX_PATH {
                return Err(LayerError::Malformed { reason: format!("the path {:?}... is longer than 4,096 bytes", show(&path)) });
            }
            let target = match self.cursor.push(&part).map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO)) {
                Ok(()) => continue,
                Err(Errno::NOENT) => self.missing_folder(&part, &path)?,
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    let cname = c(&part)?;
                    let stat =
                        rustix::fs::statat(self.cursor.fd(), &cname, AtFlags::SYMLINK_NOFOLLOW).map_err(self.error("read", &path))?;
                    match FileType::from_raw_mode(stat.st_mode) {
                        FileType::Symlink => {
                            let target = rustix::fs::readlinkat(self.cursor.fd(), &cname, vec![]).map_err(self.error("read", &path))?;
                            Some(target.into_bytes())
                        }
                        // Removed by this layer, then made anew: nothing of the lower one shows through.
                        FileType::CharacterDevice if stat.st_rdev == 0 => {
                            let fd = self.make_folder(&cname, &path)?;
                            self.folder_defaults(&fd, path.clone())?;
                            None
                        }
                        _ => {
                            let reason = format!("{:?} lies below {:?}, which is not a folder", show(&header.path), show(&path));
                            return Err(LayerError::Malformed { reason });
                        }
                    }
                }
                Err(e) => return Err(self.error("open", &path)(e)),
            };
            let Some(target) = target else {
                self.cursor.push(&part).map_err(|e| self.io("open", &path, e))?;
                continue;
            };
            symlinks += 1;
            if symlinks > MAX_SYMLINKS || pending.len() > MAX_PATH {
                return Err(LayerError::Escape { entry: show(&header.path), reason: "it goes through too many symlinks" });
            }
            if target.starts_with(b"/") {
                self.cursor.truncate(0).map_err(|e| self.io("open", &path, e))?;
            }
            for part in target.split(|&b| b == b'/').rev().filter(|p| !matches!(*p, b"" | b".")) {
                pending.push_front(part.to_vec());
            }
        }
        Ok(())
    }

    /// A folder on the way that this layer does not have: made like that of the lower layer, or the lower symlink's target.
    fn missing_folder(&mut self, part: &[u8], path: &[u8]) -> Result<Option<Vec<u8>>, LayerError> {
        let lower = (self.lower)(Path::new(OsStr::from_bytes(path)));
        let lower_stat = lower.as_ref().and_then(|l| rustix::fs::lstat(&l.path).ok());
        let lower_kind = lower_stat.as_ref().map(|s| FileType::from_raw_mode(s.st_mode));
        if let (Some(lower), Some(FileType::Symlink)) = (&lower, lower_kind) {
            let target = rustix::fs::readlink(&lower.path, vec![]).map_err(self.error("read", path))?;
            return Ok(Some(target.into_bytes()));
        }
        let cname = c(part)?;
        rustix::fs::mkdirat(self.cursor.fd(), &cname, Mode::RWXU).map_err(self.error("make", path))?;
        let fd = rustix::fs::openat(self.cursor.fd(), &cname, FOLDER, Mode::empty()).map_err(self.error("open", path))?;
        match (lower_stat, lower) {
            (Some(stat), Some(lower)) if lower_kind == Some(FileType::Directory) => {
                let like = self.like(&lower, &stat, Kind::Directory);
                self.folder(&fd, path.to_vec(), &like)?;
            }
            _ => self.folder_defaults(&fd, path.to_vec())?,
        }
        Ok(None)
    }

    fn folder_defaults(&mut self, fd: &OwnedFd, path: Vec<u8>) -> Result<(), LayerError> {
        let mut header = Header::new(vec![], Kind::Directory);
        header.mode = 0o755;
        self.folder(fd, path, &header)
    }

    /// A folder of this name, the one that is there or a new one.
    fn make_folder(&mut self, name: &CStr, path: &[u8]) -> Result<OwnedFd, LayerError> {
        let mut opaque = false;
        match rustix::fs::openat(self.cursor.fd(), name, FOLDER, Mode::empty()) {
            Ok(fd) => return Ok(fd),
            Err(Errno::NOENT) => {}
            Err(Errno::NOTDIR | Errno::LOOP) => {
                let stat = rustix::fs::statat(self.cursor.fd(), name, AtFlags::SYMLINK_NOFOLLOW).map_err(self.error("read", path))?;
                // A whiteout before the folder: the lower folder stays removed.
                opaque = self.layer && FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0;
                self.replace(name, path)?;
            }
            Err(e) => return Err(self.error("open", path)(e)),
        }
        rustix::fs::mkdirat(self.cursor.fd(), name, Mode::RWXU).map_err(self.error("make", path))?;
        let fd = rustix::fs::openat(self.cursor.fd(), name, FOLDER, Mode::empty()).map_err(self.error("open", path))?;
        if opaque {
            self.set_opaque(fd.as_fd(), path)?;
        }
        Ok(fd)
    }

    /// Removes what an entry replaces.
    fn replace(&mut self, name: &CStr, path: &[u8]) -> Result<(), LayerError> {
        match rustix::fs::unlinkat(self.cursor.fd(), name, AtFlags::empty()) {
            Err(Errno::NOENT) => return Ok(()),
            Ok(()) => {}
            Err(_) => remove(self.cursor.fd(), name).map_err(|e| self.io("replace", path, e))?,
        }
        self.forget(path);
        Ok(())
    }

    /// Drops what is known of a path and of all below it.
    fn forget(&mut self, path: &[u8]) {
        let below = |p: &[u8]| p.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest[0] == b'/');
        let folders: Vec<_> =
            self.folders.range(path.to_vec()..).take_while(|(p, _)| p.starts_with(path)).map(|(p, _)| p.clone()).collect();
        for path in folders.iter().filter(|p| below(p)) {
            self.folders.remove(path);
        }
        let from = OsStr::from_bytes(path).to_owned();
        let owners: Vec<_> =
            self.owners.range(from..).take_while(|(p, _)| p.as_bytes().starts_with(path)).map(|(p, _)| p.clone()).collect();
        for path in owners.iter().filter(|p| below(p.as_bytes())) {
            self.owners.remove(path);
        }
    }

    fn whiteout(&mut self, header: &Header, parent: Vec<Vec<u8>>, hidden: &[u8]) -> Result<(), LayerError> {
        if hidden == b".wh..opq" {
            self.resolve(header, parent)?;
            let path = self.cursor.join(b"");
            return self.set_opaque(self.cursor.fd(), &path);
        }
        if hidden.starts_with(b".wh.") {
            // Notes of AUFS to itself.
            return Ok(());
        }
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(LayerError::Escape { entry: show(&header.path), reason: "it removes the folder it is in, or the one above" });
        }
        self.resolve(header, parent)?;
        let (name, path) = (c(hidden)?, self.cursor.join(hidden));
        self.replace(&name, &path)?;
        // Anybody may make this one device.
        rustix::fs::mknodat(self.cursor.fd(), &name, FileType::CharacterDevice, Mode::empty(), 0)
            .map_err(self.error("make the whiteout", &path))
    }

    fn set_opaque(&self, fd: BorrowedFd<'_>, path: &[u8]) -> Result<(), LayerError> {
        rustix::fs::fsetxattr(fd, OPAQUE, b"y", XattrFlags::empty())
            .map_err(self.error("mark as opaque (the file system must know user.* attributes)", path))
    }

    fn content(&mut self, mut file: File, path: &[u8], reader: &mut Reader<impl Read>) -> Result<File, LayerError> {
        let (mut end, mut position) = (0, 0);
        while let Some((at, n)) = reader.piece(&mut self.buffer).map_err(unreadable)? {
            let moved = if at == position { Ok(at) } else { io::Seek::seek(&mut file, io::SeekFrom::Start(at)) };
            moved.and_then(|_| file.write_all(&self.buffer[..n])).map_err(|e| self.io("write", path, e))?;
            position = at + n as u64;
            end = position;
        }
        if reader.size() > end {
            file.set_len(reader.size()).map_err(|e| self.io("write", path, e))?;
        }
        Ok(file)
    }

    fn device(&mut self, name: &CStr, path: &[u8], header: &Header) -> Result<(), LayerError> {
        let kind = if header.kind == Kind::Char { FileType::CharacterDevice } else { FileType::BlockDevice };
        let (major, minor) = header.device;
        let whiteout = header.kind == Kind::Char && header.device == (0, 0);
        if whiteout && !self.layer {
            return Err(LayerError::Malformed {
                reason: format!("{:?} is the character device 0:0, which marks removed files", show(path)),
            });
        }
        self.replace(name, path)?;
        if whiteout || self.ownership == Ownership::Real {
            let device = rustix::fs::makedev(major, minor);
            match rustix::fs::mknodat(self.cursor.fd(), name, kind, Mode::RUSR, device) {
                Ok(()) if whiteout => return Ok(()),
                Ok(()) => return self.finish_other(name, path, header, true),
                Err(Errno::PERM | Errno::ACCESS | Errno::INVAL) if !whiteout => {}
                Err(e) => return Err(self.error("make", path)(e)),
            }
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(self.cursor.fd(), name, flags, Mode::RUSR | Mode::WUSR).map_err(self.error("make", path))?;
        self.finish_file(&fd, path, header, Some((kind.as_raw_mode() | header.mode, major, minor)))
    }

    fn link(&mut self, header: &Header, name: &[u8], path: &[u8]) -> Result<(), LayerError> {
        let destination = self.cursor.path.clone();
        let mut parent = parts(&header.link, header, "it is a hard link to something above the root")?;
        let Some(target) = parent.pop() else {
            return Err(LayerError::Escape { entry: show(&header.path), reason: "it is a hard link to the root" });
        };
        let nothing =
            || LayerError::Malformed { reason: format!("{:?} links to {:?}, which is not there", show(&header.path), show(&header.link)) };
        // The folder may exist in a lower layer only, so it is made here like the parents of any entry.
        self.resolve(header, parent)?;
        let target_path = self.cursor.join(&target);
        if target_path == path {
            return Ok(());
        }
        let (target, name) = (c(&target)?, c(name)?);
        let from = rustix::io::fcntl_dupfd_cloexec(self.cursor.fd(), 0).map_err(self.error("open", &target_path))?;
        self.resolve(header, destination)?;
        match rustix::fs::statat(&from, &target, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => {
                let kind = FileType::from_raw_mode(stat.st_mode);
                if kind == FileType::Directory || (kind == FileType::CharacterDevice && stat.st_rdev == 0) {
                    return Err(nothing());
                }
                self.replace(&name, path)?;
                rustix::fs::linkat(&from, &target, self.cursor.fd(), &name, AtFlags::empty()).map_err(self.error("link", path))?;
                if let Some(owner) = self.owners.get(OsStr::from_bytes(&target_path)).copied() {
                    self.owners.insert(OsStr::from_bytes(path).to_owned(), owner);
                }
                Ok(())
            }
            Err(Errno::NOENT) => {
                let lower = (self.lower)(Path::new(OsStr::from_bytes(&target_path))).ok_or_else(nothing)?;
                self.copy_up(&lower, &name, path, nothing)
            }
            Err(e) => Err(self.error("read", &target_path)(e)),
        }
    }

    /// A copy of a file of a lower layer, as overlayfs makes when it is linked.
    fn copy_up(&mut self, lower: &Lower, name: &CStr, path: &[u8], nothing: impl Fn() -> LayerError) -> Result<(), LayerError> {
        let stat = rustix::fs::lstat(&lower.path).map_err(|_| nothing())?;
        let header = self.like(lower, &stat, Kind::File);
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {
                let mut source = File::open(&lower.path).map_err(|e| self.io("open", path, e))?;
                self.replace(name, path)?;
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let fd = rustix::fs::openat(self.cursor.fd(), name, flags, Mode::RUSR | Mode::WUSR).map_err(self.error("make", path))?;
                let mut file = File::from(fd);
                io::copy(&mut source, &mut file).map_err(|e| self.io("write", path, e))?;
                self.finish_file(&file, path, &header, lower.owner.and_then(|owner| owner.device()))
            }
            FileType::Symlink => {
                let target = rustix::fs::readlink(&lower.path, vec![]).map_err(|_| nothing())?;
                self.replace(name, path)?;
                rustix::fs::symlinkat(&target, self.cursor.fd(), name).map_err(self.error("make", path))?;
                self.finish_other(name, path, &header, false)
            }
            _ => Err(nothing()),
        }
    }

    /// Everything but the content of a file or folder of a lower layer.
    fn like(&self, lower: &Lower, stat: &Stat, kind: Kind) -> Header {
        let mut header = Header::new(vec![], kind);
        header.mode = stat.st_mode & 0o7777;
        if let Some(owner) = lower.owner {
            (header.uid, header.gid) = (owner.uid.into(), owner.gid.into());
            header.mode = owner.permissions().unwrap_or(header.mode);
        } else if self.ownership == Ownership::Real {
            // Where the disk holds one id only, it says nothing.
            (header.uid, header.gid) = (stat.st_uid.into(), stat.st_gid.into());
        }
        let lower = &lower.path;
        (header.mtime, header.mtime_nanos) = (stat.st_mtime, stat.st_mtime_nsec as u32);
        let mut buffer = vec![0; 64 * 1024];
        let length = rustix::fs::llistxattr(lower, &mut buffer[..]).unwrap_or(0);
        let names = buffer[..length].to_vec();
        for name in names.split(|&b| b == 0).filter(|n| may_hold(n) || *n == STASHED_CAPABILITY.to_bytes()) {
            if let Ok(n) = rustix::fs::lgetxattr(lower, name, &mut buffer[..]) {
                header.xattrs.push((name.to_vec(), buffer[..n].to_vec()));
            }
        }
        header
    }

    /// Who owns it: on disk where that works, else in the table.
    fn own(
        &mut self,
        path: &[u8],
        header: &Header,
        node: Option<(u32, u32, u32)>,
        chown: impl FnOnce(Uid, Gid) -> rustix::io::Result<()>,
    ) -> Result<(), LayerError> {
        let id = |id: u64| u32::try_from(id).ok().filter(|&id| id != u32::MAX);
        let (Some(uid), Some(gid)) = (id(header.uid), id(header.gid)) else {
            return Err(LayerError::Malformed { reason: format!("the owner of {:?} is not a 32-bit id", show(path)) });
        };
        let on_disk = self.ownership == Ownership::Real
            && match chown(Uid::from_raw(uid), Gid::from_raw(gid)) {
                Ok(()) => true,
                // The id is not mapped here.
                Err(Errno::PERM | Errno::INVAL | Errno::OVERFLOW) => false,
                Err(e) => return Err(self.error("change the owner of", path)(e)),
            };
        if node.is_some() || (!on_disk && (uid, gid) != (0, 0)) {
            self.owners.insert(OsStr::from_bytes(path).to_owned(), Owner { uid, gid, node });
        } else {
            self.owners.remove(OsStr::from_bytes(path));
        }
        Ok(())
    }

    /// Owner, then attributes (a change of owner drops capabilities), then permissions (it cuts them too, and
    /// they may forbid setting attributes), then time.
    fn finish_file(&mut self, fd: &impl AsFd, path: &[u8], header: &Header, node: Option<(u32, u32, u32)>) -> Result<(), LayerError> {
        let fd = fd.as_fd();
        let (mode, permissions) = self.ownership.permissions(false, header.mode);
        self.own(path, header, node.or(permissions), |uid, gid| rustix::fs::fchown(fd, Some(uid), Some(gid)))?;
        for (name, value) in &header.xattrs {
            self.set_attribute(fd, path, name, value)?;
        }
        rustix::fs::fchmod(fd, Mode::from_raw_mode(mode)).map_err(self.error("change the permissions of", path))?;
        rustix::fs::futimens(fd, &times(header)).map_err(self.error("set the time of", path))
    }

    /// What cannot be opened.
    fn finish_other(&mut self, name: &CStr, path: &[u8], header: &Header, chmod: bool) -> Result<(), LayerError> {
        let parent = rustix::io::fcntl_dupfd_cloexec(self.cursor.fd(), 0).map_err(self.error("open", path))?;
        self.own(path, header, None, |uid, gid| rustix::fs::chownat(&parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW))?;
        if chmod {
            // Made a moment ago in a folder that only this process writes to: it is no symlink.
            rustix::fs::chmodat(&parent, name, Mode::from_raw_mode(header.mode), AtFlags::empty())
                .map_err(self.error("change the permissions of", path))?;
        }
        rustix::fs::utimensat(&parent, name, &times(header), AtFlags::SYMLINK_NOFOLLOW).map_err(self.error("set the time of", path))
    }

    /// Owner and attributes of a folder now, permissions and time at the end.
    fn folder(&mut self, fd: &OwnedFd, path: Vec<u8>, header: &Header) -> Result<(), LayerError> {
        let (mode, permissions) = self.ownership.permissions(true, header.mode);
        self.own(&path, header, permissions, |uid, gid| rustix::fs::fchown(fd, Some(uid), Some(gid)))?;
        for (name, value) in &header.xattrs {
            self.set_attribute(fd.as_fd(), &path, name, value)?;
        }
        self.folders.insert(path, (mode, times(header)));
        Ok(())
    }

    /// Deepest first, so that no permission stands in the way.
    fn finish_folders(&mut self) -> Result<(), LayerError> {
        for (path, (mode, times)) in std::mem::take(&mut self.folders).into_iter().rev() {
            let parent: Vec<Vec<u8>> = if path.is_empty() { vec![] } else { path.split(|&b| b == b'/').map(<[u8]>::to_vec).collect() };
            let header = Header::new(path.clone(), Kind::Directory);
            self.resolve(&header, parent)?;
            rustix::fs::fchmod(self.cursor.fd(), Mode::from_raw_mode(mode)).map_err(self.error("change the permissions of", &path))?;
            rustix::fs::futimens(self.cursor.fd(), &times).map_err(self.error("set the time of", &path))?;
        }
        Ok(())
    }

    fn set_attribute(&self, fd: BorrowedFd<'_>, path: &[u8], name: &[u8], value: &[u8]) -> Result<(), LayerError> {
        match rustix::fs::fsetxattr(fd, name, value, XattrFlags::empty()) {
            // File systems without attributes lose them, as with every other tool.
            Ok(()) | Err(Errno::NOTSUP) => Ok(()),
            Err(Errno::PERM) if name == CAPABILITY.to_bytes() => {
                rustix::fs::fsetxattr(fd, STASHED_CAPABILITY, value, XattrFlags::empty()).map_err(self.error("set an attribute of", path))
            }
            // Access lists that name ids which are not mapped here.
            Err(Errno::PERM | Errno::INVAL) if name.starts_with(b"system.") => Ok(()),
            Err(e) => Err(self.error("set an attribute of", path)(e)),
        }
    }

    fn io(&self, action: &'static str, path: &[u8], source: io::Error) -> LayerError {
        refused(action, self.root, path, source)
    }
}

/// What the file system refuses: the machine's fault, unless no file system could hold the entry.
fn refused(action: &'static str, root: &Path, path: &[u8], source: io::Error) -> LayerError {
    let malformed = |what| LayerError::Malformed { reason: format!("{:?} {what}", show(path)) };
    match source.kind() {
        _ if source.raw_os_error() == Some(Errno::NAMETOOLONG.raw_os_error()) => {
            malformed("has a name or a link target that is longer than file systems take")
        }
        io::ErrorKind::FileTooLarge => malformed("is larger than file systems take"),
        _ => LayerError::Io { action, path: root.join(OsStr::from_bytes(path)), source },
    }
}

/// Attributes that a layer may set: not overlayfs' marks, not ours, not those of security modules or of the system's own use.
fn may_hold(name: &[u8]) -> bool {
    match name {
        b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default" => true,
        _ => {
            name.starts_with(b"user.")
                && !name.starts_with(b"user.overlay.")
                && !name.starts_with(b"user.ovenbird.")
                && name.len() > 5
                && name.len() <= 255
                && !name.contains(&0)
        }
    }
}

fn times(header: &Header) -> Timestamps {
    let time = Timespec { tv_sec: header.mtime, tv_nsec: header.mtime_nanos.into() };
    Timestamps { last_access: time, last_modification: time }
}
