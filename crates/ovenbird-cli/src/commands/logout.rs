//! `ovenbird logout`.

use std::future::Future;

use clap::Args;
use ovenbird::{Error, Kind};
use ovenbird_oci::keychain::{Kept, registry_name};

use crate::session::Session;

/// Remove credentials for a registry.
#[derive(Debug, Args)]
pub(crate) struct LogoutArgs {
    /// Registry [default: Docker Hub]
    #[arg(default_value = "docker.io", hide_default_value = true)]
    registry: String,
}

pub(crate) fn run(args: &LogoutArgs, session: &Session) -> Result<(), Error> {
    let registry = registry_name(&args.registry);
    let keychain = session.settings.client_options().keychain();
    let removed = block_on(async { keychain.erase(&registry).await.map_err(|e| Error::from_chain(Kind::Configuration, &e)) })?;
    if removed.is_empty() {
        return crate::print(&format!("there were no credentials for {registry}\n"));
    }
    for kept in removed {
        let place = match kept {
            Kept::File(path) => path.display().to_string(),
            Kept::Helper(helper) => helper,
        };
        crate::print(&format!("removed the credentials for {registry} from {place}\n"))?;
    }
    Ok(())
}

/// Runs a future on this thread.
pub(super) fn block_on<T>(future: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| Error::from_chain(Kind::Bug, &e))?.block_on(future)
}
