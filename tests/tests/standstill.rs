//! Something stands still, and nobody is told: the runner, process 1, the disk, or one or both directions of the link. Nothing
//! is begun without a lease, nothing is begun twice, and whoever is not concerned goes on.
//!
//! The built daemon beside a launcher of its own, real sandboxes, and an orchestrator that gives short leases.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "the seed of a run belongs into its log")]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use proto::runner::v1 as pb;
use proto::runner::v1::outcome::Kind;
use runner::dev::{LinkSettings, Session};
use sandbox_runner_tests::daemon::{Daemon, MARKER, Options, Workspace, bash, seed, within};
use sandbox_runner_tests::faultproxy::Weather;
use sandbox_runner_tests::host::{self, Stopped};
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::runner::scaled;

/// Long enough for what is not concerned to be seen going on.
const MOMENT: Duration = Duration::from_millis(500);

fn lease(seconds: u64) -> Options {
    let lease_ttl = scaled(Duration::from_secs(seconds));
    let link = LinkSettings { lease_ttl, heartbeat_every: Duration::from_millis(300), ..LinkSettings::default() };
    Options { link, ..Options::default() }
}

/// A session with a working directory that is read from outside.
struct Site {
    session: Session,
    workspace: Workspace,
}

impl Site {
    async fn new(daemon: &Daemon, session_id: &str) -> Self {
        let session = daemon.session(session_id).await;
        // Others may run on this machine, of this program or of another.
        static SITES: AtomicU64 = AtomicU64::new(0);
        let marker = format!("{}-{}", std::process::id(), SITES.fetch_add(1, Ordering::SeqCst));
        let prepare = format!("echo {marker} > {MARKER}");
        within("prepare", session.bash(&format!("prepare-{session_id}"), &prepare)).await.expect("an end");
        let workspace = Workspace::find(&marker).expect("its sandbox");
        Self { session, workspace }
    }

    /// Which calls have begun, and how often.
    fn begun(&self) -> String {
        String::from_utf8_lossy(&self.workspace.read("begun")).into_owned()
    }

    /// Sends a call that says that it begins.
    fn send(&self, call_id: &str, command: &str) {
        self.session.send(call_id, bash(format!("echo {call_id} >> begun; {command}")));
    }

    /// Sends one that is over in a moment, and one that waits behind it.
    async fn send_two(&self, daemon: &Daemon) {
        self.send("ends", "sleep 1; echo end");
        self.send("waits", "echo end");
        within("start", self.session.started("ends")).await.expect("started");
        within("acceptance", async {
            while daemon.orchestrator.waiting().is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }

    /// Every call ends well, and each has begun once, in this order.
    async fn all_end(&self, calls: &[&str]) {
        for call_id in calls {
            let finished = within(call_id, self.session.outcome(call_id)).await.expect("an end");
            assert_eq!(finished.message.outcome.and_then(|outcome| outcome.kind), Some(exited(0)), "{call_id}");
            assert_eq!(finished.streams[&1].bytes, b"end\n", "{call_id}");
        }
        assert_eq!(self.begun().lines().collect::<Vec<_>>(), calls);
    }
}

fn exited(code: i32) -> Kind {
    Kind::Exited(pb::Exited { code })
}

async fn end(mut daemon: Daemon, sessions: &[&Session]) {
    for session in sessions {
        within("close", session.close(Duration::ZERO)).await.expect("the session ends");
    }
    assert_eq!(daemon.orchestrator.complaints(), Vec::<String>::new());
    daemon.end_with_nothing_left();
}

/// F-16: the runner is stopped for longer than its lease. When it goes on, the first thing it finds is a call that may begin,
/// and answers to heartbeats from before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runner_that_was_stopped_for_longer_than_its_lease_begins_nothing_before_it_is_renewed() {
    needs_root!();
    let _host = host::shared();
    let daemon = Daemon::start(lease(2)).await;
    let site = Site::new(&daemon, "stopped").await;
    site.send_two(&daemon).await;

    let stopped = Stopped::new(daemon.runner_pid().expect("a runner"));
    site.send("sent", "echo end");
    tokio::time::sleep(scaled(Duration::from_secs(3))).await;
    daemon.wire.hold_what_goes_to_the_runner();
    drop(stopped);
    daemon.said("lease lapsed").await;
    tokio::time::sleep(MOMENT).await;
    assert_eq!(site.begun(), "ends\n", "a call began without a lease");
    daemon.wire.release();

    site.all_end(&["ends", "waits", "sent"]).await;
    daemon.said("lease renewed").await;
    end(daemon, &[&site.session]).await;
}

/// F-17: process 1 of one sandbox is stopped for a while.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn process_1_that_is_stopped_holds_up_nobody_else_and_goes_on_as_if_nothing_had_been() {
    needs_root!();
    let _host = host::shared();
    let daemon = Daemon::start(lease(30)).await;
    let (stands, other) = (Site::new(&daemon, "stands").await, Site::new(&daemon, "other").await);
    stands.send_two(&daemon).await;

