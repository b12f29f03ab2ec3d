//! Where a credential came from, in a form for people and for programs. It never has a secret.

use std::fmt;
use std::path::PathBuf;

/// Where a credential came from.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Origin {
    /// Given at `login`.
    Typed,
    /// Whoever asked for the build gave it.
    Custodian,
    /// Environment variables.
    Variables {
        /// Of the account.
        username: String,
        /// Of the password.
        password: String,
    },
    /// An account that the settings name, with its password in a file or a variable.
    Settings {
        /// Where the password is.
        place: String,
    },
    /// A docker configuration, podman's file or a Kubernetes secret.
    File {
        /// The file.
        path: PathBuf,
        /// The key of `auths` that matched.
        key: String,
    },
    /// A credential helper.
    Helper {
        /// `docker-credential-…`.
        program: String,
        /// The file that names it; none: the settings do.
        #[serde(skip_serializing_if = "Option::is_none")]
        path: Option<PathBuf>,
    },
    /// Amazon ECR, with what the AWS SDK found.
    Ecr {
        /// The registry's account; none for the public registry.
        #[serde(skip_serializing_if = "Option::is_none")]
        account: Option<String>,
        /// Region asked.
        region: String,
        /// Profile of the settings.
        #[serde(skip_serializing_if = "Option::is_none")]
        profile: Option<String>,
    },
    /// Google Artifact Registry or Container Registry.
    Google {
        /// `service account …`, `metadata server …`.
        identity: String,
    },
    /// Azure Container Registry.
    Azure {
        /// `client …`, `managed identity`.
        identity: String,
    },
    /// GitHub's registry.
    Github {
        /// The variable with the token.
        variable: String,
    },
    /// The registry inside an OpenShift cluster.
    Openshift {
        /// File with the service account's token.
        path: PathBuf,
    },
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Typed => f.write_str("what was typed"),
            Self::Custodian => f.write_str("who asked for the build"),
            Self::Variables { username, password } => write!(f, "the environment variables {username} and {password}"),
            Self::Settings { place } => write!(f, "the settings, password from {place}"),
            Self::File { path, key } => write!(f, "{}, key {key:?}", path.display()),
            Self::Helper { program, path: Some(path) } => write!(f, "{program}, named by {}", path.display()),
            Self::Helper { program, path: None } => write!(f, "{program}, named by the settings"),
            Self::Ecr { account, region, profile } => {
                match account {
                    Some(account) => write!(f, "Amazon ECR, account {account}, region {region}")?,
                    None => write!(f, "Amazon ECR Public, region {region}")?,
                }
                profile.iter().try_for_each(|profile| write!(f, ", profile {profile}"))
            }
            Self::Google { identity } => write!(f, "Google, {identity}"),
            Self::Azure { identity } => write!(f, "Azure, {identity}"),
            Self::Github { variable } => write!(f, "GitHub, the environment variable {variable}"),
            Self::Openshift { path } => write!(f, "the service account's token {}", path.display()),
        }
    }
}
