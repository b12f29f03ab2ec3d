//! What plugins need of the engine: the base images of a build, described, and the layers of an image, merged.

use std::sync::Arc;

use ovenbird_oci::Descriptor;
use ovenbird_oci::registry::Breaks;

use super::{Engine, broken, lower};
use crate::error::BuildError;
use crate::event::EventSink;
use crate::export::assemble::{self, Assembled};
use crate::export::squash;
use crate::input::{BaseImage, BuildInput, BuildOutput, Cancel, Exportable};
use crate::ops::{Session, image};
use crate::plan::{Op, Plan};

impl Engine {
    /// The images that a build would begin with, each once: looked up as a build does, layers stay where they are.
    pub fn bases(&self, input: &BuildInput, sink: &Arc<dyn EventSink>, cancel: &Cancel) -> Result<Vec<BaseImage>, BuildError> {
        let parsed = ovenbird_dockerfile::parse(&input.dockerfile);
        if parsed.diagnostics.iter().any(|d| d.severity == ovenbird_dockerfile::Severity::Error) {
            return Err(broken(input, &parsed));
        }
        let session = self.session(input, sink, cancel);
        let plans: Result<Vec<Plan>, _> =
            input.options.iter().map(|options| lower(&session, &parsed.dockerfile, options).map(|(plan, _)| plan)).collect();
        of_plans(&session, &plans?)
    }
}

impl Engine {
    /// The same files in fewer layers: in one (`whole`), or in one above those of the base image. Of `input` the form of layers counts.
    pub fn squash(
        &self,
        target: &Descriptor,
        whole: bool,
        input: &BuildInput,
        sink: &Arc<dyn EventSink>,
        cancel: &Cancel,
    ) -> Result<BuildOutput, BuildError> {
        let session = self.session(input, sink, cancel);
        let mut images = vec![];
        for member in self.members(target)? {
            images.push(match squash::squash(&session, &member, whole)? {
                Some(image) => image,
                None => {
                    Assembled { platform: member.platform, config: member.document.config.digest, manifest: member.manifest, chain: vec![] }
                }
            });
        }
        let target = match &images[..] {
            [only] if !target.is_index() => only.manifest.clone(),
            _ => assemble::index(&session, &images)?,
        };
        Ok(BuildOutput {
            target,
            platforms: images.into_iter().map(|image| (image.platform, image.manifest, image.config)).collect(),
            ran: 0,
            cached: 0,
            exportable: Exportable::default(),
            breaks: Breaks::default(),
            bases: vec![],
        })
    }
}

/// What the plans read.
pub(super) fn of_plans(session: &Session, plans: &[Plan]) -> Result<Vec<BaseImage>, BuildError> {
    let mut found: Vec<BaseImage> = vec![];
    for plan in plans {
        for vertex in &plan.vertices {
            let Op::Image(op) = &vertex.op else { continue };
            let is_final = plan.base.as_ref().is_some_and(|base| base.manifest == op.manifest);
            if let Some(known) = found.iter_mut().find(|known| known.manifest.digest == op.manifest && known.platform == plan.platform) {
                known.is_final |= is_final;
                continue;
            }
            let (document, config) = image::read_image(session, &op.manifest)?;
            let media_type = document.media_type.clone().unwrap_or_else(|| ovenbird_oci::image::media::OCI_MANIFEST.into());
            let size = session.state.store().read(&op.manifest)?.len() as u64;
            found.push(BaseImage {
                reference: op.reference.with_digest(op.manifest),
                platform: plan.platform.clone(),
                is_final,
                manifest: Descriptor::new(media_type, op.manifest, size),
                document,
                config,
            });
        }
    }
    Ok(found)
}
