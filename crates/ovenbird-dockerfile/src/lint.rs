//! The checks of BuildKit that can be decided from the tree alone, under the same names.
//!
//! What needs images, the context or build arguments (`InvalidBaseImagePlatform`,
//! `CopyIgnoredFile`, `UndefinedVar`, words with variables) belongs to the frontend. All rules are in [`rules`].

mod base_name;
pub mod rules;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::OnceLock;

use regex::Regex;

use crate::ast::{Command, Dockerfile, Instruction, KeyValue, Kind, Stage};
use crate::diagnostic::{Diagnostic, Severity, Span};
use crate::expand::{EmptyEnv, Env, Expander};
use crate::parse::lines::{Lines, Logical};
use crate::parse::words;
use crate::suggest;

/// Arguments that BuildKit defines before the first `FROM`.
pub const PREDEFINED_GLOBAL_ARGS: [&str; 11] = [
    "BUILDPLATFORM",
    "BUILDOS",
    "BUILDOSVERSION",
    "BUILDARCH",
    "BUILDVARIANT",
    "TARGETPLATFORM",
    "TARGETOS",
    "TARGETOSVERSION",
    "TARGETARCH",
    "TARGETVARIANT",
    "TARGETSTAGE",
];

/// The value of `# check=` (or of `BUILDKIT_DOCKERFILE_CHECK`): `skip=A,B;error=true;experimental=C`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CheckConfig {
    /// Rules to leave out.
    pub skip: RuleSet,
    /// Experimental rules to run.
    pub experimental: RuleSet,
    /// Warnings fail the build.
    pub error: bool,
}

/// Some rules, or all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RuleSet {
    /// `all`.
    All,
    /// These.
    Named(BTreeSet<String>),
}

impl Default for RuleSet {
    fn default() -> Self {
        Self::Named(BTreeSet::new())
    }
}

impl RuleSet {
    /// `all` counts only when it stands alone, as in BuildKit.
    fn parse(list: &str) -> Self {
        match list {
            "all" => Self::All,
            list => Self::Named(list.split(',').map(|name| name.trim().to_owned()).collect()),
        }
    }

    fn contains(&self, rule: &str) -> bool {
        match self {
            Self::All => true,
            Self::Named(names) => names.contains(rule),
        }
    }
}

/// A `# check=` value that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CheckError {
    /// A part is not `key=value`.
    #[error("invalid check option {part:?}: write `skip=Rule1,Rule2`, `error=true` or `experimental=Rule`")]
    Part {
        /// The part as written.
        part: String,
    },
    /// `error=` that is neither true nor false.
    #[error("failed to parse check option error={value:?}: write true or false")]
    Boolean {
        /// As written.
        value: String,
    },
}

impl CheckConfig {
    /// Parses the value of the directive.
    pub fn parse(text: &str) -> Result<Self, CheckError> {
        let mut config = Self::default();
        if text.trim().is_empty() {
            return Ok(config);
        }
        for part in text.split(';') {
            match part.split_once('=').map(|(key, value)| (key.trim(), value.trim())) {
                Some(("skip", list)) => config.skip = RuleSet::parse(list),
                Some(("experimental", list)) => config.experimental = RuleSet::parse(list),
                Some(("error", value)) => {
                    config.error = match value {
                        "1" | "t" | "T" | "true" | "TRUE" | "True" => true,
                        "0" | "f" | "F" | "false" | "FALSE" | "False" => false,
                        _ => return Err(CheckError::Boolean { value: value.to_owned() }),
                    }
                }
                _ => return Err(CheckError::Part { part: part.trim().to_owned() }),
            }
        }
        Ok(config)
    }

    /// Does a rule run under this configuration? Asking for an experimental rule is stronger than skipping it.
    pub fn allows(&self, rule: &str) -> bool {
        match rules::find(rule) {
            Some(rules::Rule { experimental: true, .. }) => self.experimental.contains(rule),
            _ => !self.skip.contains(rule),
        }
    }
}

