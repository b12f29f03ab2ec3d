//! Reads an OCI archive and flattens its layers, on its own: no code of the engine, every digest checked.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::base::hex;
use crate::{AtPath, Error, Result};

/// One image of an archive.
#[derive(Debug, Clone)]
pub struct Image {
    /// Digest of the manifest, `sha256:…`.
    pub digest: String,
    /// Manifest.
    pub manifest: Value,
    /// Config.
    pub config: Value,
    /// Uncompressed layers, lowest first.
    pub layers: Vec<Vec<u8>>,
}

/// What a path is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// Regular file.
    File {
        /// The same number: hard links to one file.
        inode: usize,
        /// Bytes.
        content: Arc<[u8]>,
    },
    /// Folder.
    Dir,
    /// Symbolic link and its target.
    Link(String),
    /// Character or block device: `c` or `b`, major, minor.
    Device(char, u32, u32),
    /// Named pipe.
    Fifo,
}

/// One path of a flattened image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// What it is.
    pub kind: Kind,
    /// Permission bits, with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// Seconds since 1970.
    pub mtime: u64,
    /// Extended attributes.
    pub xattrs: BTreeMap<String, Vec<u8>>,
}

/// Absolute path → node; the root itself is not in it.
pub type Tree = BTreeMap<String, Node>;

fn malformed(place: impl Into<String>, reason: impl Into<String>) -> Error {
    Error::Malformed { place: place.into(), reason: reason.into() }
}

/// Every file of a tar archive, by name.
pub fn members(path: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut archive = tar::Archive::new(File::open(path).at("cannot read", path)?);
    let mut all = BTreeMap::new();
    for entry in archive.entries().at("cannot read", path)? {
        let mut entry = entry.at("cannot read", path)?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).trim_start_matches("./").to_owned();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).at("cannot read", path)?;
        all.insert(name, bytes);
    }
    Ok(all)
}

/// The bytes of a layer blob without its compression (gzip, zstd or none, by its first bytes).
pub fn decompress(blob: &[u8]) -> Result<Vec<u8>> {
    let mut plain = Vec::new();
    let read = match blob {
        [0x1f, 0x8b, ..] => flate2::read::MultiGzDecoder::new(blob).read_to_end(&mut plain),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => zstd::stream::read::Decoder::new(blob).and_then(|mut decoder| decoder.read_to_end(&mut plain)),
        _ => {
            plain = blob.to_vec();
            Ok(0)
        }
    };
    read.map_err(|error| malformed("layer", error.to_string()))?;
    Ok(plain)
}

