//! A Docker Engine as a [`Builder`]: it builds, and everything else is done with its image in our own store.
//!
//! The image is read out of the engine (`docker save`) and its layers are packed as ours are. So it is pushed to registries that the engine
//! was never set up for, all names or none, and every output is the one of our own engine. What a request asks for and the engine's API
//! has no word for is refused before the context is sent; the table is in docs/reference/builders.md.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use ovenbird_dockerfile::ast::{Dockerfile, Kind as Said, Source as CopySource};
use ovenbird_engine::input::Exportable;
use ovenbird_engine::ops::file::decompress;
use ovenbird_engine::{Cancel, ContentId, Event};
use ovenbird_oci::archive::ArchiveError;
use ovenbird_oci::image::media;
use ovenbird_oci::keychain::{Credential, Keychain, Query};
use ovenbird_oci::layer::{self, Compression};
use ovenbird_oci::publish::Target;
use ovenbird_oci::registry::Breaks;
use ovenbird_oci::store::Store;
use ovenbird_oci::{Descriptor, Digest, ImageConfig, Index, Manifest, Platform, Reference, archive, beside};

use serde_json::{Value, json};

use super::context::{self, Place};
use super::engine::{DEFAULT_COMPRESSION, agreed};
use super::{Builder, EngineBuilder, Image, Job, Library};
use crate::docker_engine::{BuildCall, BuildFailure, Built, DockerEngine};
use crate::error::{Detail, Error, Kind};
use crate::naming::Version;
use crate::request::{BuildRequest, CacheDest, CacheFrom, Network, OutputKind, Source};
use crate::settings::Settings;
use crate::source::SourceTree;
use crate::workflow::{Base, Described, Workshop};

/// The API of Docker 23, the first whose BuildKit takes limits of steps and a time.
const DOCKER_23: (u32, u32) = (1, 42);
/// What the engine says of an image that it has for another platform.
const OTHER_PLATFORM: &str = "does not match the specified platform";
/// Names of build arguments that BuildKit itself reads.
const INLINE_CACHE: &str = "BUILDKIT_INLINE_CACHE";
const SANDBOX_HOSTNAME: &str = "BUILDKIT_SANDBOX_HOSTNAME";

/// Builds with a Docker Engine.
#[derive(Debug)]
pub struct DockerEngineBuilder {
    docker: DockerEngine,
    images: EngineBuilder,
    keychain: Keychain,
    /// For images on their way out of the engine: as large as those of our store, so on its disk.
    temp: PathBuf,
    /// What our images are called in the engine, by our digest, and the engine as the job that made them asks it.
    ids: Mutex<HashMap<Digest, (String, Arc<DockerEngine>)>>,
}

/// Which of the engine's two builders, and what it knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Technique {
    buildkit: bool,
    api: (u32, u32),
}

impl DockerEngineBuilder {
    /// Over this engine; images are kept in the store of `images`.
    pub fn new(docker: DockerEngine, images: EngineBuilder, settings: &Settings) -> Self {
        let keychain = settings.client_options().keychain();
        Self { docker, images, keychain, temp: settings.root.clone(), ids: Mutex::default() }
    }

    /// The same, whose engine is given up when this is cancelled, also where no job is.
    #[must_use]
    pub fn until(self, cancel: &Cancel) -> Self {
        Self { docker: self.docker.until(cancel), ..self }
    }

    /// The Docker Engine.
    pub fn docker(&self) -> &DockerEngine {
        &self.docker
    }

    fn technique(&self, dockerfile: &Dockerfile, place: &Place, job: &Job) -> Result<Technique, Error> {
        let say = |text: &str| job.sink.emit(Event::Message { text: text.into() });
        let version = self.docker.until(&job.cancel).reach()?;
        let said = self.docker.said_buildkit();
        let own = version.prefers_buildkit();
        let hidden = matches!(place, Place::Beside(_));
        let needed = needs_buildkit(dockerfile);
        let buildkit = match (said, needed, hidden) {
            // BuildKit shows a step every file of the tar, the Dockerfile that comes beside it too.
            (Some(true), _, true) | (None, Some(_), true) => {
                let why =
                    needed.map_or("DOCKER_BUILDKIT=1 is set".to_owned(), |what| format!("the Dockerfile has {what}, which needs BuildKit"));
                return Err(Error::refused(
                    "a Dockerfile that is not a file of the build context (or that .dockerignore leaves out)",
                    format!("{why}, and steps would see the file"),
                )
                .hint("put the Dockerfile into the context, or use --builder engine"));
            }
            (Some(said), ..) => said,
            (None, Some(what), false) if !own => {
                say(&format!("the Dockerfile has {what}: the Docker Engine's BuildKit builds it"));
                true
            }
            (None, None, true) if own => {
                say("the Dockerfile is not a file of the build context: the Docker Engine's classic builder builds it");
                false
            }
            (None, ..) => own,
        };
        Ok(Technique { buildkit, api: version.api })
    }

