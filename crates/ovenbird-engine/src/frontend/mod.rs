//! Dockerfile to plan. Pure: images are asked for as data ([`Lowered::Needs`]) and come back resolved.
//!
//! The meaning of every instruction, the text of history and the fields of the config are those of BuildKit's Dockerfile
//! frontend 1.26, because images are compared with BuildKit's field by field. Nothing here knows of files, registries,
//! sandboxes or time. Invariant: [`lower`] never panics, and what it makes is bounded by a multiple of its input.

mod checks;
mod findings;
mod from;
pub mod git_url;
mod history;
mod image_config;
mod names;
mod paths;
mod run;
mod scope;
mod stage;
mod transfer;
mod vertices;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ovenbird_dockerfile::ast::{ArgDecl, Kind};
use ovenbird_dockerfile::expand::{Env, ExpandError, Expanded, Expander};
use ovenbird_dockerfile::ignore::Patterns;
use ovenbird_dockerfile::lint;
use ovenbird_dockerfile::suggest::nearest_variable;
use ovenbird_dockerfile::{Diagnostic, Dockerfile, Span};
use ovenbird_oci::Platform;
use ovenbird_oci::image::Empty;

pub use self::findings::{Findings, broken, check};

use self::checks::{Checks, error};
use self::from::Contexts;
use self::image_config::Places;
use self::scope::Variables;
use self::stage::{Node, NodeId, Step};
use self::vertices::Vertices;
use crate::plan::{FileAction, FileOp, ImageRequest, NetworkMode, Op, Plan, ResolvedImage, VertexId};

/// What `--no-cache` and `--no-cache-filter` say.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum NoCache {
    /// Use the cache.
    #[default]
    Off,
    /// No step from the cache.
    All,
    /// These stages not.
    Stages(Vec<String>),
}

/// `--build-context name=…`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NamedContext {
    /// A folder, given to the engine under the same name.
    Local,
    /// `docker-image://REF` or `oci-layout://PATH`: an image request name.
    Image(String),
    /// `target:STAGE`.
    Target(String),
}

/// Everything but the text that decides the plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// `--target`; the last stage if absent.
    pub target: Option<String>,
    /// `--build-arg`.
    pub build_args: BTreeMap<String, String>,
    /// `--label`.
    pub labels: BTreeMap<String, String>,
    /// Target platform.
    pub platform: Platform,
    /// Platform of the machine.
    pub build_platform: Platform,
    /// More than one platform is built.
    pub multi_platform: bool,
    /// Cache use.
    pub no_cache: NoCache,
    /// Named contexts.
    pub contexts: BTreeMap<String, NamedContext>,
    /// `--network` of the build.
    pub network: NetworkMode,
    /// `--hostname`.
    pub hostname: Option<String>,
    /// `--add-host`.
    pub add_hosts: Vec<(String, IpAddr)>,
    /// `--allow` entitlements: `network.host`, `security.insecure`.
    pub entitlements: Vec<String>,
    /// What the ignore file of the build context leaves out; only checks look at it.
    pub ignore: Patterns,
}

/// The last stage for this machine, with the cache and without anything of the request.
impl Default for Options {
    fn default() -> Self {
        Self {
            target: None,
            build_args: BTreeMap::new(),
            labels: BTreeMap::new(),
            platform: Platform::host(),
            build_platform: Platform::host(),
            multi_platform: false,
            no_cache: NoCache::Off,
            contexts: BTreeMap::new(),
            network: NetworkMode::Default,
            hostname: None,
            add_hosts: vec![],
            entitlements: vec![],
            ignore: Patterns::default(),
        }
    }
}

/// Images known so far.
pub type Images = BTreeMap<ImageRequest, ResolvedImage>;

/// Result of [`lower`].
#[derive(Debug, Clone, PartialEq)]
pub enum Lowered {
    /// Resolve these and call again.
    Needs(Vec<ImageRequest>),
    /// Ready. Warnings beside the plan.
    Done(Box<Plan>, Vec<Diagnostic>),
}

/// Most bytes that expansion and history may make in one build: a hostile file doubles variables on every line.
const BUDGET: usize = 64 << 20;

/// What a step of lowering gives, or the error that ends it.
type Outcome<T> = Result<T, Diagnostic>;

