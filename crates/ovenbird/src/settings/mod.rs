//! How this machine is set up. The only place of the workspace that reads the environment, the home folder and the clock.
//!
//! Later wins: built-in defaults, `/etc/ovenbird/config.toml`, `$XDG_CONFIG_HOME/ovenbird/config.toml` (`~/.config`), the file of
//! `--settings` or `OVENBIRD_SETTINGS`, `OVENBIRD_*` variables, flags. Registries are merged by name, field by field.
//! A key that a file has and Ovenbird does not know is an error. Variables named `OVENBIRD_*` that it does not know are left alone:
//! Kubernetes makes some (`OVENBIRD_PORT`) when a service has that name.

mod environment;
mod file;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ovenbird_oci::registry::{ClientOptions, RegistryOptions};
use ovenbird_sandbox::Level;

pub use environment::Environment;
use file::{FileSettings, read};

use crate::error::{Error, Kind};
use crate::naming::TagPolicies;

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Progress {
    /// `tty` on a terminal, else `plain`.
    #[default]
    Auto,
    /// One line after the other.
    Plain,
    /// Drawn over and over.
    Tty,
    /// One JSON event a line.
    RawJson,
    /// Nothing.
    Quiet,
}

impl FromStr for Progress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "auto" => Self::Auto,
            "plain" => Self::Plain,
            "tty" => Self::Tty,
            "rawjson" => Self::RawJson,
            "quiet" | "none" => Self::Quiet,
            _ => return Err(format!("{text:?} is not a progress mode: expected auto, plain, tty, rawjson or quiet")),
        })
    }
}

/// Reads the name of an isolation level.
pub fn parse_level(text: &str) -> Result<Level, String> {
    Level::ALL
        .into_iter()
        .find(|level| level.name() == text)
        .ok_or_else(|| format!("{text:?} is not an isolation level: expected root, rootless, single-id or chroot"))
}

/// What flags say; wins over everything else.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// `--settings`.
    pub file: Option<PathBuf>,
    /// `--root`.
    pub root: Option<PathBuf>,
    /// `--progress`.
    pub progress: Option<Progress>,
    /// `--parallel`.
    pub parallel: Option<usize>,
    /// `--isolation-level`.
    pub isolation_level: Option<Level>,
}

/// The settings in force.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// State directory.
    pub root: PathBuf,
    /// Progress.
    pub progress: Progress,
    /// Steps at once; 0: one a processor.
    pub parallel: usize,
    /// Blob transfers at once; 0: the client's default.
    pub transfers: usize,
    /// Use this level and no other.
    pub isolation_level: Option<Level>,
    /// Tags of names without one, and what kind of name a tag is.
    pub tags: TagPolicies,
    /// By registry name.
    pub registries: BTreeMap<String, RegistryOptions>,
    /// Folder of Docker's `config.json`.
    pub docker_config: Option<PathBuf>,
    /// Podman's `auth.json`, when there is one.
    pub auth_file: Option<PathBuf>,
    /// `DOCKER_HOST`.
    pub docker_host: Option<String>,
    /// Where short-lived files go.
    pub temp: PathBuf,
    /// Files that were read, weakest first.
    pub files: Vec<PathBuf>,
}

