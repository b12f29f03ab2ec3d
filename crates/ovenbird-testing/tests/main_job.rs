//! The main job from end to end, as it is promised: real registry, real packages, real Docker Engine, and bad days.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ovenbird_testing::archive::{self, Image, Kind};
use ovenbird_testing::base::Base;
use ovenbird_testing::command::{Level, Workspace, finish, shared_binary};
use ovenbird_testing::dockerd::Dockerd;
use ovenbird_testing::needs::{self, Need};
use ovenbird_testing::process::output;
use ovenbird_testing::registry::{Options, Registry, mirror_toml};
use ovenbird_testing::relay::Relay;
use ovenbird_testing::{Error, Result};

/// Longest time of one build: a package installation on a slow day.
const LIMIT: Duration = Duration::from_mins(10);

/// Bytes that must be in no blob.
const SECRET: &str = "correct-horse-battery-staple-7193";

const DOCKERFILE: &str = r#"# syntax=docker/dockerfile:1
FROM debian AS made
RUN --mount=type=secret,id=token sha256sum < /run/secrets/token | cut -c1-64 > /token.sha256
RUN <<EOF
set -e
mkdir /made
echo heredoc > /made/file
EOF

FROM debian
RUN --mount=type=cache,target=/var/cache/apt,sharing=locked apt-get update && apt-get install -y --no-install-recommends at
RUN useradd --system --create-home baker && install -o baker -g baker -m 0640 /dev/null /home/baker/owned
COPY --from=made /made /token.sha256 /opt/
COPY --chown=daemon:daemon --chmod=0755 hello /usr/local/bin/
ENV GREETING=hello
WORKDIR /srv
USER daemon
CMD ["hello"]
"#;

/// What `docker run` must print: the script `hello`.
const HELLO: &str = "#!/bin/sh\necho \"$GREETING from $(id -un) in $(pwd)\"\ncat /opt/file\nstat -c '%a %u:%g' /usr/bin/at /home/baker/owned /usr/local/bin/hello\n";

/// A context with its settings, and a state folder.
struct Job {
    room: Workspace,
    context: PathBuf,
    settings: PathBuf,
}

impl Job {
    fn new(level: Level, dockerfile: &str, settings: &str) -> Result<Self> {
        let room = Workspace::new(level)?;
        let context = room.path().join("ctx");
        let write = |path: PathBuf, text: &str, mode: u32| {
            fs::write(&path, text)
                .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(mode)))
                .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        };
        fs::create_dir(&context).unwrap_or_else(|error| panic!("{error}"));
        write(context.join("Dockerfile"), dockerfile, 0o644);
        write(context.join("hello"), HELLO, 0o755);
        write(room.path().join("token"), SECRET, 0o644);
        let file = room.path().join("settings.toml");
        write(file.clone(), settings, 0o644);
        room.give_tree(&context)?;
        Ok(Self { room, context, settings: file })
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.room.ovenbird();
        command.arg("build").arg("--root").arg(self.room.path().join("state")).arg("--settings").arg(&self.settings);
        command.args(["--progress", "plain"]).args(arguments).arg(&self.context);
        command
    }

    fn build(&self, arguments: &[&str]) -> Result<(Option<i32>, String)> {
        finish(&mut self.command(arguments), None, LIMIT)
    }

    /// Builds into an archive and reads it.
    fn image(&self, arguments: &[&str]) -> Result<Image> {
        let file = self.room.path().join("image.tar");
        let target = format!("type=oci,dest={}", file.display());
        let (code, log) = self.build(&[&["-o", &target], arguments].concat())?;
        assert_eq!(code, Some(0), "{log}");
        one(&file)
    }
}

fn one(file: &Path) -> Result<Image> {
    let mut images = archive::images(file)?;
    assert_eq!(images.len(), 1);
    Ok(images.remove(0))
}

/// The image as skopeo takes it from the registry.
fn pulled(registry: &Registry, name: &str, dir: &Path) -> Result<(Image, PathBuf)> {
    let file = dir.join(format!("{}.tar", name.replace(['/', ':'], "-")));
    let source = format!("docker://{}/{name}", registry.address());
    output(Command::new("skopeo").args([
        "copy",
        "--quiet",
        "--preserve-digests",
        "--src-tls-verify=false",
        &source,
        &format!("oci-archive:{}", file.display()),
    ]))?;
    Ok((one(&file)?, file))
}