    let stopped = Stopped::new(stands.workspace.process_1);
    let (heartbeats, _) = daemon.orchestrator.heartbeats();
    for number in 0..5 {
        let finished =
            within("other", other.session.bash(&format!("call-{number}"), "echo here")).await.expect("an end");
        assert_eq!(finished.streams[&1].bytes, b"here\n");
    }
    let third = Site::new(&daemon, "third").await;
    within("heartbeats", async {
        while daemon.orchestrator.heartbeats().0 < heartbeats + 3 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert_eq!(stands.begun(), "ends\n");
    drop(stopped);

    stands.all_end(&["ends", "waits"]).await;
    end(daemon, &[&stands.session, &other.session, &third.session]).await;
}

/// F-17: process 1 of one sandbox is stopped when the next runner comes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn next_runner_does_not_wait_for_a_process_1_that_is_stopped() {
    needs_root!();
    let _host = host::shared();
    let mut daemon = Daemon::start(lease(30)).await;
    let (stands, other) = (Site::new(&daemon, "stands").await, Site::new(&daemon, "other").await);
    stands.send("runs", "sleep 60");
    within("start", stands.session.started("runs")).await.expect("started");

    let _stopped = Stopped::new(stands.workspace.process_1);
    daemon.kill_runner();
    daemon.start_runner().await;

    let finished = within("other", other.session.bash("call", "echo here")).await.expect("an end");
    assert_eq!(finished.streams[&1].bytes, b"here\n");
    assert_lost(&daemon, &stands).await;
    end(daemon, &[&other.session]).await;
}

/// F-17: process 1 of one sandbox is stopped for longer than a runner waits for any answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes as long as a runner waits for an answer: half a minute"]
async fn process_1_that_stays_stopped_is_given_up_with_its_sandbox_and_with_nothing_else() {
    needs_root!();
    let _host = host::shared();
    let daemon = Daemon::start(lease(30)).await;
    let (stands, other) = (Site::new(&daemon, "stands").await, Site::new(&daemon, "other").await);
    stands.send("runs", "sleep 600");
    within("start", stands.session.started("runs")).await.expect("started");

    let _stopped = Stopped::new(stands.workspace.process_1);
    assert_lost(&daemon, &stands).await;

    let finished = within("other", other.session.bash("call", "echo here")).await.expect("an end");
    assert_eq!(finished.streams[&1].bytes, b"here\n");
    end(daemon, &[&other.session]).await;
}

/// The call is answered honestly, and its sandbox is gone.
async fn assert_lost(daemon: &Daemon, site: &Site) {
    let runs = within("runs", site.session.outcome("runs")).await.expect("an end");
    assert!(matches!(runs.message.outcome.and_then(|outcome| outcome.kind), Some(Kind::Indeterminate(_))));
    within("its end", site.session.over()).await.expect("an end");
    within("the end of its sandbox", async {
        while daemon.sandboxes().len() > 1 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    assert!(!site.workspace.lives());
}

/// F-21: nothing passes in either direction, for less than a lease.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn black_hole_that_is_shorter_than_the_lease_costs_neither_lease_nor_link() {
    needs_root!();
    let _host = host::shared();
    let daemon = Daemon::start(lease(8)).await;
    let site = Site::new(&daemon, "hole").await;
    site.send_two(&daemon).await;

    daemon.wire.hold_what_goes_to_the_runner();
    daemon.wire.keep_what_comes_from_the_runner();
    tokio::time::sleep(MOMENT).await;
    let (heartbeats, _) = daemon.orchestrator.heartbeats();
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(daemon.orchestrator.heartbeats().0, heartbeats, "something passed");
    assert_eq!(site.begun(), "ends\nwaits\n", "the lease holds, so what waits begins");
    daemon.wire.release();

    site.all_end(&["ends", "waits"]).await;
    assert!(!daemon.log().contains("lease lapsed"), "{}", daemon.end_of_log());
    assert_eq!(daemon.orchestrator.links(), 1);
    end(daemon, &[&site.session]).await;
}

/// F-25: 30 of 100 pieces are lost, the rest takes 300 ms and up to 200 ms more or less, each way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn delay_jitter_and_loss_cost_neither_lease_nor_link_nor_a_byte() {
    needs_root!();
    let _host = host::shared();
    let link = LinkSettings {
        lease_ttl: scaled(Duration::from_secs(12)),
        heartbeat_every: Duration::from_secs(2),
        ..LinkSettings::default()
    };
    let mut daemon = Daemon::install(Options { link, ..Options::default() }).await;
    let seed = seed();
    println!("SEED={seed}");
    daemon.wire.set_weather(Weather {
        delay: Duration::from_millis(300),
        jitter: Duration::from_millis(200),
        lost_percent: 30,
        seed,
    });
    daemon.start_launcher().await;
    daemon.start_runner().await;
    let (talks, asks) = (daemon.session("talks").await, daemon.session("asks").await);
    talks.send("talks", bash("for i in $(seq 10); do seq -f \"$i %06.0f\" 4000; sleep 1; done"));
    let (before, _) = daemon.orchestrator.heartbeats();

    for number in 0..5 {
        let id = format!("asks-{number}");
        let finished = within(&id, asks.bash(&id, &format!("echo {id} >> asked; echo {id}"))).await.expect("an end");
        assert_eq!(finished.streams[&1].bytes, format!("{id}\n").into_bytes());
    }
    let talked = within("talks", talks.outcome("talks")).await.expect("an end");
    let expected: String = (1..=10).flat_map(|i| (1..=4000).map(move |line| format!("{i} {line:06}\n"))).collect();
    assert!(
        talked.streams[&1].bytes == expected.into_bytes() && talked.streams[&1].holes.is_empty(),
        "output is wrong"
    );
    let asked = within("asked", asks.bash("asked", "cat asked")).await.expect("an end");
    assert_eq!(asked.streams[&1].bytes, b"asks-0\nasks-1\nasks-2\nasks-3\nasks-4\n");

    assert!(daemon.orchestrator.heartbeats().0 > before + 2, "no heartbeats");
    assert!(!daemon.log().contains("lease lapsed"), "{}", daemon.end_of_log());
    assert_eq!(daemon.orchestrator.links(), 1);
    end(daemon, &[&talks, &asks]).await;
}

/// F-24: what the runner says does not arrive, and it hears everything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runner_that_is_not_heard_begins_nothing_that_it_hears_after_its_lease() {
    needs_root!();
    let _host = host::shared();
    assert_one_way_loss_is_survived(|daemon| daemon.wire.keep_what_comes_from_the_runner()).await;
}

