//! `ovenbird registry …`, `push` and `pull` against real registries, with skopeo as the second opinion.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use ovenbird_testing::Result;
use ovenbird_testing::base::Base;
use ovenbird_testing::command::{Level, Workspace, finish};
use ovenbird_testing::needs::{self, Need};
use ovenbird_testing::process::output;
use ovenbird_testing::registry::{Options, Registry};

const LIMIT: Duration = Duration::from_mins(2);

struct Machine {
    room: Workspace,
}

impl Machine {
    fn new() -> Result<Self> {
        let room = Workspace::new(Level::Own)?;
        fs::create_dir(room.path().join("ctx")).unwrap();
        fs::write(room.path().join("ctx/a"), "a").unwrap();
        Ok(Self { room })
    }

    fn path(&self) -> &Path {
        self.room.path()
    }

    fn run(&self, line: &str) -> Result<(Option<i32>, String)> {
        let mut command = self.room.ovenbird();
        command.args(["--root", "state", "--progress", "quiet"]).args(line.split(' ').filter(|word| !word.is_empty()));
        finish(&mut command, None, LIMIT)
    }

    fn ok(&self, line: &str) -> Result<String> {
        let (code, text) = self.run(line)?;
        assert_eq!(code, Some(0), "{line}: {text}");
        Ok(text.trim().to_owned())
    }

    /// Builds an image with this file content for these platforms and pushes it; its digest.
    fn push(&self, name: &str, content: &str, platforms: &str) -> Result<String> {
        fs::write(self.path().join("ctx/Dockerfile"), format!("FROM scratch\nCOPY a /a\nENV CONTENT={content}\n")).unwrap();
        fs::write(self.path().join("ctx/a"), content).unwrap();
        self.ok(&format!("build ctx -t {name} --push --platform {platforms}"))
    }
}

fn skopeo(arguments: &[&str]) -> Result<String> {
    output(Command::new("skopeo").args(arguments)).map(|text| text.trim().to_owned())
}

/// Digest of what a name stands for, index or manifest, as skopeo sees it.
fn digest(place: &str) -> Result<String> {
    let flag = if place.starts_with("docker://") { vec!["--tls-verify=false"] } else { vec![] };
    let raw = skopeo(&[&["inspect", "--raw"][..], &flag, &[place]].concat())?;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("manifest");
    fs::write(&file, raw).unwrap();
    skopeo(&["manifest-digest", &file.display().to_string()])
}

#[test]
fn exists() -> Result<()> {
    if !needs::available("exists", &[Need::Registry]) {
        return Ok(());
    }
    let open = Registry::start()?;
    let private = Registry::start_with(Options { bases: &[], credentials: Some(("u", "p")) })?;
    let machine = Machine::new()?;
    let here = machine.push(&format!("{}/app:1", open.address()), "x", "linux/amd64")?;
    let broken = answering("HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".into());
    for (case, name, code, words) in [
        ("it is there", format!("{}/app:1", open.address()), 0, ""),
        ("another tag is there, this one is not", format!("{}/app:2", open.address()), 1, ""),
        ("no such repository", format!("{}/other:1", open.address()), 1, ""),
        ("no credentials", format!("{}/app:1", private.address()), 7, "refused the credentials"),
        // More than the four: by digest, a server that fails, no server.
        ("by digest", format!("{}/app@{here}", open.address()), 0, ""),
        ("a server that fails", format!("{broken}/app:1"), 7, "failed with status 500"),
        ("no server", "127.0.0.1:1/app:1".into(), 7, "no connection"),
    ] {
        let (got, said) = machine.run(&format!("registry exists {name}"))?;
        assert_eq!(got, Some(code), "{case}: {said}");
        assert!(said.contains(words), "{case}: {said}");
    }
    Ok(())
}

