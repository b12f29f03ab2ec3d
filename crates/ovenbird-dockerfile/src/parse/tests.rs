use proptest::prelude::*;

use super::*;
use crate::ast::{Command, Directives, Healthcheck, Heredoc, Run, Source, Transfer};
use crate::diagnostic::line_column;
use crate::lint::CheckConfig;

/// The tree in one line, so that a table can hold it.
fn show(dockerfile: &Dockerfile) -> String {
    let mut lines: Vec<String> = dockerfile.global_args.iter().map(|i| kind(&i.kind)).collect();
    for stage in &dockerfile.stages {
        let extras = [("platform", &stage.platform), ("as", &stage.name), ("doc", &stage.doc)];
        let extras = extras.into_iter().filter_map(|(name, value)| value.as_ref().map(|v| format!(" {name}={v:?}")));
        lines.push(format!("FROM {}{}", stage.base, extras.collect::<String>()));
        lines.extend(stage.instructions.iter().map(|i| kind(&i.kind)));
    }
    lines.join("; ")
}

fn command(command: &Command) -> String {
    match command {
        Command::Shell(text) => format!("sh {text:?}"),
        Command::Exec(items) => format!("exec {items:?}"),
    }
}

fn heredoc(h: &Heredoc) -> String {
    let fd = if h.fd == 0 { String::new() } else { h.fd.to_string() };
    format!("{fd}<<{}{}{}{:?}", if h.strip_tabs { "-" } else { "" }, h.name, if h.expand { "$" } else { "" }, h.content)
}

fn transfer(t: &Transfer) -> String {
    let texts = [("from", &t.from), ("chown", &t.chown), ("chmod", &t.chmod), ("checksum", &t.checksum)];
    let switches =
        [("link", t.link.then_some(true)), ("parents", t.parents.then_some(true)), ("git", t.keep_git_dir), ("unpack", t.unpack)];
    let mut parts: Vec<String> = texts.into_iter().filter_map(|(name, v)| v.as_ref().map(|v| format!("{name}={v}"))).collect();
    parts.extend(switches.into_iter().filter_map(|(name, v)| v.map(|v| format!("{name}={v}"))));
    parts.extend(t.excludes.iter().map(|e| format!("exclude={e}")));
    parts.extend(t.sources.iter().map(|source| match source {
        Source::Path(path) => format!("{path:?}"),
        Source::Heredoc(h) => heredoc(h),
    }));
    format!("{} -> {:?}", parts.join(" "), t.dest)
}

fn run(run: &Run) -> String {
    let mut parts: Vec<String> = run.mounts.iter().map(|m| format!("mount={}", m.value.as_deref().unwrap_or("-"))).collect();
    parts.extend(run.network.iter().map(|n| format!("network={n}")));
    parts.extend(run.security.iter().map(|s| format!("security={s}")));
    parts.extend(run.devices.iter().map(|d| format!("device={d}")));
    parts.push(command(&run.command));
    parts.extend(run.heredocs.iter().map(heredoc));
    parts.join(" ")
}

fn kind(kind: &Kind) -> String {
    let pairs = |pairs: &[crate::ast::KeyValue]| {
        let shown: Vec<String> = pairs.iter().map(|p| format!("{}{}{}", p.key, if p.legacy { " " } else { "=" }, p.value)).collect();
        shown.join(",")
    };
    match kind {
        Kind::Arg(decls) => {
            let shown: Vec<String> =
                decls.iter().map(|d| d.default.as_ref().map_or(d.name.clone(), |v| format!("{}={v}", d.name))).collect();
            format!("ARG {}", shown.join(","))
        }
        Kind::Env(p) => format!("ENV {}", pairs(p)),
        Kind::Label(p) => format!("LABEL {}", pairs(p)),
        Kind::Copy(t) => format!("COPY {}", transfer(t)),
        Kind::Add(t) => format!("ADD {}", transfer(t)),
        Kind::Run(r) => format!("RUN {}", run(r)),
        Kind::Cmd(c) => format!("CMD {}", command(c)),
        Kind::Entrypoint(c) => format!("ENTRYPOINT {}", command(c)),
        Kind::Shell(items) => format!("SHELL {items:?}"),
        Kind::User(text) => format!("USER {text:?}"),
        Kind::Workdir(text) => format!("WORKDIR {text:?}"),
        Kind::Volume(items) => format!("VOLUME {items:?}"),
        Kind::Expose(items) => format!("EXPOSE {items:?}"),
        Kind::StopSignal(text) => format!("STOPSIGNAL {text:?}"),
        Kind::Maintainer(text) => format!("MAINTAINER {text:?}"),
        Kind::Healthcheck(Healthcheck::None) => "HEALTHCHECK none".to_owned(),
        Kind::Healthcheck(Healthcheck::Cmd { command: c, interval, timeout, start_period, start_interval, retries }) => {
            let options: Vec<&str> =
                [interval, timeout, start_period, start_interval, retries].map(|o| o.as_deref().unwrap_or("-")).to_vec();
            format!("HEALTHCHECK {} {}", options.join(" "), command(c))
        }
        Kind::Onbuild(text) => format!("ONBUILD {text:?}"),
    }
}

