//! `ovenbird registry copy`.

use clap::Args;
use ovenbird::registry::{self, Place};
use ovenbird::{Error, Kind};
use ovenbird_oci::Platform;

use crate::commands::unless_cancelled;
use crate::session::Session;

/// Copy an image between registries, OCI layouts and archives. Prints the digest.
///
/// A place is NAME[:TAG] in a registry, oci:DIR[:TAG], oci-archive:FILE[:TAG] or docker-archive:FILE[:NAME[:TAG]]. All platforms are
/// copied, and digests stay as they are (but for docker-archive, which holds one platform and no manifest). Blobs that are there are not
/// sent; within a registry they are mounted.
#[derive(Debug, Args)]
pub(crate) struct CopyArgs {
    /// Where the image is
    from: String,
    /// Where it goes
    to: String,
    /// This platform only: its manifest, without the index
    #[arg(long, value_name = "OS/ARCH[/VARIANT]", value_parser = crate::args::platform)]
    platform: Option<Platform>,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
}

pub(super) fn run(args: &CopyArgs, session: &Session) -> Result<(), Error> {
    let place = |text: &str| Place::parse(text, &|name| session.settings.reference(name));
    let (from, to) = (place(&args.from)?, place(&args.to)?);
    if from == to && args.platform.is_none() {
        return Err(Error::new(Kind::Usage, format!("{from} would be copied onto itself")));
    }
    let builder = session.images_only()?;
    let (progress, job) = session.start(args.quiet, false);
    let copied = registry::copy(&builder, &from, &to, args.platform.as_ref(), &job);
    progress.finish();
    let copied = unless_cancelled(copied, &job)?;
    crate::print(&format!("{}\n", copied.digest))
}
