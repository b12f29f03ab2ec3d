//! The messages of the protocol and how they stand on a pipe: one JSON object a line; where a message has `bytes`, so many raw bytes
//! follow its line. See `docs/reference/worker-protocol.md`.
//!
//! Bulk is raw because base64 would cost a third more bytes and a copy at each end. A line and the bytes behind it are bounded, so
//! neither end ever holds more than one of them; who reads slowly makes the other wait in `write`.
//! It must not know what is done with messages. Nothing here prints a message: some have secrets.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use ovenbird_engine::Event;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::failure::Failure;
use crate::naming::TagPolicies;
use crate::report::{BuildReport, GitReport};
use crate::request::BuildRequest;
use crate::request::tag::Values;
use crate::source::Revision;
use crate::workflow::desk::{At, Target};

/// Version of the protocol.
pub const PROTOCOL: u32 = 2;

/// What this program can do beside the protocol's core, for later versions to ask for.
pub const CAPABILITIES: [&str; 7] = ["contexts", "outputs", "credentials", "plugins", "cancel", "alive", "offers"];

/// Longest line, in bytes.
const MAX_LINE: u64 = 8 << 20;

/// Most raw bytes behind a line.
pub(crate) const MAX_RAW: usize = 1 << 20;

/// What can be wrong with what comes through the pipe.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The pipe broke.
    #[error("the pipe broke: {0}")]
    Broken(#[source] io::Error),
    /// The other end is gone.
    #[error("it ended in the middle of the conversation")]
    Closed,
    /// Not the protocol.
    #[error("it said something that is not the protocol of workers: {0}")]
    Malformed(String),
    /// A message that is right in itself, at the wrong time.
    #[error("it sent {0:?} where that has no place")]
    Unexpected(&'static str),
    /// Another version.
    #[error("it speaks version {theirs} of the protocol of workers (ovenbird {program}), and this program version {PROTOCOL}")]
    Version {
        /// Its version of the protocol.
        theirs: u32,
        /// Its own.
        program: String,
    },
}

/// The first message of both ends.
#[derive(Serialize, Deserialize)]
pub(crate) struct Hello {
    /// [`PROTOCOL`].
    pub(crate) protocol: u32,
    /// Version of the program.
    pub(crate) version: String,
    /// [`CAPABILITIES`].
    pub(crate) capabilities: Vec<String>,
}

impl Hello {
    pub(crate) fn own() -> Self {
        Self { protocol: PROTOCOL, version: env!("CARGO_PKG_VERSION").into(), capabilities: CAPABILITIES.map(str::to_owned).to_vec() }
    }

    pub(crate) fn check(&self) -> Result<(), WireError> {
        if self.protocol == PROTOCOL {
            return Ok(());
        }
        Err(WireError::Version { theirs: self.protocol, program: shown(self.version.as_bytes(), 40) })
    }
}

/// How the worker is to talk to one registry.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Registry {
    pub(crate) plain_http: bool,
    /// Text of the file.
    pub(crate) ca: Option<String>,
    /// There is one: it is asked for by the registry's name.
    pub(crate) client_identity: bool,
    pub(crate) mirrors: Vec<String>,
    pub(crate) transfers: Option<usize>,
    pub(crate) requests_per_second: Option<f64>,
    pub(crate) endpoint: Option<String>,
    pub(crate) create_repository: bool,
}

/// What is to be built.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Order {
    /// Without places of the caller's machine.
    pub(crate) request: BuildRequest,
    /// What the names' variables stand for, as far as only the caller can know.
    pub(crate) values: Values,
    pub(crate) policies: TagPolicies,
    /// The caller's clock, seconds since 1970.
    pub(crate) now: i64,
    pub(crate) registries: BTreeMap<String, Registry>,
    /// Where the main context is for the caller: builds of the same one are compared.
    pub(crate) origin: Option<String>,
    /// Hosts whose address had a password: it is asked for, so that no image holds it.
    pub(crate) logins: Vec<String>,
    /// What git says of the main context.
    pub(crate) git: Option<GitReport>,
    /// Where the main context was fetched from.
    pub(crate) revision: Option<Revision>,
    /// Plugins that the caller has not, and that need not be there.
    pub(crate) absent: Vec<At>,
    pub(crate) dockerfile_name: String,
    /// Pieces of its text follow as [`ToWorker::Data`].
    pub(crate) dockerfile_bytes: u64,
}