/// Lowers a parsed Dockerfile. `text` is what the spans point into.
///
/// Errors come last, behind the warnings that were found before.
pub fn lower(dockerfile: &Dockerfile, text: &str, options: &Options, images: &Images) -> Result<Lowered, Vec<Diagnostic>> {
    lower_what(dockerfile, text, options, images, &BTreeSet::new(), false)
}

/// [`lower`] for checks: images in `missing` cannot be had, and what would need them is not said. Without a target all stages are
/// looked at.
fn lower_for_checks(
    dockerfile: &Dockerfile,
    text: &str,
    options: &Options,
    images: &Images,
    missing: &BTreeSet<ImageRequest>,
) -> Result<Lowered, Vec<Diagnostic>> {
    lower_what(dockerfile, text, options, images, missing, options.target.is_none())
}

fn lower_what(
    dockerfile: &Dockerfile,
    text: &str,
    options: &Options,
    images: &Images,
    missing: &BTreeSet<ImageRequest>,
    all_stages: bool,
) -> Result<Lowered, Vec<Diagnostic>> {
    let checks = Checks::new(text, check_directive(dockerfile, options)).map_err(|e| vec![e])?;
    let lint = lint::lint(dockerfile, text, checks.config());
    let mut lowering = Lowering {
        dockerfile,
        options,
        images,
        missing,
        all_stages,
        expander: Expander { escape: dockerfile.directives.escape, keep_unset: false, raw_quotes: false },
        line_starts: std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect(),
        checks,
        lint,
        contexts: Contexts::new(&options.contexts),
        proxy_env: scope::proxy_env(&options.build_args),
        globals: Variables::default(),
        nodes: Vec::new(),
        names: HashMap::new(),
        references: HashMap::new(),
        needs: BTreeSet::new(),
        vertices: Vertices::default(),
        budget: BUDGET,
    };
    match lowering.plan() {
        Ok(None) => Ok(Lowered::Needs(lowering.needs.into_iter().collect())),
        Ok(Some(plan)) => Ok(Lowered::Done(plan, lowering.checks.into_warnings())),
        Err(last) => {
            lowering.checks.extend(lowering.lint);
            let mut diagnostics = lowering.checks.into_warnings();
            diagnostics.push(last);
            Err(diagnostics)
        }
    }
}

/// What configures the checks: the build argument, or else the directive.
fn check_directive<'a>(dockerfile: &'a Dockerfile, options: &'a Options) -> &'a str {
    options.build_args.get("BUILDKIT_DOCKERFILE_CHECK").or(dockerfile.directives.check.as_ref()).map_or("", String::as_str)
}

/// Everything that is known while one plan is made.
struct Lowering<'a> {
    dockerfile: &'a Dockerfile,
    options: &'a Options,
    images: &'a Images,
    /// Images that cannot be had.
    missing: &'a BTreeSet<ImageRequest>,
    /// Whatever the target needs.
    all_stages: bool,
    expander: Expander,
    line_starts: Vec<usize>,
    checks: Checks,
    /// What the linter found, until it is known which stages are built.
    lint: Vec<Diagnostic>,
    contexts: Contexts<'a>,
    proxy_env: Vec<String>,
    /// Predefined arguments and those before the first `FROM`.
    globals: Variables,
    /// Stages in the order of the file, then what is only referred to.
    nodes: Vec<Node<'a>>,
    /// Stages by name, lower case; the last of equal names.
    names: HashMap<String, NodeId>,
    /// Nodes that are no stages, by the name they are referred to.
    references: HashMap<String, NodeId>,
    needs: BTreeSet<ImageRequest>,
    vertices: Vertices,
    /// Bytes that may still be made.
    budget: usize,
}

