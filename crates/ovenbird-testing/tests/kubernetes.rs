//! Builds in pods of a real Kubernetes. One cluster for all of them, so they are parts of one test; each says its name when it fails.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use ovenbird_testing::Result;
use ovenbird_testing::base::Base;
use ovenbird_testing::command::{Level, Workspace, binary, finish};
use ovenbird_testing::kubernetes::{self, Cluster};
use ovenbird_testing::needs::{self, Need};
use ovenbird_testing::process::output;
use ovenbird_testing::registry::{Options, Registry, mirror_toml};
use ovenbird_testing::repository;

const LIMIT: Duration = Duration::from_mins(2);

/// Bytes that must be nowhere but in the step that asks for them.
const SECRET: &str = "correct-horse-battery-staple-7193";

/// The namespace of builds, whose role is the one that is shipped.
const NAMESPACE: &str = "ci";

/// A cluster, a registry that its pods reach, and a user who may do there what the shipped role allows.
struct Lab {
    workspace: Workspace,
    registry: Registry,
    cluster: Cluster,
    settings: PathBuf,
    image: String,
}

impl Lab {
    fn new() -> Result<Self> {
        let cluster = Cluster::start()?;
        let registry = Registry::start_at(&cluster.host(), Options { bases: &[Base::Busybox], ..Options::default() })?;
        cluster.trust(&registry)?;
        let workspace = Workspace::new(Level::Own)?;
        let address = registry.address();
        let settings = workspace.path().join("settings.toml");
        let image = format!("{address}/ovenbird:test");
        let text = format!(
            "{}[registry.\"{address}\"]\nplain_http = true\n[kubernetes]\nnamespace = \"{NAMESPACE}\"\nimage = \"{image}\"\nstart_timeout = \"30s\"\n",
            mirror_toml(&address)
        );
        write(&settings, &text);
        let this = Self { workspace, registry, cluster, settings, image };
        this.make_contexts();
        this.make_image()?;
        this.make_user()?;
        Ok(this)
    }

    fn make_contexts(&self) {
        for (name, dockerfile) in [
            ("files", "FROM scratch\nCOPY . /all/\nLABEL made=yes\n"),
            ("steps", "FROM busybox\nCOPY . /all/\nRUN id -u > /who && find /all | sort > /listing\nRUN echo done > /done\n"),
            (
                "owned",
                "FROM busybox\nCOPY . /all/\nRUN id -u > /who && cat /all/deep/file > /dev/null && cp -r /all /copy && rm -r /all/deep\n\
                 RUN mkdir -p /srv/data && chown -R 123:456 /srv && chmod 4750 /srv/data && ln /who /srv/again && stat -c '%u:%g %a' /srv/data > /seen\n\
                 USER 42:42\nRUN id -u > /tmp/other\n",
            ),
            ("secret", "FROM busybox\nRUN --mount=type=secret,id=token sha256sum < /run/secrets/token | cut -c1-12 > /token\n"),
            ("fails", "FROM busybox\nRUN echo last words && exit 7\n"),
            ("wrong", "FROM busybox\nRUNS true\n"),
            ("sleeps", "FROM busybox\nRUN echo begun && sleep 86399\n"),
            ("hungry", "FROM busybox\nRUN tail /dev/zero\n"),
            ("fat", "FROM busybox\nRUN dd if=/dev/zero of=/fat bs=1M count=200 && sleep 86399\n"),
        ] {
            let dir = self.path(name);
            fs::create_dir_all(dir.join("deep/empty")).unwrap();
            write(&dir.join("Dockerfile"), dockerfile);
            write(&dir.join("deep/file"), name);
            write(&dir.join(".dockerignore"), "ignored\n");
            write(&dir.join("ignored"), &"x".repeat(1 << 20));
        }
    }

    /// An image of the program under test, without what only a debugger reads.
    fn make_image(&self) -> Result<()> {
        let program = self.path("ovenbird");
        output(Command::new("strip").arg("--strip-debug").arg("-o").arg(&program).arg(binary()?))?;
        let mut command = self.workspace.command(&program);
        command.arg("--root").arg(self.path("state")).arg("--settings").arg(&self.settings);
        output(command.env("TMPDIR", self.workspace.path()).args(["self-image", "--quiet", "--push", "-t", &self.image])).map(drop)
    }

