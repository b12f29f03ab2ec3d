//! Warnings and the configuration that rules them: `# check=`, or the build argument that overrides it.

use std::collections::BTreeSet;

use ovenbird_dockerfile::lint::CheckConfig;
use ovenbird_dockerfile::{Diagnostic, Severity, Span};

/// Most warnings of one file: nobody reads more, and a hostile file could make millions.
const MAX_WARNINGS: usize = 1000;

/// Warnings found so far, filtered by the configuration.
#[derive(Debug)]
pub(super) struct Checks<'a> {
    text: &'a str,
    config: CheckConfig,
    found: Vec<Diagnostic>,
}

/// Says that an input is wrong.
pub(super) fn error(code: &'static str, span: Span, message: impl Into<String>) -> Diagnostic {
    Diagnostic { severity: Severity::Error, code, message: message.into(), help: None, span }
}

/// Adds ` (did you mean …?)`.
pub(super) fn with_suggestion(mut diagnostic: Diagnostic, suggestion: Option<&str>) -> Diagnostic {
    if let Some(suggestion) = suggestion {
        diagnostic.message = format!("{} (did you mean {suggestion}?)", diagnostic.message);
    }
    diagnostic
}

impl<'a> Checks<'a> {
    /// `text` is the Dockerfile, `config` the value of the directive.
    pub(super) fn new(text: &'a str, config: &str) -> Result<Self, Diagnostic> {
        let config = CheckConfig::parse(config).map_err(|reason| error("invalid-check", Span::default(), reason.to_string()))?;
        Ok(Self { text, config, found: Vec::new() })
    }

    pub(super) fn config(&self) -> &CheckConfig {
        &self.config
    }

    /// No more warnings are taken.
    pub(super) fn is_full(&self) -> bool {
        self.found.len() >= MAX_WARNINGS
    }

    /// Records a warning unless its rule is skipped or it was said before.
    pub(super) fn warn(&mut self, code: &'static str, span: Span, message: String, help: Option<&str>) {
        let warning = Diagnostic { severity: Severity::Warning, code, message, help: help.map(str::to_owned), span };
        if !self.is_full() && self.config.allows(code) && !self.skipped_in_place(code, span) && !self.found.contains(&warning) {
            self.found.push(warning);
        }
    }

    /// Records findings of the linter, which read the configuration already.
    pub(super) fn extend(&mut self, findings: impl IntoIterator<Item = Diagnostic>) {
        self.found.extend(findings);
    }

    /// A comment `# check=skip=RULE` in the block right above an instruction holds for that instruction.
    fn skipped_in_place(&self, code: &str, span: Span) -> bool {
        let above = self.text.get(..span.start).unwrap_or_default();
        let mut comments = above.lines().rev().map_while(|line| line.trim().strip_prefix('#').map(str::trim));
        comments.any(|comment| comment.strip_prefix("check=").is_some_and(|c| CheckConfig::parse(c).is_ok_and(|c| !c.allows(code))))
    }

    /// With `error=true`: one error that names the rules that were violated.
    pub(super) fn verdict(&self) -> Result<(), Diagnostic> {
        if !self.config.error || self.found.is_empty() {
            return Ok(());
        }
        let rules: BTreeSet<&str> = self.found.iter().map(|d| d.code).collect();
        let rules: Vec<&str> = rules.into_iter().collect();
        Err(error("lint", self.found[0].span, format!("lint violation found for rules: {}", rules.join(", "))))
    }

    /// Everything recorded, in the order of the text.
    pub(super) fn into_warnings(mut self) -> Vec<Diagnostic> {
        self.found.sort_by_key(|d| d.span.start);
        self.found
    }
}

/// What Go's `strconv.ParseBool` accepts.
pub(super) fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn configuration() {
        let run = |config: &str| {
            let text = "# check=skip=C\nRUN x\n";
            let mut checks = Checks::new(text, config).map_err(|e| e.code.to_owned())?;
            let span = Span { start: 15, end: 20 };
            for code in ["A", "B", "B", "C"] {
                checks.warn(code, span, code.to_lowercase(), None);
            }
            checks.verdict().map_err(|e| e.message)?;
            Ok(checks.into_warnings().iter().map(|d| d.code).collect::<Vec<_>>().join(","))
        };
        for (config, expect) in [
            ("", Ok("A,B")),
            ("skip=A", Ok("B")),
            ("skip=A, B;error=true", Ok("")),
            ("skip=all;error=true", Ok("")),
            ("error=true", Err("lint violation found for rules: A, B")),
            ("skip=A;error=true;experimental=all", Err("lint violation found for rules: B")),
            ("error=maybe", Err("invalid-check")),
        ] {
            let got: Result<String, String> = run(config);
            assert_eq!(got.as_deref().map_err(String::as_str), expect, "{config}");
        }
    }
}
