//! Edits of a Dockerfile's text, by the places that the parser gives. What is not changed stays byte for byte.

use std::collections::BTreeMap;

use ovenbird_dockerfile::ast::Kind;
use ovenbird_dockerfile::expand::{Env, Expander};
use ovenbird_dockerfile::{Dockerfile, parse};

/// Pieces of text and where they go; a place is `start..end`.
fn splice(text: &str, mut edits: Vec<(std::ops::Range<usize>, String)>) -> String {
    edits.sort_by_key(|(place, _)| std::cmp::Reverse(place.start));
    let mut text = text.to_owned();
    for (place, new) in edits {
        if text.get(place.clone()).is_some() {
            text.replace_range(place, &new);
        }
    }
    text
}

/// The end of the line that a place ends in.
fn line_end(text: &str, at: usize) -> usize {
    text.get(at..).and_then(|rest| rest.find('\n')).map_or(text.len(), |length| at + length)
}

/// Where the base stands in the text of a `FROM`.
fn base_place(text: &str, span: (usize, usize), base: &str) -> Option<std::ops::Range<usize>> {
    let line = text.get(span.0..span.1)?;
    let mut at = 0;
    let mut words = vec![];
    for word in line.split(|c: char| c.is_whitespace()) {
        if !word.is_empty() && word != "\\" && word != "`" {
            words.push((at, word));
        }
        at += word.len() + 1;
    }
    // The separators of a multi-byte blank are longer, which only makes the comparison fail.
    let (at, word) = words.into_iter().skip(1).find(|(_, word)| !word.starts_with("--"))?;
    (word == base).then(|| span.0 + at..span.0 + at + word.len())
}

/// A stage that begins with an image.
pub(crate) struct StageBase {
    /// Which stage.
    pub(crate) index: usize,
    /// The image as written.
    pub(crate) written: String,
    /// The same, with the values of global arguments.
    pub(crate) name: String,
}

/// The stages that begin with an image, not with another stage, a named context or `scratch`.
pub(crate) fn bases(text: &str, build_args: &BTreeMap<String, String>, contexts: &[&str]) -> Vec<StageBase> {
    let file = parse(text).dockerfile;
    let env = global(&file, build_args);
    let expander = Expander { escape: file.directives.escape, ..Expander::default() };
    let mut names: Vec<&str> = vec![];
    let mut found = vec![];
    for (index, stage) in file.stages.iter().enumerate() {
        let name = expander.word(&stage.base, &env).map(|expanded| expanded.value).unwrap_or_else(|_| stage.base.clone());
        let known = names.iter().any(|known| known.eq_ignore_ascii_case(&name)) || contexts.contains(&name.as_str());
        if !known && name != "scratch" {
            found.push(StageBase { index, written: stage.base.clone(), name });
        }
        names.extend(stage.name.as_deref());
    }
    found
}

/// Global arguments.
#[derive(Default)]
struct Globals(BTreeMap<String, String>);

impl Env for Globals {
    fn get(&self, name: &str) -> Option<String> {
        self.0.get(name).cloned()
    }
}

fn global(file: &Dockerfile, build_args: &BTreeMap<String, String>) -> Globals {
    let mut env = Globals::default();
    for instruction in &file.global_args {
        let Kind::Arg(declared) = &instruction.kind else { continue };
        for arg in declared {
            let default = || arg.default.as_ref().and_then(|default| Expander::default().word(default, &env).ok()).map(|e| e.value);
            if let Some(value) = build_args.get(&arg.name).cloned().or_else(default) {
                env.0.insert(arg.name.clone(), value);
            }
        }
    }
    env
}

/// With other bases: by the number of the stage.
pub(crate) fn with_bases(text: &str, new: &BTreeMap<usize, String>) -> Result<String, String> {
    let file = parse(text).dockerfile;
    let mut edits = vec![];
    for (index, base) in new {
        let Some(stage) = file.stages.get(*index) else { continue };
        let place = base_place(text, (stage.span.start, stage.span.end), &stage.base)
            .ok_or_else(|| format!("cannot find {:?} in its FROM line; write the line without continuations", stage.base))?;
        edits.push((place, base.clone()));
    }
    Ok(splice(text, edits))
}

