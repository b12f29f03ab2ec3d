//! Copies of files and folders, for mounts that cannot be made.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use crate::mounts;
use crate::remove::remove;
use crate::syscall::{c_path, check};

/// A folder that is being copied.
struct Open {
    about: fs::Metadata,
    /// Names that are still to come.
    names: std::vec::IntoIter<OsString>,
}

/// Copies a file or tree with owners, modes and times. Onto an existing folder it merges as overlay does: whiteouts
/// (character devices 0:0) remove, opaque folders replace.
pub(crate) fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let (mut from, mut to) = (from.to_owned(), to.to_owned());
    let result = copy_all(&mut from, &mut to);
    result.map_err(|error| match error.raw_os_error() {
        Some(libc::ENAMETOOLONG) => io::Error::new(error.kind(), "a folder is nested too deep: its path has more than 4,096 bytes"),
        _ => error,
    })
}

/// Without recursion: how deep a tree is decides whoever made it.
fn copy_all(from: &mut PathBuf, to: &mut PathBuf) -> io::Result<()> {
    let mut open: Vec<Open> = Vec::new();
    open.extend(enter(from, to)?);
    while let Some(folder) = open.last_mut() {
        if let Some(name) = folder.names.next() {
            from.push(&name);
            to.push(&name);
            if let Some(inner) = enter(from, to)? {
                open.push(inner);
                continue;
            }
        } else {
            describe(&folder.about, from, to)?;
            open.pop();
        }
        if !open.is_empty() {
            from.pop();
            to.pop();
        }
    }
    Ok(())
}

/// Copies one entry; a folder is only made, for its description comes after its content.
fn enter(from: &Path, to: &Path) -> io::Result<Option<Open>> {
    let about = fs::symlink_metadata(from)?;
    let kind = about.file_type();
    if kind.is_char_device() && about.rdev() == 0 {
        remove(to)?;
        return Ok(None);
    }
    if kind.is_dir() {
        let there = fs::symlink_metadata(to).ok();
        if there.as_ref().is_some_and(|there| !there.is_dir()) || (there.is_some() && opaque(from)) {
            remove(to)?;
        }
        if fs::symlink_metadata(to).is_err() {
            fs::create_dir(to)?;
        }
        let names: Vec<OsString> = fs::read_dir(from)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<_>>()?;
        return Ok(Some(Open { about, names: names.into_iter() }));
    }
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
    describe(&about, from, to)?;
    Ok(None)
}

/// Owner, mode and times.
fn describe(about: &fs::Metadata, from: &Path, to: &Path) -> io::Result<()> {
    let kind = about.file_type();
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
    }

    #[test]
    fn deep_trees() {
        let body = || {
            let folder = tempfile::tempdir().unwrap();
            let (from, to, long) = (folder.path().join("from"), folder.path().join("to"), folder.path().join("x".repeat(250)));
            let make = |depth, name: &str| {
                let mut deep = from.clone();
                for _ in 0..depth {
                    fs::create_dir(&deep).unwrap();
                    deep.push(name);
                }
            };
            make(600, "d");
            copy(&from, &to).unwrap();
            assert!(to.join("d/".repeat(599)).is_dir());
            remove(&from).unwrap();
            // As deep as paths can name.
            make(21, &"n".repeat(200));
            assert!(copy(&from, &long).unwrap_err().to_string().contains("nested too deep"));
            for tree in [&from, &to, &long] {
                remove(tree).unwrap();
            }
        };
        std::thread::Builder::new().stack_size(64 * 1024).spawn(body).unwrap().join().unwrap();
    }
}
