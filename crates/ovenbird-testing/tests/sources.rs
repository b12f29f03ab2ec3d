//! Contexts from repositories, web servers and registries, on real servers and from outside.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use ovenbird_testing::Result;
use ovenbird_testing::command::{Level, Workspace, finish};
use ovenbird_testing::git::{Repository, SshServer, WebServer};
use ovenbird_testing::needs::{self, Need};
use ovenbird_testing::process::output;
use ovenbird_testing::registry::{Options, Registry};

const LIMIT: Duration = Duration::from_mins(1);
const DOCKERFILE: &str = "FROM scratch\nCOPY . /\n";

/// A user with a state folder.
struct User {
    room: Workspace,
}

impl User {
    fn new(level: Level) -> Result<Self> {
        Ok(Self { room: Workspace::new(level)? })
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.room.ovenbird();
        command.args(["--root", "state", "--progress", "plain"]).args(arguments);
        command
    }

    fn run(&self, arguments: &[&str]) -> Result<(Option<i32>, String)> {
        finish(&mut self.command(arguments), None, LIMIT)
    }

    /// Builds; the report.
    fn build(&self, arguments: &[&str]) -> Result<serde_json::Value> {
        let (code, log) = self.run(&[&["build", "--reproducible", "--metadata-file", "metadata.json"], arguments].concat())?;
        assert_eq!(code, Some(0), "{arguments:?}: {log}");
        Ok(serde_json::from_str(&fs::read_to_string(self.room.path().join("metadata.json")).unwrap()).unwrap())
    }

    fn digest(&self, arguments: &[&str]) -> Result<String> {
        Ok(self.build(arguments)?["containerimage.digest"].as_str().unwrap_or_default().to_owned())
    }

    /// Fails; exit code and text.
    fn refused(&self, arguments: &[&str]) -> Result<String> {
        let (code, log) = self.run(&[&["build"], arguments].concat())?;
        assert_ne!(code, Some(0), "{arguments:?}: {log}");
        Ok(format!("{} {log}", code.unwrap_or(-1)))
    }

    /// A file of the user's.
    fn write(&self, name: &str, text: &str, mode: u32) -> Result<()> {
        let path = self.room.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        self.room.give(path.parent().unwrap())?;
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        self.room.give(&path)
    }

    /// Files of the image, by `-o`.
    fn files(&self, arguments: &[&str]) -> Result<Vec<String>> {
        let out = self.room.path().join("out");
        let _ = fs::remove_dir_all(&out);
        self.build(&[arguments, &["-o", "out"]].concat())?;
        let listing = output(Command::new("find").arg(&out).args(["-not", "-type", "d", "-printf", "%P\n"]))?;
        let mut files: Vec<String> = listing.lines().map(str::to_owned).collect();
        files.sort();
        Ok(files)
    }

    /// Nowhere below the user's folder are these bytes.
    fn nowhere(&self, secret: &str, but: &str) {
        let found = Command::new("grep").args(["-rlaF", secret]).arg(self.room.path()).output().unwrap();
        let found = String::from_utf8_lossy(&found.stdout);
        let found: Vec<&str> = found.lines().filter(|line| but.is_empty() || !line.contains(but)).collect();
        assert!(found.is_empty(), "{secret} is in {found:?}");
    }
}

fn ready(test: &str) -> bool {
    needs::available(test, &[Need::Git, Need::Web])
}

