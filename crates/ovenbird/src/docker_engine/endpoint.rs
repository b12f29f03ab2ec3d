//! Where the Docker Engine is: variables, contexts and the default socket, in the order of Docker's own client.
//!
//! `DOCKER_HOST`, `DOCKER_CONTEXT`, `currentContext` of `config.json`, the default socket. It reads files of Docker's client
//! and connects to nothing.
//!
//! ```text
//! config.json                              {"currentContext": NAME}
//! contexts/meta/SHA256(NAME)/meta.json     {"Name", "Endpoints": {"docker": {"Host", "SkipTLSVerify"}}}
//! contexts/tls/SHA256(NAME)/docker/        ca.pem, cert.pem, key.pem
//! ```

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use ovenbird_oci::Digest;
use serde::Deserialize;

use super::DockerEngineError;

/// Largest file of Docker's client that is read.
const MAX_FILE: u64 = 1024 * 1024;
/// Where an engine listens when nothing says otherwise.
const DEFAULT_SOCKET: &str = "/var/run/docker.sock";

/// What the environment says of the engine; see [`crate::settings::Settings`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DockerSettings {
    /// `DOCKER_HOST`.
    pub host: Option<String>,
    /// `DOCKER_CONTEXT`.
    pub context: Option<String>,
    /// `DOCKER_TLS_VERIFY` is set.
    pub tls_verify: bool,
    /// `DOCKER_TLS` is set: encrypted, but the engine may be anyone.
    pub tls: bool,
    /// `DOCKER_CERT_PATH`.
    pub certificates: Option<PathBuf>,
    /// Folder of Docker's `config.json`.
    pub config: Option<PathBuf>,
    /// `DOCKER_BUILDKIT`: which of its two builders the engine is to use.
    pub buildkit: Option<bool>,
}

/// How an engine is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// A socket of this machine.
    Unix(PathBuf),
    /// `HOST:PORT`, unencrypted.
    Tcp(String),
    /// `HOST:PORT`, encrypted, both sides with certificates.
    Tls {
        /// `HOST:PORT`.
        address: String,
        /// Folder with `ca.pem`, `cert.pem` and `key.pem`.
        certificates: PathBuf,
    },
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp://{address}"),
            Self::Tls { address, .. } => write!(f, "tcp://{address} (TLS)"),
        }
    }
}

#[derive(Deserialize)]
struct ClientConfig {
    #[serde(default, rename = "currentContext")]
    current_context: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Meta {
    #[serde(default)]
    endpoints: Endpoints,
}

#[derive(Deserialize, Default)]
struct Endpoints {
    docker: Option<DockerEndpoint>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerEndpoint {
    #[serde(default)]
    host: String,
    #[serde(default, rename = "SkipTLSVerify")]
    skip_tls_verify: bool,
}

fn wrong(what: impl Into<String>, reason: impl Into<String>) -> DockerEngineError {
    DockerEngineError::Configuration { what: what.into(), reason: reason.into() }
}

impl DockerSettings {
    /// The engine that is meant.
    pub fn endpoint(&self) -> Result<Endpoint, DockerEngineError> {
        if let Some(host) = &self.host {
            return self.of_variables(host);
        }
        let (name, said_by) = match &self.context {
            Some(name) => (name.clone(), "DOCKER_CONTEXT".to_owned()),
            None => match self.current_context()? {
                Some((name, file)) => (name, format!("currentContext in {}", file.display())),
                None => return Ok(Endpoint::Unix(DEFAULT_SOCKET.into())),
            },
        };
        if name == "default" {
            return Ok(Endpoint::Unix(DEFAULT_SOCKET.into()));
        }
        self.of_context(&name, &said_by)
    }

    fn of_variables(&self, host: &str) -> Result<Endpoint, DockerEngineError> {
        let certificates = if self.tls_verify {
            let dir = self.certificates.clone().or_else(|| self.config.clone());
            Some(dir.ok_or_else(|| wrong("DOCKER_TLS_VERIFY is set", "DOCKER_CERT_PATH does not say where the certificates are"))?)
        } else if self.tls {
            return Err(wrong(
                "DOCKER_TLS is set without DOCKER_TLS_VERIFY",
                "an engine that is not verified could be anyone's; set DOCKER_TLS_VERIFY=1 and DOCKER_CERT_PATH",
            ));
        } else {
            None
        };
        endpoint("DOCKER_HOST", host, certificates)
    }

