//! Errors for people: what failed, where in the Dockerfile, why, and how to fix it.

use std::fmt::Write as _;

use ovenbird::{Detail, Error};
use ovenbird_dockerfile::Severity;
use ovenbird_dockerfile::diagnostic::render;
use ovenbird_dockerfile::redact::without_passwords;

use crate::progress::{Escapes, clean};

/// Findings that are shown; a file that is no Dockerfile has one a line.
const MAX_DIAGNOSTICS: usize = 10;
/// Lines around the marked ones.
const CONTEXT: usize = 2;

/// The whole text of an error, with a newline at the end.
pub(crate) fn error(error: &Error, colour: bool) -> String {
    let paint = |code: &str, text: &str| if colour { format!("\u{1b}[{code}m{text}\u{1b}[0m") } else { text.to_owned() };
    let mut out = String::new();
    let label = || paint("1;31", "error:");
    match error.detail.as_deref() {
        Some(Detail::Dockerfile { name, text, diagnostics }) => {
            // Errors say why it failed: warnings must not crowd them out.
            let mut chosen: Vec<_> = diagnostics.iter().collect();
            chosen.sort_by_key(|diagnostic| std::cmp::Reverse(diagnostic.severity));
            chosen.truncate(MAX_DIAGNOSTICS);
            chosen.sort_by_key(|diagnostic| diagnostic.span.start);
            for diagnostic in chosen {
                let shown = render(diagnostic, name, text);
                // The first word is the severity.
                let (severity, rest) = shown.split_at(shown.find('[').unwrap_or(0));
                out.push_str(&paint(if diagnostic.severity == Severity::Error { "1;31" } else { "1;33" }, severity));
                out.push_str(rest);
            }
            if diagnostics.len() > MAX_DIAGNOSTICS {
                let _ = writeln!(out, "… and {} more", diagnostics.len() - MAX_DIAGNOSTICS);
            }
            let _ = writeln!(out, "{} {}", label(), one_line(&error.message));
        }
        detail => {
            let _ = writeln!(out, "{} {}", label(), block(&error.message));
            for cause in &error.causes {
                let _ = writeln!(out, "  because {}", block(cause));
            }
            match detail {
                Some(Detail::Step { lines, dockerfile, tail, .. }) => {
                    if let (Some((name, text)), Some((first, last))) = (dockerfile, lines) {
                        out.push_str(&marked_lines(name, text, *first as usize, *last as usize));
                    }
                    let said = tail.iter().rposition(|line| !line.trim().is_empty()).map_or(0, |at| at + 1);
                    if said > 0 {
                        out.push_str("last output:\n");
                        for line in &tail[..said] {
                            let _ = writeln!(out, "{}", format!("  | {}", one_line(line)).trim_end());
                        }
                    }
                }
                Some(Detail::Instruction { line, dockerfile: (name, text) }) => {
                    out.push_str(&marked_lines(name, text, *line as usize, *line as usize));
                }
                _ => {}
            }
        }
    }
    for hint in &error.hints {
        let _ = writeln!(out, "{} {}", paint("1;36", "hint:"), block(hint));
    }
    // Lines of the Dockerfile, too.
    without_passwords(&out).into_owned()
}

/// A remark that may hold foreign text.
pub(crate) fn note(text: &str) -> String {
    format!("note: {}\n", one_line(text))
}

/// Foreign text on one line.
pub(crate) fn one_line(text: &str) -> String {
    clean(&text.trim_end().replace('\n', " "), Escapes::Strip)
}

/// Foreign text that may have several lines (the excerpt of a settings file), indented below the first.
fn block(text: &str) -> String {
    text.trim_end().lines().map(|line| clean(line, Escapes::Strip)).collect::<Vec<_>>().join("\n    ")
}

/// The lines `first` to `last`, from 1, marked among their neighbours.
fn marked_lines(name: &str, text: &str, first: usize, last: usize) -> String {
    let mut out = format!("{}:{first}\n", one_line(name));
    let ruler = "-".repeat(20);
    let _ = writeln!(out, "{ruler}");
    for (at, line) in text.lines().enumerate().map(|(at, line)| (at + 1, line)) {
        if at + CONTEXT >= first && at <= last.saturating_add(CONTEXT) {
            let marker = if (first..=last).contains(&at) { ">>>" } else { "   " };
            let _ = writeln!(out, "{}", format!("{at:>4} | {marker} {}", one_line(line)).trim_end());
        }
    }
    let _ = writeln!(out, "{ruler}");
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use ovenbird::Kind;
    use ovenbird_dockerfile::{Diagnostic, Span};

    const TEXT: &str = "FROM debian:12\nCOPY . .\n\nRUN make \\\n    all\nCMD [\"x\"]\n";

    #[test]
    fn a_failed_step() {
        let mut failed = Error::new(
            Kind::Step,
            "[build 2/3] RUN make     all: process \"/bin/sh -c make     all\" did not complete successfully: exit code: 2",
        )
        .hint("look at the last output");
        failed.detail = Some(Box::new(Detail::Step {
            name: "[build 2/3] RUN make".into(),
            command: "/bin/sh -c make     all".into(),
            code: 2,
            lines: Some((4, 5)),
            dockerfile: Some(("Dockerfile".into(), TEXT.into())),
            tail: vec!["cc a.c".into(), "a.c:1: \u{1b}[31merror\u{1b}[0m\u{1b}[2J".into(), String::new()],
        }));
        insta::assert_snapshot!(error(&failed, false));
    }

    #[test]
    fn findings_in_a_dockerfile() {
        let mut failed = Error::new(Kind::Dockerfile, "Dockerfile has 1 error");
        let at = TEXT.find("make").unwrap();
        failed.detail = Some(Box::new(Detail::Dockerfile {
            name: "Dockerfile".into(),
            text: TEXT.into(),
            diagnostics: vec![
                Diagnostic {
                    severity: Severity::Error,
                    code: "unknown-instruction".into(),
                    message: "unknown instruction `make`".into(),
                    help: Some("did you mean `MAINTAINER`?".into()),
                    span: Span { start: at, end: at + 4 },
                },
                Diagnostic {
                    severity: Severity::Warning,
                    code: "X".into(),
                    message: "odd".into(),
                    help: None,
                    span: Span { start: 9999, end: 1 },
                },
            ],
        }));
        insta::assert_snapshot!(error(&failed, false));
    }

    #[test]
    fn warnings_do_not_hide_the_error() {
        let mut failed = Error::new(Kind::Dockerfile, "Dockerfile has 1 error");
        let finding = |severity, code: &'static str| Diagnostic {
            severity,
            code: code.into(),
            message: "odd".into(),
            help: None,
            span: Span { start: 1, end: 2 },
        };
        let mut diagnostics = vec![finding(Severity::Warning, "X"); 20];
        diagnostics.push(finding(Severity::Error, "why"));
        failed.detail = Some(Box::new(Detail::Dockerfile { name: "D".into(), text: TEXT.into(), diagnostics }));
        let shown = error(&failed, false);
        assert!(shown.contains("error[why]: odd") && shown.contains("… and 11 more"), "{shown}");
    }

    #[test]
    fn causes_hints_and_an_instruction() {
        let mut failed =
            Error::new(Kind::Source, "COPY x y: no such file").because("x is not in the context").hint("is it in .dockerignore?");
        failed.detail = Some(Box::new(Detail::Instruction { line: 2, dockerfile: ("D".into(), TEXT.into()) }));
        insta::assert_snapshot!(error(&failed, false));
        assert!(error(&failed, true).starts_with("\u{1b}[1;31merror:\u{1b}[0m COPY"));
    }
}
