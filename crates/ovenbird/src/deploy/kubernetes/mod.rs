//! Images in a Kubernetes cluster: a Deployment, and a Service where there are ports.
//!
//! Server-side apply with a field manager of our own, on objects with our labels only: what somebody else made under the same name is left alone,
//! and removal takes what has the labels and nothing around it. A rollout is waited for, and one that comes to nothing is said in one sentence.

mod manifest;
mod rollout;

use std::time::{Duration, Instant};

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Event as ClusterEvent, Pod, Service};
use k8s_openapi::{NamespaceResourceScope, serde::Serialize, serde::de::DeserializeOwned};
use kube::Resource;
use kube::api::{DeleteParams, ListParams, LogParams, Patch, PatchParams, Preconditions, PropagationPolicy};
use ovenbird_engine::Event;
use ovenbird_oci::Reference;

use super::{Declaration, State, Status, check_name};
use crate::builder::Job;
use crate::error::{Error, Kind};
use crate::launch::kubernetes::{Access, Cluster, KubernetesError, KubernetesPlace};
use crate::settings::Environment;
use crate::worker::wire::shown;
use manifest::{CONTAINER, DEPLOYMENT, MANAGED, selector};
use rollout::{Seen, Standing, numbers, standing};

/// Who owns the fields that are applied.
const MANAGER: &str = "ovenbird";

/// How often the cluster is asked.
const LOOK: Duration = Duration::from_millis(500);

/// How long what is removed may take to be gone.
const GONE: Duration = Duration::from_secs(90);

/// Lines of a container that ended which an error shows.
const TAIL: i64 = 50;

/// Most bytes of a log.
const MAX_LOG: i64 = 16 << 20;

/// Most objects of one answer.
const MOST: u32 = 500;

/// What can be wrong with a deployment beside what can be wrong with a cluster.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeployError {
    /// The cluster.
    #[error(transparent)]
    Cluster(#[from] KubernetesError),
    /// Somebody else's.
    #[error("there is a {kind} {name} in the namespace {namespace} that Ovenbird did not make")]
    Foreign {
        /// `Deployment`…
        kind: String,
        /// Its name.
        name: String,
        /// Where.
        namespace: String,
    },
    /// Fields that somebody else manages.
    #[error("somebody else manages fields of the {kind} {name}: {message}")]
    Conflict {
        /// `Deployment`…
        kind: String,
        /// Its name.
        name: String,
        /// The cluster's words.
        message: String,
    },
    /// There is none.
    #[error("there is no deployment {name} in the namespace {namespace}")]
    NotDeployed {
        /// Which.
        name: String,
        /// Where.
        namespace: String,
    },
    /// It comes to nothing.
    #[error("the rollout of {name} failed: {reason}")]
    Failed {
        /// Which.
        name: String,
        /// Why.
        reason: String,
        /// The last lines of the container.
        tail: String,
    },
    /// It takes too long.
    #[error("the rollout of {name} was not done within {seconds} s: {reason}")]
    Slow {
        /// Which.
        name: String,
        /// How long it was waited for.
        seconds: u64,
        /// What was seen last.
        reason: String,
    },
    /// Stopped by the user.
    #[error("cancelled")]
    Cancelled,
}

impl From<DeployError> for Error {
    fn from(error: DeployError) -> Self {
        let kind = match &error {
            DeployError::Cluster(cluster) => return cluster.clone().into(),
            DeployError::Cancelled => Kind::Cancelled,
            DeployError::Foreign { .. } | DeployError::NotDeployed { .. } => Kind::Usage,
            _ => Kind::Driver,
        };
        let told = Self::from_chain(kind, &error);
        match error {
            DeployError::Foreign { .. } => told.hint("give the deployment another name, or remove that one yourself"),
            DeployError::Conflict { .. } => told.hint("give the field back there, or remove the deployment and run it again"),
            DeployError::Failed { name, tail, .. } => {
                let told = if tail.is_empty() { told } else { told.because(format!("its last lines were\n{tail}")) };
                told.hint(format!("what ran before goes on running; `ovenbird deploy remove --name {name}` removes all of it"))
            }
            DeployError::Slow { name, .. } => {
                told.hint(format!("it goes on in the cluster: `ovenbird deploy wait --name {name}`, with a longer --timeout"))
            }
            _ => told,
        }
    }
}

