//! `-o type=…`: what to do with a built image.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

use ovenbird_oci::layer::Compression;
use serde::{Deserialize, Serialize};

use super::secret::fields;
use super::{ParseValueError, bad};

/// A file or standard output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dest {
    /// This file.
    Path(PathBuf),
    /// `-`.
    Stdout,
}

/// Kinds of outputs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OutputKind {
    /// `type=image`: keep it in the local store.
    Image,
    /// `type=registry` or `type=image,push=true`.
    Registry,
    /// `type=docker` without `dest`: load it into the Docker Engine.
    Load,
    /// `type=oci`: an OCI layout as a tar.
    OciTar(Dest),
    /// `type=oci,tar=false`: an OCI layout as a folder.
    OciDir(PathBuf),
    /// `type=docker,dest=…`: a docker archive.
    DockerTar(Dest),
    /// `type=local`: the root file system as a folder.
    Local(PathBuf),
    /// `type=tar`: the root file system as a tar.
    Tar(Dest),
    /// `type=cacheonly`: build, keep nothing but the cache.
    CacheOnly,
}

/// One output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// What.
    pub kind: OutputKind,
    /// `name=`: instead of the names of the request.
    #[serde(default)]
    pub names: Vec<String>,
    /// `compression=` and `compression-level=` of layers made by this build.
    #[serde(default)]
    pub compression: Option<Compression>,
    /// `oci-mediatypes=`; false: Docker media types.
    #[serde(default)]
    pub oci_media_types: Option<bool>,
    /// `annotation.KEY=VALUE`.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
}

impl Output {
    /// An output with nothing else said.
    pub fn new(kind: OutputKind) -> Self {
        Self { kind, names: vec![], compression: None, oci_media_types: None, annotations: BTreeMap::new() }
    }

    /// Does it write to standard output?
    pub fn uses_stdout(&self) -> bool {
        matches!(self.kind, OutputKind::OciTar(Dest::Stdout) | OutputKind::DockerTar(Dest::Stdout) | OutputKind::Tar(Dest::Stdout))
    }
}

/// Fields of buildx that are known and not supported, with the reason.
const REFUSED: [(&str, &str); 8] = [
    ("push-by-digest", "push under a tag, then use the digest that is printed"),
    ("name-canonical", "names are written in their canonical form already"),
    ("registry.insecure", "allow plain HTTP for one registry in the settings: [registry.\"HOST\"] plain_http = true"),
    ("unpack", "images are not unpacked after the build"),
    ("store", "every image is kept in the local store"),
    ("dangling-name-prefix", "give a name with -t"),
    ("prefer-nondist-layers", "layers that may not be distributed are kept as they are"),
    ("oci-artifact", "there are no attestations to attach"),
];

impl FromStr for Output {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "-" {
            return Ok(Self::new(OutputKind::Tar(Dest::Stdout)));
        }
        if !text.is_empty() && !text.contains('=') && !text.contains(',') {
            return Ok(Self::new(OutputKind::Local(text.into())));
        }
        let (mut kind, mut dest, mut push, mut tar) = (None, None, false, true);
        let (mut compression, mut level) = (None, None);
        let mut output = Self::new(OutputKind::Image);
        for (key, value) in fields(text)? {
            match key.as_str() {
                "type" => kind = Some(value),
                "dest" => dest = Some(value),
                "name" => output.names.extend(value.split(',').filter(|n| !n.is_empty()).map(Into::into)),
                "push" => push = boolean(&key, &value)?,
                "tar" => tar = boolean(&key, &value)?,
                "compression" => compression = Some(value),
                "compression-level" => {
                    level = Some(value.parse::<u8>().map_err(|_| bad(format!("compression-level={value} is not a number")))?);
                }
                "oci-mediatypes" => output.oci_media_types = Some(boolean(&key, &value)?),
                "force-compression" if !boolean(&key, &value)? => {}
                "force-compression" => {
                    return Err(bad(
                        "force-compression=true is not supported: layers of the base image keep their bytes, so that they are shared",
                    ));
                }
                "rewrite-timestamp" if boolean(&key, &value)? => {}
                "rewrite-timestamp" => {
                    return Err(bad("rewrite-timestamp=false is not supported: with SOURCE_DATE_EPOCH every time in the image is set"));
                }
                _ if key.starts_with("annotation.") => {
                    output.annotations.insert(key["annotation.".len()..].into(), value);
                }
                _ if key.starts_with("annotation") => {
                    return Err(bad(format!("{key} is not supported: only annotation.KEY=VALUE, on the manifest")));
                }
                _ => {
                    let reason = REFUSED.iter().find(|(name, _)| *name == key).map(|(_, reason)| *reason);
                    return Err(bad(match reason {
                        Some(reason) => format!("output field {key} is not supported: {reason}"),
                        None => format!(
                            "unknown output field {key:?}: expected type, dest, name, push, tar, compression, compression-level, oci-mediatypes or annotation.KEY"
                        ),
                    }));
                }
            }
        }
        output.compression = parse_compression(compression.as_deref(), level)?;
        let kind =
            kind.ok_or_else(|| bad(format!("{text:?} has no type: expected type=oci, docker, tar, local, registry, image or cacheonly")))?;
        if push && kind != "image" && kind != "registry" {
            return Err(bad(format!("push=true goes with type=image or type=registry, not with type={kind}")));
        }
        if !tar && kind != "oci" && kind != "docker" {
            return Err(bad(format!("tar=false goes with type=oci, not with type={kind}")));
        }
        let no_dest = |dest: &Option<String>| match dest {
            Some(dest) => Err(bad(format!("type={kind} takes no dest ({dest:?})"))),
            None => Ok(()),
        };
        let to = |dest: Option<String>| match dest.as_deref() {
            // By its other names, too: nothing but the archive may be written there.
            None | Some("-" | "/dev/stdout" | "/dev/fd/1" | "/proc/self/fd/1") => Dest::Stdout,
            Some(path) => Dest::Path(path.into()),
        };
        let folder = |dest: Option<String>| match dest.as_deref() {
            None | Some("" | "-") => Err(bad(format!("type={kind} needs a folder: add dest=FOLDER"))),
            Some(path) => Ok(PathBuf::from(path)),
        };
        output.kind = match kind.as_str() {
            "image" | "registry" => {
                no_dest(&dest)?;
                if push || kind == "registry" { OutputKind::Registry } else { OutputKind::Image }
            }
            "oci" if tar => OutputKind::OciTar(to(dest)),
            "oci" => OutputKind::OciDir(folder(dest)?),
            "docker" if !tar => return Err(bad("type=docker,tar=false is not supported: use type=oci,tar=false for a folder")),
            "docker" if dest.is_none() => OutputKind::Load,
            "docker" => OutputKind::DockerTar(to(dest)),
            "local" => OutputKind::Local(folder(dest)?),
            "tar" => OutputKind::Tar(to(dest)),
            "cacheonly" => {
                no_dest(&dest)?;
                OutputKind::CacheOnly
            }
            other => {
                return Err(bad(format!("unknown output type {other:?}: expected oci, docker, tar, local, registry, image or cacheonly")));
            }
        };
        Ok(output)
    }
}