    /// Logins for the registries of base images. One that cannot be had is no reason to stop: the image may be here.
    fn credentials(&self, dockerfile: &Dockerfile, request: &BuildRequest, job: &Job) -> Vec<(String, Credential)> {
        let mut found: Vec<(String, Credential)> = vec![];
        for reference in bases(dockerfile, request) {
            let registry = reference.registry().to_owned();
            let address = if registry == "docker.io" { "https://index.docker.io/v1/".to_owned() } else { registry.clone() };
            if found.iter().any(|(known, ..)| *known == address) {
                continue;
            }
            let query = Query { registry: &registry, repository: reference.repository(), address: None, refused: None };
            match self.docker.block_on(self.keychain.find(query)) {
                Ok(Ok(Some(login))) => found.push((address, login.credential)),
                Ok(Ok(None)) => {}
                Ok(Err(error)) => {
                    let message = format!("no login for {registry} is given to the Docker Engine: {error}");
                    job.sink.emit(Event::Warning { code: "docker-login".into(), message, line: None });
                }
                Err(_) => return found,
            }
        }
        found
    }

    /// An image that the engine has, in our store: to be pushed or written somewhere else.
    pub fn import(&self, name: &str, job: &Job) -> Result<Image, Error> {
        let id = self.docker.until(&job.cancel).image_id(name)?;
        self.take(&id.to_string(), &BuildRequest::new(Source::Stdin), job)
    }

    /// Gives the engine an image of a registry, by way of our store and our registry client.
    pub fn pull_into_engine(&self, name: &Reference, platform: &Platform, job: &Job) -> Result<(), Error> {
        let target = self.images.engine().pull(name, Some(platform), &job.sink, &job.cancel).map_err(|error| super::told(error, None))?;
        // The engine knows names with tags only.
        let names: Vec<Reference> = name.tag().map(|_| name.clone()).into_iter().collect();
        self.images.export_target(&target, &OutputKind::Load, &names, None, job)
    }

    /// Takes an image of the engine into our store: same config, layers packed as asked for.
    fn take(&self, id: &str, request: &BuildRequest, job: &Job) -> Result<Image, Error> {
        job.sink.emit(Event::Message { text: format!("reading image {} out of the Docker Engine", short(id)) });
        beside::clear(&self.temp);
        let made = |error: std::io::Error| {
            Error::from_chain(Kind::Configuration, &error).while_doing(format!("cannot make a folder in {}", self.temp.display()))
        };
        let folder = beside::folder_in(&self.temp).map_err(made)?;
        let scratch = Store::open(folder.path())?;
        let docker = Arc::new(self.docker.until(&job.cancel));
        if let Some(config) = config_without_layers(&docker, id)? {
            let bytes = serde_json::to_vec(&config).map_err(|error| Error::from_chain(Kind::Bug, &error))?;
            let config = Descriptor::new(media::OCI_CONFIG, scratch.write(&bytes)?, bytes.len() as u64);
            let media_type = Some(media::OCI_MANIFEST.to_owned());
            let source = Manifest { schema_version: 2, media_type, config, layers: vec![], annotations: BTreeMap::new() };
            return self.packed(id, docker, &scratch, &source, request);
        }
        let read = docker.save(id, &job.cancel, |archive| archive::read(&scratch, archive));
        let images = read?.map_err(|error| {
            let kind = if matches!(error, ArchiveError::Store(_)) { Kind::Configuration } else { Kind::Driver };
            Error::from_chain(kind, &error).while_doing("the Docker Engine gave an image that cannot be read")
        })?;
        let Some((target, _)) = images.into_iter().next() else {
            return Err(Error::new(Kind::Driver, format!("the Docker Engine gave no image for {}", short(id))));
        };
        let source = one_image(&scratch, target)?;
        self.packed(id, docker, &scratch, &source, request)
    }

