//! Base images: replaced, pinned, restricted, waited for.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ovenbird_dockerfile::ignore::go_match;
use ovenbird_oci::Reference;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::{Error, Kind};
use crate::request::BuildRequest;
use crate::workflow::text::{self, StageBase};
use crate::workflow::{Plugin, Scene, veto};

fn stages(scene: &Scene) -> Vec<StageBase> {
    let request = &scene.draft.request;
    let contexts: Vec<&str> = request.contexts.keys().map(String::as_str).collect();
    text::bases(&scene.draft.dockerfile, &request.build_args, &contexts)
}

/// A name that cannot be read is not an image of ours to judge: the build will say so.
fn reference(name: &str) -> Result<Reference, Error> {
    name.parse().map_err(|e| Error::from_chain(Kind::Veto, &e).while_doing(format!("FROM {name}")))
}

/// Does a pattern (`registry/path/*`) match an image, with or without its tag?
fn matches(pattern: &str, name: &Reference) -> bool {
    let (full, familiar) = (name.to_string(), name.familiar());
    let bare = format!("{}/{}", name.registry(), name.repository());
    let prefix = pattern.strip_suffix("/**").map(|prefix| format!("{prefix}/"));
    [full, familiar, bare]
        .iter()
        .any(|name| go_match(pattern, name).unwrap_or(false) || prefix.as_ref().is_some_and(|prefix| name.starts_with(prefix.as_str())))
}

/// Replaces images in FROM lines by others: the image as it is written, with its arguments filled in.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ChangeFrom {
    /// New image by old image.
    images: BTreeMap<String, String>,
    /// Another registry for the images of a registry: `docker.io` = `mirror.example.org`. What is in `images` comes first.
    #[serde(default)]
    registries: BTreeMap<String, String>,
    /// Fail when one of `images` is in no FROM line.
    #[serde(default)]
    all: bool,
}

impl Plugin for ChangeFrom {
    fn check(&self, _: &BuildRequest) -> Result<(), String> {
        self.images.values().try_for_each(|name| name.parse::<Reference>().map(drop).map_err(|e| e.to_string()))
    }

    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        let (mut new, mut used) = (BTreeMap::new(), vec![]);
        for stage in stages(scene) {
            let named = self.images.get_key_value(&stage.name).or_else(|| self.images.get_key_value(&stage.written));
            if let Some((old, image)) = named {
                used.push(old);
                new.insert(stage.index, image.clone());
                continue;
            }
            let name = reference(&stage.name)?;
            if let Some(registry) = self.registries.get(name.registry()) {
                let full = name.to_string();
                let rest = full.strip_prefix(name.registry()).unwrap_or(&full);
                new.insert(stage.index, format!("{registry}{rest}"));
            }
        }
        if let Some(missing) = self.images.keys().find(|old| self.all && !used.contains(old)) {
            return Err(veto(format!("no FROM line names {missing}")));
        }
        scene.draft.dockerfile = text::with_bases(&scene.draft.dockerfile, &new).map_err(veto)?;
        Ok(json!(new))
    }
}

/// Pins the images in FROM lines to the digests that they have now, so that a later build of the same Dockerfile begins with the same.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct PinFrom {
    /// Fail when an image that has a digest already has another one in its registry now.
    #[serde(default)]
    fail_on_mismatch: bool,
}

impl Plugin for PinFrom {
    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        let mut new = BTreeMap::new();
        for stage in stages(scene) {
            let name = reference(&stage.name)?;
            if name.digest().is_some() && !(self.fail_on_mismatch && name.tag().is_some()) {
                continue;
            }
            let asked = name.tag().map_or_else(|| name.clone(), |tag| name.with_tag(tag));
            let Some(found) = scene.ask(async |client| client.head(&asked).await)? else {
                return Err(veto(format!("there is no image {}", asked.familiar())));
            };
            match name.digest() {
                Some(digest) if *digest != found.digest => {
                    return Err(veto(format!("{} is {} now, and the Dockerfile says {digest}", asked.familiar(), found.digest)));
                }
                Some(_) => {}
                None => drop(new.insert(stage.index, name.with_digest(found.digest).familiar())),
            }
        }
        scene.draft.dockerfile = text::with_bases(&scene.draft.dockerfile, &new).map_err(veto)?;
        Ok(json!(new))
    }
}

/// Refuses images in FROM lines that are not on a list.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct AllowedParents {
    /// Patterns of images, as `registry/repository[:tag]`: `*` stands for anything but a slash, `/**` at the end for anything.
    allowed: Vec<String>,
    /// Patterns of images that are refused though they are on the list.
    #[serde(default)]
    refused: Vec<String>,
    /// Images must be named with their digest.
    #[serde(default)]
    pinned: bool,
    /// A stage may begin with `scratch`.
    #[serde(default = "yes")]
    scratch: bool,
}

fn yes() -> bool {
    true
}

impl Plugin for AllowedParents {
    fn check(&self, _: &BuildRequest) -> Result<(), String> {
        self.allowed.iter().chain(&self.refused).try_for_each(|pattern| go_match(pattern, "x").map(drop).map_err(|e| e.to_string()))
    }

    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        let mut wrong = vec![];
        let stages = stages(scene);
        let file = ovenbird_dockerfile::parse(&scene.draft.dockerfile).dockerfile;
        if !self.scratch && file.stages.iter().any(|stage| stage.base == "scratch") {
            wrong.push("scratch is not allowed".to_owned());
        }
        for stage in &stages {
            let name = reference(&stage.name)?;
            let allowed =
                self.allowed.iter().any(|pattern| matches(pattern, &name)) && !self.refused.iter().any(|pattern| matches(pattern, &name));
            if !allowed {
                wrong.push(format!("{} is not allowed", stage.name));
            } else if self.pinned && name.digest().is_none() {
                wrong.push(format!("{} has no digest", stage.name));
            }
        }
        if wrong.is_empty() {
            return Ok(json!(stages.into_iter().map(|stage| stage.name).collect::<Vec<_>>()));
        }
        Err(veto(format!("base images: {}; allowed are {}", wrong.join("; "), self.allowed.join(", "))))
    }
}

/// Waits until the images in FROM lines are in their registries: for a build that was started together with that of its base image.
/// The plugin's `timeout` is how long.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ParentWait {
    /// Seconds between two looks.
    #[serde(default = "ten")]
    every: u64,
}

fn ten() -> u64 {
    10
}

impl Plugin for ParentWait {
    fn check(&self, _: &BuildRequest) -> Result<(), String> {
        if (1..=3600).contains(&self.every) { Ok(()) } else { Err("every must be from 1 to 3600 seconds".into()) }
    }

    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        let begin = Instant::now();
        let names = stages(scene).into_iter().map(|stage| reference(&stage.name)).collect::<Result<Vec<_>, _>>()?;
        for name in &names {
            while scene.ask(async |client| client.head(name).await)?.is_none() {
                if begin.elapsed() + Duration::from_secs(self.every) > Duration::from_secs(scene.timeout) {
                    return Err(veto(format!("there is still no image {} after {} seconds", name.familiar(), begin.elapsed().as_secs())));
                }
                scene.say(format!("waiting for {}", name.familiar()));
                scene.sleep(Duration::from_secs(self.every))?;
            }
        }
        Ok(json!({ "waited": begin.elapsed().as_secs() }))
    }
}
