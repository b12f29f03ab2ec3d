//! Which files of a tree a `COPY` means: wildcards, links, `--parents`, `--exclude`, ignore files.

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};

use ovenbird_dockerfile::ignore::{Patterns, go_match};
use ovenbird_dockerfile::suggest;

use super::{FileError, Missing};
use crate::plan::CopyAction;
use crate::snapshot::tree::{self, Choice, Entry, Kind, Tree, Walk, clean, ignore_choice, is_visible, resolve, resolve_parent};

/// One source after wildcards and links.
pub(crate) struct Selected {
    /// As the Dockerfile names it, absolute.
    pub(crate) shown: String,
    /// Without links.
    pub(crate) path: PathBuf,
    /// Last part of the name as given: what it becomes in a folder.
    pub(crate) name: OsString,
    /// What is there.
    pub(crate) entry: Entry,
    /// The first that this source of the instruction gives; a wildcard may give more.
    pub(crate) first: bool,
    /// `--parents`: what is wanted below.
    include: Option<Include>,
}

/// `--parents`: a pattern below the pivot.
struct Include {
    pattern: Patterns,
    parts: Vec<String>,
}

impl Include {
    fn choice(&self, rel: &Path, entry: &Entry) -> Choice {
        let text = rel.to_string_lossy();
        if self.pattern.is_ignored(&text) {
            Choice::Take
        } else if entry.is_dir() && self.reaches_below(&text) {
            Choice::Descend
        } else {
            Choice::Skip
        }
    }

    fn reaches_below(&self, rel: &str) -> bool {
        let mut parts = self.parts.iter();
        for name in rel.split('/') {
            match parts.next() {
                Some(part) if part == "**" => return true,
                Some(part) if go_match(part, name).unwrap_or(false) => {}
                _ => return false,
            }
        }
        parts.next().is_some()
    }
}

/// Everything a copy means, in order.
pub(crate) struct Selection {
    pub(crate) sources: Vec<Selected>,
    excludes: Patterns,
}

impl Selection {
    /// Looks the sources up.
    pub(crate) fn new(from: &dyn Tree, copy: &CopyAction) -> Result<Self, FileError> {
        let excludes = Patterns::new(&copy.excludes)?;
        let mut sources = Vec::new();
        for source in &copy.sources {
            let mut picked = Vec::new();
            if copy.parents {
                with_parents(from, source, &mut picked)?;
            } else {
                expand(from, source, &mut picked)?;
            }
            // What a wildcard picks, and any file, is subject to --exclude by its path and by its own name; a folder that is named is
            // only the place where the patterns begin.
            let named = !has_wildcards(source);
            picked.retain(|s| {
                let path = s.shown.trim_start_matches('/');
                let root = path.is_empty() || s.include.is_some() || (named && s.entry.is_dir());
                root || !(excludes.is_ignored(path) || excludes.is_ignored(&s.name.to_string_lossy()))
            });
            if let Some(first) = picked.first_mut() {
                first.first = true;
            }
            sources.append(&mut picked);
        }
        Ok(Self { sources, excludes })
    }

    /// Entries of one source that are copied, itself first.
    pub(crate) fn walk<'t>(&'t self, from: &'t dyn Tree, source: &'t Selected) -> Walk<'t> {
        tree::walk_with(
            from,
            &source.path,
            Box::new(move |path, entry| {
                let mut choice = ignore_choice(from, path, entry);
                let rel = path.strip_prefix(&source.path).unwrap_or(path);
                if rel.as_os_str().is_empty() {
                    return Choice::Take;
                }
                if choice != Choice::Skip && !self.excludes.is_empty() {
                    let text = rel.to_string_lossy();
                    if self.excludes.is_ignored(&text) {
                        let reach = entry.is_dir() && !self.excludes.can_prune(&text);
                        choice = choice.max(if reach { Choice::Descend } else { Choice::Skip });
                    }
                }
                if let (Some(include), true) = (&source.include, choice != Choice::Skip) {
                    choice = choice.max(include.choice(rel, entry));
                }
                choice
            }),
        )
    }
}

fn shown(source: &str) -> String {
    format!("/{}", clean(source).display())
}

/// Does Go's `filepath.Match` give a character of it a meaning?
pub(crate) fn has_wildcards(text: &str) -> bool {
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' => {
                bytes.next();
            }
            b'*' | b'?' | b'[' => return true,
            _ => {}
        }
    }
    false
}

fn unescape(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        plain.push(if c == '\\' { chars.next().unwrap_or('\\') } else { c });
    }
    plain
}

/// The source without the path's `.`, `..` and empty parts, but with backslashes kept.
fn expand(from: &dyn Tree, source: &str, found: &mut Vec<Selected>) -> Result<(), FileError> {
    if !has_wildcards(source) {
        found.push(literal(from, source)?);
        return Ok(());
    }
    let cleaned = clean(source);
    let cleaned = cleaned.to_string_lossy();
    let parts: Vec<&str> = cleaned.split('/').collect();
    let first = parts.iter().position(|part| has_wildcards(part)).unwrap_or(parts.len());
    let base: PathBuf = parts[..first].iter().collect();
    if !base.as_os_str().is_empty() {
        // Wildcards may match nothing, but what is in front of them must be there.
        lookup(from, &base, super::absolute(&base))?;
    }
    let base = resolve(from, &base).map_err(FileError::unreadable("follow", &base))?;
    let mut matches = Vec::new();
    glob(from, &base, &parts[first..], &mut matches)?;
    for path in matches {
        let name = path.file_name().unwrap_or(OsStr::new("")).to_owned();
        let shown = format!("/{}", path.display());
        let target = resolve(from, &path).map_err(FileError::unreadable("follow", &path))?;
        let entry = from.entry(&target).map_err(FileError::unreadable("read", &target))?;
        let entry = entry.ok_or_else(|| missing(from, &path, shown.clone()))?;
        found.push(Selected { shown, path: target, name, entry, first: false, include: None });
    }
    Ok(())
}

