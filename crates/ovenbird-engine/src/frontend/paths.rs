//! Paths inside an image: always `/`-separated, cleaned without looking at any file.

/// Cleaned absolute path of `path` seen from `dir`. `..` never leaves the root.
pub(super) fn absolute(dir: &str, path: &str) -> String {
    let joined = if path.starts_with('/') { path.to_owned() } else { format!("/{dir}/{path}") };
    let mut parts: Vec<&str> = Vec::new();
    for part in joined.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

/// Destination of a copy: [`absolute`], with a slash at the end when a folder was meant.
pub(super) fn destination(dir: &str, path: &str) -> String {
    let cleaned = absolute(dir, path);
    let folder = path.is_empty() || path.ends_with('/') || path == "." || path.ends_with("/.");
    if folder && cleaned != "/" { cleaned + "/" } else { cleaned }
}

/// Source of a copy, relative to the root it comes from; the root itself is `.`.
pub(super) fn source(path: &str) -> String {
    match absolute("/", path).strip_prefix('/') {
        Some("") | None => ".".into(),
        Some(relative) => relative.into(),
    }
}

/// Last part of a path, empty for the root.
pub(super) fn base_name(path: &str) -> &str {
    path.trim_end_matches('/').rsplit('/').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cleaning() {
        for (dir, path, expect) in [
            ("/", "a", "/a"),
            ("/w", "a/../b", "/w/b"),
            ("/w", "/a//b/", "/a/b"),
            ("/w", "../../..", "/"),
            ("/w", "", "/w"),
            ("w", "x", "/w/x"),
        ] {
            assert_eq!(absolute(dir, path), expect, "{dir} {path}");
        }
        for (path, expect) in [
            ("a", "/w/a"),
            ("a/", "/w/a/"),
            (".", "/w/"),
            ("", "/w/"),
            ("./", "/w/"),
            ("/", "/"),
            ("/a/.", "/a/"),
            ("/.", "/"),
            ("../..", "/"),
        ] {
            assert_eq!(destination("/w", path), expect, "{path}");
        }
        for (path, expect) in
            [("a", "a"), ("/a/", "a"), (".", "."), ("/", "."), ("../../etc/passwd", "etc/passwd"), ("a/*.go", "a/*.go"), ("a/.", "a")]
        {
            assert_eq!(source(path), expect, "{path}");
        }
    }
}
