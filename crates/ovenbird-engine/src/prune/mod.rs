//! Removing what the state folder remembers, and counting it.
//!
//! A prune goes on beside builds. What takes long (sizes, removing) is done while they run; in between, for a moment, nobody may begin to use
//! anything (see [`ovenbird_oci::lease`]): then it is chosen what goes, nothing of it on a live lease, and moved out of sight.

mod item;
mod usage;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use ovenbird_oci::store::Store;
use serde::Serialize;

use crate::state::{Ids, State, StateError, WorkDir, io_error, remove_tree};
use item::{Item, Keeps, Needs, Stored, changed};
pub use usage::{CacheEntry, DiskUsage, cache_entries, disk_usage};
use usage::{Measured, measure, size_of};

/// What a part of the cache is, by the names that BuildKit has for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum CacheKind {
    /// What a step made.
    #[serde(rename = "regular")]
    Regular,
    /// `RUN --mount=type=cache`.
    #[serde(rename = "exec.cachemount")]
    CacheMount,
    /// Hashes of the files of build contexts.
    #[serde(rename = "source.local")]
    SourceLocal,
}

impl CacheKind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Regular, Self::CacheMount, Self::SourceLocal];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Regular => "regular",
            Self::CacheMount => "exec.cachemount",
            Self::SourceLocal => "source.local",
        }
    }
}

/// How much is to be left. What was used last stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Budget {
    /// So much may stay in any case.
    pub reserved: Option<u64>,
    /// No more than this stays, but for what is reserved.
    pub max_used: Option<u64>,
    /// So much of the disk is to be free, if what is reserved allows it.
    pub min_free: Option<u64>,
}

impl Budget {
    /// Bytes that may stay of `total` on a disk with `free` bytes; `None`: nothing was asked for.
    fn keep(&self, total: u64, free: u64) -> Option<u64> {
        let for_free = self.min_free.map(|wanted| total.saturating_sub(wanted.saturating_sub(free)));
        let most = self.max_used.into_iter().chain(for_free).min();
        self.reserved.into_iter().chain(most).max()
    }
}

/// What to remove.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PruneOptions {
    /// Also images, cache mounts and everything that a name still needs.
    pub all: bool,
    /// Remove oldest first until no more is left than this allows.
    pub budget: Budget,
    /// Only what was not used for this long.
    pub filter_until: Option<Duration>,
    /// Only parts of these kinds; empty: no matter which.
    pub kinds: BTreeSet<CacheKind>,
    /// Only what has an id that begins so; empty: no matter which.
    pub ids: Vec<String>,
}

impl PruneOptions {
    fn is_filtered(&self) -> bool {
        !self.kinds.is_empty() || !self.ids.is_empty()
    }

    /// Was it asked for this item, as far as it is not young?
    fn wants(&self, item: &Item) -> bool {
        let of_kind = match &item.keeps {
            Keeps::Record { .. } => self.kinds.is_empty() || self.kinds.contains(&CacheKind::Regular),
            // Who asks for them by kind or by id means them.
            Keeps::Mount(_) if self.kinds.is_empty() => self.all || !self.ids.is_empty(),
            Keeps::Mount(_) => self.kinds.contains(&CacheKind::CacheMount),
            Keeps::Name(..) => self.all && !self.is_filtered(),
        };
        of_kind && (self.ids.is_empty() || item.ids().any(|id| self.ids.iter().any(|start| id.starts_with(start.as_str()))))
    }

    fn is_young(&self, used: SystemTime) -> bool {
        self.filter_until.is_some_and(|age| used.elapsed().map_or(true, |elapsed| elapsed < age))
    }
}

/// What was removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct PruneReport {
    /// Snapshots, blobs, cache mounts and explanations.
    pub removed: usize,
    /// Bytes on disk.
    pub bytes: u64,
    /// Cached results, names and cache mounts that would have gone if no process used them.
    pub in_use: usize,
}

