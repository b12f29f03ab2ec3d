//! A streaming reader that trusts nothing: no allocation is as large as a header says, only as large as what came.

use std::collections::BTreeMap;
use std::io::{self, Read};

use super::write::XATTR;
use super::{BLOCK, Header, Kind, padding};

/// Largest pax or GNU long-name header, as in Go's reader.
const MAX_SPECIAL: u64 = 1 << 20;
/// Most pieces of a sparse file.
const MAX_SPARSE: usize = 1 << 18;

/// Reads entries one after the other. After [`next`](Self::next) it is also a [`Read`] of the content of that entry
/// (the holes of sparse files read as zeros).
#[derive(Debug)]
pub struct Reader<R> {
    inner: R,
    /// Stored bytes of this entry that were not read yet, and the padding after them.
    stored: u64,
    padding: u64,
    /// Pieces (offset, length) of the content that are stored, in order; the first `piece` ones are read.
    pieces: Vec<(u64, u64)>,
    piece: usize,
    /// Position in the content, and its size.
    position: u64,
    size: u64,
}

/// Values of a pax header that matter here.
#[derive(Default)]
struct Pax {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// GNU.sparse.*: real name, real size, map of the formats 0.0 and 0.1, version.
    sparse_name: Option<Vec<u8>>,
    sparse_size: Option<u64>,
    sparse_map: Vec<u64>,
    sparse_major: u64,
    sparse: bool,
}

fn bad(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.into())
}

impl<R: Read> Reader<R> {
    /// Reads an uncompressed tar.
    pub fn new(inner: R) -> Self {
        Self { inner, stored: 0, padding: 0, pieces: vec![], piece: 0, position: 0, size: 0 }
    }

    /// Gives the stream back, right after what was read.
    pub fn into_inner(self) -> R {
        self.inner
    }

