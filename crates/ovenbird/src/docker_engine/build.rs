//! The engine's own build: a context goes in as a tar, what its builder says comes out as events.
//!
//! Both of the engine's builders are told apart by their words only here: the classic one (`Step 1/3 : RUN make`, text) and BuildKit
//! (vertices). It must not know of requests; what a build may ask for is a [`BuildCall`], made by [`crate::builder`].

use std::collections::{HashMap, VecDeque};
use std::io::{self, Write};
use std::time::{Duration, Instant};

use bollard::auth::DockerCredentials;
use bollard::moby::buildkit::v1::{StatusResponse, Vertex};
use bollard::models::{BuildInfo, BuildInfoAux};
use bollard::query_parameters::{BuildImageOptions, BuilderVersion};
use futures_util::StreamExt as _;
use http::uri::PathAndQuery;
use http::{HeaderValue, Uri};
use ovenbird_dockerfile::redact::without_passwords;
use ovenbird_engine::event::LogStream;
use ovenbird_engine::{Cancel, Event, EventSink};
use ovenbird_oci::Digest;
use ovenbird_oci::keychain::Credential;

use super::{DockerEngine, DockerEngineError};

/// Logins of the classic builder.
const LOGINS: &str = "x-registry-config";
/// Lines of output that are kept of each step, for the message when it fails.
const TAIL: usize = 20;
/// Longest line of it.
const TAIL_LINE: usize = 2000;

/// What the engine's build takes: the parameters of `POST /build`, as they are written in a query.
#[derive(Debug, Clone, Default)]
pub struct BuildCall {
    /// Names and values; a name may come several times.
    pub query: Vec<(&'static str, String)>,
    /// BuildKit, not the classic builder.
    pub buildkit: bool,
    /// For base images: registry and login.
    pub credentials: Vec<(String, Credential)>,
}

/// A built image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Built {
    /// Its id in the engine.
    pub id: String,
    /// Steps that ran.
    pub ran: usize,
    /// Steps that came from the engine's cache.
    pub cached: usize,
}

/// Why there is no image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BuildFailure {
    /// The engine could not be asked.
    #[error(transparent)]
    Engine(#[from] DockerEngineError),
    /// The build failed.
    #[error("the Docker Engine cannot build the image: {message}")]
    Failed {
        /// The engine's words.
        message: String,
    },
    /// A step failed.
    #[error("{name} exited with code {code}")]
    Step {
        /// As the engine names it.
        name: String,
        /// What was run.
        command: String,
        /// Its exit code.
        code: i32,
        /// Last lines of its output, oldest first.
        tail: Vec<String>,
    },
}

