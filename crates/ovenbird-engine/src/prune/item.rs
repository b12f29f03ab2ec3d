//! What keeps snapshots and blobs from being swept, and what that is.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use ovenbird_oci::store::Store;
use ovenbird_oci::{Digest, Reference};

use super::entries;
use super::usage::size_of;
use crate::cache::{Chain, Link, Record, read_chain};
use crate::state::{Ids, SnapshotId, State, StateError, unseal};

/// Something that keeps snapshots and blobs, and goes by age.
pub(super) struct Item {
    pub(super) used: SystemTime,
    pub(super) keeps: Keeps,
    /// What it takes itself.
    pub(super) own: u64,
}

pub(super) enum Keeps {
    /// A cache record: where it is, and what it says of the snapshots in a folder.
    Record { path: PathBuf, snapshots: PathBuf, chain: Chain },
    /// A name of an image.
    Name(Reference, Digest),
    /// The folder of a cache mount.
    Mount(PathBuf),
}

impl Item {
    /// Does a process that lives use it? Of a chain the end counts: what is below it is found by itself.
    pub(super) fn is_leased(&self, leased: &HashSet<String>) -> bool {
        match &self.keeps {
            Keeps::Name(_, digest) => leased.contains(&digest.to_string()),
            Keeps::Record { .. } | Keeps::Mount(_) => self.ids().any(|id| leased.contains(&id)),
        }
    }

    /// What it is called.
    pub(super) fn ids(&self) -> impl Iterator<Item = String> {
        match &self.keeps {
            Keeps::Record { chain, .. } => chain.last().map(|link| match &**link {
                Link::Diff { id, .. } => id.as_str().to_owned(),
                Link::Image { manifest, .. } => manifest.to_string(),
                Link::Shared(layer) => layer.snapshot().as_str().to_owned(),
            }),
            Keeps::Name(name, _) => Some(name.familiar()),
            Keeps::Mount(path) => path.file_name().map(|name| name.to_string_lossy().into_owned()),
        }
        .into_iter()
    }
}

/// Cache records and cache mounts.
pub(super) fn cached(state: &State, sizes: &HashMap<PathBuf, u64>) -> Result<Vec<Item>, StateError> {
    let mut items = vec![];
    for tree in state.trees() {
        items.extend(records(tree)?);
        items.extend(mounts(tree, sizes)?);
    }
    Ok(items)
}

fn records(tree: &Ids) -> Result<Vec<Item>, StateError> {
    let items = entries(&tree.records())?.map(|path| {
        let bytes = fs::read(&path).unwrap_or_default();
        let bytes = unseal(&bytes).unwrap_or_default();
        let chain =
            serde_json::from_slice::<Record>(bytes).ok().map(|record| record.chain).or_else(|| read_chain(bytes)).unwrap_or_default();
        Item {
            used: changed(&path),
            own: size_of(&path, &mut BTreeSet::new()),
            keeps: Keeps::Record { path, snapshots: tree.snapshots(), chain },
        }
    });
    Ok(items.collect())
}

/// Names of images.
pub(super) fn names(store: &Store) -> Result<Vec<Item>, StateError> {
    let names = store.images()?.into_iter().map(|(name, descriptor)| {
        let path = store.image_path(&name);
        Item { used: changed(&path), own: size_of(&path, &mut BTreeSet::new()), keeps: Keeps::Name(name, descriptor.digest) }
    });
    Ok(names.collect())
}

fn mounts(tree: &Ids, sizes: &HashMap<PathBuf, u64>) -> Result<Vec<Item>, StateError> {
    let items = entries(&tree.mounts())?.map(|path| {
        let below = fs::read_dir(&path).into_iter().flatten().flatten().map(|entry| changed(&entry.path()));
        let used = below.max().unwrap_or(SystemTime::UNIX_EPOCH).max(changed(&path));
        Item { used, own: sizes.get(&path).copied().unwrap_or_default(), keeps: Keeps::Mount(path) }
    });
    Ok(items.collect())
}

