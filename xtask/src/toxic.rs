//! `cargo xtask toxic`: pushes over connections that break, and the memory of a large layer, long, with their table.

use std::process::Command;

/// So many pushes make a page.
const ENOUGH: u64 = 20;

const PAGE: &str = "# Publish

What `cargo xtask toxic` last said. Debug build, servers and proxy on the same machine of two cores, so seconds compare rows only.

## Connections that break
Each push goes to an empty registry, through a proxy that cuts 30 of 100 connections at a random byte (half of them with a reset), each push with
another seed. Every push ended well: the registry had verified each blob, and the tag.

- *keeps what arrived*, *keeps whole requests*: a registry of the tests that does what the specification allows; *Debian's docker-registry 2.8*
  loses an upload when a request breaks, so that the blob is sent again.
- *not sent again*: what the registry had when a transfer broke. *sent again*: what was given to a connection that broke and did not arrive.

PUSHES
## A registry that is killed
An image is published under two names (one new, one that moves) to three registries (Debian's `docker-registry`), and one of them gets `kill -9`
as soon as the first name stands or some milliseconds later; in every second round it comes back while the publish is taken back, else
after that. *half-moved*: a name that is the new image in one registry and not in another, without the error having said so. *said to be
unknown*: the dead registry had taken a name, did not come back in time, and the error named it.

KILLED
## Memory
The most that the process had (`VmHWM`), pushing one layer over such connections to both kinds of registry, and pulling it.

MEMORY";

/// Runs the tests at length; `words` are `--pushes N`, `--size BYTES` and `--layer BYTES`.
pub(crate) fn run(words: &[&str]) -> Result<(), String> {
    let (mut pushes, mut size, mut layer) = (ENOUGH, 1 << 30, 5 << 30);
    let mut rest = words.iter();
    while let Some(word) = rest.next() {
        let value = rest.next().ok_or_else(|| format!("{word} needs a value"))?;
        let wrong = || format!("{word} {value}: not a number");
        match *word {
            "--pushes" => pushes = value.parse().map_err(|_| wrong())?,
            "--size" => size = bytes(value).ok_or_else(wrong)?,
            "--layer" => layer = bytes(value).ok_or_else(wrong)?,
            other => return Err(format!("unknown argument {other:?}")),
        }
    }
    crate::run(Command::new(crate::cargo()).args(["build", "--package", "ovenbird-cli"]))?;
    let table = std::env::temp_dir().join(format!("ovenbird-toxic-{}", std::process::id()));
    let mut command = Command::new(crate::cargo());
    command.args(["nextest", "run", "--package", "ovenbird-testing", "--test", "publish"]);
    command.env("OVENBIRD_TOXIC_PUSHES", pushes.to_string()).env("OVENBIRD_TOXIC_SIZE", size.to_string());
    command.env("OVENBIRD_TOXIC_LAYER", layer.to_string()).env("OVENBIRD_TOXIC_TABLE", &table);
    let ended = crate::run(&mut command);
    let mut command = Command::new(crate::cargo());
    command.args(["nextest", "run", "--package", "ovenbird-oci", "--test", "publish", "-E", "test(killed)"]);
    command.env("OVENBIRD_PUBLISH_KILLS", (pushes * 2).to_string()).env("OVENBIRD_TOXIC_TABLE", &table);
    let ended = ended.and(crate::run(&mut command));
    let rows = std::fs::read_to_string(&table).unwrap_or_default();
    let _ = std::fs::remove_file(&table);
    let mut rows: Vec<&str> = rows.lines().collect();
    rows.sort_unstable();
    let (memory, rows): (Vec<&str>, Vec<&str>) = rows.into_iter().partition(|row| row.starts_with("| peak memory"));
    let (killed, rows): (Vec<&str>, Vec<&str>) = rows.into_iter().partition(|row| row.starts_with("| killed"));
    let killed = format!(
        "| | publishes | went well | taken back | half-moved | said to be unknown |\n|---|---|---|---|---|---|\n{}\n",
        killed.join("\n")
    );
    let rows = format!(
        "| registry | pushes | ended well | connections cut | transfers broke | not sent again, MiB | sent again, MiB | \
         bytes up, MiB | s |\n|---|---|---|---|---|---|---|---|---|\n{}\n",
        rows.join("\n")
    );
    let memory = format!("| | layer | | |\n|---|---|---|---|\n{}\n", memory.join("\n"));
    print!("{rows}\n{killed}\n{memory}");
    ended?;
    if pushes >= ENOUGH {
        let path = ovenbird_testing::repository().join("docs/benchmarks/publish.md");
        let page = PAGE.replace("PUSHES", &rows).replace("KILLED", &killed).replace("MEMORY", &memory);
        std::fs::write(&path, page).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    Ok(())
}

/// `20MiB`, `1GiB` or a number.
fn bytes(text: &str) -> Option<u64> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let unit = match unit {
        "" | "B" => 1,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    #[test]
    fn sizes() {
        for (text, expect) in [("20MiB", Some(20 << 20)), ("1GiB", Some(1 << 30)), ("7", Some(7)), ("GiB", None), ("1G", None), ("", None)]
        {
            assert_eq!(super::bytes(text), expect, "{text:?}");
        }
    }
}
