//! One HTTP exchange: client choice, TLS, redirects, time-outs, retries, and what went wrong in words.
//!
//! Invariant: the `Authorization` header and the client certificate go to the endpoint's own origin and nowhere else.

use std::collections::HashMap;
use std::error::Error as _;
use std::io::{self, Seek};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use backon::BackoffBuilder;
use reqwest::header::{AUTHORIZATION, CONTENT_LENGTH, DATE, HeaderMap, HeaderName, HeaderValue, LOCATION, RETRY_AFTER};
use reqwest::{Method, Response, StatusCode, Url};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};
use tokio_util::io::ReaderStream;

use super::endpoint::Endpoint;
use super::error::printable;
use super::{Inner, RegistryError};

/// Longest file of certificates or a key, in bytes.
const MAX_PEM: u64 = 4 << 20;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
/// Longest pause that a server may ask for; beyond it the error is shown.
const MAX_RETRY_AFTER: Duration = Duration::from_mins(1);
const MAX_REDIRECTS: usize = 10;
/// How often silence is borne at one request: each time costs a whole time limit.
const MAX_SILENCES: usize = 3;
/// How much of an error's text is read, in bytes.
const MAX_ERROR_BODY: u64 = 64 * 1024;
/// Piece in which files are sent, in bytes.
pub(crate) const UPLOAD_PIECE: usize = 256 * 1024;

/// HTTP clients by what they need, made on first use.
#[derive(Default)]
pub(crate) struct Http {
    clients: tokio::sync::Mutex<HashMap<Kind, reqwest::Client>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Kind {
    /// Loopback: no proxy stands between a machine and itself.
    Plain {
        loopback: bool,
    },
    Tls {
        loopback: bool,
        ca: Option<PathBuf>,
        identity: Option<PathBuf>,
    },
}

/// What is sent.
#[derive(Clone)]
pub(crate) enum Payload {
    None,
    Bytes(Vec<u8>),
    /// A piece of a file, streamed.
    File {
        path: PathBuf,
        offset: u64,
        length: u64,
        sent: Arc<AtomicU64>,
        report: Arc<dyn Fn(u64) + Send + Sync>,
    },
    /// What can be sent once, and is watched by who gives it.
    Once(Arc<Mutex<Option<reqwest::Body>>>),
}

/// One request to an endpoint.
pub(crate) struct Call<'a> {
    pub(crate) endpoint: &'a Endpoint,
    /// For the choice of credentials.
    pub(crate) repository: &'a str,
    pub(crate) method: Method,
    pub(crate) url: Url,
    /// `repository:NAME:pull`.
    pub(crate) scopes: Vec<String>,
    pub(crate) headers: Vec<(HeaderName, HeaderValue)>,
    pub(crate) payload: Payload,
    /// What is being done, for messages.
    pub(crate) action: &'a str,
}

/// Pauses between attempts: exponential, with jitter.
pub(crate) struct Backoff {
    delays: backon::ExponentialBackoff,
    attempts: usize,
    silences: usize,
}

impl Backoff {
    /// For so many attempts in all.
    pub(crate) fn new(attempts: usize) -> Self {
        let builder = backon::ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(200))
            .with_max_delay(Duration::from_secs(10))
            .with_max_times(attempts.saturating_sub(1))
            .with_jitter();
        Self { delays: builder.build(), attempts, silences: 0 }
    }

    /// Like a new one.
    pub(crate) fn reset(&mut self) {
        *self = Self::new(self.attempts);
    }

    /// Waits before the next attempt, or gives the error back when there is none.
    pub(crate) async fn pause(&mut self, error: RegistryError) -> Result<(), RegistryError> {
        if !error.is_transient() {
            return Err(error);
        }
        self.silences += usize::from(matches!(error, RegistryError::Silent { .. }));
        if self.silences >= MAX_SILENCES {
            return Err(error);
        }
        let Some(delay) = self.delays.next() else { return Err(error) };
        let asked = error.retry_after().unwrap_or_default();
        if asked > MAX_RETRY_AFTER {
            return Err(error);
        }
        // Whom a server tells the same time, they all come back at the same time, but for this.
        tokio::time::sleep(asked + delay).await;
        Ok(())
    }
}

