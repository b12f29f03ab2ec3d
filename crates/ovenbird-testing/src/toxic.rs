//! A TCP proxy that harms connections: cuts after a number of bytes, resets, stalls, refusals. What happens to the n-th connection is
//! decided by the seed alone.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::{Error, Result};

/// How connections are harmed.
#[derive(Debug, Clone, Copy)]
pub struct Toxics {
    /// What decides.
    pub seed: u64,
    /// How many of a hundred connections are cut.
    pub percent: u64,
    /// A cut comes before so many bytes passed, in one direction or the other.
    pub within: u64,
    /// How many of a hundred cuts count the bytes of the client; the others count those of the server.
    pub up: u64,
    /// A connection that is cut is first silent for up to so long.
    pub stall: Duration,
}

/// What was done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Harm {
    /// Connections that were taken.
    pub connections: u64,
    /// Of these, cut in the middle.
    pub cuts: u64,
    /// Bytes towards the server.
    pub up: u64,
}

#[derive(Debug, Default)]
struct Counts {
    connections: AtomicU64,
    cuts: AtomicU64,
    up: AtomicU64,
}

/// A running proxy. Dropped: it stops to listen.
#[derive(Debug)]
pub struct Toxic {
    port: u16,
    stop: Arc<AtomicBool>,
    counts: Arc<Counts>,
}

/// What happens to one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fate {
    /// After so many bytes of one direction; `None`: never.
    cut: Option<u64>,
    /// The bytes of the client count, else those of the server.
    up: bool,
    /// With a reset, else with an orderly end.
    reset: bool,
    stall: Duration,
}

impl Toxics {
    fn fate(&self, connection: u64) -> Fate {
        let number = |salt: u64| mix(self.seed ^ mix(connection ^ mix(salt)));
        let cut = (number(1) % 100 < self.percent).then(|| number(2) % self.within.max(1));
        let stall = self.stall.mul_f64((number(5) % 1000) as f64 / 1000.0);
        Fate { cut, up: number(3) % 100 < self.up, reset: number(4).is_multiple_of(2), stall }
    }
}

/// A number that looks random and is not (splitmix64).
fn mix(value: u64) -> u64 {
    let mut value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

impl Toxic {
    /// Forwards connections to loopback `port`.
    pub fn start(port: u16, toxics: Toxics) -> Result<Self> {
        let start = |source| Error::Start { program: "toxic proxy".into(), source };
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(start)?;
        let own = listener.local_addr().map_err(start)?.port();
        listener.set_nonblocking(true).map_err(start)?;
        let (stop, counts) = (Arc::new(AtomicBool::new(false)), Arc::new(Counts::default()));
        let (stopped, shared) = (Arc::clone(&stop), Arc::clone(&counts));
        std::thread::spawn(move || {
            while !stopped.load(Ordering::SeqCst) {
                match listener.accept() {
                    Ok((client, _)) => {
                        let fate = toxics.fate(shared.connections.fetch_add(1, Ordering::SeqCst));
                        let counts = Arc::clone(&shared);
                        std::thread::spawn(move || relay(&client, port, fate, &counts));
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(2)),
                }
            }
        });
        Ok(Self { port: own, stop, counts })
    }

    /// `127.0.0.1:PORT`.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// What was done so far.
    pub fn harm(&self) -> Harm {
        let read = |count: &AtomicU64| count.load(Ordering::SeqCst);
        Harm { connections: read(&self.counts.connections), cuts: read(&self.counts.cuts), up: read(&self.counts.up) }
    }
}

impl Drop for Toxic {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
    }
}

fn relay(client: &TcpStream, port: u16, fate: Fate, counts: &Arc<Counts>) {
    let _ = client.set_nonblocking(false);
    let Ok(server) = TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port))) else { return };
    let (Ok(client_too), Ok(server_too)) = (client.try_clone(), server.try_clone()) else { return };
    let up_counts = Arc::clone(counts);
    let up = std::thread::spawn(move || {
        let cut = fate.cut.filter(|_| fate.up);
        forward(&client_too, &server_too, cut, fate, &up_counts, Some(&up_counts.up));
    });
    forward(&server, client, fate.cut.filter(|_| !fate.up), fate, counts, None);
    let _ = up.join();
}

/// Copies one direction until it ends or is cut.
fn forward(mut from: &TcpStream, mut to: &TcpStream, cut: Option<u64>, fate: Fate, counts: &Counts, passed: Option<&AtomicU64>) {
    let mut left = cut.unwrap_or(u64::MAX);
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let Ok(count @ 1..) = from.read(&mut buffer) else {
            let _ = to.shutdown(Shutdown::Write);
            return;
        };
        let keep = usize::try_from(left).unwrap_or(usize::MAX).min(count);
        let sent = to.write_all(&buffer[..keep]);
        if let Some(passed) = passed {
            passed.fetch_add(keep as u64, Ordering::Relaxed);
        }
        if keep < count {
            counts.cuts.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(fate.stall);
        }
        if keep < count || sent.is_err() {
            if fate.reset {
                // What is unread when a socket closes, or a lingering time of zero, makes the system send a reset.
                let _ = rustix::net::sockopt::set_socket_linger(from, Some(Duration::ZERO));
            }
            let _ = from.shutdown(Shutdown::Both);
            let _ = to.shutdown(Shutdown::Both);
            return;
        }
        left -= keep as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fates_follow_the_seed() {
        let toxics = Toxics { seed: 7, percent: 30, within: 1000, up: 50, stall: Duration::ZERO };
        let fates: Vec<Fate> = (0..10_000).map(|n| toxics.fate(n)).collect();
        assert_eq!(fates, (0..10_000).map(|n| toxics.fate(n)).collect::<Vec<_>>());
        let cut = fates.iter().filter_map(|fate| fate.cut).collect::<Vec<_>>();
        assert!((2800..3200).contains(&cut.len()), "{}", cut.len());
        assert!(cut.iter().all(|at| *at < 1000) && cut.iter().any(|at| *at > 900) && cut.iter().any(|at| *at < 100));
        let other = Toxics { seed: 8, ..toxics };
        assert_ne!(fates, (0..10_000).map(|n| other.fate(n)).collect::<Vec<_>>());
    }
}
