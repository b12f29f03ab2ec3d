//! The REST API of a Prefect server: one exchange, and what went wrong in words.
//!
//! What authorises is in a header that goes to the server's own origin and nowhere else, and never in a message.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures_util::StreamExt as _;
use http::StatusCode;
use http::header::{AUTHORIZATION, CONNECTION, HeaderValue};
use ovenbird_oci::registry::web;
use reqwest::{Method, Url};
use serde_json::Value;

use super::{Authority, PrefectServer};
use crate::error::{Error, Kind};
use crate::worker::wire::shown;

/// Most bytes of an answer: a page of logs.
const MAX_ANSWER: usize = 64 << 20;

/// Most of an error's text that is shown.
const MAX_SHOWN: usize = 400;

/// How often something is asked, and the first pause between; each is twice the one before.
const ATTEMPTS: usize = 6;
const FIRST_PAUSE: Duration = Duration::from_millis(250);

/// How long one exchange may take.
const LIMIT: Duration = Duration::from_secs(30);

/// What can go wrong.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum ApiError {
    /// No answer.
    #[error("the Prefect server at {address} cannot be reached: {reason}")]
    Unreachable {
        /// Whose.
        address: String,
        /// Why.
        reason: String,
        /// There was somebody.
        connected: bool,
    },
    /// 401 or 403.
    #[error("the Prefect server at {address} refuses {who} ({status})")]
    Unauthorized {
        /// Whose.
        address: String,
        /// Who asked.
        who: &'static str,
        /// Code.
        status: StatusCode,
    },
    /// 404 of something that the server could have.
    #[error("the Prefect server at {address} has no {path}")]
    Missing {
        /// Whose.
        address: String,
        /// What.
        path: String,
    },
    /// It is something else.
    #[error("there is no Prefect server at {address}: {reason}")]
    Foreign {
        /// Whose.
        address: String,
        /// Why that is thought.
        reason: String,
    },
    /// Anything else that it said.
    #[error("the Prefect server at {address} refuses {path} ({status}): {detail}")]
    Refused {
        /// Whose.
        address: String,
        /// What was asked.
        path: String,
        /// Code.
        status: StatusCode,
        /// What it said.
        detail: String,
    },
    /// This end cannot ask.
    #[error("the Prefect server at {address} cannot be asked: {reason}")]
    Own {
        /// Whose.
        address: String,
        /// Why.
        reason: String,
    },
}

impl ApiError {
    /// Is nobody there?
    fn is_absence(&self) -> bool {
        matches!(self, Self::Unreachable { connected: false, .. })
    }

    /// Can the same be asked again with another outcome?
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } => true,
            Self::Refused { status, .. } => status.is_server_error() || *status == StatusCode::TOO_MANY_REQUESTS,
            _ => false,
        }
    }
}

impl From<ApiError> for Error {
    fn from(error: ApiError) -> Self {
        let kind = if matches!(error, ApiError::Own { .. }) { Kind::Configuration } else { Kind::Driver };
        let told = Self::from_chain(kind, &error);
        match error {
            ApiError::Unreachable { .. } => told.hint("is it running, and can this machine reach it? `prefect server start` starts one"),
            ApiError::Unauthorized { who: "a caller without a key", .. } => {
                told.hint("set PREFECT_API_KEY (or PREFECT_API_AUTH_STRING), or api_key_file in [prefect] of the settings")
            }
            ApiError::Unauthorized { .. } => {
                told.hint("a key goes only to the address that it was given with; `prefect cloud login` makes a new one")
            }
            ApiError::Foreign { .. } => told.hint("the address of the API ends with /api, as PREFECT_API_URL has it"),
            _ => told,
        }
    }
}

/// A connection to one server.
pub(super) struct Api {
    address: String,
    base: Url,
    client: reqwest::Client,
    authorization: Option<HeaderValue>,
    who: &'static str,
    /// What must be in no message.
    secret: Option<String>,
    runtime: tokio::runtime::Runtime,
}

impl Api {
    pub(super) fn new(server: &PrefectServer) -> Result<Self, ApiError> {
        let own = |error: &dyn std::fmt::Display| ApiError::Own { address: server.address.clone(), reason: error.to_string() };
        let base = Url::parse(&format!("{}/", server.address)).map_err(|error| own(&error))?;
        let origin = base.origin();
        let client = web::client_with(server.ca.as_deref(), move |url| url.origin() == origin).map_err(|error| own(&error))?;
        let (text, secret, who) = match &server.authority {
            None => (None, None, "a caller without a key"),
            Some(Authority::Key(key)) => (Some(format!("Bearer {}", key.expose())), Some(key.expose().to_owned()), "the API key"),
            Some(Authority::Basic(auth)) => {
                (Some(format!("Basic {}", STANDARD.encode(auth.expose()))), Some(auth.expose().to_owned()), "the user and password")
            }
        };
        let authorization = text.map(|text| {
            let mut value = HeaderValue::try_from(text)?;
            value.set_sensitive(true);
            Ok(value)
        });
        let authorization =
            authorization.transpose().map_err(|_: http::header::InvalidHeaderValue| own(&format!("{who} cannot stand in a header")))?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| own(&error))?;
        Ok(Self { address: server.address.clone(), base, client, authorization, who, secret, runtime })
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    pub(super) fn get(&self, path: &str) -> Result<Value, ApiError> {
        self.call(Method::GET, path, None)
    }

    pub(super) fn post(&self, path: &str, body: &Value) -> Result<Value, ApiError> {
        self.call(Method::POST, path, Some(body))
    }