/// Type, mode and owner of everything that a package installation does not make anew each time.
fn owners(image: &Image) -> Result<BTreeMap<String, String>> {
    let volatile = ["/var/log", "/var/cache", "/var/lib/apt", "/tmp", "/etc/.pwd.lock"];
    Ok(archive::flatten(&image.layers)?
        .into_iter()
        .filter(|(path, _)| !volatile.iter().any(|start| path.starts_with(start)))
        .map(|(path, node)| {
            let kind = match &node.kind {
                Kind::File { .. } => "file".to_owned(),
                Kind::Link(target) => format!("link to {target}"),
                Kind::Dir => "folder".to_owned(),
                Kind::Device(..) => "device".to_owned(),
                Kind::Fifo => "pipe".to_owned(),
            };
            (path, format!("{kind} {:o} {}:{}", node.mode, node.uid, node.gid))
        })
        .collect())
}

/// The secret is in no blob of the archive, packed or not, and not in the state folder.
fn no_secret(file: &Path, state: &Path) -> Result<()> {
    let holds = |bytes: &[u8]| bytes.windows(SECRET.len()).any(|window| window == SECRET.as_bytes());
    for (name, bytes) in archive::members(file)? {
        assert!(!holds(&bytes) && !holds(&archive::decompress(&bytes)?), "{name} holds the secret");
    }
    if state.exists() {
        let found = Command::new("grep").args(["-rlF", SECRET]).arg(state).output();
        let found = found.map_err(|source| Error::Start { program: "grep".into(), source })?;
        assert!(found.stdout.is_empty(), "the secret is in {}", String::from_utf8_lossy(&found.stdout));
    }
    Ok(())
}

/// The state a level must reach is what root reaches.
fn main_job(test: &str, level: Level) -> Result<()> {
    let mut wanted = vec![Need::Run, Need::Registry, Need::Debian, Need::Network];
    if level != Level::Own {
        wanted.push(Need::Users);
    }
    if !needs::available(test, &wanted) {
        return Ok(());
    }
    let registry = Registry::start_with(Options { bases: &[Base::Debian], credentials: None })?;
    let job = Job::new(level, DOCKERFILE, &registry.settings_toml())?;
    let name = format!("{}/app:1", registry.address());
    let secret = format!("id=token,src={}", job.room.path().join("token").display());
    let arguments = ["-t", &name, "--push", "--secret", &secret];
    let (code, log) = job.build(&arguments)?;
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("Setting up at ("), "{log}");

    let (image, file) = pulled(&registry, "app:1", job.room.path())?;
    no_secret(&file, &job.room.path().join("state"))?;
    let found = owners(&image)?;
    for (path, expected) in [
        ("/usr/bin/at", "file 6755 1:1"),
        ("/home/baker/owned", "file 640 "),
        ("/usr/local/bin/hello", "file 755 1:1"),
        ("/opt/file", "file 644 0:0"),
        ("/srv", "folder 755 0:0"),
    ] {
        assert!(found.get(path).is_some_and(|text| text.starts_with(expected)), "{path}: {:?}", found.get(path));
    }
    // Owners that the package's scripts set: the single-id level must record them, too.
    let spool = found.iter().filter(|(path, text)| path.starts_with("/var/spool/cron/at") && text.ends_with(" 1:1")).count();
    assert!(spool >= 2, "{found:?}");
    let baker = found["/home/baker/owned"].rsplit(' ').next().unwrap_or_default().to_owned();
    assert!(baker != "0:0" && found["/home/baker"].ends_with(&baker), "{baker}");

    let inspected = output(Command::new("skopeo").args(["inspect", "--config", "--tls-verify=false", &format!("docker://{name}")]))?;
    assert!(inspected.contains("\"daemon\"") && inspected.contains("GREETING=hello"), "{inspected}");

    // Nothing changed: nothing runs, and the registry holds the same manifest.
    let (code, again) = job.build(&arguments)?;
    assert_eq!(code, Some(0), "{again}");
    assert!(!again.contains("Setting up at ("), "{again}");
    assert_eq!(pulled(&registry, "app:1", job.room.path())?.0.digest, image.digest);

    docker_agrees(test, &name, &baker)
}