impl Inner {
    /// Sends a request with authentication and, when its body can be repeated, retries. Gives every status but 401, 429 and 5xx.
    pub(crate) async fn send(&self, call: &Call<'_>) -> Result<Response, RegistryError> {
        let mut backoff = Backoff::new(call.endpoint.attempts);
        let mut scopes = call.scopes.clone();
        let mut challenges = 0;
        if call.method == Method::POST {
            self.ensure_repository(call).await?;
        }
        loop {
            let authorization = self.authorization(call.endpoint, call.repository, &scopes, call.action).await?;
            let error = match self.attempt(call, authorization.as_ref()).await {
                Ok((response, url)) => {
                    let status = response.status();
                    let own = call.endpoint.owns(&url);
                    if status == StatusCode::UNAUTHORIZED && own {
                        let more = self.challenged(call, response, authorization.as_ref(), challenges).await?;
                        scopes.extend(more.into_iter().filter(|wanted| !call.scopes.iter().any(|scope| covers(scope, wanted))));
                        challenges += 1;
                        continue;
                    }
                    let failed = status == StatusCode::TOO_MANY_REQUESTS || status == StatusCode::UNAUTHORIZED || status.is_server_error();
                    if !failed {
                        return Ok(response);
                    }
                    failure(response, call, call.repository).await
                }
                Err(error) => error,
            };
            if matches!(call.payload, Payload::File { .. } | Payload::Once(_)) {
                // How much of it arrived is unknown: the caller starts the upload anew.
                return Err(error);
            }
            backoff.pause(error).await?;
        }
    }

    /// One request and the redirects that it leads to.
    async fn attempt(&self, call: &Call<'_>, authorization: Option<&HeaderValue>) -> Result<(Response, Url), RegistryError> {
        let mut url = call.url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let own = call.endpoint.owns(&url);
            let client = self.http(call.endpoint, &url, call.action).await?;
            if own {
                self.limits.of(&call.endpoint.registry, &call.endpoint.options).turn().await;
            }
            let mut headers: HeaderMap = call.headers.iter().cloned().collect();
            if own && let Some(value) = authorization {
                headers.insert(AUTHORIZATION, value.clone());
            }
            let mut request = client.request(call.method.clone(), url.clone());
            request = match &call.payload {
                Payload::None => request,
                Payload::Bytes(bytes) => request.body(bytes.clone()),
                Payload::File { length, .. } => {
                    headers.insert(CONTENT_LENGTH, HeaderValue::from(*length));
                    request.body(open_body(&call.payload, call.action)?)
                }
                Payload::Once(body) => {
                    let body = body.lock().unwrap_or_else(PoisonError::into_inner).take();
                    request.body(body.ok_or_else(|| RegistryError::Cancelled { action: call.action.into() })?)
                }
            };
            let response = watch(request.headers(headers).send(), call).await;
            let response = response.map_err(|failure| failure.into_error(call.action, call.endpoint, &url))?;
            let status = response.status();
            let redirect = matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308) && matches!(call.method, Method::GET | Method::HEAD);
            if !redirect {
                return Ok((response, url));
            }
            let location = response.headers().get(LOCATION).and_then(|l| l.to_str().ok());
            url = location
                .and_then(|l| call.endpoint.locate(&url, l))
                .ok_or_else(|| call.protocol("it redirects to nowhere, or from HTTPS to plain HTTP"))?;
        }
        Err(call.protocol("it redirects in circles"))
    }

    /// The client for a URL that this endpoint led to.
    pub(crate) async fn http(&self, endpoint: &Endpoint, url: &Url, action: &str) -> Result<reqwest::Client, RegistryError> {
        let loopback = super::endpoint::is_loopback_url(url);
        let kind = if url.scheme() == "http" {
            Kind::Plain { loopback }
        } else {
            let identity = endpoint.options.client_identity.clone().filter(|_| endpoint.owns(url));
            Kind::Tls { loopback, ca: endpoint.options.ca.clone(), identity }
        };
        let mut clients = self.http.clients.lock().await;
        if let Some(client) = clients.get(&kind) {
            return Ok(client.clone());
        }
        let (wanted, registry) = (kind.clone(), endpoint.registry.clone());
        let made = tokio::task::spawn_blocking(move || make_client(&wanted, &registry)).await;
        let client = made.map_err(|_| RegistryError::Cancelled { action: action.into() })??;
        clients.insert(kind, client.clone());
        Ok(client)
    }
}

