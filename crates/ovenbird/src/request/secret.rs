//! `--secret` and `--ssh`: where private things are found, never what they are.

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{ParseValueError, bad};

/// Where a secret's bytes are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SecretOrigin {
    /// A file.
    File(PathBuf),
    /// An environment variable of the caller.
    Env(String),
    /// Not said: the variable named like the id when it is set, else the file named like the id.
    ById,
}

/// `--secret id=…[,src=…|,env=…][,type=file|env]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretSpec {
    /// Name that `RUN --mount=type=secret,id=…` uses.
    pub id: String,
    /// Where.
    pub origin: SecretOrigin,
}

impl FromStr for SecretSpec {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let example = "for example id=token,src=token.txt or id=token,env=TOKEN";
        let (mut id, mut kind, mut src, mut env) = (None, None, None, None);
        for (key, value) in fields(text)? {
            let slot = match key.to_ascii_lowercase().as_str() {
                "id" => &mut id,
                "type" => &mut kind,
                "src" | "source" => &mut src,
                "env" => &mut env,
                _ => return Err(bad(format!("unknown secret field {key:?}: expected id, src, env or type, {example}"))),
            };
            *slot = Some(value);
        }
        let id = id.filter(|id| !id.is_empty()).ok_or_else(|| bad(format!("a secret needs an id, {example}")))?;
        let origin = match (kind.as_deref(), src, env) {
            (_, Some(_), Some(_)) => return Err(bad(format!("secret {id:?} has both src and env: give one of them"))),
            (None | Some("file"), Some(src), None) => SecretOrigin::File(src.into()),
            // `type=env,src=NAME` is how buildx documents it.
            (Some("env"), Some(name), None) | (None | Some("env"), None, Some(name)) => SecretOrigin::Env(name),
            (Some("file"), None, Some(_)) => return Err(bad(format!("secret {id:?} has type=file and env: use type=env"))),
            (Some("file"), None, None) => SecretOrigin::File(id.clone().into()),
            (Some("env"), None, None) => SecretOrigin::Env(id.clone()),
            (None, None, None) => SecretOrigin::ById,
            (Some(other), _, _) => return Err(bad(format!("unknown secret type {other:?}: expected file or env, {example}"))),
        };
        Ok(Self { id, origin })
    }
}

impl SecretSpec {
    /// Is it a pipe, which can be read once only?
    pub(crate) fn is_pipe(&self) -> bool {
        use std::os::unix::fs::FileTypeExt as _;
        let path = match &self.origin {
            SecretOrigin::File(path) => path.clone(),
            SecretOrigin::ById => PathBuf::from(&self.id),
            SecretOrigin::Env(_) => return false,
        };
        path.metadata().is_ok_and(|meta| meta.file_type().is_fifo())
    }
}

/// `--ssh default|ID[=SOCKET]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SshSpec {
    /// Name that `RUN --mount=type=ssh,id=…` uses.
    pub id: String,
    /// Socket of the agent; the caller's own agent (`SSH_AUTH_SOCK`) if absent.
    #[serde(default)]
    pub socket: Option<PathBuf>,
}

impl FromStr for SshSpec {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (id, socket) = match text.split_once('=') {
            Some((id, socket)) => (id, Some(socket)),
            None => (text, None),
        };
        if id.is_empty() || socket == Some("") {
            return Err(bad(format!("{text:?} is not an ssh agent: expected default, ID or ID=SOCKET")));
        }
        if socket.is_some_and(|s| s.contains(',')) {
            return Err(bad(format!("{text:?}: one socket an id; key files are not supported, add them to an agent with ssh-add")));
        }
        Ok(Self { id: id.into(), socket: socket.map(Into::into) })
    }
}

/// Splits `k=v,k=v`; a field may be quoted as in CSV (`"dest=a,b"`), as Docker reads it.
pub(crate) fn fields(text: &str) -> Result<Vec<(String, String)>, ParseValueError> {
    let mut rows = vec![];
    let mut rest = text;
    while !rest.is_empty() {
        let field;
        if let Some(quoted) = rest.strip_prefix('"') {
            let mut value = String::new();
            let mut chars = quoted.char_indices().peekable();
            let end = loop {
                match chars.next() {
                    Some((_, '"')) if chars.peek().is_some_and(|(_, c)| *c == '"') => {
                        chars.next();
                        value.push('"');
                    }
                    Some((at, '"')) => break at + 1,
                    Some((_, c)) => value.push(c),
                    None => return Err(bad(format!("{text:?}: a quote is not closed"))),
                }
            };
            rest = &quoted[end..];
            if !rest.is_empty() && !rest.starts_with(',') {
                return Err(bad(format!("{text:?}: expected a comma after the closing quote")));
            }
            rest = rest.strip_prefix(',').unwrap_or(rest);
            field = value;
        } else {
            let (head, tail) = rest.split_once(',').unwrap_or((rest, ""));
            field = head.to_owned();
            rest = tail;
        }
        let (key, value) = field.split_once('=').unwrap_or((&field, ""));
        if key.trim().is_empty() {
            return Err(bad(format!("{text:?}: a field has no name: expected KEY=VALUE pairs with commas between")));
        }
        rows.push((key.trim().to_owned(), value.to_owned()));
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets() {
        for (text, expect) in [
            ("id=a,src=b", "File(\"b\")"),
            ("id=a,source=b", "File(\"b\")"),
            ("id=a,env=B", "Env(\"B\")"),
            ("id=a,type=env", "Env(\"a\")"),
            ("type=env,id=a,src=B", "Env(\"B\")"),
            ("type=file,id=a", "File(\"a\")"),
            ("id=a", "ById"),
            ("\"id=a\",\"src=x,y\"", "File(\"x,y\")"),
            ("src=b", "! a secret needs an id"),
            ("id=a,src=b,env=C", "! secret \"a\" has both"),
            ("id=a,type=vault", "! unknown secret type"),
            ("id=a,scr=b", "! unknown secret field \"scr\""),
            ("\"id=a", "! "),
            ("=,", "! "),
        ] {
            let got = text.parse::<SecretSpec>().map_or_else(|e| format!("! {e}"), |s| format!("{:?}", s.origin));
            assert!(got.contains(expect), "{text:?}: {got}");
        }
    }

    #[test]
    fn ssh() {
        for (text, expect) in [
            ("default", "id: \"default\", socket: None"),
            ("git=/run/agent", "socket: Some(\"/run/agent\")"),
            ("=x", "! "),
            ("a=", "! "),
            ("a=k1,k2", "! \"a=k1,k2\": one socket"),
        ] {
            let got = text.parse::<SshSpec>().map_or_else(|e| format!("! {e}"), |s| format!("{s:?}"));
            assert!(got.contains(expect), "{text:?}: {got}");
        }
    }
}
