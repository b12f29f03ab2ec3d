//! The tar stream on its way into the store: hashed, cut into chunks, each chunk compressed by itself on any thread.
//!
//! A chunk is a whole gzip member or zstd frame, so the bytes do not depend on the number of threads,
//! and memory is a few chunks a thread. Readers take members and frames one after the other as one stream.

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use crate::digest::Hasher;
use crate::image::media;
use crate::store::{Partial, Store};

use super::pack::Sink;
use super::{Compression, LayerError, Packed};

/// Uncompressed bytes of a gzip member, and of a write when nothing is compressed.
const MEMBER: usize = 1 << 20;
/// Uncompressed bytes of a zstd frame (its window is larger).
const FRAME: usize = 4 << 20;

/// A chunk on its way: input, how much of it counts, where the output goes.
struct Job {
    input: Vec<u8>,
    length: usize,
    reply: SyncSender<Done>,
}

/// The input buffer for reuse, and the compressed chunk.
struct Done {
    input: Vec<u8>,
    output: io::Result<Vec<u8>>,
}

/// Runs `produce`, which feeds the tar, and stores what it fed.
pub(super) fn compress(
    compression: Compression,
    threads: usize,
    store: &Store,
    produce: impl FnOnce(&mut Feed) -> Result<(), LayerError>,
) -> Result<Packed, LayerError> {
    let (chunk, media_type) = match compression {
        Compression::None => (MEMBER, media::OCI_LAYER),
        Compression::Gzip(_) => (MEMBER, media::OCI_LAYER_GZIP),
        Compression::Zstd(_) => (FRAME, media::OCI_LAYER_ZSTD),
    };
    let parallel = threads > 1 && compression != Compression::None;
    let feed = Feed {
        buffer: vec![0; chunk],
        filled: 0,
        hasher: (compression != Compression::None).then(Hasher::default),
        partial: store.partial()?,
        inline: if parallel || compression == Compression::None { None } else { Some(Compressor::new(compression).map_err(failed)?) },
        jobs: None,
        pending: VecDeque::new(),
        spare: vec![],
        most: threads + 2,
    };
    let (partial, hasher) = std::thread::scope(|scope| {
        // Owned here, so that the threads also end when `produce` fails or panics.
        let mut feed = feed;
        if parallel {
            let (sender, receiver) = sync_channel::<Job>(threads);
            let receiver = Arc::new(Mutex::new(receiver));
            for _ in 0..threads {
                let receiver = receiver.clone();
                scope.spawn(move || work(compression, &receiver));
            }
            feed.jobs = Some(sender);
        }
        produce(&mut feed)?;
        feed.finish()?;
        Ok::<_, LayerError>((feed.partial, feed.hasher))
    })?;
    let hashed = hasher.map(Hasher::finish);
    let (digest, size) = partial.commit(None)?;
    let (diff_id, uncompressed) = hashed.unwrap_or((digest, size));
    Ok(Packed { diff_id, digest, size, uncompressed, media_type: media_type.to_owned() })
}

/// A thread: takes chunks until there are no more.
fn work(compression: Compression, jobs: &Mutex<Receiver<Job>>) {
    let mut compressor = Compressor::new(compression);
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { input, length, reply }) = job else { return };
        let output = match &mut compressor {
            Ok(compressor) => compressor.compress(&input[..length]),
            Err(e) => Err(io::Error::new(e.kind(), e.to_string())),
        };
        // Nobody waits any more when the feed failed.
        let _ = reply.send(Done { input, output });
    }
}

/// Where the tar goes, in order.
pub(super) struct Feed {
    buffer: Vec<u8>,
    filled: usize,
    /// Of the tar; not needed when the blob is the tar.
    hasher: Option<Hasher>,
    partial: Partial,
    inline: Option<Compressor>,
    jobs: Option<SyncSender<Job>>,
    pending: VecDeque<Receiver<Done>>,
    spare: Vec<Vec<u8>>,
    /// Chunks under way at once.
    most: usize,
}

impl Feed {
    fn flush(&mut self) -> Result<(), LayerError> {
        let length = std::mem::take(&mut self.filled);
        if length == 0 {
            return Ok(());
        }
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&self.buffer[..length]);
        }
        if let Some(jobs) = &self.jobs {
            let next = self.spare.pop().unwrap_or_else(|| vec![0; self.buffer.len()]);
            let (reply, done) = sync_channel(1);
            let job = Job { input: std::mem::replace(&mut self.buffer, next), length, reply };
            jobs.send(job).map_err(|_| failed(io::Error::other("a compression thread died")))?;
            self.pending.push_back(done);
            while self.pending.len() > self.most {
                self.collect()?;
            }
        } else if let Some(compressor) = &mut self.inline {
            let output = compressor.compress(&self.buffer[..length]).map_err(failed)?;
            self.partial.append(&output)?;
        } else {
            self.partial.append(&self.buffer[..length])?;
        }
        Ok(())
    }

    /// Stores the oldest chunk under way.
    fn collect(&mut self) -> Result<(), LayerError> {
        let Some(oldest) = self.pending.pop_front() else { return Ok(()) };
        let done = oldest.recv().map_err(|_| failed(io::Error::other("a compression thread died")))?;
        self.partial.append(&done.output.map_err(failed)?)?;
        self.spare.push(done.input);
        Ok(())
    }

    fn finish(&mut self) -> Result<(), LayerError> {
        self.flush()?;
        while !self.pending.is_empty() {
            self.collect()?;
        }
        Ok(())
    }
}

impl Sink for Feed {
    fn room(&mut self) -> Result<&mut [u8], LayerError> {
        if self.filled == self.buffer.len() {
            self.flush()?;
        }
        Ok(&mut self.buffer[self.filled..])
    }

    fn advance(&mut self, n: usize) {
        self.filled += n;
    }

    fn write(&mut self, mut bytes: &[u8]) -> Result<(), LayerError> {
        while !bytes.is_empty() {
            let room = self.room()?;
            let n = room.len().min(bytes.len());
            room[..n].copy_from_slice(&bytes[..n]);
            self.advance(n);
            bytes = &bytes[n..];
        }
        Ok(())
    }
}

fn failed(source: io::Error) -> LayerError {
    LayerError::Io { action: "compress", path: PathBuf::from("layer"), source }
}

enum Compressor {
    Gzip(libdeflater::Compressor, Vec<u8>),
    Zstd(zstd::bulk::Compressor<'static>),
    Plain,
}

impl Compressor {
    fn new(compression: Compression) -> io::Result<Self> {
        Ok(match compression {
            Compression::None => Self::Plain,
            Compression::Gzip(level) => {
                let level = libdeflater::CompressionLvl::new(i32::from(level.clamp(1, 12))).unwrap_or_default();
                Self::Gzip(libdeflater::Compressor::new(level), vec![])
            }
            Compression::Zstd(level) => Self::Zstd(zstd::bulk::Compressor::new(i32::from(level.clamp(1, 22)))?),
        })
    }

    fn compress(&mut self, input: &[u8]) -> io::Result<Vec<u8>> {
        match self {
            Self::Plain => Ok(input.to_vec()),
            Self::Gzip(compressor, buffer) => {
                buffer.resize(compressor.gzip_compress_bound(input.len()), 0);
                let n = compressor.gzip_compress(input, buffer).map_err(|e| io::Error::other(e.to_string()))?;
                Ok(buffer[..n].to_vec())
            }
            Self::Zstd(compressor) => compressor.compress(input),
        }
    }
}
