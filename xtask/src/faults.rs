//! `cargo xtask faults N`: the fault injection tests, long, with their table.

use std::process::Command;

/// Kills `kills` builds, and does everything else as often as it is worth; prints what was recovered.
pub(crate) fn run(kills: u32) -> Result<(), String> {
    crate::run(Command::new(crate::cargo()).args(["build", "--package", "ovenbird-cli"]))?;
    let table = std::env::temp_dir().join(format!("ovenbird-faults-{}", std::process::id()));
    let mut command = Command::new(crate::cargo());
    command.args(["nextest", "run", "--package", "ovenbird-testing", "--test", "faults"]);
    command.env("OVENBIRD_FAULTS", kills.to_string()).env("OVENBIRD_FAULTS_TABLE", &table);
    let ended = crate::run(&mut command);
    let rows = std::fs::read_to_string(&table).unwrap_or_default();
    let _ = std::fs::remove_file(&table);
    println!("{:34}{:>6}{:>10}{:>14}\n{}", "fault", "runs", "at once", "next build", rows.trim_end());
    ended
}