impl DockerEngine {
    /// Builds: the context is what `context` writes, a tar. Events come while the engine works.
    pub fn build(
        &self,
        call: &BuildCall,
        cancel: &Cancel,
        sink: &dyn EventSink,
        context: impl FnOnce(&mut dyn Write) -> io::Result<()> + Send,
    ) -> Result<Built, BuildFailure> {
        const NAME: &str = "build";
        let mut query = call.query.clone();
        let mut options = BuildImageOptions::default();
        if call.buildkit {
            let session = session_id().map_err(|error| DockerEngineError::Body { call: NAME.into(), reason: error.to_string() })?;
            query.extend([("version", "2".to_owned()), ("session", session.clone())]);
            options.version = BuilderVersion::BuilderBuildKit;
            options.session = Some(session);
        }
        let query = PathAndQuery::try_from(format!("/build?{}", encoded(&query))).map_err(|error| DockerEngineError::Body {
            call: NAME.into(),
            reason: format!("build arguments, labels and names are too long for one request: {error}"),
        })?;
        let credentials = call.credentials.iter().map(|(registry, credential)| {
            let mut login = DockerCredentials { serveraddress: Some(registry.clone()), ..DockerCredentials::default() };
            match credential {
                Credential::Password { username, password } => {
                    login.username = Some(username.clone());
                    login.password = Some(password.expose().to_owned());
                }
                Credential::IdentityToken(token) => login.identitytoken = Some(token.expose().to_owned()),
                Credential::RegistryToken(token) => login.registrytoken = Some(token.expose().to_owned()),
            }
            (registry.clone(), login)
        });
        let credentials: HashMap<String, DockerCredentials> = credentials.collect();
        let mut log = Log { buildkit: call.buildkit, sink, steps: HashMap::new(), order: vec![], current: None, id: None };
        let done = self.send(NAME, cancel, context, async |client, allowance, body| {
            // The client's own options have no room for limits above 2 GiB, for several hosts, or for ulimits.
            let client = client.clone().with_request_modifier(move |mut request| {
                if request.uri().path() == query.path() {
                    let mut parts = request.uri().clone().into_parts();
                    parts.path_and_query = Some(query.clone());
                    if let Ok(uri) = Uri::from_parts(parts) {
                        *request.uri_mut() = uri;
                    }
                    // The client writes them in the alphabet that engines do not read.
                    if let Some(logins) = request.headers_mut().get_mut(LOGINS) {
                        let text = String::from_utf8_lossy(logins.as_bytes()).replace('+', "-").replace('/', "_");
                        if let Ok(mut readable) = HeaderValue::from_str(&text) {
                            readable.set_sensitive(true);
                            *logins = readable;
                        }
                    }
                }
                request
            });
            let body = bollard::body_try_stream(body.into_stream());
            let mut said = client.build_image(options, Some(credentials), Some(body));
            let mut failed = None;
            while let Some(line) = said.next().await {
                allowance.restart();
                match line {
                    Ok(line) => log.take(line),
                    // The engine's builder ends its words with the failure.
                    Err(bollard::errors::Error::DockerStreamError { error }) => failed = Some(error),
                    Err(error) => return Err(self.told(NAME, error)),
                }
            }
            Ok(failed)
        })?;
        match done {
            Some(message) => Err(log.failure(&message)),
            None => log.built(self),
        }
    }
}

/// A name for a session that no other build has.
fn session_id() -> io::Result<String> {
    let mut random = [0; 16];
    let mut filled = 0;
    while filled < random.len() {
        filled += rustix::rand::getrandom(&mut random[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(Digest::of(&random).hex())
}

/// A hexadecimal digit.
fn digit(value: u8) -> char {
    char::from_digit(u32::from(value), 16).unwrap_or('0').to_ascii_uppercase()
}

/// A query as it stands in an address.
fn encoded(query: &[(&str, String)]) -> String {
    let mut text = String::new();
    for (name, value) in query {
        if !text.is_empty() {
            text.push('&');
        }
        text.push_str(name);
        text.push('=');
        for byte in value.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => text.push(char::from(byte)),
                _ => text.extend(['%', digit(byte >> 4), digit(byte & 15)]),
            }
        }
    }
    text
}

/// What the engine says, step by step.
struct Log<'a> {
    buildkit: bool,
    sink: &'a dyn EventSink,
    /// By the engine's name for them.
    steps: HashMap<String, Step>,
    /// Those names in the order in which they were first heard of.
    order: Vec<String>,
    /// The classic builder does one thing at a time.
    current: Option<String>,
    id: Option<String>,
}

/// One step.
struct Step {
    vertex: usize,
    name: String,
    since: Instant,
    state: State,
    tail: VecDeque<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Heard of, nothing told yet.
    Waiting,
    Running,
    Cached,
    Finished,
    Failed,
}

