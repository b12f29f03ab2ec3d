//! A build as it stands before it is frozen: what pre_build plugins may change, and what they changed, as a diff.
//!
//! The user's folder is never touched: files that are added or hidden are an overlay over it.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ovenbird_dockerfile::ignore::Patterns;
use ovenbird_engine::input::LocalContext;
use ovenbird_oci::beside;

use crate::error::{Error, Kind};
use crate::request::{BuildRequest, ContextSource};
use crate::source::SourceTree;

/// Most bytes that plugins may add in memory; larger things are files.
const MOST_BYTES: usize = 256 << 20;
/// Most files that plugins may add.
const MOST_FILES: usize = 100_000;

/// The content of an added file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content {
    Bytes(Vec<u8>),
    /// A file that was written for this, too large for memory.
    File(Kept),
}

/// A file and the temporary folder that it lives in.
#[derive(Debug, Clone)]
pub(crate) struct Kept {
    path: PathBuf,
    _folder: Arc<beside::Folder>,
}

impl Kept {
    pub(crate) fn new(path: PathBuf, folder: Arc<beside::Folder>) -> Self {
        Self { path, _folder: folder }
    }
}

impl PartialEq for Kept {
    fn eq(&self, other: &Self) -> bool {
        self.path == other.path
    }
}

impl Eq for Kept {}

/// A file that a plugin adds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Added {
    pub(crate) content: Content,
    pub(crate) mode: u32,
}

/// What may change.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Draft {
    /// Text of the Dockerfile.
    pub(crate) dockerfile: String,
    /// The request; its labels, build arguments and names are what a program may change.
    pub(crate) request: BuildRequest,
    /// By context, then by path in it. A context that the request does not have is made.
    pub(crate) added: BTreeMap<String, BTreeMap<String, Added>>,
    /// Patterns of files that the build does not see.
    pub(crate) hidden: Vec<String>,
}

/// The main context.
pub(crate) const MAIN: &str = "context";

impl Draft {
    /// What was said, unchanged.
    pub(crate) fn new(request: &BuildRequest, tree: &SourceTree) -> Self {
        Self { dockerfile: tree.dockerfile.clone(), request: request.clone(), added: BTreeMap::new(), hidden: vec![] }
    }

    /// What was said, of a source that could not be had.
    pub(crate) fn unread(request: &BuildRequest) -> Self {
        Self { dockerfile: String::new(), request: request.clone(), added: BTreeMap::new(), hidden: vec![] }
    }

    /// Adds a file to a context.
    pub(crate) fn add(&mut self, context: &str, path: &str, content: Content, mode: u32) -> Result<(), Error> {
        let path = inside(path)?;
        let files = self.added.values().map(BTreeMap::len).sum::<usize>();
        let size = |content: &Content| if let Content::Bytes(bytes) = content { bytes.len() } else { 0 };
        let bytes: usize = self.added.values().flat_map(BTreeMap::values).map(|added| size(&added.content)).sum();
        if files >= MOST_FILES || bytes + size(&content) > MOST_BYTES {
            return Err(Error::new(Kind::Veto, format!("plugins add more than {MOST_FILES} files or {MOST_BYTES} bytes")));
        }
        self.added.entry(context.to_owned()).or_default().insert(path, Added { content, mode: mode & 0o7777 });
        Ok(())
    }

    /// The request, with a name for each context that plugins add: for looking at the Dockerfile, not for building.
    pub(crate) fn outlook(&self) -> BuildRequest {
        let mut request = self.request.clone();
        for context in self.added.keys().filter(|context| *context != MAIN) {
            request.contexts.insert(context.clone(), ContextSource::Path(PathBuf::new()));
        }
        request
    }

    /// Hides the files that this pattern (of a `.dockerignore`) matches.
    pub(crate) fn hide(&mut self, pattern: &str) -> Result<(), Error> {
        Patterns::new(&[pattern]).map_err(|e| Error::from_chain(Kind::Veto, &e))?;
        self.hidden.push(pattern.to_owned());
        Ok(())
    }

    /// What is different from `before`, for people: one line each, the Dockerfile as a unified diff.
    pub(crate) fn changes_since(&self, before: &Self, name: &str) -> Vec<String> {
        let mut lines = vec![];
        if self.dockerfile != before.dockerfile {
            let diff = similar::TextDiff::from_lines(before.dockerfile.as_str(), self.dockerfile.as_str());
            let text = diff.unified_diff().header("Dockerfile", &format!("Dockerfile after {name}")).to_string();
            lines.extend(text.lines().map(str::to_owned));
        }
        let (old, new) = (&before.request, &self.request);
        map_changes(&mut lines, "label", &old.labels, &new.labels);
        map_changes(&mut lines, "annotation", &old.annotations, &new.annotations);
        map_changes(&mut lines, "build argument", &old.build_args, &new.build_args);
        list_changes(&mut lines, "name", &old.names, &new.names);
        list_changes(&mut lines, "platform", &shown(&old.platforms), &shown(&new.platforms));
        for (context, files) in &self.added {
            let known = before.added.get(context);
            for (path, added) in files.iter().filter(|(path, added)| known.and_then(|known| known.get(*path)) != Some(added)) {
                let at = if context == MAIN { path.clone() } else { format!("{context}: {path}") };
                lines.push(format!("+ file {at} (mode {:o})", added.mode));
            }
        }
        lines.extend(self.hidden.iter().skip(before.hidden.len()).map(|pattern| format!("- hidden {pattern}")));
        lines
    }

