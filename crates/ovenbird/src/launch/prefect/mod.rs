//! A build as a flow run of a Prefect server: in a process or a pod that a worker of a work pool starts.
//!
//! Nothing can be streamed to it: what is written into the pipe becomes the parameters of a flow run, and what comes out of it is what
//! the flow put into Prefect's logs. The flow is `python/ovenbird_flow`. It must not know what is built.

mod follow;
mod server;

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ovenbird_engine::Event;
use ovenbird_oci::Digest;
use ovenbird_oci::keychain::Secret;
use serde_json::{Value, json};

use super::{ByReference, Launcher, Life, Pipe, WorkerSpec};
use crate::builder::Job;
use crate::error::{Error, Kind};
use crate::request::ParseValueError;
use crate::request::secret::fields;
use crate::settings::{Environment, Settings};
use crate::worker::wire::{Receiver, ToWorker};
use follow::{Follower, Word};
use server::{Api, ApiError, text};

/// Name of the flow.
const FLOW: &str = "ovenbird-build";

/// Where a worker finds it: a module that is installed there.
const ENTRYPOINT: &str = "ovenbird_flow.build";

/// How often it is looked whether the follower has ended.
const LOOK: Duration = Duration::from_millis(10);

/// `--on prefect[,address=URL][,pool=NAME][,queue=NAME][,image=NAME]`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PrefectPlace {
    /// Of the server's API.
    pub address: Option<String>,
    /// Work pool.
    pub pool: Option<String>,
    /// Queue of the pool.
    pub queue: Option<String>,
    /// Image of the pod, where the pool starts containers.
    pub image: Option<String>,
}

impl PrefectPlace {
    /// Reads what follows `prefect,`.
    pub fn parse(text: &str) -> Result<Self, ParseValueError> {
        let mut place = Self::default();
        for (key, value) in fields(text)? {
            let slot = match key.as_str() {
                "address" => &mut place.address,
                "pool" => &mut place.pool,
                "queue" => &mut place.queue,
                "image" => &mut place.image,
                _ => {
                    let reason = format!("--on prefect has no {key:?}: expected address=URL, pool=NAME, queue=NAME or image=NAME");
                    return Err(ParseValueError { reason });
                }
            };
            if value.is_empty() {
                return Err(ParseValueError { reason: format!("--on prefect: {key} has no value") });
            }
            *slot = Some(value);
        }
        Ok(place)
    }
}

impl fmt::Display for PrefectPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("prefect")?;
        let all = [("address", &self.address), ("pool", &self.pool), ("queue", &self.queue), ("image", &self.image)];
        all.into_iter().filter_map(|(key, value)| Some((key, value.as_ref()?))).try_for_each(|(key, value)| write!(f, ",{key}={value}"))
    }
}

/// Who asks.
#[derive(Debug, Clone)]
pub enum Authority {
    /// An API key.
    Key(Secret),
    /// `USER:PASSWORD` of a server's basic authentication.
    Basic(Secret),
}

/// A server, and what is asked of it.
#[derive(Debug, Clone)]
pub struct PrefectServer {
    /// Of its API, without a slash at the end.
    pub address: String,
    /// What named it, for messages.
    pub from: String,
    /// Who asks; `None`: nobody in particular.
    pub authority: Option<Authority>,
    /// More certificate authorities.
    pub ca: Option<PathBuf>,
    /// Work pool; `None`: the only one.
    pub pool: Option<String>,
    /// Queue of the pool; `None`: its default one.
    pub queue: Option<String>,
    /// Image, where the pool starts containers; `None`: that of the pool.
    pub image: Option<String>,
    /// Repository for sources.
    pub sources: Option<String>,
}

/// Starts workers as flow runs.
#[derive(Debug)]
pub struct PrefectLauncher {
    server: PrefectServer,
}

/// A work pool that takes builds.
struct Pool {
    name: String,
    kind: String,
    /// Its template starts containers with every right.
    privileged: bool,
}

impl PrefectLauncher {
    /// On the server that the place, the environment or the settings name.
    pub fn new(place: &PrefectPlace, settings: &Settings, environment: &Environment) -> Result<Self, Error> {
        let server = settings.prefect(place, environment)?.ok_or_else(|| {
            Error::new(Kind::Configuration, "there is no Prefect server: none is named anywhere")
                .hint("set PREFECT_API_URL, or [prefect] address = \"http://HOST:4200/api\" in the settings")
        })?;
        Ok(Self { server })
    }

