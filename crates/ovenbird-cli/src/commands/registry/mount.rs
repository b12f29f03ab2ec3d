//! `ovenbird registry mount`.

use clap::Args;
use ovenbird::{Error, Kind, registry};

use crate::commands::unless_cancelled;
use crate::session::Session;

/// Make the blobs of an image part of another repository of the same registry, without a transfer. Prints their digests.
///
/// No name is given: `registry copy` does that, and mounts, too.
#[derive(Debug, Args)]
pub(crate) struct MountArgs {
    /// Image, or REPOSITORY@DIGEST of one blob
    from: String,
    /// Repository that gets the blobs
    to: String,
}

pub(super) fn run(args: &MountArgs, session: &Session) -> Result<(), Error> {
    let (from, to) = (session.settings.reference(&args.from)?, session.settings.reference(&args.to)?);
    if args.to.contains('@') || args.to.rsplit('/').next().is_some_and(|last| last.contains(':')) {
        return Err(Error::new(Kind::Usage, format!("{:?} has a tag or digest, and blobs have none", args.to))
            .hint(format!("give a repository, or use `ovenbird registry copy {} {}`", args.from, args.to)));
    }
    let builder = session.images_only()?;
    let (progress, job) = session.start(true, false);
    let done = registry::mount(&builder, &from, &to, &job);
    progress.finish();
    let done = unless_cancelled(done, &job)?;
    let refused = done.iter().filter(|(_, mounted)| !mounted).count();
    done.iter().filter(|(_, mounted)| *mounted).try_for_each(|(blob, _)| crate::print(&format!("{blob}\n")))?;
    if refused == 0 {
        return Ok(());
    }
    let message =
        format!("{} did not mount {refused} of {} blobs: it cannot, or may not read {}", to.registry(), done.len(), from.repository());
    Err(Error::new(Kind::Registry, message).hint("`ovenbird registry copy` sends what cannot be mounted"))
}
