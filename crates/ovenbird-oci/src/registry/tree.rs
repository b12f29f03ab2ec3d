//! What a push sends: the manifests below a target and the blobs they name. It sends nothing itself.

use std::collections::{BTreeMap, HashSet};

use super::limit::random;
use super::pull::{Document, is_manifest, parse};
use super::{Fetched, Inner, MAX_MANIFEST, RegistryError, blocking};
use crate::image::media::is_foreign;
use crate::store::Store;
use crate::{Descriptor, Digest, Reference};

/// Indexes in indexes.
const MAX_DEPTH: usize = 8;
/// Annotation of a manifest that is there only to be removed.
const THROWAWAY: &str = "org.ovenbird.throwaway";

/// What is pushed.
#[derive(Default)]
pub(super) struct Tree {
    /// Children before parents, the target last.
    pub(super) manifests: Vec<Fetched>,
    pub(super) layers: Vec<Descriptor>,
    pub(super) configs: Vec<Descriptor>,
    /// Where its blobs can be had, as far as that is known.
    pub(super) origins: BTreeMap<Digest, Reference>,
    seen: HashSet<Digest>,
}

impl Tree {
    /// Reads manifests from the store, or from where they came from.
    pub(super) async fn read(
        inner: &Inner,
        store: &Store,
        target: &Descriptor,
        origins: &BTreeMap<Digest, Reference>,
        action: &str,
    ) -> Result<Self, RegistryError> {
        let mut tree = Self { origins: origins.clone(), ..Self::default() };
        tree.collect(inner, store, target, action, MAX_DEPTH).await?;
        Ok(tree)
    }

    async fn collect(
        &mut self,
        inner: &Inner,
        store: &Store,
        target: &Descriptor,
        action: &str,
        depth: usize,
    ) -> Result<(), RegistryError> {
        if !self.seen.insert(target.digest) {
            return Ok(());
        }
        if depth == 0 {
            let media_type = format!("more than {MAX_DEPTH} indexes in each other");
            return Err(RegistryError::Unsupported { reference: target.digest.to_string(), media_type });
        }
        if target.size > MAX_MANIFEST {
            return Err(RegistryError::TooLarge { what: format!("manifest {}", target.digest), size: target.size, limit: MAX_MANIFEST });
        }
        let origin = self.origins.get(&target.digest).cloned();
        // What the store has is taken from there, unless it is damaged.
        let bytes = if let Some(origin) = &origin {
            inner.manifest_into(origin, Some(target), store).await?.bytes
        } else {
            let (store, digest) = (store.clone(), target.digest);
            blocking(action, move || store.read(&digest)).await?
        };
        let fetched = Fetched { descriptor: target.clone(), bytes };
        match parse(&fetched, &target.digest.to_string())? {
            Document::Index(index) => {
                for child in index.manifests {
                    self.inherit(child.digest, origin.as_ref());
                    Box::pin(self.collect(inner, store, &child, action, depth - 1)).await?;
                }
            }
            Document::Manifest(manifest) => {
                for layer in manifest.layers {
                    self.inherit(layer.digest, origin.as_ref());
                    if !is_foreign(&layer.media_type) && self.seen.insert(layer.digest) {
                        self.layers.push(layer);
                    }
                }
                self.inherit(manifest.config.digest, origin.as_ref());
                if self.seen.insert(manifest.config.digest) {
                    self.configs.push(manifest.config);
                }
            }
        }
        self.manifests.push(fetched);
        Ok(())
    }

    /// What a fetched manifest names is where the manifest was.
    fn inherit(&mut self, digest: Digest, origin: Option<&Reference>) {
        if let Some(origin) = origin {
            self.origins.entry(digest).or_insert_with(|| origin.clone());
        }
    }

    /// A copy of one of the manifests that nothing else in the world names: who removes it removes nothing of anybody's.
    pub(super) fn throwaway(&self) -> Option<Fetched> {
        let manifest = self.manifests.iter().find(|m| is_manifest(&m.descriptor.media_type))?;
        let mut document: serde_json::Value = serde_json::from_slice(&manifest.bytes).ok()?;
        let annotations = document.as_object_mut()?.entry("annotations").or_insert_with(|| serde_json::json!({}));
        annotations.as_object_mut()?.insert(THROWAWAY.into(), format!("{:016x}{:016x}", random(), random()).into());
        let bytes = serde_json::to_vec(&document).ok()?;
        let (digest, size) = (Digest::of(&bytes), bytes.len() as u64);
        Some(Fetched { descriptor: Descriptor { digest, size, ..manifest.descriptor.clone() }, bytes })
    }
}