    fn packed(
        &self,
        id: &str,
        docker: Arc<DockerEngine>,
        scratch: &Store,
        source: &Manifest,
        request: &BuildRequest,
    ) -> Result<Image, Error> {
        let compression = agreed(&request.outputs, "compression", |o| o.compression)?;
        let docker_types = agreed(&request.outputs, "oci-mediatypes", |o| o.oci_media_types)?.is_some_and(|oci| !oci);
        let mut annotations = request.annotations.clone();
        annotations.extend(request.outputs.iter().flat_map(|output| output.annotations.clone()));
        let image = self.pack(scratch, source, compression, docker_types, annotations)?;
        self.ids.lock().unwrap_or_else(PoisonError::into_inner).insert(image.target.digest, (id.to_owned(), docker));
        Ok(image)
    }

    fn pack(
        &self,
        scratch: &Store,
        source: &Manifest,
        compression: Option<Compression>,
        docker_types: bool,
        annotations: BTreeMap<String, String>,
    ) -> Result<Image, Error> {
        let store = self.images.engine().store();
        let bytes = scratch.read(&source.config.digest)?;
        let config: ImageConfig = serde_json::from_slice(&bytes).map_err(|error| unreadable(&error.to_string()))?;
        if config.rootfs.diff_ids.len() != source.layers.len() {
            return Err(unreadable("its config and its manifest disagree about the layers"));
        }
        let known = if compression.is_none() { self.known_layers()? } else { HashMap::new() };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let mut layers = vec![];
        for (from, diff_id) in source.layers.iter().zip(&config.rootfs.diff_ids) {
            let layer = match known.get(diff_id) {
                Some(layer) if store.holds(layer) => layer.clone(),
                _ => {
                    let tar = decompress(scratch.open_blob(&from.digest)?).map_err(|error| unreadable(&error.to_string()))?;
                    let packed = layer::repack(tar, compression.unwrap_or(DEFAULT_COMPRESSION), threads, store)
                        .map_err(|error| Error::from_chain(Kind::Configuration, &error))?;
                    if packed.diff_id != *diff_id {
                        return Err(unreadable("a layer is not what its config says"));
                    }
                    packed.descriptor()
                }
            };
            layers.push(if docker_types { with_docker_type(layer)? } else { layer });
        }
        let (media_type, config_type) =
            if docker_types { (media::DOCKER_MANIFEST, media::DOCKER_CONFIG) } else { (media::OCI_MANIFEST, media::OCI_CONFIG) };
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(media_type.into()),
            config: Descriptor::new(config_type, store.write(&bytes)?, bytes.len() as u64),
            layers,
            annotations,
        };
        let bytes = serde_json::to_vec(&manifest).map_err(|error| Error::from_chain(Kind::Bug, &error))?;
        let mut target = Descriptor::new(media_type, store.write(&bytes)?, bytes.len() as u64);
        let platform =
            Platform { os: config.os, architecture: config.architecture, variant: config.variant, os_version: config.os_version };
        let single = target.clone();
        target.platform = Some(platform.clone());
        Ok(Image {
            target: single,
            platforms: vec![(platform, target, manifest.config.digest)],
            ran: 0,
            cached: 0,
            source_date_epoch: None,
            exportable: Exportable::default(),
            breaks: Breaks::default(),
            bases: vec![],
        })
    }

    /// The base images of a Dockerfile that the engine has.
    fn known_bases(&self, dockerfile: &Dockerfile, request: &BuildRequest, job: &Job) -> Vec<Base> {
        let docker = self.docker.until(&job.cancel);
        let names = bases(dockerfile, request);
        let last = names.last().cloned();
        let described = names.into_iter().filter_map(|reference| {
            let said = docker.inspect_image(&reference.familiar()).ok()?;
            let id: Digest = said["Id"].as_str()?.parse().ok()?;
            let platform = platform_of(&said);
            let size = said["Size"].as_u64().unwrap_or(0);
            let pushed = said["RepoDigests"][0].as_str().and_then(|name| name.rsplit_once('@')?.1.parse().ok());
            let config = json!({
                "created": said["Created"], "author": said["Author"], "architecture": said["Architecture"], "os": said["Os"],
                "config": said["Config"], "rootfs": { "type": "layers", "diff_ids": said["RootFS"]["Layers"] },
            });
            Some(Base {
                is_final: last.as_ref() == Some(&reference),
                image: Described {
                    platform,
                    manifest: Descriptor::new(media::OCI_MANIFEST, pushed.unwrap_or(id), 0),
                    // Engines keep no manifest: this is what they know of the image.
                    document: said.clone(),
                    config,
                    id: id.to_string(),
                    size,
                },
                reference: pushed.map_or_else(|| reference.clone(), |digest| reference.with_digest(digest)),
            })
        });
        described.collect()
    }

    /// Layers of our images in the form that we give a layer, by diff id: a base image is packed once.
    fn known_layers(&self) -> Result<HashMap<Digest, Descriptor>, Error> {
        let mut known = HashMap::new();
        for (_, target) in self.images.engine().store().images()? {
            // An image that is damaged or not whole is no help.
            for member in self.images.engine().members(&target).unwrap_or_default() {
                let layers = member.document.layers.into_iter().zip(member.config.rootfs.diff_ids);
                known
                    .extend(layers.filter(|(layer, _)| layer.media_type == media::OCI_LAYER_GZIP).map(|(layer, diff_id)| (diff_id, layer)));
            }
        }
        Ok(known)
    }

    /// What an image of the engine is for.
    fn platform_of(&self, id: &str, job: &Job) -> Result<Platform, Error> {
        Ok(platform_of(&self.docker.until(&job.cancel).inspect_image(id)?))
    }

    fn id_of(&self, image: &Image) -> Option<(String, Arc<DockerEngine>)> {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner).get(&image.target.digest).cloned()
    }
}

