//! What can be done with images in registries without building: look, list, copy, delete, mount.
//!
//! It must not know of terminals: the command line renders what these functions give.

mod copy;
mod place;

use std::collections::BTreeSet;

use ovenbird_engine::BuildError;
use ovenbird_engine::build::existing::Member;
use ovenbird_oci::registry::{Deletion, RegistryError};
use ovenbird_oci::{Descriptor, Digest, Manifest, Reference};

pub use copy::copy;
pub use place::Place;

use crate::builder::{EngineBuilder, Job, told};
use crate::error::{Error, Kind};

/// Tags that are looked up at once.
const LOOKUPS: usize = 8;
/// Tags that a message names.
const MOST_NAMED: usize = 10;

fn asked(error: BuildError) -> Error {
    told(error, None)
}

/// Is there an image of this name? Every answer but yes and no is an error.
pub fn exists(builder: &EngineBuilder, name: &Reference, job: &Job) -> Result<bool, Error> {
    let found = builder.engine().ask(&job.cancel, async |client| client.look(name).await).map_err(asked)?;
    Ok(found.is_some())
}

/// An image of a registry, without its layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Inspected {
    /// Manifest or index.
    pub target: Descriptor,
    /// Its bytes.
    pub raw: Vec<u8>,
    /// Each platform.
    pub members: Vec<Member>,
}

impl Inspected {
    /// Bytes of all configs and layers, each once.
    pub fn size(&self) -> u64 {
        let blobs = |member: &Member| -> Vec<(Digest, u64)> {
            member.document.layers.iter().chain([&member.document.config]).map(|blob| (blob.digest, blob.size)).collect()
        };
        self.members.iter().flat_map(blobs).collect::<BTreeSet<_>>().iter().fold(0, |sum, (_, size)| sum.saturating_add(*size))
    }
}

/// Manifests and configs of an image of a registry.
pub fn inspect(builder: &EngineBuilder, name: &Reference, job: &Job) -> Result<Inspected, Error> {
    let engine = builder.engine();
    let found = engine.fetch(name, false, &job.sink, &job.cancel).map_err(asked)?;
    let target = found.ok_or_else(|| Error::from(RegistryError::NotFound { reference: name.to_string() }))?;
    let members = engine.members(&target).map_err(asked)?;
    Ok(Inspected { raw: engine.store().read(&target.digest)?, target, members })
}

/// All tags of a repository, sorted.
pub fn tags(builder: &EngineBuilder, repository: &Reference, job: &Job) -> Result<Vec<String>, Error> {
    let mut tags = builder.engine().ask(&job.cancel, async |client| client.tags(repository).await).map_err(asked)?;
    tags.sort();
    Ok(tags)
}

/// Deletes a tag, or a manifest by digest. A manifest that tags point to goes with these tags only when that is forced. Gives the names
/// that are gone.
pub fn delete(builder: &EngineBuilder, name: &Reference, force: bool, job: &Job) -> Result<Vec<String>, Error> {
    let engine = builder.engine();
    let gone = |what: &Reference| engine.ask(&job.cancel, async |client| client.delete(what).await).map_err(asked);
    let missing = || Error::from(RegistryError::NotFound { reference: name.to_string() });
    let mut why = String::new();
    let manifest = match name.digest() {
        Some(digest) => *digest,
        None => match gone(name)? {
            Deletion::Done => return Ok(vec![name.to_string()]),
            Deletion::Missing => return Err(missing()),
            // Many registries delete manifests only.
            Deletion::Unsupported(said) => {
                why = format!("; {} deletes whole manifests only ({said})", name.registry());
                let found = engine.ask(&job.cancel, async |client| client.look(name).await).map_err(asked)?;
                found.ok_or_else(missing)?.digest
            }
        },
    };
    let tags = pointing(builder, name, &manifest, job)?;
    let others: Vec<&String> = tags.iter().filter(|tag| name.digest().is_some() || name.tag() != Some(tag.as_str())).collect();
    if !others.is_empty() && !force {
        let more = if others.len() > MOST_NAMED { " …" } else { "" };
        let named: Vec<&str> = others.iter().take(MOST_NAMED).map(|tag| tag.as_str()).collect();
        let message = format!("{name} is not deleted: its manifest {} also has the tags {}{more}{why}", manifest.short(), named.join(", "));
        return Err(Error::new(Kind::Usage, message).hint("--force deletes the manifest with all of them"));
    }
    let whole = name.with_digest(manifest);
    match gone(&whole)? {
        Deletion::Done => {
            let repository = |tag: &String| whole.with_tag(tag).to_string();
            Ok(std::iter::once(whole.to_string()).chain(tags.iter().map(repository)).collect())
        }
        Deletion::Missing => Err(missing()),
        Deletion::Unsupported(said) => Err(Error::new(Kind::Registry, format!("{} does not delete images ({said})", name.registry()))
            .hint("its operator can allow it; of Debian's docker-registry the setting is storage.delete.enabled")),
    }
}

/// The tags of a repository that point at a manifest.
fn pointing(builder: &EngineBuilder, repository: &Reference, manifest: &Digest, job: &Job) -> Result<Vec<String>, Error> {
    let engine = builder.engine();
    let all = tags(builder, repository, job)?;
    let mut pointing = vec![];
    for some in all.chunks(LOOKUPS) {
        let found = engine.ask(&job.cancel, async |client| {
            let mut looks = tokio::task::JoinSet::new();
            for tag in some {
                let (client, name, tag) = (client.clone(), repository.with_tag(tag), tag.clone());
                looks.spawn(async move { (tag, client.look(&name).await) });
            }
            let mut found = vec![];
            while let Some(Ok((tag, look))) = looks.join_next().await {
                if look?.is_some_and(|target| target.digest == *manifest) {
                    found.push(tag);
                }
            }
            Ok(found)
        });
        pointing.extend(found.map_err(asked)?);
    }
    pointing.sort();
    Ok(pointing)
}

/// Makes the blobs of an image (or one blob, by digest) part of another repository of the same registry, without a transfer. Gives each blob,
/// and whether the registry did it.
pub fn mount(builder: &EngineBuilder, from: &Reference, to: &Reference, job: &Job) -> Result<Vec<(Digest, bool)>, Error> {
    if from.registry() != to.registry() {
        let message = format!("blobs are mounted within a registry: {} and {} are two", from.registry(), to.registry());
        return Err(Error::new(Kind::Usage, message).hint(format!("ovenbird registry copy {from} {to}")));
    }
    let engine = builder.engine();
    // Asked for as a manifest, a layer makes some registries fail.
    let blob = match from.digest() {
        Some(blob) => engine.ask(&job.cancel, async |client| client.has_blob(from, blob).await).map_err(asked)?.then_some(*blob),
        None => None,
    };
    let blobs = if let Some(blob) = blob {
        BTreeSet::from([blob])
    } else {
        let found = engine.fetch(from, false, &job.sink, &job.cancel).map_err(asked)?;
        let target = found.ok_or_else(|| Error::from(RegistryError::NotFound { reference: from.to_string() }))?;
        let of =
            |manifest: &Manifest| -> Vec<Digest> { manifest.layers.iter().chain([&manifest.config]).map(|blob| blob.digest).collect() };
        engine.members(&target).map_err(asked)?.iter().flat_map(|member| of(&member.document)).collect()
    };
    let mut done = vec![];
    for blob in blobs {
        let mounted = engine.ask(&job.cancel, async |client| client.mount(&blob, from, to).await).map_err(asked)?;
        done.push((blob, mounted));
    }
    Ok(done)
}
