//! A plain HTTP client for downloads that are no registry calls (`ADD <url>`), with the same TLS set-up.

use std::path::Path;
use std::time::Duration;

use super::RegistryError;
use super::transport::tls_config;

/// Redirects followed before a download is given up, as in curl.
const MOST_REDIRECTS: usize = 10;

/// A client that follows redirects (never from HTTPS to HTTP), with the system's certificate authorities.
pub fn client() -> Result<reqwest::Client, RegistryError> {
    client_for(|_| true)
}

/// The same, which follows no redirect to a host that is not allowed.
pub fn client_for(allowed: impl Fn(&reqwest::Url) -> bool + Send + Sync + 'static) -> Result<reqwest::Client, RegistryError> {
    client_with(None, allowed)
}

/// The same, which also believes the certificate authorities of a file.
pub fn client_with(
    ca: Option<&Path>,
    allowed: impl Fn(&reqwest::Url) -> bool + Send + Sync + 'static,
) -> Result<reqwest::Client, RegistryError> {
    let settings = |reason: String| RegistryError::Settings { registry: "downloads".into(), path: "(TLS)".into(), reason };
    let policy = reqwest::redirect::Policy::custom(move |attempt| {
        let downgraded = attempt.previous().last().is_some_and(|from| from.scheme() == "https") && attempt.url().scheme() != "https";
        if downgraded {
            attempt.error("the server redirects from https to http")
        } else if !allowed(attempt.url()) {
            attempt.error("the server redirects to a host that is not allowed")
        } else if attempt.previous().len() > MOST_REDIRECTS {
            attempt.error("too many redirects")
        } else {
            attempt.follow()
        }
    });
    reqwest::Client::builder()
        .user_agent(concat!("ovenbird/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(Duration::from_secs(30))
        .read_timeout(Duration::from_mins(2))
        .redirect(policy)
        .tls_backend_preconfigured(tls_config(true, ca, None, "downloads")?)
        .build()
        .map_err(|error| settings(error.to_string()))
}
