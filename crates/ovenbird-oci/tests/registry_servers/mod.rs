//! Real servers on loopback: Debian's docker-registry, a token server that signs with openssl, a proxy that breaks connections.
#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use ovenbird_oci::image::media;
use ovenbird_oci::registry::{Client, ClientOptions, ProgressFn, RegistryOptions};
use ovenbird_oci::store::Store;
use ovenbird_oci::{Descriptor, Digest, Reference};

/// A program that the machine may lack; then the test says why it does nothing.
pub(crate) fn have(program: &str) -> bool {
    let found = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !found {
        println!("SKIP: {program} is not installed");
    }
    found
}

pub(crate) struct Registry {
    child: Child,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) port: u16,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Registry {
    /// `None`: docker-registry is missing. `more` is YAML; `DIR` in it is the folder that `prepare` fills.
    pub(crate) fn start_with(more: &str, http: &str, prepare: impl FnOnce(&Path)) -> Option<Self> {
        if !have("docker-registry") {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path());
        for _ in 0..5 {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let text = format!(
                "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: DIR/data\n  delete:\n    enabled: true\n\
                 http:\n  addr: 127.0.0.1:{port}\n{http}\n{more}\n"
            );
            let config = dir.path().join("config.yml");
            std::fs::write(&config, text.replace("DIR", dir.path().to_str().unwrap())).unwrap();
            let log = std::fs::File::create(dir.path().join("log")).unwrap();
            let mut child =
                Command::new("docker-registry").arg("serve").arg(&config).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
            let start = Instant::now();
            while child.try_wait().unwrap().is_none() {
                if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                    return Some(Self { child, dir, port });
                }
                assert!(start.elapsed() < Duration::from_secs(30), "docker-registry does not listen");
                std::thread::sleep(Duration::from_millis(30));
            }
        }
        panic!("docker-registry does not start: {}", std::fs::read_to_string(dir.path().join("log")).unwrap());
    }

    pub(crate) fn start() -> Option<Self> {
        Self::start_with("", "", |_| {})
    }

    /// Ends it as a machine that loses power would.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again after [`Self::kill`], on the same port with what it had.
    pub(crate) fn restart(&mut self) {
        self.child = Command::new("docker-registry")
            .arg("serve")
            .arg(self.dir.path().join("config.yml"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let start = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            assert!(start.elapsed() < Duration::from_secs(30), "docker-registry does not listen again");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What a tag points at, read from the registry's disk.
    pub(crate) fn tag(&self, repository: &str, tag: &str) -> Option<Digest> {
        let tags = self.dir.path().join("data/docker/registry/v2/repositories").join(repository).join("_manifests/tags");
        // Empty while it is written.
        std::fs::read_to_string(tags.join(tag).join("current/link")).ok()?.parse().ok()
    }

    /// User `anna` with password `pass:word`.
    pub(crate) fn start_with_password() -> Option<Self> {
        if !have("htpasswd") {
            return None;
        }
        Self::start_with("auth:\n  htpasswd:\n    realm: \"a, \\\"realm\\\"\"\n    path: DIR/htpasswd", "", |dir| {
            let out = Command::new("htpasswd").args(["-Bbn", "anna", "pass:word"]).output().unwrap();
            std::fs::write(dir.join("htpasswd"), out.stdout).unwrap();
        })
    }

    pub(crate) fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    pub(crate) fn reference(&self, name: &str) -> Reference {
        format!("{}/{name}", self.host()).parse().unwrap()
    }

    /// How many blobs the registry holds, over all repositories.
    pub(crate) fn has_blob(&self, repository: &str, digest: &Digest) -> bool {
        let root = self.dir.path().join("data/docker/registry/v2/repositories").join(repository);
        root.join("_layers/sha256").join(digest.hex()).is_dir()
    }

    pub(crate) fn blob_file(&self, digest: &Digest) -> PathBuf {
        let hex = digest.hex();
        self.dir.path().join("data/docker/registry/v2/blobs/sha256").join(&hex[..2]).join(hex).join("data")
    }
}

/// Certificate and key for 127.0.0.1 as `cert.pem` and `key.pem`.
pub(crate) fn certificate(dir: &Path) {
    let out = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=test",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
        ])
        // An authority's certificate would not be taken as a server's.
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .arg("-keyout")
        .arg(dir.join("key.pem"))
        .arg("-out")
        .arg(dir.join("cert.pem"))
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

/// A token server as docker describes it: gives tokens signed by `key.pem` in the folder. Users: `anna` (`pass:word`) may do
/// everything, the identity token `refresh-me` too; nobody, and `bert` (`x`), may pull from `public/…`.
pub(crate) struct TokenServer {
    pub(crate) port: u16,
    /// One line for each request: method, who, scopes.
    pub(crate) log: Arc<Mutex<Vec<String>>>,
    /// Seconds that tokens live (and are said to live).
    pub(crate) life: Arc<AtomicUsize>,
}

impl TokenServer {
    pub(crate) fn start(dir: PathBuf) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Self { port: listener.local_addr().unwrap().port(), log: Arc::default(), life: Arc::new(AtomicUsize::new(300)) };
        let (log, life) = (Arc::clone(&server.log), Arc::clone(&server.life));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (dir, log, life) = (dir.clone(), Arc::clone(&log), Arc::clone(&life));
                std::thread::spawn(move || answer(stream, &dir, &log, life.load(Ordering::SeqCst)));
            }
        });
        server
    }

    pub(crate) fn requests(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }
}

