//! Containers: made, started, attached to, waited for, removed.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io::{self, Write};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bollard::container::LogOutput;
use bollard::models::{ContainerCreateBody, DeviceMapping, HostConfig, HostConfigCgroupnsModeEnum};
use bollard::query_parameters as query;
use bytes::Bytes;
use futures_util::StreamExt as _;
use ovenbird_engine::Cancel;
use tokio::io::{AsyncWrite, AsyncWriteExt as _};
use tokio::sync::mpsc;

use super::connection::Allowance;
use super::{DockerEngine, DockerEngineError, VALUE};

/// Pieces of output that wait to be read.
const WAITING: usize = 64;

/// A container to be made.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ContainerSpec {
    /// Name or id of the image.
    pub image: String,
    /// Name of the container; `None`: the engine makes one up.
    pub name: Option<String>,
    /// Instead of the image's entrypoint.
    pub entrypoint: Option<Vec<String>>,
    /// Command; empty: the image's.
    pub command: Vec<String>,
    /// `NAME=VALUE`.
    pub env: Vec<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// `SOURCE:TARGET[:ro]`.
    pub binds: Vec<String>,
    /// Memory file systems: where, and mount options.
    pub tmpfs: BTreeMap<String, String>,
    /// Every capability and device.
    pub privileged: bool,
    /// Capabilities to add.
    pub cap_add: Vec<String>,
    /// `seccomp=unconfined`…
    pub security_options: Vec<String>,
    /// Devices of the machine, by their path, which is the same inside.
    pub devices: Vec<String>,
    /// `none`, `host`, `bridge` or a network's name; `None`: the engine's default.
    pub network: Option<String>,
    /// Inside.
    pub working_directory: Option<String>,
    /// `USER[:GROUP]`.
    pub user: Option<String>,
    /// Standard input stays open until who is attached closes it.
    pub stdin: bool,
    /// The engine removes it when it ends.
    pub auto_remove: bool,
    /// The machine's cgroups.
    pub host_cgroups: bool,
    /// Bytes; `None`: no limit.
    pub memory: Option<i64>,
}

/// A container that there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerSummary {
    /// Its id.
    pub id: String,
    /// Its names.
    pub names: Vec<String>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Does it run?
    pub running: bool,
    /// When it was made, seconds since 1970.
    pub created: i64,
}

/// Which stream of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Both directions of a container.
#[derive(Debug)]
pub struct Attached<'a> {
    /// Its standard input.
    pub input: AttachedInput<'a>,
    /// What it says.
    pub output: AttachedOutput,
}

/// Standard input of a container; dropped: closed.
pub struct AttachedInput<'a> {
    engine: &'a DockerEngine,
    inner: Pin<Box<dyn AsyncWrite + Send>>,
}

impl fmt::Debug for AttachedInput<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AttachedInput").finish_non_exhaustive()
    }
}

impl AttachedInput<'_> {
    fn block_on<T>(&mut self, work: impl AsyncFnOnce(&mut Pin<Box<dyn AsyncWrite + Send>>) -> io::Result<T>) -> io::Result<T> {
        self.engine.runtime().map_err(io::Error::other)?.block_on(work(&mut self.inner))
    }
}

impl Write for AttachedInput<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.block_on(async |inner| inner.write(bytes).await)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.block_on(async |inner| inner.flush().await)
    }
}

impl Drop for AttachedInput<'_> {
    fn drop(&mut self) {
        // The container sees the end of its input; who has gone already needs no telling.
        let _ = self.block_on(async |inner| inner.shutdown().await);
    }
}

/// What a container says, piece by piece, as it says it. Ends when the container does.
#[derive(Debug)]
pub struct AttachedOutput(mpsc::Receiver<Result<(Stream, Bytes), DockerEngineError>>);

impl Iterator for AttachedOutput {
    type Item = Result<(Stream, Bytes), DockerEngineError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.blocking_recv()
    }
}

fn piece(output: LogOutput) -> (Stream, Bytes) {
    match output {
        LogOutput::StdErr { message } => (Stream::Stderr, message),
        LogOutput::StdOut { message } | LogOutput::StdIn { message } | LogOutput::Console { message } => (Stream::Stdout, message),
    }
}

