//! A driver whose builds run in a worker: in a process, in a container, on another machine.
//!
//! The source is fetched here and sent as the ignore files leave it; outputs come back. Images that are kept stay where the worker is.

mod errand;

use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use ovenbird_engine::input::LocalContext;
use ovenbird_engine::{Cancel, Event, OutputFile, PathOrStdout};
use ovenbird_oci::store::Store;
use ovenbird_oci::{archive, beside};

use crate::builder::{Gone, Job};
use crate::docker_engine::DockerEngine;
use crate::driver::{Driver, check, check_names};
use crate::error::{Detail, Error, Kind};
use crate::launch::{Launcher, Life, Pipe, WorkerSpec};
use crate::naming::Naming;
use crate::pieces::Pieces;
use crate::report::{self, BuildReport, Record, Recorder};
use crate::request::{BuildRequest, CacheDest, CacheFrom, ContextSource, Dest, Output, OutputKind, Phase};
use crate::settings::{Environment, Settings};
use crate::source::{Fetcher, SourceTree};
use crate::worker::chunks::{self, Wanted};
use crate::worker::folder::{self, SendError};
use crate::worker::question::Answers;
use crate::worker::wire::{Hello, Order, Receiver, Registry, Sender, ToCaller, ToWorker, WireError};
use crate::worker::without_places;
use crate::workflow::desk::Own;
use crate::workflow::{Bench, Delivered, Draft, Flow, Stand, Standing};

/// How long a worker may take to begin, connecting included.
const BEGIN: Duration = Duration::from_mins(1);

/// How long a cancelled worker may take to stop.
const STOP: Duration = Duration::from_secs(7);

/// How long a worker may take to end after its last word.
const END: Duration = Duration::from_secs(5);

/// Exit code of what was killed.
const KILLED: i32 = 137;

/// How often it is looked whether the build was cancelled.
const LOOK: Duration = Duration::from_millis(20);

/// Runs requests in workers.
pub struct RemoteDriver<L> {
    launcher: L,
    spec: WorkerSpec,
    settings: Settings,
    environment: Environment,
    stdin: Mutex<Box<dyn Read + Send>>,
}

impl<L> std::fmt::Debug for RemoteDriver<L> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RemoteDriver").field("spec", &self.spec).finish_non_exhaustive()
    }
}

impl<L: Launcher> RemoteDriver<L> {
    /// A driver over `launcher`, with the settings of this machine.
    pub fn new(launcher: L, spec: WorkerSpec, settings: &Settings, environment: &Environment, stdin: impl Read + Send + 'static) -> Self {
        let (settings, environment) = (settings.clone(), environment.clone());
        Self { launcher, spec, settings, environment, stdin: Mutex::new(Box::new(stdin)) }
    }

    fn order(&self, request: &BuildRequest, tree: &SourceTree, naming: &Naming, flow: &Flow) -> Result<Order, Error> {
        let registries = self.settings.registries.iter().map(|(name, options)| Ok((name.clone(), Registry::of(name, options)?)));
        Ok(Order {
            request: without_places(request),
            values: naming.values().clone(),
            policies: self.settings.tags.clone(),
            now: self.environment.now(),
            registries: registries.collect::<Result<_, Error>>()?,
            // As text it must be exact, or it is somebody else's.
            origin: tree.origin.clone().or_else(|| tree.contexts.get("context")?.dir.to_str().map(str::to_owned)),
            logins: tree.logins.keys().cloned().collect(),
            git: report::git_of(&request.source, Some(tree)),
            revision: tree.revision.clone(),
            absent: flow.absent(),
            dockerfile_name: tree.dockerfile_name.clone(),
            dockerfile_bytes: tree.dockerfile.len() as u64,
        })
    }

