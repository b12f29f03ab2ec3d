//! What can be said of the cluster and the pod of a build: in `--on kubernetes,KEY=VALUE`, and in the settings.
//!
//! A value knows nothing of a cluster. What is said in the flag comes before what the settings say of the context, and that before what
//! they say of every context.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::Deserialize;

use crate::request::ParseValueError;

/// Resources that can be requested and limited.
const RESOURCES: [&str; 3] = ["cpu", "memory", "ephemeral-storage"];

/// Longest time that can be said: what the cluster counts in must hold it.
const MAX_SECONDS: u64 = 365 * 24 * 3600;

/// What a pod may do, by the names of the Pod Security Standards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Security {
    /// An ordinary user without any capability.
    #[default]
    Restricted,
    /// uid 0 with the capabilities that containers have by default.
    Baseline,
}

impl fmt::Display for Security {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Restricted => "restricted",
            Self::Baseline => "baseline",
        })
    }
}

/// A taint of nodes that the pod puts up with.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Toleration {
    /// The taint's key.
    pub key: String,
    /// Its value; `None`: any.
    pub value: Option<String>,
    /// `NoSchedule`, `PreferNoSchedule` or `NoExecute`; `None`: all.
    pub effect: Option<String>,
}

impl TryFrom<String> for Toleration {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no toleration: expected KEY[=VALUE][:NoSchedule|:PreferNoSchedule|:NoExecute]");
        let (taint, effect) = match text.rsplit_once(':') {
            Some((taint, effect @ ("NoSchedule" | "PreferNoSchedule" | "NoExecute"))) => (taint, Some(effect.to_owned())),
            Some(_) => return Err(wrong()),
            None => (text.as_str(), None),
        };
        let (key, value) = taint.split_once('=').map_or((taint, None), |(key, value)| (key, Some(value.to_owned())));
        if key.is_empty() {
            return Err(wrong());
        }
        Ok(Self { key: key.to_owned(), value, effect })
    }
}

impl fmt::Display for Toleration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.key)?;
        self.value.iter().try_for_each(|value| write!(f, "={value}"))?;
        self.effect.iter().try_for_each(|effect| write!(f, ":{effect}"))
    }
}

/// A time as it is written (`90s`, `1h30m`), in whole seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Time(u64);

impl Time {
    /// So many seconds.
    pub const fn of_seconds(seconds: u64) -> Self {
        Self(seconds)
    }

    /// In seconds.
    pub fn seconds(self) -> u64 {
        self.0
    }

    /// As a duration.
    pub fn duration(self) -> Duration {
        Duration::from_secs(self.0)
    }
}

impl TryFrom<String> for Time {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let nanos = ovenbird_dockerfile::duration::parse_nanos(&text).map_err(|error| error.to_string())?;
        let seconds = u64::try_from(nanos / 1_000_000_000).map_err(|_| format!("{text:?} is before it begins"))?;
        if seconds > MAX_SECONDS {
            return Err(format!("{text:?} is more than a year"));
        }
        Ok(Self(seconds))
    }
}

/// What is said of the cluster and the pod; what is not said is the next one's to say.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KubernetesPlace {
    /// Context of the kubeconfig.
    pub context: Option<String>,
    /// Namespace.
    pub namespace: Option<String>,
    /// Image whose entrypoint is `ovenbird`.
    pub image: Option<String>,
    /// What the pod may do.
    pub security: Option<Security>,
    /// Service account of the pod; it needs no rights.
    pub service_account: Option<String>,
    /// Priority class.
    pub priority_class: Option<String>,
    /// What the pod is promised.
    pub requests: BTreeMap<String, String>,
    /// What it must not exceed.
    pub limits: BTreeMap<String, String>,
    /// Labels that its node must have.
    pub node_selector: BTreeMap<String, String>,
    /// Taints of nodes that it puts up with.
    pub tolerations: Vec<Toleration>,
    /// Affinity, as the API has it.
    pub affinity: Option<serde_json::Value>,
    /// Secrets with credentials for the image.
    pub pull_secrets: Vec<String>,
    /// Volume claim that keeps the state of builds; `None`: it goes with the pod.
    pub claim: Option<String>,
    /// Secret with credentials for the registries of the build; `None`: the caller's.
    pub credentials: Option<String>,
    /// How long the build may take.
    pub timeout: Option<Time>,
    /// How long the pod may wait for a node and its image.
    pub start_timeout: Option<Time>,
    /// How long the ended job stays to be looked at.
    pub ttl: Option<Time>,
}

