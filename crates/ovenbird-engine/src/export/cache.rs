//! Results of a build for the caches of other machines.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use ovenbird_oci::image::media;
use ovenbird_oci::layer::{self, Compression, Elsewhere, Owners, PackOptions};
use ovenbird_oci::{Descriptor, Digest, Manifest, Reference, archive};

use super::{assemble, output};
use crate::cache::document::{self, Contents, Entry, MountLayer, Part};
use crate::cache::{Filed, Link, SharedLayer};
use crate::error::BuildError;
use crate::event::Event;
use crate::export::leak::Gate;
use crate::input::{CacheExport, CacheMode, CacheSource, Exportable};
use crate::ops::{self, Session, progress_events};
use crate::state::SnapshotId;

/// Only Ovenbird reads cache mounts, and they are large.
const MOUNT_COMPRESSION: Compression = Compression::Zstd(3);

/// Writes the results of a build where `export` says. Layers that were pushed to `published` are mounted from there.
pub fn export(
    session: &Session,
    gate: &Gate,
    results: &Exportable,
    export: &CacheExport,
    published: &[Reference],
) -> Result<(), BuildError> {
    session.sink.emit(Event::Message { text: format!("exporting the cache {}", export.to) });
    let mut shared = Shared { session, gate, layers: HashMap::new(), leaking: HashSet::new() };
    let mut entries = vec![];
    for filed in &results.filed {
        if export.mode == CacheMode::Max || results.images.iter().any(|image| image.starts_with(&filed.record.chain)) {
            entries.extend(shared.entry(filed)?);
        }
    }
    let mut layers: Vec<Descriptor> = vec![];
    let mut seen = HashSet::new();
    for part in entries.iter().flat_map(|entry| &entry.chain) {
        if let Part::Layer(layer) = part
            && seen.insert(layer.digest)
        {
            let media_type = assemble::layer_media_type(&layer.media_type, export.docker_media_types);
            layers.push(Descriptor { media_type, ..layer.descriptor() });
        }
    }
    let mut mounts = vec![];
    if export.mounts {
        for name in &results.mounts {
            mounts.extend(mount(session, gate, name)?);
        }
        layers.extend(mounts.iter().map(|mount: &MountLayer| mount.blob.clone()).filter(|blob| seen.insert(blob.digest)));
    }
    let store = session.state.store();
    let config = store.write(&document::write(&Contents { entries, mounts }, &layers))?;
    let docker = export.docker_media_types;
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(if docker { media::DOCKER_MANIFEST } else { media::OCI_MANIFEST }.into()),
        config: assemble::descriptor(session, document::MEDIA_TYPE, config)?,
        layers,
        annotations: BTreeMap::new(),
    };
    let digest = assemble::write_json(session, &manifest)?;
    let target = assemble::descriptor(session, manifest.media_type.as_deref().unwrap_or(media::OCI_MANIFEST), digest)?;
    match &export.to {
        CacheSource::Registry(reference) => push(session, &manifest, &target, reference, published),
        CacheSource::Local(local) => {
            output::complete(session, &target)?;
            let name = format!("localhost/cache:{}", local.tag);
            let name: Reference = name.parse().map_err(|error| BuildError::Refused {
                option: format!("--cache-to type=local,tag={}", local.tag),
                reason: format!("{error}"),
            })?;
            Ok(archive::write_oci_dir(store, &target, &[name], &local.dir)?)
        }
    }
}

/// The document of an image that carries its own cache: what its layers alone lead to.
pub fn inline(
    session: &Session,
    gate: &Gate,
    filed: &[Filed],
    chain: &[Arc<Link>],
    layers: &[Descriptor],
) -> Result<Option<String>, BuildError> {
    let mut shared = Shared { session, gate, layers: HashMap::new(), leaking: HashSet::new() };
    let mut entries = vec![];
    for filed in filed.iter().filter(|filed| chain.starts_with(&filed.record.chain)) {
        entries.extend(shared.entry(filed)?);
    }
    if entries.is_empty() {
        return Ok(None);
    }
    Ok(String::from_utf8(document::write(&Contents { entries, mounts: vec![] }, layers)).ok())
}

