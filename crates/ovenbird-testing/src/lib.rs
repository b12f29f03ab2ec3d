//! Fixtures for Ovenbird's own tests: real servers, base images from Debian packages, and the literate build cases.
//!
//! Not shipped. It must not use Ovenbird's own crates: the command is tested from outside, as a user runs it, and images are
//! read back by an independent reader. Every server listens on a random loopback port and dies with its value.

pub mod archive;
pub mod base;
pub mod cache;
pub mod case;
pub mod command;
pub mod compare;
pub mod deviations;
pub mod dockerd;
pub mod git;
pub mod keeper;
pub mod kubernetes;
pub mod moto;
pub mod needs;
pub mod oracle;
pub mod pair;
pub mod prefect;
pub mod process;
pub mod registry;
pub mod relay;
pub mod runner;
pub mod toxic;
pub mod users;

use std::path::{Path, PathBuf};

/// Why a fixture or a case could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file operation failed.
    #[error("{what} {path}: {source}", path = path.display())]
    File {
        /// Verb, `cannot read`.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// A program could not be started.
    #[error("cannot start {program}: {source}. Is its Debian package installed?")]
    Start {
        /// Program name.
        program: String,
        /// Cause.
        source: std::io::Error,
    },
    /// A program failed.
    #[error("{command} ended with {status}:\n{output}")]
    Failed {
        /// Command line.
        command: String,
        /// Exit status.
        status: std::process::ExitStatus,
        /// Both output streams.
        output: String,
    },
    /// A server did not answer in time.
    #[error("{server} did not become ready within {seconds} s:\n{log}")]
    NotReady {
        /// Which.
        server: &'static str,
        /// How long it was waited for.
        seconds: u64,
        /// The end of its log.
        log: String,
    },
    /// A file of the repository or an image does not follow its format.
    #[error("{place}: {reason}")]
    Malformed {
        /// File and line, or the name inside an archive.
        place: String,
        /// Why.
        reason: String,
    },
    /// Something the machine lacks.
    #[error("{0}")]
    Missing(String),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

pub(crate) trait AtPath<T> {
    fn at(self, what: &'static str, path: &Path) -> Result<T>;
}

impl<T> AtPath<T> for std::io::Result<T> {
    fn at(self, what: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| Error::File { what, path: path.to_path_buf(), source })
    }
}

/// Root of the repository.
pub fn repository() -> &'static Path {
    // Two levels above this crate: crates/ovenbird-testing.
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap_or(Path::new("/"))
}