/// Whether a token for one scope is good for the other.
fn covers(scope: &str, wanted: &str) -> bool {
    match (scope.rsplit_once(':'), wanted.rsplit_once(':')) {
        (Some((what, actions)), Some((other, wanted))) => what == other && wanted.split(',').all(|a| actions.split(',').any(|b| a == b)),
        _ => scope == wanted,
    }
}

impl Call<'_> {
    pub(crate) fn protocol(&self, reason: impl Into<String>) -> RegistryError {
        RegistryError::Protocol { action: self.action.into(), registry: self.endpoint.registry.clone(), reason: reason.into() }
    }
}

fn make_client(kind: &Kind, registry: &str) -> Result<reqwest::Client, RegistryError> {
    let none = (None, None);
    let (loopback, with_roots, (ca, identity)) = match kind {
        Kind::Plain { loopback } => (*loopback, false, none),
        Kind::Tls { loopback, ca, identity } => (*loopback, true, (ca.as_deref(), identity.as_deref())),
    };
    let tls = tls_config(with_roots, ca, identity, registry)?;
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("ovenbird/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT)
        .redirect(reqwest::redirect::Policy::none())
        .referer(false)
        // Retries are counted here, not below.
        .retry(reqwest::retry::never())
        .tls_backend_preconfigured(tls);
    if loopback {
        builder = builder.no_proxy();
    }
    builder.build().map_err(|e| settings(registry, Path::new("(TLS)"), chain(&e)))
}

pub(crate) fn tls_config(
    with_roots: bool,
    ca: Option<&Path>,
    identity: Option<&Path>,
    registry: &str,
) -> Result<rustls::ClientConfig, RegistryError> {
    // The provider is passed along: installing a process-wide default would panic or surprise whoever embeds this.
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    if with_roots {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    }
    if let Some(path) = ca {
        let unusable = |e: String| settings(registry, path, format!("has no usable certificate ({e})"));
        let before = roots.len();
        let pem = read_pem(path).map_err(|e| unusable(e.to_string()))?;
        for certificate in CertificateDer::pem_slice_iter(&pem) {
            let certificate = certificate.map_err(|e| unusable(e.to_string()))?;
            roots.add(certificate).map_err(|e| unusable(e.to_string()))?;
        }
        if roots.len() == before {
            return Err(unusable("no CERTIFICATE section".into()));
        }
    }
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| settings(registry, Path::new("(TLS)"), e.to_string()))?
        .with_root_certificates(roots);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let unusable = |e: String| settings(registry, path, format!("has no usable client certificate and key ({e})"));
            let pem = read_pem(path).map_err(|e| unusable(e.to_string()))?;
            let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
            let certificates = certificates.map_err(|e| unusable(e.to_string()))?;
            let key = PrivateKeyDer::from_pem_slice(&pem).map_err(|e| unusable(e.to_string()))?;
            builder.with_client_auth_cert(certificates, key).map_err(|e| unusable(e.to_string()))?
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

fn read_pem(path: &Path) -> io::Result<Vec<u8>> {
    crate::regular_file::read(path, MAX_PEM, crate::regular_file::Links::Follow)
}

fn settings(registry: &str, path: &Path, reason: String) -> RegistryError {
    RegistryError::Settings { registry: registry.into(), path: path.into(), reason }
}

/// Why there was no answer.
pub(crate) enum Failure {
    Http(reqwest::Error),
    Silence(Duration),
}

impl Failure {
    pub(crate) fn into_error(self, action: &str, endpoint: &Endpoint, url: &Url) -> RegistryError {
        let action = action.to_owned();
        let registry = if endpoint.owns(url) {
            endpoint.registry.clone()
        } else {
            format!("{} (named by {})", url.host_str().unwrap_or("?"), endpoint.registry)
        };
        let error = match self {
            // Without the URL: redirects carry signatures in it.
            Self::Http(error) => error.without_url(),
            Self::Silence(limit) => return RegistryError::Silent { action, registry, limit },
        };
        let reason = chain(&error);
        match tls_error(&error) {
            Some(rustls::Error::InvalidMessage(_)) if error.is_connect() => RegistryError::PlainHttp { action, registry },
            Some(_) => RegistryError::Tls { action, registry, reason },
            None if error.is_connect() => RegistryError::Connect { action, registry, reason },
            None => RegistryError::Interrupted { action, registry, reason },
        }
    }
}

/// The TLS error below, if it is one. I/O errors wrap it without naming it as their source.
fn tls_error(error: &reqwest::Error) -> Option<&rustls::Error> {
    let mut next = error.source();
    while let Some(current) = next {
        if let Some(tls) = current.downcast_ref() {
            return Some(tls);
        }
        let inner = current.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        next = match inner {
            Some(inner) => Some(inner),
            None => current.source(),
        };
    }
    None
}

/// The error and what it came from, each once.
fn chain(error: &dyn std::error::Error) -> String {
    let mut parts: Vec<String> = vec![];
    let mut next = Some(error);
    while let Some(current) = next {
        let text = current.to_string();
        if !parts.iter().any(|p| p.contains(&text)) {
            parts.push(text);
        }
        next = current.source();
    }
    printable(&parts.join(": "))
}

/// Waits for the head of the answer. The HTTP client's own time-outs would count a long upload as silence.
async fn watch(request: impl Future<Output = reqwest::Result<Response>>, call: &Call<'_>) -> Result<Response, Failure> {
    if let Payload::Once(_) = &call.payload {
        return request.await.map_err(Failure::Http);
    }
    let Payload::File { sent, length, .. } = &call.payload else {
        let limit = call.endpoint.timeouts.answer * if matches!(call.method, Method::GET | Method::HEAD) { 1 } else { 2 };
        return match tokio::time::timeout(limit, request).await {
            Ok(result) => result.map_err(Failure::Http),
            Err(_) => Err(Failure::Silence(limit)),
        };
    };
    let mut request = std::pin::pin!(request);
    let mut before = sent.load(Ordering::Relaxed);
    loop {
        // Registries that write to object storage have their own work after the last byte.
        let limit = if before < *length { call.endpoint.timeouts.stall } else { call.endpoint.timeouts.commit };
        tokio::select! {
            result = &mut request => return result.map_err(Failure::Http),
            () = tokio::time::sleep(limit) => {
                let now = sent.load(Ordering::Relaxed);
                if now == before {
                    return Err(Failure::Silence(limit));
                }
                before = now;
            }
        }
    }
}

fn open_body(payload: &Payload, action: &str) -> Result<reqwest::Body, RegistryError> {
    let Payload::File { path, offset, length, sent, report } = payload else { return Ok(Vec::new().into()) };
    let open = || {
        let mut file = std::fs::File::open(path)?;
        file.seek(io::SeekFrom::Start(*offset))?;
        Ok(file)
    };
    let file = open()
        .map_err(|source| RegistryError::store(action, crate::store::StoreError::Io { action: "read", path: path.clone(), source }))?;
    sent.store(0, Ordering::Relaxed);
    let counted = Counted { inner: tokio::fs::File::from_std(file).take(*length), sent: Arc::clone(sent), report: Arc::clone(report) };
    Ok(reqwest::Body::wrap_stream(ReaderStream::with_capacity(counted, UPLOAD_PIECE)))
}

/// Counts what is read from a file to be sent.
struct Counted {
    inner: tokio::io::Take<tokio::fs::File>,
    sent: Arc<AtomicU64>,
    report: Arc<dyn Fn(u64) + Send + Sync>,
}

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.inner).poll_read(cx, buf);
        let read = (buf.filled().len() - before) as u64;
        if read > 0 {
            let sent = self.sent.fetch_add(read, Ordering::Relaxed) + read;
            (self.report)(sent);
        }
        result
    }
}

