//! A worker in a pod of a Kubernetes cluster: one job a build.
//!
//! The pod's own process is the worker; it listens on a socket in the pod, and `ovenbird worker --connect`, run there through the API,
//! is the pipe to it. So nothing of the conversation is ever in the pod's log, which has the progress of the build in plain words, and
//! what ends the worker is seen as the pod's own end. When the caller is gone the pipe ends and with it the worker; what is left in the cluster
//! all the same is removed by the next build in the namespace.

mod cluster;
mod error;
mod manifest;
mod place;
mod standing;
mod stream;

use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::batch::v1::Job as ClusterJob;
use ovenbird_engine::Event;
use serde_json::json;

pub use cluster::{Cluster, access};
pub use error::{Access, KubernetesError};
pub use place::{KubernetesPlace, KubernetesSettings, Security, Time, Toleration};

use super::caller::Caller;
use super::{Launcher, Life, Pipe, WorkerSpec};
use crate::builder::Job;
use crate::error::Error;
use crate::settings::Environment;
use crate::worker::wire::shown;
use manifest::{Build, CALLER, CONTAINER, HEARTBEAT, MANAGED, SOCKET, name};
use standing::{Asked, Seen, Standing, standing, too_long};

/// How long the pod may wait for a node and its image when nothing else is said.
const START: Time = Time::of_seconds(120);

/// How often the cluster is asked how the pod stands.
const LOOK: Duration = Duration::from_millis(250);

/// How long a deleted pod's job may take to say why.
const SETTLE: Duration = Duration::from_secs(2);

/// How often it is looked whether the build was cancelled.
const CANCEL_LOOK: Duration = Duration::from_millis(50);

/// How often the job is told that its caller is there.
const BEAT: Duration = Duration::from_secs(30);

/// A job whose caller was silent so long has none. Clocks differ.
const SILENT: i64 = 300;

/// A worker to which nothing comes so long, not even a sign of life, ends.
const LEASE: Duration = Duration::from_secs(20);

/// How long a pod waits for its caller's first word.
const FIRST_WORD: Duration = Duration::from_mins(1);

/// Starts workers as jobs.
#[derive(Debug)]
pub struct KubernetesLauncher {
    place: KubernetesPlace,
    environment: Environment,
}

impl KubernetesLauncher {
    /// With everything that the settings say laid under what was said.
    pub fn new(said: &KubernetesPlace, settings: &KubernetesSettings, environment: &Environment) -> Self {
        Self { place: settings.resolve(said), environment: environment.clone() }
    }

    /// Waits until the container runs. Gives the pod's name.
    fn wait(&self, running: &Running, job: &Job) -> Result<String, KubernetesError> {
        let start = Instant::now();
        let limit = self.place.start_timeout.unwrap_or(START);
        let mut told = String::new();
        loop {
            if job.cancel.is_cancelled() {
                return Err(KubernetesError::Cancelled);
            }
            match running.look()? {
                Standing::Running(pod) => return Ok(pod),
                Standing::Failed(error) => return Err(error),
                Standing::Done => {
                    let message = "it ended before it was spoken to".to_owned();
                    return Err(KubernetesError::Gone { pod: name(&running.id), message });
                }
                Standing::Waiting(why) => {
                    if start.elapsed() > limit.duration() {
                        return Err(too_long(why, &running.asked(), limit.seconds()));
                    }
                    // What does not pass by itself is worth knowing at once.
                    if why != told && why.contains(": ") {
                        job.sink.emit(Event::Message { text: format!("waiting for the pod: {why}") });
                        told = why;
                    }
                }
            }
            let end = Instant::now() + LOOK;
            while Instant::now() < end && !job.cancel.is_cancelled() {
                std::thread::sleep(CANCEL_LOOK);
            }
        }
    }
}

/// What a build in a cluster would find there.
#[derive(Debug)]
pub struct Examination {
    /// Where the API is.
    pub server: String,
    /// The namespace.
    pub namespace: String,
    /// What the pod may do.
    pub security: Security,
    /// Its image, when one is named.
    pub image: Option<String>,
    /// Everything that a build does, and whether it is allowed.
    pub access: Vec<(Access, bool)>,
}

/// Asks a cluster what a build may do there. Makes nothing.
pub fn examine(said: &KubernetesPlace, settings: &KubernetesSettings, environment: &Environment) -> Result<Examination, KubernetesError> {
    let place = settings.resolve(said);
    let cluster = Cluster::of(&place, environment)?;
    let access = access::ALL.iter().map(|access| Ok((*access, cluster.allows(*access)?)));
    Ok(Examination {
        access: access.collect::<Result<_, KubernetesError>>()?,
        server: cluster.server().to_owned(),
        namespace: cluster.namespace().to_owned(),
        security: place.security.unwrap_or_default(),
        image: place.image,
    })
}

