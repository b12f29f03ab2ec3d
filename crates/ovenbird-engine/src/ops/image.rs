//! Base images: names to manifests, manifests to diff folders. Layers are fetched and unpacked only
//! when something reads them.

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use ovenbird_oci::archive::ArchiveError;
use ovenbird_oci::image::media;
use ovenbird_oci::layer::{self, LayerError};
use ovenbird_oci::registry::Fetched;
use ovenbird_oci::store::StoreError;
use ovenbird_oci::{Descriptor, Digest, ImageConfig, Index, Manifest, Platform, Reference, archive};

use crate::cache::{self, Link, SharedLayer};
use crate::error::BuildError;
use crate::event::Event;
use crate::input::PullPolicy;
use crate::ops::{Session, imports};
use crate::plan::{ImageRequest, ResolvedImage};
use crate::snapshot::{LayerDir, Snapshot, view};
use crate::state::SnapshotId;

/// Indexes in indexes are legal; deeper than this they are a trap.
const MAX_DEPTH: usize = 4;
/// Most indexes of one image.
const MAX_INDEXES: usize = 100;
/// Stands for the origin of what did not come from a registry.
const NOWHERE: &str = "localhost/oci-layout";

fn is_nowhere(reference: &Reference) -> bool {
    reference.registry() == "localhost" && matches!(reference.repository(), "oci-layout" | "exported")
}

/// Finds an image and reads its manifest and config; layers stay where they are.
pub fn resolve(session: &Session, request: &ImageRequest) -> Result<ResolvedImage, BuildError> {
    if let Some(layout) = request.name.strip_prefix("oci-layout://") {
        return resolve_layout(session, layout, request).map_err(|error| of_layout(&request.name, error));
    }
    let fail = |reason: String| BuildError::Image { name: request.name.clone(), reason, source: None };
    let reference: Reference = request.name.parse().map_err(|error| fail(format!("{error}")))?;
    let store = session.state.store();
    let pull = session.input.pull;
    let local = match store.resolve(&reference) {
        _ if pull == PullPolicy::Always => None,
        // The name says its digest: what is damaged is fetched below.
        Err(StoreError::Corrupt { .. }) => None,
        // A name whose image is gone says nothing.
        other => other?.map(|found| found.digest).filter(|digest| store.blob_path(digest).exists()),
    };
    let known = local.or_else(|| reference.digest().copied().filter(|digest| store.has(digest)));
    let (media_type, bytes, digest) = match known {
        Some(digest) => {
            let bytes = document(session, &reference, &digest, &request.name)?;
            (media_type_of(&bytes), bytes, digest)
        }
        None if pull == PullPolicy::Never => {
            return Err(fail("it is not in the local store and --pull=never was given".into()));
        }
        None => {
            let fetched = fetch_manifest(session, &reference, &request.name)?;
            (fetched.descriptor.media_type, fetched.bytes, fetched.descriptor.digest)
        }
    };
    pick(session, request, &reference, &media_type, bytes, digest)
}

/// A manifest or index: from the store when it is whole there, else from where the image comes from.
fn document(session: &Session, from: &Reference, digest: &Digest, name: &str) -> Result<Vec<u8>, BuildError> {
    let damage = match session.state.store().read(digest) {
        Ok(bytes) => return Ok(bytes),
        Err(StoreError::Missing { .. }) if !is_nowhere(from) => {
            return Ok(fetch_manifest(session, &from.with_digest(*digest), name)?.bytes);
        }
        Err(damage @ StoreError::Corrupt { .. }) if !is_nowhere(from) => damage,
        Err(other) => return Err(other.into()),
    };
    warn_damaged(session, &damage);
    let fetched = session.ask(from.registry(), session.client.manifest(&from.with_digest(*digest)))?;
    let fetched = fetched.map_err(|source| BuildError::Damaged { damage, source })?;
    session.state.store().write(&fetched.bytes)?;
    Ok(fetched.bytes)
}

fn warn_damaged(session: &Session, damage: &StoreError) {
    session.sink.emit(Event::Warning { code: "corrupt-blob".into(), message: format!("it is fetched again: {damage}"), line: None });
}

