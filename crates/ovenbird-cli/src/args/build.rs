//! `ovenbird build`.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use clap::{ArgAction, Args};
use ovenbird::choice::On;
use ovenbird::project::Project;
use ovenbird::request::build_json::{self, Input};
use ovenbird::request::workflow::{PluginSpec, Workflow};
use ovenbird::request::{
    AddHost, ByteSize, CacheDest, DockerfileFrom, Entitlement, Limits, Lookup, Network, Output, OutputKind, SecretSpec, SshSpec, Ulimit,
};
use ovenbird::{BuildRequest, BuilderKind, Environment, Error, Kind};

use super::refused::Refused;
use super::subject::Subject;

/// Build an image from a Dockerfile.
///
/// The image is kept on this machine under the names of -t. Its digest, the one a registry shows, is the only thing printed to standard
/// output. --push sends it to its registry, --load to the Docker Engine, -o writes it somewhere else.
#[derive(Debug, Args)]
pub(crate) struct BuildArgs {
    #[command(flatten)]
    subject: Subject,
    /// Image of ovenbird.toml to build, like its name as an argument, also where a folder has the same name. Repeatable
    #[arg(long = "image", value_name = "IMAGE")]
    images: Vec<String>,
    /// Of the images of ovenbird.toml, build only those that depend on this file, or on an image that does. Repeatable
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::AnyPath)]
    changed: Vec<PathBuf>,
    /// Name of the image, with an optional tag [default tag: latest, or those of the setting `tags`]. Variables: {id}, {git.sha}, {git.short},
    /// {git.branch}, {git.tag}, {git.major}, {git.minor}, {date}, {label:NAME}
    #[arg(short, long = "tag", value_name = "NAME[:TAG]")]
    tags: Vec<String>,
    /// Secret for RUN --mount=type=secret: `id=token,src=FILE` or `id=token,env=NAME`. Never in a layer, the cache or a log
    #[arg(long = "secret", value_name = "id=ID[,src=FILE|,env=NAME]")]
    secrets: Vec<SecretSpec>,
    /// Let this secret (its id), or the password for this registry, be in the image: without it such an image is refused with code 9
    #[arg(long = "allow-leak", value_name = "ID|REGISTRY")]
    allow_leak: Vec<String>,
    /// Ssh agent for RUN --mount=type=ssh: `default` (SSH_AUTH_SOCK) or ID=SOCKET
    #[arg(long = "ssh", value_name = "default|ID[=SOCKET]")]
    ssh: Vec<SshSpec>,

    /// Where the build runs: `here` in this process, `process` in one of its own, `container` in a container of the
    /// Docker Engine (`container,socket`: that engine builds; `,image=NAME`: in this image), `ssh://[USER@]HOST[:PORT]` on another machine
    /// (several, separated by commas: the first with a free slot), `pool` on one of the setting [pool], `kubernetes[,KEY=VALUE]...` in a pod of
    /// a cluster (docs/guides/kubernetes.md has the keys; setting [kubernetes]), `prefect[,pool=NAME]` as a flow run of a Prefect server
    /// [setting: on; env: OVENBIRD_ON]
    #[arg(long, value_name = "PLACE")]
    pub(crate) on: Option<On>,
    /// What builds: `engine` (Ovenbird's own), `docker` (the Docker Engine of DOCKER_HOST or the docker context), or `auto` [setting: builder;
    /// env: OVENBIRD_BUILDER]
    #[arg(long, value_name = "BUILDER")]
    pub(crate) builder: Option<BuilderKind>,

    /// Push the image to the registries of its names (short for -o type=registry)
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = ArgAction::Set, value_name = "BOOL", hide_default_value = true, help_heading = "Output")]
    push: bool,
    /// Load the image into the Docker Engine (short for -o type=docker)
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = ArgAction::Set, value_name = "BOOL", hide_default_value = true, help_heading = "Output")]
    load: bool,
    /// Where the result goes: `type=image|registry|docker|oci|tar|local|cacheonly` with dest=, name=, push=, tar=false, compression=,
    /// compression-level=, oci-mediatypes=; a folder alone is `type=local,dest=DIR`. Repeatable
    #[arg(short, long = "output", value_name = "type=TYPE[,KEY=VALUE]", help_heading = "Output")]
    outputs: Vec<Output>,
    /// Label of the image
    #[arg(long = "label", value_name = "NAME=VALUE", help_heading = "Output")]
    labels: Vec<String>,
    /// Annotation of the manifest
    #[arg(long = "annotation", value_name = "NAME=VALUE", help_heading = "Output")]
    annotations: Vec<String>,
    /// Same input, same digest: every time in the image is SOURCE_DATE_EPOCH, or 1970 when that is not set
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = ArgAction::Set, value_name = "BOOL", hide_default_value = true, help_heading = "Output")]
    reproducible: bool,
    /// Write the image id (digest of the configuration) to a file; `-`: to standard output, instead of the digest
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub(crate) iidfile: Option<PathBuf>,
    /// Write digests, names and timings to a JSON file; `-`: to standard output, instead of the digest
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub(crate) metadata_file: Option<PathBuf>,
    /// Show no progress: only the digest, or the error
    #[arg(short, long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = ArgAction::Set, value_name = "BOOL", hide_default_value = true, help_heading = "Output")]
    pub(crate) quiet: bool,

    /// Build only when no image of the same content is there, on this machine or in the registry of its name; then take that one. Needs a
    /// name with `{id}`. `--if-needed=local` asks no registry
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", value_parser = if_needed, value_name = "WHERE", hide_default_value = true, help_heading = "Cache")]
    if_needed: IfNeeded,
    /// With --if-needed: build anyway
    #[arg(long, help_heading = "Cache")]
    force: bool,
    /// Run every step anew
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = ArgAction::Set, value_name = "BOOL", hide_default_value = true, help_heading = "Cache")]
    no_cache: bool,
    /// Run the steps of these stages anew
    #[arg(long, value_name = "STAGE", value_delimiter = ',', help_heading = "Cache")]
    no_cache_filter: Vec<String>,
    /// Take results of other machines from here, several may be given: `type=registry,ref=IMAGE` (or IMAGE alone) or `type=local,src=DIR`.
    /// What is not there, or not whole, is built
    #[arg(long = "cache-from", value_name = "IMAGE|type=TYPE[,KEY=VALUE]", help_heading = "Cache")]
    cache_from: Vec<String>,
    /// Give results to other machines: `type=registry,ref=IMAGE`, `type=inline` or `type=local,dest=DIR`, with mode=min|max, compression=,
    /// compression-level=, oci-mediatypes=, ignore-error=false and mounts=true (also what is in cache mounts). mode=max has every stage, mode=min what is in the image
    #[arg(long = "cache-to", value_name = "IMAGE|type=TYPE[,KEY=VALUE]", help_heading = "Cache")]
    cache_to: Vec<String>,
    /// Ask the registry for base images even when they are here
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = ArgAction::Set, value_name = "BOOL", hide_default_value = true, help_heading = "Cache")]
    pull: bool,

    /// Network of steps that do not say: default, none or host (which also allows RUN --network=host)
    #[arg(long, value_name = "MODE", default_value = "default", hide_default_value = true, value_parser = network, help_heading = "Steps")]
    network: Network,
    /// One more line of /etc/hosts
    #[arg(long = "add-host", value_name = "NAME:IP", help_heading = "Steps")]
    add_hosts: Vec<AddHost>,
    /// Name server instead of the machine's
    #[arg(long = "dns", value_name = "IP", help_heading = "Steps")]
    dns: Vec<IpAddr>,
    /// Host name that steps see
    #[arg(long, value_name = "NAME", help_heading = "Steps")]
    hostname: Option<String>,
    /// Let the Dockerfile ask for more: network.host, security.insecure
    #[arg(long = "allow", value_name = "ENTITLEMENT", value_delimiter = ',', help_heading = "Steps")]
    allow: Vec<Entitlement>,
    /// Memory limit of each step, for example 512m
    #[arg(short, long, value_name = "BYTES", help_heading = "Steps")]
    memory: Option<ByteSize>,
    /// Processors that each step may use, for example 1.5
    #[arg(long, value_name = "NUMBER", help_heading = "Steps")]
    cpus: Option<f64>,
    /// Resource limit of processes, for example nofile=1024:4096
    #[arg(long = "ulimit", value_name = "NAME=SOFT[:HARD]", help_heading = "Steps")]
    ulimits: Vec<Ulimit>,
    /// Size of /dev/shm [default: 64m]
    #[arg(long, value_name = "BYTES", help_heading = "Steps")]
    shm_size: Option<ByteSize>,
    /// Steps that run at once [default: one a processor, at least four; env: OVENBIRD_PARALLEL]
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..), help_heading = "Steps")]
    parallel: Option<u16>,

    /// Run a plugin in a phase (pre_build, pre_publish, post_build, exit): `PHASE:NAME,KEY=VALUE…`, in the order of the flags. Keys of every
    /// plugin: on_failure=fail|warn, required=, timeout=, secret=ID, file=PROGRAM; the others are its arguments
    #[arg(long = "plugin", value_name = "PHASE:NAME[,KEY=VALUE]", help_heading = "Workflow")]
    plugins: Vec<PluginSpec>,
    /// Run the plugins of a file (TOML or JSON), before those of --plugin
    #[arg(long = "workflow", value_name = "FILE", help_heading = "Workflow")]
    workflows: Vec<PathBuf>,
    /// Build what a build.json of dock says: source, names, registries and plugins are from there
    #[arg(long, value_name = "FILE", conflicts_with = "input", help_heading = "Workflow")]
    build_json: Option<PathBuf>,
    /// Where dock's build.json is: `path[,path=FILE]` [default: /run/share/build.json], `env[,name=VARIABLE]` [default: BUILD_JSON], or auto
    #[arg(long, value_name = "path|env|auto", value_parser = input, help_heading = "Workflow")]
    input: Option<Input>,
    /// Change the build.json: KEY=VALUE, or PLUGINS.NAME.ARGUMENT=VALUE such as prebuild_plugins.labels.overwrite=false
    #[arg(long = "substitute", value_name = "KEY=VALUE", help_heading = "Workflow")]
    substitutions: Vec<String>,

    /// Say of every step that runs why it did not come from the cache; `ovenbird why` says it afterwards
    #[arg(long)]
    pub(crate) explain: bool,
    /// Check the Dockerfile and build nothing, like `ovenbird lint` (short for --call=check); fails with code 4 when there are findings
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value_t = false, action = ArgAction::Set, value_name = "BOOL", hide_default_value = true)]
    check: bool,
    /// What to do: build or check
    #[arg(long, value_name = "METHOD", value_parser = call)]
    call: Option<Call>,

    #[command(flatten)]
    refused: Refused,
}

