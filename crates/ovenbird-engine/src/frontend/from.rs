//! What a stage stands on: `scratch`, another stage, an image, a named context; and the triggers that come with it.

use std::borrow::Cow;
use std::collections::BTreeMap;

use ovenbird_dockerfile::ast::Kind;
use ovenbird_dockerfile::{parse_instruction, suggest};
use ovenbird_oci::{ImageConfig, Platform, Reference};

use super::checks::error;
use super::history::quote;
use super::scope::Variables;
use super::stage::{NodeId, State, Step};
use super::{Lowering, NamedContext, Outcome, image_config};
use crate::plan::{CopyAction, FileAction, FileOp, ImageOp, ImageRequest, Op, ResolvedImage, VertexId};

/// Named contexts by the name that people mean: `docker.io/library/debian:latest` is `debian`.
#[derive(Debug, Default)]
pub(super) struct Contexts<'a>(BTreeMap<String, (&'a str, &'a NamedContext)>);

impl<'a> Contexts<'a> {
    pub(super) fn new(contexts: &'a BTreeMap<String, NamedContext>) -> Self {
        Self(contexts.iter().map(|(name, context)| (canonical(name), (name.as_str(), context))).collect())
    }

    fn find(&self, name: &str, platform: &Platform) -> Option<(&'a str, &'a NamedContext)> {
        if name.eq_ignore_ascii_case("scratch") || name.eq_ignore_ascii_case("context") {
            return None;
        }
        let name = canonical(name);
        self.0.get(&format!("{name}::{platform}")).or_else(|| self.0.get(&name)).copied()
    }
}

/// The familiar name without `:latest`; the platform after `::` stays.
fn canonical(name: &str) -> String {
    let (name, platform) = name.split_once("::").map_or((name, None), |(name, platform)| (name, Some(platform)));
    let mut canonical = name.parse::<Reference>().map_or_else(|_| name.to_owned(), |reference| reference.familiar());
    if canonical.ends_with(":latest") {
        canonical.truncate(canonical.len() - ":latest".len());
    }
    match platform {
        Some(platform) => format!("{canonical}::{platform}"),
        None => canonical,
    }
}

/// What a named context gives.
enum Loaded {
    /// No files.
    Scratch,
    /// A folder.
    Folder(VertexId),
    Image(Box<ResolvedImage>, VertexId),
    /// Asked for.
    Pending,
    /// Cannot be had.
    Unknown,
}

impl<'a> Lowering<'a> {
    pub(super) fn named_context(&self, name: &str, platform: &Platform) -> Option<(&'a str, &'a NamedContext)> {
        self.contexts.find(name, platform)
    }

    /// Resolves the bases of everything the target needs, and adds their triggers until these need nothing new.
    /// Images that are not known yet end up in `self.needs`. Returns what is reachable.
    pub(super) fn resolve_bases(&mut self, target: NodeId) -> Outcome<Vec<bool>> {
        loop {
            let mut reachable = self.reachable(target);
            let mut new_dependencies = false;
            for (id, &reached) in reachable.iter().enumerate() {
                if self.nodes[id].base.is_none() && !self.nodes[id].resolved {
                    new_dependencies |= self.resolve_base(id, reached)?;
                }
            }
            for (id, &reached) in reachable.iter().enumerate() {
                if reached && !self.nodes[id].triggers_added {
                    new_dependencies |= self.add_triggers(id)?;
                }
            }
            if !new_dependencies {
                reachable.resize(self.nodes.len(), false);
                return Ok(reachable);
            }
        }
    }