/// Goes down an index to the platform's manifest.
fn pick(
    session: &Session,
    request: &ImageRequest,
    reference: &Reference,
    media_type: &str,
    bytes: Vec<u8>,
    digest: Digest,
) -> Result<ResolvedImage, BuildError> {
    let fail = |reason: String| BuildError::Image { name: request.name.clone(), reason, source: None };
    let (bytes, digest) = if is_index(media_type) { find_platform(session, request, reference, bytes, digest)? } else { (bytes, digest) };
    let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|error| fail(format!("its manifest is malformed: {error}")))?;
    manifest.check_layers().map_err(|error| fail(format!("its {error}")))?;
    let from = reference.with_digest(digest);
    let config: ImageConfig = serde_json::from_slice(&read_config(session, &manifest.config, &from, &request.name)?)
        .map_err(|error| fail(format!("its config is malformed: {error}")))?;
    if config.rootfs.diff_ids.len() != manifest.layers.len() {
        return Err(fail(format!("it has {} layers but {} diff ids", manifest.layers.len(), config.rootfs.diff_ids.len())));
    }
    for layer in &manifest.layers {
        // Who asks for the image anew gets a whole one: what is here already is read, and removed when it is damaged.
        if session.input.pull == PullPolicy::Always && session.state.store().holds(layer) {
            match session.state.store().verify(&layer.digest) {
                Ok(()) => {}
                Err(damage @ StoreError::Corrupt { .. }) => warn_damaged(session, &damage),
                Err(other) => return Err(other.into()),
            }
        }
        if !session.state.store().holds(layer) && !is_nowhere(&from) {
            session.state.set_origin(&layer.digest, &from)?;
        }
    }
    Ok(ResolvedImage { reference: from, manifest: digest, config })
}

/// The manifest for the platform, through nested indexes.
fn find_platform(
    session: &Session,
    request: &ImageRequest,
    reference: &Reference,
    bytes: Vec<u8>,
    digest: Digest,
) -> Result<(Vec<u8>, Digest), BuildError> {
    let fail = |reason: String| BuildError::Image { name: request.name.clone(), reason, source: None };
    let mut seen = HashSet::from([digest]);
    let (mut level, mut have) = (vec![bytes], vec![]);
    for _ in 0..=MAX_DEPTH {
        let mut below = vec![];
        for bytes in std::mem::take(&mut level) {
            let index: Index = serde_json::from_slice(&bytes).map_err(|error| fail(format!("its index is malformed: {error}")))?;
            if let Some(found) = choose(&index, &request.platform) {
                return Ok((document(session, reference, &found.digest, &request.name)?, found.digest));
            }
            have.extend(index.describe());
            let fits = |m: &Descriptor| m.platform.as_ref().is_none_or(|p| request.platform.matches(p));
            below.extend(index.manifests.into_iter().filter(|m| m.is_index() && fits(m) && seen.insert(m.digest)));
        }
        if below.is_empty() {
            let have = if have.is_empty() { "nothing at all".into() } else { have.join(", ") };
            return Err(fail(format!("it has no image for {}; it has {have}; choose one with --platform", request.platform)));
        }
        if seen.len() > MAX_INDEXES {
            break;
        }
        for index in below {
            level.push(document(session, reference, &index.digest, &request.name)?);
        }
    }
    Err(fail(format!("it has more than {MAX_INDEXES} indexes, or more than {MAX_DEPTH} in each other")))
}

/// Reads a config; one that is missing or damaged is fetched.
fn read_config(session: &Session, config: &Descriptor, from: &Reference, name: &str) -> Result<Vec<u8>, BuildError> {
    let store = session.state.store();
    let damage = match store.check(config).and_then(|()| store.read(&config.digest)) {
        Ok(bytes) => return Ok(bytes),
        Err(damage @ (StoreError::Missing { .. } | StoreError::Damaged { .. })) => damage,
        Err(damage @ StoreError::Corrupt { .. }) => {
            store.remove(&config.digest)?;
            damage
        }
        Err(other) => return Err(other.into()),
    };
    if is_nowhere(from) {
        return Err(damage.into());
    }
    let missing = matches!(damage, StoreError::Missing { .. });
    if !missing {
        warn_damaged(session, &damage);
    }
    let fetched = session.ask(from.registry(), session.client.fetch_blob(from, config, store, &session.progress("pulling")))?;
    fetched.map_err(|source| {
        if missing {
            BuildError::Image { name: name.to_owned(), reason: source.to_string(), source: Some(source) }
        } else {
            BuildError::Damaged { damage, source }
        }
    })?;
    Ok(store.read(&config.digest)?)
}

