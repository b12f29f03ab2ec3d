//! One blob into one repository, over connections that break.
//!
//! A small blob goes in one request. A large one is written into the upload that the registry keeps; when that breaks, the registry is
//! asked how much it has, and the rest is sent. What a registry keeps of a request that broke differs: all that arrived (as the
//! specification means it), nothing of that request, or not even the upload (Docker's own registry, version 2). Each is learned by
//! asking; only the registry's word counts as progress.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use reqwest::header::{CONTENT_RANGE, CONTENT_TYPE, HeaderValue, RANGE};
use reqwest::{Method, Response, StatusCode, Url};

use super::pull::header;
use super::push::Repository;
use super::transport::{Backoff, Call, Payload, detail, failure};
use super::{Breaks, RegistryError};
use crate::{Descriptor, Digest};

/// Blobs from this size on can be resumed, in bytes. What is smaller is sent again faster than it is asked for: one request is saved for
/// each of the many small blobs.
pub(super) const RESUMABLE: u64 = 32 << 20;
/// Piece for registries that keep nothing of a request that broke, in bytes.
const PIECE: u64 = 64 << 20;
/// Piece for proxies that let no large request through, in bytes.
const SMALL_PIECE: u64 = 16 << 20;
/// Largest piece that a registry may insist on, in bytes.
const MAX_PIECE: u64 = 1 << 30;
/// Attempts at a large blob without any progress: the more there is to send, the more often it breaks.
const ATTEMPTS: usize = 10;

/// What a registry must have more, in bytes, for all attempts to be free again.
const PROGRESS: u64 = 1 << 20;

/// How the bytes are cut into requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// All that is missing into the upload, as Docker does it.
    Rest,
    /// One request that also completes the upload.
    Whole,
    /// Requests of at most so many bytes.
    Pieces(u64),
}

/// An upload that the registry keeps.
pub(super) struct Session {
    pub(super) url: Url,
    /// Bytes that it has.
    offset: u64,
    /// Smallest piece that it takes, but for the last.
    least: u64,
}

impl Session {
    /// With so many bytes in it.
    pub(super) fn new(url: Url, offset: u64) -> Self {
        Self { url, offset, least: 0 }
    }
}

/// What a registry has after an upload broke.
enum Known {
    /// All of it.
    Blob,
    /// A part. `None`: it has forgotten the upload, or says of it what cannot be.
    Upload(Option<Session>),
}

/// Why an attempt ended early.
enum Broken {
    /// The server, or a proxy before it, does not take it in this manner.
    Refused {
        status: StatusCode,
        error: RegistryError,
    },
    Failed(RegistryError),
}

impl From<RegistryError> for Broken {
    fn from(error: RegistryError) -> Self {
        Self::Failed(error)
    }
}

impl Repository {
    /// Uploads a blob, into an upload that was started already if there is one.
    pub(super) async fn upload(&self, blob: &Descriptor, started: Option<Session>, action: &str) -> Result<(), RegistryError> {
        let mut breaks = Breaks::default();
        let result = self.upload_counted(blob, started, action, &mut breaks).await;
        self.inner.broke(breaks);
        if result.is_ok() {
            (self.progress)(&blob.digest, blob.size, blob.size);
        }
        result
    }

    async fn upload_counted(
        &self,
        blob: &Descriptor,
        started: Option<Session>,
        action: &str,
        breaks: &mut Breaks,
    ) -> Result<(), RegistryError> {
        let mut manner = if blob.size >= RESUMABLE { Manner::Rest } else { Manner::Whole };
        let mut backoff = Backoff::new(if blob.size >= RESUMABLE { ATTEMPTS } else { self.endpoint.attempts });
        // The most that a registry had, and what of it this session did not send again.
        let (mut best, mut kept) = (0, 0);
        let mut continued = started.as_ref().is_some_and(|open| open.offset > 0);
        let mut session = started;
        loop {
            let mut open = match session.take() {
                Some(open) => open,
                None => match self.start(action).await {
                    Ok(open) => open,
                    Err(error) => {
                        backoff.pause(error).await?;
                        continue;
                    }
                },
            };
            let sent = Arc::new(AtomicU64::new(open.offset));
            let error = match self.send(blob, &mut open, manner, &sent, action).await {
                Ok(()) => {
                    breaks.resumed += kept;
                    return Ok(());
                }
                Err(Broken::Refused { status, error }) => {
                    manner = next_manner(manner, status).ok_or(error)?;
                    continue;
                }
                Err(Broken::Failed(error)) => error,
            };
            let sent = sent.load(Ordering::Relaxed);
            // A registry that still wrote what arrived before the break, while it took the rest, gets all in one request.
            if matches!(error, RegistryError::Corrupt { .. }) && continued && manner != Manner::Whole {
                manner = Manner::Whole;
            } else {
                breaks.count += u64::from(error.is_break());
                let mut error = error;
                session = loop {
                    backoff.pause(error).await?;
                    match self.known(&open, blob, manner, action).await {
                        // The answer was lost, and the blob is there.
                        Ok(Known::Blob) => {
                            breaks.resumed += sent;
                            return Ok(());
                        }
                        Ok(Known::Upload(session)) => break session,
                        Err(again) => error = again,
                    }
                };
            }
            continued = session.is_some();
            let Some(open) = &session else {
                breaks.retried += sent;
                kept = 0;
                continue;
            };
            breaks.retried += sent.saturating_sub(open.offset);
            kept = open.offset;
            if open.offset >= best + PROGRESS {
                best = open.offset;
                backoff.reset();
            } else if manner == Manner::Rest {
                manner = Manner::Pieces(PIECE);
            }
        }
    }