#[test]
fn delete() -> Result<()> {
    if !needs::available("delete", &[Need::Registry]) {
        return Ok(());
    }
    let registry = Registry::start()?;
    let fixed = fixed_registry();
    let name = |rest: &str| format!("{}/{rest}", registry.address());
    let machine = Machine::new()?;
    let one = machine.push(&name("app:1"), "one", "linux/amd64")?;
    skopeo(&[
        "copy",
        "--src-tls-verify=false",
        "--dest-tls-verify=false",
        "-q",
        &format!("docker://{}", name("app:1")),
        &format!("docker://{}", name("app:also")),
    ])?;
    let two = machine.push(&name("app:2"), "two", "linux/amd64")?;
    machine.push(&name("app:3"), "three", "linux/amd64")?;
    for (case, line, code, words) in [
        ("a digest with tags", format!("{}@{one}", name("app")), 2, "also has the tags 1, also"),
        // Debian's registry deletes manifests only: a tag goes with its manifest, when that has no other.
        ("a tag of several", name("app:also"), 2, "also has the tags 1; 127.0.0.1"),
        ("the only tag", name("app:3"), 0, "/app:3"),
        ("forced, with its tags", format!("--force {}@{one}", name("app")), 0, "/app:1"),
        ("not there", name("app:1"), 7, "is not in the registry"),
        ("what to delete is not said", name("app"), 2, "does not say what to delete"),
    ] {
        let (got, said) = machine.run(&format!("registry delete {line}"))?;
        assert_eq!(got, Some(code), "{case}: {said}");
        assert!(said.contains(words), "{case}: {said}");
    }
    assert_eq!(machine.ok(&format!("registry tags {}", name("app")))?, "2");
    assert_eq!(digest(&format!("docker://{}", name("app:2")))?, two);
    // A registry that deletes nothing says so.
    let (code, said) = machine.run(&format!("registry delete {fixed}/app:1"))?;
    assert_eq!(code, Some(7), "{said}");
    assert!(said.contains("does not delete images") && said.contains("storage.delete.enabled"), "{said}");
    Ok(())
}

/// Answers as a registry with one image whose operator forbids to delete.
fn fixed_registry() -> String {
    let manifest = format!("sha256:{}", "a".repeat(64));
    serving(move |request| {
        let refused = r#"{"errors":[{"code":"UNSUPPORTED","message":"The operation is unsupported."}]}"#;
        if request.starts_with("DELETE") {
            return format!("HTTP/1.1 405 Method Not Allowed\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{refused}", refused.len());
        }
        if request.starts_with("HEAD") {
            return format!(
                "HTTP/1.1 200 OK\r\nContent-Type: application/vnd.oci.image.manifest.v1+json\r\nDocker-Content-Digest: {manifest}\r\nContent-Length: 9\r\nConnection: close\r\n\r\n"
            );
        }
        let tags = r#"{"name":"app","tags":["1"]}"#;
        format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{tags}", tags.len())
    })
}

fn answering(answer: String) -> String {
    serving(move |_| answer.clone())
}

/// A server on loopback that gives `answer` to each request; it ends with the test's process.
fn serving(answer: impl Fn(&str) -> String + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            let mut buffer = [0; 8192];
            let n = stream.read(&mut buffer).unwrap_or(0);
            let _ = stream.write_all(answer(&String::from_utf8_lossy(&buffer[..n])).as_bytes());
        }
    });
    address
}

#[test]
fn tags_of_all_pages() -> Result<()> {
    if !needs::available("tags_of_all_pages", &[Need::Registry]) {
        return Ok(());
    }
    let registry = Registry::start()?;
    let name = format!("{}/app", registry.address());
    let machine = Machine::new()?;
    machine.push(&format!("{name}:first"), "x", "linux/amd64")?;
    // Tags are files of this registry: 300 are made without 300 requests.
    let tags = registry.storage().join("repositories/app/_manifests/tags");
    for i in 0..300 {
        output(Command::new("cp").arg("-r").arg(tags.join("first")).arg(tags.join(format!("t{i:03}"))))?;
    }
    let listed = machine.ok(&format!("registry tags {name}"))?;
    let lines: Vec<&str> = listed.lines().collect();
    assert_eq!((lines.len(), lines[0], lines[300]), (301, "first", "t299"));
    let json: serde_json::Value = serde_json::from_str(&machine.ok(&format!("registry tags {name} --format json"))?).unwrap();
    assert_eq!((json["name"].as_str(), json["tags"].as_array().unwrap().len()), (Some(name.as_str()), 301));
    let (code, said) = machine.run(&format!("registry tags {}/none", registry.address()))?;
    assert!(code == Some(7) && said.contains("is not in the registry"), "{said}");
    Ok(())
}

