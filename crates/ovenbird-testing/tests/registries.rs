//! Registries as users set them up: every source of credentials and every setting against real registries, Amazon ECR against moto, and
//! that no secret is ever shown.

use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ovenbird_testing::Result;
use ovenbird_testing::base::Base;
use ovenbird_testing::command::{Level, Workspace, finish};
use ovenbird_testing::moto::Moto;
use ovenbird_testing::needs::{self, Need};
use ovenbird_testing::registry::{Options, Registry, Tls};

const LIMIT: Duration = Duration::from_mins(3);
/// A password that no output may have.
const SECRET: &str = "hunter2-never-shown";

/// A folder with a home, settings and a state.
struct Room {
    room: Workspace,
    variables: Vec<(String, String)>,
}

impl Room {
    fn new() -> Result<Self> {
        Ok(Self { room: Workspace::new(Level::Own)?, variables: vec![] })
    }

    fn path(&self) -> &Path {
        self.room.path()
    }

    fn set(&mut self, name: &str, value: &str) {
        self.variables.retain(|(n, _)| n != name);
        self.variables.push((name.into(), value.into()));
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.room.ovenbird();
        command.args(arguments).arg("--root").arg(self.path().join("state")).args(["--progress", "plain"]);
        let settings = self.path().join("settings.toml");
        if settings.exists() {
            command.arg("--settings").arg(settings);
        }
        command.envs(self.variables.iter().map(|(k, v)| (k, v)));
        command
    }

    /// Exit code and everything that was written, which has no secret.
    fn run(&self, arguments: &[&str]) -> Result<(Option<i32>, String)> {
        let (code, log) = finish(&mut self.command(arguments), None, LIMIT)?;
        no_secret(&log);
        Ok((code, log))
    }

    fn check(&self, repository: &str) -> Result<(Option<i32>, serde_json::Value)> {
        let (code, log) = self.run(&["auth", "check", repository, "--push", "--format", "json"])?;
        let end = log.rfind("\n}").map_or(log.len(), |at| at + 2);
        let report = serde_json::from_str(&log[..end]).unwrap_or_else(|e| panic!("{e}: {log}"));
        Ok((code, report))
    }
}

/// base64 as in `auth`.
fn base64(text: &str) -> String {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in text.as_bytes().chunks(3) {
        let word = chunk.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for digit in 0..4 {
            out.push(if digit <= chunk.len() { DIGITS[(word >> (18 - 6 * digit) & 63) as usize] as char } else { '=' });
        }
    }
    out
}

fn no_secret(log: &str) {
    for form in [SECRET.to_owned(), base64(&format!("anna:{SECRET}")), base64(&format!("AWS:{SECRET}"))] {
        assert!(!log.contains(&form), "a secret is shown: {log}");
    }
}

fn auths(host: &str, pair: &str) -> String {
    format!("{{\"auths\": {{\"{host}\": {{\"auth\": \"{}\"}}}}}}", base64(pair))
}

