//! The content id: what decides an image, as one digest, known before anything is built.
//!
//! It is made of the definition key of the root file system (see [`crate::cache`]), the config, and the choices of the export. So what
//! moves no key moves no id: times, places, owners of context files, ignored files, stages and arguments that the target does not use.

use ovenbird_oci::digest::Hasher;
use ovenbird_oci::{Digest, Platform, Reference};
use serde::Serialize;

use super::Solver;
use crate::cache::CacheKey;
use crate::error::BuildError;
use crate::input::BuildInput;
use crate::ops::Session;
use crate::plan::{Op, Plan};

/// Bumped whenever the same input would make another image.
const FORMAT: &str = "ovenbird-id-1";

/// The id of a build and what it was made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ContentId {
    /// Of everything below.
    pub id: Digest,
    /// Format of the id: another format gives another id for the same input.
    pub format: &'static str,
    /// Each platform, in the order of the request.
    pub platforms: Vec<PlatformId>,
    /// How the image is written.
    pub form: Form,
}

/// What decides one platform's image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlatformId {
    /// Which.
    pub platform: Platform,
    /// Root file system: all steps with what they read. Absent for an image without files.
    pub files: Option<Digest>,
    /// Environment, command, user, labels and the other fields of the config.
    pub config: Digest,
    /// Lines of history.
    pub history: Digest,
    /// Images that the target is built from.
    pub images: Vec<ImageId>,
    /// Steps that the target needs, in their order. Two ids differ from the first step on that differs here.
    pub steps: Vec<StepId>,
}

/// An image that a build is made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ImageId {
    /// As looked up.
    pub name: Reference,
    /// The platform's manifest.
    pub digest: Digest,
}

/// A step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StepId {
    /// `[build 2/5] RUN make`.
    pub name: String,
    /// Of what it does and of all it is made from.
    pub key: Digest,
    /// What it reads of local folders: `context: src` and the digest of the names, modes and contents there.
    pub reads: Vec<(String, Digest)>,
}

/// How the image is written: other bytes, the same files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Form {
    /// `tar`, `gzip5`, `zstd3`.
    pub compression: String,
    /// Docker's media types instead of those of the OCI.
    pub docker_media_types: bool,
    /// Time of everything in the image, when it was asked for, seconds since 1970.
    pub source_date_epoch: Option<i64>,
    /// Digest of the annotations.
    pub annotations: Digest,
    /// The image carries its own cache.
    pub inline_cache: bool,
    /// An index over the platforms, even over one.
    pub index: bool,
}

/// The id of plans that are built together. Remote sources are fetched and local folders are read; nothing is run.
pub fn identify(session: &Session, plans: &[Plan]) -> Result<ContentId, BuildError> {
    let platforms = plans.iter().map(|plan| one(session, plan)).collect::<Result<Vec<_>, _>>()?;
    let form = form(session.input, plans)?;
    let mut hasher = Hasher::default();
    let mut add = |part: &[u8]| {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    };
    add(FORMAT.as_bytes());
    add(&document(&form)?);
    for platform in &platforms {
        add(platform.platform.to_string().as_bytes());
        add(platform.files.as_ref().map_or(&[][..], |digest| digest.as_bytes()));
        add(platform.config.as_bytes());
        add(platform.history.as_bytes());
    }
    Ok(ContentId { id: hasher.finish().0, format: FORMAT, platforms, form })
}

fn one(session: &Session, plan: &Plan) -> Result<PlatformId, BuildError> {
    let solver = Solver::new(session, plan, 0);
    if solver.prepare().is_err() {
        return Err(solver.into_failure());
    }
    let key = |vertex: usize| solver.nodes[vertex].definition.get().copied().map(CacheKey::digest);
    let (mut images, mut steps) = (vec![], vec![]);
    for (vertex, node) in solver.nodes.iter().enumerate() {
        match (solver.op(vertex), key(vertex)) {
            (Op::Image(image), _) => images.push(ImageId { name: image.reference.clone(), digest: image.manifest }),
            (Op::Local { .. } | Op::Merge { .. }, _) | (_, None) => {}
            (_, Some(key)) => {
                let contents = node.contents.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                let reads = contents.iter().map(|(what, contents)| (what.clone(), contents.digest)).collect();
                steps.push(StepId { name: plan.vertices[vertex].name.clone(), key, reads });
            }
        }
    }
    // The base's history comes with its manifest, which is in the key of the files.
    let history: Vec<(&str, bool)> = plan.history.iter().map(|entry| (entry.created_by.as_str(), entry.layer)).collect();
    Ok(PlatformId {
        platform: plan.platform.clone(),
        files: plan.root.and_then(key),
        config: Digest::of(&document(&plan.config)?),
        history: Digest::of(&document(&history)?),
        images,
        steps,
    })
}

fn form(input: &BuildInput, plans: &[Plan]) -> Result<Form, BuildError> {
    Ok(Form {
        compression: input.compression.to_string(),
        docker_media_types: input.docker_media_types,
        source_date_epoch: input.source_date_epoch.or_else(|| plans.iter().find_map(|plan| plan.source_date_epoch)),
        annotations: Digest::of(&document(&input.annotations)?),
        inline_cache: input.cache_inline,
        index: input.options.iter().any(|options| options.multi_platform),
    })
}

fn document(value: &impl Serialize) -> Result<Vec<u8>, BuildError> {
    serde_json::to_vec(value).map_err(|error| BuildError::Malformed { digest: "the content id".into(), reason: error.to_string() })
}