/// What the parser makes of one instruction below `FROM scratch`.
fn one(instruction: &str) -> String {
    let text = format!("FROM scratch\n{instruction}");
    let parsed = parse(&text);
    if let Some(error) = parsed.error() {
        let place = text.get(error.span.start..error.span.end).unwrap_or("<outside>");
        return format!("{} @ {place}", error.message);
    }
    let shown = show(&parsed.dockerfile);
    shown.strip_prefix("FROM scratch; ").unwrap_or(&shown).to_owned()
}

#[test]
fn instructions() {
    for (text, expect) in [
        ("ARG a", "ARG a"),
        ("arg a=", "ARG a="),
        ("ARG a=1 b c='x y' d=\"$a z\"", "ARG a=1,b,c='x y',d=\"$a z\""),
        ("ENV a=1", "ENV a=1"),
        ("ENV a=1 b=\"x y\" c=x\\ y", "ENV a=1,b=\"x y\",c=x\\ y"),
        ("ENV a=b=c", "ENV a=b=c"),
        ("ENV a= b=", "ENV a=,b="),
        ("ENV \"a b\"=c", "ENV \"a b\"=c"),
        ("ENV a b", "ENV a b"),
        ("ENV a   b  c=d 'e'", "ENV a b  c=d 'e'"),
        ("ENV\ta\tb", "ENV a b"),
        ("LABEL a.b/c=\"multi \\\n line\"", "LABEL a.b/c=\"multi  line\""),
        ("LABEL a b c", "LABEL a b c"),
        ("COPY a b", "COPY \"a\" -> \"b\""),
        ("COPY a b c /d/", "COPY \"a\" \"b\" \"c\" -> \"/d/\""),
        ("COPY [\"a b\", \"/c d/\"]", "COPY \"a b\" -> \"/c d/\""),
        ("COPY [a b", "COPY \"[a\" -> \"b\""),
        (
            "COPY --from=x --chown=1:2 --chmod=u+x --link --parents a b",
            "COPY from=x chown=1:2 chmod=u+x link=true parents=true \"a\" -> \"b\"",
        ),
        ("COPY --link=false --parents=TRUE a b", "COPY parents=true \"a\" -> \"b\""),
        ("COPY --exclude=*.md --exclude=x a b", "COPY exclude=*.md exclude=x \"a\" -> \"b\""),
        ("COPY --chown=$U:${G} a b", "COPY chown=$U:${G} \"a\" -> \"b\""),
        ("COPY --from= --chown= a b", "COPY \"a\" -> \"b\""),
        ("COPY -- --a b", "COPY \"--a\" -> \"b\""),
        ("ADD --checksum=sha256:x --keep-git-dir --unpack=false u d", "ADD checksum=sha256:x git=true unpack=false \"u\" -> \"d\""),
        ("ADD https://example.com/a.tar /", "ADD \"https://example.com/a.tar\" -> \"/\""),
        ("RUN make", "RUN sh \"make\""),
        ("run  make   all", "RUN sh \"make   all\""),
        ("RUN [\"a\", \"b c\"]", "RUN exec [\"a\", \"b c\"]"),
        ("RUN ['a']", "RUN sh \"['a']\""),
        ("RUN [ -f x ] && y", "RUN sh \"[ -f x ] && y\""),
        (
            "RUN --mount=type=cache,target=/c --mount=target=/d --network=none --security=insecure --device=a --device=b=c x",
            "RUN mount=type=cache,target=/c mount=target=/d network=none security=insecure device=a device=b=c sh \"x\"",
        ),
        ("RUN --mount=type=secret,id=$ID x", "RUN mount=type=secret,id=$ID sh \"x\""),
        ("RUN --mount='type=bind,\"target=/a,b\"' x", "RUN mount=type=bind,\"target=/a,b\" sh \"x\""),
        ("RUN a --mount=x", "RUN sh \"a --mount=x\""),
        ("CMD", "CMD sh \"\""),
        ("CMD []", "CMD exec []"),
        ("CMD echo hi", "CMD sh \"echo hi\""),
        ("CMD [\"echo\", \"\\u00e9\"]", "CMD exec [\"echo\", \"é\"]"),
        ("ENTRYPOINT [\"a\"]", "ENTRYPOINT exec [\"a\"]"),
        ("ENTRYPOINT", "ENTRYPOINT sh \"\""),
        ("SHELL [\"/bin/bash\", \"-c\"]", "SHELL [\"/bin/bash\", \"-c\"]"),
        ("USER a:b", "USER \"a:b\""),
        ("USER ${U:-x y}", "USER \"${U:-x y}\""),
        ("WORKDIR /a b", "WORKDIR \"/a b\""),
        ("WORKDIR $HOME/x  ", "WORKDIR \"$HOME/x\""),
        ("VOLUME /a /b", "VOLUME [\"/a\", \"/b\"]"),
        ("VOLUME [\"/a b\", \" /c \"]", "VOLUME [\"/a b\", \"/c\"]"),
        ("EXPOSE 80 443/tcp 8000-8010/udp $P", "EXPOSE [\"80\", \"443/tcp\", \"8000-8010/udp\", \"$P\"]"),
        ("STOPSIGNAL SIGINT", "STOPSIGNAL \"SIGINT\""),
        ("MAINTAINER A B <a@b>", "MAINTAINER \"A B <a@b>\""),
        ("HEALTHCHECK NONE", "HEALTHCHECK none"),
        ("HEALTHCHECK none", "HEALTHCHECK none"),
        ("HEALTHCHECK CMD a b", "HEALTHCHECK - - - - - sh \"a b\""),
        (
            "HEALTHCHECK --interval=5m --timeout=1.5s --start-period=1h2m --start-interval=0 --retries=3 CMD [\"a\"]",
            "HEALTHCHECK 5m 1.5s 1h2m 0 3 exec [\"a\"]",
        ),
        ("HEALTHCHECK --interval=$I cmd a", "HEALTHCHECK $I - - - - sh \"a\""),
        ("ONBUILD RUN make", "ONBUILD \"RUN make\""),
        ("ONBUILD copy --from=x a b", "ONBUILD \"copy --from=x a b\""),
        ("onbuild   ADD . /x", "ONBUILD \"ADD . /x\""),
        // Here-documents.
        ("RUN <<EOF\na\n  b\nEOF", "RUN sh \"<<EOF\" <<EOF$\"a\\n  b\\n\""),
        ("RUN <<EOF bash -e\na\nEOF", "RUN sh \"<<EOF bash -e\" <<EOF$\"a\\n\""),
        ("RUN <<-EOF\n\ta\n\t\tb\n\tEOF", "RUN sh \"<<-EOF\" <<-EOF$\"a\\nb\\n\""),
        ("RUN <<'EOF'\n$a\nEOF", "RUN sh \"<<'EOF'\" <<EOF\"$a\\n\""),
        ("RUN <<\"E F\"\nx\nE F", "RUN sh \"<<\\\"E F\\\"\" <<E F\"x\\n\""),
        ("RUN <<E\\OF\nx\nEOF", "RUN sh \"<<E\\\\OF\" <<EOF\"x\\n\""),
        ("RUN cat <<A <<B\n1\nA\n2\nB", "RUN sh \"cat <<A <<B\" <<A$\"1\\n\" <<B$\"2\\n\""),
        ("RUN 3<<A x\n1\nA", "RUN sh \"3<<A x\" 3<<A$\"1\\n\""),
        ("RUN <<E\n# no comment\n\n\\\nE", "RUN sh \"<<E\" <<E$\"# no comment\\n\\n\\\\\\n\""),
        ("RUN <<E\n E\nE ", "unterminated heredoc: no line holds just E @ <<E"),
        ("RUN <<E", "unterminated heredoc: no line holds just E @ <<E"),
        ("RUN <<E x \\\n y\nb\nE\nUSER u", "RUN sh \"<<E x  y\" <<E$\"b\\n\"; USER \"u\""),
        ("RUN cat <<<word", "RUN sh \"cat <<<word\""),
        ("RUN a<<b", "RUN sh \"a<<b\""),
        ("RUN echo \"<<E\"", "RUN sh \"echo \\\"<<E\\\"\""),
        ("RUN echo 1 << 2", "RUN sh \"echo 1 << 2\""),
        ("RUN echo 'open <<E", "RUN sh \"echo 'open <<E\""),
        ("RUN [\"a\", \"<<E\"]", "RUN exec [\"a\", \"<<E\"]"),
        ("CMD <<E", "CMD sh \"<<E\""),
        ("COPY <<a /b\nx\na", "COPY <<a$\"x\\n\" -> \"/b\""),
        ("COPY <<a f <<-'b' /d/\nx\na\n\ty\nb", "COPY <<a$\"x\\n\" \"f\" <<-b\"y\\n\" -> \"/d/\""),
        ("ADD --chmod=755 <<a /b\na", "ADD chmod=755 <<a$\"\" -> \"/b\""),
        ("COPY <<a <<a /b/\n1\na\n2\na", "COPY <<a$\"1\\n\" <<a$\"2\\n\" -> \"/b/\""),
        ("ONBUILD RUN <<-E\n\tx\nE\nUSER u", "ONBUILD \"RUN <<-E\\n\\tx\\nE\"; USER \"u\""),
        // Continuations.
        ("RUN a \\\n b", "RUN sh \"a  b\""),
        ("RUN a \\  \n b", "RUN sh \"a  b\""),
        ("RUN a \\\n# comment\n  # more\n b", "RUN sh \"a  b\""),
        ("RUN a \\\n\n\n b", "RUN sh \"a  b\""),
        ("RUN a \\\n # c \\\n b", "RUN sh \"a  b\""),
        ("RUN a \\\r\n b\r\nUSER c\r\n", "RUN sh \"a  b\"; USER \"c\""),
        ("RUN a \\\\\nUSER b", "RUN sh \"a \\\\\\\\\"; USER \"b\""),
        ("RUN a # no comment", "RUN sh \"a # no comment\""),
        ("RUN a \\", "RUN sh \"a\""),
        ("\\\nRUN a", "RUN sh \"a\""),
        ("R\\\nUN a", "RUN sh \"a\""),
        ("\\\n\\\n", "FROM scratch"),
        ("  \t RUN a", "RUN sh \"a\""),
    ] {
        assert_eq!(one(text), expect, "{text}");
    }
}