/// Lists of tags that lead nowhere, or elsewhere.
#[test]
fn hostile_lists_of_tags() -> Result<()> {
    let page = |link: &str, body: &str| {
        let link = if link.is_empty() { String::new() } else { format!("Link: {link}\r\n") };
        format!(
            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n{link}Content-Length: {}\r\nConnection: close\r\n\r\n{body}",
            body.len()
        )
    };
    let machine = Machine::new()?;
    for (case, link, body, code, words) in [
        ("the same page for ever", "</v2/app/tags/list?n=1000>; rel=\"next\"", "{\"tags\":[\"a\"]}", 7, "has no end"),
        ("another server", "<http://192.0.2.1/v2/app/tags/list>; rel=\"next\"", "{\"tags\":[\"a\"]}", 7, "is on another server"),
        ("another port", "<http://127.0.0.1:1/v2/app/tags/list>; rel=\"next\"", "{\"tags\":[\"a\"]}", 7, "is on another server"),
        ("a file", "<file:///etc/passwd>; rel=\"next\"", "{\"tags\":[\"a\"]}", 7, "is on another server"),
        ("tags that are none", "", "{\"tags\":[\"a\\u001b[31m/../b\"]}", 7, "which is none"),
        ("no list", "", "[1]", 7, "cannot be read"),
        ("nothing", "", "{\"tags\":null}", 0, ""),
    ] {
        let address = answering(page(link, body));
        let (got, said) = machine.run(&format!("registry tags {address}/app"))?;
        assert_eq!(got, Some(code), "{case}: {said}");
        assert!(said.contains(words) && !said.contains('\u{1b}'), "{case}: {said}");
    }
    // Three pages of an honest one.
    let paged = serving(move |request| {
        let (link, tags) = match request {
            _ if request.contains("last=b") => ("", "[\"c\",\"b\"]"),
            _ if request.contains("last=a") => ("</v2/app/tags/list?last=b>; rel=\"next\"", "[]"),
            _ => ("<tags/list?last=a>; rel=\"next\"", "[\"b\",\"a\"]"),
        };
        page(&link.replace("<tags", "</v2/app/tags"), &format!("{{\"tags\":{tags}}}"))
    });
    assert_eq!(machine.ok(&format!("registry tags {paged}/app"))?, "a\nb\nc");
    let count = std::sync::atomic::AtomicUsize::new(0);
    let idle = serving(move |_| {
        let n = count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        page(&format!("</v2/app/tags/list?last={n}>; rel=\"next\""), "{\"tags\":[\"a\"]}")
    });
    let (code, said) = machine.run(&format!("registry tags {idle}/app"))?;
    assert!(code == Some(7) && said.contains("has no end"), "{said}");
    // Ever new pages: each one leads to the next, and nothing stops them but the bound.
    let count = std::sync::atomic::AtomicUsize::new(0);
    let endless = serving(move |_| {
        let n = count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        page(&format!("</v2/app/tags/list?last={n}>; rel=\"next\""), &format!("{{\"tags\":[\"t{n}\"]}}"))
    });
    let (code, said) = machine.run(&format!("registry tags {endless}/app"))?;
    assert!(code == Some(7) && said.contains("has no end"), "{said}");
    Ok(())
}

#[test]
fn inspect() -> Result<()> {
    if !needs::available("inspect", &[Need::Registry]) {
        return Ok(());
    }
    let registry = Registry::start()?;
    let name = format!("{}/app:1", registry.address());
    let machine = Machine::new()?;
    let index = machine.push(&name, "x", "linux/amd64,linux/arm64")?;
    let other = Machine::new()?;
    let text = other.ok(&format!("registry inspect {name}"))?;
    for words in [&index, "platform linux/amd64", "platform linux/arm64", "in 1 layers"] {
        assert!(text.contains(words), "{text}");
    }
    let json: serde_json::Value = serde_json::from_str(&other.ok(&format!("registry inspect --format json {name}"))?).unwrap();
    assert_eq!(json["digest"], index.as_str());
    assert_eq!(json["images"][1]["config"]["config"]["Env"][1], "CONTENT=x");
    let raw = other.ok(&format!("registry inspect --raw {name}"))?;
    assert_eq!(raw, skopeo(&["inspect", "--raw", "--tls-verify=false", &format!("docker://{name}")])?);
    let (code, said) = other.run(&format!("registry inspect {}/app:2", registry.address()))?;
    assert!(code == Some(7) && said.contains("is not in the registry"), "{said}");
    // Layers stayed where they are, and the image has no name here.
    assert_eq!(fs::read_dir(other.path().join("state/store/blobs/sha256")).unwrap().count(), 5);
    assert_eq!(other.ok("images -q")?, "");
    Ok(())
}

