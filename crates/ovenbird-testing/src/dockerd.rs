//! A Docker Engine of our own: data, sockets and process state in one temporary folder, no change to the machine's network.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use crate::process::{self, Server};
use crate::{AtPath, Error, Result};

/// Programs of one Docker Engine.
#[derive(Debug, Clone)]
pub struct Programs {
    /// The daemon.
    pub dockerd: PathBuf,
    /// The client.
    pub docker: PathBuf,
    /// Folders that come before the machine's on the daemon's `PATH`: where its containerd is.
    pub path: Vec<PathBuf>,
    /// The client's plugin that builds, when it is not where the client looks by itself.
    pub buildx: Option<PathBuf>,
}

impl Programs {
    /// The machine's packages.
    pub fn packaged() -> Self {
        Self { dockerd: "dockerd".into(), docker: client(), path: vec![], buildx: None }
    }

    /// Debian packages unpacked below a folder (`dpkg -x`), beside the machine's own.
    pub fn unpacked(root: &Path) -> Self {
        let buildx = root.join("usr/libexec/docker/cli-plugins/docker-buildx");
        Self {
            dockerd: root.join("usr/sbin/dockerd"),
            docker: root.join("usr/bin/docker"),
            path: vec![root.join("usr/bin"), root.join("usr/sbin")],
            buildx: buildx.is_file().then_some(buildx),
        }
    }
}

/// Where an engine keeps images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Store {
    /// Its own graph drivers.
    Own,
    /// containerd's.
    Containerd,
}

impl Store {
    /// Best first.
    fn drivers(self) -> [&'static str; 2] {
        match self {
            Self::Own => ["overlay2", "vfs"],
            Self::Containerd => ["overlayfs", "native"],
        }
    }

    fn settings(self) -> &'static str {
        match self {
            Self::Own => "{}",
            Self::Containerd => r#"{"features": {"containerd-snapshotter": true}}"#,
        }
    }
}

/// A running Docker Engine. Dropped: containers are removed, the daemon ends, its folder is removed.
#[derive(Debug)]
pub struct Dockerd {
    server: Option<Server>,
    dir: Option<TempDir>,
    socket: PathBuf,
    programs: Programs,
}

/// Names a folder with the unpacked packages of the Docker Engine that the tests compare with, instead of the machine's own.
const UNPACKED: &str = "OVENBIRD_TESTS_DOCKER";

/// The client that came with the engine: another one on the path may lack the parts that build.
pub fn client() -> PathBuf {
    if let Some(root) = std::env::var_os(UNPACKED) {
        return Programs::unpacked(Path::new(&root)).docker;
    }
    let packaged = PathBuf::from("/usr/bin/docker");
    if packaged.is_file() { packaged } else { "docker".into() }
}

impl Dockerd {
    /// Starts one; overlay2 where it works, else vfs. No bridge: containers have the host's network or none.
    pub fn start() -> Result<Self> {
        Self::start_with_mirror(None)
    }

    /// The same; `mirror` (`http://127.0.0.1:PORT`) stands for Docker Hub.
    pub fn start_with_mirror(mirror: Option<&str>) -> Result<Self> {
        Self::start_with_programs(&Self::chosen(), mirror)
    }

    /// The same with images in containerd: layers are BuildKit's own, and every kind of output can be asked for.
    pub fn start_with_containerd(mirror: Option<&str>) -> Result<Self> {
        Self::start_on_first(&Self::chosen(), Store::Containerd, mirror, &[])
    }

    /// The same as [`start`](Self::start), which also listens at `address` (`127.0.0.1:PORT`), for clients with a certificate: `ca.pem`,
    /// `server-cert.pem` and `server-key.pem` in `certificates`.
    pub fn start_with_tls(address: &str, certificates: &Path) -> Result<Self> {
        let file = |option: &str, name: &str| format!("--{option}={}", certificates.join(name).display());
        let more = [
            format!("--host=tcp://{address}"),
            "--tlsverify".to_owned(),
            file("tlscacert", "ca.pem"),
            file("tlscert", "server-cert.pem"),
            file("tlskey", "server-key.pem"),
        ];
        Self::start_on_first(&Self::chosen(), Store::Own, None, &more)
    }

    /// The same with other programs than the machine's.
    pub fn start_with_programs(programs: &Programs, mirror: Option<&str>) -> Result<Self> {
        Self::start_on_first(programs, Store::Own, mirror, &[])
    }

    fn chosen() -> Programs {
        std::env::var_os(UNPACKED).map_or_else(Programs::packaged, |root| Programs::unpacked(Path::new(&root)))
    }

