//! One repository of one registry, as a place to put things. What goes there and in which order is [`super::publish`]'s.

use std::sync::Arc;

use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderValue, LOCATION};
use reqwest::{Method, Response, StatusCode, Url};
use tokio::task::JoinSet;

use super::endpoint::Endpoint;
use super::head_start::HeadStarts;
use super::pull::{header, is_index, scope};
use super::transport::{Call, Payload, failure, read_limited};
use super::tree::Tree;
use super::upload::Session;
use super::{Fetched, Inner, MAX_MANIFEST, ProgressFn, RegistryError, all, blocking};
use crate::store::Store;
use crate::{Descriptor, Digest, Reference};

/// Whatever a tag points at, as it is.
const ANYTHING: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json, */*";

/// A repository that is pushed to.
pub(super) struct Repository {
    pub(super) inner: Arc<Inner>,
    pub(super) store: Store,
    pub(super) endpoint: Endpoint,
    /// One of the names that are pushed; for messages, and for the repository in it.
    pub(super) to: Reference,
    pub(super) tree: Arc<Tree>,
    pub(super) progress: ProgressFn,
    pub(super) head_starts: Arc<HeadStarts>,
}

impl Repository {
    pub(super) fn call<'a>(&'a self, method: Method, url: Url, payload: Payload, action: &'a str) -> Call<'a> {
        Call {
            endpoint: &self.endpoint,
            repository: self.to.repository(),
            method,
            url,
            scopes: vec![scope(&self.endpoint, &self.to, "pull,push")],
            headers: vec![],
            payload,
            action,
        }
    }

    pub(super) fn url(&self, tail: &str) -> Url {
        self.endpoint.url(self.to.repository(), tail)
    }

    /// A name in this repository.
    pub(super) fn name(&self, tag: &str) -> Reference {
        self.to.with_tag(tag)
    }

    /// Brings everything here, under digests only: blobs, then manifests, each read back. Blobs that `sibling` got already are mounted
    /// from there.
    pub(super) async fn fill(self: &Arc<Self>, sibling: Option<&Reference>) -> Result<(), RegistryError> {
        for blobs in [&self.tree.layers, &self.tree.configs] {
            let mut tasks = JoinSet::new();
            for blob in blobs {
                let (this, blob, sibling) = (Arc::clone(self), blob.clone(), sibling.cloned());
                tasks.spawn(async move { this.blob(&blob, sibling.as_ref()).await });
            }
            all(tasks, &format!("push {}", self.to)).await?;
        }
        for manifest in &self.tree.manifests {
            let name = manifest.descriptor.digest.to_string();
            self.put_manifest(&name, manifest).await?;
            self.read_back(&name, &manifest.descriptor.digest).await?;
        }
        Ok(())
    }

    /// Makes sure that a blob is in the repository.
    async fn blob(&self, blob: &Descriptor, sibling: Option<&Reference>) -> Result<(), RegistryError> {
        let action = format!("push blob {} to {}", blob.digest.short(), self.to);
        let _flight = self.inner.flight(format!("push {} {}", self.url(""), blob.digest)).await;
        if self.exists(blob, &action).await? {
            (self.progress)(&blob.digest, blob.size, blob.size);
            return Ok(());
        }
        let origin = self.tree.origins.get(&blob.digest);
        let mut started = None;
        let near = |from: &&Reference| from.registry() == self.to.registry() && from.repository() != self.to.repository();
        if let Some(from) = sibling.or(origin).filter(near) {
            match self.mount(blob, from, &action).await? {
                None => {
                    (self.progress)(&blob.digest, blob.size, blob.size);
                    return Ok(());
                }
                Some(upload) => started = upload.map(|url| Session::new(url, 0)),
            }
        }
        if let Err(damage) = self.store.check(blob) {
            let Some(origin) = origin else { return Err(RegistryError::store(&action, damage)) };
            self.inner.fetch_blob(origin, blob, &self.store, &self.progress).await?;
        }
        if let Some(url) = self.head_starts.arrived(&self.url(""), &blob.digest).await {
            started = Some(Session::new(url, blob.size));
        }
        let _transfer = self.inner.transfer(&self.endpoint, &action).await?;
        let uploaded = self.upload(blob, started, &action).await;
        if let Err(RegistryError::Corrupt { .. } | RegistryError::Protocol { .. } | RegistryError::Interrupted { .. }) = &uploaded {
            // Not the registry's fault when the bytes here are wrong; they are removed then, so that the next build makes them anew.
            let (store, digest) = (self.store.clone(), blob.digest);
            blocking(&action, move || store.verify(&digest)).await?;
        }
        uploaded
    }

    pub(super) async fn exists(&self, blob: &Descriptor, action: &str) -> Result<bool, RegistryError> {
        let call = self.call(Method::HEAD, self.url(&format!("blobs/{}", blob.digest)), Payload::None, action);
        let response = self.inner.send(&call).await?;
        match response.status() {
            status if status.is_success() => Ok(true),
            // Some registries allow to push, but not to look.
            StatusCode::NOT_FOUND | StatusCode::FORBIDDEN | StatusCode::METHOD_NOT_ALLOWED => Ok(false),
            _ => Err(failure(response, &call, &self.to.to_string()).await),
        }
    }

    /// `None`: mounted. `Some`: not, with the upload that the registry started instead.
    async fn mount(&self, blob: &Descriptor, from: &Reference, action: &str) -> Result<Option<Option<Url>>, RegistryError> {
        let mut url = self.url("blobs/uploads/");
        let repository = self.endpoint.repository(from.repository());
        url.query_pairs_mut().append_pair("mount", &blob.digest.to_string()).append_pair("from", &repository);
        let mut call = self.call(Method::POST, url, Payload::Bytes(vec![]), action);
        call.scopes.push(scope(&self.endpoint, from, "pull"));
        let response = match self.inner.send(&call).await {
            Ok(response) => response,
            // No access to the other repository is no reason to fail: the blob is uploaded then.
            Err(RegistryError::Unauthorized { .. } | RegistryError::Denied { .. }) => return Ok(Some(None)),
            Err(error) => return Err(error),
        };
        Ok(match response.status() {
            StatusCode::CREATED => None,
            StatusCode::ACCEPTED => Some(self.location(&response, &call)),
            _ => Some(None),
        })
    }

    pub(super) fn location(&self, response: &Response, call: &Call<'_>) -> Option<Url> {
        let location = response.headers().get(LOCATION)?.to_str().ok()?;
        self.endpoint.locate(&call.url, location)
    }

    /// Puts a manifest under a tag or its digest.
    pub(super) async fn put_manifest(&self, name: &str, manifest: &Fetched) -> Result<(), RegistryError> {
        let kind = if is_index(&manifest.descriptor.media_type) { "index" } else { "manifest" };
        let by_digest = name.contains(':');
        let action = if by_digest { format!("push the {kind} of {}", self.to) } else { format!("put the tag {}", self.name(name)) };
        let url = self.url(&format!("manifests/{name}"));
        let mut call = self.call(Method::PUT, url, Payload::Bytes(manifest.bytes.clone()), &action);
        let media_type = HeaderValue::try_from(&manifest.descriptor.media_type);
        call.headers.push((CONTENT_TYPE, media_type.map_err(|_| call.protocol("the media type is no header value"))?));
        let response = self.inner.send(&call).await?;
        if !response.status().is_success() {
            return Err(failure(response, &call, &self.to.to_string()).await);
        }
        let said = header(&response, "docker-content-digest").and_then(|d| d.parse::<Digest>().ok());
        match said {
            Some(said) if said != manifest.descriptor.digest => Err(RegistryError::Corrupt {
                what: format!("the {kind} of {} as the registry took it", self.to),
                expected: manifest.descriptor.digest.to_string(),
                actual: said.to_string(),
            }),
            _ => Ok(()),
        }
    }

    /// Makes sure that a tag or digest is there and means what was pushed.
    pub(super) async fn read_back(&self, name: &str, expected: &Digest) -> Result<(), RegistryError> {
        match self.points_at(name).await? {
            Some(found) if found == *expected => Ok(()),
            found => Err(RegistryError::Corrupt {
                what: format!("{}/{} {name} as read back after the push", self.to.registry(), self.to.repository()),
                expected: expected.to_string(),
                actual: found.map_or_else(|| "nothing".into(), |digest| digest.to_string()),
            }),
        }
    }

    /// What a tag or digest leads to.
    pub(super) async fn points_at(&self, name: &str) -> Result<Option<Digest>, RegistryError> {
        let action = format!("look at {} of {}", name, self.to);
        let mut call = self.call(Method::HEAD, self.url(&format!("manifests/{name}")), Payload::None, &action);
        call.headers.push((ACCEPT, HeaderValue::from_static(ANYTHING)));
        let response = self.inner.send(&call).await?;
        match (response.status(), header(&response, "docker-content-digest").and_then(|d| d.parse().ok())) {
            (StatusCode::NOT_FOUND, _) => Ok(None),
            (status, Some(digest)) if status.is_success() => Ok(Some(digest)),
            // Some registries answer HEAD without this header.
            (status, None) if status.is_success() => Ok(self.document(name).await?.map(|fetched| fetched.descriptor.digest)),
            _ => Err(failure(response, &call, &self.to.to_string()).await),
        }
    }

    /// What a tag leads to, byte for byte and whatever it is, to be put there again.
    pub(super) async fn document(&self, name: &str) -> Result<Option<Fetched>, RegistryError> {
        let action = format!("read {} of {}", name, self.to);
        let mut call = self.call(Method::GET, self.url(&format!("manifests/{name}")), Payload::None, &action);
        call.headers.push((ACCEPT, HeaderValue::from_static(ANYTHING)));
        let response = self.inner.send(&call).await?;
        if response.status() == StatusCode::NOT_FOUND {
            return Ok(None);
        }
        if !response.status().is_success() {
            return Err(failure(response, &call, &self.to.to_string()).await);
        }
        let media_type = header(&response, CONTENT_TYPE.as_str()).unwrap_or_default();
        // The digest of a signed manifest of Docker's first schema is not that of its bytes.
        let said = header(&response, "docker-content-digest").and_then(|d| d.parse::<Digest>().ok());
        let bytes = read_limited(response, MAX_MANIFEST, &call, &format!("the manifest of {}", self.name(name))).await?;
        let digest = said.unwrap_or_else(|| Digest::of(&bytes));
        let descriptor = Descriptor { media_type, digest, size: bytes.len() as u64, platform: None, annotations: [].into() };
        Ok(Some(Fetched { descriptor, bytes }))
    }

    /// Takes a tag away and leaves everything else that it led to.
    ///
    /// To remove a tag is new in the distribution API: many registries take a digest only, and remove every tag of that digest. So
    /// the tag is moved to a manifest of its own first, and whatever is removed then is nothing that anybody else names.
    pub(super) async fn remove_tag(&self, tag: &str, throwaway: &Fetched) -> Result<(), RegistryError> {
        let action = format!("remove the tag {}", self.name(tag));
        let digest = throwaway.descriptor.digest.to_string();
        // First without the tag: a registry that removes nothing must not be left with it.
        self.put_manifest(&digest, throwaway).await?;
        if let Err(refused) = self.delete(&digest, &action).await {
            if refused.is_transient() {
                return Err(refused);
            }
            self.delete(tag, &action).await?;
        } else {
            self.put_manifest(tag, throwaway).await?;
            let untagged = self.delete(tag, &action).await;
            let removed = self.delete(&digest, &action).await;
            untagged.or(removed)?;
        }
        match self.points_at(tag).await? {
            None => Ok(()),
            Some(_) => Err(RegistryError::Protocol {
                action,
                registry: self.endpoint.registry.clone(),
                reason: "it said that the tag is gone, and it is there".into(),
            }),
        }
    }

    async fn delete(&self, name: &str, action: &str) -> Result<(), RegistryError> {
        let mut call = self.call(Method::DELETE, self.url(&format!("manifests/{name}")), Payload::None, action);
        call.scopes.push(scope(&self.endpoint, &self.to, "delete"));
        let response = self.inner.send(&call).await?;
        match response.status() {
            status if status.is_success() || status == StatusCode::NOT_FOUND => Ok(()),
            StatusCode::METHOD_NOT_ALLOWED => Err(RegistryError::Denied {
                action: action.into(),
                registry: self.endpoint.registry.clone(),
                detail: "it removes nothing".into(),
            }),
            _ => Err(failure(response, &call, &self.to.to_string()).await),
        }
    }
}
