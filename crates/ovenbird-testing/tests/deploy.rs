//! `ovenbird deploy --on kubernetes` in a real cluster: what runs, what is said when it does not, and what is left alone.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use ovenbird_testing::Result;
use ovenbird_testing::base::Base;
use ovenbird_testing::command::{Level, Workspace, finish};
use ovenbird_testing::kubernetes::{self, Cluster};
use ovenbird_testing::needs::{self, Need};
use ovenbird_testing::registry::{Options, Registry};
use serde_json::Value;

const LIMIT: Duration = Duration::from_mins(3);

struct Room<'a> {
    workspace: Workspace,
    cluster: &'a Cluster,
    settings: PathBuf,
}

impl Room<'_> {
    fn done(&self, arguments: &[&str]) -> (Option<i32>, String) {
        let mut command = self.workspace.ovenbird();
        command.env("KUBECONFIG", self.cluster.kubeconfig()).env("TMPDIR", self.workspace.path());
        command.arg("--root").arg(self.workspace.path().join("state")).arg("--settings").arg(&self.settings);
        finish(command.args(["--progress", "plain"]).args(arguments), None, LIMIT).unwrap()
    }

    fn deploy(&self, arguments: &[&str]) -> (Option<i32>, String) {
        self.done(&[&["deploy"], arguments].concat())
    }

    /// Pushes an image; gives its digest.
    fn build(&self, name: &str, dockerfile: &str) -> String {
        let dir = self.workspace.path().join("ctx");
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("Dockerfile"), dockerfile).unwrap();
        let (code, log) = self.done(&["build", "--push", "-t", name, dir.to_str().unwrap()]);
        assert_eq!(code, Some(0), "{log}");
        log.lines().rev().find(|line| line.starts_with("sha256:")).unwrap().to_owned()
    }

    fn get(&self, what: &[&str]) -> Value {
        let text = self.cluster.kubectl(&[&["get", "-o", "json", "-n", "shop"], what].concat()).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    fn names(&self, kind: &str) -> Vec<String> {
        let list = self.get(&[kind]);
        list["items"].as_array().unwrap().iter().map(|item| item["metadata"]["name"].as_str().unwrap().to_owned()).collect()
    }
}

#[test]
fn images_in_a_cluster() -> Result<()> {
    if !needs::available("deploy::images_in_a_cluster", &[Need::Run, Need::Registry, Need::Kubernetes]) {
        return Ok(());
    }
    if let Some(reason) = kubernetes::unavailable() {
        needs::skip("deploy::images_in_a_cluster", &reason);
        return Ok(());
    }
    let cluster = Cluster::start()?;
    let registry = Registry::start_at(&cluster.host(), Options { bases: &[Base::Busybox], ..Options::default() })?;
    cluster.trust(&registry)?;
    let workspace = Workspace::new(Level::Own)?;
    let settings = workspace.path().join("settings.toml");
    let address = registry.address();
    fs::write(
        &settings,
        format!("[registry.\"docker.io\"]\nmirrors = [\"http://{address}\"]\n[registry.\"{address}\"]\nplain_http = true\n"),
    )
    .unwrap();
    let room = Room { workspace, cluster: &cluster, settings };
    cluster.kubectl(&["create", "namespace", "shop"])?;
    // What is not ours.
    cluster.kubectl(&["create", "deployment", "theirs", "--image", "nowhere.test/a", "-n", "shop"])?;
    cluster.kubectl(&["create", "configmap", "app", "-n", "shop", "--from-literal=a=b"])?;

    let name = format!("{address}/shop/app:1");
    let server = "FROM busybox\nRUN mkdir /www && echo one > /www/index.html\nCMD [\"sh\", \"-c\", \"echo serving; exec httpd -f -p 8080 -h /www\"]\n";
    let first = room.build(&name, server);
    let run = ["run", "--on", "kubernetes", &name, "--name", "app", "--port", "80:8080", "--replicas", "2", "-n", "shop"];
    let (code, log) = room.deploy(&run);
    assert!(code == Some(0) && log.contains(&format!("app running 2/2 {address}/shop/app@{first} app.shop:80")), "{code:?} {log}");
    let deployment = room.get(&["deployment", "app"]);
    assert_eq!(deployment["spec"]["template"]["spec"]["containers"][0]["image"], format!("{address}/shop/app@{first}"));
    // Newer clients leave that out of what they show.
    let whole = cluster.kubectl(&["get", "--raw", "/apis/apps/v1/namespaces/shop/deployments/app"])?;
    assert!(whole.contains("\"manager\":\"ovenbird\",\"operation\":\"Apply\""), "{whole}");
    let (code, log) = room.deploy(&["logs", "--name", "app", "-n", "shop"]);
    assert!(code == Some(0) && log.matches(": serving\n").count() == 2, "{log}");
    let (code, log) = room.deploy(&["status", "--name", "app", "-n", "shop", "--format", "json"]);
    let status: Value = serde_json::from_str(&log).unwrap();
    assert_eq!((code, &status["state"], &status["ready"]), (Some(0), &"running".into(), &2.into()));

    // The tag moves; what runs does not, until it is said.
    let second = room.build(&name, &server.replace("one", "two"));
    assert_ne!(first, second);
    let (code, log) = room.deploy(&["wait", "--name", "app", "-n", "shop"]);
    assert!(code == Some(0) && log.contains(&first), "{log}");
    let (code, log) = room.deploy(&run);
    assert!(code == Some(0) && log.contains(&second), "{log}");
    // The same again changes nothing.
    let generation = room.get(&["deployment", "app"])["metadata"]["generation"].clone();
    let (code, log) = room.deploy(&run);
    assert_eq!((code, &room.get(&["deployment", "app"])["metadata"]["generation"]), (Some(0), &generation), "{log}");

    failures(&room, &address);

    let (code, log) = room.deploy(&["remove", "--name", "app", "-n", "shop"]);
    assert_eq!(code, Some(0), "{log}");
    assert_eq!((room.names("deployments"), room.names("services")), (vec!["theirs".to_owned()], vec![]));
    assert!(room.names("configmaps").contains(&"app".to_owned()) && room.names("pods").iter().all(|pod| pod.starts_with("theirs")));
    let (code, log) = room.deploy(&["status", "--name", "app", "-n", "shop"]);
    assert!(code == Some(0) && log.contains("app not_deployed 0/0"), "{log}");
    let (code, log) = room.deploy(&["remove", "--name", "app", "-n", "shop"]);
    assert!(code == Some(0) && log.contains("there is no deployment app"), "{log}");
    Ok(())
}

