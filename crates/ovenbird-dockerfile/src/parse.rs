//! Text to tree.

use crate::ast::{Dockerfile, Instruction};
use crate::diagnostic::Diagnostic;

/// Tree and findings.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Parsed {
    /// The tree, as far as it could be read.
    pub dockerfile: Dockerfile,
    /// Errors and warnings, in the order of the text.
    pub diagnostics: Vec<Diagnostic>,
}

/// Parses a whole Dockerfile. Never fails: errors are in `diagnostics`.
pub fn parse(_text: &str) -> Parsed {
    Parsed::default()
}

/// Parses one instruction (an `ONBUILD` trigger) with the given escape character.
pub fn parse_instruction(_text: &str, _escape: char) -> Result<Instruction, Diagnostic> {
    Err(Diagnostic {
        severity: crate::Severity::Error,
        code: "unknown-instruction",
        message: String::new(),
        help: None,
        span: crate::Span::default(),
    })
}
