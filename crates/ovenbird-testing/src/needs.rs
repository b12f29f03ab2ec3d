//! What a test needs from the machine, and what happens when it is not there.
//!
//! A test that cannot run prints `SKIP name: reason`. With `OVENBIRD_TESTS_SKIP=deny` (continuous integration) a skip that
//! `allowed-skips` does not name is a failure.

use std::io::Write;
use std::net::{TcpStream, ToSocketAddrs};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use crate::command::Level;
use crate::{base, process, users};

/// One thing a test may need.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Need {
    /// A sandbox level that can run steps.
    Run,
    /// The machine's Debian mirror.
    Network,
    /// A Debian base image (debootstrap, root, and the mirror if it is not cached yet).
    Debian,
    /// A registry with busybox.
    Registry,
    /// Root.
    Root,
    /// A Docker Engine.
    Docker,
    /// The two test users, and the right to become them.
    Users,
    /// `git`, for sources in repositories.
    Git,
    /// Git's support for large files.
    Lfs,
    /// A web server that serves repositories, too.
    Web,
    /// An ssh server and its client.
    Ssh,
    /// Python with virtual environments, for servers from its package index.
    Python,
    /// A Kubernetes cluster of our own.
    Kubernetes,
    /// `setcap`, `setfacl`, `setfattr`, and the right to use them.
    Attributes,
}

impl Need {
    /// From the word in a case file.
    pub fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "run" => Self::Run,
            "network" => Self::Network,
            "debian" => Self::Debian,
            "registry" => Self::Registry,
            "root" => Self::Root,
            "docker" => Self::Docker,
            "users" => Self::Users,
            "git" => Self::Git,
            "lfs" => Self::Lfs,
            "web" => Self::Web,
            "ssh" => Self::Ssh,
            "python" => Self::Python,
            "kubernetes" => Self::Kubernetes,
            "attributes" => Self::Attributes,
            _ => return None,
        })
    }

    /// Why the machine cannot give it; `None` if it can.
    pub fn missing(self) -> Option<String> {
        let program =
            |name: &str, package: &str| (!process::on_path(name)).then(|| format!("{name} is missing (Debian package {package})"));
        let root = || (!rustix::process::geteuid().is_root()).then(|| "not root".to_owned());
        match self {
            Self::Run => {
                static LEVEL: OnceLock<Option<String>> = OnceLock::new();
                LEVEL.get_or_init(no_level).clone()
            }
            Self::Network => no_mirror(),
            Self::Debian => root()
                .or_else(|| program("debootstrap", "debootstrap"))
                .or_else(|| if base::Base::Debian.is_cached() { None } else { no_mirror() }),
            Self::Registry => program("docker-registry", "docker-registry")
                .or_else(|| program("skopeo", "skopeo"))
                .or_else(|| program("openssl", "openssl"))
                .or_else(|| program("busybox", "busybox-static")),
            Self::Root => root(),
            Self::Docker => root().or_else(|| program("dockerd", "docker.io")).or_else(|| program("docker", "docker.io")),
            Self::Users => root()
                .or_else(|| program("newuidmap", "uidmap"))
                .or_else(|| users::User::SubId.ensure().err().map(|error| error.to_string()))
                .or_else(|| users::User::Plain.ensure().err().map(|error| error.to_string())),
            Self::Git => program("git", "git"),
            Self::Lfs => program("git-lfs", "git-lfs"),
            Self::Web => program("lighttpd", "lighttpd, with lighttpd-mod-openssl").or_else(|| program("openssl", "openssl")),
            Self::Ssh => program("sshd", "openssh-server").or_else(|| program("ssh-agent", "openssh-client")),
            Self::Python => process::output(Command::new("python3").args(["-c", "import venv, ensurepip"]))
                .err()
                .map(|_| "python3 with venv is missing (Debian package python3-venv)".to_owned()),
            Self::Kubernetes => crate::kubernetes::missing().or_else(|| if crate::kubernetes::is_cached() { None } else { no_mirror() }),
            Self::Attributes => root()
                .or_else(|| program("setcap", "libcap2-bin"))
                .or_else(|| program("setfacl", "acl"))
                .or_else(|| program("setfattr", "attr")),
        }
    }
}

/// What a level itself cannot give.
pub fn missing_at(level: Level, need: Need) -> Option<&'static str> {
    match (need, level) {
        (Need::Root, Level::Rootless | Level::SingleId | Level::Traced) => Some("only for root"),
        _ => None,
    }
}

/// True when the test can run; else says so.
///
/// # Panics
/// Like [`skip`].
pub fn available(test: &str, needs: &[Need]) -> bool {
    match needs.iter().find_map(|need| need.missing()) {
        None => true,
        Some(reason) => {
            skip(test, &reason);
            false
        }
    }
}

/// Reports a skip.
///
/// # Panics
/// When skips are denied and this one is not on the list: the panic is the test's failure.
pub fn skip(test: &str, reason: &str) {
    let line = format!("SKIP {test}: {reason}");
    println!("{line}");
    if let Some(log) = std::env::var_os("OVENBIRD_TESTS_SKIP_LOG")
        && let Ok(mut file) = std::fs::File::options().append(true).create(true).open(log)
    {
        let _ = writeln!(file, "{line}");
    }
    let denied = std::env::var("OVENBIRD_TESTS_SKIP").is_ok_and(|value| value == "deny");
    assert!(!denied || is_allowed(test), "{line} (not named in crates/ovenbird-testing/allowed-skips)");
}

fn is_allowed(test: &str) -> bool {
    include_str!("../allowed-skips")
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_whitespace().next())
        .any(|name| name.strip_suffix('*').map_or(name == test, |prefix| test.starts_with(prefix)))
}

fn no_level() -> Option<String> {
    let doctor = match crate::command::ovenbird() {
        Ok(mut command) => process::output(command.args(["doctor", "--json"])),
        Err(error) => return Some(error.to_string()),
    };
    // An ill-behaved `doctor` must fail the tests, not skip them.
    let chosen = doctor.ok().and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok());
    match chosen {
        Some(probe) if probe.get("chosen").is_some_and(serde_json::Value::is_null) => Some("no sandbox level works on this machine".into()),
        _ => None,
    }
}

/// Host and port of the first Debian source of the machine.
fn no_mirror() -> Option<String> {
    static MIRROR: OnceLock<Option<String>> = OnceLock::new();
    MIRROR
        .get_or_init(|| {
            let Some(uri) = base::mirror() else { return Some("apt knows no Debian source".into()) };
            let (scheme, rest) = uri.split_once("://")?;
            if !matches!(scheme, "http" | "https") {
                return None;
            }
            // With a proxy configured for apt the mirror need not be reachable directly.
            if process::output(Command::new("apt-config").args(["dump", "Acquire::http::Proxy"])).is_ok_and(|text| !text.trim().is_empty())
            {
                return None;
            }
            let host = rest.split('/').next().unwrap_or(rest);
            let address = if host.contains(':') { host.to_owned() } else { format!("{host}:{}", if scheme == "http" { 80 } else { 443 }) };
            let reached = address
                .to_socket_addrs()
                .is_ok_and(|mut all| all.any(|one| TcpStream::connect_timeout(&one, Duration::from_secs(5)).is_ok()));
            (!reached).then(|| "the machine's Debian mirror cannot be reached".to_owned())
        })
        .clone()
}
