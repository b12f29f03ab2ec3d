//! Amazon ECR through the AWS SDK: its chain of credentials, one authorization token for a registry, repositories on request.
//! Source: Amazon ECR API reference (GetAuthorizationToken, CreateRepository), API version 2015-09-21.

use std::error::Error;
use std::time::{Duration, SystemTime};

use aws_config::imds::client::error::ImdsError;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_ecr::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_ecr::operation::create_repository::CreateRepositoryError;
use base64::Engine;

use super::super::{BASE64, Credential, Found, KeychainError, Origin, Secret};
use super::{Asked, EcrHost, EcrOptions};
use crate::registry::printable;

/// How long the service, and whoever knows the credentials, may take.
const TIMEOUT: Duration = Duration::from_secs(30);
const HINT: &str =
    "check AWS_PROFILE or the AWS_* variables, or the role of this machine (`aws sts get-caller-identity` shows who you are)";

/// What the service said, or why it said nothing.
fn said<E: ProvideErrorMetadata + Error + 'static, R: std::fmt::Debug + 'static>(error: &SdkError<E, R>) -> String {
    match (error.code(), error.message()) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        _ => reason(error),
    }
}

/// An error and its causes, each once. Never in the form for developers: that one has the whole answer in it, with its token.
fn reason(error: &dyn Error) -> String {
    let mut parts: Vec<String> = vec![];
    let mut next = Some(error);
    while let Some(current) = next {
        let text = current.to_string();
        if !parts.iter().any(|part| part.contains(&text)) {
            parts.push(text);
        }
        next = current.source();
    }
    parts.join(": ")
}

fn cloud(action: String, reason: &str) -> KeychainError {
    KeychainError::Cloud { service: "Amazon ECR", action, reason: printable(reason.trim_end_matches('.')), hint: HINT }
}

/// Account and region: from the host name, or from the settings for a registry of another name.
fn place<'a>(options: &'a EcrOptions, registry: &'a str) -> Result<(EcrHost<'a>, String), KeychainError> {
    let host = EcrHost::parse(registry);
    let region = options.region.as_deref().filter(|_| host.is_none_or(|host| host.account.is_some())).or(host.map(|host| host.region));
    let Some(region) = region else {
        return Err(KeychainError::Unfit {
            registry: registry.into(),
            place: "Amazon ECR".into(),
            reason: "its name has no region: say `region = …` with `source = \"ecr\"`".into(),
        });
    };
    Ok((host.unwrap_or(EcrHost { account: Some(""), region }), region.to_owned()))
}

/// Why the SDK has no credentials.
enum Absent {
    /// There are none.
    Nobody,
    /// There are none but those that the machine might have, and its metadata service did not give any. Machines of other clouds have
    /// such a service, too, which knows nothing of Amazon.
    Machine(KeychainError),
    /// There are some, and they cannot be used.
    Broken(KeychainError),
}

impl Absent {
    fn into_error(self, action: String) -> KeychainError {
        match self {
            Self::Nobody => cloud(action, "there are no AWS credentials"),
            Self::Machine(error) | Self::Broken(error) => error,
        }
    }
}

async fn sdk(options: &EcrOptions, region: &str) -> Result<SdkConfig, Absent> {
    use aws_sdk_ecr::config::ProvideCredentials as _;
    let patience = TimeoutConfig::builder().operation_timeout(TIMEOUT).build();
    let mut loader = aws_config::defaults(BehaviorVersion::latest()).region(Region::new(region.to_owned())).timeout_config(patience);
    if let Some(profile) = &options.profile {
        loader = loader.profile_name(profile);
    }
    let sdk = loader.load().await;
    let Some(provider) = sdk.credentials_provider() else { return Err(Absent::Nobody) };
    // Also what the chain itself starts and asks: a login service, a program.
    let Ok(provided) = tokio::time::timeout(TIMEOUT, provider.provide_credentials()).await else {
        let reason = format!("there was no answer in {} s", TIMEOUT.as_secs());
        return Err(Absent::Broken(cloud("find AWS credentials".into(), &reason)));
    };
    match provided {
        Ok(_) => Ok(sdk),
        Err(CredentialsError::CredentialsNotLoaded(_)) => Err(Absent::Nobody),
        Err(error) => {
            let told = cloud("find AWS credentials".into(), &reason(&error));
            let machine =
                std::iter::successors(error.source(), |e: &&(dyn Error + 'static)| (*e).source()).any(<dyn Error>::is::<ImdsError>);
            Err(if machine { Absent::Machine(told) } else { Absent::Broken(told) })
        }
    }
}

/// An authorization token for the registry.
pub(super) fn find<'a>(options: &'a EcrOptions, registry: &'a str) -> Asked<'a, Option<Found>> {
    Box::pin(token(options, registry))
}

/// Makes the repository; false: it was there.
pub(super) fn create_repository<'a>(options: &'a EcrOptions, registry: &'a str, repository: &'a str) -> Asked<'a, bool> {
    Box::pin(create(options, registry, repository))
}

