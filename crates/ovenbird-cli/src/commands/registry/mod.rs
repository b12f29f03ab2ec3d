//! `ovenbird registry`: what registries have.

mod copy;
mod delete;
mod exists;
mod inspect;
mod mount;
mod tags;

use clap::{Args, Subcommand};
use ovenbird::Error;

use crate::session::Session;

/// Look at and change what registries have.
#[derive(Debug, Args)]
pub(crate) struct RegistryArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Exists(exists::ExistsArgs),
    Inspect(inspect::InspectArgs),
    Tags(tags::TagsArgs),
    Copy(copy::CopyArgs),
    Delete(delete::DeleteArgs),
    Mount(mount::MountArgs),
}

/// Exit code of a question whose answer is no.
const NO: u8 = 1;

pub(crate) fn run(args: &RegistryArgs, session: &Session) -> Result<u8, Error> {
    let done = match &args.command {
        Command::Exists(args) => return exists::run(args, session).map(|exists| if exists { 0 } else { NO }),
        Command::Inspect(args) => inspect::run(args, session),
        Command::Tags(args) => tags::run(args, session),
        Command::Copy(args) => copy::run(args, session),
        Command::Delete(args) => delete::run(args, session),
        Command::Mount(args) => mount::run(args, session),
    };
    done.map(|()| 0)
}
