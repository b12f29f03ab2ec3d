//! Heavy fixtures that outlive a test run: `$XDG_CACHE_HOME/ovenbird-tests/`, else `~/.cache/ovenbird-tests/`.
//!
//! Many test processes run at once, so an entry is made under a lock and appears by rename, whole or not at all.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::{AtPath, Error, Result};

/// Folder of the cache; made if missing.
pub fn dir() -> Result<PathBuf> {
    let base = match (std::env::var_os("XDG_CACHE_HOME"), std::env::var_os("HOME")) {
        (Some(cache), _) if !cache.is_empty() => PathBuf::from(cache),
        (_, Some(home)) => Path::new(&home).join(".cache"),
        _ => return Err(Error::Missing("no cache folder: set XDG_CACHE_HOME or HOME".into())),
    };
    let dir = base.join("ovenbird-tests");
    fs::create_dir_all(&dir).at("cannot make", &dir)?;
    Ok(dir)
}

/// The entry `key`; `make` fills an empty folder when the entry does not exist yet.
pub fn entry(key: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    let dir = dir()?;
    let entry = dir.join(key);
    if entry.exists() {
        return Ok(entry);
    }
    let _lock = lock(key)?;
    if entry.exists() {
        return Ok(entry);
    }
    let half = tempfile::Builder::new().prefix(".half-").tempdir_in(&dir).at("cannot make a folder in", &dir)?;
    make(half.path())?;
    fs::rename(half.path(), &entry).at("cannot name", &entry)?;
    let _ = half.keep();
    Ok(entry)
}

/// Holds the lock `name` between test processes until the value is dropped.
pub fn lock(name: &str) -> Result<File> {
    let path = dir()?.join(format!(".lock-{name}"));
    let file = File::create(&path).at("cannot make", &path)?;
    file.lock().at("cannot lock", &path)?;
    Ok(file)
}
