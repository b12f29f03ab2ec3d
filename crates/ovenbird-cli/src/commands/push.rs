//! `ovenbird push`.

use clap::Args;
use ovenbird::builder::told;
use ovenbird::{Error, Kind};
use ovenbird_oci::publish::Target;

use super::unless_cancelled;
use crate::session::Session;

/// Push an image of this machine to a registry. Prints the digest.
#[derive(Debug, Args)]
pub(crate) struct PushArgs {
    /// Name or digest of the image
    image: String,
    /// Names to push it under [default: its own name]
    #[arg(value_name = "TO")]
    to: Vec<String>,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
}

pub(crate) fn run(args: &PushArgs, session: &Session) -> Result<(), Error> {
    let builder = session.images_only()?;
    let target = session.find(builder.engine().store(), &args.image)?;
    let to = if args.to.is_empty() {
        if args.image.parse::<ovenbird_oci::Digest>().is_ok() {
            return Err(Error::new(Kind::Usage, "a digest does not say where to push to").hint("give a name: ovenbird push DIGEST NAME"));
        }
        vec![session.settings.reference(&args.image)?]
    } else {
        session.references(&args.to)?
    };
    let (progress, job) = session.start(args.quiet, false);
    let to: Vec<Target> = to.into_iter().map(Target::from).collect();
    let result = builder.engine().push(&target, &to, &job.sink, &job.cancel).map_err(|e| told(e, None));
    progress.finish();
    unless_cancelled(result, &job)?;
    crate::print(&format!("{}\n", target.digest))
}
