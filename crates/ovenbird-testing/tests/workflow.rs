//! Phases and plugins from outside: what runs when, what it changes, what it may see, and what the report says of it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use ovenbird_testing::Result;
use ovenbird_testing::base::Base;
use ovenbird_testing::command::{Level, Workspace, finish};
use ovenbird_testing::needs::{self, Need};
use ovenbird_testing::process::output;
use ovenbird_testing::registry::{Options, Registry};
use serde_json::Value;

const LIMIT: Duration = Duration::from_mins(2);

/// A folder with a context, and plugins beside it.
struct Room {
    room: Workspace,
}

/// What a build came to.
struct Done {
    code: Option<i32>,
    log: String,
    report: Value,
}

impl Done {
    fn plugin(&self, name: &str) -> Value {
        let all = self.report["plugins"].as_array().cloned().unwrap_or_default();
        all.into_iter().find(|one| one["name"] == name).unwrap_or_default()
    }

    fn outcomes(&self) -> String {
        let all = self.report["plugins"].as_array().cloned().unwrap_or_default();
        let told =
            all.iter().map(|one| format!("{}={}", one["name"].as_str().unwrap_or_default(), one["outcome"].as_str().unwrap_or_default()));
        told.collect::<Vec<_>>().join(" ")
    }
}

impl Room {
    fn new(dockerfile: &str) -> Result<Self> {
        let this = Self { room: Workspace::new(Level::Own)? };
        fs::create_dir_all(this.at("ctx")).unwrap();
        fs::write(this.at("ctx/Dockerfile"), dockerfile).unwrap();
        fs::write(this.at("ctx/a"), "a\n").unwrap();
        fs::write(this.at("settings.toml"), format!("plugin_folders = [{:?}]\n", this.at("plugins").display().to_string())).unwrap();
        fs::create_dir_all(this.at("plugins")).unwrap();
        Ok(this)
    }

    fn at(&self, name: &str) -> std::path::PathBuf {
        self.room.path().join(name)
    }

    /// A program in the plugin folder.
    fn program(&self, name: &str, text: &str) -> &Self {
        let path = self.at("plugins").join(format!("ovenbird-plugin-{name}"));
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        self
    }

    /// A shell plugin: `body` runs for `run`, with the question in `$question`.
    fn shell(&self, name: &str, body: &str) -> &Self {
        let phases = r#"["pre_build","pre_publish","post_build","exit"]"#;
        self.program(
            name,
            &format!(
                "#!/bin/sh\nquestion=$(cat)\ncase $question in\n*'\"call\":\"describe\"'*) echo '{{\"ovenbird\":1,\"plugins\":[{{\"name\":\"{name}\",\"phases\":{phases}}}]}}'; exit;;\nesac\n{body}\n"
            ),
        )
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.room.ovenbird();
        let _ = fs::remove_file(self.at("report.json"));
        command.args(["--root", "state", "--settings", "settings.toml", "--progress", "plain", "build", "--metadata-file", "report.json"]);
        command.args(arguments).env("TOKEN", "hunter2-hunter2");
        command
    }

    fn done(&self, code: Option<i32>, log: String) -> Done {
        let report = fs::read_to_string(self.at("report.json")).unwrap_or_default();
        assert!(!report.contains("hunter2") && !log.contains("hunter2"), "a secret is seen: {log} {report}");
        Done { code, log, report: serde_json::from_str::<Value>(&report).map(|all| all["ovenbird"].clone()).unwrap_or_default() }
    }

    fn build(&self, arguments: &[&str]) -> Result<Done> {
        let (code, log) = finish(&mut self.command(&[&["ctx"], arguments].concat()), None, LIMIT)?;
        Ok(self.done(code, log))
    }
}

const COPY: &str = "FROM scratch\nCOPY . /\n";
const OK: &str = "echo '{\"ovenbird\":1}'";