/// A body of at most `limit` bytes.
pub(crate) async fn read_limited(response: Response, limit: u64, call: &Call<'_>, what: &str) -> Result<Vec<u8>, RegistryError> {
    let too_large = |size| RegistryError::TooLarge { what: what.into(), size, limit };
    if let Some(size) = response.content_length().filter(|size| *size > limit) {
        return Err(too_large(size));
    }
    let url = response.url().clone();
    let mut response = response;
    let mut bytes = vec![];
    while let Some(piece) = next_piece(&mut response, call.endpoint).await.map_err(|f| f.into_error(call.action, call.endpoint, &url))? {
        bytes.extend_from_slice(&piece);
        if bytes.len() as u64 > limit {
            return Err(too_large(bytes.len() as u64));
        }
    }
    Ok(bytes)
}

/// The next piece of a body, `None` at its end.
pub(crate) async fn next_piece(response: &mut Response, endpoint: &Endpoint) -> Result<Option<tokio_util::bytes::Bytes>, Failure> {
    match tokio::time::timeout(endpoint.timeouts.idle, response.chunk()).await {
        Ok(piece) => piece.map_err(Failure::Http),
        Err(_) => Err(Failure::Silence(endpoint.timeouts.idle)),
    }
}

/// What a server says about an error: code and message of the first error of the body, or its text.
pub(crate) async fn detail(mut response: Response, endpoint: &Endpoint) -> (String, Vec<String>) {
    let status = response.status();
    let html = response.headers().get("content-type").is_some_and(|t| t.as_bytes().starts_with(b"text/html"));
    let mut bytes = vec![];
    while let Ok(Some(piece)) = next_piece(&mut response, endpoint).await {
        bytes.extend_from_slice(&piece);
        if bytes.len() as u64 > MAX_ERROR_BODY {
            break;
        }
    }
    let document: serde_json::Value = serde_json::from_slice(&bytes).unwrap_or_default();
    let field = |error: &serde_json::Value, name: &str| error.get(name).and_then(|v| v.as_str()).unwrap_or_default().to_owned();
    let errors = document.get("errors").and_then(|e| e.as_array());
    let codes: Vec<String> = errors.into_iter().flatten().map(|e| field(e, "code")).collect();
    let text = match errors.and_then(|e| e.first()) {
        Some(first) => format!("{}: {}", field(first, "code"), field(first, "message")),
        None if html || document.is_object() => {
            let said = field(&document, "error_description") + &field(&document, "details") + &field(&document, "message");
            if said.is_empty() { status.to_string() } else { said }
        }
        None => String::from_utf8_lossy(&bytes).into_owned(),
    };
    let text = printable(&endpoint.strike(text.trim_matches([':', ' '])));
    (if text.is_empty() { status.to_string() } else { text }, codes)
}

