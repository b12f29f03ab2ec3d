//! `ovenbird load`.

use clap::Args;
use ovenbird::Error;
use ovenbird::request::OutputKind;

use super::unless_cancelled;
use crate::session::Session;

/// Load an image into the Docker Engine of DOCKER_HOST. Nothing is sent when the engine has it already.
#[derive(Debug, Args)]
pub(crate) struct LoadArgs {
    /// Name or digest of the image
    image: String,
    /// Names it gets there [default: its own name]
    #[arg(short, long = "tag", value_name = "NAME[:TAG]")]
    tags: Vec<String>,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
}

pub(crate) fn run(args: &LoadArgs, session: &Session) -> Result<(), Error> {
    let builder = session.images_only()?;
    let target = session.find(builder.engine().store(), &args.image)?;
    let names = if args.tags.is_empty() {
        session.settings.reference(&args.image).ok().filter(|name| name.digest().is_none()).into_iter().collect()
    } else {
        session.references(&args.tags)?
    };
    let (progress, job) = session.start(args.quiet, false);
    let result = builder.export_target(&target, &OutputKind::Load, &names, None, &job);
    progress.finish();
    unless_cancelled(result, &job)
}
