//! The program as it is run: what goes to which stream, and exit codes. Builds here have no `RUN`, so they work on every machine.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

struct Home {
    dir: tempfile::TempDir,
}

impl Home {
    fn new(files: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        Self { dir }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ovenbird"));
        let path = std::env::var_os("PATH").unwrap_or_default();
        command.env_clear().env("PATH", path).env("HOME", self.dir.path()).current_dir(self.dir.path());
        command.args(line.split(' ').filter(|w| !w.is_empty()));
        command
    }

    fn run(&self, line: &str) -> Ran {
        self.run_with(line, b"", &[])
    }

    fn run_with(&self, line: &str, stdin: &[u8], vars: &[(&str, &str)]) -> Ran {
        let mut command = self.command(line);
        command.envs(vars.iter().copied()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // A program that fails early does not read its input.
        let _ = child.stdin.take().unwrap().write_all(stdin);
        let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
        Ran { code: status.code().unwrap(), stdout, stderr: String::from_utf8(stderr).unwrap() }
    }
}

#[derive(Debug)]
struct Ran {
    code: i32,
    stdout: Vec<u8>,
    stderr: String,
}

impl Ran {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard output of a command that must succeed.
    fn ok(&self) -> String {
        assert_eq!(self.code, 0, "{self:?}");
        self.text()
    }
}

const SIMPLE: &[(&str, &str)] = &[("c/Dockerfile", "FROM scratch\nCOPY a /a\nENV X=1\n"), ("c/a", "hello")];

#[test]
fn exit_codes_and_what_is_said() {
    let home = Home::new(&[
        ("c/Dockerfile", "FROM scratch\nCOPY a /a\n"),
        ("c/a", "hello"),
        ("bad/Dockerfile", "FROM scratch\nCOPPY a /a\n"),
        ("missing/Dockerfile", "FROM scratch\nCOPY none /a\n"),
        ("empty/x", ""),
        ("bad.toml", "rot = '/x'\n"),
        ("file", ""),
    ]);
    for (line, code, expect) in [
        ("", 2, "Usage: ovenbird"),
        ("bild", 2, "build"),
        ("build --cache-from type=gha c", 2, "caches of type=gha are not supported"),
        ("build --push c", 2, "hint: name it: -t"),
        ("build -t UPPER c", 2, "is not an image name"),
        ("build http://me:pw@127.0.0.1:1/x.git", 5, "the build context http://***@127.0.0.1:1/x.git cannot be fetched"),
        ("build http://127.0.0.1/x.git?what=1", 2, "unexpected query"),
        ("build -f - -", 2, "both the context and the Dockerfile"),
        ("--settings bad.toml build c", 3, "hint: did you mean `root`?"),
        ("--settings none.toml images", 3, "cannot read the settings file"),
        ("--root file/x images", 3, "cannot make the state directory"),
        ("build bad", 4, "COPPY"),
        ("build nowhere", 5, "the build context nowhere does not exist"),
        ("build empty", 5, "there is no Dockerfile at empty/Dockerfile"),
        ("build -f gone c", 5, "there is no Dockerfile at gone"),
        ("build missing", 5, ">>> COPY none /a"),
        ("build --secret id=a,src=gone c", 5, "secret \"a\": cannot read gone"),
        ("inspect nothing", 2, "there is no image nothing:latest"),
        ("tag nothing other", 2, "there is no image nothing:latest"),
        ("rmi nothing", 2, "there is no image nothing"),
        ("login -u me", 2, "--password-stdin"),
        ("export x", 2, "--output"),
        ("prune --filter type=frontend", 2, "ovenbird keeps nothing of the type frontend; it has regular, exec.cachemount, source.local"),
        ("prune --filter shared", 2, "there is no filter \"shared\"; there are until, type and id"),
        ("prune --max-used-space lots", 2, "invalid value 'lots'"),
    ] {
        let ran = home.run(line);
        assert_eq!(ran.code, code, "{line}: {ran:?}");
        assert!(ran.stderr.contains(expect), "{line}: {}", ran.stderr);
        assert!(ran.stdout.is_empty(), "{line}: {ran:?}");
    }
}

/// `lint` and `build --check`: findings on standard output, the verdict as exit code and on standard error.
#[test]
fn findings_in_a_dockerfile() {
    let home = Home::new(&[
        ("good/Dockerfile", "FROM scratch\nCOPY a /a\n"),
        ("warn/Dockerfile", "FROM scratch AS Base\nCOPY a /a\n"),
        ("strict/Dockerfile", "# check=error=true\nFROM scratch AS Base\nCOPY a /a\n"),
        ("skip/Dockerfile", "# check=skip=all\nFROM scratch AS Base\nCOPY a /a\n"),
        ("bad/Dockerfile", "FROM scratch AS Base\nCOPPY a /a\n"),
        ("ignored/Dockerfile", "FROM scratch\nCOPY a b /x/\n"),
        ("ignored/.dockerignore", "a"),
        ("ignored/other", "FROM scratch\nCOPY a b /x/\n"),
        ("ignored/other.dockerignore", "b"),
        ("gone/Dockerfile", "FROM 127.0.0.1:1/gone AS Base\nENV A=$B\n"),
        ("args/Dockerfile", "ARG A\nFROM scratch AS one\nENV X=$A\nFROM scratch\nENV X=$C\n"),
    ]);
    for (line, code, expect, verdict) in [
        ("lint good", 0, "good/Dockerfile: no findings\n", ""),
        (
            "lint warn",
            4,
            "warning[StageNameCasing]: Stage name 'Base' should be lowercase\n  --> warn/Dockerfile:1:17\n",
            "has 1 finding\n",
        ),
        ("lint warn", 4, "= see: docs/reference/lint/StageNameCasing.md\n", ""),
        ("lint warn/Dockerfile", 4, "[StageNameCasing]", "error: warn/Dockerfile has 1 finding\n"),
        ("lint -f warn/Dockerfile good", 4, "[StageNameCasing]", ""),
        ("lint --failure-threshold error warn", 0, "[StageNameCasing]", ""),
        ("lint --failure-threshold error strict", 4, "error[StageNameCasing]", ""),
        ("lint --failure-threshold error bad", 4, "warning[StageNameCasing]", "has 1 finding\n"),
        ("lint --failure-threshold none bad", 0, "error[unknown-instruction]", ""),
        ("lint --build-arg BUILDKIT_DOCKERFILE_CHECK=skip=StageNameCasing warn", 0, "no findings", ""),
        ("lint skip", 0, "no findings", ""),
        ("lint bad", 4, "error[unknown-instruction]", "has 2 findings\n"),
        ("build --check bad", 4, "error[unknown-instruction]", "has 2 findings\n"),
        ("build --check bad", 4, "warning[StageNameCasing]", ""),
        ("build --call=check warn", 4, "[StageNameCasing]", ""),
        ("build --check good", 0, "no findings", ""),
        ("build --check --secret id=a,src=none good", 0, "no findings", ""),
        ("build --check --iidfile id --metadata-file m good", 2, "", "--iidfile with --check is not supported"),
        ("build --check --plugin pre_build:nope good", 2, "", "--plugin with --check is not supported"),
        ("lint ignored", 4, "Attempting to Copy file \"a\"", ""),
        ("build --check ignored", 4, "Attempting to Copy file \"a\"", ""),
        ("lint ignored/other", 4, "Attempting to Copy file \"b\"", ""),
        ("lint args", 4, "undefined variable '$C'", "has 2 findings\n"),
        ("lint args --target one", 4, "undefined variable '$A'", "has 1 finding\n"),
        ("lint good --build-arg NOBODY=1", 0, "warning[UnconsumedBuildArg]", ""),
        ("lint gone", 4, "[StageNameCasing]", "note: not checked: variables, shell and platform of 127.0.0.1:1/gone"),
        ("lint --offline gone", 4, "[StageNameCasing]", "cannot be looked up: --offline was given\n"),
        ("lint none", 5, "", "the build context none does not exist"),
        ("lint --format xml good", 2, "", "invalid value 'xml'"),
        ("lint --platform a/b/c/d good", 2, "", "invalid value"),
    ] {
        let ran = home.run(line);
        assert_eq!(ran.code, code, "{line}: {ran:?}");
        assert!(ran.text().contains(expect), "{line}: {ran:?}");
        assert!(ran.stderr.contains(verdict), "{line}: {ran:?}");
    }
    // The same findings from every command, and in the build before it fails.
    let [lint, check] = ["lint bad", "build --check bad"].map(|line| home.run(line).text());
    assert_eq!(lint, check);
    let build = home.run("build bad");
    assert!(build.stderr.contains(&lint.replace("bad/", "")) && build.code == 4, "{build:?}");
    let build = home.run("build -t x ignored");
    assert!(build.stderr.contains("CopyIgnoredFile") && build.code == 5, "{build:?}");
    let stdin = home.run_with("lint -", b"FROM scratch AS Base\n", &[]);
    assert_eq!((stdin.code, stdin.text().contains("--> Dockerfile:1:17")), (4, true), "{stdin:?}");
}

#[test]
fn a_check_of_files_without_images_touches_no_state() {
    let home = Home::new(&[("c/Dockerfile", "FROM scratch\nCOPY a /\n"), ("file", "")]);
    assert_eq!(home.run("--root file/x lint c").ok(), "c/Dockerfile: no findings\n");
    assert!(!home.dir.path().join(".local").exists());
}

#[test]
fn findings_for_programs() {
    let home = Home::new(&[("a b/Dockerfile", "FROM scratch AS Base\nCOPPY a /a\n"), ("good/Dockerfile", "FROM scratch\n")]);
    let run = |format: &str, context: &str| {
        let mut command = home.command("lint --failure-threshold none --format");
        let output = command.args([format, context]).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let rows = run("json", "a b");
    let [stage, instruction] = rows.as_array().unwrap().as_slice() else { panic!("{rows}") };
    assert_eq!(
        *stage,
        serde_json::json!({
            "rule": "StageNameCasing", "severity": "warning", "message": "Stage name 'Base' should be lowercase", "file": "a b/Dockerfile",
            "line": 1, "column": 17, "endLine": 1, "endColumn": 21, "help": "write `base`",
            "page": "docs/reference/lint/StageNameCasing.md",
        })
    );
    assert_eq!((&instruction["severity"], &instruction["line"]), (&"error".into(), &2.into()));
    assert_eq!(run("json", "good"), serde_json::json!([]));
    let sarif = run("sarif", "a b");
    let results = sarif["runs"][0]["results"].as_array().unwrap();
    assert_eq!((results.len(), &results[0]["ruleId"]), (2, &"StageNameCasing".into()));
    assert_eq!(results[0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"], "a%20b/Dockerfile");
    assert_eq!(run("sarif", "good")["runs"][0]["results"], serde_json::json!([]));
}

#[test]
fn results_go_to_standard_output() {
    let home = Home::new(&[]);
    for (line, expect) in [
        ("--version", "ovenbird 0."),
        ("version", "ovenbird 0."),
        ("version --json", "\"version\": \"0."),
        ("build --help", "--build-arg <NAME[=VALUE]>"),
        ("completions bash", "_ovenbird()"),
        ("images", "NAME"),
        ("images --json", "[]"),
        ("df --json", "\"blobs\":"),
        ("prune", "removed 0 entries, 0B"),
    ] {
        let out = home.run(line).ok();
        assert!(out.contains(expect), "{line}: {out}");
    }
    assert!(!home.run("build --help").ok().contains("--squash"), "refused flags are not offered");
}

#[test]
fn a_build_prints_its_digest_only() {
    let home = Home::new(SIMPLE);
    let ran = home.run("build -t demo:1 --reproducible --iidfile id --metadata-file meta.json c");
    let out = ran.ok();
    let digest = out.trim_end();
    assert!(digest.starts_with("sha256:") && digest.len() == 71 && out.lines().count() == 1, "{out}");
    assert!(ran.stderr.starts_with("isolation: "), "{}", ran.stderr);
    assert!(ran.stderr.contains("COPY a /a"), "{}", ran.stderr);

    let meta = std::fs::read_to_string(home.path("meta.json")).unwrap();
    assert!(meta.contains(digest) && meta.contains("docker.io/library/demo:1"), "{meta}");
    let id = std::fs::read_to_string(home.path("id")).unwrap();
    assert!(id.starts_with("sha256:") && id.len() == 71 && id != digest, "{id}");

    let again = home.run("build -q --reproducible c");
    assert_eq!((again.ok().trim_end(), again.stderr.as_str()), (digest, ""));
    let elsewhere = Home::new(SIMPLE);
    assert_eq!(elsewhere.run("build -q --reproducible c").ok(), out, "another folder, another state directory");
    let told = home.run("build --reproducible c");
    assert!(told.stderr.contains("CACHED"), "{}", told.stderr);

    let json = home.run("build --progress rawjson c");
    assert!(json.stderr.lines().all(|l| l.starts_with("{\"event\":\"")), "{}", json.stderr);
}

#[test]
fn images_are_kept_named_shown_and_removed() {
    let home = Home::new(SIMPLE);
    let digest = home.run("build -q -t demo:1 -t other/demo:2 c").ok().trim_end().to_owned();
    home.run("tag demo:1 third").ok();
    let table = home.run("images").ok();
    for name in ["demo:1", "other/demo:2", "third:latest"] {
        assert!(table.contains(name), "{table}");
    }
    assert_eq!(home.run("images -q").ok().trim_end(), digest);
    for image in ["demo:1", digest.as_str(), &digest[7..19]] {
        let shown = home.run(&format!("inspect {image}")).ok();
        assert!(shown.contains("\"X=1\"") && shown.contains(&digest), "{image}: {shown}");
    }
    assert!(home.run("inspect demo:2").stderr.contains("did you mean `demo:1`?"));
    assert_eq!(home.run("rmi demo:1 third").ok(), "untagged: demo:1\nuntagged: third:latest\n");
    assert!(!home.run("images").ok().contains("demo:1"));
    assert_eq!(home.run(&format!("rmi {digest}")).ok(), "untagged: other/demo:2\n");
}

#[test]
fn what_is_listed_can_be_removed_by_its_id() {
    let home = Home::new(SIMPLE);
    home.run("build -q -t demo c").ok();
    let listed = || -> serde_json::Value { serde_json::from_str(&home.run("df --verbose --json").ok()).unwrap() };
    let entries = listed()["entries"].clone();
    assert_eq!((entries.as_array().unwrap().len(), &entries[0]["type"], &entries[0]["inUse"]), (1, &"regular".into(), &false.into()));
    let id = entries[0]["id"].as_str().unwrap();
    let table = home.run("df -v").ok();
    assert!(table.contains(&format!("{id}  regular")) && table.contains("LAST USED"), "{table}");
    for (line, expect) in [
        ("prune --filter type=exec.cachemount", "removed 0 entries"),
        ("prune --filter id=nothing", "removed 0 entries"),
        ("prune --filter until=1h", "removed 0 entries"),
        ("prune --min-free-space 1", "removed 0 entries"),
        ("prune --all --max-used-space 1 --reserved-space 1g", "removed 0 entries"),
        (&format!("prune --force --filter id={} --filter type=regular", &id[..8]), "removed 1 entry"),
    ] {
        let said = home.run(line).ok();
        assert!(said.starts_with(expect), "{line}: {said}");
    }
    assert_eq!(listed()["entries"], serde_json::json!([]));
    assert!(home.run("images").ok().contains("demo"), "its image has a name");
}

#[test]
fn outputs() {
    let home = Home::new(SIMPLE);
    home.run("build -q -t demo -o out -o type=oci,dest=oci.tar -o type=docker,dest=docker.tar -o type=oci,tar=false,dest=layout c").ok();
    assert_eq!(std::fs::read_to_string(home.path("out/a")).unwrap(), "hello");
    assert!(Path::new(&home.path("layout/index.json")).is_file());
    for archive in ["oci.tar", "docker.tar"] {
        assert!(std::fs::metadata(home.path(archive)).unwrap().len() > 1024, "{archive}");
    }
    assert!(!home.run("images").ok().contains("demo"), "outputs that are files only do not name an image here");

    let tar = home.run("build -o - c");
    assert_eq!(tar.code, 0, "{}", tar.stderr);
    assert!(tar.stdout.windows(5).any(|w| w == b"hello") && tar.stdout.len().is_multiple_of(512));
    assert!(home.run("build -t demo c").ok().starts_with("sha256:"));
    let exported = home.run_with("export demo -o type=docker", b"", &[("DOCKER_HOST", "unix:///nowhere/docker.sock")]);
    assert_eq!(exported.code, 10, "no Docker Engine listens at the address given: {exported:?}");
    home.run("export demo -o exported").ok();
    assert_eq!(std::fs::read_to_string(home.path("exported/a")).unwrap(), "hello");
}

#[test]
fn sources_on_standard_input_and_in_the_environment() {
    let home = Home::new(SIMPLE);
    let text = b"FROM scratch\nARG V\nLABEL v=$V\n";
    for (line, stdin, vars, expect) in [
        ("build -q -t a -", &text[..], &[][..], "\"v\": \"\""),
        ("build -q -t a --build-arg V=1 -f - c", text, &[], "\"v\": \"1\""),
        ("build -q -t a --build-arg V -f - c", text, &[("V", "2")], "\"v\": \"2\""),
    ] {
        let ran = home.run_with(line, stdin, vars);
        assert_eq!(ran.code, 0, "{line}: {ran:?}");
        let shown = home.run("inspect a").ok();
        assert!(shown.contains(expect), "{line}: {shown}");
    }
    let root = home.path("elsewhere");
    home.run_with("build -q -t b c", b"", &[("OVENBIRD_ROOT", &root)]).ok();
    assert!(Path::new(&root).is_dir() && !home.run("images -q").ok().is_empty());
}

#[test]
fn the_doctor_looks_at_everything() {
    let home = Home::new(&[]);
    let ran = home.run_with("doctor --json", b"", &[("DOCKER_HOST", "unix:///nowhere/docker.sock")]);
    assert!(ran.code == 0 || ran.code == 8, "{ran:?}");
    let text = ran.text();
    for expect in [
        "\"sandbox\":",
        "\"levels\":",
        "\"newuidmap\":",
        "\"state directory\":",
        "cannot reach the Docker Engine at unix:///nowhere/docker.sock",
    ] {
        assert!(text.contains(expect), "{expect}: {text}");
    }
}

/// `id`: what moves it and what does not. The reference is a build of a folder; each row is another folder, user's choice or moment.
#[test]
fn content_id() {
    const DOCKERFILE: &str = "ARG USED=1\nARG UNUSED=1\nFROM scratch AS other\nCOPY unused /u\nFROM scratch\nARG USED\nCOPY src /src\nCOPY other /\nENV V=$USED\n";
    let made = |dockerfile: &str, change: &dyn Fn(&Path)| {
        let home = Home::new(&[
            ("deep/er/c/Dockerfile", dockerfile),
            ("deep/er/c/.dockerignore", "**/*.log\n"),
            ("deep/er/c/src/a", "hello"),
            ("deep/er/c/src/b.log", "noise"),
            ("deep/er/c/unused", "x"),
            ("deep/er/c/other", "x"),
        ]);
        let dir = home.dir.path().join("deep/er/c");
        std::os::unix::fs::symlink("a", dir.join("src/link")).unwrap();
        change(&dir);
        home
    };
    let id = |home: &Home, flags: &str| home.run(&format!("id {flags} deep/er/c")).ok().trim().to_owned();
    let first = made(DOCKERFILE, &|_| {});
    let reference = id(&first, "");
    assert!(reference.len() == 64 && reference.bytes().all(|b| b.is_ascii_hexdigit()), "{reference}");
    let rows: &[(&str, bool, &dyn Fn(&Path))] = &[
        ("another folder", true, &|_| {}),
        ("a time", true, &|dir| {
            let file = std::fs::File::options().write(true).open(dir.join("src/a")).unwrap();
            file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        }),
        ("an ignored file", true, &|dir| std::fs::write(dir.join("src/b.log"), "other noise").unwrap()),
        ("a file of an unused stage", true, &|dir| std::fs::write(dir.join("unused"), "y").unwrap()),
        ("a file that nothing copies", true, &|dir| std::fs::write(dir.join("readme"), "y").unwrap()),
        ("content", false, &|dir| std::fs::write(dir.join("src/a"), "hallo").unwrap()),
        ("a new file", false, &|dir| std::fs::write(dir.join("src/c"), "").unwrap()),
        ("a new empty folder", false, &|dir| std::fs::create_dir(dir.join("src/d")).unwrap()),
        ("a nested file", false, &|dir| {
            std::fs::create_dir_all(dir.join("src/d/e")).unwrap();
            std::fs::write(dir.join("src/d/e/f"), "").unwrap();
        }),
        ("a file that is gone", false, &|dir| std::fs::remove_file(dir.join("src/a")).unwrap()),
        ("a rename", false, &|dir| std::fs::rename(dir.join("src/a"), dir.join("src/z")).unwrap()),
        ("a mode", false, &|dir| {
            use std::os::unix::fs::PermissionsExt as _;
            std::fs::set_permissions(dir.join("src/a"), std::fs::Permissions::from_mode(0o755)).unwrap();
        }),
        ("a link's target", false, &|dir| {
            std::fs::remove_file(dir.join("src/link")).unwrap();
            std::os::unix::fs::symlink("b", dir.join("src/link")).unwrap();
        }),
        ("the ignore file lets one more in", false, &|dir| std::fs::write(dir.join(".dockerignore"), "").unwrap()),
    ];
    for (what, same, change) in rows {
        assert_eq!(id(&made(DOCKERFILE, change), "") == reference, *same, "{what}");
    }
    let text = |from: &str, to: &str| made(&DOCKERFILE.replacen(from, to, 1), &|_| {});
    for (what, same, home) in [
        ("a comment", true, text("FROM scratch\n", "# why\n\nFROM scratch\n")),
        ("an unused stage", true, text("/u", "/w")),
        ("the destination", false, text("/src", "/dst")),
        ("a variable", false, text("ENV V", "ENV W")),
        ("the order", false, text("COPY src /src\nCOPY other /\n", "COPY other /\nCOPY src /src\n")),
        ("a command", false, text("ENV V=$USED\n", "ENV V=$USED\nCMD [\"x\"]\n")),
    ] {
        assert_eq!(id(&home, "") == reference, same, "{what}");
    }
    for (flags, same) in [
        ("-t a -t b:1 --push", true),
        ("-t a:{id} -t b:{label:x} --push --if-needed", true),
        ("--no-cache --parallel 1 --memory 1g", true),
        ("--build-arg UNUSED=2 --build-arg NONE=3", true),
        ("--build-arg USED=1", true),
        ("--build-arg USED=2", false),
        ("--target other", false),
        ("--platform linux/s390x", false),
        ("--platform linux/amd64,linux/s390x", false),
        ("--label a=b", false),
        ("--annotation a=b", false),
        ("--reproducible", false),
        ("-o type=image,compression=zstd", false),
        ("-o type=image,oci-mediatypes=false", false),
        ("-f deep/er/c/Dockerfile", true),
    ] {
        assert_eq!(id(&first, flags) == reference, same, "{flags}");
    }
    let root = id(&first, "--root elsewhere");
    assert_eq!(root, reference, "another state folder");
    let parts: serde_json::Value = serde_json::from_str(&first.run("id --format json deep/er/c").ok()).unwrap();
    assert_eq!(parts["id"], format!("sha256:{reference}"));
    assert_eq!(parts["platforms"][0]["steps"].as_array().unwrap().len(), 2, "{parts}");
    first.run("plan -t a:{id} --push deep/er/c").ok();
    let shared = "--cache-from type=local,src=shared --cache-from 127.0.0.1:1/a:{date} --cache-to type=registry,ref=127.0.0.1:1/a:{date}";
    assert_eq!(id(&first, shared), reference, "caches decide nothing");
    first.run(&format!("plan {shared} deep/er/c")).ok();
    // Nothing was built.
    assert_eq!(first.run("images --quiet").ok(), "");
}

/// With `--reproducible` the id decides the digest.
#[test]
fn equal_ids_equal_digests() {
    let build = |name: &str, flags: &str| {
        let home = Home::new(SIMPLE);
        std::fs::rename(home.path("c"), home.path(name)).unwrap();
        let id = home.run(&format!("id --reproducible {flags} {name}")).ok();
        (id, home.run(&format!("build --reproducible {flags} -q {name}")).ok())
    };
    assert_eq!(build("here", ""), build("there", ""));
    let (one, other) = (build("here", ""), build("here", "--annotation a=b"));
    assert!(one.0 != other.0 && one.1 != other.1);
}

#[test]
fn builders_of_a_build() {
    let home = Home::new(&[("ctx/Dockerfile", "FROM scratch\nCOPY Dockerfile /\n")]);
    let host = format!("unix://{}", home.path("none.sock"));
    let engine = [("DOCKER_HOST", host.as_str())];
    for (flags, vars, code, says) in [
        ("--builder docker", &engine[..], 10, "cannot reach the Docker Engine at unix://"),
        ("", &[engine[0], ("OVENBIRD_BUILDER", "docker")], 10, "hint: start Docker"),
        ("--builder engine", &[engine[0], ("OVENBIRD_BUILDER", "docker")], 0, ""),
        ("--builder auto", &engine, 0, ""),
        ("--builder docker", &[("DOCKER_HOST", "ssh://far")], 3, "an engine over ssh is not supported"),
        ("--builder docker", &[("DOCKER_CONTEXT", "gone")], 3, "the docker context \"gone\" (DOCKER_CONTEXT): it does not exist"),
        ("", &[("OVENBIRD_BUILDER", "podman")], 3, "\"podman\" is no builder: expected auto, engine or docker"),
    ] {
        let ran = home.run_with(&format!("--root state build ctx --progress plain {flags}"), b"", vars);
        assert!(ran.code == code && ran.stderr.contains(says), "{flags} {vars:?}: {ran:?}");
    }
}

#[test]
fn reports_on_standard_output() {
    let home = Home::new(SIMPLE);
    let digest = home.run("build c").ok();
    let report: serde_json::Value = serde_json::from_str(&home.run("build c --metadata-file -").ok()).unwrap();
    assert_eq!(report["containerimage.digest"], digest.trim());
    assert_eq!(home.run("build c --iidfile -").ok().trim(), report["containerimage.config.digest"]);
    assert!(!Path::new(&home.path("-")).exists());
    for (line, words) in [
        ("build c --iidfile - --metadata-file -", "would both write to standard output"),
        ("build c --metadata-file - -o type=tar,dest=-", "would both be written to standard output"),
    ] {
        let ran = home.run(line);
        assert!(ran.code == 2 && ran.stdout.is_empty() && ran.stderr.contains(words), "{line}: {ran:?}");
    }
    let ran = home.run("build none --metadata-file -");
    let report: serde_json::Value = serde_json::from_slice(&ran.stdout).unwrap();
    assert_eq!((ran.code, &report["ovenbird"]["outcome"]), (5, &"failed".into()));
}

#[test]
fn images_of_a_project_by_word_and_by_flag() {
    let project = "[image.api]\npath = 'c'\n[image.docs]\npath = 'c'\n[image.c]\npath = 'c'\n";
    let home = Home::new(&[SIMPLE, &[("ovenbird.toml", project)]].concat());
    let built = home.run("build api --image docs --image api").ok();
    let names: Vec<&str> = built.lines().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(names, ["api", "docs"]);
    let ran = home.run("build c/ --image docs");
    assert!(ran.code == 2 && ran.stderr.contains("--image names images of ovenbird.toml, and \"c/\" beside it is none of them"), "{ran:?}");
    let all: serde_json::Value = serde_json::from_str(&home.run("build api docs --metadata-file -").ok()).unwrap();
    assert_eq!(all.as_object().unwrap().len(), 2);
}