/// A build whose source the worker fetches by itself: for places that nothing can be streamed to.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Errand {
    /// Its source is an address; it has nothing of the caller's machine.
    pub(crate) request: BuildRequest,
    /// `None`: nobody waits who knows more.
    #[serde(default)]
    pub(crate) caller: Option<CallerSide>,
}

/// What only the caller of a build can know.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct CallerSide {
    /// As in [`Order`]; `None`: the worker finds out, from the source.
    pub(crate) values: Option<Values>,
    pub(crate) policies: TagPolicies,
    pub(crate) now: i64,
    /// A word for where the main context is for the caller.
    pub(crate) origin: Option<String>,
}

/// From the caller to the worker.
#[derive(Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub(crate) enum ToWorker {
    Hello(Hello),
    Build(Box<Order>),
    /// Instead of [`Self::Build`] and all that follows it, up to [`Self::Begin`].
    Errand(Box<Errand>),
    /// A folder follows: a tar in [`Self::Data`]s, then [`Self::End`].
    Context {
        name: String,
        /// Its ignore file; what that leaves out was not sent.
        ignore: Vec<String>,
        /// Not the tar comes, but a list of the chunks of a list of its chunks: the worker says twice which it wants.
        #[serde(default)]
        offered: bool,
    },
    Data {
        bytes: usize,
    },
    End,
    /// Everything is there.
    Begin,
    Answer {
        id: u64,
        answer: Answered,
        /// Of [`Answered::Bytes`].
        bytes: usize,
    },
    Cancel,
    /// A sign of life, at any time: the worker knows that its caller is there. Never seen outside this module.
    Alive,
}

/// From the worker to the caller.
#[derive(Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub(crate) enum ToCaller {
    Hello(Hello),
    /// Instead of [`Self::Hello`]: every slot of this machine is taken.
    Busy,
    Event {
        event: Event,
    },
    Ask {
        id: u64,
        question: Asked,
    },
    /// A piece of the output with this place in the request.
    Data {
        output: usize,
        bytes: usize,
    },
    /// Which chunks of the list that came are wanted: a bit each.
    Want {
        bytes: usize,
    },
    /// The output is whole.
    End {
        output: usize,
    },
    Report {
        report: Box<BuildReport>,
    },
    Failed {
        failure: Box<Failure>,
    },
}

/// A credential on the wire.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Credential {
    Password { username: String, password: String },
    IdentityToken(String),
    RegistryToken(String),
}

/// What a worker asks for.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Asked {
    /// The bytes of a secret of the request.
    Secret { id: String },
    /// What the address of a context says of who asks.
    Login { host: String },
    /// Client certificate and key for a registry.
    ClientIdentity { registry: String },
    /// Credentials for a repository. `recorded`: only what can be had without running anything.
    Credential { registry: String, repository: String, address: Option<String>, refused: Option<Credential>, recorded: bool },
    /// To make a repository where the registry wants that.
    CreateRepository { registry: String, repository: String },
    /// The content of a file that an argument of a plugin names.
    ReadFile { plugin: At, path: PathBuf },
    /// To write a piece of a file that an argument of a plugin names, in base64; `more`: behind what was written.
    WriteFile { plugin: At, target: Target, piece: String, more: bool },
    /// The answer of a program of the caller's to this question.
    RunProgram { plugin: At, question: Value },
    /// The next bytes of an answer that is longer than one message.
    More,
}

/// The answer.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Answered {
    /// They follow.
    Bytes,
    Credential {
        credential: Credential,
        /// When it ends, seconds since 1970.
        expires: Option<u64>,
    },
    Nothing,
    Created(bool),
    Refused(String),
}

/// A message that may have bytes behind it.
pub(crate) trait Message: Serialize + DeserializeOwned {
    fn raw_bytes(&self) -> usize;
    fn name(&self) -> &'static str;
    /// Does it say nothing else than that somebody is there?
    fn is_sign_of_life(&self) -> bool {
        false
    }
}

