//! The job of a build: a value made of a value, so that all of it can be looked at in a test.
//!
//! The pod satisfies the Pod Security Standard that it is named after, has no token of the cluster, no secret in its specification, and is
//! never started a second time.

use std::collections::BTreeMap;

use k8s_openapi::api::batch::v1::{Job, JobSpec};
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::api::ObjectMeta;

use super::place::{KubernetesPlace, Security, Time};
use crate::self_image::STATE;

/// Label of everything that this program makes in clusters.
pub(super) const MANAGED: (&str, &str) = ("app.kubernetes.io/managed-by", "ovenbird");

/// Label with the build's id.
pub(super) const BUILD: &str = "io.ovenbird/build";

/// Annotation with who waits for the build.
pub(super) const CALLER: &str = "io.ovenbird/caller";

/// Annotation with when that one was last there, seconds since 1970.
pub(super) const HEARTBEAT: &str = "io.ovenbird/heartbeat";

/// The container.
pub(super) const CONTAINER: &str = "ovenbird";

/// Where the worker listens in the pod: a folder of its own, for the state may be shared with other pods.
pub(super) const SOCKET: &str = "/run/ovenbird/worker.sock";

/// Where the secret with credentials is in the pod.
pub(super) const CREDENTIALS: &str = "/run/ovenbird-credentials/config.json";

/// The user of restricted pods.
const USER: i64 = 1000;

/// How long the pod may take to end when it is asked to.
const GRACE: i64 = 5;

/// How long a build may take when nothing else is said.
pub(super) const TIMEOUT: Time = Time::of_seconds(2 * 3600);

/// How long an ended job stays when nothing else is said.
pub(super) const TTL: Time = Time::of_seconds(600);

/// Everything of a job that is not in the place.
#[derive(Debug)]
pub(super) struct Build<'a> {
    /// Its id.
    pub(super) id: &'a str,
    /// The image.
    pub(super) image: &'a str,
    /// Arguments of the image's entrypoint.
    pub(super) arguments: Vec<String>,
    /// Who waits for it.
    pub(super) caller: String,
    /// Seconds since 1970.
    pub(super) now: i64,
}

/// The name of a build's job.
pub(super) fn name(id: &str) -> String {
    format!("ovenbird-build-{id}")
}

fn quantities(amounts: &BTreeMap<String, String>) -> Option<BTreeMap<String, Quantity>> {
    (!amounts.is_empty()).then(|| amounts.iter().map(|(resource, amount)| (resource.clone(), Quantity(amount.clone()))).collect())
}

