//! A step's output on its way to the sink: secrets masked, text made valid, the end kept.

use std::collections::VecDeque;

/// Shorter values would mask half of every log; they are refused as secrets by nobody and masked by nobody.
const SHORTEST_MASKED: usize = 4;

/// One output stream.
#[derive(Debug)]
pub struct LogText<'a> {
    masked: &'a [Vec<u8>],
    held: Vec<u8>,
}

impl<'a> LogText<'a> {
    /// A stream in which these values are masked.
    pub fn new(masked: &'a [Vec<u8>]) -> Self {
        Self { masked, held: vec![] }
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
        for secret in self.masked.iter().filter(|s| s.len() >= SHORTEST_MASKED) {
            while let Some(at) = find(&bytes, secret) {
                bytes.splice(at..at + secret.len(), *b"***");
            }
        }
        if !all {
            let keep = self.masked.iter().map(|s| longest_prefix_at_end(&bytes, s)).max().unwrap_or(0).max(incomplete_utf8(&bytes));
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

/// Lines kept.
const TAIL_LINES: usize = 20;
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
        let secrets = vec![b"hunter22".to_vec(), b"ab".to_vec()];
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
    fn tail_keeps_the_end() {
        let mut tail = Tail::default();
        for n in 0..50 {
            tail.feed(&format!("line {n}\r\n"));
        }
        tail.feed("last");
        let lines = tail.into_lines();
        assert_eq!(lines.len(), TAIL_LINES);
        assert_eq!((lines[0].as_str(), lines[19].as_str()), ("line 31", "last"));
    }
}
