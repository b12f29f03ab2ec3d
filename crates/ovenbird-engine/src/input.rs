//! What a build is given and what it gives: the engine's own request and result.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use ovenbird_dockerfile::ignore::Patterns;
use ovenbird_oci::keychain::Credential;
use ovenbird_oci::layer::Compression;
use ovenbird_oci::registry::Breaks;
use ovenbird_oci::{Descriptor, Digest, ImageConfig, Manifest, Platform, Reference};

use crate::cache::{Filed, Link};
use crate::frontend::Options;
use crate::snapshot::folder::Folder;
use crate::snapshot::overlaid::Overlaid;
use crate::snapshot::tree::Tree;

/// Set once; every part of a build looks at it.
#[derive(Debug, Clone, Default)]
pub struct Cancel(Arc<Flags>);

#[derive(Debug, Default)]
struct Flags {
    cancelled: AtomicBool,
    /// Flags of running builds: a build also stops itself when a step fails, which must not cancel its caller.
    running: Mutex<Vec<Weak<AtomicBool>>>,
}

impl Cancel {
    /// Stops the build.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::SeqCst);
        for flag in self.0.running.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade) {
            flag.store(true, Ordering::SeqCst);
        }
    }

    /// Was it stopped?
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::SeqCst)
    }

    /// A flag for one build that follows this one.
    pub(crate) fn follow(&self) -> Arc<AtomicBool> {
        let mut running = self.0.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.retain(|flag| flag.strong_count() > 0);
        let flag = Arc::new(AtomicBool::new(self.is_cancelled()));
        running.push(Arc::downgrade(&flag));
        flag
    }
}

/// A local folder given to the build.
#[derive(Debug, Clone)]
pub struct LocalContext {
    /// Where.
    pub dir: PathBuf,
    /// Its `.dockerignore`.
    pub ignore: Patterns,
    /// A folder whose files are laid over it. Ignore patterns do not hide them.
    pub over: Option<PathBuf>,
}

impl LocalContext {
    /// A folder with its ignore file, nothing laid over it.
    pub fn new(dir: impl Into<PathBuf>, ignore: Patterns) -> Self {
        Self { dir: dir.into(), ignore, over: None }
    }

    /// Its files, as steps see them.
    pub fn tree(&self) -> Arc<dyn Tree> {
        self.tree_without(None)
    }

    /// [`Self::tree`] without a folder that is known by device and inode.
    pub(crate) fn tree_without(&self, hidden: Option<(u64, u64)>) -> Arc<dyn Tree> {
        let base = Folder::new(&self.dir, self.ignore.clone());
        let base = match hidden {
            Some((device, inode)) => base.without(device, inode),
            None => base,
        };
        match &self.over {
            Some(over) => Arc::new(Overlaid::new(Folder::new(over, Patterns::default()), base)),
            None => Arc::new(base),
        }
    }
}

/// Where a secret's bytes come from. Read when a step needs them, never stored.
#[derive(Debug, Clone)]
pub enum SecretSource {
    /// `src=`.
    File(PathBuf),
    /// Value (from an environment variable, read at the door).
    Value(Secret),
}

/// Largest secret, in bytes, as in BuildKit.
pub const MAX_SECRET: u64 = 500 * 1024;

impl SecretSource {
    /// A file for `src=`. A pipe that the caller's shell opened (`<(command)`) can be read once only, so it is read now.
    pub fn file(path: PathBuf) -> io::Result<Self> {
        let (file, regular) = open_secret(&path)?;
        if !regular {
            return read_secret(file).map(|value| Self::Value(Secret(value)));
        }
        if file.metadata()?.len() > MAX_SECRET {
            return Err(too_large());
        }
        Ok(Self::File(path))
    }

    /// The bytes.
    pub fn read(&self) -> io::Result<Vec<u8>> {
        match self {
            Self::Value(value) => Ok(value.0.clone()),
            Self::File(path) => read_secret(open_secret(path)?.0),
        }
    }
}

/// Opens a regular file (`true`) or a pipe that is open already. Anything else may give bytes for ever, or none.
fn open_secret(path: &Path) -> io::Result<(File, bool)> {
    use std::os::unix::fs::FileTypeExt;
    let kind = std::fs::metadata(path)?.file_type();
    // Opening a pipe that has a name waits for a writer who may never come; one that is open already has none.
    let unnamed = || std::fs::canonicalize(path).is_err();
    let what = match kind {
        _ if kind.is_file() => return Ok((File::open(path)?, true)),
        _ if kind.is_fifo() && unnamed() => return Ok((File::open(path)?, false)),
        _ if kind.is_dir() => "a folder",
        _ if kind.is_fifo() => "a named pipe",
        _ if kind.is_socket() => "a socket",
        _ => "a device",
    };
    Err(io::Error::new(io::ErrorKind::InvalidInput, format!("it is {what}, expected a regular file")))
}