#[test]
fn order_failures_and_what_is_not_required() -> Result<()> {
    let room = Room::new(COPY)?;
    room.shell("one", OK).shell("bad", "echo broken >&2; exit 3").shell("no", "echo '{\"ovenbird\":1,\"veto\":\"not like this\"}'");
    room.shell("last", "echo '{\"ovenbird\":1,\"result\":{\"seen\":'$(echo \"$question\" | grep -c '\"status\":\"failed\"')'}}'");
    let all: &[(&[&str], i32, &str, &str)] = &[
        (&["pre_build:one", "post_build:last", "exit:one"], 0, "one=ok last=ok one=ok", ""),
        (&["pre_build:bad", "exit:last"], 9, "bad=failed last=ok", "pre_build plugin bad: "),
        (&["pre_build:bad,on_failure=warn", "pre_build:one"], 0, "bad=warned one=ok", "warning"),
        (&["pre_publish:no", "post_build:one", "exit:last"], 9, "no=failed last=ok", "pre_publish plugin no: not like this"),
        (&["exit:bad", "exit:one"], 9, "bad=failed one=ok", "exit plugin bad: "),
        (&["pre_publish:no", "exit:bad", "exit:one"], 9, "no=failed bad=failed one=ok", "error: pre_publish plugin no: not like this"),
        (&["pre_build:gone,required=false", "pre_build:one"], 0, "gone=skipped one=ok", ""),
        (&["pre_build:gone"], 2, "", "there is no plugin \"gone\""),
        (&["pre_build:one,x=1"], 2, "", "unknown argument \"x\""),
        (&["pre_build:labels,set.a=b,sett=1"], 2, "", "did you mean \"set\"?"),
        (&["pre_build:size-limit,max=1"], 2, "", "it does not run in pre_build"),
    ];
    for (plugins, code, outcomes, words) in all {
        let flags: Vec<&str> = plugins.iter().flat_map(|plugin| ["--plugin", plugin]).collect();
        let done = room.build(&flags)?;
        assert_eq!(done.code, Some(*code), "{plugins:?}: {}", done.log);
        assert_eq!(done.outcomes(), *outcomes, "{plugins:?}: {}", done.log);
        assert!(done.log.contains(words), "{plugins:?}: {}", done.log);
        assert_eq!(done.report["return_code"], *code, "{plugins:?}");
        if outcomes.is_empty() {
            assert!(!done.log.contains("COPY"), "it is an error before the build starts: {}", done.log);
        }
        if outcomes.contains("last=ok") {
            assert_eq!(done.plugin("last")["result"]["seen"], i32::from(*code != 0), "what the exit plugin sees");
        }
    }
    Ok(())
}

#[test]
fn changes_are_in_the_key_and_in_the_log() -> Result<()> {
    let room = Room::new(COPY)?;
    fs::write(room.at("ctx/hidden"), "x").unwrap();
    let python = r#"#!/usr/bin/env python3
import json, sys
question = json.load(sys.stdin)
if question["call"] == "describe":
    args = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
    print(json.dumps({"ovenbird": 1, "plugins": [{"name": "change", "phases": ["pre_build"], "about": "changes things", "args": args}]}))
    sys.exit()
build = question["build"]
print("token", question["secrets"]["tok"]["text"], file=sys.stderr)
changes = {"dockerfile": build["dockerfile"] + "LABEL l=1\n", "labels": {"m": "2"}, "hide_files": ["hidden"],
           "add_files": [{"path": "added/b", "text": question["args"]["text"], "mode": 0o600}]}
print(json.dumps({"ovenbird": 1, "result": {"args": question["args"]}, "changes": changes}))
"#;
    room.program("change", python);
    let build = |text: &str| {
        room.build(&["--secret", "id=tok,env=TOKEN", "-o", "out", "--plugin", &format!("pre_build:change,secret=tok,text={text}")])
    };
    let first = build("one")?;
    assert_eq!(first.code, Some(0), "{}", first.log);
    assert_eq!(fs::read_to_string(room.at("out/added/b")).unwrap(), "one");
    assert!(!room.at("out/hidden").exists() && room.at("ctx/hidden").exists() && !room.at("ctx/added").exists());
    for words in ["+LABEL l=1", "+ label m=2", "+ file added/b (mode 600)", "- hidden hidden", "token ***"] {
        assert!(first.log.contains(words), "{words}: {}", first.log);
    }
    assert_eq!(first.plugin("change")["result"]["args"]["text"], "one");
    assert!(first.report["dockerfile"]["text"].as_str().unwrap_or_default().ends_with("LABEL l=1\n"));
    let again = build("one")?;
    assert_eq!((&again.report["digest"], &again.report["ran"]), (&first.report["digest"], &Value::from(0)), "{}", again.log);
    let other = build("two")?;
    assert_ne!(other.report["digest"], first.report["digest"]);
    assert_eq!(other.report["ran"], 1);
    // Half of what a failed plugin did is not built.
    room.shell(
        "half",
        "echo '{\"ovenbird\":1,\"changes\":{\"labels\":{\"x\":\"1\"},\"add_files\":[{\"path\":\"/etc/x\",\"text\":\"\"}]}}'",
    );
    let done = room.build(&["--plugin", "pre_build:half,on_failure=warn"])?;
    assert!(done.code == Some(0) && done.log.contains("not inside the build context"), "{}", done.log);
    assert!(!done.report["images"].to_string().contains("\"x\""), "{}", done.report["images"]);
    // Nobody but a pre_build plugin changes a build.
    room.shell("late", "echo '{\"ovenbird\":1,\"changes\":{\"labels\":{\"x\":\"1\"}}}'");
    let done = room.build(&["--plugin", "pre_publish:late"])?;
    assert!(done.code == Some(9) && done.log.contains("which only a pre_build plugin may"), "{}", done.log);
    Ok(())
}

