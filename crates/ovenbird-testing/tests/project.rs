//! `ovenbird.toml`: several images of one repository.

use std::fs;
use std::process::Command;
use std::time::Duration;

use ovenbird_testing::Result;
use ovenbird_testing::command::{Level, Workspace, finish};
use ovenbird_testing::needs::{self, Need};
use ovenbird_testing::process::output;
use ovenbird_testing::registry::{Options, Registry};

const LIMIT: Duration = Duration::from_mins(1);

/// A user in a repository.
struct Room {
    room: Workspace,
}

impl Room {
    fn new(level: Level, files: &[(&str, &str)]) -> Result<Self> {
        let this = Self { room: Workspace::new(level)? };
        for (name, text) in files {
            this.write(name, text);
        }
        this.room.give_tree(&this.repository())?;
        Ok(this)
    }

    fn repository(&self) -> std::path::PathBuf {
        self.room.path().join("repository")
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.repository().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn run(&self, arguments: &[&str]) -> Result<(Option<i32>, String)> {
        let mut command = self.room.ovenbird();
        command.current_dir(self.repository()).args(["--root", "../state", "--progress", "plain"]).args(arguments);
        finish(&mut command, None, LIMIT)
    }

    fn ok(&self, arguments: &[&str]) -> Result<String> {
        let (code, log) = self.run(arguments)?;
        assert_eq!(code, Some(0), "{arguments:?}: {log}");
        Ok(log)
    }

    /// The images that a build made, in the order they were printed.
    fn built(&self, arguments: &[&str]) -> Result<Vec<String>> {
        let log = self.ok(&[&["build"], arguments].concat())?;
        Ok(log
            .lines()
            .filter_map(|line| line.split_once(" sha256:"))
            .map(|(name, _)| name.to_owned())
            .filter(|name| !name.contains(' '))
            .collect())
    }

    fn told(&self, arguments: &[&str], code: i32) -> Result<String> {
        let (got, log) = self.run(arguments)?;
        assert_eq!(got, Some(code), "{arguments:?}: {log}");
        Ok(log)
    }
}

const PROJECT: &str = "[defaults]\nlabels = { team = \"x\" }\n\
    [image.base]\npath = \"base\"\n\
    [image.api]\npath = \"api\"\ncontexts = { base = \"image:base\" }\ntags = [\"team/api:1\"]\n\
    [image.web]\nfile = \"docker/web.Dockerfile\"\nfiles = [\"web/**\"]\ntags = [\"team/web:1\"]\nargs = { WHO = \"web\" }\n";

fn files() -> Vec<(&'static str, &'static str)> {
    vec![
        ("ovenbird.toml", PROJECT),
        ("base/Dockerfile", "FROM scratch\nCOPY common /common\n"),
        ("base/common", "shared"),
        ("api/Dockerfile", "FROM base\nCOPY main /main\n"),
        ("api/main", "api"),
        ("docker/web.Dockerfile", "FROM scratch\nARG WHO\nCOPY web /${WHO}\n"),
        ("web/index", "web"),
        ("other", ""),
    ]
}

fn three(level: Level) -> Result<()> {
    let room = Room::new(level, &files())?;
    assert_eq!(room.built(&[])?, ["api", "base", "web"]);
    let log = room.ok(&["build", "--no-cache"])?;
    assert!(log.contains("[api 1/2] COPY main /main") && log.contains("[web 1/1] COPY web /web"), "{log}");
    // Somewhere else, where the state directory is the same.
    let digests =
        |log: &str| log.lines().filter(|line| line.contains(" sha256:") && !line.starts_with('#')).map(str::to_owned).collect::<Vec<_>>();
    let here = digests(&room.ok(&["build", "--reproducible"])?);
    assert_eq!((here.len(), digests(&room.ok(&["build", "--reproducible", "--on", "process"])?)), (3, here));
    // What it needs is built, and not printed; its result is the base.
    assert_eq!(room.built(&["api", "-o", "../out"])?, ["api"]);
    assert_eq!(fs::read_to_string(room.room.path().join("out/common")).unwrap(), "shared");
    assert_eq!(fs::read_to_string(room.room.path().join("out/main")).unwrap(), "api");
    room.built(&["api", "--metadata-file", "../m.json"])?;
    let metadata: serde_json::Value = serde_json::from_str(&fs::read_to_string(room.room.path().join("m.json")).unwrap()).unwrap();
    assert_eq!(metadata["api"]["image.name"], "docker.io/team/api:1");
    assert!(metadata["base"]["containerimage.digest"].is_string());
    assert!(room.ok(&["images"])?.contains("team/web"));
    // A change of the base changes what is built on it, and nothing else is run.
    room.write("base/common", "changed");
    let log = room.ok(&["build"])?;
    assert!(log.contains("[api 1/2] COPY main /main") && log.contains("CACHED"), "{log}");
    room.built(&["api", "-o", "../out"])?;
    assert_eq!(fs::read_to_string(room.room.path().join("out/common")).unwrap(), "changed");
    Ok(())
}

#[test]
fn three_images() -> Result<()> {
    three(Level::Own)
}

#[test]
fn three_images_of_an_ordinary_user() -> Result<()> {
    if !needs::available("three_images_of_an_ordinary_user", &[Need::Users]) {
        return Ok(());
    }
    three(Level::Rootless)
}

#[test]
fn what_changed() -> Result<()> {
    let room = Room::new(Level::Own, &files())?;
    for (changed, expect) in [
        (&["--changed", "web/index"][..], &["web"][..]),
        (&["--changed", "base/common"], &["api", "base"]),
        (&["--changed", "other", "--changed", "api/main"], &["api"]),
        (&["--changed", "docker/web.Dockerfile"], &["web"]),
        (&["--changed", "ovenbird.toml"], &["api", "base", "web"]),
        (&["--image", "web", "--changed", "base/common"], &[]),
    ] {
        assert_eq!(room.built(changed)?, expect, "{changed:?}");
    }
    assert!(room.ok(&["build", "--changed", "other"])?.contains("nothing is built"));
    Ok(())
}

#[test]
fn what_a_word_means() -> Result<()> {
    let room = Room::new(Level::Own, &files())?;
    let told = room.told(&["build", "web"], 2)?;
    assert!(told.contains("is a folder, and an image") && told.contains("./web"), "{told}");
    assert_eq!(room.built(&["--image", "web"])?, ["web"]);
    assert_eq!(room.built(&["api"])?, ["api"], "the folder is what the image is built from");
    assert_eq!(room.built(&["api", "web"])?, ["api", "web"]);
    room.write("web/Dockerfile", "FROM scratch\nCOPY index /\n");
    assert!(room.ok(&["build", "./web"])?.contains("[1/1] COPY index /"));
    assert!(room.told(&["build", "wep"], 2)?.contains("did you mean `web`?"));
    assert!(room.told(&["build", "--image", "api", "--image", "web-"], 2)?.contains("has no image"));
    for flags in [&["-t", "x"][..], &["-f", "docker/web.Dockerfile", "--image", "api", "--image", "web"], &["-o", "out"], &["--check"]] {
        let told = room.told(&[&["build"], flags].concat(), 2)?;
        assert!(told.contains("is about one image"), "{flags:?}: {told}");
    }
    let told = room.told(&["build", "--check", "--image", "api"], 2)?;
    assert!(told.contains("--check of an image of ovenbird.toml is not supported"), "{told}");
    // With -f alone it is as without the file.
    room.ok(&["build", "-f", "docker/web.Dockerfile", "--build-arg", "WHO=x"])?;
    room.write("ovenbird.toml", "[image.a]\nunknown = 1\n");
    assert!(room.told(&["build"], 3)?.contains("unknown field `unknown`"));
    fs::remove_file(room.repository().join("ovenbird.toml")).unwrap();
    assert!(room.told(&["build", "--changed", "x"], 2)?.contains("there is none here"));
    assert!(room.told(&["build", "a", "b"], 2)?.contains("2 build contexts"));
    Ok(())
}

#[test]
fn failures_stop_what_needs_them() -> Result<()> {
    let room = Room::new(Level::Own, &files())?;
    room.write("base/Dockerfile", "FROM scratch\nCOPY none /\n");
    let (code, log) = room.run(&["build"])?;
    assert_eq!(code, Some(5), "{log}");
    assert!(log.contains("image base: ") && log.contains("not built, because they need one that failed: api"), "{log}");
    assert!(log.contains("web sha256:") && !log.contains("api sha256:"), "{log}");
    Ok(())
}

#[test]
fn pushed_together() -> Result<()> {
    if !needs::available("pushed_together", &[Need::Registry]) {
        return Ok(());
    }
    let registry = Registry::start_with(Options::default())?;
    let project = PROJECT.replace("team/", &format!("{}/team/", registry.address()));
    let mut all = files();
    all[0] = ("ovenbird.toml", &project);
    let room = Room::new(Level::Own, &all)?;
    // The file came with the source: whoever wrote it must be trusted to say where images go.
    let told = room.told(&["build", "--push"], 3)?;
    assert!(told.contains("where api is pushed to") && told.contains("trusted_projects"), "{told}");
    let settings = room.room.path().join("settings.toml");
    fs::write(&settings, format!("trusted_projects = [{:?}]\n", room.repository().display().to_string())).unwrap();
    let log = room.ok(&["--settings", "../settings.toml", "build", "--push"])?;
    assert!(log.contains("image base has no tags, so it is not pushed"), "{log}");
    let copy = |name: &str| {
        let to = format!("oci:{}", room.room.path().join(name).display());
        let from = format!("docker://{}/team/{name}:1", registry.address());
        output(Command::new("skopeo").args(["copy", "--quiet", "--src-tls-verify=false", &from, &to]))
    };
    copy("api")?;
    copy("web")?;
    // A machine with nothing takes both from there.
    let other = Workspace::new(Level::Own)?;
    let mut command = other.ovenbird();
    command.args(["--root", "state", "pull"]).arg(format!("{}/team/api:1", registry.address()));
    let (code, log) = finish(&mut command, None, LIMIT)?;
    assert_eq!(code, Some(0), "{log}");
    // Plugins: not from strangers.
    room.write("tell", "#!/bin/sh\ncat >/dev/null\necho told > $(dirname $0)/told\necho '{}'\n");
    room.write("ovenbird.toml", "[image.web]\nfile = \"docker/web.Dockerfile\"\nargs = { WHO = \"web\" }\nplugins = { exit = [{ name = \"tell\", file = \"tell\", on_failure = \"warn\" }] }\n");
    output(Command::new("chmod").arg("755").arg(room.repository().join("tell")))?;
    assert!(room.told(&["build"], 3)?.contains("plugin exit:tell of web") && !room.repository().join("told").exists());
    // Trusted, it is started and asked; this one does not know the protocol.
    let told = room.told(&["--settings", "../settings.toml", "build"], 2)?;
    assert!(room.repository().join("told").exists() && told.contains("the plugin tell cannot be used"), "{told}");
    // What leads out of the folder.
    room.write("ovenbird.toml", "[image.a]\npath = \"..\"\n");
    assert!(room.told(&["build"], 3)?.contains("path of a (..)"));
    Ok(())
}