/// Comments `# check=skip=Rule` right above an instruction: they hold for that instruction only.
#[derive(Debug, Clone, Default)]
pub struct InPlace {
    /// Configurations by the first byte of their instruction.
    configs: BTreeMap<usize, Vec<CheckConfig>>,
    /// First bytes of all instructions.
    starts: BTreeSet<usize>,
}

impl InPlace {
    /// Reads the comments of a file. What is no configuration is a comment like others.
    pub fn of(text: &str) -> Self {
        let mut lines = Lines::of_file(text);
        let mut this = Self::default();
        while let Some(logical) = lines.next_logical() {
            this.add(&logical);
        }
        this
    }

    fn add(&mut self, logical: &Logical) {
        let configs: Vec<CheckConfig> =
            logical.comments.iter().filter_map(|comment| CheckConfig::parse(comment.strip_prefix(IN_PLACE)?).ok()).collect();
        self.starts.insert(logical.span.start);
        if !configs.is_empty() {
            self.configs.insert(logical.span.start, configs);
        }
    }

    /// Is the rule left out for the instruction at `span`?
    pub fn skips(&self, rule: &str, span: Span) -> bool {
        let start = self.starts.range(..=span.start).next_back();
        start.and_then(|start| self.configs.get(start)).is_some_and(|configs| configs.iter().any(|config| config.skip.contains(rule)))
    }
}

/// Runs the checks on a parsed file. `config` is what its directive says, or a build argument instead. Findings are in the order of the
/// text.
pub fn lint(dockerfile: &Dockerfile, text: &str, config: &CheckConfig) -> Vec<Diagnostic> {
    let mut lines = Lines::of_file(text);
    let mut places = BTreeMap::new();
    let mut in_place = InPlace::default();
    while let Some(logical) = lines.next_logical() {
        in_place.add(&logical);
        places.insert(logical.span.start, logical);
    }
    let mut linter = Linter { dockerfile, config, places, in_place, found: vec![] };
    linter.lines();
    linter.stage_names();
    linter.base_images();
    for instruction in dockerfile.global_args.iter().chain(dockerfile.stages.iter().flat_map(|s| &s.instructions)) {
        linter.instruction(instruction);
    }
    linter.stage_bodies();
    linter.found.sort_by_key(|d| d.span.start);
    linter.found
}

struct Linter<'a> {
    dockerfile: &'a Dockerfile,
    config: &'a CheckConfig,
    /// Logical lines by the offset of their first byte.
    places: BTreeMap<usize, Logical>,
    in_place: InPlace,
    found: Vec<Diagnostic>,
}

/// Begins a comment that configures the checks of one instruction.
pub(crate) const IN_PLACE: &str = "check=";

/// What a stage hands on to the stages built from it.
#[derive(Clone, Copy, Default)]
struct Inherited {
    shell: bool,
    workdir: bool,
}

