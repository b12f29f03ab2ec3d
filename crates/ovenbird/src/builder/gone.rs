//! No builder: for exit plugins of a build whose worker never came, or is gone. They run, and have no image.

use std::collections::BTreeMap;

use ovenbird_engine::ContentId;
use ovenbird_oci::Reference;
use ovenbird_oci::publish::Target;
use ovenbird_oci::registry::Breaks;

use super::{Builder, Image, Job, Library};
use crate::error::{Error, Kind};
use crate::naming::Version;
use crate::request::{BuildRequest, OutputKind};
use crate::source::SourceTree;
use crate::workflow::{Base, Described, Workshop};

/// See the module.
#[derive(Debug)]
pub(crate) struct Gone;

fn gone<T>() -> Result<T, Error> {
    Err(Error::new(Kind::Driver, "the place of the build is gone"))
}

impl Builder for Gone {
    fn build(&self, _: &SourceTree, _: &BuildRequest, _: &Job) -> Result<Image, Error> {
        gone()
    }

    fn name(&self, _: &Image, _: &[Reference]) -> Result<(), Error> {
        gone()
    }

    fn publish(&self, _: &Image, _: &[Target], _: &Job) -> Result<Breaks, Error> {
        gone()
    }

    fn export(&self, _: &Image, _: &OutputKind, _: &[Reference], _: &Job) -> Result<(), Error> {
        gone()
    }

    fn export_caches(&self, _: &Image, _: &SourceTree, _: &BuildRequest, _: &[Reference], _: &Job) -> Result<(), Error> {
        gone()
    }
}

impl Library for Gone {
    fn identify(&self, _: &SourceTree, _: &BuildRequest, _: &Job) -> Result<ContentId, Error> {
        gone()
    }

    fn find(&self, _: &Reference) -> Result<Option<Image>, Error> {
        gone()
    }

    fn fetch(&self, _: &Reference, _: bool, _: &Job) -> Result<Option<Image>, Error> {
        gone()
    }

    fn overtaken(&self, _: &Reference, _: &Version, _: &Job) -> Result<Option<Version>, Error> {
        gone()
    }

    fn labels(&self, _: &Image) -> Result<BTreeMap<String, String>, Error> {
        gone()
    }
}

impl Workshop for Gone {
    fn describe(&self, _: &Image) -> Result<Vec<Described>, Error> {
        gone()
    }

    fn bases(&self, _: &SourceTree, _: &BuildRequest, _: &Job) -> Result<Vec<Base>, Error> {
        gone()
    }

    fn as_base(&self, _: &Image) -> Result<String, Error> {
        gone()
    }

    fn squash(&self, _: &Image, _: bool, _: &SourceTree, _: &BuildRequest, _: &Job) -> Result<Image, Error> {
        gone()
    }

    fn forget(&self, names: &[Reference]) -> Result<(), Error> {
        if names.is_empty() { Ok(()) } else { gone() }
    }
}
