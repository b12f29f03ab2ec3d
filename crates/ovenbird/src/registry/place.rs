//! Where an image is or goes: a registry, a layout, an archive. Written as skopeo writes it.

use std::fmt;
use std::path::PathBuf;

use ovenbird_oci::Reference;

use crate::error::{Error, Kind};

/// Where an image is or goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// `NAME[:TAG]`, or `docker://NAME[:TAG]`.
    Registry(Reference),
    /// `oci:DIR[:TAG]`.
    Oci {
        /// The layout.
        dir: PathBuf,
        /// Which image of it.
        name: Option<String>,
    },
    /// `oci-archive:FILE[:TAG]`.
    OciArchive {
        /// The tar.
        file: PathBuf,
        /// Which image of it.
        name: Option<String>,
    },
    /// `docker-archive:FILE[:NAME[:TAG]]`.
    DockerArchive {
        /// The tar.
        file: PathBuf,
        /// Which image of it.
        name: Option<Reference>,
    },
}

/// Skopeo's other transports.
const FOREIGN: [&str; 6] = ["dir:", "docker-daemon:", "containers-storage:", "ostree:", "sif:", "tarball:"];

impl Place {
    /// Reads a place. `named` reads the name of an image in a registry, which may get the registry of the settings; one behind `docker://` is
    /// in full.
    pub fn parse(text: &str, named: &dyn Fn(&str) -> Result<Reference, Error>) -> Result<Self, Error> {
        // The path ends at the first colon, as in skopeo.
        let path = |rest: &str| -> Result<(PathBuf, Option<String>), Error> {
            let (path, name) = rest.split_once(':').map_or((rest, None), |(path, name)| (path, Some(name.to_owned())));
            if path.is_empty() || name.as_deref() == Some("") {
                return Err(Error::new(
                    Kind::Usage,
                    format!("{text:?} is no place of an image: after the prefix belongs PATH or PATH:TAG"),
                ));
            }
            Ok((path.into(), name))
        };
        if let Some(rest) = text.strip_prefix("oci-archive:") {
            let (file, name) = path(rest)?;
            return Ok(Self::OciArchive { file, name });
        }
        if let Some(rest) = text.strip_prefix("docker-archive:") {
            let (file, name) = path(rest)?;
            let name = name.map(|name| name.parse::<Reference>()).transpose()?;
            return Ok(Self::DockerArchive { file, name });
        }
        if let Some(rest) = text.strip_prefix("oci:") {
            let (dir, name) = path(rest)?;
            return Ok(Self::Oci { dir, name });
        }
        if let Some(prefix) = FOREIGN.iter().find(|prefix| text.starts_with(**prefix)) {
            return Err(Error::refused(prefix, "an image is in a registry (NAME), in oci:DIR, oci-archive:FILE or docker-archive:FILE"));
        }
        Ok(Self::Registry(match text.strip_prefix("docker://") {
            Some(name) => name.parse()?,
            None => named(text)?,
        }))
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut path = |prefix: &str, path: &PathBuf, name: Option<&dyn fmt::Display>| {
            write!(f, "{prefix}:{}", path.display())?;
            name.map_or(Ok(()), |name| write!(f, ":{name}"))
        };
        match self {
            Self::Registry(reference) => write!(f, "{reference}"),
            Self::Oci { dir, name } => path("oci", dir, name.as_ref().map(|n| n as _)),
            Self::OciArchive { file, name } => path("oci-archive", file, name.as_ref().map(|n| n as _)),
            Self::DockerArchive { file, name } => path("docker-archive", file, name.as_ref().map(|n| n as _)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        for (text, expect) in [
            ("app", "docker.io/library/app:latest"),
            ("docker://app:1", "docker.io/library/app:1"),
            ("localhost:5000/app:1", "localhost:5000/app:1"),
            ("oci:dir", "oci:dir"),
            ("oci:a/b:v1", "oci:a/b:v1"),
            ("oci:dir:h.io/app:v1", "oci:dir:h.io/app:v1"),
            ("oci-archive:x.tar", "oci-archive:x.tar"),
            ("docker-archive:x.tar:app:1", "docker-archive:x.tar:docker.io/library/app:1"),
            ("oci:", "! \"oci:\" is no place of an image"),
            ("oci::v1", "! \"oci::v1\" is no place of an image"),
            ("oci:dir:", "! \"oci:dir:\" is no place of an image"),
            ("docker-archive:x.tar:APP", "! \"APP\" is not an image name"),
            ("dir:x", "! dir: is not supported"),
            ("docker-daemon:x:1", "! docker-daemon: is not supported"),
            ("https://h.io/a", "! \"https://h.io/a\" is not an image name"),
        ] {
            let got = Place::parse(text, &|name| Ok(name.parse::<Reference>()?)).map_or_else(|e| format!("! {e}"), |p| p.to_string());
            assert!(got == expect || (expect.starts_with('!') && got.starts_with(expect)), "{text}: {got}");
        }
    }
}
