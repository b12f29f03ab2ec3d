//! From a registry into the store.

use std::collections::HashSet;
use std::sync::Arc;

use reqwest::header::{ACCEPT, CONTENT_RANGE, CONTENT_TYPE, HeaderValue, RANGE};
use reqwest::{Method, Response};
use serde::Deserialize;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::bytes::Bytes;

use super::endpoint::Endpoint;
use super::transport::{Backoff, Call, Payload, failure, next_piece, read_limited};
use super::{Breaks, Fetched, Inner, MAX_MANIFEST, ProgressFn, RegistryError, all, blocking};
use crate::image::media::{self, is_foreign};
use crate::store::{Partial, Store, StoreError};
use crate::{Descriptor, Digest, Index, Manifest, Platform, Reference};

/// Everything that is understood, best first.
const ACCEPTED: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";
/// Indexes in indexes are legal; deeper than this they are a trap.
const MAX_DEPTH: usize = 4;
/// Most manifests of one image.
const MAX_MANIFESTS: usize = 2000;
/// Pieces between socket and disk, each of up to 400 KiB (what the HTTP client reads at once), and that for each layer that comes in.
const PIECES: usize = 2;
/// A broken download that came this far gets all its retries again.
const PROGRESS: u64 = 1 << 20;

pub(crate) fn is_index(media_type: &str) -> bool {
    matches!(media_type, media::OCI_INDEX | media::DOCKER_LIST)
}

pub(crate) fn is_manifest(media_type: &str) -> bool {
    matches!(media_type, media::OCI_MANIFEST | media::DOCKER_MANIFEST)
}

/// A parsed manifest or index.
pub(crate) enum Document {
    Index(Index),
    Manifest(Manifest),
}

/// Parses by media type.
pub(crate) fn parse(fetched: &Fetched, reference: &str) -> Result<Document, RegistryError> {
    let media_type = &fetched.descriptor.media_type;
    let unsupported = |detail: String| RegistryError::Unsupported { reference: reference.into(), media_type: detail };
    let broken = |e: serde_json::Error| unsupported(format!("{media_type} that cannot be read ({})", super::printable(&e.to_string())));
    if is_index(media_type) {
        serde_json::from_slice(&fetched.bytes).map(Document::Index).map_err(broken)
    } else if is_manifest(media_type) {
        serde_json::from_slice(&fetched.bytes).map(Document::Manifest).map_err(broken)
    } else {
        Err(unsupported(media_type.clone()))
    }
}

/// Pulls an image; see [`super::Client::pull`].
pub(crate) async fn pull(
    inner: &Arc<Inner>,
    from: &Reference,
    platform: Option<&Platform>,
    store: &Store,
    progress: &ProgressFn,
) -> Result<Descriptor, RegistryError> {
    let root = inner.manifest_into(from, None, store).await?;
    let mut manifests = vec![];
    let target = if let Some(platform) = platform {
        let chosen = choose(inner, from, root, platform, store).await?;
        let target = chosen.descriptor.clone();
        manifests.push(chosen);
        target
    } else {
        let target = root.descriptor.clone();
        collect(inner, from, root, store, &mut manifests).await?;
        target
    };
    let mut seen = HashSet::new();
    let mut tasks = JoinSet::new();
    for fetched in &manifests {
        let Document::Manifest(manifest) = parse(fetched, &from.to_string())? else { continue };
        // Beside images, an index holds attestations; those have layers of their own types.
        if platform.is_some() {
            let unknown = manifest.check_layers().err().filter(|layer| !is_foreign(&layer.media_type));
            unknown.map_or(Ok(()), |source| Err(RegistryError::Layer { reference: from.to_string(), source }))?;
        }
        for blob in manifest.layers.into_iter().chain([manifest.config]) {
            if seen.insert(blob.digest) {
                let (inner, from, store, progress) = (Arc::clone(inner), from.clone(), store.clone(), Arc::clone(progress));
                tasks.spawn(async move {
                    inner.quarantine(&from, &blob, &store).await?;
                    match inner.fetch_blob(&from, &blob, &store, &progress).await {
                        Err(RegistryError::NotFound { .. }) if is_foreign(&blob.media_type) => Ok(()),
                        result => result,
                    }
                });
            }
        }
    }
    all(tasks, &format!("pull {from}")).await?;
    Ok(target)
}

