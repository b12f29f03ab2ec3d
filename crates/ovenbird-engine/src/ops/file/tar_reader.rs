//! Reads foreign tar archives member by member: ustar, GNU (long names, old sparse files) and PAX
//! (long names, times, extended attributes, sparse 1.0). Extension headers are bounded, so a
//! hostile archive cannot take memory.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt;

/// Most bytes of one extension header, or of one sparse map.
const MAX_EXTENSION: u64 = 1 << 20;
/// Largest sparse file, in bytes; its holes cost time to read.
const MAX_SPARSE: u64 = 256 << 30;
const BLOCK: u64 = 512;

/// What a member is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MemberKind {
    File,
    Dir,
    Symlink,
    HardLink,
    Char,
    Block,
    Fifo,
}

/// One member; its content is read from the [`Tar`].
#[derive(Debug)]
pub(super) struct Member {
    pub(super) kind: MemberKind,
    pub(super) path: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: (i64, u32),
    pub(super) device: (u32, u32),
    pub(super) xattrs: Vec<(OsString, Vec<u8>)>,
}

/// An archive. Its `Read` gives the content of the last member.
pub(super) struct Tar<R> {
    reader: R,
    /// Bytes of the member's data not yet read, and of the padding behind.
    left: u64,
    padding: u64,
    /// Segments with data still to give (offset, length), reversed; `None` when not sparse.
    sparse: Option<Vec<(u64, u64)>>,
    /// Where in the sparse file we are, and its length.
    at: u64,
    length: u64,
}

