//! Where the source of a build comes from: the context folders and the text of the Dockerfile.
//!
//! It must not know what is done with them. Everything read here is foreign: sizes are bounded and paths inside an archive
//! never leave it.

mod archive;
mod artifact;
pub(crate) mod bundle;
pub mod git;
mod path;
mod remote;

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ovenbird_dockerfile::ignore::PatternError;
use ovenbird_engine::input::LocalContext;
use ovenbird_oci::beside;
use ovenbird_oci::keychain::Credential;

use crate::builder::Job;
use crate::error::{Error, Kind};
use crate::report::GitReport;
use crate::request::BuildRequest;
use crate::request::remote::masked;
use crate::settings::{Environment, Settings};

pub use remote::Revision;

/// Largest Dockerfile or ignore file.
const MAX_TEXT: u64 = 16 * 1024 * 1024;

/// What a build reads.
#[derive(Debug)]
pub struct SourceTree {
    /// Text of the Dockerfile.
    pub dockerfile: String,
    /// Its name, for messages.
    pub dockerfile_name: String,
    /// `context` and named folders.
    pub contexts: BTreeMap<String, LocalContext>,
    /// What the main context is known by, where its folder is another one each time: the same for all commits of a repository.
    pub origin: Option<String>,
    /// The commit of the main context, where that was fetched from a repository.
    pub revision: Option<Revision>,
    /// It was sent by somebody on another machine, or in another process: paths of the request are theirs.
    pub(crate) is_sent: bool,
    /// What git says of the main context, for one that was sent.
    pub(crate) git: Option<GitReport>,
    /// What stood in the addresses of the contexts, by host.
    pub(crate) logins: BTreeMap<String, Credential>,
    /// Of contexts: when the commit or the file was made, seconds since 1970.
    times: BTreeMap<String, i64>,
    /// What was fetched lives as long as this.
    _unpacked: Vec<beside::Folder>,
}

impl SourceTree {
    /// The request with the time of a context, where `SOURCE_DATE_EPOCH` names one that has a time.
    #[must_use]
    pub fn dated(&self, request: &BuildRequest) -> BuildRequest {
        let mut request = request.clone();
        if let Some(said) = request.build_args.get_mut("SOURCE_DATE_EPOCH")
            && let Some(time) = self.times.get(said.as_str())
        {
            *said = time.to_string();
        }
        request
    }
}

impl SourceTree {
    /// One that came from somewhere else, with the folder that holds its contexts.
    pub(crate) fn given(
        dockerfile: String,
        dockerfile_name: String,
        contexts: BTreeMap<String, LocalContext>,
        unpacked: ovenbird_oci::beside::Folder,
    ) -> Self {
        Self {
            dockerfile,
            dockerfile_name,
            contexts,
            origin: None,
            revision: None,
            is_sent: true,
            git: None,
            logins: BTreeMap::new(),
            times: BTreeMap::new(),
            _unpacked: vec![unpacked],
        }
    }
}

impl SourceTree {
    /// A Dockerfile of our own over a folder.
    pub(crate) fn inline(dockerfile: String, name: &str, context: LocalContext) -> Self {
        let contexts = [("context".to_owned(), context)].into();
        Self {
            dockerfile,
            dockerfile_name: name.to_owned(),
            contexts,
            origin: None,
            revision: None,
            is_sent: false,
            git: None,
            logins: BTreeMap::new(),
            times: BTreeMap::new(),
            _unpacked: vec![],
        }
    }

    /// The same files with another Dockerfile; must not outlive this one.
    pub(crate) fn with_dockerfile(&self, text: &str) -> Self {
        Self {
            dockerfile: text.to_owned(),
            dockerfile_name: self.dockerfile_name.clone(),
            contexts: self.contexts.clone(),
            origin: self.origin.clone(),
            revision: self.revision.clone(),
            is_sent: self.is_sent,
            git: self.git.clone(),
            logins: self.logins.clone(),
            times: self.times.clone(),
            _unpacked: vec![],
        }
    }
}

