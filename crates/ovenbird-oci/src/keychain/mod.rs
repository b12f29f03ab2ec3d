//! Credentials: who we are to a registry, and where that is written.
//!
//! Only this module reads them; they leave it as [`Secret`]s, which never print. Searched in this order, the first that has something
//! counts: the source that the settings name for the registry (and then no other); variables named after the registry; the variable
//! `DOCKER_AUTH_CONFIG`; docker's `config.json`, podman's `auth.json` and further files of that form (in each: the helper that `credHelpers` names, the one of
//! `credsStore`, then `auths`, the longest matching key first: `host/org/repository`, `host/org`, `host`); the cloud that the
//! registry's name belongs to. A source that is broken is an error, not a stranger's access.
//!
//! It must not know of HTTP exchanges with registries, and never writes but for [`Keychain::store`] and [`Keychain::erase`].

mod cloud;
mod docker;
mod error;
mod origin;
mod program;
mod source;
#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde_json::{Map, Value};

pub use cloud::{AzureOptions, EcrOptions, GithubOptions, GoogleOptions, OPENSHIFT_CA, OPENSHIFT_HOSTS, OpenshiftOptions};
pub use docker::registry_name;
pub use error::KeychainError;
pub use origin::Origin;
pub use source::{Answer, Custodian, KeychainOptions, Question, Source, Variables};

use cloud::Clouds;
use docker::{edit, file_in, from_auths, helper_names, key_of, matching_key, read};
use program::Helpers;

use crate::regular_file::{self, Links};

/// Longest configuration file, and longest answer of a helper, in bytes.
const MAX_DOCUMENT: u64 = 4 << 20;
/// So long before its end a credential is renewed, for requests that are on the way.
const MARGIN: Duration = Duration::from_mins(1);

const BASE64: GeneralPurpose =
    GeneralPurpose::new(&alphabet::STANDARD, GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent));

/// Text that is never printed.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Secret(String);

impl Secret {
    /// Hides a text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text, for the one place that sends it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

/// How somebody proves who they are to a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credential {
    /// Name and password (or an access token used as one).
    Password {
        /// Account.
        username: String,
        /// Password.
        password: Secret,
    },
    /// An OAuth2 refresh token, exchanged for access tokens.
    IdentityToken(Secret),
    /// A bearer token, sent as it is.
    RegistryToken(Secret),
}

impl Credential {
    /// Every form in which it is written down or sent.
    pub fn forms(&self) -> Vec<Vec<u8>> {
        match self {
            Self::Password { username, password } => {
                let pair = BASE64.encode(format!("{username}:{}", password.expose()));
                vec![password.expose().into(), pair.trim_end_matches('=').into()]
            }
            Self::IdentityToken(token) | Self::RegistryToken(token) => vec![token.expose().into()],
        }
    }
}

/// Where credentials were kept, or removed from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kept {
    /// In this file, readable with its permissions, not encrypted.
    File(PathBuf),
    /// By this helper.
    Helper(String),
}

/// A credential and where it is from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The credential.
    pub credential: Credential,
    /// Where it was found.
    pub origin: Origin,
    /// When it ends, as far as its issuer said.
    pub expires: Option<SystemTime>,
    /// When it is to be renewed.
    stale: Option<Instant>,
}

impl Found {
    fn new(credential: Credential, origin: Origin) -> Self {
        Self { credential, origin, expires: None, stale: None }
    }

    /// What somebody typed.
    pub(crate) fn typed(username: &str, password: &Secret) -> Self {
        Self::new(Credential::Password { username: username.into(), password: password.clone() }, Origin::Typed)
    }

    /// The same, with an end. One that has passed already is a clock that is wrong, and is not believed: asking again would give
    /// the same.
    fn until(mut self, expires: Option<SystemTime>) -> Self {
        if let Some(left) = expires.and_then(|end| end.duration_since(SystemTime::now()).ok()).filter(|left| *left > Duration::ZERO) {
            self.expires = expires;
            self.stale = Instant::now().checked_add(left.saturating_sub((left / 4).min(MARGIN)));
        }
        self
    }

    /// Whether it ends soon.
    pub(crate) fn is_stale(&self) -> bool {
        self.stale.is_some_and(|stale| stale <= Instant::now())
    }
}

