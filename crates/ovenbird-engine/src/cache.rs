//! Cache keys and what they lead to.
//!
//! Every vertex has two keys. The *definition key* follows from the plan and the content of local
//! contexts alone, so that an unchanged build is answered without looking at any stage. The *content
//! key* is known once the inputs are: for copied files it is their content, so a stage that was built
//! again with the same outcome changes nothing behind it. Results are filed under both. No key holds a
//! time, an inode, a path of this machine or a secret. What other machines may know of this is in [`document`].

pub mod document;

use std::collections::BTreeSet;
use std::sync::Arc;

use ovenbird_oci::digest::Hasher;
use ovenbird_oci::{Descriptor, Digest, Platform, Reference};
use serde::{Deserialize, Serialize};

use crate::plan::Op;
use crate::state::{SnapshotId, State, StateError};

/// Bumped whenever the same key would mean another result.
const FORMAT: &str = "ovenbird-cache-1";

/// Names a result by what it was made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CacheKey(Digest);

impl CacheKey {
    /// Key of an operation whose inputs have these keys, in the order of [`Op::inputs`] with `None` for an absent one.
    pub fn of(op: &Op, platform: &Platform, inputs: &[Option<Self>]) -> Self {
        let mut hasher = Hasher::default();
        let definition = serde_json::to_vec(op).unwrap_or_default();
        for part in [FORMAT.as_bytes(), platform.to_string().as_bytes(), &definition] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        for input in inputs {
            match input {
                None => hasher.update(&[0]),
                Some(key) => {
                    hasher.update(&[1]);
                    hasher.update(key.0.as_bytes());
                }
            }
        }
        Self(hasher.finish().0)
    }

    /// Key of content.
    pub const fn of_content(digest: Digest) -> Self {
        Self(digest)
    }

    /// The digest it is.
    pub const fn digest(self) -> Digest {
        self.0
    }

    fn file_name(&self) -> String {
        self.0.hex()
    }
}

/// One part of a root file system, lowest first.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Link {
    /// All layers of a base image (not unpacked until something reads them).
    Image {
        /// The platform's manifest.
        manifest: Digest,
        /// Where it came from.
        reference: Reference,
    },
    /// What one step changed.
    Diff {
        /// Where.
        id: SnapshotId,
        /// When it ran, seconds since 1970: an unchanged build is the same image, so its times are those of the steps.
        created: i64,
    },
    /// What one step changed, as another machine packed it (not fetched until something reads it).
    Shared(SharedLayer),
}

/// A layer from a cache that several machines use.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SharedLayer {
    /// Digest of the blob.
    pub digest: Digest,
    /// Bytes of the blob.
    pub size: u64,
    /// Layer media type.
    pub media_type: String,
    /// Digest of the tar in it.
    pub diff_id: Digest,
    /// When the step ran, seconds since 1970.
    pub created: i64,
    /// How it was compressed: `gzip5`.
    pub compression: String,
    /// Time of all files in it, when that was fixed; seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<i64>,
    /// Names of the secrets that it was searched for and does not hold.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub searched: BTreeSet<String>,
}

impl SharedLayer {
    /// The blob.
    pub fn descriptor(&self) -> Descriptor {
        Descriptor::new(&self.media_type, self.digest, self.size)
    }

    /// Its folder, once it is unpacked.
    pub fn snapshot(&self) -> SnapshotId {
        SnapshotId::of_layer(&self.diff_id)
    }
}

impl Link {
    /// What a step that ended now changed.
    pub fn new_diff(id: SnapshotId) -> Self {
        Self::Diff { id, created: jiff::Timestamp::now().as_second() }
    }
}

/// A root file system: its parts, lowest first. Steps share the parts below them, or a long Dockerfile would take memory by the square.
pub type Chain = Vec<Arc<Link>>;

/// What a vertex came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Content key.
    pub key: CacheKey,
    /// Its files.
    #[serde(with = "links")]
    pub chain: Chain,
}

/// A result and the definition key that led to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filed {
    /// Definition key.
    pub definition: CacheKey,
    /// The result.
    pub record: Record,
}

/// Finds a result whose parts are all still there, or can be had.
pub fn find(state: &State, key: &CacheKey) -> Option<Record> {
    let record: Record = serde_json::from_slice(&state.read_record(&key.file_name())?).ok()?;
    if !is_complete(state, &record.chain) {
        return None;
    }
    state.touch_record(&key.file_name());
    Some(record)
}