/// The manifest for a platform, through nested indexes.
pub(crate) async fn choose(
    inner: &Inner,
    from: &Reference,
    root: Fetched,
    wanted: &Platform,
    store: &Store,
) -> Result<Fetched, RegistryError> {
    let mut best: Option<(u32, Descriptor)> = None;
    let mut available = vec![];
    let mut level = vec![root];
    for _ in 0..=MAX_DEPTH {
        let mut below = vec![];
        for fetched in std::mem::take(&mut level) {
            let Document::Index(index) = parse(&fetched, &from.to_string())? else { return Ok(fetched) };
            let alone = index.manifests.len() == 1;
            available.extend(index.describe());
            for child in index.manifests {
                let rank = match &child.platform {
                    Some(platform) => wanted.preference(platform),
                    // Some tools name no platform in an index of one.
                    None => (alone || is_index(&child.media_type)).then_some(u32::MAX),
                };
                match rank {
                    Some(_) if is_index(&child.media_type) => below.push(child),
                    Some(rank) if best.as_ref().is_none_or(|(r, _)| rank < *r) => best = Some((rank, child)),
                    _ => {}
                }
            }
        }
        if below.is_empty() || below.len() > MAX_MANIFESTS {
            break;
        }
        for child in below {
            level.push(inner.manifest_into(from, Some(&child), store).await?);
        }
    }
    let Some((_, child)) = best else {
        return Err(RegistryError::NoPlatform { reference: from.to_string(), wanted: wanted.to_string(), available });
    };
    let mut fetched = inner.manifest_into(from, Some(&child), store).await?;
    fetched.descriptor.platform = child.platform;
    Ok(fetched)
}

/// A document and everything below it.
async fn collect(inner: &Inner, from: &Reference, root: Fetched, store: &Store, found: &mut Vec<Fetched>) -> Result<(), RegistryError> {
    let mut seen = HashSet::from([root.descriptor.digest]);
    let mut level = vec![root];
    for _ in 0..=MAX_DEPTH {
        let mut below = vec![];
        for fetched in std::mem::take(&mut level) {
            if let Document::Index(index) = parse(&fetched, &from.to_string())? {
                below.extend(index.manifests.into_iter().filter(|child| seen.insert(child.digest)));
            }
            found.push(fetched);
        }
        if found.len() + below.len() > MAX_MANIFESTS {
            break;
        }
        if below.is_empty() {
            return Ok(());
        }
        for child in below {
            level.push(inner.manifest_into(from, Some(&child), store).await?);
        }
    }
    let reason = format!("more than {MAX_MANIFESTS} manifests, or more than {MAX_DEPTH} indexes in each other");
    Err(RegistryError::Unsupported { reference: from.to_string(), media_type: reason })
}

impl Inner {
    /// Fetches a manifest from the first endpoint that has it.
    pub(crate) async fn manifest(&self, from: &Reference) -> Result<Fetched, RegistryError> {
        let action = format!("fetch the manifest of {from}");
        let mut endpoints = Endpoint::for_pull(from.registry(), &self.options)?;
        // The registry itself is last, and its word counts; mirrors may fail as they like.
        let registry = endpoints.pop();
        for mirror in &endpoints {
            if let Ok(fetched) = self.manifest_of(mirror, from, &action).await {
                return Ok(fetched);
            }
        }
        match registry {
            Some(registry) => self.manifest_of(&registry, from, &action).await,
            None => Err(RegistryError::NotFound { reference: from.to_string() }),
        }
    }

    async fn manifest_of(&self, endpoint: &Endpoint, from: &Reference, action: &str) -> Result<Fetched, RegistryError> {
        let call = manifest_call(endpoint, from, Method::GET, action);
        let response = self.send(&call).await?;
        if !response.status().is_success() {
            return Err(failure(response, &call, &from.to_string()).await);
        }
        let said = header(&response, CONTENT_TYPE.as_str());
        let promised = header(&response, "docker-content-digest").and_then(|d| d.parse::<Digest>().ok());
        let bytes = read_limited(response, MAX_MANIFEST, &call, &format!("the manifest of {from}")).await?;
        let digest = Digest::of(&bytes);
        if let Some(expected) = from.digest().copied().or(promised).filter(|expected| *expected != digest) {
            return Err(RegistryError::Corrupt {
                what: format!("the manifest of {from} from {}", endpoint.registry),
                expected: expected.to_string(),
                actual: digest.to_string(),
            });
        }
        let media_type = media_type_of(&bytes, said.as_deref(), from)?;
        let descriptor =
            Descriptor { media_type, digest, size: bytes.len() as u64, platform: None, annotations: std::collections::BTreeMap::new() };
        Ok(Fetched { descriptor, bytes })
    }

