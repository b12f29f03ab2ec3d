//! `ovenbird completions`.

use clap::{Args, CommandFactory as _};
use clap_complete::Shell;
use ovenbird::Error;

/// Print a completion script for a shell, for example `ovenbird completions bash > /etc/bash_completion.d/ovenbird`.
#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// Shell
    shell: Shell,
}

pub(crate) fn run(args: &CompletionsArgs) -> Result<(), Error> {
    let mut script = vec![];
    clap_complete::generate(args.shell, &mut crate::args::Cli::command(), "ovenbird", &mut script);
    crate::print(&String::from_utf8_lossy(&script))
}
