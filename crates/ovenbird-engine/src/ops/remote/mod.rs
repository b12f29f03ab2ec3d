//! `ADD` of URLs and git repositories: fetched once, then a snapshot like any other.

pub mod download;
pub mod git;
pub mod http;
pub mod repository;

use ovenbird_dockerfile::redact::without_passwords;
use ovenbird_oci::Digest;

use crate::cache::{self, CacheKey, Link, Record};
use crate::error::BuildError;
use crate::ops::{Session, exec::StepName};
use crate::state::WorkDir;

/// A fetched source: key by content, files as one diff.
pub type Fetched = Record;

fn found(session: &Session, key: Digest) -> Option<Fetched> {
    cache::find(session.state, &CacheKey::of_content(key))
}

fn file(session: &Session, key: Digest, work: WorkDir) -> Result<Fetched, BuildError> {
    let id = session.state.commit(work, None, &ovenbird_oci::layer::Owners::new())?;
    let record = Record { key: CacheKey::of_content(key), chain: vec![Link::new_diff(id)] };
    cache::save(session.state, &record.key, &record)?;
    Ok(record)
}

fn fetch_error(step: &StepName, url: &str, reason: impl Into<String>) -> BuildError {
    BuildError::Fetch { url: without_passwords(url).into_owned(), line: step.line(), reason: reason.into() }
}

/// A secret that BuildKit looks for by name (`GIT_AUTH_TOKEN.host`, `HTTP_AUTH_TOKEN_host`).
fn named_secret(session: &Session, names: &[String]) -> Option<String> {
    names.iter().find_map(|name| {
        let value = session.input.secrets.get(name)?.read().ok()?;
        Some(String::from_utf8_lossy(&value).trim().to_owned())
    })
}

/// The host of a URL, without user and port.
pub fn host_of(url: &str) -> &str {
    let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = rest.split(['/', '?', '#']).next().unwrap_or(rest);
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    host.split_once(':').map_or(host, |(host, _)| host)
}
