//! The driver of a build: where it runs and what builds it, as flags and settings say.

use ovenbird::choice::On;
use ovenbird::docker_engine::DockerEngine;
use ovenbird::launch::{Host, ProcessLauncher, SshLauncher, WorkerSpec};
use ovenbird::workflow::{Bench, Workshop};
use ovenbird::{BuilderKind, DockerEngineBuilder, Driver, Error, Kind, LocalDriver, RemoteDriver};

use crate::args::{BuildArgs, Global};
use crate::session::Session;

/// Enters the isolation level when our own engine is to build here.
pub(crate) fn driver(args: &BuildArgs, session: &Session, global: &Global) -> Result<Box<dyn Driver>, Error> {
    let settings = &session.settings;
    let builder = args.builder.or(settings.builder).unwrap_or_default();
    Ok(match args.on.clone().or_else(|| settings.on.clone()).unwrap_or_default() {
        On::Auto | On::Here => here(builder, session)?,
        On::Ssh(hosts) => over_ssh(&hosts, session)?,
        On::Pool => over_ssh(&settings.pool, session)?,
        On::Process => {
            let spec = WorkerSpec { flags: global.for_worker(settings) };
            Box::new(RemoteDriver::new(ProcessLauncher, spec, settings, &session.environment, std::io::stdin()))
        }
    })
}

fn here(builder: BuilderKind, session: &Session) -> Result<Box<dyn Driver>, Error> {
    Ok(match builder {
        BuilderKind::Docker => local(session, docker(DockerEngine::new(&session.settings.docker)?, session)?),
        BuilderKind::Engine => local(session, session.sandboxed()?),
        BuilderKind::Auto => {
            let engine = session.sandboxed()?;
            let found = if engine.runs_steps() { None } else { DockerEngine::new(&session.settings.docker).ok() };
            match found.filter(|docker| docker.reach().is_ok()) {
                Some(found) => local(session, docker(found, session)?),
                None => local(session, engine),
            }
        }
    })
}

fn docker(engine: DockerEngine, session: &Session) -> Result<DockerEngineBuilder, Error> {
    Ok(DockerEngineBuilder::new(engine, session.images_only()?, &session.settings))
}

fn local<B: Workshop + 'static>(session: &Session, builder: B) -> Box<dyn Driver> {
    let driver = LocalDriver::new(builder, session.sources(), std::io::stdin());
    let driver = driver.with_names(session.settings.tags.clone(), session.environment.now());
    Box::new(driver.with_plugins(Bench::new(&session.settings, &session.environment)))
}

fn over_ssh(hosts: &[Host], session: &Session) -> Result<Box<dyn Driver>, Error> {
    let settings = &session.settings;
    if hosts.is_empty() {
        return Err(Error::new(Kind::Configuration, "there is no host in the pool").hint("[pool] hosts = [\"ssh://HOST\"] in the settings"));
    }
    let hosts = hosts.iter().map(|host| host.clone().or(&settings.host_defaults)).collect();
    Ok(Box::new(RemoteDriver::new(SshLauncher::new(hosts), WorkerSpec::default(), settings, &session.environment, std::io::stdin())))
}
