//! Runs one request from source to report.

use std::io::Read;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use ovenbird_engine::trace::Trace;
use ovenbird_engine::{Cancel, Event};
use ovenbird_oci::publish::{TagClass, Target};
use ovenbird_oci::registry::Breaks;
use ovenbird_oci::{Digest, Reference};

use crate::builder::{EngineBuilder, Image, Job, VERSION_LABEL};
use crate::error::{Error, Kind};
use crate::naming::{Named, Naming, TagPolicies, Version};
use crate::report::{self, BuildReport, Decision, PlatformReport, Record, Recorder, Timings};
use crate::request::tag::Values;
use crate::request::{BuildRequest, Dest, Lookup, Output, OutputKind, Phase};
use crate::source::{Fetcher, SourceTree};
use crate::workflow::{Bench, Delivered, Draft, Flow, Stand, Standing, Workshop};

/// What doors see: a request in, events beside, a report out. Several may run at once.
pub trait Driver: Sync {
    /// Runs the request. Everything that was asked for is done when it returns, or nothing after the failure was.
    fn run(&self, request: &BuildRequest, job: &Job) -> Result<BuildReport, Error>;
}

/// Runs requests in this process.
pub struct LocalDriver<B> {
    builder: B,
    sources: Fetcher,
    stdin: Mutex<Box<dyn Read + Send>>,
    policies: TagPolicies,
    now: i64,
    given: Mutex<Option<Given>>,
    bench: Bench,
}

/// What somebody else has found out for a driver: the caller of a worker.
#[derive(Debug)]
pub(crate) struct Given {
    /// The source.
    pub(crate) tree: SourceTree,
    /// What the variables in names stand for.
    pub(crate) values: Values,
}

impl<B> std::fmt::Debug for LocalDriver<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LocalDriver").field("sources", &self.sources).finish_non_exhaustive()
    }
}

/// An image that need not be built.
struct Found {
    image: Image,
    decision: Decision,
    /// Where it is in a registry already.
    published: Option<Reference>,
}

/// How far a build came.
#[derive(Default)]
struct Work {
    tree: Option<Arc<SourceTree>>,
    /// What the variables in names stand for, if somebody else found that out.
    values: Option<Values>,
    draft: Option<Draft>,
    image: Option<Image>,
    delivered: Delivered,
    /// Files that plugins added live as long.
    added: Vec<ovenbird_oci::beside::Folder>,
}

impl<B: Workshop> LocalDriver<B> {
    /// A driver over `builder`, whose sources come through `sources` and from `stdin`.
    pub fn new(builder: B, sources: impl Into<Fetcher>, stdin: impl Read + Send + 'static) -> Self {
        let sources = sources.into();
        let bench = Bench::bare(sources.temp());
        Self {
            builder,
            sources,
            stdin: Mutex::new(Box::new(stdin)),
            policies: TagPolicies::default(),
            now: 0,
            given: Mutex::default(),
            bench,
        }
    }

    /// With what plugins are run with.
    #[must_use]
    pub fn with_plugins(self, bench: Bench) -> Self {
        Self { bench, ..self }
    }

    /// With these tag policies, at this time (seconds since 1970).
    #[must_use]
    pub fn with_names(self, policies: TagPolicies, now: i64) -> Self {
        Self { policies, now, ..self }
    }

    /// With a source that is here already, for one build.
    #[must_use]
    pub(crate) fn with_given(self, given: Given) -> Self {
        Self { given: Mutex::new(Some(given)), ..self }
    }

    /// The builder.
    pub fn builder(&self) -> &B {
        &self.builder
    }

