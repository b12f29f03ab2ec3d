//! Text to tree.
//!
//! Two steps: `lines` folds physical lines into instructions (directives, comments,
//! continuations, here-documents), `instruction` reads one of them by its own grammar. An
//! instruction with an error is left out of the tree and reported; reading goes on behind it.

pub(crate) mod instruction;
pub(crate) mod lines;
pub(crate) mod words;

use crate::ast::{Dockerfile, Instruction, Kind};
use crate::diagnostic::{Diagnostic, Severity, Span};

use instruction::Statement;
use lines::Lines;

/// Tree and findings.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Parsed {
    /// The tree, as far as it could be read.
    pub dockerfile: Dockerfile,
    /// Errors and warnings, in the order of the text.
    pub diagnostics: Vec<Diagnostic>,
}

impl Parsed {
    /// The first error, if any: with one, the tree is incomplete and must not be built.
    pub fn error(&self) -> Option<&Diagnostic> {
        self.diagnostics.iter().find(|d| d.severity == Severity::Error)
    }
}

/// Parses a whole Dockerfile. Never fails: errors are in `diagnostics`.
pub fn parse(text: &str) -> Parsed {
    let mut lines = Lines::of_file(text);
    let mut dockerfile = Dockerfile::default();
    let mut diagnostics = Vec::new();
    let mut any_instruction = false;
    // A broken FROM still opens a stage: without this every instruction below it would be reported.
    let mut stage_open = false;
    let mut outside_reported = false;
    while let Some(logical) = lines.next_logical() {
        any_instruction = true;
        let is_from = words::split_command(&logical.folded.text).name(&logical.folded.text).eq_ignore_ascii_case("from");
        let span = logical.span;
        match instruction::read(logical, lines.escape(), &mut diagnostics) {
            Ok(Statement::From(stage)) => dockerfile.stages.push(*stage),
            Ok(Statement::Instruction(instruction)) => match dockerfile.stages.last_mut() {
                Some(stage) => stage.instructions.push(*instruction),
                None if stage_open => {}
                None if matches!(instruction.kind, Kind::Arg(_)) => dockerfile.global_args.push(*instruction),
                None if !outside_reported => {
                    outside_reported = true;
                    diagnostics.push(Diagnostic {
                        severity: Severity::Error,
                        code: "missing-from".into(),
                        message: "no build stage in current context".to_owned(),
                        help: Some("a Dockerfile begins with FROM; only ARG may stand before it".to_owned()),
                        span,
                    });
                }
                None => {}
            },
            Err(diagnostic) => diagnostics.push(diagnostic),
        }
        stage_open |= is_from;
    }
    let failed = diagnostics.iter().any(|d| d.severity == Severity::Error);
    diagnostics.append(&mut lines.diagnostics);
    if !any_instruction {
        diagnostics.push(Diagnostic {
            severity: Severity::Error,
            code: "empty-file".into(),
            message: "file with no instructions".to_owned(),
            help: Some("a Dockerfile needs at least a FROM instruction".to_owned()),
            span: Span { start: text.len(), end: text.len() },
        });
    } else if !stage_open && !failed {
        diagnostics.push(Diagnostic {
            severity: Severity::Error,
            code: "missing-from".into(),
            message: "dockerfile contains no stages to build".to_owned(),
            help: Some("add a FROM instruction".to_owned()),
            span: Span { start: text.len(), end: text.len() },
        });
    }
    diagnostics.sort_by_key(|d| d.span.start);
    dockerfile.directives = lines.directives;
    Parsed { dockerfile, diagnostics }
}

/// Parses one instruction (an `ONBUILD` trigger) with the given escape character. The text may
/// hold here-documents; spans count from its own first byte.
pub fn parse_instruction(text: &str, escape: char) -> Result<Instruction, Diagnostic> {
    let error = |code: &'static str, message: &str, help: &str, span| Diagnostic {
        severity: Severity::Error,
        code: code.into(),
        message: message.to_owned(),
        help: Some(help.to_owned()),
        span,
    };
    let mut lines = Lines::of_instruction(text, escape);
    let Some(logical) = lines.next_logical() else {
        return Err(error("empty-file", "no instruction", "write an instruction such as RUN", Span { start: 0, end: text.len() }));
    };
    if !lines.diagnostics.is_empty() {
        return Err(lines.diagnostics.swap_remove(0));
    }
    let span = logical.span;
    let mut found = Vec::new();
    let statement = instruction::read(logical, escape, &mut found)?;
    if let Some(at) = found.iter().position(|d| d.severity == Severity::Error) {
        return Err(found.swap_remove(at));
    }
    if let Some(more) = lines.next_logical() {
        return Err(error("trailing-instruction", "more than one instruction", "keep only the first one", more.span));
    }
    match statement {
        Statement::Instruction(instruction) => Ok(*instruction),
        Statement::From(_) => Err(error("from-not-allowed", "FROM isn't allowed here", "use an instruction such as RUN", span)),
    }
}

#[cfg(test)]
mod tests;