    /// `HEAD` of a manifest on the first endpoint that has it.
    pub(crate) async fn head(&self, reference: &Reference) -> Result<Option<Descriptor>, RegistryError> {
        let action = format!("look up {reference}");
        let mut endpoints = Endpoint::for_pull(reference.registry(), &self.options)?;
        let registry = endpoints.pop();
        for mirror in &endpoints {
            if let Ok(Some(found)) = self.head_of(mirror, reference, &action).await {
                return Ok(Some(found));
            }
        }
        match registry {
            Some(registry) => self.head_of(&registry, reference, &action).await,
            None => Ok(None),
        }
    }

    pub(crate) async fn head_of(
        &self,
        endpoint: &Endpoint,
        reference: &Reference,
        action: &str,
    ) -> Result<Option<Descriptor>, RegistryError> {
        let call = manifest_call(endpoint, reference, Method::HEAD, action);
        let response = self.send(&call).await?;
        if response.status().as_u16() == 404 {
            return Ok(None);
        }
        if !response.status().is_success() {
            return Err(failure(response, &call, &reference.to_string()).await);
        }
        let digest = header(&response, "docker-content-digest").and_then(|d| d.parse::<Digest>().ok());
        let size = header(&response, "content-length").and_then(|l| l.parse().ok());
        let media_type = header(&response, CONTENT_TYPE.as_str()).map(|t| essence(&t));
        match (digest, size, media_type) {
            (Some(digest), Some(size), Some(media_type)) if is_index(&media_type) || is_manifest(&media_type) => {
                Ok(Some(Descriptor { media_type, digest, size, platform: None, annotations: std::collections::BTreeMap::new() }))
            }
            // Some registries answer HEAD without these headers.
            _ => match self.manifest_of(endpoint, reference, action).await {
                Ok(fetched) => Ok(Some(fetched.descriptor)),
                Err(RegistryError::NotFound { .. }) => Ok(None),
                Err(error) => Err(error),
            },
        }
    }

    /// A manifest that is in the store afterwards: `child` of an index, or what the reference names. What has a digest and is in the
    /// store already is not asked for.
    pub(crate) async fn manifest_into(
        &self,
        from: &Reference,
        child: Option<&Descriptor>,
        store: &Store,
    ) -> Result<Fetched, RegistryError> {
        let action = format!("pull {from}");
        let wanted = child.map_or_else(|| from.clone(), |child| from.with_digest(child.digest));
        if let Some(child) = child.filter(|c| c.size > MAX_MANIFEST) {
            return Err(RegistryError::TooLarge { what: format!("the manifest of {wanted}"), size: child.size, limit: MAX_MANIFEST });
        }
        if let Some(digest) = wanted.digest().copied().filter(|digest| store.has(digest)) {
            let from_store = store.clone();
            // A damaged copy is fetched again.
            if let Ok(bytes) = blocking(&action, move || from_store.read(&digest)).await
                && let Ok(media_type) = media_type_of(&bytes, child.map(|c| c.media_type.as_str()), &wanted)
            {
                let size = bytes.len() as u64;
                let descriptor = Descriptor { media_type, digest, size, platform: None, annotations: std::collections::BTreeMap::new() };
                return Ok(Fetched { descriptor, bytes });
            }
        }
        let fetched = self.manifest(&wanted).await?;
        if let Some(child) = child.filter(|c| c.size != fetched.descriptor.size) {
            return Err(RegistryError::Corrupt {
                what: format!("the manifest of {wanted}"),
                expected: format!("{} bytes", child.size),
                actual: format!("{} bytes", fetched.descriptor.size),
            });
        }
        let (store, bytes) = (store.clone(), fetched.bytes.clone());
        blocking(&action, move || store.write(&bytes)).await?;
        Ok(fetched)
    }