/// Copies in all directions; skopeo reads each result, and its digest is that of the source.
#[test]
fn copies() -> Result<()> {
    if !needs::available("copies", &[Need::Registry]) {
        return Ok(());
    }
    let (first, second) = (Registry::start()?, Registry::start_with(Options { bases: &[], credentials: None })?);
    let source = format!("{}/team/app:1", first.address());
    let maker = Machine::new()?;
    let index = maker.push(&source, "x", "linux/amd64,linux/arm64")?;
    let machine = Machine::new()?;
    let dir = machine.path().display().to_string();
    let there = |rest: &str| format!("{}/{rest}", second.address());
    let amd = {
        let raw: serde_json::Value =
            serde_json::from_str(&skopeo(&["inspect", "--raw", "--tls-verify=false", &format!("docker://{source}")])?).unwrap();
        raw["manifests"][0]["digest"].as_str().unwrap().to_owned()
    };
    let same = format!("{}/other/place:2", first.address());
    for (from, to, flags, expect) in [
        (source.clone(), there("app:1"), "", &index),
        (format!("docker://{source}"), there("amd:1"), "--platform linux/amd64", &amd),
        (source.clone(), same.clone(), "", &index),
        (source.clone(), "oci:layout:v1".into(), "", &index),
        (source.clone(), "oci:layout:amd".into(), "--platform linux/amd64", &amd),
        (source.clone(), "oci-archive:image.tar:v1".into(), "", &index),
        ("oci:layout:v1".into(), there("from-layout:1"), "", &index),
        ("oci:layout:v1".into(), there("from-layout:amd"), "--platform linux/amd64", &amd),
        ("oci-archive:image.tar".into(), there("from-archive:1"), "", &index),
        ("oci:layout:amd".into(), "oci:second".into(), "", &amd),
    ] {
        let printed = machine.ok(&format!("registry copy {from} {to} {flags}"))?;
        assert_eq!(&printed, expect, "{from} {to}");
        let place = match to.split_once(':') {
            Some((kind @ ("oci" | "oci-archive"), path)) => format!("{kind}:{dir}/{path}"),
            _ => format!("docker://{to}"),
        };
        assert_eq!(&digest(&place)?, expect, "{from} {to}: what skopeo reads");
    }
    // What skopeo writes, we read; and a docker archive there and back.
    skopeo(&["copy", "-q", "--all", "--src-tls-verify=false", &format!("docker://{source}"), &format!("oci:{dir}/theirs:x")])?;
    assert_eq!(machine.ok(&format!("registry copy oci:theirs:x {}", there("theirs:1")))?, index);
    machine.ok(&format!("registry copy {source} docker-archive:docker.tar:app:1 --platform linux/amd64"))?;
    let config = skopeo(&["inspect", "--config", &format!("docker-archive:{dir}/docker.tar")])?;
    assert!(config.contains("CONTENT=x"), "{config}");
    machine.ok(&format!("registry copy docker-archive:docker.tar {}", there("docker:1")))?;
    let config = skopeo(&["inspect", "--config", "--tls-verify=false", &format!("docker://{}", there("docker:1"))])?;
    assert!(config.contains("CONTENT=x"), "{config}");
    // A copy that is there already sends no blob; one that is nowhere says so.
    let before = machine.ok("images -q")?;
    assert_eq!(before, "", "a copy names nothing here");
    for (line, code, words) in [
        (format!("{source} {source}"), 2, "onto itself"),
        (format!("{} oci:x", there("none:1")), 7, "is not in the registry"),
        (format!("oci:nowhere {}", there("x:1")), 5, "no index.json"),
        (format!("oci:layout:v9 {}", there("x:1")), 5, "has no image \"v9\"; it has v1, amd"),
        (format!("oci:layout {}", there("x:1")), 5, "it has 2 images; name one of them"),
        (
            format!("oci:layout:v1 {} --platform linux/s390x", there("x:1")),
            2,
            "has no image for linux/s390x; it has linux/amd64, linux/arm64",
        ),
        (format!("{source} {} --platform linux/s390x", there("x:1")), 7, "linux/s390x"),
        (format!("{source} docker-archive:all.tar"), 5, "holds one"),
        (format!("{source} dir:x"), 2, "dir: is not supported"),
    ] {
        let (got, said) = machine.run(&format!("registry copy {line}"))?;
        assert_eq!(got, Some(code), "{line}: {said}");
        assert!(said.contains(words), "{line}: {said}");
    }
    assert!(!machine.path().join("all.tar").exists(), "half a file is none");
    Ok(())
}

