//! The driver of a build: where it runs and what builds it, as flags, settings and the machine say.

use ovenbird::choice::{Chosen, On, Probe, choose};
use ovenbird::docker_engine::DockerEngine;
use ovenbird::launch::{ContainerLauncher, Host, KubernetesLauncher, Launcher, PrefectLauncher, ProcessLauncher, SshLauncher, WorkerSpec};
use ovenbird::workflow::{Bench, Workshop};
use ovenbird::{BuilderKind, DockerEngineBuilder, Driver, EngineBuilder, Error, Job, Kind, LocalDriver, RemoteDriver};
use ovenbird_engine::Event;

use crate::args::{BuildArgs, Global};
use crate::session::Session;

/// A driver, and why it is this one; nothing where it was asked for, or where the line about isolation says it.
pub(crate) struct Place {
    pub(crate) driver: Box<dyn Driver>,
    /// Does what is built there see the images of this machine's state directory?
    pub(crate) has_our_store: bool,
    reason: Option<String>,
}

impl Place {
    /// Says why it is this one.
    pub(crate) fn tell(&self, job: &Job) {
        if let Some(reason) = &self.reason {
            job.sink.emit(Event::Message { text: reason.clone() });
        }
    }
}

/// Enters the isolation level when our own engine is to build here.
pub(crate) fn choose_driver(args: &BuildArgs, session: &Session, global: &Global) -> Result<Place, Error> {
    let settings = &session.settings;
    let builder = args.builder.or(settings.builder).unwrap_or_default();
    let on = args.on.clone().or_else(|| settings.on.clone()).unwrap_or_default();
    let mut probe = Probe::of_environment(&session.environment);
    let mut entered = (None, false);
    if matches!(on, On::Auto | On::Here) && builder != BuilderKind::Docker {
        entered = session.enter()?;
        probe.level = entered.0.map(ovenbird_sandbox::Level::name);
    }
    if probe.wants_docker(&on, builder) {
        probe.docker = Some(find_docker(session));
    }
    let Chosen { on: chosen, builder, reason } = choose(&on, builder, &probe)?;
    if builder == BuilderKind::Docker {
        refuse_for_docker(args, global)?;
    }
    let told = format!("--on {chosen} --builder {builder}: {reason}");
    let said = on == On::Auto && entered.0.is_none() && args.builder.or(settings.builder) != Some(BuilderKind::Docker);
    let workers = |flags, builder: BuilderKind| WorkerSpec { flags, arguments: vec!["--builder".into(), builder.to_string().into()] };
    let has_our_store = builder != BuilderKind::Docker && matches!(chosen, On::Auto | On::Here | On::Process);
    let driver: Box<dyn Driver> = match chosen {
        On::Auto | On::Here if builder == BuilderKind::Docker => {
            let images = session.images_only()?;
            local(session, DockerEngineBuilder::new(DockerEngine::new(&settings.docker)?, images, settings))
        }
        On::Auto | On::Here => local(session, EngineBuilder::open(settings, &session.environment, entered.0, entered.1)?),
        On::Container(place) => {
            let launcher = ContainerLauncher::new(place, settings, &session.environment);
            remote(launcher, workers(global.elsewhere(), builder), session)
        }
        On::Ssh(hosts) => over_ssh(&hosts, workers(global.elsewhere(), builder), session)?,
        On::Pool => over_ssh(&settings.pool, workers(global.elsewhere(), builder), session)?,
        On::Kubernetes(place) => {
            let launcher = KubernetesLauncher::new(&place, &settings.kubernetes, &session.environment);
            remote(launcher, workers(global.elsewhere(), builder), session)
        }
        On::Prefect(place) => {
            global.refuse_elsewhere("on Prefect")?;
            remote(PrefectLauncher::new(&place, settings, &session.environment)?, WorkerSpec::default(), session)
        }
        On::Process => remote(ProcessLauncher, workers(global.for_worker(settings), builder), session),
    };
    Ok(Place { driver, has_our_store, reason: said.then_some(told) })
}

/// Flags that are no part of the request, and that a Docker Engine has nothing for.
fn refuse_for_docker(args: &BuildArgs, global: &Global) -> Result<(), Error> {
    let refused = |flag: &str, why: &str| {
        Err(Error::refused(&format!("{flag} with --builder docker"), format!("the Docker Engine {why}")).hint("--builder engine does it"))
    };
    if args.explain {
        return refused("--explain", "does not say why a step ran");
    }
    if global.asks_for_level() {
        return refused("--isolation-level", "runs steps in containers of its own");
    }
    Ok(())
}

/// The Docker Engine that answers, and what led there.
pub(crate) fn find_docker(session: &Session) -> Result<String, String> {
    let settings = &session.settings.docker;
    let said = match (&settings.host, &settings.context) {
        (Some(_), _) => " (DOCKER_HOST)",
        (None, Some(_)) => " (DOCKER_CONTEXT)",
        (None, None) => "",
    };
    let docker = DockerEngine::new(settings).map_err(|error| error.to_string())?;
    docker.reach().map(|_| format!("{docker}{said}")).map_err(|error| error.to_string())
}

fn local<B: Workshop + 'static>(session: &Session, builder: B) -> Box<dyn Driver> {
    let driver = LocalDriver::new(builder, session.sources(), std::io::stdin());
    let driver = driver.with_names(session.settings.tags.clone(), session.environment.now());
    Box::new(driver.with_plugins(Bench::new(&session.settings, &session.environment)))
}

fn remote<L: Launcher + 'static>(launcher: L, spec: WorkerSpec, session: &Session) -> Box<dyn Driver> {
    Box::new(RemoteDriver::new(launcher, spec, &session.settings, &session.environment, std::io::stdin()))
}

fn over_ssh(hosts: &[Host], spec: WorkerSpec, session: &Session) -> Result<Box<dyn Driver>, Error> {
    let settings = &session.settings;
    if hosts.is_empty() {
        return Err(Error::new(Kind::Configuration, "there is no host in the pool").hint("[pool] hosts = [\"ssh://HOST\"] in the settings"));
    }
    let hosts = hosts.iter().map(|host| host.clone().or(&settings.host_defaults)).collect();
    Ok(remote(SshLauncher::new(hosts), spec, session))
}
