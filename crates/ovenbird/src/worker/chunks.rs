//! A stream cut into chunks where its content says, each known by its hash, and a depot of those that came before: what a worker has is
//! not sent again.
//!
//! ```text
//! ROOT/chunks/pack-N      chunks in the order they came: BLAKE3 (32 bytes), length (4, little endian), the bytes
//! ```
//!
//! A pack only grows, by the one worker that made it; one that broke off is good up to there, so an upload that was killed goes on where it
//! was. Packs that served nobody for longest go when there is too much of them. Every chunk is hashed again before it counts as there.
//! It must not know what the stream means.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use fastcdc::v2020::FastCDC;
use rustix::fs::{Timespec, Timestamps, UTIME_NOW};

/// Bytes of an entry of a list.
const ENTRY: usize = 36;

/// Longest chunk.
const LONGEST: usize = 512 << 10;

/// Most bytes and most packs of a depot.
const MOST_BYTES: u64 = 4 << 30;
const MOST_PACKS: usize = 64;

/// What is a large stream.
const LARGE_FROM: u64 = 256 << 20;

/// How finely a stream is cut.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fineness {
    shortest: usize,
    average: usize,
    longest: usize,
}

impl Fineness {
    /// Chunks of a small stream are 4 KiB on average, those of a large one 64 KiB: one change is little, and so is the list.
    pub(crate) fn of(bytes: u64) -> Self {
        let average = if bytes < LARGE_FROM { 4 << 10 } else { 64 << 10 };
        Self { shortest: average / 4, average, longest: 8 * average }
    }
}

/// The hash of a chunk.
type Hash = [u8; 32];

/// One chunk of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    hash: Hash,
    length: u32,
}

/// A stream as its chunks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct List(Vec<Entry>);

impl List {
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.0.len() * ENTRY);
        for entry in &self.0 {
            bytes.extend_from_slice(&entry.hash);
            bytes.extend_from_slice(&entry.length.to_le_bytes());
        }
        bytes
    }

    /// Reads foreign bytes.
    pub(crate) fn parse(bytes: &[u8]) -> io::Result<Self> {
        let wrong = || io::Error::new(io::ErrorKind::InvalidData, "a list of chunks that is none");
        let (entries, rest) = bytes.as_chunks::<ENTRY>();
        if !rest.is_empty() {
            return Err(wrong());
        }
        let entry = |bytes: &[u8; ENTRY]| {
            let (hash, length) = bytes.split_first_chunk::<32>().ok_or_else(wrong)?;
            let length = u32::from_le_bytes(length.try_into().map_err(|_| wrong())?);
            if length == 0 || length as usize > LONGEST { Err(wrong()) } else { Ok(Entry { hash: *hash, length }) }
        };
        entries.iter().map(entry).collect::<io::Result<_>>().map(Self)
    }

    /// How many.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Bytes of the stream.
    pub(crate) fn bytes(&self) -> u64 {
        self.0.iter().map(|entry| u64::from(entry.length)).sum()
    }

    /// The first so many, and the others.
    pub(crate) fn split(mut self, at: usize) -> (Self, Self) {
        let rest = self.0.split_off(at.min(self.0.len()));
        (self, Self(rest))
    }
}

/// Which chunks of a list are wanted: a bit each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted(Vec<u8>);

impl Wanted {
    /// Foreign bytes: those that are missing say no.
    pub(crate) fn of_bytes(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    fn has(&self, index: usize) -> bool {
        self.0.get(index / 8).is_some_and(|bits| bits & (1 << (index % 8)) != 0)
    }

    /// Is any from one to another?
    pub(crate) fn any(&self, range: std::ops::Range<usize>) -> bool {
        range.into_iter().any(|index| self.has(index))
    }
}

/// Bytes that are searched for cuts at once.
const WINDOW: usize = 1 << 20;

/// Of so many places that a flush names, one is taken, on average: short files share a chunk.
const SHARED: u8 = 4;

/// Cuts what is written to it (FastCDC); a flush says that here would be a good place.
pub(crate) struct Cutter {
    fineness: Fineness,
    /// What is not cut yet.
    rest: Vec<u8>,
    /// How much of that was there at the last flush.
    flushed: usize,
    list: List,
}

impl Cutter {
    pub(crate) fn new(fineness: Fineness) -> Self {
        Self { fineness, rest: vec![], flushed: 0, list: List::default() }
    }