    /// Ends all change: the source tree as the build sees it. Files that were added are written below `temp`, and live as long as what
    /// comes back.
    pub(crate) fn freeze(self, tree: &mut SourceTree, temp: &Path) -> Result<(BuildRequest, Vec<beside::Folder>), Error> {
        tree.dockerfile = self.dockerfile;
        if !self.hidden.is_empty()
            && let Some(context) = tree.contexts.get_mut(MAIN)
        {
            let hidden = Patterns::new(&self.hidden).map_err(|e| Error::from_chain(Kind::Veto, &e))?;
            context.ignore = std::mem::take(&mut context.ignore).and(hidden);
        }
        let mut folders = vec![];
        let epoch = self.request.source_date_epoch()?.unwrap_or(0);
        for (context, files) in &self.added {
            let failed =
                |error: io::Error| Error::from_chain(Kind::Configuration, &error).while_doing("cannot write the files that plugins add");
            let folder = beside::folder_in(temp).map_err(failed)?;
            for (path, added) in files {
                write(&folder.path().join(path), added, epoch).map_err(failed)?;
            }
            match tree.contexts.get_mut(context) {
                Some(known) => known.over = Some(folder.path().to_owned()),
                None => drop(tree.contexts.insert(context.clone(), LocalContext::new(folder.path(), Patterns::default()))),
            }
            folders.push(folder);
        }
        let mut request = self.request;
        for (context, folder) in self.added.keys().zip(&folders).filter(|(context, _)| *context != MAIN) {
            request.contexts.insert(context.clone(), ContextSource::Path(folder.path().to_owned()));
        }
        Ok((request, folders))
    }
}

/// A path inside a context: relative, without `..`.
fn inside(path: &str) -> Result<String, Error> {
    let mut clean = PathBuf::new();
    for component in Path::new(path).components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::CurDir => {}
            _ => clean = PathBuf::new(),
        }
        if !matches!(component, Component::Normal(_) | Component::CurDir) {
            return Err(Error::new(Kind::Veto, format!("a plugin adds the file {path:?}, which is not inside the build context")));
        }
    }
    match clean.to_str() {
        Some(text) if !text.is_empty() && text.len() < 4096 && !text.contains('\0') => Ok(text.to_owned()),
        _ => Err(Error::new(Kind::Veto, format!("a plugin adds a file with the name {path:?}"))),
    }
}

fn write(path: &Path, added: &Added, epoch: i64) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    match &added.content {
        Content::Bytes(bytes) => std::fs::write(path, bytes)?,
        Content::File(kept) => drop(std::fs::copy(&kept.path, path)?),
    }
    let file = std::fs::File::open(path)?;
    file.set_permissions(std::fs::Permissions::from_mode(added.mode))?;
    file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(epoch).unwrap_or(0)))
}

fn shown<T: ToString>(list: &[T]) -> Vec<String> {
    list.iter().map(ToString::to_string).collect()
}

fn map_changes(lines: &mut Vec<String>, what: &str, old: &BTreeMap<String, String>, new: &BTreeMap<String, String>) {
    let keys: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    for key in keys {
        let (before, after) = (old.get(key), new.get(key));
        if before != after {
            lines.extend(before.map(|value| format!("- {what} {key}={value}")));
            lines.extend(after.map(|value| format!("+ {what} {key}={value}")));
        }
    }
}

fn list_changes(lines: &mut Vec<String>, what: &str, old: &[String], new: &[String]) {
    lines.extend(old.iter().filter(|item| !new.contains(item)).map(|item| format!("- {what} {item}")));
    lines.extend(new.iter().filter(|item| !old.contains(item)).map(|item| format!("+ {what} {item}")));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_paths_inside() {
        for (path, expect) in [
            ("a/b", Some("a/b")),
            ("./a", Some("a")),
            ("/etc/passwd", None),
            ("../x", None),
            ("a/../../x", None),
            ("", None),
            (".", None),
            ("a\0b", None),
        ] {
            assert_eq!(inside(path).ok().as_deref(), expect, "{path:?}");
        }
    }
}
