//! How this machine is set up. The only place of the workspace that reads the environment, the home folder and the clock.
//!
//! Later wins: built-in defaults, `/etc/ovenbird/config.toml`, `$XDG_CONFIG_HOME/ovenbird/config.toml` (`~/.config`), the file of
//! `--settings` or `OVENBIRD_SETTINGS`, `OVENBIRD_*` variables, flags. Registries are merged by name, field by field. The project's
//! `.ovenbird.toml` in the working folder comes after the user's file; what it may say is in [`project`].
//! A key that a file has and Ovenbird does not know is an error. Variables named `OVENBIRD_*` that it does not know are left alone:
//! Kubernetes makes some (`OVENBIRD_PORT`) when a service has that name.

mod credentials;
mod environment;
mod file;
mod prefect;
mod project;
mod registry;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ovenbird_oci::Reference;
use ovenbird_oci::keychain::{KeychainOptions, OPENSHIFT_CA, OPENSHIFT_HOSTS, registry_name};
use ovenbird_oci::registry::{ClientOptions, RegistryOptions};
use ovenbird_sandbox::Level;

pub use environment::Environment;
use file::{FileSettings, read};
pub use prefect::PrefectSettings;
pub use registry::RegistryOption;

use crate::builder::BuilderKind;
use crate::choice::On;
use crate::docker_engine::DockerSettings;
use crate::error::{Error, Kind};
use crate::launch::{Host, HostDefaults, KubernetesSettings};
use crate::naming::TagPolicies;
use crate::request::{BuildRequest, ParseValueError};

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
        .ok_or_else(|| format!("{text:?} is not an isolation level: expected root, rootless, single-id, chroot or traced"))
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
    /// `--registry-option`, in order.
    pub registries: Vec<RegistryOption>,
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
    /// Where builds run.
    pub on: Option<On>,
    /// Machines for builds.
    pub pool: Vec<Host>,
    /// What is not said of a machine for builds.
    pub host_defaults: HostDefaults,
    /// Clusters for builds.
    pub kubernetes: KubernetesSettings,
    /// Which Prefect server is meant, as far as the settings say.
    pub prefect: PrefectSettings,
    /// What builds.
    pub builder: Option<BuilderKind>,
    /// Tags of names without one, and what kind of name a tag is.
    pub tags: TagPolicies,
    /// By registry name.
    pub registries: BTreeMap<String, RegistryOptions>,
    /// Folder of Docker's `config.json`.
    pub docker_config: Option<PathBuf>,
    /// Podman's `auth.json`, when there is one.
    pub auth_file: Option<PathBuf>,
    /// Every other place of credentials.
    pub keychain: KeychainOptions,
    /// Registry of names that have none.
    pub default_registry: Option<String>,
    /// What stands before the name then (`team/images`).
    pub registry_path: Option<String>,
    /// Which Docker Engine is meant.
    pub docker: DockerSettings,
    /// Folders with programs `ovenbird-plugin-NAME`, looked through before `PATH`.
    pub plugin_folders: Vec<PathBuf>,
    /// Where short-lived files go.
    pub temp: PathBuf,
    /// Files that were read, weakest first.
    pub files: Vec<PathBuf>,
    /// Folders whose projects the user trusts.
    pub trusted_projects: Vec<PathBuf>,
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
        let trusted = merged.trusted_projects.clone().unwrap_or_default();
        let mut limits = BTreeMap::new();
        let mut most = None;
        if let Some((path, mut layer, is_trusted)) = project::read(environment.working_directory(), &trusted)? {
            if !is_trusted {
                // Applied at the end: they only lower what all others say, and a registry that a project names is not the user's.
                limits = std::mem::take(&mut layer.registry);
                most = layer.parallel.take().filter(|steps| *steps > 0);
            }
            merged.merge(layer);
            files.push(path);
        }
        let explicit = flags.file.clone().or_else(|| environment.get("OVENBIRD_SETTINGS").map(PathBuf::from));
        if let Some(path) = explicit {
            merged.merge(read(&path, true)?.unwrap_or_default());
            files.push(path);
        }
        merged.merge(from_variables(environment)?);
        for RegistryOption { registry, mut values } in flags.registries.clone() {
            values.rebase(environment.working_directory());
            merged.registry.entry(registry_name(&registry)).or_default().merge(values);
        }
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
        let on = merged.on.as_deref().map(str::parse).transpose().map_err(|e: ParseValueError| parsed("on", e.reason))?;
        let pool = merged.pool.take().unwrap_or_default();
        let hosts = pool.hosts.iter().map(|host| host.parse()).collect::<Result<Vec<Host>, _>>();
        let hosts = hosts.map_err(|e: ParseValueError| parsed("pool.hosts", e.reason))?;
        if pool.slots == Some(0) {
            return Err(parsed("pool.slots", "expected a number from 1".into()));
        }
        if pool.command.as_deref().is_some_and(|command| command.is_empty() || command.starts_with('-')) {
            return Err(parsed("pool.command", "expected a program".into()));
        }
        let host_defaults = HostDefaults { slots: pool.slots, command: pool.command, root: pool.root };
        let prefect = merged.prefect.take().unwrap_or_default();
        prefect.check().map_err(|e| parsed("prefect", e))?;
        let builder = merged.builder.as_deref().map(str::parse).transpose();
        let builder = builder.map_err(|e: crate::request::ParseValueError| parsed("builder", e.reason))?;
        let root = match flags.root.clone().or(merged.root) {
            Some(root) => environment.absolute(&root),
            None => environment.data_home().map(|dir| dir.join("ovenbird")).ok_or_else(|| {
                Error::new(Kind::Configuration, "there is no place for the state directory: neither HOME nor XDG_DATA_HOME is set")
                    .hint("give a folder with --root DIR or OVENBIRD_ROOT")
            })?,
        };
        let mut tags = TagPolicies { all: merged.tags.take().unwrap_or_default(), ..TagPolicies::default() };
        let mut keychain = credentials::from_environment(environment);
        keychain.auth_files.extend(merged.auth_files.unwrap_or_default());
        let mut registries: BTreeMap<String, RegistryOptions> = BTreeMap::new();
        keychain.named = merged.registry.keys().cloned().collect();
        for (name, limit) in limits {
            merged.registry.entry(registry_name(&name)).or_default().narrow(&limit);
        }
        for (name, mut registry) in merged.registry {
            tags.registries.extend(registry.tags.take().map(|policy| (name.clone(), policy)));
            if let Some(source) = registry.credentials.take() {
                let source = source.resolve(&keychain, environment);
                keychain.sources.insert(name.clone(), source.map_err(|e| parsed(&format!("credentials of registry {name}"), e))?);
            }
            registries.insert(name, registry.into());
        }
        // In a pod of OpenShift the registry's certificate is signed by an authority that every pod is given.
        if Path::new(OPENSHIFT_CA).exists() {
            for host in OPENSHIFT_HOSTS {
                registries.entry(host.into()).or_default().ca.get_or_insert_with(|| OPENSHIFT_CA.into());
            }
        }
        let default_registry = merged.default_registry.as_deref().map(default_registry).transpose()?;
        let settings = Self {
            root,
            progress,
            parallel: flags.parallel.unwrap_or_else(|| lowered(merged.parallel.unwrap_or(0), most)),
            transfers: merged.transfers.unwrap_or(0),
            isolation_level,
            on,
            pool: hosts,
            host_defaults,
            kubernetes: merged.kubernetes.unwrap_or_default(),
            prefect,
            builder,
            tags,
            registries,
            docker_config: credentials::docker_config(environment),
            auth_file: credentials::auth_file(environment),
            keychain,
            default_registry,
            registry_path: merged.registry_path.map(|path| path.trim_matches('/').to_owned()).filter(|path| !path.is_empty()),
            docker: credentials::docker(environment),
            plugin_folders: merged
                .plugin_folders
                .unwrap_or_else(|| environment.config_home().map(|dir| dir.join("ovenbird/plugins")).into_iter().collect()),
            temp: environment.get("TMPDIR").filter(|dir| !dir.is_empty()).map_or_else(|| PathBuf::from("/tmp"), PathBuf::from),
            files,
            trusted_projects: merged.trusted_projects.unwrap_or_default(),
        };
        settings.client_options().check()?;
        Ok(settings)
    }

    /// What the registry client needs of this.
    pub fn client_options(&self) -> ClientOptions {
        ClientOptions {
            registries: self.registries.clone(),
            docker_config: self.docker_config.clone(),
            auth_file: self.auth_file.clone(),
            keychain: self.keychain.clone(),
            parallel: self.transfers,
            ..ClientOptions::default()
        }
    }
}