#[test]
fn every_source_says_where_it_is() -> Result<()> {
    if !needs::available("registries::every_source_says_where_it_is", &[Need::Registry]) {
        return Ok(());
    }
    let registry = Registry::start_with(Options { bases: &[Base::Busybox], credentials: Some(("anna", SECRET)) })?;
    let host = registry.address();
    let pair = format!("anna:{SECRET}");
    let stem = host.replace(['.', ':'], "_");
    let mut room = Room::new()?;
    let expect = |room: &Room, kind: &str, detail: &str| -> Result<()> {
        let (code, report) = room.check(&format!("{host}/library/busybox"))?;
        assert_eq!(code, Some(0), "{report}");
        assert_eq!(report["source"]["kind"], kind, "{report}");
        assert!(report["source"].to_string().contains(detail), "{report}");
        assert_eq!((&report["username"], &report["pull"], &report["push"]), (&"anna".into(), &"allowed".into(), &"allowed".into()));
        Ok(())
    };
    // From the weakest to the strongest; each new one hides those before it.
    let (code, report) = room.check(&format!("{host}/library/busybox"))?;
    assert_eq!((code, &report["source"], &report["pull"]), (Some(7), &serde_json::Value::Null, &"refused".into()), "{report}");
    room.write("settings.toml", "auth_files = [\"pull\"]\n");
    room.write("pull/.dockerconfigjson", &auths(&host, &pair));
    expect(&room, "file", "pull/.dockerconfigjson")?;
    room.write("home/.config/containers/auth.json", &auths(&format!("{host}/library"), &pair));
    expect(&room, "file", "home/.config/containers/auth.json")?;
    room.set("REGISTRY_AUTH_FILE", room.write("podman.json", &auths(&host, &pair)).to_str().unwrap());
    expect(&room, "file", "podman.json")?;
    room.write("home/.docker/config.json", &auths(&format!("{host}/library"), &pair));
    expect(&room, "file", &format!("{host}/library"))?;
    let helper =
        room.write("bin/docker-credential-test", &format!("#!/bin/sh\necho '{{\"Username\":\"anna\",\"Secret\":\"{SECRET}\"}}'\n"));
    fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
    room.set("PATH", &format!("{}:/usr/bin:/bin", room.path().join("bin").display()));
    room.write("home/.docker/config.json", &format!("{{\"credHelpers\": {{\"{host}\": \"test\"}}}}"));
    expect(&room, "helper", "docker-credential-test")?;
    room.set("DOCKER_AUTH_CONFIG", &auths(&host, &pair));
    expect(&room, "file", "DOCKER_AUTH_CONFIG")?;
    room.set(&format!("{stem}_USERNAME"), "anna");
    room.set(&format!("{stem}_PASSWORD"), SECRET);
    expect(&room, "variables", &format!("\"{stem}_PASSWORD\""))?;
    room.set(&format!("OVENBIRD_REGISTRY_{stem}_USERNAME"), "anna");
    room.set(&format!("OVENBIRD_REGISTRY_{stem}_PASSWORD"), SECRET);
    expect(&room, "variables", &format!("\"OVENBIRD_REGISTRY_{stem}_PASSWORD\""))?;
    room.write("password", &format!("{SECRET}\n"));
    room.write(
        "settings.toml",
        &format!("[registry.\"{host}\"]\ncredentials = {{ source = \"password\", username = \"anna\", password_file = \"password\" }}\n"),
    );
    expect(&room, "settings", "password")?;
    // The flag is stronger than the file.
    let option = format!("{host},credentials=anonymous");
    let (code, log) = room.run(&["auth", "check", &host])?;
    assert!(code == Some(2) && log.contains(&format!("write HOST/REPOSITORY: {host}/NAME")), "{log}");
    let (code, log) = room.run(&["auth", "check", &format!("{host}/library/busybox"), "--registry-option", &option])?;
    assert!(code == Some(7) && log.contains("none: anonymous"), "{log}");
    // Asking left nothing behind, and a repository that is not there is no refusal.
    let uploads = registry.storage().join("repositories/library/busybox/_uploads");
    // The registry keeps an empty folder of an upload that was cancelled; one that goes on has a time in it.
    let open = fs::read_dir(uploads).into_iter().flatten().flatten().filter(|upload| upload.path().join("startedat").exists());
    assert_eq!(open.count(), 0);
    let (code, report) = room.check(&format!("{host}/team/new"))?;
    assert_eq!((code, &report["pull"], &report["push"]), (Some(0), &"no-repository".into(), &"allowed".into()), "{report}");
    Ok(())
}

