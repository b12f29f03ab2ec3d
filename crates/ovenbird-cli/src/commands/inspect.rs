//! `ovenbird inspect`.

use clap::Args;
use ovenbird::{Error, Kind};
use ovenbird_oci::store::Store;
use ovenbird_oci::{Descriptor, Digest};
use serde_json::{Map, Value};

use crate::session::Session;

/// Show the manifest and the configuration of an image as JSON.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Name or digest of the image
    image: String,
    /// The bytes of the manifest or index, as they are
    #[arg(long)]
    raw: bool,
}

pub(crate) fn run(args: &InspectArgs, session: &Session) -> Result<(), Error> {
    let builder = session.images_only()?;
    let store = builder.engine().store();
    let target = session.find(store, &args.image)?;
    if args.raw {
        return crate::print(&String::from_utf8_lossy(&store.read(&target.digest)?));
    }
    crate::print(&super::json(&describe(store, &target)?)?)
}

fn describe(store: &Store, target: &Descriptor) -> Result<Value, Error> {
    let document = read(store, &target.digest)?;
    let mut out = Map::new();
    out.insert("digest".into(), target.digest.to_string().into());
    out.insert("mediaType".into(), target.media_type.clone().into());
    if let Some(manifests) = document["manifests"].as_array() {
        let mut images = vec![];
        for entry in manifests {
            let Ok(descriptor) = serde_json::from_value::<Descriptor>(entry.clone()) else { continue };
            // Only what was pulled is here.
            if store.has(&descriptor.digest) {
                images.push(one(store, &descriptor.digest)?);
            }
        }
        out.insert("images".into(), images.into());
        out.insert("index".into(), document);
    } else if let Value::Object(image) = one(store, &target.digest)? {
        out.extend(image);
    }
    Ok(out.into())
}

fn one(store: &Store, digest: &Digest) -> Result<Value, Error> {
    let manifest = read(store, digest)?;
    let config = match manifest["config"]["digest"].as_str().and_then(|d| d.parse().ok()) {
        Some(digest) => read(store, &digest)?,
        None => Value::Null,
    };
    Ok(serde_json::json!({"digest": digest, "manifest": manifest, "config": config}))
}

fn read(store: &Store, digest: &Digest) -> Result<Value, Error> {
    serde_json::from_slice(&store.read(digest)?)
        .map_err(|e| Error::from_chain(Kind::Configuration, &e).while_doing(format!("blob {digest} is not a JSON document")))
}