    /// True: the stage turned out to be built on another one.
    fn resolve_base(&mut self, id: NodeId, reachable: bool) -> Outcome<bool> {
        let node = &self.nodes[id];
        let (span, is_stage) = (node.span, node.stage.is_some());
        let name = node.base_name.clone();
        let platform = node.platform.clone().unwrap_or_else(|| self.options.platform.clone());
        if name == "scratch" && node.replaced_by.is_none() {
            let node = &mut self.nodes[id];
            node.resolved = reachable;
            node.state = State::new(self.options.platform.clone());
            node.state.config = image_config::empty(&self.options.platform);
            node.dispatched = !is_stage;
            return Ok(false);
        }
        if let Err(reason) = name.parse::<Reference>() {
            return Err(error("from", span, format!("failed to parse stage name {}: invalid reference format: {reason}", quote(&name))));
        }
        if !reachable {
            return Ok(false);
        }
        if let Some((key, context)) = self.nodes[id].replaced_by {
            return self.replace_stage(id, key, context, &platform);
        }
        if let Some((key, context)) = self.named_context(&name, &platform) {
            let loaded = match context {
                NamedContext::Target(stage) => return self.alias(id, key, stage),
                context => self.load_context(key, context, &platform),
            };
            if matches!(loaded, Loaded::Pending) {
                return Ok(false);
            }
            let config = match &loaded {
                Loaded::Image(image, _) => image_config::inherited(&image.config),
                _ => image_config::empty(&platform),
            };
            self.settle(id, loaded, config, platform);
            return Ok(false);
        }
        let request = ImageRequest { name, platform };
        if self.missing.contains(&request) {
            let config = image_config::empty(&request.platform);
            self.settle(id, Loaded::Unknown, config, request.platform);
            return Ok(false);
        }
        let Some(image) = self.images.get(&request).cloned() else {
            self.needs.insert(request);
            return Ok(false);
        };
        let ImageRequest { name, platform } = request;
        let config = image_config::inherited(&image.config);
        // Images of the old schema 1 know no diff ids; their history tells whether they have layers.
        let is_scratch = image.config.rootfs.diff_ids.is_empty() && image.config.history.iter().all(|h| h.empty_layer);
        let mut root = None;
        if !is_scratch {
            let shown = image.reference.digest().copied().unwrap_or(image.manifest);
            let prefix = self.nodes[id].counter.next(&platform, &Variables::default(), false);
            let vertex_name = format!("{prefix}FROM {}", image.reference.with_digest(shown));
            let lines = self.lines(span);
            let op = Op::Image(ImageOp { reference: image.reference.clone(), manifest: image.manifest });
            root = Some(self.vertices.add(op, vertex_name, lines, false));
            let actual = Platform {
                os: config.os.clone(),
                architecture: config.architecture.clone(),
                variant: config.variant.clone(),
                os_version: None,
            };
            if (&actual.os, &actual.architecture) != (&platform.os, &platform.architecture) {
                let message = format!(
                    "Base image {name} was pulled with platform {}, expected {} for current build",
                    quote(&actual.normalized().to_string()),
                    quote(&platform.normalized().to_string())
                );
                self.checks.warn("InvalidBaseImagePlatform", span, message, Some("choose an image that has this platform"));
            }
        }
        let node = &mut self.nodes[id];
        node.resolved = true;
        node.dispatched = !is_stage;
        node.state = State::new(platform);
        node.state.root = root;
        node.state.config = config;
        node.state.base = Some(image);
        Ok(false)
    }

    /// The whole stage is another one, or an image, or a folder.
    fn replace_stage(&mut self, id: NodeId, key: &str, context: &NamedContext, platform: &Platform) -> Outcome<bool> {
        if let NamedContext::Target(stage) = context {
            self.nodes[id].steps.clear();
            return self.alias(id, key, stage);
        }
        let loaded = self.load_context(key, context, platform);
        let (config, platform) = match &loaded {
            Loaded::Pending => return Ok(false),
            Loaded::Image(image, _) => {
                let config = image_config::inherited(&image.config);
                let own = Platform {
                    os: config.os.clone(),
                    architecture: config.architecture.clone(),
                    variant: config.variant.clone(),
                    os_version: config.os_version.clone(),
                };
                let known = !own.os.is_empty() && !own.architecture.is_empty();
                (config, if known { own } else { platform.clone() })
            }
            _ => (ImageConfig::default(), platform.clone()),
        };
        self.settle(id, loaded, config, platform);
        let node = &mut self.nodes[id];
        node.triggers_added = true;
        node.dispatched = true;
        Ok(false)
    }

    /// The stage is built on `stage` instead.
    fn alias(&mut self, id: NodeId, key: &str, stage: &str) -> Outcome<bool> {
        let span = self.nodes[id].span;
        match self.names.get(&stage.to_lowercase()) {
            Some(&target) if target < id => {
                self.nodes[id].base = Some(target);
                Ok(true)
            }
            Some(_) => {
                Err(error("target", span, format!("stage {} given as --build-context {key} must stand before its use", quote(stage))))
            }
            None => {
                let hint = suggest::nearest(stage, self.nodes.iter().map(|node| node.name.as_str())).map(str::to_owned);
                let diagnostic = error("target", span, format!("target stage {} could not be found", quote(stage)));
                Err(super::checks::with_suggestion(diagnostic, hint.as_deref()))
            }
        }
    }