impl Linter<'_> {
    fn report(&mut self, rule: &'static str, message: String, help: &str, span: Span) {
        self.take(warning(rule, message, help, span));
    }

    fn take(&mut self, finding: Diagnostic) {
        if self.config.allows(&finding.code) && !self.in_place.skips(&finding.code, finding.span) {
            self.found.push(finding);
        }
    }

    /// Place of the word that `pick` finds in the folded text of the instruction at `span`.
    fn place(&self, span: Span, pick: impl Fn(&str) -> Option<Range<usize>>) -> Span {
        let Some(logical) = self.places.get(&span.start) else { return span };
        pick(&logical.folded.text).map_or(span, |range| logical.folded.span(range))
    }

    /// Places of the arguments of the instruction at `span`.
    fn places_of(&self, span: Span, split: impl Fn(&str, Range<usize>) -> Vec<words::Word>) -> Vec<Span> {
        let Some(Logical { folded, .. }) = self.places.get(&span.start) else { return vec![] };
        split(&folded.text, words::split_command(&folded.text).rest).into_iter().map(|word| folded.span(word.range)).collect()
    }

    fn command_place(&self, span: Span) -> Span {
        self.place(span, |text| Some(words::split_command(text).word))
    }

    /// The command word of the instruction at `span`, in its own case.
    fn command_name<'t>(&'t self, span: Span, name: &'t str) -> &'t str {
        let Some(Logical { folded, .. }) = self.places.get(&span.start) else { return name };
        words::split_command(&folded.text).name(&folded.text)
    }

    /// Checks on the text of every instruction: casing, empty continuation lines, descriptions.
    fn lines(&mut self) {
        let mut commands = Vec::new();
        let mut empty = Vec::new();
        // Arguments before the first stage are neither counted nor compared.
        let mut in_stage = false;
        for logical in self.places.values() {
            let command = words::split_command(&logical.folded.text);
            let name = command.name(&logical.folded.text);
            in_stage |= name.eq_ignore_ascii_case("from");
            if in_stage {
                commands.push((name.to_owned(), logical.folded.span(command.word)));
            }
            empty.extend(logical.empty_continuation);
        }
        for span in empty {
            let help = "remove the empty lines or begin them with `#`";
            self.report("NoEmptyContinuation", "Empty continuation line".to_owned(), help, span);
        }
        let lower = commands.iter().filter(|(name, _)| *name == name.to_lowercase()).count();
        let upper = commands.iter().filter(|(name, _)| *name == name.to_uppercase()).count();
        let casing = if lower > upper { "lowercase" } else { "uppercase" };
        for (name, span) in commands {
            let expected = if lower > upper { name.to_lowercase() } else { name.to_uppercase() };
            if name != expected {
                let message = format!("Command '{name}' should match the case of the command majority ({casing})");
                self.report("ConsistentInstructionCasing", message, &format!("write `{expected}`"), span);
            }
        }
        if self.config.allows("InvalidDefinitionDescription") {
            self.descriptions();
        }
    }

    fn descriptions(&mut self) {
        let stages = self.dockerfile.stages.iter().map(|s| (s.span, "FROM", s.name.iter().cloned().collect::<Vec<_>>()));
        let instructions = self.dockerfile.global_args.iter().chain(self.dockerfile.stages.iter().flat_map(|s| &s.instructions));
        let args = instructions.filter_map(|i| match &i.kind {
            Kind::Arg(decls) => Some((i.span, "ARG", decls.iter().map(|d| d.name.clone()).collect::<Vec<_>>())),
            _ => None,
        });
        let mut found = Vec::new();
        for (span, instruction, keys) in stages.chain(args) {
            let comment = self.places.get(&span.start).and_then(|l| l.comments.iter().rfind(|c| !c.starts_with(IN_PLACE)));
            let (Some(comment), Some(first)) = (comment, keys.first()) else { continue };
            let described = comment.split_once(' ').filter(|(_, description)| !description.trim().is_empty());
            if !described.is_some_and(|(word, _)| keys.iter().any(|key| key == word)) {
                let key = if keys.len() > 1 { "<arg_key>" } else { first };
                found.push((span, format!("Comment for {instruction} should follow the format: `# {key} <description>`")));
            }
        }
        for (span, message) in found {
            let help = "write an empty line between the comment and the instruction if it is not a description";
            self.report("InvalidDefinitionDescription", message, help, span);
        }
    }

    fn stage_names(&mut self) {
        let mut seen = BTreeSet::new();
        for stage in &self.dockerfile.stages {
            self.keyword_casing(stage);
            let (Some(name), Some(written)) = (&stage.name, &stage.name_as_written) else { continue };
            let place = self.place(stage.span, |text| words::blank_separated(text, 0..text.len()).pop().map(|w| w.range));
            if name != written {
                let message = format!("Stage name '{written}' should be lowercase");
                self.report("StageNameCasing", message, &format!("write `{name}`"), place);
            }
            if matches!(name.as_str(), "context" | "scratch") {
                let message = format!("Stage name should not use the same name as reserved stage {name:?}");
                self.report("ReservedStageName", message, "choose another name", place);
            }
            if !seen.insert(name) {
                let message = format!("Duplicate stage name {name:?}, stage names should be unique");
                self.report("DuplicateStageName", message, "choose another name", place);
            }
        }
    }

    fn keyword_casing(&mut self, stage: &Stage) {
        let words = words::blank_separated(&stage.original, 0..stage.original.len());
        let (Some(from), true) = (words.first(), stage.name.is_some()) else { return };
        let Some(keyword) = words.len().checked_sub(2).and_then(|i| words.get(i)) else { return };
        let (lower, upper) = (from.text.to_lowercase(), from.text.to_uppercase());
        let expected = if from.text == lower { keyword.text.to_lowercase() } else { keyword.text.to_uppercase() };
        // A FROM of mixed case is a matter of ConsistentInstructionCasing.
        if (from.text == lower || from.text == upper) && keyword.text != expected {
            let message = format!("'{}' and '{}' keywords' casing do not match", keyword.text, from.text);
            let place = self.place(stage.span, |text| {
                let mut words = words::blank_separated(text, 0..text.len());
                words.pop();
                words.pop().map(|w| w.range)
            });
            self.report("FromAsCasing", message, &format!("write `{expected}`"), place);
        }
    }

    /// What `FROM` makes of the global arguments.
    fn base_images(&mut self) {
        let defaults = Defaults::of(self.dockerfile);
        let lexer = Expander { escape: self.dockerfile.directives.escape, ..Expander::default() };
        for stage in &self.dockerfile.stages {
            let place = self.place(stage.span, |text| {
                let rest = words::take_flags(text, words::split_command(text).rest).rest;
                words::blank_separated(text, rest).into_iter().next().map(|w| w.range)
            });
            if let Ok(base) = lexer.word(&stage.base, &defaults) {
                self.undeclared(&base.unset, &defaults, place);
                let variables = !base.used.is_empty() || !base.unset.is_empty();
                if variables && !base_name::is_valid(&base.value) {
                    let message = format!("Default value for ARG {} results in empty or invalid base image name", stage.base);
                    self.report("InvalidDefaultArgInFrom", message, "give the ARG a default that makes a valid name", place);
                }
            }
            let Some(platform) = &stage.platform else { continue };
            let place = self.place(stage.span, |text| {
                words::take_flags(text, words::split_command(text).rest).flags.into_iter().next().map(|f| f.range)
            });
            let Ok(expanded) = lexer.word(platform, &defaults) else { continue };
            self.undeclared(&expanded.unset, &defaults, place);
            if expanded.used.len() == 1 && expanded.used.contains("TARGETPLATFORM") && expanded.value == PLACEHOLDER_PLATFORM {
                let message = format!("Setting platform to predefined {platform} in FROM is redundant as this is the default behavior");
                self.report("RedundantTargetPlatform", message, "remove --platform", place);
            }
            if expanded.used.is_empty() && expanded.unset.is_empty() {
                self.constant_platform(stage, &expanded.value, place);
            }
        }
    }

    fn constant_platform(&mut self, stage: &Stage, platform: &str, place: Span) {
        // A stage named after its platform is meant for it.
        let name = stage.name.as_deref().unwrap_or_default();
        let mut parts = platform.split('/').take(2).filter(|p| !p.is_empty());
        if platform.is_empty() || parts.any(|part| name.contains(part)) {
            return;
        }
        let message = format!("FROM --platform flag should not use constant value {platform:?}");
        let help = "remove it and build with --platform, use $BUILDPLATFORM, or name the stage after the platform";
        self.report("FromPlatformFlagConstDisallowed", message, help, place);
    }

    fn undeclared(&mut self, unset: &BTreeSet<String>, defaults: &Defaults, place: Span) {
        for name in unset.iter().filter(|n| !defaults.declared.contains(*n) && !PREDEFINED_GLOBAL_ARGS.contains(&n.as_str())) {
            let known = defaults.declared.iter().map(String::as_str).chain(PREDEFINED_GLOBAL_ARGS);
            let message = format!("FROM argument '{name}' is not declared{}", suggest::suffix(suggest::nearest_variable(name, known)));
            self.report("UndefinedArgInFrom", message, &format!("add `ARG {name}` before the first FROM"), place);
        }
    }

    fn instruction(&mut self, instruction: &Instruction) {
        let span = instruction.span;
        match &instruction.kind {
            Kind::Maintainer(name) => {
                let message = "Maintainer instruction is deprecated in favor of using label".to_owned();
                let help = format!("write `LABEL org.opencontainers.image.authors=\"{name}\"`");
                self.report("MaintainerDeprecated", message, &help, self.command_place(span));
            }
            Kind::Env(pairs) => {
                self.legacy("ENV", pairs, span);
                self.secrets("ENV", pairs.iter().map(|pair| pair.key.as_str()), span);
            }
            Kind::Label(pairs) => self.legacy("LABEL", pairs, span),
            Kind::Arg(decls) => self.secrets("ARG", decls.iter().map(|decl| decl.name.as_str()), span),
            Kind::Expose(ports) => {
                let places = self.places_of(span, words::blank_separated);
                for (index, port) in ports.iter().enumerate().filter(|(_, port)| !port.contains('$')) {
                    for finding in expose(port, places.get(index).copied().unwrap_or(span)) {
                        self.take(finding);
                    }
                }
            }
            _ => {}
        }
    }

    fn legacy(&mut self, name: &str, pairs: &[KeyValue], span: Span) {
        if pairs.iter().any(|pair| pair.legacy) {
            let message = format!("\"{name} key=value\" should be used instead of legacy \"{name} key value\" format");
            self.report("LegacyKeyValueFormat", message, "put `=` between key and value, quote a value with blanks", span);
        }
    }

    fn secrets<'k>(&mut self, instruction: &str, keys: impl Iterator<Item = &'k str>, span: Span) {
        static SECRET: OnceLock<Option<Regex>> = OnceLock::new();
        let secret = SECRET.get_or_init(|| {
            Regex::new("(?i)(?:_|^)(?:apikey|auth|credential|credentials|key|password|pword|passwd|secret|token)(?:_|$)").ok()
        });
        let escape = self.dockerfile.directives.escape;
        let mut places = None;
        for (index, key) in keys.enumerate() {
            let harmless = ["public", "file", "version"];
            let harmless = key.split('_').any(|part| harmless.iter().any(|word| part.eq_ignore_ascii_case(word)));
            if harmless || !secret.as_ref().is_some_and(|r| r.is_match(key)) {
                continue;
            }
            let places = places.get_or_insert_with(|| {
                self.places_of(span, |text, rest| {
                    let mut found = words::quoted_words(text, rest, escape);
                    for word in &mut found {
                        word.range.end = text[word.range.clone()].find('=').map_or(word.range.end, |i| word.range.start + i);
                    }
                    found
                })
            });
            let place = places.get(index).copied().unwrap_or(span);
            let message = format!("Do not use ARG or ENV instructions for sensitive data ({instruction} {key:?})");
            self.report("SecretsUsedInArgOrEnv", message, "hand it over with RUN --mount=type=secret", place);
        }
    }

    /// Checks that need the order of instructions in a stage.
    fn stage_bodies(&mut self) {
        let mut stages: BTreeMap<&str, Inherited> = BTreeMap::new();
        for stage in &self.dockerfile.stages {
            let mut state = stages.get(stage.base.to_lowercase().as_str()).copied().unwrap_or_default();
            let mut last: BTreeMap<&str, Span> = BTreeMap::new();
            for instruction in &stage.instructions {
                let span = instruction.span;
                let (name, shell_form) = match &instruction.kind {
                    Kind::Cmd(command) => ("CMD", matches!(command, Command::Shell(_))),
                    Kind::Entrypoint(command) => ("ENTRYPOINT", matches!(command, Command::Shell(_))),
                    Kind::Healthcheck(_) => ("HEALTHCHECK", false),
                    Kind::Shell(_) => {
                        state.shell = true;
                        continue;
                    }
                    Kind::Workdir(path) => {
                        self.relative_workdir(path, span, state.workdir);
                        state.workdir = true;
                        continue;
                    }
                    _ => continue,
                };
                let written = self.command_name(span, name).to_owned();
                if shell_form && !state.shell {
                    let message = format!("JSON arguments recommended for {written} to prevent unintended behavior related to OS signals");
                    self.report("JSONArgsRecommended", message, &format!("write `{written} [\"program\", \"argument\"]`"), span);
                }
                if let Some(earlier) = last.insert(name, span) {
                    let message = format!(
                        "Multiple {written} instructions should not be used in the same stage because only the last one will be used"
                    );
                    self.report("MultipleInstructionsDisallowed", message, "remove this one", self.command_place(earlier));
                }
            }
            if let Some(name) = &stage.name {
                stages.insert(name, state);
            }
        }
    }

    fn relative_workdir(&mut self, path: &str, span: Span, known: bool) {
        let lexer = Expander { escape: self.dockerfile.directives.escape, keep_unset: true, raw_quotes: false };
        let Ok(plain) = lexer.word(path, &EmptyEnv) else { return };
        if !known
            && !path.contains('$')
            && let Some(finding) = workdir(&plain.value, span)
        {
            self.take(finding);
        }
    }
}

