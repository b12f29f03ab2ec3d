//! `cargo xtask faults N`: the fault injection tests, long, with their table.

use std::process::Command;

/// So many kills make a page.
const ENOUGH: u32 = 200;

const PAGE: &str = "# Faults

What `cargo xtask faults KILLS` last said. Something is broken, then the same thing is built and pushed: it must have the same digest as before
anything broke, and nothing may be left: no mount, no process, no namespace, no temporary file. A build that refuses cleanly and is right the next
time would count in the last column.

- *kill -9* stops a build, a prune or an export at a random moment; a fifth of the builds begin in an empty state directory.
- *damaged* files are emptied, cut short or have one bit flipped, up to three at once.
- *full disk*: a build on disks of several sizes that are all too small; then a prune on a disk without a free byte or file.
- *two builds and a prune*: prunes in a row, of all kinds, while the two builds run.

";

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
    let mut rows: Vec<&str> = rows.lines().collect();
    rows.sort_unstable();
    let rows = format!("| fault | runs | right at once | right with the next build |\n|---|---|---|---|\n{}\n", rows.join("\n"));
    print!("{rows}");
    ended?;
    if kills >= ENOUGH {
        let path = ovenbird_testing::repository().join("docs/benchmarks/faults.md");
        std::fs::write(&path, PAGE.replace("KILLS", &kills.to_string()) + &rows).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    Ok(())
}
