//! `.dockerignore` patterns and `COPY` wildcards, with Moby's rules (not gitignore's).

/// What can be wrong with a pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("pattern {pattern:?} is malformed: {reason}")]
pub struct PatternError {
    /// As written.
    pub pattern: String,
    /// Why.
    pub reason: &'static str,
}

/// A compiled ignore file. Last match wins; a match of a parent folder counts.
#[derive(Debug, Clone, Default)]
pub struct Patterns {}

impl Patterns {
    /// From the text of an ignore file (comments, blank lines, BOM).
    pub fn parse(_text: &str) -> Result<Self, PatternError> {
        Ok(Self {})
    }

    /// From single patterns (`--exclude`).
    pub fn new<S: AsRef<str>>(_patterns: &[S]) -> Result<Self, PatternError> {
        Ok(Self {})
    }

    /// True when there is no pattern.
    pub fn is_empty(&self) -> bool {
        true
    }

    /// Is this path (relative, `/`-separated) left out? Parents are considered.
    pub fn is_ignored(&self, _path: &str) -> bool {
        false
    }

    /// May a walk skip everything below this ignored folder (no `!` pattern can match below it)?
    pub fn can_prune(&self, _dir: &str) -> bool {
        false
    }
}

/// Go's `filepath.Match`: `*`, `?`, `[a-z]`, `[^a]`, `\`; `*` never matches `/`.
pub fn go_match(_pattern: &str, _name: &str) -> Result<bool, PatternError> {
    Ok(false)
}
