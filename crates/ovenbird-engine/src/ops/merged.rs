//! Snapshots as one plain folder or one tar: for machines that cannot mount an overlay, and for
//! outputs. [`diff`] finds what a step changed in such a folder.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use ovenbird_dockerfile::ignore::Patterns;
use ovenbird_oci::layer::{Owners, Ownership};
use tar::{EntryType, Header};

use super::file::transfer::Meta;
use super::file::{Dest, FileError, Trail};
use crate::snapshot::Snapshot;
use crate::snapshot::folder::Folder;
use crate::snapshot::tree::{Choice, Entry, Kind, Location, Tree, Visit, WalkError, open_dir_at, resolve, walk, walk_with};
use crate::snapshot::view::{View, is_opaque};

/// Copies the whole root file system into the existing empty folder `dest`. Everything in it may be modified afterwards.
pub fn materialize(snapshot: &Snapshot, dest: &Path, ownership: Ownership) -> Result<(), FileError> {
    copy_tree(&View::new(snapshot), Path::new(""), dest, ownership)
}

/// [`materialize`] for one folder of the root (links in `path` are followed inside it). Nothing is written when it is no folder.
pub fn materialize_subtree(snapshot: &Snapshot, path: &Path, dest: &Path, ownership: Ownership) -> Result<(), FileError> {
    let view = View::new(snapshot);
    let path = resolve(&view, path).map_err(FileError::io("follow", path))?;
    copy_tree(&view, &path, dest, ownership)
}

/// Copies what the ignore file leaves of a folder of `from` into the existing empty folder `dest`, with owners, modes and times.
pub fn copy_tree(from: &dyn Tree, path: &Path, dest: &Path, ownership: Ownership) -> Result<(), FileError> {
    copy_recorded(from, path, dest, ownership).map(drop)
}

/// [`materialize`] for the caller: everything belongs to him. Returns what the files could not be given; devices are empty files.
pub fn copy_out(snapshot: &Snapshot, dest: &Path) -> Result<Owners, FileError> {
    copy_recorded(&View::new(snapshot), Path::new(""), dest, Ownership::Recorded)
}

fn copy_recorded(from: &dyn Tree, path: &Path, dest: &Path, ownership: Ownership) -> Result<Owners, FileError> {
    if !from.entry(path).map_err(FileError::io("read", path))?.is_some_and(|entry| entry.is_dir()) {
        return Ok(Owners::new());
    }
    let mut target = Dest::new(&Snapshot::default(), dest, ownership)?;
    write_visits(&mut target, from, walk(from, path))?;
    target.finish()
}

fn keep(entry: &Entry) -> Meta {
    Meta { mode: entry.mode, uid: entry.uid, gid: entry.gid, mtime: Some(entry.mtime) }
}

fn write_visits(dest: &mut Dest, from: &dyn Tree, visits: impl Iterator<Item = Result<Visit, WalkError>>) -> Result<(), FileError> {
    dest.write(|dest, queue| {
        let mut open = Trail::default();
        for visit in visits {
            let visit = visit.map_err(FileError::io("read", "the files"))?;
            if visit.depth == 0 {
                open.push(dest.describe_root(from, &visit, keep(&visit.entry))?);
                continue;
            }
            let parent = open.back_to(dest, visit.depth - 1)?;
            let name = visit.path.file_name().unwrap_or(OsStr::new("."));
            if visit.entry.is_dir() {
                open.push(dest.put_dir(&parent, name, from, &Visit { partial: false, ..visit.clone() }, keep(&visit.entry))?);
            } else {
                dest.put(&parent, name, from, &visit, keep(&visit.entry), queue)?;
            }
        }
        Ok(())
    })
}

/// What decides whether an entry was changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    kind: Kind,
    inode: (u64, u64),
    size: u64,
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, u32),
    ctime: (i64, u32),
}

/// State of a plain folder at one moment.
#[derive(Debug, Clone, Default)]
pub struct Index {
    entries: BTreeMap<PathBuf, Stamp>,
    /// Owners that the disk does not hold.
    owners: Owners,
}

impl Index {
    /// Of everything in `dir`.
    pub fn of(dir: &Path) -> Result<Self, FileError> {
        let tree = plain(dir);
        let mut entries = BTreeMap::new();
        for visit in walk(&tree, Path::new("")) {
            let visit = visit.map_err(FileError::io("read", dir))?;
            entries.insert(visit.path, stamp(&visit.entry));
        }
        Ok(Self { entries, owners: Owners::new() })
    }