/// With lines behind each `FROM`.
pub(crate) fn after_each_from(text: &str, lines: &str) -> String {
    let file = parse(text).dockerfile;
    splice(text, file.stages.iter().map(|stage| line_end(text, stage.span.end)).map(|at| (at..at, format!("\n{lines}"))).collect())
}

/// With lines at the end of the stage that is built.
pub(crate) fn at_end(text: &str, target: Option<&str>, lines: &str) -> Result<String, String> {
    let file = parse(text).dockerfile;
    let number = |name: &str| name.parse::<usize>().ok().and_then(|number| file.stages.get(number));
    let stage = match target {
        None => file.stages.last(),
        Some(name) => file.stages.iter().find(|stage| stage.name.as_deref() == Some(&name.to_lowercase())).or_else(|| number(name)),
    };
    let stage = stage.ok_or("the Dockerfile has no such stage")?;
    let end = stage.instructions.last().map_or(stage.span.end, |last| last.span.end);
    let at = line_end(text, end.saturating_sub(usize::from(text.get(..end).is_some_and(|before| before.ends_with('\n')))));
    let tail = if at == text.len() && !text.ends_with('\n') { "\n" } else { "" };
    Ok(splice(text, vec![(at..at, format!("\n{}{tail}", lines.trim_end()))]))
}

/// With these flags on every `RUN`.
pub(crate) fn on_each_run(text: &str, flags: &str) -> String {
    let file = parse(text).dockerfile;
    let runs = file.stages.iter().flat_map(|stage| &stage.instructions).filter(|one| matches!(one.kind, Kind::Run(_)));
    splice(text, runs.map(|run| run.span.start + "RUN".len()).map(|at| (at..at, format!(" {flags}"))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "ARG V=12\nFROM --platform=linux/amd64 debian:$V AS Base\nRUN a \\\n  b\nFROM base\nrun <<EOF\nx\nEOF\nFROM \\\n  busybox AS last\nUSER u";

    #[test]
    fn edits() {
        let args = BTreeMap::new();
        let found = bases(TEXT, &args, &[]);
        let told: Vec<_> = found.iter().map(|base| format!("{} {} {}", base.index, base.written, base.name)).collect();
        assert_eq!(told, ["0 debian:$V debian:12", "2 busybox busybox"]);
        let told = bases(TEXT, &BTreeMap::from([("V".into(), "13".into())]), &["busybox"]).into_iter().map(|b| b.name).collect::<Vec<_>>();
        assert_eq!(told, ["debian:13"]);
        let new = with_bases(TEXT, &BTreeMap::from([(0, "x@sha256:1".into()), (2, "y".into())])).unwrap();
        assert_eq!(new, TEXT.replace("debian:$V", "x@sha256:1").replace("busybox", "y"));
        assert_eq!(after_each_from("FROM a\nRUN b\nFROM c", "ARG X"), "FROM a\nARG X\nRUN b\nFROM c\nARG X");
        assert_eq!(on_each_run(TEXT, "--x"), TEXT.replace("RUN a", "RUN --x a").replace("run <<", "run --x <<"));
        assert_eq!(at_end(TEXT, None, "COPY a b\n").unwrap(), format!("{TEXT}\nCOPY a b\n"));
        assert_eq!(at_end(TEXT, Some("BASE"), "COPY a b").unwrap(), TEXT.replace("  b\n", "  b\nCOPY a b\n"));
        assert_eq!(at_end("FROM a\nRUN <<E\nx\nE\n", None, "L").unwrap(), "FROM a\nRUN <<E\nx\nE\nL\n");
        assert!(at_end(TEXT, Some("none"), "x").is_err());
    }
}