#[test]
fn names_of_commits() -> Result<()> {
    if !ready("names_of_commits") {
        return Ok(());
    }
    let web = WebServer::start(false)?;
    let user = User::new(Level::Own)?;
    let repository = Repository::create(&user.room.path().join("r"))?;
    let first = repository.commit(&[("Dockerfile", DOCKERFILE), ("a", "1")])?;
    repository.git(&["tag", "v1.9.0"])?;
    repository.git(&["tag", "-a", "-m", "x", "v1.10.0"])?;
    let second = repository.commit(&[("a", "2")])?;
    let third = repository.commit(&[("a", "3")])?;
    repository.git(&["checkout", "--quiet", "-b", "feature/x", &first])?;
    let branch = repository.commit(&[("a", "branch")])?;
    let pull = repository.commit(&[("a", "pull")])?;
    repository.git(&["update-ref", "refs/pull/7/head", &pull])?;
    repository.git(&["reset", "--quiet", "--hard", &branch])?;
    repository.git(&["checkout", "--quiet", "main"])?;
    web.publish(&repository, "r.git")?;
    let url = format!("{}/git/r.git", web.url());
    for (suffix, commit, head, tag) in [
        ("", &third, Some("main"), None),
        ("#main", &third, Some("main"), None),
        ("#feature/x", &branch, Some("feature/x"), None),
        ("?branch=feature/x", &branch, Some("feature/x"), None),
        ("#v1.10.0", &first, None, Some("v1.10.0")),
        ("?tag=v1.9.0", &first, None, Some("v1.10.0")),
        (&format!("#{second}"), &second, None, None),
        (&format!("?commit={second}"), &second, None, None),
        (&format!("#{}", &second[..7]), &second, None, None),
        (&format!("?ref=main&checksum={}", &third[..12]), &third, Some("main"), None),
        ("#refs/pull/7/head", &pull, None, None),
        ("#pull/7/head", &pull, None, None),
    ] {
        let report = user.build(&[&format!("{url}{suffix}"), "-t", "x:{git.sha}"])?;
        let revision = &report["ovenbird"]["revision"];
        assert_eq!(revision["commit"], commit.as_str(), "{suffix}");
        assert_eq!((revision["branch"].as_str(), revision["tag"].as_str()), (head, tag), "{suffix}");
        assert_eq!(report["image.name"], format!("docker.io/library/x:{commit}"), "{suffix}");
    }
    for (suffix, expect) in [
        ("#none", "does not contain ref none"),
        ("#0000000", "does not contain ref 0000000"),
        ("?ref=main&checksum=123456", "not at --checksum=123456"),
        ("?wrong=1", "unexpected query \"wrong\""),
        ("?tag=a&branch=b", "branch conflicts with tag"),
        ("#--upload-pack=x", "is not a valid git URL"),
        ("?commit=a", "commit \"a\" is no commit: that has 4 to 64 hexadecimal digits"),
    ] {
        let told = user.refused(&[&format!("{url}{suffix}")])?;
        assert!(told.contains(expect), "{suffix}: {told}");
    }
    // Two commits that begin alike: some are found soon, for four digits.
    let tree = repository.git(&["rev-parse", "HEAD^{tree}"])?;
    let mut seen = std::collections::BTreeMap::new();
    let alike = (0..100_000).find_map(|number| {
        let commit = repository.git(&["commit-tree", tree.trim(), "-m", &number.to_string()]).unwrap().trim().to_owned();
        let begin = commit[..4].to_owned();
        let other = seen.insert(begin.clone(), commit.clone())?;
        Some((begin, commit, other))
    });
    let (begin, one, other) = alike.unwrap();
    for (name, commit) in [("one", &one), ("other", &other)] {
        repository.git(&["update-ref", &format!("refs/heads/alike-{name}"), commit])?;
    }
    web.publish(&repository, "r.git")?;
    let told = user.refused(&[&format!("{url}#{begin}")])?;
    assert!(told.starts_with("5 ") && told.contains("is the beginning of several commits") && told.contains(&one), "{told}");
    assert!(told.contains(&other) && told.contains("give more digits"), "{told}");
    // The time of the commit.
    let report = user.build(&[&url, "--build-arg", "SOURCE_DATE_EPOCH=context", "-o", "type=oci,dest=oci,tar=false"])?;
    let blob = |digest: &str| fs::read_to_string(user.room.path().join("oci/blobs").join(digest.replace(':', "/"))).unwrap();
    assert!(blob(report["containerimage.config.digest"].as_str().unwrap()).contains("\"created\":\"2023-11-14T22:13:20Z\""));
    Ok(())
}

