//! `.dockerignore` patterns and `COPY` wildcards, with Moby's rules (not gitignore's).
//!
//! Patterns are tried in order and the last match wins; a pattern that matches a parent folder
//! matches everything below it. Most patterns compile to a comparison of strings; the others to a
//! small automaton whose cost is bounded by pattern × path, so no pattern can be made slow.

mod glob;

use glob::{Glob, Token};

/// What can be wrong with a pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("pattern {pattern:?} is malformed: {reason}")]
pub struct PatternError {
    /// As written.
    pub pattern: String,
    /// Why.
    pub reason: &'static str,
}

/// A compiled ignore file. Last match wins; a match of a parent folder counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Patterns {
    rules: Vec<Rule>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    written: String,
    /// Written with `!`: takes paths back in.
    negated: bool,
    matcher: Matcher,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Matcher {
    /// No special character.
    Exact(String),
    /// `dir/**`: begins with the text.
    Prefix(String),
    /// `**/name` or `**name`: ends with the text. `**/name` also matches `name` itself.
    Suffix(String),
    /// Anything else.
    Glob(Box<Glob>),
}

impl Patterns {
    /// From the text of an ignore file (comments, blank lines, BOM).
    pub fn parse(text: &str) -> Result<Self, PatternError> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        // A comment needs its `#` in the first column: ` #x` is a pattern.
        let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        Self::new(&lines)
    }

    /// From single patterns (`--exclude`).
    pub fn new<S: AsRef<str>>(patterns: &[S]) -> Result<Self, PatternError> {
        let mut rules = Vec::new();
        for written in patterns.iter().map(AsRef::as_ref) {
            let pattern = written.trim();
            let (negated, pattern) = match pattern.strip_prefix('!') {
                Some(rest) => (true, rest.trim()),
                None => (false, pattern),
            };
            if pattern.is_empty() {
                if negated {
                    return Err(PatternError {
                        pattern: written.to_owned(),
                        reason: "illegal exclusion pattern: \"!\" needs a path behind it",
                    });
                }
                continue;
            }
            let cleaned = clean(pattern);
            let cleaned = if cleaned.len() > 1 { cleaned.trim_start_matches('/') } else { &cleaned };
            let matcher = Matcher::compile(cleaned).map_err(|reason| PatternError { pattern: written.to_owned(), reason })?;
            rules.push(Rule { written: pattern.to_owned(), negated, matcher });
        }
        Ok(Self { rules })
    }

    /// These patterns, then those.
    #[must_use]
    pub fn and(mut self, more: Self) -> Self {
        self.rules.extend(more.rules);
        self
    }

    /// The patterns as written, in order: [`Self::new`] makes the same of them.
    pub fn written(&self) -> impl Iterator<Item = &str> {
        self.rules.iter().map(|rule| rule.written.as_str())
    }

    /// True when there is no pattern.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Is this path (relative, `/`-separated) left out? Parents are considered.
    pub fn is_ignored(&self, path: &str) -> bool {
        self.ignored_by(path).is_some()
    }

    /// Is the source of a `COPY` surely left out? With a `!` pattern nothing is sure: it may take back files below a folder. Unlike a
    /// file, the root of the context (`.`) counts as left out when a pattern takes away everything in it.
    pub fn leaves_out_source(&self, source: &str) -> bool {
        let source = clean(source);
        !self.rules.iter().any(|rule| rule.negated) && self.rules.iter().any(|rule| rule.matcher.matches_or_parent(&source))
    }

    /// The pattern that leaves this path out.
    pub fn ignored_by(&self, path: &str) -> Option<&str> {
        let cleaned;
        let path = if is_clean(path) {
            path
        } else {
            cleaned = clean(path);
            &cleaned
        };
        // The root of the context cannot be left out.
        if path == "." {
            return None;
        }
        let mut ignored = None;
        for rule in &self.rules {
            // A rule that would not change the outcome need not be tried.
            if rule.negated == ignored.is_some() && rule.matcher.matches_or_parent(path) {
                ignored = (!rule.negated).then_some(rule.written.as_str());
            }
        }
        ignored
    }

    /// May a walk skip everything below this ignored folder (no `!` pattern can match below it)?
    /// False when the folder is not ignored.
    pub fn can_prune(&self, dir: &str) -> bool {
        let dir = clean(dir);
        let below = format!("{dir}/");
        self.is_ignored(&dir)
            && self.rules.iter().all(|rule| {
                // A rule that matches the folder itself matches all that is below: it is already
                // part of the outcome.
                !rule.negated || rule.matcher.matches_or_parent(&dir) || !rule.matcher.may_match_below(&below)
            })
    }
}