    /// Reads a blob that is here and removes it when it is not what its name says: who pulls wants the image to be whole.
    async fn quarantine(&self, from: &Reference, blob: &Descriptor, store: &Store) -> Result<(), RegistryError> {
        if !store.holds(blob) {
            return Ok(());
        }
        let (store, digest) = (store.clone(), blob.digest);
        blocking(&format!("pull {from}"), move || match store.verify(&digest) {
            Err(StoreError::Corrupt { .. } | StoreError::Missing { .. }) => Ok(()),
            other => other,
        })
        .await
    }

    /// Fetches a blob; see [`super::Client::fetch_blob`].
    pub(crate) async fn fetch_blob(
        &self,
        from: &Reference,
        blob: &Descriptor,
        store: &Store,
        progress: &ProgressFn,
    ) -> Result<(), RegistryError> {
        let action = format!("fetch blob {} of {from}", blob.digest.short());
        let _flight = self.flight(format!("fetch {}", store.blob_path(&blob.digest).display())).await;
        if store.holds(blob) {
            progress(&blob.digest, blob.size, blob.size);
            return Ok(());
        }
        let mut last = RegistryError::NotFound { reference: from.to_string() };
        for endpoint in Endpoint::for_pull(from.registry(), &self.options)? {
            let _transfer = self.transfer(&endpoint, &action).await?;
            // A resumed download that turns out wrong may be a splice of two different answers: once more from the start.
            for _ in 0..2 {
                let mut sink = Sink::new(store, blob);
                let result = match self.download(&endpoint, from, blob, &mut sink, progress, &action).await {
                    Ok(()) => sink.commit(&endpoint, &action).await,
                    Err(error) => Err(error),
                };
                let again = sink.breaks.resumed > 0 && matches!(result, Err(RegistryError::Corrupt { .. }));
                if again {
                    sink.breaks.retried += sink.received;
                    sink.breaks.resumed = 0;
                }
                self.broke(sink.breaks);
                match result {
                    Ok(()) => {
                        progress(&blob.digest, blob.size, blob.size);
                        return Ok(());
                    }
                    Err(error @ (RegistryError::Store { .. } | RegistryError::Cancelled { .. })) => return Err(error),
                    Err(error) => {
                        last = error;
                        if !again {
                            break;
                        }
                    }
                }
            }
        }
        Err(last)
    }

    async fn download(
        &self,
        endpoint: &Endpoint,
        from: &Reference,
        blob: &Descriptor,
        sink: &mut Sink,
        progress: &ProgressFn,
        action: &str,
    ) -> Result<(), RegistryError> {
        let mut backoff = Backoff::new(endpoint.attempts);
        let mut mark = 0;
        loop {
            let mut headers = vec![];
            if sink.received > 0 {
                headers.push((RANGE, range_from(sink.received)));
            }
            let call = Call {
                endpoint,
                repository: from.repository(),
                method: Method::GET,
                url: endpoint.url(from.repository(), &format!("blobs/{}", blob.digest)),
                scopes: vec![scope(endpoint, from, "pull")],
                headers,
                payload: Payload::None,
                action,
            };
            let response = self.send(&call).await?;
            let Err(error) = receive(response, &call, blob, sink, progress).await else { return Ok(()) };
            sink.breaks.count += u64::from(error.is_break());
            if sink.received >= mark + PROGRESS {
                mark = sink.received;
                backoff.reset();
            }
            backoff.pause(error).await?;
        }
    }
}

