use proptest::prelude::*;

use super::*;

#[test]
fn one_pattern() {
    for (pattern, yes, no) in [
        ("a", &["a", "a/b", "a/b/c", "./a", "a/", "b/../a"][..], &["b/a", "ab", "b"][..]),
        ("/a", &["a", "a/b"], &["b/a"]),
        ("a/", &["a", "a/b"], &["ab"]),
        ("./a", &["a"], &["b"]),
        ("a/../b", &["b"], &["a", "a/b"]),
        ("a//b", &["a/b"], &["a", "ab"]),
        ("  a  ", &["a"], &["  a  "]),
        ("a b", &["a b"], &["a", "b"]),
        ("*", &["a", ".a", "a/b"], &["."]),
        ("*.go", &["x.go", ".go", "x.go/y"], &["a/x.go", "x.gox"]),
        ("*/*.go", &["a/x.go"], &["x.go", "a/b/x.go"]),
        ("a*c", &["ac", "abc", "abbc/x"], &["a/c", "ab"]),
        ("a?c", &["abc", "aéc"], &["ac", "a/c"]),
        ("?", &["a", "a/bb"], &["ab"]),
        ("[ab]c", &["ac", "bc"], &["cc", "c"]),
        ("[^ab]c", &["cc"], &["ac", "c"]),
        ("[a-c]*", &["abc", "b"], &["dbc"]),
        ("[a-c0-9]", &["b", "7"], &["x"]),
        ("[[]x", &["[x"], &["x"]),
        ("[a&&b]", &["a", "&", "b"], &["c"]),
        ("\\*", &["*"], &["a"]),
        ("\\!a", &["!a"], &["a"]),
        ("a\\[b", &["a[b"], &["ab"]),
        ("**", &["a", "a/b", "a/b/c"], &["."]),
        ("**/", &["a", "a/b"], &["."]),
        ("**/a", &["a", "b/a", "b/c/a", "b/a/c"], &["ba", "b/ca"]),
        ("**a", &["a", "b/a", "ba", "b/ca"], &["b", "ab"]),
        ("**/*.o", &["x.o", "a/x.o", "a/b/x.o", "a/x.o/y"], &["x.oo", "a/o"]),
        ("**/a/b", &["a/b", "x/a/b", "x/y/a/b"], &["a", "xa/b"]),
        ("a/**", &["a/b", "a/b/c"], &["a", "ab/c", "b/a/c"]),
        ("a/**/b", &["a/b", "a/x/b", "a/x/y/b"], &["a", "a/x", "ab"]),
        ("a/**/*.c", &["a/x.c", "a/b/x.c"], &["a/b", "x.c"]),
        ("a**/b", &["ab", "a/b", "a/x/b", "ax/b"], &["a", "b"]),
        ("**/node_modules/**", &["node_modules/x", "a/node_modules/x/y"], &["node_modules", "a/node_modules"]),
        ("a.b", &["a.b"], &["axb", "a.bc"]),
        ("a+b(c)|d{e}$", &["a+b(c)|d{e}$"], &["aab"]),
        ("한국*", &["한국어"], &["한"]),
    ] {
        let patterns = Patterns::new(&[pattern]).unwrap_or_default();
        for path in yes {
            assert!(patterns.is_ignored(path), "{pattern:?} must match {path:?}");
        }
        for path in no {
            assert!(!patterns.is_ignored(path), "{pattern:?} must not match {path:?}");
        }
    }
}