#[test]
fn plugins_see_what_they_are_granted() -> Result<()> {
    let room = Room::new(COPY)?;
    room.shell("look", "env | grep -q TOKEN && echo leak >&2; case $question in *hunter2*) echo granted >&2;; *) echo nothing >&2;; esac; echo '{\"ovenbird\":1}'");
    let secret = ["--secret", "id=tok,env=TOKEN"];
    let done = room.build(&[&secret[..], &["--plugin", "pre_build:look"]].concat())?;
    assert!(done.log.contains("look] nothing") && !done.log.contains("leak"), "{}", done.log);
    let done = room.build(&[&secret[..], &["--plugin", "pre_build:look,secret=tok"]].concat())?;
    assert!(done.log.contains("look] granted") && !done.log.contains("leak"), "{}", done.log);
    let done = room.build(&["--plugin", "pre_build:look,secret=tok"])?;
    assert!(done.code == Some(2) && done.log.contains("cannot be granted the secret \"tok\""), "{}", done.log);
    Ok(())
}

#[test]
fn time_and_output_are_bounded() -> Result<()> {
    let room = Room::new(COPY)?;
    room.shell("slow", "sh -c 'sleep 3017; echo late' & sleep 3017");
    room.shell("loud", "yes x | head -c 70000000")
        .shell("talk", "yes x >&2")
        .shell("odd", "echo '{\"ovenbird\":1'")
        .shell("new", "echo '{\"ovenbird\":2}'");
    room.shell("more", "echo '{\"ovenbird\":1,\"extra\":1}'").shell("left", "sleep 2017 & echo '{\"ovenbird\":1}'");
    let begin = Instant::now();
    for (plugin, words) in [
        ("slow,timeout=1", "took longer than 1 seconds"),
        ("talk,timeout=1", "took longer than 1 seconds"),
        ("loud", "answered with more than"),
        ("odd", "is not one JSON document"),
        ("new", "speaks version 2"),
        ("more", "unknown field `extra`"),
    ] {
        let done = room.build(&["--plugin", &format!("pre_build:{plugin}")])?;
        assert!(done.code == Some(9) && done.log.contains(words), "{plugin}: {}", done.log.chars().take(2000).collect::<String>());
    }
    // What a plugin leaves behind goes with it.
    let done = room.build(&["--plugin", "pre_build:left"])?;
    assert_eq!(done.code, Some(0), "{}", done.log);
    let left = output(Command::new("pgrep").args(["-f", "^sleep [23]017"]));
    assert!(left.is_err(), "processes are left: {left:?}");
    assert!(begin.elapsed() < Duration::from_secs(40), "{:?}", begin.elapsed());
    Ok(())
}

#[test]
fn exit_plugins_run_after_a_cancel() -> Result<()> {
    let room = Room::new(COPY)?;
    room.shell("wait", "echo waiting >&2; sleep 100");
    room.shell(
        "last",
        "case $question in *'\"status\":\"cancelled\"'*) touch ../cancelled;; esac; cp /dev/null cancelled; echo '{\"ovenbird\":1}'",
    );
    let mut command = room.command(&["ctx", "--plugin", "pre_build:wait", "--plugin", "exit:last"]);
    let log = fs::File::create(room.at("log")).unwrap();
    let mut child = command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
    let begin = Instant::now();
    while !fs::read_to_string(room.at("log")).unwrap_or_default().contains("waiting") && begin.elapsed() < LIMIT {
        std::thread::sleep(Duration::from_millis(20));
    }
    let stop = Instant::now();
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::INT).unwrap();
    let status = child.wait().unwrap();
    let done = room.done(status.code(), fs::read_to_string(room.at("log")).unwrap());
    assert_eq!(done.code, Some(130), "{}", done.log);
    assert!(stop.elapsed() < Duration::from_secs(10) && room.at("cancelled").exists(), "{}", done.log);
    assert_eq!((done.report["outcome"].as_str(), done.outcomes().as_str()), (Some("cancelled"), "wait=failed last=ok"));
    Ok(())
}

