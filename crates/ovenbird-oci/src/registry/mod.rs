//! The distribution API: pull and push, streamed both ways.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use crate::store::Store;
use crate::{Descriptor, Digest, Platform, Reference};

/// How to talk to one registry.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RegistryOptions {
    /// Plain HTTP (loopback registries get it anyway).
    pub plain_http: bool,
    /// PEM file with more certificate authorities.
    pub ca: Option<PathBuf>,
    /// PEM file with client certificate and key.
    pub client_identity: Option<PathBuf>,
    /// `host[:port][/prefix]`, tried before the registry itself when pulling.
    pub mirrors: Vec<String>,
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
    /// Blob transfers at once (0: 4).
    pub parallel: usize,
}

/// A manifest or index as it came: raw bytes are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// Media type, digest of `bytes`, size.
    pub descriptor: Descriptor,
    /// As served, verified.
    pub bytes: Vec<u8>,
}

/// Told about bytes: (blob, done, total).
pub type ProgressFn = Arc<dyn Fn(&Digest, u64, u64) + Send + Sync>;

/// A registry client with connection pools and tokens; cheap to clone.
#[derive(Debug, Clone)]
pub struct Client {
    _options: Arc<ClientOptions>,
}

/// What can go wrong with a registry (the registry helper replaces this by precise variants).
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// No such manifest or blob.
    #[error("{reference} is not in the registry")]
    NotFound {
        /// Asked for.
        reference: String,
    },
}

impl Client {
    /// Makes a client; does no I/O.
    pub fn new(options: ClientOptions) -> Self {
        Self { _options: Arc::new(options) }
    }

    /// Fetches a manifest or index by tag or digest (digest wins).
    pub async fn manifest(&self, reference: &Reference) -> Result<Fetched, RegistryError> {
        Err(RegistryError::NotFound { reference: reference.to_string() })
    }

    /// `HEAD`: what a tag points at; `None` when there is nothing.
    pub async fn head(&self, _reference: &Reference) -> Result<Option<Descriptor>, RegistryError> {
        Ok(None)
    }

    /// Fetches a blob into the store (nothing to do when it is there), verified while it streams.
    pub async fn fetch_blob(
        &self,
        from: &Reference,
        _blob: &Descriptor,
        _store: &Store,
        _progress: &ProgressFn,
    ) -> Result<(), RegistryError> {
        Err(RegistryError::NotFound { reference: from.to_string() })
    }

    /// Pulls an image: the manifest of `platform` (or everything in the index when `None`), config and layers.
    /// Returns the descriptor of what was asked for.
    pub async fn pull(
        &self,
        from: &Reference,
        _platform: Option<&Platform>,
        _store: &Store,
        _progress: &ProgressFn,
    ) -> Result<Descriptor, RegistryError> {
        Err(RegistryError::NotFound { reference: from.to_string() })
    }

    /// Pushes manifest or index with everything below it. Blobs already there are skipped; a blob that `origins` names on the same
    /// registry is mounted; one that is not in the store is fetched from its origin first. The pushed digest is read back.
    pub async fn push(
        &self,
        _store: &Store,
        _target: &Descriptor,
        to: &Reference,
        _origins: &BTreeMap<Digest, Reference>,
        _progress: &ProgressFn,
    ) -> Result<(), RegistryError> {
        Err(RegistryError::NotFound { reference: to.to_string() })
    }
}
