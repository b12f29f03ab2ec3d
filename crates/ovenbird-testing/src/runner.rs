//! Runs one case with the command and reports every difference.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::archive::{self, Image, Tree};
use crate::base::Base;
use crate::case::{Build, Case};
use crate::command::{Level, Workspace, finish, set_mode};
use crate::needs::Need;
use crate::registry::{Options, Registry};
use crate::{AtPath, Error, Result, compare, dockerd, process};

/// Longest time one build of a case may take.
const LIMIT: Duration = Duration::from_mins(5);

/// What a client needs to find its engine and its plugins.
pub(crate) fn docker_environment() -> impl Iterator<Item = (&'static str, String)> {
    ["DOCKER_HOST", "DOCKER_CONFIG"].into_iter().filter_map(|name| Some((name, std::env::var(name).ok()?)))
}

/// What an engine built. It cannot export an image without layers; then the config is all there is.
pub(crate) fn from_docker(tag: &str, archive: &Path) -> Result<Image> {
    let inspected = process::output(Command::new(dockerd::client()).args(["image", "inspect", "--format", "{{json .}}", tag]))?;
    let inspected: Value = serde_json::from_str(&inspected)
        .map_err(|error| Error::Malformed { place: "docker image inspect".into(), reason: error.to_string() })?;
    if inspected["RootFS"]["Layers"].as_array().is_none_or(Vec::is_empty) {
        let history = process::output(Command::new(dockerd::client()).args(["history", "--no-trunc", "--format", "{{.CreatedBy}}", tag]))?;
        let history: Vec<Value> = history.lines().rev().map(|line| json!({"created_by": line})).collect();
        let config = json!({
            "config": inspected["Config"], "author": inspected["Author"], "os": inspected["Os"], "architecture": inspected["Architecture"],
            "variant": inspected["Variant"], "history": history,
        });
        return Ok(Image { digest: String::new(), manifest: Value::Null, config, layers: Vec::new() });
    }
    // Through a file: skopeo speaks an older language than current engines.
    let saved = archive.with_extension("saved");
    process::output(Command::new(dockerd::client()).args(["save", "--output"]).arg(&saved).arg(tag))?;
    let (source, target) = (format!("docker-archive:{}", saved.display()), format!("oci-archive:{}", archive.display()));
    process::output(Command::new("skopeo").args(["copy", "--quiet", &source, &target]))?;
    let first = archive::images(archive)?.into_iter().next();
    first.ok_or_else(|| Error::Malformed { place: tag.into(), reason: "no image in the archive".into() })
}

/// Differences between what the case expects and what happened; empty: it agrees.
pub fn run(case: &Case, level: Level) -> Result<Vec<String>> {
    let place = Place::prepare(case, level)?;
    let mut differences = place.build(&case.first, 1)?;
    if let Some(script) = &case.then
        && differences.is_empty()
    {
        place.change(script)?;
        differences.extend(place.build(&case.second, 2)?.into_iter().map(|difference| format!("second build: {difference}")));
    }
    Ok(differences)
}

fn make_folders(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        make_folders(parent)?;
    }
    fs::create_dir(path).at("cannot make", path)?;
    set_mode(path, 0o755)
}

/// A case made ready to build: its context, its registry, its folder.
pub(crate) struct Place<'a> {
    case: &'a Case,
    registry: Option<Registry>,
    room: Workspace,
    level: Level,
    context: PathBuf,
    settings: PathBuf,
    /// Diff ids of the base images.
    known: Vec<String>,
}