async fn token(options: &EcrOptions, registry: &str) -> Result<Option<Found>, KeychainError> {
    let (host, region) = place(options, registry)?;
    let action = || format!("get an authorization token in {region}");
    let sdk = match sdk(options, &region).await {
        Ok(sdk) => sdk,
        // Amazon's public registry serves strangers, the others never do.
        Err(Absent::Nobody | Absent::Machine(_)) if host.account.is_none() => return Ok(None),
        Err(absent) => return Err(absent.into_error(action())),
    };
    let (token, expires) = if host.account.is_none() {
        let mut config = aws_sdk_ecrpublic::config::Builder::from(&sdk);
        config.set_endpoint_url(options.endpoint.clone().or_else(|| sdk.endpoint_url().map(Into::into)));
        let answer = aws_sdk_ecrpublic::Client::from_conf(config.build()).get_authorization_token().send().await;
        let data = answer.map_err(|e| cloud(action(), &said(&e)))?.authorization_data;
        data.map(|d| (d.authorization_token, d.expires_at)).unwrap_or_default()
    } else {
        let answer = client(options, &sdk).get_authorization_token().send().await;
        let data = answer.map_err(|e| cloud(action(), &said(&e)))?.authorization_data;
        data.and_then(|list| list.into_iter().next()).map(|d| (d.authorization_token, d.expires_at)).unwrap_or_default()
    };
    let decoded = token.and_then(|token| String::from_utf8(BASE64.decode(token).ok()?).ok());
    let Some((username, password)) = decoded.as_deref().and_then(|text| text.split_once(':')) else {
        return Err(cloud(action(), "its answer has no token of the form name:password"));
    };
    let credential = Credential::Password { username: username.into(), password: Secret::new(password) };
    let origin = Origin::Ecr { account: host.account.map(Into::into), region, profile: options.profile.clone() };
    let until = expires.and_then(|time| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(u64::try_from(time.secs()).ok()?)));
    Ok(Some(Found::new(credential, origin).until(until)))
}

async fn create(options: &EcrOptions, registry: &str, repository: &str) -> Result<bool, KeychainError> {
    let (host, region) = place(options, registry)?;
    if host.account.is_none() {
        return Err(KeychainError::Unfit {
            registry: registry.into(),
            place: "Amazon ECR".into(),
            reason: "`create_repository` is for private registries".into(),
        });
    }
    let action = || format!("make the repository {repository} in {region}");
    let sdk = sdk(options, &region).await.map_err(|absent| absent.into_error(action()))?;
    let account = host.account.filter(|account| !account.is_empty()).map(str::to_owned);
    match client(options, &sdk).create_repository().repository_name(repository).set_registry_id(account).send().await {
        Ok(_) => Ok(true),
        Err(error) if error.as_service_error().is_some_and(CreateRepositoryError::is_repository_already_exists_exception) => Ok(false),
        Err(error) => Err(cloud(action(), &said(&error))),
    }
}

fn client(options: &EcrOptions, sdk: &SdkConfig) -> aws_sdk_ecr::Client {
    let mut config = aws_sdk_ecr::config::Builder::from(sdk);
    if let Some(endpoint) = &options.endpoint {
        config.set_endpoint_url(Some(endpoint.clone()));
    }
    aws_sdk_ecr::Client::from_conf(config.build())
}
