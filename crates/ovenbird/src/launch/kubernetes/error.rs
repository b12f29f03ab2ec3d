//! What can go wrong in a cluster, each in one sentence, with the words of the cluster itself.

use crate::error::{Error, Kind};

/// What is done to what, as the cluster's rules name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// `get`, `create`…
    pub verb: &'static str,
    /// API group; empty: the core.
    pub group: &'static str,
    /// `pods`, `pods/exec`…
    pub resource: &'static str,
}

impl Access {
    /// The rule that allows it, as it stands in a role.
    pub fn rule(&self) -> String {
        format!("{{apiGroups: [\"{}\"], resources: [\"{}\"], verbs: [\"{}\"]}}", self.group, self.resource, self.verb)
    }
}

/// What can go wrong between here and the cluster, and with the pod there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KubernetesError {
    /// There is nothing that says where a cluster is.
    #[error("there is no cluster to build in: no kubeconfig ({looked}), and this is no pod")]
    NoCluster {
        /// Where one was looked for.
        looked: String,
    },
    /// The kubeconfig says something that cannot be used.
    #[error("the kubeconfig cannot be used: {reason}")]
    Kubeconfig {
        /// Why.
        reason: String,
        /// The contexts that there are.
        contexts: Vec<String>,
    },
    /// No image to start.
    #[error("there is no image for the build's pod")]
    NoImage,
    /// Nobody answers.
    #[error("cannot reach the Kubernetes API at {server}: {reason}")]
    Unreachable {
        /// Where.
        server: String,
        /// Why.
        reason: String,
    },
    /// It does not know who asks.
    #[error("the Kubernetes API at {server} does not accept the credentials: {reason}")]
    Unauthorized {
        /// Where.
        server: String,
        /// Its words.
        reason: String,
    },
    /// A rule is missing.
    #[error("the cluster does not allow to {} {} in the namespace {namespace}: {message}", access.verb, access.resource)]
    Forbidden {
        /// What was tried.
        access: Access,
        /// Where.
        namespace: String,
        /// The cluster's words.
        message: String,
    },
    /// There is no such namespace.
    #[error("the namespace {namespace} does not exist in the cluster at {server}")]
    NoNamespace {
        /// Which.
        namespace: String,
        /// Where.
        server: String,
    },
    /// It said no.
    #[error("the cluster refused to {} {}: {message}", access.verb, access.resource)]
    Refused {
        /// What was tried.
        access: Access,
        /// HTTP status.
        status: u16,
        /// Its words.
        message: String,
    },
    /// The answer is none, or breaks off.
    #[error("the Kubernetes API at {server} gave no answer to {} {}: {reason}", access.verb, access.resource)]
    Broken {
        /// Where.
        server: String,
        /// What was tried.
        access: Access,
        /// Why.
        reason: String,
    },
    /// A quota is used up.
    #[error("the quota of the namespace {namespace} is exceeded: {message}")]
    Quota {
        /// Which.
        namespace: String,
        /// The event's words.
        message: String,
    },
    /// There is no such service account.
    #[error("the service account {account} does not exist in the namespace {namespace}: {message}")]
    NoServiceAccount {
        /// Which.
        account: String,
        /// Where.
        namespace: String,
        /// The event's words.
        message: String,
    },
    /// The cluster makes no pod for another reason.
    #[error("the cluster does not make the build's pod: {message}")]
    NoPod {
        /// The event's words.
        message: String,
    },
    /// No node takes it.
    #[error("the build's pod cannot be scheduled within {seconds} s: {message}")]
    Unschedulable {
        /// How long it was waited for.
        seconds: u64,
        /// The event's words.
        message: String,
    },
    /// Its volume is not there.
    #[error("the volume claim {claim} of the build's pod is not bound: {message}")]
    Unbound {
        /// Which.
        claim: String,
        /// The event's words.
        message: String,
    },
    /// The node cannot have the image.
    #[error("the node cannot pull the image {image} of the build's pod: {message}")]
    ImagePull {
        /// Which.
        image: String,
        /// The event's words.
        message: String,
    },
    /// The node cannot make or start the container.
    #[error("the node cannot start the container of the build: {message}")]
    NoContainer {
        /// The event's words.
        message: String,
    },
    /// It did not begin for no reason that is known.
    #[error("the build's pod did not begin within {seconds} s: {message}")]
    Slow {
        /// How long it was waited for.
        seconds: u64,
        /// What was heard last.
        message: String,
    },
    /// Too much of the node's disk.
    #[error("the build's pod was evicted: {message}")]
    Evicted {
        /// The event's words.
        message: String,
    },
    /// Too much memory.
    #[error("the build's pod ran out of memory and was killed (OOMKilled, limit {limit})")]
    OutOfMemory {
        /// The limit.
        limit: String,
    },
    /// It took too long.
    #[error("the build took longer than {seconds} s and was ended (DeadlineExceeded)")]
    Deadline {
        /// The limit.
        seconds: u64,
    },
    /// Somebody, or the end of its node, took it away.
    #[error("the build's pod {pod} is gone: {message}")]
    Gone {
        /// Its name.
        pod: String,
        /// What is known.
        message: String,
    },
    /// It ended by itself.
    #[error("the container of the build ended with code {code}{said}")]
    Ended {
        /// Exit code.
        code: i32,
        /// What it said.
        said: String,
    },
    /// Stopped by the user.
    #[error("cancelled")]
    Cancelled,
}