    /// The next entry; `None` at the end of the archive. What was not read of the entry before is skipped.
    /// Malformed archives are errors of the kind `InvalidData`, cut ones `UnexpectedEof`.
    #[allow(clippy::should_implement_trait, reason = "the entry borrows nothing, but the content is read from self in between")]
    pub fn next(&mut self) -> io::Result<Option<Header>> {
        self.skip()?;
        let mut pax: Option<Pax> = None;
        let (mut long_name, mut long_link) = (None, None);
        loop {
            let Some(block) = self.block()? else {
                // A cut after the helpers of an entry is not an end.
                let whole = pax.is_none() && long_name.is_none() && long_link.is_none();
                return if whole { Ok(None) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
            };
            verify(&block)?;
            let size = number(&block[124..136]).and_then(|n| u64::try_from(n).ok()).ok_or_else(|| bad("a size is not a number"))?;
            match block[156] {
                b'x' => pax = Some(parse_pax(&self.special(size)?)?),
                // Defaults for all entries: nothing that a layer may change for others.
                b'g' => drop(self.special(size)?),
                b'L' => long_name = Some(until_nul(&self.special(size)?)),
                b'K' => long_link = Some(until_nul(&self.special(size)?)),
                _ => return self.entry(&block, size, pax.unwrap_or_default(), long_name, long_link).map(Some),
            }
        }
    }

    fn entry(
        &mut self,
        block: &[u8; BLOCK],
        size: u64,
        pax: Pax,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> io::Result<Header> {
        let ustar = &block[257..263] == b"ustar\0";
        let mut path = until_nul(&block[..100]);
        let prefix = until_nul(if block[508..] == *b"tar\0" { &block[345..476] } else { &block[345..500] });
        if ustar && !prefix.is_empty() {
            path = [&prefix[..], b"/", &path].concat();
        }
        let path = pax.sparse_name.or(pax.path).or(long_name).unwrap_or(path);
        if path.contains(&0) {
            return Err(bad("a name contains a NUL byte"));
        }
        let kind = match block[156] {
            // Before POSIX, directories were files whose name ends in a slash.
            b'0' | 0 | b'7' | b'S' if !path.ends_with(b"/") => Kind::File,
            b'0' | 0 | b'5' | b'7' | b'S' => Kind::Directory,
            b'1' => Kind::Link,
            b'2' => Kind::Symlink,
            b'3' => Kind::Char,
            b'4' => Kind::Block,
            b'6' => Kind::Fifo,
            other => return Err(bad(format!("an entry has the unknown type {:?}", char::from(other)))),
        };
        let mut header = Header::new(path, kind);
        let field = |range: std::ops::Range<usize>, what: &str| number(&block[range]).ok_or_else(|| bad(format!("{what} is not a number")));
        let id = |given: Option<u64>, range, what| match given {
            Some(n) => Ok(n),
            None => u64::try_from(field(range, what)?).map_err(|_| bad(format!("{what} is negative"))),
        };
        header.link = pax.link.or(long_link).unwrap_or_else(|| until_nul(&block[157..257]));
        if header.link.contains(&0) {
            return Err(bad("a link target contains a NUL byte"));
        }
        header.mode = field(100..108, "a mode")? as u32 & 0o7777;
        header.uid = id(pax.uid, 108..116, "a user id")?;
        header.gid = id(pax.gid, 116..124, "a group id")?;
        (header.mtime, header.mtime_nanos) = match pax.mtime {
            Some(mtime) => mtime,
            None => (field(136..148, "a time")?, 0),
        };
        header.xattrs = pax.xattrs.into_iter().collect();
        if matches!(kind, Kind::Char | Kind::Block) {
            let part =
                |range| field(range, "a device number").and_then(|n| u32::try_from(n).map_err(|_| bad("a device number is too large")));
            header.device = (part(329..337)?, part(337..345)?);
        }
        // As in Go: types without content have none, whatever the size field says.
        if kind != Kind::File {
            return Ok(header);
        }
        self.stored = pax.size.unwrap_or(size);
        self.padding = padding(self.stored) as u64;
        self.position = 0;
        self.piece = 0;
        if block[156] == b'S' {
            self.size = field(483..495, "a size")?.try_into().map_err(|_| bad("a size is negative"))?;
            self.old_gnu_map(block)?;
        } else if pax.sparse {
            self.size = pax.sparse_size.ok_or_else(|| bad("a sparse file has no size"))?;
            self.pieces = match pax.sparse_major {
                0 => pairs(&pax.sparse_map)?,
                1 => self.new_gnu_map()?,
                _ => return Err(bad("a sparse file has an unknown version")),
            };
        } else {
            self.size = self.stored;
            self.pieces = vec![(0, self.stored)];
        }
        self.check_pieces()?;
        header.size = self.size;
        Ok(header)
    }

    /// Pieces are in order, within the size, and as long as what is stored.
    fn check_pieces(&self) -> io::Result<()> {
        let (mut end, mut total) = (0u64, 0u64);
        for &(offset, length) in &self.pieces {
            let after = offset.checked_add(length).filter(|&after| offset >= end && after <= self.size && i64::try_from(after).is_ok());
            end = after.ok_or_else(|| bad("the map of a sparse file is not in order"))?;
            total += length;
        }
        if total == self.stored { Ok(()) } else { Err(bad("the map of a sparse file does not fit its content")) }
    }

    fn old_gnu_map(&mut self, first: &[u8; BLOCK]) -> io::Result<()> {
        let (mut block, mut at, mut count, mut flag) = (*first, 386, 4, 482);
        self.pieces.clear();
        loop {
            for field in block[at..at + count * 24].chunks_exact(24) {
                if field[0] == 0 {
                    break;
                }
                let value = |f| number(f).and_then(|n| u64::try_from(n).ok()).ok_or_else(|| bad("the map of a sparse file has no numbers"));
                self.pieces.push((value(&field[..12])?, value(&field[12..])?));
            }
            if block[flag] == 0 {
                return Ok(());
            }
            if self.pieces.len() > MAX_SPARSE {
                return Err(bad("a sparse file has too many pieces"));
            }
            self.inner.read_exact(&mut block)?;
            (at, count, flag) = (0, 21, 504);
        }
    }

    /// Format 1.0: lines of decimal numbers in the first blocks of the content.
    fn new_gnu_map(&mut self) -> io::Result<Vec<(u64, u64)>> {
        let (mut numbers, mut current, mut wanted) = (Vec::new(), None::<u64>, None::<u64>);
        loop {
            let mut block = [0; BLOCK];
            self.stored = self.stored.checked_sub(BLOCK as u64).ok_or_else(|| bad("the map of a sparse file is cut"))?;
            self.inner.read_exact(&mut block)?;
            for byte in block {
                match byte {
                    b'0'..=b'9' => {
                        let next = current.unwrap_or(0).checked_mul(10).and_then(|n| n.checked_add(u64::from(byte - b'0')));
                        current = Some(next.ok_or_else(|| bad("the map of a sparse file has a number out of range"))?);
                    }
                    b'\n' => {
                        let n = current.take().ok_or_else(|| bad("the map of a sparse file has an empty line"))?;
                        match wanted {
                            None if n > MAX_SPARSE as u64 => return Err(bad("a sparse file has too many pieces")),
                            None => wanted = Some(2 * n),
                            Some(_) => numbers.push(n),
                        }
                        if wanted == Some(numbers.len() as u64) {
                            return pairs(&numbers);
                        }
                    }
                    _ => return Err(bad("the map of a sparse file has no numbers")),
                }
            }
        }
    }

    /// The next stored piece of content into `buffer`: where it belongs and how long it is; `None` at the end.
    /// The holes of sparse files are left out.
    pub fn piece(&mut self, buffer: &mut [u8]) -> io::Result<Option<(u64, usize)>> {
        while let Some(&(offset, length)) = self.pieces.get(self.piece) {
            let done = self.position.saturating_sub(offset);
            if done >= length {
                self.piece += 1;
                continue;
            }
            let most = (length - done).min(buffer.len() as u64) as usize;
            let n = retry(|| self.inner.read(&mut buffer[..most]))?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let at = offset + done;
            self.position = at + n as u64;
            self.stored -= n as u64;
            return Ok(Some((at, n)));
        }
        Ok(None)
    }

    /// Size of the content of this entry, holes included.
    pub fn size(&self) -> u64 {
        self.size
    }

    fn skip(&mut self) -> io::Result<()> {
        let mut left = self.stored + std::mem::take(&mut self.padding);
        (self.stored, self.position, self.size) = (0, 0, 0);
        self.pieces.clear();
        let mut buffer = [0; 16 * 1024];
        while left > 0 {
            let most = left.min(buffer.len() as u64) as usize;
            match retry(|| self.inner.read(&mut buffer[..most]))? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => left -= n as u64,
            }
        }
        Ok(())
    }

    /// A header block; `None` at the end: a block of zeros, or no more bytes.
    fn block(&mut self) -> io::Result<Option<[u8; BLOCK]>> {
        let mut block = [0; BLOCK];
        let mut have = 0;
        while have < BLOCK {
            match retry(|| self.inner.read(&mut block[have..]))? {
                0 if have == 0 => return Ok(None),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => have += n,
            }
        }
        Ok(Some(block).filter(|b| b.iter().any(|&b| b != 0)))
    }

    /// Content of a header that belongs to the next entry.
    fn special(&mut self, size: u64) -> io::Result<Vec<u8>> {
        if size > MAX_SPECIAL {
            return Err(bad("an extended header is larger than 1 MiB"));
        }
        let mut bytes = Vec::new();
        self.inner.by_ref().take(size).read_to_end(&mut bytes)?;
        self.padding = padding(size) as u64;
        if (bytes.len() as u64) < size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.skip()?;
        Ok(bytes)
    }
}

impl<R: Read> Read for Reader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.pieces.get(self.piece).is_some_and(|&(offset, length)| offset + length <= self.position) {
            self.piece += 1;
        }
        let next = self.pieces.get(self.piece).map_or(self.size, |&(offset, _)| offset);
        if self.position >= self.size || buffer.is_empty() {
            return Ok(0);
        }
        if self.position < next {
            let hole = (next - self.position).min(buffer.len() as u64) as usize;
            buffer[..hole].fill(0);
            self.position += hole as u64;
            return Ok(hole);
        }
        Ok(self.piece(buffer)?.map_or(0, |(_, n)| n))
    }
}

