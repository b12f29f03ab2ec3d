//! From the store to a registry.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use reqwest::header::{CONTENT_RANGE, CONTENT_TYPE, HeaderValue, LOCATION};
use reqwest::{Method, Response, StatusCode, Url};
use tokio::task::JoinSet;

use super::endpoint::Endpoint;
use super::pull::{Document, header, is_index, parse, scope};
use super::transport::{Backoff, Call, Payload, detail, failure};
use super::{Fetched, Inner, MAX_MANIFEST, ProgressFn, RegistryError, all, blocking};
use crate::image::media::is_foreign;
use crate::store::Store;
use crate::{Descriptor, Digest, Reference};

/// Piece of an upload in pieces, in bytes: most proxies let this much through.
const CHUNK: u64 = 16 << 20;
/// Largest piece that a registry may insist on, in bytes.
const MAX_CHUNK: u64 = 1 << 30;
/// Indexes in indexes.
const MAX_DEPTH: usize = 8;

/// One push.
struct Push {
    inner: Arc<Inner>,
    store: Store,
    endpoint: Endpoint,
    to: Reference,
    origins: BTreeMap<Digest, Reference>,
    progress: ProgressFn,
    action: String,
}

/// What is pushed.
#[derive(Default)]
struct Tree {
    /// Children before parents, the target last.
    manifests: Vec<Fetched>,
    layers: Vec<Descriptor>,
    configs: Vec<Descriptor>,
    seen: HashSet<Digest>,
}

/// How a single request for a whole blob ended.
enum Put {
    Done,
    /// The server, or a proxy before it, does not take it in one piece.
    InPieces(RegistryError),
}

/// Pushes an image; see [`super::Client::push`].
pub(crate) async fn push(
    inner: &Arc<Inner>,
    store: &Store,
    target: &Descriptor,
    to: &Reference,
    origins: &BTreeMap<Digest, Reference>,
    progress: &ProgressFn,
) -> Result<(), RegistryError> {
    let mut push = Push {
        inner: Arc::clone(inner),
        store: store.clone(),
        endpoint: Endpoint::of(to.registry(), &inner.options)?,
        to: to.clone(),
        origins: origins.clone(),
        progress: Arc::clone(progress),
        action: format!("push {to}"),
    };
    if let Some(digest) = to.digest().filter(|digest| **digest != target.digest) {
        return Err(RegistryError::Corrupt { what: push.action, expected: digest.to_string(), actual: target.digest.to_string() });
    }
    let mut tree = Tree::default();
    push.collect(target, &mut tree, MAX_DEPTH).await?;
    let push = Arc::new(push);
    for blobs in [tree.layers, tree.configs] {
        let mut tasks = JoinSet::new();
        for blob in blobs {
            let push = Arc::clone(&push);
            tasks.spawn(async move { push.blob(&blob).await });
        }
        all(tasks, &push.action).await?;
    }
    let last = tree.manifests.len().saturating_sub(1);
    for (i, manifest) in tree.manifests.iter().enumerate() {
        let name = match to.tag().filter(|_| i == last) {
            Some(tag) => tag.to_owned(),
            None => manifest.descriptor.digest.to_string(),
        };
        push.manifest(&name, manifest).await?;
    }
    let found = inner.head_of(&push.endpoint, &tag_of(to, target), &push.action).await?;
    match found {
        Some(found) if found.digest == target.digest => Ok(()),
        found => Err(RegistryError::Corrupt {
            what: format!("{to} as read back after the push"),
            expected: target.digest.to_string(),
            actual: found.map_or_else(|| "nothing".into(), |f| f.digest.to_string()),
        }),
    }
}

/// What is read back: the tag when there is one, else the digest.
fn tag_of(to: &Reference, target: &Descriptor) -> Reference {
    to.tag().map_or_else(|| to.with_digest(target.digest), |tag| to.with_tag(tag))
}

