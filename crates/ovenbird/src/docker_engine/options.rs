//! The options of docker-py's `build()`, which many tools pass through: each is honoured by every builder, or refused by name.
//!
//! One way for all of them: [`BuildOptions::prepare`] makes a [`BuildRequest`], and what is no part of a build comes beside it.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::error::{Error, Kind};
use crate::request::{AddHost, BuildRequest, ByteSize, CacheFrom, DockerfileFrom, Network, Source};

/// The twenty-five. What is not said is what docker-py does without it.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BuildOptions {
    /// A folder, or the address of a context.
    pub path: Option<String>,
    /// A Dockerfile, or with `custom_context` an archive.
    #[serde(skip)]
    pub fileobj: Option<Box<dyn Read + Send>>,
    /// Name of the image.
    pub tag: Option<String>,
    /// No progress.
    pub quiet: bool,
    /// Every step runs anew.
    pub nocache: bool,
    /// Remove the containers of steps.
    pub rm: Option<bool>,
    /// Seconds until the build is given up.
    pub timeout: Option<u64>,
    /// `fileobj` is an archive with the whole context.
    pub custom_context: bool,
    /// How that archive is compressed.
    pub encoding: Option<String>,
    /// Ask the registry for base images even when they are here.
    pub pull: bool,
    /// Remove the containers of steps after a failure, too.
    pub forcerm: bool,
    /// The Dockerfile, seen from the context.
    pub dockerfile: Option<String>,
    /// Build arguments; one without a value is not given.
    pub buildargs: BTreeMap<String, Option<String>>,
    /// Limits of steps.
    pub container_limits: ContainerLimits,
    /// Bytes of `/dev/shm`.
    pub shmsize: Option<u64>,
    /// Labels of the image.
    pub labels: BTreeMap<String, String>,
    /// Images whose layers may be taken.
    pub cache_from: Vec<String>,
    /// Stage to build.
    pub target: Option<String>,
    /// Network of steps.
    pub network_mode: Option<String>,
    /// Make one layer of all.
    pub squash: bool,
    /// Lines of `/etc/hosts`.
    pub extra_hosts: BTreeMap<String, String>,
    /// Platform of the image.
    pub platform: Option<String>,
    /// Of Windows.
    pub isolation: Option<String>,
    /// Take proxies from the configuration of Docker's client.
    pub use_config_proxy: bool,
    /// Compress the context on its way.
    pub gzip: bool,
}

/// `container_limits`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ContainerLimits {
    /// Bytes.
    pub memory: Option<u64>,
    /// Bytes, memory and swap together; -1: as much as there is.
    pub memswap: Option<i64>,
    /// Weight of the processors.
    pub cpushares: Option<u64>,
    /// Numbers of processors.
    pub cpusetcpus: Option<String>,
}

impl fmt::Debug for BuildOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Build arguments may be passwords, whatever they should be.
        f.debug_struct("BuildOptions").field("path", &self.path).field("tag", &self.tag).finish_non_exhaustive()
    }
}

/// A build that was asked for in docker-py's words.
pub struct Prepared {
    /// The build.
    pub request: BuildRequest,
    /// What it reads from standard input, when its source is that.
    pub stdin: Option<Box<dyn Read + Send>>,
    /// Show no progress.
    pub quiet: bool,
    /// Cancel it after this time.
    pub timeout: Option<Duration>,
}

impl fmt::Debug for Prepared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prepared").field("quiet", &self.quiet).field("timeout", &self.timeout).finish_non_exhaustive()
    }
}

fn wrong(option: &str, reason: impl fmt::Display) -> Error {
    Error::new(Kind::Usage, format!("{option}: {reason}"))
}

fn parsed<T: std::str::FromStr>(option: &str, text: &str) -> Result<T, Error>
where
    T::Err: fmt::Display,
{
    text.parse().map_err(|error| wrong(option, error))
}

