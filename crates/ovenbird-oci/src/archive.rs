//! OCI image layouts and docker archives, to and from the store.
//!
//! ```text
//! blobs/sha256/HEX     every blob of the image, once
//! index.json           the images, with their names as annotations
//! manifest.json        docker archives only: config, layers and tags, by path
//! oci-layout           {"imageLayoutVersion":"1.0.0"}
//! ```
//!
//! Sources: OCI image-spec 1.1, image-layout.md; Docker image spec 1.2, "Combined Image JSON + Filesystem Changeset Format".
//! Everything streams: blobs go from tar to store and back without being held in memory, and no input is ever read twice or sought in.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::digest::Hasher;
use crate::image::media;
use crate::layer::tar::{BLOCK, Header, Kind, Reader, encode, padding};
use crate::layer::{decompress, root_parts};
use crate::store::{MAX_DOCUMENT, Store, StoreError};
use crate::{Descriptor, Digest, ImageConfig, Index, Manifest, Reference, beside};

/// Annotation with the tag, for tools that choose by it.
pub const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Annotation with the full name, as containerd and Docker read it.
const IMAGE_NAME: &str = "io.containerd.image.name";
/// Blobs up to this size that are in the store already are read to see whether they are whole: it takes no time.
const QUICK: u64 = 1 << 20;
/// Most files in an archive.
const MAX_FILES: usize = 100_000;

/// What can go wrong with an archive.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// Reading or writing failed.
    #[error("the archive cannot be {action}: {source}{}", crate::store::remedy(source))]
    Io {
        /// `read` or `written`.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Not what it should be.
    #[error("the archive is malformed: {reason}; make it again")]
    Malformed {
        /// Why.
        reason: String,
    },
    /// A docker archive holds one platform.
    #[error("the image has {count} platforms and a docker archive holds one: choose one with --platform, or write type=oci")]
    Platforms {
        /// How many are in the store.
        count: usize,
    },
    /// Nothing has this name.
    #[error("it has no image {wanted:?}; it has {}", if names.is_empty() { "none with a name" } else { names })]
    NoImage {
        /// What was asked for.
        wanted: String,
        /// What there is.
        names: String,
    },
    /// Nothing says which one.
    #[error("it has {count} images; name one of them as it is there ({names})")]
    SeveralImages {
        /// How many.
        count: usize,
        /// What there is.
        names: String,
    },
    /// The store refused.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Images that were read, each with its names.
pub type Images = Vec<(Descriptor, Vec<Reference>)>;

/// An image of an `index.json`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    target: Descriptor,
    names: Vec<Reference>,
    /// What stands as its name, whether it is a whole one or only a tag.
    tags: Vec<String>,
}

fn images(entries: Vec<Entry>) -> Images {
    entries.into_iter().map(|entry| (entry.target, entry.names)).collect()
}

/// The one that is meant: that with this tag or name, or the only one.
fn chosen(entries: Vec<Entry>, wanted: Option<&str>) -> Result<Entry, ArchiveError> {
    let is = |entry: &Entry, wanted: &str| {
        entry.tags.iter().any(|tag| tag == wanted) || entry.names.iter().any(|n| n.to_string() == wanted || n.familiar() == wanted)
    };
    let said: Vec<String> = entries.iter().flat_map(|entry| entry.tags.clone()).take(20).collect();
    let mut found: Vec<Entry> = entries.into_iter().filter(|entry| wanted.is_none_or(|wanted| is(entry, wanted))).collect();
    match (found.len(), found.pop(), wanted) {
        (1, Some(only), _) => Ok(only),
        (0, _, Some(wanted)) => Err(ArchiveError::NoImage { wanted: wanted.into(), names: said.join(", ") }),
        (count, ..) => Err(ArchiveError::SeveralImages { count, names: said.join(", ") }),
    }
}

fn malformed(reason: impl Into<String>) -> ArchiveError {
    ArchiveError::Malformed { reason: reason.into() }
}

/// A broken blob is the store's fault, not that of the place that is written to.
fn written(source: io::Error) -> ArchiveError {
    match source.downcast::<StoreError>() {
        Ok(broken) => broken.into(),
        Err(source) => ArchiveError::Io { action: "written", source },
    }
}

