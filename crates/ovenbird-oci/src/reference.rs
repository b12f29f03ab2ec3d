//! Image names: `registry/repository:tag@digest`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::Digest;

/// The registry of names that say none.
const DEFAULT_REGISTRY: &str = "docker.io";
/// Its name before 2015, still written in old files.
const LEGACY_REGISTRY: &str = "index.docker.io";
/// Where Docker Hub keeps repositories of one component.
const OFFICIAL: &str = "library";
/// Longest repository path, in bytes.
const MAX_REPOSITORY: usize = 255;
/// Longest tag, in bytes.
const MAX_TAG: usize = 128;

/// A parsed and normalised image name. `debian` is `docker.io/library/debian:latest`.
/// Source: distribution/reference grammar (with the familiar-name rules of Docker Hub). In JSON it is its text.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Not a reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an image name: {reason}")]
pub struct ParseReferenceError {
    /// What was given (its first 300 characters).
    pub text: String,
    /// Why.
    pub reason: &'static str,
}

impl Reference {
    /// Host and optional port (`docker.io`, `localhost:5000`).
    pub fn registry(&self) -> &str {
        &self.registry
    }
    /// Path below the registry (`library/debian`).
    pub fn repository(&self) -> &str {
        &self.repository
    }
    /// Tag as given, `None` when only a digest was given; `latest` is filled in when neither was.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }
    /// Digest as given.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }
    /// Same repository, this tag, no digest.
    #[must_use]
    pub fn with_tag(&self, tag: &str) -> Self {
        Self { tag: Some(tag.into()), digest: None, ..self.clone() }
    }
    /// Same repository and tag, this digest.
    #[must_use]
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self { digest: Some(digest), ..self.clone() }
    }
    /// As people write it: `debian:12` for `docker.io/library/debian:12`.
    pub fn familiar(&self) -> String {
        let full = self.to_string();
        let Some(hub) = full.strip_prefix("docker.io/") else { return full };
        match hub.strip_prefix("library/") {
            // Only an official image is a single word.
            Some(official) if !official.contains('/') => official.to_owned(),
            _ if hub.split_once('/').is_some_and(|(first, _)| names_host(first)) => full,
            _ => hub.to_owned(),
        }
    }
    /// Can this text be a tag: a letter, digit or `_`, then at most 127 of these, `.` and `-`.
    pub fn is_tag(text: &str) -> bool {
        let word = |c: u8| c.is_ascii_alphanumeric() || c == b'_';
        let bytes = text.as_bytes();
        bytes.len() <= MAX_TAG && bytes.first().is_some_and(|&c| word(c)) && bytes.iter().all(|&c| word(c) || c == b'.' || c == b'-')
    }
}

/// Is the first component of a name a host? Only when it cannot be a path component of Docker Hub, or is `localhost`.
fn names_host(first: &str) -> bool {
    first == "localhost" || first.contains(['.', ':', '[']) || first.bytes().any(|c| c.is_ascii_uppercase())
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for Reference {
    type Err = ParseReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).map_err(|reason| ParseReferenceError { text: text.chars().take(300).collect(), reason })
    }
}

