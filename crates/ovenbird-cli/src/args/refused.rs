//! Flags of `docker build` and `docker buildx build` that are known here and not supported.
//!
//! Each is parsed like the original, so that the message names it instead of calling it unknown. A value that asks for nothing
//! (`--provenance=false`) is accepted: there is nothing to ignore.

use clap::{Arg, ArgAction, ArgMatches, Args, Command};
use ovenbird::Error;

enum Takes {
    Value,
    Switch,
}
use Takes::{Switch, Value};

struct Flag {
    name: &'static str,
    takes: Takes,
    /// Values that ask for what happens anyway.
    harmless: &'static [&'static str],
    reason: &'static str,
}

const fn flag(name: &'static str, takes: Takes, harmless: &'static [&'static str], reason: &'static str) -> Flag {
    Flag { name, takes, harmless, reason }
}

/// As buildx reads a boolean.
const NO: &[&str] = &["false", "False", "FALSE", "f", "F", "0"];

const FLAGS: &[Flag] = &[
    flag("attest", Value, &["disabled=true"], "attestations are not made yet"),
    flag("provenance", Value, NO, "provenance attestations are not made yet; --provenance=false is accepted"),
    flag("sbom", Value, NO, "SBOM attestations are not made yet; --sbom=false is accepted"),
    flag("isolation", Value, &["", "default"], "it is for Windows containers; see --isolation-level"),
    flag("squash", Switch, &["false"], "use --plugin pre_publish:squash, which merges the layers above the base image"),
    flag("cgroup-parent", Value, &[""], "steps get their own control group; see --memory and --cpus"),
    flag("security-opt", Value, &[], "steps run with Ovenbird's own seccomp filter and capabilities; see --allow security.insecure"),
    flag("print", Value, &["build", ""], "only building is possible"),
    flag("debug", Switch, &["false"], "there is no debugger; --progress=plain shows all output"),
    flag("policy", Value, &[], "source policies are not evaluated"),
    flag("resource", Value, &[], "use --memory and --cpus"),
    flag("device", Value, &[], "devices of the machine are not given to steps"),
    flag("memory-swap", Value, &[], "swap is not limited on its own; use --memory"),
    flag("cpu-shares", Value, &["0"], "use --cpus"),
    flag("cpu-period", Value, &["0"], "use --cpus (quota divided by period)"),
    flag("cpu-quota", Value, &["0"], "use --cpus (quota divided by period)"),
    flag("cpuset-cpus", Value, &[""], "use --cpus, or start ovenbird under taskset"),
    flag("cpuset-mems", Value, &[""], "start ovenbird under numactl"),
    flag("credential-spec", Value, &[""], "it is for Windows containers"),
    flag("stream", Switch, &["false"], "the context is read where it is, nothing is streamed"),
    flag("disable-content-trust", Switch, &["true"], "image signatures are not verified"),
    flag("rm", Switch, &["true"], "no container is left after a step, so none can be kept"),
    flag("force-rm", Switch, &["true", "false"], ""),
    flag("compress", Switch, &["true", "false"], ""),
];

/// The refused flags that were given: name and value.
#[derive(Debug, Clone, Default)]
pub(crate) struct Refused {
    given: Vec<(&'static str, String)>,
}

impl Refused {
    /// Refuses the first that asks for something.
    pub(crate) fn check(&self) -> Result<(), Error> {
        for (name, value) in &self.given {
            let Some(flag) = FLAGS.iter().find(|f| f.name == *name) else { continue };
            let harmless = flag.harmless.contains(&value.as_str())
                || (*name == "attest" && value.split(',').any(|field| flag.harmless.contains(&field)));
            if !harmless {
                return Err(Error::refused(&format!("--{name}"), flag.reason));
            }
        }
        Ok(())
    }
}

impl clap::FromArgMatches for Refused {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut this = Self::default();
        this.update_from_arg_matches(matches)?;
        Ok(this)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        for flag in FLAGS {
            for value in matches.get_many::<String>(flag.name).into_iter().flatten() {
                self.given.push((flag.name, value.clone()));
            }
        }
        Ok(())
    }
}

impl Args for Refused {
    fn augment_args(command: Command) -> Command {
        FLAGS.iter().fold(command, |command, flag| {
            let arg = Arg::new(flag.name).long(flag.name).hide(true).action(ArgAction::Append);
            let arg = if flag.name == "debug" { arg.short('D') } else { arg };
            command.arg(match flag.takes {
                Switch => arg.num_args(0..=1).require_equals(true).default_missing_value("true"),
                // `--memory-swap -1`
                Value => arg.num_args(1).allow_hyphen_values(true),
            })
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}
