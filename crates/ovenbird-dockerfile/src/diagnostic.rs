//! What the parser and the linter have to say, with the place in the text.

use std::borrow::Cow;
use std::fmt::Write as _;

use crate::lint::rules;

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
    pub code: Cow<'static, str>,
    /// What failed and why, one sentence, without the place.
    pub message: String,
    /// How to fix it ("did you mean `COPY`?").
    pub help: Option<String>,
    /// Where.
    pub span: Span,
}

/// Most columns of a source line that are shown.
const MAX_COLUMNS: usize = 160;

/// Shows a finding with its place:
///
/// ```text
/// error[unknown-instruction]: unknown instruction: RUNS (did you mean RUN?)
///   --> Dockerfile:3:1
///    |
///  3 | RUNS make
///    | ^^^^
///    = help: write `RUN`
/// ```
///
/// A finding of the linter also names the page of its rule.
///
/// Lines and columns count from one; a column is a character. Control characters of the text are
/// replaced, so a Dockerfile cannot write to the terminal. The result ends in a line feed. A finding about
/// no place (the default span) is shown without text.
pub fn render(diagnostic: &Diagnostic, file_name: &str, text: &str) -> String {
    let severity = match diagnostic.severity {
        Severity::Warning => "warning",
        Severity::Error => "error",
    };
    let mut out = format!("{severity}[{}]: {}\n", diagnostic.code, printable(&diagnostic.message));
    if diagnostic.span == Span::default() {
        let _ = writeln!(out, " --> {}", printable(file_name));
        out.push_str(&notes(diagnostic, 1));
        return out;
    }
    let (number, column) = line_column(text, diagnostic.span.start);
    let gutter = number.to_string().len() + 1;
    let line = text.split('\n').nth(number - 1).unwrap_or_default().trim_end_matches('\r');
    let length = text.get(diagnostic.span.start..diagnostic.span.end).map_or(0, |part| {
        let first = part.split('\n').next().unwrap_or_default();
        first.trim_end_matches('\r').chars().count()
    });
    // A long line is cut so that the marked place stays visible.
    let skip = column.saturating_sub(MAX_COLUMNS / 2);
    let mut shown = String::new();
    let mut marks = String::new();
    for (index, c) in line.chars().enumerate().skip(skip).take(MAX_COLUMNS) {
        let width = if c == '\t' { 4 } else { 1 };
        shown.extend(if c == '\t' { std::iter::repeat_n(' ', 4) } else { std::iter::repeat_n(visible(c), 1) });
        if index + 1 < column {
            marks.extend(std::iter::repeat_n(' ', width));
        } else if index + 1 < column + length.max(1) {
            marks.extend(std::iter::repeat_n('^', width));
        }
    }
    if !marks.contains('^') {
        marks.push('^');
    }
    let _ = writeln!(out, "{:>gutter$}--> {}:{number}:{column}", "", printable(file_name));
    let _ = writeln!(out, "{:>gutter$} |", "");
    let _ = writeln!(out, "{number:>gutter$} | {}", shown.trim_end());
    let _ = writeln!(out, "{:>gutter$} | {marks}", "");
    out.push_str(&notes(diagnostic, gutter));
    out
}

/// How to fix it, and where to read about its rule.
fn notes(diagnostic: &Diagnostic, gutter: usize) -> String {
    let mut out = String::new();
    if let Some(help) = &diagnostic.help {
        let _ = writeln!(out, "{:>gutter$} = help: {}", "", printable(help));
    }
    if let Some(rule) = rules::find(&diagnostic.code) {
        let _ = writeln!(out, "{:>gutter$} = see: {}", "", rule.page());
    }
    out
}

/// Line and column of a byte offset, both counted from one; a column is a character.
pub fn line_column(text: &str, offset: usize) -> (usize, usize) {
    let offset = text.floor_char_boundary(offset.min(text.len()));
    let before = &text[..offset];
    let start = before.rfind('\n').map_or(0, |i| i + 1);
    (before.matches('\n').count() + 1, before[start..].chars().count() + 1)
}

fn visible(c: char) -> char {
    if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }
}

fn printable(text: &str) -> String {
    text.chars().map(visible).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse;

    #[test]
    fn rendered_findings() {
        let mut shown = String::new();
        for text in [
            "FROM scratch\nRUNS echo hi\n",
            "FROM scratch\n\nCOPY --form=x \\\n  a b\n",
            "FROM scratch\nRUN \\\n\t--boo true\n",
            "FROM a AS 1\n",
            "",
            "# only a comment\n",
            "FROM scratch\nCOPY <<EOF /x\nbody\n",
            "FROM scratch\nBAD\u{1b}[31m x\n",
            "FROM scratch\r\nENV 안녕 \r\n",
            "FROM scratch\nHEALTHCHECK --interval=5 CMD x\n",
            "FROM scratch\nONBUILD COPY --chown=a --chown=b x y\n",
            &format!("FROM scratch\nRUN --mount=type=cache,target=/{},tgt=x true\n", "a".repeat(300)),
        ] {
            for diagnostic in parse(text).diagnostics {
                shown.push_str(&render(&diagnostic, "Dockerfile", text));
                shown.push('\n');
            }
        }
        insta::assert_snapshot!(shown);
    }

    #[test]
    fn places_count_from_one() {
        for (offset, expect) in [(0, (1, 1)), (1, (1, 2)), (3, (2, 1)), (4, (2, 1)), (5, (2, 1)), (6, (2, 2)), (99, (2, 3))] {
            assert_eq!(line_column("ab\n안b", offset), expect, "{offset}");
        }
    }
}
