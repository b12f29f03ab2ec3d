//! `ovenbird build`.

use std::io::IsTerminal as _;
use std::path::Path;

use ovenbird::docker_engine::DockerEngine;
use ovenbird::{BuildRequest, Builder, BuilderKind, DockerEngineBuilder, Driver, Error, Kind, Library, LocalDriver};

use super::{lint, unless_cancelled};
use crate::args::BuildArgs;
use crate::session::Session;

pub(crate) fn run(args: &BuildArgs, request: &BuildRequest, session: &Session) -> Result<(), Error> {
    let to_stdout = request.outputs.iter().any(ovenbird::request::Output::uses_stdout);
    if to_stdout && std::io::stdout().is_terminal() {
        return Err(
            Error::new(Kind::Usage, "an archive would be written to the terminal").hint("add dest=FILE, or redirect standard output")
        );
    }
    if args.checks_only() {
        return lint::check(request, session, lint::Manner::OF_BUILD);
    }
    let driver = driver(args, session)?;
    let (progress, job) = session.start(args.quiet, args.explain);
    let result = driver.run(request, &job);
    progress.finish();
    let report = unless_cancelled(result, &job)?;
    if let Some(path) = &args.iidfile {
        write(path, &report.image_id().to_string())?;
    }
    if let Some(path) = &args.metadata_file {
        write(path, &super::json(&report.metadata())?)?;
    }
    if to_stdout { Ok(()) } else { crate::print(&format!("{}\n", report.digest)) }
}

/// The driver over what is to build. Enters the isolation level when that is our own engine.
fn driver(args: &BuildArgs, session: &Session) -> Result<Box<dyn Driver>, Error> {
    Ok(match args.builder.or(session.settings.builder).unwrap_or_default() {
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

fn local<B: Builder + Library + 'static>(session: &Session, builder: B) -> Box<dyn Driver> {
    let driver = LocalDriver::new(builder, session.sources(), std::io::stdin());
    Box::new(driver.with_names(session.settings.tags.clone(), session.environment.now()))
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    std::fs::write(path, text)
        .map_err(|e| Error::from_chain(Kind::Configuration, &e).while_doing(format!("cannot write {}", path.display())))
}
