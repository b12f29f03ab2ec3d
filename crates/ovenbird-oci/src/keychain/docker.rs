//! The format of docker's `config.json`, podman's `auth.json`, Kubernetes' `.dockerconfigjson` and the older `.dockercfg`.
//!
//! It must not know where such files are, and starts no program.
//! Sources: docker/cli `config.json`, containers-auth.json(5), Kubernetes' secret types `kubernetes.io/dockerconfigjson` and
//! `kubernetes.io/dockercfg`.

use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use base64::Engine;
use serde_json::{Map, Value};

use super::{BASE64, Credential, KeychainError, MAX_DOCUMENT, Secret};
use crate::regular_file::{self, Links};

/// The key that Docker has always used for Docker Hub.
pub(super) const HUB_KEY: &str = "https://index.docker.io/v1/";

/// Names of such a file in a folder, the first that is there counts: Docker's own, and those of mounted Kubernetes secrets.
const NAMES: [&str; 3] = ["config.json", ".dockerconfigjson", OLD_NAME];
/// The form before `config.json`.
const OLD_NAME: &str = ".dockercfg";

/// Whether a file has the older form, with the registries at the top.
fn is_old(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name == OLD_NAME)
}

/// The file in a folder that is read, and written.
pub(super) fn file_in(folder: &Path) -> PathBuf {
    NAMES.iter().map(|name| folder.join(name)).find(|path| path.exists()).unwrap_or_else(|| folder.join(NAMES[0]))
}

/// The registry's name out of what people type at `login`: `https://index.docker.io/v1/` is `docker.io`.
pub fn registry_name(text: &str) -> String {
    let text = text.trim();
    let text = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")).unwrap_or(text);
    let host = text.split('/').next().unwrap_or(text);
    hub_name(host).to_owned()
}

pub(super) fn hub_name(host: &str) -> &str {
    if matches!(host, "" | "docker.io" | "index.docker.io" | "registry-1.docker.io") { "docker.io" } else { host }
}

/// The key under which docker keeps a registry.
pub(super) fn key_of(registry: &str) -> String {
    if registry == "docker.io" { HUB_KEY.into() } else { registry.into() }
}

/// Registry and repository prefix that a key of `auths` stands for. Keys with a scheme or an API version stand for a whole host.
pub(super) fn matching_key(key: &str) -> Option<(&str, &str)> {
    let bare = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"));
    let (host, path) = bare.unwrap_or(key).split_once('/').unwrap_or((bare.unwrap_or(key), ""));
    if host.is_empty() {
        return None;
    }
    let path = path.trim_end_matches('/');
    let whole_host = bare.is_some() || matches!(path, "v1" | "v2");
    Some((hub_name(host), if whole_host { "" } else { path }))
}

pub(super) fn helper_names(config: &Map<String, Value>, registry: &str) -> Vec<String> {
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

pub(super) fn from_auths(
    config: &Map<String, Value>,
    path: &Path,
    registry: &str,
    repository: &str,
) -> Result<Option<(Credential, String)>, KeychainError> {
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
        if let Some(credential) = from_entry(key, entry).map_err(|reason| KeychainError::Malformed { path: path.into(), reason })? {
            return Ok(Some((credential, key.to_owned())));
        }
    }
    Ok(None)
}

/// What one entry of `auths` says; nothing when it is empty, as Docker leaves it for what a helper keeps. A reason has no value in it.
fn from_entry(key: &str, entry: &Value) -> Result<Option<Credential>, String> {
    let fields = match entry {
        Value::Object(fields) => fields,
        Value::Null => return Ok(None),
        _ => return Err(format!("{key:?} of `auths` is no JSON object")),
    };
    let text = |name: &str| match fields.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.as_str()).filter(|text| !text.is_empty())),
        Some(_) => Err(format!("`{name}` of {key:?} is no text")),
    };
    let (identity, registry, auth) = (text("identitytoken")?, text("registrytoken")?, text("auth")?);
    let (username, password) = (text("username")?, text("password")?);
    if let Some(token) = identity {
        return Ok(Some(Credential::IdentityToken(Secret::new(token))));
    }
    if let Some(token) = registry {
        return Ok(Some(Credential::RegistryToken(Secret::new(token))));
    }
    let pair = |username: &str, password: &str| Credential::Password { username: username.into(), password: Secret::new(password) };
    if let Some(auth) = auth {
        let decoded = BASE64.decode(auth.trim()).ok().and_then(|bytes| String::from_utf8(bytes).ok());
        let halves = decoded.as_deref().and_then(|d| d.trim_end_matches('\0').split_once(':'));
        let (username, password) = halves.ok_or_else(|| format!("`auth` of {key:?} is not base64 of name:password"))?;
        return Ok(Some(pair(username, password)));
    }
    match (username, password) {
        (Some(username), Some(password)) => Ok(Some(pair(username, password))),
        (None, None) => Ok(None),
        (Some(_), None) => Err(format!("{key:?} has a `username` and no `password`")),
        (None, Some(_)) => Err(format!("{key:?} has a `password` and no `username`")),
    }
}

pub(super) fn read(path: &Path) -> Result<Option<Map<String, Value>>, KeychainError> {
    match regular_file::read(path, MAX_DOCUMENT, Links::Follow) {
        Ok(bytes) => parse(path, &bytes),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(e) => Err(KeychainError::read(path)(e)),
    }
}

/// Reads the text of such a file; `path` is for messages, and its name says which form it has.
pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Option<Map<String, Value>>, KeychainError> {
    let malformed = |reason: String| KeychainError::Malformed { path: path.into(), reason };
    if bytes.trim_ascii().is_empty() {
        return Ok(None);
    }
    // Only the place of the error: its text could quote a value.
    let value: Value =
        serde_json::from_slice(bytes).map_err(|e| malformed(format!("no JSON at line {}, column {}", e.line(), e.column())))?;
    let Value::Object(mut config) = value else { return Err(malformed("it is no JSON object".into())) };
    if is_old(path) && !config.contains_key("auths") {
        config = [("auths".to_owned(), Value::Object(config))].into_iter().collect();
    }
    for key in ["auths", "credHelpers"] {
        if !matches!(config.get(key), None | Some(Value::Null | Value::Object(_))) {
            return Err(malformed(format!("`{key}` is no JSON object")));
        }
    }
    let helpers = config.get("credHelpers").and_then(Value::as_object).into_iter().flatten().map(|(key, name)| (key.as_str(), name));
    for (key, name) in helpers.chain(config.get("credsStore").map(|name| ("credsStore", name))) {
        if !matches!(name, Value::Null | Value::String(_)) {
            return Err(malformed(format!("the helper of {key:?} is no text")));
        }
    }
    Ok(Some(config))
}

/// Changes a configuration file atomically, under a lock against other Ovenbirds. `change` says whether the file has the right form.
pub(super) fn edit(path: &Path, change: impl FnOnce(&mut Map<String, Value>) -> bool) -> Result<(), KeychainError> {
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
    if is_old(&target)
        && let Some(Value::Object(auths)) = config.remove("auths")
    {
        config = auths;
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