    /// Looks whether builds can run there; what was found, in a few words.
    pub fn look(&self) -> Result<String, Error> {
        let api = Api::new(&self.server)?;
        let pool = self.pool(&api)?;
        let online = online(&api, &pool.name)?;
        Ok(format!("{}, work pool {} ({}), {online} worker(s) online", self.server.address, pool.name, pool.kind))
    }

    /// The pool that is meant, if it takes what is asked.
    fn pool(&self, api: &Api) -> Result<Pool, Error> {
        let found = match &self.server.pool {
            Some(name) => match api.get(&format!("work_pools/{}", server::escaped(name))) {
                Err(ApiError::Missing { .. }) => return Err(self.no_pool(api, Some(name))),
                found => found?,
            },
            None => match api.post("work_pools/filter", &json!({"limit": 2}))?.as_array().map(Vec::as_slice) {
                Some([only]) => only.clone(),
                _ => return Err(self.no_pool(api, None)),
            },
        };
        let template = &found["base_job_template"];
        let pool = Pool {
            name: text(&found, "name").to_owned(),
            kind: text(&found, "type").to_owned(),
            privileged: template.to_string().contains("\"privileged\":true"),
        };
        if self.server.image.is_some() && template["variables"]["properties"].get("image").is_none() {
            let reason = format!("the work pool {} starts no containers (its type is {})", pool.name, pool.kind);
            return Err(Error::refused("an image for --on prefect", reason));
        }
        if let Some(queue) = &self.server.queue {
            let path = format!("work_pools/{}/queues/{}", server::escaped(&pool.name), server::escaped(queue));
            if let Err(ApiError::Missing { .. }) = api.get(&path) {
                let message = format!("the work pool {} at {} has no queue {queue:?}", pool.name, self.server.address);
                let hint = format!("`prefect work-queue create {queue} --pool {}` makes it", pool.name);
                return Err(Error::new(Kind::Driver, message).hint(hint));
            }
        }
        Ok(pool)
    }

    fn no_pool(&self, api: &Api, wanted: Option<&str>) -> Error {
        let pools = api.post("work_pools/filter", &json!({"limit": 20})).unwrap_or_default();
        let names: Vec<&str> = pools.as_array().into_iter().flatten().map(|pool| text(pool, "name")).collect();
        let address = &self.server.address;
        match (wanted, names.is_empty()) {
            (_, true) => Error::new(Kind::Driver, format!("the Prefect server at {address} has no work pool")).hint(
                "`prefect work-pool create NAME --type process` makes one, `prefect worker start --pool NAME` starts a worker for it",
            ),
            (Some(wanted), false) => Error::new(Kind::Driver, format!("the Prefect server at {address} has no work pool {wanted:?}"))
                .hint(format!("it has {}", names.join(", "))),
            (None, false) => Error::new(Kind::Configuration, format!("the Prefect server at {address} has several work pools"))
                .hint(format!("say which: --on prefect,pool=NAME, or [prefect] pool in the settings; it has {}", names.join(", "))),
        }
    }

