//! Memory and CPU limits by control groups, version 2 or 1.
//!
//! A step's group is `ovenbird-<engine pid>-<n>` beside (v2) or below (v1) the engine's own. Groups of engines that died
//! are removed when the next one is made.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::failure::Context;
use crate::{Level, Limits, SandboxError};

const PREFIX: &str = "ovenbird-";
/// Microseconds; the kernel's default period.
const CPU_PERIOD: u64 = 100_000;
/// The smallest quota that the kernel takes.
const CPU_QUOTA_MIN: u64 = 1_000;
/// The kernel empties a group a moment after its last process.
const REMOVE_TRIES: u32 = 50;
const REMOVE_PAUSE: Duration = Duration::from_millis(2);

/// The groups of one step; removed on drop.
#[derive(Default)]
pub(crate) struct Cgroup {
    groups: Vec<Group>,
}

struct Group {
    path: PathBuf,
    version: Version,
    memory: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Version {
    V1,
    V2,
}

impl Cgroup {
    /// Makes the groups that the limits need; without limits there is none.
    pub(crate) fn new(level: Level, limits: &Limits) -> Result<Cgroup, SandboxError> {
        let mut cgroup = Cgroup::default();
        if limits.memory.is_none() && limits.cpus.is_none() {
            return Ok(cgroup);
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").context(|| "reading /proc/self/mountinfo".to_owned())?;
        let own = fs::read_to_string("/proc/self/cgroup").context(|| "reading /proc/self/cgroup".to_owned())?;
        if let Some(bytes) = limits.memory {
            let refused = |reason| SandboxError::Refused { option: format!("--memory {bytes}"), level: level.name(), reason };
            let group = cgroup.group(&mounts, &own, "memory").map_err(refused)?;
            group.memory = true;
            let path = group.path.clone();
            match group.version {
                Version::V2 => {
                    write(&path, "memory.max", &bytes.to_string())?;
                    // Without swap accounting there is no such file.
                    let _ = fs::write(path.join("memory.swap.max"), "0");
                }
                Version::V1 => {
                    write(&path, "memory.limit_in_bytes", &bytes.to_string())?;
                    let _ = fs::write(path.join("memory.memsw.limit_in_bytes"), bytes.to_string());
                }
            }
        }
        if let Some(cpus) = limits.cpus {
            let refused = |reason| SandboxError::Refused { option: format!("--cpus {cpus}"), level: level.name(), reason };
            if !cpus.is_finite() || cpus <= 0.0 {
                return Err(refused("the number of CPUs must be above zero".to_owned()));
            }
            let quota = ((cpus * CPU_PERIOD as f64) as u64).max(CPU_QUOTA_MIN);
            let group = cgroup.group(&mounts, &own, "cpu").map_err(refused)?;
            let path = group.path.clone();
            match group.version {
                Version::V2 => write(&path, "cpu.max", &format!("{quota} {CPU_PERIOD}"))?,
                Version::V1 => {
                    write(&path, "cpu.cfs_period_us", &CPU_PERIOD.to_string())?;
                    write(&path, "cpu.cfs_quota_us", &quota.to_string())?;
                }
            }
        }
        Ok(cgroup)
    }

    /// Moves a process into the groups.
    pub(crate) fn add(&self, pid: i32) -> Result<(), SandboxError> {
        self.groups.iter().try_for_each(|group| write(&group.path, "cgroup.procs", &pid.to_string()))
    }

    /// Whether the kernel killed something in the group for memory.
    pub(crate) fn out_of_memory(&self) -> bool {
        self.memory().is_some_and(|group| {
            let file = if group.version == Version::V2 { "memory.events" } else { "memory.oom_control" };
            let text = fs::read_to_string(group.path.join(file)).unwrap_or_default();
            text.lines().filter_map(|line| line.strip_prefix("oom_kill ")).any(|count| count.trim() != "0")
        })
    }

    /// Bytes.
    pub(crate) fn peak_memory(&self) -> Option<u64> {
        let group = self.memory()?;
        let file = if group.version == Version::V2 { "memory.peak" } else { "memory.max_usage_in_bytes" };
        fs::read_to_string(group.path.join(file)).ok()?.trim().parse().ok()
    }

    fn memory(&self) -> Option<&Group> {
        self.groups.iter().find(|group| group.memory)
    }

    fn group(&mut self, mounts: &str, own: &str, controller: &str) -> Result<&mut Group, String> {
        let (parents, version) = parents(mounts, own, controller).ok_or_else(|| {
            format!("this machine shows no cgroup tree with the {controller} controller; mount one, or leave the option out")
        })?;
        if version == Version::V2
            && let Some(index) = self.groups.iter().position(|group| group.version == Version::V2)
            && self.groups[index].path.join(format!("{controller}.max")).exists()
        {
            return Ok(&mut self.groups[index]);
        }
        let mut last = io::Error::from_raw_os_error(libc::ENOENT);
        for parent in &parents {
            match make(parent, version, controller) {
                Ok(path) => {
                    self.groups.push(Group { path, version, memory: false });
                    let index = self.groups.len() - 1;
                    return Ok(&mut self.groups[index]);
                }
                Err(error) => last = error,
            }
        }
        Err(format!(
            "no cgroup with the {controller} controller can be made ({last}); delegate one to this user (systemd: Delegate=yes), or leave the option out"
        ))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for group in &self.groups {
            for _ in 0..REMOVE_TRIES {
                match fs::remove_dir(&group.path) {
                    Err(error) if error.raw_os_error() == Some(libc::EBUSY) => std::thread::sleep(REMOVE_PAUSE),
                    // Gone, or something the next run's sweep will meet again.
                    _ => break,
                }
            }
        }
    }
}

fn write(group: &Path, file: &str, value: &str) -> Result<(), SandboxError> {
    fs::write(group.join(file), value).context(|| format!("writing {value} to {}", group.join(file).display()))
}

fn make(parent: &Path, version: Version, controller: &str) -> io::Result<PathBuf> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    if version == Version::V2 {
        let enabled = fs::read_to_string(parent.join("cgroup.subtree_control"))?;
        if !enabled.split_whitespace().any(|name| name == controller) {
            fs::write(parent.join("cgroup.subtree_control"), format!("+{controller}"))?;
        }
    }
    sweep(parent);
    let path = parent.join(format!("{PREFIX}{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
    fs::create_dir(&path)?;
    Ok(path)
}

/// Removes groups of engines that were killed.
fn sweep(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.split('-').next()?.parse::<u32>().ok()) else { continue };
        if !Path::new("/proc").join(pid.to_string()).exists() {
            // A group that still has processes refuses.
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// Where a group with the controller may be made, best first.
fn parents(mounts: &str, own: &str, controller: &str) -> Option<(Vec<PathBuf>, Version)> {
    for line in mounts.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let (left, right): (Vec<&str>, Vec<&str>) = (left.split(' ').collect(), right.split(' ').collect());
        let (Some(root), Some(at), Some(kind)) = (left.get(3), left.get(4), right.first()) else { continue };
        let at = Path::new(at);
        if *kind == "cgroup" && right.get(2).is_some_and(|options| options.split(',').any(|option| option == controller)) {
            let inner = own_path(own, |controllers| controllers.split(',').any(|name| name == controller))?;
            let here = at.join(inner.strip_prefix(root.trim_end_matches('/')).unwrap_or(inner).trim_start_matches('/'));
            return Some((vec![here, at.to_owned()], Version::V1));
        }
        if *kind == "cgroup2"
            && fs::read_to_string(at.join("cgroup.controllers")).is_ok_and(|all| all.split_whitespace().any(|name| name == controller))
        {
            let inner = own_path(own, str::is_empty)?;
            let here = at.join(inner.strip_prefix(root.trim_end_matches('/')).unwrap_or(inner).trim_start_matches('/'));
            // The engine's own group holds the engine: groups with processes cannot have limited children.
            let mut above: Vec<PathBuf> = here.ancestors().skip(1).take_while(|path| path.starts_with(at)).map(Path::to_owned).collect();
            if here == at {
                above.push(here);
            }
            return Some((above, Version::V2));
        }
    }
    None
}

fn own_path(own: &str, wanted: impl Fn(&str) -> bool) -> Option<&str> {
    own.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        wanted(controllers).then_some(path)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_groups_go() {
        let mounts =
            "30 1 0:26 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n31 1 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
        let docker = "31 1 0:27 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n";
        let own = "9:name=systemd:/\n4:memory:/jobs/7\n1:cpu:/\n0::/\n";
        let inside = "4:memory:/docker/abc\n";
        for (mounts, own, controller, want) in [
            (mounts, own, "memory", Some("/sys/fs/cgroup/memory/jobs/7")),
            (mounts, own, "cpu", Some("/sys/fs/cgroup/cpu/")),
            (docker, inside, "memory", Some("/sys/fs/cgroup/memory/")),
            (mounts, own, "pids", None),
            ("", own, "memory", None),
        ] {
            let got = parents(mounts, own, controller).map(|(paths, _)| paths[0].to_str().unwrap().to_owned());
            assert_eq!(got.as_deref(), want, "{controller} in {mounts:?}");
        }
    }
}
