//! The tar stream on its way into the store: hashed, cut into chunks, each chunk compressed by itself on any thread.
//!
//! A chunk is a whole gzip member or zstd frame, so the bytes do not depend on the number of threads,
//! and memory is a few chunks a thread. Readers take members and frames one after the other as one stream.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use crate::digest::Hasher;
use crate::growth::Growth;
use crate::image::media;
use crate::store::{Partial, Store};

use super::pack::Sink;
use super::{Compression, LayerError, PackOptions, Packed};

/// Uncompressed bytes of a gzip member, and of a write when nothing is compressed: the window is 32 KiB, so larger ones would save
/// less than half a percent and cost memory.
const MEMBER: usize = 256 << 10;
/// Uncompressed bytes of a zstd frame (its window is larger).
const FRAME: usize = 4 << 20;
/// Bytes of a piece of a sample, and how many pieces it has.
const SAMPLE: (usize, usize) = (4096, 4);

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

/// Stores a tar that somebody else made as a layer: read back, it is byte for byte the same tar.
pub fn repack(mut tar: impl Read, compression: Compression, threads: usize, store: &Store) -> Result<Packed, LayerError> {
    let options = PackOptions { compression, threads: threads.max(1), mtime: None };
    compress(&options, store, 0, None, |feed| {
        loop {
            let room = feed.room()?;
            match tar.read(room) {
                Ok(0) => return Ok(()),
                Ok(n) => feed.advance(n),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(LayerError::Io { action: "read", path: PathBuf::from("layer"), source }),
            }
        }
    })
}

/// Runs `produce`, which feeds the tar, and stores what it fed. What is told of `growth` ends where nothing can begin any more that is
/// `longest` bytes long and not seen as a whole yet.
pub(super) fn compress(
    &PackOptions { compression, threads, .. }: &PackOptions,
    store: &Store,
    longest: usize,
    growth: Option<&Growth>,
    produce: impl FnOnce(&mut Feed) -> Result<(), LayerError>,
) -> Result<Packed, LayerError> {
    let (chunk, media_type) = match compression {
        Compression::None => (MEMBER, media::OCI_LAYER),
        Compression::Gzip(_) => (MEMBER, media::OCI_LAYER_GZIP),
        Compression::Zstd(_) => (FRAME, media::OCI_LAYER_ZSTD),
    };
    let partial = store.partial()?;
    growth.inspect(|growth| growth.begin(partial.on_disk().0.to_owned()));
    // Each chunk has been searched before it is compressed.
    let hold = if longest == 0 { 0 } else { 1 + longest / chunk };
    let (partial, hasher) = std::thread::scope(|scope| {
        let spawn = || {
            let (sender, receiver) = sync_channel::<Job>(threads);
            let receiver = Arc::new(Mutex::new(receiver));
            for _ in 0..threads {
                let receiver = receiver.clone();
                scope.spawn(move || work(compression, &receiver));
            }
            sender
        };
        // Owned here, so that the threads also end when `produce` fails or panics.
        let mut feed = Feed {
            compression,
            buffer: vec![0; chunk],
            filled: 0,
            hasher: (compression != Compression::None).then(Hasher::default),
            partial,
            growth: growth.map(|growth| (growth, hold)),
            inline: None,
            spawn: (threads > 1 && compression != Compression::None).then_some(&spawn),
            jobs: None,
            pending: VecDeque::new(),
            spare: vec![],
            most: threads + 2,
        };
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
pub(super) struct Feed<'s> {
    compression: Compression,
    buffer: Vec<u8>,
    filled: usize,
    /// Of the tar; not needed when the blob is the tar.
    hasher: Option<Hasher>,
    partial: Partial,
    /// Told of what is written, and how many chunks later.
    growth: Option<(&'s Growth, usize)>,
    /// Of this thread.
    inline: Option<Compressor>,
    /// Starts the threads, at the second chunk: most layers have one.
    spawn: Option<&'s dyn Fn() -> SyncSender<Job>>,
    jobs: Option<SyncSender<Job>>,
    pending: VecDeque<Receiver<Done>>,
    spare: Vec<Vec<u8>>,
    /// Chunks under way at once.
    most: usize,
}

impl Feed<'_> {
    /// Passes the buffer on; `more` will follow.
    fn flush(&mut self, more: bool) -> Result<(), LayerError> {
        let length = std::mem::take(&mut self.filled);
        if length == 0 {
            return Ok(());
        }
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&self.buffer[..length]);
        }
        if more && let Some(spawn) = self.spawn.take() {
            self.jobs = Some(spawn());
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
        } else if self.compression == Compression::None {
            self.partial.append(&self.buffer[..length])?;
            self.grown();
        } else {
            let compressor = match &mut self.inline {
                Some(compressor) => compressor,
                none => none.insert(Compressor::new(self.compression).map_err(failed)?),
            };
            self.partial.append(&compressor.compress(&self.buffer[..length]).map_err(failed)?)?;
            self.grown();
        }
        Ok(())
    }

    /// Stores the oldest chunk under way.
    fn collect(&mut self) -> Result<(), LayerError> {
        let Some(oldest) = self.pending.pop_front() else { return Ok(()) };
        let done = oldest.recv().map_err(|_| failed(io::Error::other("a compression thread died")))?;
        self.partial.append(&done.output.map_err(failed)?)?;
        self.grown();
        self.spare.push(done.input);
        Ok(())
    }

    fn grown(&self) {
        if let Some((growth, hold)) = self.growth {
            growth.grown(self.partial.on_disk().1, hold);
        }
    }

    fn finish(&mut self) -> Result<(), LayerError> {
        self.flush(false)?;
        while !self.pending.is_empty() {
            self.collect()?;
        }
        Ok(())
    }
}