    /// Looks for an image of the same content, here and then in the registries of its names.
    fn find(&self, names: &[Reference], request: &BuildRequest, lookup: Lookup, job: &Job) -> Result<Option<Found>, Error> {
        let say = |text: String| job.sink.emit(Event::Message { text });
        for name in names {
            if let Some(image) = self.builder.find(name)? {
                say(format!("{} is on this machine: nothing is built", name.familiar()));
                return Ok(Some(Found { image, decision: Decision::Local, published: None }));
            }
        }
        if lookup == Lookup::Local {
            return Ok(None);
        }
        // Who only pushes needs no layers here.
        let whole = request.outputs.is_empty() || request.outputs.iter().any(|output| output.kind != OutputKind::Registry);
        for name in names {
            match self.builder.fetch(name, whole, job) {
                Ok(Some(image)) => {
                    say(format!("{} is in the registry: nothing is built", name.familiar()));
                    return Ok(Some(Found { image, decision: Decision::Registry, published: Some(name.clone()) }));
                }
                Ok(None) => {}
                Err(error) if error.kind == Kind::Cancelled || job.cancel.is_cancelled() => return Err(error),
                // A build is the way out whatever the registry's trouble is.
                Err(error) => {
                    let message = format!("cannot look for {} in the registry: {error}; the image is built", name.familiar());
                    job.sink.emit(Event::Warning { code: "if-needed".into(), message, line: None });
                }
            }
        }
        Ok(None)
    }

    /// The source, and what the variables in names stand for, if somebody else found that out.
    fn fetch(&self, request: &BuildRequest, job: &Job) -> Result<(SourceTree, Option<Values>), Error> {
        if let Some(Given { tree, values }) = self.given.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take() {
            return Ok((tree, Some(values)));
        }
        let mut stdin = self.stdin.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        Ok((self.sources.fetch(request, &mut **stdin, job)?, None))
    }

    /// The names, with all that is known of their variables before the content id.
    fn looked(&self, mut naming: Naming, request: &BuildRequest, work: &mut Work) -> Naming {
        match work.values.take() {
            Some(values) => naming.set_values(values),
            None => naming.look_around(request, work.tree.as_ref().and_then(|tree| tree.revision.as_ref()), self.now),
        }
        naming
    }

    /// All that can be known of the names before the build. Gives the content id when anything asks for it.
    fn name(&self, naming: &mut Naming, tree: &SourceTree, request: &BuildRequest, job: &Job) -> Result<Option<Digest>, Error> {
        if !naming.has_id() {
            return Ok(None);
        }
        let id = self.builder.identify(tree, request, job)?.id;
        naming.set_id(&id.hex());
        Ok(Some(id))
    }

    /// The names of a built image.
    fn name_built(&self, naming: &mut Naming, image: &Image, request: &BuildRequest) -> Result<Named, Error> {
        if naming.has_labels() {
            naming.set_labels(self.builder.labels(image)?);
        }
        naming.after_build(request)
    }

    /// Takes out the names that follow the newest version, where they are at a newer one than this image.
    fn hold_back(&self, targets: &mut Vec<Target>, version: Option<&Version>, image: &Image, job: &Job) -> Result<(), Error> {
        if !targets.iter().any(|target| target.class == TagClass::Floating) {
            return Ok(());
        }
        let labelled = match version {
            Some(_) => None,
            None => self.builder.labels(image)?.get(VERSION_LABEL).and_then(|text| Version::parse(text)),
        };
        let Some(version) = version.or(labelled.as_ref()) else { return Ok(()) };
        let warn = |message| job.sink.emit(Event::Warning { code: "floating-tag".into(), message, line: None });
        let mut kept = vec![];
        for target in std::mem::take(targets) {
            let name = target.reference.familiar();
            let overtaken = match target.class {
                TagClass::Floating => self.builder.overtaken(&target.reference, version, job),
                TagClass::Unique | TagClass::Primary => Ok(None),
            };
            match overtaken {
                Ok(Some(newer)) => warn(format!("{name} stays at {newer}: it moves forward only, and this image is {version}")),
                Ok(None) => kept.push(target),
                Err(error) if error.kind == Kind::Cancelled => return Err(error),
                Err(error) => {
                    warn(format!("cannot see which version {name} is at, so it moves to {version}: {error}"));
                    kept.push(target);
                }
            }
        }
        *targets = kept;
        Ok(())
    }

