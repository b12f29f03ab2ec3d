//! Where credentials may be, as the environment says it.

use std::path::{Path, PathBuf};

use ovenbird_oci::keychain::{AzureOptions, GithubOptions, GoogleOptions, KeychainOptions, Secret};

use super::environment::Environment;
use crate::docker_engine::DockerSettings;

/// Everything but what settings files say.
pub(super) fn from_environment(environment: &Environment) -> KeychainOptions {
    let get = |name: &str| environment.get(name).filter(|value| !value.is_empty());
    let text = |name: &str| get(name).map(str::to_owned);
    let path = |name: &str| get(name).map(|value| environment.absolute(Path::new(value)));
    let gcloud = path("CLOUDSDK_CONFIG").or_else(|| environment.config_home().map(|dir| dir.join("gcloud")));
    let podman = environment.config_home().map(|dir| dir.join("containers/auth.json"));
    KeychainOptions {
        document: get("DOCKER_AUTH_CONFIG").map(|text| ("DOCKER_AUTH_CONFIG".to_owned(), Secret::new(text))),
        // Podman's second place, where it keeps what outlives a session.
        auth_files: podman.into_iter().filter(|_| get("REGISTRY_AUTH_FILE").is_none()).collect(),
        variables: environment.iter().collect(),
        google: GoogleOptions {
            key_file: path("GOOGLE_APPLICATION_CREDENTIALS"),
            well_known_file: gcloud.map(|dir| dir.join("application_default_credentials.json")),
            token_endpoint: None,
            metadata_host: text("GCE_METADATA_HOST"),
        },
        azure: AzureOptions {
            tenant: text("AZURE_TENANT_ID"),
            client_id: text("AZURE_CLIENT_ID"),
            client_secret: get("AZURE_CLIENT_SECRET").map(Secret::new),
            client_secret_file: None,
            federated_token_file: path("AZURE_FEDERATED_TOKEN_FILE"),
            authority: text("AZURE_AUTHORITY_HOST"),
            metadata_endpoint: text("AZURE_POD_IDENTITY_AUTHORITY_HOST"),
        },
        github: GithubOptions {
            token: ["GITHUB_TOKEN", "GH_TOKEN"].into_iter().find_map(|name| Some((name.to_owned(), Secret::new(get(name)?)))),
            actor: text("GITHUB_ACTOR"),
        },
        ..KeychainOptions::default()
    }
}

/// Folder of docker's `config.json`.
pub(super) fn docker_config(environment: &Environment) -> Option<PathBuf> {
    environment.get("DOCKER_CONFIG").map(PathBuf::from).or_else(|| environment.home().map(|home| home.join(".docker")))
}

/// Which Docker Engine is meant, as Docker's own client reads it.
pub(super) fn docker(environment: &Environment) -> DockerSettings {
    let get = |name: &str| environment.get(name).filter(|value| !value.is_empty());
    DockerSettings {
        host: get("DOCKER_HOST").map(Into::into),
        context: get("DOCKER_CONTEXT").map(Into::into),
        tls_verify: get("DOCKER_TLS_VERIFY").is_some(),
        tls: get("DOCKER_TLS").is_some(),
        certificates: get("DOCKER_CERT_PATH").map(|dir| environment.absolute(Path::new(dir))),
        config: docker_config(environment),
        buildkit: get("DOCKER_BUILDKIT").map(|value| !matches!(value, "0" | "false" | "f" | "F" | "FALSE" | "False")),
    }
}

/// Podman's `auth.json` of this session.
pub(super) fn auth_file(environment: &Environment) -> Option<PathBuf> {
    environment
        .get("REGISTRY_AUTH_FILE")
        .map(PathBuf::from)
        .or_else(|| environment.get("XDG_RUNTIME_DIR").map(|dir| Path::new(dir).join("containers/auth.json")))
}
