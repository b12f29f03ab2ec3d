//! A diff folder as a tar stream.

use std::collections::HashMap;
use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::growth::Growth;
use crate::store::Store;

use super::compress::compress;
use super::search::{Found, Needles, Watch};
use super::tar::{self, Header, Kind};
use super::walk::{FOLDER, Walk, open_lent};
use super::{CAPABILITY, LayerError, MAX_PATH, Owner, Owners, PackOptions, Packed, STASHED_CAPABILITY, untold_owner};

/// Packs the diff folder into a blob of `store`: sorted, PAX, hard links kept, whiteouts turned into OCI form.
pub fn pack(dir: &Path, owners: &Owners, options: &PackOptions, store: &Store) -> Result<Packed, LayerError> {
    pack_searched(dir, owners, options, store, &Needles::default(), &Elsewhere::new(), None).map(|(packed, _)| packed)
}

/// Content that is not where its file is: by device and inode of the file, which says size and everything else. Read from where it stands.
pub type Elsewhere<'a> = HashMap<(u64, u64), &'a File>;

/// The same, with the content of some files from `elsewhere`; says which of the needles went into the layer, and where. Nothing is read twice.
///
/// Who follows `growth` may read the blob while it is made, and sees nothing of a needle.
pub fn pack_searched(
    dir: &Path,
    owners: &Owners,
    options: &PackOptions,
    store: &Store,
    needles: &Needles,
    elsewhere: &Elsewhere<'_>,
    growth: Option<&Growth>,
) -> Result<(Packed, Vec<Found>), LayerError> {
    let mut watch = Watch::new(needles, growth);
    let packed =
        compress(options, store, needles.longest, growth, |feed| Packer::new(dir, owners, options.mtime, &mut watch, elsewhere).run(feed))?;
    Ok((packed, watch.found()))
}

/// Looks for the needles in what [`pack`] would pack, and packs nothing.
pub fn search(dir: &Path, owners: &Owners, needles: &Needles) -> Result<Vec<Found>, LayerError> {
    let mut watch = Watch::new(needles, None);
    Packer::new(dir, owners, None, &mut watch, &Elsewhere::new()).run(&mut Nowhere(vec![0; 256 * 1024]))?;
    Ok(watch.found())
}

/// Where a tar goes, in order.
pub(super) trait Sink {
    /// Room for the next bytes, never empty; tell with [`advance`](Self::advance) how much of it was filled.
    fn room(&mut self) -> Result<&mut [u8], LayerError>;
    /// The first `n` bytes of the room are filled.
    fn advance(&mut self, n: usize);
    /// Adds bytes.
    fn write(&mut self, bytes: &[u8]) -> Result<(), LayerError>;
}

/// Takes a tar that nobody wants.
struct Nowhere(Vec<u8>);

impl Sink for Nowhere {
    fn room(&mut self) -> Result<&mut [u8], LayerError> {
        Ok(&mut self.0)
    }

    fn advance(&mut self, _: usize) {}

    fn write(&mut self, _: &[u8]) -> Result<(), LayerError> {
        Ok(())
    }
}

struct Packer<'a, 'n> {
    root: &'a Path,
    owners: &'a Owners,
    mtime: Option<i64>,
    watch: &'a mut Watch<'n>,
    elsewhere: &'a Elsewhere<'a>,
    /// Inodes with several names: the first one, and how many are still to come.
    links: HashMap<(u64, u64), (Vec<u8>, u64)>,
    /// Buffers used again and again: headers, names and value of xattrs.
    head: Vec<u8>,
    list: Vec<u8>,
    value: Vec<u8>,
}

/// What the xattrs of an inode say.
#[derive(Default)]
struct Attributes {
    kept: Vec<(Vec<u8>, Vec<u8>)>,
    opaque: bool,
    whiteout: bool,
}

impl<'a, 'n> Packer<'a, 'n> {
    fn new(root: &'a Path, owners: &'a Owners, mtime: Option<i64>, watch: &'a mut Watch<'n>, elsewhere: &'a Elsewhere<'a>) -> Self {
        Self { root, owners, mtime, watch, elsewhere, links: HashMap::new(), head: vec![], list: vec![0; 4096], value: vec![] }
    }