impl Builder for DockerEngineBuilder {
    fn build(&self, source: &SourceTree, request: &BuildRequest, job: &Job) -> Result<Image, Error> {
        let parsed = ovenbird_dockerfile::parse(&source.dockerfile).dockerfile;
        let place = Place::of(source, &request.dockerfile);
        let technique = self.technique(&parsed, &place, job)?;
        let query = query(request, &place, technique)?;
        let mut call = BuildCall { query, buildkit: technique.buildkit, credentials: self.credentials(&parsed, request, job) };
        let name = if technique.buildkit { "BuildKit" } else { "the classic builder" };
        job.sink.emit(Event::Message { text: format!("building with {name} of the Docker Engine at {}", self.docker) });
        let run = |call: &BuildCall| {
            let built = self.docker.build(call, &job.cancel, &*job.sink, |out| context::write(source, &place, technique.buildkit, out));
            built.map_err(|failure| told(failure, source))
        };
        let asked = asked_platform(&parsed, request).filter(|_| !technique.buildkit);
        let is_other = |built: &Result<Built, Error>, asked: &Platform| match built {
            Ok(built) => Ok(!asked.matches(&self.platform_of(&built.id, job)?)),
            // A stage that came from the cache, and that the next one begins with.
            Err(error) => Ok::<_, Error>(error.causes.iter().any(|cause| cause.contains(OTHER_PLATFORM))),
        };
        let mut built = run(&call);
        if let Some(asked) = asked {
            // The classic builder's cache knows no architectures.
            if !request.no_cache && is_other(&built, asked)? {
                let message = format!("the Docker Engine has steps for another platform than {asked} in its cache: all steps run anew");
                job.sink.emit(Event::Warning { code: "docker-cache".into(), message, line: None });
                call.query.iter_mut().filter(|(key, _)| *key == "nocache").for_each(|(_, value)| *value = "1".into());
                built = run(&call);
            }
            if built.is_ok() && is_other(&built, asked)? {
                let why = "the classic builder of the Docker Engine made an image for another platform";
                return Err(Error::refused(&format!("--platform {asked} with --builder docker"), why)
                    .hint("set DOCKER_BUILDKIT=1, or use --builder engine"));
            }
        }
        let built = built?;
        let image = self.take(&built.id, request, job)?;
        Ok(Image { ran: built.ran, cached: built.cached, bases: self.known_bases(&parsed, request, job), ..image })
    }

    fn name(&self, image: &Image, names: &[Reference]) -> Result<(), Error> {
        // The engine's user finds the image there, too, as after `docker build`.
        if let Some((id, docker)) = self.id_of(image) {
            names.iter().try_for_each(|name| docker.tag(&id, name))?;
        }
        self.images.name(image, names)
    }

    fn publish(&self, image: &Image, to: &[Target], job: &Job) -> Result<Breaks, Error> {
        self.images.publish(image, to, job)
    }

