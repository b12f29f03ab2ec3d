//! `--cache-from` and `--cache-to`: results of builds that several machines use.

use std::path::PathBuf;
use std::str::FromStr;

use ovenbird_oci::layer::Compression;
use ovenbird_oci::{Digest, Reference};
use serde::{Deserialize, Serialize};

use super::output::{boolean, parse_compression};
use super::secret::fields;
use super::{ParseValueError, bad};

/// Tag of a cache in a folder, unless another is given.
const DEFAULT_TAG: &str = "latest";
/// Kinds of BuildKit that are known and not supported.
const REFUSED: [&str; 4] = ["gha", "s3", "azblob", "gcs"];

/// One `--cache-from`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CacheFrom {
    /// `type=registry,ref=IMAGE`: a cache, or an image that carries its own.
    Registry(String),
    /// `type=local,src=DIR[,tag=TAG][,digest=DIGEST]`.
    Local {
        /// Folder with an OCI layout.
        src: PathBuf,
        /// Which of its caches.
        tag: String,
        /// This one, whatever its tag.
        #[serde(default)]
        digest: Option<Digest>,
    },
}

/// Where a cache goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CacheDest {
    /// `type=registry,ref=IMAGE`.
    Registry(String),
    /// `type=inline`: into the image itself.
    Inline,
    /// `type=local,dest=DIR[,tag=TAG]`.
    Local {
        /// Folder; made when missing.
        dest: PathBuf,
        /// Name of the cache in it.
        tag: String,
    },
}

/// One `--cache-to`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheTo {
    /// Where to.
    pub dest: CacheDest,
    /// `mode=max`: also what is not in the image.
    #[serde(default)]
    pub max: bool,
    /// `compression=` and `compression-level=`.
    #[serde(default)]
    pub compression: Option<Compression>,
    /// `oci-mediatypes=`; false: Docker media types.
    #[serde(default)]
    pub oci_media_types: Option<bool>,
    /// `mounts=true`: also what is in the folders of `RUN --mount=type=cache`.
    #[serde(default)]
    pub mounts: bool,
    /// `ignore-error=`; false: a cache that cannot be written fails the build.
    #[serde(default = "yes")]
    pub ignore_error: bool,
}

fn yes() -> bool {
    true
}

fn unknown(key: &str, kind: &str, expected: &str) -> ParseValueError {
    bad(format!("unknown field {key:?} of a cache of type={kind}: expected {expected}"))
}

fn reference(text: Option<String>) -> Result<String, ParseValueError> {
    let text = text.filter(|text| !text.is_empty()).ok_or_else(|| bad("type=registry needs ref=REGISTRY/REPOSITORY:TAG"))?;
    // Templates are filled in later.
    if !text.contains('{') {
        text.parse::<Reference>().map_err(|error| bad(error.to_string()))?;
    }
    Ok(text)
}

fn tag(text: Option<String>) -> Result<String, ParseValueError> {
    let tag = text.unwrap_or_else(|| DEFAULT_TAG.into());
    match format!("localhost/cache:{tag}").parse::<Reference>() {
        Ok(reference) if reference.tag() == Some(&tag) && reference.digest().is_none() => Ok(tag),
        _ => Err(bad(format!("tag={tag} is no tag: letters, digits, `_`, `.` and `-`, at most 128"))),
    }
}

fn kind_of(all: &[(String, String)]) -> Result<&str, ParseValueError> {
    let kind = all.iter().rev().find(|(key, _)| key == "type").map_or("", |(_, value)| value.as_str());
    match kind {
        "registry" | "local" | "inline" => Ok(kind),
        "" => Err(bad("a cache needs a type: registry, inline or local, for example type=registry,ref=REGISTRY/REPOSITORY:cache")),
        kind if REFUSED.contains(&kind) => Err(bad(format!("caches of type={kind} are not supported: use type=registry or type=local"))),
        kind => Err(bad(format!("unknown cache type {kind:?}: expected registry, inline or local"))),
    }
}