#[test]
fn what_is_read_of_a_repository() -> Result<()> {
    if !ready("what_is_read_of_a_repository") {
        return Ok(());
    }
    let web = WebServer::start(false)?;
    let user = User::new(Level::Own)?;
    let inner = Repository::create(&user.room.path().join("inner"))?;
    inner.commit(&[("inside", "i")])?;
    web.publish(&inner, "inner.git")?;
    let repository = Repository::create(&user.room.path().join("r"))?;
    repository.commit(&[
        ("Dockerfile", DOCKERFILE),
        ("top", ""),
        ("sub/Dockerfile", "FROM scratch\nCOPY . /sub/\n"),
        ("sub/other/D", "FROM scratch\nCOPY file /by-other\n"),
        ("sub/.dockerignore", "*.log\nother\nDockerfile\n.dockerignore\n"),
        ("sub/file", ""),
        ("sub/x.log", ""),
    ])?;
    let inner_url = format!("{}/git/inner.git", web.url());
    repository.git(&["submodule", "--quiet", "add", &inner_url, "module"])?;
    std::os::unix::fs::symlink("/etc", repository.path().join("out")).unwrap();
    repository.commit(&[])?;
    web.publish(&repository, "r.git")?;
    let url = format!("{}/git/r.git", web.url());
    assert_eq!(user.files(&[&format!("{url}#:sub")])?, ["sub/file"]);
    assert_eq!(user.files(&[&format!("{url}?subdir=sub"), "-f", "other/D"])?, ["by-other"]);
    let whole = user.files(&[&url])?;
    assert!(
        whole.contains(&"module/inside".to_owned()) && !whole.iter().any(|file| file.split('/').any(|part| part == ".git")),
        "{whole:?}"
    );
    assert!(!user.files(&[&format!("{url}?submodules=false")])?.contains(&"module/inside".to_owned()));
    for keep in [&[url.as_str(), "--build-arg", "BUILDKIT_CONTEXT_KEEP_GIT_DIR=1"][..], &[&format!("{url}?keep-git-dir=true")]] {
        assert!(user.files(keep)?.contains(&".git/HEAD".to_owned()));
    }
    // A named context, and a Dockerfile from standard input.
    fs::create_dir(user.room.path().join("d")).unwrap();
    fs::write(user.room.path().join("d/Dockerfile"), "FROM scratch\nCOPY --from=repo file /\n").unwrap();
    assert_eq!(user.files(&["d", "--build-context", &format!("repo={url}#:sub")])?, ["file"]);
    let (code, log) = finish(&mut user.command(&["build", "-f", "-", &url]), Some("FROM scratch\nCOPY top /\n"), LIMIT)?;
    assert_eq!(code, Some(0), "{log}");
    for (suffix, expect) in [
        ("#:none", "\"none\" is not a folder of the repository"),
        ("#:out", "\"out\" is not a folder of the repository"),
        ("#:../..", "is not a folder of the repository"),
    ] {
        let told = user.refused(&[&format!("{url}{suffix}")])?;
        assert!(told.contains(expect), "{suffix}: {told}");
    }
    // A submodule must not reach what is on this machine.
    repository.git(&["config", "-f", ".gitmodules", "submodule.module.url", &format!("file://{}", inner.path().display())])?;
    repository.commit(&[])?;
    web.publish(&repository, "r.git")?;
    let told = user.refused(&[&url])?;
    assert!(told.contains("transport 'file' not allowed") && told.contains("a submodule is on this machine"), "{told}");
    // `ADD` of the same, which sees nothing of the user's.
    user.write(
        "add/Dockerfile",
        &format!("FROM scratch\nADD {url}?submodules=false&keep-git-dir=1 /a/\nADD {url}?submodules=0#:sub /b/\n"),
        0o644,
    )?;
    let added = user.files(&["add"])?;
    assert!(added.contains(&"a/.git/HEAD".to_owned()) && added.contains(&"b/file".to_owned()), "{added:?}");
    assert_eq!(added.iter().filter(|file| file.starts_with("b/") && file.contains(".git/")).count(), 0);
    user.write("add/Dockerfile", &format!("FROM scratch\nADD file://{} /a/\n", repository.path().display()), 0o644)?;
    assert!(user.refused(&["add"])?.contains("not found"), "no repository of this machine");
    // What the last build of the repository was is known.
    repository.commit(&[("sub/file", "other")])?;
    web.publish(&repository, "r.git")?;
    let (code, log) = user.run(&["build", "--explain", &format!("{url}?submodules=false#:sub")])?;
    assert!(code == Some(0) && log.contains("because file file"), "{log}");
    // A folder as a repository.
    let told = user.refused(&["ext::sh -c touch% proof"])?;
    assert!(told.contains("does not exist") && !user.room.path().join("proof").exists(), "{told}");
    assert_eq!(user.files(&[&format!("file://{}?submodules=false#:sub", repository.path().display())])?, ["sub/file"]);
    Ok(())
}

