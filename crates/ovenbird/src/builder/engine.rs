//! Our own engine as a [`Builder`].

use std::collections::BTreeMap;
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;

use ovenbird_engine::frontend::{NamedContext, NoCache, Options};
use ovenbird_engine::input::{CacheExport, CacheMode, CacheSource, LocalCache, PullPolicy, Secret, SecretSource, StepLimits};
use ovenbird_engine::plan::{ImageRequest, NetworkMode, ResolvedImage};
use ovenbird_engine::trace::Trace;
use ovenbird_engine::{BuildError, BuildInput, Engine, EngineOptions, ErrorKind, Event, Export, PathOrStdout};
use ovenbird_oci::layer::Compression;
use ovenbird_oci::publish::Target;
use ovenbird_oci::registry::Breaks;
use ovenbird_oci::registry::Client;
use ovenbird_oci::{Descriptor, Digest, Manifest, Platform, Reference};
use ovenbird_sandbox::Level;

use super::{Builder, Image, Job};
use crate::docker_engine::{DockerEngine, DockerEngineError, DockerSettings};
use crate::error::{Detail, Error, Kind};
use crate::request::{
    BuildRequest, CacheDest, CacheFrom, CacheTo, ContextSource, Dest, Entitlement, Network, Output, OutputKind, SecretOrigin, SecretSpec,
    SshSpec,
};
use crate::settings::{Environment, Settings};
use crate::source::SourceTree;

/// Layers are gzip at this level unless an output says otherwise: every registry and runtime reads gzip.
pub(super) const DEFAULT_COMPRESSION: Compression = Compression::Gzip(5);

/// Steps that wait for the network need no processor: so many run at once even on a small machine.
const LEAST_PARALLEL: usize = 4;

/// Builds with `ovenbird_engine` on this machine.
pub struct EngineBuilder {
    engine: Engine,
    environment: Environment,
    docker: DockerSettings,
    parallel: usize,
    level: Option<Level>,
}

impl std::fmt::Debug for EngineBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EngineBuilder").field("docker", &self.docker).finish_non_exhaustive()
    }
}

impl EngineBuilder {
    /// Opens the state directory of `settings`. `level` is what this process has entered (`None`: no step can run), `overlay`
    /// whether overlay mounts work there. Makes no connection and no thread.
    pub fn open(settings: &Settings, environment: &Environment, level: Option<Level>, overlay: bool) -> Result<Self, Error> {
        let options = EngineOptions { root: settings.root.clone(), level, overlay, client: Client::new(settings.client_options()) };
        let engine = Engine::open(options).map_err(|e| told(e, None))?;
        Ok(Self { engine, environment: environment.clone(), docker: settings.docker.clone(), parallel: settings.parallel, level })
    }

    /// Can steps run here?
    pub fn runs_steps(&self) -> bool {
        self.level.is_some()
    }

    /// The engine itself, for the commands that are not builds.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// What a build would run, and why; see [`Engine::plan`].
    pub fn plan(&self, source: &SourceTree, request: &BuildRequest, job: &Job) -> Result<Vec<Trace>, Error> {
        let input = self.input(source, request)?;
        self.engine.plan(&input, &job.sink, &job.cancel).map_err(|e| told(e, Some(source)))
    }

    /// Looks up one image for [`crate::lint`].
    pub fn resolve(&self, source: &SourceTree, request: &BuildRequest, image: &ImageRequest, job: &Job) -> Result<ResolvedImage, Error> {
        let input = self.input(source, &request.nameless())?;
        self.engine.resolve(&input, image, &job.sink, &job.cancel).map_err(|e| told(e, Some(source)))
    }

    /// Exports any image of the store; `epoch` is the time of every file in a root file system, `None`: as it is.
    pub fn export_target(
        &self,
        target: &Descriptor,
        output: &OutputKind,
        names: &[Reference],
        epoch: Option<i64>,
        job: &Job,
    ) -> Result<(), Error> {
        let to = |dest: &Dest| match dest {
            Dest::Path(path) => PathOrStdout::Path(path.clone()),
            Dest::Stdout => PathOrStdout::Stdout,
        };
        let export = match output {
            OutputKind::Image | OutputKind::Registry | OutputKind::CacheOnly => return Ok(()),
            OutputKind::Load => return self.load(target, names, job),
            OutputKind::OciTar(dest) => Export::OciTar(to(dest)),
            OutputKind::OciDir(dir) => Export::OciDir(dir.clone()),
            OutputKind::DockerTar(dest) => Export::DockerTar(to(dest)),
            OutputKind::Local(dir) => Export::RootfsDir(dir.clone()),
            OutputKind::Tar(dest) => Export::RootfsTar(to(dest)),
        };
        self.engine.export(target, &export, names, epoch, &job.sink, &job.cancel).map_err(|e| told(e, None))
    }

