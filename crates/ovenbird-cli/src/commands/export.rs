//! `ovenbird export`.

use std::io::IsTerminal as _;

use clap::Args;
use ovenbird::request::{Output, OutputKind};
use ovenbird::{Error, Kind};
use ovenbird_oci::Reference;

use super::unless_cancelled;
use crate::session::Session;

/// Write an image as an archive, a layout or plain files.
#[derive(Debug, Args)]
pub(crate) struct ExportArgs {
    /// Name or digest of the image
    image: String,
    /// Form and place: `type=oci|docker|tar|local,dest=PATH`, `type=oci,tar=false,dest=DIR`; a folder alone is `type=local,dest=DIR`,
    /// `-` is the files as a tar on standard output
    #[arg(short, long, value_name = "type=TYPE,dest=PATH")]
    output: Output,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
}

pub(crate) fn run(args: &ExportArgs, session: &Session) -> Result<(), Error> {
    if matches!(args.output.kind, OutputKind::Image | OutputKind::Registry | OutputKind::CacheOnly) {
        return Err(
            Error::new(Kind::Usage, "this output writes nothing that could be exported").hint("use `ovenbird push` or `ovenbird tag`")
        );
    }
    if args.output.compression.is_some() || args.output.oci_media_types.is_some() || !args.output.annotations.is_empty() {
        return Err(Error::refused(
            "compression, oci-mediatypes and annotation",
            "an image that is built keeps its bytes, and so its digest",
        ));
    }
    if args.output.uses_stdout() && std::io::stdout().is_terminal() {
        return Err(
            Error::new(Kind::Usage, "an archive would be written to the terminal").hint("add dest=FILE, or redirect standard output")
        );
    }
    let builder = session.sandboxed()?;
    let target = session.find(builder.engine().store(), &args.image)?;
    let names: Vec<Reference> = if args.output.names.is_empty() {
        session.settings.reference(&args.image).ok().filter(|name| name.digest().is_none()).into_iter().collect()
    } else {
        session.references(&args.output.names)?
    };
    let (progress, job) = session.start(args.quiet, false);
    let result = builder.export_target(&target, &args.output.kind, &names, None, &job);
    progress.finish();
    unless_cancelled(result, &job)
}
