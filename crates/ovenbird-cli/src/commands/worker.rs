//! `ovenbird worker`: what `--on` starts in another place.

use clap::Args;
use ovenbird::{BuilderKind, Error, Kind, worker};
use ovenbird_engine::Cancel;

use crate::session::Session;

/// Build for a caller at the other end of standard input and output. `ovenbird build --on …` starts it where the build is to run; the
/// protocol is documented in docs/reference/worker-protocol.md.
#[derive(Debug, Args)]
pub(crate) struct WorkerArgs {
    /// Most workers at once with this state directory; one more says that it is busy, and ends
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..))]
    slots: Option<u16>,
    /// What builds: engine, docker or auto
    #[arg(long, value_name = "BUILDER")]
    builder: Option<BuilderKind>,
}

pub(crate) fn run(args: &WorkerArgs, session: Session) -> Result<u8, Error> {
    let builder = args.builder.or(session.settings.builder).unwrap_or_default();
    let (level, overlay) = if builder == BuilderKind::Docker { session.outside()? } else { session.enter()? };
    let cancel = Cancel::default();
    crate::signal::watch(&cancel);
    let slots = args.slots.map(usize::from);
    let place = worker::Place { settings: session.settings, environment: session.environment, level, overlay, builder, slots };
    let abandon = || std::process::exit(i32::from(Kind::Cancelled.exit_code()));
    Ok(worker::serve(place, std::io::stdin(), std::io::stdout(), &cancel, abandon))
}
