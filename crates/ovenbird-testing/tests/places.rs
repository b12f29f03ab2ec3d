//! Where builds run: the same image, the same exit codes and the same errors in each place, and nothing left behind.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ovenbird_testing::Result;
use ovenbird_testing::archive;
use ovenbird_testing::base::Base;
use ovenbird_testing::command::{Level, Workspace, finish, set_mode};
use ovenbird_testing::dockerd::Dockerd;
use ovenbird_testing::git::SshServer;
use ovenbird_testing::needs::{self, Need};
use ovenbird_testing::process::output;
use ovenbird_testing::registry::{Options, Registry, mirror_toml};

const LIMIT: Duration = Duration::from_mins(2);

/// Bytes that must be nowhere but in the step that asks for them.
const SECRET: &str = "correct-horse-battery-staple-7193";

/// Of a registry.
const PASSWORD: &str = "staple-battery-horse-correct-3917";

/// Looks at everything that could change on the way: kinds, modes, times, links, attributes.
const DOCKERFILE: &str = "FROM busybox\n\
     COPY . /all/\n\
     RUN --mount=type=bind,target=/ctx find /ctx | sort | xargs stat -c '%n %A %u:%g %h %s %Y' > /listing\n\
     RUN --mount=type=secret,id=token sha256sum < /run/secrets/token | cut -c1-12 > /token\n";

/// A user's folder with a context and an ssh client that knows the test's servers.
struct Room {
    workspace: Workspace,
    settings: PathBuf,
    /// Instead of the program itself.
    program: Option<PathBuf>,
    docker: Option<String>,
}

impl Room {
    fn new(settings: &str) -> Result<Self> {
        let workspace = Workspace::new(Level::Own)?;
        let file = workspace.path().join("settings.toml");
        write(&file, settings);
        let context = workspace.path().join("ctx");
        fs::create_dir_all(context.join("deep/empty")).unwrap();
        write(&context.join("Dockerfile"), DOCKERFILE);
        write(&context.join(".dockerignore"), "ignored\n!deep/ignored\n");
        write(&context.join("ignored"), &"x".repeat(1 << 20));
        write(&context.join("run"), "#!/bin/sh\n");
        fs::hard_link(context.join("run"), context.join("deep/same")).unwrap();
        symlink("../run", context.join("deep/link")).unwrap();
        fs::set_permissions(context.join("run"), fs::Permissions::from_mode(0o4751)).unwrap();
        fs::set_permissions(context.join("deep"), fs::Permissions::from_mode(0o1770)).unwrap();
        let _ = rustix::fs::setxattr(context.join("run"), "user.note", b"n", rustix::fs::XattrFlags::empty());
        for name in ["run", "Dockerfile"] {
            let old = std::time::UNIX_EPOCH + Duration::new(1_000_000_000, 700_000_000);
            fs::File::open(context.join(name)).unwrap().set_modified(old).unwrap();
        }
        for (name, dockerfile) in [
            ("fails", "FROM busybox\nRUN echo last words && exit 7\n"),
            ("wrong", "FROM busybox\nRUNS true\n"),
            ("missing", "FROM busybox\nCOPY nothing /\n"),
            ("sleeps", "FROM busybox\nRUN echo begun && sleep 86399\n"),
        ] {
            fs::create_dir(workspace.path().join(name)).unwrap();
            write(&workspace.path().join(name).join("Dockerfile"), dockerfile);
        }
        Ok(Self { workspace, settings: file, program: None, docker: None })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.workspace.path().join(name)
    }

    /// `ovenbird build` on a place; `state` is the folder of the caller's state.
    fn build(&self, on: &str, context: &str, arguments: &[&str]) -> Command {
        let mut command = self.command();
        command.args(["build", "--on", on, "--progress", "plain"]).args(arguments).arg(self.path(context));
        command
    }

    /// `ovenbird` of this room.
    fn command(&self) -> Command {
        let mut command = self.program.as_ref().map_or_else(|| self.workspace.ovenbird(), |program| self.workspace.command(program));
        command.envs(self.docker.iter().map(|host| ("DOCKER_HOST", host)));
        let path = std::env::join_paths([self.path("bin")].into_iter().chain(std::env::split_paths("/usr/sbin:/usr/bin:/sbin:/bin")));
        command.env("PATH", path.unwrap()).env("TOKEN", SECRET).env("TMPDIR", self.workspace.path());
        command.arg("--root").arg(self.path("state")).arg("--settings").arg(&self.settings);
        command
    }

