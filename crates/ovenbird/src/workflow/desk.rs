//! What plugins reach on the machine of the user: files that their arguments name, and the user's own programs.
//!
//! A build elsewhere has its plugins there, and this stays here: the worker asks ([`Caller`]), and the caller ([`Own`]) does what one of its own
//! plugins may do, by the arguments that it knows itself. Secrets go to the user's programs here, and to no other machine for them.

use std::io::{Read, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::inside::read_entry;
use super::{Flow, MAIN, Scene, replaced, veto};
use crate::builder::Job;
use crate::error::{Error, Kind};
use crate::request::{BuildRequest, Phase};
use crate::settings::Environment;
use crate::source::SourceTree;

/// The plugin whose `dest` is a folder.
const EXPORT: &str = "export-files";
/// Largest file that is read.
const MOST_READ: u64 = 64 << 20;

/// One plugin of a request: a phase, and its place there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct At {
    pub(crate) phase: Phase,
    pub(crate) place: usize,
}

/// A file that a plugin writes: that of its argument `dest`, or one in that folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Target {
    pub(crate) dest: PathBuf,
    pub(crate) inside: Option<PathBuf>,
    /// Permissions; `None`: those of any new file.
    pub(crate) mode: Option<u32>,
}

/// The other end, for plugins of a build in a worker. What it says no to, it gives a reason for.
pub(crate) trait Caller: Send + Sync {
    /// The content of a file.
    fn read(&self, plugin: At, path: &Path) -> Result<Vec<u8>, String>;
    /// Writes a file.
    fn write(&self, plugin: At, target: &Target, content: &mut dyn Read) -> Result<(), String>;
    /// The answer of a program to a question.
    fn run(&self, plugin: At, question: &Value) -> Result<Value, String>;
    /// Is there no such program, and need there be none?
    fn is_absent(&self, plugin: At) -> bool;
}

/// Where the user's files and programs are: here, or at the other end.
#[derive(Clone, Default)]
pub struct Desk(Option<Arc<dyn Caller>>);

impl Desk {
    /// At the other end.
    pub(crate) fn of(caller: Arc<dyn Caller>) -> Self {
        Self(Some(caller))
    }

    pub(super) fn caller(&self) -> Option<&Arc<dyn Caller>> {
        self.0.as_ref()
    }
}

impl std::fmt::Debug for Desk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_none() { "Here" } else { "Elsewhere" })
    }
}

impl Scene<'_> {
    /// The content of a file that an argument names.
    pub(crate) fn read_file(&self, path: &Path) -> Result<Vec<u8>, Error> {
        match self.bench.desk.caller() {
            None => read(&self.bench.environment.absolute(path)),
            Some(caller) => caller.read(self.at, path).map_err(|why| veto(format!("cannot read {}: {why}", path.display()))),
        }
    }

    /// Writes a file that an argument names. Says where it is.
    pub(crate) fn write_file(&self, target: &Target, content: &mut dyn Read) -> Result<PathBuf, Error> {
        match self.bench.desk.caller() {
            None => write(&self.bench.environment, target, content, false),
            Some(caller) => {
                let cannot = |why| Error::new(Kind::Configuration, format!("cannot write {}: {why}", target.dest.display()));
                caller.write(self.at, target, content).map_err(cannot)?;
                Ok(target.dest.clone())
            }
        }
    }

    /// Writes a document into the file of the argument `dest`.
    pub(crate) fn write_text(&self, dest: &Path, text: &str) -> Result<PathBuf, Error> {
        self.write_file(&Target { dest: dest.to_owned(), inside: None, mode: None }, &mut text.as_bytes())
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let failed = |error: std::io::Error| Error::from_chain(Kind::Veto, &error).while_doing(format!("cannot read {}", path.display()));
    let mut file = std::fs::File::open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(veto(format!("{} is no regular file", path.display())));
    }
    read_entry(&mut file, MOST_READ).map_err(failed)
}

