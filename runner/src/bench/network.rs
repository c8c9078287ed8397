//! A network inside this process that can go away and come back.
//!
//! It models what TCP makes of an outage. In silence nothing arrives, nobody is told, and what was on its way arrives when the
//! silence is over, as repeated packets do. A network that refuses ends what is connected, and every attempt to connect.

use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Read at once.
const PIECE_BYTES: usize = 16 * 1024;

/// What becomes of bytes and connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum State {
    /// They pass.
    #[default]
    Up,
    /// They wait, and nobody knows.
    Silent,
    /// They end.
    Refusing,
}

/// Connections to its address end at another one, as long as the network is up.
#[derive(Debug)]
pub struct Network {
    address: SocketAddr,
    accepting: JoinHandle<()>,
}

impl Network {
    /// Puts a network in this `state` before `target`. Several of them may go away together.
    ///
    /// # Errors
    /// When no loopback port can be opened.
    pub async fn to(target: SocketAddr, state: watch::Receiver<State>) -> io::Result<Self> {
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await?;
        let address = listener.local_addr()?;
        Ok(Self { address, accepting: tokio::spawn(accept(listener, target, state)) })
    }

    /// Whom to dial.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn accept(listener: TcpListener, target: SocketAddr, mut state: watch::Receiver<State>) {
    while let Ok((near, _)) = listener.accept().await {
        // Whoever comes in silence waits here, or behind in the queue of the listener, and may have gone since.
        let Some(State::Up) = after_silence(&mut state).await else { continue };
        let Ok(far) = TcpStream::connect(target).await else { continue };
        // A delay of its own making would be measured as ours.
        if near.set_nodelay(true).and_then(|()| far.set_nodelay(true)).is_err() {
            continue;
        }
        let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
        tokio::spawn(carry(near_in, far_out, state.clone()));
        tokio::spawn(carry(far_in, near_out, state.clone()));
    }
}

/// One direction, until either side or the network ends it.
async fn carry(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut state: watch::Receiver<State>) {
    let mut refused = state.clone();
    let passing = async {
        let mut piece = vec![0; PIECE_BYTES];
        while let Ok(count @ 1..) = from.read(&mut piece).await {
            if after_silence(&mut state).await.is_none() || to.write_all(&piece[..count]).await.is_err() {
                return;
            }
        }
        // Nobody hears in silence that the other side has ended.
        after_silence(&mut state).await;
    };
    tokio::select! {
        () = passing => {}
        _ = refused.wait_for(|state| *state == State::Refusing) => {}
    }
    // Whoever has hung up need not be told.
    let _ = to.shutdown().await;
}

/// What the network is when it is not silent; `None` when it has ended for good.
async fn after_silence(state: &mut watch::Receiver<State>) -> Option<State> {
    state.wait_for(|state| *state != State::Silent).await.ok().map(|state| *state)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both ends of a connection over a network.
    async fn connected(state: &watch::Sender<State>) -> (Network, TcpListener, TcpStream, TcpStream) {
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.expect("a port");
        let target = listener.local_addr().expect("bound");
        let network = Network::to(target, state.subscribe()).await.expect("a port");
        let near = TcpStream::connect(network.address()).await.expect("connected");
        let (far, _) = listener.accept().await.expect("accepted");
        (network, listener, near, far)
    }

    #[tokio::test]
    async fn what_was_sent_in_silence_arrives_when_it_is_over() {
        let (state, _) = watch::channel(State::Up);
        let (network, listener, mut near, mut far) = connected(&state).await;

        state.send_replace(State::Silent);
        near.write_all(b"said").await.expect("taken");
        let mut late = TcpStream::connect(network.address()).await.expect("connected");
        late.write_all(b"more").await.expect("taken");
        state.send_replace(State::Up);

        let mut received = [0; 4];
        far.read_exact(&mut received).await.expect("it arrives");
        assert_eq!(&received, b"said");
        let (mut far, _) = listener.accept().await.expect("accepted");
        far.read_exact(&mut received).await.expect("it arrives");
        assert_eq!(&received, b"more");
    }

    #[tokio::test]
    async fn network_that_refuses_ends_what_is_and_what_comes_until_it_is_up_again() {
        let (state, _) = watch::channel(State::Up);
        let (network, listener, mut near, mut far) = connected(&state).await;

        state.send_replace(State::Refusing);
        let mut rest = Vec::new();
        assert_eq!(near.read_to_end(&mut rest).await.expect("an end"), 0);
        assert_eq!(far.read_to_end(&mut rest).await.expect("an end"), 0);
        let mut refused = TcpStream::connect(network.address()).await.expect("connected");
        assert_eq!(refused.read_to_end(&mut rest).await.unwrap_or(0), 0);
        state.send_replace(State::Up);

        let _near = TcpStream::connect(network.address()).await.expect("connected");
        listener.accept().await.expect("accepted");
    }
}
