//! Builds images of a project: several at once, each after those that it needs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use ovenbird_engine::{Event, EventSink};
use ovenbird_oci::Digest;

use super::{Project, without_push};
use crate::builder::Job;
use crate::error::{Error, Kind};
use crate::report::BuildReport;
use crate::request::{BuildRequest, OutputKind};

/// Room for the steps of one image among those of all.
const STEPS: usize = 1 << 20;

/// What builds one image.
type Build<'a> = dyn Fn(&BuildRequest, &Job) -> Result<BuildReport, Error> + Sync + 'a;

/// What is to be built, and how.
pub struct Runner<'a> {
    /// The project.
    pub project: &'a Project,
    /// What the command line says of every image.
    pub base: &'a BuildRequest,
    /// The names of a request in full.
    pub names: &'a (dyn Fn(BuildRequest) -> BuildRequest + Sync),
    /// Builds one.
    pub build: &'a Build<'a>,
    /// Does it see the images that are built? Otherwise an image has another as its base only where that was pushed.
    pub shared: bool,
    /// Builds at once.
    pub parallel: usize,
}

impl std::fmt::Debug for Runner<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runner").field("project", &self.project).finish_non_exhaustive()
    }
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Built {
    /// Images that were built, by name.
    pub reports: BTreeMap<String, BuildReport>,
    /// Failures, in the order in which they happened.
    pub failed: Vec<(String, Error)>,
    /// Images that were not built, because they need one that failed.
    pub left_out: Vec<String>,
}

impl Built {
    /// The first failure, which says what became of the others.
    pub fn error(&self) -> Option<Error> {
        let (name, first) = self.failed.first()?;
        let mut error = first.clone();
        error.message = format!("image {name}: {}", error.message);
        for (name, other) in &self.failed[1..] {
            error.hints.push(format!("image {name} failed, too: {}", other.message));
        }
        if !self.left_out.is_empty() {
            error.hints.push(format!("not built, because they need one that failed: {}", self.left_out.join(", ")));
        }
        Some(error)
    }
}

#[derive(Default)]
struct State {
    waiting: Vec<String>,
    running: usize,
    built: Built,
    without: BTreeSet<String>,
}

impl Runner<'_> {
    /// Builds `asked` and what they need. Only what was asked for is pushed and written elsewhere.
    pub fn run(&self, asked: &BTreeSet<&str>, job: &Job) -> Result<Built, Error> {
        let order: Vec<String> = self.project.order(asked.iter().copied())?.into_iter().map(str::to_owned).collect();
        let places: BTreeMap<String, usize> = order.iter().enumerate().map(|(place, name)| (name.clone(), place)).collect();
        let threads = self.parallel.clamp(1, order.len().max(1));
        let state = Mutex::new(State { waiting: order, ..State::default() });
        let changed = Condvar::new();
        let isolation = Arc::new(AtomicBool::new(false));
        let lock = || state.lock().unwrap_or_else(PoisonError::into_inner);
        let work = || {
            loop {
                let (name, request) = {
                    let mut state = lock();
                    loop {
                        self.leave_out(&mut state);
                        if state.waiting.is_empty() {
                            return;
                        }
                        let ready = |name: &String| self.project.needs(name).iter().all(|need| state.built.reports.contains_key(*need));
                        if let Some(at) = state.waiting.iter().position(ready) {
                            let name = state.waiting.remove(at);
                            state.running += 1;
                            let request = self.request(&name, asked.contains(name.as_str()), &state.built, job);
                            break (name, request);
                        }
                        state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                    }
                };
                let place = places.get(&name).copied().unwrap_or_default();
                let sink = Arc::new(Of {
                    image: name.clone(),
                    first: place * STEPS,
                    isolation: Arc::clone(&isolation),
                    inner: Arc::clone(&job.sink),
                });
                let own = Job { sink, cancel: job.cancel.clone() };
                let result = if job.cancel.is_cancelled() {
                    Err(Error::new(Kind::Cancelled, "cancelled"))
                } else {
                    request.and_then(|request| (self.build)(&request, &own))
                };
                let mut state = lock();
                state.running -= 1;
                match result {
                    Ok(report) => drop(state.built.reports.insert(name, report)),
                    Err(error) => {
                        state.without.insert(name.clone());
                        state.built.failed.push((name, error));
                    }
                }
                changed.notify_all();
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(work);
            }
            work();
        });
        let state = state.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok(state.built)
    }

    fn request(&self, name: &str, asked: bool, built: &Built, job: &Job) -> Result<BuildRequest, Error> {
        let result = |other: &str| -> Option<(Option<String>, Digest)> {
            let report = built.reports.get(other)?;
            Some((report.pushed.first().or(report.names.first()).cloned(), report.digest))
        };
        let unseen = |base: &&str| built.reports.get(*base).is_some_and(|report| report.pushed.is_empty());
        if let Some(base) = self.project.bases(name).find(unseen).filter(|_| !self.shared) {
            return Err(Error::new(
                Kind::Usage,
                format!("image {base} is the base of image {name}, which is built where the images of this machine are not"),
            )
            .hint(format!("give {base} a tag and push both, or build with --on here and Ovenbird's own engine")));
        }
        let mut base = self.base.clone();
        if !asked {
            // These are about what was asked for.
            let blank = BuildRequest::new(base.source.clone());
            base = BuildRequest {
                names: blank.names,
                target: blank.target,
                dockerfile: blank.dockerfile,
                contexts: blank.contexts,
                outputs: blank.outputs,
                cache_to: blank.cache_to,
                workflow: blank.workflow,
                ..base
            };
        }
        let mut request = self.project.request(name, &base, &result)?;
        if !asked && !request.names.iter().any(|name| name.contains("{id}")) {
            (request.if_needed, request.force) = (None, false);
        }
        if request.names.is_empty() && request.outputs.iter().any(|output| output.kind == OutputKind::Registry && output.names.is_empty()) {
            job.sink.emit(Event::Message { text: format!("image {name} has no tags, so it is not pushed") });
            request = without_push(request);
        }
        Ok((self.names)(request))
    }

    /// Takes out what needs something that failed.
    fn leave_out(&self, state: &mut State) {
        while let Some(at) = state.waiting.iter().position(|name| self.project.needs(name).iter().any(|need| state.without.contains(*need)))
        {
            let name = state.waiting.remove(at);
            state.without.insert(name.clone());
            state.built.left_out.push(name);
        }
    }
}