#[test]
fn errors_with_their_place() {
    for (text, expect) in [
        ("RUNS x", "unknown instruction: RUNS (did you mean RUN?) @ RUNS"),
        ("  Cpoy a b", "unknown instruction: Cpoy (did you mean COPY?) @ Cpoy"),
        ("BADCMD", "unknown instruction: BADCMD @ BADCMD"),
        ("FORM x", "unknown instruction: FORM (did you mean FROM?) @ FORM"),
        ("안녕 x", "unknown instruction: 안녕 @ 안녕"),
        ("RUN", "RUN requires at least one argument @ RUN"),
        ("RUN --network=none", "RUN requires at least one argument @ RUN"),
        ("RUN --boo x", "unknown flag: --boo @ --boo"),
        ("RUN --mout=target=/x x", "unknown flag: --mout (did you mean mount?) @ --mout"),
        ("RUN --mount x", "missing a value on flag: --mount @ --mount"),
        ("RUN --network=none --network=host x", "duplicate flag specified: --network @ --network=host"),
        ("RUN --network=hosts x", "unsupported network mode \"hosts\" (did you mean host?) @ --network=hosts"),
        ("RUN --security=none x", "unsupported security mode \"none\" @ --security=none"),
        (
            "RUN --mount=type=cach,target=/x x",
            "unsupported mount type \"cach\" (did you mean cache?), the types are bind, cache, tmpfs, secret, ssh @ --mount=type=cach,target=/x",
        ),
        (
            "RUN --mount=type=bind,from=$X,target=/x x",
            "'from' doesn't support variable expansion, define alias stage instead @ --mount=type=bind,from=$X,target=/x",
        ),
        ("RUN [1]", "when using JSON array syntax, arrays must be comprised of strings only @ [1]"),
        ("CMD --x y", "unknown flag: --x @ --x"),
        ("USER --x", "unknown flag: --x @ --x"),
        ("COPY a", "COPY requires at least two arguments, but only one was provided. Destination could not be determined @ COPY"),
        ("COPY", "COPY requires at least two arguments, but only one was provided. Destination could not be determined @ COPY"),
        ("ADD [\"a\"]", "ADD requires at least two arguments, but only one was provided. Destination could not be determined @ ADD"),
        ("COPY --foo=bar / /", "unknown flag: --foo (did you mean from?) @ --foo"),
        ("COPY --unpack a b", "unknown flag: --unpack @ --unpack"),
        ("ADD --from=x a b", "unknown flag: --from @ --from"),
        ("COPY --chown a b", "missing a value on flag: --chown @ --chown"),
        ("COPY --link= a b", "missing a value on flag: --link @ --link="),
        ("COPY --link=yes a b", "expecting boolean value for flag --link, not: yes @ --link=yes"),
        ("COPY --link --link a b", "duplicate flag specified: --link @ --link"),
        (
            "COPY --from=$X a b",
            "variable expansion is not supported for --from, define a new stage with FROM using ARG from global scope as a workaround @ --from=$X",
        ),
        ("COPY a <<E\nE", "COPY cannot accept a heredoc as a destination @ <<E"),
        ("ENV", "ENV requires at least one argument @ ENV"),
        ("ENV a", "ENV must have two arguments @ a"),
        ("ENV a=b c", "Syntax error - can't find = in \"c\". Must be of the form: name=value @ c"),
        ("ENV =b", "ENV names can not be blank @ =b"),
        ("LABEL", "LABEL requires at least one argument @ LABEL"),
        ("LABEL =b", "LABEL names can not be blank @ =b"),
        ("ARG", "ARG requires at least one argument @ ARG"),
        ("ARG a =b", "ARG names can not be blank @ =b"),
        ("WORKDIR", "WORKDIR requires exactly one argument @ WORKDIR"),
        ("USER", "USER requires exactly one argument @ USER"),
        ("STOPSIGNAL ", "STOPSIGNAL requires exactly one argument @ STOPSIGNAL"),
        ("MAINTAINER", "MAINTAINER requires exactly one argument @ MAINTAINER"),
        ("EXPOSE", "EXPOSE requires at least one argument @ EXPOSE"),
        ("VOLUME", "VOLUME requires at least one argument @ VOLUME"),
        ("VOLUME []", "VOLUME requires at least one argument @ VOLUME"),
        ("VOLUME [\"\"]", "VOLUME specified can not be an empty string @ [\"\"]"),
        ("SHELL", "SHELL requires at least one argument @ SHELL"),
        ("SHELL []", "SHELL requires at least one argument @ SHELL"),
        ("SHELL bash -c", "SHELL requires the arguments to be in JSON form @ bash -c"),
        ("HEALTHCHECK", "HEALTHCHECK requires at least one argument @ HEALTHCHECK"),
        ("HEALTHCHECK CMD", "Missing command after HEALTHCHECK CMD @ CMD"),
        ("HEALTHCHECK CMD []", "Missing command after HEALTHCHECK CMD @ CMD"),
        ("HEALTHCHECK NONE x", "HEALTHCHECK NONE takes no arguments @ x"),
        ("HEALTHCHECK curl x", "Unknown type \"CURL\" in HEALTHCHECK (try CMD) @ curl"),
        ("HEALTHCHECK --intervall=1s CMD x", "unknown flag: --intervall (did you mean interval?) @ --intervall"),
        (
            "HEALTHCHECK --timeout=5 CMD x",
            "invalid duration \"5\": a unit is missing, write for example 30s, 1m30s or 500ms (--timeout) @ --timeout=5",
        ),
        ("HEALTHCHECK --timeout=5us CMD x", "Interval \"timeout\" cannot be less than 1ms @ --timeout=5us"),
        ("HEALTHCHECK --retries=-1 CMD x", "--retries cannot be negative (-1) @ --retries=-1"),
        ("HEALTHCHECK --retries=x CMD x", "invalid number \"x\" for --retries @ --retries=x"),
        ("ONBUILD", "ONBUILD requires at least one argument @ ONBUILD"),
        ("ONBUILD FROM x", "FROM isn't allowed as an ONBUILD trigger @ FROM"),
        ("ONBUILD maintainer x", "MAINTAINER isn't allowed as an ONBUILD trigger @ maintainer"),
        ("ONBUILD ONBUILD RUN x", "Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed @ ONBUILD"),
        ("ONBUILD RUNS x", "unknown instruction: RUNS (did you mean RUN?) @ RUNS"),
        ("ONBUILD COPY --boo a b", "unknown flag: --boo @ --boo"),
        ("FROM", "FROM requires either one or three arguments @ FROM"),
        ("FROM a b", "FROM requires either one or three arguments @ a b"),
        ("FROM a as", "FROM requires either one or three arguments @ a as"),
        ("FROM a AS b c", "FROM requires either one or three arguments @ a AS b c"),
        ("FROM a AS 1b", "invalid name for build stage: \"1b\", name can't start with a number or contain symbols @ 1b"),
        ("FROM a AS b/c", "invalid name for build stage: \"b/c\", name can't start with a number or contain symbols @ b/c"),
        ("FROM --plaftorm=x a", "unknown flag: --plaftorm (did you mean platform?) @ --plaftorm"),
        // The place is found again behind continuations.
        ("RUN \\\n  # comment\n  --network=none \\\n  --netwrk=x a", "unknown flag: --netwrk (did you mean network?) @ --netwrk"),
        ("COPY --lin\\\nk=maybe a b", "expecting boolean value for flag --link, not: maybe @ --lin\\\nk=maybe"),
    ] {
        assert_eq!(one(text), expect, "{text}");
    }
}

