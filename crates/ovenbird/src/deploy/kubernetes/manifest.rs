//! The objects of a deployment: values made of a declaration, so that all of them can be looked at in a test.
//!
//! Every object has the labels of what is ours, and the image stands in it by its digest.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1 as apps;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::api::ObjectMeta;
use ovenbird_oci::{Digest, Reference};

use crate::deploy::{Declaration, Port, Reach};

/// Label of everything that this program makes in clusters.
pub(super) const MANAGED: (&str, &str) = ("app.kubernetes.io/managed-by", "ovenbird");

/// Label with the deployment's name: what belongs to it.
pub(super) const DEPLOYMENT: &str = "io.ovenbird/deployment";

/// Label of pods with a word for what they were made of.
pub(super) const REVISION: &str = "io.ovenbird/revision";

/// Annotation with the image as it was named.
const NAMED: &str = "io.ovenbird/image";

/// The container.
pub(super) const CONTAINER: &str = "app";

/// How long a rollout may make no progress before the cluster gives it up, in seconds.
const PROGRESS: i32 = 600;

fn labels(name: &str) -> BTreeMap<String, String> {
    [MANAGED, ("app.kubernetes.io/name", name), (DEPLOYMENT, name)].map(|(name, value)| (name.to_owned(), value.to_owned())).into()
}

/// Everything of a deployment, by a selector.
pub(super) fn selector(name: &str) -> String {
    format!("{}={},{DEPLOYMENT}={name}", MANAGED.0, MANAGED.1)
}

fn quantities(amounts: &BTreeMap<String, String>) -> Option<BTreeMap<String, Quantity>> {
    (!amounts.is_empty()).then(|| amounts.iter().map(|(resource, amount)| (resource.clone(), Quantity(amount.clone()))).collect())
}

/// A name for a port: `tcp-80`.
fn port_name(port: Port) -> String {
    format!("{}-{}", if port.udp { "udp" } else { "tcp" }, port.port)
}

fn protocol(port: Port) -> String {
    if port.udp { "UDP" } else { "TCP" }.into()
}

/// The deployment, and the revision of its pods.
pub(super) fn deployment(declared: &Declaration, image: &Reference) -> (apps::Deployment, String) {
    let container = core::Container {
        name: CONTAINER.into(),
        image: Some(image.to_string()),
        // A digest is the same everywhere.
        image_pull_policy: Some("IfNotPresent".into()),
        args: (!declared.args.is_empty()).then(|| declared.args.clone()),
        env: (!declared.env.is_empty()).then(|| {
            let variable =
                |(name, value): (&String, &String)| core::EnvVar { name: name.clone(), value: Some(value.clone()), value_from: None };
            declared.env.iter().map(variable).collect()
        }),
        env_from: (!declared.env_secrets.is_empty()).then(|| {
            let source = |name: &String| core::EnvFromSource {
                secret_ref: Some(core::SecretEnvSource { name: name.clone(), optional: Some(false) }),
                ..core::EnvFromSource::default()
            };
            declared.env_secrets.iter().map(source).collect()
        }),
        ports: (!declared.ports.is_empty()).then(|| {
            let port = |port: &Port| core::ContainerPort {
                container_port: i32::from(port.target),
                name: Some(port_name(*port)),
                protocol: Some(protocol(*port)),
                ..core::ContainerPort::default()
            };
            declared.ports.iter().map(port).collect()
        }),
        resources: Some(core::ResourceRequirements {
            requests: quantities(&declared.requests),
            limits: quantities(&declared.limits),
            ..core::ResourceRequirements::default()
        }),
        security_context: Some(core::SecurityContext { allow_privilege_escalation: Some(false), ..core::SecurityContext::default() }),
        ..core::Container::default()
    };
    let pod = core::PodSpec {
        containers: vec![container],
        // What serves an image has no business with the cluster's API.
        automount_service_account_token: Some(false),
        security_context: Some(core::PodSecurityContext {
            seccomp_profile: Some(core::SeccompProfile { type_: "RuntimeDefault".into(), localhost_profile: None }),
            ..core::PodSecurityContext::default()
        }),
        image_pull_secrets: (!declared.pull_secrets.is_empty())
            .then(|| declared.pull_secrets.iter().map(|name| core::LocalObjectReference { name: name.clone() }).collect()),
        ..core::PodSpec::default()
    };
    let revision = Digest::of(serde_json::to_string(&pod).unwrap_or_default().as_bytes()).short();
    let mut of_pod = labels(&declared.name);
    of_pod.insert(REVISION.into(), revision.clone());
    let object = apps::Deployment {
        metadata: ObjectMeta {
            name: Some(declared.name.clone()),
            labels: Some(labels(&declared.name)),
            annotations: Some([(NAMED.to_owned(), declared.image.clone())].into()),
            ..ObjectMeta::default()
        },
        spec: Some(apps::DeploymentSpec {
            replicas: i32::try_from(declared.replicas).ok(),
            progress_deadline_seconds: Some(PROGRESS),
            selector: LabelSelector {
                match_labels: Some([(DEPLOYMENT.to_owned(), declared.name.clone())].into()),
                ..LabelSelector::default()
            },
            template: core::PodTemplateSpec {
                metadata: Some(ObjectMeta { labels: Some(of_pod), ..ObjectMeta::default() }),
                spec: Some(pod),
            },
            ..apps::DeploymentSpec::default()
        }),
        status: None,
    };
    (object, revision)
}

