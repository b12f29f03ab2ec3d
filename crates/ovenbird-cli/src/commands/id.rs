//! `ovenbird id`.

use clap::Args;
use ovenbird::{BuildRequest, Error, Library as _};

use crate::args::{BuildArgs, Format};
use crate::session::Session;

/// Print the content id: the hash of everything that decides the image, without building.
///
/// Takes the arguments of `ovenbird build`; `{id}` in a name given with -t is this text. Equal ids mean equal files, configuration and form,
/// on every machine, in every folder, for every user. See docs/guides/content-id.md for what counts.
#[derive(Debug, Args)]
pub(crate) struct IdArgs {
    #[command(flatten)]
    pub(crate) build: BuildArgs,
    /// text: 64 hex digits; json: what the id was made of
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

pub(crate) fn run(args: &IdArgs, request: &BuildRequest, session: &Session) -> Result<(), Error> {
    let builder = session.sandboxed()?;
    let (progress, job) = session.start(true, false);
    let tree = session.sources().fetch(request, &mut std::io::stdin(), &job);
    let id = tree.and_then(|tree| builder.identify(&tree, &tree.dated(request), &job));
    progress.finish();
    let id = super::unless_cancelled(id, &job)?;
    match args.format {
        Format::Text => crate::print(&format!("{}\n", id.id.hex())),
        Format::Json => crate::print(&super::json(&id)?),
    }
}