/// What is looked up.
#[derive(Debug, Clone, Copy)]
pub struct Query<'a> {
    /// Registry name (`docker.io`).
    pub registry: &'a str,
    /// Repository (`library/debian`).
    pub repository: &'a str,
    /// Scheme, host and port under which the registry is reached: some clouds exchange tokens there.
    pub address: Option<&'a str>,
    /// A credential that the registry does not take any more: not to be found again in a memory.
    pub refused: Option<&'a Credential>,
}

/// Finds, keeps and removes credentials. Reads its files anew each time; what a cloud gave is kept until it ends.
#[derive(Debug, Clone, Default)]
pub struct Keychain {
    options: KeychainOptions,
    clouds: Arc<Clouds>,
    search_path: Option<OsString>,
    timeout: Option<Duration>,
}

impl Keychain {
    /// Searches these places; files may be missing on disk.
    pub fn new(options: KeychainOptions) -> Self {
        Self { options, clouds: Arc::default(), search_path: None, timeout: None }
    }

    /// Looks for helpers here (in the form of `PATH`) instead of in the program's own `PATH`.
    #[must_use]
    pub fn with_search_path(mut self, search_path: OsString) -> Self {
        self.search_path = Some(search_path);
        self
    }

    /// Credentials for a repository of a registry; `None` when nobody logged in.
    pub async fn find(&self, query: Query<'_>) -> Result<Option<Found>, KeychainError> {
        if let Some(custodian) = &self.options.custodian {
            let question = Question::Find {
                registry: query.registry.into(),
                repository: query.repository.into(),
                address: query.address.map(Into::into),
                refused: query.refused.cloned(),
            };
            return match custodian.ask(question).await {
                Ok(Answer::Credential(credential, expires)) => Ok(Some(Found::new(credential, Origin::Custodian).until(expires))),
                Ok(_) => Ok(None),
                Err(reason) => Err(KeychainError::Custodian { registry: query.registry.into(), reason }),
            };
        }
        if let Some(source) = self.options.sources.get(query.registry) {
            return self.in_source(source, query).await;
        }
        if let Some(found) = self.in_variables(query.registry)? {
            return Ok(Some(found));
        }
        let recorded = self.in_files(query).await?;
        if recorded.as_ref().is_some_and(|found| Some(&found.credential) != query.refused) {
            return Ok(recorded);
        }
        // `docker login` writes down the tokens of clouds, too, and they run out: then the cloud itself is asked.
        match self.clouds.find(&self.options, query).await {
            Ok(found) => Ok(found.or(recorded)),
            Err(_) if recorded.is_some() => Ok(recorded),
            Err(error) => Err(error),
        }
    }

    /// Makes a repository where the registry does not make it at the first push: on Amazon ECR. Whether there was need to.
    pub async fn create_repository(&self, registry: &str, repository: &str) -> Result<bool, KeychainError> {
        if let Some(custodian) = &self.options.custodian {
            let asked = custodian.ask(Question::Create { registry: registry.into(), repository: repository.into() }).await;
            let made = asked.map_err(|reason| KeychainError::Custodian { registry: registry.into(), reason })?;
            return Ok(made == Answer::Created(true));
        }
        let options = match self.options.sources.get(registry) {
            Some(Source::Ecr(options)) => options,
            _ => &self.options.ecr,
        };
        cloud::create_repository(options, registry, repository).await
    }

    async fn in_source(&self, source: &Source, query: Query<'_>) -> Result<Option<Found>, KeychainError> {
        let nothing = || KeychainError::Nothing { registry: query.registry.into(), place: source.to_string() };
        let settings = |username: &str, password: Secret| {
            let credential = Credential::Password { username: username.into(), password };
            Found::new(credential, Origin::Settings { place: source.to_string() })
        };
        let found = match source {
            Source::Anonymous => return Ok(None),
            Source::File(path) => {
                let path = if path.is_dir() { file_in(path) } else { path.clone() };
                if !path.exists() {
                    return Err(KeychainError::read(&path)(io::ErrorKind::NotFound.into()));
                }
                self.in_file(&path, query).await?
            }
            Source::Helper(name) => self
                .helpers()
                .ask(Path::new("the settings"), name, query.registry)
                .await?
                .map(|credential| Found::new(credential, Origin::Helper { program: format!("docker-credential-{name}"), path: None })),
            Source::PasswordFile { username, path } => Some(settings(username, read_secret(path)?)),
            Source::PasswordVariable { username, password, .. } => password.clone().map(|password| settings(username, password)),
            Source::Variables => self.in_variables(query.registry)?,
            Source::Files => self.in_files(query).await?,
            Source::Ecr(_) | Source::Google(_) | Source::Azure(_) | Source::Github(_) | Source::Openshift(_) => {
                self.clouds.find_by(source, query).await?
            }
        };
        found.map(Some).ok_or_else(nothing)
    }

