//! Names of vertices as people see them in progress: `[build 2/5] RUN make`.

use std::fmt::Write as _;

use ovenbird_dockerfile::expand::{Env, ExpandError, Expander};
use ovenbird_oci::Platform;

use super::scope::Variables;

/// Where a step stands among the steps of its stage.
#[derive(Debug, Clone, Default)]
pub(super) struct Counter {
    /// Shown name of the stage; empty: not shown.
    pub(super) stage: String,
    /// Steps given so far.
    pub(super) index: usize,
    /// Steps of the stage; 0: names have no prefix.
    pub(super) total: usize,
    /// Show the platform.
    pub(super) multi_platform: bool,
}

impl Counter {
    /// The prefix of the next step, with a blank at its end.
    pub(super) fn next(&mut self, platform: &Platform, env: &Variables, on_build: bool) -> String {
        if self.total == 0 {
            return String::new();
        }
        self.index += 1;
        let mut prefix = String::from("[");
        if self.multi_platform {
            prefix.push_str(&platform.to_string());
            prefix.push_str(&cross_target(platform, env));
            prefix.push(' ');
        }
        if !self.stage.is_empty() {
            prefix.push_str(&self.stage);
            prefix.push(' ');
        }
        let width = self.total.ilog10() as usize + 1;
        let _ = write!(prefix, "{:width$}/{}] ", self.index, self.total);
        if on_build {
            prefix.push_str("ONBUILD ");
        }
        prefix
    }
}

/// `->arm64` for a step that runs on one platform and builds for another, as its environment says.
fn cross_target(platform: &Platform, env: &Variables) -> String {
    let whole = env.lookup("TARGETPLATFORM").and_then(|value| value.parse::<Platform>().ok());
    let parts = || {
        let (os, arch, variant) = (env.lookup("TARGETOS"), env.lookup("TARGETARCH"), env.lookup("TARGETVARIANT"));
        if os.is_none() && arch.is_none() && variant.is_none() {
            return None;
        }
        let or = |given: Option<&str>, other: &str| given.filter(|g| !g.is_empty()).unwrap_or(other).to_owned();
        let variant = variant.filter(|v| !v.is_empty()).map(str::to_owned);
        Some(Platform { os: or(os, &platform.os), architecture: or(arch, &platform.architecture), variant, os_version: None }.normalized())
    };
    match whole.or_else(parts) {
        Some(target) if target.os != platform.os => format!("->{target}"),
        Some(target) if target.architecture != platform.architecture => match &target.variant {
            Some(variant) => format!("->{}/{variant}", target.architecture),
            None => format!("->{}", target.architecture),
        },
        _ => String::new(),
    }
}

/// Longest name, in bytes, that is shown with its variables filled in.
const MAX_FILLED: usize = 64 << 10;

/// The instruction as written, with variables filled in where they are known, its first word in upper case.
/// Second, the bytes that expansion made, also those of a name that is too long to show.
pub(super) fn instruction(original: &str, expander: Expander, env: &dyn Env) -> (String, usize) {
    let original = original.trim();
    let (text, cost) = match expander.word(original, env) {
        Ok(expanded) if expanded.value.len() <= MAX_FILLED.max(original.len()) => {
            let cost = expanded.value.len();
            (expanded.value, cost)
        }
        Ok(expanded) => (original.to_owned(), expanded.value.len()),
        Err(ExpandError::TooLong { limit }) => (original.to_owned(), limit),
        Err(_) => (original.to_owned(), original.len()),
    };
    let text = match text.split_once(' ') {
        Some((first, rest)) => format!("{} {rest}", first.to_uppercase()),
        None => text.to_uppercase(),
    };
    (text, cost)
}

/// First line of a here-document, `...` when there are more.
pub(super) fn summary(content: &str) -> String {
    let mut lines = content.trim().lines();
    let first = lines.next().unwrap_or_default();
    if lines.next().is_some() { format!("{first}...") } else { first.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes() {
        let env = |pairs: &[(&str, &str)]| {
            let mut variables = Variables::default();
            for (name, value) in pairs {
                variables.set(name, value);
            }
            variables
        };
        for (stage, total, multi, pairs, expect) in [
            ("", 0, true, &[][..], ""),
            ("", 3, false, &[], "[1/3] "),
            ("build", 12, false, &[], "[build  1/12] "),
            ("b", 2, true, &[], "[linux/amd64 b 1/2] "),
            ("b", 2, true, &[("TARGETPLATFORM", "linux/amd64")], "[linux/amd64 b 1/2] "),
            ("b", 2, true, &[("TARGETPLATFORM", "linux/arm/v6")], "[linux/amd64->arm/v6 b 1/2] "),
            ("b", 2, true, &[("TARGETARCH", "arm64")], "[linux/amd64->arm64 b 1/2] "),
            ("b", 2, true, &[("TARGETOS", "windows")], "[linux/amd64->windows/amd64 b 1/2] "),
        ] {
            let mut counter = Counter { stage: stage.into(), index: 0, total, multi_platform: multi };
            assert_eq!(counter.next(&"linux/amd64".parse().unwrap(), &env(pairs), false), expect);
        }
    }

    #[test]
    fn summaries() {
        for (content, expect) in [("a\n", "a"), ("\n\tset -ex\nb\n", "set -ex..."), ("", ""), ("a\r\nb", "a...")] {
            assert_eq!(summary(content), expect);
        }
    }
}
