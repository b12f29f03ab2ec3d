//! A TCP relay that hangs up after a number of bytes: a registry that dies half way.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::{Error, Result};

/// A running relay. Dropped: it stops to listen.
#[derive(Debug)]
pub struct Relay {
    port: u16,
    stop: Arc<AtomicBool>,
    hang_ups: Arc<AtomicU64>,
}

impl Relay {
    /// Forwards connections to loopback `port`; each is cut after `limit` bytes of answers. The first `patience` cuts happen, later
    /// connections pass unhurt (`u64::MAX`: every one is cut).
    pub fn start(port: u16, limit: u64, patience: u64) -> Result<Self> {
        let start = |source| Error::Start { program: "relay".into(), source };
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(start)?;
        let own = listener.local_addr().map_err(start)?.port();
        listener.set_nonblocking(true).map_err(start)?;
        let (stop, hang_ups) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, cuts) = (stop.clone(), hang_ups.clone());
        std::thread::spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                match listener.accept() {
                    Ok((client, _)) => {
                        let cuts = cuts.clone();
                        std::thread::spawn(move || relay(client, port, limit, patience, &cuts));
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(5)),
                }
            }
        });
        Ok(Self { port: own, stop, hang_ups })
    }

    /// `127.0.0.1:PORT`.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Connections that were cut so far.
    pub fn hang_ups(&self) -> u64 {
        self.hang_ups.load(Ordering::SeqCst)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

fn relay(mut client: TcpStream, port: u16, limit: u64, patience: u64, cuts: &AtomicU64) {
    let _ = client.set_nonblocking(false);
    let Ok(mut server) = TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port))) else { return };
    let (Ok(mut from_client), Ok(mut to_server)) = (client.try_clone(), server.try_clone()) else { return };
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut from_client, &mut to_server);
        let _ = to_server.shutdown(Shutdown::Write);
    });
    let (mut left, mut buffer) = (limit, [0u8; 16 * 1024]);
    while let Ok(count) = server.read(&mut buffer) {
        let cut = count as u64 > left && cuts.load(Ordering::SeqCst) < patience;
        let passed = if cut { left as usize } else { count };
        if count == 0 || client.write_all(&buffer[..passed]).is_err() {
            break;
        }
        left = left.saturating_sub(count as u64);
        if cut {
            cuts.fetch_add(1, Ordering::SeqCst);
            break;
        }
    }
    let _ = client.shutdown(Shutdown::Both);
    let _ = server.shutdown(Shutdown::Both);
}