#[test]
fn files() {
    for (text, expect) in [
        ("FROM a", "FROM a"),
        ("FROM --platform=$BUILDPLATFORM a:${V} AS Base", "FROM a:${V} platform=\"$BUILDPLATFORM\" as=\"base\""),
        ("ARG V=1\nARG W\nFROM a:$V\nARG V", "ARG V=1; ARG W; FROM a:$V; ARG V"),
        ("FROM a\nFROM b\nFROM a", "FROM a; FROM b; FROM a"),
        ("\u{feff}FROM a", "FROM a"),
        ("#!/usr/bin/env ovenbird\nFROM a", "FROM a"),
        ("\n\n  \n\tFROM a\n\n", "FROM a"),
        ("# a stage\nFROM a", "FROM a doc=\"a stage\""),
        ("# two\n#   lines\nFROM a", "FROM a doc=\"two\\nlines\""),
        ("# away\n\nFROM a", "FROM a"),
        ("# away\n#\n# near\nFROM a", "FROM a doc=\"near\""),
        ("# syntax=x\nFROM a", "FROM a"),
        ("# syntax=x\n# doc\nFROM a", "FROM a doc=\"doc\""),
        ("FROM a\n# x\nRUN b\nFROM c", "FROM a; RUN sh \"b\"; FROM c"),
        ("# check=skip=all\nFROM a", "FROM a"),
        ("FROM a\n# check=skip=StageNameCasing\nFROM b AS C", "FROM a; FROM b as=\"c\""),
        ("# escape=`\nFROM a\nRUN b `\n c \\", "FROM a; RUN sh \"b  c \\\\\""),
        ("# escape=`\nFROM a\nENV x=b` c", "FROM a; ENV x=b` c"),
        // An error leaves the rest in the tree.
        ("FROM a\nBAD\nUSER u", "FROM a; USER u"),
    ] {
        assert_eq!(show(&parse(text).dockerfile).replace("USER \"u\"", "USER u"), expect, "{text}");
    }
}

