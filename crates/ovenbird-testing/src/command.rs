//! The command under test: which binary, as which user, with which environment.

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::users::{Ids, User};
use crate::{AtPath, Error, Result, cache};

/// A copy of the binary that no test has asked for in this time is removed.
const STALE: Duration = Duration::from_hours(72);

/// Path of the `ovenbird` binary: `$OVENBIRD_BIN`, else the one beside the running test, else the repository's debug build.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("OVENBIRD_BIN") {
        return Ok(path.into());
    }
    // target/debug/deps/cases-0123 or target/debug/xtask.
    let own = std::env::current_exe().ok();
    let beside = own.iter().flat_map(|path| path.ancestors().skip(1).take(2)).map(|dir| dir.join("ovenbird"));
    let found = beside.chain([crate::repository().join("target/debug/ovenbird")]).find(|path| path.is_file());
    found.ok_or_else(|| Error::Missing("the ovenbird binary is not built: run `cargo build` first, or set OVENBIRD_BIN".into()))
}

/// The binary at a path that every user may read and execute: build folders are often below a private home. Each build of each worktree has
/// a copy of its own, so that test runs do not disturb each other.
pub fn shared_binary() -> Result<PathBuf> {
    share(&binary()?, &std::env::temp_dir().join(format!("ovenbird-tests-{}", rustix::process::geteuid().as_raw())))
}

fn share(source: &Path, dir: &Path) -> Result<PathBuf> {
    let meta = fs::metadata(source).at("cannot look at", source)?;
    let changed = meta.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok()).map_or(0, |d| d.as_nanos());
    let copy = dir.join(format!("ovenbird-{}-{}-{changed}-{}", meta.dev(), meta.ino(), meta.len()));
    let _lock = cache::lock("binary")?;
    if !copy.is_file() {
        fs::create_dir_all(dir).at("cannot make", dir)?;
        let half = dir.join("half");
        fs::copy(source, &half).at("cannot write", &half)?;
        set_mode(&half, 0o755)?;
        set_mode(dir, 0o755)?;
        fs::rename(&half, &copy).at("cannot name", &copy)?;
    }
    // When it was asked for last.
    File::open(&copy).and_then(|file| file.set_modified(SystemTime::now())).at("cannot date", &copy)?;
    for other in fs::read_dir(dir).at("cannot list", dir)?.flatten() {
        let age = other.metadata().and_then(|meta| meta.modified()).ok().and_then(|time| time.elapsed().ok());
        if age.is_some_and(|age| age > STALE) {
            let _ = fs::remove_file(other.path());
        }
    }
    Ok(copy)
}

/// `ovenbird` with this process's environment.
pub fn ovenbird() -> Result<Command> {
    Ok(Command::new(binary()?))
}

/// Whom the command runs as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Level {
    /// The user of the tests.
    #[default]
    Own,
    /// The user with subordinate ids.
    Rootless,
    /// The user without.
    SingleId,
    /// The same user, who has given up every right.
    Traced,
    /// The user of the tests, whose builds run in worker processes.
    Worker,
    /// No command of ours: a Docker Engine (`$DOCKER_HOST`) builds, as an oracle for the expectations.
    Docker,
    /// The command, over that Docker Engine.
    DockerBuilder,
}

impl Level {
    /// From `root`, `rootless`, `single-id`, `traced`, `worker`, `docker` or `docker-builder`.
    pub fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "root" | "own" => Self::Own,
            "rootless" => Self::Rootless,
            "single-id" => Self::SingleId,
            "traced" => Self::Traced,
            "worker" => Self::Worker,
            "docker" => Self::Docker,
            "docker-builder" => Self::DockerBuilder,
            _ => return None,
        })
    }

    /// Ids to become; `None` to stay.
    pub fn ids(self) -> Result<Option<Ids>> {
        match self {
            Self::Own | Self::Worker | Self::Docker | Self::DockerBuilder => Ok(None),
            Self::Rootless => User::SubId.ensure().map(Some),
            Self::SingleId | Self::Traced => User::Plain.ensure().map(Some),
        }
    }
}

/// A folder of one test that the level's user owns: `home/`, and whatever the test puts there.
#[derive(Debug)]
pub struct Workspace {
    dir: tempfile::TempDir,
    ids: Option<Ids>,
    binary: PathBuf,
    on: Option<&'static str>,
    bare: bool,
}

