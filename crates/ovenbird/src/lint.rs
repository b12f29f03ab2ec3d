//! Checks the Dockerfile of a request, without building.

use ovenbird_engine::frontend::{Findings, check};
use ovenbird_engine::plan::{ImageRequest, ResolvedImage};

use crate::builder::options;
use crate::error::Error;
use crate::request::BuildRequest;
use crate::source::SourceTree;

/// What a build of `request` would say of its Dockerfile. Base images are asked for with `resolve`; one that cannot be had makes the
/// check less exact, not fail.
pub fn lint(
    source: &SourceTree,
    request: &BuildRequest,
    resolve: &mut dyn FnMut(&ImageRequest) -> Result<ResolvedImage, String>,
) -> Result<Findings, Error> {
    Ok(check(&source.dockerfile, &options(source, request)?, resolve))
}
