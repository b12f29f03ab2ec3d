//! How a build's pod stands, read from what the cluster says of it: pure, so that every sentence can be tested without a cluster.

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ContainerState, ContainerStatus, Event, Pod};

use super::error::KubernetesError;

/// What is known of a build from outside.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// `None`: it is gone.
    pub(super) job: Option<Job>,
    /// The newest, if there is any.
    pub(super) pod: Option<Pod>,
    /// Of both, oldest first.
    pub(super) events: Vec<Event>,
}

/// What was asked of the pod, for the sentences.
#[derive(Debug)]
pub(super) struct Asked<'a> {
    pub(super) namespace: &'a str,
    /// The pod, when it is known which.
    pub(super) pod: Option<&'a str>,
    pub(super) image: &'a str,
    pub(super) account: &'a str,
    pub(super) claim: Option<&'a str>,
    pub(super) memory: &'a str,
    pub(super) timeout: u64,
}

/// How it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Standing {
    /// Not yet; why, in a few words.
    Waiting(String),
    /// The container runs in the pod of this name.
    Running(String),
    /// It will not run, or runs no more.
    Failed(KubernetesError),
    /// It ran to its end.
    Done,
}

/// `Reason: message` of the newest event with one of these reasons.
fn told(seen: &Seen, reasons: &[&str]) -> Option<String> {
    let event = seen.events.iter().rev().find(|event| event.reason.as_deref().is_some_and(|reason| reasons.contains(&reason)))?;
    let reason = event.reason.as_deref().unwrap_or_default();
    Some(event.message.as_deref().map_or_else(|| reason.to_owned(), |message| format!("{reason}: {}", line(message))))
}

/// Foreign text on one line.
fn line(text: &str) -> String {
    crate::worker::wire::shown(text.trim().as_bytes(), 600)
}

/// The container of a pod.
fn container(pod: &Pod) -> Option<&ContainerStatus> {
    pod.status.as_ref()?.container_statuses.as_ref()?.first()
}

fn state(pod: &Pod) -> Option<&ContainerState> {
    container(pod)?.state.as_ref()
}

/// How it stands.
pub(super) fn standing(seen: &Seen, asked: &Asked<'_>) -> Standing {
    let Some(pod) = &seen.pod else { return without_pod(seen, asked) };
    let name = pod.metadata.name.clone().unwrap_or_default();
    let (phase, reason, message) = pod.status.as_ref().map_or(("", "", ""), |status| {
        (
            status.phase.as_deref().unwrap_or_default(),
            status.reason.as_deref().unwrap_or_default(),
            status.message.as_deref().unwrap_or_default(),
        )
    });
    match reason {
        "Evicted" => return Standing::Failed(KubernetesError::Evicted { message: format!("Evicted: {}", line(message)) }),
        "DeadlineExceeded" => return Standing::Failed(KubernetesError::Deadline { seconds: asked.timeout }),
        "NodeLost" | "Shutdown" | "NodeShutdown" | "Terminated" => {
            return Standing::Failed(KubernetesError::Gone { pod: name, message: format!("{reason}: {}", line(message)) });
        }
        _ => {}
    }
    if let Some(error) = job_failed(seen, asked) {
        return Standing::Failed(error);
    }
    if let Some(ended) = state(pod).and_then(|state| state.terminated.as_ref()) {
        if ended.reason.as_deref() == Some("OOMKilled") {
            return Standing::Failed(KubernetesError::OutOfMemory { limit: asked.memory.to_owned() });
        }
        if pod.metadata.deletion_timestamp.is_some() {
            return Standing::Failed(deleted(seen, name));
        }
        if ended.exit_code == 0 {
            return Standing::Done;
        }
        if let Some(message) = told(seen, &["Evicted"]) {
            return Standing::Failed(KubernetesError::Evicted { message });
        }
        let said = ended.message.as_deref().map(line).filter(|said| !said.is_empty()).map_or_else(String::new, |said| format!(": {said}"));
        return Standing::Failed(KubernetesError::Ended { code: ended.exit_code, said });
    }
    if pod.metadata.deletion_timestamp.is_some() {
        return Standing::Failed(deleted(seen, name));
    }
    let lost = pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some())
        && pod.status.as_ref().and_then(|status| status.conditions.as_ref()).is_some_and(|conditions| {
            conditions.iter().any(|c| c.type_ == "Ready" && (c.status == "Unknown" || c.reason.as_deref() == Some("NodeStatusUnknown")))
        });
    if lost || told(seen, &["NodeNotReady"]).is_some() {
        let message = told(seen, &["NodeNotReady"]).unwrap_or_else(|| "its node does not answer".into());
        return Standing::Failed(KubernetesError::Gone { pod: name, message });
    }
    if state(pod).is_some_and(|state| state.running.is_some()) && phase == "Running" {
        return Standing::Running(name);
    }
    if phase == "Succeeded" {
        return Standing::Done;
    }
    if let Some(waiting) = state(pod).and_then(|state| state.waiting.as_ref()) {
        let reason = waiting.reason.as_deref().unwrap_or_default();
        let message = || {
            // The container's own words soon only say that it is tried again.
            let said = waiting.message.as_deref().map(line).unwrap_or_default();
            // The event that has the reason says more than the one that follows it.
            let said_first = seen.events.iter().filter(|event| event.reason.as_deref() == Some("Failed"));
            let said_first = said_first.filter_map(|event| event.message.as_deref()).find(|message| message.starts_with("Failed to pull"));
            let failed = said_first.map(line).or_else(|| told(seen, &["Failed", "InspectFailed"]));
            match failed {
                Some(event) => format!("{reason}: {event}"),
                None => format!("{reason}: {said}"),
            }
        };
        match reason {
            "ErrImagePull" | "ImagePullBackOff" | "InvalidImageName" | "ErrImageNeverPull" | "RegistryUnavailable" => {
                return Standing::Failed(KubernetesError::ImagePull { image: asked.image.to_owned(), message: message() });
            }
            "CreateContainerConfigError" | "CreateContainerError" | "RunContainerError" | "CrashLoopBackOff" => {
                return Standing::Failed(KubernetesError::NoContainer { message: message() });
            }
            _ => {}
        }
    }
    if let Some(message) = told(seen, &["FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox", "FailedScheduling"]) {
        return Standing::Waiting(message);
    }
    let unscheduled = pod
        .status
        .as_ref()
        .and_then(|status| status.conditions.as_ref())
        .and_then(|conditions| conditions.iter().find(|condition| condition.type_ == "PodScheduled" && condition.status == "False"));
    Standing::Waiting(match unscheduled {
        Some(condition) => format!(
            "{}: {}",
            condition.reason.as_deref().unwrap_or("FailedScheduling"),
            condition.message.as_deref().map(line).unwrap_or_default()
        ),
        None if state(pod).is_some() => "the node prepares the container".into(),
        None => "the pod waits for a node".into(),
    })
}

