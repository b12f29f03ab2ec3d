//! `ovenbird build`.

use std::io::IsTerminal as _;
use std::path::Path;

use ovenbird::project::{Registries, Runner};
use ovenbird::report::Record;
use ovenbird::request::OutputKind;
use ovenbird::{BuildRequest, Error, Kind};

use super::{lint, unless_cancelled};
use crate::args::{BuildArgs, Global, ProjectBuild};
use crate::place::choose_driver;
use crate::session::Session;

/// Instead of a file.
const STDOUT: &str = "-";

pub(crate) fn run(args: &BuildArgs, request: &BuildRequest, session: &Session, global: &Global) -> Result<(), Error> {
    let to_stdout = request.outputs.iter().any(ovenbird::request::Output::uses_stdout);
    let told = told_on_stdout(args)?;
    if to_stdout && told {
        return Err(
            Error::new(Kind::Usage, "an output and a report would both be written to standard output").hint("give one of them a file")
        );
    }
    if to_stdout && std::io::stdout().is_terminal() {
        return Err(
            Error::new(Kind::Usage, "an archive would be written to the terminal").hint("add dest=FILE, or redirect standard output")
        );
    }
    if args.checks_only() {
        // They are a build.json's: --plugin is refused.
        if !request.workflow.pre_build.is_empty() {
            crate::note("plugins that run before a build may change its Dockerfile: a check runs none of them");
        }
        return lint::check(request, session, lint::Manner::OF_BUILD);
    }
    let place = choose_driver(args, session, global)?;
    let (progress, job) = session.start(args.quiet, args.explain);
    place.tell(&job);
    let result = place.driver.run(request, &job);
    progress.finish();
    let report = match result {
        Ok(report) => report,
        Err(error) => {
            // How it went is worth as much as the image.
            if let Some(path) = &args.metadata_file {
                let record = error.record.as_deref().cloned().unwrap_or_else(|| Record::of_error(&error));
                write(path, &super::json(&record.metadata())?)?;
            }
            return unless_cancelled(Err(error), &job);
        }
    };
    if let Some(path) = &args.iidfile {
        write(path, &report.image_id().to_string())?;
    }
    if let Some(path) = &args.metadata_file {
        write(path, &super::json(&report.metadata())?)?;
    }
    if to_stdout || told { Ok(()) } else { crate::print(&format!("{}\n", report.digest)) }
}

/// Builds images of `ovenbird.toml`. Prints a line for each that was asked for: its name and its digest.
pub(crate) fn run_project(args: &BuildArgs, images: &ProjectBuild, session: &Session, global: &Global) -> Result<(), Error> {
    let settings = &session.settings;
    let told = told_on_stdout(args)?;
    let ProjectBuild { project, asked, request } = images;
    let pushes = request.outputs.iter().any(|output| output.kind == OutputKind::Registry);
    let registries = if settings.default_registry.is_some() { Registries::OfTheUser } else { Registries::DockerHub };
    project.check_trust(&settings.trusted_projects, (pushes && request.names.is_empty()).then_some(registries))?;
    if asked.is_empty() {
        crate::note("no image of ovenbird.toml depends on what changed: nothing is built");
        return Ok(());
    }
    let place = choose_driver(args, session, global)?;
    let (progress, job) = session.start(args.quiet, args.explain);
    place.tell(&job);
    let runner = Runner {
        project,
        base: request,
        names: &|request| settings.with_full_names(request),
        build: &|request, job| place.driver.run(request, job),
        shared: place.has_our_store,
        parallel: std::thread::available_parallelism().map_or(2, usize::from).max(2),
    };
    let built = runner.run(&asked.iter().map(String::as_str).collect(), &job);
    progress.finish();
    let built = unless_cancelled(built, &job)?;
    if let (Some(path), [one]) = (&args.iidfile, asked.as_slice())
        && let Some(report) = built.reports.get(one)
    {
        write(path, &report.image_id().to_string())?;
    }
    if let Some(path) = &args.metadata_file {
        // As buildx writes it for the targets of a bake file.
        let all: serde_json::Map<_, _> = built.reports.iter().map(|(name, report)| (name.clone(), report.metadata())).collect();
        write(path, &super::json(&all)?)?;
    }
    for name in asked.iter().filter(|_| !told) {
        if let Some(report) = built.reports.get(name) {
            crate::print(&format!("{name} {}\n", report.digest))?;
        }
    }
    match built.error() {
        Some(error) => unless_cancelled(Err(error), &job),
        None => Ok(()),
    }
}

/// Is something else than digests written to standard output?
fn told_on_stdout(args: &BuildArgs) -> Result<bool, Error> {
    let said = [&args.iidfile, &args.metadata_file].into_iter().flatten().filter(|path| path.as_os_str() == STDOUT).count();
    if said > 1 {
        return Err(Error::new(Kind::Usage, "--iidfile - and --metadata-file - would both write to standard output")
            .hint("give one of them a file"));
    }
    Ok(said == 1)
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    if path.as_os_str() == STDOUT {
        return crate::print(&format!("{}\n", text.trim_end()));
    }
    std::fs::write(path, text)
        .map_err(|e| Error::from_chain(Kind::Configuration, &e).while_doing(format!("cannot write {}", path.display())))
}
