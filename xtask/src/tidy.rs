//! The laws of `ARCHITECTURE.md` that a compiler does not check. Runs as a test, too.
//!
//! Reads text, not syntax: a rule looks at lines of code outside comments and test modules.

use std::fs;
use std::io;
use std::path::Path;

use walkdir::WalkDir;

/// Which crates of the workspace a crate may use.
const FLOORS: &[(&str, &[&str])] = &[
    ("ovenbird-oci", &[]),
    ("ovenbird-dockerfile", &[]),
    ("ovenbird-sandbox", &[]),
    ("ovenbird-engine", &["ovenbird-oci", "ovenbird-dockerfile", "ovenbird-sandbox"]),
    ("ovenbird", &["ovenbird-oci", "ovenbird-dockerfile", "ovenbird-sandbox", "ovenbird-engine"]),
    ("ovenbird-cli", &["ovenbird", "ovenbird-oci", "ovenbird-dockerfile", "ovenbird-sandbox", "ovenbird-engine"]),
    ("ovenbird-testing", &[]),
    ("xtask", &["ovenbird-testing"]),
];

/// Modules of the engine, lowest layer first; a module uses its own layer and lower ones.
const ENGINE_LAYERS: &[&[&str]] = &[
    &["event", "plan", "schedule", "snapshot", "state"],
    &["cache", "frontend", "trace"],
    &["ops", "export"],
    &["solve"],
    &["build", "publish"],
];

/// Code that may stand only in some places: fragments, where, why.
const PLACES: &[(&[&str], &[&str], &str)] = &[
    (
        &["println!", "print!(", "eprintln!", "eprint!(", "dbg!(", "io::stdout()", "io::stderr()"],
        // An archive goes to standard output when the request says so (`dest=-`).
        &["crates/ovenbird-cli/", "crates/ovenbird-engine/src/export/output.rs", "crates/ovenbird-testing/", "xtask/"],
        "only doors write to the terminal",
    ),
    (
        &["env::var", "env::vars", "env::home_dir", "env::temp_dir", "SystemTime::now", "Timestamp::now", "Zoned::now"],
        // An image that is not reproducible says when it was made; the cache, when a step ran; a token, when it ends. A build script is told
        // everything in variables.
        &[
            "crates/ovenbird-cli/build.rs",
            "crates/ovenbird/src/settings",
            "crates/ovenbird-oci/src/keychain/",
            "crates/ovenbird-engine/src/export/assemble.rs",
            "crates/ovenbird-engine/src/cache.rs",
            "crates/ovenbird-testing/",
            "xtask/",
        ],
        "environment, home and clock are read in the settings only",
    ),
    (
        &["Command::new"],
        &[
            "crates/ovenbird-sandbox/",
            "crates/ovenbird/src/launch",
            "crates/ovenbird/src/source",
            "crates/ovenbird-oci/src/keychain",
            "crates/ovenbird/src/workflow/external.rs",
            // ADD of a git repository, and xz and bzip2 for ADD of archives.
            "crates/ovenbird-engine/src/ops/",
            "crates/ovenbird-testing/",
            "xtask/",
        ],
        "processes are started by the sandbox, launchers, sources, plugins and the keychain only",
    ),
    (&["allow(unsafe_code", "expect(unsafe_code"], &["crates/ovenbird-sandbox/"], "unsafe code is the sandbox's"),
];

/// Never anywhere.
const NEVER: &[(&[&str], &str)] = &[(&["todo!(", "unimplemented!(", "#[ignore"], "unfinished work")];

/// Names that say nothing.
const BANNED_NAMES: &[&str] = &["util", "utils", "helper", "helpers", "common", "misc"];

/// Most lines of a file.
const MOST_LINES: usize = 1000;

/// Texts that belong to one machine: written in halves, so that this file passes its own check.
fn foreign() -> Vec<String> {
    let halves = [
        ("/work/", "main"),
        ("/work/", "shared"),
        ("/var/tmp/", "ob"),
        ("deb.", "debian.org"),
        ("crates", ".io/"),
        ("pypi", ".org"),
        ("registry.npm", "js.org"),
        ("proxy.golang", ".org"),
        ("snapshot.", "debian.org"),
    ];
    halves.iter().map(|(one, two)| format!("{one}{two}")).collect()
}

