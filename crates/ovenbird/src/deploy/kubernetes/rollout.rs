//! How a rollout stands, read from what the cluster says of it: pure, so that every sentence can be tested without a cluster.

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ContainerStatus, Event, Pod};

use super::manifest::REVISION;
use crate::worker::wire::shown;

/// What is known.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) deployment: Option<Deployment>,
    /// Of every revision.
    pub(super) pods: Vec<Pod>,
    /// Of pods that are not ready, oldest first.
    pub(super) events: Vec<Event>,
}

/// How it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Standing {
    /// There is nothing.
    Gone,
    /// All of it is new, and ready.
    Done,
    /// Not yet; why, if that is known.
    Waiting(String),
    /// It will not come to anything by itself.
    Failed {
        /// Why, one sentence.
        reason: String,
        /// The pod whose log says more.
        pod: Option<String>,
    },
}

/// Numbers of a rollout: wanted, new and ready.
pub(super) fn numbers(deployment: &Deployment) -> (i32, i32) {
    let wanted = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
    let status = deployment.status.as_ref();
    let updated = status.and_then(|status| status.updated_replicas).unwrap_or(0);
    let available = status.and_then(|status| status.available_replicas).unwrap_or(0);
    (wanted, updated.min(available))
}

/// The revision of the pods that are wanted.
pub(super) fn revision(deployment: &Deployment) -> Option<&str> {
    deployment.spec.as_ref()?.template.metadata.as_ref()?.labels.as_ref()?.get(REVISION).map(String::as_str)
}

/// How it stands.
pub(super) fn standing(seen: &Seen) -> Standing {
    let Some(deployment) = &seen.deployment else { return Standing::Gone };
    let (wanted, ready) = numbers(deployment);
    let status = deployment.status.as_ref();
    let observed = status.and_then(|status| status.observed_generation) >= deployment.metadata.generation;
    let all = status.and_then(|status| status.replicas).unwrap_or(0);
    if observed && ready == wanted && all == wanted {
        return Standing::Done;
    }
    let wanted_revision = revision(deployment);
    let is_new = |pod: &&Pod| pod.metadata.labels.as_ref().and_then(|labels| labels.get(REVISION)).map(String::as_str) == wanted_revision;
    let mut waiting = None;
    for pod in seen.pods.iter().filter(is_new) {
        match trouble(pod, &seen.events) {
            Some(failed @ Standing::Failed { .. }) => return failed,
            Some(Standing::Waiting(why)) => waiting = Some(why),
            _ => {}
        }
    }
    for condition in status.and_then(|status| status.conditions.as_ref()).into_iter().flatten() {
        let message = condition.message.as_deref().map(line).unwrap_or_default();
        if condition.type_ == "Progressing" && condition.status == "False" {
            let reason = format!("the cluster gave the rollout up ({})", condition.reason.as_deref().unwrap_or("no progress"));
            return Standing::Failed { reason: format!("{reason}: {}", waiting.unwrap_or(message)), pod: None };
        }
        if condition.type_ == "ReplicaFailure" && condition.status == "True" {
            return Standing::Failed { reason: format!("the cluster makes no pod: {message}"), pod: None };
        }
    }
    Standing::Waiting(waiting.unwrap_or_else(|| format!("{ready} of {wanted} are ready")))
}

/// Foreign text on one line.
fn line(text: &str) -> String {
    shown(text.trim().as_bytes(), 600)
}

fn told(pod: &str, events: &[Event], reasons: &[&str]) -> Option<String> {
    let fits = |event: &&Event| {
        event.involved_object.name.as_deref() == Some(pod) && event.reason.as_deref().is_some_and(|reason| reasons.contains(&reason))
    };
    events.iter().rev().find(fits).and_then(|event| event.message.as_deref().map(line))
}

/// What is wrong with a pod; nothing: it runs.
fn trouble(pod: &Pod, events: &[Event]) -> Option<Standing> {
    let name = pod.metadata.name.clone().unwrap_or_default();
    let status = pod.status.as_ref()?;
    let unscheduled = status.conditions.iter().flatten().find(|condition| condition.type_ == "PodScheduled" && condition.status == "False");
    if let Some(condition) = unscheduled {
        let message = condition.message.as_deref().map(line).unwrap_or_default();
        return Some(Standing::Waiting(format!("no node takes the pod {name}: {message}")));
    }
    if let Some(message) = told(&name, events, &["FailedMount", "FailedCreatePodSandBox"]) {
        return Some(Standing::Waiting(format!("the node cannot prepare the pod {name}: {message}")));
    }
    let container = status.container_statuses.as_ref()?.first()?;
    let waiting = container.state.as_ref().and_then(|state| state.waiting.as_ref());
    let reason = waiting.and_then(|waiting| waiting.reason.as_deref()).unwrap_or_default();
    let message = || waiting.and_then(|waiting| waiting.message.as_deref()).map(line).unwrap_or_default();
    match reason {
        // Once may be an accident.
        "ErrImagePull" => Some(Standing::Waiting(format!("the node cannot pull the image: {}", message()))),
        "ImagePullBackOff" | "InvalidImageName" | "ErrImageNeverPull" => {
            let said = told(&name, events, &["Failed"]).unwrap_or_else(message);
            Some(Standing::Failed { reason: format!("the node cannot pull the image ({reason}): {said}"), pod: None })
        }
        "CreateContainerConfigError" | "CreateContainerError" | "RunContainerError" => {
            let said = if message().is_empty() { told(&name, events, &["Failed"]).unwrap_or_default() } else { message() };
            Some(Standing::Failed { reason: format!("the node cannot start the container ({reason}): {said}"), pod: None })
        }
        "CrashLoopBackOff" => Some(Standing::Failed { reason: ended(container), pod: Some(name) }),
        _ => (container.restart_count > 1)
            .then(|| Standing::Waiting(format!("the pod {name} was started {} times", container.restart_count + 1))),
    }
}

