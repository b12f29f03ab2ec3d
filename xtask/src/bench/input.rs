//! Contexts of the cases: generated, the same bytes in every run.

use std::cell::Cell;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use walkdir::WalkDir;

use super::Bench;

/// Bytes of a MiB.
pub(super) const MIB: u64 = 1 << 20;
/// Files of a folder.
const PER_FOLDER: u64 = 100;

/// A context folder; removed with its value.
#[derive(Debug)]
pub(super) struct Input {
    name: &'static str,
    folder: PathBuf,
    changes: Cell<u64>,
}

impl Input {
    /// An empty one.
    pub(super) fn new(bench: &Bench, name: &'static str) -> Result<Self, String> {
        let this = Self { name, folder: bench.folder(&format!("input-{name}")), changes: Cell::new(0) };
        this.make(|folder| fs::create_dir_all(folder))?;
        Ok(this)
    }

    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Writes the Dockerfile, and `warm/Dockerfile`, which needs the same base image and nothing else.
    pub(super) fn dockerfile(&self, text: &str) -> Result<(), String> {
        self.make(|folder| fs::write(folder.join("Dockerfile"), text))?;
        let base = text.lines().next().unwrap_or_default().split(" AS ").next().unwrap_or_default();
        if base == "FROM scratch" {
            return Ok(());
        }
        self.make(|folder| {
            fs::write(folder.join(".dockerignore"), "warm\n")?;
            fs::create_dir_all(folder.join("warm"))?;
            fs::write(folder.join("warm/Dockerfile"), format!("{base}\nRUN true\n"))
        })
    }

    /// `count` text files of different sizes, a hundred to a folder (`NAME/d0/f0`…).
    pub(super) fn files(&self, name: &str, count: u64, sizes: Range<u64>) -> Result<(), String> {
        let mut noise = Noise::new(count);
        self.many(name, count, |path| {
            let size = sizes.start + noise.next() % (sizes.end - sizes.start);
            noise.text(path, size)
        })
    }

    /// `count` files that do not compress.
    pub(super) fn random_files(&self, name: &str, count: u64, size: u64) -> Result<(), String> {
        let mut noise = Noise::new(count);
        self.many(name, count, |path| noise.bytes(path, size))
    }

    /// `count` files of text.
    pub(super) fn text_files(&self, name: &str, count: u64, size: u64) -> Result<(), String> {
        self.files(name, count, size..size + 1)
    }

    /// One file that does not compress.
    pub(super) fn random_file(&self, name: &str, size: u64) -> Result<(), String> {
        self.one(name, |path| Noise::new(size).bytes(path, size))
    }

    /// One file of text.
    pub(super) fn text_file(&self, name: &str, size: u64) -> Result<(), String> {
        self.one(name, |path| Noise::new(size).text(path, size))
    }

    /// Gives a file another time and nothing else.
    pub(super) fn touch(&self, name: &str) -> Result<(), String> {
        self.make(|folder| File::options().write(true).open(folder.join(name))?.set_modified(SystemTime::now()))
    }

    /// Gives a file bytes that it never had.
    pub(super) fn change(&self, name: &str) -> Result<(), String> {
        self.changes.set(self.changes.get() + 1);
        self.make(|folder| fs::write(folder.join(name), format!("change {}\n", self.changes.get())))
    }

    /// Reads everything, so that nobody finds a colder page cache than another.
    pub(super) fn warm(&self) -> Result<(), String> {
        self.make(|folder| {
            let mut buffer = vec![0; 1 << 20];
            for entry in WalkDir::new(folder) {
                let entry = entry?;
                if entry.file_type().is_file() {
                    let mut file = File::open(entry.path())?;
                    while file.read(&mut buffer)? > 0 {}
                }
            }
            Ok(())
        })
    }

    fn many(&self, name: &str, count: u64, mut write: impl FnMut(&Path) -> io::Result<()>) -> Result<(), String> {
        self.make(|folder| {
            for number in 0..count {
                let dir = folder.join(format!("{name}/d{}", number / PER_FOLDER));
                if number % PER_FOLDER == 0 {
                    fs::create_dir_all(&dir)?;
                }
                write(&dir.join(format!("f{}", number % PER_FOLDER)))?;
            }
            Ok(())
        })
    }

    fn one(&self, name: &str, write: impl FnOnce(&Path) -> io::Result<()>) -> Result<(), String> {
        self.make(|folder| {
            let path = folder.join(name);
            fs::create_dir_all(path.parent().unwrap_or(folder))?;
            write(&path)
        })
    }

    fn make<T>(&self, work: impl FnOnce(&Path) -> io::Result<T>) -> Result<T, String> {
        work(&self.folder).map_err(|error| format!("cannot prepare the context {}: {error}", self.name))
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// xorshift64*: fast, and the same in every run.
struct Noise(u64);

impl Noise {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 3
    }

    fn bytes(&mut self, path: &Path, size: u64) -> io::Result<()> {
        let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
        let mut left = size;
        while left > 0 {
            // Three bits of each number are always zero: leave the top byte out.
            let word = self.next().to_le_bytes();
            let count = left.min(7) as usize;
            out.write_all(&word[..count])?;
            left -= count as u64;
        }
        out.flush()
    }

    /// Words of a vocabulary in which few are frequent, as in texts and sources: gzip makes about a third of it.
    fn text(&mut self, path: &Path, size: u64) -> io::Result<()> {
        let mut out = BufWriter::with_capacity((size as usize).clamp(1, 1 << 20), File::create(path)?);
        let mut left = size as usize;
        while left > 0 {
            let number = self.next();
            // The product of two even choices prefers small numbers.
            let word = (number % 64) * ((number >> 8) % 64);
            let line = [b'a' + (word % 23) as u8, b'e' + (word / 23 % 19) as u8, b'n' + (word / 437 % 11) as u8, b'a' + (word % 17) as u8];
            let end = if (number >> 20).is_multiple_of(16) { b'\n' } else { b' ' };
            let letters = 1 + (word % 4) as usize;
            let count = letters.min(left);
            out.write_all(&line[..count])?;
            left -= count;
            if left > 0 {
                out.write_all(&[end])?;
                left -= 1;
            }
        }
        out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_exact_and_text_compresses_to_about_a_third() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let packed = |path: &Path| {
            let bytes = fs::read(path).unwrap();
            let mut gzip = libdeflater::Compressor::new(libdeflater::CompressionLvl::default());
            let mut out = vec![0; gzip.gzip_compress_bound(bytes.len())];
            gzip.gzip_compress(&bytes, &mut out).unwrap() as f64 / bytes.len() as f64
        };
        Noise::new(7).text(&path, 1_000_001).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 1_000_001);
        let ratio = packed(&path);
        assert!((0.25..0.5).contains(&ratio), "{ratio}");
        Noise::new(7).bytes(&path, 1_000_001).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), 1_000_001);
        assert!(packed(&path) > 0.99);
    }
}
