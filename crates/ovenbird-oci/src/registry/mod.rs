//! The distribution API: pull and push, streamed both ways.
//!
//! Blobs go between socket and [`Store`] in pieces; only manifests (at most 4 MiB) are ever whole in memory. Whatever comes from a
//! registry is believed only after its digest was computed here. Nothing is sent before the first request is made: a [`Client`] costs
//! nothing until then, and certificate authorities are loaded for HTTPS only.
//! Source: OCI distribution-spec 1.1; Docker's token authentication specification.

mod access;
mod auth;
pub mod challenge;
mod endpoint;
mod error;
mod head_start;
mod limit;
mod publish;
mod pull;
mod push;
mod repository;
mod transport;
mod tree;
mod upload;
pub mod web;

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit, Semaphore};

use crate::keychain::{Credential, Keychain, KeychainOptions, Secret};
use crate::publish::Target;
use crate::store::{Store, StoreError};
use crate::{Descriptor, Digest, Platform, Reference};

use endpoint::Endpoint;

pub use access::{Access, Verdict};
pub(crate) use endpoint::is_loopback_url;
pub use error::RegistryError;
pub(crate) use error::printable;
pub use head_start::{HeadStart, HeadStarts};
pub use repository::Deletion;
pub(crate) use transport::tls_config;

/// Largest manifest or index, in bytes (the distribution specification's advice).
pub const MAX_MANIFEST: u64 = 4 << 20;

/// How to talk to one registry.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RegistryOptions {
    /// Plain HTTP (loopback registries get it anyway, unless `ca` or `client_identity` is set).
    pub plain_http: bool,
    /// PEM file with more certificate authorities.
    pub ca: Option<PathBuf>,
    /// PEM file with client certificate and key.
    pub client_identity: Option<PathBuf>,
    /// `host[:port][/prefix]`, tried before the registry itself when pulling.
    pub mirrors: Vec<String>,
    /// Blob transfers at once with this registry, within the limit for all ([`ClientOptions::parallel`]); `None` or 0: that one only.
    pub transfers: Option<usize>,
    /// Requests to this registry in a second, on average and with jitter; `None`, or nothing above 0: no limit.
    pub requests_per_second: Option<f64>,
    /// `[http[s]://]host[:port]` under which the registry is reached, in place of its name: for pulls, pushes and tokens.
    pub endpoint: Option<String>,
    /// Makes a repository before the first push to it (Amazon ECR, which does not do so by itself).
    pub create_repository: bool,
}

/// Settings of a [`Client`].
#[derive(Debug, Clone, Default)]
pub struct ClientOptions {
    /// By registry name (`docker.io`, `localhost:5000`).
    pub registries: BTreeMap<String, RegistryOptions>,
    /// Folder of docker's `config.json` (`DOCKER_CONFIG` or `~/.docker`), if any.
    pub docker_config: Option<PathBuf>,
    /// Podman's `auth.json`, if any.
    pub auth_file: Option<PathBuf>,
    /// Every other place to search for credentials. Its own `docker_config` and `auth_file` are not read.
    pub keychain: KeychainOptions,
    /// Blob transfers at once (0: 4).
    pub parallel: usize,
    /// How long silence is borne.
    pub timeouts: Timeouts,
}

impl ClientOptions {
    /// A keychain that searches what these options name.
    pub fn keychain(&self) -> Keychain {
        let (docker_config, auth_file) = (self.docker_config.clone(), self.auth_file.clone());
        Keychain::new(KeychainOptions { docker_config, auth_file, ..self.keychain.clone() })
    }

    /// Whether every endpoint and mirror can be an address. Asks nobody.
    pub fn check(&self) -> Result<(), RegistryError> {
        self.registries.keys().try_for_each(|registry| endpoint::Endpoint::for_pull(registry, self).map(drop))
    }
}

/// How long a server may be silent before a request counts as failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// From a request that reads until the head of its answer. One that writes has twice as long: registries that write to object
    /// storage are slow.
    pub answer: Duration,
    /// Longest pause within a body that is received.
    pub idle: Duration,
    /// Longest pause within a body that is sent.
    pub stall: Duration,
    /// From the last byte of a blob until the answer.
    pub commit: Duration,
    /// How long it is tried to take back a tag after a publish that failed.
    pub undo: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            answer: Duration::from_mins(1),
            idle: Duration::from_mins(1),
            stall: Duration::from_mins(2),
            commit: Duration::from_mins(5),
            undo: Duration::from_secs(30),
        }
    }
}

