//! `cargo xtask layout`: which functions a build needs, so that the linker puts them beside each other.
//!
//! The kernel maps a program in windows of 64 KiB, and each counts as memory of the process. Of 15 MB of code a build runs less than one, but
//! scattered as the compiler leaves it, it touches half of all windows.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use ovenbird_testing::base::Base;
use ovenbird_testing::registry::{Options, Registry};
use regex::Regex;

use crate::packages;

const HEADER: &str = "\
/* Functions that common builds run, beside each other: fewer pages of the program are touched.
 * Written by `cargo xtask layout`. A name that is there no more does no harm, one that is missing costs some memory. */
SECTIONS
{
  .text.ovenbird_common : {
";
const FOOTER: &str = "  }\n}\nINSERT BEFORE .text;\n";

/// Builds the program with its symbols, runs it under callgrind, and writes the linker script.
pub(crate) fn write(repository: &Path) -> Result<(), String> {
    packages::install(&["valgrind", "docker-registry", "busybox-static"])?;
    crate::run(
        Command::new(env!("CARGO"))
            .current_dir(repository)
            .args(["build", "--release", "--locked", "--package", "ovenbird-cli"])
            .args(["--config", "profile.release.strip=false"]),
    )?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository.join("target"), |dir| repository.join(dir));
    let runs = Runs::new(target.join("release/ovenbird"))?;
    runs.all()?;
    let names = patterns(&runs.ran()?, &runs.sizes()?);
    let mut script = HEADER.to_owned();
    for name in &names {
        let _ = writeln!(script, "    *(.text.{name})");
    }
    script.push_str(FOOTER);
    let path = repository.join("crates/ovenbird-cli/layout.ld");
    fs::write(&path, script).map_err(|error| format!("cannot write {}: {error}", path.display()))?;
    println!("{}: {} functions", path.display(), names.len());
    Ok(())
}

/// Builds under callgrind, in a folder of their own.
struct Runs {
    program: PathBuf,
    dir: tempfile::TempDir,
    registry: Registry,
}

impl Runs {
    fn new(program: PathBuf) -> Result<Self, String> {
        let dir = tempfile::tempdir().map_err(|error| format!("cannot make a folder: {error}"))?;
        let registry = Registry::start_with(Options { bases: &[Base::Busybox], credentials: None }).map_err(|error| error.to_string())?;
        Ok(Self { program, dir, registry })
    }

    /// The jobs of most users, each with a state directory that is empty, and with one that is not.
    fn all(&self) -> Result<(), String> {
        let failed = |error: std::io::Error| format!("cannot make the contexts: {error}");
        let context = self.dir.path().join("context");
        fs::create_dir_all(context.join("src/deep")).map_err(failed)?;
        for number in 0..300 {
            let name = format!("src/{}{number}.txt", if number % 3 == 0 { "deep/" } else { "" });
            fs::write(context.join(name), format!("{number} ").repeat(number * 7)).map_err(failed)?;
        }
        fs::write(context.join("large"), "what is written here is not random at all\n".repeat(2_000_000)).map_err(failed)?;
        fs::write(context.join(".dockerignore"), "**/*.log\n!src\n").map_err(failed)?;
        let address = self.registry.address();
        let base = format!("FROM {address}/library/busybox:latest AS base\nARG A=1\nENV B=$A\nWORKDIR /w\n");
        let steps = "COPY src/1.txt src/2.txt ./\nCOPY src /src\nCOPY large /large\nLABEL a=b\nUSER 1000\nEXPOSE 80\nENTRYPOINT [\"/x\"]\n";
        let files = [
            ("scratch", "FROM scratch\nCOPY src/1.txt /\n".to_owned()),
            ("steps", format!("{base}{steps}")),
            (
                "stages",
                format!(
                    "{base}FROM base AS a\nCOPY src/1.txt /1\nFROM scratch\nCOPY --from=a --chown=1:1 /1 /1\nCOPY --chmod=600 src /s\n"
                ),
            ),
            // A step cannot run under callgrind; everything up to it can.
            ("step", format!("{base}RUN --mount=type=cache,target=/c echo hello\n")),
        ];
        for (name, text) in &files {
            fs::write(self.dir.path().join(name), text).map_err(failed)?;
        }
        self.ovenbird(&["version"], true)?;
        for (name, _) in files {
            let file = self.dir.path().join(name).display().to_string();
            let context = context.display().to_string();
            let image = format!("{address}/layout/{name}:1");
            let cache = format!("type=registry,ref={address}/layout/{name}:cache");
            let first = ["build", "--progress", "plain", "--file", &file, "--tag", &image, &context];
            let works = name != "step";
            for more in [&[][..], &[], &["--push"], &["--push", "--cache-to", &cache, "--cache-from", &cache]] {
                self.ovenbird(&[&first[..], more].concat(), works)?;
            }
            fs::write(self.dir.path().join("context/src/1.txt"), name).map_err(failed)?;
            self.ovenbird(&first, works)?;
            fs::remove_dir_all(self.dir.path().join("state")).map_err(failed)?;
            self.ovenbird(&[&first[..], &["--push", "--cache-from", &cache]].concat(), works)?;
        }
        Ok(())
    }

    fn ovenbird(&self, words: &[&str], works: bool) -> Result<(), String> {
        let mut command = Command::new("valgrind");
        command.args(["--tool=callgrind", "--quiet", "--demangle=no"]);
        command.arg(format!("--callgrind-out-file={}/callgrind.%p", self.dir.path().display()));
        command.arg(&self.program).arg("--root").arg(self.dir.path().join("state")).args(words);
        let done = command.output().map_err(|error| format!("cannot start valgrind: {error}"))?;
        if done.status.success() == works {
            return Ok(());
        }
        Err(format!("{words:?} ended with {}:\n{}", done.status, String::from_utf8_lossy(&done.stderr)))
    }

    /// The symbol of every function that ran, and in how many runs.
    fn ran(&self) -> Result<BTreeMap<String, usize>, String> {
        let mut symbols = BTreeMap::new();
        let failed = |error: std::io::Error| format!("cannot read what callgrind wrote: {error}");
        for entry in fs::read_dir(self.dir.path()).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("callgrind.")) {
                let text = fs::read_to_string(&path).map_err(failed)?;
                for symbol in text.lines().filter_map(symbol).collect::<BTreeSet<_>>() {
                    *symbols.entry(symbol).or_default() += 1;
                }
            }
        }
        Ok(symbols)
    }

    /// How many bytes of code each symbol of the program has.
    fn sizes(&self) -> Result<BTreeMap<String, u64>, String> {
        let done = Command::new("nm").arg("--print-size").arg(&self.program).output();
        let done = done.map_err(|error| format!("cannot start nm: {error}"))?;
        if !done.status.success() {
            return Err(format!("nm ended with {}: {}", done.status, String::from_utf8_lossy(&done.stderr)));
        }
        Ok(String::from_utf8_lossy(&done.stdout).lines().filter_map(size).collect())
    }
}

