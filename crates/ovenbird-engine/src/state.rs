//! The state folder: everything Ovenbird remembers on this machine.
//!
//! ```text
//! ROOT/version                     format of this tree
//! ROOT/lock                        the gate of the leases (ovenbird_oci::lease): held alone while prune chooses
//! ROOT/store/…                     blobs and image names (ovenbird_oci::store)
//! ROOT/origins/HEX                 where a base layer that was never fetched can be had
//! ROOT/leak-key                    keys the marks in `searched`
//! ROOT/contexts.stat               hashes of context files by inode
//! ROOT/.ovenbird-partial-…/        an image on its way out of a Docker Engine (ovenbird_oci::beside)
//! ROOT/chunks/pack-…               parts of contexts that callers sent (worker::chunks of the product)
//! ROOT/slots/N                     locked by the worker that has this slot
//! ROOT/IDS/snapshots/ID/fs         diff folder of one step or one base layer
//! ROOT/IDS/snapshots/ID/owners     intended owners, when the disk cannot hold them
//! ROOT/IDS/snapshots/ID/packed-*   the layer it was packed into
//! ROOT/IDS/snapshots/ID/searched   marks of the secrets that are not in it
//! ROOT/IDS/cache/HEX               cache key → chain of snapshots
//! ROOT/IDS/traces/HEX              what the last build of a Dockerfile was made of, for explanations
//! ROOT/IDS/mounts/HEX/             `RUN --mount=type=cache` folders
//! ROOT/IDS/tmp/ID/                 one running process' work; removed when its owner is dead
//! ROOT/IDS/tmp/ID.lock             locked while that process lives; its lease: the names of what it uses, which prune leaves
//! ```
//!
//! `IDS` says how owners are kept on disk (`real`, `mapped`, `recorded`, `traced`): trees made at one isolation
//! level are of no use at another. Invariant: everything below `snapshots` and `cache` is complete and
//! immutable; it is made below `tmp` and renamed. A process killed at any moment leaves only `tmp`.
//! Small files that a result depends on are sealed: they begin with the SHA-256 of what follows, and a damaged one
//! counts as missing. Every path to something that prune removes is made by a function that first puts its name on the lease.

use std::collections::{BTreeSet, HashSet};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

pub use ovenbird_oci::layer::remove_tree;
use ovenbird_oci::layer::{Owner, Owners, Ownership, Packed};
use ovenbird_oci::lease::{self, Alone, Lease};
use ovenbird_oci::store::{Store, StoreError};
use ovenbird_oci::{Digest, Reference};
use ovenbird_sandbox::Level;
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::snapshot::LayerDir;

const VERSION: &str = "1\n";
/// How exactly it is remembered when a record was last used.
const TOUCH: std::time::Duration = std::time::Duration::from_mins(1);

/// What can go wrong in the state folder.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
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
    /// Made by another version of Ovenbird.
    #[error("{} has format {found:?}, this Ovenbird reads format \"1\": use another --root or remove the folder", path.display())]
    Version {
        /// The state folder.
        path: PathBuf,
        /// What it says.
        found: String,
    },
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ": the disk is full; `ovenbird prune` removes cached steps",
        io::ErrorKind::PermissionDenied => "; it belongs to somebody else: choose a folder of your own with --root or OVENBIRD_ROOT",
        io::ErrorKind::ReadOnlyFilesystem => "; choose a folder on a writable file system with --root or OVENBIRD_ROOT",
        io::ErrorKind::NotADirectory | io::ErrorKind::AlreadyExists => "; choose another folder with --root or OVENBIRD_ROOT",
        _ => "",
    }
}

pub(crate) fn io_error<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> StateError + 'a {
    move |source| StateError::Io { action, path: path.to_owned(), source }
}

/// Name of a snapshot folder.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SnapshotId(String);