#[test]
fn no_secret_in_any_error() -> Result<()> {
    if !needs::available("registries::no_secret_in_any_error", &[Need::Registry]) {
        return Ok(());
    }
    let registry = Registry::start_with(Options { bases: &[Base::Busybox], credentials: Some(("anna", "another")) })?;
    let host = registry.address();
    // A registry that says back whatever it is told, in every way a message is made of.
    let parrot = Http::start(|request| {
        let said = request.head.replace(['"', '\r', '\n', '\\'], " ");
        let heard: String = said.split("Basic ").nth(1).unwrap_or_default().split(' ').next().unwrap_or_default().into();
        let body = format!("{{\"errors\":[{{\"code\":\"UNAUTHORIZED\",\"message\":\"you said {heard} {SECRET}\"}}]}}");
        // Until somebody logs in; then nothing is allowed.
        let status = if heard.is_empty() || !request.head.contains("forbidden") { 401 } else { 403 };
        (status, "WWW-Authenticate: Basic realm=\"x\"\r\n".into(), body)
    });
    let parrot_host = format!("127.0.0.1:{}", parrot.port);
    {
        let room = Room::new()?;
        room.write("home/.docker/config.json", &auths(&parrot_host, &format!("anna:{SECRET}")));
        for arguments in
            [&["auth", "check", &format!("{parrot_host}/forbidden"), "--push"][..], &["pull", &format!("{parrot_host}/forbidden")]]
        {
            let (code, log) = room.run(arguments)?;
            assert!(code == Some(7) && log.contains("does not allow it (UNAUTHORIZED: you said *** ***)"), "{log}");
        }
        let (code, log) = finish(&mut room.command(&["login", "-u", "anna", "--password-stdin", &parrot_host]), Some(SECRET), LIMIT)?;
        no_secret(&log);
        assert!(code == Some(7) && log.contains("***"), "{log}");
    }
    for (settings, config, variables, registry, code, words) in [
        // A wrong password, from each kind of place.
        ("", auths(&host, &format!("anna:{SECRET}")), vec![], &host, 7, "home/.docker/config.json"),
        ("", "{}".into(), vec![("USERNAME", "anna"), ("PASSWORD", SECRET)], &host, 7, "OVENBIRD_REGISTRY_"),
        ("credentials={source='password',username='anna',password_variable='MINE'}", "{}".into(), vec![("MINE", SECRET)], &host, 7, "MINE"),
        ("credentials={source='helper',name='leaky'}", "{}".into(), vec![], &host, 7, "docker-credential-leaky"),
        // Files that cannot be read.
        ("", format!("{{\"auths\":{{\"{host}\":{{\"auth\":\"{SECRET}\"}}}}}}"), vec![], &host, 3, "is not base64 of name:password"),
        ("", format!("{{\"auths\": {SECRET}"), vec![], &host, 3, "no JSON at line 1"),
        (
            "credentials={source='password',username='anna',password='hunter2-never-shown'}",
            "{}".into(),
            vec![],
            &host,
            3,
            "does not stand in a settings file",
        ),
        ("credentials={source='google',key_file='key.json'}", "{}".into(), vec![], &host, 3, "its private_key is no PKCS #8 PEM"),
        ("", "{}".into(), vec![("PASSWORD", SECRET)], &host, 3, "is set and OVENBIRD_REGISTRY_"),
        ("mirrors=['https://anna:hunter2-never-shown@mirror.invalid']", "{}".into(), vec![], &host, 3, "***@mirror.invalid"),
        ("endpoint='anna:hunter2-never-shown@other.invalid'", "{}".into(), vec![], &host, 3, "***@other.invalid"),
        // A registry that repeats it.
        ("", auths(&parrot_host, &format!("anna:{SECRET}")), vec![], &parrot_host, 7, "refused the credentials (UNAUTHORIZED: you said"),
    ] {
        let mut room = Room::new()?;
        let helper = room.write(
            "bin/docker-credential-leaky",
            &format!("#!/bin/sh\necho '{{\"Username\":\"anna\",\"Secret\":\"{SECRET}\"}}'; echo {SECRET} >&2\n"),
        );
        fs::set_permissions(&helper, fs::Permissions::from_mode(0o755)).unwrap();
        room.set("PATH", &format!("{}:/usr/bin:/bin", room.path().join("bin").display()));
        room.write("key.json", &format!("{{\"type\":\"service_account\",\"client_email\":\"a@b\",\"private_key\":\"{SECRET}\"}}"));
        room.write("home/.docker/config.json", &config);
        if !settings.is_empty() {
            room.write("settings.toml", &format!("[registry.\"{registry}\"]\n{settings}\n"));
        }
        for (name, value) in variables {
            let own = format!("OVENBIRD_REGISTRY_{}_{name}", registry.replace(['.', ':'], "_"));
            room.set(if name == "MINE" { name } else { &own }, value);
        }
        room.write("ctx/Dockerfile", &format!("FROM {registry}/library/busybox\nCOPY Dockerfile /\n"));
        let context = room.path().join("ctx");
        let name = format!("{registry}/library/busybox");
        let mut all = String::new();
        for arguments in [
            &["auth", "check", &name, "--push"][..],
            &["auth", "check", &name, "--push", "--format", "json"],
            &["pull", &name],
            &["build", "-t", &name, "--push", context.to_str().unwrap()],
        ] {
            let (got, log) = room.run(arguments)?;
            assert_eq!(got, Some(code), "{arguments:?} {settings}: {log}");
            all += &log;
        }
        assert!(all.contains(words), "{settings} {config}: {all}");
    }
    Ok(())
}

