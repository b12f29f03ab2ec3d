//! [`Tree`] over a snapshot ([`View`]) and over a part of another tree ([`SubTree`]).
//!
//! No descriptor stays open for each layer: a stack may be higher than the limit of open files. Layers never
//! change and belong to nobody else, so a path whose folders were looked at one by one may be used as a whole.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use ovenbird_oci::layer::{Lower, untold_owner};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::catalog::Mark;
use super::tree::{Entry, Kind, Location, Tree, clean, open, resolve};
use super::{LayerDir, Snapshot};

/// Mark of a folder that hides everything of the layers below.
pub(crate) const OPAQUE: &str = "user.overlay.opaque";

/// Open folders a view keeps.
const MAX_HANDLES: usize = 64;
/// Layers of folders a view remembers, absent folders counted as one.
const MAX_PARTS: usize = 256 * 1024;
/// Longest path that a system call takes, with its end (PATH_MAX).
const MAX_CALL: usize = 4096;

#[derive(Default)]
struct Cache {
    /// Layers that hold a folder, highest first; none: it is not there.
    parts: HashMap<OsString, Arc<[usize]>>,
    size: usize,
    handles: HashMap<(usize, OsString), Arc<OwnedFd>>,
}

/// Is this overlayfs' mark for "nothing here"?
pub(crate) fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Does this folder hide the layers below?
pub(crate) fn is_opaque(dir: &OwnedFd) -> io::Result<bool> {
    opaque(|value| rustix::fs::fgetxattr(dir, OPAQUE, value))
}

