//! Amazon's services as `moto` plays them: a real server of the same wire format, from the Python package index.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use crate::process::{self, Server};
use crate::{AtPath, Result, cache};

/// The version that is installed: its answers are part of the tests.
const PACKAGE: &str = "moto[server]==5.2.5";

/// A running server. Dropped: the process ends.
#[derive(Debug)]
pub struct Moto {
    _server: Server,
    _dir: TempDir,
    port: u16,
}

impl Moto {
    /// Starts one without any data. Its package is fetched once and kept in the cache.
    pub fn start() -> Result<Self> {
        let python = installed()?.join("bin/python");
        let dir = tempfile::Builder::new().prefix("ovenbird-moto-").tempdir().at("cannot make a folder in", &std::env::temp_dir())?;
        let port = process::free_port()?;
        let mut command = Command::new(python);
        command.args(["-m", "moto.server", "-H", "127.0.0.1", "-p", &port.to_string()]).current_dir(dir.path());
        let mut server = Server::start("moto", &mut command, &dir.path().join("log"))?;
        server.wait(Duration::from_mins(1), || process::accepts(port))?;
        Ok(Self { _server: server, _dir: dir, port })
    }

    /// Loopback port.
    pub fn port(&self) -> u16 {
        self.port
    }
}

/// A virtual environment with the package.
fn installed() -> Result<PathBuf> {
    cache::entry("moto-5.2.5", |dir| {
        process::output(Command::new("python3").args(["-m", "venv"]).arg(dir))?;
        // Its scripts have the path of the folder in them, which is renamed: the interpreter finds its way by itself.
        process::output(Command::new(dir.join("bin/python")).args(["-m", "pip", "install", "--quiet", PACKAGE])).map(drop)
    })
}
