//! Passwords in the addresses of a text: what people are shown of it has none.

use std::borrow::Cow;

/// What ends an address in a text. A password has none of these, unless it is written with `%`.
const ENDS: [char; 8] = ['"', '\'', '<', '>', '`', '|', '\\', '\u{7f}'];

/// The text with `***` for user and password of each address in it. A user alone is shown where it is no secret: with ssh and git.
pub fn without_passwords(text: &str) -> Cow<'_, str> {
    let (mut out, mut shown) = (String::new(), 0);
    for (at, _) in text.match_indices("://") {
        let scheme_at = text[..at].rfind(|c: char| !c.is_ascii_alphanumeric() && !"+-.".contains(c)).map_or(0, |before| {
            // One past a character of any width.
            before + text[before..].chars().next().map_or(1, char::len_utf8)
        });
        let (scheme, begin) = (&text[scheme_at..at], at + "://".len());
        if scheme.is_empty() || begin < shown {
            continue;
        }
        let word = &text[begin..];
        let word = &word[..word.find(|c: char| c.is_whitespace() || c.is_control() || ENDS.contains(&c)).unwrap_or(word.len())];
        let Some(end) = login_end(scheme, word) else { continue };
        out.push_str(&text[shown..begin]);
        out.push_str("***");
        shown = begin + end;
    }
    if shown == 0 {
        return Cow::Borrowed(text);
    }
    out.push_str(&text[shown..]);
    Cow::Owned(out)
}

/// Where the `@` behind a user and a password stands in what follows `SCHEME://`.
fn login_end(scheme: &str, word: &str) -> Option<usize> {
    let authority = &word[..word.find(['/', '?', '#']).unwrap_or(word.len())];
    if let Some(at) = authority.rfind('@') {
        let is_public = !authority[..at].contains(':') && !scheme.to_ascii_lowercase().starts_with("http");
        return (at > 0 && !is_public).then_some(at);
    }
    // A password with a `/`, `?` or `#` in it ends the host too early, and leaves a port that is none.
    let (_, port) = authority.split_once(':')?;
    let is_port = port.starts_with(['$', '{']) || port.bytes().all(|b| b.is_ascii_digit());
    if is_port { None } else { word.rfind('@') }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_in_a_text() {
        for (text, expect) in [
            ("ADD http://me:TOKEN@h:8080/f.tar /x", "ADD http://***@h:8080/f.tar /x"),
            (
                "ADD [\"https://TOKEN@h/f\", \"https://me:T2@h/g?x=a@b\", \"/\"]",
                "ADD [\"https://***@h/f\", \"https://***@h/g?x=a@b\", \"/\"]",
            ),
            ("curl -u x:y 'HTTPS://me:p@ss@h/'", "curl -u x:y 'HTTPS://***@h/'"),
            ("http://me:T/OK@h/f", "http://***@h/f"),
            ("ssh://git@h/a git://u@h/a", "ssh://git@h/a git://u@h/a"),
            ("ssh://git:pw@h/a postgres://u:p@db/x", "ssh://***@h/a postgres://***@db/x"),
            ("http://h/x@y http://h:80/x@y http://h:$PORT/x@y", "http://h/x@y http://h:80/x@y http://h:$PORT/x@y"),
            ("https://***@h/f :// ä://a:b@c", "https://***@h/f :// ä://a:b@c"),
            ("öhttp://a:b@c", "öhttp://***@c"),
            ("http://a:b@http://c:d@e", "http://***@http://***@e"),
            ("http://@h http://", "http://@h http://"),
            ("nothing", "nothing"),
        ] {
            assert_eq!(without_passwords(text), expect, "{text}");
            assert_eq!(without_passwords(expect), expect, "twice: {text}");
        }
    }
}