fn malformed(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

impl<R: Read> Tar<R> {
    pub(super) fn new(reader: R) -> Self {
        Self { reader, left: 0, padding: 0, sparse: None, at: 0, length: 0 }
    }

    /// The next member; `None` at the end.
    pub(super) fn next(&mut self) -> io::Result<Option<Member>> {
        let mut long_path = None;
        let mut long_link = None;
        let mut pax: HashMap<Vec<u8>, Vec<u8>> = HashMap::new();
        loop {
            self.skip()?;
            let Some(header) = self.header()? else { return Ok(None) };
            let kind = header.entry_type();
            let size = header.entry_size()?;
            self.data(size);
            match kind.as_byte() {
                b'L' => long_path = Some(self.text(size)?),
                b'K' => long_link = Some(self.text(size)?),
                b'x' | b'X' => pax.extend(records(&self.extension(size)?)?),
                b'g' => {}
                _ => return self.member(&header, long_path, long_link, pax).map(Some),
            }
        }
    }

    fn member(
        &mut self,
        header: &tar::Header,
        long_path: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
        mut pax: HashMap<Vec<u8>, Vec<u8>>,
    ) -> io::Result<Member> {
        let mut number = |key: &str| {
            pax.remove(key.as_bytes())
                .map(|v| {
                    std::str::from_utf8(&v).ok().and_then(|t| t.parse::<u64>().ok()).ok_or_else(|| malformed("a PAX number cannot be read"))
                })
                .transpose()
        };
        let (size, uid, gid) = (number("size")?, number("uid")?, number("gid")?);
        let (major, minor) = (number("GNU.sparse.major")?, number("GNU.sparse.minor")?);
        let real_size = number("GNU.sparse.realsize")?;
        if let Some(size) = size {
            self.data(size);
        }
        let mut path = pax.remove(&b"path"[..]).or(long_path).unwrap_or_else(|| header.path_bytes().into_owned());
        if let Some(name) = pax.remove(&b"GNU.sparse.name"[..]) {
            path = name;
        }
        let link = pax
            .remove(&b"linkpath"[..])
            .or(long_link)
            .or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned))
            .unwrap_or_default();
        let kind = match header.entry_type().as_byte() {
            // Before POSIX, a slash at the end made a folder.
            0 | b'0' | b'7' if path.ends_with(b"/") => MemberKind::Dir,
            0 | b'0' | b'7' => MemberKind::File,
            b'S' => {
                self.gnu_sparse(header)?;
                MemberKind::File
            }
            b'1' => MemberKind::HardLink,
            b'2' => MemberKind::Symlink,
            b'3' => MemberKind::Char,
            b'4' => MemberKind::Block,
            b'5' => MemberKind::Dir,
            b'6' => MemberKind::Fifo,
            other => {
                return Err(malformed(&format!(
                    "member {:?} has the unknown type {:?}",
                    String::from_utf8_lossy(&path),
                    char::from(other)
                )));
            }
        };
        if kind == MemberKind::File && major == Some(1) && minor == Some(0) {
            self.pax_sparse(real_size)?;
        } else if major.is_some() || pax.keys().any(|k| k.starts_with(b"GNU.sparse.")) {
            return Err(malformed("sparse files of this old PAX form are not supported; pack the archive without --sparse"));
        }
        let mtime = match pax.get(&b"mtime"[..]) {
            Some(text) => parse_time(text).ok_or_else(|| malformed("a PAX time cannot be read"))?,
            None => (i64::try_from(header.mtime()?).unwrap_or(0), 0),
        };
        let device = match kind {
            MemberKind::Char | MemberKind::Block => (header.device_major()?.unwrap_or(0), header.device_minor()?.unwrap_or(0)),
            _ => (0, 0),
        };
        let id = |pax: Option<u64>, header: io::Result<u64>| {
            let id = pax.map_or(header, Ok)?;
            u32::try_from(id).map_err(|_| malformed("an owner is larger than 4294967295"))
        };
        let mut xattrs: Vec<_> = pax
            .into_iter()
            .filter_map(|(key, value)| Some((OsString::from_vec(key.strip_prefix(b"SCHILY.xattr.")?.to_vec()), value)))
            .filter(|(name, _)| !name.to_string_lossy().contains(".overlay.") && !name.is_empty())
            .collect();
        xattrs.sort_unstable();
        Ok(Member {
            kind,
            path,
            link,
            mode: header.mode()? & 0o7777,
            uid: id(uid, header.uid())?,
            gid: id(gid, header.gid())?,
            mtime,
            device,
            xattrs,
        })
    }

    fn data(&mut self, size: u64) {
        self.left = size;
        self.padding = size.wrapping_neg() % BLOCK;
        self.sparse = None;
    }

    fn skip(&mut self) -> io::Result<()> {
        let rest = self.left.saturating_add(self.padding);
        if io::copy(&mut self.reader.by_ref().take(rest), &mut io::sink())? < rest {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.data(0);
        Ok(())
    }

    fn header(&mut self) -> io::Result<Option<tar::Header>> {
        let mut header = tar::Header::new_old();
        let block = header.as_mut_bytes();
        let mut filled = 0;
        while filled < block.len() {
            match self.reader.read(&mut block[filled..]) {
                // The zero blocks at the end may be missing.
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => filled += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        if block.iter().all(|b| *b == 0) {
            return Ok(None);
        }
        let sum: u32 = block.iter().enumerate().map(|(at, b)| u32::from(if (148..156).contains(&at) { b' ' } else { *b })).sum();
        if header.cksum()? != sum {
            return Err(malformed("a header's checksum is wrong: this is no tar archive, or it is damaged"));
        }
        Ok(Some(header))
    }

    fn extension(&mut self, size: u64) -> io::Result<Vec<u8>> {
        if size > MAX_EXTENSION {
            return Err(malformed("an extension header is larger than 1 MiB"));
        }
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes)?;
        if bytes.len() as u64 != size {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(bytes)
    }

    fn text(&mut self, size: u64) -> io::Result<Vec<u8>> {
        let mut text = self.extension(size)?;
        if let Some(end) = text.iter().position(|b| *b == 0) {
            text.truncate(end);
        }
        Ok(text)
    }

    /// GNU's old form: the map is in the header and in blocks between it and the data.
    fn gnu_sparse(&mut self, header: &tar::Header) -> io::Result<()> {
        let gnu = header.as_gnu().ok_or_else(|| malformed("a sparse member without a GNU header"))?;
        let mut segments = Vec::new();
        for one in gnu.sparse.iter().filter(|s| !s.is_empty()) {
            segments.push((one.offset()?, one.length()?));
        }
        let mut more = gnu.is_extended();
        let mut blocks = 0;
        while more {
            blocks += 1;
            if blocks * BLOCK > MAX_EXTENSION {
                return Err(malformed("a sparse map is larger than 1 MiB"));
            }
            let mut extended = tar::GnuExtSparseHeader::new();
            self.reader.read_exact(extended.as_mut_bytes())?;
            for one in extended.sparse().iter().filter(|s| !s.is_empty()) {
                segments.push((one.offset()?, one.length()?));
            }
            more = extended.is_extended();
        }
        self.set_sparse(segments, gnu.real_size()?)
    }

    /// PAX form 1.0: the map is decimal lines at the begin of the data, padded to a block.
    fn pax_sparse(&mut self, real_size: Option<u64>) -> io::Result<()> {
        let mut used = 0;
        let mut number = |tar: &mut Self| -> io::Result<u64> {
            let mut value = 0_u64;
            loop {
                let mut byte = [0];
                tar.read_exact(&mut byte)?;
                used += 1;
                match byte[0] {
                    b'\n' => return Ok(value),
                    digit @ b'0'..=b'9' if used <= MAX_EXTENSION => {
                        value = value
                            .checked_mul(10)
                            .and_then(|v| v.checked_add(u64::from(digit - b'0')))
                            .ok_or_else(|| malformed("a sparse map has too large numbers"))?;
                    }
                    _ => return Err(malformed("a sparse map cannot be read")),
                }
            }
        };
        let count = number(self)?;
        let mut segments = Vec::new();
        for _ in 0..count {
            segments.push((number(self)?, number(self)?));
        }
        let padding = u64::wrapping_neg(used) % BLOCK;
        io::copy(&mut self.by_ref().take(padding), &mut io::sink())?;
        let length = real_size.ok_or_else(|| malformed("a sparse member without its size"))?;
        self.set_sparse(segments, length)
    }

    fn set_sparse(&mut self, mut segments: Vec<(u64, u64)>, length: u64) -> io::Result<()> {
        let mut end = 0_u64;
        let mut total = 0_u64;
        for (offset, size) in &segments {
            if *offset < end {
                return Err(malformed("a sparse map is not in order"));
            }
            end = offset.checked_add(*size).ok_or_else(|| malformed("a sparse map has too large numbers"))?;
            total += size;
        }
        if end > length || length > MAX_SPARSE || total != self.left {
            return Err(malformed("a sparse map does not fit the file (at most 256 GiB)"));
        }
        segments.reverse();
        segments.retain(|(_, size)| *size > 0);
        (self.sparse, self.at, self.length) = (Some(segments), 0, length);
        Ok(())
    }

    fn read_data(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let n = self.reader.read(&mut buffer[..most])?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= n as u64;
        Ok(n)
    }
}

impl<R: Read> Read for Tar<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(segments) = &mut self.sparse else { return self.read_data(buffer) };
        let next = segments.last().copied();
        let hole_end = next.map_or(self.length, |(offset, _)| offset);
        if self.at < hole_end {
            let n = usize::try_from(hole_end - self.at).unwrap_or(usize::MAX).min(buffer.len());
            buffer[..n].fill(0);
            self.at += n as u64;
            return Ok(n);
        }
        let Some((_, size)) = next else { return Ok(0) };
        let most = usize::try_from(size).unwrap_or(usize::MAX).min(buffer.len());
        let n = self.read_data(&mut buffer[..most])?;
        self.at += n as u64;
        if let Some(segments) = &mut self.sparse {
            segments.pop();
            if size > n as u64 {
                segments.push((self.at, size - n as u64));
            }
        }
        Ok(n)
    }
}

