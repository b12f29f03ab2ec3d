//! What can go wrong between here and a registry: each message says what failed, why, and what to do about it.

use std::path::PathBuf;
use std::time::Duration;

use crate::keychain::{KeychainError, Origin};
use crate::store::StoreError;

/// What can go wrong with a registry.
///
/// `action` fields read after "cannot" (`fetch the manifest of docker.io/library/debian:12`). Text that came from a server is
/// cut to a line of printable characters before it gets here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// No such manifest, blob or repository.
    #[error(
        "{reference} is not in the registry; check name and tag, and log in when the repository is private (registries hide those from strangers)"
    )]
    NotFound {
        /// Asked for.
        reference: String,
    },
    /// Nobody is logged in, or the credentials are wrong.
    #[error("cannot {action}: {registry} refused the credentials ({detail}); {hint}")]
    Unauthorized {
        /// What was tried.
        action: String,
        /// Registry name.
        registry: String,
        /// What the server said, or that there were no credentials.
        detail: String,
        /// The command that logs in.
        hint: String,
    },
    /// Logged in, but not allowed.
    #[error("cannot {action}: {registry} does not allow it ({detail}); ask for access to the repository or log in as somebody who has it")]
    Denied {
        /// What was tried.
        action: String,
        /// Registry name.
        registry: String,
        /// What the server said.
        detail: String,
    },
    /// 429, and it stayed so.
    #[error("cannot {action}: {registry} limits the rate of requests ({detail}){}; log in for a higher limit, use a mirror, or wait", after(.retry_after.as_ref()))]
    RateLimited {
        /// What was tried.
        action: String,
        /// Registry name.
        registry: String,
        /// What the server said.
        detail: String,
        /// When it wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// The TLS handshake failed: unknown authority, wrong name, expired.
    #[error(
        "cannot {action}: no trusted TLS connection to {registry} ({reason}); install the authority's certificate or name it as `ca` of this registry in the settings"
    )]
    Tls {
        /// What was tried.
        action: String,
        /// Registry name, or the host it redirected to.
        registry: String,
        /// Why.
        reason: String,
    },
    /// No connection at all: name resolution, refused, unreachable.
    #[error("cannot {action}: no connection to {registry} ({reason}); check the name, the port, the network and the proxy settings")]
    Connect {
        /// What was tried.
        action: String,
        /// Registry name, or the host it redirected to.
        registry: String,
        /// Why.
        reason: String,
    },
    /// HTTPS was tried, the server speaks plain HTTP.
    #[error(
        "cannot {action}: {registry} speaks plain HTTP, and HTTPS is required; give it a certificate, or allow it with `plain_http = true` for this registry in the settings"
    )]
    PlainHttp {
        /// What was tried.
        action: String,
        /// Registry name.
        registry: String,
    },
    /// The connection broke and every retry broke too.
    #[error("cannot {action}: the connection to {registry} broke ({reason}), also when tried again; try later")]
    Interrupted {
        /// What was tried.
        action: String,
        /// Registry name, or the host it redirected to.
        registry: String,
        /// Why.
        reason: String,
    },
    /// The server took the connection and said nothing, or stopped in the middle of a body.
    #[error(
        "cannot {action}: {registry} was silent for {} s; check the name and the port, and that no proxy or firewall on the way swallows the answers", limit.as_secs_f32()
    )]
    Silent {
        /// What was tried.
        action: String,
        /// Registry name, or the host it redirected to.
        registry: String,
        /// How long was waited.
        limit: Duration,
    },
    /// 5xx, and it stayed so.
    #[error("cannot {action}: {registry} failed with status {status} ({detail}), also when tried again; try later or tell its operator")]
    Server {
        /// What was tried.
        action: String,
        /// Registry name.
        registry: String,
        /// HTTP status.
        status: u16,
        /// What the server said.
        detail: String,
        /// When it wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// The bytes are not what the digest or the size says.
    #[error("{what} is corrupt: expected {expected}, got {actual}; nothing was kept, try again or tell the registry's operator")]
    Corrupt {
        /// Which manifest or blob, from where.
        what: String,
        /// Digest or size asked for.
        expected: String,
        /// Digest or size received.
        actual: String,
    },
    /// The server answered what the distribution API does not allow.
    #[error(
        "cannot {action}: {registry} gave an unexpected answer ({reason}); check that it is an OCI registry and that a proxy before it lets requests through"
    )]
    Protocol {
        /// What was tried.
        action: String,
        /// Registry name.
        registry: String,
        /// What was wrong with it.
        reason: String,
    },
    /// More than Ovenbird takes.
    #[error("{what} has {size} bytes, more than the {limit} that are accepted; this is no ordinary image")]
    TooLarge {
        /// Which document.
        what: String,
        /// Bytes, as far as they are known.
        size: u64,
        /// Bytes.
        limit: u64,
    },
    /// The index has no manifest for the platform.
    #[error("{reference} has no image for {wanted}; it has {}; choose one with --platform", list(.available))]
    NoPlatform {
        /// Asked for.
        reference: String,
        /// Asked for.
        wanted: String,
        /// What the index has.
        available: Vec<String>,
    },
    /// What is named is no image: a layer of it is something else.
    #[error("{reference} is no image that can be used: {source}")]
    Layer {
        /// Asked for.
        reference: String,
        /// Which layer.
        source: crate::image::UnsupportedLayer,
    },
    /// A document that is no manifest and no index that Ovenbird reads.
    #[error(
        "{reference} is {media_type:?}, which is no image manifest or index that can be read; push it again in the OCI or the Docker schema 2 format"
    )]
    Unsupported {
        /// Asked for.
        reference: String,
        /// Its media type, or what it looks like.
        media_type: String,
    },
    /// A registry's settings cannot be used.
    #[error("the settings of registry {registry} cannot be used: {} {reason}; correct them", path.display())]
    Settings {
        /// Registry name.
        registry: String,
        /// The file or the value that is wrong.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A name was refused, so those that were put already were taken back.
    #[error("{source}{}", taken_back(.more, .undone, .left))]
    Unpublished {
        /// Why it was refused.
        source: Box<RegistryError>,
        /// What else was refused.
        more: Vec<RegistryError>,
        /// `NAME was removed again`, for each that was put.
        undone: Vec<String>,
        /// Names that may be there still, and why.
        left: Vec<(String, RegistryError)>,
    },
    /// Credentials could not be looked up.
    #[error("cannot look up the credentials of {registry}: {source}")]
    Keychain {
        /// Registry name.
        registry: String,
        /// Why.
        source: Box<KeychainError>,
    },
    /// The local store failed.
    #[error("cannot {action}: {source}")]
    Store {
        /// What was tried.
        action: String,
        /// Why.
        source: Box<StoreError>,
    },
    /// The work was stopped from outside before it ended.
    #[error("cannot {action}: it was cancelled; start it again, blobs that are complete are kept")]
    Cancelled {
        /// What was going on.
        action: String,
    },
}