fn private(level: Level) -> Result<()> {
    let (name, token) = WebServer::CREDENTIALS;
    let web = WebServer::start(true)?;
    let user = User::new(level)?;
    let place = tempfile::tempdir().unwrap();
    let repository = Repository::create(&place.path().join("r"))?;
    repository.commit(&[("Dockerfile", DOCKERFILE), ("a", "1")])?;
    let inner = Repository::create(&place.path().join("inner"))?;
    inner.commit(&[("inside", "i")])?;
    web.publish(&inner, "private/inner.git")?;
    repository.git(&["config", "-f", ".gitmodules", "submodule.module.path", "module"])?;
    repository.git(&["config", "-f", ".gitmodules", "submodule.module.url", "../inner.git"])?;
    let commit = inner.git(&["rev-parse", "HEAD"])?;
    repository.git(&["update-index", "--add", "--cacheinfo", &format!("160000,{commit},module")])?;
    repository.git(&["add", ".gitmodules"])?;
    repository.git(&["commit", "--quiet", "-m", "module"])?;
    web.publish(&repository, "private/r.git")?;
    let url = format!("{}/git/private/r.git", web.url());
    // The user's configuration says whom to trust.
    let trust = format!(
        "[http]\n\tsslCAInfo = {}\n[filter \"x\"]\n\tsmudge = touch {}/proof\n",
        web.certificate().display(),
        user.room.path().display()
    );
    user.write("home/.gitconfig", &trust, 0o644)?;
    let files = ["Dockerfile", "a", "module/inside"];

    let told = user.refused(&[&url])?;
    assert!(told.starts_with("5 ") && told.contains("GIT_AUTH_TOKEN"), "{told}");
    user.write("token", &format!("{token}\n"), 0o600)?;
    let checked = |user: &User, arguments: &[&str], but: &str| -> Result<()> {
        let files_of = user.files(arguments)?;
        assert_eq!(files_of.iter().filter(|file| !file.starts_with('.')).collect::<Vec<_>>(), files);
        user.nowhere(token, but);
        user.nowhere("eC1hY2Nlc3MtdG9rZW46", but);
        Ok(())
    };
    checked(&user, &[&url, "--secret", "id=GIT_AUTH_TOKEN,src=token"], "/token")?;
    checked(&user, &[&url, "--secret", "id=GIT_AUTH_TOKEN.127.0.0.1,src=token"], "/token")?;
    user.write("token", "wrong", 0o600)?;
    let told = user.refused(&[&url, "--secret", "id=GIT_AUTH_TOKEN,src=token"])?;
    assert!(told.contains("cannot be fetched"), "{told}");
    // In the address.
    let address = url.replacen("://", &format!("://{name}:{token}@"), 1);
    let (code, log) = user.run(&["build", &address, "--metadata-file", "metadata.json"])?;
    assert!(code == Some(0) && !log.contains(token) && log.contains("***@127.0.0.1"), "{log}");
    user.nowhere(token, "");
    let told = user.refused(&[&address.replace(token, "wrong-but-private")])?;
    assert!(!told.contains("wrong-but-private"), "{told}");
    // By the user's credential helper.
    let helper = format!("{trust}[credential]\n\thelper = \"!f() {{ echo username={name}; echo password={token}; }}; f\"\n");
    user.write("home/.gitconfig", &helper, 0o600)?;
    checked(&user, &[&url], "/.gitconfig")?;
    assert!(!user.room.path().join("proof").exists());
    Ok(())
}

#[test]
fn private_repositories() -> Result<()> {
    if !ready("private_repositories") {
        return Ok(());
    }
    private(Level::Own)
}

#[test]
fn private_repositories_of_ordinary_users() -> Result<()> {
    if !needs::available("private_repositories_of_ordinary_users", &[Need::Git, Need::Web, Need::Users]) {
        return Ok(());
    }
    private(Level::Rootless)?;
    private(Level::SingleId)
}