/// Images of a project that are to be built.
#[derive(Debug)]
pub(crate) struct ProjectBuild {
    pub(crate) project: Project,
    /// Those that were asked for.
    pub(crate) asked: Vec<String>,
    /// What the flags say of each.
    pub(crate) request: BuildRequest,
}

/// `--if-needed`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct IfNeeded(Option<Lookup>);

fn if_needed(text: &str) -> Result<IfNeeded, String> {
    Ok(IfNeeded(match text {
        "" | "true" | "registry" => Some(Lookup::Registry),
        "local" => Some(Lookup::Local),
        "false" => None,
        _ => return Err("expected registry (the same as none), local or false".into()),
    }))
}

/// `--call`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Build,
    Check,
}

fn call(text: &str) -> Result<Call, String> {
    match text {
        "build" => Ok(Call::Build),
        "check" | "lint" | "check,format=text" | "lint,format=text" => Ok(Call::Check),
        "check,format=json" | "lint,format=json" => {
            Err("buildx's form of the findings is not made; `ovenbird lint --format json` has its own".into())
        }
        _ => Err("only build and check are supported".into()),
    }
}

/// `--input`.
fn input(text: &str) -> Result<Input, String> {
    let (kind, rest) = text.split_once(',').unwrap_or((text, ""));
    let value = |key: &str, default: &str| match rest.split_once('=') {
        None if rest.is_empty() => Ok(default.to_owned()),
        Some((said, value)) if said == key && !value.is_empty() => Ok(value.to_owned()),
        _ => Err(format!("expected {kind} or {kind},{key}=…")),
    };
    match kind {
        "path" => Ok(Input::Path(value("path", build_json::DEFAULT_PATH)?.into())),
        "env" => Ok(Input::Variable(value("name", build_json::DEFAULT_VARIABLE)?)),
        "auto" if rest.is_empty() => Ok(Input::Auto),
        "osv3" => Err("builds of OpenShift 3 are not read; write their source and output into a build.json".into()),
        _ => Err("expected path, env or auto".into()),
    }
}

