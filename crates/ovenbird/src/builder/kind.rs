//! Which builder is asked for.

use std::fmt;
use std::str::FromStr;

use crate::request::ParseValueError;

/// `--builder`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BuilderKind {
    /// Our own engine where steps can run here, else a Docker Engine that answers.
    #[default]
    Auto,
    /// Our own engine.
    Engine,
    /// The Docker Engine that the environment means.
    Docker,
}

impl FromStr for BuilderKind {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            // `default` is what buildx calls its own choice.
            "auto" | "default" | "" => Self::Auto,
            "engine" => Self::Engine,
            "docker" => Self::Docker,
            _ => {
                return Err(ParseValueError {
                    reason: format!("{text:?} is no builder: expected auto, engine or docker; instances of buildx are not known here"),
                });
            }
        })
    }
}

impl fmt::Display for BuilderKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Engine => "engine",
            Self::Docker => "docker",
        })
    }
}
