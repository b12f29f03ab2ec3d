//! A step's output on its way to the sink: secrets masked, text made valid, the end kept.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::sync::Arc;

use ovenbird_dockerfile::redact::without_passwords;

use crate::event::{Event, EventSink};

/// Shorter values would mask half of every log; they are refused as secrets by nobody and masked by nobody.
const SHORTEST_MASKED: usize = 4;

/// Values that nobody may see: what the secrets of a build hold.
#[derive(Clone, Default)]
pub struct Masks(Vec<Vec<u8>>);

impl std::fmt::Debug for Masks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

impl Masks {
    /// The values that each secret's content stands for: all but the end of its last line, and its longer lines.
    pub fn of(contents: impl IntoIterator<Item = Vec<u8>>) -> Self {
        let mut values = vec![];
        for content in contents {
            values.extend(content.split(|b| *b == b'\n').filter(|line| line.len() > 7).map(<[u8]>::to_vec));
            values.push(content.trim_ascii_end().to_vec());
        }
        values.retain(|value| value.len() >= SHORTEST_MASKED);
        // What holds another one goes first: no rest of it may stay.
        values.sort_by(|a, b| b.len().cmp(&a.len()).then_with(|| a.cmp(b)));
        values.dedup();
        Self(values)
    }

    /// The text with each value masked, and the passwords in addresses.
    pub fn text(&self, text: String) -> String {
        let secrets = self.0.iter().filter_map(|value| std::str::from_utf8(value).ok());
        let text = secrets.fold(text, |text, secret| if text.contains(secret) { text.replace(secret, "***") } else { text });
        match without_passwords(&text) {
            Cow::Owned(masked) => masked,
            Cow::Borrowed(_) => text,
        }
    }

    /// A sink that masks the text of every event.
    pub fn sink(&self, inner: Arc<dyn EventSink>) -> Arc<dyn EventSink> {
        Arc::new(Masking { masks: self.clone(), inner })
    }
}

struct Masking {
    masks: Masks,
    inner: Arc<dyn EventSink>,
}

impl EventSink for Masking {
    fn emit(&self, mut event: Event) {
        let mask = |text: &mut String| *text = self.masks.text(std::mem::take(text));
        match &mut event {
            Event::Started { name, .. } | Event::Cached { name, .. } => mask(name),
            Event::Explained { causes, .. } => causes.iter_mut().for_each(mask),
            Event::Message { text } => mask(text),
            Event::Failed { error, .. } => mask(error),
            Event::Progress { label, .. } => mask(label),
            Event::Warning { message, .. } => mask(message),
            // A step's output was masked by `LogText`, which also finds what is cut in two.
            Event::Isolation { .. } | Event::Log { .. } | Event::Finished { .. } | Event::Container { .. } | Event::Breaks(_) => {}
        }
        self.inner.emit(event);
    }
}

/// One output stream.
#[derive(Debug)]
pub struct LogText<'a> {
    masks: &'a Masks,
    held: Vec<u8>,
}

impl<'a> LogText<'a> {
    /// A stream in which these values are masked.
    pub fn new(masks: &'a Masks) -> Self {
        Self { masks, held: vec![] }
    }

    /// Takes bytes, gives the text that is certain by now.
    pub fn feed(&mut self, bytes: &[u8]) -> String {
        self.held.extend_from_slice(bytes);
        self.take(false)
    }

    /// Gives the rest.
    pub fn finish(&mut self) -> String {
        self.take(true)
    }