/// Images of an OCI archive, in the order of the index (nested indexes are followed).
pub fn images(path: &Path) -> Result<Vec<Image>> {
    let members = members(path)?;
    let json = |name: &str| -> Result<Value> {
        let bytes = members.get(name).ok_or_else(|| malformed(name, "not in the archive"))?;
        serde_json::from_slice(bytes).map_err(|error| malformed(name, error.to_string()))
    };
    let blob = |digest: &str| -> Result<&Vec<u8>> {
        let name = format!("blobs/{}", digest.replace(':', "/"));
        let bytes = members.get(&name).ok_or_else(|| malformed(&name, "not in the archive"))?;
        let found = format!("sha256:{}", hex(Sha256::digest(bytes).as_slice()));
        if found == digest { Ok(bytes) } else { Err(malformed(name, format!("its digest is {found}"))) }
    };
    let parse =
        |digest: &str| -> Result<Value> { serde_json::from_slice(blob(digest)?).map_err(|error| malformed(digest, error.to_string())) };
    let layout = json("oci-layout")?;
    if layout["imageLayoutVersion"] != "1.0.0" {
        return Err(malformed("oci-layout", "imageLayoutVersion is not 1.0.0"));
    }
    let mut found = Vec::new();
    let mut queue: Vec<Value> = json("index.json")?["manifests"].as_array().cloned().unwrap_or_default();
    queue.reverse();
    while let Some(descriptor) = queue.pop() {
        let digest = text(&descriptor["digest"]).to_owned();
        let manifest = parse(&digest)?;
        if descriptor["size"].as_u64() != Some(blob(&digest)?.len() as u64) {
            return Err(malformed(digest, "the descriptor's size is wrong"));
        }
        if let Some(children) = manifest["manifests"].as_array() {
            queue.extend(children.iter().rev().cloned());
            continue;
        }
        let config = parse(text(&manifest["config"]["digest"]))?;
        let mut layers = Vec::new();
        let diff_ids = config["rootfs"]["diff_ids"].as_array().cloned().unwrap_or_default();
        let descriptors = manifest["layers"].as_array().cloned().unwrap_or_default();
        if diff_ids.len() != descriptors.len() {
            return Err(malformed(digest, format!("{} layers, but {} diff ids", descriptors.len(), diff_ids.len())));
        }
        let with_layer = config["history"].as_array().into_iter().flatten().filter(|line| line["empty_layer"] != true).count();
        if with_layer != descriptors.len() {
            return Err(malformed(digest, format!("{} layers, but {with_layer} lines of history with a layer", descriptors.len())));
        }
        for (descriptor, diff_id) in descriptors.iter().zip(&diff_ids) {
            let plain = decompress(blob(text(&descriptor["digest"]))?)?;
            let found = format!("sha256:{}", hex(Sha256::digest(&plain).as_slice()));
            if found != text(diff_id) {
                return Err(malformed(text(&descriptor["digest"]), format!("the diff id is {diff_id}, the layer's is {found}")));
            }
            layers.push(plain);
        }
        found.push(Image { digest, manifest, config, layers });
    }
    Ok(found)
}

/// Applies layers in order, with OCI whiteouts.
pub fn flatten<L: AsRef<[u8]>>(layers: &[L]) -> Result<Tree> {
    let mut tree = Tree::new();
    for step in steps(layers) {
        tree = step?;
    }
    Ok(tree)
}

/// The file system after each layer.
pub fn steps<L: AsRef<[u8]>>(layers: &[L]) -> impl Iterator<Item = Result<Tree>> {
    let (mut tree, mut inodes) = (Tree::new(), 0);
    layers.iter().map(move |layer| {
        apply(&mut tree, &mut inodes, layer.as_ref())?;
        Ok(tree.clone())
    })
}

fn apply(tree: &mut Tree, inodes: &mut usize, layer: &[u8]) -> Result<()> {
    let bad = |error: std::io::Error| malformed("layer", error.to_string());
    // Whiteouts hide what lower layers hold, never what this one adds.
    let mut added = Tree::new();
    let mut attributes = attributes(layer)?;
    let mut archive = tar::Archive::new(layer);
    for entry in archive.entries().map_err(bad)? {
        let mut entry = entry.map_err(bad)?;
        let raw = readable(&entry.path_bytes());
        let path = absolute(&raw);
        if path.split('/').any(|part| part == "..") {
            return Err(malformed(raw, "leaves the layer's root"));
        }
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", &path));
        if name == ".wh..wh..opq" {
            let inside = format!("{parent}/");
            tree.retain(|other, _| !other.starts_with(&inside));
            continue;
        }
        if let Some(hidden) = name.strip_prefix(".wh.") {
            remove(tree, &format!("{parent}/{hidden}"));
            continue;
        }
        if path == "/" {
            continue;
        }
        let xattrs = attributes.remove(&entry.raw_header_position()).unwrap_or_default();
        let link = entry.link_name_bytes().map(|bytes| readable(&bytes)).unwrap_or_default();
        let header = entry.header().clone();
        let kind = match header.entry_type() {
            tar::EntryType::Directory => Kind::Dir,
            tar::EntryType::Symlink => Kind::Link(link),
            tar::EntryType::Char => Kind::Device('c', number(header.device_major())?, number(header.device_minor())?),
            tar::EntryType::Block => Kind::Device('b', number(header.device_major())?, number(header.device_minor())?),
            tar::EntryType::Fifo => Kind::Fifo,
            tar::EntryType::Link => {
                let target = absolute(&link);
                let node = added.get(&target).or_else(|| tree.get(&target));
                let node = node.ok_or_else(|| malformed(&path, format!("hard link to {target}, which is not there")))?.clone();
                added.insert(path, node);
                continue;
            }
            tar::EntryType::Regular | tar::EntryType::Continuous | tar::EntryType::GNUSparse => {
                let mut content = Vec::new();
                entry.read_to_end(&mut content).map_err(bad)?;
                *inodes += 1;
                Kind::File { inode: *inodes, content: content.into() }
            }
            other => return Err(malformed(path, format!("unknown entry type {other:?}"))),
        };
        if added.contains_key(&path) && kind != Kind::Dir {
            return Err(malformed(path, "twice in one layer"));
        }
        let mode = header.mode().map_err(bad)? & 0o7777;
        let (uid, gid, mtime) = (header.uid().map_err(bad)?, header.gid().map_err(bad)?, header.mtime().map_err(bad)?);
        added.insert(path, Node { kind, mode, uid, gid, mtime, xattrs });
    }
    for (path, node) in added {
        if node.kind != Kind::Dir || tree.get(&path).is_some_and(|old| old.kind != Kind::Dir) {
            remove(tree, &path);
        }
        tree.insert(path, node);
    }
    Ok(())
}