fn network(text: &str) -> Result<Network, String> {
    match text {
        "" | "default" | "bridge" | "sandbox" => Ok(Network::Default),
        "none" => Ok(Network::None),
        "host" => Ok(Network::Host),
        _ => Err("expected default, none or host; networks of a Docker Engine are not known here".into()),
    }
}

/// `NAME=VALUE` pairs; the last of a name wins.
fn pairs(flag: &str, rows: &[String]) -> Result<BTreeMap<String, String>, Error> {
    rows.iter()
        .map(|row| match row.split_once('=').unwrap_or((row, "")) {
            ("", _) => Err(Error::new(Kind::Usage, format!("{flag} {row:?} has no name")).hint(format!("write {flag} NAME=VALUE"))),
            (name, value) => Ok((name.to_owned(), value.to_owned())),
        })
        .collect()
}

/// An empty value asks for nothing: scripts write it when they have no cache.
fn caches<T: std::str::FromStr<Err = ovenbird::request::ParseValueError>>(flag: &str, rows: &[String]) -> Result<Vec<T>, Error> {
    let given = rows.iter().filter(|row| !row.is_empty());
    given
        .map(|row| {
            row.parse().map_err(|e: ovenbird::request::ParseValueError| {
                Error::new(Kind::Usage, format!("{flag} {row:?} cannot be used")).because(e.reason)
            })
        })
        .collect()
}