fn opaque(get: impl FnOnce(&mut [u8]) -> Result<usize, Errno>) -> io::Result<bool> {
    let mut value = [0u8; 8];
    match get(&mut value) {
        Ok(n) => Ok(&value[..n] == b"y"),
        Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::RANGE | Errno::ACCESS) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Folder and name; `None` for the root. Refuses what could leave the tree.
pub(super) fn split(path: &Path) -> io::Result<Option<(&Path, &OsStr)>> {
    if path.components().any(|c| !matches!(c, Component::Normal(_))) {
        return Err(Errno::INVAL.into());
    }
    Ok(path.parent().zip(path.file_name()))
}

/// A snapshot's root file system, read from its diff folders without mounting anything.
pub struct View {
    /// Highest first.
    layers: Vec<LayerDir>,
    cache: Mutex<Cache>,
}

impl View {
    /// Of these layers. Nothing is opened yet.
    pub fn new(snapshot: &Snapshot) -> Self {
        Self { layers: snapshot.layers.iter().rev().cloned().collect(), cache: Mutex::default() }
    }

    /// Looks at the disk again, after a layer changed.
    pub(crate) fn forget(&self) {
        *self.cache() = Cache::default();
    }

    fn cache(&self) -> std::sync::MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Uses the real path of an entry whose folders are known to be folders. What is longer than a system call takes is gone to in pieces.
    fn reach<T>(&self, layer: usize, path: &Path, act: impl FnOnce(&Path) -> Result<T, Errno>) -> Result<T, Errno> {
        let dir = &self.layers[layer].dir;
        let whole = if path.as_os_str().is_empty() { dir.clone() } else { dir.join(path) };
        if whole.as_os_str().len() < MAX_CALL {
            return act(&whole);
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut at = rustix::fs::open(dir, flags, Mode::empty())?;
        let mut piece = PathBuf::new();
        for name in path {
            if piece.as_os_str().len() + name.len() >= MAX_CALL / 2 {
                at = rustix::fs::openat(&at, &piece, flags, Mode::empty())?;
                piece.clear();
            }
            piece.push(name);
        }
        act(&Path::new("/proc/self/fd").join(at.as_raw_fd().to_string()).join(piece))
    }

    /// What one layer has at a path.
    fn mark(&self, layer: usize, path: &Path) -> io::Result<Option<Mark>> {
        if let Some(catalog) = self.layers[layer].catalog() {
            return Ok(catalog.get(path));
        }
        let found = self.reach(layer, path, |real| {
            let stat = rustix::fs::lstat(real)?;
            Ok(match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => Mark::Folder { opaque: opaque(|value| rustix::fs::lgetxattr(real, OPAQUE, value)).unwrap_or(false) },
                _ if is_whiteout(&stat) => Mark::Whiteout,
                _ => Mark::Other,
            })
        });
        match found {
            Ok(mark) => Ok(Some(mark)),
            Err(Errno::NOENT) if !path.as_os_str().is_empty() => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The layers that a folder is made of, highest first; none when there is no such folder.
    fn parts(&self, path: &Path) -> io::Result<Arc<[usize]>> {
        let mut missing = Vec::new();
        let mut above: Arc<[usize]> = (0..self.layers.len()).collect();
        {
            let cache = self.cache();
            for folder in path.ancestors() {
                if let Some(known) = cache.parts.get(folder.as_os_str()) {
                    above = known.clone();
                    break;
                }
                missing.push(folder);
            }
        }
        while let Some(folder) = missing.pop() {
            let mut parts = Vec::new();
            for layer in above.iter().copied() {
                match self.mark(layer, folder)? {
                    None => {}
                    Some(Mark::Folder { opaque }) => {
                        parts.push(layer);
                        if opaque {
                            break;
                        }
                    }
                    // Anything else than a folder hides the folders below it.
                    Some(Mark::Whiteout | Mark::Other) => break,
                }
            }
            above = parts.into();
            let mut cache = self.cache();
            let size = above.len().max(1);
            if cache.size + size > MAX_PARTS {
                *cache = Cache::default();
            }
            cache.size += size;
            cache.parts.insert(folder.as_os_str().to_owned(), above.clone());
        }
        Ok(above)
    }

    /// Which layer holds the entry, and its `stat`.
    fn find(&self, path: &Path) -> io::Result<Option<(usize, Stat)>> {
        let Some((parent, _)) = split(path)? else {
            return match self.parts(path)?.first() {
                Some(layer) => Ok(Some((*layer, self.reach(*layer, path, |real| rustix::fs::lstat(real))?))),
                None => Ok(None),
            };
        };
        for layer in self.parts(parent)?.iter().copied() {
            match self.layers[layer].catalog().map(|catalog| catalog.get(path)) {
                Some(None) => continue,
                Some(Some(Mark::Whiteout)) => return Ok(None),
                _ => {}
            }
            match self.reach(layer, path, |real| rustix::fs::lstat(real)) {
                Ok(stat) if is_whiteout(&stat) => return Ok(None),
                Ok(stat) => return Ok(Some((layer, stat))),
                Err(Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(None)
    }

    fn describe(&self, layer: usize, path: &Path, stat: &Stat) -> Entry {
        let mut entry = Entry::from_stat(stat);
        let owners = &self.layers[layer].owners;
        if let Some(owner) = owners.get(path.as_os_str()) {
            (entry.uid, entry.gid) = (owner.uid, owner.gid);
            entry.mode = owner.permissions().unwrap_or(entry.mode);
            if let Some((mode, major, minor)) = owner.device() {
                entry.kind = Kind::from_mode(mode, (major, minor));
                entry.mode = mode & 0o7777;
                entry.size = 0;
            }
        } else {
            (entry.uid, entry.gid) = untold_owner(entry.uid, entry.gid);
        }
        entry
    }

    /// What is in a folder: for each name the uppermost layer's, `None` where that hides it. `look` has the layer, its folder and the name.
    fn read_dir<T>(
        &self,
        dir: &Path,
        mut look: impl FnMut(usize, &OwnedFd, &OsStr, FileType) -> io::Result<Option<T>>,
    ) -> io::Result<BTreeMap<OsString, Option<T>>> {
        let mut found = BTreeMap::new();
        if self.layers.is_empty() && dir.as_os_str().is_empty() {
            return Ok(found);
        }
        split(dir)?;
        let parts = self.parts(dir)?;
        if parts.is_empty() {
            return Err(if self.find(dir)?.is_some() { Errno::NOTDIR } else { Errno::NOENT }.into());
        }
        for layer in parts.iter().copied() {
            let fd = self.open_part(layer, dir)?;
            for item in Dir::read_from(&fd)? {
                let item = item?;
                let name = OsStr::from_bytes(item.file_name().to_bytes());
                if name == "." || name == ".." || found.contains_key(name) {
                    continue;
                }
                found.insert(name.to_owned(), look(layer, &fd, name, item.file_type())?);
            }
        }
        Ok(found)
    }

    /// Where an entry really is, and what the layer's table says of it.
    pub(crate) fn on_disk(&self, path: &Path) -> io::Result<Option<Lower>> {
        Ok(self.find(path)?.map(|(layer, _)| {
            let LayerDir { dir, owners, .. } = &self.layers[layer];
            Lower { path: dir.join(path), owner: owners.get(path.as_os_str()).copied() }
        }))
    }

    /// Opens a layer's part of a folder.
    fn open_part(&self, layer: usize, dir: &Path) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(self.reach(layer, dir, |real| rustix::fs::openat(CWD, real, flags, Mode::empty()))?)
    }
}

impl Tree for View {
    fn entry(&self, path: &Path) -> io::Result<Option<Entry>> {
        if self.layers.is_empty() {
            return Ok(path.as_os_str().is_empty().then_some(Entry {
                kind: Kind::Dir,
                mode: 0o755,
                uid: 0,
                gid: 0,
                size: 0,
                mtime: (0, 0),
                ctime: (0, 0),
                inode: (0, 0, 1),
            }));
        }
        let Some((layer, stat)) = self.find(path)? else { return Ok(None) };
        Ok(Some(self.describe(layer, path, &stat)))
    }

    fn names(&self, dir: &Path) -> io::Result<Vec<OsString>> {
        let found = self.read_dir(dir, |_, fd, name, kind| {
            let hidden = matches!(kind, FileType::CharacterDevice | FileType::Unknown)
                && is_whiteout(&rustix::fs::statat(fd, name, AtFlags::SYMLINK_NOFOLLOW)?);
            Ok((!hidden).then_some(()))
        })?;
        Ok(found.into_iter().filter_map(|(name, visible)| visible.map(|()| name)).collect())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<(OsString, Entry)>> {
        let found = self.read_dir(dir, |layer, fd, name, _| {
            let stat = rustix::fs::statat(fd, name, AtFlags::SYMLINK_NOFOLLOW)?;
            Ok((!is_whiteout(&stat)).then(|| self.describe(layer, &dir.join(name), &stat)))
        })?;
        Ok(found.into_iter().filter_map(|(name, entry)| Some((name, entry?))).collect())
    }

    fn locate(&self, path: &Path) -> io::Result<Option<Location>> {
        let Some((layer, _)) = self.find(path)? else { return Ok(None) };
        let name = path.file_name().unwrap_or(OsStr::new(".")).to_owned();
        let key = (layer, path.parent().unwrap_or(path).as_os_str().to_owned());
        let known = self.cache().handles.get(&key).cloned();
        let dir = if let Some(dir) = known {
            dir
        } else {
            let dir = Arc::new(self.open_part(layer, Path::new(&key.1))?);
            let mut cache = self.cache();
            if cache.handles.len() >= MAX_HANDLES {
                cache.handles.clear();
            }
            cache.handles.insert(key, dir.clone());
            dir
        };
        Ok(Some(Location { dir, name }))
    }
}

/// Largest file that [`read_text`] reads.
const MAX_TEXT: u64 = 16 << 20;

/// A small text file of the image by absolute path, links followed inside the root; `None` when it is not there, no text or larger than 16 MiB.
pub fn read_text(tree: &dyn Tree, path: &str) -> Option<String> {
    let path = resolve(tree, Path::new(path)).ok()?;
    let mut text = String::new();
    let mut file = open(tree, &path).ok()?.take(MAX_TEXT + 1);
    (file.read_to_string(&mut text).ok()? as u64 <= MAX_TEXT).then_some(text)
}

/// A folder of another tree as a root. Ignore patterns stay those of the whole tree.
pub struct SubTree {
    inner: Arc<dyn Tree>,
    root: PathBuf,
}

impl SubTree {
    /// `root` is relative to the root of `inner`; no symlink in it is followed.
    pub fn new(inner: Arc<dyn Tree>, root: impl AsRef<Path>) -> Self {
        Self { inner, root: clean(root) }
    }

    fn at(&self, path: &Path) -> PathBuf {
        // `join("")` would add a slash at the end.
        if path.as_os_str().is_empty() { self.root.clone() } else { self.root.join(path) }
    }
}

impl Tree for SubTree {
    fn entry(&self, path: &Path) -> io::Result<Option<Entry>> {
        self.inner.entry(&self.at(path))
    }

    fn names(&self, dir: &Path) -> io::Result<Vec<OsString>> {
        self.inner.names(&self.at(dir))
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<(OsString, Entry)>> {
        self.inner.list(&self.at(dir))
    }

    fn ignored_by(&self, path: &Path) -> Option<&str> {
        self.inner.ignored_by(&self.at(path))
    }

    fn can_prune(&self, dir: &Path) -> bool {
        self.inner.can_prune(&self.at(dir))
    }

    fn locate(&self, path: &Path) -> io::Result<Option<Location>> {
        self.inner.locate(&self.at(path))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use ovenbird_dockerfile::ignore::Patterns;
    use ovenbird_oci::layer::Owners;

    use super::*;
    use crate::snapshot::folder::Folder;
    use crate::snapshot::tree::{resolve_parent, walk};

    fn layer(dir: &Path, entries: &[&str]) -> LayerDir {
        fs::create_dir_all(dir).unwrap();
        for entry in entries {
            let path = dir.join(entry.trim_end_matches(['/', '!', '-']).split(['=', '>']).next().unwrap());
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            match entry {
                e if e.ends_with('-') => {
                    rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::CharacterDevice, rustix::fs::Mode::empty(), 0).unwrap();
                }
                e if e.ends_with('/') => fs::create_dir_all(&path).unwrap(),
                e if e.ends_with("/!") => {
                    fs::create_dir_all(&path).unwrap();
                    rustix::fs::setxattr(&path, OPAQUE, b"y", rustix::fs::XattrFlags::empty()).unwrap();
                }
                e => match e.split_once('=') {
                    Some((_, text)) => fs::write(&path, text).unwrap(),
                    None => symlink(e.split_once('>').unwrap().1, &path).unwrap(),
                },
            }
        }
        LayerDir::new(dir, Owners::new())
    }

    fn show(tree: &dyn Tree) -> Vec<String> {
        let show = |path: &Path| match tree.locate(path).unwrap().unwrap().open() {
            Ok(file) => format!("={}", io::read_to_string(file).unwrap()),
            Err(_) => String::new(),
        };
        walk(tree, Path::new(""))
            .skip(1)
            .map(|v| v.unwrap())
            .map(|v| {
                format!("{}{}{:?}", v.path.display(), if v.entry.kind == Kind::File { show(&v.path) } else { String::new() }, v.entry.kind)
            })
            .collect()
    }

    /// The kernel's overlayfs is the oracle.
    #[test]
    fn a_view_is_what_overlayfs_shows() {
        let stacks: &[&[&[&str]]] = &[
            &[&["a=1"]],
            &[&["a=1", "d/x=1"], &["b=2", "d/y=2"]],
            &[&["a=1", "d/x=1", "d/y=1"], &["a-", "d/x-"]],
            &[&["d/x=1", "d/s/y=1"], &["d/!", "d/z=2"]],
            &[&["d/x=1"], &["d-"], &["d/y=2"]],
            &[&["d/x=1"], &["d=file"], &["d/y=2"]],
            &[&["d=file"], &["d/y=2"]],
            &[&["d/x=1"], &["d=file"]],
            &[&["d/x=1"], &["d>e", "e/f=1"]],
            &[&["d/s/x=1"], &["d/!", "d/s/y=2"], &["d/s/z=3", "d/s/y-"]],
            &[&["a=1"], &["a-"], &["a=3"]],
            &[&["d/x=1"], &["e=2"], &["d/"]],
            &[&["d/x=1", "d/y=1"], &["d/x-"], &["d/!"], &["d/w=4"]],
            &[&["gone-", "a=1"], &["b=2"]],
        ];
        let mut compared = 0;
        for (at, stack) in stacks.iter().enumerate() {
            let dir = tempfile::tempdir().unwrap();
            let layers: Vec<LayerDir> =
                stack.iter().enumerate().map(|(n, entries)| layer(&dir.path().join(n.to_string()), entries)).collect();
            // Overlayfs wants two layers.
            let empty = layer(&dir.path().join("empty"), &[]);
            let mount = dir.path().join("mount");
            fs::create_dir(&mount).unwrap();
            let lowers: Vec<String> = layers.iter().rev().chain([&empty]).map(|l| l.dir.display().to_string()).collect();
            let options = std::ffi::CString::new(format!("lowerdir={},userxattr", lowers.join(":"))).unwrap();
            let mounted = rustix::mount::mount("overlay", &mount, "overlay", rustix::mount::MountFlags::RDONLY, options.as_c_str());
            if let Err(error) = mounted {
                println!("skipped: cannot mount an overlay: {error}");
                return;
            }
            let expect = show(&Folder::new(&mount, Patterns::default()));
            rustix::mount::unmount(&mount, rustix::mount::UnmountFlags::DETACH).unwrap();
            assert_eq!(show(&View::new(&Snapshot { layers })), expect, "stack {at}");
            compared += 1;
        }
        assert_eq!(compared, stacks.len());
    }

    #[test]
    fn links_are_followed_inside_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let entries = [
            "d/f=1",
            "l>d",
            "abs>/d",
            "up>../../../d",
            "d/back>../l/f",
            "gone>no/thing",
            "a>b",
            "b>a",
            "s/t/f=1",
            "deep>s/t",
            "s/dots>t/.././t/f",
        ];
        let tree = View::new(&Snapshot { layers: vec![layer(dir.path(), &entries)] });
        for (path, all, parent) in [
            ("d/f", Some("d/f"), "d/f"),
            ("l", Some("d"), "l"),
            ("l/f", Some("d/f"), "d/f"),
            ("abs/f", Some("d/f"), "d/f"),
            ("/abs/f", Some("d/f"), "d/f"),
            ("up/f", Some("d/f"), "d/f"),
            ("d/back", Some("d/f"), "d/back"),
            ("gone", Some("no/thing"), "gone"),
            ("gone/x", Some("no/thing/x"), "no/thing/x"),
            ("deep/../f", Some("s/f"), "s/f"),
            ("s/dots", Some("s/t/f"), "s/dots"),
            ("../../d", Some("d"), "d"),
            ("x/../d", Some("d"), "d"),
            ("", Some(""), ""),
            ("a", None, "a"),
        ] {
            assert_eq!(resolve(&tree, Path::new(path)).ok(), all.map(PathBuf::from), "{path}");
            assert_eq!(resolve_parent(&tree, Path::new(path)).unwrap(), Path::new(parent), "{path}");
        }
    }

    #[test]
    fn a_folder_is_never_left() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("secret"), "s").unwrap();
        layer(&dir.path().join("c"), &["d/f=1", "out>..", "d/out>/etc"]);
        let tree = Folder::new(dir.path().join("c"), Patterns::default());
        for path in ["out/secret", "d/out/passwd", "out"] {
            let path = Path::new(path);
            assert!(path == Path::new("out") || tree.entry(path).unwrap().is_none(), "{}", path.display());
            assert!(open(&tree, path).is_err());
            assert!(tree.names(path).is_err());
        }
        for path in ["../secret", "d/../../secret", "/etc/passwd"] {
            assert!(tree.entry(Path::new(path)).is_err(), "{path}");
        }
        // The folder becomes a link while it is read.
        assert!(tree.entry(Path::new("d/f")).unwrap().is_some());
        fs::rename(dir.path().join("c/d"), dir.path().join("c/old")).unwrap();
        symlink("/etc", dir.path().join("c/d")).unwrap();
        assert!(open(&tree, Path::new("d/passwd")).is_err());
        let part = SubTree::new(Arc::new(tree), "old");
        assert!(part.entry(Path::new("f")).unwrap().is_some() && part.entry(Path::new("")).unwrap().unwrap().is_dir());
        assert_eq!(part.names(Path::new("")).unwrap(), ["f", "out"]);
    }

    #[test]
    fn more_folders_than_handles() {
        let dir = tempfile::tempdir().unwrap();
        let entries: Vec<String> = (0..3 * MAX_HANDLES).map(|n| format!("{n}/a/b/f={n}")).collect();
        let lower = layer(&dir.path().join("1"), &entries.iter().map(String::as_str).collect::<Vec<_>>());
        let upper = layer(&dir.path().join("2"), &["5/a/b/g=x", "6/a-"]);
        let view = View::new(&Snapshot { layers: vec![lower, upper] });
        let files = walk(&view, Path::new("")).filter(|v| v.as_ref().unwrap().entry.kind == Kind::File).count();
        assert_eq!(files, 3 * MAX_HANDLES);
    }
}
