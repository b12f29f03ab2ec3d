//! The few calls of the Docker Engine API that are needed to hand over an image, as HTTP/1.1 over its socket.
//!
//! Source: Docker Engine API v1.41+, paths without a version (the engine's newest). One connection a call, `Connection: close`.
//! It must not know of the store: the archive is written by the caller into the request's body.

use std::fmt;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use ovenbird_oci::{Digest, Reference};

use crate::error::{Error, Kind};

/// Longest header block and longest body that is kept; a body may be longer, the rest is read and dropped.
const MAX_KEPT: usize = 1024 * 1024;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Endpoint {
    Unix(PathBuf),
    Tcp(String),
}

/// A Docker Engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DockerEngine {
    endpoint: Endpoint,
}

impl fmt::Display for DockerEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.endpoint {
            Endpoint::Unix(path) => write!(f, "unix://{}", path.display()),
            Endpoint::Tcp(address) => write!(f, "tcp://{address}"),
        }
    }
}

/// What can go wrong with a Docker Engine.
#[derive(Debug, thiserror::Error)]
pub enum DockerEngineError {
    /// `DOCKER_HOST` is something else.
    #[error("DOCKER_HOST is {host:?}, which is not supported: expected unix://PATH or tcp://HOST:PORT")]
    Host {
        /// As given.
        host: String,
    },
    /// Nobody listens.
    #[error("cannot reach the Docker Engine at {endpoint}: {source}")]
    Connect {
        /// Where.
        endpoint: String,
        /// Why.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the connection to the Docker Engine at {endpoint} broke: {source}")]
    Io {
        /// Where.
        endpoint: String,
        /// Why.
        source: io::Error,
    },
    /// It said no.
    #[error("the Docker Engine refused {call} (status {status}): {message}")]
    Refused {
        /// What was called.
        call: &'static str,
        /// HTTP status; 200 when the refusal came in the body.
        status: u16,
        /// Its words.
        message: String,
    },
}

impl From<DockerEngineError> for Error {
    fn from(error: DockerEngineError) -> Self {
        let kind = if matches!(error, DockerEngineError::Host { .. }) { Kind::Configuration } else { Kind::Driver };
        let told = Self::from_chain(kind, &error);
        match error {
            DockerEngineError::Connect { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => told.hint(
                "add your user to the group of the socket (often `docker`), or use -o type=docker,dest=FILE and `docker load -i FILE`",
            ),
            DockerEngineError::Connect { .. } => {
                told.hint("start Docker, or say where it listens with DOCKER_HOST=unix:///path/to/docker.sock")
            }
            _ => told,
        }
    }
}

/// Writes the body of a request.
type Body<'a> = &'a mut dyn FnMut(&mut dyn Write) -> io::Result<()>;

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

struct Response {
    status: u16,
    body: Vec<u8>,
}

impl DockerEngine {
    /// The engine that `DOCKER_HOST` names, `/var/run/docker.sock` when it is not set. Does not connect.
    pub fn connect_to(host: Option<&str>) -> Result<Self, DockerEngineError> {
        let endpoint = match host {
            None => Endpoint::Unix("/var/run/docker.sock".into()),
            Some(host) => {
                if let Some(path) = host.strip_prefix("unix://").filter(|path| path.starts_with('/')) {
                    Endpoint::Unix(path.into())
                } else if let Some(address) = host.strip_prefix("tcp://").or_else(|| host.strip_prefix("http://")) {
                    let address = address.trim_end_matches('/');
                    Endpoint::Tcp(if address.contains(':') { address.into() } else { format!("{address}:2375") })
                } else {
                    return Err(DockerEngineError::Host { host: host.into() });
                }
            }
        };
        Ok(Self { endpoint })
    }

    /// Its version, as it names it.
    pub fn version(&self) -> Result<String, DockerEngineError> {
        let response = self.call("GET", "/version", Some(Duration::from_secs(5)), None)?;
        let response = expect("version", response)?;
        let json: serde_json::Value = serde_json::from_slice(&response.body).unwrap_or_default();
        Ok(json["Version"].as_str().unwrap_or("unknown").to_owned())
    }

    /// Does it have an image with this id?
    pub fn has_image(&self, id: &Digest) -> Result<bool, DockerEngineError> {
        let response = self.call("GET", &format!("/images/{id}/json"), Some(Duration::from_secs(30)), None)?;
        if response.status == 404 {
            return Ok(false);
        }
        expect("image inspection", response).map(|_| true)
    }

    /// Names an image it has.
    pub fn tag(&self, id: &Digest, name: &Reference) -> Result<(), DockerEngineError> {
        let repository = match name.registry() {
            "docker.io" => name.repository().strip_prefix("library/").unwrap_or(name.repository()).to_owned(),
            registry => format!("{registry}/{}", name.repository()),
        };
        // References hold only characters that a query takes as they are.
        let path = format!("/images/{id}/tag?repo={repository}&tag={}", name.tag().unwrap_or("latest"));
        let response = self.call("POST", &path, Some(Duration::from_secs(30)), None)?;
        expect("tag", response).map(drop)
    }

