//! What was published: checked, joined, taken back, cleaned up.

use std::collections::BTreeMap;
use std::sync::Arc;

use ovenbird_oci::image::media;
use ovenbird_oci::registry::{Client, Deletion, ProgressFn};
use ovenbird_oci::store::Store;
use ovenbird_oci::{Descriptor, ImageConfig, Index, Manifest, Platform, Reference};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::error::{Error, Kind};
use crate::request::BuildRequest;
use crate::workflow::{Plugin, Scene, Standing, veto};

/// Reads every published name back, and fails when its media types are not of these families.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct VerifyMediaTypes {
    /// Families that are allowed: oci, docker.
    #[serde(default = "both")]
    allowed: Vec<String>,
}

fn both() -> Vec<String> {
    vec!["oci".into(), "docker".into()]
}

fn family(media_type: &str) -> &'static str {
    if media_type.starts_with("application/vnd.oci.") {
        "oci"
    } else if media_type.starts_with("application/vnd.docker.") {
        "docker"
    } else {
        "unknown"
    }
}

impl Plugin for VerifyMediaTypes {
    fn check(&self, _: &BuildRequest) -> Result<(), String> {
        match self.allowed.iter().find(|name| !["oci", "docker"].contains(&name.as_str())) {
            Some(name) => Err(format!("{name:?} is no family: expected oci or docker")),
            None => Ok(()),
        }
    }

    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        let wanted = scene.image()?.target.digest;
        let mut found = BTreeMap::new();
        for name in &scene.delivered.pushed {
            let fetched = scene.ask(async |client| client.manifest(name).await)?;
            if fetched.descriptor.digest != wanted {
                return Err(veto(format!("{} is {} in the registry, and {wanted} was built", name.familiar(), fetched.descriptor.digest)));
            }
            let document: Value = serde_json::from_slice(&fetched.bytes).map_err(|e| Error::from_chain(Kind::Registry, &e))?;
            let members = ["layers", "manifests"].into_iter().filter_map(|key| document.get(key)?.as_array()).flatten();
            let types = members.chain(document.get("config")).filter_map(|one| one.get("mediaType")?.as_str().map(str::to_owned));
            let types: Vec<String> = std::iter::once(fetched.descriptor.media_type.clone()).chain(types).collect();
            if let Some(wrong) = types.iter().find(|media_type| !self.allowed.iter().any(|allowed| allowed == family(media_type))) {
                return Err(veto(format!(
                    "{} has the media type {wrong}; allowed are those of {}",
                    name.familiar(),
                    self.allowed.join(" and ")
                )));
            }
            found.insert(name.to_string(), types);
        }
        Ok(json!(found))
    }
}

/// Joins images that are in a registry already, one for each platform, into an index, and puts that under names of the same repository.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct GroupManifests {
    /// The images; what was published by this build is one of them without being named.
    images: Vec<String>,
    /// Names of the index, in the repository of the images.
    names: Vec<String>,
    /// Leave the image of this build out.
    #[serde(default)]
    without_own: bool,
}

impl GroupManifests {
    fn references(list: &[String]) -> Result<Vec<Reference>, String> {
        list.iter().map(|name| name.parse::<Reference>().map_err(|e| e.to_string())).collect()
    }
}

impl Plugin for GroupManifests {
    fn check(&self, _: &BuildRequest) -> Result<(), String> {
        let (images, names) = (Self::references(&self.images)?, Self::references(&self.names)?);
        let place = |name: &Reference| (name.registry().to_owned(), name.repository().to_owned());
        let Some(first) = names.first() else { return Err("the index needs a name".into()) };
        match images.iter().chain(&names).find(|name| place(name) != place(first)) {
            Some(name) => Err(format!(
                "{} and {} are not in one repository; `ovenbird registry copy` brings them together",
                name.familiar(),
                first.familiar()
            )),
            None => Ok(()),
        }
    }

    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        let (mut images, names) = (Self::references(&self.images).map_err(veto)?, Self::references(&self.names).map_err(veto)?);
        let Some(first) = names.first() else { return Err(veto("the index needs a name")) };
        if !self.without_own {
            let own =
                scene.delivered.pushed.iter().find(|name| (name.registry(), name.repository()) == (first.registry(), first.repository()));
            images.extend(own.cloned());
        }
        let folder = scene.folder()?;
        let store = Store::open(folder.path())?;
        let mut manifests: Vec<Descriptor> = vec![];
        for image in &images {
            manifests.extend(scene.ask(async |client| Ok(members(&client, image, &store).await))??);
        }
        // Named, too, or by several names: each image is there once, and that of this build only if it is wanted.
        let mut known = std::collections::BTreeSet::new();
        let own = scene.image.as_deref().filter(|_| self.without_own).map(|image| &image.platforms[..]).unwrap_or_default();
        manifests.retain(|one| !own.iter().any(|(_, manifest, _)| manifest.digest == one.digest) && known.insert(one.digest));
        if manifests.is_empty() {
            return Err(veto("there is no image to put into the index"));
        }
        let mut seen = vec![];
        for manifest in &manifests {
            let platform = manifest.platform.as_ref().map(ToString::to_string).unwrap_or_default();
            if seen.contains(&platform) {
                return Err(veto(format!("two of the images are for {platform}")));
            }
            seen.push(platform);
        }
        manifests.sort_by_key(|manifest| manifest.platform.as_ref().map(ToString::to_string));
        let docker = manifests.iter().all(|manifest| family(&manifest.media_type) == "docker");
        let media_type = if docker { media::DOCKER_LIST } else { media::OCI_INDEX };
        let index = Index { schema_version: 2, media_type: Some(media_type.into()), manifests, annotations: BTreeMap::new() };
        let bytes = serde_json::to_vec(&index).map_err(|e| Error::from_chain(Kind::Bug, &e))?;
        let target = Descriptor::new(media_type, store.write(&bytes)?, bytes.len() as u64);
        let silent: ProgressFn = Arc::new(|_, _, _| {});
        for name in &names {
            scene.ask(async |client| client.push(&store, &target, name, &BTreeMap::new(), &silent).await)?;
        }
        Ok(json!({ "digest": target.digest.to_string(), "platforms": seen, "names": self.names }))
    }
}