#[test]
fn generic_plugins_on_a_real_registry() -> Result<()> {
    if !needs::available("generic_plugins_on_a_real_registry", &[Need::Registry, Need::Run]) {
        return Ok(());
    }
    let registry = Registry::start_with(Options { bases: &[Base::Busybox], credentials: None })?;
    let room = Room::new("FROM busybox\nRUN cat /opt/ca.pem > /seen\nCOPY . /app\n")?;
    let settings = fs::read_to_string(room.at("settings.toml")).unwrap() + &registry.settings_toml();
    fs::write(room.at("settings.toml"), settings).unwrap();
    fs::write(room.at("ctx/secret.txt"), "x").unwrap();
    let name = format!("{}/team/app", registry.address());
    let workflow = format!(
        r#"
[[pre_build]]
name = "allowed-parents"
args = {{ allowed = ["docker.io/library/*"] }}
[[pre_build]]
name = "pin-from"
[[pre_build]]
name = "auto-labels"
args = {{ only = ["build-date", "architecture"] }}
[[pre_build]]
name = "inject-files"
args = {{ files = [{{ target = "/opt/ca.pem", text = "CA" }}] }}
[[pre_build]]
name = "hide-files"
args = {{ patterns = ["secret.txt"] }}
[[pre_build]]
name = "add-dockerfile"
[[pre_build]]
name = "check-platforms"
[[pre_build]]
name = "check-settings"
[[pre_build]]
name = "bump-release"
args = {{ repository = "{name}", version = "1.0", tag = true }}
[[pre_build]]
name = "tag-from-config"
args = {{ floating = ["edge"] }}
[[pre_publish]]
name = "test-image"
args = {{ command = ["cat /seen; test -f /root/buildinfo/Dockerfile; test ! -e /app/secret.txt; test ! -e /opt/ca.pem"], expect = "CA" }}
[[pre_publish]]
name = "size-limit"
args = {{ max = "100m" }}
[[pre_publish]]
name = "package-list"
args = {{ format = "cyclonedx", dest = "sbom.json" }}
[[pre_publish]]
name = "compare-components"
[[pre_publish]]
name = "assert-labels"
args = {{ present = ["build-date"], matching = {{ release = "[0-9]+" }} }}
[[post_build]]
name = "verify-media-types"
args = {{ allowed = ["oci"] }}
[[post_build]]
name = "group-manifests"
args = {{ images = [], names = ["{name}:all"] }}
[[post_build]]
name = "export-files"
args = {{ paths = ["seen"], dest = "exported" }}
[[exit]]
name = "store-metadata"
args = {{ dest = "stored.json" }}
[[exit]]
name = "undo-push"
"#
    );
    fs::write(room.at("flow.toml"), workflow).unwrap();
    let tags = || -> Result<Vec<String>> {
        let listed = output(Command::new("skopeo").args(["list-tags", "--tls-verify=false", &format!("docker://{name}")]))?;
        let listed: Value = serde_json::from_str(&listed).unwrap();
        let mut tags: Vec<String> = listed["Tags"].as_array().into_iter().flatten().filter_map(|t| t.as_str().map(str::to_owned)).collect();
        tags.sort();
        Ok(tags)
    };
    let push = |more: &[&str]| room.build(&[&["-t", &format!("{name}:1"), "--push", "--workflow", "flow.toml"], more].concat());
    let done = push(&[])?;
    assert_eq!(done.code, Some(0), "{}", done.log);
    assert_eq!(tags()?, ["1", "1.0-1", "all", "edge"]);
    assert_eq!(fs::read_to_string(room.at("exported/seen")).unwrap(), "CA");
    let stored: Value = serde_json::from_str(&fs::read_to_string(room.at("stored.json")).unwrap()).unwrap();
    assert_eq!((&stored["outcome"], &stored["digest"]), (&Value::from("ok"), &done.report["digest"]));
    assert_eq!(serde_json::from_str::<Value>(&fs::read_to_string(room.at("sbom.json")).unwrap()).unwrap()["bomFormat"], "CycloneDX");
    let base = &done.report["base_images"][0];
    assert!(
        base["final"] == true && base["name"].as_str().unwrap_or_default().starts_with("docker.io/library/busybox:latest@sha256:"),
        "{base}"
    );
    for key in ["digest", "inspect", "info", "size"] {
        assert!(!base[key].is_null() && !done.report["images"][0][key].is_null(), "{key}");
    }
    // The next release; and after a failure what was pushed is gone again.
    room.shell("bad", "exit 1");
    let done = push(&["--plugin", "post_build:bad"])?;
    assert_eq!(done.code, Some(9), "{}", done.log);
    assert_eq!(done.plugin("bump-release")["result"]["release"], "2");
    assert!(!tags().unwrap_or_default().contains(&"1.0-2".to_owned()), "{}", done.log);
    // Each of these says no.
    fs::write(room.at("ctx/Dockerfile"), "FROM busybox\nCOPY . /app\n").unwrap();
    for (plugin, words) in [
        ("pre_build:allowed-parents,allowed=quay.io/**", "busybox is not allowed"),
        ("pre_publish:size-limit,max=10", "at most 10 are allowed"),
        ("pre_publish:assert-labels,present=vendor", "vendor is missing"),
        ("pre_publish:test-image,command=false", "failed in the image with code 1"),
        ("pre_build:check-platforms,allowed=linux/s390x", "is not one of linux/s390x"),
    ] {
        let done = room.build(&["--plugin", plugin])?;
        assert!(done.code == Some(9) && done.log.contains(words), "{plugin}: {}", done.log);
    }
    Ok(())
}

