//! Debian's `docker-registry` on a loopback port, filled with base images.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use crate::base::Base;
use crate::process::{self, Server};
use crate::{AtPath, Error, Result};

/// Where registries listen.
const LOOPBACK: &str = "127.0.0.1";

/// A running registry. Dropped: the process ends and its storage is removed.
#[derive(Debug)]
pub struct Registry {
    // Order matters: the server must be dead before its storage goes.
    _server: Server,
    dir: TempDir,
    host: String,
    port: u16,
}

/// What a registry starts with.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options<'a> {
    /// Base images that are already there, as `library/NAME`.
    pub bases: &'a [Base],
    /// User and password that every request must bring.
    pub credentials: Option<(&'a str, &'a str)>,
}

/// Who proves to be who.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tls {
    /// The registry.
    Server,
    /// The registry and who asks.
    Both,
}

impl Registry {
    /// One with `library/busybox`, open to all.
    pub fn start() -> Result<Self> {
        Self::start_with(Options { bases: &[Base::Busybox], ..Options::default() })
    }

    /// One as described.
    pub fn start_with(options: Options<'_>) -> Result<Self> {
        Self::start_over(LOOPBACK, options, None)
    }

    /// One as described, at another address of this machine.
    pub fn start_at(host: &str, options: Options<'_>) -> Result<Self> {
        Self::start_over(host, options, None)
    }

    /// One as described, with a certificate of its own for 127.0.0.1, which nobody trusts.
    pub fn start_with_tls(options: Options<'_>, tls: Tls) -> Result<Self> {
        Self::start_over(LOOPBACK, options, Some(tls))
    }

    fn start_over(host: &str, options: Options<'_>, tls: Option<Tls>) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("ovenbird-registry-").tempdir().at("cannot make a folder in", &std::env::temp_dir())?;
        let storage = dir.path().join("storage");
        fs::create_dir(&storage).at("cannot make", &storage)?;
        for base in options.bases {
            lay_out(&base.registry_storage()?, &storage)?;
        }
        Self::serve(dir, host, options.credentials, tls)
    }

    /// One on an existing storage folder, for filling it.
    pub(crate) fn start_on(storage: &Path) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("ovenbird-registry-").tempdir().at("cannot make a folder in", &std::env::temp_dir())?;
        let link = dir.path().join("storage");
        std::os::unix::fs::symlink(storage, &link).at("cannot make", &link)?;
        Self::serve(dir, LOOPBACK, None, None)
    }

    fn serve(dir: TempDir, host: &str, credentials: Option<(&str, &str)>, tls: Option<Tls>) -> Result<Self> {
        let auth = match credentials {
            None => String::new(),
            Some((user, password)) => {
                let file = dir.path().join("htpasswd");
                write_password(&file, user, password)?;
                format!("auth: {{htpasswd: {{realm: ovenbird, path: {}}}}}\n", file.display())
            }
        };
        if tls.is_some() {
            certify(dir.path(), "server", "subjectAltName=IP:127.0.0.1")?;
            certify(dir.path(), "client", "subjectAltName=email:me@example.test")?;
        }
        let place = dir.path().display();
        let tls = match tls {
            None => String::new(),
            Some(Tls::Server) => format!(", tls: {{certificate: {place}/server.pem, key: {place}/server.key}}"),
            Some(Tls::Both) => {
                format!(", tls: {{certificate: {place}/server.pem, key: {place}/server.key, clientcas: [{place}/client.pem]}}")
            }
        };
        let config = dir.path().join("config.yml");
        // A port found free may be taken before the registry binds it: try a few.
        let mut last = None;
        for _ in 0..5 {
            let port = process::free_port()?;
            let text = format!(
                "version: 0.1\nlog: {{level: warn}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\n  delete: {{enabled: true}}\nhttp: {{addr: \"{host}:{port}\", secret: ovenbird{tls}}}\n{auth}",
                dir.path().join("storage").display()
            );
            fs::write(&config, text).at("cannot write", &config)?;
            let mut command = Command::new("docker-registry");
            // Its version check and tracing would look for other hosts.
            command.arg("serve").arg(&config).env("OTEL_TRACES_EXPORTER", "none");
            let mut server = Server::start("docker-registry", &mut command, &dir.path().join("log"))?;
            match server.wait(Duration::from_secs(20), || process::accepts_at(host, port)) {
                Ok(()) => return Ok(Self { _server: server, dir, host: host.to_owned(), port }),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| Error::Missing("no loopback port".into())))
    }

    /// `HOST:PORT`.
    pub fn address(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Takes this name and password from now on, in place of what it took before. Only one that started with credentials looks at them.
    pub fn set_credentials(&self, user: &str, password: &str) -> Result<()> {
        write_password(&self.dir.path().join("htpasswd"), user, password)
    }

    /// The registry's certificate, where it has one.
    pub fn certificate(&self) -> std::path::PathBuf {
        self.dir.path().join("server.pem")
    }

    /// Certificate and key that a registry with [`Tls::Both`] takes.
    pub fn client_identity(&self) -> std::path::PathBuf {
        self.dir.path().join("client.both")
    }

    /// Folder that holds every blob and manifest, for looking at them or damaging them.
    pub fn storage(&self) -> std::path::PathBuf {
        self.dir.path().join("storage/docker/registry/v2")
    }

    /// Settings file text that makes this registry the mirror of Docker Hub.
    pub fn settings_toml(&self) -> String {
        mirror_toml(&self.address())
    }

    /// Copies an OCI layout or archive (`oci:DIR`, `oci-archive:FILE`) into a repository of this registry.
    pub fn push(&self, source: &str, name: &str) -> Result<()> {
        let target = format!("docker://{}/{name}", self.address());
        process::output(Command::new("skopeo").args(["copy", "--quiet", "--dest-tls-verify=false", source, &target])).map(drop)
    }
}