impl RegistryError {
    /// Whether the same request may succeed a moment later.
    pub(crate) fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Connect { .. } | Self::Interrupted { .. } | Self::Silent { .. } | Self::RateLimited { .. } | Self::Server { .. }
        )
    }

    /// Whether the connection broke, and not the other side refused.
    pub(crate) fn is_break(&self) -> bool {
        matches!(self, Self::Connect { .. } | Self::Interrupted { .. } | Self::Silent { .. })
    }

    /// When the server wants to be asked again.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::RateLimited { retry_after, .. } | Self::Server { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// Is there no such repository or image?
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    /// Whether this machine's settings, credentials or state folder are to blame, and not the registry.
    pub fn is_configuration(&self) -> bool {
        match self {
            Self::Store { .. } | Self::Settings { .. } => true,
            Self::Keychain { source, .. } => source.is_configuration(),
            Self::Unpublished { source, .. } => source.is_configuration(),
            _ => false,
        }
    }

    pub(crate) fn store(action: &str, source: StoreError) -> Self {
        Self::Store { action: action.into(), source: Box::new(source) }
    }
}

/// The command that would help against [`RegistryError::Unauthorized`].
pub(crate) fn login_hint(registry: &str) -> String {
    format!("run `ovenbird login {registry}`")
}

/// The same, when there were credentials from somewhere.
pub(crate) fn origin_hint(registry: &str, origin: &Origin) -> String {
    match origin {
        Origin::File { .. } | Origin::Helper { path: Some(_), .. } => format!("they are from {origin}: run `ovenbird login {registry}`"),
        _ => format!("they are from {origin}: correct them there"),
    }
}

