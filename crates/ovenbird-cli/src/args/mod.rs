//! The command line as typed. Doc comments here are the reference that users read.

mod build;
mod refused;
mod subject;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ovenbird::Settings;
use ovenbird::settings::{Overrides, Progress, RegistryOption, parse_level};
use ovenbird_sandbox::Level;

pub(crate) use build::{BuildArgs, ProjectBuild};
pub(crate) use subject::{Subject, platform};

use crate::commands;

/// `--format` of commands that answer a question.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Text,
    Json,
}

/// Builds container images from Dockerfiles, with no daemon.
#[derive(Debug, Parser)]
#[command(name = "ovenbird", version, propagate_version = true, max_term_width = 100, args_override_self = true)]
#[command(after_help = "Exit codes: 0 ok, 1 bug, 2 usage, 3 configuration, 4 Dockerfile, 5 source, 6 a step exited non-zero, 7 registry \
or authentication, 8 sandbox not possible here, 9 veto (a plugin, or a secret in the image), 10 driver or remote, 130 cancelled. `registry exists` has 1 for no.")]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Flags of every command.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// State directory: cache, snapshots and images [default: $XDG_DATA_HOME/ovenbird or ~/.local/share/ovenbird; env: OVENBIRD_ROOT]
    #[arg(long, global = true, value_name = "DIR")]
    root: Option<PathBuf>,
    /// One more settings file (TOML), stronger than those of the machine and the user [env: OVENBIRD_SETTINGS]
    #[arg(long, global = true, value_name = "FILE")]
    settings: Option<PathBuf>,
    /// Use this isolation level or fail: root, rootless, single-id, chroot, traced. Without it, the best one that `ovenbird doctor` finds
    #[arg(long, global = true, value_name = "LEVEL", value_parser = parse_level)]
    isolation_level: Option<Level>,
    /// How progress is shown on standard error: auto, plain, tty, rawjson (one event a line) or quiet [env: OVENBIRD_PROGRESS]
    #[arg(long, global = true, value_name = "MODE")]
    progress: Option<Progress>,
    /// Settings of one registry, several times: the keys of `[registry."HOST"]`, such as plain-http, ca, client-identity, mirror,
    /// endpoint, transfers, requests-per-second, create-repository, credentials=SOURCE
    #[arg(long = "registry-option", global = true, value_name = "HOST,KEY=VALUE")]
    registry_options: Vec<RegistryOption>,
}

impl Global {
    pub(crate) fn overrides(&self) -> Overrides {
        Overrides {
            file: self.settings.clone(),
            root: self.root.clone(),
            progress: self.progress,
            parallel: None,
            isolation_level: self.isolation_level,
            registries: self.registry_options.clone(),
        }
    }

    /// Was a level of isolation asked for?
    pub(crate) fn asks_for_level(&self) -> bool {
        self.isolation_level.is_some()
    }

    /// What of it is for a worker in a container or on another machine.
    pub(crate) fn elsewhere(&self) -> Vec<OsString> {
        self.isolation_level.iter().flat_map(|level| ["--isolation-level".into(), level.name().into()]).collect()
    }

    /// Refuses what a worker with settings of its own cannot be told.
    pub(crate) fn refuse_elsewhere(&self, place: &str) -> Result<(), ovenbird::Error> {
        let no = |flag: &str| Err(ovenbird::Error::refused(flag, format!("the build runs {place}, with the settings there")));
        if self.isolation_level.is_some() {
            return no("--isolation-level");
        }
        Ok(())
    }

    /// The same for a worker on this machine; registries go through the pipe.
    pub(crate) fn for_worker(&self, settings: &Settings) -> Vec<OsString> {
        let mut flags: Vec<OsString> = vec!["--root".into(), settings.root.clone().into()];
        flags.extend(self.settings.iter().flat_map(|file| ["--settings".into(), file.clone().into()]));
        flags.extend(self.isolation_level.iter().flat_map(|level| ["--isolation-level".into(), level.name().into()]));
        flags
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Build an image from a Dockerfile
    Build(Box<BuildArgs>),
    /// Check a Dockerfile, without building
    Lint(Box<commands::lint::LintArgs>),
    /// Show which steps a build would run, and why, without building
    Plan(Box<commands::plan::PlanArgs>),
    /// Print the content id: the hash of everything that decides the image, without building
    Id(Box<commands::id::IdArgs>),
    /// Show why steps of the last build ran
    Why(commands::why::WhyArgs),
    /// Push an image of this machine to a registry
    Push(commands::push::PushArgs),
    /// Pull an image from a registry
    Pull(commands::pull::PullArgs),
    /// Look at and change what registries have: exists, inspect, tags, copy, delete, mount
    Registry(commands::registry::RegistryArgs),
    /// Give an image one more name
    Tag(commands::tag::TagArgs),
    /// List the images of this machine
    Images(commands::images::ImagesArgs),
    /// Show the manifest and the configuration of an image as JSON
    Inspect(commands::inspect::InspectArgs),
    /// Remove names of images; `prune` then frees the space
    Rmi(commands::rmi::RmiArgs),
    /// Write an image as an archive, a layout or plain files
    Export(commands::export::ExportArgs),
    /// Load an image into a Docker Engine
    Load(commands::load::LoadArgs),
    /// Run images in a Kubernetes cluster, by digest: run, apply, status, wait, logs, remove
    Deploy(Box<commands::deploy::DeployArgs>),
    /// Remove cached build results
    Prune(commands::prune::PruneArgs),
    /// Show how much the state directory holds
    Df(commands::df::DfArgs),
    /// Show what this machine allows, and what is missing for more
    Doctor(commands::doctor::DoctorArgs),
    /// Show who you are to a registry
    Auth(commands::auth::AuthArgs),
    /// Keep credentials for a registry
    Login(commands::login::LoginArgs),
    /// Remove credentials for a registry
    Logout(commands::logout::LogoutArgs),
    /// Make an image of this program itself, to run as a build container
    #[command(alias = "create-build-image")]
    SelfImage(commands::self_image::SelfImageArgs),
    /// Build for a caller at the other end of a pipe
    #[command(hide = true)]
    Worker(commands::worker::WorkerArgs),
    /// Run a program that must not outlive its caller
    #[command(hide = true)]
    Leash(commands::leash::LeashArgs),
    /// Print a completion script for a shell
    Completions(commands::completions::CompletionsArgs),
    /// Print the version
    Version(commands::version::VersionArgs),
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn definition_is_sound() {
        Cli::command().debug_assert();
    }
}