fn retry(mut read: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match read() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

fn until_nul(bytes: &[u8]) -> Vec<u8> {
    bytes.split(|&b| b == 0).next().unwrap_or_default().to_vec()
}

/// Octal digits between spaces and NULs, or base 256 (GNU) when the top bit is set.
fn number(field: &[u8]) -> Option<i64> {
    let first = *field.first()?;
    if first & 0x80 != 0 {
        let negative = first & 0x40 != 0;
        let mut n: i128 = if negative { -1 } else { 0 };
        for (i, &byte) in field.iter().enumerate() {
            let byte = if i == 0 && !negative { byte & 0x7f } else { byte };
            n = (n << 8) | i128::from(byte);
        }
        return i64::try_from(n).ok();
    }
    let mut text = field.iter().copied().skip_while(|c| matches!(c, b' ' | 0)).take_while(|c| !matches!(c, b' ' | 0));
    text.try_fold(0i64, |n, c| if matches!(c, b'0'..=b'7') { n.checked_mul(8)?.checked_add(i64::from(c - b'0')) } else { None })
}

/// The checksum; some old writers summed signed bytes.
fn verify(block: &[u8; BLOCK]) -> io::Result<()> {
    let sum =
        |value: fn(u8) -> i64| -> i64 { block.iter().enumerate().map(|(i, &b)| if (148..156).contains(&i) { 32 } else { value(b) }).sum() };
    let told = number(&block[148..156]);
    if told == Some(sum(i64::from)) || told == Some(sum(|b| i64::from(b as i8))) {
        return Ok(());
    }
    Err(bad("it is not a tar archive, or a header is damaged (checksum)"))
}

fn pairs(numbers: &[u64]) -> io::Result<Vec<(u64, u64)>> {
    if numbers.len() % 2 == 1 || numbers.len() > 2 * MAX_SPARSE {
        return Err(bad("the map of a sparse file is cut"));
    }
    Ok(numbers.chunks_exact(2).map(|p| (p[0], p[1])).collect())
}

fn parse_pax(mut bytes: &[u8]) -> io::Result<Pax> {
    let broken = || bad("a pax header is malformed");
    let mut pax = Pax::default();
    while !bytes.is_empty() && bytes[0] != 0 {
        let space = bytes.iter().take(20).position(|&b| b == b' ').ok_or_else(broken)?;
        let length: usize = std::str::from_utf8(&bytes[..space]).ok().and_then(|n| n.parse().ok()).ok_or_else(broken)?;
        let record = bytes.get(space + 1..length).and_then(|r| r.strip_suffix(b"\n")).ok_or_else(broken)?;
        let equals = record.iter().position(|&b| b == b'=').ok_or_else(broken)?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        let integer = || std::str::from_utf8(value).ok().and_then(|n| n.parse::<u64>().ok()).ok_or_else(broken);
        match key {
            // An empty value takes a global header's value back; there is none here.
            b"path" | b"linkpath" | b"size" | b"uid" | b"gid" | b"mtime" if value.is_empty() => {}
            b"path" => pax.path = Some(value.to_vec()),
            b"linkpath" => pax.link = Some(value.to_vec()),
            b"size" => pax.size = Some(integer()?),
            b"uid" => pax.uid = Some(integer()?),
            b"gid" => pax.gid = Some(integer()?),
            b"mtime" => pax.mtime = Some(parse_time(value).ok_or_else(broken)?),
            b"GNU.sparse.name" => pax.sparse_name = Some(value.to_vec()),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => (pax.sparse, pax.sparse_size) = (true, Some(integer()?)),
            b"GNU.sparse.major" => pax.sparse_major = integer()?,
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => pax.sparse_map.push(integer()?),
            b"GNU.sparse.map" => {
                let text = std::str::from_utf8(value).map_err(|_| broken())?;
                pax.sparse_map =
                    text.split(',').filter(|n| !n.is_empty()).map(str::parse).collect::<Result<_, _>>().map_err(|_| broken())?;
            }
            _ => {
                if let Some(name) = key.strip_prefix(XATTR) {
                    pax.xattrs.insert(name.to_vec(), value.to_vec());
                }
            }
        }
        bytes = &bytes[length..];
    }
    Ok(pax)
}

/// `[-]SECONDS[.FRACTION]`.
fn parse_time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    let mut nanos = 0;
    let mut digits = fraction.bytes();
    for _ in 0..9 {
        let digit = digits.next().unwrap_or(b'0');
        nanos = nanos * 10 + u32::from(digit.checked_sub(b'0').filter(|d| *d < 10)?);
    }
    // -1.25 is 0.75 after -2.
    if whole.starts_with('-') && nanos > 0 { Some((seconds.checked_sub(1)?, 1_000_000_000 - nanos)) } else { Some((seconds, nanos)) }
}