#[test]
fn every_setting_of_a_registry() -> Result<()> {
    if !needs::available("registries::every_setting_of_a_registry", &[Need::Registry]) {
        return Ok(());
    }
    let start = |tls| Registry::start_with_tls(Options { bases: &[Base::Busybox], credentials: None }, tls);
    let (plain, secure, mutual) = (Registry::start()?, start(Tls::Server)?, start(Tls::Both)?);
    let (closed, nobody) = ("127.0.0.1:1", "nobody.invalid");
    let ca = |registry: &Registry| format!("ca={}", registry.certificate().display());
    let me = format!("client-identity={}", mutual.client_identity().display());
    let name = |host: &str| format!("{host}/library/busybox");
    let (p, s, m) = (plain.address(), secure.address(), mutual.address());
    for (options, image, code, words) in [
        // Certificates.
        (vec![], name(&s), 7, "HTTP"),
        (vec![format!("{s},plain-http=false,{}", ca(&mutual))], name(&s), 7, "no trusted TLS connection"),
        (vec![format!("{s},{}", ca(&secure))], name(&s), 0, ""),
        (vec![format!("{m},{}", ca(&mutual))], name(&m), 7, "cannot"),
        (vec![format!("{m},{},{me}", ca(&mutual))], name(&m), 0, ""),
        (vec![format!("{s},ca=/nowhere/ca.pem")], name(&s), 3, "/nowhere/ca.pem has no usable certificate"),
        // Plain HTTP is not slipped into where HTTPS was asked for, unless it is allowed.
        (vec![format!("{p},{}", ca(&secure))], name(&p), 7, "speaks plain HTTP, and HTTPS is required"),
        (vec![format!("{p},{},plain-http", ca(&secure))], name(&p), 0, ""),
        // Mirrors: the first is down, the second answers; none does, and the registry itself is asked.
        (vec![format!("docker.io,mirror={closed},mirror={p},endpoint={closed}")], "busybox".into(), 0, ""),
        (vec![format!("docker.io,mirror={closed},endpoint={p}")], "busybox".into(), 0, ""),
        (vec![format!("docker.io,mirror={closed},endpoint={closed}")], "busybox".into(), 7, "no connection to docker.io"),
        (vec![format!("{nobody},mirror={s}"), format!("{s},{}", ca(&secure))], name(nobody), 0, ""),
        // Another address, also with its scheme.
        (vec![format!("{nobody},endpoint={p}")], name(nobody), 0, ""),
        (vec![format!("{nobody},endpoint=http://{p}/")], name(nobody), 0, ""),
        (vec![format!("{nobody},endpoint=https://{s},{}", ca(&secure))], name(nobody), 0, ""),
        (vec![format!("{nobody},endpoint=ftp://{p}")], name(nobody), 3, "which is not [http[s]://]host[:port]"),
        (vec![format!("{nobody},endpoint={p}/path")], name(nobody), 3, "which is not [http[s]://]host[:port]"),
        // Later flags are stronger.
        (vec![format!("{nobody},endpoint={closed}"), format!("{nobody},endpoint={p},transfers=1")], name(nobody), 0, ""),
        (vec![format!("{nobody},colour=red")], name(nobody), 2, "unknown field `colour`"),
    ] {
        let room = Room::new()?;
        let mut arguments = vec!["pull", image.as_str()];
        arguments.extend(options.iter().flat_map(|option| ["--registry-option", option.as_str()]));
        let (got, log) = room.run(&arguments)?;
        assert!(got == Some(code) && log.contains(words), "{arguments:?}: {got:?} {log}");
    }
    Ok(())
}