/// Every finding, one line each: `path:line: what`.
pub(crate) fn check(root: &Path) -> io::Result<Vec<String>> {
    let mut findings = Vec::new();
    let foreign = foreign();
    let walk = WalkDir::new(root).sort_by_file_name().into_iter().filter_entry(|entry| {
        let name = entry.file_name().to_string_lossy();
        !matches!(&*name, "target" | ".git" | "corpus" | "artifacts" | "node_modules")
    });
    for entry in walk {
        let entry = entry?;
        if !entry.file_type().is_file() {
            continue;
        }
        let path = entry.path().strip_prefix(root).unwrap_or(entry.path()).to_string_lossy().into_owned();
        let ending = entry.path().extension().map(|ending| ending.to_string_lossy().into_owned()).unwrap_or_default();
        let source = matches!(ending.as_str(), "rs" | "py" | "sh");
        let stem = entry.path().file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        if source && (BANNED_NAMES.contains(&stem.as_str()) || path.split('/').rev().skip(1).any(|dir| BANNED_NAMES.contains(&dir))) {
            findings.push(format!("{path}:1: the name says nothing: name it after what it is"));
        }
        if !source && !matches!(ending.as_str(), "md" | "toml" | "yml" | "yaml" | "") || path == "LICENSE" || ending == "lock" {
            continue;
        }
        let Ok(text) = fs::read_to_string(entry.path()) else { continue };
        if source && text.lines().count() > MOST_LINES {
            findings.push(format!("{path}:1: more than {MOST_LINES} lines: split it by noun"));
        }
        for (number, line) in text.lines().enumerate() {
            for text in foreign.iter().filter(|text| line.contains(text.as_str())) {
                findings.push(format!("{path}:{}: names {text}, which belongs to a machine", number + 1));
            }
        }
        if ending == "rs" {
            rust(&path, &text, &mut findings);
        } else if path.ends_with("Cargo.toml") {
            manifest(&path, &text, &mut findings);
        }
    }
    Ok(findings)
}

/// `crates/NAME/…` or `xtask/…`.
fn crate_of(path: &str) -> &str {
    let mut parts = path.split('/');
    match parts.next() {
        Some("crates") => parts.next().unwrap_or_default(),
        Some(first) => first,
        None => "",
    }
}

fn is_test(path: &str) -> bool {
    path.contains("/tests/")
        || path.ends_with("/tests.rs")
        || path.contains("/benches/")
        || path.contains("/examples/")
        || path.starts_with("fuzz/")
}

fn rust(path: &str, text: &str, findings: &mut Vec<String>) {
    if !is_test(path) && !text.starts_with("//!") {
        findings.push(format!("{path}:1: no module comment (what it is, what it must not know)"));
    }
    let own = crate_of(path);
    let allowed = FLOORS.iter().find(|(name, _)| *name == own).map(|(_, allowed)| *allowed);
    for (index, line) in text.lines().enumerate() {
        let code = line.trim_start();
        // Test modules stand at the end of a file.
        if code.starts_with("#[cfg(test)]") || code.starts_with("#![cfg(test)]") {
            break;
        }
        if code.starts_with("//") {
            continue;
        }
        let mut finding = |what: String| findings.push(format!("{path}:{}: {what}", index + 1));
        if path != "xtask/src/tidy.rs" {
            for (fragments, why) in NEVER {
                for fragment in fragments.iter().filter(|fragment| code.contains(**fragment)) {
                    finding(format!("{fragment} ({why})"));
                }
            }
            if !is_test(path) {
                for (fragments, places, why) in PLACES {
                    if places.iter().any(|place| path.starts_with(place)) {
                        continue;
                    }
                    for fragment in fragments.iter().filter(|fragment| code.contains(**fragment)) {
                        finding(format!("{fragment} ({why})"));
                    }
                }
            }
        }
        if let Some(allowed) = allowed
            && !is_test(path)
        {
            for (name, _) in FLOORS.iter().filter(|(name, _)| *name != own && !allowed.contains(name)) {
                let module = name.replace('-', "_");
                if uses(code, &module) {
                    finding(format!("uses {module}, which is not below {own}"));
                }
            }
        }
        if let Some(rest) = path.strip_prefix("crates/ovenbird-engine/src/")
            && let Some(layer) = engine_layer(rest.split(['/', '.']).next().unwrap_or_default())
        {
            for module in code.split("crate::").skip(1).filter_map(|rest| rest.split(|c: char| !c.is_alphanumeric() && c != '_').next()) {
                if engine_layer(module).is_some_and(|other| other > layer) {
                    finding(format!("uses crate::{module}, a layer above"));
                }
            }
        }
    }
}

