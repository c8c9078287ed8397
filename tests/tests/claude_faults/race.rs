//! Two workers and one item: both have it delivered, and one of them serves it.

use sandbox_runner_tests::claude::official::Worker;
use sandbox_runner_tests::claude::{ControlPlane, Fate, Mock, NewSession, ToolUse, ours};
use sandbox_runner_tests::daemon::Daemon;
use sandbox_runner_tests::{host, needs_official_sdk, needs_root};
use serde_json::json;

/// An item is delivered to both workers; the call must run once, wherever `effects` sees it, and have one answer.
async fn race(mock: &Mock, environment_id: &str, effects: impl Fn() -> String) {
    mock.until("two workers that ask at once", |plane| (plane.asking() == 2).then_some(())).await;
    mock.lock().duplicate_deliveries = 1;
    let session = mock.lock().create_session(environment_id, NewSession::default()).expect("a session");
    let command = ToolUse::bash("echo ran >> ledger; sleep 1; echo done");
    let id = mock.lock().call_tools(&session, vec![command]).remove(0);
    assert_eq!(mock.result_of(&session, &id).await.text(), "done");
    let refused = |plane: &ControlPlane| {
        plane.record.iter().any(|one| matches!(one.fate, Fate::Answered(409 | 412))).then_some(())
    };
    mock.until("a worker that is refused", refused).await;
    assert_eq!(effects(), "ran\n");
    mock.lock().end_turn(&session, json!({"type": "end_turn"}));
    mock.stopped(&session).await;
    let plane = mock.lock();
    assert_eq!(plane.work[0].deliveries, 2);
    assert_eq!(plane.session(&session).events("user.tool_result").len(), 1);
    assert!(plane.breaches.is_empty(), "{:?}", plane.breaches);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_daemons_that_are_given_one_item_one_serves_it() {
    needs_root!();
    let _host = host::shared();
    let mock = Mock::start().await;
    let environment = mock.lock().create_environment("test").expect("an environment");
    let mut daemons: Vec<Daemon> = Vec::new();
    for _ in 0..2 {
        daemons.push(ours::start(&mock, &environment).await);
    }
    let effects = || daemons.iter().map(|daemon| ours::read(daemon, "ledger")).collect();
    race(&mock, &environment.id, effects).await;
    for daemon in &mut daemons {
        daemon.end_with_nothing_left();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_our_daemon_and_the_official_worker_that_are_given_one_item_one_serves_it() {
    let python = needs_official_sdk!();
    needs_root!();
    let _host = host::shared();
    let mock = Mock::start().await;
    let environment = mock.lock().create_environment("test").expect("an environment");
    let official = Worker::start(&python, &mock, &environment, 1.0);
    let mut daemon = ours::start(&mock, &environment).await;
    let effects = || {
        let theirs = std::fs::read_to_string(official.workdir().join("ledger")).unwrap_or_default();
        theirs + &ours::read(&daemon, "ledger")
    };
    race(&mock, &environment.id, effects).await;
    daemon.end_with_nothing_left();
}
