//! Git checkouts, by the git command in an environment of its own: no user or system configuration, no hooks, no prompts, only
//! network protocols. Credentials go through the environment, never the command line.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use ovenbird_oci::Digest;

use super::{Fetched, fetch_error, file, found, host_of, named_secret};
use crate::error::BuildError;
use crate::event::{Event, LogStream};
use crate::ops::{Session, exec::StepName};
use crate::plan::GitOp;
use crate::state::remove_tree;

/// `git` in a folder, as little as possible under the influence of who runs it, and of what the repository says.
pub fn hardened(dir: &Path) -> Command {
    let mut command = Command::new("git");
    command
        .current_dir(dir)
        .args(["-c", "core.hooksPath=/dev/null", "-c", "core.fsmonitor=false"])
        .stdin(Stdio::null())
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", "/nonexistent")
        .env("LC_ALL", "C")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_TERMINAL_PROMPT", "0");
    command
}

/// Checks a repository out into a snapshot. The key is the commit, so an unchanged branch costs one look at the remote's refs.
pub fn fetch(session: &Session, step: &StepName, op: &GitOp) -> Result<Fetched, BuildError> {
    let fail = |reason: String| fetch_error(step, &op.url, reason);
    for word in [Some(&op.url), op.reference.as_ref(), op.subdir.as_ref()].into_iter().flatten() {
        if word.starts_with('-') || word.contains(['\n', '\0']) {
            return Err(fail(format!("{word:?} is not a valid git URL, ref or folder")));
        }
    }
    let git = Git { session, step, op };
    let commit = git.resolve()?;
    if let (Some(commit), Some(checksum)) = (&commit, &op.checksum)
        && !commit.starts_with(checksum)
    {
        return Err(fail(format!("it is at commit {commit}, not at --checksum={checksum}")));
    }
    let key = |commit: &str| {
        let parts = [
            op.url.as_str(),
            commit,
            op.subdir.as_deref().unwrap_or(""),
            if op.keep_git_dir { "git" } else { "" },
            if op.submodules { "sub" } else { "" },
        ];
        Digest::of(format!("git {}", parts.join("\0")).as_bytes())
    };
    if let Some(record) = commit.as_ref().and_then(|commit| found(session, key(commit))) {
        return Ok(record);
    }
    session.check_stop()?;
    let work = session.state.work_dir()?;
    let checkout = work.path().join("checkout");
    fs::create_dir(&checkout).map_err(BuildError::output(&checkout))?;
    let commit = git.check_out(&checkout, commit.as_deref())?;
    if let Some(checksum) = &op.checksum
        && !commit.starts_with(checksum)
    {
        return Err(fail(format!("it is at commit {commit}, not at --checksum={checksum}")));
    }
    if !op.keep_git_dir {
        remove_tree(&checkout.join(".git")).map_err(BuildError::output(&checkout))?;
    }
    let source = match &op.subdir {
        None => checkout.clone(),
        Some(subdir) => {
            let inside = checkout.join(subdir.trim_matches('/'));
            // A symlink in the repository must not lead out of it.
            let real = inside.canonicalize().map_err(|error| fail(format!("the folder {subdir:?} is not in the repository: {error}")))?;
            if !real.starts_with(checkout.canonicalize().map_err(BuildError::output(&checkout))?) || !real.is_dir() {
                return Err(fail(format!("{subdir:?} is not a folder of the repository")));
            }
            real
        }
    };
    normalise(&source).map_err(BuildError::output(&source))?;
    let fs_dir = work.path().join("fs");
    fs::rename(&source, &fs_dir).map_err(BuildError::output(&fs_dir))?;
    let _ = remove_tree(&checkout);
    file(session, key(&commit), work)
}

struct Git<'a> {
    session: &'a Session<'a>,
    step: &'a StepName,
    op: &'a GitOp,
}

