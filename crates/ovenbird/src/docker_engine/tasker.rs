//! Every operation on images and containers that dock's `DockerTasker` had, over a Docker Engine.
//!
//! Images are pulled and pushed by our own registry client, so the engine needs no word about a registry, and a transfer that fails is an
//! error. Names are references: `ns/img:1` has no registry, a digest is a digest.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use bollard::models::ContainerConfig;
use bollard::query_parameters as query;
use ovenbird_engine::{Cancel, Event, EventSink};
use ovenbird_oci::publish::Target;
use ovenbird_oci::{Digest, Platform, Reference};
use serde_json::Value;

use super::image::repository;
use super::{AttachedOutput, ContainerSpec, DockerEngine, DockerEngineError, ImageSummary};
use crate::builder::{Builder as _, DockerEngineBuilder, Job};
use crate::driver::{Driver as _, LocalDriver};
use crate::error::{Error, Kind};
use crate::report::BuildReport;
use crate::request::{BuildRequest, DockerfileFrom, Source};
use crate::source::Fetcher;

/// Lines that are kept of one operation.
const MAX_LINES: usize = 10_000;

/// Works on the images and containers of one engine.
pub struct Tasker {
    driver: LocalDriver<DockerEngineBuilder>,
    sink: Arc<dyn EventSink>,
    cancel: Cancel,
    last: Arc<Lines>,
}

impl fmt::Debug for Tasker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tasker").field("driver", &self.driver).finish_non_exhaustive()
    }
}

/// Where an image that is built from a repository comes from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GitSource {
    /// Address of the repository.
    pub url: String,
    /// Commit, tag or branch; `None`: what the repository shows.
    pub commit: Option<String>,
    /// Folder of the Dockerfile in the repository, or the Dockerfile itself.
    pub path: Option<String>,
}

/// The last lines of an operation.
#[derive(Debug, Default)]
struct Lines(Mutex<VecDeque<String>>);

/// Keeps lines, and passes everything on.
struct Keeper {
    lines: Arc<Lines>,
    next: Arc<dyn EventSink>,
}

impl EventSink for Keeper {
    fn emit(&self, event: Event) {
        match &event {
            Event::Log { text, .. } | Event::Message { text } => self.lines.add(text),
            Event::Started { name, .. } | Event::Cached { name, .. } => self.lines.add(name),
            Event::Failed { error, .. } => self.lines.add(error),
            _ => {}
        }
        self.next.emit(event);
    }
}