    fn deliver(&self, image: &Image, named: &Named, published: Option<&Reference>, job: &Job) -> Result<(Delivered, Breaks), Error> {
        let (mut given, mut publish) = (vec![], vec![]);
        let request = &named.request;
        let keep = Output::new(OutputKind::Image);
        let outputs = if request.outputs.is_empty() { std::slice::from_ref(&keep) } else { &request.outputs };
        for output in outputs {
            if job.cancel.is_cancelled() {
                return Err(Error::new(Kind::Cancelled, "the build was cancelled"));
            }
            let targets = named.targets(output)?;
            let names: Vec<Reference> = targets.iter().map(|target| target.reference.clone()).collect();
            match output.kind {
                OutputKind::Image | OutputKind::Registry | OutputKind::Load => {
                    self.builder.name(image, &names)?;
                    given.extend(names.iter().map(ToString::to_string).filter(|n| !given.contains(n)).collect::<Vec<_>>());
                }
                _ => {}
            }
            if output.kind == OutputKind::Registry {
                let mut missing: Vec<Target> = targets.into_iter().filter(|target| Some(&target.reference) != published).collect();
                self.hold_back(&mut missing, named.version.as_ref(), image, job)?;
                publish.extend(missing);
            } else {
                self.builder.export(image, &output.kind, &names, job)?;
            }
        }
        // All at once, and last: nobody sees an image of a build that failed.
        let breaks = if publish.is_empty() { Breaks::default() } else { self.builder.publish(image, &publish, job)? };
        Ok((Delivered { names: given, pushed: publish.into_iter().map(|to| to.reference).collect() }, breaks))
    }

    /// Fetches the source and has the pre_build plugins change it; afterwards nothing changes any more.
    fn prepare(&self, request: &BuildRequest, flow: &mut Flow, work: &mut Work, job: &Job) -> Result<BuildRequest, Error> {
        let (mut tree, values) = self.fetch(request, job)?;
        work.values = values;
        let draft = work.draft.insert(Draft::new(&tree.dated(request), &tree));
        let delivered = &Delivered::default();
        let stand = Stand { draft, tree: Some(&tree), image: None, delivered, shop: &self.builder, job };
        let changed = flow.run(Phase::PreBuild, stand).and_then(|()| draft.clone().freeze(&mut tree, &self.bench.temp));
        work.tree = Some(Arc::new(tree));
        let (request, added) = changed?;
        work.added = added;
        Ok(request)
    }

    fn phase(&self, phase: Phase, flow: &mut Flow, work: &mut Work, job: &Job) -> Result<(), Error> {
        if !flow.has(phase) {
            return Ok(());
        }
        let Some(draft) = &mut work.draft else { return Ok(()) };
        let Work { tree, image, delivered, .. } = work;
        flow.run(phase, Stand { draft, tree: tree.as_deref(), image: image.as_mut(), delivered, shop: &self.builder, job })
    }

    /// Runs the exit plugins, whatever happened. What they fail at never hides why the build failed.
    fn conclude(&self, flow: &mut Flow, work: &mut Work, request: &BuildRequest, failed: Option<&Error>, job: &Job) -> Option<Error> {
        if !flow.has(Phase::Exit) {
            return None;
        }
        flow.standing = match failed {
            None => Standing::Well,
            Some(error) if error.kind == Kind::Cancelled || job.cancel.is_cancelled() => Standing::Cancelled,
            Some(error) => Standing::Failed(flow.mask(error.to_string())),
        };
        work.draft.get_or_insert_with(|| Draft::unread(request));
        // What was cancelled is the build.
        let job = &Job { sink: job.sink.clone(), cancel: Cancel::default() };
        let error = self.phase(Phase::Exit, flow, work, job).err()?;
        if failed.is_some() {
            job.sink.emit(Event::Warning { code: "plugin".into(), message: error.to_string(), line: None });
            return None;
        }
        Some(error)
    }
}

impl LocalDriver<EngineBuilder> {
    /// What [`Driver::run`] would run, and why, one trace a platform; see [`EngineBuilder::plan`].
    pub fn plan(&self, request: &BuildRequest, job: &Job) -> Result<Vec<Trace>, Error> {
        let mut flow = Flow::prepare(request, &self.bench, job)?;
        let mut work = Work::default();
        let request = &self.prepare(request, &mut flow, &mut work, job)?;
        let mut naming = self.looked(Naming::new(request, &self.policies)?, request, &mut work);
        let Some(tree) = &work.tree else { return Ok(vec![]) };
        self.name(&mut naming, tree, request, job)?;
        self.builder.plan(tree, &naming.before_build(request)?.request, job)
    }
}

