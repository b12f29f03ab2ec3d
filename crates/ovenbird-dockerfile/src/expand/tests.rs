use super::*;

struct Fixed;

impl Env for Fixed {
    fn get(&self, name: &str) -> Option<String> {
        let value = match name {
            "set" => "value",
            "empty" => "",
            "HOME" => "/root",
            "p" => "/usr/local/lib/libfoo.so.1.2",
            "v" => "1.22.3-rc1",
            "list" => "a,b,c,b",
            "spaced" => "  one two  ",
            "star" => "a*b?c",
            "slash" => "x/y/z",
            "brace" => "a}b}c",
            "lines" => "one\ntwo",
            "_x1" => "under",
            "größe" => "groß",
            "3" => "three",
            _ => return None,
        };
        Some(value.to_owned())
    }
}

const PLAIN: Expander = Expander { escape: '\\', keep_unset: false, raw_quotes: false };

fn outcome(result: Result<Expanded, ExpandError>) -> String {
    match result {
        Ok(expanded) => expanded.value,
        Err(ExpandError::Unterminated { .. }) => "!unterminated".to_owned(),
        Err(ExpandError::Required { name, message }) => format!("!required {name}: {message}"),
        Err(ExpandError::Modifier { modifier, .. }) => format!("!modifier {modifier}"),
        Err(ExpandError::BadSubstitution { .. }) => "!bad".to_owned(),
        Err(ExpandError::Pattern { pattern, .. }) => format!("!pattern {pattern}"),
        Err(ExpandError::TooDeep { .. }) => "!deep".to_owned(),
        Err(ExpandError::TooLong { .. }) => "!long".to_owned(),
    }
}

