//! The least time a push of large files can take: each part of the work measured alone, in the same run as the builders.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::available_parallelism;
use std::time::Instant;

use aws_lc_rs::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};
use walkdir::WalkDir;

/// Bytes compressed at once, as a layer writer on several processors does.
const CHUNK: usize = 256 << 10;
/// Level of libdeflate: gzip's usual ratio.
const LEVEL: i32 = 5;

/// Seconds of each part.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Bound {
    /// Reading the files (from the page cache).
    pub(super) read: f64,
    /// SHA-256 of them, on one processor: the diff id is one hash.
    pub(super) hash: f64,
    /// Compressing, on all processors.
    pub(super) compress: f64,
    /// Writing what was compressed.
    pub(super) write: f64,
    /// Compressed size by plain size.
    pub(super) ratio: f64,
}

impl Bound {
    /// All parts one after the other.
    pub(super) fn total(&self) -> f64 {
        self.read + self.hash + self.compress + self.write
    }
}

/// Measures it for a folder; `scratch` is a file it may write.
pub(super) fn measure(folder: &Path, scratch: &Path) -> Result<Bound, String> {
    let failed = |error: std::io::Error| format!("cannot measure the bound: {error}");
    let files: Vec<PathBuf> =
        WalkDir::new(folder).into_iter().flatten().filter(|entry| entry.file_type().is_file()).map(walkdir::DirEntry::into_path).collect();
    let mut bound = Bound { read: 0.0, hash: 0.0, compress: 0.0, write: 0.0, ratio: 0.0 };
    let (mut plain, mut packed) = (0, 0);
    let mut hasher = Context::new(&SHA256);
    let mut out = File::create(scratch).map_err(failed)?;
    // Parts of 256 MiB: memory stays small, and each part is measured by itself.
    let mut buffer = vec![0; 1024 * CHUNK];
    for file in files {
        let mut file = File::open(file).map_err(failed)?;
        loop {
            let began = Instant::now();
            let mut filled = 0;
            while filled < buffer.len() {
                let count = file.read(&mut buffer[filled..]).map_err(failed)?;
                if count == 0 {
                    break;
                }
                filled += count;
            }
            bound.read += began.elapsed().as_secs_f64();
            if filled == 0 {
                break;
            }
            let began = Instant::now();
            hasher.update(&buffer[..filled]);
            bound.hash += began.elapsed().as_secs_f64();
            let began = Instant::now();
            let chunks = compress(&buffer[..filled]);
            bound.compress += began.elapsed().as_secs_f64();
            let began = Instant::now();
            for chunk in &chunks {
                out.write_all(chunk).map_err(failed)?;
                packed += chunk.len();
            }
            bound.write += began.elapsed().as_secs_f64();
            plain += filled;
        }
    }
    std::hint::black_box(hasher.finish());
    bound.ratio = packed as f64 / plain.max(1) as f64;
    fs::remove_file(scratch).map_err(failed)?;
    Ok(bound)
}

fn compress(bytes: &[u8]) -> Vec<Vec<u8>> {
    let chunks: Vec<&[u8]> = bytes.chunks(CHUNK).collect();
    let next = AtomicUsize::new(0);
    let done = Mutex::new(vec![vec![]; chunks.len()]);
    std::thread::scope(|scope| {
        for _ in 0..available_parallelism().map_or(1, std::num::NonZero::get) {
            scope.spawn(|| {
                let at = |level| libdeflater::Compressor::new(libdeflater::CompressionLvl::new(level).unwrap_or_default());
                let (mut full, mut stored) = (at(LEVEL), at(0));
                while let Some(chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let index = (chunk.as_ptr() as usize - bytes.as_ptr() as usize) / CHUNK;
                    let mut out = vec![0; full.gzip_compress_bound(chunk.len())];
                    // The least work does not try to compress what does not shrink.
                    let sample = &chunk[..chunk.len().min(4096)];
                    let dense = full.gzip_compress(sample, &mut out).is_ok_and(|length| length >= sample.len() - sample.len() / 64);
                    let gzip = if dense { &mut stored } else { &mut full };
                    let length = gzip.gzip_compress(chunk, &mut out).unwrap_or(0);
                    out.truncate(length);
                    done.lock().unwrap_or_else(PoisonError::into_inner)[index] = out;
                }
            });
        }
    });
    done.into_inner().unwrap_or_else(PoisonError::into_inner)
}
