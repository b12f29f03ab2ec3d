//! The builders: how each starts with empty state, builds, and ends.

use std::path::{Path, PathBuf};
use std::process::Command;

use ovenbird_testing::dockerd::{Dockerd, Programs, unmount_below};
use ovenbird_testing::process::{on_path, output};

use super::measure::{self, Sample};

/// A cache in a registry, between machines.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shared<'a> {
    /// Repository for builders that keep a cache apart from the image.
    pub(super) repository: &'a str,
    /// The image that was pushed, for those whose images carry it.
    pub(super) image: &'a str,
    /// Read it; else write it.
    pub(super) read: bool,
}

/// One build, in words that every builder knows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Job<'a> {
    /// Context; its `Dockerfile` is built.
    pub(super) context: &'a Path,
    /// Name of the image, with the registry that it is pushed to.
    pub(super) tag: &'a str,
    /// May results of earlier builds be used?
    pub(super) cache: bool,
    /// Push the image when it is built.
    pub(super) push: bool,
    /// Use a cache in a registry.
    pub(super) shared: Option<Shared<'a>>,
}

/// A builder program.
pub(super) trait Builder {
    /// Makes it ready with empty state below `state`.
    fn start(&mut self, state: &Path) -> Result<(), String>;
    /// Command lines that do the job, one after the other.
    fn commands(&self, job: &Job<'_>) -> Vec<Command>;
    /// Processes that serve the commands and outlive them.
    fn daemon(&self) -> Vec<u32>;
    /// Ends what was started.
    fn stop(&mut self);
}

/// A builder in the comparison.
pub(super) struct Peer {
    /// Name in tables.
    pub(super) name: String,
    /// Is it Ovenbird?
    pub(super) is_own: bool,
    builder: Box<dyn Builder>,
    state: PathBuf,
}

impl Peer {
    fn new(name: &str, builder: impl Builder + 'static) -> Self {
        Self { name: name.to_owned(), is_own: name == OVENBIRD, builder: Box::new(builder), state: PathBuf::new() }
    }

    /// Ourselves.
    pub(super) fn own(program: &Path) -> Self {
        Self::new(OVENBIRD, Ovenbird { program: program.to_path_buf(), state: PathBuf::new() })
    }

    /// Lets it work with empty state. What it leaves is nobody's business until the end of the bench: ext4 does not use an inode again
    /// for minutes after its file was removed and looks for others all the while, so the next builder would pay for the removal.
    pub(super) fn turn<T>(&mut self, state: &Path, work: impl FnOnce(&mut Self) -> Result<T, String>) -> Result<T, String> {
        std::fs::create_dir_all(state).map_err(|error| format!("cannot make {}: {error}", state.display()))?;
        self.state = state.to_path_buf();
        let result = self.builder.start(state).and_then(|()| work(self));
        self.builder.stop();
        unmount_below(state);
        result
    }

    /// Goes on with empty state, as on another machine.
    pub(super) fn move_on(&mut self) -> Result<(), String> {
        self.builder.stop();
        self.builder.start(&self.state.join("other"))
    }

    /// The time and memory of one job.
    pub(super) fn build(&self, job: &Job<'_>) -> Result<Sample, String> {
        measure::run(&mut self.builder.commands(job), &self.builder.daemon(), &self.state.join("log"))
    }

