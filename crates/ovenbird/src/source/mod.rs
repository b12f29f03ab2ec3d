//! Where the source of a build comes from: the context folders and the text of the Dockerfile.
//!
//! It must not know what is done with them. Everything read here is foreign: sizes are bounded and paths inside an archive
//! never leave it.

pub mod git;
pub mod path;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use ovenbird_dockerfile::ignore::PatternError;
use ovenbird_engine::input::LocalContext;

use crate::error::{Error, Kind};
use crate::request::{BuildRequest, Source};

/// What a build reads.
#[derive(Debug)]
pub struct SourceTree {
    /// Text of the Dockerfile.
    pub dockerfile: String,
    /// Its name, for messages.
    pub dockerfile_name: String,
    /// `context` and named folders.
    pub contexts: BTreeMap<String, LocalContext>,
    /// An unpacked archive lives as long as this.
    _unpacked: Option<ovenbird_oci::beside::Folder>,
}

impl SourceTree {
    /// A Dockerfile of our own over a folder.
    pub(crate) fn inline(dockerfile: String, name: &str, context: LocalContext) -> Self {
        let contexts = [("context".to_owned(), context)].into();
        Self { dockerfile, dockerfile_name: name.to_owned(), contexts, _unpacked: None }
    }

    /// The same files with another Dockerfile; must not outlive this one.
    pub(crate) fn with_dockerfile(&self, text: &str) -> Self {
        Self {
            dockerfile: text.to_owned(),
            dockerfile_name: self.dockerfile_name.clone(),
            contexts: self.contexts.clone(),
            _unpacked: None,
        }
    }
}

/// Why a source cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// No such folder.
    #[error("the {what} {} does not exist", path.display())]
    Missing {
        /// `build context`…
        what: String,
        /// Where.
        path: PathBuf,
    },
    /// A file where a folder must be.
    #[error("the {what} {} is not a folder", path.display())]
    NotAFolder {
        /// `build context`…
        what: String,
        /// Where.
        path: PathBuf,
    },
    /// No Dockerfile.
    #[error("there is no Dockerfile at {}", path.display())]
    NoDockerfile {
        /// Where it was looked for.
        path: PathBuf,
        /// Files that could be meant, as `-f` would take them.
        candidates: Vec<PathBuf>,
    },
    /// Reading failed.
    #[error("cannot read {what}: {source}")]
    Read {
        /// What.
        what: String,
        /// Why.
        source: std::io::Error,
    },
    /// Not text.
    #[error("{what} is not UTF-8 text (line {line})")]
    NotText {
        /// What.
        what: String,
        /// First line that is not.
        line: usize,
    },
    /// Too big to be what it should be.
    #[error("{what} is larger than {limit} bytes")]
    TooLarge {
        /// What.
        what: String,
        /// Bytes.
        limit: u64,
    },
    /// A bad ignore file.
    #[error("{}: {source}", path.display())]
    Ignore {
        /// Which.
        path: PathBuf,
        /// Why.
        source: PatternError,
    },
    /// Standard input can be read once.
    #[error("both the context and the Dockerfile are to be read from standard input")]
    StdinTwice,
    /// Standard input had nothing.
    #[error("standard input is empty: expected {expected}")]
    StdinEmpty {
        /// What should be there.
        expected: &'static str,
    },
    /// A bad archive.
    #[error("the context on standard input cannot be unpacked: {reason}; make the archive again")]
    Archive {
        /// Why.
        reason: String,
    },
    /// A kind of source that is not supported.
    #[error("the build context {url:?} is not supported: only folders and standard input are")]
    Remote {
        /// Without credentials.
        url: String,
    },
}

impl SourceError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::NotAFolder { path, .. } => vec![format!(
                "for a Dockerfile use `-f {0}` and give a folder as the context; for an archive use `ovenbird build - < {0}`",
                path.display()
            )],
            Self::NoDockerfile { candidates, .. } if candidates.is_empty() => {
                vec!["give its place with `-f FILE` (seen from the working directory), or its text with `-f -`".into()]
            }
            Self::NoDockerfile { candidates, .. } => candidates.iter().map(|c| format!("did you mean `-f {}`?", c.display())).collect(),
            Self::NotText { .. } => vec!["save the file as UTF-8".into()],
            Self::StdinTwice => vec!["give a folder as the context: `ovenbird build -f - . < Dockerfile`".into()],
            Self::Remote { .. } => vec!["clone or download it, then build the folder".into()],
            Self::Missing { .. }
            | Self::Read { .. }
            | Self::TooLarge { .. }
            | Self::Ignore { .. }
            | Self::StdinEmpty { .. }
            | Self::Archive { .. } => vec![],
        }
    }
}

impl From<SourceError> for Error {
    fn from(error: SourceError) -> Self {
        let kind = match &error {
            SourceError::StdinTwice | SourceError::Remote { .. } => Kind::Usage,
            SourceError::NotText { .. } => Kind::Dockerfile,
            _ => Kind::Source,
        };
        let mut told = Self::from_chain(kind, &error);
        told.hints = error.hints();
        told
    }
}

/// Fetches what `request` names. `temp` is where an archive from standard input is unpacked.
pub fn fetch(request: &BuildRequest, temp: &Path, stdin: &mut dyn Read) -> Result<SourceTree, SourceError> {
    match &request.source {
        Source::Path(_) | Source::Stdin => path::fetch(request, temp, stdin),
        Source::Remote(url) => Err(SourceError::Remote { url: without_credentials(url) }),
    }
}

pub(crate) fn without_credentials(url: &str) -> String {
    match url.split_once("://").and_then(|(scheme, rest)| {
        let authority = rest.split('/').next().unwrap_or_default();
        authority.rfind('@').map(|at| format!("{scheme}://***@{}", &rest[at + 1..]))
    }) {
        Some(redacted) => redacted,
        None => url.to_owned(),
    }
}