/// Runs images in one namespace.
#[derive(Debug)]
pub struct KubernetesDeployer {
    cluster: Cluster,
}

const fn of(verb: &'static str, group: &'static str, resource: &'static str) -> Access {
    Access { verb, group, resource }
}

impl KubernetesDeployer {
    /// In the cluster and namespace that are meant. Does not connect.
    pub fn new(place: &KubernetesPlace, environment: &Environment) -> Result<Self, Error> {
        Ok(Self { cluster: Cluster::of(place, environment)? })
    }

    /// Makes the objects, or brings them up to date. Does not wait.
    pub fn apply(&self, declared: &Declaration, image: &Reference, job: &Job) -> Result<(), DeployError> {
        let (deployment, _) = manifest::deployment(declared, image);
        let service = manifest::service(declared);
        // All of it is looked at before any of it is changed.
        let old = self.own::<Deployment>(&declared.name, of("get", "apps", "deployments"))?;
        let old_service = self.own::<Service>(&declared.name, of("get", "", "services"))?;
        let text = format!("{} {} in {}: {image}", if old.is_some() { "updating" } else { "deploying" }, declared.name, self.cluster);
        job.sink.emit(Event::Message { text });
        self.put(&deployment, &declared.name, of("patch", "apps", "deployments"))?;
        match (service, old_service) {
            (Some(service), _) => self.put(&service, &declared.name, of("patch", "", "services")),
            // It has no ports any more.
            (None, Some(old)) => self.delete(&old, &declared.name, of("delete", "", "services")),
            (None, None) => Ok(()),
        }
    }

    /// Waits until all of it runs.
    pub fn wait(&self, name: &str, limit: Duration, job: &Job) -> Result<Status, DeployError> {
        let (start, mut told) = (Instant::now(), String::new());
        loop {
            if job.cancel.is_cancelled() {
                return Err(DeployError::Cancelled);
            }
            let seen = self.look(name)?;
            match standing(&seen) {
                Standing::Done => return self.status_of(name, &seen),
                Standing::Gone => return Err(self.none(name)),
                Standing::Failed { reason, pod } => {
                    let tail = pod.map(|pod| self.last_words(&pod)).unwrap_or_default();
                    return Err(DeployError::Failed { name: name.to_owned(), reason, tail });
                }
                Standing::Waiting(reason) if start.elapsed() > limit => {
                    return Err(DeployError::Slow { name: name.to_owned(), seconds: limit.as_secs(), reason });
                }
                Standing::Waiting(reason) => {
                    if reason != told {
                        job.sink.emit(Event::Message { text: format!("{name}: {reason}") });
                        told = reason;
                    }
                }
            }
            std::thread::sleep(LOOK);
        }
    }

    /// How it is now.
    pub fn status(&self, name: &str) -> Result<Status, DeployError> {
        check_name(name).map_err(|_| self.none(name))?;
        let seen = self.look(name)?;
        self.status_of(name, &seen)
    }

    /// What its containers say, each line with its pod when there are several.
    pub fn logs(&self, name: &str, tail: Option<i64>) -> Result<String, DeployError> {
        let seen = self.look(name)?;
        if seen.deployment.is_none() {
            return Err(self.none(name));
        }
        let wanted = LogParams { container: Some(CONTAINER.into()), tail_lines: tail, limit_bytes: Some(MAX_LOG), ..LogParams::default() };
        let mut out = String::new();
        for pod in &seen.pods {
            let Some(pod) = pod.metadata.name.as_deref() else { continue };
            let said = self.cluster.ask(of("get", "", "pods/log"), async { self.cluster.api::<Pod>().logs(pod, &wanted).await });
            let said = match said {
                Ok(said) => said,
                // It has not begun.
                Err(KubernetesError::Refused { status: 400 | 404, .. }) => continue,
                Err(error) => return Err(error.into()),
            };
            for line in said.lines() {
                if seen.pods.len() > 1 {
                    out.extend([pod, ": "]);
                }
                out.extend([line, "\n"]);
            }
        }
        Ok(out)
    }

