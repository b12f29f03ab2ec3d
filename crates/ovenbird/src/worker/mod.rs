//! `ovenbird worker`: a [`LocalDriver`] behind a pipe. The caller's end is [`crate::remote`], what starts workers is [`crate::launch`].
//!
//! The protocol is in [`wire`]. A worker has no secrets and no settings of registries of its own: it asks its caller, by name. It lives as
//! long as the pipe: when the caller is gone, the build is cancelled, and what does not stop then is abandoned.

pub(crate) mod chunks;
pub(crate) mod errand;
pub(crate) mod failure;
pub(crate) mod folder;
mod outputs;
pub(crate) mod question;
mod slot;
pub mod socket;
pub mod wire;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ovenbird_dockerfile::ignore::Patterns;
use ovenbird_engine::input::LocalContext;
use ovenbird_engine::{Cancel, Event, EventSink};
use ovenbird_oci::beside;
use ovenbird_oci::keychain::KeychainOptions;
use ovenbird_oci::layer::{LayerError, Owners};
use ovenbird_oci::registry::RegistryOptions;
use ovenbird_sandbox::Level;
use rustix::fs::MemfdFlags;

use crate::builder::{BuilderKind, DockerEngineBuilder, EngineBuilder, Job};
use crate::docker_engine::DockerEngine;
use crate::driver::{Driver as _, Given, LocalDriver};
use crate::error::{Error, Kind};
use crate::report::BuildReport;
use crate::request::{BuildRequest, ContextSource, DockerfileFrom, SecretOrigin, Source};
use crate::settings::{Environment, Settings};
use crate::source::SourceTree;
use crate::workflow::{Bench, Desk, Workshop};
use chunks::{Depot, List, Wanted};
use failure::Failure;
use outputs::Outputs;
use question::{OfCaller, Questions, refused};
use wire::{Answered, Asked, Bulk, Errand, Hello, Order, Receiver, Registry, Sender, ToCaller, ToWorker, WireError};

/// Longest Dockerfile.
const MAX_DOCKERFILE: u64 = 16 << 20;

/// Most contexts of one build.
const MAX_CONTEXTS: usize = 1000;

/// How long a build that is cancelled because its caller is gone may take to stop.
const GRACE: Duration = Duration::from_secs(5);

/// What a worker runs on.
pub struct Place {
    /// Of this machine.
    pub settings: Settings,
    /// Of this process.
    pub environment: Environment,
    /// What this process has entered; `None`: no step can run.
    pub level: Option<Level>,
    /// Do overlay mounts work there?
    pub overlay: bool,
    /// What builds.
    pub builder: BuilderKind,
    /// Builds of workers at once on this machine; `None`: any number.
    pub slots: Option<usize>,
    /// Credentials of this place, as Docker's client writes them: they come before the caller's.
    pub credentials: Option<PathBuf>,
    /// Who else sees how the build goes.
    pub echo: Option<Arc<dyn EventSink>>,
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Place").field("level", &self.level).field("builder", &self.builder).finish_non_exhaustive()
    }
}

/// Serves one caller: one build. Gives the exit code that the build would have had here.
///
/// `abandon` ends the process; it is called when the caller is gone and the build does not stop.
pub fn serve(
    place: Place,
    from: impl Read + Send + 'static,
    to: impl Write + Send + 'static,
    cancel: &Cancel,
    abandon: impl FnOnce() + Send + 'static,
) -> u8 {
    let to = Arc::new(Sender::new(to));
    let mut from = Receiver::new(from);
    // What cannot be sent nobody is there to read.
    let _slot = match place.slots.map(|slots| slot::take(&place.settings.root, slots)) {
        None => None,
        Some(Ok(Some(slot))) => Some(slot),
        Some(Ok(None)) => {
            let _ = to.send(&ToCaller::Busy);
            return Kind::Driver.exit_code();
        }
        Some(Err(error)) => {
            let what = format!("cannot take a slot in {}", place.settings.root.display());
            let failure = Failure::of(Error::from_chain(Kind::Configuration, &error).while_doing(what), ("", ""));
            let _ = to.send(&ToCaller::Failed { failure: Box::new(failure) });
            return Kind::Configuration.exit_code();
        }
    };
    let _ = to.send(&ToCaller::Hello(Hello::own()));
    let echo = place.echo.clone();
    let mut dockerfile = (String::new(), String::new());
    let outcome = receive(&mut from, &to, &place.settings).and_then(|received| {
        let questions = Arc::new(Questions::new(Arc::clone(&to)));
        listen(from, Arc::clone(&questions), cancel.clone(), abandon);
        match received {
            Received::Build { order, tree } => {
                dockerfile = (tree.dockerfile_name.clone(), tree.dockerfile.clone());
                build(place, *order, *tree, &to, &questions, cancel)
            }
            Received::Errand(errand) => errand::build(&place, *errand, &to, &questions, cancel),
        }
    });
    let outcome = match outcome {
        Err(error) if cancel.is_cancelled() && error.kind != Kind::Cancelled => Err(Error::new(Kind::Cancelled, "cancelled")),
        outcome => outcome,
    };
    match outcome {
        Ok(report) => {
            let _ = to.send(&ToCaller::Report { report: Box::new(report) });
            0
        }
        Err(error) => {
            let code = error.kind.exit_code();
            if let Some(echo) = echo {
                echo.emit(Event::Message { text: format!("error: {error}") });
            }
            let failure = Failure::of(error, (&dockerfile.0, &dockerfile.1));
            let _ = to.send(&ToCaller::Failed { failure: Box::new(failure) });
            code
        }
    }
}

