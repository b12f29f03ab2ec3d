//! Builds one case with `ovenbird build --builder docker` and with Docker's own client, on the same engine, and compares the two images:
//! what the client gives is what an engine gives.
//!
//! Knows nothing of what the case expects. The engine is that of `$DOCKER_HOST`, and both use its cache.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::archive::{self, Image, Kind, Node};
use crate::case::{Build, Case};
use crate::command::Level;
use crate::oracle::without_ours;
use crate::runner::{Place, docker_environment, from_docker};
use crate::{Result, dockerd, process};

/// What a comparison found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The same file tree and config.
    Same,
    /// Neither builds it. What ovenbird says of a case that is to be built: this engine has no such thing.
    BothRefuse(String),
    /// Refused by name: an engine's API has no word for it.
    Refused(String),
    /// The client of this engine has no word for it.
    NotAsked(String),
    /// The list of deviations says that there is nothing to compare.
    NotComparable,
    /// Each difference.
    Differs(Vec<String>),
}

impl Outcome {
    /// One word for a list.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Same => "same",
            Self::BothRefuse(_) => "both-refuse",
            Self::Refused(_) => "refused",
            Self::NotAsked(_) => "not-asked",
            Self::NotComparable => "not-comparable",
            Self::Differs(_) => "differs",
        }
    }

    /// Why, in a line.
    pub fn reason(&self) -> String {
        match self {
            Self::Same | Self::NotComparable => String::new(),
            Self::BothRefuse(why) | Self::Refused(why) | Self::NotAsked(why) => why.clone(),
            Self::Differs(all) => all.first().map(|first| first.lines().collect::<Vec<_>>().join(" ")).unwrap_or_default(),
        }
    }
}

/// Compares the builds of a case.
pub fn compare(case: &Case) -> Result<Outcome> {
    let place = Place::prepare(case, Level::DockerBuilder)?;
    let first = both(&place, &case.first, 1)?;
    match (&case.then, &first) {
        (Some(script), Outcome::Same) => {
            place.change(script)?;
            both(&place, &case.second, 2)
        }
        _ => Ok(first),
    }
}

fn both(place: &Place<'_>, build: &Build, number: u32) -> Result<Outcome> {
    let network = (!build.args.iter().any(|arg| arg.starts_with("--network"))).then_some("--network=host");
    let archive = place.folder().join(format!("ovenbird-{number}.tar"));
    let mut ours = place.ovenbird();
    ours.args(["--builder", "docker"]).args(network).envs(docker_environment().filter(|(name, _)| *name == "DOCKER_HOST"));
    let own_output = build.args.iter().any(|arg| matches!(arg.as_str(), "-o" | "--push" | "--check") || arg.starts_with("--output"));
    if !own_output {
        ours.arg("-o").arg(format!("type=oci,dest={}", archive.display()));
    }
    let (our_code, our_log) = place.finish(&mut ours, &build.args)?;
    if let Some(refusal) = our_log.lines().find(|line| line.contains(" is not supported: ") && our_code == Some(2)) {
        return Ok(Outcome::Refused(
            refusal.trim_start_matches("error: ").split(" is not supported").next().unwrap_or_default().to_owned(),
        ));
    }
    if own_output {
        return Ok(Outcome::NotAsked("an output that the engine's client does not make".into()));
    }
    // The same of the engine's two builders.
    let buildkit = our_log.contains("building with BuildKit of the Docker Engine");
    let tag = format!("pair-{}:{number}", std::process::id());
    let mut theirs = Command::new(dockerd::client());
    theirs.arg("build").args(["-t", &tag]).args(network).envs(docker_environment());
    theirs.env("DOCKER_BUILDKIT", if buildkit { "1" } else { "0" }).current_dir(place.folder());
    let (code, log) = place.finish(&mut theirs, &without_ours(&build.args))?;
    let unknown =
        ["unknown flag", "unknown shorthand flag", "requires BuildKit", "BuildKit is enabled but the buildx component is missing"];
    if our_code == Some(0) && code != Some(0) && unknown.iter().any(|words| log.contains(words)) {
        return Ok(Outcome::NotAsked(
            log.lines().find(|line| unknown.iter().any(|words| line.contains(words))).unwrap_or_default().to_owned(),
        ));
    }
    match (our_code, code) {
        (Some(0), Some(0)) => {}
        (Some(1 | 101) | None, _) => return Ok(differs("ovenbird broke", our_code, &our_log)),
        (Some(0), _) => return Ok(differs("the client refuses, ovenbird builds", code, &log)),
        (_, Some(0)) => return Ok(differs("ovenbird refuses, the client builds", our_code, &our_log)),
        _ if build.error.is_some() => return Ok(Outcome::BothRefuse(String::new())),
        _ => {
            // What failed, and the first cause.
            let said = our_log.lines().skip_while(|line| !line.starts_with("error: ")).take(2).map(str::trim);
            return Ok(Outcome::BothRefuse(said.collect::<Vec<_>>().join(" ")));
        }
    }
    let Some(ours) = archive::images(&archive)?.into_iter().next() else { return Ok(differs("no image", our_code, &our_log)) };
    let mut theirs = from_docker(&tag, &place.folder().join(format!("docker-{number}.tar")))?;
    // The way out of the engine goes through a form that has no place for some fields of Docker's.
    let inspected = process::output(Command::new(dockerd::client()).args(["image", "inspect", "--format", "{{json .Config}}", &tag]))?;
    theirs.config["config"] = serde_json::from_str(&inspected).unwrap_or_default();
    let differences = images(&ours, &theirs)?;
    Ok(if differences.is_empty() { Outcome::Same } else { Outcome::Differs(differences) })
}

