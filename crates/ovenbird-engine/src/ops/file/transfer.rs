//! Moves file content and metadata onto the disk: by reflink, `copy_file_range` or plain reading, on a few threads.
//!
//! Never by hard link: a step would see the link count, and two names of one file where the image has two files.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use ovenbird_oci::layer::{Owner, Owners, Ownership};
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, SeekFrom, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::FileError;
use crate::snapshot::tree::{Location, file_xattrs};

/// Files up to this many bytes are read and written in one go.
const SMALL: u64 = 128 * 1024;
/// Jobs given to a thread at once: at most this many files …
const BATCH_FILES: usize = 32;
/// … and about this many bytes.
const BATCH_BYTES: u64 = 4 << 20;
/// Most copying threads; more do not help one disk.
const MAX_THREADS: usize = 4;

/// Files from this size on may be lent …
const LENT_SIZE: u64 = 1 << 20;
/// … and so many at once: each is open.
const MOST_LENT: usize = 64;

/// A file whose content was not copied: the copy has its size, and everything else.
#[derive(Debug)]
pub struct Lent {
    source: File,
    target: File,
    times: Timestamps,
    /// Bytes that the copy says it has.
    size: u64,
}

impl Lent {
    /// Bytes that were not copied.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Device and inode of the copy, and where its content is.
    pub fn borrow(&self) -> io::Result<((u64, u64), &File)> {
        let stat = rustix::fs::fstat(&self.target)?;
        Ok(((stat.st_dev, stat.st_ino), &self.source))
    }

    /// Copies the content after all.
    pub fn settle(self) -> io::Result<()> {
        copy_some(&self.source, &self.target, self.size)?;
        Ok(rustix::fs::futimens(&self.target, &self.times)?)
    }
}

/// What an entry shall have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Meta {
    /// Permission bits (0o7777).
    pub(crate) mode: u32,
    /// Owner in the image.
    pub(crate) uid: u32,
    /// Group in the image.
    pub(crate) gid: u32,
    /// Seconds and nanoseconds; `None`: now.
    pub(crate) mtime: Option<(i64, u32)>,
}

impl Meta {
    pub(crate) fn times(&self) -> Timestamps {
        let mtime = match self.mtime {
            Some((seconds, nanoseconds)) => Timespec { tv_sec: seconds, tv_nsec: nanoseconds.into() },
            None => Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW },
        };
        Timestamps { last_access: mtime, last_modification: mtime }
    }
}

/// Where everything is written to: what the threads share.
pub(crate) struct Sink {
    ownership: Ownership,
    owners: Mutex<Owners>,
    /// Of a copying thread.
    failure: Mutex<Option<FileError>>,
    /// Cleared when the file system refuses.
    reflinks: AtomicBool,
    /// Large files whose content may stay where it is; `None`: all is copied.
    lent: Option<Mutex<Vec<Lent>>>,
}

/// One regular file to copy.
pub(crate) struct FileJob {
    /// In the tree that it comes from.
    pub(crate) source: PathBuf,
    pub(crate) from: Location,
    pub(crate) meta: Meta,
    /// Size, to balance the work.
    pub(crate) size: u64,
    pub(crate) into: Arc<OwnedFd>,
    pub(crate) name: OsString,
    /// In the image, relative.
    pub(crate) path: PathBuf,
}

impl Sink {
    pub(crate) fn new(ownership: Ownership) -> Self {
        Self { ownership, owners: Mutex::default(), failure: Mutex::default(), reflinks: AtomicBool::new(true), lent: None }
    }

    /// One that may leave the content of large files where it is.
    pub(crate) fn lending(ownership: Ownership) -> Self {
        Self { lent: Some(Mutex::default()), ..Self::new(ownership) }
    }

    pub(crate) fn ownership(&self) -> Ownership {
        self.ownership
    }

    /// What was lent.
    pub(crate) fn take_lent(&self) -> Vec<Lent> {
        self.lent.as_ref().map(|lent| std::mem::take(&mut *lent.lock().unwrap_or_else(PoisonError::into_inner))).unwrap_or_default()
    }

    pub(crate) fn owners(&self) -> std::sync::MutexGuard<'_, Owners> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failure(&self) -> std::sync::MutexGuard<'_, Option<FileError>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn record(&self, path: &Path, owner: Owner) {
        self.owners().insert(path.as_os_str().to_owned(), owner);
    }

