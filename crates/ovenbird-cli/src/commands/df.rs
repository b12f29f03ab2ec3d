//! `ovenbird df`.

use std::fmt::Write as _;

use clap::Args;
use ovenbird::Error;
use ovenbird::builder::told;
use ovenbird_engine::{CacheEntry, DiskUsage};
use serde::Serialize;

use crate::progress::bytes;
use crate::session::Session;

/// Show how much the state directory holds.
#[derive(Debug, Args)]
pub(crate) struct DfArgs {
    /// Also every cached result and cache mount, those last used longest ago first
    #[arg(short, long)]
    verbose: bool,
    /// JSON, in bytes
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Shown {
    #[serde(flatten)]
    usage: DiskUsage,
    #[serde(skip_serializing_if = "Option::is_none")]
    entries: Option<Vec<CacheEntry>>,
}

pub(crate) fn run(args: &DfArgs, session: &Session) -> Result<(), Error> {
    let builder = session.sandboxed()?;
    let engine = builder.engine();
    let entries = if args.verbose { Some(engine.cache_entries().map_err(|e| told(e, None))?) } else { None };
    let usage = engine.disk_usage().map_err(|e| told(e, None))?;
    if args.json {
        return crate::print(&super::json(&Shown { usage, entries })?);
    }
    let mut text = String::new();
    if let Some(entries) = &entries {
        let _ = writeln!(text, "{:26}{:17}{:>10}  {:22}IN USE", "ID", "TYPE", "SIZE", "LAST USED");
        for entry in entries {
            let used = i64::try_from(entry.last_used).ok().and_then(|seconds| jiff::Timestamp::from_second(seconds).ok());
            let used = used.map(|time| time.to_string()).unwrap_or_default();
            // As many digits as the id of a result has: enough for `prune --filter id=`.
            let id = entry.id.get(..24).unwrap_or(&entry.id);
            let in_use = if entry.in_use { "yes" } else { "no" };
            let _ = writeln!(text, "{id:26}{:17}{:>10}  {used:22}{in_use}", entry.kind.name(), bytes(entry.size));
        }
        text.push('\n');
    }
    let rows = [
        ("blobs", usage.blobs),
        ("snapshots", usage.snapshots),
        ("cache mounts", usage.cache_mounts),
        ("other", usage.other),
        ("total", usage.total()),
    ];
    for (name, size) in rows {
        let _ = writeln!(text, "{name:14}{:>10}", bytes(size));
    }
    crate::print(&text)
}
