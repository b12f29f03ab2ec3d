//! `COPY` and `ADD`: sources of every kind into one file operation.

use ovenbird_dockerfile::Span;
use ovenbird_dockerfile::ast::{Source, Transfer};
use ovenbird_dockerfile::redact::without_passwords;
use ovenbird_oci::Digest;

use super::checks::error;
use super::stage::{NodeId, Step};
use super::{Lowering, Outcome, git_url, history, names, paths};
use crate::plan::{CopyAction, FileAction, FileOp, GitOp, HttpOp, Op, VertexId};

/// An instruction with all its words expanded.
struct Expanded<'t> {
    command: &'static str,
    transfer: &'t Transfer,
    paths: Vec<String>,
    files: Vec<(String, String)>,
    written_dest: String,
    dest: String,
    chown: Option<String>,
    chmod: Option<String>,
    excludes: Vec<String>,
    checksum: Option<String>,
}

impl Lowering<'_> {
    pub(super) fn transfer(&mut self, id: NodeId, transfer: &Transfer, is_add: bool, step: &Step<'_>) -> Outcome<()> {
        let span = step.instruction.span;
        let say = |message: String| error(if is_add { "add" } else { "copy" }, span, message);
        let expanded = self.expand_transfer(id, transfer, is_add, span)?;
        let from = match step.sources.first().copied().flatten() {
            None => None,
            Some(source) if self.nodes[source].dispatched => Some(source),
            Some(_) => {
                let from = transfer.from.as_deref().unwrap_or_default();
                let stage = &self.nodes[id].name;
                return Err(say(format!("cannot copy from stage {from:?}, it needs to be defined before current stage {stage:?}")));
            }
        };
        expanded.check().map_err(say)?;

        let (name, cost) = names::instruction(&step.instruction.original, self.expander, &self.nodes[id].state.env);
        self.spend(cost, span)?;
        let prefix = self.next_prefix(id, step);
        let shown = format!("{prefix}{name}");
        let no_cache = self.nodes[id].no_cache;
        let lines = self.lines(span);

        if from.is_none() {
            self.check_ignored(id, &expanded, span);
        }
        let mut actions: Vec<FileAction> = Vec::new();
        let mut keep_git_dir = transfer.keep_git_dir;
        for path in &expanded.paths {
            let copy = match git_url::parse(path) {
                Some(git) => {
                    if !is_add {
                        return Err(say("source can't be a git ref for COPY".into()));
                    }
                    let git = git.map_err(say)?;
                    if let (Some(flag), Some(query)) = (keep_git_dir, git.keep_git_dir)
                        && flag != query
                    {
                        return Err(say("inconsistent keep-git-dir configuration".into()));
                    }
                    keep_git_dir = git.keep_git_dir.or(keep_git_dir);
                    if let Some(checksum) = &expanded.checksum {
                        git_url::check_commit(checksum).map_err(|why| say(format!("checksum {why}")))?;
                    }
                    let checksum = match (&expanded.checksum, git.checksum) {
                        (Some(flag), Some(query)) if *flag != query => return Err(say(format!("checksum mismatch {flag:?} != {query:?}"))),
                        (flag, query) => query.or_else(|| flag.clone()),
                    };
                    let op = Op::Git(GitOp {
                        url: git.url,
                        reference: git.reference,
                        subdir: git.subdir,
                        keep_git_dir: keep_git_dir.unwrap_or(false),
                        checksum,
                        submodules: git.submodules.unwrap_or(true),
                    });
                    let from = self.vertices.add(op, shown.clone(), lines, no_cache);
                    expanded.action(from, ".".into())
                }
                None if is_url(path) => {
                    if !is_add {
                        return Err(say("source can't be a URL for COPY".into()));
                    }
                    let checksum =
                        expanded.checksum.as_deref().map(str::parse::<Digest>).transpose().map_err(|reason| say(reason.to_string()))?;
                    let (login, url) = git_url::split_login(path);
                    let filename = git_url::file_name(&url);
                    let op = Op::Http(HttpOp { url, login, filename: filename.clone(), checksum });
                    let from = self.vertices.add(op, shown.clone(), lines, no_cache);
                    CopyAction {
                        unpack: transfer.unpack.unwrap_or(false),
                        default_mode: Some(0o600),
                        ..expanded.action(from, escape_pattern(&filename))
                    }
                }
                None => {
                    let (vertex, keep_owner) = match from {
                        Some(source) => self.files_of(source),
                        None => (self.main_context(), false),
                    };
                    let source = if transfer.parents { pivoted(path) } else { paths::source(path) };
                    let unpack = transfer.unpack.unwrap_or(is_add);
                    CopyAction { unpack, keep_owner, ..expanded.action(vertex, source) }
                }
            };
            append(&mut actions, copy);
        }
        for (name, content) in &expanded.files {
            actions.push(FileAction::Inline {
                name: name.clone(),
                content: content.clone(),
                dest: expanded.dest.clone(),
                chown: expanded.chown.clone(),
                chmod: expanded.chmod.clone(),
            });
        }

        let base = self.nodes[id].state.root;
        // The mode of existing files cannot be changed in a layer that does not see what is below.
        let root = if transfer.link && expanded.chmod.is_none() {
            let layer = self.vertices.add(Op::File(FileOp { base: None, actions }), shown, lines, no_cache);
            self.vertices.add(Op::Merge { base, layer }, format!("{prefix}LINK {name}"), lines, no_cache)
        } else {
            self.vertices.add(Op::File(FileOp { base, actions }), shown, lines, no_cache)
        };
        let created_by = expanded.history();
        self.spend(created_by.len(), span)?;
        let state = &mut self.nodes[id].state;
        state.root = Some(root);
        state.commit(created_by, true);
        Ok(())
    }

    /// Warns of sources that the ignore file leaves out of the build context.
    fn check_ignored(&mut self, id: NodeId, expanded: &Expanded<'_>, span: Span) {
        let written = expanded.transfer.sources.iter().filter_map(|source| match source {
            Source::Path(path) => Some(path),
            Source::Heredoc(_) => None,
        });
        for (written, path) in written.zip(&expanded.paths) {
            let known = !(self.nodes[id].state.unknown && written.contains('$'));
            if known && !is_url(path) && git_url::parse(path).is_none() && self.options.ignore.leaves_out_source(path) {
                let verb = if expanded.command == "ADD" { "Add" } else { "Copy" };
                let cleaned = ovenbird_dockerfile::ignore::clean(path);
                let message = format!("Attempting to {verb} file {} that is excluded by .dockerignore", history::quote(&cleaned));
                let help = "take it back in with a `!` pattern in the ignore file, or do not name it here";
                self.checks.warn("CopyIgnoredFile", span, message, Some(help));
            }
        }
    }

    fn expand_transfer<'t>(&mut self, id: NodeId, transfer: &'t Transfer, is_add: bool, span: Span) -> Outcome<Expanded<'t>> {
        let optional = |lowering: &mut Self, word: &Option<String>| -> Outcome<Option<String>> {
            let word = word.as_ref().map(|word| lowering.word(id, word, span)).transpose()?;
            Ok(word.filter(|word| !word.is_empty()))
        };
        let chown = optional(self, &transfer.chown)?;
        let chmod = optional(self, &transfer.chmod)?;
        let checksum = optional(self, &transfer.checksum)?;
        let (mut paths, mut files) = (Vec::new(), Vec::new());
        for source in &transfer.sources {
            match source {
                Source::Path(path) => paths.push(self.word(id, path, span)?),
                Source::Heredoc(heredoc) => {
                    let content = if heredoc.expand { self.heredoc(id, &heredoc.content, span)? } else { heredoc.content.clone() };
                    files.push((heredoc.name.clone(), content));
                }
            }
        }
        let written_dest = self.word(id, &transfer.dest, span)?;
        let excludes = transfer.excludes.iter().map(|pattern| self.word(id, pattern, span)).collect::<Outcome<_>>()?;
        let dest = paths::destination(&self.nodes[id].state.cwd, &written_dest);
        let command = if is_add { "ADD" } else { "COPY" };
        Ok(Expanded { command, transfer, paths, files, written_dest, dest, chown, chmod, excludes, checksum })
    }

    /// Root of a node as a source, and whether its owners count. A root without files is made explicit.
    fn files_of(&mut self, id: NodeId) -> (VertexId, bool) {
        if let Some(root) = self.nodes[id].state.root {
            return (root, !matches!(self.vertices.op(root), Op::Local { .. }));
        }
        let op = Op::File(FileOp { base: None, actions: vec![] });
        (self.vertices.add(op, "[internal] empty root".into(), None, false), true)
    }
}

