//! `ovenbird login`.

use std::io::Read as _;

use clap::Args;
use ovenbird::{Error, Kind};
use ovenbird_oci::keychain::{Kept, Secret, registry_name};
use ovenbird_oci::registry::Client;

use crate::session::Session;

/// Longest password, in bytes: cloud tokens have a few thousand.
const MAX_PASSWORD: u64 = 64 * 1024;

/// Check credentials for a registry and keep them where Docker keeps them.
#[derive(Debug, Args)]
pub(crate) struct LoginArgs {
    /// Registry [default: Docker Hub]
    #[arg(default_value = "docker.io", hide_default_value = true)]
    registry: String,
    /// Account
    #[arg(short, long)]
    username: String,
    /// Read the password from standard input: `ovenbird login -u me --password-stdin REGISTRY < FILE`
    #[arg(long)]
    password_stdin: bool,
}

pub(crate) fn run(args: &LoginArgs, session: &Session) -> Result<(), Error> {
    if !args.password_stdin {
        return Err(Error::new(Kind::Usage, "the password is read from standard input only")
            .hint("add --password-stdin: a password on the command line is seen by every process"));
    }
    let mut password = String::new();
    std::io::stdin()
        .take(MAX_PASSWORD)
        .read_to_string(&mut password)
        .map_err(|e| Error::from_chain(Kind::Usage, &e).while_doing("cannot read the password from standard input"))?;
    let password = password.trim_end_matches(['\r', '\n']);
    if password.is_empty() {
        return Err(Error::new(Kind::Usage, "the password on standard input is empty"));
    }
    let password = Secret::new(password);
    let registry = registry_name(&args.registry);
    if let Some(source) = session.settings.keychain.sources.get(&registry) {
        return Err(Error::new(
            Kind::Configuration,
            format!("a login would change nothing: the settings say that the credentials of {registry} come from {source}"),
        )
        .hint("change `credentials` of this registry in the settings, or put them there"));
    }
    let client = Client::new(session.settings.client_options());
    let keychain = session.settings.client_options().keychain();
    let kept = super::logout::block_on(async {
        client.check_login(&registry, &args.username, &password).await?;
        keychain.store(&registry, &args.username, &password).await.map_err(|e| Error::from_chain(Kind::Configuration, &e))
    })?;
    crate::print(&match kept {
        Kept::File(path) => format!("login succeeded; kept in {}, readable for you and not encrypted\n", path.display()),
        Kept::Helper(helper) => format!("login succeeded; kept by {helper}\n"),
    })
}