impl Git<'_> {
    /// The commit that the remote's refs give; `None` when it must be looked for in the history (short commit).
    fn resolve(&self) -> Result<Option<String>, BuildError> {
        let wanted = self.op.reference.as_deref();
        if let Some(commit) = wanted.filter(|r| r.len() == 40 && is_hex(r)) {
            return Ok(Some(commit.to_owned()));
        }
        let listing = self.run(Path::new("/"), &["ls-remote", "--", &self.op.url])?;
        let refs: Vec<(&str, &str)> = listing.lines().filter_map(|line| line.split_once('\t')).collect();
        let at = |name: &str| refs.iter().find(|(_, n)| *n == name).map(|(commit, _)| (*commit).to_owned());
        let Some(wanted) = wanted else {
            return at("HEAD").map(Some).ok_or_else(|| fetch_error(self.step, &self.op.url, "the repository is empty"));
        };
        let names = [
            format!("refs/tags/{wanted}^{{}}"),
            format!("refs/tags/{wanted}"),
            format!("refs/heads/{wanted}"),
            format!("{wanted}^{{}}"),
            wanted.to_owned(),
        ];
        match names.iter().find_map(|name| at(name)) {
            Some(commit) => Ok(Some(commit)),
            None if is_hex(wanted) && wanted.len() >= 4 => Ok(None),
            None => Err(fetch_error(
                self.step,
                &self.op.url,
                format!("the repository does not contain ref {wanted}: no branch, tag or commit has that name"),
            )),
        }
    }

    fn check_out(&self, dir: &Path, commit: Option<&str>) -> Result<String, BuildError> {
        self.run(dir, &["init", "--quiet", "--initial-branch=main"])?;
        self.run(dir, &["remote", "add", "origin", "--", &self.op.url])?;
        let wanted = commit.or(self.op.reference.as_deref()).unwrap_or("HEAD").to_owned();
        let shallow = commit.is_some()
            && self.run(dir, &["fetch", "--quiet", "--depth=1", "--no-tags", "--no-recurse-submodules", "origin", &wanted]).is_ok();
        if !shallow {
            // The server refuses commits that no ref points at, or the commit is short: fetch the history.
            self.run(dir, &["fetch", "--quiet", "--tags", "--no-recurse-submodules", "origin", "+refs/heads/*:refs/remotes/origin/*"])?;
        }
        let full = self.run(dir, &["rev-parse", "--verify", "--quiet", "--end-of-options", &format!("{wanted}^{{commit}}")])?;
        let full = full.trim().to_owned();
        self.run(dir, &["checkout", "--quiet", "--detach", &full])?;
        if self.op.submodules && dir.join(".gitmodules").is_file() {
            self.run(dir, &["submodule", "update", "--init", "--recursive", "--depth=1"])?;
        }
        Ok(full)
    }

    fn run(&self, dir: &Path, args: &[&str]) -> Result<String, BuildError> {
        let fail = |reason: String| fetch_error(self.step, &self.op.url, reason);
        let mut command = hardened(dir);
        command
            .args(["-c", "protocol.ext.allow=never", "-c", "transfer.fsckObjects=true"])
            .args(["-c", "advice.detachedHead=false", "-c", "core.autocrlf=false"])
            .args(args)
            .env("GIT_ALLOW_PROTOCOL", "https:http:ssh:git");
        let host = host_of(&self.op.url);
        let header = named_secret(self.session, &[format!("GIT_AUTH_HEADER.{host}"), "GIT_AUTH_HEADER".into()]).or_else(|| {
            let token = named_secret(self.session, &[format!("GIT_AUTH_TOKEN.{host}"), "GIT_AUTH_TOKEN".into()])?;
            Some(format!("basic {}", base64(format!("x-access-token:{token}").as_bytes())))
        });
        if let (Some(header), Some((origin, _))) = (header, split_origin(&self.op.url)) {
            // Bound to the origin, so that a redirect or a submodule elsewhere does not get it.
            command
                .env("GIT_CONFIG_COUNT", "1")
                .env("GIT_CONFIG_KEY_0", format!("http.{origin}/.extraHeader"))
                .env("GIT_CONFIG_VALUE_0", format!("Authorization: {header}"));
        }
        if let Some(agent) = self.session.input.ssh.get("default") {
            command.env("SSH_AUTH_SOCK", agent).env(
                "GIT_SSH_COMMAND",
                "ssh -F /dev/null -o BatchMode=yes -o StrictHostKeyChecking=accept-new -o UserKnownHostsFile=/dev/null",
            );
        }
        let output = command.output().map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => fail("the git command is not installed".into()),
            _ => fail(format!("git could not be started: {error}")),
        })?;
        let errors = String::from_utf8_lossy(&output.stderr);
        if !errors.trim().is_empty() {
            self.session.sink.emit(Event::Log { vertex: self.step.index, stream: LogStream::Stderr, text: errors.to_string() });
        }
        if !output.status.success() {
            let last = errors.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no message").to_owned();
            return Err(fail(format!("git {} failed: {last}", args.first().unwrap_or(&""))));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

fn is_hex(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// `https://host:port` and the rest.
fn split_origin(url: &str) -> Option<(&str, &str)> {
    let start = url.find("://")? + 3;
    let end = url[start..].find('/').map_or(url.len(), |n| start + n);
    Some(url.split_at(end))
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

/// Folders 0755, files 0755 or 0644: what git itself records, whatever the umask.
fn normalise(dir: &Path) -> std::io::Result<()> {
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))?;
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            if kind.is_dir() {
                open.push(entry.path());
            } else if kind.is_file() {
                let executable = entry.metadata()?.permissions().mode() & 0o100 != 0;
                fs::set_permissions(entry.path(), fs::Permissions::from_mode(if executable { 0o755 } else { 0o644 }))?;
            }
        }
    }
    Ok(())
}