    fn load_context(&mut self, key: &str, context: &NamedContext, platform: &Platform) -> Loaded {
        match context {
            NamedContext::Local | NamedContext::Target(_) => {
                let name = format!("[context {key}] load from client");
                Loaded::Folder(self.vertices.add(Op::Local { name: key.to_owned() }, name, None, false))
            }
            NamedContext::Image(name) => {
                let name = name.strip_prefix("docker-image://").unwrap_or(name);
                if name == "scratch" {
                    return Loaded::Scratch;
                }
                let request = ImageRequest { name: name.to_owned(), platform: platform.clone() };
                if self.missing.contains(&request) {
                    return Loaded::Unknown;
                }
                let Some(image) = self.images.get(&request).cloned() else {
                    self.needs.insert(request);
                    return Loaded::Pending;
                };
                let op = Op::Image(ImageOp { reference: image.reference.clone(), manifest: image.manifest });
                let vertex = self.vertices.add(op, format!("[context {key}] {name}"), None, false);
                Loaded::Image(Box::new(image), vertex)
            }
        }
    }

    fn settle(&mut self, id: NodeId, loaded: Loaded, config: ImageConfig, platform: Platform) {
        let node = &mut self.nodes[id];
        node.resolved = true;
        node.dispatched = node.stage.is_none();
        node.state = State::new(platform);
        node.state.config = config;
        match loaded {
            Loaded::Scratch | Loaded::Pending => {}
            Loaded::Unknown => node.state.unknown = true,
            Loaded::Folder(vertex) => node.state.root = Some(vertex),
            Loaded::Image(image, vertex) => {
                node.state.root = Some(vertex);
                node.state.base = Some(*image);
            }
        }
    }

    /// Puts the triggers of the base in front of the steps of a stage. True: they need other nodes.
    fn add_triggers(&mut self, id: NodeId) -> Outcome<bool> {
        let node = &self.nodes[id];
        let triggers: Vec<String> = match node.base {
            Some(base) => self.nodes[base]
                .steps
                .iter()
                .filter_map(|step| match &step.instruction.kind {
                    Kind::Onbuild(text) => Some(text.clone()),
                    _ => None,
                })
                .collect(),
            None if !node.resolved => return Ok(false),
            None => node.state.config.config.on_build.clone(),
        };
        let (span, is_stage) = (node.span, node.stage.is_some());
        let node = &mut self.nodes[id];
        node.triggers_added = true;
        node.state.config.config.on_build.clear();
        if !is_stage {
            return Ok(false);
        }
        let mut new_dependencies = false;
        let mut steps = Vec::with_capacity(triggers.len());
        for trigger in &triggers {
            let mut instruction = parse_instruction(trigger, '\\').map_err(|reason| {
                let mut diagnostic =
                    error("onbuild", span, format!("failed to parse ONBUILD trigger {}: {}", quote(trigger), reason.message));
                diagnostic.help = reason.help;
                diagnostic
            })?;
            instruction.span = span;
            let sources = self.sources(&instruction, span)?;
            new_dependencies |= !sources.is_empty();
            steps.push(Step { instruction: Cow::Owned(instruction), sources, on_build: true });
        }
        let node = &mut self.nodes[id];
        node.counter.total += steps.len();
        steps.append(&mut node.steps);
        node.steps = steps;
        Ok(new_dependencies)
    }

    /// A folder cannot be the lowest layer of an image: its files are copied into one.
    pub(super) fn make_layer_of_folder(&mut self, id: NodeId) {
        let Some(root) = self.nodes[id].state.root else { return };
        let Op::Local { name } = self.vertices.op(root) else { return };
        let name = format!("FROM {name}");
        let copy = CopyAction::new(root, ".", "/");
        let op = Op::File(FileOp { base: None, actions: vec![FileAction::Copy(copy)] });
        let lines = self.lines(self.nodes[id].span);
        let layer = self.vertices.add(op, name.clone(), lines, false);
        let state = &mut self.nodes[id].state;
        state.root = Some(layer);
        state.commit(name, true);
    }
}