/// Of a line of `nm --print-size`, a function and its bytes.
fn size(line: &str) -> Option<(String, u64)> {
    let mut words = line.split_ascii_whitespace();
    let (_, size, kind, name) = (words.next()?, words.next()?, words.next()?, words.next()?);
    matches!(kind, "t" | "T" | "w" | "W").then_some(())?;
    Some((name.to_owned(), u64::from_str_radix(size, 16).ok()?))
}

/// The patterns of what ran, what most runs need first. A pattern that would bring much more of what did not run (the instances of one
/// generic function differ in their hash only) gives way to the symbols themselves, which hold until the compiler or a dependency changes.
fn patterns(ran: &BTreeMap<String, usize>, sizes: &BTreeMap<String, u64>) -> Vec<String> {
    let mut bytes: BTreeMap<String, (u64, u64)> = BTreeMap::new();
    for (symbol, size) in sizes {
        if let Some(pattern) = pattern(symbol) {
            let (hot, all) = bytes.entry(pattern).or_default();
            *all += size;
            *hot += if ran.contains_key(symbol) { *size } else { 0 };
        }
    }
    let mut runs: BTreeMap<String, usize> = BTreeMap::new();
    for (symbol, count) in ran.iter().filter(|(symbol, _)| sizes.contains_key(*symbol)) {
        let Some(pattern) = pattern(symbol) else { continue };
        let (hot, all) = bytes.get(&pattern).copied().unwrap_or_default();
        let name = if hot * 4 >= all * 3 { pattern } else { symbol.clone() };
        let most = runs.entry(name).or_default();
        *most = (*most).max(*count);
    }
    let mut names: Vec<(String, usize)> = runs.into_iter().collect();
    names.sort_by(|(name, runs), (other, others)| others.cmp(runs).then_with(|| name.cmp(other)));
    names.into_iter().map(|(name, _)| name).collect()
}

