//! Runs one request from source to report.

use std::io::Read;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Instant;

use ovenbird_engine::Event;
use ovenbird_oci::publish::Target;

use crate::builder::{Builder, Image, Job};
use crate::error::{Error, Kind};
use crate::report::{self, BuildReport, PlatformReport, Timings};
use crate::request::{BuildRequest, Output, OutputKind};
use crate::source;

/// What doors see: a request in, events beside, a report out.
pub trait Driver {
    /// Runs the request. Everything that was asked for is done when it returns, or nothing after the failure was.
    fn run(&self, request: &BuildRequest, job: &Job) -> Result<BuildReport, Error>;
}

/// Runs requests in this process.
pub struct LocalDriver<B> {
    builder: B,
    temp: PathBuf,
    stdin: Mutex<Box<dyn Read + Send>>,
}

impl<B> std::fmt::Debug for LocalDriver<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LocalDriver").field("temp", &self.temp).finish_non_exhaustive()
    }
}

impl<B: Builder> LocalDriver<B> {
    /// A driver over `builder`. Archives on `stdin` are unpacked below `temp`.
    pub fn new(builder: B, temp: impl Into<PathBuf>, stdin: impl Read + Send + 'static) -> Self {
        Self { builder, temp: temp.into(), stdin: Mutex::new(Box::new(stdin)) }
    }

    /// The builder.
    pub fn builder(&self) -> &B {
        &self.builder
    }

    fn deliver(&self, image: &Image, request: &BuildRequest, job: &Job) -> Result<(Vec<String>, Vec<String>), Error> {
        let (mut named, mut publish) = (vec![], vec![]);
        let keep = Output::new(OutputKind::Image);
        let outputs = if request.outputs.is_empty() { std::slice::from_ref(&keep) } else { &request.outputs };
        for output in outputs {
            if job.cancel.is_cancelled() {
                return Err(Error::new(Kind::Cancelled, "the build was cancelled"));
            }
            let names = request.references(Some(output))?;
            match output.kind {
                OutputKind::Image | OutputKind::Registry | OutputKind::Load => {
                    self.builder.name(image, &names)?;
                    named.extend(names.iter().map(ToString::to_string).filter(|n| !named.contains(n)).collect::<Vec<_>>());
                }
                _ => {}
            }
            if output.kind == OutputKind::Registry {
                publish.extend(names.into_iter().map(Target::from));
            } else {
                self.builder.export(image, &output.kind, &names, job)?;
            }
        }
        // All at once, and last: nobody sees an image of a build that failed.
        if !publish.is_empty() {
            self.builder.publish(image, &publish, job)?;
        }
        Ok((named, publish.iter().map(|to| to.reference.to_string()).collect()))
    }
}

/// Everything about the request that can be wrong before any work is done.
fn check(request: &BuildRequest) -> Result<(), Error> {
    if request.version != crate::request::VERSION {
        return Err(Error::new(Kind::Usage, format!("build request version {} is not supported", request.version)));
    }
    request.references(None)?;
    request.source_date_epoch()?;
    for output in &request.outputs {
        if output.kind == OutputKind::Registry && request.references(Some(output))?.is_empty() {
            return Err(
                Error::new(Kind::Usage, "there is nothing to push to: the image has no name").hint("name it: -t REGISTRY/REPOSITORY:TAG")
            );
        }
    }
    if request.outputs.iter().filter(|o| o.uses_stdout()).count() > 1 {
        return Err(Error::new(Kind::Usage, "several outputs go to standard output").hint("give all but one of them a file with dest=FILE"));
    }
    request.limits.check().and_then(|()| request.check_hostname()).map_err(|wrong| Error::from_chain(Kind::Usage, &wrong))
}

impl<B: Builder> Driver for LocalDriver<B> {
    fn run(&self, request: &BuildRequest, job: &Job) -> Result<BuildReport, Error> {
        check(request)?;
        let mut timings = Timings::default();
        let start = Instant::now();
        let tree = {
            let mut stdin = self.stdin.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            source::fetch(request, &self.temp, &mut **stdin)?
        };
        timings.source = start.elapsed();
        let breaks = self.builder.breaks();
        let once = |timings: &mut Timings| {
            let start = Instant::now();
            let image = self.builder.build(&tree, request, job)?;
            timings.build += start.elapsed();
            let start = Instant::now();
            let delivered = self.deliver(&image, request, job);
            timings.export += start.elapsed();
            delivered.map(|(names, pushed)| (image, names, pushed))
        };
        let (image, names, pushed) = match once(&mut timings) {
            // What is on standard output already cannot be taken back.
            Err(error) if error.is_damage() && !request.outputs.iter().any(Output::uses_stdout) => {
                let message = format!("{error}; the image is built again");
                job.sink.emit(Event::Warning { code: "corrupt-blob".into(), message, line: None });
                once(&mut timings)?
            }
            done => done?,
        };
        Ok(BuildReport {
            version: report::VERSION,
            digest: image.target.digest,
            descriptor: image.target,
            platforms: image
                .platforms
                .into_iter()
                .map(|(platform, manifest, config)| PlatformReport { platform, digest: manifest.digest, config })
                .collect(),
            names,
            pushed,
            breaks: self.builder.breaks().since(breaks),
            ran: image.ran,
            cached: image.cached,
            timings,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;

    use ovenbird_engine::Cancel;
    use ovenbird_engine::event::Silent;
    use ovenbird_oci::registry::Breaks;
    use ovenbird_oci::{Descriptor, Digest, Platform, Reference};

    use super::*;
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
            })
        }
        fn name(&self, _: &Image, names: &[Reference]) -> Result<(), Error> {
            self.say(format!("name {}", list(names)));
            Ok(())
        }
        fn breaks(&self) -> Breaks {
            Breaks::default()
        }
        fn publish(&self, _: &Image, to: &[Target], _: &Job) -> Result<(), Error> {
            self.say(format!("push {}", list(&to.iter().map(|to| to.reference.clone()).collect::<Vec<_>>())));
            let mut damages = self.1.lock().unwrap();
            if *damages > 0 {
                *damages -= 1;
                let mut error = Error::new(Kind::Configuration, "blob x is corrupt");
                error.detail = Some(Box::new(crate::error::Detail::Damage));
                return Err(error);
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