    /// Removes what was made under this name, and waits until it is gone. False: there was nothing.
    pub fn remove(&self, name: &str, job: &Job) -> Result<bool, DeployError> {
        let deployment = self.own::<Deployment>(name, of("get", "apps", "deployments"))?;
        let service = self.own::<Service>(name, of("get", "", "services"))?;
        let any = deployment.is_some() || service.is_some();
        if let Some(service) = service {
            self.delete(&service, name, of("delete", "", "services"))?;
        }
        if let Some(deployment) = deployment {
            self.delete(&deployment, name, of("delete", "apps", "deployments"))?;
        }
        let start = Instant::now();
        while any && start.elapsed() < GONE {
            if job.cancel.is_cancelled() {
                return Err(DeployError::Cancelled);
            }
            let seen = self.look(name)?;
            if seen.deployment.is_none() && seen.pods.is_empty() {
                break;
            }
            std::thread::sleep(LOOK);
        }
        Ok(any)
    }

    fn none(&self, name: &str) -> DeployError {
        DeployError::NotDeployed { name: name.to_owned(), namespace: self.cluster.namespace().to_owned() }
    }

    /// An object of this name, if it is ours.
    fn own<K>(&self, name: &str, access: Access) -> Result<Option<K>, DeployError>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug,
    {
        let found = self.cluster.ask(access, async { self.cluster.api::<K>().get_opt(name).await })?;
        let is_ours = |object: &K| {
            let label = |key: &str| object.meta().labels.as_ref().and_then(|labels| labels.get(key)).map(String::as_str);
            label(MANAGED.0) == Some(MANAGED.1) && label(DEPLOYMENT) == Some(name)
        };
        match found {
            Some(object) if !is_ours(&object) => Err(DeployError::Foreign {
                kind: K::kind(&()).into_owned(),
                name: name.to_owned(),
                namespace: self.cluster.namespace().to_owned(),
            }),
            found => Ok(found),
        }
    }

    fn put<K>(&self, object: &K, name: &str, access: Access) -> Result<(), DeployError>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + Serialize + DeserializeOwned + std::fmt::Debug,
    {
        // Not by force: what somebody else set stays, or is said.
        let how = PatchParams::apply(MANAGER);
        let done = self.cluster.ask(access, async { self.cluster.api::<K>().patch(name, &how, &Patch::Apply(object)).await });
        match done {
            Err(KubernetesError::Refused { status: 409, message, .. }) => Err(DeployError::Conflict {
                kind: K::kind(&()).into_owned(),
                name: name.to_owned(),
                message: shown(message.as_bytes(), 600),
            }),
            done => Ok(done.map(drop)?),
        }
    }

    /// Removes the very object that was looked at.
    fn delete<K>(&self, object: &K, name: &str, access: Access) -> Result<(), DeployError>
    where
        K: Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + DeserializeOwned + std::fmt::Debug,
    {
        let how = DeleteParams {
            propagation_policy: Some(PropagationPolicy::Foreground),
            preconditions: Some(Preconditions { uid: object.meta().uid.clone(), resource_version: None }),
            ..DeleteParams::default()
        };
        match self.cluster.ask(access, async { self.cluster.api::<K>().delete(name, &how).await.map(drop) }) {
            Err(KubernetesError::Refused { status: 404, .. }) => Ok(()),
            done => Ok(done?),
        }
    }