impl Log<'_> {
    fn take(&mut self, line: BuildInfo) {
        match line.aux {
            Some(BuildInfoAux::BuildKit(status)) => return self.status(status),
            Some(BuildInfoAux::Default(image)) => self.id = image.id.or(self.id.take()),
            None => {}
        }
        if let Some(text) = line.stream {
            self.text(&text);
        }
        // Layers of a base image on their way.
        if let Some(status) = line.status {
            let id = line.id.unwrap_or_default();
            let detail = line.progress_detail.unwrap_or_default();
            let bytes = |n: Option<i64>| n.and_then(|n| u64::try_from(n).ok());
            match (id.as_str(), bytes(detail.current)) {
                ("", _) => self.sink.emit(Event::Message { text: status }),
                (id, current) => {
                    let done = status.contains("complete") || status.contains("Already exists");
                    self.sink.emit(Event::Progress {
                        id: format!("docker {id}"),
                        label: format!("{status} {id}"),
                        current: current.unwrap_or(0),
                        total: bytes(detail.total),
                        done,
                    });
                }
            }
        }
    }

    /// The classic builder.
    fn text(&mut self, text: &str) {
        let line = text.trim_end_matches('\n');
        if let Some((number, name)) = line.strip_prefix("Step ").and_then(|rest| rest.split_once(" : ")) {
            self.finish_current();
            self.step(number, &format!("[{number}] {name}"));
            self.current = Some(number.to_owned());
        } else if line == " ---> Using cache" {
            self.with_current(|step, sink| step.cached(sink));
        } else if let Some(said) = line.strip_prefix(" ---> ") {
            self.with_current(|step, sink| step.start(sink));
            if let Some(id) = said.strip_prefix("Running in ") {
                self.sink.emit(Event::Container { id: id.trim().to_owned() });
            }
        } else if let Some(id) = line.strip_prefix("Successfully built ") {
            self.finish_current();
            self.id.get_or_insert_with(|| id.to_owned());
        } else if line.starts_with("Removing intermediate container ") || line.starts_with("Successfully tagged ") || line.is_empty() {
            // Its own housekeeping.
        } else if let Some(warning) = line.strip_prefix("[Warning] ") {
            self.sink.emit(Event::Warning { code: "docker".into(), message: warning.to_owned(), line: None });
        } else {
            // Standard error comes in red.
            let red = text.strip_prefix("\u{1b}[91m").map(|rest| rest.strip_suffix("\u{1b}[0m").unwrap_or(rest));
            let stream = if red.is_some() { LogStream::Stderr } else { LogStream::Stdout };
            // The end of the colour of what came before.
            let text = red.unwrap_or(text);
            let text = text.strip_prefix("\u{1b}[0m").unwrap_or(text);
            match &self.current {
                Some(_) => self.with_current(|step, sink| step.log(stream, text, sink)),
                None => self.sink.emit(Event::Message { text: text.trim_end().to_owned() }),
            }
        }
    }

    /// BuildKit.
    fn status(&mut self, status: StatusResponse) {
        for Vertex { digest, name, cached, started, completed, error, .. } in status.vertexes {
            self.step(&digest, &name);
            let Some(step) = self.steps.get_mut(&digest) else { continue };
            if cached {
                step.cached(self.sink);
            } else if started.is_some() {
                step.start(self.sink);
            }
            if completed.is_some() || !error.is_empty() {
                step.finish(Some(&*without_passwords(&error)).filter(|e| !e.is_empty()), self.sink);
            }
        }
        for log in status.logs {
            let stream = if log.stream == 2 { LogStream::Stderr } else { LogStream::Stdout };
            if let Some(step) = self.steps.get_mut(&log.vertex) {
                step.log(stream, &String::from_utf8_lossy(&log.msg), self.sink);
            }
        }
        for transfer in status.statuses {
            let bytes = |n: i64| u64::try_from(n).unwrap_or(0);
            let label = if transfer.name.is_empty() { transfer.id.clone() } else { transfer.name };
            self.sink.emit(Event::Progress {
                id: format!("{} {}", transfer.vertex, transfer.id),
                label,
                current: bytes(transfer.current),
                total: Some(bytes(transfer.total)).filter(|total| *total > 0),
                done: transfer.completed.is_some(),
            });
        }
        for warning in status.warnings {
            let message = String::from_utf8_lossy(&warning.short).into_owned();
            let line = warning.ranges.first().and_then(|range| range.start.as_ref()).and_then(|at| u32::try_from(at.line).ok());
            self.sink.emit(Event::Warning { code: "docker".into(), message, line });
        }
    }

    fn step(&mut self, key: &str, name: &str) {
        if !self.steps.contains_key(key) {
            let step = Step {
                vertex: self.order.len(),
                name: without_passwords(name).into_owned(),
                since: Instant::now(),
                state: State::Waiting,
                tail: VecDeque::new(),
            };
            self.order.push(key.to_owned());
            self.steps.insert(key.to_owned(), step);
        }
    }

    fn with_current(&mut self, act: impl FnOnce(&mut Step, &dyn EventSink)) {
        if let Some(step) = self.current.as_ref().and_then(|key| self.steps.get_mut(key)) {
            act(step, self.sink);
        }
    }

    fn finish_current(&mut self) {
        self.with_current(|step, sink| {
            step.start(sink);
            step.finish(None, sink);
        });
        self.current = None;
    }

    fn failure(&mut self, message: &str) -> BuildFailure {
        let code = exit_code(message);
        let message = &*without_passwords(message);
        let buildkit = self.buildkit;
        let failed = match &self.current {
            Some(key) => self.steps.get_mut(key),
            None => self.steps.values_mut().filter(|step| step.state == State::Failed).min_by_key(|step| step.vertex),
        };
        let Some((step, code)) = failed.zip(code) else { return BuildFailure::Failed { message: message.trim().to_owned() } };
        if !buildkit {
            step.start(self.sink);
            step.finish(Some(message), self.sink);
        }
        let command = step.name.split_once("] ").map_or(step.name.as_str(), |(_, command)| command);
        let command = command.strip_prefix("RUN ").unwrap_or(command).to_owned();
        BuildFailure::Step {
            name: step.name.clone(),
            command,
            code,
            tail: step.tail.iter().map(|line| line.trim_end().to_owned()).collect(),
        }
    }

    fn built(&mut self, engine: &DockerEngine) -> Result<Built, BuildFailure> {
        self.finish_current();
        let count = |state| {
            // BuildKit's own work beside the Dockerfile.
            let own = |step: &&Step| step.state == state && !step.name.starts_with("[internal]") && step.name.starts_with('[');
            self.steps.values().filter(own).count()
        };
        let (ran, cached) = (count(State::Finished), count(State::Cached));
        let id = self.id.take().ok_or_else(|| DockerEngineError::Broken {
            endpoint: engine.to_string(),
            call: "build".into(),
            reason: "it ended without naming an image".into(),
        })?;
        Ok(Built { id, ran, cached })
    }
}

