//! [`Tree`] over a local context with files laid over it: what a plugin adds to a build, without a touch of the user's folder.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::path::Path;

use super::folder::Folder;
use super::tree::{Entry, Location, Tree};

/// Two folders as one. A file of the upper one hides what the lower one has in its place; folders of both are merged.
pub struct Overlaid {
    over: Folder,
    base: Folder,
}

impl Overlaid {
    /// `over` is small, and complete when it is given here.
    pub fn new(over: Folder, base: Folder) -> Self {
        Self { over, base }
    }

    /// Which of both holds the entry; `None`: nobody. A folder of both is the lower one's.
    fn holder(&self, path: &Path) -> io::Result<Option<(&Folder, Entry)>> {
        let over = self.over.entry(path)?;
        if let Some(entry) = &over
            && !entry.is_dir()
        {
            return Ok(over.map(|entry| (&self.over, entry)));
        }
        // A file above hides the whole folder below it.
        let hidden = path.ancestors().skip(1).any(|above| matches!(self.over.entry(above), Ok(Some(entry)) if !entry.is_dir()));
        let base = if hidden { None } else { self.base.entry(path)? };
        Ok(match (over, base) {
            (None, base) => base.map(|entry| (&self.base, entry)),
            (Some(_), Some(base)) if base.is_dir() => Some((&self.base, base)),
            (Some(over), _) => Some((&self.over, over)),
        })
    }
}

impl Tree for Overlaid {
    fn entry(&self, path: &Path) -> io::Result<Option<Entry>> {
        Ok(self.holder(path)?.map(|(_, entry)| entry))
    }

    fn names(&self, dir: &Path) -> io::Result<Vec<OsString>> {
        Ok(self.list(dir)?.into_iter().map(|(name, _)| name).collect())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<(OsString, Entry)>> {
        if !self.over.entry(dir)?.is_some_and(|entry| entry.is_dir()) {
            return self.holder(dir)?.map_or(&self.base, |(holder, _)| holder).list(dir);
        }
        let below = self.base.entry(dir)?.is_some_and(|entry| entry.is_dir());
        let mut found: BTreeMap<OsString, Entry> = if below { self.base.list(dir)?.into_iter().collect() } else { BTreeMap::new() };
        for (name, entry) in self.over.list(dir)? {
            if !(entry.is_dir() && found.get(&name).is_some_and(Entry::is_dir)) {
                found.insert(name, entry);
            }
        }
        Ok(found.into_iter().collect())
    }

    /// What was added was added on purpose: no ignore file hides it.
    fn ignored_by(&self, path: &Path) -> Option<&str> {
        if matches!(self.over.entry(path), Ok(Some(entry)) if !entry.is_dir()) { None } else { self.base.ignored_by(path) }
    }

    fn can_prune(&self, dir: &Path) -> bool {
        self.base.can_prune(dir) && !matches!(self.over.entry(dir), Ok(Some(_)))
    }

    fn locate(&self, path: &Path) -> io::Result<Option<Location>> {
        self.holder(path)?.map_or(Ok(None), |(holder, _)| holder.locate(path))
    }
}

#[cfg(test)]
mod tests {
    use ovenbird_dockerfile::ignore::Patterns;

    use super::*;
    use crate::snapshot::tree::{open, walk};

    #[test]
    fn two_folders_are_one() {
        let (over, base) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (dir, files) in
            [(&over, &["a", "d/new", "deep/er/x", "was/f"][..]), (&base, &["a", "b", "d/old", "f/hidden", "secret/k", "was"])]
        {
            for name in files {
                let path = dir.path().join(name);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, if dir.path() == over.path() { "over" } else { "base" }).unwrap();
            }
        }
        std::fs::write(over.path().join("f"), "over").unwrap();
        let ignore = Patterns::new(&["secret", "deep"]).unwrap();
        let tree = Overlaid::new(Folder::new(over.path(), Patterns::default()), Folder::new(base.path(), ignore));
        let mut seen = vec![];
        for visit in walk(&tree, Path::new("")) {
            let visit = visit.unwrap();
            if visit.entry.is_dir() {
                continue;
            }
            let mut text = String::new();
            io::Read::read_to_string(&mut open(&tree, &visit.path).unwrap(), &mut text).unwrap();
            seen.push(format!("{}={text}", visit.path.display()));
        }
        assert_eq!(seen, ["a=over", "b=base", "d/new=over", "d/old=base", "deep/er/x=over", "f=over", "was/f=over"]);
        assert!(tree.entry(Path::new("f/hidden")).unwrap().is_none());
    }
}
