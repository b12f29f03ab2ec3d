//! The command line: parses arguments, prepares this process, calls the product, shows what comes of it.
//!
//! Standard output has only the result of a command (a digest, a table, JSON, an archive); everything else goes to standard error.
//! Exit codes are those of [`ovenbird::Kind`]. A command that runs steps enters its isolation level before this process has a second
//! thread. It must not know how images are built.

mod args;
mod commands;
mod findings;
mod place;
mod progress;
mod render;
mod session;
mod signal;

use std::ffi::OsString;
use std::io::{IsTerminal as _, Write as _};

use clap::Parser as _;
use ovenbird::{Environment, Error, Kind};

/// Runs one command line; returns the exit code.
pub fn run(argv: impl IntoIterator<Item = OsString>) -> u8 {
    let cli = match args::Cli::try_parse_from(argv) {
        Ok(cli) => cli,
        Err(error) => {
            // A closed pipe behind `ovenbird --help | head` is nobody's failure.
            let _ = error.print();
            return if error.use_stderr() { Kind::Usage.exit_code() } else { 0 };
        }
    };
    let environment = Environment::current();
    let colour = std::io::stderr().is_terminal() && environment.get("NO_COLOR").is_none_or(str::is_empty);
    match commands::run(cli, &environment) {
        Ok(code) => code,
        Err(error) => {
            let _ = std::io::stderr().write_all(render::error(&error, colour).as_bytes());
            error.kind.exit_code()
        }
    }
}

/// Says something beside the result, on one line of standard error.
fn note(text: &str) {
    let _ = std::io::stderr().write_all(render::note(text).as_bytes());
}

/// Writes a result to standard output. A reader that has gone away is not an error.
fn print(text: &str) -> Result<(), Error> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::from_chain(Kind::Configuration, &error).while_doing("cannot write to standard output"))
        }
        _ => Ok(()),
    }
}
