//! Word expansion: `$v`, `${v:-d}` and the rest, quotes and escapes, as Docker's shell lexer does it.
//!
//! The lexer is not a shell: it knows no command substitution, no arithmetic and no tilde. Every
//! word of a Dockerfile is foreign input, so nesting and the size of a result are bounded.

use std::collections::BTreeSet;
use std::iter::Peekable;
use std::str::Chars;

use regex::Regex;

/// Deepest nesting of `${a:-${b:-…}}`.
const MAX_DEPTH: usize = 64;

/// Longest result in bytes: `ENV a=$a$a` doubles on every line.
const MAX_LENGTH: usize = 16 << 20;

/// Where values come from.
pub trait Env {
    /// Value of a variable, `None` when unset.
    fn get(&self, name: &str) -> Option<String>;
}

/// An environment in which nothing is set.
#[derive(Debug, Clone, Copy, Default)]
pub struct EmptyEnv;

impl Env for EmptyEnv {
    fn get(&self, _name: &str) -> Option<String> {
        None
    }
}

/// An expanded word.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Expanded {
    /// Text.
    pub value: String,
    /// Variables that were read and set.
    pub used: BTreeSet<String>,
    /// Variables that were read and unset.
    pub unset: BTreeSet<String>,
}

/// What can be wrong with a word.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExpandError {
    /// A quote or brace was not closed.
    #[error("unexpected end of {:?}: {expected} is missing", short(word))]
    Unterminated {
        /// The word.
        word: String,
        /// What was expected.
        expected: &'static str,
    },
    /// `${v?message}`.
    #[error("{name}: {message}")]
    Required {
        /// Variable.
        name: String,
        /// The author's message.
        message: String,
    },
    /// A modifier nobody knows.
    #[error("unsupported modifier {:?} in {:?}", short(modifier), short(word))]
    Modifier {
        /// The word.
        word: String,
        /// Modifier.
        modifier: String,
    },
    /// `${}`, `${:x}` or `${{`: no variable name.
    #[error("bad substitution in {:?}: a variable name must follow `${{`", short(word))]
    BadSubstitution {
        /// The word.
        word: String,
    },
    /// The pattern of `#`, `%` or `/` cannot be read.
    #[error("invalid pattern {:?} in {:?}: `\\` may only stand before `*`, `?`, `/`, `}}` or `\\`", short(pattern), short(word))]
    Pattern {
        /// The word.
        word: String,
        /// Pattern.
        pattern: String,
    },
    /// Braces nested too deep.
    #[error("substitutions are nested deeper than {limit} levels: simplify the word")]
    TooDeep {
        /// Deepest level allowed.
        limit: usize,
    },
    /// The result is too large.
    #[error("the expanded word is longer than {limit} bytes: a variable probably refers to itself in a chain")]
    TooLong {
        /// Largest result allowed, in bytes.
        limit: usize,
    },
}

/// The beginning of a word, for people.
fn short(word: &str) -> String {
    const MOST: usize = 80;
    let mut shown: String = word.chars().take(MOST).collect();
    if shown.len() < word.len() {
        shown.push('…');
    }
    shown
}

/// Expands words with one escape character.
#[derive(Debug, Clone, Copy)]
pub struct Expander {
    /// `\` or a backtick.
    pub escape: char,
    /// Leave unset variables as written (`HEALTHCHECK`, `CMD` and the names in history).
    pub keep_unset: bool,
    /// Keep quotes and escapes in the result (shell commands in progress names). Single quotes
    /// still protect `$`; for the body of a here-document see [`Expander::heredoc`].
    pub raw_quotes: bool,
}

impl Default for Expander {
    fn default() -> Self {
        Self { escape: '\\', keep_unset: false, raw_quotes: false }
    }
}

impl Expander {
    /// One word in, one word out (quotes removed unless `raw_quotes`).
    pub fn word(&self, word: &str, env: &dyn Env) -> Result<Expanded, ExpandError> {
        Ok(self.lex(word, env, false)?.1)
    }

    /// One word in, several out: unquoted blanks of values split words (`EXPOSE $PORTS`).
    pub fn words(&self, word: &str, env: &dyn Env) -> Result<(Vec<String>, Expanded), ExpandError> {
        self.lex(word, env, false)
    }