#[test]
fn over_ssh() -> Result<()> {
    if !needs::available("over_ssh", &[Need::Git, Need::Ssh, Need::Root]) {
        return Ok(());
    }
    let server = SshServer::start()?;
    for level in [Level::Own, Level::Rootless] {
        if level == Level::Rootless && Need::Users.missing().is_some() {
            continue;
        }
        let user = User::new(level)?;
        let place = tempfile::tempdir().unwrap();
        let repository = Repository::create(&place.path().join("r"))?;
        let commit = repository.commit(&[("Dockerfile", DOCKERFILE), ("a", "1")])?;
        let url = format!("ssh://root@127.0.0.1:{}{}", server.port(), repository.path().display());
        let told = user.refused(&[&url])?;
        assert!(told.starts_with("5 ") && told.contains("not among your known hosts"), "{level:?}: {told}");
        user.write("home/.ssh/known_hosts", &server.known_host()?, 0o600)?;
        let told = user.refused(&[&url])?;
        assert!(told.contains("Permission denied") && told.contains("add a key"), "{level:?}: {told}");
        let key = fs::read_to_string(server.key()).unwrap();
        user.write("home/.ssh/id_ed25519", &key, 0o600)?;
        assert_eq!(user.build(&[&url])?["ovenbird"]["revision"]["commit"], commit.as_str(), "{level:?}");
        // By the short form, with an agent instead of the file, through an alias of the user's.
        fs::rename(user.room.path().join("home/.ssh/id_ed25519"), user.room.path().join("key")).unwrap();
        user.write("home/.ssh/config", &format!("Host forge\n  HostName 127.0.0.1\n  Port {}\n  User root\n", server.port()), 0o600)?;
        let run = |arguments: &[&str]| {
            let binary = user.command(arguments);
            let mut command = user.room.command(Path::new("ssh-agent"));
            command.args(["sh", "-c", "ssh-add -q key && exec \"$@\"", "sh"]).arg(binary.get_program()).args(binary.get_args());
            finish(&mut command, None, LIMIT)
        };
        let (code, log) =
            run(&["build", &format!("git@forge:{}", repository.path().display()).replacen("git@", "root@", 1), "--ssh", "default"])?;
        assert_eq!(code, Some(0), "{level:?}: {log}");
        user.write("d/Dockerfile", &format!("FROM scratch\nADD {url} /\n"), 0o644)?;
        let (code, log) = run(&["build", "d", "--ssh", "default"])?;
        assert_eq!(code, Some(0), "{level:?}: {log}");
        // A Dockerfile has no use of the user's keys.
        fs::rename(user.room.path().join("key"), user.room.path().join("home/.ssh/id_ed25519")).unwrap();
        let told = user.refused(&["d", "--no-cache", "--build-arg", "X=1", "--root", "other"])?;
        assert!(told.contains("Permission denied"), "{level:?}: {told}");
    }
    Ok(())
}

#[test]
fn large_files() -> Result<()> {
    if !needs::available("large_files", &[Need::Git, Need::Lfs]) {
        return Ok(());
    }
    let user = User::new(Level::Own)?;
    let repository = Repository::create(&user.room.path().join("r"))?;
    repository.git(&["lfs", "install", "--local"])?;
    repository.commit(&[
        ("Dockerfile", "FROM scratch\nCOPY big /\n"),
        (".gitattributes", "big filter=lfs diff=lfs merge=lfs -text\n"),
        ("big", "much"),
    ])?;
    let url = format!("file://{}", repository.path().display());
    assert_eq!(user.files(&[&url])?, ["big"]);
    assert_eq!(fs::read_to_string(user.room.path().join("out/big")).unwrap(), "much");
    // A configuration of the tool that cannot be read, or that leads nowhere.
    for (text, expect) in
        [("[broken\n", ".lfsconfig of the repository cannot be read"), ("[lfs]\n\turl = http://127.0.0.1:1/none\n", "Git LFS")]
    {
        repository.commit(&[(".lfsconfig", text)])?;
        let told = user.refused(&[&url])?;
        assert!(told.starts_with("5 ") && told.contains(expect), "{text}: {told}");
    }
    repository.git(&["rm", "--quiet", ".lfsconfig"])?;
    repository.commit(&[])?;
    // Without the tool there are pointers, and that is said.
    let bin = user.room.path().join("bin");
    fs::create_dir(&bin).unwrap();
    for program in ["git", "sh", "git-upload-pack"] {
        std::os::unix::fs::symlink(Path::new("/usr/bin").join(program), bin.join(program)).unwrap();
    }
    let (code, log) = finish(user.command(&["build", &url]).env("PATH", &bin), None, LIMIT)?;
    assert!(code == Some(0) && log.contains("Git LFS") && log.contains("\"big\""), "{log}");
    Ok(())
}

