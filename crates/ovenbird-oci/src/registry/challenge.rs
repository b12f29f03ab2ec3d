//! `WWW-Authenticate`: a pure parser of hostile text. It never fails: what it cannot read, it leaves out.
//! Source: RFC 9110, 11.2 to 11.6.1.

use std::fmt;

/// Longest header that is looked at, in bytes; the rest is ignored.
const MAX_HEADER: usize = 16 * 1024;
/// Most challenges in one header, and most parameters in one challenge.
const MAX_ITEMS: usize = 32;

/// One way to authenticate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Challenge {
    /// Lower case: `bearer`, `basic`.
    pub scheme: String,
    /// Names in lower case, values without quotes and escapes, in order.
    pub params: Vec<(String, String)>,
}

impl Challenge {
    /// The first parameter of this (lower-case) name.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.params.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }
}

impl fmt::Display for Challenge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.scheme)?;
        for (i, (name, value)) in self.params.iter().enumerate() {
            write!(f, "{}{name}=\"", if i == 0 { " " } else { ", " })?;
            for c in value.chars() {
                if matches!(c, '"' | '\\') {
                    f.write_str("\\")?;
                }
                write!(f, "{c}")?;
            }
            f.write_str("\"")?;
        }
        Ok(())
    }
}

/// Reads the challenges of one header value.
pub fn parse(header: &str) -> Vec<Challenge> {
    let mut end = header.len().min(MAX_HEADER);
    while !header.is_char_boundary(end) {
        end -= 1;
    }
    let mut cursor = Cursor { rest: &header[..end] };
    let mut challenges: Vec<Challenge> = vec![];
    let mut after_comma = true;
    loop {
        after_comma |= cursor.skip_separators();
        if cursor.rest.is_empty() {
            return challenges;
        }
        let token = cursor.token();
        if token.is_empty() {
            // Garbage, or the padding of a token68.
            cursor.skip_char();
            continue;
        }
        cursor.skip_space();
        if cursor.rest.starts_with('=') && !challenges.is_empty() {
            cursor.skip_char();
            cursor.skip_space();
            let value = if cursor.rest.starts_with('"') {
                Some(cursor.quoted())
            } else {
                // No value at all: the padding of a token68.
                Some(cursor.token()).filter(|value| !value.is_empty()).map(str::to_owned)
            };
            if let Some(challenge) = challenges.last_mut()
                && let Some(value) = value
                && challenge.params.len() < MAX_ITEMS
            {
                challenge.params.push((token.to_ascii_lowercase(), value));
            }
        } else if after_comma {
            if challenges.len() == MAX_ITEMS {
                return challenges;
            }
            challenges.push(Challenge { scheme: token.to_ascii_lowercase(), params: vec![] });
        }
        // Otherwise a token68 that follows its scheme: no scheme that is supported has one.
        after_comma = false;
    }
}

struct Cursor<'a> {
    rest: &'a str,
}

impl<'a> Cursor<'a> {
    /// Skips blanks and commas; was there a comma?
    fn skip_separators(&mut self) -> bool {
        let after = self.rest.trim_start_matches([' ', '\t', ',']);
        let comma = self.rest[..self.rest.len() - after.len()].contains(',');
        self.rest = after;
        comma
    }

    fn skip_space(&mut self) {
        self.rest = self.rest.trim_start_matches([' ', '\t']);
    }

    fn skip_char(&mut self) {
        let mut chars = self.rest.chars();
        chars.next();
        self.rest = chars.as_str();
    }

    fn token(&mut self) -> &'a str {
        let is_token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~/:".contains(c);
        let end = self.rest.find(|c| !is_token(c)).unwrap_or(self.rest.len());
        let (token, rest) = self.rest.split_at(end);
        self.rest = rest;
        token
    }

    /// A quoted string; one that is not closed ends with the header.
    fn quoted(&mut self) -> String {
        let mut value = String::new();
        let mut chars = self.rest.chars();
        chars.next();
        while let Some(c) = chars.next() {
            match c {
                '"' => break,
                '\\' => value.extend(chars.next()),
                c => value.push(c),
            }
        }
        self.rest = chars.as_str();
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers() {
        let rows: &[(&str, &str)] = &[
            ("", ""),
            (" , ,, ", ""),
            ("Basic", "basic"),
            (r#"Basic realm="x""#, r#"basic realm="x""#),
            ("BASIC Realm=x", r#"basic realm="x""#),
            (
                r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#,
                r#"bearer realm="https://auth.docker.io/token", service="registry.docker.io", scope="repository:a/b:pull,push""#,
            ),
            (r#"Basic realm="a", Bearer realm="b",service="c""#, r#"basic realm="a" | bearer realm="b", service="c""#),
            (r#"Bearer realm="b",service="c" , Basic realm="a""#, r#"bearer realm="b", service="c" | basic realm="a""#),
            ("Basic, Bearer realm=r", r#"basic | bearer realm="r""#),
            ("Negotiate, NTLM, Basic realm=r", r#"negotiate | ntlm | basic realm="r""#),
            ("Negotiate YWJjZA==, Basic realm=r", r#"negotiate | basic realm="r""#),
            ("Negotiate YWJjZA, Basic realm=r", r#"negotiate | basic realm="r""#),
            (r#"Bearer realm="a \"quoted\" \\ b""#, r#"bearer realm="a \"quoted\" \\ b""#),
            (r#"Bearer realm = "a" , service = "s""#, r#"bearer realm="a", service="s""#),
            (r#"Bearer realm="never closed, service=x"#, r#"bearer realm="never closed, service=x""#),
            (r#"Bearer realm="ends in escape\"#, r#"bearer realm="ends in escape""#),
            ("Bearer realm=https://h/token,service=s", r#"bearer realm="https://h/token", service="s""#),
            (r#"Bearer realm="a" service="no comma""#, r#"bearer realm="a", service="no comma""#),
            ("=====", ""),
            ("\u{1F426} Basic realm=x", r#"basic realm="x""#),
            (r#"Bearer error="insufficient_scope", realm="x""#, r#"bearer error="insufficient_scope", realm="x""#),
        ];
        for (header, expected) in rows {
            let parsed = parse(header);
            let text: Vec<_> = parsed.iter().map(ToString::to_string).collect();
            assert_eq!(&text.join(" | "), expected, "{header}");
            assert_eq!(parse(&text.join(", ")), parsed, "not stable: {header}");
        }
    }

    #[test]
    fn bounded() {
        assert_eq!(parse(&"a,".repeat(100_000)).len(), MAX_ITEMS);
        assert_eq!(parse(&format!("a {}", "b=c,".repeat(2000)))[0].params.len(), MAX_ITEMS);
        // A cut inside a character is no panic.
        assert!(parse(&"\u{1F426}".repeat(10_000)).is_empty());
    }

    proptest::proptest! {
        #[test]
        fn never_panics_and_is_stable(header in "[ -~\\t]{0,200}") {
            let parsed = parse(&header);
            let text: Vec<_> = parsed.iter().map(ToString::to_string).collect();
            proptest::prop_assert_eq!(parse(&text.join(", ")), parsed);
        }
    }
}
