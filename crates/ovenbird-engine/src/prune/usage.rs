//! How much the state folder holds, and of what.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::Serialize;

use super::item::{Item, Keeps};
use super::{CacheKind, entries};
use crate::cache::Link;
use crate::state::{State, StateError};

/// Bytes on disk, as `du` counts them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct DiskUsage {
    /// Blobs.
    pub blobs: u64,
    /// Diff folders.
    pub snapshots: u64,
    /// `RUN --mount=type=cache`.
    pub cache_mounts: u64,
    /// Records, names, temporary files.
    pub other: u64,
}

impl DiskUsage {
    /// Everything.
    pub fn total(&self) -> u64 {
        self.blobs + self.snapshots + self.cache_mounts + self.other
    }
}

/// One thing that a build made, and that prune can take by its id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CacheEntry {
    /// Its name.
    pub id: String,
    /// What it is.
    #[serde(rename = "type")]
    pub kind: CacheKind,
    /// Bytes on disk.
    pub size: u64,
    /// Seconds since 1970.
    pub last_used: u64,
    /// A process that lives uses it.
    pub in_use: bool,
}

/// Counts what the state folder holds; hard links count once.
pub fn disk_usage(state: &State) -> Result<DiskUsage, StateError> {
    Ok(measure(state)?.usage)
}

/// The results of steps and the cache mounts, those last used longest ago first.
pub fn cache_entries(state: &State) -> Result<Vec<CacheEntry>, StateError> {
    let sizes = measure(state)?.sizes;
    let (items, leased) = {
        let _alone = state.alone()?;
        (super::item::cached(state, &sizes)?, state.leased()?)
    };
    let mut found: HashMap<PathBuf, CacheEntry> = HashMap::new();
    for item in &items {
        let (kind, path, id) = match &item.keeps {
            Keeps::Record { snapshots, chain, .. } => match chain.last().map(|link| &**link) {
                Some(Link::Diff { id, .. }) => (CacheKind::Regular, snapshots.join(id.as_str()), id.as_str().to_owned()),
                Some(Link::Shared(layer)) => {
                    let id = layer.snapshot();
                    (CacheKind::Regular, snapshots.join(id.as_str()), id.as_str().to_owned())
                }
                // It takes no space of its own.
                _ => continue,
            },
            Keeps::Mount(path) => (CacheKind::CacheMount, path.clone(), item.ids().next().unwrap_or_default()),
            Keeps::Name(..) => continue,
        };
        let Some(size) = sizes.get(&path).copied() else { continue };
        let last_used = item.used.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let entry = CacheEntry { id, kind, size, last_used, in_use: Item::is_leased(item, &leased) };
        // A result is filed under more than one key.
        let known = found.entry(path).or_insert_with(|| entry.clone());
        known.last_used = known.last_used.max(entry.last_used);
    }
    let mut found: Vec<CacheEntry> = found.into_values().collect();
    found.sort_by(|a, b| (a.last_used, &a.id).cmp(&(b.last_used, &b.id)));
    Ok(found)
}

/// Sizes of everything.
pub(super) struct Measured {
    pub(super) usage: DiskUsage,
    /// Of each blob, diff folder and cache mount, by path.
    pub(super) sizes: HashMap<PathBuf, u64>,
}

pub(super) fn measure(state: &State) -> Result<Measured, StateError> {
    let mut seen = BTreeSet::new();
    // What this process has here for itself goes when it ends.
    for own in state.own_files() {
        size_of(&own, &mut seen);
    }
    let mut sizes = HashMap::new();
    let mut each = |dir: &Path| -> Result<u64, StateError> {
        let mut sum = 0;
        for path in entries(dir)? {
            let size = size_of(&path, &mut seen);
            sum += size;
            sizes.insert(path, size);
        }
        Ok(sum + size_of(dir, &mut seen))
    };
    let blobs = state.root().join("store/blobs");
    let mut usage = DiskUsage { blobs: each(&blobs.join("sha256"))?, ..DiskUsage::default() };
    for tree in state.all_trees() {
        usage.snapshots += each(&tree.snapshots())?;
        usage.cache_mounts += each(&tree.mounts())?;
    }
    usage.blobs += size_of(&blobs, &mut seen);
    usage.other = size_of(state.root(), &mut seen);
    Ok(Measured { usage, sizes })
}

/// Bytes on disk below a path; what was `seen` already, as device and inode, counts nothing. What vanishes meanwhile neither.
pub(super) fn size_of(path: &Path, seen: &mut BTreeSet<(u64, u64)>) -> u64 {
    let mut total = 0;
    let mut open = vec![path.to_owned()];
    while let Some(path) = open.pop() {
        let Ok(meta) = fs::symlink_metadata(&path) else { continue };
        if !seen.insert((meta.dev(), meta.ino())) {
            continue;
        }
        total += meta.blocks() * 512;
        if meta.is_dir() {
            open.extend(fs::read_dir(&path).into_iter().flatten().flatten().map(|entry| entry.path()));
        }
    }
    total
}