/// What is wrong with a layout is the fault of who gave it, wherever it is found.
fn of_layout(name: &str, error: BuildError) -> BuildError {
    let name = name.to_owned();
    match error {
        BuildError::Image { reason, .. } => BuildError::Layout { name, reason },
        BuildError::Archive(error @ (ArchiveError::Malformed { .. } | ArchiveError::Io { action: "read", .. })) => {
            BuildError::Layout { name, reason: error.to_string() }
        }
        BuildError::Layer { source, .. } if !matches!(source, LayerError::Io { .. } | LayerError::Store(_)) => {
            BuildError::Layout { name, reason: source.to_string() }
        }
        other => other,
    }
}

fn resolve_layout(session: &Session, layout: &str, request: &ImageRequest) -> Result<ResolvedImage, BuildError> {
    let fail = |reason: String| BuildError::Image { name: request.name.clone(), reason, source: None };
    let (rest, digest) = match layout.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest.parse::<Digest>().map_err(|error| fail(error.to_string()))?)),
        None => (layout, None),
    };
    let (path, tag) = match rest.rsplit_once(':') {
        Some((path, tag)) if !tag.contains('/') && !Path::new(rest).exists() => (path, Some(tag)),
        _ => (rest, None),
    };
    let images = archive::read_dir(session.state.store(), Path::new(path))?;
    let found = images
        .iter()
        .find(|(descriptor, names)| match (&digest, tag) {
            (Some(digest), _) => descriptor.digest == *digest,
            (None, Some(tag)) => names.iter().any(|name| name.tag() == Some(tag)),
            (None, None) => true,
        })
        .ok_or_else(|| fail("the layout has no such image".into()))?;
    let bytes = session.state.store().read(&found.0.digest)?;
    let reference: Reference = NOWHERE.parse().map_err(|error| fail(format!("{error}")))?;
    pick(session, request, &reference, &found.0.media_type, bytes, found.0.digest)
}

fn fetch_manifest(session: &Session, reference: &Reference, name: &str) -> Result<Fetched, BuildError> {
    session.sink.emit(Event::Message { text: format!("resolving {}", reference.familiar()) });
    let fetched = session.ask(reference.registry(), session.client.manifest(reference))?.map_err(|source| BuildError::Image {
        name: name.to_owned(),
        reason: source.to_string(),
        source: Some(source),
    })?;
    session.state.store().write(&fetched.bytes)?;
    Ok(fetched)
}

/// The manifest of an index that fits a platform best; indexes in it are not looked at.
pub fn choose<'i>(index: &'i Index, platform: &Platform) -> Option<&'i Descriptor> {
    let images = || index.manifests.iter().filter(|m| !m.is_attestation() && !m.is_index());
    let fits = |m: &&Descriptor| m.platform.as_ref().is_some_and(|p| p == platform);
    images()
        .find(fits)
        .or_else(|| images().find(|m| m.platform.as_ref().is_some_and(|p| platform.matches(p))))
        .or_else(|| images().next().filter(|m| index.manifests.len() == 1 && m.platform.is_none()))
}

/// Is this the media type of an index or manifest list?
pub fn is_index(media_type: &str) -> bool {
    matches!(media_type, media::OCI_INDEX | media::DOCKER_LIST)
}

/// The media type a manifest or index says it has.
pub fn media_type_of(bytes: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Head {
        media_type: Option<String>,
        manifests: Option<serde_json::Value>,
    }
    match serde_json::from_slice::<Head>(bytes) {
        Ok(Head { media_type: Some(media_type), .. }) => media_type,
        Ok(Head { manifests: Some(_), .. }) => media::OCI_INDEX.into(),
        _ => media::OCI_MANIFEST.into(),
    }
}