#[test]
fn last_match_wins() {
    for (file, ignored, kept) in [
        ("*\n!a", &["b", "b/c"][..], &["a", "a/b"][..]),
        ("!a\n*", &["a", "b"], &[]),
        ("*\n!a\na/b", &["a/b", "a/b/c", "c"], &["a", "a/c"]),
        ("a\n!a/b", &["a", "a/c"], &["a/b", "a/b/c"]),
        ("*.md\n!README.md", &["x.md"], &["README.md", "a"]),
        ("*.md\n!README*.md\nREADME-secret.md", &["x.md", "README-secret.md"], &["README.md", "README-a.md"]),
        ("**/*.o\n!keep/**", &["a/x.o"], &["keep/x.o"]),
        ("**\n!**/*.rs", &["a", "a/b.c"], &["x.rs", "a/b.rs"]),
        ("! a\nb", &["b"], &["a"]),
        ("*\n! a ", &["b"], &["a"]),
        ("*\n!/a", &["b"], &["a"]),
        ("*\n!./a/", &["b"], &["a"]),
        ("# comment\n\n  \na\r\nb\r\n", &["a", "b"], &["# comment"]),
        (" #x", &["#x"], &["x"]),
        ("\u{feff}a", &["a"], &["b"]),
        ("\u{feff}# comment\na", &["a"], &["# comment"]),
        ("", &[], &["a"]),
    ] {
        let patterns = Patterns::parse(file).unwrap_or_default();
        for path in ignored {
            assert!(patterns.is_ignored(path), "{file:?} must leave out {path:?}");
        }
        for path in kept {
            assert!(!patterns.is_ignored(path), "{file:?} must keep {path:?}");
        }
    }
}

#[test]
fn walks_stop_only_where_nothing_comes_back() {
    for (file, dir, expect) in [
        ("a", "a", true),
        ("a", "b", false),
        ("a\n!b", "a", true),
        ("a\n!a/b", "a", false),
        ("a\n!a/b", "a/c", true),
        ("a\n!a/b/c", "a/b", false),
        ("a\n!ab", "a", true),
        ("*\n!*/keep", "a", false),
        ("*\n!a/*/keep", "a/b", false),
        ("*\n!a/*/keep", "b", true),
        ("*\n!a/*/keep", "a/b/c", true),
        ("*\n!**/keep", "a", false),
        ("*\n!*.md", "a", true),
        ("*\n!a/**", "b", true),
        ("*\n!a/b/**", "a", false),
        ("!a/b\na", "a", false),
        ("*\n!a\na/b", "a/b", true),
        ("*\n!a\na/b", "a", false),
        ("a/\n!x", "./a/", true),
        ("a\n!a/[bc]d", "a", false),
        ("a\n!b[cd]/e", "a", true),
    ] {
        let patterns = Patterns::parse(file).unwrap_or_default();
        assert_eq!(patterns.can_prune(dir), expect, "{file:?} {dir}");
    }
}

#[test]
fn malformed_patterns() {
    for pattern in ["[", "a[", "[]", "[^]", "[]a]", "[-]", "[a-]", "[-a]", "[a-b-c]", "[a", "[a\\", "a\\", "!", " ! ", "![", "**/["] {
        assert!(Patterns::new(&["ok", pattern]).is_err(), "{pattern:?}");
    }
    let error = Patterns::parse("a\nb[").map(|_| ()).unwrap_err();
    assert_eq!(error.to_string(), "pattern \"b[\" is malformed: the closing `]` is missing");
    assert!(Patterns::new::<&str>(&[]).is_ok_and(|p| p.is_empty()));
    assert!(Patterns::new(&["", "  "]).is_ok_and(|p| p.is_empty()));
    assert!(Patterns::new(&["a"]).is_ok_and(|p| !p.is_empty()));
}

#[test]
fn match_of_go() {
    for (pattern, name, expect) in [
        ("a", "a", Some(true)),
        ("a", "b", Some(false)),
        ("", "", Some(true)),
        ("*", "", Some(true)),
        ("*", "abc", Some(true)),
        ("*", "a/b", Some(false)),
        ("a*", "ab/c", Some(false)),
        ("a*/c", "ab/c", Some(true)),
        ("*b*", "abc", Some(true)),
        ("a*b*c", "aXbYbZc", Some(true)),
        ("a*b*c", "aXbYbZ", Some(false)),
        ("**", "a/b", Some(false)),
        ("**", "ab", Some(true)),
        ("?", "é", Some(true)),
        ("?", "/", Some(false)),
        ("[a-z]", "m", Some(true)),
        ("[^a-z]", "m", Some(false)),
        ("[^a]", "/", Some(true)),
        ("[\\]]", "]", Some(true)),
        ("[a\\-z]", "-", Some(true)),
        ("[z-a]", "m", Some(false)),
        ("\\a", "a", Some(true)),
        ("x[", "a", None),
        ("a\\", "a", None),
        ("[a", "a", None),
    ] {
        assert_eq!(go_match(pattern, name).ok(), expect, "{pattern} {name}");
    }
}

