//! The streams of a program in a pod over one web socket, as blocking ends.
//!
//! Both directions go their own way: who does not read what comes never stops what is sent. A close of one direction alone does not
//! arrive everywhere (Kubernetes before 1.30), so nothing here depends on it. Source: the channels of `v4.channel.k8s.io` and
//! `v5.channel.k8s.io` in Kubernetes' remotecommand.

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use kube::client::Connection;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_tungstenite::tungstenite::Message;

use super::cluster::Cluster;

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;

/// Most bytes of one message.
const PIECE: usize = 128 << 10;

/// Pieces that wait in either direction.
const WAITING: usize = 16;

/// How often the connection is kept warm.
const PING: Duration = Duration::from_secs(10);

/// A connection from which nothing comes this long, not even an answer to a ping, is dead.
const SILENCE: Duration = Duration::from_secs(45);

/// Most of what the program says beside the pipe.
const MAX_SAID: usize = 16 << 10;

/// What is said beside the pipe.
pub(super) type Said = Arc<Mutex<Vec<u8>>>;

/// What is written goes to the program.
pub(super) struct ToPod(mpsc::Sender<Bytes>);

impl Write for ToPod {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = &bytes[..bytes.len().min(PIECE)];
        if piece.is_empty() {
            return Ok(0);
        }
        self.0.blocking_send(Bytes::copy_from_slice(piece)).map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What the program writes.
pub(super) struct FromPod {
    pieces: mpsc::Receiver<Bytes>,
    piece: Bytes,
}

impl Read for FromPod {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.piece = piece,
                None => return Ok(0),
            }
        }
        let most = buffer.len().min(self.piece.len());
        buffer[..most].copy_from_slice(&self.piece.split_to(most));
        Ok(most)
    }
}

/// Takes a connection apart.
pub(super) fn open(connection: Connection, cluster: &Cluster) -> (ToPod, FromPod, Said) {
    let (to, mut outgoing) = mpsc::channel::<Bytes>(WAITING);
    let (incoming, pieces) = mpsc::channel(WAITING);
    let said = Said::default();
    let (mut socket_to, mut socket_from) = connection.into_stream().split();
    cluster.spawn(async move {
        let mut ping = interval(PING);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let message = tokio::select! {
                piece = outgoing.recv() => match piece {
                    Some(piece) => {
                        let mut framed = Vec::with_capacity(piece.len() + 1);
                        framed.push(STDIN);
                        framed.extend_from_slice(&piece);
                        Message::binary(framed)
                    }
                    // The conversation is over: the program sees its streams end.
                    None => break,
                },
                _ = ping.tick() => Message::Ping(Bytes::new()),
            };
            if socket_to.send(message).await.is_err() {
                return;
            }
        }
        let _ = socket_to.close().await;
    });
    let beside = Arc::clone(&said);
    cluster.spawn(async move {
        while let Ok(Some(Ok(message))) = timeout(SILENCE, socket_from.next()).await {
            let Message::Binary(mut bytes) = message else { continue };
            if bytes.is_empty() {
                continue;
            }
            let channel = bytes.split_to(1)[0];
            match channel {
                STDOUT if bytes.is_empty() => {}
                STDOUT => {
                    let Ok(()) = incoming.send(bytes).await else { return };
                }
                STDERR => keep(&beside, &bytes),
                STATUS => {
                    // Success says nothing that is not known.
                    if !bytes.windows(9).any(|part| part == b"\"Success\"") {
                        keep(&beside, &bytes);
                    }
                    return;
                }
                _ => {}
            }
        }
    });
    (ToPod(to), FromPod { pieces, piece: Bytes::new() }, said)
}

/// Keeps the end of what is said.
fn keep(said: &Said, bytes: &[u8]) {
    let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
    said.extend_from_slice(bytes);
    let over = said.len().saturating_sub(MAX_SAID);
    said.drain(..over);
}