/// Removes jobs of builds whose callers are gone, and ended ones that stayed long enough where the cluster does not remove them.
fn remove_leftovers(cluster: &Cluster, now: i64, job: &Job) -> Result<(), KubernetesError> {
    let own = Caller::own();
    for found in cluster.jobs(&format!("{}={},{}", MANAGED.0, MANAGED.1, manifest::BUILD))? {
        let Some(job_name) = &found.metadata.name else { continue };
        let why = if is_over(&found, now) {
            "an ended build"
        } else if is_orphan(&found, &own, now) {
            "a build whose caller is gone"
        } else {
            continue;
        };
        cluster.delete_job(job_name)?;
        job.sink.emit(Event::Message { text: format!("removed job {job_name} of {why}") });
    }
    Ok(())
}

fn annotation<'a>(job: &'a ClusterJob, key: &str) -> Option<&'a str> {
    job.metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

/// Did it end longer ago than it is to stay?
fn is_over(job: &ClusterJob, now: i64) -> bool {
    let stays = job.spec.as_ref().and_then(|spec| spec.ttl_seconds_after_finished).map_or(0, i64::from);
    let Some(status) = &job.status else { return false };
    let failed = status.conditions.iter().flatten().find(|condition| condition.type_ == "Failed" && condition.status == "True");
    let ended = status.completion_time.as_ref().or_else(|| failed.and_then(|failed| failed.last_transition_time.as_ref()));
    ended.is_some_and(|ended| ended.0.as_second().saturating_add(stays) < now)
}

fn is_orphan(job: &ClusterJob, own: &Caller, now: i64) -> bool {
    let ended = job.status.as_ref().is_some_and(|status| status.active.unwrap_or(0) == 0 && status.start_time.is_some());
    let silent = annotation(job, HEARTBEAT).and_then(|beat| beat.parse::<i64>().ok()).is_some_and(|beat| beat.saturating_add(SILENT) < now);
    let gone = annotation(job, CALLER).and_then(Caller::parse).is_some_and(|caller| caller.is_gone(own));
    !ended && (silent || gone)
}

impl Launcher for KubernetesLauncher {
    fn launch(&self, spec: &WorkerSpec, job: &Job) -> Result<Pipe, Error> {
        let image = self.place.image.clone().ok_or(KubernetesError::NoImage)?;
        let cluster = Arc::new(Cluster::of(&self.place, &self.environment)?);
        let security = self.place.security.unwrap_or_default();
        job.sink.emit(Event::Message { text: format!("building in a {security} pod of the Kubernetes cluster at {cluster}") });
        let start = Instant::now();
        remove_leftovers(&cluster, self.environment.now(), job)?;
        let id = format!("{:010x}", RandomState::new().hash_one(std::process::id()) & 0xff_ffff_ffff);
        let text = |words: &[std::ffi::OsString]| words.iter().map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>();
        let mut arguments = text(&spec.flags);
        arguments.extend(["--progress", "plain", "worker", "--listen", SOCKET].map(str::to_owned));
        arguments.extend(["--patience".into(), FIRST_WORD.as_secs().to_string(), "--lease".into(), LEASE.as_secs().to_string()]);
        if self.place.credentials.is_some() {
            arguments.extend(["--credentials", manifest::CREDENTIALS].map(str::to_owned));
        }
        arguments.extend(text(&spec.arguments));
        let made = Build { id: &id, image: &image, arguments, caller: Caller::own().to_string(), now: self.environment.now() };
        cluster.create_job(&manifest::job(&self.place, made))?;
        let mut running = Running {
            cluster: Arc::clone(&cluster),
            id: id.clone(),
            place: self.place.clone(),
            image,
            pod: None,
            said: stream::Said::default(),
            cause: None,
            over: Arc::new(AtomicBool::new(false)),
            settled: false,
        };
        let pod = self.wait(&running, job)?;
        job.sink.emit(Event::Message { text: format!("the pod {pod} runs after {:.1} s", start.elapsed().as_secs_f64()) });
        let connect = ["ovenbird", "worker", "--connect", SOCKET].map(str::to_owned);
        let connection = match cluster.exec(&pod, CONTAINER, &connect) {
            Ok(connection) => connection,
            // The pod may have ended in between, and knows better why.
            Err(error) => return Err(running.ended(Duration::from_secs(2)).unwrap_or(error).into()),
        };
        let (to, from, said) = stream::open(connection, &cluster);
        (running.pod, running.said) = (Some(pod), said);
        running.beat(self.environment.now(), start);
        Ok(Pipe { to: Box::new(to), from: Box::new(from), life: Box::new(running) })
    }

    fn place(&self) -> String {
        "in a Kubernetes cluster".into()
    }

    fn heartbeat(&self) -> Option<Duration> {
        Some(LEASE / 4)
    }
}

/// A job that was made. Dropped: it is removed, unless the build came to its own end and the job is to stay for a while.
struct Running {
    cluster: Arc<Cluster>,
    id: String,
    place: KubernetesPlace,
    image: String,
    /// The pod that the conversation is with, as soon as there is one.
    pod: Option<String>,
    said: stream::Said,
    cause: Option<KubernetesError>,
    over: Arc<AtomicBool>,
    /// The worker said its last word.
    settled: bool,
}

