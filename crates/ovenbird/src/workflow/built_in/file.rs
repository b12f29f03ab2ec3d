//! Files: put into a build, hidden from it, taken out of its image.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use ovenbird_dockerfile::ignore::Patterns;
use ovenbird_oci::Digest;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

use super::Size;
use crate::error::{Error, Kind};
use crate::request::BuildRequest;
use crate::workflow::desk::Target;
use crate::workflow::draft::Kept;
use crate::workflow::inside::redacted;
use crate::workflow::{Content, MAIN, Plugin, Scene, text, veto};

/// Context of the files that steps see while they run.
const INJECTED: &str = "ovenbird-inject";
/// Context of what is copied into the image beside the user's files.
const BUILD_INFO: &str = "ovenbird-build-info";

/// Hides files of the build context from the build, with the patterns of a .dockerignore. The folder itself is not touched.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct HideFiles {
    /// Patterns.
    patterns: Vec<String>,
}

impl Plugin for HideFiles {
    fn check(&self, _: &BuildRequest) -> Result<(), String> {
        Patterns::new(&self.patterns).map(drop).map_err(|e| e.to_string())
    }

    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        self.patterns.iter().try_for_each(|pattern| scene.draft.hide(pattern))?;
        Ok(json!(self.patterns))
    }
}

/// Copies the Dockerfile that is built into the image.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct AddDockerfile {
    /// Folder in the image.
    #[serde(default = "build_info")]
    dest: String,
    /// Name of the file there.
    #[serde(default = "dockerfile")]
    name: String,
}

fn build_info() -> String {
    "/root/buildinfo".into()
}

fn dockerfile() -> String {
    "Dockerfile".into()
}

impl Plugin for AddDockerfile {
    fn check(&self, _: &BuildRequest) -> Result<(), String> {
        let plain =
            |text: &str| !text.is_empty() && !text.contains(|c: char| c.is_whitespace() || c.is_control() || "\"'$\\[]`<".contains(c));
        if !self.dest.starts_with('/') || !plain(&self.dest) {
            return Err(format!("dest is {:?}, expected an absolute path without blanks", self.dest));
        }
        if !plain(&self.name) || self.name.contains('/') {
            Err(format!("name is {:?}, expected the name of a file", self.name))
        } else {
            Ok(())
        }
    }

    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        let (dest, name) = (self.dest.trim_end_matches('/'), &self.name);
        let original = scene.draft.dockerfile.clone();
        scene.draft.add(BUILD_INFO, name, Content::Bytes(original.clone().into_bytes()), 0o644)?;
        let line = format!("COPY --from={BUILD_INFO} {name} {dest}/{name}");
        let target = scene.draft.request.target.clone();
        scene.draft.dockerfile = text::at_end(&original, target.as_deref(), &line).map_err(veto)?;
        Ok(json!(format!("{dest}/{name}")))
    }
}

/// A file that steps see.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Injected {
    /// Absolute path at which steps see it.
    target: String,
    /// Its content.
    #[serde(default)]
    text: Option<String>,
    /// A file of this machine with its content.
    #[serde(default)]
    source: Option<PathBuf>,
}

/// Lets RUN steps see files, such as a repository list or a certificate authority, that are not in the image: they are mounted while a step
/// runs. Their content is part of the cache key.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct InjectFiles {
    /// The files.
    files: Vec<Injected>,
}

impl Plugin for InjectFiles {
    fn check(&self, _: &BuildRequest) -> Result<(), String> {
        for file in &self.files {
            let target = &file.target;
            let plain = !target.contains(|c: char| c.is_whitespace() || c.is_control() || ",\"'$\\".contains(c));
            if !target.starts_with('/') || target.ends_with('/') || !plain {
                return Err(format!("the target {target:?} is not an absolute path of a file, without blanks, commas and quotes"));
            }
            if file.text.is_some() == file.source.is_some() {
                return Err(format!("{target} needs text or source, one of them"));
            }
        }
        Ok(())
    }

    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        let mut flags = vec![];
        for (number, file) in self.files.iter().enumerate() {
            let bytes = match (&file.text, &file.source) {
                (Some(text), _) => text.clone().into_bytes(),
                (None, Some(path)) => scene.read_file(path)?,
                (None, None) => vec![],
            };
            scene.draft.add(INJECTED, &number.to_string(), Content::Bytes(bytes), 0o644)?;
            flags.push(format!("--mount=type=bind,from={INJECTED},source={number},target={}", file.target));
        }
        if !flags.is_empty() {
            scene.draft.dockerfile = text::on_each_run(&scene.draft.dockerfile, &flags.join(" "));
        }
        Ok(json!(self.files.iter().map(|file| &file.target).collect::<Vec<_>>()))
    }
}

/// A file to download.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Artifact {
    /// Where it is: http or https.
    url: String,
    /// SHA-256 of its content, in hexadecimal digits.
    sha256: String,
    /// Its path in the build context.
    path: String,
    /// Its mode.
    #[serde(default = "plain_mode")]
    mode: u32,
}

