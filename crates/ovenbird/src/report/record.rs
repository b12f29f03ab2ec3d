//! How a build went: also of one that failed. Filled from the events of the build, so that every builder fills it alike.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ovenbird_dockerfile::redact::without_passwords;
use ovenbird_engine::event::VertexIndex;
use ovenbird_engine::{Event, EventSink};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{from_seconds, seconds};
use crate::error::{Error, Kind};
use crate::request::Phase;

/// Bytes of log that a report holds: the last of them. The rest is counted.
const MOST_LOG: usize = 1 << 20;
/// Steps that a report holds; more are counted nowhere but in `ran` and `cached`.
const MOST_STEPS: usize = 10_000;

/// What came of it all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// Everything that was asked for is done.
    #[default]
    Built,
    /// Something failed.
    Failed,
    /// Stopped by the user.
    Cancelled,
}

/// Why it failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ErrorReport {
    /// What sort; decides the exit code.
    pub kind: String,
    /// What failed.
    pub message: String,
    /// Why: each one the cause of the one before.
    pub causes: Vec<String>,
    /// How to fix it.
    pub hints: Vec<String>,
}

/// The Dockerfile that was built: as plugins left it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DockerfileReport {
    /// Its name.
    pub name: String,
    /// Its text.
    pub text: String,
}

/// What git says of the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct GitReport {
    /// Commit.
    pub commit: String,
    /// Branch that is checked out.
    pub branch: Option<String>,
    /// Tag of the commit.
    pub tag: Option<String>,
}

/// What the build said.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct LogReport {
    /// The last lines, secrets masked.
    pub text: String,
    /// Bytes of the whole log.
    pub bytes: u64,
    /// Bytes at its beginning that are not in `text`.
    pub dropped: u64,
}

/// How a step came to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum StepOutcome {
    /// It ran.
    Ran,
    /// It was in the cache.
    Cached,
    /// It failed.
    Failed,
    /// It was stopped because something else failed or the build was cancelled.
    Stopped,
}

/// One step of the build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct StepReport {
    /// `[build 2/4] RUN make`.
    pub name: String,
    /// First line of the instruction.
    pub line: Option<u32>,
    /// How it came to be.
    pub outcome: StepOutcome,
    /// Seconds that it ran.
    #[serde(serialize_with = "seconds", deserialize_with = "from_seconds")]
    #[schemars(with = "f64")]
    pub seconds: Duration,
    /// Why it did not come from the cache.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub causes: Vec<String>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// How a plugin ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PluginOutcome {
    /// Well.
    #[default]
    Ok,
    /// It failed, and with it the build.
    Failed,
    /// It failed, and the build went on.
    Warned,
    /// There is no such plugin, and it was not required.
    Skipped,
}

/// What a plugin did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PluginReport {
    /// When it ran.
    pub phase: Phase,
    /// Which.
    pub name: String,
    /// How it ended.
    pub outcome: PluginOutcome,
    /// Why it failed.
    pub error: Option<String>,
    /// When it began, RFC 3339.
    pub started: String,
    /// Seconds.
    #[serde(rename = "seconds", serialize_with = "seconds", deserialize_with = "from_seconds")]
    #[schemars(with = "f64")]
    pub took: Duration,
    /// What it gave.
    pub result: Value,
    /// What it changed, as the log shows it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub changes: Vec<String>,
}

impl PluginReport {
    pub(crate) fn new(phase: Phase, name: &str, started: String) -> Self {
        Self {
            phase,
            name: name.to_owned(),
            outcome: PluginOutcome::Ok,
            error: None,
            started,
            took: Duration::ZERO,
            result: Value::Null,
            changes: vec![],
        }
    }
}

/// An image, described.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ImageReport {
    /// Which platform.
    pub platform: String,
    /// Digest of its manifest.
    pub digest: String,
    /// Bytes of its layers, as a registry holds them.
    pub size: u64,
    /// As `docker image inspect` shows it.
    pub inspect: Value,
    /// As `docker images` lists it.
    pub info: Value,
}