/// Makes the diff folders of a chain readable.
pub fn snapshot(session: &Session, chain: &[Arc<Link>]) -> Result<Snapshot, BuildError> {
    let mut snapshot = Snapshot::default();
    fetch_shared(session, chain)?;
    for link in chain {
        match &**link {
            Link::Diff { id, .. } => {
                let layer = session.layer_dir(id)?.ok_or_else(|| BuildError::Malformed {
                    digest: id.as_str().to_owned(),
                    reason: "its files were removed while the build ran".into(),
                })?;
                snapshot.layers.push(layer);
            }
            Link::Image { manifest, reference } => unpack_image(session, manifest, reference, &mut snapshot)?,
            Link::Shared(shared) => {
                let nowhere = nowhere(&shared.descriptor())?;
                let unpacked = unpack_layer(session, &shared.descriptor(), &shared.diff_id, &nowhere, &snapshot);
                snapshot.layers.push(unpacked.map_err(|error| imports::spoil(session, &shared.digest, error))?);
            }
        }
    }
    Ok(snapshot)
}

/// Fetches the layers of other machines that are neither unpacked nor in the store, several at once.
fn fetch_shared(session: &Session, chain: &[Arc<Link>]) -> Result<(), BuildError> {
    let missing: Vec<&SharedLayer> = chain
        .iter()
        .filter_map(|link| if let Link::Shared(layer) = &**link { Some(layer) } else { None })
        .filter(|layer| !session.state.has_snapshot(&layer.snapshot()))
        .collect();
    let blobs: Vec<Descriptor> = missing.iter().map(|layer| layer.descriptor()).collect();
    let fetched = fetch_known(session, &blobs.iter().collect::<Vec<_>>());
    fetched.map_err(|error| match missing.iter().zip(&blobs).find(|(_, blob)| !session.state.store().holds(blob)) {
        Some((layer, _)) => imports::spoil(session, &layer.digest, error),
        None => error,
    })
}

/// Fetches blobs from where they are on record.
pub fn fetch_known(session: &Session, blobs: &[&Descriptor]) -> Result<(), BuildError> {
    match blobs.first() {
        Some(first) => fetch(session, blobs, &nowhere(first)?),
        None => Ok(()),
    }
}

/// Where a blob is whose origin is not known.
fn nowhere(blob: &Descriptor) -> Result<Reference, BuildError> {
    NOWHERE.parse().map_err(|error| BuildError::Malformed { digest: blob.digest.to_string(), reason: format!("{error}") })
}

fn unpack_image(session: &Session, digest: &Digest, reference: &Reference, onto: &mut Snapshot) -> Result<(), BuildError> {
    // An image made here is made of snapshots that are still there, most times.
    if let Some(chain) = cache::find_image(session.state, digest) {
        onto.layers.extend(snapshot(session, &chain)?.layers);
        return Ok(());
    }
    let (manifest, config) = read_image(session, digest)?;
    let missing: Vec<&Descriptor> = manifest
        .layers
        .iter()
        .zip(&config.rootfs.diff_ids)
        .filter(|(_, diff_id)| !session.state.has_snapshot(&SnapshotId::of_layer(diff_id)))
        .map(|(layer, _)| layer)
        .collect();
    fetch(session, &missing, reference)?;
    for (descriptor, diff_id) in manifest.layers.iter().zip(&config.rootfs.diff_ids) {
        session.check_stop()?;
        let layer = unpack_layer(session, descriptor, diff_id, reference, onto)?;
        onto.layers.push(layer);
    }
    Ok(())
}

/// Reads manifest and config of an image in the store.
pub fn read_image(session: &Session, digest: &Digest) -> Result<(Manifest, ImageConfig), BuildError> {
    let malformed = |error: serde_json::Error| BuildError::Malformed { digest: digest.to_string(), reason: error.to_string() };
    let manifest: Manifest = serde_json::from_slice(&session.state.store().read(digest)?).map_err(malformed)?;
    let config: ImageConfig = serde_json::from_slice(&session.state.store().read(&manifest.config.digest)?).map_err(malformed)?;
    if manifest.layers.len() != config.rootfs.diff_ids.len() {
        return Err(BuildError::Malformed { digest: digest.to_string(), reason: "layers and diff ids differ in number".into() });
    }
    Ok((manifest, config))
}

