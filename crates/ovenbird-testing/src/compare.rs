//! Compares what a case expects with the image that was built; every difference becomes one readable line.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::archive::{Kind, Node, Tree};

/// Differences between the lines of a `tree` block and an image. `base` is the flattened base image, for `exact`.
pub fn tree(expected: &str, found: &Tree, base: &Tree) -> Vec<String> {
    let mut differences = Vec::new();
    let mut listed = BTreeSet::new();
    let mut exact = false;
    for line in expected.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if line == "exact" {
            exact = true;
        } else if let Some(absent) = line.strip_prefix('!') {
            listed.insert(absent.to_owned());
            if let Some(node) = found.get(absent) {
                differences.push(format!("- absent  {absent}\n+ found   {}", show(absent, node)));
            }
        } else {
            match entry(line, found) {
                Ok(path) => {
                    listed.insert(path);
                }
                Err((path, difference)) => {
                    listed.insert(path);
                    differences.push(difference);
                }
            }
        }
    }
    if exact {
        let changed = found.iter().filter(|(path, node)| base.get(*path).is_none_or(|old| !same(old, node)));
        for (path, node) in changed.filter(|(path, _)| !listed.contains(*path)) {
            differences.push(format!("+ found   {} (not expected)", show(path, node)));
        }
        for path in base.keys().filter(|path| !found.contains_key(*path) && !listed.contains(*path)) {
            differences.push(format!("- missing {path} (removed from the base)"));
        }
    }
    differences
}

fn same(old: &Node, new: &Node) -> bool {
    let kind = match (&old.kind, &new.kind) {
        (Kind::File { content: a, .. }, Kind::File { content: b, .. }) => a == b,
        (a, b) => a == b,
    };
    kind && (old.mode, old.uid, old.gid, &old.xattrs) == (new.mode, new.uid, new.gid, &new.xattrs)
}

/// One line. Fields after the path, each may be `*`: kind, then in any order mode, `uid:gid`, `"content"`, `-> target`, `size=N`,
/// `mtime=N`, `=/hard/link`, `xattr=NAME`, `dev=MAJOR:MINOR`.
fn entry(line: &str, found: &Tree) -> Result<String, (String, String)> {
    let (path, rest) = word(line);
    let fail = |why: String| (path.clone(), format!("- expected {line}\n+ {why}"));
    let Some(node) = found.get(&path) else {
        let near = path.rsplit_once('/').map_or("", |(parent, _)| parent);
        let siblings: Vec<&str> = found
            .keys()
            .filter(|other| other.rsplit_once('/').is_some_and(|(parent, _)| parent == near))
            .map(String::as_str)
            .take(20)
            .collect();
        return Err(fail(format!("not there; beside it: {}", siblings.join(" "))));
    };
    let differs = || Err(fail(format!("found    {}", show(&path, node))));
    let (kind, mut rest) = word(rest);
    if kind != "*" && kind != letter(node) {
        return differs();
    }
    while !rest.is_empty() {
        if rest.starts_with('"') {
            let (content, after) = word(rest);
            rest = after;
            match &node.kind {
                Kind::File { content: bytes, .. } if **bytes == *content.as_bytes() => {}
                _ => return differs(),
            }
            continue;
        }
        if let Some(target) = rest.strip_prefix("-> ") {
            if node.kind != Kind::Link(target.to_owned()) {
                return differs();
            }
            break;
        }
        let (field, after) = word(rest);
        rest = after;
        let size = if let Kind::File { content, .. } = &node.kind { content.len() } else { 0 };
        let matches = if field == "*" {
            true
        } else if let Some(value) = field.strip_prefix("size=") {
            value == size.to_string()
        } else if let Some(value) = field.strip_prefix("mtime=") {
            value == node.mtime.to_string()
        } else if let Some(name) = field.strip_prefix("xattr=") {
            node.xattrs.contains_key(name)
        } else if let Some(value) = field.strip_prefix("dev=") {
            matches!(node.kind, Kind::Device(_, major, minor) if value == format!("{major}:{minor}"))
        } else if let Some(other) = field.strip_prefix('=') {
            match (&node.kind, found.get(other).map(|node| &node.kind)) {
                (Kind::File { inode: a, .. }, Some(Kind::File { inode: b, .. })) => a == b,
                _ => false,
            }
        } else if field.contains(':') {
            field == format!("{}:{}", node.uid, node.gid)
        } else if let Ok(mode) = u32::from_str_radix(&field, 8) {
            mode == node.mode
        } else {
            return Err(fail(format!("the field {field:?} is unknown")));
        };
        if !matches {
            return differs();
        }
    }
    Ok(path)
}

