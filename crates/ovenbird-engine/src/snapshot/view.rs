//! [`Tree`] over a snapshot ([`View`]), over a plain folder with ignore patterns ([`Folder`]) and
//! over a part of another tree ([`SubTree`]).
//!
//! Folders are opened once, each from its parent's handle, and kept in a bounded cache.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{OsStr, OsString};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use ovenbird_dockerfile::ignore::Patterns;
use ovenbird_oci::layer::Owners;
use rustix::fs::{AtFlags, Dir, FileType, Stat};
use rustix::io::Errno;

use super::tree::{Entry, Kind, Location, Tree, clean, open, open_dir_at, open_dir_path, resolve};
use super::{LayerDir, Snapshot};

/// Mark of a folder that hides everything of the layers below.
pub(crate) const OPAQUE: &str = "user.overlay.opaque";

/// Open folders a tree keeps; below the usual limit of 1,024 open files with several trees in use.
const MAX_HANDLES: usize = 128;
/// Paths a tree remembers, absent ones included.
const MAX_PATHS: usize = 16 * 1024;

/// A folder as the layers hold it, highest first.
struct Parts(Vec<(usize, Arc<OwnedFd>)>);

#[derive(Default)]
struct Cache {
    dirs: HashMap<OsString, Option<Arc<Parts>>>,
    handles: usize,
}

/// Folders on top of each other. With one of them and without `overlay`, a plain folder.
struct Stack {
    /// Highest first.
    layers: Vec<LayerDir>,
    /// Whiteouts and opaque folders have a meaning.
    overlay: bool,
    cache: Mutex<Cache>,
}

impl Stack {
    fn new(layers: Vec<LayerDir>, overlay: bool) -> Self {
        Self { layers, overlay, cache: Mutex::default() }
    }

    fn forget(&self) {
        *self.cache.lock().unwrap_or_else(PoisonError::into_inner) = Cache::default();
    }

    /// A folder, from the nearest one above it that is known; no recursion, since a layer may nest folders as deep as paths go.
    fn dir(&self, path: &Path) -> io::Result<Option<Arc<Parts>>> {
        let (mut unknown, mut above) = (vec![], None);
        for ancestor in path.ancestors() {
            if let Some(known) = self.cache.lock().unwrap_or_else(PoisonError::into_inner).dirs.get(ancestor.as_os_str()) {
                above.clone_from(known);
                break;
            }
            unknown.push(ancestor);
        }
        for dir in unknown.into_iter().rev() {
            let parts = match (dir.file_name(), &above) {
                (None, _) => self.root()?,
                (Some(name), Some(parent)) => self.child(parent, name)?,
                // What is below is asked for next, most times.
                (Some(_), None) => return Ok(self.remember(path, vec![])),
            };
            above = self.remember(dir, parts);
        }
        Ok(above)
    }

    fn root(&self) -> io::Result<Vec<(usize, Arc<OwnedFd>)>> {
        let mut parts = Vec::new();
        for (at, layer) in self.layers.iter().enumerate() {
            let fd = open_dir_path(&layer.dir)?;
            let opaque = self.overlay && is_opaque(&fd)?;
            parts.push((at, Arc::new(fd)));
            if opaque {
                break;
            }
        }
        Ok(parts)
    }

