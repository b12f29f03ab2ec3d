//! What is known of an image without building it: its content id, and whether it is there already.

use std::collections::BTreeMap;

use ovenbird_engine::ContentId;
use ovenbird_engine::input::Exportable;
use ovenbird_oci::Reference;
use ovenbird_oci::registry::Breaks;

use super::{EngineBuilder, Image, Job, told};
use crate::error::Error;
use crate::naming::Version;
use crate::request::BuildRequest;
use crate::source::SourceTree;

/// Label with the version of what is in an image.
pub(crate) const VERSION_LABEL: &str = "org.opencontainers.image.version";
/// Tags of higher versions that are looked at: a name that follows the newest is at one of the highest.
const MOST_HIGHER: usize = 50;

/// Knows images that need not be built.
pub trait Library {
    /// What decides the image of a request.
    fn identify(&self, source: &SourceTree, request: &BuildRequest, job: &Job) -> Result<ContentId, Error>;
    /// The image that has this name on this machine, when it is whole.
    fn find(&self, name: &Reference) -> Result<Option<Image>, Error>;
    /// The image that has this name in its registry: brought here with its layers, or (not `whole`) without those, which stay there until
    /// something reads them.
    fn fetch(&self, name: &Reference, whole: bool, job: &Job) -> Result<Option<Image>, Error>;
    /// What a name in a registry stands for, when that is a higher version than this one: by a tag of that version for the same image, or
    /// by the image's label.
    fn overtaken(&self, name: &Reference, version: &Version, job: &Job) -> Result<Option<Version>, Error>;
    /// Labels of an image that every platform of it has.
    fn labels(&self, image: &Image) -> Result<BTreeMap<String, String>, Error>;
}

impl EngineBuilder {
    fn image(&self, target: ovenbird_oci::Descriptor) -> Result<Image, Error> {
        let members = self.engine().members(&target).map_err(|e| told(e, None))?;
        let platforms = members.into_iter().map(|m| (m.platform, m.manifest, m.document.config.digest)).collect();
        Ok(Image {
            target,
            platforms,
            ran: 0,
            cached: 0,
            source_date_epoch: None,
            exportable: Exportable::default(),
            breaks: Breaks::default(),
            bases: vec![],
        })
    }
}

impl Library for EngineBuilder {
    fn identify(&self, source: &SourceTree, request: &BuildRequest, job: &Job) -> Result<ContentId, Error> {
        let input = self.input(source, &request.nameless())?;
        self.engine().identify(&input, &job.sink, &job.cancel).map_err(|e| told(e, Some(source)))
    }

    fn find(&self, name: &Reference) -> Result<Option<Image>, Error> {
        self.engine().find(name).map_err(|e| told(e, None))?.map(|target| self.image(target)).transpose()
    }

    fn fetch(&self, name: &Reference, whole: bool, job: &Job) -> Result<Option<Image>, Error> {
        let found = self.engine().fetch(name, whole, &job.sink, &job.cancel).map_err(|e| told(e, None))?;
        found.map(|target| self.image(target)).transpose()
    }

    fn overtaken(&self, name: &Reference, version: &Version, job: &Job) -> Result<Option<Version>, Error> {
        let engine = self.engine();
        let asked = |error| told(error, None);
        let look = |name: &Reference| engine.ask(&job.cancel, async |client| client.look(name).await).map_err(asked);
        let Some(now) = look(name)? else { return Ok(None) };
        let follows =
            |tag: &String| Some((Version::parse(tag).filter(|v| name.tag().is_some_and(|line| v.is_followed_by(line)))?, tag.clone()));
        let mut higher: Vec<(Version, String)> =
            crate::registry::tags(self, name, job)?.iter().filter_map(follows).filter(|(other, _)| other > version).collect();
        higher.sort();
        for (other, tag) in higher.into_iter().rev().take(MOST_HIGHER) {
            if look(&name.with_tag(&tag))?.is_some_and(|found| found.digest == now.digest) {
                return Ok(Some(other));
            }
        }
        let described = engine.fetch(&name.with_digest(now.digest), false, &job.sink, &job.cancel).map_err(asked)?;
        let Some(image) = described.map(|target| self.image(target)).transpose()? else { return Ok(None) };
        let said = self.labels(&image)?.get(VERSION_LABEL).and_then(|text| Version::parse(text));
        Ok(said.filter(|said| said > version))
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
