//! Credentials: docker's `config.json`, podman's `auth.json`, and the credential helpers they name.
//!
//! Only this module reads them; they leave it as [`Secret`]s, which never print. Files are looked at in order (docker's first), and
//! in each: the helper that `credHelpers` names, the one of `credsStore`, then `auths`, the longest matching key first
//! (`host/org/repository`, `host/org`, `host`).
//! Sources: docker/cli `config.json`, docker-credential-helpers protocol, containers-auth.json(5).

use std::ffi::OsString;
use std::fmt;
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use base64::Engine;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde_json::{Map, Value};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// The key that Docker has always used for Docker Hub.
const HUB_KEY: &str = "https://index.docker.io/v1/";
/// Longest configuration file, and longest answer of a helper, in bytes.
const MAX_DOCUMENT: u64 = 4 << 20;
/// How long a helper may take: it may ask the user for a fingerprint, but it must not hang a build.
const HELPER_TIMEOUT: Duration = Duration::from_secs(30);

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

/// What can go wrong with credentials.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeychainError {
    /// The file system refused.
    #[error("cannot {action} {}: {source}; check the permissions", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not the JSON it should be. The file is never overwritten then.
    #[error("{} is not a Docker configuration file: {reason}; correct it or move it away", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Why, without any value of the file.
        reason: String,
    },
    /// `credsStore` or `credHelpers` names something that is no program name.
    #[error("{} names the credential helper {name:?}, which is not a plain program name; write only what follows `docker-credential-`", path.display())]
    HelperName {
        /// The file.
        path: PathBuf,
        /// As written there.
        name: String,
    },
    /// The helper is not installed.
    #[error("{program}, which {} names, is not installed; install it or remove it from that file", path.display())]
    HelperMissing {
        /// `docker-credential-…`.
        program: String,
        /// The file.
        path: PathBuf,
    },
    /// The helper ran and failed.
    #[error("{program} {verb} failed: {reason}; try it by hand, or remove it from the Docker configuration")]
    HelperFailed {
        /// `docker-credential-…`.
        program: String,
        /// `get`, `store` or `erase`.
        verb: &'static str,
        /// What it said.
        reason: String,
    },
    /// Neither a docker configuration folder nor an auth file is known.
    #[error(
        "there is no place to keep credentials: neither a docker configuration folder nor an auth file is set; set HOME or DOCKER_CONFIG"
    )]
    NoPlace,
}

/// Where credentials were kept, or removed from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kept {
    /// In this file, readable with its permissions, not encrypted.
    File(PathBuf),
    /// By this helper.
    Helper(String),
}

/// Finds, keeps and removes credentials. Reads its files anew each time.
#[derive(Debug, Clone, Default)]
pub struct Keychain {
    docker_config: Option<PathBuf>,
    auth_file: Option<PathBuf>,
    search_path: Option<OsString>,
    timeout: Option<Duration>,
}

impl Keychain {
    /// `docker_config`: folder of `config.json`; `auth_file`: podman's file. Either may be missing on disk.
    pub fn new(docker_config: Option<PathBuf>, auth_file: Option<PathBuf>) -> Self {
        Self { docker_config, auth_file, search_path: None, timeout: None }
    }

    /// Looks for helpers here (in the form of `PATH`) instead of in the program's own `PATH`.
    #[must_use]
    pub fn with_search_path(mut self, search_path: OsString) -> Self {
        self.search_path = Some(search_path);
        self
    }

    /// Credentials for a repository of a registry (`docker.io`, `library/debian`); `None` when nobody logged in.
    pub async fn get(&self, registry: &str, repository: &str) -> Result<Option<Credential>, KeychainError> {
        for path in self.files() {
            let Some(config) = read(&path)? else { continue };
            let mut failure = None;
            for name in helper_names(&config, registry) {
                match self.ask_helper(&path, &name, registry).await {
                    Ok(Some(credential)) => return Ok(Some(credential)),
                    Ok(None) => {}
                    // A broken helper must not hide what the file itself says.
                    Err(error) => failure = failure.or(Some(error)),
                }
            }
            if let Some(credential) = from_auths(&config, &path, registry, repository)? {
                return Ok(Some(credential));
            }
            if let Some(error) = failure {
                return Err(error);
            }
        }
        Ok(None)
    }