    fn export(&self, image: &Image, output: &OutputKind, names: &[Reference], job: &Job) -> Result<(), Error> {
        // It is there already, and has its names.
        if *output == OutputKind::Load && self.id_of(image).is_some() { Ok(()) } else { self.images.export(image, output, names, job) }
    }

    fn export_caches(&self, _: &Image, _: &SourceTree, _: &BuildRequest, _: &[Reference], _: &Job) -> Result<(), Error> {
        // The only cache that is not refused is the one in the image.
        Ok(())
    }
}

impl Workshop for DockerEngineBuilder {
    fn describe(&self, image: &Image) -> Result<Vec<Described>, Error> {
        self.images.describe(image)
    }

    fn bases(&self, source: &SourceTree, request: &BuildRequest, job: &Job) -> Result<Vec<Base>, Error> {
        self.images.bases(source, request, job)
    }

    fn as_base(&self, image: &Image) -> Result<String, Error> {
        self.id_of(image)
            .map(|(id, _)| id)
            .ok_or_else(|| Error::refused("a command in this image", "the Docker Engine does not have it in this form"))
    }

    fn squash(&self, image: &Image, whole: bool, source: &SourceTree, request: &BuildRequest, job: &Job) -> Result<Image, Error> {
        self.images.squash(image, whole, source, request, job)
    }

    fn forget(&self, names: &[Reference]) -> Result<(), Error> {
        self.images.forget(names)
    }
}

impl Library for DockerEngineBuilder {
    fn identify(&self, source: &SourceTree, request: &BuildRequest, job: &Job) -> Result<ContentId, Error> {
        self.images.identify(source, request, job)
    }

    fn find(&self, name: &Reference) -> Result<Option<Image>, Error> {
        self.images.find(name)
    }

    fn fetch(&self, name: &Reference, whole: bool, job: &Job) -> Result<Option<Image>, Error> {
        self.images.fetch(name, whole, job)
    }

    fn overtaken(&self, name: &Reference, version: &Version, job: &Job) -> Result<Option<Version>, Error> {
        self.images.overtaken(name, version, job)
    }

    fn labels(&self, image: &Image) -> Result<BTreeMap<String, String>, Error> {
        self.images.labels(image)
    }
}

/// The parameters of the engine's build. What it has no parameter for is refused by name.
fn query(request: &BuildRequest, place: &Place, technique: Technique) -> Result<Vec<(&'static str, String)>, Error> {
    refuse(request, technique)?;
    let json = |value: serde_json::Value| value.to_string();
    let mut build_args = request.build_args.clone();
    if request.cache_to.iter().any(|to| to.dest == CacheDest::Inline) {
        build_args.insert(INLINE_CACHE.into(), "1".into());
    }
    if let Some(hostname) = &request.hostname {
        build_args.insert(SANDBOX_HOSTNAME.into(), hostname.clone());
    }
    let flag = |said: bool| if said { "1" } else { "0" }.to_owned();
    let mut query = vec![
        ("dockerfile", place.path().to_owned()),
        ("buildargs", json(serde_json::json!(build_args))),
        ("labels", json(serde_json::json!(request.labels))),
        ("nocache", flag(request.no_cache)),
        ("pull", flag(request.pull)),
        ("rm", flag(true)),
        ("forcerm", flag(true)),
    ];
    query.extend(request.target.iter().map(|target| ("target", target.clone())));
    query.extend(request.platforms.first().map(|platform| ("platform", platform.to_string())));
    let caches: Vec<&String> =
        request.cache_from.iter().filter_map(|from| if let CacheFrom::Registry(name) = from { Some(name) } else { None }).collect();
    if !caches.is_empty() {
        query.push(("cachefrom", json(serde_json::json!(caches))));
    }
    query.extend(request.add_hosts.iter().map(|host| ("extrahosts", format!("{}:{}", host.name, host.address))));
    match request.network {
        Network::Default => {}
        Network::None => query.push(("networkmode", "none".into())),
        Network::Host => query.push(("networkmode", "host".into())),
    }
    let limits = &request.limits;
    if let Some(bytes) = limits.memory.filter(|bytes| bytes.0 > 0) {
        // No swap beside it, as with our own engine.
        query.extend([("memory", bytes.0.to_string()), ("memswap", bytes.0.to_string())]);
    }
    if let Some(cpus) = limits.cpus {
        query.extend([("cpuperiod", "100000".to_owned()), ("cpuquota", ((cpus * 100_000.0).round() as i64).to_string())]);
    }
    if let Some(bytes) = limits.shm_size.filter(|bytes| bytes.0 > 0) {
        query.push(("shmsize", bytes.0.to_string()));
    }
    if !limits.ulimits.is_empty() {
        let one = |limit: &crate::request::Ulimit| serde_json::json!({"Name": limit.name, "Soft": limit.soft, "Hard": limit.hard});
        query.push(("ulimits", json(limits.ulimits.iter().map(one).collect())));
    }
    Ok(query)
}