#[test]
fn hostile_patterns_are_bounded() {
    let pattern = format!("{}b", "**/*a".repeat(60));
    let path = "a/".repeat(200);
    assert!(Patterns::new(&[pattern]).is_ok_and(|p| !p.is_ignored(&path)));
}

#[test]
fn paths_are_cleaned_as_in_go() {
    for (path, expect) in [
        ("", "."),
        (".", "."),
        ("./", "."),
        ("/", "/"),
        ("//", "/"),
        ("a/", "a"),
        ("a//b", "a/b"),
        ("a/./b", "a/b"),
        ("a/../b", "b"),
        ("..", ".."),
        ("../a", "../a"),
        ("a/../..", ".."),
        ("/..", "/"),
        ("/../a", "/a"),
        ("../../a", "../../a"),
    ] {
        assert_eq!(clean(path), expect, "{path}");
    }
}

proptest! {
    /// What a walk may skip is really left out, whatever the rules are.
    #[test]
    fn pruned_folders_hold_nothing_kept(
        file in prop::collection::vec("!?(\\*\\*/?|[ab*?]|[ab]/|/|\\[\\^?a\\])([ab*/?]|\\*\\*/?){0,4}", 1..6),
        dir in "[ab](/[ab]){0,2}",
        name in "[ab]{1,2}(/[ab]){0,2}",
    ) {
        if let Ok(patterns) = Patterns::new(&file) && patterns.can_prune(&dir) {
            prop_assert!(patterns.is_ignored(&format!("{dir}/{name}")), "{file:?} {dir} {name}");
        }
    }

    /// Matching agrees with a plain backtracking reading of the tokens.
    #[test]
    fn automaton_agrees_with_backtracking(pattern in "[ab/]?([ab/?*]|\\*\\*/?|\\[a-b\\]){0,6}", path in "[ab/]{0,8}") {
        fn slow(pattern: &[char], path: &[char]) -> bool {
            match pattern {
                [] => path.is_empty(),
                ['*', '*', '/', rest @ ..] | ['*', '*', rest @ ..] if rest.is_empty() => { let _ = rest; true }
                ['*', '*', '/', rest @ ..] | ['*', '*', rest @ ..] => {
                    slow(rest, path) || (0..path.len()).any(|i| path[i] == '/' && slow(rest, &path[i + 1..]))
                }
                ['*', rest @ ..] => (0..=path.len()).take_while(|i| *i == 0 || path[i - 1] != '/').any(|i| slow(rest, &path[i..])),
                ['?', rest @ ..] => path.first().is_some_and(|c| *c != '/') && slow(rest, &path[1..]),
                ['[', 'a', '-', 'b', ']', rest @ ..] => path.first().is_some_and(|c| matches!(c, 'a' | 'b')) && slow(rest, &path[1..]),
                [c, rest @ ..] => path.first() == Some(c) && slow(rest, &path[1..]),
            }
        }
        let glob = Glob::compile(&pattern).map(|g| g.matches(&path));
        let expect = slow(&pattern.chars().collect::<Vec<_>>(), &path.chars().collect::<Vec<_>>());
        prop_assert_eq!(glob, Ok(expect), "{} {}", pattern, path);
    }
}

#[test]
fn sources_that_are_surely_left_out() {
    for (ignore, source, expect) in [
        ("", ".", false),
        ("a", "a", true),
        ("a", "./a/", true),
        ("a", "a/b", true),
        ("a", "b/../a", true),
        ("a", "/a", false),
        ("a/b", "a", false),
        ("*", ".", true),
        ("*.md", "x.md", true),
        ("*.md", ".", false),
        // A negated pattern may take back what is below.
        ("*\n!x", "a", false),
    ] {
        assert_eq!(Patterns::parse(ignore).unwrap().leaves_out_source(source), expect, "{ignore:?} {source}");
    }
}

#[test]
fn what_was_written_makes_the_same_patterns() {
    for text in ["", "a\n!b", "# c\n  **/x  \n!  d e \n/f/", "!!x\n!a"] {
        let patterns = Patterns::parse(text).unwrap();
        assert_eq!(Patterns::new(&patterns.written().collect::<Vec<_>>()).unwrap(), patterns, "{text:?}");
    }
}
