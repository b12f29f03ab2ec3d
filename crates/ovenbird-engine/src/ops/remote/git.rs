//! `ADD` of a git repository: a snapshot of a commit. The URL came with the Dockerfile, so nothing of the user plays a part but the secrets and
//! the agent that the build was given.

use std::fs;

use ovenbird_oci::Digest;

use super::repository::{Access, GitError, Repository, Watch};
use super::{Fetched, fetch_error, file, found, named_secret};
use crate::error::BuildError;
use crate::event::{Event, LogStream};
use crate::ops::{Session, exec::StepName};
use crate::plan::GitOp;
use crate::state::remove_tree;

/// Checks a repository out into a snapshot. The key is the commit, so an unchanged branch costs one look at the remote's refs.
pub fn fetch(session: &Session, step: &StepName, op: &GitOp) -> Result<Fetched, BuildError> {
    let fail = |error: GitError| match error {
        GitError::Stopped => BuildError::Cancelled,
        GitError::File { path, source } => BuildError::output(&path)(source),
        error => fetch_error(step, &op.url, error.to_string()),
    };
    let access = Access { agent: session.input.ssh.get("default").cloned(), ..Access::default() }
        .with_secrets(&op.url, |name| named_secret(session, &[name.to_owned()]));
    let say = |text: &str| session.sink.emit(Event::Log { vertex: step.index, stream: LogStream::Stderr, text: text.to_owned() });
    let stopped = || session.check_stop().is_err();
    let repository = Repository::open(op, &access, Watch { say: &say, stopped: &stopped }).map_err(fail)?;
    let resolved = repository.resolve().map_err(fail)?;
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
    if let Some(record) = resolved.commit.as_ref().and_then(|commit| found(session, key(commit))) {
        return Ok(record);
    }
    session.check_stop()?;
    let work = session.state.work_dir()?;
    let checkout = work.path().join("checkout");
    fs::create_dir(&checkout).map_err(BuildError::output(&checkout))?;
    let done = repository.check_out(&resolved, &checkout).map_err(fail)?;
    let fs_dir = work.path().join("fs");
    fs::rename(&done.folder, &fs_dir).map_err(BuildError::output(&fs_dir))?;
    let _ = remove_tree(&checkout);
    file(session, key(&done.commit), work)
}
