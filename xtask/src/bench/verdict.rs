//! The targets, and whether a measurement meets them.

use super::record::{Entry, Row};

/// One demand on a measurement.
#[derive(Debug, Clone, Copy)]
enum Target {
    /// At most this part of the best other builder's time.
    OfBest(f64),
    /// The same among builders that isolate steps.
    OfBestIsolating(f64),
    /// No slower than any builder that does not.
    NotSlowerThanUnisolated,
    /// At most so many seconds.
    Seconds(f64),
    /// At most so many times the least work, measured in the same run.
    OfBound(f64),
}

/// What is measured, in words, and what is demanded. Memory is the same for all: half of the best other builder's.
const TARGETS: &[(&str, &str, &[Target])] = &[
    ("rebuild", "unchanged rebuild of 12 steps", &[Target::OfBest(0.25)]),
    ("steps", "20 trivial `RUN`, no cache", &[Target::OfBestIsolating(1.0 / 3.0), Target::NotSlowerThanUnisolated]),
    ("context-first", "20,000 small files: first build", &[Target::OfBest(1.0 / 3.0)]),
    ("context-unchanged", "20,000 small files: unchanged", &[Target::OfBest(0.25)]),
    ("context-touched", "20,000 small files: one mtime touched", &[Target::OfBest(0.25)]),
    ("context-changed", "20,000 small files: one file changed", &[Target::OfBest(0.25)]),
    ("stages", "4 independent stages of `sleep 2`", &[Target::Seconds(2.1)]),
    ("large", "`COPY` of 1 GiB random + 1 GiB text, push", &[Target::OfBest(0.5), Target::OfBound(1.3)]),
    ("base", "pull of a 300 MB base, one `RUN`, push", &[Target::OfBest(0.5)]),
    ("cache", "rebuild on an empty machine from the registry's cache", &[Target::OfBest(0.5)]),
    ("cold", "cold start, `FROM scratch` + `COPY`", &[Target::OfBest(0.5)]),
];

/// The most that an exponent of growth may be: linear, and the noise of a shared machine.
pub(super) const EXPONENT: f64 = 1.1;
/// The most that memory may grow over all factors.
pub(super) const MEMORY_GROWTH: f64 = 1.25;

/// Builders whose steps have no namespaces of their own.
fn isolates(builder: &str) -> bool {
    !builder.ends_with("-chroot") && builder != "kaniko"
}

/// A demand and what was found.
#[derive(Debug)]
pub(super) struct Check {
    /// The demand.
    pub(super) demand: String,
    /// What was found.
    pub(super) found: String,
    /// Is it met? `None`: nothing to compare with.
    pub(super) met: Option<bool>,
}

/// A measure in words.
pub(super) fn title(measure: &str) -> &str {
    TARGETS.iter().find(|(id, ..)| *id == measure).map_or(measure, |(_, title, _)| title)
}

/// The place of a measure in tables.
pub(super) fn rank(measure: &str) -> usize {
    TARGETS.iter().position(|(id, ..)| *id == measure).unwrap_or(TARGETS.len())
}

/// The fastest of some builders.
pub(super) fn best<'a>(rows: impl Iterator<Item = &'a Row>) -> Option<&'a Row> {
    rows.min_by(|a, b| a.median().total_cmp(&b.median()))
}

/// All demands on a measurement.
pub(super) fn checks(entry: &Entry) -> Vec<Check> {
    let targets = TARGETS.iter().find(|(id, ..)| *id == entry.measure).map_or(&[][..], |(.., targets)| targets);
    let Some(own) = entry.own() else { return vec![] };
    let seconds = own.median();
    let mut checks: Vec<Check> = targets.iter().map(|target| check(entry, seconds, *target)).collect();
    let lean = entry.others().min_by_key(|row| row.peak());
    checks.push(match lean {
        Some(row) => {
            let part = own.peak() as f64 / row.peak() as f64;
            Check {
                demand: "memory ≤ 1/2 of the best".into(),
                found: format!("{part:.2} of {} ({} of {} MB)", row.builder, megabytes(own.peak()), megabytes(row.peak())),
                met: Some(part <= 0.5),
            }
        }
        None => nothing("memory ≤ 1/2 of the best".into()),
    });
    checks
}

fn check(entry: &Entry, seconds: f64, target: Target) -> Check {
    let against = |demand: String, row: Option<&Row>, most: f64| match row {
        Some(row) => {
            let part = seconds / row.median();
            let found = format!("{part:.2} of {} ({seconds:.3} of {:.3} s)", row.builder, row.median());
            Check { demand, found, met: Some(part <= most) }
        }
        None => nothing(demand),
    };
    match target {
        Target::OfBest(part) => against(format!("time ≤ {} of the best", fraction(part)), best(entry.others()), part),
        Target::OfBestIsolating(part) => {
            let row = best(entry.others().filter(|row| isolates(&row.builder)));
            against(format!("time ≤ {} of the best that isolates", fraction(part)), row, part)
        }
        Target::NotSlowerThanUnisolated => {
            let row = best(entry.others().filter(|row| !isolates(&row.builder)));
            against("no slower than the best that does not isolate".into(), row, 1.0)
        }
        Target::Seconds(most) => Check { demand: format!("≤ {most} s"), found: format!("{seconds:.3} s"), met: Some(seconds <= most) },
        Target::OfBound(times) => {
            let demand = format!("≤ {times} × (read + sha256 + compress + write)");
            match &entry.bound {
                Some(bound) => {
                    let found = seconds / bound.total();
                    Check { demand, found: format!("{found:.2} × {:.2} s", bound.total()), met: Some(found <= times) }
                }
                None => nothing(demand),
            }
        }
    }
}

fn nothing(demand: String) -> Check {
    Check { demand, found: "nothing to compare with".into(), met: None }
}

/// `0.25` as `1/4`.
fn fraction(part: f64) -> String {
    format!("1/{:.0}", 1.0 / part)
}

/// Rounded, at least one.
pub(super) fn megabytes(bytes: u64) -> u64 {
    (bytes + 500_000) / 1_000_000
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::measure::Sample;

    fn entry(measure: &str, rows: &[(&str, f64, u64)]) -> Entry {
        let mut entry = Entry::new(measure, "0", None);
        for (builder, seconds, megabytes) in rows {
            entry.add(builder, Sample { seconds: *seconds, memory: megabytes * 1_000_000 });
        }
        entry
    }

    #[test]
    fn time_and_memory_have_their_own_best() {
        let entry = entry("rebuild", &[("ovenbird", 0.1, 20), ("fast", 0.3, 100), ("lean", 2.0, 40)]);
        let checks = checks(&entry);
        assert_eq!(checks[0].found, "0.33 of fast (0.100 of 0.300 s)");
        assert_eq!(checks[0].demand, "time ≤ 1/4 of the best");
        assert_eq!((checks[0].met, checks[1].met), (Some(false), Some(true)));
    }

    #[test]
    fn a_chroot_is_not_isolation() {
        let entry = entry("steps", &[("ovenbird", 0.4, 20), ("a-chroot", 0.5, 100), ("b-runc", 1.0, 100)]);
        let met: Vec<_> = checks(&entry).iter().map(|check| check.met).collect();
        assert_eq!(met, [Some(false), Some(true), Some(true)]);
    }

    #[test]
    fn without_others_nothing_is_decided() {
        assert!(checks(&entry("cold", &[("ovenbird", 0.4, 20)])).iter().all(|check| check.met.is_none()));
    }
}
