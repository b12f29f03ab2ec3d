//! Base images: names to manifests, manifests to diff folders. Layers are fetched and unpacked only
//! when something reads them.

use std::path::Path;
use std::sync::PoisonError;

use ovenbird_oci::image::media;
use ovenbird_oci::layer::{self, LayerError};
use ovenbird_oci::registry::Fetched;
use ovenbird_oci::{Descriptor, Digest, ImageConfig, Index, Manifest, Platform, Reference, archive};

use crate::cache::{self, Link};
use crate::error::BuildError;
use crate::event::Event;
use crate::input::PullPolicy;
use crate::ops::Session;
use crate::plan::{ImageRequest, ResolvedImage};
use crate::snapshot::{LayerDir, Snapshot, view};
use crate::state::SnapshotId;

/// Finds an image and reads its manifest and config; layers stay where they are.
pub fn resolve(session: &Session, request: &ImageRequest) -> Result<ResolvedImage, BuildError> {
    if let Some(layout) = request.name.strip_prefix("oci-layout://") {
        return resolve_layout(session, layout, request);
    }
    let fail = |reason: String| BuildError::Image { name: request.name.clone(), reason, source: None };
    let reference: Reference = request.name.parse().map_err(|error| fail(format!("{error}")))?;
    let store = session.state.store();
    let pull = session.input.pull;
    let local = if pull == PullPolicy::Always { None } else { store.resolve(&reference)? };
    let pinned = reference.digest().filter(|digest| store.has(digest));
    let (media_type, bytes, digest) = match (local, pinned) {
        (Some(found), _) => (found.media_type, store.read(&found.digest)?, found.digest),
        (None, Some(digest)) => {
            let bytes = store.read(digest)?;
            (media_type_of(&bytes), bytes, *digest)
        }
        (None, None) if pull == PullPolicy::Never => {
            return Err(fail("it is not in the local store and --pull=never was given".into()));
        }
        (None, None) => {
            let fetched = fetch_manifest(session, &reference, &request.name)?;
            (fetched.descriptor.media_type, fetched.bytes, fetched.descriptor.digest)
        }
    };
    pick(session, request, &reference, &media_type, bytes, digest)
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
    let (bytes, digest) = if is_index(media_type) {
        let index: Index = serde_json::from_slice(&bytes).map_err(|error| fail(format!("its index is malformed: {error}")))?;
        let found = choose(&index, &request.platform).ok_or_else(|| {
            let have: Vec<String> = index.manifests.iter().filter_map(|m| m.platform.as_ref()).map(ToString::to_string).collect();
            fail(format!("it has no {} variant, only: {}", request.platform, have.join(", ")))
        })?;
        if !session.state.store().has(&found.digest) {
            fetch_manifest(session, &reference.with_digest(found.digest), &request.name)?;
        }
        (session.state.store().read(&found.digest)?, found.digest)
    } else {
        (bytes, digest)
    };
    let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|error| fail(format!("its manifest is malformed: {error}")))?;
    let from = reference.with_digest(digest);
    if !session.state.store().has(&manifest.config.digest) {
        session
            .runtime
            .block_on(session.client.fetch_blob(&from, &manifest.config, session.state.store(), &session.progress("pulling")))
            .map_err(|source| BuildError::Image { name: request.name.clone(), reason: source.to_string(), source: Some(source) })?;
    }
    let config: ImageConfig = serde_json::from_slice(&session.state.store().read(&manifest.config.digest)?)
        .map_err(|error| fail(format!("its config is malformed: {error}")))?;
    if config.rootfs.diff_ids.len() != manifest.layers.len() {
        return Err(fail(format!("it has {} layers but {} diff ids", manifest.layers.len(), config.rootfs.diff_ids.len())));
    }
    for layer in &manifest.layers {
        if !session.state.store().has(&layer.digest) {
            session.state.set_origin(&layer.digest, &from)?;
        }
    }
    Ok(ResolvedImage { reference: from, manifest: digest, config })
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
    let reference: Reference = "localhost/oci-layout".parse().map_err(|error| fail(format!("{error}")))?;
    pick(session, request, &reference, &found.0.media_type, bytes, found.0.digest)
}

fn fetch_manifest(session: &Session, reference: &Reference, name: &str) -> Result<Fetched, BuildError> {
    session.sink.emit(Event::Message { text: format!("resolving {}", reference.familiar()) });
    let fetched = session.runtime.block_on(session.client.manifest(reference)).map_err(|source| BuildError::Image {
        name: name.to_owned(),
        reason: source.to_string(),
        source: Some(source),
    })?;
    session.state.store().write(&fetched.bytes)?;
    Ok(fetched)
}

/// The manifest of an index that fits a platform best.
pub fn choose<'i>(index: &'i Index, platform: &Platform) -> Option<&'i Descriptor> {
    let images = || index.manifests.iter().filter(|m| !m.annotations.contains_key("vnd.docker.reference.type"));
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
pub fn snapshot(session: &Session, chain: &[Link]) -> Result<Snapshot, BuildError> {
    let mut snapshot = Snapshot::default();
    for link in chain {
        match link {
            Link::Diff { id, .. } => {
                let layer = session.layer_dir(id)?.ok_or_else(|| BuildError::Malformed {
                    digest: id.as_str().to_owned(),
                    reason: "its files were removed while the build ran".into(),
                })?;
                snapshot.layers.push(layer);
            }
            Link::Image { manifest, reference } => unpack_image(session, manifest, reference, &mut snapshot)?,
        }
    }
    Ok(snapshot)
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
    let missing: Vec<&Descriptor> = blobs.iter().copied().filter(|blob| !store.has(&blob.digest)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let progress = session.progress("pulling");
    session.runtime.block_on(async {
        let mut tasks = tokio::task::JoinSet::new();
        for blob in missing {
            let origin = session.state.origin(&blob.digest).unwrap_or_else(|| reference.clone());
            let (client, blob, store, progress) = (session.client.clone(), blob.clone(), store.clone(), progress.clone());
            tasks.spawn(async move { client.fetch_blob(&origin, &blob, &store, &progress).await });
        }
        while let Some(done) = tasks.join_next().await {
            match done {
                Ok(result) => result?,
                Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                Err(_) => return Err(BuildError::Cancelled),
            }
        }
        Ok(())
    })
}

fn unpack_layer(
    session: &Session,
    descriptor: &Descriptor,
    diff_id: &Digest,
    reference: &Reference,
    below: &Snapshot,
) -> Result<LayerDir, BuildError> {
    let id = SnapshotId::of_layer(diff_id);
    let lock = session.unpack_lock(diff_id);
    let _one = lock.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(layer) = session.layer_dir(&id)? {
        return Ok(layer);
    }
    match unpack_once(session, descriptor, diff_id, below, &id) {
        // A blob that went bad on disk is fetched again, once.
        Err(BuildError::Layer { source: LayerError::Mismatch { .. } | LayerError::Malformed { .. }, .. })
            if session.state.origin(&descriptor.digest).is_some() && session.state.store().verify(&descriptor.digest).is_err() =>
        {
            session.sink.emit(Event::Warning {
                code: "corrupt-blob".into(),
                message: format!("the stored blob {} was corrupt and is fetched again", descriptor.digest),
                line: None,
            });
            session.state.store().remove(&descriptor.digest)?;
            fetch(session, &[descriptor], reference)?;
            unpack_once(session, descriptor, diff_id, below, &id)?;
        }
        other => other?,
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