    /// One worker from beginning to end.
    fn attempt(&self, request: &BuildRequest, order: &ToWorker, tree: &SourceTree, flow: &Flow, job: &Job) -> Result<BuildReport, Error> {
        let mut answers = Answers::new(request, Own { flow, tree, job }, &self.settings, &self.environment)?;
        let Pipe { to, from, life } = self.launcher.launch(&self.spec, job)?;
        let (to, mut from, life) = (Sender::new(to), Receiver::new(from), Mutex::new(life));
        let (begun, done) = (AtomicBool::new(false), AtomicBool::new(false));
        let unsent = Mutex::new(None);
        let mut outputs = Outputs::new(&request.outputs, &self.settings, job);
        // On this machine the worker would only have everything twice.
        let (want, wants) = (!self.launcher.has_our_files()).then(mpsc::channel).unzip();
        let outcome = std::thread::scope(|scope| {
            let stop = STOP + flow.longest(Phase::Exit);
            let watch = Watch { job, to: &to, life: &life, begun: &begun, done: &done, stop };
            scope.spawn(move || watch.run());
            if let Some(every) = self.launcher.heartbeat() {
                let (to, done) = (&to, &done);
                scope.spawn(move || beat(every, to, done));
            }
            let (unsent, to) = (&unsent, &to);
            scope.spawn(move || {
                let sending = Sending { order, tree, to, job };
                if let Err(SendError::Read { path, source }) = sending.run(wants.as_ref()) {
                    let error = Error::from_chain(Kind::Source, &source).while_doing(format!("cannot read {path} of the build context"));
                    *unsent.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    to.close();
                }
            });
            // Whoever waits for a word of the worker waits no longer than there is one.
            let outcome = Talk { from: &mut from, to, begun: &begun, want, answers: &mut answers, outputs: &mut outputs, tree, job }.hold();
            done.store(true, Ordering::SeqCst);
            to.close();
            outcome
        });
        let ended = self.ended(outcome, life, job);
        if let Some(error) = unsent.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        let (report, mut life) = ended?;
        outputs.all_whole()?;
        life.keep(&report, job)?;
        Ok(BuildReport { revision: tree.revision.clone(), ..report })
    }

    /// Waits for a worker that has nothing more to say, and tells what came of the build.
    fn ended(
        &self,
        outcome: Result<BuildReport, Ended>,
        life: Mutex<Box<dyn Life>>,
        job: &Job,
    ) -> Result<(BuildReport, Box<dyn Life>), Error> {
        let mut life = life.into_inner().unwrap_or_else(PoisonError::into_inner);
        let was_cancelled = job.cancel.is_cancelled();
        let last_word = matches!(&outcome, Ok(_) | Err(Ended::Failed(_))) && !was_cancelled;
        // Who cancelled, when it was not the caller, is known where the worker is.
        let stopped = matches!(&outcome, Err(Ended::Failed(error)) if error.kind == Kind::Cancelled) && !was_cancelled;
        // So is what killed a step that did not kill itself.
        let killed =
            matches!(&outcome, Err(Ended::Failed(error)) if matches!(error.detail.as_deref(), Some(Detail::Step { code: KILLED, .. })));
        let ended = if last_word && !stopped && !killed && life.settled() { Some(String::new()) } else { life.wait(END) };
        let cause = life.cause().filter(|_| !was_cancelled);
        if ended.is_none() {
            life.kill();
        }
        match outcome {
            Ok(report) => Ok((report, life)),
            Err(Ended::Failed(error)) => Err(match cause {
                Some(cause) if stopped => cause,
                Some(cause) if killed => Error { hints: [error.hints.clone(), cause.hints].concat(), ..error.because(cause.message) },
                _ => error,
            }),
            Err(Ended::Lost(_)) if job.cancel.is_cancelled() => Err(Error::new(Kind::Cancelled, "cancelled")),
            Err(Ended::Lost(error)) => {
                if let Some(cause) = cause {
                    return Err(cause);
                }
                let mut told = Error::from(error).while_doing(format!("the worker {} was lost", self.launcher.place()));
                told.causes.extend(ended);
                Err(told)
            }
        }
    }
}

