//! `ovenbird leash`: the small parent of a plugin's program.

use std::ffi::OsString;

use clap::Args;
use ovenbird::launch::leash;
use ovenbird::{Error, Kind};

/// Run a program, and kill all that it started when it ends or when standard input does. Builds start it for the programs of plugins.
#[derive(Debug, Args)]
pub(crate) struct LeashArgs {
    /// Bytes of standard input that are for the program
    input: u64,
    /// The program
    program: OsString,
}

pub(crate) fn run(args: &LeashArgs) -> Result<u8, Error> {
    leash::hold(&args.program, args.input, std::io::stdin())
        .map_err(|error| Error::from_chain(Kind::Driver, &error).while_doing(format!("{} cannot be run", args.program.display())))
}