impl Push {
    /// Reads manifests from the store, or from where they came from.
    async fn collect(&mut self, target: &Descriptor, tree: &mut Tree, depth: usize) -> Result<(), RegistryError> {
        if !tree.seen.insert(target.digest) {
            return Ok(());
        }
        if depth == 0 {
            let media_type = format!("more than {MAX_DEPTH} indexes in each other");
            return Err(RegistryError::Unsupported { reference: self.to.to_string(), media_type });
        }
        if target.size > MAX_MANIFEST {
            return Err(RegistryError::TooLarge { what: format!("manifest {}", target.digest), size: target.size, limit: MAX_MANIFEST });
        }
        let origin = self.origins.get(&target.digest).cloned();
        // What the store has is taken from there, unless it is damaged.
        let bytes = if let Some(origin) = &origin {
            self.inner.manifest_into(origin, Some(target), &self.store).await?.bytes
        } else {
            let (store, digest) = (self.store.clone(), target.digest);
            blocking(&self.action, move || store.read(&digest)).await?
        };
        let fetched = Fetched { descriptor: target.clone(), bytes };
        match parse(&fetched, &target.digest.to_string())? {
            Document::Index(index) => {
                for child in index.manifests {
                    self.inherit(child.digest, origin.as_ref());
                    Box::pin(self.collect(&child, tree, depth - 1)).await?;
                }
            }
            Document::Manifest(manifest) => {
                for layer in manifest.layers {
                    self.inherit(layer.digest, origin.as_ref());
                    if !is_foreign(&layer.media_type) && tree.seen.insert(layer.digest) {
                        tree.layers.push(layer);
                    }
                }
                self.inherit(manifest.config.digest, origin.as_ref());
                if tree.seen.insert(manifest.config.digest) {
                    tree.configs.push(manifest.config);
                }
            }
        }
        tree.manifests.push(fetched);
        Ok(())
    }

    /// What a fetched manifest names is where the manifest was.
    fn inherit(&mut self, digest: Digest, origin: Option<&Reference>) {
        if let Some(origin) = origin {
            self.origins.entry(digest).or_insert_with(|| origin.clone());
        }
    }

    fn call<'a>(&'a self, method: Method, url: Url, payload: Payload, action: &'a str) -> Call<'a> {
        Call {
            endpoint: &self.endpoint,
            repository: self.to.repository(),
            method,
            url,
            scopes: vec![scope(&self.endpoint, &self.to, "pull,push")],
            headers: vec![],
            payload,
            action,
        }
    }

    fn url(&self, tail: &str) -> Url {
        self.endpoint.url(self.to.repository(), tail)
    }

    /// Makes sure that a blob is in the repository.
    async fn blob(&self, blob: &Descriptor) -> Result<(), RegistryError> {
        let action = format!("push blob {} to {}", blob.digest.short(), self.to);
        let _flight = self.inner.flight(format!("push {} {}", self.url(""), blob.digest)).await;
        if self.exists(blob, &action).await? {
            (self.progress)(&blob.digest, blob.size, blob.size);
            return Ok(());
        }
        let origin = self.origins.get(&blob.digest);
        let mut session = None;
        if let Some(origin) = origin.filter(|o| o.registry() == self.to.registry() && o.repository() != self.to.repository()) {
            match self.mount(blob, origin, &action).await? {
                None => {
                    (self.progress)(&blob.digest, blob.size, blob.size);
                    return Ok(());
                }
                Some(started) => session = started,
            }
        }
        if let Err(damage) = self.store.check(blob) {
            let Some(origin) = origin else { return Err(RegistryError::store(&action, damage)) };
            self.inner.fetch_blob(origin, blob, &self.store, &self.progress).await?;
        }
        let _transfer = self.inner.transfer(&action).await?;
        let uploaded = self.upload(blob, session, &action).await;
        if let Err(RegistryError::Corrupt { .. } | RegistryError::Protocol { .. } | RegistryError::Interrupted { .. }) = &uploaded {
            // Not the registry's fault when the bytes here are wrong; they are removed then, so that the next build makes them anew.
            let (store, digest) = (self.store.clone(), blob.digest);
            blocking(&action, move || store.verify(&digest)).await?;
        }
        uploaded
    }