/// What the store says of a blob that an archive brings: then it is the archive that is wrong.
fn brought(error: StoreError) -> ArchiveError {
    match error {
        StoreError::Io { action: "receive", source, .. } => unread(source),
        StoreError::Corrupt { expected, actual } => malformed(format!("its blob {expected} hashes to {actual}")),
        StoreError::Damaged { digest, expected, actual, .. } => malformed(format!("its blob {digest} has {actual} bytes, not {expected}")),
        StoreError::Missing { digest } => malformed(format!("its blob {digest} is missing")),
        other => other.into(),
    }
}

fn unread(source: io::Error) -> ArchiveError {
    match source.kind() {
        io::ErrorKind::InvalidData => malformed(source.to_string()),
        io::ErrorKind::UnexpectedEof => malformed("it is cut short"),
        _ => ArchiveError::Io { action: "read", source },
    }
}

/// One image in docker's `manifest.json`.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// Writes an OCI layout as a tar (`index.json`, `oci-layout`, `blobs/`), with `names` as annotations
/// (`org.opencontainers.image.ref.name`, `io.containerd.image.name`). Deterministic.
/// Platforms of an index that are not in the store are left out, as `docker save` does.
pub fn write_oci(store: &Store, target: &Descriptor, names: &[Reference], out: &mut dyn Write) -> Result<(), ArchiveError> {
    let blobs = closure(store, target)?;
    write_tar(store, &blobs, &entries(target, names), None, out)
}

/// As [`write_oci`], with a tag instead of names, or with nothing.
pub fn write_oci_tagged(store: &Store, target: &Descriptor, tag: Option<&str>, out: &mut dyn Write) -> Result<(), ArchiveError> {
    write_tar(store, &closure(store, target)?, &[tagged(target, tag)], None, out)
}

/// As [`write_oci_dir`], with a tag instead of names, or with nothing.
pub fn write_oci_dir_tagged(store: &Store, target: &Descriptor, tag: Option<&str>, dir: &Path) -> Result<(), ArchiveError> {
    write_dir(store, target, &[tagged(target, tag)], dir)
}

/// A line of `index.json` with a tag.
fn tagged(target: &Descriptor, tag: Option<&str>) -> Value {
    let mut entry = target.clone();
    entry.annotations.remove(IMAGE_NAME);
    entry.annotations.remove(REF_NAME);
    entry.annotations.extend(tag.map(|tag| (REF_NAME.to_owned(), tag.to_owned())));
    json!(entry)
}

/// Writes a docker archive that is also an OCI layout (`manifest.json` beside `index.json`), as `docker save` 25+ does. One platform only.
pub fn write_docker(store: &Store, target: &Descriptor, names: &[Reference], out: &mut dyn Write) -> Result<(), ArchiveError> {
    let target = one_platform(store, target)?;
    let manifest: Manifest = parse(&store.read(&target.digest)?, "a manifest")?;
    let path = |blob: &Descriptor| format!("blobs/sha256/{}", blob.digest.hex());
    let images = vec![DockerImage {
        config: path(&manifest.config),
        repo_tags: Some(names.iter().filter_map(|n| Some(n.with_tag(n.tag()?).familiar())).collect()),
        layers: manifest.layers.iter().map(path).collect(),
    }];
    let docker = serde_json::to_vec(&images).map_err(|e| written(e.into()))?;
    let blobs = closure(store, &target)?;
    write_tar(store, &blobs, &entries(&target, names), Some(&docker), out)
}

/// Writes an OCI layout into a folder (made when missing, other images in its `index.json` are kept; one of the same name is replaced).
pub fn write_oci_dir(store: &Store, target: &Descriptor, names: &[Reference], dir: &Path) -> Result<(), ArchiveError> {
    write_dir(store, target, &entries(target, names), dir)
}