    /// Gives the image to the Docker Engine: nothing is sent when it has the image already.
    fn load(&self, target: &Descriptor, names: &[Reference], job: &Job) -> Result<(), Error> {
        let docker = DockerEngine::new(&self.docker)?.until(&job.cancel);
        let config = self.config_of(target)?;
        job.sink.emit(Event::Message { text: format!("loading into the Docker Engine at {docker}") });
        // An engine with the classic store knows images by config, one with the containerd store by manifest.
        for id in [config, target.digest] {
            if docker.image_exists(&id.to_string())? {
                for name in names {
                    docker.tag(&id.to_string(), name)?;
                }
                job.sink.emit(Event::Message { text: format!("the Docker Engine has image {} already: nothing was sent", id.short()) });
                return Ok(());
            }
        }
        // The engine writes to a path; a pipe has one below /proc, so the archive streams without ever being on disk.
        let mut failed = None;
        let sent = docker.load(&job.cancel, |out| {
            let (mut reader, writer) = std::io::pipe()?;
            let path = PathBuf::from(format!("/proc/self/fd/{}", writer.as_raw_fd()));
            std::thread::scope(|scope| {
                let export = scope.spawn(move || {
                    let written =
                        self.engine.export(target, &Export::DockerTar(PathOrStdout::Path(path)), names, None, &job.sink, &job.cancel);
                    drop(writer);
                    written.map_err(|e| told(e, None))
                });
                let copied = std::io::copy(&mut reader, out);
                drop(reader);
                let written = export.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                match (copied, written) {
                    (Ok(_), Err(error)) => {
                        failed = Some(error);
                        Err(std::io::Error::other("the archive cannot be made"))
                    }
                    (copied, _) => copied.map(drop),
                }
            })
        });
        match (failed, sent) {
            (Some(error), Err(DockerEngineError::Body { .. })) => Err(error),
            (_, sent) => Ok(sent.map(drop)?),
        }
    }

    /// Config digest of an image of one platform.
    fn config_of(&self, target: &Descriptor) -> Result<Digest, Error> {
        let manifest: Manifest = serde_json::from_slice(&self.engine.store().read(&target.digest)?).map_err(|_| {
            Error::new(Kind::Usage, format!("image {} has several platforms, a Docker Engine takes one", target.digest.short()))
                .hint("build with one --platform, or push the image to a registry and pull it there")
        })?;
        Ok(manifest.config.digest)
    }

    pub(super) fn input(&self, source: &SourceTree, request: &BuildRequest) -> Result<BuildInput, Error> {
        let options = options(source, request)?;
        if let [_, _, ..] = &options[..] {
            let platforms: Vec<Platform> = options.iter().map(|o| o.platform.clone()).collect();
            one_platform_only(&request.outputs, &platforms)?;
        }
        let mut annotations = request.annotations.clone();
        annotations.extend(request.outputs.iter().flat_map(|o| o.annotations.clone()));
        let processors = std::thread::available_parallelism().map_or(1, usize::from).max(LEAST_PARALLEL);
        Ok(BuildInput {
            dockerfile: source.dockerfile.clone(),
            dockerfile_name: source.dockerfile_name.clone(),
            contexts: source.contexts.clone(),
            origin: source.origin.clone(),
            options,
            secrets: secrets(&request.secrets, &self.environment)?,
            ssh: agents(&request.ssh, &self.environment)?,
            limits: StepLimits {
                memory: request.limits.memory.map(|b| b.0).filter(|bytes| *bytes > 0),
                cpus: request.limits.cpus,
                ulimits: request.limits.ulimits.iter().map(|u| (u.name.clone(), u.soft, u.hard)).collect(),
                shm_size: request.limits.shm_size.map(|b| b.0).filter(|bytes| *bytes > 0),
                dns: request.dns.clone(),
            },
            pull: if request.pull { PullPolicy::Always } else { PullPolicy::Missing },
            compression: agreed(&request.outputs, "compression", |o| o.compression)?.unwrap_or(DEFAULT_COMPRESSION),
            source_date_epoch: request.source_date_epoch()?,
            docker_media_types: agreed(&request.outputs, "oci-mediatypes", |o| o.oci_media_types)?.is_some_and(|oci| !oci),
            parallelism: [request.parallel, self.parallel, processors].into_iter().find(|n| *n > 0).unwrap_or(1),
            annotations,
            publish_to: publish_to(request)?,
            head_start: head_start(request)?,
            logins: source.logins.clone(),
            allow_leak: request.allow_leak.clone(),
            cache_from: request.cache_from.iter().map(cache_source).collect::<Result<_, _>>()?,
            files_wanted: request.outputs.iter().any(|output| matches!(output.kind, OutputKind::Local(_) | OutputKind::Tar(_))),
            cache_inline: request.cache_to.iter().any(|to| to.dest == CacheDest::Inline),
            cache_exported: request.cache_to.iter().any(|to| to.dest != CacheDest::Inline),
        })
    }
}

