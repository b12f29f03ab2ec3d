//! What steps print, made safe and cut into lines.

/// What may stay of control sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Escapes {
    /// Nothing.
    Strip,
    /// Colours and weights (`CSI … m`).
    Colour,
}

/// Longest line that is kept together, in bytes.
const MAX_LINE: usize = 16 * 1024;

/// Removes control characters and sequences. A line with colours ends with a reset, so that they do not run on.
/// Source: ECMA-48 (CSI, OSC, DCS, …, both as ESC sequences and as C1 characters).
pub(crate) fn clean(text: &str, escapes: Escapes) -> String {
    let mut out = String::with_capacity(text.len());
    let mut coloured = false;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let introducer = match c {
            '\u{1b}' => match chars.next() {
                Some(next) => next,
                None => break,
            },
            // C1 controls stand for ESC and the character 0x40 below.
            '\u{80}'..='\u{9f}' => char::from(c as u8 - 0x40),
            '\t' => {
                out.push('\t');
                continue;
            }
            // Directional overrides make text look like something else.
            c if c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') => continue,
            c => {
                out.push(c);
                continue;
            }
        };
        match introducer {
            '[' => {
                let mut sequence = String::new();
                let mut last = None;
                while let Some(c) = chars.peek().copied() {
                    if !('\u{20}'..='\u{7e}').contains(&c) {
                        break;
                    }
                    chars.next();
                    if ('\u{40}'..='\u{7e}').contains(&c) {
                        last = Some(c);
                        break;
                    }
                    sequence.push(c);
                }
                if escapes == Escapes::Colour && last == Some('m') && sequence.bytes().all(|b| b.is_ascii_digit() || b == b';' || b == b':')
                {
                    out.push_str("\u{1b}[");
                    out.push_str(&sequence);
                    out.push('m');
                    coloured = true;
                }
            }
            // Strings: to BEL or ST.
            ']' | 'P' | 'X' | '^' | '_' => {
                while let Some(c) = chars.next() {
                    if c == '\u{7}' || c == '\u{9c}' {
                        break;
                    }
                    if c == '\u{1b}' {
                        chars.next_if_eq(&'\\');
                        break;
                    }
                }
            }
            // Two-character designations (`ESC ( B`).
            ' '..='/' => drop(chars.next()),
            _ => {}
        }
    }
    if coloured {
        out.push_str("\u{1b}[0m");
    }
    out
}

/// Pieces in, whole lines out. A carriage return starts the line again, as on a terminal.
#[derive(Debug, Default)]
pub(super) struct Lines {
    partial: String,
}

impl Lines {
    /// Takes a piece; gives the lines that are whole now.
    pub(super) fn push(&mut self, text: &str) -> Vec<String> {
        let mut whole = vec![];
        for piece in text.split_inclusive('\n') {
            self.partial.push_str(piece);
            if piece.ends_with('\n') {
                whole.extend(self.take());
            } else if self.partial.len() > MAX_LINE {
                match self.partial.trim_end_matches('\r').rfind('\r') {
                    Some(at) => drop(self.partial.drain(..=at)),
                    None => whole.extend(self.take()),
                }
            }
        }
        whole
    }

    /// What there is of the last line.
    pub(super) fn take(&mut self) -> Option<String> {
        if self.partial.is_empty() {
            return None;
        }
        let line = std::mem::take(&mut self.partial);
        Some(visible(&line).to_owned())
    }

    /// The last line as a terminal would show it now.
    pub(super) fn current(&self) -> &str {
        visible(&self.partial)
    }
}

fn visible(line: &str) -> &str {
    let line = line.trim_end_matches(['\n', '\r']);
    &line[line.rfind('\r').map_or(0, |at| at + 1)..]
}

/// Columns that a text takes; wide East Asian characters and emoji take two, combining marks none.
fn columns(c: char) -> usize {
    match c as u32 {
        0x300..=0x36f | 0x200b..=0x200f | 0xfe00..=0xfe0f => 0,
        0x1100..=0x115f
        | 0x2e80..=0xa4cf
        | 0xac00..=0xd7a3
        | 0xf900..=0xfaff
        | 0xfe30..=0xfe6f
        | 0xff00..=0xff60
        | 0xffe0..=0xffe6
        | 0x1f300..=0x1faff
        | 0x20000..=0x3fffd => 2,
        _ => 1,
    }
}