pub(super) fn boolean(key: &str, value: &str) -> Result<bool, ParseValueError> {
    match value {
        "true" | "1" | "" => Ok(true),
        "false" | "0" => Ok(false),
        _ => Err(bad(format!("{key}={value}: expected true or false"))),
    }
}

/// Level 5 of gzip costs a third less time than 6 for the same size; zstd 3 is the library's own default.
pub(super) fn parse_compression(name: Option<&str>, level: Option<u8>) -> Result<Option<Compression>, ParseValueError> {
    let within = |max: u8, default: u8| match level {
        Some(level) if !(1..=max).contains(&level) => Err(bad(format!("compression-level={level} is outside 1 to {max}"))),
        level => Ok(level.unwrap_or(default)),
    };
    Ok(match (name, level) {
        (None, None) => None,
        (None | Some("gzip"), _) => Some(Compression::Gzip(within(12, 5)?)),
        (Some("zstd"), _) => Some(Compression::Zstd(within(22, 3)?)),
        (Some("uncompressed"), None) => Some(Compression::None),
        (Some("uncompressed"), Some(_)) => return Err(bad("compression=uncompressed takes no compression-level")),
        (Some(other), _) => return Err(bad(format!("compression={other} is not supported: expected uncompressed, gzip or zstd"))),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs() {
        for (text, expect) in [
            ("out", "Local(\"out\")"),
            ("-", "Tar(Stdout)"),
            ("type=local,dest=out", "Local(\"out\")"),
            ("type=local", "! type=local needs a folder"),
            ("type=tar,dest=a.tar", "Tar(Path(\"a.tar\"))"),
            ("type=tar", "Tar(Stdout)"),
            ("type=oci,dest=a.tar", "OciTar(Path(\"a.tar\"))"),
            ("type=oci,dest=dir,tar=false", "OciDir(\"dir\")"),
            ("type=oci,tar=false", "! type=oci needs a folder"),
            ("type=docker", "Load"),
            ("type=docker,dest=-", "DockerTar(Stdout)"),
            ("type=oci,dest=/dev/stdout", "OciTar(Stdout)"),
            ("type=docker,dest=d,tar=false", "! type=docker,tar=false is not supported"),
            ("type=image,name=a:1", "Image"),
            ("type=image,push=true", "Registry"),
            ("type=registry", "Registry"),
            ("type=registry,dest=x", "! type=registry takes no dest"),
            ("type=local,dest=x,push=true", "! push=true goes with"),
            ("type=image,tar=false", "! tar=false goes with"),
            ("type=image,push=maybe", "! push=maybe: expected true or false"),
            ("type=cacheonly", "CacheOnly"),
            ("type=oci,dest=\"a\"", "OciTar"),
            ("type=nope", "! unknown output type \"nope\""),
            ("dest=a", "! \"dest=a\" has no type"),
            ("type=image,push-by-digest=true", "! output field push-by-digest is not supported"),
            ("type=image,bogus=1", "! unknown output field \"bogus\""),
            ("type=image,force-compression=true", "! force-compression=true is not supported"),
            ("type=image,force-compression=false", "Image"),
            ("type=image,annotation.a=b", "annotations: {\"a\": \"b\"}"),
            ("type=image,annotation-index.a=b", "! annotation-index.a is not supported"),
            ("type=image,compression=zstd", "Some(Zstd(3))"),
            ("type=image,compression=gzip,compression-level=9", "Some(Gzip(9))"),
            ("type=image,compression-level=9", "Some(Gzip(9))"),
            ("type=image,compression=gzip,compression-level=13", "! compression-level=13 is outside 1 to 12"),
            ("type=image,compression=uncompressed", "Some(None)"),
            ("type=image,compression=estargz", "! compression=estargz is not supported"),
            ("type=image,oci-mediatypes=false", "oci_media_types: Some(false)"),
            ("", "! "),
        ] {
            let got = text.parse::<Output>().map_or_else(|e| format!("! {e}"), |o| format!("{o:?}"));
            assert!(got.contains(expect), "{text:?}: {got}");
        }
        let names = "\"type=registry\",\"name=a:1,b:2\"".parse::<Output>().unwrap().names;
        assert_eq!(names, ["a:1", "b:2"]);
    }
}
