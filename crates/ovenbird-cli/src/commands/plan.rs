//! `ovenbird plan`.

use clap::Args;
use ovenbird::workflow::Bench;
use ovenbird::{BuildRequest, Error, LocalDriver};

use super::why;
use crate::args::BuildArgs;
use crate::session::Session;

/// Show which steps a build would run, and why, without building.
///
/// Takes the arguments of `ovenbird build`. Base images and remote sources are looked up in their places. A step that takes files from an
/// earlier one may still come from the cache, when that one gives the same files again.
#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub(crate) build: BuildArgs,
    /// JSON, one object a platform
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &PlanArgs, request: &BuildRequest, session: &Session) -> Result<(), Error> {
    let builder = session.sandboxed()?;
    let (progress, job) = session.start(true, false);
    let driver = LocalDriver::new(builder, session.sources(), std::io::stdin())
        .with_names(session.settings.tags.clone(), session.environment.now())
        .with_plugins(Bench::new(&session.settings, &session.environment));
    let traces = driver.plan(&session.settings.with_full_names(request.clone()), &job);
    progress.finish();
    let traces = super::unless_cancelled(traces, &job)?;
    if args.json {
        return crate::print(&super::json(&traces)?);
    }
    traces.iter().try_for_each(|trace| crate::print(&why::text(trace)))
}
