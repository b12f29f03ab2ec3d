//! What the user said: a build request. Serialisable, versioned, no secret values and nothing about this machine.
//!
//! It must not know how it is carried out. Names of environment variables and files stand for secrets; their bytes are read by
//! the builder when a step needs them.

pub mod build_json;
pub mod cache;
pub mod limit;
pub mod output;
pub mod remote;
pub mod secret;
pub mod tag;
pub mod workflow;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;

use ovenbird_oci::{Platform, Reference};
use serde::{Deserialize, Serialize};

pub use cache::{CacheDest, CacheFrom, CacheTo};
pub use limit::{ByteSize, Limits, Ulimit};
pub use output::{Dest, Output, OutputKind};
pub use remote::RemoteUrl;
pub use secret::{SecretOrigin, SecretSpec, SshSpec};
pub use workflow::{Phase, Workflow};

use crate::error::{Error, Kind};

/// Version of the request format that this program writes.
pub const VERSION: u32 = 1;

/// A value of the command line that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct ParseValueError {
    /// Why and what is expected.
    pub reason: String,
}

pub(crate) fn bad(reason: impl Into<String>) -> ParseValueError {
    ParseValueError { reason: reason.into() }
}

/// The main build context.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// A folder of this machine.
    Path(PathBuf),
    /// `-`: a tar (plain, gzip, bzip2, xz or zstd) or a Dockerfile on standard input.
    Stdin,
    /// A git repository, an archive or a Dockerfile on a web server, or an artifact in a registry or a layout.
    Remote(RemoteUrl),
}

impl FromStr for Source {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "" => return Err(bad("the build context is empty: give a folder (`.`), or `-` for standard input")),
            "-" => Self::Stdin,
            text => RemoteUrl::parse(text).map_or_else(|| Self::Path(text.into()), Self::Remote),
        })
    }
}

/// Where the Dockerfile is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DockerfileFrom {
    /// `Dockerfile` (or `dockerfile`) in the context.
    #[default]
    Default,
    /// This file: relative to the working directory, or inside the context when that is a tar on standard input.
    Path(PathBuf),
    /// `-f -`.
    Stdin,
}

/// `--build-context name=VALUE`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ContextSource {
    /// A folder.
    Path(PathBuf),
    /// `docker-image://REF` or `oci-layout://PATH[:TAG|@DIGEST]`, kept as written.
    Image(String),
    /// `target:STAGE`.
    Target(String),
    /// A git repository, an archive on a web server, or an artifact in a registry.
    Remote(RemoteUrl),
}

impl FromStr for ContextSource {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(stage) = text.strip_prefix("target:") {
            return Ok(Self::Target(stage.into()));
        }
        if let Some(name) = text.strip_prefix("docker-image://") {
            name.parse::<Reference>().map_err(|e| bad(e.to_string()))?;
            return Ok(Self::Image(text.into()));
        }
        if text.starts_with("oci-layout://") {
            return Ok(Self::Image(text.into()));
        }
        if let Some(url) = RemoteUrl::parse(text) {
            return Ok(Self::Remote(url));
        }
        if text.is_empty() {
            return Err(bad("a named context needs a value: a folder, a URL, docker-image://NAME, oci-layout://PATH or target:STAGE"));
        }
        Ok(Self::Path(text.into()))
    }
}

/// Network of every step that does not say otherwise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// The level's usual one.
    #[default]
    Default,
    /// Loopback only.
    None,
    /// The machine's own.
    Host,
}

/// `--add-host name:ip`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddHost {
    /// Host name.
    pub name: String,
    /// Address.
    pub address: IpAddr,
}

impl FromStr for AddHost {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let expected =
            || bad(format!("{text:?} is not a host entry: expected NAME:IP or NAME=IP, for example db:10.0.0.5 or db=[2001:db8::1]"));
        let (name, address) = text.split_once('=').or_else(|| text.split_once(':')).ok_or_else(expected)?;
        if address == "host-gateway" {
            return Err(bad("host-gateway is not supported: steps share the machine's network or have none; give the address itself"));
        }
        let address = address.strip_prefix('[').and_then(|a| a.strip_suffix(']')).unwrap_or(address);
        let valid = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
        match address.parse() {
            Ok(address) if valid => Ok(Self { name: name.into(), address }),
            _ => Err(expected()),
        }
    }
}

