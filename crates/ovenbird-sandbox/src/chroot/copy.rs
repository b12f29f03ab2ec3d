//! Copies of files and folders, for mounts that cannot be made.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::Path;

use crate::mounts;
use crate::syscall::{c_path, check};

/// Copies a file or tree with owners, modes and times. Onto an existing folder it merges as overlay does: whiteouts
/// (character devices 0:0) remove, opaque folders replace.
pub(crate) fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let about = fs::symlink_metadata(from)?;
    let kind = about.file_type();
    if kind.is_char_device() && about.rdev() == 0 {
        return remove(to);
    }
    if kind.is_dir() {
        let there = fs::symlink_metadata(to).ok();
        if there.as_ref().is_some_and(|there| !there.is_dir()) || (there.is_some() && opaque(from)) {
            remove(to)?;
        }
        if fs::symlink_metadata(to).is_err() {
            fs::create_dir(to)?;
        }
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            copy(&entry.path(), &to.join(entry.file_name()))?;
        }
    } else {
        remove(to)?;
        if kind.is_symlink() {
            symlink(fs::read_link(from)?, to)?;
        } else if kind.is_file() {
            fs::copy(from, to)?;
        } else {
            let path = c_path(to)?;
            // SAFETY: valid C string.
            check(unsafe { libc::mknod(path.as_ptr(), about.mode(), about.rdev()) }.into())?;
        }
    }
    lchown(to, Some(about.uid()), Some(about.gid()))?;
    if kind.is_symlink() {
        return Ok(());
    }
    fs::set_permissions(to, fs::Permissions::from_mode(about.mode() & 0o7777))?;
    if kind.is_file() || kind.is_dir() {
        let stat = crate::syscall::stat(mounts::open_path(from)?.as_fd())?;
        mounts::set_times(fs::File::open(to)?.as_fd(), &stat)?;
    }
    Ok(())
}

fn opaque(folder: &Path) -> bool {
    let Ok(path) = c_path(folder) else { return false };
    let mut value = [0u8; 1];
    // SAFETY: valid strings, a buffer with its length.
    let n = unsafe { libc::lgetxattr(path.as_ptr(), c"user.overlay.opaque".as_ptr(), value.as_mut_ptr().cast(), value.len()) };
    n == 1 && value == *b"y"
}

/// Removes a file or tree; nothing there is fine.
pub(crate) fn remove(path: &Path) -> io::Result<()> {
    let result = match fs::symlink_metadata(path) {
        Ok(about) if about.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merges_like_overlay() {
        let folder = tempfile::tempdir().unwrap();
        let (low, high, out) = (folder.path().join("low"), folder.path().join("high"), folder.path().join("out"));
        for (layer, files) in [(&low, ["kept", "hidden/old", "changed"]), (&high, ["new", "hidden/new", "changed"])] {
            for file in files {
                let path = layer.join(file);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(&path, format!("{} {file}", layer.file_name().unwrap().to_str().unwrap())).unwrap();
            }
        }
        fs::set_permissions(low.join("kept"), fs::Permissions::from_mode(0o4751)).unwrap();
        symlink("kept", low.join("link")).unwrap();
        copy(&low, &out).unwrap();
        copy(&high, &out).unwrap();
        let read = |name: &str| fs::read_to_string(out.join(name)).unwrap();
        assert_eq!(
            (read("kept"), read("changed"), read("hidden/old"), read("hidden/new")),
            ("low kept".into(), "high changed".into(), "low hidden/old".into(), "high hidden/new".into())
        );
        assert_eq!(fs::metadata(out.join("kept")).unwrap().mode() & 0o7777, 0o4751);
        assert_eq!(fs::metadata(out.join("kept")).unwrap().mtime_nsec(), fs::metadata(low.join("kept")).unwrap().mtime_nsec());
        assert_eq!(fs::read_link(out.join("link")).unwrap(), Path::new("kept"));
        remove(&out).unwrap();
        remove(&out).unwrap();
        assert!(!out.exists());
    }
}
