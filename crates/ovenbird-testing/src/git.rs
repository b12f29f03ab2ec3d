//! Repositories, and the servers that they are fetched from: `git http-backend` behind lighttpd, over HTTP and HTTPS, and sshd.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use crate::process::{self, Server};
use crate::registry::certify;
use crate::{AtPath, Error, Result};

/// A repository with a working tree.
#[derive(Debug)]
pub struct Repository {
    dir: PathBuf,
}

impl Repository {
    /// Makes an empty one in a folder that is not there yet; its branch is `main`.
    pub fn create(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).at("cannot make", dir)?;
        let this = Self { dir: dir.to_owned() };
        this.git(&["init", "--quiet", "--initial-branch=main"])?;
        Ok(this)
    }

    /// Where.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Runs git in it; gives what it prints.
    pub fn git(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new("git");
        command
            .current_dir(&self.dir)
            .args(["-c", "user.name=t", "-c", "user.email=t@t", "-c", "protocol.file.allow=always"])
            .args(arguments);
        command.env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_COMMITTER_DATE", "1700000000 +0000");
        process::output(&mut command).map(|text| text.trim().to_owned())
    }

    /// Writes files and commits everything; gives the commit.
    pub fn commit(&self, files: &[(&str, &str)]) -> Result<String> {
        for (name, text) in files {
            let path = self.dir.join(name);
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent).at("cannot make", parent)?;
            }
            fs::write(&path, text).at("cannot write", &path)?;
        }
        self.git(&["add", "--all"])?;
        self.git(&["commit", "--quiet", "--allow-empty", "--message", "change"])?;
        self.git(&["rev-parse", "HEAD"])
    }
}

/// A web server: `/git/…` are repositories, `/git/private/…` those for who brings a password, everything else are files. `/renamed/PATH` sends on
/// to `/git/PATH`, `/elsewhere/PORT/PATH` to that of another server.
#[derive(Debug)]
pub struct WebServer {
    _server: Server,
    dir: TempDir,
    port: u16,
    tls: bool,
}

impl WebServer {
    /// Who may read `/git/private` and `/private`.
    pub const CREDENTIALS: (&'static str, &'static str) = ("x-access-token", "tok-3141-hunter2");

