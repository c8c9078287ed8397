//! The wire between a runner and its orchestrator: a TCP proxy that breaks it in the ways in which networks do.

mod weather;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{broadcast, watch};

pub use weather::Weather;

/// How a connection breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Both sides are closed.
    Close,
    /// Both sides are reset: what they had not read is lost.
    Reset,
    /// So many more bytes of the runner pass, wherever in a frame that is.
    After(u64),
    /// Nothing passes for so long, and then it closes.
    Freeze(Duration),
}

/// The proxy. Dropping it closes what is connected.
#[derive(Debug)]
pub struct FaultProxy {
    port: u16,
    shared: Arc<Shared>,
    accepting: tokio::task::JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    cut: broadcast::Sender<Cut>,
    /// Connections by number.
    live: watch::Sender<BTreeSet<u64>>,
    last: AtomicU64,
    /// What is sent to the runner on connections up to this number stays here.
    held: watch::Sender<u64>,
    /// What the runner has sent on connections up to this number stays here.
    kept: watch::Sender<u64>,
    /// Rest after each piece that the runner has sent.
    rest: watch::Sender<Duration>,
    /// Of connections that are made from here on.
    weather: watch::Sender<Weather>,
}

/// Pieces in which bytes pass.
const PIECE: usize = 16 * 1024;
/// A connection that does not end within this time after a cut is closed whatever it still has to pass.
const CUT_TIME: Duration = Duration::from_millis(200);

impl FaultProxy {
    /// A proxy on a free loopback port that leads to `target`.
    ///
    /// # Panics
    /// When there is no port.
    pub async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free loopback port");
        let port = listener.local_addr().expect("the address of a listener").port();
        let shared = Arc::new(Shared {
            cut: broadcast::channel(16).0,
            live: watch::channel(BTreeSet::new()).0,
            last: AtomicU64::new(0),
            held: watch::channel(0).0,
            kept: watch::channel(0).0,
            rest: watch::channel(Duration::ZERO).0,
            weather: watch::channel(Weather::default()).0,
        });
        let accepting = tokio::spawn(accept(listener, target, Arc::clone(&shared)));
        Self { port, shared, accepting }
    }

    /// Where the runner dials.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// From here on nothing reaches the runner on what is connected now; what it sends still passes.
    pub fn hold_what_goes_to_the_runner(&self) {
        self.shared.held.send_replace(self.shared.last.load(Ordering::SeqCst));
    }

    /// From here on nothing of what the runner sends on what is connected now arrives, not even when the runner is gone; what
    /// it does on connections that it makes later passes.
    pub fn keep_what_comes_from_the_runner(&self) {
        self.shared.kept.send_replace(self.shared.last.load(Ordering::SeqCst));
    }

    /// Lets everything pass again, and so arrive late what was kept.
    pub fn release(&self) {
        self.shared.held.send_replace(0);
        self.shared.kept.send_replace(0);
    }

    /// Makes the way from the runner slow: this much time for each 16 KiB.
    pub fn rest_after_each_piece(&self, rest: Duration) {
        self.shared.rest.send_replace(rest);
    }

    /// Connections that are made from here on have this weather, in both directions.
    pub fn set_weather(&self, weather: Weather) {
        self.shared.weather.send_replace(weather);
    }

    /// Breaks what is connected now, and returns when it is broken.
    pub async fn cut(&self, how: Cut) {
        let last = self.shared.last.load(Ordering::SeqCst);
        // Without a connection there is nobody to hear it, and nothing to break.
        let _ = self.shared.cut.send(how);
        let mut live = self.shared.live.subscribe();
        // The sender lives in `self`, so waiting cannot fail.
        let _ = live.wait_for(|live| live.iter().all(|number| *number > last)).await;
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.accepting.abort();
        let _ = self.shared.cut.send(Cut::Close);
    }
}

async fn accept(listener: TcpListener, target: SocketAddr, shared: Arc<Shared>) {
    while let Ok((near, _)) = listener.accept().await {
        let number = shared.last.fetch_add(1, Ordering::SeqCst) + 1;
        shared.live.send_modify(|live| _ = live.insert(number));
        let cut = shared.cut.subscribe();
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            if let Ok(far) = TcpStream::connect(target).await {
                pass(near, far, number, cut, &shared).await;
            }
            shared.live.send_modify(|live| _ = live.remove(&number));
        });
    }
}

async fn pass(
    mut near: TcpStream,
    mut far: TcpStream,
    number: u64,
    mut cut: broadcast::Receiver<Cut>,
    shared: &Shared,
) {
    // Small frames must not wait for each other; a socket that is closed already shows when it is used.
    let _ = (near.set_nodelay(true), far.set_nodelay(true));
    let allowed = AtomicU64::new(u64::MAX);
    let how = {
        let (near_reads, near_writes) = near.split();
        let (far_reads, far_writes) = far.split();
        let up_waits = Wait { rest: Some(shared.rest.subscribe()), held: shared.kept.subscribe(), number };
        let down_waits = Wait { rest: None, held: shared.held.subscribe(), number };
        let weather = *shared.weather.borrow();
        let both = async {
            if weather.is_calm() {
                let up = pump(near_reads, far_writes, &allowed, up_waits);
                let down = pump(far_reads, near_writes, &UNBOUNDED, down_waits);
                tokio::join!(up, down);
            } else {
                let up = weather::pump(near_reads, far_writes, up_waits, weather);
                let back = Weather { seed: !weather.seed, ..weather };
                tokio::join!(up, weather::pump(far_reads, near_writes, down_waits, back));
            }
        };
        tokio::pin!(both);
        let how = tokio::select! {
            _ = &mut both => return,
            how = cut.recv() => how.unwrap_or(Cut::Close),
        };
        match how {
            Cut::After(bytes) => {
                allowed.store(bytes, Ordering::SeqCst);
                // Whether it ended by itself or by the clock, it ends.
                let _ = tokio::time::timeout(CUT_TIME, both).await;
            }
            Cut::Freeze(time) => tokio::time::sleep(time).await,
            Cut::Close | Cut::Reset => {}
        }
        how
    };
    if how == Cut::Reset {
        let _ = (near.set_zero_linger(), far.set_zero_linger());
    }
}

static UNBOUNDED: AtomicU64 = AtomicU64::new(u64::MAX);

/// What a direction waits for.
struct Wait {
    rest: Option<watch::Receiver<Duration>>,
    held: watch::Receiver<u64>,
    number: u64,
}

impl Wait {
    /// Nothing is held here.
    async fn until_free(&mut self) {
        // The sender outlives the connection, so waiting cannot fail.
        drop(self.held.wait_for(|held| *held < self.number).await.map(|_| ()));
    }
}

/// Copies until the end of the source or of what is allowed.
async fn pump(
    mut source: impl AsyncRead + Unpin,
    mut target: impl AsyncWrite + Unpin,
    allowed: &AtomicU64,
    mut wait: Wait,
) {
    let mut buffer = vec![0; PIECE];
    while let Ok(length @ 1..) = source.read(&mut buffer).await {
        let rest = wait.rest.as_mut().map_or(Duration::ZERO, |rest| *rest.borrow_and_update());
        if !rest.is_zero() {
            tokio::time::sleep(rest).await;
        }
        wait.until_free().await;
        let left = allowed.load(Ordering::SeqCst);
        let length = length.min(usize::try_from(left).unwrap_or(usize::MAX));
        if left != u64::MAX {
            allowed.fetch_sub(length as u64, Ordering::SeqCst);
        }
        if length == 0 || target.write_all(&buffer[..length]).await.is_err() {
            break;
        }
    }
    let _ = target.shutdown().await;
}