/// How a container ended that ends again and again.
fn ended(container: &ContainerStatus) -> String {
    let last = container.last_state.as_ref().or(container.state.as_ref()).and_then(|state| state.terminated.as_ref());
    match last {
        Some(last) if last.reason.as_deref() == Some("OOMKilled") => "the container runs out of memory again and again (OOMKilled)".into(),
        Some(last) => format!("the container ends again and again, with code {}", last.exit_code),
        None => "the container ends again and again".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn check(status: &Value, pod: Option<Value>, event: Option<(&str, &str)>, expect: &str) {
        let deployment: Deployment = serde_json::from_value(json!({
            "metadata": {"name": "a", "generation": 2},
            "spec": {"replicas": 2, "selector": {}, "template": {"metadata": {"labels": {REVISION: "r"}}}},
            "status": status,
        }))
        .unwrap();
        let pods = pod.into_iter().flat_map(|status| {
            // The old one has the same trouble, and is nobody's business.
            ["r", "old"].map(|revision| json!({"metadata": {"name": "p", "labels": {REVISION: revision}}, "status": status}))
        });
        let events = event.into_iter().map(|(reason, message)| {
            serde_json::from_value(json!({"metadata": {}, "involvedObject": {"name": "p"}, "reason": reason, "message": message})).unwrap()
        });
        let seen = Seen {
            deployment: Some(deployment),
            pods: pods.map(|pod| serde_json::from_value(pod).unwrap()).collect(),
            events: events.collect(),
        };
        let got = format!("{:?}", standing(&seen));
        assert!(got.contains(expect), "{expect}: {got}");
    }

    fn waiting(reason: &str, message: &str) -> Value {
        json!({"containerStatuses": [{"name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 3,
            "state": {"waiting": {"reason": reason, "message": message}}, "lastState": {"terminated": {"exitCode": 7}}}]})
    }

    #[test]
    fn sentences() {
        let partly = || json!({"observedGeneration": 2, "replicas": 3, "updatedReplicas": 1, "availableReplicas": 2});
        check(&json!({"observedGeneration": 2, "replicas": 2, "updatedReplicas": 2, "availableReplicas": 2}), None, None, "Done");
        // What is known is of the time before.
        check(
            &json!({"observedGeneration": 1, "replicas": 2, "updatedReplicas": 2, "availableReplicas": 2}),
            None,
            None,
            "2 of 2 are ready",
        );
        check(&json!({"observedGeneration": 2, "replicas": 3, "updatedReplicas": 2, "availableReplicas": 3}), None, None, "Waiting");
        check(&json!({}), None, None, "Waiting(\"0 of 2 are ready\")");
        check(&partly(), Some(waiting("ContainerCreating", "")), None, "Waiting(\"the pod p was started 4 times\")");
        check(&partly(), Some(waiting("ErrImagePull", "404")), None, "Waiting(\"the node cannot pull the image: 404\")");
        check(
            &partly(),
            Some(waiting("ImagePullBackOff", "Back-off")),
            Some(("Failed", "not found")),
            "Failed { reason: \"the node cannot pull the image (ImagePullBackOff): not found\"",
        );
        check(
            &partly(),
            Some(waiting("CreateContainerConfigError", "secret \"s\" not found")),
            None,
            "the node cannot start the container (CreateContainerConfigError): secret \\\"s\\\" not found",
        );
        check(&partly(), Some(waiting("CrashLoopBackOff", "")), None, "again and again, with code 7\", pod: Some(\"p\")");
        check(
            &partly(),
            Some(json!({"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/1 nodes: Insufficient cpu"}]})),
            None,
            "Waiting(\"no node takes the pod p: 0/1 nodes: Insufficient cpu\")",
        );
        let gave_up = json!({"observedGeneration": 2, "conditions": [{"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded", "message": "m"}]});
        check(&gave_up, None, None, "the cluster gave the rollout up (ProgressDeadlineExceeded): m");
        let no_pod =
            json!({"observedGeneration": 2, "conditions": [{"type": "ReplicaFailure", "status": "True", "message": "exceeded quota"}]});
        check(&no_pod, None, None, "the cluster makes no pod: exceeded quota");
        assert_eq!(standing(&Seen::default()), Standing::Gone);
    }
}
