//! User namespaces: which ids are mapped, and entering one.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::failure::Context;
use crate::syscall::{self, check};
use crate::{Level, SandboxError, prepare};

/// (first id inside, first id outside, count).
type Extent = (u32, u32, u32);

/// How the ids of the rootless level are mapped.
#[derive(Debug)]
pub(crate) enum Mapping {
    /// Root of a container: every id that the container has.
    Identity { uids: Vec<Extent>, gids: Vec<Extent> },
    /// An ordinary user, by `newuidmap` and `newgidmap`.
    Subordinate { uids: Vec<Extent>, gids: Vec<Extent>, newuidmap: PathBuf, newgidmap: PathBuf },
}

fn ids() -> (u32, u32) {
    // SAFETY: never fail.
    unsafe { (libc::geteuid(), libc::getegid()) }
}

/// The mapping that this user may have, or what is missing, one sentence each.
pub(crate) fn mapping() -> Result<Mapping, Vec<String>> {
    let (uid, gid) = ids();
    if uid == 0 && crate::caps::has(crate::caps::SETUID) {
        return match (current("/proc/self/uid_map"), current("/proc/self/gid_map")) {
            (Some(uids), Some(gids)) => Ok(Mapping::Identity { uids, gids }),
            _ => Err(vec!["/proc/self/uid_map cannot be read: mount /proc.".to_owned()]),
        };
    }
    let mut missing = Vec::new();
    let mut program = |name: &str| {
        let found = find(name);
        if found.is_none() {
            missing.push(format!("{name} is not installed: install the package uidmap (Debian, Ubuntu) or shadow-utils (Fedora)."));
        }
        found
    };
    let (newuidmap, newgidmap) = (program("newuidmap"), program("newgidmap"));
    let name = user_name(uid);
    let who = name.clone().unwrap_or_else(|| uid.to_string());
    let mut ranges = |file: &str, option: &str| {
        let found = subordinate(&fs::read_to_string(file).unwrap_or_default(), name.as_deref(), uid);
        if found.is_empty() {
            missing.push(format!("{file} has no range for user {who}: as root, run `usermod --add-sub{option}s 100000-165535 {who}`."));
        }
        found
    };
    let (uids, gids) = (ranges("/etc/subuid", "uid"), ranges("/etc/subgid", "gid"));
    match (newuidmap, newgidmap) {
        (Some(newuidmap), Some(newgidmap)) if missing.is_empty() => {
            Ok(Mapping::Subordinate { uids: extents(uid, &uids), gids: extents(gid, &gids), newuidmap, newgidmap })
        }
        _ => Err(missing),
    }
}

/// Where distributions put setuid programs.
const PROGRAM_FOLDERS: [&str; 6] = ["/usr/bin", "/usr/local/bin", "/bin", "/usr/sbin", "/sbin", "/run/wrappers/bin"];

fn find(name: &str) -> Option<PathBuf> {
    PROGRAM_FOLDERS.iter().map(|folder| Path::new(folder).join(name)).find(|file| file.is_file())
}

fn user_name(uid: u32) -> Option<String> {
    let text = fs::read_to_string("/etc/passwd").ok()?;
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
    })
}

/// The identity map over the ids that this namespace has.
fn current(file: &str) -> Option<Vec<Extent>> {
    let text = fs::read_to_string(file).ok()?;
    let extents: Vec<Extent> = text
        .lines()
        .filter_map(|line| {
            let mut numbers = line.split_whitespace().map(str::parse::<u32>);
            let (inside, _, count) = (numbers.next()?.ok()?, numbers.next()?.ok()?, numbers.next()?.ok()?);
            Some((inside, inside, count))
        })
        .collect();
    (!extents.is_empty()).then_some(extents)
}

/// Ranges of `subuid(5)` for a user by name or number.
fn subordinate(text: &str, name: Option<&str>, uid: u32) -> Vec<(u32, u32)> {
    let number = uid.to_string();
    text.lines()
        .filter_map(|line| {
            let mut fields = line.trim().split(':');
            let who = fields.next()?;
            let (start, count) = (fields.next()?.parse::<u32>().ok()?, fields.next()?.parse::<u32>().ok()?);
            let fits = start.checked_add(count).is_some() && count > 0;
            (fits && (Some(who) == name || who == number)).then_some((start, count))
        })
        .collect()
}

/// 0 is the user itself, the ranges follow from 1 on.
fn extents(own: u32, ranges: &[(u32, u32)]) -> Vec<Extent> {
    let mut out = vec![(0, own, 1)];
    let mut next = 1u32;
    for (start, count) in ranges {
        let Some(after) = next.checked_add(*count) else { break };
        out.push((next, *start, *count));
        next = after;
    }
    out
}

