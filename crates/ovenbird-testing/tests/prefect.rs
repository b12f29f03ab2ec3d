//! `--on prefect`: a real Prefect server with real workers. One server for everything, since each takes long to start; so it is one test.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ovenbird_testing::base::Base;
use ovenbird_testing::command::{self, Level, Workspace, finish};
use ovenbird_testing::needs::{self, Need};
use ovenbird_testing::prefect::{self, Prefect};
use ovenbird_testing::registry::{Options, Registry, mirror_toml};
use ovenbird_testing::{Result, process};
use rustix::process::Signal;
use serde_json::{Value, json};

/// A flow run takes seconds to begin, and several begin at once.
const LIMIT: Duration = Duration::from_mins(3);

/// Of the server.
const AUTH: &str = "baker:hornero-of-clay-2291";

/// A secret of builds that only the worker's machine has.
const SECRET: &str = "correct-horse-battery-staple-7193";

const DOCKERFILE: &str = "FROM busybox\n\
     COPY . /all/\n\
     RUN find /all | sort | xargs stat -c '%n %A %h %s %Y' > /listing\n\
     RUN --mount=type=secret,id=token sha256sum < /run/secrets/token | cut -c1-12 > /token && echo said by the step\n";

struct Room {
    workspace: Workspace,
    settings: PathBuf,
    address: String,
}

impl Room {
    fn new(settings: &str, address: String) -> Result<Self> {
        let workspace = Workspace::new(Level::Own)?;
        let file = workspace.path().join("settings.toml");
        write(&file, settings);
        let context = workspace.path().join("ctx");
        fs::create_dir_all(context.join("deep/empty")).unwrap();
        write(&context.join("Dockerfile"), DOCKERFILE);
        write(&context.join(".dockerignore"), "ignored\n");
        write(&context.join("ignored"), &"x".repeat(1 << 20));
        write(&context.join("run"), "#!/bin/sh\n");
        fs::hard_link(context.join("run"), context.join("deep/same")).unwrap();
        std::os::unix::fs::symlink("../run", context.join("deep/link")).unwrap();
        command::set_mode(&context.join("run"), 0o4751)?;
        for (name, dockerfile) in [
            ("fails", "FROM busybox\nRUN for n in $(seq 80); do echo line $n; done; exit 7\n"),
            ("wrong", "FROM busybox\nRUNS true\n"),
            ("sleeps", "FROM busybox\nRUN echo begun && sleep 86397\n"),
            ("stopped", "FROM busybox\nRUN echo begun && sleep 86396\n"),
            ("crashes", "FROM busybox\nRUN echo begun && sleep 86395\n"),
            ("goes-on", "FROM busybox\nRUN echo begun && sleep 8.125 && echo done\n"),
        ] {
            fs::create_dir(workspace.path().join(name)).unwrap();
            write(&workspace.path().join(name).join("Dockerfile"), dockerfile);
        }
        Ok(Self { workspace, settings: file, address })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.workspace.path().join(name)
    }

    fn build(&self, on: &str, context: &str, arguments: &[&str]) -> Command {
        let mut command = self.workspace.ovenbird();
        command.env("PREFECT_API_URL", &self.address).env("PREFECT_API_AUTH_STRING", AUTH).env("TMPDIR", self.workspace.path());
        command.arg("--root").arg(self.path("state")).arg("--settings").arg(&self.settings);
        command.args(["build", "--on", on, "--progress", "plain"]).args(arguments).arg(self.path(context));
        command
    }

    /// The exit code and everything that was said.
    fn done(&self, on: &str, context: &str, arguments: &[&str]) -> (Option<i32>, String) {
        finish(&mut self.build(on, context, arguments), None, LIMIT).unwrap()
    }

    /// A build whose output can be looked at while it runs.
    fn start(&self, on: &str, context: &str, arguments: &[&str]) -> Running {
        let log = self.path(&format!("{context}.log"));
        let out = fs::File::create(&log).unwrap();
        let mut command = self.build(on, context, arguments);
        let child = command.stdin(Stdio::null()).stdout(out.try_clone().unwrap()).stderr(out).spawn().unwrap();
        Running { child, log }
    }
}

struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    fn until(&mut self, text: &str) {
        wait_until(text, LIMIT, || {
            assert!(self.said().contains(text) || self.child.try_wait().unwrap().is_none(), "{text}: {}", self.said());
            self.said().contains(text)
        });
    }

    fn signal(&self, signal: Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal).unwrap();
    }

    fn end(mut self) -> (Option<i32>, String) {
        let end = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return (status.code(), self.said());
            }
            assert!(Instant::now() < end, "it does not end: {}", self.said());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