/// The job.
pub(super) fn job(place: &KubernetesPlace, build: Build<'_>) -> Job {
    let labels: BTreeMap<String, String> =
        [MANAGED, ("app.kubernetes.io/name", "ovenbird"), ("app.kubernetes.io/component", "build"), (BUILD, build.id)]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into();
    let annotations = BTreeMap::from([(CALLER.to_owned(), build.caller), (HEARTBEAT.to_owned(), build.now.to_string())]);
    let filters = core::SeccompProfile { type_: "RuntimeDefault".into(), localhost_profile: None };
    let restricted = place.security.unwrap_or_default() == Security::Restricted;
    let of_pod = if restricted {
        core::PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(USER),
            run_as_group: Some(USER),
            fs_group: Some(USER),
            seccomp_profile: Some(filters),
            ..core::PodSecurityContext::default()
        }
    } else {
        core::PodSecurityContext { run_as_user: Some(0), seccomp_profile: Some(filters), ..core::PodSecurityContext::default() }
    };
    let of_container = restricted.then(|| core::SecurityContext {
        allow_privilege_escalation: Some(false),
        capabilities: Some(core::Capabilities { drop: Some(vec!["ALL".into()]), add: None }),
        ..core::SecurityContext::default()
    });
    let volume =
        |name: &str| core::Volume { name: name.into(), empty_dir: Some(core::EmptyDirVolumeSource::default()), ..core::Volume::default() };
    let state = match &place.claim {
        None => volume("state"),
        Some(claim) => core::Volume {
            name: "state".into(),
            persistent_volume_claim: Some(core::PersistentVolumeClaimVolumeSource { claim_name: claim.clone(), read_only: None }),
            ..core::Volume::default()
        },
    };
    let credentials = place.credentials.as_ref().map(|secret| core::Volume {
        name: "credentials".into(),
        secret: Some(core::SecretVolumeSource {
            secret_name: Some(secret.clone()),
            items: Some(vec![core::KeyToPath { key: ".dockerconfigjson".into(), path: "config.json".into(), mode: None }]),
            ..core::SecretVolumeSource::default()
        }),
        ..core::Volume::default()
    });
    let mount = |name: &str, path: &str| core::VolumeMount { name: name.into(), mount_path: path.into(), ..core::VolumeMount::default() };
    let variable = |name: &str, value: String| core::EnvVar { name: name.into(), value: Some(value), value_from: None };
    let container = core::Container {
        name: CONTAINER.into(),
        image: Some(build.image.to_owned()),
        args: Some(build.arguments),
        env: Some(vec![
            variable("OVENBIRD_ROOT", STATE.into()),
            variable("TMPDIR", format!("{STATE}/tmp")),
            variable("HOME", "/run/ovenbird".into()),
        ]),
        resources: Some(core::ResourceRequirements {
            requests: quantities(&place.requests),
            limits: quantities(&place.limits),
            ..core::ResourceRequirements::default()
        }),
        security_context: of_container,
        volume_mounts: Some(
            [mount("state", STATE), mount("run", "/run/ovenbird")]
                .into_iter()
                .chain(credentials.iter().map(|_| mount("credentials", "/run/ovenbird-credentials")))
                .collect(),
        ),
        // Where the program tells what became of it, without anybody who listens.
        termination_message_policy: Some("FallbackToLogsOnError".into()),
        ..core::Container::default()
    };
    let toleration = |toleration: &super::place::Toleration| core::Toleration {
        key: Some(toleration.key.clone()),
        operator: Some(if toleration.value.is_some() { "Equal" } else { "Exists" }.into()),
        value: toleration.value.clone(),
        effect: toleration.effect.clone(),
        toleration_seconds: None,
    };
    let secret = |name: &String| core::LocalObjectReference { name: name.clone() };
    let pod = core::PodSpec {
        containers: vec![container],
        volumes: Some([state, volume("run")].into_iter().chain(credentials).collect()),
        restart_policy: Some("Never".into()),
        security_context: Some(of_pod),
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        termination_grace_period_seconds: Some(GRACE),
        service_account_name: place.service_account.clone(),
        priority_class_name: place.priority_class.clone(),
        node_selector: (!place.node_selector.is_empty()).then(|| place.node_selector.clone()),
        tolerations: (!place.tolerations.is_empty()).then(|| place.tolerations.iter().map(toleration).collect()),
        affinity: place.affinity.clone().and_then(|affinity| serde_json::from_value(affinity).ok()),
        image_pull_secrets: (!place.pull_secrets.is_empty()).then(|| place.pull_secrets.iter().map(secret).collect()),
        ..core::PodSpec::default()
    };
    let seconds = |time: Time| i64::try_from(time.seconds()).unwrap_or(i64::MAX);
    Job {
        metadata: ObjectMeta {
            name: Some(name(build.id)),
            labels: Some(labels.clone()),
            annotations: Some(annotations),
            ..ObjectMeta::default()
        },
        spec: Some(JobSpec {
            // A broken Dockerfile is broken the second time, too.
            backoff_limit: Some(0),
            active_deadline_seconds: Some(seconds(place.timeout.unwrap_or(TIMEOUT))),
            ttl_seconds_after_finished: i32::try_from(place.ttl.unwrap_or(TTL).seconds()).ok(),
            template: core::PodTemplateSpec {
                metadata: Some(ObjectMeta { labels: Some(labels), ..ObjectMeta::default() }),
                spec: Some(pod),
            },
            ..JobSpec::default()
        }),
        status: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> serde_json::Value {
        let place = KubernetesPlace::parse(text).unwrap();
        let build = Build { id: "x1", image: "r.test/o:1", arguments: vec!["worker".into()], caller: "me".into(), now: 7 };
        serde_json::to_value(job(&place, build)).unwrap()
    }

    #[test]
    fn every_field_that_is_asked_for() {
        let job = of(
            "requests.cpu=500m,limits.memory=1Gi,limits.ephemeral-storage=2Gi,nodeselector=disk=ssd,toleration=a=b:NoSchedule,toleration=c,\
                      serviceaccount=sa,priorityclass=high,pull-secret=s,claim=pvc,credentials=login,timeout=90s,ttl=5s",
        );
        let at = |path: &str| job.pointer(path).unwrap_or_else(|| panic!("{path}: {job:#}")).to_string();
        for (path, expect) in [
            ("/metadata/name", r#""ovenbird-build-x1""#),
            ("/metadata/labels/app.kubernetes.io~1managed-by", r#""ovenbird""#),
            ("/metadata/labels/io.ovenbird~1build", r#""x1""#),
            ("/spec/template/metadata/labels/io.ovenbird~1build", r#""x1""#),
            ("/metadata/annotations/io.ovenbird~1heartbeat", r#""7""#),
            ("/spec/backoffLimit", "0"),
            ("/spec/activeDeadlineSeconds", "90"),
            ("/spec/ttlSecondsAfterFinished", "5"),
            ("/spec/template/spec/restartPolicy", r#""Never""#),
            ("/spec/template/spec/containers/0/resources/requests/cpu", r#""500m""#),
            ("/spec/template/spec/containers/0/resources/limits/memory", r#""1Gi""#),
            ("/spec/template/spec/containers/0/resources/limits/ephemeral-storage", r#""2Gi""#),
            ("/spec/template/spec/nodeSelector/disk", r#""ssd""#),
            ("/spec/template/spec/tolerations/0/operator", r#""Equal""#),
            ("/spec/template/spec/tolerations/1/operator", r#""Exists""#),
            ("/spec/template/spec/serviceAccountName", r#""sa""#),
            ("/spec/template/spec/priorityClassName", r#""high""#),
            ("/spec/template/spec/imagePullSecrets/0/name", r#""s""#),
            ("/spec/template/spec/volumes/0/persistentVolumeClaim/claimName", r#""pvc""#),
            ("/spec/template/spec/volumes/2/secret/secretName", r#""login""#),
            ("/spec/template/spec/containers/0/volumeMounts/2/name", r#""credentials""#),
            ("/spec/template/spec/automountServiceAccountToken", "false"),
        ] {
            assert_eq!(at(path), expect, "{path}");
        }
    }

    #[test]
    fn the_pod_security_standards() {
        let pod = |job: &serde_json::Value| job.pointer("/spec/template/spec").unwrap().clone();
        let restricted = pod(&of("namespace=ci"));
        assert_eq!(
            restricted["securityContext"],
            serde_json::json!({"fsGroup": 1000, "runAsGroup": 1000, "runAsNonRoot": true, "runAsUser": 1000,
                "seccompProfile": {"type": "RuntimeDefault"}})
        );
        assert_eq!(
            restricted["containers"][0]["securityContext"],
            serde_json::json!({"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}})
        );
        let baseline = pod(&of("security=baseline"));
        assert_eq!(baseline["securityContext"], serde_json::json!({"runAsUser": 0, "seccompProfile": {"type": "RuntimeDefault"}}));
        assert!(baseline["containers"][0].get("securityContext").is_none());
        for pod in [restricted, baseline] {
            let text = pod.to_string();
            for never in ["hostPath", "hostNetwork", "hostPID", "hostIPC", "privileged", "hostPort"] {
                assert!(!text.contains(never), "{never}: {text}");
            }
        }
    }
}
