//! Which plugins run in which phase of a build, as the user said it: by flags, by a file, or by the project's file.
//!
//! It must not know which plugins exist. Ids stand for secrets, never their bytes.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use ovenbird_oci::regular_file::{self, Links};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use super::secret::fields;
use super::{ParseValueError, bad};
use crate::error::{Error, Kind};

/// Longest workflow file, in bytes.
const MOST_BYTES: u64 = 1 << 20;

/// When a plugin runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// After the source is there, before anything is built: the last moment at which anything may change.
    PreBuild,
    /// The image is built, and nobody else has it yet.
    PrePublish,
    /// The image is where it was asked for.
    PostBuild,
    /// At the end, also of a build that failed or was cancelled.
    Exit,
}

impl Phase {
    /// In the order of a build.
    pub const ALL: [Self; 4] = [Self::PreBuild, Self::PrePublish, Self::PostBuild, Self::Exit];

    /// As written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::PreBuild => "pre_build",
            Self::PrePublish => "pre_publish",
            Self::PostBuild => "post_build",
            Self::Exit => "exit",
        }
    }
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Phase {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let said = text.replace('-', "_");
        Self::ALL
            .into_iter()
            .find(|phase| phase.as_str() == said)
            .ok_or_else(|| bad(format!("{text:?} is not a phase: expected pre_build, pre_publish, post_build or exit")))
    }
}

/// What a plugin's failure does to the build.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnFailure {
    /// The build fails.
    #[default]
    Fail,
    /// The build goes on and warns.
    Warn,
}

/// One plugin of a phase.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Name: of a built-in plugin, or of a program `ovenbird-plugin-NAME`.
    pub name: String,
    /// Arguments.
    #[serde(default)]
    pub args: Map<String, Value>,
    /// Arguments as they were typed; what each is (text, number, list), the plugin's schema says.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub typed: Vec<(String, String)>,
    /// What its failure means.
    #[serde(default)]
    pub on_failure: OnFailure,
    /// Is it an error when there is no such plugin?
    #[serde(default = "yes")]
    pub required: bool,
    /// Seconds that it may take; a number, or text such as `90s`, `5m`, `1h`.
    #[serde(default, deserialize_with = "seconds")]
    pub timeout: Option<u64>,
    /// Ids of the build's secrets that it is given.
    #[serde(default)]
    pub secrets: Vec<String>,
    /// The program itself, instead of one that is looked up by name.
    #[serde(default)]
    pub file: Option<PathBuf>,
}

fn yes() -> bool {
    true
}

/// Longest time that may be given to a plugin: a day.
const MOST_SECONDS: u64 = 24 * 3600;

fn parse_seconds(text: &str) -> Result<u64, ParseValueError> {
    let wrong = || bad(format!("{text:?} is not a time: expected seconds from 1 to {MOST_SECONDS}, or a number with s, m or h behind it"));
    let (number, unit) = match text.char_indices().next_back() {
        Some((at, 's')) => (&text[..at], 1),
        Some((at, 'm')) => (&text[..at], 60),
        Some((at, 'h')) => (&text[..at], 3600),
        _ => (text, 1),
    };
    let seconds = number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
    seconds.filter(|seconds| (1..=MOST_SECONDS).contains(seconds)).ok_or_else(wrong)
}

fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let text = match Option::<Value>::deserialize(deserializer)? {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::String(text)) => text,
        Some(other) => other.to_string(),
    };
    parse_seconds(&text).map(Some).map_err(serde::de::Error::custom)
}

/// Keys of `--plugin` that are no arguments of the plugin.
pub(crate) const OWN_KEYS: [&str; 5] = ["on_failure", "required", "timeout", "secret", "file"];

impl Entry {
    /// A plugin without arguments.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            args: Map::new(),
            typed: vec![],
            on_failure: OnFailure::Fail,
            required: true,
            timeout: None,
            secrets: vec![],
            file: None,
        }
    }
}

/// The plugins of a build, by phase, in the order in which they run.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Workflow {
    /// Before the build.
    pub pre_build: Vec<Entry>,
    /// Before anything is pushed.
    pub pre_publish: Vec<Entry>,
    /// After everything is where it was asked for.
    pub post_build: Vec<Entry>,
    /// Always.
    pub exit: Vec<Entry>,
}

impl Workflow {
    /// Is there no plugin at all?
    pub fn is_empty(&self) -> bool {
        Phase::ALL.into_iter().all(|phase| self.entries(phase).is_empty())
    }

    /// The plugins of a phase.
    pub fn entries(&self, phase: Phase) -> &[Entry] {
        match phase {
            Phase::PreBuild => &self.pre_build,
            Phase::PrePublish => &self.pre_publish,
            Phase::PostBuild => &self.post_build,
            Phase::Exit => &self.exit,
        }
    }

    /// Adds a plugin behind the others of its phase.
    pub fn push(&mut self, phase: Phase, entry: Entry) {
        self.of(phase).push(entry);
    }

    /// These plugins, then those.
    pub fn extend(&mut self, other: Self) {
        let Self { pre_build, pre_publish, post_build, exit } = other;
        for (phase, entries) in Phase::ALL.into_iter().zip([pre_build, pre_publish, post_build, exit]) {
            self.of(phase).extend(entries);
        }
    }

