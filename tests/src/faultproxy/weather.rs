//! What the way of bytes through the proxy takes: time, more or less of it, and packets that are lost.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::{PIECE, Wait};
use crate::daemon::Random;

/// Pieces that are under way in one direction, 1 MiB: what a sender may have in flight before it has to wait.
const UNDER_WAY: usize = 64;
/// After so long a sender repeats a packet that was lost. RFC 6298 has a second as the least, Linux a fifth of it and what the
/// way takes.
const REPEAT: Duration = Duration::from_millis(700);

/// The way, the same in both directions. Bytes of a connection never overtake each other, and none is missing in the end,
/// because it is TCP: a packet that is lost, or that another has overtaken, is time in which nothing behind it arrives.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Weather {
    /// How long a piece is under way.
    pub delay: Duration,
    /// So much more or less, drawn for each piece.
    pub jitter: Duration,
    /// Of a hundred pieces so many are lost, again and again.
    pub lost_percent: u64,
    /// What is drawn.
    pub seed: u64,
}

impl Weather {
    pub(super) fn is_calm(self) -> bool {
        self.delay.is_zero() && self.jitter.is_zero() && self.lost_percent == 0
    }

    fn time(self, lots: &mut Random) -> Duration {
        let jitter = u64::try_from(self.jitter.as_micros()).unwrap_or(u64::MAX / 4);
        let drawn = Duration::from_micros(lots.below(2 * jitter + 1));
        let mut time = (self.delay + drawn).saturating_sub(self.jitter);
        while lots.below(100) < self.lost_percent.min(90) {
            time += REPEAT;
        }
        time
    }
}

/// Copies until the end of the source, each piece at its time. What is under way when the connection is cut is lost.
pub(super) async fn pump(
    mut source: impl AsyncRead + Unpin,
    mut target: impl AsyncWrite + Unpin,
    mut wait: Wait,
    weather: Weather,
) {
    let (sender, mut under_way) = mpsc::channel::<(Instant, Vec<u8>)>(UNDER_WAY);
    let mut lots = Random::new(weather.seed);
    let leaves = async move {
        let mut buffer = vec![0; PIECE];
        let mut last = Instant::now();
        while let Ok(length @ 1..) = source.read(&mut buffer).await {
            last = last.max(Instant::now() + weather.time(&mut lots));
            if sender.send((last, buffer[..length].to_vec())).await.is_err() {
                break;
            }
        }
    };
    let arrives = async move {
        while let Some((due, bytes)) = under_way.recv().await {
            sleep_until(due).await;
            wait.until_free().await;
            if target.write_all(&bytes).await.is_err() {
                break;
            }
        }
        // The other side may have hung up already.
        let _ = target.shutdown().await;
    };
    tokio::join!(leaves, arrives);
}

#[cfg(test)]
mod tests {
    use super::super::FaultProxy;
    use super::*;
    use tokio::net::{TcpListener, TcpStream};

    const BAD: Weather =
        Weather { delay: Duration::from_millis(60), jitter: Duration::from_millis(40), lost_percent: 10, seed: 7 };

    /// Both ends of a connection through a proxy with this weather.
    async fn connected(weather: Weather) -> (FaultProxy, TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = FaultProxy::to(listener.local_addr().unwrap()).await;
        proxy.set_weather(weather);
        let near = TcpStream::connect(("127.0.0.1", proxy.port())).await.unwrap();
        let (far, _) = listener.accept().await.unwrap();
        (proxy, near, far)
    }

    /// Sends this from one end to the other. How long it took.
    async fn send(sent: &[u8], from: &mut TcpStream, to: &mut TcpStream) -> Duration {
        let begin = Instant::now();
        let mut received = vec![0; sent.len()];
        let (written, read) = tokio::join!(from.write_all(sent), to.read_exact(&mut received));
        written.unwrap();
        read.unwrap();
        assert!(received == sent, "bytes have changed on the way");
        begin.elapsed()
    }

    #[tokio::test]
    async fn bytes_arrive_late_whole_and_in_order_in_both_directions() {
        let (_proxy, mut near, mut far) = connected(BAD).await;
        let sent: Vec<u8> = (0..300_000_u32).flat_map(u32::to_le_bytes).collect();
        let least = BAD.delay.saturating_sub(BAD.jitter);
        assert!(send(&sent, &mut near, &mut far).await >= least);
        assert!(send(&sent, &mut far, &mut near).await >= least);
    }

    #[tokio::test]
    async fn delay_is_not_paid_for_each_piece() {
        let slow = Weather { delay: Duration::from_millis(500), ..Weather::default() };
        let (_proxy, mut near, mut far) = connected(slow).await;
        let took = send(&vec![1; 40 * PIECE], &mut near, &mut far).await;
        // One after the other they would take twenty seconds.
        assert!(took >= slow.delay && took < 20 * slow.delay, "{took:?}");
    }
}
