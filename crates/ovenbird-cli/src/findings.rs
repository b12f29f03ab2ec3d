//! Findings in a Dockerfile as text, as JSON, and as SARIF 2.1.0 for code scanners.
//!
//! Lines and columns count from one; a column is a character; the end column is one past the last character. A finding about no place in
//! the file (a build argument that nobody takes) has none.

use std::fmt::Write as _;

use clap::ValueEnum;
use ovenbird::{Error, Kind};
use ovenbird_dockerfile::diagnostic::render;
use ovenbird_dockerfile::lint::rules::{self, RULES};
use ovenbird_dockerfile::redact::without_passwords;
use ovenbird_dockerfile::{Diagnostic, Severity, Span};
use ovenbird_engine::frontend::Findings;
use serde::Serialize;
use serde_json::{Value, json};

/// `--format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people: each finding with its lines
    Text,
    /// An array of objects: rule, severity, message, file, line, column, endLine, endColumn, help, page
    Json,
    /// SARIF 2.1.0
    Sarif,
}

/// Everything that goes to standard output.
pub(crate) fn show(format: Format, found: &Findings, file: &str, text: &str) -> Result<String, Error> {
    let rows = || rows(&found.diagnostics, file, text);
    let json = match format {
        Format::Text if found.diagnostics.is_empty() => return Ok(format!("{file}: no findings\n")),
        Format::Text => {
            let shown = found.diagnostics.iter().map(|finding| without_passwords(&render(finding, file, text)).into_owned());
            return Ok(shown.collect());
        }
        Format::Json => serde_json::to_string_pretty(&rows()),
        Format::Sarif => serde_json::to_string_pretty(&sarif(&rows(), found)),
    };
    json.map(|json| json + "\n").map_err(|e| Error::from_chain(Kind::Bug, &e))
}

/// What an image that could not be had leaves open.
pub(crate) fn unchecked(image: &str, reason: &str) -> String {
    format!("not checked: variables, shell and platform of {image}, which cannot be looked up: {reason}")
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row<'a> {
    rule: &'a str,
    severity: &'static str,
    message: &'a str,
    file: &'a str,
    #[serde(flatten)]
    place: Place,
    help: Option<&'a str>,
    /// Of the rule; errors have none.
    page: Option<String>,
}

#[derive(Debug, Serialize, Clone, Copy, Default)]
#[serde(rename_all = "camelCase")]
struct Place {
    line: Option<usize>,
    column: Option<usize>,
    end_line: Option<usize>,
    end_column: Option<usize>,
}

fn rows<'a>(diagnostics: &'a [Diagnostic], file: &'a str, text: &str) -> Vec<Row<'a>> {
    let starts: Vec<usize> = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
    let row = |finding: &'a Diagnostic| Row {
        rule: &finding.code,
        severity: match finding.severity {
            Severity::Warning => "warning",
            Severity::Error => "error",
        },
        message: &finding.message,
        file,
        place: if finding.span == Span::default() { Place::default() } else { place(finding.span, text, &starts) },
        help: finding.help.as_deref(),
        page: rules::find(&finding.code).map(rules::Rule::page),
    };
    diagnostics.iter().map(row).collect()
}

fn place(span: Span, text: &str, starts: &[usize]) -> Place {
    let position = |offset: usize| {
        let offset = text.floor_char_boundary(offset);
        let line = starts.partition_point(|start| *start <= offset);
        (Some(line), Some(text[starts[line - 1]..offset].chars().count() + 1))
    };
    let ((line, column), (end_line, end_column)) = (position(span.start), position(span.end.max(span.start)));
    Place { line, column, end_line, end_column }
}

