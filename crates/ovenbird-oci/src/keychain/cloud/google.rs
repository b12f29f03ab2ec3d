//! Google Artifact Registry and Container Registry: an access token as the password of `oauth2accesstoken`.
//!
//! From a service account's key (a signed assertion for a token), from what `gcloud auth application-default login` left, or from the
//! metadata server of the machine.
//! Sources: Google's "Using OAuth 2.0 for Server to Server Applications", "Authenticate to Artifact Registry" and "VM metadata"; RFC 7523.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{RSA_PKCS1_SHA256, RsaKeyPair};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::pki_types::pem::PemObject;
use serde_json::Value;

use super::super::{Credential, Found, KeychainError, Origin, Secret, read_text};
use super::exchange::{Exchange, seconds, token};

/// The user that says that the password is an access token.
const USER: &str = "oauth2accesstoken";
const SCOPE: &str = "https://www.googleapis.com/auth/cloud-platform";
const TOKEN_SERVICE: &str = "https://oauth2.googleapis.com/token";
const METADATA_HOST: &str = "metadata.google.internal";
const HINT: &str = "name a service account's key in GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`";

/// Google.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GoogleOptions {
    /// Key of a service account, or the file of `gcloud auth application-default login`. It must be there.
    pub key_file: Option<PathBuf>,
    /// Where gcloud leaves such a file; it may be missing.
    pub well_known_file: Option<PathBuf>,
    /// Token service, in place of the key file's own.
    pub token_endpoint: Option<String>,
    /// `host[:port]` of the metadata server.
    pub metadata_host: Option<String>,
}

pub(super) fn is_host(registry: &str) -> bool {
    registry == "gcr.io" || registry.ends_with(".gcr.io") || registry.ends_with(".pkg.dev")
}

fn cloud(action: &str, reason: String) -> KeychainError {
    KeychainError::Cloud { service: "Google", action: action.into(), reason, hint: HINT }
}

/// `None`: there is no key, and this machine is none of Google's.
pub(super) async fn find(options: &GoogleOptions, exchange: &Exchange) -> Result<Option<Found>, KeychainError> {
    let well_known = options.well_known_file.as_ref().filter(|path| path.exists());
    let (value, identity) = match options.key_file.as_ref().or(well_known) {
        Some(path) => from_key(path, options, exchange).await?,
        None => match from_metadata(options, exchange).await? {
            Some(given) => given,
            None => return Ok(None),
        },
    };
    let password = token(&value, "access_token").map_err(|e| cloud("get an access token", e.0))?;
    let until = seconds(&value, "expires_in").and_then(|s| SystemTime::now().checked_add(Duration::from_secs(s)));
    let credential = Credential::Password { username: USER.into(), password };
    Ok(Some(Found::new(credential, Origin::Google { identity }).until(until)))
}

async fn from_key(path: &Path, options: &GoogleOptions, exchange: &Exchange) -> Result<(Value, String), KeychainError> {
    let unusable = |reason: String| KeychainError::Unusable { path: path.into(), expected: "a key file of Google", reason };
    let text = read_text(path)?;
    let key: Value = serde_json::from_str(&text).map_err(|e| unusable(format!("no JSON at line {}", e.line())))?;
    let field = |name: &str| key.get(name).and_then(Value::as_str).ok_or_else(|| unusable(format!("it has no {name:?}")));
    let (answer, identity) = match field("type")? {
        "service_account" => {
            let email = field("client_email")?;
            let service = options.token_endpoint.as_deref().or(key.get("token_uri").and_then(Value::as_str)).unwrap_or(TOKEN_SERVICE);
            let private = Secret::new(field("private_key")?);
            let key_id = key.get("private_key_id").and_then(Value::as_str);
            let assertion = assertion(email, key_id, service, &private).map_err(unusable)?;
            let form = [("grant_type", "urn:ietf:params:oauth:grant-type:jwt-bearer"), ("assertion", assertion.expose())];
            let answer = exchange.post(service, &form, &[&assertion, &private]).await;
            (answer, format!("service account {email}, key {}", path.display()))
        }
        "authorized_user" => {
            let service = options.token_endpoint.as_deref().unwrap_or(TOKEN_SERVICE);
            let (secret, refresh) = (Secret::new(field("client_secret")?), Secret::new(field("refresh_token")?));
            let form = [
                ("grant_type", "refresh_token"),
                ("client_id", field("client_id")?),
                ("client_secret", secret.expose()),
                ("refresh_token", refresh.expose()),
            ];
            (exchange.post(service, &form, &[&secret, &refresh]).await, format!("the user of {}", path.display()))
        }
        other => {
            return Err(unusable(format!("keys of type {other:?} are not supported; use one of `service_account` or `authorized_user`")));
        }
    };
    match answer {
        Ok(value) => Ok((value, identity)),
        Err(refusal) => Err(cloud(&format!("exchange {} for a token", path.display()), refusal.0)),
    }
}

/// A statement of who we are, signed with the account's key.
fn assertion(email: &str, key_id: Option<&str>, audience: &str, private: &Secret) -> Result<Secret, String> {
    let der =
        PrivatePkcs8KeyDer::from_pem_slice(private.expose().as_bytes()).map_err(|_| "its private_key is no PKCS #8 PEM".to_owned())?;
    let pair = RsaKeyPair::from_pkcs8(der.secret_pkcs8_der()).map_err(|_| "its private_key is no RSA key".to_owned())?;
    let mut header = serde_json::json!({ "alg": "RS256", "typ": "JWT" });
    if let Some(id) = key_id {
        header["kid"] = id.into();
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let claims = serde_json::json!({ "iss": email, "scope": SCOPE, "aud": audience, "iat": now, "exp": now + 3600 });
    let said = format!("{}.{}", BASE64_URL_SAFE_NO_PAD.encode(header.to_string()), BASE64_URL_SAFE_NO_PAD.encode(claims.to_string()));
    let mut signature = vec![0; pair.public_modulus_len()];
    pair.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), said.as_bytes(), &mut signature).map_err(|_| "its key cannot sign".to_owned())?;
    Ok(Secret::new(format!("{said}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))))
}

async fn from_metadata(options: &GoogleOptions, exchange: &Exchange) -> Result<Option<(Value, String)>, KeychainError> {
    let host = options.metadata_host.as_deref().unwrap_or(METADATA_HOST);
    let url = format!("http://{host}/computeMetadata/v1/instance/service-accounts/default/token");
    match exchange.metadata(&url, ("metadata-flavor", "Google")).await {
        // Whoever else answers there is no metadata server.
        Ok((headers, _)) if headers.get("metadata-flavor").is_none_or(|flavor| flavor != "Google") => Ok(None),
        Ok((_, value)) => Ok(Some((value, format!("metadata server {host}")))),
        // A machine of another cloud, or one without an account: images for all can still be had.
        Err(_) if options.metadata_host.is_none() => Ok(None),
        Err(refusal) => Err(cloud(&format!("ask the metadata server {host}"), refusal.0)),
    }
}
