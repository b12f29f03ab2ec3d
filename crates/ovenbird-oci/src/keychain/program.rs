//! Credential helpers: programs named `docker-credential-NAME` that keep credentials elsewhere.
//! Source: the docker-credential-helpers protocol.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::docker::key_of;
use super::{Credential, KeychainError, MAX_DOCUMENT, Secret};

/// How long a helper may take: it may ask the user for a fingerprint, but it must not hang a build.
const HELPER_TIMEOUT: Duration = Duration::from_secs(30);

/// How helpers are found and how long they may take.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Helpers<'a> {
    pub(super) search_path: Option<&'a OsStr>,
    pub(super) timeout: Option<Duration>,
}

impl Helpers<'_> {
    /// What a helper knows of a registry. `path` named the helper.
    pub(super) async fn ask(&self, path: &Path, name: &str, registry: &str) -> Result<Option<Credential>, KeychainError> {
        let answer = self.run(path, name, "get", key_of(registry).into_bytes()).await?;
        let Some(stdout) = answer.stdout else { return Ok(None) };
        let failed = |reason: &str| KeychainError::HelperFailed { program: answer.program.clone(), verb: "get", reason: reason.into() };
        // The parser's own message could quote the secret.
        let Ok(Value::Object(said)) = serde_json::from_slice(&stdout) else { return Err(failed("its answer is not a JSON object")) };
        let text = |key: &str| said.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (username, secret) = (text("Username"), Secret::new(text("Secret")));
        Ok(match username.as_str() {
            _ if secret.expose().is_empty() => None,
            "<token>" => Some(Credential::IdentityToken(secret)),
            _ => Some(Credential::Password { username, password: secret }),
        })
    }

    pub(super) async fn run(&self, path: &Path, name: &str, verb: &'static str, input: Vec<u8>) -> Result<Answer, KeychainError> {
        if name.is_empty() || name.contains(['/', '\\', '\0']) || name.starts_with('.') {
            return Err(KeychainError::HelperName { path: path.into(), name: name.into() });
        }
        let program = format!("docker-credential-{name}");
        let missing = || KeychainError::HelperMissing { program: program.clone(), path: path.into() };
        let failed = |reason: String| KeychainError::HelperFailed { program: program.clone(), verb, reason };
        let executable = match self.search_path {
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
        let text = crate::registry::printable(&scrub(&text, &input));
        Err(failed(if text.is_empty() { status.to_string() } else { format!("{status}: {text}") }))
    }
}

/// What a helper says about a failure, without the secret that it was given.
fn scrub(text: &str, input: &[u8]) -> String {
    let Ok(Value::Object(given)) = serde_json::from_slice::<Value>(input) else { return text.to_owned() };
    match given.get("Secret").and_then(Value::as_str).filter(|secret| !secret.is_empty()) {
        Some(secret) => text.replace(secret, "***"),
        None => text.to_owned(),
    }
}

pub(super) struct Answer {
    pub(super) program: String,
    /// `None`: the helper knows no credentials.
    pub(super) stdout: Option<Vec<u8>>,
}
