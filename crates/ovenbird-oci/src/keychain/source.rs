//! Which places are searched for credentials. Values only: whoever knows the environment and the settings fills them in.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use super::cloud::{AzureOptions, EcrOptions, GithubOptions, GoogleOptions, OpenshiftOptions};
use super::{Credential, Secret};

/// The one place that the settings name for a registry. It is the only one that is asked then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Nobody logs in.
    Anonymous,
    /// A file in Docker's, podman's or Kubernetes' form, or a folder with one.
    File(PathBuf),
    /// `docker-credential-NAME`.
    Helper(String),
    /// An account whose password is the first line of a file, read anew each time.
    PasswordFile {
        /// Account.
        username: String,
        /// File.
        path: PathBuf,
    },
    /// An account whose password is in a variable.
    PasswordVariable {
        /// Account.
        username: String,
        /// Name of the variable.
        variable: String,
        /// Its value, if it is set.
        password: Option<Secret>,
    },
    /// Variables that are named after the registry.
    Variables,
    /// Docker's and podman's files.
    Files,
    /// Amazon ECR.
    Ecr(EcrOptions),
    /// Google Artifact Registry.
    Google(GoogleOptions),
    /// Azure Container Registry.
    Azure(AzureOptions),
    /// GitHub's registry.
    Github(GithubOptions),
    /// OpenShift's internal registry.
    Openshift(OpenshiftOptions),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Anonymous => f.write_str("nowhere (anonymous)"),
            Self::File(path) | Self::PasswordFile { path, .. } => write!(f, "{}", path.display()),
            Self::Helper(name) => write!(f, "docker-credential-{name}"),
            Self::PasswordVariable { variable, .. } => write!(f, "the environment variable {variable}"),
            Self::Variables => f.write_str("environment variables"),
            Self::Files => f.write_str("docker's and podman's files"),
            Self::Ecr(_) => f.write_str("Amazon ECR"),
            Self::Google(_) => f.write_str("Google"),
            Self::Azure(_) => f.write_str("Azure"),
            Self::Github(_) => f.write_str("GitHub"),
            Self::Openshift(_) => f.write_str("OpenShift"),
        }
    }
}

/// Everything that a [`super::Keychain`] searches.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KeychainOptions {
    /// A docker configuration that stands in a variable, and the name of that.
    pub document: Option<(String, Secret)>,
    /// Folder of docker's `config.json` (`DOCKER_CONFIG` or `~/.docker`), or of a mounted `.dockerconfigjson` or `.dockercfg`.
    pub docker_config: Option<PathBuf>,
    /// Podman's `auth.json`.
    pub auth_file: Option<PathBuf>,
    /// More files of these forms, or folders with one, searched after those: mounted pull secrets.
    pub auth_files: Vec<PathBuf>,
    /// Variables that may hold accounts and passwords.
    pub variables: Variables,
    /// The one source of a registry, by registry name.
    pub sources: BTreeMap<String, Source>,
    /// Registries that the user's settings name.
    pub named: BTreeSet<String>,
    /// Amazon ECR.
    pub ecr: EcrOptions,
    /// Google.
    pub google: GoogleOptions,
    /// Azure.
    pub azure: AzureOptions,
    /// GitHub.
    pub github: GithubOptions,
    /// OpenShift.
    pub openshift: OpenshiftOptions,
    /// Somebody else who is asked instead of all these.
    pub custodian: Option<Custodian>,
}

/// What a [`Custodian`] is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Question {
    /// [`super::Keychain::find`].
    Find {
        /// Registry name.
        registry: String,
        /// Repository.
        repository: String,
        /// Where the registry is reached.
        address: Option<String>,
        /// What the registry does not take any more.
        refused: Option<Credential>,
    },
    /// [`super::Keychain::recorded`].
    Recorded {
        /// Registry name.
        registry: String,
        /// Repository.
        repository: String,
    },
    /// [`super::Keychain::create_repository`].
    Create {
        /// Registry name.
        registry: String,
        /// Repository.
        repository: String,
    },
}

/// What a [`Custodian`] says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// A credential, and when it ends.
    Credential(Credential, Option<SystemTime>),
    /// There is none.
    Nothing,
    /// Whether a repository was made.
    Created(bool),
}

/// Keeps the credentials of a program that has none itself: the caller of a worker.
#[derive(Clone)]
pub struct Custodian(Arc<dyn Fn(Question) -> Result<Answer, String> + Send + Sync>);

impl Custodian {
    /// Asks with this function, which may wait for the answer. It says why there is none.
    pub fn new(ask: impl Fn(Question) -> Result<Answer, String> + Send + Sync + 'static) -> Self {
        Self(Arc::new(ask))
    }

    pub(super) fn ask_now(&self, question: Question) -> Result<Answer, String> {
        (self.0)(question)
    }

    pub(super) async fn ask(&self, question: Question) -> Result<Answer, String> {
        let this = self.clone();
        tokio::task::spawn_blocking(move || this.ask_now(question)).await.map_err(|error| error.to_string())?
    }
}

impl fmt::Debug for Custodian {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Custodian")
    }
}

impl PartialEq for Custodian {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Custodian {}

/// Environment variables whose names end in `_USERNAME` and `_PASSWORD`, for look-ups by registry.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Variables(BTreeMap<String, Secret>);

impl fmt::Debug for Variables {
    /// Names only.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl<'a> FromIterator<(&'a str, &'a str)> for Variables {
    /// Keeps those whose names fit. Empty ones count as not set.
    fn from_iter<T: IntoIterator<Item = (&'a str, &'a str)>>(variables: T) -> Self {
        let fits = |name: &str| [USERNAME, PASSWORD].iter().any(|end| name.len() > end.len() && name.ends_with(end));
        let kept = variables.into_iter().filter(|(name, value)| fits(name) && !value.is_empty());
        Self(kept.map(|(name, value)| (name.to_owned(), Secret::new(value))).collect())
    }
}

const USERNAME: &str = "_USERNAME";
const PASSWORD: &str = "_PASSWORD";

/// A pair of variables: names and, where set, values.
pub(super) struct Pair<'a> {
    pub(super) username: (String, Option<&'a Secret>),
    pub(super) password: (String, Option<&'a Secret>),
}

impl Variables {
    /// `OVENBIRD_REGISTRY_<HOST>_…` with every `.`, `:` and `-` of the host as `_`.
    pub(super) fn own(&self, registry: &str) -> Pair<'_> {
        self.pair(&format!("OVENBIRD_REGISTRY_{}", registry.replace(['.', ':', '-', '[', ']'], "_").to_uppercase()))
    }

    /// MLEM's form of the name: `<HOST>_…` with every `.` and `:` as `_`.
    pub(super) fn mlem(&self, registry: &str) -> Pair<'_> {
        self.pair(&registry.replace(['.', ':'], "_").to_uppercase())
    }

    fn pair(&self, stem: &str) -> Pair<'_> {
        let of = |end: &str| {
            let name = format!("{stem}{end}");
            let value = self.0.get(&name);
            (name, value)
        };
        Pair { username: of(USERNAME), password: of(PASSWORD) }
    }
}
