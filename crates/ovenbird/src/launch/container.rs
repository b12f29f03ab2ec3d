//! A worker in a container of a Docker Engine: with our own engine and the rights that it needs, or with the engine's socket.
//!
//! The pipe is the container's standard input and output. When the caller dies, its input ends, the worker ends, and the engine removes
//! the container; one that is left all the same carries its caller's name as a label, and the next caller removes it.

use std::collections::BTreeMap;
use std::io::{self, PipeReader, Read as _, Write as _};
use std::sync::mpsc;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ovenbird_engine::Event;

use super::caller::Caller;
use super::{Launcher, Life, Pipe, WorkerSpec};
use crate::builder::{DockerEngineBuilder, EngineBuilder, Job};
use crate::docker_engine::{ContainerSpec, DockerEngine, DockerEngineError, Endpoint, Stream, Tasker};
use crate::driver::{Driver as _, LocalDriver};
use crate::error::{Error, Kind};
use crate::report::BuildReport;
use crate::request::{Output, OutputKind};
use crate::self_image::{STATE, SelfImage};
use crate::settings::{Environment, Settings};
use crate::worker::wire::shown;

/// Label of every container of a worker; its value is the caller.
pub const LABEL: &str = "io.ovenbird.worker";

/// Volume with the state of workers in containers: their cache.
pub const VOLUME: &str = "ovenbird-worker";

/// The engine's socket inside the container.
const SOCKET: &str = "/var/run/docker.sock";

/// What our engine needs where the engine may not give everything (`--privileged`).
const CAPABILITIES: [&str; 3] = ["SYS_ADMIN", "NET_ADMIN", "SYS_PTRACE"];

/// Same: the engine's filters would refuse mounts.
const SECURITY: [&str; 2] = ["seccomp=unconfined", "apparmor=unconfined"];

/// Most of what a worker says beside the pipe.
const MAX_SAID: usize = 16 << 10;

/// How long the engine may take to remove a container.
const GONE: Duration = Duration::from_secs(10);

/// How often it is looked whether it has ended.
const LOOK: Duration = Duration::from_millis(10);

/// What a container is to be.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ContainerPlace {
    /// With the engine's socket, and that engine builds; else with our own engine, privileged.
    pub socket: bool,
    /// An image with `ovenbird` as its entrypoint; `None`: one of this program, made when the engine does not have it.
    pub image: Option<String>,
    /// Keep the container of a build that succeeded as an image `buildroot-IMAGE:TIME`, and push it to these registries.
    pub buildroot: Option<Vec<String>>,
}

/// Starts workers in containers.
#[derive(Debug)]
pub struct ContainerLauncher {
    place: ContainerPlace,
    settings: Settings,
    environment: Environment,
}

impl ContainerLauncher {
    /// On the Docker Engine of the settings.
    pub fn new(place: ContainerPlace, settings: &Settings, environment: &Environment) -> Self {
        Self { place, settings: settings.clone(), environment: environment.clone() }
    }

    /// The image to run.
    fn image(&self, engine: &DockerEngine, job: &Job) -> Result<String, Error> {
        if let Some(image) = &self.place.image {
            return Ok(image.clone());
        }
        let own = SelfImage::of_this_program()?;
        let name = own.name()?;
        if engine.image_exists(&name)? {
            return Ok(name);
        }
        job.sink.emit(Event::Message { text: format!("making {name}, an image of this program, for the Docker Engine at {engine}") });
        let (mut request, _folder) = own.request(&self.settings.temp)?;
        request.names = vec![name.clone()];
        request.outputs = vec![Output::new(OutputKind::Load)];
        std::fs::create_dir_all(&self.settings.root).map_err(|error| Error::from_chain(Kind::Configuration, &error))?;
        // Nothing is run: no isolation is needed.
        let builder = EngineBuilder::open(&self.settings, &self.environment, None, false)?;
        let quiet = Job { sink: Arc::new(ovenbird_engine::event::Silent), cancel: job.cancel.clone() };
        LocalDriver::new(builder, self.settings.temp.as_path(), io::empty()).run(&request, &quiet)?;
        Ok(name)
    }

