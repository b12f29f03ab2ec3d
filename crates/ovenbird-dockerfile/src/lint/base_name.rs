//! Could a text be the name of a base image? The grammar of references, without their meaning.

/// `[domain[:port]/]path[:tag][@algorithm:hex]`, lower case but for the domain and the tag.
pub(super) fn is_valid(name: &str) -> bool {
    let (name, digest) = match name.split_once('@') {
        Some((name, digest)) => (name, Some(digest)),
        None => (name, None),
    };
    let last_slash = name.rfind('/').map_or(0, |i| i + 1);
    let (path, tag) = match name[last_slash..].find(':') {
        Some(colon) => (&name[..last_slash + colon], Some(&name[last_slash + colon + 1..])),
        None => (name, None),
    };
    let path = match path.split_once('/') {
        Some((domain, rest))
            if domain.contains(['.', ':']) || domain == "localhost" || domain.contains(|c: char| c.is_ascii_uppercase()) =>
        {
            if !domain.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b':' | b'[' | b']')) {
                return false;
            }
            rest
        }
        _ => path,
    };
    let word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    path.split('/').all(|part| {
        part.bytes().all(|b| word(b) || matches!(b, b'.' | b'_' | b'-'))
            && part.bytes().next().is_some_and(word)
            && part.bytes().next_back().is_some_and(word)
    }) && tag.is_none_or(is_tag)
        && digest.is_none_or(|d| {
            d.split_once(':')
                .is_some_and(|(algorithm, hex)| !algorithm.is_empty() && hex.len() >= 32 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
        })
}

fn is_tag(tag: &str) -> bool {
    (1..=128).contains(&tag.len())
        && !tag.starts_with(['.', '-'])
        && tag.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    #[test]
    fn names() {
        let digest = format!("a@sha256:{}", "0".repeat(64));
        for (name, expect) in [
            ("busybox", true),
            ("busybox:1.36", true),
            ("registry.example:5000/a/b_c:T-1", true),
            ("localhost/a", true),
            (digest.as_str(), true),
            ("", false),
            ("busybox:", false),
            (":latest", false),
            ("a@", false),
            ("a@sha256:zz", false),
            ("a//b", false),
            ("/a", false),
            ("a/", false),
            ("Upper", false),
            ("a b", false),
            ("-a", false),
            ("a:.x", false),
            ("bad host.example/a", false),
        ] {
            assert_eq!(super::is_valid(name), expect, "{name}");
        }
    }
}
