//! From physical lines to logical ones: directives, comments, continuations, here-documents.
//!
//! Knows nothing of instructions except which of them may hold a here-document.

use std::ops::Range;

use crate::ast::{Directives, Heredoc};
use crate::diagnostic::{Diagnostic, Severity, Span};
use crate::expand::{EmptyEnv, Expander};

use super::words;

/// Text of an instruction with continuations folded, and where each piece came from.
#[derive(Debug, Default)]
pub(crate) struct Folded {
    pub(crate) text: String,
    /// Offset in `text`, offset in the file; ascending.
    pieces: Vec<(usize, usize)>,
}

impl Folded {
    fn push(&mut self, piece: &str, source: usize) {
        if !piece.is_empty() {
            self.pieces.push((self.text.len(), source));
            self.text.push_str(piece);
        }
    }

    /// Place in the file of the byte at `offset`.
    fn source(&self, offset: usize) -> usize {
        let index = self.pieces.partition_point(|(at, _)| *at <= offset).saturating_sub(1);
        self.pieces.get(index).map_or(0, |(at, source)| source + (offset - at))
    }

    /// Place in the file of a range of `text`. An empty range is the place just before the byte.
    pub(crate) fn span(&self, range: Range<usize>) -> Span {
        if range.is_empty() {
            let end = if range.start == 0 { self.source(0) } else { self.source(range.start - 1) + 1 };
            return Span { start: end, end };
        }
        Span { start: self.source(range.start), end: self.source(range.end - 1) + 1 }
    }
}

/// One instruction before it is understood.
#[derive(Debug)]
pub(crate) struct Logical {
    pub(crate) folded: Folded,
    /// From the first byte of the instruction to the end of its last line, here-documents included.
    pub(crate) span: Span,
    pub(crate) heredocs: Vec<RawHeredoc>,
    /// Comment lines right above, without `#`, unless they were directives.
    pub(crate) comments: Vec<String>,
    /// With empty lines inside: its last line, which BuildKit names.
    pub(crate) empty_continuation: Option<Span>,
}

/// A here-document whose body keeps its tabs.
#[derive(Debug, Clone)]
pub(crate) struct RawHeredoc {
    pub(crate) head: Heredoc,
    pub(crate) body: String,
}

impl RawHeredoc {
    /// With the tabs of a `<<-` body removed.
    pub(crate) fn finish(self) -> Heredoc {
        let content = if self.head.strip_tabs {
            self.body.split_inclusive('\n').map(|line| line.trim_start_matches('\t')).collect()
        } else {
            self.body
        };
        Heredoc { content, ..self.head }
    }
}

/// Reads logical lines one after the other.
pub(crate) struct Lines<'t> {
    text: &'t str,
    at: usize,
    escape: char,
    in_directives: bool,
    pub(crate) directives: Directives,
    pub(crate) diagnostics: Vec<Diagnostic>,
    seen: Vec<&'static str>,
}

const DIRECTIVES: [&str; 3] = ["syntax", "escape", "check"];

impl<'t> Lines<'t> {
    /// A whole file: byte order mark, shebang and directives at the top.
    pub(crate) fn of_file(text: &'t str) -> Self {
        let mut lines = Self::of_instruction(text, '\\');
        lines.in_directives = true;
        lines.at = if text.starts_with('\u{feff}') { '\u{feff}'.len_utf8() } else { 0 };
        if text[lines.at..].starts_with("#!") {
            lines.physical();
        }
        lines
    }

    /// An instruction by itself (`ONBUILD` trigger).
    pub(crate) fn of_instruction(text: &'t str, escape: char) -> Self {
        Self {
            text,
            at: 0,
            escape,
            in_directives: false,
            directives: Directives { escape, ..Directives::default() },
            diagnostics: vec![],
            seen: vec![],
        }
    }

    pub(crate) fn escape(&self) -> char {
        self.escape
    }

    /// The next physical line without its line end, and the offset of its first byte.
    fn physical(&mut self) -> Option<(usize, &'t str)> {
        let (start, line) = self.physical_with_end()?;
        Some((start, line.trim_end_matches(['\r', '\n'])))
    }

    fn physical_with_end(&mut self) -> Option<(usize, &'t str)> {
        let rest = &self.text[self.at..];
        if rest.is_empty() {
            return None;
        }
        let length = rest.find('\n').map_or(rest.len(), |i| i + 1);
        let start = self.at;
        self.at += length;
        Some((start, &rest[..length]))
    }

    /// The next instruction, `None` at the end of the file.
    pub(crate) fn next_logical(&mut self) -> Option<Logical> {
        let mut comments = Vec::new();
        loop {
            let (start, whole) = self.physical()?;
            let line = whole.trim_start();
            let start = start + (whole.len() - line.len());
            if self.in_directives && self.directive(line, start) {
                comments.clear();
                continue;
            }
            if let Some(comment) = line.strip_prefix('#') {
                match comment.trim() {
                    "" => comments.clear(),
                    comment => comments.push(comment.to_owned()),
                }
                continue;
            }
            if line.is_empty() {
                comments.clear();
                continue;
            }
            let mut logical = self.continued(line, start);
            if logical.folded.text.trim().is_empty() {
                continue;
            }
            logical.comments = comments;
            self.read_heredocs(&mut logical);
            return Some(logical);
        }
    }