/// A manifest or index as it came: raw bytes are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// Media type, digest of `bytes`, size.
    pub descriptor: Descriptor,
    /// As served, verified.
    pub bytes: Vec<u8>,
}

/// Told about bytes: (blob, done, total). A blob that needs no transfer is reported once, as done.
pub type ProgressFn = Arc<dyn Fn(&Digest, u64, u64) + Send + Sync>;

/// What is published where.
#[derive(Clone, Copy)]
pub struct Publication<'a> {
    /// Manifest or index in the store.
    pub image: &'a Descriptor,
    /// Has the image, or at least its manifests.
    pub store: &'a Store,
    /// Under which names.
    pub to: &'a [Target],
    /// Where blobs can be had: one that is not in the store is fetched from there; one on the same registry is mounted.
    pub origins: &'a BTreeMap<Digest, Reference>,
    /// Told about bytes.
    pub progress: &'a ProgressFn,
    /// Blobs that are under way already.
    pub head_starts: &'a Arc<HeadStarts>,
}

/// Transfers that broke, and what that cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Breaks {
    /// How often.
    pub count: u64,
    /// Bytes that were on the other side already, and not transferred again.
    pub resumed: u64,
    /// Bytes that were given to a connection that broke, and did not arrive.
    pub retried: u64,
}

impl Breaks {
    /// Both together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self { count: self.count + other.count, resumed: self.resumed + other.resumed, retried: self.retried + other.retried }
    }

    /// What came since `before`.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self {
            count: self.count.saturating_sub(before.count),
            resumed: self.resumed.saturating_sub(before.resumed),
            retried: self.retried.saturating_sub(before.retried),
        }
    }
}

/// A registry client with connection pools and tokens; cheap to clone.
///
/// Dropping a future that it returned stops the work; complete blobs stay in the store, partial ones are removed.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    options: ClientOptions,
    http: transport::Http,
    auth: auth::Auth,
    transfers: Arc<Semaphore>,
    /// One blob at a time is sent while it is made.
    head_start: Arc<Semaphore>,
    limits: limit::Limits,
    breaks: Mutex<Breaks>,
    flights: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("options", &self.inner.options).finish_non_exhaustive()
    }
}

impl Client {
    /// Makes a client; does no I/O.
    pub fn new(options: ClientOptions) -> Self {
        let keychain = options.keychain();
        Self::assemble(options, keychain)
    }

    /// The same, but credential helpers are looked for in this search path (in the form of `PATH`).
    pub fn with_search_path(options: ClientOptions, search_path: OsString) -> Self {
        let keychain = options.keychain().with_search_path(search_path);
        Self::assemble(options, keychain)
    }

