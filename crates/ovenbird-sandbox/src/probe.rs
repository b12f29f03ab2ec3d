//! What this machine allows.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::path::Path;

use serde::Serialize;

use crate::{SandboxError, caps, idmap, mounts, reap, syscall};

/// Isolation levels, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// Namespaces as root.
    Root,
    /// User namespace with subordinate id ranges (`newuidmap`).
    Rootless,
    /// User namespace with one id; owners are recorded.
    SingleId,
    /// Root inside an ordinary container: `chroot`, no namespaces.
    Chroot,
    /// An ordinary user without any right: the step's calls are traced, and paths and owners in them changed.
    Traced,
}

impl Level {
    /// All, best first.
    pub const ALL: [Level; 5] = [Level::Root, Level::Rootless, Level::SingleId, Level::Chroot, Level::Traced];

    /// The name that users read and type.
    pub fn name(self) -> &'static str {
        match self {
            Level::Root => "root",
            Level::Rootless => "rootless",
            Level::SingleId => "single-id",
            Level::Chroot => "chroot",
            Level::Traced => "traced",
        }
    }

    /// What a step gets at this level, in one sentence (for `doctor`).
    pub fn description(self) -> &'static str {
        match self {
            Level::Root => "Namespaces, overlay mounts, Docker's capabilities and seccomp filter.",
            Level::Rootless => "Like root, in a user namespace with subordinate ids; nothing runs with this machine's root rights.",
            Level::SingleId => {
                "Like rootless with one id: changes of owner are recorded for the layer, and `stat` in a step shows the recorded owner."
            }
            Level::Chroot => {
                "No isolation beyond the container's own: /proc and /sys are empty in a step, mounts are copies, no overlay, no --network none, no --shm-size."
            }
            Level::Traced => {
                "For an ordinary user without capabilities or namespaces: a step's calls are traced (ptrace) and led into its root. No isolation: a step reaches whatever this user may; no --network none, no --shm-size, no 32-bit programs."
            }
        }
    }
}

/// One level and whether it works here.
#[derive(Debug, Clone, Serialize)]
pub struct LevelStatus {
    /// Which.
    pub level: Level,
    /// Tried and works.
    pub usable: bool,
    /// Overlay mounts work too, with an upper folder below the state folder; without them every step copies its root.
    pub overlay: bool,
    /// What is missing and how to get it, one sentence each.
    pub missing: Vec<String>,
}

/// Result of [`probe`].
#[derive(Debug, Clone, Serialize)]
pub struct Probe {
    /// All levels.
    pub levels: Vec<LevelStatus>,
    /// The best usable one; `None`: only builds without `RUN`.
    pub chosen: Option<Level>,
}

impl Probe {
    /// The best level that works here.
    pub fn best(&self) -> Option<&LevelStatus> {
        self.levels.iter().find(|status| status.usable)
    }
}

/// Tries the levels, best first, each in a child process (never changes this one), up to the first that works.
/// `state` is where snapshots will live.
pub fn probe(state: &Path) -> Probe {
    search(state, false)
}

/// Like [`probe`], but tries the lower levels too (for `doctor`).
pub fn probe_all(state: &Path) -> Probe {
    search(state, true)
}

/// Tries one level.
pub fn probe_level(level: Level, state: &Path) -> LevelStatus {
    let (missing, overlay) = attempt(level, state);
    LevelStatus { level, usable: missing.is_empty(), overlay: overlay && missing.is_empty(), missing }
}

fn search(state: &Path, all: bool) -> Probe {
    let mut probe = Probe { levels: Vec::new(), chosen: None };
    for level in Level::ALL {
        let status = probe_level(level, state);
        if status.usable && probe.chosen.is_none() {
            probe.chosen = Some(level);
        }
        probe.levels.push(status);
        if probe.chosen.is_some() && !all {
            break;
        }
    }
    probe
}

/// (what is missing, whether overlay works).
fn attempt(level: Level, state: &Path) -> (Vec<String>, bool) {
    let missing = wanting(level);
    if !missing.is_empty() {
        return (missing, false);
    }
    match in_child(level, state) {
        Ok(Tried { failure: None, overlay }) => (Vec::new(), overlay),
        Ok(Tried { failure: Some((stage, errno)), overlay }) => (explain(level, stage, errno, &Machine::read()), overlay),
        Err(error) => (vec![format!("the attempt itself failed: {error}")], false),
    }
}

