//! Caches that machines share: a machine is a state folder here, and everything between them is a real registry or a folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ovenbird_testing::Result;
use ovenbird_testing::archive;
use ovenbird_testing::command::{Level, Workspace, finish};
use ovenbird_testing::needs::{self, Need};
use ovenbird_testing::process::output;
use ovenbird_testing::registry::Registry;

const LIMIT: Duration = Duration::from_mins(5);

/// A stage whose layers are not in the image, with a step that costs something to repeat.
const DOCKERFILE: &str = "FROM busybox AS made\n\
    RUN echo tools > /tools && chown 1000:1000 /tools && head -c 300000 /dev/urandom > /heavy\n\
    COPY src /src\n\
    RUN cat /src/a > /out && chmod 4755 /out\n\
    FROM busybox\n\
    RUN mkdir /first && head -c 200000 /dev/urandom > /first/noise\n\
    COPY --from=made /out /out\n\
    RUN ln -s /out /last\n";

/// One user's folder with a context; any number of machines build it.
struct Site {
    room: Workspace,
    registry: Registry,
    settings: PathBuf,
}

impl Site {
    /// `None`: the machine lacks something, which was said.
    fn new(test: &str, level: Level) -> Result<Option<Self>> {
        if !needs::available(test, &[Need::Run, Need::Registry]) {
            return Ok(None);
        }
        if let Some(reason) = needs::missing_at(level, Need::Run) {
            needs::skip(test, reason);
            return Ok(None);
        }
        let registry = Registry::start()?;
        let room = Workspace::new(level)?;
        let site = Self { settings: room.path().join("settings.toml"), room, registry };
        site.write("settings.toml", &site.registry.settings_toml())?;
        fs::create_dir_all(site.room.path().join("ctx/src")).unwrap_or_else(|error| panic!("{error}"));
        site.write("ctx/Dockerfile", DOCKERFILE)?;
        site.write("ctx/src/a", "one")?;
        site.room.give_tree(&site.room.path().join("ctx"))?;
        Ok(Some(site))
    }

    fn write(&self, path: &str, text: &str) -> Result<()> {
        let path = self.room.path().join(path);
        fs::write(&path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        self.room.give(&path)
    }

    fn name(&self, tail: &str) -> String {
        format!("{}/team/{tail}", self.registry.address())
    }

    fn machine(&self, name: &str) -> PathBuf {
        self.room.path().join(name)
    }

    fn try_build(&self, machine: &str, arguments: &[&str]) -> Result<Built> {
        let mut command = self.room.ovenbird();
        command.arg("build").arg("--root").arg(self.machine(machine)).arg("--settings").arg(&self.settings);
        command.args(["--progress", "plain"]).args(arguments).arg(self.room.path().join("ctx"));
        let (code, log) = finish(&mut command, None, LIMIT)?;
        Ok(Built { code, log })
    }

    fn build(&self, machine: &str, arguments: &[&str]) -> Result<Built> {
        let built = self.try_build(machine, arguments)?;
        assert_eq!(built.code, Some(0), "{machine} {arguments:?}\n{}", built.log);
        Ok(built)
    }

    /// Every blob of the registry, largest first.
    fn blobs(&self) -> Vec<(u64, PathBuf)> {
        let mut found = files(&self.registry.storage().join("blobs"));
        found.sort();
        found.reverse();
        found
    }
}

struct Built {
    code: Option<i32>,
    log: String,
}

impl Built {
    /// Steps that ran, as the Dockerfile has them.
    fn ran(&self) -> Vec<String> {
        let steps = self.log.lines().filter_map(|line| {
            let (number, name) = line.split_once(" [")?;
            let (_, step) = name.split_once("] ")?;
            let step = step.split_whitespace().take(2).collect::<Vec<_>>().join(" ");
            let done = self.log.lines().any(|line| line.starts_with(&format!("{number} DONE")));
            (done && !step.starts_with("FROM")).then_some(step)
        });
        steps.collect()
    }

    fn digest(&self) -> &str {
        self.log.lines().rev().find(|line| line.starts_with("sha256:")).unwrap_or_default()
    }