impl Matcher {
    fn compile(pattern: &str) -> Result<Self, &'static str> {
        let glob = Glob::compile(pattern)?;
        Ok(match glob.tokens() {
            tokens if tokens.iter().all(|t| matches!(t, Token::Literal(_))) => Self::Exact(literal(tokens)),
            [head @ .., Token::Rest] if head.iter().all(|t| matches!(t, Token::Literal(_))) => Self::Prefix(literal(head)),
            [Token::Folders, Token::InFolders, tail @ ..] if tail.iter().all(|t| matches!(t, Token::Literal(_))) => {
                // Moby compares the end of the text here, so `**name` matches `myname` too.
                let slash = if pattern.starts_with("**/") { "/" } else { "" };
                Self::Suffix(format!("{slash}{}", literal(tail)))
            }
            _ => Self::Glob(Box::new(glob)),
        })
    }

    fn matches(&self, path: &str) -> bool {
        match self {
            Self::Exact(text) => path == text,
            Self::Prefix(text) => path.starts_with(text.as_str()),
            Self::Suffix(text) => path.ends_with(text.as_str()) || text.strip_prefix('/').is_some_and(|name| path == name),
            Self::Glob(glob) => glob.matches(path),
        }
    }

    fn matches_or_parent(&self, path: &str) -> bool {
        match self {
            Self::Exact(text) => path.strip_prefix(text.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')),
            // A parent that begins with the text makes the path begin with it.
            Self::Prefix(text) => path.starts_with(text.as_str()),
            _ => self.matches(path) || path.match_indices('/').any(|(end, _)| end > 0 && self.matches(&path[..end])),
        }
    }

    /// Can a path that begins with `below` (a folder and its slash) match? May err towards yes.
    fn may_match_below(&self, below: &str) -> bool {
        match self {
            Self::Exact(text) => text.starts_with(below),
            Self::Prefix(text) => text.starts_with(below) || below.starts_with(text.as_str()),
            Self::Suffix(_) => true,
            Self::Glob(glob) => glob.may_match_below(below),
        }
    }
}

fn literal(tokens: &[Token]) -> String {
    tokens.iter().filter_map(|t| if let Token::Literal(c) = t { Some(*c) } else { None }).collect()
}

/// Nothing to do for [`clean`]: no empty, `.` or `..` element.
fn is_clean(path: &str) -> bool {
    !path.is_empty() && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

/// Go's `filepath.Clean`: no empty, `.` and inner `..` elements, no slash at the end.
pub fn clean(path: &str) -> String {
    let rooted = path.starts_with('/');
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => match parts.last() {
                Some(&last) if last != ".." => {
                    parts.pop();
                }
                _ if rooted => {}
                _ => parts.push(part),
            },
            _ => parts.push(part),
        }
    }
    let joined = parts.join("/");
    match (rooted, joined.is_empty()) {
        (true, _) => format!("/{joined}"),
        (false, true) => ".".to_owned(),
        (false, false) => joined,
    }
}

/// Go's `filepath.Match`: `*`, `?`, `[a-z]`, `[^a]`, `\`; `*` never matches `/`.
///
/// The whole pattern is checked, also behind the place where the name stops to match.
pub fn go_match(pattern: &str, name: &str) -> Result<bool, PatternError> {
    match Glob::compile_go(pattern) {
        Ok(glob) => Ok(glob.matches(name)),
        Err(reason) => Err(PatternError { pattern: pattern.to_owned(), reason }),
    }
}

#[cfg(test)]
mod tests;
