//! A cluster's API, as far as builds need it: synchronous and typed, with a small runtime of its own, made when it is first asked.
//!
//! Where it is: the kubeconfig (`KUBECONFIG`, `~/.kube/config`; contexts and exec plugins included), else the cluster around this pod, as
//! `kubectl` looks. It must not know what is built.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::api::authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Event, Pod};
use kube::api::{Api, AttachParams, DeleteParams, ListParams, Patch, PatchParams, PostParams, PropagationPolicy};
use kube::client::{AuthError, Connection};
use kube::config::{ExecInteractiveMode, KubeConfigOptions, Kubeconfig};
use kube::{Client, Config, Resource};
use tokio::runtime::Runtime;

use super::error::{Access, KubernetesError};
use super::place::KubernetesPlace;
use crate::settings::Environment;

/// For one call.
const SHORT: Duration = Duration::from_secs(20);

/// For the first connection.
const CONNECT: Duration = Duration::from_secs(10);

/// Most objects of one answer: more are not a build's.
const MOST: u32 = 500;

/// Everything that the launcher does in a namespace. The role in `deploy/kubernetes` has these rules.
pub mod access {
    use super::Access;

    const fn of(verb: &'static str, group: &'static str, resource: &'static str) -> Access {
        Access { verb, group, resource }
    }

    pub(crate) const CREATE_JOB: Access = of("create", "batch", "jobs");
    pub(crate) const GET_JOB: Access = of("get", "batch", "jobs");
    pub(crate) const LIST_JOBS: Access = of("list", "batch", "jobs");
    pub(crate) const PATCH_JOB: Access = of("patch", "batch", "jobs");
    pub(crate) const DELETE_JOB: Access = of("delete", "batch", "jobs");
    pub(crate) const LIST_PODS: Access = of("list", "", "pods");
    pub(crate) const DELETE_POD: Access = of("delete", "", "pods");
    pub(crate) const EXEC: Access = of("create", "", "pods/exec");
    /// An exec over a web socket is a GET, which clusters before 1.30 look at.
    pub(crate) const EXEC_GET: Access = of("get", "", "pods/exec");
    pub(crate) const LIST_EVENTS: Access = of("list", "", "events");

    /// All of them.
    pub const ALL: [Access; 10] =
        [CREATE_JOB, GET_JOB, LIST_JOBS, PATCH_JOB, DELETE_JOB, LIST_PODS, DELETE_POD, EXEC, EXEC_GET, LIST_EVENTS];

    /// The rules of a role that allows all of them, as they stand below `rules:`.
    pub fn rules() -> String {
        let mut text = String::new();
        for rules in ALL.chunk_by(|one, other| (one.group, one.resource) == (other.group, other.resource)) {
            let verbs: Vec<String> = rules.iter().map(|access| format!("{:?}", access.verb)).collect();
            let lines = [
                format!("  - apiGroups: [{:?}]\n", rules[0].group),
                format!("    resources: [{:?}]\n", rules[0].resource),
                format!("    verbs: [{}]\n", verbs.join(", ")),
            ];
            text.extend(lines);
        }
        text
    }
}

/// A namespace of a cluster.
pub struct Cluster {
    runtime: Runtime,
    client: Client,
    server: String,
    namespace: String,
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cluster").field("server", &self.server).field("namespace", &self.namespace).finish_non_exhaustive()
    }
}

impl fmt::Display for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, namespace {}", self.server, self.namespace)
    }
}

