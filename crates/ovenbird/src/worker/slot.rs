//! How many builds of workers run on a machine at once: one lock file a slot in the state directory. The kernel gives the lock of a dead
//! worker back.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

/// A slot that is held.
#[derive(Debug)]
pub(super) struct Slot {
    _lock: File,
}

/// Takes one of so many slots, if one is free.
pub(super) fn take(root: &Path, slots: usize) -> io::Result<Option<Slot>> {
    let folder = root.join("slots");
    fs::create_dir_all(&folder)?;
    for slot in 0..slots {
        let lock = File::options().create(true).append(true).open(folder.join(slot.to_string()))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Some(Slot { _lock: lock })),
            Err(Errno::WOULDBLOCK | Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_more_than_there_are() {
        let root = tempfile::tempdir().unwrap();
        let taken = |slots| take(root.path(), slots).unwrap();
        let (first, second) = (taken(2), taken(2));
        assert!(first.is_some() && second.is_some() && taken(2).is_none());
        // Who thinks there is one slot counts those of the others.
        assert!(taken(1).is_none());
        drop(first);
        assert!(taken(2).is_some());
    }
}
