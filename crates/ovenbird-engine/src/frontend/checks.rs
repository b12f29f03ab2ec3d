//! Warnings and the `# check=` directive that rules them.

use std::collections::BTreeSet;

use ovenbird_dockerfile::{Diagnostic, Severity, Span};

/// Warnings found so far, filtered by the configuration.
#[derive(Debug, Default)]
pub(super) struct Checks {
    skip_all: bool,
    skip: BTreeSet<String>,
    fail: bool,
    found: Vec<Diagnostic>,
}

/// Says that an input is wrong.
pub(super) fn error(code: &'static str, span: Span, message: impl Into<String>) -> Diagnostic {
    Diagnostic { severity: Severity::Error, code, message: message.into(), help: None, span }
}

/// Adds `did you mean …?`.
pub(super) fn with_suggestion(mut diagnostic: Diagnostic, suggestion: Option<&str>) -> Diagnostic {
    if let Some(suggestion) = suggestion {
        diagnostic.help = Some(format!("did you mean {suggestion}?"));
    }
    diagnostic
}

impl Checks {
    /// Reads `skip=A,B;error=true;experimental=C`.
    pub(super) fn parse(value: &str) -> Result<Self, Diagnostic> {
        let mut checks = Self::default();
        let invalid = |reason: String| {
            let mut diagnostic = error("check-directive", Span::default(), format!("failed to parse check options: {reason}"));
            diagnostic.help = Some("write `# check=skip=RULE,RULE;error=true`".into());
            diagnostic
        };
        for part in value.split(';').map(str::trim).filter(|part| !part.is_empty()) {
            let Some((key, value)) = part.split_once('=') else {
                return Err(invalid(format!("invalid check option {part:?}")));
            };
            match key.trim() {
                "skip" => {
                    checks.skip = value.split(',').map(|rule| rule.trim().to_owned()).collect();
                    checks.skip_all = checks.skip.contains("all");
                }
                "error" => {
                    checks.fail = parse_bool(value.trim()).ok_or_else(|| invalid(format!("invalid value {value:?} of check option error")))?;
                }
                "experimental" => {}
                other => return Err(invalid(format!("invalid check option {other:?}"))),
            }
        }
        Ok(checks)
    }

    /// Records a warning unless its rule is skipped or it was said before.
    pub(super) fn warn(&mut self, code: &'static str, span: Span, message: String, suggestion: Option<&str>) {
        let warning = Diagnostic { severity: Severity::Warning, code, message, help: None, span };
        self.record(with_suggestion(warning, suggestion));
    }

    /// Records a finding made elsewhere, under the same rules.
    pub(super) fn record(&mut self, warning: Diagnostic) {
        if !self.skip_all && !self.skip.contains(warning.code) && !self.found.contains(&warning) {
            self.found.push(warning);
        }
    }

    /// With `error=true`: one error that names the rules that were violated.
    pub(super) fn verdict(&self) -> Result<(), Diagnostic> {
        if !self.fail || self.found.is_empty() {
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
    fn directive() {
        let run = |directive: &str| {
            let mut checks = Checks::parse(directive).map_err(|e| e.message)?;
            checks.warn("A", Span::default(), "a".into(), None);
            checks.warn("B", Span::default(), "b".into(), None);
            checks.warn("B", Span::default(), "b".into(), None);
            checks.verdict().map_err(|e| e.message)?;
            Ok(checks.into_warnings().iter().map(|d| d.code).collect::<Vec<_>>().join(","))
        };
        for (directive, expect) in [
            ("", Ok("A,B")),
            ("skip=A", Ok("B")),
            ("skip=A, B;error=true", Ok("")),
            ("skip=all;error=true", Ok("")),
            ("error=false", Ok("A,B")),
            ("error=true", Err("lint violation found for rules: A, B")),
            ("skip=A;error=true;experimental=all", Err("lint violation found for rules: B")),
            ("error=maybe", Err("failed to parse check options: invalid value \"maybe\" of check option error")),
            ("nonsense", Err("failed to parse check options: invalid check option \"nonsense\"")),
            ("x=y", Err("failed to parse check options: invalid check option \"x\"")),
        ] {
            let got: Result<String, String> = run(directive);
            assert_eq!(got.as_deref().map_err(String::as_str), expect, "{directive}");
        }
    }
}
