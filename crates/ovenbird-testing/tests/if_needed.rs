//! `build --if-needed`: the image is taken from this machine, from the registry, or built. The thirteen cases are those of ixian-docker's
//! `build_image_if_needed`, on a real registry and from outside.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use ovenbird_testing::Result;
use ovenbird_testing::base::Base;
use ovenbird_testing::command::{Level, Workspace, finish};
use ovenbird_testing::needs::{self, Need};
use ovenbird_testing::process::output;
use ovenbird_testing::registry::{Options, Registry};

const LIMIT: Duration = Duration::from_mins(2);

/// A machine: a state folder of its own, and a context.
struct Machine {
    room: Workspace,
}

impl Machine {
    /// With a context of this content. Two of the same content have the same id.
    fn new(content: &str) -> Result<Self> {
        Self::of(Level::Own, content)
    }

    /// The same for another user.
    fn of(level: Level, content: &str) -> Result<Self> {
        let room = Workspace::new(level)?;
        let context = room.path().join("ctx");
        fs::create_dir(&context).unwrap();
        fs::write(context.join("Dockerfile"), "FROM scratch\nCOPY a /a\nLABEL version=1.2/3\n").unwrap();
        fs::write(context.join("a"), content).unwrap();
        room.give_tree(&context)?;
        Ok(Self { room })
    }

    fn run(&self, arguments: &[&str]) -> Result<(Option<i32>, String)> {
        let mut command = self.room.ovenbird();
        command.args(["--root", "state", "--progress", "plain"]).args(arguments);
        finish(&mut command, None, LIMIT)
    }

    fn ok(&self, arguments: &[&str]) -> Result<String> {
        let (code, log) = self.run(arguments)?;
        assert_eq!(code, Some(0), "{arguments:?}: {log}");
        Ok(log)
    }

    /// Builds if needed; what the report says: decision, digest, and the log.
    fn build(&self, arguments: &[&str]) -> Result<(String, String, String)> {
        let file: PathBuf = self.room.path().join("metadata.json");
        let log = self.ok(&[&["build", "ctx", "--metadata-file", "metadata.json"], arguments].concat())?;
        let json: serde_json::Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
        let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        Ok((text(&json["ovenbird"]["decision"]), text(&json["containerimage.digest"]), log))
    }

    fn id(&self) -> Result<String> {
        Ok(self.ok(&["id", "ctx"])?.trim().to_owned())
    }

    fn images(&self) -> Result<String> {
        self.ok(&["images"])
    }
}

/// One way to ask.
struct Case {
    name: &'static str,
    /// The image is on this machine.
    local: bool,
    /// The image is in the registry.
    registry: bool,
    /// Flags beside `-t`.
    flags: &'static [&'static str],
    /// Tag that is asked for.
    tag: &'static str,
    /// Registry that is asked; empty: the one that there is.
    host: &'static str,
    decision: &'static str,
    log: &'static str,
}

const CASES: [Case; 13] = [
    Case { name: "local", local: true, registry: false, decision: "local", log: "is on this machine: nothing is built", ..CASE },
    Case { name: "registry", local: false, registry: true, decision: "registry", log: "is in the registry: nothing is built", ..CASE },
    Case { name: "pull: not found", local: false, registry: false, decision: "built", log: "COPY a /a", ..CASE },
    Case { name: "no pull", registry: true, flags: &["--if-needed=local"], decision: "built", log: "COPY a /a", ..CASE },
    Case { name: "both", local: true, registry: true, decision: "local", log: "is on this machine", ..CASE },
    Case { name: "none", flags: &["--if-needed=local"], decision: "built", log: "COPY a /a", ..CASE },
    Case { name: "force, local", local: true, flags: &["--if-needed", "--force"], decision: "built", log: "COPY a /a", ..CASE },
    Case { name: "force, registry", registry: true, flags: &["--if-needed", "--force"], decision: "built", log: "COPY a /a", ..CASE },
    Case {
        name: "force, both",
        local: true,
        registry: true,
        flags: &["--if-needed", "--force"],
        decision: "built",
        log: "COPY a /a",
        ..CASE
    },
    Case { name: "unknown registry", host: "127.0.0.1:1", decision: "built", log: "the image is built", ..CASE },
    Case { name: "recheck", registry: true, decision: "registry", log: "is in the registry", ..CASE },
    Case { name: "custom tag", registry: true, tag: "runtime-{id}-x", decision: "registry", log: "is in the registry", ..CASE },
    Case { name: "wrong credentials", registry: true, host: "private", decision: "built", log: "refused the credentials", ..CASE },
];

