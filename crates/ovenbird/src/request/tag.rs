//! Templates in image names (`-t app:{git.sha}`), and what kind of name a tag is.
//!
//! Pure: what the variables stand for comes from outside, as [`Values`]. A value that stands in a tag is made valid there (`feature/x` becomes
//! `feature-x`); anywhere else it must fit as it is, so that the name of a branch never chooses a registry or a folder in one.

use std::collections::BTreeMap;
use std::fmt;

use ovenbird_oci::Reference;
use ovenbird_oci::publish::TagClass;
use serde::{Deserialize, Serialize};

/// What there is, for messages.
const KNOWN: &str = "{id}, {git.sha}, {git.short}, {git.branch}, {git.tag}, {git.major}, {git.minor}, {date} and {label:NAME}";

/// What can be wrong with a template.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// Braces do not match.
    #[error("the name {name:?} has a {brace} without its other half; write {brace}{brace} for the character itself")]
    Brace {
        /// The name as given.
        name: String,
        /// `{` or `}`.
        brace: char,
    },
    /// No such variable.
    #[error("the name {name:?} has the unknown variable {{{variable}}}; there are {KNOWN}")]
    Unknown {
        /// The name as given.
        name: String,
        /// What stands between the braces.
        variable: String,
    },
    /// A variable where it must not be.
    #[error("the name {name:?} has {variable} before the tag: {reason}")]
    Place {
        /// The name as given.
        name: String,
        /// Which.
        variable: Variable,
        /// Why not there.
        reason: &'static str,
    },
    /// A value that does not fit.
    #[error("the name {name:?}: {variable} is {value:?}, which cannot stand there; {hint}")]
    Unfit {
        /// The name as given.
        name: String,
        /// Which.
        variable: Variable,
        /// What it is.
        value: String,
        /// What to do.
        hint: &'static str,
    },
    /// A variable that stands for nothing here.
    #[error("the name {name:?}: there is no {variable}: {reason}")]
    Missing {
        /// The name as given.
        name: String,
        /// Which.
        variable: Variable,
        /// Why not.
        reason: String,
    },
}

/// What can stand between braces.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Variable {
    /// The content id.
    Id,
    /// Commit, 40 digits (64 in a repository of SHA-256).
    GitSha,
    /// Its first 12.
    GitShort,
    /// Branch that is checked out.
    GitBranch,
    /// Highest tag of the commit.
    GitTag,
    /// `v1` of the tag `v1.2.3`.
    GitMajor,
    /// `v1.2` of the tag `v1.2.3`.
    GitMinor,
    /// Day, `20261121`, in UTC.
    Date,
    /// Label of the built image.
    Label(String),
}

impl Variable {
    fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "id" => Self::Id,
            "git.sha" => Self::GitSha,
            "git.short" => Self::GitShort,
            "git.branch" => Self::GitBranch,
            "git.tag" => Self::GitTag,
            "git.major" => Self::GitMajor,
            "git.minor" => Self::GitMinor,
            "date" => Self::Date,
            _ => match text.strip_prefix("label:") {
                Some(label) if !label.is_empty() => Self::Label(label.into()),
                _ => return None,
            },
        })
    }

    /// Is git to be asked for it?
    pub fn is_git(&self) -> bool {
        matches!(self, Self::GitSha | Self::GitShort | Self::GitBranch | Self::GitTag | Self::GitMajor | Self::GitMinor)
    }
}

impl fmt::Display for Variable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id => f.write_str("{id}"),
            Self::GitSha => f.write_str("{git.sha}"),
            Self::GitShort => f.write_str("{git.short}"),
            Self::GitBranch => f.write_str("{git.branch}"),
            Self::GitTag => f.write_str("{git.tag}"),
            Self::GitMajor => f.write_str("{git.major}"),
            Self::GitMinor => f.write_str("{git.minor}"),
            Self::Date => f.write_str("{date}"),
            Self::Label(label) => write!(f, "{{label:{label}}}"),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Text(String),
    Variable { variable: Variable, in_tag: bool },
}

