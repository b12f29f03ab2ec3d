//! `ovenbird lint`, and `ovenbird build --check`, which is the same.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use ovenbird::request::{DockerfileFrom, Source};
use ovenbird::source::SourceTree;
use ovenbird::{BuildRequest, Environment, Error, Kind};
use ovenbird_dockerfile::Severity;

use crate::args::Subject;
use crate::findings::{self, Format};
use crate::session::Session;

/// Check a Dockerfile, without building.
///
/// Finds what a build would refuse or warn of: errors, and violations of BuildKit's rules under BuildKit's names. Each rule has a page in
/// docs/reference/lint. `# check=skip=RULE` at the top of a Dockerfile leaves a rule out, right above an instruction only there;
/// `# check=error=true` makes violations errors.
///
/// PATH can also be a Dockerfile in its context. Instructions of stages that the target does not need are not checked.
///
/// Fails with code 4 when there are findings (see --failure-threshold). Base images are looked up on this machine, then in their
/// registries, because a variable may be defined and a shell be chosen there; without them the rest is still checked.
#[derive(Debug, Args)]
pub(crate) struct LintArgs {
    #[command(flatten)]
    subject: Subject,
    /// How findings are printed
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    format: Format,
    /// Fail only when there is a finding at least this bad
    #[arg(long, value_name = "SEVERITY", default_value = "warning")]
    failure_threshold: Threshold,
    /// Look up no base image; not even on this machine
    #[arg(long)]
    offline: bool,
}

/// What makes a check fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Threshold {
    /// Any finding
    Warning,
    /// An error
    Error,
    /// Nothing
    None,
}

/// How to check.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Manner {
    format: Format,
    threshold: Threshold,
    offline: bool,
}

impl Manner {
    /// Of `build --check`.
    pub(crate) const OF_BUILD: Self = Self { format: Format::Text, threshold: Threshold::Warning, offline: false };
}

impl LintArgs {
    /// The request whose Dockerfile is checked.
    pub(crate) fn request(&self, environment: &Environment) -> Result<BuildRequest, Error> {
        let path = Path::new(self.subject.context()?);
        if self.subject.dockerfile() == DockerfileFrom::Default && path.is_file() {
            let context = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
            return self.subject.request_for(Source::Path(context.to_owned()), DockerfileFrom::Path(path.to_owned()), environment);
        }
        self.subject.request(environment)
    }
}

pub(crate) fn run(args: &LintArgs, request: &BuildRequest, session: &Session) -> Result<(), Error> {
    check(request, session, Manner { format: args.format, threshold: args.failure_threshold, offline: args.offline })
}

/// Prints the findings; fails when there are some.
pub(crate) fn check(request: &BuildRequest, session: &Session, manner: Manner) -> Result<(), Error> {
    let (progress, job) = session.start(true, false);
    let tree = super::unless_cancelled(session.sources().fetch(request, &mut std::io::stdin(), &job), &job)?;
    // Nothing that only steps and results need is looked at.
    let request = &BuildRequest { secrets: vec![], ssh: vec![], outputs: vec![], ..tree.dated(request) };
    // Many files need no image: the state directory is then neither made nor opened.
    let mut builder = None;
    let found = ovenbird::lint(&tree, request, &mut |image| {
        if manner.offline {
            return Err("--offline was given".to_owned());
        }
        let builder = builder.get_or_insert_with(|| session.images_only().map_err(|error| told(&error)));
        let resolved = builder.as_ref().map_err(Clone::clone)?.resolve(&tree, request, image, &job);
        resolved.map_err(|error| told(&error))
    });
    progress.finish();
    let found = super::unless_cancelled(found, &job)?;
    if job.cancel.is_cancelled() {
        return Err(Error::new(Kind::Cancelled, "cancelled"));
    }
    let name = shown_name(request, &tree).display().to_string();
    crate::print(&findings::show(manner.format, &found, &name, &tree.dockerfile)?)?;
    for (image, reason) in &found.unknown {
        crate::note(&findings::unchecked(image, reason));
    }
    // An argument that nobody takes says nothing of the Dockerfile: scripts give the same arguments to many.
    let counted = || found.diagnostics.iter().filter(|d| d.code != "UnconsumedBuildArg");
    let at_least = |severity| counted().filter(|d| d.severity >= severity).count();
    let count = match manner.threshold {
        Threshold::Warning => at_least(Severity::Warning),
        Threshold::Error => at_least(Severity::Error),
        Threshold::None => 0,
    };
    match count {
        0 => Ok(()),
        1 => Err(Error::new(Kind::Dockerfile, format!("{name} has 1 finding"))),
        count => Err(Error::new(Kind::Dockerfile, format!("{name} has {count} findings"))),
    }
}

fn told(error: &Error) -> String {
    std::iter::once(&error.message).chain(&error.causes).map(String::as_str).collect::<Vec<_>>().join(": ")
}

/// The Dockerfile as seen from the working directory, where tools look for it.
fn shown_name(request: &BuildRequest, tree: &SourceTree) -> PathBuf {
    let name = match (&request.source, &request.dockerfile) {
        (Source::Path(dir), DockerfileFrom::Default) => dir.join(&tree.dockerfile_name),
        _ => PathBuf::from(&tree.dockerfile_name),
    };
    name.strip_prefix(".").map(Path::to_owned).unwrap_or(name)
}
