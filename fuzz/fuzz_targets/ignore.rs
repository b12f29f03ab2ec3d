//! Any ignore file compiles or is refused, and a folder that may be skipped holds nothing that is
//! kept.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ovenbird_dockerfile::ignore::{Patterns, go_match};

fuzz_target!(|input: (&str, &str, &str)| {
    let (file, dir, name) = input;
    let _ = go_match(file, name);
    let Ok(patterns) = Patterns::parse(file) else { return };
    // A walk only ever asks for clean relative paths.
    let clean = |path: &str| !path.is_empty() && path.split('/').all(|part| !matches!(part, "" | "." | ".."));
    if clean(dir) && clean(name) && patterns.can_prune(dir) {
        assert!(patterns.is_ignored(&format!("{dir}/{name}")), "{file:?} {dir:?} {name:?}");
    }
});
