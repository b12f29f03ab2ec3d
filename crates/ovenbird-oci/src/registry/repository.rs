//! What a registry has, looked at and changed one thing at a time: a name, its tags, a blob. Mirrors play no part in it.

use std::collections::{BTreeMap, HashSet};

use reqwest::header::LINK;
use reqwest::{Method, StatusCode, Url};
use serde::Deserialize;

use super::endpoint::Endpoint;
use super::pull::{choose, scope};
use super::transport::{Call, Payload, detail, failure, read_limited};
use super::{Client, RegistryError};
use crate::store::Store;
use crate::{Descriptor, Digest, Platform, Reference};

/// Tags that are asked for at once.
const PAGE: usize = 1000;
/// Most bytes of a page: some registries give all tags on one.
const MAX_PAGE: u64 = 32 << 20;
/// Most pages, and most tags of a repository.
const MAX_PAGES: usize = 2_000;
const MAX_TAGS: usize = 200_000;
/// Most pages in a row that bring nothing new.
const MAX_IDLE: usize = 10;

/// What became of a deletion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Deletion {
    /// It is gone.
    Done,
    /// It was not there.
    Missing,
    /// The registry does not delete this: what it said.
    Unsupported(String),
}

#[derive(Deserialize)]
struct TagList {
    #[serde(default)]
    tags: Option<Vec<String>>,
}

impl Client {
    /// What the registry itself has under a name; `None`: nothing.
    pub async fn look(&self, reference: &Reference) -> Result<Option<Descriptor>, RegistryError> {
        let endpoint = Endpoint::of(reference.registry(), &self.inner.options)?;
        self.inner.head_of(&endpoint, reference, &format!("look up {reference}")).await
    }

    /// All tags of a repository, in the order of the registry.
    pub async fn tags(&self, repository: &Reference) -> Result<Vec<String>, RegistryError> {
        let endpoint = Endpoint::of(repository.registry(), &self.inner.options)?;
        let action = format!("list the tags of {}/{}", repository.registry(), repository.repository());
        let mut url = endpoint.url(repository.repository(), "tags/list");
        url.query_pairs_mut().append_pair("n", &PAGE.to_string());
        let (mut tags, mut known, mut visited) = (vec![], HashSet::new(), HashSet::new());
        let mut idle = 0;
        loop {
            let call = call(&endpoint, repository, Method::GET, url, "pull", &action);
            if visited.len() == MAX_PAGES || idle > MAX_IDLE || !visited.insert(call.url.clone()) {
                return Err(call.protocol("its list of tags has no end"));
            }
            let response = self.inner.send(&call).await?;
            if !response.status().is_success() {
                return Err(failure(response, &call, &format!("{}/{}", repository.registry(), repository.repository())).await);
            }
            let links: Vec<String> = response.headers().get_all(LINK).iter().filter_map(|l| l.to_str().ok()).map(str::to_owned).collect();
            let bytes = read_limited(response, MAX_PAGE, &call, "a list of tags").await?;
            let page: TagList = serde_json::from_slice(&bytes).map_err(|_| call.protocol("its list of tags cannot be read"))?;
            let before = tags.len();
            for tag in page.tags.unwrap_or_default() {
                if !Reference::is_tag(&tag) {
                    return Err(call.protocol(format!("it lists the tag {}, which is none", super::printable(&format!("{tag:?}")))));
                }
                if known.insert(tag.clone()) {
                    tags.push(tag);
                }
            }
            idle = if tags.len() > before { 0 } else { idle + 1 };
            if tags.len() > MAX_TAGS {
                return Err(call.protocol(format!("the repository has more than {MAX_TAGS} tags")));
            }
            let Some(next) = links.iter().find_map(|link| next_page(link)) else { return Ok(tags) };
            let next = endpoint.locate(&call.url, next).filter(|next| endpoint.owns(next));
            url = next.ok_or_else(|| call.protocol("the next page of its tags is on another server"))?;
        }
    }

    /// Deletes a tag, or a manifest when the reference has a digest.
    pub async fn delete(&self, reference: &Reference) -> Result<Deletion, RegistryError> {
        let endpoint = Endpoint::of(reference.registry(), &self.inner.options)?;
        let action = format!("delete {reference}");
        let name = reference.digest().map_or_else(|| reference.tag().unwrap_or("latest").to_owned(), ToString::to_string);
        let url = endpoint.url(reference.repository(), &format!("manifests/{name}"));
        let call = call(&endpoint, reference, Method::DELETE, url, "delete", &action);
        let response = self.inner.send(&call).await?;
        match response.status() {
            status if status.is_success() => Ok(Deletion::Done),
            StatusCode::NOT_FOUND => Ok(Deletion::Missing),
            StatusCode::METHOD_NOT_ALLOWED | StatusCode::BAD_REQUEST | StatusCode::NOT_IMPLEMENTED => {
                Ok(Deletion::Unsupported(detail(response, &endpoint).await.0))
            }
            _ => Err(failure(response, &call, &reference.to_string()).await),
        }
    }