/// Processes whose command line has this text.
fn processes(text: &str) -> Vec<i32> {
    let has = |entry: fs::DirEntry| {
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        String::from_utf8_lossy(&line).replace('\0', " ").contains(text).then(|| entry.file_name().to_str()?.parse().ok())?
    };
    fs::read_dir("/proc").unwrap().flatten().filter_map(has).collect()
}

fn wait_until(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < end, "{what} did not happen within {limit:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn digest(log: &str) -> &str {
    log.lines().rev().find(|line| line.starts_with("sha256:")).unwrap_or_default()
}

/// Name of the flow run that a build says.
fn run_of(log: &str) -> &str {
    log.split("flow run ").nth(1).and_then(|rest| rest.split_whitespace().next()).unwrap_or_default()
}

/// The flow run of a name.
fn flow_run(server: &Prefect, name: &str) -> Value {
    let wanted = json!({"flow_runs": {"name": {"any_": [name]}}});
    server.call("POST", "flow_runs/filter", Some(&wanted)).unwrap()[0].clone()
}

fn state(server: &Prefect, name: &str) -> String {
    flow_run(server, name)["state_type"].as_str().unwrap_or_default().to_owned()
}

/// Everything that Prefect keeps of a run, as text.
fn kept(server: &Prefect, run: &Value) -> String {
    let logs = server.call("POST", "logs/filter", Some(&json!({"logs": {"flow_run_id": {"any_": [run["id"]]}}}))).unwrap();
    format!("{run} {logs}")
}