impl<'a> Place<'a> {
    /// Writes the context, starts the registry, runs the case's `setup`.
    pub(crate) fn prepare(case: &'a Case, level: Level) -> Result<Self> {
        let room = Workspace::new(level)?;
        let context = room.path().join("ctx");
        fs::create_dir(&context).at("cannot make", &context)?;
        // Case files are written with Docker's usual modes, whatever the umask is.
        set_mode(&context, 0o755)?;
        for file in &case.files {
            let path = context.join(&file.path);
            if let Some(parent) = path.parent() {
                make_folders(parent)?;
            }
            fs::write(&path, &file.content).at("cannot write", &path)?;
            set_mode(&path, file.mode)?;
        }
        let mut bases = Vec::new();
        if case.needs.contains(&Need::Registry) {
            bases.push(Base::Busybox);
        }
        if case.needs.contains(&Need::Debian) {
            bases.push(Base::Debian);
        }
        let registry = if bases.is_empty() { None } else { Some(Registry::start_with(Options { bases: &bases, credentials: None })?) };
        let settings = room.path().join("settings.toml");
        // Without a registry no case may reach the network: the mirror is a port that refuses.
        let text = registry.as_ref().map_or_else(|| crate::registry::mirror_toml("127.0.0.1:1"), Registry::settings_toml);
        fs::write(&settings, text).at("cannot write", &settings)?;
        let mut known = Vec::new();
        for base in &bases {
            known.extend(base.diff_ids()?);
        }
        let place = Self { case, registry, room, level, context, settings, known };
        match &case.setup {
            Some(script) => place.change(script)?,
            None => place.room.give_tree(&place.context)?,
        }
        Ok(place)
    }

    /// Runs a script of the case in the context.
    pub(crate) fn change(&self, script: &str) -> Result<()> {
        process::output(&mut self.shell(script))?;
        self.room.give_tree(&self.context)
    }

    /// The case's folder: the context and whatever its scripts put beside it.
    pub(crate) fn folder(&self) -> &Path {
        self.room.path()
    }

    fn fill(&self, text: &str) -> String {
        let registry = self.registry.as_ref().map(Registry::address).unwrap_or_default();
        text.replace("{ctx}", &self.context.display().to_string())
            .replace("{tmp}", &self.room.path().display().to_string())
            .replace("{registry}", &registry)
    }

    fn shell(&self, script: &str) -> Command {
        let mut shell = Command::new("sh");
        // A fixed umask: modes in the context are part of what a case says.
        shell.args(["-euc", &format!("umask 022\n{}", self.fill(script))]).current_dir(&self.context).stdin(Stdio::null());
        shell
    }

    /// `ovenbird build` without what stands after it.
    pub(crate) fn ovenbird(&self) -> Command {
        let mut command = self.room.ovenbird();
        command.args(["build", "--progress", "plain", "--root"]).arg(self.room.path().join("state"));
        command.arg("--settings").arg(&self.settings);
        command
    }

    /// Runs a builder to its end with a build's arguments, context, environment and input: exit code and output.
    pub(crate) fn finish(&self, command: &mut Command, args: &[String]) -> Result<(Option<i32>, String)> {
        command.args(args.iter().map(|arg| self.fill(arg)));
        command.arg(self.case.context.as_ref().map_or_else(|| self.context.display().to_string(), |context| self.fill(context)));
        command.envs(self.case.env.iter().map(|(name, value)| (name, self.fill(value))));
        finish(command, self.case.stdin.as_deref(), LIMIT)
    }

    fn build(&self, build: &Build, number: u32) -> Result<Vec<String>> {
        let archive = self.room.path().join(format!("out-{number}.tar"));
        let tag = format!("case-{}:{number}", std::process::id());
        let own_output = build.args.iter().any(|arg| matches!(arg.as_str(), "-o" | "--push" | "--check") || arg.starts_with("--output"));
        let mut command;
        if self.level == Level::Docker {
            command = self.room.ovenbird();
            command.args(["build", "--progress", "plain", "-t", &tag]).env("DOCKER_BUILDKIT", "1").envs(docker_environment());
            // The engine of the tests has no bridge.
            if !build.args.iter().any(|arg| arg.starts_with("--network")) {
                command.arg("--network=host");
            }
        } else {
            command = self.ovenbird();
            if !own_output {
                command.arg("-o").arg(format!("type=oci,dest={}", archive.display()));
            }
        }
        let (code, log) = self.finish(&mut command, &build.args)?;
        let mut differences = self.judge(build, code, &log, &archive, &tag)?;
        if !differences.is_empty() {
            let tail: Vec<&str> = log.lines().collect();
            let tail = tail[tail.len().saturating_sub(40)..].join("\n  | ");
            differences.push(format!("the command was {command:?}\nit ended with {code:?} and said\n  | {tail}"));
        }
        Ok(differences)
    }

