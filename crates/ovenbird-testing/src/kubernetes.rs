//! A real Kubernetes with one node on this machine: built once from Debian's source package, started in namespaces of its own.
//!
//! The scripts beside this crate's sources do the work; here are who may run them when, and where their files are. A cluster has no way out of
//! the machine: its pods reach this machine at [`Cluster::host`] and nothing else.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::{on_path, output};
use crate::registry::Registry;
use crate::{AtPath, Error, Result, cache, repository};

/// Debian packages that building and running need. `kubectl` may be there from elsewhere: Debian's package cannot be installed beside that.
pub fn packages() -> Vec<&'static str> {
    PACKAGES.into_iter().chain((!on_path("kubectl")).then_some("kubernetes-client")).collect()
}

const PACKAGES: [&str; 12] = [
    "bc",
    "busybox-static",
    "containerd",
    "containernetworking-plugins",
    "dpkg-dev",
    "etcd-server",
    "gcc",
    "iproute2",
    "make",
    "openssl",
    "rsync",
    "runc",
];

/// The slot of tests: one cluster at a time, so that a machine is not asked for more than it has.
const TESTS: u8 = 0;

/// The slot of `cargo xtask kubernetes start`.
pub const BY_HAND: u8 = 1;

/// What Kubernetes is built from and how: another number, another build.
const VERSION: &str = "kubernetes-1.20.2-1";

/// Why its programs cannot be had, after an attempt to build them; `None`: they are there.
pub fn unavailable() -> Option<String> {
    programs().err().map(|error| format!("Kubernetes cannot be built here: {error}"))
}

/// What this machine lacks; `None`: nothing.
pub fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("not root".into());
    }
    let programs = [
        ("containerd", "containerd"),
        ("runc", "runc"),
        ("etcd", "etcd-server"),
        ("kubectl", "kubernetes-client"),
        ("ip", "iproute2"),
        ("openssl", "openssl"),
        ("busybox", "busybox-static"),
        ("dpkg-source", "dpkg-dev"),
        ("rsync", "rsync"),
        ("make", "make"),
    ];
    if let Some((program, package)) = programs.iter().find(|(program, _)| !on_path(program)) {
        return Some(format!("{program} is missing (Debian package {package})"));
    }
    if !Path::new("/usr/lib/cni/bridge").exists() {
        return Some("the network plugins are missing (Debian package containernetworking-plugins)".into());
    }
    if !Path::new("/sys/fs/cgroup/memory").is_dir() {
        return Some("Kubernetes 1.20 wants cgroups of version 1".into());
    }
    None
}

fn script(name: &str) -> Command {
    let mut command = Command::new("bash");
    command.arg(repository().join("crates/ovenbird-testing/kubernetes").join(name));
    command
}

/// Need the programs not be built?
pub fn is_cached() -> bool {
    cache::dir().is_ok_and(|dir| dir.join(VERSION).exists())
}

/// The programs; built when they are not in the cache.
pub fn programs() -> Result<PathBuf> {
    cache::entry(VERSION, |folder| {
        output(script("build.sh").arg(folder))?;
        output(script("sandbox.sh").arg(folder.join("img/sandbox.tar"))).map(drop)
    })
}

/// A running cluster. Dropped: everything that it started ends.
#[derive(Debug)]
pub struct Cluster {
    run: PathBuf,
    slot: u8,
    _lock: File,
}

impl Cluster {
    /// Starts one for tests, when no other test has one.
    pub fn start() -> Result<Self> {
        let programs = programs()?;
        let lock = cache::lock("kubernetes")?;
        let run = cache::dir()?.join(format!("kubernetes-run-{TESTS}"));
        // Of a run that was killed.
        stop(&run, TESTS)?;
        let this = Self { run, slot: TESTS, _lock: lock };
        start(&programs, &this.run, TESTS)?;
        Ok(this)
    }

    /// The kubeconfig of its administrator.
    pub fn kubeconfig(&self) -> PathBuf {
        self.run.join("admin.kubeconfig")
    }

    /// Its authority's certificate.
    pub fn authority(&self) -> PathBuf {
        self.run.join("pki/ca.crt")
    }

    /// `https://…` of the API server.
    pub fn server(&self) -> String {
        format!("https://10.77.{}.1:16443", 2 * self.slot + 1)
    }

    /// This machine's address for pods.
    pub fn host(&self) -> String {
        format!("10.77.{}.2", 2 * self.slot + 1)
    }

    /// Lets the node pull from a registry over plain HTTP.
    pub fn trust(&self, registry: &Registry) -> Result<()> {
        let address = registry.address();
        let dir = self.run.join("certs.d").join(&address);
        fs::create_dir_all(&dir).at("cannot make", &dir)?;
        let file = dir.join("hosts.toml");
        fs::write(&file, format!("server = \"http://{address}\"\n[host.\"http://{address}\"]\ncapabilities = [\"pull\", \"resolve\"]\n"))
            .at("cannot write", &file)
    }

    /// Runs `kubectl ARGS` as administrator and returns its output.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        output(Command::new("kubectl").arg("--kubeconfig").arg(self.kubeconfig()).args(args))
    }

    /// Runs `kubectl apply` on a text.
    pub fn apply(&self, manifest: &str) -> Result<String> {
        let file = self.run.join(format!("manifest-{}.yaml", std::process::id()));
        fs::write(&file, manifest).at("cannot write", &file)?;
        self.kubectl(&["apply", "-f", &file.display().to_string()])
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = stop(&self.run, self.slot);
    }
}

fn start(programs: &Path, run: &Path, slot: u8) -> Result<()> {
    output(script("start.sh").arg(programs).arg(run).arg(slot.to_string())).map(drop)
}

fn stop(run: &Path, slot: u8) -> Result<()> {
    output(script("stop.sh").arg(run).arg(slot.to_string())).map(drop)
}

/// Starts one that stays until [`stop_by_hand`]. Gives its kubeconfig.
pub fn start_by_hand() -> Result<PathBuf> {
    let (programs, run) = (programs()?, cache::dir()?.join(format!("kubernetes-run-{BY_HAND}")));
    if run.exists() {
        return Err(Error::Missing(format!("one is running, or was killed: {} exists; stop it first", run.display())));
    }
    start(&programs, &run, BY_HAND)?;
    Ok(run.join("admin.kubeconfig"))
}

/// Ends the one of [`start_by_hand`].
pub fn stop_by_hand() -> Result<()> {
    stop(&cache::dir()?.join(format!("kubernetes-run-{BY_HAND}")), BY_HAND)
}