fn answer(mut stream: TcpStream, dir: &Path, log: &Mutex<Vec<String>>, life: usize) -> Option<()> {
    let mut request = vec![];
    let mut byte = [0];
    while !request.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).ok()?;
        request.push(byte[0]);
    }
    let head = String::from_utf8(request).unwrap();
    let find = |name: &str| head.lines().find_map(|l| l.to_ascii_lowercase().starts_with(name).then(|| l[name.len()..].trim().to_owned()));
    let length = find("content-length:").map_or(0, |l| l.parse().unwrap());
    let mut body = vec![0; length];
    stream.read_exact(&mut body).ok()?;
    let target = head.split(' ').nth(1)?;
    let url = reqwest::Url::parse(&format!("http://t{target}")).unwrap();
    let form = reqwest::Url::parse(&format!("http://t/?{}", String::from_utf8(body).unwrap())).unwrap();
    let pairs: Vec<(String, String)> = url.query_pairs().chain(form.query_pairs()).map(|(k, v)| (k.into(), v.into())).collect();
    let get = |name: &str| pairs.iter().find(|(k, _)| k == name).map(|(_, v)| v.as_str());
    let who = if let Some(token) = get("refresh_token") {
        if token == "refresh-me" { "identity" } else { "wrong" }
    } else {
        match find("authorization:").and_then(|a| BASE64_STANDARD.decode(a.strip_prefix("Basic ")?).ok()).as_deref() {
            None => "nobody",
            Some(b"anna:pass:word") => "anna",
            Some(b"bert:x") => "bert",
            Some(_) => "wrong",
        }
    };
    let scopes: Vec<&str> = pairs.iter().filter(|(k, _)| k == "scope").flat_map(|(_, v)| v.split(' ')).collect();
    log.lock().unwrap().push(format!("{} {who} {}", &head[..head.find(' ')?], scopes.join(" ")));
    let mut access = vec![];
    for scope in scopes {
        let [kind, name, actions] = scope.split(':').collect::<Vec<_>>().try_into().ok()?;
        let allowed = actions.split(',').filter(|a| matches!(who, "anna" | "identity") || (name.starts_with("public/") && *a == "pull"));
        access.push(serde_json::json!({ "type": kind, "name": name, "actions": allowed.collect::<Vec<_>>() }));
    }
    let (status, document) = if who == "wrong" {
        ("401 Unauthorized", serde_json::json!({ "details": "incorrect username or password" }))
    } else {
        let token = sign(dir, &access, life, get("service").unwrap_or_default());
        ("200 OK", serde_json::json!({ "token": token, "expires_in": life }))
    };
    let document = document.to_string();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{document}",
        document.len()
    )
    .ok()
}

