//! Images as archives, layouts and plain folders.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use ovenbird_oci::archive::ArchiveError;
use ovenbird_oci::layer::Owners;
use ovenbird_oci::store::StoreError;
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, utimensat};
use rustix::io::Errno;
use tempfile::NamedTempFile;

use ovenbird_oci::{Descriptor, Digest, Index, Manifest, Reference, archive, beside};

use crate::cache::Link;
use crate::error::BuildError;
use crate::event::Event;
use crate::ops::{Session, image, imports, merged};
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
/// They belong to the caller, as with buildx. What a killed build left there goes. Returns the devices that could not be made.
fn write_dir(snapshot: &Snapshot, dir: &Path, mtime: Option<i64>) -> Result<Vec<PathBuf>, BuildError> {
    beside::clear(dir);
    let aside = beside::folder_in(dir).map_err(BuildError::output(dir))?;
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
        let Some((mode, major, minor)) = owner.device() else { continue };
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

/// Moves what is in a folder into another, which may hold files already; each file appears whole. Both are on one file system.
pub fn move_into(from: &Path, to: &Path) -> io::Result<()> {
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
            image::fetch(session, &[layer], &origin).map_err(|error| imports::spoil(session, &layer.digest, error))?;
        }
    }
    Ok(())
}

fn write_to(to: &PathOrStdout, write: impl FnOnce(&mut dyn Write) -> Result<(), BuildError>) -> Result<(), BuildError> {
    let path = match to {
        PathOrStdout::Stdout => Path::new("standard output"),
        PathOrStdout::Path(path) => path,
    };
    let mut file = OutputFile::create(to).map_err(BuildError::output(path))?;
    write(&mut file)?;
    file.finish().map_err(BuildError::output(path))
}

/// A file that appears when it is whole: written beside its place under a name that nobody else has, and renamed, so that a failure leaves
/// the old one. A link stays a link: its target is replaced. What is no regular file (a pipe, `/dev/null`) is written to directly.
pub struct OutputFile(Out);

enum Out {
    Stdout(BufWriter<io::Stdout>),
    InPlace(BufWriter<File>),
    /// Removed unless it is finished.
    Replaced(BufWriter<NamedTempFile>, PathBuf),
}

/// Bytes that are written together.
const BUFFER: usize = 1 << 18;

impl OutputFile {
    /// Begins one.
    pub fn create(to: &PathOrStdout) -> io::Result<Self> {
        let PathOrStdout::Path(path) = to else { return Ok(Self(Out::Stdout(BufWriter::with_capacity(BUFFER, io::stdout())))) };
        Ok(Self(match place(path)? {
            Place::InPlace => Out::InPlace(BufWriter::with_capacity(BUFFER, File::options().write(true).truncate(true).open(path)?)),
            Place::Replaced(target) => {
                let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
                beside::clear(folder);
                // Readable by whom the umask says, like any file that a command writes.
                Out::Replaced(BufWriter::with_capacity(BUFFER, beside::file_in(folder, 0o666)?), target)
            }
        }))
    }

    /// It is whole.
    pub fn finish(self) -> io::Result<()> {
        match self.0 {
            Out::Stdout(mut out) => out.flush(),
            Out::InPlace(mut out) => out.flush(),
            Out::Replaced(out, target) => {
                let whole = out.into_inner().map_err(io::IntoInnerError::into_error)?;
                whole.persist(&target).map(drop).map_err(|error| error.error)
            }
        }
    }

    fn out(&mut self) -> &mut dyn Write {
        match &mut self.0 {
            Out::Stdout(out) => out,
            Out::InPlace(out) => out,
            Out::Replaced(out, _) => out,
        }
    }
}

impl Write for OutputFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out().flush()
    }
}

/// How a file is written.
enum Place {
    /// It is a device, a pipe or a file that this process has open: `/dev/stdout`.
    InPlace,
    /// A new file takes this place.
    Replaced(PathBuf),
}

/// Most links that are followed, as in the kernel.
const MAX_LINKS: usize = 40;

