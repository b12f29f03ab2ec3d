//! Git repositories in `ADD` and as contexts: which words name one, and what their fragment and query say.
//! Source: Dockerfile reference, "Adding files from a Git repository" and "URL queries".

use super::checks::parse_bool;
use super::history::quote;
use crate::plan::Login;

/// A repository and what to take of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GitSource {
    /// Without fragment, query and credentials.
    pub url: String,
    /// Branch, tag, commit or any ref; the default branch if absent.
    pub reference: Option<String>,
    /// Folder inside the repository.
    pub subdir: Option<String>,
    /// Commit that must be found, full or prefix.
    pub checksum: Option<String>,
    /// Keep `.git`, if it says.
    pub keep_git_dir: Option<bool>,
    /// Fetch submodules, if it says.
    pub submodules: Option<bool>,
}

/// `None`: not a repository (a path or an ordinary URL). `Err`: a repository with options that make no sense.
pub(super) fn parse(source: &str) -> Option<Result<GitSource, String>> {
    read(source, false)
}

/// The same for a context: that may also be a repository on this machine (`file://`).
pub fn parse_context(source: &str) -> Option<Result<GitSource, String>> {
    read(source, true)
}

fn read(source: &str, local: bool) -> Option<Result<GitSource, String>> {
    let (before_fragment, fragment) = cut(source, '#');
    let (address, query) = cut(before_fragment, '?');
    let with_credentials = match address.split_once("://") {
        Some((scheme, rest)) if !scheme.is_empty() && scheme.bytes().all(|c| c.is_ascii_alphanumeric()) => {
            let scheme = scheme.to_ascii_lowercase();
            let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
            match scheme.as_str() {
                // Lower case only, as BuildKit has it.
                "http" | "https" if path.strip_suffix(".git").is_none() => return None,
                "http" | "https" => authority.contains('@'),
                "ssh" | "git" => authority.split_once('@').is_some_and(|(user, _)| user.contains(':')),
                "file" if local => false,
                _ => return None,
            }
        }
        _ if is_scp(address) => false,
        _ => return None,
    };
    if with_credentials {
        return Some(Err("the URL holds a user or password: give credentials as the secret GIT_AUTH_TOKEN or through an ssh agent".into()));
    }
    let mut git = GitSource { url: address.to_owned(), ..GitSource::default() };
    if let Some(fragment) = fragment {
        let (reference, subdir) = cut(fragment, ':');
        git.reference = Some(reference.to_owned()).filter(|r| !r.is_empty());
        git.subdir = subdir.map(str::to_owned).filter(|s| !s.is_empty());
    }
    Some(match query {
        Some(query) if !query.is_empty() => apply_query(&mut git, query).map(|()| git),
        _ => Ok(git),
    })
}

fn cut(text: &str, at: char) -> (&str, Option<&str>) {
    text.split_once(at).map_or((text, None), |(left, right)| (left, Some(right)))
}

/// `user@host:path`.
fn is_scp(address: &str) -> bool {
    let Some((user, rest)) = address.split_once('@') else { return false };
    let Some((host, _)) = rest.split_once(':') else { return false };
    let word = |text: &str, extra: char| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == extra);
    word(user, '_') && word(host, '.')
}

