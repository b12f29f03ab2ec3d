//! Images that run: what is to run, and what became of it. The places where they run are modules of their own.
//!
//! A declaration is a value that a file can hold; it names an image as people do. What runs is always one digest.

pub mod kubernetes;

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use ovenbird_oci::Reference;
use ovenbird_oci::registry::Client;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind};
use crate::request::ParseValueError;
use crate::settings::Settings;

pub use kubernetes::KubernetesDeployer;

/// Most replicas: more is a slip of the finger.
const MAX_REPLICAS: u32 = 1000;

/// `80`, `80:8080`, `53/udp`: what is asked for, what the container listens at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Port {
    /// Of the service.
    pub port: u16,
    /// Of the container.
    pub target: u16,
    /// Not TCP.
    pub udp: bool,
}

impl FromStr for Port {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || ParseValueError { reason: format!("{text:?} is no port: expected PORT or PORT:TARGET, with /udp for UDP") };
        let (numbers, udp) = match text.split_once('/') {
            None | Some((_, "tcp")) => (text.split('/').next().unwrap_or_default(), false),
            Some((numbers, "udp")) => (numbers, true),
            Some(_) => return Err(wrong()),
        };
        let (port, target) = numbers.split_once(':').unwrap_or((numbers, numbers));
        let number = |text: &str| text.parse::<u16>().ok().filter(|number| *number > 0).ok_or_else(wrong);
        Ok(Self { port: number(port)?, target: number(target)?, udp })
    }
}

impl TryFrom<String> for Port {
    type Error = ParseValueError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

/// How a service is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reach {
    /// From inside the cluster.
    #[default]
    ClusterIp,
    /// At a port of every node.
    NodePort,
    /// Through a load balancer of the cluster's provider.
    LoadBalancer,
}

impl FromStr for Reach {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "clusterip" => Self::ClusterIp,
            "nodeport" => Self::NodePort,
            "loadbalancer" => Self::LoadBalancer,
            _ => {
                return Err(ParseValueError {
                    reason: format!("{text:?} is no way to reach a service: expected clusterip, nodeport or loadbalancer"),
                });
            }
        })
    }
}

/// What is to run.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Declaration {
    /// Its name.
    pub name: String,
    /// The image, as people name it.
    pub image: String,
    /// How many.
    #[serde(default = "one")]
    pub replicas: u32,
    /// Where it listens.
    #[serde(default)]
    pub ports: Vec<Port>,
    /// How its ports are reached.
    #[serde(default)]
    pub service: Reach,
    /// Variables. No secrets: everybody who may look at what runs sees them.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Secrets of the place whose keys become variables.
    #[serde(default)]
    pub env_secrets: Vec<String>,
    /// Secrets of the place with credentials for the image.
    #[serde(default)]
    pub pull_secrets: Vec<String>,
    /// What each is promised: `cpu`, `memory`, `ephemeral-storage`.
    #[serde(default)]
    pub requests: BTreeMap<String, String>,
    /// What each must not exceed.
    #[serde(default)]
    pub limits: BTreeMap<String, String>,
    /// Instead of the image's command.
    #[serde(default)]
    pub args: Vec<String>,
}

fn one() -> u32 {
    1
}

impl Declaration {
    /// One with nothing else said.
    pub fn new(name: impl Into<String>, image: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            image: image.into(),
            replicas: 1,
            ports: vec![],
            service: Reach::default(),
            env: BTreeMap::new(),
            env_secrets: vec![],
            pull_secrets: vec![],
            requests: BTreeMap::new(),
            limits: BTreeMap::new(),
            args: vec![],
        }
    }

    /// From the text of a file (TOML).
    pub fn from_toml(text: &str) -> Result<Self, Error> {
        toml::from_str(text).map_err(|error| Error::from_chain(Kind::Configuration, &error).while_doing("the declaration cannot be read"))
    }

    /// Refuses what no place can have.
    pub fn check(&self) -> Result<(), Error> {
        check_name(&self.name)?;
        if self.replicas > MAX_REPLICAS {
            return Err(Error::new(Kind::Usage, format!("{} replicas are more than {MAX_REPLICAS}", self.replicas)));
        }
        for (at, port) in self.ports.iter().enumerate() {
            if self.ports[..at].iter().any(|other| (other.port, other.udp) == (port.port, port.udp)) {
                return Err(Error::new(Kind::Usage, format!("the port {} is there twice", port.port)));
            }
        }
        if let Some(name) = self.env.keys().find(|name| !is_variable(name)) {
            return Err(Error::new(Kind::Usage, format!("{name:?} is no name of a variable")));
        }
        Ok(())
    }
}

