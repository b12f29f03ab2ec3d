//! Blobs and image names under one folder.
//!
//! ```text
//! DIR/version               format of this folder: `1`
//! DIR/blobs/sha256/HEX      immutable, read-only, named by content
//! DIR/images/HEX.json       {version, name, target}: image name → descriptor; HEX is the SHA-256 of the name
//! DIR/tmp/RANDOM            partial writes, renamed when whole; locked (flock) by the process that writes them
//! ```
//!
//! Everything appears by rename, so a reader sees a whole file or none. Nothing is flushed to disk
//! piece by piece: [`Store::sync`] is the one barrier, and readers of small blobs verify them.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FlockOperation, Mode, OFlags};
use serde::{Deserialize, Serialize};

use crate::digest::Hasher;
use crate::image::{Index, Manifest, media};
use crate::lease::Lease;
use crate::{Descriptor, Digest, Reference};

/// Format of the folder.
const VERSION: u32 = 1;

/// Manifests, indexes and configs are read into memory up to this size (as registries do).
pub const MAX_DOCUMENT: u64 = 16 << 20;

/// What can go wrong in the store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system refused.
    #[error("cannot {action} {}: {source}{}", path.display(), remedy(source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The bytes are not what the name says.
    #[error(
        "blob {expected} is corrupt: its bytes hash to {actual}; get it again (`ovenbird pull` or `ovenbird load` the image, or build it again)"
    )]
    Corrupt {
        /// Name.
        expected: Digest,
        /// Content.
        actual: Digest,
    },
    /// A blob that a crash, a full disk or somebody else cut short.
    #[error("blob {digest} is damaged: {} has {actual} bytes, not {expected}; get it again (`ovenbird pull` or `ovenbird load` the image, or build it again)", path.display())]
    Damaged {
        /// Name.
        digest: Digest,
        /// Its file.
        path: PathBuf,
        /// Bytes it should have.
        expected: u64,
        /// Bytes it has.
        actual: u64,
    },
    /// No such blob.
    #[error("blob {digest} is not in the store; get it again (`ovenbird pull` or `ovenbird load` the image, or build it again)")]
    Missing {
        /// Name.
        digest: Digest,
    },
    /// A file of the store is not in its format.
    #[error("{} is not a file of this store: {reason}", path.display())]
    Format {
        /// Which.
        path: PathBuf,
        /// Why, and what to do.
        reason: String,
    },
    /// Only a name with a tag can be given to an image.
    #[error("{name} has no tag, so it cannot name an image here; write {name}:TAG without the digest")]
    Untagged {
        /// The name.
        name: Reference,
    },
}

/// What a person can do about an I/O error, as the end of a message.
pub(crate) fn remedy(source: &io::Error) -> &'static str {
    use io::ErrorKind as Kind;
    match source.kind() {
        Kind::StorageFull | Kind::QuotaExceeded => "; the disk is full: ovenbird prune",
        Kind::PermissionDenied => "; it belongs to somebody else: choose a folder of your own with --root",
        Kind::ReadOnlyFilesystem => "; choose a folder on a writable file system with --root",
        _ if source.raw_os_error() == Some(rustix::io::Errno::MFILE.raw_os_error()) => "; allow more open files (ulimit -n)",
        _ => "",
    }
}

/// Handle to a store; cheap to clone, safe to use from many threads and processes at once.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
    lease: Option<Arc<Lease>>,
}

/// One file below `images/`.
#[derive(Serialize, Deserialize)]
struct ImageFile {
    version: u32,
    name: Reference,
    target: Descriptor,
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io { action, path, source }
}

impl Store {
    /// Opens or makes a store in `dir`, and removes what dead processes left half written.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let store = Self { dir: dir.to_owned(), lease: None };
        for sub in ["blobs/sha256", "images", "tmp"] {
            let path = dir.join(sub);
            fs::create_dir_all(&path).map_err(io_error("make", &path))?;
        }
        let path = dir.join("version");
        match fs::read(&path) {
            Ok(text) if text.trim_ascii() == VERSION.to_string().as_bytes() => {}
            Ok(text) => {
                let found = String::from_utf8_lossy(&text).trim().to_owned();
                if found.parse::<u32>().is_err() {
                    // No number: a full disk, a kill or a bad disk. Blobs and names show their own damage.
                    store.replace(&path, format!("{VERSION}\n").as_bytes())?;
                    store.remove_leftovers()?;
                    return Ok(store);
                }
                let reason = format!("it says format {found:?} and this program knows {VERSION}; use the newer program or another --root");
                return Err(StoreError::Format { path, reason });
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => store.replace(&path, format!("{VERSION}\n").as_bytes())?,
            Err(source) => return Err(StoreError::Io { action: "read", path, source }),
        }
        store.remove_leftovers()?;
        Ok(store)
    }

