//! A Docker Engine for one test.

use std::process::Command;

use ovenbird::docker_engine::{DockerEngine, DockerSettings};
use ovenbird_engine::Cancel;
use ovenbird_testing::base::Base;
use ovenbird_testing::dockerd::Dockerd;
use ovenbird_testing::needs::{self, Need};
use ovenbird_testing::process;

/// An engine with busybox in it.
#[allow(dead_code, reason = "no test uses all of it")]
pub(crate) struct Room {
    /// The daemon; ends with it.
    pub(crate) dockerd: Dockerd,
    pub(crate) engine: DockerEngine,
    _dir: tempfile::TempDir,
}

pub(crate) fn settings(host: &str) -> DockerSettings {
    DockerSettings { host: Some(host.into()), ..DockerSettings::default() }
}

pub(crate) fn room(test: &str) -> Option<Room> {
    if !needs::available(test, &[Need::Docker, Need::Registry]) {
        return None;
    }
    let dockerd = match Dockerd::start() {
        Ok(dockerd) => dockerd,
        Err(error) => {
            needs::skip(test, &error.to_string());
            return None;
        }
    };
    let engine = DockerEngine::new(&settings(&dockerd.host())).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let archive = dir.path().join("busybox.tar");
    let (from, to) =
        (format!("oci:{}", Base::Busybox.layout().unwrap().display()), format!("docker-archive:{}:busybox:latest", archive.display()));
    process::output(Command::new("skopeo").args(["copy", "--quiet", &from, &to])).unwrap();
    let mut file = std::fs::File::open(archive).unwrap();
    let said = engine.load(&Cancel::default(), |out| std::io::copy(&mut file, out).map(drop)).unwrap();
    assert!(said.contains("busybox:latest"), "{said}");
    Some(Room { dockerd, engine, _dir: dir })
}
