//! `ovenbird worker`: what `--on` starts in another place.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use ovenbird::worker::{self, socket};
use ovenbird::{BuilderKind, Error, Kind};
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
    /// Credentials for registries, as Docker's client writes them; the caller is asked for what the file does not have
    #[arg(long, value_name = "FILE")]
    credentials: Option<PathBuf>,
    /// Build for the first caller at this socket, and show the progress on standard error
    #[arg(long, value_name = "SOCKET", conflicts_with_all = ["connect", "slots"])]
    listen: Option<PathBuf>,
    /// Be the pipe to the worker that listens at this socket
    #[arg(long, value_name = "SOCKET", conflicts_with_all = ["slots", "builder", "lease", "credentials"])]
    connect: Option<PathBuf>,
    /// How long to wait at a socket for the other end, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    patience: u32,
    /// With --listen: a caller who says nothing for so long is gone, in seconds
    #[arg(long, value_name = "SECONDS", requires = "listen", value_parser = clap::value_parser!(u32).range(1..))]
    lease: Option<u32>,
}

impl WorkerArgs {
    /// The socket whose pipe this is to be. Such a process needs no settings.
    pub(crate) fn connects(&self) -> Option<&Path> {
        self.connect.as_deref()
    }
}

fn seconds(seconds: u32) -> Duration {
    Duration::from_secs(seconds.into())
}

pub(crate) fn run(args: &WorkerArgs, session: Session) -> Result<u8, Error> {
    let builder = args.builder.or(session.settings.builder).unwrap_or_default();
    let (level, overlay) = if builder == BuilderKind::Docker { session.outside()? } else { session.enter()? };
    let Some(path) = &args.listen else {
        let cancel = Cancel::default();
        crate::signal::watch(&cancel);
        let slots = args.slots.map(usize::from);
        let (settings, environment) = (session.settings, session.environment);
        let place =
            worker::Place { settings, environment, level, overlay, builder, slots, credentials: args.credentials.clone(), echo: None };
        return Ok(worker::serve(place, std::io::stdin(), std::io::stdout(), &cancel, abandon));
    };
    let (progress, job) = session.start(false, false);
    let caller = caller(path, args)?;
    let answers = caller.try_clone().map_err(|error| broken(path, &error))?;
    let (settings, environment) = (session.settings, session.environment);
    let echo = Some(Arc::clone(&job.sink));
    let place = worker::Place { settings, environment, level, overlay, builder, slots: None, credentials: args.credentials.clone(), echo };
    let code = worker::serve(place, caller, answers, &job.cancel, abandon);
    progress.finish();
    Ok(code)
}

fn abandon() {
    std::process::exit(i32::from(Kind::Cancelled.exit_code()));
}

fn caller(path: &Path, args: &WorkerArgs) -> Result<UnixStream, Error> {
    let came = socket::accept(path, seconds(args.patience), args.lease.map(seconds)).map_err(|error| broken(path, &error))?;
    came.ok_or_else(|| Error::new(Kind::Driver, format!("no caller came to {} within {} s", path.display(), args.patience)))
}

fn broken(path: &Path, error: &std::io::Error) -> Error {
    Error::from_chain(Kind::Driver, error).while_doing(format!("cannot use the socket {}", path.display()))
}

/// Is the pipe, to its end.
pub(crate) fn connect(path: &Path, args: &WorkerArgs) -> Result<u8, Error> {
    socket::connect(path, seconds(args.patience), std::io::stdin(), std::io::stdout()).map_err(|error| broken(path, &error))?;
    // Standard input may never end, and a thread reads it.
    std::process::exit(0)
}