    fn current_context(&self) -> Result<Option<(String, PathBuf)>, DockerEngineError> {
        let Some(file) = self.config.as_ref().map(|dir| dir.join("config.json")) else { return Ok(None) };
        let Some(text) = read(&file)? else { return Ok(None) };
        let config: ClientConfig = serde_json::from_slice(&text).map_err(|e| wrong(file.display().to_string(), e.to_string()))?;
        Ok(Some(config.current_context).filter(|name| !name.is_empty()).map(|name| (name, file)))
    }

    fn of_context(&self, name: &str, said_by: &str) -> Result<Endpoint, DockerEngineError> {
        let missing = |reason: &str| {
            wrong(format!("the docker context {name:?} ({said_by})"), format!("{reason}; `docker context ls` lists those that there are"))
        };
        let dir = self.config.as_ref().ok_or_else(|| missing("there is no folder of Docker's client"))?.join("contexts");
        // Docker's client names the folders so.
        let key = Digest::of(name.as_bytes()).hex();
        let file = dir.join("meta").join(&key).join("meta.json");
        let text = read(&file)?.ok_or_else(|| missing("it does not exist"))?;
        let meta: Meta = serde_json::from_slice(&text).map_err(|e| wrong(file.display().to_string(), e.to_string()))?;
        let docker = meta.endpoints.docker.ok_or_else(|| missing("it names no Docker Engine"))?;
        if docker.skip_tls_verify {
            return Err(wrong(
                format!("the docker context {name:?}"),
                "it skips the verification of certificates (SkipTLSVerify), which is not supported: an engine that is not verified could be anyone's",
            ));
        }
        let material = dir.join("tls").join(&key).join("docker");
        let certificates = material.join("ca.pem").exists().then_some(material);
        if docker.host.is_empty() {
            return Ok(Endpoint::Unix(DEFAULT_SOCKET.into()));
        }
        endpoint(&format!("the docker context {name:?}"), &docker.host, certificates)
    }
}

/// Reads an address as Docker's client does.
fn endpoint(said_by: &str, host: &str, certificates: Option<PathBuf>) -> Result<Endpoint, DockerEngineError> {
    let is = |reason: &str| wrong(format!("{said_by} is {host:?}"), reason);
    if let Some(path) = host.strip_prefix("unix://") {
        return if path.starts_with('/') { Ok(Endpoint::Unix(path.into())) } else { Err(is("expected unix:///PATH")) };
    }
    if host.starts_with("ssh://") {
        return Err(is("an engine over ssh is not supported; build on that machine with `ovenbird build --on ssh://…`, \
                       or forward its socket: `ssh -nNT -L /tmp/docker.sock:/var/run/docker.sock HOST` and DOCKER_HOST=unix:///tmp/docker.sock"));
    }
    let address = ["tcp://", "http://", "https://"].iter().find_map(|scheme| host.strip_prefix(scheme));
    let address = address.map(|a| a.trim_end_matches('/')).filter(|a| !a.is_empty() && !a.contains(['/', '@', '?', '#']));
    let Some(address) = address else { return Err(is("expected unix:///PATH or tcp://HOST:PORT")) };
    let encrypted = certificates.is_some() || host.starts_with("https://");
    let port = if encrypted { 2376 } else { 2375 };
    let address = if has_port(address) { address.to_owned() } else { format!("{address}:{port}") };
    match (encrypted, certificates) {
        (false, _) => Ok(Endpoint::Tcp(address)),
        (true, Some(certificates)) => Ok(Endpoint::Tls { address, certificates }),
        (true, None) => Err(is("TLS needs certificates; set DOCKER_TLS_VERIFY=1 and DOCKER_CERT_PATH")),
    }
}

fn has_port(address: &str) -> bool {
    // `[::1]` has colons and no port.
    address.rsplit_once(':').is_some_and(|(_, port)| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()))
        && !address.ends_with(']')
}

/// A file of Docker's client, when there is one.
fn read(path: &Path) -> Result<Option<Vec<u8>>, DockerEngineError> {
    let told = |error: io::Error| wrong(path.display().to_string(), error.to_string());
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(told)?,
    };
    let mut text = vec![];
    file.take(MAX_FILE + 1).read_to_end(&mut text).map_err(told)?;
    if text.len() as u64 > MAX_FILE {
        return Err(wrong(path.display().to_string(), "it is larger than 1 MiB"));
    }
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(dir: &Path, name: &str, text: &str, tls: bool) {
        let key = Digest::of(name.as_bytes()).hex();
        let meta = dir.join("contexts/meta").join(&key);
        std::fs::create_dir_all(&meta).unwrap();
        std::fs::write(meta.join("meta.json"), text).unwrap();
        if tls {
            let material = dir.join("contexts/tls").join(&key).join("docker");
            std::fs::create_dir_all(&material).unwrap();
            std::fs::write(material.join("ca.pem"), "").unwrap();
        }
    }

