//! `ovenbird self-image`.

use clap::Args;
use ovenbird::request::{Output, OutputKind};
use ovenbird::{Driver as _, Error, LocalDriver, SelfImage};

use super::unless_cancelled;
use crate::session::Session;

/// Make an image of this program itself, without any network: for `--on container,image=NAME`, or to run builds anywhere.
///
/// The image has the program, the libraries that it needs and the certificate authorities of this machine. It has no git.
#[derive(Debug, Args)]
pub(crate) struct SelfImageArgs {
    /// Name of the image [default: ovenbird-self:HASH]
    #[arg(short, long = "tag", value_name = "NAME[:TAG]")]
    tags: Vec<String>,
    /// Push the image to the registries of its names
    #[arg(long)]
    push: bool,
    /// Load the image into the Docker Engine
    #[arg(long)]
    load: bool,
    /// Where the result goes, as in `ovenbird build`
    #[arg(short, long = "output", value_name = "type=TYPE[,KEY=VALUE]")]
    outputs: Vec<Output>,
    /// Show no progress
    #[arg(short, long)]
    quiet: bool,
}

pub(crate) fn run(args: &SelfImageArgs, session: &Session) -> Result<(), Error> {
    let image = SelfImage::of_this_program()?;
    let (mut request, _folder) = image.request(&session.settings.temp)?;
    request.names = if args.tags.is_empty() { vec![image.name()?] } else { args.tags.clone() };
    request.outputs.clone_from(&args.outputs);
    request.outputs.extend(args.push.then(|| Output::new(OutputKind::Registry)));
    request.outputs.extend(args.load.then(|| Output::new(OutputKind::Load)));
    let request = session.settings.with_full_names(request);
    if image.lacks_authorities() {
        crate::note("this machine has no certificate authorities, so the image has none: from it, registries over HTTPS cannot be reached");
    }
    let builder = session.images_only()?;
    let (progress, job) = session.start(args.quiet, false);
    let result = LocalDriver::new(builder, session.sources(), std::io::empty()).run(&request, &job);
    progress.finish();
    let report = unless_cancelled(result, &job)?;
    if request.outputs.iter().any(Output::uses_stdout) { Ok(()) } else { crate::print(&format!("{}\n", report.digest)) }
}
