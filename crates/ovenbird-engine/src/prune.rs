//! Removing what the state folder remembers, and counting it.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use ovenbird_oci::{Digest, Reference};
use serde::Serialize;

use crate::cache::{Link, Record};
use crate::state::{Ids, SnapshotId, State, StateError, io_error, remove_tree, unseal};

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
    let blobs = size_of(&state.root().join("store/blobs"), &mut seen);
    let mut usage = DiskUsage { blobs, ..DiskUsage::default() };
    for tree in state.all_trees() {
        usage.snapshots += size_of(&tree.snapshots(), &mut seen);
        usage.cache_mounts += size_of(&tree.mounts(), &mut seen);
    }
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

/// Something that keeps snapshots and blobs, and goes by age.
struct Item {
    used: SystemTime,
    keeps: Keeps,
    /// What it takes itself.
    own: u64,
}

enum Keeps {
    /// A cache record: where it is, and what it says of the snapshots in a folder.
    Record { path: PathBuf, snapshots: PathBuf, chain: Vec<Link> },
    /// A name of an image.
    Name(Reference, Digest),
    /// The folder of a cache mount.
    Mount(PathBuf),
}

/// Removes what was not used for the longest time, until the rest is within the budget: cache records, with `all` also names of images and
/// cache mounts; then what nothing that stays needs. It is about every isolation level whose files this process may remove. Records go before their files, so that a kill in the middle leaves no record without
/// them. Waits until no build runs, and builds wait for it.
pub fn prune(state: &State, options: &PruneOptions) -> Result<PruneReport, StateError> {
    let _alone = state.lock_exclusive()?;
    let mut report = PruneReport::default();
    let mut items = vec![];
    for tree in state.trees() {
        items.extend(records(tree)?);
    }
    let mut fixed: Vec<Item> = vec![];
    let names = names(state)?;
    if options.all {
        items.extend(names.into_iter().chain(state.trees().iter().flat_map(mounts)));
    } else {
        fixed.extend(names);
    }
    let young = |used: SystemTime| options.filter_until.is_some_and(|age| used.elapsed().is_ok_and(|elapsed| elapsed < age));
    let (old, kept): (Vec<_>, Vec<_>) = items.into_iter().partition(|item| !young(item.used));
    fixed.extend(kept);
    let mut items = old;
    items.sort_by_key(|item| item.used);
    let mut wanted = options.keep_bytes;
    loop {
        let gone = match wanted {
            None => items.len(),
            Some(budget) => surplus(state, &items, &fixed, budget)?,
        };
        for item in items.drain(..gone) {
            remove(state, &item, &mut report)?;
        }
        let stay = needed(state, items.iter().chain(&fixed), &mut HashMap::new());
        sweep(state, &stay, &mut report)?;
        // What several need makes the sum of the sizes an estimate.
        let over = options.keep_bytes.map(|budget| disk_usage(state).map(|usage| usage.total().saturating_sub(budget))).transpose()?;
        match over {
            Some(over) if over > 0 && !items.is_empty() => wanted = wanted.map(|budget| budget.saturating_sub(over)),
            _ => break,
        }
    }
    prune_traces(state, options, &young, &mut report)?;
    Ok(report)
}

fn records(tree: &Ids) -> Result<Vec<Item>, StateError> {
    let items = entries(&tree.records())?.map(|path| {
        let bytes = fs::read(&path).unwrap_or_default();
        let bytes = unseal(&bytes).unwrap_or_default();
        let chain = serde_json::from_slice::<Record>(bytes)
            .map(|record| record.chain)
            .or_else(|_| serde_json::from_slice::<Vec<Link>>(bytes))
            .unwrap_or_default();
        Item {
            used: changed(&path),
            own: size_of(&path, &mut BTreeSet::new()),
            keeps: Keeps::Record { path, snapshots: tree.snapshots(), chain },
        }
    });
    Ok(items.collect())
}

fn names(state: &State) -> Result<Vec<Item>, StateError> {
    let names = state.store().images()?.into_iter().map(|(name, descriptor)| {
        let path = state.store().image_path(&name);
        Item { used: changed(&path), own: size_of(&path, &mut BTreeSet::new()), keeps: Keeps::Name(name, descriptor.digest) }
    });
    Ok(names.collect())
}

fn mounts(tree: &Ids) -> Vec<Item> {
    let entries = fs::read_dir(tree.mounts()).into_iter().flatten().flatten();
    let items = entries.map(|entry| {
        let path = entry.path();
        let below = fs::read_dir(&path).into_iter().flatten().flatten().map(|entry| changed(&entry.path()));
        let used = below.max().unwrap_or(SystemTime::UNIX_EPOCH).max(changed(&path));
        Item { used, own: size_of(&path, &mut BTreeSet::new()), keeps: Keeps::Mount(path) }
    });
    items.collect()
}