#[test]
fn squashed_layers_have_the_same_files() -> Result<()> {
    if !needs::available("squashed_layers_have_the_same_files", &[Need::Registry, Need::Run]) {
        return Ok(());
    }
    let registry = Registry::start_with(Options { bases: &[Base::Busybox], credentials: None })?;
    let room = Room::new(
        "FROM busybox\nRUN mkdir -p /d/x /e && echo 1 > /d/x/f && echo 1 > /e/gone && rm -rf /home\n\
         RUN rm -r /d/x && echo 2 > /d/x && echo 3 > /d/g && ln /d/g /d/h && rm /e/gone /etc/group\n\
         RUN rm -rf /var && mkdir /var && echo new > /var/new && chown 5:6 /var/new && chmod 4755 /d/g && rm -rf /e\n\
         RUN rm -rf /root && echo file > /root\nUSER 7\n",
    )?;
    let settings = fs::read_to_string(room.at("settings.toml")).unwrap() + &registry.settings_toml();
    fs::write(room.at("settings.toml"), settings).unwrap();
    let build = |name: &str, plugins: &[&str]| -> Result<Done> {
        let done = room.build(
            &[&["--reproducible", "-o", &format!("type=tar,dest={name}.tar"), "-o", &format!("type=oci,tar=false,dest={name}")], plugins]
                .concat(),
        )?;
        assert_eq!(done.code, Some(0), "{}", done.log);
        Ok(done)
    };
    let layers = |done: &Done| done.report["images"][0]["inspect"]["RootFS"]["Layers"].as_array().map_or(0, Vec::len);
    let plain = build("plain", &[])?;
    let base = build("base", &["--plugin", "pre_publish:squash"])?;
    let all = build("all", &["--plugin", "pre_publish:squash,from=all"])?;
    assert_eq!((layers(&plain), layers(&base), layers(&all)), (5, 2, 1));
    let first = |done: &Done| done.report["images"][0]["inspect"]["RootFS"]["Layers"][0].clone();
    assert_eq!(first(&plain), first(&base), "the base image's layer stays");
    let whole = fs::read(room.at("plain.tar")).unwrap();
    for name in ["base", "all"] {
        assert!(fs::read(room.at(&format!("{name}.tar"))).unwrap() == whole, "{name}: other files");
    }
    // Also for somebody who has the layers only.
    for name in ["plain", "base", "all"] {
        fs::create_dir_all(room.at("fresh")).unwrap();
        fs::write(room.at("fresh/Dockerfile"), "FROM img\n").unwrap();
        let mut command = room.room.ovenbird();
        command.args(["--root", &format!("state-{name}"), "build", "fresh", "-o", &format!("type=tar,dest={name}-fresh.tar")]);
        let (code, log) = finish(command.args(["--build-context", &format!("img=oci-layout://./{name}")]), None, LIMIT)?;
        assert_eq!(code, Some(0), "{log}");
    }
    let fresh = |name: &str| fs::read(room.at(&format!("{name}-fresh.tar"))).unwrap();
    assert!(fresh("base") == fresh("plain") && fresh("all") == fresh("plain"), "other files in the layers");
    assert_eq!(base.report["images"][0]["inspect"]["Config"]["User"], "7");
    Ok(())
}

/// What a plugin has started is gone when the build is: killed with `kill -9`, or left by a second Ctrl-C.
#[test]
fn nothing_of_a_plugin_outlives_the_build() -> Result<()> {
    let room = Room::new(COPY)?;
    // In its group, in a session of its own, and one whose parent is gone.
    room.shell(
        "stay",
        "trap '' INT TERM HUP; sleep 4017 & setsid sleep 4017 & (setsid sh -c 'sleep 4017 & sleep 4017' &) ; echo waiting >&2; sleep 4017",
    );
    let sleeping = || output(Command::new("pgrep").args(["-f", "^sleep 4017"])).map_or(0, |found| found.lines().count());
    for signals in [&[rustix::process::Signal::KILL][..], &[rustix::process::Signal::INT; 2]] {
        for phase in ["pre_build", "exit"] {
            let mut command = room.command(&["ctx", "--plugin", &format!("{phase}:stay")]);
            let log = fs::File::create(room.at("log")).unwrap();
            let mut child = command.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
            let begin = Instant::now();
            while sleeping() < 5 && begin.elapsed() < LIMIT {
                std::thread::sleep(Duration::from_millis(20));
            }
            assert_eq!(sleeping(), 5, "{}", fs::read_to_string(room.at("log")).unwrap());
            for signal in signals {
                rustix::process::kill_process(rustix::process::Pid::from_child(&child), *signal).unwrap();
                std::thread::sleep(Duration::from_millis(300));
            }
            child.wait().unwrap();
            let end = Instant::now();
            while sleeping() > 0 && end.elapsed() < Duration::from_secs(8) {
                std::thread::sleep(Duration::from_millis(20));
            }
            assert_eq!(sleeping(), 0, "{phase} after {signals:?}");
        }
    }
    Ok(())
}