#[test]
fn the_same_image_from_everywhere() -> Result<()> {
    if !needs::available("the_same_image_from_everywhere", &[Need::Git, Need::Web, Need::Registry]) {
        return Ok(());
    }
    let web = WebServer::start(false)?;
    let registry = Registry::start_with(Options::default())?;
    let user = User::new(Level::Own)?;
    let repository = Repository::create(&user.room.path().join("r"))?;
    repository.commit(&[
        ("Dockerfile", DOCKERFILE),
        (".dockerignore", "ignored\n.git\n"),
        ("a/b", "text"),
        ("run", "#!/bin/sh\n"),
        ("ignored", "x"),
        ("gone", "not in the end"),
    ])?;
    fs::set_permissions(repository.path().join("run"), fs::Permissions::from_mode(0o755)).unwrap();
    std::os::unix::fs::symlink("a/b", repository.path().join("link")).unwrap();
    fs::remove_file(repository.path().join("gone")).unwrap();
    repository.commit(&[])?;
    web.publish(&repository, "r.git")?;
    let expected = user.digest(&["r"])?;
    let id = |source: &str| user.run(&["id", source]).map(|(_, id)| id);
    let expected_id = id("r")?;
    assert_eq!(expected_id.trim().len(), 64, "{expected_id}");
    assert_eq!(id(&format!("{}/git/r.git", web.url()))?, expected_id);
    assert_eq!(user.digest(&[&format!("{}/git/r.git", web.url())])?, expected);
    let tar = web.files().join("c.tar");
    let make =
        |excluded: &str, to: &Path| output(Command::new("tar").arg("-C").arg(repository.path()).args([excluded, "-cf"]).arg(to).arg("."));
    make("--exclude=./.git", &tar)?;
    for (name, program) in [("c.tar", ""), ("c.gz", "gzip"), ("c.bz2", "bzip2"), ("c.xz", "xz"), ("c.zst", "zstd")] {
        if !program.is_empty() {
            let mut command = Command::new("sh");
            command.args(["-c", &format!("{program} -c < {} > {}", tar.display(), web.files().join(name).display())]);
            output(&mut command)?;
        }
        let url = format!("{}/{name}", web.url());
        assert_eq!(user.digest(&[&url])?, expected, "{name}");
        let mut command = user.command(&["build", "--reproducible", "-q", "-"]);
        command.stdin(fs::File::open(web.files().join(name)).unwrap());
        let done = command.output().unwrap();
        assert_eq!(String::from_utf8_lossy(&done.stdout).trim(), expected, "{name} on standard input");
    }
    fs::copy(&tar, web.files().join("private/c.tar")).unwrap();
    let (name, token) = WebServer::CREDENTIALS;
    let guarded = format!("{}/private/c.tar", web.url());
    assert!(user.refused(&[&guarded])?.contains("401"));
    assert_eq!(user.digest(&[&guarded.replacen("://", &format!("://{name}:{token}@"), 1)])?, expected);
    user.nowhere(token, "");
    // A Dockerfile, which has no files; what is not there; an archive that is none.
    fs::write(web.files().join("D"), "FROM scratch\nLABEL a=b\n").unwrap();
    user.build(&[&format!("{}/D", web.url())])?;
    fs::write(web.files().join("short.gz"), &fs::read(web.files().join("c.gz")).unwrap()[..60]).unwrap();
    for (name, expect) in [("none", "404"), ("short.gz", "cannot be unpacked")] {
        let told = user.refused(&[&format!("{}/{name}", web.url())])?;
        assert!(told.starts_with("5 ") && told.contains(expect), "{told}");
    }
    // An artifact of two layers: the second takes a file of the first away.
    let image = user.room.path().join("image");
    fs::create_dir(&image).unwrap();
    fs::write(image.join("Dockerfile"), "FROM scratch\nCOPY old /\nADD c.tar /\n").unwrap();
    fs::create_dir(image.join("old")).unwrap();
    fs::copy(&tar, image.join("c.tar")).unwrap();
    let place = format!("{}/contexts/c:1", registry.address());
    let pushed = user.digest(&["image", "-t", &place, "--push", "-o", "type=oci,dest=layout,tar=false"])?;
    for address in [
        format!("oci://{place}"),
        format!("oci://{}@{pushed}", place.trim_end_matches(":1")),
        "oci-layout://layout".to_owned(),
        format!("oci-layout://layout@{pushed}"),
    ] {
        assert_eq!(user.digest(&[&address])?, expected, "{address}");
    }
    let told = user.refused(&[&format!("oci://{}/contexts/none:1", registry.address())])?;
    assert!(told.starts_with("7 "), "{told}");
    Ok(())
}

#[test]
fn a_stopped_fetch_ends() -> Result<()> {
    if !ready("a_stopped_fetch_ends") {
        return Ok(());
    }
    // Takes connections, and says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap();
    let user = User::new(Level::Own)?;
    let temp = tempfile::tempdir().unwrap();
    for path in ["x.git", "x.tar"] {
        let mut command = user.command(&["build", &format!("http://{address}/{path}")]);
        let mut child = command.env("TMPDIR", temp.path()).stderr(std::process::Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(700));
        let pid = rustix::process::Pid::from_raw(child.id().cast_signed()).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
        let began = Instant::now();
        let status = child.wait().unwrap();
        assert!(status.code() == Some(130) && began.elapsed() < Duration::from_secs(3), "{path}: {status} {:?}", began.elapsed());
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0, "nothing is left");
    }
    Ok(())
}