/// Cuts to at most `width` columns; colours take none. Tabs become one blank. The last column shows that something is missing.
pub(super) fn fit(text: &str, width: usize) -> String {
    let mut kept = String::new();
    let mut cut = None;
    let (mut used, mut coloured, mut in_colour) = (0, false, false);
    for c in text.chars() {
        if in_colour || c == '\u{1b}' {
            (coloured, in_colour) = (true, c != 'm');
            kept.push(c);
            continue;
        }
        let c = if c == '\t' { ' ' } else { c };
        if used + columns(c) > width.saturating_sub(1) && cut.is_none() {
            cut = Some(kept.len());
        }
        used += columns(c);
        if used > width {
            kept.truncate(cut.unwrap_or(0));
            if width > 0 {
                kept.push('…');
            }
            break;
        }
        kept.push(c);
    }
    if coloured && used > width {
        kept.push_str("\u{1b}[0m");
    }
    kept
}

/// The engine begins a step's error with the name of the step, which is shown beside it already.
pub(super) fn without_name<'a>(error: &'a str, name: &str) -> &'a str {
    error.strip_prefix(name).and_then(|rest| rest.strip_prefix(": ")).unwrap_or(error)
}

/// Columns of a text without colours.
pub(super) fn width(text: &str) -> usize {
    text.chars().map(columns).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_sequences() {
        for (text, strip, colour) in [
            ("plain\ttab", "plain\ttab", "plain\ttab"),
            ("\u{1b}[31mred\u{1b}[0m", "red", "\u{1b}[31mred\u{1b}[0m\u{1b}[0m"),
            ("\u{1b}[38;5;1mx", "x", "\u{1b}[38;5;1mx\u{1b}[0m"),
            ("\u{1b}[2J\u{1b}[1;1Hx", "x", "x"),
            ("\u{1b}[?25lx", "x", "x"),
            ("\u{1b}]0;title\u{7}x", "x", "x"),
            ("\u{1b}]52;c;Zm9v\u{1b}\\x", "x", "x"),
            ("\u{1b}Pq\u{9c}x", "x", "x"),
            ("\u{9b}31mx", "x", "\u{1b}[31mx\u{1b}[0m"),
            ("\u{1b}(Bx", "x", "x"),
            ("a\u{8}\u{0}\u{7f}b", "ab", "ab"),
            ("a\u{202e}b", "ab", "ab"),
            ("x\u{1b}", "x", "x"),
            ("x\u{1b}[3", "x", "x"),
            ("\u{1b}]never ends", "", ""),
            ("\u{1b}[31\u{1b}[mx", "x", "\u{1b}[mx\u{1b}[0m"),
        ] {
            assert_eq!(clean(text, Escapes::Strip), strip, "{text:?}");
            assert_eq!(clean(text, Escapes::Colour), colour, "{text:?}");
        }
    }

    #[test]
    fn lines() {
        for (pieces, expect, rest) in [
            (&["a\nb", "c\n"][..], &["a", "bc"][..], ""),
            (&["a\r\nb\r", "\n"], &["a", "b"], ""),
            (&["1%\r2%", "\r3%\n"], &["3%"], ""),
            (&["1%\r2%\r"], &[], "2%"),
            (&["\n\n"], &["", ""], ""),
            (&["no end"], &[], "no end"),
        ] {
            let mut lines = Lines::default();
            let got: Vec<String> = pieces.iter().flat_map(|p| lines.push(p)).collect();
            assert_eq!(got, expect, "{pieces:?}");
            assert_eq!(lines.current(), rest, "{pieces:?}");
        }
        let mut lines = Lines::default();
        for _ in 0..100 {
            lines.push(&"x".repeat(1000));
            lines.push(&format!("{}\r", "y".repeat(1000)));
        }
        assert!(lines.partial.len() <= MAX_LINE + 1001, "a line without end is not kept without end");
    }

    #[test]
    fn fitting() {
        for (text, width, expect) in [
            ("abc", 3, "abc"),
            ("abcd", 3, "ab…"),
            ("日本語", 4, "日…"),
            ("a\tb", 3, "a b"),
            ("\u{1b}[31mabcd\u{1b}[0m", 3, "\u{1b}[31mab…\u{1b}[0m"),
            ("\u{1b}[31mabc\u{1b}[0m", 3, "\u{1b}[31mabc\u{1b}[0m"),
            ("日本", 3, "日…"),
            ("abc", 0, ""),
        ] {
            assert_eq!(fit(text, width), expect, "{text:?}");
        }
    }
}