/// Everything that comes before the build.
enum Received {
    Build { order: Box<Order>, tree: Box<SourceTree> },
    Errand(Box<Errand>),
}

impl From<WireError> for Error {
    fn from(error: WireError) -> Self {
        let told = Self::from_chain(Kind::Driver, &error);
        if matches!(error, WireError::Version { .. }) { told.hint("install the same version of ovenbird at both ends") } else { told }
    }
}

fn of_caller(error: WireError) -> Error {
    Error::from(error).while_doing("the worker cannot understand its caller")
}

fn receive<R: Read>(from: &mut Receiver<R>, to: &Sender, settings: &Settings) -> Result<Received, Error> {
    let temp = settings.temp.as_path();
    let unexpected = |message: &ToWorker| of_caller(WireError::Unexpected(wire::Message::name(message)));
    match from.expect().map_err(of_caller)?.0 {
        ToWorker::Hello(hello) => hello.check().map_err(of_caller)?,
        other => return Err(unexpected(&other)),
    }
    let order = match from.expect().map_err(of_caller)?.0 {
        ToWorker::Build(order) => order,
        ToWorker::Errand(errand) => return Ok(Received::Errand(errand)),
        other => return Err(unexpected(&other)),
    };
    let broken = |error: io::Error| Error::from_chain(Kind::Driver, &error).while_doing("the Dockerfile did not arrive");
    let mut dockerfile = vec![];
    let mut bulk = Bulk::new(from);
    (&mut bulk).take(order.dockerfile_bytes.min(MAX_DOCKERFILE)).read_to_end(&mut dockerfile).map_err(broken)?;
    bulk.finish().map_err(broken)?;
    let dockerfile = String::from_utf8(dockerfile).map_err(|_| of_caller(WireError::Malformed("a Dockerfile that is not UTF-8".into())))?;
    if dockerfile.len() as u64 != order.dockerfile_bytes {
        return Err(of_caller(WireError::Malformed("a Dockerfile of another length than announced".into())));
    }
    let cannot = |error: io::Error| {
        Error::from_chain(Kind::Configuration, &error).while_doing(format!("cannot make a temporary folder in {}", temp.display()))
    };
    std::fs::create_dir_all(temp).map_err(cannot)?;
    beside::clear(temp);
    let aside = beside::folder_in(temp).map_err(cannot)?;
    let mut contexts = BTreeMap::new();
    loop {
        let (name, ignore, offered) = match from.expect().map_err(of_caller)?.0 {
            ToWorker::Context { name, ignore, offered } if contexts.len() < MAX_CONTEXTS => (name, ignore, offered),
            ToWorker::Begin => break,
            other => return Err(unexpected(&other)),
        };
        let ignore = Patterns::new(&ignore).map_err(|error| Error::from_chain(Kind::Driver, &error))?;
        let into = aside.path().join(contexts.len().to_string());
        std::fs::create_dir(&into).map_err(cannot)?;
        let arrived = if offered {
            take(from, to, &settings.root, &into)
        } else {
            let mut bulk = Bulk::new(from);
            let arrived = folder::receive(&mut bulk, &into);
            if arrived.is_ok() {
                bulk.finish().map_err(broken)?;
            }
            arrived
        };
        let (dir, _) = arrived.map_err(|error| {
            Error::new(Kind::Driver, format!("the build context {name:?} did not arrive at the worker")).because(error.of_archive())
        })?;
        contexts.insert(name, LocalContext::new(dir, ignore));
    }
    let mut tree = SourceTree::given(dockerfile, order.dockerfile_name.clone(), contexts, aside);
    tree.origin.clone_from(&order.origin);
    Ok(Received::Build { order, tree: Box::new(tree) })
}

