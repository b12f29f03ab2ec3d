//! Content keys: what a copy or a bind mount would see of a tree, as one digest. Times, inodes and
//! places on disk have no part in it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use ovenbird_oci::Digest;

use super::file::FileError;
use super::file::select::Selection;
use crate::plan::CopyAction;
use crate::snapshot::content_hash::ContentHash;
use crate::snapshot::tree::{self, Entry, Kind, Tree, Visit, Walk, resolve};
use crate::trace::files::{FileState, Listing};

pub use crate::snapshot::stat_cache::{Known, StatCache};

/// Entries that are read together.
const BATCH: usize = 1024;
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
    pub listing: Listing,
}

/// What `copy` selects of `from`: names relative to each source, kinds, modes (unless `--chmod` replaces them), owners (if kept),
/// link targets, extended attributes and content. Fails where the copy itself would fail to find its sources.
pub fn of_copy(from: &dyn Tree, copy: &CopyAction, cache: &dyn StatCache) -> Result<Contents, FileError> {
    let absolute_mode = copy.chmod.as_deref().is_some_and(|mode| mode.bytes().all(|b| b.is_ascii_digit()));
    let counted = Counted { mode: !absolute_mode, owner: copy.keep_owner && copy.chown.is_none(), top: false };
    let selection = Selection::new(from, copy)?;
    let mut reader = Reader { from, cache, counted, sockets: !copy.keep_owner, listing: Listing::default(), firsts: HashMap::new() };
    for source in &selection.sources {
        // The name matters even for a file that is renamed: the destination may be a folder.
        reader.listing.source(source.name.as_encoded_bytes(), &source.path);
        reader.add(selection.walk(from, source), &source.path)?;
    }
    Ok(reader.finish())
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
    let counted = Counted { mode: true, owner: true, top: true };
    let mut reader = Reader { from, cache, counted, sockets: false, listing: Listing::default(), firsts: HashMap::new() };
    reader.listing.place(&target);
    reader.add(tree::walk(from, &target), &target)?;
    Ok(reader.finish())
}

/// Reads a tree into a [`Listing`]. Only what must be read from disk waits for others in memory.
struct Reader<'t> {
    from: &'t dyn Tree,
    cache: &'t dyn StatCache,
    counted: Counted,
    /// Sockets of the context are copied, as empty files.
    sockets: bool,
    listing: Listing,
    /// First names in this source of files with several, by device and inode.
    firsts: HashMap<(u64, u64), Vec<u8>>,
}

impl Reader<'_> {
    fn finish(self) -> Contents {
        Contents { digest: self.listing.digest(), listing: self.listing }
    }

    /// The entries of one source.
    fn add(&mut self, walk: Walk, root: &Path) -> Result<(), FileError> {
        // As copies do: hard links count within one source.
        self.firsts.clear();
        let mut waiting: Vec<(Visit, Option<Content>)> = Vec::new();
        for visit in walk {
            let visit = visit.map_err(FileError::walk)?;
            if visit.entry.kind == Kind::Socket && !self.sockets {
                continue;
            }
            let known = self.known(&visit)?;
            match known {
                Some(content) if waiting.is_empty() => self.list(root, &visit, &content),
                known => waiting.push((visit, known)),
            }
            if waiting.len() == BATCH {
                self.read(root, &mut waiting)?;
            }
        }
        self.read(root, &mut waiting)
    }

    /// What takes no reading of content. Most files of most builds end here: no system call but the walk's own.
    fn known(&self, visit: &Visit) -> Result<Option<Content>, FileError> {
        if visit.entry.kind != Kind::File {
            return read(self.from, visit, None, self.cache).map(Some);
        }
        Ok(self.cache.get(&visit.entry).filter(|known| known.plain).map(|known| Content { hash: known.content, xattrs: Vec::new() }))
    }

    fn read(&mut self, root: &Path, waiting: &mut Vec<(Visit, Option<Content>)>) -> Result<(), FileError> {
        let unread: Vec<&Visit> = waiting.iter().filter(|(_, content)| content.is_none()).map(|(visit, _)| visit).collect();
        let contents = in_parallel(&unread, |visit| read(self.from, visit, self.cache.get(&visit.entry), self.cache))?;
        let mut contents = contents.into_iter();
        for (visit, known) in waiting.drain(..) {
            if let Some(content) = known.or_else(|| contents.next()) {
                self.list(root, &visit, &content);
            }
        }
        Ok(())
    }

    fn list(&mut self, root: &Path, visit: &Visit, content: &Content) {
        let (entry, counted) = (&visit.entry, self.counted);
        if visit.depth == 0 && entry.is_dir() && !counted.top {
            return self.listing.top();
        }
        let path = visit.path.strip_prefix(root).unwrap_or(&visit.path).as_os_str().as_encoded_bytes();
        let first = self.first_name(entry, path);
        let file = FileState {
            kind: match entry.kind {
                Kind::File if first.is_some() => b'h',
                Kind::File => b'f',
                Kind::Dir => b'd',
                Kind::Symlink => b'l',
                Kind::Fifo => b'p',
                Kind::Socket => b's',
                Kind::Char(..) => b'c',
                Kind::Block(..) => b'b',
            },
            // A link has no mode of its own.
            mode: (counted.mode && entry.kind != Kind::Symlink).then_some(entry.mode),
            owner: counted.owner.then_some((entry.uid, entry.gid)),
            content: first.unwrap_or(content.hash),
            xattrs: (!content.xattrs.is_empty()).then(|| ContentHash::of(format!("{:?}", content.xattrs).as_bytes())),
        };
        self.listing.entry(path, &file);
    }

    /// Of a file that is another name of one before it: the digest of that one's name.
    fn first_name(&mut self, entry: &Entry, path: &[u8]) -> Option<ContentHash> {
        use std::collections::hash_map::Entry::{Occupied, Vacant};
        let (device, inode, count) = entry.inode;
        if entry.kind != Kind::File || count < 2 {
            return None;
        }
        match self.firsts.entry((device, inode)) {
            Occupied(first) => Some(ContentHash::of(first.get())),
            Vacant(none) => {
                none.insert(path.to_vec());
                None
            }
        }
    }
}