impl Settings {
    /// Reads files and environment, then applies `flags`.
    pub fn load(environment: &Environment, flags: &Overrides) -> Result<Self, Error> {
        let mut merged = FileSettings::default();
        let mut files = vec![];
        let user = environment.config_home().map(|dir| dir.join("ovenbird/config.toml"));
        for path in environment.system_config().map(Path::to_owned).into_iter().chain(user) {
            if let Some(layer) = read(&path, false)? {
                merged.merge(layer);
                files.push(path);
            }
        }
        let explicit = flags.file.clone().or_else(|| environment.get("OVENBIRD_SETTINGS").map(PathBuf::from));
        if let Some(path) = explicit {
            merged.merge(read(&path, true)?.unwrap_or_default());
            files.push(path);
        }
        merged.merge(from_variables(environment)?);
        let parsed =
            |what: &str, error: String| Error::new(Kind::Configuration, format!("the setting {what} cannot be used")).because(error);
        let progress = match (flags.progress, &merged.progress) {
            (Some(progress), _) => progress,
            (None, Some(text)) => text.parse().map_err(|e| parsed("progress", e))?,
            (None, None) => Progress::Auto,
        };
        let isolation_level = match (flags.isolation_level, &merged.isolation_level) {
            (Some(level), _) => Some(level),
            (None, Some(text)) => Some(parse_level(text).map_err(|e| parsed("isolation_level", e))?),
            (None, None) => None,
        };
        let root = match flags.root.clone().or(merged.root) {
            Some(root) => environment.absolute(&root),
            None => environment.data_home().map(|dir| dir.join("ovenbird")).ok_or_else(|| {
                Error::new(Kind::Configuration, "there is no place for the state directory: neither HOME nor XDG_DATA_HOME is set")
                    .hint("give a folder with --root DIR or OVENBIRD_ROOT")
            })?,
        };
        let own = |(name, registry): (&String, &mut file::FileRegistry)| Some((name.clone(), registry.tags.take()?));
        let tags = TagPolicies { registries: merged.registry.iter_mut().filter_map(own).collect(), all: merged.tags.unwrap_or_default() };
        Ok(Self {
            root,
            progress,
            parallel: flags.parallel.or(merged.parallel).unwrap_or(0),
            transfers: merged.transfers.unwrap_or(0),
            isolation_level,
            tags,
            registries: merged.registry.into_iter().map(|(name, registry)| (name, registry.into())).collect(),
            docker_config: environment
                .get("DOCKER_CONFIG")
                .map(PathBuf::from)
                .or_else(|| environment.home().map(|home| home.join(".docker"))),
            auth_file: environment
                .get("REGISTRY_AUTH_FILE")
                .map(PathBuf::from)
                .or_else(|| environment.get("XDG_RUNTIME_DIR").map(|dir| Path::new(dir).join("containers/auth.json"))),
            docker_host: environment.get("DOCKER_HOST").filter(|host| !host.is_empty()).map(Into::into),
            temp: environment.get("TMPDIR").filter(|dir| !dir.is_empty()).map_or_else(|| PathBuf::from("/tmp"), PathBuf::from),
            files,
        })
    }

    /// What the registry client needs of this.
    pub fn client_options(&self) -> ClientOptions {
        ClientOptions {
            registries: self.registries.clone(),
            docker_config: self.docker_config.clone(),
            auth_file: self.auth_file.clone(),
            parallel: self.transfers,
            ..ClientOptions::default()
        }
    }
}