impl Lowering<'_> {
    /// The plan, or `None` when `needs` must be resolved first.
    fn plan(&mut self) -> Outcome<Option<Box<Plan>>> {
        if self.dockerfile.stages.is_empty() {
            let mut diagnostic = error("no-stages", Span::default(), "the Dockerfile contains no stages to build");
            diagnostic.help = Some("start it with FROM".into());
            return Err(diagnostic);
        }
        self.globals = self.global_args()?;
        self.add_stages()?;
        let source_date_epoch = self.source_date_epoch()?;
        let target = self.target()?;
        self.link_stages()?;
        let reachable = self.resolve_bases(target)?;
        if !self.needs.is_empty() {
            return Ok(None);
        }
        self.take_lint(&reachable);
        for (id, reached) in reachable.into_iter().enumerate() {
            if reached && !self.nodes[id].dispatched {
                self.dispatch_stage(id)?;
            }
        }
        self.make_layer_of_folder(target);
        let unconsumed = scope::unconsumed(self.dockerfile, self.options);
        if !unconsumed.is_empty() {
            let message = format!("One or more build-args [{}] were not consumed", unconsumed.join(" "));
            let help = "declare each with ARG in the stage that uses it";
            self.checks.warn("UnconsumedBuildArg", Span::default(), message, Some(help));
        }
        self.checks.verdict()?;

        let state = self.nodes[target].state.clone();
        let mut config = state.config;
        let chosen = self.options.multi_platform || self.options.platform != self.options.build_platform;
        image_config::finish(&mut config, &self.options.platform, chosen, &self.options.labels);
        let (vertices, root) = std::mem::take(&mut self.vertices).prune(state.root);
        let platform = self.options.platform.clone();
        Ok(Some(Box::new(Plan { platform, vertices, root, config, history: state.history, base: state.base, source_date_epoch })))
    }

    /// Takes over what the linter found. What instructions do matters only in stages that are built.
    fn take_lint(&mut self, reachable: &[bool]) {
        const OF_INSTRUCTIONS: [&str; 7] = [
            "ExposeInvalidFormat",
            "ExposeProtoCasing",
            "JSONArgsRecommended",
            "LegacyKeyValueFormat",
            "MultipleInstructionsDisallowed",
            "SecretsUsedInArgOrEnv",
            "WorkdirRelativePath",
        ];
        let stages = &self.dockerfile.stages;
        let nodes = &self.nodes;
        // An image may bring a shell, which then takes care of signals.
        let has_shell = |mut id: NodeId| {
            while let Some(base) = nodes[id].base {
                id = base;
            }
            nodes[id].state.config.config.shell.is_some()
        };
        let is_built = |finding: &Diagnostic| {
            let stage = stages.partition_point(|stage| stage.span.start <= finding.span.start).checked_sub(1);
            stage.is_none_or(|stage| reachable[stage] && !(finding.code == "JSONArgsRecommended" && has_shell(stage)))
        };
        let found = std::mem::take(&mut self.lint);
        self.checks.extend(found.into_iter().filter(|finding| !OF_INSTRUCTIONS.contains(&&*finding.code) || is_built(finding)));
    }

    /// `SOURCE_DATE_EPOCH` is a number of seconds. BuildKit also takes `context` or a stage, for the time of what was fetched there.
    ///
    /// What is built here has no such time: the context and named contexts are folders and images.
    fn source_date_epoch(&mut self) -> Outcome<Option<i64>> {
        const NAME: &str = "SOURCE_DATE_EPOCH";
        let value = self.options.build_args.get(NAME).map(String::as_str).or_else(|| self.globals.lookup(NAME)).unwrap_or_default();
        if value.is_empty() {
            return Ok(None);
        }
        if let Ok(seconds) = value.parse() {
            return Ok(Some(seconds));
        }
        if value == "context" || self.options.contexts.contains_key(value) {
            self.globals.set(NAME, "");
            return Ok(None);
        }
        let reason = if self.names.contains_key(&value.to_lowercase()) {
            format!("SOURCE_DATE_EPOCH={value} is not supported: the time of a source is not taken over")
        } else {
            format!("invalid SOURCE_DATE_EPOCH: {value}")
        };
        let mut diagnostic = error("source-date-epoch", Span::default(), reason);
        diagnostic.help = Some("give seconds since 1970-01-01, for example 1700000000".into());
        Err(diagnostic)
    }

    fn dispatch_stage(&mut self, id: NodeId) -> Outcome<()> {
        if let Some(base) = self.nodes[id].base {
            self.spend(self.nodes[base].state.weight(), self.nodes[id].span)?;
            let mut state = self.nodes[base].state.clone();
            state.config.config.on_build.clear();
            state.cmd_set = false;
            self.nodes[id].state = state;
        }
        self.make_layer_of_folder(id);
        let state = &mut self.nodes[id].state;
        let env = &mut state.config.config.env;
        if state.platform.os != "windows" && !env.iter().any(|pair| scope::split_pair(pair).0 == "PATH") {
            env.push(format!("PATH={}", image_config::DEFAULT_PATH));
        }
        for pair in env.iter() {
            let (name, value) = scope::split_pair(pair);
            state.env.set(name, value);
        }
        state.places = Places::of(env);
        if !state.config.config.working_dir.is_empty() && state.platform.os != "windows" {
            state.cwd = paths::absolute("/", &state.config.config.working_dir);
            if !state.config.config.working_dir.starts_with('/') {
                state.config.config.working_dir.clone_from(&state.cwd);
            }
        }
        let steps = std::mem::take(&mut self.nodes[id].steps);
        for step in &steps {
            match self.dispatch(id, step) {
                // What is missing may be a variable of the image that could not be had.
                Err(reason) if self.nodes[id].state.unknown && reason.code != "too-large" && step.instruction.original.contains('$') => {}
                done => done?,
            }
        }
        self.nodes[id].steps = steps;
        self.nodes[id].dispatched = true;
        Ok(())
    }

    fn dispatch(&mut self, id: NodeId, step: &Step<'_>) -> Outcome<()> {
        let span = step.instruction.span;
        match &step.instruction.kind {
            Kind::Run(run) => return self.run(id, run, step),
            Kind::Copy(transfer) => return self.transfer(id, transfer, false, step),
            Kind::Add(transfer) => return self.transfer(id, transfer, true, step),
            Kind::Workdir(path) => return self.workdir(id, path, step),
            Kind::Arg(args) => return self.arg(id, args, span),
            _ => {}
        }
        let mut layer_less = match &step.instruction.kind {
            Kind::Env(pairs) => {
                // All values see the environment before the instruction.
                let pairs = self.pairs(id, pairs.iter().map(|pair| (&pair.key, &pair.value)), span)?;
                let state = &mut self.nodes[id].state;
                for (name, value) in &pairs {
                    state.env.set(name, value);
                    state.places.set(&mut state.config.config.env, name, value);
                }
                joined("ENV", &pairs)
            }
            Kind::Label(pairs) => {
                let pairs = self.pairs(id, pairs.iter().map(|pair| (&pair.key, &pair.value)), span)?;
                let line = joined("LABEL", &pairs);
                self.nodes[id].state.config.config.labels.extend(pairs);
                line
            }
            Kind::User(user) => {
                let user = self.word(id, user, span)?;
                let line = format!("USER {user}");
                self.nodes[id].state.config.config.user = user;
                line
            }
            Kind::Volume(volumes) => {
                let volumes = volumes.iter().map(|volume| self.word(id, volume, span)).collect::<Outcome<Vec<_>>>()?;
                if volumes.iter().any(String::is_empty) {
                    return Err(error("volume", span, "VOLUME specified can not be an empty string"));
                }
                let line = format!("VOLUME {}", history::plain_list(&volumes));
                self.nodes[id].state.config.config.volumes.extend(volumes.into_iter().map(|volume| (volume, Empty {})));
                line
            }
            Kind::Expose(words) => {
                let mut specs = Vec::new();
                for word in words {
                    let expanded = self.words(id, word, span)?;
                    // The linter has seen words without variables.
                    if word.contains('$') && !self.nodes[id].state.unknown {
                        for finding in expanded.iter().flat_map(|spec| lint::expose(spec, span)) {
                            self.checks.take(finding);
                        }
                    }
                    specs.extend(expanded);
                }
                let ports = image_config::ports(&specs).map_err(|reason| error("expose", span, reason))?;
                let line = format!("EXPOSE {}", history::plain_list(&ports));
                self.nodes[id].state.config.config.exposed_ports.extend(ports.into_iter().map(|port| (port, Empty {})));
                line
            }
            Kind::StopSignal(signal) => {
                let signal = self.word(id, signal, span)?;
                if !image_config::is_signal(&signal) {
                    return Err(error("stopsignal", span, format!("invalid signal: {signal}")));
                }
                let line = format!("STOPSIGNAL {signal}");
                self.nodes[id].state.config.config.stop_signal = Some(signal);
                line
            }
            kind => self.plain(id, kind, span)?,
        };
        if let Kind::Onbuild(trigger) = &step.instruction.kind {
            self.nodes[id].state.config.config.on_build.push(trigger.clone());
            return Ok(());
        }
        self.spend(layer_less.len(), span)?;
        layer_less.shrink_to_fit();
        self.nodes[id].state.commit(layer_less, false);
        Ok(())
    }

    /// Instructions whose words are not expanded. Gives the line of history.
    fn plain(&mut self, id: NodeId, kind: &Kind, span: Span) -> Outcome<String> {
        let state = &mut self.nodes[id].state;
        Ok(match kind {
            Kind::Cmd(command) => {
                let args = image_config::arguments(command, &state.config);
                let line = format!("CMD {}", history::quoted_list(&args));
                state.config.config.cmd = image_config::non_empty(args);
                state.config.config.args_escaped = true;
                state.cmd_set = true;
                line
            }
            Kind::Entrypoint(command) => {
                let args = image_config::arguments(command, &state.config);
                let line = format!("ENTRYPOINT {}", history::quoted_list(&args));
                state.config.config.entrypoint = image_config::non_empty(args);
                if !state.cmd_set {
                    state.config.config.cmd = None;
                }
                line
            }
            Kind::Shell(shell) => {
                state.config.config.shell = image_config::non_empty(shell.clone());
                format!("SHELL {}", history::plain_list(shell))
            }
            Kind::Maintainer(author) => {
                state.config.author = Some(author.clone()).filter(|author| !author.is_empty());
                format!("MAINTAINER {author}")
            }
            Kind::Healthcheck(check) => {
                let health = image_config::health(check).map_err(|reason| error("healthcheck", span, reason))?;
                let line = format!("HEALTHCHECK {}", history::health(&health));
                state.config.config.healthcheck = Some(health);
                line
            }
            _ => String::new(),
        })
    }

    fn workdir(&mut self, id: NodeId, path: &str, step: &Step<'_>) -> Outcome<()> {
        let span = step.instruction.span;
        let has_variables = path.contains('$');
        let path = self.word(id, path, span)?;
        let lines = self.lines(span);
        let state = &mut self.nodes[id].state;
        // The linter has seen paths without variables.
        if has_variables
            && !(state.unknown || state.workdir_set || step.on_build)
            && let Some(finding) = lint::workdir(&path, span)
        {
            self.checks.take(finding);
        }
        state.workdir_set |= !step.on_build;
        // The config holds an absolute path as it is written.
        let text = match path {
            path if path.starts_with('/') => path,
            path if path.is_empty() && !state.config.config.working_dir.is_empty() => state.config.config.working_dir.clone(),
            path => paths::absolute(&state.cwd, &path),
        };
        let dir = paths::absolute("/", &text);
        state.cwd.clone_from(&dir);
        state.config.config.working_dir.clone_from(&text);
        let layer = text != "/";
        if layer {
            let (text, cost) = names::instruction(&step.instruction.original, self.expander, &self.nodes[id].state.env);
            self.spend(cost, span)?;
            let name = self.next_prefix(id, step) + &text;
            let state = &mut self.nodes[id].state;
            let owner = Some(state.config.config.user.clone()).filter(|user| !user.is_empty());
            let op = Op::File(FileOp { base: state.root, actions: vec![FileAction::Mkdir { path: dir.clone(), owner }] });
            state.root = Some(self.vertices.add(op, name, lines, false));
        }
        self.spend(text.len(), span)?;
        self.nodes[id].state.commit(format!("WORKDIR {text}"), layer);
        Ok(())
    }

    fn arg(&mut self, id: NodeId, args: &[ArgDecl], span: Span) -> Outcome<()> {
        let mut line = String::from("ARG");
        for arg in args {
            let value = if let Some(given) = self.options.build_args.get(&arg.name) {
                Some(given.clone())
            } else if let Some(default) = &arg.default {
                Some(self.word(id, default, span)?)
            } else {
                self.globals.lookup(&arg.name).map(str::to_owned)
            };
            line.push(' ');
            line.push_str(&arg.name);
            let state = &mut self.nodes[id].state;
            if let Some(value) = &value {
                if !scope::is_scanner_key(&arg.name) {
                    state.env.set(&arg.name, value);
                }
                line.push('=');
                line.push_str(value);
            }
            state.args.push((arg.name.clone(), value));
        }
        self.spend(line.len(), span)?;
        self.nodes[id].state.commit(line, false);
        Ok(())
    }

    fn pairs<'p>(
        &mut self,
        id: NodeId,
        pairs: impl Iterator<Item = (&'p String, &'p String)>,
        span: Span,
    ) -> Outcome<Vec<(String, String)>> {
        pairs.map(|(name, value)| Ok((self.word(id, name, span)?, self.word(id, value, span)?))).collect()
    }

    /// Expands one word with the variables of a stage.
    fn word(&mut self, id: NodeId, word: &str, span: Span) -> Outcome<String> {
        let expanded = self.expander.word(word, &self.nodes[id].state.env);
        self.taken(id, word, expanded, span)
    }

    /// Expands a word into several.
    fn words(&mut self, id: NodeId, word: &str, span: Span) -> Outcome<Vec<String>> {
        let result = self.expander.words(word, &self.nodes[id].state.env);
        let (words, expanded) = result.map_err(|reason| cannot_expand(word, &reason, span))?;
        self.taken(id, word, Ok(expanded), span)?;
        Ok(words)
    }

    /// Expands the body of a here-document.
    fn heredoc(&mut self, id: NodeId, body: &str, span: Span) -> Outcome<String> {
        // The escape directive is for instructions: bodies always escape with a backslash.
        let expander = Expander { escape: '\\', ..self.expander };
        let expanded = expander.heredoc(body, &self.nodes[id].state.env);
        self.taken(id, body, expanded, span)
    }

    fn taken(&mut self, id: NodeId, word: &str, expanded: Result<Expanded, ExpandError>, span: Span) -> Outcome<String> {
        let expanded = expanded.map_err(|reason| cannot_expand(word, &reason, span))?;
        self.spend(expanded.value.len(), span)?;
        self.report_unset(id, &expanded.unset, span);
        Ok(expanded.value)
    }

    /// Expands a word with other variables than those of a stage.
    fn expand(&mut self, word: &str, env: &dyn Env, span: Span) -> Outcome<Expanded> {
        let expanded = self.expander.word(word, env).map_err(|reason| cannot_expand(word, &reason, span))?;
        self.spend(expanded.value.len(), span)?;
        Ok(expanded)
    }

    /// Warns of variables that are neither set nor declared.
    fn report_unset(&mut self, id: NodeId, unset: &BTreeSet<String>, span: Span) {
        let state = &self.nodes[id].state;
        if state.unknown {
            return;
        }
        for name in unset {
            if self.checks.is_full() {
                return;
            }
            if scope::is_scanner_key(name) || state.args.iter().any(|(declared, _)| declared == name) {
                continue;
            }
            let hint = nearest_variable(name, state.env.names()).map(|hint| format!(" (did you mean ${hint}?)")).unwrap_or_default();
            let help = "declare it with ARG or ENV in this stage";
            self.checks.warn("UndefinedVar", span, format!("Usage of undefined variable '${name}'{hint}"), Some(help));
        }
    }

    fn spend(&mut self, bytes: usize, span: Span) -> Outcome<()> {
        if let Some(rest) = self.budget.checked_sub(bytes) {
            self.budget = rest;
            return Ok(());
        }
        let message = format!("variables of this Dockerfile expand to more than {} MiB", BUDGET >> 20);
        let mut diagnostic = error("too-large", span, message);
        diagnostic.help = Some("look for a variable that contains itself several times".into());
        Err(diagnostic)
    }

    /// The prefix of the next step's name.
    fn next_prefix(&mut self, id: NodeId, step: &Step<'_>) -> String {
        let node = &mut self.nodes[id];
        node.counter.next(&node.state.platform, &node.state.env, step.on_build)
    }

    /// The build context.
    fn main_context(&mut self) -> VertexId {
        self.vertices.add(Op::Local { name: "context".into() }, "[internal] load build context".into(), None, false)
    }

    /// First and last line of a span, from 1.
    fn lines(&self, span: Span) -> Option<(u32, u32)> {
        let line = |at: usize| u32::try_from(self.line_starts.partition_point(|start| *start <= at)).ok();
        Some((line(span.start)?, line(span.end.saturating_sub(1).max(span.start))?))
    }
}

fn cannot_expand(word: &str, reason: &ExpandError, span: Span) -> Diagnostic {
    let shown: String = word.chars().take(200).collect();
    error("expansion", span, format!("failed to process {}: {reason}", history::quote(&shown)))
}

fn joined(instruction: &str, pairs: &[(String, String)]) -> String {
    let mut line = instruction.to_owned();
    for (key, value) in pairs {
        line.push(' ');
        line.push_str(key);
        line.push('=');
        line.push_str(value);
    }
    line
}
