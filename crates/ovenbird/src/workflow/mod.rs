//! The phases of a build and the plugins that run in them.
//!
//! A [`Flow`] is made of a request before any work is done: every plugin is found and its arguments are checked then. What a pre_build
//! plugin changes is a change of the request and of the source tree, so it is in every cache key by construction; nothing else that a
//! plugin does reaches the build. A plugin must not know of other plugins but by their results.

mod built_in;
pub(crate) mod desk;
mod draft;
mod external;
mod inside;
mod schema;
mod text;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ovenbird_engine::Event;
use ovenbird_engine::ops::log::Masks;
use ovenbird_oci::registry::ClientOptions;
use ovenbird_oci::{Descriptor, Platform, Reference};
use serde_json::{Map, Value};

pub use built_in::{Reference as BuiltInReference, reference};
pub use desk::Desk;
pub(crate) use draft::{Content, Draft, MAIN};

use desk::At;
use external::Program;

use crate::builder::{Builder, Image, Job, Library};
use crate::error::{Error, Kind};
use crate::naming::TagPolicies;
use crate::report::{PluginOutcome, PluginReport};
use crate::request::workflow::{Entry, OnFailure, Workflow};
use crate::request::{BuildRequest, Phase};
use crate::settings::Environment;
use crate::source::SourceTree;

/// Seconds that a plugin may take when nothing is said.
pub const DEFAULT_TIMEOUT: u64 = 600;
/// Most lines of changes that a report keeps of one plugin.
const MOST_CHANGES: usize = 10_000;

/// What of this machine plugins are run with.
#[derive(Debug, Clone)]
pub struct Bench {
    /// Variables: secrets that are named by one, and `PATH`.
    pub environment: Environment,
    /// Folders with programs `ovenbird-plugin-NAME`, before those of `PATH`.
    pub folders: Vec<PathBuf>,
    /// How registries are spoken to.
    pub client: ClientOptions,
    /// Tags of names without one.
    pub policies: TagPolicies,
    /// Where temporary files go.
    pub temp: PathBuf,
    /// Seconds since 1970 when the job began.
    pub now: i64,
    /// Where the user's files and programs are.
    pub desk: Desk,
}

impl Bench {
    /// Of these settings.
    pub fn new(settings: &crate::Settings, environment: &Environment) -> Self {
        Self {
            environment: environment.clone(),
            folders: settings.plugin_folders.clone(),
            client: settings.client_options(),
            policies: settings.tags.clone(),
            temp: settings.temp.clone(),
            now: environment.now(),
            desk: Desk::default(),
        }
    }

    /// Without plugins of the user.
    pub(crate) fn bare(temp: &Path) -> Self {
        Self {
            environment: Environment::fixed(BTreeMap::new(), "/", None),
            folders: vec![],
            client: ClientOptions::default(),
            policies: TagPolicies::default(),
            temp: temp.to_owned(),
            now: 0,
            desk: Desk::default(),
        }
    }
}

/// One platform of an image, described.
#[derive(Debug, Clone, PartialEq)]
pub struct Described {
    /// Which.
    pub platform: Platform,
    /// Its manifest.
    pub manifest: Descriptor,
    /// The manifest, read.
    pub document: Value,
    /// Its configuration, read.
    pub config: Value,
    /// Digest of the configuration: Docker's image id.
    pub id: String,
    /// Bytes of its layers, as a registry holds them.
    pub size: u64,
}

/// A base image that a Dockerfile names.
#[derive(Debug, Clone, PartialEq)]
pub struct Base {
    /// Its name, with the digest that it stands for.
    pub reference: Reference,
    /// Is it what the built image begins with?
    pub is_final: bool,
    /// What it is.
    pub image: Described,
}

/// What plugins ask a builder beside building.
pub trait Workshop: Builder + Library {
    /// Describes a built image, each platform.
    fn describe(&self, image: &Image) -> Result<Vec<Described>, Error>;
    /// The base images of a Dockerfile, each once, looked up as a build would.
    fn bases(&self, source: &SourceTree, request: &BuildRequest, job: &Job) -> Result<Vec<Base>, Error>;
    /// What a Dockerfile writes to name a built image as its base.
    fn as_base(&self, image: &Image) -> Result<String, Error>;
    /// The same files in fewer layers: in one (`whole`), or in one above those of the base image.
    fn squash(&self, image: &Image, whole: bool, source: &SourceTree, request: &BuildRequest, job: &Job) -> Result<Image, Error>;
    /// Takes names away on this machine.
    fn forget(&self, names: &[Reference]) -> Result<(), Error>;
}

