//! One file over HTTP, for `ADD` of a URL and for contexts.

use std::io::Write;
use std::time::{Duration, SystemTime};

use ovenbird_oci::Digest;
use ovenbird_oci::digest::Hasher;
use ovenbird_oci::registry::{RegistryError, web};

/// What was downloaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Download {
    /// Digest of its content.
    pub content: Digest,
    /// `Last-Modified`.
    pub modified: Option<SystemTime>,
}

/// Why it was not. Shows no URL: it may have credentials in it.
#[derive(Debug, thiserror::Error)]
pub enum DownloadError {
    /// The connection or the transfer failed.
    #[error("{reason}")]
    Transfer {
        /// The whole chain of causes.
        reason: String,
    },
    /// The server said no.
    #[error("invalid response status {status}")]
    Status {
        /// `404 Not Found`.
        status: String,
    },
    /// No client can be made.
    #[error(transparent)]
    Client(#[from] RegistryError),
    /// What came cannot be written.
    #[error("what was downloaded cannot be written: {source}")]
    Write {
        /// Why.
        source: std::io::Error,
    },
    /// The build was stopped.
    #[error("stopped")]
    Stopped,
}

/// Downloads `url` into `out`. `watch` gets bytes, total and whether it is done, and says whether to go on.
pub async fn fetch(
    url: &str,
    authorization: Option<&str>,
    out: &mut (dyn Write + Send),
    watch: &(dyn Fn(u64, Option<u64>, bool) -> bool + Sync),
) -> Result<Download, DownloadError> {
    let mut request = web::client()?.get(url);
    if let Some(authorization) = authorization {
        request = request.header(reqwest::header::AUTHORIZATION, authorization);
    }
    let mut response = request.send().await.map_err(describe)?;
    if !response.status().is_success() {
        return Err(DownloadError::Status { status: response.status().to_string() });
    }
    let modified = response
        .headers()
        .get(reqwest::header::LAST_MODIFIED)
        .and_then(|value| jiff::fmt::rfc2822::parse(value.to_str().ok()?).ok())
        .map(|time| SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp().as_second()).unwrap_or(0)));
    let total = response.content_length();
    let mut hasher = Hasher::default();
    let mut done = 0;
    while let Some(chunk) = response.chunk().await.map_err(describe)? {
        hasher.update(&chunk);
        out.write_all(&chunk).map_err(|source| DownloadError::Write { source })?;
        done += chunk.len() as u64;
        if !watch(done, total, false) {
            return Err(DownloadError::Stopped);
        }
    }
    watch(done, total, true);
    Ok(Download { content: hasher.finish().0, modified })
}

/// The whole chain of causes; reqwest's own text stops at the first, and names the URL with its credentials.
fn describe(error: reqwest::Error) -> DownloadError {
    let error = error.without_url();
    let mut reason = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(next) = cause {
        reason = format!("{reason}: {next}");
        cause = next.source();
    }
    DownloadError::Transfer { reason }
}