/// What can be seen to be missing without trying.
fn wanting(level: Level) -> Vec<String> {
    // SAFETY: never fails.
    let root = unsafe { libc::geteuid() } == 0;
    match level {
        Level::Root if !root => vec!["This user is not root.".to_owned()],
        Level::Root if !caps::has(caps::SYS_ADMIN) => {
            vec!["CAP_SYS_ADMIN is missing: give it to the container (`docker run --cap-add SYS_ADMIN`; Kubernetes `securityContext.capabilities.add`).".to_owned()]
        }
        Level::Rootless => idmap::mapping().err().unwrap_or_default(),
        Level::Chroot if !root => vec!["This user is not root: inside a container, run as user 0.".to_owned()],
        Level::Chroot => [(caps::SYS_CHROOT, "CAP_SYS_CHROOT"), (caps::SETUID, "CAP_SETUID"), (caps::SETGID, "CAP_SETGID")]
            .into_iter()
            .filter(|(cap, _)| !caps::has(*cap))
            .map(|(_, name)| format!("{name} is missing: do not drop Docker's default capabilities."))
            .collect(),
        Level::Traced => crate::traced::MISSING.map(str::to_owned).into_iter().collect(),
        Level::Root | Level::SingleId => Vec::new(),
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Enter,
    Namespaces,
    Mount,
    Listener,
    Chroot,
    Ptrace,
    Filter,
}

struct Tried {
    failure: Option<(Stage, i32)>,
    overlay: bool,
}

const STAGES: [Stage; 7] = [Stage::Enter, Stage::Namespaces, Stage::Mount, Stage::Listener, Stage::Chroot, Stage::Ptrace, Stage::Filter];

fn in_child(level: Level, state: &Path) -> io::Result<Tried> {
    let (read, write) = syscall::pipe()?;
    // SAFETY: the C library makes its allocator usable in the child, which ends with `_exit`.
    let pid = syscall::check(unsafe { libc::fork() }.into())? as i32;
    if pid == 0 {
        let (failure, overlay) = match try_level(level, state) {
            Ok(overlay) => (None, overlay),
            Err(failure) => (Some(failure), false),
        };
        let stage = failure.map_or(0, |(stage, _)| stage as u8 + 1);
        let errno = failure.map_or(0, |(_, errno)| errno);
        let mut message = vec![stage, u8::from(overlay)];
        message.extend(errno.to_ne_bytes());
        let _ = fs::File::from(write).write_all(&message);
        // SAFETY: ends this copy at once.
        unsafe { libc::_exit(0) };
    }
    drop(write);
    let mut message = Vec::new();
    let answered = fs::File::from(read).read_to_end(&mut message);
    reap::wait4(pid)?;
    answered?;
    let [stage, overlay, errno @ ..] = message.as_slice() else { return Err(io::Error::other("the child was killed")) };
    let errno = errno.try_into().map_or(libc::EIO, i32::from_ne_bytes);
    let failure = STAGES.into_iter().find(|known| *known as u8 + 1 == *stage).map(|stage| (stage, errno));
    Ok(Tried { failure, overlay: *overlay != 0 })
}

fn try_level(level: Level, state: &Path) -> Result<bool, (Stage, i32)> {
    let at = |stage: Stage| move |error: io::Error| (stage, error.raw_os_error().unwrap_or(0));
    if level == Level::Chroot {
        // SAFETY: constant string.
        syscall::check(unsafe { libc::chroot(c"/".as_ptr()) }.into()).map_err(at(Stage::Chroot))?;
        return Ok(false);
    }
    if level == Level::Traced {
        use crate::traced::probe::{Failed, attempt};
        return attempt().map(|()| false).map_err(|(failed, error)| match failed {
            Failed::Ptrace => at(Stage::Ptrace)(error),
            Failed::Filter => at(Stage::Filter)(error),
        });
    }
    crate::enter(level).map_err(|error| match error {
        SandboxError::Setup { source, .. } => at(Stage::Enter)(source),
        _ => (Stage::Enter, 0),
    })?;
    let flags = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    syscall::unshare(flags).map_err(at(Stage::Namespaces))?;
    mounts::filesystem(c"tmpfs", &[], 0).map_err(at(Stage::Mount))?;
    if level == Level::SingleId {
        let mut sizes = [0u16; 3];
        // SAFETY: room for three numbers.
        syscall::check(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_NOTIF_SIZES, 0, sizes.as_mut_ptr()) })
            .map_err(at(Stage::Listener))?;
    }
    Ok(overlay_works(state))
}

/// Mounts one in this child's mount namespace. A state folder that does not exist yet is judged by what it will lie in.
fn overlay_works(state: &Path) -> bool {
    let Some(base) = state.ancestors().find(|path| path.is_dir()) else { return false };
    let folder = base.join(format!(".ovenbird-probe-{}", std::process::id()));
    let [lower, upper, work, merged] = ["lower", "upper", "work", "merged"].map(|name| folder.join(name));
    let made = [&lower, &upper, &work, &merged].into_iter().all(|path| fs::create_dir_all(path).is_ok());
    let works = made && mounts::overlay(&[lower], Some((&upper, &work)), &merged).is_ok();
    if works && let Ok(path) = syscall::c_path(&merged) {
        // SAFETY: valid C string.
        unsafe { libc::umount2(path.as_ptr(), libc::MNT_DETACH) };
    }
    // An empty leftover does no harm.
    let _ = fs::remove_dir_all(&folder);
    works
}

/// What of the machine decides over user namespaces.
#[derive(Default)]
struct Machine {
    max_user_namespaces: Option<String>,
    unprivileged_userns_clone: Option<String>,
    apparmor_restriction: Option<String>,
    seccomp: bool,
}