    /// Starts an upload.
    pub(super) async fn start(&self, action: &str) -> Result<Session, RegistryError> {
        let call = self.call(Method::POST, self.url("blobs/uploads/"), Payload::Bytes(vec![]), action);
        let response = self.inner.send(&call).await?;
        if response.status() != StatusCode::ACCEPTED {
            return Err(failure(response, &call, &self.to.to_string()).await);
        }
        let least = header(&response, "oci-chunk-min-length").and_then(|l| l.parse().ok()).unwrap_or(0);
        let url = self.location(&response, &call).ok_or_else(|| call.protocol("it started an upload without a usable Location"))?;
        Ok(Session { least, ..Session::new(url, 0) })
    }

    /// Asks what arrived of an upload that broke.
    async fn known(&self, open: &Session, blob: &Descriptor, manner: Manner, action: &str) -> Result<Known, RegistryError> {
        if self.exists(blob, action).await? {
            return Ok(Known::Blob);
        }
        if manner == Manner::Whole {
            return Ok(Known::Upload(None));
        }
        let call = self.call(Method::GET, open.url.clone(), Payload::None, action);
        let response = self.inner.send(&call).await?;
        if !response.status().is_success() {
            return Ok(Known::Upload(None));
        }
        let url = self.location(&response, &call).unwrap_or_else(|| open.url.clone());
        let offset = header(&response, RANGE.as_str()).map_or(Some(0), |range| received(&range));
        let session = offset.filter(|offset| *offset <= blob.size).map(|offset| Session { url, offset, least: open.least });
        Ok(Known::Upload(session))
    }

    /// Sends what is missing, and completes the upload.
    async fn send(&self, blob: &Descriptor, open: &mut Session, manner: Manner, sent: &Arc<AtomicU64>, action: &str) -> Result<(), Broken> {
        let piece = match manner {
            Manner::Whole => {
                let (url, payload) = (complete(&open.url, blob), self.payload(blob, 0, blob.size, sent));
                let mut call = self.call(Method::PUT, url, payload, action);
                call.headers.push((CONTENT_TYPE, HeaderValue::from_static("application/octet-stream")));
                let response = self.inner.send(&call).await?;
                return self.completed(response, blob, &call).await;
            }
            Manner::Rest => u64::MAX,
            Manner::Pieces(size) => size.max(open.least.min(MAX_PIECE)),
        };
        while open.offset < blob.size {
            let length = piece.min(blob.size - open.offset);
            let payload = self.payload(blob, open.offset, length, sent);
            let mut call = self.call(Method::PATCH, open.url.clone(), payload, action);
            call.headers.push((CONTENT_TYPE, HeaderValue::from_static("application/octet-stream")));
            // All at once is what every registry takes from Docker, which names no range.
            if length < blob.size {
                let range = HeaderValue::try_from(format!("{}-{}", open.offset, open.offset + length - 1));
                call.headers.extend(range.map(|range| (CONTENT_RANGE, range)));
            }
            let response = self.inner.send(&call).await?;
            if !response.status().is_success() {
                return Err(self.refused(response, blob, &call).await);
            }
            let url = self.location(&response, &call);
            let expected = open.offset + length;
            let has = header(&response, RANGE.as_str()).and_then(|range| received(&range)).unwrap_or(expected);
            if has != expected {
                let reason = format!("it has {has} bytes of the blob after {expected} were sent");
                return Err(Broken::Failed(self.interrupted(action, reason)));
            }
            open.url = url.unwrap_or_else(|| open.url.clone());
            open.offset = expected;
        }
        let call = self.call(Method::PUT, complete(&open.url, blob), Payload::Bytes(vec![]), action);
        let response = self.inner.send(&call).await?;
        self.completed(response, blob, &call).await
    }

    /// Whether a blob was taken, and as what.
    async fn completed(&self, response: Response, blob: &Descriptor, call: &Call<'_>) -> Result<(), Broken> {
        if !response.status().is_success() {
            return Err(self.refused(response, blob, call).await);
        }
        let said = header(&response, "docker-content-digest").and_then(|d| d.parse::<Digest>().ok());
        match said.filter(|said| *said != blob.digest) {
            None => Ok(()),
            Some(said) => {
                let what = format!("blob {} as {} took it", blob.digest.short(), self.endpoint.registry);
                Err(RegistryError::Corrupt { what, expected: blob.digest.to_string(), actual: said.to_string() }.into())
            }
        }
    }

