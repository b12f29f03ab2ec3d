//! A Docker Engine that builds, and the operations of dock's tasker, over a real engine and a real registry.

mod engine_room;

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use engine_room::{Room, room};
use ovenbird::docker_engine::{ContainerSpec, DockerEngine, GitSource, Stream, Tasker};
use ovenbird::request::Source;
use ovenbird::settings::Overrides;
use ovenbird::{
    BuildReport, BuildRequest, Detail, DockerEngineBuilder, Driver as _, EngineBuilder, Environment, Error, Job, Kind, LocalDriver,
    Settings,
};
use ovenbird_engine::event::Silent;
use ovenbird_engine::{Cancel, Event, EventSink};
use ovenbird_oci::Reference;
use ovenbird_testing::base::Base;
use ovenbird_testing::git::Repository;
use ovenbird_testing::process;
use ovenbird_testing::registry::{Options, Registry};

/// Keeps every event, and when it came, in seconds since the machine started.
#[derive(Default)]
struct Heard(Mutex<Vec<(f64, Event)>>);

impl EventSink for Heard {
    fn emit(&self, event: Event) {
        self.0.lock().unwrap().push((uptime(), event));
    }
}

impl Heard {
    fn text(&self) -> String {
        format!("{:?}", self.0.lock().unwrap())
    }
}

/// What a step reads, too: the clock of containers is the machine's.
fn uptime() -> f64 {
    let text = std::fs::read_to_string("/proc/uptime").unwrap();
    text.split(' ').next().unwrap().parse().unwrap()
}

/// A machine whose Docker Engine this is.
struct Machine {
    dir: tempfile::TempDir,
    settings: Settings,
    environment: Environment,
}

impl Machine {
    fn new(host: &str, variables: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut all: BTreeMap<String, String> = variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        all.insert("HOME".into(), dir.path().display().to_string());
        all.insert("DOCKER_HOST".into(), host.to_owned());
        let environment = Environment::fixed(all, dir.path(), None);
        let flags = Overrides { root: Some(dir.path().join("state")), ..Overrides::default() };
        let settings = Settings::load(&environment, &flags).unwrap();
        std::fs::create_dir_all(&settings.root).unwrap();
        std::fs::create_dir_all(dir.path().join("ctx")).unwrap();
        Self { settings: Settings { temp: dir.path().into(), ..settings }, dir, environment }
    }

    fn builder(&self) -> DockerEngineBuilder {
        let images = EngineBuilder::open(&self.settings, &self.environment, None, false).unwrap();
        DockerEngineBuilder::new(DockerEngine::new(&self.settings.docker).unwrap(), images, &self.settings)
    }