impl Expanded<'_> {
    fn check(&self) -> Result<(), String> {
        if let Some(chmod) = &self.chmod {
            check_mode(chmod)?;
        }
        if self.checksum.is_some() {
            if self.command == "COPY" {
                return Err("checksum can't be specified for COPY".into());
            }
            let [source] = self.paths.as_slice() else {
                return Err("checksum can't be specified for multiple sources".into());
            };
            if !is_url(source) && git_url::parse(source).is_none() {
                return Err("checksum requires HTTP(S) or Git sources".into());
            }
        }
        Ok(())
    }

    fn action(&self, from: VertexId, source: String) -> CopyAction {
        CopyAction {
            chown: self.chown.clone(),
            chmod: self.chmod.clone(),
            parents: self.transfer.parents,
            excludes: self.excludes.clone(),
            ..CopyAction::new(from, source, self.dest.clone())
        }
    }

    fn history(&self) -> String {
        let mut line = self.command.to_owned();
        let mut word = |word: &str| {
            line.push(' ');
            line.push_str(word);
        };
        if self.transfer.parents {
            word("--parents");
        }
        if let Some(chown) = &self.chown {
            word(&format!("--chown={chown}"));
        }
        if let Some(chmod) = &self.chmod {
            word(&format!("--chmod={chmod}"));
        }
        self.paths.iter().for_each(|path| word(&without_passwords(path)));
        self.files.iter().for_each(|(name, _)| word(&format!("<<{name}")));
        word(&self.written_dest);
        line + " # buildkit"
    }
}

