//! Credential helpers: programs named `docker-credential-NAME` that keep credentials elsewhere.
//! Source: the docker-credential-helpers protocol.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};

use super::docker::key_of;
use super::{Credential, KeychainError, MAX_DOCUMENT, Secret};

/// How long a helper may take: it may ask the user for a fingerprint, but it must not hang a build.
const HELPER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the rest of its answer may take when it has ended.
const GRACE: Duration = Duration::from_millis(200);
/// Most bytes that are read of its complaints.
const MAX_COMPLAINT: u64 = 64 << 10;
/// What every helper that has nothing writes to its output. Source: docker-credential-helpers, `credentials/error.go`.
const NOT_FOUND: &str = "credentials not found in native keychain";

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
        let text = |key: &str| match said.get(key) {
            None | Some(Value::Null) => Ok(String::new()),
            Some(Value::String(text)) => Ok(text.clone()),
            Some(_) => Err(failed(&format!("`{key}` of its answer is no text"))),
        };
        let (username, secret) = (text("Username")?, Secret::new(text("Secret")?));
        Ok(match username.as_str() {
            "" if secret.expose().is_empty() => None,
            _ if secret.expose().is_empty() => return Err(failed("its answer has a `Username` and no `Secret`")),
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
        command.arg(verb).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().map_err(|e| if e.kind() == io::ErrorKind::NotFound { missing() } else { failed(e.to_string()) })?;
        let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (mut said, mut complaint) = (vec![], vec![]);
        let timeout = self.timeout.unwrap_or(HELPER_TIMEOUT);
        let ended = {
            let talk = async {
                let told = async {
                    if let Some(mut stdin) = stdin {
                        // A helper that does not read is judged by its exit code.
                        let _ = stdin.write_all(&input).await;
                    }
                };
                tokio::join!(told, collect(stdout, MAX_DOCUMENT, &mut said), collect(stderr, MAX_COMPLAINT, &mut complaint));
            };
            let mut talk = std::pin::pin!(talk);
            let ended = tokio::time::timeout(timeout, async {
                let mut all_said = false;
                loop {
                    tokio::select! {
                        status = child.wait() => break status.map(|status| (status, all_said)),
                        () = &mut talk, if !all_said => all_said = true,
                    }
                }
            })
            .await;
            if let Ok(Ok((_, false))) = ended {
                // What it wrote is in the pipes by now; their ends may stay open in a process that it left behind.
                let _ = tokio::time::timeout(GRACE, talk).await;
            }
            ended
        };
        let status = match ended {
            Ok(Ok((status, _))) => status,
            Ok(Err(e)) => return Err(failed(e.to_string())),
            Err(_) => return Err(failed(format!("it gave no answer in {} s", timeout.as_secs()))),
        };
        if status.success() {
            return Ok(Answer { program, stdout: Some(said) });
        }
        // Nothing else of it is shown or judged: it is where secrets stand.
        if String::from_utf8_lossy(&said).lines().any(|line| line.trim() == NOT_FOUND) {
            return Ok(Answer { program, stdout: None });
        }
        let text = one_line(&scrub(&String::from_utf8_lossy(&complaint), &input));
        Err(failed(if text.is_empty() { status.to_string() } else { format!("{status}: {text}") }))
    }
}

/// Reads a pipe to its end, or to the limit. What is there already stays when it is dropped.
async fn collect(pipe: Option<impl AsyncRead + Unpin>, limit: u64, into: &mut Vec<u8>) {
    let Some(pipe) = pipe else { return };
    let mut pipe = pipe.take(limit);
    while pipe.read_buf(into).await.is_ok_and(|count| count > 0) {}
}

/// The first line that says something, of at most 200 characters, with control characters escaped.
fn one_line(text: &str) -> String {
    let line = text.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default();
    line.chars().take(200).map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() }).collect()
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
