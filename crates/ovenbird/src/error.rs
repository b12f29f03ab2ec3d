//! The one error of the doors: a kind with a documented exit code, a message, its causes, and hints.
//!
//! Modules below have precise error types; here they are sorted and told for people. A message says what failed, then why
//! (`causes`), then how to fix it (`hints`). It must not know how it is drawn.

use std::fmt;

use ovenbird_dockerfile::Diagnostic;
use ovenbird_sandbox::SandboxError;

use crate::report::Record;

/// What sort of failure it was; decides the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A bug of Ovenbird.
    Bug,
    /// The command line asks for something that does not exist or is not supported.
    Usage,
    /// A settings file, the environment or the state directory.
    Configuration,
    /// The Dockerfile has an error.
    Dockerfile,
    /// The build context or something it names cannot be read.
    Source,
    /// A step of the build exited with a code other than zero.
    Step,
    /// A registry refused, failed or could not be reached.
    Registry,
    /// This machine does not allow what a step needs.
    Sandbox,
    /// A plugin or the leak gate said no.
    Veto,
    /// A driver, a remote worker or a Docker Engine failed.
    Driver,
    /// Stopped by the user.
    Cancelled,
}

impl Kind {
    /// Every kind, in the order of the exit codes.
    pub const ALL: [Self; 11] = [
        Self::Bug,
        Self::Usage,
        Self::Configuration,
        Self::Dockerfile,
        Self::Source,
        Self::Step,
        Self::Registry,
        Self::Sandbox,
        Self::Veto,
        Self::Driver,
        Self::Cancelled,
    ];

    /// The exit code of the process. These numbers are a promise: scripts test them.
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Bug => 1,
            Self::Usage => 2,
            Self::Configuration => 3,
            Self::Dockerfile => 4,
            Self::Source => 5,
            Self::Step => 6,
            Self::Registry => 7,
            Self::Sandbox => 8,
            Self::Veto => 9,
            Self::Driver => 10,
            Self::Cancelled => 130,
        }
    }
}

/// What can be shown beside the message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Detail {
    /// Findings in a Dockerfile.
    Dockerfile {
        /// Name of the file.
        name: String,
        /// Its text; the spans point into it.
        text: String,
        /// The findings, warnings too.
        diagnostics: Vec<Diagnostic>,
    },
    /// A step that failed.
    Step {
        /// `[build 2/4] RUN make`.
        name: String,
        /// What was run.
        command: String,
        /// Exit code.
        code: i32,
        /// First and last line of the instruction, from 1.
        lines: Option<(u32, u32)>,
        /// The Dockerfile: name and text.
        dockerfile: Option<(String, String)>,
        /// Last lines of output, oldest first.
        tail: Vec<String>,
    },
    /// A blob of the state directory was damaged: another build makes or fetches it again.
    Damage,
    /// An instruction that failed without running anything.
    Instruction {
        /// Its first line, from 1.
        line: u32,
        /// The Dockerfile: name and text.
        dockerfile: (String, String),
    },
}

/// A failure as the doors see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// What sort.
    pub kind: Kind,
    /// What failed, one sentence without a full stop.
    pub message: String,
    /// Why: each one the cause of the one before.
    pub causes: Vec<String>,
    /// How to fix it.
    pub hints: Vec<String>,
    /// More to show.
    pub detail: Option<Box<Detail>>,
    /// How the build went that failed.
    pub record: Option<Box<Record>>,
}

impl Error {
    /// An error with a message only.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), causes: vec![], hints: vec![], detail: None, record: None }
    }

    /// From an error and its sources. A source whose text its parent already says is left out.
    pub fn from_chain(kind: Kind, error: &dyn std::error::Error) -> Self {
        let mut this = Self::new(kind, error.to_string());
        let mut said = this.message.clone();
        let mut next = error.source();
        while let Some(cause) = next {
            let text = cause.to_string();
            if !said.contains(&text) {
                this.causes.push(text.clone());
                said = text;
            }
            next = cause.source();
        }
        this
    }

    /// Something asked for that is refused by name.
    pub fn refused(option: &str, reason: impl fmt::Display) -> Self {
        Self::new(Kind::Usage, format!("{option} is not supported: {reason}"))
    }

    /// Was a blob of the state directory damaged, and will another build make it again?
    pub fn is_damage(&self) -> bool {
        matches!(self.detail.as_deref(), Some(Detail::Damage))
    }

    /// Adds a hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// Adds a cause.
    #[must_use]
    pub fn because(mut self, cause: impl Into<String>) -> Self {
        self.causes.push(cause.into());
        self
    }

    /// Puts what was being done in front: the old message becomes the first cause.
    #[must_use]
    pub fn while_doing(mut self, what: impl Into<String>) -> Self {
        let old = std::mem::replace(&mut self.message, what.into());
        self.causes.insert(0, old);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        for cause in &self.causes {
            write!(f, ": {cause}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

impl From<SandboxError> for Error {
    fn from(error: SandboxError) -> Self {
        if let SandboxError::Refused { .. } = error {
            return Self::from_chain(Kind::Usage, &error);
        }
        Self::from_chain(Kind::Sandbox, &error).hint("`ovenbird doctor` shows what each isolation level is missing on this machine")
    }
}

impl From<ovenbird_oci::store::StoreError> for Error {
    fn from(error: ovenbird_oci::store::StoreError) -> Self {
        Self::from_chain(Kind::Configuration, &error)
    }
}

impl From<ovenbird_oci::archive::ArchiveError> for Error {
    fn from(error: ovenbird_oci::archive::ArchiveError) -> Self {
        let kind = if matches!(error, ovenbird_oci::archive::ArchiveError::Store(_)) { Kind::Configuration } else { Kind::Source };
        Self::from_chain(kind, &error)
    }
}

impl From<ovenbird_oci::registry::RegistryError> for Error {
    fn from(error: ovenbird_oci::registry::RegistryError) -> Self {
        let kind = if error.is_configuration() { Kind::Configuration } else { Kind::Registry };
        Self::from_chain(kind, &error)
    }
}

impl From<ovenbird_oci::reference::ParseReferenceError> for Error {
    fn from(error: ovenbird_oci::reference::ParseReferenceError) -> Self {
        Self::from_chain(Kind::Usage, &error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_the_documented_ones() {
        let codes: Vec<_> = Kind::ALL.iter().map(|k| k.exit_code()).collect();
        assert_eq!(codes, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 130]);
    }

    #[test]
    fn chain_says_nothing_twice() {
        let error = SandboxError::Setup { what: "mount".into(), source: std::io::Error::other("denied") };
        let error = Error::from_chain(Kind::Sandbox, &error);
        assert_eq!((error.message.as_str(), error.causes.len()), ("cannot set up the step: mount failed: denied", 0));
        let error = error.while_doing("cannot build");
        assert_eq!(error.to_string(), "cannot build: cannot set up the step: mount failed: denied");
    }
}
