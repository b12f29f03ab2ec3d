//! One file a command. Each has its arguments and a `run`.

pub(crate) mod auth;
pub(crate) mod build;
pub(crate) mod completions;
pub(crate) mod deploy;
pub(crate) mod df;
pub(crate) mod doctor;
pub(crate) mod export;
pub(crate) mod id;
pub(crate) mod images;
pub(crate) mod inspect;
pub(crate) mod leash;
pub(crate) mod lint;
pub(crate) mod load;
pub(crate) mod login;
pub(crate) mod logout;
pub(crate) mod plan;
pub(crate) mod prune;
pub(crate) mod pull;
pub(crate) mod push;
pub(crate) mod registry;
pub(crate) mod rmi;
pub(crate) mod self_image;
pub(crate) mod tag;
pub(crate) mod version;
pub(crate) mod why;
pub(crate) mod worker;

use ovenbird::{Environment, Error, Job, Kind};

use crate::args::{Cli, Command};
use crate::session::Session;

/// Runs a parsed command line; gives the exit code.
pub(crate) fn run(cli: Cli, environment: &Environment) -> Result<u8, Error> {
    let session = || Session::new(environment.clone(), &cli.global.overrides());
    let done = match cli.command {
        Command::Build(args) => {
            // A flag that is refused is said before a settings file that is wrong.
            if let Some(images) = args.project(environment)? {
                return build::run_project(&args, &images, &session()?, &cli.global).map(|()| 0);
            }
            let request = args.request(environment)?;
            let session = session()?;
            build::run(&args, &session.settings.with_full_names(request), &session, &cli.global)
        }
        Command::Plan(args) => {
            let request = args.build.request(environment)?;
            plan::run(&args, &request, &session()?)
        }
        Command::Id(args) => {
            let request = args.build.request(environment)?;
            id::run(&args, &request, &session()?)
        }
        Command::Lint(args) => {
            let request = args.request(environment)?;
            lint::run(&args, &request, &session()?)
        }
        Command::Why(args) => why::run(&args, &session()?),
        Command::Push(args) => push::run(&args, &session()?),
        Command::Pull(args) => pull::run(&args, &session()?),
        Command::Registry(args) => return registry::run(&args, &session()?),
        Command::Tag(args) => tag::run(&args, &session()?),
        Command::Images(args) => images::run(&args, &session()?),
        Command::Inspect(args) => inspect::run(&args, &session()?),
        Command::Rmi(args) => rmi::run(&args, &session()?),
        Command::Export(args) => export::run(&args, &session()?),
        Command::Load(args) => load::run(&args, &session()?),
        Command::Prune(args) => prune::run(&args, &session()?),
        Command::Deploy(args) => deploy::run(&args, &session()?),
        Command::Df(args) => df::run(&args, &session()?),
        Command::Doctor(args) => doctor::run(&args, &session()?),
        Command::Auth(args) => auth::run(&args, &session()?),
        Command::Login(args) => login::run(&args, &session()?),
        Command::Logout(args) => logout::run(&args, &session()?),
        Command::SelfImage(args) => self_image::run(&args, &session()?),
        Command::Leash(args) => return leash::run(&args),
        Command::Worker(args) => {
            return match args.connects() {
                Some(socket) => worker::connect(socket, &args),
                None => worker::run(&args, session()?),
            };
        }
        Command::Completions(args) => completions::run(&args),
        Command::Version(args) => version::run(&args),
    };
    done.map(|()| 0)
}

/// What a cancelled job leaves behind is a cancellation, whatever broke first.
fn unless_cancelled<T>(result: Result<T, Error>, job: &Job) -> Result<T, Error> {
    match result {
        Err(error) if job.cancel.is_cancelled() && error.kind != Kind::Cancelled => Err(Error::new(Kind::Cancelled, "cancelled")),
        other => other,
    }
}

/// JSON for people and programs, with a newline at the end.
fn json(value: &impl serde::Serialize) -> Result<String, Error> {
    serde_json::to_string_pretty(value).map(|text| text + "\n").map_err(|e| Error::from_chain(Kind::Bug, &e))
}
