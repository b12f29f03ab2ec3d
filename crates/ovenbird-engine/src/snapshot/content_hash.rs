//! What names the content of a file in keys and lists. Never in an image: there everything is named by SHA-256.

use std::io::{self, Read};

/// BLAKE3 of some content. Keys are ours alone, and every byte of a context is hashed for one: without instructions for SHA-256 in the
/// processor, BLAKE3 takes a sixth of its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContentHash([u8; 32]);

impl ContentHash {
    /// Of bytes in memory.
    pub fn of(bytes: &[u8]) -> Self {
        Self(blake3::hash(bytes).into())
    }

    /// Of everything a reader gives; also the number of bytes.
    pub fn of_reader(reader: impl Read) -> io::Result<(Self, u64)> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(reader)?;
        Ok((Self(hasher.finalize().into()), hasher.count()))
    }

    /// From the raw hash.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The raw hash.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}