    /// Cuts off chunks from the front, as long as one is good: how many bytes there are from its start on, and how long it is.
    fn cut_while(&mut self, good: impl Fn(usize, usize) -> bool) {
        let Fineness { shortest, average, longest } = self.fineness;
        let mut cut = 0;
        for chunk in FastCDC::new(&self.rest, shortest, average, longest) {
            let bytes = &self.rest[chunk.offset..chunk.offset + chunk.length];
            if !good(self.rest.len() - chunk.offset, bytes.len()) {
                break;
            }
            self.list.0.push(Entry { hash: *blake3::hash(bytes).as_bytes(), length: u32::try_from(bytes.len()).unwrap_or(u32::MAX) });
            cut += bytes.len();
        }
        self.rest.drain(..cut);
        self.flushed = self.flushed.saturating_sub(cut);
    }

    /// Cuts here, whatever the content says. How many chunks there are now.
    pub(crate) fn cut(&mut self) -> usize {
        self.cut_while(|_, _| true);
        self.list.0.len()
    }

    pub(crate) fn finish(mut self) -> List {
        self.cut();
        self.list
    }
}

impl Write for Cutter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.rest.extend_from_slice(bytes);
        if self.rest.len() >= WINDOW {
            // No such cut depends on bytes that are still to come.
            let longest = self.fineness.longest;
            self.cut_while(|left, _| left > longest);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        // What came since the last time decides, and nothing before it: behind a change the cuts are soon those that were.
        let chosen = blake3::hash(&self.rest[self.flushed..]).as_bytes()[0].is_multiple_of(SHARED);
        let shortest = self.fineness.shortest;
        self.cut_while(|left, length| length < left || (chosen && length >= shortest));
        self.flushed = self.rest.len();
        Ok(())
    }
}

/// The list of a stream that is in memory.
pub(crate) fn cut(bytes: &[u8]) -> List {
    let mut cutter = Cutter::new(Fineness::of(bytes.len() as u64));
    // It is written to memory.
    let _ = cutter.write_all(bytes);
    cutter.finish()
}

/// Lets those chunks of a stream through that are wanted.
pub(crate) struct Selector<'a, W> {
    list: &'a List,
    wanted: &'a Wanted,
    index: usize,
    /// Of the chunk at `index`.
    left: u32,
    /// More came than the list has.
    over: bool,
    to: W,
}

impl<'a, W: Write> Selector<'a, W> {
    /// Begins at a chunk of the list.
    pub(crate) fn new(list: &'a List, wanted: &'a Wanted, from: usize, to: W) -> Self {
        let left = list.0.get(from).map_or(0, |entry| entry.length);
        Self { list, wanted, index: from, left, over: false, to }
    }

    /// Has exactly everything before this chunk come?
    pub(crate) fn is_at(&self, index: usize) -> bool {
        let whole = self.list.0.get(self.index).map_or(0, |entry| entry.length);
        self.index == index && self.left == whole && !self.over
    }
}

impl<W: Write> Write for Selector<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.left == 0 {
            self.over |= !bytes.is_empty();
            return Ok(bytes.len());
        }
        let most = bytes.len().min(self.left as usize);
        if self.wanted.has(self.index) {
            self.to.write_all(&bytes[..most])?;
        }
        self.left -= u32::try_from(most).unwrap_or(u32::MAX);
        if self.left == 0 {
            self.index += 1;
            self.left = self.list.0.get(self.index).map_or(0, |entry| entry.length);
        }
        Ok(most)
    }

    /// Whoever selects also sends: nothing goes before there is enough of it.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where a chunk is.
#[derive(Debug, Clone, Copy)]
struct Spot {
    pack: usize,
    offset: u64,
    length: u32,
}

/// The chunks that a worker has.
pub(crate) struct Depot {
    packs: Vec<(PathBuf, File)>,
    spots: HashMap<Hash, Spot>,
    /// Packs that served.
    used: HashSet<usize>,
    /// Ours, and where it ends.
    own: (BufWriter<File>, u64),
}

impl Depot {
    /// The depot in a folder, which is made.
    pub(crate) fn open(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        tidy(dir)?;
        let mut packs = vec![];
        let mut spots = HashMap::new();
        for path in packs_in(dir)? {
            // Another worker may tidy up, too.
            let Ok(file) = File::open(&path) else { continue };
            index(&file, packs.len(), &mut spots);
            packs.push((path, file));
        }
        let own = tempfile_in(dir)?;
        packs.push((own.0, own.1.try_clone()?));
        Ok(Self { packs, spots, used: HashSet::new(), own: (BufWriter::with_capacity(256 << 10, own.1), 0) })
    }