impl Step {
    fn start(&mut self, sink: &dyn EventSink) {
        if self.state == State::Waiting {
            self.state = State::Running;
            self.since = Instant::now();
            sink.emit(Event::Started { vertex: self.vertex, name: self.name.clone(), line: None });
        }
    }

    fn cached(&mut self, sink: &dyn EventSink) {
        if self.state == State::Waiting {
            self.state = State::Cached;
            sink.emit(Event::Cached { vertex: self.vertex, name: self.name.clone() });
        }
    }

    fn log(&mut self, stream: LogStream, text: &str, sink: &dyn EventSink) {
        self.start(sink);
        for line in text.split_inclusive('\n') {
            // Text comes in pieces of any size: what does not end a line is continued.
            match self.tail.back_mut().filter(|last| !last.ends_with('\n')) {
                Some(last) if last.len() < TAIL_LINE => last.push_str(line),
                Some(_) => {}
                None => self.tail.push_back(line.chars().take(TAIL_LINE).collect()),
            }
        }
        while self.tail.len() > TAIL {
            self.tail.pop_front();
        }
        if self.state == State::Running {
            sink.emit(Event::Log { vertex: self.vertex, stream, text: text.to_owned() });
        }
    }

    fn finish(&mut self, error: Option<&str>, sink: &dyn EventSink) {
        if self.state != State::Running {
            return;
        }
        match error {
            Some(error) => {
                self.state = State::Failed;
                sink.emit(Event::Failed { vertex: self.vertex, error: error.to_owned() });
            }
            None => {
                self.state = State::Finished;
                sink.emit(Event::Finished { vertex: self.vertex, took: self.took() });
            }
        }
    }

