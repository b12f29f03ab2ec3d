//! Who we are to a registry: challenges, tokens, credentials.
//!
//! A registry is asked without credentials first; what its challenge says is kept for the origin, and later requests carry a token
//! (or a password) from the start. Credentials go to the registry itself or to the realm that it names, the realm only over HTTPS
//! unless the registry is spoken to in plain HTTP anyway.
//! Source: Docker's token authentication and OAuth2 specifications; RFC 7617; RFC 6750.

use std::collections::{BTreeSet, HashMap};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Method, Response, StatusCode, Url};

use super::challenge::{self, Challenge};
use super::endpoint::Endpoint;
use super::error::{login_hint, origin_hint};
use super::transport::{Backoff, Call, Failure, Payload, detail, failure, read_limited};
use super::{Inner, RegistryError};
use crate::keychain::{Credential, Found, Keychain, Query, Secret};

/// Life of a token whose server does not say (the specification's value).
const DEFAULT_LIFE: u64 = 60;
/// Challenges answered at one request: to learn what is wanted, and to renew what is refused.
const MAX_CHALLENGES: usize = 3;
/// Largest answer of a token server, in bytes.
const MAX_TOKEN: u64 = 1 << 20;

pub(crate) struct Auth {
    keychain: Keychain,
    /// What an endpoint asked for, by its root URL.
    learned: Mutex<HashMap<String, Known>>,
    /// By registry and repository.
    credentials: Mutex<HashMap<(String, String), Lookup>>,
    tokens: Mutex<HashMap<TokenKey, Slot>>,
    /// Repositories that were made on request, by registry and repository.
    made: Mutex<HashMap<(String, String), Arc<tokio::sync::OnceCell<()>>>>,
}

/// Locked while the look-up goes on: who comes meanwhile waits for it. The outer `None`: not looked up yet.
type Lookup = Arc<tokio::sync::Mutex<Option<Option<Found>>>>;

/// Locked while the token is fetched, so that parallel requests share it.
type Slot = Arc<tokio::sync::Mutex<Option<Token>>>;

#[derive(Debug, Clone)]
enum Known {
    Basic,
    Bearer { realm: Url, service: Option<String> },
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct TokenKey {
    endpoint: String,
    realm: String,
    service: Option<String>,
    scopes: BTreeSet<String>,
}

struct Token {
    value: HeaderValue,
    /// Not to be used any more.
    stale: Instant,
}

impl Auth {
    pub(crate) fn new(keychain: Keychain) -> Self {
        Self { keychain, learned: Mutex::default(), credentials: Mutex::default(), tokens: Mutex::default(), made: Mutex::default() }
    }

    fn known(&self, endpoint: &Endpoint) -> Option<Known> {
        self.learned.lock().unwrap_or_else(PoisonError::into_inner).get(endpoint.root().as_str()).cloned()
    }

    fn lookup(&self, registry: &str, repository: &str) -> Lookup {
        let key = (registry.to_owned(), repository.to_owned());
        Arc::clone(self.credentials.lock().unwrap_or_else(PoisonError::into_inner).entry(key).or_default())
    }

    /// Looked up once for each repository: helpers are slow and may ask the user. What ends soon is looked up again.
    pub(super) async fn credential(&self, endpoint: &Endpoint, repository: &str) -> Result<Option<Found>, RegistryError> {
        let lookup = self.lookup(&endpoint.registry, repository);
        let mut known = lookup.lock().await;
        if let Some(found) = known.as_ref().filter(|found| found.as_ref().is_none_or(|found| !found.is_stale())) {
            return Ok(found.clone());
        }
        let found = self.search(endpoint, repository, None).await?;
        *known = Some(found.clone());
        Ok(found)
    }

    /// The registry refused a credential that may have run out: true when there is another one now. Of many requests that were
    /// refused together one looks it up, the others take what it found.
    async fn renew(&self, endpoint: &Endpoint, repository: &str, refused: &Credential) -> Result<bool, RegistryError> {
        let lookup = self.lookup(&endpoint.registry, repository);
        let mut known = lookup.lock().await;
        if let Some(Some(found)) = known.as_ref().filter(|found| found.as_ref().is_some_and(|found| found.credential != *refused)) {
            return Ok(!found.is_stale());
        }
        let found = self.search(endpoint, repository, Some(refused)).await?;
        let other = found.as_ref().is_some_and(|found| found.credential != *refused);
        if other {
            *known = Some(found);
        }
        Ok(other)
    }

