//! Fault injection: kills, full and read-only disks, damaged files, builds and a prune at once. After each the next build is
//! right and nothing is left behind.
//!
//! `OVENBIRD_FAULTS` says how many builds are killed, `cargo xtask faults N` prints the table.

use std::fmt::Write as _;
use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ovenbird_testing::base::Base;
use ovenbird_testing::command::{Level, Workspace, finish};
use ovenbird_testing::needs::{self, Need};
use ovenbird_testing::registry::{Options, Registry};
use ovenbird_testing::{Error, Result, process};

const LIMIT: Duration = Duration::from_mins(2);

const DOCKERFILE: &str = r"FROM busybox AS made
RUN i=0; while [ $i -lt 60 ]; do echo $i > /f$i; i=$((i+1)); done; chown 7:8 /f1
COPY data /data
RUN cat /data/* | sha256sum > /sum
FROM busybox
COPY --from=made /sum /f1 /
COPY data /data
RUN sleep 0.05; mkdir /done && echo done > /done/file && chown -R 5:6 /done
";

/// Repeatable chance.
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit.max(1)
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.below(256) as u8).collect()
    }
}

/// A context, a registry and a state folder.
struct Job {
    room: Workspace,
    registry: Registry,
    state: PathBuf,
}

impl Job {
    fn new(level: Level) -> Result<Self> {
        let room = Workspace::new(level)?;
        let registry = Registry::start_with(Options { bases: &[Base::Busybox], credentials: None })?;
        let context = room.path().join("ctx");
        fs::create_dir_all(context.join("data")).unwrap();
        fs::write(context.join("Dockerfile"), DOCKERFILE).unwrap();
        let mut chance = Chance(7);
        for number in 0..20 {
            fs::write(context.join(format!("data/{number}")), chance.bytes(20_000)).unwrap();
        }
        fs::write(room.path().join("settings.toml"), registry.settings_toml()).unwrap();
        room.give_tree(&context)?;
        let state = room.path().join("state");
        Ok(Self { room, registry, state })
    }

    fn ovenbird(&self, words: &[&str]) -> Command {
        let mut command = self.room.ovenbird();
        command.args(words).arg("--root").arg(&self.state).arg("--settings").arg(self.room.path().join("settings.toml"));
        command
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let name = format!("{}/app:1", self.registry.address());
        let mut command = self.ovenbird(&["build", "--progress", "plain", "--reproducible", "-t", &name, "--push"]);
        command.args(arguments).arg(self.room.path().join("ctx"));
        command
    }

    /// Builds and pushes: the digest, or exit code and log.
    fn build(&self, arguments: &[&str]) -> Result<std::result::Result<String, (Option<i32>, String)>> {
        Self::run(&mut self.command(arguments))
    }

    fn run(command: &mut Command) -> Result<std::result::Result<String, (Option<i32>, String)>> {
        let (code, log) = finish(command, None, LIMIT)?;
        if code != Some(0) {
            return Ok(Err((code, log)));
        }
        let digest = log.lines().rev().find(|line| line.starts_with("sha256:")).unwrap_or_default();
        Ok(Ok(digest.to_owned()))
    }

    /// Prunes; what it said.
    fn prune(&self, words: &[&str]) -> String {
        let (code, log) = finish(&mut self.ovenbird(words), None, LIMIT).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(code, Some(0), "{log}");
        log
    }

    /// The digest of a build that nothing disturbs.
    fn right(&self) -> Result<String> {
        let digest = self.build(&[])?.unwrap_or_else(|(code, log)| panic!("{code:?}\n{log}"));
        assert_eq!(digest.len(), 71, "{digest:?}");
        Ok(digest)
    }

    /// The next build gives `expect` at once (`true`), or refuses cleanly and the one after that does.
    fn recovers(&self, what: &str, expect: &str) -> Result<bool> {
        let at_once = match self.build(&[])? {
            Ok(digest) => {
                assert_eq!(digest, expect, "{what}");
                true
            }
            Err((code, log)) => {
                // A clean refusal: no bug of ours, no signal, no panic.
                assert!(code.is_some_and(|code| code > 1 && code < 100), "{what}: {code:?}\n{log}");
                assert!(!log.contains("panicked"), "{what}: {log}");
                let again = self.build(&[])?.unwrap_or_else(|(code, again)| panic!("{what}: {code:?}\n{log}\nthen\n{again}"));
                assert_eq!(again, expect, "{what}");
                println!("not at once: {what}\n{log}");
                false
            }
        };
        self.nothing_is_left(what);
        Ok(at_once)
    }

    /// No mount, no process, no namespace, no temporary file.
    fn nothing_is_left(&self, what: &str) {
        let place = self.room.path().display().to_string();
        let end = Instant::now() + Duration::from_secs(5);
        loop {
            let left = processes_of(&place);
            if left.is_empty() {
                break;
            }
            assert!(Instant::now() < end, "{what}: left behind: {left:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        let own = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mounts: Vec<&str> = own.lines().filter(|line| line.contains(&place) && !line.contains(" - tmpfs fault")).collect();
        assert!(mounts.is_empty(), "{what}: {mounts:?}");
        for dir in ["store/tmp", "real/tmp", "mapped/tmp", "recorded/tmp"] {
            let left: Vec<_> = fs::read_dir(self.state.join(dir)).into_iter().flatten().flatten().map(|e| e.file_name()).collect();
            // The folder of a build that ended; its lock file stays until the next one.
            let left: Vec<_> = left.iter().filter(|name| !name.to_string_lossy().ends_with(".lock")).collect();
            assert!(left.is_empty(), "{what}: {dir} holds {left:?}");
        }
        let known = ["version", "lock", "store", "origins", "leak-key", "contexts.stat", "real", "mapped", "recorded"];
        for entry in fs::read_dir(&self.state).into_iter().flatten().flatten() {
            assert!(known.iter().any(|name| entry.file_name() == *name), "{what}: {} is left", entry.path().display());
        }
    }
}

/// Processes that have the place in their arguments, or among the mounts of a namespace of their own, other than this one. A namespace that
/// nobody is in lives only by a mount.
fn processes_of(place: &str) -> Vec<String> {
    let mut found = vec![];
    let own = fs::read_link("/proc/self/ns/mnt").unwrap_or_default();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        let arguments = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ");
        let elsewhere = fs::read_link(entry.path().join("ns/mnt")).is_ok_and(|namespace| namespace != own);
        // The disks that tests mount are seen by whoever unshares meanwhile.
        let mounts = || fs::read_to_string(entry.path().join("mountinfo")).unwrap_or_default();
        let mounted = elsewhere && mounts().lines().any(|line| line.contains(&format!("{place}/")) && !line.contains(" - tmpfs fault"));
        if pid != std::process::id() && (mounted || arguments.contains(&format!("{place}/"))) {
            found.push(format!("{pid} {arguments}"));
        }
    }
    found
}

fn row(fault: &str, runs: usize, at_once: usize) {
    let line = format!("| {fault} | {runs} | {at_once} | {} |\n", runs - at_once);
    print!("{line}");
    if let Some(path) = std::env::var_os("OVENBIRD_FAULTS_TABLE") {
        let file = OpenOptions::new().append(true).create(true).open(path);
        file.and_then(|mut file| file.write_all(line.as_bytes())).unwrap_or_else(|error| panic!("the table: {error}"));
    }
}

fn wanted() -> usize {
    std::env::var("OVENBIRD_FAULTS").ok().and_then(|text| text.parse().ok()).unwrap_or(10)
}

#[test]
fn killed_at_any_moment() -> Result<()> {
    if !needs::available("faults_kill", &[Need::Run, Need::Registry]) {
        return Ok(());
    }
    let job = Job::new(Level::Own)?;
    let expect = job.right()?;
    let start = Instant::now();
    job.build(&["--no-cache"])?.unwrap_or_else(|(_, log)| panic!("{log}"));
    let whole = start.elapsed().as_micros() as u64;
    let mut chance = Chance(0x9e37_79b9 ^ u64::from(std::process::id()));
    let (mut at_once, runs) = (0, wanted());
    for number in 0..runs {
        // Some on an empty folder, so that base images and formats are being made.
        if number % 5 == 4 {
            let _ = fs::remove_dir_all(&job.state);
        }
        let delay = Duration::from_micros(chance.below(whole * 11 / 10));
        let start = |source| Error::Start { program: "ovenbird".into(), source };
        let mut child = job.command(&["--no-cache"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().map_err(start)?;
        std::thread::sleep(delay);
        let _ = child.kill();
        let _ = child.wait();
        at_once += usize::from(job.recovers(&format!("killed after {delay:?}"), &expect)?);
    }
    row("kill -9", runs, at_once);
    assert_eq!(at_once, runs, "after a kill the very next build is right");
    Ok(())
}

/// Files of the state folder whose path fits, sorted.
fn files(dir: &Path, fits: &dyn Fn(&str) -> bool) -> Vec<PathBuf> {
    let mut found = vec![];
    let mut open = vec![dir.to_owned()];
    while let Some(path) = open.pop() {
        for entry in fs::read_dir(&path).into_iter().flatten().flatten() {
            let path = entry.path();
            let inside = path.strip_prefix(dir).unwrap_or(&path).to_string_lossy().into_owned();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                // What a step made is the image's, not ours.
                if !inside.ends_with("/fs") {
                    open.push(path);
                }
            } else if fits(&inside) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// Damages a file in one of three ways; it stays writable by us only.
fn damage(path: &Path, chance: &mut Chance) -> &'static str {
    let mut bytes = fs::read(path).unwrap();
    let what = match chance.below(4) {
        0 => {
            bytes.clear();
            "emptied"
        }
        1 => {
            bytes.truncate(bytes.len() / 2);
            "cut short"
        }
        _ => {
            let at = chance.below(bytes.len() as u64) as usize;
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << chance.below(7);
            }
            "flipped"
        }
    };
    let mode = fs::metadata(path).unwrap().permissions();
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let mut file = OpenOptions::new().write(true).truncate(true).open(path).unwrap();
    file.write_all(&bytes).unwrap();
    fs::set_permissions(path, mode).unwrap();
    what
}

fn damaged(test: &str, level: Level, kinds: &[(&str, &dyn Fn(&str) -> bool)]) -> Result<()> {
    let mut wanted_here = vec![Need::Run, Need::Registry];
    if level != Level::Own {
        wanted_here.push(Need::Users);
    }
    if !needs::available(test, &wanted_here) {
        return Ok(());
    }
    let job = Job::new(level)?;
    let expect = job.right()?;
    let mut chance = Chance(u64::from(std::process::id()) | 1 << 40);
    for (kind, fits) in kinds {
        let (mut at_once, runs) = (0, (wanted() / 5).max(2));
        for _ in 0..runs {
            let found = files(&job.state, fits);
            assert!(!found.is_empty(), "no {kind}");
            let mut told = format!("{kind}:");
            for _ in 0..=chance.below(3) {
                let path = &found[chance.below(found.len() as u64) as usize];
                let _ = write!(told, " {} {}", path.strip_prefix(&job.state).unwrap_or(path).display(), damage(path, &mut chance));
            }
            // A new registry holds nothing: everything must be sent from here.
            let _ = process::output(Command::new("find").arg(job.registry.storage()).args(["-path", "*repositories/app*", "-delete"]));
            at_once += usize::from(job.recovers(&told, &expect)?);
        }
        row(kind, runs, at_once);
        assert_eq!(at_once, runs, "{kind}: the very next build is right");
    }
    Ok(())
}

#[test]
fn damaged_files() -> Result<()> {
    damaged(
        "faults_damage",
        Level::Own,
        &[
            ("damaged blobs", &|path| path.starts_with("store/blobs/")),
            ("damaged cache records", &|path| path.contains("/cache/")),
            ("damaged packed layers' notes", &|path| path.contains("/packed-")),
            ("damaged origins", &|path| path.starts_with("origins/")),
            ("damaged image names", &|path| path.starts_with("store/images/")),
            ("damaged traces", &|path| path.contains("/traces/")),
            ("damaged everything", &|path| !path.ends_with("version") && !path.contains("lock")),
        ],
    )
}

#[test]
fn damaged_owners() -> Result<()> {
    damaged("faults_owners", Level::SingleId, &[("damaged owners", &|path| path.ends_with("/owners"))])
}

#[test]
fn damaged_stat_cache_and_version() -> Result<()> {
    if !needs::available("faults_version", &[Need::Run, Need::Registry]) {
        return Ok(());
    }
    let job = Job::new(Level::Own)?;
    let expect = job.right()?;
    // Files that changed just now are not remembered.
    std::thread::sleep(Duration::from_secs(3));
    job.build(&["--no-cache"])?.unwrap_or_else(|(_, log)| panic!("{log}"));
    let mut chance = Chance(99);
    let (mut at_once, runs) = (0, (wanted() / 5).max(2));
    for _ in 0..runs {
        damage(&job.state.join("contexts.stat"), &mut chance);
        at_once += usize::from(job.recovers("stat cache", &expect)?);
    }
    row("damaged stat cache", runs, at_once);
    for (number, text) in ["", "\0\0", "garbage", "\u{fffd}"].iter().enumerate() {
        let path = job.state.join(if number % 2 == 0 { "version" } else { "store/version" });
        fs::write(path, text).unwrap();
        assert!(job.recovers("version", &expect)?);
    }
    row("damaged versions", 4, 4);
    Ok(())
}

/// A tmpfs at a place; gone with the value.
struct Disk(PathBuf);

impl Disk {
    fn mount(place: &Path, size: &str) -> Result<Self> {
        fs::create_dir_all(place).unwrap();
        process::output(Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "fault"]).arg(place))?;
        Ok(Self(place.to_owned()))
    }

    fn remount(&self, options: &str) -> Result<()> {
        process::output(Command::new("mount").args(["-o", &format!("remount,{options}")]).arg(&self.0)).map(drop)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn full_and_read_only_disks() -> Result<()> {
    if !needs::available("faults_disk", &[Need::Run, Need::Registry, Need::Root]) {
        return Ok(());
    }
    let job = Job::new(Level::Own)?;
    let expect = job.right()?;
    fs::remove_dir_all(&job.state).unwrap();
    let disk = Disk::mount(&job.state, "1m")?;
    let sizes = [100, 600, 1500, 2500, 3000, 3500, 4000, 4500];
    let mut failed = 0;
    for kib in sizes {
        disk.remount(&format!("size={kib}k"))?;
        if let Err((code, log)) = job.build(&["--no-cache"])? {
            failed += 1;
            // A step that finds no room fails by itself (6); a push can be told of it by the registry's client.
            assert!(matches!(code, Some(3 | 6)), "full at {kib} KiB: {code:?}\n{log}");
            assert!(log.contains("full") || log.contains("No space"), "full at {kib} KiB: {log}");
        }
    }
    assert!(failed > 2, "no disk was full");
    disk.remount("size=200m")?;
    assert!(job.recovers("full disk", &expect)?);
    row("full disk", sizes.len(), sizes.len());
    // Somebody else fills the disk, with bytes and with files: what is there can be looked at and removed all the same.
    for (number, fill) in ["size", "nr_inodes"].into_iter().enumerate() {
        let used = process::output(Command::new("df").args(["--output=used,iused", "--block-size=1"]).arg(&job.state))?;
        let used = used.lines().last().and_then(|line| line.split_whitespace().nth(number)).unwrap_or_default().to_owned();
        disk.remount(&format!("{fill}={used}"))?;
        assert!(fs::write(job.state.join("filler"), "x").is_err(), "the disk has room: {fill}={used}");
        let (code, log) = job.build(&["--no-cache"])?.unwrap_err();
        assert!(code == Some(3) && log.contains("full"), "{code:?} {log}");
        let freed = job.prune(&["prune", "--all"]);
        assert!(!freed.contains("removed 0 ") && !freed.contains("in use"), "{freed}");
        disk.remount(&format!("{fill}={}", ["200m", "0"][number]))?;
        let _ = fs::remove_file(job.state.join("filler"));
        assert!(job.recovers("pruned full disk", &expect)?);
    }
    row("prune on a full disk", 2, 2);
    disk.remount("ro")?;
    for arguments in [&[][..], &["--no-cache"]] {
        let Err((code, log)) = job.build(arguments)? else { panic!("built on a read-only disk") };
        assert_eq!(code, Some(3), "{log}");
        assert!(log.contains("writable"), "{log}");
    }
    disk.remount("rw")?;
    assert!(job.recovers("read-only disk", &expect)?);
    row("read-only disk", 2, 2);
    Ok(())
}

#[test]
fn builds_and_a_prune_at_once() -> Result<()> {
    if !needs::available("faults_prune", &[Need::Run, Need::Registry]) {
        return Ok(());
    }
    let job = Job::new(Level::Own)?;
    let expect = job.right()?;
    let runs = (wanted() / 5).max(2);
    let mut prunes = 0;
    for number in 0..runs {
        std::thread::scope(|scope| {
            let build = |arguments: &'static [&'static str]| {
                let job = &job;
                scope.spawn(move || job.build(arguments).map_err(|error| error.to_string()))
            };
            let builds = [build(&["--no-cache"]), build(&[])];
            let words = [&["prune"][..], &["prune", "--reserved-space", "1m"], &["df", "--verbose"], &["prune", "--all"]];
            while !builds.iter().all(std::thread::ScopedJoinHandle::is_finished) {
                job.prune(words[prunes % words.len()]);
                prunes += 1;
            }
            for build in builds {
                let digest = build.join().unwrap().unwrap().unwrap_or_else(|(code, log)| panic!("run {number}: {code:?}\n{log}"));
                assert_eq!(digest, expect);
            }
        });
        assert!(job.recovers("prune", &expect)?);
    }
    assert!(prunes > 3 * runs, "prune waits: {prunes} beside {runs} builds");
    row("two builds and a prune", runs, runs);
    Ok(())
}

/// A build whose step runs until it is told to end, or is killed.
struct Running {
    child: std::process::Child,
    log: PathBuf,
}

impl Running {
    /// Returns when the step runs.
    fn start(job: &Job, name: &str) -> Result<Self> {
        let context = job.room.path().join(name);
        fs::create_dir_all(&context).unwrap();
        let text = format!(
            "FROM busybox\nRUN echo {name} > /before\nRUN --mount=type=cache,target=/c echo started{name} | tr -d 0; \
             cat /before > /c/b; i=0; while [ $i -lt 30 ]; do sleep 0.1; i=$((i+1)); done; cat /before /c/b > /after\n\
             RUN cat /after /before\n"
        );
        fs::write(context.join("Dockerfile"), text).unwrap();
        job.room.give_tree(&context)?;
        let log = job.room.path().join(format!("{name}.log"));
        let file = fs::File::create(&log).unwrap();
        let mut command = job.ovenbird(&["build", "--progress", "plain", "-t", name]);
        command.arg(&context).stdout(Stdio::null()).stderr(file);
        let child = command.spawn().map_err(|source| Error::Start { program: "ovenbird".into(), source })?;
        let this = Self { child, log };
        let end = Instant::now() + LIMIT;
        // Not the command's own text, which has a zero in it.
        while !this.log().contains(&format!("started{name}").replace('0', "")) {
            assert!(Instant::now() < end, "{}", this.log());
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(this)
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

#[test]
fn prune_goes_on_while_a_step_runs() -> Result<()> {
    if !needs::available("faults_running", &[Need::Run, Need::Registry]) {
        return Ok(());
    }
    let job = Job::new(Level::Own)?;
    let expect = job.right()?;
    let mut running = Running::start(&job, "lives0")?;
    let said = job.prune(&["prune", "--all"]);
    assert!(running.child.try_wait().unwrap().is_none(), "prune waited for the build\n{}", running.log());
    assert!(!said.contains("removed 0 ") && said.contains("in use"), "{said}");
    let listed = process::output(&mut job.ovenbird(&["df", "--verbose"]))?;
    assert!(listed.contains("exec.cachemount") && listed.contains("yes"), "{listed}");
    assert!(running.child.wait().unwrap().success(), "{}", running.log());
    // What it used is a matter of its life, however that ends.
    assert!(!job.prune(&["prune", "--all"]).contains("in use"));
    let runs = (wanted() / 10).max(2);
    for number in 0..runs {
        assert!(job.recovers("prune beside a step", &expect)?);
        let mut running = Running::start(&job, &format!("dies0{number}"))?;
        assert!(job.prune(&["prune"]).contains("in use"));
        let _ = running.child.kill();
        let _ = running.child.wait();
        let said = job.prune(&["prune", "--all"]);
        assert!(!said.contains("in use"), "a lease outlived its process: {said}");
        job.nothing_is_left("a killed build's lease");
        assert_eq!(files(&job.state, &|path| path.contains("blobs/") || path.contains("/cache/")), Vec::<PathBuf>::new());
    }
    row("prune beside a killed build", runs, runs);
    Ok(())
}

#[test]
fn a_killed_prune_loses_nothing() -> Result<()> {
    if !needs::available("faults_killed_prune", &[Need::Run, Need::Registry]) {
        return Ok(());
    }
    let job = Job::new(Level::Own)?;
    let expect = job.right()?;
    let start = Instant::now();
    job.prune(&["prune"]);
    let whole = start.elapsed().as_micros() as u64;
    let mut chance = Chance(0x51_7cc1 ^ u64::from(std::process::id()));
    let (mut at_once, runs) = (0, wanted());
    for number in 0..runs {
        job.right()?;
        let words: &[&str] = [&["prune"][..], &["prune", "--all"], &["prune", "--max-used-space", "1"]][number % 3];
        let delay = Duration::from_micros(chance.below(whole * 11 / 10));
        let start = |source| Error::Start { program: "ovenbird".into(), source };
        let mut child = job.ovenbird(words).stdout(Stdio::null()).stderr(Stdio::null()).spawn().map_err(start)?;
        std::thread::sleep(delay);
        let _ = child.kill();
        let _ = child.wait();
        if !words.contains(&"--all") {
            let images = process::output(&mut job.ovenbird(&["images"]))?;
            assert!(images.contains("/app"), "{images}");
        }
        at_once += usize::from(job.recovers(&format!("prune killed after {delay:?}"), &expect)?);
    }
    row("kill -9 of prune", runs, at_once);
    assert_eq!(at_once, runs, "after a kill the very next build is right");
    Ok(())
}

/// What a killed export leaves beside its place goes with the next export to that folder.
#[test]
fn killed_exports() -> Result<()> {
    if !needs::available("faults_export", &[Need::Run, Need::Registry]) {
        return Ok(());
    }
    let job = Job::new(Level::Own)?;
    job.right()?;
    let out = job.room.path().join("out");
    fs::create_dir(&out).unwrap();
    job.room.give(&out)?;
    let export = |to: &str| {
        let mut command = job.ovenbird(&["build", "--progress", "plain", "--reproducible", "-o", to]);
        command.arg(job.room.path().join("ctx")).current_dir(&out);
        command
    };
    let left = || files(&out, &|path| path.contains(".ovenbird-")).len();
    let forms = ["type=oci,dest=a.tar", "type=docker,dest=b.tar", "type=oci,tar=false,dest=c", "type=local,dest=.", "type=tar,dest=d.tar"];
    let (mut chance, mut killed_halfway) = (Chance(0x2545_f491 ^ u64::from(std::process::id())), 0);
    let runs = (wanted() / 5).max(2) * forms.len();
    for number in 0..runs {
        let form = forms[number % forms.len()];
        let start = Instant::now();
        let (code, log) = finish(&mut export(form), None, LIMIT)?;
        assert_eq!((code, left()), (Some(0), 0), "{form}\n{log}");
        let delay = Duration::from_micros(chance.below(start.elapsed().as_micros() as u64));
        let start = |source| Error::Start { program: "ovenbird".into(), source };
        let mut child = export(form).stdout(Stdio::null()).stderr(Stdio::null()).spawn().map_err(start)?;
        std::thread::sleep(delay);
        let _ = child.kill();
        let _ = child.wait();
        killed_halfway += usize::from(left() > 0);
        let (code, log) = finish(&mut export(form), None, LIMIT)?;
        assert_eq!((code, left()), (Some(0), 0), "{form} killed after {delay:?}\n{log}");
        job.nothing_is_left(form);
    }
    println!("{killed_halfway} of {runs} left something");
    row("kill -9 of an export", runs, runs);
    Ok(())
}

/// `df` says what `du` says, and `prune` keeps its budget.
#[test]
fn df_is_du_and_prune_keeps_a_budget() -> Result<()> {
    if !needs::available("faults_df", &[Need::Run, Need::Registry]) {
        return Ok(());
    }
    let job = Job::new(Level::Own)?;
    let expect = job.right()?;
    let total = || -> Result<u64> {
        let said = process::output(&mut job.ovenbird(&["df", "--json"]))?;
        let said: serde_json::Value = serde_json::from_str(&said).unwrap();
        let sum = said.as_object().unwrap().values().filter_map(serde_json::Value::as_u64).sum();
        let du = process::output(Command::new("du").args(["-s", "--block-size=1"]).arg(&job.state))?;
        let du: u64 = du.split_whitespace().next().unwrap().parse().unwrap();
        // The folder of the running command itself: its lock and its temporary folder.
        assert!(du.abs_diff(sum) <= 16 << 10, "df {sum} du {du}");
        Ok(sum)
    };
    let whole = total()?;
    for percent in [80, 50, 30] {
        let budget = whole * percent / 100;
        process::output(&mut job.ovenbird(&["prune", "--all", "--reserved-space", &budget.to_string()]))?;
        assert!(total()? <= budget, "{percent} % of {whole}: {}", total()?);
    }
    process::output(&mut job.ovenbird(&["prune", "--filter", "until=24h"]))?;
    assert!(!files(&job.state, &|path| path.contains("/traces/")).is_empty());
    assert_eq!(job.right()?, expect);
    process::output(&mut job.ovenbird(&["prune", "--all"]))?;
    assert_eq!(
        files(&job.state, &|path| path.contains("/traces/") || path.contains("blobs/") || path.contains("/cache/")),
        Vec::<PathBuf>::new()
    );
    assert_eq!(job.right()?, expect);
    Ok(())
}