#[test]
fn on_prefect() -> Result<()> {
    if !needs::available("prefect::on_prefect", &[Need::Run, Need::Registry, Need::Python, Need::Network]) {
        return Ok(());
    }
    let registry = Registry::start_with(Options { bases: &[Base::Busybox], ..Options::default() })?;
    let server = Prefect::start(AUTH)?;
    let sources = format!("[prefect]\nsources = \"{}/sources\"\n", registry.address());
    let room = Room::new(&format!("{}{sources}", mirror_toml(&registry.address())), server.address())?;
    without_a_worker(&room, &server);
    // The worker's machine has settings and secrets of its own.
    let there = room.path("there.toml");
    write(&there, &mirror_toml(&registry.address()));
    let binary = command::binary()?;
    let (state, secret, flow) = (room.path("there"), PathBuf::from(SECRET), prefect::flow());
    let variables: [(&str, &Path); 6] = [
        ("OVENBIRD_PROGRAM", &binary),
        ("OVENBIRD_SETTINGS", &there),
        ("OVENBIRD_ROOT", &state),
        ("OVENBIRD_SECRET_TOKEN", &secret),
        ("PYTHONPATH", &flow),
        ("PREFECT_LOGGING_TO_API_BATCH_INTERVAL", Path::new("0.3")),
    ];
    let pool = json!({"name": "bare", "type": "process"});
    server.call("POST", "work_pools/", Some(&pool))?;
    let _worker = server.worker("builds", &variables)?;
    let on = "prefect,pool=builds";
    std::thread::scope(|scope| {
        let same = scope.spawn(|| the_same_image(&room, &server, &registry, on));
        // Those that wait for themselves, beside it.
        let bare = scope.spawn(|| {
            // Without the flow.
            let _worker = server.worker("bare", &[]).unwrap();
            let (code, log) = room.done("prefect,pool=bare", "sleeps", &[]);
            assert!(
                code == Some(10) && log.contains("ovenbird_flow") && log.contains("hint: the worker has no ovenbird_flow"),
                "{code:?} {log}"
            );
        });
        let failing = scope.spawn(|| failures(&room, &server, on));
        for thread in [same, bare, failing] {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    });
    ends(&room, &server, on);
    Ok(())
}

/// Everything that is said before any flow run begins.
fn without_a_worker(room: &Room, server: &Prefect) {
    let none = format!("prefect,address=http://127.0.0.1:{}/api", process::free_port().unwrap());
    let (code, log) = room.done(&none, "ctx", &[]);
    assert!(code == Some(10) && log.contains("cannot be reached"), "{code:?} {log}");
    let (code, log) = room.done("prefect", "ctx", &[]);
    assert!(code == Some(10) && log.contains("has no work pool") && log.contains("prefect work-pool create"), "{code:?} {log}");
    let made = json!({"name": "builds", "type": "process"});
    server.call("POST", "work_pools/", Some(&made)).unwrap();
    let wrong = format!("prefect,address={}", room.address.trim_end_matches("/api"));
    for (on, expect, code) in [
        (wrong.as_str(), "no Prefect server at", 10),
        ("prefect,pool=other", "has no work pool \"other\"", 10),
        ("prefect,queue=fast", "the work pool builds at", 10),
        ("prefect,image=r.test/a:1", "an image for --on prefect is not supported: the work pool builds starts no containers", 2),
    ] {
        let (ended, log) = room.done(on, "ctx", &[]);
        assert!(ended == Some(code) && log.contains(expect), "{on}: {ended:?} {log}");
    }
    for (auth, expect) in [("", "refuses a caller without a key (401"), ("baker:wrong", "refuses the user and password (401")] {
        let mut command = room.build("prefect", "ctx", &[]);
        command.env("PREFECT_API_AUTH_STRING", auth);
        let (code, log) = finish(&mut command, None, LIMIT).unwrap();
        assert!(code == Some(10) && log.contains(expect) && !log.contains("wrong"), "{code:?} {log}");
    }
    for (arguments, expect) in [
        (&["--secret", "id=token,env=TOKEN"][..], "--secret id=token with src= or env= is not supported: the build runs on Prefect"),
        (&["-o", "type=local,dest=x"], "-o type=local is not supported: the build runs on Prefect"),
        (&["--ssh", "default"], "--ssh is not supported: the build runs on Prefect"),
        (&["--cache-to", "type=local,dest=x"], "--cache-to type=local is not supported"),
        (&["--isolation-level", "root"], "--isolation-level is not supported"),
        (&["--builder", "docker"], "--builder docker does not go with --on prefect"),
    ] {
        let (code, log) = room.done("prefect", "ctx", arguments);
        assert!(code == Some(2) && log.contains(expect), "{code:?} {log}");
    }
    // A run that nobody takes waits, and says for what; stopped, it is cancelled.
    let mut waiting = room.start("prefect", "ctx", &[]);
    waiting.until("no worker of the work pool builds is online: the run waits for one");
    waiting.signal(Signal::INT);
    let (code, log) = waiting.end();
    assert_eq!((code, state(server, run_of(&log)).as_str()), (Some(130), "CANCELLED"), "{log}");
    server.call("PATCH", "work_pools/builds", Some(&json!({"is_paused": true}))).unwrap();
    let mut waiting = room.start("prefect", "ctx", &[]);
    waiting.until("the work pool builds is paused: the run waits until `prefect work-pool resume builds`");
    waiting.signal(Signal::TERM);
    let (code, log) = waiting.end();
    assert_eq!((code, state(server, run_of(&log)).as_str()), (Some(130), "CANCELLED"), "{log}");
    server.call("PATCH", "work_pools/builds", Some(&json!({"is_paused": false}))).unwrap();
}

/// One request, one digest; the second time nothing runs and nothing is sent.
fn the_same_image(room: &Room, server: &Prefect, registry: &Registry, on: &str) {
    let name = format!("{}/made/app:1", registry.address());
    let metadata = room.path("metadata.json");
    let arguments = [
        "--reproducible",
        "--secret",
        "id=token",
        "--push",
        "-t",
        &name,
        "--metadata-file",
        metadata.to_str().unwrap(),
        "--label",
        "a=b c",
    ];
    let mut here = room.build("here", "ctx", &arguments);
    here.env("token", SECRET);
    let (code, log) = finish(&mut here, None, LIMIT).unwrap();
    assert_eq!(code, Some(0), "{log}");
    let expect = digest(&log).to_owned();
    let report = || -> Value { serde_json::from_str(&fs::read_to_string(&metadata).unwrap()).unwrap() };
    let all = report()["ovenbird"]["ran"].as_u64().unwrap();
    let mut sources = BTreeSet::new();
    for ran in [all, 0] {
        let (code, log) = room.done(on, "ctx", &arguments);
        assert_eq!((code, digest(&log)), (Some(0), expect.as_str()), "{log}\n{}", server.log("builds"));
        assert!(ran == 0 || log.contains("said by the step"), "{log}");
        let report = report();
        assert_eq!((&report["ovenbird"]["ran"], &report["containerimage.digest"]), (&json!(ran), &json!(expect)), "{report}");
        assert_eq!(report["ovenbird"]["dockerfile"]["text"], DOCKERFILE);
        wait_until("the end of the run", LIMIT, || state(server, run_of(&log)) == "COMPLETED");
        let run = flow_run(server, run_of(&log));
        // The parameters are those of the request.
        let parameters = &run["parameters"];
        assert_eq!(
            (&parameters["labels"]["a"], &parameters["names"][0], &parameters["reproducible"]),
            (&json!("b c"), &json!(name), &json!(true))
        );
        assert!(parameters["source"]["remote"].as_str().unwrap().starts_with(&format!("oci://{}/sources@sha256:", registry.address())));
        let kept = kept(server, &run);
        for hidden in [SECRET, AUTH] {
            assert!(!kept.contains(hidden) && !log.contains(hidden), "{hidden}");
        }
        assert!(!parameters.to_string().contains(room.path("").to_str().unwrap()), "{parameters}");
        sources.insert(parameters["source"].to_string());
    }
    assert_eq!(sources.len(), 1, "an unchanged source is the same artifact");
    let deployments = server.call("POST", "deployments/filter", Some(&json!({}))).unwrap();
    let ours = deployments.as_array().unwrap().iter().filter(|deployment| deployment["name"] == "ovenbird-builds").count();
    assert_eq!(ours, 1, "{deployments}");
}

/// Failures are those of a build here.
fn failures(room: &Room, server: &Prefect, on: &str) {
    let check = |context: &str, code: i32| {
        let here = room.done("here", context, &["--no-cache"]);
        let there = room.done(on, context, &["--no-cache"]);
        let told = |log: &str| log[log.find("error").unwrap_or(log.len())..].replace(room.path("").to_str().unwrap(), "");
        assert_eq!((here.0, there.0), (Some(code), Some(code)), "{} {}", here.1, there.1);
        assert_eq!(told(&there.1), told(&here.1), "{context}");
        wait_until("the end of the run", LIMIT, || state(server, run_of(&there.1)) == "FAILED");
        let run = flow_run(server, run_of(&there.1));
        if context == "fails" {
            let error = told(&there.1);
            assert!(error.contains("| line 31\n") && error.contains("| line 80\n") && !error.contains("| line 30\n"), "{error}");
            assert!(run["state"]["message"].as_str().unwrap().contains("line 80"), "{run}");
        }
    };
    std::thread::scope(|scope| {
        let wrong = scope.spawn(|| check("wrong", 4));
        check("fails", 6);
        wrong.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

/// Stopped by the caller, stopped at the server, killed there, and killed here.
fn ends(room: &Room, server: &Prefect, on: &str) {
    let [mut interrupted, mut stopped, mut crashed, mut killed] =
        ["sleeps", "stopped", "crashes", "goes-on"].map(|context| room.start(on, context, &["--no-cache"]));
    killed.until("begun");
    killed.signal(Signal::KILL);
    assert_eq!(killed.child.wait().unwrap().code(), None);

    interrupted.until("begun");
    assert!(!processes("sleep 86397").is_empty());
    interrupted.signal(Signal::INT);
    wait_until("the end of the step", Duration::from_secs(10), || processes("sleep 86397").is_empty());
    let (code, log) = interrupted.end();
    assert_eq!(code, Some(130), "{log}");
    wait_until("the end of the run", Duration::from_secs(30), || state(server, run_of(&log)) == "CANCELLED");

    stopped.until("begun");
    let run = flow_run(server, run_of(&stopped.said()));
    let state_of_run = json!({"state": {"type": "CANCELLING", "name": "Cancelling"}});
    server.call("POST", &format!("flow_runs/{}/set_state", run["id"].as_str().unwrap()), Some(&state_of_run)).unwrap();
    wait_until("the end of the step", Duration::from_secs(10), || processes("sleep 86396").is_empty());
    let (code, log) = stopped.end();
    assert!(
        code.is_some_and(|code| code == 130 || code == 10) && log.contains("is being cancelled at the Prefect server"),
        "{code:?} {log}"
    );

    crashed.until("begun");
    let run = flow_run(server, run_of(&crashed.said()));
    let own = format!("PREFECT__FLOW_RUN_ID={}", run["id"].as_str().unwrap());
    let is_ours = |pid: &i32| String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/environ")).unwrap_or_default()).contains(&own);
    let worker = processes("worker --builder engine").into_iter().find(is_ours).unwrap();
    // The flow is what started the worker.
    let stat = fs::read_to_string(format!("/proc/{worker}/stat")).unwrap();
    let parent: i32 = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(1).unwrap().parse().unwrap();
    rustix::process::kill_process(rustix::process::Pid::from_raw(parent).unwrap(), Signal::KILL).unwrap();
    wait_until("the end of the step", Duration::from_secs(15), || processes("sleep 86395").is_empty());
    let (code, log) = crashed.end();
    assert!(code == Some(10) && log.contains("crashed") && log.contains("its last lines were"), "{code:?} {log}");

    // Nobody waits for it, and it goes on.
    wait_until("the end of the run", LIMIT, || state(server, run_of(&killed.said())) == "COMPLETED");
    assert!(kept(server, &flow_run(server, run_of(&killed.said()))).contains("done"));
}