impl FromStr for CacheFrom {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // As in buildx: an image alone.
        if !text.contains('=') {
            return reference(Some(text.to_owned())).map(Self::Registry);
        }
        let all = fields(text)?;
        let kind = kind_of(&all)?.to_owned();
        let (mut from, mut src, mut name, mut digest) = (None, None, None, None);
        for (key, value) in all {
            match (kind.as_str(), key.as_str()) {
                (_, "type") => {}
                ("registry", "ref") => from = Some(value),
                ("local", "src") => src = Some(PathBuf::from(value)),
                ("local", "tag") => name = Some(value),
                ("local", "digest") => {
                    digest = Some(value.parse::<Digest>().map_err(|error| bad(format!("digest={value}: {error}")))?);
                }
                ("registry", "registry.insecure") => return Err(insecure()),
                ("registry", _) => return Err(unknown(&key, "registry", "ref")),
                ("local", _) => return Err(unknown(&key, "local", "src, tag or digest")),
                _ => {}
            }
        }
        match kind.as_str() {
            "registry" => reference(from).map(Self::Registry),
            "local" => {
                let src = src.filter(|src| !src.as_os_str().is_empty()).ok_or_else(|| bad("type=local needs a folder: src=FOLDER"))?;
                Ok(Self::Local { src, tag: tag(name)?, digest })
            }
            _ => Err(bad("a cache that an image carries is read with type=registry,ref=IMAGE")),
        }
    }
}

fn insecure() -> ParseValueError {
    bad("registry.insecure is not supported: allow plain HTTP for one registry in the settings: [registry.\"HOST\"] plain_http = true")
}