/// A base image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BaseReport {
    /// Its name, with the digest that it stood for.
    pub name: String,
    /// Is it what the built image begins with?
    #[serde(rename = "final")]
    pub is_final: bool,
    /// What it is.
    #[serde(flatten)]
    pub image: ImageReport,
}

/// How a build went.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Record {
    /// What came of it.
    pub outcome: Outcome,
    /// Exit code: 0 when it was built.
    pub return_code: u8,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorReport>,
    /// When it began, RFC 3339.
    pub started: String,
    /// When it ended.
    pub finished: String,
    /// The first name that was asked for, in full.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_name: Option<String>,
    /// What git says of the source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub git: Option<GitReport>,
    /// The Dockerfile that was built.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dockerfile: Option<DockerfileReport>,
    /// What the build said.
    pub logs: LogReport,
    /// The steps, in the order in which they began.
    pub steps: Vec<StepReport>,
    /// The plugins that ran, in their order.
    pub plugins: Vec<PluginReport>,
    /// The containers that the build ran in; none where steps are isolated without one.
    pub container_ids: Vec<String>,
    /// The built image, each platform.
    pub images: Vec<ImageReport>,
    /// The images that it was made from.
    pub base_images: Vec<BaseReport>,
}

impl Record {
    /// Says how it ended.
    pub(crate) fn conclude(&mut self, error: Option<&Error>, cancelled: bool) {
        let Some(error) = error else { return };
        let cancelled = cancelled || error.kind == Kind::Cancelled;
        self.outcome = if cancelled { Outcome::Cancelled } else { Outcome::Failed };
        self.return_code = if cancelled { Kind::Cancelled } else { error.kind }.exit_code();
        let kind = serde_json::to_value(error.kind).ok().and_then(|kind| kind.as_str().map(str::to_owned));
        let shown = |text: &String| without_passwords(text).into_owned();
        self.error = Some(ErrorReport {
            kind: kind.unwrap_or_default(),
            message: shown(&error.message),
            causes: error.causes.iter().map(shown).collect(),
            hints: error.hints.iter().map(shown).collect(),
        });
    }

    /// The file of `--metadata-file` for a build that failed: like that of one that did not, without an image.
    pub fn metadata(&self) -> Value {
        let mut own = serde_json::to_value(self).unwrap_or_default();
        if let Some(own) = own.as_object_mut() {
            own.insert("version".into(), super::VERSION.into());
        }
        serde_json::json!({ "ovenbird": own })
    }

    /// The record of a job that ended before there was one.
    pub fn of_error(error: &Error) -> Self {
        let mut record = Self::default();
        record.conclude(Some(error), false);
        record
    }
}

/// Writes down what a build says, and passes it on.
pub(crate) struct Recorder {
    inner: Arc<dyn EventSink>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    log: VecDeque<u8>,
    bytes: u64,
    order: Vec<VertexIndex>,
    steps: BTreeMap<VertexIndex, StepReport>,
    containers: Vec<String>,
    /// The last text did not end with its line.
    open: bool,
}

impl State {
    fn say(&mut self, text: &str) {
        self.bytes += text.len() as u64;
        self.log.extend(text.as_bytes());
        let over = self.log.len().saturating_sub(MOST_LOG);
        self.log.drain(..over);
        self.open = !text.ends_with('\n') && !text.is_empty();
    }

    fn line(&mut self, text: &str) {
        if self.open {
            self.say("\n");
        }
        self.say(text);
        self.say("\n");
    }

    fn step(&mut self, vertex: VertexIndex, name: String, line: Option<u32>, outcome: StepOutcome) {
        if self.steps.len() >= MOST_STEPS && !self.steps.contains_key(&vertex) {
            return;
        }
        let report = StepReport { name, line, outcome, seconds: Duration::ZERO, causes: vec![], error: None };
        if self.steps.insert(vertex, report).is_none() {
            self.order.push(vertex);
        }
    }
}

