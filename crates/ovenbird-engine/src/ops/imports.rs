//! Caches of other machines, as far as this build may use them.
//!
//! They are read when something is not in the cache of this machine, once in a build. Of a result that is found only the keys come;
//! its layers stay where they are until a step or an output reads them. A cache that cannot be had is a warning: the steps run then.

use std::collections::HashMap;
use std::io::{self, Read as _};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use ovenbird_oci::layer;
use ovenbird_oci::registry::RegistryError;
use ovenbird_oci::regular_file::{self, Links};
use ovenbird_oci::{Descriptor, Digest, Index, Manifest, Reference};

use super::image::{self, is_index};
use crate::cache::document::{self, Contents, Entry, MountLayer, Part};
use crate::cache::{self, CacheKey, Chain, Link, Record};
use crate::error::BuildError;
use crate::event::Event;
use crate::input::{CacheSource, LocalCache};
use crate::ops::Session;
use crate::plan::{Op, Plan};

/// A registry that does not answer so long is not worth waiting for: the steps may take less.
const PATIENCE: Duration = Duration::from_secs(30);
/// Platforms of an image with an inline cache.
const MOST_MANIFESTS: usize = 64;
/// Largest `index.json` or manifest of a local cache, in bytes.
const MAX_MANIFEST: u64 = 4 << 20;

/// Layers that were met and have no folder here, and which of them turned out to be of no use. It lives longer than one build: what is found
/// out while an image is delivered counts when it is built again.
#[derive(Debug, Clone, Default)]
pub struct Borrowed(Arc<Mutex<HashMap<Digest, bool>>>);

impl Borrowed {
    /// One that is used from now on.
    pub fn met(&self, layer: &Digest) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(*layer).or_insert(false);
    }

    /// Was it met?
    pub fn has(&self, layer: &Digest) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains_key(layer)
    }

    /// It cannot be had, or is not what it should be: whatever is made of it must be made anew.
    pub fn spoil(&self, layer: &Digest) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(*layer, true);
    }

    fn is_spoilt(&self, layer: &Digest) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(layer).copied().unwrap_or(false)
    }
}

/// Where the layers of an entry are.
#[derive(Debug, Clone)]
enum Place {
    Registry(Reference),
    Local(LocalCache),
}

/// What the caches of a build hold, by key.
#[derive(Debug, Default)]
pub struct Imports {
    found: OnceLock<Found>,
    borrowed: Borrowed,
}

#[derive(Debug, Default)]
struct Found {
    entries: HashMap<CacheKey, Vec<(Arc<Entry>, Arc<Place>)>>,
    mounts: HashMap<Digest, (MountLayer, Arc<Place>)>,
}

impl Imports {
    /// Nothing read yet.
    pub fn new(borrowed: Borrowed) -> Self {
        Self { found: OnceLock::new(), borrowed }
    }

    /// Layers that came from other machines.
    pub fn borrowed(&self) -> &Borrowed {
        &self.borrowed
    }

    /// A result of this machine's cache, else of the others'.
    pub fn find(&self, session: &Session, plan: &Plan, key: &CacheKey) -> Option<Record> {
        let local = cache::find(session.state, key).filter(|record| {
            let shared = record.chain.iter().filter_map(|link| if let Link::Shared(layer) = &**link { Some(layer) } else { None });
            shared.clone().for_each(|layer| self.borrowed.met(&layer.digest));
            shared.into_iter().all(|layer| !self.borrowed.is_spoilt(&layer.digest) && layer.epoch == session.input.source_date_epoch)
        });
        local.or_else(|| self.import(session, plan, key))
    }

    fn import(&self, session: &Session, plan: &Plan, key: &CacheKey) -> Option<Record> {
        if session.input.cache_from.is_empty() {
            return None;
        }
        let found = self.found.get_or_init(|| read_all(session));
        let record = found.entries.get(key)?.iter().find_map(|(entry, place)| {
            let chain = entry.chain.iter().map(|part| self.link(session, plan, part).map(Arc::new)).collect::<Option<Chain>>()?;
            self.reach(session, &chain, place).then_some(Record { key: entry.content, chain })
        })?;
        // Without it the next build asks again: no reason to fail.
        let _ = cache::save(session.state, &[*key], &record);
        Some(record)
    }

