//! Turning system errors into [`SandboxError`] with the words of what was tried.

use std::io;
use std::path::Path;

use crate::SandboxError;

pub(crate) trait Context<T> {
    /// Names what failed.
    fn context(self, what: impl FnOnce() -> String) -> Result<T, SandboxError>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, SandboxError> {
        self.map_err(|source| SandboxError::Setup { what: what(), source })
    }
}

/// What the root itself has at a place that a step needs is at fault for these; every other error is the machine's.
fn is_of_the_root(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ELOOP | libc::ENOTDIR | libc::EISDIR | libc::EEXIST | libc::ENAMETOOLONG | libc::EINVAL))
}

/// A folder or file of the root that every step needs.
pub(crate) fn needed(path: &'static str, what: &str, source: io::Error) -> SandboxError {
    if is_of_the_root(&source) {
        SandboxError::Root { path, source }
    } else {
        SandboxError::Setup { what: format!("{what} {path}"), source }
    }
}

/// The target of a mount that was asked for.
pub(crate) fn target(target: &Path, source: io::Error) -> SandboxError {
    let reason = match source.raw_os_error() {
        Some(libc::EISDIR) => "there is a folder, and the mount is a file".to_owned(),
        Some(libc::ENOTDIR) => "there is a file, or a file on the way to it, and the mount is a folder".to_owned(),
        // Our own refusal.
        None => source.to_string(),
        _ if is_of_the_root(&source) => source.to_string(),
        _ => return SandboxError::Setup { what: format!("making the mount point {}", target.display()), source },
    };
    SandboxError::Target { target: target.to_owned(), reason }
}

/// The working directory of a step.
pub(crate) fn cwd(path: &Path, source: io::Error) -> SandboxError {
    if is_of_the_root(&source) {
        SandboxError::Cwd { path: path.to_owned(), source }
    } else {
        SandboxError::Setup { what: format!("making the working directory {}", path.display()), source }
    }
}
