//! Builds in places that nothing can be streamed to: the source goes by reference, and the worker is on its own but for the report.

use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use ovenbird_engine::Event;
use ovenbird_oci::{Digest, Reference};

use super::{END, Ended, RemoteDriver, STOP, Watch};
use crate::builder::Job;
use crate::error::{Error, Kind};
use crate::launch::{ByReference, Launcher, Pipe};
use crate::naming::Naming;
use crate::report::BuildReport;
use crate::request::{BuildRequest, ContextSource, DockerfileFrom, OutputKind, Source};
use crate::source::{Fetcher, bundle};
use crate::worker::failure::Failure;
use crate::worker::wire::{CallerSide, Errand, Hello, Message as _, Receiver, Sender, ToCaller, ToWorker, WireError};
use crate::worker::{errand, without_places};

impl<L: Launcher> RemoteDriver<L> {
    /// A build whose source goes by reference.
    pub(super) fn run_errand(
        &self,
        request: &BuildRequest,
        mut naming: Naming,
        how: &ByReference,
        job: &Job,
    ) -> Result<BuildReport, Error> {
        errand::refuse(request, &self.launcher.place())?;
        // Where there is no place nothing is sent.
        let pipe = self.launcher.launch(&self.spec, job)?;
        let order = self.errand(request, &mut naming, how, job)?;
        self.send_out(pipe, Box::new(order), job)
    }

    /// What the worker is to do.
    fn errand(&self, request: &BuildRequest, naming: &mut Naming, how: &ByReference, job: &Job) -> Result<Errand, Error> {
        let (policies, now) = (self.settings.tags.clone(), self.environment.now());
        if is_address(request) {
            job.sink.emit(Event::Message { text: format!("the source is fetched {}: {}", self.launcher.place(), shown(&request.source)) });
            return Ok(Errand { request: request.clone(), caller: Some(CallerSide { values: None, policies, now, origin: None }) });
        }
        let repository = repository(request, how)?;
        let fetcher = Fetcher::new(&self.settings, &self.environment);
        let tree = {
            let mut stdin = self.stdin.lock().unwrap_or_else(PoisonError::into_inner);
            fetcher.fetch(request, &mut **stdin, job)?
        };
        let request = &tree.dated(request);
        naming.look_around(request, tree.revision.as_ref(), now);
        let address = bundle::push(&fetcher, &tree, &repository, job)?;
        // Where it is on this machine is nobody's business, but it is the same place each time.
        let own = || tree.contexts.get("context")?.dir.to_str().map(str::to_owned);
        let origin = tree.origin.clone().or_else(own).map(|place| Digest::of(place.as_bytes()).short());
        let mut request = without_places(request);
        for context in request.contexts.values_mut() {
            if matches!(context, ContextSource::Path(_)) {
                *context = ContextSource::Remote(address.clone());
            }
        }
        request.source = Source::Remote(address);
        Ok(Errand { request, caller: Some(CallerSide { values: Some(naming.values().clone()), policies, now, origin }) })
    }

    /// Gives a worker its errand, and hears what comes of it.
    fn send_out(&self, pipe: Pipe, order: Box<Errand>, job: &Job) -> Result<BuildReport, Error> {
        let Pipe { to, from, life } = pipe;
        let (to, mut from, life) = (Sender::new(to), Receiver::new(from), Mutex::new(life));
        let (begun, done) = (AtomicBool::new(false), AtomicBool::new(false));
        let heard = std::thread::scope(|scope| {
            let watch = Watch { job, to: &to, life: &life, begun: &begun, done: &done, stop: STOP };
            scope.spawn(move || watch.run());
            // Who is gone before it has heard everything is seen by who reads.
            let _ = to.send(&ToWorker::Hello(Hello::own())).and_then(|()| to.send(&ToWorker::Errand(order)));
            let heard = hear(&mut from, &begun, job);
            done.store(true, Ordering::SeqCst);
            to.close();
            heard
        });
        let mut life = life.into_inner().unwrap_or_else(PoisonError::into_inner);
        let ended = life.wait(END);
        if ended.is_none() {
            life.kill();
        }
        match heard {
            Ok(report) => {
                life.keep(&report, job)?;
                Ok(report)
            }
            Err(Ended::Failed(error)) => Err(error),
            Err(Ended::Lost(_)) if job.cancel.is_cancelled() => Err(Error::new(Kind::Cancelled, "cancelled")),
            Err(Ended::Lost(error)) => {
                let mut told = Error::from(error).while_doing(format!("the worker {} was lost", self.launcher.place()));
                told.causes.extend(ended);
                Err(told)
            }
        }
    }
}

/// A worker on an errand asks nothing, and sends nothing but what happens.
fn hear<R: Read>(from: &mut Receiver<R>, begun: &AtomicBool, job: &Job) -> Result<BuildReport, Ended> {
    // The Dockerfile is not here: its text comes along.
    let failed = |failure: Failure| Err(Ended::Failed(failure.into_error(("", ""))));
    match from.expect()?.0 {
        ToCaller::Hello(hello) => hello.check()?,
        ToCaller::Failed { failure } => return failed(*failure),
        other => return Err(WireError::Unexpected(other.name()).into()),
    }
    begun.store(true, Ordering::SeqCst);
    loop {
        match from.expect()?.0 {
            ToCaller::Event { event } => job.sink.emit(event),
            ToCaller::Report { report } => return Ok(*report),
            ToCaller::Failed { failure } => return failed(*failure),
            other => return Err(WireError::Unexpected(other.name()).into()),
        }
    }
}

/// Can the worker fetch everything by itself, with nothing of this machine?
fn is_address(request: &BuildRequest) -> bool {
    let source = matches!(&request.source, Source::Remote(url) if errand::is_public(url) && !std::path::Path::new(url.expose()).is_dir());
    let contexts = request.contexts.values().all(|context| match context {
        ContextSource::Remote(url) => errand::is_public(url),
        ContextSource::Path(_) => false,
        ContextSource::Image(_) | ContextSource::Target(_) => true,
    });
    source && contexts && request.dockerfile != DockerfileFrom::Stdin
}

fn shown(source: &Source) -> String {
    if let Source::Remote(url) = source { url.to_string() } else { String::new() }
}

/// Where the source is put: where the settings say, else beside the image.
fn repository(request: &BuildRequest, how: &ByReference) -> Result<Reference, Error> {
    let pushed = request.outputs.iter().filter(|output| output.kind == OutputKind::Registry);
    let mut names = pushed.flat_map(|output| request.names_of(Some(output)));
    let said = how.sources.as_ref().or_else(|| names.next());
    let Some(said) = said else {
        return Err(Error::new(Kind::Usage, "there is no repository for the source of the build, which goes by reference")
            .hint("push the image (-t NAME --push): the source is put beside it")
            .hint("or name a repository in the settings: [prefect] sources = \"HOST/REPOSITORY\""));
    };
    // Variables stand behind the repository.
    let plain = said.split(['{', '@']).next().unwrap_or_default().trim_end_matches(['/', ':', '-', '.', '_']);
    plain.parse::<Reference>().map_err(|error| Error::from(error).while_doing(format!("{said:?} cannot be the repository for the source")))
}