    fn take(&mut self, all: bool) -> String {
        let mut bytes = std::mem::take(&mut self.held);
        for secret in &self.masks.0 {
            while let Some(at) = find(&bytes, secret) {
                bytes.splice(at..at + secret.len(), *b"***");
            }
        }
        if !all {
            let keep = self.masks.0.iter().map(|s| longest_prefix_at_end(&bytes, s)).max().unwrap_or(0).max(incomplete_utf8(&bytes));
            self.held = bytes.split_off(bytes.len() - keep);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|w| w == needle)
}

/// How many bytes at the end could be the beginning of `secret`.
fn longest_prefix_at_end(bytes: &[u8], secret: &[u8]) -> usize {
    (1..secret.len().min(bytes.len() + 1)).rev().find(|&n| bytes.ends_with(&secret[..n])).unwrap_or(0)
}

/// Bytes at the end that begin a character whose rest has not arrived.
fn incomplete_utf8(bytes: &[u8]) -> usize {
    let tail = &bytes[bytes.len().saturating_sub(3)..];
    match std::str::from_utf8(tail) {
        Err(error) if error.error_len().is_none() => tail.len() - error.valid_up_to(),
        // The cut may fall inside a character at the front; look for a lead byte near the end.
        Err(_) => (1..=tail.len())
            .find(|&n| tail[tail.len() - n] >= 0xC0)
            .filter(|&n| std::str::from_utf8(&tail[tail.len() - n..]).is_err_and(|e| e.error_len().is_none()))
            .unwrap_or(0),
        Ok(_) => 0,
    }
}

/// The last lines of a step, for the error.
#[derive(Debug, Default)]
pub struct Tail {
    lines: VecDeque<String>,
    open: String,
}

/// Lines kept: what fits on a screen.
const TAIL_LINES: usize = 50;
/// Longest line kept, bytes.
const TAIL_WIDTH: usize = 4096;

impl Tail {
    /// Takes text.
    pub fn feed(&mut self, text: &str) {
        for piece in text.split_inclusive('\n') {
            if self.open.len() < TAIL_WIDTH {
                self.open.push_str(piece.trim_end_matches(['\n', '\r']));
            }
            if piece.ends_with('\n') {
                self.end_line();
            }
        }
    }

    fn end_line(&mut self) {
        if self.lines.len() == TAIL_LINES {
            self.lines.pop_front();
        }
        self.lines.push_back(std::mem::take(&mut self.open));
    }

    /// The lines, oldest first.
    pub fn into_lines(mut self) -> Vec<String> {
        if !self.open.is_empty() {
            self.end_line();
        }
        self.lines.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_masked_over_any_cut() {
        let secrets = Masks::of([b"hunter22".to_vec(), b"ab".to_vec()]);
        let text = "x hunter22 y häunt ab hunter2";
        for cut in 0..text.len() {
            for second in cut..text.len() {
                let mut log = LogText::new(&secrets);
                let b = text.as_bytes();
                let mut got = log.feed(&b[..cut]);
                got += &log.feed(&b[cut..second]);
                got += &log.feed(&b[second..]);
                got += &log.finish();
                assert_eq!(got, "x *** y häunt ab hunter2", "{cut} {second}");
            }
        }
    }

    #[test]
    fn names_and_causes_are_masked() {
        struct Kept(std::sync::Mutex<Vec<Event>>);
        impl EventSink for Kept {
            fn emit(&self, event: Event) {
                self.0.lock().unwrap().push(event);
            }
        }
        // The newline at the end of a file is no part of what is said elsewhere.
        let masks = Masks::of([b"hunter2\n".to_vec(), b"abc".to_vec(), b"first line\nsecond line\n".to_vec()]);
        let kept = Arc::new(Kept(std::sync::Mutex::default()));
        let sink = masks.sink(kept.clone());
        let text = || String::from("RUN hunter2 abc second line http://me:Token1@host/x");
        sink.emit(Event::Started { vertex: 0, name: text(), line: None });
        sink.emit(Event::Explained { vertex: 0, causes: vec![text()] });
        sink.emit(Event::Failed { vertex: 0, error: text() });
        sink.emit(Event::Message { text: text() });
        for event in kept.0.lock().unwrap().iter() {
            let said = format!("{event:?}");
            assert!(said.contains("RUN *** abc *** http://***@host/x") && !said.contains("hunter2"), "{said}");
        }
    }

    #[test]
    fn tail_keeps_the_end() {
        let mut tail = Tail::default();
        for n in 0..80 {
            tail.feed(&format!("line {n}\r\n"));
        }
        tail.feed("last");
        let lines = tail.into_lines();
        assert_eq!(lines.len(), TAIL_LINES);
        assert_eq!((lines[0].as_str(), lines[TAIL_LINES - 1].as_str()), ("line 31", "last"));
    }
}