#[test]
fn directives() {
    let plain = Directives::default;
    for (text, expect, errors) in [
        ("", plain(), 0),
        ("# syntax=docker/dockerfile:1", Directives { syntax: Some("docker/dockerfile:1".into()), ..plain() }, 0),
        ("#SYNTAX = a b \n", Directives { syntax: Some("a b".into()), ..plain() }, 0),
        ("#\tEscape=`", Directives { escape: '`', ..plain() }, 0),
        ("# escape=\\", plain(), 0),
        ("# escape=x", plain(), 1),
        ("# escape=``", plain(), 1),
        (
            "# check=skip=A;error=true\r\n# syntax=x",
            Directives { syntax: Some("x".into()), check: Some("skip=A;error=true".into()), ..plain() },
            0,
        ),
        ("# syntax=a\n# syntax=b", Directives { syntax: Some("a".into()), ..plain() }, 1),
        ("# syntax=a\n# Syntax=b", Directives { syntax: Some("a".into()), ..plain() }, 1),
        ("# comment\n# escape=`", plain(), 0),
        ("\n# escape=`", plain(), 0),
        ("# unknown=x\n# escape=`", plain(), 0),
        ("# escape =\n# syntax=x", plain(), 0),
        ("#!/bin/sh\n# escape=`", Directives { escape: '`', ..plain() }, 0),
        ("\u{feff}# escape=`", Directives { escape: '`', ..plain() }, 0),
        ("  # escape=`", Directives { escape: '`', ..plain() }, 0),
        ("FROM b\n# escape=`", plain(), 0),
    ] {
        let parsed = parse(&format!("{text}\nFROM a\n"));
        assert_eq!((parsed.dockerfile.directives, parsed.diagnostics.len()), (expect, errors), "{text}");
    }
}

