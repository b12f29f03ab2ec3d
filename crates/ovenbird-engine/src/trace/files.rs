//! What a step read of a local context, file by file, and how two such lists differ.

use std::collections::BTreeMap;

use ovenbird_oci::Digest;
use serde::{Deserialize, Serialize};

use crate::state::{State, StateError};

/// Differences that are named; the rest is counted.
const MOST_NAMED: usize = 5;
/// Lists with more files than this are not kept.
const MOST_FILES: usize = 1 << 20;

/// One file, folder or link as it counts for a cache key: what does not count is `None`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileState {
    /// In the context; bytes that are not UTF-8 are replaced.
    pub path: String,
    /// `f`, `d`, `l`, `p`, `c` or `b`.
    pub kind: char,
    /// Permission bits.
    pub mode: Option<u32>,
    /// User and group.
    pub owner: Option<(u32, u32)>,
    /// Content of a file, target of a link, number of a device.
    pub content: Digest,
    /// Extended attributes.
    pub xattrs: Option<Digest>,
}

/// The list of a content key.
pub fn load(state: &State, content: &Digest) -> Option<Vec<FileState>> {
    serde_json::from_slice(&std::fs::read(state.traces_dir().join(name(content))).ok()?).ok()
}

/// Keeps a list, unless it is there already or too long.
pub fn save(state: &State, content: &Digest, files: &[FileState]) -> Result<(), StateError> {
    if files.len() > MOST_FILES || state.traces_dir().join(name(content)).exists() {
        return Ok(());
    }
    state.write_trace(&name(content), &serde_json::to_vec(files).unwrap_or_default())
}

fn name(content: &Digest) -> String {
    format!("{}{}", PREFIX, content.hex())
}

/// Begins the names of lists among the traces.
pub(super) const PREFIX: &str = "files-";

/// How the files changed: `file src/a.py content changed`.
pub fn differences(before: &[FileState], now: &[FileState]) -> Vec<String> {
    let old: BTreeMap<&str, &FileState> = before.iter().map(|file| (file.path.as_str(), file)).collect();
    let new: BTreeMap<&str, &FileState> = now.iter().map(|file| (file.path.as_str(), file)).collect();
    let mut found = vec![];
    for (path, file) in &new {
        match old.get(path) {
            None => found.push(format!("{} {path} was added", noun(file))),
            Some(before) if before == file => {}
            Some(before) => found.push(format!("{} {path} {}", noun(file), change(before, file))),
        }
    }
    found.extend(old.iter().filter(|(path, _)| !new.contains_key(*path)).map(|(path, file)| format!("{} {path} was removed", noun(file))));
    if found.len() > MOST_NAMED {
        let rest = found.len() - MOST_NAMED;
        found.truncate(MOST_NAMED);
        found.push(format!("{rest} more files changed"));
    }
    found
}

fn noun(file: &FileState) -> &'static str {
    match file.kind {
        'd' => "folder",
        'l' => "link",
        'f' => "file",
        _ => "special file",
    }
}

fn change(before: &FileState, now: &FileState) -> String {
    if before.kind != now.kind {
        return format!("was a {} before", noun(before));
    }
    if before.content != now.content {
        return if now.kind == 'l' { "target changed".into() } else { "content changed".into() };
    }
    match (before.mode, now.mode) {
        (Some(old), Some(new)) if old != new => return format!("mode {old:04o} → {new:04o}"),
        _ => {}
    }
    match (before.owner, now.owner) {
        (Some(old), Some(new)) if old != new => format!("owner {}:{} → {}:{}", old.0, old.1, new.0, new.1),
        _ => "extended attributes changed".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, kind: char, mode: u32, content: &str) -> FileState {
        FileState { path: path.into(), kind, mode: Some(mode), owner: Some((0, 0)), content: Digest::of(content.as_bytes()), xattrs: None }
    }

    #[test]
    fn differences_are_named() {
        let base = file("src/a.py", 'f', 0o644, "x");
        for (before, now, expect) in [
            (vec![base.clone()], vec![base.clone()], vec![]),
            (vec![base.clone()], vec![file("src/a.py", 'f', 0o644, "y")], vec!["file src/a.py content changed"]),
            (vec![base.clone()], vec![file("src/a.py", 'f', 0o755, "x")], vec!["file src/a.py mode 0644 → 0755"]),
            (vec![], vec![base.clone()], vec!["file src/a.py was added"]),
            (vec![file("d", 'd', 0o755, "")], vec![], vec!["folder d was removed"]),
            (vec![file("l", 'l', 0, "a")], vec![file("l", 'l', 0, "b")], vec!["link l target changed"]),
            (vec![file("l", 'l', 0, "a")], vec![file("l", 'f', 0, "a")], vec!["file l was a link before"]),
            (vec![base.clone()], vec![FileState { owner: Some((1, 2)), ..base.clone() }], vec!["file src/a.py owner 0:0 → 1:2"]),
            (
                vec![base.clone()],
                vec![FileState { xattrs: Some(Digest::of(b"")), ..base.clone() }],
                vec!["file src/a.py extended attributes changed"],
            ),
        ] {
            assert_eq!(differences(&before, &now), expect);
        }
        let many: Vec<FileState> = (0..9).map(|n| file(&format!("f{n}"), 'f', 0o644, "")).collect();
        assert_eq!(differences(&[], &many).last().map(String::as_str), Some("4 more files changed"));
    }
}
