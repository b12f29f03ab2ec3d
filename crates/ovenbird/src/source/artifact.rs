//! Contexts that are artifacts: `oci://NAME` in a registry and `oci-layout://PATH` on this machine. The layers, applied in order, are the context.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::StreamExt as _;
use ovenbird_engine::Event;
use ovenbird_engine::ops::file::decompress;
use ovenbird_oci::layer::{self, Ownership, remove_tree};
use ovenbird_oci::registry::{Client, ProgressFn};
use ovenbird_oci::store::{Store, StoreError};
use ovenbird_oci::{Descriptor, Digest, Index, Manifest, Platform, Reference};

use super::remote::Got;
use super::{Fetcher, SourceError, archive, bundle};
use crate::builder::Job;
use crate::error::{Error, Kind};
use crate::request::RemoteUrl;

/// Name of a file in an artifact, as ORAS writes it.
const TITLE: &str = "org.opencontainers.image.title";
/// Largest manifest or index.
const MAX_DOCUMENT: u64 = 8 * 1024 * 1024;
/// Blobs that are asked for at once; the client transfers fewer.
const AT_ONCE: usize = 8;
/// What hides a file of the layers below, and what hides all of a folder.
const WHITEOUT: &str = ".wh.";
const OPAQUE: &str = ".wh..wh..opq";

/// From a registry.
pub(super) fn pull(fetcher: &Fetcher, name: &str, url: &RemoteUrl, job: &Job) -> Result<Got, Error> {
    let settings = fetcher.settings.as_ref().ok_or_else(|| failed(url, "registries are not set up here"))?;
    let reference: Reference = settings.reference(name)?;
    job.sink.emit(Event::Message { text: format!("fetching {url}") });
    let client = Client::new(settings.client_options());
    let folder = fetcher.folder()?;
    let store = Store::open(&folder.path().join("store"))?;
    let progress: ProgressFn = {
        let (sink, shown) = (Arc::clone(&job.sink), url.to_string());
        Arc::new(move |digest: &Digest, current, total| {
            let event = Event::Progress {
                id: format!("context {digest}"),
                label: format!("fetching {shown} layer {}", digest.short()),
                current,
                total: Some(total),
                done: current >= total,
            };
            sink.emit(event);
        })
    };
    let manifest = fetcher.until_cancelled(job, async {
        let mut fetched = client.manifest(&reference).await?;
        if let Some(chosen) = of_index(&fetched.bytes) {
            fetched = client.manifest(&reference.with_digest(chosen.digest)).await?;
        }
        let manifest: Manifest = read_manifest(&fetched.bytes, url)?;
        let config = Some(&manifest.config).filter(|_| bundle::is_source(&manifest));
        let mut blobs = futures_util::stream::iter(config.into_iter().chain(&manifest.layers))
            .map(|blob| client.fetch_blob(&reference, blob, &store, &progress))
            .buffer_unordered(AT_ONCE);
        while let Some(fetched) = blobs.next().await {
            fetched?;
        }
        drop(blobs);
        Ok(manifest)
    })?;
    if bundle::is_source(&manifest) {
        let whole = bundle::unpack(&manifest, &store, &folder.path().join("source"), url)?;
        let _ = remove_tree(&folder.path().join("store"));
        let dir = whole.contexts.get("context").map(|(dir, _)| dir.clone()).ok_or_else(|| failed(url, "it has no main context"))?;
        return Ok(Got { dir, folder, dockerfile: None, revision: None, time: None, bundle: Some(whole) });
    }
    let dir = folder.path().join("context");
    apply(&manifest.layers, &dir, folder.path(), url, job, &|digest| Ok(store.open_blob(digest)?))?;
    let _ = remove_tree(&folder.path().join("store"));
    Ok(Got { dir, folder, dockerfile: None, revision: None, time: None, bundle: None })
}

