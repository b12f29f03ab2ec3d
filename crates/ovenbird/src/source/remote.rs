//! Contexts that are not on this machine: a repository, a file on a web server, an artifact.
//!
//! Whoever typed the address is the user, so their ways to git servers count; what comes from there is foreign. A password in an address, or
//! a token given as a secret, goes to the server of the address and nowhere else.

use std::fs::{self, File};
use std::io::{Seek as _, SeekFrom};
use std::path::PathBuf;
use std::time::SystemTime;

use ovenbird_engine::Event;
use ovenbird_engine::frontend::git_url::{self, GitSource};
use ovenbird_engine::ops::remote::download::{self, DownloadError};
use ovenbird_engine::ops::remote::repository::{Access, GitError, Repository, Watch, basic};
use ovenbird_engine::plan::GitOp;
use ovenbird_oci::beside;
use serde::{Deserialize, Serialize};

use super::archive::{self, Unpacked};
use super::bundle::Bundle;
use super::{Fetcher, SourceError, artifact};
use crate::builder::Job;
use crate::error::{Error, Kind};
use crate::naming::Version;
use crate::request::{BuildRequest, RemoteUrl, SecretOrigin, SecretSpec};

/// The commit that a context is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Revision {
    /// The repository, without credentials.
    pub url: String,
    /// Full commit.
    pub commit: String,
    /// The branch that it was found by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<String>,
    /// Tag of the commit; of several, the highest version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// What was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// Folder of the repository.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subdir: Option<String>,
    /// When it was committed, seconds since 1970.
    pub time: i64,
}

/// A context that was fetched.
#[derive(Debug)]
pub(super) struct Got {
    /// What is removed when it is no longer needed.
    pub(super) folder: beside::Folder,
    /// The context.
    pub(super) dir: PathBuf,
    /// A Dockerfile instead of a context.
    pub(super) dockerfile: Option<String>,
    /// Of a repository.
    pub(super) revision: Option<Revision>,
    /// Of the commit or the file, seconds since 1970.
    pub(super) time: Option<i64>,
    /// A whole source, Dockerfile and all, instead of one context.
    pub(super) bundle: Option<Bundle>,
}

/// Fetches the context at an address. `main`: the context of the build, not a named one.
pub(super) fn fetch(fetcher: &Fetcher, url: &RemoteUrl, main: bool, request: &BuildRequest, job: &Job) -> Result<Got, Error> {
    let place = Place { fetcher, url, request, job };
    let (credentials, address) = url.split_credentials();
    // As Docker has it.
    let address = match address.strip_prefix("github.com/") {
        Some(rest) => format!("https://github.com/{}", with_git(rest)),
        None => address,
    };
    if let Some(name) = address.strip_prefix("oci://") {
        return artifact::pull(fetcher, name, url, job);
    }
    if let Some(layout) = address.strip_prefix("oci-layout://") {
        return artifact::read(fetcher, layout, url, job);
    }
    match git_url::parse_context(&address) {
        Some(git) => {
            let git = git.map_err(|reason| place.refused(reason))?;
            place.repository(&git, credentials, main)
        }
        None if address.to_ascii_lowercase().starts_with("http") => place.download(&address, credentials, main),
        None => Err(place.refused("it names no git repository".into())),
    }
}

/// `a/b#ref` to `a/b.git#ref`.
fn with_git(path: &str) -> String {
    let end = path.find(['?', '#']).unwrap_or(path.len());
    let (path, rest) = path.split_at(end);
    format!("{}.git{rest}", path.trim_end_matches('/').trim_end_matches(".git"))
}

struct Place<'a> {
    fetcher: &'a Fetcher,
    url: &'a RemoteUrl,
    request: &'a BuildRequest,
    job: &'a Job,
}

