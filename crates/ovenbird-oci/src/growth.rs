//! A blob that is still being made, and may be read as far as it is known to be fit to leave this machine.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use tokio::sync::watch;

/// Where a growing blob stands.
#[derive(Debug, Clone, Default)]
pub struct Stand {
    /// Its file; it keeps its place in the file system only until it is complete. `None`: there is none yet.
    pub file: Option<PathBuf>,
    /// Bytes that may be read.
    pub ready: u64,
    /// Those are all.
    pub whole: bool,
}

/// The side that makes the blob. Dropped, nothing comes any more.
#[derive(Debug)]
pub struct Growth {
    stand: watch::Sender<Stand>,
    stopped: AtomicBool,
    /// Ends of the chunks that are written and may not be read yet.
    held: Mutex<VecDeque<u64>>,
}

/// The side that reads it.
pub type Growing = watch::Receiver<Stand>;

impl Default for Growth {
    fn default() -> Self {
        Self { stand: watch::Sender::new(Stand::default()), stopped: AtomicBool::new(false), held: Mutex::default() }
    }
}

impl Growth {
    /// A reader.
    pub fn follow(&self) -> Growing {
        self.stand.subscribe()
    }

    /// The blob is written to this file.
    pub(crate) fn begin(&self, file: PathBuf) {
        self.stand.send_modify(|stand| stand.file = Some(file));
    }

    /// The blob has `size` bytes now. What lies in the last `hold` chunks may still turn out to be the first part of something that must
    /// not leave.
    pub(crate) fn grown(&self, size: u64, hold: usize) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.push_back(size);
        if held.len() > hold
            && !self.stopped.load(Ordering::Relaxed)
            && let Some(ready) = held.pop_front()
        {
            self.stand.send_modify(|stand| stand.ready = ready);
        }
    }

    /// No more of the blob may leave.
    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    /// The blob has all its bytes, `size`, and may leave. Was it not stopped?
    pub(crate) fn finish(&self, size: u64) -> bool {
        let whole = !self.stopped.load(Ordering::Relaxed);
        if whole {
            self.stand.send_modify(|stand| (stand.ready, stand.whole) = (size, true));
        }
        whole
    }
}