fn sign(dir: &Path, access: &[serde_json::Value], life: usize, audience: &str) -> String {
    let pem = std::fs::read_to_string(dir.join("cert.pem")).unwrap();
    let der: String = pem.lines().filter(|l| !l.starts_with('-')).collect();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let header = serde_json::json!({ "typ": "JWT", "alg": "RS256", "x5c": [der] });
    // Registries give 60 s on top of `exp` for skewed clocks: taken off here, so that a short life is short.
    let claims = serde_json::json!({
        "iss": "test", "sub": "x", "aud": audience, "exp": now + life as u64 - 60, "nbf": now - 120, "iat": now, "jti": "1", "access": access
    });
    let text = format!("{}.{}", BASE64_URL_SAFE_NO_PAD.encode(header.to_string()), BASE64_URL_SAFE_NO_PAD.encode(claims.to_string()));
    let mut child = Command::new("openssl")
        .args(["dgst", "-sha256", "-sign"])
        .arg(dir.join("key.pem"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let signature = child.wait_with_output().unwrap().stdout;
    format!("{text}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
}

/// A registry that wants tokens, and its token server.
pub(crate) fn with_tokens() -> Option<(Registry, TokenServer)> {
    if !have("openssl") {
        return None;
    }
    let keys = tempfile::tempdir().unwrap().keep();
    certificate(&keys);
    let server = TokenServer::start(keys.clone());
    let more = format!(
        "auth:\n  token:\n    realm: http://127.0.0.1:{}/token?fixed=1\n    service: the-service\n    issuer: test\n    rootcertbundle: {}",
        server.port,
        keys.join("cert.pem").display()
    );
    Some((Registry::start_with(&more, "", |_| {})?, server))
}

/// What the proxy does to connections, in order; afterwards it only forwards.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// Cuts both ways after so many bytes from the server.
    CutDown(usize),
    /// Cuts both ways after so many bytes from the client.
    CutUp(usize),
    /// Takes a request and says nothing for a long time.
    Hang,
    /// Answers the first request with this text and closes.
    Answer(&'static str),
    /// Answers whatever request has this in its head with the text; other requests are forwarded.
    Refuse(&'static str, &'static str),
    /// Forwards, but the bytes from the server are changed after so many.
    Garble(usize),
}

/// A proxy before a server, which breaks things.
pub(crate) struct Proxy {
    pub(crate) port: u16,
    pub(crate) connections: Arc<AtomicUsize>,
    pub(crate) faults: Arc<Mutex<Vec<Fault>>>,
    /// Heads of requests as far as they came in one read.
    pub(crate) heads: Arc<Mutex<String>>,
}

impl Proxy {
    /// Faults are taken in order by connections that carry a request with `only` in its first bytes.
    pub(crate) fn start(to: u16, only: &'static str, faults: Vec<Fault>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = Self {
            port: listener.local_addr().unwrap().port(),
            connections: Arc::default(),
            faults: Arc::new(Mutex::new(faults)),
            heads: Arc::default(),
        };
        let (connections, faults, heads) = (Arc::clone(&proxy.connections), Arc::clone(&proxy.faults), Arc::clone(&proxy.heads));
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                connections.fetch_add(1, Ordering::SeqCst);
                let (faults, heads) = (Arc::clone(&faults), Arc::clone(&heads));
                std::thread::spawn(move || serve(client, to, only, &faults, &heads));
            }
        });
        proxy
    }

    pub(crate) fn reference(&self, name: &str) -> Reference {
        format!("127.0.0.1:{}/{name}", self.port).parse().unwrap()
    }

    pub(crate) fn is_done(&self) -> bool {
        self.faults.lock().unwrap().is_empty()
    }
}

fn serve(mut client: TcpStream, to: u16, only: &str, faults: &Mutex<Vec<Fault>>, heads: &Mutex<String>) -> io::Result<()> {
    let mut server = TcpStream::connect(("127.0.0.1", to))?;
    let current: Arc<Mutex<Option<(Fault, usize)>>> = Arc::default();
    let (mut down_client, mut down_server, down_fault) = (client.try_clone()?, server.try_clone()?, Arc::clone(&current));
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(n @ 1..) = down_server.read(&mut buffer) {
            let mut keep = n;
            if let Some((fault, count)) = down_fault.lock().unwrap().as_mut() {
                match fault {
                    Fault::CutDown(limit) => keep = n.min(limit.saturating_sub(*count)),
                    Fault::Garble(limit) if *count + n > *limit => buffer[n - 1] ^= 0x55,
                    _ => {}
                }
                if matches!(fault, Fault::CutDown(_) | Fault::Garble(_)) {
                    *count += n;
                }
            }
            if down_client.write_all(&buffer[..keep]).is_err() || keep < n {
                break;
            }
        }
        let _ = down_client.shutdown(std::net::Shutdown::Both);
        let _ = down_server.shutdown(std::net::Shutdown::Both);
    });
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(n @ 1..) = client.read(&mut buffer) {
        let piece = String::from_utf8_lossy(&buffer[..n.min(2048)]).into_owned();
        if piece.contains(" HTTP/1.1\r\n") {
            let _ = write!(heads.lock().unwrap(), "{}\n\n", piece.split("\r\n\r\n").next().unwrap_or_default());
            let mut faults = faults.lock().unwrap();
            let fault = match faults.first() {
                Some(Fault::Refuse(what, _)) if !piece.contains(what) => None,
                Some(_) if piece.contains(only) => Some(faults.remove(0)),
                _ => None,
            };
            if matches!(fault, Some(Fault::Hang)) {
                drop(faults);
                std::thread::sleep(Duration::from_mins(2));
                break;
            }
            if let Some(Fault::Answer(text) | Fault::Refuse(_, text)) = fault {
                let _ = client.write_all(text.as_bytes());
                // Takes what was under way, so that the answer is not lost in a reset.
                client.set_read_timeout(Some(Duration::from_millis(300)))?;
                while let Ok(1..) = client.read(&mut buffer) {}
                break;
            }
            *current.lock().unwrap() = fault.map(|f| (f, 0));
        }
        let mut keep = n;
        if let Some((Fault::CutUp(limit), count)) = current.lock().unwrap().as_mut() {
            keep = n.min(limit.saturating_sub(*count));
            *count += n;
        }
        if server.write_all(&buffer[..keep]).is_err() || keep < n {
            break;
        }
    }
    let _ = client.shutdown(std::net::Shutdown::Both);
    let _ = server.shutdown(std::net::Shutdown::Both);
    Ok(())
}