/// What neither builder of an engine can be asked for through its API, or only one of them.
fn refuse(request: &BuildRequest, technique: Technique) -> Result<(), Error> {
    let Technique { buildkit, api } = technique;
    let builder = if buildkit { "BuildKit of a Docker Engine" } else { "the classic builder of a Docker Engine" };
    let refused = |what: &str, why: &str| {
        Err(Error::refused(&format!("{what} with --builder docker"), format!("{builder} {why}")).hint("--builder engine does it"))
    };
    if !request.contexts.is_empty() {
        return refused("--build-context", "takes one context through the engine's API");
    }
    if request.platforms.len() > 1 {
        return refused("more than one --platform", "makes an image of one platform");
    }
    if !request.secrets.is_empty() {
        return refused("--secret", "is not given secrets: the client of its API carries none");
    }
    if !request.ssh.is_empty() {
        return refused("--ssh", "is not given an agent: the client of its API carries none");
    }
    if !request.no_cache_filter.is_empty() {
        return refused("--no-cache-filter", "takes all of the cache or none; --no-cache is possible");
    }
    if request.cache_from.iter().any(|from| matches!(from, CacheFrom::Local { .. })) {
        return refused("--cache-from type=local", "reads caches from images only");
    }
    for to in &request.cache_to {
        match to.dest {
            CacheDest::Inline if buildkit => {}
            CacheDest::Inline => return refused("--cache-to type=inline", "writes no cache into an image; DOCKER_BUILDKIT=1 does"),
            CacheDest::Registry(_) | CacheDest::Local { .. } => {
                return refused("--cache-to", "keeps its cache to itself; type=inline is possible");
            }
        }
    }
    if !request.dns.is_empty() {
        return refused("--dns", "takes name servers from the engine's own settings");
    }
    if !request.allow.is_empty() {
        return refused("--allow", "cannot be asked for entitlements through the engine's API");
    }
    if request.build_args.contains_key("SOURCE_DATE_EPOCH") && !(buildkit && api >= DOCKER_23) {
        return refused("SOURCE_DATE_EPOCH", "puts the time of the build into the image; BuildKit of Docker 23 or newer takes it");
    }
    if request.reproducible {
        return refused("--reproducible", "puts the time of the build into the image");
    }
    if request.parallel > 0 {
        return refused("--parallel", "decides itself how many steps run at once");
    }
    if request.hostname.is_some() && !buildkit {
        return refused("--hostname", "names its containers itself; DOCKER_BUILDKIT=1 can");
    }
    let limits = &request.limits;
    if buildkit {
        if limits.memory.is_some_and(|bytes| bytes.0 > 0) {
            return refused("--memory", "does not limit the memory of steps; DOCKER_BUILDKIT=0 does");
        }
        if limits.cpus.is_some() {
            return refused("--cpus", "does not limit the processors of steps; DOCKER_BUILDKIT=0 does");
        }
        if api < DOCKER_23 && !limits.ulimits.is_empty() {
            return refused("--ulimit", "takes it from Docker 23 on");
        }
        if api < DOCKER_23 && limits.shm_size.is_some_and(|bytes| bytes.0 > 0) {
            return refused("--shm-size", "takes it from Docker 23 on");
        }
    }
    Ok(())
}

