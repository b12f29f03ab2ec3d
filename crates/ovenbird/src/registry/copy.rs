//! Copies an image from one place to another: all platforms of an index, digests as they are.
//!
//! Blobs go through the store: what is in it already is not fetched, what the other side has is not sent, and what both sides have on one
//! registry is mounted there.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write as _};
use std::path::Path;

use ovenbird_engine::Event;
use ovenbird_engine::ops::progress_events;
use ovenbird_oci::archive::{self, ArchiveError};
use ovenbird_oci::{Descriptor, Digest, Platform, Reference, beside};

use super::{Place, asked};
use crate::builder::{EngineBuilder, Job};
use crate::error::{Error, Kind};

/// Copies; gives what was copied.
pub fn copy(builder: &EngineBuilder, from: &Place, to: &Place, platform: Option<&Platform>, job: &Job) -> Result<Descriptor, Error> {
    let (target, origins) = fetch(builder, from, platform, matches!(to, Place::Registry(_)), job)?;
    job.sink.emit(Event::Message { text: format!("copying {} to {to}", target.digest.short()) });
    let store = builder.engine().store();
    match to {
        Place::Registry(name) => {
            let progress = progress_events(job.sink.clone(), "pushing");
            let push = async |client: ovenbird_oci::registry::Client| client.push(store, &target, name, &origins, &progress).await;
            builder.engine().ask(&job.cancel, push).map_err(asked)?;
        }
        Place::Oci { dir, name } => archive::write_oci_dir_tagged(store, &target, name.as_deref(), dir)?,
        Place::OciArchive { file, name } => {
            write(file, |out| archive::write_oci_tagged(store, &target, name.as_deref(), out))?;
        }
        Place::DockerArchive { file, name } => {
            let own = match from {
                Place::Registry(own) => Some(own.clone()),
                Place::DockerArchive { name, .. } => name.clone(),
                Place::Oci { .. } | Place::OciArchive { .. } => None,
            };
            let names: Vec<Reference> = name.clone().or(own).into_iter().filter(|name| name.tag().is_some()).collect();
            write(file, |out| archive::write_docker(store, &target, &names, out))?;
        }
    }
    Ok(target)
}

/// Brings an image into the store. For a registry that follows (`lazy`), only its name is looked up: the push asks for what it needs.
fn fetch(
    builder: &EngineBuilder,
    from: &Place,
    platform: Option<&Platform>,
    lazy: bool,
    job: &Job,
) -> Result<(Descriptor, BTreeMap<Digest, Reference>), Error> {
    let engine = builder.engine();
    let store = engine.store();
    let open = |path: &Path| {
        File::open(path)
            .map(BufReader::new)
            .map_err(|error| Error::from_chain(Kind::Source, &error).while_doing(format!("cannot read {}", path.display())))
    };
    let told = |error: ArchiveError| Error::from(error).while_doing(format!("cannot copy {from}"));
    let whole = match from {
        Place::Registry(name) if lazy => {
            let target = engine.ask(&job.cancel, async |client| client.resolve(name, platform, store).await).map_err(asked)?;
            let origins = BTreeMap::from([(target.digest, name.with_digest(target.digest))]);
            return Ok((target, origins));
        }
        Place::Registry(name) => {
            let progress = progress_events(job.sink.clone(), "pulling");
            let pulled = engine.ask(&job.cancel, async |client| client.pull(name, platform, store, &progress).await).map_err(asked)?;
            return Ok((Descriptor { platform: None, ..pulled }, BTreeMap::new()));
        }
        Place::Oci { dir, name } => archive::read_dir_one(store, dir, name.as_deref()).map_err(told)?,
        Place::OciArchive { file, name } => archive::read_one(store, &mut open(file)?, name.as_deref()).map_err(told)?,
        Place::DockerArchive { file, name } => {
            let name = name.as_ref().map(Reference::familiar);
            archive::read_one(store, &mut open(file)?, name.as_deref()).map_err(told)?
        }
    };
    let Some(wanted) = platform.filter(|_| whole.is_index()) else { return Ok((whole, BTreeMap::new())) };
    let members = engine.members(&whole).map_err(asked)?;
    let available: Vec<String> = members.iter().map(|member| member.platform.to_string()).collect();
    let best = members.into_iter().filter_map(|m| Some((wanted.preference(&m.platform)?, m.manifest))).min_by_key(|(rank, _)| *rank);
    let (_, manifest) = best.ok_or_else(|| {
        Error::new(Kind::Usage, format!("{from} has no image for {wanted}; it has {}", available.join(", ")))
            .hint("without --platform, all of them are copied")
    })?;
    Ok((Descriptor { platform: None, ..manifest }, BTreeMap::new()))
}

/// Writes a file, whole or not at all.
fn write(path: &Path, content: impl FnOnce(&mut dyn io::Write) -> Result<(), ArchiveError>) -> Result<(), Error> {
    let failed = |error: io::Error| Error::from_chain(Kind::Configuration, &error).while_doing(format!("cannot write {}", path.display()));
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let file = beside::file_in(folder, 0o666).map_err(failed)?;
    let mut out = BufWriter::new(file);
    content(&mut out)?;
    out.flush().map_err(failed)?;
    let file = out.into_inner().map_err(|error| failed(error.into_error()))?;
    file.persist(path).map(drop).map_err(|error| failed(error.error))
}