/// Why a source cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// No such folder.
    #[error("the {what} {} does not exist", masked(&path.to_string_lossy()))]
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
    /// A link to what is not in the context.
    #[error("{} is a link to {}, which is not in the build context: links of what was fetched or unpacked must not lead out of it", path.display(), target.display())]
    LinkOut {
        /// The link.
        path: PathBuf,
        /// Where it leads.
        target: PathBuf,
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
    #[error("{what} cannot be unpacked: {reason}; make the archive again")]
    Archive {
        /// Which.
        what: String,
        /// Why.
        reason: String,
    },
    /// The context is a Dockerfile, and another one was given.
    #[error("the build context is a Dockerfile, and -f gives another one")]
    TwoDockerfiles,
    /// An address that makes no sense.
    #[error("the build context {url} cannot be read: {reason}")]
    Address {
        /// Without credentials.
        url: String,
        /// Why.
        reason: String,
    },
    /// It cannot be fetched.
    #[error("the build context {url} cannot be fetched: {reason}")]
    Remote {
        /// Without credentials.
        url: String,
        /// Why.
        reason: String,
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
            Self::LinkOut { path, .. } => vec![format!("put the file itself at {}", path.display())],
            Self::NotText { .. } => vec!["save the file as UTF-8".into()],
            Self::StdinTwice => vec!["give a folder as the context: `ovenbird build -f - . < Dockerfile`".into()],
            Self::Missing { .. }
            | Self::Read { .. }
            | Self::TooLarge { .. }
            | Self::Ignore { .. }
            | Self::StdinEmpty { .. }
            | Self::TwoDockerfiles
            | Self::Address { .. }
            | Self::Remote { .. }
            | Self::Archive { .. } => vec![],
        }
    }
}

impl From<SourceError> for Error {
    fn from(error: SourceError) -> Self {
        let kind = match &error {
            SourceError::StdinTwice | SourceError::TwoDockerfiles | SourceError::Address { .. } => Kind::Usage,
            SourceError::NotText { .. } => Kind::Dockerfile,
            _ => Kind::Source,
        };
        let mut told = Self::from_chain(kind, &error);
        told.hints = error.hints();
        told
    }
}

/// How often a transfer is asked whether it shall stop.
const TICK: Duration = Duration::from_millis(50);

/// Fetches sources.
#[derive(Debug, Clone)]
pub struct Fetcher {
    /// Where things are unpacked.
    temp: PathBuf,
    environment: Environment,
    /// For registries.
    settings: Option<Settings>,
}

impl From<&Path> for Fetcher {
    /// One that knows nothing of the user, and unpacks in this folder.
    fn from(temp: &Path) -> Self {
        Self { temp: temp.to_owned(), environment: Environment::fixed(BTreeMap::new(), "/", None), settings: None }
    }
}

impl Fetcher {
    /// One for this user.
    pub fn new(settings: &Settings, environment: &Environment) -> Self {
        Self { temp: settings.temp.clone(), environment: environment.clone(), settings: Some(settings.clone()) }
    }

    /// Where short-lived files go.
    pub(crate) fn temp(&self) -> &Path {
        &self.temp
    }

    /// Fetches what `request` names.
    pub fn fetch(&self, request: &BuildRequest, stdin: &mut dyn Read, job: &Job) -> Result<SourceTree, Error> {
        path::fetch(self, request, stdin, job)
    }

    /// A temporary folder.
    fn folder(&self) -> Result<beside::Folder, SourceError> {
        // What a killed build unpacked goes with the next.
        beside::clear(&self.temp);
        let read = |source| SourceError::Read { what: format!("a temporary folder in {}", self.temp.display()), source };
        beside::folder_in(&self.temp).map_err(read)
    }

    /// Runs a transfer until it is done or the build is cancelled.
    #[expect(clippy::unused_self, reason = "only who fetches may transfer")]
    fn until_cancelled<T>(&self, job: &Job, transfer: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
        let cancelled = async {
            while !job.cancel.is_cancelled() {
                tokio::time::sleep(TICK).await;
            }
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.map_err(|error| Error::from_chain(Kind::Bug, &error))?.block_on(async {
            tokio::select! {
                done = transfer => done,
                () = cancelled => Err(Error::new(Kind::Cancelled, "the build was cancelled")),
            }
        })
    }
}
