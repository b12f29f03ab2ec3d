//! Removing trees that a step has made: of any depth, with two descriptors and without recursion.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::syscall::{self, c_bytes, check, here};

/// Removes a file or tree; nothing there is fine. Links are not followed, but for those on the way to `path`.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(about) if about.is_dir() => remove_folder(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

fn remove_folder(path: &Path) -> io::Result<()> {
    // Names of the folders from the top to where we are, each with the identity of the one above it.
    let mut above: Vec<(CString, (u64, u64))> = Vec::new();
    let mut now = open(here(), &syscall::c_path(path)?)?;
    loop {
        if let Some(name) = sweep(now.as_fd())? {
            let next = open(now.as_fd(), &name)?;
            above.push((name, identity(now.as_fd())?));
            now = next;
            continue;
        }
        let Some((name, up)) = above.pop() else { break };
        let parent = open(now.as_fd(), c"..")?;
        if identity(parent.as_fd())? != up {
            return Err(io::Error::other("a folder was moved while it was removed"));
        }
        unlink(parent.as_fd(), &name, libc::AT_REMOVEDIR)?;
        now = parent;
    }
    fs::remove_dir(path)
}

/// Removes what needs no look inside; the name of the first folder that does.
fn sweep(folder: BorrowedFd<'_>) -> io::Result<Option<CString>> {
    for entry in fs::read_dir(format!("/proc/self/fd/{}", folder.as_raw_fd()))? {
        let entry = entry?;
        let name = c_bytes(entry.file_name().as_bytes())?;
        if !entry.file_type()?.is_dir() {
            unlink(folder, &name, 0)?;
        } else if unlink(folder, &name, libc::AT_REMOVEDIR).is_err() {
            return Ok(Some(name));
        }
    }
    Ok(None)
}

/// A folder, made readable when it is not: overlay's work folder has mode 000.
fn open(dir: BorrowedFd<'_>, name: &std::ffi::CStr) -> io::Result<OwnedFd> {
    let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOFOLLOW;
    match syscall::openat(dir, name, flags, 0) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            // SAFETY: valid C string.
            check(unsafe { libc::fchmodat(dir.as_raw_fd(), name.as_ptr(), 0o700, 0) }.into())?;
            syscall::openat(dir, name, flags, 0)
        }
        other => other,
    }
}

fn unlink(dir: BorrowedFd<'_>, name: &std::ffi::CStr, flags: i32) -> io::Result<()> {
    // SAFETY: valid C string.
    match check(unsafe { libc::unlinkat(dir.as_raw_fd(), name.as_ptr(), flags) }.into()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn identity(fd: BorrowedFd<'_>) -> io::Result<(u64, u64)> {
    syscall::stat(fd).map(|stat| (stat.st_dev, stat.st_ino))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn any_depth_and_no_links() {
        let folder = tempfile::tempdir().unwrap();
        let top = folder.path().join("top");
        fs::create_dir(&top).unwrap();
        fs::write(folder.path().join("kept"), "").unwrap();
        symlink("../kept", top.join("link")).unwrap();
        symlink("..", top.join("folder-link")).unwrap();
        let mut now = open(here(), &syscall::c_path(&top).unwrap()).unwrap();
        for _ in 0..1_200 {
            drop(syscall::openat(now.as_fd(), c"file", libc::O_CREAT | libc::O_WRONLY, 0o600).unwrap());
            // SAFETY: constant string.
            check(unsafe { libc::mkdirat(now.as_raw_fd(), c"d".as_ptr(), 0o700) }.into()).unwrap();
            now = open(now.as_fd(), c"d").unwrap();
        }
        drop(now);
        for _ in 0..2 {
            remove(&top).unwrap();
            assert!(!top.exists());
        }
        assert!(folder.path().join("kept").exists());
    }
}