/// One line of at most 300 printable characters: servers must not write to the terminal as they like.
pub(crate) fn printable(text: &str) -> String {
    let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect();
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn after(delay: Option<&Duration>) -> String {
    delay.map_or_else(String::new, |d| format!(", wants a pause of {} s", d.as_secs()))
}

fn taken_back(more: &[RegistryError], undone: &[String], left: &[(String, RegistryError)]) -> String {
    let mut parts: Vec<String> = more.iter().map(ToString::to_string).collect();
    match (undone, left) {
        ([], []) => parts.push("no name was changed".into()),
        ([], _) => {}
        (undone, _) => parts.push(format!("the publish was taken back: {}", undone.join(", "))),
    }
    parts.extend(left.iter().map(|(name, why)| {
        format!("{name} may be the new image now, for it could not be taken back ({why}): look at it, and publish again or remove it")
    }));
    parts.insert(0, String::new());
    parts.join("; ")
}

fn list(items: &[String]) -> String {
    if items.is_empty() { "nothing at all".into() } else { items.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_here_and_not_there() {
        let registry = || String::from("h.test");
        let settings = || RegistryError::Settings { registry: registry(), path: "/me.pem".into(), reason: "is no PEM".into() };
        let malformed = KeychainError::Malformed { path: "/config.json".into(), reason: "it is no JSON object".into() };
        let cloud = KeychainError::Cloud { service: "Azure", action: "log in".into(), reason: "no".into(), hint: "ask" };
        assert!(settings().is_configuration());
        assert!(RegistryError::Keychain { registry: registry(), source: Box::new(malformed) }.is_configuration());
        assert!(!RegistryError::Keychain { registry: registry(), source: Box::new(cloud) }.is_configuration());
        assert!(!RegistryError::NotFound { reference: "h.test/a:1".into() }.is_configuration());
        let unpublished = RegistryError::Unpublished { source: Box::new(settings()), more: vec![], undone: vec![], left: vec![] };
        assert!(unpublished.is_configuration());
    }

    #[test]
    fn messages() {
        let action = || String::from("pull h.test/app:1");
        let registry = || String::from("h.test");
        let reference = || String::from("h.test/app:1");
        let detail = || printable("DENIED: \u{1b}[31mno\nmore");
        let retry_after = Some(Duration::from_secs(90));
        let missing = || StoreError::Missing { digest: crate::Digest::of(b"") };
        let errors = [
            RegistryError::NotFound { reference: reference() },
            RegistryError::Unauthorized { action: action(), registry: registry(), detail: detail(), hint: login_hint("h.test") },
            RegistryError::Denied { action: action(), registry: registry(), detail: detail() },
            RegistryError::RateLimited { action: action(), registry: registry(), detail: detail(), retry_after },
            RegistryError::RateLimited { action: action(), registry: registry(), detail: detail(), retry_after: None },
            RegistryError::Tls { action: action(), registry: registry(), reason: "unknown issuer".into() },
            RegistryError::Connect { action: action(), registry: registry(), reason: "connection refused".into() },
            RegistryError::PlainHttp { action: action(), registry: registry() },
            RegistryError::Interrupted { action: action(), registry: registry(), reason: "connection reset".into() },
            RegistryError::Silent { action: action(), registry: registry(), limit: Duration::from_mins(1) },
            RegistryError::Server { action: action(), registry: registry(), status: 503, detail: detail(), retry_after },
            RegistryError::Corrupt { what: "blob abc".into(), expected: "sha256:1".into(), actual: "sha256:2".into() },
            RegistryError::Protocol { action: action(), registry: registry(), reason: "status 418".into() },
            RegistryError::TooLarge { what: "the manifest".into(), size: 5, limit: 4 },
            RegistryError::NoPlatform { reference: reference(), wanted: "linux/s390x".into(), available: vec![] },
            RegistryError::NoPlatform { reference: reference(), wanted: "a/b".into(), available: vec!["c/d".into(), "e/f".into()] },
            RegistryError::Layer {
                reference: reference(),
                source: crate::image::UnsupportedLayer { digest: crate::Digest::of(b""), media_type: "text/html".into() },
            },
            RegistryError::Unsupported { reference: reference(), media_type: "text/html".into() },
            RegistryError::Settings { registry: registry(), path: "/ca.pem".into(), reason: "has no usable certificate (empty)".into() },
            RegistryError::Unpublished {
                source: Box::new(RegistryError::Denied {
                    action: "put the tag h.test/app:1".into(),
                    registry: registry(),
                    detail: detail(),
                }),
                more: vec![RegistryError::PlainHttp { action: "put the tag i.test/app:1".into(), registry: "i.test".into() }],
                undone: vec!["j.test/app:1 was removed again".into(), "j.test/app:latest is what it was before".into()],
                left: vec![("k.test/app:1".into(), RegistryError::PlainHttp { action: action(), registry: "k.test".into() })],
            },
            RegistryError::Keychain { registry: registry(), source: Box::new(KeychainError::NoPlace) },
            RegistryError::store("pull h.test/app:1", missing()),
            RegistryError::Cancelled { action: action() },
        ];
        let text: Vec<String> = errors.iter().map(ToString::to_string).collect();
        insta::assert_snapshot!(text.join("\n"));
    }
}