#[test]
fn names_without_a_registry_and_projects() -> Result<()> {
    if !needs::available("registries::names_without_a_registry_and_projects", &[Need::Registry]) {
        return Ok(());
    }
    let registry = Registry::start()?;
    let host = registry.address();
    let mut room = Room::new()?;
    room.write("settings.toml", &format!("default_registry = \"{host}\"\nregistry_path = \"library\"\n"));
    let (code, log) = room.run(&["pull", "busybox"])?;
    assert_eq!(code, Some(0), "{log}");
    // What a Dockerfile names is not moved: the mirror is asked for Docker Hub's image.
    room.write("home/.config/ovenbird/config.toml", &registry.settings_toml());
    room.write("ctx/Dockerfile", "FROM busybox\nCOPY Dockerfile /\n");
    let context = room.path().join("ctx");
    let (code, log) = room.run(&["build", "-t", "team/app:1", "--push", context.to_str().unwrap()])?;
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains("docker.io/library/busybox"), "{log}");
    assert!(registry.storage().join("repositories/library/team/app/_manifests/tags/1").is_dir());
    for arguments in [&["tag", "team/app:1", "other"][..], &["push", "other"], &["inspect", "other"], &["rmi", "other"]] {
        let (code, log) = room.run(arguments)?;
        assert_eq!(code, Some(0), "{arguments:?}: {log}");
    }
    assert!(registry.storage().join("repositories/library/other").is_dir());
    // A project may say where below the registry, and nothing about the registry.
    fs::remove_file(room.path().join("settings.toml")).unwrap();
    room.set("OVENBIRD_DEFAULT_REGISTRY", &host);
    room.write(".ovenbird.toml", "registry_path = \"project\"\n");
    let (code, log) = room.run(&["build", "-t", "app:1", "--push", context.to_str().unwrap()])?;
    assert_eq!(code, Some(0), "{log}");
    assert!(registry.storage().join("repositories/project/app/_manifests/tags/1").is_dir());
    room.write(".ovenbird.toml", &format!("[registry.\"{host}\"]\nendpoint = \"evil.invalid\"\n"));
    let (code, log) = room.run(&["pull", "busybox"])?;
    assert!(code == Some(3) && log.contains("may not set: endpoint of registry") && log.contains("trusted_projects"), "{log}");
    Ok(())
}

/// One request to a server of a test.
struct Request {
    head: String,
    body: Vec<u8>,
}

/// A small HTTP server on loopback: one thread a connection, one request a connection.
struct Http {
    port: u16,
}

impl Http {
    fn start(answer: impl Fn(&Request) -> (u16, String, String) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let answer = Arc::new(answer);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let answer = Arc::clone(&answer);
                std::thread::spawn(move || {
                    let Some(request) = read_request(&mut stream) else { return };
                    let (status, headers, body) = answer(&request);
                    let _ =
                        write!(stream, "HTTP/1.1 {status} X\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len());
                });
            }
        });
        Self { port }
    }
}

fn read_request(stream: &mut TcpStream) -> Option<Request> {
    let mut head = vec![];
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).ok()?;
    let length = head.lines().find_map(|l| l.to_ascii_lowercase().strip_prefix("content-length:")?.trim().parse().ok()).unwrap_or(0);
    let mut body = vec![0; length];
    stream.read_exact(&mut body).ok()?;
    Some(Request { head, body })
}

/// Sends a request on to moto; the body of its answer.
fn forward(port: u16, request: &Request) -> (u16, String) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let head: Vec<&str> = request.head.lines().filter(|l| !l.is_empty() && !l.to_ascii_lowercase().starts_with("connection:")).collect();
    let head = head.join("\r\n") + "\r\n";
    stream.write_all(format!("{head}Connection: close\r\n\r\n").as_bytes()).unwrap();
    stream.write_all(&request.body).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    (status, answer.split_once("\r\n\r\n").unwrap().1.to_owned())
}