/// A real `docker run` of the pulled image prints what the image promises.
fn docker_agrees(test: &str, name: &str, baker: &str) -> Result<()> {
    if !needs::available(&format!("{test}_in_docker"), &[Need::Docker]) {
        return Ok(());
    }
    let docker = match Dockerd::start() {
        Ok(docker) => docker,
        Err(error) => {
            needs::skip(&format!("{test}_in_docker"), &error.to_string());
            return Ok(());
        }
    };
    docker.run(&["pull", "--quiet", name])?;
    let printed = docker.run(&["run", "--rm", name])?;
    assert_eq!(printed, format!("hello from daemon in /srv\nheredoc\n6755 1:1\n640 {baker}\n755 1:1\n"));
    Ok(())
}

#[test]
fn root_main_job() -> Result<()> {
    main_job("main_job::root", Level::Own)
}

#[test]
fn rootless_main_job() -> Result<()> {
    main_job("main_job::rootless", Level::Rootless)
}

#[test]
fn single_id_main_job() -> Result<()> {
    main_job("main_job::single_id", Level::SingleId)
}

#[test]
fn traced_main_job() -> Result<()> {
    main_job("main_job::traced", Level::Traced)
}

#[test]
fn in_a_container_main_job() -> Result<()> {
    contained("main_job::in_a_container", &[], "chroot")
}

/// What the restricted standard of Kubernetes allows.
#[test]
fn in_a_container_without_rights_main_job() -> Result<()> {
    let restricted = ["--user=1000", "--cap-drop=ALL", "--security-opt=no-new-privileges"];
    contained("main_job::in_a_container_without_rights", &restricted, "traced")
}

/// The main job in a container with the engine's default seccomp profile.
fn contained(test: &str, restrictions: &[&str], level: &str) -> Result<()> {
    if !needs::available(test, &[Need::Registry, Need::Debian, Need::Network, Need::Docker]) {
        return Ok(());
    }
    let docker = match Dockerd::start() {
        Ok(docker) => docker,
        Err(error) => {
            needs::skip(test, &error.to_string());
            return Ok(());
        }
    };
    let registry = Registry::start_with(Options { bases: &[Base::Debian], credentials: None })?;
    let job = Job::new(Level::Own, DOCKERFILE, &registry.settings_toml())?;
    let (base, name) = (format!("{}/library/debian:latest", registry.address()), format!("{}/app:contained", registry.address()));
    docker.run(&["pull", "--quiet", &base])?;
    // Default seccomp profile and root file system. The host's network only because this engine has no bridge.
    let script = "exec ovenbird build --root /tmp/state --settings /job/settings.toml --progress plain --secret id=token,src=/job/token -t \"$0\" --push /job/ctx";
    let id = docker.run(&[&["create", "--network=host"], restrictions, &[&base, "sh", "-c", script, &name]].concat())?;
    docker.run(&["cp", &shared_binary()?.display().to_string(), &format!("{}:/usr/local/bin/ovenbird", id.trim())])?;
    docker.run(&["cp", &job.room.path().display().to_string(), &format!("{}:/job", id.trim())])?;
    let (code, log) = finish(docker.docker().args(["start", "--attach", id.trim()]), None, LIMIT)?;
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains(level), "{log}");
    let (image, file) = pulled(&registry, "app:contained", job.room.path())?;
    no_secret(&file, Path::new("/nonexistent"))?;
    let found = owners(&image)?;
    assert!(found["/usr/bin/at"].starts_with("file 6755 1:1"), "{}", found["/usr/bin/at"]);
    let baker = found["/home/baker/owned"].rsplit(' ').next().unwrap_or_default().to_owned();
    docker.run(&["pull", "--quiet", &name])?;
    let printed = docker.run(&["run", "--rm", &name])?;
    assert_eq!(printed, format!("hello from daemon in /srv\nheredoc\n6755 1:1\n640 {baker}\n755 1:1\n"));
    Ok(())
}