fn write_dir(store: &Store, target: &Descriptor, new: &[Value], dir: &Path) -> Result<(), ArchiveError> {
    let folder = dir.join("blobs/sha256");
    fs::create_dir_all(&folder).map_err(written)?;
    for folder in [dir, &folder] {
        beside::clear(folder);
    }
    let layout = dir.join("oci-layout");
    if layout.exists() {
        check_layout(&read_file(&layout)?)?;
    } else {
        put_file(&layout, &mut io::Cursor::new(layout_json()))?;
    }
    let index = dir.join("index.json");
    // Two that add to one index must not take turns.
    let lock = File::open(dir).map_err(written)?;
    rustix::fs::flock(&lock, FlockOperation::LockExclusive).map_err(|error| written(error.into()))?;
    let mut all: Value = if index.exists() { parse(&read_file(&index)?, "index.json")? } else { empty_index() };
    for blob in closure(store, target)? {
        let path = folder.join(blob.digest.hex());
        if !fs::metadata(&path).is_ok_and(|m| m.is_file() && m.len() == blob.size) {
            put_file(&path, &mut Verified::new(store, &blob)?)?;
        }
    }
    let kept = all.get("manifests").and_then(Value::as_array).cloned().unwrap_or_default();
    let name = |e: &Value| e.get("annotations").map(|a| (a.get(IMAGE_NAME).cloned(), a.get(REF_NAME).cloned()));
    let replaced = |old: &Value| new.iter().any(|e| name(e) == name(old) && (name(e).is_some() || e.get("digest") == old.get("digest")));
    let list: Vec<Value> = kept.into_iter().filter(|old| !replaced(old)).chain(new.iter().cloned()).collect();
    let Some(object) = all.as_object_mut() else { return Err(malformed("index.json is not an object")) };
    object.insert("manifests".into(), Value::Array(list));
    put_file(&index, &mut io::Cursor::new(all.to_string()))
}

/// Reads an OCI layout tar or a docker archive (found by content; gzip and zstd allowed) into the store; every blob is verified.
/// Returns each image with its names. On an error, blobs that came before it may stay in the store.
pub fn read(store: &Store, archive: &mut dyn Read) -> Result<Images, ArchiveError> {
    read_entries(store, archive).map(images)
}

/// As [`read`], and gives the one image that has this tag or name, or the only one.
pub fn read_one(store: &Store, archive: &mut dyn Read, wanted: Option<&str>) -> Result<Descriptor, ArchiveError> {
    Ok(chosen(read_entries(store, archive)?, wanted)?.target)
}

fn read_entries(store: &Store, archive: &mut dyn Read) -> Result<Vec<Entry>, ArchiveError> {
    let mut reader = Reader::new(decompress(archive).map_err(unread)?);
    // Documents of the layout, files by path, links by path.
    let mut documents: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut files: HashMap<String, (Digest, u64)> = HashMap::new();
    let mut links: HashMap<String, String> = HashMap::new();
    while let Some(header) = reader.next().map_err(unread)? {
        let path = place(&header.path)?;
        if files.len() + links.len() > MAX_FILES {
            return Err(malformed("it holds more than 100,000 files"));
        }
        let base = path.rsplit('/').next().unwrap_or_default();
        match header.kind {
            Kind::File if matches!(path.as_str(), "index.json" | "manifest.json" | "oci-layout") => {
                let mut bytes = Vec::new();
                (&mut reader).take(MAX_DOCUMENT + 1).read_to_end(&mut bytes).map_err(unread)?;
                if bytes.len() as u64 > MAX_DOCUMENT {
                    return Err(malformed(format!("{path} is larger than 16 MiB")));
                }
                documents.insert(path, bytes);
            }
            // What Docker wrote for versions before 1.10.
            Kind::File if matches!(base, "VERSION" | "json" | "repositories") => {}
            Kind::File => {
                let expected: Option<Digest> = path.strip_prefix("blobs/sha256/").and_then(|hex| format!("sha256:{hex}").parse().ok());
                let stored = store.write_stream(&mut reader, expected.as_ref()).map_err(brought)?;
                files.insert(path, stored);
            }
            // Docker linked equal layers together.
            Kind::Symlink if !header.link.starts_with(b"/") => {
                let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
                let target = place(&[folder.as_bytes(), b"/", &header.link].concat())?;
                links.insert(path, target);
            }
            Kind::Link => {
                links.insert(path, place(&header.link)?);
            }
            _ => {}
        }
    }
    if let Some(index) = documents.get("index.json") {
        if let Some(layout) = documents.get("oci-layout") {
            check_layout(layout)?;
        }
        let entries = images_of(index)?;
        for entry in &entries {
            closure(store, &entry.target).map_err(of_archive)?;
        }
        return Ok(entries);
    }
    let Some(manifest) = documents.get("manifest.json") else {
        return Err(malformed("it has neither index.json (OCI layout) nor manifest.json (docker archive)"));
    };
    let list: Vec<DockerImage> = parse(manifest, "manifest.json")?;
    let find = |path: &str| {
        let mut path = place(path.as_bytes())?;
        for _ in 0..8 {
            match (files.get(&path), links.get(&path)) {
                (Some(&found), _) => return Ok(found),
                (None, Some(target)) => path.clone_from(target),
                (None, None) => break,
            }
        }
        Err(malformed(format!("manifest.json names {path:?}, which is not there")))
    };
    let read = |image| {
        let (target, names) = docker_image(store, image, &find)?;
        let tags = names.iter().map(|name: &Reference| name.familiar()).collect();
        Ok(Entry { target, names, tags })
    };
    list.iter().map(read).collect()
}