/// When it was last changed, as far as that is known.
pub(super) fn changed(path: &Path) -> SystemTime {
    fs::symlink_metadata(path).and_then(|meta| meta.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
}

/// What takes space.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Stored {
    Snapshot(PathBuf),
    Blob(Digest),
}

/// What a manifest or index names: blobs and snapshots, and documents of the same kind.
#[derive(Default)]
struct Names {
    stored: Vec<Stored>,
    below: Vec<Digest>,
}

/// Who needs what; remembers what it read.
pub(super) struct Needs<'s> {
    state: &'s State,
    store: &'s Store,
    known: HashMap<Digest, Names>,
    packed: HashMap<PathBuf, Vec<Digest>>,
}

impl<'s> Needs<'s> {
    /// Reads from `store`, which must be one without a lease.
    pub(super) fn new(state: &'s State, store: &'s Store) -> Self {
        Self { state, store, known: HashMap::new(), packed: HashMap::new() }
    }

    /// Where it looks for snapshots.
    pub(super) fn trees(&self) -> &'s [Ids] {
        self.state.trees()
    }

    /// Everything that the items and the leases need.
    pub(super) fn of<'a>(&mut self, items: impl Iterator<Item = &'a Item>, leased: &HashSet<String>) -> BTreeSet<Stored> {
        let mut stay = BTreeSet::new();
        let mut manifests: Vec<Digest> = vec![];
        for name in leased {
            match name.parse::<Digest>() {
                Ok(digest) => manifests.push(digest),
                Err(_) => stay.extend(self.state.trees().iter().map(|tree| Stored::Snapshot(tree.snapshots().join(name)))),
            }
        }
        for item in items {
            match &item.keeps {
                Keeps::Record { snapshots, chain, .. } => {
                    for link in chain {
                        match &**link {
                            Link::Diff { id, .. } => drop(stay.insert(Stored::Snapshot(snapshots.join(id.as_str())))),
                            Link::Image { manifest, .. } => manifests.push(*manifest),
                            Link::Shared(layer) => {
                                stay.insert(Stored::Snapshot(snapshots.join(layer.snapshot().as_str())));
                                stay.insert(Stored::Blob(layer.digest));
                            }
                        }
                    }
                }
                Keeps::Name(_, digest) => manifests.push(*digest),
                Keeps::Mount(_) => {}
            }
        }
        while let Some(digest) = manifests.pop() {
            if stay.insert(Stored::Blob(digest)) {
                let names = self.known.entry(digest).or_insert_with(|| names_of(self.state, self.store, &digest));
                stay.extend(names.stored.iter().cloned());
                manifests.extend(&names.below);
            }
        }
        // A layer packed from a snapshot that stays is worth keeping: the next push needs it.
        let mut packed = vec![];
        for stored in &stay {
            if let Stored::Snapshot(dir) = stored {
                let blobs = self.packed.entry(dir.clone()).or_insert_with(|| State::packed_blobs(dir));
                packed.extend(blobs.iter().copied().map(Stored::Blob));
            }
        }
        stay.extend(packed);
        stay
    }
}

fn names_of(state: &State, store: &Store, digest: &Digest) -> Names {
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
    // A layer that is in use is not read for links.
    let mut head = vec![];
    let read = File::open(store.blob_path(digest)).and_then(|file| file.take(512).read_to_end(&mut head));
    if read.is_err() || head.trim_ascii_start().first().is_some_and(|byte| *byte != b'{') {
        return Names::default();
    }
    let read = store.read(digest).ok().and_then(|bytes| serde_json::from_slice::<Links>(&bytes).ok());
    let Some(links) = read else { return Names::default() };
    let mut stored: Vec<Stored> = links.layers.iter().map(|layer| Stored::Blob(layer.digest)).collect();
    if let Some(config) = links.config {
        stored.push(Stored::Blob(config.digest));
        let config: Config = store.read(&config.digest).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        for tree in state.trees() {
            let ids = config.rootfs.diff_ids.iter().map(SnapshotId::of_layer);
            stored.extend(ids.map(|id| Stored::Snapshot(tree.snapshots().join(id.as_str()))));
        }
    }
    Names { stored, below: links.manifests.iter().map(|m| m.digest).collect() }
}
