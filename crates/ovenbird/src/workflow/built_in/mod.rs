//! The plugins that come with Ovenbird. Each is a type whose fields are its arguments; the table says when it runs and what it may reach.

mod file;
mod image;
mod label;
mod name;
mod outcome;
mod packages;
mod parent;
mod published;
mod setting;

use ovenbird_dockerfile::suggest;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{Plugin, Prepared};
use crate::request::Phase::{self, Exit, PostBuild, PreBuild, PrePublish};

/// A row of the table.
pub(super) struct BuiltIn {
    pub(super) name: &'static str,
    pub(super) phases: &'static [Phase],
    /// It writes files of the machine, speaks to servers or runs something: more than to change the build or to say no.
    pub(super) reaches_out: bool,
    schema: fn() -> Value,
    make: fn(Value) -> Result<Box<dyn Plugin>, serde_json::Error>,
}

const fn row<T: Plugin + JsonSchema + DeserializeOwned + 'static>(
    name: &'static str,
    phases: &'static [Phase],
    reaches_out: bool,
) -> BuiltIn {
    BuiltIn {
        name,
        phases,
        reaches_out,
        schema: || schemars::schema_for!(T).to_value(),
        make: |args| Ok(Box::new(serde_json::from_value::<T>(args)?)),
    }
}

const ANY_IMAGE: &[Phase] = &[PrePublish, PostBuild, Exit];

const ALL: &[BuiltIn] = &[
    row::<label::Labels>("labels", &[PreBuild], false),
    row::<label::AutoLabels>("auto-labels", &[PreBuild], false),
    row::<label::AssertLabels>("assert-labels", &[PrePublish], false),
    row::<parent::ChangeFrom>("change-from", &[PreBuild], false),
    row::<parent::PinFrom>("pin-from", &[PreBuild], false),
    row::<parent::AllowedParents>("allowed-parents", &[PreBuild], false),
    row::<parent::ParentWait>("parent-wait", &[PreBuild], false),
    row::<file::InjectFiles>("inject-files", &[PreBuild], true),
    row::<file::HideFiles>("hide-files", &[PreBuild], false),
    row::<file::AddDockerfile>("add-dockerfile", &[PreBuild], false),
    row::<file::FetchArtifacts>("fetch-artifacts", &[PreBuild], true),
    row::<setting::BuildArgs>("buildargs", &[PreBuild], false),
    row::<setting::CheckSettings>("check-settings", &[PreBuild], true),
    row::<setting::CheckPlatforms>("check-platforms", &[PreBuild], false),
    row::<setting::BumpRelease>("bump-release", &[PreBuild], true),
    row::<name::TagFromConfig>("tag-from-config", &[PreBuild], true),
    row::<name::FloatingTagsLast>("floating-tags-last", &[PreBuild], false),
    row::<name::PushAll>("push-all", &[PreBuild], true),
    row::<image::TestImage>("test-image", &[PrePublish, PostBuild], true),
    row::<image::Squash>("squash", &[PrePublish], false),
    row::<image::SizeLimit>("size-limit", &[PrePublish], false),
    row::<image::PackageList>("package-list", &[PrePublish, PostBuild], true),
    row::<image::CompareComponents>("compare-components", &[PrePublish], false),
    row::<file::ExportFiles>("export-files", ANY_IMAGE, true),
    row::<published::VerifyMediaTypes>("verify-media-types", &[PostBuild], false),
    row::<published::GroupManifests>("group-manifests", &[PostBuild], true),
    row::<published::UndoPush>("undo-push", &[Exit], true),
    row::<published::Cleanup>("cleanup", &[Exit], true),
    row::<outcome::Notify>("notify", &[PostBuild, Exit], true),
    row::<outcome::StoreMetadata>("store-metadata", &[PostBuild, Exit], true),
];

/// A plugin by its name.
pub(super) fn find(name: &str) -> Option<&'static BuiltIn> {
    ALL.iter().find(|one| one.name == name)
}

/// A name that could be meant.
pub(super) fn nearest(name: &str) -> Option<&'static str> {
    suggest::nearest(name, ALL.iter().map(|one| one.name))
}

impl BuiltIn {
    /// The plugin with its arguments, which `complete` gives for its schema.
    pub(super) fn prepare(&self, complete: &dyn Fn(&Value) -> Result<Map<String, Value>, String>) -> Result<Prepared, String> {
        let args = complete(&(self.schema)())?;
        let make = self.make;
        let again = move |args: Map<String, Value>| make(Value::Object(args)).map_err(|error| error.to_string());
        Ok(Prepared { plugin: again(args.clone())?, args, again: Box::new(again), program: None })
    }
}

/// What is documented of a plugin.
#[derive(Debug, Clone)]
pub struct Reference {
    /// Name.
    pub name: &'static str,
    /// When it runs.
    pub phases: &'static [Phase],
    /// May a project that is not trusted ask for it?
    pub reaches_out: bool,
    /// Schema of its arguments; `description` says what it does.
    pub schema: Value,
}

/// Every plugin, as documented.
pub fn reference() -> impl Iterator<Item = Reference> {
    ALL.iter().map(|one| Reference { name: one.name, phases: one.phases, reaches_out: one.reaches_out, schema: (one.schema)() })
}

/// Bytes as people write them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size(u64);

impl<'de> serde::Deserialize<'de> for Size {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = match Value::deserialize(deserializer)? {
            Value::String(text) => text,
            other => other.to_string(),
        };
        text.parse::<crate::request::ByteSize>().map(|size| Self(size.0)).map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for Size {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Size".into()
    }
    fn inline_schema() -> bool {
        true
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": ["string", "integer"] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::workflow::OWN_KEYS;

    #[test]
    fn every_plugin_is_documented_and_strict() {
        for one in reference() {
            let described = one.schema.get("description").and_then(Value::as_str).unwrap_or_default();
            assert!(described.len() > 20, "{} has no description", one.name);
            assert_eq!(one.schema.get("additionalProperties"), Some(&Value::Bool(false)), "{} takes unknown arguments", one.name);
            for (name, argument) in one.schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
                assert!(argument.get("description").is_some(), "{}.{name} has no description", one.name);
                assert!(!OWN_KEYS.contains(&name.as_str()), "{}.{name} has the name of a key of --plugin", one.name);
            }
        }
        let mut names: Vec<_> = ALL.iter().map(|one| one.name).collect();
        names.dedup();
        assert_eq!(names.len(), ALL.len());
    }
}
