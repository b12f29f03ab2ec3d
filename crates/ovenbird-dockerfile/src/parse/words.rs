//! The shapes of arguments: command word, flags, blank-separated words, quoted words, JSON arrays.

use std::ops::Range;

/// A word and where it stands in the folded text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Word {
    pub(crate) text: String,
    pub(crate) range: Range<usize>,
}

/// First word of an instruction and the rest, blanks around both removed.
pub(crate) struct CommandWord {
    pub(crate) word: Range<usize>,
    pub(crate) rest: Range<usize>,
}

impl CommandWord {
    pub(crate) fn name<'t>(&self, text: &'t str) -> &'t str {
        &text[self.word.clone()]
    }
}

/// What separates words; all of one byte.
pub(crate) const BLANKS: [char; 5] = ['\t', '\u{b}', '\u{c}', '\r', ' '];

/// `range` without white space at both ends.
fn trim(text: &str, range: Range<usize>) -> Range<usize> {
    let part = &text[range.clone()];
    let start = range.start + (part.len() - part.trim_start().len());
    start..(start + part.trim().len())
}

pub(crate) fn split_command(text: &str) -> CommandWord {
    let all = trim(text, 0..text.len());
    let end = text[all.clone()].find(BLANKS).map_or(all.end, |i| all.start + i);
    CommandWord { word: all.start..end, rest: trim(text, end..all.end) }
}

/// Words between blanks, nothing else is special.
pub(crate) fn blank_separated(text: &str, range: Range<usize>) -> Vec<Word> {
    let mut words = Vec::new();
    let mut at = range.start;
    for part in text[range].split(BLANKS) {
        if !part.is_empty() {
            words.push(Word { text: part.to_owned(), range: at..at + part.len() });
        }
        // Every blank is one byte.
        at += part.len() + 1;
    }
    words
}

/// Words between blanks; quotes and escapes keep blanks together and stay in the word.
pub(crate) fn quoted_words(text: &str, range: Range<usize>, escape: char) -> Vec<Word> {
    let mut words: Vec<Word> = Vec::new();
    let mut current: Option<Word> = None;
    let mut quote = None;
    let base = range.start;
    let mut chars = text[range].char_indices().map(|(i, c)| (base + i, c)).peekable();
    while let Some((at, c)) = chars.next() {
        if quote.is_none() && c.is_whitespace() {
            words.extend(current.take());
            continue;
        }
        let word = current.get_or_insert_with(|| Word { text: String::new(), range: at..at });
        word.range.end = at + c.len_utf8();
        if c == escape && quote != Some('\'') {
            // An escape character at the very end is dropped.
            let Some((next_at, next)) = chars.next() else { break };
            word.text.push(c);
            word.text.push(next);
            word.range.end = next_at + next.len_utf8();
            continue;
        }
        match quote {
            Some(open) if open == c => quote = None,
            None if c == '\'' || c == '"' => quote = Some(c),
            _ => {}
        }
        word.text.push(c);
    }
    words.extend(current.filter(|w| !w.text.is_empty()));
    words
}

/// A `--name[=value]` before the arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RawFlag {
    pub(crate) name: String,
    pub(crate) value: Option<String>,
    pub(crate) range: Range<usize>,
}

/// Flags and what follows them.
pub(crate) struct Flags {
    pub(crate) flags: Vec<RawFlag>,
    pub(crate) rest: Range<usize>,
}

/// Takes leading words that begin with `--`. Quotes are removed and a backslash protects the next
/// character; a lone `--` ends the flags.
pub(crate) fn take_flags(text: &str, range: Range<usize>) -> Flags {
    let mut flags = Vec::new();
    let mut at = range.start;
    loop {
        let part = &text[at..range.end];
        let skipped = part.len() - part.trim_start().len();
        at += skipped;
        let part = &part[skipped..];
        if !part.starts_with("--") {
            break;
        }
        let mut word = String::new();
        let mut quote = None;
        let mut end = part.len();
        let mut chars = part.char_indices();
        while let Some((i, c)) = chars.next() {
            match quote {
                None if c.is_whitespace() => {
                    end = i;
                    break;
                }
                None if c == '\'' || c == '"' => quote = Some(c),
                Some(open) if open == c => quote = None,
                _ if c == '\\' => word.extend(chars.next().map(|(_, c)| c)),
                _ => word.push(c),
            }
        }
        let flag_range = at..at + end;
        at += end;
        let Some(body) = word.strip_prefix("--").filter(|body| !body.is_empty()) else { break };
        let (name, value) = match body.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (body, None),
        };
        flags.push(RawFlag { name: name.to_owned(), value, range: flag_range });
    }
    Flags { flags, rest: trim(text, at..range.end) }
}