    /// An ssh client on the path that finds these servers, each as a host of its name.
    fn know(&self, servers: &[(&str, &SshServer)]) -> Result<()> {
        fs::create_dir_all(self.path("bin")).unwrap();
        let known: String = servers.iter().map(|(_, server)| server.known_host()).collect::<Result<Vec<_>>>()?.join("\n");
        write(&self.path("known"), &known);
        let mut config = String::new();
        for (name, server) in servers {
            let (key, known) = (server.key(), self.path("known"));
            let _ = writeln!(
                config,
                "Host {name}\n HostName 127.0.0.1\n Port {}\n IdentityFile {}\n UserKnownHostsFile {}",
                server.port(),
                key.display(),
                known.display()
            );
        }
        config += "Host dead\n HostName 127.0.0.1\n Port 1\n";
        write(&self.path("ssh_config"), &config);
        let client = self.path("bin/ssh");
        write(&client, &format!("#!/bin/sh\nexec /usr/bin/ssh -F {} \"$@\"\n", self.path("ssh_config").display()));
        set_mode(&client, 0o755)
    }

    /// The URL of a host whose state is in `state` of this folder.
    fn host(&self, name: &str, state: &str, more: &str) -> Result<String> {
        let binary = ovenbird_testing::command::binary()?;
        Ok(format!("ssh://{name}?command={}&root={}{more}", binary.display(), self.path(state).display()))
    }
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

fn registry() -> Result<Registry> {
    Registry::start_with(Options { bases: &[Base::Busybox], ..Options::default() })
}

/// Processes whose command line has this text.
fn processes(text: &str) -> Vec<String> {
    let all = fs::read_dir("/proc").unwrap().flatten();
    let line = |entry: fs::DirEntry| {
        let bytes = fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&bytes).replace('\0', " ");
        line.contains(text).then(|| format!("{} {line}", entry.file_name().to_string_lossy()))
    };
    all.filter_map(line).collect()
}

fn wait_until(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < end, "{what} did not happen within {limit:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn start(command: &mut Command) -> Child {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

fn signal(child: &Child, signal: rustix::process::Signal) {
    rustix::process::kill_process(rustix::process::Pid::from_child(child), signal).unwrap();
}

/// What a user sees, without what differs from run to run.
fn told(log: &str, room: &Room) -> String {
    let from = log.find("error").unwrap_or(log.len());
    log[from..].replace(&room.path("").display().to_string(), "ROOM/")
}

/// The same digest, outputs, errors and exit codes as here; the secret nowhere.
fn check_same(room: &Room, places: &[&str]) -> Result<()> {
    let mut digests = vec![];
    for (number, on) in ["here"].iter().chain(places).enumerate() {
        let at = |name: &str| room.path(&format!("{name}-{number}")).display().to_string();
        let outputs = [
            format!("type=oci,dest={}", at("oci.tar")),
            format!("type=oci,tar=false,dest={}", at("layout")),
            format!("type=docker,dest={}", at("docker.tar")),
            format!("type=tar,dest={}", at("root.tar")),
            format!("type=local,dest={}", at("files")),
        ];
        let mut arguments = vec!["--reproducible", "--no-cache", "--secret", "id=token,env=TOKEN", "-t", "made:1"];
        arguments.extend(outputs.iter().flat_map(|output| ["-o", output]));
        let (code, log) = finish(&mut room.build(on, "ctx", &arguments), None, LIMIT)?;
        assert_eq!(code, Some(0), "{on}: {log}");
        assert!(!log.contains(SECRET), "{on}: {log}");
        digests.push(log.lines().rev().find(|line| line.starts_with("sha256:")).unwrap_or_default().to_owned());
        for file in ["oci.tar", "docker.tar", "root.tar"] {
            let same = fs::read(at(file)).unwrap() == fs::read(room.path(&format!("{file}-0"))).unwrap();
            assert!(same, "{file} of {on}");
        }
        let image = archive::images(Path::new(&at("oci.tar")))?.remove(0);
        let layers = archive::flatten(&image.layers)?;
        assert!(
            layers.keys().any(|path| path.ends_with("all/deep/link")) && !layers.keys().any(|path| path.ends_with("all/ignored")),
            "{on}"
        );
        assert!(Path::new(&at("files")).join("all/deep/empty").is_dir(), "{on}");
        let mode = fs::metadata(Path::new(&at("files")).join("all/run")).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o4751, "{on}");
        assert!(Path::new(&at("layout")).join("index.json").is_file(), "{on}");
        // Standard output is the archive and nothing else.
        let piped =
            room.build(on, "ctx", &["--reproducible", "--secret", "id=token,env=TOKEN", "-o", "type=oci"]).stderr(Stdio::null()).output();
        assert!(piped.unwrap().stdout.len() > 100_000, "{on}");
    }
    assert!(digests[0].len() == 71 && digests.iter().all(|digest| *digest == digests[0]), "{places:?}: {digests:?}");
    for (context, code) in [("fails", 6), ("wrong", 4), ("missing", 5), ("nowhere", 5)] {
        let here = finish(&mut room.build("here", context, &["--no-cache"]), None, LIMIT)?;
        assert_eq!(here.0, Some(code), "{context}: {}", here.1);
        for on in places {
            let there = finish(&mut room.build(on, context, &["--no-cache"]), None, LIMIT)?;
            assert_eq!((there.0, told(&there.1, room)), (here.0, told(&here.1, room)), "{on} {context}");
        }
    }
    for on in places {
        let (code, log) = finish(&mut room.build(on, "ctx", &["--secret", "id=token,env=NOT_SET"]), None, LIMIT)?;
        assert!(code == Some(5) && log.contains("the environment variable NOT_SET is not set"), "{on}: {log}");
        let caches = format!("type=local,dest={}", room.path("cache").display());
        if *on == "process" {
            let (code, log) = finish(&mut room.build(on, "ctx", &["--secret", "id=token,env=TOKEN", "--cache-to", &caches]), None, LIMIT)?;
            assert!(code == Some(0) && room.path("cache/index.json").is_file(), "{log}");
            continue;
        }
        for refused in [&["--cache-to", "type=local,dest=d"][..], &["--cache-from", "type=local,src=d"]] {
            let (code, log) = finish(&mut room.build(on, "ctx", refused), None, LIMIT)?;
            assert!(code == Some(2) && log.contains("is not supported: the build runs"), "{on} {refused:?}: {log}");
        }
    }
    Ok(())
}