impl KubernetesPlace {
    /// Reads what follows `kubernetes,`.
    pub fn parse(text: &str) -> Result<Self, ParseValueError> {
        let mut place = Self::default();
        for part in text.split(',') {
            place.set(part).map_err(|why| ParseValueError { reason: format!("\"kubernetes,{text}\" is no place for a build: {why}") })?;
        }
        place.check().map_err(|why| ParseValueError { reason: format!("\"kubernetes,{text}\" is no place for a build: {why}") })?;
        Ok(place)
    }

    fn set(&mut self, part: &str) -> Result<(), String> {
        let unknown = || {
            format!(
                "{part:?} is not known; expected context, namespace, image, security, serviceaccount, priorityclass, requests.RESOURCE, \
                 limits.RESOURCE, nodeselector, toleration, pull-secret, claim, credentials, timeout, start-timeout or ttl, each with =VALUE"
            )
        };
        let (key, value) = part.split_once('=').filter(|(_, value)| !value.is_empty()).ok_or_else(unknown)?;
        let text = || Some(value.to_owned());
        let time = || Time::try_from(value.to_owned()).map(Some);
        match key {
            "context" => self.context = text(),
            "namespace" => self.namespace = text(),
            "image" => self.image = text(),
            "security" => {
                self.security = Some(match value {
                    "restricted" => Security::Restricted,
                    "baseline" => Security::Baseline,
                    _ => return Err(format!("security is restricted or baseline, not {value:?}")),
                });
            }
            "serviceaccount" => self.service_account = text(),
            "priorityclass" => self.priority_class = text(),
            "nodeselector" => {
                let (label, value) = value.split_once('=').ok_or_else(|| format!("{value:?} is no nodeselector: expected LABEL=VALUE"))?;
                self.node_selector.insert(label.to_owned(), value.to_owned());
            }
            "toleration" => self.tolerations.push(value.to_owned().try_into()?),
            "pull-secret" => self.pull_secrets.push(value.to_owned()),
            "claim" => self.claim = text(),
            "credentials" => self.credentials = text(),
            "timeout" => self.timeout = time()?,
            "start-timeout" => self.start_timeout = time()?,
            "ttl" => self.ttl = time()?,
            _ => {
                let (amounts, resource) = match key.split_once('.') {
                    Some(("requests", resource)) => (&mut self.requests, resource),
                    Some(("limits", resource)) => (&mut self.limits, resource),
                    _ => return Err(unknown()),
                };
                amounts.insert(resource.to_owned(), value.to_owned());
            }
        }
        Ok(())
    }

    /// What the cluster would refuse with a longer answer.
    pub fn check(&self) -> Result<(), String> {
        for (what, amounts) in [("requests", &self.requests), ("limits", &self.limits)] {
            for (resource, amount) in amounts {
                if !RESOURCES.contains(&resource.as_str()) {
                    return Err(format!("{what}.{resource} is not known; expected {}", RESOURCES.join(", ")));
                }
                if !is_quantity(amount) {
                    return Err(format!("{what}.{resource} is {amount:?}, expected an amount like 500m, 2 or 2Gi"));
                }
            }
        }
        if let Some(image) = &self.image {
            image.parse::<ovenbird_oci::Reference>().map_err(|error| error.to_string())?;
        }
        let names = [&self.namespace, &self.service_account, &self.priority_class, &self.claim, &self.credentials].into_iter().flatten();
        if let Some(name) = names.chain(&self.pull_secrets).find(|name| !is_name(name)) {
            return Err(format!("{name:?} is no name in Kubernetes: expected small letters, digits, '-' and '.'"));
        }
        if self.timeout.is_some_and(|time| time.seconds() == 0) {
            return Err("timeout is 0s: no build is that fast".into());
        }
        if let Some(affinity) = &self.affinity {
            serde_json::from_value::<k8s_openapi::api::core::v1::Affinity>(affinity.clone())
                .map_err(|error| format!("affinity is not one of Kubernetes: {error}"))?;
        }
        Ok(())
    }

    /// This where it says something, else `other`. Maps are merged by key.
    #[must_use]
    pub fn over(self, other: &Self) -> Self {
        let merged = |mine: BTreeMap<String, String>, other: &BTreeMap<String, String>| {
            let mut all = other.clone();
            all.extend(mine);
            all
        };
        let listed = |mine: Vec<String>, other: &Vec<String>| if mine.is_empty() { other.clone() } else { mine };
        Self {
            context: self.context.or_else(|| other.context.clone()),
            namespace: self.namespace.or_else(|| other.namespace.clone()),
            image: self.image.or_else(|| other.image.clone()),
            security: self.security.or(other.security),
            service_account: self.service_account.or_else(|| other.service_account.clone()),
            priority_class: self.priority_class.or_else(|| other.priority_class.clone()),
            requests: merged(self.requests, &other.requests),
            limits: merged(self.limits, &other.limits),
            node_selector: merged(self.node_selector, &other.node_selector),
            tolerations: if self.tolerations.is_empty() { other.tolerations.clone() } else { self.tolerations },
            affinity: self.affinity.or_else(|| other.affinity.clone()),
            pull_secrets: listed(self.pull_secrets, &other.pull_secrets),
            claim: self.claim.or_else(|| other.claim.clone()),
            credentials: self.credentials.or_else(|| other.credentials.clone()),
            timeout: self.timeout.or(other.timeout),
            start_timeout: self.start_timeout.or(other.start_timeout),
            ttl: self.ttl.or(other.ttl),
        }
    }
}