/// The config of an image that has no layers: engines do not save such an image, so it is made of what they tell.
fn config_without_layers(docker: &DockerEngine, id: &str) -> Result<Option<Value>, Error> {
    let said = docker.inspect_image(id)?;
    if said["RootFS"]["Layers"].as_array().is_some_and(|layers| !layers.is_empty()) {
        return Ok(None);
    }
    let mut history = vec![];
    for (created_by, created, comment) in docker.image_history(id)? {
        let created = jiff::Timestamp::from_second(created).unwrap_or_default().to_string();
        let mut line = json!({"created": created, "created_by": created_by, "empty_layer": true});
        if !comment.is_empty() {
            line["comment"] = comment.into();
        }
        history.push(line);
    }
    let mut config = json!({
        "architecture": said["Architecture"], "os": said["Os"], "created": said["Created"], "config": said["Config"],
        "rootfs": {"type": "layers", "diff_ids": []}, "history": history,
    });
    for (name, said) in [("variant", &said["Variant"]), ("author", &said["Author"])] {
        if said.as_str().is_some_and(|text| !text.is_empty()) {
            config[name] = said.clone();
        }
    }
    Ok(Some(config))
}

/// What an image is for, in the engine's words.
fn platform_of(said: &Value) -> Platform {
    let text = |key: &str| said[key].as_str().unwrap_or_default().to_owned();
    let variant = Some(text("Variant")).filter(|variant| !variant.is_empty());
    Platform { os: text("Os"), architecture: text("Architecture"), variant, os_version: None }
}

/// What the image must be for: as asked, unless the Dockerfile itself says what its base is for.
fn asked_platform<'a>(dockerfile: &Dockerfile, request: &'a BuildRequest) -> Option<&'a Platform> {
    let stages = &dockerfile.stages;
    let named = |name: &str| stages.iter().position(|stage| stage.name.as_deref().is_some_and(|known| known.eq_ignore_ascii_case(name)));
    let wanted = request.target.as_deref().and_then(|target| named(target).or_else(|| target.parse().ok()));
    let mut at = wanted.unwrap_or(stages.len().saturating_sub(1));
    loop {
        let stage = stages.get(at)?;
        match named(&stage.base).filter(|base| *base < at) {
            Some(base) => at = base,
            None => return request.platforms.first().filter(|_| stage.platform.is_none()),
        }
    }
}

/// The first thing of a Dockerfile that the classic builder does not know.
fn needs_buildkit(dockerfile: &Dockerfile) -> Option<&'static str> {
    dockerfile.stages.iter().flat_map(|stage| &stage.instructions).find_map(|instruction| needs(&instruction.kind))
}

fn needs(instruction: &Said) -> Option<&'static str> {
    match instruction {
        // It fires where the stage is a base.
        Said::Onbuild(text) => ovenbird_dockerfile::parse::parse_instruction(text, '\\').ok().and_then(|trigger| match trigger.kind {
            Said::Onbuild(_) => None,
            kind => needs(&kind),
        }),
        Said::Run(run) if !run.mounts.is_empty() => Some("RUN --mount"),
        Said::Run(run) if !run.heredocs.is_empty() => Some("a here-document"),
        Said::Run(run) if run.network.is_some() => Some("RUN --network"),
        Said::Run(run) if run.security.is_some() => Some("RUN --security"),
        Said::Copy(transfer) | Said::Add(transfer) => {
            let here = transfer.sources.iter().any(|source| matches!(source, CopySource::Heredoc(_)));
            [
                (here, "a here-document"),
                (transfer.link, "--link"),
                (transfer.parents, "--parents"),
                (!transfer.excludes.is_empty(), "--exclude"),
                (transfer.chmod.is_some(), "--chmod"),
                (transfer.checksum.is_some(), "--checksum"),
                (transfer.keep_git_dir.is_some(), "--keep-git-dir"),
            ]
            .into_iter()
            .find_map(|(is, what)| is.then_some(what))
        }
        _ => None,
    }
}

/// Images that the Dockerfile names, as far as they can be read without building: registries to log in to.
fn bases(dockerfile: &Dockerfile, request: &BuildRequest) -> Vec<Reference> {
    let mut values = BTreeMap::new();
    for instruction in &dockerfile.global_args {
        if let Said::Arg(args) = &instruction.kind {
            for arg in args {
                let said = request.build_args.get(&arg.name).cloned().or_else(|| arg.default.clone());
                values.insert(arg.name.clone(), said.unwrap_or_default().trim_matches(['"', '\'']).to_owned());
            }
        }
    }
    let plain = |word: &str| {
        let mut word = word.to_owned();
        for (name, value) in &values {
            word = word.replace(&format!("${{{name}}}"), value).replace(&format!("${name}"), value);
        }
        word.parse::<Reference>().ok()
    };
    let copies = |stage: &ovenbird_dockerfile::ast::Stage| -> Vec<String> {
        let from = stage.instructions.iter().filter_map(|instruction| match &instruction.kind {
            Said::Copy(transfer) => transfer.from.clone(),
            _ => None,
        });
        from.collect()
    };
    dockerfile
        .stages
        .iter()
        .flat_map(|stage| std::iter::once(stage.base.clone()).chain(copies(stage)))
        .filter_map(|word| plain(&word))
        .collect()
}