/// A name with variables in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    text: String,
    pieces: Vec<Piece>,
}

/// What variables stand for: a value, or why there is none.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Values {
    /// As a list in JSON, whose keys can only be text.
    #[serde(with = "pairs")]
    values: BTreeMap<Variable, Result<String, String>>,
    /// Stands for labels that are not known yet.
    #[serde(skip)]
    unknown_label: Option<&'static str>,
}

mod pairs {
    //! A map as a list of pairs.

    use std::collections::BTreeMap;

    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};

    use super::Variable;

    type Map = BTreeMap<Variable, Result<String, String>>;

    pub(super) fn serialize<S: Serializer>(map: &Map, serializer: S) -> Result<S::Ok, S::Error> {
        map.iter().collect::<Vec<_>>().serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Map, D::Error> {
        Ok(Vec::deserialize(deserializer)?.into_iter().collect())
    }
}

impl Values {
    /// Says what a variable stands for.
    pub fn set(&mut self, variable: Variable, value: Result<String, String>) {
        self.values.insert(variable, value);
    }

    /// The same for the time before the build: labels are not known, and any tag will do for them.
    #[must_use]
    pub fn before_build(&self) -> Self {
        Self { unknown_label: Some("label"), ..self.clone() }
    }

    pub(crate) fn get(&self, variable: &Variable) -> Result<String, String> {
        match (variable, self.unknown_label) {
            (Variable::Label(_), Some(any)) => Ok(any.into()),
            (Variable::Label(_), None) => self.values.get(variable).cloned().unwrap_or_else(|| Err("the image has no such label".into())),
            _ => self.values.get(variable).cloned().unwrap_or_else(|| Err("it is not known here".into())),
        }
    }
}

impl Template {
    /// Reads a name. `{{` and `}}` are the characters themselves.
    pub fn parse(text: &str) -> Result<Self, TemplateError> {
        let name = || text.chars().take(300).collect::<String>();
        let mut pieces = vec![];
        let mut literal = String::new();
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            literal.push_str(&rest[..at]);
            let brace = if rest[at..].starts_with('{') { '{' } else { '}' };
            rest = &rest[at + 1..];
            if let Some(after) = rest.strip_prefix(brace) {
                literal.push(brace);
                rest = after;
                continue;
            }
            let end = rest.find(['{', '}']).filter(|end| brace == '{' && rest[*end..].starts_with('}'));
            let Some(end) = end else { return Err(TemplateError::Brace { name: name(), brace }) };
            let variable = &rest[..end];
            let variable = Variable::parse(variable)
                .ok_or_else(|| TemplateError::Unknown { name: name(), variable: variable.chars().take(100).collect() })?;
            if !literal.is_empty() {
                pieces.push(Piece::Text(std::mem::take(&mut literal)));
            }
            pieces.push(Piece::Variable { variable, in_tag: false });
            rest = &rest[end + 1..];
        }
        literal.push_str(rest);
        if !literal.is_empty() {
            pieces.push(Piece::Text(literal));
        }
        let mut this = Self { text: text.to_owned(), pieces };
        this.find_tag(&name)?;
        Ok(this)
    }

    /// Marks the variables that stand in the tag: behind the first `:` after the last `/`.
    fn find_tag(&mut self, name: &dyn Fn() -> String) -> Result<(), TemplateError> {
        let slash = |piece: &Piece| matches!(piece, Piece::Text(text) if text.contains('/'));
        let last_slash = self.pieces.iter().rposition(slash);
        let first_slash = self.pieces.iter().position(slash);
        let mut colon = false;
        for (at, piece) in self.pieces.iter_mut().enumerate() {
            match piece {
                Piece::Text(text) => {
                    let tail = if last_slash == Some(at) { text.rsplit('/').next().unwrap_or_default() } else { text };
                    colon |= last_slash.is_none_or(|slash| at >= slash) && tail.contains(':');
                }
                Piece::Variable { variable, in_tag } => {
                    *in_tag = colon;
                    let place = |reason| TemplateError::Place { name: name(), variable: variable.clone(), reason };
                    if !colon && matches!(variable, Variable::Label(_)) {
                        return Err(place("the place to push to must be known before the image is built; write it in the tag"));
                    }
                    if first_slash.is_some_and(|slash| at < slash) {
                        return Err(place("the first part of a name chooses the registry, so it must be written out"));
                    }
                }
            }
        }
        Ok(())
    }

    /// As given.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Its variables.
    pub fn variables(&self) -> impl Iterator<Item = &Variable> {
        self.pieces.iter().filter_map(|piece| match piece {
            Piece::Variable { variable, .. } => Some(variable),
            Piece::Text(_) => None,
        })
    }

    /// The name with values in the place of the variables.
    pub fn expand(&self, values: &Values) -> Result<String, TemplateError> {
        let name = || self.text.chars().take(300).collect::<String>();
        let mut out = String::new();
        for piece in &self.pieces {
            let (variable, in_tag) = match piece {
                Piece::Text(text) => {
                    out.push_str(text);
                    continue;
                }
                Piece::Variable { variable, in_tag } => (variable, *in_tag),
            };
            let value =
                values.get(variable).map_err(|reason| TemplateError::Missing { name: name(), variable: variable.clone(), reason })?;
            let unfit =
                |hint| TemplateError::Unfit { name: name(), variable: variable.clone(), value: value.chars().take(100).collect(), hint };
            if in_tag {
                let fitting = as_tag(&value, out.ends_with(':'));
                if fitting.is_empty() {
                    return Err(unfit("nothing of it can be in a tag, which has letters, digits, `_`, `.` and `-`"));
                }
                out.push_str(&fitting);
            } else if is_component(&value) {
                out.push_str(&value);
            } else {
                return Err(unfit("write it in the tag, where it is made valid: a repository has a-z, 0-9 and `.`, `_`, `-` between them"));
            }
        }
        Ok(out)
    }
}