/// Removes what was not used for the longest time, until the rest is within the budget: cache records, with `all` also names of images and
/// cache mounts; then what nothing that stays needs. It is about every isolation level whose files this process may remove. What a process
/// that lives has found or made stays.
pub fn prune(state: &State, options: &PruneOptions) -> Result<PruneReport, StateError> {
    let mut report = PruneReport::default();
    let mut budget = None;
    loop {
        let before = if options.budget == Budget::default() { None } else { Some(measure(state)?) };
        if let Some(Measured { usage, .. }) = &before {
            let total = usage.total();
            match budget {
                None => budget = options.budget.keep(total, free_space(state)?).map(|keep| (keep, keep)),
                // What several need makes the sum of the sizes an estimate.
                Some((keep, _)) if total <= keep => break,
                Some((keep, wanted)) => budget = Some((keep, wanted.saturating_sub(total - keep))),
            }
        }
        let estimate = before.as_ref().zip(budget).map(|(measured, (_, wanted))| (measured, wanted));
        let mut aside = Aside { work: state.work_dir().ok(), next: 0, bytes: 0 };
        let left = {
            let _alone = state.alone()?;
            choose(state, options, estimate, &mut aside, &mut report)?
        };
        report.bytes += aside.clear();
        if before.is_none() || left == 0 {
            break;
        }
    }
    prune_notes(state, options, &mut report)?;
    Ok(report)
}

fn free_space(state: &State) -> Result<u64, StateError> {
    let disk = rustix::fs::statvfs(state.root()).map_err(io::Error::from).map_err(io_error("measure", state.root()))?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

/// Puts aside what is to go; returns how much more could go. Records go before their files, so that a kill in the middle leaves no record
/// without them. Nobody begins to use anything meanwhile; of the store only the handle without a lease may be used.
fn choose(
    state: &State,
    options: &PruneOptions,
    budget: Option<(&Measured, u64)>,
    aside: &mut Aside,
    report: &mut PruneReport,
) -> Result<usize, StateError> {
    let store = state.unleased();
    let leased = state.leased()?;
    let nothing = HashMap::new();
    let sizes = budget.map_or(&nothing, |(measured, _)| &measured.sizes);
    let mut items = item::cached(state, sizes)?;
    items.extend(item::names(&store)?);
    let (mut items, mut stay): (Vec<Item>, Vec<Item>) =
        items.into_iter().partition(|item| options.wants(item) && !options.is_young(item.used));
    let (used, free): (Vec<Item>, Vec<Item>) = items.drain(..).partition(|item| item.is_leased(&leased));
    report.in_use = used.len();
    stay.extend(used);
    let mut items = free;
    items.sort_by_key(|item| item.used);
    let mut needs = Needs::new(state, &store);
    let gone = match budget {
        None => items.len(),
        Some((measured, budget)) => {
            let candidates = Candidates { items: &items, stay: &stay, leased: &leased };
            surplus(&candidates, measured, budget, &store, &mut needs)
        }
    };
    // Who asks for certain things means these, and not what nothing needs.
    let mut to_sweep = !options.is_filtered();
    for item in items.drain(..gone) {
        match &item.keeps {
            Keeps::Record { path, .. } => to_sweep |= aside.take(path)?,
            Keeps::Name(name, _) => drop(aside.take(&store.image_path(name))?),
            Keeps::Mount(path) => report.removed += usize::from(aside.take(path)?),
        }
    }
    if to_sweep {
        let stay = needs.of(items.iter().chain(&stay), &leased);
        report.removed += sweep(state, &store, &stay, aside)?;
    }
    Ok(items.len())
}

/// What may go, and what keeps the rest.
struct Candidates<'c> {
    /// Oldest first.
    items: &'c [Item],
    stay: &'c [Item],
    leased: &'c HashSet<String>,
}