impl Running {
    fn asked(&self) -> Asked<'_> {
        Asked {
            namespace: self.cluster.namespace(),
            pod: self.pod.as_deref(),
            image: &self.image,
            account: self.place.service_account.as_deref().unwrap_or("default"),
            claim: self.place.claim.as_deref(),
            memory: self.place.limits.get("memory").map_or("that of its node", String::as_str),
            timeout: self.place.timeout.unwrap_or(manifest::TIMEOUT).seconds(),
        }
    }

    /// How it stands now.
    fn look(&self) -> Result<Standing, KubernetesError> {
        let selector = format!("{}={}", manifest::BUILD, self.id);
        let mut pods = self.cluster.pods(&selector)?;
        if let Some(own) = &self.pod {
            // When it goes away, its job may make another one, which is not the build's.
            pods.retain(|pod| pod.metadata.name.as_ref() == Some(own));
        }
        pods.sort_by(|one, other| one.metadata.creation_timestamp.cmp(&other.metadata.creation_timestamp));
        let mut seen = Seen { pod: pods.pop(), ..Seen::default() };
        if let running @ Standing::Running(_) = standing(&seen, &self.asked()) {
            return Ok(running);
        }
        seen.job = self.cluster.job(&name(&self.id))?;
        let object = seen.pod.as_ref().and_then(|pod| pod.metadata.name.clone()).or_else(|| self.pod.clone());
        let object = object.unwrap_or_else(|| name(&self.id));
        seen.events = self.cluster.events(&object)?;
        seen.events.sort_by(|one, other| one.last_timestamp.cmp(&other.last_timestamp));
        Ok(standing(&seen, &self.asked()))
    }

    /// Why it ended, as soon as the cluster says so.
    fn ended(&self, limit: Duration) -> Option<KubernetesError> {
        let end = Instant::now() + limit;
        loop {
            match self.look() {
                Ok(Standing::Failed(error)) => return Some(error),
                Ok(Standing::Done) => return None,
                Ok(_) if Instant::now() < end => std::thread::sleep(LOOK),
                _ => return None,
            }
        }
    }

    /// Tells the job now and then that its caller is there.
    fn beat(&self, now: i64, start: Instant) {
        let (cluster, over, job) = (Arc::clone(&self.cluster), Arc::clone(&self.over), name(&self.id));
        std::thread::spawn(move || {
            let mut last = Instant::now();
            while !over.load(Ordering::SeqCst) {
                std::thread::sleep(LOOK);
                if last.elapsed() < BEAT {
                    continue;
                }
                last = Instant::now();
                let seconds = now.saturating_add(i64::try_from(start.elapsed().as_secs()).unwrap_or(0));
                // One that is missed is made up for by the next.
                let _ = cluster.patch_job(&job, &json!({"metadata": {"annotations": {HEARTBEAT: seconds.to_string()}}}));
            }
        });
    }

    /// Removes the job and its pod now.
    fn remove(&self) {
        let selector = format!("{}={}", manifest::BUILD, self.id);
        let _ = self.cluster.delete_job(&name(&self.id));
        for pod in self.cluster.pods(&selector).unwrap_or_default() {
            // Nodes take up to a minute over one that has not begun, and there is nothing in it to be ended well.
            let waits = pod.status.as_ref().is_none_or(|status| status.phase.as_deref() == Some("Pending"));
            if let Some(pod) = &pod.metadata.name {
                let _ = self.cluster.delete_pod(pod, u32::from(!waits));
            }
        }
    }
}

impl Life for Running {
    fn wait(&mut self, limit: Duration) -> Option<String> {
        let end = Instant::now() + limit;
        // A pod that goes away may be told why a moment later.
        let settle = Instant::now() + SETTLE;
        loop {
            match self.look() {
                Ok(Standing::Done) => return Some("the worker ended".into()),
                Ok(Standing::Failed(KubernetesError::Gone { .. })) if Instant::now() < settle => std::thread::sleep(LOOK),
                Ok(Standing::Failed(error)) => {
                    let mut told = error.to_string();
                    self.cause = Some(error);
                    let said = self.said.lock().unwrap_or_else(PoisonError::into_inner).clone();
                    let said = shown(said.trim_ascii(), 600);
                    if !said.is_empty() {
                        told = format!("{told}: {said}");
                    }
                    return Some(told);
                }
                Ok(_) if Instant::now() < end => std::thread::sleep(LOOK),
                Ok(_) => {
                    let message = "the connection to it ended, and the cluster says that it runs: its node may be lost".to_owned();
                    self.cause = Some(KubernetesError::Gone { pod: self.pod.clone().unwrap_or_default(), message });
                    return None;
                }
                Err(error) => {
                    let told = error.to_string();
                    self.cause = Some(error);
                    return Some(told);
                }
            }
        }
    }

    fn cause(&mut self) -> Option<Error> {
        // How it ended by itself is no more than the pipe's end.
        self.cause.take().filter(|cause| !matches!(cause, KubernetesError::Ended { .. })).map(Error::from)
    }

    fn settled(&mut self) -> bool {
        self.settled = true;
        true
    }

    fn kill(&mut self) {
        self.settled = false;
        self.remove();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        let stays = self.place.ttl.unwrap_or(manifest::TTL).seconds() > 0;
        if !(self.settled && stays) {
            self.remove();
        }
    }
}