#[test]
fn words_without_options() {
    for (word, expect) in [
        // No substitution.
        ("", ""),
        ("plain", "plain"),
        ("a b", "a b"),
        ("$", "$"),
        ("a$", "a$"),
        ("$.", "$."),
        ("$ x", "$ x"),
        ("$/x", "$/x"),
        ("100%", "100%"),
        ("~/x", "~/x"),
        ("`date`", "`date`"),
        ("$(date)", "$(date)"),
        // Names.
        ("$set", "value"),
        ("${set}", "value"),
        ("$set.txt", "value.txt"),
        ("$set-x", "value-x"),
        ("$set/x", "value/x"),
        ("${set}x", "valuex"),
        ("$setx", ""),
        ("$set$set", "valuevalue"),
        ("$HOME/$set", "/root/value"),
        ("$_x1", "under"),
        ("$größe", "groß"),
        ("${größe}n", "großn"),
        ("$nope", ""),
        ("a${nope}b", "ab"),
        ("$empty", ""),
        ("${set}}", "value}"),
        ("{$set}", "{value}"),
        // Digits and special parameters are names too, and unset unless given.
        ("$1", ""),
        ("$3", "three"),
        ("$33", ""),
        ("${3}x", "threex"),
        ("$3x", "threex"),
        ("$0x", "x"),
        ("$@", ""),
        ("$@@", "@"),
        ("$*", ""),
        ("$#", ""),
        ("$?", ""),
        ("$-", ""),
        ("$$", ""),
        ("$$set", "set"),
        ("$!x", "x"),
        ("${@}", ""),
        ("${?:-d}", "d"),
        ("${#}", ""),
        ("${#:+d}", ""),
        // Quotes.
        ("'$set'", "$set"),
        ("\"$set\"", "value"),
        ("\"${set}\"", "value"),
        ("'a'\"b\"c", "abc"),
        ("\"it's\"", "it's"),
        ("'say \"x\"'", "say \"x\""),
        ("\"'$set'\"", "'value'"),
        ("''", ""),
        ("a''b", "ab"),
        ("'\\'", "\\"),
        ("\"\\\"\"", "\""),
        ("\"\\$set\"", "$set"),
        ("\"\\n\"", "\\n"),
        ("\"\\\\\"", "\\"),
        ("\"a b\" c", "a b c"),
        // Escapes.
        ("\\$set", "$set"),
        ("\\\\$set", "\\value"),
        ("\\\\\\$set", "\\$set"),
        ("\\n", "n"),
        ("\\'", "'"),
        ("\\\"x", "\"x"),
        ("a\\ b", "a b"),
        ("end\\", "end"),
        ("\\${set}", "${set}"),
        ("$set\\x", "valuex"),
        // Defaults.
        ("${set:-d}", "value"),
        ("${empty:-d}", "d"),
        ("${nope:-d}", "d"),
        ("${set-d}", "value"),
        ("${empty-d}", ""),
        ("${nope-d}", "d"),
        ("${nope:-}", ""),
        ("${nope-}", ""),
        ("${nope:-a b}", "a b"),
        ("${nope:-$set}", "value"),
        ("${nope:-${set}}", "value"),
        ("${nope:-${nada:-${set}}}", "value"),
        ("${nope:-'a}b'}", "a}b"),
        ("${nope:-\"$set\"}", "value"),
        ("${nope:-a\\}b}", "a}b"),
        ("${nope:-:-}", ":-"),
        ("${nope:--}", "-"),
        ("${nope:-/}", "/"),
        ("x${nope:-y}z", "xyz"),
        // Alternatives.
        ("${set:+a}", "a"),
        ("${empty:+a}", ""),
        ("${nope:+a}", ""),
        ("${set+a}", "a"),
        ("${empty+a}", "a"),
        ("${nope+a}", ""),
        ("${set:+${HOME}:}x", "/root:x"),
        ("${empty:+${HOME}:}x", "x"),
        // Required.
        ("${set:?no}", "value"),
        ("${set?no}", "value"),
        ("${empty?no}", ""),
        ("${empty:?no}", "!required empty: no"),
        ("${nope?no}", "!required nope: no"),
        ("${nope:?}", "!required nope: is not allowed to be unset"),
        ("${empty:?}", "!required empty: is not allowed to be empty"),
        ("${nope:?\"two words\"}", "!required nope: two words"),
        ("${nope?$set is missing}", "!required nope: value is missing"),
        // Prefixes.
        ("${p#*/}", "usr/local/lib/libfoo.so.1.2"),
        ("${p##*/}", "libfoo.so.1.2"),
        ("${p#/usr}", "/local/lib/libfoo.so.1.2"),
        ("${p#usr}", "/usr/local/lib/libfoo.so.1.2"),
        ("${v#?}", ".22.3-rc1"),
        ("${v##?}", ".22.3-rc1"),
        ("${v#*.}", "22.3-rc1"),
        ("${v##*.}", "3-rc1"),
        ("${v#}", "1.22.3-rc1"),
        ("${v##*}", ""),
        ("${v#*}", "1.22.3-rc1"),
        ("${nope#x}", ""),
        ("${star#a\\*}", "b?c"),
        ("${star##*\\?}", "c"),
        ("${star#a\\?}", "a*b?c"),
        ("${set#$set}", ""),
        ("${set#'val'}", "ue"),
        // Suffixes.
        ("${v%-*}", "1.22.3"),
        ("${v%.*}", "1.22"),
        ("${v%%.*}", "1"),
        ("${v%rc1}", "1.22.3-"),
        ("${v%rc2}", "1.22.3-rc1"),
        ("${v%?}", "1.22.3-rc"),
        ("${v%%*}", ""),
        ("${v%}", "1.22.3-rc1"),
        ("${p%/*}", "/usr/local/lib"),
        ("${p%%/*}", ""),
        ("${p%.so*}", "/usr/local/lib/libfoo"),
        ("${nope%x}", ""),
        ("${star%\\?c}", "a*b"),
        ("${brace%\\}c}", "a}b"),
        ("${größe%ß}", "gro"),
        ("${lines%two}", "one\n"),
        // Wildcards do not cross a line feed, as in Docker.
        ("${lines##*two}", "one\ntwo"),
        ("${v#\\x}", "!pattern \\x"),
        ("${v%%\\1}", "!pattern \\1"),
        // Replacement.
        ("${list/b/X}", "a,X,c,b"),
        ("${list//b/X}", "a,X,c,X"),
        ("${list//,/ }", "a b c b"),
        ("${list//,/}", "abcb"),
        ("${list/,*/}", "a"),
        ("${list/?,/}", "b,c,b"),
        ("${list//?,/-}", "---b"),
        ("${list/z/X}", "a,b,c,b"),
        ("${slash/\\//-}", "x-y/z"),
        ("${slash//\\//-}", "x-y-z"),
        ("${star/\\*/X}", "aXb?c"),
        ("${v//./_}", "1_22_3-rc1"),
        ("${list/b/$set}", "a,value,c,b"),
        ("${list/$nope/X}", "Xa,b,c,b"),
        ("${list//b/(${set})}", "a,(value),c,(value)"),
        ("${nope/a/b}", ""),
        ("${empty/a/b}", ""),
        ("${set/e/$$1}", "valu1"),
        ("${list/\\x/y}", "!pattern \\x"),
        // Errors.
        ("'open", "!unterminated"),
        ("\"open", "!unterminated"),
        ("\"open\\\"", "!unterminated"),
        ("a'b", "!unterminated"),
        ("${", "!unterminated"),
        ("${set", "!unterminated"),
        ("${set:", "!unterminated"),
        ("${set:-", "!unterminated"),
        ("${set:-x", "!unterminated"),
        ("${set:-${nope}", "!unterminated"),
        ("${set/a}", "!unterminated"),
        ("${set/a/b", "!unterminated"),
        ("${set:-'x}", "!unterminated"),
        ("${}", "!bad"),
        ("${:-x}", "!bad"),
        ("${{set}}", "!bad"),
        ("${set:=x}", "!modifier :="),
        ("${set=x}", "!modifier ="),
        ("${set:x}", "!modifier :x"),
        ("${set,}", "!modifier ,"),
        ("${set^^}", "!modifier ^"),
        ("${set@Q}", "!modifier @"),
        ("${ set}", "!modifier  "),
        ("${.}", "!modifier ."),
    ] {
        assert_eq!(outcome(PLAIN.word(word, &Fixed)), expect, "{word}");
    }
}