/// `--allow`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Entitlement {
    /// Steps may ask for `RUN --network=host`.
    #[serde(rename = "network.host")]
    NetworkHost,
    /// Steps may ask for `RUN --security=insecure`.
    #[serde(rename = "security.insecure")]
    SecurityInsecure,
}

impl Entitlement {
    /// As written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NetworkHost => "network.host",
            Self::SecurityInsecure => "security.insecure",
        }
    }
}

impl FromStr for Entitlement {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "network.host" => Ok(Self::NetworkHost),
            "security.insecure" => Ok(Self::SecurityInsecure),
            _ => Err(bad(format!("{text:?} is not an entitlement that can be allowed: expected network.host or security.insecure"))),
        }
    }
}

/// Where `--if-needed` looks for an image of the same content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Lookup {
    /// On this machine, then in the registry of the name.
    Registry,
    /// On this machine only.
    Local,
}

/// A build, as asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BuildRequest {
    /// Format version, [`VERSION`].
    pub version: u32,
    /// Build context.
    pub source: Source,
    /// Dockerfile.
    #[serde(default)]
    pub dockerfile: DockerfileFrom,
    /// `--build-context`.
    #[serde(default)]
    pub contexts: BTreeMap<String, ContextSource>,
    /// `-t`: image names.
    #[serde(default)]
    pub names: Vec<String>,
    /// `--target`.
    #[serde(default)]
    pub target: Option<String>,
    /// `--build-arg`.
    #[serde(default)]
    pub build_args: BTreeMap<String, String>,
    /// `--label`.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// `--annotation`, of the manifest.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
    /// `--platform`; empty: the machine's.
    #[serde(default)]
    pub platforms: Vec<Platform>,
    /// `--if-needed`: build only when no image of the same content is there.
    #[serde(default)]
    pub if_needed: Option<Lookup>,
    /// `--force`: with `if_needed`, build anyway.
    #[serde(default)]
    pub force: bool,
    /// `--no-cache`.
    #[serde(default)]
    pub no_cache: bool,
    /// `--no-cache-filter`: stages.
    #[serde(default)]
    pub no_cache_filter: Vec<String>,
    /// `--pull`.
    #[serde(default)]
    pub pull: bool,
    /// `--cache-from`: the first that has a result counts.
    #[serde(default)]
    pub cache_from: Vec<CacheFrom>,
    /// `--cache-to`.
    #[serde(default)]
    pub cache_to: Vec<CacheTo>,
    /// What to do with the image beside keeping it. Empty: keep it.
    #[serde(default)]
    pub outputs: Vec<Output>,
    /// `--secret`.
    #[serde(default)]
    pub secrets: Vec<SecretSpec>,
    /// `--allow-leak`: ids of secrets, and registries, whose secret may be in the image.
    #[serde(default)]
    pub allow_leak: Vec<String>,
    /// `--ssh`.
    #[serde(default)]
    pub ssh: Vec<SshSpec>,
    /// `--network`.
    #[serde(default)]
    pub network: Network,
    /// `--add-host`.
    #[serde(default)]
    pub add_hosts: Vec<AddHost>,
    /// `--dns`.
    #[serde(default)]
    pub dns: Vec<IpAddr>,
    /// `--hostname`.
    #[serde(default)]
    pub hostname: Option<String>,
    /// `--allow`.
    #[serde(default)]
    pub allow: Vec<Entitlement>,
    /// Limits of each step.
    #[serde(default)]
    pub limits: Limits,
    /// `--reproducible`: times are those of [`BuildRequest::source_date_epoch`], 1970 when nothing says otherwise.
    #[serde(default)]
    pub reproducible: bool,
    /// Steps at once; 0: one a processor.
    #[serde(default)]
    pub parallel: usize,
    /// Classes of tags, and tags of names without one, beside those of the settings.
    #[serde(default)]
    pub tags: tag::TagPolicy,
    /// `--plugin` and `--workflow`.
    #[serde(default)]
    pub workflow: Workflow,
}

impl BuildRequest {
    /// A request for `source` with nothing else said.
    pub fn new(source: Source) -> Self {
        Self {
            version: VERSION,
            source,
            dockerfile: DockerfileFrom::Default,
            contexts: BTreeMap::new(),
            names: vec![],
            target: None,
            build_args: BTreeMap::new(),
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            platforms: vec![],
            if_needed: None,
            force: false,
            no_cache: false,
            no_cache_filter: vec![],
            pull: false,
            cache_from: vec![],
            cache_to: vec![],
            outputs: vec![],
            secrets: vec![],
            allow_leak: vec![],
            ssh: vec![],
            network: Network::Default,
            add_hosts: vec![],
            dns: vec![],
            hostname: None,
            allow: vec![],
            limits: Limits::default(),
            reproducible: false,
            parallel: 0,
            tags: tag::TagPolicy::default(),
            workflow: Workflow::default(),
        }
    }

