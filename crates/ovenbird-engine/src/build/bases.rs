//! The base images of a build, described.

use std::sync::Arc;

use ovenbird_oci::Descriptor;

use super::{Engine, broken, lower};
use crate::error::BuildError;
use crate::event::EventSink;
use crate::input::{BaseImage, BuildInput, Cancel};
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
