//! Bulk on its way through something that takes one piece at a time.

use std::io::{self, Write};

/// Bytes that go together.
pub(crate) const PIECE: usize = 256 << 10;

/// Cuts bulk into pieces and sends each with `send`.
pub(crate) struct Pieces<F: FnMut(&[u8]) -> io::Result<()>> {
    send: F,
    piece: Vec<u8>,
}

impl<F: FnMut(&[u8]) -> io::Result<()>> Pieces<F> {
    pub(crate) fn new(send: F) -> Self {
        Self { send, piece: Vec::with_capacity(PIECE) }
    }
}

impl<F: FnMut(&[u8]) -> io::Result<()>> Write for Pieces<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(PIECE - self.piece.len());
        self.piece.extend_from_slice(&bytes[..taken]);
        if self.piece.len() == PIECE {
            self.flush()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.piece.is_empty() {
            return Ok(());
        }
        (self.send)(&self.piece)?;
        self.piece.clear();
        Ok(())
    }
}