/// Takes one answer, whole or the rest of it.
async fn receive(
    mut response: Response,
    call: &Call<'_>,
    blob: &Descriptor,
    sink: &mut Sink,
    progress: &ProgressFn,
) -> Result<(), RegistryError> {
    let corrupt = |actual: String| RegistryError::Corrupt {
        what: format!("blob {} from {}", blob.digest, call.endpoint.registry),
        expected: format!("{} bytes", blob.size),
        actual,
    };
    // A server that knows no ranges starts again: what is there already is passed over.
    let mut skip = match response.status().as_u16() {
        200 => {
            sink.breaks.retried += sink.received;
            sink.breaks.resumed = 0;
            sink.received
        }
        206 => {
            let start = header(&response, CONTENT_RANGE.as_str())
                .and_then(|r| r.strip_prefix("bytes ")?.split('-').next()?.trim().parse::<u64>().ok());
            if start != Some(sink.received) {
                return Err(call.protocol("it sent another range of the blob than it was asked for"));
            }
            sink.breaks.resumed = sink.received;
            0
        }
        404 => return Err(RegistryError::NotFound { reference: format!("blob {} of {}", blob.digest, call.repository) }),
        _ => return Err(failure(response, call, call.repository).await),
    };
    if let Some(length) = response.content_length() {
        let expected = blob.size - sink.received + skip;
        if length != expected {
            return Err(corrupt(format!("{} bytes", sink.received + length - skip.min(length))));
        }
    }
    let url = response.url().clone();
    while let Some(piece) = next_piece(&mut response, call.endpoint).await.map_err(|f| f.into_error(call.action, call.endpoint, &url))? {
        let passed = usize::try_from(skip).unwrap_or(usize::MAX).min(piece.len());
        skip -= passed as u64;
        let piece = piece.slice(passed..);
        if sink.received + piece.len() as u64 > blob.size {
            return Err(corrupt("more".into()));
        }
        if !piece.is_empty() {
            sink.write(piece, call.action).await?;
            // The last piece is reported once the whole blob is verified.
            if sink.received < blob.size {
                progress(&blob.digest, sink.received, blob.size);
            }
        }
    }
    if sink.received < blob.size {
        return Err(corrupt(format!("{} bytes", sink.received)));
    }
    Ok(())
}

/// Writes pieces on a thread that may block; few of them wait in memory.
struct Sink {
    pieces: Option<mpsc::Sender<Bytes>>,
    writer: Option<JoinHandle<Result<Partial, StoreError>>>,
    digest: Digest,
    received: u64,
    breaks: Breaks,
}

impl Sink {
    fn new(store: &Store, blob: &Descriptor) -> Self {
        let (pieces, mut queue) = mpsc::channel::<Bytes>(PIECES);
        let store = store.clone();
        let writer = tokio::task::spawn_blocking(move || {
            let mut partial = store.partial()?;
            while let Some(piece) = queue.blocking_recv() {
                partial.append(&piece)?;
            }
            Ok(partial)
        });
        Self { pieces: Some(pieces), writer: Some(writer), digest: blob.digest, received: 0, breaks: Breaks::default() }
    }

    async fn write(&mut self, piece: Bytes, action: &str) -> Result<(), RegistryError> {
        let length = piece.len() as u64;
        if let Some(pieces) = &self.pieces
            && pieces.send(piece).await.is_ok()
        {
            self.received += length;
            return Ok(());
        }
        // The writer ended early: it knows why.
        self.finish(action).await?;
        Err(RegistryError::Cancelled { action: action.into() })
    }

    async fn finish(&mut self, action: &str) -> Result<Partial, RegistryError> {
        self.pieces = None;
        let cancelled = || RegistryError::Cancelled { action: action.into() };
        let writer = self.writer.take().ok_or_else(cancelled)?;
        writer.await.map_err(|_| cancelled())?.map_err(|source| RegistryError::store(action, source))
    }

    async fn commit(&mut self, endpoint: &Endpoint, action: &str) -> Result<(), RegistryError> {
        let partial = self.finish(action).await?;
        let digest = self.digest;
        match blocking(action, move || partial.commit(Some(&digest))).await {
            Ok(_) => Ok(()),
            Err(RegistryError::Store { action, source }) => Err(match *source {
                StoreError::Corrupt { expected, actual } => RegistryError::Corrupt {
                    what: format!("blob {} from {}", expected.short(), endpoint.registry),
                    expected: expected.to_string(),
                    actual: actual.to_string(),
                },
                source => RegistryError::store(&action, source),
            }),
            Err(error) => Err(error),
        }
    }
}

fn manifest_call<'a>(endpoint: &'a Endpoint, from: &'a Reference, method: Method, action: &'a str) -> Call<'a> {
    let name = from.digest().map_or_else(|| from.tag().unwrap_or("latest").to_owned(), ToString::to_string);
    Call {
        endpoint,
        repository: from.repository(),
        method,
        url: endpoint.url(from.repository(), &format!("manifests/{name}")),
        scopes: vec![scope(endpoint, from, "pull")],
        headers: vec![(ACCEPT, HeaderValue::from_static(ACCEPTED))],
        payload: Payload::None,
        action,
    }
}