impl Builder for EngineBuilder {
    fn build(&self, source: &SourceTree, request: &BuildRequest, job: &Job) -> Result<Image, Error> {
        let input = self.input(source, request)?;
        let output = self.engine.build(&input, &job.sink, &job.cancel).map_err(|e| told(e, Some(source)))?;
        Ok(Image {
            target: output.target,
            platforms: output.platforms,
            ran: output.ran,
            cached: output.cached,
            source_date_epoch: input.source_date_epoch,
            exportable: output.exportable,
            breaks: output.breaks,
            bases: super::workshop::bases(output.bases),
        })
    }

    fn name(&self, image: &Image, names: &[Reference]) -> Result<(), Error> {
        names.iter().try_for_each(|name| Ok(self.engine.store().tag(name, &image.target)?))
    }

    fn publish(&self, image: &Image, to: &[Target], job: &Job) -> Result<Breaks, Error> {
        self.engine.push(&image.target, to, &job.sink, &job.cancel).map_err(|e| told(e, None))
    }

    fn export(&self, image: &Image, output: &OutputKind, names: &[Reference], job: &Job) -> Result<(), Error> {
        self.export_target(&image.target, output, names, image.source_date_epoch, job)
    }

    fn export_caches(
        &self,
        image: &Image,
        source: &SourceTree,
        request: &BuildRequest,
        published: &[Reference],
        job: &Job,
    ) -> Result<(), Error> {
        for to in &request.cache_to {
            let Some(export) = cache_export(to)? else { continue };
            let input = self.input(source, request)?;
            match self.engine.export_cache(&input, &image.exportable, &export, published, &job.sink, &job.cancel) {
                Err(error) if to.ignore_error && !matches!(error, BuildError::Cancelled) => {
                    let message = format!("{error}; ignore-error=false makes this a failure");
                    job.sink.emit(Event::Warning { code: "cache-export".into(), message, line: None });
                }
                other => other.map_err(|e| told(e, None))?,
            }
        }
        Ok(())
    }
}

/// What a request says to the frontend: one entry a platform.
pub(crate) fn options(source: &SourceTree, request: &BuildRequest) -> Result<Vec<Options>, Error> {
    let mut platforms: Vec<Platform> = vec![];
    for platform in &request.platforms {
        if !platforms.contains(platform) {
            platforms.push(platform.clone());
        }
    }
    if platforms.is_empty() {
        platforms.push(Platform::host());
    }
    let epoch = request.source_date_epoch()?;
    let mut build_args = request.build_args.clone();
    let given = build_args.contains_key("SOURCE_DATE_EPOCH");
    if epoch.is_some() || given {
        build_args.insert("SOURCE_DATE_EPOCH".into(), epoch.map_or_else(String::new, |epoch| epoch.to_string()));
    }
    let mut entitlements: Vec<String> = request.allow.iter().map(|e| e.as_str().to_owned()).collect();
    // Who says --network=host on the command line allows it.
    if request.network == Network::Host && !request.allow.contains(&Entitlement::NetworkHost) {
        entitlements.push(Entitlement::NetworkHost.as_str().into());
    }
    let no_cache = match (request.no_cache, request.no_cache_filter.as_slice()) {
        (true, _) => NoCache::All,
        (false, []) => NoCache::Off,
        (false, stages) => NoCache::Stages(stages.to_vec()),
    };
    let named = request.contexts.iter().map(|(name, context)| {
        let context = match context {
            ContextSource::Path(_) | ContextSource::Remote(_) => NamedContext::Local,
            ContextSource::Image(image) => NamedContext::Image(image.clone()),
            ContextSource::Target(stage) => NamedContext::Target(stage.clone()),
        };
        (name.clone(), context)
    });
    let options = Options {
        target: request.target.clone(),
        build_args,
        labels: request.labels.clone(),
        platform: platforms[0].clone(),
        build_platform: Platform::host(),
        multi_platform: platforms.len() > 1,
        no_cache,
        contexts: named.collect(),
        network: match request.network {
            Network::Default => NetworkMode::Default,
            Network::None => NetworkMode::None,
            Network::Host => NetworkMode::Host,
        },
        hostname: request.hostname.clone(),
        add_hosts: request.add_hosts.iter().map(|h| (h.name.clone(), h.address)).collect(),
        entitlements,
        ignore: source.contexts.get("context").map(|context| context.ignore.clone()).unwrap_or_default(),
    };
    Ok(platforms.into_iter().map(|platform| Options { platform, ..options.clone() }).collect())
}

