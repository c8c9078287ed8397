//! A distant network inside this process: every byte arrives late by a fixed time, as many under way as there are.
//!
//! It models the time of flight and nothing else: no loss, no bound on the rate.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// Read at once.
const PIECE_BYTES: usize = 64 * 1024;
/// Pieces under way in one direction; far more than any window of this benchmark.
const PIECES: usize = 1024;

/// Connections to its address end at another one, later.
#[derive(Debug)]
pub struct Distance {
    address: SocketAddr,
    accepting: JoinHandle<()>,
}

impl Distance {
    /// Puts `each_way` between its own address and `target`.
    ///
    /// # Errors
    /// When no loopback port can be opened.
    pub async fn to(target: SocketAddr, each_way: Duration) -> io::Result<Self> {
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await?;
        let address = listener.local_addr()?;
        Ok(Self { address, accepting: tokio::spawn(accept(listener, target, each_way)) })
    }

    /// Whom to dial.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Distance {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn accept(listener: TcpListener, target: SocketAddr, each_way: Duration) {
    while let Ok((near, _)) = listener.accept().await {
        let Ok(far) = TcpStream::connect(target).await else { continue };
        // A delay of its own making would be measured as ours.
        if near.set_nodelay(true).and_then(|()| far.set_nodelay(true)).is_err() {
            continue;
        }
        let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
        tokio::spawn(carry(near_in, far_out, each_way));
        tokio::spawn(carry(far_in, near_out, each_way));
    }
}

/// One direction, until either side ends.
async fn carry(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, late: Duration) {
    let (sender, mut pieces) = mpsc::channel::<(Instant, Vec<u8>)>(PIECES);
    let reading = async move {
        loop {
            let mut piece = vec![0; PIECE_BYTES];
            match from.read(&mut piece).await {
                Ok(0) | Err(_) => return,
                Ok(count) => piece.truncate(count),
            }
            if sender.send((Instant::now() + late, piece)).await.is_err() {
                return;
            }
        }
    };
    let writing = async move {
        while let Some((due, piece)) = pieces.recv().await {
            tokio::time::sleep_until(due).await;
            if to.write_all(&piece).await.is_err() {
                return;
            }
        }
        // The other side has ended; so it is told, late as everything.
        let _ = to.shutdown().await;
    };
    tokio::join!(reading, writing);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_byte_arrives_in_order_and_not_before_its_time() {
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.expect("a port");
        let late = Duration::from_millis(20);
        let distance = Distance::to(listener.local_addr().expect("bound"), late).await.expect("a port");
        let sent: Vec<u8> = (0..=255_u8).cycle().take(300_000).collect();
        let start = Instant::now();
        let mut near = TcpStream::connect(distance.address()).await.expect("connected");
        let (mut far, _) = listener.accept().await.expect("accepted");

        let writing = async {
            near.write_all(&sent).await.expect("taken");
            near.shutdown().await.expect("ended");
        };
        let mut received = Vec::new();
        let (_, read) = tokio::join!(writing, far.read_to_end(&mut received));

        read.expect("all of it");
        assert!(received == sent, "{} bytes", received.len());
        assert!(start.elapsed() >= late);
    }
}