fn from_variables(environment: &Environment) -> Result<FileSettings, Error> {
    let number = |name: &str| {
        environment.get(name).map(str::parse::<usize>).transpose().map_err(|_| {
            Error::new(Kind::Configuration, format!("{name} is {:?}, expected a number", environment.get(name).unwrap_or_default()))
        })
    };
    Ok(FileSettings {
        root: environment.get("OVENBIRD_ROOT").filter(|root| !root.is_empty()).map(PathBuf::from),
        progress: environment.get("OVENBIRD_PROGRESS").or_else(|| environment.get("BUILDKIT_PROGRESS")).map(Into::into),
        parallel: number("OVENBIRD_PARALLEL")?,
        transfers: number("OVENBIRD_TRANSFERS")?,
        isolation_level: environment.get("OVENBIRD_ISOLATION_LEVEL").map(Into::into),
        tags: None,
        registry: BTreeMap::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Case {
        system: &'static str,
        user: &'static str,
        explicit: &'static str,
        vars: &'static [(&'static str, &'static str)],
        flags: Overrides,
        expect: &'static str,
    }

    fn case(system: &'static str, user: &'static str, explicit: &'static str) -> Case {
        Case { system, user, explicit, vars: &[], flags: Overrides::default(), expect: "" }
    }

    #[test]
    fn precedence() {
        let flag_root = Overrides { root: Some("/flag".into()), parallel: Some(9), ..Overrides::default() };
        for row in [
            Case { expect: "/home/u/.local/share/ovenbird 0 Auto None", ..case("", "", "") },
            Case { vars: &[("XDG_DATA_HOME", "/data")], expect: "/data/ovenbird 0 Auto None", ..case("", "", "") },
            Case { expect: "/system 1 Auto None", ..case("root='/system'\nparallel=1", "", "") },
            Case { expect: "/user 1 Auto None", ..case("root='/system'\nparallel=1", "root='/user'", "") },
            Case {
                expect: "/file 2 Plain None",
                ..case("root='/system'\nparallel=1", "root='/user'\nparallel=2", "root='/file'\nprogress='plain'")
            },
            Case {
                vars: &[("OVENBIRD_ROOT", "/env"), ("OVENBIRD_PARALLEL", "3"), ("OVENBIRD_PORT", "tcp://x")],
                expect: "/env 3 Auto None",
                ..case("root='/system'\nparallel=1", "root='/user'", "root='/file'")
            },
            Case { vars: &[("OVENBIRD_ROOT", "/env")], flags: flag_root, expect: "/flag 9 Auto None", ..case("root='/system'", "", "") },
            Case {
                vars: &[("OVENBIRD_ISOLATION_LEVEL", "single-id"), ("BUILDKIT_PROGRESS", "rawjson")],
                expect: "/home/u/.local/share/ovenbird 0 RawJson Some(SingleId)",
                ..case("isolation_level='root'", "", "")
            },
            Case {
                vars: &[("OVENBIRD_PARALLEL", "many")],
                expect: "! OVENBIRD_PARALLEL is \"many\", expected a number",
                ..case("", "", "")
            },
            Case { expect: "! the setting progress cannot be used: \"loud\" is not a progress mode", ..case("progress='loud'", "", "") },
            Case { expect: "unknown field `rot`", ..case("rot='/x'", "", "") },
            Case { expect: "! FILE3 is not a settings file", ..case("", "", "root=") },
        ] {
            let dir = tempfile::tempdir().unwrap();
            let mut paths = vec![];
            for (at, text) in [row.system, row.user, row.explicit].into_iter().enumerate() {
                let path = if at == 1 { dir.path().join("home/ovenbird/config.toml") } else { dir.path().join(format!("{at}.toml")) };
                if !text.is_empty() {
                    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                    std::fs::write(&path, text).unwrap();
                }
                paths.push(path);
            }
            let mut vars: BTreeMap<String, String> = row.vars.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            vars.insert("HOME".into(), "/home/u".into());
            vars.insert("XDG_CONFIG_HOME".into(), dir.path().join("home").display().to_string());
            let environment = Environment::fixed(vars, "/work", Some(paths[0].clone()));
            let mut flags = row.flags;
            flags.file = (!row.explicit.is_empty()).then(|| paths[2].clone());
            let got = match Settings::load(&environment, &flags) {
                Ok(s) => format!("{} {} {:?} {:?}", s.root.display(), s.parallel, s.progress, s.isolation_level),
                Err(e) => format!("! {e}").replace(&paths[2].display().to_string(), "FILE3"),
            };
            assert!(got.contains(row.expect), "expected {:?}, got {got}", row.expect);
        }
    }

    #[test]
    fn registries_are_merged_by_field() {
        let dir = tempfile::tempdir().unwrap();
        let (low, high) = (dir.path().join("low.toml"), dir.path().join("high.toml"));
        std::fs::write(&low, "[registry.\"docker.io\"]\nmirrors=['m:5000']\nca='ca.pem'\n[registry.b]\nplain_http=true").unwrap();
        std::fs::write(&high, "[registry.\"docker.io\"]\nplain_http=true").unwrap();
        let environment = Environment::fixed([("HOME".into(), "/h".into())].into(), "/work", Some(low));
        let settings = Settings::load(&environment, &Overrides { file: Some(high), ..Overrides::default() }).unwrap();
        let docker = &settings.registries["docker.io"];
        assert_eq!(
            (docker.plain_http, docker.mirrors.as_slice(), docker.ca.as_deref()),
            (true, &["m:5000".to_owned()][..], Some(dir.path().join("ca.pem").as_path()))
        );
        assert!(settings.registries["b"].plain_http);
    }

    #[test]
    fn tag_policies() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.toml");
        let text = "[tags]\nunique=['{git.sha}']\nfloating=['latest']\n[registry.\"h.io\".tags]\nprimary=['{git.tag}']";
        std::fs::write(&file, text).unwrap();
        let environment = Environment::fixed([("HOME".into(), "/h".into())].into(), "/work", Some(file.clone()));
        let tags = Settings::load(&environment, &Overrides::default()).unwrap().tags;
        assert_eq!((tags.all.unique.len(), tags.all.primary.len(), tags.all.floating.len()), (1, 0, 1));
        assert_eq!(tags.registries["h.io"].primary, ["{git.tag}"]);
        std::fs::write(&file, "[tags]\nrelease=['x']").unwrap();
        assert!(Settings::load(&environment, &Overrides::default()).unwrap_err().to_string().contains("unknown field `release`"));
    }

    #[test]
    fn misspelt_keys_and_missing_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        let environment = Environment::fixed([("HOME".into(), "/h".into())].into(), "/work", None);
        let load = |path: &Path| Settings::load(&environment, &Overrides { file: Some(path.into()), ..Overrides::default() }).unwrap_err();
        std::fs::write(&path, "paralel = 3").unwrap();
        assert_eq!(load(&path).hints, ["did you mean `parallel`?"]);
        std::fs::write(&path, "[registry.x]\nmirror = ['a']").unwrap();
        assert_eq!(load(&path).hints, ["did you mean `mirrors`?"]);
        let missing = load(&dir.path().join("none.toml"));
        assert!(missing.kind == Kind::Configuration && missing.message.contains("cannot read the settings file"), "{missing}");
    }
}
