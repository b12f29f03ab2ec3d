//! One instruction by its own grammar.

use std::ops::Range;

use crate::ast::{ArgDecl, Command, Flag, Healthcheck, Heredoc, Instruction, KeyValue, Kind, Run, Source, Stage, Transfer};
use crate::diagnostic::{Diagnostic, Severity, Span};
use crate::{duration, lint, mount, suggest};

use super::lines::{Folded, Logical, RawHeredoc, heredoc_head};
use super::words::{self, Json, RawFlag, Word};

/// Every instruction of the language.
const INSTRUCTIONS: [&str; 18] = [
    "FROM",
    "RUN",
    "COPY",
    "ADD",
    "ARG",
    "ENV",
    "LABEL",
    "WORKDIR",
    "USER",
    "CMD",
    "ENTRYPOINT",
    "EXPOSE",
    "VOLUME",
    "SHELL",
    "STOPSIGNAL",
    "HEALTHCHECK",
    "ONBUILD",
    "MAINTAINER",
];

/// How a flag takes its value.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Takes {
    /// `--link`, `--link=false`.
    Bool,
    /// `--from=x`, once.
    One,
    /// `--mount=x`, any number of times.
    Many,
}

type FlagTable = &'static [(&'static str, Takes)];

const FROM_FLAGS: FlagTable = &[("platform", Takes::One)];
const COPY_FLAGS: FlagTable = &[
    ("from", Takes::One),
    ("chown", Takes::One),
    ("chmod", Takes::One),
    ("link", Takes::Bool),
    ("parents", Takes::Bool),
    ("exclude", Takes::Many),
];
const ADD_FLAGS: FlagTable = &[
    ("chown", Takes::One),
    ("chmod", Takes::One),
    ("link", Takes::Bool),
    ("keep-git-dir", Takes::Bool),
    ("checksum", Takes::One),
    ("unpack", Takes::Bool),
    ("exclude", Takes::Many),
];
const RUN_FLAGS: FlagTable = &[("mount", Takes::Many), ("network", Takes::One), ("security", Takes::One), ("device", Takes::Many)];
const HEALTHCHECK_FLAGS: FlagTable = &[
    ("interval", Takes::One),
    ("timeout", Takes::One),
    ("start-period", Takes::One),
    ("start-interval", Takes::One),
    ("retries", Takes::One),
];
const FLAG_OWNERS: [(&str, FlagTable); 5] =
    [("FROM", FROM_FLAGS), ("RUN", RUN_FLAGS), ("COPY", COPY_FLAGS), ("ADD", ADD_FLAGS), ("HEALTHCHECK", HEALTHCHECK_FLAGS)];

/// A read instruction.
pub(crate) enum Statement {
    From(Box<Stage>),
    Instruction(Box<Instruction>),
}

/// Reads a logical line. Findings that leave the instruction usable go to `found`.
pub(crate) fn read(logical: Logical, escape: char, found: &mut Vec<Diagnostic>) -> Result<Statement, Diagnostic> {
    let Logical { folded, span, heredocs, comments, .. } = logical;
    let original = folded.text.trim().to_owned();
    let mut reader = Reader { folded: &folded, escape, heredocs, found };
    let command = words::split_command(&folded.text);
    if command.name(&folded.text).eq_ignore_ascii_case("from") {
        let mut stage = reader.from(command.word, command.rest)?;
        let description: Vec<&str> = comments.iter().map(String::as_str).filter(|c| !c.starts_with(lint::IN_PLACE)).collect();
        stage.doc = (!description.is_empty()).then(|| description.join("\n"));
        stage.span = span;
        stage.original = original;
        return Ok(Statement::From(Box::new(stage)));
    }
    let kind = reader.kind(command.word, command.rest)?;
    Ok(Statement::Instruction(Box::new(Instruction { kind, span, original })))
}

struct Reader<'a> {
    folded: &'a Folded,
    escape: char,
    heredocs: Vec<RawHeredoc>,
    found: &'a mut Vec<Diagnostic>,
}

/// Flags that passed their table.
struct Given {
    name: &'static str,
    flags: Vec<RawFlag>,
    /// The command word, where a missing argument is reported.
    word: Range<usize>,
}

impl Given {
    /// An empty value is as good as none, as in BuildKit.
    fn one(&self, name: &str) -> Option<String> {
        self.find(name).and_then(|f| f.value.clone()).filter(|value| !value.is_empty())
    }

