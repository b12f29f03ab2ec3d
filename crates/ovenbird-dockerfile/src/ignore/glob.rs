//! Patterns as a chain of tokens, run as a non-deterministic automaton: every character of the
//! path moves a set of positions in the chain, so there is no backtracking.

/// One step of a pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Token {
    /// This character.
    Literal(char),
    /// `?`: any character but `/`.
    One,
    /// `*`: any number of characters but `/`.
    Star,
    /// `**` or `**/` before something else: nothing, or any text that ends in `/`.
    Folders,
    /// The inside of `Folders`, always right behind it.
    InFolders,
    /// `**` at the end: any text.
    Rest,
    /// `[a-z]`: ranges, and whether they are negated. Matches `/` too, as in Go.
    Class(Vec<(char, char)>, bool),
}

/// A compiled pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Glob {
    tokens: Vec<Token>,
    /// Literal text at both ends, for a quick no.
    prefix: String,
    suffix: String,
    /// Number of slashes in every match, when it is fixed.
    slashes: Option<usize>,
}

impl Glob {
    /// Moby's language: Go's with `**`.
    pub(super) fn compile(pattern: &str) -> Result<Self, &'static str> {
        // Moby lets Go check the syntax first.
        tokens(pattern, false)?;
        Ok(Self::new(tokens(pattern, true)?))
    }

    /// Go's `filepath.Match`.
    pub(super) fn compile_go(pattern: &str) -> Result<Self, &'static str> {
        Ok(Self::new(tokens(pattern, false)?))
    }

    fn new(tokens: Vec<Token>) -> Self {
        let literal = |t: &Token| if let Token::Literal(c) = t { Some(*c) } else { None };
        let prefix = tokens.iter().map_while(literal).collect();
        let mut suffix: Vec<char> = tokens.iter().rev().map_while(literal).collect();
        suffix.reverse();
        let fixed = tokens.iter().all(|t| matches!(t, Token::Literal(_) | Token::One | Token::Star));
        let slashes = fixed.then(|| tokens.iter().filter(|t| **t == Token::Literal('/')).count());
        Self { prefix, suffix: suffix.into_iter().collect(), slashes, tokens }
    }

    pub(super) fn tokens(&self) -> &[Token] {
        &self.tokens
    }

    pub(super) fn matches(&self, path: &str) -> bool {
        path.starts_with(&self.prefix)
            && path.ends_with(&self.suffix)
            && self.slashes.is_none_or(|n| path.bytes().filter(|b| *b == b'/').count() == n)
            && self.run(path).last() == Some(&true)
    }

    /// Is there a path that begins with `text` and matches?
    pub(super) fn may_match_below(&self, text: &str) -> bool {
        let shared = text.len().min(self.prefix.len());
        text.as_bytes()[..shared] == self.prefix.as_bytes()[..shared] && self.run(text).contains(&true)
    }

    /// Positions that are reached when all of `text` is read; the last one is the end.
    fn run(&self, text: &str) -> Vec<bool> {
        let mut now = vec![false; self.tokens.len() + 1];
        let mut next = now.clone();
        self.reach(&mut now, 0);
        for c in text.chars() {
            next.fill(false);
            let mut alive = false;
            for (at, token) in self.tokens.iter().enumerate().filter(|(at, _)| now[*at]) {
                let (stay, step) = match token {
                    Token::Literal(wanted) => (false, c == *wanted),
                    Token::One => (false, c != '/'),
                    Token::Class(ranges, negated) => (false, ranges.iter().any(|(low, high)| (*low..=*high).contains(&c)) != *negated),
                    Token::Star => (c != '/', false),
                    Token::Rest => (true, false),
                    Token::InFolders => (true, c == '/'),
                    Token::Folders => (false, false),
                };
                if stay {
                    self.reach(&mut next, at);
                }
                if step {
                    self.reach(&mut next, at + 1);
                }
                alive |= stay || step;
            }
            std::mem::swap(&mut now, &mut next);
            if !alive {
                break;
            }
        }
        now
    }

    /// Marks a position and those that are reached from it without reading anything.
    fn reach(&self, set: &mut [bool], mut at: usize) {
        while !set[at] {
            set[at] = true;
            match self.tokens.get(at) {
                Some(Token::Star | Token::Rest) => at += 1,
                Some(Token::Folders) => {
                    set[at + 1] = true;
                    at += 2;
                }
                _ => break,
            }
        }
    }
}

fn tokens(pattern: &str, double_star: bool) -> Result<Vec<Token>, &'static str> {
    let mut tokens = Vec::new();
    let mut chars = pattern.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '*' if double_star && chars.next_if_eq(&'*').is_some() => {
                chars.next_if_eq(&'/');
                if chars.peek().is_none() {
                    tokens.push(Token::Rest);
                } else {
                    tokens.extend([Token::Folders, Token::InFolders]);
                }
            }
            '*' => tokens.push(Token::Star),
            '?' => tokens.push(Token::One),
            '\\' => tokens.push(Token::Literal(chars.next().ok_or("nothing follows the closing backslash")?)),
            '[' => tokens.push(class(&mut chars)?),
            other => tokens.push(Token::Literal(other)),
        }
    }
    Ok(tokens)
}

/// Behind `[`: an optional `^`, then at least one character or range.
fn class(chars: &mut std::iter::Peekable<std::str::Chars>) -> Result<Token, &'static str> {
    const OPEN: &str = "the closing `]` is missing";
    let bound = |chars: &mut std::iter::Peekable<std::str::Chars>| match chars.next().ok_or(OPEN)? {
        '-' | ']' => Err("`-` and `]` must be escaped with a backslash inside brackets"),
        '\\' => chars.next().ok_or(OPEN),
        other => Ok(other),
    };
    let negated = chars.next_if_eq(&'^').is_some();
    let mut ranges = Vec::new();
    loop {
        if !ranges.is_empty() && chars.next_if_eq(&']').is_some() {
            return Ok(Token::Class(ranges, negated));
        }
        let low = bound(chars)?;
        let high = if chars.next_if_eq(&'-').is_some() { bound(chars)? } else { low };
        ranges.push((low, high));
    }
}