    fn of(&mut self, phase: Phase) -> &mut Vec<Entry> {
        match phase {
            Phase::PreBuild => &mut self.pre_build,
            Phase::PrePublish => &mut self.pre_publish,
            Phase::PostBuild => &mut self.post_build,
            Phase::Exit => &mut self.exit,
        }
    }

    /// Programs that are given as files are seen from this folder.
    pub fn rebase(&mut self, folder: &Path) {
        for phase in Phase::ALL {
            for file in self.of(phase).iter_mut().filter_map(|entry| entry.file.as_mut()) {
                *file = folder.join(&*file);
            }
        }
    }

    /// Reads a workflow file; see [`Self::parse`].
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text = regular_file::read_to_string(path, MOST_BYTES, Links::Follow).map_err(|error| {
            Error::from_chain(Kind::Usage, &error).while_doing(format!("cannot read the workflow file {}", path.display()))
        })?;
        Self::parse(path, &text)
    }

    /// Reads the text of a workflow file, `*.json` or else TOML. Programs in it are seen from its folder.
    pub fn parse(path: &Path, text: &str) -> Result<Self, Error> {
        let is_json = path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("json"));
        let read = if is_json {
            serde_json::from_str::<Self>(text).map_err(|e| e.to_string())
        } else {
            toml::from_str::<Self>(text).map_err(|e| e.to_string().trim_end().to_owned())
        };
        let mut workflow =
            read.map_err(|why| Error::new(Kind::Usage, format!("{} is not a workflow file", path.display())).because(why))?;
        workflow.rebase(path.parent().unwrap_or(Path::new("")));
        Ok(workflow)
    }
}

/// `PHASE:NAME[,KEY=VALUE…]` of `--plugin`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PluginSpec {
    /// When.
    pub phase: Phase,
    /// What.
    pub entry: Entry,
}

impl FromStr for PluginSpec {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (head, rest) = text.split_once(',').unwrap_or((text, ""));
        let (phase, name) = head.split_once(':').filter(|(_, name)| !name.is_empty()).ok_or_else(|| {
            bad(format!("{head:?} is not a plugin: expected PHASE:NAME, for example pre_build:labels or post_build:package-list"))
        })?;
        let mut entry = Entry::new(name);
        for (key, value) in fields(rest)? {
            match key.as_str() {
                "on_failure" => {
                    entry.on_failure = match value.as_str() {
                        "fail" => OnFailure::Fail,
                        "warn" => OnFailure::Warn,
                        _ => return Err(bad(format!("on_failure={value:?}: expected fail or warn"))),
                    }
                }
                "required" => entry.required = value.parse().map_err(|_| bad(format!("required={value:?}: expected true or false")))?,
                "timeout" => entry.timeout = Some(parse_seconds(&value)?),
                "secret" => entry.secrets.push(value),
                "file" => entry.file = Some(value.into()),
                _ => entry.typed.push((key, value)),
            }
        }
        Ok(Self { phase: phase.parse()?, entry })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags() {
        for (text, expect) in [
            ("pre_build:labels", "PreBuild labels [] Fail true None []"),
            ("pre-publish:size-limit,max=1g,on_failure=warn", "PrePublish size-limit [(\"max\", \"1g\")] Warn true None []"),
            ("exit:x,timeout=2m,secret=a,secret=b,required=false", "Exit x [] Fail false Some(120) [\"a\", \"b\"]"),
            ("post_build:x,\"k=a,b\"", "PostBuild x [(\"k\", \"a,b\")] Fail true None []"),
            ("labels", "! \"labels\" is not a plugin"),
            ("exit:", "! \"exit:\" is not a plugin"),
            ("build:x", "! \"build\" is not a phase"),
            ("exit:x,on_failure=no", "! on_failure=\"no\""),
            ("exit:x,timeout=0", "! \"0\" is not a time"),
            ("exit:x,timeout=99999999999999999999h", "! "),
        ] {
            let got = match text.parse::<PluginSpec>() {
                Ok(PluginSpec { phase, entry: e }) => {
                    format!("{phase:?} {} {:?} {:?} {} {:?} {:?}", e.name, e.typed, e.on_failure, e.required, e.timeout, e.secrets)
                }
                Err(error) => format!("! {error}"),
            };
            assert!(got.starts_with(expect), "{text}: {got}");
        }
    }

    #[test]
    fn files() {
        let toml = "[[pre_build]]\nname = \"x\"\nfile = \"p/x\"\ntimeout = \"1m\"\nargs = { a = 1 }\n[[exit]]\nname = \"y\"\ntimeout = 5\n";
        let read = Workflow::parse(Path::new("/w/flow.toml"), toml).unwrap();
        assert_eq!(read.pre_build[0].file.as_deref(), Some(Path::new("/w/p/x")));
        assert_eq!((read.pre_build[0].timeout, read.exit[0].timeout), (Some(60), Some(5)));
        let json = serde_json::to_string(&read).unwrap();
        assert_eq!(Workflow::parse(Path::new("/elsewhere/flow.json"), &json).unwrap(), read);
        for (text, expect) in [
            ("[[prebuild]]\nname = \"x\"", "prebuild"),
            ("[[exit]]\nnam = \"x\"", "nam"),
            ("[[exit]]\nname = \"x\"\ntimeout = -1", "not a time"),
        ] {
            let error = Workflow::parse(Path::new("f.toml"), text).unwrap_err();
            assert!(error.kind == Kind::Usage && error.to_string().contains(expect), "{text}: {error}");
        }
    }
}
