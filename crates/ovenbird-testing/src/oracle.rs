//! Builds one case with the command and with a Docker Engine, and compares the two images side by side.
//!
//! Knows nothing of what the case expects. Both builders see the same context; every step of the Engine's first build runs anew, so that
//! other cases, which share its cache, leave no trace.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::archive::{self, Image, Kind, Tree};
use crate::base::hex;
use crate::case::{Build, Case};
use crate::command::Level;
use crate::dockerd::Dockerd;
use crate::runner::Place;
use crate::{AtPath, Error, Result, compare};

/// The oldest Engine whose BuildKit counts as current.
const OLDEST: u32 = 28;

/// Arguments that only the command knows; with a value where one is said.
const OURS: &[(&str, bool)] = &[("--explain", false), ("--allow-leak", true)];

/// An Engine that builds for comparison.
#[derive(Debug)]
pub struct Oracle {
    dockerd: Dockerd,
    /// When it was started: every later time is "now".
    since: u64,
}

/// What a comparison found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Every image is the same.
    Equal,
    /// Both refuse; the end of what each says.
    BothRefuse {
        /// Ovenbird.
        ours: String,
        /// The Engine.
        theirs: String,
    },
    /// Both succeed, and neither makes an image.
    NoImage,
    /// Each difference, both values in it.
    Differs(Vec<String>),
}

impl Oracle {
    /// Starts the Engine; `mirror` (`http://127.0.0.1:PORT`) stands for Docker Hub.
    pub fn start(mirror: &str) -> Result<Self> {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs().saturating_sub(1));
        let hint = "the oracle is a Docker Engine 28 or newer: set OVENBIRD_TESTS_DOCKER to a folder with its unpacked packages";
        let dockerd = Dockerd::start_with_containerd(Some(mirror)).map_err(|error| Error::Missing(format!("{error}\n{hint}")))?;
        let version = dockerd.run(&["version", "--format", "{{.Server.Version}}"])?;
        if version.split('.').next().and_then(|major| major.parse::<u32>().ok()).is_none_or(|major| major < OLDEST) {
            return Err(Error::Missing(format!("this Engine is {}; {hint}", version.trim())));
        }
        Ok(Self { dockerd, since })
    }

    /// Builds a case with both builders.
    pub fn compare(&self, case: &Case, level: Level) -> Result<Outcome> {
        let place = Place::prepare(case, level)?;
        turn_back(place.folder(), self.since)?;
        let first = self.both(&place, &case.first, 1)?;
        let (Some(script), Outcome::Equal | Outcome::NoImage) = (&case.then, &first) else { return Ok(first) };
        place.change(script)?;
        turn_back(place.folder(), self.since)?;
        Ok(match self.both(&place, &case.second, 2)? {
            Outcome::Differs(all) => Outcome::Differs(all.into_iter().map(|one| format!("second build: {one}")).collect()),
            Outcome::NoImage => first,
            second => second,
        })
    }

    fn both(&self, place: &Place<'_>, build: &Build, number: u32) -> Result<Outcome> {
        let run = |builder: &str, mut command: Command, args: &[String]| -> Result<(PathBuf, Option<i32>, String)> {
            let archive = place.folder().join(format!("{builder}-{number}.tar"));
            if !args.iter().any(|arg| arg == "--check") {
                command.arg("-o").arg(format!("type=oci,dest={}", archive.display()));
            }
            let (code, log) = place.finish(&mut command, args)?;
            Ok((archive, code, log))
        };
        let (our_archive, our_code, our_log) = run("ovenbird", place.ovenbird(), &build.args)?;
        let (archive, code, log) = run("docker", self.docker(place, build, number), &without_ours(&build.args))?;
        if log.contains("Cannot connect to the Docker daemon") {
            return Err(Error::Missing(log));
        }
        match (our_code, code) {
            (Some(0), Some(0)) => {}
            (Some(1 | 101) | None, _) => return Ok(Outcome::Differs(vec![format!("ovenbird broke: {our_code:?}\n{}", end(&our_log))])),
            (Some(0), _) => return Ok(Outcome::Differs(vec![format!("docker refuses, ovenbird builds\n{}", end(&log))])),
            (_, Some(0)) => return Ok(Outcome::Differs(vec![format!("ovenbird refuses, docker builds\n{}", end(&our_log))])),
            _ => return Ok(Outcome::BothRefuse { ours: end(&our_log), theirs: end(&log) }),
        }
        let differences = match (our_archive.exists(), archive.exists()) {
            (false, false) => return Ok(Outcome::NoImage),
            (true, true) => images(&archive::images(&our_archive)?, &archive::images(&archive)?, self.since)?,
            (ours, theirs) => vec![pair("an image", ours, theirs)],
        };
        Ok(if differences.is_empty() { Outcome::Equal } else { Outcome::Differs(differences) })
    }

    fn docker(&self, place: &Place<'_>, build: &Build, number: u32) -> Command {
        let mut command = self.dockerd.docker();
        // Attestations are manifests of their own.
        command.args(["buildx", "build", "--progress", "plain", "--provenance=false"]).current_dir(place.folder());
        // One Engine serves all cases: their cache mounts must not meet.
        command.arg(format!("--build-arg=BUILDKIT_CACHE_MOUNT_NS={}", place.folder().display()));
        if number == 1 && !build.args.iter().any(|arg| arg.starts_with("--no-cache")) {
            command.arg("--no-cache");
        }
        // The engine of the tests has no bridge.
        if !build.args.iter().any(|arg| arg.starts_with("--network")) {
            command.arg("--network=host");
        }
        command
    }
}

