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

use super::chunks::{Cutter, Depot, Fineness, List, Selector, Wanted};

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

/// Calls `visit` with every entry and its header, in the order of the walk.
fn each(dir: &Path, ignore: Patterns, mut visit: impl FnMut(&Folder, &Visit, &Header) -> Result<(), SendError>) -> Result<(), SendError> {
    let tree = Folder::new(dir, ignore);
    let mut firsts: HashMap<(u64, u64), Vec<u8>> = HashMap::new();
    for entry in tree::walk(&tree, Path::new("")) {
        let entry = entry.map_err(|error| SendError::Read { path: error.path.display().to_string(), source: error.source })?;
        let header = header(&tree, &entry, &mut firsts).map_err(|source| unreadable(&entry.path, source))?;
        if let Some(header) = header {
            visit(&tree, &entry, &header)?;
        }
    }
    Ok(())
}

fn unreadable(path: &Path, source: io::Error) -> SendError {
    SendError::Read { path: path.display().to_string(), source }
}

/// Has a header's entry bytes of its own?
fn body(header: &Header) -> u64 {
    if header.kind == tar::Kind::File { header.size } else { 0 }
}

/// The bytes of a file, exactly as many as its header says.
fn write_body(tree: &Folder, visit: &Visit, header: &Header, out: &mut dyn Write) -> Result<(), SendError> {
    let mut file = tree::open(tree, &visit.path).map_err(|source| unreadable(&visit.path, source))?.take(header.size);
    let copied = copy(&mut file, out, |source| unreadable(&visit.path, source))?;
    if copied < header.size {
        return Err(unreadable(&visit.path, io::Error::other("it became shorter while it was read; build again")));
    }
    Ok(())
}

/// Writes the tar.
pub(crate) fn send(dir: &Path, ignore: Patterns, out: &mut dyn Write) -> Result<(), SendError> {
    let mut head = vec![];
    each(dir, ignore, |tree, visit, header| {
        head.clear();
        tar::encode(header, &mut head);
        out.write_all(&head).map_err(SendError::Pipe)?;
        if body(header) > 0 {
            write_body(tree, visit, header, out)?;
            out.write_all(&[0; tar::BLOCK][..padding(header.size)]).map_err(SendError::Pipe)?;
        }
        Ok(())
    })?;
    out.write_all(&[0; 2 * tar::BLOCK]).and_then(|()| out.flush()).map_err(SendError::Pipe)
}

/// What names a folder's entries: length of the head (4 bytes), of the body (8), the head; all that without bodies, which change less often.
fn send_heads(dir: &Path, ignore: Patterns, out: &mut dyn Write) -> Result<(), SendError> {
    let mut head = vec![];
    each(dir, ignore, |_, _, header| {
        head.clear();
        tar::encode(header, &mut head);
        let length = u32::try_from(head.len()).map_err(|_| SendError::Pipe(io::Error::other("a header without end")))?;
        let lengths = [&length.to_le_bytes()[..], &body(header).to_le_bytes()].concat();
        out.write_all(&lengths).and_then(|()| out.write_all(&head)).map_err(SendError::Pipe)
    })
}

fn send_bodies(dir: &Path, ignore: Patterns, out: &mut dyn Write) -> Result<(), SendError> {
    each(dir, ignore, |tree, visit, header| {
        if body(header) == 0 {
            return Ok(());
        }
        write_body(tree, visit, header, out)?;
        // Between files is a good place to cut: contents that repeat themselves have few.
        out.flush().map_err(SendError::Pipe)
    })
}

/// A folder as chunks: those of its heads, then those of its bodies.
pub(crate) struct Offer {
    list: List,
    heads: usize,
}

impl Offer {
    /// Reads the folder.
    pub(crate) fn of(dir: &Path, ignore: &Patterns) -> Result<Self, SendError> {
        let mut bytes = 0;
        each(dir, ignore.clone(), |_, _, header| {
            bytes += body(header);
            Ok(())
        })?;
        let mut cutter = Cutter::new(Fineness::of(bytes));
        send_heads(dir, ignore.clone(), &mut cutter)?;
        let heads = cutter.cut();
        send_bodies(dir, ignore.clone(), &mut cutter)?;
        Ok(Self { list: cutter.finish(), heads })
    }