    /// What stands in the files themselves, without asking any helper.
    pub fn recorded(&self, registry: &str, repository: &str) -> Option<Credential> {
        self.files().find_map(|path| from_auths(&read(&path).ok()??, &path, registry, repository).ok()?)
    }

    /// Keeps name and password: with the helper that is configured for the registry, else in the first file, which is replaced
    /// atomically and keeps everything else in it.
    pub async fn store(&self, registry: &str, username: &str, password: &Secret) -> Result<Kept, KeychainError> {
        let path = self.files().next().ok_or(KeychainError::NoPlace)?;
        let config = read(&path)?.unwrap_or_default();
        let key = key_of(registry);
        if let Some(name) = helper_names(&config, registry).into_iter().next() {
            let said = serde_json::json!({ "ServerURL": key, "Username": username, "Secret": password.expose() });
            let program = self.run_helper(&path, &name, "store", said.to_string().into_bytes()).await?.program;
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
        for path in self.files() {
            let Some(config) = read(&path)? else { continue };
            for name in helper_names(&config, registry) {
                if self.ask_helper(&path, &name, registry).await?.is_some() {
                    let program = self.run_helper(&path, &name, "erase", key_of(registry).into_bytes()).await?.program;
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

    fn files(&self) -> impl Iterator<Item = PathBuf> + use<> {
        let docker = self.docker_config.as_ref().map(|dir| dir.join("config.json"));
        docker.into_iter().chain(self.auth_file.clone())
    }

    async fn ask_helper(&self, path: &Path, name: &str, registry: &str) -> Result<Option<Credential>, KeychainError> {
        let answer = self.run_helper(path, name, "get", key_of(registry).into_bytes()).await?;
        let Some(stdout) = answer.stdout else { return Ok(None) };
        let failed = |reason: &str| KeychainError::HelperFailed { program: answer.program.clone(), verb: "get", reason: reason.into() };
        // The parser's own message could quote the secret.
        let Ok(Value::Object(said)) = serde_json::from_slice(&stdout) else { return Err(failed("its answer is not a JSON object")) };
        let text = |key: &str| said.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (username, secret) = (text("Username"), Secret(text("Secret")));
        Ok(match username.as_str() {
            _ if secret.0.is_empty() => None,
            "<token>" => Some(Credential::IdentityToken(secret)),
            _ => Some(Credential::Password { username, password: secret }),
        })
    }

    async fn run_helper(&self, path: &Path, name: &str, verb: &'static str, input: Vec<u8>) -> Result<Answer, KeychainError> {
        if name.is_empty() || name.contains(['/', '\\', '\0']) || name.starts_with('.') {
            return Err(KeychainError::HelperName { path: path.into(), name: name.into() });
        }
        let program = format!("docker-credential-{name}");
        let missing = || KeychainError::HelperMissing { program: program.clone(), path: path.into() };
        let failed = |reason: String| KeychainError::HelperFailed { program: program.clone(), verb, reason };
        let executable = match &self.search_path {
            None => PathBuf::from(&program),
            Some(dirs) => std::env::split_paths(dirs).map(|d| d.join(&program)).find(|p| p.is_file()).ok_or_else(missing)?,
        };
        let mut command = tokio::process::Command::new(executable);
        command.arg(verb).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).kill_on_drop(true);
        let mut child = command.spawn().map_err(|e| if e.kind() == io::ErrorKind::NotFound { missing() } else { failed(e.to_string()) })?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let talk = async {
            if let Some(mut stdin) = stdin {
                // A helper that does not read is judged by its exit code.
                let _ = stdin.write_all(&input).await;
            }
            let mut said = vec![];
            if let Some(stdout) = stdout {
                stdout.take(MAX_DOCUMENT).read_to_end(&mut said).await?;
            }
            Ok::<_, io::Error>((child.wait().await?, said))
        };
        let timeout = self.timeout.unwrap_or(HELPER_TIMEOUT);
        let (status, said) = match tokio::time::timeout(timeout, talk).await {
            Ok(Ok(done)) => done,
            Ok(Err(e)) => return Err(failed(e.to_string())),
            Err(_) => return Err(failed(format!("it gave no answer in {} s", timeout.as_secs()))),
        };
        if status.success() {
            return Ok(Answer { program, stdout: Some(said) });
        }
        let text = String::from_utf8_lossy(&said);
        if text.contains("credentials not found") {
            return Ok(Answer { program, stdout: None });
        }
        let text = crate::registry::printable(&text);
        Err(failed(if text.is_empty() { status.to_string() } else { format!("{status}: {text}") }))
    }
}

struct Answer {
    program: String,
    /// `None`: the helper knows no credentials.
    stdout: Option<Vec<u8>>,
}

/// The registry's name out of what people type at `login`: `https://index.docker.io/v1/` is `docker.io`.
pub fn registry_name(text: &str) -> String {
    let text = text.trim();
    let text = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")).unwrap_or(text);
    let host = text.split('/').next().unwrap_or(text);
    hub_name(host).to_owned()
}

fn hub_name(host: &str) -> &str {
    if matches!(host, "" | "docker.io" | "index.docker.io" | "registry-1.docker.io") { "docker.io" } else { host }
}

/// The key under which docker keeps a registry.
fn key_of(registry: &str) -> String {
    if registry == "docker.io" { HUB_KEY.into() } else { registry.into() }
}

/// Registry and repository prefix that a key of `auths` stands for. Keys with a scheme or an API version stand for a whole host.
fn matching_key(key: &str) -> Option<(&str, &str)> {
    let bare = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"));
    let (host, path) = bare.unwrap_or(key).split_once('/').unwrap_or((bare.unwrap_or(key), ""));
    if host.is_empty() {
        return None;
    }
    let path = path.trim_end_matches('/');
    let whole_host = bare.is_some() || matches!(path, "v1" | "v2");
    Some((hub_name(host), if whole_host { "" } else { path }))
}

fn helper_names(config: &Map<String, Value>, registry: &str) -> Vec<String> {
    let mut names = vec![];
    if let Some(helpers) = config.get("credHelpers").and_then(Value::as_object) {
        let own = helpers.iter().find(|(k, _)| matching_key(k) == Some((registry, "")));
        names.extend(own.and_then(|(_, v)| v.as_str()).map(str::to_owned));
    }
    let store = config.get("credsStore").and_then(Value::as_str).filter(|name| !name.is_empty());
    names.extend(store.map(str::to_owned));
    names.dedup();
    names
}

fn from_auths(config: &Map<String, Value>, path: &Path, registry: &str, repository: &str) -> Result<Option<Credential>, KeychainError> {
    let Some(auths) = config.get("auths").and_then(Value::as_object) else { return Ok(None) };
    let mut found: Vec<(usize, &str, &Value)> = vec![];
    for (key, entry) in auths {
        let Some((host, prefix)) = matching_key(key) else { continue };
        let below = repository.strip_prefix(prefix).is_some_and(|rest| prefix.is_empty() || rest.is_empty() || rest.starts_with('/'));
        if host == registry && below {
            found.push((prefix.len(), key, entry));
        }
    }
    // Longest prefix first; a key without scheme before one with it; else the order of the file.
    found.sort_by_key(|(length, key, _)| (std::cmp::Reverse(*length), key.contains("://")));
    for (_, key, entry) in found {
        let text = |name: &str| entry.get(name).and_then(Value::as_str).filter(|t| !t.is_empty());
        if let Some(token) = text("identitytoken") {
            return Ok(Some(Credential::IdentityToken(Secret::new(token))));
        }
        if let Some(token) = text("registrytoken") {
            return Ok(Some(Credential::RegistryToken(Secret::new(token))));
        }
        if let Some(auth) = text("auth") {
            let decoded = BASE64.decode(auth.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
            let pair = decoded.as_deref().and_then(|d| d.trim_end_matches('\0').split_once(':'));
            let Some((username, password)) = pair else {
                let reason = format!("`auth` of {key:?} is not base64 of name:password");
                return Err(KeychainError::Malformed { path: path.into(), reason });
            };
            return Ok(Some(Credential::Password { username: username.into(), password: Secret::new(password) }));
        }
        if let (Some(username), Some(password)) = (text("username"), text("password")) {
            return Ok(Some(Credential::Password { username: username.into(), password: Secret::new(password) }));
        }
    }
    Ok(None)
}

fn read(path: &Path) -> Result<Option<Map<String, Value>>, KeychainError> {
    use std::io::Read;
    let io = |source| KeychainError::Io { action: "read", path: path.into(), source };
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(None),
        Err(e) => return Err(io(e)),
    };
    let mut bytes = vec![];
    file.take(MAX_DOCUMENT + 1).read_to_end(&mut bytes).map_err(io)?;
    let malformed = |reason: String| KeychainError::Malformed { path: path.into(), reason };
    if bytes.len() as u64 > MAX_DOCUMENT {
        return Err(malformed(format!("it is longer than {MAX_DOCUMENT} bytes")));
    }
    if bytes.trim_ascii().is_empty() {
        return Ok(None);
    }
    // Only the place of the error: its text could quote a value.
    let value: Value =
        serde_json::from_slice(&bytes).map_err(|e| malformed(format!("no JSON at line {}, column {}", e.line(), e.column())))?;
    match value {
        Value::Object(map) => Ok(Some(map)),
        _ => Err(malformed("it is no JSON object".into())),
    }
}

/// Changes a configuration file atomically, under a lock against other Ovenbirds. `change` says whether the file has the right form.
fn edit(path: &Path, change: impl FnOnce(&mut Map<String, Value>) -> bool) -> Result<(), KeychainError> {
    let io = |action| move |source: io::Error| KeychainError::Io { action, path: path.into(), source };
    // Folders of dotfiles are often links to a file elsewhere: that one is replaced, not the link.
    let target = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let dir = target.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(dir).map_err(io("make the folder of"))?;
    let folder = std::fs::File::open(dir).map_err(io("open the folder of"))?;
    rustix::fs::flock(&folder, rustix::fs::FlockOperation::LockExclusive).map_err(|e| io("lock the folder of")(e.into()))?;
    let mut config = read(&target)?.unwrap_or_default();
    if !change(&mut config) {
        return Err(KeychainError::Malformed { path: path.into(), reason: "`auths` is no JSON object".into() });
    }
    let mut bytes = vec![];
    let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, serde_json::ser::PrettyFormatter::with_indent(b"\t"));
    serde::Serialize::serialize(&config, &mut serializer).map_err(|e| io("write")(e.into()))?;
    bytes.push(b'\n');
    let mode = std::fs::metadata(&target).map_or(0o600, |m| m.permissions().mode() & 0o777);
    let partial = dir.join(format!(".{}.{}", target.file_name().unwrap_or_default().to_string_lossy(), std::process::id()));
    let written = (|| {
        let _ = std::fs::remove_file(&partial);
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&partial)?;
        file.write_all(&bytes)?;
        file.set_permissions(std::fs::Permissions::from_mode(mode))?;
        file.sync_all()?;
        std::fs::rename(&partial, &target)
    })();
    written.map_err(|e| {
        let _ = std::fs::remove_file(&partial);
        io("write")(e)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keychain(dir: &Path) -> Keychain {
        Keychain::new(Some(dir.join("docker")), Some(dir.join("auth.json"))).with_search_path(dir.join("bin").into())
    }

    fn write(path: &Path, text: &str) {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn helper(dir: &Path, name: &str, script: &str) {
        let path = dir.join("bin").join(format!("docker-credential-{name}"));
        write(&path, &format!("#!/bin/sh\n{script}\n"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    fn show(found: Result<Option<Credential>, KeychainError>) -> String {
        match found {
            Ok(None) => "none".into(),
            Ok(Some(Credential::Password { username, password })) => format!("{username}:{}", password.expose()),
            Ok(Some(Credential::IdentityToken(t))) => format!("identity {}", t.expose()),
            Ok(Some(Credential::RegistryToken(t))) => format!("bearer {}", t.expose()),
            Err(e) => format!("error {}", e.to_string().split(';').next().unwrap().replace(char::is_whitespace, " ")),
        }
    }

    /// Credentials are `name:secret`; base64 of them is made here.
    fn auths(entries: &[(&str, &str)]) -> String {
        let map: Map<_, _> = entries.iter().map(|(k, v)| ((*k).to_owned(), serde_json::json!({ "auth": BASE64.encode(v) }))).collect();
        serde_json::json!({ "auths": map }).to_string()
    }

    #[tokio::test]
    async fn precedence() {
        let prefixes = auths(&[("h.test", "host:1"), ("h.test/org", "org:2"), ("h.test/org/app", "app:3"), ("h.test/or", "no:0")]);
        let token = r#"{"auths":{"h.test":{"auth":"YTpi","identitytoken":"idt"}}}"#.to_owned();
        let rows: Vec<(String, &str, &str, &str, &str)> = vec![
            ("{}".into(), "", "h.test", "a", "none"),
            (String::new(), "", "h.test", "a", "none"),
            (auths(&[("h.test", "u:p")]), "", "h.test", "a", "u:p"),
            (auths(&[("h.test", "u:p:with:colons")]), "", "h.test", "a", "u:p:with:colons"),
            (auths(&[("h.test", "u:p\0\0")]), "", "h.test", "a", "u:p"),
            (auths(&[("h.test", "u:p")]), "", "h.test:5000", "a", "none"),
            (auths(&[("h.test:5000", "u:p")]), "", "h.test:5000", "a", "u:p"),
            (auths(&[("https://h.test", "u:p")]), "", "h.test", "a", "u:p"),
            (auths(&[("https://h.test/v1/", "u:p")]), "", "h.test", "a", "u:p"),
            (auths(&[("http://h.test/v2/", "u:p")]), "", "h.test", "a", "u:p"),
            (auths(&[("h.test/v1/", "u:p")]), "", "h.test", "a", "u:p"),
            (auths(&[("https://h.test", "scheme:1"), ("h.test", "bare:2")]), "", "h.test", "a", "bare:2"),
            (auths(&[("https://index.docker.io/v1/", "hub:p")]), "", "docker.io", "library/a", "hub:p"),
            (auths(&[("index.docker.io", "hub:p")]), "", "docker.io", "library/a", "hub:p"),
            (auths(&[("docker.io", "hub:p")]), "", "docker.io", "library/a", "hub:p"),
            (auths(&[("docker.io/org", "org:p")]), "", "docker.io", "library/a", "none"),
            (prefixes.clone(), "", "h.test", "x", "host:1"),
            (prefixes.clone(), "", "h.test", "org/x", "org:2"),
            (prefixes.clone(), "", "h.test", "org/app", "app:3"),
            (prefixes.clone(), "", "h.test", "org/app/sub", "app:3"),
            (prefixes.clone(), "", "h.test", "org/apple", "org:2"),
            (prefixes, "", "h.test", "orga/x", "host:1"),
            (token, "", "h.test", "a", "identity idt"),
            (r#"{"auths":{"h.test":{"registrytoken":"rt"}}}"#.into(), "", "h.test", "a", "bearer rt"),
            (r#"{"auths":{"h.test":{"username":"u","password":"p"}}}"#.into(), "", "h.test", "a", "u:p"),
            (r#"{"auths":{"h.test":{}}}"#.into(), "", "h.test", "a", "none"),
            // The second file counts only when the first has nothing.
            (auths(&[("h.test", "first:1")]), "second:2", "h.test", "a", "first:1"),
            (auths(&[("other.test", "first:1")]), "second:2", "h.test", "a", "second:2"),
            // Helpers.
            (r#"{"credHelpers":{"h.test":"good"}}"#.into(), "", "h.test", "a", "h.test:good"),
            (r#"{"credHelpers":{"h.test":"good"}}"#.into(), "", "g.test", "a", "none"),
            (r#"{"credHelpers":{"h.test":"good"},"credsStore":"token"}"#.into(), "", "h.test", "a", "h.test:good"),
            (r#"{"credHelpers":{"h.test":"empty"},"credsStore":"token"}"#.into(), "", "h.test", "a", "identity tok"),
            (r#"{"credsStore":"token"}"#.into(), "", "h.test", "a", "identity tok"),
            (r#"{"credsStore":"good"}"#.into(), "", "docker.io", "library/a", "https://index.docker.io/v1/:good"),
            (r#"{"credsStore":"empty","auths":{"h.test":{"auth":"dTpw"}}}"#.into(), "", "h.test", "a", "u:p"),
            (r#"{"credsStore":"broken","auths":{"h.test":{"auth":"dTpw"}}}"#.into(), "", "h.test", "a", "u:p"),
            (r#"{"credsStore":"empty"}"#.into(), "second:2", "h.test", "a", "second:2"),
            (
                r#"{"credsStore":"broken"}"#.into(),
                "",
                "h.test",
                "a",
                "error docker-credential-broken get failed: exit status: 3: no session",
            ),
            (
                r#"{"credsStore":"chatty"}"#.into(),
                "",
                "h.test",
                "a",
                "error docker-credential-chatty get failed: its answer is not a JSON object",
            ),
        ];
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path();
        helper(dir, "good", r#"read key; printf '{"Username":"%s","Secret":"good"}' "$key""#);
        helper(dir, "token", r#"cat >/dev/null; echo '{"Username":"<token>","Secret":"tok"}'"#);
        helper(dir, "empty", r#"cat >/dev/null; echo "credentials not found in native keychain"; exit 1"#);
        helper(dir, "broken", "echo 'no session'; exit 3");
        helper(dir, "chatty", "cat >/dev/null; echo hello");
        for (config, second, registry, repository, expected) in rows {
            write(&dir.join("docker/config.json"), &config);
            let second = if second.is_empty() { String::new() } else { auths(&[("h.test", second)]) };
            write(&dir.join("auth.json"), &second);
            assert_eq!(show(keychain(dir).get(registry, repository).await), expected, "{config} {registry}/{repository}");
        }
        let refused = [
            ("not json", "is not a Docker configuration file: no JSON at line 1, column 2"),
            ("[]", "is not a Docker configuration file: it is no JSON object"),
            (r#"{"auths":{"h.test":{"auth":"%%"}}}"#, r#"is not a Docker configuration file: `auth` of "h.test" is not base64"#),
            (r#"{"credsStore":"../evil"}"#, "which is not a plain program name"),
            (r#"{"credsStore":"absent"}"#, "docker-credential-absent, which"),
        ];
        for (config, expected) in refused {
            write(&dir.join("docker/config.json"), config);
            let error = keychain(dir).get("h.test", "a").await.unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[tokio::test]
    async fn a_helper_that_hangs_is_stopped() {
        let temp = tempfile::tempdir().unwrap();
        helper(temp.path(), "slow", "exec sleep 60");
        write(&temp.path().join("docker/config.json"), r#"{"credsStore":"slow"}"#);
        let mut keychain = keychain(temp.path());
        keychain.timeout = Some(Duration::from_millis(200));
        let error = keychain.get("h.test", "a").await.unwrap_err().to_string();
        assert!(error.contains("gave no answer"), "{error}");
    }

    #[tokio::test]
    async fn login_and_logout_keep_the_rest_of_the_file() {
        let temp = tempfile::tempdir().unwrap();
        let real = temp.path().join("real.json");
        let link = temp.path().join("docker/config.json");
        write(&real, r#"{"zebra":[1,2.50],"auths":{"https://h.test/v1/":{"auth":"b2xkOm9sZA=="},"g.test":{"auth":"Zzpn"}},"alpha":{}}"#);
        std::fs::set_permissions(&real, std::fs::Permissions::from_mode(0o640)).unwrap();
        std::fs::create_dir_all(link.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let keychain = keychain(temp.path());
        assert_eq!(keychain.store("h.test", "new", &Secret::new("pass:word")).await.unwrap(), Kept::File(link.clone()));
        assert_eq!(show(keychain.get("h.test", "a").await), "new:pass:word");
        assert!(link.is_symlink());
        assert_eq!(std::fs::metadata(&real).unwrap().permissions().mode() & 0o777, 0o640);
        let text = std::fs::read_to_string(&real).unwrap();
        let keys: Vec<_> = ["zebra", "auths", "g.test", "h.test", "alpha"].iter().map(|k| text.find(k).unwrap()).collect();
        assert!(keys.is_sorted() && !text.contains("/v1/"), "{text}");
        assert_eq!(keychain.erase("h.test").await.unwrap(), [Kept::File(link.clone())]);
        assert_eq!(keychain.erase("h.test").await.unwrap(), []);
        assert_eq!(show(keychain.get("g.test", "a").await), "g:g");
        // Docker Hub is kept under docker's key; a new file is private; nothing is left beside it.
        std::fs::remove_file(&link).unwrap();
        keychain.store("docker.io", "u", &Secret::new("p")).await.unwrap();
        assert!(std::fs::read_to_string(&link).unwrap().contains(HUB_KEY));
        assert_eq!(std::fs::metadata(&link).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(link.parent().unwrap()).unwrap().count(), 1);
        // What cannot be read is not overwritten.
        write(&link, "broken");
        assert!(keychain.store("docker.io", "u", &Secret::new("p")).await.is_err());
        assert_eq!(std::fs::read_to_string(&link).unwrap(), "broken");
        assert!(matches!(Keychain::default().store("h", "u", &Secret::default()).await, Err(KeychainError::NoPlace)));
    }

    #[tokio::test]
    async fn login_through_a_helper() {
        let temp = tempfile::tempdir().unwrap();
        let kept = temp.path().join("kept");
        let script = format!(
            r"case $1 in store) cat >{0};; get) cat {0} 2>/dev/null || {{ echo credentials not found; exit 1; }};; erase) rm {0};; esac",
            kept.display()
        );
        helper(temp.path(), "file", &script);
        write(&temp.path().join("docker/config.json"), r#"{"credsStore":"file"}"#);
        let keychain = keychain(temp.path());
        let place = Kept::Helper("docker-credential-file".into());
        assert_eq!(keychain.store("h.test", "u", &Secret::new("\"quoted\"")).await.unwrap(), place);
        assert_eq!(show(keychain.get("h.test", "a").await), "u:\"quoted\"");
        assert_eq!(keychain.erase("h.test").await.unwrap(), [place]);
        assert!(!kept.exists());
        assert!(!std::fs::read_to_string(temp.path().join("docker/config.json")).unwrap().contains("auths"));
    }

    #[test]
    fn names_and_secrecy() {
        let rows = [
            ("docker.io", "docker.io"),
            ("https://index.docker.io/v1/", "docker.io"),
            ("", "docker.io"),
            ("https://h.test/v2/", "h.test"),
            ("h.test:5000/org", "h.test:5000"),
        ];
        for (text, expected) in rows {
            assert_eq!(registry_name(text), expected);
        }
        let credential = Credential::Password { username: "u".into(), password: Secret::new("hunter2") };
        assert!(!format!("{credential:?}").contains("hunter2"));
    }
}
