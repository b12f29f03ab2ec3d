//! What to run and what came of it.

use std::ffi::OsString;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;

/// The step's root file system.
#[derive(Debug, Clone)]
pub enum Root {
    /// Overlay mount (new mount API, `userxattr`, `volatile`).
    Overlay {
        /// Read-only folders, **highest first**; may be empty (then an empty folder is used).
        lowers: Vec<PathBuf>,
        /// Gets the changes.
        upper: PathBuf,
        /// Overlay's own work folder, same file system as `upper`; removed by the sandbox afterwards.
        work: PathBuf,
    },
    /// A plain folder that is changed in place (no overlay here).
    Dir(PathBuf),
}

/// Network of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Network {
    /// The machine's own network.
    #[default]
    Host,
    /// Only a loopback device.
    None,
}

/// Where a mount's content comes from.
#[derive(Debug, Clone)]
pub enum MountSource {
    /// A folder or file of the machine.
    Bind(PathBuf),
    /// Folders merged read-only, highest first; writes (when not `read_only`) go nowhere.
    Layers {
        /// Highest first.
        lowers: Vec<PathBuf>,
        /// Folder or file below the merged root, relative, without `..`; resolved inside it.
        subpath: PathBuf,
    },
    /// Memory.
    Tmpfs {
        /// Bytes.
        size: Option<u64>,
    },
    /// A file in memory only (secrets): never written to a disk where mounts are possible.
    Secret {
        /// Bytes.
        content: Vec<u8>,
        /// Permission bits.
        mode: u32,
        /// Owner inside.
        uid: u32,
        /// Group inside.
        gid: u32,
    },
    /// A Unix socket of the machine (ssh agent).
    Socket {
        /// Where it listens.
        path: PathBuf,
        /// Permission bits.
        mode: u32,
        /// Owner inside.
        uid: u32,
        /// Group inside.
        gid: u32,
    },
}

/// One mount. Mount points that had to be made are removed afterwards and never land in the layer.
#[derive(Debug, Clone)]
pub struct Mount {
    /// Absolute path in the step; resolved inside the root, symlinks never leave it.
    pub target: PathBuf,
    /// Content.
    pub source: MountSource,
    /// Refuse writes.
    pub read_only: bool,
}

/// Who the step runs as.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StepUser {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// Resource limits; one that the level cannot enforce is refused by name.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Limits {
    /// `--memory`, bytes.
    pub memory: Option<u64>,
    /// `--cpus`.
    pub cpus: Option<f64>,
    /// `--ulimit name=soft[:hard]`: (name, soft, hard); -1 is unlimited.
    pub ulimits: Vec<(String, i64, i64)>,
    /// `--shm-size`, bytes (64 MiB when absent).
    pub shm_size: Option<u64>,
}

/// The host name of steps when none is asked for, as with BuildKit.
pub const DEFAULT_HOSTNAME: &str = "buildkitsandbox";

/// One step.
#[derive(Debug, Clone)]
pub struct Step {
    /// Root file system.
    pub root: Root,
    /// Program and arguments; the program is looked up in the step's `PATH` inside the root.
    pub args: Vec<OsString>,
    /// `NAME=value`.
    pub env: Vec<OsString>,
    /// Absolute; made when missing.
    pub cwd: PathBuf,
    /// User.
    pub user: StepUser,
    /// Host name; [`DEFAULT_HOSTNAME`] where nobody asked for one.
    pub hostname: String,
    /// Network.
    pub network: Network,
    /// Mounts in order.
    pub mounts: Vec<Mount>,
    /// Extra lines of `/etc/hosts`.
    pub hosts: Vec<(String, IpAddr)>,
    /// Name servers instead of the machine's.
    pub dns: Vec<IpAddr>,
    /// Limits.
    pub limits: Limits,
    /// `--security=insecure`: all capabilities the engine has, no seccomp filter, no masked paths.
    pub insecure: bool,
    /// Bytes for standard input; empty: `/dev/null`.
    pub stdin: Vec<u8>,
    /// Private scratch folder of this step (exists, empty, same file system as the root).
    pub scratch: PathBuf,
    /// Intended owners of the merged lower layers (single-id level), as in [`Outcome::owners`]: merged path, relative → (uid, gid,
    /// device node).
    pub lower_owners: Vec<(PathBuf, u32, u32, Option<(u32, u32, u32)>)>,
    /// Intended owners of mounted folders (single-id level): mount target → (uid, gid). Secrets and sockets say their own.
    pub mount_owners: Vec<(PathBuf, u32, u32)>,
}

/// Which stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// How a step ended. Everything it started is dead by then and everything mounted is gone.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    /// Exit code; 128 + signal when killed.
    pub code: i32,
    /// Killed by the memory limit.
    pub out_of_memory: bool,
    /// Was cancelled.
    pub cancelled: bool,
    /// Single-id level: every path of the upper folder (relative) whose intended owner is not what the disk says:
    /// (uid, gid, device node as (`st_mode`, major, minor)).
    pub owners: Vec<(PathBuf, u32, u32, Option<(u32, u32, u32)>)>,
    /// Peak memory in bytes, where known.
    pub peak_memory: Option<u64>,
    /// CPU time in microseconds (user + system).
    pub cpu_micros: u64,
}

/// Why a step could not be run at all.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A system call failed while the step was set up.
    #[error("cannot set up the step: {what} failed: {source}")]
    Setup {
        /// Which call, on what.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// The level cannot do what was asked.
    #[error("{option} is not possible at the {level} level: {reason}")]
    Refused {
        /// `--memory`…
        option: String,
        /// Level name.
        level: &'static str,
        /// Why and what to do.
        reason: String,
    },
    /// The program is not in the root.
    #[error("{program}: {source}")]
    Exec {
        /// `args[0]`.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// A mount does not fit what the root has at its target.
    #[error("cannot mount on {}: {reason}", target.display())]
    Target {
        /// As asked for.
        target: PathBuf,
        /// Why.
        reason: String,
    },
    /// The working directory cannot be one.
    #[error("cannot use the working directory {}: {source}", path.display())]
    Cwd {
        /// As asked for.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The root file system is not one that a step can run in.
    #[error("the root file system is malformed: {path}: {source}")]
    Root {
        /// What every step needs.
        path: &'static str,
        /// Why it cannot be had.
        source: io::Error,
    },
    /// No level works here.
    #[error("this machine allows no RUN step: {reason}")]
    Impossible {
        /// What is missing.
        reason: String,
    },
}
