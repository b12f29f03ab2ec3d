//! Why a build failed.

use std::io;
use std::path::{Path, PathBuf};

use ovenbird_dockerfile::{Diagnostic, Severity};
use ovenbird_oci::Digest;
use ovenbird_oci::archive::ArchiveError;
use ovenbird_oci::layer::LayerError;
use ovenbird_oci::registry::RegistryError;
use ovenbird_oci::store::StoreError;
use ovenbird_sandbox::SandboxError;

use crate::ops::file::FileError;
use crate::state::StateError;

/// Class of a failure; the doors turn it into an exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The engine broke a promise of its own.
    Bug,
    /// The request asks for something that cannot be.
    Usage,
    /// The state folder or the machine's configuration.
    Configuration,
    /// The Dockerfile.
    Dockerfile,
    /// A source: context file, git repository, download.
    Source,
    /// A step exited non-zero.
    Step,
    /// A registry, or the credentials for it.
    Registry,
    /// The sandbox is not possible here.
    Sandbox,
    /// The image must not leave the machine.
    Veto,
    /// Stopped by the caller.
    Cancelled,
}

/// A failed build.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The Dockerfile has errors.
    #[error("{}", dockerfile_reason(name, text, diagnostics, *syntax))]
    Dockerfile {
        /// File name.
        name: String,
        /// Its text, for excerpts.
        text: String,
        /// Findings.
        diagnostics: Vec<Diagnostic>,
        /// It cannot be read, so nothing is known of what it means.
        syntax: bool,
    },
    /// A base image cannot be had.
    #[error("cannot use the image {name}: {reason}")]
    Image {
        /// As written in the Dockerfile.
        name: String,
        /// Why.
        reason: String,
        /// The registry's answer, if that is why.
        source: Option<RegistryError>,
    },
    /// An OCI layout that was given as an image is not what it should be.
    #[error("cannot use {name}: {reason}")]
    Layout {
        /// The layout as written, or a layer of it.
        name: String,
        /// Why.
        reason: String,
    },
    /// A blob of the state folder is broken, and the registry did not give it again.
    #[error("{damage}; fetching it again failed: {source}")]
    Damaged {
        /// Which, and how.
        damage: StoreError,
        /// Why it is still broken.
        source: RegistryError,
    },
    /// A layer from a cache that machines share cannot be had, or is not what it should be. It is not used again: another try runs the step.
    #[error("the layer {layer} of the cache cannot be used: {source}")]
    SharedLayer {
        /// Its digest.
        layer: Digest,
        /// Why.
        source: Box<BuildError>,
    },
    /// A cache could not be written.
    #[error("cannot export the cache {to}: {source}")]
    CacheExport {
        /// Where to.
        to: String,
        /// Why.
        source: Box<BuildError>,
    },
    /// A step's source cannot be had.
    #[error("{step}: {source}")]
    File {
        /// Name of the step.
        step: String,
        /// First line of the instruction.
        line: Option<u32>,
        /// Why.
        source: FileError,
    },
    /// A remote source cannot be fetched.
    #[error("cannot fetch {url}: {reason}")]
    Fetch {
        /// Without credentials.
        url: String,
        /// First line of the instruction.
        line: Option<u32>,
        /// Why.
        reason: String,
    },
    /// A secret, ssh agent or context that a step needs was not given.
    #[error("{step}: {what}: not found; {hint}")]
    NotGiven {
        /// Name of the step.
        step: String,
        /// First line of the instruction.
        line: Option<u32>,
        /// `secret token`.
        what: String,
        /// How to give it.
        hint: String,
    },
    /// A secret was given and cannot be read (any more).
    #[error("{step}: cannot read the secret {id:?}: {source}")]
    Secret {
        /// Name of the step.
        step: String,
        /// First line of the instruction.
        line: Option<u32>,
        /// Its id.
        id: String,
        /// Why.
        source: io::Error,
    },
    /// An instruction asks for something that cannot be.
    #[error("{step}: {reason}")]
    Instruction {
        /// Name of the step.
        step: String,
        /// First line of the instruction.
        line: Option<u32>,
        /// Why.
        reason: String,
        /// How to fix it.
        hint: &'static str,
    },
    /// A step exited non-zero.
    #[error("{name}: process {command:?} did not complete successfully: {}", step_reason(*code, *out_of_memory))]
    Step {
        /// Name of the step.
        name: String,
        /// First and last line of the instruction.
        lines: Option<(u32, u32)>,
        /// What ran.
        command: String,
        /// Exit code; 128 + signal.
        code: i32,
        /// Killed by `--memory`.
        out_of_memory: bool,
        /// Last lines of its output.
        tail: Vec<String>,
    },
    /// A step could not be run.
    #[error("{step}: {source}")]
    Sandbox {
        /// Name of the step.
        step: String,
        /// First line of the instruction.
        line: Option<u32>,
        /// Why.
        source: SandboxError,
    },
    /// Asked for, and not possible.
    #[error("{option} cannot be honoured: {reason}")]
    Refused {
        /// `--memory`…
        option: String,
        /// Why and what to do.
        reason: String,
    },
    /// A registry refused or broke.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The blob store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A layer could not be made or read.
    #[error("layer {layer}: {source}")]
    Layer {
        /// Digest or step.
        layer: String,
        /// Why.
        source: LayerError,
    },
    /// An archive could not be made or read.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// The state folder.
    #[error(transparent)]
    State(#[from] StateError),
    /// An output could not be written.
    #[error("cannot write {}: {source}", path.display())]
    Output {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// An image in the store is not what it should be.
    #[error("image {digest} is malformed: {reason}")]
    Malformed {
        /// Which.
        digest: String,
        /// Why.
        reason: String,
    },
    /// A secret of the build is in the image.
    #[error("{what} is in the image: {place}; nothing was named, pushed or written")]
    Leak {
        /// `the secret "token"`.
        what: String,
        /// Layer and path, or field of the config.
        place: String,
        /// What `--allow-leak` takes.
        id: String,
    },
    /// Stopped by the caller.
    #[error("the build was cancelled")]
    Cancelled,
}

/// The findings are shown with their lines elsewhere; what cannot be read is also said in BuildKit's words, which tools look for.
fn dockerfile_reason(name: &str, text: &str, diagnostics: &[Diagnostic], syntax: bool) -> String {
    let mut errors = diagnostics.iter().filter(|d| d.severity == Severity::Error);
    let first = errors.next().filter(|_| syntax).map(|first| {
        let line = 1 + text.bytes().take(first.span.start).filter(|b| *b == b'\n').count();
        format!("dockerfile parse error on line {line}: {}", first.message)
    });
    match (errors.count(), first) {
        (0, Some(first)) => first,
        (0, None) => format!("{name} has 1 error"),
        (more, Some(first)) => format!("{name} has {} errors; the first: {first}", more + 1),
        (more, None) => format!("{name} has {} errors", more + 1),
    }
}

fn step_reason(code: i32, out_of_memory: bool) -> String {
    if out_of_memory { "killed: out of memory (the limit is --memory)".into() } else { format!("exit code: {code}") }
}

impl BuildError {
    /// Class of this failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Dockerfile { .. } | Self::Instruction { .. } => ErrorKind::Dockerfile,
            // The registry is not to blame for what is wrong in the state folder.
            Self::Image { source, .. } if !source.as_ref().is_some_and(RegistryError::is_configuration) => ErrorKind::Registry,
            Self::Registry(source) if !source.is_configuration() => ErrorKind::Registry,
            Self::File { source, .. } => match source {
                FileError::Io { .. } => ErrorKind::Configuration,
                // What the instruction itself says.
                FileError::Owner { .. } | FileError::Mode { .. } | FileError::Pattern(_) | FileError::SeveralToOne { .. } => {
                    ErrorKind::Dockerfile
                }
                _ => ErrorKind::Source,
            },
            Self::Fetch { .. } | Self::Layout { .. } | Self::Secret { .. } => ErrorKind::Source,
            Self::NotGiven { .. } | Self::Refused { .. } => ErrorKind::Usage,
            Self::Step { .. } => ErrorKind::Step,
            Self::Sandbox { source, .. } => match source {
                SandboxError::Exec { .. } => ErrorKind::Step,
                SandboxError::Refused { .. } => ErrorKind::Usage,
                SandboxError::Target { .. } | SandboxError::Cwd { .. } => ErrorKind::Dockerfile,
                // The base image, as it came.
                SandboxError::Root { .. } => ErrorKind::Registry,
                SandboxError::Setup { .. } | SandboxError::Impossible { .. } => ErrorKind::Sandbox,
            },
            Self::Layer { source, .. } => match source {
                LayerError::Io { .. } | LayerError::Store(_) => ErrorKind::Configuration,
                // What a step made, not what a registry gave.
                LayerError::Unpackable { .. } => ErrorKind::Source,
                _ => ErrorKind::Registry,
            },
            Self::Image { .. }
            | Self::Registry(_)
            | Self::Damaged { .. }
            | Self::Store(_)
            | Self::State(_)
            | Self::Archive(_)
            | Self::Output { .. }
            | Self::Malformed { .. } => ErrorKind::Configuration,
            Self::SharedLayer { source, .. } | Self::CacheExport { source, .. } => source.kind(),
            Self::Leak { .. } => ErrorKind::Veto,
            Self::Cancelled => ErrorKind::Cancelled,
        }
    }

    /// A blob was found damaged, and is removed or no longer used by now: another build makes or fetches it again.
    pub fn is_damage(&self) -> bool {
        let store = match self {
            Self::SharedLayer { .. } => return true,
            Self::Store(source) | Self::Archive(ArchiveError::Store(source)) | Self::State(StateError::Store(source)) => source,
            Self::Registry(RegistryError::Store { source, .. }) => source,
            _ => return false,
        };
        matches!(store, StoreError::Corrupt { .. } | StoreError::Damaged { .. } | StoreError::Missing { .. })
    }

    pub(crate) fn output(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::Output { path: path.to_owned(), source }
    }
}