    /// Fills the new folder of a cache mount with what another machine had in it. When that is not possible, it stays empty.
    pub fn fill(&self, session: &Session, name: &Digest, dir: &Path) -> Result<(), BuildError> {
        if session.input.cache_from.is_empty() {
            return Ok(());
        }
        let Some((mount, place)) = self.found.get_or_init(|| read_all(session)).mounts.get(name) else { return Ok(()) };
        let fetched =
            obtain(session, &mount.blob, place).map_err(|reason| BuildError::Malformed { digest: mount.blob.digest.to_string(), reason });
        let fetched = fetched.and_then(|()| image::fetch_known(session, &[&mount.blob]));
        let filled = fetched.and_then(|()| {
            let blob = session.state.store().open_blob(&mount.blob.digest)?;
            // Owners that this disk does not hold are not kept in a cache mount either way.
            layer::unpack(blob, dir, Some(&mount.diff_id), session.state.ownership(), &|_| None)
                .map_err(|source| BuildError::Layer { layer: mount.blob.digest.to_string(), source })
        });
        match filled {
            Ok(_) => Ok(()),
            Err(BuildError::Cancelled) => Err(BuildError::Cancelled),
            Err(error) => {
                warn(session, "the content of a cache mount", &error.to_string());
                // What came before the damage.
                for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
                    let _ = crate::state::remove_tree(&entry.path());
                }
                Ok(())
            }
        }
    }

    /// The folder of a cache mount as another machine left it, for handing it on unchanged: it can be had where its origin says.
    pub fn mount(&self, session: &Session, name: &Digest) -> Option<MountLayer> {
        if session.input.cache_from.is_empty() {
            return None;
        }
        let (mount, place) = self.found.get_or_init(|| read_all(session)).mounts.get(name)?;
        obtain(session, &mount.blob, place).is_ok().then(|| mount.clone())
    }

    fn link(&self, session: &Session, plan: &Plan, part: &Part) -> Option<Link> {
        match part {
            Part::Base(manifest) => plan.vertices.iter().find_map(|vertex| match &vertex.op {
                Op::Image(image) if image.manifest == *manifest => {
                    Some(Link::Image { manifest: *manifest, reference: image.reference.clone() })
                }
                _ => None,
            }),
            // Times of files are part of the image: those of another fixed time are not those that were asked for.
            Part::Layer(layer) => (!self.borrowed.is_spoilt(&layer.digest) && layer.epoch == session.input.source_date_epoch)
                .then(|| Link::Shared((**layer).clone())),
        }
    }

    /// Sees to it that the layers can be had when something reads them.
    fn reach(&self, session: &Session, chain: &[Arc<Link>], place: &Place) -> bool {
        chain.iter().all(|link| {
            let Link::Shared(layer) = &**link else { return true };
            self.borrowed.met(&layer.digest);
            if session.state.has_snapshot(&layer.snapshot()) {
                return true;
            }
            obtain(session, &layer.descriptor(), place)
                .inspect_err(|reason| {
                    self.borrowed.spoil(&layer.digest);
                    warn(session, &format!("the layer {} of a cache", layer.digest), reason);
                })
                .is_ok()
        })
    }
}

/// Sees to it that a blob can be had: remembers its registry; copies it from a folder, which may be gone tomorrow.
fn obtain(session: &Session, blob: &Descriptor, place: &Place) -> Result<(), String> {
    if session.state.store().holds(blob) {
        return Ok(());
    }
    match place {
        Place::Registry(reference) => session.state.set_origin(&blob.digest, reference).map_err(|error| error.to_string()),
        Place::Local(local) => copy(session, &local.dir, blob),
    }
}

/// A layer could not be had. One of another machine is of no use then: nothing that is made of it is found any more.
pub fn spoil(session: &Session, layer: &Digest, error: BuildError) -> BuildError {
    match error {
        error @ (BuildError::Cancelled | BuildError::State(_) | BuildError::SharedLayer { .. }) => error,
        error if session.imports.borrowed.has(layer) => {
            session.imports.borrowed.spoil(layer);
            let _ = session.state.forget_origin(layer);
            BuildError::SharedLayer { layer: *layer, source: Box::new(error) }
        }
        error => error,
    }
}

fn warn(session: &Session, what: &str, reason: &str) {
    session.sink.emit(Event::Warning {
        code: "cache-import".into(),
        message: format!("{what} cannot be used: {reason}; what it would have given is built"),
        line: None,
    });
}

fn read_all(session: &Session) -> Found {
    let mut all = Found::default();
    for source in &session.input.cache_from {
        session.sink.emit(Event::Message { text: format!("importing the cache {source}") });
        let read = match source {
            CacheSource::Registry(reference) => registry(session, reference).map(|found| (found, Place::Registry(reference.clone()))),
            CacheSource::Local(local) => folder(local).map(|found| (found, Place::Local(local.clone()))),
        };
        match read {
            Ok((found, place)) => {
                let place = Arc::new(place);
                if found == Contents::default() {
                    session.sink.emit(Event::Message { text: format!("the cache {source} is empty") });
                }
                for entry in found.entries {
                    let entry = Arc::new(entry);
                    for key in [entry.definition, entry.content] {
                        all.entries.entry(key).or_default().push((entry.clone(), place.clone()));
                    }
                }
                for mount in found.mounts {
                    all.mounts.entry(mount.name).or_insert((mount, place.clone()));
                }
            }
            // Before the first export there is none.
            Err(None) => session.sink.emit(Event::Message { text: format!("there is no cache {source} yet") }),
            Err(Some(reason)) => warn(session, &format!("the cache {source}"), &reason),
        }
    }
    all
}

/// Why a cache was not read; `None`: there is none.
type Unread = Option<String>;