impl Machine {
    fn read() -> Machine {
        let value = |path: &str| fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        Machine {
            max_user_namespaces: value("/proc/sys/user/max_user_namespaces"),
            unprivileged_userns_clone: value("/proc/sys/kernel/unprivileged_userns_clone"),
            apparmor_restriction: value("/proc/sys/kernel/apparmor_restrict_unprivileged_userns"),
            seccomp: status.lines().any(|line| line.strip_prefix("Seccomp:").is_some_and(|mode| mode.trim() == "2")),
        }
    }
}

fn explain(level: Level, stage: Stage, errno: i32, machine: &Machine) -> Vec<String> {
    let error = io::Error::from_raw_os_error(errno);
    let mut out = Vec::new();
    if matches!(level, Level::Rootless | Level::SingleId) {
        if machine.max_user_namespaces.as_deref() == Some("0") {
            out.push("User namespaces are switched off: as root, run `sysctl -w user.max_user_namespaces=15000`.".to_owned());
        }
        if machine.unprivileged_userns_clone.as_deref() == Some("0") {
            out.push("User namespaces are for root only: as root, run `sysctl -w kernel.unprivileged_userns_clone=1`.".to_owned());
        }
        if machine.apparmor_restriction.as_deref() == Some("1") {
            out.push("AppArmor takes the capabilities away in user namespaces: give ovenbird an AppArmor profile with `userns,`, or as root run `sysctl -w kernel.apparmor_restrict_unprivileged_userns=0`.".to_owned());
        }
    }
    match stage {
        Stage::Ptrace => out.push(format!(
            "A process cannot be traced ({error}): the container's seccomp filter must allow ptrace, as the default ones of Docker and containerd do, and kernel.yama.ptrace_scope must be 0 or 1."
        )),
        Stage::Filter => out.push("A traced process does not stop at a seccomp filter (SECCOMP_RET_TRACE, Linux 4.8): the container's own filter must allow seccomp and prctl.".to_owned()),
        _ => {}
    }
    if out.is_empty() && machine.seccomp && matches!(errno, libc::EPERM | libc::ENOSYS) {
        out.push(format!(
            "{} is refused by a seccomp filter ({error}): run the container with `--security-opt seccomp=unconfined` (Kubernetes: `securityContext.seccompProfile.type: Unconfined`).",
            what(stage)
        ));
    }
    if out.is_empty() && stage == Stage::Enter && level == Level::Rootless && errno == 0 {
        out.push(
            "newuidmap or newgidmap failed: they must be setuid root, and the ranges in /etc/subuid and /etc/subgid must be this user's."
                .to_owned(),
        );
    }
    if out.is_empty() {
        out.push(format!("{} failed: {error}.", what(stage)));
    }
    out
}

fn what(stage: Stage) -> &'static str {
    match stage {
        Stage::Enter => "Making a user or mount namespace",
        Stage::Namespaces => "Making mount, pid, ipc and uts namespaces",
        Stage::Mount => "Mounting",
        Stage::Listener => "The seccomp listener (Linux 5.0)",
        Stage::Chroot => "chroot",
        Stage::Ptrace => "ptrace",
        Stage::Filter => "A seccomp filter that stops a traced process",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn explanations_name_the_cure() {
        let on = |text: &str| Some(text.to_owned());
        let rows = [
            (Machine { max_user_namespaces: on("0"), ..Machine::default() }, Stage::Enter, libc::ENOSPC, "user.max_user_namespaces=15000"),
            (
                Machine { unprivileged_userns_clone: on("0"), seccomp: true, ..Machine::default() },
                Stage::Enter,
                libc::EPERM,
                "kernel.unprivileged_userns_clone=1",
            ),
            (Machine { apparmor_restriction: on("1"), ..Machine::default() }, Stage::Namespaces, libc::EPERM, "AppArmor profile"),
            (
                Machine { seccomp: true, max_user_namespaces: on("100"), ..Machine::default() },
                Stage::Enter,
                libc::EPERM,
                "seccomp=unconfined",
            ),
            (Machine::default(), Stage::Enter, 0, "/etc/subuid"),
            (Machine::default(), Stage::Mount, libc::EACCES, "Permission denied"),
        ];
        for (machine, stage, errno, want) in rows {
            let said = explain(Level::Rootless, stage, errno, &machine).join(" ");
            assert!(said.contains(want), "{said}");
        }
    }

    #[test]
    fn changes_nothing_here() {
        let folder = tempfile::tempdir().unwrap();
        let before = fs::read_link("/proc/self/ns/mnt").unwrap();
        let probe = probe_all(&folder.path().join("not/yet"));
        assert_eq!(fs::read_link("/proc/self/ns/mnt").unwrap(), before);
        assert_eq!(probe.levels.len(), Level::ALL.len());
        assert_eq!(probe.chosen, probe.levels.iter().find(|status| status.usable).map(|status| status.level));
        assert!(probe.levels.iter().all(|status| status.usable == status.missing.is_empty()));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