fn is_variable(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with(|c: char| c.is_ascii_digit())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

/// A name that a service can have. Source: RFC 1035, labels.
pub fn check_name(name: &str) -> Result<(), Error> {
    let plain = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if plain && name.len() <= 63 && name.starts_with(|c: char| c.is_ascii_lowercase()) && !name.ends_with('-') {
        return Ok(());
    }
    Err(Error::new(Kind::Usage, format!("{name:?} is no name for a deployment"))
        .hint("up to 63 small letters, digits and dashes, a letter first and no dash last"))
}

/// The digest that a name means now, in its registry: what runs does not change when the name does.
pub fn pinned(image: &str, settings: &Settings) -> Result<Reference, Error> {
    let reference = settings.reference(image)?;
    if reference.digest().is_some() {
        return Ok(reference);
    }
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| Error::from_chain(Kind::Bug, &error))?;
    let found = runtime.block_on(Client::new(settings.client_options()).look(&reference))?;
    match found {
        Some(found) => Ok(format!("{}/{}@{}", reference.registry(), reference.repository(), found.digest).parse()?),
        None => Err(Error::new(Kind::Registry, format!("there is no image {} in its registry", reference.familiar()))
            .hint(format!("`ovenbird push {}` puts one of this machine there; nodes pull from registries only", reference.familiar()))),
    }
}

/// How something that was deployed is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// There is nothing.
    NotDeployed,
    /// On its way.
    Starting,
    /// All of it runs.
    Running,
    /// It is to have no replicas.
    Stopped,
    /// It ends again and again, or cannot begin.
    Crashed,
}

impl State {
    /// As it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotDeployed => "not_deployed",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Crashed => "crashed",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a place says of a deployment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// How it is.
    pub state: State,
    /// How many there should be.
    pub replicas: u32,
    /// How many are ready, of the newest image.
    pub ready: u32,
    /// What runs, by digest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Where it is reached.
    pub addresses: Vec<String>,
    /// Why it is not better.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_and_names() {
        for (text, expect) in [
            ("8080", "8080>8080 false"),
            ("80:8080", "80>8080 false"),
            ("53/udp", "53>53 true"),
            ("80:8080/tcp", "80>8080 false"),
            ("0", "! \"0\" is no port"),
            ("a", "! \"a\" is no port"),
            ("1:2:3", "! "),
            ("80/sctp", "! "),
            ("", "! "),
            ("70000", "! "),
        ] {
            let got = text.parse::<Port>().map_or_else(|e| format!("! {e}"), |p| format!("{}>{} {}", p.port, p.target, p.udp));
            assert!(got.starts_with(expect), "{text}: {got}");
        }
        for (name, good) in [
            ("app", true),
            ("a-1", true),
            ("1a", false),
            ("A", false),
            ("a-", false),
            ("", false),
            (&"a".repeat(64), false),
            ("a_b", false),
        ] {
            assert_eq!(check_name(name).is_ok(), good, "{name}");
        }
    }

    #[test]
    fn declarations() {
        let text = "name='app'\nimage='r.test/app:1'\nports=['80:8080']\nservice='nodeport'\n[env]\nA='b'\n[limits]\nmemory='64Mi'\n";
        let declared = Declaration::from_toml(text).unwrap();
        assert_eq!((declared.replicas, declared.ports[0].target, declared.service), (1, 8080, Reach::NodePort));
        assert!(declared.check().is_ok());
        for (text, expect) in [
            ("name='app'\nimage='a'\nreplica=2", "unknown field `replica`"),
            ("name='app'\nimage='a'\nports=['x']", "\"x\" is no port"),
            ("name='A'\nimage='a'", "\"A\" is no name for a deployment"),
            ("name='a'\nimage='a'\nreplicas=5000", "5000 replicas"),
            ("name='a'\nimage='a'\nports=['80','80:81']", "the port 80 is there twice"),
            ("name='a'\nimage='a'\n[env]\n'A B'='x'", "\"A B\" is no name of a variable"),
        ] {
            let error = Declaration::from_toml(text).and_then(|declared| declared.check()).unwrap_err();
            assert!(error.to_string().contains(expect), "{text}: {error}");
        }
    }
}
