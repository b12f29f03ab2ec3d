//! `os/architecture[/variant]`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A platform, normalised (`x86_64` → `amd64`, `aarch64` → `arm64`, `arm` → `arm/v7`, `arm64/v8` → `arm64`).
/// Source: containerd's platform normalisation, as Docker uses it. What comes from JSON is as it was written:
/// see [`Platform::normalized`].
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
    /// What was given (its first 100 characters).
    pub text: String,
}

/// `GOOS` values: what a single word may name besides an architecture.
const SYSTEMS: &[&str] = &[
    "aix",
    "android",
    "darwin",
    "dragonfly",
    "freebsd",
    "illumos",
    "ios",
    "js",
    "linux",
    "macos",
    "netbsd",
    "openbsd",
    "plan9",
    "solaris",
    "wasip1",
    "windows",
];

/// `GOARCH` values after normalisation.
const ARCHITECTURES: &[&str] = &[
    "386", "amd64", "arm", "arm64", "loong64", "mips", "mips64", "mips64le", "mipsle", "ppc64", "ppc64le", "riscv64", "s390x", "sparc64",
    "wasm",
];

impl Platform {
    /// The machine this program was built for.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
            "powerpc64" => "ppc64",
            "x86" => "386",
            "loongarch64" => "loong64",
            other => other,
        };
        Self { architecture: architecture.into(), os: "linux".into(), variant: None, os_version: None }.normalized()
    }

    /// The same platform under the names everybody uses.
    #[must_use]
    pub fn normalized(&self) -> Self {
        let os = match self.os.to_ascii_lowercase().as_str() {
            "macos" => "darwin".to_owned(),
            other => other.to_owned(),
        };
        let variant = self.variant.as_deref().unwrap_or_default().to_ascii_lowercase();
        let variant = if variant.bytes().all(|c| c.is_ascii_digit()) && !variant.is_empty() { format!("v{variant}") } else { variant };
        let (architecture, variant) = match (self.architecture.to_ascii_lowercase().as_str(), variant.as_str()) {
            ("i386" | "i486" | "i586" | "i686" | "x86" | "386", _) => ("386".to_owned(), ""),
            ("x86_64" | "x86-64" | "amd64", "v1") => ("amd64".to_owned(), ""),
            ("x86_64" | "x86-64" | "amd64", v) => ("amd64".to_owned(), v),
            ("aarch64" | "arm64", "v8" | "v8.0") => ("arm64".to_owned(), ""),
            ("aarch64" | "arm64", v) => ("arm64".to_owned(), v),
            ("armhf", _) | ("arm", "") => ("arm".to_owned(), "v7"),
            ("armel", _) => ("arm".to_owned(), "v6"),
            (other, v) => (other.to_owned(), v),
        };
        let variant = if variant.is_empty() { None } else { Some(variant.to_owned()) };
        Self { architecture, os, variant, os_version: self.os_version.clone() }
    }

    /// Can an image for `candidate` run here? An ARM machine runs older variants (`v7` runs `v6` and `v5`), an x86-64 level runs lower levels.
    pub fn matches(&self, candidate: &Self) -> bool {
        self.preference(candidate).is_some()
    }

    /// How well `candidate` suits: 0 is the very same, more is older, `None` does not run here.
    pub fn preference(&self, candidate: &Self) -> Option<u32> {
        let (have, want) = (self.normalized(), candidate.normalized());
        let version_differs = have.os_version.is_some() && want.os_version.is_some() && have.os_version != want.os_version;
        if have.os != want.os || have.architecture != want.architecture || version_differs {
            return None;
        }
        if have.variant == want.variant {
            return Some(0);
        }
        // What a platform without a variant is: the base level of the architecture.
        let base = match have.architecture.as_str() {
            "arm" => "v7",
            "arm64" => "v8",
            "amd64" => "v1",
            _ => return None,
        };
        let level = |p: &Self| -> Option<u32> {
            let (major, minor) = p.variant.as_deref().unwrap_or(base).strip_prefix('v').map(|v| v.split_once('.').unwrap_or((v, "0")))?;
            Some(major.parse::<u32>().ok()?.checked_mul(100)? + minor.parse::<u32>().ok().filter(|m| *m < 100)?)
        };
        level(&have)?.checked_sub(level(&want)?)
    }

    /// Index of the candidate that suits best (the first among equals).
    pub fn choose<'a>(&self, candidates: impl IntoIterator<Item = &'a Self>) -> Option<usize> {
        let ranked = candidates.into_iter().enumerate().filter_map(|(i, c)| Some((self.preference(c)?, i)));
        ranked.min().map(|(_, i)| i)
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.os_version {
            Some(version) => write!(f, "{}({version})/{}", self.os, self.architecture)?,
            None => write!(f, "{}/{}", self.os, self.architecture)?,
        }
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Platform {
    type Err = ParsePlatformError;

    /// Also a bare architecture (`arm64`: on Linux) or system (`linux`: this machine's architecture).
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParsePlatformError { text: text.chars().take(100).collect() };
        let word = |s: &str| {
            s.starts_with(|c: char| c.is_ascii_alphanumeric())
                && s.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'.' | b'-'))
        };
        let mut parts: Vec<&str> = text.split('/').collect();
        // `windows(10.0.20348)/amd64`: the version stands behind the system.
        let version = match parts[0].strip_suffix(')').and_then(|os| os.split_once('(')) {
            Some((os, version)) if word(version) => {
                parts[0] = os;
                Some(version.to_owned())
            }
            _ => None,
        };
        if !parts.iter().all(|p| word(p)) {
            return Err(error());
        }
        let make = |os: &str, architecture: &str, variant: Option<&str>| {
            Self { architecture: architecture.into(), os: os.into(), variant: variant.map(Into::into), os_version: version.clone() }
                .normalized()
        };
        match *parts.as_slice() {
            [one] if SYSTEMS.contains(&one.to_ascii_lowercase().as_str()) => {
                let host = Self::host();
                Ok(make(one, &host.architecture, host.variant.as_deref()))
            }
            [one] => Some(make("linux", one, None)).filter(|p| ARCHITECTURES.contains(&p.architecture.as_str())).ok_or_else(error),
            [os, architecture] => Ok(make(os, architecture, None)),
            [os, architecture, variant] => Ok(make(os, architecture, Some(variant))),
            _ => Err(error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse() {
        for (given, expected) in [
            ("linux/amd64", "linux/amd64"),
            ("linux/x86_64", "linux/amd64"),
            ("Linux/X86-64", "linux/amd64"),
            ("linux/amd64/v1", "linux/amd64"),
            ("linux/amd64/v3", "linux/amd64/v3"),
            ("linux/aarch64", "linux/arm64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/arm64/8", "linux/arm64"),
            ("linux/arm", "linux/arm/v7"),
            ("linux/arm/7", "linux/arm/v7"),
            ("linux/arm/v6", "linux/arm/v6"),
            ("linux/armhf", "linux/arm/v7"),
            ("linux/armel", "linux/arm/v6"),
            ("linux/i386", "linux/386"),
            ("macos/arm64", "darwin/arm64"),
            ("windows/amd64", "windows/amd64"),
            ("linux/s390x", "linux/s390x"),
            ("linux/future", "linux/future"),
            ("arm64", "linux/arm64"),
            ("aarch64", "linux/arm64"),
            ("arm", "linux/arm/v7"),
            ("x86_64", "linux/amd64"),
        ] {
            let platform: Platform = given.parse().unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(platform.to_string(), expected, "{given}");
            assert_eq!(platform.normalized(), platform);
        }
        assert_eq!("linux".parse::<Platform>().unwrap(), Platform::host());
        for bad in ["", "/", "linux/", "/amd64", "a/b/c/d", "pdp11", "linux/am d64", "linux/../x", "linux/amd64\n"] {
            assert!(bad.parse::<Platform>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn matching() {
        let p = |s: &str| s.parse::<Platform>().unwrap();
        for (have, candidate, expected) in [
            ("linux/amd64", "linux/amd64", Some(0)),
            ("linux/amd64", "linux/arm64", None),
            ("linux/amd64", "windows/amd64", None),
            ("linux/arm/v7", "linux/arm/v7", Some(0)),
            ("linux/arm/v7", "linux/arm/v6", Some(100)),
            ("linux/arm/v7", "linux/arm/v5", Some(200)),
            ("linux/arm/v6", "linux/arm/v7", None),
            ("linux/arm64", "linux/arm64/v8", Some(0)),
            ("linux/arm64", "linux/arm64/v9", None),
            ("linux/arm64/v9", "linux/arm64", Some(100)),
            ("linux/amd64/v3", "linux/amd64", Some(200)),
            ("linux/amd64", "linux/amd64/v2", None),
            ("linux/arm/v7", "linux/arm/strange", None),
        ] {
            assert_eq!(p(have).preference(&p(candidate)), expected, "{have} {candidate}");
        }
        let raw = Platform { architecture: "arm".into(), os: "linux".into(), variant: None, os_version: None };
        assert!(p("linux/arm/v7").matches(&raw), "candidates come as they were written");
        let candidates = [p("linux/arm/v5"), p("linux/amd64"), p("linux/arm/v6"), p("linux/arm/v8")];
        assert_eq!(p("linux/arm/v7").choose(&candidates), Some(2));
        assert_eq!(p("linux/s390x").choose(&candidates), None);
    }
}
