//! A Docker Engine, through its API: where it is ([`Endpoint`]), containers ([`ContainerSpec`]), images, and builds.
//!
//! Synchronous and typed. What counts is an engine that answers ([`DockerEngine::reach`]), not a program on the path. Every call has a
//! connection and a runtime of its own, ends when it is cancelled ([`DockerEngine::until`]; the connection is dropped, which ends the engine's
//! work), and takes only so much from an engine that says too much (`connection`). The calls know nothing of stores, sources or requests:
//! the builder over them is in [`crate::builder`], and [`Tasker`] is over that.

mod build;
mod connection;
mod container;
mod endpoint;
mod image;
mod options;
mod tasker;

use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream;
use ovenbird_engine::Cancel;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

pub use build::{BuildCall, BuildFailure, Built};
pub use container::{Attached, AttachedInput, AttachedOutput, ContainerSpec, ContainerSummary, Stream};
pub use endpoint::{DockerSettings, Endpoint};
pub use image::ImageSummary;
pub use options::{BuildOptions, ContainerLimits, Prepared};
pub use tasker::{GitSource, Tasker};

use connection::{Allowance, Door, NotConnected};

use crate::error::{Error, Kind};
use crate::pieces::Pieces;

/// An engine that is there answers this fast.
const REACH: Duration = Duration::from_secs(5);
/// For calls that only look something up.
const SHORT: Duration = Duration::from_mins(1);
/// For calls that end when their work does. The client's own limit is on the time before an answer begins.
const ENDLESS: Duration = Duration::from_hours(7 * 24);
/// A cancelled call is dropped after at most this.
const CANCEL_LOOK: Duration = Duration::from_millis(50);
/// Longest answer to the first question.
const VERSION: u64 = 1 << 20;
/// Longest answer to a call that looks something up: every image of a large engine, with its labels.
const ANSWER: u64 = 32 << 20;
/// Longest value of a stream, as of a worker.
const VALUE: u64 = 8 << 20;
/// Pieces of a request's body that wait to be sent.
const PIECES: usize = 4;

/// What can go wrong with a Docker Engine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DockerEngineError {
    /// A variable or a file of Docker's client.
    #[error("{what}: {reason}")]
    Configuration {
        /// Which.
        what: String,
        /// Why it cannot be used.
        reason: String,
    },
    /// Nobody answers.
    #[error("cannot reach the Docker Engine at {endpoint}: {reason}")]
    Unreachable {
        /// Where.
        endpoint: String,
        /// Why.
        reason: String,
        /// The socket is there and is not for this user.
        forbidden: bool,
    },
    /// It said no.
    #[error("the Docker Engine refused {call}: {message}")]
    Refused {
        /// What was called.
        call: String,
        /// HTTP status; 200 when the refusal came in the body.
        status: u16,
        /// Its words.
        message: String,
    },
    /// The connection broke, or the answer is none.
    #[error("the Docker Engine at {endpoint} gave no answer to {call}: {reason}")]
    Broken {
        /// Where.
        endpoint: String,
        /// What was called.
        call: String,
        /// Why.
        reason: String,
    },
    /// What was to be sent cannot be read.
    #[error("what {call} sends to the Docker Engine cannot be made: {reason}")]
    Body {
        /// What was called.
        call: String,
        /// Why.
        reason: String,
    },
    /// Stopped by the user.
    #[error("the call {call} to the Docker Engine was cancelled")]
    Cancelled {
        /// What was called.
        call: String,
    },
}

impl DockerEngineError {
    /// There is no such thing.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Refused { status: 404, .. })
    }
}

impl From<DockerEngineError> for Error {
    fn from(error: DockerEngineError) -> Self {
        let kind = match &error {
            DockerEngineError::Configuration { .. } => Kind::Configuration,
            DockerEngineError::Body { .. } => Kind::Source,
            DockerEngineError::Cancelled { .. } => Kind::Cancelled,
            DockerEngineError::Refused { call, message, .. } if call == "build" => kind_of_build(message),
            _ => Kind::Driver,
        };
        let told = Self::from_chain(kind, &error);
        match error {
            DockerEngineError::Unreachable { forbidden: true, .. } => told.hint(
                "add your user to the group of the socket (often `docker`), or use -o type=docker,dest=FILE and `docker load -i FILE`",
            ),
            DockerEngineError::Unreachable { .. } => {
                told.hint("start Docker, or say where it listens with DOCKER_HOST=unix:///path/to/docker.sock or a docker context")
            }
            _ => told,
        }
    }
}