    async fn upload(&self, blob: &Descriptor, mut session: Option<Url>, action: &str) -> Result<(), RegistryError> {
        let mut backoff = Backoff::new(self.endpoint.attempts);
        let mut in_pieces = false;
        loop {
            let result = async {
                let (url, chunk) = match session.take() {
                    Some(url) => (url, CHUNK),
                    None => self.start(action).await?,
                };
                if in_pieces {
                    return self.upload_in_pieces(blob, url, chunk, action).await.map(|()| Put::Done);
                }
                self.upload_whole(blob, url, action).await
            }
            .await;
            match result {
                Ok(Put::Done) => {
                    (self.progress)(&blob.digest, blob.size, blob.size);
                    return Ok(());
                }
                Ok(Put::InPieces(_)) if !in_pieces && blob.size > 0 => in_pieces = true,
                Ok(Put::InPieces(error)) => return Err(error),
                Err(error) => {
                    backoff.pause(error).await?;
                    // The answer may be lost, and the blob there.
                    if self.exists(blob, action).await? {
                        return Ok(());
                    }
                }
            }
        }
    }

    async fn exists(&self, blob: &Descriptor, action: &str) -> Result<bool, RegistryError> {
        let call = self.call(Method::HEAD, self.url(&format!("blobs/{}", blob.digest)), Payload::None, action);
        let response = self.inner.send(&call).await?;
        match response.status() {
            status if status.is_success() => Ok(true),
            // Some registries allow to push, but not to look.
            StatusCode::NOT_FOUND | StatusCode::FORBIDDEN | StatusCode::METHOD_NOT_ALLOWED => Ok(false),
            _ => Err(failure(response, &call, &self.to.to_string()).await),
        }
    }

    /// `None`: mounted. `Some`: not, with the upload that the registry started instead.
    async fn mount(&self, blob: &Descriptor, origin: &Reference, action: &str) -> Result<Option<Option<Url>>, RegistryError> {
        let mut url = self.url("blobs/uploads/");
        let from = self.endpoint.repository(origin.repository());
        url.query_pairs_mut().append_pair("mount", &blob.digest.to_string()).append_pair("from", &from);
        let mut call = self.call(Method::POST, url, Payload::Bytes(vec![]), action);
        call.scopes.push(scope(&self.endpoint, origin, "pull"));
        let response = match self.inner.send(&call).await {
            Ok(response) => response,
            // No access to the other repository is no reason to fail: the blob is uploaded then.
            Err(RegistryError::Unauthorized { .. } | RegistryError::Denied { .. }) => return Ok(Some(None)),
            Err(error) => return Err(error),
        };
        Ok(match response.status() {
            StatusCode::CREATED => None,
            StatusCode::ACCEPTED => Some(self.location(&response, &call)),
            _ => Some(None),
        })
    }

    fn location(&self, response: &Response, call: &Call<'_>) -> Option<Url> {
        let location = response.headers().get(LOCATION)?.to_str().ok()?;
        self.endpoint.locate(&call.url, location)
    }

    /// Starts an upload: where to send it, and the smallest piece that the registry takes.
    async fn start(&self, action: &str) -> Result<(Url, u64), RegistryError> {
        let call = self.call(Method::POST, self.url("blobs/uploads/"), Payload::Bytes(vec![]), action);
        let response = self.inner.send(&call).await?;
        if response.status() != StatusCode::ACCEPTED {
            return Err(failure(response, &call, &self.to.to_string()).await);
        }
        let least = header(&response, "oci-chunk-min-length").and_then(|l| l.parse::<u64>().ok()).unwrap_or(0);
        let url = self.location(&response, &call).ok_or_else(|| call.protocol("it started an upload without a usable Location"))?;
        Ok((url, CHUNK.max(least).min(MAX_CHUNK)))
    }

    /// A piece of the blob's file that reports its progress.
    fn payload(&self, blob: &Descriptor, offset: u64, length: u64) -> Payload {
        if length == 0 {
            return Payload::Bytes(vec![]);
        }
        let (progress, digest, size) = (Arc::clone(&self.progress), blob.digest, blob.size);
        Payload::File {
            path: self.store.blob_path(&blob.digest),
            offset,
            length,
            sent: Arc::new(AtomicU64::new(0)),
            report: Arc::new(move |sent| progress(&digest, offset + sent, size)),
        }
    }

