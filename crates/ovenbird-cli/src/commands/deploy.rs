//! `ovenbird deploy`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use ovenbird::choice::On;
use ovenbird::deploy::{self, Declaration, KubernetesDeployer, Port, Reach, Status};
use ovenbird::launch::KubernetesPlace;
use ovenbird::{Error, Job, Kind};

use super::unless_cancelled;
use crate::args::Format;
use crate::session::Session;

/// Run images: in a Kubernetes cluster, by digest.
#[derive(Debug, Args)]
pub(crate) struct DeployArgs {
    #[command(subcommand)]
    command: DeployCommand,
}

#[derive(Debug, Subcommand)]
enum DeployCommand {
    /// Run an image, or another one under the same name, and wait until it runs
    Run(RunArgs),
    /// Run what a file declares (TOML: name, image, replicas, ports, service, env, env_secrets, pull_secrets, requests, limits, args)
    Apply(ApplyArgs),
    /// Show how it is
    Status(StatusArgs),
    /// Wait until all of it runs
    Wait(WaitArgs),
    /// Show what its containers say
    Logs(LogsArgs),
    /// Remove what was made under a name, and nothing else
    Remove(RemoveArgs),
}

/// Where.
#[derive(Debug, Args)]
struct Place {
    /// Where it runs: `kubernetes[,context=NAME][,namespace=NAME]`
    #[arg(long, value_name = "PLACE", default_value = "kubernetes")]
    on: On,
    /// Namespace [default: that of the context]
    #[arg(short, long, value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// Context of the kubeconfig [default: the current one]
    #[arg(long, value_name = "CONTEXT")]
    context: Option<String>,
}

impl Place {
    fn deployer(&self, session: &Session) -> Result<KubernetesDeployer, Error> {
        let On::Kubernetes(place) = &self.on else {
            return Err(Error::refused(&format!("deploy --on {}", self.on), "this version runs images in Kubernetes only"));
        };
        let mut place = KubernetesPlace::clone(place);
        let of_builds = KubernetesPlace { context: None, namespace: None, ..place.clone() };
        if of_builds != KubernetesPlace::default() {
            return Err(Error::refused(&format!("deploy --on kubernetes{of_builds}"), "that is for pods of builds")
                .hint("here context=NAME and namespace=NAME can be said; what runs has options of its own"));
        }
        place.namespace = self.namespace.clone().or(place.namespace);
        place.context = self.context.clone().or(place.context);
        KubernetesDeployer::new(&session.settings.kubernetes.resolve(&place), &session.environment)
    }
}

#[derive(Debug, Args)]
struct RunArgs {
    /// The image, in a registry that the cluster can reach
    #[arg(value_name = "IMAGE")]
    image: String,
    /// Name of the deployment
    #[arg(long, value_name = "NAME")]
    name: String,
    /// Port at which it is reached, and at which it listens. Repeatable
    #[arg(short, long = "port", value_name = "PORT[:TARGET][/udp]")]
    ports: Vec<Port>,
    /// How its ports are reached: clusterip, nodeport or loadbalancer
    #[arg(long, value_name = "KIND", default_value = "clusterip")]
    service: Reach,
    /// How many
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    replicas: u32,
    /// Variable. No secrets: use --env-secret
    #[arg(short, long = "env", value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Secret of the namespace whose keys become variables. Repeatable
    #[arg(long = "env-secret", value_name = "SECRET")]
    env_secrets: Vec<String>,
    /// Secret of the namespace with credentials for the image. Repeatable
    #[arg(long = "pull-secret", value_name = "SECRET")]
    pull_secrets: Vec<String>,
    /// What each is promised, for example memory=64Mi. Repeatable
    #[arg(long = "request", value_name = "RESOURCE=AMOUNT")]
    requests: Vec<String>,
    /// What each must not exceed, for example memory=128Mi. Repeatable
    #[arg(long = "limit", value_name = "RESOURCE=AMOUNT")]
    limits: Vec<String>,
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    patience: Patience,
    /// Arguments instead of those of the image
    #[arg(last = true, value_name = "ARGUMENT")]
    args: Vec<String>,
}

/// How long.
#[derive(Debug, Args)]
struct Patience {
    /// Seconds to wait until it runs
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    timeout: u64,
    /// Do not wait
    #[arg(long)]
    no_wait: bool,
}

#[derive(Debug, Args)]
struct ApplyArgs {
    /// The file
    #[arg(value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    file: PathBuf,
    #[command(flatten)]
    place: Place,
    #[command(flatten)]
    patience: Patience,
}