/// The manifests of an image of a registry, each with its platform. They and their configs are in the store then.
async fn members(client: &Client, image: &Reference, store: &Store) -> Result<Vec<Descriptor>, Error> {
    let broken = |e: serde_json::Error| Error::from_chain(Kind::Registry, &e).while_doing(format!("{} cannot be read", image.familiar()));
    let top = client.manifest(image).await?;
    let list = if top.descriptor.is_index() {
        let index: Index = serde_json::from_slice(&top.bytes).map_err(broken)?;
        index.manifests.into_iter().filter(|member| !member.is_attestation()).collect()
    } else {
        vec![top.descriptor]
    };
    let silent: ProgressFn = Arc::new(|_, _, _| {});
    let mut members = vec![];
    for descriptor in list {
        let fetched = client.manifest(&image.with_digest(descriptor.digest)).await?;
        store.write(&fetched.bytes)?;
        let manifest: Manifest = serde_json::from_slice(&fetched.bytes).map_err(broken)?;
        client.fetch_blob(image, &manifest.config, store, &silent).await?;
        let config: ImageConfig = serde_json::from_slice(&store.read(&manifest.config.digest)?).map_err(broken)?;
        let own = || Platform {
            os: config.os.clone(),
            architecture: config.architecture.clone(),
            variant: config.variant.clone(),
            os_version: config.os_version.clone(),
        };
        let platform = descriptor.platform.clone().unwrap_or_else(own);
        members.push(Descriptor { platform: Some(platform), ..descriptor });
    }
    Ok(members)
}

/// Takes the names that this build published away again, when it failed or was cancelled afterwards. A name that somebody else has moved
/// since stays. What a name stood for before does not come back.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct UndoPush {
    /// Also when everything went well: for images that were published only to be looked at.
    #[serde(default)]
    always: bool,
}

impl Plugin for UndoPush {
    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        if !self.always && *scene.standing == Standing::Well {
            return Ok(json!({ "deleted": [] }));
        }
        let Some(image) = scene.image.as_deref() else { return Ok(json!({ "deleted": [] })) };
        let (mut deleted, mut left) = (vec![], vec![]);
        for name in &scene.delivered.pushed {
            let now = scene.ask(async |client| client.look(name).await)?;
            match now {
                // Gone with another name of the same image.
                None => {
                    deleted.push(name.to_string());
                    continue;
                }
                Some(now) if now.digest != image.target.digest => {
                    left.push(format!("{} is another image by now", name.familiar()));
                    continue;
                }
                Some(_) => {}
            }
            match scene.ask(async |client| client.delete(name).await)? {
                Deletion::Done | Deletion::Missing => deleted.push(name.to_string()),
                // Registries that delete by digest only take all names of the image away: here they are all of this build.
                Deletion::Unsupported(_) => match scene.ask(async |client| client.delete(&name.with_digest(image.target.digest)).await)? {
                    Deletion::Done | Deletion::Missing => deleted.push(name.to_string()),
                    Deletion::Unsupported(said) => left.push(format!("{}: the registry does not delete: {said}", name.familiar())),
                },
            }
        }
        if !left.is_empty() {
            return Err(veto(format!("not everything could be taken back: {}", left.join("; "))));
        }
        Ok(json!({ "deleted": deleted }))
    }
}

/// Takes the names of the built image away on this machine; `ovenbird prune` removes what has no name.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Cleanup {
    /// Only when the build failed or was cancelled.
    #[serde(default)]
    only_failed: bool,
}

impl Plugin for Cleanup {
    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        if self.only_failed && *scene.standing == Standing::Well {
            return Ok(json!({ "removed": [] }));
        }
        let names = scene.delivered.names.iter().map(|name| Ok(name.parse()?)).collect::<Result<Vec<Reference>, Error>>()?;
        scene.shop.forget(&names)?;
        Ok(json!({ "removed": scene.delivered.names }))
    }
}
