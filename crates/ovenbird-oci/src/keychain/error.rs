//! What can go wrong with credentials: each message names the source and says what to do.

use std::io;
use std::path::PathBuf;

/// What can go wrong with credentials.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeychainError {
    /// The file system refused.
    #[error("cannot {action} {}: {source}; it must be a regular file with the right permissions", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not the JSON it should be. The file is never overwritten then.
    #[error("{} is not a Docker configuration file: {reason}; correct it or move it away", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Why, without any value of the file.
        reason: String,
    },
    /// `credsStore` or `credHelpers` names something that is no program name.
    #[error("{} names the credential helper {name:?}, which is not a plain program name; write only what follows `docker-credential-`", path.display())]
    HelperName {
        /// The file.
        path: PathBuf,
        /// As written there.
        name: String,
    },
    /// The helper is not installed.
    #[error("{program}, which {} names, is not installed; install it or remove it from that file", path.display())]
    HelperMissing {
        /// `docker-credential-…`.
        program: String,
        /// The file.
        path: PathBuf,
    },
    /// The helper ran and failed.
    #[error("{program} {verb} failed: {reason}; try it by hand, or remove it from the Docker configuration")]
    HelperFailed {
        /// `docker-credential-…`.
        program: String,
        /// `get`, `store` or `erase`.
        verb: &'static str,
        /// What it said.
        reason: String,
    },
    /// Whoever keeps the credentials of this program did not give them.
    #[error("the caller gave no credentials for {registry}: {reason}; log in there on the machine that asked for the build")]
    Custodian {
        /// Registry name.
        registry: String,
        /// What it said.
        reason: String,
    },
    /// Neither a docker configuration folder nor an auth file is known.
    #[error(
        "there is no place to keep credentials: neither a docker configuration folder nor an auth file is set; set HOME or DOCKER_CONFIG"
    )]
    NoPlace,
    /// One of two variables that go together.
    #[error("{present} is set and {missing} is not, so nobody can log in to {registry}; set both or none")]
    HalfVariable {
        /// Registry name.
        registry: String,
        /// The one that is there.
        present: String,
        /// The other.
        missing: String,
    },
    /// The settings name a source that has nothing for the registry.
    #[error("the settings say that the credentials of {registry} come from {place}, which has none; log in there or change `credentials`")]
    Nothing {
        /// Registry name.
        registry: String,
        /// The source in words.
        place: String,
    },
    /// A file with a password, a token or a key that cannot be used.
    #[error("{} is not {expected}: {reason}; correct it or name another file", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What it should be.
        expected: &'static str,
        /// Why it is not, without any value of the file.
        reason: String,
    },
    /// The settings of a source cannot be used.
    #[error("the credentials of {registry} cannot come from {place}: {reason}; correct the settings")]
    Unfit {
        /// Registry name.
        registry: String,
        /// The source in words.
        place: String,
        /// Why.
        reason: String,
    },
    /// A cloud gave no credential.
    #[error("{service}: cannot {action}: {reason}; {hint}")]
    Cloud {
        /// Whose.
        service: &'static str,
        /// Which step of the exchange.
        action: String,
        /// What was said, without any secret.
        reason: String,
        /// What to do.
        hint: &'static str,
    },
}

impl KeychainError {
    /// Whether it is wrong on this machine, and not elsewhere: in a cloud.
    pub fn is_configuration(&self) -> bool {
        !matches!(self, Self::Cloud { .. })
    }

    /// The file system's refusal at a file.
    pub(super) fn read(path: &std::path::Path) -> impl FnOnce(io::Error) -> Self + use<'_> {
        move |source| Self::Io { action: "read", path: path.into(), source }
    }
}