    /// The body of a here-document whose delimiter is not quoted: quotes are ordinary characters,
    /// variables are expanded, the escape character protects `$` (and itself) and disappears.
    pub fn heredoc(&self, body: &str, env: &dyn Env) -> Result<Expanded, ExpandError> {
        Ok(self.lex(body, env, true)?.1)
    }

    fn lex(self, word: &str, env: &dyn Env, plain_quotes: bool) -> Result<(Vec<String>, Expanded), ExpandError> {
        let mut lexer = Lexer {
            config: self,
            plain_quotes,
            raw_escapes: self.raw_quotes,
            word,
            chars: word.chars().peekable(),
            env,
            used: BTreeSet::new(),
            unset: BTreeSet::new(),
            depth: 0,
        };
        let (value, words) = lexer.until(None, self.raw_quotes)?;
        Ok((words, Expanded { value, used: lexer.used, unset: lexer.unset }))
    }
}

/// Collects the words of a result: blanks split unless they were quoted or escaped.
#[derive(Default)]
struct Words {
    done: Vec<String>,
    current: String,
}

impl Words {
    fn split_char(&mut self, c: char) {
        if !c.is_whitespace() {
            self.current.push(c);
        } else if !self.current.is_empty() {
            self.done.push(std::mem::take(&mut self.current));
        }
    }

    fn finish(mut self) -> Vec<String> {
        if !self.current.is_empty() {
            self.done.push(self.current);
        }
        self.done
    }
}

struct Lexer<'a> {
    config: Expander,
    plain_quotes: bool,
    raw_escapes: bool,
    word: &'a str,
    chars: Peekable<Chars<'a>>,
    env: &'a dyn Env,
    used: BTreeSet<String>,
    unset: BTreeSet<String>,
    depth: usize,
}

