//! Layers of a built image merged into one: all of them, or those above the base image.

use ovenbird_oci::image::{History, media};
use ovenbird_oci::layer::{self, PackOptions};
use ovenbird_oci::{Descriptor, Digest, ImageConfig, Manifest, Platform};
use std::sync::Arc;

use super::assemble::{Assembled, descriptor, layer_media_type, rfc3339, threads, write_json};
use crate::cache::{self, Chain, Link, document};
use crate::error::BuildError;
use crate::event::Event;
use crate::ops::{Session, image, merged};

/// An image of one platform.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// Which platform.
    pub platform: &'a Platform,
    /// Its manifest.
    pub manifest: &'a Descriptor,
    /// The same, read.
    pub document: &'a Manifest,
    /// Its config.
    pub config: &'a ImageConfig,
}

fn file_error(source: crate::ops::file::FileError) -> BuildError {
    BuildError::File { step: "squashing".into(), line: None, source }
}

/// Squashes an image of one platform. Its files stay what they are. `None`: there is nothing to merge.
pub fn squash(session: &Session, member: Subject, whole: bool) -> Result<Option<Assembled>, BuildError> {
    let own = || -> Result<Chain, BuildError> {
        let malformed = |error| BuildError::Malformed { digest: member.manifest.digest.to_string(), reason: format!("{error}") };
        let reference = "localhost/exported".parse().map_err(malformed)?;
        Ok(vec![Arc::new(Link::Image { manifest: member.manifest.digest, reference })])
    };
    let chain = match cache::find_image(session.state, &member.manifest.digest) {
        Some(chain) => chain,
        None if whole => own()?,
        None => {
            return Err(BuildError::Refused {
                option: "squash from=base".into(),
                reason: "the image was not built here, so it is not known where its base image ends; use from=all".into(),
            });
        }
    };
    let base: &[Arc<Link>] = match chain.first() {
        Some(link) if !whole && matches!(**link, Link::Image { .. }) => std::slice::from_ref(link),
        _ => &[],
    };
    if member.document.layers.len() <= 1 || (!whole && chain.len() - base.len() <= 1) {
        return Ok(None);
    }
    session.sink.emit(Event::Message { text: "squashing layers".into() });
    let snapshot = image::snapshot(session, &chain)?;
    let below = image::snapshot(session, base)?.layers.len();
    let work = session.state.work_dir()?;
    let owners = merged::squash(&snapshot, below, &work.subdir("fs")?, session.state.ownership()).map_err(file_error)?;
    session.check_stop()?;
    let id = session.state.commit(work, None, &owners)?;
    let times = chain.iter().map(|link| match &**link {
        Link::Diff { created, .. } => *created,
        Link::Shared(shared) => shared.created,
        Link::Image { .. } => 0,
    });
    let created = session.input.source_date_epoch.or_else(|| times.max()).unwrap_or(0);
    let options = PackOptions { compression: session.input.compression, mtime: session.input.source_date_epoch, threads: threads() };
    let dir = session.layer_dir(&id)?.ok_or_else(|| BuildError::Malformed {
        digest: id.as_str().to_owned(),
        reason: "its files were removed while it was packed".into(),
    })?;
    let packed = layer::pack(&dir.dir, &dir.owners, &options, session.state.store())
        .map_err(|source| BuildError::Layer { layer: id.as_str().to_owned(), source })?;
    // Layers, diff ids and history of the base image stay.
    let kept = match base.first().map(|link| &**link) {
        Some(Link::Image { manifest, .. }) => image::read_image(session, manifest)?.0.layers.len(),
        _ => 0,
    };
    let docker = session.input.docker_media_types;
    let mut config = member.config.clone();
    config.rootfs.diff_ids.truncate(kept);
    config.rootfs.diff_ids.push(packed.diff_id);
    let mut layers = 0;
    for entry in &mut config.history {
        layers += usize::from(!entry.empty_layer);
        entry.empty_layer |= layers > kept;
    }
    config.history.push(History {
        created: Some(rfc3339(created)),
        created_by: Some(if whole { "squash from=all" } else { "squash from=base" }.into()),
        comment: Some("ovenbird.squash.v0".into()),
        ..History::default()
    });
    let config_digest = write_json(session, &config)?;
    let mut manifest = Manifest { annotations: member.document.annotations.clone(), ..member.document.clone() };
    // The cache that it carries speaks of layers that are gone.
    manifest.annotations.remove(document::ANNOTATION);
    manifest.layers.truncate(kept);
    manifest.layers.push(Descriptor::new(layer_media_type(&packed.media_type, docker), packed.digest, packed.size));
    manifest.config = descriptor(session, &member.document.config.media_type, config_digest)?;
    let digest: Digest = write_json(session, &manifest)?;
    let chain: Chain = base.iter().cloned().chain([Arc::new(Link::Diff { id, created })]).collect();
    cache::save_image(session.state, &digest, &chain)?;
    let mut target = descriptor(session, manifest.media_type.as_deref().unwrap_or(media::OCI_MANIFEST), digest)?;
    target.platform.clone_from(&member.manifest.platform);
    Ok(Some(Assembled { platform: member.platform.clone(), manifest: target, config: config_digest, chain }))
}