    /// The deployment of the pool, made or brought up to date.
    fn deployment(&self, api: &Api, pool: &Pool) -> Result<String, Error> {
        let parameters: serde_json::Map<String, Value> = parameters().into_iter().map(|name| (name, json!({}))).collect();
        let mut wanted = json!({
            "name": format!("ovenbird-{}", pool.name),
            "work_pool_name": pool.name,
            "entrypoint": ENTRYPOINT,
            "description": "Builds of `ovenbird build --on prefect`. Ovenbird keeps this deployment up to date; the parameters are the fields of a build request.",
            "tags": ["ovenbird"],
            "enforce_parameter_schema": false,
            "parameter_openapi_schema": {"type": "object", "title": "Build request", "properties": parameters, "required": ["source"]},
        });
        let version = Digest::of(wanted.to_string().as_bytes()).short();
        wanted["version"] = version.as_str().into();
        let path = format!("deployments/name/{FLOW}/{}", server::escaped(text(&wanted, "name")));
        match api.get(&path) {
            Ok(known) if text(&known, "version") == version && text(&known, "entrypoint") == ENTRYPOINT => {
                return Ok(text(&known, "id").to_owned());
            }
            Ok(_) | Err(ApiError::Missing { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        let flow = api.post("flows/", &json!({"name": FLOW}))?;
        wanted["flow_id"] = flow["id"].clone();
        Ok(text(&api.post("deployments/", &wanted)?, "id").to_owned())
    }
}

/// Names of the flow's parameters: the fields of a request, and what only the caller knows.
fn parameters() -> Vec<String> {
    let request = crate::request::BuildRequest::new(crate::request::Source::Stdin);
    let fields = serde_json::to_value(&request).unwrap_or_default();
    fields.as_object().into_iter().flat_map(|fields| fields.keys().cloned()).chain(["caller".to_owned()]).collect()
}

/// Workers of a pool that are there.
fn online(api: &Api, pool: &str) -> Result<usize, ApiError> {
    let workers = api.post(&format!("work_pools/{}/workers/filter", server::escaped(pool)), &json!({"limit": 200}))?;
    Ok(workers.as_array().into_iter().flatten().filter(|worker| text(worker, "status") == "ONLINE").count())
}

impl Launcher for PrefectLauncher {
    fn launch(&self, _spec: &WorkerSpec, job: &Job) -> Result<Pipe, Error> {
        let api = Api::new(&self.server)?;
        let pool = self.pool(&api)?;
        if pool.privileged {
            let message = format!("the work pool {} starts privileged containers, which builds do not need", pool.name);
            warn(&*job.sink, message);
        }
        let deployment = self.deployment(&api, &pool)?;
        let mut job_variables = json!({});
        if let Some(image) = &self.server.image {
            job_variables["image"] = image.as_str().into();
        }
        let broken = |error: io::Error| Error::from_chain(Kind::Driver, &error).while_doing("cannot make a pipe");
        let (to_worker, to) = io::pipe().map_err(broken)?;
        let (from, from_worker) = io::pipe().map_err(broken)?;
        let (tell, words) = mpsc::channel();
        std::thread::spawn(move || listen(to_worker, &tell));
        let stop = Arc::new(AtomicBool::new(false));
        let follower = Follower {
            api,
            pool: pool.name,
            queue: self.server.queue.clone(),
            deployment,
            job_variables,
            sink: Arc::clone(&job.sink),
            stop: Arc::clone(&stop),
        };
        let thread = std::thread::spawn(move || follower.run(&words, from_worker));
        Ok(Pipe { to: Box::new(to), from: Box::new(from), life: Box::new(Running { thread: Some(thread), stop }) })
    }

    fn place(&self) -> String {
        "on Prefect".into()
    }

    fn by_reference(&self) -> Option<ByReference> {
        Some(ByReference { sources: self.server.sources.clone() })
    }
}

/// What the caller says, as far as it means something here.
fn listen(from: impl io::Read, tell: &mpsc::Sender<Word>) {
    let mut from = Receiver::new(from);
    while let Ok(Some((message, _))) = from.next::<ToWorker>() {
        let word = match message {
            ToWorker::Errand(errand) => Word::Errand(errand),
            ToWorker::Cancel => Word::Cancel,
            _ => continue,
        };
        if tell.send(word).is_err() {
            return;
        }
    }
    let _ = tell.send(Word::End);
}

struct Running {
    thread: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
}

impl Life for Running {
    fn wait(&mut self, limit: Duration) -> Option<String> {
        let end = Instant::now() + limit;
        while self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            if Instant::now() > end {
                return None;
            }
            std::thread::sleep(LOOK);
        }
        Some("the flow run is no longer followed".into())
    }

    /// It goes on being cancelled there; nobody waits for that any more.
    fn kill(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Tells of something that is no reason to fail.
fn warn(sink: &dyn ovenbird_engine::EventSink, message: String) {
    sink.emit(Event::Warning { code: "prefect".into(), message, line: None });
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The flow takes every field of a request, and nothing else.
    #[test]
    fn the_flow_has_the_parameters_of_a_request() {
        let flow = include_str!("../../../../../python/ovenbird_flow/ovenbird_flow.py");
        let (_, signature) = flow.split_once("\ndef build(").unwrap();
        let (signature, _) = signature.split_once(") ->").unwrap();
        let mut taken: Vec<&str> = signature.lines().filter_map(|line| line.trim().split_once(':').map(|(name, _)| name)).collect();
        let wanted = parameters();
        let mut wanted: Vec<&str> = wanted.iter().map(String::as_str).collect();
        (taken.sort_unstable(), wanted.sort_unstable());
        assert_eq!(taken, wanted);
    }
}