    /// Names of the caches in registries.
    pub fn cache_references(&mut self) -> impl Iterator<Item = &mut String> {
        let from = self.cache_from.iter_mut().filter_map(|from| if let CacheFrom::Registry(name) = from { Some(name) } else { None });
        let to = self.cache_to.iter_mut().filter_map(|to| if let CacheDest::Registry(name) = &mut to.dest { Some(name) } else { None });
        from.chain(to)
    }

    /// Reads a request from JSON; refuses versions and fields it does not know.
    pub fn from_json(text: &str) -> Result<Self, Error> {
        let request: Self =
            serde_json::from_str(text).map_err(|e| Error::from_chain(Kind::Usage, &e).while_doing("the build request cannot be read"))?;
        if request.version != VERSION {
            return Err(Error::new(
                Kind::Usage,
                format!("build request version {} is not supported: this program reads version {VERSION}", request.version),
            ));
        }
        Ok(request)
    }

    /// Time of everything in the image, seconds since 1970: build argument `SOURCE_DATE_EPOCH`, or 0 with `--reproducible`.
    pub fn source_date_epoch(&self) -> Result<Option<i64>, Error> {
        match self.build_args.get("SOURCE_DATE_EPOCH").map(String::as_str) {
            None | Some("") => Ok(self.reproducible.then_some(0)),
            // The time of the context's commit or download, where it has one, was put here when the source was fetched: a folder has none.
            Some(context) if context == "context" || self.contexts.contains_key(context) => Ok(self.reproducible.then_some(0)),
            Some(text) => text.parse().map(Some).map_err(|_| {
                Error::new(Kind::Usage, format!("SOURCE_DATE_EPOCH is {text:?}, expected a number of seconds since 1970"))
                    .hint("`SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)` takes the time of the last commit")
            }),
        }
    }

    /// Names of an output, parsed; those of the request when the output has none of its own.
    pub fn references(&self, output: Option<&Output>) -> Result<Vec<Reference>, Error> {
        let mut seen = vec![];
        for name in self.names_of(output) {
            let reference = self.reference(name)?;
            if !seen.contains(&reference) {
                seen.push(reference);
            }
        }
        Ok(seen)
    }

    /// The same build without names and caches: what decides the image.
    #[must_use]
    pub fn nameless(&self) -> Self {
        let outputs = self.outputs.iter().map(|output| Output { names: vec![], ..output.clone() }).collect();
        // What the image carries is part of it.
        let cache_to = self.cache_to.iter().filter(|to| to.dest == CacheDest::Inline).cloned().collect();
        Self { names: vec![], outputs, cache_from: vec![], cache_to, ..self.clone() }
    }

    /// Names of an output as they stand; those of the request when the output has none of its own.
    pub fn names_of<'a>(&'a self, output: Option<&'a Output>) -> &'a [String] {
        output.map(|o| &o.names).filter(|n| !n.is_empty()).unwrap_or(&self.names)
    }

    /// A name without variables, parsed.
    pub fn reference(&self, name: &str) -> Result<Reference, Error> {
        let reference: Reference = name.parse()?;
        if reference.digest().is_some() {
            return Err(Error::new(Kind::Usage, format!("{name:?} cannot name a new image: it has a digest"))
                .hint("the digest is the result of the build; give a name and a tag only"));
        }
        Ok(reference)
    }
}

/// `HOST_NAME_MAX` of Linux.
const HOSTNAME_MAX: usize = 64;

