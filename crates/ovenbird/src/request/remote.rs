//! Addresses of contexts that are not on this machine.

use std::fmt;

use ovenbird_engine::ops::remote::host_of;
use ovenbird_oci::keychain::{Credential, Secret};
use serde::{Deserialize, Serialize};

/// What an address of a context begins with.
const BEGINNINGS: [&str; 8] = ["http://", "https://", "git://", "ssh://", "file://", "github.com/", "oci://", "oci-layout://"];

/// What the query of a repository's address may say. All other values are shown as `***`.
const KEYS: [&str; 8] = ["ref", "tag", "branch", "commit", "checksum", "subdir", "submodules", "keep-git-dir"];

/// The address of a git repository, of a file on a web server, or of an artifact (`oci://NAME`, `oci-layout://PATH`), as it was typed. It may have
/// a password in it, so it prints without.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RemoteUrl(String);

impl RemoteUrl {
    /// `None`: not an address, but a path.
    pub fn parse(text: &str) -> Option<Self> {
        let begins = |beginning: &&str| text.get(..beginning.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(beginning));
        (BEGINNINGS.iter().any(begins) || is_scp(text)).then(|| Self(text.to_owned()))
    }

    /// As it was typed.
    pub fn expose(&self) -> &str {
        &self.0
    }

    /// User and password, and the address without them. The user of ssh is no secret, and stays.
    pub fn split_credentials(&self) -> (Option<(String, String)>, String) {
        let schemes = ["http", "https", "git", "ssh"];
        let server = self.0.split_once("://").filter(|(scheme, _)| schemes.iter().any(|known| scheme.eq_ignore_ascii_case(known)));
        let Some((scheme, rest)) = server else { return (None, self.0.clone()) };
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, tail) = rest.split_at(end);
        let Some((info, host)) = authority.rsplit_once('@') else { return (None, self.0.clone()) };
        let (user, password) = info.split_once(':').unwrap_or((info, ""));
        if scheme.eq_ignore_ascii_case("ssh") && password.is_empty() {
            return (None, self.0.clone());
        }
        (Some((user.to_owned(), password.to_owned())), format!("{scheme}://{host}{tail}"))
    }
}

impl RemoteUrl {
    /// The host, and what its address says of who asks: a password, or a token where the name of a user is.
    pub(crate) fn login(&self) -> Option<(String, Credential)> {
        let (found, address) = self.split_credentials();
        let (user, password) = found?;
        let credential = match password.as_str() {
            "" => Credential::RegistryToken(Secret::new(user)),
            _ => Credential::Password { username: user, password: Secret::new(password) },
        };
        Some((host_of(&address).to_owned(), credential))
    }
}

/// An address without what may be a password in it, whether it can be read as one or not: who typed it wrong typed it all the same.
pub(crate) fn masked(text: &str) -> String {
    // A digest stands behind an `@`, too; a name that can be read has no password in it.
    if text.strip_prefix("oci://").is_some_and(|name| name.parse::<ovenbird_oci::Reference>().is_ok()) {
        return text.to_owned();
    }
    let url = RemoteUrl(text.to_owned());
    let (found, address) = url.split_credentials();
    let (scheme, rest) = address.split_once("://").unwrap_or(("", &address));
    let slashes = if scheme.is_empty() { "" } else { "://" };
    let (place, query) = rest.split_once('?').map_or((rest, None), |(place, query)| (place, Some(query)));
    // A password with a `/`, `#` or `?` in it ends the host too early; that of an unknown scheme is not looked for above.
    let first = place.find(['/', '#']).unwrap_or(place.len());
    let odd = |at: usize| place[..at].contains(':') && !matches!(scheme, "ssh" | "oci-layout" | "file" | "");
    let plain_scp = scheme.is_empty() && is_scp(place);
    let mut shown = match place.rfind('@') {
        Some(at) if found.is_none() && !plain_scp && (odd(first.min(at)) || scheme.is_empty() && place[..at].contains(':')) => {
            format!("{scheme}{slashes}***{}", &place[at..])
        }
        _ if found.is_some() => format!("{scheme}://***@{place}"),
        _ => format!("{scheme}{slashes}{place}"),
    };
    if let Some(query) = query {
        if query.contains('@') && place[..first].rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_err()) && found.is_none() {
            return format!("{scheme}{slashes}***");
        }
        let known = |part: &str| part.split_once('=').is_none_or(|(key, _)| KEYS.contains(&key));
        let parts: Vec<String> = query
            .split('&')
            .map(|part| if known(part) { part.to_owned() } else { format!("{}=***", part.split('=').next().unwrap_or_default()) })
            .collect();
        shown = format!("{shown}?{}", parts.join("&"));
    }
    shown
}