impl BuildArgs {
    /// Is the Dockerfile to be checked only?
    pub(crate) fn checks_only(&self) -> bool {
        self.check || self.call == Some(Call::Check)
    }

    /// Flags that ask for more than findings. Those that say how steps run, or what the image is called, are about the build that is checked.
    fn refuse_beside_check(&self) -> Result<(), Error> {
        let asks = [
            ("--push", self.push),
            ("--load", self.load),
            ("--output", !self.outputs.is_empty()),
            ("--iidfile", self.iidfile.is_some()),
            ("--metadata-file", self.metadata_file.is_some()),
            ("--cache-to", self.cache_to.iter().any(|row| !row.is_empty())),
            ("--if-needed", self.if_needed.0.is_some()),
            ("--force", self.force),
            ("--explain", self.explain),
            ("--plugin", !self.plugins.is_empty()),
            ("--workflow", !self.workflows.is_empty()),
        ];
        match asks.iter().find(|(_, said)| *said && self.checks_only()) {
            Some((flag, _)) => {
                let why = "a check builds nothing, runs no plugin and writes findings only";
                Err(Error::refused(&format!("{flag} with --check"), why).hint(format!("leave out {flag}, or --check")))
            }
            None => Ok(()),
        }
    }

    /// What the flags say of images of a project; `None`: they are about a context.
    pub(crate) fn project(&self, environment: &Environment) -> Result<Option<ProjectBuild>, Error> {
        let missing = |flag: &str| Error::new(Kind::Usage, format!("{flag} is about the images of ovenbird.toml, and there is none here"));
        if self.build_json.is_some() || self.input.is_some() {
            return if self.images.is_empty() && self.changed.is_empty() {
                Ok(None)
            } else {
                Err(Error::new(Kind::Usage, "--image and --changed are about ovenbird.toml, and a build.json was named"))
            };
        }
        let found = match self.images.as_slice() {
            [] => self.subject.images(environment)?,
            images => {
                let project = Project::find(environment.working_directory())?.ok_or_else(|| missing("--image"))?;
                let mut asked = self.subject.words.clone();
                if let Some(context) = asked.iter().find(|word| !project.has(word)) {
                    let told = format!("--image names images of ovenbird.toml, and {context:?} beside it is none of them");
                    return Err(Error::new(Kind::Usage, told).hint("what an image is built from is said in ovenbird.toml"));
                }
                asked.extend(images.iter().filter(|image| !self.subject.words.contains(image)).cloned());
                Some((project, asked))
            }
        };
        let Some((project, mut asked)) = found else {
            return match (self.images.is_empty(), self.changed.is_empty()) {
                (true, true) => Ok(None),
                (_, false) => Err(missing("--changed")),
                (false, _) => Err(missing("--image")),
            };
        };
        project.order(asked.iter().map(String::as_str))?;
        if !self.changed.is_empty() {
            let touched = project.touched(&self.changed)?;
            asked.retain(|name| touched.contains(name.as_str()));
        }
        self.refused.check()?;
        self.refuse_beside_check()?;
        let request = self.assemble(self.subject.request_of_project(environment)?, environment)?;
        let mut single = self.subject.of_one_image();
        single.extend((!self.tags.is_empty()).then_some("--tag"));
        single.extend(self.iidfile.is_some().then_some("--iidfile"));
        single.extend(request.outputs.iter().any(|o| !matches!(o.kind, OutputKind::Registry | OutputKind::Load)).then_some("--output"));
        single.extend(request.cache_to.iter().any(|to| to.dest != CacheDest::Inline).then_some("--cache-to"));
        single.extend(self.checks_only().then_some("--check"));
        if let (Some(flag), [_, _, ..]) = (single.first(), asked.as_slice()) {
            return Err(Error::new(
                Kind::Usage,
                format!("{flag} is about one image, and {} are to be built: {}", asked.len(), asked.join(", ")),
            )
            .hint("name one: `ovenbird build NAME`, or say it in ovenbird.toml"));
        }
        if self.checks_only() {
            return Err(Error::refused("--check of an image of ovenbird.toml", "it checks one Dockerfile")
                .hint("`ovenbird lint PATH` checks the Dockerfile of that folder"));
        }
        Ok(Some(ProjectBuild { project, asked, request }))
    }