    /// The same from nothing: what serves the commands is not running yet.
    pub(super) fn cold_build(&mut self, job: &Job<'_>) -> Result<Sample, String> {
        self.builder.stop();
        rustix::fs::sync();
        let began = std::time::Instant::now();
        self.builder.start(&self.state.join("cold"))?;
        let started = began.elapsed().as_secs_f64();
        let sample = self.build(job)?;
        let serves = !self.builder.daemon().is_empty();
        Ok(Sample { seconds: sample.seconds + if serves { started } else { 0.0 }, ..sample })
    }
}

/// Name of our own builder.
pub(super) const OVENBIRD: &str = "ovenbird";

/// Ovenbird first, then every other one that is here and asked for; and those that are not here, with the reason.
pub(super) fn find(ovenbird: &Path, wanted: Option<&[String]>) -> Result<(Vec<Peer>, Vec<(String, String)>), String> {
    let mut peers = vec![Peer::own(ovenbird)];
    let mut missing: Vec<(String, String)> = vec![];
    let docker = |programs: &Programs, buildkit| Docker { programs: programs.clone(), buildkit, engine: None };
    let packaged = Programs::packaged();
    if on_path("dockerd") {
        let version = version(&packaged)?;
        peers.push(Peer::new(&format!("docker{version}-classic"), docker(&packaged, false)));
        // The engine's own BuildKit needs no plugin up to 20; later clients do.
        peers.push(Peer::new(&format!("docker{version}-buildkit"), docker(&packaged, true)));
    } else {
        missing.push(("Docker of the machine".into(), "dockerd is not installed".into()));
    }
    match std::env::var_os("OVENBIRD_BENCH_DOCKER").map(|root| Programs::unpacked(Path::new(&root))) {
        Some(programs) if programs.dockerd.is_file() => {
            let name = format!("docker{}-buildkit", version(&programs)?);
            if programs.buildx.is_some() {
                peers.push(Peer::new(&name, docker(&programs, true)));
            } else {
                missing.push((name, "its folder has no buildx plugin".into()));
            }
        }
        Some(programs) => return Err(format!("OVENBIRD_BENCH_DOCKER: there is no {}", programs.dockerd.display())),
        None => missing.push(("a second Docker Engine".into(), "OVENBIRD_BENCH_DOCKER names no folder with its packages".into())),
    }
    if on_path("buildah") {
        let text = output(Command::new("buildah").arg("--version")).map_err(|error| error.to_string())?;
        let words = text.split_whitespace().nth(2).unwrap_or_default();
        let version: String = words.split('.').take(2).collect::<Vec<_>>().join(".");
        peers.push(Peer::new(&format!("buildah{version}-chroot"), Buildah { isolation: "chroot", state: PathBuf::new() }));
        if on_path("runc") {
            peers.push(Peer::new(&format!("buildah{version}-runc"), Buildah { isolation: "oci", state: PathBuf::new() }));
        } else {
            missing.push((format!("buildah{version}-runc"), "runc is not installed".into()));
        }
    } else {
        missing.push(("buildah".into(), "not installed".into()));
    }
    for (name, program) in [("buildkitd", "buildkitd"), ("kaniko", "executor")] {
        if !on_path(program) {
            missing.push((name.into(), "no Debian package, and no program of that name on the path".into()));
        }
    }
    if let Some(wanted) = wanted {
        if let Some(unknown) = wanted.iter().find(|name| !peers.iter().any(|peer| peer.name == **name)) {
            let names: Vec<&str> = peers.iter().map(|peer| peer.name.as_str()).collect();
            return Err(format!("there is no builder {unknown:?} here; there are {}", names.join(", ")));
        }
        for peer in peers.extract_if(.., |peer| !peer.is_own && !wanted.contains(&peer.name)) {
            missing.push((peer.name, "not asked for in this run".into()));
        }
    }
    Ok((peers, missing))
}

/// Major version of an engine.
fn version(programs: &Programs) -> Result<String, String> {
    let text = output(Command::new(&programs.dockerd).arg("--version")).map_err(|error| error.to_string())?;
    let word = text.split_whitespace().nth(2).unwrap_or_default();
    Ok(word.split('.').next().unwrap_or_default().to_owned())
}

struct Ovenbird {
    program: PathBuf,
    state: PathBuf,
}

impl Builder for Ovenbird {
    fn start(&mut self, state: &Path) -> Result<(), String> {
        self.state = state.join("ovenbird");
        Ok(())
    }