/// How many of the oldest items must go so that the rest is within the budget.
fn surplus(candidates: &Candidates, measured: &Measured, budget: u64, store: &Store, needs: &mut Needs) -> usize {
    let Candidates { items, stay, leased } = candidates;
    let sizes = &measured.sizes;
    let total = measured.usage.total();
    if total <= budget {
        return 0;
    }
    // What other users have here, and what no item names, cannot be removed by choosing items.
    let ours = |path: &Path| path.starts_with(store.dir()) || needs.trees().iter().any(|tree| tree.contains(path));
    let stored: u64 = sizes.iter().filter(|(path, _)| ours(path)).map(|(_, size)| size).sum();
    let own = |items: &[Item]| items.iter().map(|item| item.own).sum::<u64>();
    let mounts = |items: &[Item]| items.iter().filter(|item| matches!(item.keeps, Keeps::Mount(_))).map(|item| item.own).sum::<u64>();
    let other = total.saturating_sub(stored).saturating_sub(own(items) - mounts(items));
    // What stays only shrinks with the number that goes.
    let (mut low, mut high) = (0, items.len());
    while low < high {
        let middle = usize::midpoint(low, high);
        let needed = needs.of(items[middle..].iter().chain(*stay), leased);
        let size = |stored: &Stored| match stored {
            Stored::Snapshot(path) => sizes.get(path).copied(),
            Stored::Blob(digest) => sizes.get(&store.blob_path(digest)).copied(),
        };
        let left: u64 = needed.iter().filter_map(size).sum();
        if other + mounts(stay) + left + own(&items[middle..]) <= budget {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    low
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

/// Puts every snapshot and blob aside that does not stay; returns how many.
fn sweep(state: &State, store: &Store, stay: &BTreeSet<Stored>, aside: &mut Aside) -> Result<usize, StateError> {
    let mut removed = 0;
    for snapshot in snapshots(state)? {
        if !stay.contains(&Stored::Snapshot(snapshot.clone())) {
            removed += usize::from(aside.take(&snapshot)?);
        }
    }
    for (digest, _) in store.blobs()? {
        if !stay.contains(&Stored::Blob(digest)) {
            removed += usize::from(aside.take(&store.blob_path(&digest))?);
        }
    }
    for origin in entries(&state.origins_dir())? {
        let digest = origin.file_name().and_then(|hex| format!("sha256:{}", hex.to_str()?).parse().ok());
        if digest.is_none_or(|digest| !stay.contains(&Stored::Blob(digest))) {
            aside.take(&origin)?;
        }
    }
    Ok(removed)
}

/// Where things go that nobody shall find any more. It is this process' own: if it is killed, the next one clears it.
struct Aside {
    /// None when the disk is too full for a folder: then everything is removed at once.
    work: Option<WorkDir>,
    next: usize,
    bytes: u64,
}

impl Aside {
    /// Was it there?
    fn take(&mut self, path: &Path) -> Result<bool, StateError> {
        if let Some(work) = &self.work {
            let place = work.path().join(self.next.to_string());
            match fs::rename(path, &place) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
                // The folder of a read-only layer below, a full disk.
                Err(_) => {}
                Ok(()) => {
                    self.next += 1;
                    return Ok(true);
                }
            }
        }
        self.bytes += size_of(path, &mut BTreeSet::new());
        remove_tree(path).map_err(io_error("remove", path))?;
        Ok(true)
    }

    /// Removes everything; returns how much it was.
    fn clear(self) -> u64 {
        let parts = self.work.iter().flat_map(|work| fs::read_dir(work.path())).flatten().flatten();
        let mut seen = BTreeSet::new();
        self.bytes + parts.map(|part| size_of(&part.path(), &mut seen)).sum::<u64>()
    }
}

/// Explanations of builds, those that are old enough, or all when everything goes; and the hashes of context files, which only who asks for
/// them means. Nobody relies on these.
fn prune_notes(state: &State, options: &PruneOptions, report: &mut PruneReport) -> Result<(), StateError> {
    let mut notes = vec![];
    if options.kinds.contains(&CacheKind::SourceLocal) && options.ids.is_empty() {
        notes.push(state.stat_cache());
    }
    if !options.is_filtered() && options.budget == Budget::default() && (options.filter_until.is_some() || options.all) {
        for tree in state.trees() {
            notes.extend(entries(&tree.traces())?);
        }
    }
    for path in notes.into_iter().filter(|path| path.exists() && !options.is_young(changed(path))) {
        report.bytes += size_of(&path, &mut BTreeSet::new());
        report.removed += 1;
        remove_tree(&path).map_err(io_error("remove", &path))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets() {
        let budget = |reserved, max_used, min_free| Budget { reserved, max_used, min_free };
        for (budget, free, expect) in [
            (budget(None, None, None), 0, None),
            (budget(Some(30), None, None), 0, Some(30)),
            (budget(None, Some(40), None), 0, Some(40)),
            (budget(Some(50), Some(40), None), 0, Some(50)),
            (budget(Some(30), Some(40), None), 0, Some(40)),
            (budget(None, None, Some(20)), 20, Some(100)),
            (budget(None, None, Some(20)), 5, Some(85)),
            (budget(None, None, Some(200)), 5, Some(0)),
            (budget(None, Some(40), Some(20)), 5, Some(40)),
            (budget(Some(90), Some(95), Some(20)), 5, Some(90)),
        ] {
            assert_eq!(budget.keep(100, free), expect, "{budget:?} {free} free");
        }
    }
}