/// A web server with one file behind a password, which says what else it was sent.
struct Guarded {
    address: String,
}

impl Guarded {
    fn start(header: &'static str) -> Self {
        use std::io::{Read as _, Write as _};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(mut stream) = stream else { return };
                let (mut asked, mut piece) = (vec![], [0; 4096]);
                while !asked.windows(4).any(|end| end == b"\r\n\r\n") {
                    match stream.read(&mut piece) {
                        Ok(read @ 1..) => asked.extend_from_slice(&piece[..read]),
                        _ => break,
                    }
                }
                let asked = String::from_utf8_lossy(&asked).to_ascii_lowercase();
                let known = asked.contains(&format!("authorization: {}", header.to_ascii_lowercase()));
                let answer = if known { "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n" } else { "HTTP/1.1 401 No\r\nContent-Length: 4\r\n" };
                let _ = stream.write_all(format!("{answer}Connection: close\r\n\r\nfile").as_bytes());
            }
        });
        Self { address }
    }
}

#[test]
fn passwords_in_addresses_of_a_dockerfile() -> Result<()> {
    const TOKEN: &str = "t0ken-77-secret";
    // basic me:t0ken-77-secret
    let server = Guarded::start("basic bWU6dDBrZW4tNzctc2VjcmV0");
    let user = User::new(Level::Own)?;
    let url = format!("http://me:{TOKEN}@{}/f", server.address);
    user.write("d/Dockerfile", &format!("FROM scratch\nADD {url} /one\nADD --chmod=644 {url} /two\n"), 0o644)?;
    let build = |more: &[&str]| {
        let flags = ["build", "d", "--explain", "--metadata-file", "m.json", "-o", "type=oci,tar=false,dest=oci"];
        user.run(&[&flags, more].concat())
    };
    for more in [&[][..], &["--no-cache", "--progress", "rawjson"]] {
        let (code, log) = build(more)?;
        assert!(code == Some(0) && !log.contains(TOKEN) && log.contains("http://***@127.0.0.1"), "{log}");
        let report: serde_json::Value = serde_json::from_str(&fs::read_to_string(user.room.path().join("m.json")).unwrap()).unwrap();
        let history = report["ovenbird"]["images"][0]["inspect"]["History"].to_string();
        assert!(history.contains("ADD --chmod=644 http://***@127.0.0.1"), "{history}");
        // Neither the report nor the image, nor anything of the state.
        user.nowhere(TOKEN, "d/Dockerfile");
        user.nowhere("bWU6dDBrZW4tNzctc2VjcmV0", "");
    }
    assert_eq!(user.files(&["d"])?, ["one", "two"]);
    // By a variable.
    user.write("d/Dockerfile", &format!("FROM scratch\nARG T\nADD http://me:${{T}}@{}/f /\n", server.address), 0o644)?;
    let (code, log) = build(&["--build-arg", &format!("T={TOKEN}")])?;
    assert!(code == Some(0) && !log.contains(TOKEN) && log.contains("ADD http://***@127.0.0.1"), "{log}");
    // Another password is no other step: what was fetched counts.
    let key = |token: &str| -> Result<String> {
        user.write("d/Dockerfile", &format!("FROM scratch\nADD http://me:{token}@{}/f /one\n", server.address), 0o644)?;
        let (code, log) = user.run(&["id", "d"])?;
        assert_eq!(code, Some(0), "{log}");
        Ok(log.split_whitespace().last().unwrap_or_default().to_owned())
    };
    assert_eq!(key(TOKEN)?, key("another-one")?);
    // Where it fails, the lines of the Dockerfile are shown.
    let (code, log) = user.run(&["build", "d", "--metadata-file", "m.json"])?;
    assert!(code == Some(5) && log.contains("401") && !log.contains("another-one"), "{log}");
    user.nowhere("another-one", "d/Dockerfile");
    user.write("d/Dockerfile", "FROM scratch\nADD --checksum=x http://me:another-one@h/f /one\n", 0o644)?;
    for command in ["build", "lint"] {
        let (code, log) = user.run(&[command, "d"])?;
        assert!(code == Some(4) && log.contains("***@h/f") && !log.contains("another-one"), "{log}");
    }
    Ok(())
}

