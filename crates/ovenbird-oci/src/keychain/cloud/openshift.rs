//! OpenShift's internal registry: the token that a pod's service account has is the password.
//! Source: OpenShift's "Accessing the registry".

use std::path::PathBuf;

use super::super::{Credential, Found, KeychainError, Origin, read_secret};

/// Names under which pods see the registry.
pub const HOSTS: [&str; 4] = [
    "image-registry.openshift-image-registry.svc:5000",
    "image-registry.openshift-image-registry.svc.cluster.local:5000",
    "docker-registry.default.svc:5000",
    "docker-registry.default.svc.cluster.local:5000",
];

/// Where a pod has the token of its service account.
const TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";
/// Where a pod has the authority that signs the certificates of services.
pub const CA: &str = "/var/run/secrets/kubernetes.io/serviceaccount/service-ca.crt";

/// OpenShift.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OpenshiftOptions {
    /// File with the token, in place of the usual one; it must be there.
    pub token_file: Option<PathBuf>,
}

pub(super) fn is_host(registry: &str) -> bool {
    HOSTS.contains(&registry)
}

/// `None`: this is no pod. Read anew each time: the token is renewed in its place.
pub(super) fn find(options: &OpenshiftOptions) -> Result<Option<Found>, KeychainError> {
    let usual = PathBuf::from(TOKEN);
    let path = match &options.token_file {
        Some(path) => path.clone(),
        None if usual.exists() => usual,
        None => return Ok(None),
    };
    let password = read_secret(&path)?;
    let credential = Credential::Password { username: "serviceaccount".into(), password };
    Ok(Some(Found::new(credential, Origin::Openshift { path })))
}