    fn took(&self) -> Duration {
        self.since.elapsed()
    }
}

/// The exit code in the engine's words for a step that failed.
fn exit_code(message: &str) -> Option<i32> {
    ["returned a non-zero code: ", "exit code: "].iter().find_map(|words| {
        let (_, rest) = message.rsplit_once(words)?;
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Heard(Mutex<Vec<String>>);

    impl EventSink for Heard {
        fn emit(&self, event: Event) {
            self.0.lock().unwrap().push(match event {
                Event::Started { vertex, name, .. } => format!("{vertex} start {name}"),
                Event::Cached { vertex, name } => format!("{vertex} cached {name}"),
                Event::Log { vertex, stream, text } => format!("{vertex} {stream:?} {text:?}"),
                Event::Finished { vertex, .. } => format!("{vertex} end"),
                Event::Failed { vertex, .. } => format!("{vertex} failed"),
                Event::Warning { message, .. } => format!("warning {message}"),
                Event::Container { id } => format!("container {id}"),
                other => format!("{other:?}"),
            });
        }
    }

    #[test]
    fn the_classic_builders_words() {
        let heard = Heard::default();
        let mut log = Log { buildkit: false, sink: &heard, steps: HashMap::new(), order: vec![], current: None, id: None };
        for text in [
            "Step 1/4 : FROM busybox",
            "\n",
            " ---> 0123\n",
            "Step 2/4 : ENV a=b",
            "\n",
            " ---> Using cache\n",
            " ---> 4567\n",
            "Step 3/4 : RUN x",
            "\n",
            " ---> Running in 89ab\n",
            "out\n",
            "\u{1b}[91merr\n\u{1b}[0m",
            "[Warning] old\n",
            "Removing intermediate container 89ab\n",
            " ---> cdef\n",
            "Step 4/4 : RUN y",
            "\n",
            " ---> Running in 89ac\n",
            "half",
            " line\n",
        ] {
            log.take(BuildInfo { stream: Some(text.to_owned()), ..BuildInfo::default() });
        }
        let failure = log.failure("The command '/bin/sh -c y' returned a non-zero code: 42");
        let tail = vec!["half line".to_owned()];
        assert_eq!(failure, BuildFailure::Step { name: "[4/4] RUN y".into(), command: "y".into(), code: 42, tail });
        assert_eq!(
            heard.0.into_inner().unwrap(),
            [
                "0 start [1/4] FROM busybox",
                "0 end",
                "1 cached [2/4] ENV a=b",
                "2 start [3/4] RUN x",
                "container 89ab",
                "2 Stdout \"out\\n\"",
                "2 Stderr \"err\\n\"",
                "warning old",
                "2 end",
                "3 start [4/4] RUN y",
                "container 89ac",
                "3 Stdout \"half\"",
                "3 Stdout \" line\\n\"",
                "3 failed",
            ]
        );
    }

    #[test]
    fn exit_codes_and_queries() {
        for (message, code) in [
            ("The command '/bin/sh -c exit 3' returned a non-zero code: 3", Some(3)),
            ("process \"/bin/sh -c x\" did not complete successfully: exit code: 127", Some(127)),
            ("executor failed running [/bin/sh -c x]: exit code: 1", Some(1)),
            ("process \"/bin/sh -c echo exit code: 5; false\" did not complete successfully: exit code: 2: x", Some(2)),
            ("dockerfile parse error line 1", None),
        ] {
            assert_eq!(exit_code(message), code, "{message}");
        }
        assert_eq!(encoded(&[("a", "b c&d=é".into()), ("t", "x/y:1".into())]), "a=b%20c%26d%3D%C3%A9&t=x%2Fy%3A1");
        assert_ne!(session_id().unwrap(), session_id().unwrap());
    }
}