fn plain_mode() -> u32 {
    0o644
}

/// Downloads files into the build context, with their checksums. The user's folder is not touched.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct FetchArtifacts {
    /// The files.
    files: Vec<Artifact>,
    /// Hosts that may be asked; without it: all.
    #[serde(default)]
    allowed_hosts: Vec<String>,
    /// Largest file.
    #[serde(default = "most")]
    max: Size,
}

fn most() -> Size {
    Size(1 << 30)
}

impl FetchArtifacts {
    fn host(url: &str) -> Option<&str> {
        let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"))?;
        let authority = rest.split(['/', '?', '#']).next()?;
        Some(authority.rsplit_once('@').map_or(authority, |(_, host)| host))
    }
}

/// Is a host, with its port or without, one of these? All are when there are none.
fn is_allowed(hosts: &[String], name: &str, port: Option<u16>) -> bool {
    let with_port = port.map(|port| format!("{name}:{port}"));
    hosts.is_empty() || hosts.iter().any(|host| host == name || Some(host) == with_port.as_ref())
}

impl Plugin for FetchArtifacts {
    fn check(&self, _: &BuildRequest) -> Result<(), String> {
        for file in &self.files {
            let shown = redacted(&file.url);
            let Some(host) = Self::host(&file.url) else { return Err(format!("{shown} is no http or https address")) };
            let (name, port) =
                host.rsplit_once(':').and_then(|(name, port)| Some((name, Some(port.parse().ok()?)))).unwrap_or((host, None));
            if !is_allowed(&self.allowed_hosts, name, port) {
                return Err(format!("{shown}: the host is not one of {}", self.allowed_hosts.join(", ")));
            }
            format!("sha256:{}", file.sha256).parse::<Digest>().map_err(|e| format!("sha256 of {shown}: {e}"))?;
        }
        Ok(())
    }

    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        let folder = Arc::new(scene.folder()?);
        let mut fetched = vec![];
        for (number, file) in self.files.iter().enumerate() {
            let shown = redacted(&file.url);
            scene.say(format!("downloading {shown}"));
            let path = folder.path().join(number.to_string());
            let hosts = self.allowed_hosts.clone();
            let allowed = move |url: &reqwest::Url| is_allowed(&hosts, url.host_str().unwrap_or_default(), url.port_or_known_default());
            let digest = scene.download(&file.url, &path, self.max.0, allowed)?;
            if digest.hex() != file.sha256.to_ascii_lowercase() {
                return Err(veto(format!("{shown} has the SHA-256 {}, expected {}", digest.hex(), file.sha256)));
            }
            scene.draft.add(MAIN, &file.path, Content::File(Kept::new(path, folder.clone())), file.mode)?;
            fetched.push(json!({ "url": shown, "path": file.path, "sha256": file.sha256 }));
        }
        Ok(Value::Array(fetched))
    }
}

/// Writes files of the image into a folder of this machine.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ExportFiles {
    /// Patterns of paths in the image, as in a .dockerignore: `/etc/os-release`, `usr/share/doc/**`.
    paths: Vec<String>,
    /// The folder; with several platforms, each gets one in it. Made if it is not there.
    dest: PathBuf,
    /// Fail when nothing matches.
    #[serde(default = "yes")]
    some: bool,
}

fn yes() -> bool {
    true
}

impl Plugin for ExportFiles {
    fn check(&self, _: &BuildRequest) -> Result<(), String> {
        Patterns::new(&self.paths).map(drop).map_err(|e| e.to_string())
    }

    fn run(&self, scene: &mut Scene) -> Result<Value, Error> {
        let patterns = Patterns::new(&self.paths).map_err(|e| Error::from_chain(Kind::Usage, &e))?;
        let image = scene.image()?.clone();
        let mut written: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (platform, _, _) in &image.platforms {
            let Some(one) = Scene::of_platform(&image, platform) else { continue };
            let folder = (image.platforms.len() > 1).then(|| PathBuf::from(platform.to_string().replace('/', "_")));
            let names = written.entry(platform.to_string()).or_default();
            scene.files(&one, &mut |path, entry| {
                let wanted = path.to_str().is_some_and(|path| patterns.is_ignored(path));
                if !wanted || !entry.header().entry_type().is_file() {
                    return Ok(());
                }
                let inside = folder.as_ref().map_or_else(|| path.to_owned(), |folder| folder.join(path));
                let target = Target { dest: self.dest.clone(), inside: Some(inside), mode: Some(entry.header().mode()? & 0o777) };
                scene.write_file(&target, entry).map_err(|error| std::io::Error::other(error.to_string()))?;
                names.push(path.display().to_string());
                Ok(())
            })?;
        }
        if self.some && written.values().all(Vec::is_empty) {
            return Err(veto(format!("the image has no files {}", self.paths.join(", "))));
        }
        Ok(json!(written))
    }
}
