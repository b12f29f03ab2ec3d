//! One settings file.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use ovenbird_oci::registry::RegistryOptions;
use serde::Deserialize;

use crate::error::{Error, Kind};
use crate::request::tag::TagPolicy;

/// What one layer says; `None`: nothing.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileSettings {
    pub(super) root: Option<PathBuf>,
    pub(super) progress: Option<String>,
    pub(super) parallel: Option<usize>,
    pub(super) transfers: Option<usize>,
    pub(super) isolation_level: Option<String>,
    pub(super) tags: Option<TagPolicy>,
    #[serde(default)]
    pub(super) registry: BTreeMap<String, FileRegistry>,
}

/// `[registry."NAME"]`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileRegistry {
    mirrors: Option<Vec<String>>,
    plain_http: Option<bool>,
    ca: Option<PathBuf>,
    client_identity: Option<PathBuf>,
    pub(super) tags: Option<TagPolicy>,
}

impl FileSettings {
    /// Lays `other` over this.
    pub(super) fn merge(&mut self, other: Self) {
        fn over<T>(slot: &mut Option<T>, value: Option<T>) {
            if value.is_some() {
                *slot = value;
            }
        }
        over(&mut self.root, other.root);
        over(&mut self.progress, other.progress);
        over(&mut self.parallel, other.parallel);
        over(&mut self.transfers, other.transfers);
        over(&mut self.isolation_level, other.isolation_level);
        over(&mut self.tags, other.tags);
        for (name, registry) in other.registry {
            let slot = self.registry.entry(name).or_default();
            over(&mut slot.mirrors, registry.mirrors);
            over(&mut slot.plain_http, registry.plain_http);
            over(&mut slot.ca, registry.ca);
            over(&mut slot.tags, registry.tags);
            over(&mut slot.client_identity, registry.client_identity);
        }
    }

    /// Paths in a file are seen from the folder of the file.
    fn rebase(&mut self, dir: &Path) {
        let registries = self.registry.values_mut().flat_map(|r| [&mut r.ca, &mut r.client_identity]);
        for path in registries.chain([&mut self.root]).flatten() {
            *path = dir.join(&*path);
        }
    }
}

impl From<FileRegistry> for RegistryOptions {
    fn from(file: FileRegistry) -> Self {
        Self {
            plain_http: file.plain_http.unwrap_or(false),
            ca: file.ca,
            client_identity: file.client_identity,
            mirrors: file.mirrors.unwrap_or_default(),
            ..Self::default()
        }
    }
}

/// Reads a file; `None` when it is absent and not `required`.
pub(super) fn read(path: &Path, required: bool) -> Result<Option<FileSettings>, Error> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if !required && matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(None),
        Err(error) => {
            return Err(
                Error::from_chain(Kind::Configuration, &error).while_doing(format!("cannot read the settings file {}", path.display()))
            );
        }
    };
    let mut settings: FileSettings = toml::from_str(&text).map_err(|error| {
        let told =
            Error::new(Kind::Configuration, format!("{} is not a settings file", path.display())).because(error.to_string().trim_end());
        match misspelt(error.message()) {
            Some(key) => told.hint(format!("did you mean `{key}`?")),
            None => told,
        }
    })?;
    settings.rebase(path.parent().unwrap_or(Path::new("/")));
    Ok(Some(settings))
}

/// serde names the unknown field and then the known ones, each between back quotes.
fn misspelt(message: &str) -> Option<&str> {
    let mut quoted = message.strip_prefix("unknown field")?.split('`').skip(1).step_by(2);
    let unknown = quoted.next()?;
    ovenbird_dockerfile::suggest::nearest(unknown, quoted)
}