    /// With the intended owners that the disk does not hold.
    #[must_use]
    pub fn owned(self, owners: Owners) -> Self {
        Self { owners, ..self }
    }
}

/// As a folder, for a snapshot of one layer would take a 0/0 device for a whiteout.
fn plain(dir: &Path) -> Folder {
    Folder::new(dir, Patterns::default()).with_owners()
}

fn stamp(entry: &Entry) -> Stamp {
    Stamp {
        kind: entry.kind,
        inode: (entry.inode.0, entry.inode.1),
        size: entry.size,
        mode: entry.mode,
        owner: (entry.uid, entry.gid),
        mtime: entry.mtime,
        ctime: entry.ctime,
    }
}

/// The folder itself with its real owners, and those that a table knows better.
struct Owned {
    tree: Folder,
    owners: Owners,
}

impl Tree for Owned {
    fn entry(&self, path: &Path) -> io::Result<Option<Entry>> {
        let Some(mut entry) = self.tree.entry(path)? else { return Ok(None) };
        if let Some(owner) = self.owners.get(path.as_os_str()) {
            (entry.uid, entry.gid) = (owner.uid, owner.gid);
            entry.mode = owner.permissions().unwrap_or(entry.mode);
            if let Some((mode, major, minor)) = owner.device() {
                (entry.kind, entry.mode) = (Kind::from_mode(mode, (major, minor)), mode & 0o7777);
            }
        }
        Ok(Some(entry))
    }
    fn names(&self, dir: &Path) -> io::Result<Vec<OsString>> {
        self.tree.names(dir)
    }
    fn locate(&self, path: &Path) -> io::Result<Option<Location>> {
        self.tree.locate(path)
    }
}

/// Writes what changed in `dir` since `before` into the existing empty folder `out`, in overlayfs form. `owners` are the intended owners
/// of paths of `dir` after the step: a path whose owner was another one before counts as changed. Returns the owners that the disk does not hold.
pub fn diff(before: &Index, dir: &Path, out: &Path, owners: Owners, ownership: Ownership) -> Result<Owners, FileError> {
    let tree = Owned { tree: plain(dir), owners };
    let after = Index::of(dir)?;
    let mut changed: BTreeSet<PathBuf> = BTreeSet::new();
    for (path, stamp) in &after.entries {
        let same = before.entries.get(path) == Some(stamp) && before.owners.get(path.as_os_str()) == tree.owners.get(path.as_os_str());
        if !same && !path.as_os_str().is_empty() {
            changed.insert(path.clone());
        }
    }
    let mut gone: Vec<&PathBuf> = Vec::new();
    for path in before.entries.keys().filter(|p| !after.entries.contains_key(*p)) {
        // Below something that is gone, or that is no folder any more, there is nothing to hide.
        let parent = path.parent().unwrap_or(Path::new(""));
        if after.entries.get(parent).is_some_and(|s| s.kind == Kind::Dir) {
            gone.push(path);
        }
    }
    let mut needed: BTreeSet<&Path> = BTreeSet::new();
    for path in changed.iter().chain(gone.iter().copied()) {
        needed.extend(path.ancestors().skip(1));
    }
    let mut dest = Dest::new(&Snapshot::default(), out, ownership)?;
    let choose = |path: &Path, entry: &Entry| {
        // Ancestors keep their metadata, as in a copy-up.
        if path.as_os_str().is_empty() || changed.contains(path) || (entry.is_dir() && needed.contains(path)) {
            Choice::Take
        } else {
            Choice::Skip
        }
    };
    write_visits(&mut dest, &tree, walk_with(&tree, Path::new(""), Box::new(choose)))?;
    for path in &changed {
        // A folder where something else was: nothing of it may show through. (A new folder over nothing needs no mark.)
        let (old, new) = (before.entries.get(path), after.entries.get(path));
        if new.is_some_and(|s| s.kind == Kind::Dir) && old.is_some_and(|s| s.kind != Kind::Dir) {
            dest.mark_opaque(path)?;
        }
    }
    for path in gone {
        dest.put_whiteout(path)?;
    }
    dest.finish()
}