impl<L: Launcher> Driver for RemoteDriver<L> {
    fn run(&self, request: &BuildRequest, job: &Job) -> Result<BuildReport, Error> {
        let recorder = Arc::new(Recorder::new(job.sink.clone()));
        let job = &Job { sink: recorder.clone(), cancel: job.cancel.clone() };
        let bench = Bench::new(&self.settings, &self.environment);
        // Every plugin is found here, where the user's programs are, before anything is sent.
        let mut flow = Flow::prepare(request, &bench, job)?;
        let mut tree = None;
        let result = self.work(request, &flow, &mut tree, job);
        // What was said here is more than what was said there.
        let seen =
            |record: Record| Record { logs: recorder.logs(), steps: recorder.steps(), container_ids: recorder.containers(), ..record };
        match result {
            Ok(report) => Ok(BuildReport { record: seen(report.record), ..report }),
            Err(mut error) => {
                let record = match error.record.take() {
                    Some(record) => *record,
                    None => Self::conclude(request, &mut flow, tree.as_ref(), &error, job),
                };
                Err(Error { record: Some(Box::new(seen(record))), ..error })
            }
        }
    }
}

impl<L: Launcher> RemoteDriver<L> {
    fn work(&self, request: &BuildRequest, flow: &Flow, kept: &mut Option<SourceTree>, job: &Job) -> Result<BuildReport, Error> {
        let mut naming = Naming::new(request, &self.settings.tags)?;
        let probed = naming.probe(request)?.request;
        check(&probed)?;
        if let Some(how) = self.launcher.by_reference() {
            return self.run_errand(request, naming, &how, job);
        }
        if !flow.has(Phase::PreBuild) {
            check_names(&probed, &naming)?;
        }
        if !self.launcher.has_our_files() {
            refuse(request, &self.launcher.place())?;
        }
        let tree = {
            let mut stdin = self.stdin.lock().unwrap_or_else(PoisonError::into_inner);
            Fetcher::new(&self.settings, &self.environment).fetch(request, &mut **stdin, job)?
        };
        let tree = &*kept.insert(tree);
        let request = &tree.dated(request);
        naming.look_around(request, tree.revision.as_ref(), self.environment.now());
        let order = ToWorker::Build(Box::new(self.order(request, tree, &naming, flow)?));
        match self.attempt(request, &order, tree, flow, job) {
            // The worker removed what was damaged.
            Err(error) if error.is_damage() && !request.outputs.iter().any(Output::uses_stdout) => {
                let message = format!("{error}; the image is built again");
                job.sink.emit(Event::Warning { code: "corrupt-blob".into(), message, line: None });
                self.attempt(request, &order, tree, flow, job)
            }
            done => done,
        }
    }

    /// Runs the exit plugins of a build that no worker has run them for, and says how it went.
    fn conclude(request: &BuildRequest, flow: &mut Flow, tree: Option<&SourceTree>, error: &Error, job: &Job) -> Record {
        let cancelled = error.kind == Kind::Cancelled || job.cancel.is_cancelled();
        if flow.has(Phase::Exit) {
            flow.standing = if cancelled { Standing::Cancelled } else { Standing::Failed(flow.mask(error.to_string())) };
            let draft = &mut tree.map_or_else(|| Draft::unread(request), |tree| Draft::new(request, tree));
            // What was cancelled is the build.
            let job = &Job { sink: job.sink.clone(), cancel: Cancel::default() };
            let delivered = &Delivered::default();
            if let Err(error) = flow.run(Phase::Exit, Stand { draft, tree, image: None, delivered, shop: &Gone, job }) {
                job.sink.emit(Event::Warning { code: "plugin".into(), message: error.to_string(), line: None });
            }
        }
        let (started, finished) = flow.times();
        let mut record = Record {
            started,
            finished,
            image_name: request.names.first().map(|name| flow.mask(name.clone())),
            git: report::git_of(&request.source, tree),
            dockerfile: tree
                .map(|tree| report::DockerfileReport { name: tree.dockerfile_name.clone(), text: flow.mask(tree.dockerfile.clone()) }),
            plugins: flow.reports.clone(),
            ..Record::default()
        };
        record.conclude(Some(error), cancelled);
        record
    }
}