/// Where a build stands when a plugin runs.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) enum Standing {
    /// Nothing has gone wrong so far.
    #[default]
    Well,
    Failed(String),
    Cancelled,
}

/// What became of the image.
#[derive(Debug, Clone, Default)]
pub(crate) struct Delivered {
    /// Names on this machine.
    pub(crate) names: Vec<String>,
    /// Names in registries.
    pub(crate) pushed: Vec<Reference>,
}

/// All that a plugin sees and does.
pub(crate) struct Scene<'a> {
    pub(crate) phase: Phase,
    pub(crate) at: At,
    /// In pre_build a plugin may change it; later it is as it was built.
    pub(crate) draft: &'a mut Draft,
    /// `None`: it could not be had.
    pub(crate) tree: Option<&'a SourceTree>,
    /// From pre_publish on, when it was built. Only squash changes it.
    pub(crate) image: Option<&'a mut Image>,
    pub(crate) delivered: &'a Delivered,
    pub(crate) standing: &'a Standing,
    /// What ran before.
    pub(crate) done: &'a [PluginReport],
    pub(crate) shop: &'a dyn Workshop,
    pub(crate) bench: &'a Bench,
    /// Those that the plugin was granted.
    pub(crate) secrets: BTreeMap<String, Vec<u8>>,
    pub(crate) masks: &'a Masks,
    pub(crate) name: &'a str,
    pub(crate) timeout: u64,
    pub(crate) job: &'a Job,
}

impl Scene<'_> {
    /// A line of the log.
    pub(crate) fn say(&self, line: impl Into<String>) {
        self.job.sink.emit(Event::Message { text: self.masks.text(format!("[{} {}] {}", self.phase, self.name, line.into())) });
    }

    /// What a reserved value stands for now.
    fn reserved(&self, name: &str) -> Result<String, Error> {
        let context = || self.tree.and_then(|tree| tree.contexts.get(MAIN)).map(|context| context.dir.clone());
        let found = match name {
            "BUILT_IMAGE_ID" => self.image.as_deref().and_then(|image| image.platforms.first()).map(|(_, _, config)| config.to_string()),
            "BUILD_DOCKERFILE_PATH" => context().and_then(|dir| {
                let path = dir.join(&self.tree?.dockerfile_name);
                path.is_file().then(|| path.display().to_string())
            }),
            "BASE_IMAGE" => text::bases(&self.draft.dockerfile, &self.draft.request.build_args, &[]).pop().map(|base| base.name),
            _ => context().map(|dir| dir.display().to_string()),
        };
        found.ok_or_else(|| veto(format!("{name} among its arguments stands for nothing in {}", self.phase)))
    }

    /// The built image; every phase that a plugin of images runs in has one, but exit after a failure.
    pub(crate) fn image(&self) -> Result<&Image, Error> {
        self.image.as_deref().ok_or_else(|| Error::new(Kind::Veto, "there is no image: the build failed before"))
    }
}

/// Something that runs in a phase. Its arguments are its fields.
pub(crate) trait Plugin: Send {
    /// What can be wrong with the arguments beyond their types, said before the build starts.
    fn check(&self, _request: &BuildRequest) -> Result<(), String> {
        Ok(())
    }

    /// Ids of the secrets that it must be granted.
    fn secrets(&self) -> Vec<&str> {
        vec![]
    }

    /// Runs; what comes back is its result in the report. An error of kind [`Kind::Veto`] is a no.
    fn run(&self, scene: &mut Scene) -> Result<Value, Error>;
}

/// No, with a reason.
pub(crate) fn veto(reason: impl Into<String>) -> Error {
    Error::new(Kind::Veto, reason)
}

struct Step {
    entry: Entry,
    /// `None`: there is no such plugin, and it is not required.
    plugin: Option<Prepared>,
}

/// A plugin with its arguments; in these, reserved values stand for what is known when it runs.
pub(crate) struct Prepared {
    plugin: Box<dyn Plugin>,
    args: Map<String, Value>,
    /// The same with other arguments.
    again: Box<dyn Fn(Map<String, Value>) -> Result<Box<dyn Plugin>, String>>,
    /// It is a program of the user's.
    program: Option<Program>,
}

/// Texts that arguments may be, and that are replaced when the plugin runs.
pub const RESERVED: [&str; 5] = ["BUILT_IMAGE_ID", "BUILD_DOCKERFILE_PATH", "BUILD_SOURCE_PATH", "BUILD_GIT_PATH", "BASE_IMAGE"];