    fn assemble(options: ClientOptions, keychain: Keychain) -> Self {
        let parallel = if options.parallel == 0 { 4 } else { options.parallel.min(Semaphore::MAX_PERMITS) };
        let inner = Inner {
            options,
            http: transport::Http::default(),
            auth: auth::Auth::new(keychain),
            transfers: Arc::new(Semaphore::new(parallel)),
            head_start: Arc::new(Semaphore::new(1)),
            limits: limit::Limits::default(),
            breaks: Mutex::default(),
            flights: Mutex::default(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Fetches a manifest or index by tag or digest (digest wins).
    pub async fn manifest(&self, reference: &Reference) -> Result<Fetched, RegistryError> {
        self.inner.manifest(reference).await
    }

    /// `HEAD`: what a tag points at; `None` when there is nothing. Mirrors are asked first.
    pub async fn head(&self, reference: &Reference) -> Result<Option<Descriptor>, RegistryError> {
        self.inner.head(reference).await
    }

    /// Fetches a blob into the store, verified while it streams. Nothing to do when it is there in the size it should have.
    pub async fn fetch_blob(&self, from: &Reference, blob: &Descriptor, store: &Store, progress: &ProgressFn) -> Result<(), RegistryError> {
        self.inner.fetch_blob(from, blob, store, progress).await
    }

    /// Pulls an image: the manifest of `platform` (or everything in the index when `None`), config and layers. Blobs that are there
    /// already are read; those that are damaged are fetched again.
    ///
    /// Returns the descriptor of what is complete in the store now: of the platform's manifest, or of what the reference names
    /// when `platform` is `None`. An index on the way is stored too. The platform of an image without index is not checked.
    pub async fn pull(
        &self,
        from: &Reference,
        platform: Option<&Platform>,
        store: &Store,
        progress: &ProgressFn,
    ) -> Result<Descriptor, RegistryError> {
        pull::pull(&self.inner, from, platform, store, progress).await
    }

    /// Pushes manifest or index with everything below it. Blobs already there are skipped; a blob that `origins` names on the same
    /// registry is mounted; one that is not in the store is fetched from its origin first. The pushed digest is read back.
    pub async fn push(
        &self,
        store: &Store,
        target: &Descriptor,
        to: &Reference,
        origins: &BTreeMap<Digest, Reference>,
        progress: &ProgressFn,
    ) -> Result<(), RegistryError> {
        let to = &[Target::from(to.clone())];
        self.publish(&Publication { image: target, store, to, origins, progress, head_starts: &Arc::default() }, &Arc::default()).await
    }

    /// Publishes an image under several names, in several registries: under all of them, or under none.
    ///
    /// A repository that is in the same registry as another gets its blobs from there. When everything is in every repository, the tags
    /// are put in the order of their classes; if one is refused, or `stop` is set meanwhile, those that were put are taken back. Every
    /// digest and every tag is read back.
    ///
    /// The future must be run to its end: dropped, it leaves behind what it was doing.
    pub async fn publish(&self, publication: &Publication<'_>, stop: &Arc<AtomicBool>) -> Result<(), RegistryError> {
        publish::publish(&self.inner, publication, stop).await
    }

    /// Begins to send a blob that is about to be made and will be published under this name. Of a small one nothing is sent. Must be called
    /// in a runtime, which also carries the publish.
    pub fn head_start(&self, to: &Reference, store: &Store) -> Result<HeadStart, RegistryError> {
        HeadStart::new(&self.inner, to, store)
    }

    /// What broke on the way so far, and what it cost.
    pub fn breaks(&self) -> Breaks {
        *self.inner.breaks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The credentials for a repository, as far as they are known without asking anybody: those that were used already, and those that
    /// stand in a file. `None` also when a file cannot be read: who needs them will say so.
    pub fn recorded_credential(&self, repository: &Reference) -> Option<Credential> {
        self.inner.auth.recorded(repository.registry(), repository.repository())
    }

    /// Who we are to a repository and what we may do there: asks the registry for a list of tags and, for `push`, for an upload
    /// that is cancelled again. Nothing is changed there. A refusal is part of the answer; an error is a registry that cannot be asked.
    pub async fn check_access(&self, repository: &Reference, push: bool) -> Result<Access, RegistryError> {
        access::check(&self.inner, repository, push).await
    }

    /// Asks a registry (`docker.io`, `localhost:5000`) whether it takes this name and password. Nothing is kept.
    pub async fn check_login(&self, registry: &str, username: &str, password: &Secret) -> Result<(), RegistryError> {
        auth::check_login(&self.inner, registry, username, password).await
    }
}

impl Inner {
    fn broke(&self, breaks: Breaks) {
        let mut all = self.breaks.lock().unwrap_or_else(PoisonError::into_inner);
        all.count += breaks.count;
        all.resumed += breaks.resumed;
        all.retried += breaks.retried;
    }

    /// Waits until nobody else here works on `key`: the same blob is transferred once.
    async fn flight(&self, key: String) -> OwnedMutexGuard<()> {
        let lock = {
            let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
            if flights.len() > 1024 {
                flights.retain(|_, lock| Arc::strong_count(lock) > 1);
            }
            Arc::clone(flights.entry(key).or_default())
        };
        lock.lock_owned().await
    }

    /// Waits until one more blob may be transferred: first for the registry's own limit, so that a slow one holds nobody else up.
    async fn transfer(&self, endpoint: &Endpoint, action: &str) -> Result<Vec<OwnedSemaphorePermit>, RegistryError> {
        let own = self.limits.of(&endpoint.registry, &endpoint.options).transfers.clone();
        let mut permits = vec![];
        for limit in own.into_iter().chain([Arc::clone(&self.transfers)]) {
            permits.push(limit.acquire_owned().await.map_err(|_| RegistryError::Cancelled { action: action.into() })?);
        }
        Ok(permits)
    }
}

/// Runs file work where it may block.
async fn blocking<T: Send + 'static>(
    action: &str,
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, RegistryError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(|source| RegistryError::store(action, source)),
        Err(_) => Err(RegistryError::Cancelled { action: action.into() }),
    }
}

/// Ends with the first error; the other tasks are stopped then.
async fn all(mut tasks: tokio::task::JoinSet<Result<(), RegistryError>>, action: &str) -> Result<(), RegistryError> {
    while let Some(done) = tasks.join_next().await {
        match done {
            Ok(result) => result?,
            Err(e) if e.is_panic() => std::panic::resume_unwind(e.into_panic()),
            Err(_) => return Err(RegistryError::Cancelled { action: action.into() }),
        }
    }
    Ok(())
}