    fn read(&self, entry: &Entry) -> io::Result<Option<Vec<u8>>> {
        let Some(spot) = self.spots.get(&entry.hash).filter(|spot| spot.length == entry.length) else { return Ok(None) };
        let mut bytes = vec![0; spot.length as usize];
        match self.packs[spot.pack].1.read_exact_at(&mut bytes, spot.offset) {
            Ok(()) if *blake3::hash(&bytes).as_bytes() == entry.hash => Ok(Some(bytes)),
            // Damaged or cut off: as if it were not there.
            Ok(()) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Which chunks are not there. One that is there twice is wanted once.
    pub(crate) fn missing(&mut self, list: &List) -> io::Result<Wanted> {
        let mut bits = vec![0; list.0.len().div_ceil(8)];
        let mut seen = HashSet::new();
        for (index, entry) in list.0.iter().enumerate() {
            if !seen.insert(entry.hash) {
                continue;
            }
            if self.read(entry)?.is_some() {
                if let Some(spot) = self.spots.get(&entry.hash) {
                    self.used.insert(spot.pack);
                }
            } else {
                self.spots.remove(&entry.hash);
                bits[index / 8] |= 1 << (index % 8);
            }
        }
        Ok(Wanted(bits))
    }

    /// Takes the wanted chunks of a list.
    pub(crate) fn fill(&mut self, list: &List, wanted: &Wanted, from: &mut impl Read) -> io::Result<()> {
        let done = self.take(list, wanted, from);
        // What came before a connection broke need not come again.
        self.own.0.flush()?;
        done
    }

    fn take(&mut self, list: &List, wanted: &Wanted, from: &mut impl Read) -> io::Result<()> {
        for (_, entry) in list.0.iter().enumerate().filter(|(index, _)| wanted.has(*index)) {
            let mut bytes = vec![0; entry.length as usize];
            from.read_exact(&mut bytes)?;
            if *blake3::hash(&bytes).as_bytes() != entry.hash {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the build context changed while it was sent; build again"));
            }
            let (to, end) = &mut self.own;
            to.write_all(&entry.hash)?;
            to.write_all(&entry.length.to_le_bytes())?;
            to.write_all(&bytes)?;
            let spot = Spot { pack: self.packs.len() - 1, offset: *end + ENTRY as u64, length: entry.length };
            *end += ENTRY as u64 + u64::from(entry.length);
            self.spots.insert(entry.hash, spot);
        }
        Ok(())
    }

    /// The stream of a list all of whose chunks are there.
    pub(crate) fn reader<'d>(&'d self, list: &'d List) -> Reader<'d> {
        Reader { depot: self, rest: list.0.iter(), piece: io::Cursor::default() }
    }
}

impl Drop for Depot {
    fn drop(&mut self) {
        let _ = self.own.0.flush();
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        for pack in &self.used {
            let _ = rustix::fs::futimens(&self.packs[*pack].1, &Timestamps { last_access: now, last_modification: now });
        }
        if self.own.1 == 0
            && let Some((path, _)) = self.packs.last()
        {
            let _ = fs::remove_file(path);
        }
    }
}

/// A stream put together again.
pub(crate) struct Reader<'d> {
    depot: &'d Depot,
    rest: std::slice::Iter<'d, Entry>,
    piece: io::Cursor<Vec<u8>>,
}

impl Read for Reader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = self.piece.read(buffer)?;
            if read > 0 || buffer.is_empty() {
                return Ok(read);
            }
            let Some(entry) = self.rest.next() else { return Ok(0) };
            let bytes = self.depot.read(entry)?;
            self.piece = io::Cursor::new(bytes.ok_or_else(|| io::Error::other("a chunk of the build context is gone"))?);
        }
    }
}

fn packs_in(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = fs::read_dir(dir)?
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("pack-"))
        .map(|entry| entry.path())
        .collect();
    found.sort();
    Ok(found)
}