    /// The request that these flags say.
    pub(crate) fn request(&self, environment: &Environment) -> Result<BuildRequest, Error> {
        self.refused.check()?;
        self.refuse_beside_check()?;
        let subject = self.subject.request(environment)?;
        let Some(said) = self.build_json(environment)? else { return self.assemble(subject, environment) };
        if self.subject.words.iter().any(|word| word != ".") || subject.dockerfile != DockerfileFrom::Default {
            return Err(Error::new(Kind::Usage, "the build.json says what is built: a PATH or a -f FILE beside it would be ignored"));
        }
        let mut request = self.assemble(BuildRequest { source: said.source, dockerfile: said.dockerfile, ..subject }, environment)?;
        request.names.splice(..0, said.names);
        request.outputs.extend(said.outputs.into_iter().filter(|output| !self.outputs.contains(output)));
        let typed = std::mem::replace(&mut request.workflow, said.workflow);
        request.workflow.extend(typed);
        Ok(request)
    }

    fn assemble(&self, mut request: BuildRequest, environment: &Environment) -> Result<BuildRequest, Error> {
        if let Some(epoch) = environment.get("SOURCE_DATE_EPOCH") {
            request.build_args.entry("SOURCE_DATE_EPOCH".to_owned()).or_insert_with(|| epoch.to_owned());
        }
        let mut annotations = BTreeMap::new();
        for row in &self.annotations {
            let (name, value) = annotation(row)?;
            annotations.insert(name, value);
        }
        Ok(BuildRequest {
            names: self.tags.clone(),
            labels: pairs("--label", &self.labels)?,
            annotations,
            if_needed: self.if_needed.0,
            force: self.force,
            no_cache: self.no_cache,
            no_cache_filter: self.no_cache_filter.clone(),
            pull: self.pull,
            cache_from: caches("--cache-from", &self.cache_from)?,
            cache_to: caches("--cache-to", &self.cache_to)?,
            outputs: self.outputs()?,
            secrets: self.secrets.clone(),
            allow_leak: self.allow_leak.clone(),
            ssh: self.ssh.clone(),
            network: self.network,
            add_hosts: self.add_hosts.clone(),
            dns: self.dns.clone(),
            hostname: self.hostname.clone(),
            allow: self.allow.clone(),
            limits: Limits { memory: self.memory, cpus: self.cpus, ulimits: self.ulimits.clone(), shm_size: self.shm_size },
            reproducible: self.reproducible,
            parallel: self.parallel.map_or(0, usize::from),
            workflow: self.workflow(environment)?,
            ..request
        })
    }

    /// What a build.json says, if one was named.
    fn build_json(&self, environment: &Environment) -> Result<Option<BuildRequest>, Error> {
        let input = match (&self.build_json, &self.input) {
            (Some(path), _) => Input::Path(path.clone()),
            (None, Some(input)) => input.clone(),
            (None, None) if self.substitutions.is_empty() => return Ok(None),
            (None, None) => {
                return Err(Error::new(Kind::Usage, "--substitute changes a build.json, and none was named").hint("add --build-json FILE"));
            }
        };
        build_json::read(&input, environment).and_then(|text| build_json::parse(&text, &self.substitutions)).map(Some)
    }