#[test]
fn a_password_in_the_address_of_the_source_stays_out_of_the_image() -> Result<()> {
    if !ready("a_password_in_the_address_of_the_source_stays_out_of_the_image") {
        return Ok(());
    }
    let (name, token) = WebServer::CREDENTIALS;
    let web = WebServer::start(true)?;
    let user = User::new(Level::Own)?;
    let place = tempfile::tempdir().unwrap();
    let repository = Repository::create(&place.path().join("r"))?;
    repository.commit(&[("Dockerfile", DOCKERFILE), ("conf", &format!("password = {token}\n"))])?;
    web.publish(&repository, "private/r.git")?;
    user.write("home/.gitconfig", &format!("[http]\n\tsslCAInfo = {}\n", web.certificate().display()), 0o644)?;
    let url = format!("{}/git/private/r.git", web.url()).replacen("://", &format!("://{name}:{token}@"), 1);
    for on in ["here", "process"] {
        let told = user.refused(&[&url, "--on", on, "-t", "leaks:1"])?;
        assert!(
            told.starts_with("9 ") && told.contains("the password in the address of the source at 127.0.0.1 is in the image: /conf"),
            "{on}: {told}"
        );
        assert!(!told.contains(token), "{on}: {told}");
        user.build(&[&url, "--on", on, "--allow-leak", "127.0.0.1"])?;
    }
    // One of a named context counts, too.
    user.write("d/Dockerfile", "FROM scratch\nCOPY --from=repo conf /\n", 0o644)?;
    let told = user.refused(&["d", "--build-context", &format!("repo={url}")])?;
    assert!(told.starts_with("9 ") && told.contains("/conf"), "{told}");
    Ok(())
}

#[test]
fn damaged_and_hostile_sources() -> Result<()> {
    let user = User::new(Level::Own)?;
    user.write("ctx/Dockerfile", "FROM scratch\nCOPY f /f\n", 0o644)?;
    user.write("ctx/f", &"text ".repeat(100), 0o644)?;
    user.build(&["ctx", "-o", "type=oci,tar=false,dest=layout", "-o", "type=oci,tar=false,dest=whole"])?;
    // A layer with a flipped byte, one that is cut, and one that is not there.
    let blobs = user.room.path().join("layout/blobs/sha256");
    let manifest = |path: &Path| fs::read_to_string(path).is_ok_and(|text| text.starts_with('{'));
    let layer = fs::read_dir(&blobs).unwrap().flatten().map(|entry| entry.path()).find(|path| !manifest(path)).unwrap();
    let whole = fs::read(&layer).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    for (bytes, expect) in [(Some(flipped), "is damaged"), (Some(whole[..whole.len() / 2].to_vec()), "is damaged"), (None, "No such file")]
    {
        match bytes {
            Some(bytes) => fs::write(&layer, bytes).unwrap(),
            None => fs::remove_file(&layer).unwrap(),
        }
        user.write("d/Dockerfile", "FROM scratch\nCOPY f /f\n", 0o644)?;
        let told = user.refused(&["oci-layout://layout", "-f", "Dockerfile"])?;
        assert!(told.starts_with("5 ") && told.contains(expect), "{expect}: {told}");
        user.write("d/Dockerfile", "FROM x\nCOPY f /g\n", 0o644)?;
        let told = user.refused(&["d", "--build-context", "x=oci-layout://layout", "--no-cache"])?;
        assert!(told.starts_with("5 "), "{expect}: {told}");
    }
    if !ready("damaged_and_hostile_sources") {
        return Ok(());
    }
    // A Dockerfile that is a link out of the repository.
    let repository = Repository::create(&user.room.path().join("r"))?;
    for (link, target) in [("out", "/etc/hostname"), ("up", "../../x"), ("folder", "/etc")] {
        std::os::unix::fs::symlink(target, repository.path().join(link)).unwrap();
    }
    repository.commit(&[("Dockerfile", DOCKERFILE)])?;
    let url = format!("file://{}", repository.path().display());
    for (file, link, target) in [("out", "out", "/etc/hostname"), ("up", "up", "../../x"), ("folder/hostname", "folder", "/etc")] {
        let told = user.refused(&[&url, "-f", file])?;
        let expect = format!("{link} is a link to {target}, which is not in the build context");
        assert!(told.starts_with("5 ") && told.contains(&expect), "{file}: {told}");
    }
    assert!(user.refused(&[&url, "-f", "none"])?.contains("there is no Dockerfile at none"));
    Ok(())
}
