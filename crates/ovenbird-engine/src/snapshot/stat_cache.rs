//! Remembers the content of files on disk from one build to the next.
//!
//! A file is known by device and inode; its size and both its times say whether it is still the one that was read. The file of the
//! cache: one line `ovenbird stat cache 4`, then records of one length sorted by device and inode (little endian: device, inode, size
//! `u64`, mtime and ctime each `i64` seconds and `u32` nanoseconds, 32 bytes of BLAKE3, 1 if it has no extended attributes, day of
//! the last use `u32`), then the CRC-32 of all that. A file that does not check out is no error: the cache is only empty.

use std::collections::HashMap;
use std::fs;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use flate2::Crc;

use super::content_hash::ContentHash;
use super::tree::Entry;

/// What is remembered of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// Of its content.
    pub content: ContentHash,
    /// It has no extended attributes that belong into an image.
    pub plain: bool,
}

/// Remembers files by device, inode, size, mtime and ctime (which changes with the extended attributes, too).
pub trait StatCache: Send + Sync {
    /// What is known, if the file is still the one that was read.
    fn get(&self, entry: &Entry) -> Option<Known>;
    /// Remembers a file.
    fn put(&self, entry: &Entry, known: Known);
    /// A file changed while it was read.
    fn unsettled(&self) {}
}

/// Remembers nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoStatCache;

impl StatCache for NoStatCache {
    fn get(&self, _: &Entry) -> Option<Known> {
        None
    }
    fn put(&self, _: &Entry, _: Known) {}
}

const HEADER: &[u8] = b"ovenbird stat cache 4\n";
/// Bytes of a record.
const RECORD: usize = 16 + 32 + 33 + 4;
/// Bytes of the checksum.
const SUM: usize = 4;
/// A file that changed this shortly before the cache was opened may have changed again in the same tick of its clock after it was read:
/// seconds where little is known of the clock …
const RACY_SECONDS: i64 = 2;
/// … and nanoseconds on the disk of the cache itself, if it keeps fractions of seconds: two of the kernel's slowest ticks.
const RACY_NANOSECONDS: i128 = 20_000_000;
/// Records that no build used for this many days are dropped.
const KEEP_DAYS: u32 = 30;
/// Largest cache that is read, in bytes.
const MAX_FILE: u64 = 512 << 20;

/// Device and inode.
type Key = (u64, u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    size: u64,
    mtime: (i64, u32),
    ctime: (i64, u32),
}

impl Stamp {
    fn of(entry: &Entry) -> Self {
        Self { size: entry.size, mtime: entry.mtime, ctime: entry.ctime }
    }

    /// The last change of any kind, in nanoseconds since 1970.
    fn changed(&self) -> i128 {
        nanoseconds(self.mtime.max(self.ctime))
    }
}

fn nanoseconds((seconds, nanoseconds): (i64, u32)) -> i128 {
    i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds)
}

/// When the cache was opened, by the clock of a disk.
#[derive(Debug, Clone, Copy, Default)]
struct Opened {
    device: u64,
    /// Nanoseconds since 1970.
    at: i128,
}

impl Opened {
    /// Asks the disk of a folder, by a file without a name.
    fn now(folder: &Path) -> io::Result<Self> {
        let made = tempfile::tempfile_in(folder)?.metadata()?;
        Ok(Self { device: made.dev(), at: nanoseconds((made.mtime(), made.mtime_nsec() as u32)) })
    }

    /// Would any change after the cache was opened have changed the stamp?
    fn trusts(&self, (device, _): Key, stamp: &Stamp) -> bool {
        let fine = device == self.device && stamp.ctime.1 != 0;
        let racy = if fine { RACY_NANOSECONDS } else { i128::from(RACY_SECONDS) * 1_000_000_000 };
        stamp.changed() < self.at - racy
    }
}

fn key(entry: &Entry) -> Key {
    (entry.inode.0, entry.inode.1)
}

/// The records of the file, as they are there: a look-up takes less time than reading all of them into a table would.
#[derive(Debug, Default)]
struct Saved {
    /// Without header and checksum.
    records: Vec<u8>,
    /// Which of them this build used.
    used: Vec<bool>,
    /// The latest day of use on record.
    latest: u32,
    /// Where the last look-up ended: files of one folder often lie beside each other.
    near: usize,
}