    fn find(&self, name: &str) -> Option<&RawFlag> {
        self.flags.iter().find(|f| f.name == name)
    }

    fn many(&self, name: &str) -> Vec<String> {
        self.flags.iter().filter(|f| f.name == name).filter_map(|f| f.value.clone()).collect()
    }

    fn bool(&self, name: &str) -> Option<bool> {
        self.find(name).map(|f| f.value.as_ref().is_none_or(|v| v.eq_ignore_ascii_case("true")))
    }
}

impl Reader<'_> {
    fn text(&self, range: Range<usize>) -> &str {
        &self.folded.text[range]
    }

    fn error(&self, code: &'static str, message: impl Into<String>, help: impl Into<String>, range: Range<usize>) -> Diagnostic {
        let help = Some(help.into());
        Diagnostic { severity: Severity::Error, code: code.into(), message: message.into(), help, span: self.folded.span(range) }
    }

    fn missing(&self, given: &Given, message: &str, example: &str) -> Diagnostic {
        self.error("missing-argument", format!("{} {message}", given.name), format!("write for example `{example}`"), given.word.clone())
    }

    /// Takes the flags of `rest` and checks them; the second value is what follows.
    fn flags(
        &mut self,
        name: &'static str,
        table: FlagTable,
        word: Range<usize>,
        rest: Range<usize>,
    ) -> Result<(Given, Range<usize>), Diagnostic> {
        let words::Flags { flags, rest } = words::take_flags(&self.folded.text, rest);
        for (index, flag) in flags.iter().enumerate() {
            let RawFlag { name: flag_name, value, range } = flag;
            let Some((_, takes)) = table.iter().find(|(known, _)| known == flag_name) else {
                return Err(self.unknown_flag(name, table, flag));
            };
            if *takes != Takes::Many && flags[..index].iter().any(|f| f.name == *flag_name) {
                let message = format!("duplicate flag specified: --{flag_name}");
                return Err(self.error("duplicate-flag", message, "keep one of them", range.clone()));
            }
            match (takes, value.as_deref()) {
                (Takes::Bool, None) => {}
                (Takes::Bool, Some(v)) if v.eq_ignore_ascii_case("true") || v.eq_ignore_ascii_case("false") => {}
                (Takes::Bool, Some("")) | (_, None) => {
                    let message = format!("missing a value on flag: --{flag_name}");
                    return Err(self.error("missing-flag-value", message, format!("write `--{flag_name}=…`"), range.clone()));
                }
                (Takes::Bool, Some(other)) => {
                    let message = format!("expecting boolean value for flag --{flag_name}, not: {other}");
                    return Err(self.error("bad-flag-value", message, "write true or false", range.clone()));
                }
                _ => {}
            }
        }
        Ok((Given { name, flags, word }, rest))
    }

    fn unknown_flag(&self, instruction: &str, table: FlagTable, flag: &RawFlag) -> Diagnostic {
        let name = &flag.name;
        let nearest = suggest::nearest(name, table.iter().map(|(known, _)| *known));
        let owners: Vec<&str> =
            FLAG_OWNERS.iter().filter(|(_, flags)| flags.iter().any(|(known, _)| known == name)).map(|(owner, _)| *owner).collect();
        let help = if !owners.is_empty() {
            format!("--{name} is a flag of {}, not of {instruction}", owners.join(" and "))
        } else if let Some(nearest) = nearest {
            format!("write `--{nearest}`")
        } else if table.is_empty() {
            format!("{instruction} takes no flags")
        } else {
            let known: Vec<String> = table.iter().map(|(known, _)| format!("--{known}")).collect();
            format!("the flags of {instruction} are {}", known.join(", "))
        };
        // Only the name is underlined: the value may be long and is not what is wrong.
        let name_end = self.text(flag.range.clone()).find('=').map_or(flag.range.end, |i| flag.range.start + i);
        let message = format!("unknown flag: --{name}{}", suggest::suffix(nearest));
        self.error("unknown-flag", message, help, flag.range.start..name_end)
    }

    fn from(&mut self, word: Range<usize>, rest: Range<usize>) -> Result<Stage, Diagnostic> {
        let (given, rest) = self.flags("FROM", FROM_FLAGS, word, rest)?;
        let args = words::blank_separated(&self.folded.text, rest.clone());
        let example = "write `FROM image` or `FROM image AS name`";
        let (base, name) = match args.as_slice() {
            [base] => (base, None),
            [base, keyword, name] if keyword.text.eq_ignore_ascii_case("as") => (base, Some(name)),
            [] => return Err(self.error("missing-argument", "FROM requires either one or three arguments", example, given.word)),
            _ => return Err(self.error("bad-from", "FROM requires either one or three arguments", example, rest)),
        };
        if let Some(name) = name {
            let lower = name.text.to_lowercase();
            let valid = lower.starts_with(|c: char| c.is_ascii_lowercase())
                && lower.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_' | '.'));
            if !valid {
                let message = format!("invalid name for build stage: {:?}, name can't start with a number or contain symbols", name.text);
                let help = "begin with a letter, go on with letters, digits, `-`, `_` and `.`";
                return Err(self.error("invalid-stage-name", message, help, name.range.clone()));
            }
        }
        Ok(Stage {
            base: base.text.clone(),
            platform: given.one("platform"),
            name: name.map(|n| n.text.to_lowercase()),
            name_as_written: name.map(|n| n.text.clone()),
            doc: None,
            instructions: vec![],
            span: Span::default(),
            original: String::new(),
        })
    }

    fn kind(&mut self, word: Range<usize>, rest: Range<usize>) -> Result<Kind, Diagnostic> {
        let written = self.text(word.clone()).to_owned();
        let upper = written.to_ascii_uppercase();
        let Some(name) = INSTRUCTIONS.into_iter().find(|known| *known == upper) else {
            let nearest = suggest::nearest(&written, INSTRUCTIONS);
            let help =
                nearest.map_or_else(|| format!("the instructions are {}", INSTRUCTIONS.join(", ")), |nearest| format!("write `{nearest}`"));
            let message = format!("unknown instruction: {written}{}", suggest::suffix(nearest));
            return Err(self.error("unknown-instruction", message, help, word));
        };
        let table = FLAG_OWNERS.iter().find(|(owner, _)| *owner == name).map_or(&[] as FlagTable, |(_, table)| *table);
        if name == "ONBUILD" {
            return self.onbuild(word, rest);
        }
        let (given, rest) = self.flags(name, table, word, rest)?;
        Ok(match name {
            "RUN" => Kind::Run(self.run(&given, rest)?),
            "COPY" => Kind::Copy(self.transfer(&given, rest)?),
            "ADD" => Kind::Add(self.transfer(&given, rest)?),
            "ARG" => Kind::Arg(self.arg(&given, rest)?),
            "ENV" => Kind::Env(self.key_values(&given, rest)?),
            "LABEL" => Kind::Label(self.key_values(&given, rest)?),
            "CMD" => Kind::Cmd(self.command(rest)?),
            "ENTRYPOINT" => Kind::Entrypoint(self.command(rest)?),
            "WORKDIR" => Kind::Workdir(self.one_argument(&given, rest, "WORKDIR /app")?),
            "USER" => Kind::User(self.one_argument(&given, rest, "USER 1000:1000")?),
            "STOPSIGNAL" => Kind::StopSignal(self.one_argument(&given, rest, "STOPSIGNAL SIGTERM")?),
            "MAINTAINER" => Kind::Maintainer(self.one_argument(&given, rest, "LABEL org.opencontainers.image.authors=\"name\"")?),
            "EXPOSE" => {
                let ports = words::blank_separated(&self.folded.text, rest);
                if ports.is_empty() {
                    return Err(self.missing(&given, "requires at least one argument", "EXPOSE 8080/tcp"));
                }
                Kind::Expose(ports.into_iter().map(|w| w.text).collect())
            }
            "VOLUME" => Kind::Volume(self.volume(&given, rest)?),
            "SHELL" => Kind::Shell(self.shell(&given, rest)?),
            _ => Kind::Healthcheck(self.healthcheck(&given, rest)?),
        })
    }

    fn one_argument(&self, given: &Given, rest: Range<usize>, example: &str) -> Result<String, Diagnostic> {
        if rest.is_empty() {
            return Err(self.missing(given, "requires exactly one argument", example));
        }
        Ok(self.text(rest).to_owned())
    }

    /// `None` when the text is not JSON.
    fn json(&self, rest: &Range<usize>) -> Result<Option<Vec<String>>, Diagnostic> {
        match words::json_array(self.text(rest.clone())) {
            Json::Strings(items) => Ok(Some(items)),
            Json::Other => Ok(None),
            Json::NotStrings => Err(self.error(
                "json-not-strings",
                "when using JSON array syntax, arrays must be comprised of strings only",
                "put every item in double quotes",
                rest.clone(),
            )),
        }
    }

    fn command(&self, rest: Range<usize>) -> Result<Command, Diagnostic> {
        Ok(match self.json(&rest)? {
            Some(items) => Command::Exec(items),
            None => Command::Shell(self.text(rest).to_owned()),
        })
    }

    fn take_heredocs(&mut self) -> Vec<Heredoc> {
        std::mem::take(&mut self.heredocs).into_iter().map(RawHeredoc::finish).collect()
    }

    fn run(&mut self, given: &Given, rest: Range<usize>) -> Result<Run, Diagnostic> {
        if rest.is_empty() {
            return Err(self.missing(given, "requires at least one argument", "RUN make"));
        }
        for (flag, known) in [("network", &["default", "none", "host"][..]), ("security", &["sandbox", "insecure"])] {
            let Some(RawFlag { value: Some(value), range, .. }) = given.find(flag) else { continue };
            if !known.contains(&value.as_str()) {
                let nearest = suggest::nearest(value, known.iter().copied());
                let message = format!("unsupported {flag} mode {value:?}{}", suggest::suffix(nearest));
                return Err(self.error("bad-flag-value", message, format!("the modes are {}", known.join(", ")), range.clone()));
            }
        }
        let mut mounts = Vec::new();
        for flag in given.flags.iter().filter(|f| f.name == "mount") {
            self.check_mount(flag)?;
            mounts.push(Flag { name: flag.name.clone(), value: flag.value.clone(), span: self.folded.span(flag.range.clone()) });
        }
        Ok(Run {
            command: self.command(rest)?,
            heredocs: self.take_heredocs(),
            mounts,
            network: given.one("network"),
            security: given.one("security"),
            devices: given.many("device"),
        })
    }

    /// What can be said of a mount before its variables are known.
    fn check_mount(&self, flag: &RawFlag) -> Result<(), Diagnostic> {
        let value = flag.value.as_deref().unwrap_or_default();
        let error = |message: String, help: &str| self.error("bad-mount", message, help, flag.range.clone());
        if mount::from_has_variable(value) {
            let message = "'from' doesn't support variable expansion, define alias stage instead".to_owned();
            return Err(error(message, "add `FROM $IMAGE AS name` and write from=name"));
        }
        if value.contains(['$', '\\', '\'', '"', '`']) {
            return Ok(());
        }
        mount::parse(value).map(drop).map_err(|e| error(e.to_string(), "see the documentation of RUN --mount"))
    }

    fn transfer(&mut self, given: &Given, rest: Range<usize>) -> Result<Transfer, Diagnostic> {
        if let Some(RawFlag { value: Some(value), range, .. }) = given.find("from")
            && value.contains('$')
        {
            let message =
                "variable expansion is not supported for --from, define a new stage with FROM using ARG from global scope as a workaround";
            return Err(self.error("from-variable", message, "add `FROM $IMAGE AS name` and write --from=name", range.clone()));
        }
        let (words, exec) = match self.json(&rest)? {
            Some(items) => (items.into_iter().map(|text| Word { text, range: rest.clone() }).collect(), true),
            None => (words::blank_separated(&self.folded.text, rest), false),
        };
        let mut heredocs = self.take_heredocs();
        let Some((dest, sources)) = words.split_last().filter(|(_, sources)| !sources.is_empty()) else {
            let message = "requires at least two arguments, but only one was provided. Destination could not be determined";
            return Err(self.missing(given, message, &format!("{} source /destination/", given.name)));
        };
        if !exec && heredoc_head(&dest.text).is_some() {
            let message = format!("{} cannot accept a heredoc as a destination", given.name);
            return Err(self.error("heredoc-destination", message, "add a destination as the last argument", dest.range.clone()));
        }
        let sources = sources
            .iter()
            .map(|word| match heredoc_head(&word.text) {
                Some(head) if !exec => {
                    let at = heredocs.iter().position(|h| h.name == head.name);
                    Source::Heredoc(at.map_or(head, |at| heredocs.remove(at)))
                }
                _ => Source::Path(word.text.clone()),
            })
            .collect();
        Ok(Transfer {
            sources,
            dest: dest.text.clone(),
            from: given.one("from"),
            chown: given.one("chown"),
            chmod: given.one("chmod"),
            link: given.bool("link").unwrap_or(false),
            parents: given.bool("parents").unwrap_or(false),
            excludes: given.many("exclude"),
            checksum: given.one("checksum"),
            keep_git_dir: given.bool("keep-git-dir"),
            unpack: given.bool("unpack"),
        })
    }

    fn arg(&self, given: &Given, rest: Range<usize>) -> Result<Vec<ArgDecl>, Diagnostic> {
        let words = words::quoted_words(&self.folded.text, rest, self.escape);
        if words.is_empty() {
            return Err(self.missing(given, "requires at least one argument", "ARG VERSION=1"));
        }
        words
            .into_iter()
            .map(|word| {
                let (name, default) = match word.text.split_once('=') {
                    Some((name, default)) => (name.to_owned(), Some(default.to_owned())),
                    None => (word.text, None),
                };
                if name.is_empty() {
                    return Err(self.error("blank-name", "ARG names can not be blank", "put a name before the `=`", word.range));
                }
                Ok(ArgDecl { name, default })
            })
            .collect()
    }

    fn key_values(&self, given: &Given, rest: Range<usize>) -> Result<Vec<KeyValue>, Diagnostic> {
        let words = words::quoted_words(&self.folded.text, rest.clone(), self.escape);
        let Some(first) = words.first() else {
            return Err(self.missing(given, "requires at least one argument", &format!("{} key=value", given.name)));
        };
        if !first.text.contains('=') {
            let text = self.text(rest);
            let Some((key, value)) = text.split_once(words::BLANKS) else {
                let help = format!("write `{} {text}=value`", given.name);
                return Err(self.error("missing-argument", format!("{} must have two arguments", given.name), help, first.range.clone()));
            };
            return Ok(vec![KeyValue { key: key.to_owned(), value: value.trim_start().to_owned(), legacy: true }]);
        }
        words
            .into_iter()
            .map(|word| {
                let Some((key, value)) = word.text.split_once('=') else {
                    let message = format!("Syntax error - can't find = in {:?}. Must be of the form: name=value", word.text);
                    let help = "quote a value that holds blanks";
                    return Err(self.error("missing-equals", message, help, word.range));
                };
                if key.is_empty() {
                    let message = format!("{} names can not be blank", given.name);
                    return Err(self.error("blank-name", message, "put a name before the `=`", word.range));
                }
                Ok(KeyValue { key: key.to_owned(), value: value.to_owned(), legacy: false })
            })
            .collect()
    }

    fn volume(&self, given: &Given, rest: Range<usize>) -> Result<Vec<String>, Diagnostic> {
        let volumes: Vec<String> = match self.json(&rest)? {
            Some(items) => items.into_iter().map(|item| item.trim().to_owned()).collect(),
            None => words::blank_separated(&self.folded.text, rest.clone()).into_iter().map(|w| w.text).collect(),
        };
        if volumes.is_empty() {
            return Err(self.missing(given, "requires at least one argument", "VOLUME /data"));
        }
        if volumes.iter().any(String::is_empty) {
            return Err(self.error("blank-name", "VOLUME specified can not be an empty string", "write a path", rest));
        }
        Ok(volumes)
    }

    fn shell(&self, given: &Given, rest: Range<usize>) -> Result<Vec<String>, Diagnostic> {
        let example = "SHELL [\"/bin/bash\", \"-c\"]";
        if rest.is_empty() {
            return Err(self.missing(given, "requires at least one argument", example));
        }
        match self.json(&rest)? {
            Some(items) if items.is_empty() => Err(self.missing(given, "requires at least one argument", example)),
            Some(items) => Ok(items),
            None => {
                let help = format!("write for example `{example}`");
                Err(self.error("not-json", "SHELL requires the arguments to be in JSON form", help, rest))
            }
        }
    }

    fn healthcheck(&mut self, given: &Given, rest: Range<usize>) -> Result<Healthcheck, Diagnostic> {
        let text = &self.folded.text;
        let kind_end = text[rest.clone()].find(char::is_whitespace).map_or(rest.end, |i| rest.start + i);
        let kind = rest.start..kind_end;
        let argument_start = kind_end + (text[kind_end..rest.end].len() - text[kind_end..rest.end].trim_start().len());
        let argument = argument_start..rest.end;
        let example = "HEALTHCHECK CMD curl -f http://localhost/";
        match text[kind.clone()].to_ascii_uppercase().as_str() {
            "" => Err(self.missing(given, "requires at least one argument", example)),
            "NONE" if !argument.is_empty() => {
                Err(self.error("extra-argument", "HEALTHCHECK NONE takes no arguments", "remove what follows NONE", argument))
            }
            "NONE" => {
                if let Some(flag) = given.flags.first() {
                    self.found.push(Diagnostic {
                        severity: Severity::Warning,
                        code: "useless-flag".into(),
                        message: format!("--{} has no effect on HEALTHCHECK NONE", flag.name),
                        help: Some("remove the flag".to_owned()),
                        span: self.folded.span(flag.range.clone()),
                    });
                }
                Ok(Healthcheck::None)
            }
            "CMD" => {
                let command = self.command(argument)?;
                let empty = match &command {
                    Command::Shell(text) => text.is_empty(),
                    Command::Exec(items) => items.is_empty(),
                };
                if empty {
                    return Err(self.error(
                        "missing-argument",
                        "Missing command after HEALTHCHECK CMD",
                        format!("write for example `{example}`"),
                        kind,
                    ));
                }
                for flag in &given.flags {
                    self.check_health_flag(flag)?;
                }
                Ok(Healthcheck::Cmd {
                    command,
                    interval: given.one("interval"),
                    timeout: given.one("timeout"),
                    start_period: given.one("start-period"),
                    start_interval: given.one("start-interval"),
                    retries: given.one("retries"),
                })
            }
            other => {
                let message = format!("Unknown type {other:?} in HEALTHCHECK (try CMD)");
                Err(self.error("bad-healthcheck", message, "write `HEALTHCHECK CMD command` or `HEALTHCHECK NONE`", kind))
            }
        }
    }

    fn check_health_flag(&self, flag: &RawFlag) -> Result<(), Diagnostic> {
        let value = flag.value.as_deref().unwrap_or_default();
        if value.is_empty() || value.contains('$') {
            return Ok(());
        }
        let name = &flag.name;
        let error = |code, message: String, help: &str| Err(self.error(code, message, help, flag.range.clone()));
        if name == "retries" {
            return match value.parse::<i32>() {
                Ok(n) if n < 0 => error("bad-flag-value", format!("--retries cannot be negative ({n})"), "write a number such as 3"),
                Ok(_) => Ok(()),
                Err(_) => error("bad-flag-value", format!("invalid number {value:?} for --retries"), "write a number such as 3"),
            };
        }
        match duration::parse_nanos(value) {
            Err(e) => error("bad-duration", format!("{e} (--{name})"), "durations look like 30s, 1m30s or 500ms"),
            Ok(0) => Ok(()),
            Ok(nanos) if nanos < 1_000_000 => {
                error("bad-duration", format!("Interval {name:?} cannot be less than 1ms"), "durations look like 30s, 1m30s or 500ms")
            }
            Ok(_) => Ok(()),
        }
    }

    fn onbuild(&mut self, word: Range<usize>, rest: Range<usize>) -> Result<Kind, Diagnostic> {
        let (given, rest) = self.flags("ONBUILD", &[], word, rest)?;
        if rest.is_empty() {
            return Err(self.missing(&given, "requires at least one argument", "ONBUILD RUN make"));
        }
        let trigger = words::split_command(self.text(rest.clone()));
        let trigger_word = rest.start..rest.start + trigger.word.end;
        let trigger_rest = rest.start + trigger.rest.start..rest.start + trigger.rest.end;
        let error = |message: &str| Err(self.error("onbuild-not-allowed", message, "use another instruction", trigger_word.clone()));
        match self.text(trigger_word.clone()).to_ascii_uppercase().as_str() {
            "ONBUILD" => return error("Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed"),
            name @ ("FROM" | "MAINTAINER") => return error(&format!("{name} isn't allowed as an ONBUILD trigger")),
            _ => {}
        }
        let mut text = self.text(rest).to_owned();
        for heredoc in &self.heredocs {
            text.push('\n');
            text.push_str(&heredoc.body);
            text.push_str(&heredoc.head.name);
        }
        // Only for its findings: the trigger is read again, as text, in the image that fires it.
        self.kind(trigger_word, trigger_rest)?;
        Ok(Kind::Onbuild(text))
    }
}
