//! `ovenbird build`.

use std::io::IsTerminal as _;
use std::path::Path;

use ovenbird::report::Record;
use ovenbird::{BuildRequest, Error, Kind};

use super::{lint, unless_cancelled};
use crate::args::{BuildArgs, Global};
use crate::place;
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
    let driver = place::driver(args, session, global)?;
    let (progress, job) = session.start(args.quiet, args.explain);
    let result = driver.run(request, &job);
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
    if to_stdout { Ok(()) } else { crate::print(&format!("{}\n", report.digest)) }
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    std::fs::write(path, text)
        .map_err(|e| Error::from_chain(Kind::Configuration, &e).while_doing(format!("cannot write {}", path.display())))
}
