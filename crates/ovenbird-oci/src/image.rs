//! Manifest, index and config as JSON values. Raw bytes are kept wherever a digest is taken: a
//! parsed document is never serialised again to find its digest.
//! Source: OCI image-spec 1.1; Docker image manifest v2 schema 2; Docker image config 1.2 (`Healthcheck`, `OnBuild`, `Shell`).

#![allow(clippy::zero_sized_map_values, reason = "docker writes sets as maps to {}")]

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{Digest, Platform};

/// Media types that Ovenbird reads or writes.
pub mod media {
    /// OCI index.
    pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
    /// OCI manifest.
    pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    /// OCI config.
    pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    /// OCI layer, plain tar.
    pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
    /// OCI layer, gzip.
    pub const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
    /// OCI layer, zstd.
    pub const OCI_LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
    /// Docker manifest list.
    pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
    /// Docker manifest.
    pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
    /// Docker config.
    pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
    /// Docker layer, gzip.
    pub const DOCKER_LAYER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
    /// Docker layer, plain tar.
    pub const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
    /// Docker layer, zstd: some builders write it.
    pub const DOCKER_LAYER_ZSTD: &str = "application/vnd.docker.image.rootfs.diff.tar.zstd";
    /// Every layer that can be unpacked.
    pub const LAYERS: [&str; 6] = [OCI_LAYER, OCI_LAYER_GZIP, OCI_LAYER_ZSTD, DOCKER_LAYER, DOCKER_LAYER_GZIP, DOCKER_LAYER_ZSTD];

    /// Layers that registries do not serve: their licence forbids it.
    pub fn is_foreign(media_type: &str) -> bool {
        media_type.contains(".nondistributable.") || media_type.contains(".rootfs.foreign.")
    }
}

/// Points at a blob.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// Media type of the blob.
    pub media_type: String,
    /// Digest of its bytes.
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
    /// Only in an index.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub platform: Option<Platform>,
    /// Free annotations.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default, deserialize_with = "null_as_default")]
    pub annotations: BTreeMap<String, String>,
}

/// Image manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// 2.
    pub schema_version: u32,
    /// Media type of the manifest itself.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub media_type: Option<String>,
    /// The config blob.
    pub config: Descriptor,
    /// Lowest first.
    #[serde(default, deserialize_with = "null_as_default")]
    pub layers: Vec<Descriptor>,
    /// Free annotations.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default, deserialize_with = "null_as_default")]
    pub annotations: BTreeMap<String, String>,
}

/// A layer that is no archive of files, or that registries do not give.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("layer {digest} has the media type {media_type:?}, {}; supported are {}",
    if media::is_foreign(media_type) { "which registries do not serve (a foreign layer)" } else { "which is no layer of files" },
    media::LAYERS.join(", "))]
pub struct UnsupportedLayer {
    /// Which.
    pub digest: Digest,
    /// Its media type, not more than a line of it.
    pub media_type: String,
}

impl Manifest {
    /// Can every layer be unpacked?
    pub fn check_layers(&self) -> Result<(), UnsupportedLayer> {
        match self.layers.iter().find(|layer| !media::LAYERS.contains(&layer.media_type.as_str())) {
            Some(layer) => Err(UnsupportedLayer { digest: layer.digest, media_type: layer.media_type.chars().take(120).collect() }),
            None => Ok(()),
        }
    }
}

/// Image index or manifest list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// 2.
    pub schema_version: u32,
    /// Media type of the index itself.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub media_type: Option<String>,
    /// Manifests, one a platform (and attestations).
    #[serde(default, deserialize_with = "null_as_default")]
    pub manifests: Vec<Descriptor>,
    /// Free annotations.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default, deserialize_with = "null_as_default")]
    pub annotations: BTreeMap<String, String>,
}

/// Most platforms that a message names.
const MOST_NAMED: usize = 30;

impl Descriptor {
    /// Points at a blob, and says nothing else.
    pub fn new(media_type: impl Into<String>, digest: Digest, size: u64) -> Self {
        Self { media_type: media_type.into(), digest, size, platform: None, annotations: BTreeMap::new() }
    }

    /// Does it say something about another manifest (an attestation), instead of being an image?
    pub fn is_attestation(&self) -> bool {
        self.annotations.contains_key("vnd.docker.reference.type") || self.platform.as_ref().is_some_and(|p| p.os == "unknown")
    }

    /// Is it an index or manifest list?
    pub fn is_index(&self) -> bool {
        matches!(self.media_type.as_str(), media::OCI_INDEX | media::DOCKER_LIST)
    }
}