    fn spec(&self, image: String, spec: &WorkerSpec) -> ContainerSpec {
        let mut container = ContainerSpec {
            image,
            command: spec
                .flags
                .iter()
                .map(|flag| flag.to_string_lossy().into_owned())
                .chain(["worker".into()])
                .chain(spec.arguments.iter().map(|word| word.to_string_lossy().into_owned()))
                .collect(),
            labels: BTreeMap::from([(LABEL.to_owned(), Caller::own().to_string())]),
            // Registries are where they are for the caller, also those on loopback.
            network: Some("host".into()),
            binds: vec![format!("{VOLUME}:{STATE}")],
            env: vec![format!("OVENBIRD_ROOT={STATE}")],
            stdin: true,
            // What is to be kept must be there when it has ended.
            auto_remove: self.place.buildroot.is_none(),
            ..ContainerSpec::default()
        };
        if self.place.socket {
            container.env.push(format!("DOCKER_HOST=unix://{SOCKET}"));
        } else {
            container.privileged = true;
        }
        container
    }
}

/// Removes containers whose callers are gone.
pub fn remove_orphans(engine: &DockerEngine, job: &Job) -> Result<(), DockerEngineError> {
    let own = Caller::own();
    for container in engine.containers_with_label(LABEL)? {
        let caller = container.labels.get(LABEL).and_then(|label| Caller::parse(label));
        if caller.is_some_and(|caller| caller.is_gone(&own)) {
            engine.remove_container(&container.id)?;
            let id: String = container.id.chars().take(12).collect();
            job.sink.emit(Event::Message { text: format!("removed container {id} of a build whose caller is gone") });
        }
    }
    Ok(())
}

impl Launcher for ContainerLauncher {
    fn launch(&self, spec: &WorkerSpec, job: &Job) -> Result<Pipe, Error> {
        let engine = Arc::new(DockerEngine::new(&self.settings.docker)?.until(&job.cancel));
        engine.reach()?;
        remove_orphans(&engine, job)?;
        let mut container = self.spec(self.image(&engine, job)?, spec);
        if self.place.socket {
            // Where the engine is reached over the network, its own machine has it at the usual place.
            let outside = match engine.endpoint() {
                Endpoint::Unix(path) => path.display().to_string(),
                Endpoint::Tcp(_) | Endpoint::Tls { .. } => SOCKET.into(),
            };
            container.binds.push(format!("{outside}:{SOCKET}"));
        }
        job.sink.emit(Event::Message { text: format!("building {} of the Docker Engine at {engine}", self.place()) });
        let kept = self.place.buildroot.clone().map(|registries| Kept {
            registries,
            settings: self.settings.clone(),
            environment: self.environment.clone(),
        });
        match start(&engine, &container, kept.clone(), job) {
            // Engines inside containers have not every right to give.
            Err(error) if container.privileged && error.to_string().contains("apply caps") => {
                let message = format!(
                    "the Docker Engine cannot start privileged containers here: the container gets {} instead",
                    CAPABILITIES.join(", ")
                );
                job.sink.emit(Event::Message { text: message });
                container.privileged = false;
                container.cap_add = CAPABILITIES.map(str::to_owned).to_vec();
                container.security_options = SECURITY.map(str::to_owned).to_vec();
                start(&engine, &container, kept, job)
            }
            started => started,
        }
    }

    fn place(&self) -> String {
        if self.place.socket { "in a container with the engine's socket".into() } else { "in a container".into() }
    }
}

