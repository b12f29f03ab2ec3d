//! `ovenbird pull`.

use clap::Args;
use ovenbird::Error;
use ovenbird::builder::told;
use ovenbird_oci::Platform;

use super::unless_cancelled;
use crate::session::Session;

/// Pull an image from a registry. Prints the digest.
#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// Name of the image
    image: String,
    /// Platform [default: this machine's]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]", value_parser = crate::args::platform)]
    platform: Option<Platform>,
    /// Pull every platform
    #[arg(long, conflicts_with = "platform")]
    all_platforms: bool,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
}

pub(crate) fn run(args: &PullArgs, session: &Session) -> Result<(), Error> {
    let image = session.settings.reference(&args.image)?;
    let builder = session.images_only()?;
    let (progress, job) = session.start(args.quiet, false);
    let platform = (!args.all_platforms).then(|| args.platform.clone().unwrap_or_else(Platform::host));
    let result = builder.engine().pull(&image, platform.as_ref(), &job.sink, &job.cancel).map_err(|e| told(e, None));
    progress.finish();
    let pulled = unless_cancelled(result, &job)?;
    crate::print(&format!("{}\n", pulled.digest))
}