fn sarif(rows: &[Row<'_>], found: &Findings) -> Value {
    let mut rules: Vec<Value> = RULES
        .iter()
        .map(|rule| {
            json!({
                "id": rule.name,
                "name": rule.name,
                "shortDescription": { "text": format!("{}.", rule.summary) },
                "help": { "text": format!("See {}.", rule.page()) },
                "defaultConfiguration": { "level": "warning", "enabled": !rule.experimental },
            })
        })
        .collect();
    // Errors have codes that are no rules of the linter.
    let mut ids: Vec<&str> = RULES.iter().map(|rule| rule.name).collect();
    for row in rows {
        if !ids.contains(&row.rule) {
            ids.push(row.rule);
            rules.push(json!({ "id": row.rule, "defaultConfiguration": { "level": "error" } }));
        }
    }
    let results: Vec<Value> = rows
        .iter()
        .map(|row| {
            let mut place = json!({ "artifactLocation": { "uri": uri(row.file) } });
            if let Place { line: Some(line), column, end_line, end_column } = row.place {
                place["region"] = json!({ "startLine": line, "startColumn": column, "endLine": end_line, "endColumn": end_column });
            }
            let text = row.help.map_or_else(|| row.message.to_owned(), |help| format!("{}. Help: {help}", row.message));
            json!({
                "ruleId": row.rule,
                "ruleIndex": ids.iter().position(|id| *id == row.rule),
                "level": row.severity,
                "message": { "text": text },
                "locations": [{ "physicalLocation": place }],
            })
        })
        .collect();
    let notes: Vec<Value> =
        found.unknown.iter().map(|(image, reason)| json!({ "level": "note", "message": { "text": unchecked(image, reason) } })).collect();
    json!({
        "$schema": "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json",
        "version": "2.1.0",
        "runs": [{
            "tool": { "driver": { "name": "Ovenbird", "version": env!("CARGO_PKG_VERSION"), "rules": rules } },
            "invocations": [{ "executionSuccessful": true, "toolExecutionNotifications": notes }],
            "columnKind": "unicodeCodePoints",
            "results": results,
        }],
    })
}

/// A path as a reference that may stand in a URI.
fn uri(path: &str) -> String {
    let mut out = String::from(if path.starts_with('/') { "file://" } else { "" });
    for byte in path.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => out.push(char::from(byte)),
            _ => {
                let _ = write!(out, "%{byte:02X}");
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn finding(code: &'static str, severity: Severity, start: usize, end: usize) -> Diagnostic {
        Diagnostic { severity, code: code.into(), message: format!("about {code}"), help: Some("do it".into()), span: Span { start, end } }
    }

    const TEXT: &str = "FROM é AS Bé\nCOPY \\\n  a b\n";

    fn found() -> Findings {
        let stage = TEXT.find("Bé").unwrap();
        Findings {
            diagnostics: vec![
                finding("UnconsumedBuildArg", Severity::Warning, 0, 0),
                finding("StageNameCasing", Severity::Warning, stage, stage + 3),
                finding("unknown-instruction", Severity::Error, TEXT.find("COPY").unwrap(), TEXT.len() - 1),
            ],
            unknown: BTreeMap::from([("debian".to_owned(), "no route".to_owned())]),
        }
    }

    fn parsed(format: Format, found: &Findings) -> Value {
        serde_json::from_str(&show(format, found, "dir/a b#1", TEXT).unwrap()).unwrap()
    }

    #[test]
    fn places() {
        let rows = parsed(Format::Json, &found());
        let places: Vec<Vec<&Value>> = rows
            .as_array()
            .unwrap()
            .iter()
            .map(|row| ["line", "column", "endLine", "endColumn"].iter().map(|key| &row[key]).collect())
            .collect();
        assert_eq!(json!(places), json!([[null, null, null, null], [1, 11, 1, 13], [2, 1, 3, 6]]));
        assert_eq!(rows[1]["page"], "docs/reference/lint/StageNameCasing.md");
        assert_eq!((&rows[2]["page"], &rows[2]["severity"]), (&Value::Null, &json!("error")));
        assert_eq!(
            (&rows[2]["file"], &rows[2]["help"], &rows[2]["rule"]),
            (&json!("dir/a b#1"), &json!("do it"), &json!("unknown-instruction"))
        );
    }

    /// What the schema of SARIF 2.1.0 requires, and what scanners do.
    #[test]
    fn sarif_is_well_formed() {
        for found in [found(), Findings::default()] {
            let log = parsed(Format::Sarif, &found);
            assert_eq!(log["version"], "2.1.0");
            assert!(log["$schema"].as_str().unwrap().ends_with("sarif-schema-2.1.0.json"));
            let [run] = log["runs"].as_array().unwrap().as_slice() else { panic!("one run") };
            let driver = &run["tool"]["driver"];
            assert_eq!(driver["name"], "Ovenbird");
            let rules = driver["rules"].as_array().unwrap();
            let ids: Vec<&str> = rules.iter().map(|rule| rule["id"].as_str().unwrap()).collect();
            assert!(RULES.iter().all(|rule| ids.contains(&rule.name)));
            assert!(ids.iter().enumerate().all(|(at, id)| !ids[..at].contains(id)), "rules are unique: {ids:?}");
            let levels = ["none", "note", "warning", "error"];
            for rule in rules {
                assert!(levels.contains(&rule["defaultConfiguration"]["level"].as_str().unwrap()));
            }
            let results = run["results"].as_array().unwrap();
            assert_eq!(results.len(), found.diagnostics.len());
            for (result, diagnostic) in results.iter().zip(&found.diagnostics) {
                assert!(result["message"]["text"].as_str().unwrap().starts_with(&diagnostic.message));
                assert!(levels.contains(&result["level"].as_str().unwrap()));
                let at = usize::try_from(result["ruleIndex"].as_u64().unwrap()).unwrap();
                assert_eq!(ids[at], result["ruleId"]);
                let place = &result["locations"][0]["physicalLocation"];
                assert_eq!(place["artifactLocation"]["uri"], "dir/a%20b%231");
                if let Some(region) = place.get("region") {
                    for key in ["startLine", "startColumn", "endLine", "endColumn"] {
                        assert!(region[key].as_u64().unwrap() >= 1, "{region}");
                    }
                }
            }
            let invocation = &run["invocations"][0];
            assert_eq!(invocation["executionSuccessful"], true);
            assert_eq!(invocation["toolExecutionNotifications"].as_array().unwrap().len(), found.unknown.len());
        }
    }

    #[test]
    fn text() {
        let shown = show(Format::Text, &found(), "D", TEXT).unwrap();
        for part in [
            "warning[StageNameCasing]: about",
            " --> D:1:11",
            "= help: do it",
            "= see: docs/reference/lint/StageNameCasing.md",
            "error[unknown",
        ] {
            assert!(shown.contains(part), "{part}: {shown}");
        }
        assert_eq!(show(Format::Text, &Findings::default(), "D", TEXT).unwrap(), "D: no findings\n");
        assert_eq!(uri("/a/é"), "file:///a/%C3%A9");
    }
}
