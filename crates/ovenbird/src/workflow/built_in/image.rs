//! The built image, looked at before anybody gets it: tried, measured, compared.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Size;
use super::packages::{self, Package};
use crate::builder::Image;
use crate::error::{Error, Kind};
use crate::request::{BuildRequest, Network};
use crate::workflow::{Plugin, Scene, veto};

/// Runs a command in the built image, isolated like any step; when it fails, nothing is published. What it writes is dropped.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct TestImage {
    /// The command and its arguments; one text alone is run by the image's /bin/sh.
    command: Vec<String>,
    /// Let it use the network.
    #[serde(default)]
    network: bool,
    /// Text that its standard output must contain.
    #[serde(default)]
    expect: Option<String>,
}

impl Plugin for TestImage {
    fn check(&self, _: &BuildRequest) -> Result<(), String> {
        if self.command.is_empty() { Err("command is empty".into()) } else { Ok(()) }
    }

    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        let command = match self.command.as_slice() {
            [one] => vec!["/bin/sh".to_owned(), "-c".to_owned(), one.clone()],
            several => several.to_vec(),
        };
        let network = if self.network { Network::Default } else { Network::None };
        let image = scene.image()?.clone();
        let mut outputs = BTreeMap::new();
        for (platform, _, _) in &image.platforms {
            let Some(one) = Scene::of_platform(&image, platform) else { continue };
            let output = scene.run_in(&one, platform, &command, network)?;
            if let Some(expected) = self.expect.as_ref().filter(|expected| !output.contains(*expected)) {
                return Err(veto(format!("the command {command:?} does not say {expected:?}")));
            }
            outputs.insert(platform.to_string(), output.chars().take(10_000).collect::<String>());
        }
        Ok(json!(outputs))
    }
}

/// What is merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum From {
    #[default]
    Base,
    All,
}

/// Merges layers: those above the base image into one, or all into one. Files, configuration and the earlier lines of history stay what
/// they are; what was deleted in a later layer is not shipped any more.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Squash {
    /// base: the layers of the base image stay, and one comes on top. all: one layer in all.
    #[serde(default)]
    from: From,
}

impl Plugin for Squash {
    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        let Some(tree) = scene.tree else { return Err(veto("there is no source")) };
        let count = |scene: &Scene, image: &Image| -> Result<Vec<usize>, Error> {
            let described = scene.shop.describe(image)?;
            Ok(described.iter().map(|one| one.document.get("layers").and_then(Value::as_array).map_or(0, Vec::len)).collect())
        };
        let image = scene.image()?.clone();
        let squashed = scene.shop.squash(&image, self.from == From::All, tree, &scene.draft.request, scene.job)?;
        let result =
            json!({ "layers": count(scene, &squashed)?, "before": count(scene, &image)?, "digest": squashed.target.digest.to_string() });
        if let Some(slot) = scene.image.as_deref_mut() {
            *slot = squashed;
        }
        Ok(result)
    }
}

/// Refuses an image whose layers have more bytes, as a registry holds them, on any platform.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct SizeLimit {
    /// Most bytes of one platform, for example 500m.
    max: Size,
    /// Most layers.
    #[serde(default)]
    layers: Option<usize>,
}

impl Plugin for SizeLimit {
    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        let described = scene.shop.describe(scene.image()?)?;
        let mut sizes = BTreeMap::new();
        for one in described {
            let layers = one.document.get("layers").and_then(Value::as_array).map_or(0, Vec::len);
            if one.size > self.max.0 {
                return Err(veto(format!("the image for {} has {} bytes, at most {} are allowed", one.platform, one.size, self.max.0)));
            }
            if let Some(most) = self.layers.filter(|most| layers > *most) {
                return Err(veto(format!("the image for {} has {layers} layers, at most {most} are allowed", one.platform)));
            }
            sizes.insert(one.platform.to_string(), json!({ "size": one.size, "layers": layers }));
        }
        Ok(json!(sizes))
    }
}

/// Form of a list of packages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Form {
    #[default]
    List,
    Spdx,
    Cyclonedx,
}