impl Index {
    /// What there is to choose from, for a message: platforms, and how many entries are something else. Indexes in it are left out.
    pub fn describe(&self) -> Vec<String> {
        let (mut said, mut unnamed, mut attestations, mut more) = (Vec::new(), 0, 0, 0);
        for manifest in self.manifests.iter().filter(|m| !m.is_index()) {
            match &manifest.platform {
                _ if manifest.is_attestation() => attestations += 1,
                None => unnamed += 1,
                Some(platform) => {
                    let platform: String = platform.to_string().chars().filter(|c| !c.is_control()).take(80).collect();
                    match said.len() {
                        MOST_NAMED.. => more += 1,
                        _ if said.contains(&platform) => {}
                        _ => said.push(platform),
                    }
                }
            }
        }
        let counted = |n: usize, one: &str, many: &str| (n > 0).then(|| format!("{n} {}", if n == 1 { one } else { many }));
        said.extend(counted(more, "more", "more"));
        said.extend(counted(unnamed, "manifest without a platform", "manifests without a platform"));
        said.extend(counted(attestations, "attestation", "attestations"));
        said
    }
}

/// The image config blob. Unknown fields are kept in `other`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ImageConfig {
    /// RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub created: Option<String>,
    /// `MAINTAINER`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub author: Option<String>,
    /// `amd64`…
    #[serde(default)]
    pub architecture: String,
    /// `v7`…
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub variant: Option<String>,
    /// `linux`.
    #[serde(default)]
    pub os: String,
    /// Windows only.
    #[serde(rename = "os.version", skip_serializing_if = "Option::is_none", default)]
    pub os_version: Option<String>,
    /// How a container runs.
    #[serde(default, deserialize_with = "null_as_default")]
    pub config: RunConfig,
    /// Layers by diff id.
    #[serde(default, deserialize_with = "null_as_default")]
    pub rootfs: RootFs,
    /// How it was made.
    #[serde(skip_serializing_if = "Vec::is_empty", default, deserialize_with = "null_as_default")]
    pub history: Vec<History>,
    /// Everything else.
    #[serde(flatten)]
    pub other: serde_json::Map<String, serde_json::Value>,
}

/// `config.rootfs`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootFs {
    /// `layers`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Digest of each uncompressed layer tar, lowest first.
    #[serde(default, deserialize_with = "null_as_default")]
    pub diff_ids: Vec<Digest>,
}

impl Default for RootFs {
    fn default() -> Self {
        Self { kind: "layers".into(), diff_ids: vec![] }
    }
}

/// One line of history.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct History {
    /// RFC 3339.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub created: Option<String>,
    /// The instruction.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub created_by: Option<String>,
    /// `MAINTAINER`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub author: Option<String>,
    /// Free text.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub comment: Option<String>,
    /// Made no layer.
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub empty_layer: bool,
}

/// `config.config`: field names as Docker writes them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct RunConfig {
    /// `name`, `uid`, `user:group`.
    #[serde(skip_serializing_if = "String::is_empty", default, deserialize_with = "null_as_default")]
    pub user: String,
    /// `80/tcp` → {}.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default, deserialize_with = "null_as_default")]
    pub exposed_ports: BTreeMap<String, Empty>,
    /// `K=V`, in order.
    #[serde(skip_serializing_if = "Vec::is_empty", default, deserialize_with = "null_as_default")]
    pub env: Vec<String>,
    /// Entry point.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub entrypoint: Option<Vec<String>>,
    /// Command.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub cmd: Option<Vec<String>>,
    /// Shell form escaped (Windows).
    #[serde(skip_serializing_if = "std::ops::Not::not", default)]
    pub args_escaped: bool,
    /// `/data` → {}.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default, deserialize_with = "null_as_default")]
    pub volumes: BTreeMap<String, Empty>,
    /// Absolute.
    #[serde(skip_serializing_if = "String::is_empty", default, deserialize_with = "null_as_default")]
    pub working_dir: String,
    /// Labels.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", default, deserialize_with = "null_as_default")]
    pub labels: BTreeMap<String, String>,
    /// `SIGTERM`…
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub stop_signal: Option<String>,
    /// Docker extension.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub healthcheck: Option<HealthConfig>,
    /// Docker extension: triggers.
    #[serde(skip_serializing_if = "Vec::is_empty", default, deserialize_with = "null_as_default")]
    pub on_build: Vec<String>,
    /// Docker extension.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub shell: Option<Vec<String>>,
    /// Everything else.
    #[serde(flatten)]
    pub other: serde_json::Map<String, serde_json::Value>,
}

/// `{}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Empty {}