    async fn search(&self, endpoint: &Endpoint, repository: &str, refused: Option<&Credential>) -> Result<Option<Found>, RegistryError> {
        let query = Query { registry: &endpoint.registry, repository, address: Some(endpoint.address()), refused };
        let found = self.keychain.find(query).await;
        found.map_err(|source| RegistryError::Keychain { registry: endpoint.registry.clone(), source: Box::new(source) })
    }

    /// What was looked up for the repository already, or can be read without running a helper.
    pub(crate) fn recorded(&self, registry: &str, repository: &str) -> Option<Credential> {
        let key = (registry.to_owned(), repository.to_owned());
        let cell = self.credentials.lock().unwrap_or_else(PoisonError::into_inner).get(&key).cloned();
        let known = cell.and_then(|cell| cell.try_lock().ok()?.clone());
        match known {
            Some(found) => found.map(|found| found.credential),
            None => self.keychain.recorded(registry, repository),
        }
    }
}

impl Inner {
    /// The header for a request, as far as it is known what the endpoint wants.
    pub(crate) async fn authorization(
        &self,
        endpoint: &Endpoint,
        repository: &str,
        scopes: &[String],
        action: &str,
    ) -> Result<Option<HeaderValue>, RegistryError> {
        let Some(known) = self.auth.known(endpoint) else { return Ok(None) };
        let found = self.auth.credential(endpoint, repository).await?;
        if let Some(found) = &found {
            endpoint.note(&found.credential);
        }
        match known {
            Known::Basic => Ok(match found.map(|found| found.credential) {
                Some(Credential::Password { username, password }) => Some(basic(&username, &password)),
                Some(Credential::RegistryToken(token)) => Some(bearer(token.expose(), endpoint, action)?),
                Some(Credential::IdentityToken(_)) | None => None,
            }),
            Known::Bearer { realm, service } => {
                let slot = self.slot(endpoint, &realm, service.as_deref(), scopes);
                let mut token = slot.lock().await;
                if let Some(token) = token.as_ref().filter(|t| Instant::now() < t.stale) {
                    return Ok(Some(token.value.clone()));
                }
                let fresh = match self.fetch_token(endpoint, &realm, service.as_deref(), scopes, found.as_ref(), action).await {
                    Err(refused @ RegistryError::Unauthorized { .. }) => match &found {
                        Some(old) if self.auth.renew(endpoint, repository, &old.credential).await? => {
                            let found = self.auth.credential(endpoint, repository).await?;
                            self.fetch_token(endpoint, &realm, service.as_deref(), scopes, found.as_ref(), action).await?
                        }
                        _ => return Err(refused),
                    },
                    other => other?,
                };
                Ok(Some(token.insert(fresh).value.clone()))
            }
        }
    }

    fn slot(&self, endpoint: &Endpoint, realm: &Url, service: Option<&str>, scopes: &[String]) -> Slot {
        let key = TokenKey {
            endpoint: endpoint.root().into(),
            realm: realm.as_str().into(),
            service: service.map(Into::into),
            scopes: scopes.iter().cloned().collect(),
        };
        let mut tokens = self.auth.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        if tokens.len() > 1024 {
            // A service that lives long sees many repositories.
            tokens.retain(|_, slot| Arc::strong_count(slot) > 1);
        }
        Arc::clone(tokens.entry(key).or_default())
    }

