//! Everything there is to say of a Dockerfile without building it. The warnings of a build come out of the same [`lower`](super::lower).

use std::collections::{BTreeMap, BTreeSet};

use ovenbird_dockerfile::lint::lint;
use ovenbird_dockerfile::{Diagnostic, Dockerfile, Parsed, Severity, parse};

use super::checks::{MAX_WARNINGS, VIOLATION, configuration, is_violation};
use super::{Images, Lowered, Options, check_directive, lower_for_checks};
use crate::plan::{ImageRequest, ResolvedImage};

/// Most rounds of image look-ups; triggers that name images with triggers could go on without end.
const MOST_ROUNDS: usize = 16;

/// What [`check`] found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Findings {
    /// Errors and warnings, in the order of the text.
    pub diagnostics: Vec<Diagnostic>,
    /// Images that could not be had, and why. Whether variables that they may define are undefined, and whether they have the right
    /// platform, was not checked.
    pub unknown: BTreeMap<String, String>,
}

/// Finds errors and warnings. `options` has one entry a platform; `resolve` gives an image, or says why it cannot be had.
///
/// With `error=true` in the Dockerfile, what violates a rule is an error.
pub fn check(text: &str, options: &[Options], resolve: &mut dyn FnMut(&ImageRequest) -> Result<ResolvedImage, String>) -> Findings {
    let parsed = parse(text);
    let mut findings = Findings::default();
    for options in options {
        let mut found = if parsed.error().is_some() {
            broken(&parsed, text, options)
        } else {
            let mut found = parsed.diagnostics.clone();
            found.extend(of_platform(&parsed.dockerfile, text, options, resolve, &mut findings.unknown));
            found
        };
        bound(&mut found);
        let is_error = configuration(text, check_directive(&parsed.dockerfile, options)).is_ok_and(|config| config.error);
        for mut finding in found.into_iter().filter(|finding| finding.code != VIOLATION) {
            if is_error && is_violation(&finding) {
                finding.severity = Severity::Error;
            }
            if !findings.diagnostics.contains(&finding) {
                findings.diagnostics.push(finding);
            }
        }
    }
    findings.diagnostics.sort_by_key(|finding| finding.span.start);
    findings
}

/// Keeps as many findings as anybody reads, errors first: a hostile file could make millions.
fn bound(found: &mut Vec<Diagnostic>) {
    if found.len() > MAX_WARNINGS {
        found.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
        found.truncate(MAX_WARNINGS);
    }
}

/// What is wrong with a file that has syntax errors, and what the linter says of the rest of it.
pub fn broken(parsed: &Parsed, text: &str, options: &Options) -> Vec<Diagnostic> {
    let mut found = parsed.diagnostics.clone();
    match configuration(text, check_directive(&parsed.dockerfile, options)) {
        Ok(config) => found.extend(lint(&parsed.dockerfile, text, &config)),
        Err(reason) => found.push(reason),
    }
    found.sort_by_key(|finding| finding.span.start);
    found
}

fn of_platform(
    dockerfile: &Dockerfile,
    text: &str,
    options: &Options,
    resolve: &mut dyn FnMut(&ImageRequest) -> Result<ResolvedImage, String>,
    unknown: &mut BTreeMap<String, String>,
) -> Vec<Diagnostic> {
    let mut images = Images::new();
    let mut missing = BTreeSet::new();
    let mut round = 0;
    loop {
        match lower_for_checks(dockerfile, text, options, &images, &missing) {
            Err(found) | Ok(Lowered::Done(_, found)) => return found,
            Ok(Lowered::Needs(requests)) => {
                for request in requests {
                    let found = if round < MOST_ROUNDS { resolve(&request) } else { Err("triggers name too many images".to_owned()) };
                    match found {
                        Ok(image) => drop(images.insert(request, image)),
                        Err(reason) => {
                            unknown.insert(request.name.clone(), reason);
                            missing.insert(request);
                        }
                    }
                }
                round += 1;
            }
        }
    }
}