/// Writes a file, or (`more`) goes on with one.
fn write(environment: &Environment, target: &Target, content: &mut dyn Read, more: bool) -> Result<PathBuf, Error> {
    let dest = environment.absolute(&target.dest);
    let mut put = || -> std::io::Result<()> {
        let mut file = match &target.inside {
            None => std::fs::OpenOptions::new().write(true).create(true).truncate(!more).append(more).open(&dest)?,
            Some(inside) => {
                let to = beneath(&dest, inside)?;
                if more {
                    std::fs::OpenOptions::new().append(true).open(&to)?
                } else {
                    // Not through what stands there: it could be a link of somebody else.
                    let _ = std::fs::remove_file(&to);
                    std::fs::File::create_new(&to)?
                }
            }
        };
        std::io::copy(content, &mut file)?;
        file.flush()?;
        target.mode.map_or(Ok(()), |mode| file.set_permissions(std::fs::Permissions::from_mode(mode & 0o777)))
    };
    put().map_err(|e| Error::from_chain(Kind::Configuration, &e).while_doing(format!("cannot write {}", dest.display())))?;
    Ok(dest)
}

/// A path in a folder, with the folders on the way to it, none of which is a link.
fn beneath(dest: &Path, path: &Path) -> std::io::Result<PathBuf> {
    std::fs::create_dir_all(dest)?;
    let mut at = dest.to_owned();
    let names: Vec<_> = path.components().filter(|c| matches!(c, Component::Normal(_))).collect();
    if names.is_empty() {
        return Err(std::io::Error::other("it is no name of a file"));
    }
    for (number, name) in names.iter().enumerate() {
        at.push(name);
        if number + 1 < names.len() {
            match std::fs::symlink_metadata(&at) {
                Ok(meta) if meta.is_dir() => {}
                Ok(_) => return Err(std::io::Error::other(format!("{} is in the way: it is no folder", at.display()))),
                Err(_) => std::fs::create_dir(&at)?,
            }
        }
    }
    Ok(at)
}

/// The caller's side: does what the plugins of its own request may do.
pub(crate) struct Own<'a> {
    pub(crate) flow: &'a Flow<'a>,
    pub(crate) tree: &'a SourceTree,
    pub(crate) job: &'a Job,
}

impl Own<'_> {
    /// The name of a plugin that came along, and its arguments. The user's programs reach files by themselves.
    fn built_in(&self, plugin: At) -> Result<(&str, &Map<String, Value>), String> {
        let (prepared, entry) = self.flow.prepared(plugin).zip(self.flow.entry(plugin)).ok_or("the request has no such plugin")?;
        if prepared.program.is_none() { Ok((&entry.name, &prepared.args)) } else { Err("the plugin runs here".into()) }
    }

    /// A file that `inject-files` names.
    pub(crate) fn read(&self, plugin: At, path: &Path) -> Result<Vec<u8>, String> {
        let files = self.built_in(plugin)?.1.get("files").and_then(Value::as_array).into_iter().flatten();
        let mut sources = files.filter_map(|file| file.get("source")?.as_str());
        if !sources.any(|source| Path::new(source) == path) {
            return Err("no argument of the plugin names it".into());
        }
        read(&self.flow.bench.environment.absolute(path)).map_err(|error| error.to_string())
    }

    /// A piece of a file that an argument `dest` names.
    pub(crate) fn write(&self, plugin: At, target: &Target, piece: &[u8], more: bool) -> Result<(), String> {
        let (name, args) = self.built_in(plugin)?;
        let dest = args.get("dest").and_then(Value::as_str).map(Path::new).ok_or("the plugin writes no file")?;
        if target.inside.is_some() != (name == EXPORT) {
            return Err("the plugin does not write such a file".into());
        }
        // `linux_amd64-NAME` beside it, where there are several platforms.
        let beside = || {
            let name = |path: &Path| path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let platform = name(&target.dest).strip_suffix(&format!("-{}", name(dest))).map(str::to_owned);
            let is_platform = platform.is_some_and(|platform| platform.replace('_', "/").parse::<ovenbird_oci::Platform>().is_ok());
            target.dest.parent() == dest.parent() && is_platform && target.inside.is_none()
        };
        if target.dest != dest && !beside() {
            return Err("no argument of the plugin names it".into());
        }
        write(&self.flow.bench.environment, target, &mut &*piece, more).map(drop).map_err(|error| error.to_string())
    }

    /// Runs a program of the user's. The question is the worker's; arguments, secrets and paths are added here.
    pub(crate) fn run(&self, plugin: At, question: Value) -> Result<Value, Error> {
        let no = || Error::new(Kind::Driver, "the worker asks for a program that the request does not name");
        let (prepared, entry) = self.flow.prepared(plugin).zip(self.flow.entry(plugin)).ok_or_else(no)?;
        let program = prepared.program.as_ref().ok_or_else(no)?;
        let Value::Object(mut question) = question else { return Err(no()) };
        let known = question.remove("reserved").unwrap_or_default();
        let context = self.tree.contexts.get(MAIN).map(|context| context.dir.clone());
        let of = |name: &str| -> Result<String, Error> {
            let found = match name {
                "BUILT_IMAGE_ID" | "BASE_IMAGE" => known.get(name).and_then(Value::as_str).map(str::to_owned),
                "BUILD_DOCKERFILE_PATH" => context
                    .as_ref()
                    .map(|dir| dir.join(&self.tree.dockerfile_name))
                    .filter(|path| path.is_file())
                    .map(|path| path.display().to_string()),
                _ => context.as_ref().map(|dir| dir.display().to_string()),
            };
            found.ok_or_else(|| veto(format!("{name} among its arguments stands for nothing in {}", plugin.phase)))
        };
        question.insert("args".into(), replaced(Value::Object(prepared.args.clone()), &of)?);
        question.insert("secrets".into(), super::external::secrets(&self.flow.granted(entry)));
        if let Some(build) = question.get_mut("build").and_then(Value::as_object_mut) {
            build.insert("context".into(), context.as_ref().map(|dir| dir.display().to_string()).into());
        }
        let cancel = (plugin.phase != Phase::Exit).then_some(&self.job.cancel);
        let time = Duration::from_secs(entry.timeout.unwrap_or(super::DEFAULT_TIMEOUT));
        let mut say = |line: String| self.flow.say(plugin.phase, &entry.name, &line, self.job);
        program.ask(&Value::Object(question), time, cancel, &mut say)
    }
}