fn has_reserved(value: &Value) -> bool {
    match value {
        Value::String(text) => RESERVED.contains(&text.as_str()),
        Value::Array(items) => items.iter().any(has_reserved),
        Value::Object(object) => object.values().any(has_reserved),
        _ => false,
    }
}

fn replaced(value: Value, of: &dyn Fn(&str) -> Result<String, Error>) -> Result<Value, Error> {
    Ok(match value {
        Value::String(text) if RESERVED.contains(&text.as_str()) => Value::String(of(&text)?),
        Value::Array(items) => Value::Array(items.into_iter().map(|item| replaced(item, of)).collect::<Result<_, _>>()?),
        Value::Object(object) => {
            Value::Object(object.into_iter().map(|(key, value)| Ok((key, replaced(value, of)?))).collect::<Result<_, Error>>()?)
        }
        other => other,
    })
}

/// What the caller has of the build when a phase begins.
pub(crate) struct Stand<'a> {
    pub(crate) draft: &'a mut Draft,
    pub(crate) tree: Option<&'a SourceTree>,
    pub(crate) image: Option<&'a mut Image>,
    pub(crate) delivered: &'a Delivered,
    pub(crate) shop: &'a dyn Workshop,
    pub(crate) job: &'a Job,
}

/// The plugins of one build, ready to run, and what they came to.
pub(crate) struct Flow<'a> {
    bench: &'a Bench,
    steps: BTreeMap<Phase, Vec<Step>>,
    secrets: BTreeMap<String, Vec<u8>>,
    masks: Masks,
    start: Instant,
    pub(crate) reports: Vec<PluginReport>,
    pub(crate) standing: Standing,
}

impl<'a> Flow<'a> {
    /// Finds every plugin of the request and checks its arguments.
    pub(crate) fn prepare(request: &BuildRequest, bench: &'a Bench, job: &Job) -> Result<Self, Error> {
        let mut flow = Self {
            bench,
            steps: BTreeMap::new(),
            secrets: BTreeMap::new(),
            masks: Masks::default(),
            start: Instant::now(),
            reports: vec![],
            standing: Standing::Well,
        };
        if request.workflow.is_empty() {
            return Ok(flow);
        }
        flow.read_secrets(request)?;
        for phase in Phase::ALL {
            for (place, entry) in request.workflow.entries(phase).iter().enumerate() {
                let step = flow
                    .prepare_step(At { phase, place }, entry, request, job)
                    .map_err(|error| Error { message: flow.masks.text(error.message), ..error })?;
                flow.steps.entry(phase).or_default().push(step);
            }
        }
        Ok(flow)
    }

    /// Reads the secrets that plugins are granted, and all that may be in a text of theirs.
    fn read_secrets(&mut self, request: &BuildRequest) -> Result<(), Error> {
        let entries = || Phase::ALL.into_iter().flat_map(|phase| request.workflow.entries(phase));
        let specs: Vec<_> = request.secrets.iter().filter(|spec| !spec.is_pipe()).cloned().collect();
        let found = crate::builder::secrets(&specs, &self.bench.environment)?;
        for entry in entries() {
            for id in &entry.secrets {
                let Some(source) = found.get(id) else {
                    let given = request.secrets.iter().any(|spec| spec.id == *id);
                    let why = if given { "it is a pipe, which can be read once only" } else { "the build has no such secret" };
                    return Err(Error::new(Kind::Usage, format!("the plugin {} cannot be granted the secret {id:?}: {why}", entry.name))
                        .hint(format!("give it with --secret id={id},src=FILE or id={id},env=NAME")));
                };
                let bytes = source.read().map_err(|e| Error::from_chain(Kind::Source, &e).while_doing(format!("secret {id:?}")))?;
                self.secrets.insert(id.clone(), bytes);
            }
        }
        self.masks = Masks::of(found.values().filter_map(|source| source.read().ok()));
        Ok(())
    }