    fn context(&self, files: &[(&str, &str)]) -> BuildRequest {
        for (name, text) in files {
            let path = self.dir.path().join("ctx").join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        BuildRequest::new(Source::Path(self.dir.path().join("ctx")))
    }

    fn run(&self, request: &BuildRequest, sink: &Arc<Heard>) -> Result<BuildReport, Error> {
        let job = Job { sink: sink.clone(), cancel: Cancel::default() };
        LocalDriver::new(self.builder(), self.dir.path(), io::empty()).run(request, &job)
    }
}

#[test]
fn a_docker_engine_builds() {
    let Some(Room { engine, dockerd, .. }) = &room("docker_builder::a_docker_engine_builds") else { return };
    let registry = Registry::start().unwrap();
    // The engine itself knows nothing of this registry, and an own name for it that it could not reach.
    let machine = Machine::new(&dockerd.host(), &[]);
    let sink = Arc::new(Heard::default());
    let dockerfile = "FROM busybox AS base\nARG A\nENV B=$A\nCOPY . /c/\nRUN cat /proc/uptime >&2; sleep 1; cat /proc/uptime; echo $A > /a\nFROM base\nRUN false\n";
    let mut request = machine.context(&[("Dockerfile", dockerfile), (".dockerignore", "skip"), ("skip", ""), ("d/f", "text")]);
    request.target = Some("base".into());
    request.build_args.insert("A".into(), "x y".into());
    request.labels.insert("l".into(), "1".into());
    let name = format!("{}/team/app:1", registry.address());
    request.names = vec![name.clone(), "also:2".into()];
    request.outputs = vec!["type=image".parse().unwrap(), format!("type=registry,name={name}").parse().unwrap()];
    let report = machine.run(&request, &sink).unwrap();

    // Its image is in the engine and in the registry, the same one.
    assert_eq!(engine.image_id("also:2").unwrap(), report.image_id());
    let said = process::output(Command::new("skopeo").args(["inspect", "--tls-verify=false", &format!("docker://{name}")])).unwrap();
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!((said["Digest"].as_str().unwrap(), said["Labels"]["l"].as_str().unwrap()), (&*report.digest.to_string(), "1"));
    let id = engine
        .create_container(&ContainerSpec {
            image: "also:2".into(),
            command: vec!["sh".into(), "-c".into(), "cat /a; echo $B; ls -a /c".into()],
            ..ContainerSpec::default()
        })
        .unwrap();
    engine.start_container(&id).unwrap();
    assert_eq!(engine.wait_container(&id, &Cancel::default()), Ok(0));
    let text: Vec<u8> = engine.container_logs(&id, true).unwrap().flat_map(|piece| piece.unwrap().1.to_vec()).collect();
    assert_eq!(String::from_utf8(text).unwrap(), "x y\nx y\n.\n..\n.dockerignore\nDockerfile\nd\n");

    // What steps say comes within a fifth of a second, from both streams.
    let heard = sink.0.lock().unwrap();
    let said: Vec<(f64, f64)> = heard
        .iter()
        .filter_map(|(at, event)| match event {
            Event::Log { text, .. } => Some((*at, text.split(' ').next()?.parse().ok()?)),
            _ => None,
        })
        .collect();
    assert_eq!(said.len(), 2, "{heard:?}");
    for (came, was) in said {
        assert!(came - was < 0.2, "a line came {} s late", came - was);
    }
    assert!(heard.iter().any(|(_, event)| matches!(event, Event::Log { stream: ovenbird_engine::event::LogStream::Stderr, .. })));
    drop(heard);
    assert!(report.ran > 0);

    // Nothing of the way out of the engine is left.
    let left = std::fs::read_dir(&machine.settings.root).unwrap().flatten().filter(|e| e.file_name().to_string_lossy().starts_with('.'));
    assert_eq!(left.count(), 0);

    // Again: everything from the engine's cache, the same image.
    let sink = Arc::new(Heard::default());
    let again = machine.run(&request, &sink).unwrap();
    assert_eq!((again.digest, again.image_id()), (report.digest, report.image_id()));
    assert!(again.cached > 0 && sink.text().contains("Cached"), "{}", sink.text());

    // A step that fails: its code, its line, what it said.
    request.target = None;
    request.outputs.clear();
    let error = machine.run(&request, &sink).unwrap_err();
    let Some(Detail::Step { code, lines, .. }) = error.detail.as_deref() else { panic!("{error:?}") };
    assert_eq!((error.kind, *code, *lines), (Kind::Step, 1, Some((7, 7))));

    // Limits reach the steps, and a Dockerfile that no step sees.
    let limits = "FROM busybox\nCOPY . /c\nRUN ls -a /c > /l; ulimit -n >> /l; df -k /dev/shm | tail -1 | awk '{print $2}' >> /l; grep -c 'db$' /etc/hosts >> /l; cat /l\n";
    let mut request = machine.context(&[]);
    std::fs::remove_file(machine.dir.path().join("ctx/.dockerignore")).unwrap();
    std::fs::write(machine.dir.path().join("outside"), limits).unwrap();
    request.dockerfile = ovenbird::request::DockerfileFrom::Path(machine.dir.path().join("outside"));
    request.limits.ulimits = vec!["nofile=123:456".parse().unwrap()];
    request.limits.shm_size = Some("2m".parse().unwrap());
    request.add_hosts = vec!["db:10.0.0.5".parse().unwrap(), "odb:10.0.0.6".parse().unwrap()];
    let sink = Arc::new(Heard::default());
    machine.run(&request, &sink).unwrap();
    let log: String = sink
        .0
        .lock()
        .unwrap()
        .iter()
        .filter_map(|(_, e)| if let Event::Log { text, .. } = e { Some(text.clone()) } else { None })
        .collect();
    assert_eq!(log, ".\n..\nDockerfile\nd\nskip\n123\n2048\n2\n");

    // A cancelled build ends at once, and its container with it.
    let slow = machine.context(&[("Dockerfile", "FROM busybox\nRUN sleep 61\n")]);
    let (job, start) = (Job { sink: Arc::new(Silent), cancel: Cancel::default() }, Instant::now());
    let stop = job.cancel.clone();
    let driver = LocalDriver::new(machine.builder(), machine.dir.path(), io::empty());
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(1500));
            stop.cancel();
        });
        assert_eq!(driver.run(&slow, &job).unwrap_err().kind, Kind::Cancelled);
    });
    assert!(start.elapsed() < Duration::from_secs(8), "{:?}", start.elapsed());
    let until = Instant::now() + Duration::from_secs(10);
    while !dockerd.run(&["ps", "-q"]).unwrap().is_empty() {
        assert!(Instant::now() < until, "the step still runs");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn buildkit_of_a_docker_engine_builds() {
    let Some(Room { engine, dockerd, .. }) = &room("docker_builder::buildkit_of_a_docker_engine_builds") else { return };
    let machine = Machine::new(&dockerd.host(), &[("DOCKER_BUILDKIT", "1")]);
    let dockerfile = "FROM busybox\nCOPY --chmod=600 f /f\nRUN --mount=type=cache,target=/k cat /proc/uptime; echo $A > /k/a; sleep 1; cat /proc/uptime >&2\n";
    let mut request = machine.context(&[("Dockerfile", dockerfile), ("f", "1")]);
    // The engine of the tests has no bridge.
    request.network = ovenbird::request::Network::None;
    request.names = vec!["kit:1".into()];
    let sink = Arc::new(Heard::default());
    let report = machine.run(&request, &sink).unwrap();
    assert_eq!(engine.image_id("kit:1").unwrap(), report.image_id());
    let late: Vec<f64> = sink
        .0
        .lock()
        .unwrap()
        .iter()
        .filter_map(|(at, event)| match event {
            Event::Log { text, .. } => Some(*at - text.split(' ').next()?.parse::<f64>().ok()?),
            _ => None,
        })
        .collect();
    assert!(late.len() == 2 && late.iter().all(|late| *late < 0.2), "{late:?}");

    std::fs::write(machine.dir.path().join("ctx/Dockerfile"), "FROM busybox\nRUN echo told; exit 5\n").unwrap();
    let error = machine.run(&request, &sink).unwrap_err();
    let Some(Detail::Step { code, tail, .. }) = error.detail.as_deref() else { panic!("{error:?}") };
    assert_eq!((*code, tail.as_slice()), (5, &["told".to_owned()][..]));

    // A file that no step may see cannot be sent to BuildKit.
    std::fs::write(machine.dir.path().join("ctx/.dockerignore"), "Dockerfile").unwrap();
    let error = machine.run(&request, &sink).unwrap_err();
    assert!(error.kind == Kind::Usage && error.message.starts_with("a Dockerfile that is not a file of the build context"), "{error}");
}

#[test]
fn base_images_of_a_registry_with_a_password() {
    let Some(Room { engine, dockerd, .. }) = &room("docker_builder::base_images_of_a_registry_with_a_password") else { return };
    // Characters that are written in another way in each form that a login takes on its way.
    let (user, password) = ("someone", "p\u{fe}~>?\u{ff}word>>>???");
    let registry = Registry::start_with(Options { bases: &[Base::Busybox], credentials: Some((user, password)) }).unwrap();
    let base = format!("{}/library/busybox:latest", registry.address());
    for buildkit in ["0", "1"] {
        let _ = engine.remove_image(&base, true);
        let login = |password: &str| {
            format!("{{\"auths\": {{\"{}\": {{\"username\": \"{user}\", \"password\": \"{password}\"}}}}}}", registry.address())
        };
        let dockerfile = format!("ARG FROM={base}\nFROM $FROM\nLABEL a=b{buildkit}\n");
        for (password, ok) in [("wrong", false), (password, true)] {
            let login = login(password);
            let machine = Machine::new(&dockerd.host(), &[("DOCKER_BUILDKIT", buildkit), ("DOCKER_AUTH_CONFIG", &login)]);
            let request = machine.context(&[("Dockerfile", &dockerfile)]);
            let sink = Arc::new(Heard::default());
            match machine.run(&request, &sink) {
                Ok(_) => assert!(ok, "DOCKER_BUILDKIT={buildkit}: built with a wrong password"),
                Err(error) => assert!(!ok && !error.to_string().contains(password), "DOCKER_BUILDKIT={buildkit}: {error}"),
            }
            assert!(!sink.text().contains(password));
        }
    }
}

/// The classic builder finds a step of another architecture in its cache; such an image gets no name.
#[test]
fn an_image_is_for_the_platform_that_was_asked_for() {
    let Some(Room { engine, dockerd, .. }) = &room("docker_builder::platform") else { return };
    let machine = Machine::new(&dockerd.host(), &[("DOCKER_BUILDKIT", "0")]);
    let mut request = machine.context(&[("Dockerfile", "FROM scratch AS one\nCOPY f /\nFROM one\nLABEL a=b\n"), ("f", "1")]);
    for platform in ["linux/amd64", "linux/arm64", "linux/amd64"] {
        request.platforms = vec![platform.parse().unwrap()];
        request.names = vec!["for:1".into()];
        let report = machine.run(&request, &Arc::default()).unwrap();
        let said = engine.inspect_image("for:1").unwrap();
        assert_eq!(format!("linux/{}", said["Architecture"].as_str().unwrap()), platform);
        assert_eq!(report.platforms[0].platform.to_string(), platform);
    }
}

/// What an engine shows of its steps has no password of an address; what ran where, and on what, is in the report.
#[test]
fn what_a_report_says_of_an_engine() {
    let Some(Room { dockerd, .. }) = &room("docker_builder::what_a_report_says_of_an_engine") else { return };
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut stream in server.incoming().flatten() {
            let _ = std::io::Read::read(&mut stream, &mut [0; 4096]);
            let _ = std::io::Write::write_all(&mut stream, b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: close\r\n\r\nx");
        }
    });
    let machine = Machine::new(&dockerd.host(), &[("DOCKER_BUILDKIT", "0")]);
    let dockerfile = format!("FROM busybox\nRUN true\nADD http://me:t0ken-99@{address}/f /f\nRUN exit $(grep -c x /f)\n");
    let request = machine.context(&[("Dockerfile", &dockerfile)]);
    let sink = Arc::new(Heard::default());
    let error = machine.run(&request, &sink).unwrap_err();
    assert_eq!(error.kind, Kind::Step, "{error}");
    let record = *error.record.unwrap();
    assert!(record.container_ids.len() >= 2 && record.container_ids.iter().all(|id| id.len() >= 12), "{:?}", record.container_ids);
    let told = format!("{} {}", sink.text(), serde_json::to_string(&record).unwrap());
    assert!(told.contains("ADD http://***@") && !told.contains("t0ken-99"), "{told}");

    let request = machine.context(&[("Dockerfile", "FROM busybox\nRUN true\n")]);
    let report = machine.run(&BuildRequest { no_cache: true, ..request }, &sink).unwrap();
    let base = &report.record.base_images[0].image;
    assert_eq!((report.record.container_ids.len(), &base.inspect["Manifest"]["Id"]), (1, &base.inspect["Id"]));
}