/// From a layout: `PATH[:TAG|@DIGEST]`.
pub(super) fn read(fetcher: &Fetcher, layout: &str, url: &RemoteUrl, job: &Job) -> Result<Got, Error> {
    let (path, wanted) = match layout.rsplit_once('@') {
        Some((path, digest)) => (path, Wanted::Digest(digest.parse().map_err(|error| failed(url, format!("{error}")))?)),
        None => match layout.rsplit_once(':').filter(|(_, tag)| !tag.contains('/')) {
            Some((path, tag)) => (path, Wanted::Tag(tag.to_owned())),
            None => (layout, Wanted::Any),
        },
    };
    let root = fetcher.environment.absolute(Path::new(path));
    let open = |digest: &Digest| -> Result<File, Error> {
        let path = root.join("blobs").join(digest.to_string().replace(':', "/"));
        File::open(&path).map_err(|error| failed(url, format!("{}: {error}", path.display())))
    };
    let bytes = document(File::open(root.join("index.json")).map_err(|error| failed(url, format!("index.json: {error}")))?, url)?;
    let index: Index = serde_json::from_slice(&bytes).map_err(|error| failed(url, format!("index.json: {error}")))?;
    let is_wanted = |descriptor: &&Descriptor| match &wanted {
        Wanted::Any => true,
        Wanted::Digest(digest) => descriptor.digest == *digest,
        Wanted::Tag(tag) => descriptor
            .annotations
            .get("org.opencontainers.image.ref.name")
            .is_some_and(|name| name == tag || name.ends_with(&format!(":{tag}"))),
    };
    let mut found = index.manifests.iter().filter(is_wanted);
    let chosen = match (found.next(), found.next()) {
        (Some(one), None) => one.digest,
        (None, _) => return Err(failed(url, "the layout has no such manifest")),
        _ => return Err(failed(url, "the layout has several manifests: add :TAG or @DIGEST")),
    };
    let verified = |digest: &Digest| -> Result<Vec<u8>, Error> {
        let bytes = document(open(digest)?, url)?;
        if Digest::of(&bytes) == *digest { Ok(bytes) } else { Err(failed(url, format!("blob {digest} is damaged"))) }
    };
    let mut bytes = verified(&chosen)?;
    if let Some(chosen) = of_index(&bytes) {
        bytes = verified(&chosen.digest)?;
    }
    let manifest = read_manifest(&bytes, url)?;
    let folder = fetcher.folder()?;
    let dir = folder.path().join("context");
    // Copied first, so that what is unpacked is what was verified.
    let store = Store::open(&folder.path().join("store"))?;
    for layer in &manifest.layers {
        store.write_stream(open(&layer.digest)?, Some(&layer.digest)).map_err(|error| match error {
            StoreError::Corrupt { .. } | StoreError::Damaged { .. } => failed(url, format!("blob {} is damaged", layer.digest)),
            other => other.into(),
        })?;
    }
    apply(&manifest.layers, &dir, folder.path(), url, job, &|digest| Ok(store.open_blob(digest)?))?;
    let _ = remove_tree(&folder.path().join("store"));
    Ok(Got { dir, folder, dockerfile: None, revision: None, time: None, bundle: None })
}

enum Wanted {
    Any,
    Tag(String),
    Digest(Digest),
}

fn failed(url: &RemoteUrl, reason: impl Into<String>) -> Error {
    SourceError::Remote { url: url.to_string(), reason: reason.into() }.into()
}

fn document(reader: impl Read, url: &RemoteUrl) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![];
    reader.take(MAX_DOCUMENT + 1).read_to_end(&mut bytes).map_err(|error| failed(url, error.to_string()))?;
    if bytes.len() as u64 > MAX_DOCUMENT { Err(failed(url, "its manifest is too large")) } else { Ok(bytes) }
}

/// What an index means here: the machine's platform, else its only manifest.
fn of_index(bytes: &[u8]) -> Option<Descriptor> {
    let index: Index = serde_json::from_slice(bytes).ok()?;
    let host = Platform::host();
    let of_host = index.manifests.iter().find(|manifest| manifest.platform.as_ref() == Some(&host));
    of_host.or_else(|| index.manifests.first()).cloned()
}

fn read_manifest(bytes: &[u8], url: &RemoteUrl) -> Result<Manifest, Error> {
    serde_json::from_slice(bytes).map_err(|error| failed(url, format!("it is no manifest: {error}")))
}