fn read_secret(file: File) -> io::Result<Vec<u8>> {
    let mut content = vec![];
    file.take(MAX_SECRET + 1).read_to_end(&mut content)?;
    if content.len() as u64 > MAX_SECRET { Err(too_large()) } else { Ok(content) }
}

fn too_large() -> io::Error {
    io::Error::new(io::ErrorKind::FileTooLarge, format!("it is larger than {} KiB, the most a secret may have", MAX_SECRET / 1024))
}

/// Bytes that print as `***`.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub Vec<u8>);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

/// Resource limits of every step; `None` everywhere: unlimited.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct StepLimits {
    /// Bytes.
    pub memory: Option<u64>,
    /// Cores.
    pub cpus: Option<f64>,
    /// name, soft, hard (-1 unlimited).
    pub ulimits: Vec<(String, i64, i64)>,
    /// Bytes of `/dev/shm`.
    pub shm_size: Option<u64>,
    /// `--dns`.
    pub dns: Vec<IpAddr>,
}

/// When base images are looked up in the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PullPolicy {
    /// Local store first.
    #[default]
    Missing,
    /// Registry first (`--pull`).
    Always,
    /// Never.
    Never,
}

/// A cache in a folder, as an OCI layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalCache {
    /// The folder.
    pub dir: PathBuf,
    /// Which of its caches.
    pub tag: String,
    /// `digest=`: this one, whatever its tag. For reading only.
    pub digest: Option<Digest>,
}

/// Where results of other machines are: what `--cache-from` says, and where `--cache-to` writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CacheSource {
    /// An image of a registry that is or has a cache.
    Registry(Reference),
    /// A folder.
    Local(LocalCache),
}

impl std::fmt::Display for CacheSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Registry(reference) => f.write_str(&reference.familiar()),
            Self::Local(local) => write!(f, "{}:{}", local.dir.display(), local.tag),
        }
    }
}

/// Which results an exported cache has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum CacheMode {
    /// Those whose layers are all in the image.
    #[default]
    Min,
    /// All of the build, other stages included.
    Max,
}

/// One `--cache-to`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheExport {
    /// Where to.
    pub to: CacheSource,
    /// What.
    pub mode: CacheMode,
    /// How layers are compressed; `None`: like those of the image.
    pub compression: Option<Compression>,
    /// Docker's media types instead of OCI's.
    pub docker_media_types: bool,
    /// Also what is in the folders of `RUN --mount=type=cache`.
    pub mounts: bool,
}

/// What a build leaves for [`crate::Engine::export_cache`].
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Exportable {
    /// Results, each with its keys, in the order of the plan.
    pub(crate) filed: Vec<Filed>,
    /// Folders of cache mounts.
    pub(crate) mounts: BTreeSet<Digest>,
    /// What the images are made of.
    pub(crate) images: Vec<Vec<Link>>,
    /// Base images.
    pub(crate) bases: Vec<Reference>,
    /// Time of all files, when it is fixed.
    pub(crate) epoch: Option<i64>,
}

/// A resolved request: all that the engine needs.
#[derive(Debug, Clone)]
pub struct BuildInput {
    /// Text of the Dockerfile.
    pub dockerfile: String,
    /// Its name, for messages.
    pub dockerfile_name: String,
    /// `context` and named local contexts.
    pub contexts: BTreeMap<String, LocalContext>,
    /// What the main context is known by, where its folder is another one each time: builds of the same are compared.
    pub origin: Option<String>,
    /// One a platform; `platform` differs, the rest is the same.
    pub options: Vec<Options>,
    /// `--secret`.
    pub secrets: BTreeMap<String, SecretSource>,
    /// `--ssh`: id → agent socket.
    pub ssh: BTreeMap<String, PathBuf>,
    /// Limits.
    pub limits: StepLimits,
    /// `--pull`.
    pub pull: PullPolicy,
    /// Layers.
    pub compression: Compression,
    /// `Some(t)`: every time in the image is `t` (seconds since 1970).
    pub source_date_epoch: Option<i64>,
    /// Docker media types instead of OCI ones.
    pub docker_media_types: bool,
    /// Most vertices that run at once.
    pub parallelism: usize,
    /// Annotations of the manifest.
    pub annotations: BTreeMap<String, String>,
    /// Where the image will be pushed.
    pub publish_to: Vec<Reference>,
    /// Large layers are sent here while they are packed. `None`: nothing is sent before the image is done.
    pub head_start: Option<Reference>,
    /// What stood in the addresses of contexts, by host: the steps are not told, and the image must not be, either.
    pub logins: BTreeMap<String, Credential>,
    /// Secrets (by id) and credentials (by registry or host) that may be in the image.
    pub allow_leak: Vec<String>,
    /// Caches of other machines, the first that has something counts.
    pub cache_from: Vec<CacheSource>,
    /// The image carries its own cache.
    pub cache_inline: bool,
    /// The results will be exported.
    pub cache_exported: bool,
    /// The image's files will be written somewhere: it is better to have them as files.
    pub files_wanted: bool,
}

