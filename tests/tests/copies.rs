//! More than one runner for one name or one session: a copied state, a state set back, a session placed elsewhere by force, a
//! certificate that was revoked. What must not serve does not, and says so; nothing runs twice.
//!
//! Built daemons beside launchers of their own, real sandboxes, and the orchestrator that checks every frame.
#![forbid(unsafe_code)]
#![allow(clippy::await_holding_lock, reason = "a test that needs the host alone keeps it to its end")]

use std::fs;
use std::time::Duration;

use proto::runner::v1 as pb;
use proto::runner::v1::outcome::Kind;
use runner::dev::{Denied, LinkSettings, Session};
use sandbox_runner_tests::daemon::{Daemon, Options, bash, copy_directory, within};
use sandbox_runner_tests::host;
use sandbox_runner_tests::needs_root;
use sandbox_runner_tests::runner::scaled;

async fn printed(session: &Session, call_id: &str, command: &str) -> String {
    let finished = within(call_id, session.bash(call_id, command)).await.expect("an end");
    String::from_utf8_lossy(finished.streams.get(&1).map_or(&[][..], |stream| &stream.bytes)).trim().to_owned()
}

fn short_lease() -> LinkSettings {
    let lease_ttl = scaled(Duration::from_secs(2));
    LinkSettings { lease_ttl, heartbeat_every: Duration::from_millis(300), ..LinkSettings::default() }
}

