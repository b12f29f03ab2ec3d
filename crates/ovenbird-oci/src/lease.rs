//! What one process uses of a folder that others may prune.
//!
//! A lease is a file that its owner keeps locked (`flock`) and fills with names, one a line. The rule on both sides:
//!
//! - who uses a file puts its name on the lease **before the first look** at it, and holds the folder's *gate* shared while doing so;
//! - who removes files holds the gate alone while choosing them, and while moving them out of sight.
//!
//! So of "it is there" and "it goes" one is always first: either the name was on the lease before the choice, or the look finds nothing.
//! A lock ends with its process, however that ends; a lease that nobody has locked says nothing.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{FlockOperation, OFlags};
use rustix::io::{Errno, retry_on_intr};

/// The lease of this process.
#[derive(Debug)]
pub struct Lease {
    gate: PathBuf,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    names: HashSet<String>,
    file: Option<File>,
    gate: File,
    /// Names could not be written: the gate stays shared, and whoever prunes waits for this process.
    kept: bool,
}

impl Lease {
    /// A lease written to `file`, which the caller has locked; without one (the disk is full) nobody prunes once something is held.
    pub fn new(file: Option<File>, gate: &Path) -> io::Result<Self> {
        let inner = Inner { names: HashSet::new(), file, gate: open_gate(gate)?, kept: false };
        Ok(Self { gate: gate.to_owned(), inner: Mutex::new(inner) })
    }

    /// Puts a name on the lease. From here on what has this name stays, or is gone already.
    pub fn hold(&self, name: &str) {
        let mut inner = self.inner();
        if inner.kept || inner.names.contains(name) {
            return;
        }
        // Where there are no locks nobody can prune either.
        let _ = lock(&inner.gate, FlockOperation::LockShared);
        let line = format!("{name}\n");
        if inner.file.as_mut().is_some_and(|file| file.write_all(line.as_bytes()).is_ok()) {
            let _ = lock(&inner.gate, FlockOperation::Unlock);
        } else {
            inner.kept = true;
        }
        inner.names.insert(name.to_owned());
    }

    /// Waits for the gate and holds it alone until the guard is dropped: nobody begins to use anything new, in this process neither.
    /// Who has the guard must not [`hold`](Self::hold): he would wait for himself.
    pub fn alone(&self) -> io::Result<Alone> {
        if self.inner().kept {
            return Err(io::Error::new(io::ErrorKind::Deadlock, "this process itself uses what it would remove"));
        }
        let gate = open_gate(&self.gate)?;
        lock(&gate, FlockOperation::LockExclusive)?;
        Ok(Alone(gate))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Guard of [`Lease::alone`].
#[derive(Debug)]
#[must_use]
pub struct Alone(#[expect(dead_code, reason = "closed, it is unlocked")] File);

fn open_gate(path: &Path) -> io::Result<File> {
    open(path, File::options().create(true).truncate(false).write(true))
}

/// Opens a lock file: no link is followed, no pipe waited for. The folder may be somebody else's.
pub fn open(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    let file = options.custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed()).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file")) }
}

/// The names on the lease in a file; `None` when its owner is dead or it is gone. To be asked while the gate is held alone.
pub fn names(path: &Path) -> io::Result<Option<HashSet<String>>> {
    let mut file = match open(path, File::options().read(true)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    if lock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
        return Ok(None);
    }
    let mut bytes = vec![];
    file.read_to_end(&mut bytes)?;
    Ok(Some(String::from_utf8_lossy(&bytes).lines().map(str::to_owned).collect()))
}

fn lock(file: &File, operation: FlockOperation) -> Result<(), Errno> {
    retry_on_intr(|| rustix::fs::flock(file, operation))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    fn lease(dir: &Path, name: &str) -> Lease {
        let file = File::options().create(true).append(true).open(dir.join(name)).unwrap();
        lock(&file, FlockOperation::LockExclusive).unwrap();
        Lease::new(Some(file), &dir.join("gate")).unwrap()
    }

    #[test]
    fn a_name_is_on_the_lease_while_its_owner_lives() {
        let dir = tempfile::tempdir().unwrap();
        let (path, of) = (dir.path().join("a"), |names: &[&str]| Some(names.iter().map(|name| (*name).to_owned()).collect()));
        let one = lease(dir.path(), "a");
        assert_eq!(names(&path).unwrap(), of(&[]));
        for name in ["x", "y", "x"] {
            one.hold(name);
        }
        assert_eq!(names(&path).unwrap(), of(&["x", "y"]));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "x\ny\n");
        drop(one);
        assert_eq!(names(&path).unwrap(), None);
        assert_eq!(names(&dir.path().join("none")).unwrap(), None);
    }

    #[test]
    fn nothing_new_is_used_while_somebody_chooses() {
        let dir = tempfile::tempdir().unwrap();
        let one = lease(dir.path(), "a");
        one.hold("known");
        let alone = one.alone().unwrap();
        std::thread::scope(|scope| {
            let (told, asked) = channel();
            let one = &one;
            scope.spawn(move || {
                one.hold("known");
                told.send(1).unwrap();
                one.hold("new");
                told.send(2).unwrap();
            });
            assert_eq!(asked.recv(), Ok(1), "what is held already needs no gate");
            assert!(asked.recv_timeout(Duration::from_millis(100)).is_err());
            assert!(!names(&dir.path().join("a")).unwrap().unwrap().contains("new"));
            drop(alone);
            assert_eq!(asked.recv(), Ok(2));
        });
    }

    #[test]
    fn what_is_no_file_is_no_lock() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::os::unix::fs::symlink("/dev/zero", at("link")).unwrap();
        let pipe = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, at("pipe"), pipe, rustix::fs::Mode::from_raw_mode(0o600), 0).unwrap();
        std::fs::create_dir(at("folder")).unwrap();
        for name in ["link", "pipe", "folder"] {
            assert!(names(&at(name)).is_err() && open_gate(&at(name)).is_err(), "{name}");
        }
    }

    #[test]
    fn who_cannot_write_keeps_the_gate() {
        let dir = tempfile::tempdir().unwrap();
        let (gate, other) = (dir.path().join("gate"), lease(dir.path(), "other"));
        let probe = open_gate(&gate).unwrap();
        let taken = || {
            let taken = lock(&probe, FlockOperation::NonBlockingLockExclusive).is_err();
            lock(&probe, FlockOperation::Unlock).unwrap();
            taken
        };
        for file in [Some(File::options().write(true).open("/dev/full").unwrap()), None] {
            let one = Lease::new(file, &gate).unwrap();
            drop(one.alone().unwrap());
            assert!(!taken());
            one.hold("x");
            assert!(taken());
            other.hold("y");
            assert!(one.alone().is_err());
            drop(one);
            assert!(!taken());
        }
    }
}