fn apply_query(git: &mut GitSource, query: &str) -> Result<(), String> {
    let mut seen = std::collections::BTreeSet::new();
    let (mut tag, mut branch) = (None, None);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = cut(pair, '=');
        let key = percent_decode(key, true);
        let value = percent_decode(value.unwrap_or_default(), true);
        if !seen.insert(key.clone()) {
            return Err(format!("query {} has multiple values", quote(&key)));
        }
        let flag = |value: &str| match value {
            "" => Ok(Some(true)),
            value => parse_bool(value).map(Some).ok_or_else(|| format!("invalid {key} value: {}", quote(value))),
        };
        match key.as_str() {
            "keep-git-dir" => git.keep_git_dir = flag(&value)?,
            "submodules" => git.submodules = flag(&value)?,
            "ref" | "tag" | "branch" | "subdir" | "checksum" | "commit" if value.is_empty() => {
                return Err(format!("query {} has no value", quote(&key)));
            }
            "ref" => set_once(&mut git.reference, "ref", value)?,
            "subdir" => set_once(&mut git.subdir, "subdir", value)?,
            "checksum" | "commit" => {
                check_commit(&value).map_err(|why| format!("{key} {why}"))?;
                git.checksum = Some(value);
            }
            "tag" => tag = Some(with_prefix("refs/tags/", value)),
            "branch" => branch = Some(with_prefix("refs/heads/", value)),
            _ => return Err(format!("unexpected query {}", quote(&key))),
        }
    }
    if tag.is_some() && branch.is_some() {
        return Err("branch conflicts with tag".into());
    }
    if let Some(reference) = tag.or(branch) {
        set_once(&mut git.reference, "ref", reference)?;
    }
    if git.reference.is_none() {
        git.reference.clone_from(&git.checksum);
    }
    Ok(())
}

/// As git has it, fewer digits name no commit.
const SHORTEST_COMMIT: usize = 4;

/// Can it be a commit, or the beginning of one?
pub(super) fn check_commit(text: &str) -> Result<(), String> {
    if (SHORTEST_COMMIT..=64).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Ok(());
    }
    Err(format!("{} is no commit: that has {SHORTEST_COMMIT} to 64 hexadecimal digits", quote(text)))
}

fn with_prefix(prefix: &str, value: String) -> String {
    if value.starts_with(prefix) { value } else { format!("{prefix}{value}") }
}

fn set_once(slot: &mut Option<String>, what: &str, value: String) -> Result<(), String> {
    match slot {
        Some(old) if *old != value => Err(format!("{what} conflicts: {} vs {}", quote(old), quote(&value))),
        _ => {
            *slot = Some(value);
            Ok(())
        }
    }
}