#[test]
fn every_level_installs_the_same_owners() -> Result<()> {
    let test = "main_job::single_id_and_rootless_owners";
    if !needs::available(test, &[Need::Run, Need::Registry, Need::Debian, Need::Network, Need::Users]) {
        return Ok(());
    }
    let registry = Registry::start_with(Options { bases: &[Base::Debian], credentials: None })?;
    let dockerfile = "FROM debian\nRUN apt-get update && apt-get install -y --no-install-recommends at cron\n";
    let reached = |level| owners(&Job::new(level, dockerfile, &registry.settings_toml())?.image(&[])?);
    let root = reached(Level::Own)?;
    for level in [Level::Rootless, Level::SingleId, Level::Traced] {
        let other = reached(level)?;
        let mut differences = Vec::new();
        for path in root.keys().chain(other.keys()) {
            if root.get(path) != other.get(path) {
                differences.push(format!("{path}: root {:?}, {level:?} {:?}", root.get(path), other.get(path)));
            }
        }
        differences.dedup();
        assert!(differences.is_empty(), "{}", differences.join("\n"));
    }
    Ok(())
}

const REPRODUCED: &str = "FROM busybox AS one\nRUN echo made > /made && mkdir /d && touch /d/a /d/b && echo baker:x:7:7::/:/bin/sh >> /etc/passwd\n\
                          FROM busybox\nCOPY --from=one /made /d /x/\nCOPY --chown=app:shared hello /\nRUN chown 5:6 /x/made; ln /x/a /x/c; rm -r /home/app\nWORKDIR /w\nLABEL a=b\n";

#[test]
fn reproducible_in_every_place() -> Result<()> {
    if !needs::available("main_job::reproducible", &[Need::Run, Need::Registry]) {
        return Ok(());
    }
    let registry = Registry::start()?;
    let digest = |level| Ok::<_, Error>(Job::new(level, REPRODUCED, &registry.settings_toml())?.image(&["--reproducible"])?.digest);
    let first = digest(Level::Own)?;
    // Times in whole seconds would agree by accident.
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(first, digest(Level::Own)?, "another folder, another time");
    if needs::available("main_job::rootless_reproducible", &[Need::Users]) {
        assert_eq!(first, digest(Level::Rootless)?, "rootless");
        assert_eq!(first, digest(Level::SingleId)?, "single-id");
        assert_eq!(first, digest(Level::Traced)?, "traced");
    }
    Ok(())
}

/// Ids of processes whose command line holds `text`.
fn processes(text: &str) -> Vec<String> {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    all.filter(|entry| {
        fs::read(entry.path().join("cmdline")).is_ok_and(|line| String::from_utf8_lossy(&line).replace('\0', " ").contains(text))
    })
    .map(|entry| entry.file_name().to_string_lossy().into_owned())
    .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
    .collect()
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_mins(1);
    while !done() {
        assert!(Instant::now() < end, "{what} did not happen within a minute");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn killed(test: &str, level: Level, seconds: u32) -> Result<()> {
    let mut wanted = vec![Need::Run, Need::Registry];
    if level != Level::Own {
        wanted.push(Need::Users);
    }
    if !needs::available(test, &wanted) {
        return Ok(());
    }
    let registry = Registry::start()?;
    let dockerfile = "FROM busybox\nRUN echo before-$((6*7)) > /before\nARG T\nRUN --mount=type=cache,target=/c echo kept > /c/f; sleep $T; echo after > /after\n";
    let job = Job::new(level, dockerfile, &registry.settings_toml())?;
    // A number of seconds that no other process sleeps.
    let sleeper = format!("sleep {seconds}");
    let mut command = job.command(&["--build-arg", &format!("T={seconds}"), "-o", "type=oci,dest=/dev/null"]);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|source| Error::Start { program: "ovenbird".into(), source })?;
    wait_for("the step", || processes(&sleeper).iter().any(|id| *id != child.id().to_string()));
    child.kill().map_err(|source| Error::Start { program: "kill".into(), source })?;
    let _ = child.wait();
    wait_for("the end of the step", || processes(&sleeper).is_empty());
    let state = job.room.path().display().to_string();
    wait_for("the end of processes on the state folder", || processes(&state).is_empty());
    // Whatever a step mounts has its place or its layers below the state folder; other mounts of the machine come and go.
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let left: Vec<&str> = mounts.lines().filter(|line| line.contains(&state)).collect();
    assert!(left.is_empty(), "mounts are left: {left:?}");
    let image = job.image(&["--build-arg", "T=0"])?;
    let tree = archive::flatten(&image.layers)?;
    assert!(tree.contains_key("/before") && tree.contains_key("/after"));
    Ok(())
}

#[test]
fn root_killed_in_the_middle() -> Result<()> {
    killed("main_job::killed", Level::Own, 987_601)
}

#[test]
fn rootless_killed_in_the_middle() -> Result<()> {
    killed("main_job::rootless_killed", Level::Rootless, 987_602)
}

#[test]
fn single_id_killed_in_the_middle() -> Result<()> {
    killed("main_job::single_id_killed", Level::SingleId, 987_603)
}

#[test]
fn traced_killed() -> Result<()> {
    killed("main_job::traced_killed", Level::Traced, 987_604)
}

#[test]
fn interrupted() -> Result<()> {
    if !needs::available("main_job::interrupted", &[Need::Run, Need::Registry]) {
        return Ok(());
    }
    let registry = Registry::start()?;
    let job = Job::new(Level::Own, "FROM busybox\nRUN sleep 987604\n", &registry.settings_toml())?;
    let mut command = job.command(&["-o", "type=oci,dest=/dev/null"]);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|source| Error::Start { program: "ovenbird".into(), source })?;
    wait_for("the step", || processes("sleep 987604").iter().any(|id| *id != child.id().to_string()));
    output(Command::new("kill").args(["-INT", &child.id().to_string()]))?;
    let status = child.wait().map_err(|source| Error::Start { program: "ovenbird".into(), source })?;
    assert_eq!(status.code(), Some(130));
    wait_for("the end of the step", || processes("sleep 987604").is_empty());
    Ok(())
}