fn registry(session: &Session, reference: &Reference) -> Result<Contents, Unread> {
    let ask = async {
        let fetched = session.client.manifest(reference).await?;
        let mut manifests = vec![];
        if is_index(&fetched.descriptor.media_type) {
            let index: Option<Index> = serde_json::from_slice(&fetched.bytes).ok();
            for child in index.into_iter().flat_map(|index| index.manifests).filter(|m| !m.is_attestation()).take(MOST_MANIFESTS) {
                manifests.push(session.client.manifest(&reference.with_digest(child.digest)).await?.bytes);
            }
        } else {
            manifests.push(fetched.bytes);
        }
        let mut documents = vec![];
        for bytes in manifests {
            let manifest: Manifest = match serde_json::from_slice(&bytes) {
                Ok(manifest) => manifest,
                Err(error) => {
                    documents.push(Err(format!("its manifest is malformed ({error})")));
                    continue;
                }
            };
            if manifest.config.media_type == document::MEDIA_TYPE && manifest.config.size <= document::MAX_SIZE {
                let silent: ovenbird_oci::registry::ProgressFn = Arc::new(|_, _, _| {});
                session.client.fetch_blob(reference, &manifest.config, session.state.store(), &silent).await?;
            }
            documents.push(Ok(manifest));
        }
        Ok::<_, RegistryError>(documents)
    };
    let answered = session.ask(reference.registry(), async { tokio::time::timeout(PATIENCE, ask).await });
    let manifests = match answered.map_err(|error| Some(error.to_string()))? {
        Ok(Ok(manifests)) => manifests,
        Ok(Err(RegistryError::NotFound { .. })) => return Err(None),
        Ok(Err(error)) => return Err(Some(error.to_string())),
        Err(_) => return Err(Some(format!("{} did not answer in {} seconds", reference.registry(), PATIENCE.as_secs()))),
    };
    let read = |digest: &Digest| session.state.store().read(digest).map_err(|error| error.to_string());
    let mut all = Contents::default();
    for manifest in &manifests {
        let found = manifest.as_ref().map_err(Clone::clone).and_then(|manifest| contents(manifest, &read)).map_err(Some)?;
        all.entries.extend(found.entries);
        all.mounts.extend(found.mounts);
    }
    Ok(all)
}

/// What a manifest brings.
fn contents(manifest: &Manifest, read: &dyn Fn(&Digest) -> Result<Vec<u8>, String>) -> Result<Contents, String> {
    let bytes = if manifest.config.media_type == document::MEDIA_TYPE {
        if manifest.config.size > document::MAX_SIZE {
            return Err(format!("its list of results has {} bytes, and {} are allowed", manifest.config.size, document::MAX_SIZE));
        }
        read(&manifest.config.digest)?
    } else if let Some(inline) = manifest.annotations.get(document::ANNOTATION) {
        inline.as_bytes().to_vec()
    } else {
        return Err("it is an image without a cache of Ovenbird: export one with --cache-to type=inline or type=registry".into());
    };
    document::read(&bytes, &manifest.layers).map_err(|error| error.to_string())
}

/// A cache in an OCI layout. Only its list of results is read.
fn folder(local: &LocalCache) -> Result<Contents, Unread> {
    let index = local.dir.join("index.json");
    if !index.exists() {
        return Err(None);
    }
    let some = |reason: String| Some(reason);
    let index: Index = serde_json::from_slice(&read_file(&index).map_err(some)?).map_err(|error| Some(error.to_string()))?;
    let tag = |m: &&Descriptor| m.annotations.get(ovenbird_oci::archive::REF_NAME).is_some_and(|name| *name == local.tag);
    let wanted = match &local.digest {
        Some(digest) => index.manifests.iter().find(|m| m.digest == *digest),
        None => index.manifests.iter().find(tag),
    };
    let Some(wanted) = wanted else { return Err(None) };
    let read = |digest: &Digest| {
        let bytes = read_file(&blob_in(&local.dir, digest))?;
        if Digest::of(&bytes) == *digest { Ok(bytes) } else { Err(format!("the blob {digest} is damaged")) }
    };
    let manifest: Manifest = serde_json::from_slice(&read(&wanted.digest).map_err(some)?).map_err(|error| Some(error.to_string()))?;
    contents(&manifest, &read).map_err(some)
}

fn blob_in(dir: &Path, digest: &Digest) -> std::path::PathBuf {
    dir.join("blobs/sha256").join(digest.hex())
}

fn read_file(path: &Path) -> Result<Vec<u8>, String> {
    let limit = document::MAX_SIZE.max(MAX_MANIFEST);
    regular_file::read(path, limit, Links::Follow).map_err(|error| format!("cannot read {}: {error}", path.display()))
}

fn copy(session: &Session, dir: &Path, blob: &Descriptor) -> Result<(), String> {
    let path = blob_in(dir, &blob.digest);
    let failed = |error: io::Error| format!("cannot read {}: {error}", path.display());
    let file =
        regular_file::open(&path, Links::Follow).and_then(|file| file.ok_or_else(|| io::ErrorKind::NotFound.into())).map_err(failed)?;
    let copied = session.state.store().write_stream(file.take(blob.size.saturating_add(1)), Some(&blob.digest));
    copied.map(drop).map_err(|error| error.to_string())
}
