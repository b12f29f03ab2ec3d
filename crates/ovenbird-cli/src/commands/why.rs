//! `ovenbird why`.

use std::fmt::Write as _;

use clap::Args;
use ovenbird::{Error, Kind};
use ovenbird_engine::trace::{Outcome, Trace};

use crate::progress::{Escapes, clean};
use crate::session::Session;

/// Show why steps of the last build ran.
///
/// Every step is shown with what became of it; for those that ran, the exact difference to the build of the same Dockerfile before.
#[derive(Debug, Args)]
pub(crate) struct WhyArgs {
    /// Show the last build of every Dockerfile, not only the last of all
    #[arg(short, long)]
    all: bool,
    /// JSON, one object a build
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &WhyArgs, session: &Session) -> Result<(), Error> {
    // Traces are kept beside the snapshots of the isolation level.
    let builder = session.sandboxed()?;
    let mut traces = builder.engine().traces();
    if !args.all {
        traces.truncate(1);
    }
    if args.json {
        return crate::print(&super::json(&traces)?);
    }
    if traces.is_empty() {
        return Err(
            Error::new(Kind::Usage, "nothing was built in this state directory yet").hint("`ovenbird plan` shows what a build would run")
        );
    }
    traces.iter().try_for_each(|trace| crate::print(&text(trace)))
}

/// A build for people.
pub(super) fn text(trace: &Trace) -> String {
    let one_line = |text: &str| clean(&text.replace('\n', " "), Escapes::Strip);
    let mut out = format!("{}\n", one_line(&trace.title));
    for step in &trace.steps {
        let outcome = match step.outcome {
            Outcome::Ran => "ran",
            Outcome::Failed => "failed",
            Outcome::Cached => "cached",
            Outcome::NotReached => "not needed",
            Outcome::WouldRun => "would run",
        };
        let _ = writeln!(out, "  {outcome:10}  {}", one_line(&step.name));
        for cause in &step.causes {
            let _ = writeln!(out, "              because {}", one_line(cause));
        }
    }
    out
}
