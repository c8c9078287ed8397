//! F-64: an orchestrator that many runners have is away for a while, and comes back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use runner::connector::backoff::Backoff;
use runner::dev::{LinkSettings, Orchestrator};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::broadcast;

use crate::world::{Options, Runner, within};

const RUNNERS: usize = 200;
/// A tenth of what is usual, so that the waits have grown to their most within seconds.
const LEAST: Duration = Duration::from_millis(50);
const MOST: Duration = Duration::from_secs(3);

/// What stands before all of them.
struct Gate {
    open: AtomicBool,
    attempts: Mutex<Vec<Instant>>,
    cut: broadcast::Sender<()>,
}

impl Gate {
    /// A port that leads to `port` while the gate is open.
    async fn before(self: &Arc<Self>, port: u16) -> u16 {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let own = listener.local_addr().unwrap().port();
        let gate = Arc::clone(self);
        tokio::spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                gate.attempts.lock().unwrap().push(Instant::now());
                if !gate.open.load(Ordering::SeqCst) {
                    continue;
                }
                let mut cut = gate.cut.subscribe();
                tokio::spawn(async move {
                    let Ok(mut far) = TcpStream::connect(("127.0.0.1", port)).await else { return };
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                        _ = cut.recv() => {}
                    }
                });
            }
        });
        own
    }

    fn attempts(&self) -> usize {
        self.attempts.lock().unwrap().len()
    }
}

async fn all_have(orchestrators: &[Orchestrator], links: u64) {
    within("every link", async {
        while orchestrators.iter().any(|orchestrator| orchestrator.links() < links) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

/// The bound: when the waits have grown, each runner makes two attempts in the longest of them on average, so that of many
/// hardly ever more than two and a half are made. With what is usual: five hundred make 42 in a second.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runners_ask_for_an_orchestrator_that_is_away_at_a_bounded_rate_and_all_come_back() {
    let gate =
        Arc::new(Gate { open: AtomicBool::new(true), attempts: Mutex::default(), cut: broadcast::channel(16).0 });
    let directory = tempfile::tempdir().unwrap();
    let (mut orchestrators, mut runners) = (Vec::new(), Vec::new());
    for number in 0..RUNNERS {
        let orchestrator = Orchestrator::start(LinkSettings::default()).await.unwrap();
        let own = directory.path().join(number.to_string());
        std::fs::create_dir(&own).unwrap();
        let files = orchestrator.write_client_files(&own, "runner-1").unwrap();
        let port = gate.before(orchestrator.address().port()).await;
        runners.push(Runner::dial(port, files, Options { backoff: Backoff::new(LEAST, MOST), ..Options::default() }));
        orchestrators.push(orchestrator);
    }
    all_have(&orchestrators, 1).await;

    gate.open.store(false, Ordering::SeqCst);
    gate.cut.send(()).unwrap();
    // From the least to the most there are six doublings, which take as long as the most together.
    tokio::time::sleep(2 * MOST).await;
    let (before, since) = (gate.attempts(), Instant::now());
    tokio::time::sleep(MOST).await;
    let (made, waits) = (gate.attempts() - before, since.elapsed().as_secs_f64() / MOST.as_secs_f64());
    gate.open.store(true, Ordering::SeqCst);

    all_have(&orchestrators, 2).await;
    println!("{made} attempts of {RUNNERS} runners in {waits:.1} of the longest waits");
    assert!(made > RUNNERS, "they wait for longer than they should");
    assert!((made as f64) < 2.5 * waits * RUNNERS as f64, "{made} attempts in {waits:.1} of the longest waits");
}