impl BuildRequest {
    /// Refuses a host name that no machine can have; the name also stands in the `/etc/hosts` of every step.
    pub fn check_hostname(&self) -> Result<(), ParseValueError> {
        let said =
            [("--hostname", self.hostname.as_ref()), ("BUILDKIT_SANDBOX_HOSTNAME", self.build_args.get("BUILDKIT_SANDBOX_HOSTNAME"))];
        for (option, name) in said.into_iter().filter_map(|(option, name)| Some((option, name?))) {
            let fits = name.len() <= HOSTNAME_MAX && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
            if !fits || name.starts_with(['-', '.']) {
                return Err(bad(format!(
                    "{option} {name:?} is not a host name: expected up to {HOSTNAME_MAX} letters, digits, dots, dashes and underscores, a letter or digit first"
                )));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_names() {
        for (name, fits) in [
            ("h", true),
            ("build-1.example.org", true),
            ("a_b", true),
            ("", true),
            (&"x".repeat(64), true),
            (&"x".repeat(65), false),
            ("a/b", false),
            ("a\0b", false),
            ("a b", false),
            ("a\n10.0.0.1 registry", false),
            ("-x", false),
            (".", false),
        ] {
            let mut request = BuildRequest::new(Source::Path(".".into()));
            request.hostname = Some(name.into());
            assert_eq!(request.check_hostname().is_ok(), fits, "{name:?}");
            let mut request = BuildRequest::new(Source::Path(".".into()));
            request.build_args.insert("BUILDKIT_SANDBOX_HOSTNAME".into(), name.into());
            assert_eq!(request.check_hostname().is_ok(), fits, "{name:?}");
        }
    }

    #[test]
    fn values() {
        fn check<T: FromStr<Err = ParseValueError> + std::fmt::Debug>(rows: &[(&str, &str)]) {
            for (input, expect) in rows {
                let got = match input.parse::<T>() {
                    Ok(value) => format!("{value:?}"),
                    Err(error) => format!("! {error}"),
                };
                assert!(got.contains(expect), "{input:?}: {got}");
            }
        }
        check::<Source>(&[
            (".", "Path(\".\")"),
            ("-", "Stdin"),
            ("", "! the build context is empty"),
            ("https://github.com/a/b.git", "Remote"),
            ("git@github.com:a/b", "Remote"),
        ]);
        check::<ContextSource>(&[
            ("../x", "Path(\"../x\")"),
            ("docker-image://debian:12", "Image(\"docker-image://debian:12\")"),
            ("docker-image://UPPER", "! "),
            ("oci-layout://./l:tag", "Image("),
            ("target:base", "Target(\"base\")"),
            ("https://x/y.tar", "Remote(\"https://x/y.tar\")"),
            ("", "! a named context needs a value"),
        ]);
        check::<AddHost>(&[
            ("a:1.2.3.4", "name: \"a\", address: 1.2.3.4"),
            ("a=1.2.3.4", "address: 1.2.3.4"),
            ("a:::1", "address: ::1"),
            ("a=[2001:db8::1]", "address: 2001:db8::1"),
            ("a:host-gateway", "! host-gateway is not supported"),
            ("a", "! \"a\" is not a host entry"),
            (":1.2.3.4", "is not a host entry"),
            ("a\nb:1.2.3.4", "is not a host entry"),
        ]);
        check::<Entitlement>(&[("network.host", "NetworkHost"), ("device", "! \"device\" is not an entitlement")]);
    }

    #[test]
    fn epoch() {
        for (reproducible, arg, expect) in [
            (false, None, Ok(None)),
            (true, None, Ok(Some(0))),
            (true, Some("5"), Ok(Some(5))),
            (false, Some("7"), Ok(Some(7))),
            (false, Some("context"), Ok(None)),
            (true, Some("context"), Ok(Some(0))),
            (false, Some("yesterday"), Err(())),
        ] {
            let mut request = BuildRequest::new(Source::Stdin);
            request.reproducible = reproducible;
            request.build_args.extend(arg.map(|a| ("SOURCE_DATE_EPOCH".to_owned(), a.to_owned())));
            assert_eq!(request.source_date_epoch().map_err(|_| ()), expect, "{arg:?}");
        }
    }

    #[test]
    fn json_round_trip_and_refusals() {
        let mut request = BuildRequest::new(Source::Path(".".into()));
        request.outputs.push("type=oci,dest=a.tar,compression=zstd".parse().unwrap());
        request.secrets.push("id=a,env=B".parse().unwrap());
        let text = serde_json::to_string(&request).unwrap();
        assert_eq!(BuildRequest::from_json(&text).unwrap(), request);
        assert!(BuildRequest::from_json(&text.replacen("\"version\":1", "\"version\":2", 1)).unwrap_err().message.contains("version 2"));
        assert!(BuildRequest::from_json(&text.replacen("\"pull\"", "\"pul\"", 1)).unwrap_err().to_string().contains("unknown field `pul`"));
    }
}