/// Enters the level's user and mount namespace. This process must have one thread.
pub(crate) fn enter(level: Level) -> Result<(), SandboxError> {
    let (uid, gid) = ids();
    let flags = libc::CLONE_NEWUSER | libc::CLONE_NEWNS;
    if level == Level::Rootless {
        let mapping = mapping().map_err(|missing| SandboxError::Impossible { reason: missing.join(" ") })?;
        let mapper = Mapper::fork(&mapping).context(|| "starting the id mapper".to_owned())?;
        syscall::unshare(flags).context(|| "unshare(user namespace)".to_owned())?;
        readable();
        mapper.map()?;
        // Groups of the machine's user mean nothing inside.
        // SAFETY: an empty list.
        check(unsafe { libc::setgroups(0, std::ptr::null()) }.into()).context(|| "setgroups".to_owned())?;
    } else {
        syscall::unshare(flags).context(|| "unshare(user namespace)".to_owned())?;
        readable();
        fs::write("/proc/self/setgroups", "deny").context(|| "writing /proc/self/setgroups".to_owned())?;
        fs::write("/proc/self/uid_map", format!("0 {uid} 1\n")).context(|| "writing /proc/self/uid_map".to_owned())?;
        fs::write("/proc/self/gid_map", format!("0 {gid} 1\n")).context(|| "writing /proc/self/gid_map".to_owned())?;
    }
    // SAFETY: numbers only; 0 is mapped now.
    unsafe {
        check(libc::setresgid(0, 0, 0).into()).context(|| "setresgid(0)".to_owned())?;
        check(libc::setresuid(0, 0, 0).into()).context(|| "setresuid(0)".to_owned())?;
    }
    prepare::make_private().context(|| "making the mounts private".to_owned())
}

/// A new user namespace hides `/proc/self` from its own process otherwise.
fn readable() {
    // SAFETY: no pointers.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0) };
}

/// A child that stays outside and writes the maps from there.
struct Mapper {
    pid: i32,
    go: fs::File,
    answer: fs::File,
}

impl Mapper {
    fn fork(mapping: &Mapping) -> io::Result<Mapper> {
        let (go_read, go_write) = syscall::pipe()?;
        let (answer_read, answer_write) = syscall::pipe()?;
        let parent = std::process::id();
        // SAFETY: one thread, so the child is an ordinary process.
        let pid = check(unsafe { libc::fork() }.into())? as i32;
        if pid == 0 {
            drop((go_write, answer_read));
            let message = Mapper::child(go_read, parent, mapping).err().map(|error| error.to_string()).unwrap_or_default();
            let _ = fs::File::from(answer_write).write_all(message.as_bytes());
            // SAFETY: ends this copy at once.
            unsafe { libc::_exit(0) };
        }
        Ok(Mapper { pid, go: go_write.into(), answer: answer_read.into() })
    }

    fn child(go: OwnedFd, parent: u32, mapping: &Mapping) -> io::Result<()> {
        let mut byte = [0];
        if fs::File::from(go).read(&mut byte)? == 0 {
            return Ok(()); // the parent gave up
        }
        match mapping {
            Mapping::Identity { uids, gids } => {
                fs::write(format!("/proc/{parent}/uid_map"), text(uids))?;
                fs::write(format!("/proc/{parent}/gid_map"), text(gids))
            }
            Mapping::Subordinate { uids, gids, newuidmap, newgidmap } => {
                tool(newuidmap, parent, uids)?;
                tool(newgidmap, parent, gids)
            }
        }
    }

    fn map(mut self) -> Result<(), SandboxError> {
        let what = || "mapping the ids".to_owned();
        self.go.write_all(&[1]).context(what)?;
        let mut message = String::new();
        self.answer.read_to_string(&mut message).context(what)?;
        crate::reap::wait4(self.pid).context(what)?;
        if message.is_empty() { Ok(()) } else { Err(SandboxError::Impossible { reason: message }) }
    }
}

fn text(extents: &[Extent]) -> String {
    extents.iter().fold(String::new(), |mut text, (inside, outside, count)| {
        let _ = writeln!(text, "{inside} {outside} {count}");
        text
    })
}

fn tool(program: &Path, pid: u32, extents: &[Extent]) -> io::Result<()> {
    let mut command = Command::new(program);
    command.arg(pid.to_string());
    for (inside, outside, count) in extents {
        command.args([inside.to_string(), outside.to_string(), count.to_string()]);
    }
    let output = command.output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!(
        "{} failed: {}; it must be setuid root (or have file capabilities), and the ranges in /etc/subuid and /etc/subgid must be this user's",
        program.display(),
        said.trim()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subordinate_ranges() {
        let text = "# comment\nann:100000:65536\nbob:200000:10\n1001:300000:5\nann:400000:2\nann:x:1\nann:4294967295:2\nann:5:0\n";
        for (name, uid, want) in [
            (Some("ann"), 1000, vec![(0, 1000, 1), (1, 100_000, 65536), (65537, 400_000, 2)]),
            (Some("bob"), 1001, vec![(0, 1001, 1), (1, 200_000, 10), (11, 300_000, 5)]),
            (None, 1001, vec![(0, 1001, 1), (1, 300_000, 5)]),
            (Some("eve"), 7, vec![(0, 7, 1)]),
        ] {
            assert_eq!(extents(uid, &subordinate(text, name, uid)), want, "{name:?} {uid}");
        }
    }
}