    /// The same store; each blob that is asked for or written is first put on the lease, so that nobody prunes it meanwhile.
    #[must_use]
    pub fn with_lease(self, lease: Arc<Lease>) -> Self {
        Self { lease: Some(lease), ..self }
    }

    /// The same store for who prunes: what he looks at is not thereby used.
    #[must_use]
    pub fn without_lease(self) -> Self {
        Self { lease: None, ..self }
    }

    /// The folder it is in.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the blob is or would be. Every look at a blob begins here, so it is on the lease before.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        if let Some(lease) = &self.lease {
            lease.hold(&digest.to_string());
        }
        self.dir.join("blobs/sha256").join(digest.hex())
    }

    /// Is it here? Its bytes are not looked at, but an empty file is none: a crash leaves those. See [`check`](Self::check).
    pub fn has(&self, digest: &Digest) -> bool {
        let whole = |size| size > 0 || *digest == Digest::of(b"");
        fs::metadata(self.blob_path(digest)).is_ok_and(|meta| meta.is_file() && whole(meta.len()))
    }

    /// Is it here, and as long as its descriptor says? Its bytes are not read: that is [`verify`](Self::verify).
    pub fn holds(&self, blob: &Descriptor) -> bool {
        self.check(blob).is_ok()
    }

    /// As [`holds`](Self::holds), and says what is wrong.
    pub fn check(&self, blob: &Descriptor) -> Result<(), StoreError> {
        let (digest, path) = (blob.digest, self.blob_path(&blob.digest));
        match fs::metadata(&path) {
            Ok(meta) if meta.len() == blob.size && meta.is_file() => Ok(()),
            Ok(meta) => Err(StoreError::Damaged { digest, path, expected: blob.size, actual: meta.len() }),
            Err(source) if source.kind() == io::ErrorKind::NotFound => Err(StoreError::Missing { digest }),
            Err(source) => Err(StoreError::Io { action: "read", path, source }),
        }
    }

    /// Opens a blob for reading, unverified.
    pub fn open_blob(&self, digest: &Digest) -> Result<File, StoreError> {
        let path = self.blob_path(digest);
        File::open(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => StoreError::Missing { digest: *digest },
            _ => StoreError::Io { action: "open", path, source },
        })
    }

    /// Reads a small blob (manifest, config; at most [`MAX_DOCUMENT`] bytes) and verifies it.
    pub fn read(&self, digest: &Digest) -> Result<Vec<u8>, StoreError> {
        let path = self.blob_path(digest);
        let mut bytes = Vec::new();
        self.open_blob(digest)?.take(MAX_DOCUMENT + 1).read_to_end(&mut bytes).map_err(io_error("read", &path))?;
        if bytes.len() as u64 > MAX_DOCUMENT {
            let reason = format!("a manifest or config has at most {} MiB", MAX_DOCUMENT >> 20);
            return Err(StoreError::Format { path, reason });
        }
        let actual = Digest::of(&bytes);
        if actual == *digest { Ok(bytes) } else { Err(StoreError::Corrupt { expected: *digest, actual }) }
    }

    /// Stores bytes.
    pub fn write(&self, bytes: &[u8]) -> Result<Digest, StoreError> {
        let digest = Digest::of(bytes);
        // What a crash leaves of a blob that never reached the disk, and what somebody changed, is written anew.
        let same = |path: &Path| {
            fs::metadata(path).is_ok_and(|m| m.is_file() && m.len() == bytes.len() as u64) && fs::read(path).is_ok_and(|b| b == bytes)
        };
        if same(&self.blob_path(&digest)) {
            return Ok(digest);
        }
        self.write_stream(bytes, Some(&digest))?;
        Ok(digest)
    }

    /// Stores a stream; when `expected` is given, other content is refused.
    /// An error of `reader` itself comes back as [`StoreError::Io`] with the action `receive`.
    pub fn write_stream(&self, mut reader: impl Read, expected: Option<&Digest>) -> Result<(Digest, u64), StoreError> {
        let mut partial = self.partial()?;
        let mut buffer = vec![0; 256 * 1024];
        loop {
            match reader.read(&mut buffer) {
                Ok(0) => return partial.commit(expected),
                Ok(n) => partial.append(&buffer[..n])?,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(io_error("receive", &partial.path)(e)),
            }
        }
    }

    /// A partial blob to be written in pieces, then [`Partial::commit`]ted.
    pub fn partial(&self) -> Result<Partial, StoreError> {
        let (file, path) = self.temporary()?;
        Ok(Partial { store: self.clone(), file, path, hasher: Hasher::default(), buffer: Vec::new(), committed: false })
    }

    /// Reads the whole blob and compares; removes it when it is corrupt.
    pub fn verify(&self, digest: &Digest) -> Result<(), StoreError> {
        let (actual, _) = Digest::of_reader(self.open_blob(digest)?).map_err(io_error("read", &self.blob_path(digest)))?;
        if actual == *digest {
            return Ok(());
        }
        self.remove(digest)?;
        Err(StoreError::Corrupt { expected: *digest, actual })
    }

    /// Removes a blob; gone already is fine.
    pub fn remove(&self, digest: &Digest) -> Result<(), StoreError> {
        remove_file(&self.blob_path(digest)).map(|_| ())
    }

    /// All blobs with their sizes, sorted by digest.
    pub fn blobs(&self) -> Result<Vec<(Digest, u64)>, StoreError> {
        let dir = self.dir.join("blobs/sha256");
        let mut blobs = Vec::new();
        for entry in fs::read_dir(&dir).map_err(io_error("list", &dir))? {
            let entry = entry.map_err(io_error("list", &dir))?;
            let Some(digest) = entry.file_name().to_str().and_then(|hex| format!("sha256:{hex}").parse().ok()) else { continue };
            match entry.metadata() {
                Ok(meta) => blobs.push((digest, meta.len())),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(io_error("read", &entry.path())(e)),
            }
        }
        blobs.sort_unstable();
        Ok(blobs)
    }

    /// Names an image (the reference must have a tag; a digest in it is ignored).
    pub fn tag(&self, name: &Reference, target: &Descriptor) -> Result<(), StoreError> {
        let name = plain(name).ok_or_else(|| StoreError::Untagged { name: name.clone() })?;
        let path = self.image_path(&name);
        let json = serde_json::to_vec(&ImageFile { version: VERSION, name, target: target.clone() }).map_err(|e| StoreError::Io {
            action: "write",
            path: path.clone(),
            source: e.into(),
        })?;
        self.replace(&path, &json)
    }

    /// Finds an image by name. With a digest in the name, that very content: under the tag, under another
    /// tag of the repository, or as a manifest or index in the store.
    pub fn resolve(&self, name: &Reference) -> Result<Option<Descriptor>, StoreError> {
        let tagged = match plain(name) {
            Some(name) => self.read_image(&self.image_path(&name))?.map(|image| image.target),
            None => None,
        };
        let Some(digest) = name.digest() else { return Ok(tagged) };
        if let Some(target) = tagged.filter(|t| t.digest == *digest) {
            return Ok(Some(target));
        }
        self.describe(digest)
    }

    /// The descriptor of a manifest or index that is in the store; `None` when it is not there or something else.
    pub fn describe(&self, digest: &Digest) -> Result<Option<Descriptor>, StoreError> {
        let bytes = match self.read(digest) {
            Ok(bytes) => bytes,
            Err(StoreError::Missing { .. } | StoreError::Format { .. }) => return Ok(None),
            Err(e) => return Err(e),
        };
        let media_type = if let Ok(manifest) = serde_json::from_slice::<Manifest>(&bytes) {
            manifest.media_type.unwrap_or_else(|| media::OCI_MANIFEST.into())
        } else {
            match serde_json::from_slice::<Index>(&bytes) {
                Ok(index) if !index.manifests.is_empty() => index.media_type.unwrap_or_else(|| media::OCI_INDEX.into()),
                _ => return Ok(None),
            }
        };
        let size = bytes.len() as u64;
        Ok(Some(Descriptor::new(media_type, *digest, size)))
    }

    /// Removes a name; was it there?
    pub fn untag(&self, name: &Reference) -> Result<bool, StoreError> {
        plain(name).map_or(Ok(false), |name| remove_file(&self.image_path(&name)))
    }

    /// All names, sorted.
    pub fn images(&self) -> Result<Vec<(Reference, Descriptor)>, StoreError> {
        let dir = self.dir.join("images");
        let mut images = Vec::new();
        for entry in fs::read_dir(&dir).map_err(io_error("list", &dir))? {
            let path = entry.map_err(io_error("list", &dir))?.path();
            if path.extension().is_some_and(|e| e == "json") {
                images.extend(self.read_image(&path)?.map(|image| (image.name, image.target)));
            }
        }
        images.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(images)
    }

    /// Waits until everything written so far has reached the disk.
    pub fn sync(&self) -> Result<(), StoreError> {
        let error = io_error("flush", &self.dir);
        File::open(&self.dir).and_then(|dir| rustix::fs::syncfs(&dir).map_err(Into::into)).map_err(error)
    }

    /// File that holds a name; its time is when the name was given.
    pub fn image_path(&self, name: &Reference) -> PathBuf {
        self.dir.join("images").join(format!("{}.json", Digest::of(name.to_string().as_bytes()).hex()))
    }

    fn read_image(&self, path: &Path) -> Result<Option<ImageFile>, StoreError> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(io_error("read", path)(e)),
        };
        match serde_json::from_slice::<ImageFile>(&bytes) {
            Ok(image) if image.version == VERSION && self.image_path(&image.name) == path => Ok(Some(image)),
            Ok(_) => {
                let reason = "it names another image or is of another version; remove it and name the image again".into();
                Err(StoreError::Format { path: path.to_owned(), reason })
            }
            // What a crash leaves of a name that never reached the disk, or a bad disk: as if it had not been given.
            Err(_) => Ok(None),
        }
    }

    /// Puts a small file in place, whole or not at all.
    fn replace(&self, path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
        let (mut file, temporary) = self.temporary()?;
        // Readable like a blob: who else uses the store (root, say, once) must not make it unreadable for its owner.
        let readable = |file: &File| rustix::fs::fchmod(file, Mode::from_raw_mode(0o644)).map_err(io::Error::from);
        let written = file.write_all(bytes).and_then(|()| readable(&file)).and_then(|()| fs::rename(&temporary, path));
        written.map_err(|e| {
            let _ = fs::remove_file(&temporary);
            io_error("write", path)(e)
        })
    }

    /// A new locked file in `tmp/`.
    fn temporary(&self) -> Result<(File, PathBuf), StoreError> {
        loop {
            let mut random = [0; 16];
            let dir = self.dir.join("tmp");
            rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
                .map_err(|e| io_error("name a file in", &dir)(e.into()))?;
            let path = dir.join(format!("{:032x}", u128::from_ne_bytes(random)));
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let fd = match rustix::fs::open(&path, flags, Mode::from_raw_mode(0o600)) {
                Ok(fd) => fd,
                Err(rustix::io::Errno::EXIST) => continue,
                Err(e) => return Err(io_error("make", &path)(e.into())),
            };
            // Between making and locking, another process may have taken the file for a leftover: then make a new one.
            // Where there are no locks, nothing is ever taken for a leftover.
            match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
                Err(rustix::io::Errno::WOULDBLOCK) => {}
                _ if rustix::fs::fstat(&fd).is_ok_and(|s| s.st_nlink == 0) => {}
                _ => return Ok((fd.into(), path)),
            }
        }
    }

    /// Removes the temporary files that nobody holds a lock on.
    fn remove_leftovers(&self) -> Result<(), StoreError> {
        let dir = self.dir.join("tmp");
        for entry in fs::read_dir(&dir).map_err(io_error("list", &dir))? {
            let path = entry.map_err(io_error("list", &dir))?.path();
            // Owned by another user, or gone meanwhile: not ours to remove.
            let Ok(file) = File::open(&path) else { continue };
            if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                remove_file(&path)?;
            }
        }
        Ok(())
    }
}

