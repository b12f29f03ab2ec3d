//! What the git repository around a folder says about it: commit, branch, tag.
//!
//! The repository is foreign: only commands that read refs are run, which start no program that its configuration names; hooks, file monitors
//! and fetching of missing objects are off besides, and the user's own configuration plays no part.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use ovenbird_engine::ops::remote::repository::hardened;

/// Longest time of one command: refs are small files, but a hostile one may be a pipe.
const LIMIT: Duration = Duration::from_secs(10);
/// Most bytes that are read of an answer: the tags of one commit.
const MAX_ANSWER: u64 = 1 << 20;
/// Digits of a short commit. Git's own choice depends on how much of the history a clone has.
const SHORT: usize = 12;

/// Where a folder stands in its repository.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// Commit.
    pub sha: String,
    /// Branch that is checked out; `None` when the head is detached, as in many CI systems.
    pub branch: Option<String>,
    /// Tag of the commit; of several, the highest version.
    pub tag: Option<String>,
}

impl Head {
    /// The first digits of the commit.
    pub fn short(&self) -> &str {
        self.sha.get(..SHORT).unwrap_or(&self.sha)
    }
}

/// Why git gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum GitError {
    /// Git cannot be run.
    #[error("git cannot be run: {source}; install it")]
    Program {
        /// Why.
        source: std::io::Error,
    },
    /// In a repository without a commit.
    #[error("the git repository of {} has no commit yet; commit something", dir.display())]
    NoCommit {
        /// The folder.
        dir: PathBuf,
    },
    /// In a repository that git cannot read.
    #[error("git cannot read the repository of {}: {said}; repair it", dir.display())]
    Unreadable {
        /// The folder.
        dir: PathBuf,
        /// What git said, a line of it.
        said: String,
    },
    /// Not in a repository.
    #[error("{} is in no git repository ({said})", dir.display())]
    NoRepository {
        /// The folder.
        dir: PathBuf,
        /// What git said, a line of it.
        said: String,
    },
    /// No answer.
    #[error("git gave no answer about {} in {} seconds", dir.display(), LIMIT.as_secs())]
    Silent {
        /// The folder.
        dir: PathBuf,
    },
}

/// Asks about the repository that a folder is in.
pub fn head(dir: &Path) -> Result<Head, GitError> {
    let unreadable = |said: String| GitError::Unreadable { dir: dir.to_owned(), said };
    let sha = match run(dir, &["rev-parse", "--verify", "--end-of-options", "HEAD^{commit}"])? {
        Ok(text) => text.trim().to_owned(),
        Err(said) if said.starts_with("not a git repository") => return Err(GitError::NoRepository { dir: dir.to_owned(), said }),
        // So it says both of a branch without a commit and of a commit that is not there.
        Err(said) if said == "Needed a single revision" => {
            return Err(match run(dir, &["rev-parse", "--verify", "--end-of-options", "HEAD"])? {
                Ok(sha) => unreadable(format!("its commit {} is missing", sha.trim())),
                Err(_) => GitError::NoCommit { dir: dir.to_owned() },
            });
        }
        Err(said) => return Err(unreadable(said)),
    };
    if !(sha.len() >= 40 && sha.bytes().all(|b| b.is_ascii_hexdigit())) {
        return Err(unreadable("HEAD is no commit".into()));
    }
    let branch = run(dir, &["symbolic-ref", "--quiet", "--short", "HEAD"])?.ok().map(|text| text.trim().to_owned());
    let tags = run(dir, &["for-each-ref", "--points-at=HEAD", "--format=%(refname:strip=2)", "--sort=version:refname", "refs/tags"])?;
    let tag = tags.ok().and_then(|text| text.lines().last().map(str::to_owned));
    Ok(Head { sha, branch: branch.filter(|b| !b.is_empty()), tag: tag.filter(|t| !t.is_empty()) })
}

