//! `RUN --mount=` after expansion: comma-separated `key=value` fields, with CSV quotes.

use crate::expand::ExpandError;
use crate::suggest;

/// Type of a mount and what only that type has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MountKind {
    /// `type=bind` (the default).
    Bind {
        /// `from=`: stage, image or named context; the build context if absent.
        from: Option<String>,
        /// `source=`.
        source: Option<String>,
        /// `rw`.
        writable: bool,
    },
    /// `type=cache`.
    Cache {
        /// `id=`; the target if absent.
        id: Option<String>,
        /// `from=`.
        from: Option<String>,
        /// `source=`.
        source: Option<String>,
        /// `sharing=`.
        sharing: Sharing,
        /// `ro`.
        read_only: bool,
        /// `mode=` of a new folder, octal.
        mode: Option<u32>,
        /// `uid=`.
        uid: Option<u32>,
        /// `gid=`.
        gid: Option<u32>,
    },
    /// `type=tmpfs`.
    Tmpfs {
        /// Bytes.
        size: Option<u64>,
    },
    /// `type=secret`.
    Secret {
        /// `id=`; the base name of the target if absent.
        id: String,
        /// `env=`: name of the variable that gets the value.
        env: Option<String>,
        /// `required=`.
        required: bool,
        /// `mode=`, octal.
        mode: Option<u32>,
        /// `uid=`.
        uid: Option<u32>,
        /// `gid=`.
        gid: Option<u32>,
    },
    /// `type=ssh`.
    Ssh {
        /// `id=`, `default` if absent.
        id: String,
        /// `required=`.
        required: bool,
        /// `mode=`, octal.
        mode: Option<u32>,
        /// `uid=`.
        uid: Option<u32>,
        /// `gid=`.
        gid: Option<u32>,
    },
}

/// `sharing=` of a cache mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sharing {
    /// Several steps at once.
    #[default]
    Shared,
    /// A new folder when another step uses it.
    Private,
    /// One step waits for the other.
    Locked,
}

/// A mount of a `RUN` step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunMount {
    /// Type and its options.
    pub kind: MountKind,
    /// `target=`, as given (may be relative to the working directory); `None` where the type has a default.
    pub target: Option<String>,
}

/// What can be wrong with a mount.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MountError {
    /// The commas and quotes cannot be read.
    #[error("failed to parse csv mounts: {reason} in {value:?}")]
    Csv {
        /// The whole value.
        value: String,
        /// Why.
        reason: &'static str,
    },
    /// A key nobody knows, or a key of another type of mount.
    #[error("unexpected key '{key}' for mount type '{kind}'{hint}", hint = suggest::suffix(*suggestion))]
    UnexpectedKey {
        /// Key, lower case.
        key: String,
        /// Type of the mount.
        kind: &'static str,
        /// A key of that type that looks like it.
        suggestion: Option<&'static str>,
    },
    /// A field without `=` that needs a value.
    #[error("invalid field '{field}' must be a key=value pair")]
    NotAPair {
        /// Field as written.
        field: String,
    },
    /// A key given twice, be it by an alias.
    #[error("key '{key}' of the mount is given twice: remove one")]
    Duplicate {
        /// Key, by its first name (`target`).
        key: &'static str,
    },
    /// `type=` of no known type.
    #[error("unsupported mount type {value:?}{hint}, the types are bind, cache, tmpfs, secret, ssh", hint = suggest::suffix(*suggestion))]
    UnknownType {
        /// Type as written.
        value: String,
        /// A type that looks like it.
        suggestion: Option<&'static str>,
    },
    /// `sharing=` of no known mode.
    #[error("unsupported sharing value {value:?}{hint}, the modes are shared, private, locked", hint = suggest::suffix(*suggestion))]
    UnknownSharing {
        /// Mode as written.
        value: String,
        /// A mode that looks like it.
        suggestion: Option<&'static str>,
    },
    /// A value that is not what its key needs.
    #[error("invalid value {value:?} for {key}: {expected}")]
    Value {
        /// Key, lower case.
        key: String,
        /// As written.
        value: String,
        /// What is expected.
        expected: &'static str,
    },
    /// A key that the type needs is absent, or two keys contradict each other.
    #[error("invalid {kind} mount: {reason}")]
    Combination {
        /// Type of the mount.
        kind: &'static str,
        /// What is wrong, and how to write it.
        reason: &'static str,
    },
    /// A value could not be expanded.
    #[error("cannot expand the value of '{key}': {source}")]
    Expand {
        /// Key, lower case.
        key: String,
        /// Why.
        source: ExpandError,
    },
}