/// What cannot be had from a worker that does not see this machine's files, by name.
fn refuse(request: &BuildRequest, place: &str) -> Result<(), Error> {
    let no = |option: &str, hint: &str| Err(Error::refused(option, format!("the build runs {place}")).hint(hint));
    if !request.ssh.is_empty() {
        return no("--ssh", "build with --on here");
    }
    if request.cache_from.iter().any(|from| matches!(from, CacheFrom::Local { .. })) {
        return no("--cache-from type=local", "use type=registry, or build with --on here");
    }
    if request.cache_to.iter().any(|to| matches!(to.dest, CacheDest::Local { .. })) {
        return no("--cache-to type=local", "use type=registry, or build with --on here");
    }
    let layouts =
        request.contexts.values().any(|context| matches!(context, ContextSource::Image(name) if name.starts_with("oci-layout://")));
    if layouts {
        return no("--build-context with oci-layout://", "push the image to a registry and use docker-image://, or build with --on here");
    }
    Ok(())
}

/// Sends everything that comes before the build.
struct Sending<'a> {
    order: &'a ToWorker,
    tree: &'a SourceTree,
    to: &'a Sender,
    job: &'a Job,
}

impl Sending<'_> {
    /// `wants`: what the worker says that it lacks, where it may keep what came before.
    fn run(&self, wants: Option<&mpsc::Receiver<Wanted>>) -> Result<(), SendError> {
        self.message(&ToWorker::Hello(Hello::own()))?;
        self.message(self.order)?;
        self.bulk(|out| out.write_all(self.tree.dockerfile.as_bytes()).and_then(|()| out.flush()).map_err(SendError::Pipe))?;
        for (name, context) in &self.tree.contexts {
            let ignore = context.ignore.written().collect();
            self.message(&ToWorker::Context { name: name.clone(), ignore, offered: wants.is_some() })?;
            match wants {
                None => self.bulk(|out| folder::send(&context.dir, context.ignore.clone(), out)).map(drop)?,
                Some(wants) => self.offer(name, context, wants)?,
            }
        }
        self.message(&ToWorker::Begin)
    }

    fn message(&self, message: &ToWorker) -> Result<(), SendError> {
        self.to.send(message).map_err(SendError::Pipe)
    }

    /// How many bytes it were.
    fn bulk(&self, write: impl FnOnce(&mut dyn Write) -> Result<(), SendError>) -> Result<u64, SendError> {
        let mut sent = 0;
        let mut pieces = Pieces::new(|piece| {
            sent += piece.len() as u64;
            self.to.send_with(&ToWorker::Data { bytes: piece.len() }, piece)
        });
        write(&mut pieces)?;
        pieces.flush().map_err(SendError::Pipe)?;
        drop(pieces);
        self.message(&ToWorker::End)?;
        Ok(sent)
    }

    /// Says what a folder is made of, twice: the list of its chunks in chunks, and these; and sends what the worker lacks.
    fn offer(&self, name: &str, context: &LocalContext, wants: &mpsc::Receiver<Wanted>) -> Result<(), SendError> {
        let lost = |_| SendError::Pipe(io::ErrorKind::BrokenPipe.into());
        let offer = folder::Offer::of(&context.dir, &context.ignore)?;
        let list = offer.to_bytes();
        let top = chunks::cut(&list);
        let mut sent = self.bulk(|out| out.write_all(&top.to_bytes()).map_err(SendError::Pipe))?;
        let wanted = wants.recv().map_err(lost)?;
        sent += self.bulk(|out| chunks::Selector::new(&top, &wanted, 0, out).write_all(&list).map_err(SendError::Pipe))?;
        let wanted = wants.recv().map_err(lost)?;
        sent += self.bulk(|out| offer.send(&context.dir, &context.ignore, &wanted, out))?;
        let text = format!("{name}: sent {sent} bytes for {} bytes; the worker had the rest", offer.bytes());
        self.job.sink.emit(Event::Message { text });
        Ok(())
    }
}