#[test]
fn files_with_errors() {
    for (text, expect) in [
        ("", &["file with no instructions"][..]),
        ("# c\n\n", &["file with no instructions"]),
        ("\u{feff}", &["file with no instructions"]),
        ("ARG a", &["dockerfile contains no stages to build"]),
        ("RUN a\nRUN b", &["no build stage in current context"]),
        ("RUN a\nFROM b", &["no build stage in current context"]),
        ("RUNS a", &["unknown instruction: RUNS (did you mean RUN?)"]),
        ("FROM\nRUN a\nCOPY a b", &["FROM requires either one or three arguments"]),
        ("FROM a\nBAD\nENV", &["unknown instruction: BAD (did you mean ADD?)", "ENV requires at least one argument"]),
        ("# escape=x\nFROM a\nENV", &["invalid escape token 'x' does not match ` or \\", "ENV requires at least one argument"]),
        ("FROM a\nHEALTHCHECK --interval=1s NONE", &["--interval has no effect on HEALTHCHECK NONE"]),
    ] {
        let messages: Vec<String> = parse(text).diagnostics.into_iter().map(|d| d.message).collect();
        assert_eq!(messages, expect, "{text}");
    }
}

#[test]
fn spans_and_originals() {
    let text = "# syntax=x\nFROM a AS \\\n  b\n\nRUN <<E \\\n # c\n  x\nbody\nE\n\n  USER  u \r\n";
    let parsed = parse(text);
    let stage = &parsed.dockerfile.stages[0];
    let mut found = vec![(&text[stage.span.start..stage.span.end], stage.original.as_str(), line_column(text, stage.span.start).0)];
    for instruction in &stage.instructions {
        let span = instruction.span;
        found.push((&text[span.start..span.end], &instruction.original, line_column(text, span.start).0));
    }
    let expect =
        [("FROM a AS \\\n  b", "FROM a AS   b", 2), ("RUN <<E \\\n # c\n  x\nbody\nE", "RUN <<E   x", 5), ("USER  u ", "USER  u", 11)];
    assert_eq!(found, expect);
}