/// A clean failure: an exit code that means something, no panic.
fn assert_clean_failure(code: Option<i32>, log: &str) {
    assert!(!matches!(code, None | Some(0 | 1 | 101)), "exit code {code:?}\n{log}");
}

const READS_BASE: &str = "FROM busybox\nRUN cp /etc/group /g\n";

#[test]
fn corrupt_layer() -> Result<()> {
    if !needs::available("main_job::corrupt_layer", &[Need::Run, Need::Registry]) {
        return Ok(());
    }
    let registry = Registry::start()?;
    let job = Job::new(Level::Own, READS_BASE, &registry.settings_toml())?;
    let layer = biggest(&registry.storage().join("blobs"));
    let good = fs::read(&layer).unwrap_or_default();
    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle] ^= 0x55;
    for damaged in [bad, good[..middle].to_vec()] {
        replace(&layer, &damaged);
        let (code, log) = job.build(&["-o", "type=oci,dest=/dev/null"])?;
        assert_clean_failure(code, &log);
        assert!(log.contains("busybox") || log.contains("sha256:"), "{log}");
    }
    // Nothing of the bad layer was kept.
    replace(&layer, &good);
    assert!(archive::flatten(&job.image(&[])?.layers)?.contains_key("/g"));
    Ok(())
}

/// The cached blob has more links than this registry's: a new file takes its place.
fn replace(path: &Path, bytes: &[u8]) {
    let new = path.with_extension("new");
    fs::write(&new, bytes).and_then(|()| fs::rename(&new, path)).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

fn biggest(dir: &Path) -> PathBuf {
    let mut folders = vec![dir.to_path_buf()];
    let mut found = (0, PathBuf::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(meta) if meta.is_dir() => folders.push(entry.path()),
                Ok(meta) if meta.len() > found.0 => found = (meta.len(), entry.path()),
                _ => {}
            }
        }
    }
    found.1
}