    /// Starts one. With `tls` it has a certificate of its own, which nobody trusts.
    pub fn start(tls: bool) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("ovenbird-web-").tempdir().at("cannot make a folder in", &std::env::temp_dir())?;
        crate::command::set_mode(dir.path(), 0o755)?;
        for folder in ["www/git/private", "www/private"] {
            fs::create_dir_all(dir.path().join(folder)).at("cannot make", dir.path())?;
        }
        if tls {
            certify(dir.path(), "server", "subjectAltName=IP:127.0.0.1")?;
        }
        let place = dir.path().display().to_string();
        let (user, password) = Self::CREDENTIALS;
        let passwords = dir.path().join("passwords");
        fs::write(&passwords, format!("{user}:{password}\n")).at("cannot write", &passwords)?;
        let mut last = None;
        for _ in 0..5 {
            let port = process::free_port()?;
            let secure = if tls { format!("ssl.engine = \"enable\"\nssl.pemfile = \"{place}/server.both\"\n") } else { String::new() };
            let text = format!(
                "server.document-root = \"{place}/www\"\nserver.bind = \"127.0.0.1\"\nserver.port = {port}\n\
                 server.modules = (\"mod_auth\", \"mod_authn_file\", \"mod_redirect\", \"mod_setenv\", \"mod_alias\", \"mod_cgi\"{openssl})\n{secure}\
                 auth.backend = \"plain\"\nauth.backend.plain.userfile = \"{place}/passwords\"\n\
                 url.redirect = (\"^/renamed/(.*)\" => \"/git/$1\", \"^/elsewhere/([0-9]+)/(.*)\" => \"http://127.0.0.1:$1/git/$2\")\n\
                 $HTTP[\"url\"] =~ \"^/(git/)?private\" {{ auth.require = (\"\" => (\"method\" => \"basic\", \"realm\" => \"git\", \"require\" => \"valid-user\")) }}\n\
                 $HTTP[\"url\"] =~ \"^/git/\" {{\n alias.url = (\"/git\" => \"/usr/lib/git-core/git-http-backend\")\n cgi.assign = (\"\" => \"\")\n \
                 setenv.add-environment = (\"GIT_PROJECT_ROOT\" => \"{place}/www/git\", \"GIT_HTTP_EXPORT_ALL\" => \"1\", \"GIT_CONFIG_GLOBAL\" => \"/dev/null\")\n}}\n",
                openssl = if tls { ", \"mod_openssl\"" } else { "" },
            );
            let config = dir.path().join("lighttpd.conf");
            fs::write(&config, text).at("cannot write", &config)?;
            let mut server = Server::start("lighttpd", Command::new("lighttpd").arg("-D").arg("-f").arg(&config), &dir.path().join("log"))?;
            match server.wait(Duration::from_secs(20), || process::accepts(port)) {
                Ok(()) => return Ok(Self { _server: server, dir, port, tls }),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| Error::Missing("no loopback port".into())))
    }

    /// Its address: `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("{}://{}", if self.tls { "https" } else { "http" }, self.address())
    }

    /// `127.0.0.1:PORT`.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Its certificate.
    pub fn certificate(&self) -> PathBuf {
        self.dir.path().join("server.pem")
    }

    /// The folder of what it serves.
    pub fn files(&self) -> PathBuf {
        self.dir.path().join("www")
    }

    /// Serves a repository as `/git/NAME`, as it is now.
    pub fn publish(&self, repository: &Repository, name: &str) -> Result<()> {
        let to = self.files().join("git").join(name);
        if to.exists() {
            fs::remove_dir_all(&to).at("cannot remove", &to)?;
        }
        let mut command = Command::new("git");
        command.args(["clone", "--quiet", "--mirror"]).arg(repository.path()).arg(&to).env("GIT_CONFIG_GLOBAL", "/dev/null");
        process::output(&mut command).map(drop)
    }
}

/// An ssh server for this process's user, with a key that is allowed in.
#[derive(Debug)]
pub struct SshServer {
    _server: Server,
    dir: TempDir,
    port: u16,
}

impl SshServer {
    /// Starts one.
    pub fn start() -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("ovenbird-ssh-").tempdir().at("cannot make a folder in", &std::env::temp_dir())?;
        crate::command::set_mode(dir.path(), 0o755)?;
        for name in ["host", "key"] {
            let mut command = Command::new("ssh-keygen");
            command.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(dir.path().join(name));
            process::output(&mut command)?;
        }
        if rustix::process::geteuid().is_root() {
            let separate = Path::new("/run/sshd");
            fs::create_dir_all(separate).at("cannot make", separate)?;
        }
        let place = dir.path().display().to_string();
        let mut last = None;
        for _ in 0..5 {
            let port = process::free_port()?;
            let text = format!(
                "Port {port}\nListenAddress 127.0.0.1\nHostKey {place}/host\nAuthorizedKeysFile {place}/key.pub\nPidFile none\nUsePAM no\n\
                 StrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n"
            );
            let config = dir.path().join("sshd_config");
            fs::write(&config, text).at("cannot write", &config)?;
            let mut server =
                Server::start("sshd", Command::new("/usr/sbin/sshd").args(["-D", "-e", "-f"]).arg(&config), &dir.path().join("log"))?;
            match server.wait(Duration::from_secs(20), || process::accepts(port)) {
                Ok(()) => return Ok(Self { _server: server, dir, port }),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| Error::Missing("no loopback port".into())))
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The private key that is allowed in.
    pub fn key(&self) -> PathBuf {
        self.dir.path().join("key")
    }

    /// The line of `known_hosts` that knows it.
    pub fn known_host(&self) -> Result<String> {
        let path = self.dir.path().join("host.pub");
        let key = fs::read_to_string(&path).at("cannot read", &path)?;
        Ok(format!("[127.0.0.1]:{} {key}", self.port))
    }
}
