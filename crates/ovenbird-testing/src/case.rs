//! The literate build cases: Markdown files under `tests/cases/`, one heading `## name` a case. Format: `tests/cases/README.md`.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::needs::Need;
use crate::{AtPath, Error, Result};

/// One case.
#[derive(Debug, Clone, Default)]
pub struct Case {
    /// `feature/file/name`.
    pub name: String,
    /// Where it is written.
    pub file: PathBuf,
    /// Line of its heading, from 1.
    pub line: usize,
    /// What the machine must have.
    pub needs: Vec<Need>,
    /// Files of the build context.
    pub files: Vec<ContextFile>,
    /// Shell script that prepares the context.
    pub setup: Option<String>,
    /// Environment of the command.
    pub env: Vec<(String, String)>,
    /// Standard input of the command.
    pub stdin: Option<String>,
    /// Context argument instead of the context folder.
    pub context: Option<String>,
    /// The build.
    pub first: Build,
    /// Shell script between two builds; without it there is one build only.
    pub then: Option<String>,
    /// The second build.
    pub second: Build,
}

/// A file of the context.
#[derive(Debug, Clone)]
pub struct ContextFile {
    /// Relative to the context.
    pub path: String,
    /// Content.
    pub content: String,
    /// Permission bits.
    pub mode: u32,
}

/// One build and what is expected of it.
#[derive(Debug, Clone, Default)]
pub struct Build {
    /// More arguments of `ovenbird build`.
    pub args: Vec<String>,
    /// The build must fail like this.
    pub error: Option<Failure>,
    /// Lines of the file system.
    pub tree: Option<String>,
    /// Subset of the image config.
    pub config: Option<Value>,
    /// The last `created_by` lines.
    pub history: Option<Vec<String>>,
    /// Layers above the base image.
    pub layers: Option<usize>,
    /// Substrings of the progress log; a leading `!` means: not there.
    pub output: Vec<String>,
    /// Shell script that must succeed after the build.
    pub check: Option<String>,
}

/// How a build must fail.
#[derive(Debug, Clone, Default)]
pub struct Failure {
    /// Exit code; any but 0, 1 (a bug) and 101 (a panic) if absent.
    pub exit: Option<i32>,
    /// Substrings of the output, in any case of letters.
    pub texts: Vec<String>,
}

/// All cases below a folder, in the order of file names.
pub fn read_all(dir: &Path) -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    let mut folders = vec![dir.to_path_buf()];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).at("cannot list", &folder)? {
            let path = entry.at("cannot list", &folder)?.path();
            if path.is_dir() {
                folders.push(path);
            } else if folder != dir && path.extension().is_some_and(|ending| ending == "md") {
                files.push(path);
            }
        }
    }
    files.sort();
    for file in files {
        let text = fs::read_to_string(&file).at("cannot read", &file)?;
        let prefix = file.strip_prefix(dir).unwrap_or(&file).with_extension("");
        cases.extend(parse(&text, &file, &prefix.to_string_lossy())?);
    }
    let mut names: Vec<&str> = cases.iter().map(|case| case.name.as_str()).collect();
    names.sort_unstable();
    if let Some(name) = names.iter().zip(names.iter().skip(1)).find_map(|(one, next)| (one == next).then_some(one)) {
        return Err(Error::Malformed { place: dir.display().to_string(), reason: format!("two cases are named {name}") });
    }
    Ok(cases)
}

/// Cases of one file. What stands before the first heading is part of each of them.
pub fn parse(text: &str, file: &Path, prefix: &str) -> Result<Vec<Case>> {
    let mut shared = Case { file: file.to_path_buf(), ..Case::default() };
    let mut cases: Vec<Case> = Vec::new();
    let mut lines = text.lines().enumerate();
    while let Some((index, line)) = lines.next() {
        let bad = |reason: String| Error::Malformed { place: format!("{}:{}", file.display(), index + 1), reason };
        let case = cases.last_mut().unwrap_or(&mut shared);
        if let Some(name) = line.strip_prefix("## ") {
            let name = format!("{prefix}/{}", name.trim());
            cases.push(Case { name, line: index + 1, ..shared.clone() });
        } else if let Some(words) = line.strip_prefix("needs:") {
            for word in words.split([',', ' ']).filter(|word| !word.is_empty()) {
                case.needs.push(Need::parse(word).ok_or_else(|| bad(format!("unknown need {word:?}")))?);
            }
        } else if line.starts_with("```") {
            let fence = &line[..line.len() - line.trim_start_matches('`').len()];
            let info: Vec<&str> = line[fence.len()..].split_whitespace().collect();
            let mut body = String::new();
            loop {
                match lines.next() {
                    None => return Err(bad("the block is not closed".into())),
                    Some((_, line)) if line == fence => break,
                    Some((_, line)) => {
                        body.push_str(line);
                        body.push('\n');
                    }
                }
            }
            block(case, &info, body).map_err(bad)?;
        }
    }
    for case in &cases {
        let place = format!("{}:{}", file.display(), case.line);
        check(case).map_err(|reason| Error::Malformed { place, reason: format!("{}: {reason}", case.name) })?;
    }
    Ok(cases)
}