const CASE: Case = Case { name: "", local: false, registry: false, flags: &["--if-needed"], tag: "{id}", host: "", decision: "", log: "" };

#[test]
fn the_thirteen_cases() -> Result<()> {
    if !needs::available("the_thirteen_cases", &[Need::Registry]) {
        return Ok(());
    }
    let open = Registry::start_with(Options { bases: &[Base::Busybox], credentials: None })?;
    let private = Registry::start_with(Options { bases: &[], credentials: Some(("u", "p")) })?;
    for case in &CASES {
        let host = match case.host {
            "" => open.address(),
            "private" => private.address(),
            other => other.to_owned(),
        };
        let name = format!("{host}/team/app:{}", case.tag);
        let machine = Machine::new(case.name)?;
        let mut digest = None;
        if case.registry && case.host.is_empty() {
            // Another machine built it.
            let other = Machine::new(case.name)?;
            digest = Some(other.build(&["-t", &name, "--push"])?.1);
        }
        if case.local {
            digest = Some(machine.build(&["-t", &name])?.1);
        }
        let (decision, got, log) = machine.build(&[&["-t", &name], case.flags].concat())?;
        assert_eq!(decision, case.decision, "{}: {log}", case.name);
        assert!(log.contains(case.log), "{}: {log}", case.name);
        if decision != "built" {
            assert_eq!(Some(got), digest, "{}", case.name);
            assert!(!log.contains("COPY a /a"), "{}: {log}", case.name);
        }
        // Whatever happened, the image is here under its name now.
        let full = name.replace("{id}", &machine.id()?);
        assert!(machine.images()?.contains(&full), "{}: {full}: {}", case.name, machine.images()?);
        assert_eq!(machine.build(&["-t", &name, "--if-needed"])?.0, "local", "{}: asked again", case.name);
    }
    Ok(())
}

/// Who only pushes transfers nothing when the registry has the image; other names of the request are given to it.
#[test]
fn names_without_a_transfer() -> Result<()> {
    if !needs::available("names_without_a_transfer", &[Need::Registry]) {
        return Ok(());
    }
    let registry = Registry::start()?;
    let name = |rest: &str| format!("{}/{rest}", registry.address());
    let content = name("team/app:{id}");
    let digest = Machine::new("x")?.build(&["-t", &content, "--push", "--if-needed"])?.1;
    let skopeo = |name: &str| -> Result<String> {
        let shown =
            output(Command::new("skopeo").args(["inspect", "--tls-verify=false", "--format={{.Digest}}", &format!("docker://{name}")]))?;
        Ok(shown.trim().to_owned())
    };
    let machine = Machine::new("x")?;
    let others = [name("team/app:1"), name("team/app:v{label:version}"), name("other/place:latest")];
    let flags = ["-t", &content, "-t", &others[0], "-t", &others[1], "-t", &others[2], "--push", "--if-needed"];
    let (decision, got, log) = machine.build(&flags)?;
    assert_eq!((decision.as_str(), got.as_str()), ("registry", digest.as_str()), "{log}");
    for tag in [&others[0], &name("team/app:v1.2-3"), &others[2]] {
        assert_eq!(skopeo(tag)?, digest, "{tag}");
    }
    // The layer was never here: one that is built by nobody has no blobs but manifest and config.
    let blobs = fs::read_dir(machine.room.path().join("state/store/blobs/sha256")).unwrap().count();
    assert_eq!(blobs, 2, "{log}");
    // To another registry it goes without a build, too.
    let second = Registry::start_with(Options { bases: &[], credentials: None })?;
    let elsewhere = format!("{}/app:1", second.address());
    let third = Machine::new("x")?;
    let (decision, got, log) = third.build(&["-t", &content, "-t", &elsewhere, "--push", "--if-needed"])?;
    assert_eq!((decision.as_str(), got.as_str()), ("registry", digest.as_str()), "{log}");
    assert_eq!(skopeo(&elsewhere)?, digest, "{log}");
    let whole = format!("oci:{}", third.room.path().join("copied").display());
    output(Command::new("skopeo").args(["copy", "-q", "--src-tls-verify=false", &format!("docker://{elsewhere}"), &whole]))?;
    // What stays away is fetched when it is asked for.
    machine.ok(&["export", &others[0], "-o", "type=oci,dest=image.tar"])?;
    Ok(())
}

