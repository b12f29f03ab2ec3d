//! A folder through a pipe: a tar of what its ignore file leaves, and back.
//!
//! Names, kinds, permissions, times (whole seconds, as layers have them), links, devices and the attributes that images know arrive as they
//! are. Owners are 0:0: that is what a build makes of every file of a context. All stands below one folder in the tar, so that the
//! folder itself has its permissions, too.

use std::collections::{BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::io::{self, Read, Write};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::Path;

use ovenbird_dockerfile::ignore::Patterns;
use ovenbird_engine::snapshot::folder::Folder;
use ovenbird_engine::snapshot::tree::{self, Kind, Tree, Visit};
use ovenbird_oci::layer::tar::{self, Header, padding};
use ovenbird_oci::layer::{self, LayerError, Owners, Ownership};

/// The one folder in the tar.
const TOP: &[u8] = b"tree";

/// Why a folder could not be sent.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    /// It cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Path in it.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The other end takes no more.
    #[error(transparent)]
    Pipe(io::Error),
}

/// Writes the tar.
pub(crate) fn send(dir: &Path, ignore: Patterns, out: &mut dyn Write) -> Result<(), SendError> {
    let tree = Folder::new(dir, ignore);
    let mut firsts: HashMap<(u64, u64), Vec<u8>> = HashMap::new();
    let mut head = vec![];
    for visit in tree::walk(&tree, Path::new("")) {
        let visit = visit.map_err(|error| SendError::Read { path: error.path.display().to_string(), source: error.source })?;
        let unreadable = |source| SendError::Read { path: visit.path.display().to_string(), source };
        let Some(header) = header(&tree, &visit, &mut firsts).map_err(unreadable)? else { continue };
        head.clear();
        tar::encode(&header, &mut head);
        out.write_all(&head).map_err(SendError::Pipe)?;
        if header.kind == tar::Kind::File && header.size > 0 {
            let mut file = tree::open(&tree, &visit.path).map_err(unreadable)?.take(header.size);
            let copied = copy(&mut file, out, unreadable)?;
            if copied < header.size {
                let source = io::Error::other("it became shorter while it was read; build again");
                return Err(SendError::Read { path: visit.path.display().to_string(), source });
            }
            out.write_all(&[0; tar::BLOCK][..padding(header.size)]).map_err(SendError::Pipe)?;
        }
    }
    out.write_all(&[0; 2 * tar::BLOCK]).and_then(|()| out.flush()).map_err(SendError::Pipe)
}

fn copy(from: &mut dyn Read, out: &mut dyn Write, unreadable: impl Fn(io::Error) -> SendError) -> Result<u64, SendError> {
    let mut buffer = vec![0; 128 << 10];
    let mut copied = 0;
    loop {
        let read = match from.read(&mut buffer) {
            Ok(0) => return Ok(copied),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(unreadable(error)),
        };
        out.write_all(&buffer[..read]).map_err(SendError::Pipe)?;
        copied += read as u64;
    }
}

/// `None`: it was removed meanwhile.
fn header(tree: &dyn Tree, visit: &Visit, firsts: &mut HashMap<(u64, u64), Vec<u8>>) -> io::Result<Option<Header>> {
    let Visit { path, entry, .. } = visit;
    let mut name = TOP.to_vec();
    if !path.as_os_str().is_empty() {
        name.push(b'/');
        name.extend_from_slice(path.as_os_str().as_bytes());
    }
    let (device, inode, names) = entry.inode;
    if !entry.is_dir() && names > 1 {
        if let Some(first) = firsts.get(&(device, inode)) {
            let mut header = Header::new(name, tar::Kind::Link);
            header.link.clone_from(first);
            return Ok(Some(header));
        }
        firsts.insert((device, inode), name.clone());
    }
    let mut header = Header::new(name, tar::Kind::File);
    (header.mode, header.mtime) = (entry.mode, entry.mtime.0);
    let Some(location) = tree.locate(path)? else { return Ok(None) };
    match entry.kind {
        Kind::File => header.size = entry.size,
        Kind::Dir => {
            header.kind = tar::Kind::Directory;
            header.path.push(b'/');
        }
        Kind::Symlink => {
            header.kind = tar::Kind::Symlink;
            header.link = location.read_link()?.into_os_string().into_vec();
        }
        Kind::Char(major, minor) => (header.kind, header.device) = (tar::Kind::Char, (major, minor)),
        Kind::Block(major, minor) => (header.kind, header.device) = (tar::Kind::Block, (major, minor)),
        Kind::Fifo => header.kind = tar::Kind::Fifo,
        // A copy makes an empty file of it, and tar has no type for it.
        Kind::Socket => {}
    }
    header.xattrs = location.xattrs()?.into_iter().map(|(name, value)| (name.into_vec(), value)).collect();
    Ok(Some(header))
}