    fn start_on_first(programs: &Programs, store: Store, mirror: Option<&str>, more: &[String]) -> Result<Self> {
        let mut last = None;
        for driver in store.drivers() {
            match Self::start_on(programs, store, driver, mirror, more) {
                Ok(dockerd) => return Ok(dockerd),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| Error::Missing("no storage driver".into())))
    }

    fn start_on(programs: &Programs, store: Store, driver: &str, mirror: Option<&str>, more: &[String]) -> Result<Self> {
        // The path of a socket must stay short, so the folder has a short name.
        let dir = tempfile::Builder::new().prefix("obd-").tempdir().at("cannot make a folder in", &std::env::temp_dir())?;
        let socket = dir.path().join("docker.sock");
        let client = dir.path().join("client");
        if let Some(buildx) = &programs.buildx {
            let plugins = client.join("cli-plugins");
            std::fs::create_dir_all(&plugins).at("cannot make", &plugins)?;
            let link = plugins.join("docker-buildx");
            std::os::unix::fs::symlink(buildx, &link).at("cannot make", &link)?;
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path = std::env::join_paths(programs.path.iter().cloned().chain(std::env::split_paths(&path))).unwrap_or(path);
        let settings = dir.path().join("daemon.json");
        std::fs::write(&settings, store.settings()).at("cannot write", &settings)?;
        let mut command = Command::new(&programs.dockerd);
        command
            .env("PATH", path)
            .arg(format!("--config-file={}", settings.display()))
            .arg(format!("--data-root={}", dir.path().join("data").display()))
            .arg(format!("--exec-root={}", dir.path().join("exec").display()))
            .arg(format!("--pidfile={}", dir.path().join("pid").display()))
            .arg(format!("--host=unix://{}", socket.display()))
            .arg(format!("--storage-driver={driver}"))
            .args(["--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-masq=false", "--ip-forward=false"])
            .args(mirror.map(|mirror| format!("--registry-mirror={mirror}")))
            .args(more);
        let mut server = Server::start("dockerd", &mut command, &dir.path().join("log"))?;
        let host = format!("unix://{}", socket.display());
        server.wait(Duration::from_mins(1), || process::output(Command::new(&programs.docker).args(["-H", &host, "version"])).is_ok())?;
        Ok(Self { server: Some(server), dir: Some(dir), socket, programs: programs.clone() })
    }

    /// A `docker` command that talks to this engine and has no configuration of its own.
    pub fn docker(&self) -> Command {
        let mut command = Command::new(&self.programs.docker);
        command.env("DOCKER_HOST", self.host());
        command.envs(self.config().map(|config| ("DOCKER_CONFIG", config)));
        command
    }

    /// The client's configuration folder, which knows the plugin that builds.
    pub fn config(&self) -> Option<PathBuf> {
        self.dir.as_ref().map(|dir| dir.path().join("client"))
    }

    /// Process id of the daemon; `None` only while it ends.
    pub fn pid(&self) -> Option<u32> {
        self.server.as_ref().map(Server::pid)
    }

    /// `unix:///…`.
    pub fn host(&self) -> String {
        format!("unix://{}", self.socket.display())
    }

    /// Runs `docker ARGS` and returns its output.
    pub fn run(&self, args: &[&str]) -> Result<String> {
        process::output(self.docker().args(args))
    }
}

impl Drop for Dockerd {
    fn drop(&mut self) {
        if let Ok(ids) = self.run(&["ps", "-aq"]) {
            for id in ids.split_whitespace() {
                let _ = self.run(&["rm", "-f", id]);
            }
        }
        self.server = None;
        if let Some(dir) = self.dir.take() {
            remove_with_mounts(&dir.keep());
        }
    }
}

/// Removes a folder where an engine worked: its shims and overlay mounts may need a moment after its end, and some mounts it never
/// takes away.
pub fn remove_with_mounts(path: &Path) {
    for _ in 0..20 {
        unmount_below(path);
        if std::fs::remove_dir_all(path).is_ok() || !path.exists() {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Takes away what an engine left mounted in a folder.
pub fn unmount_below(path: &Path) {
    for mount in mounts_below(path) {
        let _ = process::output(Command::new("umount").arg("--lazy").arg(mount));
    }
}

/// Mount points below a folder, deepest first.
fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let table = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let points = table.lines().filter_map(|line| line.split(' ').nth(1)).map(PathBuf::from);
    let mut below: Vec<PathBuf> = points.filter(|point| point.starts_with(dir)).collect();
    below.sort();
    below.reverse();
    below
}