/// Parses the expanded value of `--mount=`.
pub fn parse(value: &str) -> Result<RunMount, MountError> {
    parse_expanding(value, &mut |raw| Ok(raw.to_owned()))
}

/// Parses the raw value of `--mount=` and expands each field's value by itself, so that a comma or
/// a quote in a variable does not change the fields. `from=` is not expanded (the parser refuses
/// variables there).
pub fn parse_expanding(value: &str, expand: &mut dyn FnMut(&str) -> Result<String, ExpandError>) -> Result<RunMount, MountError> {
    let fields = csv(value)?;
    let mut pairs = Vec::with_capacity(fields.len());
    for field in fields {
        let (key, raw) = match field.split_once('=') {
            Some((key, raw)) => (key.to_ascii_lowercase(), Some(raw)),
            None => (field.to_ascii_lowercase(), None),
        };
        let value = match raw {
            Some(raw) if key == "from" => Some(raw.to_owned()),
            Some(raw) => Some(expand(raw).map_err(|source| MountError::Expand { key: key.clone(), source })?),
            None => None,
        };
        pairs.push((key, value));
    }
    build(&pairs)
}

/// Does a `from=` field hold a variable? BuildKit refuses this before anything is expanded.
pub(crate) fn from_has_variable(value: &str) -> bool {
    let names_variable = |text: &str| text.split_once('$').is_some_and(|(_, name)| !name.is_empty());
    csv(value).is_ok_and(|fields| {
        fields.iter().any(|f| f.split_once('=').is_some_and(|(k, v)| k.eq_ignore_ascii_case("from") && names_variable(v)))
    })
}

/// Keys by their first name, with what they are called too, and the types that take them.
const KEYS: [(&str, &[&str], &[&str]); 13] = [
    ("target", &["dst", "destination"], &["bind", "cache", "tmpfs", "secret", "ssh"]),
    ("source", &["src"], &["bind", "cache", "secret"]),
    ("from", &[], &["bind", "cache"]),
    ("rw", &["readwrite"], &["bind", "cache", "tmpfs", "secret", "ssh"]),
    ("ro", &["readonly"], &["bind", "cache", "tmpfs", "secret", "ssh"]),
    ("id", &[], &["cache", "secret", "ssh"]),
    ("sharing", &[], &["cache"]),
    ("mode", &[], &["cache", "secret", "ssh"]),
    ("uid", &[], &["cache", "secret", "ssh"]),
    ("gid", &[], &["cache", "secret", "ssh"]),
    ("size", &[], &["tmpfs"]),
    ("required", &[], &["secret", "ssh"]),
    ("env", &[], &["secret"]),
];

/// Keys that may stand without a value.
const BARE_KEYS: [&str; 5] = ["ro", "readonly", "rw", "readwrite", "required"];

const TYPES: [&str; 5] = ["bind", "cache", "tmpfs", "secret", "ssh"];

/// Fields by the first name of their key.
struct Fields<'p> {
    kind: &'static str,
    given: Vec<(&'static str, &'p str, Option<&'p str>)>,
}

