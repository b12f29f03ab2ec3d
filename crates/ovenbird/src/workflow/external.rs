//! Plugins of the user: programs that get one JSON document on standard input and answer with one on standard output.
//!
//! Protocol, version 1; described for authors in docs/guides/plugins.md. Each call is a process of its own:
//! - `{"ovenbird":1,"call":"describe"}` → `{"ovenbird":1,"plugins":[{"name","phases","about","args":SCHEMA}]}`. One program may hold
//!   several plugins (a file of Python classes does).
//! - `{"ovenbird":1,"call":"run","name",…}` → `{"ovenbird":1,"result":…,"changes":{…},"veto":TEXT,"error":TEXT}`.
//!
//! What the program says on standard error is log. Its environment is clean, its time and its output are bounded, and all that it started is
//! killed when it ends or is stopped, or when this process is gone ([`leash`]). It is not isolated otherwise: it runs as this user.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ovenbird_engine::Cancel;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::desk::Caller;
use super::{Bench, Content, MAIN, Plugin, Prepared, Scene, Standing, veto};
use crate::builder::Job;
use crate::error::{Error, Kind};
use crate::launch::leash::{self, Leashed};
use crate::request::Phase;
use crate::request::workflow::{Entry, OWN_KEYS};

/// Version of the protocol.
const VERSION: u32 = 1;
/// Most bytes of an answer.
const MOST_ANSWER: u64 = 64 << 20;
/// Most bytes of log that are passed on of one call.
const MOST_LOG: usize = 16 << 20;
/// Longest line of log.
const MOST_LINE: u64 = 64 << 10;
/// What describing itself may take.
const DESCRIBE: Duration = Duration::from_secs(30);
/// How long a pipe is waited for when its program is gone: somebody who left the process group may hold it.
const LEFT_OPEN: Duration = Duration::from_secs(2);
/// How often the program is looked at.
const POLL: Duration = Duration::from_millis(5);
/// Lines of log that an error shows.
const LAST_LINES: usize = 5;
/// Lines of log that are taken before the program is looked at again.
const LINES_AT_ONCE: usize = 1000;

/// Why a call came to nothing.
#[derive(Debug, thiserror::Error)]
enum CallError {
    #[error("{} cannot be run: {source}", program.display())]
    Start { program: PathBuf, source: std::io::Error },
    #[error("{} took longer than {seconds} seconds and was stopped; give it more with timeout=", program.display())]
    TimedOut { program: PathBuf, seconds: u64 },
    #[error("it was stopped with the build")]
    Cancelled,
    #[error("{} answered with more than {MOST_ANSWER} bytes", program.display())]
    TooMuch { program: PathBuf },
    #[error("{} ended, and something that it started keeps its output open", program.display())]
    LeftOpen { program: PathBuf },
    #[error("{} {ended}{}", program.display(), if said.is_empty() { String::new() } else { format!(": {said}") })]
    Failed { program: PathBuf, ended: String, said: String },
    #[error("{} did not answer in the plugin protocol: {reason}", program.display())]
    Protocol { program: PathBuf, reason: String },
}

impl From<CallError> for Error {
    fn from(error: CallError) -> Self {
        let kind = if matches!(error, CallError::Cancelled) { Kind::Cancelled } else { Kind::Veto };
        Self::from_chain(kind, &error)
    }
}

#[derive(Deserialize)]
struct Description {
    ovenbird: u32,
    plugins: Vec<DescribedPlugin>,
}

#[derive(Deserialize)]
struct DescribedPlugin {
    name: String,
    phases: Vec<String>,
    #[serde(default)]
    args: Value,
}

/// What a program answers to `run`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Answer {
    ovenbird: u32,
    #[serde(default)]
    result: Value,
    #[serde(default)]
    changes: Changes,
    #[serde(default)]
    veto: Option<String>,
    #[serde(default)]
    error: Option<String>,
}

/// Changes of a pre_build plugin. What is absent stays; `null` takes an entry away.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Changes {
    dockerfile: Option<String>,
    labels: BTreeMap<String, Option<String>>,
    annotations: BTreeMap<String, Option<String>>,
    build_args: BTreeMap<String, Option<String>>,
    names: Option<Vec<String>>,
    add_files: Vec<AddFile>,
    hide_files: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AddFile {
    path: String,
    #[serde(default)]
    text: Option<String>,
    #[serde(default)]
    base64: Option<String>,
    #[serde(default)]
    mode: Option<u32>,
}

impl Changes {
    fn are_none(&self) -> bool {
        self.dockerfile.is_none()
            && self.names.is_none()
            && self.labels.is_empty()
            && self.annotations.is_empty()
            && self.build_args.is_empty()
            && self.add_files.is_empty()
            && self.hide_files.is_empty()
    }