/// `*` never matches `/`, so each part of the pattern is about one level.
fn glob(from: &dyn Tree, base: &Path, parts: &[&str], found: &mut Vec<PathBuf>) -> Result<(), FileError> {
    if !from.entry(base).map_err(FileError::unreadable("read", base))?.is_some_and(|e| e.is_dir()) {
        return Ok(());
    }
    // The last is looked at next: what matches comes in the order of a walk.
    let mut open = vec![(base.to_owned(), parts)];
    while let Some((dir, parts)) = open.pop() {
        let Some((part, rest)) = parts.split_first() else { continue };
        go_match(part, "")?;
        let begin = open.len();
        for name in from.names(&dir).map_err(FileError::unreadable("read", &dir))? {
            if !go_match(part, &name.to_string_lossy())? {
                continue;
            }
            let path = dir.join(&name);
            tree::check_length(&path).map_err(FileError::unreadable("read", &path))?;
            let Some(entry) = from.entry(&path).map_err(FileError::unreadable("read", &path))? else { continue };
            if rest.is_empty() {
                if is_visible(from, &path, &entry).map_err(FileError::unreadable("read", &path))? {
                    found.push(path);
                }
            } else if entry.is_dir() {
                open.push((path, rest));
            }
        }
        open[begin..].reverse();
    }
    Ok(())
}

fn literal(from: &dyn Tree, source: &str) -> Result<Selected, FileError> {
    match lookup(from, &clean(source), shown(source)) {
        // Somebody escaped a wildcard.
        Err(FileError::NotFound { .. }) if source.contains('\\') => lookup(from, &clean(unescape(source)), shown(source)),
        other => other,
    }
}

/// A path that is hidden.
pub(crate) fn ignored(from: &dyn Tree, path: &Path, name: String) -> FileError {
    FileError::Ignored { name, pattern: from.ignored_by(path).unwrap_or_default().to_owned() }
}

/// A path that is not there, and what is known of the reason.
pub(crate) fn missing(from: &dyn Tree, written: &Path, name: String) -> FileError {
    FileError::NotFound { name, why: reason(from, written).ok().flatten() }
}

/// Looks for the first part of the path that is not there.
fn reason(from: &dyn Tree, written: &Path) -> io::Result<Option<Missing>> {
    let mut parts: Vec<&Path> = written.ancestors().collect();
    parts.pop();
    for part in parts.into_iter().rev() {
        let path = resolve_parent(from, part)?;
        let Some(entry) = from.entry(&path)? else {
            let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else { return Ok(None) };
            let names: Vec<String> = from.names(folder)?.into_iter().filter_map(|name| name.into_string().ok()).collect();
            let visible = names.iter().filter(|name| from.ignored_by(&folder.join(name)).is_none());
            let near = suggest::nearest(&name.to_string_lossy(), visible.map(String::as_str));
            return Ok(near.map(|near| Missing::Near { near: super::absolute(&folder.join(near)) }));
        };
        if entry.kind == Kind::Symlink && from.entry(&resolve(from, part)?)?.is_none() {
            let Some(location) = from.locate(&path)? else { return Ok(None) };
            let target = location.read_link()?.display().to_string();
            return Ok(Some(Missing::Link { link: super::absolute(&path), target }));
        }
    }
    Ok(None)
}

fn lookup(from: &dyn Tree, written: &Path, shown: String) -> Result<Selected, FileError> {
    let path = resolve(from, written).map_err(FileError::unreadable("follow", written))?;
    let Some(entry) = from.entry(&path).map_err(FileError::unreadable("read", &path))? else {
        return Err(missing(from, written, shown));
    };
    let hidden_link = match from.entry(written).map_err(FileError::unreadable("read", written))? {
        Some(link) if link.kind == Kind::Symlink => ignore_choice(from, written, &link) != Choice::Take,
        _ => false,
    };
    if hidden_link || !is_visible(from, &path, &entry).map_err(FileError::unreadable("read", &path))? {
        return Err(ignored(from, if hidden_link { written } else { &path }, shown));
    }
    let name = written.file_name().unwrap_or(OsStr::new("")).to_owned();
    Ok(Selected { shown, path, name, entry, first: false, include: None })
}

/// `--parents`: `base/./pattern` keeps what is behind the pivot.
fn with_parents(from: &dyn Tree, source: &str, found: &mut Vec<Selected>) -> Result<(), FileError> {
    let (base, pattern) = source.split_once("/./").or_else(|| source.strip_prefix("./").map(|rest| ("", rest))).unwrap_or(("", source));
    let cleaned = clean(pattern);
    let pattern = cleaned.to_string_lossy().into_owned();
    let begin = found.len();
    expand(from, base, found)?;
    if pattern.is_empty() {
        return Ok(());
    }
    let parts: Vec<String> = pattern.split('/').map(str::to_owned).collect();
    for selected in &mut found[begin..] {
        if !has_wildcards(&pattern) {
            let plain = clean(unescape(&pattern));
            let path = selected.path.join(&plain);
            let shown = format!("/{}", path.display());
            match from.entry(&path).map_err(FileError::unreadable("read", &path))? {
                None => return Err(missing(from, &path, shown)),
                Some(entry) if !is_visible(from, &path, &entry).map_err(FileError::unreadable("read", &path))? => {
                    return Err(ignored(from, &path, shown));
                }
                Some(_) => {}
            }
        }
        selected.include = Some(Include { pattern: Patterns::new(&[&pattern])?, parts: parts.clone() });
    }
    Ok(())
}