/// The image(s) of a build; all blobs are in the store.
#[derive(Debug, Clone, PartialEq)]
pub struct BuildOutput {
    /// Manifest, or index when several platforms were asked for.
    pub target: Descriptor,
    /// Each platform: manifest and config digest.
    pub platforms: Vec<(Platform, Descriptor, Digest)>,
    /// Steps that ran and steps that came from the cache.
    pub ran: usize,
    /// See `ran`.
    pub cached: usize,
    /// For the caches of other machines.
    pub exportable: Exportable,
    /// Transfers that broke and went on.
    pub breaks: Breaks,
    /// What it was made from.
    pub bases: Vec<BaseImage>,
}

/// One base image.
#[derive(Debug, Clone, PartialEq)]
pub struct BaseImage {
    /// Its name, with the digest of the platform's manifest.
    pub reference: Reference,
    /// For which platform.
    pub platform: Platform,
    /// Does the built image begin with its layers?
    pub is_final: bool,
    /// Its manifest.
    pub manifest: Descriptor,
    /// The same, read.
    pub document: Manifest,
    /// Its config.
    pub config: ImageConfig,
}

impl Default for BuildInput {
    fn default() -> Self {
        Self {
            dockerfile: String::new(),
            dockerfile_name: "Dockerfile".into(),
            contexts: BTreeMap::new(),
            origin: None,
            options: vec![],
            secrets: BTreeMap::new(),
            ssh: BTreeMap::new(),
            limits: StepLimits::default(),
            pull: PullPolicy::default(),
            compression: Compression::Gzip(5),
            source_date_epoch: None,
            docker_media_types: false,
            parallelism: 16,
            annotations: BTreeMap::new(),
            publish_to: vec![],
            head_start: None,
            logins: BTreeMap::new(),
            allow_leak: vec![],
            cache_from: vec![],
            cache_inline: false,
            cache_exported: false,
            files_wanted: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsRawFd;

    use super::*;

    #[test]
    fn secrets_are_files_of_bounded_size_or_open_pipes() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for (name, size) in [("most", MAX_SECRET), ("more", MAX_SECRET + 1)] {
            std::fs::write(path(name), vec![b'x'; usize::try_from(size).unwrap()]).unwrap();
        }
        rustix::fs::mknodat(rustix::fs::CWD, path("pipe"), rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(path("socket")).unwrap();
        for (path, expect) in [
            (path("most"), "ok 512000"),
            (path("more"), "it is larger than 500 KiB"),
            (path("pipe"), "it is a named pipe, expected a regular file"),
            (path("socket"), "it is a socket"),
            (path("."), "it is a folder"),
            ("/dev/zero".into(), "it is a device"),
            (path("none"), "No such file"),
        ] {
            let said = |result: io::Result<Vec<u8>>| result.map_or_else(|e| e.to_string(), |bytes| format!("ok {}", bytes.len()));
            let early = said(SecretSource::file(path.clone()).and_then(|source| source.read()));
            let late = said(SecretSource::File(path.clone()).read());
            assert!(early.starts_with(expect) && late.starts_with(expect), "{}: {early} {late}", path.display());
        }
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(b"hunter22").unwrap();
        drop(writer);
        let source = SecretSource::file(format!("/dev/fd/{}", reader.as_raw_fd()).into()).unwrap();
        assert_eq!(source.read().unwrap(), b"hunter22");
        assert_eq!(source.read().unwrap(), b"hunter22", "a second step reads it too");
    }
}