impl Settings {
    /// A name as people type it, in full: without a registry it gets `default_registry` and `registry_path`. Images that a Dockerfile
    /// names do not: what it means must not depend on where it is built.
    pub fn full_name(&self, name: &str) -> String {
        // Variables stand behind the registry: a slash in `{label:a/b}` is none of the name.
        let plain = name.split('{').next().unwrap_or_default();
        let first = plain.split_once('/').map(|(first, _)| first);
        let has_registry = first.is_some_and(|first| {
            // As references are read: repositories have no capitals.
            first.contains(['.', ':']) || first == "localhost" || first.bytes().any(|b| b.is_ascii_uppercase())
        });
        if has_registry || name.is_empty() || (self.default_registry.is_none() && self.registry_path.is_none()) {
            return name.to_owned();
        }
        let registry = self.default_registry.as_deref().unwrap_or("docker.io");
        self.registry_path.as_ref().map_or_else(|| format!("{registry}/{name}"), |path| format!("{registry}/{path}/{name}"))
    }

    /// A request whose names are in full.
    #[must_use]
    pub fn with_full_names(&self, mut request: BuildRequest) -> BuildRequest {
        for name in request.names.iter_mut().chain(request.outputs.iter_mut().flat_map(|output| &mut output.names)) {
            *name = self.full_name(name);
        }
        for name in request.cache_references() {
            *name = self.full_name(name);
        }
        request
    }

