//! What a build is asked for: arguments given, names and platforms checked before anything is built.

use std::collections::BTreeMap;

use ovenbird_oci::Platform;
use ovenbird_oci::registry::RegistryError;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::Error;
use crate::request::{BuildRequest, OutputKind};
use crate::workflow::{Plugin, Scene, text, veto};

/// Sets build arguments, and declares them in every stage of a Dockerfile that does not.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct BuildArgs {
    /// Values by name.
    set: BTreeMap<String, String>,
    /// Write an ARG line behind every FROM.
    #[serde(default = "yes")]
    declare: bool,
}

fn yes() -> bool {
    true
}

impl Plugin for BuildArgs {
    fn check(&self, _: &BuildRequest) -> Result<(), String> {
        let plain =
            |name: &String| name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') && !name.starts_with(|c: char| c.is_ascii_digit());
        match self.set.keys().find(|name| name.is_empty() || !plain(name)) {
            Some(name) => Err(format!("{name:?} is not the name of an argument")),
            None => Ok(()),
        }
    }

    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        let draft = &mut *scene.draft;
        draft.request.build_args.extend(self.set.clone());
        if self.declare && !self.set.is_empty() {
            let lines: Vec<String> = self.set.keys().map(|name| format!("ARG {name}")).collect();
            draft.dockerfile = text::after_each_from(&draft.dockerfile, &lines.join("\n"));
        }
        Ok(json!(self.set))
    }
}

/// Refuses, before anything is built, names that cannot be pushed to: their registries are asked with the credentials of this machine.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct CheckSettings {
    /// Labels that --label or a plugin before must have given.
    #[serde(default)]
    labels: Vec<String>,
    /// Build arguments that must have been given.
    #[serde(default)]
    build_args: Vec<String>,
    /// Ask the registries that the build pushes to.
    #[serde(default = "yes")]
    registries: bool,
}

impl Plugin for CheckSettings {
    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        let request = &scene.draft.request;
        let mut wrong: Vec<String> = vec![];
        wrong.extend(
            self.labels.iter().filter(|name| !request.labels.contains_key(*name)).map(|name| format!("the label {name} is missing")),
        );
        let missing = self.build_args.iter().filter(|name| !request.build_args.contains_key(*name));
        wrong.extend(missing.map(|name| format!("the build argument {name} is missing")));
        let mut asked = vec![];
        for output in request.outputs.iter().filter(|output| self.registries && output.kind == OutputKind::Registry) {
            for name in request.names_of(Some(output)) {
                // What is variable in it stands behind the repository, or the tag would not be known before the build.
                let Ok(name) = name.replace(['{', '}'], "").parse::<ovenbird_oci::Reference>() else { continue };
                let place = format!("{}/{}", name.registry(), name.repository());
                if asked.contains(&place) {
                    continue;
                }
                let answer = scene.ask(async |client| Ok::<_, RegistryError>(client.check_access(&name, true).await))?;
                match answer.map(|access| access.push) {
                    Ok(Some(ovenbird_oci::registry::Verdict::Refused(why))) => wrong.push(format!("{place} cannot be pushed to: {why}")),
                    Ok(_) => {}
                    Err(error) => wrong.push(format!("{place} cannot be asked: {error}")),
                }
                asked.push(place);
            }
        }
        if wrong.is_empty() { Ok(json!({ "registries": asked })) } else { Err(veto(wrong.join("; "))) }
    }
}

/// Refuses platforms that are not wanted, and base images that lack one of those asked for.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct CheckPlatforms {
    /// Platforms that may be built; without it: all.
    #[serde(default)]
    allowed: Vec<String>,
    /// Platforms that must be built.
    #[serde(default)]
    wanted: Vec<String>,
    /// Look up the base images for every platform.
    #[serde(default = "yes")]
    bases: bool,
}

fn platforms(list: &[String]) -> Result<Vec<Platform>, String> {
    list.iter().map(|text| text.parse::<Platform>().map_err(|e| e.to_string())).collect()
}

impl Plugin for CheckPlatforms {
    fn check(&self, _: &BuildRequest) -> Result<(), String> {
        platforms(&self.allowed).and_then(|_| platforms(&self.wanted)).map(drop)
    }

    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        let asked = match scene.draft.request.platforms.as_slice() {
            [] => vec![Platform::host()],
            some => some.to_vec(),
        };
        let (allowed, wanted) = (platforms(&self.allowed).map_err(veto)?, platforms(&self.wanted).map_err(veto)?);
        if let Some(platform) = asked.iter().find(|platform| !allowed.is_empty() && !allowed.contains(platform)) {
            return Err(veto(format!("the platform {platform} is not one of {}", self.allowed.join(", "))));
        }
        if let Some(platform) = wanted.iter().find(|platform| !asked.contains(platform)) {
            return Err(veto(format!("the platform {platform} must be built, and is not asked for")));
        }
        let mut names = vec![];
        if self.bases
            && let Some(tree) = scene.tree
        {
            // As plugins before left it.
            let tree = tree.with_dockerfile(&scene.draft.dockerfile);
            for base in scene.shop.bases(&tree, &scene.draft.outlook(), scene.job)? {
                let (of, said) = (&base.image.platform, base.image.config.get("architecture").and_then(Value::as_str));
                if said.is_some_and(|said| said != of.architecture) {
                    return Err(veto(format!("{} is for {}, not for {of}", base.reference.familiar(), said.unwrap_or_default())));
                }
                names.push(format!("{} for {of}", base.reference.familiar()));
            }
        }
        Ok(json!({ "platforms": asked.iter().map(ToString::to_string).collect::<Vec<_>>(), "bases": names }))
    }
}

/// Finds the next free release of a version by the tags of a repository (`1.2-1`, `1.2-2`, …), and sets it as a label and as a name.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct BumpRelease {
    /// The repository, with its registry.
    repository: String,
    /// The version; tags are `VERSION-RELEASE`.
    version: String,
    /// Label that gets the release.
    #[serde(default = "release")]
    label: String,
    /// Also name the image `REPOSITORY:VERSION-RELEASE`.
    #[serde(default)]
    tag: bool,
}

fn release() -> String {
    "release".into()
}

impl Plugin for BumpRelease {
    fn check(&self, _: &BuildRequest) -> Result<(), String> {
        let name = format!("{}:{}-1", self.repository, self.version);
        name.parse::<ovenbird_oci::Reference>().map(drop).map_err(|e| e.to_string())
    }

    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        let repository: ovenbird_oci::Reference = self.repository.parse()?;
        let tags = scene.ask(async |client| match client.look(&repository.with_tag("latest")).await {
            // A repository that is not there yet has no release.
            Ok(_) | Err(_) => match client.tags(&repository).await {
                Err(error) if error.is_missing() => Ok(vec![]),
                other => other,
            },
        })?;
        let begins = format!("{}-", self.version);
        let highest = tags.iter().filter_map(|tag| tag.strip_prefix(&begins)?.parse::<u64>().ok()).max().unwrap_or(0);
        let next = highest.checked_add(1).ok_or_else(|| veto("there are no more releases"))?.to_string();
        let request = &mut scene.draft.request;
        request.labels.insert(self.label.clone(), next.clone());
        if self.tag {
            request.names.push(format!("{}:{}-{next}", self.repository, self.version));
        }
        Ok(json!({ "release": next }))
    }
}