#[test]
fn escaping_layers() -> Result<()> {
    if !needs::available("main_job::escaping_layers", &[Need::Run, Need::Registry]) {
        return Ok(());
    }
    let registry = Registry::start()?;
    let outside = tempfile::tempdir().unwrap_or_else(|error| panic!("{error}"));
    fs::set_permissions(outside.path(), fs::Permissions::from_mode(0o777)).unwrap_or_else(|error| panic!("{error}"));
    let target = outside.path().display().to_string();
    fs::write(outside.path().join("victim"), "untouched").unwrap_or_else(|error| panic!("{error}"));
    let climb = format!("{}{}", "../".repeat(24), target.trim_start_matches('/'));
    let file = |name: &str| (name.to_owned(), tar::EntryType::Regular, String::new());
    let layers: [(&str, Vec<(String, tar::EntryType, String)>); 6] = [
        ("parents", vec![file(&format!("{climb}/escaped"))]),
        ("absolute", vec![file(&format!("{target}/escaped"))]),
        ("absolute-link", vec![("l".into(), tar::EntryType::Symlink, target.clone()), file("l/escaped")]),
        ("climbing-link", vec![("l".into(), tar::EntryType::Symlink, climb.clone()), file("l/escaped")]),
        ("hard-link", vec![("h".into(), tar::EntryType::Link, format!("{climb}/victim")), file("h")]),
        ("whiteout", vec![file(&format!("{climb}/.wh.victim"))]),
    ];
    for (name, entries) in layers {
        let layout = tempfile::tempdir().unwrap_or_else(|error| panic!("{error}"));
        let mut tar = tar::Builder::new(Vec::new());
        for (path, kind, link) in &entries {
            let mut header = tar::Header::new_gnu();
            // The safe setters refuse what an attacker writes.
            let old = header.as_old_mut();
            old.name[..path.len()].copy_from_slice(path.as_bytes());
            old.linkname[..link.len()].copy_from_slice(link.as_bytes());
            header.set_entry_type(*kind);
            header.set_mode(0o644);
            let body: &[u8] = if *kind == tar::EntryType::Regular { b"evil" } else { b"" };
            header.set_size(body.len() as u64);
            header.set_cksum();
            tar.append(&header, body).unwrap_or_else(|error| panic!("{error}"));
        }
        let layer = layout.path().join("layer.tar");
        fs::write(&layer, tar.into_inner().unwrap_or_default()).unwrap_or_else(|error| panic!("{error}"));
        let image = layout.path().join("image");
        hand_made(&layer, &image)?;
        registry.push(&format!("oci:{}", image.display()), &format!("library/evil-{name}:latest"))?;
        let job = Job::new(
            Level::Own,
            &format!(
                "FROM evil-{name} AS evil\nFROM busybox\nRUN --mount=from=evil,target=/evil ls -lR /evil\nCOPY --from=evil / /copied/\n"
            ),
            &registry.settings_toml(),
        )?;
        let (code, log) = job.build(&["-o", "type=oci,dest=/dev/null"])?;
        assert!(!matches!(code, None | Some(1 | 101)), "{name}: {code:?}\n{log}");
        if name == "parents" || name == "hard-link" {
            assert_clean_failure(code, &log);
        }
        assert!(!outside.path().join("escaped").exists(), "{name} wrote outside\n{log}");
        assert_eq!(fs::read_to_string(outside.path().join("victim")).unwrap_or_default(), "untouched", "{name}\n{log}");
    }
    Ok(())
}

/// An OCI layout of one layer, written by hand through umoci-free shell tools: sha256sum and printf.
fn hand_made(layer: &Path, layout: &Path) -> Result<()> {
    let script = r#"
mkdir -p "$2/blobs/sha256"; cd "$2"; printf '{"imageLayoutVersion":"1.0.0"}' > oci-layout
blob() { d=$(sha256sum < "$1" | cut -d' ' -f1); n=$(wc -c < "$1" | tr -d ' '); mv "$1" "blobs/sha256/$d"; echo "\"digest\":\"sha256:$d\",\"size\":$n"; }
diff=$(sha256sum < "$1" | cut -d' ' -f1); layer=$(blob "$1")
printf '{"architecture":"amd64","os":"linux","config":{},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]},"history":[{"created_by":"hand"}]}' "$diff" > c; config=$(blob c)
printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json",%s},"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar",%s}]}' "$config" "$layer" > m; manifest=$(blob m)
printf '{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json",%s}]}' "$manifest" > index.json
"#;
    output(Command::new("sh").args(["-euc", script, "sh"]).arg(layer).arg(layout)).map(drop)
}