    fn apply(self, scene: &mut Scene) -> Result<(), Error> {
        let draft = &mut *scene.draft;
        if let Some(text) = self.dockerfile {
            draft.dockerfile = text;
        }
        let request = &mut draft.request;
        let maps =
            [(self.labels, &mut request.labels), (self.annotations, &mut request.annotations), (self.build_args, &mut request.build_args)];
        for (changes, map) in maps {
            for (name, value) in changes {
                match value {
                    Some(value) => drop(map.insert(name, value)),
                    None => drop(map.remove(&name)),
                }
            }
        }
        if let Some(names) = self.names {
            request.names = names;
        }
        for file in self.add_files {
            let bytes = match (file.text, file.base64) {
                (Some(text), None) => text.into_bytes(),
                (None, Some(coded)) => {
                    STANDARD.decode(coded).map_err(|e| veto(format!("the added file {:?} is not base64: {e}", file.path)))?
                }
                _ => return Err(veto(format!("the added file {:?} needs text or base64, one of them", file.path))),
            };
            draft.add(MAIN, &file.path, Content::Bytes(bytes), file.mode.unwrap_or(0o644))?;
        }
        self.hide_files.iter().try_for_each(|pattern| draft.hide(pattern))
    }
}

/// A program of the user's on this machine.
#[derive(Clone)]
pub(crate) struct Program {
    path: PathBuf,
    name: String,
    args: Map<String, Value>,
    working_directory: PathBuf,
    search_path: String,
}

/// One on the machine of a worker's caller.
#[derive(Clone)]
struct OfCaller {
    name: String,
    caller: Arc<dyn Caller>,
}

/// A plugin that the caller of a worker has found.
pub(super) fn of_caller(name: &str, caller: Arc<dyn Caller>) -> Prepared {
    let plugin = OfCaller { name: name.to_owned(), caller };
    let same = plugin.clone();
    // What its arguments stand for is the caller's to know.
    Prepared { plugin: Box::new(plugin), args: Map::new(), again: Box::new(move |_| Ok(Box::new(same.clone()))), program: None }
}

/// Finds the program of an entry, and has it describe itself. `None`: there is none.
pub(super) fn find(
    entry: &Entry,
    bench: &Bench,
    complete: &dyn Fn(&Value) -> Result<Map<String, Value>, String>,
    job: &Job,
) -> Result<Option<(Vec<Phase>, Prepared)>, Error> {
    let Some(path) = look_up(entry, bench)? else { return Ok(None) };
    let program = Program {
        path: path.clone(),
        name: entry.name.clone(),
        args: Map::new(),
        working_directory: bench.environment.working_directory().to_owned(),
        search_path: bench.environment.get("PATH").unwrap_or("/usr/local/bin:/usr/bin:/bin").to_owned(),
    };
    let wrong = |why: String| Error::new(Kind::Usage, format!("the plugin {} cannot be used", entry.name)).because(why);
    let protocol = |reason: String| wrong(CallError::Protocol { program: path.clone(), reason }.to_string());
    let asked = json!({ "ovenbird": VERSION, "call": "describe" });
    let answer = program.call(&asked, DESCRIBE, Some(&job.cancel), &mut |_| {}).map_err(|error| match error {
        CallError::Cancelled => error.into(),
        other => wrong(other.to_string()),
    })?;
    let described: Description = serde_json::from_value(answer).map_err(|e| protocol(e.to_string()))?;
    if described.ovenbird != VERSION {
        return Err(protocol(format!("it speaks version {}, and this program version {VERSION}", described.ovenbird)));
    }
    let known: Vec<String> = described.plugins.iter().map(|one| one.name.clone()).collect();
    let Some(own) = described.plugins.into_iter().find(|one| one.name == entry.name) else {
        return Err(wrong(format!("{} has no plugin of that name: it has {}", path.display(), known.join(", "))));
    };
    let phases: Vec<Phase> =
        own.phases.iter().map(|phase| phase.parse()).collect::<Result<_, _>>().map_err(|e| protocol(format!("{e}")))?;
    if let Some(key) = OWN_KEYS.iter().find(|key| own.args.get("properties").is_some_and(|all| all.get(**key).is_some())) {
        return Err(protocol(format!("its argument {key:?} has the name of a key of --plugin")));
    }
    let args = complete(&own.args).map_err(wrong)?;
    let own = program.clone();
    let again = move |args| Ok(Box::new(Program { args, ..program.clone() }) as Box<dyn Plugin>);
    Ok(Some((phases, Prepared { plugin: again(args.clone()).map_err(wrong)?, args, again: Box::new(again), program: Some(own) })))
}