/// Waits until the launcher holds no sandbox.
async fn no_sandbox_is_left(daemon: &Daemon) {
    within("the end of its sandboxes", async {
        while !daemon.sandboxes().is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

/// F-44: a second machine with a copy of the disk of the first one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn runner_with_a_copied_state_directory_is_refused_and_the_first_one_does_not_notice() {
    needs_root!();
    let _host = host::shared();
    let mut daemon = Daemon::start(Options::default()).await;
    let session = daemon.session("original").await;
    assert_eq!(printed(&session, "before", "echo begun >> /workspace/count").await, "");
    let mut copy = daemon.copy(Options::default()).await;
    session.send("runs", bash("echo runs >> /workspace/count; sleep 2; echo end"));
    within("start", session.started("runs")).await.expect("started");

    copy.start_launcher().await;
    copy.spawn_runner();
    copy.said("the orchestrator refuses this runner").await;

    assert!(copy.log().contains("STATE_ROLLED_BACK") && copy.log().contains("put the newest state directory back"));
    assert!(copy.runner_is_alive(), "a runner that ends would be started again and again");
    let runs = within("runs", session.outcome("runs")).await.expect("an end");
    assert_eq!(runs.streams[&1].bytes, b"end\n");
    assert_eq!(printed(&session, "count", "cat /workspace/count").await, "begun\nruns");
    assert_eq!((daemon.orchestrator.links(), daemon.orchestrator.refused_links().len()), (1, 1));
    within("close", session.close(Duration::ZERO)).await.expect("the session ends");
    assert_eq!(daemon.orchestrator.complaints(), Vec::<String>::new());
    // It would wait for somebody to whom it can tell that its sandbox is not there.
    copy.kill_runner();
    copy.end_with_nothing_left();
    daemon.end_with_nothing_left();
}

/// F-66: the disk is set back to what it was an hour ago, and later the right one is put back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn state_that_was_set_back_is_refused_and_what_had_begun_is_not_begun_again() {
    needs_root!();
    let _host = host::shared();
    let mut daemon = Daemon::start(Options::default()).await;
    let [state, _] = daemon.directories();
    let session = daemon.session("kept").await;
    assert_eq!(printed(&session, "before", "echo begun >> /workspace/count").await, "");
    let (journal, old, new) = (state.join("journal"), state.join("journal-old"), state.join("journal-new"));
    for directory in [&old, &new] {
        fs::create_dir(directory).expect("a directory of our own");
    }
    copy_directory(&journal, &old);
    session.send("after", bash("echo after >> /workspace/count; sleep 60"));
    within("start", session.started("after")).await.expect("started");
    daemon.kill_runner();
    copy_directory(&journal, &new);
    let links = daemon.orchestrator.links();

    put_in_place(&old, &journal);
    daemon.spawn_runner();
    daemon.said("the orchestrator refuses this runner").await;

    let refused = daemon.orchestrator.refused_links();
    assert!(refused[0].contains("STATE_ROLLED_BACK") && refused[0].contains("call after was accepted"), "{refused:?}");
    assert!(daemon.runner_is_alive(), "a runner that ends would be started again and again");
    assert_eq!(daemon.orchestrator.links(), links);

    daemon.kill_runner();
    put_in_place(&new, &journal);
    daemon.start_runner().await;
    let after = within("after", session.outcome("after")).await.expect("an end");
    let kind = after.message.outcome.and_then(|outcome| outcome.kind);
    assert!(matches!(kind, Some(Kind::Indeterminate(_) | Kind::Cancelled(_) | Kind::Signaled(_))), "{kind:?}");
    assert_eq!(printed(&session, "count", "cat /workspace/count").await, "begun\nafter");
    within("close", session.close(Duration::ZERO)).await.expect("the session ends");
    for directory in [&old, &new] {
        fs::remove_dir_all(directory).expect("a directory of our own");
    }
    daemon.end_with_nothing_left();
}

/// The files of `from` instead of those of `to`.
fn put_in_place(from: &std::path::Path, to: &std::path::Path) {
    for path in host::files_below(to).into_iter().filter(|path| path.is_file()) {
        fs::remove_file(path).expect("a file of our own");
    }
    copy_directory(from, to);
}

/// F-45: the first runner is cut off, and nobody waits for the end of its lease.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn session_that_was_placed_elsewhere_by_force_is_ended_where_it_was_and_its_late_results_do_not_count() {
    needs_root!();
    let _host = host::shared();
    let mut first = Daemon::start(Options::default()).await;
    let mut second = Daemon::start(Options::default()).await;
    let before = first.session("moved").await;
    before.send("runs", bash("echo runs >> /workspace/count; sleep 600.45"));
    before.send("waits", bash("echo waits >> /workspace/count"));
    within("start", before.started("runs")).await.expect("started");
    first.wire.hold_what_goes_to_the_runner();
    first.wire.keep_what_comes_from_the_runner();

    first.orchestrator.place_elsewhere("moved");
    let after = second.session("moved").await;
    assert_eq!(printed(&after, "runs", "echo elsewhere").await, "elsewhere");
    assert_eq!(first.sandboxes().len(), 1, "nobody could tell it yet");
    first.wire.release();

    no_sandbox_is_left(&first).await;
    assert_eq!(host::processes_with("600.45"), Vec::<u32>::new());
    assert_eq!(within("its end", before.over()).await.expect("an end").reason(), pb::SessionEndReason::Fenced);
    within("late results", async {
        while first.orchestrator.superseded().len() < 2 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let late = within("late", before.outcome("runs")).await.expect_err("it does not count").to_string();
    assert!(late.contains("was placed elsewhere"), "{late}");
    assert_eq!(printed(&after, "next", "echo still here").await, "still here");
    within("close", after.close(Duration::ZERO)).await.expect("the session ends");
    for daemon in [&mut first, &mut second] {
        assert_eq!(daemon.orchestrator.complaints(), Vec::<String>::new());
        daemon.end_with_nothing_left();
    }
}

/// F-58: revoked while a command runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn revoked_runner_says_so_stays_and_its_sandboxes_end_with_their_orphan_time() {
    needs_root!();
    let _host = host::shared();
    let mut daemon = Daemon::start(Options { link: short_lease(), ..Options::default() }).await;
    let orphan_ttl = Some(prost_types::Duration { seconds: 1, nanos: 0 });
    let request = pb::OpenSession { session_id: "revoked".into(), orphan_ttl, ..Default::default() };
    let session = within("session", daemon.orchestrator.open_session(request)).await.expect("opened");
    session.send("runs", bash("sleep 600.58"));
    within("start", session.started("runs")).await.expect("started");

    daemon.orchestrator.deny(Denied::Name("runner-1".into()));
    daemon.said("the orchestrator refuses this runner").await;

    assert!(
        daemon.log().contains("CERT_REVOKED") && daemon.log().contains("every certificate of runner-1 was revoked")
    );
    assert_eq!(daemon.sandboxes().len(), 1, "what runs is not ended at once");
    no_sandbox_is_left(&daemon).await;
    assert_eq!(host::processes_with("600.58"), Vec::<u32>::new());
    assert!(daemon.runner_is_alive(), "a runner that ends would be started again and again");
    assert_eq!((daemon.orchestrator.links(), daemon.orchestrator.refused_links().len()), (1, 0), "it asks too often");
    // It would wait for somebody to whom it can tell how its call has ended.
    daemon.kill_runner();
    daemon.end_with_nothing_left();
}