/// Does the output go where nothing can be taken back: to standard output, a pipe or a device?
fn is_streamed(output: &Output) -> bool {
    match &output.kind {
        OutputKind::OciTar(Dest::Path(path)) | OutputKind::DockerTar(Dest::Path(path)) | OutputKind::Tar(Dest::Path(path)) => {
            std::fs::metadata(path).is_ok_and(|meta| !meta.is_file())
        }
        _ => output.uses_stdout(),
    }
}

/// Everything about the request that can be wrong before any work is done.
pub(crate) fn check(request: &BuildRequest) -> Result<(), Error> {
    if request.version != crate::request::VERSION {
        return Err(Error::new(Kind::Usage, format!("build request version {} is not supported", request.version)));
    }
    request.references(None)?;
    request.source_date_epoch()?;
    if request.force && request.if_needed.is_none() {
        return Err(Error::new(Kind::Usage, "--force goes with --if-needed: without it, every build is made"));
    }
    if request.outputs.iter().filter(|o| o.uses_stdout()).count() > 1 {
        return Err(Error::new(Kind::Usage, "several outputs go to standard output").hint("give all but one of them a file with dest=FILE"));
    }
    request.limits.check().and_then(|()| request.check_hostname()).map_err(|wrong| Error::from_chain(Kind::Usage, &wrong))
}

/// Are there the names that are asked for? Plugins may give some first.
pub(crate) fn check_names(request: &BuildRequest, naming: &Naming) -> Result<(), Error> {
    for output in &request.outputs {
        if output.kind == OutputKind::Registry && request.references(Some(output))?.is_empty() {
            return Err(
                Error::new(Kind::Usage, "there is nothing to push to: the image has no name").hint("name it: -t REGISTRY/REPOSITORY:TAG")
            );
        }
    }
    if request.if_needed.is_some() && !naming.has_id() {
        return Err(Error::new(Kind::Usage, "--if-needed finds an image by a name with {id} in it, and none was given")
            .hint("add one: -t NAME:{id}"));
    }
    Ok(())
}

impl<B: Workshop> Driver for LocalDriver<B> {
    fn run(&self, request: &BuildRequest, job: &Job) -> Result<BuildReport, Error> {
        let recorder = Arc::new(Recorder::new(job.sink.clone()));
        let job = &Job { sink: recorder.clone(), cancel: job.cancel.clone() };
        let mut flow = Flow::prepare(request, &self.bench, job)?;
        let mut work = Work::default();
        let mut result = self.work(request, &mut flow, &mut work, job);
        if let Some(error) = self.conclude(&mut flow, &mut work, request, result.as_ref().err(), job) {
            result = Err(error);
        }
        let mut record = self.record(request, &flow, &work);
        (record.logs, record.steps, record.container_ids) = (recorder.logs(), recorder.steps(), recorder.containers());
        record.conclude(result.as_ref().err(), job.cancel.is_cancelled());
        match result {
            Ok(report) => Ok(BuildReport { record, ..report }),
            Err(error) => Err(Error { record: Some(Box::new(record)), ..error }),
        }
    }
}

impl<B: Workshop> LocalDriver<B> {
    /// What is known of a build when it is over, but for what it said.
    fn record(&self, request: &BuildRequest, flow: &Flow, work: &Work) -> Record {
        let (started, finished) = flow.times();
        let asked = work.draft.as_ref().map_or(request, |draft| &draft.request);
        let describe = |image: &Image| self.builder.describe(image).unwrap_or_default();
        let images = work.image.as_ref().map(describe).unwrap_or_default();
        let bases = work.image.iter().flat_map(|image| &image.bases);
        Record {
            started,
            finished,
            image_name: work.delivered.names.first().or(asked.names.first()).map(|name| flow.mask(name.clone())),
            git: report::git_of(&asked.source, work.tree.as_deref()),
            dockerfile: work
                .tree
                .as_ref()
                .map(|tree| report::DockerfileReport { name: tree.dockerfile_name.clone(), text: flow.mask(tree.dockerfile.clone()) }),
            plugins: flow.reports.clone(),
            images: images.iter().map(|image| report::image_of(image, &work.delivered)).collect(),
            base_images: bases.map(report::base_of).collect(),
            ..Record::default()
        }
    }

