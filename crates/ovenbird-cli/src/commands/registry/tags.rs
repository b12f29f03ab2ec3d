//! `ovenbird registry tags`.

use clap::Args;
use ovenbird::{Error, registry};
use serde_json::json;

use crate::args::Format;
use crate::commands::unless_cancelled;
use crate::session::Session;

/// List all tags of a repository, one a line.
#[derive(Debug, Args)]
pub(crate) struct TagsArgs {
    /// Repository: a name without a tag
    repository: String,
    /// text, or json: an object with the name and the list
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

pub(super) fn run(args: &TagsArgs, session: &Session) -> Result<(), Error> {
    let repository = session.settings.reference(&args.repository)?;
    let builder = session.images_only()?;
    let (progress, job) = session.start(true, false);
    let tags = registry::tags(&builder, &repository, &job);
    progress.finish();
    let tags = unless_cancelled(tags, &job)?;
    let name = format!("{}/{}", repository.registry(), repository.repository());
    match args.format {
        Format::Json => crate::print(&crate::commands::json(&json!({"name": name, "tags": tags}))?),
        Format::Text => tags.iter().try_for_each(|tag| crate::print(&format!("{tag}\n"))),
    }
}
