//! Names of the image, beside those of -t.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::Error;
use crate::request::tag::TagPolicy;
use crate::request::{BuildRequest, Output, OutputKind};
use crate::workflow::{Plugin, Scene, veto};

/// Names the image in a repository, by tags of three classes. They may have the variables of -t, labels too: `{label:version}`. Unique
/// tags are put first and floating ones last, and those move forward only.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct TagFromConfig {
    /// The repository, with its registry. Without it: the repositories of the names that the build has.
    #[serde(default)]
    repository: Option<String>,
    /// Tags of this one build, for ever.
    #[serde(default)]
    unique: Vec<String>,
    /// Tags of a release.
    #[serde(default)]
    primary: Vec<String>,
    /// Tags that follow what is newest.
    #[serde(default)]
    floating: Vec<String>,
}

/// A name without its tag.
fn repository_of(name: &str) -> &str {
    let plain = name.split('{').next().unwrap_or(name);
    match plain.rsplit_once(':') {
        Some((repository, tag)) if !tag.contains('/') => repository,
        _ => plain,
    }
}

impl Plugin for TagFromConfig {
    fn check(&self, _: &BuildRequest) -> Result<(), String> {
        let policy = TagPolicy { unique: self.unique.clone(), primary: self.primary.clone(), floating: self.floating.clone() };
        if policy.is_empty() {
            return Err("it has no tags: give unique, primary or floating ones".into());
        }
        policy.check().map_err(|e| e.to_string())
    }

    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        let request = &mut scene.draft.request;
        let mut repositories: Vec<String> = match &self.repository {
            Some(repository) => vec![repository.clone()],
            None => request.names.iter().map(|name| repository_of(name).to_owned()).collect(),
        };
        repositories.dedup();
        if repositories.is_empty() {
            return Err(veto("the build has no name, so there is no repository: give one with repository="));
        }
        let mut names = vec![];
        for repository in &repositories {
            names.extend(self.unique.iter().chain(&self.primary).chain(&self.floating).map(|tag| format!("{repository}:{tag}")));
        }
        request.names.extend(names.iter().filter(|name| !request.names.contains(name)).cloned().collect::<Vec<_>>());
        for (class, tags) in [
            (&mut request.tags.unique, &self.unique),
            (&mut request.tags.primary, &self.primary),
            (&mut request.tags.floating, &self.floating),
        ] {
            class.extend(tags.iter().cloned());
        }
        Ok(json!(names))
    }
}

/// Says which tags follow what is newest: they are put when all others stand, and move forward only. (Without it, `latest` and those
/// with {git.major} or {git.minor} do.)
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct FloatingTagsLast {
    /// The tags, as they stand in names: variables and all.
    tags: Vec<String>,
}

impl Plugin for FloatingTagsLast {
    fn check(&self, _: &BuildRequest) -> Result<(), String> {
        TagPolicy { floating: self.tags.clone(), ..TagPolicy::default() }.check().map_err(|e| e.to_string())
    }

    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        let request = &scene.draft.request;
        let of = |policy: &TagPolicy| [&policy.unique[..], &policy.primary, &policy.floating].concat();
        let names = request.names.iter().chain(request.outputs.iter().flat_map(|output| &output.names));
        // A name without a tag has those of the settings.
        let tag = |name: &String| name.strip_prefix(repository_of(name)).unwrap_or_default().trim_start_matches(':').to_owned();
        let mut known: Vec<String> = names.map(tag).collect();
        if known.iter().any(String::is_empty) {
            let policies = &scene.bench.policies;
            known.push("latest".into());
            known.extend([&policies.all, &request.tags].into_iter().chain(policies.registries.values()).flat_map(of));
        }
        if let Some(unknown) = self.tags.iter().find(|tag| !known.contains(tag)) {
            return Err(veto(format!("no name of the build has the tag {unknown:?}; plugins that give names come before this one")));
        }
        scene.draft.request.tags.floating.extend(self.tags.iter().cloned());
        Ok(json!(self.tags))
    }
}

/// Pushes the image under all of its names to more registries, too: all of them, or none.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct PushAll {
    /// Registries (with a path, if need be) that get every name of the build: `registry.example.org/team`.
    registries: Vec<String>,
}

impl Plugin for PushAll {
    fn check(&self, _: &BuildRequest) -> Result<(), String> {
        self.registries.iter().try_for_each(|registry| {
            format!("{registry}/x").parse::<ovenbird_oci::Reference>().map(drop).map_err(|e| format!("{registry:?}: {e}"))
        })
    }

    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        let request = &mut scene.draft.request;
        if request.names.is_empty() {
            return Err(veto("the build has no name that could be pushed"));
        }
        let mut added: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        let own = request.names.clone();
        for registry in &self.registries {
            for name in &own {
                // Of `registry/path/name:tag` the last part and the tag go with it.
                let (path, rest) = name.split_once('{').map_or((name.as_str(), ""), |(path, _)| (path, &name[path.len()..]));
                let last = path.rsplit('/').next().unwrap_or(path);
                let new = format!("{}/{last}{rest}", registry.trim_end_matches('/'));
                if !request.names.contains(&new) {
                    request.names.push(new.clone());
                }
                added.entry(registry).or_default().push(new);
            }
        }
        if !request.outputs.iter().any(|output| output.kind == OutputKind::Registry && output.names.is_empty()) {
            request.outputs.push(Output { names: added.values().flatten().cloned().collect(), ..Output::new(OutputKind::Registry) });
        }
        Ok(json!(added))
    }
}