    fn commands(&self, job: &Job<'_>) -> Vec<Command> {
        let mut command = Command::new(&self.program);
        command.arg("build").arg("--root").arg(&self.state).args(["--network=host", "--tag", job.tag]);
        command.args((!job.cache).then_some("--no-cache")).args(job.push.then_some("--push"));
        command.args(job.shared.map(|Shared { repository, read, .. }| {
            if read {
                format!("--cache-from={repository}:cache")
            } else {
                format!("--cache-to=type=registry,ref={repository}:cache,mode=max")
            }
        }));
        command.arg(job.context);
        vec![command]
    }

    fn daemon(&self) -> Vec<u32> {
        vec![]
    }

    fn stop(&mut self) {}
}

struct Docker {
    programs: Programs,
    buildkit: bool,
    engine: Option<Dockerd>,
}

impl Builder for Docker {
    fn start(&mut self, _state: &Path) -> Result<(), String> {
        self.engine = Some(Dockerd::start_with_programs(&self.programs, None).map_err(|error| error.to_string())?);
        Ok(())
    }

    fn commands(&self, job: &Job<'_>) -> Vec<Command> {
        let Some(engine) = &self.engine else { return vec![] };
        let mut build = engine.docker();
        build.env("DOCKER_BUILDKIT", if self.buildkit { "1" } else { "0" }).args(["build", "--network=host", "--tag", job.tag]);
        build.args((!job.cache).then_some("--no-cache"));
        let mut commands = vec![];
        match job.shared {
            // The engine's own images take no other cache than the one that they carry; the classic builder looks at images that are here.
            Some(shared) if shared.read => {
                build.arg(format!("--cache-from={}", shared.image));
                if !self.buildkit {
                    let mut pull = engine.docker();
                    pull.args(["pull", shared.image]);
                    commands.push(pull);
                }
            }
            Some(_) if self.buildkit => drop(build.arg("--build-arg=BUILDKIT_INLINE_CACHE=1")),
            _ => {}
        }
        build.arg(job.context);
        let mut push = engine.docker();
        push.args(["push", job.tag]);
        commands.push(build);
        commands.extend(job.push.then_some(push));
        commands
    }

    fn daemon(&self) -> Vec<u32> {
        // The daemon starts a containerd of its own; shims belong to steps.
        let Some(pid) = self.engine.as_ref().and_then(Dockerd::pid) else { return vec![] };
        let mut pids = vec![pid];
        pids.extend(measure::children(pid).into_iter().filter(|child| measure::program(*child) == "containerd"));
        pids
    }

    fn stop(&mut self) {
        self.engine = None;
    }
}

struct Buildah {
    isolation: &'static str,
    state: PathBuf,
}

impl Buildah {
    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new("buildah");
        command.arg("--root").arg(self.state.join("root")).arg("--runroot").arg(self.state.join("run"));
        command.args(["--storage-driver=overlay", verb]);
        command
    }
}

impl Builder for Buildah {
    fn start(&mut self, state: &Path) -> Result<(), String> {
        self.state = state.join("buildah");
        Ok(())
    }

    fn commands(&self, job: &Job<'_>) -> Vec<Command> {
        let mut build = self.command("build");
        // Without --layers it would keep no layer and make one for all steps: another job than the others'.
        build.args(["--layers", "--network=host", "--tls-verify=false", "--isolation", self.isolation]);
        build.args((self.isolation == "oci").then_some("--runtime=runc")).args((!job.cache).then_some("--no-cache"));
        build.args(job.shared.map(|shared| format!("--cache-{}={}", if shared.read { "from" } else { "to" }, shared.repository)));
        build.args(["--tag", job.tag]).arg(job.context);
        let mut push = self.command("push");
        push.args(["--tls-verify=false", job.tag]);
        if job.push { vec![build, push] } else { vec![build] }
    }

    fn daemon(&self) -> Vec<u32> {
        vec![]
    }

    fn stop(&mut self) {}
}