/// The service, where there are ports.
pub(super) fn service(declared: &Declaration) -> Option<core::Service> {
    let port = |port: &Port| core::ServicePort {
        name: Some(port_name(*port)),
        port: i32::from(port.port),
        target_port: Some(IntOrString::Int(i32::from(port.target))),
        protocol: Some(protocol(*port)),
        ..core::ServicePort::default()
    };
    (!declared.ports.is_empty()).then(|| core::Service {
        metadata: ObjectMeta { name: Some(declared.name.clone()), labels: Some(labels(&declared.name)), ..ObjectMeta::default() },
        spec: Some(core::ServiceSpec {
            ports: Some(declared.ports.iter().map(port).collect()),
            selector: Some([(DEPLOYMENT.to_owned(), declared.name.clone())].into()),
            type_: Some(
                match declared.service {
                    Reach::ClusterIp => "ClusterIP",
                    Reach::NodePort => "NodePort",
                    Reach::LoadBalancer => "LoadBalancer",
                }
                .into(),
            ),
            ..core::ServiceSpec::default()
        }),
        status: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects() {
        let image: Reference = format!("r.test/app@{}", Digest::of(b"x")).parse().unwrap();
        let mut declared = Declaration::new("app", "r.test/app:1");
        assert!(service(&declared).is_none());
        let (first, revision) = deployment(&declared, &image);
        declared.replicas = 3;
        assert_eq!(deployment(&declared, &image).1, revision, "more of the same");
        declared.ports = vec!["80:8080".parse().unwrap(), "53/udp".parse().unwrap()];
        declared.env.insert("A".into(), "b".into());
        declared.env_secrets.push("s".into());
        let (second, other) = deployment(&declared, &image);
        assert_ne!(other, revision);
        let json = serde_json::to_value(&second).unwrap();
        let container = &json["spec"]["template"]["spec"]["containers"][0];
        assert_eq!(container["image"], image.to_string());
        assert!(json["metadata"]["labels"][MANAGED.0] == "ovenbird" && json["spec"]["replicas"] == 3, "{json}");
        assert_eq!(container["envFrom"][0]["secretRef"]["name"], "s");
        assert!(serde_json::to_value(&first).unwrap()["spec"]["template"]["spec"]["containers"][0].get("env").is_none());
        let json = serde_json::to_value(service(&declared).unwrap()).unwrap();
        assert_eq!((&json["spec"]["ports"][0]["targetPort"], &json["spec"]["ports"][1]["protocol"]), (&8080.into(), &"UDP".into()));
        // The service finds the pods, of every revision.
        assert_eq!(json["spec"]["selector"].as_object().unwrap().len(), 1);
    }
}
