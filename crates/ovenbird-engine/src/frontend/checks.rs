//! Warnings and the configuration that rules them: `# check=`, or the build argument that overrides it.

use std::collections::BTreeSet;

use ovenbird_dockerfile::lint::{CheckConfig, InPlace};
use ovenbird_dockerfile::{Diagnostic, Severity, Span};

/// Most warnings of one file: nobody reads more, and a hostile file could make millions.
pub(super) const MAX_WARNINGS: usize = 1000;

/// Code of the error that `error=true` makes of warnings.
pub(super) const VIOLATION: &str = "lint";

/// Is it a finding that `error=true` makes an error? Arguments that nobody takes say nothing of the file.
pub(super) fn is_violation(finding: &Diagnostic) -> bool {
    finding.severity == Severity::Warning && finding.code != "UnconsumedBuildArg"
}

/// Reads the value of the directive or of the build argument. A directive that cannot be read is shown where it stands.
pub(super) fn configuration(text: &str, config: &str) -> Result<CheckConfig, Diagnostic> {
    CheckConfig::parse(config).map_err(|reason| {
        // A build argument is not in the text.
        let directive = text.find("check").unwrap_or(0);
        let start = text[directive..].find(config).map(|at| directive + at);
        let span = start.map_or(Span::default(), |start| Span { start, end: start + config.len() });
        error("invalid-check", span, reason.to_string())
    })
}

/// Warnings found so far, filtered by the configuration.
#[derive(Debug)]
pub(super) struct Checks {
    in_place: InPlace,
    config: CheckConfig,
    found: Vec<Diagnostic>,
}

/// Says that an input is wrong.
pub(super) fn error(code: &'static str, span: Span, message: impl Into<String>) -> Diagnostic {
    Diagnostic { severity: Severity::Error, code: code.into(), message: message.into(), help: None, span }
}

/// Adds ` (did you mean …?)`.
pub(super) fn with_suggestion(mut diagnostic: Diagnostic, suggestion: Option<&str>) -> Diagnostic {
    if let Some(suggestion) = suggestion {
        diagnostic.message = format!("{} (did you mean {suggestion}?)", diagnostic.message);
    }
    diagnostic
}

impl Checks {
    /// `text` is the Dockerfile, `config` the value of the directive.
    pub(super) fn new(text: &str, config: &str) -> Result<Self, Diagnostic> {
        let config = configuration(text, config)?;
        Ok(Self { in_place: InPlace::of(text), config, found: Vec::new() })
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
        self.take(Diagnostic { severity: Severity::Warning, code: code.into(), message, help: help.map(str::to_owned), span });
    }

    /// Like [`Checks::warn`].
    pub(super) fn take(&mut self, warning: Diagnostic) {
        let runs = self.config.allows(&warning.code) && !self.in_place.skips(&warning.code, warning.span);
        if runs && !self.is_full() && !self.found.contains(&warning) {
            self.found.push(warning);
        }
    }

    /// Records findings of the linter, which read the configuration already.
    pub(super) fn extend(&mut self, findings: impl IntoIterator<Item = Diagnostic>) {
        self.found.extend(findings);
    }

    /// With `error=true`: one error that names the rules that were violated.
    pub(super) fn verdict(&self) -> Result<(), Diagnostic> {
        let violations = || self.found.iter().filter(|finding| is_violation(finding));
        let (true, Some(first)) = (self.config.error, violations().next()) else { return Ok(()) };
        let rules: BTreeSet<&str> = violations().map(|finding| &*finding.code).collect();
        let rules: Vec<&str> = rules.into_iter().collect();
        Err(error(VIOLATION, first.span, format!("lint violation found for rules: {}", rules.join(", "))))
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
            let text = "FROM a\n# check=skip=C\nRUN x\n";
            let mut checks = Checks::new(text, config).map_err(|e| e.code.into_owned())?;
            let span = Span { start: 22, end: 27 };
            for code in ["A", "B", "B", "C"] {
                checks.warn(code, span, code.to_lowercase(), None);
            }
            checks.verdict().map_err(|e| e.message)?;
            Ok(checks.into_warnings().iter().map(|d| d.code.clone()).collect::<Vec<_>>().join(","))
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