    /// A piece of the blob, as a stream that reports its progress. The one place that knows where a blob's bytes come from.
    fn payload(&self, blob: &Descriptor, offset: u64, length: u64, sent: &Arc<AtomicU64>) -> Payload {
        if length == 0 {
            return Payload::Bytes(vec![]);
        }
        let (progress, digest, size) = (Arc::clone(&self.progress), blob.digest, blob.size);
        let sent = Arc::clone(sent);
        Payload::File {
            path: self.store.blob_path(&blob.digest),
            offset,
            length,
            sent: Arc::new(AtomicU64::new(0)),
            report: Arc::new(move |now| {
                sent.store(offset + now, Ordering::Relaxed);
                // The last byte is reported when the registry has the blob.
                if offset + now < size {
                    progress(&digest, offset + now, size);
                }
            }),
        }
    }

    fn interrupted(&self, action: &str, reason: String) -> RegistryError {
        RegistryError::Interrupted { action: action.into(), registry: self.endpoint.registry.clone(), reason }
    }

    /// Why an upload was not taken.
    async fn refused(&self, response: Response, blob: &Descriptor, call: &Call<'_>) -> Broken {
        let status = response.status();
        if !matches!(status.as_u16(), 400 | 404 | 416) {
            let error = failure(response, call, &self.to.to_string()).await;
            let manner = matches!(error, RegistryError::Protocol { .. });
            return if manner { Broken::Refused { status, error } } else { Broken::Failed(error) };
        }
        let (said, codes) = detail(response, call.endpoint).await;
        let (action, registry) = (call.action.to_owned(), self.endpoint.registry.clone());
        if codes.iter().any(|c| c == "DIGEST_INVALID") {
            let what = format!("blob {} in the store, or on its way to {registry}", blob.digest.short());
            return RegistryError::Corrupt { what, expected: blob.digest.to_string(), actual: format!("other bytes ({said})") }.into();
        }
        match status {
            // The upload is gone (the registry was restarted, or another one answered): a new one may do.
            StatusCode::NOT_FOUND => self.interrupted(&action, format!("the upload was forgotten ({said})")).into(),
            StatusCode::RANGE_NOT_SATISFIABLE if call.method == Method::PATCH && call.headers.iter().any(|(n, _)| n == CONTENT_RANGE) => {
                self.interrupted(&action, format!("it has another part of the blob ({said})")).into()
            }
            _ => {
                let reason = format!("status {}: {said}", status.as_u16());
                Broken::Refused { status, error: RegistryError::Protocol { action, registry, reason } }
            }
        }
    }
}

/// What to do when a server does not take a blob in one manner; `None`: nothing more.
fn next_manner(refused: Manner, status: StatusCode) -> Option<Manner> {
    match (refused, status.as_u16()) {
        (Manner::Rest | Manner::Pieces(PIECE), 413) | (Manner::Whole, 400 | 405 | 411 | 413 | 415 | 416) => {
            Some(Manner::Pieces(SMALL_PIECE))
        }
        // Google's registries take a blob in one request only.
        (Manner::Rest | Manner::Pieces(PIECE), 400 | 405 | 411 | 415 | 416) => Some(Manner::Whole),
        _ => None,
    }
}

/// Where an upload is completed.
fn complete(upload: &Url, blob: &Descriptor) -> Url {
    let mut url = upload.clone();
    url.query_pairs_mut().append_pair("digest", &blob.digest.to_string());
    url
}

/// How many bytes a registry has, from `0-LAST`. It cannot say that it has none: `0-0` is taken for that, and a blob of one byte is never
/// resumed.
fn received(range: &str) -> Option<u64> {
    let (first, last) = range.trim().trim_start_matches("bytes=").split_once('-')?;
    match (first.trim().parse::<u64>().ok()?, last.trim().parse::<u64>().ok()?) {
        (0, 0) => Some(0),
        (0, last) => last.checked_add(1),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_registries() {
        for (text, expected) in [
            ("0-0", Some(0)),
            ("0-99", Some(100)),
            (" bytes=0-99 ", Some(100)),
            ("0-18446744073709551615", None),
            ("5-99", None),
            ("0--1", None),
            ("99", None),
            ("", None),
        ] {
            assert_eq!(received(text), expected, "{text:?}");
        }
    }

    #[test]
    fn every_way_of_refusing_ends() {
        for status in [400, 405, 411, 413, 415, 416, 418, 500] {
            for first in [Manner::Rest, Manner::Whole, Manner::Pieces(PIECE)] {
                let mut steps = vec![first];
                while let Some(next) = next_manner(steps[steps.len() - 1], StatusCode::from_u16(status).unwrap()) {
                    assert!(!steps.contains(&next), "{status}: {steps:?} {next:?}");
                    steps.push(next);
                }
            }
        }
    }
}