/// After Ctrl-C, SIGTERM and SIGKILL of the caller: no step, no worker, no temporary folder, soon.
fn check_nothing_stays(room: &Room, places: &[&str]) {
    use rustix::process::Signal;
    let leftovers = || -> Vec<String> {
        let dir = room.path("");
        fs::read_dir(dir)
            .unwrap()
            .flatten()
            .map(|e| e.file_name().to_string_lossy().into_owned())
            .filter(|n| n.starts_with(".ovenbird"))
            .collect()
    };
    for on in places {
        for (how, code) in [(Signal::INT, Some(130)), (Signal::TERM, Some(130)), (Signal::KILL, None)] {
            let mut caller = start(&mut room.build(on, "sleeps", &["--no-cache"]));
            wait_until("the step", Duration::from_secs(30), || !processes("sleep 86399").is_empty());
            signal(&caller, how);
            let status = caller.wait().unwrap();
            assert_eq!(status.code(), code, "{on} {how:?}");
            wait_until("the end of the step", Duration::from_secs(10), || processes("sleep 86399").is_empty());
            wait_until("the end of the worker", Duration::from_secs(10), || {
                processes(&room.path("").display().to_string()).iter().all(|line| !line.contains(" worker"))
            });
            if how != Signal::KILL {
                assert!(leftovers().is_empty(), "{on} {how:?}: {:?}", leftovers());
            }
        }
        // What the killed one left goes with the next.
        let (code, log) = finish(&mut room.build(on, "ctx", &["--secret", "id=token,env=TOKEN"]), None, LIMIT).unwrap();
        assert_eq!((code, leftovers().len()), (Some(0), 0), "{on}: {log} {:?}", leftovers());
    }
}

/// A program of the user's: notes what it was asked, and answers.
const PLUGIN: &str = r#"#!/usr/bin/env python3
import json, os, sys
question = json.load(sys.stdin)
if question["call"] == "describe":
    args = {"type": "object", "properties": {"source": {"type": "string"}, "built": {"type": "string"}, "say": {"type": "string"}}}
    print(json.dumps({"ovenbird": 1, "plugins": [{"name": "own", "phases": ["pre_build", "pre_publish", "post_build", "exit"], "args": args}]}))
    sys.exit()
build, phase = question["build"], question["phase"]
with open("asked-" + phase + ".json", "w") as out:
    json.dump(question, out)
print("token", question["secrets"].get("token", {}).get("text"), file=sys.stderr)
answer = {"ovenbird": 1, "result": {"phase": phase, "folder": os.path.isdir(question["args"].get("source", "/nowhere"))}}
if phase == "pre_build":
    # More than one message holds.
    answer["changes"] = {"labels": {"own": "1"}, "add_files": [{"path": "large", "text": "large " * 400000}], "hide_files": ["run"]}
