//! `ovenbird df`.

use clap::Args;
use ovenbird::Error;
use ovenbird::builder::told;

use crate::progress::bytes;
use crate::session::Session;

/// Show how much the state directory holds.
#[derive(Debug, Args)]
pub(crate) struct DfArgs {
    /// JSON, in bytes
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &DfArgs, session: &Session) -> Result<(), Error> {
    let builder = session.sandboxed()?;
    let usage = builder.engine().disk_usage().map_err(|e| told(e, None))?;
    if args.json {
        return crate::print(&super::json(&usage)?);
    }
    let rows = [
        ("blobs", usage.blobs),
        ("snapshots", usage.snapshots),
        ("cache mounts", usage.cache_mounts),
        ("other", usage.other),
        ("total", usage.total()),
    ];
    let lines: Vec<String> = rows.iter().map(|(name, size)| format!("{name:14}{:>10}", bytes(*size))).collect();
    crate::print(&(lines.join("\n") + "\n"))
}