fn deleted(seen: &Seen, pod: String) -> KubernetesError {
    let message = told(seen, &["Evicted", "Preempted", "TaintManagerEviction", "Killing"]);
    KubernetesError::Gone { pod, message: message.unwrap_or_else(|| "it was deleted".into()) }
}

/// The job's own end, when it is not the pod's.
fn job_failed(seen: &Seen, asked: &Asked<'_>) -> Option<KubernetesError> {
    let conditions = seen.job.as_ref()?.status.as_ref()?.conditions.as_ref()?;
    let failed = conditions.iter().find(|condition| condition.type_ == "Failed" && condition.status == "True")?;
    (failed.reason.as_deref() == Some("DeadlineExceeded")).then_some(KubernetesError::Deadline { seconds: asked.timeout })
}

fn without_pod(seen: &Seen, asked: &Asked<'_>) -> Standing {
    let gone =
        |message: &str| Standing::Failed(KubernetesError::Gone { pod: asked.pod.unwrap_or_default().into(), message: message.into() });
    let Some(job) = &seen.job else { return gone("its job was deleted") };
    if let Some(error) = job_failed(seen, asked) {
        return Standing::Failed(error);
    }
    if let Some(pod) = asked.pod {
        return Standing::Failed(deleted(seen, pod.to_owned()));
    }
    if let Some(message) = told(seen, &["FailedCreate"]) {
        let namespace = asked.namespace.to_owned();
        return Standing::Failed(if message.contains("exceeded quota") || message.contains("failed quota") {
            KubernetesError::Quota { namespace, message }
        } else if message.contains("serviceaccount") && message.contains("not found") {
            KubernetesError::NoServiceAccount { account: asked.account.to_owned(), namespace, message }
        } else {
            KubernetesError::NoPod { message }
        });
    }
    let status = job.status.as_ref();
    if status.is_some_and(|status| status.failed.unwrap_or(0) > 0 || status.succeeded.unwrap_or(0) > 0) {
        return gone("it was deleted");
    }
    Standing::Waiting("the cluster makes the pod".into())
}