impl Message for ToWorker {
    fn raw_bytes(&self) -> usize {
        match self {
            Self::Data { bytes } | Self::Answer { bytes, .. } => *bytes,
            _ => 0,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "hello",
            Self::Build(_) => "build",
            Self::Errand(_) => "errand",
            Self::Context { .. } => "context",
            Self::Data { .. } => "data",
            Self::End => "end",
            Self::Begin => "begin",
            Self::Answer { .. } => "answer",
            Self::Cancel => "cancel",
            Self::Alive => "alive",
        }
    }

    fn is_sign_of_life(&self) -> bool {
        matches!(self, Self::Alive)
    }
}

impl Message for ToCaller {
    fn raw_bytes(&self) -> usize {
        match self {
            Self::Data { bytes, .. } | Self::Want { bytes } => *bytes,
            _ => 0,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "hello",
            Self::Busy => "busy",
            Self::Event { .. } => "event",
            Self::Ask { .. } => "ask",
            Self::Data { .. } => "data",
            Self::Want { .. } => "want",
            Self::End { .. } => "end",
            Self::Report { .. } => "report",
            Self::Failed { .. } => "failed",
        }
    }
}

/// The end of the pipe that is written to. Many threads may send.
pub(crate) struct Sender(Mutex<Box<dyn Write + Send>>);

impl Sender {
    pub(crate) fn new(to: impl Write + Send + 'static) -> Self {
        Self(Mutex::new(Box::new(to)))
    }

    /// Sends a message that has no bytes behind it.
    pub(crate) fn send(&self, message: &impl Message) -> io::Result<()> {
        self.send_with(message, &[])
    }

    /// Sends a message and the bytes that it announces.
    pub(crate) fn send_with(&self, message: &impl Message, raw: &[u8]) -> io::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        let mut to = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        to.write_all(&line)?;
        to.write_all(raw)?;
        to.flush()
    }

    /// Nothing more is sent: the other end sees the end of the pipe.
    pub(crate) fn close(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Box::new(io::sink());
    }
}

/// The end of the pipe that is read.
pub(crate) struct Receiver<R>(BufReader<R>);

impl<R: Read> Receiver<R> {
    pub(crate) fn new(from: R) -> Self {
        Self(BufReader::with_capacity(64 << 10, from))
    }

    /// The next message with its bytes; `None` at an end between messages.
    pub(crate) fn next<M: Message>(&mut self) -> Result<Option<(M, Vec<u8>)>, WireError> {
        loop {
            match self.read::<M>()? {
                Some((message, _)) if message.is_sign_of_life() => {}
                other => return Ok(other),
            }
        }
    }

    fn read<M: Message>(&mut self) -> Result<Option<(M, Vec<u8>)>, WireError> {
        let mut line = vec![];
        (&mut self.0).take(MAX_LINE).read_until(b'\n', &mut line).map_err(WireError::Broken)?;
        if line.is_empty() {
            return Ok(None);
        }
        if line.pop_if(|last| *last == b'\n').is_none() {
            return Err(if line.len() as u64 == MAX_LINE { WireError::Malformed("a line without end".into()) } else { WireError::Closed });
        }
        let message: M = serde_json::from_slice(&line).map_err(|error| {
            // serde quotes values in its own messages: only what cannot be a secret is shown.
            if line.first() == Some(&b'{') { WireError::Malformed(kind_of(&error)) } else { WireError::Malformed(shown(&line, 160)) }
        })?;
        let length = message.raw_bytes();
        if length > MAX_RAW {
            return Err(WireError::Malformed(format!("{length} bytes behind one line")));
        }
        let mut raw = vec![0; length];
        self.0.read_exact(&mut raw).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => WireError::Closed,
            _ => WireError::Broken(error),
        })?;
        Ok(Some((message, raw)))
    }

    /// The next message, where there must be one.
    pub(crate) fn expect<M: Message>(&mut self) -> Result<(M, Vec<u8>), WireError> {
        self.next()?.ok_or(WireError::Closed)
    }
}

fn kind_of(error: &serde_json::Error) -> String {
    let what = match error.classify() {
        serde_json::error::Category::Data => "an unknown message, or one with unknown fields",
        _ => "a line that is not JSON",
    };
    format!("{what} (column {})", error.column())
}

/// Foreign bytes for a message: control characters are replaced, the end is cut.
pub(crate) fn shown(bytes: &[u8], most: usize) -> String {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(most)]);
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if bytes.len() > most { format!("{text}…") } else { text }
}