#[test]
fn mounts() -> Result<()> {
    if !needs::available("mounts", &[Need::Registry]) {
        return Ok(());
    }
    let registry = Registry::start()?;
    let name = |rest: &str| format!("{}/{rest}", registry.address());
    let machine = Machine::new()?;
    machine.push(&name("app:1"), "x", "linux/amd64")?;
    let blobs = machine.ok(&format!("registry mount {} {}", name("app:1"), name("new/place")))?;
    assert_eq!(blobs.lines().count(), 2, "{blobs}");
    for blob in blobs.lines() {
        let link = registry.storage().join("repositories/new/place/_layers/sha256").join(&blob["sha256:".len()..]).join("link");
        assert!(link.exists(), "{blob}");
        assert_eq!(machine.ok(&format!("registry mount {}@{blob} {}", name("app"), name("third")))?, blob);
    }
    for (line, code, words) in [
        (format!("{} other.invalid/x", name("app:1")), 2, "mounted within a registry"),
        (format!("{} {}", name("app:1"), name("x:tag")), 2, "has a tag or digest"),
        (format!("{} {}", name("none:1"), name("x")), 7, "is not in the registry"),
        (format!("{}@sha256:{} {}", name("app"), "0".repeat(64), name("x")), 7, "is not in the registry"),
    ] {
        let (got, said) = machine.run(&format!("registry mount {line}"))?;
        assert_eq!(got, Some(code), "{line}: {said}");
        assert!(said.contains(words), "{line}: {said}");
    }
    Ok(())
}

/// How a push ends: six ways.
#[test]
fn push_outcomes() -> Result<()> {
    if !needs::available("push_outcomes", &[Need::Registry]) {
        return Ok(());
    }
    let open = Registry::start()?;
    let private = Registry::start_with(Options { bases: &[], credentials: Some(("u", "p")) })?;
    let machine = Machine::new()?;
    fs::write(machine.path().join("ctx/Dockerfile"), "FROM scratch\nCOPY a /a\n").unwrap();
    let built = machine.ok("build ctx -t app:1")?;
    let denying = answering("HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".into());
    for (case, line, code, words) in [
        ("pushed", format!("app:1 {}/app:1", open.address()), 0, built.as_str()),
        ("there already", format!("app:1 {}/app:1", open.address()), 0, &built),
        ("not here", format!("none:1 {}/app:1", open.address()), 2, "there is no image none:1 on this machine"),
        ("no credentials", format!("app:1 {}/app:1", private.address()), 7, "refused the credentials"),
        ("no right", format!("app:1 {denying}/app:1"), 7, "does not allow it"),
        ("unknown registry", "app:1 127.0.0.1:1/app:1".into(), 7, "no connection"),
    ] {
        let (got, said) = machine.run(&format!("push {line}"))?;
        assert_eq!(got, Some(code), "{case}: {said}");
        assert!(said.contains(words), "{case}: {said}");
    }
    Ok(())
}

/// How a pull ends: five ways.
#[test]
fn pull_outcomes() -> Result<()> {
    if !needs::available("pull_outcomes", &[Need::Registry]) {
        return Ok(());
    }
    let open = Registry::start_with(Options { bases: &[Base::Busybox], credentials: None })?;
    let private = Registry::start_with(Options { bases: &[], credentials: Some(("u", "p")) })?;
    let maker = Machine::new()?;
    let built = maker.push(&format!("{}/app:1", open.address()), "x", "linux/amd64")?;
    let machine = Machine::new()?;
    for (case, name, code, words) in [
        ("pulled", format!("{}/app:1", open.address()), 0, built.as_str()),
        ("here already", format!("{}/app:1", open.address()), 0, &built),
        ("not found", format!("{}/app:2", open.address()), 7, "is not in the registry"),
        ("no credentials", format!("{}/app:1", private.address()), 7, "refused the credentials"),
        ("unknown registry", "127.0.0.1:1/app:1".into(), 7, "no connection"),
    ] {
        let (got, said) = machine.run(&format!("pull {name}"))?;
        assert_eq!(got, Some(code), "{case}: {said}");
        assert!(said.contains(words), "{case}: {said}");
    }
    Ok(())
}