impl Lines {
    fn add(&self, text: &str) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.extend(text.lines().map(str::to_owned));
        let more = lines.len().saturating_sub(MAX_LINES);
        lines.drain(..more);
    }

    fn begin(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Tasker {
    /// Over this builder; sources come through `sources`.
    pub fn new(builder: DockerEngineBuilder, sources: impl Into<Fetcher>, sink: Arc<dyn EventSink>, cancel: Cancel) -> Self {
        let builder = builder.until(&cancel);
        Self { driver: LocalDriver::new(builder, sources, io::empty()), sink, cancel, last: Arc::default() }
    }

    /// The engine.
    pub fn engine(&self) -> &DockerEngine {
        self.builder().docker()
    }

    fn builder(&self) -> &DockerEngineBuilder {
        self.driver.builder()
    }

    /// What the last operation said.
    pub fn last_logs(&self) -> Vec<String> {
        self.last.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// A job whose words are kept.
    fn begin(&self) -> Job {
        self.last.begin();
        Job { sink: Arc::new(Keeper { lines: self.last.clone(), next: self.sink.clone() }), cancel: self.cancel.clone() }
    }

    fn build(&self, source: Source, dockerfile: DockerfileFrom, image: &str, use_cache: bool) -> Result<BuildReport, Error> {
        let mut request = BuildRequest::new(source);
        request.dockerfile = dockerfile;
        request.names = vec![image.to_owned()];
        request.no_cache = !use_cache;
        self.driver.run(&request, &self.begin())
    }

    /// Builds a folder and names the image.
    pub fn build_image_from_path(&self, path: &Path, image: &str, use_cache: bool) -> Result<BuildReport, Error> {
        self.build(Source::Path(path.into()), DockerfileFrom::Default, image, use_cache)
    }

    /// Builds a repository and names the image.
    pub fn build_image_from_git(&self, git: &GitSource, image: &str, use_cache: bool) -> Result<BuildReport, Error> {
        let path = git.path.as_deref().unwrap_or_default().trim_matches('/');
        // As dock looked: the file itself, or the folder that has it.
        let (folder, file) = match path.rsplit_once('/') {
            _ if path.is_empty() => ("", None),
            Some((folder, file)) if is_dockerfile(file) => (folder, Some(file)),
            None if is_dockerfile(path) => ("", Some(path)),
            _ => (path, None),
        };
        let url = match (git.commit.as_deref().unwrap_or_default(), folder) {
            ("", "") => git.url.clone(),
            (commit, "") => format!("{}#{commit}", git.url),
            (commit, folder) => format!("{}#{commit}:{folder}", git.url),
        };
        let source: Source = url.parse().map_err(|error: crate::request::ParseValueError| Error::new(Kind::Usage, error.reason))?;
        if matches!(source, Source::Path(_) | Source::Stdin) {
            return Err(Error::new(Kind::Usage, format!("{:?} is not the address of a git repository", git.url)));
        }
        self.build(source, file.map_or(DockerfileFrom::Default, |file| DockerfileFrom::Path(file.into())), image, use_cache)
    }

    /// Brings an image from its registry into the engine.
    pub fn pull_image(&self, image: &Reference) -> Result<Reference, Error> {
        let job = self.begin();
        self.builder().pull_into_engine(image, &Platform::host(), &job)?;
        Ok(image.clone())
    }

    /// Pushes an image of the engine under its own name. Gives its digest there.
    pub fn push_image(&self, image: &Reference) -> Result<Digest, Error> {
        let job = self.begin();
        let found = self.builder().import(&image.familiar(), &job)?;
        self.builder().publish(&found, &[Target::from(image.clone())], &job)?;
        Ok(found.target.digest)
    }

    /// Gives an image one more name. A name that another image has is taken from it only with `force`.
    pub fn tag_image(&self, image: &str, target: &Reference, force: bool) -> Result<Reference, Error> {
        self.last.begin();
        let engine = self.engine();
        if !force {
            let taken = match engine.image_id(&target.familiar()) {
                Err(error) if error.is_not_found() => None,
                found => Some(found?),
            };
            if taken.is_some() && taken != Some(engine.image_id(image)?) {
                return Err(Error::new(Kind::Usage, format!("the name {} is taken by another image", target.familiar()))
                    .hint("force takes it from that image"));
            }
        }
        engine.tag(image, target)?;
        Ok(target.clone())
    }

    /// Both.
    pub fn tag_and_push_image(&self, image: &str, target: &Reference, force: bool) -> Result<Digest, Error> {
        self.tag_image(image, target, force)?;
        self.push_image(target)
    }

    /// Makes an image of a container as it is now. Gives the image's id.
    pub fn commit_container(&self, container: &str, name: Option<&Reference>, message: Option<&str>) -> Result<String, Error> {
        self.last.begin();
        let options = query::CommitContainerOptions {
            container: Some(container.to_owned()),
            repo: name.map(repository),
            tag: name.map(|name| name.tag().unwrap_or("latest").to_owned()),
            comment: message.map(str::to_owned),
            pause: true,
            ..query::CommitContainerOptions::default()
        };
        let call = "commit";
        let engine = self.engine();
        let made = engine.work(call, &self.cancel, async |client, _| {
            client.commit_container(options, ContainerConfig::default()).await.map_err(|error| engine.told(call, error))
        })?;
        Ok(made.id)
    }

    /// Keeps the container that a build ran in: an image `buildroot-IMAGE:TIME` in each of these registries, or in none. `now` is in
    /// seconds since 1970. Gives the names.
    pub fn push_buildroot(&self, container: &str, image: &Reference, registries: &[String], now: i64) -> Result<Vec<Reference>, Error> {
        let name = buildroot(image, now)?;
        let id = self.commit_container(container, Some(&name), Some(&format!("build environment of {}", image.familiar())))?;
        let job = self.begin();
        let mut names = vec![];
        for registry in registries {
            let name: Reference =
                format!("{registry}/{}:{}", name.repository().trim_start_matches("library/"), name.tag().unwrap_or("latest")).parse()?;
            self.engine().tag(&id, &name)?;
            names.push(name);
        }
        if names.is_empty() {
            return Ok(vec![name]);
        }
        let found = self.builder().import(&id, &job)?;
        let targets: Vec<Target> = names.iter().cloned().map(Target::from).collect();
        self.builder().publish(&found, &targets, &job)?;
        Ok(names)
    }

    /// Makes a container and starts it. Gives its id; when it cannot be started, none is left.
    pub fn run(&self, spec: &ContainerSpec) -> Result<String, Error> {
        self.last.begin();
        let id = self.engine().create_container(spec)?;
        if let Err(error) = self.engine().start_container(&id) {
            let _ = self.engine().remove_container(&id);
            return Err(error.into());
        }
        Ok(id)
    }

    /// Waits until a container ends, and gives its exit code.
    pub fn wait(&self, container: &str) -> Result<i64, Error> {
        Ok(self.engine().wait_container(container, &self.cancel)?)
    }

    /// What a container has said; with `follow`, what it says until it ends.
    pub fn logs(&self, container: &str, follow: bool) -> Result<AttachedOutput, Error> {
        Ok(self.engine().container_logs(container, follow)?)
    }

    /// Everything about a container.
    pub fn inspect_container(&self, container: &str) -> Result<Value, Error> {
        Ok(self.engine().inspect_container(container)?)
    }

    /// Everything about an image.
    pub fn inspect_image(&self, image: &str) -> Result<Value, Error> {
        Ok(self.engine().inspect_image(image)?)
    }

    /// One line of `docker images`, by id.
    pub fn image_info_by_id(&self, id: &str) -> Result<Option<ImageSummary>, Error> {
        let wanted = id.strip_prefix("sha256:").unwrap_or(id);
        let is = |image: &ImageSummary| !wanted.is_empty() && image.id.strip_prefix("sha256:").unwrap_or(&image.id).starts_with(wanted);
        Ok(self.engine().images("")?.into_iter().find(is))
    }

    /// Lines of `docker images`, by name; without a tag, those of all tags.
    pub fn image_info_by_name(&self, name: &str) -> Result<Vec<ImageSummary>, Error> {
        Ok(self.engine().images(name)?)
    }

    /// Is there such an image?
    pub fn image_exists(&self, image: &str) -> Result<bool, Error> {
        Ok(self.engine().image_exists(image)?)
    }

    /// Removes a container; one that runs only with `force`.
    pub fn remove_container(&self, container: &str, force: bool) -> Result<(), Error> {
        Ok(self.engine().remove(container, force)?)
    }

    /// Removes an image, or one of its names; with `keep_parents`, untagged images below it stay.
    pub fn remove_image(&self, image: &str, force: bool, keep_parents: bool) -> Result<(), Error> {
        let options = query::RemoveImageOptions { force, noprune: keep_parents, ..query::RemoveImageOptions::default() };
        let removed: Result<(), DockerEngineError> =
            self.engine().ask("image removal", async |client| client.remove_image(image, Some(options), None).await.map(drop));
        Ok(removed?)
    }
}

fn is_dockerfile(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    name == "dockerfile" || name == "containerfile" || name.starts_with("dockerfile.") || name.ends_with(".dockerfile")
}

/// `buildroot-IMAGE:YYYY-MM-DD-HH-MM-SS`.
fn buildroot(image: &Reference, now: i64) -> Result<Reference, Error> {
    let time = jiff::Timestamp::from_second(now).map_err(|error| Error::from_chain(Kind::Bug, &error))?;
    let time = time.strftime("%Y-%m-%d-%H-%M-%S");
    let path = image.repository().strip_prefix("library/").filter(|_| image.registry() == "docker.io").unwrap_or(image.repository());
    Ok(format!("buildroot-{path}:{time}").parse::<Reference>()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Registry, path and tag of a name, as dock's `split_repo_img_name_tag` should have split it.
    fn split(name: &str) -> String {
        match name.parse::<Reference>() {
            Ok(name) => {
                let digest = name.digest().map(|digest| format!("@{}", digest.short())).unwrap_or_default();
                format!("{} {} {}{digest}", name.registry(), name.repository(), name.tag().unwrap_or("-"))
            }
            Err(_) => "!".into(),
        }
    }

    #[test]
    fn names_are_split_and_joined() {
        let digest = format!("sha256:{}", "1".repeat(64));
        for (name, parts, joined) in [
            ("image", "docker.io library/image latest", "image:latest"),
            ("image:tag", "docker.io library/image tag", "image:tag"),
            ("ns/img:1", "docker.io ns/img 1", "ns/img:1"),
            ("registry.com/image", "registry.com image latest", "registry.com/image:latest"),
            ("registry.com/ns/image:tag", "registry.com ns/image tag", "registry.com/ns/image:tag"),
            ("localhost/image", "localhost image latest", "localhost/image:latest"),
            ("localhost:5000/image", "localhost:5000 image latest", "localhost:5000/image:latest"),
            ("localhost:5000/a/b/c:t", "localhost:5000 a/b/c t", "localhost:5000/a/b/c:t"),
            ("10.0.0.1:80/image:v1.0-2", "10.0.0.1:80 image v1.0-2", "10.0.0.1:80/image:v1.0-2"),
        ] {
            assert_eq!(split(name), parts);
            assert_eq!(name.parse::<Reference>().unwrap().familiar(), joined);
        }
        assert_eq!(split(&format!("r.io/a@{digest}")), "r.io a -@111111111111");
        for name in ["", "Image", "a//b", "r.io/", ":tag", "a:", "-a"] {
            assert_eq!(split(name), "!", "{name}");
        }
    }

    #[test]
    fn names_of_build_environments() {
        let name = |image: &str| buildroot(&image.parse().unwrap(), 1_700_000_000).unwrap().familiar();
        assert_eq!(name("app:1"), "buildroot-app:2023-11-14-22-13-20");
        assert_eq!(name("r.io:5000/team/app:1"), "buildroot-team/app:2023-11-14-22-13-20");
    }
}