    fn continued(&mut self, first: &str, start: usize) -> Logical {
        let mut folded = Folded::default();
        let mut empty_continuation = false;
        let (piece, mut open) = self.cut_continuation(first);
        folded.push(piece, start);
        let mut last = start;
        let mut end = start + first.len();
        while open {
            let Some((at, line)) = self.physical() else { break };
            match line.trim_start() {
                "" => empty_continuation = true,
                comment if comment.starts_with('#') => {}
                _ => {
                    let (piece, more) = self.cut_continuation(line);
                    folded.push(piece, at);
                    open = more;
                    (last, end) = (at, at + line.len());
                }
            }
        }
        let empty_continuation = empty_continuation.then_some(Span { start: last, end });
        Logical { folded, span: Span { start, end }, heredocs: vec![], comments: vec![], empty_continuation }
    }

    /// The line without a closing escape character, and whether there was one. A doubled escape
    /// character is an escaped one and continues nothing.
    fn cut_continuation<'l>(&self, line: &'l str) -> (&'l str, bool) {
        match line.trim_end_matches([' ', '\t']).strip_suffix(self.escape) {
            Some(head) if !head.ends_with(self.escape) => (head, true),
            _ => (line, false),
        }
    }

    /// Reads a directive; false ends the directive block.
    fn directive(&mut self, line: &str, start: usize) -> bool {
        let parsed = line.strip_prefix('#').and_then(|rest| {
            let (key, value) = rest.trim_start().split_once('=')?;
            let key = key.trim_end().to_ascii_lowercase();
            let key = DIRECTIVES.into_iter().find(|known| *known == key)?;
            let value = value.trim();
            (!value.is_empty()).then_some((key, value))
        });
        let Some((key, value)) = parsed else {
            self.in_directives = false;
            return false;
        };
        let span = Span { start, end: start + line.trim_end().len() };
        if self.seen.contains(&key) {
            self.diagnostics.push(Diagnostic {
                severity: Severity::Error,
                code: "duplicate-directive".into(),
                message: format!("only one {key} parser directive can be used"),
                help: Some("remove one of the two lines".to_owned()),
                span,
            });
            return true;
        }
        self.seen.push(key);
        match key {
            "syntax" => self.directives.syntax = Some(value.to_owned()),
            "check" => self.directives.check = Some(value.to_owned()),
            _ => match value {
                "\\" => {}
                "`" => {
                    self.escape = '`';
                    self.directives.escape = '`';
                }
                _ => self.diagnostics.push(Diagnostic {
                    severity: Severity::Error,
                    code: "invalid-escape".into(),
                    message: format!("invalid escape token '{value}' does not match ` or \\"),
                    help: Some("the value must be one backslash or one backtick".to_owned()),
                    span,
                }),
            },
        }
        true
    }

    fn read_heredocs(&mut self, logical: &mut Logical) {
        for (head, range) in heredoc_heads(&logical.folded.text) {
            let place = logical.folded.span(range);
            let mut body = String::new();
            let mut terminated = false;
            while let Some((at, line)) = self.physical_with_end() {
                let bare = line.trim_end_matches(['\r', '\n']);
                logical.span.end = at + bare.len();
                let candidate = if head.strip_tabs { bare.trim_start_matches('\t') } else { bare };
                if candidate == head.name {
                    terminated = true;
                    break;
                }
                body.push_str(line);
            }
            if !terminated {
                self.diagnostics.push(Diagnostic {
                    severity: Severity::Error,
                    code: "unterminated-heredoc".into(),
                    message: format!("unterminated heredoc: no line holds just {}", head.name),
                    help: Some(format!(
                        "end the here-document with a line `{}`{}",
                        head.name,
                        if head.strip_tabs { "" } else { " without indentation" }
                    )),
                    span: place,
                });
            }
            logical.heredocs.push(RawHeredoc { head, body });
        }
    }
}

/// Words `<<name` of an instruction that may hold here-documents.
fn heredoc_heads(text: &str) -> Vec<(Heredoc, Range<usize>)> {
    if !text.contains("<<") || !may_hold_heredocs(text) {
        return vec![];
    }
    let lexer = Expander { escape: '\\', keep_unset: true, raw_quotes: true };
    let Ok((found, _)) = lexer.words(text, &EmptyEnv) else { return vec![] };
    let mut heads = Vec::new();
    let mut from = 0;
    for word in found {
        let Some(head) = heredoc_head(&word) else { continue };
        // Quotes and escapes were kept, so the word stands in the text as it is.
        let range = text[from..].find(&word).map_or(0..text.len(), |i| from + i..from + i + word.len());
        from = range.end;
        heads.push((head, range));
    }
    heads
}

/// `RUN`, `COPY`, `ADD`, also below `ONBUILD`, unless the arguments are JSON.
fn may_hold_heredocs(text: &str) -> bool {
    let command = words::split_command(text);
    match command.name(text).to_ascii_lowercase().as_str() {
        "onbuild" => may_hold_heredocs(&text[command.rest]),
        "run" | "copy" | "add" => {
            let flags = words::take_flags(text, command.rest);
            words::json_array(&text[flags.rest]) == words::Json::Other
        }
        _ => false,
    }
}

/// Reads `3<<-"EOF"`.
pub(crate) fn heredoc_head(word: &str) -> Option<Heredoc> {
    let (fd, rest) = word.split_once("<<")?;
    if !fd.bytes().all(|b| b.is_ascii_digit()) || rest.contains('<') {
        return None;
    }
    let fd = if fd.is_empty() { 0 } else { fd.parse().ok()? };
    let (strip_tabs, written) = match rest.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, rest),
    };
    let single = |raw_quotes| {
        let lexer = Expander { escape: '\\', keep_unset: true, raw_quotes };
        let (words, _) = lexer.words(written, &EmptyEnv).ok()?;
        <[String; 1]>::try_from(words).ok().map(|[word]| word)
    };
    let name = single(false)?;
    // A quoted delimiter differs from its raw form: then the body is not expanded.
    let expand = single(true)? == name;
    Some(Heredoc { name, content: String::new(), expand, strip_tabs, fd })
}