/// Amazon before moto: it numbers the tokens, which moto does not, and can let them run out.
struct Amazon {
    http: Http,
    moto: Moto,
    /// Answers with a token so far.
    tokens: Arc<AtomicUsize>,
    targets: Arc<Mutex<Vec<String>>>,
}

impl Amazon {
    /// `registry` takes the newest token only: from GET /expire on it is the next.
    fn start(registry: &Arc<Registry>) -> Result<Self> {
        let moto = Moto::start()?;
        let (tokens, current, targets) = (Arc::new(AtomicUsize::new(0)), AtomicUsize::new(1), Arc::new(Mutex::new(vec![])));
        registry.set_credentials("AWS", &token(1))?;
        let (port, registry, count, seen) = (moto.port(), Arc::clone(registry), Arc::clone(&tokens), Arc::clone(&targets));
        let http = Http::start(move |request| {
            if request.head.starts_with("GET /expire") {
                let next = current.fetch_add(1, Ordering::SeqCst) + 1;
                registry.set_credentials("AWS", &token(next)).unwrap();
                // The registry looks at the time of the file, in seconds.
                std::thread::sleep(Duration::from_millis(1100));
                registry.set_credentials("AWS", &token(next)).unwrap();
                return (200, String::new(), "expired".into());
            }
            let target = request.head.lines().find_map(|l| Some(l.split_once("x-amz-target: ")?.1.to_owned())).unwrap_or_default();
            seen.lock().unwrap().push(target.clone());
            let (status, mut body) = forward(port, request);
            if target.ends_with(".GetAuthorizationToken") && status == 200 {
                let mut answer: serde_json::Value = serde_json::from_str(&body).unwrap();
                let given = base64(&format!("AWS:{}", token(current.load(Ordering::SeqCst))));
                answer["authorizationData"][0]["authorizationToken"] = given.into();
                body = answer.to_string();
                count.fetch_add(1, Ordering::SeqCst);
            }
            (status, "Content-Type: application/x-amz-json-1.1\r\n".into(), body)
        });
        Ok(Self { http, moto, tokens, targets })
    }

    fn repositories(&self) -> String {
        let head = "POST / HTTP/1.1\r\nHost: ecr.eu-west-1.amazonaws.com\r\nAuthorization: AWS4-HMAC-SHA256 Credential=x/20260101/eu-west-1/ecr/aws4_request, SignedHeaders=host, Signature=x\r\nX-Amz-Target: AmazonEC2ContainerRegistry_V20150921.DescribeRepositories\r\nContent-Type: application/x-amz-json-1.1\r\nContent-Length: 2\r\n";
        forward(self.moto.port(), &Request { head: head.into(), body: b"{}".to_vec() }).1
    }
}

fn token(number: usize) -> String {
    format!("{SECRET}-{number}")
}

const ECR: &str = "123456789012.dkr.ecr.eu-west-1.amazonaws.com";

fn amazon_room(registry: &Registry, amazon: &Amazon, more: &str) -> Result<Room> {
    let mut room = Room::new()?;
    room.write("settings.toml", &format!("[registry.\"{ECR}\"]\nendpoint = \"{}\"\n{more}\n", registry.address()));
    room.set("AWS_ENDPOINT_URL", &format!("http://127.0.0.1:{}", amazon.http.port));
    room.set("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE");
    room.set("AWS_SECRET_ACCESS_KEY", SECRET);
    room.set("AWS_EC2_METADATA_DISABLED", "true");
    Ok(room)
}

