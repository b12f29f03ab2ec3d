//! `ADD` of a URL.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::time::SystemTime;

use ovenbird_oci::Digest;

use super::download::{self, DownloadError};
use super::repository::basic;
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
    let host = host_of(&op.url);
    let bearer = || Some(format!("Bearer {}", named_secret(session, &[format!("HTTP_AUTH_TOKEN_{host}")])?));
    let login = || op.login.as_ref().map(|login| basic(&login.user, &login.password));
    let authorization = named_secret(session, &[format!("HTTP_AUTH_HEADER_{host}")]).or_else(bearer).or_else(login);
    let event = |current, total, done| Event::Progress {
        id: format!("download {}", op.url),
        label: format!("downloading {}", op.filename),
        current,
        total,
        done,
    };
    let mut out = File::create(path).map_err(BuildError::output(path))?;
    let watch = |current, total, done| {
        session.sink.emit(event(current, total, done));
        session.check_stop().is_ok()
    };
    let done = download::fetch(&op.url, authorization.as_deref(), &mut out, &watch).await;
    let got = done.map_err(|error| match error {
        DownloadError::Stopped => BuildError::Cancelled,
        DownloadError::Write { source } => BuildError::output(path)(source),
        error => fetch_error(step, &op.url, error.to_string()),
    })?;
    Ok((got.content, got.modified.unwrap_or(SystemTime::UNIX_EPOCH)))
}
