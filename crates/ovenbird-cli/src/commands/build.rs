//! `ovenbird build`.

use std::io::IsTerminal as _;
use std::path::Path;

use ovenbird::{BuildRequest, Detail, Driver as _, Error, Kind, LocalDriver};

use super::unless_cancelled;
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
        return check(request, session);
    }
    let builder = session.sandboxed()?;
    let (progress, job) = session.start(args.quiet, args.explain);
    let driver = LocalDriver::new(builder, &session.settings.temp, std::io::stdin());
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

/// Parses and lints. Findings that need images or the context come only with a build.
fn check(request: &BuildRequest, session: &Session) -> Result<(), Error> {
    let tree = ovenbird::source::fetch(request, &session.settings.temp, &mut std::io::stdin())?;
    let parsed = ovenbird_dockerfile::parse(&tree.dockerfile);
    let mut diagnostics = parsed.diagnostics;
    diagnostics.extend(ovenbird_dockerfile::lint(&parsed.dockerfile, &tree.dockerfile));
    diagnostics.sort_by_key(|d| d.span.start);
    diagnostics.dedup();
    if diagnostics.is_empty() {
        return crate::print(&format!("{}: no findings\n", tree.dockerfile_name));
    }
    let plural = if diagnostics.len() == 1 { "" } else { "s" };
    let mut error = Error::new(Kind::Dockerfile, format!("{} has {} finding{plural}", tree.dockerfile_name, diagnostics.len()));
    error.detail = Some(Box::new(Detail::Dockerfile { name: tree.dockerfile_name, text: tree.dockerfile, diagnostics }));
    Err(error)
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    std::fs::write(path, text)
        .map_err(|e| Error::from_chain(Kind::Configuration, &e).while_doing(format!("cannot write {}", path.display())))
}