/// A value with `-` in the place of what no tag can have. At its beginning a tag has neither `.` nor `-`.
fn as_tag(value: &str, first: bool) -> String {
    let mut tag = String::new();
    for c in value.chars() {
        match c {
            '_' | '.' | '-' => tag.push(c),
            c if c.is_ascii_alphanumeric() => tag.push(c),
            _ if tag.ends_with('-') => {}
            _ => tag.push('-'),
        }
    }
    let tag = tag.trim_end_matches('-');
    if first { tag.trim_start_matches(['.', '-']).to_owned() } else { tag.to_owned() }
}

/// Can it be one part of a repository's path?
fn is_component(value: &str) -> bool {
    !value.contains(['/', ':', '@']) && format!("host.invalid/{value}").parse::<Reference>().is_ok()
}

/// Which tags a name without a tag gets, and which tags are more than an ordinary one. From the settings, `[tags]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TagPolicy {
    /// Names of this one build, for ever.
    pub unique: Vec<String>,
    /// Names of releases.
    pub primary: Vec<String>,
    /// Names that follow what is newest.
    pub floating: Vec<String>,
}

impl TagPolicy {
    /// Does it say nothing?
    pub fn is_empty(&self) -> bool {
        self.unique.is_empty() && self.primary.is_empty() && self.floating.is_empty()
    }

    /// Whether each of them can make a tag.
    pub(crate) fn check(&self) -> Result<(), crate::error::Error> {
        use crate::error::{Error, Kind};
        for (tag, _) in self.tags() {
            let mut values = Values::default();
            let configuration = |error: TemplateError| Error::from_chain(Kind::Configuration, &error);
            let template = Template::parse(&format!("r.test/name:{tag}")).map_err(configuration)?;
            for variable in template.variables() {
                values.set(variable.clone(), Ok("x".into()));
            }
            let name = template.expand(&values).map_err(configuration)?;
            if !name.strip_prefix("r.test/name:").is_some_and(Reference::is_tag) {
                return Err(Error::new(Kind::Configuration, format!("{tag:?} makes no tag"))
                    .hint("a tag has letters, digits, `_`, `.` and `-`, and variables such as {git.sha}"));
            }
        }
        Ok(())
    }

