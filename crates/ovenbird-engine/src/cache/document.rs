//! The cache in the form in which machines exchange it.
//!
//! It travels as an image manifest: its layers are the layers of the steps, its config (or, `inline`, an annotation of an ordinary
//! image) is a [`Document`] that says which keys lead to which of them. Nothing in it names a machine, a path or a registry.
//! A base image is known by its manifest alone: where it can be had the reader knows better.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use ovenbird_oci::image::media;
use ovenbird_oci::{Descriptor, Digest};
use serde::{Deserialize, Serialize};

use super::{CacheKey, SharedLayer};

/// Media type of the config of a cache manifest.
pub const MEDIA_TYPE: &str = "application/vnd.ovenbird.cache.v1+json";
/// Annotation of an image manifest that carries its own cache.
pub const ANNOTATION: &str = "dev.ovenbird.cache.v1";
/// Largest document, in bytes.
pub const MAX_SIZE: u64 = 64 << 20;

const VERSION: u32 = 1;
/// Longest chain: no image has so many layers, and each is a folder that is looked into.
const MOST_LAYERS: usize = 4096;
/// Most parts of all chains together.
const MOST_PARTS: usize = 4_000_000;

/// A part of a chain.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// All layers of a base image, by its manifest.
    Base(Digest),
    /// What one step changed.
    Layer(Arc<SharedLayer>),
}

/// A result under its two keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Definition key.
    pub definition: CacheKey,
    /// Content key.
    pub content: CacheKey,
    /// Lowest first.
    pub chain: Vec<Part>,
}

/// The folder of a `RUN --mount=type=cache`, as a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountLayer {
    /// Name of the folder.
    pub name: Digest,
    /// The blob.
    pub blob: Descriptor,
    /// Digest of the tar in it.
    pub diff_id: Digest,
}

/// What a cache holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    /// Results of steps.
    pub entries: Vec<Entry>,
    /// Folders of cache mounts.
    pub mounts: Vec<MountLayer>,
}