#[test]
fn unset_variables_can_stay_as_written() {
    let keep = Expander { keep_unset: true, ..PLAIN };
    for (word, expect) in [
        ("$nope", "$nope"),
        ("${nope}", "${nope}"),
        ("$set $nope", "value $nope"),
        ("${nope:-d}", "${nope:-d}"),
        ("${nope+d}", "${nope+d}"),
        ("${nope?d}", "${nope?d}"),
        ("${nope##d*}", "${nope##d*}"),
        ("${nope/a/b}", "${nope/a/b}"),
        ("${nope//a/b}", "${nope//a/b}"),
        ("\"$nope\"", "$nope"),
        ("${empty:-d}", "d"),
    ] {
        assert_eq!(outcome(keep.word(word, &Fixed)), expect, "{word}");
    }
}

#[test]
fn quotes_can_stay_as_written() {
    let raw = Expander { raw_quotes: true, ..PLAIN };
    for (word, expect) in [
        ("'$set'", "'$set'"),
        ("\"$set\"", "\"value\""),
        ("a\\ b", "a\\ b"),
        ("\\$set", "\\$set"),
        ("\"\\$set\"", "\"\\$set\""),
        ("\"a\\tb\"", "\"a\\tb\""),
        ("echo \"it's $set\"", "echo \"it's value\""),
    ] {
        assert_eq!(outcome(raw.word(word, &Fixed)), expect, "{word}");
    }
}

