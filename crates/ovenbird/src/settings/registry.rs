//! What settings say of one registry: `[registry."HOST"]` in a file, `--registry-option HOST,key=value` on the command line.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use ovenbird_oci::keychain::{KeychainOptions, Secret, Source};
use ovenbird_oci::registry::RegistryOptions;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _};

use super::environment::Environment;
use super::file::is_registry;
use crate::request::tag::TagPolicy;

/// `[registry."NAME"]`.
#[derive(Debug, Clone, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub(super) struct FileRegistry {
    mirrors: Option<Vec<String>>,
    endpoint: Option<String>,
    plain_http: Option<bool>,
    ca: Option<PathBuf>,
    client_identity: Option<PathBuf>,
    transfers: Option<usize>,
    requests_per_second: Option<f64>,
    create_repository: Option<bool>,
    pub(super) credentials: Option<FileSource>,
    pub(super) tags: Option<TagPolicy>,
}

impl FileRegistry {
    /// Lays `other` over this.
    pub(super) fn merge(&mut self, other: Self) {
        use super::file::over;
        over(&mut self.mirrors, other.mirrors);
        over(&mut self.endpoint, other.endpoint);
        over(&mut self.plain_http, other.plain_http);
        over(&mut self.ca, other.ca);
        over(&mut self.client_identity, other.client_identity);
        over(&mut self.transfers, other.transfers);
        over(&mut self.requests_per_second, other.requests_per_second);
        over(&mut self.create_repository, other.create_repository);
        over(&mut self.credentials, other.credentials);
        over(&mut self.tags, other.tags);
    }

    /// Lays the limits of `other` over this where they are lower, and nothing else.
    pub(super) fn narrow(&mut self, other: &Self) {
        self.transfers = self.transfers.into_iter().chain(other.transfers).filter(|n| *n > 0).min();
        let rates = self.requests_per_second.into_iter().chain(other.requests_per_second);
        self.requests_per_second = rates.filter(|n| *n > 0.0).reduce(f64::min);
    }

    /// What cannot be used, and how to put it right.
    pub(super) fn check(&self) -> Result<(), (String, &'static str)> {
        if self.transfers == Some(0) {
            return Err(("transfers is 0, so nothing could be moved".into(), "leave it out for the usual number"));
        }
        match self.requests_per_second {
            Some(rate) if !(rate.is_finite() && rate > 0.0) => {
                Err((format!("requests_per_second is {rate}, expected a number above 0"), "leave it out for no limit"))
            }
            _ => Ok(()),
        }
    }

    /// Makes paths absolute.
    pub(super) fn rebase(&mut self, dir: &Path) {
        let paths = self.credentials.as_mut().map(FileSource::paths).unwrap_or_default();
        for path in [&mut self.ca, &mut self.client_identity].into_iter().flatten().chain(paths) {
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
            transfers: file.transfers,
            requests_per_second: file.requests_per_second,
            endpoint: file.endpoint,
            create_repository: file.create_repository.unwrap_or(false),
        }
    }
}

/// `credentials = "ecr"`, or a table whose `source` says what else it may have.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct FileSource(Table);

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(tag = "source", rename_all = "kebab-case", deny_unknown_fields)]
enum Table {
    Anonymous {},
    /// Docker's and podman's files.
    Files {},
    Environment {},
    File {
        path: PathBuf,
    },
    Helper {
        name: String,
    },
    Password {
        username: String,
        password_file: Option<PathBuf>,
        password_variable: Option<String>,
    },
    Ecr {
        profile: Option<String>,
        region: Option<String>,
        endpoint: Option<String>,
    },
    Google {
        key_file: Option<PathBuf>,
        token_endpoint: Option<String>,
        metadata_host: Option<String>,
    },
    Azure {
        tenant: Option<String>,
        client_id: Option<String>,
        client_secret_file: Option<PathBuf>,
        federated_token_file: Option<PathBuf>,
        authority: Option<String>,
        metadata_endpoint: Option<String>,
    },
    Github {
        token_variable: Option<String>,
    },
    Openshift {
        token_file: Option<PathBuf>,
    },
}

impl<'de> Deserialize<'de> for FileSource {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let table = match toml::Value::deserialize(deserializer)? {
            toml::Value::String(source) => toml::Table::from_iter([("source".to_owned(), source.into())]),
            toml::Value::Table(table) => table,
            _ => return Err(D::Error::custom("credentials is the name of a source, or a table with `source`")),
        };
        if table.contains_key("password") {
            return Err(D::Error::custom("a password does not stand in a settings file: use password_file or password_variable"));
        }
        // Without the text around it: it could have a secret that is in the wrong place.
        toml::Value::Table(table).try_into().map(Self).map_err(|e| D::Error::custom(e.message()))
    }
}