impl SnapshotId {
    /// The folder of a base layer, named by its content.
    pub fn of_layer(diff_id: &Digest) -> Self {
        Self(format!("layer-{}", diff_id.hex()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn is_safe(&self) -> bool {
        !self.0.is_empty() && self.0.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    }
}

/// An open state folder. What was used through it stays while it lives, in whatever process something is pruned.
#[derive(Debug)]
pub struct State {
    root: PathBuf,
    /// Device and inode of `root`.
    inode: (u64, u64),
    ids: PathBuf,
    /// Trees of this and of lower levels, whose files this process may remove.
    trees: Vec<Ids>,
    ownership: Ownership,
    // Dropped before the lease, whose lock says that it is not a leftover.
    build: Work,
    store: Store,
    lease: Arc<Lease>,
}

/// What one way of keeping owners has of the state folder: `ROOT/IDS`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ids(PathBuf);

impl Ids {
    /// Is a path in it?
    pub fn contains(&self, path: &Path) -> bool {
        path.starts_with(&self.0)
    }

    /// Folder that holds the snapshots.
    pub fn snapshots(&self) -> PathBuf {
        self.0.join("snapshots")
    }

    /// Folder that holds the cache records.
    pub fn records(&self) -> PathBuf {
        self.0.join("cache")
    }

    /// Folder that holds the traces.
    pub fn traces(&self) -> PathBuf {
        self.0.join("traces")
    }

    /// Folder that holds the cache mounts.
    pub fn mounts(&self) -> PathBuf {
        self.0.join("mounts")
    }
}

/// Names of all [`Ids`].
const IDS: [&str; 4] = ["real", "mapped", "recorded", "traced"];

/// This process' own temporary folder, made when something first needs it; removed with all it holds on drop.
#[derive(Debug)]
struct Work {
    dir: PathBuf,
    next: AtomicU64,
    /// Its lock file could be made: without one nobody would remove the folder after a kill.
    locked: bool,
    made: OnceLock<()>,
}

impl Work {
    /// The folder, which is there.
    fn made(&self) -> Result<&Path, StateError> {
        if self.made.get().is_none() {
            let made =
                if self.locked { fs::create_dir_all(&self.dir) } else { Err(io::Error::from_raw_os_error(Errno::NOSPC.raw_os_error())) };
            made.map_err(io_error("make", &self.dir))?;
            let _ = self.made.set(());
        }
        Ok(&self.dir)
    }

    /// A name in it that was not given before.
    fn next(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let _ = remove_tree(&self.dir);
        // Still locked: nobody takes it for a leftover meanwhile.
        let _ = fs::remove_file(self.dir.with_extension("lock"));
    }
}

impl State {
    /// Opens or makes the state folder for an isolation level and clears what dead processes left.
    pub fn open(root: &Path, level: Option<Level>) -> Result<Self, StateError> {
        fs::create_dir_all(root).map_err(io_error("make", root))?;
        let root = root.canonicalize().map_err(io_error("open", root))?;
        check_version(&root)?;
        let (name, ownership) = match level {
            Some(Level::Root | Level::Chroot) => ("real", Ownership::Real),
            Some(Level::Rootless) => ("mapped", Ownership::Real),
            Some(Level::Traced) => ("traced", Ownership::Unprivileged),
            Some(Level::SingleId) | None => ("recorded", Ownership::Recorded),
        };
        let ids = root.join(name);
        for dir in ["snapshots", "cache", "traces", "mounts", "tmp"] {
            let dir = ids.join(dir);
            fs::create_dir_all(&dir).map_err(io_error("make", &dir))?;
        }
        let origins = root.join("origins");
        fs::create_dir_all(&origins).map_err(io_error("make", &origins))?;
        // Whoever has the ids of a level can remove what a level with fewer of them made, if it is his.
        let own = IDS.iter().position(|tree| *tree == name).unwrap_or(IDS.len());
        let user = rustix::process::geteuid().as_raw();
        let is_ours = |tree: &Ids| fs::metadata(&tree.0).is_ok_and(|meta| meta.is_dir() && (name == IDS[0] || meta.uid() == user));
        let trees: Vec<Ids> = IDS.iter().skip(own).map(|tree| Ids(root.join(tree))).filter(is_ours).collect();
        for tree in &trees {
            clear_leftovers(&tree.0.join("tmp"));
        }
        let (build, file) = open_work(&ids.join("tmp"))?;
        let gate = root.join("lock");
        let lease = Arc::new(Lease::new(file, &gate).map_err(io_error("open", &gate))?);
        let store = Store::open(&root.join("store"))?.with_lease(lease.clone());
        let meta = root.metadata().map_err(io_error("read", &root))?;
        Ok(Self { inode: (meta.dev(), meta.ino()), root, ids, trees, store, ownership, lease, build })
    }

    /// The blob store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// How owners are put on disk.
    pub fn ownership(&self) -> Ownership {
        self.ownership
    }

    /// The state folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Device and inode of the state folder.
    pub fn root_inode(&self) -> (u64, u64) {
        self.inode
    }

    /// File with hashes of context files.
    pub fn stat_cache(&self) -> PathBuf {
        self.root.join("contexts.stat")
    }

    /// Folder for files that are on their way to somewhere else in the state folder; it ends with this process.
    pub fn temporary(&self) -> &Path {
        // Who writes to it is told when it could not be made.
        self.build.made().unwrap_or(&self.build.dir)
    }

    /// This process' temporary folder and its lease, whether they are there or not.
    pub fn own_files(&self) -> [PathBuf; 2] {
        [self.build.dir.clone(), self.build.dir.with_extension("lock")]
    }

    /// A new empty folder that lives as long as this process wants it.
    pub fn work_dir(&self) -> Result<WorkDir, StateError> {
        let dir = self.build.made()?.join(self.build.next().to_string());
        fs::create_dir(&dir).map_err(io_error("make", &dir))?;
        Ok(WorkDir { dir })
    }

    /// Moves a finished diff folder (`work/fs`) into place. With a fixed `id` an existing one wins.
    pub fn commit(&self, work: WorkDir, id: Option<SnapshotId>, owners: &Owners) -> Result<SnapshotId, StateError> {
        let id = id.unwrap_or_else(|| SnapshotId(unique_name()));
        if !owners.is_empty() {
            let rows: Vec<(&std::ffi::OsString, &Owner)> = owners.iter().collect();
            let path = work.path().join("owners");
            fs::write(&path, seal(&serde_json::to_vec(&rows).unwrap_or_default())).map_err(io_error("write", &path))?;
        }
        let place = self.snapshot_dir(&id);
        match fs::rename(work.path(), &place) {
            Ok(()) => {
                std::mem::forget(work);
                return Ok(id);
            }
            // Somebody else was first: the content is the same by construction.
            Err(_) if self.has_snapshot(&id) => return Ok(id),
            Err(source) if !place.exists() => return Err(StateError::Io { action: "make", path: place, source }),
            Err(_) => {}
        }
        // What is there is damaged: it makes room.
        let aside = self.work_dir()?;
        let _ = fs::rename(&place, aside.path().join("damaged"));
        match fs::rename(work.path(), &place) {
            Ok(()) => std::mem::forget(work),
            Err(_) if self.has_snapshot(&id) => {}
            Err(source) => return Err(StateError::Io { action: "make", path: place, source }),
        }
        Ok(id)
    }

    /// Opens a snapshot's diff folder; `None` when it is gone.
    pub fn layer_dir(&self, id: &SnapshotId) -> Result<Option<LayerDir>, StateError> {
        let base = self.snapshot_dir(id);
        let dir = base.join("fs");
        if !id.is_safe() || !dir.is_dir() {
            return Ok(None);
        }
        let path = base.join("owners");
        let owners = match fs::read(&path) {
            Ok(bytes) => {
                let rows = unseal(&bytes).and_then(|bytes| serde_json::from_slice::<Vec<(std::ffi::OsString, Owner)>>(bytes).ok());
                let Some(rows) = rows else { return Ok(None) };
                rows.into_iter().collect()
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Owners::new(),
            Err(source) => return Err(StateError::Io { action: "read", path, source }),
        };
        Ok(Some(LayerDir::new(dir, owners)))
    }

    /// Is the snapshot there, with an undamaged table of owners?
    pub fn has_snapshot(&self, id: &SnapshotId) -> bool {
        let base = self.snapshot_dir(id);
        if !id.is_safe() || !base.join("fs").is_dir() {
            return false;
        }
        match fs::read(base.join("owners")) {
            Ok(bytes) => unseal(&bytes).is_some(),
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        }
    }

    /// The layer a snapshot was packed into before, with the same options (`variant`).
    pub fn packed(&self, id: &SnapshotId, variant: &str) -> Option<Packed> {
        let bytes = fs::read(self.snapshot_dir(id).join(format!("packed-{variant}"))).ok()?;
        let packed: Packed = serde_json::from_slice(unseal(&bytes)?).ok()?;
        // One that was cut short is packed again.
        let blob = self.store.blob_path(&packed.digest);
        fs::metadata(blob).is_ok_and(|meta| meta.len() == packed.size).then_some(packed)
    }

    /// Remembers a packed layer.
    pub fn set_packed(&self, id: &SnapshotId, variant: &str, packed: &Packed) -> Result<(), StateError> {
        let bytes = seal(&serde_json::to_vec(packed).unwrap_or_default());
        self.write_atomically(&self.snapshot_dir(id).join(format!("packed-{variant}")), &bytes)
    }

    /// Marks of the secrets that a snapshot was searched for, and does not hold.
    pub fn searched(&self, id: &SnapshotId) -> BTreeSet<String> {
        fs::read(self.snapshot_dir(id).join("searched")).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default()
    }

    /// Remembers them.
    pub fn set_searched(&self, id: &SnapshotId, marks: &BTreeSet<String>) -> Result<(), StateError> {
        self.write_atomically(&self.snapshot_dir(id).join("searched"), &serde_json::to_vec(marks).unwrap_or_default())
    }

    /// Key of those marks: random, of this state folder, readable by its owner alone.
    pub fn leak_key(&self) -> Result<[u8; 32], StateError> {
        let path = self.root.join("leak-key");
        if let Ok(Ok(key)) = fs::read(&path).map(<[u8; 32]>::try_from) {
            return Ok(key);
        }
        let key = random::<32>();
        self.write_atomically_as(&path, &key, 0o600)?;
        Ok(key)
    }

    /// Reads a cache record.
    pub fn read_record(&self, name: &str) -> Option<Vec<u8>> {
        let bytes = fs::read(self.ids.join("cache").join(name)).ok()?;
        unseal(&bytes).map(<[u8]>::to_vec)
    }

    /// Says that a cache record was of use; what was not for long is pruned first.
    pub fn touch_record(&self, name: &str) {
        let path = self.ids.join("cache").join(name);
        // A time in the future is from a clock that was set back.
        let old = |time: std::time::SystemTime| time.elapsed().map_or(true, |age| age > TOUCH);
        // Not worth a write more often, and a disk that cannot be written is no reason to fail.
        if fs::metadata(&path).and_then(|meta| meta.modified()).is_ok_and(old) {
            let now = rustix::fs::Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW };
            let times = rustix::fs::Timestamps { last_access: now, last_modification: now };
            let _ = rustix::fs::utimensat(rustix::fs::CWD, &path, &times, rustix::fs::AtFlags::empty());
        }
    }

    /// Writes a cache record.
    pub fn write_record(&self, name: &str, bytes: &[u8]) -> Result<(), StateError> {
        self.write_atomically(&self.ids.join("cache").join(name), &seal(bytes))
    }

    /// Folder that holds the traces.
    pub fn traces_dir(&self) -> PathBuf {
        self.ids.join("traces")
    }

    /// Writes a trace.
    pub fn write_trace(&self, name: &str, bytes: &[u8]) -> Result<(), StateError> {
        self.write_atomically(&self.traces_dir().join(name), bytes)
    }

    /// Says where a blob that is not in the store can be had.
    pub fn set_origin(&self, blob: &Digest, origin: &Reference) -> Result<(), StateError> {
        let path = self.origin_file(blob);
        let bytes = seal(origin.to_string().as_bytes());
        if fs::read(&path).is_ok_and(|old| old == bytes) {
            return Ok(());
        }
        self.write_atomically(&path, &bytes)
    }

    /// A blob cannot be had where it was said to be.
    pub fn forget_origin(&self, blob: &Digest) -> Result<(), StateError> {
        let path = self.origin_file(blob);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", &path)(error)),
            _ => Ok(()),
        }
    }

    /// Folder that holds the origins.
    pub fn origins_dir(&self) -> PathBuf {
        self.root.join("origins")
    }

    /// Where a blob can be had.
    pub fn origin(&self, blob: &Digest) -> Option<Reference> {
        let bytes = fs::read(self.origin_file(blob)).ok()?;
        std::str::from_utf8(unseal(&bytes)?).ok()?.parse().ok()
    }

    /// Waits until nobody is about to use something new, and keeps it so until the guard is dropped. Meanwhile nothing of this may be used
    /// that puts names on the lease: see [`State::unleased`].
    pub fn alone(&self) -> Result<Alone, StateError> {
        self.lease.alone().map_err(io_error("lock", &self.root.join("lock")))
    }

    /// Names on the leases of all processes that live: what they use, of snapshots, blobs (as digests) and cache mounts. To be asked [`alone`](Self::alone).
    pub fn leased(&self) -> Result<HashSet<String>, StateError> {
        let mut all = HashSet::new();
        for tree in self.all_trees() {
            for entry in fs::read_dir(tree.0.join("tmp")).into_iter().flatten().flatten() {
                let path = entry.path();
                if path.extension().is_some_and(|extension| extension == "lock") {
                    all.extend(lease::names(&path).map_err(io_error("read", &path))?.into_iter().flatten());
                }
            }
        }
        Ok(all)
    }

    /// The blob store for who prunes: nothing that is asked for is put on the lease.
    pub fn unleased(&self) -> Store {
        self.store.clone().without_lease()
    }

    /// What this level and those with fewer ids have here: all that this process may remove.
    pub fn trees(&self) -> &[Ids] {
        &self.trees
    }

    /// What every level has here.
    pub fn all_trees(&self) -> impl Iterator<Item = Ids> {
        IDS.iter().map(|tree| Ids(self.root.join(tree)))
    }

    /// Blobs that the snapshot in a folder was packed into, in any variant.
    pub fn packed_blobs(snapshot: &Path) -> Vec<Digest> {
        let Ok(entries) = fs::read_dir(snapshot) else { return vec![] };
        entries
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with("packed-"))
            .filter_map(|entry| serde_json::from_slice::<Packed>(unseal(&fs::read(entry.path()).ok()?)?).ok())
            .map(|packed| packed.digest)
            .collect()
    }

    /// Folder of a cache mount.
    pub fn mount_dir(&self, name: &Digest) -> PathBuf {
        self.lease.hold(&name.hex());
        self.ids.join("mounts").join(name.hex())
    }

    fn snapshot_dir(&self, id: &SnapshotId) -> PathBuf {
        self.lease.hold(id.as_str());
        self.ids.join("snapshots").join(id.as_str())
    }

    fn origin_file(&self, blob: &Digest) -> PathBuf {
        self.lease.hold(&blob.to_string());
        self.origins_dir().join(blob.hex())
    }

    fn write_atomically(&self, path: &Path, bytes: &[u8]) -> Result<(), StateError> {
        self.write_atomically_as(path, bytes, 0o666)
    }

    fn write_atomically_as(&self, path: &Path, bytes: &[u8], mode: u32) -> Result<(), StateError> {
        let temporary = self.build.made()?.join(format!("file-{}", self.build.next()));
        let file = File::options().write(true).create_new(true).mode(mode).open(&temporary);
        file.and_then(|mut file| file.write_all(bytes)).map_err(io_error("write", &temporary))?;
        fs::rename(&temporary, path).map_err(io_error("write", path))
    }
}

/// A folder below the build's temporary one; removed on drop unless it was committed.
#[derive(Debug)]
pub struct WorkDir {
    dir: PathBuf,
}

impl WorkDir {
    /// Where.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Makes and returns a folder in it, mode 0755 whatever the umask: it may become the root of a step.
    pub fn subdir(&self, name: &str) -> Result<PathBuf, StateError> {
        use std::os::unix::fs::PermissionsExt;
        let dir = self.dir.join(name);
        fs::create_dir(&dir).map_err(io_error("make", &dir))?;
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).map_err(io_error("make", &dir))?;
        Ok(dir)
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        let _ = remove_tree(&self.dir);
    }
}