fn tempfile_in(dir: &Path) -> io::Result<(PathBuf, File)> {
    use std::hash::{BuildHasher as _, RandomState};
    loop {
        let path = dir.join(format!("pack-{:016x}", RandomState::new().hash_one(std::process::id())));
        match File::options().read(true).write(true).create_new(true).open(&path) {
            Ok(file) => return Ok((path, file)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
}

/// Notes where the chunks of a pack are, as far as it is whole.
fn index(pack: &File, number: usize, spots: &mut HashMap<Hash, Spot>) {
    let Ok(length) = pack.metadata().map(|meta| meta.len()) else { return };
    let mut at = 0;
    let mut head = [0; ENTRY];
    while at + ENTRY as u64 <= length && pack.read_exact_at(&mut head, at).is_ok() {
        let Ok(List(entries)) = List::parse(&head) else { return };
        let Some(entry) = entries.first() else { return };
        let offset = at + ENTRY as u64;
        at = offset + u64::from(entry.length);
        if at > length {
            return;
        }
        spots.insert(entry.hash, Spot { pack: number, offset, length: entry.length });
    }
}

/// Removes the packs that served nobody for longest, while there is too much.
fn tidy(dir: &Path) -> io::Result<()> {
    let mut packs: Vec<(SystemTime, u64, PathBuf)> = packs_in(dir)?
        .into_iter()
        .filter_map(|path| path.metadata().ok().and_then(|meta| Some((meta.modified().ok()?, meta.len(), path))))
        .collect();
    packs.sort();
    let (mut bytes, mut count) = (packs.iter().map(|(_, length, _)| length).sum::<u64>(), packs.len());
    for (_, length, path) in packs {
        if bytes <= MOST_BYTES && count < MOST_PACKS {
            break;
        }
        if fs::remove_file(&path).is_ok() {
            (bytes, count) = (bytes - length, count - 1);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(bytes: usize, mut seed: u64) -> Vec<u8> {
        let next = |_| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 56) as u8
        };
        (0..bytes).map(next).collect()
    }

    /// What a depot lacks is sent; how many bytes those were.
    fn send(dir: &Path, stream: &[u8]) -> usize {
        let mut depot = Depot::open(dir).unwrap();
        let list = List::parse(&cut(stream).to_bytes()).unwrap();
        let wanted = depot.missing(&list).unwrap();
        let mut sent = vec![];
        let mut selector = Selector::new(&list, &wanted, 0, &mut sent);
        for piece in stream.chunks(777) {
            selector.write_all(piece).unwrap();
        }
        assert!(selector.is_at(list.len()));
        depot.fill(&list, &wanted, &mut sent.as_slice()).unwrap();
        let mut back = vec![];
        depot.reader(&list).read_to_end(&mut back).unwrap();
        assert!(back == stream);
        sent.len()
    }

    #[test]
    fn what_is_there_is_not_sent_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut stream = noise(1 << 20, 1);
        assert_eq!(send(dir.path(), &stream), 1 << 20);
        assert_eq!(send(dir.path(), &stream), 0);
        // In the middle something is put in: what follows is cut as before.
        stream.splice(500_000..500_000, *b"more");
        let sent = send(dir.path(), &stream);
        assert!((1..64 << 10).contains(&sent), "{sent}");
        stream.truncate(300_000);
        assert!(send(dir.path(), &stream) < 64 << 10);
        assert_eq!(send(dir.path(), &[]), 0);
        assert_eq!(send(dir.path(), &vec![7; 1 << 20]), 32 << 10, "the same chunk is sent once");
    }

    #[test]
    fn cuts_do_not_depend_on_how_it_is_written() {
        let stream = noise(300_000, 2);
        let mut cutter = Cutter::new(Fineness::of(0));
        for piece in stream.chunks(1) {
            cutter.write_all(piece).unwrap();
        }
        let list = cutter.finish();
        assert_eq!(list, cut(&stream));
        assert_eq!(list.bytes(), 300_000);
        assert!((20..150).contains(&list.len()), "{}", list.len());
    }

    #[test]
    fn what_broke_off_goes_on_and_what_is_damaged_comes_again() {
        let dir = tempfile::tempdir().unwrap();
        let stream = noise(400_000, 3);
        let list = cut(&stream);
        let mut depot = Depot::open(dir.path()).unwrap();
        let wanted = depot.missing(&list).unwrap();
        assert!(depot.fill(&list, &wanted, &mut &stream[..300_000]).is_err(), "the pipe broke");
        drop(depot);
        // What had not come, and the chunk that broke off.
        assert!(send(dir.path(), &stream) < 100_000 + Fineness::of(0).longest);
        // A byte flips, and the end of a pack is lost.
        for path in packs_in(dir.path()).unwrap() {
            let mut bytes = fs::read(&path).unwrap();
            bytes[5000] ^= 1;
            bytes.truncate(bytes.len() - 10);
            fs::write(&path, bytes).unwrap();
        }
        let sent = send(dir.path(), &stream);
        assert!(sent > 0 && sent < 300_000, "{sent}");
    }

    #[test]
    fn foreign_lists() {
        for bytes in [&[0; 35][..], &[0; 36], &[255; 36], &[255; 37]] {
            assert!(List::parse(bytes).is_err());
        }
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("pack-1"), [255; 5000]).unwrap();
        assert_eq!(send(dir.path(), &noise(5000, 4)), 5000);
        let mut depot = Depot::open(dir.path()).unwrap();
        let list = cut(&noise(5000, 5));
        let wanted = depot.missing(&list).unwrap();
        let error = depot.fill(&list, &wanted, &mut noise(5000, 6).as_slice()).unwrap_err();
        assert!(error.to_string().contains("changed while it was sent"));
    }

    #[test]
    fn there_is_never_too_much() {
        let dir = tempfile::tempdir().unwrap();
        for number in 0..80 {
            fs::write(dir.path().join(format!("pack-{number}")), b"x").unwrap();
        }
        tidy(dir.path()).unwrap();
        assert_eq!(packs_in(dir.path()).unwrap().len(), MOST_PACKS - 1);
    }
}