impl FromStr for CacheTo {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if !text.contains('=') {
            let dest = CacheDest::Registry(reference(Some(text.to_owned()))?);
            return Ok(Self { dest, max: false, compression: None, oci_media_types: None, mounts: false, ignore_error: true });
        }
        let all = fields(text)?;
        let kind = kind_of(&all)?.to_owned();
        let (mut to, mut dest, mut name, mut mode, mut compression, mut level) = (None, None, None, None, None, None);
        let (mut oci_media_types, mut mounts, mut ignore_error) = (None, false, true);
        for (key, value) in all {
            match (kind.as_str(), key.as_str()) {
                (_, "type") => {}
                (_, "mode") => mode = Some(value),
                (_, "ignore-error") => ignore_error = boolean(&key, &value)?,
                ("registry", "ref") => to = Some(value),
                ("registry", "registry.insecure") => return Err(insecure()),
                ("local", "dest") => dest = Some(PathBuf::from(value)),
                ("local", "tag") => name = Some(value),
                ("registry" | "local", "mounts") => mounts = boolean(&key, &value)?,
                ("inline", _) => return Err(unknown(&key, "inline", "mode=min only: the cache is what the image is")),
                (_, "compression") => compression = Some(value),
                (_, "compression-level") => {
                    level = Some(value.parse::<u8>().map_err(|_| bad(format!("compression-level={value} is not a number")))?);
                }
                (_, "oci-mediatypes") => oci_media_types = Some(boolean(&key, &value)?),
                // It always is one.
                (_, "image-manifest") if boolean(&key, &value)? => {}
                (_, "image-manifest") => {
                    return Err(bad("image-manifest=false is not supported: a cache is an image manifest, which every registry takes"));
                }
                (_, "force-compression") if !boolean(&key, &value)? => {}
                (_, "force-compression") => return Err(bad("force-compression=true is not supported: layers keep the bytes they have")),
                (kind, _) => {
                    let own = if kind == "registry" { "ref" } else { "dest, tag" };
                    let rest = "mode, compression, compression-level, oci-mediatypes, image-manifest, mounts or ignore-error";
                    return Err(unknown(&key, kind, &format!("{own}, {rest}")));
                }
            }
        }
        let max = match mode.as_deref() {
            None | Some("min") => false,
            Some("max") if kind == "inline" => {
                return Err(bad("mode=max does not go with type=inline: an image holds its own layers only; use type=registry"));
            }
            Some("max") => true,
            Some(other) => return Err(bad(format!("mode={other}: expected min or max"))),
        };
        let dest = match kind.as_str() {
            "registry" => CacheDest::Registry(reference(to)?),
            "inline" => CacheDest::Inline,
            _ => {
                let dest = dest.filter(|dest| !dest.as_os_str().is_empty()).ok_or_else(|| bad("type=local needs a folder: dest=FOLDER"))?;
                CacheDest::Local { dest, tag: tag(name)? }
            }
        };
        Ok(Self { dest, max, compression: parse_compression(compression.as_deref(), level)?, oci_media_types, mounts, ignore_error })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caches_to_read() {
        for (text, expect) in [
            ("r.io/a:cache", "Registry(\"r.io/a:cache\")"),
            ("type=registry,ref=r.io/a:cache", "Registry(\"r.io/a:cache\")"),
            ("type=registry,ref=r.io/a:{git.branch}", "Registry"),
            ("type=local,src=dir", "Local { src: \"dir\", tag: \"latest\", digest: None }"),
            ("type=local,src=dir,tag=v1", "tag: \"v1\""),
            ("type=local,src=d,digest=sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "digest: Some"),
            ("type=local,src=d,digest=x", "! digest=x"),
            ("type=local,src=d,tag=a/b", "! tag=a/b is no tag"),
            ("type=local", "! type=local needs a folder: src="),
            ("type=local,dest=d", "! unknown field \"dest\" of a cache of type=local: expected src"),
            ("type=registry", "! type=registry needs ref="),
            ("type=registry,ref=A", "! \"A\" is not an image name"),
            ("type=registry,ref=a,registry.insecure=true", "! registry.insecure is not supported"),
            ("type=inline", "! a cache that an image carries is read with type=registry"),
            ("type=gha,scope=x", "! caches of type=gha are not supported"),
            ("type=s3", "! caches of type=s3"),
            ("type=nope", "! unknown cache type \"nope\""),
            ("ref=a", "! a cache needs a type"),
        ] {
            let got = text.parse::<CacheFrom>().map_or_else(|e| format!("! {e}"), |c| format!("{c:?}"));
            assert!(got.starts_with(expect) || got.contains(expect) && !expect.starts_with('!'), "{text:?}: {got}");
        }
    }

    #[test]
    fn caches_to_write() {
        for (text, expect) in [
            ("r.io/a:cache", "dest: Registry(\"r.io/a:cache\"), max: false"),
            ("type=registry,ref=r.io/a:cache,mode=max", "max: true"),
            ("type=registry,ref=a,ignore-error=false", "ignore_error: false"),
            ("type=registry,ref=a,compression=zstd,compression-level=9", "compression: Some(Zstd(9))"),
            ("type=registry,ref=a,oci-mediatypes=false,image-manifest=true,force-compression=false", "oci_media_types: Some(false)"),
            ("type=registry,ref=a,image-manifest=false", "! image-manifest=false is not supported"),
            ("type=registry,ref=a,force-compression=true", "! force-compression=true is not supported"),
            ("type=registry,ref=a,mode=most", "! mode=most: expected min or max"),
            ("type=registry,dest=a", "! unknown field \"dest\""),
            ("type=registry,ref=a,mounts=true", "mounts: true"),
            ("type=inline,mounts=true", "! unknown field \"mounts\" of a cache of type=inline"),
            ("type=inline", "dest: Inline"),
            ("type=inline,mode=max", "! mode=max does not go with type=inline"),
            ("type=inline,ref=a", "! unknown field \"ref\" of a cache of type=inline"),
            ("type=local,dest=d,mode=max", "dest: Local { dest: \"d\", tag: \"latest\" }, max: true"),
            ("type=local,src=d", "! unknown field \"src\""),
            ("type=azblob", "! caches of type=azblob"),
        ] {
            let got = text.parse::<CacheTo>().map_or_else(|e| format!("! {e}"), |c| format!("{c:?}"));
            assert!(got.starts_with(expect) || got.contains(expect) && !expect.starts_with('!'), "{text:?}: {got}");
        }
    }
}