#[test]
fn triggers() {
    for (text, escape, expect) in [
        ("RUN make", '\\', "RUN sh \"make\""),
        ("COPY --from=x a b", '\\', "COPY from=x \"a\" -> \"b\""),
        ("RUN <<E\nx\nE", '\\', "RUN sh \"<<E\" <<E$\"x\\n\""),
        ("RUN <<-E\n\tx\nE", '\\', "RUN sh \"<<-E\" <<-E$\"x\\n\""),
        ("ENV a=b` c", '`', "ENV a=b` c"),
        ("# escape=`\nRUN a `\nb", '\\', "more than one instruction"),
        ("FROM x", '\\', "FROM isn't allowed here"),
        ("", '\\', "no instruction"),
        ("RUN a\nRUN b", '\\', "more than one instruction"),
        ("RUN <<E", '\\', "unterminated heredoc: no line holds just E"),
        ("BAD", '\\', "unknown instruction: BAD (did you mean ADD?)"),
    ] {
        let shown = parse_instruction(text, escape).map_or_else(|d| d.message, |i| kind(&i.kind));
        assert_eq!(shown, expect, "{text}");
    }
    // What the parser stores for a trigger is what it reads again.
    let parsed = parse("FROM a\nONBUILD COPY <<-'X' <<Y /z/\n\tx\n\tX\ny\nY\n");
    let Kind::Onbuild(trigger) = &parsed.dockerfile.stages[0].instructions[0].kind else { panic!("not a trigger") };
    let again = parse_instruction(trigger, '\\').map(|i| kind(&i.kind));
    assert_eq!(again.as_deref(), Ok("COPY <<-X\"x\\n\" <<Y$\"y\\n\" -> \"/z/\""));
}