/// `Healthcheck`; durations in nanoseconds.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct HealthConfig {
    /// `["NONE"]`, `["CMD", …]` or `["CMD-SHELL", "…"]`.
    #[serde(skip_serializing_if = "Vec::is_empty", default, deserialize_with = "null_as_default")]
    pub test: Vec<String>,
    /// Nanoseconds.
    #[serde(skip_serializing_if = "is_zero", default)]
    pub interval: i64,
    /// Nanoseconds.
    #[serde(skip_serializing_if = "is_zero", default)]
    pub timeout: i64,
    /// Nanoseconds.
    #[serde(skip_serializing_if = "is_zero", default)]
    pub start_period: i64,
    /// Nanoseconds.
    #[serde(skip_serializing_if = "is_zero", default)]
    pub start_interval: i64,
    /// Count.
    #[serde(skip_serializing_if = "is_zero", default)]
    pub retries: i64,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(n: &i64) -> bool {
    *n == 0
}

fn null_as_default<'de, D: serde::Deserializer<'de>, T: Default + Deserialize<'de>>(d: D) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(d)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_that_are_none_are_named() {
        let manifest = |media_type: &str| -> Manifest {
            let blob = serde_json::json!({"mediaType": media_type, "digest": Digest::of(b"x"), "size": 1});
            serde_json::from_value(serde_json::json!({"schemaVersion": 2, "config": blob, "layers": [blob]})).unwrap()
        };
        for known in media::LAYERS {
            assert_eq!(manifest(known).check_layers(), Ok(()));
        }
        for (unknown, why) in [
            ("application/evil\n", "\"application/evil\\n\", which is no layer of files"),
            ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "do not serve"),
            ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "do not serve"),
        ] {
            let error = manifest(unknown).check_layers().unwrap_err().to_string();
            assert!(
                error.contains(why) && error.contains(&Digest::of(b"x").to_string()) && error.contains(media::OCI_LAYER_ZSTD),
                "{error}"
            );
        }
    }

    #[test]
    fn an_index_says_what_it_has() {
        let check = |manifests: serde_json::Value, expected: &str| {
            let manifests: Vec<serde_json::Value> = manifests
                .as_array()
                .unwrap()
                .iter()
                .map(|entry| {
                    let mut whole = serde_json::json!({"mediaType": media::OCI_MANIFEST, "digest": Digest::of(b"x"), "size": 1});
                    whole.as_object_mut().unwrap().extend(entry.as_object().unwrap().clone());
                    whole
                })
                .collect();
            let index: Index = serde_json::from_value(serde_json::json!({"schemaVersion": 2, "manifests": manifests})).unwrap();
            assert_eq!(index.describe().join(", "), expected);
        };
        let arm = serde_json::json!({"platform": {"os": "linux", "architecture": "arm64"}});
        let unknown = serde_json::json!({"platform": {"os": "unknown", "architecture": "unknown"}});
        let attestation = serde_json::json!({"annotations": {"vnd.docker.reference.type": "attestation-manifest"}});
        check(serde_json::json!([]), "");
        check(serde_json::json!([arm, arm, unknown]), "linux/arm64, 1 attestation");
        check(serde_json::json!([unknown, attestation]), "2 attestations");
        check(serde_json::json!([{}, {}, {"mediaType": media::OCI_INDEX}]), "2 manifests without a platform");
    }

    #[test]
    fn what_others_write_is_kept() {
        // Nulls as Docker and old builders write them; unknown fields on both levels.
        let text = r#"{"architecture":"arm","variant":"v7","os":"linux","config":{"Hostname":"h","Env":null,"Labels":null,"ExposedPorts":{"80/tcp":{}},
            "Volumes":null,"OnBuild":null,"Cmd":null,"User":null,"Healthcheck":{"Test":null,"Interval":5}},"rootfs":{"type":"layers","diff_ids":null},
            "history":null,"container":"x"}"#;
        let config: ImageConfig = serde_json::from_str(text).unwrap();
        assert_eq!((config.other["container"].as_str(), config.config.other["Hostname"].as_str()), (Some("x"), Some("h")));
        assert_eq!(config.config.healthcheck.as_ref().unwrap().interval, 5);
        let again: ImageConfig = serde_json::from_slice(&serde_json::to_vec(&config).unwrap()).unwrap();
        assert_eq!(again, config);
        for text in [r#"{"config":null,"rootfs":null}"#, "{}"] {
            assert_eq!(serde_json::from_str::<ImageConfig>(text).unwrap(), ImageConfig::default());
        }
        let index: Index = serde_json::from_str(r#"{"schemaVersion":2,"manifests":null,"annotations":null}"#).unwrap();
        assert_eq!((index.manifests.len(), index.annotations.len()), (0, 0));
        assert!(serde_json::from_str::<Descriptor>(r#"{"mediaType":"x","digest":"md5:0","size":1}"#).is_err());
    }
}
