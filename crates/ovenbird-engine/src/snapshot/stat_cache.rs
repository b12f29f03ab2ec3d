//! Remembers the content digests of files on disk from one build to the next.
//!
//! The file: one line `ovenbird stat cache 1`, then records (little endian: path length `u32`, path,
//! device, inode, size `u64`, mtime and ctime each `i64` seconds and `u32` nanoseconds, 32 bytes of
//! SHA-256, last use `i64`), then the SHA-256 of all that. A file that does not check out is no error:
//! the cache is only empty.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use ovenbird_oci::Digest;

use super::tree::Entry;

/// Remembers the digest of a file's content by path, device, inode, size, mtime and ctime.
pub trait StatCache: Send + Sync {
    /// The digest, if the file is still the one that was hashed. `ctime` is in seconds and nanoseconds.
    fn get(&self, disk: &Path, meta: &Entry, ctime: (i64, u32)) -> Option<Digest>;
    /// Remembers a digest.
    fn put(&self, disk: &Path, meta: &Entry, ctime: (i64, u32), digest: Digest);
}

/// Remembers nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoStatCache;

impl StatCache for NoStatCache {
    fn get(&self, _: &Path, _: &Entry, _: (i64, u32)) -> Option<Digest> {
        None
    }
    fn put(&self, _: &Path, _: &Entry, _: (i64, u32), _: Digest) {}
}

const HEADER: &[u8] = b"ovenbird stat cache 1\n";
/// A file that changed within this many seconds before the cache is saved may change again within one tick of its clock.
const RACY_SECONDS: i64 = 2;
/// Records that no build used for this long are dropped.
const KEEP_SECONDS: i64 = 30 * 24 * 3600;
/// Largest cache that is read, in bytes.
const MAX_FILE: u64 = 512 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    mtime: (i64, u32),
    ctime: (i64, u32),
}

#[derive(Debug, Clone, Copy)]
struct Record {
    stamp: Stamp,
    digest: Digest,
    /// When a build last used it, seconds since 1970; `None`: this one.
    used: Option<i64>,
}

#[derive(Debug, Default)]
struct Table {
    records: HashMap<PathBuf, Record>,
    changed: bool,
}

/// A [`StatCache`] kept in one file, which is read at the first use.
#[derive(Debug)]
pub struct FileStatCache {
    file: PathBuf,
    /// Where the new file is written.
    aside: PathBuf,
    table: Mutex<Option<Table>>,
}

impl FileStatCache {
    /// Kept in `file`, which need not exist. It is written in the folder `aside` of the same file system, and moved.
    pub fn new(file: impl Into<PathBuf>, aside: impl Into<PathBuf>) -> Self {
        Self { file: file.into(), aside: aside.into(), table: Mutex::new(None) }
    }

    /// Writes the file atomically (a new file takes the old one's place) when something changed.
    /// Files that changed less than two seconds ago are not remembered.
    pub fn save(&self) -> io::Result<()> {
        let mut guard = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(table) = guard.as_mut().filter(|t| t.changed) else { return Ok(()) };
        let mut new = tempfile::NamedTempFile::new_in(&self.aside)?;
        // The file system's own clock is the one that stamps are compared with.
        let now = new.as_file().metadata()?.mtime();
        table.records.retain(|_, r| {
            r.stamp.mtime.0.max(r.stamp.ctime.0) < now - RACY_SECONDS && r.used.is_none_or(|used| used > now - KEEP_SECONDS)
        });
        let mut bytes = HEADER.to_vec();
        for (path, record) in &table.records {
            encode(&mut bytes, path, record, now);
        }
        let sum = Digest::of(&bytes);
        bytes.extend_from_slice(sum.as_bytes());
        new.write_all(&bytes)?;
        new.persist(&self.file).map_err(|e| e.error)?;
        table.changed = false;
        Ok(())
    }

    fn with<T>(&self, action: impl FnOnce(&mut Table) -> T) -> T {
        let mut guard = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        action(guard.get_or_insert_with(|| Table { records: load(&self.file).unwrap_or_default(), changed: false }))
    }
}

impl StatCache for FileStatCache {
    fn get(&self, disk: &Path, meta: &Entry, ctime: (i64, u32)) -> Option<Digest> {
        self.with(|table| {
            let record = table.records.get_mut(disk).filter(|r| r.stamp == stamp(meta, ctime))?;
            if record.used.take().is_some() {
                table.changed = true;
            }
            Some(record.digest)
        })
    }

    fn put(&self, disk: &Path, meta: &Entry, ctime: (i64, u32), digest: Digest) {
        self.with(|table| {
            table.records.insert(disk.to_owned(), Record { stamp: stamp(meta, ctime), digest, used: None });
            table.changed = true;
        });
    }
}