/// Text that looks like a Dockerfile often enough to reach deep places.
fn dockerfile_like() -> impl Strategy<Value = String> {
    let pieces = prop::sample::select(vec![
        "FROM ",
        "RUN ",
        "COPY ",
        "ENV ",
        "ONBUILD ",
        "HEALTHCHECK ",
        "CMD ",
        "ARG ",
        "SHELL ",
        "--mount=",
        "type=cache,",
        "--from=",
        "--link ",
        "<<EOF",
        "<<-'E'",
        "EOF\n",
        "E\n",
        "\\\n",
        "\\",
        "`",
        "\n",
        "\r\n",
        "# ",
        "# escape=`\n",
        "#check=skip=all\n",
        "[\"",
        "\", \"",
        "\"]",
        "'",
        "\"",
        "=",
        " ",
        "\t",
        "a",
        "$x",
        "${x:-",
        "}",
        "안",
        "\u{feff}",
        "\u{a0}",
        "--",
        "AS ",
        "NONE",
        "5s ",
        ",",
    ]);
    prop::collection::vec(prop_oneof![9 => pieces.prop_map(str::to_owned), 1 => any::<String>()], 0..40).prop_map(|parts| parts.concat())
}

proptest! {
    #[test]
    fn anything_parses_and_spans_are_in_bounds(text in dockerfile_like()) {
        let parsed = parse(&text);
        let in_text = |span: Span| text.get(span.start..span.end).is_some();
        for diagnostic in parsed.diagnostics.iter().cloned().chain(crate::lint::lint(&parsed.dockerfile, &text, &CheckConfig::default())) {
            prop_assert!(in_text(diagnostic.span), "{diagnostic:?}");
            prop_assert!(crate::diagnostic::render(&diagnostic, "Dockerfile", &text).contains("-->"));
        }
        let stages = &parsed.dockerfile.stages;
        let instructions = parsed.dockerfile.global_args.iter().chain(stages.iter().flat_map(|s| &s.instructions));
        for span in stages.iter().map(|s| s.span).chain(instructions.map(|i| i.span)) {
            prop_assert!(in_text(span) && span.start < span.end);
        }
        prop_assert!(parsed.error().is_some() || !stages.is_empty());
    }

    #[test]
    fn any_instruction_parses(text in dockerfile_like()) {
        if let Err(diagnostic) = parse_instruction(&text, '`') {
            prop_assert!(text.get(diagnostic.span.start..diagnostic.span.end).is_some());
        }
    }
}
