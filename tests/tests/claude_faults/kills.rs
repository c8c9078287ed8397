//! The runner is killed at each step of a call and of a work item. The steps are those of `runner/src/crash_point.rs`, which
//! only a build with debug assertions has.

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use sandbox_runner_tests::claude::{Environment, Mock, ours};
use sandbox_runner_tests::daemon::Daemon;
use sandbox_runner_tests::runner::scaled;
use sandbox_runner_tests::{host, needs_root};
use serde_json::json;

use crate::{Ledger, control_plane};

/// Longer than any lease and any delivery without an acknowledgement, by the clock of the control plane.
const LEASE: Duration = Duration::from_secs(310);

/// Where runners end: the first one, and perhaps the one that comes after it.
#[derive(Debug, Clone, Copy)]
struct Row {
    first: &'static str,
    next: Option<&'static str>,
}

const fn at(first: &'static str) -> Row {
    Row { first, next: None }
}

/// Steps of a work item, and one of each record of a call.
const EVERY_DAY: &[Row] = &[
    at("delivered"),
    at("claimed"),
    at("leased"),
    at("post"),
    at("posted"),
    at("give-back"),
    at("given-back"),
    at("accepted-synced"),
    at("go"),
    at("gone"),
    at("finished-synced"),
    at("acknowledged"),
];

/// All the others; `@2` is the second of two calls, which waits while the first one runs.
const OTHERS: &[Row] = &[
    at("post@2"),
    at("posted@2"),
    at("arrived"),
    at("arrived@2"),
    at("accepted-write"),
    at("accepted-write@2"),
    at("accepted-sync"),
    at("accepted-synced@2"),
    at("started-write"),
    at("started-sync"),
    at("started-synced"),
    at("started-synced@2"),
    at("gated"),
    at("gated@2"),
    at("go@2"),
    at("gone@2"),
    at("ended"),
    at("ended@2"),
    at("finished-write"),
    at("finished-sync"),
    at("finished-synced@2"),
    at("acknowledged-write"),
    at("acknowledged-sync"),
    at("acknowledged-synced"),
    Row { first: "gone", next: Some("scanned") },
    Row { first: "gone", next: Some("restored") },
    Row { first: "gone", next: Some("attached") },
    Row { first: "gone", next: Some("delivered") },
    Row { first: "ended", next: Some("post") },
    Row { first: "post", next: Some("post") },
    Row { first: "post", next: Some("posted") },
    Row { first: "finished-synced", next: Some("leased") },
];

/// Installations that live through a part of the rows each, at the same time.
fn live_through(rows: &'static [Row], lanes: usize) {
    let _host = host::shared();
    std::thread::scope(|scope| {
        for lane in 0..lanes {
            scope.spawn(move || {
                let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
                runtime.expect("a runtime").block_on(async {
                    let (mock, environment) = control_plane(0).await;
                    let mut daemon = ours::install(&mock, &environment, false).await;
                    daemon.start_launcher().await;
                    for row in rows.iter().skip(lane).step_by(lanes) {
                        one(*row, &mut daemon, &mock, &environment).await;
                    }
                    daemon.end_with_nothing_left();
                });
            });
        }
    });
}

async fn one(row: Row, daemon: &mut Daemon, mock: &Mock, environment: &Environment) {
    let what = format!("killed at {} and {:?}", row.first, row.next);
    let file = "ledger";
    daemon.crash_points = format!("{}=end", row.first);
    daemon.spawn_runner();
    let ledger = Ledger::new(mock, environment, file);
    let names = ["first", "second"];
    let ids = ledger.call(&mut mock.lock(), &names);
    let gives_back = row.first.starts_with("give");
    if gives_back {
        ledger.assert_answered(&what, mock, &ids, &names).await;
        mock.lock().end_turn(&ledger.session, json!({"type": "end_turn"}));
    }
    ended(daemon, &what).await;
    mock.lock().pass(LEASE);
    if let Some(next) = row.next {
        daemon.crash_points = format!("{next}=end");
        daemon.spawn_runner();
        ended(daemon, &what).await;
        mock.lock().pass(LEASE);
    }
    daemon.crash_points.clear();
    daemon.spawn_runner();
    ledger.assert_answered(&what, mock, &ids, &names).await;
    if gives_back {
        mock.stopped(&ledger.session).await;
        // The next message finds everything as it was.
        mock.say(&ledger.session, "go on");
        let next = ledger.call(&mut mock.lock(), &["third"]);
        ledger.assert_answered(&what, mock, &next, &["third"]).await;
    }
    let effects = ours::read(daemon, file);
    assert_eq!(effects, if gives_back { "first\nsecond\nthird\n" } else { "first\nsecond\n" }, "{what}");
    let results = mock.lock().session(&ledger.session).events("user.tool_result").len();
    assert_eq!(results, effects.lines().count(), "{what}");
    mock.lock().terminate_session(&ledger.session);
    mock.stopped(&ledger.session).await;
    let gone = async {
        while !ours::read(daemon, file).is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(scaled(Duration::from_secs(30)), gone).await.expect("the sandbox of an ended session goes");
    assert!(mock.lock().breaches.is_empty(), "{what}: {:?}", mock.lock().breaches);
    assert!(!daemon.log().contains("a crash point makes no sense"), "{what}");
    let status = daemon.stop_runner();
    assert!(status.is_some_and(|status| status.success()), "{what}: {status:?}: {}", daemon.end_of_log());
}

async fn ended(daemon: &mut Daemon, what: &str) {
    let status = daemon.runner_to_its_end().await;
    assert_eq!(status.signal(), Some(9), "{what}: {}", daemon.end_of_log());
}

#[test]
fn call_runs_once_and_is_answered_though_the_runner_is_killed_at_a_step_of_it_or_of_its_item() {
    needs_root!();
    live_through(EVERY_DAY, 3);
}

#[test]
#[ignore = "takes minutes, because each runner measures its isolation"]
fn call_runs_once_and_is_answered_though_the_runner_is_killed_at_any_step_of_it_or_of_its_item() {
    needs_root!();
    live_through(EVERY_DAY, 2);
    live_through(OTHERS, 2);
}