impl Place<'_> {
    fn refused(&self, reason: String) -> Error {
        SourceError::Address { url: self.url.to_string(), reason }.into()
    }

    fn failed(&self, reason: String, hint: Option<&str>) -> Error {
        let error: Error = SourceError::Remote { url: self.url.to_string(), reason }.into();
        if let Some(hint) = hint { error.hint(hint) } else { error }
    }

    /// Secrets of the request whose names begin so.
    fn secrets(&self, beginnings: &[&str]) -> Result<impl Fn(&str) -> Option<String> + use<>, Error> {
        let is_wanted = |spec: &&SecretSpec| beginnings.iter().any(|beginning| spec.id.starts_with(beginning));
        let specs: Vec<SecretSpec> = self.request.secrets.iter().filter(is_wanted).cloned().collect();
        let found = crate::builder::secrets(&specs, &self.fetcher.environment)?;
        let mut values = std::collections::BTreeMap::new();
        for (id, source) in found {
            let value = source.read().map_err(|error| Error::from_chain(Kind::Source, &error).while_doing(format!("secret {id:?}")))?;
            values.insert(id, String::from_utf8_lossy(&value).trim().to_owned());
        }
        Ok(move |name: &str| values.get(name).cloned())
    }

    fn repository(&self, git: &GitSource, credentials: Option<(String, String)>, main: bool) -> Result<Got, Error> {
        let keep =
            |name: &str| self.request.build_args.get(name).is_some_and(|value| matches!(value.as_str(), "1" | "true" | "True" | "TRUE"));
        let op = GitOp {
            url: git.url.clone(),
            reference: git.reference.clone(),
            subdir: git.subdir.clone(),
            keep_git_dir: git.keep_git_dir.unwrap_or_else(|| main && keep("BUILDKIT_CONTEXT_KEEP_GIT_DIR")),
            checksum: git.checksum.clone(),
            submodules: git.submodules.unwrap_or(true),
        };
        let agent = crate::builder::agents(&self.request.ssh, &self.fetcher.environment)?.remove("default");
        // What holds a secret of the build is for its steps.
        let secret = |name: &str| {
            self.request.secrets.iter().any(|spec| match &spec.origin {
                SecretOrigin::Env(variable) => variable == name,
                SecretOrigin::ById => spec.id == name,
                SecretOrigin::File(_) => false,
            })
        };
        let variables = self.fetcher.environment.iter().filter(|(name, _)| !secret(name));
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        let authorization = credentials.map(|(user, password)| basic(&user, &password));
        let access = Access { authorization, agent, user: Some(variables) }.with_secrets(&op.url, self.secrets(&["GIT_AUTH_"])?);
        let say = |text: &str| {
            for line in text.lines().filter(|line| !line.trim().is_empty()) {
                self.job.sink.emit(Event::Message { text: format!("git: {line}") });
            }
        };
        let stopped = || self.job.cancel.is_cancelled();
        let fail = |error: GitError| match error {
            GitError::Stopped => Error::new(Kind::Cancelled, "the build was cancelled"),
            error => {
                let said = error.to_string();
                self.failed(said.clone(), hint(&said))
            }
        };
        self.job.sink.emit(Event::Message { text: format!("fetching {}", self.url) });
        let folder = self.fetcher.folder()?;
        let dir = folder.path().join("checkout");
        fs::create_dir(&dir).map_err(|source| SourceError::Read { what: dir.display().to_string(), source })?;
        let repository = Repository::open(&op, &access, Watch { say: &say, stopped: &stopped }).map_err(fail)?;
        let resolved = repository.resolve().map_err(fail)?;
        let done = repository.check_out(&resolved, &dir).map_err(fail)?;
        if let Some((first, count)) = &done.pointers {
            let message = format!(
                "{count} files of {} are in Git LFS, which is not installed, so the context has pointers in their place, for example {first:?}; \
                 install git-lfs",
                self.url
            );
            self.job.sink.emit(Event::Warning { code: "git-lfs".into(), message, line: None });
        }
        let revision = Revision {
            url: op.url.clone(),
            tag: highest(resolved.tags),
            branch: resolved.branch,
            reference: op.reference.clone(),
            subdir: op.subdir.clone(),
            time: done.time,
            commit: done.commit,
        };
        self.job.sink.emit(Event::Message { text: format!("{} is at commit {}", self.url, revision.commit) });
        Ok(Got { dir: done.folder, folder, dockerfile: None, time: Some(revision.time), revision: Some(revision), bundle: None })
    }

    fn download(&self, address: &str, credentials: Option<(String, String)>, main: bool) -> Result<Got, Error> {
        let host = ovenbird_engine::ops::remote::host_of(address);
        let secret = self.secrets(&["HTTP_AUTH_"])?;
        let authorization = secret(&format!("HTTP_AUTH_HEADER_{host}"))
            .or_else(|| secret(&format!("HTTP_AUTH_TOKEN_{host}")).map(|token| format!("Bearer {token}")))
            .or_else(|| credentials.map(|(user, password)| basic(&user, &password)));
        let folder = self.fetcher.folder()?;
        let path = folder.path().join("download");
        let io = |source| SourceError::Read { what: path.display().to_string(), source };
        let mut file = File::options().read(true).write(true).create_new(true).open(&path).map_err(io)?;
        let watch = |current, total, done| {
            let label = format!("downloading {}", self.url);
            self.job.sink.emit(Event::Progress { id: label.clone(), label, current, total, done });
            !self.job.cancel.is_cancelled()
        };
        let transfer = async {
            download::fetch(address, authorization.as_deref(), &mut file, &watch).await.map_err(|error| match error {
                DownloadError::Stopped => Error::new(Kind::Cancelled, "the build was cancelled"),
                error => {
                    let hint = matches!(&error, DownloadError::Status { status } if status.starts_with("404"))
                        .then_some("for a git repository the path must end in .git");
                    self.failed(error.to_string(), hint)
                }
            })
        };
        let got = self.fetcher.until_cancelled(self.job, transfer)?;
        file.seek(SeekFrom::Start(0)).map_err(io)?;
        let dir = folder.path().join("context");
        let unpacked = archive::unpack(&mut file, &self.url.to_string(), &dir)?;
        let dockerfile = match unpacked {
            Unpacked::Context => None,
            Unpacked::Dockerfile(text) if main => Some(text),
            Unpacked::Dockerfile(_) => {
                return Err(self.failed("it is no archive, as a named context from a web server must be".into(), None));
            }
            Unpacked::Empty => return Err(self.failed("it is empty: expected a tar archive or a Dockerfile".into(), None)),
        };
        drop(file);
        let _ = fs::remove_file(&path);
        let time = got.modified.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
        Ok(Got { dir, folder, dockerfile, revision: None, time: time.and_then(|time| i64::try_from(time.as_secs()).ok()), bundle: None })
    }
}

