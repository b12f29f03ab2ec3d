//! Users, and folders with a tiny root file system.

use std::fs;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::path::{Path, PathBuf};
use std::process::Command;

use ovenbird_sandbox::{DEFAULT_HOSTNAME, Level, Limits, Network, Root, Step, StepUser};
use tempfile::TempDir;

const BUSYBOX: [&str; 3] = ["/bin/busybox", "/usr/bin/busybox", "/bin/busybox.static"];
const SUBID: (&str, u32) = ("ovenbird-test-subid", 61001);
const PLAIN: (&str, u32) = ("ovenbird-test-plain", 61002);
const RANGE: &str = "1000000:65536";
const NOGROUP: u32 = 65534;

fn is_root() -> bool {
    fs::read_to_string("/proc/self/status").is_ok_and(|text| text.lines().any(|line| line.starts_with("Uid:\t0\t0\t")))
}

/// This program again, as the user of the level; or why that cannot be.
pub(crate) fn command(level: Level) -> Result<Command, String> {
    if busybox().is_none() {
        return Err("busybox-static is not installed".to_owned());
    }
    if !is_root() {
        return Err("needs root, to become the users of the levels".to_owned());
    }
    // Opened here: the path to it may be closed to other users. The descriptor is inherited on purpose.
    let program = fs::File::open("/proc/self/exe").map_err(|error| error.to_string())?;
    let fd = program.into_raw_fd();
    inherit(fd);
    let program = format!("/proc/self/fd/{fd}");
    let user = match level {
        Level::Root | Level::Chroot => return Ok(Command::new(program)),
        Level::Rootless => SUBID,
        Level::SingleId | Level::Traced => PLAIN,
    };
    ensure(user, level == Level::Rootless)?;
    let mut command = Command::new("setpriv");
    command.args([format!("--reuid={}", user.1), format!("--regid={NOGROUP}"), "--clear-groups".to_owned(), "--inh-caps=-all".to_owned()]);
    if level == Level::Traced {
        command.args(["--no-new-privs", "--bounding-set=-all"]);
    }
    command.arg(program);
    command.current_dir("/");
    Ok(command)
}

#[allow(unsafe_code, reason = "std cannot make a descriptor inheritable")]
fn inherit(fd: i32) {
    // SAFETY: numbers only.
    unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
}

/// Makes the user, once, with or without a range of subordinate ids.
fn ensure((name, uid): (&str, u32), range: bool) -> Result<(), String> {
    let text = |error: std::io::Error| error.to_string();
    let lock = fs::File::create(std::env::temp_dir().join("ovenbird-test-users.lock")).map_err(text)?;
    lock.lock().map_err(text)?;
    let known = fs::read_to_string("/etc/passwd").map_err(text)?.lines().any(|line| line.starts_with(&format!("{name}:")));
    if !known {
        let uid = uid.to_string();
        let made = Command::new("useradd")
            .args([
                "--no-create-home",
                "--no-user-group",
                "--no-log-init",
                "-K",
                "SUB_UID_COUNT=0",
                "-K",
                "SUB_GID_COUNT=0",
                "--shell",
                "/bin/sh",
                "--uid",
                &uid,
                "--gid",
            ])
            .args([NOGROUP.to_string().as_str(), name])
            .output()
            .map_err(text)?;
        if !made.status.success() {
            return Err(format!("useradd {name}: {}", String::from_utf8_lossy(&made.stderr)));
        }
    }
    for file in ["/etc/subuid", "/etc/subgid"] {
        let ranges = fs::read_to_string(file).unwrap_or_default();
        if range && !ranges.lines().any(|line| line.starts_with(&format!("{name}:"))) {
            fs::write(file, format!("{ranges}{name}:{RANGE}\n")).map_err(text)?;
        }
    }
    Ok(())
}

fn busybox() -> Option<&'static str> {
    BUSYBOX.into_iter().find(|path| Path::new(path).exists())
}

