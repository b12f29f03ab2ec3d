//! `ovenbird tag`.

use clap::Args;
use ovenbird::Error;

use crate::session::Session;

/// Give an image one more name.
#[derive(Debug, Args)]
pub(crate) struct TagArgs {
    /// Name or digest of the image
    image: String,
    /// New names
    #[arg(required = true, value_name = "NAME[:TAG]")]
    names: Vec<String>,
}

pub(crate) fn run(args: &TagArgs, session: &Session) -> Result<(), Error> {
    let builder = session.images_only()?;
    let store = builder.engine().store();
    let target = session.find(store, &args.image)?;
    for name in &session.references(&args.names)? {
        if name.digest().is_some() || name.tag().is_none() {
            return Err(Error::new(ovenbird::Kind::Usage, format!("{name} cannot name an image: it has a digest")));
        }
        store.tag(name, &target)?;
    }
    Ok(())
}