    fn run(&mut self, feed: &mut impl Sink) -> Result<(), LayerError> {
        let root = rustix::fs::open(self.root, FOLDER, Mode::empty()).map_err(|e| self.error("open", b"")(e.into()))?;
        let mut walk = Walk::new(root).map_err(self.error("list", b""))?;
        loop {
            while let Some(name) = walk.next_name() {
                self.entry(&mut walk, name, feed)?;
            }
            let left = walk.path().to_vec();
            if walk.leave().map_err(self.error("leave", &left))?.is_none() {
                break;
            }
        }
        feed.write(&[0; 2 * tar::BLOCK])
    }

    fn entry(&mut self, walk: &mut Walk, name: CString, feed: &mut impl Sink) -> Result<(), LayerError> {
        let mut path = [walk.path(), name.to_bytes()].concat();
        if path.len() >= MAX_PATH {
            return Err(self.unpackable(&path, "its path is longer than 4,096 bytes, which no program can open"));
        }
        let dir = walk.dir().map_err(self.error("open", &path))?;
        let stat = rustix::fs::statat(dir, &name, AtFlags::SYMLINK_NOFOLLOW).map_err(|e| self.error("read", &path)(e.into()))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let owner = if self.owners.is_empty() { None } else { self.owners.get(OsStr::from_bytes(&path)).copied() };
        let mut header = self.header(&stat, owner.as_ref());

        let whiteout = kind == FileType::CharacterDevice && stat.st_rdev == 0;
        if !whiteout && name.to_bytes().starts_with(b".wh.") {
            return Err(self.unpackable(&path, "names that begin with .wh. mean removed files in a layer; rename it"));
        }
        if kind == FileType::Socket {
            // Without its server it means nothing, and tar has no type for it.
            return Ok(());
        }
        // Overlayfs links its whiteouts together, so they come before links.
        if whiteout {
            return self.whiteout(walk.path(), &name, feed);
        }
        if kind != FileType::Directory && stat.st_nlink > 1 && self.link(&stat, &path, &mut header) {
            return self.put(&header, feed);
        }
        match kind {
            FileType::Directory => {
                let (fd, restore) = open_lent(dir, &name, FOLDER, Mode::RWXU).map_err(self.error("open", &path))?;
                let attributes = self.attributes(&fd, &path)?;
                walk.enter(fd, name, restore).map_err(self.error("list", &path))?;
                path.push(b'/');
                (header.kind, header.path, header.xattrs) = (Kind::Directory, path, attributes.kept);
                self.put(&header, feed)?;
                if attributes.opaque {
                    self.whiteout(walk.path(), c".wh..opq", feed)?;
                }
                Ok(())
            }
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let (fd, restore) = open_lent(dir, &name, flags, Mode::RUSR).map_err(self.error("open", &path))?;
                if let Some(mode) = restore {
                    rustix::fs::fchmod(&fd, mode).map_err(|e| self.error("restore the permissions of", &path)(e.into()))?;
                }
                let attributes = self.attributes(&fd, &path)?;
                if attributes.whiteout {
                    return self.whiteout(walk.path(), &name, feed);
                }
                header.path = path;
                header.xattrs = attributes.kept;
                if header.kind != Kind::File {
                    return self.put(&header, feed);
                }
                header.size = stat.st_size as u64;
                self.put(&header, feed)?;
                match self.elsewhere.get(&(stat.st_dev, stat.st_ino)) {
                    Some(file) => self.content(file.as_fd(), &header, feed),
                    None => self.content(fd.as_fd(), &header, feed),
                }
            }
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(dir, &name, vec![]).map_err(|e| self.error("read", &path)(e.into()))?;
                (header.kind, header.path, header.link, header.mode) = (Kind::Symlink, path, target.into_bytes(), 0o777);
                self.put(&header, feed)
            }
            FileType::CharacterDevice | FileType::BlockDevice | FileType::Fifo => {
                header.kind = match kind {
                    FileType::CharacterDevice => Kind::Char,
                    FileType::BlockDevice => Kind::Block,
                    _ => Kind::Fifo,
                };
                if header.kind != Kind::Fifo {
                    header.device = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
                }
                header.path = path;
                self.put(&header, feed)
            }
            _ => Err(self.unpackable(&path, "it is of a type that no archive knows; remove it")),
        }
    }

    /// Owner, permissions and time: from the table where it has them, else from the disk. `kind` is that of a recorded node.
    fn header(&self, stat: &Stat, owner: Option<&Owner>) -> Header {
        let mut header = Header::new(vec![], Kind::File);
        header.mode = stat.st_mode & 0o7777;
        let (uid, gid) = owner.map_or_else(|| untold_owner(stat.st_uid, stat.st_gid), |o| (o.uid, o.gid));
        (header.uid, header.gid) = (uid.into(), gid.into());
        header.mtime = self.mtime.unwrap_or(stat.st_mtime);
        if let Some(mode) = owner.and_then(Owner::permissions) {
            header.mode = mode;
        }
        if let Some((mode, major, minor)) = owner.and_then(Owner::device) {
            header.mode = mode & 0o7777;
            header.device = (major, minor);
            header.kind = if FileType::from_raw_mode(mode) == FileType::BlockDevice { Kind::Block } else { Kind::Char };
        }
        header
    }

    /// A later name of an inode that was packed already? Then `header` becomes the link entry.
    fn link(&mut self, stat: &Stat, path: &[u8], header: &mut Header) -> bool {
        use std::collections::hash_map::Entry;
        match self.links.entry((stat.st_dev, stat.st_ino)) {
            Entry::Vacant(vacant) => {
                vacant.insert((path.to_vec(), stat.st_nlink - 1));
                false
            }
            Entry::Occupied(mut first) => {
                (header.kind, header.path, header.device) = (Kind::Link, path.to_vec(), (0, 0));
                header.link.clone_from(&first.get().0);
                first.get_mut().1 = first.get().1.saturating_sub(1);
                if first.get().1 == 0 {
                    first.remove();
                }
                true
            }
        }
    }

    /// `.wh.NAME` in the folder `prefix`.
    fn whiteout(&mut self, prefix: &[u8], name: &CStr, feed: &mut impl Sink) -> Result<(), LayerError> {
        let mut header = Header::new([prefix, b".wh.", name.to_bytes()].concat(), Kind::File);
        // Overlayfs shares one inode among whiteouts of a boot, so its time says nothing.
        header.mtime = self.mtime.unwrap_or(0);
        self.put(&header, feed)
    }

    fn put(&mut self, header: &Header, feed: &mut impl Sink) -> Result<(), LayerError> {
        self.watch.entry(header);
        self.head.clear();
        tar::encode(header, &mut self.head);
        feed.write(&self.head)
    }

    fn content(&mut self, fd: BorrowedFd<'_>, header: &Header, feed: &mut impl Sink) -> Result<(), LayerError> {
        let root = self.root;
        let error = |source: io::Error| LayerError::Io { action: "read", path: root.join(OsStr::from_bytes(&header.path)), source };
        let changed = || error(io::Error::other("it changed while it was being packed; build again"));
        let mut left = header.size;
        while left > 0 {
            let room = feed.room()?;
            let most = (room.len() as u64).min(left) as usize;
            match rustix::io::read(fd, &mut room[..most]) {
                Ok(0) => return Err(changed()),
                Ok(n) => {
                    self.watch.content(&header.path, &room[..n]);
                    feed.advance(n);
                    left -= n as u64;
                }
                Err(Errno::INTR) => {}
                Err(e) => return Err(error(e.into())),
            }
        }
        if rustix::io::read(fd, &mut [0; 1]).map_err(|e| error(e.into()))? > 0 {
            return Err(changed());
        }
        feed.write(&[0; tar::BLOCK][..tar::padding(header.size)])
    }

    fn attributes(&mut self, fd: &OwnedFd, path: &[u8]) -> Result<Attributes, LayerError> {
        let mut attributes = Attributes::default();
        let length = loop {
            match rustix::fs::flistxattr(fd, &mut self.list[..]) {
                Ok(n) => break n,
                Err(Errno::NOTSUP | Errno::NOSYS) => return Ok(attributes),
                Err(Errno::RANGE) if self.list.len() < 1 << 20 => self.list.resize(self.list.len() * 4, 0),
                Err(e) => return Err(self.error("list the attributes of", path)(e.into())),
            }
        };
        let list = std::mem::take(&mut self.list);
        let result = self.collect(fd, path, &list[..length], &mut attributes);
        self.list = list;
        result.map(|()| attributes)
    }

    fn collect(&mut self, fd: &OwnedFd, path: &[u8], list: &[u8], attributes: &mut Attributes) -> Result<(), LayerError> {
        for name in list.split_inclusive(|&b| b == 0) {
            let Ok(name) = CStr::from_bytes_with_nul(name) else { continue };
            let bytes = name.to_bytes();
            if let Some(mark) = bytes.strip_prefix(b"user.overlay.").or_else(|| bytes.strip_prefix(b"trusted.overlay.")) {
                match mark {
                    b"opaque" => attributes.opaque = self.read_attribute(fd, path, name)?.is_some_and(|v| v == b"y"),
                    b"whiteout" => attributes.whiteout = true,
                    b"redirect" | b"metacopy" => {
                        return Err(
                            self.unpackable(path, "part of it is in a lower layer: mount overlayfs with redirect_dir=off,metacopy=off")
                        );
                    }
                    _ => {}
                }
                continue;
            }
            let kept = match bytes {
                b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default" => bytes,
                _ if name == STASHED_CAPABILITY => CAPABILITY.to_bytes(),
                _ if bytes.starts_with(b"user.") => bytes,
                _ => continue,
            };
            if kept.contains(&b'=') {
                return Err(
                    self.unpackable(path, "an extended attribute has `=` in its name, which tar cannot hold; remove it (setfattr -x)")
                );
            }
            if let Some(value) = self.read_attribute(fd, path, name)? {
                let value = if kept == CAPABILITY.to_bytes() { plain_capability(value) } else { value.to_vec() };
                attributes.kept.push((kept.to_vec(), value));
            }
        }
        attributes.kept.sort();
        attributes.kept.dedup_by(|a, b| a.0 == b.0);
        Ok(())
    }

    fn read_attribute(&mut self, fd: &OwnedFd, path: &[u8], name: &CStr) -> Result<Option<&[u8]>, LayerError> {
        // XATTR_SIZE_MAX.
        self.value.resize(64 * 1024, 0);
        match rustix::fs::fgetxattr(fd, name, &mut self.value[..]) {
            Ok(n) => Ok(Some(&self.value[..n])),
            Err(Errno::NODATA) => Ok(None),
            Err(e) => Err(self.error("read an attribute of", path)(e.into())),
        }
    }

    fn path(&self, path: &[u8]) -> PathBuf {
        self.root.join(OsStr::from_bytes(path))
    }

    fn error(&self, action: &'static str, path: &[u8]) -> impl FnOnce(io::Error) -> LayerError + use<> {
        let path = self.path(path);
        move |source| LayerError::Io { action, path, source }
    }

    fn unpackable(&self, path: &[u8], reason: &'static str) -> LayerError {
        LayerError::Unpackable { path: self.path(path), reason }
    }
}

/// A capability that belongs to a user namespace (version 3) as one that belongs to all (version 2): in the image it is plain.
/// Source: linux/capability.h, `vfs_ns_cap_data`.
fn plain_capability(value: &[u8]) -> Vec<u8> {
    match value {
        [flags, _, _, 3, data @ ..] if data.len() == 20 => [&[*flags, 0, 0, 2], &data[..16]].concat(),
        _ => value.to_vec(),
    }
}
