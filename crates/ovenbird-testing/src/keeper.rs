//! A small registry that keeps what arrived of an upload that broke, as the distribution specification means it. Debian's loses it, so
//! that it cannot show that an upload goes on where it broke. One user, no deletion; blobs are verified.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use crate::{AtPath, Error, Result};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Piece between disk and socket, in bytes.
const PIECE: usize = 256 * 1024;

/// What it keeps of a request that broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keeps {
    /// All that arrived.
    Bytes,
    /// Nothing, but the upload and what earlier requests brought.
    Requests,
}

/// A running registry. Dropped: it stops to listen, and its storage is removed.
#[derive(Debug)]
pub struct Keeper {
    port: u16,
    stop: Arc<AtomicBool>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    dir: tempfile::TempDir,
    keeps: Keeps,
    next: AtomicU64,
    /// `repository/manifests/NAME`: media type and digest.
    names: Mutex<HashMap<String, (String, String)>>,
}

impl Keeper {
    /// Starts one.
    pub fn start(keeps: Keeps) -> Result<Self> {
        let start = |source| Error::Start { program: "keeper".into(), source };
        let dir = tempfile::Builder::new().prefix("ovenbird-keeper-").tempdir().at("cannot make a folder in", &std::env::temp_dir())?;
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(start)?;
        let port = listener.local_addr().map_err(start)?.port();
        listener.set_nonblocking(true).map_err(start)?;
        let shared = Arc::new(Shared { dir, keeps, next: AtomicU64::new(0), names: Mutex::default() });
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, serving) = (Arc::clone(&stop), Arc::clone(&shared));
        std::thread::spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                match listener.accept() {
                    Ok((stream, _)) => {
                        let shared = Arc::clone(&serving);
                        std::thread::spawn(move || {
                            let _ = stream.set_nonblocking(false);
                            // A connection that breaks is what it is here for.
                            let _ = serve(&stream, &shared);
                        });
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(2)),
                }
            }
        });
        Ok(Self { port, stop, shared })
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// `127.0.0.1:PORT`.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Digest that a tag points at.
    pub fn tag(&self, repository: &str, tag: &str) -> Option<String> {
        let names = self.shared.names.lock().unwrap_or_else(PoisonError::into_inner);
        names.get(&format!("{repository}/manifests/{tag}")).map(|(_, digest)| digest.clone())
    }

    /// Makes an image there with layers of these sizes, of bytes that do not repeat or, with `holes`, of zeros that take no disk.
    pub fn make(&self, repository: &str, tag: &str, layers: &[u64], holes: bool) -> Result<()> {
        let make = || -> std::io::Result<()> {
            let mut described = vec![];
            for (size, seed) in layers.iter().zip(1..) {
                let digest =
                    if holes { self.shared.blob(std::io::empty(), *size)? } else { self.shared.blob(Noise(seed).take(*size), *size)? };
                described
                    .push(serde_json::json!({ "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": size }));
            }
            let diff_ids: Vec<_> = described.iter().map(|layer| layer["digest"].clone()).collect();
            let config =
                serde_json::json!({ "architecture": "amd64", "os": "linux", "rootfs": { "type": "layers", "diff_ids": diff_ids } });
            let config = config.to_string();
            let digest = self.shared.blob(config.as_bytes(), config.len() as u64)?;
            let config =
                serde_json::json!({ "mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest, "size": config.len() });
            let manifest = serde_json::json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": described });
            self.shared.name(repository, tag, MANIFEST, manifest.to_string().as_bytes()).map(drop)
        };
        make().at("cannot make an image in", self.shared.dir.path())
    }

    /// Forgets everything.
    pub fn clear(&self) {
        self.shared.names.lock().unwrap_or_else(PoisonError::into_inner).clear();
        for file in fs::read_dir(self.shared.dir.path()).into_iter().flatten().flatten() {
            let _ = fs::remove_file(file.path());
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Threads with open connections still share the folder.
        let _ = fs::remove_dir_all(self.shared.dir.path());
    }
}

impl Shared {
    /// A blob or an upload; names are hexadecimal or numbers.
    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name.replace(|c: char| !c.is_ascii_alphanumeric() && c != '-', "-"))
    }

    /// Keeps a manifest under a name and its digest.
    fn name(&self, repository: &str, name: &str, media_type: &str, manifest: &[u8]) -> std::io::Result<String> {
        let digest = self::digest(&Sha256::digest(manifest));
        fs::write(self.file(&digest), manifest)?;
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        for name in [name, &digest] {
            names.insert(format!("{repository}/manifests/{name}"), (media_type.to_owned(), digest.clone()));
        }
        Ok(digest)
    }

    /// Keeps a blob of `size` bytes that `content` begins; the rest of the file is a hole.
    fn blob(&self, mut content: impl Read, size: u64) -> std::io::Result<String> {
        let path = self.file("new");
        let mut file = File::create(&path)?;
        std::io::copy(&mut content, &mut file)?;
        file.set_len(size)?;
        let digest = self::digest(&hash(&path)?);
        fs::rename(&path, self.file(&digest))?;
        Ok(digest)
    }
}

