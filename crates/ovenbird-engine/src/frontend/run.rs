//! `RUN`: what is executed, with which variables, mounts and rights.

use std::collections::BTreeSet;

use ovenbird_dockerfile::Span;
use ovenbird_dockerfile::ast::{Command, Flag, Heredoc, Run};
use ovenbird_dockerfile::expand::{Expanded, Expander};
use ovenbird_dockerfile::mount::{self, MountKind};

use super::checks::error;
use super::history::quote;
use super::scope::{Masked, Variables};
use super::stage::{NodeId, State, Step};
use super::{Lowering, Outcome, image_config, names, paths};
use crate::plan::{ExecMount, ExecMountKind, ExecOp, NetworkMode, Op, Security};

/// Where files made from here-documents appear in the step.
const PIPES: &str = "/dev/pipes/";

impl Lowering<'_> {
    pub(super) fn run(&mut self, id: NodeId, run: &Run, step: &Step<'_>) -> Outcome<()> {
        let span = step.instruction.span;
        let script = Script::of(run);
        let state = &self.nodes[id].state;
        let (args, inline_files) = match &script {
            Script::Exec(args) => ((*args).clone(), vec![]),
            Script::Shell(text) => (image_config::with_shell(&state.config, text), vec![]),
            Script::File(heredoc) if state.config.os != "windows" => {
                let path = format!("{PIPES}{}", paths::base_name(&heredoc.name));
                (image_config::with_shell(&state.config, &path), vec![(path, heredoc.content.clone(), 0o755)])
            }
            Script::File(heredoc) => (image_config::with_shell(&state.config, &heredoc.content), vec![]),
        };
        let mounts = self.mounts(id, run, step)?;
        let network = self.network_mode(run, span)?;
        let security = self.security(run, span)?;
        if let Some(device) = run.devices.first() {
            let mut diagnostic = error("device", span, format!("RUN --device={device} cannot be honoured: no device is given to a step"));
            diagnostic.help = Some("remove the flag".into());
            return Err(diagnostic);
        }
        if let Script::Exec(args) = &script
            && args.first().is_none_or(String::is_empty)
        {
            let mut diagnostic = error("empty-command", span, "RUN has no command: the command is empty");
            diagnostic.help = Some("name a program, for example RUN [\"make\"], or remove the instruction".into());
            return Err(diagnostic);
        }

        let name = self.run_name(id, run, step, &mounts)?;
        let state = &self.nodes[id].state;
        let created_by = format!("RUN {} # buildkit", with_args(state, &args));
        let env = state.env.to_strings();
        self.spend(created_by.len() + env.iter().map(String::len).sum::<usize>(), span)?;
        let state = &self.nodes[id].state;
        let hostname = self.options.hostname.as_ref().or_else(|| self.options.build_args.get("BUILDKIT_SANDBOX_HOSTNAME"));
        let op = Op::Exec(ExecOp {
            base: state.root,
            args,
            env,
            arguments: state.args.iter().map(|(name, _)| name.clone()).collect(),
            proxy_env: self.proxy_env.clone(),
            cwd: state.cwd.clone(),
            user: state.config.config.user.clone(),
            network,
            security,
            mounts,
            inline_files,
            hostname: hostname.filter(|h| !h.is_empty()).cloned().unwrap_or_else(|| ovenbird_sandbox::DEFAULT_HOSTNAME.into()),
            hosts: self.options.add_hosts.clone(),
        });
        let root = self.vertices.add(op, name, self.lines(span), self.nodes[id].no_cache);
        let state = &mut self.nodes[id].state;
        state.root = Some(root);
        state.commit(created_by, true);
        Ok(())
    }

    fn run_name(&mut self, id: NodeId, run: &Run, step: &Step<'_>, mounts: &[ExecMount]) -> Outcome<String> {
        let mut original = step.instruction.original.trim().to_owned();
        if let ([heredoc, ..], true) = (run.heredocs.as_slice(), is_pure(run)) {
            original = format!("{original} ({})", names::summary(&heredoc.content));
        }
        let masked: BTreeSet<String> = mounts
            .iter()
            .filter_map(|mount| match &mount.kind {
                ExecMountKind::Secret { env, .. } => env.clone(),
                _ => None,
            })
            .collect();
        let expander = Expander { escape: self.expander.escape, keep_unset: true, raw_quotes: true };
        let env = Masked { base: &self.nodes[id].state.env, masked: &masked };
        let (text, cost) = names::instruction(&original, expander, &env);
        self.spend(cost, step.instruction.span)?;
        Ok(self.next_prefix(id, step) + &text)
    }

    fn network_mode(&self, run: &Run, span: Span) -> Outcome<NetworkMode> {
        match run.network.as_deref() {
            None | Some("" | "default") => Ok(self.options.network),
            Some("none") => Ok(NetworkMode::None),
            Some("host") if self.options.network == NetworkMode::Host => Ok(NetworkMode::Host),
            Some("host") => self.entitled("network.host", "--network=host", span).map(|()| NetworkMode::Host),
            Some(other) => Err(error("network", span, format!("unsupported network mode {}: use default, none or host", quote(other)))),
        }
    }

    fn security(&self, run: &Run, span: Span) -> Outcome<Security> {
        match run.security.as_deref() {
            None | Some("" | "sandbox") => Ok(Security::Sandbox),
            Some("insecure") => self.entitled("security.insecure", "--security=insecure", span).map(|()| Security::Insecure),
            Some(other) => Err(error("security", span, format!("unsupported security mode {}: use sandbox or insecure", quote(other)))),
        }
    }

    fn entitled(&self, entitlement: &str, flag: &str, span: Span) -> Outcome<()> {
        if self.options.entitlements.iter().any(|given| given == entitlement) {
            return Ok(());
        }
        let mut diagnostic =
            error("entitlement", span, format!("RUN {flag} is not allowed: the build lacks the entitlement {entitlement}"));
        diagnostic.help = Some(format!("build with --allow {entitlement} if you trust this Dockerfile"));
        Err(diagnostic)
    }

    fn mounts(&mut self, id: NodeId, run: &Run, step: &Step<'_>) -> Outcome<Vec<ExecMount>> {
        let mut mounts = Vec::with_capacity(run.mounts.len());
        for (number, flag) in run.mounts.iter().enumerate() {
            let source = step.sources.get(number).copied().flatten();
            mounts.push(self.mount(id, flag, source, step.instruction.span, &mounts)?);
        }
        Ok(mounts)
    }

    fn mount(&mut self, id: NodeId, flag: &Flag, source_node: Option<NodeId>, span: Span, before: &[ExecMount]) -> Outcome<ExecMount> {
        let value = flag.value.as_deref().unwrap_or_default();
        let (expander, env) = (self.expander, &self.nodes[id].state.env);
        let mut seen: Vec<Expanded> = Vec::new();
        let parsed = mount::parse_expanding(value, &mut |raw| {
            let expanded = expander.word(raw, env)?;
            seen.push(expanded.clone());
            Ok(expanded.value)
        });
        let parsed = parsed.map_err(|reason| error("mount", flag.span, reason.to_string()))?;
        for expanded in seen {
            self.spend(expanded.value.len(), span)?;
            self.report_unset(id, &expanded.unset, span);
        }
        let cwd = self.nodes[id].state.cwd.clone();
        let place = |target: &Option<String>| {
            let given = target.as_deref().unwrap_or_default();
            let absolute = paths::absolute(&cwd, given);
            if given.is_empty() || absolute == "/" {
                return Err(error("mount", flag.span, format!("invalid mount target {}", quote(if given.is_empty() { "" } else { "/" }))));
            }
            Ok(absolute)
        };
        let target = match (&parsed.kind, &parsed.target) {
            (MountKind::Secret { env: Some(_), .. }, None) => String::new(),
            (MountKind::Secret { id, .. }, None) => format!("/run/secrets/{}", paths::base_name(id)),
            (MountKind::Ssh { .. }, None) => {
                let agents = before.iter().filter(|m| matches!(m.kind, ExecMountKind::Ssh { .. })).count();
                format!("/run/buildkit/ssh_agent.{agents}")
            }
            (_, target) => place(target)?,
        };
        let below = |source: Option<String>| paths::source(source.as_deref().unwrap_or_default());
        let kind = match parsed.kind {
            MountKind::Bind { from, source, writable } => {
                let from = match from {
                    Some(_) => self.mounted(id, source_node, value, &target, flag.span)?,
                    None => Some(self.main_context()),
                };
                ExecMountKind::Bind { from, source: below(source), writable }
            }
            MountKind::Cache { id: cache, from, source, sharing, read_only, mode, uid, gid } => {
                let from = match from {
                    Some(_) => self.mounted(id, source_node, value, &target, flag.span)?,
                    None => None,
                };
                let cache = cache.filter(|id| !id.is_empty()).unwrap_or_else(|| clean(parsed.target.as_deref().unwrap_or_default()));
                let cache = match self.options.build_args.get("BUILDKIT_CACHE_MOUNT_NS").filter(|ns| !ns.is_empty()) {
                    Some(namespace) => format!("{namespace}/{cache}"),
                    None => cache,
                };
                ExecMountKind::Cache {
                    id: cache,
                    from,
                    source: below(source),
                    sharing,
                    read_only,
                    mode: mode.unwrap_or(0o755),
                    uid: uid.unwrap_or(0),
                    gid: gid.unwrap_or(0),
                }
            }
            MountKind::Tmpfs { size } => ExecMountKind::Tmpfs { size },
            MountKind::Secret { id, env, required, mode, uid, gid } => {
                ExecMountKind::Secret { id, env, required, mode: mode.unwrap_or(0o400), uid: uid.unwrap_or(0), gid: gid.unwrap_or(0) }
            }
            MountKind::Ssh { id, required, mode, uid, gid } => {
                ExecMountKind::Ssh { id, required, mode: mode.unwrap_or(0o600), uid: uid.unwrap_or(0), gid: gid.unwrap_or(0) }
            }
        };
        Ok(ExecMount { target, kind })
    }

    /// Files of the node that a mount names.
    fn mounted(&self, id: NodeId, source: Option<NodeId>, value: &str, target: &str, span: Span) -> Outcome<Option<usize>> {
        let from = mount_from(value).ok().flatten().unwrap_or_default();
        match source.map(|source| &self.nodes[source]) {
            Some(node) if node.dispatched => Ok(node.state.root),
            _ => Err(error(
                "mount",
                span,
                format!(
                    "cannot mount from stage {} to {}, stage needs to be defined before current stage {}",
                    quote(&from),
                    quote(target),
                    quote(&self.nodes[id].name)
                ),
            )),
        }
    }
}

