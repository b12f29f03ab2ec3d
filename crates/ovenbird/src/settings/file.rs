//! One settings file.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use ovenbird_oci::keychain::registry_name;
use ovenbird_oci::reference::is_host;
use ovenbird_oci::regular_file::{self, Links};
use serde::Deserialize;

use super::prefect::PrefectSettings;
use super::registry::FileRegistry;
use crate::error::{Error, Kind};
use crate::launch::KubernetesSettings;
use crate::request::tag::TagPolicy;

/// Longest file, in bytes.
pub(super) const MAX: u64 = 1 << 20;

/// What one layer says; `None`: nothing.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileSettings {
    pub(super) root: Option<PathBuf>,
    pub(super) progress: Option<String>,
    pub(super) parallel: Option<usize>,
    pub(super) transfers: Option<usize>,
    pub(super) isolation_level: Option<String>,
    /// Where builds run.
    pub(super) on: Option<String>,
    /// Machines for builds.
    pub(super) pool: Option<FilePool>,
    /// Clusters for builds.
    pub(super) kubernetes: Option<KubernetesSettings>,
    /// Where flow runs build.
    pub(super) prefect: Option<PrefectSettings>,
    /// What builds.
    pub(super) builder: Option<String>,
    /// Where a name without registry leads.
    pub(super) default_registry: Option<String>,
    /// What stands between registry and name then.
    pub(super) registry_path: Option<String>,
    /// More files with credentials.
    pub(super) auth_files: Option<Vec<PathBuf>>,
    /// Folders whose `.ovenbird.toml` may say everything.
    pub(super) trusted_projects: Option<Vec<PathBuf>>,
    /// Folders with programs `ovenbird-plugin-NAME`.
    pub(super) plugin_folders: Option<Vec<PathBuf>>,
    /// Tags of every build.
    pub(super) tags: Option<TagPolicy>,
    #[serde(default)]
    pub(super) registry: BTreeMap<String, FileRegistry>,
}

/// `[pool]`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FilePool {
    /// `ssh://…`
    pub(super) hosts: Vec<String>,
    pub(super) slots: Option<usize>,
    pub(super) command: Option<String>,
    pub(super) root: Option<PathBuf>,
}

impl FileSettings {
    /// Lays `other` over this.
    pub(super) fn merge(&mut self, other: Self) {
        over(&mut self.root, other.root);
        over(&mut self.progress, other.progress);
        over(&mut self.parallel, other.parallel);
        over(&mut self.transfers, other.transfers);
        over(&mut self.isolation_level, other.isolation_level);
        over(&mut self.on, other.on);
        over(&mut self.pool, other.pool);
        if let Some(kubernetes) = other.kubernetes {
            self.kubernetes.get_or_insert_default().merge(kubernetes);
        }
        if let Some(prefect) = other.prefect {
            self.prefect.get_or_insert_default().merge(prefect);
        }
        over(&mut self.builder, other.builder);
        over(&mut self.default_registry, other.default_registry);
        over(&mut self.registry_path, other.registry_path);
        over(&mut self.auth_files, other.auth_files);
        over(&mut self.trusted_projects, other.trusted_projects);
        over(&mut self.plugin_folders, other.plugin_folders);
        over(&mut self.tags, other.tags);
        for (name, registry) in other.registry {
            self.registry.entry(registry_name(&name)).or_default().merge(registry);
        }
    }

    /// Paths in a file are seen from the folder of the file.
    fn rebase(&mut self, dir: &Path) {
        self.registry.values_mut().for_each(|registry| registry.rebase(dir));
        self.prefect.iter_mut().for_each(|prefect| prefect.rebase(dir));
        let lists = [&mut self.auth_files, &mut self.trusted_projects, &mut self.plugin_folders].into_iter().flatten().flatten();
        for path in self.root.iter_mut().chain(lists) {
            *path = dir.join(&*path);
        }
    }
}

/// Reads a file; `None` when it is absent and not `required`.
pub(super) fn read(path: &Path, required: bool) -> Result<Option<FileSettings>, Error> {
    let text = match regular_file::read_to_string(path, MAX, Links::Follow) {
        Ok(text) => text,
        Err(error) if !required && matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(None),
        Err(error) => {
            return Err(
                Error::from_chain(Kind::Configuration, &error).while_doing(format!("cannot read the settings file {}", path.display()))
            );
        }
    };
    parse(path, &text).map(Some)
}

/// Reads the text of a file.
pub(super) fn parse(path: &Path, text: &str) -> Result<FileSettings, Error> {
    let mut settings: FileSettings = toml::from_str(text).map_err(|error| {
        // The full message quotes the line; one that may hold a secret is not shown.
        let full = error.to_string();
        let line = error.span().map_or(1, |span| text[..span.start.min(text.len())].lines().count().max(1));
        let open = ["password", "secret", "token"].iter().all(|word| !full.to_lowercase().contains(word));
        let reason = if open { full.trim_end().to_owned() } else { format!("line {line}: {}", error.message()) };
        let told = Error::new(Kind::Configuration, format!("{} is not a settings file", path.display())).because(reason);
        match misspelt(error.message()) {
            Some(key) => told.hint(format!("did you mean `{key}`?")),
            None => told,
        }
    })?;
    let wrong = |what: String, hint: &str| Err(Error::new(Kind::Configuration, format!("{} {what}", path.display())).hint(hint));
    if let Some(name) = settings.registry.keys().find(|name| !is_registry(name)) {
        let hint = "settings are for a whole host[:port]; credentials for a part of one stand in Docker's config.json";
        return wrong(format!("has settings of {name:?}, which is no registry"), hint);
    }
    for (name, registry) in &settings.registry {
        if let Err((what, hint)) = registry.check() {
            return wrong(format!("has settings of registry {name} that cannot be used: {what}"), hint);
        }
    }
    let policies = settings.tags.iter().chain(settings.registry.values().filter_map(|registry| registry.tags.as_ref()));
    for policy in policies {
        policy.check().map_err(|error| error.while_doing(format!("{} has a tag policy that cannot be used", path.display())))?;
    }
    settings.rebase(path.parent().unwrap_or(Path::new("/")));
    Ok(settings)
}

/// Whether settings can be for it: `host[:port]`, also as Docker's files write that.
pub(super) fn is_registry(name: &str) -> bool {
    let bare = name.strip_prefix("https://").or_else(|| name.strip_prefix("http://")).unwrap_or(name);
    let (host, path) = bare.split_once('/').unwrap_or((bare, ""));
    is_host(host) && matches!(path.trim_end_matches('/'), "" | "v1" | "v2")
}

/// Lays a value over another, if there is one.
pub(super) fn over<T>(slot: &mut Option<T>, value: Option<T>) {
    if value.is_some() {
        *slot = value;
    }
}

/// serde names the unknown field and then the known ones, each between back quotes.
fn misspelt(message: &str) -> Option<&str> {
    let mut quoted = message.strip_prefix("unknown field")?.split('`').skip(1).step_by(2);
    let unknown = quoted.next()?;
    ovenbird_dockerfile::suggest::nearest(unknown, quoted)
}