/// Refuses outputs that can hold one platform only, before anything is built.
fn one_platform_only(outputs: &[Output], platforms: &[Platform]) -> Result<(), Error> {
    let names: Vec<String> = platforms.iter().map(ToString::to_string).collect();
    for output in outputs {
        let (what, instead) = match output.kind {
            OutputKind::DockerTar(_) => ("-o type=docker", "use -o type=oci, which holds several"),
            OutputKind::Tar(_) => ("-o type=tar", "use -o type=local, which makes a folder for each"),
            OutputKind::Load => ("--load", "push the image to a registry and pull it there"),
            _ => continue,
        };
        return Err(Error::new(Kind::Usage, format!("{what} takes one platform, and {} are asked for: {}", names.len(), names.join(", ")))
            .hint(format!("build with one --platform, or {instead}")));
    }
    Ok(())
}

/// One build makes one set of layers: outputs that ask for different ones cannot both be had.
pub(super) fn agreed<T: PartialEq + Copy>(outputs: &[Output], field: &str, get: impl Fn(&Output) -> Option<T>) -> Result<Option<T>, Error> {
    let mut said = outputs.iter().filter_map(get);
    let first = said.next();
    if said.any(|other| Some(other) != first) {
        return Err(Error::new(Kind::Usage, format!("the outputs disagree about {field}: one build has one"))
            .hint("build twice; the second build takes every step from the cache"));
    }
    Ok(first)
}

/// Where layers may go before the image is done: the first repository that it is pushed to. Nowhere when a plugin may say no.
fn head_start(request: &BuildRequest) -> Result<Option<Reference>, Error> {
    if !request.workflow.pre_publish.is_empty() {
        return Ok(None);
    }
    let pushed = request.outputs.iter().find(|output| output.kind == OutputKind::Registry);
    Ok(pushed.map(|output| request.references(Some(output))).transpose()?.and_then(|names| names.into_iter().next()))
}

/// Every name that the request pushes to, caches included.
fn publish_to(request: &BuildRequest) -> Result<Vec<Reference>, Error> {
    let pushed = request.outputs.iter().filter(|output| output.kind == OutputKind::Registry);
    let mut names = pushed.map(|output| request.references(Some(output))).collect::<Result<Vec<_>, _>>()?.concat();
    for to in &request.cache_to {
        if let CacheDest::Registry(name) = &to.dest {
            names.push(name.parse()?);
        }
    }
    Ok(names)
}

fn cache_source(from: &CacheFrom) -> Result<CacheSource, Error> {
    Ok(match from {
        CacheFrom::Registry(name) => CacheSource::Registry(name.parse()?),
        CacheFrom::Local { src, tag, digest } => CacheSource::Local(LocalCache { dir: src.clone(), tag: tag.clone(), digest: *digest }),
    })
}

/// `None`: the image carries it.
fn cache_export(to: &CacheTo) -> Result<Option<CacheExport>, Error> {
    let place = match &to.dest {
        CacheDest::Inline => return Ok(None),
        CacheDest::Registry(name) => CacheSource::Registry(name.parse()?),
        CacheDest::Local { dest, tag } => CacheSource::Local(LocalCache { dir: dest.clone(), tag: tag.clone(), digest: None }),
    };
    Ok(Some(CacheExport {
        to: place,
        mode: if to.max { CacheMode::Max } else { CacheMode::Min },
        compression: to.compression,
        docker_media_types: to.oci_media_types == Some(false),
        mounts: to.mounts,
    }))
}