    /// Somebody with the shipped role and nothing else, and somebody without it.
    fn make_user(&self) -> Result<()> {
        for namespace in [NAMESPACE, "full"] {
            self.cluster.kubectl(&["create", "namespace", namespace])?;
        }
        let shipped = repository().join("deploy/kubernetes/kustomize");
        for name in ["serviceaccount.yaml", "role.yaml"] {
            self.cluster.kubectl(&["-n", NAMESPACE, "apply", "-f", &shipped.join(name).display().to_string()])?;
        }
        let binding = fs::read_to_string(shipped.join("rolebinding.yaml")).unwrap() + "    namespace: ci\n";
        self.cluster.apply(&binding.replace("metadata:\n", "metadata:\n  namespace: ci\n"))?;
        self.cluster.kubectl(&["-n", NAMESPACE, "create", "serviceaccount", "nobody"])?;
        self.cluster
            .apply("apiVersion: v1\nkind: ResourceQuota\nmetadata: {name: none, namespace: full}\nspec: {hard: {pods: \"0\"}}\n")?;
        for account in ["ovenbird", "nobody"] {
            let token = self.token(account)?;
            let text = format!(
                "apiVersion: v1\nkind: Config\nclusters: [{{name: c, cluster: {{server: \"{}\", certificate-authority: {}}}}}]\n\
                 users: [{{name: u, user: {{exec: {{apiVersion: client.authentication.k8s.io/v1beta1, command: cat, args: [{}]}}}}}}]\n\
                 contexts: [{{name: x, context: {{cluster: c, user: u, namespace: {NAMESPACE}}}}}]\ncurrent-context: x\n",
                self.cluster.server(),
                self.cluster.authority().display(),
                self.path(&format!("{account}.json")).display(),
            );
            write(&self.path(account), &text);
            // The plugin of an exec user: it prints a credential.
            let credential = format!(
                "{{\"apiVersion\":\"client.authentication.k8s.io/v1beta1\",\"kind\":\"ExecCredential\",\"status\":{{\"token\":\"{token}\"}}}}"
            );
            write(&self.path(&format!("{account}.json")), &credential);
        }
        Ok(())
    }