/// `LENGTH KEY=VALUE\n`, where the length counts itself.
fn records(mut bytes: &[u8]) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let parsed = (|| {
            let space = bytes.iter().position(|b| *b == b' ')?;
            let length: usize = std::str::from_utf8(&bytes[..space]).ok()?.parse().ok()?;
            let (record, rest) = bytes.split_at_checked(length)?;
            let record = record.get(space + 1..)?.strip_suffix(b"\n")?;
            let equals = record.iter().position(|b| *b == b'=')?;
            Some((record[..equals].to_vec(), record[equals + 1..].to_vec(), rest))
        })();
        let (key, value, rest) = parsed.ok_or_else(|| malformed("a PAX record cannot be read"))?;
        found.push((key, value));
        bytes = rest;
    }
    Ok(found)
}

/// `1234567890.123456789`, maybe negative.
fn parse_time(text: &[u8]) -> Option<(i64, u32)> {
    let text = std::str::from_utf8(text).ok()?;
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let whole: i64 = seconds.parse().ok()?;
    if !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let nanoseconds: u32 = format!("{fraction:0<9.9}").parse().ok()?;
    if seconds.starts_with('-') && nanoseconds > 0 { Some((whole - 1, 1_000_000_000 - nanoseconds)) } else { Some((whole, nanoseconds)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_records() {
        for (text, expect) in [
            ("1", Some((1, 0))),
            ("1.5", Some((1, 500_000_000))),
            ("1.0000000019", Some((1, 1))),
            ("-1.25", Some((-2, 750_000_000))),
            ("x", None),
            ("1.x", None),
            ("", None),
        ] {
            assert_eq!(parse_time(text.as_bytes()), expect, "{text}");
        }
        assert_eq!(records(b"6 a=b\n9 cc=d\ne\n").unwrap(), [(b"a".to_vec(), b"b".to_vec()), (b"cc".to_vec(), b"d\ne".to_vec())]);
        for bad in [&b"5 a=b\n"[..], b"99 a=b\n", b"a=b\n", b"6 aab\n", b"18446744073709551615 a=b\n", b"1 \n"] {
            assert!(records(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn hostile_sparse_maps_and_sizes_are_refused() {
        let tar = |size: u64| {
            let mut tar = Tar::new(io::empty());
            tar.data(size);
            tar
        };
        for (what, segments, length, size) in [
            ("out of order", vec![(10, 5), (0, 5)], 20, 10),
            ("overlap", vec![(0, 5), (4, 5)], 20, 10),
            ("overflow", vec![(u64::MAX, 5)], u64::MAX, 5),
            ("behind the end", vec![(10, 5)], 12, 5),
            ("too large", vec![(0, 5)], MAX_SPARSE + 1, 5),
            ("other size", vec![(0, 5)], 5, 6),
        ] {
            assert!(tar(size).set_sparse(segments, length).is_err(), "{what}");
        }
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::XHeader);
        header.set_size(1 << 40);
        header.set_cksum();
        assert!(Tar::new(&header.as_bytes()[..]).next().unwrap_err().to_string().contains("1 MiB"));
    }
}
