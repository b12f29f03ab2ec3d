//! `ovenbird prune`.

use std::time::Duration;

use clap::Args;
use ovenbird::Error;
use ovenbird::builder::told;
use ovenbird::request::ByteSize;
use ovenbird_engine::PruneOptions;
use ovenbird_engine::prune::{Budget, CacheKind};

use crate::progress::bytes;
use crate::session::Session;

/// Remove cached build results, and images without a name. What a running build uses stays.
#[derive(Debug, Args)]
pub(crate) struct PruneArgs {
    /// Remove everything: images with a name and cache mounts too
    #[arg(short, long)]
    all: bool,
    /// Keep this much, the most recently used
    #[arg(long, visible_alias = "keep-storage", value_name = "BYTES")]
    reserved_space: Option<ByteSize>,
    /// Keep no more than this, but for --reserved-space
    #[arg(long, value_name = "BYTES")]
    max_used_space: Option<ByteSize>,
    /// Remove until so much of the disk is free, but for --reserved-space
    #[arg(long, value_name = "BYTES")]
    min_free_space: Option<ByteSize>,
    /// Only what fits: `until=24h` was not used for that long, `type=regular|exec.cachemount|source.local`, `id=ID` as `df --verbose` shows
    /// it. Repeatable: what fits all of them, of several types or ids any
    #[arg(long = "filter", value_name = "KEY=VALUE", value_parser = filter)]
    filters: Vec<Filter>,
    /// As in `docker builder prune`; ovenbird never asks
    #[arg(short, long)]
    force: bool,
}

/// One `--filter`.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Filter {
    Until(Duration),
    Kind(CacheKind),
    Id(String),
}

fn filter(text: &str) -> Result<Filter, String> {
    let Some((key, value)) = text.split_once('=') else {
        return Err(match text {
            "mutable" | "immutable" | "shared" | "private" | "inuse" => unknown(text),
            _ => "expected KEY=VALUE, for example until=24h or type=exec.cachemount".to_owned(),
        });
    };
    match key {
        "until" | "unused-for" => duration(value).map(Filter::Until),
        "type" => CacheKind::ALL.into_iter().find(|kind| kind.name() == value).map(Filter::Kind).ok_or_else(|| match value {
            "source.git.checkout" => "git checkouts are results like those of steps: type=regular".to_owned(),
            "internal" | "frontend" => format!("ovenbird keeps nothing of the type {value}; it has {}", kinds()),
            _ => format!("there is no type {value:?}; there are {}", kinds()),
        }),
        "id" if value.is_empty() => Err("expected id=ID; `ovenbird df --verbose` shows the ids".to_owned()),
        "id" => Ok(Filter::Id(value.to_owned())),
        _ => Err(unknown(key)),
    }
}

fn kinds() -> String {
    CacheKind::ALL.map(CacheKind::name).join(", ")
}

fn unknown(key: &str) -> String {
    match key {
        "inuse" => "what a running build uses is never removed, and the filter is not needed".to_owned(),
        "id~" | "type~" | "id!" | "type!" => "only KEY=VALUE is understood, no patterns and no negation".to_owned(),
        _ => format!("there is no filter {key:?}; there are until, type and id"),
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    let expected = || "expected until=DURATION, for example until=24h, until=7d or until=1h30m".to_owned();
    let span: jiff::Span = text.parse().map_err(|_| expected())?;
    let duration = span.to_duration(jiff::SpanRelativeTo::days_are_24_hours()).map_err(|_| expected())?;
    duration.try_into().map_err(|_| expected())
}

impl PruneArgs {
    fn options(&self) -> PruneOptions {
        let size = |size: &Option<ByteSize>| size.as_ref().map(|bytes| bytes.0);
        let budget =
            Budget { reserved: size(&self.reserved_space), max_used: size(&self.max_used_space), min_free: size(&self.min_free_space) };
        let mut options = PruneOptions { all: self.all, budget, ..PruneOptions::default() };
        for filter in &self.filters {
            match filter {
                // All must fit, so the longest counts.
                Filter::Until(age) => options.filter_until = options.filter_until.max(Some(*age)),
                Filter::Kind(kind) => drop(options.kinds.insert(*kind)),
                Filter::Id(id) => options.ids.push(id.clone()),
            }
        }
        options
    }
}

pub(crate) fn run(args: &PruneArgs, session: &Session) -> Result<(), Error> {
    let builder = session.sandboxed()?;
    let report = builder.engine().prune(&args.options()).map_err(|e| told(e, None))?;
    let in_use = match report.in_use {
        0 => String::new(),
        1 => "; 1 is in use".to_owned(),
        count => format!("; {count} are in use"),
    };
    crate::print(&format!(
        "removed {} {}, {}{in_use}\n",
        report.removed,
        if report.removed == 1 { "entry" } else { "entries" },
        bytes(report.bytes)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters() {
        let until = |seconds| Ok(Filter::Until(Duration::from_secs(seconds)));
        for (text, expect) in [
            ("until=24h", until(86400)),
            ("unused-for=24h", until(86400)),
            ("until=7d", until(604_800)),
            ("until=1h30m", until(5400)),
            ("type=regular", Ok(Filter::Kind(CacheKind::Regular))),
            ("type=exec.cachemount", Ok(Filter::Kind(CacheKind::CacheMount))),
            ("type=source.local", Ok(Filter::Kind(CacheKind::SourceLocal))),
            ("id=abc", Ok(Filter::Id("abc".into()))),
            ("until=-1h", Err("until=24h")),
            ("until=", Err("until=24h")),
            ("24h", Err("KEY=VALUE")),
            ("type=source.git.checkout", Err("type=regular")),
            ("type=frontend", Err("keeps nothing of the type frontend")),
            ("type=x", Err("regular, exec.cachemount, source.local")),
            ("id=", Err("df --verbose")),
            ("id~=x", Err("no patterns")),
            ("inuse", Err("never removed")),
            ("inuse=true", Err("never removed")),
            ("shared", Err("until, type and id")),
            ("label=x", Err("until, type and id")),
        ] {
            match (filter(text), expect) {
                (Ok(found), Ok(expect)) => assert_eq!(found, expect, "{text}"),
                (Err(message), Err(words)) => assert!(message.contains(words), "{text}: {message}"),
                (found, _) => panic!("{text}: {found:?}"),
            }
        }
    }
}