#[derive(Debug, Default)]
struct Table {
    opened: Opened,
    saved: Saved,
    /// New in this build.
    fresh: HashMap<Key, (Stamp, Known)>,
    changed: bool,
    /// A file was not always the same in this build.
    unsettled: bool,
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
    /// Files that changed shortly before the cache was opened, or later, are not remembered.
    pub fn save(&self) -> io::Result<()> {
        let mut guard = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(table) = guard.as_mut().filter(|t| t.changed) else { return Ok(()) };
        let new = tempfile::NamedTempFile::new_in(&self.aside)?;
        let now = new.as_file().metadata()?.mtime();
        let mut out = Summed { inner: BufWriter::new(new), crc: Crc::new() };
        table.write(&mut out, now)?;
        let sum = out.crc.sum();
        let mut buffered = out.inner;
        buffered.write_all(&sum.to_le_bytes())?;
        let new = buffered.into_inner().map_err(io::IntoInnerError::into_error)?;
        new.persist(&self.file).map_err(|e| e.error)?;
        table.changed = false;
        Ok(())
    }

    /// For a second look.
    pub fn again(&self) -> Again<'_> {
        Again(self)
    }

    /// Was every file the same whenever this build looked at it?
    pub fn is_settled(&self) -> bool {
        self.with(|table| !table.unsettled)
    }

    fn with<T>(&self, action: impl FnOnce(&mut Table) -> T) -> T {
        let mut guard = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        action(guard.get_or_insert_with(|| Table {
            // Without a clock nothing is trusted.
            opened: Opened::now(&self.aside).unwrap_or_default(),
            saved: Saved::load(&self.file).unwrap_or_default(),
            ..Table::default()
        }))
    }
}

impl StatCache for FileStatCache {
    fn get(&self, entry: &Entry) -> Option<Known> {
        let (key, stamp) = (key(entry), Stamp::of(entry));
        self.with(|table| {
            let (known_stamp, known) = match table.fresh.get(&key) {
                Some(found) => *found,
                None => {
                    let at = table.saved.find(key)?;
                    let (_, known_stamp, known, day) = decode(table.saved.record(at));
                    if known_stamp == stamp {
                        // A use on another day than the last is worth a new file.
                        table.changed |= !std::mem::replace(&mut table.saved.used[at], true) && day < table.saved.latest;
                    }
                    (known_stamp, known)
                }
            };
            (known_stamp == stamp).then_some(known)
        })
    }

    fn put(&self, entry: &Entry, known: Known) {
        self.with(|table| {
            let (key, now) = (key(entry), (Stamp::of(entry), known));
            let before = table.fresh.insert(key, now).or_else(|| {
                let at = table.saved.find(key).filter(|at| table.saved.used[*at])?;
                let (_, stamp, known, _) = decode(table.saved.record(at));
                Some((stamp, known))
            });
            table.unsettled |= before.is_some_and(|before| before != now);
            table.changed = true;
        });
    }

    fn unsettled(&self) {
        self.with(|table| table.unsettled = true);
    }
}

/// Looks at files again after they were used: what was read a moment after it was written may have been written once more in the same
/// tick, and is read again.
#[derive(Debug)]
pub struct Again<'c>(&'c FileStatCache);

impl StatCache for Again<'_> {
    fn get(&self, entry: &Entry) -> Option<Known> {
        let trusted = self.0.with(|table| table.opened.trusts(key(entry), &Stamp::of(entry)));
        if trusted { self.0.get(entry) } else { None }
    }

    fn put(&self, entry: &Entry, known: Known) {
        self.0.put(entry, known);
    }

    fn unsettled(&self) {
        self.0.unsettled();
    }
}

impl Table {
    /// All that is worth keeping, sorted.
    fn write(&self, out: &mut impl Write, now: i64) -> io::Result<()> {
        let today = u32::try_from(now / (24 * 3600)).unwrap_or(0);
        let mut fresh: Vec<_> = self.fresh.iter().filter(|(key, (stamp, _))| self.opened.trusts(**key, stamp)).collect();
        fresh.sort_unstable_by_key(|(key, _)| **key);
        let mut fresh = fresh.into_iter().peekable();
        out.write_all(HEADER)?;
        for at in 0..self.saved.used.len() {
            let (key, stamp, known, day) = decode(self.saved.record(at));
            while let Some((key, (stamp, known))) = fresh.next_if(|(other, _)| **other < key) {
                out.write_all(&encode(*key, stamp, known, today))?;
            }
            let day = if self.saved.used[at] { today } else { day };
            if !self.fresh.contains_key(&key) && day + KEEP_DAYS > today {
                out.write_all(&encode(key, &stamp, &known, day))?;
            }
        }
        fresh.try_for_each(|(key, (stamp, known))| out.write_all(&encode(*key, stamp, known, today)))
    }
}

