//! Headers as bytes.

use super::{BLOCK, Header, Kind, padding};

/// Prefix of the records that hold extended attributes (from star, read by everybody).
pub(super) const XATTR: &[u8] = b"SCHILY.xattr.";

/// Appends the header blocks of an entry: a pax header when the fields of ustar cannot hold it, then the ustar header.
/// The same header gives the same bytes. Sizes are taken from `header.size`; the caller writes content and [`padding`].
pub fn encode(header: &Header, out: &mut Vec<u8>) {
    let mut records: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    let mut need = |key: &str, value: &[u8]| records.push((key.as_bytes().to_vec(), value.to_vec()));
    if !fits(&header.path) {
        need("path", &header.path);
    }
    if !fits(&header.link) {
        need("linkpath", &header.link);
    }
    let size = octal::<12>(header.size).unwrap_or_else(|| {
        need("size", header.size.to_string().as_bytes());
        *b"00000000000\0"
    });
    let uid = octal::<8>(header.uid).unwrap_or_else(|| {
        need("uid", header.uid.to_string().as_bytes());
        *b"0000000\0"
    });
    let gid = octal::<8>(header.gid).unwrap_or_else(|| {
        need("gid", header.gid.to_string().as_bytes());
        *b"0000000\0"
    });
    let mtime = u64::try_from(header.mtime).ok().and_then(octal::<12>).unwrap_or_else(|| {
        need("mtime", header.mtime.to_string().as_bytes());
        *b"00000000000\0"
    });
    for (name, value) in &header.xattrs {
        records.push(([XATTR, name].concat(), value.clone()));
    }
    if !records.is_empty() {
        records.sort();
        let mut body = Vec::new();
        for (key, value) in &records {
            record(key, value, &mut body);
        }
        let mut block = block(b"pax", b'x');
        // The name is only seen by readers that do not know pax.
        set(&mut block, 0, &short(&[b"PaxHeaders.0/", base(&header.path)].concat()));
        set(&mut block, 100, b"0000644\0");
        set(&mut block, 124, &octal::<12>(body.len() as u64).unwrap_or(*b"77777777777\0"));
        finish(&mut block, out);
        out.extend_from_slice(&body);
        out.resize(out.len() + padding(body.len() as u64), 0);
    }
    let kind = match header.kind {
        Kind::File => b'0',
        Kind::Link => b'1',
        Kind::Symlink => b'2',
        Kind::Char => b'3',
        Kind::Block => b'4',
        Kind::Directory => b'5',
        Kind::Fifo => b'6',
    };
    let mut block = block(&short(&header.path), kind);
    set(&mut block, 100, &octal::<8>(u64::from(header.mode & 0o7777)).unwrap_or_default());
    set(&mut block, 108, &uid);
    set(&mut block, 116, &gid);
    set(&mut block, 124, &size);
    set(&mut block, 136, &mtime);
    set(&mut block, 157, &short(&header.link));
    // 20 bits each in Linux, so they fit.
    set(&mut block, 329, &octal::<8>(u64::from(header.device.0)).unwrap_or(*b"7777777\0"));
    set(&mut block, 337, &octal::<8>(u64::from(header.device.1)).unwrap_or(*b"7777777\0"));
    finish(&mut block, out);
}

/// An empty header with name, type and magic.
fn block(name: &[u8], kind: u8) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    set(&mut block, 0, name);
    for (at, width) in [(100, 8), (108, 8), (116, 8), (124, 12), (136, 12), (329, 8), (337, 8)] {
        block[at..at + width - 1].fill(b'0');
    }
    block[156] = kind;
    set(&mut block, 257, b"ustar\x0000");
    block
}

/// Fills in the checksum and appends.
fn finish(block: &mut [u8; BLOCK], out: &mut Vec<u8>) {
    set(block, 148, b"        ");
    let sum: u64 = block.iter().map(|&b| u64::from(b)).sum();
    set(block, 148, &octal::<7>(sum).unwrap_or_default());
    out.extend_from_slice(block);
}

fn set(block: &mut [u8; BLOCK], at: usize, bytes: &[u8]) {
    block[at..at + bytes.len()].copy_from_slice(bytes);
}

/// `WIDTH - 1` octal digits and NUL, if they suffice.
fn octal<const WIDTH: usize>(mut n: u64) -> Option<[u8; WIDTH]> {
    let mut field = [0; WIDTH];
    for digit in field[..WIDTH - 1].iter_mut().rev() {
        *digit = b'0' + (n & 7) as u8;
        n >>= 3;
    }
    (n == 0).then_some(field)
}

/// Does the 100-byte field hold it, for every reader?
fn fits(name: &[u8]) -> bool {
    name.len() <= 100 && name.is_ascii()
}

fn short(name: &[u8]) -> Vec<u8> {
    name[..name.len().min(100)].to_vec()
}

fn base(path: &[u8]) -> &[u8] {
    let path = path.strip_suffix(b"/").unwrap_or(path);
    path.rsplit(|&c| c == b'/').next().unwrap_or(path)
}

/// `LENGTH KEY=VALUE\n`, where LENGTH counts itself.
fn record(key: &[u8], value: &[u8], out: &mut Vec<u8>) {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    out.extend_from_slice(length.to_string().as_bytes());
    out.push(b' ');
    out.extend_from_slice(key);
    out.push(b'=');
    out.extend_from_slice(value);
    out.push(b'\n');
}
