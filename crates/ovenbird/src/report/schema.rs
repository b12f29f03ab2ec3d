//! JSON schema of the file of `--metadata-file`.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde_json::{Value, json};

use super::{BuildReport, VERSION};

/// A descriptor as the OCI image specification has it.
#[derive(JsonSchema)]
#[expect(dead_code, reason = "only its schema is used")]
#[schemars(rename_all = "camelCase")]
pub(super) struct Descriptor {
    /// Media type.
    media_type: String,
    /// Digest.
    digest: String,
    /// Bytes.
    size: u64,
    /// Platform: os, architecture, variant.
    platform: Option<BTreeMap<String, String>>,
    /// Annotations.
    annotations: Option<BTreeMap<String, String>>,
}

/// Transfers that broke and went on.
#[derive(JsonSchema)]
#[expect(dead_code, reason = "only its schema is used")]
pub(super) struct Breaks {
    /// How many broke.
    count: u64,
    /// Bytes that were not sent again.
    resumed: u64,
    /// Bytes that were sent again.
    retried: u64,
}

/// What every report has, also that of a build that failed.
const ALWAYS: [&str; 11] =
    ["version", "outcome", "return_code", "started", "finished", "logs", "steps", "plugins", "container_ids", "images", "base_images"];

/// The schema of version [`VERSION`].
pub fn schema() -> Value {
    let mut own = schemars::schema_for!(BuildReport).to_value();
    let definitions = own.as_object_mut().and_then(|own| own.remove("$defs")).unwrap_or_default();
    if let Some(own) = own.as_object_mut() {
        own.remove("$schema");
        own.insert("required".into(), json!(ALWAYS));
        own.insert("description".into(), "What is known of the build. Without digest, names and timings when it failed.".into());
    }
    own["properties"]["version"] = json!({ "const": VERSION, "description": "Version of the format." });
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "The file of ovenbird build --metadata-file",
        "type": "object",
        "properties": {
            "containerimage.digest": { "type": "string", "description": "As buildx writes it: digest of the manifest or index." },
            "containerimage.config.digest": { "type": "string", "description": "As buildx writes it: digest of the configuration of a single platform." },
            "containerimage.descriptor": { "$ref": "#/$defs/Descriptor", "description": "As buildx writes it." },
            "image.name": { "type": "string", "description": "As buildx writes it: the names, with commas between." },
            "ovenbird": own,
        },
        "required": ["ovenbird"],
        "$defs": definitions,
    })
}