fn warning(rule: &'static str, message: String, help: &str, span: Span) -> Diagnostic {
    Diagnostic { severity: Severity::Warning, code: rule.into(), message, help: Some(help.to_owned()), span }
}

/// What is to be said of one port of `EXPOSE`, variables expanded.
pub fn expose(port: &str, span: Span) -> Vec<Diagnostic> {
    let mut found = Vec::new();
    let protocol = port.split_once('/').map_or("", |(_, protocol)| protocol);
    if protocol != protocol.to_lowercase() {
        let message = format!("Defined protocol '{port}' in EXPOSE instruction should be lowercase");
        found.push(warning("ExposeProtoCasing", message, &format!("write `{}`", port.to_lowercase()), span));
    }
    if port.contains(':') {
        let message = format!("EXPOSE instruction should not define an IP address or host-port mapping, found '{port}'");
        found.push(warning("ExposeInvalidFormat", message, "name only the port of the container", span));
    }
    found
}

/// What is to be said of the first `WORKDIR` of a build, variables expanded.
pub fn workdir(path: &str, span: Span) -> Option<Diagnostic> {
    let mut chars = path.chars();
    let drive = chars.next().is_some_and(|c| c.is_ascii_alphabetic()) && chars.next() == Some(':');
    if drive || path.starts_with(['/', '\\']) {
        return None;
    }
    let message = format!("Relative workdir {path:?} can have unexpected results if the base image changes");
    Some(warning("WorkdirRelativePath", message, "write an absolute path", span))
}

