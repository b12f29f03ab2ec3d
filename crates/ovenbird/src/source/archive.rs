//! An archive, or a Dockerfile, from a stream: standard input and downloads.

use std::io::{self, Read};
use std::path::Path;

use ovenbird_engine::ops::file::decompress;
use ovenbird_oci::layer::{self, Ownership};

use super::{MAX_TEXT, SourceError};

/// What a stream was.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unpacked {
    /// An archive, which is now a folder.
    Context,
    /// A Dockerfile, with an empty folder.
    Dockerfile(String),
    /// Nothing.
    Empty,
}

/// Makes the folder `dir` of an archive (tar, plain or compressed by gzip, bzip2, xz or zstd); anything else is a Dockerfile.
pub(super) fn unpack(stream: &mut dyn Read, what: &str, dir: &Path) -> Result<Unpacked, SourceError> {
    let read = |source| SourceError::Read { what: what.to_owned(), source };
    let mut head = vec![];
    stream.take(512).read_to_end(&mut head).map_err(read)?;
    if head.is_empty() {
        return Ok(Unpacked::Empty);
    }
    std::fs::create_dir_all(dir).map_err(|source| SourceError::Read { what: dir.display().to_string(), source })?;
    let archive = is_archive(&head);
    let whole = io::Cursor::new(head).chain(stream);
    if !archive {
        return read_text(what, &mut { whole }).map(Unpacked::Dockerfile);
    }
    let failed = |reason: String| SourceError::Archive { what: what.to_owned(), reason };
    let plain = decompress(whole).map_err(|error| failed(error.to_string()))?;
    layer::extract(plain, dir, Ownership::Recorded).map_err(|error| failed(error.of_archive()))?;
    Ok(Unpacked::Context)
}

/// Text of a bounded size.
pub(super) fn read_text(what: &str, reader: &mut dyn Read) -> Result<String, SourceError> {
    let mut bytes = vec![];
    reader.take(MAX_TEXT + 1).read_to_end(&mut bytes).map_err(|source| SourceError::Read { what: what.into(), source })?;
    if bytes.len() as u64 > MAX_TEXT {
        return Err(SourceError::TooLarge { what: what.into(), limit: MAX_TEXT });
    }
    String::from_utf8(bytes).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        SourceError::NotText { what: what.into(), line: valid.split(|b| *b == b'\n').count() }
    })
}

/// By content: compression magic, or a tar header whose checksum is right.
pub(super) fn is_archive(head: &[u8]) -> bool {
    match head {
        // gzip, zstd, bzip2, xz
        [0x1f, 0x8b, ..]
        | [0x28, 0xb5, 0x2f, 0xfd, ..]
        | [b'B', b'Z', b'h', b'1'..=b'9', 0x31, 0x41, 0x59, 0x26, ..]
        | [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => true,
        _ if head.len() == 512 => {
            let said = std::str::from_utf8(&head[148..156]).ok().map(|said| said.trim_matches(['\0', ' ']));
            let said = said.and_then(|said| u32::from_str_radix(said, 8).ok());
            let sum = head.iter().enumerate().map(|(at, b)| if (148..156).contains(&at) { 32 } else { u32::from(*b) }).sum::<u32>();
            said == Some(sum) || head.iter().all(|b| *b == 0)
        }
        _ => false,
    }
}