/// Merges the layers of a snapshot above its `below` lowest ones into one diff folder, `out`. Returns the owners that the disk does not hold.
pub fn squash(snapshot: &Snapshot, below: usize, out: &Path, ownership: Ownership) -> Result<Owners, FileError> {
    let (lower, upper) = snapshot.layers.split_at(below.min(snapshot.layers.len()));
    let (all, base) = (View::new(snapshot), View::new(&Snapshot { layers: lower.to_vec() }));
    // What the layers have, and where they hide what is below.
    let (mut touched, mut hiding) = (BTreeSet::new(), BTreeSet::new());
    for layer in upper {
        let raw = plain(&layer.dir);
        for visit in walk(&raw, Path::new("")) {
            let visit = visit.map_err(FileError::io("read", "the layers"))?;
            let hides = match visit.entry.kind {
                Kind::Char(0, 0) => true,
                Kind::Dir => match raw.locate(&visit.path).map_err(FileError::io("read", &visit.path))? {
                    Some(at) => open_dir_at(&at.dir, &at.name)
                        .map_or(Ok(false), |dir| is_opaque(&dir))
                        .map_err(FileError::io("read", &visit.path))?,
                    None => false,
                },
                _ => false,
            };
            if hides {
                hiding.insert(visit.path.clone());
            }
            touched.insert(visit.path);
        }
    }
    let mut dest = Dest::new(&Snapshot::default(), out, ownership)?;
    let choose = |path: &Path, _: &Entry| if path.as_os_str().is_empty() || touched.contains(path) { Choice::Take } else { Choice::Skip };
    write_visits(&mut dest, &all, walk_with(&all, Path::new(""), Box::new(choose)))?;
    for path in &touched {
        let Some(old) = base.entry(path).map_err(FileError::io("read", path))? else { continue };
        // Below what hides, everything is hidden.
        let hidden = path.ancestors().skip(1).any(|above| !above.as_os_str().is_empty() && hiding.contains(above));
        match all.entry(path).map_err(FileError::io("read", path))? {
            Some(new) if new.is_dir() && (hiding.contains(path) || !old.is_dir()) => dest.mark_opaque(path)?,
            None if !hidden => {
                let parent = path.parent().unwrap_or(Path::new(""));
                if all.entry(parent).map_err(FileError::io("read", parent))?.is_some_and(|parent| parent.is_dir()) {
                    dest.put_whiteout(path)?;
                }
            }
            _ => {}
        }
    }
    dest.finish()
}

/// Writes the root file system as one uncompressed tar: names sorted, PAX where ustar does not suffice, hard links kept.
/// `mtime` (seconds since 1970) replaces every time; else whole seconds are kept.
pub fn write_tar(snapshot: &Snapshot, out: &mut dyn Write, mtime: Option<i64>) -> Result<(), FileError> {
    let view = View::new(snapshot);
    let mut builder = tar::Builder::new(out);
    let mut firsts: HashMap<(u64, u64), PathBuf> = HashMap::new();
    for visit in walk(&view, Path::new("")) {
        let visit = visit.map_err(FileError::io("read", "the files"))?;
        if visit.depth == 0 || visit.entry.kind == Kind::Socket {
            continue;
        }
        let Some(location) = view.locate(&visit.path).map_err(FileError::io("read", &visit.path))? else { continue };
        let entry = &visit.entry;
        let inode = (entry.kind == Kind::File && entry.inode.2 > 1).then_some((entry.inode.0, entry.inode.1));
        let first = inode.as_ref().and_then(|inode| firsts.get(inode).cloned());
        if let Some(inode) = inode {
            firsts.entry(inode).or_insert_with(|| visit.path.clone());
        }
        let link = match (entry.kind, &first) {
            (_, Some(first)) => Some(first.clone()),
            (Kind::Symlink, None) => Some(location.read_link().map_err(FileError::io("read", &visit.path))?),
            _ => None,
        };
        let xattrs =
            if first.is_some() { Vec::new() } else { location.xattrs().map_err(FileError::io("read the attributes of", &visit.path))? };
        let (header, pax) = tar_header(&visit, first.is_some(), link.as_deref(), &xattrs, mtime);
        if !pax.is_empty() {
            builder
                .append_pax_extensions(pax.iter().map(|(k, v)| (k.as_str(), v.as_slice())))
                .map_err(FileError::io("write", "the tar"))?;
        }
        if entry.kind == Kind::File && first.is_none() {
            let file = location.open().map_err(FileError::io("read", &visit.path))?;
            // Layers do not change, but a short file must not break the archive's frame.
            let content = file.take(entry.size).chain(io::repeat(0)).take(entry.size);
            builder.append(&header, content).map_err(FileError::io("write", "the tar"))?;
        } else {
            builder.append(&header, io::empty()).map_err(FileError::io("write", "the tar"))?;
        }
    }
    builder.into_inner().and_then(Write::flush).map_err(FileError::io("write", "the tar"))
}

