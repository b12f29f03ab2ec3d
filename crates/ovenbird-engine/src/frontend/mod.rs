//! Dockerfile to plan. Pure: images are asked for as data ([`Lowered::Needs`]) and come back resolved.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ovenbird_dockerfile::{Diagnostic, Dockerfile};
use ovenbird_oci::Platform;

use crate::plan::{ImageRequest, NetworkMode, Plan, ResolvedImage};

/// What `--no-cache` and `--no-cache-filter` say.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum NoCache {
    /// Use the cache.
    #[default]
    Off,
    /// No step from the cache.
    All,
    /// These stages not.
    Stages(Vec<String>),
}

/// `--build-context name=…`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NamedContext {
    /// A folder, given to the engine under the same name.
    Local,
    /// `docker-image://REF` or `oci-layout://PATH`: an image request name.
    Image(String),
    /// `target:STAGE`.
    Target(String),
}

/// Everything but the text that decides the plan.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// `--target`; the last stage if absent.
    pub target: Option<String>,
    /// `--build-arg`.
    pub build_args: BTreeMap<String, String>,
    /// `--label`.
    pub labels: BTreeMap<String, String>,
    /// Target platform.
    pub platform: Platform,
    /// Platform of the machine.
    pub build_platform: Platform,
    /// More than one platform is built.
    pub multi_platform: bool,
    /// Cache use.
    pub no_cache: NoCache,
    /// Named contexts.
    pub contexts: BTreeMap<String, NamedContext>,
    /// `--network` of the build.
    pub network: NetworkMode,
    /// `--hostname`.
    pub hostname: Option<String>,
    /// `--add-host`.
    pub add_hosts: Vec<(String, IpAddr)>,
    /// `--allow` entitlements: `network.host`, `security.insecure`.
    pub entitlements: Vec<String>,
}

/// Images known so far.
pub type Images = BTreeMap<ImageRequest, ResolvedImage>;

/// Result of [`lower`].
#[derive(Debug, Clone, PartialEq)]
pub enum Lowered {
    /// Resolve these and call again.
    Needs(Vec<ImageRequest>),
    /// Ready. Warnings beside the plan.
    Done(Box<Plan>, Vec<Diagnostic>),
}

/// Lowers a parsed Dockerfile. `text` is what the spans point into.
pub fn lower(_dockerfile: &Dockerfile, _text: &str, _options: &Options, _images: &Images) -> Result<Lowered, Vec<Diagnostic>> {
    Ok(Lowered::Needs(vec![]))
}
