//! What is known of an image without building it: its content id, and whether it is there already.

use std::collections::BTreeMap;

use ovenbird_engine::ContentId;
use ovenbird_engine::input::Exportable;
use ovenbird_oci::Reference;
use ovenbird_oci::registry::Breaks;

use super::{EngineBuilder, Image, Job, told};
use crate::error::Error;
use crate::request::BuildRequest;
use crate::source::SourceTree;

/// Knows images that need not be built.
pub trait Library {
    /// What decides the image of a request.
    fn identify(&self, source: &SourceTree, request: &BuildRequest, job: &Job) -> Result<ContentId, Error>;
    /// The image that has this name on this machine, when it is whole.
    fn find(&self, name: &Reference) -> Result<Option<Image>, Error>;
    /// The image that has this name in its registry: brought here with its layers, or (not `whole`) without those, which stay there until
    /// something reads them.
    fn fetch(&self, name: &Reference, whole: bool, job: &Job) -> Result<Option<Image>, Error>;
    /// Labels of an image that every platform of it has.
    fn labels(&self, image: &Image) -> Result<BTreeMap<String, String>, Error>;
}

impl EngineBuilder {
    fn image(&self, target: ovenbird_oci::Descriptor) -> Result<Image, Error> {
        let members = self.engine().members(&target).map_err(|e| told(e, None))?;
        let platforms = members.into_iter().map(|m| (m.platform, m.manifest, m.document.config.digest)).collect();
        Ok(Image { target, platforms, ran: 0, cached: 0, source_date_epoch: None, exportable: Exportable::default(), breaks: Breaks::default() })
    }
}

impl Library for EngineBuilder {
    fn identify(&self, source: &SourceTree, request: &BuildRequest, job: &Job) -> Result<ContentId, Error> {
        let input = self.input(source, request)?;
        self.engine().identify(&input, &job.sink, &job.cancel).map_err(|e| told(e, Some(source)))
    }

    fn find(&self, name: &Reference) -> Result<Option<Image>, Error> {
        self.engine().find(name).map_err(|e| told(e, None))?.map(|target| self.image(target)).transpose()
    }

    fn fetch(&self, name: &Reference, whole: bool, job: &Job) -> Result<Option<Image>, Error> {
        let found = self.engine().fetch(name, whole, &job.sink, &job.cancel).map_err(|e| told(e, None))?;
        found.map(|target| self.image(target)).transpose()
    }

    fn labels(&self, image: &Image) -> Result<BTreeMap<String, String>, Error> {
        let members = self.engine().members(&image.target).map_err(|e| told(e, None))?;
        let mut labels: Option<BTreeMap<String, String>> = None;
        for member in members {
            let own = member.config.config.labels;
            labels = Some(match labels {
                None => own,
                Some(known) => known.into_iter().filter(|(name, value)| own.get(name) == Some(value)).collect(),
            });
        }
        Ok(labels.unwrap_or_default())
    }
}
