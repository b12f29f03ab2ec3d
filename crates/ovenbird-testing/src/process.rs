//! Child processes of fixtures: run to the end, or keep as a server that dies with its value.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::{AtPath, Error, Result};

/// Runs a command to its end and returns its standard output; a non-zero end is an error that holds both streams.
pub fn output(command: &mut Command) -> Result<String> {
    let done = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| Error::Start { program: command.get_program().to_string_lossy().into_owned(), source })?;
    let stdout = String::from_utf8_lossy(&done.stdout).into_owned();
    if done.status.success() {
        return Ok(stdout);
    }
    Err(Error::Failed { command: format!("{command:?}"), status: done.status, output: stdout + &String::from_utf8_lossy(&done.stderr) })
}

/// Is a program on the path?
pub fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]).any(|dir| dir.join(program).is_file())
}

/// A loopback port that was free a moment ago.
pub fn free_port() -> Result<u16> {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let bound = TcpListener::bind(any).and_then(|l| l.local_addr());
    Ok(bound.map_err(|source| Error::Start { program: "a listener on loopback".into(), source })?.port())
}

/// A server process. Dropped: asked to end, and killed if it does not within ten seconds.
#[derive(Debug)]
pub struct Server {
    child: Child,
    name: &'static str,
    log: PathBuf,
}

impl Server {
    /// Starts it with both output streams in `log`.
    pub fn start(name: &'static str, command: &mut Command, log: &Path) -> Result<Self> {
        let file = File::create(log).at("cannot make", log)?;
        let second = file.try_clone().at("cannot open", log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(second)
            .spawn()
            .map_err(|source| Error::Start { program: name.into(), source })?;
        Ok(Self { child, name, log: log.to_path_buf() })
    }

    /// Waits until `ready` says yes; fails when the server ended or the time is over.
    pub fn wait(&mut self, limit: Duration, ready: impl Fn() -> bool) -> Result<()> {
        let end = Instant::now() + limit;
        while !ready() {
            let ended = self.child.try_wait().is_ok_and(|status| status.is_some());
            if ended || Instant::now() > end {
                return Err(Error::NotReady { server: self.name, seconds: limit.as_secs(), log: self.log_tail() });
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        text.lines().rev().take(20).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(pid) = Pid::from_raw(self.child.id().cast_signed()) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let end = Instant::now() + Duration::from_secs(10);
        while Instant::now() < end {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Does something accept connections there?
pub fn accepts(port: u16) -> bool {
    accepts_at("127.0.0.1", port)
}

/// The same at another address of this machine.
pub fn accepts_at(host: &str, port: u16) -> bool {
    let address = host.parse().map(|host: Ipv4Addr| SocketAddr::from((host, port)));
    address.is_ok_and(|address| TcpStream::connect_timeout(&address, Duration::from_millis(200)).is_ok())
}