fn look_up(entry: &Entry, bench: &Bench) -> Result<Option<PathBuf>, Error> {
    if let Some(file) = &entry.file {
        let path = bench.environment.absolute(file);
        if is_program(&path) {
            return Ok(Some(path));
        }
        let what = format!("the plugin {} cannot be used: {} is no executable file", entry.name, path.display());
        return Err(Error::new(Kind::Usage, what).hint("`chmod +x` it, with a first line such as #!/bin/sh"));
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if entry.name.len() > 64 || entry.name.is_empty() || entry.name.starts_with(['-', '.']) || !entry.name.chars().all(plain) {
        return Err(Error::new(Kind::Usage, format!("{:?} is not the name of a plugin", entry.name))
            .hint("names have letters, digits, dashes, dots and underscores; a program elsewhere is given with file=PATH"));
    }
    let program = format!("ovenbird-plugin-{}", entry.name);
    let own = bench.folders.iter().map(|folder| folder.join(&program)).find(|path| is_program(path));
    Ok(own.or_else(|| bench.environment.find_program(&program)))
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

impl Plugin for Program {
    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        let mut asked = question(scene, &self.name)?;
        asked["args"] = Value::Object(self.args.clone());
        asked["secrets"] = secrets(&scene.secrets);
        // Exit plugins also run when the build was cancelled.
        let cancel = (scene.phase != Phase::Exit).then_some(&scene.job.cancel);
        let answer = self.ask(&asked, Duration::from_secs(scene.timeout), cancel, &mut |line| scene.say(line))?;
        take(answer, &self.path.display().to_string(), scene)
    }
}

impl Plugin for OfCaller {
    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        let mut asked = question(scene, &self.name)?;
        let known =
            ["BUILT_IMAGE_ID", "BASE_IMAGE"].into_iter().filter_map(|name| Some((name.to_owned(), scene.reserved(name).ok()?.into())));
        asked["reserved"] = Value::Object(known.collect());
        let answer = self.caller.run(scene.at, &asked).map_err(|why| {
            // Its own cancel comes through the pipe, too.
            if scene.job.cancel.is_cancelled() && scene.phase != Phase::Exit { Error::new(Kind::Cancelled, why) } else { veto(why) }
        })?;
        take(answer, &self.name, scene)
    }
}

/// Secrets as a program is given them.
pub(super) fn secrets(granted: &BTreeMap<String, Vec<u8>>) -> Value {
    let value = |bytes: &Vec<u8>| match std::str::from_utf8(bytes) {
        Ok(text) => json!({ "text": text }),
        Err(_) => json!({ "base64": STANDARD.encode(bytes) }),
    };
    granted.iter().map(|(id, bytes)| (id.clone(), value(bytes))).collect::<Map<_, _>>().into()
}

/// Does what an answer says.
fn take(answer: Value, program: &str, scene: &mut Scene) -> Result<Value, Error> {
    let wrong = |reason: String| veto(format!("{program} did not answer in the plugin protocol: {reason}"));
    let answer: Answer = serde_json::from_value(answer).map_err(|e| wrong(e.to_string()))?;
    if answer.ovenbird != VERSION {
        return Err(wrong(format!("it speaks version {}, and this program version {VERSION}", answer.ovenbird)));
    }
    if let Some(reason) = answer.veto {
        return Err(veto(reason));
    }
    if let Some(error) = answer.error {
        return Err(veto(format!("failed: {error}")));
    }
    if !answer.changes.are_none() {
        if scene.phase != Phase::PreBuild {
            return Err(veto("it changes the build, which only a pre_build plugin may"));
        }
        answer.changes.apply(scene)?;
    }
    Ok(answer.result)
}

/// What a program is asked, without its arguments and secrets.
fn question(scene: &Scene, name: &str) -> Result<Value, Error> {
    let request = &scene.draft.request;
    let image = match scene.image.as_deref() {
        None => Value::Null,
        Some(image) => {
            let platforms: Vec<Value> = scene
                .shop
                .describe(image)?
                .into_iter()
                .map(|one| {
                    json!({
                        "platform": one.platform.to_string(), "id": one.id, "digest": one.manifest.digest.to_string(), "size": one.size,
                        "config": one.config, "manifest": one.document,
                    })
                })
                .collect();
            json!({ "digest": image.target.digest.to_string(), "media_type": image.target.media_type, "platforms": platforms })
        }
    };
    let outcome = match scene.standing {
        Standing::Well => json!({ "status": "ok" }),
        Standing::Failed(error) => json!({ "status": "failed", "error": error }),
        Standing::Cancelled => json!({ "status": "cancelled" }),
    };
    let plugins: Vec<Value> = scene
        .done
        .iter()
        .map(|done| json!({ "phase": done.phase, "name": done.name, "outcome": done.outcome, "result": done.result, "error": done.error }))
        .collect();
    Ok(json!({
        "ovenbird": VERSION, "call": "run", "name": name, "phase": scene.phase,
        "build": {
            "dockerfile": scene.draft.dockerfile, "labels": request.labels, "annotations": request.annotations,
            "build_args": request.build_args, "names": request.names, "target": request.target,
            "platforms": request.platforms.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "context": scene.tree.and_then(|tree| tree.contexts.get(MAIN)).map(|context| context.dir.display().to_string()),
            "image": image,
            "local_names": scene.delivered.names,
            "pushed": scene.delivered.pushed.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "outcome": outcome, "plugins": plugins,
        },
    }))
}

