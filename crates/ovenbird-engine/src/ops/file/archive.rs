//! `ADD` of a local archive: found by content, unpacked into the destination as into a root.
//!
//! Nothing of it can leave the destination folder: names with `..` are refused, links are followed
//! with that folder as the root. Whiteout names (`.wh.`) have no meaning here.

use std::ffi::OsStr;
use std::io::{self, BufReader, Chain, Cursor, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::FileType;

use super::dest::Dest;
use super::select::Selected;
use super::tar_reader::{Member, MemberKind, Tar};
use super::transfer::Meta;
use super::{FileError, Made, absolute};
use crate::snapshot::tree::{self, Kind, Tree, clean};

/// Memory an xz decoder may take; `xz -9` needs 65 MiB.
const XZ_MEMORY: u64 = 512 << 20;

type Head<R> = Chain<Cursor<Vec<u8>>, R>;

/// Unpacks `source` into `to`; false when it is no archive.
pub(super) fn unpack(dest: &mut Dest, from: &dyn Tree, source: &Selected, to: &str, chown: Option<(u32, u32)>) -> Result<bool, FileError> {
    let open = || tree::open(from, &source.path).map_err(FileError::replaced("read", &source.path));
    let is_archive = match decompress(open()?) {
        Ok(reader) => matches!(Tar::new(reader).next(), Ok(Some(_))),
        Err(_) => false,
    };
    if !is_archive {
        return Ok(false);
    }
    let broken = |reason: String| FileError::Archive { name: source.shown.clone(), reason };
    let root = dest.resolve(&clean(to))?;
    dest.make_dirs(&root, Made::new(chown, None))?;
    let mut tar = Tar::new(decompress(open()?).map_err(|e| broken(e.to_string()))?);
    while let Some(member) = tar.next().map_err(|e| broken(e.to_string()))? {
        put(dest, &root, &member, &mut tar, chown, &broken)?;
    }
    Ok(true)
}

fn put(
    dest: &mut Dest,
    root: &Path,
    member: &Member,
    content: &mut dyn Read,
    chown: Option<(u32, u32)>,
    broken: &dyn Fn(String) -> FileError,
) -> Result<(), FileError> {
    let (uid, gid) = chown.unwrap_or((member.uid, member.gid));
    let meta = Meta { mode: member.mode, uid, gid, mtime: Some(member.mtime) };
    let named = local(&member.path).ok_or_else(|| escapes(&member.path, broken))?;
    if named.as_os_str().is_empty() {
        return Ok(());
    }
    // Like any other entry, a folder takes the place of a link; only links on the way are followed.
    let path = dest.resolve_below(root, &named)?;
    if path == root {
        return Ok(());
    }
    // Parents that the archive does not name are root's.
    dest.make_dirs(path.parent().unwrap_or(root), Made::new(None, None))?;
    match member.kind {
        MemberKind::Dir => dest.replace_with_dir(&path, &member.xattrs, meta),
        MemberKind::File => dest.replace_with_file(&path, content, &member.xattrs, meta),
        MemberKind::Symlink => dest.replace_with_symlink(&path, Path::new(OsStr::from_bytes(&member.link)), meta),
        MemberKind::HardLink => {
            let target = local(&member.link).ok_or_else(|| escapes(&member.link, broken))?;
            let first = dest.resolve_below(root, &target)?;
            match dest.kind(&first)? {
                None => Err(broken(format!("{:?} is a hard link to {:?}, which does not exist", absolute(&named), absolute(&target)))),
                Some(Kind::Dir) => Err(broken(format!("{:?} is a hard link to the folder {:?}", absolute(&named), absolute(&target)))),
                Some(_) => dest.replace_with_link(&path, &first),
            }
        }
        MemberKind::Char => dest.replace_with_node(&path, FileType::CharacterDevice, member.device, meta),
        MemberKind::Block => dest.replace_with_node(&path, FileType::BlockDevice, member.device, meta),
        MemberKind::Fifo => dest.replace_with_node(&path, FileType::Fifo, (0, 0), meta),
    }
}

fn escapes(name: &[u8], broken: &dyn Fn(String) -> FileError) -> FileError {
    broken(format!("the name {:?} leaves the destination", String::from_utf8_lossy(name)))
}

/// The name without slashes in front; `None` when it leaves the root or holds a zero byte.
fn local(name: &[u8]) -> Option<PathBuf> {
    let mut path = PathBuf::new();
    for component in Path::new(OsStr::from_bytes(name)).components() {
        match component {
            Component::Normal(part) if !part.as_bytes().contains(&0) => path.push(part),
            Component::Normal(_) => return None,
            // `a/../b` is `b`; `../b` is outside.
            Component::ParentDir if !path.pop() => return None,
            _ => {}
        }
    }
    Some(path)
}

/// A reader of the plain bytes; the compression is told by the first bytes.
pub fn decompress<'r, R: Read + 'r>(mut file: R) -> io::Result<Box<dyn Read + 'r>> {
    let mut magic = Vec::new();
    file.by_ref().take(6).read_to_end(&mut magic)?;
    let (gzip, bzip2, xz, zstd) = (
        magic.starts_with(&[0x1f, 0x8b]),
        magic.starts_with(b"BZh"),
        magic.starts_with(&[0xfd, b'7', b'z', b'X', b'Z', 0]),
        magic.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]),
    );
    let whole: BufReader<Head<R>> = BufReader::with_capacity(64 * 1024, Cursor::new(magic).chain(file));
    Ok(if gzip {
        Box::new(flate2::bufread::MultiGzDecoder::new(whole))
    } else if bzip2 {
        Box::new(bzip2::bufread::MultiBzDecoder::new(whole))
    } else if xz {
        let stream = liblzma::stream::Stream::new_stream_decoder(XZ_MEMORY, liblzma::stream::CONCATENATED).map_err(io::Error::other)?;
        Box::new(liblzma::bufread::XzDecoder::new_stream(whole, stream))
    } else if zstd {
        Box::new(zstd::stream::read::Decoder::with_buffer(whole)?)
    } else {
        Box::new(whole)
    })
}