    /// Its tags with their classes, in the order in which they are put.
    pub fn tags(&self) -> impl Iterator<Item = (&str, TagClass)> {
        self.unique
            .iter()
            .map(|tag| (tag.as_str(), TagClass::Unique))
            .chain(self.primary.iter().map(|tag| (tag.as_str(), TagClass::Primary)))
            .chain(self.floating.iter().map(|tag| (tag.as_str(), TagClass::Floating)))
    }

    /// What kind of name a template makes: what the policy says of its tag; else unique when content or commit is in it, floating when it is
    /// `latest`, and primary otherwise.
    pub fn class_of(&self, template: &Template) -> TagClass {
        let tag = tag_of(template.text()).unwrap_or("latest");
        if let Some((_, class)) = self.tags().find(|(known, _)| *known == tag) {
            return class;
        }
        match tag {
            "latest" => TagClass::Floating,
            _ if template.variables().any(|v| matches!(v, Variable::GitMajor | Variable::GitMinor)) => TagClass::Floating,
            _ if template.variables().any(|v| matches!(v, Variable::Id | Variable::GitSha)) => TagClass::Unique,
            _ => TagClass::Primary,
        }
    }
}

/// The tag as written. A colon in `{label:x}` is none.
pub(crate) fn tag_of(name: &str) -> Option<&str> {
    let mut depth = 0_usize;
    let mut found = None;
    for (at, c) in name.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            '/' if depth == 0 => found = None,
            '@' if depth == 0 => return None,
            ':' if depth == 0 => found = found.or(Some(at + 1)),
            _ => {}
        }
    }
    found.map(|at| &name[at..])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values() -> Values {
        let mut values = Values::default();
        let sha = "0123456789abcdef0123456789abcdef01234567";
        values.set(Variable::Id, Ok("ab".repeat(32)));
        values.set(Variable::GitSha, Ok(sha.into()));
        values.set(Variable::GitShort, Ok(sha[..12].into()));
        values.set(Variable::GitBranch, Ok("feature/ÜX #1".into()));
        values.set(Variable::GitTag, Err("the commit has no tag".into()));
        values.set(Variable::Date, Ok("20261121".into()));
        values.set(Variable::Label("v".into()), Ok("1.2.3+build".into()));
        values.set(Variable::Label("bad".into()), Ok("++".into()));
        values
    }

    #[test]
    fn names_are_made() {
        for (text, expect) in [
            ("app", "app"),
            ("app:1", "app:1"),
            ("app:{id}", &format!("app:{}", "ab".repeat(32))),
            ("localhost:5000/app:run-{git.short}", "localhost:5000/app:run-0123456789ab"),
            ("app:{git.branch}", "app:feature-X-1"),
            ("app:v{git.branch}", "app:vfeature-X-1"),
            ("app:{date}-{git.short}", "app:20261121-0123456789ab"),
            ("app:{label:v}", "app:1.2.3-build"),
            ("app-{git.short}:1", "app-0123456789ab:1"),
            ("h.io/{date}/app", "h.io/20261121/app"),
            ("app:{{x}}", "app:{x}"),
            ("app:{id", "! the name \"app:{id\" has a { without its other half"),
            ("app:id}", "! the name \"app:id}\" has a } without"),
            ("app:{{id}", "! the name \"app:{{id}\" has a } without"),
            ("app:{i{d}", "! the name \"app:{i{d}\" has a { without"),
            ("app:{}", "! the name \"app:{}\" has the unknown variable {}; there are {id}, {git.sha}"),
            ("app:{label:}", "! the name \"app:{label:}\" has the unknown variable {label:}"),
            ("app:{sha}", "! the name \"app:{sha}\" has the unknown variable {sha}; there are {id}, {git.sha}, {git.short}, {git.branch}"),
            (
                "app-{git.branch}:1",
                "! the name \"app-{git.branch}:1\": {git.branch} is \"feature/ÜX #1\", which cannot stand there; write it in the tag",
            ),
            (
                "{git.branch}/app",
                "! the name \"{git.branch}/app\" has {git.branch} before the tag: the first part of a name chooses the registry",
            ),
            ("localhost:{date}/app", "! the name \"localhost:{date}/app\" has {date} before the tag: the first part"),
            ("app-{label:v}", "! the name \"app-{label:v}\" has {label:v} before the tag: the place to push to"),
            ("app:{git.tag}", "! the name \"app:{git.tag}\": there is no {git.tag}: the commit has no tag"),
            ("app:{label:none}", "! the name \"app:{label:none}\": there is no {label:none}: the image has no such label"),
            ("app:{label:bad}", "! the name \"app:{label:bad}\": {label:bad} is \"++\", which cannot stand there"),
        ] {
            let got = Template::parse(text).and_then(|t| t.expand(&values())).unwrap_or_else(|e| format!("! {e}"));
            assert!(got.starts_with(expect) && (expect.starts_with('!') || got == *expect), "{text}: {got}");
        }
        let before = Template::parse("app:{label:v}-1").unwrap().expand(&values().before_build());
        assert_eq!(before.as_deref(), Ok("app:label-1"));
    }

    #[test]
    fn a_value_in_a_tag_is_valid_there() {
        for (value, expect) in [
            ("main", "main"),
            ("feature/x", "feature-x"),
            ("a//b", "a-b"),
            ("-a", "a"),
            (".hidden", "hidden"),
            ("../../etc/passwd", "etc-passwd"),
            ("v1.2.3", "v1.2.3"),
            ("a b\tc", "a-b-c"),
            ("ä", ""),
            ("x/", "x"),
        ] {
            assert_eq!(as_tag(value, true), expect, "{value}");
            assert!(expect.is_empty() || Reference::is_tag(expect), "{expect}");
        }
        for c in (0..0x3000).filter_map(char::from_u32) {
            for value in [format!("{c}"), format!("{c}a"), format!("a{c}"), format!("a{c}{c}b"), format!("{c}{c}{c}")] {
                let tag = as_tag(&value, true);
                assert!(tag.is_empty() || Reference::is_tag(&tag), "{value:?}: {tag:?}");
            }
        }
    }

    #[test]
    fn classes() {
        let policy = TagPolicy {
            unique: vec!["{git.sha}".into(), "build-{date}".into()],
            primary: vec!["{git.tag}".into()],
            floating: vec!["latest".into(), "{git.branch}".into(), "edge".into()],
        };
        for (name, plain, with_policy) in [
            ("app", TagClass::Floating, TagClass::Floating),
            ("localhost:5000/app", TagClass::Floating, TagClass::Floating),
            ("app:latest", TagClass::Floating, TagClass::Floating),
            ("app:1.2", TagClass::Primary, TagClass::Primary),
            ("app:edge", TagClass::Primary, TagClass::Floating),
            ("app:{git.branch}", TagClass::Primary, TagClass::Floating),
            ("app:{git.tag}", TagClass::Primary, TagClass::Primary),
            ("app:{id}", TagClass::Unique, TagClass::Unique),
            ("app:{git.minor}", TagClass::Floating, TagClass::Floating),
            ("app:run-{git.sha}", TagClass::Unique, TagClass::Unique),
            ("app:build-{date}", TagClass::Primary, TagClass::Unique),
            ("app:{label:a/b}", TagClass::Primary, TagClass::Primary),
        ] {
            let template = Template::parse(name).unwrap();
            assert_eq!(TagPolicy::default().class_of(&template), plain, "{name}");
            assert_eq!(policy.class_of(&template), with_policy, "{name}");
        }
    }

    #[test]
    fn tags_as_written() {
        for (name, expect) in [
            ("app", None),
            ("app:1", Some("1")),
            ("h:5/app", None),
            ("h:5/app:{label:x}", Some("{label:x}")),
            ("h:5/app:a{label:x/y:z}b", Some("a{label:x/y:z}b")),
            ("{label:x}", None),
            ("app@sha256:00", None),
        ] {
            assert_eq!(tag_of(name), expect, "{name}");
        }
    }
}