/// The error for a status that is no success.
pub(crate) async fn failure(response: Response, call: &Call<'_>, reference: &str) -> RegistryError {
    let (action, registry) = (call.action.to_owned(), call.endpoint.registry.clone());
    let status = response.status();
    let retry_after = retry_after(response.headers());
    let (detail, codes) = detail(response, call.endpoint).await;
    match status.as_u16() {
        404 => RegistryError::NotFound { reference: reference.into() },
        401 => {
            let hint = super::error::login_hint(&registry);
            RegistryError::Unauthorized { action, registry, detail, hint }
        }
        403 if codes.iter().any(|c| c == "TOOMANYREQUESTS") => RegistryError::RateLimited { action, registry, detail, retry_after },
        403 => RegistryError::Denied { action, registry, detail },
        429 => RegistryError::RateLimited { action, registry, detail, retry_after },
        status @ 500.. => RegistryError::Server { action, registry, status, detail, retry_after },
        status => RegistryError::Protocol { action, registry, reason: format!("status {status}: {detail}") },
    }
}

/// Seconds, or a date that is compared with the server's own clock.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let then = jiff::fmt::rfc2822::parse(text).ok()?.timestamp();
    let now = jiff::fmt::rfc2822::parse(headers.get(DATE)?.to_str().ok()?).ok()?.timestamp();
    Some(Duration::from_secs(u64::try_from(then.as_second().saturating_sub(now.as_second())).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_that_are_enough() {
        let rows = [
            ("repository:a:pull", "repository:a:pull", true),
            ("repository:a:pull,push", "repository:a:pull", true),
            ("repository:a:pull,push", "repository:a:push,pull", true),
            ("repository:a:pull", "repository:a:pull,push", false),
            ("repository:a:pull", "repository:b:pull", false),
            ("repository:a:pull", "registry:catalog:*", false),
            ("odd", "odd", true),
        ];
        for (scope, wanted, expected) in rows {
            assert_eq!(covers(scope, wanted), expected, "{scope} {wanted}");
        }
    }

    #[test]
    fn pauses_that_servers_ask_for() {
        let date = "Fri, 20 Nov 2026 12:00:00 GMT";
        let rows = [
            (Some("7"), None, Some(7)),
            (Some(" 0 "), None, Some(0)),
            (Some("Fri, 20 Nov 2026 12:00:30 GMT"), Some(date), Some(30)),
            (Some("Fri, 20 Nov 2026 11:00:00 GMT"), Some(date), Some(0)),
            (Some("Fri, 20 Nov 2026 12:00:30 GMT"), None, None),
            (Some("soon"), Some(date), None),
            (Some("-1"), None, None),
            (None, Some(date), None),
        ];
        for (after, now, expected) in rows {
            let mut headers = HeaderMap::new();
            for (name, value) in [(RETRY_AFTER, after), (DATE, now)] {
                value.map(|v| headers.insert(name, HeaderValue::from_static(v)));
            }
            assert_eq!(retry_after(&headers), expected.map(Duration::from_secs), "{after:?}");
        }
    }

    #[tokio::test]
    async fn only_passing_errors_are_retried_and_not_for_ever() {
        let text = String::new;
        let busy = |s| {
            let retry_after = Some(Duration::from_secs(s));
            RegistryError::RateLimited { action: text(), registry: text(), detail: text(), retry_after }
        };
        let denied = RegistryError::Denied { action: text(), registry: text(), detail: text() };
        assert!(Backoff::new(5).pause(denied).await.is_err());
        assert!(Backoff::new(5).pause(busy(3600)).await.is_err());
        let mut backoff = Backoff::new(2);
        let start = tokio::time::Instant::now();
        assert!(backoff.pause(busy(1)).await.is_ok());
        assert!(start.elapsed() >= Duration::from_secs(1));
        assert!(backoff.pause(busy(0)).await.is_err());
        backoff.reset();
        assert!(backoff.pause(busy(0)).await.is_ok());
    }
}