if question["args"].get("say"):
    answer["veto"] = question["args"]["say"]
print(json.dumps(answer))
"#;

/// Plugins do the same in each place: those that come along run there, those of the user here, with the user's files and secrets.
fn check_plugins(room: &Room, places: &[&str]) -> Result<()> {
    let program = room.path("plugins/ovenbird-plugin-own");
    fs::create_dir_all(room.path("plugins")).unwrap();
    write(&program, PLUGIN);
    set_mode(&program, 0o755)?;
    let settings =
        format!("plugin_folders = [{:?}]\n{}", room.path("plugins").display().to_string(), fs::read_to_string(&room.settings).unwrap());
    write(&room.settings, &settings);
    write(&room.path("injected"), "injected file\n");
    fs::create_dir_all(room.path("flow")).unwrap();
    write(&room.path("flow/Dockerfile"), "FROM busybox\nRUN cp /opt/given /seen\nCOPY . /app\n");
    write(&room.path("flow/run"), "hidden");
    let flow = r#"
[[pre_build]]
name = "own"
secrets = ["token"]
args = { source = "BUILD_SOURCE_PATH" }
[[pre_build]]
name = "inject-files"
args = { files = [{ target = "/opt/given", source = "injected" }] }
[[pre_build]]
name = "gone"
required = false
[[pre_publish]]
name = "test-image"
args = { command = ["test -f /app/large && test ! -e /app/run && cat /seen"], expect = "injected file" }
[[pre_publish]]
name = "own"
args = { built = "BUILT_IMAGE_ID" }
[[pre_publish]]
name = "package-list"
args = { dest = "packages.json" }
[[post_build]]
name = "export-files"
args = { paths = ["seen", "app/large"], dest = "exported" }
[[exit]]
name = "own"
[[exit]]
name = "store-metadata"
args = { dest = "stored.json" }
"#;
    write(&room.path("flow.toml"), flow);
    let json = |name: &str| -> serde_json::Value {
        serde_json::from_str(&fs::read_to_string(room.path(name)).unwrap_or_default()).unwrap_or_default()
    };
    let build = |on: &str, more: &[&str]| -> Result<(Option<i32>, String)> {
        for file in ["stored.json", "report.json", "packages.json", "asked-exit.json", "asked-pre_build.json"] {
            let _ = fs::remove_file(room.path(file));
        }
        let _ = fs::remove_dir_all(room.path("exported"));
        let shared: &[&str] = &[
            "--reproducible",
            "--secret",
            "id=token,env=TOKEN",
            "--workflow",
            "flow.toml",
            "--metadata-file",
            "report.json",
            "-t",
            "flow:1",
        ];
        let mut command = room.build(on, "flow", &[shared, more].concat());
        finish(command.current_dir(room.path(".")), None, LIMIT)
    };
    let mut digests = vec![];
    for on in [&["here"], places].concat() {
        let (code, log) = build(on, &[])?;
        assert_eq!(code, Some(0), "{on}: {log}");
        let report = json("report.json");
        let outcome = |one: &serde_json::Value| format!("{}:{}={}", one["phase"], one["name"], one["outcome"]).replace('"', "");
        let outcomes: Vec<String> = report["ovenbird"]["plugins"].as_array().unwrap().iter().map(outcome).collect();
        assert_eq!(
            outcomes.join(" "),
            "pre_build:own=ok pre_build:inject-files=ok pre_build:gone=skipped pre_publish:test-image=ok pre_publish:own=ok \
             pre_publish:package-list=ok post_build:export-files=ok exit:own=ok exit:store-metadata=ok",
            "{on}: {log}"
        );
        assert_eq!(report["ovenbird"]["plugins"][0]["result"]["folder"], true, "{on}: the folder is one of this machine");
        assert_eq!(report["ovenbird"]["images"][0]["inspect"]["Config"]["Labels"]["own"], "1");
        assert_eq!(fs::read_to_string(room.path("exported/seen")).unwrap(), "injected file\n", "{on}");
        assert_eq!(fs::metadata(room.path("exported/app/large")).unwrap().len(), 2_400_000, "{on}");
        assert_eq!((&json("stored.json")["outcome"], json("packages.json").is_array()), (&"ok".into(), true), "{on}");
        // The secret went to the program that was granted it, and is nowhere else.
        assert!(json("asked-pre_build.json")["secrets"]["token"]["text"] == SECRET && log.contains("token ***"), "{on}: {log}");
        assert_eq!(json("asked-pre_publish.json")["secrets"], serde_json::json!({}), "{on}");
        assert_eq!(json("asked-pre_publish.json")["args"]["built"], report["containerimage.config.digest"], "{on}");
        assert!(!log.contains(SECRET) && !report.to_string().contains(SECRET), "{on}: {log}");
        digests.push(report["containerimage.digest"].clone());
        // A no is a no, and exit runs; also where there is no worker.
        let (code, log) = build(on, &["--plugin", "pre_publish:own,say=not like this"])?;
        assert!(code == Some(9) && log.contains("pre_publish plugin own: not like this"), "{on}: {log}");
        assert_eq!(
            (&json("stored.json")["outcome"], &json("asked-exit.json")["build"]["outcome"]["status"]),
            (&"failed".into(), &"failed".into())
        );
        assert_eq!(json("report.json")["ovenbird"]["plugins"].as_array().map(Vec::len), Some(7), "{on}: {log}");
        let (code, log) = build(on, &["--plugin", "pre_build:own,sey=x"])?;
        assert!(code == Some(2) && log.contains("unknown argument \"sey\"") && !log.contains("building"), "{on}: {log}");
        let (code, log) = build(on, &["-f", "flow/none"])?;
        assert!(code == Some(5) && json("stored.json")["outcome"] == "failed", "{on}: {log}");
    }
    assert!(digests.iter().all(|digest| *digest == digests[0]), "{digests:?}");
    Ok(())
}