/// Whose fault a build is that the engine ended before a step failed. It says so in words only.
fn kind_of_build(message: &str) -> Kind {
    const DOCKERFILE: [&str; 14] = [
        "parse error",
        "unknown instruction",
        "failed to reach build target",
        "target stage",
        "requires at least",
        "requires exactly",
        "must have",
        "unknown flag",
        "invalid from flag",
        "base name",
        "unable to find user",
        "no matching entries in passwd",
        "invalid mount type",
        "file with no instructions",
    ];
    const REGISTRY: [&str; 7] = [
        "pull access denied",
        "manifest unknown",
        "manifest for ",
        "no such host",
        "connection refused",
        "not found: manifest",
        "unauthorized",
    ];
    let message = message.to_ascii_lowercase();
    if DOCKERFILE.iter().any(|words| message.contains(words)) {
        Kind::Dockerfile
    } else if REGISTRY.iter().any(|words| message.contains(words)) {
        Kind::Registry
    } else {
        Kind::Driver
    }
}

/// A Docker Engine. Makes no connection and no thread before it is first asked something.
pub struct DockerEngine {
    endpoint: Endpoint,
    buildkit: Option<bool>,
    cancel: Cancel,
    patience: Duration,
    door: OnceLock<Door>,
    /// Of what goes on beside its callers: containers that are attached to.
    runtime: OnceLock<Runtime>,
}

impl fmt::Display for DockerEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.endpoint.fmt(f)
    }
}

impl fmt::Debug for DockerEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DockerEngine").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

/// What an engine says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Version {
    /// Of the program, as it names it.
    pub engine: String,
    /// Of its API.
    pub api: (u32, u32),
}

impl Version {
    /// Is BuildKit the builder that the engine itself takes? Docker 23 made it so.
    pub fn prefers_buildkit(&self) -> bool {
        self.api >= (1, 42)
    }
}

impl DockerEngine {
    /// The engine that the environment means. Does not connect.
    pub fn new(settings: &DockerSettings) -> Result<Self, DockerEngineError> {
        Ok(Self {
            endpoint: settings.endpoint()?,
            buildkit: settings.buildkit,
            cancel: Cancel::default(),
            patience: SHORT,
            door: OnceLock::new(),
            runtime: OnceLock::new(),
        })
    }

    /// The same engine, whose calls end when this is cancelled.
    #[must_use]
    pub fn until(&self, cancel: &Cancel) -> Self {
        let (endpoint, buildkit) = (self.endpoint.clone(), self.buildkit);
        Self { endpoint, buildkit, cancel: cancel.clone(), patience: self.patience, door: self.door.clone(), runtime: OnceLock::new() }
    }

    /// The same engine, which has only this long to answer a call that looks something up or cleans up.
    #[must_use]
    pub fn within(&self, patience: Duration) -> Self {
        Self { patience, ..self.until(&self.cancel) }
    }

    /// Where it is.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Its version, when it answers within a few seconds.
    pub fn reach(&self) -> Result<Version, DockerEngineError> {
        let call = "version";
        let said = self.ask_within(call, REACH, VERSION, async |client| client.version().await)?;
        let api = said.api_version.unwrap_or_default();
        let (major, minor) = api.split_once('.').unwrap_or_default();
        Ok(Version {
            engine: said.version.unwrap_or_else(|| "unknown".into()),
            api: (major.parse().unwrap_or(1), minor.parse().unwrap_or(0)),
        })
    }

    /// What `DOCKER_BUILDKIT` says.
    pub fn said_buildkit(&self) -> Option<bool> {
        self.buildkit
    }

    /// Runs something on a runtime of the engine.
    pub(crate) fn block_on<T>(&self, work: impl Future<Output = T>) -> Result<T, DockerEngineError> {
        Ok(self.runtime()?.block_on(work))
    }

