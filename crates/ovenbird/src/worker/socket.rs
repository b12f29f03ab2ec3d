//! A worker that listens on a socket of its machine, and the program that is the pipe to it.
//!
//! For places where the pipe to a process is a record that others read: what goes over the socket is in no record. One caller, once; who
//! comes later finds nothing.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

/// How often it is looked.
const LOOK: Duration = Duration::from_millis(20);

/// Waits for the one caller; `None`: none came in time. After `lease` without a word of it, reading fails.
pub fn accept(path: &Path, patience: Duration, lease: Option<Duration>) -> io::Result<Option<UnixStream>> {
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    let end = Instant::now() + patience;
    let caller = loop {
        match listener.accept() {
            Ok((caller, _)) => break Some(caller),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < end => std::thread::sleep(LOOK),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break None,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    };
    std::fs::remove_file(path)?;
    if let Some(caller) = &caller {
        caller.set_nonblocking(false)?;
        caller.set_read_timeout(lease)?;
    }
    Ok(caller)
}

/// Joins a pipe to the worker that listens there, until the worker ends the connection. `from` may go on: whoever calls ends the process.
pub fn connect(path: &Path, patience: Duration, from: impl Read + Send + 'static, mut to: impl Write) -> io::Result<()> {
    let end = Instant::now() + patience;
    let worker = loop {
        match UnixStream::connect(path) {
            Ok(worker) => break worker,
            Err(_) if Instant::now() < end => std::thread::sleep(LOOK),
            Err(error) => return Err(error),
        }
    };
    let mut sending = worker.try_clone()?;
    std::thread::spawn(move || {
        let _ = copy(from, &mut sending);
        // The caller is gone: the worker sees it.
        let _ = sending.shutdown(Shutdown::Write);
    });
    copy(worker, &mut to)
}

/// As [`io::copy`], and everything goes on at once.
fn copy(mut from: impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut piece = vec![0; 128 << 10];
    loop {
        match from.read(&mut piece) {
            Ok(0) => return Ok(()),
            Ok(read) => to.write_all(&piece[..read]).and_then(|()| to.flush())?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_caller_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/worker.sock");
        assert!(accept(&path, Duration::from_millis(50), None).unwrap().is_none(), "nobody came");
        let (patience, place) = (Duration::from_secs(10), path.clone());
        let worker = std::thread::spawn(move || {
            let mut caller = accept(&place, patience, Some(Duration::from_millis(200))).unwrap().unwrap();
            let mut word = [0; 5];
            caller.read_exact(&mut word).unwrap();
            caller.write_all(b"well ").unwrap();
            caller.write_all(&word).unwrap();
            // Nothing more comes: the lease ends.
            caller.read(&mut word).map(drop).unwrap_err().kind()
        });
        let (from, mut feeds) = io::pipe().unwrap();
        feeds.write_all(b"hello").unwrap();
        let mut said = vec![];
        connect(&path, patience, from, &mut said).unwrap();
        assert_eq!(said, b"well hello");
        assert_eq!(worker.join().unwrap(), io::ErrorKind::WouldBlock);
        assert!(!path.exists());
        assert!(connect(&path, Duration::from_millis(50), io::empty(), io::sink()).is_err());
        drop(feeds);
    }
}