/// Why a document cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DocumentError {
    /// No JSON, or of another shape.
    #[error("it is malformed ({reason})")]
    Malformed {
        /// Where and what.
        reason: String,
    },
    /// From a later program.
    #[error("it is of format {found}, and this program reads {VERSION}")]
    Version {
        /// What it says.
        found: u32,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    version: u32,
    layers: Vec<Layer>,
    /// Each chain once: a record is the chain of another (by place, which is lower) with one more part.
    chains: Vec<Chain>,
    records: Vec<Record>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    mounts: Vec<Mount>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Layer {
    /// Place in the layers of the manifest.
    at: usize,
    diff_id: Digest,
    created: i64,
    compression: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    epoch: Option<i64>,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    searched: BTreeSet<String>,
}

#[derive(Serialize, Deserialize, PartialEq, Eq, Hash, Clone, Copy)]
#[serde(rename_all = "camelCase")]
struct Chain {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    below: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    base: Option<Digest>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    layer: Option<usize>,
}

#[derive(Serialize, Deserialize)]
struct Record {
    definition: CacheKey,
    content: CacheKey,
    /// Place in the chains; `None`: nothing at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    chain: Option<usize>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Mount {
    name: Digest,
    /// Place in the layers of the manifest.
    at: usize,
    diff_id: Digest,
}

/// Writes a cache, for a manifest with these layers. What needs others is left out.
pub fn write(contents: &Contents, layers: &[Descriptor]) -> Vec<u8> {
    let places: HashMap<Digest, usize> = layers.iter().enumerate().map(|(at, layer)| (layer.digest, at)).collect();
    let mut document = Document { version: VERSION, layers: vec![], chains: vec![], records: vec![], mounts: vec![] };
    let mut known_layers: HashMap<&SharedLayer, usize> = HashMap::new();
    let mut known_chains: HashMap<Chain, usize> = HashMap::new();
    'entries: for entry in &contents.entries {
        let mut below = None;
        for part in &entry.chain {
            let (base, layer) = match part {
                Part::Base(manifest) => (Some(*manifest), None),
                Part::Layer(layer) => {
                    let Some(at) = places.get(&layer.digest) else { continue 'entries };
                    let place = *known_layers.entry(layer).or_insert_with(|| {
                        document.layers.push(Layer {
                            at: *at,
                            diff_id: layer.diff_id,
                            created: layer.created,
                            compression: layer.compression.clone(),
                            epoch: layer.epoch,
                            searched: layer.searched.clone(),
                        });
                        document.layers.len() - 1
                    });
                    (None, Some(place))
                }
            };
            let chain = Chain { below, base, layer };
            below = Some(*known_chains.entry(chain).or_insert_with(|| {
                document.chains.push(chain);
                document.chains.len() - 1
            }));
        }
        document.records.push(Record { definition: entry.definition, content: entry.content, chain: below });
    }
    let mounts = contents.mounts.iter().filter_map(|m| Some(Mount { name: m.name, at: *places.get(&m.blob.digest)?, diff_id: m.diff_id }));
    document.mounts = mounts.collect();
    serde_json::to_vec(&document).unwrap_or_default()
}

/// Is this media type the one of layers that are compressed so? It becomes that of the image's layer.
fn fits(media_type: &str, compression: &str) -> bool {
    let known = match compression.trim_end_matches(|c: char| c.is_ascii_digit()) {
        "tar" => [media::OCI_LAYER, media::DOCKER_LAYER],
        "gzip" => [media::OCI_LAYER_GZIP, media::DOCKER_LAYER_GZIP],
        "zstd" => [media::OCI_LAYER_ZSTD, media::DOCKER_LAYER_ZSTD],
        _ => return false,
    };
    known.contains(&media_type)
}

/// Reads what [`write`] wrote beside a manifest with these layers. Every number in it is somebody else's.
pub fn read(bytes: &[u8], layers: &[Descriptor]) -> Result<Contents, DocumentError> {
    #[derive(Deserialize)]
    struct Head {
        version: u32,
    }
    let malformed = |error: serde_json::Error| DocumentError::Malformed { reason: error.to_string() };
    let wrong = |what: &str, at: usize| DocumentError::Malformed { reason: format!("it names {what} {at}, which it does not have") };
    let head: Head = serde_json::from_slice(bytes).map_err(malformed)?;
    if head.version != VERSION {
        return Err(DocumentError::Version { found: head.version });
    }
    let document: Document = serde_json::from_slice(bytes).map_err(malformed)?;
    let mut shared = vec![];
    for layer in document.layers {
        let blob = layers.get(layer.at).ok_or_else(|| wrong("the layer", layer.at))?;
        if !fits(&blob.media_type, &layer.compression) {
            let reason = format!("the layer {} is {:.80?} and {:.20?} at once", blob.digest, blob.media_type, layer.compression);
            return Err(DocumentError::Malformed { reason });
        }
        shared.push(Arc::new(SharedLayer {
            digest: blob.digest,
            size: blob.size,
            media_type: blob.media_type.clone(),
            diff_id: layer.diff_id,
            created: layer.created,
            compression: layer.compression,
            epoch: layer.epoch,
            searched: layer.searched,
        }));
    }
    let mut lengths: Vec<usize> = vec![];
    for (at, chain) in document.chains.iter().enumerate() {
        let below = match chain.below {
            Some(below) => *lengths.get(below).ok_or_else(|| wrong("the chain", below))?,
            None => 0,
        };
        if chain.base.is_some() == chain.layer.is_some() {
            return Err(DocumentError::Malformed { reason: format!("part {at} of its chains is neither an image nor a layer") });
        }
        if let Some(layer) = chain.layer.filter(|layer| *layer >= shared.len()) {
            return Err(wrong("the layer", layer));
        }
        if below >= MOST_LAYERS {
            return Err(DocumentError::Malformed { reason: format!("it has a chain of more than {MOST_LAYERS} parts") });
        }
        lengths.push(below + 1);
    }
    let mut parts = 0;
    let mut mounts = vec![];
    for mount in document.mounts {
        let blob = layers.get(mount.at).ok_or_else(|| wrong("the layer", mount.at))?.clone();
        mounts.push(MountLayer { name: mount.name, blob, diff_id: mount.diff_id });
    }
    let mut entries = vec![];
    for record in document.records {
        let mut chain = vec![];
        let mut next = record.chain;
        if let Some(first) = next {
            parts += lengths.get(first).ok_or_else(|| wrong("the chain", first))?;
        }
        if parts > MOST_PARTS {
            return Err(DocumentError::Malformed { reason: format!("its chains have more than {MOST_PARTS} parts") });
        }
        while let Some(at) = next {
            let link = document.chains[at];
            chain.extend(link.base.map(Part::Base));
            chain.extend(link.layer.map(|layer| Part::Layer(shared[layer].clone())));
            next = link.below;
        }
        chain.reverse();
        entries.push(Entry { definition: record.definition, content: record.content, chain });
    }
    Ok(Contents { entries, mounts })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn layer(n: u8) -> SharedLayer {
        SharedLayer {
            digest: Digest::of(&[n]),
            size: u64::from(n),
            media_type: media::OCI_LAYER_GZIP.into(),
            diff_id: Digest::of(&[n, n]),
            created: i64::from(n),
            compression: "gzip5".into(),
            epoch: (n > 2).then_some(7),
            searched: (0..n).map(|i| i.to_string()).collect(),
        }
    }

    fn blobs(count: u8) -> Vec<Descriptor> {
        let blob = |digest, size| Descriptor {
            media_type: media::OCI_LAYER_GZIP.into(),
            digest,
            size,
            platform: None,
            annotations: BTreeMap::new(),
        };
        std::iter::once(blob(Digest::of(b"base"), 9)).chain((0..count).map(|n| blob(Digest::of(&[n]), u64::from(n)))).collect()
    }

    fn entry(n: u8) -> Entry {
        let key = |text: &str| CacheKey::of_content(Digest::of(format!("{text} {n}").as_bytes()));
        let base = Part::Base(Digest::of(b"base"));
        Entry {
            definition: key("definition"),
            content: key("content"),
            chain: std::iter::once(base).chain((0..n).map(|n| Part::Layer(Arc::new(layer(n))))).collect(),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let mut entries: Vec<Entry> = (0..5).map(entry).collect();
        entries.push(Entry { chain: vec![], ..entry(9) });
        let mount = |n: u8| MountLayer { name: Digest::of(b"m"), blob: blobs(5).remove(usize::from(n)), diff_id: Digest::of(b"d") };
        let contents = Contents { entries, mounts: vec![mount(1), mount(5)] };
        let written = write(&contents, &blobs(5));
        assert_eq!(read(&written, &blobs(5)).unwrap(), contents);
        let of_fewer = write(&contents, &blobs(2));
        let kept: Vec<Entry> = contents.entries.iter().filter(|e| e.chain.len() <= 3).cloned().collect();
        assert_eq!(
            read(&of_fewer, &blobs(2)).unwrap(),
            Contents { entries: kept, mounts: vec![mount(1)] },
            "what needs a layer that is not there is left out"
        );
    }

    #[test]
    fn the_document_grows_with_the_steps_and_not_with_their_square() {
        let size = |n: u8| {
            let entries = (0..n).map(entry).map(|mut e| {
                for part in &mut e.chain {
                    if let Part::Layer(layer) = part {
                        Arc::make_mut(layer).searched.clear();
                    }
                }
                e
            });
            write(&Contents { entries: entries.collect(), mounts: vec![] }, &blobs(n)).len()
        };
        assert!(size(200) < 5 * size(50), "{} {}", size(200), size(50));
    }

    #[test]
    fn hostile_documents_are_refused() {
        let key = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        let record = |chain: &str| format!(r#""records":[{{"definition":"{key}","content":"{key}","chain":{chain}}}]"#);
        for (text, expect) in [
            (String::new(), "malformed"),
            ("[]".into(), "malformed"),
            (r#"{"version":2}"#.into(), "format 2"),
            (r#"{"version":1}"#.into(), "missing field"),
            (format!(r#"{{"version":1,"layers":[],"chains":[],{}}}"#, record("0")), "the chain 0"),
            (format!(r#"{{"version":1,"layers":[],"chains":[{{"below":0,"base":"{key}"}}],"records":[]}}"#), "the chain 0"),
            (r#"{"version":1,"layers":[],"chains":[{}],"records":[]}"#.into(), "neither an image nor a layer"),
            (r#"{"version":1,"layers":[],"chains":[{"layer":0}],"records":[]}"#.into(), "the layer 0"),
            (
                format!(r#"{{"version":1,"layers":[],"chains":[],"records":[],"mounts":[{{"name":"{key}","at":3,"diffId":"{key}"}}]}}"#),
                "the layer 3",
            ),
            (
                format!(r#"{{"version":1,"layers":[{{"at":9,"diffId":"{key}","created":0,"compression":"x"}}],"chains":[],"records":[]}}"#),
                "the layer 9",
            ),
        ] {
            let told = read(text.as_bytes(), &blobs(1)).unwrap_err().to_string();
            assert!(told.contains(expect), "{text}: {told}");
        }
        let long = format!(
            r#"{{"version":1,"layers":[],"chains":[{{"base":"{key}"}}{}],"records":[]}}"#,
            (0..MOST_LAYERS).fold(String::new(), |text, n| text + &format!(r#",{{"below":{n},"base":"{key}"}}"#))
        );
        assert!(read(long.as_bytes(), &[]).unwrap_err().to_string().contains("a chain of more than 4096 parts"));
        for (compression, media_type, good) in [
            ("gzip5", media::OCI_LAYER_GZIP, true),
            ("gzip9", media::DOCKER_LAYER_GZIP, true),
            ("zstd3", media::OCI_LAYER_ZSTD, true),
            ("tar", media::OCI_LAYER, true),
            ("gzip5", media::OCI_LAYER, false),
            ("zstd3", media::OCI_LAYER_GZIP, false),
            ("gzip5", "text/html", false),
            ("", media::OCI_LAYER, false),
        ] {
            let text = format!(
                r#"{{"version":1,"layers":[{{"at":0,"diffId":"{key}","created":0,"compression":"{compression}"}}],"chains":[],"records":[]}}"#
            );
            let layer = Descriptor { media_type: media_type.into(), ..blobs(0).remove(0) };
            assert_eq!(read(text.as_bytes(), &[layer]).is_ok(), good, "{compression} {media_type}");
        }
        let links: Vec<String> = (0..3000)
            .map(|n| if n == 0 { format!(r#"{{"base":"{key}"}}"#) } else { format!(r#"{{"below":{},"base":"{key}"}}"#, n - 1) })
            .collect();
        let records: Vec<String> = (0..3000).map(|_| format!(r#"{{"definition":"{key}","content":"{key}","chain":2999}}"#)).collect();
        let bomb = format!(r#"{{"version":1,"layers":[],"chains":[{}],"records":[{}]}}"#, links.join(","), records.join(","));
        assert!(read(bomb.as_bytes(), &[]).unwrap_err().to_string().contains("more than 4000000 parts"));
    }
}