fn differs(what: &str, code: Option<i32>, log: &str) -> Outcome {
    let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
    Outcome::Differs(vec![format!("{what} ({code:?})\n  | {}", lines[lines.len().saturating_sub(8)..].join("\n  | "))])
}

/// What an image is, but for when it was made and the id of the container it was made in.
fn portrait(config: &Value) -> Value {
    let mut inner = config["config"].clone();
    if let Some(inner) = inner.as_object_mut() {
        for noise in ["Image", "Hostname"] {
            inner.remove(noise);
        }
        inner.retain(|_, value| {
            !matches!(value, Value::Null | Value::Bool(false)) && *value != json!("") && *value != json!([]) && *value != json!({})
        });
    }
    let history = config["history"].as_array().into_iter().flatten();
    let history: Vec<&Value> = history.map(|line| &line["created_by"]).collect();
    json!({"config": inner, "os": config["os"], "architecture": config["architecture"], "history": history})
}

fn images(ours: &Image, theirs: &Image) -> Result<Vec<String>> {
    let mut differences = vec![];
    let (our_config, their_config) = (portrait(&ours.config), portrait(&theirs.config));
    if our_config != their_config {
        differences.push(format!("config\n  ovenbird  {our_config}\n  docker    {their_config}"));
    }
    let (our_tree, their_tree) = (archive::flatten(&ours.layers)?, archive::flatten(&theirs.layers)?);
    for path in our_tree.keys().chain(their_tree.keys()).collect::<BTreeSet<_>>() {
        let (our, their) = (our_tree.get(path), their_tree.get(path));
        if !our.zip(their).is_some_and(|(our, their)| same(our, their)) {
            let show = |node: Option<&Node>| node.map_or("not there".to_owned(), |node| crate::compare::show(path, node));
            differences.push(format!("{path}\n  ovenbird  {}\n  docker    {}", show(our), show(their)));
        }
    }
    Ok(differences)
}

fn same(ours: &Node, theirs: &Node) -> bool {
    let kind = match (&ours.kind, &theirs.kind) {
        // Numbers of files are each tree's own.
        (Kind::File { content: ours, .. }, Kind::File { content: theirs, .. }) => ours == theirs,
        (ours, theirs) => ours == theirs,
    };
    kind && (ours.mode, ours.uid, ours.gid) == (theirs.mode, theirs.uid, theirs.gid) && ours.xattrs == theirs.xattrs
}

/// Adds an outcome to a list that many tests write to.
pub fn note(list: &Path, case: &str, outcome: &Outcome) -> std::io::Result<()> {
    use std::io::Write as _;
    let mut file = std::fs::File::options().create(true).append(true).open(list)?;
    file.write_all(format!("{}\t{case}\t{}\n", outcome.word(), outcome.reason()).as_bytes())
}
