//! The `ovenbird` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(ovenbird_cli::run(std::env::args_os()))
}