impl BuildOptions {
    /// The request that these options are.
    pub fn prepare(self) -> Result<Prepared, Error> {
        self.refuse()?;
        let (source, dockerfile) = self.source()?;
        let mut request = BuildRequest::new(source);
        request.dockerfile = dockerfile;
        request.names = self.tag.into_iter().collect();
        request.no_cache = self.nocache;
        request.pull = self.pull;
        request.build_args = self.buildargs.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
        request.limits.memory = self.container_limits.memory.map(ByteSize);
        request.limits.shm_size = self.shmsize.map(ByteSize);
        request.labels = self.labels;
        request.cache_from = self.cache_from.into_iter().map(CacheFrom::Registry).collect();
        request.target = self.target.filter(|target| !target.is_empty());
        request.network = match self.network_mode.as_deref() {
            None | Some("" | "default" | "bridge") => Network::Default,
            Some("none") => Network::None,
            Some("host") => Network::Host,
            Some(other) => {
                return Err(Error::refused(
                    &format!("network_mode {other:?}"),
                    "steps have the usual network, the machine's (host) or none; networks of a Docker Engine are not known",
                ));
            }
        };
        let host = |(name, address): (&String, &String)| parsed::<AddHost>("extra_hosts", &format!("{name}={address}"));
        request.add_hosts = self.extra_hosts.iter().map(host).collect::<Result<_, _>>()?;
        if let Some(platform) = self.platform.filter(|platform| !platform.is_empty()) {
            request.platforms = vec![parsed("platform", &platform)?];
        }
        request.limits.check().map_err(|error| wrong("container_limits", error))?;
        Ok(Prepared { request, stdin: self.fileobj, quiet: self.quiet, timeout: self.timeout.map(Duration::from_secs) })
    }

    fn source(&self) -> Result<(Source, DockerfileFrom), Error> {
        let dockerfile = self.dockerfile.as_deref().filter(|path| !path.is_empty());
        match (&self.path, self.fileobj.is_some()) {
            (None, false) => Err(wrong("path", "either path or fileobj must be given")),
            (Some(_), true) => Err(wrong("fileobj", "it does not go with path: one of them is the context")),
            (None, true) if self.custom_context => {
                Ok((Source::Stdin, dockerfile.map_or(DockerfileFrom::Default, |path| DockerfileFrom::Path(path.into()))))
            }
            (None, true) if dockerfile.is_some() => {
                Err(wrong("dockerfile", "fileobj is the Dockerfile itself; with custom_context it is an archive that has one"))
            }
            (None, true) => Ok((Source::Stdin, DockerfileFrom::Default)),
            (Some(_), false) if self.custom_context => Err(wrong("custom_context", "it is for an archive in fileobj")),
            (Some(path), false) => {
                let source: Source = parsed("path", path)?;
                let dockerfile = match (&source, dockerfile) {
                    (_, None) => DockerfileFrom::Default,
                    (Source::Stdin, Some(_)) => return Err(wrong("path", "\"-\" is not a path; give the archive as fileobj")),
                    // Seen from the context, where the command line looks from the working directory.
                    (Source::Path(dir), Some(file)) => DockerfileFrom::Path(dir.join(Path::new(file))),
                    (_, Some(file)) => DockerfileFrom::Path(PathBuf::from(file)),
                };
                Ok((source, dockerfile))
            }
        }
    }

