//! Why a step ran: what its definition key was made of, remembered from one build of a Dockerfile to the next.
//!
//! A trace holds digests, never values: build arguments and environments may be confidential. It plays no part in what
//! is built: without it a build is the same and only the explanation is missing.

pub mod files;

use std::collections::HashMap;

use ovenbird_oci::{Digest, Platform};
use serde::{Deserialize, Serialize};

use crate::cache::CacheKey;
use crate::plan::{ExecMountKind, ExecOp, Op};
use crate::state::{State, StateError};

/// Kinds of things a key is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PartKind {
    /// Something the instruction itself says; the name says what.
    Instruction,
    /// `ARG`.
    Argument,
    /// `ENV`.
    Variable,
    /// The target platform.
    Platform,
    /// The base image.
    Image,
    /// The step before.
    Parent,
    /// A stage, image or remote source that files are taken from.
    Source,
    /// Files of a local context; the name says which context and path.
    Files,
}

/// One thing a key is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// What.
    pub kind: PartKind,
    /// Which of its kind; parts of two builds with the same kind and name are compared.
    pub name: String,
    /// Compared, not shown.
    pub value: Digest,
    /// For people; not compared.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub shown: String,
}

impl Part {
    fn new(kind: PartKind, name: &str, value: impl AsRef<[u8]>) -> Self {
        Self { kind, name: name.into(), value: Digest::of(value.as_ref()), shown: String::new() }
    }

    /// What another vertex gives.
    pub fn input(kind: PartKind, name: &str, key: Option<CacheKey>, shown: String) -> Self {
        Self { kind, name: name.into(), value: key.map_or_else(|| Digest::of(b""), CacheKey::digest), shown }
    }
}

/// How a step came to its result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It ran.
    Ran,
    /// It ran and failed, or was stopped.
    Failed,
    /// Its result was in the cache.
    Cached,
    /// Something after it was in the cache, or the build ended before it.
    NotReached,
    /// It would run (`ovenbird plan`).
    WouldRun,
}

/// One step of a build.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepTrace {
    /// `[build 2/5] RUN make`.
    pub name: String,
    /// First line of the instruction.
    pub line: Option<u32>,
    /// What became of it.
    pub outcome: Outcome,
    /// Why it ran: exact, most important first. Empty unless it ran or would run.
    pub causes: Vec<String>,
    /// What its key was made of.
    pub parts: Vec<Part>,
}

/// The steps of one build for one platform.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trace {
    /// Dockerfile, target and platform, for people.
    pub title: String,
    /// In the order of the plan.
    pub steps: Vec<StepTrace>,
}

/// The trace of the last build with this name.
pub fn load(state: &State, name: &Digest) -> Option<Trace> {
    serde_json::from_slice(&std::fs::read(state.traces_dir().join(name.hex())).ok()?).ok()
}

/// Takes the place of the trace of the build before.
pub fn save(state: &State, name: &Digest, trace: &Trace) -> Result<(), StateError> {
    state.write_trace(&name.hex(), &serde_json::to_vec(trace).unwrap_or_default())
}

/// Traces of builds in this state folder, the last build first.
pub fn all(state: &State) -> Vec<Trace> {
    let mut found: Vec<_> = std::fs::read_dir(state.traces_dir())
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| !entry.file_name().to_string_lossy().starts_with(files::PREFIX))
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    found.sort_unstable_by(|a, b| b.cmp(a));
    found.into_iter().filter_map(|(_, path)| serde_json::from_slice(&std::fs::read(path).ok()?).ok()).collect()
}

/// What the instruction and the platform put into a key. What its inputs put there is [`Part::input`]'s.
pub fn own_parts(op: &Op, platform: &Platform) -> Vec<Part> {
    let mut parts = vec![Part::new(PartKind::Platform, "", platform.to_string())];
    parts[0].shown = platform.to_string();
    match op {
        Op::Exec(exec) => exec_parts(exec, &mut parts),
        other => parts.push(said("the instruction", other)),
    }
    parts
}

/// Something the instruction says.
fn said(name: &str, value: &impl Serialize) -> Part {
    Part::new(PartKind::Instruction, name, serde_json::to_vec(value).unwrap_or_default())
}