impl Sink for Feed<'_> {
    fn room(&mut self) -> Result<&mut [u8], LayerError> {
        if self.filled == self.buffer.len() {
            self.flush(true)?;
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
    Gzip(Gzip),
    Zstd(zstd::bulk::Compressor<'static>),
    Plain,
}

impl Compressor {
    fn new(compression: Compression) -> io::Result<Self> {
        Ok(match compression {
            Compression::None => Self::Plain,
            Compression::Gzip(level) => {
                Self::Gzip(Gzip { full: at_level(i32::from(level.clamp(1, 12))), fast: None, stored: None, output: vec![], sample: vec![] })
            }
            Compression::Zstd(level) => Self::Zstd(zstd::bulk::Compressor::new(i32::from(level.clamp(1, 22)))?),
        })
    }

    fn compress(&mut self, input: &[u8]) -> io::Result<Vec<u8>> {
        match self {
            Self::Plain => Ok(input.to_vec()),
            Self::Gzip(gzip) => gzip.compress(input),
            Self::Zstd(compressor) => compressor.compress(input),
        }
    }
}

/// Compresses members, except those that it would only make slower to read: of what is random or compressed already, which a sample
/// tells, the bytes are stored as they are. The outcome depends on the bytes alone.
struct Gzip {
    full: libdeflater::Compressor,
    fast: Option<libdeflater::Compressor>,
    stored: Option<libdeflater::Compressor>,
    output: Vec<u8>,
    sample: Vec<u8>,
}

impl Gzip {
    fn compress(&mut self, input: &[u8]) -> io::Result<Vec<u8>> {
        let dense = self.is_dense(input)?;
        let compressor = if dense { self.stored.get_or_insert_with(|| at_level(0)) } else { &mut self.full };
        let n = deflate(compressor, input, &mut self.output)?;
        Ok(self.output[..n].to_vec())
    }

    /// Would the sample shrink by less than a sixty-fourth?
    fn is_dense(&mut self, input: &[u8]) -> io::Result<bool> {
        let (piece, pieces) = SAMPLE;
        if input.len() < 2 * piece * pieces {
            return Ok(false);
        }
        self.sample.clear();
        for at in 0..pieces {
            self.sample.extend(&input[input.len() / pieces * at..][..piece]);
        }
        let n = deflate(self.fast.get_or_insert_with(|| at_level(1)), &self.sample, &mut self.output)?;
        Ok(n >= self.sample.len() - self.sample.len() / 64)
    }
}

fn at_level(level: i32) -> libdeflater::Compressor {
    libdeflater::Compressor::new(libdeflater::CompressionLvl::new(level).unwrap_or_default())
}

fn deflate(compressor: &mut libdeflater::Compressor, input: &[u8], output: &mut Vec<u8>) -> io::Result<usize> {
    let bound = compressor.gzip_compress_bound(input.len());
    if output.len() < bound {
        output.resize(bound, 0);
    }
    compressor.gzip_compress(input, output).map_err(|e| io::Error::other(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(bytes: usize) -> Vec<u8> {
        let mut state = 7u64;
        let next = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        (0..bytes).map(next).collect()
    }

    #[test]
    fn what_does_not_shrink_is_stored() {
        let random = noise(MEMBER);
        let text = b"what people write is full of repetitions, ".repeat(MEMBER / 42);
        let mixed = [&random[..MEMBER / 8], &text[..MEMBER * 7 / 8]].concat();
        let Compressor::Gzip(mut gzip) = Compressor::new(Compression::Gzip(5)).unwrap() else { panic!() };
        for (what, input, stored) in
            [("random", &random, true), ("text", &text, false), ("mixed", &mixed, false), ("short", &noise(9000), false)]
        {
            let output = gzip.compress(input).unwrap();
            assert_eq!(gzip.is_dense(input).unwrap(), stored, "{what}");
            assert!(output.len() <= input.len() + input.len() / 1000 + 100, "{what}");
            let mut back = Vec::new();
            io::Read::read_to_end(&mut flate2::read::GzDecoder::new(&output[..]), &mut back).unwrap();
            assert!(back == *input, "{what}");
        }
    }
}