#[test]
fn an_ecr_token_that_runs_out_in_the_middle_of_a_build() -> Result<()> {
    if !needs::available("registries::an_ecr_token_that_runs_out_in_the_middle_of_a_build", &[Need::Registry, Need::Run, Need::Python]) {
        return Ok(());
    }
    let registry = Arc::new(Registry::start_with(Options { bases: &[Base::Busybox], credentials: Some(("AWS", "none yet")) })?);
    let amazon = Amazon::start(&registry)?;
    let room = amazon_room(&registry, &amazon, "create_repository = true")?;
    let config = "{\"auths\":{\"other.test\":{\"auth\":\"eDp5\"}},\n  \"odd\": [1, 2.50]}";
    let file = room.write("home/.docker/config.json", config);
    // The token of the pull runs out while the step runs; eight layers are pushed at once then.
    let layers = (0..8).map(|n| format!("RUN echo {n} > /{n}")).collect::<Vec<_>>().join("\n");
    room.write(
        "ctx/Dockerfile",
        &format!(
            "FROM {ECR}/library/busybox\nRUN --network=host wget -q -O /dev/null http://127.0.0.1:{}/expire\n{layers}",
            amazon.http.port
        ),
    );
    let context = room.path().join("ctx");
    let name = format!("{ECR}/team/app:1");
    let (code, log) = room.run(&["build", "--allow", "network.host", "-t", &name, "--push", context.to_str().unwrap()])?;
    assert_eq!(code, Some(0), "{log}");
    assert_eq!(amazon.tokens.load(Ordering::SeqCst), 2, "one token, and exactly one renewal: {log}");
    assert_eq!(fs::read_to_string(&file).unwrap(), config);
    assert!(registry.storage().join("repositories/team/app/_manifests/tags/1").is_dir());
    assert!(amazon.repositories().contains("\"team/app\""), "{}", amazon.repositories());
    let made = amazon.targets.lock().unwrap().iter().filter(|t| t.ends_with(".CreateRepository")).count();
    assert_eq!(made, 1);
    // Again: the repository is there.
    let (code, log) = room.run(&["push", &name])?;
    assert_eq!(code, Some(0), "{log}");
    Ok(())
}