    fn in_variables(&self, registry: &str) -> Result<Option<Found>, KeychainError> {
        let variables = &self.options.variables;
        let own = variables.own(registry);
        let half = |present: &str, missing: &str| {
            Err(KeychainError::HalfVariable { registry: registry.into(), present: present.into(), missing: missing.into() })
        };
        let pair = match (&own.username, &own.password) {
            ((_, Some(_)), (_, Some(_))) => own,
            ((username, Some(_)), (password, None)) => return half(username, password),
            ((username, None), (password, Some(_))) => return half(password, username),
            // Names without a prefix may mean something else: `FROM db.app/x` must not send DB_APP_PASSWORD there.
            _ if registry.contains(':') || self.options.named.contains(registry) => variables.mlem(registry),
            _ => return Ok(None),
        };
        let ((username, Some(name)), (password, Some(secret))) = (pair.username, pair.password) else { return Ok(None) };
        let credential = Credential::Password { username: name.expose().into(), password: secret.clone() };
        Ok(Some(Found::new(credential, Origin::Variables { username, password })))
    }

    async fn in_files(&self, query: Query<'_>) -> Result<Option<Found>, KeychainError> {
        if let Some((name, config)) = self.document()?
            && let Some((credential, key)) = from_auths(&config, name, query.registry, query.repository)?
        {
            return Ok(Some(Found::new(credential, Origin::File { path: name.into(), key })));
        }
        for path in self.files() {
            if let Some(found) = self.in_file(&path, query).await? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    async fn in_file(&self, path: &Path, query: Query<'_>) -> Result<Option<Found>, KeychainError> {
        let Some(config) = read(path)? else { return Ok(None) };
        let mut failure = None;
        for name in helper_names(&config, query.registry) {
            match self.helpers().ask(path, &name, query.registry).await {
                Ok(Some(credential)) => {
                    let origin = Origin::Helper { program: format!("docker-credential-{name}"), path: Some(path.into()) };
                    return Ok(Some(Found::new(credential, origin)));
                }
                Ok(None) => {}
                // A broken helper must not hide what the file itself says.
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        match (from_auths(&config, path, query.registry, query.repository)?, failure) {
            (Some((credential, key)), _) => Ok(Some(Found::new(credential, Origin::File { path: path.into(), key }))),
            (None, Some(error)) => Err(error),
            (None, None) => Ok(None),
        }
    }

    /// What stands in variables and in the files themselves, without asking anybody.
    pub fn recorded(&self, registry: &str, repository: &str) -> Option<Credential> {
        if let Some(custodian) = &self.options.custodian {
            let asked = custodian.ask_now(Question::Recorded { registry: registry.into(), repository: repository.into() });
            return if let Ok(Answer::Credential(credential, _)) = asked { Some(credential) } else { None };
        }
        match self.options.sources.get(registry) {
            Some(Source::PasswordFile { username, path }) => {
                return Some(Credential::Password { username: username.clone(), password: read_secret(path).ok()? });
            }
            Some(Source::PasswordVariable { username, password, .. }) => {
                return Some(Credential::Password { username: username.clone(), password: password.clone()? });
            }
            Some(Source::File(path)) => {
                let path = if path.is_dir() { file_in(path) } else { path.clone() };
                return from_auths(&read(&path).ok()??, &path, registry, repository).ok()?.map(|(credential, _)| credential);
            }
            Some(Source::Variables | Source::Files) | None => {}
            Some(_) => return None,
        }
        if let Ok(Some(found)) = self.in_variables(registry) {
            return Some(found.credential);
        }
        if let Ok(Some((name, config))) = self.document()
            && let Ok(Some((credential, _))) = from_auths(&config, name, registry, repository)
        {
            return Some(credential);
        }
        self.files().find_map(|path| Some(from_auths(&read(&path).ok()??, &path, registry, repository).ok()??.0))
    }

    /// Keeps name and password: with the helper that is configured for the registry, else in the first file, which is replaced
    /// atomically and keeps everything else in it.
    pub async fn store(&self, registry: &str, username: &str, password: &Secret) -> Result<Kept, KeychainError> {
        let path = self.own_files().next().ok_or(KeychainError::NoPlace)?;
        let config = read(&path)?.unwrap_or_default();
        let key = key_of(registry);
        if let Some(name) = helper_names(&config, registry).into_iter().next() {
            let said = serde_json::json!({ "ServerURL": key, "Username": username, "Secret": password.expose() });
            let program = self.helpers().run(&path, &name, "store", said.to_string().into_bytes()).await?.program;
            return Ok(Kept::Helper(program));
        }
        let auth = BASE64.encode(format!("{username}:{}", password.expose()));
        edit(&path, |config| {
            let auths = config.entry("auths").or_insert_with(|| Value::Object(Map::new()));
            if let Value::Object(auths) = auths {
                auths.retain(|k, _| matching_key(k) != Some((registry, "")));
                auths.insert(key.clone(), serde_json::json!({ "auth": auth }));
                true
            } else {
                false
            }
        })?;
        Ok(Kept::File(path))
    }

    /// Forgets the credentials of a registry everywhere; the places that had any.
    pub async fn erase(&self, registry: &str) -> Result<Vec<Kept>, KeychainError> {
        let mut places = vec![];
        for path in self.own_files() {
            let Some(config) = read(&path)? else { continue };
            for name in helper_names(&config, registry) {
                if self.helpers().ask(&path, &name, registry).await?.is_some() {
                    let program = self.helpers().run(&path, &name, "erase", key_of(registry).into_bytes()).await?.program;
                    places.push(Kept::Helper(program));
                }
            }
            let has = |c: &Map<String, Value>| {
                c.get("auths").and_then(Value::as_object).is_some_and(|a| a.keys().any(|k| matching_key(k) == Some((registry, ""))))
            };
            if has(&config) {
                edit(&path, |config| {
                    if let Some(auths) = config.get_mut("auths").and_then(Value::as_object_mut) {
                        auths.retain(|k, _| matching_key(k) != Some((registry, "")));
                    }
                    true
                })?;
                places.push(Kept::File(path));
            }
        }
        Ok(places)
    }

    /// The configuration that stands in a variable. Its helpers are not asked, as Docker does not.
    fn document(&self) -> Result<Option<(&Path, Map<String, Value>)>, KeychainError> {
        let Some((name, text)) = &self.options.document else { return Ok(None) };
        let name = Path::new(name.as_str());
        Ok(docker::parse(name, text.expose().as_bytes())?.map(|config| (name, config)))
    }

    fn files(&self) -> impl Iterator<Item = PathBuf> + use<> {
        let more: Vec<PathBuf> =
            self.options.auth_files.iter().map(|path| if path.is_dir() { file_in(path) } else { path.clone() }).collect();
        self.own_files().chain(more)
    }

    /// Those that `login` and `logout` write. Mounted secrets are others'.
    fn own_files(&self) -> impl Iterator<Item = PathBuf> + use<> {
        let docker = self.options.docker_config.as_deref().map(file_in);
        docker.into_iter().chain(self.options.auth_file.clone())
    }

    fn helpers(&self) -> Helpers<'_> {
        Helpers { search_path: self.search_path.as_deref(), timeout: self.timeout }
    }
}

/// A password, token or key in a file of its own; the newline at the end is not part of it.
fn read_secret(path: &Path) -> Result<Secret, KeychainError> {
    let text = read_text(path)?;
    let secret = text.trim_end_matches(['\r', '\n']);
    if secret.is_empty() {
        return Err(KeychainError::Unusable { path: path.into(), expected: "a file with a secret", reason: "it is empty".into() });
    }
    Ok(Secret::new(secret))
}

fn read_text(path: &Path) -> Result<String, KeychainError> {
    regular_file::read_to_string(path, MAX_DOCUMENT, Links::Follow).map_err(KeychainError::read(path))
}