    /// Bytes of everything.
    pub(crate) fn bytes(&self) -> u64 {
        self.list.bytes()
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        [(self.heads as u64).to_le_bytes().to_vec(), self.list.to_bytes()].concat()
    }

    /// Reads foreign bytes.
    fn parse(bytes: &[u8]) -> io::Result<Self> {
        let wrong = || io::Error::new(io::ErrorKind::InvalidData, "an offer that is none");
        let (heads, list) = bytes.split_first_chunk::<8>().ok_or_else(wrong)?;
        let list = List::parse(list)?;
        let heads = usize::try_from(u64::from_le_bytes(*heads)).ok().filter(|heads| *heads <= list.len()).ok_or_else(wrong)?;
        Ok(Self { list, heads })
    }

    /// Writes the chunks that are wanted. Only what is needed of the folder is read again.
    pub(crate) fn send(&self, dir: &Path, ignore: &Patterns, wanted: &Wanted, out: &mut dyn Write) -> Result<(), SendError> {
        let changed = || unreadable(Path::new("the folder"), io::Error::other("it changed while it was read; build again"));
        if wanted.any(0..self.heads) {
            let mut selector = Selector::new(&self.list, wanted, 0, &mut *out);
            send_heads(dir, ignore.clone(), &mut selector)?;
            if !selector.is_at(self.heads) {
                return Err(changed());
            }
        }
        if wanted.any(self.heads..self.list.len()) {
            let mut selector = Selector::new(&self.list, wanted, self.heads, &mut *out);
            send_bodies(dir, ignore.clone(), &mut selector)?;
            if !selector.is_at(self.list.len()) {
                return Err(changed());
            }
        }
        out.flush().map_err(SendError::Pipe)
    }
}

/// Most bytes of an offer: chunks of more than a hundred gigabytes.
const MAX_OFFER: u64 = 128 << 20;

/// Most bytes of the list of an offer's chunks.
pub(crate) const MAX_TOP: u64 = 8 << 20;

/// Takes an offered folder into an empty one, from what is in the depot; `fetch` gets into it what is wanted of a list.
pub(crate) fn take(
    depot: &mut Depot,
    top: &[u8],
    mut fetch: impl FnMut(&mut Depot, &List, &Wanted) -> io::Result<()>,
    into: &Path,
) -> Result<(std::path::PathBuf, Owners), LayerError> {
    let mut offered = || -> io::Result<Offer> {
        let top = List::parse(top)?;
        if top.bytes() > MAX_OFFER {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the folder is too large"));
        }
        let wanted = depot.missing(&top)?;
        fetch(depot, &top, &wanted)?;
        let mut bytes = vec![];
        depot.reader(&top).read_to_end(&mut bytes)?;
        let offer = Offer::parse(&bytes)?;
        let wanted = depot.missing(&offer.list)?;
        fetch(depot, &offer.list, &wanted)?;
        Ok(offer)
    };
    let offer = offered().map_err(|source| LayerError::Malformed { reason: source.to_string() })?;
    let (heads, bodies) = offer.list.split(offer.heads);
    receive(Joined { heads: depot.reader(&heads), bodies: depot.reader(&bodies), part: Part::Between }, into)
}

/// Heads and bodies as the tar that they are of.
struct Joined<H, B> {
    heads: H,
    bodies: B,
    part: Part,
}

/// What comes next.
enum Part {
    Between,
    Head { rest: io::Cursor<Vec<u8>>, body: u64 },
    Body { left: u64, padding: usize },
    Zeros { left: usize, last: bool },
    End,
}

/// Longest head: a name, a link and attributes as long as the kernel has them.
const MAX_HEAD: usize = 1 << 20;