#[test]
fn what_plugins_are_asked_before_the_build() -> Result<()> {
    let room = Room::new(COPY)?;
    for (plugins, code, words) in [
        (&["exit:notify,url_secret=hook"][..], 2, "it is not granted the secret \"hook\""),
        (&["exit:notify,url=https://x.test,token_secret=tok,secret=other"], 2, "it is not granted the secret \"tok\""),
        (&["pre_build:floating-tags-last,tags=stable"], 9, "no name of the build has the tag \"stable\""),
        (&["pre_build:tag-from-config,repository=r.test/app,floating=stable", "pre_build:floating-tags-last,tags=stable"], 0, ""),
    ] {
        let flags: Vec<&str> = plugins.iter().flat_map(|plugin| ["--plugin", plugin]).collect();
        let done = room.build(&[&["--secret", "id=other,env=TOKEN"], &flags[..]].concat())?;
        assert!(done.code == Some(code) && done.log.contains(words), "{plugins:?}: {}", done.log);
        assert!(code == 0 || !done.log.contains("COPY"), "nothing is built: {}", done.log);
    }
    Ok(())
}

#[test]
fn names_by_plugins_alone() -> Result<()> {
    if !needs::available("names_by_plugins_alone", &[Need::Registry]) {
        return Ok(());
    }
    let registry = Registry::start()?;
    let room = Room::new(COPY)?;
    let name = format!("{}/team/app", registry.address());
    let tags = format!("pre_build:tag-from-config,repository={name},primary=1.0,unique=x1");
    for on in ["here", "process"] {
        let done = room.build(&["--on", on, "--push", "--plugin", &tags])?;
        assert_eq!(
            (done.code, &done.report["pushed"]),
            (Some(0), &serde_json::json!([format!("{name}:x1"), format!("{name}:1.0")])),
            "{}",
            done.log
        );
        let done = room.build(&["--on", on, "--push"])?;
        assert!(done.code == Some(2) && done.log.contains("there is nothing to push to"), "{}", done.log);
        let done = room.build(&["--on", on, "--push", "--plugin", "pre_build:labels,set.a=b"])?;
        assert!(done.code == Some(2) && done.log.contains("there is nothing to push to"), "{}", done.log);
    }
    // The image of this build is in the index once, by whatever name it is known; or not at all.
    let grouped = |more: &str| {
        let group = format!("post_build:group-manifests,images={name}:1.0,names={name}:all{more}");
        room.build(&["--push", "-t", &format!("{name}:1.0"), "--plugin", &group])
    };
    let done = grouped("")?;
    assert_eq!(
        (done.code, done.plugin("group-manifests")["result"]["platforms"].as_array().map(Vec::len)),
        (Some(0), Some(1)),
        "{}",
        done.log
    );
    let done = grouped(",without_own=true")?;
    assert!(done.code == Some(9) && done.log.contains("there is no image to put into the index"), "{}", done.log);
    Ok(())
}

/// A build.json of dock, in a room with a registry that has the base images.
struct Dock {
    room: Room,
    registry: Registry,
}

impl Dock {
    /// `None`: the machine has no registry. The context has this Dockerfile.
    fn new(test: &str, dockerfile: &str) -> Result<Option<Self>> {
        if !needs::available(test, &[Need::Registry]) {
            return Ok(None);
        }
        let registry = Registry::start_with(Options { bases: &[Base::Busybox], credentials: None })?;
        Ok(Some(Self { room: Room::new(dockerfile)?, registry }))
    }