/// What a command prints, or the first line of its complaint.
fn run(dir: &Path, args: &[&str]) -> Result<Result<String, String>, GitError> {
    let program = |source| GitError::Program { source };
    let mut child = hardened(dir)
        .args(["--no-pager", "-c", "protocol.allow=never"])
        // Nothing that is run here does what the repository says, so its owner need not be trusted.
        .args(["-c", "safe.directory=*"])
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .env("GIT_NO_LAZY_FETCH", "1")
        .env("GIT_NO_REPLACE_OBJECTS", "1")
        .env("GIT_OPTIONAL_LOCKS", "0")
        .env("GIT_ALLOW_PROTOCOL", "none")
        .spawn()
        .map_err(program)?;
    let read = |pipe: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = vec![];
            let _ = pipe.map(|pipe| pipe.take(MAX_ANSWER).read_to_end(&mut bytes));
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let out = read(child.stdout.take().map(|pipe| Box::new(pipe) as _));
    let err = read(child.stderr.take().map(|pipe| Box::new(pipe) as _));
    let began = Instant::now();
    let status = loop {
        match child.try_wait().map_err(program)? {
            Some(status) => break status,
            None if began.elapsed() > LIMIT => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(GitError::Silent { dir: dir.to_owned() });
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    let (out, err) = (out.join().unwrap_or_default(), err.join().unwrap_or_default());
    if status.success() {
        return Ok(Ok(out));
    }
    let line = err.lines().next().unwrap_or("no reason given");
    Ok(Err(line.trim_start_matches("fatal: ").chars().filter(|c| !c.is_control()).take(200).collect()))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn git(dir: &Path, args: &[&str]) {
        let done = Command::new("git")
            .args(["-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main", "-C"])
            .arg(dir)
            .args(args)
            .output()
            .unwrap();
        assert!(done.status.success(), "{args:?}: {done:?}");
    }

    #[test]
    fn what_a_repository_says() {
        if Command::new("git").arg("version").output().is_err() {
            println!("SKIP what_a_repository_says: no git");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let said = |result: Result<Head, GitError>| result.map_err(|e| e.to_string());
        assert!(said(head(dir)).unwrap_err().contains("is in no git repository (not a git repository"));
        git(dir, &["init", "-q"]);
        assert!(said(head(dir)).unwrap_err().contains("has no commit yet"));
        let config = std::fs::read(dir.join(".git/config")).unwrap();
        std::fs::write(dir.join(".git/config"), "[broken").unwrap();
        let error = said(head(dir)).unwrap_err();
        assert!(error.contains("git cannot read the repository of") && error.contains("bad config"), "{error}");
        std::fs::write(dir.join(".git/config"), config).unwrap();
        std::fs::write(dir.join(".git/refs/heads/main"), format!("{}\n", "1".repeat(40))).unwrap();
        let error = said(head(dir)).unwrap_err();
        assert!(error.contains("git cannot read the repository of") && error.contains("1111 is missing"), "{error}");
        std::fs::remove_file(dir.join(".git/refs/heads/main")).unwrap();
        git(dir, &["commit", "-q", "--allow-empty", "-m", "one"]);
        let first = head(dir).unwrap();
        assert_eq!((first.sha.len(), first.short().len(), first.branch.as_deref(), first.tag.as_deref()), (40, 12, Some("main"), None));
        for tag in ["v1.9", "v1.10", "v1.2"] {
            git(dir, &["tag", tag]);
        }
        git(dir, &["checkout", "-q", "-b", "feature/x"]);
        std::fs::create_dir(dir.join("sub")).unwrap();
        let second = head(&dir.join("sub")).unwrap();
        assert_eq!((second.branch.as_deref(), second.tag.as_deref()), (Some("feature/x"), Some("v1.10")));
        git(dir, &["checkout", "-q", "--detach"]);
        assert_eq!(head(dir).unwrap().branch, None);
        git(dir, &["commit", "-q", "--allow-empty", "-m", "two"]);
        assert_eq!(head(dir).unwrap().tag, None, "tags of other commits do not count");
    }

    #[test]
    fn a_hostile_repository_runs_nothing() {
        if Command::new("git").arg("version").output().is_err() {
            println!("SKIP a_hostile_repository_runs_nothing: no git");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        git(dir, &["init", "-q"]);
        git(dir, &["commit", "-q", "--allow-empty", "-m", "one"]);
        git(dir, &["tag", "-a", "-m", "t", "v1"]);
        let proof = dir.join("proof");
        let touch = format!("touch {}", proof.display());
        for key in [
            "core.fsmonitor",
            "core.pager",
            "core.sshCommand",
            "core.editor",
            "pager.for-each-ref",
            "pager.rev-parse",
            "gpg.program",
            "alias.rev-parse",
            "filter.x.clean",
            "filter.x.process",
            "credential.helper",
            "uploadpack.packObjectsHook",
            "remote.origin.uploadpack",
        ] {
            git(dir, &["config", key, &touch]);
        }
        git(dir, &["config", "extensions.partialClone", "origin"]);
        git(dir, &["config", "remote.origin.url", &format!("ext::sh -c '{touch}'")]);
        git(dir, &["config", "remote.origin.promisor", "true"]);
        std::fs::write(dir.join(".gitattributes"), "* filter=x\n").unwrap();
        let hooks = dir.join(".git/hooks");
        std::fs::create_dir_all(&hooks).unwrap();
        for hook in ["reference-transaction", "post-checkout", "fsmonitor-watchman"] {
            std::fs::write(hooks.join(hook), format!("#!/bin/sh\n{touch}\n")).unwrap();
            std::process::Command::new("chmod").arg("+x").arg(hooks.join(hook)).status().unwrap();
        }
        assert_eq!(head(dir).unwrap().tag.as_deref(), Some("v1"));
        // A tag whose object is missing would be fetched from the promised remote.
        std::fs::write(dir.join(".git/refs/tags/gone"), format!("{}\n", "1".repeat(40))).unwrap();
        let _ = head(dir);
        assert!(!proof.exists());
    }
}
