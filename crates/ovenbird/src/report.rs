//! What came of a build.

use std::time::Duration;

use ovenbird_oci::registry::Breaks;
use ovenbird_oci::{Descriptor, Digest, Platform};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, Serializer};

use crate::source::Revision;

mod describe;
mod record;
mod schema;

pub(crate) use describe::{base_of, git_of, image_of};
pub(crate) use record::Recorder;
pub use record::{
    BaseReport, DockerfileReport, ErrorReport, GitReport, ImageReport, LogReport, Outcome, PluginOutcome, PluginReport, Record,
    StepOutcome, StepReport,
};
pub use schema::schema;

/// Version of the report format.
pub const VERSION: u32 = 1;

/// One platform of the result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PlatformReport {
    /// Which.
    #[schemars(with = "std::collections::BTreeMap<String, String>")]
    pub platform: Platform,
    /// Its manifest.
    #[schemars(with = "String")]
    pub digest: Digest,
    /// Its config: Docker's image id.
    #[schemars(with = "String")]
    pub config: Digest,
}

/// What `--if-needed` came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Decision {
    /// The image was on this machine.
    Local,
    /// It was in the registry.
    Registry,
    /// It was built.
    Built,
}

/// How long each part took.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
pub struct Timings {
    /// Reading the source, seconds.
    #[serde(serialize_with = "seconds", deserialize_with = "from_seconds")]
    #[schemars(with = "f64")]
    pub source: Duration,
    /// Building, seconds.
    #[serde(serialize_with = "seconds", deserialize_with = "from_seconds")]
    #[schemars(with = "f64")]
    pub build: Duration,
    /// Exporting and pushing, seconds.
    #[serde(serialize_with = "seconds", deserialize_with = "from_seconds")]
    #[schemars(with = "f64")]
    pub export: Duration,
}

/// The report of one build.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct BuildReport {
    /// Format version, [`VERSION`].
    pub version: u32,
    /// Manifest, or index for several platforms. The digest a registry knows.
    #[schemars(with = "String")]
    pub digest: Digest,
    /// The descriptor of `digest`.
    #[schemars(with = "schema::Descriptor")]
    pub descriptor: Descriptor,
    /// Each platform.
    pub platforms: Vec<PlatformReport>,
    /// Names that the image got, in full.
    pub names: Vec<String>,
    /// Names that were pushed.
    pub pushed: Vec<String>,
    /// Where the image came from, when `--if-needed` asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decision: Option<Decision>,
    /// The content id, when it was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub content_id: Option<Digest>,
    /// The commit of the context, where that was fetched from a repository.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<Revision>,
    /// Transfers that broke and went on.
    #[serde(default)]
    #[schemars(with = "schema::Breaks")]
    pub breaks: Breaks,
    /// Steps that ran.
    pub ran: usize,
    /// Steps that came from the cache.
    pub cached: usize,
    /// Seconds.
    pub timings: Timings,
    /// How it went.
    #[serde(flatten)]
    pub record: Record,
}

impl BuildReport {
    /// Docker's image id: the config digest of a single platform, else the digest of the index.
    pub fn image_id(&self) -> Digest {
        match self.platforms.as_slice() {
            [one] => one.config,
            _ => self.digest,
        }
    }

    /// The file of `--metadata-file`: the keys of buildx, and everything else under `ovenbird`.
    pub fn metadata(&self) -> serde_json::Value {
        let mut map = serde_json::Map::new();
        map.insert("containerimage.digest".into(), self.digest.to_string().into());
        if let [one] = self.platforms.as_slice() {
            map.insert("containerimage.config.digest".into(), one.config.to_string().into());
        }
        let value = |v: serde_json::Result<serde_json::Value>| v.unwrap_or_default();
        map.insert("containerimage.descriptor".into(), value(serde_json::to_value(&self.descriptor)));
        if !self.names.is_empty() {
            map.insert("image.name".into(), self.names.join(",").into());
        }
        map.insert("ovenbird".into(), value(serde_json::to_value(self)));
        map.into()
    }
}

pub(crate) fn seconds<S: Serializer>(duration: &Duration, s: S) -> Result<S::Ok, S::Error> {
    s.serialize_f64(duration.as_millis() as f64 / 1000.0)
}

pub(crate) fn from_seconds<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Duration, D::Error> {
    Duration::try_from_secs_f64(f64::deserialize(d)?).map_err(serde::de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_has_buildx_keys() {
        let digest = Digest::of(b"m");
        let descriptor = Descriptor { media_type: "m".into(), digest, size: 1, platform: None, annotations: [].into() };
        let report = BuildReport {
            version: VERSION,
            digest,
            descriptor,
            platforms: vec![PlatformReport { platform: Platform::host(), digest, config: Digest::of(b"c") }],
            names: vec!["docker.io/library/a:1".into()],
            pushed: vec![],
            decision: Some(Decision::Built),
            content_id: None,
            revision: None,
            breaks: Breaks { count: 1, resumed: 2, retried: 3 },
            ran: 1,
            cached: 2,
            timings: Timings { build: Duration::from_millis(1500), ..Timings::default() },
            record: Record::default(),
        };
        let json = report.metadata();
        assert_eq!(json["containerimage.digest"], digest.to_string());
        assert_eq!(json["containerimage.config.digest"], Digest::of(b"c").to_string());
        assert_eq!(json["image.name"], "docker.io/library/a:1");
        assert_eq!(json["ovenbird"]["timings"]["build"], 1.5);
        assert_eq!(serde_json::from_value::<BuildReport>(json["ovenbird"].clone()).unwrap(), report);
        assert_eq!(report.image_id(), Digest::of(b"c"));
    }
}
