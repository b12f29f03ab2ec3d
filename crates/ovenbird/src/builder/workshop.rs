//! Our engine as a [`Workshop`]: what plugins ask beside building.

use ovenbird_engine::input::BaseImage;
use ovenbird_oci::{Descriptor, ImageConfig, Manifest, Platform, Reference};
use serde_json::Value;

use super::{EngineBuilder, Image, Job, told};
use crate::error::Error;
use crate::request::BuildRequest;
use crate::source::SourceTree;
use crate::workflow::{Base, Described, Workshop};

fn value(document: &impl serde::Serialize) -> Value {
    serde_json::to_value(document).unwrap_or_default()
}

pub(super) fn bases(found: Vec<BaseImage>) -> Vec<Base> {
    let described = found.into_iter().map(|base| Base {
        image: described(base.platform, base.manifest, &base.document, &base.config),
        reference: base.reference,
        is_final: base.is_final,
    });
    described.collect()
}

fn described(platform: Platform, manifest: Descriptor, document: &Manifest, config: &ImageConfig) -> Described {
    Described {
        platform,
        id: document.config.digest.to_string(),
        size: document.layers.iter().map(|layer| layer.size).sum(),
        document: value(document),
        config: value(config),
        manifest,
    }
}

impl Workshop for EngineBuilder {
    fn describe(&self, image: &Image) -> Result<Vec<Described>, Error> {
        let members = self.engine().members(&image.target).map_err(|e| told(e, None))?;
        let described = members.into_iter().map(|one| described(one.platform, one.manifest, &one.document, &one.config));
        Ok(described.collect())
    }

    fn bases(&self, source: &SourceTree, request: &BuildRequest, job: &Job) -> Result<Vec<Base>, Error> {
        let input = self.input(source, &request.nameless())?;
        self.engine().bases(&input, &job.sink, &job.cancel).map(bases).map_err(|e| told(e, Some(source)))
    }

    fn squash(&self, image: &Image, whole: bool, source: &SourceTree, request: &BuildRequest, job: &Job) -> Result<Image, Error> {
        let mut input = self.input(source, &request.nameless())?;
        input.source_date_epoch = image.source_date_epoch;
        let output = self.engine().squash(&image.target, whole, &input, &job.sink, &job.cancel).map_err(|e| told(e, None))?;
        Ok(Image { target: output.target, platforms: output.platforms, ..image.clone() })
    }

    fn forget(&self, names: &[Reference]) -> Result<(), Error> {
        names.iter().try_for_each(|name| self.engine().store().untag(name).map(drop).map_err(Error::from))
    }

    fn as_base(&self, image: &Image) -> Result<String, Error> {
        // The store knows it by its digest.
        Ok(format!("localhost/exported@{}", image.target.digest))
    }
}
