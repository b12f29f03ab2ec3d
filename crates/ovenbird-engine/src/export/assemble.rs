//! A solved plan to an image: layers, config, manifest, index; every blob made here goes to the store.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use jiff::Timestamp;
use ovenbird_oci::image::{History, media};
use ovenbird_oci::layer::{self, Elsewhere, Needles, Owners, PackOptions, Packed};
use ovenbird_oci::registry::HeadStart;
use ovenbird_oci::{Descriptor, Digest, ImageConfig, Index, Manifest, Platform};

use crate::cache::{self, Chain, Filed, Link, SharedLayer, document};
use crate::error::BuildError;
use crate::event::Event;
use crate::export::cache as cache_export;
use crate::export::leak::Gate;
use crate::ops::file::Lent;
use crate::ops::{Session, image};
use crate::plan::Plan;
use crate::snapshot::LayerDir;
use crate::state::SnapshotId;

/// One platform's image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assembled {
    /// Which platform.
    pub platform: Platform,
    /// Its manifest.
    pub manifest: Descriptor,
    /// Digest of its config.
    pub config: Digest,
    /// What it is made of.
    pub chain: Chain,
}

/// Makes the image of a solved plan. Its times are those of its steps, so an unchanged build gives the same image; with a fixed time they
/// are all that time.
///
/// With `inline`, the manifest says which of these results its layers hold.
pub fn assemble(
    session: &Session,
    gate: &Gate,
    plan: &Plan,
    chain: &[Arc<Link>],
    inline: Option<&[Filed]>,
) -> Result<Assembled, BuildError> {
    let Parts { layers, diff_ids, inherited, created } = parts(session, gate, chain)?;
    let fixed = session.input.source_date_epoch.map(rfc3339);
    let base_created = plan.base.as_ref().and_then(|base| base.config.created.clone());
    let mut latest = fixed.clone().or(base_created).unwrap_or_else(|| rfc3339(0));
    let mut created = created.into_iter();
    let mut config = plan.config.clone();
    config.rootfs.kind = "layers".into();
    config.rootfs.diff_ids = diff_ids;
    config.history = plan.base.as_ref().map(|base| base.config.history.clone()).unwrap_or_default();
    // Some tools write images without history; Docker refuses to load a config whose history and layers disagree.
    let described = config.history.iter().filter(|entry| !entry.empty_layer).count();
    for _ in described..inherited {
        config.history.push(History { created_by: Some("unknown".into()), ..History::default() });
    }
    for entry in &plan.history {
        if entry.layer
            && let Some(time) = created.next()
        {
            latest = fixed.clone().unwrap_or_else(|| rfc3339(time));
        }
        config.history.push(History {
            created: Some(latest.clone()),
            created_by: Some(entry.created_by.clone()),
            comment: Some("ovenbird.dockerfile.v0".into()),
            author: None,
            empty_layer: !entry.layer,
        });
    }
    config.created = Some(latest);
    gate.check_document("config", &config)?;
    gate.check_document("annotations", &session.input.annotations)?;
    let docker = session.input.docker_media_types;
    let config_digest = write_json(session, &config)?;
    let mut annotations = session.input.annotations.clone();
    if let Some(document) = inline.map(|filed| cache_export::inline(session, gate, filed, chain, &layers)).transpose()?.flatten() {
        annotations.insert(document::ANNOTATION.into(), document);
    }
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(if docker { media::DOCKER_MANIFEST } else { media::OCI_MANIFEST }.into()),
        config: descriptor(session, if docker { media::DOCKER_CONFIG } else { media::OCI_CONFIG }, config_digest)?,
        layers,
        annotations,
    };
    let digest = write_json(session, &manifest)?;
    cache::save_image(session.state, &digest, chain)?;
    let mut manifest = descriptor(session, manifest.media_type.as_deref().unwrap_or(media::OCI_MANIFEST), digest)?;
    manifest.platform = Some(platform_of(&config, &plan.platform));
    Ok(Assembled { platform: plan.platform.clone(), manifest, config: config_digest, chain: chain.to_vec() })
}

/// One index over several platforms.
pub fn index(session: &Session, images: &[Assembled]) -> Result<Descriptor, BuildError> {
    let media_type = if session.input.docker_media_types { media::DOCKER_LIST } else { media::OCI_INDEX };
    let index = Index {
        schema_version: 2,
        media_type: Some(media_type.into()),
        manifests: images.iter().map(|image| image.manifest.clone()).collect(),
        annotations: BTreeMap::new(),
    };
    let digest = write_json(session, &index)?;
    descriptor(session, media_type, digest)
}

