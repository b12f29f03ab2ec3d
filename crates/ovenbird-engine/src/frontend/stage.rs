//! The graph of stages: names, references, which stage needs which, and what is known of a stage while it is lowered.

use std::borrow::Cow;

use ovenbird_dockerfile::Span;
use ovenbird_dockerfile::ast::{Instruction, Kind, Stage};
use ovenbird_dockerfile::expand::EmptyEnv;
use ovenbird_dockerfile::suggest::nearest;
use ovenbird_oci::{ImageConfig, Platform};

use super::checks::{error, with_suggestion};
use super::image_config::Places;
use super::names::Counter;
use super::scope::{Variables, predefined};
use super::{Lowering, NamedContext, NoCache, Outcome, history, run};
use crate::plan::{HistoryEntry, ResolvedImage, VertexId};

/// Index into [`Lowering::nodes`].
pub(super) type NodeId = usize;

/// A stage of the file, or an image or context that some step refers to by name.
#[derive(Debug)]
pub(super) struct Node<'a> {
    /// `None`: not a stage, only referred to.
    pub(super) stage: Option<&'a Stage>,
    /// Base, expanded.
    pub(super) base_name: String,
    /// `AS` name, or `stage-N`.
    pub(super) name: String,
    /// `--platform`.
    pub(super) platform: Option<Platform>,
    /// The stage below.
    pub(super) base: Option<NodeId>,
    /// A named context that stands in for the whole stage.
    pub(super) replaced_by: Option<(&'a str, &'a NamedContext)>,
    pub(super) span: Span,
    pub(super) steps: Vec<Step<'a>>,
    pub(super) counter: Counter,
    pub(super) no_cache: bool,
    /// Its base was looked at.
    pub(super) resolved: bool,
    /// Its state is final.
    pub(super) dispatched: bool,
    /// `ONBUILD` triggers were added to `steps`.
    pub(super) triggers_added: bool,
    pub(super) state: State,
}

/// One instruction to lower.
#[derive(Debug, Clone)]
pub(super) struct Step<'a> {
    pub(super) instruction: Cow<'a, Instruction>,
    /// `COPY --from` has one; `RUN` has one a mount.
    pub(super) sources: Vec<Option<NodeId>>,
    pub(super) on_build: bool,
}

/// What the instructions of a stage have made so far.
#[derive(Debug, Clone)]
pub(super) struct State {
    /// Root file system.
    pub(super) root: Option<VertexId>,
    /// Variables of steps and of expansion: image environment and arguments.
    pub(super) env: Variables,
    /// Of the variables in the environment of `config`.
    pub(super) places: Places,
    /// Working directory, absolute.
    pub(super) cwd: String,
    pub(super) config: ImageConfig,
    /// Of this build only.
    pub(super) history: Vec<HistoryEntry>,
    /// The image at the bottom.
    pub(super) base: Option<ResolvedImage>,
    /// Declared arguments in order.
    pub(super) args: Vec<(String, Option<String>)>,
    /// What it runs on.
    pub(super) platform: Platform,
    /// `CMD` was given in this stage.
    pub(super) cmd_set: bool,
    /// `WORKDIR` was given in this build.
    pub(super) workdir_set: bool,
    /// The image at the bottom could not be had: its variables are not known.
    pub(super) unknown: bool,
}

impl State {
    pub(super) fn new(platform: Platform) -> Self {
        Self {
            root: None,
            env: Variables::default(),
            places: Places::default(),
            cwd: "/".into(),
            config: ImageConfig::default(),
            history: Vec::new(),
            base: None,
            args: Vec::new(),
            platform,
            cmd_set: false,
            workdir_set: false,
            unknown: false,
        }
    }