#[test]
fn bodies_of_heredocs_keep_quotes() {
    for (body, expect) in [
        ("it's $set\n", "it's value\n"),
        ("\"$set\"\n", "\"value\"\n"),
        ("'$set'\n", "'value'\n"),
        ("\\$set\n", "$set\n"),
        ("\\\\\n", "\\\n"),
        ("${nope:-'x'}\n", "'x'\n"),
        ("${set\n", "!modifier \n"),
    ] {
        assert_eq!(outcome(PLAIN.heredoc(body, &Fixed)), expect, "{body}");
    }
}

#[test]
fn other_escape_character() {
    let backtick = Expander { escape: '`', ..PLAIN };
    for (word, expect) in
        [("C:\\dir", "C:\\dir"), ("`$set", "$set"), ("``", "`"), ("\"`\"\"", "\""), ("\\$set", "\\value"), ("a` b", "a b")]
    {
        assert_eq!(outcome(backtick.word(word, &Fixed)), expect, "{word}");
    }
}

#[test]
fn several_words() {
    for (word, expect) in [
        ("a b", &["a", "b"][..]),
        ("a\tb\n c", &["a", "b", "c"]),
        ("  a  ", &["a"]),
        ("", &[]),
        ("   ", &[]),
        ("$nope", &[]),
        ("''", &[]),
        ("$spaced", &["one", "two"]),
        ("\"$spaced\"", &["  one two  "]),
        ("x${spaced}y", &["x", "one", "two", "y"]),
        ("'a b' c", &["a b", "c"]),
        ("a\\ b c", &["a b", "c"]),
        ("${nope:-a b}", &["a", "b"]),
        ("\"${nope:-a b}\"", &["a b"]),
        ("a\"b c\"d", &["ab cd"]),
        ("80/tcp $3", &["80/tcp", "three"]),
    ] {
        let (words, _) = PLAIN.words(word, &Fixed).unwrap_or_default();
        assert_eq!(words, expect, "{word:?}");
    }
    assert!(PLAIN.words("a 'b", &Fixed).is_err());
}

#[test]
fn variables_are_reported() {
    for (word, used, unset) in [
        ("$set ${nope}", &["set"][..], &["nope"][..]),
        ("${nope:-$set}", &["set"], &["nope"]),
        ("${set:-$nope}", &["set"], &["nope"]),
        ("'$set'", &[], &[]),
        ("\\$set", &[], &[]),
        ("${v%$set}", &["set", "v"], &[]),
        ("$empty$1", &["empty"], &["1"]),
    ] {
        let found = PLAIN.word(word, &Fixed).unwrap_or_default();
        assert_eq!(
            (found.used.iter().map(String::as_str).collect::<Vec<_>>(), found.unset.iter().map(String::as_str).collect::<Vec<_>>()),
            (used.to_vec(), unset.to_vec()),
            "{word}"
        );
    }
}

#[test]
fn hostile_words_are_bounded() {
    struct Big;
    impl Env for Big {
        fn get(&self, _: &str) -> Option<String> {
            Some("a".repeat(1 << 20))
        }
    }
    for (word, env, expect) in [
        ("${a:-".repeat(100_000), &Fixed as &dyn Env, "!deep"),
        ("$a".repeat(40), &Big, "!long"),
        (format!("\"{}\"", "$a".repeat(40)), &Big, "!long"),
        (format!("${{a//a/{}}}", "x".repeat(100)), &Big, "!long"),
        ("${a//?/$a}".to_owned(), &Big, "!long"),
    ] {
        assert_eq!(outcome(PLAIN.word(&word, env)), expect, "{}", &word[..10]);
    }
    // Many wildcards cost no more than pattern times text.
    let word = format!("${{p##{}b}}", "*l".repeat(1000));
    assert_eq!(outcome(PLAIN.word(&word, &Fixed)), "/usr/local/lib/libfoo.so.1.2");
}
