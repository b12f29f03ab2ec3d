//! Variables: the environment of a stage, global `ARG`s, the predefined arguments, and what was not consumed.

use std::collections::{BTreeMap, BTreeSet};

use ovenbird_dockerfile::ast::{Dockerfile, Kind};
use ovenbird_dockerfile::expand::Env;
use ovenbird_dockerfile::lint::PREDEFINED_GLOBAL_ARGS;
use ovenbird_oci::Platform;

use super::Options;

/// `NAME=value` pairs in the order of their first definition. A later definition keeps the place.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Variables {
    pairs: Vec<(String, String)>,
    index: BTreeMap<String, usize>,
}

impl Variables {
    pub(super) fn set(&mut self, name: &str, value: &str) {
        if let Some(&at) = self.index.get(name) {
            value.clone_into(&mut self.pairs[at].1);
        } else {
            self.index.insert(name.to_owned(), self.pairs.len());
            self.pairs.push((name.to_owned(), value.to_owned()));
        }
    }

    pub(super) fn lookup(&self, name: &str) -> Option<&str> {
        self.index.get(name).map(|&at| self.pairs[at].1.as_str())
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.pairs.iter().map(|(name, _)| name.as_str())
    }

    /// `NAME=value`, in order.
    pub(super) fn to_strings(&self) -> Vec<String> {
        self.pairs.iter().map(|(name, value)| format!("{name}={value}")).collect()
    }
}

impl Env for Variables {
    fn get(&self, name: &str) -> Option<String> {
        self.lookup(name).map(str::to_owned)
    }
}

/// Variables with some of them hidden behind other values (secrets given as variables).
pub(super) struct Masked<'a> {
    pub(super) base: &'a Variables,
    pub(super) masked: &'a BTreeSet<String>,
}

impl Env for Masked<'_> {
    fn get(&self, name: &str) -> Option<String> {
        if self.masked.contains(name) { Some("****".into()) } else { self.base.get(name) }
    }
}

/// Splits `NAME=value` of an image's environment.
pub(super) fn split_pair(pair: &str) -> (&str, &str) {
    pair.split_once('=').unwrap_or((pair, ""))
}

/// Arguments that every Dockerfile has without declaring them before `FROM`. `--build-arg` overrides each.
pub(super) fn predefined(options: &Options, target: &str) -> Variables {
    let mut variables = Variables::default();
    let mut put = |name: &str, value: &str| {
        variables.set(name, options.build_args.get(name).map_or(value, String::as_str));
    };
    let mut platform = |prefix: &str, platform: &Platform| {
        put(&format!("{prefix}PLATFORM"), &platform.to_string());
        put(&format!("{prefix}OS"), &platform.os);
        put(&format!("{prefix}OSVERSION"), platform.os_version.as_deref().unwrap_or_default());
        put(&format!("{prefix}ARCH"), &platform.architecture);
        put(&format!("{prefix}VARIANT"), platform.variant.as_deref().unwrap_or_default());
    };
    platform("BUILD", &options.build_platform);
    platform("TARGET", &options.platform);
    put("TARGETSTAGE", if target.is_empty() { "default" } else { target });
    variables
}

const PROXIES: [&str; 5] = ["HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "NO_PROXY", "ALL_PROXY"];

/// Proxy variables of the build arguments, each in upper and lower case.
pub(super) fn proxy_env(build_args: &BTreeMap<String, String>) -> Vec<String> {
    PROXIES
        .iter()
        .filter_map(|proxy| {
            // Byte order puts upper case first, so a lower-case argument wins when both are given.
            let (_, value) = build_args.iter().rfind(|(name, _)| name.eq_ignore_ascii_case(proxy))?;
            Some([format!("{proxy}={value}"), format!("{}={value}", proxy.to_ascii_lowercase())])
        })
        .flatten()
        .collect()
}

/// Build arguments that no `ARG` of the file takes and that the builder does not know either.
pub(super) fn unconsumed(dockerfile: &Dockerfile, options: &Options) -> Vec<String> {
    let instructions = dockerfile.global_args.iter().chain(dockerfile.stages.iter().flat_map(|s| &s.instructions));
    let declared: BTreeSet<&str> = instructions
        .filter_map(|i| match &i.kind {
            Kind::Arg(args) => Some(args.iter().map(|a| a.name.as_str())),
            _ => None,
        })
        .flatten()
        .collect();
    let builtin = |name: &str| {
        PREDEFINED_GLOBAL_ARGS.contains(&name)
            || name.starts_with("BUILDKIT_")
            || name == "SOURCE_DATE_EPOCH"
            || PROXIES.iter().any(|proxy| name.eq_ignore_ascii_case(proxy))
    };
    options.build_args.keys().filter(|name| !declared.contains(name.as_str()) && !builtin(name)).cloned().collect()
}

/// Keys that configure the scanner of bills of materials: never in the environment of a step.
pub(super) fn is_scanner_key(name: &str) -> bool {
    matches!(name, "BUILDKIT_SBOM_SCAN_CONTEXT" | "BUILDKIT_SBOM_SCAN_STAGE")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proxies_come_in_both_cases() {
        let args = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        assert_eq!(proxy_env(&args(&[("http_proxy", "a"), ("FOO", "b")])), ["HTTP_PROXY=a", "http_proxy=a"]);
        assert_eq!(proxy_env(&args(&[("HTTP_PROXY", "a"), ("http_proxy", "b")])), ["HTTP_PROXY=b", "http_proxy=b"]);
        assert!(proxy_env(&args(&[("FOO", "b")])).is_empty());
    }
}