fn exec_parts(exec: &ExecOp, parts: &mut Vec<Part>) {
    parts.extend([
        said("the command", &(&exec.args, &exec.inline_files)),
        said("the working directory", &exec.cwd),
        said("the user", &exec.user),
        said("the network mode", &exec.network),
        said("the security mode", &exec.security),
        said("the host name", &exec.hostname),
        said("--add-host", &exec.hosts),
    ]);
    for mount in &exec.mounts {
        let name = match &mount.kind {
            ExecMountKind::Secret { id, .. } => format!("the mount of secret {id:?}"),
            ExecMountKind::Ssh { id, .. } => format!("the mount of ssh agent {id:?}"),
            _ => format!("the mount at {}", mount.target),
        };
        parts.push(said(&name, mount));
    }
    for pair in &exec.env {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let kind = if exec.arguments.iter().any(|argument| argument == name) { PartKind::Argument } else { PartKind::Variable };
        parts.push(Part::new(kind, name, value));
    }
}

/// Finds for each step of this build the step of the one before: the same text in the same stage, else the same place.
#[derive(Debug)]
pub struct Before {
    trace: Option<Trace>,
    /// Old step of a new one.
    matched: HashMap<usize, usize>,
}

impl Before {
    /// `names` are those of this build's steps with their numbers.
    pub fn new(trace: Option<Trace>, names: &[(usize, String)]) -> Self {
        let mut matched = HashMap::new();
        if let Some(trace) = &trace {
            let mut free: Vec<bool> = vec![true; trace.steps.len()];
            let mut places: HashMap<(&str, &str), Vec<usize>> = HashMap::new();
            for (at, step) in trace.steps.iter().enumerate().rev() {
                places.entry(split(&step.name)).or_default().push(at);
            }
            for (id, name) in names {
                if let Some(at) = places.get_mut(&split(name)).and_then(Vec::pop) {
                    free[at] = false;
                    matched.insert(*id, at);
                }
            }
            let mut rest: HashMap<&str, Vec<usize>> = HashMap::new();
            for (at, step) in trace.steps.iter().enumerate().rev().filter(|(at, _)| free[*at]) {
                rest.entry(split(&step.name).0).or_default().push(at);
            }
            for (id, name) in names {
                if !matched.contains_key(id)
                    && let Some(at) = rest.get_mut(split(name).0).and_then(Vec::pop)
                {
                    matched.insert(*id, at);
                }
            }
        }
        Self { trace, matched }
    }

    /// Why a step with these parts was not in the cache. `files` tells the difference between two states of a context.
    pub fn causes(&self, id: usize, parts: &[Part], files: &dyn Fn(&Part, &Part) -> Vec<String>) -> Vec<String> {
        let Some(trace) = &self.trace else { return vec!["no cache entry: this Dockerfile was not built here before".into()] };
        let Some(old) = self.matched.get(&id).map(|at| &trace.steps[*at]) else { return vec!["the step is new".into()] };
        let mut causes = vec![];
        for part in parts {
            match old.parts.iter().find(|o| o.kind == part.kind && o.name == part.name) {
                Some(before) if before.value == part.value => {}
                Some(before) => causes.extend(changed(before, part, files)),
                None => causes.push(format!("{} was added", noun(part))),
            }
        }
        for before in &old.parts {
            if !parts.iter().any(|part| part.kind == before.kind && part.name == before.name) {
                causes.push(format!("{} was removed", noun(before)));
            }
        }
        if causes.is_empty() {
            causes.push(match old.outcome {
                Outcome::Failed => "it did not end well in the build before".into(),
                _ => "no cache entry: its result was removed, or never made".into(),
            });
        }
        causes
    }
}

/// Stage and text of `[build 2/5] RUN make`, without the numbers.
fn split(name: &str) -> (&str, &str) {
    let Some((bracket, text)) = name.strip_prefix('[').and_then(|rest| rest.split_once("] ")) else { return ("", name) };
    let stage = bracket.rsplit_once(' ').map_or("", |(stage, _)| stage);
    (stage, text)
}

fn noun(part: &Part) -> String {
    match part.kind {
        PartKind::Instruction => part.name.clone(),
        PartKind::Argument => format!("ARG {}", part.name),
        PartKind::Variable => format!("ENV {}", part.name),
        PartKind::Platform => "the platform".into(),
        PartKind::Image => "the base image".into(),
        PartKind::Parent => "the step before".into(),
        PartKind::Source => format!("the source {}", part.shown),
        PartKind::Files => format!("files of {}", part.name),
    }
}