/// Makes the folder `dir` of the layers.
fn apply(
    layers: &[Descriptor],
    dir: &Path,
    work: &Path,
    url: &RemoteUrl,
    job: &Job,
    open: &dyn Fn(&Digest) -> Result<File, Error>,
) -> Result<(), Error> {
    let io = |path: &Path| {
        let what = path.display().to_string();
        move |source| Error::from(SourceError::Read { what, source })
    };
    fs::create_dir(dir).map_err(io(dir))?;
    for described in layers {
        if job.cancel.is_cancelled() {
            return Err(Error::new(Kind::Cancelled, "the build was cancelled"));
        }
        let mut head = vec![];
        open(&described.digest)?.take(512).read_to_end(&mut head).map_err(io(dir))?;
        if archive::is_archive(&head) {
            let upper = work.join("layer");
            fs::create_dir(&upper).map_err(io(&upper))?;
            let what = || format!("layer {} of {url}", described.digest.short());
            let plain =
                decompress(open(&described.digest)?).map_err(|error| SourceError::Archive { what: what(), reason: error.to_string() })?;
            layer::extract(plain, &upper, Ownership::Recorded)
                .map_err(|error| SourceError::Archive { what: what(), reason: error.of_archive() })?;
            merge(&upper, dir).map_err(io(dir))?;
            remove_tree(&upper).map_err(io(&upper))?;
            continue;
        }
        // A single file.
        let title = described.annotations.get(TITLE).map(Path::new);
        let plain_name =
            |path: &&Path| path.components().count() > 0 && path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        let name = title
            .filter(plain_name)
            .ok_or_else(|| failed(url, format!("layer {} is no archive, and has no name of a file ({TITLE})", described.digest.short())))?;
        let upper = work.join("layer");
        let target = upper.join(name);
        fs::create_dir_all(target.parent().unwrap_or(&upper)).map_err(io(&target))?;
        let mut out = File::create_new(&target).map_err(io(&target))?;
        std::io::copy(&mut open(&described.digest)?, &mut out).map_err(io(&target))?;
        fs::set_permissions(&target, fs::Permissions::from_mode(0o644)).map_err(io(&target))?;
        merge(&upper, dir).map_err(io(dir))?;
        remove_tree(&upper).map_err(io(&upper))?;
    }
    Ok(())
}

/// Puts what is in `upper` over `lower`, and removes there what `upper` says is gone. Follows no links.
fn merge(upper: &Path, lower: &Path) -> std::io::Result<()> {
    let mut open: Vec<(PathBuf, PathBuf)> = vec![(upper.to_owned(), lower.to_owned())];
    let is_folder = |path: &Path| path.symlink_metadata().is_ok_and(|meta| meta.is_dir());
    while let Some((upper, lower)) = open.pop() {
        let entries = fs::read_dir(&upper)?.collect::<Result<Vec<_>, _>>()?;
        if entries.iter().any(|entry| entry.file_name() == OPAQUE) {
            for entry in fs::read_dir(&lower)? {
                remove_tree(&entry?.path())?;
            }
        }
        for entry in &entries {
            let name = entry.file_name();
            let gone = name.to_str().and_then(|name| name.strip_prefix(WHITEOUT)).filter(|gone| !gone.starts_with(WHITEOUT));
            if let Some(gone) = gone.filter(|gone| !matches!(*gone, "" | "." | "..")) {
                remove_tree(&lower.join(gone))?;
            }
        }
        for entry in entries {
            let name = entry.file_name();
            if name.to_str().is_some_and(|name| name.starts_with(WHITEOUT)) {
                continue;
            }
            let (from, to) = (entry.path(), lower.join(&name));
            if is_folder(&from) && is_folder(&to) {
                fs::set_permissions(&to, from.symlink_metadata()?.permissions())?;
                open.push((from, to));
                continue;
            }
            remove_tree(&to)?;
            if is_folder(&from) {
                // Not renamed as a whole: there may be marks in it.
                fs::create_dir(&to)?;
                fs::set_permissions(&to, from.symlink_metadata()?.permissions())?;
                open.push((from, to));
            } else {
                fs::rename(&from, &to)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_over_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let (upper, lower) = (dir.path().join("u"), dir.path().join("l"));
        for (path, text) in [
            ("l/keep", "k"),
            ("l/gone", "g"),
            ("l/d/old", "o"),
            ("l/opaque/x", "x"),
            ("l/was-file", "f"),
            ("l/was-dir/x", "x"),
            ("u/.wh.gone", ""),
            ("u/d/new", "n"),
            ("u/opaque/.wh..wh..opq", ""),
            ("u/opaque/y", "y"),
            ("u/was-file/z", "z"),
            ("u/was-dir", "now a file"),
            ("u/.wh..", ""),
        ] {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        std::os::unix::fs::symlink("/etc", lower.join("link")).unwrap();
        fs::create_dir(upper.join("link")).unwrap();
        fs::write(upper.join("link/ovenbird"), "").unwrap();
        merge(&upper, &lower).unwrap();
        let mut found = vec![];
        let mut open = vec![lower.clone()];
        while let Some(dir) = open.pop() {
            for entry in fs::read_dir(dir).unwrap().flatten() {
                if entry.path().is_dir() {
                    open.push(entry.path());
                } else {
                    found.push(entry.path().strip_prefix(&lower).unwrap().display().to_string());
                }
            }
        }
        found.sort();
        assert_eq!(found, ["d/new", "d/old", "keep", "link/ovenbird", "opaque/y", "was-dir", "was-file/z"]);
    }
}