/// What is in [`ToWorker::Data`]s up to [`ToWorker::End`].
pub(crate) struct Bulk<'r, R> {
    from: &'r mut Receiver<R>,
    piece: io::Cursor<Vec<u8>>,
    ended: bool,
}

impl<'r, R: Read> Bulk<'r, R> {
    pub(crate) fn new(from: &'r mut Receiver<R>) -> Self {
        Self { from, piece: io::Cursor::default(), ended: false }
    }

    /// Reads on to the end, whatever was left.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        io::copy(&mut self, &mut io::sink()).map(drop)
    }
}

impl<R: Read> Read for Bulk<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = self.piece.read(buffer)?;
            if read > 0 || self.ended || buffer.is_empty() {
                return Ok(read);
            }
            match self.from.expect::<ToWorker>().map_err(io::Error::other)? {
                (ToWorker::Data { .. }, raw) => self.piece = io::Cursor::new(raw),
                (ToWorker::End, _) => self.ended = true,
                (other, _) => return Err(io::Error::other(WireError::Unexpected(other.name()))),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> String {
        let mut from = Receiver::new(bytes);
        let mut told = vec![];
        loop {
            match from.next::<ToWorker>() {
                Ok(Some((message, raw))) => told.push(format!("{}:{}", message.name(), raw.len())),
                Ok(None) => break,
                Err(error) => {
                    told.push(format!("! {error}"));
                    break;
                }
            }
        }
        told.join(" ")
    }

    #[test]
    fn foreign_bytes_are_refused_cleanly() {
        let long = [b"{\"type\":\"".as_slice(), &vec![b'a'; 9 << 20]].concat();
        let deep = [vec![b'['; 100_000], b"\n".to_vec()].concat();
        for (bytes, expect) in [
            (b"".as_slice(), ""),
            (b"{\"type\":\"end\"}\n{\"type\":\"data\",\"bytes\":3}\nabc{\"type\":\"cancel\"}\n", "end:0 data:3 cancel:0"),
            (b"{\"type\":\"alive\"}\n{\"type\":\"end\"}\n{\"type\":\"alive\"}\n", "end:0"),
            (b"{\"type\":\"data\",\"bytes\":3}\nab", "! it ended in the middle of the conversation"),
            (b"{\"type\":\"end\"}", "! it ended in the middle of the conversation"),
            (
                b"{\"type\":\"data\",\"bytes\":99999999}\n",
                "! it said something that is not the protocol of workers: 99999999 bytes behind one line",
            ),
            (b"{\"type\":\"data\",\"bytes\":-1}\n", "! it said something that is not the protocol of workers: an unknown message"),
            (b"{\"type\":\"new\"}\n", "! it said something that is not the protocol of workers: an unknown message"),
            (b"Welcome to \x1b[31mhost!\n", "! it said something that is not the protocol of workers: Welcome to  [31mhost!"),
            (b"\xff\xfe\n", "! it said something that is not the protocol of workers: "),
            (&long, "! it said something that is not the protocol of workers: a line without end"),
            (&deep, "! it said something that is not the protocol of workers: [["),
        ] {
            let got = read(bytes);
            assert!(got.starts_with(expect), "{:?}: {got}", &bytes[..bytes.len().min(40)]);
        }
    }

    #[test]
    fn bulk_ends_at_its_end() {
        let bytes = b"{\"type\":\"data\",\"bytes\":2}\nab{\"type\":\"data\",\"bytes\":1}\nc{\"type\":\"end\"}\n{\"type\":\"begin\"}\n";
        let mut from = Receiver::new(bytes.as_slice());
        let mut text = String::new();
        Bulk::new(&mut from).read_to_string(&mut text).unwrap();
        assert_eq!(text, "abc");
        assert_eq!(from.expect::<ToWorker>().unwrap().0.name(), "begin");
        let mut cut = Receiver::new(&bytes[..30]);
        assert!(Bulk::new(&mut cut).read_to_string(&mut text).unwrap_err().to_string().contains("it ended in the middle"));
        let mut other = Receiver::new(b"{\"type\":\"cancel\"}\n".as_slice());
        assert!(Bulk::new(&mut other).read_to_string(&mut text).is_err());
    }
}