    /// Bytes of what a stage built on this one copies, near enough.
    pub(super) fn weight(&self) -> usize {
        const ENTRY: usize = 64;
        let config = &self.config.config;
        let history = self.history.iter().map(|line| line.created_by.len());
        let env = config.env.iter().map(|pair| 3 * pair.len());
        let labels = config.labels.iter().map(|(key, value)| key.len() + value.len());
        let args = self.args.iter().map(|(name, value)| name.len() + value.as_ref().map_or(0, String::len));
        let names = config.exposed_ports.keys().chain(config.volumes.keys()).map(String::len);
        history.chain(env).chain(labels).chain(args).chain(names).map(|bytes| bytes + ENTRY).sum()
    }

    /// Adds a line of history.
    pub(super) fn commit(&mut self, created_by: String, layer: bool) {
        self.history.push(HistoryEntry { created_by, layer });
    }
}

/// Stages of a cycle that are shown.
const MAX_SHOWN: usize = 10;

impl Lowering<'_> {
    /// Global arguments with defaults and `--build-arg`s filled in.
    pub(super) fn global_args(&mut self) -> Outcome<Variables> {
        let target = match &self.options.target {
            Some(target) => target.as_str(),
            None => self.dockerfile.stages.last().and_then(|stage| stage.name.as_deref()).unwrap_or_default(),
        };
        let mut globals = predefined(self.options, target);
        for instruction in &self.dockerfile.global_args {
            let Kind::Arg(args) = &instruction.kind else { continue };
            for arg in args {
                let value = match (self.options.build_args.get(&arg.name), &arg.default) {
                    (Some(given), _) => given.clone(),
                    (None, Some(default)) => self.expand(default, &globals, instruction.span)?.value,
                    (None, None) => continue,
                };
                globals.set(&arg.name, &value);
            }
        }
        Ok(globals)
    }

    /// Makes a node of every stage, in the order of the file.
    pub(super) fn add_stages(&mut self) -> Outcome<()> {
        let dockerfile = self.dockerfile;
        for (number, stage) in dockerfile.stages.iter().enumerate() {
            let base = self.expand(&stage.base, &self.globals.clone(), stage.span)?;
            if base.value.is_empty() {
                return Err(error("from", stage.span, format!("base name ({}) should not be blank", stage.base)));
            }
            let platform = stage.platform.as_ref().map(|platform| self.stage_platform(platform, stage.span)).transpose()?;
            let name = stage.name.clone().unwrap_or_else(|| format!("stage-{number}"));
            let wanted = platform.clone().unwrap_or_else(|| self.options.platform.clone());
            let replaced_by = stage.name.as_deref().and_then(|name| self.named_context(name, &wanted));
            let below = if replaced_by.is_some() { None } else { self.names.get(&base.value.to_lowercase()).copied() };
            let counted =
                stage.instructions.iter().filter(|i| matches!(i.kind, Kind::Add(_) | Kind::Copy(_) | Kind::Run(_) | Kind::Workdir(_)));
            let total = counted.count() + usize::from(below.is_none() && base.value != "scratch");
            let no_cache = match &self.options.no_cache {
                NoCache::Off => false,
                NoCache::All => true,
                NoCache::Stages(names) => stage.name.as_ref().is_some_and(|name| names.iter().any(|n| n.eq_ignore_ascii_case(name))),
            };
            let counter = Counter { stage: name.clone(), index: 0, total, multi_platform: self.options.multi_platform };
            self.nodes.push(Node {
                stage: Some(stage),
                base_name: base.value,
                name,
                platform,
                base: below,
                replaced_by,
                span: stage.span,
                steps: Vec::new(),
                counter,
                no_cache,
                resolved: false,
                dispatched: false,
                triggers_added: false,
                state: State::new(wanted),
            });
            if let Some(name) = &stage.name {
                self.names.insert(name.to_lowercase(), self.nodes.len() - 1);
            }
        }
        self.check_no_cache()
    }

    /// `--no-cache-filter` names stages of this Dockerfile.
    fn check_no_cache(&self) -> Outcome<()> {
        let NoCache::Stages(names) = &self.options.no_cache else { return Ok(()) };
        let Some(unknown) = names.iter().find(|name| !self.names.contains_key(&name.to_lowercase())) else { return Ok(()) };
        let hint = nearest(unknown, self.nodes.iter().map(|node| node.name.as_str()));
        let message = format!("--no-cache-filter: there is no stage {}", history::quote(unknown));
        Err(with_suggestion(error("no-cache-filter", Span::default(), message), hint))
    }

    fn stage_platform(&mut self, word: &str, span: Span) -> Outcome<Platform> {
        let expanded = self.expand(word, &self.globals.clone(), span)?;
        let hint = expanded.unset.iter().find_map(|name| nearest(name, self.globals.names()));
        if expanded.value.is_empty() {
            return Err(with_suggestion(error("from", span, format!("empty platform value from expression {word}")), hint));
        }
        let bad_part = expanded
            .value
            .split('/')
            .find(|part| part.is_empty() || !part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-')));
        let reason = match bad_part {
            Some(part) => format!(
                "{} is an invalid component of {}: platform specifier component must match \"^[A-Za-z0-9_.-]+$\"",
                history::quote(part),
                history::quote(&expanded.value)
            ),
            None => match expanded.value.parse::<Platform>() {
                Ok(platform) => return Ok(platform),
                Err(reason) => reason.to_string(),
            },
        };
        Err(with_suggestion(error("from", span, format!("failed to parse platform {word}: {reason}")), hint))
    }

    /// The stage that is asked for.
    pub(super) fn target(&self) -> Outcome<NodeId> {
        let stages = self.dockerfile.stages.len();
        let Some(target) = &self.options.target else { return Ok(stages - 1) };
        if let Some(&node) = self.names.get(&target.to_lowercase()) {
            return Ok(node);
        }
        if let Some(index) = target.parse::<usize>().ok().filter(|index| *index < stages) {
            return Ok(index);
        }
        let hint = nearest(target, self.nodes.iter().map(|node| node.name.as_str()));
        let diagnostic = error("target", Span::default(), format!("target stage {} could not be found", history::quote(target)));
        Err(with_suggestion(diagnostic, hint))
    }

    /// Finds what every instruction reads, and refuses cycles.
    pub(super) fn link_stages(&mut self) -> Outcome<()> {
        let dockerfile = self.dockerfile;
        let mut others = false;
        for (id, stage) in dockerfile.stages.iter().enumerate() {
            for instruction in &stage.instructions {
                others |= matches!(&instruction.kind, Kind::Run(run) if !run.mounts.is_empty());
                let sources = self.sources(instruction, instruction.span)?;
                self.nodes[id].steps.push(Step { instruction: Cow::Borrowed(instruction), sources, on_build: false });
            }
        }
        self.refuse_cycles()?;
        // A name tells nothing when there is only one thing to name.
        if self.nodes.len() == 1 && !others {
            self.nodes[0].counter.stage.clear();
        }
        Ok(())
    }

    /// Nodes that an instruction reads beside its own stage.
    pub(super) fn sources(&mut self, instruction: &Instruction, span: Span) -> Outcome<Vec<Option<NodeId>>> {
        match &instruction.kind {
            Kind::Copy(copy) => match copy.from.as_deref() {
                None | Some("") => Ok(Vec::new()),
                Some(from) => Ok(vec![Some(self.copy_source(from, span)?)]),
            },
            Kind::Run(run) => {
                let mut sources = Vec::with_capacity(run.mounts.len());
                for mount in &run.mounts {
                    let from =
                        run::mount_from(mount.value.as_deref().unwrap_or_default()).map_err(|reason| error("mount", mount.span, reason))?;
                    sources.push(from.filter(|from| !from.is_empty()).map(|from| self.named(&from, span)).transpose()?);
                }
                Ok(sources)
            }
            _ => Ok(Vec::new()),
        }
    }

    fn copy_source(&mut self, from: &str, span: Span) -> Outcome<NodeId> {
        if self.expander.word(from, &EmptyEnv).map_or(true, |expanded| expanded.value != from) {
            let message =
                "variable expansion is not supported for --from, define a new stage with FROM using ARG from global scope as a workaround";
            return Err(error("copy-from", span, message));
        }
        match from.parse::<i64>() {
            Err(_) => self.named(from, span),
            Ok(index) => match usize::try_from(index) {
                Ok(index) if index < self.dockerfile.stages.len() => Ok(index),
                _ => Err(error("copy-from", span, format!("invalid stage index {index}"))),
            },
        }
    }

    /// The stage of that name, or else a node for the image or context of that name.
    fn named(&mut self, name: &str, span: Span) -> Outcome<NodeId> {
        let key = name.to_lowercase();
        if let Some(&id) = self.names.get(&key) {
            return Ok(id);
        }
        if let Some(&id) = self.references.get(name) {
            return Ok(id);
        }
        if let Some((_, NamedContext::Target(stage))) = self.named_context(name, &self.options.platform) {
            return self.names.get(&stage.to_lowercase()).copied().ok_or_else(|| {
                let message = format!("target stage {} could not be found: it is given as --build-context {name}", history::quote(stage));
                error("target", span, message)
            });
        }
        let id = self.nodes.len();
        self.nodes.push(Node {
            stage: None,
            base_name: name.to_owned(),
            name: String::new(),
            platform: None,
            base: None,
            replaced_by: None,
            span,
            steps: Vec::new(),
            counter: Counter::default(),
            no_cache: false,
            resolved: false,
            dispatched: false,
            triggers_added: false,
            state: State::new(self.options.platform.clone()),
        });
        self.references.insert(name.to_owned(), id);
        Ok(id)
    }

    fn dependencies(&self, id: NodeId) -> impl Iterator<Item = (NodeId, Span)> {
        self.nodes[id].steps.iter().flat_map(|step| step.sources.iter().flatten().map(|&source| (source, step.instruction.span)))
    }

    fn refuse_cycles(&self) -> Outcome<()> {
        let edges: Vec<Vec<(NodeId, Span)>> = (0..self.nodes.len()).map(|id| self.dependencies(id).collect()).collect();
        let mut visited = vec![false; edges.len()];
        let mut on_path = vec![false; edges.len()];
        for start in 0..edges.len() {
            if visited[start] {
                continue;
            }
            visited[start] = true;
            on_path[start] = true;
            // An explicit stack: a hostile file may chain more stages than the call stack holds.
            let mut stack = vec![(start, 0)];
            while let Some((id, next)) = stack.last_mut() {
                let Some(&(dependency, span)) = edges[*id].get(*next) else {
                    on_path[*id] = false;
                    stack.pop();
                    continue;
                };
                *next += 1;
                if on_path[dependency] {
                    let name = &self.nodes[start].name;
                    let mut diagnostic = error("stage-cycle", span, format!("circular dependency detected on stage: {name}"));
                    let cycle = stack.iter().map(|(id, _)| *id).skip_while(|id| *id != dependency).chain([dependency]).take(MAX_SHOWN);
                    let names: Vec<&str> = cycle.map(|id| self.nodes[id].name.as_str()).collect();
                    diagnostic.help = Some(format!("each needs the next: {}", names.join(" → ")));
                    return Err(diagnostic);
                }
                if !visited[dependency] {
                    visited[dependency] = true;
                    on_path[dependency] = true;
                    stack.push((dependency, 0));
                }
            }
        }
        Ok(())
    }

    /// Which nodes the target needs.
    pub(super) fn reachable(&self, target: NodeId) -> Vec<bool> {
        let mut reached = vec![false; self.nodes.len()];
        let mut todo = if self.all_stages { (0..self.dockerfile.stages.len()).collect() } else { vec![target] };
        while let Some(id) = todo.pop() {
            if !std::mem::replace(&mut reached[id], true) {
                todo.extend(self.nodes[id].base);
                todo.extend(self.dependencies(id).map(|(source, _)| source));
            }
        }
        reached
    }
}
