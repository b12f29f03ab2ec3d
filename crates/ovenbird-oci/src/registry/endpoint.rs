//! Where a registry name leads: scheme, host, path prefix, mirrors. No I/O.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

use reqwest::Url;

use super::{ClientOptions, RegistryError, RegistryOptions, Timeouts};
use crate::keychain::Credential;

/// The name Docker Hub has in references, and the host that serves it.
const HUB: (&str, &str) = ("docker.io", "registry-1.docker.io");

/// One server that speaks the distribution API.
#[derive(Debug, Clone)]
pub(crate) struct Endpoint {
    /// As in references and settings; credentials are looked up by it.
    pub(crate) registry: String,
    /// `https://registry-1.docker.io/`.
    origin: Url,
    /// `prefix/` that a mirror puts before the repository, or nothing.
    prefix: String,
    /// Settings of this name.
    pub(crate) options: RegistryOptions,
    /// Attempts at a request; fewer for mirrors, which have the registry behind them.
    pub(crate) attempts: usize,
    /// How long its silence is borne.
    pub(crate) timeouts: Timeouts,
    /// Every form of a secret that was sent there: what it answers may say it back.
    sent: Arc<Mutex<BTreeSet<String>>>,
}

const ATTEMPTS: usize = 5;
const MIRROR_ATTEMPTS: usize = 2;

impl Endpoint {
    /// The registry itself.
    pub(crate) fn of(registry: &str, options: &ClientOptions) -> Result<Self, RegistryError> {
        Self::new(registry, registry, "", None, options)
    }