/// What an answer of a program changes of what the request names: for the registries that a worker may ask about.
pub(crate) fn as_changed(request: &BuildRequest, tree: &SourceTree, answer: &Value) -> Option<(BuildRequest, SourceTree)> {
    let changes = answer.get("changes")?;
    let names = changes.get("names").and_then(Value::as_array);
    let dockerfile = changes.get("dockerfile").and_then(Value::as_str);
    if names.is_none() && dockerfile.is_none() {
        return None;
    }
    let mut request = request.clone();
    request.names.extend(names.into_iter().flatten().filter_map(|name| name.as_str().map(str::to_owned)));
    Some((request, tree.with_dockerfile(dockerfile.unwrap_or(&tree.dockerfile))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_where_they_were_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let environment = Environment::fixed([].into(), dir.path(), None);
        let target = |inside: Option<&str>, mode| Target { dest: "out".into(), inside: inside.map(Into::into), mode };
        for (inside, expect) in [(Some("a/b"), "out/a/b"), (Some("../x"), "out/x"), (Some("/etc/x"), "out/etc/x")] {
            write(&environment, &target(inside, Some(0o4600)), &mut &b"one"[..], false).unwrap();
            write(&environment, &target(inside, None), &mut &b"two"[..], true).unwrap();
            let path = dir.path().join(expect);
            assert_eq!(std::fs::read(&path).unwrap(), b"onetwo", "{inside:?}");
            assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, 0o600);
        }
        assert!(write(&environment, &target(Some(".."), None), &mut &b""[..], false).is_err());
        std::os::unix::fs::symlink("/tmp", dir.path().join("out/link")).unwrap();
        let error = write(&environment, &target(Some("link/x"), None), &mut &b""[..], false).unwrap_err();
        assert!(error.to_string().contains("in the way"), "{error}");
        std::os::unix::fs::symlink("/nowhere/else", dir.path().join("out/file")).unwrap();
        write(&environment, &target(Some("file"), None), &mut &b"own"[..], false).unwrap();
        assert_eq!(std::fs::read(dir.path().join("out/file")).unwrap(), b"own");
    }
}