    /// Loads a docker archive that `archive` writes.
    pub fn load(&self, archive: &mut dyn FnMut(&mut dyn Write) -> io::Result<()>) -> Result<(), DockerEngineError> {
        let response = expect("load", self.call("POST", "/images/load?quiet=1", None, Some(archive))?)?;
        // The status is sent before the archive is read: failures come as a JSON line in the body.
        for line in response.body.split(|b| *b == b'\n') {
            let json: serde_json::Value = serde_json::from_slice(line).unwrap_or_default();
            if let Some(message) = json["error"].as_str() {
                return Err(DockerEngineError::Refused { call: "load", status: response.status, message: message.into() });
            }
        }
        Ok(())
    }

    fn connect(&self, timeout: Option<Duration>) -> Result<Box<dyn Stream>, DockerEngineError> {
        let connected = || -> io::Result<Box<dyn Stream>> {
            match &self.endpoint {
                Endpoint::Unix(path) => {
                    let stream = UnixStream::connect(path)?;
                    stream.set_read_timeout(timeout)?;
                    Ok(Box::new(stream))
                }
                Endpoint::Tcp(address) => {
                    let stream = TcpStream::connect(address)?;
                    stream.set_read_timeout(timeout)?;
                    Ok(Box::new(stream))
                }
            }
        };
        connected().map_err(|source| DockerEngineError::Connect { endpoint: self.to_string(), source })
    }

    fn call(&self, method: &str, path: &str, timeout: Option<Duration>, body: Option<Body>) -> Result<Response, DockerEngineError> {
        let mut stream = self.connect(timeout)?;
        exchange(&mut *stream, method, path, body).map_err(|source| DockerEngineError::Io { endpoint: self.to_string(), source })
    }
}

fn exchange(stream: &mut dyn Stream, method: &str, path: &str, body: Option<Body>) -> io::Result<Response> {
    let length = if body.is_some() { "Transfer-Encoding: chunked\r\nContent-Type: application/x-tar" } else { "Content-Length: 0" };
    write!(stream, "{method} {path} HTTP/1.1\r\nHost: docker\r\nUser-Agent: ovenbird\r\nConnection: close\r\n{length}\r\n\r\n")?;
    let sent = match body {
        None => Ok(()),
        Some(body) => {
            let mut chunks = BufWriter::with_capacity(256 * 1024, Chunks { stream: &mut *stream });
            let sent = body(&mut chunks).and_then(|()| chunks.flush());
            // What is buffered must not go out after a failure: the engine would take half an archive for a whole one.
            let (chunks, _) = chunks.into_parts();
            sent.and_then(|()| chunks.stream.write_all(b"0\r\n\r\n"))
        }
    };
    stream.flush()?;
    match sent {
        Ok(()) => read_response(stream),
        // An engine that refuses early answers and closes: its words say more than "broken pipe".
        Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {
            read_response(stream).map_err(|_| error)
        }
        Err(error) => Err(error),
    }
}

/// HTTP chunks.
struct Chunks<'a> {
    stream: &'a mut dyn Stream,
}

impl Write for Chunks<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if !buf.is_empty() {
            write!(self.stream, "{:x}\r\n", buf.len())?;
            self.stream.write_all(buf)?;
            self.stream.write_all(b"\r\n")?;
        }
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the answer is not HTTP: {what}"))
}

fn read_response(stream: &mut dyn Stream) -> io::Result<Response> {
    let mut reader = BufReader::new(stream);
    let mut kept = 0;
    let mut line = move |reader: &mut BufReader<&mut dyn Stream>| -> io::Result<String> {
        let mut text = vec![];
        reader.take(64 * 1024).read_until(b'\n', &mut text)?;
        kept += text.len();
        if kept > MAX_KEPT || !text.ends_with(b"\n") {
            return Err(malformed("a header line is cut off"));
        }
        Ok(String::from_utf8_lossy(&text).trim_end().to_owned())
    };
    loop {
        let status = line(&mut reader)?;
        let status: u16 = status
            .strip_prefix("HTTP/1.")
            .and_then(|s| s.get(2..5))
            .and_then(|s| s.parse().ok())
            .ok_or_else(|| malformed("no status line"))?;
        let (mut chunked, mut length) = (false, None);
        loop {
            let header = line(&mut reader)?;
            if header.is_empty() {
                break;
            }
            let Some((name, value)) = header.split_once(':') else { return Err(malformed("a header has no colon")) };
            match name.to_ascii_lowercase().as_str() {
                "transfer-encoding" => chunked = value.trim().eq_ignore_ascii_case("chunked"),
                "content-length" => length = Some(value.trim().parse::<u64>().map_err(|_| malformed("a bad length"))?),
                _ => {}
            }
        }
        if (100..200).contains(&status) {
            continue;
        }
        let mut body = vec![];
        if status != 204 && status != 304 {
            if chunked {
                read_chunks(&mut reader, &mut body)?;
            } else {
                keep(&mut (&mut reader).take(length.unwrap_or(u64::MAX)), &mut body)?;
            }
        }
        return Ok(Response { status, body });
    }
}