pub(super) fn rfc3339(seconds: i64) -> String {
    Timestamp::from_second(seconds).unwrap_or(Timestamp::UNIX_EPOCH).to_string()
}

/// What a chain is made of.
#[derive(Default)]
struct Parts {
    layers: Vec<Descriptor>,
    diff_ids: Vec<Digest>,
    /// How many of the layers the base image brought.
    inherited: usize,
    /// When the others were made.
    created: Vec<i64>,
}

fn parts(session: &Session, gate: &Gate, chain: &[Arc<Link>]) -> Result<Parts, BuildError> {
    let mut parts = Parts::default();
    for (at, link) in chain.iter().enumerate() {
        session.check_stop()?;
        match &**link {
            Link::Shared(shared) => {
                let layer = shared_layer(session, gate, shared, &chain[..=at])?;
                let media_type = layer_media_type(&layer.media_type, session.input.docker_media_types);
                parts.layers.push(Descriptor { media_type, ..layer });
                parts.diff_ids.push(shared.diff_id);
                parts.created.push(shared.created);
            }
            Link::Image { manifest, .. } => {
                let (manifest, config) = image::read_image(session, manifest)?;
                parts.inherited += manifest.layers.len();
                parts.layers.extend(manifest.layers.into_iter().map(|layer| Descriptor {
                    media_type: layer_media_type(&layer.media_type, session.input.docker_media_types),
                    ..layer
                }));
                parts.diff_ids.extend(config.rootfs.diff_ids);
            }
            Link::Diff { id, created } => {
                let packed = pack(session, gate, id)?;
                let media_type = layer_media_type(&packed.media_type, session.input.docker_media_types);
                parts.layers.push(Descriptor::new(media_type, packed.digest, packed.size));
                parts.diff_ids.push(packed.diff_id);
                parts.created.push(*created);
            }
        }
    }
    Ok(parts)
}

/// A layer of another machine, as it is when it is as it should be. Otherwise it is fetched: for another compression, or because it was not
/// searched for all secrets of this build.
fn shared_layer(session: &Session, gate: &Gate, shared: &SharedLayer, chain: &[Arc<Link>]) -> Result<Descriptor, BuildError> {
    let (same, searched) = (shared.compression == session.input.compression.to_string(), gate.names().is_subset(&shared.searched));
    if same && searched {
        return Ok(shared.descriptor());
    }
    image::snapshot(session, chain)?;
    if same {
        if let Some((needles, places)) = gate.unsearched(session.state, &shared.snapshot()) {
            search(session, gate, &shared.snapshot(), &shared.digest, &needles, &places)?;
        }
        return Ok(shared.descriptor());
    }
    let packed = pack(session, gate, &shared.snapshot())?;
    Ok(packed.descriptor())
}

/// A manifest holds layer types of its own family; zstd has no Docker name.
pub(super) fn layer_media_type(media_type: &str, docker: bool) -> String {
    let pairs = [(media::OCI_LAYER_GZIP, media::DOCKER_LAYER_GZIP), (media::OCI_LAYER, media::DOCKER_LAYER)];
    let found = pairs.iter().find(|(oci, dock)| media_type == *oci || media_type == *dock);
    match found {
        Some((oci, dock)) => if docker { *dock } else { *oci }.to_owned(),
        None => media_type.to_owned(),
    }
}

/// The layer of a snapshot: packed now, or before.
pub(super) fn pack(session: &Session, gate: &Gate, id: &SnapshotId) -> Result<Packed, BuildError> {
    let options = PackOptions { compression: session.input.compression, mtime: session.input.source_date_epoch, threads: threads() };
    let compression = options.compression;
    let variant = match options.mtime {
        Some(time) => format!("{compression}-{time}"),
        None => compression.to_string(),
    };
    let cached = session.state.packed(id, &variant);
    let unsearched = gate.unsearched(session.state, id);
    if let (Some(packed), None) = (&cached, &unsearched) {
        return Ok(packed.clone());
    }
    if let (Some(packed), Some((needles, places))) = (cached, unsearched) {
        search(session, gate, id, &packed.digest, &needles, &places)?;
        return Ok(packed);
    }
    let layer = layer_dir(session, id)?;
    let failed = |source| BuildError::Layer { layer: id.as_str().to_owned(), source };
    let event = |current, total, done| Event::Progress {
        id: format!("packing {}", id.as_str()),
        label: "packing layer".into(),
        current,
        total,
        done,
    };
    session.sink.emit(event(0, None, false));
    let (head_start, store) = (session.head_start(), session.state.store());
    let growth = head_start.as_ref().map(HeadStart::growth);
    let (packed, found) =
        layer::pack_searched(&layer.dir, &layer.owners, &options, store, gate.needles(), &Elsewhere::new(), growth).map_err(failed)?;
    session.sink.emit(event(packed.size, Some(packed.size), true));
    session.state.set_packed(id, &variant, &packed)?;
    gate.check_layer(&packed.digest, &found)?;
    gate.passed(session.state, id)?;
    session.complete(head_start, &packed);
    Ok(packed)
}