fn parse(text: &str) -> Result<Reference, &'static str> {
    if text.is_empty() {
        return Err("it is empty");
    }
    if text.len() == 64 && text.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f')) {
        return Err("64 hex digits alone would be taken for an image id; write NAME@sha256:DIGEST");
    }
    if text.starts_with("http://") || text.starts_with("https://") {
        return Err("it is written without http:// or https://");
    }
    let (name, digest) = match text.split_once('@') {
        None => (text, None),
        Some((name, digest)) => (name, Some(digest.parse().map_err(|_| "after @ belongs a digest: sha256: and 64 lower-case hex digits")?)),
    };
    // A first component is a host only when it cannot be a path component of Docker Hub, or is `localhost`.
    let (registry, rest) = match name.split_once('/') {
        Some((first, rest)) if names_host(first) => (if first == LEGACY_REGISTRY { DEFAULT_REGISTRY } else { first }, rest),
        _ => (DEFAULT_REGISTRY, name),
    };
    if !is_host(registry) {
        return Err("the part before the first / is not HOST or HOST:PORT");
    }
    let (path, tag) = match rest.split_once(':') {
        None => (rest, None),
        Some((path, tag)) if Reference::is_tag(tag) => (path, Some(tag)),
        Some(_) => return Err("a tag has at most 128 letters, digits, `_`, `.` and `-`, and starts with none of the last two"),
    };
    if path.bytes().any(|c| c.is_ascii_uppercase()) {
        return Err("the repository must be lower-case");
    }
    let repository = if registry == DEFAULT_REGISTRY && !path.contains('/') { format!("{OFFICIAL}/{path}") } else { path.to_owned() };
    if !repository.split('/').all(is_component) {
        return Err("a repository is made of a-z and 0-9, separated by `/`, `.`, `_`, `__` or dashes");
    }
    if repository.len() > MAX_REPOSITORY {
        return Err("the repository is longer than 255 characters");
    }
    let tag = match (tag, &digest) {
        (None, None) => Some("latest".to_owned()),
        (tag, _) => tag.map(str::to_owned),
    };
    Ok(Reference { registry: registry.to_owned(), repository, tag, digest })
}

/// `domain-name | IPv4 | [IPv6]`, with an optional port.
pub fn is_host(text: &str) -> bool {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((v6, tail)) => {
                if v6.is_empty() || !v6.bytes().all(|c| c.is_ascii_hexdigit() || c == b':') {
                    return false;
                }
                if tail.is_empty() {
                    return true;
                }
                ("v6", tail.strip_prefix(':').or(Some("")))
            }
            None => return false,
        },
        None => text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port))),
    };
    let label =
        |l: &str| !l.is_empty() && !l.starts_with('-') && !l.ends_with('-') && l.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-');
    host.split('.').all(label) && port.is_none_or(|p| !p.is_empty() && p.bytes().all(|c| c.is_ascii_digit()))
}

/// `[a-z0-9]+` joined by `.`, `_`, `__` or any number of `-`.
fn is_component(text: &str) -> bool {
    let word = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let mut rest = text.as_bytes();
    loop {
        let length = rest.iter().take_while(|&&c| word(c)).count();
        if length == 0 {
            return false;
        }
        rest = &rest[length..];
        let Some(&first) = rest.first() else { return true };
        let same = rest.iter().take_while(|&&c| c == first).count();
        let most = match first {
            b'.' => 1,
            b'_' => 2,
            b'-' => usize::MAX,
            _ => return false,
        };
        if same > most {
            return false;
        }
        rest = &rest[same..];
    }
}

