//! Image names: `registry/repository:tag@digest`.

use std::fmt;
use std::str::FromStr;

use crate::Digest;

/// A parsed and normalised image name. `debian` is `docker.io/library/debian:latest`.
/// Source: distribution/reference grammar.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Not a reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an image name: {reason}")]
pub struct ParseReferenceError {
    /// What was given.
    pub text: String,
    /// Why.
    pub reason: &'static str,
}

impl Reference {
    /// Host and optional port (`docker.io`, `localhost:5000`).
    pub fn registry(&self) -> &str {
        &self.registry
    }
    /// Path below the registry (`library/debian`).
    pub fn repository(&self) -> &str {
        &self.repository
    }
    /// Tag as given, `None` when only a digest was given; `latest` is filled in when neither was.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }
    /// Digest as given.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }
    /// Same repository, this tag, no digest.
    #[must_use]
    pub fn with_tag(&self, tag: &str) -> Self {
        Self { tag: Some(tag.into()), digest: None, ..self.clone() }
    }
    /// Same repository and tag, this digest.
    #[must_use]
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self { digest: Some(digest), ..self.clone() }
    }
    /// As people write it: `debian:12` for `docker.io/library/debian:12`.
    pub fn familiar(&self) -> String {
        let full = self.to_string();
        full.strip_prefix("docker.io/library/").or_else(|| full.strip_prefix("docker.io/")).unwrap_or(&full).to_owned()
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for Reference {
    type Err = ParseReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Err(ParseReferenceError { text: text.into(), reason: "parser missing" })
    }
}