/// The cluster that is meant.
fn configuration(runtime: &Runtime, place: &KubernetesPlace, environment: &Environment) -> Result<Config, KubernetesError> {
    let said: Vec<PathBuf> = match environment.get("KUBECONFIG").filter(|value| !value.is_empty()) {
        Some(paths) => paths.split(':').filter(|path| !path.is_empty()).map(|path| environment.absolute(path.as_ref())).collect(),
        None => environment.home().map(|home| home.join(".kube/config")).into_iter().collect(),
    };
    let files: Vec<&PathBuf> = said.iter().filter(|path| path.is_file()).collect();
    let wrong = |reason: String, contexts| KubernetesError::Kubeconfig { reason, contexts };
    if files.is_empty() {
        let looked = said.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ");
        let looked = if looked.is_empty() { "neither KUBECONFIG nor HOME is set".to_owned() } else { looked };
        if environment.get("KUBERNETES_SERVICE_HOST").is_none() || environment.get("KUBERNETES_SERVICE_PORT").is_none() {
            return Err(KubernetesError::NoCluster { looked });
        }
        if let Some(context) = &place.context {
            return Err(wrong(format!("there is none ({looked}) that could have the context {context:?}"), vec![]));
        }
        return Config::incluster().map_err(|error| wrong(format!("this pod's service account: {error}"), vec![]));
    }
    let mut all = Kubeconfig::default();
    for file in files {
        let one = Kubeconfig::read_from(file).map_err(|error| wrong(format!("{}: {error}", file.display()), vec![]))?;
        all = all.merge(one).map_err(|error| wrong(error.to_string(), vec![]))?;
    }
    let contexts: Vec<String> = all.contexts.iter().map(|context| context.name.clone()).collect();
    for user in &mut all.auth_infos {
        if let Some(exec) = user.auth_info.as_mut().and_then(|info| info.exec.as_mut()) {
            if matches!(exec.interactive_mode, Some(ExecInteractiveMode::Always)) {
                let reason = format!("the plugin of user {:?} wants a terminal (interactiveMode: Always)", user.name);
                return Err(wrong(reason, vec![]));
            }
            // Standard input may be the build context.
            exec.interactive_mode = Some(ExecInteractiveMode::Never);
        }
    }
    let options = KubeConfigOptions { context: place.context.clone(), ..KubeConfigOptions::default() };
    runtime.block_on(Config::from_custom_kubeconfig(all, &options)).map_err(|error| wrong(error.to_string(), contexts))
}

impl Cluster {
    /// The cluster and namespace that are meant. Does not connect.
    pub fn of(place: &KubernetesPlace, environment: &Environment) -> Result<Self, KubernetesError> {
        let broken = |reason: String| KubernetesError::Kubeconfig { reason, contexts: vec![] };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("kubernetes")
            .enable_all()
            .build()
            .map_err(|error| broken(error.to_string()))?;
        let mut config = configuration(&runtime, place, environment)?;
        config.connect_timeout = Some(CONNECT);
        // Credentials can stand in an address.
        let server = config.cluster_url.authority().map_or_else(String::new, |at| {
            format!("{}://{}", config.cluster_url.scheme_str().unwrap_or("https"), at.as_str().rsplit('@').next().unwrap_or_default())
        });
        let namespace = place.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let entered = runtime.enter();
        // A plugin for credentials runs here.
        let client = Client::try_from(config).map_err(|error| match auth(&error) {
            Some(reason) => KubernetesError::Unauthorized { server: server.clone(), reason },
            None => broken(chain(&error)),
        })?;
        drop(entered);
        Ok(Self { runtime, client, server, namespace })
    }

    /// The namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Where the API is.
    pub fn server(&self) -> &str {
        &self.server
    }