/// Stands for any target: only whether a word is just `$TARGETPLATFORM` is asked.
const PLACEHOLDER_PLATFORM: &str = "linux/amd64";

/// Global arguments with their defaults, as if no build argument was given.
struct Defaults {
    declared: BTreeSet<String>,
    values: BTreeMap<String, String>,
}

impl Env for Defaults {
    fn get(&self, name: &str) -> Option<String> {
        self.values.get(name).cloned()
    }
}

impl Defaults {
    fn of(dockerfile: &Dockerfile) -> Self {
        let mut values = BTreeMap::new();
        for side in ["BUILD", "TARGET"] {
            for (part, value) in
                [("PLATFORM", PLACEHOLDER_PLATFORM), ("OS", "linux"), ("ARCH", "amd64"), ("OSVERSION", ""), ("VARIANT", "")]
            {
                values.insert(format!("{side}{part}"), value.to_owned());
            }
        }
        values.insert("TARGETSTAGE".to_owned(), "default".to_owned());
        let mut defaults = Self { declared: BTreeSet::new(), values };
        let lexer = Expander { escape: dockerfile.directives.escape, ..Expander::default() };
        for instruction in &dockerfile.global_args {
            let Kind::Arg(decls) = &instruction.kind else { continue };
            for decl in decls {
                defaults.declared.insert(decl.name.clone());
                if let Some(Ok(value)) = decl.default.as_ref().map(|raw| lexer.word(raw, &defaults)) {
                    defaults.values.insert(decl.name.clone(), value.value);
                }
            }
        }
        defaults
    }
}

#[cfg(test)]
mod tests;