pub(crate) fn without_ours(args: &[String]) -> Vec<String> {
    let mut left = Vec::new();
    let mut rest = args.iter();
    while let Some(arg) = rest.next() {
        match OURS.iter().find(|(name, _)| arg.strip_prefix(name).is_some_and(|end| end.is_empty() || end.starts_with('='))) {
            None => left.push(arg.clone()),
            Some((name, true)) if arg == name => drop(rest.next()),
            Some(_) => {}
        }
    }
    left
}

fn end(log: &str) -> String {
    let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
    format!("  | {}", lines[lines.len().saturating_sub(12)..].join("\n  | "))
}

/// Gives new files below a case's folder times in the past, so that what an image has from a context can be told from what was made while
/// it was built. A time is made from name and content: the Engine takes files with the same name, size and time for the same, and the
/// same files of another case may come from its cache.
fn turn_back(folder: &Path, since: u64) -> Result<()> {
    // The state of the command is not the user's to touch.
    let ours = ["state", "home"].map(|name| folder.join(name));
    turn_back_below(folder, Path::new(""), since, &ours).map(drop)
}

/// The digest of everything in the folder.
fn turn_back_below(top: &Path, inside: &Path, since: u64, leave: &[PathBuf]) -> Result<[u8; 32]> {
    let folder = top.join(inside);
    let mut names: Vec<_> = fs::read_dir(&folder).at("cannot list", &folder)?.flatten().map(|entry| entry.file_name()).collect();
    names.sort();
    let mut all = Sha256::new();
    for name in names {
        let inside = inside.join(name);
        let path = top.join(&inside);
        if leave.contains(&path) {
            continue;
        }
        let meta = path.symlink_metadata().at("cannot look at", &path)?;
        let mut digest = Sha256::new_with_prefix(inside.as_os_str().as_bytes());
        if meta.is_dir() {
            digest.update(turn_back_below(top, &inside, since, leave)?);
        } else if meta.is_file() {
            digest.update(fs::read(&path).at("cannot read", &path)?);
        } else if meta.is_symlink() {
            digest.update(fs::read_link(&path).at("cannot read", &path)?.as_os_str().as_bytes());
        }
        let digest: [u8; 32] = digest.finalize().into();
        if u64::try_from(meta.mtime()).is_ok_and(|time| time >= since) {
            let [one, two, three, ..] = digest;
            let time = Timespec { tv_sec: OLD + i64::from(u32::from_be_bytes([0, one, two, three])), tv_nsec: 0 };
            utimensat(CWD, &path, &Timestamps { last_access: time, last_modification: time }, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(std::io::Error::from)
                .at("cannot change the time of", &path)?;
        }
        all.update(digest);
    }
    Ok(all.finalize().into())
}

/// No file of a context gets an earlier time; half a year after it comes the latest.
const OLD: i64 = 1_600_000_000;

/// Differences between what two builders made; times from `since` on are "now".
fn images(ours: &[Image], theirs: &[Image], since: u64) -> Result<Vec<String>> {
    let mut differences = Vec::new();
    if ours.len() != theirs.len() {
        differences.push(pair("images", ours.len(), theirs.len()));
    }
    for (ours, theirs) in ours.iter().zip(theirs) {
        values("manifest", &manifest(ours), &manifest(theirs), &mut differences);
        values("config", &config(ours), &config(theirs), &mut differences);
        let (mut our_steps, mut their_steps) = (steps(ours)?, steps(theirs)?);
        if our_steps.len() != their_steps.len() {
            differences.push(pair("layers", our_steps.len(), their_steps.len()));
            // Then only the whole can be compared.
            our_steps = our_steps.pop().into_iter().collect();
            their_steps = their_steps.pop().into_iter().collect();
        }
        // A difference shows in every layer above, too; once is enough.
        let mut seen = BTreeSet::new();
        for (number, (ours, theirs)) in our_steps.iter().zip(&their_steps).enumerate() {
            let (ours, theirs) = (portraits(ours, since), portraits(theirs, since));
            for path in ours.keys().chain(theirs.keys()).collect::<BTreeSet<_>>() {
                let (our, their) = (ours.get(path), theirs.get(path));
                let agree = our.zip(their).is_some_and(|(our, their)| our.agrees(their));
                if !agree && seen.insert((*path).to_owned()) {
                    let text = |one: Option<&Portrait>| one.map_or("not there".into(), Portrait::to_string);
                    differences.push(pair(&format!("layer {}", number + 1), text(our), text(their)));
                }
            }
        }
    }
    Ok(differences)
}

fn pair(what: &str, ours: impl std::fmt::Display, theirs: impl std::fmt::Display) -> String {
    format!("{what}\n  ovenbird  {ours}\n  docker    {theirs}")
}

fn steps(image: &Image) -> Result<Vec<Tree>> {
    archive::steps(&image.layers).collect()
}

/// What must be the same in a manifest: no digests, no sizes.
fn manifest(image: &Image) -> Value {
    let layers: Vec<&Value> = image.manifest["layers"].as_array().into_iter().flatten().map(|layer| &layer["mediaType"]).collect();
    json!({
        "mediaType": image.manifest["mediaType"], "annotations": image.manifest["annotations"],
        "config": image.manifest["config"]["mediaType"], "layers": layers,
    })
}

/// What must be the same in a config: no times, no digests of layers. Lines of history name their builder in the comment.
fn config(image: &Image) -> Value {
    let mut config = image.config.clone();
    config["created"] = Value::Null;
    config["rootfs"]["diff_ids"] = Value::Null;
    for line in config["history"].as_array_mut().into_iter().flatten() {
        line["created"] = Value::Null;
        if let Some((_, frontend)) = archive::text(&line["comment"]).split_once('.') {
            line["comment"] = frontend.to_owned().into();
        }
    }
    config
}

/// Differences between two JSON documents, one for each value.
fn values(place: &str, ours: &Value, theirs: &Value, differences: &mut Vec<String>) {
    match (ours, theirs) {
        (Value::Object(ours), Value::Object(theirs)) => {
            for key in ours.keys().chain(theirs.keys()).collect::<BTreeSet<_>>() {
                let value = |map: &serde_json::Map<String, Value>| map.get(key).cloned().unwrap_or_default();
                values(&format!("{place}.{key}"), &value(ours), &value(theirs), differences);
            }
        }
        (Value::Array(ours), Value::Array(theirs)) if ours.len() == theirs.len() => {
            for (index, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
                values(&format!("{place}[{index}]"), ours, theirs, differences);
            }
        }
        (ours, theirs) if ours == theirs || (compare::is_empty(ours) && compare::is_empty(theirs)) => {}
        (ours, theirs) => differences.push(pair(place, ours, theirs)),
    }
}

/// Everything of a path that must be the same.
struct Portrait {
    /// As text, all but the time.
    text: String,
    is_dir: bool,
    /// `None`: now.
    time: Option<u64>,
}

impl Portrait {
    /// A folder of the base that a copy adds to has the time of the copy in the Engine's image, and keeps its own in ours.
    fn agrees(&self, docker: &Self) -> bool {
        self.text == docker.text && (self.time == docker.time || (self.is_dir && docker.time.is_none()))
    }
}

impl std::fmt::Display for Portrait {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let time = self.time.map_or("now".into(), |time| time.to_string());
        write!(f, "{} mtime={time}", self.text)
    }
}

fn portraits(tree: &Tree, since: u64) -> BTreeMap<&str, Portrait> {
    // The first path of each group of hard links stands for the group.
    let mut first: BTreeMap<usize, &str> = BTreeMap::new();
    let mut all = BTreeMap::new();
    for (path, node) in tree {
        let mut text = compare::show(path, node).replacen(&format!(" mtime={}", node.mtime), "", 1);
        for (name, value) in &node.xattrs {
            let _ = write!(text, " {name}={}", hex(value));
        }
        if let Kind::File { inode, content } = &node.kind {
            // A long content is not in the text as it is.
            let _ = write!(text, " {}", hex(&Sha256::digest(content).as_slice()[..4]));
            let group = *first.entry(*inode).or_insert(path);
            if group != path {
                let _ = write!(text, " ={group}");
            }
        }
        let time = Some(node.mtime).filter(|time| *time < since);
        all.insert(path.as_str(), Portrait { text, is_dir: node.kind == Kind::Dir, time });
    }
    all
}