/// Lists the packages in the image: of Debian, Alpine and RPM (which is asked in the image, where there is an rpm program), and of Python.
/// As a plain list, or as an SBOM.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct PackageList {
    /// list, spdx (SPDX 2.3 JSON) or cyclonedx (CycloneDX 1.5 JSON).
    #[serde(default)]
    format: Form,
    /// Write it into this file; with several platforms, each into `PLATFORM-` and its name.
    #[serde(default)]
    dest: Option<PathBuf>,
    /// Fail when there are no packages at all.
    #[serde(default)]
    some: bool,
    /// Refuse images with one of these packages: `name`, or `name=version`.
    #[serde(default)]
    refused: Vec<String>,
}

fn packages_of(scene: &Scene, image: &Image) -> Result<BTreeMap<String, Vec<Package>>, Error> {
    let mut found = BTreeMap::new();
    for (platform, _, _) in &image.platforms {
        let Some(one) = Scene::of_platform(image, platform) else { continue };
        found.insert(platform.to_string(), packages::list(scene, &one, platform)?);
    }
    Ok(found)
}

impl Plugin for PackageList {
    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        let image = scene.image()?.clone();
        let all = packages_of(scene, &image)?;
        if self.some && all.values().all(Vec::is_empty) {
            return Err(veto("no packages were found in the image"));
        }
        for package in all.values().flatten() {
            let exact = format!("{}={}", package.name, package.version);
            if self.refused.iter().any(|refused| *refused == package.name || *refused == exact) {
                return Err(veto(format!("the image has the package {exact}")));
            }
        }
        let time = scene.draft.request.source_date_epoch()?.unwrap_or(scene.bench.now);
        let name = scene.draft.request.names.first().cloned().unwrap_or_else(|| "image".into());
        let mut results = BTreeMap::new();
        for (platform, packages) in &all {
            let digest = image
                .platforms
                .iter()
                .find(|(known, _, _)| known.to_string() == *platform)
                .map(|(_, manifest, _)| manifest.digest.to_string());
            let subject = packages::Subject { name: &name, digest: digest.as_deref().unwrap_or_default(), time };
            let document = match self.format {
                Form::List => json!(packages),
                Form::Spdx => packages::spdx(&subject, packages),
                Form::Cyclonedx => packages::cyclonedx(&subject, packages),
            };
            if let Some(dest) = &self.dest {
                let dest = if all.len() > 1 { prefixed(dest, platform) } else { dest.clone() };
                let text = serde_json::to_string_pretty(&document).map_err(|e| Error::from_chain(Kind::Bug, &e))?;
                let dest = scene.write_text(&dest, &(text + "\n"))?;
                results.insert(platform.clone(), json!({ "packages": packages.len(), "file": dest }));
            } else {
                results.insert(platform.clone(), document);
            }
        }
        Ok(json!(results))
    }
}

fn prefixed(path: &Path, platform: &str) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{}-{name}", platform.replace('/', "_")))
}

/// Refuses an image of several platforms whose packages have not the same versions everywhere.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct CompareComponents {
    /// Packages that may differ.
    #[serde(default)]
    ignore: Vec<String>,
}

impl Plugin for CompareComponents {
    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        let image = scene.image()?.clone();
        let all = packages_of(scene, &image)?;
        // What is on one platform only (a boot loader) is not compared, as a version of it has nothing to differ from.
        let mut versions: BTreeMap<(&str, &str), BTreeMap<&str, BTreeSet<&str>>> = BTreeMap::new();
        for (platform, packages) in &all {
            for package in packages.iter().filter(|package| !self.ignore.contains(&package.name)) {
                versions.entry((package.kind, &package.name)).or_default().entry(platform).or_default().insert(&package.version);
            }
        }
        let mut wrong = vec![];
        for ((_, name), by_platform) in &versions {
            let different: BTreeSet<&BTreeSet<&str>> = by_platform.values().collect();
            if different.len() > 1 {
                let told = by_platform
                    .iter()
                    .map(|(platform, versions)| format!("{} on {platform}", versions.iter().copied().collect::<Vec<_>>().join(" and ")));
                wrong.push(format!("{name} is {}", told.collect::<Vec<_>>().join(", ")));
            }
        }
        if wrong.is_empty() {
            return Ok(json!({ "platforms": all.len(), "compared": versions.len() }));
        }
        Err(veto(format!("packages differ between platforms: {}", wrong.join("; "))))
    }
}
