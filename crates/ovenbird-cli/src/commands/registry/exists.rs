//! `ovenbird registry exists`.

use clap::Args;
use ovenbird::{Error, registry};

use crate::commands::unless_cancelled;
use crate::session::Session;

/// Ask whether an image is in its registry: code 0 when it is, 1 when it is not, 7 when the registry gives no answer.
#[derive(Debug, Args)]
pub(crate) struct ExistsArgs {
    /// Name of the image: this tag or digest, no other
    image: String,
}

pub(super) fn run(args: &ExistsArgs, session: &Session) -> Result<bool, Error> {
    let image = session.settings.reference(&args.image)?;
    let builder = session.images_only()?;
    let (progress, job) = session.start(true, false);
    let exists = registry::exists(&builder, &image, &job);
    progress.finish();
    unless_cancelled(exists, &job)
}