/// Every flag of `ovenbird build` that is no field of a request: with a Docker Engine honoured, or refused by its name.
#[test]
fn every_flag_is_honoured_or_refused() {
    let test = "docker_builder::every_flag";
    let Some(Room { dockerd, .. }) = &room(test) else { return };
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("ctx")).unwrap();
    std::fs::write(dir.path().join("ctx/Dockerfile"), "FROM scratch\nCOPY Dockerfile /\n").unwrap();
    std::fs::write(
        dir.path().join("ctx/build.json"),
        format!("{{\"git_url\":\"{}\",\"image\":\"x:1\"}}", dir.path().join("ctx").display()),
    )
    .unwrap();
    std::fs::write(dir.path().join("settings.toml"), "").unwrap();
    let ovenbird = |arguments: &[&str]| {
        let mut command = ovenbird_testing::command::ovenbird().unwrap();
        command.current_dir(dir.path()).env("DOCKER_HOST", dockerd.host()).env("HOME", dir.path());
        ovenbird_testing::command::finish(command.args(["--root", "state"]).args(arguments), None, Duration::from_secs(60)).unwrap()
    };
    // What each asks for; the words of the refusal, or a file that must be there, or what is said.
    let refused = |flag: &str| Err(format!("{flag} with --builder docker is not supported"));
    let rows: &[(&str, &[&str], Result<&str, String>)] = &[
        ("explain", &["--explain"], refused("--explain")),
        ("isolation-level", &["--isolation-level", "chroot"], refused("--isolation-level")),
        ("builder", &[], Ok("")),
        ("on", &["--on", "here"], Ok("")),
        ("on", &["--on", "container"], Err("--builder docker does not go with --on container".into())),
        ("on", &["--on", "process", "--explain"], refused("--explain")),
        ("iidfile", &["--iidfile", "iid"], Ok("iid")),
        ("metadata-file", &["--metadata-file", "metadata"], Ok("metadata")),
        ("quiet", &["--quiet"], Ok("")),
        ("progress", &["--progress", "rawjson"], Ok("{\"event\":")),
        ("push", &["--push"], Err("there is nothing to push to".into())),
        ("load", &["--load", "-t", "loaded:1"], Ok("")),
        ("check", &["--check"], Ok("no findings")),
        ("call", &["--call", "check"], Ok("no findings")),
        ("root", &["--root", "elsewhere"], Ok("elsewhere")),
        ("settings", &["--settings", "none.toml"], Err("none.toml".into())),
        ("registry-option", &["--registry-option", "r.test,plain-http=x"], Err("plain-http".into())),
        ("build-json", &["--build-json", "ctx/build.json"], Ok("")),
        ("input", &["--input", "env"], Err("BUILD_JSON".into())),
        ("substitute", &["--build-json", "ctx/build.json", "--substitute", "image=_"], Err("_".into())),
        ("plugin", &["--plugin", "exit:store-metadata,dest=stored"], Ok("stored")),
        ("workflow", &["--workflow", "none"], Err("none".into())),
        ("image", &["--image", "x"], Err("--image".into())),
        ("changed", &["--changed", "x"], Err("--changed".into())),
        ("help", &["--help"], Ok("Usage")),
        ("version", &["--version"], Ok("ovenbird")),
    ];
    for (flag, arguments, expect) in rows {
        let context: &[&str] = if matches!(*flag, "build-json" | "substitute" | "input") { &[] } else { &["ctx"] };
        let (code, log) = ovenbird(&[&["build", "--builder", "docker"], *arguments, context].concat());
        match expect {
            Ok(there) => assert!(code == Some(0) && (log.contains(there) || dir.path().join(there).exists()), "{arguments:?}: {log}"),
            Err(words) => assert!(code.is_some_and(|code| code > 1) && log.contains(words), "{arguments:?}: {log}"),
        }
    }
    // All others are fields of the request, which the test below looks at.
    let of_request = [
        "tag",
        "file",
        "build-arg",
        "target",
        "platform",
        "build-context",
        "secret",
        "allow-leak",
        "ssh",
        "output",
        "label",
        "annotation",
        "reproducible",
        "if-needed",
        "force",
        "no-cache",
        "no-cache-filter",
        "cache-from",
        "cache-to",
        "pull",
        "network",
        "add-host",
        "dns",
        "hostname",
        "allow",
        "memory",
        "cpus",
        "ulimit",
        "shm-size",
        "parallel",
    ];
    let (_, help) = ovenbird(&["build", "--help"]);
    let flags = help.lines().filter_map(|line| line.trim_start().split("--").nth(1).filter(|_| line.trim_start().starts_with('-')));
    let flags: Vec<&str> = flags.map(|rest| rest.split([' ', '=', '[', ',']).next().unwrap_or_default()).collect();
    assert!(flags.len() > 40, "{flags:?}");
    for flag in flags {
        assert!(of_request.contains(&flag) || rows.iter().any(|(known, ..)| *known == flag), "the table does not know --{flag}");
    }
}