struct Request {
    method: String,
    path: String,
    query: String,
    headers: HashMap<String, String>,
}

impl Request {
    fn read(reader: &mut impl BufRead) -> Option<Self> {
        let mut line = String::new();
        reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
        let mut words = line.split(' ');
        let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
        let mut headers = HashMap::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).ok().filter(|n| *n > 0)?;
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        Some(Self { method, path: path.to_owned(), query: query.to_owned(), headers })
    }

    fn length(&self) -> u64 {
        self.headers.get("content-length").and_then(|l| l.parse().ok()).unwrap_or(0)
    }

    fn parameter(&self, name: &str) -> Option<String> {
        let found = self.query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))?;
        Some(found.replace("%3A", ":"))
    }
}

/// What is said.
struct Answer {
    status: &'static str,
    headers: Vec<(&'static str, String)>,
    body: Body,
}

enum Body {
    Bytes(Vec<u8>),
    /// From an offset to the end.
    File(PathBuf, u64),
}

impl Answer {
    fn new(status: &'static str, headers: Vec<(&'static str, String)>) -> Self {
        Self { status, headers, body: Body::Bytes(vec![]) }
    }

    fn write(&self, mut out: &TcpStream, only_head: bool) -> std::io::Result<()> {
        let length = match &self.body {
            Body::Bytes(bytes) => bytes.len() as u64,
            Body::File(path, offset) => fs::metadata(path)?.len().saturating_sub(*offset),
        };
        write!(out, "HTTP/1.1 {}\r\n", self.status)?;
        for (name, value) in &self.headers {
            write!(out, "{name}: {value}\r\n")?;
        }
        write!(out, "Content-Length: {length}\r\n\r\n")?;
        match &self.body {
            _ if only_head => {}
            Body::Bytes(bytes) => out.write_all(bytes)?,
            Body::File(path, offset) => {
                let mut file = File::open(path)?;
                file.seek(SeekFrom::Start(*offset))?;
                std::io::copy(&mut BufReader::with_capacity(PIECE, file), &mut out)?;
            }
        }
        Ok(())
    }
}

fn serve(stream: &TcpStream, shared: &Shared) -> std::io::Result<()> {
    let mut reader = BufReader::with_capacity(PIECE, stream.try_clone()?);
    while let Some(request) = Request::read(&mut reader) {
        answer(&request, &mut reader, shared)?.write(stream, request.method == "HEAD")?;
    }
    Ok(())
}

