//! A blob that is sent while it is made.
//!
//! Its digest is known last, so nothing can be asked about it before: whether the registry has it, whether it could be mounted. That is why
//! only large blobs get a head start, one at a time. What fails here fails silently: the publish sends the blob as it would have anyway.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use reqwest::header::{CONTENT_TYPE, HeaderValue};
use reqwest::{Method, Url};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinHandle;
use tokio_util::io::ReaderStream;

use super::endpoint::Endpoint;
use super::push::Repository;
use super::transport::{Payload, UPLOAD_PIECE};
use super::upload::RESUMABLE;
use super::{Inner, RegistryError};
use crate::growth::{Growing, Growth};
use crate::store::Store;
use crate::{Digest, Reference};

/// A blob under way to a repository. Dropped before it is [complete](HeadStarts::complete), it is taken back.
pub struct HeadStart {
    growth: Growth,
    upload: Upload,
}

impl std::fmt::Debug for HeadStart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HeadStart").field("to", &self.upload.repository.to).finish_non_exhaustive()
    }
}

/// The upload of a head start.
struct Upload {
    repository: Arc<Repository>,
    /// Where the registry keeps it, as soon as it does.
    kept: Arc<Mutex<Option<Url>>>,
    /// Gives where it can be completed, when the registry has every byte.
    sending: Option<JoinHandle<Result<Url, RegistryError>>>,
}

/// Head starts whose blobs are complete, by repository and digest.
#[derive(Default)]
pub struct HeadStarts(Mutex<HashMap<(Url, Digest), Upload>>);

impl HeadStarts {
    /// The blob is made, and everything in it may be published.
    pub fn complete(&self, head_start: HeadStart, digest: &Digest, size: u64) {
        let HeadStart { growth, upload } = head_start;
        if growth.finish(size) && upload.kept.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
            let place = (upload.repository.url(""), *digest);
            self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(place, upload);
        }
    }

    /// Waits until the repository's registry has every byte of a blob, and gives where it can be completed. `None`: it must be sent.
    pub(super) async fn arrived(&self, repository: &Url, digest: &Digest) -> Option<Url> {
        let upload = self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&(repository.clone(), *digest));
        upload?.arrived().await
    }
}

impl HeadStart {
    /// Waits for a blob to grow, and then sends it. Must be called in a runtime.
    pub(super) fn new(inner: &Arc<Inner>, to: &Reference, store: &Store) -> Result<Self, RegistryError> {
        let growth = Growth::default();
        let repository = Arc::new(Repository {
            inner: Arc::clone(inner),
            store: store.clone(),
            endpoint: Endpoint::of(to.registry(), &inner.options)?,
            to: to.clone(),
            tree: Arc::default(),
            progress: Arc::new(|_, _, _| {}),
            head_starts: Arc::default(),
        });
        let kept = Arc::default();
        let sending = tokio::spawn(send(Arc::clone(&repository), growth.follow(), Arc::clone(&kept)));
        Ok(Self { growth, upload: Upload { repository, kept, sending: Some(sending) } })
    }

    /// For who makes the blob.
    pub fn growth(&self) -> &Growth {
        &self.growth
    }
}

impl Upload {
    /// Waits until the registry has every byte; `None`: it has not, and the blob must be sent.
    async fn arrived(mut self) -> Option<Url> {
        let url = self.sending.as_mut()?.await.ok()?.ok();
        if url.is_some() {
            self.sending = None;
        }
        url
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        let Some(sending) = self.sending.take() else { return };
        sending.abort();
        let url = self.kept.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let (Some(url), Ok(runtime)) = (url, tokio::runtime::Handle::try_current()) {
            let repository = Arc::clone(&self.repository);
            runtime.spawn(async move {
                let call = repository.call(Method::DELETE, url, Payload::None, "cancel an upload");
                let _ = repository.inner.send(&call).await;
            });
        }
    }
}

async fn send(repository: Arc<Repository>, mut growing: Growing, kept: Arc<Mutex<Option<Url>>>) -> Result<Url, RegistryError> {
    let action = format!("push a layer to {} while it is packed", repository.to);
    let gone = || RegistryError::Cancelled { action: action.clone() };
    let file = {
        let stand = growing.wait_for(|stand| stand.ready >= RESUMABLE).await.map_err(|_| gone())?;
        stand.file.clone().ok_or_else(gone)?
    };
    let _turn = turn(&repository).ok_or_else(gone)?;
    let started = repository.start(&action).await?.url;
    *kept.lock().unwrap_or_else(PoisonError::into_inner) = Some(started.clone());
    let (into, out) = tokio::io::duplex(UPLOAD_PIECE);
    let body = reqwest::Body::wrap_stream(ReaderStream::with_capacity(out, UPLOAD_PIECE));
    let mut call = repository.call(Method::PATCH, started, Payload::Once(Arc::new(Mutex::new(Some(body)))), &action);
    call.headers.push((CONTENT_TYPE, HeaderValue::from_static("application/octet-stream")));
    let timeouts = call.endpoint.timeouts;
    let mut answer = std::pin::pin!(repository.inner.send(&call));
    let response = tokio::select! {
        answer = &mut answer => answer?,
        fed = feed(into, &file, growing, timeouts.stall) => {
            fed.map_err(|_| gone())?;
            tokio::time::timeout(timeouts.commit, answer).await.map_err(|_| gone())??
        }
    };
    if !response.status().is_success() {
        return Err(call.protocol(format!("status {}", response.status().as_u16())));
    }
    Ok(repository.location(&response, &call).unwrap_or_else(|| call.url.clone()))
}

/// One at a time, and never the last transfer that the limits allow: what is packed may wait for a layer that is pulled.
fn turn(repository: &Repository) -> Option<Vec<OwnedSemaphorePermit>> {
    let inner = &repository.inner;
    let mut permits = vec![Arc::clone(&inner.head_start).try_acquire_owned().ok()?];
    let own = inner.limits.of(&repository.endpoint.registry, &repository.endpoint.options).transfers.clone();
    for limit in own.into_iter().chain([Arc::clone(&inner.transfers)]) {
        if limit.available_permits() < 2 {
            return None;
        }
        permits.push(limit.try_acquire_owned().ok()?);
    }
    Some(permits)
}

/// Passes on the bytes of a file as far as they may be read, until they are all there.
async fn feed(mut into: DuplexStream, file: &Path, mut growing: Growing, stall: Duration) -> io::Result<()> {
    let mut file = tokio::fs::File::open(file).await?;
    let mut piece = vec![0; UPLOAD_PIECE];
    let mut at = 0;
    loop {
        let (ready, whole) = {
            let stand = growing.wait_for(|stand| stand.ready > at || stand.whole).await.map_err(io::Error::other)?;
            (stand.ready, stand.whole)
        };
        if at == ready && whole {
            return Ok(());
        }
        let most = usize::try_from(ready - at).unwrap_or(usize::MAX).min(piece.len());
        let read = file.read_exact(&mut piece[..most]).await?;
        tokio::time::timeout(stall, into.write_all(&piece[..read])).await??;
        at += read as u64;
    }
}
