//! Content keys: what a copy or a bind mount would see of a tree, as one digest. Times, inodes and
//! places on disk have no part in it.

use std::cell::RefCell;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use ovenbird_oci::Digest;
use ovenbird_oci::digest::Hasher;

use super::file::FileError;
use super::file::select::Selection;
use crate::plan::CopyAction;
use crate::snapshot::tree::{self, Entry, Kind, Tree, Visit, Walk, resolve};
use crate::trace::files::FileState;

pub use crate::snapshot::stat_cache::{Known, StatCache};

/// Digested first, so that a change of the form changes every key.
const FORM: &[u8] = b"ovenbird content 1\n";
/// Files that are worth a second thread.
const PARALLEL_FILES: usize = 16;
/// Files up to this many bytes are read in one go.
const SMALL: u64 = 128 * 1024;
/// Most hashing threads.
const MAX_THREADS: usize = 4;

/// Which metadata counts.
#[derive(Clone, Copy)]
struct Counted {
    mode: bool,
    owner: bool,
    /// The folder that the walk began with: a copy takes only what is in it.
    top: bool,
}

/// What a copy or a mount sees of a tree.
#[derive(Debug)]
pub struct Contents {
    /// All of it.
    pub digest: Digest,
    /// One by one.
    pub files: Vec<FileState>,
}

/// What `copy` selects of `from`: names relative to each source, kinds, modes (unless `--chmod` replaces them), owners (if kept),
/// link targets, extended attributes and content. Fails where the copy itself would fail to find its sources.
pub fn of_copy(from: &dyn Tree, copy: &CopyAction, cache: &dyn StatCache) -> Result<Contents, FileError> {
    let absolute_mode = copy.chmod.as_deref().is_some_and(|mode| mode.bytes().all(|b| b.is_ascii_digit()));
    let counted = Counted { mode: !absolute_mode, owner: copy.keep_owner && copy.chown.is_none(), top: false };
    let selection = Selection::new(from, copy)?;
    let mut items = Vec::new();
    for source in &selection.sources {
        // The name matters even for a file that is renamed: the destination may be a folder.
        items.push(Item::Source(source.name.as_encoded_bytes().to_vec()));
        collect(selection.walk(from, source), &source.path, !copy.keep_owner, &mut items)?;
    }
    hash(from, &items, counted, cache)
}

/// Everything at and below a path (links in it are followed inside the root) that the ignore file leaves. A path that does not exist
/// is [`FileError::NotFound`].
pub fn of_path(from: &dyn Tree, path: &Path, cache: &dyn StatCache) -> Result<Contents, FileError> {
    let target = resolve(from, path).map_err(FileError::unreadable("follow", path))?;
    let Some(entry) = from.entry(&target).map_err(FileError::unreadable("read", path))? else {
        return Err(super::file::select::missing(from, path, super::file::absolute(path)));
    };
    if !tree::is_visible(from, &target, &entry).map_err(FileError::unreadable("read", path))? {
        return Err(super::file::select::ignored(from, &target, super::file::absolute(path)));
    }
    let mut items = Vec::new();
    collect(tree::walk(from, &target), &target, false, &mut items)?;
    hash(from, &items, Counted { mode: true, owner: true, top: true }, cache)
}

enum Item {
    Source(Vec<u8>),
    Entry { rel: Vec<u8>, visit: Visit },
}

fn collect(walk: Walk, root: &Path, sockets: bool, items: &mut Vec<Item>) -> Result<(), FileError> {
    for visit in walk {
        let visit = visit.map_err(FileError::walk)?;
        if visit.entry.kind == Kind::Socket && !sockets {
            continue;
        }
        let rel = visit.path.strip_prefix(root).unwrap_or(&visit.path).as_os_str().as_encoded_bytes().to_vec();
        items.push(Item::Entry { rel, visit });
    }
    Ok(())
}

fn hash(from: &dyn Tree, items: &[Item], counted: Counted, cache: &dyn StatCache) -> Result<Contents, FileError> {
    let parts = in_parallel(items, |item| match item {
        Item::Source(_) => Ok(None),
        Item::Entry { visit, .. } => read(from, visit, cache).map(Some),
    })?;
    let mut hasher = Hasher::default();
    hasher.update(FORM);
    let mut files = Vec::with_capacity(items.len());
    for (item, read) in items.iter().zip(parts) {
        match (item, read) {
            (Item::Entry { visit, .. }, Some(_)) if visit.depth == 0 && visit.entry.is_dir() && !counted.top => hasher.update(b"T"),
            (Item::Entry { rel, visit }, Some(read)) => files.push(describe(&mut hasher, rel, visit, read, counted)),
            (Item::Source(name), _) => {
                hasher.update(b"S");
                field(&mut hasher, name);
            }
            (Item::Entry { .. }, None) => {}
        }
    }
    Ok(Contents { digest: hasher.finish().0, files })
}

fn field(hasher: &mut Hasher, bytes: &[u8]) {
    hasher.update(&(bytes.len() as u64).to_le_bytes());
    hasher.update(bytes);
}

