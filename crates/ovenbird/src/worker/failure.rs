//! An [`Error`] on the wire. The Dockerfile's text is not sent back: the caller has it.

use ovenbird_dockerfile::{Diagnostic, Severity, Span};
use serde::{Deserialize, Serialize};

use crate::error::{Detail, Error, Kind};
use crate::report::Record;

/// Longest text of a Dockerfile that is sent back.
const MAX_TEXT: usize = 1 << 20;

/// Longest text of a failure that is shown, and how many there are of one sort.
const MAX_WORDS: usize = 16 << 10;
const MAX_TEXTS: usize = 64;
/// How many findings of a Dockerfile.
const MAX_FINDINGS: usize = 10_000;

/// A failure.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Failure {
    kind: Kind,
    message: String,
    causes: Vec<String>,
    hints: Vec<String>,
    detail: Option<Shown>,
    /// How the build went, where there was one.
    record: Option<Box<Record>>,
}

/// [`Detail`].
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Shown {
    Dockerfile { dockerfile: Text, findings: Vec<Finding> },
    Step { name: String, command: String, code: i32, lines: Option<(u32, u32)>, dockerfile: Option<Text>, tail: Vec<String> },
    Damage,
    Instruction { line: u32, dockerfile: Text },
}

/// A Dockerfile.
#[derive(Serialize, Deserialize)]
enum Text {
    /// The one that the caller sent.
    #[serde(rename = "sent")]
    Sent,
    /// Another: name and text.
    #[serde(rename = "other")]
    Other(String, String),
}

#[derive(Serialize, Deserialize)]
struct Finding {
    error: bool,
    code: String,
    message: String,
    help: Option<String>,
    start: usize,
    end: usize,
}

impl Failure {
    /// For a caller who sent this Dockerfile (name and text).
    pub(crate) fn of(error: Error, sent: (&str, &str)) -> Self {
        let text = |name: String, text: String| {
            if (name.as_str(), text.as_str()) == sent {
                Some(Text::Sent)
            } else {
                (text.len() <= MAX_TEXT).then_some(Text::Other(name, text))
            }
        };
        let detail = error.detail.and_then(|detail| {
            Some(match *detail {
                Detail::Dockerfile { name, text: shown, diagnostics } => Shown::Dockerfile {
                    dockerfile: text(name, shown)?,
                    findings: diagnostics
                        .into_iter()
                        .map(|found| Finding {
                            error: found.severity == Severity::Error,
                            code: found.code.into_owned(),
                            message: found.message,
                            help: found.help,
                            start: found.span.start,
                            end: found.span.end,
                        })
                        .collect(),
                },
                Detail::Step { name, command, code, lines, dockerfile, tail } => {
                    let dockerfile = dockerfile.and_then(|(name, shown)| text(name, shown));
                    Shown::Step { name, command, code, lines, dockerfile, tail }
                }
                Detail::Damage => Shown::Damage,
                Detail::Instruction { line, dockerfile: (name, shown) } => Shown::Instruction { line, dockerfile: text(name, shown)? },
            })
        });
        let record = error.record;
        Self { kind: error.kind, message: error.message, causes: error.causes, hints: error.hints, detail, record }
    }

    /// As it was, for the caller who sent this Dockerfile.
    pub(crate) fn into_error(self, sent: (&str, &str)) -> Error {
        let text = |text: Text| match text {
            Text::Sent => (sent.0.to_owned(), sent.1.to_owned()),
            Text::Other(name, text) => (name, text),
        };
        let detail = self.detail.map(|detail| {
            Box::new(match detail {
                Shown::Dockerfile { dockerfile, findings } => {
                    let (name, text) = text(dockerfile);
                    let diagnostics = findings
                        .into_iter()
                        .take(MAX_FINDINGS)
                        .map(|found| Diagnostic {
                            severity: if found.error { Severity::Error } else { Severity::Warning },
                            code: found.code.into(),
                            message: cut(found.message),
                            help: found.help.map(cut),
                            // Foreign numbers: the text is cut with them.
                            span: Span { start: within(&text, found.start), end: within(&text, found.end).max(within(&text, found.start)) },
                        })
                        .collect();
                    Detail::Dockerfile { name, text, diagnostics }
                }
                Shown::Step { name, command, code, lines, dockerfile, tail } => {
                    Detail::Step { name: cut(name), command, code, lines, dockerfile: dockerfile.map(text), tail: few(tail) }
                }
                Shown::Damage => Detail::Damage,
                Shown::Instruction { line, dockerfile } => Detail::Instruction { line, dockerfile: text(dockerfile) },
            })
        });
        Error { kind: self.kind, message: cut(self.message), causes: few(self.causes), hints: few(self.hints), detail, record: self.record }
    }
}

/// Text of a worker, which may say anything.
fn cut(mut text: String) -> String {
    if text.len() > MAX_WORDS {
        text.truncate(text.floor_char_boundary(MAX_WORDS));
        text.push('…');
    }
    text
}

fn few(texts: Vec<String>) -> Vec<String> {
    texts.into_iter().take(MAX_TEXTS).map(cut).collect()
}

fn within(text: &str, at: usize) -> usize {
    text.floor_char_boundary(at.min(text.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_arrive_as_they_were() {
        let sent = ("Dockerfile", "FROM a\nRUN é\n");
        let dockerfile = Some(("Dockerfile".to_owned(), sent.1.to_owned()));
        let finding =
            Diagnostic { severity: Severity::Error, code: "x".into(), message: "m".into(), help: None, span: Span { start: 7, end: 13 } };
        for detail in [
            None,
            Some(Detail::Damage),
            Some(Detail::Instruction { line: 2, dockerfile: ("other".into(), "FROM x".into()) }),
            Some(Detail::Step { name: "s".into(), command: "c".into(), code: 3, lines: Some((1, 2)), dockerfile, tail: vec!["t".into()] }),
            Some(Detail::Dockerfile { name: "Dockerfile".into(), text: sent.1.into(), diagnostics: vec![finding] }),
        ] {
            let mut error = Error::new(Kind::Step, "failed").because("why").hint("how");
            error.detail = detail.map(Box::new);
            let wire = serde_json::to_string(&Failure::of(error.clone(), sent)).unwrap();
            assert_eq!(wire.matches("FROM a").count(), 0, "the text is not sent back");
            assert_eq!(serde_json::from_str::<Failure>(&wire).unwrap().into_error(sent), error);
        }
    }

    #[test]
    fn a_worker_does_not_flood() {
        let mut error = Error::new(Kind::Driver, "é".repeat(1 << 20));
        error.causes = vec!["b".repeat(1 << 20); 1000];
        let told = Failure::of(error, ("", "")).into_error(("", ""));
        assert!(told.message.len() < 20 << 10 && told.message.ends_with('…'));
        assert_eq!((told.causes.len(), told.causes[0].len()), (MAX_TEXTS, MAX_WORDS + '…'.len_utf8()));
    }
}