/// How a conversation ends without a report.
enum Ended {
    /// The worker said why, or this end cannot go on.
    Failed(Error),
    /// The pipe did.
    Lost(WireError),
}

impl From<WireError> for Ended {
    fn from(error: WireError) -> Self {
        Self::Lost(error)
    }
}

/// The caller's part of a conversation.
struct Talk<'a, 'b, R> {
    from: &'a mut Receiver<R>,
    to: &'a Sender,
    /// Has the worker said a word?
    begun: &'a AtomicBool,
    /// Who sends the contexts hears here what the worker lacks, and that there is no worker any more.
    want: Option<mpsc::Sender<Wanted>>,
    answers: &'a mut Answers<'b>,
    outputs: &'a mut Outputs<'b>,
    tree: &'a SourceTree,
    job: &'a Job,
}

impl<R: Read> Talk<'_, '_, R> {
    fn hold(self) -> Result<BuildReport, Ended> {
        let Self { from, to, begun, want, answers, outputs, tree, job } = self;
        match from.expect()?.0 {
            ToCaller::Hello(hello) => hello.check()?,
            ToCaller::Failed { failure } => return Err(Ended::Failed(failure.into_error(("", "")))),
            other => return Err(WireError::Unexpected(crate::worker::wire::Message::name(&other)).into()),
        }
        begun.store(true, Ordering::SeqCst);
        loop {
            let (message, raw) = from.expect()?;
            match message {
                ToCaller::Event { event } => job.sink.emit(event),
                ToCaller::Ask { id, question } => {
                    let (answer, bytes) = answers.answer(question);
                    // A worker that is gone is seen at the next message.
                    let _ = to.send_with(&ToWorker::Answer { id, answer, bytes: bytes.len() }, &bytes);
                }
                ToCaller::Want { .. } => {
                    let Some(want) = &want else { return Err(WireError::Unexpected("want").into()) };
                    // Nobody waits when the folder could not be read.
                    let _ = want.send(Wanted::of_bytes(raw));
                }
                ToCaller::Data { output, .. } => outputs.piece(output, &raw).map_err(Ended::Failed)?,
                ToCaller::End { output } => outputs.end(output).map_err(Ended::Failed)?,
                ToCaller::Report { report } => return Ok(*report),
                ToCaller::Failed { failure } => {
                    return Err(Ended::Failed(failure.into_error((&tree.dockerfile_name, &tree.dockerfile))));
                }
                other @ (ToCaller::Hello(_) | ToCaller::Busy) => {
                    return Err(WireError::Unexpected(crate::worker::wire::Message::name(&other)).into());
                }
            }
        }
    }
}

/// Says now and then that the caller lives.
fn beat(every: Duration, to: &Sender, done: &AtomicBool) {
    let mut last = Instant::now();
    while !done.load(Ordering::SeqCst) {
        std::thread::sleep(LOOK);
        if last.elapsed() >= every {
            last = Instant::now();
            // A worker that is gone is seen by who reads.
            let _ = to.send(&ToWorker::Alive);
        }
    }
}

/// Tells a worker that the build was cancelled, and ends one that does not begin or does not stop.
struct Watch<'a> {
    job: &'a Job,
    to: &'a Sender,
    life: &'a Mutex<Box<dyn Life>>,
    begun: &'a AtomicBool,
    done: &'a AtomicBool,
    /// How long the worker may take to stop, exit plugins included.
    stop: Duration,
}

