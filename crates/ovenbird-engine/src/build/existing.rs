//! Images that are there already: in the store, and in registries.

use std::collections::BTreeMap;

use ovenbird_oci::image::ImageConfig;
use ovenbird_oci::registry::{Client, RegistryError};
use ovenbird_oci::store::StoreError;
use ovenbird_oci::{Descriptor, Index, Manifest, Platform, Reference};

use super::Engine;
use crate::error::BuildError;
use crate::event::EventSink;
use crate::input::Cancel;
use crate::ops::progress_events;

/// Indexes in indexes are legal; deeper than this they are a trap.
const MAX_DEPTH: usize = 4;
/// Most manifests of one image.
const MAX_MANIFESTS: usize = 500;
/// Most bytes of a config.
const MAX_CONFIG: u64 = 4 << 20;

/// One platform of an image of the store.
#[derive(Debug, Clone, PartialEq)]
pub struct Member {
    /// Which.
    pub platform: Platform,
    /// Its manifest, as it came.
    pub manifest: Descriptor,
    /// The same, read.
    pub document: Manifest,
    /// Its config.
    pub config: ImageConfig,
}

impl Engine {
    /// Does work with the registry client, until it ends or is cancelled.
    pub fn ask<T, F: Future<Output = Result<T, RegistryError>>>(
        &self,
        cancel: &Cancel,
        work: impl FnOnce(Client) -> F,
    ) -> Result<T, BuildError> {
        Ok(self.cancellable(cancel, work(self.options.client.clone()))??)
    }

    /// The image that has this name here, when it is whole: manifests and configs can be read and are what their digests say, and each layer is
    /// here in its size or has a known place to come from.
    pub fn find(&self, name: &Reference) -> Result<Option<Descriptor>, BuildError> {
        let target = match self.store().resolve(name) {
            Err(StoreError::Corrupt { .. } | StoreError::Missing { .. } | StoreError::Format { .. }) => return Ok(None),
            other => other?,
        };
        let Some(target) = target else { return Ok(None) };
        let members = match self.members(&target) {
            Ok(members) => members,
            Err(BuildError::Store(_) | BuildError::Malformed { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let whole = |member: &Member| {
            let layers = &member.document.layers;
            layers.iter().all(|layer| self.store().holds(layer) || self.state.origin(&layer.digest).is_some())
        };
        Ok((!members.is_empty() && members.iter().all(whole)).then_some(target))
    }

    /// The platforms of an image of the store. Attestations are none.
    pub fn members(&self, target: &Descriptor) -> Result<Vec<Member>, BuildError> {
        let mut members = vec![];
        let mut open = vec![(target.clone(), 0)];
        while let Some((descriptor, depth)) = open.pop() {
            let malformed = |reason: String| BuildError::Malformed { digest: descriptor.digest.to_string(), reason };
            let bytes = self.store().read(&descriptor.digest)?;
            if descriptor.is_index() {
                let index: Index = serde_json::from_slice(&bytes).map_err(|e| malformed(e.to_string()))?;
                if depth == MAX_DEPTH || open.len() + index.manifests.len() > MAX_MANIFESTS {
                    return Err(malformed("it has too many manifests, or indexes in indexes".into()));
                }
                open.extend(index.manifests.into_iter().rev().filter(|m| !m.is_attestation()).map(|m| (m, depth + 1)));
                continue;
            }
            let document: Manifest = serde_json::from_slice(&bytes).map_err(|e| malformed(e.to_string()))?;
            let config = self.store().read(&document.config.digest)?;
            let config: ImageConfig = serde_json::from_slice(&config).map_err(|e| malformed(e.to_string()))?;
            let platform = descriptor.platform.clone().unwrap_or_else(|| Platform {
                os: config.os.clone(),
                architecture: config.architecture.clone(),
                variant: config.variant.clone(),
                os_version: config.os_version.clone(),
            });
            members.push(Member { platform, manifest: descriptor, document, config });
        }
        Ok(members)
    }

    /// Brings an image of a registry into the store: with its layers and under its name, or (not `whole`) only what describes it, the layers
    /// staying where they are until something reads them. `None`: the registry has no such image.
    pub fn fetch(
        &self,
        from: &Reference,
        whole: bool,
        sink: &std::sync::Arc<dyn EventSink>,
        cancel: &Cancel,
    ) -> Result<Option<Descriptor>, BuildError> {
        if self.cancellable(cancel, self.options.client.head(from))??.is_none() {
            return Ok(None);
        }
        if whole {
            return self.pull(from, None, sink, cancel).map(Some);
        }
        let fetched = self.cancellable(cancel, self.describe(from, sink))??;
        let place = from.with_digest(fetched.digest);
        for layer in self.layers(&fetched)? {
            self.state.set_origin(&layer.digest, &place)?;
        }
        Ok(Some(fetched))
    }

    /// Manifests and configs into the store.
    async fn describe(&self, from: &Reference, sink: &std::sync::Arc<dyn EventSink>) -> Result<Descriptor, BuildError> {
        let (client, store) = (&self.options.client, self.store());
        let progress = progress_events(sink.clone(), "pulling");
        let mut target = None;
        let mut open = vec![(from.clone(), 0)];
        let mut count = 0;
        while let Some((reference, depth)) = open.pop() {
            let fetched = client.manifest(&reference).await?;
            let descriptor = fetched.descriptor;
            let malformed = |reason: String| BuildError::Malformed { digest: descriptor.digest.to_string(), reason };
            store.write(&fetched.bytes)?;
            count += 1;
            if descriptor.is_index() {
                let index: Index = serde_json::from_slice(&fetched.bytes).map_err(|e| malformed(e.to_string()))?;
                if depth == MAX_DEPTH || count + open.len() + index.manifests.len() > MAX_MANIFESTS {
                    return Err(malformed("it has too many manifests, or indexes in indexes".into()));
                }
                open.extend(index.manifests.iter().map(|m| (from.with_digest(m.digest), depth + 1)));
            } else {
                let manifest: Manifest = serde_json::from_slice(&fetched.bytes).map_err(|e| malformed(e.to_string()))?;
                if manifest.config.size > MAX_CONFIG {
                    return Err(malformed(format!("its config has {} bytes", manifest.config.size)));
                }
                client.fetch_blob(from, &manifest.config, store, &progress).await?;
            }
            target.get_or_insert(Descriptor { annotations: BTreeMap::new(), ..descriptor });
        }
        target.ok_or_else(|| BuildError::Registry(RegistryError::NotFound { reference: from.to_string() }))
    }
}
