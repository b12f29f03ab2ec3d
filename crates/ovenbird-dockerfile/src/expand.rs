//! Word expansion: `$v`, `${v:-d}` and the rest, quotes and escapes, as Docker's shell lexer does it.

use std::collections::BTreeSet;

/// Where values come from.
pub trait Env {
    /// Value of a variable, `None` when unset.
    fn get(&self, name: &str) -> Option<String>;
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
    #[error("unexpected end of {word:?}: {expected} is missing")]
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
    #[error("unsupported modifier {modifier:?} in {word:?}")]
    Modifier {
        /// The word.
        word: String,
        /// Modifier.
        modifier: String,
    },
}

/// Expands words with one escape character.
#[derive(Debug, Clone, Copy)]
pub struct Expander {
    /// `\` or a backtick.
    pub escape: char,
    /// Leave unset variables as written (`HEALTHCHECK`, `CMD` and the names in history).
    pub keep_unset: bool,
    /// Keep quotes and escapes (heredoc bodies, shell commands in progress names).
    pub raw_quotes: bool,
}

impl Expander {
    /// One word in, one word out (quotes removed unless `raw_quotes`).
    pub fn word(&self, _word: &str, _env: &dyn Env) -> Result<Expanded, ExpandError> {
        Ok(Expanded::default())
    }

    /// One word in, several out: unquoted blanks of values split words (`EXPOSE $PORTS`).
    pub fn words(&self, _word: &str, _env: &dyn Env) -> Result<(Vec<String>, Expanded), ExpandError> {
        Ok((vec![], Expanded::default()))
    }
}