    /// Runs something beside.
    pub(super) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        self.runtime.spawn(work);
    }

    /// Objects of one kind in the namespace.
    pub(crate) fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = k8s_openapi::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Asks, and waits a while for the answer.
    pub(crate) fn ask<T>(&self, access: Access, work: impl Future<Output = Result<T, kube::Error>>) -> Result<T, KubernetesError> {
        match self.runtime.block_on(async { tokio::time::timeout(SHORT, work).await }) {
            Ok(done) => done.map_err(|error| self.told(access, error)),
            Err(_) => {
                let reason = format!("nothing came within {} seconds", SHORT.as_secs());
                Err(KubernetesError::Broken { server: self.server.clone(), access, reason })
            }
        }
    }

    fn told(&self, access: Access, error: kube::Error) -> KubernetesError {
        let (server, namespace) = (self.server.clone(), self.namespace.clone());
        match error {
            kube::Error::Api(status) => {
                let message = status.message.trim().to_owned();
                match status.code {
                    401 => KubernetesError::Unauthorized { server, reason: message },
                    403 if message.contains("exceeded quota") => KubernetesError::Quota { namespace, message },
                    403 => KubernetesError::Forbidden { access, namespace, message },
                    404 if message.contains(&format!("namespaces \"{namespace}\" not found")) => {
                        KubernetesError::NoNamespace { namespace, server }
                    }
                    code => KubernetesError::Refused { access, status: code, message },
                }
            }
            kube::Error::Service(error) => match auth(&*error) {
                Some(reason) => KubernetesError::Unauthorized { server, reason },
                None => KubernetesError::Unreachable { server, reason: chain(&*error) },
            },
            kube::Error::HyperError(error) => KubernetesError::Unreachable { server, reason: chain(&error) },
            other => KubernetesError::Broken { server, access, reason: chain(&other) },
        }
    }

    /// Makes a job.
    pub fn create_job(&self, job: &Job) -> Result<Job, KubernetesError> {
        self.ask(access::CREATE_JOB, async { self.api::<Job>().create(&PostParams::default(), job).await })
    }

    /// A job; `None`: there is none.
    pub fn job(&self, name: &str) -> Result<Option<Job>, KubernetesError> {
        self.ask(access::GET_JOB, async { self.api::<Job>().get_opt(name).await })
    }

    /// Jobs with this label.
    pub fn jobs(&self, selector: &str) -> Result<Vec<Job>, KubernetesError> {
        let wanted = ListParams::default().labels(selector).limit(MOST);
        self.ask(access::LIST_JOBS, async { self.api::<Job>().list(&wanted).await }).map(|list| list.items)
    }

    /// Changes fields of a job.
    pub fn patch_job(&self, name: &str, fields: &serde_json::Value) -> Result<(), KubernetesError> {
        let patch = Patch::Merge(fields);
        self.ask(access::PATCH_JOB, async { self.api::<Job>().patch(name, &PatchParams::default(), &patch).await }).map(drop)
    }

    /// Removes a job and its pods. One that is gone is fine.
    pub fn delete_job(&self, name: &str) -> Result<(), KubernetesError> {
        let how = DeleteParams { propagation_policy: Some(PropagationPolicy::Background), ..DeleteParams::default() };
        gone(self.ask(access::DELETE_JOB, async { self.api::<Job>().delete(name, &how).await.map(drop) }))
    }

    /// Ends a pod within so many seconds; 0: it is forgotten now, and its node clears up. One that is gone is fine.
    pub fn delete_pod(&self, name: &str, grace: u32) -> Result<(), KubernetesError> {
        let how = DeleteParams { grace_period_seconds: Some(grace), ..DeleteParams::default() };
        gone(self.ask(access::DELETE_POD, async { self.api::<Pod>().delete(name, &how).await.map(drop) }))
    }

    /// Pods with this label.
    pub fn pods(&self, selector: &str) -> Result<Vec<Pod>, KubernetesError> {
        let wanted = ListParams::default().labels(selector).limit(MOST);
        self.ask(access::LIST_PODS, async { self.api::<Pod>().list(&wanted).await }).map(|list| list.items)
    }

    /// What happened to an object, as the cluster tells it.
    pub fn events(&self, object: &str) -> Result<Vec<Event>, KubernetesError> {
        let wanted = ListParams::default().fields(&format!("involvedObject.name={object}")).limit(MOST);
        self.ask(access::LIST_EVENTS, async { self.api::<Event>().list(&wanted).await }).map(|list| list.items)
    }

    /// May who asks do this in the namespace?
    pub fn allows(&self, access: Access) -> Result<bool, KubernetesError> {
        let (resource, part) = access.resource.split_once('/').map_or((access.resource, None), |(resource, part)| (resource, Some(part)));
        let review = SelfSubjectAccessReview {
            spec: SelfSubjectAccessReviewSpec {
                resource_attributes: Some(ResourceAttributes {
                    namespace: Some(self.namespace.clone()),
                    verb: Some(access.verb.into()),
                    group: Some(access.group.into()),
                    resource: Some(resource.into()),
                    subresource: part.map(str::to_owned),
                    ..ResourceAttributes::default()
                }),
                ..SelfSubjectAccessReviewSpec::default()
            },
            ..SelfSubjectAccessReview::default()
        };
        let asked = Access { verb: "create", group: "authorization.k8s.io", resource: "selfsubjectaccessreviews" };
        let reviews: Api<SelfSubjectAccessReview> = Api::all(self.client.clone());
        let answer = self.ask(asked, async { reviews.create(&PostParams::default(), &review).await })?;
        Ok(answer.status.is_some_and(|status| status.allowed))
    }

    /// Starts a program in a pod, with its three streams.
    pub(super) fn exec(&self, pod: &str, container: &str, command: &[String]) -> Result<Connection, KubernetesError> {
        let streams = AttachParams::default().container(container).stdin(true).stdout(true).stderr(true);
        let request = kube::core::Request::new(Pod::url_path(&(), Some(&self.namespace)));
        let request = request.exec(pod, command, &streams).map_err(|error| self.told(access::EXEC, kube::Error::BuildRequest(error)))?;
        self.ask(access::EXEC, async { self.client.connect(request).await })
    }
}