    /// A name as people type it, as a reference; see [`Self::full_name`].
    pub fn reference(&self, name: &str) -> Result<Reference, Error> {
        Ok(self.full_name(name).parse::<Reference>()?)
    }
}

/// Steps at once, when a project wants no more than `most`. 0: one a processor.
fn lowered(parallel: usize, most: Option<usize>) -> usize {
    let now = if parallel == 0 { std::thread::available_parallelism().map_or(usize::MAX, usize::from) } else { parallel };
    most.filter(|most| *most < now).unwrap_or(parallel)
}

/// The registry of names that have none, if that is what a name would be read as.
fn default_registry(text: &str) -> Result<String, Error> {
    let is_registry = |name: &str| {
        let as_read = format!("{name}/name").parse::<Reference>();
        !name.bytes().any(|b| b.is_ascii_uppercase()) && as_read.is_ok_and(|read| read.registry() == name)
    };
    // As browsers give it. `http://` would promise what only `plain_http` does.
    let bare = text.strip_prefix("https://").map_or(text, |rest| rest.trim_end_matches('/'));
    let name = if bare.contains('/') || bare.is_empty() { bare.to_owned() } else { registry_name(bare) };
    if is_registry(&name) {
        return Ok(name);
    }
    Err(Error::new(Kind::Configuration, format!("the setting default_registry is {text:?}, which is not the name of a registry")).hint(
        "write host[:port] in lower case, with a dot or a port in it (or localhost), without http:// or a path; a path stands in registry_path",
    ))
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
        on: environment.get("OVENBIRD_ON").filter(|on| !on.is_empty()).map(Into::into),
        builder: environment.get("OVENBIRD_BUILDER").map(Into::into),
        default_registry: environment.get("OVENBIRD_DEFAULT_REGISTRY").filter(|name| !name.is_empty()).map(Into::into),
        registry_path: environment.get("OVENBIRD_REGISTRY_PATH").map(Into::into),
        ..FileSettings::default()
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

    fn load(vars: &[(&str, &str)], folder: &Path, flags: &Overrides) -> Result<Settings, Error> {
        let mut variables: BTreeMap<String, String> = vars.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        variables.entry("HOME".into()).or_insert("/h".into());
        Settings::load(&Environment::fixed(variables, folder, None), flags)
    }

    #[test]
    fn names_without_a_registry() {
        let none = tempfile::tempdir().unwrap();
        for (registry, path, name, expected) in [
            ("", "", "app", "app"),
            ("r.test:5000", "", "app:1", "r.test:5000/app:1"),
            ("r.test:5000", "team/images", "app:1", "r.test:5000/team/images/app:1"),
            ("r.test", "team", "org/app", "r.test/team/org/app"),
            ("r.test", "team", "other.test/app", "other.test/app"),
            ("r.test", "team", "localhost/app", "localhost/app"),
            ("r.test", "team", "app:{label:org.x/y}", "r.test/team/app:{label:org.x/y}"),
            ("r.test", "team", "o.test/app:{label:org.x/y}", "o.test/app:{label:org.x/y}"),
            ("r.test", "team", "localhost:5000/app", "localhost:5000/app"),
            ("r.test", "team", "docker.io/library/app", "docker.io/library/app"),
            ("r.test", "team", "HOST/app", "HOST/app"),
            ("", "me", "app", "docker.io/me/app"),
            ("https://r.test/", "/team/", "app", "r.test/team/app"),
        ] {
            let settings =
                load(&[("OVENBIRD_DEFAULT_REGISTRY", registry), ("OVENBIRD_REGISTRY_PATH", path)], none.path(), &Overrides::default())
                    .unwrap();
            assert_eq!(settings.full_name(name), expected, "{registry} {path}");
        }
    }

    #[test]
    fn options_of_a_registry_as_flags() {
        for (text, expected) in [
            ("h:5000,plain-http", "Some(plain)"),
            ("h:5000,plain-http=false,ca=c.pem,mirror=a,mirrors=b/p", "Some(ca=/work/c.pem mirrors=[\"a\", \"b/p\"])"),
            ("h:5000,transfers=2,requests_per_second=0.5,endpoint=127.0.0.1:1,create-repository", "Some(2 0.5 127.0.0.1:1 create)"),
            ("docker.io,credentials=anonymous", "Some() Anonymous"),
            ("https://h:5000/v2/,credentials=ecr", "Some() Ecr"),
            ("h:5000", "! \"h:5000\" is not HOST,key=value"),
            ("a=b,c=d", "! \"a=b,c=d\" is not HOST,key=value"),
            ("h,mirrors", "Some(mirrors=[\"true\"])"),
            ("h,colour=red", "! unknown field `colour`"),
            ("h,transfers=0", "! transfers is 0, so nothing could be moved; leave it out"),
            ("h,requests-per-second=0", "! requests_per_second is 0, expected a number above 0; leave it out for no limit"),
            ("http://a.com/x,plain-http", "! \"http://a.com/x\" is no registry"),
            ("h,transfers=-1", "! transfers=\"-1\": expected a number"),
            ("h,requests-per-second=NaN", "! requests_per_second=\"NaN\": expected a number"),
            ("h,plain-http=yes", "! plain_http=\"yes\": expected true or false"),
            ("h,credentials=magic", "! unknown variant `magic`"),
        ] {
            let got = match text.parse::<RegistryOption>() {
                Err(error) => format!("! {error}"),
                Ok(option) => {
                    let flags = Overrides { registries: vec![option], ..Overrides::default() };
                    let settings = load(&[], Path::new("/work"), &flags).unwrap();
                    let mut words = vec![];
                    let options = settings.registries.values().next().unwrap();
                    words.extend(options.plain_http.then(|| "plain".to_owned()));
                    words.extend(options.ca.as_ref().map(|ca| format!("ca={}", ca.display())));
                    words.extend((!options.mirrors.is_empty()).then(|| format!("mirrors={:?}", options.mirrors)));
                    words.extend(options.transfers.map(|n| n.to_string()));
                    words.extend(options.requests_per_second.map(|n| n.to_string()));
                    words.extend(options.endpoint.clone());
                    words.extend(options.create_repository.then(|| "create".to_owned()));
                    let source = settings.keychain.sources.values().next().map(|s| format!(" {s:?}")).unwrap_or_default();
                    format!("Some({}){}", words.join(" "), source.split('(').next().unwrap_or_default())
                }
            };
            assert!(got.starts_with(expected), "{text}: {got}");
        }
    }

    #[test]
    fn credentials_in_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c.toml");
        for (text, expected) in [
            ("'anonymous'", "Anonymous"),
            ("{ source = 'password', username = 'me', password_file = 'p' }", "PasswordFile { username: \"me\", path: \"DIR/p\" }"),
            (
                "{ source = 'password', username = 'me', password_variable = 'V' }",
                "PasswordVariable { username: \"me\", variable: \"V\", password: Some(Secret(…)) }",
            ),
            ("{ source = 'file', path = '/run/secret' }", "File(\"/run/secret\")"),
            ("{ source = 'helper', name = 'pass' }", "Helper(\"pass\")"),
            ("{ source = 'ecr', profile = 'ci' }", "Ecr(EcrOptions { profile: Some(\"ci\")"),
            ("{ source = 'google' }", "Google(GoogleOptions { key_file: Some(\"/from/environment\")"),
            (
                "{ source = 'azure', client_id = 'c' }",
                "Azure(AzureOptions { tenant: Some(\"t\"), client_id: Some(\"c\"), client_secret: Some(Secret(…))",
            ),
            (
                "{ source = 'password', username = 'me' }",
                "! the setting credentials of registry h.test cannot be used: one of password_file",
            ),
            ("{ source = 'password', username = 'me', password = 'hunter2' }", "a password does not stand in a settings file"),
            ("{ source = 'ecr', colour = 'red' }", "unknown field `colour`"),
            ("{ name = 'x' }", "missing field `source`"),
            ("7", "credentials is the name of a source"),
        ] {
            std::fs::write(&path, format!("[registry.'h.test']\ncredentials = {text}\n")).unwrap();
            let flags = Overrides { file: Some(path.clone()), ..Overrides::default() };
            let vars = [
                ("V", "hunter2"),
                ("GOOGLE_APPLICATION_CREDENTIALS", "/from/environment"),
                ("AZURE_TENANT_ID", "t"),
                ("AZURE_CLIENT_SECRET", "hunter2"),
            ];
            let got = match load(&vars, dir.path(), &flags) {
                Ok(settings) => format!("{:?}", settings.keychain.sources["h.test"]),
                Err(error) => format!("! {error}"),
            };
            let got = got.replace(&dir.path().display().to_string(), "DIR");
            assert!(got.contains(expected), "{text}: {got}");
            assert!(!got.contains("hunter2"), "{text}: {got}");
        }
    }

    #[test]
    fn a_project_says_only_what_harms_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let user = dir.path().join("user.toml");
        let project = dir.path().join("project");
        std::fs::create_dir(&project).unwrap();
        let file = project.join(".ovenbird.toml");
        let load = |trusted: bool, text: &str| {
            let trust = if trusted { format!("trusted_projects=[{:?}]\n", dir.path().display().to_string()) } else { String::new() };
            std::fs::write(&user, format!("{trust}parallel=1\n[registry.'h.test']\ntransfers=4\n")).unwrap();
            std::fs::write(&file, text).unwrap();
            let variables = [("HOME".to_owned(), "/h".to_owned())].into();
            Settings::load(&Environment::fixed(variables, &project, Some(user.clone())), &Overrides::default())
        };
        let settings = load(false, "parallel=7\nregistry_path='team'\n[registry.'h.test']\ntransfers=2\nrequests_per_second=5\n").unwrap();
        assert_eq!((settings.parallel, settings.registry_path.as_deref()), (1, Some("team")));
        assert_eq!((settings.registries["h.test"].transfers, settings.registries["h.test"].requests_per_second), (Some(2), Some(5.0)));
        // Nor does a name here make a registry one of the user's, for variables without a prefix.
        let settings = load(false, "[registry.'db.app']\ntransfers=1").unwrap();
        assert!(settings.keychain.named.iter().eq(["h.test"]) && settings.registries["db.app"].transfers == Some(1));
        assert_eq!(load(false, "[registry.'h.test']\ntransfers=99").unwrap().registries["h.test"].transfers, Some(4));
        for (text, refused) in [
            ("root='/x'", "root"),
            ("default_registry='evil.test'", "default_registry"),
            ("auth_files=['/etc/shadow']", "auth_files"),
            ("trusted_projects=['/']", "trusted_projects"),
            ("isolation_level='root'", "isolation_level"),
            ("[registry.'h.test']\nplain_http=true", "plain_http of registry h.test"),
            ("[registry.'h.test']\nca='evil.pem'", "ca of registry h.test"),
            ("[registry.'h.test']\nmirrors=['evil.test']", "mirrors of registry h.test"),
            ("[registry.'h.test']\nendpoint='evil.test'", "endpoint of registry h.test"),
            ("[registry.'h.test']\ncredentials={source='helper',name='x'}", "credentials of registry h.test"),
            ("[registry.'h.test']\ncreate_repository=true", "create_repository of registry h.test"),
        ] {
            let error = load(false, text).unwrap_err();
            assert!(error.kind == Kind::Configuration && error.message.ends_with(&format!("may not set: {refused}")), "{text}: {error}");
            // With the user's trust it is like a settings file of the user.
            assert!(load(true, text).is_ok(), "{text}");
        }
        // A link could show lines of another file in the reader's message.
        let secret = dir.path().join("secret");
        std::fs::write(&secret, "hunter2").unwrap();
        std::fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink(&secret, &file).unwrap();
        let variables = [("HOME".to_owned(), "/h".to_owned())].into();
        let error = Settings::load(&Environment::fixed(variables, &project, None), &Overrides::default()).unwrap_err();
        assert!(error.message.contains("cannot read the project's settings") && !format!("{error:?}").contains("hunter2"), "{error}");
    }

    #[test]
    fn a_project_lowers_the_number_of_steps() {
        let all = std::thread::available_parallelism().map_or(usize::MAX, usize::from);
        for (parallel, most, expected) in
            [(4, Some(2), 2), (4, Some(9), 4), (4, None, 4), (0, None, 0), (0, Some(usize::MAX), 0), (0, Some(all), 0), (2, Some(1), 1)]
        {
            assert_eq!(lowered(parallel, most), expected, "{parallel} {most:?}");
        }
    }

    #[test]
    fn values_that_cannot_be_used() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.toml");
        let flags = Overrides { file: Some(file.clone()), ..Overrides::default() };
        for (text, expected) in [
            ("default_registry='http://a.com'", "default_registry is \"http://a.com\", which is not"),
            ("default_registry='a.com/b'", "default_registry is \"a.com/b\", which is not"),
            ("default_registry=''", "default_registry is \"\", which is not"),
            ("default_registry='R.test'", "default_registry is \"R.test\", which is not"),
            // `plain/app` is a name on Docker Hub.
            ("default_registry='plain'", "default_registry is \"plain\", which is not"),
            ("default_registry='r.test:x'", "default_registry is \"r.test:x\", which is not"),
            ("[registry.'']\nca='x'", "settings of \"\", which is no registry"),
            ("[registry.'http://a.com/x']\nca='x'", "settings of \"http://a.com/x\", which is no registry"),
            ("[registry.'a b']\nca='x'", "settings of \"a b\", which is no registry"),
            ("[registry.a]\ntransfers=0", "settings of registry a that cannot be used: transfers is 0"),
            ("[registry.a]\nrequests_per_second=0", "requests_per_second is 0, expected a number above 0"),
            ("[registry.a]\nrequests_per_second=-1.5", "requests_per_second is -1.5, expected a number above 0"),
            ("[registry.a]\nrequests_per_second=nan", "requests_per_second is NaN, expected a number above 0"),
            ("[registry.a]\nmirrors=['http://bad/ x']", "http://bad/ x is not host[:port], or host[:port]/prefix for a mirror"),
            ("[registry.a]\nmirrors=['bad host']", "bad host is not host[:port], or host[:port]/prefix for a mirror"),
            ("[registry.a]\nmirrors=['h/../x']", "h/../x is not host[:port], or host[:port]/prefix for a mirror"),
            ("[registry.a]\nendpoint='ftp://h'", "\"ftp://h\", which is not [http[s]://]host[:port]"),
            ("[tags]\nunique=['{git.shaa}']", "has the unknown variable {git.shaa}"),
            ("[registry.a.tags]\nfloating=['late st']", "\"late st\" makes no tag"),
            ("[tags]\nprimary=['']", "\"\" makes no tag"),
            ("[tags]\nprimary=['a/b']", "\"a/b\" makes no tag"),
        ] {
            std::fs::write(&file, text).unwrap();
            let error = load(&[], dir.path(), &flags).unwrap_err();
            assert!(error.kind == Kind::Configuration && error.to_string().contains(expected), "{text}: {error}");
        }
        for (text, name) in [("r.test:5000", "r.test:5000"), ("localhost", "localhost"), ("index.docker.io", "docker.io")] {
            assert_eq!(default_registry(text).unwrap(), name);
        }
    }

    #[test]
    fn a_pipe_is_no_settings_file() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join(".ovenbird.toml");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RWXU, 0).unwrap();
        let explicit = Overrides { file: Some(pipe.clone()), ..Overrides::default() };
        for (folder, flags) in [(dir.path(), Overrides::default()), (Path::new("/work"), explicit)] {
            let error = load(&[], folder, &flags).unwrap_err();
            assert!(error.kind == Kind::Configuration && error.to_string().contains("it is no regular file"), "{error}");
        }
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
        std::fs::write(&path, "[registry.'x/org']\nplain_http = true").unwrap();
        assert!(load(&path).message.contains("settings of \"x/org\", which is no registry"));
        std::fs::write(&path, "[registry.x]\nmirror = ['a']").unwrap();
        assert_eq!(load(&path).hints, ["did you mean `mirrors`?"]);
        let missing = load(&dir.path().join("none.toml"));
        assert!(missing.kind == Kind::Configuration && missing.message.contains("cannot read the settings file"), "{missing}");
    }
}