/// Reads the tar into an empty folder; where the tree is then, and what the disk cannot hold.
pub(crate) fn receive(from: impl Read, into: &Path) -> Result<(std::path::PathBuf, Owners), LayerError> {
    let names = || -> io::Result<BTreeSet<OsString>> { std::fs::read_dir(into)?.map(|entry| Ok(entry?.file_name())).collect() };
    let unreadable = |error: io::Error| LayerError::Malformed { reason: format!("the folder it went to cannot be read: {error}") };
    let before = names().map_err(unreadable)?;
    let ownership = if rustix::process::geteuid().is_root() { Ownership::Real } else { Ownership::Recorded };
    let owners = layer::extract(from, into, ownership)?;
    let top = OsStr::from_bytes(TOP);
    if let Some(name) = names().map_err(unreadable)?.difference(&before).find(|name| *name != top) {
        return Err(LayerError::Malformed { reason: format!("{name:?} is outside of the folder that was sent") });
    }
    let tree = into.join(top);
    if tree.symlink_metadata().is_ok_and(|meta| meta.is_dir()) {
        return Ok((tree, owners));
    }
    Err(LayerError::Malformed { reason: "the folder itself is missing".into() })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

    use super::*;

    /// Everything that an image has of a tree.
    fn listed(dir: &Path) -> Vec<String> {
        let tree = Folder::new(dir, Patterns::default());
        let mut firsts = HashMap::new();
        tree::walk(&tree, Path::new(""))
            .filter_map(|visit| header(&tree, &visit.unwrap(), &mut firsts).unwrap())
            .map(|header| format!("{header:?}"))
            .collect()
    }

    #[test]
    fn what_arrives_is_what_was_sent() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let at = |name: &str| from.path().join(name);
        fs::create_dir(at("deep")).unwrap();
        fs::write(at("deep/big"), vec![7; 300_000]).unwrap();
        fs::write(at("run"), "x").unwrap();
        fs::write(at("ignored"), "x").unwrap();
        fs::hard_link(at("run"), at("same")).unwrap();
        symlink("../out", at("link")).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, at("pipe"), rustix::fs::FileType::Fifo, 0o640.into(), 0).unwrap();
        fs::set_permissions(at("run"), fs::Permissions::from_mode(0o4751)).unwrap();
        fs::set_permissions(at("deep"), fs::Permissions::from_mode(0o1770)).unwrap();
        fs::set_permissions(from.path(), fs::Permissions::from_mode(0o750)).unwrap();
        let attributed = rustix::fs::setxattr(at("run"), "user.note", b"n", rustix::fs::XattrFlags::empty()).is_ok();
        let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
        for name in ["deep/big", "run", "deep"] {
            fs::File::open(at(name)).unwrap().set_modified(old).unwrap();
        }
        let mut sent = vec![];
        send(from.path(), Patterns::parse("ignored").unwrap(), &mut sent).unwrap();
        let (tree, _) = receive(sent.as_slice(), to.path()).unwrap();
        fs::remove_file(at("ignored")).unwrap();
        fs::File::open(from.path()).unwrap().set_modified(fs::metadata(&tree).unwrap().modified().unwrap()).unwrap();
        assert_eq!(listed(&tree), listed(from.path()));
        assert_eq!(fs::metadata(tree.join("run")).unwrap().ino(), fs::metadata(tree.join("same")).unwrap().ino());
        assert_eq!(listed(&tree).iter().any(|entry| entry.contains("117, 115, 101, 114")), attributed);
        // Nothing is dropped silently: what is beside the folder is refused.
        let mut beside = vec![];
        tar::encode(&Header::new(b"other".to_vec(), tar::Kind::File), &mut beside);
        beside.extend_from_slice(&sent);
        let error = receive(beside.as_slice(), tempfile::tempdir().unwrap().path()).unwrap_err();
        assert!(error.to_string().contains("\"other\" is outside of the folder"), "{error}");
        for cut in [0, 511, 700, sent.len() / 2] {
            assert!(receive(&sent[..cut], tempfile::tempdir().unwrap().path()).is_err(), "{cut}");
        }
    }
}