/// How a `RUN` is executed.
enum Script<'r> {
    Exec(&'r Vec<String>),
    /// Text for the shell.
    Shell(String),
    /// A here-document with a shebang: a file of its own.
    File(&'r Heredoc),
}

impl<'r> Script<'r> {
    fn of(run: &'r Run) -> Self {
        match (&run.command, run.heredocs.as_slice()) {
            (Command::Exec(args), _) => Self::Exec(args),
            (Command::Shell(_), [first, ..]) if is_pure(run) && first.content.starts_with("#!") => Self::File(first),
            (Command::Shell(_), [first, ..]) if is_pure(run) => Self::Shell(first.content.clone()),
            (Command::Shell(text), heredocs) => {
                let mut text = text.clone();
                for heredoc in heredocs {
                    text.push('\n');
                    text.push_str(&heredoc.content);
                    text.push_str(&heredoc.name);
                }
                Self::Shell(text)
            }
        }
    }
}

/// Is the whole command one here-document, so that its content is the script?
fn is_pure(run: &Run) -> bool {
    let Command::Shell(text) = &run.command else { return false };
    let text = text.trim();
    let Some((descriptor, rest)) = text.split_once("<<") else { return false };
    let rest = rest.strip_prefix('-').unwrap_or(rest);
    !run.heredocs.is_empty()
        && descriptor.bytes().all(|c| c.is_ascii_digit())
        && !rest.is_empty()
        && !rest.contains('<')
        && is_one_word(rest)
}

/// No blank outside quotes.
fn is_one_word(text: &str) -> bool {
    let mut quote = None;
    for c in text.chars() {
        match quote {
            Some(open) if c == open => quote = None,
            None if c == '"' || c == '\'' => quote = Some(c),
            None if c.is_whitespace() => return false,
            _ => {}
        }
    }
    true
}

/// The command behind the declared arguments: `|1 FOO=bar /bin/sh -c make`.
fn with_args(state: &State, args: &[String]) -> String {
    let mut declared = Variables::default();
    for (name, value) in &state.args {
        declared.set(name, state.env.lookup(name).or(value.as_deref()).unwrap_or_default());
    }
    let declared = declared.to_strings();
    let mut words = Vec::with_capacity(declared.len() + args.len() + 1);
    if !declared.is_empty() {
        words.push(format!("|{}", declared.len()));
        words.extend(declared);
    }
    words.extend(args.iter().cloned());
    words.join(" ")
}

/// Go's `path.Clean`, for the name of a cache that is its target.
fn clean(path: &str) -> String {
    let cleaned = paths::absolute("/", path);
    if path.starts_with('/') { cleaned } else { cleaned.trim_start_matches('/').to_owned() }
}

/// `from=` of a mount, before anything is expanded.
pub(super) fn mount_from(value: &str) -> Result<Option<String>, String> {
    let mut from = None;
    let mut rest = value;
    while !rest.is_empty() {
        let (field, tail) = if let Some(quoted) = rest.strip_prefix('"') {
            // A quoted field ends at the quote before a comma; doubled quotes inside do not matter for a name.
            match quoted.split_once("\",") {
                Some((field, tail)) => (field, tail),
                None => (quoted.strip_suffix('"').unwrap_or(quoted), ""),
            }
        } else {
            rest.split_once(',').unwrap_or((rest, ""))
        };
        if let Some((key, value)) = field.split_once('=')
            && key.eq_ignore_ascii_case("from")
        {
            if value.split_once('$').is_some_and(|(_, name)| !name.is_empty()) {
                return Err("'from' doesn't support variable expansion, define alias stage instead".into());
            }
            from = Some(value.to_owned());
        }
        rest = tail;
    }
    Ok(from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heredoc(content: &str) -> Heredoc {
        Heredoc { name: "EOF".into(), content: content.into(), expand: true, strip_tabs: false, fd: 0 }
    }

    #[test]
    fn scripts() {
        for (text, contents, expect) in [
            ("make", &[][..], "shell make"),
            ("<<EOF", &["a\nb\n"], "shell a\nb\n"),
            ("<<-'EOF'", &["a\n"], "shell a\n"),
            ("3<<EOF", &["a\n"], "shell a\n"),
            ("<<EOF", &["#!/usr/bin/env python\nprint()\n"], "file #!/usr/bin/env python\nprint()\n"),
            ("<<EOF bash", &["a\n"], "shell <<EOF bash\na\nEOF"),
            ("cat <<EOF", &["a\n"], "shell cat <<EOF\na\nEOF"),
            ("<<EOF <<EOF", &["a\n", "b\n"], "shell <<EOF <<EOF\na\nEOF\nb\nEOF"),
            ("<<EOF", &[], "shell <<EOF"),
        ] {
            let run = Run {
                command: Command::Shell(text.into()),
                heredocs: contents.iter().map(|content| heredoc(content)).collect(),
                mounts: vec![],
                network: None,
                security: None,
                devices: vec![],
            };
            let got = match Script::of(&run) {
                Script::Exec(args) => format!("exec {args:?}"),
                Script::Shell(text) => format!("shell {text}"),
                Script::File(heredoc) => format!("file {}", heredoc.content),
            };
            assert_eq!(got, expect, "{text}");
        }
    }

    #[test]
    fn from_of_mounts() {
        for (value, expect) in [
            ("type=bind,from=a,target=/x", Ok(Some("a"))),
            ("type=cache,target=/x", Ok(None)),
            ("FROM=a", Ok(Some("a"))),
            ("\"target=/a,from=b\",from=c", Ok(Some("c"))),
            ("target=$X", Ok(None)),
            ("from=$", Ok(Some("$"))),
            ("from=${X}", Err("'from' doesn't support variable expansion, define alias stage instead")),
        ] {
            let got = mount_from(value);
            assert_eq!(got.as_ref().map(Option::as_deref).map_err(String::as_str), expect, "{value}");
        }
    }
}
