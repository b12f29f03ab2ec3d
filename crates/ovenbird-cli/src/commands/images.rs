//! `ovenbird images`.

use clap::Args;
use ovenbird::Error;
use ovenbird_oci::store::Store;
use ovenbird_oci::{Descriptor, Digest, ImageConfig, Index, Manifest};
use serde_json::json;

use crate::progress::bytes;
use crate::session::Session;

/// List the images of this machine.
#[derive(Debug, Args)]
pub(crate) struct ImagesArgs {
    /// Digests only
    #[arg(short, long)]
    quiet: bool,
    /// JSON, one array
    #[arg(long, conflicts_with = "quiet")]
    json: bool,
}

/// What a manifest or an index says about an image, as far as its blobs are here.
struct Facts {
    platforms: Vec<String>,
    size: u64,
    created: Option<String>,
}

fn facts(store: &Store, target: &Descriptor) -> Facts {
    let mut facts = Facts { platforms: vec![], size: 0, created: None };
    let Ok(bytes) = store.read(&target.digest) else { return facts };
    let manifests = match serde_json::from_slice::<Index>(&bytes) {
        Ok(index) if !index.manifests.is_empty() => index.manifests.into_iter().map(|d| d.digest).collect(),
        _ => vec![target.digest],
    };
    for digest in manifests {
        let manifest = store.read(&digest).ok().and_then(|b| serde_json::from_slice::<Manifest>(&b).ok());
        let Some(manifest) = manifest else { continue };
        facts.size += manifest.config.size + manifest.layers.iter().map(|l| l.size).sum::<u64>();
        if let Some(config) = store.read(&manifest.config.digest).ok().and_then(|b| serde_json::from_slice::<ImageConfig>(&b).ok()) {
            let variant = config.variant.map(|v| format!("/{v}")).unwrap_or_default();
            facts.platforms.push(format!("{}/{}{variant}", config.os, config.architecture));
            facts.created = facts.created.or(config.created);
        }
    }
    facts
}

pub(crate) fn run(args: &ImagesArgs, session: &Session) -> Result<(), Error> {
    let builder = session.images_only()?;
    let store = builder.engine().store();
    let mut images = store.images()?;
    images.sort_by(|a, b| a.0.cmp(&b.0));
    if args.quiet {
        let mut digests: Vec<Digest> = images.iter().map(|(_, d)| d.digest).collect();
        digests.sort_unstable();
        digests.dedup();
        return digests.iter().try_for_each(|digest| crate::print(&format!("{digest}\n")));
    }
    let rows: Vec<_> = images.iter().map(|(name, target)| (name, target, facts(store, target))).collect();
    if args.json {
        let rows: Vec<_> = rows
            .iter()
            .map(|(name, target, facts)| {
                json!({"name": name.to_string(), "digest": target.digest, "mediaType": target.media_type, "platforms": facts.platforms,
                       "size": facts.size, "created": facts.created})
            })
            .collect();
        return crate::print(&super::json(&rows)?);
    }
    let mut table = vec![["NAME", "DIGEST", "PLATFORM", "SIZE", "CREATED"].map(str::to_owned)];
    table.extend(rows.into_iter().map(|(name, target, facts)| {
        let created = facts.created.map(|c| c.chars().take(10).collect()).unwrap_or_default();
        [name.familiar(), target.digest.short(), facts.platforms.join(","), bytes(facts.size), created]
    }));
    crate::print(&columns(&table))
}

/// Lines with columns as wide as their widest cell.
fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let widths: Vec<usize> = (0..N).map(|at| rows.iter().map(|r| r[at].chars().count()).max().unwrap_or(0)).collect();
    let mut out = String::new();
    for row in rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        out.push_str(cells.join("  ").trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table() {
        let rows = [["NAME", "SIZE"].map(str::to_owned), ["long-name", "1B"].map(str::to_owned)];
        assert_eq!(columns(&rows), "NAME       SIZE\nlong-name  1B\n");
    }
}