pub(crate) fn secrets(specs: &[SecretSpec], environment: &Environment) -> Result<BTreeMap<String, SecretSource>, Error> {
    let mut found = BTreeMap::new();
    for spec in specs {
        let from_file = |path: PathBuf| {
            SecretSource::file(path.clone()).map_err(|error| {
                Error::from_chain(Kind::Source, &error).while_doing(format!("secret {:?}: cannot read {}", spec.id, path.display()))
            })
        };
        let from_variable = |name: &str| match environment.get(name) {
            Some(value) => Ok(SecretSource::Value(Secret(value.as_bytes().to_vec()))),
            None => Err(Error::new(Kind::Source, format!("secret {:?}: the environment variable {name} is not set", spec.id))),
        };
        let source = match &spec.origin {
            SecretOrigin::File(path) => from_file(path.clone())?,
            SecretOrigin::Env(name) => from_variable(name)?,
            SecretOrigin::ById if environment.get(&spec.id).is_some() => from_variable(&spec.id)?,
            SecretOrigin::ById => from_file(PathBuf::from(&spec.id)).map_err(|e| {
                e.hint(format!("neither a variable nor a file is named {0}: say `--secret id={0},src=FILE` or `id={0},env=NAME`", spec.id))
            })?,
        };
        found.insert(spec.id.clone(), source);
    }
    Ok(found)
}

pub(crate) fn agents(specs: &[SshSpec], environment: &Environment) -> Result<BTreeMap<String, PathBuf>, Error> {
    use std::os::unix::fs::FileTypeExt as _;
    let mut found = BTreeMap::new();
    for spec in specs {
        let socket = match &spec.socket {
            Some(socket) => socket.clone(),
            None => environment.get("SSH_AUTH_SOCK").filter(|s| !s.is_empty()).map(PathBuf::from).ok_or_else(|| {
                Error::new(Kind::Source, format!("--ssh {}: there is no ssh agent: SSH_AUTH_SOCK is not set", spec.id))
                    .hint("start one with `eval $(ssh-agent)` and `ssh-add`, or give its socket with `--ssh ID=SOCKET`")
            })?,
        };
        match std::fs::metadata(&socket) {
            Ok(meta) if meta.file_type().is_socket() => {}
            Ok(_) => {
                return Err(Error::new(Kind::Source, format!("--ssh {}: {} is not a socket", spec.id, socket.display()))
                    .hint("key files are not read: add the key to an agent with `ssh-add FILE` and use `--ssh default`"));
            }
            Err(error) => {
                return Err(Error::from_chain(Kind::Source, &error).while_doing(format!(
                    "--ssh {}: cannot use {}",
                    spec.id,
                    socket.display()
                )));
            }
        }
        found.insert(spec.id.clone(), socket);
    }
    Ok(found)
}

/// An error of the engine for the doors, with the Dockerfile it happened in.
pub fn told(error: BuildError, source: Option<&SourceTree>) -> Error {
    let kind = match error.kind() {
        ErrorKind::Bug => Kind::Bug,
        ErrorKind::Usage => Kind::Usage,
        ErrorKind::Configuration => Kind::Configuration,
        ErrorKind::Dockerfile => Kind::Dockerfile,
        ErrorKind::Source => Kind::Source,
        ErrorKind::Step => Kind::Step,
        ErrorKind::Registry => Kind::Registry,
        ErrorKind::Sandbox => Kind::Sandbox,
        ErrorKind::Veto => Kind::Veto,
        ErrorKind::Cancelled => Kind::Cancelled,
    };
    let mut this = Error::from_chain(kind, &error);
    let dockerfile = source.map(|s| (s.dockerfile_name.clone(), s.dockerfile.clone()));
    if kind == Kind::Sandbox {
        this.hints.push("`ovenbird doctor` shows what each isolation level is missing on this machine".into());
    }
    if let BuildError::Instruction { hint, .. } = &error {
        this.hints.push((*hint).into());
    }
    if let BuildError::Leak { id, .. } = &error {
        this.hints.push(
            "do not write it in that step: what a later step removes stays in the layer; use RUN --mount=type=secret and keep it in a variable"
                .into(),
        );
        this.hints.push(format!("--allow-leak {id} lets it out, where it is no secret after all"));
    }
    let line = match &error {
        BuildError::File { line, .. }
        | BuildError::Fetch { line, .. }
        | BuildError::NotGiven { line, .. }
        | BuildError::Instruction { line, .. }
        | BuildError::Secret { line, .. }
        | BuildError::Sandbox { line, .. } => *line,
        _ => None,
    };
    this.detail = match error {
        BuildError::Dockerfile { name, text, diagnostics, .. } => Some(Box::new(Detail::Dockerfile { name, text, diagnostics })),
        BuildError::Step { name, lines, command, code, out_of_memory, tail } => {
            if out_of_memory {
                this.hints.push("give the step more with --memory".into());
            } else if let Some(hint) = code_hint(code) {
                this.hints.push(hint.into());
            }
            Some(Box::new(Detail::Step { name, command, code, lines, dockerfile, tail }))
        }
        damage if damage.is_damage() => Some(Box::new(Detail::Damage)),
        _ => line.zip(dockerfile).map(|(line, dockerfile)| Box::new(Detail::Instruction { line, dockerfile })),
    };
    this
}