/// Adds to the last action when only the source differs.
fn append(actions: &mut Vec<FileAction>, mut copy: CopyAction) {
    if let Some(FileAction::Copy(last)) = actions.last_mut() {
        let sources = std::mem::take(&mut copy.sources);
        let before = std::mem::take(&mut last.sources);
        let same = *last == copy;
        last.sources = before;
        if same {
            last.sources.extend(sources);
            return;
        }
        copy.sources = sources;
    }
    actions.push(FileAction::Copy(copy));
}

fn is_url(source: &str) -> bool {
    source.starts_with("http://") || source.starts_with("https://")
}

/// Source of `--parents`: what stands before `/./` is not repeated in the destination.
fn pivoted(path: &str) -> String {
    match path.split_once("/./") {
        Some((parent, pattern)) => match (paths::source(parent), paths::source(pattern)) {
            (parent, pattern) if parent == "." => pattern,
            (parent, pattern) => format!("{parent}/./{pattern}"),
        },
        None => paths::source(path),
    }
}

/// A name that must not be read as a wildcard.
fn escape_pattern(name: &str) -> String {
    name.chars().flat_map(|c| if matches!(c, '*' | '?' | '[' | '\\') { vec!['\\', c] } else { vec![c] }).collect()
}

/// Octal up to 07777, or symbolic as `chmod` reads it: `u=rwX,go-w`.
fn check_mode(mode: &str) -> Result<(), String> {
    let invalid = || format!("invalid chmod parameter: '{mode}'. it should be octal string and between 0 and 07777");
    if mode.bytes().all(|c| c.is_ascii_digit()) {
        return u32::from_str_radix(mode, 8).ok().filter(|bits| *bits <= 0o7777).map(|_| ()).ok_or_else(invalid);
    }
    let clause = |clause: &str| {
        let rest = clause.trim_start_matches(['u', 'g', 'o', 'a']);
        let mut operations = 0;
        let mut in_operation = false;
        for c in rest.chars() {
            match c {
                '+' | '-' | '=' => {
                    operations += 1;
                    in_operation = true;
                }
                'r' | 'w' | 'x' | 'X' | 's' | 't' | 'u' | 'g' | 'o' if in_operation => {}
                _ => return false,
            }
        }
        operations > 0
    };
    if mode.split(',').all(clause) { Ok(()) } else { Err(format!("{}, or symbolic like u=rwX,go=rX", invalid())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes() {
        for good in ["0", "755", "07777", "u=rwX,go=rX", "+x", "go-w", "a+X", "u+rw-x", "=", "g=u"] {
            assert_eq!(check_mode(good), Ok(()), "{good}");
        }
        for bad in ["8", "17777", "99999999999", "rwx", "u", "u=q", "u=r,", "-rw-r--r--8", "0755x"] {
            assert!(check_mode(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn pivots() {
        for (path, expect) in
            [("a/b", "a/b"), ("./a/./b/", "a/./b"), ("/./b", "b"), ("././b", "b"), ("../x/./../y", "x/./y"), ("a/./.", "a/./.")]
        {
            assert_eq!(pivoted(path), expect, "{path}");
        }
        assert_eq!(escape_pattern("a*[b]?\\"), "a\\*\\[b]\\?\\\\");
    }
}