    #[test]
    fn which_engine_is_meant() {
        let dir = tempfile::tempdir().unwrap();
        let meta = |host: &str, more: &str| format!("{{\"Name\":\"n\",\"Endpoints\":{{\"docker\":{{\"Host\":\"{host}\"{more}}}}}}}");
        context(dir.path(), "far", &meta("tcp://far:2376", ""), true);
        context(dir.path(), "near", &meta("unix:///run/near.sock", ",\"SkipTLSVerify\":false"), false);
        context(dir.path(), "loose", &meta("tcp://far:2376", ",\"SkipTLSVerify\":true"), true);
        context(dir.path(), "shell", &meta("ssh://me@far", ""), false);
        context(dir.path(), "odd", "{", false);
        context(dir.path(), "kube", "{\"Name\":\"n\",\"Endpoints\":{\"kubernetes\":{}}}", false);
        // host, context, currentContext, TLS verify, what comes of it
        for (host, context, current, verify, expect) in [
            ("", "", "", false, "unix:///var/run/docker.sock"),
            ("", "", "near", false, "unix:///run/near.sock"),
            ("", "far", "near", false, "tcp://far:2376 (TLS)"),
            ("", "default", "near", false, "unix:///var/run/docker.sock"),
            ("unix:///x.sock", "far", "near", false, "unix:///x.sock"),
            ("tcp://h", "", "", false, "tcp://h:2375"),
            ("tcp://h/", "", "", true, "tcp://h:2376 (TLS)"),
            ("tcp://[::1]", "", "", false, "tcp://[::1]:2375"),
            ("tcp://[::1]:99", "", "", false, "tcp://[::1]:99"),
            ("http://h:1", "", "", false, "tcp://h:1"),
            ("https://h:1", "", "", false, "! DOCKER_HOST is \"https://h:1\": TLS needs certificates"),
            ("ssh://h", "", "", false, "! DOCKER_HOST is \"ssh://h\": an engine over ssh is not supported"),
            ("tcp://u:p@h", "", "", false, "! DOCKER_HOST is \"tcp://u:p@h\": expected"),
            ("unix://x", "", "", false, "! DOCKER_HOST is \"unix://x\": expected unix:///PATH"),
            ("npipe:////./pipe", "", "", false, "! DOCKER_HOST is \"npipe:////./pipe\": expected"),
            ("", "gone", "", false, "! the docker context \"gone\" (DOCKER_CONTEXT): it does not exist"),
            ("", "../far", "", false, "! the docker context \"../far\" (DOCKER_CONTEXT): it does not exist"),
            ("", "", "loose", false, "! the docker context \"loose\": it skips the verification"),
            ("", "", "shell", false, "! the docker context \"shell\" is \"ssh://me@far\": an engine over ssh"),
            ("", "", "kube", false, "! the docker context \"kube\" (currentContext in DIR/config.json): it names no Docker Engine"),
            ("", "", "odd", false, "! DIR/contexts/meta/"),
        ] {
            std::fs::write(dir.path().join("config.json"), format!("{{\"currentContext\":{current:?},\"auths\":{{}}}}")).unwrap();
            let said = |text: &str| Some(text.to_owned()).filter(|t| !t.is_empty());
            let settings = DockerSettings {
                host: said(host),
                context: said(context),
                tls_verify: verify,
                config: Some(dir.path().into()),
                ..DockerSettings::default()
            };
            let got = settings.endpoint().map_or_else(|e| format!("! {e}"), |e| e.to_string());
            let got = got.replace(&dir.path().display().to_string(), "DIR");
            assert!(got.starts_with(expect), "{host} {context} {current}: {got}");
        }
        let unverified = DockerSettings { host: Some("tcp://h".into()), tls: true, ..DockerSettings::default() };
        assert!(unverified.endpoint().is_err_and(|e| e.to_string().contains("DOCKER_TLS_VERIFY")));
        assert_eq!(DockerSettings::default().endpoint(), Ok(Endpoint::Unix(DEFAULT_SOCKET.into())));
    }
}