    fn child(&self, parent: &Parts, name: &OsStr) -> io::Result<Vec<(usize, Arc<OwnedFd>)>> {
        let mut parts = Vec::new();
        for (layer, dir) in &parent.0 {
            match open_dir_at(dir, name) {
                Ok(fd) => {
                    let opaque = self.overlay && is_opaque(&fd)?;
                    parts.push((*layer, Arc::new(fd)));
                    if opaque {
                        break;
                    }
                }
                Err(Errno::NOENT) => {}
                // Anything else than a folder hides the folders below it.
                Err(Errno::NOTDIR | Errno::LOOP) => break,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(parts)
    }

    fn remember(&self, path: &Path, parts: Vec<(usize, Arc<OwnedFd>)>) -> Option<Arc<Parts>> {
        let count = parts.len();
        let found = (count > 0).then(|| Arc::new(Parts(parts)));
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if cache.handles + count > MAX_HANDLES.max(2 * count) || cache.dirs.len() >= MAX_PATHS {
            *cache = Cache::default();
        }
        cache.handles += count;
        cache.dirs.insert(path.as_os_str().to_owned(), found.clone());
        found
    }

    /// Which layer holds the entry: its folder's handle and its `stat`.
    fn find(&self, path: &Path) -> io::Result<Option<(usize, Arc<OwnedFd>, Stat)>> {
        let Some((parent, name)) = split(path)? else {
            return Ok(match self.dir(path)? {
                None => None,
                Some(parts) => {
                    let (layer, fd) = &parts.0[0];
                    Some((*layer, fd.clone(), rustix::fs::fstat(fd)?))
                }
            });
        };
        let Some(parts) = self.dir(parent)? else { return Ok(None) };
        for (layer, dir) in &parts.0 {
            match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) if self.overlay && is_whiteout(&stat) => return Ok(None),
                Ok(stat) => return Ok(Some((*layer, dir.clone(), stat))),
                Err(Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(None)
    }

    fn entry(&self, path: &Path) -> io::Result<Option<Entry>> {
        let Some((layer, _, stat)) = self.find(path)? else { return Ok(None) };
        let layer = &self.layers[layer];
        let mut entry = Entry::from_stat(&stat, layer.dir.join(path));
        if let Some(owner) = layer.owners.get(path.as_os_str()) {
            (entry.uid, entry.gid) = (owner.uid, owner.gid);
            if let Some((mode, major, minor)) = owner.node {
                entry.kind = Kind::from_mode(mode, (major, minor));
                entry.mode = mode & 0o7777;
                entry.size = 0;
            }
        }
        Ok(Some(entry))
    }

    fn names(&self, dir: &Path) -> io::Result<Vec<OsString>> {
        split(dir)?;
        let Some(parts) = self.dir(dir)? else {
            return Err(if self.find(dir)?.is_some() { Errno::NOTDIR } else { Errno::NOENT }.into());
        };
        if let [(_, fd)] = &parts.0[..]
            && !self.overlay
        {
            let mut names = Vec::new();
            for item in Dir::read_from(fd)? {
                let item = item?;
                push_name(item.file_name().to_bytes(), |name| names.push(name.to_owned()));
            }
            names.sort_unstable();
            return Ok(names);
        }
        let mut names = BTreeMap::new();
        for (_, fd) in &parts.0 {
            for item in Dir::read_from(fd)? {
                let item = item?;
                let mut name = None;
                push_name(item.file_name().to_bytes(), |n| name = Some(n.to_owned()));
                let Some(name) = name else { continue };
                if names.contains_key(&name) {
                    continue;
                }
                let hidden = matches!(item.file_type(), FileType::CharacterDevice | FileType::Unknown)
                    && is_whiteout(&rustix::fs::statat(fd, item.file_name(), AtFlags::SYMLINK_NOFOLLOW)?);
                names.insert(name, hidden);
            }
        }
        Ok(names.into_iter().filter(|(_, hidden)| !hidden).map(|(name, _)| name).collect())
    }

    fn locate(&self, path: &Path) -> io::Result<Option<Location>> {
        let name = path.file_name().unwrap_or(OsStr::new(".")).to_owned();
        let immutable = self.overlay;
        Ok(self.find(path)?.map(|(_, dir, _)| Location { dir, name, immutable }))
    }
}

fn push_name(name: &[u8], push: impl FnOnce(&OsStr)) {
    if name != b"." && name != b".." {
        push(OsStr::from_bytes(name));
    }
}

/// Folder and name; `None` for the root. Refuses what could leave the tree.
fn split(path: &Path) -> io::Result<Option<(&Path, &OsStr)>> {
    if path.components().any(|c| !matches!(c, Component::Normal(_))) {
        return Err(Errno::INVAL.into());
    }
    Ok(path.parent().zip(path.file_name()))
}

/// Is this overlayfs' mark for "nothing here"?
pub(crate) fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Does this folder hide the layers below?
pub(crate) fn is_opaque(dir: &OwnedFd) -> io::Result<bool> {
    let mut value = [0u8; 8];
    match rustix::fs::fgetxattr(dir, OPAQUE, &mut value) {
        Ok(n) => Ok(&value[..n] == b"y"),
        Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::RANGE | Errno::ACCESS) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// A snapshot's root file system, read from its diff folders without mounting anything.
pub struct View {
    stack: Stack,
}

impl View {
    /// Of these layers. Nothing is opened yet.
    pub fn new(snapshot: &Snapshot) -> Self {
        Self { stack: Stack::new(snapshot.layers.iter().rev().cloned().collect(), true) }
    }

    /// Looks at the disk again, after a layer changed.
    pub(crate) fn forget(&self) {
        self.stack.forget();
    }
}

impl Tree for View {
    fn entry(&self, path: &Path) -> io::Result<Option<Entry>> {
        if self.stack.layers.is_empty() {
            return Ok(path.as_os_str().is_empty().then(|| Entry {
                kind: Kind::Dir,
                mode: 0o755,
                uid: 0,
                gid: 0,
                size: 0,
                mtime: (0, 0),
                disk: PathBuf::new(),
                inode: (0, 0, 1),
            }));
        }
        self.stack.entry(path)
    }

    fn names(&self, dir: &Path) -> io::Result<Vec<OsString>> {
        if self.stack.layers.is_empty() && dir.as_os_str().is_empty() {
            return Ok(Vec::new());
        }
        self.stack.names(dir)
    }

    fn locate(&self, path: &Path) -> io::Result<Option<Location>> {
        self.stack.locate(path)
    }
}

/// A local context: a folder of somebody else, who may change it while it is read. Never leaves the folder; owners are 0:0.
pub struct Folder {
    stack: Stack,
    ignore: Patterns,
}

impl Folder {
    /// Of this folder and its ignore file. Nothing is opened yet.
    pub fn new(dir: impl Into<PathBuf>, ignore: Patterns) -> Self {
        Self { stack: Stack::new(vec![LayerDir { dir: dir.into(), owners: Arc::new(Owners::new()) }], false), ignore }
    }
}

impl Tree for Folder {
    fn entry(&self, path: &Path) -> io::Result<Option<Entry>> {
        Ok(self.stack.entry(path)?.map(|entry| Entry { uid: 0, gid: 0, ..entry }))
    }

    fn names(&self, dir: &Path) -> io::Result<Vec<OsString>> {
        self.stack.names(dir)
    }

    fn is_ignored(&self, path: &Path) -> bool {
        !self.ignore.is_empty() && self.ignore.is_ignored(&path.to_string_lossy())
    }

    fn can_prune(&self, dir: &Path) -> bool {
        self.ignore.can_prune(&dir.to_string_lossy())
    }

    fn locate(&self, path: &Path) -> io::Result<Option<Location>> {
        self.stack.locate(path)
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

    fn is_ignored(&self, path: &Path) -> bool {
        self.inner.is_ignored(&self.at(path))
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

    use super::*;
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
        LayerDir { dir: dir.to_owned(), owners: Arc::new(Owners::new()) }
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
    fn paths_of_any_depth_need_little_stack() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("fs/d/d")).unwrap();
        let layer = LayerDir { dir: dir.path().join("fs"), owners: Arc::default() };
        let view = View::new(&Snapshot { layers: vec![layer] });
        let small = std::thread::Builder::new().stack_size(128 * 1024).spawn(move || {
            assert!(view.entry(Path::new(&vec!["d"; 20_000].join("/"))).unwrap().is_none());
            assert!(view.entry(Path::new("d/d")).unwrap().is_some());
        });
        small.unwrap().join().unwrap();
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