/// A certificate that signs itself: `NAME.pem`, `NAME.key`, and both in `NAME.both`.
pub(crate) fn certify(dir: &Path, name: &str, extension: &str) -> Result<()> {
    let (pem, key, both) = (dir.join(format!("{name}.pem")), dir.join(format!("{name}.key")), dir.join(format!("{name}.both")));
    let mut command = Command::new("openssl");
    command.args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]);
    // An authority's certificate would not be taken as a server's.
    command.args(["-addext", extension, "-addext", "basicConstraints=critical,CA:FALSE"]);
    process::output(command.arg("-keyout").arg(&key).arg("-out").arg(&pem))?;
    let text = fs::read_to_string(&pem).at("cannot read", &pem)? + &fs::read_to_string(&key).at("cannot read", &key)?;
    fs::write(&both, text).at("cannot write", &both)
}

fn write_password(file: &Path, user: &str, password: &str) -> Result<()> {
    let line = process::output(Command::new("htpasswd").args(["-Bbn", user, password]))?;
    let half = file.with_extension("half");
    fs::write(&half, line).at("cannot write", &half)?;
    fs::rename(&half, file).at("cannot name", file)
}

/// Settings file text that makes `address` the plain-HTTP mirror of Docker Hub.
pub fn mirror_toml(address: &str) -> String {
    format!("[registry.\"docker.io\"]\nmirrors = [\"{address}\"]\nplain_http = true\n")
}

/// Blobs never change, so they are linked; the small files beside them (tags) are rewritten in place, so they are copied.
fn lay_out(cached: &Path, storage: &Path) -> Result<()> {
    let from = cached.join("docker/registry/v2");
    let to = storage.join("docker/registry/v2");
    fs::create_dir_all(&to).at("cannot make", &to)?;
    let linked = process::output(Command::new("cp").arg("-al").arg(from.join("blobs")).arg(&to));
    if linked.is_err() {
        // Another file system than the cache's.
        process::output(Command::new("cp").arg("-a").arg(from.join("blobs")).arg(&to))?;
    }
    process::output(Command::new("cp").arg("-a").arg(from.join("repositories")).arg(&to)).map(drop)
}
