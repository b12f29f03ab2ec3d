//! Where a build runs: what `--on` can say.

use std::fmt;
use std::str::FromStr;

use crate::request::ParseValueError;

/// A place.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum On {
    /// The best that this machine has.
    #[default]
    Auto,
    /// In this process.
    Here,
    /// In a process of its own on this machine.
    Process,
}

impl FromStr for On {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "auto" => Self::Auto,
            "here" => Self::Here,
            "process" => Self::Process,
            _ => return Err(ParseValueError { reason: format!("{text:?} is no place for a build: expected auto, here or process") }),
        })
    }
}

impl fmt::Display for On {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Here => "here",
            Self::Process => "process",
        })
    }
}