fn place(path: &Path) -> io::Result<Place> {
    if fs::metadata(path).is_ok_and(|meta| !meta.is_file()) {
        return Ok(Place::InPlace);
    }
    let mut path = path.to_owned();
    for _ in 0..MAX_LINKS {
        let Ok(target) = fs::read_link(&path) else { return Ok(Place::Replaced(path)) };
        let folder = path.parent().unwrap_or(Path::new("")).join(".").canonicalize()?;
        // `/proc/self/fd/1`: what its target says is no name that could be replaced.
        if folder.starts_with("/proc") {
            return Ok(Place::InPlace);
        }
        path = folder.join(target);
    }
    Err(Errno::LOOP.into())
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::fs::{FileTypeExt, symlink};
    use std::sync::Barrier;

    use super::*;

    fn put(path: &Path, content: &[u8]) -> Result<(), BuildError> {
        write_to(&PathOrStdout::Path(path.to_owned()), |out| out.write_all(content).map_err(BuildError::output(path)))
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn writers_of_one_file_do_not_meet() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("u.tar");
        fs::write(dir.path().join("u.tar.partial"), "mine").unwrap();
        let (halfway, whole) = (Barrier::new(2), [vec![b'a'; 700_000], vec![b'b'; 500_000]]);
        std::thread::scope(|scope| {
            for content in &whole {
                let (to, halfway) = (&to, &halfway);
                scope.spawn(move || {
                    let (first, second) = content.split_at(300_000);
                    let form = PathOrStdout::Path(to.clone());
                    write_to(&form, |out| {
                        out.write_all(first).map_err(BuildError::output(to))?;
                        halfway.wait();
                        out.write_all(second).map_err(BuildError::output(to))
                    })
                    .unwrap();
                });
            }
        });
        assert!(whole.contains(&fs::read(&to).unwrap()), "one of the two, whole");
        assert_eq!(fs::read_to_string(dir.path().join("u.tar.partial")).unwrap(), "mine");
        assert_eq!(names(dir.path()), ["u.tar", "u.tar.partial"]);
    }

    #[test]
    fn an_error_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("u.tar");
        fs::write(&to, "old").unwrap();
        let form = PathOrStdout::Path(to.clone());
        let failed = write_to(&form, |out| {
            out.write_all(b"new").map_err(BuildError::output(&to))?;
            Err(BuildError::Cancelled)
        });
        assert!(matches!(failed, Err(BuildError::Cancelled)));
        assert_eq!((fs::read_to_string(&to).unwrap().as_str(), names(dir.path())), ("old", vec!["u.tar".to_owned()]));
        assert!(put(&dir.path().join("missing/u.tar"), b"").is_err());
        assert!(put(dir.path(), b"").is_err(), "a folder");
    }

    #[test]
    fn links_stay_and_their_targets_are_written() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("real")).unwrap();
        fs::write(at("real/file"), "old").unwrap();
        symlink("real", at("folder")).unwrap();
        for (name, target, real) in [
            ("a", "real/file", "real/file"),
            ("b", "folder/../real/new", "real/new"),
            ("c", "b", "real/new"),
            ("d", "folder/far", "real/far"),
        ] {
            symlink(target, at(name)).unwrap();
            put(&at(name), name.as_bytes()).unwrap();
            assert!(fs::symlink_metadata(at(name)).unwrap().is_symlink(), "{name}");
            assert_eq!(fs::read_to_string(at(real)).unwrap(), name);
        }
        symlink("loop", at("loop")).unwrap();
        assert!(put(&at("loop"), b"").is_err());
        assert_eq!(names(&at("real")), ["far", "file", "new"]);
    }

    #[test]
    fn pipes_devices_and_open_files_are_written_in_place() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        rustix::fs::mknodat(CWD, &pipe, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let reader = std::thread::spawn({
            let pipe = pipe.clone();
            move || fs::read(pipe).unwrap()
        });
        put(&pipe, b"through").unwrap();
        assert_eq!(reader.join().unwrap(), b"through");
        assert!(fs::symlink_metadata(&pipe).unwrap().file_type().is_fifo());
        put(Path::new("/dev/null"), b"away").unwrap();
        assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());
        // As /dev/stdout when it is a file.
        use std::os::fd::AsRawFd;
        let mut open = File::options().read(true).write(true).create_new(true).open(dir.path().join("open")).unwrap();
        let link = dir.path().join("link");
        symlink(format!("/proc/self/fd/{}", open.as_raw_fd()), &link).unwrap();
        put(&link, b"same file").unwrap();
        let mut text = String::new();
        open.read_to_string(&mut text).unwrap();
        assert_eq!(text, "same file");
        assert_eq!(names(dir.path()), ["link", "open", "pipe"]);
    }
}