/// Takes a folder that is offered, chunk by chunk.
fn take<R: Read>(from: &mut Receiver<R>, to: &Sender, root: &Path, into: &Path) -> Result<(PathBuf, Owners), LayerError> {
    let folder = root.join("chunks");
    let unusable = |source| LayerError::Io { action: "use", path: folder.clone(), source };
    let mut depot = Depot::open(&folder).map_err(unusable)?;
    let mut top = vec![];
    let read = Bulk::new(from).take(folder::MAX_TOP).read_to_end(&mut top);
    read.map_err(|error| LayerError::Malformed { reason: error.to_string() })?;
    let fetch = |depot: &mut Depot, list: &List, wanted: &Wanted| {
        to.send_with(&ToCaller::Want { bytes: wanted.bytes().len() }, wanted.bytes())?;
        let mut bulk = Bulk::new(from);
        depot.fill(list, wanted, &mut bulk)?;
        bulk.finish()
    };
    folder::take(&mut depot, &top, fetch, into)
}

/// Reads what comes while the build runs.
fn listen<R: Read + Send + 'static>(
    mut from: Receiver<R>,
    questions: Arc<Questions>,
    cancel: Cancel,
    abandon: impl FnOnce() + Send + 'static,
) {
    std::thread::spawn(move || {
        loop {
            match from.next::<ToWorker>() {
                Ok(Some((ToWorker::Answer { id, answer, .. }, bytes))) => questions.answer(id, (answer, bytes)),
                Ok(Some((ToWorker::Cancel, _))) => cancel.cancel(),
                // The end of the pipe, or nonsense: nobody is there for whom to build.
                _ => break,
            }
        }
        cancel.cancel();
        questions.close();
        std::thread::sleep(GRACE);
        abandon();
    });
}

/// Bytes that never touch a disk, at a path that only this process has.
fn in_memory(bytes: &[u8]) -> io::Result<(OwnedFd, PathBuf)> {
    let fd = rustix::fs::memfd_create("ovenbird", MemfdFlags::CLOEXEC)?;
    let mut file = File::from(fd);
    file.write_all(bytes)?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    Ok((file.into(), path))
}

fn build(
    mut place: Place,
    order: Order,
    mut tree: SourceTree,
    to: &Arc<Sender>,
    questions: &Arc<Questions>,
    cancel: &Cancel,
) -> Result<BuildReport, Error> {
    let Order { request, values, policies, now, registries, logins, git, revision, absent, .. } = order;
    (tree.git, tree.revision) = (git, revision);
    let (echo, credentials) = (place.echo.clone(), place.credentials.clone());
    let settings = &mut place.settings;
    // Files in memory live as long as these.
    let mut held = vec![];
    let mut hold = |bytes: &[u8], what: &str| -> Result<PathBuf, Error> {
        let kept =
            in_memory(bytes).map_err(|error| Error::from_chain(Kind::Configuration, &error).while_doing(format!("cannot hold {what}")));
        let (fd, path) = kept?;
        held.push(fd);
        Ok(path)
    };
    for (name, registry) in registries {
        let what = format!("the certificates of {name}");
        let ca = registry.ca.as_deref().map(|text| hold(text.as_bytes(), &what)).transpose()?;
        let client_identity = if registry.client_identity {
            let asked = questions.bytes(Asked::ClientIdentity { registry: name.clone() });
            Some(hold(&asked.map_err(|reason| refused(&what, reason))?, &what)?)
        } else {
            None
        };
        settings.registries.insert(name, registry.with_files(ca, client_identity));
    }
    for host in logins {
        let asked = questions.ask(Asked::Login { host: host.clone() });
        if let (Answered::Credential { credential, .. }, _) =
            asked.map_err(|reason| refused(&format!("the password for {host}"), reason))?
        {
            tree.logins.insert(host, credential.into());
        }
    }
    settings.keychain = KeychainOptions { custodian: Some(questions.custodian(credentials)), ..KeychainOptions::default() };
    (settings.docker_config, settings.auth_file) = (None, None);
    let mut request: BuildRequest = request;
    for spec in &mut request.secrets {
        let what = format!("secret {:?}", spec.id);
        let bytes = questions.bytes(Asked::Secret { id: spec.id.clone() }).map_err(|reason| refused(&what, reason))?;
        spec.origin = SecretOrigin::File(hold(&bytes, &what)?);
    }
    let outputs = Outputs::prepare(&mut request, &settings.temp, to, place.builder == BuilderKind::Docker)?;
    let job = Job { sink: Arc::new(Wire(Arc::clone(to), echo)), cancel: cancel.clone() };
    let caller = OfCaller::new(Arc::clone(questions), absent);
    let bench = Bench { policies, now, desk: Desk::of(Arc::new(caller)), ..Bench::new(&place.settings, &place.environment) };
    let report = run(&place, bench, Given { tree, values }, &request, &job);
    outputs.finish(report, to)
}

