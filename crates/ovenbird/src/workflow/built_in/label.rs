//! Labels: set, found out, and asked for.

use std::collections::BTreeMap;

use regex::Regex;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::{Error, Kind};
use crate::request::{BuildRequest, Source};
use crate::source::git;
use crate::workflow::{Plugin, Scene, veto};

/// Sets labels of the image. A label that the build has already (from `--label`) is kept with `overwrite=false`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Labels {
    /// Labels by name.
    set: BTreeMap<String, String>,
    /// Also over labels that the build has already.
    #[serde(default = "yes")]
    overwrite: bool,
}

fn yes() -> bool {
    true
}

impl Plugin for Labels {
    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        let labels = &mut scene.draft.request.labels;
        for (name, value) in &self.set {
            if self.overwrite || !labels.contains_key(name) {
                labels.insert(name.clone(), value.clone());
            }
        }
        Ok(json!(self.set))
    }
}

/// Sets what can be found out: when the image was built (SOURCE_DATE_EPOCH counts), for which architecture, from which commit and
/// repository. Labels that the build has already stay.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct AutoLabels {
    /// Which: build-date, architecture, vcs-ref, vcs-url, vcs-type. Without it: all that are known here.
    #[serde(default)]
    only: Vec<String>,
    /// Also under these names: `org.opencontainers.image.revision` = `vcs-ref`.
    #[serde(default)]
    aliases: BTreeMap<String, String>,
}

const KNOWN: [&str; 5] = ["build-date", "architecture", "vcs-ref", "vcs-url", "vcs-type"];

impl Plugin for AutoLabels {
    fn check(&self, _: &BuildRequest) -> Result<(), String> {
        match self.only.iter().chain(self.aliases.values()).find(|name| !KNOWN.contains(&name.as_str())) {
            Some(name) => Err(format!("{name:?} is not known: expected {}", KNOWN.join(", "))),
            None => Ok(()),
        }
    }

    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        let request = &scene.draft.request;
        let mut found: BTreeMap<&str, Result<String, String>> = BTreeMap::new();
        let time = request.source_date_epoch()?.unwrap_or(scene.bench.now);
        let date = jiff::Timestamp::from_second(time).map_err(|e| Error::from_chain(Kind::Usage, &e))?;
        found.insert("build-date", Ok(date.to_string()));
        let own = ovenbird_oci::Platform::host();
        found.insert(
            "architecture",
            match request.platforms.as_slice() {
                [] => Ok(own.architecture),
                [one] => Ok(one.architecture.clone()),
                _ => Err("the image has several platforms, and a label is the same for all of them".into()),
            },
        );
        let (commit, url) = repository(scene);
        found.insert("vcs-type", commit.clone().map(|_| "git".to_owned()));
        found.insert("vcs-ref", commit);
        found.insert("vcs-url", url);
        let wanted = |name: &str| self.only.is_empty() || self.only.iter().any(|only| only == name);
        // What was asked for by name must be there.
        for (name, value) in &found {
            let asked = self.only.iter().any(|only| only == name) || self.aliases.values().any(|alias| alias == name);
            if let (true, Err(why)) = (asked, value) {
                return Err(veto(format!("there is no {name}: {why}")));
            }
        }
        let values: Vec<(String, String)> = found
            .iter()
            .filter(|(name, _)| wanted(name))
            .filter_map(|(name, value)| Some(((*name).to_owned(), value.clone().ok()?)))
            .chain(self.aliases.iter().filter_map(|(alias, name)| Some((alias.clone(), found.get(name.as_str())?.clone().ok()?))))
            .collect();
        let labels = &mut scene.draft.request.labels;
        let mut set = BTreeMap::new();
        for (name, value) in values {
            if !labels.contains_key(&name) {
                labels.insert(name.clone(), value.clone());
                set.insert(name, value);
            }
        }
        Ok(json!(set))
    }
}

/// Commit and address of where the source comes from.
fn repository(scene: &Scene) -> (Result<String, String>, Result<String, String>) {
    if let Some(revision) = scene.tree.and_then(|tree| tree.revision.as_ref()) {
        return (Ok(revision.commit.clone()), Ok(revision.url.clone()));
    }
    let sent = scene.tree.filter(|tree| tree.is_sent).map(|tree| tree.git.clone());
    match (&scene.draft.request.source, sent) {
        (_, Some(Some(git))) => (Ok(git.commit), Err("a folder has no address".into())),
        (Source::Path(dir), None) => {
            (git::head(dir).map(|head| head.sha).map_err(|e| e.to_string()), Err("a folder has no address".into()))
        }
        _ => (Err("the context is no folder and no repository".into()), Err("the context is no repository".into())),
    }
}

/// Refuses an image without these labels.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct AssertLabels {
    /// Labels that every platform of the image must have.
    #[serde(default)]
    present: Vec<String>,
    /// Labels that must match this regular expression as a whole.
    #[serde(default)]
    matching: BTreeMap<String, String>,
    /// Labels that the image must not have.
    #[serde(default)]
    forbidden: Vec<String>,
}

fn whole(pattern: &str) -> Result<Regex, regex::Error> {
    Regex::new(&format!("^(?:{pattern})$"))
}

impl Plugin for AssertLabels {
    fn check(&self, _: &BuildRequest) -> Result<(), String> {
        self.matching.values().try_for_each(|pattern| whole(pattern).map(drop).map_err(|e| e.to_string()))
    }

    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        let labels = scene.shop.labels(scene.image()?)?;
        let mut wrong: Vec<String> =
            self.present.iter().filter(|name| !labels.contains_key(*name)).map(|name| format!("{name} is missing")).collect();
        for (name, pattern) in &self.matching {
            let pattern_matches = |value: &String| whole(pattern).is_ok_and(|pattern| pattern.is_match(value));
            match labels.get(name) {
                None => wrong.push(format!("{name} is missing")),
                Some(value) if !pattern_matches(value) => wrong.push(format!("{name} is {value:?}, expected /{pattern}/")),
                Some(_) => {}
            }
        }
        wrong.extend(self.forbidden.iter().filter(|name| labels.contains_key(*name)).map(|name| format!("{name} must not be there")));
        if wrong.is_empty() { Ok(json!(labels)) } else { Err(veto(format!("labels of the image: {}", wrong.join("; ")))) }
    }
}