    fn work(&self, request: &BuildRequest, flow: &mut Flow, work: &mut Work, job: &Job) -> Result<BuildReport, Error> {
        let checked = |request: &BuildRequest, is_final: bool| {
            let naming = Naming::new(request, &self.policies)?;
            let probed = naming.probe(request)?.request;
            check(&probed)?;
            if is_final {
                check_names(&probed, &naming)?;
            }
            Ok::<_, Error>(naming)
        };
        checked(request, !flow.has(Phase::PreBuild))?;
        let mut timings = Timings::default();
        let start = Instant::now();
        let request = &self.prepare(request, flow, work, job)?;
        // Plugins may have changed the names.
        let mut naming = self.looked(checked(request, true)?, request, work);
        timings.source = start.elapsed();
        let start = Instant::now();
        let Some(tree) = work.tree.clone() else { return Err(Error::new(Kind::Bug, "there is no source")) };
        let content_id = self.name(&mut naming, &tree, request, job)?;
        let before = naming.before_build(request)?.request;
        let mut found = match request.if_needed {
            Some(lookup) if !request.force => self.find(&naming.by_content(request)?, request, lookup, job)?,
            _ => None,
        };
        timings.build = start.elapsed();
        let mut once = |timings: &mut Timings, flow: &mut Flow, work: &mut Work| {
            let start = Instant::now();
            let Found { image, decision, published } = match found.take() {
                Some(found) => found,
                None => Found { image: self.builder.build(&tree, &before, job)?, decision: Decision::Built, published: None },
            };
            timings.build += start.elapsed();
            let start = Instant::now();
            work.image = Some(image);
            self.phase(Phase::PrePublish, flow, work, job)?;
            let Some(image) = &work.image else { return Err(Error::new(Kind::Bug, "there is no image")) };
            let delivered =
                self.name_built(&mut naming, image, request).and_then(|named| self.deliver(image, &named, published.as_ref(), job));
            timings.export += start.elapsed();
            let (delivered, breaks) = delivered?;
            work.delivered = delivered;
            let start = Instant::now();
            // The image is what was asked for; the cache comes after it.
            let cached = match decision {
                Decision::Built => self.builder.export_caches(image, &tree, &before, &work.delivered.pushed, job),
                _ => Ok(()),
            };
            timings.export += start.elapsed();
            cached.map(|()| (decision, breaks))
        };
        let done = match once(&mut timings, flow, work) {
            // What is in a pipe already cannot be taken back.
            Err(error) if error.is_damage() && !request.outputs.iter().any(is_streamed) => {
                let message = format!("{error}; the image is built again");
                job.sink.emit(Event::Warning { code: "corrupt-blob".into(), message, line: None });
                once(&mut timings, flow, work)
            }
            done => done,
        };
        let (decision, breaks) = done?;
        self.phase(Phase::PostBuild, flow, work, job)?;
        let Work { image: Some(image), delivered, .. } = work else { return Err(Error::new(Kind::Bug, "there is no image")) };
        Ok(BuildReport {
            version: report::VERSION,
            digest: image.target.digest,
            descriptor: image.target.clone(),
            platforms: image
                .platforms
                .iter()
                .map(|(platform, manifest, config)| PlatformReport { platform: platform.clone(), digest: manifest.digest, config: *config })
                .collect(),
            names: delivered.names.clone(),
            pushed: delivered.pushed.iter().map(ToString::to_string).collect(),
            decision: request.if_needed.map(|_| decision),
            content_id,
            revision: tree.revision.clone(),
            breaks: image.breaks.and(breaks),
            ran: image.ran,
            cached: image.cached,
            timings,
            record: Record::default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;

    use ovenbird_engine::Cancel;
    use ovenbird_engine::event::Silent;
    use ovenbird_oci::{Descriptor, Platform};

    use super::*;
    use crate::builder::{Builder, Library};
    use crate::request::Source;
    use crate::source::SourceTree;

    /// Writes down what it is told to do.
    #[derive(Default)]
    struct Recorder(Mutex<Vec<String>>, Mutex<usize>);

    impl Recorder {
        fn say(&self, text: String) {
            self.0.lock().unwrap().push(text);
        }
    }

    impl Library for Recorder {
        fn identify(&self, _: &SourceTree, _: &BuildRequest, _: &Job) -> Result<ovenbird_engine::ContentId, Error> {
            Err(Error::new(Kind::Bug, "not asked for in these tests"))
        }
        fn find(&self, _: &Reference) -> Result<Option<Image>, Error> {
            Ok(None)
        }
        fn fetch(&self, _: &Reference, _: bool, _: &Job) -> Result<Option<Image>, Error> {
            Ok(None)
        }
        fn overtaken(&self, name: &Reference, version: &Version, _: &Job) -> Result<Option<Version>, Error> {
            let at = Version::parse("1.2.9");
            match name.repository() {
                "library/old" => Ok(at.filter(|at| at > version)),
                "library/odd" => Err(Error::new(Kind::Registry, "no answer")),
                _ => Ok(None),
            }
        }
        fn labels(&self, _: &Image) -> Result<std::collections::BTreeMap<String, String>, Error> {
            Ok([("v".to_owned(), "1/2".to_owned())].into())
        }
    }

    impl Workshop for Recorder {
        fn describe(&self, _: &Image) -> Result<Vec<crate::workflow::Described>, Error> {
            Ok(vec![])
        }
        fn bases(&self, _: &SourceTree, _: &BuildRequest, _: &Job) -> Result<Vec<crate::workflow::Base>, Error> {
            Ok(vec![])
        }
        fn as_base(&self, _: &Image) -> Result<String, Error> {
            Ok("scratch".into())
        }
        fn squash(&self, image: &Image, _: bool, _: &SourceTree, _: &BuildRequest, _: &Job) -> Result<Image, Error> {
            Ok(image.clone())
        }
        fn forget(&self, _: &[Reference]) -> Result<(), Error> {
            Ok(())
        }
    }

    fn list(names: &[Reference]) -> String {
        names.iter().map(Reference::familiar).collect::<Vec<_>>().join(",")
    }

    impl Builder for Recorder {
        fn build(&self, source: &SourceTree, _: &BuildRequest, _: &Job) -> Result<Image, Error> {
            self.say(format!("build {}", source.dockerfile));
            let target = Descriptor { media_type: "m".into(), digest: Digest::of(b"m"), size: 1, platform: None, annotations: [].into() };
            Ok(Image {
                platforms: vec![(Platform::host(), target.clone(), Digest::of(b"c"))],
                target,
                ran: 1,
                cached: 0,
                source_date_epoch: None,
                exportable: ovenbird_engine::input::Exportable::default(),
                breaks: Breaks::default(),
                bases: vec![],
            })
        }
        fn name(&self, _: &Image, names: &[Reference]) -> Result<(), Error> {
            self.say(format!("name {}", list(names)));
            Ok(())
        }
        fn publish(&self, _: &Image, to: &[Target], _: &Job) -> Result<Breaks, Error> {
            self.say(format!("push {}", list(&to.iter().map(|to| to.reference.clone()).collect::<Vec<_>>())));
            let mut damages = self.1.lock().unwrap();
            if *damages > 0 {
                *damages -= 1;
                let mut error = Error::new(Kind::Configuration, "blob x is corrupt");
                error.detail = Some(Box::new(crate::error::Detail::Damage));
                return Err(error);
            }
            Ok(Breaks::default())
        }
        fn export_caches(&self, _: &Image, _: &SourceTree, request: &BuildRequest, published: &[Reference], _: &Job) -> Result<(), Error> {
            for to in &request.cache_to {
                self.say(format!("cache {:?} from {}", to.dest, list(published)));
            }
            Ok(())
        }
        fn export(&self, _: &Image, output: &OutputKind, names: &[Reference], _: &Job) -> Result<(), Error> {
            if *output != OutputKind::Image {
                self.say(format!("{output:?} {}", list(names)));
            }
            Ok(())
        }
    }

    #[test]
    fn what_is_done() {
        for (names, outputs, expect) in [
            (&["a"][..], &[][..], "build X; name a:latest"),
            (&["a", "a:latest", "b:1"], &[], "build X; name a:latest,b:1"),
            (&["a"], &["type=registry"], "build X; name a:latest; push a:latest"),
            (&["a"], &["type=registry,name=c:2", "type=oci,dest=f"], "build X; name c:2; OciTar(Path(\"f\")) a:latest; push c:2"),
            (&["a"], &["type=registry", "type=registry,name=c:2"], "build X; name a:latest; name c:2; push a:latest,c:2"),
            (&["a"], &["type=docker"], "build X; name a:latest; Load a:latest"),
            (&[], &["out"], "build X; Local(\"out\") "),
            (&[], &["type=registry"], "! there is nothing to push to: the image has no name"),
            (&["A"], &[], "! \"A\" is not an image name"),
            (&["a:{label:v}", "b:{date}"], &[], "build X; name a:1-2,b:19700101"),
            (&["a:{label:none}"], &[], "! the name \"a:{label:none}\": there is no {label:none}: the image has no such label"),
            (&["a"], &["type=registry,name=c:{git.sha}"], "! the name \"c:{git.sha}\": there is no {git.sha}: "),
            (&["old:latest", "old:1.2.3"], &["type=registry"], "build X; name old:latest,old:1.2.3; push old:1.2.3"),
            (&["old:latest", "old:1.2.10"], &["type=registry"], "build X; name old:latest,old:1.2.10; push old:latest,old:1.2.10"),
            (&["odd:latest", "odd:1.2.3"], &["type=registry"], "build X; name odd:latest,odd:1.2.3; push odd:latest,odd:1.2.3"),
            (&["old:latest"], &["type=registry"], "build X; name old:latest; push old:latest"),
            (&["a:{x}"], &[], "! the name \"a:{x}\" has the unknown variable {x}"),
            (&[], &["-", "type=oci"], "! several outputs go to standard output"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("Dockerfile"), "X").unwrap();
            let mut request = BuildRequest::new(Source::Path(dir.path().into()));
            request.names = names.iter().map(|n| (*n).to_owned()).collect();
            request.outputs = outputs.iter().map(|o| o.parse().unwrap()).collect();
            let driver = LocalDriver::new(Recorder::default(), dir.path(), io::empty());
            let job = Job { sink: Arc::new(Silent), cancel: Cancel::default() };
            let got = match driver.run(&request, &job) {
                Ok(_) => driver.builder().0.lock().unwrap().join("; "),
                Err(error) => format!("! {error}"),
            };
            assert!(got.starts_with(expect), "{names:?} {outputs:?}: {got}");
        }
    }

    #[test]
    fn a_damaged_blob_is_made_again_once() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("Dockerfile"), "X").unwrap();
        for (damages, outputs, expect) in [
            (1, &["type=registry"][..], "build X; name a:latest; push a:latest; build X; name a:latest; push a:latest"),
            (2, &["type=registry"], "! blob x is corrupt"),
            (1, &["type=oci,dest=-", "type=registry"], "! blob x is corrupt"),
        ] {
            let mut request = BuildRequest::new(Source::Path(dir.path().into()));
            request.names = vec!["a".into()];
            request.outputs = outputs.iter().map(|o| o.parse().unwrap()).collect();
            let driver = LocalDriver::new(Recorder(Mutex::default(), Mutex::new(damages)), dir.path(), io::empty());
            let job = Job { sink: Arc::new(Silent), cancel: Cancel::default() };
            let got = match driver.run(&request, &job) {
                Ok(_) => driver.builder().0.lock().unwrap().join("; "),
                Err(error) => format!("! {error}"),
            };
            assert_eq!(got, expect, "{damages} {outputs:?}");
        }
    }

    #[test]
    fn a_cancelled_build_delivers_nothing() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("Dockerfile"), "X").unwrap();
        let request = BuildRequest::new(Source::Path(dir.path().into()));
        let driver = LocalDriver::new(Recorder::default(), dir.path(), io::empty());
        let job = Job { sink: Arc::new(Silent), cancel: Cancel::default() };
        job.cancel.cancel();
        assert_eq!(driver.run(&request, &job).unwrap_err().kind, Kind::Cancelled);
        assert_eq!(driver.builder().0.lock().unwrap().len(), 1);
    }
}
