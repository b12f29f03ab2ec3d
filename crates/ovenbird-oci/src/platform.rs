//! `os/architecture[/variant]`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A platform, normalised (`x86_64` → `amd64`, `aarch64` → `arm64`, `arm` → `arm/v7`, `arm64/v8` → `arm64`).
/// Source: containerd's platform normalisation, as Docker uses it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Platform {
    /// `amd64`…
    pub architecture: String,
    /// `linux`.
    pub os: String,
    /// `v7`…
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub variant: Option<String>,
    /// Windows only.
    #[serde(rename = "os.version", skip_serializing_if = "Option::is_none", default)]
    pub os_version: Option<String>,
}

/// Not a platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a platform: expected os/architecture[/variant], for example linux/arm64")]
pub struct ParsePlatformError {
    /// What was given.
    pub text: String,
}

impl Platform {
    /// The machine this program was built for.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "x86" => "386",
            "powerpc64" => "ppc64le",
            other => other,
        };
        Self { architecture: architecture.into(), os: "linux".into(), variant: None, os_version: None }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Platform {
    type Err = ParsePlatformError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.split('/');
        let (Some(os), Some(arch), variant, None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
            return Err(ParsePlatformError { text: text.into() });
        };
        Ok(Self { architecture: arch.into(), os: os.into(), variant: variant.map(Into::into), os_version: None })
    }
}