impl Lexer<'_> {
    fn unterminated(&self, expected: &'static str) -> ExpandError {
        ExpandError::Unterminated { word: self.word.to_owned(), expected }
    }

    fn modifier(&self, modifier: impl Into<String>) -> ExpandError {
        ExpandError::Modifier { word: self.word.to_owned(), modifier: modifier.into() }
    }

    /// Everything up to `stop` (which is consumed) or the end of the word.
    fn until(&mut self, stop: Option<char>, raw_escapes: bool) -> Result<(String, Vec<String>), ExpandError> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(ExpandError::TooDeep { limit: MAX_DEPTH });
        }
        let outer = std::mem::replace(&mut self.raw_escapes, raw_escapes);
        let result = self.until_inner(stop);
        self.raw_escapes = outer;
        self.depth -= 1;
        result
    }

    fn until_inner(&mut self, stop: Option<char>) -> Result<(String, Vec<String>), ExpandError> {
        let mut value = String::new();
        let mut words = Words::default();
        while let Some(&c) = self.chars.peek() {
            if Some(c) == stop {
                self.chars.next();
                return Ok((value, words.finish()));
            }
            match c {
                '$' => {
                    let part = self.dollar()?;
                    value.push_str(&part);
                    part.chars().for_each(|c| words.split_char(c));
                }
                '\'' | '"' if !self.plain_quotes => {
                    let part = if c == '"' { self.double_quoted()? } else { self.single_quoted()? };
                    value.push_str(&part);
                    words.current.push_str(&part);
                }
                _ => {
                    self.chars.next();
                    if c == self.config.escape {
                        if self.raw_escapes {
                            value.push(c);
                            words.current.push(c);
                        }
                        let Some(escaped) = self.chars.next() else { break };
                        value.push(escaped);
                        words.current.push(escaped);
                    } else {
                        value.push(c);
                        words.split_char(c);
                    }
                }
            }
            if value.len() > MAX_LENGTH {
                return Err(ExpandError::TooLong { limit: MAX_LENGTH });
            }
        }
        match stop {
            None => Ok((value, words.finish())),
            Some('/') => Err(self.unterminated("the second `/` of a replacement")),
            Some(_) => Err(self.unterminated("the closing `}`")),
        }
    }

    fn single_quoted(&mut self) -> Result<String, ExpandError> {
        let mut value = String::new();
        let quote = self.chars.next().filter(|_| self.config.raw_quotes);
        value.extend(quote);
        loop {
            match self.chars.next() {
                None => return Err(self.unterminated("the closing single quote")),
                Some('\'') => {
                    value.extend(quote);
                    return Ok(value);
                }
                Some(c) => value.push(c),
            }
        }
    }

    fn double_quoted(&mut self) -> Result<String, ExpandError> {
        let mut value = String::new();
        let quote = self.chars.next().filter(|_| self.config.raw_quotes);
        value.extend(quote);
        loop {
            match self.chars.peek().copied() {
                None => return Err(self.unterminated("the closing double quote")),
                Some('"') => {
                    self.chars.next();
                    value.extend(quote);
                    return Ok(value);
                }
                Some('$') => value.push_str(&self.dollar()?),
                Some(c) => {
                    self.chars.next();
                    let mut literal = c;
                    if c == self.config.escape {
                        if self.raw_escapes {
                            value.push(c);
                        }
                        match self.chars.peek().copied() {
                            None => continue,
                            Some(next) if next == '"' || next == '$' || next == self.config.escape => {
                                self.chars.next();
                                literal = next;
                            }
                            // An escape before any other character is an ordinary character; it
                            // was already written above when escapes are kept.
                            Some(_) if self.raw_escapes => continue,
                            Some(_) => {}
                        }
                    }
                    value.push(literal);
                }
            }
            if value.len() > MAX_LENGTH {
                return Err(ExpandError::TooLong { limit: MAX_LENGTH });
            }
        }
    }

    fn dollar(&mut self) -> Result<String, ExpandError> {
        self.chars.next();
        if self.chars.peek() != Some(&'{') {
            let name = self.name();
            if name.is_empty() {
                return Ok("$".to_owned());
            }
            return Ok(match self.lookup(&name) {
                None if self.config.keep_unset => format!("${name}"),
                value => value.unwrap_or_default(),
            });
        }
        self.chars.next();
        match self.chars.peek() {
            None => return Err(self.unterminated("the closing `}`")),
            Some('{' | '}' | ':') => return Err(ExpandError::BadSubstitution { word: self.word.to_owned() }),
            Some(_) => {}
        }
        let name = self.name();
        match self.chars.next() {
            None => Err(self.unterminated("the closing `}`")),
            Some('}') => Ok(match self.lookup(&name) {
                None if self.config.keep_unset => format!("${{{name}}}"),
                value => value.unwrap_or_default(),
            }),
            Some(':') => match self.chars.next() {
                None => Err(self.unterminated("the closing `}`")),
                Some(operator) => self.conditional(&name, operator, true),
            },
            Some('/') => self.replacement(&name),
            Some(operator @ ('+' | '-' | '?' | '#' | '%')) => self.conditional(&name, operator, false),
            Some(other) => Err(self.modifier(other)),
        }
    }

    /// `${name-word}`, `${name:+word}`, `${name#pattern}` and their kin. With `colon` an empty
    /// value counts as unset.
    fn conditional(&mut self, name: &str, operator: char, colon: bool) -> Result<String, ExpandError> {
        let (word, _) = self.until(Some('}'), matches!(operator, '#' | '%'))?;
        let value = self.lookup(name);
        let shown = if colon { format!(":{operator}") } else { operator.to_string() };
        if value.is_none() && self.config.keep_unset {
            return Ok(format!("${{{name}{shown}{word}}}"));
        }
        let present = value.as_ref().is_some_and(|v| !(colon && v.is_empty()));
        match operator {
            '-' => Ok(if present { value.unwrap_or_default() } else { word }),
            '+' => Ok(if present { word } else { String::new() }),
            '?' if present => Ok(value.unwrap_or_default()),
            '?' => Err(ExpandError::Required {
                name: name.to_owned(),
                message: match (word.is_empty(), value.is_some()) {
                    (false, _) => word,
                    (true, false) => "is not allowed to be unset".to_owned(),
                    (true, true) => "is not allowed to be empty".to_owned(),
                },
            }),
            '#' | '%' => {
                let longest = word.strip_prefix(operator);
                let pattern = self.pattern(longest.unwrap_or(&word))?;
                let value = value.unwrap_or_default();
                Ok(pattern.trim(&value, operator == '%', longest.is_some()).ok_or_else(|| self.bad_pattern(&word))?)
            }
            _ => Err(self.modifier(shown)),
        }
    }

    /// `${name/pattern/text}` and `${name//pattern/text}`.
    fn replacement(&mut self, name: &str) -> Result<String, ExpandError> {
        let all = self.chars.next_if_eq(&'/').is_some();
        let (written, _) = self.until(Some('/'), true)?;
        let (text, _) = self.until(Some('}'), true)?;
        let Some(value) = self.lookup(name) else {
            return Ok(if self.config.keep_unset {
                let slashes = if all { "//" } else { "/" };
                format!("${{{name}{slashes}{written}/{text}}}")
            } else {
                String::new()
            });
        };
        let regex = self.pattern(&written)?.regex(false, true, false).ok_or_else(|| self.bad_pattern(&written))?;
        let mut out = String::new();
        let mut end = 0;
        for found in regex.find_iter(&value).take(if all { usize::MAX } else { 1 }) {
            out.push_str(&value[end..found.start()]);
            out.push_str(&text);
            end = found.end();
            if out.len() > MAX_LENGTH {
                return Err(ExpandError::TooLong { limit: MAX_LENGTH });
            }
        }
        out.push_str(&value[end..]);
        Ok(out)
    }

    /// Letters, digits and `_`; or digits alone; or one special parameter (`$@`).
    fn name(&mut self) -> String {
        let mut name = String::new();
        match self.chars.peek() {
            Some(c) if c.is_numeric() => {
                while let Some(c) = self.chars.next_if(|c| c.is_numeric()) {
                    name.push(c);
                }
                return name;
            }
            Some('@' | '*' | '#' | '?' | '-' | '$' | '!') => {
                name.extend(self.chars.next());
                return name;
            }
            _ => {}
        }
        while let Some(c) = self.chars.next_if(|c| c.is_alphanumeric() || *c == '_') {
            name.push(c);
        }
        name
    }

    fn lookup(&mut self, name: &str) -> Option<String> {
        let value = self.env.get(name);
        if value.is_some() { &mut self.used } else { &mut self.unset }.insert(name.to_owned());
        value
    }

    fn bad_pattern(&self, pattern: &str) -> ExpandError {
        ExpandError::Pattern { word: self.word.to_owned(), pattern: pattern.to_owned() }
    }

    fn pattern(&self, pattern: &str) -> Result<Glob, ExpandError> {
        Glob::parse(pattern).ok_or_else(|| self.bad_pattern(pattern))
    }
}

