//! What the parser and the linter have to say, with the place in the text.

/// A half-open range of byte offsets into the Dockerfile's text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Span {
    /// First byte.
    pub start: usize,
    /// One past the last byte.
    pub end: usize,
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// The build goes on.
    Warning,
    /// The build cannot start.
    Error,
}

/// One finding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diagnostic {
    /// How bad it is.
    pub severity: Severity,
    /// Stable name: a BuildKit rule name (`StageNameCasing`) for lint, kebab-case for errors (`unknown-instruction`).
    pub code: &'static str,
    /// What failed and why, one sentence, without the place.
    pub message: String,
    /// How to fix it ("did you mean `COPY`?").
    pub help: Option<String>,
    /// Where.
    pub span: Span,
}