fn changed(path: &Path) -> SystemTime {
    fs::symlink_metadata(path).and_then(|meta| meta.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
}

fn remove(state: &State, item: &Item, report: &mut PruneReport) -> Result<(), StateError> {
    match &item.keeps {
        Keeps::Record { path, .. } => fs::remove_file(path).map_err(io_error("remove", path))?,
        Keeps::Name(name, _) => drop(state.store().untag(name)?),
        Keeps::Mount(path) => {
            report.removed += 1;
            remove_tree(path).map_err(io_error("remove", path))?;
        }
    }
    report.bytes += item.own;
    Ok(())
}

/// How many of the oldest items must go so that the rest is within the budget.
fn surplus(state: &State, items: &[Item], fixed: &[Item], budget: u64) -> Result<usize, StateError> {
    let mut seen = BTreeSet::new();
    let mut sizes: HashMap<Stored, u64> = HashMap::new();
    for snapshot in snapshots(state)? {
        let size = size_of(&snapshot, &mut seen);
        sizes.insert(Stored::Snapshot(snapshot), size);
    }
    for (digest, _) in state.store().blobs()? {
        sizes.insert(Stored::Blob(digest), size_of(&state.store().blob_path(&digest), &mut seen));
    }
    let total = disk_usage(state)?.total();
    let stored: u64 = sizes.values().sum();
    let other = total.saturating_sub(stored).saturating_sub(items.iter().map(|item| item.own).sum());
    let mut known = HashMap::new();
    // What stays only shrinks with the number that goes.
    let (mut low, mut high) = (0, items.len());
    while low < high {
        let middle = usize::midpoint(low, high);
        let stay = needed(state, items[middle..].iter().chain(fixed), &mut known);
        let left: u64 = stay.iter().filter_map(|stored| sizes.get(stored)).sum();
        if other + left + items[middle..].iter().map(|item| item.own).sum::<u64>() <= budget {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    Ok(if total <= budget { 0 } else { low })
}

/// Folders of all snapshots.
fn snapshots(state: &State) -> Result<Vec<PathBuf>, StateError> {
    let mut all = vec![];
    for dir in state.trees().iter().map(Ids::snapshots) {
        all.extend(entries(&dir)?);
    }
    Ok(all)
}

/// Paths of what is in a folder; one that is not there is empty.
fn entries(dir: &Path) -> Result<impl Iterator<Item = PathBuf> + use<>, StateError> {
    let found = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        found => Some(found.map_err(io_error("read", dir))?),
    };
    Ok(found.into_iter().flatten().flatten().map(|entry| entry.path()))
}

/// What takes space.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Stored {
    Snapshot(PathBuf),
    Blob(Digest),
}

/// What a manifest or index names: blobs and snapshots, and documents of the same kind.
#[derive(Default)]
struct Names {
    stored: Vec<Stored>,
    below: Vec<Digest>,
}

/// Everything that the items need.
fn needed<'a>(state: &State, items: impl Iterator<Item = &'a Item>, known: &mut HashMap<Digest, Names>) -> BTreeSet<Stored> {
    let mut stay = BTreeSet::new();
    let mut manifests: Vec<Digest> = vec![];
    for item in items {
        match &item.keeps {
            Keeps::Record { snapshots, chain, .. } => {
                for link in chain {
                    match link {
                        Link::Diff { id, .. } => drop(stay.insert(Stored::Snapshot(snapshots.join(id.as_str())))),
                        Link::Image { manifest, .. } => manifests.push(*manifest),
                    }
                }
            }
            Keeps::Name(_, digest) => manifests.push(*digest),
            Keeps::Mount(_) => {}
        }
    }
    while let Some(digest) = manifests.pop() {
        if stay.insert(Stored::Blob(digest)) {
            let names = known.entry(digest).or_insert_with(|| names_of(state, &digest));
            stay.extend(names.stored.iter().cloned());
            manifests.extend(&names.below);
        }
    }
    // A layer packed from a snapshot that stays is worth keeping: the next push needs it.
    let packed: Vec<Stored> = stay
        .iter()
        .filter_map(|stored| if let Stored::Snapshot(dir) = stored { Some(State::packed_blobs(dir)) } else { None })
        .flatten()
        .map(Stored::Blob)
        .collect();
    stay.extend(packed);
    stay
}

fn names_of(state: &State, digest: &Digest) -> Names {
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
    let read = state.store().read(digest).ok().and_then(|bytes| serde_json::from_slice::<Links>(&bytes).ok());
    let Some(links) = read else { return Names::default() };
    let mut stored: Vec<Stored> = links.layers.iter().map(|layer| Stored::Blob(layer.digest)).collect();
    if let Some(config) = links.config {
        stored.push(Stored::Blob(config.digest));
        let config: Config =
            state.store().read(&config.digest).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        for tree in state.trees() {
            let ids = config.rootfs.diff_ids.iter().map(SnapshotId::of_layer);
            stored.extend(ids.map(|id| Stored::Snapshot(tree.snapshots().join(id.as_str()))));
        }
    }
    Names { stored, below: links.manifests.iter().map(|m| m.digest).collect() }
}

/// Removes every snapshot and blob that does not stay.
fn sweep(state: &State, stay: &BTreeSet<Stored>, report: &mut PruneReport) -> Result<(), StateError> {
    for snapshot in snapshots(state)? {
        let stored = Stored::Snapshot(snapshot);
        if let (false, Stored::Snapshot(snapshot)) = (stay.contains(&stored), &stored) {
            report.bytes += size_of(snapshot, &mut BTreeSet::new());
            report.removed += 1;
            remove_tree(snapshot).map_err(io_error("remove", snapshot))?;
        }
    }
    for (digest, size) in state.store().blobs()? {
        if !stay.contains(&Stored::Blob(digest)) {
            report.bytes += size;
            report.removed += 1;
            state.store().remove(&digest)?;
        }
    }
    let dir = state.origins_dir();
    for entry in fs::read_dir(&dir).map_err(io_error("read", &dir))?.flatten() {
        let digest = entry.file_name().to_str().and_then(|hex| format!("sha256:{hex}").parse().ok());
        if digest.is_none_or(|digest| !stay.contains(&Stored::Blob(digest))) {
            fs::remove_file(entry.path()).map_err(io_error("remove", &entry.path()))?;
        }
    }
    Ok(())
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
    for tree in state.trees() {
        for path in entries(&tree.traces())?.filter(|path| !young(changed(path))) {
            report.bytes += size_of(&path, &mut BTreeSet::new());
            report.removed += 1;
            remove_tree(&path).map_err(io_error("remove", &path))?;
        }
    }
    Ok(())
}
