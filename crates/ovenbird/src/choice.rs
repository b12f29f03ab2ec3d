//! Where a build runs: what `--on` can say.

use std::fmt;
use std::str::FromStr;

use crate::launch::Host;
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
    /// On one of these machines.
    Ssh(Vec<Host>),
    /// On one of the machines of the setting `[pool]`.
    Pool,
}

impl FromStr for On {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "auto" => Self::Auto,
            "here" => Self::Here,
            "process" => Self::Process,
            "pool" => Self::Pool,
            _ if text.starts_with("ssh://") => Self::Ssh(text.split(',').map(str::parse).collect::<Result<_, _>>()?),
            _ => {
                let reason = format!("{text:?} is no place for a build: expected auto, here, process, pool or ssh://HOST[,ssh://HOST]");
                return Err(ParseValueError { reason });
            }
        })
    }
}

impl fmt::Display for On {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Here => f.write_str("here"),
            Self::Process => f.write_str("process"),
            Self::Ssh(hosts) => f.write_str(&hosts.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")),
            Self::Pool => f.write_str("pool"),
        }
    }
}