#[test]
fn in_a_process() -> Result<()> {
    if !needs::available("places::in_a_process", &[Need::Run, Need::Registry]) {
        return Ok(());
    }
    let registry = registry()?;
    let room = Room::new(&mirror_toml(&registry.address()))?;
    check_same(&room, &["process"])?;
    check_nothing_stays(&room, &["process"]);
    check_plugins(&room, &["process"])?;
    Ok(())
}

#[test]
fn on_another_machine() -> Result<()> {
    if !needs::available("places::on_another_machine", &[Need::Run, Need::Registry, Need::Ssh]) {
        return Ok(());
    }
    let (registry, server) = (registry()?, SshServer::start()?);
    let room = Room::new(&mirror_toml(&registry.address()))?;
    room.know(&[("one", &server)])?;
    let on = room.host("one", "there", "")?;
    check_same(&room, &[&on])?;
    check_nothing_stays(&room, &[&on]);
    check_plugins(&room, &[&on])?;
    // What is asked of the isolation is asked of it there.
    let (code, log) = finish(&mut room.build(&on, "ctx", &["--isolation-level", "chroot", "--secret", "id=token,env=TOKEN"]), None, LIMIT)?;
    assert!(log.contains("isolation: chroot") || code == Some(8), "{log}");
    for (on, expect) in [
        ("ssh://dead".to_owned(), "ssh://dead: no worker began"),
        ("ssh://one?command=/nowhere/ovenbird".into(), "is ovenbird installed there?"),
        ("ssh://one?command=echo".into(), "which no worker says"),
    ] {
        let (code, log) = finish(&mut room.build(&on, "ctx", &[]), None, LIMIT)?;
        assert!(code == Some(10) && log.contains(expect), "{on}: {log}");
    }
    Ok(())
}