    /// Has a repository this blob?
    pub async fn has_blob(&self, repository: &Reference, blob: &Digest) -> Result<bool, RegistryError> {
        let endpoint = Endpoint::of(repository.registry(), &self.inner.options)?;
        let action = format!("look up blob {} of {}/{}", blob.short(), repository.registry(), repository.repository());
        let url = endpoint.url(repository.repository(), &format!("blobs/{blob}"));
        let call = call(&endpoint, repository, Method::HEAD, url, "pull", &action);
        let response = self.inner.send(&call).await?;
        match response.status() {
            status if status.is_success() => Ok(true),
            StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED => Ok(false),
            _ => Err(failure(response, &call, &repository.to_string()).await),
        }
    }

    /// Makes a blob of one repository part of another on the same registry, without a transfer. False: the registry did not do it.
    pub async fn mount(&self, blob: &Digest, from: &Reference, to: &Reference) -> Result<bool, RegistryError> {
        let endpoint = Endpoint::of(to.registry(), &self.inner.options)?;
        let action = format!("mount blob {} of {}/{} in {}", blob.short(), from.registry(), from.repository(), to.repository());
        let mut url = endpoint.url(to.repository(), "blobs/uploads/");
        let source = endpoint.repository(from.repository());
        url.query_pairs_mut().append_pair("mount", &blob.to_string()).append_pair("from", &source);
        let mut post = call(&endpoint, to, Method::POST, url, "pull,push", &action);
        post.payload = Payload::Bytes(vec![]);
        post.scopes.push(scope(&endpoint, from, "pull"));
        let response = self.inner.send(&post).await?;
        match response.status() {
            StatusCode::CREATED => Ok(true),
            StatusCode::ACCEPTED => {
                // An upload was begun instead, which nobody will send.
                let location = response.headers().get("location").and_then(|l| l.to_str().ok());
                if let Some(upload) = location.and_then(|l| endpoint.locate(&post.url, l)).filter(|url| endpoint.owns(url)) {
                    let _ = self.inner.send(&call(&endpoint, to, Method::DELETE, upload, "pull,push", &action)).await;
                }
                Ok(false)
            }
            _ => Err(failure(response, &post, &to.to_string()).await),
        }
    }

    /// What a name stands for: all of it, or the manifest of one platform. Manifests that were looked at are in the store then.
    pub async fn resolve(&self, from: &Reference, platform: Option<&Platform>, store: &Store) -> Result<Descriptor, RegistryError> {
        let root = self.inner.manifest_into(from, None, store).await?;
        let Some(platform) = platform else { return Ok(root.descriptor) };
        let chosen = choose(&self.inner, from, root, platform, store).await?;
        Ok(Descriptor { platform: None, annotations: BTreeMap::new(), ..chosen.descriptor })
    }
}

fn call<'a>(endpoint: &'a Endpoint, reference: &'a Reference, method: Method, url: Url, actions: &str, action: &'a str) -> Call<'a> {
    let scopes = vec![scope(endpoint, reference, actions)];
    Call { endpoint, repository: reference.repository(), method, url, scopes, headers: vec![], payload: Payload::None, action }
}

/// The target with `rel="next"` of a `Link` header (RFC 8288).
fn next_page(header: &str) -> Option<&str> {
    let mut rest = header;
    loop {
        let (target, after) = rest.split_once('<')?.1.split_once('>')?;
        // Parameters end at a comma; none of those that matter holds one.
        let (parameters, more) = after.split_once(',').unwrap_or((after, ""));
        let next = parameters.split(';').filter_map(|p| p.trim().split_once('=')).any(|(name, value)| {
            name.eq_ignore_ascii_case("rel") && value.trim_matches('"').split_ascii_whitespace().any(|rel| rel.eq_ignore_ascii_case("next"))
        });
        if next {
            return Some(target);
        }
        rest = more;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_to_the_next_page() {
        for (header, expect) in [
            ("</v2/a/tags/list?last=b&n=2>; rel=\"next\"", Some("/v2/a/tags/list?last=b&n=2")),
            ("</v2/a?last=b>; rel=next", Some("/v2/a?last=b")),
            ("</a>; rel=\"prev\", </b>; REL=\"first Next\"", Some("/b")),
            ("</a,b>; rel=\"next\"", Some("/a,b")),
            ("</a>; title=x", None),
            ("</a>", None),
            ("</a", None),
            ("", None),
            (",,,", None),
            ("<>; rel=next", Some("")),
        ] {
            assert_eq!(next_page(header), expect, "{header}");
        }
    }
}