    /// The mirrors of a registry in their order, then the registry.
    pub(crate) fn for_pull(registry: &str, options: &ClientOptions) -> Result<Vec<Self>, RegistryError> {
        let mirrors = options.registries.get(registry).map_or(&[][..], |o| &o.mirrors);
        let mut endpoints = Vec::with_capacity(mirrors.len() + 1);
        for mirror in mirrors {
            let (scheme, rest) = match mirror.split_once("://") {
                Some((scheme, rest)) => (Some(scheme), rest),
                None => (None, mirror.as_str()),
            };
            let (host, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            endpoints.push(Self { attempts: MIRROR_ATTEMPTS, ..Self::new(mirror, host, prefix.trim_matches('/'), scheme, options)? });
        }
        endpoints.push(Self::of(registry, options)?);
        Ok(endpoints)
    }

    fn new(said: &str, name: &str, prefix: &str, scheme: Option<&str>, options: &ClientOptions) -> Result<Self, RegistryError> {
        let timeouts = options.timeouts;
        let options = options.registries.get(name).cloned().unwrap_or_default();
        let elsewhere = options.endpoint.clone();
        let (scheme, host) =
            match elsewhere.as_deref().map(|e| e.split_once("://").map_or((None, e), |(scheme, rest)| (Some(scheme), rest))) {
                Some((own, host)) => (own.or(scheme), host.trim_end_matches('/')),
                None if name == HUB.0 || name == "index.docker.io" => (scheme, HUB.1),
                None => (scheme, name),
            };
        let loopback = is_loopback(host_of(host));
        let trusted_tls = options.ca.is_some() || options.client_identity.is_some();
        let plain = match scheme {
            Some(scheme) => scheme == "http",
            None => options.plain_http || (loopback && !trusted_tls),
        };
        let wrong = || RegistryError::Settings {
            registry: without_password(said),
            path: without_password(said).into(),
            reason: match elsewhere.as_deref().map(without_password) {
                Some(endpoint) => format!("is to be reached at {endpoint:?}, which is not [http[s]://]host[:port]"),
                None => "is not host[:port], or host[:port]/prefix for a mirror".into(),
            },
        };
        let folder = |part: &str| !part.starts_with('.') && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if !(prefix.is_empty() || prefix.split('/').all(|part| !part.is_empty() && folder(part))) {
            return Err(wrong());
        }
        if host.is_empty() || host.contains(['/', '@', '?', '#', '\\']) || !matches!(scheme, None | Some("http" | "https")) {
            return Err(wrong());
        }
        let origin = Url::parse(&format!("{}://{host}/", if plain { "http" } else { "https" })).map_err(|_| wrong())?;
        let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
        Ok(Self { registry: name.to_owned(), origin, prefix, options, attempts: ATTEMPTS, timeouts, sent: Arc::default() })
    }

    /// Whether HTTPS was given up for this endpoint.
    pub(crate) fn is_plain(&self) -> bool {
        self.origin.scheme() == "http"
    }

    /// Scheme, host and port are those of the endpoint: only then may credentials go there.
    pub(crate) fn owns(&self, url: &Url) -> bool {
        self.origin.scheme() == url.scheme()
            && self.origin.host_str() == url.host_str()
            && self.origin.port_or_known_default() == url.port_or_known_default()
    }

    /// Scheme, host and port.
    pub(crate) fn address(&self) -> &str {
        self.origin.as_str().trim_end_matches('/')
    }

    /// Remembers a credential that goes there.
    pub(crate) fn note(&self, credential: &Credential) {
        let forms = credential.forms().into_iter().filter_map(|form| String::from_utf8(form).ok()).filter(|form| !form.is_empty());
        self.sent.lock().unwrap_or_else(PoisonError::into_inner).extend(forms);
    }

    /// The endpoint's text without what was sent to it.
    pub(crate) fn strike(&self, text: &str) -> String {
        let sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        sent.iter().fold(text.to_owned(), |text, secret| text.replace(secret, "***"))
    }

    /// `/v2/`.
    pub(crate) fn root(&self) -> Url {
        let mut url = self.origin.clone();
        url.set_path("/v2/");
        url
    }

    /// `/v2/REPOSITORY/TAIL`.
    pub(crate) fn url(&self, repository: &str, tail: &str) -> Url {
        let mut url = self.origin.clone();
        url.set_path(&format!("/v2/{}{repository}/{tail}", self.prefix));
        url
    }

    /// The repository's name in scopes of this endpoint.
    pub(crate) fn repository(&self, repository: &str) -> String {
        format!("{}{repository}", self.prefix)
    }

    /// Resolves a `Location` header. Behind a proxy that ends TLS many registries say `http` for themselves: that is put right.
    pub(crate) fn locate(&self, base: &Url, location: &str) -> Option<Url> {
        let mut url = base.join(location).ok()?;
        if url.scheme() == "http" && !self.is_plain() && url.host_str() == self.origin.host_str() {
            url.set_scheme("https").ok()?;
            if url.port() == Some(80) {
                url.set_port(None).ok()?;
            }
        }
        let allowed = url.scheme() == "https" || (url.scheme() == "http" && self.is_plain());
        (allowed && url.has_host()).then_some(url)
    }
}

/// Somebody may have written one before the host.
fn without_password(address: &str) -> String {
    address.rsplit_once('@').map_or_else(|| address.to_owned(), |(_, host)| format!("***@{host}"))
}

/// On this machine?
pub(crate) fn is_loopback_url(url: &Url) -> bool {
    url.host_str().is_some_and(|host| is_loopback(host_of(host)))
}

/// Without the port and the brackets of IPv6.
fn host_of(authority: &str) -> &str {
    if let Some(rest) = authority.strip_prefix('[') {
        return rest.split(']').next().unwrap_or(rest);
    }
    authority.split(':').next().unwrap_or(authority)
}

fn is_loopback(host: &str) -> bool {
    host.eq_ignore_ascii_case("localhost")
        || host.parse::<Ipv4Addr>().is_ok_and(|ip| ip.is_loopback())
        || host.parse::<Ipv6Addr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> ClientOptions {
        let plain = RegistryOptions { plain_http: true, ..RegistryOptions::default() };
        let ca = RegistryOptions { ca: Some("/ca.pem".into()), ..RegistryOptions::default() };
        let mirrored = RegistryOptions {
            mirrors: vec!["mirror.test/hub".into(), "http://127.0.0.1:5001".into(), "plain.test:80".into()],
            ..RegistryOptions::default()
        };
        let registries = [("plain.test:80", plain), ("localhost:5443", ca), ("docker.io", mirrored)];
        ClientOptions { registries: registries.map(|(n, o)| (n.to_owned(), o)).into(), ..ClientOptions::default() }
    }

    #[test]
    fn addresses() {
        let rows = [
            ("docker.io", "https://registry-1.docker.io/v2/a/b/x"),
            ("index.docker.io", "https://registry-1.docker.io/v2/a/b/x"),
            ("ghcr.io", "https://ghcr.io/v2/a/b/x"),
            ("host.test:5000", "https://host.test:5000/v2/a/b/x"),
            ("plain.test:80", "http://plain.test/v2/a/b/x"),
            ("localhost:5000", "http://localhost:5000/v2/a/b/x"),
            ("localhost:5443", "https://localhost:5443/v2/a/b/x"),
            ("127.0.0.1:5000", "http://127.0.0.1:5000/v2/a/b/x"),
            ("127.9.9.9", "http://127.9.9.9/v2/a/b/x"),
            ("[::1]:5000", "http://[::1]:5000/v2/a/b/x"),
            ("128.0.0.1:5000", "https://128.0.0.1:5000/v2/a/b/x"),
            ("localhost.evil.test", "https://localhost.evil.test/v2/a/b/x"),
            ("127.0.0.1.evil.test", "https://127.0.0.1.evil.test/v2/a/b/x"),
        ];
        for (registry, expected) in rows {
            assert_eq!(Endpoint::of(registry, &options()).unwrap().url("a/b", "x").as_str(), expected);
        }
        for wrong in ["", "a/b", "user@host", "host?x", "host:port"] {
            assert!(Endpoint::of(wrong, &options()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn mirrors_come_first() {
        let urls: Vec<_> =
            Endpoint::for_pull("docker.io", &options()).unwrap().iter().map(|e| e.url("library/a", "x").to_string()).collect();
        assert_eq!(
            urls,
            [
                "https://mirror.test/v2/hub/library/a/x",
                "http://127.0.0.1:5001/v2/library/a/x",
                "http://plain.test/v2/library/a/x",
                "https://registry-1.docker.io/v2/library/a/x"
            ]
        );
    }

    #[test]
    fn locations_and_ownership() {
        let rows = [
            ("https://r.test/v2/", "/v2/a", Some("https://r.test/v2/a"), true),
            ("https://r.test/v2/", "https://cdn.test/a?s=1", Some("https://cdn.test/a?s=1"), false),
            ("https://r.test/v2/", "http://r.test/v2/a", Some("https://r.test/v2/a"), true),
            ("https://r.test/v2/", "http://cdn.test/a", None, false),
            ("https://r.test/v2/", "file:///etc/passwd", None, false),
            ("https://r.test/v2/", "https://r.test:444/a", Some("https://r.test:444/a"), false),
            ("https://r.test/v2/", "//cdn.test/a", Some("https://cdn.test/a"), false),
        ];
        let endpoint = Endpoint::of("r.test", &options()).unwrap();
        for (base, location, expected, owned) in rows {
            let url = endpoint.locate(&Url::parse(base).unwrap(), location);
            assert_eq!(url.as_ref().map(Url::as_str), expected, "{location}");
            assert_eq!(url.is_some_and(|u| endpoint.owns(&u)), owned, "{location}");
        }
    }
}