impl FileSource {
    fn paths(&mut self) -> Vec<&mut PathBuf> {
        match &mut self.0 {
            Table::File { path } => vec![path],
            Table::Password { password_file, .. } => password_file.iter_mut().collect(),
            Table::Google { key_file, .. } => key_file.iter_mut().collect(),
            Table::Azure { client_secret_file, federated_token_file, .. } => {
                client_secret_file.iter_mut().chain(federated_token_file).collect()
            }
            Table::Openshift { token_file } => token_file.iter_mut().collect(),
            _ => vec![],
        }
    }

    /// With what the environment says for everything that is not said here.
    pub(super) fn resolve(self, known: &KeychainOptions, environment: &Environment) -> Result<Source, String> {
        Ok(match self.0 {
            Table::Anonymous {} => Source::Anonymous,
            Table::Files {} => Source::Files,
            Table::Environment {} => Source::Variables,
            Table::File { path } => Source::File(path),
            Table::Helper { name } => Source::Helper(name),
            Table::Password { username, password_file: Some(path), password_variable: None } => Source::PasswordFile { username, path },
            Table::Password { username, password_file: None, password_variable: Some(variable) } => {
                let password = environment.get(&variable).filter(|value| !value.is_empty()).map(Secret::new);
                Source::PasswordVariable { username, variable, password }
            }
            Table::Password { .. } => return Err("one of password_file and password_variable belongs to it".into()),
            Table::Ecr { profile, region, endpoint } => {
                let mut options = known.ecr.clone();
                options.profile = profile.or(options.profile);
                options.region = region.or(options.region);
                options.endpoint = endpoint.or(options.endpoint);
                Source::Ecr(options)
            }
            Table::Google { key_file, token_endpoint, metadata_host } => {
                let mut options = known.google.clone();
                options.key_file = key_file.or(options.key_file);
                options.token_endpoint = token_endpoint.or(options.token_endpoint);
                options.metadata_host = metadata_host.or(options.metadata_host);
                Source::Google(options)
            }
            Table::Azure { tenant, client_id, client_secret_file, federated_token_file, authority, metadata_endpoint } => {
                let mut options = known.azure.clone();
                if client_secret_file.is_some() || federated_token_file.is_some() {
                    options.client_secret = None;
                }
                options.tenant = tenant.or(options.tenant);
                options.client_id = client_id.or(options.client_id);
                options.client_secret_file = client_secret_file.or(options.client_secret_file);
                options.federated_token_file = federated_token_file.or(options.federated_token_file);
                options.authority = authority.or(options.authority);
                options.metadata_endpoint = metadata_endpoint.or(options.metadata_endpoint);
                Source::Azure(options)
            }
            Table::Github { token_variable } => {
                let mut options = known.github.clone();
                if let Some(variable) = token_variable {
                    options.token = environment.get(&variable).filter(|v| !v.is_empty()).map(|v| (variable, Secret::new(v)));
                }
                Source::Github(options)
            }
            Table::Openshift { token_file } => {
                let mut options = known.openshift.clone();
                options.token_file = token_file.or(options.token_file);
                Source::Openshift(options)
            }
        })
    }
}

/// `--registry-option HOST,key=value[,key=value…]`: the keys of `[registry."HOST"]`.
#[derive(Debug, Clone, PartialEq)]
pub struct RegistryOption {
    pub(super) registry: String,
    pub(super) values: FileRegistry,
}

impl FromStr for RegistryOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let registry = parts.next().unwrap_or_default().trim();
        if registry.is_empty() || registry.contains('=') || text.split(',').count() < 2 {
            return Err(format!("{text:?} is not HOST,key=value: expected something like localhost:5000,plain-http=true"));
        }
        if !is_registry(registry) {
            return Err(format!("{registry:?} is no registry: expected host[:port]"));
        }
        let mut table = toml::Table::new();
        for part in parts {
            let (key, value) = part.split_once('=').unwrap_or((part, "true"));
            let key = key.trim().replace('-', "_");
            let wrong = |expected: &str| format!("{key}={value:?}: expected {expected}");
            let value: toml::Value = match key.as_str() {
                "mirrors" | "mirror" => {
                    let list = table.entry("mirrors").or_insert_with(|| toml::Value::Array(vec![]));
                    list.as_array_mut().into_iter().for_each(|list| list.push(value.into()));
                    continue;
                }
                "plain_http" | "create_repository" => value.parse::<bool>().map_err(|_| wrong("true or false"))?.into(),
                "transfers" => i64::from(value.parse::<u32>().map_err(|_| wrong("a number"))?).into(),
                "requests_per_second" => {
                    value.parse::<f64>().ok().filter(|n| n.is_finite() && *n >= 0.0).ok_or_else(|| wrong("a number"))?.into()
                }
                _ => value.into(),
            };
            table.insert(key, value);
        }
        let values: FileRegistry = toml::Value::Table(table).try_into().map_err(|e| e.message().to_owned())?;
        values.check().map_err(|(what, hint)| format!("{what}; {hint}"))?;
        Ok(Self { registry: registry.to_owned(), values })
    }
}