impl<H: Read, B: Read> Joined<H, B> {
    fn next(&mut self) -> io::Result<Part> {
        let mut lengths = [0; 12];
        let mut filled = 0;
        while filled < lengths.len() {
            match self.heads.read(&mut lengths[filled..])? {
                0 if filled == 0 => return Ok(Part::Zeros { left: 2 * tar::BLOCK, last: true }),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => filled += read,
            }
        }
        let [a, b, c, d, body @ ..] = lengths;
        let head = u32::from_le_bytes([a, b, c, d]) as usize;
        if head == 0 || head > MAX_HEAD {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a head that is none"));
        }
        let mut bytes = vec![0; head];
        self.heads.read_exact(&mut bytes)?;
        Ok(Part::Head { rest: io::Cursor::new(bytes), body: u64::from_le_bytes(body) })
    }
}

impl<H: Read, B: Read> Read for Joined<H, B> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        loop {
            let read = match &mut self.part {
                Part::Head { rest, .. } => rest.read(buffer)?,
                Part::Between | Part::Body { left: 0, .. } | Part::Zeros { left: 0, .. } => 0,
                Part::Body { left, .. } => {
                    let most = usize::try_from(*left).unwrap_or(usize::MAX).min(buffer.len());
                    let read = self.bodies.read(&mut buffer[..most])?;
                    if read == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    *left -= read as u64;
                    read
                }
                Part::Zeros { left, .. } => {
                    let most = (*left).min(buffer.len());
                    buffer[..most].fill(0);
                    *left -= most;
                    most
                }
                Part::End => return Ok(0),
            };
            if read > 0 {
                return Ok(read);
            }
            self.part = match &self.part {
                Part::Head { body: 0, .. } => Part::Between,
                Part::Head { body, .. } => Part::Body { left: *body, padding: padding(*body) },
                Part::Body { padding, .. } => Part::Zeros { left: *padding, last: false },
                Part::Between | Part::Zeros { last: false, .. } => self.next()?,
                Part::Zeros { last: true, .. } | Part::End => Part::End,
            };
        }
    }
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
        return Err(LayerError::Malformed { reason: format!("{:?} is outside of the folder that was sent", name.to_string_lossy()) });
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

    use super::super::chunks::cut;
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
        // The same in chunks.
        let (depot, again) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (tree, _) = offered(from.path(), depot.path(), again.path()).1;
        fs::File::open(from.path()).unwrap().set_modified(fs::metadata(&tree).unwrap().modified().unwrap()).unwrap();
        assert_eq!(listed(&tree), listed(from.path()));
    }

    /// Bytes that were sent, and what arrived.
    fn offered(from: &Path, depot: &Path, into: &Path) -> (usize, (std::path::PathBuf, Owners)) {
        let offer = Offer::of(from, &Patterns::default()).unwrap();
        let offered = offer.to_bytes();
        let top = cut(&offered);
        let (mut asked, mut sent) = (0, top.to_bytes().len());
        let mut depot = Depot::open(depot).unwrap();
        let took = take(
            &mut depot,
            &top.to_bytes(),
            |depot, list, wanted| {
                let mut bytes = vec![];
                if asked == 0 {
                    Selector::new(&top, wanted, 0, &mut bytes).write_all(&offered)?;
                } else {
                    offer.send(from, &Patterns::default(), wanted, &mut bytes).map_err(io::Error::other)?;
                }
                asked += 1;
                sent += bytes.len();
                depot.fill(list, wanted, &mut bytes.as_slice())
            },
            into,
        );
        (sent, took.unwrap())
    }

    #[test]
    fn one_file_of_ten_thousand() {
        let (from, depot, room) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for number in 0..10_000 {
            let dir = from.path().join((number / 100).to_string());
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join(number.to_string()), format!("{number:08}\n").repeat(40 + number % 300)).unwrap();
        }
        let bytes = Offer::of(from.path(), &Patterns::default()).unwrap().bytes() as usize;
        let sent = |name: &str| {
            let into = room.path().join(name);
            fs::create_dir(&into).unwrap();
            let (sent, (tree, _)) = offered(from.path(), depot.path(), &into);
            assert_eq!(fs::read(tree.join("77/7777")).unwrap(), fs::read(from.path().join("77/7777")).unwrap());
            sent
        };
        assert!(sent("first") >= bytes);
        fs::write(from.path().join("77/7777"), "changed").unwrap();
        let second = sent("second");
        assert!(second * 100 < bytes, "{second} of {bytes}");
        assert!(sent("third") < 4096);
    }
}
