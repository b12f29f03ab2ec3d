//! Images as archives, layouts and plain folders.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::PathBuf;

use ovenbird_oci::{Descriptor, Digest, Index, Manifest, Reference, archive};

use crate::cache::Link;
use crate::error::BuildError;
use crate::ops::{Session, image, merged};

/// A file, or standard output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PathOrStdout {
    /// A file; replaced when whole.
    Path(PathBuf),
    /// Standard output.
    Stdout,
}

/// Form of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Export {
    /// OCI layout as a tar.
    OciTar(PathOrStdout),
    /// OCI layout as a folder.
    OciDir(PathBuf),
    /// Docker archive (also an OCI layout), one platform.
    DockerTar(PathOrStdout),
    /// The files, in a folder.
    RootfsDir(PathBuf),
    /// The files, in a tar.
    RootfsTar(PathOrStdout),
}

/// Writes an image that is in the store; layers that were never fetched are fetched first.
pub fn export(session: &Session, target: &Descriptor, form: &Export, names: &[Reference]) -> Result<(), BuildError> {
    match form {
        Export::OciTar(to) => {
            complete(session, target)?;
            write_to(to, |out| Ok(archive::write_oci(session.state.store(), target, names, out)?))
        }
        Export::OciDir(dir) => {
            complete(session, target)?;
            Ok(archive::write_oci_dir(session.state.store(), target, names, dir)?)
        }
        Export::DockerTar(to) => {
            complete(session, target)?;
            write_to(to, |out| Ok(archive::write_docker(session.state.store(), target, names, out)?))
        }
        Export::RootfsDir(dir) => {
            let images = images(session, target)?;
            for (descriptor, digest) in &images {
                let dir = match &descriptor.platform {
                    Some(platform) if images.len() > 1 => dir.join(platform.to_string().replace('/', "_")),
                    _ => dir.clone(),
                };
                fs::create_dir_all(&dir).map_err(BuildError::output(&dir))?;
                let snapshot = snapshot_of(session, digest)?;
                merged::export_dir(&snapshot, &dir, session.state.ownership(), session.input.source_date_epoch).map_err(file_error)?;
            }
            Ok(())
        }
        Export::RootfsTar(to) => {
            let images = images(session, target)?;
            let [(_, digest)] = &images[..] else {
                return Err(BuildError::Refused {
                    option: "type=tar".into(),
                    reason: format!("the image has {} platforms and a tar holds one; use type=local or one --platform", images.len()),
                });
            };
            let snapshot = snapshot_of(session, digest)?;
            write_to(to, |out| merged::write_tar(&snapshot, out, session.input.source_date_epoch).map_err(file_error))
        }
    }
}

fn file_error(source: crate::ops::file::FileError) -> BuildError {
    BuildError::File { step: "exporting".into(), line: None, source }
}

fn snapshot_of(session: &Session, digest: &Digest) -> Result<crate::snapshot::Snapshot, BuildError> {
    let reference = "localhost/exported".parse().map_err(|error| BuildError::Malformed { digest: digest.to_string(), reason: format!("{error}") })?;
    image::snapshot(session, &[Link::Image { manifest: *digest, reference }])
}

/// The manifests below a descriptor.
fn images(session: &Session, target: &Descriptor) -> Result<Vec<(Descriptor, Digest)>, BuildError> {
    if !image::is_index(&target.media_type) {
        return Ok(vec![(target.clone(), target.digest)]);
    }
    let index: Index = serde_json::from_slice(&session.state.store().read(&target.digest)?)
        .map_err(|error| BuildError::Malformed { digest: target.digest.to_string(), reason: error.to_string() })?;
    // Platforms that were never pulled are not part of what can be written.
    Ok(index.manifests.into_iter().filter(|m| session.state.store().has(&m.digest)).map(|m| (m.clone(), m.digest)).collect())
}

/// Fetches the layers that are missing.
pub fn complete(session: &Session, target: &Descriptor) -> Result<(), BuildError> {
    for (_, digest) in images(session, target)? {
        let manifest: Manifest = serde_json::from_slice(&session.state.store().read(&digest)?)
            .map_err(|error| BuildError::Malformed { digest: digest.to_string(), reason: error.to_string() })?;
        for layer in &manifest.layers {
            if session.state.store().has(&layer.digest) {
                continue;
            }
            let origin = session.state.origin(&layer.digest).ok_or_else(|| BuildError::Malformed {
                digest: digest.to_string(),
                reason: format!("its layer {} is neither in the store nor known to be in a registry; pull or build it again", layer.digest),
            })?;
            image::fetch(session, &[layer], &origin)?;
        }
    }
    Ok(())
}

/// Writes a file beside its place and renames it, so that a failure leaves the old one. What is no regular file (a pipe, `/dev/null`) is
/// written to directly.
fn write_to(to: &PathOrStdout, write: impl FnOnce(&mut dyn Write) -> Result<(), BuildError>) -> Result<(), BuildError> {
    match to {
        PathOrStdout::Stdout => {
            let mut out = BufWriter::with_capacity(1 << 18, io::stdout().lock());
            write(&mut out)?;
            out.flush().map_err(BuildError::output("standard output".as_ref()))
        }
        PathOrStdout::Path(path) => {
            let special = fs::metadata(path).is_ok_and(|meta| !meta.is_file());
            let temporary = if special { path.clone() } else { path.with_added_extension("partial") };
            let file = File::options().write(true).create(true).truncate(!special).open(&temporary).map_err(BuildError::output(&temporary))?;
            let mut out = BufWriter::with_capacity(1 << 18, file);
            let written = write(&mut out).and_then(|()| out.flush().map_err(BuildError::output(&temporary)));
            if special {
                return written;
            }
            match written {
                Ok(()) => fs::rename(&temporary, path).map_err(BuildError::output(path)),
                Err(error) => {
                    let _ = fs::remove_file(&temporary);
                    Err(error)
                }
            }
        }
    }
}