/// One element of a shell pattern (bracket expressions are not supported, as in Docker).
enum Element {
    Literal(char),
    One,
    Many,
}

struct Glob(Vec<Element>);

impl Glob {
    fn parse(pattern: &str) -> Option<Self> {
        let mut elements = Vec::new();
        let mut chars = pattern.chars().peekable();
        while let Some(c) = chars.next() {
            elements.push(match c {
                '*' => Element::Many,
                '?' => Element::One,
                '\\' => match chars.next()? {
                    escaped @ ('}' | '/' | '*' | '?' | '\\') => Element::Literal(escaped),
                    _ => return None,
                },
                other => Element::Literal(other),
            });
        }
        Some(Self(elements))
    }

    fn regex(&self, anchored: bool, greedy: bool, reversed: bool) -> Option<Regex> {
        let mut source = String::from(if anchored { "^" } else { "" });
        let mut push = |element: &Element| match element {
            Element::Many => source.push_str(if greedy { ".*" } else { ".*?" }),
            Element::One => source.push('.'),
            Element::Literal(c) => source.push_str(&regex::escape(c.encode_utf8(&mut [0; 4]))),
        };
        if reversed {
            self.0.iter().rev().for_each(&mut push);
        } else {
            self.0.iter().for_each(&mut push);
        }
        Regex::new(&source).ok()
    }

    /// `value` without the shortest or longest matching prefix, or suffix. `None` when the
    /// pattern is too large to compile.
    fn trim(&self, value: &str, suffix: bool, longest: bool) -> Option<String> {
        let regex = self.regex(true, longest, suffix)?;
        if suffix {
            // A leftmost search cannot find the shortest match at the end, so both sides are
            // reversed.
            let reversed: String = value.chars().rev().collect();
            let cut = regex.find(&reversed).map_or(0, |m| m.end());
            Some(reversed[cut..].chars().rev().collect())
        } else {
            Some(value[regex.find(value).map_or(0, |m| m.end())..].to_owned())
        }
    }
}

#[cfg(test)]
mod tests;
