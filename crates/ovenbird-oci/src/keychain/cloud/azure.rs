//! Azure Container Registry: a token of the directory is exchanged at the registry for a refresh token, which then is the credential.
//!
//! The directory's token is for a client with a secret, for one with a federated token (workload identity), or for the machine's
//! managed identity.
//! Sources: Microsoft's "Azure Container Registry authentication" (AAD-OAuth.md of Azure/acr), "OAuth 2.0 client credentials flow",
//! "workload identity federation" and "managed identities: acquire a token".

use std::path::PathBuf;
use std::time::{Duration, UNIX_EPOCH};

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use serde_json::Value;

use super::super::{Credential, Found, KeychainError, Origin, Query, Secret, read_secret};
use super::exchange::{Exchange, token};

const LOGIN: &str = "https://login.microsoftonline.com";
const RESOURCE: &str = "https://containerregistry.azure.net";
const METADATA: &str = "http://169.254.169.254";
const HINT: &str = "set AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET or AZURE_FEDERATED_TOKEN_FILE, or give the machine an identity with AcrPull or AcrPush";

/// Azure.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AzureOptions {
    /// Directory.
    pub tenant: Option<String>,
    /// Application, or which of the machine's identities.
    pub client_id: Option<String>,
    /// Its secret.
    pub client_secret: Option<Secret>,
    /// File with its secret.
    pub client_secret_file: Option<PathBuf>,
    /// File with a token of another issuer for it, read anew each time.
    pub federated_token_file: Option<PathBuf>,
    /// Login service.
    pub authority: Option<String>,
    /// URL of the machine's metadata service.
    pub metadata_endpoint: Option<String>,
}

pub(super) fn is_host(registry: &str) -> bool {
    let name = [".azurecr.io", ".azurecr.cn", ".azurecr.us"].iter().find_map(|suffix| registry.strip_suffix(suffix));
    name.is_some_and(|name| !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.".contains(&b)))
}

fn cloud(action: &str, reason: String) -> KeychainError {
    KeychainError::Cloud { service: "Azure", action: action.into(), reason, hint: HINT }
}

/// `None`: nobody is named, and this machine has no identity.
pub(super) async fn find(options: &AzureOptions, exchange: &Exchange, query: Query<'_>) -> Result<Option<Found>, KeychainError> {
    let Some((directory, identity)) = directory_token(options, exchange).await? else { return Ok(None) };
    let address = query.address.map_or_else(|| format!("https://{}", query.registry), Into::into);
    let url = format!("{}/oauth2/exchange", address.trim_end_matches('/'));
    let mut form = vec![("grant_type", "access_token"), ("service", query.registry), ("access_token", directory.expose())];
    form.extend(options.tenant.as_deref().map(|tenant| ("tenant", tenant)));
    let exchanged = exchange.post(&url, &form, &[&directory]).await.and_then(|value| token(&value, "refresh_token"));
    let refresh = exchanged.map_err(|e| cloud(&format!("exchange a token at {}", query.registry), e.0))?;
    let until = expiry(&refresh).and_then(|seconds| UNIX_EPOCH.checked_add(Duration::from_secs(seconds)));
    Ok(Some(Found::new(Credential::IdentityToken(refresh), Origin::Azure { identity }).until(until)))
}

async fn directory_token(options: &AzureOptions, exchange: &Exchange) -> Result<Option<(Secret, String)>, KeychainError> {
    let (Some(tenant), Some(client)) = (&options.tenant, &options.client_id) else { return managed(options, exchange).await };
    let secret = match (&options.client_secret, &options.client_secret_file) {
        (Some(secret), _) => Some(secret.clone()),
        (None, Some(path)) => Some(read_secret(path)?),
        (None, None) => None,
    };
    let scope = format!("{RESOURCE}/.default");
    let mut form = vec![("grant_type", "client_credentials"), ("client_id", client.as_str()), ("scope", scope.as_str())];
    let (proof, how) = match (secret, &options.federated_token_file) {
        (Some(secret), _) => (secret, "with its secret"),
        (None, Some(path)) => (read_secret(path)?, "with a federated token"),
        (None, None) => return managed(options, exchange).await,
    };
    if how == "with its secret" {
        form.push(("client_secret", proof.expose()));
    } else {
        form.push(("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"));
        form.push(("client_assertion", proof.expose()));
    }
    let authority = options.authority.as_deref().unwrap_or(LOGIN).trim_end_matches('/');
    let answer = exchange.post(&format!("{authority}/{tenant}/oauth2/v2.0/token"), &form, &[&proof]).await;
    let given = answer.and_then(|value| token(&value, "access_token"));
    let given = given.map_err(|e| cloud(&format!("log in as client {client} {how}"), e.0))?;
    Ok(Some((given, format!("client {client} {how}"))))
}

/// The identity that Azure gave to this machine.
async fn managed(options: &AzureOptions, exchange: &Exchange) -> Result<Option<(Secret, String)>, KeychainError> {
    let base = options.metadata_endpoint.as_deref().unwrap_or(METADATA).trim_end_matches('/');
    let mut url = format!("{base}/metadata/identity/oauth2/token?api-version=2018-02-01&resource={RESOURCE}/");
    let mut identity = "managed identity".to_owned();
    if let Some(client) = &options.client_id {
        url = format!("{url}&client_id={client}");
        identity = format!("managed identity {client}");
    }
    match exchange.metadata(&url, ("metadata", "true")).await.and_then(|(_, value)| token(&value, "access_token")) {
        Ok(given) => Ok(Some((given, identity))),
        // A machine of another cloud, or one without an identity: images for all can still be had.
        Err(_) if options.metadata_endpoint.is_none() && options.client_id.is_none() => Ok(None),
        Err(refusal) => Err(cloud("ask for the managed identity", refusal.0)),
    }
}

/// `exp` of a JSON web token. It is not verified: it only says when to ask again.
fn expiry(token: &Secret) -> Option<u64> {
    let claims = BASE64_URL_SAFE_NO_PAD.decode(token.expose().split('.').nth(1)?.trim_end_matches('=')).ok()?;
    serde_json::from_slice::<Value>(&claims).ok()?.get("exp")?.as_u64()
}
