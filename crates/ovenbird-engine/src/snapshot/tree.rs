//! Read-only access to a tree of files, whatever holds it.
//!
//! Everything below a folder handle is reached with `*at` calls, so that nobody who changes the
//! tree at the same time can lead a reader outside of it.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

/// Most symbolic links that one path may go through.
const MAX_LINKS: usize = 255;
/// Longest path of a file in an image, with its end (PATH_MAX).
pub(crate) const MAX_PATH: usize = 4096;

/// A path that no program could open. Inside the [`io::Error`] of a walk.
#[derive(Debug, thiserror::Error)]
#[error("the path {shown}… ({depth} folders deep) is longer than 4,096 bytes, which no program can open")]
pub(crate) struct PathTooLong {
    /// Its beginning.
    pub(crate) shown: String,
    pub(crate) depth: usize,
}

/// Refuses a path that is too long for a layer.
pub(crate) fn check_length(path: &Path) -> Result<(), PathTooLong> {
    if path.as_os_str().len() < MAX_PATH {
        return Ok(());
    }
    let shown = format!("/{}", path.display()).chars().take(80).collect();
    Err(PathTooLong { shown, depth: path.components().count() - 1 })
}

impl From<PathTooLong> for io::Error {
    fn from(error: PathTooLong) -> Self {
        Self::new(io::ErrorKind::InvalidFilename, error)
    }
}

/// Type of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Regular file.
    File,
    /// Folder.
    Dir,
    /// Symbolic link.
    Symlink,
    /// Character device (major, minor).
    Char(u32, u32),
    /// Block device (major, minor).
    Block(u32, u32),
    /// Named pipe.
    Fifo,
    /// Socket (never copied into layers).
    Socket,
}

impl Kind {
    /// From the type and the device number of a `stat`.
    pub fn of(stat: &Stat) -> Self {
        let device = || (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        Self::from_mode(stat.st_mode, device())
    }

    /// From `st_mode` and a device number (major, minor).
    pub fn from_mode(mode: u32, (major, minor): (u32, u32)) -> Self {
        match FileType::from_raw_mode(mode) {
            FileType::Directory => Self::Dir,
            FileType::Symlink => Self::Symlink,
            FileType::CharacterDevice => Self::Char(major, minor),
            FileType::BlockDevice => Self::Block(major, minor),
            FileType::Fifo => Self::Fifo,
            FileType::Socket => Self::Socket,
            _ => Self::File,
        }
    }
}

/// What is known of an entry without reading its content. Never follows a symlink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Type.
    pub kind: Kind,
    /// Permission bits with setuid, setgid, sticky (0o7777).
    pub mode: u32,
    /// Owner as meant in the image (the owners table applied).
    pub uid: u32,
    /// Group as meant in the image.
    pub gid: u32,
    /// Bytes.
    pub size: u64,
    /// Seconds and nanoseconds since 1970.
    pub mtime: (i64, u32),
    /// Last change of content, attributes or names; seconds and nanoseconds since 1970.
    pub ctime: (i64, u32),
    /// Device, inode and link count on disk, to find hard links.
    pub inode: (u64, u64, u64),
}

impl Entry {
    /// What the disk says, without an owners table.
    pub fn from_stat(stat: &Stat) -> Self {
        Self {
            kind: Kind::of(stat),
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            mtime: (stat.st_mtime, stat.st_mtime_nsec as u32),
            ctime: (stat.st_ctime, stat.st_ctime_nsec as u32),
            #[allow(clippy::unnecessary_cast, clippy::useless_conversion, reason = "the width of st_nlink differs between machines")]
            inode: (stat.st_dev, stat.st_ino, stat.st_nlink as u64),
        }
    }

    /// Is it a folder?
    pub fn is_dir(&self) -> bool {
        self.kind == Kind::Dir
    }
}

/// An open folder and a name in it: a way to an entry that resolves no path.
#[derive(Debug, Clone)]
pub struct Location {
    /// The folder that really holds the entry.
    pub dir: Arc<OwnedFd>,
    /// Name in it; `.` is the folder itself.
    pub name: OsString,
}