/// Files a result under each of the keys.
pub fn save(state: &State, keys: &[CacheKey], record: &Record) -> Result<(), StateError> {
    let bytes = serde_json::to_vec(record).unwrap_or_default();
    keys.iter().try_for_each(|key| state.write_record(&key.file_name(), &bytes))
}

/// The chain a manifest was made from, if this machine made it.
pub fn find_image(state: &State, manifest: &Digest) -> Option<Chain> {
    let chain = read_chain(&state.read_record(&image_name(manifest))?)?;
    // `FROM image` and nothing else is that image again: it is not made of itself.
    let own = chain.iter().any(|link| matches!(&**link, Link::Image { manifest: of, .. } if of == manifest));
    (!own && is_complete(state, &chain)).then_some(chain)
}

/// Remembers the chain of a manifest made here.
pub fn save_image(state: &State, manifest: &Digest, chain: &[Arc<Link>]) -> Result<(), StateError> {
    state.write_record(&image_name(manifest), write_chain(chain).as_bytes())
}

/// A chain as JSON.
pub fn write_chain(chain: &[Arc<Link>]) -> String {
    serde_json::to_string(&chain.iter().map(AsRef::as_ref).collect::<Vec<&Link>>()).unwrap_or_default()
}

/// What [`write_chain`] wrote.
pub fn read_chain(record: &[u8]) -> Option<Chain> {
    links::deserialize(&mut serde_json::Deserializer::from_slice(record)).ok()
}

/// A [`Chain`] is written as a list of what it shares.
mod links {
    use std::sync::Arc;

    use serde::{Deserialize, Deserializer, Serializer};

    use super::{Chain, Link};

    pub(super) fn serialize<S: Serializer>(chain: &[Arc<Link>], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(chain.iter().map(AsRef::as_ref))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Chain, D::Error> {
        Ok(Vec::<Link>::deserialize(from)?.into_iter().map(Arc::new).collect())
    }
}

fn image_name(manifest: &Digest) -> String {
    format!("image-{}", manifest.hex())
}

fn is_complete(state: &State, chain: &[Arc<Link>]) -> bool {
    chain.iter().all(|link| match &**link {
        Link::Image { manifest, .. } => state.store().has(manifest),
        Link::Diff { id, .. } => state.has_snapshot(id),
        Link::Shared(layer) => {
            state.has_snapshot(&layer.snapshot()) || state.store().holds(&layer.descriptor()) || state.origin(&layer.digest).is_some()
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{FileAction, FileOp};

    fn key(path: &str, base: Option<CacheKey>, platform: &str) -> CacheKey {
        let op = Op::File(FileOp { base: base.map(|_| 7), actions: vec![FileAction::Mkdir { path: path.into(), owner: None }] });
        CacheKey::of(&op, &platform.parse().unwrap(), &[base])
    }

    #[test]
    fn keys_follow_definition_inputs_and_platform() {
        let a = key("/a", None, "linux/amd64");
        assert_eq!(a, key("/a", None, "linux/amd64"));
        let others = [key("/b", None, "linux/amd64"), key("/a", Some(a), "linux/amd64"), key("/a", None, "linux/arm64")];
        for (i, other) in others.iter().enumerate() {
            assert_ne!(a, *other, "{i}");
        }
    }

    #[test]
    fn a_record_whose_snapshot_is_gone_is_no_hit() {
        let root = tempfile::tempdir().unwrap();
        let state = State::open(root.path(), Some(ovenbird_sandbox::Level::Root)).unwrap();
        let work = state.work_dir().unwrap();
        work.subdir("fs").unwrap();
        let id = state.commit(work, None, &std::collections::BTreeMap::new()).unwrap();
        let key = key("/a", None, "linux/amd64");
        let record = Record { key, chain: vec![Link::new_diff(id.clone()).into()] };
        save(&state, &[key], &record).unwrap();
        let file = state.trees()[0].records().join(key.file_name());
        let year = std::time::Duration::from_hours(9_000);
        for wrong in [std::time::SystemTime::UNIX_EPOCH, std::time::SystemTime::now() + year] {
            std::fs::File::options().write(true).open(&file).unwrap().set_modified(wrong).unwrap();
            assert_eq!(find(&state, &key).as_ref(), Some(&record));
            let age = file.metadata().unwrap().modified().unwrap().elapsed().unwrap();
            assert!(age.as_secs() < 60, "what was used is young");
        }
        std::fs::remove_dir_all(root.path().join("real/snapshots").join(id.as_str())).unwrap();
        assert_eq!(find(&state, &key), None);
    }
}