/// First word and the rest; a word in double quotes is a JSON string.
fn word(text: &str) -> (String, &str) {
    let text = text.trim_start();
    if text.starts_with('"') {
        let mut values = serde_json::Deserializer::from_str(text).into_iter::<String>();
        if let Some(Ok(value)) = values.next() {
            let end = values.byte_offset();
            return (value, text[end..].trim_start());
        }
    }
    let (word, rest) = text.split_once(' ').unwrap_or((text, ""));
    (word.to_owned(), rest.trim_start())
}

fn letter(node: &Node) -> String {
    match &node.kind {
        Kind::File { .. } => "f".into(),
        Kind::Dir => "d".into(),
        Kind::Link(_) => "l".into(),
        Kind::Device(kind, ..) => kind.to_string(),
        Kind::Fifo => "p".into(),
    }
}

/// A node as a case would write it.
pub fn show(path: &str, node: &Node) -> String {
    let detail = match &node.kind {
        Kind::File { content, .. } if content.len() <= 200 => format!(" {}", Value::from(String::from_utf8_lossy(content))),
        Kind::File { content, .. } => format!(" size={}", content.len()),
        Kind::Link(target) => format!(" -> {target}"),
        Kind::Device(_, major, minor) => format!(" dev={major}:{minor}"),
        Kind::Dir | Kind::Fifo => String::new(),
    };
    let xattrs: String = node.xattrs.keys().flat_map(|name| [" xattr=", name]).collect();
    format!("{path} {} {:04o} {}:{} mtime={}{xattrs}{detail}", letter(node), node.mode, node.uid, node.gid, node.mtime)
}

/// Differences between an expected subset of a JSON document and the document: `null` means absent, arrays are compared whole.
pub fn subset(expected: &Value, found: &Value, path: &str) -> Vec<String> {
    match (expected, found) {
        (Value::Object(expected), Value::Object(found)) => expected
            .iter()
            .flat_map(|(key, value)| subset(value, found.get(key).unwrap_or(&Value::Null), &format!("{path}.{key}")))
            .collect(),
        // Absent and empty are one to every reader of a config.
        (Value::Null, found) if is_empty(found) => vec![],
        (expected, found) if expected == found => vec![],
        (expected, found) => vec![format!("- {path} = {expected}\n+ {path} = {found}")],
    }
}

pub(crate) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(all) => all.is_empty(),
        Value::Object(all) => all.is_empty(),
        Value::String(text) => text.is_empty(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn sample() -> Tree {
        let node = |kind, mode| Node { kind, mode, uid: 1, gid: 2, mtime: 7, xattrs: BTreeMap::new() };
        let file = |inode, text: &str| Kind::File { inode, content: text.as_bytes().into() };
        Tree::from([
            ("/d".into(), node(Kind::Dir, 0o755)),
            ("/d/a b".into(), node(file(1, "x\n"), 0o644)),
            ("/h".into(), node(file(1, "x\n"), 0o644)),
            ("/l".into(), node(Kind::Link("../t u".into()), 0o777)),
            ("/n".into(), node(Kind::Device('c', 1, 3), 0o666)),
        ])
    }

    #[test]
    fn tree_lines() {
        for (line, agrees) in [
            ("/d d 0755 1:2", true),
            ("/d d 0700", false),
            ("/d f", false),
            ("\"/d/a b\" f 0644 1:2 \"x\\n\"", true),
            ("\"/d/a b\" f * * \"x\"", false),
            ("/h f =\"", false),
            ("/h f size=2 mtime=7 1:2", true),
            ("/h f 1:1", false),
            ("/l l -> ../t u", true),
            ("/l l -> t", false),
            ("/n c 0666 dev=1:3", true),
            ("!/x", true),
            ("!/d", false),
            ("/x *", false),
        ] {
            assert_eq!(tree(line, &sample(), &Tree::new()).is_empty(), agrees, "{line}");
        }
        assert!(tree("/h f =/h", &sample(), &Tree::new()).is_empty());
        assert_eq!(tree("exact\n/d d\n/h f", &sample(), &Tree::new()).len(), 3);
        assert_eq!(tree("exact", &Tree::new(), &sample()).len(), 5);
        assert!(tree("exact", &sample(), &sample()).is_empty());
    }

    #[test]
    fn json_subsets() {
        let found = serde_json::json!({"a": {"b": [1, 2], "c": ""}});
        for (expected, count) in
            [(r#"{"a":{"b":[1,2]}}"#, 0), (r#"{"a":{"b":[1]}}"#, 1), (r#"{"a":{"c":null,"d":null}}"#, 0), (r#"{"a":{"b":null},"e":1}"#, 2)]
        {
            let expected: Value = serde_json::from_str(expected).unwrap_or_default();
            assert_eq!(subset(&expected, &found, "").len(), count, "{expected}");
        }
    }
}