/// Extended attributes by the place of an entry's header. The tar crate ends a value at its first newline, and values may be any bytes.
fn attributes(layer: &[u8]) -> Result<BTreeMap<u64, BTreeMap<String, Vec<u8>>>> {
    let bad = |error: std::io::Error| malformed("layer", error.to_string());
    let (mut all, mut next) = (BTreeMap::new(), BTreeMap::new());
    for entry in tar::Archive::new(layer).entries().map_err(bad)?.raw(true) {
        let mut entry = entry.map_err(bad)?;
        match entry.header().entry_type() {
            tar::EntryType::XHeader => {
                let mut records = Vec::new();
                entry.read_to_end(&mut records).map_err(bad)?;
                let mut rest = records.as_slice();
                while !rest.is_empty() {
                    let (key, value, left) =
                        record(rest).ok_or_else(|| malformed("layer", "a record of an extended header is malformed"))?;
                    if let Some(name) = key.strip_prefix("SCHILY.xattr.") {
                        next.insert(name.to_owned(), value.to_vec());
                    }
                    rest = left;
                }
            }
            tar::EntryType::GNULongName | tar::EntryType::GNULongLink | tar::EntryType::XGlobalHeader => {}
            _ => {
                all.insert(entry.raw_header_position(), std::mem::take(&mut next));
            }
        }
    }
    Ok(all)
}

/// Key and value of the first record `LENGTH KEY=VALUE\n`, and the records after it.
fn record(records: &[u8]) -> Option<(String, &[u8], &[u8])> {
    let blank = records.iter().position(|byte| *byte == b' ')?;
    let length: usize = std::str::from_utf8(&records[..blank]).ok()?.parse().ok()?;
    let text = records.get(blank + 1..length)?.strip_suffix(b"\n")?;
    let equals = text.iter().position(|byte| *byte == b'=')?;
    Some((readable(&text[..equals]), &text[equals + 1..], &records[length..]))
}

fn remove(tree: &mut Tree, path: &str) {
    let inside = format!("{path}/");
    tree.retain(|other, _| other != path && !other.starts_with(&inside));
}

fn number(field: std::io::Result<Option<u32>>) -> Result<u32> {
    field.map(Option::unwrap_or_default).map_err(|error| malformed("device", error.to_string()))
}

/// A name as text; what is not UTF-8 becomes `\xNN`, so that different names stay different.
fn readable(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.utf8_chunks() {
        text.push_str(chunk.valid());
        text.extend(chunk.invalid().iter().map(|byte| format!("\\x{byte:02x}")));
    }
    text
}

fn absolute(name: &str) -> String {
    let parts: Vec<&str> = name.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    format!("/{}", parts.join("/"))
}

pub(crate) fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