fn check_version(root: &Path) -> Result<(), StateError> {
    let path = root.join("version");
    match fs::read(&path) {
        Ok(text) if text == VERSION.as_bytes() => Ok(()),
        Ok(text) => match std::str::from_utf8(&text).map(|text| (text.trim(), text.trim().parse::<u32>())) {
            Ok((found, Ok(_))) => Err(StateError::Version { path: root.to_owned(), found: found.to_owned() }),
            // No number: a full disk, a kill or a bad disk. Whatever else is damaged shows when it is read.
            _ => fs::write(&path, VERSION).map_err(io_error("write", &path)),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => fs::write(&path, VERSION).map_err(io_error("write", &path)),
        Err(source) => Err(StateError::Io { action: "read", path, source }),
    }
}

/// The bytes with their SHA-256 before them.
fn seal(bytes: &[u8]) -> Vec<u8> {
    [Digest::of(bytes).hex().as_bytes(), b"\n", bytes].concat()
}

/// What was sealed; `None` when it was damaged.
pub(crate) fn unseal(bytes: &[u8]) -> Option<&[u8]> {
    let (seal, rest) = bytes.split_at_checked(65)?;
    (seal[64] == b'\n' && Digest::of(rest).hex().as_bytes() == &seal[..64]).then_some(rest)
}

/// Removes the temporary folders whose lock nobody holds.
fn clear_leftovers(tmp: &Path) {
    for entry in fs::read_dir(tmp).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(stem) = name.to_str().and_then(|n| n.strip_suffix(".lock")) else { continue };
        let Ok(lock) = lease::open(&entry.path(), File::options().write(true)) else { continue };
        if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            let _ = remove_tree(&tmp.join(stem));
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// A name for this process' temporary folder, and its locked file. On a full disk there is none: who prunes needs none.
fn open_work(tmp: &Path) -> Result<(Work, Option<File>), StateError> {
    loop {
        let name = unique_name();
        let lock_path = tmp.join(format!("{name}.lock"));
        let work = |locked| Work { dir: tmp.join(&name), next: AtomicU64::new(0), locked, made: OnceLock::new() };
        let lock = match File::options().write(true).create_new(true).open(&lock_path) {
            Err(error) if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
                return Ok((work(false), None));
            }
            opened => opened.map_err(io_error("open", &lock_path))?,
        };
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).map_err(io::Error::from).map_err(io_error("lock", &lock_path))?;
        // Between open and lock another process may have taken it for a leftover and removed it.
        if lock_path.exists() {
            return Ok((work(true), Some(lock)));
        }
    }
}

fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    if rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).is_err() {
        let _ = File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes));
    }
    bytes
}

fn unique_name() -> String {
    let bytes = random::<12>();
    Digest::from_bytes({
        let mut whole = [0; 32];
        whole[..12].copy_from_slice(&bytes);
        whole
    })
    .hex()[..24]
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commit_survives_and_leftovers_go() {
        let root = tempfile::tempdir().unwrap();
        let state = State::open(root.path(), Some(Level::Root)).unwrap();
        let work = state.work_dir().unwrap();
        fs::write(work.subdir("fs").unwrap().join("a"), "x").unwrap();
        let owners = Owners::from([("a".into(), Owner { uid: 5, gid: 6, node: None })]);
        let id = state.commit(work, None, &owners).unwrap();
        let layer = state.layer_dir(&id).unwrap().unwrap();
        assert_eq!(layer.owners, owners);
        assert_eq!(fs::read_to_string(layer.dir.join("a")).unwrap(), "x");
        let mine = state.build.dir.clone();
        // What a killed process leaves: a folder whose lock nobody holds.
        let dead = root.path().join("real/tmp/dead");
        fs::create_dir_all(dead.join("work")).unwrap();
        fs::write(root.path().join("real/tmp/dead.lock"), "").unwrap();
        let second = State::open(root.path(), Some(Level::Root)).unwrap();
        assert!(!dead.exists() && mine.exists() && second.has_snapshot(&id));
        drop(state);
        assert!(!mine.exists());
    }

    #[test]
    fn leftovers_of_other_levels_go() {
        let root = tempfile::tempdir().unwrap();
        let left = || {
            let names = fs::read_dir(root.path().join("recorded/tmp")).unwrap().map(|entry| entry.unwrap().file_name());
            names.collect::<Vec<_>>()
        };
        drop(State::open(root.path(), Some(Level::SingleId)).unwrap());
        assert!(left().is_empty(), "an end in order leaves nothing: {:?}", left());
        for (level, gone) in [(Level::Root, true), (Level::Rootless, true), (Level::SingleId, true)] {
            fs::create_dir_all(root.path().join("recorded/tmp/dead/work")).unwrap();
            fs::write(root.path().join("recorded/tmp/dead.lock"), "").unwrap();
            let running = State::open(root.path(), Some(Level::SingleId)).unwrap();
            fs::create_dir_all(root.path().join("recorded/tmp/dead2/work")).unwrap();
            fs::write(root.path().join("recorded/tmp/dead2.lock"), "").unwrap();
            drop(State::open(root.path(), Some(level)).unwrap());
            assert_eq!(left().len() == 1, gone, "{level:?}: {:?}", left());
            assert!(running.build.dir.with_extension("lock").exists());
        }
    }

    #[test]
    fn damaged_files_count_as_missing() {
        let root = tempfile::tempdir().unwrap();
        let state = State::open(root.path(), None).unwrap();
        let owners = Owners::from([("a".into(), Owner { uid: 5, gid: 6, node: None })]);
        let commit = || {
            let work = state.work_dir().unwrap();
            work.subdir("fs").unwrap();
            state.commit(work, Some(SnapshotId("layer-1".into())), &owners).unwrap()
        };
        let id = commit();
        state.write_record("r", b"record").unwrap();
        state.set_origin(&Digest::of(b""), &"r.example/a:1".parse().unwrap()).unwrap();
        assert!(state.has_snapshot(&id) && state.read_record("r").is_some() && state.origin(&Digest::of(b"")).is_some());
        let snapshot = root.path().join("recorded/snapshots/layer-1");
        for file in [snapshot.join("owners"), root.path().join("recorded/cache/r"), state.origins_dir().join(Digest::of(b"").hex())] {
            let whole = fs::read(&file).unwrap();
            for at in [0, 64, 66] {
                let mut bytes = whole.clone();
                bytes[at] ^= 1;
                fs::write(&file, &bytes).unwrap();
                let intact = [state.has_snapshot(&id), state.read_record("r").is_some(), state.origin(&Digest::of(b"")).is_some()];
                assert_eq!(intact.iter().filter(|whole| !**whole).count(), 1, "{} byte {at}", file.display());
            }
            fs::write(&file, whole).unwrap();
        }
        // Made again, it takes the place of the damaged one.
        fs::write(snapshot.join("owners"), "[").unwrap();
        assert!(!state.has_snapshot(&id) && state.layer_dir(&id).unwrap().is_none());
        commit();
        assert_eq!(state.layer_dir(&id).unwrap().unwrap().owners, owners);
    }

    #[test]
    fn other_versions_are_refused() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("version"), "99\n").unwrap();
        let error = State::open(root.path(), None).unwrap_err();
        assert!(matches!(&error, StateError::Version { found, .. } if found == "99"), "{error}");
        for damaged in [&b""[..], b"\0\0", b"\xb1\n", b"q\n"] {
            fs::write(root.path().join("version"), damaged).unwrap();
            State::open(root.path(), None).unwrap();
            assert_eq!(fs::read_to_string(root.path().join("version")).unwrap(), VERSION);
        }
    }

    #[test]
    fn what_is_used_is_on_the_lease_of_who_lives() {
        let root = tempfile::tempdir().unwrap();
        let used = State::open(root.path(), Some(Level::Root)).unwrap();
        let pruner = State::open(root.path(), None).unwrap();
        let leased = || {
            let _alone = pruner.alone().unwrap();
            let mut names: Vec<String> = pruner.leased().unwrap().into_iter().collect();
            names.sort();
            names
        };
        assert!(leased().is_empty());
        let digest = |text: &str| Digest::of(text.as_bytes());
        used.has_snapshot(&SnapshotId("looked-at".into()));
        used.commit(used.work_dir().unwrap(), Some(SnapshotId("made".into())), &Owners::new()).unwrap();
        used.mount_dir(&digest("mount"));
        used.origin(&digest("origin"));
        used.store().has(&digest("blob"));
        used.store().clone().write(b"written").unwrap();
        let blobs = ["origin", "blob", "written"].map(|text| digest(text).to_string());
        let mut expect: Vec<String> = ["looked-at".into(), "made".into(), digest("mount").hex()].into_iter().chain(blobs).collect();
        expect.sort();
        assert_eq!(leased(), expect);
        {
            let _alone = pruner.alone().unwrap();
            pruner.unleased().has(&digest("by the pruner"));
        }
        assert_eq!(leased(), expect);
        drop(used);
        assert!(leased().is_empty());
    }

    #[test]
    fn names_that_leave_the_folder_are_not_snapshots() {
        let root = tempfile::tempdir().unwrap();
        let state = State::open(root.path(), None).unwrap();
        fs::create_dir_all(root.path().join("fs")).unwrap();
        assert!(!state.has_snapshot(&SnapshotId("../..".into())));
    }
}