/// What an entry holds.
struct Content {
    /// Of a file's bytes, a link's target, a device's number.
    hash: ContentHash,
    xattrs: Vec<(OsString, Vec<u8>)>,
}

fn read(from: &dyn Tree, visit: &Visit, known: Option<Known>, cache: &dyn StatCache) -> Result<Content, FileError> {
    let path = &visit.path;
    let Some(location) = from.locate(path).map_err(FileError::unreadable("read", path))? else {
        // An empty root has no place on disk.
        if path.as_os_str().is_empty() {
            return Ok(Content { hash: ContentHash::of(b""), xattrs: Vec::new() });
        }
        return Err(FileError::unreadable("read", path)(rustix::io::Errno::NOENT));
    };
    let xattrs = location.xattrs().map_err(FileError::unreadable("read the attributes of", path))?;
    let hash = match (visit.entry.kind, known) {
        (Kind::File, Some(known)) => known.content,
        (Kind::File, None) => {
            let stat = location.stat().map_err(FileError::unreadable("read", path))?;
            let seen = Entry::from_stat(&stat);
            let file = location.open().map_err(FileError::replaced("read", path))?;
            let (hash, read) = hash_of(&file, seen.size).map_err(FileError::unreadable("read", path))?;
            let after = rustix::fs::fstat(&file).map_err(FileError::unreadable("read", path))?;
            if read == seen.size && (after.st_ctime, after.st_ctime_nsec as u32) == visit.entry.ctime && after.st_ino == stat.st_ino {
                cache.put(&seen, Known { content: hash, plain: xattrs.is_empty() });
            } else {
                cache.unsettled();
            }
            hash
        }
        (Kind::Symlink, _) => {
            ContentHash::of(location.read_link().map_err(FileError::replaced("read", path))?.as_os_str().as_encoded_bytes())
        }
        (Kind::Char(major, minor) | Kind::Block(major, minor), _) => ContentHash::of(format!("{major}:{minor}").as_bytes()),
        (Kind::Dir | Kind::Fifo | Kind::Socket, _) => ContentHash::of(b""),
    };
    Ok(Content { hash, xattrs })
}

/// Bounded by the size seen: the file may grow without end.
fn hash_of(file: &File, size: u64) -> io::Result<(ContentHash, u64)> {
    let mut content = file.take(size);
    if size > SMALL {
        return ContentHash::of_reader(content);
    }
    thread_local! { static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) }; }
    BUFFER.with_borrow_mut(|buffer| {
        buffer.clear();
        content.read_to_end(buffer)?;
        Ok((ContentHash::of(buffer), buffer.len() as u64))
    })
}

/// Results in the order of the items.
fn in_parallel<T: Send>(items: &[&Visit], work: impl Fn(&Visit) -> Result<T, FileError> + Sync) -> Result<Vec<T>, FileError> {
    let threads =
        if items.len() < PARALLEL_FILES { 1 } else { thread::available_parallelism().map_or(1, usize::from).clamp(1, MAX_THREADS) };
    if threads == 1 {
        return items.iter().map(|visit| work(visit)).collect();
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
                    let results =
                        items[begin..items.len().min(begin + PIECE)].iter().map(|visit| work(visit)).collect::<Result<Vec<_>, _>>();
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
