//! A Prefect server on a loopback port and workers for it, from the Python package index: the real thing, with a database of its own.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

use crate::process::{self, Server};
use crate::{AtPath, Error, Result, cache};

/// How long a server may take to start: a second of work, if nobody else works.
const START: Duration = Duration::from_secs(90);

/// A running server. Dropped: its processes end.
#[derive(Debug)]
pub struct Prefect {
    _server: Server,
    dir: TempDir,
    python: PathBuf,
    port: u16,
    auth: String,
}

impl Prefect {
    /// Starts one without any data, which wants this user and password (`USER:PASSWORD`).
    pub fn start(auth: &str) -> Result<Self> {
        let python = installed()?.join("bin/python");
        let dir = tempfile::Builder::new().prefix("ovenbird-prefect-").tempdir().at("cannot make a folder in", &std::env::temp_dir())?;
        let port = process::free_port()?;
        let mut command = command(&python, dir.path(), "server");
        // What `prefect server start` runs, without a process between.
        command
            .args(["-m", "uvicorn", "--factory", "prefect.server.api.server:create_app", "--host", "127.0.0.1"])
            .args(["--port", &port.to_string(), "--log-level", "warning"])
            .env("PREFECT_SERVER_API_AUTH_STRING", auth)
            .env("PREFECT_API_URL", format!("http://127.0.0.1:{port}/api"))
            .env("PREFECT_SERVER_UI_ENABLED", "false")
            .env("PREFECT_SERVER_SERVICES_LATE_RUNS_AFTER_SECONDS", "2")
            .env("PREFECT_SERVER_SERVICES_LATE_RUNS_LOOP_SECONDS", "1");
        let mut server = Server::start("Prefect", &mut command, &dir.path().join("server.log"))?;
        server.wait(START, || ask(port, auth, "GET", "health", None).is_ok())?;
        Ok(Self { _server: server, dir, python, port, auth: auth.to_owned() })
    }

    /// Address of the API.
    pub fn address(&self) -> String {
        format!("http://127.0.0.1:{}/api", self.port)
    }

    /// Starts a worker of the pool with more variables, and waits until it is online.
    pub fn worker(&self, pool: &str, variables: &[(&str, &Path)]) -> Result<Server> {
        let mut command = command(&self.python, self.dir.path(), pool);
        command
            .args(["-m", "prefect", "worker", "start", "--pool", pool, "--type", "process", "--name", "tests"])
            .env("PREFECT_API_URL", self.address())
            .env("PREFECT_API_AUTH_STRING", &self.auth)
            .env("PREFECT_WORKER_QUERY_SECONDS", "1")
            .envs(variables.iter().copied());
        let mut worker = Server::start("a Prefect worker", &mut command, &self.dir.path().join(format!("worker-{pool}.log")))?;
        worker.wait(START, || {
            let workers = self.call("POST", &format!("work_pools/{pool}/workers/filter"), Some(&serde_json::json!({})));
            workers.is_ok_and(|workers| workers.as_array().is_some_and(|workers| workers.iter().any(|worker| worker["status"] == "ONLINE")))
        })?;
        Ok(worker)
    }

    /// Asks the server.
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        ask(self.port, &self.auth, method, path, body)
    }

    /// What a worker said.
    pub fn log(&self, pool: &str) -> String {
        fs::read_to_string(self.dir.path().join(format!("worker-{pool}.log"))).unwrap_or_default()
    }
}

/// Python with a home of its own.
fn command(python: &Path, dir: &Path, home: &str) -> Command {
    let mut command = Command::new(python);
    let home = dir.join(format!("home-{home}"));
    command
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C.UTF-8")
        .env("HOME", &home)
        .env("PREFECT_HOME", &home)
        .env("TMPDIR", dir)
        .env("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        .env("DO_NOT_TRACK", "1")
        .current_dir(dir);
    command
}

/// Asks again while the database is busy.
fn ask(port: u16, auth: &str, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
    for _ in 0..20 {
        match exchange(port, auth, method, path, body) {
            Err(Error::Malformed { reason, .. }) if reason.contains(" 503 ") => std::thread::sleep(Duration::from_millis(300)),
            done => return done,
        }
    }
    exchange(port, auth, method, path, body)
}

/// One exchange; HTTP/1.0, so that the answer ends with the connection.
fn exchange(port: u16, auth: &str, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
    let malformed = |reason: String| Error::Malformed { place: format!("Prefect's {path}"), reason };
    let body = body.map(Value::to_string).unwrap_or_default();
    let request = format!(
        "{method} /api/{path} HTTP/1.0\r\nHost: 127.0.0.1\r\nAuthorization: Basic {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        base64(auth.as_bytes()),
        body.len()
    );
    let exchange = || -> std::io::Result<Vec<u8>> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        stream.write_all(request.as_bytes())?;
        let mut answer = vec![];
        stream.read_to_end(&mut answer)?;
        Ok(answer)
    };
    let answer = exchange().map_err(|error| malformed(error.to_string()))?;
    let text = String::from_utf8_lossy(&answer);
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(|| malformed("no answer".into()))?;
    if !head.split(' ').nth(1).is_some_and(|status| status.starts_with('2')) {
        return Err(malformed(format!("{} {body}", head.lines().next().unwrap_or_default())));
    }
    if body.is_empty() { Ok(Value::Null) } else { serde_json::from_str(body).map_err(|error| malformed(error.to_string())) }
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for group in bytes.chunks(3) {
        let bits = group.iter().chain([0, 0].iter()).take(3).fold(0usize, |bits, byte| bits << 8 | usize::from(*byte));
        for at in 0..4 {
            out.push(if at <= group.len() { char::from(DIGITS[bits >> (18 - 6 * at) & 63]) } else { '=' });
        }
    }
    out
}

/// The folder of the flow.
pub fn flow() -> PathBuf {
    crate::repository().join("python/ovenbird_flow")
}

/// A virtual environment with what the flow asks for.
fn installed() -> Result<PathBuf> {
    let file = flow().join("requirements.txt");
    let wanted = fs::read_to_string(&file).at("cannot read", &file)?;
    let digest: String = Sha256::digest(wanted.as_bytes()).iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    cache::entry(&format!("prefect-{digest}"), |dir| {
        process::output(Command::new("python3").args(["-m", "venv"]).arg(dir))?;
        // Its scripts have the path of the folder in them, which is renamed: the interpreter finds its way by itself.
        process::output(Command::new(dir.join("bin/python")).args(["-m", "pip", "install", "--quiet", "-r"]).arg(&file)).map(drop)
    })
}

#[cfg(test)]
mod tests {
    #[test]
    fn base64() {
        for (text, expect) in [("", ""), ("a", "YQ=="), ("ab", "YWI="), ("abc", "YWJj"), ("user:pass", "dXNlcjpwYXNz")] {
            assert_eq!(super::base64(text.as_bytes()), expect);
        }
    }
}