fn check(case: &Case) -> std::result::Result<(), String> {
    let expects = |build: &Build| {
        build.error.is_some()
            || build.tree.is_some()
            || build.config.is_some()
            || build.history.is_some()
            || build.layers.is_some()
            || !build.output.is_empty()
            || build.check.is_some()
    };
    // A first build may only be there for the second; it must succeed.
    if !expects(&case.first) && !expects(&case.second) {
        return Err("nothing is expected".into());
    }
    if case.then.is_some() != expects(&case.second) {
        return Err("a second build needs both a `then` block and something expected of it".into());
    }
    Ok(())
}

fn block(case: &mut Case, info: &[&str], body: String) -> std::result::Result<(), String> {
    let (&kind, words) = info.split_first().ok_or("a block without a kind")?;
    let lines = || body.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect::<Vec<_>>();
    let (kind, build) = match kind.strip_suffix("-2") {
        Some(kind) => (kind, &mut case.second),
        None => (kind, &mut case.first),
    };
    match kind {
        "dockerfile" => {
            let path = words.first().unwrap_or(&"Dockerfile");
            case.files.push(ContextFile { path: (*path).to_owned(), content: body, mode: 0o644 });
        }
        "file" => {
            let (path, options) = words.split_first().ok_or("a file block needs a path")?;
            let mut file = ContextFile { path: (*path).to_owned(), content: body, mode: 0o644 };
            for option in options {
                match option.split_once('=') {
                    Some(("mode", mode)) => file.mode = u32::from_str_radix(mode, 8).map_err(|_| format!("bad mode {mode:?}"))?,
                    Some(("eol", "none")) => file.content.truncate(file.content.trim_end_matches('\n').len()),
                    _ => return Err(format!("unknown option {option:?}")),
                }
            }
            case.files.push(file);
        }
        "setup" => case.setup = Some(case.setup.take().unwrap_or_default() + &body),
        "env" => {
            for line in lines() {
                let (name, value) = line.split_once('=').ok_or_else(|| format!("no = in {line:?}"))?;
                case.env.push((name.to_owned(), value.to_owned()));
            }
        }
        "stdin" => case.stdin = Some(body),
        "context" => case.context = Some(body.trim().to_owned()),
        "then" => case.then = Some(body),
        "args" => build.args.extend(lines()),
        "tree" => build.tree = Some(body),
        "history" => build.history = Some(lines()),
        "output" => build.output.extend(lines()),
        "check" => build.check = Some(body),
        "config" => {
            let text = body.replace("{PATH}", crate::base::DEFAULT_PATH);
            build.config = Some(serde_json::from_str(&text).map_err(|error| format!("config: {error}"))?);
        }
        "layers" => build.layers = Some(body.trim().parse().map_err(|_| format!("layers: {body:?} is no number"))?),
        "error" => {
            let mut failure = Failure { exit: None, texts: lines() };
            if let Some(code) = failure.texts.first().and_then(|line| line.strip_prefix("exit ")) {
                failure.exit = Some(code.parse().map_err(|_| format!("bad exit code {code:?}"))?);
                failure.texts.remove(0);
            }
            build.error = Some(failure);
        }
        _ => return Err(format!("unknown kind of block {kind:?}")),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_shared_blocks_and_two_builds() -> Result<()> {
        let text = "# Title\n```file a\nx\n```\n## one\nneeds: run registry\n````dockerfile\nFROM scratch\n````\n```error\nexit 4\nword\n```\n\
                    ## two\n```layers\n1\n```\n```then\ntrue\n```\n```args-2\n--no-cache\n```\n```output-2\nran\n```\n";
        let cases = parse(text, Path::new("f.md"), "feature/f")?;
        assert_eq!(cases.iter().map(|case| case.name.as_str()).collect::<Vec<_>>(), ["feature/f/one", "feature/f/two"]);
        assert_eq!(cases[0].needs, [Need::Run, Need::Registry]);
        assert_eq!(cases[0].files.iter().map(|file| file.path.as_str()).collect::<Vec<_>>(), ["a", "Dockerfile"]);
        assert_eq!(cases[0].first.error.as_ref().and_then(|failure| failure.exit), Some(4));
        assert_eq!((cases[1].files.len(), cases[1].second.args.len(), cases[1].line), (1, 1, 14));
        Ok(())
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        for (text, expected) in [
            ("## a\n```tee\n```\n", "unknown kind of block"),
            ("## a\n```tree\n", "not closed"),
            ("## a\nneeds: magic\n", "unknown need"),
            ("## a\n```dockerfile\n```\n", "nothing is expected"),
            ("## a\n```layers\n1\n```\n```then\n```\n", "second build"),
            ("## a\n```file x mood=1\n```\n", "unknown option"),
        ] {
            let error = parse(text, Path::new("f.md"), "f").err().map(|error| error.to_string()).unwrap_or_default();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
    }
}