/// Each is said, and what ran before goes on.
fn failures(room: &Room<'_>, address: &str) {
    let bad = format!("{address}/shop/bad:1");
    room.build(&bad, "FROM busybox\nCMD [\"sh\", \"-c\", \"echo last words; exit 7\"]\n");
    let run = |image: &str, more: &[&str]| {
        let arguments = ["run", image, "--name", "app", "--port", "80:8080", "--replicas", "2", "-n", "shop", "--timeout", "120"];
        room.deploy(&[&arguments[..], more].concat())
    };
    let (code, log) = run(&bad, &[]);
    assert!(
        code == Some(10) && log.contains("the rollout of app failed: the container ends again and again, with code 7"),
        "{code:?} {log}"
    );
    assert!(log.contains("last words"), "{log}");
    assert!(room.get(&["deployment", "app"])["status"]["availableReplicas"].as_u64().unwrap_or(0) >= 1, "what ran before goes on");
    let good = format!("{address}/shop/app:1");
    let gone = format!("{address}/shop/app@sha256:{}", "0".repeat(64));
    for (image, more, expect) in [
        (gone.as_str(), &[][..], "the node cannot pull the image"),
        (
            &good,
            &["--env-secret", "nothing"],
            "the node cannot start the container (CreateContainerConfigError): secret \"nothing\" not found",
        ),
        (&good, &["--request", "cpu=500", "--timeout", "5"], "was not done within 5 s: no node takes the pod"),
        (&good, &["--limit", "gold=1x"], "the cluster refused to patch deployments"),
    ] {
        let (code, log) = run(image, more);
        assert!(code == Some(10) && log.contains(expect), "{more:?}: {code:?} {log}");
    }
    for (arguments, code, expect) in [
        (
            &["run", &good, "--name", "theirs", "-n", "shop"][..],
            2,
            "there is a Deployment theirs in the namespace shop that Ovenbird did not make",
        ),
        (&["remove", "--name", "theirs", "-n", "shop"], 2, "that Ovenbird did not make"),
        (&["wait", "--name", "other", "-n", "shop"], 2, "there is no deployment other in the namespace shop"),
        (&["run", &format!("{address}/shop/none:1"), "--name", "app", "-n", "shop"], 7, "there is no image"),
        (&["run", &good, "--name", "App", "-n", "shop"], 2, "is no name for a deployment"),
        (&["run", &good, "--name", "app", "--on", "kubernetes,ttl=5s"], 2, "deploy --on kubernetes,ttl=5s is not supported"),
        (&["run", &good, "--name", "app", "--on", "container"], 2, "deploy --on container is not supported"),
        (&["run", &good, "--name", "app", "-n", "none"], 10, "the namespace none does not exist"),
    ] {
        let (ended, log) = room.deploy(arguments);
        assert!(ended == Some(code) && log.contains(expect), "{arguments:?}: {ended:?} {log}");
    }
    let (code, log) = run(&good, &[]);
    assert!(code == Some(0) && log.contains("app running 2/2"), "{code:?} {log}");
}