/// F-24: the runner is heard, and hears nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runner_that_hears_nothing_begins_nothing_after_its_lease_although_it_is_heard() {
    needs_root!();
    let _host = host::shared();
    assert_one_way_loss_is_survived(|daemon| daemon.wire.hold_what_goes_to_the_runner()).await;
}

async fn assert_one_way_loss_is_survived(lose: impl Fn(&Daemon)) {
    let daemon = Daemon::start(lease(2)).await;
    let site = Site::new(&daemon, "one-way").await;
    // It ends when the lease is over, so nothing behind it may begin.
    site.send("ends", "while [ ! -e stop ]; do sleep 0.05; done; echo end");
    site.send("waits", "echo end");
    within("start", site.session.started("ends")).await.expect("started");

    lose(&daemon);
    daemon.said("lease lapsed").await;
    site.send("sent", "echo end");
    let stop = format!("/proc/{}/root/workspace/stop", site.workspace.process_1);
    std::fs::write(stop, "").expect("its workspace");
    tokio::time::sleep(2 * MOMENT).await;
    assert_eq!(site.begun(), "ends\n", "a call began without a lease");
    daemon.wire.release();

    site.all_end(&["ends", "waits", "sent"]).await;
    end(daemon, &[&site.session]).await;
}

/// F-34: the sync of a start takes longer than the lease. A runner whose journal hangs does not renew, and when the sync is
/// done the gate stays shut.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sync_that_takes_longer_than_the_lease_costs_the_lease_and_the_call_begins_once_it_is_renewed() {
    needs_root!();
    let _host = host::shared();
    // A journal counts as hanging after five seconds, and the lease is longer on a slow machine.
    let sync = Duration::from_secs(7) + scaled(Duration::from_secs(2));
    let mut daemon = Daemon::install(lease(2)).await;
    daemon.crash_points = format!("started-sync/slow=delay:{}", sync.as_millis());
    daemon.start_launcher().await;
    daemon.start_runner().await;
    let site = Site::new(&daemon, "sync").await;

    site.send("slow", "echo end");
    daemon.said("crash point reached").await;
    let since = Instant::now();
    daemon.said("the journal hangs, the lease is not renewed").await;
    daemon.said("lease lapsed").await;
    daemon.wire.hold_what_goes_to_the_runner();
    tokio::time::sleep_until((since + sync + 2 * MOMENT).into()).await;
    assert_eq!(site.begun(), "", "a call began without a lease");
    daemon.wire.release();

    site.all_end(&["slow"]).await;
    end(daemon, &[&site.session]).await;
}
