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
