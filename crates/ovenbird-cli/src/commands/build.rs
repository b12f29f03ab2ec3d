//! `ovenbird build`.

use std::io::IsTerminal as _;
use std::path::Path;

use ovenbird::choice::On;
use ovenbird::launch::{Host, ProcessLauncher, SshLauncher, WorkerSpec};
use ovenbird::{BuildRequest, Driver, Error, Kind, LocalDriver, RemoteDriver};

use super::{lint, unless_cancelled};
use crate::args::{BuildArgs, Global};
use crate::session::Session;

pub(crate) fn run(args: &BuildArgs, request: &BuildRequest, session: &Session, global: &Global) -> Result<(), Error> {
    let to_stdout = request.outputs.iter().any(ovenbird::request::Output::uses_stdout);
    if to_stdout && std::io::stdout().is_terminal() {
        return Err(
            Error::new(Kind::Usage, "an archive would be written to the terminal").hint("add dest=FILE, or redirect standard output")
        );
    }
    if args.checks_only() {
        return lint::check(request, session, lint::Manner::OF_BUILD);
    }
    let driver = driver(args, session, global)?;
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

/// The driver for where the build is to run. Enters the isolation level when that is here.
fn driver(args: &BuildArgs, session: &Session, global: &Global) -> Result<Box<dyn Driver>, Error> {
    let settings = &session.settings;
    Ok(match args.on.clone().or_else(|| settings.on.clone()).unwrap_or_default() {
        On::Auto | On::Here => {
            let driver = LocalDriver::new(session.sandboxed()?, session.sources(), std::io::stdin());
            Box::new(driver.with_names(settings.tags.clone(), session.environment.now()))
        }
        On::Ssh(hosts) => over_ssh(&hosts, session)?,
        On::Pool => over_ssh(&settings.pool, session)?,
        On::Process => {
            let spec = WorkerSpec { flags: global.for_worker(settings) };
            Box::new(RemoteDriver::new(ProcessLauncher, spec, settings, &session.environment, std::io::stdin()))
        }
    })
}

fn over_ssh(hosts: &[Host], session: &Session) -> Result<Box<dyn Driver>, Error> {
    let settings = &session.settings;
    if hosts.is_empty() {
        return Err(Error::new(Kind::Configuration, "there is no host in the pool").hint("[pool] hosts = [\"ssh://HOST\"] in the settings"));
    }
    let hosts = hosts.iter().map(|host| host.clone().or(&settings.host_defaults)).collect();
    Ok(Box::new(RemoteDriver::new(SshLauncher::new(hosts), WorkerSpec::default(), settings, &session.environment, std::io::stdin())))
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    std::fs::write(path, text)
        .map_err(|e| Error::from_chain(Kind::Configuration, &e).while_doing(format!("cannot write {}", path.display())))
}
