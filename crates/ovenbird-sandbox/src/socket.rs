//! Forwards Unix sockets (ssh agent) into a step, so that they can have an owner and mode of their own.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::mounts;

/// How soon a forwarder notices the end of its step.
const POLL: Duration = Duration::from_millis(20);
/// Connections of one step at a time.
const CONNECTIONS_MAX: usize = 64;

/// Binds `folder/name`; by way of a descriptor, because socket addresses end at 108 bytes.
pub(crate) fn listen(folder: &Path, name: &str) -> io::Result<UnixListener> {
    let dir = mounts::open_path(folder)?;
    let listener = UnixListener::bind(format!("/proc/self/fd/{}/{name}", dir.as_fd().as_raw_fd()))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Accepts until `stop`, each connection on two threads.
pub(crate) fn forward(listener: &UnixListener, to: &PathBuf, stop: &AtomicBool) {
    std::thread::scope(|scope| {
        let mut open: Vec<UnixStream> = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let Ok((inner, _)) = listener.accept() else {
                std::thread::sleep(POLL);
                continue;
            };
            open.retain(|stream| stream.peer_addr().is_ok());
            // Dropping it shows the step a closed connection: what a dead agent looks like.
            let Ok(outer) = UnixStream::connect(to) else { continue };
            if open.len() >= 2 * CONNECTIONS_MAX || inner.set_nonblocking(false).is_err() {
                continue;
            }
            let (Ok(inner2), Ok(outer2)) = (inner.try_clone(), outer.try_clone()) else { continue };
            let (Ok(inner3), Ok(outer3)) = (inner.try_clone(), outer.try_clone()) else { continue };
            open.extend([inner3, outer3]);
            scope.spawn(move || copy(inner, outer));
            scope.spawn(move || copy(outer2, inner2));
        }
        for stream in open {
            let _ = stream.shutdown(Shutdown::Both);
        }
    });
}

fn copy(mut from: UnixStream, mut to: UnixStream) {
    let mut buffer = [0u8; 16 * 1024];
    while let Ok(n) = from.read(&mut buffer) {
        if n == 0 || to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn carries_both_ways_and_stops() {
        let folder = tempfile::tempdir().unwrap();
        // Longer than a socket address may be.
        let deep = folder.path().join("x".repeat(120));
        std::fs::create_dir(&deep).unwrap();
        let (stop, outer) = (AtomicBool::new(false), folder.path().join("agent"));
        let agent = UnixListener::bind(&outer).unwrap();
        let inner = listen(&deep, "inner").unwrap();
        let dir = mounts::open_path(&deep).unwrap();
        let address = format!("/proc/self/fd/{}/inner", dir.as_raw_fd());
        std::thread::scope(|scope| {
            scope.spawn(|| forward(&inner, &outer, &stop));
            scope.spawn(|| {
                for _ in 0..3 {
                    let (mut stream, _) = agent.accept().unwrap();
                    let mut request = [0; 4];
                    stream.read_exact(&mut request).unwrap();
                    request.reverse();
                    stream.write_all(&request).unwrap();
                }
            });
            let mut idle = None;
            for request in [b"abcd", b"1234", b"wxyz"] {
                let mut stream = UnixStream::connect(&address).unwrap();
                stream.write_all(request).unwrap();
                let mut answer = [0; 4];
                stream.read_exact(&mut answer).unwrap();
                answer.reverse();
                assert_eq!(&answer, request);
                idle = Some(stream);
            }
            stop.store(true, Ordering::Relaxed);
            // An idle connection does not keep the forwarder.
            let mut rest = Vec::new();
            let _ = idle.map(|mut stream| stream.read_to_end(&mut rest));
            assert!(rest.is_empty());
        });
    }
}