impl Fields<'_> {
    fn find(&self, name: &str) -> Option<(&str, Option<&str>)> {
        self.given.iter().find(|(n, ..)| *n == name).map(|(_, key, value)| (*key, *value))
    }

    fn text(&self, name: &str) -> Option<String> {
        self.find(name).and_then(|(_, value)| value).filter(|v| !v.is_empty()).map(str::to_owned)
    }

    fn flag(&self, name: &str) -> Result<Option<bool>, MountError> {
        let Some((key, value)) = self.find(name) else { return Ok(None) };
        match value {
            None | Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(Some(true)),
            Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(Some(false)),
            Some(other) => Err(invalid(key, other, "write true or false")),
        }
    }

    fn number(&self, name: &str, radix: u32, expected: &'static str) -> Result<Option<u32>, MountError> {
        let Some((key, Some(value))) = self.find(name) else { return Ok(None) };
        let digits = value.bytes().all(|b| b.is_ascii_digit());
        u32::from_str_radix(value, radix).ok().filter(|_| digits).map(Some).ok_or_else(|| invalid(key, value, expected))
    }

    /// `mode`, `uid`, `gid`.
    fn owner(&self) -> Result<[Option<u32>; 3], MountError> {
        Ok([
            self.number("mode", 8, "write an octal number such as 0400")?,
            self.number("uid", 10, "write a user id such as 1000")?,
            self.number("gid", 10, "write a group id such as 1000")?,
        ])
    }

    /// The last of `ro` and `rw` decides; `default` if neither is given.
    fn read_only(&self, default: bool) -> Result<bool, MountError> {
        let (ro, rw) = (self.flag("ro")?, self.flag("rw")?);
        let last = self.given.iter().rev().find_map(|(name, ..)| match *name {
            "ro" => ro,
            "rw" => rw.map(|rw| !rw),
            _ => None,
        });
        Ok(last.unwrap_or(default))
    }

    /// Refuses `ro` and `rw` where the type allows only one of the two.
    fn always(&self, read_only: bool, reason: &'static str) -> Result<(), MountError> {
        if self.read_only(read_only)? == read_only { Ok(()) } else { Err(MountError::Combination { kind: self.kind, reason }) }
    }
}

fn invalid(key: &str, value: &str, expected: &'static str) -> MountError {
    MountError::Value { key: key.to_owned(), value: value.to_owned(), expected }
}

fn build(pairs: &[(String, Option<String>)]) -> Result<RunMount, MountError> {
    let mut kind = None;
    for (key, value) in pairs.iter().filter(|(key, _)| key == "type") {
        let value = value.as_deref().ok_or_else(|| MountError::NotAPair { field: key.clone() })?;
        let known = TYPES.into_iter().find(|t| t.eq_ignore_ascii_case(value));
        let known = known.ok_or_else(|| MountError::UnknownType { value: value.to_owned(), suggestion: suggest::nearest(value, TYPES) })?;
        if kind.replace(known).is_some() {
            return Err(MountError::Duplicate { key: "type" });
        }
    }
    let mut fields = Fields { kind: kind.unwrap_or("bind"), given: vec![] };
    for (key, value) in pairs.iter().filter(|(key, _)| key != "type") {
        let known =
            KEYS.iter().find(|(name, aliases, types)| (name == key || aliases.contains(&key.as_str())) && types.contains(&fields.kind));
        if value.is_none() && !BARE_KEYS.contains(&key.as_str()) {
            return Err(MountError::NotAPair { field: key.clone() });
        }
        let Some((name, ..)) = known else { return Err(unexpected(key, fields.kind)) };
        if fields.find(name).is_some() {
            return Err(MountError::Duplicate { key: name });
        }
        fields.given.push((name, key, value.as_deref()));
    }
    typed(&fields)
}

fn unexpected(key: &str, kind: &'static str) -> MountError {
    let names = KEYS.iter().filter(|(.., types)| types.contains(&kind)).flat_map(|(name, aliases, _)| [&[*name], *aliases].concat());
    MountError::UnexpectedKey { key: key.to_owned(), kind, suggestion: suggest::nearest(key, names.chain(["type"])) }
}