impl Recorder {
    pub(crate) fn new(inner: Arc<dyn EventSink>) -> Self {
        Self { inner, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was said so far.
    pub(crate) fn logs(&self) -> LogReport {
        let state = self.state();
        let (front, back) = state.log.as_slices();
        let bytes = [front, back].concat();
        LogReport { dropped: state.bytes - bytes.len() as u64, bytes: state.bytes, text: String::from_utf8_lossy(&bytes).into_owned() }
    }

    /// The containers so far.
    pub(crate) fn containers(&self) -> Vec<String> {
        self.state().containers.clone()
    }

    /// The steps so far.
    pub(crate) fn steps(&self) -> Vec<StepReport> {
        let state = self.state();
        state.order.iter().filter_map(|vertex| state.steps.get(vertex).cloned()).collect()
    }
}

impl EventSink for Recorder {
    fn emit(&self, event: Event) {
        {
            let mut state = self.state();
            match &event {
                Event::Isolation { level, detail } => state.line(&format!("isolation: {level} ({detail})")),
                Event::Started { vertex, name, line } => {
                    // Until it says otherwise: a step that does not end was stopped.
                    state.step(*vertex, name.clone(), *line, StepOutcome::Stopped);
                    state.line(name);
                }
                Event::Explained { vertex, causes } => {
                    if let Some(step) = state.steps.get_mut(vertex) {
                        step.causes.clone_from(causes);
                    }
                }
                Event::Cached { vertex, name } => {
                    state.step(*vertex, name.clone(), None, StepOutcome::Cached);
                    state.line(&format!("{name} (cached)"));
                }
                Event::Log { text, .. } => state.say(text),
                Event::Finished { vertex, took } => {
                    if let Some(step) = state.steps.get_mut(vertex) {
                        (step.outcome, step.seconds) = (StepOutcome::Ran, *took);
                    }
                }
                Event::Failed { vertex, error } => {
                    if let Some(step) = state.steps.get_mut(vertex) {
                        step.outcome = StepOutcome::Failed;
                        step.error = Some(error.clone());
                    }
                    state.line(error);
                }
                Event::Warning { code, message, line } => {
                    let at = line.map(|line| format!(" (line {line})")).unwrap_or_default();
                    state.line(&format!("warning: {message} [{code}]{at}"));
                }
                Event::Message { text } => state.line(text),
                Event::Container { id } if state.containers.len() < MOST_STEPS => state.containers.push(id.clone()),
                _ => {}
            }
        }
        self.inner.emit(event);
    }
}

#[cfg(test)]
mod tests {
    use ovenbird_engine::event::{LogStream, Silent};

    use super::*;

    #[test]
    fn logs_are_bounded_and_steps_are_kept() {
        let recorder = Recorder::new(Arc::new(Silent));
        recorder.emit(Event::Started { vertex: 1, name: "[1/2] RUN a".into(), line: Some(2) });
        recorder.emit(Event::Log { vertex: 1, stream: LogStream::Stdout, text: "x".repeat(MOST_LOG) });
        recorder.emit(Event::Finished { vertex: 1, took: Duration::from_millis(1500) });
        recorder.emit(Event::Container { id: "89ab".into() });
        assert_eq!(recorder.containers(), ["89ab"]);
        recorder.emit(Event::Cached { vertex: 2, name: "[2/2] COPY b".into() });
        recorder.emit(Event::Started { vertex: 3, name: "[3/3] RUN c".into(), line: Some(4) });
        let logs = recorder.logs();
        assert!(logs.text.len() <= MOST_LOG && logs.text.ends_with("[2/2] COPY b (cached)\n[3/3] RUN c\n"));
        assert_eq!(logs.bytes, logs.dropped + logs.text.len() as u64);
        let steps = recorder.steps();
        let told: Vec<_> = steps.iter().map(|step| (step.outcome, step.seconds.as_millis())).collect();
        assert_eq!(told, [(StepOutcome::Ran, 1500), (StepOutcome::Cached, 0), (StepOutcome::Stopped, 0)]);
    }
}