impl KubernetesError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NoCluster { .. } => "set KUBECONFIG, or write ~/.kube/config".into(),
            Self::Kubeconfig { contexts, .. } if !contexts.is_empty() => format!("its contexts are: {}", contexts.join(", ")),
            Self::NoImage => "give one whose entrypoint is ovenbird: --on kubernetes,image=NAME or the setting [kubernetes] image; \
                              `ovenbird self-image -t NAME --push` makes it"
                .into(),
            Self::Unreachable { .. } => "is the context the right one? `kubectl cluster-info` asks the same".into(),
            Self::Unauthorized { .. } => "log in to the cluster again".into(),
            Self::Forbidden { access, .. } => {
                format!("add to the role: {}; `ovenbird doctor --on kubernetes` lists every rule that a build needs", access.rule())
            }
            Self::NoNamespace { namespace, .. } => format!("`kubectl create namespace {namespace}`, or --on kubernetes,namespace=NAME"),
            Self::Quota { .. } => "wait for other builds, or ask for less with requests.RESOURCE=, limits.RESOURCE=".into(),
            Self::NoServiceAccount { account, .. } => {
                format!("`kubectl create serviceaccount {account}`, or leave serviceaccount= out")
            }
            Self::Unschedulable { message, .. } if message.contains("Insufficient") => {
                "ask for less with requests.RESOURCE=, or wait longer with start-timeout=".into()
            }
            Self::Unschedulable { message, .. } if message.contains("taint") => "name the taint with toleration=KEY=VALUE:EFFECT".into(),
            Self::Unschedulable { .. } => {
                "look at nodeselector=, affinity and the labels of the nodes (`kubectl get nodes --show-labels`)".into()
            }
            Self::Unbound { claim, .. } => format!("`kubectl describe pvc {claim}` says why"),
            Self::ImagePull { .. } => "is the name right, and can the node reach the registry? Credentials: pull-secret=NAME".into(),
            Self::Evicted { .. } => {
                "ask for more with requests.ephemeral-storage= and limits.ephemeral-storage=, or keep the state on a claim=".into()
            }
            Self::OutOfMemory { .. } => "raise it with limits.memory=".into(),
            Self::Deadline { .. } => "raise it with timeout=".into(),
            Self::Slow { .. } => "wait longer with start-timeout=".into(),
            _ => return None,
        })
    }
}

impl From<KubernetesError> for Error {
    fn from(error: KubernetesError) -> Self {
        let kind = match &error {
            KubernetesError::NoCluster { .. } | KubernetesError::Kubeconfig { .. } | KubernetesError::NoImage => Kind::Configuration,
            KubernetesError::Cancelled => Kind::Cancelled,
            _ => Kind::Driver,
        };
        let told = Self::from_chain(kind, &error);
        match error.hint() {
            Some(hint) => told.hint(hint),
            None => told,
        }
    }
}