/// What a wait that took too long comes to.
pub(super) fn too_long(waiting: String, asked: &Asked<'_>, seconds: u64) -> KubernetesError {
    let about_volume = ["persistentvolumeclaim", "PersistentVolumeClaim", "FailedMount", "FailedAttachVolume"];
    match asked.claim {
        Some(claim) if about_volume.iter().any(|word| waiting.contains(word)) => {
            KubernetesError::Unbound { claim: claim.to_owned(), message: waiting }
        }
        _ if waiting.starts_with("FailedScheduling") || waiting.starts_with("Unschedulable") => {
            KubernetesError::Unschedulable { seconds, message: waiting }
        }
        _ => KubernetesError::Slow { seconds, message: waiting },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: Asked<'static> =
        Asked { namespace: "ci", pod: None, image: "r.test/o:1", account: "builder", claim: Some("cache"), memory: "64Mi", timeout: 90 };

    fn pod(status: serde_json::Value) -> Pod {
        let mut pod = serde_json::json!({"metadata": {"name": "p"}, "spec": {"containers": [], "nodeName": "n"}});
        pod["status"] = status;
        serde_json::from_value(pod).unwrap()
    }

    fn event(reason: &str, message: &str) -> Event {
        serde_json::from_value(serde_json::json!({"metadata": {}, "involvedObject": {}, "reason": reason, "message": message})).unwrap()
    }

    fn waiting(reason: &str) -> serde_json::Value {
        serde_json::json!({"phase": "Pending", "containerStatuses": [{"name": "c", "image": "", "imageID": "", "ready": false,
            "restartCount": 0, "state": {"waiting": {"reason": reason, "message": "again"}}}]})
    }

    fn ended(reason: &str, code: i32) -> serde_json::Value {
        serde_json::json!({"phase": "Failed", "containerStatuses": [{"name": "c", "image": "", "imageID": "", "ready": false,
            "restartCount": 0, "state": {"terminated": {"reason": reason, "exitCode": code, "message": "last\nwords"}}}]})
    }

    fn check(status: Option<serde_json::Value>, events: &[(&str, &str)], expect: &str) {
        let seen = Seen {
            job: Some(Job::default()),
            pod: status.map(pod),
            events: events.iter().map(|(reason, message)| event(reason, message)).collect(),
        };
        let got = match standing(&seen, &ASKED) {
            Standing::Waiting(why) => format!("waiting: {why} / {}", too_long(why.clone(), &ASKED, 5)),
            Standing::Running(pod) => format!("running: {pod}"),
            Standing::Failed(error) => error.to_string(),
            Standing::Done => "done".into(),
        };
        assert!(got.contains(expect), "{expect}: {got}");
    }

    #[test]
    fn sentences() {
        let pending = || Some(serde_json::json!({"phase": "Pending"}));
        check(None, &[], "waiting: the cluster makes the pod");
        check(
            None,
            &[("FailedCreate", "pods \"x\" is forbidden: exceeded quota: q")],
            "the quota of the namespace ci is exceeded: FailedCreate",
        );
        check(
            None,
            &[("FailedCreate", "error looking up service account ci/builder: serviceaccount \"builder\" not found")],
            "the service account builder does not exist in the namespace ci",
        );
        check(None, &[("FailedCreate", "denied by a webhook")], "the cluster does not make the build's pod: FailedCreate: denied");
        check(
            pending(),
            &[("FailedScheduling", "0/1 nodes: Insufficient cpu")],
            "the build's pod cannot be scheduled within 5 s: FailedScheduling",
        );
        check(
            pending(),
            &[("FailedScheduling", "persistentvolumeclaim \"cache\" not found")],
            "the volume claim cache of the build's pod is not bound",
        );
        check(Some(waiting("ContainerCreating")), &[], "waiting: the node prepares");
        check(
            Some(waiting("ImagePullBackOff")),
            &[("Failed", "Failed to pull image: 404"), ("Failed", "Error: ErrImagePull"), ("BackOff", "x")],
            "cannot pull the image r.test/o:1 of the build's pod: ImagePullBackOff: Failed to pull image: 404",
        );
        check(
            Some(waiting("CreateContainerConfigError")),
            &[],
            "cannot start the container of the build: CreateContainerConfigError: again",
        );
        check(Some(ended("OOMKilled", 137)), &[], "ran out of memory and was killed (OOMKilled, limit 64Mi)");
        check(Some(ended("Error", 3)), &[], "ended with code 3: last words");
        check(Some(ended("Completed", 0)), &[], "done");
        check(
            Some(serde_json::json!({"phase": "Failed", "reason": "Evicted", "message": "disk"})),
            &[],
            "the build's pod was evicted: Evicted: disk",
        );
        check(Some(serde_json::json!({"phase": "Failed", "reason": "DeadlineExceeded"})), &[], "took longer than 90 s");
        check(
            Some(serde_json::json!({"phase": "Running", "reason": "NodeLost", "message": "n"})),
            &[],
            "the build's pod p is gone: NodeLost",
        );
        check(
            Some(serde_json::json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "Unknown"}]})),
            &[],
            "its node does not answer",
        );
    }

    #[test]
    fn a_pod_that_was_known() {
        let told = |seen: &Seen| match standing(seen, &Asked { pod: Some("p-1"), ..ASKED }) {
            Standing::Failed(error) => error.to_string(),
            other => format!("{other:?}"),
        };
        let job = || Some(Job::default());
        for (events, expect) in [(vec![], "it was deleted"), (vec![event("Evicted", "node drain")], "Evicted: node drain")] {
            assert_eq!(told(&Seen { job: job(), pod: None, events }), format!("the build's pod p-1 is gone: {expect}"));
        }
        assert_eq!(told(&Seen::default()), "the build's pod p-1 is gone: its job was deleted");
    }
}