impl ContainerSpec {
    fn body(&self) -> ContainerCreateBody {
        let list = |list: &[String]| Some(list.to_vec()).filter(|list| !list.is_empty());
        let map = |map: &BTreeMap<String, String>| -> Option<HashMap<String, String>> {
            (!map.is_empty()).then(|| map.iter().map(|(k, v)| (k.clone(), v.clone())).collect())
        };
        let device = |path: &String| DeviceMapping {
            path_on_host: Some(path.clone()),
            path_in_container: Some(path.clone()),
            cgroup_permissions: Some("rwm".into()),
        };
        ContainerCreateBody {
            image: Some(self.image.clone()),
            entrypoint: self.entrypoint.clone(),
            cmd: list(&self.command),
            env: list(&self.env),
            labels: map(&self.labels),
            working_dir: self.working_directory.clone(),
            user: self.user.clone(),
            tty: Some(false),
            attach_stdin: Some(self.stdin),
            attach_stdout: Some(true),
            attach_stderr: Some(true),
            open_stdin: Some(self.stdin),
            stdin_once: Some(self.stdin),
            host_config: Some(HostConfig {
                binds: list(&self.binds),
                tmpfs: map(&self.tmpfs),
                privileged: Some(self.privileged),
                cap_add: list(&self.cap_add),
                security_opt: list(&self.security_options),
                devices: Some(self.devices.iter().map(device).collect()),
                network_mode: self.network.clone(),
                auto_remove: Some(self.auto_remove),
                cgroupns_mode: self.host_cgroups.then_some(HostConfigCgroupnsModeEnum::HOST),
                memory: self.memory,
                ..HostConfig::default()
            }),
            ..ContainerCreateBody::default()
        }
    }
}

impl DockerEngine {
    /// Makes a container and gives its id. Pulls nothing.
    pub fn create_container(&self, spec: &ContainerSpec) -> Result<String, DockerEngineError> {
        let options = query::CreateContainerOptions { name: spec.name.clone(), ..query::CreateContainerOptions::default() };
        let made = self.ask("container creation", async |client| client.create_container(Some(options), spec.body()).await)?;
        Ok(made.id)
    }

    /// Starts it.
    pub fn start_container(&self, id: &str) -> Result<(), DockerEngineError> {
        self.ask("container start", async |client| client.start_container(id, None::<query::StartContainerOptions>).await)
    }

