//! Results as Markdown: on the terminal, and as the page that is kept.

use std::fmt::Write as _;

use super::record::{Entry, Records, Row};
use super::verdict::{self, megabytes};

/// The page that is kept.
pub(super) fn document(records: &Records) -> String {
    let mut text = String::from(
        "# Ovenbird and other builders, measured side by side\n\n\
         Written by `cargo xtask bench --write`; figures are in `results.json` beside it. Each row's builders took turns in one run, each\n\
         turn with empty state of its own and a warm page cache, in another order every round. Seconds are medians and drift with the machine's load:\n\
         compare them within a row only. Memory is the peak of resident pages of the client's largest process plus the daemon.\n\n",
    );
    let _ = writeln!(text, "Machine: {}. All registries are on its loopback interface.\n", records.machine);
    let mut cases: Vec<&Entry> = records.cases.iter().collect();
    cases.sort_by_key(|entry| verdict::rank(&entry.measure));
    text + &tables(&cases, records)
}

/// What a run found.
pub(super) fn render(records: &Records) -> String {
    tables(&records.cases.iter().collect::<Vec<_>>(), records)
}

fn tables(cases: &[&Entry], records: &Records) -> String {
    let mut text = String::new();
    if !cases.is_empty() {
        targets(&mut text, cases);
        let mut builders: Vec<&str> = vec![];
        for row in cases.iter().flat_map(|entry| &entry.rows) {
            if !builders.contains(&row.builder.as_str()) {
                builders.push(&row.builder);
            }
        }
        matrix(&mut text, "## Seconds", cases, &builders, |row| format!("{:.3}", row.median()));
        matrix(&mut text, "## Peak memory in MB", cases, &builders, |row| megabytes(row.peak()).to_string());
        runs(&mut text, cases);
    }
    growth(&mut text, records);
    if !records.missing.is_empty() {
        text.push_str("## Not measured\n");
        for (name, reason) in &records.missing {
            let _ = writeln!(text, "- {name}: {reason}.");
        }
    }
    text
}

fn targets(text: &mut String, cases: &[&Entry]) {
    text.push_str("## Targets\n| case | target | measured | |\n|---|---|---|---|\n");
    for entry in cases {
        for (number, check) in verdict::checks(entry).iter().enumerate() {
            let title = if number == 0 { verdict::title(&entry.measure) } else { "" };
            let met = match check.met {
                Some(true) => "met",
                Some(false) => "**missed**",
                None => "–",
            };
            let _ = writeln!(text, "| {title} | {} | {} | {met} |", check.demand, check.found);
        }
    }
    text.push('\n');
}

fn matrix(text: &mut String, title: &str, cases: &[&Entry], builders: &[&str], cell: impl Fn(&Row) -> String) {
    let _ = writeln!(text, "{title}\n| case | {} |\n|---{}|", builders.join(" | "), "|---".repeat(builders.len()));
    for entry in cases {
        let _ = write!(text, "| {} |", verdict::title(&entry.measure));
        for builder in builders {
            let row = entry.rows.iter().find(|row| row.builder == *builder);
            let _ = write!(text, " {} |", row.map(&cell).unwrap_or_default());
        }
        text.push('\n');
    }
    text.push('\n');
}

fn runs(text: &mut String, cases: &[&Entry]) {
    text.push_str("## Runs\n| case | day | rounds | load average | |\n|---|---|---|---|---|\n");
    for entry in cases {
        let rounds = entry.own().map_or(0, |row| row.seconds.len());
        let mut notes: Vec<String> = entry.failed.iter().map(|(name, how)| format!("{name} failed: {}", how.replace('|', "/"))).collect();
        if let Some(bound) = &entry.bound {
            notes.push(format!(
                "least work: read {:.2} s, sha256 {:.2} s, compress {:.2} s to {:.2} of the size, write {:.2} s",
                bound.read, bound.hash, bound.compress, bound.ratio, bound.write
            ));
        }
        let _ =
            writeln!(text, "| {} | {} | {rounds} | {} | {} |", verdict::title(&entry.measure), entry.date, entry.load, notes.join("; "));
    }
    text.push('\n');
}

fn growth(text: &mut String, records: &Records) {
    if records.growths.is_empty() {
        return;
    }
    let _ = writeln!(
        text,
        "## How cost grows\nOvenbird alone. The exponent is that of time between the two largest inputs: 1 is linear, and at most {} is met; memory may\n\
         grow by at most {} over all.\n\n| what | factor: seconds (MB) | exponent | memory grows | |\n|---|---|---|---|---|",
        verdict::EXPONENT,
        verdict::MEMORY_GROWTH
    );
    for curve in &records.growths {
        let points: Vec<String> =
            curve.points.iter().map(|p| format!("{}×: {:.3} ({})", p.factor, p.seconds, megabytes(p.memory))).collect();
        let (Some(exponent), Some(memory)) = (curve.exponent(), curve.memory_growth()) else {
            let _ = writeln!(text, "| {} | {} | | | – |", curve.name, points.join(", "));
            continue;
        };
        let met = |met: bool, what: &str| if met { String::new() } else { format!("**{what} missed**") };
        let (time, memory_met) = (met(exponent <= verdict::EXPONENT, "time"), met(memory <= verdict::MEMORY_GROWTH, "memory"));
        let verdict = if time.is_empty() && memory_met.is_empty() { "met".to_owned() } else { format!("{time} {memory_met}") };
        let _ = writeln!(text, "| {} | {} | {exponent:.2} | ×{memory:.2} | {} |", curve.name, points.join(", "), verdict.trim());
    }
    text.push('\n');
}