#[test]
fn a_pool_of_two_hosts_with_two_slots() -> Result<()> {
    if !needs::available("places::a_pool_of_two_hosts_with_two_slots", &[Need::Run, Need::Registry, Need::Ssh]) {
        return Ok(());
    }
    let (registry, one, two) = (registry()?, SshServer::start()?, SshServer::start()?);
    let room = Room::new(&mirror_toml(&registry.address()))?;
    room.know(&[("one", &one), ("two", &two)])?;
    let hosts = [room.host("one", "one", "")?, room.host("two", "two", "")?, "ssh://dead".into()];
    let quoted: Vec<String> = hosts.iter().map(|host| format!("{host:?}")).collect();
    write(&room.settings, &format!("{}\n[pool]\nslots = 2\nhosts = [{}]\n", mirror_toml(&registry.address()), quoted.join(", ")));
    fs::create_dir(room.path("naps")).unwrap();
    write(&room.path("naps/Dockerfile"), "FROM busybox\nRUN echo done\n");
    let held = |state: &str| {
        let slots = fs::read_dir(room.path(state).join("slots")).into_iter().flatten().flatten();
        let taken = |slot: &fs::DirEntry| {
            let file = fs::File::open(slot.path()).unwrap();
            rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockShared).is_err()
        };
        slots.filter(taken).count()
    };
    // One that is killed gives its slot back.
    let mut killed = start(&mut room.build("pool", "sleeps", &["--no-cache"]));
    wait_until("the step", Duration::from_secs(30), || !processes("sleep 86399").is_empty());
    assert_eq!(held("one") + held("two"), 1);
    killed.kill().unwrap();
    killed.wait().unwrap();
    wait_until("the slot's return", Duration::from_secs(10), || held("one") + held("two") == 0);

    let mut builds: Vec<Child> = (0..5).map(|_| start(&mut room.build("pool", "sleeps", &["--no-cache"]))).collect();
    wait_until("four builds", Duration::from_mins(1), || processes("sleep 86399").len() >= 4);
    // The fifth has asked every host by now.
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!((held("one"), held("two"), processes("sleep 86399").len()), (2, 2, 4));
    // At least one of two held a slot: the others have one each then.
    for mut killed in builds.drain(..2) {
        killed.kill().unwrap();
        killed.wait().unwrap();
    }
    wait_until("the fifth build", Duration::from_secs(30), || held("one") + held("two") == 3 && processes("sleep 86399").len() == 3);
    for build in &mut builds {
        signal(build, rustix::process::Signal::TERM);
        assert_eq!(build.wait().unwrap().code(), Some(130));
    }
    wait_until("the end of all", Duration::from_secs(10), || held("one") + held("two") == 0);
    let (code, log) = finish(&mut room.build("ssh://dead,pool", "naps", &[]), None, LIMIT)?;
    assert!(code == Some(2) && log.contains("is no host for builds"), "{log}");
    let many = format!("ssh://dead,{}", hosts[0]);
    for _ in 0..4 {
        let (code, log) = finish(&mut room.build(&many, "naps", &[]), None, LIMIT)?;
        assert!(code == Some(0) && log.contains("building on ssh://one"), "{log}");
    }
    Ok(())
}

/// A room whose program is small enough to be made an image of again and again, and a Docker Engine.
fn with_engine(registry: &Registry) -> Result<(Room, Dockerd)> {
    let dockerd = Dockerd::start()?;
    let mut room = Room::new(&mirror_toml(&registry.address()))?;
    let program = room.path("ovenbird");
    output(Command::new("strip").arg("-o").arg(&program).arg(ovenbird_testing::command::binary()?))?;
    (room.program, room.docker) = (Some(program), Some(dockerd.host()));
    Ok((room, dockerd))
}