/// What a shell means by its own codes.
fn code_hint(code: i32) -> Option<&'static str> {
    Some(match code {
        126 => "code 126: the command was found but cannot be executed (permissions, or a format of another machine)",
        127 => "code 127: the command was not found in the image",
        137 => "code 137: killed (SIGKILL), often because memory ran out",
        139 => "code 139: crashed (SIGSEGV)",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(vars: &[(&str, &str)]) -> Environment {
        Environment::fixed(vars.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(), "/", None)
    }

    #[test]
    fn secrets_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("s");
        std::fs::write(&file, "x").unwrap();
        let file = file.display();
        for (spec, vars, expect) in [
            (format!("id=a,src={file}"), &[][..], "File("),
            ("id=a,env=T".into(), &[("T", "hunter2")][..], "Value(***)"),
            ("id=a,env=T".into(), &[][..], "! secret \"a\": the environment variable T is not set"),
            ("id=T".into(), &[("T", "hunter2")][..], "Value(***)"),
            ("id=/nowhere/x".into(), &[][..], "! secret \"/nowhere/x\": cannot read /nowhere/x"),
            (format!("id=a,src={}", dir.path().display()), &[][..], "! secret \"a\": "),
            ("id=a,src=/dev/zero".into(), &[][..], "! secret \"a\": cannot read /dev/zero: it is a device, expected a regular file"),
        ] {
            let got = match secrets(&[spec.parse().unwrap()], &environment(vars)) {
                Ok(found) => format!("{:?}", found.values().next().unwrap()),
                Err(error) => format!("! {error}"),
            };
            assert!(got.starts_with(expect), "{spec}: {got}");
        }
    }

    #[test]
    fn agents_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("agent");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        std::fs::write(dir.path().join("id_rsa"), "").unwrap();
        let socket = socket.to_str().unwrap().to_owned();
        for (spec, vars, ok) in [
            ("default".to_owned(), &[("SSH_AUTH_SOCK", socket.as_str())][..], true),
            (format!("git={socket}"), &[], true),
            ("default".into(), &[], false),
            (format!("git={}/id_rsa", dir.path().display()), &[], false),
            (format!("git={}/none", dir.path().display()), &[], false),
        ] {
            assert_eq!(agents(&[spec.parse().unwrap()], &environment(vars)).is_ok(), ok, "{spec}");
        }
    }

    #[test]
    fn outputs_must_agree() {
        let of = |rows: &[&str]| {
            let outputs: Vec<Output> = rows.iter().map(|r| r.parse().unwrap()).collect();
            agreed(&outputs, "compression", |o| o.compression).map_err(|e| e.kind)
        };
        assert_eq!(of(&["type=image", "type=oci,compression=zstd"]), Ok(Some(Compression::Zstd(3))));
        assert_eq!(of(&["type=image,compression=gzip", "type=oci,compression=zstd"]), Err(Kind::Usage));
        assert_eq!(of(&[]), Ok(None));
    }

    #[test]
    fn outputs_for_one_platform_are_refused_early() {
        let platforms: Vec<Platform> = ["linux/amd64", "linux/arm64"].iter().map(|p| p.parse().unwrap()).collect();
        let told = |kind| one_platform_only(&[Output::new(kind)], &platforms);
        for kind in [OutputKind::DockerTar(Dest::Stdout), OutputKind::Tar(Dest::Stdout), OutputKind::Load] {
            assert_eq!(told(kind).unwrap_err().kind, Kind::Usage);
        }
        assert!(told(OutputKind::OciTar(Dest::Stdout)).is_ok() && told(OutputKind::Local("x".into())).is_ok());
    }
}