    fn runtime(&self) -> Result<&Runtime, DockerEngineError> {
        if let Some(runtime) = self.runtime.get() {
            return Ok(runtime);
        }
        let made = tokio::runtime::Builder::new_multi_thread().worker_threads(1).thread_name("docker-engine").enable_all().build();
        let made = made.map_err(|error| self.unreachable(error.to_string(), false))?;
        Ok(self.runtime.get_or_init(|| made))
    }

    fn unreachable(&self, reason: String, forbidden: bool) -> DockerEngineError {
        DockerEngineError::Unreachable { endpoint: self.to_string(), reason, forbidden }
    }

    /// The client library for one call that takes as much as `allowance` says.
    fn client(&self, allowance: &Arc<Allowance>) -> Result<bollard::Docker, DockerEngineError> {
        let door = match self.door.get() {
            Some(door) => door,
            None => {
                let door = Door::of(&self.endpoint)?;
                self.door.get_or_init(|| door)
            }
        };
        door.client(allowance, ENDLESS.as_secs()).map_err(|error| self.told("version", error))
    }

    /// One call that looks something up.
    fn ask<T>(
        &self,
        call: &str,
        work: impl AsyncFnOnce(&bollard::Docker) -> Result<T, bollard::errors::Error>,
    ) -> Result<T, DockerEngineError> {
        self.ask_within(call, self.patience, ANSWER, work)
    }

    fn ask_within<T>(
        &self,
        call: &str,
        limit: Duration,
        most: u64,
        work: impl AsyncFnOnce(&bollard::Docker) -> Result<T, bollard::errors::Error>,
    ) -> Result<T, DockerEngineError> {
        let (runtime, allowance) = (self.passing()?, Allowance::new(most));
        let done = self.ask_on(&runtime, &allowance, call, limit, work);
        runtime.shutdown_background();
        done
    }