fn containers(dockerd: &Dockerd) -> Vec<String> {
    dockerd.run(&["ps", "--all", "--no-trunc", "--format", "{{.ID}} {{.Status}}"]).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn in_a_container() -> Result<()> {
    if !needs::available("places::in_a_container", &[Need::Run, Need::Registry, Need::Docker, Need::Ssh]) {
        return Ok(());
    }
    let (registry, server) = (registry()?, SshServer::start()?);
    let (room, dockerd) = with_engine(&registry)?;
    room.know(&[("one", &server)])?;
    // One request, one digest, everywhere.
    check_same(&room, &["process", "container", &room.host("one", "there", "")?])?;
    check_nothing_stays(&room, &["container"]);
    check_plugins(&room, &["container"])?;
    assert_eq!(containers(&dockerd), [""; 0]);
    // One that no caller waits for any more goes with the next build; those of others stay.
    let image = dockerd.run(&["images", "--format", "{{.Repository}}:{{.Tag}}", "ovenbird-self"])?.trim().to_owned();
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let namespace: String =
        fs::read_link("/proc/self/ns/pid").unwrap().display().to_string().chars().filter(char::is_ascii_digit).collect();
    let made = |caller: &str| {
        let label = format!("io.ovenbird.worker={caller}");
        dockerd.run(&["create", "--label", &label, &image, "worker"]).unwrap().trim().to_owned()
    };
    let orphan = made(&format!("m/{}/{namespace}/4194304/1", boot.trim()));
    let foreign = made("another/boot/1/2/3");
    let (code, log) = finish(&mut room.build("container", "ctx", &["--secret", "id=token,env=TOKEN"]), None, LIMIT)?;
    assert_eq!(code, Some(0), "{log}");
    let left = containers(&dockerd);
    assert!(left.len() == 1 && left[0].starts_with(&foreign), "{left:?} without {orphan}");
    Ok(())
}

#[test]
fn in_a_container_with_the_engines_socket() -> Result<()> {
    if !needs::available("places::in_a_container_with_the_engines_socket", &[Need::Registry, Need::Docker]) {
        return Ok(());
    }
    let registry = registry()?;
    let (room, dockerd) = with_engine(&registry)?;
    for name in ["one", "two", "three"] {
        fs::create_dir(room.path(name)).unwrap();
        write(&room.path(name).join("Dockerfile"), &format!("FROM scratch\nLABEL name={name}\nCOPY Dockerfile /{name}\n"));
    }
    // The first makes the image of the program.
    let (code, log) = finish(&mut room.build("container,socket", "one", &["-t", "first:1", "--load"]), None, LIMIT)?;
    assert_eq!(code, Some(0), "{log}");
    let mut builds: Vec<Child> = ["one", "two", "three"]
        .iter()
        .map(|name| start(&mut room.build("container,socket", name, &["-t", &format!("{name}:1")])))
        .collect();
    assert!(builds.iter_mut().all(|build| build.wait().unwrap().success()));
    for name in ["one", "two", "three"] {
        let label = dockerd.run(&["image", "inspect", "--format", "{{.Config.Labels.name}}", &format!("{name}:1")])?;
        assert_eq!(label.trim(), name);
    }
    assert!(dockerd.run(&["image", "inspect", "first:1"]).is_ok());
    write(&room.path("one/Dockerfile"), "FROM scratch\nCOPY nothing /\n");
    let (code, _) = finish(&mut room.build("container,socket", "one", &[]), None, LIMIT)?;
    assert!(code.is_some_and(|code| code > 1), "{code:?}");
    let (code, log) = finish(&mut room.build("container,socket", "one", &["--builder", "engine"]), None, LIMIT)?;
    assert!(code == Some(2) && log.contains("does not go with"), "{log}");
    assert_eq!(containers(&dockerd), [""; 0]);
    Ok(())
}

#[test]
fn an_image_of_the_program_itself() -> Result<()> {
    if !needs::available("places::an_image_of_the_program_itself", &[Need::Run, Need::Registry, Need::Docker]) {
        return Ok(());
    }
    let registry = registry()?;
    let (room, dockerd) = with_engine(&registry)?;
    // Nothing is reached: not even the name server.
    let mut command = room.command();
    command
        .args(["create-build-image", "-t", "builder:mine", "--load"])
        .env("HTTPS_PROXY", "http://127.0.0.1:1")
        .env("HTTP_PROXY", "http://127.0.0.1:1");
    let (code, log) = finish(&mut command, None, LIMIT)?;
    assert_eq!(code, Some(0), "{log}");
    assert_eq!(dockerd.run(&["run", "--rm", "--network", "host", "builder:mine", "version"])?.split_whitespace().next(), Some("ovenbird"));
    let on = "container,image=builder:mine";
    for (context, code) in [("fails", 6), ("wrong", 4), ("missing", 5)] {
        let (ended, log) = finish(&mut room.build(on, context, &[]), None, LIMIT)?;
        assert_eq!(ended, Some(code), "{context}: {log}");
    }
    assert_eq!(containers(&dockerd), [""; 0]);
    assert!(!dockerd.run(&["images"])?.contains("ovenbird-self"), "the image that was given is the one that ran");
    // The environment of a build, kept and pushed; that of one that failed is not.
    let kept = format!("{on},buildroot={}", registry.address());
    let (code, log) = finish(&mut room.build(&kept, "ctx", &["-t", "made:1", "--secret", "id=token,env=TOKEN"]), None, LIMIT)?;
    assert_eq!(code, Some(0), "{log}");
    finish(&mut room.build(&kept, "fails", &["-t", "made:2"]), None, LIMIT)?;
    let names = dockerd.run(&["images", "--format", "{{.Repository}}:{{.Tag}}"])?;
    let pushed: Vec<&str> = names.lines().filter(|name| name.contains(&format!("{}/buildroot-made:", registry.address()))).collect();
    assert_eq!(pushed.len(), 1, "{names} {log}");
    dockerd.run(&["rmi", "--force", pushed[0]])?;
    dockerd.run(&["pull", "--quiet", pushed[0]])?;
    assert!(
        dockerd.run(&["run", "--rm", "--network", "host", "--entrypoint", "/usr/bin/ovenbird", pushed[0], "version"])?.contains("ovenbird")
    );
    let (code, log) = finish(&mut room.build("container,image=nowhere:1", "fails", &[]), None, LIMIT)?;
    assert!(code == Some(10) && log.contains("nowhere:1"), "{code:?} {log}");
    Ok(())
}

/// Registries want a password that only the caller has.
#[test]
fn credentials_stay_with_the_caller() -> Result<()> {
    if !needs::available("places::credentials_stay_with_the_caller", &[Need::Run, Need::Registry, Need::Ssh]) {
        return Ok(());
    }
    let registry = Registry::start_with(Options { bases: &[Base::Busybox], credentials: Some(("baker", PASSWORD)) })?;
    let server = SshServer::start()?;
    let room = Room::new("")?;
    room.know(&[("one", &server)])?;
    let address = registry.address();
    write(&room.path("sleeps/Dockerfile"), &format!("FROM {address}/library/busybox\nRUN sleep 1.5\n"));
    fs::create_dir_all(room.path("home/.docker")).unwrap();
    let mut login = room.command();
    login.args(["login", "-u", "baker", "--password-stdin", &address]);
    let (code, log) = finish(&mut login, Some(PASSWORD), LIMIT)?;
    assert_eq!(code, Some(0), "{log}");
    for on in ["process".to_owned(), room.host("one", "there", "")?] {
        let name = format!("{address}/made/{}:1", if on == "process" { "process" } else { "ssh" });
        let mut build = start(&mut room.build(&on, "sleeps", &["--no-cache", "--push", "-t", &name]));
        wait_until("the step", Duration::from_secs(30), || !processes("sleep 1.5").is_empty());
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            for file in ["cmdline", "environ"] {
                let bytes = fs::read(entry.path().join(file)).unwrap_or_default();
                assert!(!String::from_utf8_lossy(&bytes).contains(PASSWORD), "{on}: {:?}", entry.path().join(file));
            }
        }
        assert!(build.wait().unwrap().success(), "{on}");
        assert!(
            !output(Command::new("grep").args(["-rlF", PASSWORD]).arg(room.path("there")).arg(room.path("state")))
                .is_ok_and(|found| !found.is_empty())
        );
    }
    // What the request does not name is not asked for in vain: the registry refuses a stranger.
    fs::remove_dir_all(room.path("home/.docker")).unwrap();
    let (code, log) = finish(&mut room.build("process", "sleeps", &["--no-cache", "--pull"]), None, LIMIT)?;
    assert!(code == Some(7) && !log.contains(PASSWORD), "{code:?} {log}");
    Ok(())
}