    /// Asks until there is an answer that would not be another one the next time. Everything that is asked of the server can be asked twice: what
    /// is made is made under a name or a key.
    fn call(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value, ApiError> {
        let mut pause = FIRST_PAUSE;
        for _ in 1..ATTEMPTS {
            match self.attempt(&method, path, body) {
                // Its database is busy, or a connection broke; a server that is not there is known at once.
                Err(error) if error.is_transient() && !error.is_absence() => {}
                done => return done,
            }
            std::thread::sleep(pause);
            pause *= 2;
        }
        self.attempt(&method, path, body)
    }

    fn attempt(&self, method: &Method, path: &str, body: Option<&Value>) -> Result<Value, ApiError> {
        let url =
            self.base.join(path).map_err(|error| ApiError::Own { address: self.address.clone(), reason: format!("{path}: {error}") })?;
        let mut request = self.client.request(method.clone(), url).timeout(LIMIT);
        // Between two questions nobody looks after a connection that the server may close.
        request = request.header(CONNECTION, HeaderValue::from_static("close"));
        if let Some(value) = &self.authorization {
            request = request.header(AUTHORIZATION, value.clone());
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        self.runtime.block_on(async {
            let unreachable = |error: reqwest::Error| {
                // The whole chain: its own text stops at the first cause.
                let error = error.without_url();
                let mut reason = error.to_string();
                let mut next = std::error::Error::source(&error);
                while let Some(cause) = next {
                    reason = cause.to_string();
                    next = cause.source();
                }
                ApiError::Unreachable { address: self.address.clone(), reason: self.strike(&reason), connected: !error.is_connect() }
            };
            let response = request.send().await.map_err(unreachable)?;
            let status = response.status();
            let mut bytes = vec![];
            let mut body = response.bytes_stream();
            while let Some(piece) = body.next().await {
                bytes.extend_from_slice(&piece.map_err(unreachable)?);
                if bytes.len() > MAX_ANSWER {
                    let reason = format!("its answer to {path} is larger than {MAX_ANSWER} bytes");
                    return Err(ApiError::Foreign { address: self.address.clone(), reason });
                }
            }
            self.read(path, status, &bytes)
        })
    }

    fn read(&self, path: &str, status: StatusCode, bytes: &[u8]) -> Result<Value, ApiError> {
        let (address, path) = (self.address.clone(), path.to_owned());
        let json: Option<Value> = if bytes.is_empty() { Some(Value::Null) } else { serde_json::from_slice(bytes).ok() };
        if status == StatusCode::UNAUTHORIZED || status == StatusCode::FORBIDDEN {
            return Err(ApiError::Unauthorized { address, who: self.who, status });
        }
        let Some(json) = json else {
            return Err(ApiError::Foreign { address, reason: format!("what answers there ({status}) speaks no JSON") });
        };
        if status.is_success() {
            return Ok(json);
        }
        let detail = json.get("detail").or_else(|| json.get("exception_message")).unwrap_or(&json);
        let detail = detail.as_str().map_or_else(|| detail.to_string(), str::to_owned);
        if status == StatusCode::NOT_FOUND {
            // What its framework says of a path that leads nowhere.
            if detail == "Not Found" || !path.contains('/') {
                return Err(ApiError::Foreign { address, reason: format!("it knows no {path}") });
            }
            return Err(ApiError::Missing { address, path });
        }
        Err(ApiError::Refused { address, path, status, detail: shown(self.strike(&detail).as_bytes(), MAX_SHOWN) })
    }

    /// Foreign text without what was sent.
    fn strike(&self, text: &str) -> String {
        self.secret.as_ref().filter(|secret| !secret.is_empty()).map_or_else(|| text.to_owned(), |secret| text.replace(secret, "***"))
    }
}

/// A field that is a text; empty: it is none.
pub(super) fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// A name as a part of a path.
pub(super) fn escaped(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~');
    let mut out = String::new();
    for byte in name.bytes() {
        if plain(byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    // A path of dots would be another one.
    if out.bytes().all(|byte| byte == b'.') { out.replace('.', "%2E") } else { out }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ovenbird_oci::keychain::Secret;

    #[test]
    fn answers() {
        let server = PrefectServer {
            address: "http://h.test/api".into(),
            from: String::new(),
            authority: Some(Authority::Key(Secret::new("hunter2".to_owned()))),
            ca: None,
            pool: None,
            queue: None,
            image: None,
            sources: None,
        };
        let api = Api::new(&server).unwrap();
        for (status, body, expect) in [
            (200, "[]", "[]"),
            (204, "", "null"),
            (200, "<html>", "! there is no Prefect server at http://h.test/api: what answers there (200 OK) speaks no JSON"),
            (404, "{\"detail\":\"Not Found\"}", "! there is no Prefect server at http://h.test/api: it knows no a/b"),
            (404, "{\"detail\":\"Work pool \\\"x\\\" not found.\"}", "! the Prefect server at http://h.test/api has no a/b"),
            (401, "{}", "! the Prefect server at http://h.test/api refuses the API key (401 Unauthorized)"),
            (
                422,
                "{\"detail\":[{\"msg\":\"hunter2 \\u001b\"}]}",
                "! the Prefect server at http://h.test/api refuses a/b (422 Unprocessable Entity): [{\"msg\":\"*** ",
            ),
        ] {
            let got = match api.read("a/b", StatusCode::from_u16(status).unwrap(), body.as_bytes()) {
                Ok(value) => value.to_string(),
                Err(error) => format!("! {error}"),
            };
            assert!(got.starts_with(expect) && !got.contains("hunter2"), "{body}: {got}");
        }
        assert_eq!((escaped("a/b c").as_str(), escaped("..").as_str()), ("a%2Fb%20c", "%2E%2E"));
    }
}