/// The symbol of a line `fn=(12) NAME` or `cfn=(12) NAME`. Callgrind writes each name once, and appends what tells recursion.
fn symbol(line: &str) -> Option<String> {
    let (_, name) = line.strip_prefix('c').unwrap_or(line).strip_prefix("fn=(")?.split_once(") ")?;
    name.split('\'').next().map(str::to_owned)
}

/// A symbol as a pattern that holds for the next build of the program, too.
fn pattern(symbol: &str) -> Option<String> {
    let name = symbol.split_once(".llvm.").map_or(symbol, |(name, _)| name);
    let expression = |text| Regex::new(text).ok();
    // The hash of a legacy name, and the crates' disambiguators of the others, are of this build only.
    if let Some(found) = expression("^(_ZN.*17h)[0-9a-f]{16}E")?.captures(name) {
        return Some(format!("{}*", &found[1]));
    }
    if name.starts_with("_R") {
        let name = expression(r"\.\d+$")?.replace(name, "");
        return Some(format!("{}*", expression("Cs[0-9A-Za-z]+_")?.replace_all(&name, "Cs*_")));
    }
    expression(r"^[A-Za-z_][A-Za-z0-9_.]*$")?.is_match(name).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_hold_for_the_next_build() {
        for (line, expected) in [
            ("fn=(12) _ZN8ovenbird8settings8Settings4load17h76a0d28d3f564bffE", Some("_ZN8ovenbird8settings8Settings4load17h*")),
            ("cfn=(1) _ZN3std2rt17h0123456789abcdefE.llvm.123'2", Some("_ZN3std2rt17h*")),
            ("fn=(3) _RNvNtCsjrHSEGnQ3l9_3std4path6is_dir.5866", Some("_RNvNtCs*_3std4path6is_dir*")),
            ("fn=(4) aws_lc_0_47_0_SHA256", Some("aws_lc_0_47_0_SHA256")),
            ("fn=(4)", None),
            ("calls=3 0", None),
            ("fn=(5) (below main)", None),
            ("fn=(6) 0x0000000000012345", None),
        ] {
            assert_eq!(symbol(line).and_then(|symbol| pattern(&symbol)).as_deref(), expected, "{line}");
        }
    }

    #[test]
    fn what_most_runs_need_is_first_and_nothing_comes_along() {
        let symbols = ["_ZN1a17h0000000000000001E", "_ZN1b17h0000000000000001E", "_ZN1b17h0000000000000002E", "main", "rare"];
        let sizes = symbols.iter().zip([100, 10, 90, 5, 5]).map(|(name, size)| ((*name).to_owned(), size)).collect();
        let ran = [(0, 2), (1, 3), (3, 3), (4, 1)].map(|(index, runs): (usize, usize)| (symbols[index].to_owned(), runs)).into();
        assert_eq!(patterns(&ran, &sizes), [symbols[1], "main", "_ZN1a17h*", "rare"]);
        assert_eq!(size("0000000000001000 00000000000000ff t main"), Some(("main".to_owned(), 255)));
        assert_eq!(size("0000000000001000 d data"), None);
    }
}