/// Every field of a request, and a value that asks for something: honoured, or refused by its name.
#[test]
fn every_field_is_honoured_or_refused() {
    let Some(Room { dockerd, .. }) = &room("docker_builder::every_field") else { return };
    let machine = Machine::new(&dockerd.host(), &[]);
    let base = machine.context(&[("Dockerfile", "FROM scratch\nCOPY Dockerfile /\nFROM scratch AS two\nCOPY Dockerfile /two\n")]);
    let base_json = serde_json::to_value(&base).unwrap();
    // Field, value, and what is refused; empty: honoured, by the test above or by what every builder shares.
    let rows = [
        ("version", "1", ""),
        ("source", "", ""),
        ("dockerfile", "\"default\"", ""),
        ("contexts", "{\"a\": {\"image\": \"docker-image://busybox\"}}", "--build-context"),
        ("names", "[\"a:1\"]", ""),
        ("target", "\"two\"", ""),
        ("build_args", "{\"A\": \"1\"}", ""),
        ("build_args", "{\"SOURCE_DATE_EPOCH\": \"1\"}", "SOURCE_DATE_EPOCH"),
        ("labels", "{\"A\": \"1\"}", ""),
        ("annotations", "{\"A\": \"1\"}", ""),
        ("platforms", "[{\"os\": \"linux\", \"architecture\": \"amd64\"}]", ""),
        (
            "platforms",
            "[{\"os\": \"linux\", \"architecture\": \"amd64\"}, {\"os\": \"linux\", \"architecture\": \"arm64\"}]",
            "more than one --platform",
        ),
        ("if_needed", "", ""),
        ("force", "false", ""),
        ("no_cache", "true", ""),
        ("no_cache_filter", "[\"two\"]", "--no-cache-filter"),
        ("pull", "true", ""),
        ("cache_from", "[{\"registry\": \"a:1\"}]", ""),
        ("cache_from", "[{\"local\": {\"src\": \"d\", \"tag\": \"latest\", \"digest\": null}}]", "--cache-from type=local"),
        ("cache_to", "", "--cache-to type=inline"),
        ("outputs", "", ""),
        ("secrets", "[{\"id\": \"a\", \"origin\": {\"env\": \"HOME\"}}]", "--secret"),
        ("allow_leak", "[\"a\"]", ""),
        ("ssh", "[{\"id\": \"default\"}]", "--ssh"),
        ("network", "\"none\"", ""),
        ("add_hosts", "[{\"name\": \"a\", \"address\": \"1.2.3.4\"}]", ""),
        ("dns", "[\"1.1.1.1\"]", "--dns"),
        ("hostname", "\"h\"", "--hostname"),
        ("allow", "[\"network.host\"]", "--allow"),
        (
            "limits",
            "{\"memory\": 67108864, \"cpus\": 0.5, \"ulimits\": [{\"name\": \"nofile\", \"soft\": 9, \"hard\": 9}], \"shm_size\": 1048576}",
            "",
        ),
        ("reproducible", "true", "--reproducible"),
        ("parallel", "2", "--parallel"),
        ("tags", "", ""),
        ("workflow", "", ""),
    ];
    let fields: Vec<&String> = base_json.as_object().unwrap().keys().collect();
    for field in &fields {
        assert!(rows.iter().any(|(name, ..)| name == field), "the table of the docker builder does not know the field {field:?}");
    }
    for (field, value, refused) in rows {
        let mut json = base_json.clone();
        if !value.is_empty() {
            json[field] = serde_json::from_str(value).unwrap();
        }
        let mut request: BuildRequest = BuildRequest::from_json(&json.to_string()).unwrap();
        if field == "cache_to" {
            request.cache_to = vec!["type=inline".parse().unwrap()];
        }
        if field == "outputs" {
            request.outputs = vec![format!("type=tar,dest={}", machine.dir.path().join("out.tar").display()).parse().unwrap()];
        }
        let done = machine.run(&request, &Arc::default());
        match (refused, done) {
            ("", Ok(report)) => assert!(field != "annotations" || report.digest != machine.run(&base, &Arc::default()).unwrap().digest),
            ("", Err(error)) => panic!("{field} = {value}: {error}"),
            (refused, Ok(_)) => panic!("{field} = {value}: not refused as {refused}"),
            (refused, Err(error)) => {
                assert!(
                    error.kind == Kind::Usage && error.message.starts_with(&format!("{refused} with --builder docker is not supported")),
                    "{field}: {error}"
                );
            }
        }
    }
    assert!(machine.dir.path().join("out.tar").is_file());
}