    fn token(&self, account: &str) -> Result<String> {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let secret = self.cluster.kubectl(&["-n", NAMESPACE, "get", "serviceaccount", account, "-o", "jsonpath={.secrets[0].name}"])?;
            if !secret.is_empty() {
                let encoded = self.cluster.kubectl(&[
                    "-n",
                    NAMESPACE,
                    "get",
                    "secret",
                    &secret,
                    "-o",
                    "go-template={{.data.token | base64decode}}",
                ])?;
                return Ok(encoded);
            }
            assert!(Instant::now() < end, "the cluster made no token for {account}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.workspace.path().join(name)
    }

    /// `ovenbird ARGS` with the kubeconfig of a user.
    fn command(&self, user: &str, arguments: &[&str]) -> Command {
        let mut command = self.workspace.ovenbird();
        let kubeconfig = if user == "admin" { self.cluster.kubeconfig() } else { self.path(user) };
        command.env("KUBECONFIG", kubeconfig).env("TOKEN", SECRET).env("TMPDIR", self.workspace.path());
        command.arg("--root").arg(self.path("state")).arg("--settings").arg(&self.settings).args(arguments);
        command
    }

    /// `ovenbird build` in a place.
    fn build(&self, on: &str, context: &str, arguments: &[&str]) -> Command {
        self.build_as("ovenbird", on, context, arguments)
    }

    fn build_as(&self, user: &str, on: &str, context: &str, arguments: &[&str]) -> Command {
        let mut command = self.command(user, &["build", "--on", on, "--progress", "plain"]);
        command.args(arguments).arg(self.path(context));
        command
    }

    /// Builds and gives the digest, and what was said.
    fn built(&self, on: &str, context: &str, arguments: &[&str]) -> Result<(String, String)> {
        let (code, log) = finish(&mut self.build(on, context, arguments), None, LIMIT)?;
        assert_eq!(code, Some(0), "{on} {context}: {log}");
        let digest = log.lines().rev().find(|line| line.starts_with("sha256:")).unwrap_or_default().to_owned();
        assert_eq!(digest.len(), 71, "{log}");
        Ok((digest, log))
    }

    /// Pods of builds that are there, with their phase.
    fn pods(&self) -> Result<Vec<String>> {
        let format = "jsonpath={range .items[*]}{.metadata.name}={.status.phase}{\"\\n\"}{end}";
        let listed = self.cluster.kubectl(&["-n", NAMESPACE, "get", "pods", "-o", format])?;
        Ok(listed.lines().map(str::to_owned).collect())
    }

    fn running(&self) -> Result<Vec<String>> {
        Ok(self.pods()?.into_iter().filter(|pod| pod.ends_with("=Running") || pod.ends_with("=Pending")).collect())
    }

    /// Waits until no pod runs.
    fn wait_for_none(&self) -> Result<()> {
        let mut left = vec![];
        let end = Instant::now() + Duration::from_secs(10);
        while Instant::now() < end {
            left = self.running()?;
            if left.is_empty() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        let seen = self.cluster.kubectl(&["-n", NAMESPACE, "get", "pods,jobs,events", "-o", "wide"])?;
        panic!("after ten seconds there is {left:?}: {seen}");
    }

    fn json(&self, what: &str) -> Result<serde_json::Value> {
        let text = self.cluster.kubectl(&["-n", NAMESPACE, "get", what, "-o", "json"])?;
        Ok(serde_json::from_str(&text).unwrap())
    }

    /// Starts a build that never ends, and waits until its step runs.
    fn start_sleeping(&self, on: &str) -> Result<Caller> {
        let path = self.path("sleeping.log");
        let log = fs::File::create(&path).unwrap();
        let child = Caller::start(&mut self.build(on, "sleeps", &["--no-cache"]), log);
        wait_until("the step", Duration::from_secs(40), || {
            let log = fs::read_to_string(&path).unwrap();
            assert!(!log.contains("error:"), "{log}");
            Ok(log.contains("begun"))
        })?;
        Ok(child)
    }
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

fn wait_until(what: &str, limit: Duration, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let end = Instant::now() + limit;
    while !done()? {
        assert!(Instant::now() < end, "{what} did not happen within {limit:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// A build that goes on meanwhile. Dropped: it is killed.
struct Caller(Child);

impl Caller {
    fn start(command: &mut Command, log: impl Into<Stdio>) -> Self {
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap())
    }

    fn signal(&self, signal: Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.0), signal).unwrap();
    }

    /// Its exit code.
    fn end(mut self) -> Option<i32> {
        self.0.wait().unwrap().code()
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A build without steps in the restricted pod, which is the default: the digest of here.
fn a_restricted_pod_copies_files(lab: &Lab) -> Result<()> {
    let (here, _) = lab.built("here", "files", &["--reproducible"])?;
    let (there, log) = lab.built("kubernetes", "files", &["--reproducible"])?;
    assert_eq!(there, here);
    assert!(log.contains("building in a restricted pod of the Kubernetes cluster at https://10.77."), "{log}");
    let jobs = lab.json("jobs")?;
    let job = jobs["items"].as_array().unwrap().last().unwrap();
    assert_eq!(job["metadata"]["labels"]["app.kubernetes.io/managed-by"], "ovenbird");
    assert_eq!(job["spec"]["backoffLimit"], 0);
    // The log survives in the pod, without the conversation.
    let name = job["metadata"]["name"].as_str().unwrap();
    let pod_log = lab.cluster.kubectl(&["-n", NAMESPACE, "logs", &format!("job/{name}")])?;
    assert!(pod_log.contains("COPY") && !pod_log.contains("\"type\":"), "{pod_log}");
    Ok(())
}

/// Steps of an ordinary user without any right, behind a filter: traced, and the digest of here, owners included.
fn a_restricted_pod_runs_steps(lab: &Lab) -> Result<()> {
    let (here, _) = lab.built("here", "owned", &["--reproducible", "--no-cache"])?;
    let (there, log) = lab.built("kubernetes", "owned", &["--reproducible", "--no-cache"])?;
    assert!(log.contains("isolation: traced"), "the level is said: {log}");
    assert_eq!(there, here, "{log}");
    Ok(())
}

/// Steps in a baseline pod, with a secret over the pipe, an output that comes back, and the exit codes and errors of here.
fn a_baseline_pod_runs_steps(lab: &Lab) -> Result<()> {
    let on = "kubernetes,security=baseline";
    let (here, _) = lab.built("here", "steps", &["--reproducible", "--no-cache"])?;
    let (there, log) = lab.built(on, "steps", &["--reproducible", "--no-cache"])?;
    assert_eq!(there, here, "{log}");
    assert!(log.contains("isolation: chroot"), "the level is said: {log}");
    let archive = lab.path("out.tar");
    let dest = format!("type=oci,dest={}", archive.display());
    let (_, log) = lab.built(on, "secret", &["--secret", "id=token,env=TOKEN", "-o", &dest])?;
    assert!(archive.is_file() && !log.contains(SECRET), "{log}");
    let all = format!("{} {}", lab.json("jobs")?, lab.json("pods")?);
    assert!(!all.contains(SECRET));
    for (context, code) in [("fails", 6), ("wrong", 4)] {
        let told = |log: String| log[log.find("error").unwrap_or(0)..].replace(&lab.path("").display().to_string(), "");
        let here = finish(&mut lab.build("here", context, &["--no-cache"]), None, LIMIT)?;
        let there = finish(&mut lab.build(on, context, &["--no-cache"]), None, LIMIT)?;
        assert_eq!((here.0, there.0), (Some(code), Some(code)), "{} {}", here.1, there.1);
        assert_eq!(told(there.1), told(here.1), "{context}");
    }
    // A broken step is not tried again.
    let tries = lab.json("jobs")?["items"].as_array().unwrap().iter().filter_map(|job| job["status"]["failed"].as_i64()).max();
    assert!(tries <= Some(1), "{tries:?}");
    Ok(())
}

/// The second build runs no step: the cache is in the registry.
fn the_second_build_runs_no_step(lab: &Lab) -> Result<()> {
    let on = "kubernetes,security=baseline";
    let cache = format!("{}/cache:one", lab.registry.address());
    let (to, from) = (format!("type=registry,ref={cache},mode=max"), format!("type=registry,ref={cache}"));
    let name = format!("{}/app:1", lab.registry.address());
    let first = lab.built(on, "steps", &["--reproducible", "-t", &name, "--push", "--cache-to", &to])?;
    let second = lab.built(on, "steps", &["--reproducible", "-t", &name, "--push", "--cache-from", &from])?;
    assert_eq!(first.0, second.0);
    assert!(second.1.matches("CACHED").count() >= 3, "{}", second.1);
    Ok(())
}

/// What was asked of the pod is in the pod.
fn limits_are_in_the_pod(lab: &Lab) -> Result<()> {
    lab.cluster.kubectl(&["label", "node", "node", "disk=ssd", "--overwrite"])?;
    let on = "kubernetes,security=baseline,requests.cpu=100m,requests.memory=64Mi,limits.memory=512Mi,limits.ephemeral-storage=2Gi,\
              nodeselector=disk=ssd,toleration=dedicated=builds:NoSchedule,serviceaccount=nobody,timeout=10m,ttl=1m";
    let build = lab.start_sleeping(on)?;
    let pods = lab.json("pods")?;
    let running = pods["items"].as_array().unwrap().iter().find(|pod| pod["status"]["phase"] == "Running").unwrap();
    let (name, spec) = (running["metadata"]["name"].as_str().unwrap(), &running["spec"]);
    let limit = lab.cluster.kubectl(&["-n", NAMESPACE, "exec", name, "--", "ovenbird", "version"]);
    assert!(limit.is_ok(), "{limit:?}");
    assert_eq!(spec["containers"][0]["resources"]["limits"]["memory"], "512Mi");
    assert_eq!(spec["containers"][0]["resources"]["requests"]["cpu"], "100m");
    assert_eq!(spec["nodeSelector"]["disk"], "ssd");
    assert_eq!(spec["serviceAccountName"], "nobody");
    assert!(spec["tolerations"].as_array().unwrap().iter().any(|toleration| toleration["key"] == "dedicated"));
    assert_eq!(spec["restartPolicy"], "Never");
    let jobs = lab.json("jobs")?;
    let job = jobs["items"].as_array().unwrap().iter().find(|job| job["status"]["active"] == 1).unwrap();
    assert_eq!((&job["spec"]["activeDeadlineSeconds"], &job["spec"]["ttlSecondsAfterFinished"]), (&600.into(), &60.into()));
    build.signal(Signal::INT);
    assert_eq!(build.end(), Some(130));
    Ok(())
}

/// After Ctrl-C, SIGTERM and SIGKILL of the caller no pod runs, soon.
fn nothing_runs_on_without_its_caller(lab: &Lab) -> Result<()> {
    for (how, code) in [(Signal::INT, Some(130)), (Signal::KILL, None)] {
        let build = lab.start_sleeping("kubernetes,security=baseline")?;
        build.signal(how);
        let at = Instant::now();
        assert_eq!(build.end(), code, "{how:?}");
        lab.wait_for_none()?;
        println!("the pod was gone {:.1} s after {how:?}", at.elapsed().as_secs_f64());
    }
    Ok(())
}

/// A pod that waits, and whose caller is gone, is removed by the next build.
fn leftovers_go_with_the_next_build(lab: &Lab) -> Result<()> {
    let waits = Caller::start(&mut lab.build("kubernetes,nodeselector=no=where", "files", &[]), Stdio::null());
    wait_until("the pod", Duration::from_secs(20), || Ok(lab.running()?.iter().any(|pod| pod.ends_with("=Pending"))))?;
    drop(waits);
    let (_, log) = lab.built("kubernetes", "files", &[])?;
    assert!(log.contains("of a build whose caller is gone"), "{log}");
    lab.wait_for_none()?;
    Ok(())
}

/// Each way to fail is one sentence, with the words of the cluster, and nothing of it stays.
fn failures_are_told(lab: &Lab) -> Result<()> {
    let none = format!("kubernetes,image={}/none:1", lab.registry.address());
    let all: [(&str, &str, &str, &[&str]); 13] = [
        ("ovenbird", "kubernetes,requests.cpu=900,start-timeout=2s", "files", &["cannot be scheduled within 2 s", "Insufficient cpu"]),
        ("ovenbird", "kubernetes,nodeselector=no=where,start-timeout=2s", "files", &["cannot be scheduled within 2 s", "node"]),
        ("ovenbird", "kubernetes,claim=nowhere,start-timeout=2s", "files", &["the volume claim nowhere", "not bound", "not found"]),
        ("ovenbird", &none, "files", &["cannot pull the image", "ErrImagePull", "not found"]),
        ("ovenbird", "kubernetes,serviceaccount=absent", "files", &["the service account absent does not exist", "FailedCreate"]),
        (
            "nobody",
            "kubernetes",
            "files",
            &["does not allow to list jobs", "resources: [\"jobs\"], verbs: [\"list\"]", "doctor --on kubernetes"],
        ),
        ("ovenbird", "kubernetes,namespace=full", "files", &["does not allow to list jobs in the namespace full"]),
        ("admin", "kubernetes,namespace=nowhere", "files", &["the namespace nowhere does not exist"]),
        ("admin", "kubernetes,namespace=full", "files", &["the quota of the namespace full is exceeded", "exceeded quota"]),
        ("ovenbird", "kubernetes,context=nope", "files", &["the kubeconfig cannot be used", "nope", "its contexts are: x"]),
        ("ovenbird", "kubernetes,security=baseline,timeout=6s", "sleeps", &["took longer than 6 s", "DeadlineExceeded"]),
        (
            "ovenbird",
            "kubernetes,security=baseline,limits.memory=48Mi",
            "hungry",
            &["ran out of memory and was killed (OOMKilled, limit 48Mi)"],
        ),
        ("ovenbird", "kubernetes,security=baseline,limits.ephemeral-storage=50Mi", "fat", &["was evicted", "ephemeral"]),
    ];
    let check = &|(user, on, context, expects): &(&str, &str, &str, &[&str])| -> Result<()> {
        let start = Instant::now();
        let (code, log) = finish(&mut lab.build_as(user, on, context, &["--no-cache"]), None, LIMIT)?;
        let error = &log[log.find("error:").unwrap_or_else(|| panic!("{on}: {code:?} {log}"))..];
        println!("{on} as {user}, {:.1} s:\n    {}", start.elapsed().as_secs_f64(), error.trim_end().replace('\n', "\n    "));
        assert!(code.is_some_and(|code| code != 0), "{on}: {log}");
        for expect in *expects {
            assert!(error.contains(expect), "{on}: {expect:?} is not in {log}");
        }
        Ok(())
    };
    // Each mostly waits.
    let (first, second) = all.split_at(all.len() / 2);
    std::thread::scope(|scope| {
        let halves = [first, second].map(|half| scope.spawn(move || half.iter().try_for_each(check)));
        halves.into_iter().try_for_each(|half| half.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })?;
    lab.wait_for_none()?;
    Ok(())
}

/// A pod that somebody deletes.
fn a_pod_that_goes_away(lab: &Lab) -> Result<()> {
    let build = lab.start_sleeping("kubernetes,security=baseline")?;
    let pods = lab.running()?;
    let pod = pods[0].split('=').next().unwrap();
    lab.cluster.kubectl(&["-n", NAMESPACE, "delete", "pod", pod, "--wait=false"]).unwrap();
    assert_eq!(build.end(), Some(10));
    let log = fs::read_to_string(lab.path("sleeping.log")).unwrap();
    assert!(log.contains(&format!("the build's pod {pod} is gone")), "{log}");
    Ok(())
}

/// How many bytes were sent of how many, as the build said.
fn sent(log: &str) -> (u64, u64) {
    let line = log.lines().find(|line| line.contains("context: sent ")).unwrap_or_else(|| panic!("{log}"));
    let numbers: Vec<u64> = line[line.find("context: sent ").unwrap()..].split(' ').filter_map(|word| word.parse().ok()).collect();
    (numbers[0], numbers[1])
}

/// With a volume claim: a second build runs no step, and only what changed of the context is sent, also after a kill.
fn a_volume_claim_keeps_the_state(lab: &Lab) -> Result<()> {
    let volume = lab.path("volume");
    fs::create_dir(&volume).unwrap();
    // Volumes of this kind keep their owner; a pod's user is another.
    ovenbird_testing::command::set_mode(&volume, 0o777)?;
    lab.cluster.apply(&format!(
        "apiVersion: v1\nkind: PersistentVolume\nmetadata: {{name: state}}\nspec: {{capacity: {{storage: 1Gi}}, accessModes: [ReadWriteOnce], \
         storageClassName: here, hostPath: {{path: {}}}}}\n---\napiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {{name: state, namespace: ci}}\n\
         spec: {{accessModes: [ReadWriteOnce], storageClassName: here, resources: {{requests: {{storage: 1Gi}}}}}}\n",
        volume.display()
    ))?;
    let many = lab.path("many");
    for number in 0..10_000 {
        let dir = many.join((number / 100).to_string());
        fs::create_dir_all(&dir).unwrap();
        write(&dir.join(number.to_string()), &format!("{number:08}\n").repeat(30 + number % 200));
    }
    write(&many.join("Dockerfile"), "FROM scratch\nCOPY . /all/\n");
    let on = "kubernetes,claim=state";
    let (first, log) = lab.built(on, "many", &["--reproducible"])?;
    let (bytes, all) = sent(&log);
    assert!(bytes >= all && all > 10_000_000, "{bytes} of {all}");
    let (second, log) = lab.built(on, "many", &["--reproducible"])?;
    assert_eq!(first, second);
    assert!(sent(&log).0 < 20_000 && log.contains("CACHED"), "{log}");
    write(&many.join("50/5050"), "changed");
    let (third, log) = lab.built(on, "many", &["--reproducible"])?;
    let (bytes, all) = sent(&log);
    assert!(third != second && bytes * 100 < all, "{bytes} of {all}");
    println!("one file of 10000 changed: {bytes} bytes of {all}");

    // Bytes that do not repeat; the upload is killed half way.
    let mut state: u64 = 7;
    let noise: Vec<u8> = (0..48 << 20)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        })
        .collect();
    fs::write(lab.path("files/noise"), &noise).unwrap();
    let kept = || -> u64 { fs::read_dir(volume.join("chunks")).into_iter().flatten().flatten().map(|e| e.metadata().unwrap().len()).sum() };
    let before = kept();
    let upload = Caller::start(&mut lab.build(on, "files", &[]), Stdio::null());
    wait_until("a part of the upload", Duration::from_secs(40), || Ok(kept() > before + (16 << 20)))?;
    drop(upload);
    let (_, log) = lab.built(on, "files", &[])?;
    let (bytes, all) = sent(&log);
    assert!(bytes < all - (12 << 20), "{bytes} of {all}");
    println!("after a killed upload: {bytes} bytes of {all}");
    fs::remove_file(lab.path("files/noise")).unwrap();
    Ok(())
}

/// Credentials for a registry: the caller's over the pipe, or those of a secret; in no specification and no log.
fn credentials_are_the_callers_or_a_secrets(lab: &Lab) -> Result<()> {
    let credentials = Some(("baker", SECRET));
    let private = Registry::start_at(&lab.cluster.host(), Options { bases: &[], credentials })?;
    let name = format!("{}/app:1", private.address());
    let plain = format!("{},plain-http=true", private.address());
    let build = |on: &str| lab.build(on, "files", &["--registry-option", &plain, "-t", &name, "--push"]);
    let (code, log) = finish(&mut build("kubernetes"), None, LIMIT)?;
    assert!(code == Some(7), "nobody gave credentials: {log}");
    // As Docker's client writes them.
    let encoded = output(Command::new("sh").args(["-c", &format!("printf %s baker:{SECRET} | base64 -w0")]))?;
    let config = format!("{{\"auths\":{{\"{}\":{{\"auth\":\"{encoded}\"}}}}}}", private.address());
    fs::create_dir_all(lab.path("docker")).unwrap();
    write(&lab.path("docker/config.json"), &config);
    let (code, log) = finish(build("kubernetes").env("DOCKER_CONFIG", lab.path("docker")), None, LIMIT)?;
    assert!(code == Some(0) && !log.contains(SECRET), "{log}");
    let file = format!("--from-file=.dockerconfigjson={}", lab.path("docker/config.json").display());
    lab.cluster.kubectl(&["-n", NAMESPACE, "create", "secret", "generic", "login", "--type=kubernetes.io/dockerconfigjson", &file])?;
    let (code, log) = finish(&mut build("kubernetes,credentials=login"), None, LIMIT)?;
    assert!(code == Some(0) && !log.contains(SECRET), "{log}");
    let all = format!("{} {} {}", lab.json("jobs")?, lab.json("pods")?, lab.json("events")?);
    assert!(!all.contains(SECRET) && !all.contains(encoded.trim()));
    Ok(())
}

/// In a pod there is no kubeconfig: the cluster around it is meant.
fn a_pod_asks_its_own_cluster(lab: &Lab) -> Result<()> {
    let server = lab.cluster.server();
    let (host, port) = server.trim_start_matches("https://").split_once(':').unwrap();
    // The cluster has no services, so the variables that lead to the API are ours.
    lab.cluster.apply(&format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: asks, namespace: ci}}\nspec:\n  serviceAccountName: ovenbird\n  restartPolicy: Never\n  containers:\n  \
         - {{name: asks, image: \"{}\", args: [doctor, --on, kubernetes], env: [{{name: KUBERNETES_SERVICE_HOST, value: \"{host}\"}}, \
         {{name: KUBERNETES_SERVICE_PORT, value: \"{port}\"}}]}}\n",
        lab.image
    ))?;
    wait_until("the pod's end", Duration::from_secs(30), || {
        Ok(lab.pods()?.iter().any(|pod| pod.starts_with("asks=") && !pod.ends_with("=Running") && !pod.ends_with("=Pending")))
    })?;
    let log = lab.cluster.kubectl(&["-n", NAMESPACE, "logs", "asks"])?;
    assert!(log.contains("create jobs           yes") && log.contains("namespace ci"), "{log}");
    Ok(())
}

/// `doctor` asks for each rule.
fn the_doctor_knows_the_role(lab: &Lab) -> Result<()> {
    let (code, text) = finish(&mut lab.command("ovenbird", &["doctor", "--on", "kubernetes"]), None, LIMIT)?;
    assert!(code == Some(0) && text.contains("create pods/exec") && !text.contains(" no"), "{text}");
    let (code, text) = finish(&mut lab.command("nobody", &["doctor", "--on", "kubernetes"]), None, LIMIT)?;
    assert!(code == Some(10) && text.contains("verbs: [\"create\", \"get\", \"list\", \"patch\", \"delete\"]"), "{text}");
    assert!(text.contains("not allowed: create jobs"), "{text}");
    Ok(())
}

#[test]
fn builds_in_a_cluster() -> Result<()> {
    if !needs::available("kubernetes::builds_in_a_cluster", &[Need::Kubernetes, Need::Registry]) {
        return Ok(());
    }
    if let Some(reason) = kubernetes::unavailable() {
        needs::skip("kubernetes::builds_in_a_cluster", &reason);
        return Ok(());
    }
    let start = Instant::now();
    let lab = Lab::new()?;
    println!("the cluster runs after {:.1} s", start.elapsed().as_secs_f64());
    let parts: [(&str, fn(&Lab) -> Result<()>); 13] = [
        ("a_restricted_pod_copies_files", a_restricted_pod_copies_files),
        ("a_restricted_pod_runs_steps", a_restricted_pod_runs_steps),
        ("a_baseline_pod_runs_steps", a_baseline_pod_runs_steps),
        ("the_second_build_runs_no_step", the_second_build_runs_no_step),
        ("limits_are_in_the_pod", limits_are_in_the_pod),
        ("nothing_runs_on_without_its_caller", nothing_runs_on_without_its_caller),
        ("leftovers_go_with_the_next_build", leftovers_go_with_the_next_build),
        ("failures_are_told", failures_are_told),
        ("a_pod_that_goes_away", a_pod_that_goes_away),
        ("the_doctor_knows_the_role", the_doctor_knows_the_role),
        ("a_volume_claim_keeps_the_state", a_volume_claim_keeps_the_state),
        ("credentials_are_the_callers_or_a_secrets", credentials_are_the_callers_or_a_secrets),
        ("a_pod_asks_its_own_cluster", a_pod_asks_its_own_cluster),
    ];
    let wanted = std::env::var("OVENBIRD_TESTS_PART").unwrap_or_default();
    let mut failed = vec![];
    for (name, part) in parts.iter().filter(|(name, _)| wanted.split(',').any(|word| name.contains(word))) {
        let start = Instant::now();
        let done = catch_unwind(AssertUnwindSafe(|| part(&lab)));
        let well = matches!(done, Ok(Ok(())));
        println!("{name}: {} in {:.1} s", if well { "ok" } else { "FAILED" }, start.elapsed().as_secs_f64());
        if let Ok(Err(error)) = &done {
            println!("{error}");
        }
        if !well {
            failed.push(*name);
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
    Ok(())
}