/// The events of one image: every line says which.
struct Of {
    image: String,
    first: usize,
    isolation: Arc<AtomicBool>,
    inner: Arc<dyn EventSink>,
}

impl Of {
    /// `[build 2/3] RUN make` to `[api build 2/3] RUN make`.
    fn named(&self, name: &str) -> String {
        match name.strip_prefix('[') {
            Some(rest) => format!("[{} {rest}", self.image),
            None => format!("{}: {name}", self.image),
        }
    }
}

impl EventSink for Of {
    fn emit(&self, event: Event) {
        let first = self.first;
        self.inner.emit(match event {
            // Once for all images: it is the same.
            Event::Isolation { .. } if self.isolation.swap(true, Ordering::Relaxed) => return,
            Event::Started { vertex, name, line } => Event::Started { vertex: first + vertex, name: self.named(&name), line },
            Event::Explained { vertex, causes } => Event::Explained { vertex: first + vertex, causes },
            Event::Cached { vertex, name } => Event::Cached { vertex: first + vertex, name: self.named(&name) },
            Event::Log { vertex, stream, text } => Event::Log { vertex: first + vertex, stream, text },
            Event::Finished { vertex, took } => Event::Finished { vertex: first + vertex, took },
            Event::Failed { vertex, error } => Event::Failed { vertex: first + vertex, error: self.named(&error) },
            Event::Progress { id, label, current, total, done } => {
                Event::Progress { id: format!("{} {id}", self.image), label: format!("{}: {label}", self.image), current, total, done }
            }
            Event::Warning { code, message, line } => Event::Warning { code, message: format!("{}: {message}", self.image), line },
            Event::Message { text } => Event::Message { text: format!("{}: {text}", self.image) },
            other => other,
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    use ovenbird_engine::Cancel;
    use ovenbird_oci::Descriptor;

    use super::*;
    use crate::report::{self, Timings};
    use crate::request::{ContextSource, Source};

    fn report(name: &str) -> BuildReport {
        let digest = Digest::of(name.as_bytes());
        serde_json::from_value(serde_json::json!({
            "version": report::VERSION,
            "digest": digest,
            "descriptor": Descriptor { media_type: "m".into(), digest, size: 1, platform: None, annotations: [].into() },
            "platforms": [], "names": [], "pushed": [], "ran": 0, "cached": 0, "timings": Timings::default(),
        }))
        .unwrap()
    }

    #[derive(Default)]
    struct Told(Mutex<Vec<String>>);

    impl EventSink for Told {
        fn emit(&self, event: Event) {
            let text = match event {
                Event::Started { vertex, name, .. } => format!("{vertex} {name}"),
                Event::Message { text } => text,
                Event::Isolation { .. } => "isolation".into(),
                _ => return,
            };
            self.0.lock().unwrap().push(text);
        }
    }

    #[test]
    fn in_order_at_once_and_after_failures() {
        let dir = tempfile::tempdir().unwrap();
        let image = |name: &str, needs: &str| format!("[image.{name}]\nlabels = {{ name = '{name}' }}\n{needs}\n");
        let text = [
            image("a", ""),
            image("b", "contexts = { a = 'image:a' }"),
            image("c", ""),
            image("d", "depends_on = ['b']"),
            image("e", "tags = ['e']"),
        ];
        std::fs::write(dir.path().join(super::super::NAME), text.concat()).unwrap();
        let project = Project::find(dir.path()).unwrap().unwrap();
        let mut base = BuildRequest::new(Source::Path(".".into()));
        base.outputs = vec!["type=registry".parse().unwrap()];
        for (bad, done, left_out) in [("", "a b c d e", ""), ("b", "a c e", "d"), ("a", "c e", "b d")] {
            let (now, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
            let seen = Mutex::new(vec![]);
            let build = |request: &BuildRequest, job: &Job| {
                let name = request.labels["name"].clone();
                most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(30));
                now.fetch_sub(1, Ordering::SeqCst);
                assert_eq!(request.outputs.len(), usize::from(name == "e"), "what has no tag is not pushed");
                if name == bad {
                    return Err(Error::new(Kind::Step, "no"));
                }
                if name == "b" {
                    let expected = ContextSource::Image(format!("docker-image://localhost/ovenbird/a@{}", Digest::of(b"a")));
                    assert_eq!(request.contexts["a"], expected);
                }
                job.sink.emit(Event::Isolation { level: String::new(), detail: String::new() });
                job.sink.emit(Event::Started { vertex: 3, name: "[1/1] RUN x".into(), line: None });
                seen.lock().unwrap().push(name.clone());
                Ok(report(&name))
            };
            let told = Arc::new(Told::default());
            let job = Job { sink: Arc::clone(&told) as Arc<dyn EventSink>, cancel: Cancel::default() };
            let runner = Runner { project: &project, base: &base, names: &|request| request, build: &build, shared: true, parallel: 3 };
            let built = runner.run(&project.names().collect(), &job).unwrap();
            assert_eq!(built.reports.keys().cloned().collect::<Vec<_>>().join(" "), done);
            assert_eq!(built.failed.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>().join(" "), bad);
            assert_eq!(built.left_out.join(" "), left_out);
            assert_eq!(built.error().map(|e| (e.kind, e.message)), (!bad.is_empty()).then(|| (Kind::Step, format!("image {bad}: no"))));
            assert!(most.load(Ordering::SeqCst) > 1, "several at once");
            let told = told.0.lock().unwrap();
            assert_eq!(told.iter().filter(|text| *text == "isolation").count(), 1);
            let step = |place: usize, name: &str| format!("{} [{name} 1/1] RUN x", place * STEPS + 3);
            assert!(told.contains(&step(4, "e")) && told.contains(&"image c has no tags, so it is not pushed".to_owned()), "{told:?}");
            if bad.is_empty() {
                let seen = seen.lock().unwrap();
                let at = |name: &str| seen.iter().position(|seen| seen == name);
                assert!(at("a") < at("b") && at("b") < at("d"), "{seen:?}");
            }
        }
    }

    #[test]
    fn a_base_that_is_not_seen_where_the_build_is() {
        let dir = tempfile::tempdir().unwrap();
        let text = "[image.a]\n[image.b]\ncontexts = { a = 'image:a' }\n[image.c]\ndepends_on = ['a']\n";
        std::fs::write(dir.path().join(super::super::NAME), text).unwrap();
        let project = Project::find(dir.path()).unwrap().unwrap();
        let base = BuildRequest::new(Source::Path(".".into()));
        for (pushed, shared, expect) in [(false, true, "a b c"), (false, false, "a c"), (true, false, "a b c")] {
            let build = |_: &BuildRequest, _: &Job| {
                let pushed = pushed.then(|| "r.io/a:1".to_owned()).into_iter().collect();
                Ok(BuildReport { pushed, ..report("a") })
            };
            let job = Job { sink: Arc::new(Told::default()), cancel: Cancel::default() };
            let runner = Runner { project: &project, base: &base, names: &|request| request, build: &build, shared, parallel: 2 };
            let built = runner.run(&project.names().collect(), &job).unwrap();
            assert_eq!(built.reports.keys().cloned().collect::<Vec<_>>().join(" "), expect);
            if let Some(error) = built.error() {
                assert!(error.kind == Kind::Usage && error.message.starts_with("image b: image a is the base of image b"), "{error}");
            }
        }
    }
}