#[derive(Debug, Args)]
struct StatusArgs {
    /// Name of the deployment
    #[arg(long, value_name = "NAME")]
    name: String,
    /// Text or JSON
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, Args)]
struct WaitArgs {
    /// Name of the deployment
    #[arg(long, value_name = "NAME")]
    name: String,
    /// Seconds to wait
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    timeout: u64,
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, Args)]
struct LogsArgs {
    /// Name of the deployment
    #[arg(long, value_name = "NAME")]
    name: String,
    /// The last lines of each container only
    #[arg(long, value_name = "LINES", value_parser = clap::value_parser!(u32))]
    tail: Option<u32>,
    #[command(flatten)]
    place: Place,
}

#[derive(Debug, Args)]
struct RemoveArgs {
    /// Name of the deployment
    #[arg(long, value_name = "NAME")]
    name: String,
    #[command(flatten)]
    place: Place,
}

pub(crate) fn run(args: &DeployArgs, session: &Session) -> Result<(), Error> {
    match &args.command {
        DeployCommand::Run(args) => {
            let mut declared = Declaration::new(&args.name, &args.image);
            declared.replicas = args.replicas;
            declared.ports.clone_from(&args.ports);
            declared.service = args.service;
            declared.env = pairs("--env", &args.env)?;
            declared.env_secrets.clone_from(&args.env_secrets);
            declared.pull_secrets.clone_from(&args.pull_secrets);
            declared.requests = pairs("--request", &args.requests)?;
            declared.limits = pairs("--limit", &args.limits)?;
            declared.args.clone_from(&args.args);
            start(&declared, &args.place, &args.patience, session)
        }
        DeployCommand::Apply(args) => {
            let text = std::fs::read_to_string(&args.file).map_err(|error| {
                Error::from_chain(Kind::Configuration, &error).while_doing(format!("cannot read {}", args.file.display()))
            })?;
            let declared = Declaration::from_toml(&text).map_err(|error| error.while_doing(args.file.display().to_string()))?;
            start(&declared, &args.place, &args.patience, session)
        }
        DeployCommand::Status(args) => {
            let status = args.place.deployer(session)?.status(&args.name)?;
            match args.format {
                Format::Json => crate::print(&super::json(&status)?),
                Format::Text => crate::print(&line(&status)),
            }
        }
        DeployCommand::Wait(args) => {
            let deployer = args.place.deployer(session)?;
            let status = with_job(session, |job| Ok(deployer.wait(&args.name, Duration::from_secs(args.timeout), job)?))?;
            crate::print(&line(&status))
        }
        DeployCommand::Logs(args) => crate::print(&args.place.deployer(session)?.logs(&args.name, args.tail.map(i64::from))?),
        DeployCommand::Remove(args) => {
            let deployer = args.place.deployer(session)?;
            let removed = with_job(session, |job| Ok(deployer.remove(&args.name, job)?))?;
            if !removed {
                crate::note(&format!("there is no deployment {}", args.name));
            }
            Ok(())
        }
    }
}

fn start(declared: &Declaration, place: &Place, patience: &Patience, session: &Session) -> Result<(), Error> {
    declared.check()?;
    let deployer = place.deployer(session)?;
    let image = deploy::pinned(&declared.image, &session.settings)?;
    let status = with_job(session, |job| {
        deployer.apply(declared, &image, job)?;
        if patience.no_wait {
            return Ok(deployer.status(&declared.name)?);
        }
        Ok(deployer.wait(&declared.name, Duration::from_secs(patience.timeout), job)?)
    })?;
    crate::print(&line(&status))
}

fn with_job<T>(session: &Session, work: impl FnOnce(&Job) -> Result<T, Error>) -> Result<T, Error> {
    let (progress, job) = session.start(false, false);
    let done = work(&job);
    progress.finish();
    unless_cancelled(done, &job)
}

/// `app running 2/2 r.io/app@sha256:… app.default:8080`.
fn line(status: &Status) -> String {
    let mut text = format!("{} {} {}/{}", status.name, status.state, status.ready, status.replicas);
    for word in status.image.iter().chain(&status.addresses) {
        text.extend([" ", word]);
    }
    if let Some(reason) = &status.reason {
        text.extend([" (", &crate::render::one_line(reason), ")"]);
    }
    text + "\n"
}

/// `NAME=VALUE`; the last of a name wins.
fn pairs(flag: &str, rows: &[String]) -> Result<std::collections::BTreeMap<String, String>, Error> {
    let wrong = |row: &str| Error::new(Kind::Usage, format!("{flag} {row:?} cannot be used")).hint(format!("write {flag} NAME=VALUE"));
    rows.iter()
        .map(|row| match row.split_once('=') {
            Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
            _ => Err(wrong(row)),
        })
        .collect()
}