    /// Attaches to it: before it is started, nothing of what it says is missed. Standard input only when it was made with one.
    pub fn attach_container(&self, id: &str, stdin: bool) -> Result<Attached<'_>, DockerEngineError> {
        let options =
            query::AttachContainerOptions { stream: true, stdin, stdout: true, stderr: true, ..query::AttachContainerOptions::default() };
        let (call, allowance) = ("attach", Allowance::new(VALUE));
        let attach = async |client: &bollard::Docker| client.attach_container(id, Some(options)).await;
        let attached = self.ask_on(self.runtime()?, &allowance, call, self.patience, attach)?;
        let output = self.pump(call, allowance, attached.output)?;
        Ok(Attached { input: AttachedInput { engine: self, inner: attached.input }, output })
    }

    /// What it has said, and with `follow` what it says until it ends.
    pub fn container_logs(&self, id: &str, follow: bool) -> Result<AttachedOutput, DockerEngineError> {
        let options = query::LogsOptions { follow, stdout: true, stderr: true, ..query::LogsOptions::default() };
        let allowance = Allowance::new(VALUE);
        let client = self.client(&allowance)?;
        let logs = {
            let _entered = self.runtime()?.enter();
            client.logs(id, Some(options))
        };
        self.pump("logs", allowance, logs)
    }

    /// Moves a stream onto a channel that can be read without a runtime.
    fn pump(
        &self,
        call: &'static str,
        allowance: Arc<Allowance>,
        mut from: impl futures_util::Stream<Item = Result<LogOutput, bollard::errors::Error>> + Send + Unpin + 'static,
    ) -> Result<AttachedOutput, DockerEngineError> {
        let (sender, receiver) = mpsc::channel(WAITING);
        let endpoint = self.to_string();
        self.runtime()?.spawn(async move {
            while let Some(next) = from.next().await {
                let exceeded = allowance.exceeded();
                allowance.restart();
                let next = next.map(piece).map_err(|error| match error {
                    bollard::errors::Error::DockerResponseServerError { status_code, message } => {
                        DockerEngineError::Refused { call: call.into(), status: status_code, message }
                    }
                    other => {
                        let reason = exceeded.unwrap_or_else(|| other.to_string());
                        DockerEngineError::Broken { endpoint: endpoint.clone(), call: call.into(), reason }
                    }
                });
                let failed = next.is_err();
                if sender.send(next).await.is_err() || failed {
                    break;
                }
            }
        });
        Ok(AttachedOutput(receiver))
    }

    /// Waits until it ends and gives its exit code.
    pub fn wait_container(&self, id: &str, cancel: &Cancel) -> Result<i64, DockerEngineError> {
        self.work("wait", cancel, async |client, _| {
            use bollard::errors::Error as Told;
            match client.wait_container(id, None::<query::WaitContainerOptions>).next().await {
                Some(Ok(ended)) => Ok(ended.status_code),
                // The client makes an error of every code but 0.
                Some(Err(Told::DockerContainerWaitError { error, code })) if error.is_empty() => Ok(code),
                Some(Err(Told::DockerContainerWaitError { error, .. })) => {
                    Err(DockerEngineError::Refused { call: "wait".into(), status: 200, message: error })
                }
                Some(Err(error)) => Err(self.told("wait", error)),
                None => {
                    Err(DockerEngineError::Broken { endpoint: self.to_string(), call: "wait".into(), reason: "the answer is empty".into() })
                }
            }
        })
    }

    /// Ends it: asked first, killed when it still runs after `grace`.
    pub fn stop_container(&self, id: &str, grace: Duration) -> Result<(), DockerEngineError> {
        let seconds = i32::try_from(grace.as_secs()).unwrap_or(i32::MAX);
        let options = query::StopContainerOptions { t: Some(seconds), ..query::StopContainerOptions::default() };
        self.ask("container stop", async |client| client.stop_container(id, Some(options)).await)
    }

    /// Removes it and its unnamed volumes, running or not. One that is gone is fine.
    pub fn remove_container(&self, id: &str) -> Result<(), DockerEngineError> {
        match self.remove(id, true) {
            // 409: someone else is removing it.
            Err(error) if error.is_not_found() || matches!(error, DockerEngineError::Refused { status: 409, .. }) => Ok(()),
            other => other,
        }
    }

    pub(super) fn remove(&self, id: &str, force: bool) -> Result<(), DockerEngineError> {
        let options = query::RemoveContainerOptions { v: true, force, link: false };
        self.ask("container removal", async |client| client.remove_container(id, Some(options)).await)
    }

    /// Puts a tar that `write` makes into the folder `path` of a container, which need not run.
    pub fn put_archive(
        &self,
        id: &str,
        path: &str,
        cancel: &Cancel,
        write: impl FnOnce(&mut dyn Write) -> io::Result<()> + Send,
    ) -> Result<(), DockerEngineError> {
        let call = "archive upload";
        let options = query::UploadToContainerOptions { path: path.into(), ..query::UploadToContainerOptions::default() };
        self.send(call, cancel, write, async |client, _, body| {
            let body = bollard::body_try_stream(body.into_stream());
            client.upload_to_container(id, Some(options), body).await.map_err(|error| self.told(call, error))
        })
    }

    /// All containers with this label (`NAME` or `NAME=VALUE`), running or not.
    pub fn containers_with_label(&self, label: &str) -> Result<Vec<ContainerSummary>, DockerEngineError> {
        let filters = HashMap::from([("label".to_owned(), vec![label.to_owned()])]);
        let options = query::ListContainersOptions { all: true, filters: Some(filters), ..query::ListContainersOptions::default() };
        let found = self.ask("container list", async |client| client.list_containers(Some(options)).await)?;
        let summary = |found: bollard::models::ContainerSummary| ContainerSummary {
            id: found.id.unwrap_or_default(),
            names: found.names.unwrap_or_default().iter().map(|name| name.trim_start_matches('/').to_owned()).collect(),
            labels: found.labels.unwrap_or_default().into_iter().collect(),
            running: found.state.is_some_and(|state| state.to_string() == "running"),
            created: found.created.unwrap_or_default(),
        };
        Ok(found.into_iter().map(summary).collect())
    }

    /// All that the engine knows of a container, as it tells it.
    pub fn inspect_container(&self, id: &str) -> Result<serde_json::Value, DockerEngineError> {
        let found =
            self.ask("container inspection", async |client| client.inspect_container(id, None::<query::InspectContainerOptions>).await)?;
        Ok(serde_json::to_value(found).unwrap_or_default())
    }
}