/// The name with its tag only.
fn plain(name: &Reference) -> Option<Reference> {
    name.tag().map(|tag| name.with_tag(tag))
}

/// Was it there?
fn remove_file(path: &Path) -> Result<bool, StoreError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(io_error("remove", path)(e)),
    }
}

/// A blob being written: hashed on the way, removed when dropped before [`commit`](Self::commit).
#[derive(Debug)]
pub struct Partial {
    store: Store,
    file: File,
    path: PathBuf,
    hasher: Hasher,
    buffer: Vec<u8>,
    committed: bool,
}

/// Small writes are gathered up to this size.
const BUFFER: usize = 256 * 1024;

impl Partial {
    /// Adds bytes.
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.put(bytes).map_err(io_error("write", &self.path))
    }

    /// Bytes written so far.
    pub fn size(&self) -> u64 {
        self.hasher.size()
    }

    /// Where its bytes are until it is committed, and how many are there already.
    pub fn on_disk(&self) -> (&Path, u64) {
        (&self.path, self.size() - self.buffer.len() as u64)
    }

    /// Forgets everything written so far (a transfer that starts again).
    pub fn restart(&mut self) -> Result<(), StoreError> {
        self.buffer.clear();
        self.hasher = Hasher::default();
        let emptied = self.file.set_len(0).and_then(|()| io::Seek::rewind(&mut self.file));
        emptied.map_err(io_error("write", &self.path))
    }

    /// Moves it to its place; with `expected`, other content is refused and removed.
    pub fn commit(mut self, expected: Option<&Digest>) -> Result<(Digest, u64), StoreError> {
        let (actual, size) = std::mem::take(&mut self.hasher).finish();
        if let Some(expected) = expected.filter(|e| **e != actual) {
            return Err(StoreError::Corrupt { expected: *expected, actual });
        }
        let place = self.store.blob_path(&actual);
        self.flush_buffer().map_err(io_error("write", &self.path))?;
        rustix::fs::fchmod(&self.file, Mode::from_raw_mode(0o444)).map_err(|e| io_error("protect", &self.path)(e.into()))?;
        fs::rename(&self.path, &place).map_err(io_error("write", &place))?;
        self.committed = true;
        Ok((actual, size))
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        if self.buffer.len() + bytes.len() > BUFFER {
            self.flush_buffer()?;
        }
        if bytes.len() >= BUFFER {
            return self.file.write_all(bytes);
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    fn flush_buffer(&mut self) -> io::Result<()> {
        self.file.write_all(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }
}

impl Write for Partial {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.put(buf)?;
        Ok(buf.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.committed {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn descriptor(digest: Digest) -> Descriptor {
        Descriptor::new(media::OCI_MANIFEST, digest, 1)
    }

    fn leftovers(store: &Store) -> usize {
        fs::read_dir(store.dir.join("tmp")).unwrap().count()
    }

    #[test]
    fn blobs_live_and_die() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let a = store.write(b"a").unwrap();
        assert_eq!(store.write(b"a").unwrap(), a);
        assert_eq!(store.read(&a).unwrap(), b"a");
        assert_eq!(fs::metadata(store.blob_path(&a)).unwrap().permissions().mode() & 0o7777, 0o444);
        let big = vec![7; 3 * BUFFER + 1];
        let mut partial = store.partial().unwrap();
        partial.append(b"wrong").unwrap();
        partial.restart().unwrap();
        for piece in big.chunks(BUFFER / 3) {
            partial.append(piece).unwrap();
        }
        assert_eq!(partial.size(), big.len() as u64);
        let (b, size) = partial.commit(Some(&Digest::of(&big))).unwrap();
        assert_eq!((b, size), (Digest::of(&big), big.len() as u64));
        store.verify(&b).unwrap();
        let mut listed = vec![(a, 1), (b, size)];
        listed.sort_unstable();
        assert_eq!(store.blobs().unwrap(), listed);
        store.remove(&a).unwrap();
        store.remove(&a).unwrap();
        assert!(matches!(store.read(&a), Err(StoreError::Missing { digest }) if digest == a));
        assert!(!store.has(&a) && store.has(&b));
        assert_eq!(leftovers(&store), 0);
        store.sync().unwrap();
    }

    #[test]
    fn wrong_content_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let wanted = Digest::of(b"wanted");
        assert!(matches!(store.write_stream(&b"other"[..], Some(&wanted)), Err(StoreError::Corrupt { .. })));
        assert_eq!((leftovers(&store), store.blobs().unwrap().len()), (0, 0));
        // As after a crash: the name is there, the bytes are not.
        fs::write(store.blob_path(&wanted), b"").unwrap();
        assert!(matches!(store.read(&wanted), Err(StoreError::Corrupt { .. })));
        assert_eq!(store.write(b"wanted").unwrap(), wanted);
        store.verify(&wanted).unwrap();
        fs::remove_file(store.blob_path(&wanted)).unwrap();
        fs::write(store.blob_path(&wanted), b"wasted").unwrap();
        assert!(matches!(store.verify(&wanted), Err(StoreError::Corrupt { .. })));
        assert!(!store.has(&wanted), "a corrupt blob is removed");
        let blob = |size| Descriptor { size, ..descriptor(wanted) };
        assert!(matches!(store.check(&blob(6)), Err(StoreError::Missing { .. })));
        fs::write(store.blob_path(&wanted), b"").unwrap();
        assert!(!store.has(&wanted), "an empty file is no blob");
        fs::write(store.blob_path(&wanted), b"want").unwrap();
        assert!(matches!(store.check(&blob(6)), Err(StoreError::Damaged { expected: 6, actual: 4, .. })));
        assert!(store.has(&wanted) && !store.holds(&blob(6)) && store.holds(&blob(4)));
        fs::remove_file(store.blob_path(&wanted)).unwrap();
        let nothing = store.write(b"").unwrap();
        assert!(store.has(&nothing));
        fs::create_dir(store.blob_path(&wanted)).unwrap();
        assert!(matches!(store.read(&wanted), Err(StoreError::Io { .. })), "not the same as missing");
    }

    #[test]
    fn names() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let name = |s: &str| s.parse::<Reference>().unwrap();
        let manifest = br#"{"schemaVersion":2,"config":{"mediaType":"c","digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":0}}"#;
        let (one, two) = (store.write(manifest).unwrap(), Digest::of(b"two"));
        assert_eq!(store.resolve(&name("a")).unwrap(), None);
        store.tag(&name("b"), &descriptor(two)).unwrap();
        store.tag(&name("a"), &descriptor(two)).unwrap();
        store.tag(&name("a").with_digest(two), &descriptor(one)).unwrap();
        assert_eq!(store.resolve(&name("docker.io/library/a:latest")).unwrap().unwrap().digest, one);
        assert_eq!(store.images().unwrap(), [(name("a"), descriptor(one)), (name("b"), descriptor(two))]);
        assert_eq!(
            fs::metadata(store.image_path(&name("a"))).unwrap().permissions().mode() & 0o7777,
            0o644,
            "for other users of the store"
        );
        assert_eq!(store.resolve(&name(&format!("c@{one}"))).unwrap().unwrap().size, manifest.len() as u64);
        assert_eq!(store.resolve(&name(&format!("b@{two}"))).unwrap(), None, "a digest without its tag must be in the store");
        assert_eq!(store.resolve(&name(&format!("b:latest@{two}"))).unwrap(), Some(descriptor(two)));
        assert!(matches!(store.tag(&name(&format!("a@{one}")), &descriptor(one)), Err(StoreError::Untagged { .. })));
        assert!(store.untag(&name("a")).unwrap());
        assert!(!store.untag(&name("a")).unwrap());
        for damaged in ["{", "", "\0\0"] {
            fs::write(store.image_path(&name("b")), damaged).unwrap();
            assert_eq!(store.images().unwrap(), [], "{damaged:?}");
        }
        fs::write(store.dir().join("version"), "\u{fffd}").unwrap();
        Store::open(dir.path()).unwrap();
    }

    #[test]
    fn leftovers_of_the_dead_only() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let mut live = store.partial().unwrap();
        live.append(b"live").unwrap();
        fs::write(dir.path().join("tmp/dead"), b"x").unwrap();
        Store::open(dir.path()).unwrap();
        assert_eq!(leftovers(&store), 1);
        live.commit(Some(&Digest::of(b"live"))).unwrap();
        drop(store.partial().unwrap());
        assert_eq!(leftovers(&store), 0);
    }

    #[test]
    fn many_writers() {
        let dir = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for i in 0..50u8 {
                        let store = Store::open(dir.path()).unwrap();
                        let digest = store.write(&[i]).unwrap();
                        store.tag(&"same".parse().unwrap(), &descriptor(digest)).unwrap();
                        assert!(store.resolve(&"same".parse().unwrap()).unwrap().is_some());
                    }
                });
            }
        });
        let store = Store::open(dir.path()).unwrap();
        assert_eq!((store.blobs().unwrap().len(), leftovers(&store)), (50, 0));
    }

    #[test]
    fn other_versions_and_places() {
        let dir = tempfile::tempdir().unwrap();
        Store::open(dir.path()).unwrap();
        fs::write(dir.path().join("version"), "9\n").unwrap();
        assert!(Store::open(dir.path()).unwrap_err().to_string().contains("use the newer program"));
        fs::write(dir.path().join("file"), "").unwrap();
        assert!(matches!(Store::open(&dir.path().join("file/x")), Err(StoreError::Io { action: "make", .. })));
        let full = StoreError::Io { action: "write", path: "/x".into(), source: io::Error::from_raw_os_error(28) };
        assert_eq!(full.to_string(), "cannot write /x: No space left on device (os error 28); the disk is full: ovenbird prune");
    }
}