fn gone(done: Result<(), KubernetesError>) -> Result<(), KubernetesError> {
    match done {
        Err(KubernetesError::Refused { status: 404, .. }) => Ok(()),
        done => done,
    }
}

/// An error with its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let more = cause.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        next = cause.source();
    }
    text
}

/// Is it about credentials? What a plugin wrote to its standard output may be one, and is not shown.
fn auth(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    let mut next = Some(error);
    while let Some(cause) = next {
        if let Some(auth) = cause.downcast_ref::<AuthError>() {
            return Some(match auth {
                AuthError::AuthExecRun { out, .. } => {
                    let said = crate::worker::wire::shown(out.stderr.trim_ascii(), 400);
                    format!("the plugin for credentials ended with {}: {said}", out.status)
                }
                AuthError::AuthExecParse(_) => "the plugin for credentials said something that is no credential".into(),
                other => other.to_string(),
            });
        }
        next = cause.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_roles_that_are_shipped() {
        let rules = format!("\nrules:\n{}", access::rules());
        for file in [
            include_str!("../../../../../deploy/kubernetes/kustomize/role.yaml"),
            include_str!("../../../../../deploy/kubernetes/helm/templates/rbac.yaml"),
        ] {
            assert!(file.contains(&rules), "{rules}");
        }
    }

    fn cluster(kubeconfig: &str) -> Result<Cluster, KubernetesError> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config");
        std::fs::write(&file, kubeconfig).unwrap();
        let variables = [("KUBECONFIG".to_owned(), file.display().to_string())].into();
        Cluster::of(&KubernetesPlace::default(), &Environment::fixed(variables, "/", None))
    }

    fn kubeconfig(server: &str, user: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Config\nclusters: [{{name: c, cluster: {{server: \"{server}\"}}}}]\nusers: [{{name: u, user: {user}}}]\n\
             contexts: [{{name: x, context: {{cluster: c, user: u, namespace: ci}}}}]\ncurrent-context: x\n"
        )
    }

    #[test]
    fn where_there_is_no_cluster() {
        let of = |pairs: &[(&str, &str)]| {
            let variables = pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
            Cluster::of(&KubernetesPlace::default(), &Environment::fixed(variables, "/", None)).unwrap_err().to_string()
        };
        assert!(of(&[]).contains("neither KUBECONFIG nor HOME is set"));
        assert!(of(&[("HOME", "/nowhere")]).contains("no kubeconfig (/nowhere/.kube/config)"));
        for (text, expect) in [
            ("{", "the kubeconfig cannot be used"),
            ("apiVersion: v1\nkind: Config\n", "the kubeconfig cannot be used"),
            (&kubeconfig("https://127.0.0.1:1", "{exec: {apiVersion: v1, command: x, interactiveMode: Always}}"), "wants a terminal"),
        ] {
            let error = cluster(text).unwrap_err().to_string();
            assert!(error.contains(expect), "{error}");
        }
    }

    #[test]
    fn who_does_not_answer() {
        let cluster = cluster(&kubeconfig("https://me:secret@127.0.0.1:1", "{}")).unwrap();
        assert_eq!(cluster.to_string(), "https://127.0.0.1:1, namespace ci");
        let error = cluster.jobs("a=b").unwrap_err();
        assert!(matches!(&error, KubernetesError::Unreachable { reason, .. } if reason.contains("refused")), "{error}");
    }

    #[test]
    fn a_plugin_that_fails_shows_no_secret() {
        let user = r#"{exec: {apiVersion: client.authentication.k8s.io/v1, interactiveMode: IfAvailable, command: sh, args: ["-c", "echo hunter2; echo no login >&2; exit 3"]}}"#;
        let error = match cluster(&kubeconfig("https://127.0.0.1:1", user)) {
            Ok(cluster) => cluster.jobs("a=b").unwrap_err().to_string(),
            Err(error) => error.to_string(),
        };
        assert!(error.contains("no login") && !error.contains("hunter2"), "{error}");
    }
}
