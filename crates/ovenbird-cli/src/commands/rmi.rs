//! `ovenbird rmi`.

use clap::Args;
use ovenbird::{Error, Kind};
use ovenbird_oci::{Digest, Reference};

use crate::session::Session;

/// Remove names of images; `ovenbird prune` then frees the space of images without a name.
#[derive(Debug, Args)]
pub(crate) struct RmiArgs {
    /// Names, or digests (then every name of the image goes)
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
    /// A name that is not there is no error
    #[arg(short, long)]
    force: bool,
}

pub(crate) fn run(args: &RmiArgs, session: &Session) -> Result<(), Error> {
    let builder = session.images_only()?;
    let store = builder.engine().store();
    let mut missing = vec![];
    for image in &args.images {
        let names: Vec<Reference> = match image.parse::<Digest>() {
            Ok(digest) => store.images()?.into_iter().filter(|(_, d)| d.digest == digest).map(|(name, _)| name).collect(),
            Err(_) => vec![session.settings.reference(image)?],
        };
        let mut found = false;
        for name in names {
            if store.untag(&name)? {
                found = true;
                crate::print(&format!("untagged: {}\n", name.familiar()))?;
            }
        }
        if !found {
            missing.push(image.as_str());
        }
    }
    if missing.is_empty() || args.force {
        return Ok(());
    }
    Err(Error::new(Kind::Usage, format!("there is no image {} on this machine", missing.join(", "))))
}