    /// A 401 of the endpoint: learns what it asks for and forgets the token that did not help. `Ok` means that another try is worth
    /// it, and names the scopes that the endpoint wants to see.
    pub(crate) async fn challenged(
        &self,
        call: &Call<'_>,
        response: Response,
        sent: Option<&HeaderValue>,
        before: usize,
    ) -> Result<Vec<String>, RegistryError> {
        let endpoint = call.endpoint;
        let headers = response.headers().get_all(WWW_AUTHENTICATE);
        let challenges: Vec<Challenge> =
            headers.iter().flat_map(|value| challenge::parse(&String::from_utf8_lossy(value.as_bytes()))).collect();
        let (said, _) = detail(response, endpoint).await;
        let known = choose(&challenges, endpoint).ok_or_else(|| {
            let schemes: Vec<_> = challenges.iter().map(|c| c.scheme.as_str()).collect();
            call.protocol(format!("status 401 without a usable challenge, only [{}]: {said}", schemes.join(", ")))
        })?;
        let (known, wanted) = known?;
        let found = self.auth.credential(endpoint, call.repository).await?;
        let credential = found.as_ref().map(|found| &found.credential);
        let refused = |detail: String| RegistryError::Unauthorized {
            action: call.action.into(),
            registry: endpoint.registry.clone(),
            detail,
            hint: hint(&endpoint.registry, found.as_ref()),
        };
        let anonymous = match credential {
            None => true,
            Some(Credential::IdentityToken(_)) => matches!(known, Known::Basic),
            Some(_) => false,
        };
        if matches!(known, Known::Basic) && anonymous {
            return Err(refused("nobody is logged in".into()));
        }
        let direct = matches!(known, Known::Basic) || matches!(credential, Some(Credential::RegistryToken(_)));
        if let (Some(sent), Some(credential), true, true) = (sent, credential, direct, before < MAX_CHALLENGES) {
            // What is known by now may be newer than what was sent.
            let header = match credential {
                Credential::Password { username, password } => basic(username, password),
                Credential::RegistryToken(token) | Credential::IdentityToken(token) => bearer(token.expose(), endpoint, call.action)?,
            };
            if *sent != header || self.auth.renew(endpoint, call.repository, credential).await? {
                self.forget_token(sent).await;
                return Ok(wanted);
            }
        }
        if before > 0 || (sent.is_some() && matches!(known, Known::Basic)) {
            let scope_missing = challenges.iter().any(|c| c.get("error") == Some("insufficient_scope"));
            return Err(if anonymous {
                refused(format!("nobody is logged in; {said}"))
            } else if scope_missing {
                RegistryError::Denied { action: call.action.into(), registry: endpoint.registry.clone(), detail: said }
            } else {
                refused(said)
            });
        }
        if let (Known::Bearer { .. }, Some(sent)) = (&known, sent) {
            self.forget_token(sent).await;
        }
        self.auth.learned.lock().unwrap_or_else(PoisonError::into_inner).insert(endpoint.root().into(), known);
        Ok(wanted)
    }

    /// The token that was sent does not help any more.
    async fn forget_token(&self, sent: &HeaderValue) {
        let slots: Vec<Slot> = self.auth.tokens.lock().unwrap_or_else(PoisonError::into_inner).values().map(Arc::clone).collect();
        for slot in slots {
            let mut token = slot.lock().await;
            if token.as_ref().is_some_and(|t| t.value == *sent) {
                *token = None;
            }
        }
    }

    /// Makes the repository that an upload goes to, where the settings ask for it. Once.
    pub(crate) async fn ensure_repository(&self, call: &Call<'_>) -> Result<(), RegistryError> {
        if !call.endpoint.options.create_repository || call.repository.is_empty() {
            return Ok(());
        }
        let key = (call.endpoint.registry.clone(), call.repository.to_owned());
        let made = Arc::clone(self.auth.made.lock().unwrap_or_else(PoisonError::into_inner).entry(key).or_default());
        let work = || async {
            match self.auth.keychain.create_repository(&call.endpoint.registry, call.repository).await {
                Ok(_) => Ok(()),
                // Who may push need not be allowed to make repositories: then it must be there.
                Err(_) if self.has_repository(call).await => Ok(()),
                Err(source) => Err(RegistryError::Denied {
                    action: call.action.into(),
                    registry: call.endpoint.registry.clone(),
                    detail: source.to_string(),
                }),
            }
        };
        made.get_or_try_init(work).await.map(drop)
    }