/// Makes the container, attaches, starts it.
fn start(engine: &Arc<DockerEngine>, container: &ContainerSpec, kept: Option<Kept>, job: &Job) -> Result<Pipe, Error> {
    let id = engine.create_container(container)?;
    let broken = |error: io::Error| Error::from_chain(Kind::Driver, &error).while_doing("cannot make a pipe to the container");
    let (to_worker, to) = io::pipe().map_err(broken)?;
    let (from, from_worker) = io::pipe().map_err(broken)?;
    let said = Arc::new(Mutex::new(Vec::new()));
    let container = Event::Container { id: id.clone() };
    // It is removed also when the build was cancelled, by an engine that may have stopped answering.
    let removes = engine.until(&ovenbird_engine::Cancel::default()).within(GONE);
    let life = Running { engine: removes, id: id.clone(), said: Arc::clone(&said), code: Arc::default(), kept };
    let (tell, told) = mpsc::channel();
    let (engine, code) = (Arc::clone(engine), Arc::clone(&life.code));
    std::thread::spawn(move || {
        let attached = engine.attach_container(&id, true).and_then(|attached| engine.start_container(&id).map(|()| attached));
        let attached = match attached {
            Ok(attached) => attached,
            Err(error) => {
                let _ = tell.send(Err(error));
                return;
            }
        };
        let _ = tell.send(Ok(()));
        let (input, mut from_worker) = (attached.input, Some(from_worker));
        std::thread::scope(|scope| {
            scope.spawn(|| feed(to_worker, input));
            // Before it is gone with its code.
            scope.spawn(|| {
                let ended = engine.wait_container(&id, &ovenbird_engine::Cancel::default());
                *code.lock().unwrap_or_else(PoisonError::into_inner) = Some(ended.map_err(|error| error.to_string()));
            });
            for piece in attached.output {
                match (piece, &mut from_worker) {
                    (Ok((Stream::Stdout, bytes)), Some(out)) => {
                        if out.write_all(&bytes).is_err() {
                            // The caller reads no more.
                            from_worker = None;
                        }
                    }
                    (Ok((Stream::Stdout, _)), None) => {}
                    (Ok((Stream::Stderr, bytes)), _) => {
                        let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
                        said.extend_from_slice(&bytes);
                        let over = said.len().saturating_sub(MAX_SAID);
                        said.drain(..over);
                    }
                    (Err(_), _) => break,
                }
            }
            drop(from_worker);
        });
    });
    match told.recv() {
        Ok(Ok(())) => {
            job.sink.emit(container);
            Ok(Pipe { to: Box::new(to), from: Box::new(from), life: Box::new(life) })
        }
        Ok(Err(error)) => Err(error.into()),
        Err(mpsc::RecvError) => Err(Error::new(Kind::Bug, "the thread of the container ended")),
    }
}

/// What the caller writes goes to the container; its end is the end of the container's input.
fn feed(mut from: PipeReader, mut to: impl io::Write) {
    let mut piece = vec![0; 64 << 10];
    while let Ok(read @ 1..) = from.read(&mut piece) {
        if to.write_all(&piece[..read]).and_then(|()| to.flush()).is_err() {
            return;
        }
    }
}

struct Running {
    engine: DockerEngine,
    id: String,
    said: Arc<Mutex<Vec<u8>>>,
    code: Arc<Mutex<Option<Result<i64, String>>>>,
    kept: Option<Kept>,
}

/// How a container is kept.
#[derive(Debug, Clone)]
struct Kept {
    registries: Vec<String>,
    settings: Settings,
    environment: Environment,
}

impl Life for Running {
    fn wait(&mut self, limit: Duration) -> Option<String> {
        let end = Instant::now() + limit;
        let code = loop {
            match &*self.code.lock().unwrap_or_else(PoisonError::into_inner) {
                Some(code) => break code.clone(),
                None if Instant::now() < end => {}
                None => return None,
            }
            std::thread::sleep(LOOK);
        };
        let how = code.map_or_else(|error| error, |code| format!("the container ended with code {code}"));
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let said = shown(said.trim_ascii(), MAX_SAID);
        Some(if said.is_empty() { how } else { format!("{how}: {said}") })
    }

    fn keep(&mut self, report: &BuildReport, job: &Job) -> Result<(), Error> {
        let Some(Kept { registries, settings, environment }) = &self.kept else { return Ok(()) };
        let name = report.names.first().ok_or_else(|| {
            Error::new(Kind::Usage, "the build environment cannot be kept: it is named after the image, which has no name")
                .hint("add -t NAME")
        })?;
        let images = EngineBuilder::open(settings, environment, None, false)?;
        let builder = DockerEngineBuilder::new(DockerEngine::new(&settings.docker)?, images, settings);
        let tasker = Tasker::new(builder, settings.temp.as_path(), Arc::clone(&job.sink), job.cancel.clone());
        for name in tasker.push_buildroot(&self.id, &name.parse()?, registries, environment.now())? {
            job.sink.emit(Event::Message { text: format!("kept the build environment as {}", name.familiar()) });
        }
        Ok(())
    }

    fn kill(&mut self) {
        let _ = self.engine.remove_container(&self.id);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let end = Instant::now() + GONE;
        self.kill();
        // The engine may be removing it by itself.
        while Instant::now() < end && self.engine.inspect_container(&self.id).is_ok() {
            std::thread::sleep(LOOK);
        }
    }
}