impl Saved {
    /// `None`: there is none, or it is damaged.
    fn load(file: &Path) -> Option<Self> {
        let file = fs::File::open(file).ok()?;
        let size = usize::try_from(file.metadata().ok()?.len().min(MAX_FILE)).ok()?;
        let mut header = [0; HEADER.len()];
        let mut records = Vec::with_capacity(size);
        let mut content = file.take(MAX_FILE);
        content.read_exact(&mut header).ok()?;
        content.read_to_end(&mut records).ok()?;
        let (body, sum) = records.split_at_checked(records.len().checked_sub(SUM)?)?;
        let mut crc = Crc::new();
        crc.update(&header);
        crc.update(body);
        if header != HEADER || sum != crc.sum().to_le_bytes() || body.len() % RECORD != 0 {
            return None;
        }
        let (length, latest) = (body.len(), body.chunks_exact(RECORD).map(|record| decode(record).3).max().unwrap_or_default());
        records.truncate(length);
        Some(Self { used: vec![false; length / RECORD], records, latest, near: 0 })
    }

    fn record(&self, at: usize) -> &[u8] {
        &self.records[at * RECORD..][..RECORD]
    }

    fn key(&self, at: usize) -> Key {
        key_of(self.record(at))
    }

    fn find(&mut self, key: Key) -> Option<usize> {
        let near = self.near + 1;
        if near < self.used.len() && self.key(near) == key {
            self.near = near;
            return Some(near);
        }
        let (mut low, mut high) = (0, self.used.len());
        while low < high {
            let middle = low + (high - low) / 2;
            match self.key(middle).cmp(&key) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
                std::cmp::Ordering::Equal => {
                    self.near = middle;
                    return Some(middle);
                }
            }
        }
        None
    }
}

/// Computes the checksum of what goes through.
struct Summed<W> {
    inner: W,
    crc: Crc,
}

impl<W: Write> Write for Summed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.inner.write(bytes)?;
        self.crc.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

fn encode((device, inode): Key, stamp: &Stamp, known: &Known, day: u32) -> [u8; RECORD] {
    let mut record = [0; RECORD];
    let mut rest = &mut record[..];
    let mut put = |bytes: &[u8]| {
        let (head, tail) = std::mem::take(&mut rest).split_at_mut(bytes.len());
        head.copy_from_slice(bytes);
        rest = tail;
    };
    for number in [device, inode, stamp.size] {
        put(&number.to_le_bytes());
    }
    for (seconds, nanoseconds) in [stamp.mtime, stamp.ctime] {
        put(&seconds.to_le_bytes());
        put(&nanoseconds.to_le_bytes());
    }
    put(known.content.as_bytes());
    put(&[u8::from(known.plain)]);
    put(&day.to_le_bytes());
    record
}

fn field<const N: usize>(record: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&record[at..at + N]);
    field
}

fn key_of(record: &[u8]) -> Key {
    (u64::from_le_bytes(field(record, 0)), u64::from_le_bytes(field(record, 8)))
}