/// Is `module::` used here, and not another name that ends with it?
fn uses(code: &str, module: &str) -> bool {
    code.match_indices(module).any(|(at, _)| {
        let before = code[..at].chars().next_back();
        let after = &code[at + module.len()..];
        !before.is_some_and(|c| c.is_alphanumeric() || c == '_') && after.starts_with("::")
    })
}

fn engine_layer(module: &str) -> Option<usize> {
    ENGINE_LAYERS.iter().position(|layer| layer.contains(&module))
}

fn manifest(path: &str, text: &str, findings: &mut Vec<String>) {
    let own = crate_of(path);
    let Some((_, allowed)) = FLOORS.iter().find(|(name, _)| *name == own) else { return };
    let mut section = "";
    for (index, line) in text.lines().enumerate() {
        if line.starts_with('[') {
            section = line;
        } else if section == "[dependencies]" {
            let name = line.split(['.', ' ', '=']).next().unwrap_or_default();
            if FLOORS.iter().any(|(other, _)| *other == name) && !allowed.contains(&name) {
                findings.push(format!("{path}:{}: depends on {name}, which is not below {own}", index + 1));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_repository_is_tidy() -> io::Result<()> {
        let findings = check(ovenbird_testing::repository())?;
        assert!(findings.is_empty(), "{}", findings.join("\n"));
        Ok(())
    }

    #[test]
    fn finds_what_is_forbidden() {
        for (path, text, expected) in [
            ("crates/ovenbird-oci/src/a.rs", "//! a\nuse ovenbird_engine::plan;\n", "not below"),
            ("crates/ovenbird-oci/src/a.rs", "use std::io;\n", "no module comment"),
            ("crates/ovenbird-engine/src/plan.rs", "//! a\nuse crate::solve::X;\n", "a layer above"),
            ("crates/ovenbird-engine/src/ops/exec.rs", "//! a\nfn f() { crate::build::g() }\n", "a layer above"),
            ("crates/ovenbird-oci/src/a.rs", "//! a\nfn f() { println!() }\n", "only doors"),
            ("crates/ovenbird-oci/src/a.rs", "//! a\nfn f() { std::env::var(\"X\") }\n", "settings only"),
            ("crates/ovenbird-engine/src/solve.rs", "//! a\nfn f() { Command::new(\"x\") }\n", "processes"),
            ("crates/ovenbird-oci/src/a.rs", "//! a\nfn f() { todo!() }\n", "unfinished"),
        ] {
            let mut findings = Vec::new();
            rust(path, text, &mut findings);
            assert!(findings.len() == 1 && findings[0].contains(expected), "{path}: {findings:?}");
        }
        for (path, text) in [
            ("crates/ovenbird-engine/src/solve.rs", "//! a\nuse crate::ops;\nuse ovenbird_oci::Digest;\n// println!\n"),
            ("crates/ovenbird-oci/src/a.rs", "//! a\n#[cfg(test)]\nmod tests { fn f() { println!() } }\n"),
            ("crates/ovenbird-cli/src/a.rs", "//! a\nfn f() { println!() }\n"),
        ] {
            let mut findings = Vec::new();
            rust(path, text, &mut findings);
            assert!(findings.is_empty(), "{path}: {findings:?}");
        }
        let mut findings = Vec::new();
        manifest("crates/ovenbird-dockerfile/Cargo.toml", "[dependencies]\novenbird-oci.workspace = true\n", &mut findings);
        assert_eq!(findings.len(), 1);
    }
}
