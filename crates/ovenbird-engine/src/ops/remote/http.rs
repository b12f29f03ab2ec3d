//! Downloads.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, SystemTime};

use ovenbird_oci::Digest;
use ovenbird_oci::digest::Hasher;
use ovenbird_oci::registry::web;

use super::{Fetched, fetch_error, file, found, host_of, named_secret};
use crate::error::BuildError;
use crate::event::Event;
use crate::ops::{Session, exec::StepName};
use crate::plan::HttpOp;

/// Downloads a URL into a snapshot with one file (mode 0600, mtime from `Last-Modified`). With a checksum that was seen before nothing is
/// fetched. Source: `ADD <url>` in the Dockerfile reference.
pub fn fetch(session: &Session, step: &StepName, op: &HttpOp) -> Result<Fetched, BuildError> {
    let key_of = |content: &Digest| Digest::of(format!("http {} {content}", op.filename).as_bytes());
    if let Some(record) = op.checksum.as_ref().and_then(|checksum| found(session, key_of(checksum))) {
        return Ok(record);
    }
    session.check_stop()?;
    let work = session.state.work_dir()?;
    let path = work.subdir("fs")?.join(&op.filename);
    let (content, modified) = session.runtime.block_on(download(session, step, op, &path))?;
    if let Some(expected) = &op.checksum
        && *expected != content
    {
        return Err(fetch_error(step, &op.url, format!("digest mismatch: its content hashes to {content}, not to --checksum={expected}")));
    }
    if let Some(record) = found(session, key_of(&content)) {
        return Ok(record);
    }
    let output = BuildError::output(&path);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))
        .and_then(|()| File::options().write(true).open(&path)?.set_modified(modified))
        .map_err(output)?;
    file(session, key_of(&content), work)
}

async fn download(session: &Session<'_>, step: &StepName, op: &HttpOp, path: &std::path::Path) -> Result<(Digest, SystemTime), BuildError> {
    let fail = |error: reqwest::Error| fetch_error(step, &op.url, describe(error));
    let host = host_of(&op.url);
    let mut request = web::client()?.get(&op.url);
    if let Some(header) = named_secret(session, &[format!("HTTP_AUTH_HEADER_{host}")]) {
        request = request.header(reqwest::header::AUTHORIZATION, header);
    } else if let Some(token) = named_secret(session, &[format!("HTTP_AUTH_TOKEN_{host}")]) {
        request = request.bearer_auth(token);
    }
    let mut response = request.send().await.map_err(fail)?;
    if !response.status().is_success() {
        return Err(fetch_error(step, &op.url, format!("invalid response status {}", response.status())));
    }
    let modified = response
        .headers()
        .get(reqwest::header::LAST_MODIFIED)
        .and_then(|value| jiff::fmt::rfc2822::parse(value.to_str().ok()?).ok())
        .map_or(SystemTime::UNIX_EPOCH, |time| {
            SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp().as_second()).unwrap_or(0))
        });
    let total = response.content_length();
    let event = |current, done| Event::Progress {
        id: format!("download {}", op.url),
        label: format!("downloading {}", op.filename),
        current,
        total,
        done,
    };
    let output = |error| BuildError::output(path)(error);
    let mut out = File::create(path).map_err(output)?;
    let mut hasher = Hasher::default();
    let mut done = 0;
    while let Some(chunk) = response.chunk().await.map_err(fail)? {
        session.check_stop()?;
        hasher.update(&chunk);
        out.write_all(&chunk).map_err(output)?;
        done += chunk.len() as u64;
        session.sink.emit(event(done, false));
    }
    session.sink.emit(event(done, true));
    Ok((hasher.finish().0, modified))
}

/// The whole chain of causes; reqwest's own text stops at the first, and names the URL with its credentials.
fn describe(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(next) = cause {
        text = format!("{text}: {next}");
        cause = next.source();
    }
    text
}
