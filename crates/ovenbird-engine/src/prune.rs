//! Removing what the state folder remembers, and counting it.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use ovenbird_oci::Digest;
use serde::Serialize;

use crate::cache::{Link, Record};
use crate::state::{State, StateError, io_error, remove_tree, unseal};

/// What to remove.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PruneOptions {
    /// Also images, cache mounts and everything that a name still needs.
    pub all: bool,
    /// Remove oldest first until at most this many bytes are left.
    pub keep_bytes: Option<u64>,
    /// Only what was not used for this long.
    pub filter_until: Option<Duration>,
}

/// What was removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct PruneReport {
    /// Snapshots and blobs.
    pub removed: usize,
    /// Bytes on disk.
    pub bytes: u64,
}

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

/// Counts what the state folder holds; hard links count once.
pub fn disk_usage(state: &State) -> Result<DiskUsage, StateError> {
    let mut seen = BTreeSet::new();
    let mut usage = DiskUsage {
        blobs: size_of(&state.root().join("store/blobs"), &mut seen),
        snapshots: size_of(&state.snapshots_dir(), &mut seen),
        cache_mounts: size_of(&state.mounts_dir(), &mut seen),
        other: 0,
    };
    usage.other = size_of(state.root(), &mut seen);
    Ok(usage)
}

fn size_of(path: &Path, seen: &mut BTreeSet<(u64, u64)>) -> u64 {
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

/// Removes cached results: records first, so that a kill in the middle leaves no record without its files, then what no record, no name and
/// no other build needs. Waits until no build runs.
pub fn prune(state: &State, options: &PruneOptions) -> Result<PruneReport, StateError> {
    let _alone = state.lock_exclusive()?;
    let mut report = PruneReport::default();
    let records = state.records_dir();
    let mut entries: Vec<(SystemTime, std::path::PathBuf, Vec<Link>)> = vec![];
    for entry in fs::read_dir(&records).map_err(io_error("read", &records))?.flatten() {
        let path = entry.path();
        let used = entry.metadata().and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
        let bytes = fs::read(&path).unwrap_or_default();
        let bytes = unseal(&bytes).unwrap_or_default();
        let chain = serde_json::from_slice::<Record>(bytes)
            .map(|record| record.chain)
            .or_else(|_| serde_json::from_slice::<Vec<Link>>(bytes))
            .unwrap_or_default();
        entries.push((used, path, chain));
    }
    entries.sort_by_key(|(used, ..)| *used);
    let young = |used: SystemTime| options.filter_until.is_some_and(|age| used.elapsed().is_ok_and(|elapsed| elapsed < age));
    let mut kept: Vec<Vec<Link>> = vec![];
    let mut entries = entries.into_iter();
    while let Some((used, path, chain)) = entries.next() {
        if young(used) {
            kept.push(chain);
            continue;
        }
        if let Some(budget) = options.keep_bytes
            && disk_usage(state)?.total() <= budget
        {
            kept.push(chain);
            kept.extend(entries.map(|(_, _, chain)| chain));
            break;
        }
        fs::remove_file(&path).map_err(io_error("remove", &path))?;
        if options.keep_bytes.is_some() {
            let rest: Vec<Vec<Link>> = kept.iter().cloned().chain(entries.as_slice().iter().map(|(_, _, chain)| chain.clone())).collect();
            sweep(state, &rest, options.all, &mut report)?;
        }
    }
    sweep(state, &kept, options.all && options.filter_until.is_none() && options.keep_bytes.is_none(), &mut report)?;
    if options.all && options.filter_until.is_none() && options.keep_bytes.is_none() {
        let mounts = state.mounts_dir();
        report.bytes += size_of(&mounts, &mut BTreeSet::new());
        remove_tree(&mounts).and_then(|()| fs::create_dir_all(&mounts)).map_err(io_error("remove", &mounts))?;
    }
    prune_traces(state, options, &young, &mut report)?;
    Ok(report)
}

/// Explanations of builds: those that are old enough, or all when everything goes.
fn prune_traces(
    state: &State,
    options: &PruneOptions,
    young: &dyn Fn(SystemTime) -> bool,
    report: &mut PruneReport,
) -> Result<(), StateError> {
    if options.keep_bytes.is_some() || (options.filter_until.is_none() && !options.all) {
        return Ok(());
    }
    let dir = state.traces_dir();
    for entry in fs::read_dir(&dir).map_err(io_error("read", &dir))?.flatten() {
        let path = entry.path();
        if young(entry.metadata().and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH)) {
            continue;
        }
        report.bytes += size_of(&path, &mut BTreeSet::new());
        report.removed += 1;
        remove_tree(&path).map_err(io_error("remove", &path))?;
    }
    Ok(())
}

/// Removes snapshots that no chain names, and blobs that no image name reaches (with `images`, the names too).
fn sweep(state: &State, kept: &[Vec<Link>], images: bool, report: &mut PruneReport) -> Result<(), StateError> {
    let mut snapshots = BTreeSet::new();
    let mut manifests: Vec<Digest> = vec![];
    for link in kept.iter().flatten() {
        match link {
            Link::Diff { id, .. } => {
                snapshots.insert(id.as_str().to_owned());
            }
            Link::Image { manifest, .. } => manifests.push(*manifest),
        }
    }
    for (name, descriptor) in state.store().images()? {
        if images {
            state.store().untag(&name)?;
        } else {
            manifests.push(descriptor.digest);
        }
    }
    let mut blobs = BTreeSet::new();
    while let Some(digest) = manifests.pop() {
        #[derive(serde::Deserialize)]
        struct Links {
            #[serde(default)]
            manifests: Vec<ovenbird_oci::Descriptor>,
            #[serde(default)]
            layers: Vec<ovenbird_oci::Descriptor>,
            config: Option<ovenbird_oci::Descriptor>,
        }
        #[derive(serde::Deserialize, Default)]
        struct Config {
            #[serde(default)]
            rootfs: ovenbird_oci::image::RootFs,
        }
        if !blobs.insert(digest) {
            continue;
        }
        let Some(links) = state.store().read(&digest).ok().and_then(|bytes| serde_json::from_slice::<Links>(&bytes).ok()) else { continue };
        manifests.extend(links.manifests.iter().map(|m| m.digest));
        blobs.extend(links.layers.iter().map(|layer| layer.digest));
        if let Some(config) = links.config {
            blobs.insert(config.digest);
            let config: Config =
                state.store().read(&config.digest).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
            snapshots.extend(config.rootfs.diff_ids.iter().map(|id| crate::state::SnapshotId::of_layer(id).as_str().to_owned()));
        }
    }
    // A layer packed from a snapshot that stays is worth keeping: the next push needs it.
    for id in &snapshots {
        blobs.extend(state.packed_blobs(id));
    }
    let dir = state.snapshots_dir();
    for entry in fs::read_dir(&dir).map_err(io_error("read", &dir))?.flatten() {
        if entry.file_name().to_str().is_none_or(|name| !snapshots.contains(name)) {
            report.bytes += size_of(&entry.path(), &mut BTreeSet::new());
            report.removed += 1;
            remove_tree(&entry.path()).map_err(io_error("remove", &entry.path()))?;
        }
    }
    for (digest, size) in state.store().blobs()? {
        if !blobs.contains(&digest) {
            report.bytes += size;
            report.removed += 1;
            state.store().remove(&digest)?;
        }
    }
    Ok(())
}