    /// Everything that no builder does.
    fn refuse(&self) -> Result<(), Error> {
        if self.rm == Some(false) {
            return Err(Error::refused("rm=False", "no container is left after a step, so none can be kept"));
        }
        if self.squash {
            return Err(Error::refused("squash", "layers are not merged; use a multi-stage build with COPY --from"));
        }
        if self.use_config_proxy {
            return Err(Error::refused("use_config_proxy", "proxies of Docker's client are not read")
                .hint("give them in buildargs: HTTP_PROXY, HTTPS_PROXY and NO_PROXY need no ARG and are in no image"));
        }
        if let Some(isolation) = self.isolation.as_deref().filter(|word| !matches!(*word, "" | "default")) {
            return Err(Error::refused(&format!("isolation {isolation:?}"), "it is for Windows containers"));
        }
        if let Some(encoding) = self.encoding.as_deref() {
            if !self.custom_context {
                return Err(wrong("encoding", "it is for an archive in fileobj, with custom_context"));
            }
            // It is found by content; a name that is none would be a mistake.
            if !matches!(encoding, "" | "identity" | "gzip" | "bzip2" | "xz" | "zstd") {
                return Err(Error::refused(&format!("encoding {encoding:?}"), "archives are plain, gzip, bzip2, xz or zstd"));
            }
        }
        let limits = &self.container_limits;
        if limits.memswap.is_some_and(|bytes| bytes > 0 && u64::try_from(bytes).ok() != limits.memory) {
            return Err(Error::refused("container_limits.memswap", "steps have no swap beside their memory; give both the same value"));
        }
        if limits.cpushares.is_some_and(|weight| weight > 0) {
            return Err(Error::refused("container_limits.cpushares", "processors are limited by their number (--cpus), not by weight"));
        }
        if limits.cpusetcpus.as_deref().is_some_and(|list| !list.is_empty()) {
            return Err(Error::refused("container_limits.cpusetcpus", "processors are limited by their number (--cpus), not one by one"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str) -> Result<BuildOptions, serde_json::Error> {
        serde_json::from_str(json)
    }

    /// What comes of these options, given as JSON; `@` is a fileobj beside them.
    fn check(json: &str) -> String {
        let mut options = read(json.trim_start_matches('@')).unwrap();
        if json.starts_with('@') {
            options.fileobj = Some(Box::new(&b"FROM scratch"[..]));
        }
        match options.prepare() {
            Ok(prepared) => format!("{:?} {:?} stdin={}", prepared.request, prepared, prepared.stdin.is_some()),
            Err(error) => format!("! {} {error}", error.kind.exit_code()),
        }
    }

    #[test]
    fn every_option() {
        for (json, expect) in [
            (r#"{"path": "d"}"#, "source: Path(\"d\")"),
            (r"{}", "! 2 path: either path or fileobj"),
            (r"@{}", "source: Stdin"),
            (r"@{}", "stdin=true"),
            (r#"@{"path": "d"}"#, "! 2 fileobj: it does not go with path"),
            (r#"{"path": "d", "tag": "a:1"}"#, "names: [\"a:1\"]"),
            (r#"{"path": "d", "quiet": true}"#, "quiet: true"),
            (r#"{"path": "d", "nocache": true}"#, "no_cache: true"),
            (r#"{"path": "d", "rm": true}"#, "source"),
            (r#"{"path": "d", "rm": false}"#, "! 2 rm=False is not supported"),
            (r#"{"path": "d", "timeout": 7}"#, "timeout: Some(7s)"),
            (r#"@{"custom_context": true}"#, "source: Stdin"),
            (r#"{"path": "d", "custom_context": true}"#, "! 2 custom_context: it is for an archive"),
            (r#"@{"custom_context": true, "encoding": "gzip"}"#, "source: Stdin"),
            (r#"@{"custom_context": true, "encoding": "rar"}"#, "! 2 encoding \"rar\" is not supported"),
            (r#"@{"encoding": "gzip"}"#, "! 2 encoding: it is for an archive"),
            (r#"{"path": "d", "pull": true}"#, "pull: true"),
            (r#"{"path": "d", "forcerm": true}"#, "source"),
            (r#"{"path": "d", "dockerfile": "x/D"}"#, "dockerfile: Path(\"d/x/D\")"),
            (r#"{"path": "d", "dockerfile": "/x/D"}"#, "dockerfile: Path(\"/x/D\")"),
            (r#"@{"custom_context": true, "dockerfile": "x/D"}"#, "dockerfile: Path(\"x/D\")"),
            (r#"@{"dockerfile": "x/D"}"#, "! 2 dockerfile: fileobj is the Dockerfile itself"),
            (r#"{"path": "d", "buildargs": {"A": "1", "B": null}}"#, "build_args: {\"A\": \"1\"}"),
            (r#"{"path": "d", "container_limits": {"memory": 67108864}}"#, "memory: Some(ByteSize(67108864))"),
            (r#"{"path": "d", "container_limits": {"memory": 67108864, "memswap": 67108864}}"#, "memory: Some(ByteSize(67108864))"),
            (r#"{"path": "d", "container_limits": {"memory": 1}}"#, "! 2 container_limits: --memory is too small"),
            (r#"{"path": "d", "container_limits": {"memswap": 5}}"#, "! 2 container_limits.memswap is not supported"),
            (r#"{"path": "d", "container_limits": {"memswap": -1}}"#, "source"),
            (r#"{"path": "d", "container_limits": {"cpushares": 5}}"#, "! 2 container_limits.cpushares is not supported"),
            (r#"{"path": "d", "container_limits": {"cpusetcpus": "0,1"}}"#, "! 2 container_limits.cpusetcpus is not supported"),
            (r#"{"path": "d", "shmsize": 1024}"#, "shm_size: Some(ByteSize(1024))"),
            (r#"{"path": "d", "labels": {"a": "b"}}"#, "labels: {\"a\": \"b\"}"),
            (r#"{"path": "d", "cache_from": ["a:1", "b"]}"#, "cache_from: [Registry(\"a:1\"), Registry(\"b\")]"),
            (r#"{"path": "d", "target": "s"}"#, "target: Some(\"s\")"),
            (r#"{"path": "d", "network_mode": "host"}"#, "network: Host"),
            (r#"{"path": "d", "network_mode": "container:x"}"#, "! 2 network_mode \"container:x\" is not supported"),
            (r#"{"path": "d", "squash": false}"#, "source"),
            (r#"{"path": "d", "squash": true}"#, "! 2 squash is not supported"),
            (r#"{"path": "d", "extra_hosts": {"a": "1.2.3.4"}}"#, "AddHost { name: \"a\", address: 1.2.3.4 }"),
            (r#"{"path": "d", "extra_hosts": {"a": "x"}}"#, "! 2 extra_hosts: \"a=x\" is not a host entry"),
            (r#"{"path": "d", "platform": "linux/arm64"}"#, "\"arm64\""),
            (r#"{"path": "d", "platform": "a/b/c/d"}"#, "! 2 platform: "),
            (r#"{"path": "d", "isolation": "default"}"#, "source"),
            (r#"{"path": "d", "isolation": "hyperv"}"#, "! 2 isolation \"hyperv\" is not supported"),
            (r#"{"path": "d", "use_config_proxy": false}"#, "source"),
            (r#"{"path": "d", "use_config_proxy": true}"#, "! 2 use_config_proxy is not supported"),
            (r#"{"path": "d", "gzip": true}"#, "source"),
        ] {
            let got = check(json);
            assert!(
                if expect.starts_with('!') { got.starts_with(expect) } else { got.contains(expect) && !got.starts_with('!') },
                "{json}: {got}"
            );
        }
    }

    #[test]
    fn no_option_is_unknown_and_none_is_missing() {
        let names = [
            "path",
            "fileobj",
            "tag",
            "quiet",
            "nocache",
            "rm",
            "timeout",
            "custom_context",
            "encoding",
            "pull",
            "forcerm",
            "dockerfile",
            "buildargs",
            "container_limits",
            "shmsize",
            "labels",
            "cache_from",
            "target",
            "network_mode",
            "squash",
            "extra_hosts",
            "platform",
            "isolation",
            "use_config_proxy",
            "gzip",
        ];
        assert_eq!(names.len(), 25);
        let error = read(r#"{"pth": "d"}"#).unwrap_err().to_string();
        for name in names.iter().filter(|name| **name != "fileobj") {
            assert!(error.contains(&format!("`{name}`")), "{name}: {error}");
        }
        let secret = read(r#"{"path": "d", "buildargs": {"A": "hunter2"}}"#).unwrap();
        assert!(!format!("{secret:?}").contains("hunter2"));
        assert!(!format!("{:?}", secret.prepare().unwrap()).contains("hunter2"));
    }
}