impl fmt::Display for KubernetesPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut one = |key: &str, value: &dyn fmt::Display| write!(f, ",{key}={value}");
        for (key, value) in [("context", &self.context), ("namespace", &self.namespace), ("image", &self.image)] {
            value.iter().try_for_each(|value| one(key, value))?;
        }
        self.security.iter().try_for_each(|value| one("security", value))?;
        for (key, value) in [("serviceaccount", &self.service_account), ("priorityclass", &self.priority_class)] {
            value.iter().try_for_each(|value| one(key, value))?;
        }
        for (what, amounts) in [("requests", &self.requests), ("limits", &self.limits)] {
            amounts.iter().try_for_each(|(resource, amount)| one(&format!("{what}.{resource}"), amount))?;
        }
        self.node_selector.iter().try_for_each(|(label, value)| one("nodeselector", &format!("{label}={value}")))?;
        self.tolerations.iter().try_for_each(|toleration| one("toleration", toleration))?;
        self.pull_secrets.iter().try_for_each(|secret| one("pull-secret", secret))?;
        for (key, value) in [("claim", &self.claim), ("credentials", &self.credentials)] {
            value.iter().try_for_each(|value| one(key, value))?;
        }
        for (key, time) in [("timeout", self.timeout), ("start-timeout", self.start_timeout), ("ttl", self.ttl)] {
            time.iter().try_for_each(|time| one(key, &format!("{}s", time.seconds())))?;
        }
        Ok(())
    }
}

/// What the settings say of clusters: `[kubernetes]`, and `[kubernetes.contexts.NAME]`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(try_from = "toml::Table")]
pub struct KubernetesSettings {
    /// Of every context.
    pub all: KubernetesPlace,
    /// Of one context.
    pub contexts: BTreeMap<String, KubernetesPlace>,
}

impl TryFrom<toml::Table> for KubernetesSettings {
    type Error = String;

    fn try_from(mut table: toml::Table) -> Result<Self, String> {
        let contexts = table.remove("contexts").map(toml::Value::try_into::<BTreeMap<String, toml::Table>>).transpose();
        let contexts = contexts.map_err(|error| error.message().to_owned())?.unwrap_or_default();
        let place = |table: toml::Table| -> Result<KubernetesPlace, String> {
            let place: KubernetesPlace =
                toml::Value::Table(table).try_into().map_err(|error: toml::de::Error| error.message().to_owned())?;
            place.check().map(|()| place)
        };
        let contexts = contexts.into_iter().map(|(name, table)| place(table).map(|place| (name, place)));
        Ok(Self { all: place(table)?, contexts: contexts.collect::<Result<_, _>>()? })
    }
}

impl KubernetesSettings {
    /// Lays `other` over this.
    pub(crate) fn merge(&mut self, other: Self) {
        self.all = other.all.over(&self.all);
        for (name, place) in other.contexts {
            let merged = match self.contexts.get(&name) {
                Some(mine) => place.over(mine),
                None => place,
            };
            self.contexts.insert(name, merged);
        }
    }

    /// What counts for a build: what was said, what the settings say of the context, and what they say of all.
    pub fn resolve(&self, said: &KubernetesPlace) -> KubernetesPlace {
        let context = said.context.as_ref().or(self.all.context.as_ref());
        match context.and_then(|context| self.contexts.get(context)) {
            Some(own) => said.clone().over(own).over(&self.all),
            None => said.clone().over(&self.all),
        }
    }
}

/// Source: Kubernetes API conventions, "Quantity".
fn is_quantity(text: &str) -> bool {
    let digits = text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
    let number = &text[..text.len() - digits.len()];
    let suffix = matches!(digits, "" | "m" | "k" | "M" | "G" | "T" | "P" | "E" | "Ki" | "Mi" | "Gi" | "Ti" | "Pi" | "Ei");
    number.parse::<f64>().is_ok_and(f64::is_finite) && suffix
}