/// Resolves `%xx`, and `+` in queries. What is no escape stays; bytes that are no UTF-8 are replaced.
pub(super) fn percent_decode(text: &str, plus: bool) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let escape = match (first, tail) {
            (b'%', [high, low, ..]) => char::from(*high).to_digit(16).zip(char::from(*low).to_digit(16)),
            _ => None,
        };
        if let Some((high, low)) = escape {
            bytes.push((high * 16 + low) as u8);
            rest = &tail[2..];
        } else {
            bytes.push(if plus && *first == b'+' { b' ' } else { *first });
            rest = tail;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The user and the password of an ordinary URL, and the URL without them.
pub(super) fn split_login(url: &str) -> (Option<Login>, String) {
    let plain = || (None, url.to_owned());
    let Some((scheme, rest)) = url.split_once("://") else { return plain() };
    let (authority, tail) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    let Some((login, host)) = authority.rsplit_once('@') else { return plain() };
    let (user, password) = login.split_once(':').unwrap_or((login, ""));
    let login = Login { user: percent_decode(user, false), password: percent_decode(password, false) };
    (Some(login).filter(|login| !login.user.is_empty() || !login.password.is_empty()), format!("{scheme}://{host}{tail}"))
}

/// Name of the file that an ordinary URL becomes.
pub(super) fn file_name(url: &str) -> String {
    let after_scheme = url.split_once("://").map_or(url, |(_, rest)| rest);
    let (before_fragment, _) = cut(after_scheme, '#');
    let (address, _) = cut(before_fragment, '?');
    let path = address.split_once('/').map_or("", |(_, path)| path);
    let path = percent_decode(path, false);
    match super::paths::base_name(&path) {
        "" | "." | ".." => "__unnamed__".into(),
        name => name.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories() {
        let show = |source: &str| match parse(source) {
            None => "-".to_owned(),
            Some(Err(error)) => format!("error: {error}"),
            Some(Ok(g)) => format!(
                "{} {} {} {} {:?} {:?}",
                g.url,
                g.reference.unwrap_or_default(),
                g.subdir.unwrap_or_default(),
                g.checksum.unwrap_or_default(),
                g.keep_git_dir,
                g.submodules
            ),
        };
        for (source, expect) in [
            ("./foo", "-"),
            ("foo.git", "-"),
            ("github.com/a/b", "-"),
            ("https://a.example/x.tar.gz", "-"),
            ("https://a.example/b.git/x", "-"),
            ("ftp://a.example/b.git", "-"),
            ("a b@c:d", "-"),
            ("https://a.example/b.git", "https://a.example/b.git    None None"),
            ("HTTPS://a.example/b.git#v1", "HTTPS://a.example/b.git v1   None None"),
            ("https://a.example/b.git#v1:sub/dir", "https://a.example/b.git v1 sub/dir  None None"),
            ("https://a.example/b.git#:sub", "https://a.example/b.git  sub  None None"),
            ("git@a.example:b/c.git#main", "git@a.example:b/c.git main   None None"),
            ("ssh://git@a.example/b", "ssh://git@a.example/b    None None"),
            ("git://a.example/b", "git://a.example/b    None None"),
            ("https://a.example/b.git?tag=v1&subdir=x", "https://a.example/b.git refs/tags/v1 x  None None"),
            (
                "https://a.example/b.git?branch=main&keep-git-dir=1&submodules=false",
                "https://a.example/b.git refs/heads/main   Some(true) Some(false)",
            ),
            ("https://a.example/b.git?keep-git-dir", "https://a.example/b.git    Some(true) None"),
            ("https://a.example/b.git?commit=abcd", "https://a.example/b.git abcd  abcd None None"),
            ("https://a.example/b.git?commit=a", "error: commit \"a\" is no commit: that has 4 to 64 hexadecimal digits"),
            ("https://a.example/b.git?checksum=v1.0", "error: checksum \"v1.0\" is no commit: that has 4 to 64 hexadecimal digits"),
            ("https://a.example/b.git?ref=a%2Fb", "https://a.example/b.git a/b   None None"),
            ("https://a.example/b.git?ref=a#b", "error: ref conflicts: \"b\" vs \"a\""),
            ("https://a.example/b.git?tag=a&branch=b", "error: branch conflicts with tag"),
            ("https://a.example/b.git?tag=a&tag=b", "error: query \"tag\" has multiple values"),
            ("https://a.example/b.git?ref=", "error: query \"ref\" has no value"),
            ("https://a.example/b.git?x=1", "error: unexpected query \"x\""),
            ("https://a.example/b.git?submodules=x", "error: invalid submodules value: \"x\""),
            (
                "https://me:pw@a.example/b.git",
                "error: the URL holds a user or password: give credentials as the secret GIT_AUTH_TOKEN or through an ssh agent",
            ),
        ] {
            assert_eq!(show(source), expect, "{source}");
        }
    }

    #[test]
    fn logins() {
        for (url, expect, rest) in [
            ("http://h/f", None, "http://h/f"),
            ("http://me:p%40w@h:1/f?a=b@c", Some(("me", "p@w")), "http://h:1/f?a=b@c"),
            ("https://token@h", Some(("token", "")), "https://h"),
            ("https://a:b:c@d@h/", Some(("a", "b:c@d")), "https://h/"),
            ("https://:@h/", None, "https://h/"),
        ] {
            let login = expect.map(|(user, password)| Login { user: user.into(), password: password.into() });
            assert_eq!(split_login(url), (login, rest.to_owned()), "{url}");
        }
    }

    #[test]
    fn file_names() {
        for (url, expect) in [
            ("https://a.example/x/y.tar.gz?z#w", "y.tar.gz"),
            ("https://a.example", "__unnamed__"),
            ("https://a.example/", "__unnamed__"),
            ("https://a.example/..", "__unnamed__"),
            ("https://a.example/a%20b", "a b"),
            ("https://a.example/a%2fb", "b"),
            ("https://a.example/%zz", "%zz"),
            ("https://a.example/dir/", "dir"),
        ] {
            assert_eq!(file_name(url), expect, "{url}");
        }
    }
}