    fn prepare_step(&self, at: At, entry: &Entry, request: &BuildRequest, job: &Job) -> Result<Step, Error> {
        let phase = at.phase;
        let named = format!("the plugin {phase}:{}", entry.name);
        let wrong = |why: String| Error::new(Kind::Usage, format!("{named} cannot be used")).because(why);
        let complete = |schema: &Value| {
            let mut args: Map<String, Value> = entry.args.clone();
            schema::from_text(schema, &mut args, &entry.typed)?;
            schema::check(schema, &args)?;
            Ok(args)
        };
        let found = match (&entry.file, built_in::find(&entry.name), self.bench.desk.caller()) {
            (None, Some(built_in), _) => Some((built_in.phases.to_vec(), built_in.prepare(&complete).map_err(wrong)?)),
            (.., None) => external::find(entry, self.bench, &complete, job)?,
            // The caller has found it, and has checked its arguments.
            (.., Some(caller)) => {
                (!caller.is_absent(at)).then(|| (Phase::ALL.to_vec(), external::of_caller(&entry.name, Arc::clone(caller))))
            }
        };
        let Some((phases, plugin)) = found else {
            if !entry.required {
                return Ok(Step { entry: entry.clone(), plugin: None });
            }
            let error = Error::new(Kind::Usage, format!("there is no plugin {:?}", entry.name));
            return Err(match built_in::nearest(&entry.name) {
                Some(near) => error.hint(format!("did you mean `{near}`?")),
                None => error.hint(format!(
                    "put a program ovenbird-plugin-{} into a plugin folder or on the PATH, or give it with file=PATH; docs/reference/plugins.md lists those built in",
                    entry.name
                )),
            });
        };
        if !phases.contains(&phase) {
            let phases: Vec<&str> = phases.iter().map(|phase| phase.as_str()).collect();
            return Err(wrong(format!("it does not run in {phase}, but in {}", phases.join(", "))));
        }
        if let Some(id) = plugin.plugin.secrets().into_iter().find(|id| !entry.secrets.iter().any(|granted| granted == id)) {
            return Err(wrong(format!("it is not granted the secret {id:?}")).hint(format!("add secret={id} to it")));
        }
        plugin.plugin.check(request).map_err(wrong)?;
        Ok(Step { entry: entry.clone(), plugin: Some(plugin) })
    }

    /// A plugin that is there.
    pub(crate) fn prepared(&self, At { phase, place }: At) -> Option<&Prepared> {
        self.steps.get(&phase)?.get(place)?.plugin.as_ref()
    }

    fn entry(&self, At { phase, place }: At) -> Option<&Entry> {
        Some(&self.steps.get(&phase)?.get(place)?.entry)
    }

    /// Plugins that are not there, and need not be.
    pub(crate) fn absent(&self) -> Vec<At> {
        let all = self.steps.iter().flat_map(|(phase, steps)| steps.iter().enumerate().map(|(place, step)| (*phase, place, step)));
        all.filter(|(.., step)| step.plugin.is_none()).map(|(phase, place, _)| At { phase, place }).collect()
    }

    /// The secrets that a plugin is granted.
    fn granted(&self, entry: &Entry) -> BTreeMap<String, Vec<u8>> {
        entry.secrets.iter().filter_map(|id| Some((id.clone(), self.secrets.get(id)?.clone()))).collect()
    }

    /// How long the plugins of a phase may take.
    pub(crate) fn longest(&self, phase: Phase) -> Duration {
        let times = self.steps.get(&phase).into_iter().flatten().map(|step| step.entry.timeout.unwrap_or(DEFAULT_TIMEOUT));
        Duration::from_secs(times.sum())
    }

    /// A line of the log of a plugin.
    fn say(&self, phase: Phase, name: &str, line: &str, job: &Job) {
        job.sink.emit(Event::Message { text: self.masks.text(format!("[{phase} {name}] {line}")) });
    }

    /// When the job began, and now.
    pub(crate) fn times(&self) -> (String, String) {
        let at = |seconds: u64| jiff::Timestamp::from_second(self.bench.now + seconds as i64).unwrap_or_default().to_string();
        (at(0), at(self.start.elapsed().as_secs()))
    }

    /// Are there plugins for this phase?
    pub(crate) fn has(&self, phase: Phase) -> bool {
        self.steps.get(&phase).is_some_and(|steps| !steps.is_empty())
    }

    /// Text without secrets.
    pub(crate) fn mask(&self, text: String) -> String {
        self.masks.text(text)
    }

    /// Runs a phase. All plugins of exit run, whatever the others come to; elsewhere the first failure ends the phase.
    pub(crate) fn run(&mut self, phase: Phase, mut stand: Stand) -> Result<(), Error> {
        // Put back: a build whose blobs were damaged runs its phases once more.
        let steps = self.steps.remove(&phase).unwrap_or_default();
        let mut first = None;
        for (place, step) in steps.iter().enumerate() {
            let done = if stand.job.cancel.is_cancelled() && phase != Phase::Exit {
                Err(Error::new(Kind::Cancelled, "the build was cancelled"))
            } else {
                self.step(At { phase, place }, step, &mut stand)
            };
            if let Err(error) = done {
                first.get_or_insert(error);
                if phase != Phase::Exit {
                    break;
                }
            }
        }
        self.steps.insert(phase, steps);
        first.map_or(Ok(()), Err)
    }

