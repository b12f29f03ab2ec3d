//! Images as archives, layouts and plain folders.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use ovenbird_oci::archive::ArchiveError;
use ovenbird_oci::layer::Owners;
use ovenbird_oci::store::StoreError;
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, utimensat};
use rustix::io::Errno;

use ovenbird_oci::{Descriptor, Digest, Index, Manifest, Reference, archive};

use crate::cache::Link;
use crate::error::BuildError;
use crate::event::Event;
use crate::ops::{Session, image, merged};
use crate::snapshot::Snapshot;

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

/// Writes an image that is in the store; layers that were never fetched are fetched first. A blob that turns out to be damaged is
/// removed: the next build fetches it or makes it again.
pub fn export(session: &Session, target: &Descriptor, form: &Export, names: &[Reference]) -> Result<(), BuildError> {
    let written = write(session, target, form, names);
    if let Err(BuildError::Archive(ArchiveError::Store(StoreError::Corrupt { .. }))) = &written {
        // One is rarely alone.
        for (_, digest) in images(session, target).unwrap_or_default() {
            let manifest = session.state.store().read(&digest).ok().and_then(|bytes| serde_json::from_slice::<Manifest>(&bytes).ok());
            for blob in manifest.iter().flat_map(|m| m.layers.iter().chain([&m.config])) {
                let _ = session.state.store().verify(&blob.digest);
            }
        }
    }
    written
}

fn write(session: &Session, target: &Descriptor, form: &Export, names: &[Reference]) -> Result<(), BuildError> {
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
                let skipped = write_dir(&snapshot, &dir, session.input.source_date_epoch)?;
                if let [first, ..] = &skipped[..] {
                    session.sink.emit(Event::Warning {
                        code: "skipped-devices".into(),
                        message: format!(
                            "{} device(s) of the image are not in {}, for only root can make them: {}{}; type=tar keeps them",
                            skipped.len(),
                            dir.display(),
                            first.display(),
                            if skipped.len() > 1 { ", …" } else { "" }
                        ),
                        line: None,
                    });
                }
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

/// Writes the files into a folder that may hold others: they are made aside and moved in, so that each file appears whole.
/// They belong to the caller, as with buildx. Returns the devices that could not be made.
fn write_dir(snapshot: &Snapshot, dir: &Path, mtime: Option<i64>) -> Result<Vec<PathBuf>, BuildError> {
    let aside = tempfile::Builder::new().prefix(".ovenbird-").tempdir_in(dir).map_err(BuildError::output(dir))?;
    let recorded = merged::copy_out(snapshot, aside.path()).map_err(file_error)?;
    let skipped = make_devices(aside.path(), &recorded).map_err(BuildError::output(dir))?;
    if let Some(seconds) = mtime {
        set_times(aside.path(), seconds).map_err(BuildError::output(dir))?;
    }
    move_into(aside.path(), dir).map_err(BuildError::output(dir))?;
    Ok(skipped)
}

/// Puts real devices where empty files stand for them; where that is not allowed, nothing.
fn make_devices(dir: &Path, recorded: &Owners) -> io::Result<Vec<PathBuf>> {
    let mut skipped = vec![];
    for (path, owner) in recorded {
        let Some((mode, major, minor)) = owner.node else { continue };
        let place = dir.join(path);
        let stat = rustix::fs::lstat(&place)?;
        fs::remove_file(&place)?;
        let bits = Mode::from_raw_mode(mode & 0o7777);
        match rustix::fs::mknodat(CWD, &place, FileType::from_raw_mode(mode), bits, rustix::fs::makedev(major, minor)) {
            Ok(()) => {
                rustix::fs::chmodat(CWD, &place, bits, AtFlags::empty())?;
                let time = Timespec { tv_sec: stat.st_mtime, tv_nsec: stat.st_mtime_nsec as _ };
                utimensat(CWD, &place, &Timestamps { last_access: time, last_modification: time }, AtFlags::SYMLINK_NOFOLLOW)?;
            }
            Err(Errno::PERM | Errno::ACCESS | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => skipped.push(Path::new("/").join(path)),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(skipped)
}

fn set_times(dir: &Path, seconds: i64) -> io::Result<()> {
    let time = Timespec { tv_sec: seconds, tv_nsec: 0 };
    let mut found = vec![dir.to_owned()];
    let mut next = 0;
    while let Some(path) = found.get(next).cloned() {
        if path.symlink_metadata()?.is_dir() {
            for entry in fs::read_dir(&path)? {
                found.push(entry?.path());
            }
        }
        next += 1;
    }
    // What is in a folder comes behind it: reading the folder does not change its time.
    for path in &found[1..] {
        utimensat(CWD, path, &Timestamps { last_access: time, last_modification: time }, AtFlags::SYMLINK_NOFOLLOW)?;
    }
    Ok(())
}

fn move_into(from: &Path, to: &Path) -> io::Result<()> {
    let mut open = vec![(from.to_owned(), to.to_owned())];
    while let Some((from, to)) = open.pop() {
        for entry in fs::read_dir(&from)? {
            let entry = entry?;
            let place = to.join(entry.file_name());
            let existing = place.symlink_metadata().ok();
            match (entry.file_type()?.is_dir(), existing.is_some_and(|meta| meta.is_dir())) {
                (true, true) => open.push((entry.path(), place)),
                (true, false) => {
                    let _ = fs::remove_file(&place);
                    fs::rename(entry.path(), place)?;
                }
                (false, true) => {
                    return Err(io::Error::new(
                        io::ErrorKind::IsADirectory,
                        format!("{} is a folder and the image has a file there", place.display()),
                    ));
                }
                (false, false) => fs::rename(entry.path(), place)?,
            }
        }
    }
    Ok(())
}

fn file_error(source: crate::ops::file::FileError) -> BuildError {
    BuildError::File { step: "exporting".into(), line: None, source }
}

fn snapshot_of(session: &Session, digest: &Digest) -> Result<Snapshot, BuildError> {
    let reference =
        "localhost/exported".parse().map_err(|error| BuildError::Malformed { digest: digest.to_string(), reason: format!("{error}") })?;
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
            let Err(damage) = session.state.store().check(layer) else { continue };
            let Some(origin) = session.state.origin(&layer.digest) else { return Err(damage.into()) };
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
            let file =
                File::options().write(true).create(true).truncate(!special).open(&temporary).map_err(BuildError::output(&temporary))?;
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