/// The folder of a cache mount as a layer; `None`: there is none, or it is not for others. Who reads a cache mount can do without it.
fn mount(session: &Session, gate: &Gate, name: &Digest) -> Result<Option<MountLayer>, BuildError> {
    // One that no step of this build needed is handed on as it came.
    let Some((_lock, dir)) = ops::mount::existing_cache(session, name)? else { return Ok(session.imports.mount(session, name)) };
    let options = PackOptions { compression: MOUNT_COMPRESSION, mtime: None, threads: assemble::threads() };
    let failed = |source| BuildError::Layer { layer: "of a cache mount".into(), source };
    let packed = layer::pack_searched(&dir, &Owners::new(), &options, session.state.store(), gate.needles(), &Elsewhere::new(), None);
    let checked = packed.map_err(failed).and_then(|(packed, found)| gate.check_layer(&packed.digest, &found).map(|()| packed));
    match checked {
        Ok(packed) => Ok(Some(MountLayer { name: *name, blob: packed.descriptor(), diff_id: packed.diff_id })),
        Err(error @ (BuildError::Leak { .. } | BuildError::Layer { .. })) => {
            let message = format!("a cache mount is not exported: {error}");
            session.sink.emit(Event::Warning { code: "cache-mount".into(), message, line: None });
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn push(session: &Session, manifest: &Manifest, target: &Descriptor, to: &Reference, published: &[Reference]) -> Result<(), BuildError> {
    let beside = published.iter().find(|name| name.registry() == to.registry() && name.repository() != to.repository());
    let origin = |layer: &Digest| session.state.origin(layer).or_else(|| beside.cloned());
    let origins: BTreeMap<Digest, Reference> =
        manifest.layers.iter().filter_map(|layer| Some((layer.digest, origin(&layer.digest)?))).collect();
    let progress = progress_events(session.sink.clone(), "pushing");
    session.wait(session.client.push(session.state.store(), target, to, &origins, &progress))??;
    Ok(())
}

/// Turns results of this machine into those of any.
struct Shared<'s> {
    session: &'s Session<'s>,
    gate: &'s Gate,
    layers: HashMap<SnapshotId, Arc<SharedLayer>>,
    leaking: HashSet<SnapshotId>,
}

impl Shared<'_> {
    /// `None`: it holds a secret, and stays here.
    fn entry(&mut self, filed: &Filed) -> Result<Option<Entry>, BuildError> {
        let mut chain = vec![];
        for link in &filed.record.chain {
            chain.push(match &**link {
                Link::Image { manifest, .. } => Part::Base(*manifest),
                Link::Shared(layer) => Part::Layer(Arc::new(layer.clone())),
                Link::Diff { id, created } => match self.layer(id, *created)? {
                    Some(layer) => Part::Layer(layer),
                    None => return Ok(None),
                },
            });
        }
        Ok(Some(Entry { definition: filed.definition, content: filed.record.key, chain }))
    }

    fn layer(&mut self, id: &SnapshotId, created: i64) -> Result<Option<Arc<SharedLayer>>, BuildError> {
        if let Some(known) = self.layers.get(id) {
            return Ok(Some(known.clone()));
        }
        if self.leaking.contains(id) {
            return Ok(None);
        }
        self.session.check_stop()?;
        let packed = match assemble::pack(self.session, self.gate, id) {
            Err(BuildError::Leak { what, place, .. }) => {
                self.leaking.insert(id.clone());
                let message = format!("{what} is in what a step made ({place}): that step and what follows from it stay out of the cache");
                self.session.sink.emit(Event::Warning { code: "cache-leak".into(), message, line: None });
                return Ok(None);
            }
            other => other?,
        };
        let layer = Arc::new(assemble::shared(self.session, self.gate, packed, created));
        self.layers.insert(id.clone(), layer.clone());
        Ok(Some(layer))
    }
}