/// Reads an OCI layout folder.
pub fn read_dir(store: &Store, dir: &Path) -> Result<Images, ArchiveError> {
    let entries = entries_of_dir(dir)?;
    entries.iter().try_for_each(|entry| read_image_of_dir(store, dir, &entry.target))?;
    Ok(images(entries))
}

/// Reads the one image of an OCI layout folder that has this tag or name, or the only one.
pub fn read_dir_one(store: &Store, dir: &Path, wanted: Option<&str>) -> Result<Descriptor, ArchiveError> {
    let entry = chosen(entries_of_dir(dir)?, wanted)?;
    read_image_of_dir(store, dir, &entry.target)?;
    Ok(entry.target)
}

fn entries_of_dir(dir: &Path) -> Result<Vec<Entry>, ArchiveError> {
    let index = dir.join("index.json");
    if !index.exists() {
        return Err(malformed(format!("{} has no index.json, so it is no OCI layout", dir.display())));
    }
    check_layout(&read_file(&dir.join("oci-layout"))?)?;
    images_of(&read_file(&index)?)
}

fn read_image_of_dir(store: &Store, dir: &Path, target: &Descriptor) -> Result<(), ArchiveError> {
    let read = walk(target, |blob, optional| {
        if !(store.holds(blob) && (blob.size > QUICK || store.verify(&blob.digest).is_ok())) {
            let file = match File::open(dir.join("blobs/sha256").join(blob.digest.hex())) {
                Err(e) if e.kind() == io::ErrorKind::NotFound && optional => return Ok(None),
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(malformed(format!("the blob {} is missing", blob.digest))),
                other => other.map_err(unread)?,
            };
            // Never more than the descriptor says, whatever the file is.
            store.write_stream(file.take(blob.size.saturating_add(1)), Some(&blob.digest)).map_err(brought)?;
        }
        document(store, blob)
    });
    read.map(drop).map_err(of_archive)
}

