//! Credentials that a cloud gives to whoever runs in it or has its keys: tokens of hours, asked for when they are needed.
//!
//! The registry's host name says which cloud. A token goes to that cloud's hosts only. What was given is kept until it ends, or
//! until the registry refuses it; who asks meanwhile waits for the one exchange. The environment is read by others: options come in
//! as values, but for Amazon's, whose SDK reads its own variables and files.

mod azure;
#[cfg(feature = "aws")]
mod ecr;
mod exchange;
mod github;
mod google;
mod openshift;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{Found, KeychainError, KeychainOptions, Query, Source};
use exchange::Exchange;

pub use azure::AzureOptions;
pub use github::GithubOptions;
pub use google::GoogleOptions;
pub use openshift::{CA as OPENSHIFT_CA, HOSTS as OPENSHIFT_HOSTS, OpenshiftOptions};

/// Amazon ECR. What is not said here, the AWS SDK finds as it always does: variables, profiles, web identity, instance roles.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EcrOptions {
    /// Profile of `~/.aws/config`.
    pub profile: Option<String>,
    /// Region, where the host name does not have it.
    pub region: Option<String>,
    /// URL of the service, in place of Amazon's own.
    pub endpoint: Option<String>,
}

/// A host of Amazon ECR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EcrHost<'a> {
    /// None: the public registry.
    pub(super) account: Option<&'a str>,
    pub(super) region: &'a str,
}

/// The public registry of Amazon, and the only region that gives its tokens.
const ECR_PUBLIC: (&str, &str) = ("public.ecr.aws", "us-east-1");

impl<'a> EcrHost<'a> {
    /// `ACCOUNT.dkr.ecr[-fips].REGION.amazonaws.com[.cn]`, `ACCOUNT.dkr-ecr.REGION.on.aws`.
    pub(super) fn parse(host: &'a str) -> Option<Self> {
        if host == ECR_PUBLIC.0 {
            return Some(Self { account: None, region: ECR_PUBLIC.1 });
        }
        let (account, rest) = host.split_once('.')?;
        let rest = ["dkr.ecr.", "dkr.ecr-fips.", "dkr-ecr.", "dkr-ecr-fips."].iter().find_map(|prefix| rest.strip_prefix(prefix))?;
        let region = [".amazonaws.com", ".amazonaws.com.cn", ".on.aws", ".on.amazonwebservices.com.cn"]
            .iter()
            .find_map(|suffix| rest.strip_suffix(suffix))?;
        let plain = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        (account.len() == 12 && account.bytes().all(|b| b.is_ascii_digit()) && plain(region))
            .then_some(Self { account: Some(account), region })
    }
}

/// What clouds gave, by registry.
#[derive(Default)]
pub(super) struct Clouds {
    exchange: Exchange,
    kept: Mutex<HashMap<String, Slot>>,
}

/// An answer on its way.
type Asked<'a, T> = Pin<Box<dyn Future<Output = Result<T, KeychainError>> + Send + 'a>>;

/// Locked while the exchange goes on, so that parallel requests share it.
type Slot = Arc<tokio::sync::Mutex<Option<Kept>>>;

/// What a cloud said.
struct Kept {
    /// None: it knows nobody here.
    found: Option<Found>,
    asked: Instant,
}

/// So long a cloud that knows nobody is not asked again: machines that are none of a cloud's learn that by silence.
const NOBODY: Duration = Duration::from_mins(1);

impl fmt::Debug for Clouds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Clouds").finish_non_exhaustive()
    }
}

impl Clouds {
    /// By the registry's name; `None`: no cloud's, or the cloud knows nobody here.
    pub(super) async fn find(&self, options: &KeychainOptions, query: Query<'_>) -> Result<Option<Found>, KeychainError> {
        let host = query.registry;
        let source = if cfg!(feature = "aws") && EcrHost::parse(host).is_some() {
            Source::Ecr(options.ecr.clone())
        } else if google::is_host(host) {
            Source::Google(options.google.clone())
        } else if azure::is_host(host) {
            Source::Azure(options.azure.clone())
        } else if github::is_host(host) {
            Source::Github(options.github.clone())
        } else if openshift::is_host(host) {
            Source::Openshift(options.openshift.clone())
        } else {
            return Ok(None);
        };
        self.find_by(&source, query).await
    }

    /// By the source that the settings name.
    pub(super) async fn find_by(&self, source: &Source, query: Query<'_>) -> Result<Option<Found>, KeychainError> {
        match source {
            Source::Github(options) => return Ok(github::find(options)),
            // The file is replaced when its token is renewed.
            Source::Openshift(options) => return openshift::find(options),
            _ => {}
        }
        let slot = Arc::clone(self.kept.lock().unwrap_or_else(PoisonError::into_inner).entry(query.registry.into()).or_default());
        let mut kept = slot.lock().await;
        match kept.as_ref() {
            Some(Kept { found: Some(found), .. }) if !found.is_stale() && Some(&found.credential) != query.refused => {
                return Ok(Some(found.clone()));
            }
            Some(Kept { found: None, asked }) if asked.elapsed() < NOBODY => return Ok(None),
            _ => {}
        }
        // In a box: the SDK's futures are large, and every request to a registry would carry them.
        let asked: Asked<'_, Option<Found>> = match source {
            Source::Ecr(options) => ecr::find(options, query.registry),
            Source::Google(options) => Box::pin(google::find(options, &self.exchange)),
            Source::Azure(options) => Box::pin(azure::find(options, &self.exchange, query)),
            _ => return Ok(None),
        };
        let found = asked.await?;
        *kept = Some(Kept { found: found.clone(), asked: Instant::now() });
        Ok(found)
    }
}

/// See [`super::Keychain::create_repository`].
pub(super) async fn create_repository(options: &EcrOptions, registry: &str, repository: &str) -> Result<bool, KeychainError> {
    ecr::create_repository(options, registry, repository).await
}

/// Without the SDK.
#[cfg(not(feature = "aws"))]
mod ecr {
    use super::{Asked, EcrOptions, Found, KeychainError};

    pub(super) fn find<'a>(_: &'a EcrOptions, registry: &'a str) -> Asked<'a, Option<Found>> {
        Box::pin(async { Err(absent(registry)) })
    }

    pub(super) fn create_repository<'a>(_: &'a EcrOptions, registry: &'a str, _: &'a str) -> Asked<'a, bool> {
        Box::pin(async { Err(absent(registry)) })
    }

    fn absent(registry: &str) -> KeychainError {
        KeychainError::Unfit {
            registry: registry.into(),
            place: "Amazon ECR".into(),
            reason: "this program was built without it (the feature `aws`)".into(),
        }
    }
}