/// Source: RFC 1123 names, as Kubernetes takes them for objects.
fn is_name(text: &str) -> bool {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
    let end = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    text.len() <= 253 && text.chars().all(inner) && text.starts_with(end) && text.ends_with(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        for (text, expect) in [
            ("namespace=ci", ",namespace=ci"),
            (
                "context=prod,namespace=ci,image=r.test/o:1,security=baseline",
                ",context=prod,namespace=ci,image=r.test/o:1,security=baseline",
            ),
            ("limits.memory=2Gi,requests.cpu=500m", ",requests.cpu=500m,limits.memory=2Gi"),
            ("nodeselector=disk=ssd,nodeselector=a.b/c=", ",nodeselector=a.b/c=,nodeselector=disk=ssd"),
            ("toleration=dedicated=builds:NoSchedule,toleration=x", ",toleration=dedicated=builds:NoSchedule,toleration=x"),
            ("timeout=1h30m,start-timeout=5s,ttl=0s", ",timeout=5400s,start-timeout=5s,ttl=0s"),
            ("pull-secret=a,pull-secret=b,claim=c,credentials=d", ",pull-secret=a,pull-secret=b,claim=c,credentials=d"),
            ("namespace", "! \"namespace\" is not known"),
            ("namespace=", "! \"namespace=\" is not known"),
            ("namespace=A", "! \"A\" is no name"),
            ("namespace=../x", "! \"../x\" is no name"),
            ("limits.gpu=1", "! limits.gpu is not known"),
            ("limits.memory=2GB", "! limits.memory is \"2GB\""),
            ("limits.memory=inf", "! limits.memory is \"inf\""),
            ("security=privileged", "! security is restricted or baseline"),
            ("toleration==x", "! \"=x\" is no toleration"),
            ("toleration=a:Never", "! \"a:Never\" is no toleration"),
            ("timeout=0s", "! timeout is 0s"),
            ("timeout=5", "! invalid duration"),
            ("ttl=99999h", "! \"99999h\" is more than a year"),
            ("image=A", "! "),
            ("x=1", "! \"x=1\" is not known"),
        ] {
            let got = KubernetesPlace::parse(text)
                .map_or_else(|error| format!("! {}", error.reason.split_once(": ").unwrap().1), |p| p.to_string());
            assert!(got.starts_with(expect), "{text}: {got}");
        }
    }

    #[test]
    fn what_the_settings_say() {
        let of = |text: &str| KubernetesSettings::try_from(text.parse::<toml::Table>().unwrap());
        let settings = of("image='r.test/o:1'\ntolerations=['a=b:NoSchedule']\ntimeout='1m'\nlimits={cpu='1'}\n\
             affinity={podAffinity={requiredDuringSchedulingIgnoredDuringExecution=[]}}\n[contexts.prod]\nsecurity='baseline'")
        .unwrap();
        assert_eq!(settings.all.to_string(), ",image=r.test/o:1,limits.cpu=1,toleration=a=b:NoSchedule,timeout=60s");
        assert!(settings.all.affinity.is_some());
        assert_eq!(settings.contexts["prod"].to_string(), ",security=baseline");
        for (text, expect) in [
            ("imag='x'", "unknown field `imag`"),
            ("limits={gpu='1'}", "limits.gpu is not known"),
            ("timeout='x'", "invalid duration"),
            ("affinity={nodeAffinity=1}", "affinity is not one of Kubernetes"),
            ("contexts=1", "invalid type"),
            ("[contexts.a]\nsecurity='none'", "unknown variant `none`"),
        ] {
            let error = of(text).unwrap_err();
            assert!(error.contains(expect), "{text}: {error}");
        }
    }

    #[test]
    fn explicit_then_context_then_all() {
        let of = |text: &str| KubernetesPlace::parse(text).unwrap();
        let settings = KubernetesSettings {
            all: of("context=prod,namespace=all,limits.cpu=1,limits.memory=1Gi,image=r.test/all:1"),
            contexts: BTreeMap::from([("prod".into(), of("namespace=prod,limits.cpu=2")), ("dev".into(), of("namespace=dev"))]),
        };
        for (said, expect) in [
            ("ttl=1s", ",context=prod,namespace=prod,image=r.test/all:1,limits.cpu=2,limits.memory=1Gi,ttl=1s"),
            ("context=dev", ",context=dev,namespace=dev,image=r.test/all:1,limits.cpu=1,limits.memory=1Gi"),
            ("context=none,namespace=x,image=r.test/a:1", ",context=none,namespace=x,image=r.test/a:1,limits.cpu=1,limits.memory=1Gi"),
        ] {
            assert_eq!(settings.resolve(&of(said)).to_string(), expect, "{said}");
        }
    }
}