/// Fetches blobs that are not in the store, several at once.
pub fn fetch(session: &Session, blobs: &[&Descriptor], reference: &Reference) -> Result<(), BuildError> {
    let store = session.state.store();
    let mut missing = vec![];
    for &blob in blobs {
        let Err(damage) = store.check(blob) else { continue };
        let Some(origin) = session.state.origin(&blob.digest).or_else(|| (!is_nowhere(reference)).then(|| reference.clone())) else {
            return Err(damage.into());
        };
        let damage = match damage {
            StoreError::Missing { .. } => None,
            damage @ StoreError::Damaged { .. } => Some(damage),
            other => return Err(other.into()),
        };
        if let Some(damage) = &damage {
            warn_damaged(session, damage);
        }
        missing.push((blob.clone(), origin, damage));
    }
    if missing.is_empty() {
        return Ok(());
    }
    let progress = session.progress("pulling");
    let pulled = async {
        let mut tasks = tokio::task::JoinSet::new();
        for (blob, origin, damage) in missing {
            let (client, store, progress) = (session.client.clone(), store.clone(), progress.clone());
            tasks.spawn(async move {
                let fetched = client.fetch_blob(&origin, &blob, &store, &progress).await;
                fetched.map_err(|source| match damage {
                    Some(damage) => BuildError::Damaged { damage, source },
                    None => source.into(),
                })
            });
        }
        while let Some(done) = tasks.join_next().await {
            match done {
                Ok(result) => result?,
                Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                Err(_) => return Err(BuildError::Cancelled),
            }
        }
        Ok(())
    };
    // Progress says what is waited for.
    session.runtime.block_on(super::attend(pulled, &session.stop, Duration::MAX, || {}))?
}

fn unpack_layer(
    session: &Session,
    descriptor: &Descriptor,
    diff_id: &Digest,
    reference: &Reference,
    below: &Snapshot,
) -> Result<Arc<LayerDir>, BuildError> {
    let id = SnapshotId::of_layer(diff_id);
    let lock = session.unpack_lock(diff_id);
    let _one = lock.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(layer) = session.layer_dir(&id)? {
        return Ok(layer);
    }
    let name = format!("layer {} of the OCI layout", descriptor.digest);
    let layout = |error| if is_nowhere(reference) { of_layout(&name, error) } else { error };
    if let Err(error) = unpack_once(session, descriptor, diff_id, below, &id) {
        let BuildError::Layer { .. } = error else { return Err(error) };
        // A blob that went bad on disk is removed and fetched again, once.
        let Err(damage @ StoreError::Corrupt { .. }) = session.state.store().verify(&descriptor.digest) else {
            return Err(layout(error));
        };
        warn_damaged(session, &damage);
        fetch(session, &[descriptor], reference).map_err(|error| match error {
            BuildError::Store(StoreError::Missing { .. }) => damage.into(),
            BuildError::Registry(source) => BuildError::Damaged { damage, source },
            other => other,
        })?;
        unpack_once(session, descriptor, diff_id, below, &id).map_err(layout)?;
    }
    session
        .layer_dir(&id)?
        .ok_or_else(|| BuildError::Malformed { digest: diff_id.to_string(), reason: "it vanished after unpacking".into() })
}

fn unpack_once(session: &Session, descriptor: &Descriptor, diff_id: &Digest, below: &Snapshot, id: &SnapshotId) -> Result<(), BuildError> {
    let work = session.state.work_dir()?;
    let dir = work.subdir("fs")?;
    let blob = session.state.store().open_blob(&descriptor.digest)?;
    let lower_view = view::View::new(below);
    let lower = |path: &Path| lower_view.on_disk(path).ok().flatten();
    let label = format!("unpacking {}", descriptor.digest.short());
    let event = |current, done| Event::Progress {
        id: format!("unpacking {}", descriptor.digest),
        label: label.clone(),
        current,
        total: Some(descriptor.size),
        done,
    };
    session.sink.emit(event(0, false));
    let owners = layer::unpack(blob, &dir, Some(diff_id), session.state.ownership(), &lower)
        .map_err(|source| BuildError::Layer { layer: descriptor.digest.to_string(), source })?;
    session.sink.emit(event(descriptor.size, true));
    session.state.commit(work, Some(id.clone()), &owners)?;
    Ok(())
}