impl Location {
    /// Opens a regular file for reading; anything else is refused.
    pub fn open(&self) -> io::Result<File> {
        // NONBLOCK: a pipe that takes the file's place must not stop the build.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = File::from(rustix::fs::openat(&self.dir, &self.name, flags, Mode::empty())?);
        if FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) != FileType::RegularFile {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        Ok(file)
    }

    /// `lstat`.
    pub fn stat(&self) -> io::Result<Stat> {
        Ok(rustix::fs::statat(&self.dir, &self.name, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// Target of a symbolic link.
    pub fn read_link(&self) -> io::Result<PathBuf> {
        let target = rustix::fs::readlinkat(&self.dir, &self.name, Vec::new())?;
        Ok(PathBuf::from(OsString::from_vec(target.into_bytes())))
    }

    /// Extended attributes that belong into an image, sorted by name.
    pub fn xattrs(&self) -> io::Result<Vec<(OsString, Vec<u8>)>> {
        // There is no `listxattrat` before Linux 6.13; the magic link reaches the same entry.
        let path = self.magic_path();
        read_xattrs(|buffer| rustix::fs::llistxattr(&path, buffer), |name, buffer| rustix::fs::lgetxattr(&path, name, buffer))
    }

    /// A path of this process that names the entry as long as the folder is open; its last component must not be followed.
    pub(crate) fn magic_path(&self) -> PathBuf {
        Path::new("/proc/self/fd").join(self.dir.as_raw_fd().to_string()).join(&self.name)
    }
}

/// Extended attributes of an open file that belong into an image, sorted by name.
pub(crate) fn file_xattrs(file: &File) -> io::Result<Vec<(OsString, Vec<u8>)>> {
    read_xattrs(|buffer| rustix::fs::flistxattr(file, buffer), |name, buffer| rustix::fs::fgetxattr(file, name, buffer))
}

fn read_xattrs(
    list: impl Fn(&mut [u8]) -> Result<usize, Errno>,
    get: impl Fn(&OsStr, &mut [u8]) -> Result<usize, Errno>,
) -> io::Result<Vec<(OsString, Vec<u8>)>> {
    let mut small = [0u8; 256];
    let mut large;
    let names = match list(&mut small) {
        Ok(0) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::ACCESS) => return Ok(Vec::new()),
        Ok(n) => &small[..n],
        Err(Errno::RANGE) => {
            // The kernel's limit for the whole list.
            large = vec![0; 64 * 1024];
            let n = list(&mut large)?;
            &large[..n]
        }
        Err(error) => return Err(error.into()),
    };
    let mut found = Vec::new();
    for name in names.split(|b| *b == 0).filter(|n| is_image_xattr(n)) {
        let name = OsStr::from_bytes(name);
        let mut value = vec![0; 64 * 1024];
        match get(name, &mut value) {
            Ok(n) => {
                value.truncate(n);
                value.shrink_to_fit();
                found.push((name.to_owned(), value));
            }
            Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::ACCESS | Errno::PERM) => {}
            Err(error) => return Err(error.into()),
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// Labels of the machine (SELinux, AppArmor, overlayfs) say nothing about the image.
fn is_image_xattr(name: &[u8]) -> bool {
    (name.starts_with(b"user.") && !name.starts_with(b"user.overlay."))
        || name == b"security.capability"
        || name.starts_with(b"system.posix_acl_")
        || (name.starts_with(b"trusted.") && !name.starts_with(b"trusted.overlay."))
}

/// A tree. Paths are relative to its root, without `.` and `..`; the empty path is the root.
pub trait Tree: Send + Sync {
    /// The entry itself; `None` when there is nothing. Components before the last must be real folders (no symlink is followed).
    fn entry(&self, path: &Path) -> io::Result<Option<Entry>>;
    /// Names in a folder, sorted by bytes.
    fn names(&self, dir: &Path) -> io::Result<Vec<OsString>>;
    /// Names and entries in a folder, sorted by the bytes of the names.
    fn list(&self, dir: &Path) -> io::Result<Vec<(OsString, Entry)>> {
        let mut found = Vec::new();
        for name in self.names(dir)? {
            if let Some(entry) = self.entry(&dir.join(&name))? {
                found.push((name, entry));
            }
        }
        Ok(found)
    }
    /// The pattern of an ignore file that hides this path. (Local contexts only.)
    fn ignored_by(&self, _path: &Path) -> Option<&str> {
        None
    }
    /// May a walk skip everything below this folder? (Local contexts only.)
    fn can_prune(&self, _dir: &Path) -> bool {
        false
    }
    /// The way to an entry, for reading its content, link target and extended attributes.
    fn locate(&self, path: &Path) -> io::Result<Option<Location>>;
}

/// Opens a folder by an ordinary path.
pub(crate) fn open_dir_path(dir: &Path) -> io::Result<OwnedFd> {
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    Ok(rustix::fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// Opens a folder in a folder, following nothing.
pub(crate) fn open_dir_at(dir: &OwnedFd, name: &OsStr) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(dir, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// The path without `/` at the front and without `.` and `..` (which stop at the root, as in a chroot). Purely lexical.
pub fn clean(path: impl AsRef<Path>) -> PathBuf {
    let mut clean = PathBuf::new();
    for component in path.as_ref().components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            _ => {}
        }
    }
    clean
}

/// Follows every symbolic link of `path` inside the tree, as in a chroot: absolute targets begin at the root, `..` stops there.
/// What does not exist stays as it is written. More than 255 links are an error (`FilesystemLoop`).
pub fn resolve(tree: &dyn Tree, path: &Path) -> io::Result<PathBuf> {
    follow(tree, path, true)
}

/// [`resolve`], but the last component is not followed.
pub fn resolve_parent(tree: &dyn Tree, path: &Path) -> io::Result<PathBuf> {
    follow(tree, path, false)
}

fn follow(tree: &dyn Tree, path: &Path, last: bool) -> io::Result<PathBuf> {
    let parts = |path: &Path, queue: &mut VecDeque<OsString>| {
        for (at, component) in path.components().filter(|c| matches!(c, Component::Normal(_) | Component::ParentDir)).enumerate() {
            queue.insert(at, component.as_os_str().to_owned());
        }
    };
    let mut queue = VecDeque::new();
    parts(path, &mut queue);
    let mut resolved = PathBuf::new();
    let mut links = 0;
    while let Some(name) = queue.pop_front() {
        if name == ".." {
            resolved.pop();
            continue;
        }
        resolved.push(&name);
        check_length(&resolved)?;
        if queue.is_empty() && !last {
            break;
        }
        if tree.entry(&resolved)?.is_none_or(|e| e.kind != Kind::Symlink) {
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            return Err(Errno::LOOP.into());
        }
        let Some(location) = tree.locate(&resolved)? else { continue };
        let target = location.read_link()?;
        resolved.pop();
        if target.is_absolute() {
            resolved.clear();
        }
        parts(&target, &mut queue);
    }
    Ok(resolved)
}

/// Opens a regular file of the tree for reading. No symlink is followed.
pub fn open(tree: &dyn Tree, path: &Path) -> io::Result<File> {
    tree.locate(path)?.ok_or(Errno::NOENT)?.open()
}

/// What a walk does with an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Choice {
    /// Gives it, and looks below.
    Take,
    /// Gives it only when something below is taken.
    Descend,
    /// Leaves it and everything below out.
    Skip,
}

/// What the tree's ignore file says about an entry.
pub fn ignore_choice(tree: &dyn Tree, path: &Path, entry: &Entry) -> Choice {
    if path.as_os_str().is_empty() || tree.ignored_by(path).is_none() {
        Choice::Take
    } else if entry.is_dir() && !tree.can_prune(path) {
        Choice::Descend
    } else {
        Choice::Skip
    }
}

/// One step of a [`Walk`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Visit {
    /// Path in the tree.
    pub path: PathBuf,
    /// What is there.
    pub entry: Entry,
    /// 0 is where the walk began.
    pub depth: usize,
    /// Given only for the sake of something below it.
    pub partial: bool,
}

/// A walk came to something that it cannot read.
#[derive(Debug, thiserror::Error)]
#[error("{}: {source}", path.display())]
pub struct WalkError {
    /// Path in the tree.
    pub path: PathBuf,
    /// Why.
    pub source: io::Error,
}

impl From<WalkError> for io::Error {
    fn from(error: WalkError) -> Self {
        error.source
    }
}

/// Decides about each entry of a walk.
pub type Chooser<'t> = Box<dyn Fn(&Path, &Entry) -> Choice + 't>;

struct Frame {
    path: PathBuf,
    children: std::vec::IntoIter<(OsString, Entry)>,
    /// Not given yet.
    held: Option<Visit>,
}

/// Entries below a path, parents first, names sorted by bytes. See [`walk`].
pub struct Walk<'t> {
    tree: &'t dyn Tree,
    choose: Chooser<'t>,
    start: Option<PathBuf>,
    frames: Vec<Frame>,
    ready: VecDeque<Visit>,
}

/// Walks what the ignore file leaves, `path` itself included. Symlinks are never followed.
pub fn walk<'t>(tree: &'t dyn Tree, path: &Path) -> Walk<'t> {
    walk_with(tree, path, Box::new(move |path, entry| ignore_choice(tree, path, entry)))
}