    fn says(&self, text: &str) {
        assert!(self.log.contains(text), "{text:?} is not in\n{}", self.log);
    }
}

fn files(dir: &Path) -> Vec<(u64, PathBuf)> {
    let mut folders = vec![dir.to_path_buf()];
    let mut found = vec![];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            match entry.metadata() {
                Ok(meta) if meta.is_dir() => folders.push(entry.path()),
                Ok(meta) => found.push((meta.len(), entry.path())),
                Err(_) => {}
            }
        }
    }
    found
}

fn bytes_in(dir: &Path) -> u64 {
    files(dir).iter().map(|(size, _)| size).sum()
}

/// A new file: blobs of base images have more links than this registry's.
fn replace(path: &Path, bytes: &[u8]) {
    let new = path.with_extension("new");
    fs::write(&new, bytes).and_then(|()| fs::rename(&new, path)).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

fn empty_machine(test: &str, level: Level) -> Result<()> {
    let Some(site) = Site::new(test, level)? else { return Ok(()) };
    let (app, cache) = (site.name("app:1"), site.name("app:cache"));
    let to = format!("type=registry,ref={cache},mode=max");
    let first = site.build("a", &["-t", &app, "--push", "--cache-to", &to])?;
    assert_eq!(first.ran().len(), 6, "{}", first.log);

    let second = site.build("b", &["-t", &site.name("app:2"), "--push", "--cache-from", &cache])?;
    assert_eq!((second.ran(), second.digest()), (vec![], first.digest()), "{}", second.log);
    let image: u64 = archive::images(&oci(&site, "a", &[])?)?[0].layers.iter().map(|layer| layer.len() as u64).sum();
    let fetched = bytes_in(&site.machine("b").join("store/blobs"));
    assert!(fetched < image / 10, "{fetched} of {image} bytes were fetched, and nothing needed them");

    // The stage that is not in the image goes on where its cache ends.
    site.write("ctx/src/a", "two")?;
    let third = site.build("c", &["-t", &site.name("app:3"), "--push", "--cache-from", &cache])?;
    assert_eq!(third.ran(), ["COPY src", "RUN cat", "COPY --from=made", "RUN ln"], "{}", third.log);
    let noise = third.log.lines().filter(|line| line.contains("unpacking")).count();
    // Two of the base; the tools and the first folder, on which something was built; not more.
    assert!(noise <= 4, "{}", third.log);

    // Unpacked, it is what it was: owners and modes, at this level.
    site.write("ctx/src/a", "one")?;
    let (ours, theirs) = (oci(&site, "a", &[])?, oci(&site, "d", &["--cache-from", &cache])?);
    assert_eq!(fs::read(ours).ok(), fs::read(theirs).ok());
    Ok(())
}

fn oci(site: &Site, machine: &str, arguments: &[&str]) -> Result<PathBuf> {
    let file = site.room.path().join(format!("{machine}.tar"));
    site.build(machine, &[&["-o", &format!("type=oci,dest={}", file.display())], arguments].concat())?;
    Ok(file)
}

#[test]
fn root_empty_machine() -> Result<()> {
    empty_machine("registry_cache::root_empty_machine", Level::Own)
}

#[test]
fn rootless_empty_machine() -> Result<()> {
    empty_machine("registry_cache::rootless_empty_machine", Level::Rootless)
}

#[test]
fn single_id_empty_machine() -> Result<()> {
    empty_machine("registry_cache::single_id_empty_machine", Level::SingleId)
}

#[test]
fn what_each_kind_of_cache_holds() -> Result<()> {
    let Some(site) = Site::new("registry_cache::what_each_kind_of_cache_holds", Level::Own)? else { return Ok(()) };
    let cache = site.name("app:cache");
    let folder = site.room.path().join("folder");
    let registry = |mode: &str| format!("type=registry,ref={cache},mode={mode}");
    let local = |mode: &str| format!("type=local,dest={},tag=t1,mode={mode}", folder.display());
    let from_folder = format!("type=local,src={},tag=t1", folder.display());
    let made = ["RUN echo", "COPY src", "RUN cat"];
    for (to, from, unchanged, changed) in [
        (registry("max"), cache.clone(), &[][..], &["COPY src", "RUN cat", "COPY --from=made", "RUN ln"][..]),
        // What is in the image needs no other stage; if that has to run, all of it does.
        (registry("min"), cache.clone(), &[], &[&made[..], &["COPY --from=made", "RUN ln"]].concat()),
        ("type=inline".to_owned(), site.name("app:1"), &[], &[&made[..], &["COPY --from=made", "RUN ln"]].concat()),
        (local("max"), from_folder.clone(), &[], &["COPY src", "RUN cat", "COPY --from=made", "RUN ln"]),
        (local("min"), from_folder, &[], &[&made[..], &["COPY --from=made", "RUN ln"]].concat()),
    ] {
        let _ = fs::remove_dir_all(site.machine("a"));
        site.write("ctx/src/a", "one")?;
        let first = site.build("a", &["-t", &site.name("app:1"), "--push", "--cache-to", &to])?;
        for (text, expect) in [("one", unchanged), ("two", changed)] {
            let _ = fs::remove_dir_all(site.machine("b"));
            site.write("ctx/src/a", text)?;
            let built = site.build("b", &["--cache-from", &from, "-t", "x"])?;
            assert_eq!(built.ran(), expect, "{to} {text}\n{}", built.log);
            // The inline one says so in its manifest, which the other build does not write.
            if text == "one" && to != "type=inline" {
                assert_eq!(built.digest(), first.digest(), "{to}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_bad_cache_is_said_and_never_fails_a_build() -> Result<()> {
    let Some(site) = Site::new("registry_cache::a_bad_cache_is_said_and_never_fails_a_build", Level::Own)? else { return Ok(()) };
    let cache = site.name("app:cache");
    let to = format!("type=registry,ref={cache},mode=max");
    site.build("a", &["-t", "x", "--cache-to", &to])?;
    let tree = |machine: &str, arguments: &[&str]| -> Result<(Vec<String>, String)> {
        let file = site.room.path().join("out.tar");
        let built = site.build(machine, &[&["-o", &format!("type=tar,dest={}", file.display())], arguments].concat())?;
        let list = archive::members(&file)?.into_keys().collect();
        Ok((list, built.log))
    };
    let (expect, _) = tree("a", &[])?;

    let pipe = site.room.path().join("pipe");
    fs::create_dir(&pipe).unwrap_or_else(|error| panic!("{error}"));
    output(std::process::Command::new("mkfifo").arg(pipe.join("index.json")))?;
    let nobody = format!("127.0.0.1:{}/app:cache", ovenbird_testing::process::free_port()?);
    for (from, says) in [
        (nobody.clone(), "the cache 127.0.0.1:"),
        (site.name("none:cache"), "there is no cache "),
        (format!("{}/library/busybox", site.registry.address()), "it is an image without a cache of Ovenbird"),
        ("type=local,src=/nowhere".to_owned(), "there is no cache /nowhere:latest yet"),
        (format!("type=local,src={}", pipe.display()), "it is no regular file"),
    ] {
        let _ = fs::remove_dir_all(site.machine("b"));
        let (list, log) = tree("b", &["--cache-from", &from])?;
        assert!(list == expect && log.contains(says), "{from}: {says:?}\n{log}");
    }
    // One that cannot be had does not stand before one that can.
    let _ = fs::remove_dir_all(site.machine("b"));
    assert_eq!(site.build("b", &["-t", "x", "--cache-from", &nobody, "--cache-from", &cache])?.ran(), Vec::<String>::new());

    // The two heavy layers: the stage's and the image's.
    let heavy: Vec<(u64, PathBuf)> = site.blobs().into_iter().filter(|(size, _)| (100_000..400_000).contains(size)).collect();
    assert_eq!(heavy.len(), 2, "{:?}", site.blobs());
    for (size, path) in &heavy {
        let good = fs::read(path).unwrap_or_default();
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 1;
        for bad in [Some(flipped), Some(good[..good.len() / 2].to_vec()), None] {
            match &bad {
                Some(bytes) => replace(path, bytes),
                None => fs::remove_file(path).unwrap_or_else(|error| panic!("{error}")),
            }
            for text in ["one", "two"] {
                let _ = fs::remove_dir_all(site.machine("b"));
                site.write("ctx/src/a", text)?;
                let (list, log) = tree("b", &["--cache-from", &cache])?;
                assert_eq!(list, expect, "{log}");
                // The image's layer is needed for the output, the stage's for what is built on it.
                let needed = (*size < 250_000) || text == "two";
                assert_eq!(log.contains("its step runs again") || log.contains("the image is built again"), needed, "{size} {text}\n{log}");
                // What was found out stays: nothing is fetched that is known to be bad.
                let (again, log) = tree("b", &[])?;
                assert!(again == expect && !log.contains("pulling"), "{log}");
            }
            replace(path, &good);
        }
    }

    // Not writable: said; a failure only when that was asked for.
    let refused = format!("type=registry,ref={nobody}");
    let built = site.build("a", &["-t", "x", "--cache-to", &refused])?;
    built.says("cannot export the cache 127.0.0.1:");
    let built = site.try_build("a", &["-t", "x", "--cache-to", &format!("{refused},ignore-error=false")])?;
    assert_eq!(built.code, Some(7), "{}", built.log);
    Ok(())
}

#[test]
fn hostile_lists_of_results() -> Result<()> {
    let Some(site) = Site::new("registry_cache::hostile_lists_of_results", Level::Own)? else { return Ok(()) };
    let folder = site.room.path().join("folder");
    site.build("a", &["-t", "x", "--cache-to", &format!("type=local,dest={}", folder.display())])?;
    let index = fs::read_to_string(folder.join("index.json")).unwrap_or_default();
    let blob = |digest: &str| folder.join("blobs/sha256").join(digest.trim_start_matches("sha256:"));
    let digest_in = |json: &serde_json::Value| json["digest"].as_str().unwrap_or_default().to_owned();
    let parsed: serde_json::Value = serde_json::from_str(&index).unwrap_or_default();
    let manifest_digest = digest_in(&parsed["manifests"][0]);
    let manifest: serde_json::Value = serde_json::from_slice(&fs::read(blob(&manifest_digest)).unwrap_or_default()).unwrap_or_default();
    let config = digest_in(&manifest["config"]);
    let good = fs::read(blob(&config)).unwrap_or_default();
    let put = |bytes: &[u8]| -> String {
        use sha2::Digest as _;
        let name = sha2::Sha256::digest(bytes).iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
        fs::write(blob(&name), bytes).unwrap_or_else(|error| panic!("{error}"));
        format!("sha256:{name}")
    };
    let text = String::from_utf8_lossy(&good).into_owned();
    for (config, says) in [
        (b"{".to_vec(), "it is malformed"),
        (b"[1]".to_vec(), "it is malformed"),
        (text.replace("\"version\":1", "\"version\":7").into_bytes(), "it is of format 7"),
        (text.replace("\"at\":0", "\"at\":99999999999").into_bytes(), "it names the layer"),
        // Ids that lie: the layer is not what the list says.
        (text.replacen("\"diffId\":\"sha256:", "\"diffId\":\"sha256:0000000", 1).replacen("0000000", "", 0).into_bytes(), "malformed"),
    ] {
        let mut changed = manifest.clone();
        changed["config"]["digest"] = put(&config).into();
        changed["config"]["size"] = config.len().into();
        let bytes = changed.to_string().into_bytes();
        let mut listed = parsed.clone();
        listed["manifests"][0]["digest"] = put(&bytes).into();
        listed["manifests"][0]["size"] = bytes.len().into();
        fs::write(folder.join("index.json"), listed.to_string()).unwrap_or_else(|error| panic!("{error}"));
        let _ = fs::remove_dir_all(site.machine("b"));
        let built = site.build("b", &["-t", "x", "--cache-from", &format!("type=local,src={}", folder.display())])?;
        built.says(says);
        assert_eq!(built.ran().len(), 6, "{}", built.log);
    }
    Ok(())
}

#[test]
fn a_secret_in_another_stage_stays_here() -> Result<()> {
    let Some(site) = Site::new("registry_cache::a_secret_in_another_stage_stays_here", Level::Own)? else { return Ok(()) };
    let secret = "correct-horse-battery-staple-7193";
    site.write("token", secret)?;
    site.write(
        "ctx/Dockerfile",
        "FROM busybox AS made\nRUN --mount=type=secret,id=token cp /run/secrets/token /kept\nRUN sha256sum /kept > /sum\n\
         FROM busybox\nRUN echo clean > /clean\nCOPY --from=made /sum /\n",
    )?;
    let cache = site.name("app:cache");
    let secret_flag = format!("id=token,src={}", site.room.path().join("token").display());
    let to = format!("type=registry,ref={cache},mode=max");
    let built = site.build("a", &["-t", "x", "--secret", &secret_flag, "--cache-to", &to])?;
    built.says("the secret \"token\" is in what a step made (/kept in the layer");
    for (_, path) in site.blobs() {
        let bytes = archive::decompress(&fs::read(&path).unwrap_or_default())?;
        assert!(!bytes.windows(secret.len()).any(|window| window == secret.as_bytes()), "{} holds the secret", path.display());
    }
    let second = site.build("b", &["-t", "x", "--secret", &secret_flag, "--cache-from", &cache])?;
    assert_eq!(second.ran(), Vec::<String>::new(), "what does not hold it is shared\n{}", second.log);

    // A layer that was searched for fewer secrets is fetched and searched.
    site.write("ctx/Dockerfile", "FROM busybox\nRUN echo correct-horse- > /a; echo clean-battery-staple > /b\n")?;
    site.build("a", &["-t", "x", "--cache-to", &to])?;
    let leak = site.try_build("b", &["-t", "x", "--secret", "id=b,env=B", "--cache-from", &cache])?;
    assert_eq!(leak.code, Some(5), "the variable is not set\n{}", leak.log);
    site.write("other", "clean-battery-staple")?;
    let given = format!("id=b,src={}", site.room.path().join("other").display());
    let leak = site.try_build("b", &["-t", "x", "--secret", &given, "--cache-from", &cache])?;
    assert_eq!(leak.code, Some(9), "{}", leak.log);
    leak.says("the secret \"b\" is in the image: /b in the layer");
    Ok(())
}

#[test]
fn other_forms_of_the_same_image() -> Result<()> {
    let Some(site) = Site::new("registry_cache::other_forms_of_the_same_image", Level::Own)? else { return Ok(()) };
    let cache = site.name("app:cache");
    let to = format!("type=registry,ref={cache},mode=max");
    let none = Vec::<String>::new();
    let empty = |machine: &str| drop(fs::remove_dir_all(site.machine(machine)));

    // A fixed time: its layers are of use to who asks for the same one, and to nobody else.
    let fixed = site.build("a", &["-t", "x", "--reproducible", "--cache-to", &to])?;
    let same = site.build("b", &["-t", "x", "--reproducible", "--cache-from", &cache])?;
    assert_eq!((same.ran(), same.digest()), (none.clone(), fixed.digest()), "{}", same.log);
    empty("b");
    assert_eq!(site.build("b", &["-t", "x", "--cache-from", &cache])?.ran().len(), 6);

    // Machines hand it on: what came from a cache goes into the next one.
    let next = site.name("next:cache");
    let plain = site.build("a", &["-t", "x", "--cache-to", &to])?;
    empty("b");
    site.build("b", &["-t", "x", "--cache-from", &cache, "--cache-to", &format!("type=registry,ref={next},mode=max")])?;
    empty("b");
    let handed = site.build("b", &["-t", "x", "--cache-from", &next])?;
    assert_eq!((handed.ran(), handed.digest()), (none.clone(), plain.digest()), "{}", handed.log);

    // The cache is gone, and with it what was not fetched: the image is made again where it is needed.
    let file = site.room.path().join("after.tar");
    for (_, path) in site.blobs().into_iter().filter(|(size, _)| (100_000..400_000).contains(size)) {
        fs::remove_file(path).unwrap_or_else(|error| panic!("{error}"));
    }
    let after = site.build("b", &["-o", &format!("type=oci,dest={}", file.display())])?;
    after.says("the image is built again");

    // Another compression: fetched and packed again, not run.
    empty("b");
    site.build("a", &["-t", "x", "--cache-to", &format!("{to},compression=zstd")])?;
    let zstd = site.build("b", &["-t", "x", "--cache-from", &cache])?;
    assert_eq!((zstd.ran(), zstd.digest()), (none.clone(), plain.digest()), "{}", zstd.log);
    Ok(())
}

fn cache_mounts(test: &str, level: Level) -> Result<()> {
    let Some(site) = Site::new(test, level)? else { return Ok(()) };
    let dockerfile = |n: u8, token: &str| {
        format!(
            "FROM busybox\nRUN --mount=type=cache,target=/c,mode=0750 {token} echo \"{n}: $(cat /c/n)\"; echo {n} >> /c/n; chmod 0640 /c/n; stat -c '%a %u' /c/n\n"
        )
    };
    site.write("ctx/Dockerfile", &dockerfile(1, ""))?;
    let folder = site.room.path().join("folder");
    for (to, from) in [
        (format!("type=registry,ref={}", site.name("app:cache")), site.name("app:cache")),
        (format!("type=local,dest={}", folder.display()), format!("type=local,src={}", folder.display())),
    ] {
        for asked in ["", ",mounts=true"] {
            let empty = |machine: &str| drop(fs::remove_dir_all(site.machine(machine)));
            empty("a");
            empty("b");
            site.write("ctx/Dockerfile", &dockerfile(1, ""))?;
            site.build("a", &["-t", "x", "--cache-to", &format!("{to}{asked}")])?;
            site.write("ctx/Dockerfile", &dockerfile(2, ""))?;
            let built = site.build("b", &["-t", "x", "--cache-from", &from])?;
            assert_eq!(built.log.contains("2: 1"), !asked.is_empty(), "{to}{asked}\n{}", built.log);
            built.says("640 0");
            // A second build has its own by then.
            site.write("ctx/Dockerfile", &dockerfile(3, ""))?;
            let own = site.build("b", &["-t", "x", "--cache-from", &from])?;
            own.says(if asked.is_empty() { "3: 2" } else { "3: 1" });
        }
    }
    // An unchanged build on an empty machine needs no mount, and hands on what there was.
    let chain = format!("type=registry,ref={},mode=max,mounts=true", site.name("chain:cache"));
    for (machine, number) in [("m1", 1), ("m2", 1), ("m3", 2)] {
        site.write("ctx/Dockerfile", &dockerfile(number, ""))?;
        let built = site.build(machine, &["-t", "x", "--cache-from", &site.name("chain:cache"), "--cache-to", &chain])?;
        assert_eq!(built.log.contains("2: 1"), machine == "m3", "{machine}\n{}", built.log);
    }
    // A secret that a step left there stays on this machine.
    site.write("token", "correct-horse-battery-staple-7193")?;
    let secret = format!("id=t,src={}", site.room.path().join("token").display());
    site.write("ctx/Dockerfile", &dockerfile(4, "--mount=type=secret,id=t cp /run/secrets/t /c/kept;"))?;
    let to = format!("type=registry,ref={},mounts=true", site.name("leak:cache"));
    let built = site.build("a", &["-t", "x", "--secret", &secret, "--cache-to", &to])?;
    built.says("a cache mount is not exported: the secret \"t\" is in the image: /kept");
    Ok(())
}

#[test]
fn root_cache_mounts() -> Result<()> {
    cache_mounts("registry_cache::root_cache_mounts", Level::Own)
}

#[test]
fn single_id_cache_mounts() -> Result<()> {
    cache_mounts("registry_cache::single_id_cache_mounts", Level::SingleId)
}