    fn look(&self, name: &str) -> Result<Seen, DeployError> {
        let deployment = self.own::<Deployment>(name, of("get", "apps", "deployments"))?;
        let wanted = ListParams::default().labels(&selector(name)).limit(MOST);
        let pods = self.cluster.ask(of("list", "", "pods"), async { self.cluster.api::<Pod>().list(&wanted).await })?.items;
        let mut events: Vec<ClusterEvent> = vec![];
        let is_ready = |pod: &&Pod| {
            let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
            conditions.into_iter().flatten().any(|condition| condition.type_ == "Ready" && condition.status == "True")
        };
        if let Some(pod) = pods.iter().find(|pod| !is_ready(pod)).and_then(|pod| pod.metadata.name.as_deref()) {
            let wanted = ListParams::default().fields(&format!("involvedObject.name={pod}")).limit(MOST);
            // They explain, and are not needed.
            let found = self.cluster.ask(of("list", "", "events"), async { self.cluster.api::<ClusterEvent>().list(&wanted).await });
            events = found.map(|list| list.items).unwrap_or_default();
            events.sort_by(|one, other| one.last_timestamp.cmp(&other.last_timestamp));
        }
        Ok(Seen { deployment, pods, events })
    }

    fn status_of(&self, name: &str, seen: &Seen) -> Result<Status, DeployError> {
        let (name_of, stands) = (name.to_owned(), standing(seen));
        let Some(deployment) = &seen.deployment else {
            return Ok(Status {
                name: name_of,
                state: State::NotDeployed,
                replicas: 0,
                ready: 0,
                image: None,
                addresses: vec![],
                reason: None,
            });
        };
        let (wanted, ready) = numbers(deployment);
        let (state, reason) = match stands {
            _ if wanted == 0 => (State::Stopped, None),
            Standing::Gone => (State::NotDeployed, None),
            Standing::Done => (State::Running, None),
            Standing::Waiting(why) => (State::Starting, Some(why)),
            Standing::Failed { reason, .. } => (State::Crashed, Some(reason)),
        };
        let container = deployment.spec.as_ref().and_then(|spec| spec.template.spec.as_ref()).and_then(|pod| pod.containers.first());
        let number = |number: i32| u32::try_from(number).unwrap_or(0);
        Ok(Status {
            state,
            replicas: number(wanted),
            ready: number(ready),
            image: container.and_then(|container| container.image.clone()),
            addresses: self.addresses(name)?,
            reason,
            name: name_of,
        })
    }

    fn addresses(&self, name: &str) -> Result<Vec<String>, DeployError> {
        let Some(service) = self.own::<Service>(name, of("get", "", "services"))? else { return Ok(vec![]) };
        let mut hosts = vec![format!("{name}.{}", self.cluster.namespace())];
        let ingress =
            service.status.as_ref().and_then(|status| status.load_balancer.as_ref()).and_then(|balancer| balancer.ingress.as_ref());
        hosts.extend(ingress.into_iter().flatten().filter_map(|at| at.hostname.clone().or_else(|| at.ip.clone())));
        let ports = service.spec.as_ref().and_then(|spec| spec.ports.as_ref());
        let mut addresses = vec![];
        for port in ports.into_iter().flatten() {
            addresses.extend(hosts.iter().map(|host| format!("{host}:{}", port.port)));
            addresses.extend(port.node_port.map(|port| format!("NODE:{port}")));
        }
        Ok(addresses)
    }

    /// What the container said before it ended.
    fn last_words(&self, pod: &str) -> String {
        let of_last = LogParams {
            container: Some(CONTAINER.into()),
            tail_lines: Some(TAIL),
            previous: true,
            limit_bytes: Some(1 << 20),
            ..LogParams::default()
        };
        let said = self.cluster.ask(of("get", "", "pods/log"), async { self.cluster.api::<Pod>().logs(pod, &of_last).await });
        let said = said.unwrap_or_default();
        said.lines().map(|line| shown(line.as_bytes(), 2000)).collect::<Vec<_>>().join("\n")
    }
}