/// A worker is a stranger: what it says is believed only as far as it was asked for.
#[test]
fn a_worker_that_lies() -> Result<()> {
    if !needs::available("places::a_worker_that_lies", &[Need::Ssh]) {
        return Ok(());
    }
    let server = SshServer::start()?;
    let room = Room::new("")?;
    room.know(&[("one", &server)])?;
    write(&room.path("fails/Dockerfile"), "FROM scratch\nCOPY Dockerfile /\n");
    let hello = r#"{"type":"hello","protocol":1,"version":"x","capabilities":[]}"#;
    for (number, (lines, code, expect)) in [
        (
            vec![r#"{"type":"hello","protocol":7,"version":"9.9","capabilities":[]}"#],
            10,
            "version 7 of the protocol of workers (ovenbird 9.9)",
        ),
        (vec![hello], 10, "was lost"),
        (vec![hello, "garbage"], 10, "is not the protocol of workers: garbage"),
        (vec![hello, r#"{"type":"data","output":0,"bytes":5}"#, "abc"], 10, "was lost"),
        (vec![hello, r#"{"type":"data","output":0,"bytes":0}"#], 10, "output 0, which was not asked for"),
        (vec![hello, r#"{"type":"end","output":99}"#], 10, "output 99, which was not asked for"),
        (vec![hello, r#"{"type":"data","output":0,"bytes":999999999}"#], 10, "bytes behind one line"),
        (vec![hello, hello], 10, "where that has no place"),
        (vec![hello, r#"{"type":"ask","id":1,"question":{"secret":{"id":"/etc/shadow"}}}"#], 10, "was lost"),
        (vec![hello, r#"{"type":"failed","failure":{"kind":"step","message":"no","causes":[],"hints":[],"detail":null}}"#], 6, "error: no"),
    ]
    .into_iter()
    .enumerate()
    {
        let script = room.path(&format!("lies-{number}"));
        let said: String = lines.iter().flat_map(|line| ["printf '%s\\n' '", line, "'\n"]).collect();
        // Long enough that what the caller says does not hit a closed pipe first.
        write(&script, &format!("#!/bin/sh\n{said}head -c 1000 > {0}.heard\n", script.display()));
        set_mode(&script, 0o755)?;
        let on = format!("ssh://one?command={}", script.display());
        let (ended, log) = finish(&mut room.build(&on, "fails", &["--secret", "id=token,env=TOKEN"]), None, LIMIT)?;
        assert!(ended == Some(code) && log.contains(expect), "{lines:?}: {ended:?} {log}");
        assert!(!fs::read_to_string(format!("{}.heard", script.display())).unwrap_or_default().contains("shadow:"), "{lines:?}");
    }
    Ok(())
}
