//! Turning system errors into [`SandboxError`] with the words of what was tried.

use std::io;

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