/// A store in a folder of its own.
pub(crate) struct Place {
    pub(crate) store: Store,
    pub(crate) dir: tempfile::TempDir,
}

pub(crate) fn place() -> Place {
    let dir = tempfile::tempdir().unwrap();
    Place { store: Store::open(&dir.path().join("store")).unwrap(), dir }
}

/// Bytes that do not compress and do not repeat.
pub(crate) struct Noise {
    pub(crate) state: u64,
    pub(crate) left: u64,
}

impl Read for Noise {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        for piece in buffer[..n].chunks_mut(8) {
            self.state ^= self.state << 13;
            self.state ^= self.state >> 7;
            self.state ^= self.state << 17;
            piece.copy_from_slice(&self.state.to_le_bytes()[..piece.len()]);
        }
        self.left -= n as u64;
        Ok(n)
    }
}

pub(crate) fn blob(store: &Store, seed: u64, size: u64, media_type: &str) -> Descriptor {
    let (digest, size) = store.write_stream(Noise { state: seed | 1, left: size }, None).unwrap();
    Descriptor { media_type: media_type.into(), digest, size, platform: None, annotations: BTreeMap::new() }
}

pub(crate) fn document(store: &Store, media_type: &str, value: &serde_json::Value) -> Descriptor {
    let bytes = serde_json::to_vec(value).unwrap();
    let digest = store.write(&bytes).unwrap();
    Descriptor { media_type: media_type.into(), digest, size: bytes.len() as u64, platform: None, annotations: BTreeMap::new() }
}

/// An image with layers of these sizes for an architecture; its blobs depend on the seed.
pub(crate) fn image(store: &Store, seed: u64, architecture: &str, sizes: &[u64]) -> (Descriptor, Vec<Descriptor>) {
    let layers: Vec<_> = (seed..).zip(sizes).map(|(i, size)| blob(store, i * 7919 + 1, *size, media::OCI_LAYER_GZIP)).collect();
    let config = document(
        store,
        media::OCI_CONFIG,
        &serde_json::json!({ "architecture": architecture, "os": "linux", "seed": seed, "rootfs": { "type": "layers", "diff_ids": [] } }),
    );
    let mut manifest = document(
        store,
        media::OCI_MANIFEST,
        &serde_json::json!({ "schemaVersion": 2, "mediaType": media::OCI_MANIFEST, "config": config, "layers": layers }),
    );
    manifest.platform = Some(format!("linux/{architecture}").parse().unwrap());
    let blobs = layers.into_iter().chain([config]).collect();
    (manifest, blobs)
}

pub(crate) fn index(store: &Store, manifests: &[Descriptor]) -> Descriptor {
    document(store, media::OCI_INDEX, &serde_json::json!({ "schemaVersion": 2, "mediaType": media::OCI_INDEX, "manifests": manifests }))
}

pub(crate) fn quiet() -> ProgressFn {
    Arc::new(|_, _, _| {})
}

pub(crate) fn client() -> Client {
    Client::new(ClientOptions::default())
}

/// A client with credentials in a docker configuration of its own.
pub(crate) fn client_with(dir: &Path, auths: &serde_json::Value) -> Client {
    let folder = dir.join("docker");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("config.json"), serde_json::json!({ "auths": auths }).to_string()).unwrap();
    Client::new(ClientOptions { docker_config: Some(folder), ..ClientOptions::default() })
}

pub(crate) fn basic(user: &str, password: &str) -> serde_json::Value {
    serde_json::json!({ "auth": BASE64_STANDARD.encode(format!("{user}:{password}")) })
}

pub(crate) fn client_for(host: &str, options: RegistryOptions) -> Client {
    Client::new(ClientOptions { registries: [(host.to_owned(), options)].into(), ..ClientOptions::default() })
}