    /// In a box: sending is what asked for this.
    fn has_repository<'a>(&'a self, call: &'a Call<'_>) -> Pin<Box<dyn Future<Output = bool> + Send + 'a>> {
        Box::pin(async move {
            let ask = Call {
                endpoint: call.endpoint,
                repository: call.repository,
                method: Method::GET,
                url: call.endpoint.url(call.repository, "tags/list"),
                scopes: vec![],
                headers: vec![],
                payload: Payload::None,
                action: call.action,
            };
            self.send(&ask).await.is_ok_and(|response| response.status().is_success())
        })
    }

    async fn fetch_token(
        &self,
        endpoint: &Endpoint,
        realm: &Url,
        service: Option<&str>,
        scopes: &[String],
        found: Option<&Found>,
        action: &str,
    ) -> Result<Token, RegistryError> {
        let credential = found.map(|found| &found.credential);
        if let Some(credential) = credential {
            endpoint.note(credential);
        }
        if let Some(Credential::RegistryToken(token)) = credential {
            return Ok(Token { value: bearer(token.expose(), endpoint, action)?, stale: Instant::now() + Duration::from_hours(1) });
        }
        let mut url = realm.clone();
        let mut headers = vec![];
        let (method, payload) = if let Some(Credential::IdentityToken(token)) = credential {
            let mut form = vec![("grant_type", "refresh_token".to_owned()), ("client_id", "ovenbird".into())];
            form.extend(service.map(|s| ("service", s.to_owned())));
            if !scopes.is_empty() {
                form.push(("scope", scopes.join(" ")));
            }
            form.push(("refresh_token", token.expose().to_owned()));
            headers.push((CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded")));
            let mut encoded = realm.clone();
            encoded.query_pairs_mut().clear().extend_pairs(form);
            (Method::POST, Payload::Bytes(encoded.query().unwrap_or_default().as_bytes().to_vec()))
        } else {
            let mut query = url.query_pairs_mut();
            query.extend_pairs(service.map(|s| ("service", s)));
            query.extend_pairs(scopes.iter().map(|s| ("scope", s)));
            if let Some(Credential::Password { username, password }) = credential {
                query.append_pair("account", username).append_pair("client_id", "ovenbird");
                headers.push((AUTHORIZATION, basic(username, password)));
            }
            drop(query);
            (Method::GET, Payload::None)
        };
        // No `Call::scopes` and no challenge here: a token server that answers 401 means the credentials.
        let call = Call { endpoint, repository: "", method, url, scopes: vec![], headers, payload, action };
        let response = self.exchange(&call).await?;
        if !response.status().is_success() {
            let refused = matches!(response.status(), StatusCode::BAD_REQUEST | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN);
            if !refused {
                let status = response.status();
                return Err(call.protocol(format!("its token server {} answered {status}", host(realm))));
            }
            let (said, _) = detail(response, endpoint).await;
            let who = if credential.is_none() { "nobody is logged in; " } else { "" };
            return Err(RegistryError::Unauthorized {
                action: action.into(),
                registry: endpoint.registry.clone(),
                detail: format!("{who}{said}"),
                hint: hint(&endpoint.registry, found),
            });
        }
        let bytes = read_limited(response, MAX_TOKEN, &call, "the token").await?;
        // The parser's message could quote the token.
        let document: serde_json::Value = serde_json::from_slice(&bytes).unwrap_or_default();
        let text = |name: &str| document.get(name).and_then(|v| v.as_str()).filter(|t| !t.is_empty());
        let token = text("token")
            .or(text("access_token"))
            .ok_or_else(|| call.protocol(format!("its token server {} gave no token", host(realm))))?;
        let life = document.get("expires_in").and_then(serde_json::Value::as_u64).filter(|s| *s > 0).unwrap_or(DEFAULT_LIFE).min(86400);
        // Used to the end, it would expire on the way; the clocks of others are not believed, so `issued_at` is not read.
        let margin = (life / 4).min(10);
        Ok(Token { value: bearer(token, endpoint, action)?, stale: Instant::now() + Duration::from_secs(life - margin) })
    }

    /// A request to a token server: no redirects, no authentication but what it carries.
    async fn exchange(&self, call: &Call<'_>) -> Result<Response, RegistryError> {
        let mut backoff = Backoff::new(call.endpoint.attempts);
        loop {
            let client = self.http(call.endpoint, &call.url, call.action).await?;
            let mut request = client.request(call.method.clone(), call.url.clone()).headers(call.headers.iter().cloned().collect());
            if let Payload::Bytes(bytes) = &call.payload {
                request = request.body(bytes.clone());
            }
            let error = match tokio::time::timeout(call.endpoint.timeouts.answer, request.send()).await {
                Ok(Ok(response)) if response.status() == StatusCode::TOO_MANY_REQUESTS || response.status().is_server_error() => {
                    failure(response, call, "").await
                }
                Ok(Ok(response)) => return Ok(response),
                Ok(Err(error)) => Failure::Http(error).into_error(call.action, call.endpoint, &call.url),
                Err(_) => Failure::Silence(call.endpoint.timeouts.answer).into_error(call.action, call.endpoint, &call.url),
            };
            backoff.pause(error).await?;
        }
    }
}

/// Asks the registry's root with these credentials.
pub(crate) async fn check_login(inner: &Inner, registry: &str, username: &str, password: &Secret) -> Result<(), RegistryError> {
    let endpoint = Endpoint::of(registry, &inner.options)?;
    let action = format!("log in to {registry}");
    let found = Found::typed(username, password);
    endpoint.note(&found.credential);
    let call = |headers| Call {
        endpoint: &endpoint,
        repository: "",
        method: Method::GET,
        url: endpoint.root(),
        scopes: vec![],
        headers,
        payload: Payload::None,
        action: &action,
    };
    let first = call(vec![]);
    let response = inner.exchange(&first).await?;
    if response.status() != StatusCode::UNAUTHORIZED {
        // It asks nobody: then any name is fine, as Docker sees it too.
        return if response.status().is_success() { Ok(()) } else { Err(failure(response, &first, registry).await) };
    }
    let headers = response.headers().get_all(WWW_AUTHENTICATE);
    let challenges: Vec<Challenge> = headers.iter().flat_map(|v| challenge::parse(&String::from_utf8_lossy(v.as_bytes()))).collect();
    let known = choose(&challenges, &endpoint).ok_or_else(|| first.protocol("status 401 without a usable challenge"))?;
    let header = match known?.0 {
        Known::Basic => basic(username, password),
        Known::Bearer { realm, service } => {
            inner.fetch_token(&endpoint, &realm, service.as_deref(), &[], Some(&found), &action).await?.value
        }
    };
    let second = call(vec![(AUTHORIZATION, header)]);
    let response = inner.exchange(&second).await?;
    if response.status().is_success() { Ok(()) } else { Err(failure(response, &second, registry).await) }
}

/// The challenge that is answered, bearer before basic, and the scopes it names. `None`: none is supported.
fn choose(challenges: &[Challenge], endpoint: &Endpoint) -> Option<Result<(Known, Vec<String>), RegistryError>> {
    for challenge in challenges.iter().filter(|c| c.scheme == "bearer") {
        let Some(realm) = challenge.get("realm").and_then(|r| Url::parse(r).ok()).filter(Url::has_host) else { continue };
        let safe = realm.scheme() == "https" || (realm.scheme() == "http" && endpoint.is_plain());
        if !safe {
            return Some(Err(RegistryError::Protocol {
                action: "send credentials".into(),
                registry: endpoint.registry.clone(),
                reason: format!("its token server {} is not reached over HTTPS", host(&realm)),
            }));
        }
        let scopes = challenge.get("scope").unwrap_or_default().split_whitespace().map(str::to_owned).collect();
        return Some(Ok((Known::Bearer { realm, service: challenge.get("service").map(str::to_owned) }, scopes)));
    }
    challenges.iter().any(|c| c.scheme == "basic").then_some(Ok((Known::Basic, vec![])))
}

fn hint(registry: &str, found: Option<&Found>) -> String {
    found.map_or_else(|| login_hint(registry), |found| origin_hint(registry, &found.origin))
}

fn host(url: &Url) -> &str {
    url.host_str().unwrap_or("?")
}

fn basic(username: &str, password: &Secret) -> HeaderValue {
    let text = format!("Basic {}", BASE64_STANDARD.encode(format!("{username}:{}", password.expose())));
    // Base64 is always a legal header value.
    let mut value = HeaderValue::try_from(text).unwrap_or(HeaderValue::from_static("Basic Og=="));
    value.set_sensitive(true);
    value
}

fn bearer(token: &str, endpoint: &Endpoint, action: &str) -> Result<HeaderValue, RegistryError> {
    let mut value = HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| RegistryError::Protocol {
        action: action.into(),
        registry: endpoint.registry.clone(),
        reason: "its token has characters that no header may have".into(),
    })?;
    value.set_sensitive(true);
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::{ClientOptions, RegistryOptions};

    #[test]
    fn choice_of_challenge() {
        let rows = [
            ("h.test", r#"Basic realm="x""#, "basic"),
            ("h.test", r#"Basic realm="x", Bearer realm="https://t.test/",scope="a b""#, "bearer t.test [a b]"),
            ("h.test", r#"Bearer realm="https://t.test/",service=s"#, "bearer t.test []"),
            ("h.test", r#"Bearer realm="http://t.test/""#, "unsafe"),
            ("localhost:1", r#"Bearer realm="http://t.test/""#, "bearer t.test []"),
            ("plain.test", r#"Bearer realm="http://t.test/""#, "bearer t.test []"),
            ("plain.test", r#"Bearer realm="ftp://t.test/""#, "unsafe"),
            ("h.test", r#"Bearer realm="/relative", Basic"#, "basic"),
            ("h.test", "Negotiate abc", "none"),
            ("h.test", "", "none"),
        ];
        let plain = RegistryOptions { plain_http: true, ..RegistryOptions::default() };
        let options = ClientOptions { registries: [("plain.test".to_owned(), plain)].into(), ..ClientOptions::default() };
        for (registry, header, expected) in rows {
            let endpoint = Endpoint::of(registry, &options).unwrap();
            let text = match choose(&challenge::parse(header), &endpoint) {
                None => "none".into(),
                Some(Err(_)) => "unsafe".into(),
                Some(Ok((Known::Basic, _))) => "basic".into(),
                Some(Ok((Known::Bearer { realm, .. }, scopes))) => format!("bearer {} [{}]", host(&realm), scopes.join(" ")),
            };
            assert_eq!(text, expected, "{registry} {header}");
        }
    }
}
