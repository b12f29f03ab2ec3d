//! `ovenbird registry delete`.

use clap::Args;
use ovenbird::{Error, registry};

use crate::commands::unless_cancelled;
use crate::session::Session;

/// Delete a tag, or an image by its digest. Prints what is gone.
///
/// An image that has other tags is not deleted without --force. The space is freed when the registry collects its garbage.
#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    /// Name of the image, with a tag or a digest
    #[arg(value_name = "NAME:TAG|NAME@DIGEST")]
    image: String,
    /// Delete the image with all its tags
    #[arg(short, long)]
    force: bool,
}

pub(super) fn run(args: &DeleteArgs, session: &Session) -> Result<(), Error> {
    let image = session.settings.reference(&args.image)?;
    // What is gone is gone: no tag is guessed.
    let explicit = image.digest().is_some() || args.image.rsplit('/').next().is_some_and(|last| last.contains(':'));
    if !explicit {
        return Err(Error::new(ovenbird::Kind::Usage, format!("{:?} does not say what to delete", args.image))
            .hint(format!("give a tag or a digest: {}:TAG", args.image)));
    }
    let builder = session.images_only()?;
    let (progress, job) = session.start(true, false);
    let gone = registry::delete(&builder, &image, args.force, &job);
    progress.finish();
    let gone = unless_cancelled(gone, &job)?;
    gone.iter().try_for_each(|name| crate::print(&format!("deleted: {name}\n")))
}