#[test]
fn registry_hangs_up_half_way() -> Result<()> {
    if !needs::available("main_job::hang_up", &[Need::Run, Need::Registry]) {
        return Ok(());
    }
    let registry = Registry::start()?;
    // Once: tried again, and well.
    let relay = Relay::start(registry.port(), 300_000, 1)?;
    let job = Job::new(Level::Own, READS_BASE, &mirror_toml(&relay.address()))?;
    job.image(&[])?;
    assert_eq!(relay.hang_ups(), 1);
    // Always: an error, and nothing broken is left.
    let relay = Relay::start(registry.port(), 300_000, u64::MAX)?;
    let job = Job::new(Level::Own, READS_BASE, &mirror_toml(&relay.address()))?;
    let (code, log) = job.build(&["-o", "type=oci,dest=/dev/null"])?;
    assert_eq!(code, Some(7), "{log}");
    fs::write(&job.settings, registry.settings_toml()).unwrap_or_else(|error| panic!("{error}"));
    job.image(&[])?;
    Ok(())
}

#[test]
fn push_to_a_registry_that_hangs_up() -> Result<()> {
    if !needs::available("main_job::hang_up_push", &[Need::Registry]) {
        return Ok(());
    }
    let registry = Registry::start()?;
    // Every answer is cut after its first bytes.
    let relay = Relay::start(registry.port(), 10, u64::MAX)?;
    let job = Job::new(Level::Own, "FROM scratch\nCOPY hello /\n", &mirror_toml("127.0.0.1:1"))?;
    let (code, log) = job.build(&["-t", &format!("{}/app:1", relay.address()), "--push"])?;
    assert_clean_failure(code, &log);
    Ok(())
}

#[test]
fn full_disk() -> Result<()> {
    if !needs::available("main_job::full_disk", &[Need::Root, Need::Run, Need::Registry]) {
        return Ok(());
    }
    let registry = Registry::start()?;
    let job = Job::new(Level::Own, READS_BASE, &registry.settings_toml())?;
    let state = job.room.path().join("state");
    fs::create_dir(&state).unwrap_or_else(|error| panic!("{error}"));
    let build = job.command(&["-o", "type=oci,dest=../image.tar"]);
    // A mount namespace of its own: nothing is left when the script ends. The second build finds a larger disk.
    let script = r#"
mount -t tmpfs -o size=2m none "$1"; shift
code=0; "$@" || code=$?
echo "first build ended with $code"
mount -o remount,size=200m "$4"
exec "$@"
"#;
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "sh", "-uc", script, "sh"])
        .arg(&state)
        .arg(build.get_program())
        .args(build.get_args())
        .current_dir(&job.context);
    let (code, log) = finish(&mut command, None, LIMIT)?;
    let first = log.lines().find_map(|line| line.strip_prefix("first build ended with ")).and_then(|code| code.parse().ok());
    assert_clean_failure(first, &log);
    assert!(log.to_lowercase().contains("no space left") || log.to_lowercase().contains("disk"), "{log}");
    assert_eq!(code, Some(0), "{log}");
    Ok(())
}

#[test]
fn private_registry() -> Result<()> {
    if !needs::available("main_job::private_registry", &[Need::Registry]) {
        return Ok(());
    }
    let registry = Registry::start_with(Options { bases: &[Base::Busybox], credentials: Some(("anna", "pass:word")) })?;
    let dockerfile = format!("FROM {}/library/busybox\nCOPY hello /\n", registry.address());
    let job = Job::new(Level::Own, &dockerfile, &mirror_toml("127.0.0.1:1"))?;
    let name = format!("{}/team/app:1", registry.address());
    let (code, log) = job.build(&["-t", &name, "--push"])?;
    assert_eq!(code, Some(7), "{log}");
    assert!(!log.contains("pass:word"), "{log}");
    let config = job.room.path().join("home/.docker");
    fs::create_dir(&config).unwrap_or_else(|error| panic!("{error}"));
    // base64 of anna:pass:word
    let text = format!("{{\"auths\": {{\"{}\": {{\"auth\": \"YW5uYTpwYXNzOndvcmQ=\"}}}}}}", registry.address());
    fs::write(config.join("config.json"), text).unwrap_or_else(|error| panic!("{error}"));
    let (code, log) = job.build(&["-t", &name, "--push"])?;
    assert_eq!(code, Some(0), "{log}");
    output(Command::new("skopeo").args(["inspect", "--tls-verify=false", "--creds=anna:pass:word", &format!("docker://{name}")]))?;
    Ok(())
}