fn answer(request: &Request, reader: &mut impl Read, shared: &Shared) -> std::io::Result<Answer> {
    let path = request.path.strip_prefix("/v2/").unwrap_or_default();
    if let Some((repository, rest)) = path.split_once("/blobs/uploads/") {
        return upload(request, repository, rest, reader, shared);
    }
    let mut body = vec![];
    reader.take(request.length()).read_to_end(&mut body)?;
    let content = |digest: &str, media_type: &str| {
        let file = shared.file(digest);
        let Ok(size) = fs::metadata(&file).map(|meta| meta.len()) else { return Answer::new("404 Not Found", vec![]) };
        let start = request.headers.get("range").and_then(|r| r.strip_prefix("bytes=")?.split('-').next()?.parse::<u64>().ok());
        let mut headers = vec![("Content-Type", media_type.to_owned()), ("Docker-Content-Digest", digest.to_owned())];
        headers.extend(start.map(|start| ("Content-Range", format!("bytes {start}-{}/{size}", size.saturating_sub(1)))));
        let status = if start.is_some() { "206 Partial Content" } else { "200 OK" };
        Answer { status, headers, body: Body::File(file, start.unwrap_or(0)) }
    };
    if let Some((_, digest)) = path.split_once("/blobs/") {
        return Ok(content(digest, "application/octet-stream"));
    }
    let Some((repository, name)) = path.split_once("/manifests/") else { return Ok(Answer::new("200 OK", vec![])) };
    if request.method == "PUT" {
        let media_type = request.headers.get("content-type").cloned().unwrap_or_default();
        let digest = shared.name(repository, name, &media_type, &body)?;
        return Ok(Answer::new("201 Created", vec![("Docker-Content-Digest", digest)]));
    }
    let found = shared.names.lock().unwrap_or_else(PoisonError::into_inner).get(&format!("{repository}/manifests/{name}")).cloned();
    Ok(found.map_or_else(|| Answer::new("404 Not Found", vec![]), |(media_type, digest)| content(&digest, &media_type)))
}

fn upload(request: &Request, repository: &str, id: &str, reader: &mut impl Read, shared: &Shared) -> std::io::Result<Answer> {
    let say = |status, headers| Ok(Answer::new(status, headers));
    let location = |id: &str| ("Location", format!("/v2/{repository}/blobs/uploads/{id}"));
    if id.is_empty() {
        let id = shared.next.fetch_add(1, Ordering::SeqCst).to_string();
        File::create(shared.file(&id))?;
        return say("202 Accepted", vec![location(&id)]);
    }
    let path = shared.file(id);
    let Ok(size) = fs::metadata(&path).map(|meta| meta.len()) else { return say("404 Not Found", vec![]) };
    let range = |size: u64| ("Range", format!("0-{}", size.saturating_sub(1)));
    if request.method == "GET" {
        return say("204 No Content", vec![location(id), range(size)]);
    }
    let start = request.headers.get("content-range").and_then(|r| r.split('-').next()?.parse::<u64>().ok());
    if start.is_some_and(|start| start != size) {
        std::io::copy(&mut reader.take(request.length()), &mut std::io::sink())?;
        return say("416 Range Not Satisfiable", vec![location(id), range(size)]);
    }
    let mut file = OpenOptions::new().write(true).open(&path)?;
    file.seek(SeekFrom::Start(size))?;
    let mut left = request.length();
    let mut buffer = vec![0; PIECE];
    while left > 0 {
        let most = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let Ok(count @ 1..) = reader.read(&mut buffer[..most]) else {
            if shared.keeps == Keeps::Requests {
                file.set_len(size)?;
            }
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        };
        if buffer[..count].iter().all(|byte| *byte == 0) {
            // A hole: zeros take no disk.
            let end = file.seek(SeekFrom::Current(count as i64))?;
            file.set_len(end)?;
        } else {
            file.write_all(&buffer[..count])?;
        }
        left -= count as u64;
    }
    let size = size + request.length();
    let Some(digest) = request.parameter("digest").filter(|_| request.method == "PUT") else {
        return say("202 Accepted", vec![location(id), range(size)]);
    };
    if self::digest(&hash(&path)?) != digest {
        let said = br#"{"errors":[{"code":"DIGEST_INVALID","message":"other bytes"}]}"#;
        return Ok(Answer { status: "400 Bad Request", headers: vec![], body: Body::Bytes(said.to_vec()) });
    }
    fs::rename(&path, shared.file(&digest))?;
    say("201 Created", vec![("Docker-Content-Digest", digest)])
}

fn hash(path: &Path) -> std::io::Result<[u8; 32]> {
    let (mut file, mut hash, mut piece) = (File::open(path)?, Sha256::new(), vec![0; PIECE]);
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(hash.finalize().into()),
            count => hash.update(&piece[..count]),
        }
    }
}

fn digest(hash: &[u8]) -> String {
    let mut text = String::from("sha256:");
    for byte in hash {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// Bytes that do not compress and do not repeat (xorshift).
struct Noise(u64);

impl Read for Noise {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        for piece in buffer.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            piece.copy_from_slice(&self.0.to_le_bytes()[..piece.len()]);
        }
        Ok(buffer.len())
    }
}