/// Folders of one step, below a temporary folder. Made before `enter`, removed after it.
pub(crate) struct Place {
    pub(crate) folder: TempDir,
}

impl Place {
    pub(crate) fn new() -> Place {
        let folder = tempfile::Builder::new().prefix("ovenbird-sandbox-").tempdir().expect("a temporary folder");
        let place = Place { folder };
        for name in ["lower/bin", "upper", "work", "scratch", "outside"] {
            fs::create_dir_all(place.path(name)).expect("a folder");
        }
        let bin = place.path("lower/bin");
        fs::copy(busybox().expect("busybox"), bin.join("busybox")).expect("a copy of busybox");
        let list = Command::new(bin.join("busybox")).arg("--list").output().expect("the list of applets");
        for applet in String::from_utf8_lossy(&list.stdout).lines().filter(|applet| *applet != "busybox") {
            std::os::unix::fs::symlink("busybox", bin.join(applet)).expect("a link");
        }
        place
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `sh -c script`, over an overlay where the level has one.
    pub(crate) fn step(&self, level: Level, script: &str) -> Step {
        let root = if in_place(level) {
            Root::Dir(self.path("lower"))
        } else {
            Root::Overlay { lowers: vec![self.path("lower")], upper: self.path("upper"), work: self.path("work") }
        };
        Step {
            root,
            args: ["sh", "-c", script].map(Into::into).to_vec(),
            env: vec!["PATH=/usr/bin:/bin".into()],
            cwd: "/".into(),
            user: StepUser::default(),
            hostname: if level == Level::Chroot { DEFAULT_HOSTNAME.into() } else { "builder".into() },
            network: Network::Host,
            mounts: Vec::new(),
            hosts: Vec::new(),
            dns: Vec::new(),
            limits: Limits::default(),
            insecure: false,
            stdin: Vec::new(),
            scratch: self.path("scratch"),
            lower_owners: Vec::new(),
            mount_owners: Vec::new(),
        }
    }

    /// Where the step's changes are.
    pub(crate) fn changes(&self, level: Level) -> PathBuf {
        self.path(if in_place(level) { "lower" } else { "upper" })
    }
}

/// Levels without overlay: the root itself is changed.
pub(crate) fn in_place(level: Level) -> bool {
    matches!(level, Level::Chroot | Level::Traced)
}

/// Everything below a folder with kind, mode and time of change, sorted.
pub(crate) fn listing(folder: &Path) -> Vec<String> {
    use std::os::unix::fs::MetadataExt;
    let mut out = Vec::new();
    let mut open = vec![folder.to_owned()];
    while let Some(next) = open.pop() {
        let about = fs::symlink_metadata(&next).expect("metadata");
        if about.is_dir() {
            open.extend(fs::read_dir(&next).expect("a folder").map(|entry| entry.expect("an entry").path()));
        }
        let name = next.strip_prefix(folder).expect("a path below").display().to_string();
        out.push(format!("{name} {:o} {}.{}", about.mode(), about.mtime(), about.mtime_nsec()));
    }
    out.sort();
    out
}

/// Keeps a descriptor's number out of the way of nobody: for cases that compare open files.
pub(crate) fn open_files() -> usize {
    let own = fs::File::open("/proc/self/fd").expect("/proc");
    let _ = own.as_raw_fd();
    fs::read_dir("/proc/self/fd").expect("/proc").count()
}

/// Copies a program with the libraries that it is linked to into the root file system.
pub(crate) fn install(program: &Path, to: &Path, place: &Place) {
    fs::copy(program, to).unwrap();
    // Fails for a static one.
    let list = Command::new("ldd").arg(to).output().unwrap();
    for library in String::from_utf8_lossy(&list.stdout).split_whitespace().filter(|word| word.starts_with('/')) {
        let to = place.path("lower").join(&library[1..]);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(library, to).unwrap();
    }
}