    /// Gives an entry its owner; before its mode and capabilities, which `chown` clears.
    pub(crate) fn own(&self, dir: &OwnedFd, name: &OsStr, path: &Path, meta: &Meta) -> Result<(), FileError> {
        match self.ownership {
            Ownership::Real => {
                let (uid, gid) = (Uid::from_raw(meta.uid), Gid::from_raw(meta.gid));
                match rustix::fs::chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW) {
                    // An id outside the user namespace's ranges cannot be put on disk.
                    Err(Errno::INVAL | Errno::PERM) => {
                        self.record(path, Owner { uid: meta.uid, gid: meta.gid, node: None });
                        Ok(())
                    }
                    done => done.map_err(FileError::io("set the owner of", path)),
                }
            }
            Ownership::Recorded | Ownership::Unprivileged => {
                if (meta.uid, meta.gid) != (0, 0) {
                    self.record(path, Owner { uid: meta.uid, gid: meta.gid, node: None });
                }
                Ok(())
            }
        }
    }

    /// The permissions that a folder is to get on the disk; the rest is recorded.
    pub(crate) fn folder_mode(&self, path: &Path, mode: u32) -> u32 {
        let (disk, node) = self.ownership.permissions(true, mode);
        if node.is_some() {
            self.owners().entry(path.as_os_str().to_owned()).or_insert(Owner { uid: 0, gid: 0, node }).node = node;
        }
        disk
    }

    /// Whatever was recorded of the permissions of a folder does not hold any more.
    pub(crate) fn forget_mode(&self, path: &Path) {
        if let Some(owner) = self.owners().get_mut(path.as_os_str()) {
            owner.node = None;
        }
    }

    /// The copy of a hard link's record for another name of the file.
    pub(crate) fn copy_record(&self, from: &Path, to: &Path) {
        let mut owners = self.owners();
        if let Some(owner) = owners.get(from.as_os_str()).copied() {
            owners.insert(to.as_os_str().to_owned(), owner);
        }
    }

    /// Makes a device or a pipe; where that is refused, an empty file and a record.
    pub(crate) fn make_node(
        &self,
        dir: &OwnedFd,
        name: &OsStr,
        path: &Path,
        kind: FileType,
        (major, minor): (u32, u32),
        meta: &Meta,
    ) -> Result<(), FileError> {
        let mode = Mode::from_raw_mode(meta.mode);
        let device = matches!(kind, FileType::CharacterDevice | FileType::BlockDevice);
        // A 0/0 device would be a whiteout.
        let made = if device && (self.ownership != Ownership::Real || (major, minor) == (0, 0)) {
            Err(Errno::PERM)
        } else {
            rustix::fs::mknodat(dir, name, kind, mode, rustix::fs::makedev(major, minor))
        };
        match made {
            Ok(()) => {
                self.own(dir, name, path, meta)?;
                rustix::fs::chmodat(dir, name, mode, AtFlags::empty()).map_err(FileError::io("set the mode of", path))?;
            }
            Err(Errno::PERM) => {
                // Whoever asks a step for the bits is told those of the file.
                let file = create(dir, name, 0o600).map_err(FileError::io("make", path))?;
                rustix::fs::fchmod(&file, mode).map_err(FileError::io("set the mode of", path))?;
                let node = Some((kind.as_raw_mode() | meta.mode, major, minor));
                self.record(path, Owner { uid: meta.uid, gid: meta.gid, node });
            }
            Err(error) => return Err(FileError::io("make", path)(error)),
        }
        rustix::fs::utimensat(dir, name, &meta.times(), AtFlags::SYMLINK_NOFOLLOW).map_err(FileError::io("set the time of", path))
    }

    pub(crate) fn make_symlink(&self, dir: &OwnedFd, name: &OsStr, path: &Path, target: &Path, meta: &Meta) -> Result<(), FileError> {
        rustix::fs::symlinkat(target, dir, name).map_err(FileError::io("make", path))?;
        self.own(dir, name, path, meta)?;
        rustix::fs::utimensat(dir, name, &meta.times(), AtFlags::SYMLINK_NOFOLLOW).map_err(FileError::io("set the time of", path))
    }

    /// Writes a file from a reader.
    pub(crate) fn write(
        &self,
        dir: &OwnedFd,
        name: &OsStr,
        path: &Path,
        content: &mut dyn Read,
        xattrs: &[(OsString, Vec<u8>)],
        meta: &Meta,
    ) -> Result<(), FileError> {
        let mut file = create(dir, name, 0o600).map_err(FileError::io("make", path))?;
        io::copy(content, &mut file).map_err(FileError::io("write", path))?;
        self.finish_file(&file, path, xattrs, meta)
    }

    fn finish_file(&self, file: &File, path: &Path, xattrs: &[(OsString, Vec<u8>)], meta: &Meta) -> Result<(), FileError> {
        let (mode, node) = self.ownership.permissions(false, meta.mode);
        if self.ownership == Ownership::Real {
            let (uid, gid) = (Uid::from_raw(meta.uid), Gid::from_raw(meta.gid));
            rustix::fs::fchown(file, Some(uid), Some(gid)).map_err(FileError::io("set the owner of", path))?;
        } else if (meta.uid, meta.gid) != (0, 0) || node.is_some() {
            self.record(path, Owner { uid: meta.uid, gid: meta.gid, node });
        }
        set_xattrs(xattrs, |name, value| rustix::fs::fsetxattr(file, name, value, XattrFlags::empty()))
            .map_err(FileError::io("set the attributes of", path))?;
        rustix::fs::fchmod(file, Mode::from_raw_mode(mode)).map_err(FileError::io("set the mode of", path))?;
        rustix::fs::futimens(file, &meta.times()).map_err(FileError::io("set the time of", path))
    }

    /// Copies one file.
    pub(crate) fn copy(&self, job: &FileJob) -> Result<(), FileError> {
        let FileJob { source: origin, from, meta, into, name, path, .. } = job;
        let source = from.open().map_err(FileError::replaced("read", origin))?;
        let target = create(into, name, 0o600).map_err(FileError::io("make", path))?;
        let lent = self.lend(&source, &target).map_err(FileError::unreadable("copy", origin))?;
        if lent.is_none() {
            self.copy_content(&source, &target).map_err(FileError::unreadable("copy", origin))?;
        }
        let xattrs = file_xattrs(&source).map_err(FileError::unreadable("read the attributes of", origin))?;
        self.finish_file(&target, path, &xattrs, meta)?;
        if let (Some(size), Some(all)) = (lent, &self.lent) {
            all.lock().unwrap_or_else(PoisonError::into_inner).push(Lent { source, target, times: meta.times(), size });
        }
        Ok(())
    }

    /// Gives the copy its size and no content, when it may stay without; where the file system shares content, that is better.
    fn lend(&self, source: &File, target: &File) -> io::Result<Option<u64>> {
        let Some(lent) = &self.lent else { return Ok(None) };
        let size = u64::try_from(rustix::fs::fstat(source)?.st_size).unwrap_or(0);
        if size < LENT_SIZE || lent.lock().unwrap_or_else(PoisonError::into_inner).len() >= MOST_LENT || self.reflink(source, target) {
            return Ok(None);
        }
        rustix::fs::ftruncate(target, size)?;
        Ok(Some(size))
    }

    /// Shares the content of a file, where the file system can.
    fn reflink(&self, source: &File, target: &File) -> bool {
        let shared = self.reflinks.load(Ordering::Relaxed) && rustix::fs::ioctl_ficlone(target, source).is_ok();
        if !shared {
            self.reflinks.store(false, Ordering::Relaxed);
        }
        shared
    }

    fn copy_content(&self, source: &File, mut target: &File) -> io::Result<()> {
        // Not more than the file has now: somebody may write to it without end.
        let stat = rustix::fs::fstat(source)?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        if size == 0 {
            return Ok(());
        }
        if size <= SMALL {
            thread_local! { static BUFFER: std::cell::RefCell<Vec<u8>> = const { std::cell::RefCell::new(Vec::new()) }; }
            return BUFFER.with_borrow_mut(|buffer| {
                buffer.clear();
                source.take(size).read_to_end(buffer)?;
                target.write_all(buffer)
            });
        }
        if self.reflink(source, target) { Ok(()) } else { copy_some(source, target, size) }
    }
}