impl Watch<'_> {
    fn run(&self) {
        let kill = || self.life.lock().unwrap_or_else(PoisonError::into_inner).kill();
        let start = Instant::now();
        while !self.done.load(Ordering::SeqCst) {
            if self.job.cancel.is_cancelled() {
                break;
            }
            if !self.begun.load(Ordering::SeqCst) && start.elapsed() > BEGIN {
                return kill();
            }
            std::thread::sleep(LOOK);
        }
        if self.done.load(Ordering::SeqCst) {
            return;
        }
        // Whoever sends a context holds the pipe for a moment only, but one that is stuck holds it for ever.
        std::thread::scope(|scope| {
            scope.spawn(|| self.to.send(&ToWorker::Cancel));
            let end = Instant::now() + self.stop;
            while !self.done.load(Ordering::SeqCst) && Instant::now() < end {
                std::thread::sleep(LOOK);
            }
            if !self.done.load(Ordering::SeqCst) {
                kill();
            }
        });
    }
}

/// Where outputs go on this machine.
struct Outputs<'a> {
    wanted: &'a [Output],
    settings: &'a Settings,
    job: &'a Job,
    /// By place in the request.
    open: Vec<Option<Receiving>>,
    whole: Vec<bool>,
}

enum Receiving {
    File(OutputFile),
    /// Somebody who reads a stream to its end.
    Stream {
        pipe: io::PipeWriter,
        reads: std::thread::JoinHandle<Result<(), Error>>,
    },
}

impl<'a> Outputs<'a> {
    fn new(wanted: &'a [Output], settings: &'a Settings, job: &'a Job) -> Self {
        let whole = wanted.iter().map(|output| matches!(output.kind, OutputKind::Image | OutputKind::Registry | OutputKind::CacheOnly));
        Self { wanted, settings, job, open: wanted.iter().map(|_| None).collect(), whole: whole.collect() }
    }

    fn all_whole(&self) -> Result<(), Error> {
        if self.whole.iter().all(|whole| *whole) {
            return Ok(());
        }
        Err(Error::new(Kind::Driver, "the worker reported success and did not send every output"))
    }

    fn receiving(&mut self, index: usize) -> Result<&mut Receiving, Error> {
        let unasked = || Error::new(Kind::Driver, format!("the worker sent output {index}, which was not asked for"));
        let wanted = self.wanted.get(index).filter(|_| !self.whole[index]).ok_or_else(unasked)?;
        let slot = &mut self.open[index];
        match slot {
            Some(open) => Ok(open),
            None => Ok(slot.insert(open(&wanted.kind, self.settings, self.job)?)),
        }
    }