/// An index is one image: one id, one name, all platforms or none.
#[test]
fn several_platforms() -> Result<()> {
    if !needs::available("several_platforms", &[Need::Registry]) {
        return Ok(());
    }
    let registry = Registry::start()?;
    let name = format!("{}/app:{{id}}", registry.address());
    let both = ["-t", &name, "--platform", "linux/amd64,linux/arm64", "--if-needed"];
    let built = Machine::new("x")?.build(&[&both[..], &["--push"]].concat())?;
    assert_eq!(built.0, "built");
    let machine = Machine::new("x")?;
    let one = machine.build(&["-t", &name, "--platform", "linux/arm64", "--if-needed"])?;
    assert_eq!(one.0, "built", "one of the platforms is another image");
    let pulled = machine.build(&both)?;
    assert_eq!((pulled.0.as_str(), &pulled.1), ("registry", &built.1), "{}", pulled.2);
    let again = machine.build(&both)?;
    assert_eq!((again.0.as_str(), &again.1), ("local", &built.1));
    machine.ok(&["build", "ctx", "-t", &name, "--platform", "linux/amd64,linux/arm64", "--if-needed", "-o", "type=oci,dest=both.tar"])?;
    let inspected =
        output(Command::new("skopeo").args(["inspect", "--raw"]).arg(format!("oci-archive:{}/both.tar", machine.room.path().display())))?;
    assert!(inspected.contains("amd64") && inspected.contains("arm64"), "{inspected}");
    Ok(())
}

/// Whether an image that is here counts: eight ways to look at it.
#[test]
fn what_counts_as_here() -> Result<()> {
    if !needs::available("what_counts_as_here", &[Need::Registry]) {
        return Ok(());
    }
    let registry = Registry::start()?;
    let name = format!("{}/app:{{id}}", registry.address());
    let blob_of = |machine: &Machine, kind: &str| -> PathBuf {
        let folder = machine.room.path().join("state/store/blobs/sha256");
        let read = |path: &PathBuf| serde_json::from_slice::<serde_json::Value>(&fs::read(path).unwrap()).ok();
        let all: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
        let found = all.into_iter().find(|path| match (kind, read(path)) {
            ("manifest", Some(json)) => json["layers"].is_array(),
            ("config", Some(json)) => json["rootfs"].is_object(),
            ("layer", None) => true,
            _ => false,
        });
        found.unwrap()
    };
    let cases: [(&str, &str, &str); 8] = [
        ("whole", "", "local"),
        ("another content", "content", "built"),
        ("no name", "rmi", "built"),
        ("manifest gone", "-manifest", "built"),
        ("manifest damaged", "!manifest", "built"),
        ("config damaged", "!config", "built"),
        ("layer gone", "-layer", "built"),
        ("layer cut short", "<layer", "built"),
    ];
    for (what, damage, decision) in cases {
        let machine = Machine::new(what)?;
        let first = machine.build(&["-t", &name, "--if-needed"])?;
        assert_eq!(first.0, "built", "{what}");
        match damage.split_at(damage.len().min(1)) {
            ("-", kind) => fs::remove_file(blob_of(&machine, kind)).unwrap(),
            ("!", kind) => rewrite(&blob_of(&machine, kind), |bytes| bytes[10] ^= 1),
            ("<", kind) => rewrite(&blob_of(&machine, kind), |bytes| bytes.truncate(5)),
            ("c", _) => fs::write(machine.room.path().join("ctx/a"), "changed").unwrap(),
            ("r", _) => drop(machine.ok(&["rmi", &name.replace("{id}", &machine.id()?)])?),
            _ => {}
        }
        let second = machine.build(&["-t", &name, "--if-needed"])?;
        assert_eq!(second.0, decision, "{what}: {}", second.2);
        assert_eq!(second.1 == first.1, damage != "content", "{what}: the same image again, unless it is another");
        machine.ok(&["export", &name.replace("{id}", &machine.id()?), "-o", "type=oci,dest=image.tar"])?;
    }
    Ok(())
}