    fn step(&mut self, at: At, step: &Step, stand: &mut Stand) -> Result<(), Error> {
        let phase = at.phase;
        let Step { entry, plugin } = step;
        let name = &entry.name;
        let began = self.start.elapsed();
        let started = self.times().1;
        let mut report = PluginReport::new(phase, name, started);
        let sink = &stand.job.sink;
        let Some(plugin) = plugin else {
            sink.emit(Event::Message { text: format!("[{phase} {name}] skipped: there is no such plugin, and it is not required") });
            report.outcome = PluginOutcome::Skipped;
            self.reports.push(report);
            return Ok(());
        };
        sink.emit(Event::Message { text: format!("[{phase} {name}] running") });
        let before = stand.draft.clone();
        let secrets = self.granted(entry);
        let mut scene = Scene {
            phase,
            at,
            draft: stand.draft,
            tree: stand.tree,
            image: stand.image.as_deref_mut(),
            delivered: stand.delivered,
            standing: &self.standing,
            done: &self.reports,
            shop: stand.shop,
            bench: self.bench,
            secrets,
            masks: &self.masks,
            name,
            timeout: entry.timeout.unwrap_or(DEFAULT_TIMEOUT),
            job: stand.job,
        };
        let late = if plugin.args.values().any(has_reserved) {
            let args = plugin.args.iter().map(|(key, value)| Ok((key.clone(), replaced(value.clone(), &|name| scene.reserved(name))?)));
            args.collect::<Result<_, Error>>().and_then(|args| (plugin.again)(args).map_err(veto)).map(Some)
        } else {
            Ok(None)
        };
        let result = late.and_then(|late| late.as_ref().unwrap_or(&plugin.plugin).run(&mut scene));
        report.took = self.start.elapsed().saturating_sub(began);
        match result {
            Ok(value) => {
                if phase == Phase::PreBuild {
                    let changes = stand.draft.changes_since(&before, name).into_iter().take(MOST_CHANGES);
                    report.changes = changes.map(|line| self.masks.text(line)).collect();
                    for line in &report.changes {
                        sink.emit(Event::Message { text: format!("[{phase} {name}] {line}") });
                    }
                }
                report.result = masked(value, &self.masks);
                self.reports.push(report);
                Ok(())
            }
            Err(error) => {
                // What a failed plugin did half is not built.
                *stand.draft = before;
                let error = Error {
                    message: format!("{phase} plugin {name}: {}", self.masks.text(error.message)),
                    causes: error.causes.into_iter().map(|cause| self.masks.text(cause)).collect(),
                    ..error
                };
                report.error = Some(error.to_string());
                let goes_on = entry.on_failure == OnFailure::Warn && error.kind != Kind::Cancelled;
                report.outcome = if goes_on { PluginOutcome::Warned } else { PluginOutcome::Failed };
                self.reports.push(report);
                if goes_on {
                    sink.emit(Event::Warning { code: "plugin".into(), message: error.to_string(), line: None });
                    return Ok(());
                }
                Err(error)
            }
        }
    }
}

/// A result without secrets.
pub(crate) fn masked(value: Value, masks: &Masks) -> Value {
    match value {
        Value::String(text) => Value::String(masks.text(text)),
        Value::Array(items) => items.into_iter().map(|item| masked(item, masks)).collect(),
        Value::Object(object) => {
            object.into_iter().map(|(key, value)| (masks.text(key), masked(value, masks))).collect::<Map<_, _>>().into()
        }
        other => other,
    }
}

/// Plugins of a project that reach beyond the build: programs, secrets, files of this machine, registries, the network. Only a project that
/// the user trusts may ask for them.
pub(crate) fn reaching_out(workflow: &Workflow) -> impl Iterator<Item = String> {
    let all = Phase::ALL.into_iter().flat_map(|phase| workflow.entries(phase).iter().map(move |entry| (phase, entry)));
    let beyond = all.filter(|(_, entry)| {
        entry.file.is_some() || !entry.secrets.is_empty() || built_in::find(&entry.name).is_none_or(|one| one.reaches_out)
    });
    beyond.map(|(phase, entry)| format!("{phase}:{}", entry.name))
}