    fn judge(&self, build: &Build, code: Option<i32>, log: &str, archive: &Path, tag: &str) -> Result<Vec<String>> {
        let mut differences = Vec::new();
        for line in &build.output {
            let line = self.fill(line);
            match line.strip_prefix('!') {
                Some(absent) if log.contains(absent) => differences.push(format!("- the log must not say {absent:?}")),
                None if !log.contains(&line) => differences.push(format!("- the log does not say {line:?}")),
                _ => {}
            }
        }
        if let Some(failure) = &build.error {
            let exit = if self.level == Level::Docker { None } else { failure.exit };
            let agrees = match (exit, code) {
                (Some(expected), code) => code == Some(expected),
                // 1 is a bug, 101 a panic, no code a signal.
                (None, Some(1)) if self.level == Level::Docker => true,
                (None, code) => !matches!(code, None | Some(0 | 1 | 101)),
            };
            if !agrees {
                differences.push(format!("- exit code {exit:?} (none: any clean failure)\n+ exit code {code:?}"));
            }
            let lower = log.to_lowercase();
            // Docker's words are its own.
            let texts = if self.level == Level::Docker { &[] } else { failure.texts.as_slice() };
            for text in texts.iter().filter(|text| !lower.contains(&self.fill(text).to_lowercase())) {
                differences.push(format!("- the message does not say {text:?}"));
            }
            return Ok(differences);
        }
        if code != Some(0) {
            differences.push(format!("- the build succeeds\n+ exit code {code:?}"));
            return Ok(differences);
        }
        if let Some(script) = &build.check {
            let done = self.shell(script).env("OUT", archive).output();
            let done = done.map_err(|source| Error::Start { program: "sh".into(), source })?;
            if !done.status.success() {
                differences.push(format!(
                    "- the check fails: {}{}",
                    String::from_utf8_lossy(&done.stdout),
                    String::from_utf8_lossy(&done.stderr)
                ));
            }
        }
        if build.tree.is_none() && build.config.is_none() && build.history.is_none() && build.layers.is_none() {
            return Ok(differences);
        }
        let images = if self.level == Level::Docker { vec![from_docker(tag, archive)?] } else { archive::images(archive)? };
        match images.as_slice() {
            [image] => differences.extend(self.judge_image(build, image)?),
            _ => differences.push(format!("- one image\n+ {} images", images.len())),
        }
        Ok(differences)
    }

    fn judge_image(&self, build: &Build, image: &Image) -> Result<Vec<String>> {
        let mut differences = Vec::new();
        let diff_ids = image.config["rootfs"]["diff_ids"].as_array().cloned().unwrap_or_default();
        let below = diff_ids.iter().take_while(|id| self.known.iter().any(|known| known == archive::text(id))).count();
        if let Some(expected) = &build.tree {
            let base: Tree = archive::flatten(&image.layers[..below])?;
            differences.extend(compare::tree(&self.fill(expected), &archive::flatten(&image.layers)?, &base));
        }
        if let Some(expected) = &build.config {
            differences.extend(compare::subset(expected, &image.config, "config"));
        }
        if let Some(expected) = build.layers
            && expected != image.layers.len() - below
        {
            differences.push(format!("- {expected} layers above the base\n+ {}", image.layers.len() - below));
        }
        if let Some(expected) = &build.history {
            let lines = image.config["history"].as_array().into_iter().flatten();
            let all: Vec<&str> = lines.map(|line| archive::text(&line["created_by"])).collect();
            let last = &all[all.len().saturating_sub(expected.len())..];
            if last != expected {
                differences.push(format!("- history\n    {}\n+ history\n    {}", expected.join("\n    "), last.join("\n    ")));
            }
        }
        Ok(differences)
    }
}
