//! Descends a folder by file descriptors: no path is resolved twice and no symlink followed.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, RawDir};
use rustix::io::Errno;

/// Flags to open a folder itself.
pub(super) const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Folders kept open at once; those above are opened again through `..` on the way back.
const OPEN: usize = 64;

/// A folder on the way from the root to where the walk is.
struct Frame {
    fd: Option<OwnedFd>,
    /// Device and inode: what `..` must lead to.
    id: (u64, u64),
    /// Name in the folder above.
    name: CString,
    names: std::vec::IntoIter<CString>,
    /// Permissions to give back.
    restore: Option<Mode>,
}

impl Drop for Frame {
    fn drop(&mut self) {
        if let (Some(mode), Some(fd)) = (self.restore, &self.fd) {
            let _ = rustix::fs::fchmod(fd, mode);
        }
    }
}

/// A depth-first walk; the names of each folder come sorted by bytes.
pub(super) struct Walk {
    frames: Vec<Frame>,
    path: Vec<u8>,
}

impl Walk {
    /// Starts in a folder.
    pub(super) fn new(root: OwnedFd) -> io::Result<Self> {
        let mut walk = Self { frames: vec![], path: vec![] };
        walk.enter(root, CString::default(), None)?;
        walk.path.clear();
        Ok(walk)
    }

    /// Path of the folder the walk is in, relative to the root: empty or ending in `/`.
    pub(super) fn path(&self) -> &[u8] {
        &self.path
    }

    /// The folder the walk is in.
    pub(super) fn dir(&self) -> io::Result<BorrowedFd<'_>> {
        self.frames.last().and_then(|f| f.fd.as_ref()).map(AsFd::as_fd).ok_or_else(|| Errno::BADF.into())
    }

    /// The next name in the folder the walk is in.
    pub(super) fn next_name(&mut self) -> Option<CString> {
        self.frames.last_mut()?.names.next()
    }

    /// Goes down into a folder that was opened with [`FOLDER`]; `restore`: permissions it gets back at the end.
    pub(super) fn enter(&mut self, fd: OwnedFd, name: CString, restore: Option<Mode>) -> io::Result<()> {
        let stat = rustix::fs::fstat(&fd)?;
        let mut frame = Frame { fd: Some(fd), id: (stat.st_dev, stat.st_ino), name, names: vec![].into_iter(), restore };
        if let Some(fd) = &frame.fd {
            frame.names = names(fd)?.into_iter();
        }
        self.path.extend_from_slice(frame.name.to_bytes());
        self.path.push(b'/');
        self.frames.push(frame);
        if let Some(above) = self.frames.len().checked_sub(OPEN + 1) {
            let above = &mut self.frames[above];
            if above.restore.is_none() {
                above.fd = None;
            }
        }
        Ok(())
    }

    /// Goes up: the name of the folder that was left, `None` when that was the root.
    pub(super) fn leave(&mut self) -> io::Result<Option<CString>> {
        let Some(mut left) = self.frames.pop() else { return Ok(None) };
        let Some(above) = self.frames.last_mut() else { return Ok(None) };
        if above.fd.is_none() {
            let child = left.fd.as_ref().ok_or(Errno::BADF)?;
            let fd = rustix::fs::openat(child, c"..", FOLDER, Mode::empty())?;
            let stat = rustix::fs::fstat(&fd)?;
            if (stat.st_dev, stat.st_ino) != above.id {
                return Err(io::Error::other("the folder was moved meanwhile"));
            }
            above.fd = Some(fd);
        }
        self.path.truncate(self.path.len() - left.name.to_bytes().len() - 1);
        Ok(Some(std::mem::take(&mut left.name)))
    }
}

/// Names in a folder, sorted by bytes, without `.` and `..`.
fn names(fd: &OwnedFd) -> io::Result<Vec<CString>> {
    let mut buffer = Vec::with_capacity(32 * 1024);
    let mut names = Vec::new();
    let mut dir = RawDir::new(fd, buffer.spare_capacity_mut());
    while let Some(entry) = dir.next() {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// Changes the permissions of what `fd` names, also when `fd` cannot be read (`O_PATH`).
pub(super) fn chmod_path_fd(fd: &OwnedFd, mode: Mode) -> rustix::io::Result<()> {
    rustix::fs::chmod(format!("/proc/self/fd/{}", fd.as_raw_fd()), mode)
}

/// Opens a folder or file that its owner may not read, by lending the permissions `more`.
/// Also the permissions to give back.
pub(super) fn open_lent(dir: BorrowedFd<'_>, name: &CStr, flags: OFlags, more: Mode) -> io::Result<(OwnedFd, Option<Mode>)> {
    match rustix::fs::openat(dir, name, flags, Mode::empty()) {
        Ok(fd) => Ok((fd, None)),
        Err(Errno::ACCESS) => {
            let fd = rustix::fs::openat(dir, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
            let mode = Mode::from_raw_mode(rustix::fs::fstat(&fd)?.st_mode & 0o7777);
            chmod_path_fd(&fd, mode | more).map_err(|_| Errno::ACCESS)?;
            match rustix::fs::openat(dir, name, flags, Mode::empty()) {
                Ok(opened) => Ok((opened, Some(mode))),
                Err(e) => {
                    let _ = chmod_path_fd(&fd, mode);
                    Err(e.into())
                }
            }
        }
        Err(e) => Err(e.into()),
    }
}

/// Unlinks, also in a folder that its owner may not write to.
fn unlink(dir: BorrowedFd<'_>, name: &CStr, flags: AtFlags) -> rustix::io::Result<()> {
    match rustix::fs::unlinkat(dir, name, flags) {
        Err(Errno::ACCESS) if rustix::fs::fchmod(dir, Mode::RWXU).is_ok() => rustix::fs::unlinkat(dir, name, flags),
        other => other,
    }
}

/// Removes a name and everything below it, however deep; gone already is fine.
pub fn remove(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    match unlink(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(e) => return Err(e.into()),
    }
    let (fd, _) = open_lent(dir, name, FOLDER, Mode::RWXU)?;
    let mut walk = Walk::new(fd)?;
    loop {
        while let Some(name) = walk.next_name() {
            match unlink(walk.dir()?, &name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(Errno::ISDIR | Errno::PERM) => {
                    let (fd, _) = open_lent(walk.dir()?, &name, FOLDER, Mode::RWXU)?;
                    walk.enter(fd, name, None)?;
                }
                Err(e) => return Err(e.into()),
            }
        }
        match walk.leave()? {
            Some(name) => rustix::fs::unlinkat(walk.dir()?, &name, AtFlags::REMOVEDIR)?,
            None => return Ok(rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR)?),
        }
    }
}
