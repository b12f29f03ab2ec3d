//! `ovenbird prune`.

use std::time::Duration;

use clap::Args;
use ovenbird::Error;
use ovenbird::builder::told;
use ovenbird::request::ByteSize;
use ovenbird_engine::PruneOptions;

use crate::progress::bytes;
use crate::session::Session;

/// Remove cached build results, and images without a name.
#[derive(Debug, Args)]
pub(crate) struct PruneArgs {
    /// Remove everything: images with a name and cache mounts too
    #[arg(short, long)]
    all: bool,
    /// Keep this much, the most recently used first
    #[arg(long, visible_aliases = ["max-used-space", "reserved-space"], value_name = "BYTES")]
    keep_storage: Option<ByteSize>,
    /// `until=24h`: only what was not used for that long
    #[arg(long, value_name = "until=DURATION", value_parser = until)]
    filter: Option<Duration>,
    /// As in `docker builder prune`; ovenbird never asks
    #[arg(short, long)]
    force: bool,
}

fn until(text: &str) -> Result<Duration, String> {
    let expected = || "expected until=DURATION, for example until=24h, until=7d or until=1h30m".to_owned();
    let span: jiff::Span = text.strip_prefix("until=").ok_or_else(expected)?.parse().map_err(|_| expected())?;
    let duration = span.to_duration(jiff::SpanRelativeTo::days_are_24_hours()).map_err(|_| expected())?;
    duration.try_into().map_err(|_| expected())
}

pub(crate) fn run(args: &PruneArgs, session: &Session) -> Result<(), Error> {
    let builder = session.sandboxed()?;
    let options = PruneOptions { all: args.all, keep_bytes: args.keep_storage.map(|b| b.0), filter_until: args.filter };
    let report = builder.engine().prune(&options).map_err(|e| told(e, None))?;
    crate::print(&format!("removed {} entries, {}\n", report.removed, bytes(report.bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, expect) in [
            ("until=24h", Some(86400)),
            ("until=7d", Some(604_800)),
            ("until=1h30m", Some(5400)),
            ("until=-1h", None),
            ("until=", None),
            ("24h", None),
            ("label=x", None),
        ] {
            assert_eq!(until(text).ok().map(|d| d.as_secs()), expect, "{text}");
        }
    }
}