fn typed(fields: &Fields) -> Result<RunMount, MountError> {
    let target = fields.text("target");
    let need_target = || {
        let reason = "a target is required, write target=/path";
        target.clone().map(Some).ok_or(MountError::Combination { kind: fields.kind, reason })
    };
    let [mode, uid, gid] = fields.owner()?;
    let (kind, target) = match fields.kind {
        "bind" => {
            let kind = MountKind::Bind { from: fields.text("from"), source: fields.text("source"), writable: !fields.read_only(true)? };
            (kind, need_target()?)
        }
        "cache" => {
            let sharing = match fields.text("sharing").map(|s| s.to_ascii_lowercase()).as_deref() {
                None | Some("shared") => Sharing::Shared,
                Some("private") => Sharing::Private,
                Some("locked") => Sharing::Locked,
                Some(other) => {
                    let suggestion = suggest::nearest(other, ["shared", "private", "locked"]);
                    return Err(MountError::UnknownSharing { value: other.to_owned(), suggestion });
                }
            };
            let kind = MountKind::Cache {
                id: fields.text("id"),
                from: fields.text("from"),
                source: fields.text("source"),
                sharing,
                read_only: fields.read_only(false)?,
                mode,
                uid,
                gid,
            };
            (kind, need_target()?)
        }
        "tmpfs" => {
            let size = match fields.find("size") {
                Some((key, Some(value))) => Some(bytes(value).ok_or_else(|| invalid(key, value, "write a size such as 64m or 1g"))?),
                _ => None,
            };
            fields.always(false, "a tmpfs mount is always writable")?;
            (MountKind::Tmpfs { size }, need_target()?)
        }
        "secret" => {
            let (id, source, env) = (fields.text("id"), fields.text("source"), fields.text("env"));
            if id.is_some() && source.is_some() {
                return Err(MountError::Combination { kind: "secret", reason: "both source and id can't be set, keep id" });
            }
            let base =
                || target.as_deref().and_then(|t| t.trim_end_matches('/').rsplit('/').next()).filter(|b| !b.is_empty()).map(str::to_owned);
            let id = id.or(source).or_else(base);
            let reason = "one of source, target required, write id=name";
            let id = id.ok_or(MountError::Combination { kind: "secret", reason })?;
            fields.always(true, "a secret is always read-only")?;
            (MountKind::Secret { id, env, required: fields.flag("required")?.unwrap_or(false), mode, uid, gid }, target)
        }
        _ => {
            let id = fields.text("id").unwrap_or_else(|| "default".to_owned());
            fields.always(true, "an agent socket is always read-only")?;
            (MountKind::Ssh { id, required: fields.flag("required")?.unwrap_or(false), mode, uid, gid }, target)
        }
    };
    Ok(RunMount { kind, target })
}

/// `64`, `64k`, `1.5m`, `1GiB`: units count by 1024 (go-units).
fn bytes(text: &str) -> Option<u64> {
    let split = text.rfind(|c: char| c.is_ascii_digit() || c == '.')? + 1;
    let (number, unit) = text.split_at(split);
    let unit = unit.trim_start().to_ascii_lowercase();
    let letter = unit.strip_suffix("ib").or(unit.strip_suffix('b')).unwrap_or(&unit);
    let shift = match letter {
        "" if unit != "ib" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        _ => return None,
    };
    if !number.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
        return None;
    }
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(1 << shift);
    }
    let value = number.parse::<f64>().ok()? * (1_u64 << shift) as f64;
    (value < u64::MAX as f64).then_some(value as u64)
}

/// One record of comma-separated fields; a field in double quotes may hold commas and doubled
/// quotes (RFC 4180).
fn csv(value: &str) -> Result<Vec<String>, MountError> {
    let error = |reason| MountError::Csv { value: value.to_owned(), reason };
    if value.trim().is_empty() {
        return Err(error("nothing is given"));
    }
    let mut fields = Vec::new();
    let mut rest = value;
    loop {
        let field;
        if let Some(quoted) = rest.strip_prefix('"') {
            let mut text = String::new();
            rest = quoted;
            loop {
                let (part, tail) = rest.split_once('"').ok_or_else(|| error("a closing quote is missing"))?;
                text.push_str(part);
                let Some(again) = tail.strip_prefix('"') else {
                    rest = tail;
                    break;
                };
                text.push('"');
                rest = again;
            }
            if !rest.is_empty() && !rest.starts_with(',') {
                return Err(error("text follows a closing quote"));
            }
            field = text;
        } else {
            let end = rest.find(',').unwrap_or(rest.len());
            if rest[..end].contains('"') {
                return Err(error("a quote stands inside an unquoted field"));
            }
            field = rest[..end].to_owned();
            rest = &rest[end..];
        }
        fields.push(field);
        match rest.strip_prefix(',') {
            Some(tail) => rest = tail,
            None => return Ok(fields),
        }
    }
}

#[cfg(test)]
mod tests;