/// Copies so many bytes, holes as holes.
fn copy_some(source: &File, target: &File, size: u64) -> io::Result<()> {
    let sparse = u64::try_from(rustix::fs::fstat(source)?.st_blocks).unwrap_or(u64::MAX).saturating_mul(512) < size;
    if sparse && copy_holes(source, target, size)? {
        return Ok(());
    }
    copy_range(source, target, 0, size)
}

/// Copies the parts that are not holes; false when the file system knows no holes.
fn copy_holes(source: &File, target: &File, size: u64) -> io::Result<bool> {
    let mut at = 0;
    while at < size {
        let begin = match rustix::fs::seek(source, SeekFrom::Data(at)) {
            Ok(begin) => begin,
            // Only a hole is left.
            Err(Errno::NXIO) => break,
            Err(_) if at == 0 => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(source, SeekFrom::Hole(begin))?.min(size);
        copy_range(source, target, begin, end)?;
        at = end.max(begin + 1);
    }
    rustix::fs::ftruncate(target, size)?;
    Ok(true)
}

fn copy_range(mut source: &File, mut target: &File, begin: u64, end: u64) -> io::Result<()> {
    let (mut read_at, mut write_at) = (begin, begin);
    while read_at < end {
        let length = usize::try_from(end - read_at).unwrap_or(usize::MAX).min(1 << 30);
        match rustix::fs::copy_file_range(source, Some(&mut read_at), target, Some(&mut write_at), length) {
            // The file became shorter.
            Ok(0) => return Ok(()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::PERM | Errno::BADF) => {
                rustix::fs::seek(source, SeekFrom::Start(read_at))?;
                rustix::fs::seek(target, SeekFrom::Start(write_at))?;
                io::copy(&mut Read::by_ref(&mut source).take(end - read_at), &mut target)?;
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn create(dir: &OwnedFd, name: &OsStr, mode: u32) -> Result<File, Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(mode))?))
}

/// Sets attributes; one that this file system or this user cannot set is left out, as BuildKit does.
pub(crate) fn set_xattrs(xattrs: &[(OsString, Vec<u8>)], set: impl Fn(&OsStr, &[u8]) -> Result<(), Errno>) -> io::Result<()> {
    for (name, value) in xattrs {
        match set(name, value) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::PERM | Errno::INVAL | Errno::ACCESS) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Attributes of a folder that is open.
pub(crate) fn set_dir_xattrs(dir: impl AsFd, xattrs: &[(OsString, Vec<u8>)]) -> io::Result<()> {
    set_xattrs(xattrs, |name, value| rustix::fs::fsetxattr(dir.as_fd(), name, value, XattrFlags::empty()))
}

/// Takes jobs; runs them here when they are few, else on threads.
pub(crate) struct Queue<'scope, 'env> {
    scope: &'scope thread::Scope<'scope, 'env>,
    sink: &'env Sink,
    batch: Vec<FileJob>,
    bytes: u64,
    sender: Option<SyncSender<Vec<FileJob>>>,
}

impl Queue<'_, '_> {
    pub(crate) fn push(&mut self, job: FileJob) -> Result<(), FileError> {
        self.bytes += job.size;
        self.batch.push(job);
        if self.batch.len() < BATCH_FILES && self.bytes < BATCH_BYTES {
            return Ok(());
        }
        if self.sender.is_none() {
            let (sender, receiver) = sync_channel::<Vec<FileJob>>(2);
            let receiver = Arc::new(Mutex::new(receiver));
            let sink = self.sink;
            for _ in 0..thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS) {
                let receiver = receiver.clone();
                self.scope.spawn(move || {
                    loop {
                        let next = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
                        let Ok(batch) = next else { return };
                        for job in &batch {
                            if let Err(error) = sink.copy(job) {
                                sink.failure().get_or_insert(error);
                                return;
                            }
                        }
                    }
                });
            }
            self.sender = Some(sender);
        }
        self.bytes = 0;
        let batch = std::mem::take(&mut self.batch);
        // A closed channel means that every thread has failed.
        let sent = self.sender.as_ref().is_some_and(|sender| sender.send(batch).is_ok());
        match self.sink.failure().take() {
            Some(error) => Err(error),
            None if sent => Ok(()),
            None => Err(FileError::io("copy files with", "a thread")(io::Error::other("it stopped"))),
        }
    }
}

/// Runs `feed`, which queues files; returns when all are copied.
pub(crate) fn copy_files<'env>(
    sink: &'env Sink,
    feed: impl FnOnce(&mut Queue<'_, 'env>) -> Result<(), FileError>,
) -> Result<(), FileError> {
    let fed = thread::scope(|scope| {
        let mut queue = Queue { scope, sink, batch: Vec::new(), bytes: 0, sender: None };
        feed(&mut queue)?;
        let rest = std::mem::take(&mut queue.batch);
        match queue.sender.take() {
            Some(sender) => {
                // A failed thread has left its error.
                let _ = sender.send(rest);
                Ok(())
            }
            None => rest.iter().try_for_each(|job| sink.copy(job)),
        }
    });
    // The first failure is the cause of the others.
    sink.failure().take().map_or(fed, Err)
}