fn describe(hasher: &mut Hasher, rel: &[u8], visit: &Visit, read: Read, counted: Counted) -> FileState {
    let entry = &visit.entry;
    hasher.update(b"E");
    field(hasher, rel);
    let (kind, device) = match entry.kind {
        Kind::File => (b'f', (0, 0)),
        Kind::Dir => (b'd', (0, 0)),
        Kind::Symlink => (b'l', (0, 0)),
        Kind::Fifo => (b'p', (0, 0)),
        Kind::Socket => (b's', (0, 0)),
        Kind::Char(major, minor) => (b'c', (major, minor)),
        Kind::Block(major, minor) => (b'b', (major, minor)),
    };
    hasher.update(&[kind]);
    // A link has no mode of its own.
    let mode = if entry.kind == Kind::Symlink || (!counted.mode) { u32::MAX } else { entry.mode };
    let (uid, gid) = if counted.owner { (entry.uid, entry.gid) } else { (u32::MAX, u32::MAX) };
    for number in [mode, uid, gid, device.0, device.1] {
        hasher.update(&number.to_le_bytes());
    }
    field(hasher, &read.content);
    hasher.update(&(read.xattrs.len() as u64).to_le_bytes());
    for (name, value) in &read.xattrs {
        field(hasher, name.as_encoded_bytes());
        field(hasher, value);
    }
    FileState {
        path: visit.path.to_string_lossy().into_owned(),
        kind: char::from(kind),
        mode: (mode != u32::MAX).then_some(mode),
        owner: (uid != u32::MAX).then_some((uid, gid)),
        content: match entry.kind {
            Kind::File => <[u8; 32]>::try_from(read.content).map_or_else(|other| Digest::of(&other), Digest::from_bytes),
            Kind::Char(..) | Kind::Block(..) => Digest::of(format!("{device:?}").as_bytes()),
            _ => Digest::of(&read.content),
        },
        xattrs: (!read.xattrs.is_empty()).then(|| Digest::of(format!("{:?}", read.xattrs).as_bytes())),
    }
}

/// What must be read of an entry.
struct Read {
    /// Digest of a file, target of a link.
    content: Vec<u8>,
    xattrs: Vec<(OsString, Vec<u8>)>,
}

fn read(from: &dyn Tree, visit: &Visit, cache: &dyn StatCache) -> Result<Read, FileError> {
    let (disk, path) = (&visit.entry.disk, &visit.path);
    // Most files of most builds end here: no system call but the walk's own.
    let known = if visit.entry.kind == Kind::File { cache.get(disk, &visit.entry) } else { None };
    if let Some(Known { digest, plain: true }) = known {
        return Ok(Read { content: digest.as_bytes().to_vec(), xattrs: Vec::new() });
    }
    let Some(location) = from.locate(path).map_err(FileError::unreadable("read", path))? else {
        // An empty root has no place on disk.
        if path.as_os_str().is_empty() {
            return Ok(Read { content: Vec::new(), xattrs: Vec::new() });
        }
        return Err(FileError::unreadable("read", path)(rustix::io::Errno::NOENT));
    };
    let xattrs = location.xattrs().map_err(FileError::unreadable("read the attributes of", path))?;
    let content = match visit.entry.kind {
        Kind::Symlink => location.read_link().map_err(FileError::replaced("read", path))?.into_os_string().into_encoded_bytes(),
        Kind::File => {
            let stat = location.stat().map_err(FileError::unreadable("read", path))?;
            let meta = Entry::from_stat(&stat, disk.clone());
            let digest = if let Some(known) = known {
                known.digest
            } else {
                let file = location.open().map_err(FileError::replaced("read", path))?;
                let (digest, read) = digest_of(&file, meta.size).map_err(FileError::unreadable("read", path))?;
                let after = rustix::fs::fstat(&file).map_err(FileError::unreadable("read", path))?;
                if read == meta.size && (after.st_ctime, after.st_ctime_nsec as u32) == visit.entry.ctime && after.st_ino == stat.st_ino {
                    cache.put(disk, &meta, Known { digest, plain: xattrs.is_empty() });
                }
                digest
            };
            digest.as_bytes().to_vec()
        }
        _ => Vec::new(),
    };
    Ok(Read { content, xattrs })
}

/// Bounded by the size seen: the file may grow without end.
fn digest_of(file: &File, size: u64) -> io::Result<(Digest, u64)> {
    let mut content = file.take(size);
    if size > SMALL {
        return Digest::of_reader(content);
    }
    thread_local! { static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) }; }
    BUFFER.with_borrow_mut(|buffer| {
        buffer.clear();
        content.read_to_end(buffer)?;
        Ok((Digest::of(buffer), buffer.len() as u64))
    })
}

/// Results in the order of the items.
fn in_parallel<T: Send>(items: &[Item], work: impl Fn(&Item) -> Result<T, FileError> + Sync) -> Result<Vec<T>, FileError> {
    let files = items.iter().filter(|i| matches!(i, Item::Entry { visit, .. } if visit.entry.kind == Kind::File)).count();
    let threads = if files < PARALLEL_FILES { 1 } else { thread::available_parallelism().map_or(1, usize::from).clamp(1, MAX_THREADS) };
    if threads == 1 {
        return items.iter().map(work).collect();
    }
    // Pieces are small, so that a thread with large files does not keep the others waiting.
    const PIECE: usize = 64;
    let next = AtomicUsize::new(0);
    let done: Mutex<Vec<(usize, Vec<T>)>> = Mutex::default();
    let failure: Mutex<Option<FileError>> = Mutex::default();
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let piece = next.fetch_add(1, Ordering::Relaxed);
                    let Some(begin) = piece.checked_mul(PIECE).filter(|b| *b < items.len()) else { return };
                    let results = items[begin..items.len().min(begin + PIECE)].iter().map(&work).collect::<Result<Vec<_>, _>>();
                    match results {
                        Ok(results) => done.lock().unwrap_or_else(PoisonError::into_inner).push((piece, results)),
                        Err(error) => {
                            failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                            next.store(usize::MAX / PIECE, Ordering::Relaxed);
                            return;
                        }
                    }
                }
            });
        }
    });
    if let Some(error) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_unstable_by_key(|(piece, _)| *piece);
    Ok(done.into_iter().flat_map(|(_, results)| results).collect())
}