/// The tag with the highest version; of tags that are none, the last.
fn highest(tags: Vec<String>) -> Option<String> {
    let versioned = tags.iter().filter_map(|tag| Some((Version::parse(tag)?, tag))).max_by(|a, b| a.0.cmp(&b.0));
    match versioned {
        Some((_, tag)) => Some(tag.clone()),
        None => tags.into_iter().next_back(),
    }
}

/// What helps against the usual refusals.
fn hint(said: &str) -> Option<&'static str> {
    let any = |words: &[&str]| words.iter().any(|word| said.contains(word));
    if any(&["could not read Username", "could not read Password", "Authentication failed", "terminal prompts disabled", "403", "401"]) {
        Some("give a token with `--secret id=GIT_AUTH_TOKEN,env=NAME`, or set up a git credential helper for this host")
    } else if any(&["Host key verification failed"]) {
        Some("the host is not among your known hosts: connect to it once with ssh, and check its key")
    } else if any(&["Permission denied (publickey"]) {
        Some("add a key that the server knows to your ssh agent, or name an agent with `--ssh default=SOCKET`")
    } else if any(&["transport 'file' not allowed"]) {
        Some("a submodule is on this machine: clone the repository with it, and build the folder")
    } else if any(&["dubious ownership"]) {
        Some("the repository belongs to another user: say that you trust it with `git config --global --add safe.directory PATH`")
    } else if any(&["git command is not installed"]) {
        Some("install git")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_repositories() {
        for (path, expect) in
            [("a/b", "a/b.git"), ("a/b.git", "a/b.git"), ("a/b#main:x", "a/b.git#main:x"), ("a/b/?ref=x", "a/b.git?ref=x")]
        {
            assert_eq!(with_git(path), expect);
        }
        let tags = |tags: &[&str]| highest(tags.iter().map(|tag| (*tag).to_owned()).collect());
        assert_eq!(tags(&["v1.10.0", "v1.9.0", "zebra"]).as_deref(), Some("v1.10.0"));
        assert_eq!(tags(&["a", "b"]).as_deref(), Some("b"));
        assert_eq!(tags(&[]), None);
    }
}