/// Builds with what this place builds with.
fn run(place: &Place, bench: Bench, given: Given, request: &BuildRequest, job: &Job) -> Result<BuildReport, Error> {
    let Place { settings, environment, level, overlay, builder, .. } = place;
    let engine = EngineBuilder::open(settings, environment, *level, *overlay)?;
    let given = (bench, given);
    let docker = match builder {
        BuilderKind::Docker => Some(DockerEngine::new(&settings.docker)?),
        BuilderKind::Auto if !engine.runs_steps() => {
            DockerEngine::new(&settings.docker).ok().filter(|docker| docker.until(&job.cancel).reach().is_ok())
        }
        BuilderKind::Auto | BuilderKind::Engine => None,
    };
    match docker {
        Some(docker) => run_with(DockerEngineBuilder::new(docker, engine, settings), settings, given, request, job),
        None => run_with(engine, settings, given, request, job),
    }
}

fn run_with<B: Workshop>(
    builder: B,
    settings: &Settings,
    (bench, given): (Bench, Given),
    request: &BuildRequest,
    job: &Job,
) -> Result<BuildReport, Error> {
    let driver = LocalDriver::new(builder, settings.temp.as_path(), io::empty()).with_names(bench.policies.clone(), bench.now);
    driver.with_plugins(bench).with_given(given).run(request, job)
}

/// Events as messages.
struct Wire(Arc<Sender>, Option<Arc<dyn EventSink>>);

impl EventSink for Wire {
    fn emit(&self, event: Event) {
        if let Some(echo) = &self.1 {
            echo.emit(event.clone());
        }
        // Who is not there does not listen; the end of the pipe stops the build.
        let _ = self.0.send(&ToCaller::Event { event });
    }
}

impl Registry {
    /// As settings of this machine.
    fn with_files(self, ca: Option<PathBuf>, client_identity: Option<PathBuf>) -> RegistryOptions {
        RegistryOptions {
            plain_http: self.plain_http,
            ca,
            client_identity,
            mirrors: self.mirrors,
            transfers: self.transfers,
            requests_per_second: self.requests_per_second,
            endpoint: self.endpoint,
            create_repository: self.create_repository,
        }
    }

    /// Of settings of the caller's machine; their certificates are read.
    pub(crate) fn of(name: &str, options: &RegistryOptions) -> Result<Self, Error> {
        let ca = options.ca.as_ref().map(|path| {
            ovenbird_oci::regular_file::read_to_string(path, wire::MAX_RAW as u64, ovenbird_oci::regular_file::Links::Follow).map_err(
                |error| {
                    Error::from_chain(Kind::Configuration, &error)
                        .while_doing(format!("cannot read the certificates of {name} in {}", path.display()))
                },
            )
        });
        Ok(Self {
            plain_http: options.plain_http,
            ca: ca.transpose()?,
            client_identity: options.client_identity.is_some(),
            mirrors: options.mirrors.clone(),
            transfers: options.transfers,
            requests_per_second: options.requests_per_second,
            endpoint: options.endpoint.clone(),
            create_repository: options.create_repository,
        })
    }
}

/// The request without places of the caller's machine: the worker makes its own.
pub(crate) fn without_places(request: &BuildRequest) -> BuildRequest {
    let mut request = request.clone();
    (request.source, request.dockerfile) = (Source::Path(".".into()), DockerfileFrom::Default);
    for context in request.contexts.values_mut() {
        if let ContextSource::Path(_) | ContextSource::Remote(_) = context {
            *context = ContextSource::Path(".".into());
        }
    }
    for spec in &mut request.secrets {
        spec.origin = SecretOrigin::ById;
    }
    for output in &mut request.outputs {
        outputs::forget_place(output);
    }
    request
}