/// The manifest of the one image that an archive holds.
fn one_image(store: &Store, target: Descriptor) -> Result<Manifest, Error> {
    let mut target = target;
    // An engine with containerd's store gives an index: of the platform, and of what it says about the build.
    for _ in 0..4 {
        let bytes = store.read(&target.digest)?;
        if !target.is_index() {
            return serde_json::from_slice(&bytes).map_err(|error| unreadable(&error.to_string()));
        }
        let index: Index = serde_json::from_slice(&bytes).map_err(|error| unreadable(&error.to_string()))?;
        let mut images = index.manifests.into_iter().filter(|manifest| !manifest.is_attestation() && store.has(&manifest.digest));
        target = images.next().ok_or_else(|| unreadable("its index names no image"))?;
    }
    Err(unreadable("its indexes are too deep"))
}

fn unreadable(reason: &str) -> Error {
    Error::new(Kind::Driver, format!("the Docker Engine gave an image that cannot be read: {reason}"))
}

fn with_docker_type(layer: Descriptor) -> Result<Descriptor, Error> {
    let media_type = match layer.media_type.as_str() {
        media::OCI_LAYER_GZIP => media::DOCKER_LAYER_GZIP,
        media::OCI_LAYER => media::DOCKER_LAYER,
        _ => {
            return Err(Error::new(
                Kind::Usage,
                "oci-mediatypes=false does not go with compression=zstd: Docker's manifests have no such layer",
            ));
        }
    };
    Ok(Descriptor { media_type: media_type.into(), ..layer })
}

fn short(id: &str) -> &str {
    let hex = id.strip_prefix("sha256:").unwrap_or(id);
    hex.get(..12).unwrap_or(hex)
}

/// A failure for the doors.
fn told(failure: BuildFailure, source: &SourceTree) -> Error {
    match failure {
        BuildFailure::Engine(error) => error.into(),
        BuildFailure::Step { name, command, code, tail } => {
            let mut error = Error::new(Kind::Step, format!("{name} exited with code {code}"));
            let dockerfile = Some((source.dockerfile_name.clone(), source.dockerfile.clone()));
            let lines = lines_of(&source.dockerfile, &command);
            error.detail = Some(Box::new(Detail::Step { name, command, code, lines, dockerfile, tail }));
            error
        }
        BuildFailure::Failed { message } => {
            let kind = sort(&message);
            Error::new(kind, "the Docker Engine cannot build the image").because(message)
        }
    }
}

/// Lines of the `RUN` that runs this.
fn lines_of(text: &str, command: &str) -> Option<(u32, u32)> {
    let dockerfile = ovenbird_dockerfile::parse(text).dockerfile;
    let mut found = dockerfile.stages.iter().flat_map(|stage| &stage.instructions).filter(|instruction| {
        instruction
            .original
            .split_once(char::is_whitespace)
            .is_some_and(|(word, rest)| word.eq_ignore_ascii_case("run") && rest.trim() == command)
    });
    let (only, more) = (found.next()?, found.next());
    let line = |at: usize| text.get(..at).map_or(1, |before| u32::try_from(before.matches('\n').count()).unwrap_or(u32::MAX - 1) + 1);
    more.is_none().then(|| (line(only.span.start), line(only.span.end.saturating_sub(1))))
}

/// What sort of failure the engine means.
fn sort(message: &str) -> Kind {
    let says = |words: &[&str]| words.iter().any(|word| message.contains(word));
    if says(&[
        "pull access denied",
        "manifest unknown",
        "manifest for ",
        "failed to resolve source metadata",
        "unauthorized",
        "toomanyrequests",
    ]) {
        Kind::Registry
    } else if says(&["COPY failed", "ADD failed", "failed to compute cache key", "failed to calculate checksum", "failed to walk"]) {
        Kind::Source
    } else if says(&[
        "arse error",
        "unknown instruction",
        "failed to create LLB definition",
        "invalid reference format",
        "requires",
        "unknown flag",
        "Unknown flag",
    ]) {
        Kind::Dockerfile
    } else {
        Kind::Driver
    }
}