impl Serialize for Reference {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Reference {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn accepted() {
        // Written, full form, familiar form. `@D` stands for a digest.
        for (given, full, familiar) in [
            ("debian", "docker.io/library/debian:latest", "debian:latest"),
            ("debian:12", "docker.io/library/debian:12", "debian:12"),
            ("library/debian", "docker.io/library/debian:latest", "debian:latest"),
            ("user/app", "docker.io/user/app:latest", "user/app:latest"),
            ("docker.io/debian", "docker.io/library/debian:latest", "debian:latest"),
            ("index.docker.io/debian", "docker.io/library/debian:latest", "debian:latest"),
            ("index.docker.io/a/b:c", "docker.io/a/b:c", "a/b:c"),
            ("a/b/c", "docker.io/a/b/c:latest", "a/b/c:latest"),
            ("localhost/app", "localhost/app:latest", "localhost/app:latest"),
            ("docker.io/library/a/b", "docker.io/library/a/b:latest", "library/a/b:latest"),
            ("docker.io/host.io/a/b", "docker.io/host.io/a/b:latest", "docker.io/host.io/a/b:latest"),
            ("localhost:5000", "docker.io/library/localhost:5000", "localhost:5000"),
            ("localhost:5000/app:1", "localhost:5000/app:1", "localhost:5000/app:1"),
            ("host:5000/a/b", "host:5000/a/b:latest", "host:5000/a/b:latest"),
            ("Host/app", "Host/app:latest", "Host/app:latest"),
            ("127.0.0.1:80/app", "127.0.0.1:80/app:latest", "127.0.0.1:80/app:latest"),
            ("[::1]:5000/app", "[::1]:5000/app:latest", "[::1]:5000/app:latest"),
            ("[fd00:1:2::3]/app:x", "[fd00:1:2::3]/app:x", "[fd00:1:2::3]/app:x"),
            ("ghcr.io/a/b@D", "ghcr.io/a/b@D", "ghcr.io/a/b@D"),
            ("debian@D", "docker.io/library/debian@D", "debian@D"),
            ("debian:12@D", "docker.io/library/debian:12@D", "debian:12@D"),
            ("a.b-c_d__e---f", "docker.io/library/a.b-c_d__e---f:latest", "a.b-c_d__e---f:latest"),
            ("app:_A.b-C", "docker.io/library/app:_A.b-C", "app:_A.b-C"),
            ("xn--n3h.com/app", "xn--n3h.com/app:latest", "xn--n3h.com/app:latest"),
            ("a.b.c.d/e", "a.b.c.d/e:latest", "a.b.c.d/e:latest"),
        ] {
            let d = format!("@sha256:{HEX}");
            let (given, full, familiar) = (given.replace("@D", &d), full.replace("@D", &d), familiar.replace("@D", &d));
            let reference: Reference = given.parse().unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(reference.to_string(), full, "{given}");
            assert_eq!(reference.familiar(), familiar, "{given}");
            assert_eq!(full.parse(), Ok(reference.clone()), "normal form is a fixed point: {given}");
            assert_eq!(familiar.parse(), Ok(reference.clone()), "the familiar form means the same: {given}");
            assert_eq!(serde_json::from_str::<Reference>(&serde_json::to_string(&reference).unwrap()).unwrap(), reference);
        }
        let long = format!("h.io/{}:{}", "a".repeat(255), "t".repeat(128));
        assert_eq!(long.parse::<Reference>().unwrap().to_string(), long);
        assert!(format!("{HEX}:tag").parse::<Reference>().is_ok(), "only the bare digits are refused");
    }

    #[test]
    fn refused() {
        let rows = [
            "",
            ":tag",
            "/a",
            "a/",
            "a//b",
            "Debian",
            "a/B",
            "host.io/A",
            "host.io/",
            "a:",
            "a:-x",
            "a:.x",
            "a:b:c",
            "a b",
            "a@",
            "a@sha512:00",
            "a@sha256:00",
            "a..b",
            "a___b",
            "a_.b",
            "-a",
            "a-",
            "a.",
            "_a",
            "ä",
            "host.io:/a",
            "host.io:x/a",
            "-h.io/a",
            "h-.io/a",
            "h..io/a",
            "[::1/a",
            "[]/a",
            "[g::]/a",
            "[::1]x/a",
            "[::1]:/a",
            "https://h.io/a",
            "h.io/a:t/b",
            "../a",
            "a/../b",
            "./a",
            "a\n",
            "a\0",
        ];
        let long_name = format!("h.io/{}", "a".repeat(256));
        let long_tag = format!("a:{}", "t".repeat(129));
        for bad in rows.into_iter().chain([HEX, &long_name, &long_tag]) {
            assert!(bad.parse::<Reference>().is_err(), "{bad:?}");
        }
        let error = "debian:12:3".parse::<Reference>().unwrap_err().to_string();
        assert!(error.starts_with("\"debian:12:3\" is not an image name: a tag has"), "{error}");
    }

    #[test]
    fn derived() {
        let reference: Reference = "h.io/a:1".parse().unwrap();
        let digest = Digest::of(b"");
        assert_eq!(reference.with_digest(digest).to_string(), format!("h.io/a:1@{digest}"));
        assert_eq!(reference.with_digest(digest).with_tag("2").to_string(), "h.io/a:2");
        assert_eq!((reference.registry(), reference.repository(), reference.tag()), ("h.io", "a", Some("1")));
    }
}
