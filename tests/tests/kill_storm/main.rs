//! Runner, launcher, its background process, process 1, spawner and workload are killed at random moments under load.
//!
//! Whatever was killed: every call gets exactly one outcome, what is said about it agrees with the ledger of what has begun,
//! no byte is missing that is not declared, a sandbox is lost only when it was attacked itself, the next session works, and
//! at the end nothing is on the host that was not there before. `SEED` and `KILLS` repeat a run or make it larger.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "the figures of a run belong into its log")]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

mod account;
mod load;
mod victims;

use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::runner::v1 as pb;
use runner::dev::LinkSettings;
use sandbox_runner_tests::daemon::{Daemon, Options, PATIENCE, bash, number, seed, small_sandboxes, within};
use sandbox_runner_tests::host::{self, Snapshot};
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::runner::scaled;

use account::{Account, Breach, Verdict};
use victims::{Killer, Victim};

/// Sessions side by side.
const DRIVERS: u64 = 5;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_kill_repeats_a_call_or_leaves_anything() {
    needs_root!();
    storm(30).await;
}

/// F-13: random kill -9 of every process there is, in load.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes half an hour"]
async fn two_thousand_kills_repeat_no_call_lose_no_outcome_and_no_byte_and_leave_nothing() {
    needs_root!();
    storm(number("KILLS", 2000)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_and_sessions_go_on_when_the_launcher_is_killed() {
    needs_root!();
    let _host = host::shared();
    let mut daemon = Daemon::start(Options::default()).await;
    let session = daemon.session("goes-on").await;
    session.send("running", bash("export KEPT=yes; echo before; sleep 1; echo after"));
    within("start", session.started("running")).await.expect("started");

    daemon.replace_launcher_by_force().await;

    let finished = within("running", session.outcome("running")).await.expect("an end");
    assert_eq!(finished.streams[&1].bytes, b"before\nafter\n");
    let next = within("next", session.bash("next", "echo $KEPT")).await.expect("an end");
    assert_eq!(next.streams[&1].bytes, b"yes\n");
    let other = daemon.session("new").await;
    assert_eq!(daemon.sandboxes().len(), 2);
    for session in [session, other] {
        within("close", session.close(Duration::ZERO)).await.expect("the session ends");
    }
    assert_eq!(daemon.sandboxes(), Vec::<String>::new());
    daemon.end_with_nothing_left();
}

async fn storm(kills: u64) {
    let _host = host::exclusive();
    let foreign = host::launcher_groups();
    let mut before = Snapshot::take_beside(&[], foreign.clone());
    let namespaces = host::namespaces(&foreign);
    let (seed, begin) = (seed(), Instant::now());
    println!("seed {seed}: {kills} kills");
    let link = LinkSettings { heartbeat_every: Duration::from_millis(500), ..LinkSettings::default() };
    let slots = u32::try_from(2 * DRIVERS + 2).expect("few sessions");
    let mut daemon = Daemon::start(Options { slots, link, limits: small_sandboxes(), ..Options::default() }).await;
    let account = Arc::new(Account::new());
    let drivers: Vec<_> = (0..DRIVERS)
        .map(|driver| tokio::spawn(load::drive(Arc::clone(&daemon.orchestrator), Arc::clone(&account), driver, seed)))
        .collect();

    let mut killer = Killer::new(&mut daemon, &account, seed);
    killer.kill(kills).await;
    account.end();
    for driver in drivers {
        while !driver.is_finished() {
            killer.tend().await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        driver.await.expect("no panic");
    }
    assert_works(&mut daemon).await;
    for sandbox_id in leaked(&daemon).await {
        account.breach(Breach::LeakedSandbox, sandbox_id);
    }
    let late_runners = daemon.orchestrator.late_runners();
    println!("seed {seed}: {:?}, {} starts\n{}", begin.elapsed(), daemon.restarts, account.summary(late_runners));
    account.assert_kept();
    assert_eq!(daemon.orchestrator.complaints(), Vec::<String>::new());
    let figures = account.figures().clone();
    assert_eq!(figures.killed.len(), Victim::KINDS, "somebody was never killed");
    assert!(figures.verdicts.get(&Verdict::Completed).is_some_and(|count| *count > kills), "too few calls");
    assert!(figures.counted > kills, "too few calls were counted");
    assert!(figures.bytes_checked > 0, "no output was compared");
    assert!(figures.ended_alone > 0, "no call ended without a runner");
    assert!(late_runners > 0, "no runner was heard after its successor");

    drop(account);
    let ours = daemon.group();
    daemon.end_with_nothing_left();
    drop(daemon);
    let mut others = host::launcher_groups();
    others.remove(&ours);
    before.leave_out(others.clone());
    host::assert_restored(&before, &[], PATIENCE);
    // A namespace is gone when its last process has been reaped, which may be a moment later.
    let begin = Instant::now();
    loop {
        let left: Vec<_> = host::namespaces(&others).difference(&namespaces).cloned().collect();
        if left.is_empty() {
            return;
        }
        assert!(begin.elapsed() < scaled(PATIENCE), "namespaces are left: {left:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// After all of it a new session works.
async fn assert_works(daemon: &mut Daemon) {
    let mut attempts = 0;
    let session = loop {
        // Who was killed last may still be about to end, and is started again then; a session may begin before that.
        daemon.tend().await;
        attempts += 1;
        let request = pb::OpenSession { session_id: format!("afterwards-{attempts}"), ..Default::default() };
        let error = match within("session", daemon.orchestrator.open_session(request)).await {
            Ok(session) => match within("last call", session.bash(&format!("last-{attempts}"), "echo alive")).await {
                Ok(finished) if finished.streams.get(&1).is_some_and(|stream| stream.bytes == b"alive\n") => {
                    break session;
                }
                Ok(finished) => format!("{:?}", finished.message.outcome),
                Err(error) => error.to_string(),
            },
            Err(error) => error.to_string(),
        };
        assert!(attempts < 5, "{error}: {}", daemon.end_of_log());
    };
    within("close", session.close(Duration::ZERO)).await.expect("the session ends");
}

/// Sandboxes that are left when there was time enough to remove them.
async fn leaked(daemon: &Daemon) -> Vec<String> {
    let begin = Instant::now();
    loop {
        let left = daemon.sandboxes();
        if left.is_empty() || begin.elapsed() > scaled(PATIENCE) {
            return left;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