/// What a text is when read as JSON.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Json {
    /// An array of strings: the exec form.
    Strings(Vec<String>),
    /// A valid array that holds something else.
    NotStrings,
    /// Anything else: the shell form.
    Other,
}

/// Deeper arrays are not taken for JSON.
const MAX_JSON_DEPTH: usize = 64;

pub(crate) fn json_array(text: &str) -> Json {
    let text = text.trim_start();
    if !text.starts_with('[') {
        return Json::Other;
    }
    let mut reader = JsonReader { rest: text };
    match reader.array() {
        Some(items) if reader.rest.trim_start_matches(is_json_blank).is_empty() => {
            items.into_iter().collect::<Option<Vec<_>>>().map_or(Json::NotStrings, Json::Strings)
        }
        _ => Json::Other,
    }
}

fn is_json_blank(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\r' | '\n')
}

struct JsonReader<'t> {
    rest: &'t str,
}

impl JsonReader<'_> {
    fn skip_blanks(&mut self) {
        self.rest = self.rest.trim_start_matches(is_json_blank);
    }

    fn eat(&mut self, token: &str) -> bool {
        let found = self.rest.strip_prefix(token);
        self.rest = found.unwrap_or(self.rest);
        found.is_some()
    }

    /// The outer array: strings, or `None` for an item of another type.
    fn array(&mut self) -> Option<Vec<Option<String>>> {
        let mut items = Vec::new();
        self.sequence('[', ']', |reader| {
            items.push(if reader.rest.starts_with('"') {
                Some(reader.string()?)
            } else {
                reader.value(1)?;
                None
            });
            Some(())
        })?;
        Some(items)
    }

    fn sequence(&mut self, open: char, close: char, mut item: impl FnMut(&mut Self) -> Option<()>) -> Option<()> {
        self.rest = self.rest.strip_prefix(open)?;
        self.skip_blanks();
        if let Some(rest) = self.rest.strip_prefix(close) {
            self.rest = rest;
            return Some(());
        }
        loop {
            self.skip_blanks();
            item(self)?;
            self.skip_blanks();
            if !self.eat(",") {
                self.rest = self.rest.strip_prefix(close)?;
                return Some(());
            }
        }
    }

    fn value(&mut self, depth: usize) -> Option<()> {
        if depth > MAX_JSON_DEPTH {
            return None;
        }
        match self.rest.chars().next()? {
            '"' => self.string().map(drop),
            '[' => self.sequence('[', ']', |reader| reader.value(depth + 1)),
            '{' => self.sequence('{', '}', |reader| {
                reader.string()?;
                reader.skip_blanks();
                reader.rest = reader.rest.strip_prefix(':')?;
                reader.skip_blanks();
                reader.value(depth + 1)
            }),
            _ if self.eat("true") || self.eat("false") || self.eat("null") => Some(()),
            _ => self.number(),
        }
    }

    fn digits(&mut self) -> usize {
        let tail = self.rest.trim_start_matches(|c: char| c.is_ascii_digit());
        let count = self.rest.len() - tail.len();
        self.rest = tail;
        count
    }

    fn number(&mut self) -> Option<()> {
        self.eat("-");
        let zero = self.rest.starts_with('0');
        let whole = self.digits();
        if whole == 0 || (zero && whole > 1) || (self.eat(".") && self.digits() == 0) {
            return None;
        }
        if self.eat("e") || self.eat("E") {
            let _ = self.eat("+") || self.eat("-");
            if self.digits() == 0 {
                return None;
            }
        }
        Some(())
    }

    fn string(&mut self) -> Option<String> {
        self.rest = self.rest.strip_prefix('"')?;
        let mut out = String::new();
        loop {
            let mut chars = self.rest.chars();
            let c = chars.next()?;
            self.rest = chars.as_str();
            match c {
                '"' => return Some(out),
                '\\' => {
                    let escape = chars.next()?;
                    self.rest = chars.as_str();
                    out.push(match escape {
                        '"' | '\\' | '/' => escape,
                        'b' => '\u{8}',
                        'f' => '\u{c}',
                        'n' => '\n',
                        'r' => '\r',
                        't' => '\t',
                        'u' => self.unicode()?,
                        _ => return None,
                    });
                }
                c if c < ' ' => return None,
                c => out.push(c),
            }
        }
    }

    fn hex4(&mut self) -> Option<u32> {
        let digits = self.rest.get(..4).filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()))?;
        self.rest = &self.rest[4..];
        u32::from_str_radix(digits, 16).ok()
    }

    /// A lone surrogate becomes the replacement character.
    fn unicode(&mut self) -> Option<char> {
        let first = self.hex4()?;
        if (0xd800..0xdc00).contains(&first) && self.rest.starts_with("\\u") {
            let before = self.rest;
            self.rest = &self.rest[2..];
            let second = self.hex4()?;
            if (0xdc00..0xe000).contains(&second) {
                return char::from_u32(0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00));
            }
            self.rest = before;
        }
        Some(char::from_u32(first).unwrap_or(char::REPLACEMENT_CHARACTER))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(words: Vec<Word>) -> Vec<String> {
        words.into_iter().map(|w| w.text).collect()
    }

    #[test]
    fn json_arrays() {
        let strings = |items: &[&str]| Json::Strings(items.iter().map(|s| (*s).to_owned()).collect());
        for (text, expect) in [
            ("[]", strings(&[])),
            (r#"["a"]"#, strings(&["a"])),
            (r#"  [ "a" , "b c" ] "#, strings(&["a", "b c"])),
            (r#"["\"\\\/\b\f\n\r\t"]"#, strings(&["\"\\/\u{8}\u{c}\n\r\t"])),
            (r#"["\u00e9\ud83d\ude00"]"#, strings(&["é😀"])),
            (r#"["\ud800x"]"#, strings(&["\u{fffd}x"])),
            (r#"["\ud800\u0041"]"#, strings(&["\u{fffd}A"])),
            ("[1]", Json::NotStrings),
            (r#"["a", -1.5e+3]"#, Json::NotStrings),
            (r#"[null, true, false, {"a": ["b"]}]"#, Json::NotStrings),
            ("['a']", Json::Other),
            (r#"["a",]"#, Json::Other),
            (r#"["a"] x"#, Json::Other),
            (r#"["C:\dir"]"#, Json::Other),
            (r#"["a"#, Json::Other),
            ("[01]", Json::Other),
            ("[1.]", Json::Other),
            ("[-]", Json::Other),
            ("[nul]", Json::Other),
            (r#"["\u12"]"#, Json::Other),
            ("[\"a\tb\"]", Json::Other),
            (r#"{"a":1}"#, Json::Other),
            ("echo", Json::Other),
            ("", Json::Other),
            (&"[".repeat(100_000), Json::Other),
        ] {
            assert_eq!(json_array(text), expect, "{}", &text[..text.len().min(40)]);
        }
    }

    #[test]
    fn words_keep_quotes() {
        for (text, expect) in [
            ("a b", &["a", "b"][..]),
            ("  a\t b  ", &["a", "b"]),
            (r#"a="b c" d"#, &[r#"a="b c""#, "d"]),
            ("a='b \\' d", &["a='b \\'", "d"]),
            (r"a=b\ c", &[r"a=b\ c"]),
            (r#"a="b\" c" d"#, &[r#"a="b\" c""#, "d"]),
            ("''", &["''"]),
            (r"a\", &["a"]),
            ("", &[]),
        ] {
            assert_eq!(texts(quoted_words(text, 0..text.len(), '\\')), expect, "{text}");
        }
    }

    #[test]
    fn flags_come_first() {
        for (text, expect, rest) in [
            ("--a=b --c x --d", "a=Some(\"b\") c=None ", "x --d"),
            ("x", "", "x"),
            ("-x", "", "-x"),
            ("-- --a", "", "--a"),
            ("--a=\"b c\" d", "a=Some(\"b c\") ", "d"),
            ("--a='b  c'd e", "a=Some(\"b  cd\") ", "e"),
            (r"--a=b\ c d", "a=Some(\"b c\") ", "d"),
            ("--a=", "a=Some(\"\") ", ""),
            ("--a=b=c x", "a=Some(\"b=c\") ", "x"),
            ("", "", ""),
        ] {
            let found = take_flags(text, 0..text.len());
            let shown: String = found.flags.iter().fold(String::new(), |s, f| s + &format!("{}={:?} ", f.name, f.value));
            assert_eq!((shown.as_str(), &text[found.rest]), (expect, rest), "{text}");
        }
    }
}