/// A manifest for an image of a docker archive, whose layers have none.
fn docker_image(
    store: &Store,
    image: &DockerImage,
    find: &impl Fn(&str) -> Result<(Digest, u64), ArchiveError>,
) -> Result<(Descriptor, Vec<Reference>), ArchiveError> {
    let (digest, size) = find(&image.config)?;
    let config: ImageConfig = parse(&store.read(&digest)?, "a config")?;
    if config.rootfs.diff_ids.len() != image.layers.len() {
        return Err(malformed(format!("an image has {} layers and {} diff ids", image.layers.len(), config.rootfs.diff_ids.len())));
    }
    let (mut layers, mut oci) = (Vec::new(), false);
    for (path, diff_id) in image.layers.iter().zip(&config.rootfs.diff_ids) {
        let (digest, size) = find(path)?;
        let mut magic = Vec::new();
        store.open_blob(&digest)?.take(4).read_to_end(&mut magic).map_err(unread)?;
        let media_type = match magic.as_slice() {
            [0x1f, 0x8b, ..] => media::DOCKER_LAYER_GZIP,
            [0x28, 0xb5, 0x2f, 0xfd] => media::OCI_LAYER_ZSTD,
            _ => media::DOCKER_LAYER,
        };
        oci |= media_type == media::OCI_LAYER_ZSTD;
        let actual = match media_type {
            media::DOCKER_LAYER => digest,
            _ => Digest::of_reader(decompress(store.open_blob(&digest)?).map_err(unread)?).map_err(unread)?.0,
        };
        if actual != *diff_id {
            return Err(malformed(format!("the layer {path:?} hashes to {actual}, not to {diff_id}")));
        }
        layers.push(Descriptor::new(media_type, digest, size));
    }
    if oci {
        // Docker's manifest has no type for zstd.
        for layer in &mut layers {
            layer.media_type = match layer.media_type.as_str() {
                media::DOCKER_LAYER_GZIP => media::OCI_LAYER_GZIP.into(),
                media::DOCKER_LAYER => media::OCI_LAYER.into(),
                other => other.into(),
            };
        }
    }
    let (media_type, config_type) =
        if oci { (media::OCI_MANIFEST, media::OCI_CONFIG) } else { (media::DOCKER_MANIFEST, media::DOCKER_CONFIG) };
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(media_type.into()),
        config: Descriptor::new(config_type, digest, size),
        layers,
        annotations: BTreeMap::new(),
    };
    let bytes = serde_json::to_vec(&manifest).map_err(|e| written(e.into()))?;
    let digest = store.write(&bytes)?;
    let tags = image.repo_tags.iter().flatten();
    let names =
        tags.map(|t| t.parse()).collect::<Result<_, _>>().map_err(|e: crate::reference::ParseReferenceError| malformed(e.to_string()))?;
    Ok((Descriptor::new(media_type, digest, bytes.len() as u64), names))
}

/// The same for what was found when the blobs were read back.
fn of_archive(error: ArchiveError) -> ArchiveError {
    match error {
        ArchiveError::Store(error) => brought(error),
        other => other,
    }
}

fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8], what: &str) -> Result<T, ArchiveError> {
    serde_json::from_slice(bytes).map_err(|e| malformed(format!("{what} cannot be understood: {e}")))
}

/// A path inside the archive, without `.` and `..`.
fn place(path: &[u8]) -> Result<String, ArchiveError> {
    let parts = root_parts(path).ok_or_else(|| malformed(format!("the path {:?} leads out of it", String::from_utf8_lossy(path))))?;
    Ok(parts.iter().map(|p| String::from_utf8_lossy(p)).collect::<Vec<_>>().join("/"))
}

fn layout_json() -> Vec<u8> {
    br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()
}

fn empty_index() -> Value {
    json!({"schemaVersion": 2, "mediaType": media::OCI_INDEX, "manifests": []})
}

fn check_layout(bytes: &[u8]) -> Result<(), ArchiveError> {
    let layout: Value = parse(bytes, "oci-layout")?;
    match layout.get("imageLayoutVersion").and_then(Value::as_str) {
        Some(version) if version.starts_with("1.") => Ok(()),
        other => Err(malformed(format!("its layout version is {other:?}, and 1.0.0 is known"))),
    }
}

/// Lines of `index.json`: the image once for each name.
fn entries(target: &Descriptor, names: &[Reference]) -> Vec<Value> {
    let one = |name: Option<&Reference>| {
        let mut entry = target.clone();
        entry.annotations.remove(IMAGE_NAME);
        entry.annotations.remove(REF_NAME);
        if let Some(name) = name {
            entry.annotations.insert(IMAGE_NAME.into(), name.to_string());
            entry.annotations.extend(name.tag().map(|tag| (REF_NAME.into(), tag.to_owned())));
        }
        json!(entry)
    };
    if names.is_empty() { vec![one(None)] } else { names.iter().map(|n| one(Some(n))).collect() }
}