fn shell(script: &str) -> ContainerSpec {
    ContainerSpec { image: "busybox".into(), command: ["sh", "-c", script].map(Into::into).into(), ..ContainerSpec::default() }
}

/// Behaviours of dock's own early tests, each with its name: all are looked at, and those that fail are named.
#[derive(Default)]
struct Behaviours {
    seen: Vec<String>,
    failed: Vec<String>,
}

impl Behaviours {
    fn of(&mut self, name: &str, check: impl FnOnce()) {
        self.seen.push(name.to_owned());
        if std::panic::catch_unwind(std::panic::AssertUnwindSafe(check)).is_err() {
            self.failed.push(name.to_owned());
        }
    }

    /// None failed, and the table of the documentation has them all, and no other.
    fn finish(self, part: &str) {
        assert!(self.failed.is_empty(), "these behaviours of dock's {part} failed (see above): {}", self.failed.join(", "));
        let table = include_str!("../../../docs/reference/dock.md");
        let begin = format!("| {part} | `");
        let listed: Vec<&str> =
            table.lines().filter_map(|line| line.strip_prefix(&begin)).filter_map(|rest| rest.split('`').next()).collect();
        assert_eq!(self.seen, listed, "docs/reference/dock.md has others for {part}");
    }
}

/// dock's tests of its tasker (18) and of its utilities (10).
#[test]
fn tasker_and_utilities_of_dock() {
    let Some(Room { engine, dockerd, .. }) = &room("docker_builder::tasker_and_utilities_of_dock") else { return };
    let registry = Registry::start().unwrap();
    let machine = Machine::new(&dockerd.host(), &[]);
    let tasker = Tasker::new(machine.builder(), machine.dir.path(), Arc::new(Silent), Cancel::default());
    let reference = |name: &str| name.parse::<Reference>().unwrap();
    let at = |name: &str| reference(&format!("{}/{name}", registry.address()));
    let path: &Path = &machine.dir.path().join("ctx");
    let ran = |script: &str| {
        let id = tasker.run(&shell(script)).unwrap();
        (tasker.wait(&id).unwrap(), id)
    };
    let mut is = Behaviours::default();
    is.of("run", || {
        let (code, id) = ran("exit 4");
        assert_eq!((code, &tasker.inspect_container(&id).unwrap()["State"]["ExitCode"]), (4, &4.into()));
    });
    is.of("run-invalid-command", || {
        let before = dockerd.run(&["ps", "-aq"]).unwrap();
        let error = tasker.run(&ContainerSpec { command: vec!["/no/such".into()], ..shell("") }).unwrap_err();
        assert!(error.to_string().contains("/no/such"), "{error}");
        assert_eq!(dockerd.run(&["ps", "-aq"]).unwrap(), before, "no container is left");
    });
    is.of("logs", || {
        let (_, id) = ran("echo out; echo err >&2");
        let said = tasker.logs(&id, true).unwrap().map(|piece| piece.unwrap());
        let mut said: Vec<(Stream, String)> = said.map(|(stream, bytes)| (stream, String::from_utf8(bytes.to_vec()).unwrap())).collect();
        said.sort_by_key(|(_, text)| text.clone());
        assert_eq!(said, [(Stream::Stderr, "err\n".into()), (Stream::Stdout, "out\n".into())]);
    });
    is.of("remove-container", || {
        let (_, id) = ran("true");
        tasker.remove_container(&id, false).unwrap();
        assert!(tasker.inspect_container(&id).is_err());
        let id = tasker.run(&shell("sleep 60")).unwrap();
        assert!(tasker.remove_container(&id, false).is_err(), "it runs");
        tasker.remove_container(&id, true).unwrap();
    });
    is.of("image-exists", || assert!(tasker.image_exists("busybox").unwrap()));
    is.of("image-doesnt-exist", || assert!(!tasker.image_exists("lerknglekrnglekrnglekrng").unwrap()));
    is.of("inspect-image", || {
        assert_eq!(tasker.inspect_image("busybox:latest").unwrap()["RepoTags"][0], "busybox:latest");
    });
    let id = tasker.inspect_image("busybox:latest").unwrap()["Id"].as_str().unwrap().to_owned();
    is.of("get-image-info-by-id", || assert_eq!(tasker.image_info_by_id(&id).unwrap().unwrap().names, ["busybox:latest"]));
    is.of("get-image-info-by-id-nonexistent", || {
        assert_eq!((tasker.image_info_by_id("sha256:0000").unwrap(), tasker.image_info_by_id("").unwrap()), (None, None));
    });
    is.of("get-image-info-by-name", || assert_eq!(tasker.image_info_by_name("busybox").unwrap()[0].id, id));
    is.of("get-image-info-by-name-nonexistent", || assert_eq!(tasker.image_info_by_name("none").unwrap(), []));

    let (_, changed) = ran("echo kept > /kept");
    is.of("commit-container", || {
        let made = tasker.commit_container(&changed, Some(&reference("ns/committed:2")), Some("why")).unwrap();
        assert_eq!(tasker.inspect_image("ns/committed:2").unwrap()["Id"], made.as_str());
        assert_eq!(tasker.inspect_image(&made).unwrap()["Comment"], "why");
    });
    let name = at("ns/img:1");
    is.of("tag-image", || {
        assert_eq!(tasker.tag_image("busybox", &name, false).unwrap(), name);
        tasker.tag_image("busybox", &name, false).unwrap();
        assert!(tasker.image_exists(&name.familiar()).unwrap());
        assert!(tasker.tag_image("ns/committed:2", &name, false).is_err_and(|error| error.kind == Kind::Usage), "the name is taken");
        tasker.tag_image("ns/committed:2", &name, true).unwrap();
    });
    is.of("push-image", || {
        // To a registry that the engine was never told of; a push that fails is an error.
        tasker.push_image(&name).unwrap();
        assert!(tasker.last_logs().iter().any(|line| line.contains("pushing")), "{:?}", tasker.last_logs());
        assert!(tasker.push_image(&reference("127.0.0.1:1/nobody:1")).is_err());
    });
    let second = at("other:3");
    is.of("tag-and-push", || {
        assert_eq!(tasker.tag_and_push_image("ns/committed:2", &second, false).unwrap(), tasker.push_image(&name).unwrap());
    });
    is.of("remove-image", || {
        for name in [&name, &second, &reference("ns/committed:2")] {
            tasker.remove_image(&name.familiar(), false, false).unwrap();
            assert!(!tasker.image_exists(&name.familiar()).unwrap());
        }
    });
    let kept = |name: &Reference| {
        let spec = ContainerSpec { image: name.familiar(), command: vec!["cat".into(), "/kept".into()], ..ContainerSpec::default() };
        let id = tasker.run(&spec).unwrap();
        assert_eq!(tasker.wait(&id).unwrap(), 0);
        assert_eq!(&tasker.logs(&id, true).unwrap().next().unwrap().unwrap().1[..], b"kept\n");
    };
    is.of("pull-image", || {
        assert_eq!(tasker.pull_image(&second).unwrap(), second);
        kept(&second);
        assert!(tasker.pull_image(&at("none:1")).is_err_and(|error| error.kind == Kind::Registry));
    });
    let write = |text: &str| std::fs::write(machine.dir.path().join("ctx/Dockerfile"), text).unwrap();
    is.of("build-image-from-path", || {
        write("FROM busybox\nRUN echo building\n");
        let report = tasker.build_image_from_path(path, "built:1", false).unwrap();
        assert_eq!(engine.image_id("built:1").unwrap(), report.image_id());
        assert!(tasker.last_logs().contains(&"building".to_owned()), "{:?}", tasker.last_logs());
        tasker.build_image_from_path(path, "built:2", true).unwrap();
        assert!(!tasker.last_logs().contains(&"building".to_owned()), "{:?}", tasker.last_logs());
    });
    is.finish("tasker");

    // What they say of names, Dockerfiles and repositories.
    let mut is = Behaviours::default();
    let repository = Repository::create(&machine.dir.path().join("repository")).unwrap();
    let says = |text: &str| format!("FROM busybox\nLABEL says={text}\n");
    let files = [("Dockerfile", says("first")), ("sub/Dockerfile", says("folder")), ("sub/b.Dockerfile", says("path"))];
    let first = repository.commit(&files.each_ref().map(|(name, text)| (*name, text.as_str()))).unwrap();
    repository.commit(&[("Dockerfile", &says("second"))]).unwrap();
    let url = format!("file://{}", repository.path().display());
    let says = |commit: Option<&str>, path: Option<&str>| {
        let git = GitSource { url: url.clone(), commit: commit.map(Into::into), path: path.map(Into::into) };
        tasker.build_image_from_git(&git, "cloned:1", true).unwrap();
        tasker.inspect_image("cloned:1").unwrap()["Config"]["Labels"]["says"].as_str().unwrap().to_owned()
    };
    is.of("join-image-name", || {
        assert_eq!(reference("registry.example.org/ns/img").with_tag("1").familiar(), "registry.example.org/ns/img:1")
    });
    is.of("split-image-name", || {
        let name = reference("ns/img:1");
        assert_eq!((name.registry(), name.repository(), name.tag()), ("docker.io", "ns/img", Some("1")));
    });
    is.of("split-image-name-with-port", || {
        let name = reference("registry:5000/ns/img");
        assert_eq!((name.registry(), name.repository(), name.tag()), ("registry:5000", "ns/img", None));
    });
    is.of("split-image-name-with-digest", || {
        let digest = ovenbird_oci::Digest::of(b"x");
        let name = reference(&format!("example.org/img@{digest}"));
        assert_eq!((name.repository(), name.digest()), ("img", Some(&digest)));
    });
    is.of("baseimage-from-dockerfile", || {
        write("# a remark\nfrom busybox as base\nFROM base\nRUN true\n");
        let report = tasker.build_image_from_path(path, "based:1", true).unwrap();
        assert!(report.record.base_images[0].name.contains("busybox"), "{:?}", report.record.base_images);
    });
    is.of("dockerfile-at-the-root", || assert_eq!((says(None, None), says(None, Some("Dockerfile"))), ("second".into(), "second".into())));
    is.of("dockerfile-in-a-folder", || {
        assert_eq!((says(None, Some("sub")), says(None, Some("sub/Dockerfile"))), ("folder".into(), "folder".into()))
    });
    is.of("dockerfile-by-its-path", || assert_eq!(says(None, Some("/sub/b.Dockerfile")), "path"));
    is.of("clone-at-a-commit", || {
        assert_eq!(says(Some(first.trim()), None), "first");
        let none = GitSource { url: url.clone(), commit: Some("none".into()), path: None };
        assert_eq!(tasker.build_image_from_git(&none, "cloned:2", true).unwrap_err().kind, Kind::Source);
        let folder = GitSource { url: path.display().to_string(), ..GitSource::default() };
        assert_eq!(tasker.build_image_from_git(&folder, "cloned:2", true).unwrap_err().kind, Kind::Usage);
    });
    is.of("wait-for-command", || {
        write("FROM busybox\nRUN echo said; exit 9\n");
        assert_eq!(tasker.build_image_from_path(path, "failed:1", true).unwrap_err().kind, Kind::Step);
        assert!(tasker.last_logs().contains(&"said".to_owned()) && !tasker.image_exists("failed:1").unwrap());
    });
    is.finish("utilities");

    // The container a build ran in, kept and pushed: an image that runs.
    let names = tasker.push_buildroot(&changed, &reference("team/app:1"), &[registry.address()], 1_700_000_000).unwrap();
    assert_eq!(names[0].familiar(), format!("{}/buildroot-team/app:2023-11-14-22-13-20", registry.address()));
    tasker.remove_image(&names[0].familiar(), true, false).unwrap();
    tasker.pull_image(&names[0]).unwrap();
    kept(&names[0]);
}