fn decode(record: &[u8]) -> (Key, Stamp, Known, u32) {
    let time = |at| (i64::from_le_bytes(field(record, at)), u32::from_le_bytes(field(record, at + 8)));
    let stamp = Stamp { size: u64::from_le_bytes(field(record, 16)), mtime: time(24), ctime: time(36) };
    let known = Known { content: ContentHash::from_bytes(field(record, 48)), plain: record[80] == 1 };
    (key_of(record), stamp, known, u32::from_le_bytes(field(record, 81)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::tree::Kind;

    fn entry(inode: u64, mtime: i64, ctime: i64) -> Entry {
        Entry { kind: Kind::File, mode: 0o644, uid: 0, gid: 0, size: 3, mtime: (mtime, 7), ctime: (ctime, 0), inode: (1, inode, 1) }
    }

    fn known(text: &str) -> Known {
        Known { content: ContentHash::of(text.as_bytes()), plain: !text.is_empty() }
    }

    #[test]
    fn survives_saving_but_trusts_no_recent_and_no_damaged_record() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("stat");
        let now = fs::metadata(dir.path()).unwrap().mtime();
        let cache = FileStatCache::new(&file, dir.path());
        let old = entry(1, now - 100, now - 100);
        cache.put(&old, known("abc"));
        cache.put(&entry(2, now, now - 100), known("abc"));
        cache.put(&entry(3, now - 100, now), known("abc"));
        assert_eq!(cache.get(&entry(2, now, now - 100)), Some(known("abc")));
        cache.save().unwrap();

        let again = FileStatCache::new(&file, dir.path());
        assert_eq!(again.get(&old), Some(known("abc")));
        for (what, entry) in [
            ("other inode", entry(9, now - 100, now - 100)),
            ("other device", Entry { inode: (2, 1, 1), ..old.clone() }),
            ("other mtime", entry(1, now - 99, now - 100)),
            ("other ctime", entry(1, now - 100, now - 99)),
            ("other size", Entry { size: 4, ..old.clone() }),
            ("racy mtime", entry(2, now, now - 100)),
            ("racy ctime", entry(3, now - 100, now)),
        ] {
            assert_eq!(again.get(&entry), None, "{what}");
        }

        let good = fs::read(&file).unwrap();
        for at in [0, 30, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&file, &bad).unwrap();
            assert_eq!(FileStatCache::new(&file, dir.path()).get(&old), None, "byte {at}");
        }
        fs::write(&file, &good[..good.len() - 5]).unwrap();
        assert_eq!(FileStatCache::new(&file, dir.path()).get(&old), None);
    }

    #[test]
    fn a_file_that_was_two_in_one_build_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("stat");
        let open = || FileStatCache::new(&file, dir.path());
        let (old, new) = (entry(1, 10, 10), entry(1, 10, 11));
        let cache = open();
        cache.put(&old, known("a"));
        cache.put(&old, known("a"));
        assert!(cache.is_settled());
        cache.save().unwrap();
        // Another build may find another file.
        let cache = open();
        assert_eq!(cache.get(&new), None);
        cache.put(&new, known("b"));
        assert!(cache.is_settled());
        // The same build may not: neither another stamp, nor other content under the same.
        cache.put(&old, known("a"));
        assert!(!cache.is_settled());
        let cache = open();
        assert!(cache.get(&old).is_some());
        cache.put(&new, known("a"));
        assert!(!cache.is_settled());
        let cache = open();
        cache.put(&entry(5, 10, 10), known("a"));
        cache.put(&entry(5, 10, 10), known("b"));
        assert!(!cache.is_settled());
    }

    #[test]
    fn what_is_young_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let cache = FileStatCache::new(dir.path().join("stat"), dir.path());
        let now = fs::metadata(dir.path()).unwrap().mtime();
        for (entry, read_again) in [(entry(1, 10, 10), false), (entry(2, 10, now + 9), true)] {
            cache.put(&entry, known("a"));
            assert_eq!((cache.get(&entry).is_some(), cache.again().get(&entry).is_none()), (true, read_again));
        }
    }

    #[test]
    fn young_stamps_are_not_trusted() {
        let second = 1_000_000_000;
        let opened = Opened { device: 1, at: 100 * second };
        let row = |device, ctime| opened.trusts((device, 7), &Stamp { size: 1, mtime: (3, 0), ctime });
        for (device, ctime, trusted) in [
            (1, (99, 979_000_000), true),
            (1, (99, 985_000_000), false),
            (1, (101, 1), false),
            // Another disk's clock, or one that knows seconds only.
            (2, (99, 1), false),
            (2, (97, 1), true),
            (1, (99, 0), false),
            (1, (97, 0), true),
        ] {
            assert_eq!(row(device, ctime), trusted, "{device} {ctime:?}");
        }
        assert!(!Opened::default().trusts((1, 7), &Stamp { size: 1, mtime: (3, 0), ctime: (3, 0) }));
    }

    #[test]
    fn records_are_merged_in_order_and_dropped_when_nobody_used_them() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("stat");
        let open = || FileStatCache::new(&file, dir.path());
        let cache = open();
        for inode in [5, 1, 9] {
            cache.put(&entry(inode, 10, 10), known("old"));
        }
        cache.save().unwrap();
        let cache = open();
        for inode in [7, 0, 5, 12] {
            cache.put(&entry(inode, 20, 20), known("new"));
        }
        assert_eq!(cache.get(&entry(9, 10, 10)), Some(known("old")));
        cache.save().unwrap();
        let cache = open();
        for (inode, time, text) in [(0, 20, "new"), (1, 10, "old"), (5, 20, "new"), (7, 20, "new"), (9, 10, "old"), (12, 20, "new")] {
            assert_eq!(cache.get(&entry(inode, time, time)), Some(known(text)), "{inode}");
        }
        assert_eq!(cache.get(&entry(5, 10, 10)), None);

        // Forty days later two of them are looked at.
        let mut later = Vec::new();
        let cache = open();
        assert!(cache.get(&entry(1, 10, 10)).is_some() && cache.get(&entry(12, 20, 20)).is_some());
        let now = fs::metadata(dir.path()).unwrap().mtime();
        cache.with(|table| table.write(&mut later, now + 40 * 24 * 3600)).unwrap();
        assert_eq!(later.len(), HEADER.len() + 2 * RECORD);
    }
}