    fn workflow(&self, environment: &Environment) -> Result<Workflow, Error> {
        let mut workflow = Workflow::default();
        for file in &self.workflows {
            workflow.extend(Workflow::read(&environment.absolute(file))?);
        }
        for PluginSpec { phase, entry } in &self.plugins {
            workflow.push(*phase, entry.clone());
        }
        Ok(workflow)
    }

    /// `--push` and `--load` are short for an output, unless `-o` has that one already.
    fn outputs(&self) -> Result<Vec<Output>, Error> {
        let mut outputs = self.outputs.clone();
        if self.push {
            if let Some(image) = outputs.iter_mut().find(|o| matches!(o.kind, OutputKind::Image | OutputKind::Registry)) {
                image.kind = OutputKind::Registry;
            } else {
                outputs.push(Output::new(OutputKind::Registry));
            }
        }
        if self.load && !outputs.iter().any(|o| o.kind == OutputKind::Load) {
            outputs.push(Output::new(OutputKind::Load));
        }
        if outputs.len() > 1 && outputs.iter().any(|o| o.kind == OutputKind::CacheOnly) {
            return Err(Error::new(Kind::Usage, "type=cacheonly keeps nothing, and other outputs were asked for"));
        }
        Ok(outputs)
    }
}

/// `[LEVEL:]KEY=VALUE`. As in buildx, what is before a colon is a level unless it looks like a key (`org.example/a:b`).
fn annotation(row: &str) -> Result<(String, String), Error> {
    let wrong = |why: &str| Error::new(Kind::Usage, format!("--annotation {row:?} {why}: expected KEY=VALUE or manifest:KEY=VALUE"));
    let (name, value) = row.split_once('=').ok_or_else(|| wrong("has no value"))?;
    // `manifest[linux/amd64]`
    let known = |level: &str| {
        let kind = level.split_once('[').map_or(level, |(kind, _)| kind);
        matches!(kind, "manifest" | "index" | "manifest-descriptor" | "index-descriptor")
    };
    let name = match name.split_once(':') {
        Some(("manifest", name)) => name,
        Some((levels, _)) if levels.split(',').all(known) => {
            return Err(Error::refused(&format!("--annotation {levels}:…"), "annotations go on manifests only, without platforms"));
        }
        Some((levels, _)) if !levels.contains(['.', '/']) => return Err(wrong(&format!("has the unknown level {levels:?}"))),
        _ => name,
    };
    if name.is_empty() { Err(wrong("has no name")) } else { Ok((name.to_owned(), value.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command};
    use clap::Parser as _;

    fn request(line: &str) -> Result<BuildRequest, String> {
        let vars = [("FROM_ENV", "v"), ("SECRET", "hunter2")].map(|(k, v)| (k.to_owned(), v.to_owned()));
        request_with(line, &Environment::fixed(vars.into(), "/", None))
    }

    fn request_with(line: &str, environment: &Environment) -> Result<BuildRequest, String> {
        let cli = Cli::try_parse_from(["ovenbird", "build"].into_iter().chain(line.split(' ').filter(|w| !w.is_empty())))
            .map_err(|e| format!("! {}", e.to_string().trim_start_matches("error: ")))?;
        let Command::Build(args) = cli.command else { return Err("not build".into()) };
        args.request(environment).map_err(|e| format!("! {} {}", e.kind.exit_code(), e))
    }

    #[test]
    fn what_flags_say() {
        for (line, expect) in [
            ("", "source: Path(\".\")"),
            ("-", "source: Stdin"),
            ("dir -f x/D", "dockerfile: Path(\"x/D\")"),
            (". -f -", "dockerfile: Stdin"),
            (". -t a -t b:1", "names: [\"a\", \"b:1\"]"),
            (". --tag=a", "names: [\"a\"]"),
            (". --build-arg A=1 --build-arg B=", "build_args: {\"A\": \"1\", \"B\": \"\"}"),
            (". --build-arg FROM_ENV --build-arg UNSET", "build_args: {\"FROM_ENV\": \"v\"}"),
            (". --build-arg A=b=c", "{\"A\": \"b=c\"}"),
            (". --target s", "target: Some(\"s\")"),
            (". --platform linux/amd64,linux/arm64", "\"arm64\""),
            (". --secret id=a,env=SECRET", "secrets: [SecretSpec { id: \"a\", origin: Env(\"SECRET\") }]"),
            (". --allow-leak a --allow-leak r.io:5000", "allow_leak: [\"a\", \"r.io:5000\"]"),
            (". --ssh default", "ssh: [SshSpec { id: \"default\", socket: None }]"),
            (". --label a=b --label c", "labels: {\"a\": \"b\", \"c\": \"\"}"),
            (". --annotation a=b --annotation manifest:c=d", "annotations: {\"a\": \"b\", \"c\": \"d\"}"),
            (". --annotation org.x/y:z=1", "annotations: {\"org.x/y:z\": \"1\"}"),
            (". --no-cache", "no_cache: true"),
            (". --no-cache=false", "no_cache: false"),
            (". --no-cache-filter a,b", "no_cache_filter: [\"a\", \"b\"]"),
            (". --cache-from a:cache --cache-from type=local,src=d", "cache_from: [Registry(\"a:cache\"), Local { src: \"d\""),
            (". --cache-to type=registry,ref=a:cache,mode=max", "cache_to: [CacheTo { dest: Registry(\"a:cache\"), max: true"),
            (". --pull", "pull: true"),
            (". --push", "kind: Registry"),
            (". --push -o type=image,name=a", "[Output { kind: Registry, names: [\"a\"]"),
            (". --load", "kind: Load"),
            (". -o out", "kind: Local(\"out\")"),
            (". -o type=oci,dest=a --output type=tar,dest=b", "kind: Tar(Path(\"b\"))"),
            (". --network host", "network: Host"),
            (". --network bridge", "network: Default"),
            (". --add-host a:1.2.3.4", "address: 1.2.3.4"),
            (". --dns 1.1.1.1", "dns: [1.1.1.1]"),
            (". --hostname h", "hostname: Some(\"h\")"),
            (". --allow network.host", "allow: [NetworkHost]"),
            (". -m 1g --cpus 1.5 --shm-size 1m --ulimit nofile=1", "memory: Some(ByteSize(1073741824)), cpus: Some(1.5)"),
            (". --reproducible", "reproducible: true"),
            (". --parallel 3", "parallel: 3"),
            (". --build-context b=dir --build-context i=docker-image://debian", "\"b\": Path(\"dir\")"),
            (". --build-context a=https://me:pw@x/y.git", "\"a\": Remote(\"https://***@x/y.git\")"),
            ("https://me:pw@x/y.git#main", "source: Remote(\"https://***@x/y.git#main\")"),
            (". --provenance=false --sbom=false --attest=type=sbom,disabled=true --rm --force-rm --compress", "source"),
            (". --squash=false --call build --isolation default", "source"),
            (". --call check,format=text", "source"),
            (". --check=false --push -t x", "kind: Registry"),
            (". --check --push=false --cache-to= --if-needed=false -t x --memory 1g", "names: [\"x\"]"),
            (". --sbom=0 --provenance=F --cache-from= --cache-to=", "source"),
        ] {
            match request(line) {
                Ok(request) => assert!(format!("{request:?}").contains(expect), "{line}: {request:?}"),
                Err(error) => panic!("{line}: {error}"),
            }
        }
        assert!(!format!("{:?}", request(". --secret id=a,env=SECRET").unwrap()).contains("hunter2"));
    }

    #[test]
    fn what_is_refused() {
        for (line, expect) in [
            (". --cache-from type=gha", "! 2 --cache-from \"type=gha\" cannot be used: caches of type=gha are not supported"),
            (". --cache-to type=inline,mode=max", "! 2 --cache-to \"type=inline,mode=max\" cannot be used: mode=max does not go with"),
            (". --attest type=sbom", "! 2 --attest is not supported"),
            (". --provenance=mode=max", "! 2 --provenance is not supported"),
            (". --sbom true", "! 2 --sbom is not supported"),
            (". --builder b", "! invalid value 'b' for '--builder <BUILDER>': \"b\" is no builder"),
            (". --isolation hyperv", "! 2 --isolation is not supported"),
            (". --squash", "! 2 --squash is not supported"),
            (". --cgroup-parent /x", "! 2 --cgroup-parent is not supported"),
            (". --security-opt seccomp=unconfined", "! 2 --security-opt is not supported"),
            (". --call outline", "! invalid value 'outline' for '--call"),
            (
                ". --call check,format=json",
                "! invalid value 'check,format=json' for '--call <METHOD>': buildx's form of the findings is not made; `ovenbird lint",
            ),
            (". --check --push -t x", "! 2 --push with --check is not supported"),
            (". --check --load", "! 2 --load with --check"),
            (". --call check -o type=oci,dest=x", "! 2 --output with --check"),
            (". --check --iidfile f", "! 2 --iidfile with --check"),
            (". --check --metadata-file f", "! 2 --metadata-file with --check"),
            (". --check --cache-to type=local,dest=d", "! 2 --cache-to with --check"),
            (". --check --if-needed -t a:{id}", "! 2 --if-needed with --check"),
            (". --check --force", "! 2 --force with --check"),
            (". --check --explain", "! 2 --explain with --check"),
            (". --check --plugin pre_build:nope", "! 2 --plugin with --check"),
            (". --call=lint --workflow f", "! 2 --workflow with --check"),
            (". --debug", "! 2 --debug is not supported"),
            (". -D", "! 2 --debug is not supported"),
            (". --policy p", "! 2 --policy is not supported"),
            (". --memory-swap -1", "! 2 --memory-swap is not supported"),
            (". --rm=false", "! 2 --rm is not supported"),
            (". --disable-content-trust=false", "! 2 --disable-content-trust is not supported"),
            (". --annotation index:a=b", "! 2 --annotation index:… is not supported"),
            (". --annotation index-descriptor:a=b", "! 2 --annotation index-descriptor:… is not supported"),
            (". --annotation manifest[linux/amd64]:a=b", "! 2 --annotation manifest[linux/amd64]:… is not supported"),
            (". --annotation foo", "! 2 --annotation \"foo\" has no value"),
            (". --annotation =x", "! 2 --annotation \"=x\" has no name"),
            (". --annotation bogus:foo=bar", "! 2 --annotation \"bogus:foo=bar\" has the unknown level \"bogus\""),
            (". --network mynet", "! invalid value 'mynet'"),
            (". --memory lots", "! invalid value 'lots'"),
            (". --secret src=x", "! invalid value 'src=x'"),
            (". --platform a/b/c/d", "! invalid value 'a/b/c/d'"),
            (". --label =x", "! 2 --label \"=x\" has no name"),
            (". --build-arg =x", "! 2 --build-arg \"=x\" has no name"),
            (". --build-context x", "! 2 --build-context \"x\": expected NAME=VALUE"),
            (". --build-context context=x", "! 2 --build-context: the name `context`"),
            (". -o type=cacheonly --push", "! 2 type=cacheonly keeps nothing"),
            (". --parallel 0", "! invalid value '0'"),
            (". --unknown", "! unexpected argument '--unknown'"),
            (". other", "! 2 there are 2 build contexts, \".\" and others"),
            (". --progress loud", "! invalid value 'loud'"),
            (". --isolation-level jail", "! invalid value 'jail'"),
        ] {
            let got = request(line).map_or_else(|e| e, |r| format!("{r:?}"));
            assert!(got.starts_with(expect), "{line}: {got}");
        }
    }

    #[test]
    fn default_platform_of_the_environment() {
        let of = |value: &str, line: &str| {
            let environment = Environment::fixed([("DOCKER_DEFAULT_PLATFORM".to_owned(), value.to_owned())].into(), "/", None);
            request_with(line, &environment).map(|request| request.platforms.iter().map(ToString::to_string).collect::<Vec<_>>().join(","))
        };
        assert_eq!(of("linux/arm64", "."), Ok("linux/arm64".into()));
        assert_eq!(of("linux/arm64", ". --platform linux/s390x"), Ok("linux/s390x".into()));
        assert_eq!(of("", "."), Ok(String::new()));
        assert!(of("a/b/c/d", ".").is_err_and(|e| e.starts_with("! 2 DOCKER_DEFAULT_PLATFORM: ")));
    }

    #[test]
    fn source_date_epoch_of_the_environment() {
        let of = |line: &str| {
            let environment = Environment::fixed([("SOURCE_DATE_EPOCH".to_owned(), "7".to_owned())].into(), "/", None);
            request_with(line, &environment).unwrap().source_date_epoch().unwrap()
        };
        assert_eq!(of(". --reproducible"), Some(7));
        assert_eq!(of(". --build-arg SOURCE_DATE_EPOCH=9"), Some(9));
    }
}