/// The images of an `index.json`, those of equal digest together.
fn images_of(index: &[u8]) -> Result<Vec<Entry>, ArchiveError> {
    let index: Index = parse(index, "index.json")?;
    let mut images: Vec<Entry> = Vec::new();
    for mut target in index.manifests {
        let full = target.annotations.remove(IMAGE_NAME);
        // Some tools put the whole name where others put the tag.
        let tag = target.annotations.remove(REF_NAME);
        let short = tag.clone().filter(|n| n.contains(['/', ':']));
        let name: Option<Reference> = full.or(short).and_then(|n| n.parse().ok());
        match images.iter_mut().find(|entry| entry.target.digest == target.digest) {
            Some(entry) => {
                entry.names.extend(name);
                entry.tags.extend(tag);
            }
            None => images.push(Entry { target, names: name.into_iter().collect(), tags: tag.into_iter().collect() }),
        }
    }
    if images.is_empty() { Err(malformed("index.json names no image")) } else { Ok(images) }
}

/// What a manifest or index points at; `None` for anything else. In an index, a platform may be missing.
fn children(media_type: &str, bytes: &[u8]) -> Result<Option<(Vec<Descriptor>, bool)>, ArchiveError> {
    match media_type {
        media::OCI_INDEX | media::DOCKER_LIST => Ok(Some((parse::<Index>(bytes, "an index")?.manifests, true))),
        media::OCI_MANIFEST | media::DOCKER_MANIFEST => {
            let manifest: Manifest = parse(bytes, "a manifest")?;
            Ok(Some((std::iter::once(manifest.config).chain(manifest.layers).collect(), false)))
        }
        _ => Ok(None),
    }
}

fn is_document(media_type: &str) -> bool {
    matches!(media_type, media::OCI_INDEX | media::DOCKER_LIST | media::OCI_MANIFEST | media::DOCKER_MANIFEST)
}

/// The bytes of a manifest or index in the store (of nothing for other blobs); checks the size.
fn document(store: &Store, blob: &Descriptor) -> Result<Option<Vec<u8>>, ArchiveError> {
    store.check(blob)?;
    if is_document(&blob.media_type) { Ok(Some(store.read(&blob.digest)?)) } else { Ok(Some(vec![])) }
}

/// Visits a descriptor and all below it, each once. `visit` gives the bytes of manifests and indexes, or `None` to leave
/// out a blob that may be missing (its second argument). At least one platform of an index must be there.
fn walk(
    target: &Descriptor,
    mut visit: impl FnMut(&Descriptor, bool) -> Result<Option<Vec<u8>>, ArchiveError>,
) -> Result<Vec<Descriptor>, ArchiveError> {
    let (mut seen, mut found) = (BTreeSet::new(), Vec::new());
    let mut pending = vec![(target.clone(), false)];
    while let Some((blob, optional)) = pending.pop() {
        if !seen.insert(blob.digest) {
            continue;
        }
        let Some(bytes) = visit(&blob, optional)? else { continue };
        if is_document(&blob.media_type)
            && let Some((below, optional)) = children(&blob.media_type, &bytes)?
        {
            pending.extend(below.into_iter().rev().map(|b| (b, optional)));
        }
        found.push(blob);
    }
    if found.iter().all(|b| matches!(b.media_type.as_str(), media::OCI_INDEX | media::DOCKER_LIST)) {
        return Err(StoreError::Missing { digest: target.digest }.into());
    }
    Ok(found)
}

/// Everything in the store that belongs to an image, parents first.
fn closure(store: &Store, target: &Descriptor) -> Result<Vec<Descriptor>, ArchiveError> {
    walk(target, |blob, optional| if optional && !store.has(&blob.digest) { Ok(None) } else { document(store, blob) })
}

/// The only image of a target, when it is an index.
fn one_platform(store: &Store, target: &Descriptor) -> Result<Descriptor, ArchiveError> {
    let (mut target, mut depth) = (target.clone(), 0);
    while matches!(target.media_type.as_str(), media::OCI_INDEX | media::DOCKER_LIST) {
        let index: Index = parse(&store.read(&target.digest)?, "an index")?;
        let attests = |d: &Descriptor| d.platform.as_ref().is_some_and(|p| p.os == "unknown");
        let mut here: Vec<_> = index.manifests.into_iter().filter(|d| !attests(d) && store.has(&d.digest)).collect();
        depth += 1;
        match (here.len(), here.pop()) {
            (1, Some(only)) if depth < 8 => target = only,
            (0, _) => return Err(StoreError::Missing { digest: target.digest }.into()),
            (count, _) => return Err(ArchiveError::Platforms { count }),
        }
    }
    target.platform = None;
    Ok(target)
}