    fn json(&self, more: &str) -> String {
        format!(r#"{{"git_url":"{}","image":"team/app:1"{more}}}"#, self.room.at("ctx").display())
    }

    /// Builds with a build.json that says this, too.
    fn build(&self, more: &str) -> Result<Done> {
        fs::write(self.room.at("build.json"), self.json(more)).unwrap();
        self.run(&["--build-json", "build.json"], None)
    }

    fn run(&self, arguments: &[&str], variable: Option<&str>) -> Result<Done> {
        let mut command = self.room.command(arguments);
        command.envs(variable.map(|text| ("BUILD_JSON", text)));
        let (code, log) = finish(&mut command, None, LIMIT)?;
        Ok(self.room.done(code, log))
    }
}

#[test]
fn dock_build_pushes_to_each_target_registry() -> Result<()> {
    let Some(dock) = Dock::new("dock_build_pushes_to_each_target_registry", COPY)? else { return Ok(()) };
    let other = Registry::start()?;
    let (first, second) = (dock.registry.address(), other.address());
    let done = dock.build(&format!(r#","target_registries":["{first}","http://{second}/"]"#))?;
    assert_eq!((done.code, &done.report["image_name"]), (Some(0), &Value::from(format!("{first}/team/app:1"))), "{}", done.log);
    for address in [first, second] {
        let name = format!("docker://{address}/team/app:1");
        let there = output(Command::new("skopeo").args(["inspect", "--tls-verify=false", "--format={{.Digest}}", &name]))?;
        assert_eq!(there.trim(), done.report["digest"]);
    }
    Ok(())
}

#[test]
fn dock_build_describes_the_built_image() -> Result<()> {
    let Some(dock) = Dock::new("dock_build_describes_the_built_image", COPY)? else { return Ok(()) };
    let done = dock.build(r#","prebuild_plugins":[{"name":"labels","args":{"set":{"by":"dock"}}}]"#)?;
    assert_eq!(done.code, Some(0), "{}", done.log);
    let image = &done.report["images"][0];
    assert_eq!(image["inspect"]["Config"]["Labels"]["by"], "dock");
    assert_eq!(image["info"]["RepoTags"][0], "docker.io/team/app:1");
    Ok(())
}

#[test]
fn dock_build_describes_the_base_image() -> Result<()> {
    let Some(dock) = Dock::new("dock_build_describes_the_base_image", "FROM busybox\nCOPY . /\n")? else { return Ok(()) };
    let done = dock.build(&format!(r#","parent_registry":"{}""#, dock.registry.address()))?;
    assert_eq!(done.code, Some(0), "{}", done.log);
    let base = &done.report["base_images"][0];
    for key in ["digest", "inspect", "info", "size"] {
        assert!(!base[key].is_null(), "{key}: {base}");
    }
    assert!(base["inspect"]["RootFS"]["Layers"].as_array().is_some_and(|layers| !layers.is_empty()), "{base}");
    Ok(())
}

#[test]
fn dock_build_takes_base_images_from_the_parent_registry() -> Result<()> {
    let Some(dock) = Dock::new("dock_build_takes_base_images_from_the_parent_registry", "FROM busybox\nCOPY . /\n")? else { return Ok(()) };
    let parent = format!(r#","parent_registry":"{}""#, dock.registry.address());
    let done = dock.build(&parent)?;
    let name = done.report["base_images"][0]["name"].as_str().unwrap_or_default().to_owned();
    assert!(done.code == Some(0) && name.starts_with(&dock.registry.address()), "{name}: {}", done.log);
    // An image of another registry is not that.
    fs::write(dock.room.at("ctx/Dockerfile"), "FROM other.example.org/busybox\n").unwrap();
    let done = dock.build(&parent)?;
    assert!(done.code == Some(9) && done.log.contains("other.example.org/busybox is not allowed"), "{}", done.log);
    Ok(())
}

#[test]
fn dock_build_that_fails_runs_no_later_phase() -> Result<()> {
    let Some(dock) = Dock::new("dock_build_that_fails_runs_no_later_phase", "FROM scratch\nCOPY nothing /\n")? else { return Ok(()) };
    let done = dock.build(r#","postbuild_plugins":[{"name":"store-metadata","args":{"dest":"never.json"}}],"exit_plugins":[{"name":"store-metadata","args":{"dest":"exit.json"}}]"#)?;
    assert!(done.code.is_some_and(|code| code != 0) && !dock.room.at("never.json").exists(), "{}", done.log);
    let stored: Value = serde_json::from_str(&fs::read_to_string(dock.room.at("exit.json")).unwrap()).unwrap();
    assert_eq!(stored["outcome"], "failed");
    Ok(())
}

#[test]
fn dock_plugins_run_in_order_and_leave_results() -> Result<()> {
    let Some(dock) = Dock::new("dock_plugins_run_in_order_and_leave_results", COPY)? else { return Ok(()) };
    dock.room.shell("bad", "exit 1").shell("echo", "echo '{\"ovenbird\":1,\"result\":\"said\"}'");
    let done = dock.build(
        r#","prebuild_plugins":[{"name":"bad","can_fail":true},{"name":"labels","args":{"set":{"a":"b"}}}],"postbuild_plugins":[{"name":"echo"}]"#,
    )?;
    assert_eq!((done.code, done.outcomes().as_str()), (Some(0), "bad=warned labels=ok echo=ok"), "{}", done.log);
    assert_eq!((&done.plugin("labels")["result"]["a"], &done.plugin("echo")["result"]), (&Value::from("b"), &Value::from("said")));
    // Reserved values stand for what is known when a plugin runs.
    let done = dock.build(r#","prepublish_plugins":[{"name":"test-image","args":{"command":["BUILT_IMAGE_ID","BASE_IMAGE"]}}]"#)?;
    assert!(done.code == Some(9) && done.log.contains("BASE_IMAGE among its arguments stands for nothing"), "{}", done.log);
    Ok(())
}

#[test]
fn dock_plugin_that_fails_fails_the_build() -> Result<()> {
    let Some(dock) = Dock::new("dock_plugin_that_fails_fails_the_build", COPY)? else { return Ok(()) };
    dock.room.shell("bad", "exit 1");
    for phase in ["prebuild", "prepublish", "postbuild"] {
        let done = dock.build(&format!(
            r#","{phase}_plugins":[{{"name":"bad"}}],"exit_plugins":[{{"name":"store-metadata","args":{{"dest":"{phase}.json"}}}}]"#
        ))?;
        assert!(done.code == Some(9) && dock.room.at(&format!("{phase}.json")).exists(), "{phase}: {}", done.log);
    }
    Ok(())
}

#[test]
fn dock_plugins_that_are_not_known_are_refused() -> Result<()> {
    let Some(dock) = Dock::new("dock_plugins_that_are_not_known_are_refused", COPY)? else { return Ok(()) };
    for (more, words) in [
        (r#","prebuild_plugins":[{"name":"koji"}]"#, "there is no plugin \"koji\""),
        (r#","prebuild_plugins":[{"args":{}}]"#, "missing field `name`"),
        (r#","postbuild_plugins":[{"name":"labels","args":{"set":{}}}]"#, "it does not run in post_build"),
        (r#","plugin_files":["x.py"]"#, "the key \"plugin_files\""),
        (r#","osbs":1"#, "the key \"osbs\" of the build.json is not supported"),
        (r#","provider":"git""#, "the key \"provider\" of the build.json is not supported"),
        (r#","source":{"git_branch":"main"}"#, "the key \"source.git_branch\" of the build.json"),
        (r#","exit_plugins":[{"name":"notify","arguments":{}}]"#, "the key \"exit_plugins[0].arguments\" of the build.json"),
    ] {
        let done = dock.build(more)?;
        assert!(done.code == Some(2) && done.log.contains(words) && !done.log.contains("COPY"), "{more}: {}", done.log);
    }
    Ok(())
}

#[test]
fn dock_mode_here() -> Result<()> {
    let Some(dock) = Dock::new("dock_mode_here", COPY)? else { return Ok(()) };
    fs::write(dock.room.at("build.json"), dock.json("")).unwrap();
    let here = dock.run(&["--on", "here", "--reproducible", "--build-json", "build.json"], None)?;
    let process = dock.run(&["--on", "process", "--reproducible", "--build-json", "build.json"], None)?;
    assert_eq!((here.code, process.code), (Some(0), Some(0)), "{} {}", here.log, process.log);
    assert_eq!(here.report["digest"], process.report["digest"]);
    Ok(())
}

#[test]
fn dock_cli_reads_a_file() -> Result<()> {
    let Some(dock) = Dock::new("dock_cli_reads_a_file", COPY)? else { return Ok(()) };
    assert_eq!(dock.build("")?.report["image_name"], "docker.io/team/app:1");
    let done = dock.run(&["--build-json", "none.json"], None)?;
    assert!(done.code == Some(2) && done.log.contains("cannot read the build.json none.json"), "{}", done.log);
    let done = dock.run(&["--build-json", "build.json", "elsewhere"], None)?;
    assert!(done.code == Some(2) && done.log.contains("would be ignored"), "{}", done.log);
    Ok(())
}

#[test]
fn dock_cli_reads_a_variable_and_substitutes() -> Result<()> {
    let Some(dock) = Dock::new("dock_cli_reads_a_variable_and_substitutes", COPY)? else { return Ok(()) };
    let done = dock.run(&["--input", "env", "--substitute", "image=team/other:2"], Some(&dock.json("")))?;
    assert_eq!((done.code, &done.report["image_name"]), (Some(0), &Value::from("docker.io/team/other:2")), "{}", done.log);
    let done = dock.run(&["--input", "env"], None)?;
    assert!(done.code == Some(2) && done.log.contains("BUILD_JSON: it is not set"), "{}", done.log);
    Ok(())
}

#[test]
fn dock_cli_reads_the_shared_folder() -> Result<()> {
    let Some(dock) = Dock::new("dock_cli_reads_the_shared_folder", COPY)? else { return Ok(()) };
    fs::write(dock.room.at("shared.json"), dock.json("")).unwrap();
    let done = dock.run(&["--input", "path,path=shared.json"], None)?;
    assert_eq!((done.code, &done.report["image_name"]), (Some(0), &Value::from("docker.io/team/app:1")), "{}", done.log);
    assert!(Path::new("/run/share/build.json").exists() || dock.run(&["--input", "path"], None)?.code == Some(2));
    Ok(())
}

/// Each of the 42 behaviours has a test, and each test of them a row.
#[test]
fn the_table_of_docks_behaviours() {
    let table = include_str!("../../../docs/reference/dock.md");
    let rows: Vec<Vec<&str>> =
        table.lines().filter(|line| line.starts_with("| ") && line.contains('`')).map(|line| line.split('`').collect()).collect();
    assert_eq!(rows.len(), 42);
    let sources = [
        ("docker_builder", include_str!("../../ovenbird/tests/docker_builder.rs")),
        ("workflow", include_str!("workflow.rs")),
        ("places", include_str!("places.rs")),
    ];
    let mut named = vec![];
    for row in rows {
        let [_, behaviour, _, test, ..] = row[..] else { panic!("{row:?}") };
        let (file, name) = test.split_once("::").unwrap();
        let source = sources.iter().find(|(known, _)| *known == file).unwrap().1;
        assert!(source.contains(&format!("fn {name}(")), "{behaviour}: there is no test {test}");
        named.push(test);
    }
    let own = sources[1].1.lines().filter_map(|line| line.strip_prefix("fn dock_")?.split('(').next());
    for test in own {
        assert!(named.contains(&format!("workflow::dock_{test}").as_str()), "workflow::dock_{test} is not in the table");
    }
}