fn read_chunks(reader: &mut BufReader<&mut dyn Stream>, body: &mut Vec<u8>) -> io::Result<()> {
    loop {
        let mut size = vec![];
        reader.take(1024).read_until(b'\n', &mut size)?;
        let size = String::from_utf8_lossy(&size);
        let size = size.trim().split(';').next().unwrap_or_default();
        let size = u64::from_str_radix(size, 16).map_err(|_| malformed("a bad chunk size"))?;
        if size == 0 {
            return Ok(());
        }
        keep(&mut reader.take(size), body)?;
        let mut end = [0; 2];
        reader.read_exact(&mut end)?;
        if &end != b"\r\n" {
            return Err(malformed("a chunk has no end"));
        }
    }
}

/// Reads to the end; keeps the first [`MAX_KEPT`] bytes in all.
fn keep(reader: &mut dyn Read, body: &mut Vec<u8>) -> io::Result<()> {
    let room = (MAX_KEPT - body.len().min(MAX_KEPT)) as u64;
    reader.take(room).read_to_end(body)?;
    io::copy(reader, &mut io::sink())?;
    Ok(())
}

fn expect(call: &'static str, response: Response) -> Result<Response, DockerEngineError> {
    if (200..300).contains(&response.status) {
        return Ok(response);
    }
    let json: serde_json::Value = serde_json::from_slice(&response.body).unwrap_or_default();
    let message =
        json["message"].as_str().map_or_else(|| String::from_utf8_lossy(&response.body).trim().chars().take(500).collect(), Into::into);
    Err(DockerEngineError::Refused { call, status: response.status, message })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::thread;

    #[test]
    fn hosts() {
        for (host, expect) in [
            (None, Some("unix:///var/run/docker.sock")),
            (Some("unix:///run/x.sock"), Some("unix:///run/x.sock")),
            (Some("tcp://127.0.0.1:2375"), Some("tcp://127.0.0.1:2375")),
            (Some("tcp://docker"), Some("tcp://docker:2375")),
            (Some("ssh://host"), None),
            (Some("unix://"), None),
            (Some(""), None),
        ] {
            assert_eq!(DockerEngine::connect_to(host).ok().map(|d| d.to_string()).as_deref(), expect, "{host:?}");
        }
    }

    /// Answers one call with `answer` and returns what was asked.
    fn with_engine<T>(answer: &'static [u8], call: impl FnOnce(&DockerEngine) -> T) -> (T, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = vec![];
            let mut buffer = [0; 4096];
            loop {
                let n = stream.read(&mut buffer).unwrap();
                asked.extend_from_slice(&buffer[..n]);
                let text = String::from_utf8_lossy(&asked);
                if n == 0
                    || (text.contains("chunked") && text.ends_with("0\r\n\r\n"))
                    || (!text.contains("chunked") && text.ends_with("\r\n\r\n"))
                {
                    break;
                }
            }
            stream.write_all(answer).unwrap();
            asked
        });
        let result = call(&DockerEngine::connect_to(Some(&format!("unix://{}", path.display()))).unwrap());
        (result, server.join().unwrap())
    }

    #[test]
    fn answers() {
        let id = Digest::of(b"");
        for (answer, expect) in [
            (&b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"[..], "Ok(true)"),
            (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "Ok(false)"),
            (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", "Ok(true)"),
            (
                b"HTTP/1.1 500 X\r\n\r\n{\"message\":\"disk full\"}",
                "Err(\"the Docker Engine refused image inspection (status 500): disk full\")",
            ),
            (b"hello\r\n", "no status line"),
            (b"", "cut off"),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "a bad chunk size"),
        ] {
            let (got, asked) = with_engine(answer, |d| d.has_image(&id).map_err(|e| e.to_string()));
            assert!(format!("{got:?}").contains(expect), "{got:?}");
            assert!(asked.starts_with(format!("GET /images/{id}/json HTTP/1.1\r\n").as_bytes()));
        }
    }

    #[test]
    fn load_streams_and_reads_failures() {
        for (answer, expect) in [
            (&b"HTTP/1.1 200 OK\r\n\r\n{\"stream\":\"Loaded image: a\"}\n"[..], "Ok"),
            (b"HTTP/1.1 200 OK\r\n\r\n{\"errorDetail\":{},\"error\":\"bad tar\"}\n", "bad tar"),
        ] {
            let (got, asked) = with_engine(answer, |d| d.load(&mut |out| out.write_all(&[b'x'; 20])).map_err(|e| e.to_string()));
            assert!(format!("{got:?}").contains(expect), "{got:?}");
            assert!(asked.ends_with(b"\r\n14\r\nxxxxxxxxxxxxxxxxxxxx\r\n0\r\n\r\n"), "{}", String::from_utf8_lossy(&asked));
        }
    }

    #[test]
    fn a_failing_archive_is_never_finished() {
        let (got, asked) = with_engine(b"", |d| {
            d.load(&mut |out| {
                out.write_all(b"half")?;
                Err(io::Error::other("store"))
            })
        });
        assert!(got.is_err() && !asked.ends_with(b"0\r\n\r\n") && !asked.ends_with(b"half\r\n"));
    }
}
