//! One request to a token service: JSON back, or the reason in words, without any secret.

use std::time::Duration;

use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde_json::Value;

use super::super::Secret;
use crate::registry::printable;

/// Largest answer, in bytes.
const MAX_ANSWER: usize = 1 << 20;
/// How long a token service may take.
const TIMEOUT: Duration = Duration::from_secs(30);
/// How long it takes at most to learn that this is no machine of the cloud.
const METADATA_CONNECT: Duration = Duration::from_secs(1);

/// HTTP clients, made on first use.
#[derive(Default)]
pub(super) struct Exchange {
    service: tokio::sync::OnceCell<reqwest::Client>,
    metadata: tokio::sync::OnceCell<reqwest::Client>,
}

/// Why there is no answer, or none that helps; in words, without any secret.
pub(super) struct Refusal(pub(super) String);

impl Exchange {
    /// Posts a form to a token service. `secrets` are struck out of what it says.
    pub(super) async fn post(&self, url: &str, form: &[(&str, &str)], secrets: &[&Secret]) -> Result<Value, Refusal> {
        let url = service_url(url).map_err(Refusal)?;
        let client = self.service.get_or_try_init(|| async { client(false) }).await.map_err(Refusal)?;
        let mut body = url.clone();
        body.query_pairs_mut().clear().extend_pairs(form);
        let body = body.query().unwrap_or_default().to_owned();
        let request = client.post(url).header("content-type", "application/x-www-form-urlencoded").body(body);
        answer(request, secrets).await.map(|(_, value)| value)
    }

    /// Asks the metadata service of the machine: plain HTTP, past every proxy.
    pub(super) async fn metadata(&self, url: &str, header: (&'static str, &'static str)) -> Result<(HeaderMap, Value), Refusal> {
        let client = self.metadata.get_or_try_init(|| async { client(true) }).await.map_err(Refusal)?;
        let url = Url::parse(url).map_err(|e| Refusal(format!("{url:?} is no URL ({e})")))?;
        let header = (HeaderName::from_static(header.0), HeaderValue::from_static(header.1));
        answer(client.get(url).header(header.0, header.1), &[]).await
    }
}

/// Secrets go over HTTPS, or stay on this machine.
fn service_url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).map_err(|e| format!("{text:?} is no URL ({e})"))?;
    let safe = url.scheme() == "https" || (url.scheme() == "http" && crate::registry::is_loopback_url(&url));
    if safe && url.has_host() { Ok(url) } else { Err(format!("{text:?} is not reached over HTTPS")) }
}

fn client(metadata: bool) -> Result<reqwest::Client, String> {
    let tls = crate::registry::tls_config(!metadata, None, None, "credentials").map_err(|e| e.to_string())?;
    let mut builder = reqwest::Client::builder()
        .user_agent(concat!("ovenbird/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .timeout(TIMEOUT)
        .connect_timeout(if metadata { METADATA_CONNECT } else { TIMEOUT })
        .tls_backend_preconfigured(tls);
    if metadata {
        builder = builder.no_proxy();
    }
    builder.build().map_err(|e| e.to_string())
}

async fn answer(request: reqwest::RequestBuilder, secrets: &[&Secret]) -> Result<(HeaderMap, Value), Refusal> {
    let clean = |text: &str| {
        let struck = secrets.iter().filter(|s| !s.expose().is_empty()).fold(text.to_owned(), |text, s| text.replace(s.expose(), "***"));
        printable(&struck)
    };
    let broken = |e: reqwest::Error| {
        let mut reason = e.to_string();
        let mut next = std::error::Error::source(&e);
        while let Some(cause) = next {
            reason = format!("{reason}: {cause}");
            next = cause.source();
        }
        Refusal(clean(&reason))
    };
    let mut response = request.send().await.map_err(broken)?;
    let (status, headers) = (response.status(), response.headers().clone());
    let mut bytes = vec![];
    while let Some(piece) = response.chunk().await.map_err(broken)? {
        bytes.extend_from_slice(&piece);
        if bytes.len() > MAX_ANSWER {
            return Err(Refusal("its answer is too long".into()));
        }
    }
    // The parser's own message could quote a token.
    let value: Value = serde_json::from_slice(&bytes).unwrap_or_default();
    if status.is_success() && value.is_object() {
        return Ok((headers, value));
    }
    let field = |name: &str| value.get(name).and_then(Value::as_str);
    let said = field("error_description")
        .or_else(|| field("error"))
        .or_else(|| value.pointer("/errors/0/message").and_then(Value::as_str))
        .or_else(|| field("message"))
        .unwrap_or_default();
    Err(Refusal(if status.is_success() { "its answer is no JSON object".into() } else { clean(&format!("{status}: {said}")) }))
}

/// A field with a token.
pub(super) fn token(value: &Value, name: &str) -> Result<Secret, Refusal> {
    let text = value.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
    text.map(Secret::new).ok_or_else(|| Refusal(format!("its answer has no {name}")))
}

/// Seconds: a number, or one in a string, as some services write it.
pub(super) fn seconds(value: &Value, name: &str) -> Option<u64> {
    let value = value.get(name)?;
    value.as_u64().or_else(|| value.as_str()?.parse().ok())
}
