//! Who we are to a repository, and what we may do there. Asks, and changes nothing.

use std::time::SystemTime;

use reqwest::header::LOCATION;
use reqwest::{Method, Response, StatusCode, Url};

use super::endpoint::Endpoint;
use super::transport::{Call, Payload, failure};
use super::{Inner, RegistryError};
use crate::Reference;
use crate::keychain::{Credential, Origin};

/// What a registry says to us.
#[derive(Debug, Clone)]
pub struct Access {
    /// URL that was asked.
    pub address: String,
    /// Where the credential is from; none: nobody is logged in.
    pub origin: Option<Origin>,
    /// As whom; none: nobody, or a token that does not say.
    pub username: Option<String>,
    /// When the credential ends, as far as its issuer said.
    pub expires: Option<SystemTime>,
    /// Whether the repository can be read.
    pub pull: Verdict,
    /// Whether it can be written to; none: not asked.
    pub push: Option<Verdict>,
}

/// One answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It may be done.
    Allowed,
    /// It may be done as far as the registry says, but there is no such repository.
    Missing,
    /// It may not.
    Refused(String),
}

/// See [`super::Client::check_access`].
pub(crate) async fn check(inner: &Inner, repository: &Reference, push: bool) -> Result<Access, RegistryError> {
    let mut endpoint = Endpoint::of(repository.registry(), &inner.options)?;
    // To ask must not make one.
    endpoint.options.create_repository = false;
    let name = repository.repository();
    let found = inner.auth.credential(&endpoint, name).await?;
    let pull = verdict(ask(inner, &endpoint, name, Method::GET, endpoint.url(name, "tags/list"), "pull").await)?.1;
    let push = match push.then_some(&pull) {
        None => None,
        Some(_) => {
            let url = endpoint.url(name, "blobs/uploads/");
            let (response, verdict) = verdict(ask(inner, &endpoint, name, Method::POST, url.clone(), "pull,push").await)?;
            if let Some(session) = response.as_ref().and_then(|r| endpoint.locate(&url, r.headers().get(LOCATION)?.to_str().ok()?))
                && endpoint.owns(&session)
            {
                // Registries remove what is left over by themselves; this one is only tidied away earlier.
                let _ = ask(inner, &endpoint, name, Method::DELETE, session, "pull,push").await;
            }
            Some(verdict)
        }
    };
    // Asking may have renewed it.
    let found = inner.auth.credential(&endpoint, name).await?.or(found);
    let username = found.as_ref().and_then(|found| match &found.credential {
        Credential::Password { username, .. } => Some(username.clone()),
        Credential::IdentityToken(_) | Credential::RegistryToken(_) => None,
    });
    Ok(Access {
        address: endpoint.address().into(),
        username,
        expires: found.as_ref().and_then(|found| found.expires),
        origin: found.map(|found| found.origin),
        pull,
        push,
    })
}

async fn ask(
    inner: &Inner,
    endpoint: &Endpoint,
    repository: &str,
    method: Method,
    url: Url,
    actions: &str,
) -> Result<Response, RegistryError> {
    let action = format!("{} {}/{repository}", if actions == "pull" { "read" } else { "write to" }, endpoint.registry);
    let call = Call {
        endpoint,
        repository,
        method,
        url,
        scopes: vec![format!("repository:{}:{actions}", endpoint.repository(repository))],
        headers: vec![],
        payload: Payload::None,
        action: &action,
    };
    let response = inner.send(&call).await?;
    if response.status().is_success() { Ok(response) } else { Err(failure(response, &call, repository).await) }
}

fn verdict(asked: Result<Response, RegistryError>) -> Result<(Option<Response>, Verdict), RegistryError> {
    match asked {
        Ok(response) if response.status() != StatusCode::NO_CONTENT => Ok((Some(response), Verdict::Allowed)),
        Ok(_) => Ok((None, Verdict::Allowed)),
        Err(RegistryError::NotFound { .. }) => Ok((None, Verdict::Missing)),
        Err(refused @ (RegistryError::Unauthorized { .. } | RegistryError::Denied { .. })) => {
            Ok((None, Verdict::Refused(refused.to_string())))
        }
        Err(error) => Err(error),
    }
}