fn rewrite(path: &PathBuf, change: impl Fn(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::remove_file(path).unwrap();
    fs::write(path, bytes).unwrap();
}

/// The id is that of the base image's content: not of its name, and not of what the name once was.
#[test]
fn base_images() -> Result<()> {
    if !needs::available("base_images", &[Need::Registry]) {
        return Ok(());
    }
    let registry = Registry::start()?;
    let base = |rest: &str| format!("{}/{rest}", registry.address());
    let push = |name: &str, content: &str| Machine::new(content)?.build(&["-t", name, "--push", "--reproducible"]);
    let on = |machine: &Machine, from: &str| {
        fs::write(machine.room.path().join("ctx/Dockerfile"), format!("FROM {from}\nCOPY a /b\nENV X=1\n")).unwrap();
    };
    let (_, digest, _) = push(&base("base:1"), "one")?;
    push(&base("other/name:2"), "one")?;
    let machine = Machine::new("x")?;
    on(&machine, &base("base:1"));
    let first = machine.id()?;
    for same in [base("other/name:2"), format!("{}@{digest}", base("base")), base("base:1")] {
        let other = Machine::new("x")?;
        on(&other, &same);
        assert_eq!(other.id()?, first, "{same}");
    }
    push(&base("base:1"), "two")?;
    let other = Machine::new("x")?;
    on(&other, &base("base:1"));
    let second = other.id()?;
    assert_ne!(second, first, "the name is at another image now");
    assert_eq!(machine.ok(&["id", "--pull", "ctx"])?.trim(), second, "a machine that knew the old one, with --pull");
    on(&machine, &format!("{}@{digest}", base("base")));
    assert_eq!(machine.id()?, first);
    Ok(())
}

/// Who asks, and who owns the files, plays no part.
#[test]
fn the_same_for_every_user() -> Result<()> {
    if !needs::available("the_same_for_every_user", &[Need::Users]) {
        return Ok(());
    }
    let mut ids = vec![];
    for level in [Level::Own, Level::Rootless, Level::SingleId] {
        let machine = Machine::of(level, "x")?;
        fs::write(
            machine.room.path().join("ctx/Dockerfile"),
            "FROM scratch\nCOPY a /a\nCOPY --chown=7:8 a /b\nRUN --mount=type=bind,target=/m true\n",
        )
        .unwrap();
        ids.push(machine.id()?);
    }
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    Ok(())
}

/// What is refused, before anything is done.
#[test]
fn refusals() -> Result<()> {
    let machine = Machine::new("x")?;
    for (flags, code, words) in [
        (&["-t", "app:1", "--if-needed"][..], 2, "add one: -t NAME:{id}"),
        (&["--if-needed"], 2, "--if-needed finds an image by a name with {id} in it"),
        (&["-t", "app:{id}", "--force"], 2, "--force goes with --if-needed"),
        (&["-t", "app:{id}", "--if-needed=maybe"], 2, "expected registry"),
        (&["-t", "app:{idd}"], 2, "has the unknown variable {idd}; there are {id}, {git.sha}"),
        (&["-t", "app:{git.sha}"], 5, "there is no {git.sha}: ctx is in no git repository"),
        (&["-t", "app:{label:none}"], 5, "there is no {label:none}: the image has no such label"),
    ] {
        let (got, log) = machine.run(&[&["build", "ctx"], flags].concat())?;
        assert_eq!(got, Some(code), "{flags:?}: {log}");
        assert!(log.contains(words), "{flags:?}: {log}");
    }
    Ok(())
}