/// `git@host:path`, with any user.
fn is_scp(text: &str) -> bool {
    let Some((user, rest)) = text.split_once('@') else { return false };
    let Some((host, path)) = rest.split_once(':') else { return false };
    let word = |text: &str, extra: char| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == extra);
    word(user, '_') && word(host, '.') && !path.is_empty()
}

impl fmt::Display for RemoteUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&masked(&self.0))
    }
}

impl fmt::Debug for RemoteUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (text, expect) in [
            ("dir", None),
            ("./a@b:c", None),
            ("a@b", None),
            ("C:/x", None),
            ("https://h/a.git#main:sub", Some("https://h/a.git#main:sub")),
            ("HTTPS://h/a.git", Some("HTTPS://h/a.git")),
            ("https://me:pw@h:8443/x@y.git", Some("https://***@h:8443/x@y.git")),
            ("https://to:ken@we:ird@h/x", Some("https://***@h/x")),
            ("https://token@h?ref=a@b", Some("https://***@h?ref=a@b")),
            ("ssh://git@h/a", Some("ssh://git@h/a")),
            ("ssh://git:pw@h/a", Some("ssh://***@h/a")),
            ("git@h:a/b.git", Some("git@h:a/b.git")),
            ("file:///srv/a.git", Some("file:///srv/a.git")),
            ("oci://r.io/a:1", Some("oci://r.io/a:1")),
            ("oci://r.io/a@sha256:12", Some("oci://r.io/a@sha256:12")),
            (
                "oci://127.0.0.1:5000/a/b@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
                Some("oci://127.0.0.1:5000/a/b@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"),
            ),
            ("oci-layout://a@sha256:12", Some("oci-layout://a@sha256:12")),
            ("github.com/a/b", Some("github.com/a/b")),
            ("https://me:TOK/x@h/ok.tar", Some("https://***@h/ok.tar")),
            ("https://me:a#TOK@h/x.git", Some("https://***@h/x.git")),
            ("https://me:a?TOK@h/x.git", Some("https://***")),
            ("oci://me:TOK@h:1/x/y:1", Some("oci://***@h:1/x/y:1")),
            ("https://h/x.tar?X-Amz-Signature=TOK&ref=a", Some("https://h/x.tar?X-Amz-Signature=***&ref=a")),
            ("github.com/o/r?token=TOK", Some("github.com/o/r?token=***")),
        ] {
            assert_eq!(RemoteUrl::parse(text).map(|url| url.to_string()).as_deref(), expect, "{text}");
        }
        for text in ["ftp://me:TOK@h/x.tar", "git+https://me:TOK@h/x", "me:TOK@github.com/o/r.git", "docker-image://me:TOK@h/x"] {
            assert!(!masked(text).contains("TOK"), "{}", masked(text));
        }
        for text in ["dir/a@b", "../x:y", "C:/x", "a@b:c"] {
            assert_eq!(masked(text), text);
        }
        assert!(!format!("{:?}", RemoteUrl::parse("https://me:pw@h/").unwrap()).contains("pw"));
    }
}
