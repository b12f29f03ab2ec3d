//! An image of the store, under names in registries.

use std::collections::BTreeMap;

use ovenbird_oci::publish::Target;
use ovenbird_oci::registry::{Breaks, Publication, RegistryError};
use ovenbird_oci::{Descriptor, Digest, Reference};

use crate::build::Engine;
use crate::error::BuildError;
use crate::event::{Event, EventSink};
use crate::export::output;
use crate::input::{BuildInput, Cancel};
use crate::ops::progress_events;

impl Engine {
    /// Publishes an image of the store under all of these names, or under none. Tells what broke on the way and went on.
    pub fn push(
        &self,
        target: &Descriptor,
        to: &[Target],
        sink: &std::sync::Arc<dyn EventSink>,
        cancel: &Cancel,
    ) -> Result<Breaks, BuildError> {
        let origins = self.origins(target)?;
        let names: Vec<String> = to.iter().map(|to| to.reference.familiar()).collect();
        sink.emit(Event::Message { text: format!("pushing {}", names.join(", ")) });
        let (progress, before) = (progress_events(sink.clone(), "pushing"), self.breaks());
        let publication =
            Publication { image: target, store: self.store(), to, origins: &origins, progress: &progress, head_starts: &self.head_starts };
        // Not to be dropped when the user stops it: names that were put must be taken back.
        let pushed = self.runtime.block_on(self.options.client.publish(&publication, &cancel.follow()));
        let breaks = self.tell_breaks(before, &**sink);
        let pushed = pushed.map(|()| breaks).map_err(BuildError::from);
        if pushed.as_ref().is_err_and(BuildError::is_damage) {
            // One is rarely alone, and another build would stumble over the next.
            for layer in self.layers(target).unwrap_or_default() {
                let _ = self.store().verify(&layer.digest);
            }
        }
        match pushed {
            Err(error) if cancel.is_cancelled() => {
                if let BuildError::Registry(RegistryError::Unpublished { left, .. }) = &error {
                    for (name, why) in left {
                        let message = format!("{name} may be the new image now, for it could not be taken back ({why})");
                        sink.emit(Event::Warning { code: "not-taken-back".into(), message, line: None });
                    }
                }
                Err(BuildError::Cancelled)
            }
            Err(error) => Err(self.missing_layer(target, sink, cancel).unwrap_or(error)),
            pushed => pushed,
        }
    }

    /// Why a layer from a shared cache, which is not here, cannot be had: then the image can be made without it.
    fn missing_layer(&self, target: &Descriptor, sink: &std::sync::Arc<dyn EventSink>, cancel: &Cancel) -> Option<BuildError> {
        let absent = |layer: &Descriptor| self.borrowed.has(&layer.digest) && !self.store().holds(layer);
        if !self.layers(target).ok()?.iter().any(absent) {
            return None;
        }
        let input = BuildInput::default();
        output::complete(&self.session(&input, sink, cancel), target).err().filter(|e| matches!(e, BuildError::SharedLayer { .. }))
    }

    /// Transfers that broke since the engine was opened.
    pub(crate) fn breaks(&self) -> Breaks {
        self.options.client.breaks()
    }

    /// Tells what broke since `before`, if anything did.
    pub(crate) fn tell_breaks(&self, before: Breaks, sink: &dyn EventSink) -> Breaks {
        let breaks = self.breaks().since(before);
        if breaks != Breaks::default() {
            sink.emit(Event::Breaks(breaks));
        }
        breaks
    }

    /// Where the layers of an image can be had: all that are known, since one that is here may be mounted instead of sent.
    fn origins(&self, target: &Descriptor) -> Result<BTreeMap<Digest, Reference>, BuildError> {
        let layers = self.layers(target)?.into_iter();
        Ok(layers.filter_map(|layer| Some((layer.digest, self.state.origin(&layer.digest)?))).collect())
    }

    /// The layers of an image of the store, of all its platforms that are there.
    pub(crate) fn layers(&self, target: &Descriptor) -> Result<Vec<Descriptor>, BuildError> {
        #[derive(serde::Deserialize)]
        struct Links {
            #[serde(default)]
            manifests: Vec<Descriptor>,
            #[serde(default)]
            layers: Vec<Descriptor>,
        }
        let mut layers = vec![];
        let mut open = vec![target.digest];
        while let Some(digest) = open.pop() {
            let links: Links = serde_json::from_slice(&self.store().read(&digest)?)
                .map_err(|error| BuildError::Malformed { digest: digest.to_string(), reason: error.to_string() })?;
            open.extend(links.manifests.iter().map(|m| m.digest).filter(|digest| self.store().has(digest)));
            layers.extend(links.layers);
        }
        Ok(layers)
    }
}