    /// A runtime without a thread: what reads a connection and what makes sense of it take turns, so an engine that never pauses keeps
    /// nobody from seeing that the call is cancelled.
    fn passing(&self) -> Result<Runtime, DockerEngineError> {
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| self.unreachable(error.to_string(), false))
    }

    fn ask_on<T>(
        &self,
        runtime: &Runtime,
        allowance: &Arc<Allowance>,
        call: &str,
        limit: Duration,
        work: impl AsyncFnOnce(&bollard::Docker) -> Result<T, bollard::errors::Error>,
    ) -> Result<T, DockerEngineError> {
        self.work_on(runtime, allowance, call, &self.cancel, async |client, _| match tokio::time::timeout(limit, work(client)).await {
            Ok(done) => done.map_err(|error| self.told(call, error)),
            Err(_) => Err(self.broken(call, format!("nothing came within {} seconds", limit.as_secs()))),
        })
    }

    /// One call that takes as long as its work. The work says of a stream when a value is whole.
    fn work<T>(
        &self,
        call: &str,
        cancel: &Cancel,
        work: impl AsyncFnOnce(&bollard::Docker, &Allowance) -> Result<T, DockerEngineError>,
    ) -> Result<T, DockerEngineError> {
        let runtime = self.passing()?;
        let done = self.work_on(&runtime, &Allowance::new(VALUE), call, cancel, work);
        runtime.shutdown_background();
        done
    }

    fn work_on<T>(
        &self,
        runtime: &Runtime,
        allowance: &Arc<Allowance>,
        call: &str,
        cancel: &Cancel,
        work: impl AsyncFnOnce(&bollard::Docker, &Allowance) -> Result<T, DockerEngineError>,
    ) -> Result<T, DockerEngineError> {
        let client = self.client(allowance)?;
        let done = runtime.block_on(async {
            let work = std::pin::pin!(work(&client, allowance));
            let stopped = std::pin::pin!(async {
                while !cancel.is_cancelled() {
                    tokio::time::sleep(CANCEL_LOOK).await;
                }
            });
            match futures_util::future::select(work, stopped).await {
                futures_util::future::Either::Left((done, _)) => done,
                futures_util::future::Either::Right(_) => Err(DockerEngineError::Cancelled { call: call.into() }),
            }
        });
        match (done, allowance.exceeded()) {
            // The client tells of the broken connection only.
            (Err(DockerEngineError::Broken { .. }), Some(reason)) => Err(self.broken(call, reason)),
            (done, _) => done,
        }
    }

    fn broken(&self, call: &str, reason: String) -> DockerEngineError {
        DockerEngineError::Broken { endpoint: self.to_string(), call: call.into(), reason }
    }

    /// As [`Self::work`], with a body that `write` makes on a thread of its own while it is sent.
    fn send<T: Send>(
        &self,
        call: &str,
        cancel: &Cancel,
        write: impl FnOnce(&mut dyn Write) -> io::Result<()> + Send,
        work: impl AsyncFnOnce(&bollard::Docker, &Allowance, Body) -> Result<T, DockerEngineError>,
    ) -> Result<T, DockerEngineError> {
        let (sender, receiver) = mpsc::channel(PIECES);
        let (written, done) = std::thread::scope(|scope| {
            let writer = scope.spawn(move || {
                let send = |piece| sender.blocking_send(piece).map_err(|_| io::ErrorKind::BrokenPipe.into());
                let mut pieces = Pieces::new(|piece| send(Ok(Bytes::copy_from_slice(piece))));
                let written = write(&mut pieces).and_then(|()| pieces.flush());
                if written.is_err() {
                    // Without it the engine would take half a body for a whole one.
                    let _: io::Result<()> = send(Err(io::Error::other("the body cannot be made")));
                }
                written
            });
            let done = self.work(call, cancel, async move |client, allowance| work(client, allowance, Body(receiver)).await);
            (writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), done)
        });
        match (written, done) {
            // The engine closed early: it has said why.
            (Err(error), Err(told)) if error.kind() == io::ErrorKind::BrokenPipe => Err(told),
            (Err(error), Err(_)) => Err(DockerEngineError::Body { call: call.into(), reason: error.to_string() }),
            (_, done) => done,
        }
    }

    fn told(&self, call: &str, error: bollard::errors::Error) -> DockerEngineError {
        use bollard::errors::Error as Told;
        match error {
            Told::DockerResponseServerError { status_code, message } => {
                DockerEngineError::Refused { call: call.into(), status: status_code, message: message.trim().into() }
            }
            Told::DockerStreamError { error } => {
                DockerEngineError::Refused { call: call.into(), status: 200, message: error.trim().into() }
            }
            other => {
                if let Told::IOError { err } = &other
                    && let Some(NotConnected(error)) = err.get_ref().and_then(|inner| inner.downcast_ref())
                {
                    return self.unreachable(error.to_string(), error.kind() == io::ErrorKind::PermissionDenied);
                }
                let mut reason = other.to_string();
                let mut next = std::error::Error::source(&other);
                while let Some(cause) = next {
                    let text = cause.to_string();
                    if !reason.contains(&text) {
                        reason = format!("{reason}: {text}");
                    }
                    next = cause.source();
                }
                self.broken(call, reason)
            }
        }
    }
}

/// The body of a request, as it is made.
struct Body(mpsc::Receiver<io::Result<Bytes>>);

impl Body {
    fn into_stream(self) -> impl stream::Stream<Item = io::Result<Bytes>> + Send + 'static {
        stream::unfold(self.0, async |mut receiver| receiver.recv().await.map(|piece| (piece, receiver)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whose_fault_a_build_is() {
        for (message, expect) in [
            ("dockerfile parse error line 1: unknown instruction: FROMM", Kind::Dockerfile),
            ("failed to reach build target none in Dockerfile", Kind::Dockerfile),
            ("unable to find user nope: no matching entries in passwd file", Kind::Dockerfile),
            ("pull access denied for nope, repository does not exist or may require 'docker login'", Kind::Registry),
            ("Get \"https://nosuch.invalid/v2/\": dial tcp: lookup nosuch.invalid: no such host", Kind::Registry),
            ("no space left on device", Kind::Driver),
        ] {
            let error = DockerEngineError::Refused { call: "build".into(), status: 200, message: message.into() };
            assert_eq!(Error::from(error).kind, expect, "{message}");
        }
    }
}