    fn piece(&mut self, index: usize, bytes: &[u8]) -> Result<(), Error> {
        let written = match self.receiving(index)? {
            Receiving::File(file) => file.write_all(bytes),
            Receiving::Stream { pipe, .. } => pipe.write_all(bytes),
        };
        let Err(error) = written else { return Ok(()) };
        // Who reads the stream knows better what is wrong.
        if let Some(Some(Receiving::Stream { pipe, reads })) = self.open.get_mut(index).map(Option::take) {
            drop(pipe);
            reads.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Err(cannot_write(&error, place_of(&self.wanted[index].kind)))
    }

    fn end(&mut self, index: usize) -> Result<(), Error> {
        // Without bytes: the engine that built it is the one that was to get it.
        let is_there = self.open.get(index).is_some_and(Option::is_none) && self.wanted[index].kind == OutputKind::Load;
        if !is_there {
            self.receiving(index)?;
        }
        match self.open[index].take() {
            Some(Receiving::File(file)) => file.finish().map_err(|error| cannot_write(&error, place_of(&self.wanted[index].kind)))?,
            Some(Receiving::Stream { pipe, reads }) => {
                drop(pipe);
                reads.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            }
            None => {}
        }
        self.whole[index] = true;
        Ok(())
    }
}

fn cannot_write(error: &io::Error, to: Option<&Path>) -> Error {
    let what = to.map_or("the output".to_owned(), |path| path.display().to_string());
    Error::from_chain(Kind::Configuration, error).while_doing(format!("cannot write {what}"))
}

/// Where on this machine an output goes.
fn place_of(kind: &OutputKind) -> Option<&Path> {
    match kind {
        OutputKind::OciTar(Dest::Path(path)) | OutputKind::DockerTar(Dest::Path(path)) | OutputKind::Tar(Dest::Path(path)) => Some(path),
        OutputKind::OciDir(dir) | OutputKind::Local(dir) => Some(dir),
        _ => None,
    }
}

fn open(kind: &OutputKind, settings: &Settings, job: &Job) -> Result<Receiving, Error> {
    let file = |dest: &Dest| {
        let to = match dest {
            Dest::Path(path) => PathOrStdout::Path(path.clone()),
            Dest::Stdout => PathOrStdout::Stdout,
        };
        OutputFile::create(&to).map(Receiving::File).map_err(|error| cannot_write(&error, place_of(kind)))
    };
    let stream = |read: Box<dyn FnOnce(io::PipeReader) -> Result<(), Error> + Send>| {
        let (from, pipe) = io::pipe().map_err(|error| cannot_write(&error, None))?;
        Ok(Receiving::Stream { pipe, reads: std::thread::spawn(move || read(from)) })
    };
    match kind {
        OutputKind::OciTar(dest) | OutputKind::DockerTar(dest) | OutputKind::Tar(dest) => file(dest),
        OutputKind::OciDir(dir) => {
            let dir = dir.clone();
            stream(Box::new(move |mut from| layout(&mut from, &dir)))
        }
        OutputKind::Local(dir) => {
            let (dir, sink) = (dir.clone(), job.sink.clone());
            stream(Box::new(move |from| {
                if let Some(skipped) = files(from, &dir)? {
                    sink.emit(Event::Warning { code: "skipped-devices".into(), message: skipped, line: None });
                }
                Ok(())
            }))
        }
        OutputKind::Load => {
            let (docker, job) = (DockerEngine::new(&settings.docker)?, job.clone());
            stream(Box::new(move |mut from| {
                job.sink.emit(Event::Message { text: format!("loading into the Docker Engine at {docker}") });
                docker.load(&job.cancel, |out| io::copy(&mut from, out).map(drop))?;
                Ok(())
            }))
        }
        OutputKind::Image | OutputKind::Registry | OutputKind::CacheOnly => {
            Err(Error::new(Kind::Driver, "the worker sent an output that stays where it is"))
        }
    }
}

/// An image as a layout in a folder: through a store of its own, so that every blob is checked.
fn layout(from: &mut io::PipeReader, dir: &Path) -> Result<(), Error> {
    std::fs::create_dir_all(dir).map_err(|error| cannot_write(&error, Some(dir)))?;
    let aside = beside::folder_in(dir).map_err(|error| cannot_write(&error, Some(dir)))?;
    let store = Store::open(aside.path())?;
    for (target, names) in archive::read(&store, from)? {
        archive::write_oci_dir(&store, &target, &names, dir)?;
    }
    Ok(())
}

/// Files in a folder. Says which devices could not be made.
fn files(from: io::PipeReader, dir: &Path) -> Result<Option<String>, Error> {
    std::fs::create_dir_all(dir).map_err(|error| cannot_write(&error, Some(dir)))?;
    beside::clear(dir);
    let aside = beside::folder_in(dir).map_err(|error| cannot_write(&error, Some(dir)))?;
    let arrived = folder::receive(from, aside.path());
    let (tree, owners) =
        arrived.map_err(|error| Error::new(Kind::Driver, "the files of the image did not arrive").because(error.of_archive()))?;
    let mut devices = vec![];
    for (path, owner) in &owners {
        if owner.device().is_some() {
            std::fs::remove_file(aside.path().join(path)).map_err(|error| cannot_write(&error, Some(dir)))?;
            devices.push(path);
        }
    }
    ovenbird_engine::export::output::move_into(&tree, dir).map_err(|error| cannot_write(&error, Some(dir)))?;
    let Some(first) = devices.first() else { return Ok(None) };
    Ok(Some(format!(
        "{} device(s) of the image are not in {}, for only root can make them: {}; type=tar keeps them",
        devices.len(),
        dir.display(),
        Path::new(first).display()
    )))
}