/// Walks what `choose` takes.
pub fn walk_with<'t>(tree: &'t dyn Tree, path: &Path, choose: Chooser<'t>) -> Walk<'t> {
    Walk { tree, choose, start: Some(path.to_owned()), frames: Vec::new(), ready: VecDeque::new() }
}

/// An error at a path.
fn at(path: &Path) -> impl FnOnce(io::Error) -> WalkError {
    let path = path.to_owned();
    move |source| WalkError { path, source }
}

impl Walk<'_> {
    fn begin(&mut self, path: PathBuf) -> Result<(), WalkError> {
        match self.tree.entry(&path).map_err(at(&path))? {
            Some(entry) => self.visit(path, entry),
            None => Ok(()),
        }
    }

    fn visit(&mut self, path: PathBuf, entry: Entry) -> Result<(), WalkError> {
        if let Err(error) = check_length(&path) {
            return Err(at(&path)(error.into()));
        }
        let choice = (self.choose)(&path, &entry);
        let is_dir = entry.is_dir();
        if choice == Choice::Skip || (choice == Choice::Descend && !is_dir) {
            return Ok(());
        }
        let visit = Visit { path, entry, depth: self.frames.len(), partial: choice == Choice::Descend };
        let dir = is_dir.then(|| visit.path.clone());
        let held = if choice == Choice::Take {
            self.ready.extend(self.frames.iter_mut().filter_map(|f| f.held.take()));
            self.ready.push_back(visit);
            None
        } else {
            Some(visit)
        };
        if let Some(path) = dir {
            let children = self.tree.list(&path).map_err(at(&path))?.into_iter();
            self.frames.push(Frame { path, children, held });
        }
        Ok(())
    }
}

impl Iterator for Walk<'_> {
    type Item = Result<Visit, WalkError>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(start) = self.start.take()
            && let Err(error) = self.begin(start)
        {
            return Some(Err(error));
        }
        loop {
            if let Some(visit) = self.ready.pop_front() {
                return Some(Ok(visit));
            }
            let frame = self.frames.last_mut()?;
            match frame.children.next() {
                None => {
                    self.frames.pop();
                }
                Some((name, entry)) => {
                    let path = frame.path.join(name);
                    if let Err(error) = self.visit(path, entry) {
                        self.frames.clear();
                        return Some(Err(error));
                    }
                }
            }
        }
    }
}

/// Is the entry, or something below it, left by the ignore file?
pub fn is_visible(tree: &dyn Tree, path: &Path, entry: &Entry) -> io::Result<bool> {
    Ok(match ignore_choice(tree, path, entry) {
        Choice::Take => true,
        Choice::Skip => false,
        Choice::Descend => walk(tree, path).next().transpose()?.is_some(),
    })
}