fn stamp(meta: &Entry, ctime: (i64, u32)) -> Stamp {
    Stamp { device: meta.inode.0, inode: meta.inode.1, size: meta.size, mtime: meta.mtime, ctime }
}

fn encode(bytes: &mut Vec<u8>, path: &Path, record: &Record, now: i64) {
    let Stamp { device, inode, size, mtime, ctime } = record.stamp;
    let path = path.as_os_str().as_bytes();
    bytes.extend_from_slice(&(path.len() as u32).to_le_bytes());
    bytes.extend_from_slice(path);
    for number in [device, inode, size] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    for (seconds, nanoseconds) in [mtime, ctime] {
        bytes.extend_from_slice(&seconds.to_le_bytes());
        bytes.extend_from_slice(&nanoseconds.to_le_bytes());
    }
    bytes.extend_from_slice(record.digest.as_bytes());
    bytes.extend_from_slice(&record.used.unwrap_or(now).to_le_bytes());
}

fn load(file: &Path) -> Option<HashMap<PathBuf, Record>> {
    let mut bytes = Vec::new();
    fs::File::open(file).ok()?.take(MAX_FILE).read_to_end(&mut bytes).ok()?;
    let (body, sum) = bytes.split_at_checked(bytes.len().checked_sub(32)?)?;
    if Digest::of(body).as_bytes() != sum {
        return None;
    }
    let mut rest = body.strip_prefix(HEADER)?;
    let mut records = HashMap::new();
    while !rest.is_empty() {
        let (path, record) = decode(&mut rest)?;
        records.insert(path, record);
    }
    Some(records)
}

fn decode(rest: &mut &[u8]) -> Option<(PathBuf, Record)> {
    fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
        let (head, tail) = rest.split_first_chunk::<N>()?;
        *rest = tail;
        Some(*head)
    }
    let length = u32::from_le_bytes(take(rest)?) as usize;
    let (path, tail) = rest.split_at_checked(length)?;
    *rest = tail;
    let mut number = || take(rest).map(u64::from_le_bytes);
    let (device, inode, size) = (number()?, number()?, number()?);
    let mut time = || Some((i64::from_le_bytes(take(rest)?), u32::from_le_bytes(take(rest)?)));
    let (mtime, ctime) = (time()?, time()?);
    let digest = Digest::from_bytes(take(rest)?);
    let used = Some(i64::from_le_bytes(take(rest)?));
    let stamp = Stamp { device, inode, size, mtime, ctime };
    Some((PathBuf::from(OsString::from_vec(path.to_vec())), Record { stamp, digest, used }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::tree::Kind;

    fn entry(inode: u64, mtime: i64) -> Entry {
        Entry { kind: Kind::File, mode: 0o644, uid: 0, gid: 0, size: 3, mtime: (mtime, 7), disk: "x".into(), inode: (1, inode, 1) }
    }

    #[test]
    fn survives_saving_but_trusts_no_recent_and_no_damaged_record() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("stat");
        let digest = Digest::of(b"abc");
        let now = fs::metadata(dir.path()).unwrap().mtime();
        let cache = FileStatCache::new(&file, dir.path());
        cache.put(Path::new("/a"), &entry(1, now - 100), (now - 100, 0), digest);
        cache.put(Path::new("/young mtime"), &entry(2, now), (now - 100, 0), digest);
        cache.put(Path::new("/young ctime"), &entry(3, now - 100), (now, 0), digest);
        assert_eq!(cache.get(Path::new("/young mtime"), &entry(2, now), (now - 100, 0)), Some(digest));
        cache.save().unwrap();

        let again = FileStatCache::new(&file, dir.path());
        assert_eq!(again.get(Path::new("/a"), &entry(1, now - 100), (now - 100, 0)), Some(digest));
        for (what, path, meta, ctime) in [
            ("other inode", "/a", entry(9, now - 100), now - 100),
            ("other mtime", "/a", entry(1, now - 99), now - 100),
            ("other ctime", "/a", entry(1, now - 100), now - 99),
            ("other size", "/a", Entry { size: 4, ..entry(1, now - 100) }, now - 100),
            ("other path", "/b", entry(1, now - 100), now - 100),
            ("racy mtime", "/young mtime", entry(2, now), now - 100),
            ("racy ctime", "/young ctime", entry(3, now - 100), now),
        ] {
            assert_eq!(again.get(Path::new(path), &meta, (ctime, 0)), None, "{what}");
        }

        let good = fs::read(&file).unwrap();
        for at in [0, 30, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&file, &bad).unwrap();
            assert_eq!(FileStatCache::new(&file, dir.path()).get(Path::new("/a"), &entry(1, now - 100), (now - 100, 0)), None, "byte {at}");
        }
        fs::write(&file, &good[..good.len() - 5]).unwrap();
        assert_eq!(FileStatCache::new(&file, dir.path()).get(Path::new("/a"), &entry(1, now - 100), (now - 100, 0)), None);
    }
}