fn changed(before: &Part, now: &Part, files: &dyn Fn(&Part, &Part) -> Vec<String>) -> Vec<String> {
    let one = match now.kind {
        PartKind::Image => format!("base image {} → {}", before.shown, now.shown),
        PartKind::Platform => format!("platform {} → {}", before.shown, now.shown),
        PartKind::Parent => format!("parent step {}", now.shown),
        PartKind::Source if before.shown == now.shown => format!("source {} changed", now.shown),
        PartKind::Source => format!("source {} → {}", before.shown, now.shown),
        PartKind::Files => {
            let named = files(before, now);
            if !named.is_empty() {
                return named;
            }
            format!("{} changed", noun(now))
        }
        PartKind::Instruction | PartKind::Argument | PartKind::Variable => format!("{} changed", noun(now)),
    };
    vec![one]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(kind: PartKind, name: &str, value: &str) -> Part {
        Part { shown: value.into(), ..Part::new(kind, name, value) }
    }

    fn step(name: &str, parts: &[(PartKind, &str, &str)]) -> StepTrace {
        let parts = parts.iter().map(|(kind, name, value)| part(*kind, name, value)).collect();
        StepTrace { name: name.into(), line: None, outcome: Outcome::Ran, causes: vec![], parts }
    }

    #[test]
    fn differences_have_names() {
        use PartKind::{Argument, Files, Image, Instruction, Parent, Platform, Source, Variable};
        let old: &[(PartKind, &str, &str)] = &[
            (Platform, "", "linux/amd64"),
            (Instruction, "the command", "make"),
            (Argument, "V", "1"),
            (Variable, "E", "1"),
            (Image, "", "debian:12@a"),
            (Parent, "", "[2/3] COPY . ."),
            (Source, "0", "[build 3/3] RUN x"),
            (Files, "context: src", "1"),
        ];
        for (kind, name, value, expect) in [
            (Platform, "", "linux/arm64", &["platform linux/amd64 → linux/arm64"][..]),
            (Instruction, "the command", "make all", &["the command changed"]),
            (Argument, "V", "2", &["ARG V changed"]),
            (Argument, "W", "2", &["ARG W was added", "ARG V was removed"]),
            (Variable, "E", "2", &["ENV E changed"]),
            (Image, "", "debian:13@b", &["base image debian:12@a → debian:13@b"]),
            (Parent, "", "[2/3] COPY src .", &["parent step [2/3] COPY src ."]),
            (Source, "0", "[other 3/3] RUN y", &["source [build 3/3] RUN x → [other 3/3] RUN y"]),
            (Files, "context: src", "2", &["file src/a.py content changed"]),
            (Files, "context: src", "1", &["no cache entry: its result was removed, or never made"]),
        ] {
            let trace = Trace { title: String::new(), steps: vec![step("[1/1] RUN x", old)] };
            let before = Before::new(Some(trace), &[(7, "[1/1] RUN x".into())]);
            let parts: Vec<Part> = old.iter().map(|(k, n, v)| if *k == kind { part(kind, name, value) } else { part(*k, n, v) }).collect();
            let files = |_: &Part, _: &Part| vec!["file src/a.py content changed".to_owned()];
            assert_eq!(before.causes(7, &parts, &files), expect, "{kind:?} {name}");
        }
    }

    #[test]
    fn steps_are_matched_by_text_then_by_place() {
        let names = |names: &[&str]| -> Vec<(usize, String)> { names.iter().enumerate().map(|(i, n)| (i, (*n).to_owned())).collect() };
        let steps = ["[a 1/3] RUN one", "[a 2/3] RUN two", "[a 3/3] RUN two", "[b 1/1] RUN one"].map(|name| step(name, &[]));
        let trace = Trace { title: String::new(), steps: steps.to_vec() };
        let before = Before::new(
            Some(trace),
            &names(&["[a 1/4] RUN zero", "[a 2/4] RUN one", "[a 3/4] RUN two", "[a 4/4] RUN 2", "[b 1/1] RUN 1", "[c 1/1] RUN one"]),
        );
        let got: Vec<_> = (0..6).map(|id| before.matched.get(&id).copied()).collect();
        assert_eq!(got, [Some(2), Some(0), Some(1), None, Some(3), None]);
        let first = Before::new(None, &[]);
        assert_eq!(first.causes(0, &[], &|_, _| vec![]), ["no cache entry: this Dockerfile was not built here before"]);
    }

    #[test]
    fn no_value_is_kept() {
        let exec = ExecOp { env: vec!["TOKEN=hunter2".into()], args: vec!["echo hunter2".into()], ..ExecOp::default() };
        let parts = own_parts(&Op::Exec(exec), &"linux/amd64".parse().unwrap());
        assert!(!serde_json::to_string(&parts).unwrap().contains("hunter2"));
        assert!(parts.iter().any(|p| p.kind == PartKind::Variable && p.name == "TOKEN"));
    }
}