/// `repository:NAME:ACTIONS`.
pub(crate) fn scope(endpoint: &Endpoint, reference: &Reference, actions: &str) -> String {
    format!("repository:{}:{actions}", endpoint.repository(reference.repository()))
}

pub(crate) fn header(response: &Response, name: &str) -> Option<String> {
    response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned)
}

fn range_from(start: u64) -> HeaderValue {
    HeaderValue::try_from(format!("bytes={start}-")).unwrap_or(HeaderValue::from_static("bytes=0-"))
}

/// Without parameters.
fn essence(content_type: &str) -> String {
    content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

/// What a document is: its own word first (the digest covers it), then the header, then its looks. One that could be read as both
/// manifest and index is refused: two readers would see two images (CVE-2021-41190).
fn media_type_of(bytes: &[u8], header: Option<&str>, from: &Reference) -> Result<String, RegistryError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Looks {
        schema_version: Option<u64>,
        media_type: Option<String>,
        config: Option<serde::de::IgnoredAny>,
        layers: Option<serde::de::IgnoredAny>,
        manifests: Option<serde::de::IgnoredAny>,
    }
    let unsupported = |media_type: String| RegistryError::Unsupported { reference: from.to_string(), media_type };
    let looks: Looks = serde_json::from_slice(bytes)
        .map_err(|_| unsupported(format!("{} that is no JSON object", super::printable(header.unwrap_or("something")))))?;
    if looks.schema_version == Some(1) {
        return Err(unsupported("Docker manifest schema 1".into()));
    }
    let (as_index, as_manifest) = (looks.manifests.is_some(), looks.layers.is_some() || looks.config.is_some());
    if as_index && as_manifest {
        return Err(unsupported("both manifest and index".into()));
    }
    let known = |t: &String| is_index(t) || is_manifest(t);
    let said = looks.media_type.or_else(|| header.map(essence).filter(known));
    let media_type = match said {
        Some(said) => said,
        None if as_index => media::OCI_INDEX.into(),
        None if as_manifest => media::OCI_MANIFEST.into(),
        None => header.map(essence).unwrap_or_default(),
    };
    if !known(&media_type) || (is_index(&media_type) && as_manifest) || (is_manifest(&media_type) && as_index) {
        return Err(unsupported(super::printable(&media_type)));
    }
    Ok(media_type)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_documents() {
        let rows: &[(&str, Option<&str>, Option<&str>)] = &[
            (r#"{"manifests":[]}"#, None, Some(media::OCI_INDEX)),
            (r#"{"layers":[],"config":{}}"#, None, Some(media::OCI_MANIFEST)),
            (r#"{"layers":[]}"#, Some("application/vnd.docker.distribution.manifest.v2+json; charset=utf-8"), Some(media::DOCKER_MANIFEST)),
            (r#"{"layers":[]}"#, Some("application/json"), Some(media::OCI_MANIFEST)),
            (
                r#"{"manifests":[],"mediaType":"application/vnd.docker.distribution.manifest.list.v2+json"}"#,
                Some("text/plain"),
                Some(media::DOCKER_LIST),
            ),
            (r#"{"manifests":[],"layers":[]}"#, None, None),
            (r#"{"manifests":[],"config":{}}"#, Some(media::OCI_INDEX), None),
            (r#"{"layers":[]}"#, Some(media::OCI_INDEX), None),
            (r#"{"manifests":[],"mediaType":"application/vnd.oci.image.manifest.v1+json"}"#, None, None),
            (r#"{"schemaVersion":1,"layers":[]}"#, None, None),
            (r#"{"mediaType":"application/x-evil"}"#, None, None),
            ("{}", None, None),
            ("[]", None, None),
            ("", Some(media::OCI_MANIFEST), None),
        ];
        let from: Reference = "h.test/a:b".parse().unwrap();
        for (document, header, expected) in rows {
            assert_eq!(media_type_of(document.as_bytes(), *header, &from).ok().as_deref(), *expected, "{document}");
        }
    }
}
