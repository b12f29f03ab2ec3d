//! `.ovenbird.toml` in the working folder: what a project says. It came with the source, and whoever wrote that is not the user.
//!
//! Such a file may say only what harms nobody. Where credentials are, whom to trust, and where names lead is the user's to say; a
//! project says it too when the user's own settings trust its folder. See docs/decisions/0006-project-settings.md.

use std::path::{Path, PathBuf};

use ovenbird_oci::regular_file::{self, Links};

use super::file::{FileSettings, MAX, parse};
use crate::error::{Error, Kind};

/// Name of the file.
pub(super) const NAME: &str = ".ovenbird.toml";

/// Keys that every project may set. (Tag policy: add its key here when it only says how tags are made.)
const KEYS: [&str; 3] = ["progress", "parallel", "registry_path"];
/// Keys of a registry that every project may set, downwards only.
const LIMITS: [&str; 2] = ["transfers", "requests_per_second"];

/// Reads the project's file, if there is one. `trusted`: folders whose projects the user trusts.
pub(super) fn read(folder: &Path, trusted: &[PathBuf]) -> Result<Option<(PathBuf, FileSettings, bool)>, Error> {
    let path = folder.join(NAME);
    let failed = |error: std::io::Error| {
        Error::from_chain(Kind::Configuration, &error).while_doing(format!("cannot read the project's settings {}", path.display()))
    };
    // Not through a link: an error of the reader could show lines of a file that the project has no business with. Not for ever: it could
    // be a pipe.
    let text = match regular_file::read_to_string(&path, MAX, Links::Refuse) {
        Ok(text) => text,
        Err(error) if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => return Ok(None),
        Err(error) => return Err(failed(error).hint(format!("it must be a regular file of at most {MAX} bytes, no link"))),
    };
    let settings = parse(&path, &text)?;
    let is_trusted = std::fs::canonicalize(folder)
        .is_ok_and(|folder| trusted.iter().filter_map(|dir| std::fs::canonicalize(dir).ok()).any(|dir| folder.starts_with(dir)));
    if !is_trusted {
        check(&path, &text)?;
    }
    Ok(Some((path, settings, is_trusted)))
}

/// Refuses, by name, what only a trusted project may set.
fn check(path: &Path, text: &str) -> Result<(), Error> {
    let table: toml::Table = toml::from_str(text).unwrap_or_default();
    let mut refused: Vec<String> = vec![];
    for (key, value) in &table {
        match value.as_table().filter(|_| key == "registry") {
            Some(registries) => {
                let keys = registries.iter().flat_map(|(host, value)| value.as_table().into_iter().flatten().map(move |(k, _)| (host, k)));
                refused.extend(keys.filter(|(_, k)| !LIMITS.contains(&k.as_str())).map(|(host, k)| format!("{k} of registry {host}")));
            }
            None if KEYS.contains(&key.as_str()) => {}
            None => refused.push(key.clone()),
        }
    }
    if refused.is_empty() {
        return Ok(());
    }
    let folder = path.parent().unwrap_or(Path::new("/"));
    Err(Error::new(Kind::Configuration, format!("{} sets what a project may not set: {}", path.display(), refused.join(", ")))
        .because("it came with the source, and could lead names, credentials or trust elsewhere")
        .hint(format!(
            "put it in your own settings, or, if you trust whoever writes there, add trusted_projects = [{:?}] to them",
            folder.display().to_string()
        )))
}