#[test]
fn ecr_with_every_identity_of_the_sdk() -> Result<()> {
    if !needs::available("registries::ecr_with_every_identity_of_the_sdk", &[Need::Registry, Need::Python]) {
        return Ok(());
    }
    let registry = Arc::new(Registry::start_with(Options { bases: &[Base::Busybox], credentials: Some(("AWS", "none yet")) })?);
    let amazon = Amazon::start(&registry)?;
    let name = format!("{ECR}/library/busybox");
    let expect = |room: &Room, profile: Option<&str>| -> Result<()> {
        let (code, report) = room.check(&name)?;
        assert_eq!(code, Some(0), "{report}");
        let source = &report["source"];
        assert_eq!(
            (&source["kind"], &source["account"], &source["region"]),
            (&"ecr".into(), &"123456789012".into(), &"eu-west-1".into()),
            "{report}"
        );
        assert_eq!(source["profile"].as_str(), profile);
        assert_eq!((&report["username"], &report["push"]), (&"AWS".into(), &"allowed".into()));
        Ok(())
    };
    // Variables.
    let mut room = amazon_room(&registry, &amazon, "")?;
    expect(&room, None)?;
    // What `docker login` left there has run out: the error box of the seed. Nobody clears it by hand, and the file stays as it is.
    let config = auths(ECR, &format!("AWS:{SECRET}-of-yesterday"));
    let file = room.write("home/.docker/config.json", &config);
    expect(&room, None)?;
    assert_eq!(fs::read_to_string(&file).unwrap(), config);
    // A profile of the settings.
    room.variables.retain(|(name, _)| !name.starts_with("AWS_ACCESS") && !name.starts_with("AWS_SECRET"));
    room.write("home/.aws/config", "[profile ci]\nregion = us-east-1\n");
    room.write("home/.aws/credentials", &format!("[ci]\naws_access_key_id = AKIAEXAMPLE\naws_secret_access_key = {SECRET}\n"));
    room.write(
        "settings.toml",
        &format!("[registry.\"{ECR}\"]\nendpoint = \"{}\"\ncredentials = {{ source = \"ecr\", profile = \"ci\" }}\n", registry.address()),
    );
    expect(&room, Some("ci"))?;
    // Web identity, as in pods of Amazon's Kubernetes.
    room.write("settings.toml", &format!("[registry.\"{ECR}\"]\nendpoint = \"{}\"\ncredentials = \"ecr\"\n", registry.address()));
    room.set("AWS_WEB_IDENTITY_TOKEN_FILE", room.write("web-token", SECRET).to_str().unwrap());
    room.set("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/builder");
    expect(&room, None)?;
    // Nobody at all.
    room.variables.retain(|(name, _)| !matches!(name.as_str(), "AWS_WEB_IDENTITY_TOKEN_FILE" | "AWS_ROLE_ARN"));
    let (code, log) = room.run(&["auth", "check", &name])?;
    assert!(code == Some(7) && log.contains("there are no AWS credentials"), "{log}");
    // Who may not make repositories can push to one that is there.
    let strict = Http::start(|request| {
        let kind = "Content-Type: application/x-amz-json-1.1\r\n".to_owned();
        if request.head.contains(".CreateRepository") {
            return (
                400,
                kind,
                "{\"__type\":\"AccessDeniedException\",\"message\":\"not authorized to perform: ecr:CreateRepository\"}".into(),
            );
        }
        let token = base64(&format!("AWS:{}", token(7)));
        (200, kind, serde_json::json!({ "authorizationData": [{ "authorizationToken": token, "expiresAt": 4.0e9 }] }).to_string())
    });
    registry.set_credentials("AWS", &token(7))?;
    room.set("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE");
    room.set("AWS_SECRET_ACCESS_KEY", SECRET);
    room.set("AWS_ENDPOINT_URL", &format!("http://127.0.0.1:{}", strict.port));
    room.write(
        "settings.toml",
        &format!("[registry.\"{ECR}\"]\nendpoint = \"{}\"\ncredentials = \"ecr\"\ncreate_repository = true\n", registry.address()),
    );
    room.write("ctx/Dockerfile", "FROM scratch\nCOPY Dockerfile /\n");
    let context = room.path().join("ctx");
    let build = |name: &str| room.run(&["build", "-t", name, "--push", context.to_str().unwrap()]);
    let (code, log) = build(&format!("{ECR}/library/busybox:mine"))?;
    assert_eq!(code, Some(0), "{log}");
    let (code, log) = build(&format!("{ECR}/team/none:1"))?;
    assert!(
        code == Some(7) && log.contains("cannot make the repository team/none in eu-west-1") && log.contains("ecr:CreateRepository"),
        "{log}"
    );
    // Amazon's public registry: another service, in one region.
    room.set("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE");
    room.set("AWS_SECRET_ACCESS_KEY", SECRET);
    registry.set_credentials("AWS", &token(7))?;
    let public = Http::start(|request| {
        let fits = request.head.contains("x-amz-target: SpencerFrontendService.GetAuthorizationToken\r\n")
            && request.head.contains("/us-east-1/ecr-public/aws4_request");
        let body =
            serde_json::json!({ "authorizationData": { "authorizationToken": base64(&format!("AWS:{}", token(7))), "expiresAt": 4.0e9 } });
        (if fits { 200 } else { 400 }, "Content-Type: application/x-amz-json-1.1\r\n".into(), body.to_string())
    });
    room.set("AWS_ENDPOINT_URL", &format!("http://127.0.0.1:{}", public.port));
    room.write("settings.toml", &format!("[registry.\"public.ecr.aws\"]\nendpoint = \"{}\"\n", registry.address()));
    let (code, report) = room.check("public.ecr.aws/library/busybox")?;
    assert_eq!((code, &report["source"]["kind"], &report["expires"]), (Some(0), &"ecr".into(), &"2096-10-02T07:06:40Z".into()), "{report}");
    // Amazon says no.
    room.write(
        "settings.toml",
        &format!(
            "[registry.\"{ECR}\"]
endpoint = \"{}\"
credentials = \"ecr\"
",
            registry.address()
        ),
    );
    room.set("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE");
    room.set("AWS_SECRET_ACCESS_KEY", SECRET);
    let denied = Http::start(|_| {
        (
            400,
            "Content-Type: application/x-amz-json-1.1\r\n".into(),
            "{\"__type\":\"AccessDeniedException\",\"message\":\"User is not authorized\"}".into(),
        )
    });
    room.set("AWS_ENDPOINT_URL", &format!("http://127.0.0.1:{}", denied.port));
    let (code, log) = room.run(&["auth", "check", &name])?;
    assert!(
        code == Some(7) && log.contains("cannot get an authorization token in eu-west-1") && log.contains("User is not authorized"),
        "{log}"
    );
    Ok(())
}