/// Packs what a step wrote before it becomes a snapshot: a layer that nothing of the build reads, with content that is still where it was.
pub fn pack_now(session: &Session, gate: &Gate, dir: &Path, owners: &Owners, lent: &[Lent]) -> Result<SharedLayer, BuildError> {
    let options = PackOptions { compression: session.input.compression, mtime: None, threads: threads() };
    let failed = |source| BuildError::Layer { layer: "of a copy".into(), source };
    let elsewhere: Elsewhere = lent.iter().map(Lent::borrow).collect::<Result<_, _>>().map_err(BuildError::output(dir))?;
    let (head_start, store) = (session.head_start(), session.state.store());
    let growth = head_start.as_ref().map(HeadStart::growth);
    let (packed, found) = layer::pack_searched(dir, owners, &options, store, gate.needles(), &elsewhere, growth).map_err(failed)?;
    gate.check_layer(&packed.digest, &found)?;
    session.complete(head_start, &packed);
    Ok(shared(session, gate, packed, Timestamp::now().as_second()))
}

/// A layer that was packed here, as any machine may know it.
pub(super) fn shared(session: &Session, gate: &Gate, packed: Packed, created: i64) -> SharedLayer {
    SharedLayer {
        digest: packed.digest,
        size: packed.size,
        media_type: packed.media_type,
        diff_id: packed.diff_id,
        created,
        compression: session.input.compression.to_string(),
        epoch: session.input.source_date_epoch,
        searched: gate.names(),
    }
}

/// Looks for secrets in a layer that was packed when they were not known.
fn search(session: &Session, gate: &Gate, id: &SnapshotId, digest: &Digest, needles: &Needles, places: &[usize]) -> Result<(), BuildError> {
    let layer = layer_dir(session, id)?;
    let mut found =
        layer::search(&layer.dir, &layer.owners, needles).map_err(|source| BuildError::Layer { layer: id.as_str().to_owned(), source })?;
    for found in &mut found {
        found.needle = places[found.needle];
    }
    gate.check_layer(digest, &found)?;
    gate.passed(session.state, id)
}

fn layer_dir(session: &Session, id: &SnapshotId) -> Result<LayerDir, BuildError> {
    session.state.layer_dir(id)?.ok_or_else(|| BuildError::Malformed {
        digest: id.as_str().to_owned(),
        reason: "its files were removed while the build ran".into(),
    })
}

pub(super) fn threads() -> usize {
    std::thread::available_parallelism().map_or(2, std::num::NonZero::get).min(8)
}

fn platform_of(config: &ImageConfig, wanted: &Platform) -> Platform {
    Platform {
        architecture: if config.architecture.is_empty() { wanted.architecture.clone() } else { config.architecture.clone() },
        os: if config.os.is_empty() { wanted.os.clone() } else { config.os.clone() },
        variant: config.variant.clone(),
        os_version: config.os_version.clone(),
    }
}

pub(super) fn write_json<T: serde::Serialize>(session: &Session, value: &T) -> Result<Digest, BuildError> {
    let bytes = serde_json::to_vec(value).map_err(|error| BuildError::Malformed { digest: "new".into(), reason: error.to_string() })?;
    Ok(session.state.store().write(&bytes)?)
}

pub(super) fn descriptor(session: &Session, media_type: &str, digest: Digest) -> Result<Descriptor, BuildError> {
    let path = session.state.store().blob_path(&digest);
    let size = std::fs::metadata(&path).map_err(BuildError::output(&path))?.len();
    Ok(Descriptor::new(media_type, digest, size))
}