impl Workspace {
    /// Makes one.
    pub fn new(level: Level) -> Result<Self> {
        let ids = level.ids()?;
        let dir = tempfile::Builder::new().prefix("ovenbird-test-").tempdir().at("cannot make a folder in", &std::env::temp_dir())?;
        set_mode(dir.path(), 0o755)?;
        let home = dir.path().join("home");
        fs::create_dir(&home).at("cannot make", &home)?;
        let binary = match level {
            Level::Own | Level::Worker | Level::DockerBuilder => binary()?,
            Level::Docker => crate::dockerd::client(),
            Level::Rootless | Level::SingleId | Level::Traced => shared_binary()?,
        };
        let this = Self { dir, ids, binary, on: (level == Level::Worker).then_some("process"), bare: level == Level::Traced };
        this.give(this.path())?;
        this.give(&home)?;
        Ok(this)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Hands a file or folder (not what is below it) to the user.
    pub fn give(&self, path: &Path) -> Result<()> {
        match self.ids {
            None => Ok(()),
            Some(ids) => {
                let meta = path.symlink_metadata().at("cannot look at", path)?;
                std::os::unix::fs::lchown(path, Some(ids.uid), Some(ids.gid)).at("cannot hand over", path)?;
                // A change of owner takes setuid and setgid bits away.
                if meta.is_symlink() { Ok(()) } else { set_mode(path, meta.mode() & 0o7777) }
            }
        }
    }

    /// Hands a whole tree to the user.
    pub fn give_tree(&self, path: &Path) -> Result<()> {
        self.give(path)?;
        if path.symlink_metadata().is_ok_and(|meta| meta.is_dir()) {
            for child in fs::read_dir(path).at("cannot list", path)? {
                self.give_tree(&child.at("cannot list", path)?.path())?;
            }
        }
        Ok(())
    }

    /// `program` as the user, with a small fixed environment.
    pub fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(if self.bare { Path::new("setpriv") } else { program });
        if self.bare {
            command.args(["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]);
            if let Some(ids) = self.ids {
                command.args([format!("--reuid={}", ids.uid), format!("--regid={}", ids.gid)]).arg("--clear-groups");
            }
            command.arg(program);
        }
        command
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", self.path().join("home"))
            .env("LC_ALL", "C.UTF-8")
            .current_dir(self.path());
        command.envs(self.on.map(|on| ("OVENBIRD_ON", on)));
        if self.bare {
            command.env("OVENBIRD_ISOLATION_LEVEL", "traced");
        } else if let Some(ids) = self.ids {
            command.gid(ids.gid).uid(ids.uid);
        }
        command
    }

    /// `ovenbird` as the user.
    pub fn ovenbird(&self) -> Command {
        self.command(&self.binary)
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        // Folders without write permission stop an ordinary user's removal.
        if !rustix::process::geteuid().is_root() {
            let _ = Command::new("chmod").args(["-R", "u+rwX"]).arg(self.path()).output();
        }
    }
}

/// Runs a command to its end, or kills it after `limit`. Exit code (none: a signal, or killed) and both streams in one text.
pub fn finish(command: &mut Command, stdin: Option<&str>, limit: Duration) -> Result<(Option<i32>, String)> {
    let program = command.get_program().to_string_lossy().into_owned();
    let start = |source| Error::Start { program: program.clone(), source };
    let mut log = tempfile::tempfile().map_err(start)?;
    let (out, err) = (log.try_clone().map_err(start)?, log.try_clone().map_err(start)?);
    let input = if stdin.is_some() { Stdio::piped() } else { Stdio::null() };
    let mut child = command.stdin(input).stdout(out).stderr(err).spawn().map_err(start)?;
    if let (Some(text), Some(mut pipe)) = (stdin, child.stdin.take()) {
        // A command that does not read its input to the end is no error here.
        let _ = pipe.write_all(text.as_bytes());
    }
    let end = Instant::now() + limit;
    let status = loop {
        match child.try_wait().map_err(start)? {
            Some(status) => break Some(status),
            None if Instant::now() > end => {
                let _ = child.kill();
                let _ = child.wait();
                break None;
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    let mut bytes = Vec::new();
    log.rewind().and_then(|()| log.read_to_end(&mut bytes)).map_err(start)?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    Ok(match status {
        Some(status) => (status.code(), text),
        None => (None, format!("{text}\nkilled after {} s", limit.as_secs())),
    })
}

/// Gives a file these permissions.
pub fn set_mode(path: &Path, mode: u32) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).at("cannot change the mode of", path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_of_other_builds_stay_while_they_are_in_use() {
        let place = tempfile::tempdir().unwrap();
        let (one, other, dir) = (place.path().join("one"), place.path().join("other"), place.path().join("shared"));
        fs::write(&one, "1").unwrap();
        fs::write(&other, "2").unwrap();
        let first = share(&one, &dir).unwrap();
        let second = share(&other, &dir).unwrap();
        assert_eq!((fs::read_to_string(&first).unwrap(), fs::read_to_string(&second).unwrap()), ("1".into(), "2".into()));
        assert_eq!(share(&one, &dir).unwrap(), first);
        File::open(&second).unwrap().set_modified(SystemTime::now() - 2 * STALE).unwrap();
        share(&one, &dir).unwrap();
        assert!(first.exists() && !second.exists(), "what nobody asks for goes");
    }
}