type Records = Vec<(String, Vec<u8>)>;

fn tar_header(
    visit: &Visit,
    is_hard_link: bool,
    link: Option<&Path>,
    xattrs: &[(OsString, Vec<u8>)],
    mtime: Option<i64>,
) -> (Header, Records) {
    let entry = &visit.entry;
    let mut header = Header::new_ustar();
    let mut pax: Records = Vec::new();
    let mut name = visit.path.as_os_str().as_bytes().to_vec();
    let (kind, device) = match entry.kind {
        _ if is_hard_link => (EntryType::Link, None),
        Kind::File | Kind::Socket => (EntryType::Regular, None),
        Kind::Dir => {
            name.push(b'/');
            (EntryType::Directory, None)
        }
        Kind::Symlink => (EntryType::Symlink, None),
        Kind::Char(major, minor) => (EntryType::Char, Some((major, minor))),
        Kind::Block(major, minor) => (EntryType::Block, Some((major, minor))),
        Kind::Fifo => (EntryType::Fifo, None),
    };
    header.set_entry_type(kind);
    if name.len() <= 100 && name.is_ascii() {
        header.as_old_mut().name[..name.len()].copy_from_slice(&name);
    } else {
        let short = b"long-name";
        header.as_old_mut().name[..short.len()].copy_from_slice(short);
        pax.push(("path".into(), name));
    }
    if let Some(link) = link {
        let target = link.as_os_str().as_bytes();
        if target.len() <= 100 && target.is_ascii() {
            header.as_old_mut().linkname[..target.len()].copy_from_slice(target);
        } else {
            pax.push(("linkpath".into(), target.to_vec()));
        }
    }
    let mut number = |key: &str, value: u64, limit: u64| {
        if value > limit {
            pax.push((key.into(), value.to_string().into_bytes()));
        }
        value.min(limit)
    };
    let size = if kind == EntryType::Regular { entry.size } else { 0 };
    // Seven octal digits for ids, eleven for sizes and times.
    header.set_uid(number("uid", entry.uid.into(), 0o777_7777));
    header.set_gid(number("gid", entry.gid.into(), 0o777_7777));
    header.set_size(number("size", size, 0o777_7777_7777));
    let time = mtime.unwrap_or(entry.mtime.0);
    if (0..=0o777_7777_7777).contains(&time) {
        header.set_mtime(time as u64);
    } else {
        header.set_mtime(0);
        pax.push(("mtime".into(), time.to_string().into_bytes()));
    }
    header.set_mode(entry.mode);
    if let (Some((major, minor)), Some(ustar)) = (device, header.as_ustar_mut()) {
        ustar.set_device_major(major);
        ustar.set_device_minor(minor);
    }
    for (name, value) in xattrs {
        pax.push((format!("SCHILY.xattr.{}", name.to_string_lossy()), value.clone()));
    }
    header.set_cksum();
    (header, pax)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use ovenbird_oci::layer::Owner;

    use super::*;

    #[test]
    fn an_owner_that_stays_is_no_change() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("dir");
        fs::create_dir(&dir).unwrap();
        for name in ["kept", "given", "written"] {
            fs::write(dir.join(name), "").unwrap();
        }
        let owner = |id| Owner { uid: id, gid: id, node: None };
        let owners = |rows: &[(&str, u32)]| rows.iter().map(|(name, id)| ((*name).into(), owner(*id))).collect::<Owners>();
        let before = Index::of(&dir).unwrap().owned(owners(&[("kept", 5), ("given", 5), ("written", 5)]));
        fs::write(dir.join("written"), "more").unwrap();
        let out = root.path().join("out");
        fs::create_dir(&out).unwrap();
        let after = owners(&[("kept", 5), ("given", 6), ("written", 5)]);
        let changed = diff(&before, &dir, &out, after, Ownership::Recorded).unwrap();
        assert_eq!(changed, owners(&[("given", 6), ("written", 5)]));
        assert!(!out.join("kept").exists() && out.join("given").exists() && out.join("written").exists());
    }
}