/// A blob of the store that becomes an error at its end when its bytes are not what its name says.
struct Verified {
    file: File,
    expected: Digest,
    hasher: Hasher,
}

impl Verified {
    fn new(store: &Store, blob: &Descriptor) -> Result<Self, ArchiveError> {
        Ok(Self { file: store.open_blob(&blob.digest)?, expected: blob.digest, hasher: Hasher::default() })
    }
}

impl Read for Verified {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read(buffer)?;
        self.hasher.update(&buffer[..n]);
        if n == 0 && !buffer.is_empty() {
            let (actual, _) = self.hasher.clone().finish();
            if actual != self.expected {
                return Err(io::Error::other(StoreError::Corrupt { expected: self.expected, actual }));
            }
        }
        Ok(n)
    }
}

fn write_tar(
    store: &Store,
    blobs: &[Descriptor],
    entries: &[Value],
    docker: Option<&[u8]>,
    out: &mut dyn Write,
) -> Result<(), ArchiveError> {
    let head = |path: &str, kind: Kind, size: u64| {
        let mut header = Header::new(path, kind);
        (header.mode, header.size) = (if kind == Kind::Directory { 0o755 } else { 0o644 }, size);
        let mut bytes = Vec::with_capacity(BLOCK);
        encode(&header, &mut bytes);
        bytes
    };
    let mut buffer = vec![0; 256 * 1024];
    let mut put = |path: &str, size: u64, content: &mut dyn Read| -> io::Result<()> {
        out.write_all(&head(path, if path.ends_with('/') { Kind::Directory } else { Kind::File }, size))?;
        let mut total = 0;
        loop {
            match content.read(&mut buffer)? {
                0 => break,
                n => {
                    total += n as u64;
                    out.write_all(&buffer[..n])?;
                }
            }
        }
        if total != size {
            return Err(io::Error::other(format!("{path} changed its size while it was written")));
        }
        out.write_all(&[0; BLOCK][..padding(size)])
    };
    put("blobs/", 0, &mut io::empty()).map_err(written)?;
    put("blobs/sha256/", 0, &mut io::empty()).map_err(written)?;
    let mut sorted: Vec<_> = blobs.iter().collect();
    sorted.sort_by_key(|b| b.digest);
    for blob in sorted {
        put(&format!("blobs/sha256/{}", blob.digest.hex()), blob.size, &mut Verified::new(store, blob)?).map_err(written)?;
    }
    let mut index = empty_index();
    index["manifests"] = Value::Array(entries.to_vec());
    let index = index.to_string();
    put("index.json", index.len() as u64, &mut index.as_bytes()).map_err(written)?;
    if let Some(docker) = docker {
        put("manifest.json", docker.len() as u64, &mut &docker[..]).map_err(written)?;
    }
    let layout = layout_json();
    put("oci-layout", layout.len() as u64, &mut &layout[..]).map_err(written)?;
    out.write_all(&[0; 2 * BLOCK]).and_then(|()| out.flush()).map_err(written)
}

fn read_file(path: &Path) -> Result<Vec<u8>, ArchiveError> {
    let mut bytes = Vec::new();
    File::open(path).and_then(|f| f.take(MAX_DOCUMENT + 1).read_to_end(&mut bytes)).map_err(unread)?;
    if bytes.len() as u64 > MAX_DOCUMENT { Err(malformed(format!("{} is larger than 16 MiB", path.display()))) } else { Ok(bytes) }
}

/// Whole or not at all.
fn put_file(path: &Path, content: &mut dyn Read) -> Result<(), ArchiveError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut file = beside::file_in(folder, 0o666).map_err(written)?;
    io::copy(content, &mut file).map_err(written)?;
    file.persist(path).map(drop).map_err(|error| written(error.error))
}