impl Program {
    /// Asks it to run.
    pub(super) fn ask(
        &self,
        question: &Value,
        limit: Duration,
        cancel: Option<&Cancel>,
        log: &mut dyn FnMut(String),
    ) -> Result<Value, Error> {
        Ok(self.call(question, limit, cancel, log)?)
    }

    /// One question, one answer.
    fn call(&self, question: &Value, limit: Duration, cancel: Option<&Cancel>, log: &mut dyn FnMut(String)) -> Result<Value, CallError> {
        let program = || self.path.clone();
        let not_run = |source| CallError::Start { program: program(), source };
        let question = question.to_string().into_bytes();
        let mut command = leash::command(&self.path, question.len());
        command.env_clear().env("PATH", &self.search_path).env("LANG", "C.UTF-8").current_dir(&self.working_directory);
        let mut leashed = Leashed::start(&mut command, question).map_err(not_run)?;
        let (answers, answer) = channel();
        let (lines, log_lines) = channel();
        listen(&mut leashed.child, answers, lines);
        let begin = Instant::now();
        let (mut tail, mut logged) = (vec![], 0);
        // So many at a time that a program which never stops talking is still looked at.
        let mut drain = |log_lines: &Receiver<String>, wait: Duration| {
            for _ in 0..LINES_AT_ONCE {
                match log_lines.recv_timeout(wait) {
                    Ok(line) => {
                        logged += line.len();
                        if logged <= MOST_LOG {
                            log(line.clone());
                        }
                        if tail.len() == LAST_LINES {
                            tail.remove(0);
                        }
                        tail.push(line);
                    }
                    Err(RecvTimeoutError::Timeout) => return (false, tail.clone()),
                    Err(RecvTimeoutError::Disconnected) => return (true, tail.clone()),
                }
            }
            (false, tail.clone())
        };
        let status = loop {
            let (silent, _) = drain(&log_lines, POLL);
            if let Some(status) = leashed.ended().map_err(not_run)? {
                break status;
            }
            if silent {
                std::thread::sleep(POLL);
            }
            match cancel {
                Some(cancel) if cancel.is_cancelled() => return Err(CallError::Cancelled),
                _ if begin.elapsed() > limit => return Err(CallError::TimedOut { program: program(), seconds: limit.as_secs() }),
                _ => {}
            }
        };
        let (_, tail) = drain(&log_lines, Duration::from_millis(200));
        let bytes = match answer.recv_timeout(LEFT_OPEN) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Err(CallError::TooMuch { program: program() }),
            Err(_) => return Err(CallError::LeftOpen { program: program() }),
        };
        if !status.success() {
            return Err(CallError::Failed { program: program(), ended: format!("ended with {status}"), said: tail.join(" / ") });
        }
        let protocol = |reason: String| CallError::Protocol { program: program(), reason };
        if bytes.trim_ascii().is_empty() {
            return Err(protocol("it wrote nothing to standard output".into()));
        }
        serde_json::from_slice(&bytes).map_err(|e| protocol(format!("standard output is not one JSON document: {e}")))
    }
}

/// Threads for what a program says: each ends with its pipe.
fn listen(child: &mut Child, answers: Sender<Option<Vec<u8>>>, lines: Sender<String>) {
    if let Some(stdout) = child.stdout.take() {
        std::thread::spawn(move || {
            let mut bytes = vec![];
            let mut stdout = stdout.take(MOST_ANSWER + 1);
            let whole = stdout.read_to_end(&mut bytes).is_ok() && bytes.len() as u64 <= MOST_ANSWER;
            let _ = answers.send(whole.then_some(bytes));
        });
    }
    if let Some(stderr) = child.stderr.take() {
        std::thread::spawn(move || {
            let mut reader = BufReader::new(stderr);
            loop {
                let mut line = vec![];
                match reader.by_ref().take(MOST_LINE).read_until(b'\n', &mut line) {
                    Ok(0) | Err(_) => return,
                    Ok(_) => {}
                }
                if lines.send(String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']).to_owned()).is_err() {
                    return;
                }
            }
        });
    }
}