    async fn upload_whole(&self, blob: &Descriptor, mut url: Url, action: &str) -> Result<Put, RegistryError> {
        url.query_pairs_mut().append_pair("digest", &blob.digest.to_string());
        let mut call = self.call(Method::PUT, url, self.payload(blob, 0, blob.size), action);
        call.headers.push((CONTENT_TYPE, HeaderValue::from_static("application/octet-stream")));
        let response = self.inner.send(&call).await?;
        if response.status().is_success() {
            return Ok(Put::Done);
        }
        let status = response.status();
        match self.refused(response, blob, &call).await {
            error @ RegistryError::Protocol { .. } if matches!(status.as_u16(), 400 | 405 | 411 | 413 | 415 | 416) => {
                Ok(Put::InPieces(error))
            }
            error => Err(error),
        }
    }

    async fn upload_in_pieces(&self, blob: &Descriptor, mut url: Url, chunk: u64, action: &str) -> Result<(), RegistryError> {
        let mut offset = 0;
        while offset < blob.size {
            let length = chunk.min(blob.size - offset);
            let mut call = self.call(Method::PATCH, url, self.payload(blob, offset, length), action);
            call.headers.push((CONTENT_TYPE, HeaderValue::from_static("application/octet-stream")));
            let range = HeaderValue::try_from(format!("{offset}-{}", offset + length - 1));
            call.headers.extend(range.map(|range| (CONTENT_RANGE, range)));
            let response = self.inner.send(&call).await?;
            if !response.status().is_success() {
                return Err(self.refused(response, blob, &call).await);
            }
            url = self.location(&response, &call).unwrap_or_else(|| call.url.clone());
            offset += length;
        }
        url.query_pairs_mut().append_pair("digest", &blob.digest.to_string());
        let call = self.call(Method::PUT, url, Payload::Bytes(vec![]), action);
        let response = self.inner.send(&call).await?;
        if response.status().is_success() { Ok(()) } else { Err(self.refused(response, blob, &call).await) }
    }

    /// Why an upload was not taken.
    async fn refused(&self, response: Response, blob: &Descriptor, call: &Call<'_>) -> RegistryError {
        let status = response.status();
        if !matches!(status.as_u16(), 400 | 404 | 416) {
            return failure(response, call, &self.to.to_string()).await;
        }
        let (said, codes) = detail(response, call.endpoint).await;
        let (action, registry) = (call.action.to_owned(), self.endpoint.registry.clone());
        if codes.iter().any(|c| c == "DIGEST_INVALID") {
            let what = format!("blob {} in the store, or on its way to {registry}", blob.digest.short());
            return RegistryError::Corrupt { what, expected: blob.digest.to_string(), actual: format!("other bytes ({said})") };
        }
        if status == StatusCode::NOT_FOUND {
            // The session is gone (the registry was restarted, or another one answered): a new one may do.
            return RegistryError::Interrupted { action, registry, reason: format!("the upload was forgotten ({said})") };
        }
        RegistryError::Protocol { action, registry, reason: format!("status {}: {said}", status.as_u16()) }
    }

    async fn manifest(&self, name: &str, manifest: &Fetched) -> Result<(), RegistryError> {
        let kind = if is_index(&manifest.descriptor.media_type) { "index" } else { "manifest" };
        let action = format!("push the {kind} of {}", self.to);
        let url = self.url(&format!("manifests/{name}"));
        let mut call = self.call(Method::PUT, url, Payload::Bytes(manifest.bytes.clone()), &action);
        let media_type = HeaderValue::try_from(&manifest.descriptor.media_type);
        call.headers.push((CONTENT_TYPE, media_type.map_err(|_| call.protocol("the media type is no header value"))?));
        let response = self.inner.send(&call).await?;
        if !response.status().is_success() {
            return Err(failure(response, &call, &self.to.to_string()).await);
        }
        let said = header(&response, "docker-content-digest").and_then(|d| d.parse::<Digest>().ok());
        match said {
            Some(said) if said != manifest.descriptor.digest => Err(RegistryError::Corrupt {
                what: format!("the {kind} of {} as the registry took it", self.to),
                expected: manifest.descriptor.digest.to_string(),
                actual: said.to_string(),
            }),
            _ => Ok(()),
        }
    }
}
