//! What goes wrong between the daemon and a control plane, each fault with a control plane of its own, all served by one daemon.

use std::time::Duration;

use sandbox_runner_tests::claude::{
    Breach, ControlPlane, Endpoint, Environment, Fate, Fault, How, Mock, Recorded, Wire, ours,
};
use sandbox_runner_tests::daemon::{Daemon, within};
use sandbox_runner_tests::runner::scaled;
use sandbox_runner_tests::{host, needs_root};
use serde_json::json;

use crate::{Ledger, control_plane, counted};

/// A fault, by name; prepared before the daemon asks for work.
struct Row {
    name: &'static str,
    ttl_seconds: u64,
    prepare: fn(&mut ControlPlane),
    /// What happens while the first call runs.
    meanwhile: Meanwhile,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meanwhile {
    Nothing,
    /// The token of the item is accepted no longer.
    RevokeTokens,
    /// The server is away for two seconds.
    Restart,
    /// The second call is cut off in its frame.
    CutFrame,
}

fn none(_: &mut ControlPlane) {}

fn lose(plane: &mut ControlPlane, endpoint: Endpoint, times: u32, how: How) {
    plane.faults.push(Fault::times(endpoint, times, how));
}

/// Everything is refused twice, and asks for a second of rest; the queue once, because the rest after it grows fast.
fn storm(plane: &mut ControlPlane) {
    for endpoint in [
        Endpoint::Poll,
        Endpoint::Ack,
        Endpoint::Heartbeat,
        Endpoint::GetSession,
        Endpoint::StreamEvents,
        Endpoint::ListEvents,
        Endpoint::SendEvents,
        Endpoint::Stop,
    ] {
        let times = if endpoint == Endpoint::Poll { 1 } else { 2 };
        plane.faults.push(Fault::times(endpoint, times, How::StatusRetryAfter(429, 1)));
    }
}

const fn row(name: &'static str, prepare: fn(&mut ControlPlane)) -> Row {
    Row { name, ttl_seconds: 3, prepare, meanwhile: Meanwhile::Nothing }
}

const fn during(name: &'static str, meanwhile: Meanwhile) -> Row {
    Row { name, ttl_seconds: 3, prepare: none, meanwhile }
}

const ROWS: &[Row] = &[
    row("acknowledgement lost after its effect", |plane| lose(plane, Endpoint::Ack, 1, How::LoseResponse)),
    row("acknowledgement lost before its effect", |plane| lose(plane, Endpoint::Ack, 1, How::LoseRequest)),
    row("first heartbeat lost after its effect", |plane| lose(plane, Endpoint::Heartbeat, 1, How::LoseResponse)),
    row("first heartbeat lost before its effect", |plane| lose(plane, Endpoint::Heartbeat, 1, How::LoseRequest)),
    row("result lost after its effect", |plane| lose(plane, Endpoint::SendEvents, 2, How::LoseResponse)),
    row("result applied and answered with 500", |plane| {
        lose(plane, Endpoint::SendEvents, 2, How::StatusAfterEffect(500))
    }),
    row("result lost before its effect", |plane| lose(plane, Endpoint::SendEvents, 2, How::LoseRequest)),
    row("item delivered again and again", |plane| plane.duplicate_deliveries = 5),
    Row { ttl_seconds: 20, ..row("everything refused with 429", storm) },
    during("token rejected", Meanwhile::RevokeTokens),
    Row { ttl_seconds: 10, ..during("server restarted", Meanwhile::Restart) },
    during("stream cut within a frame", Meanwhile::CutFrame),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn call_runs_once_and_is_answered_whatever_is_lost_on_the_wire() {
    needs_root!();
    let _host = host::shared();
    let mut planes = Vec::new();
    for (number, row) in ROWS.iter().enumerate() {
        let (mock, environment) = control_plane(number).await;
        mock.lock().settings.ttl_seconds = scaled(Duration::from_secs(row.ttl_seconds)).as_secs();
        (row.prepare)(&mut mock.lock());
        planes.push((mock, environment));
    }
    let queues: Vec<_> = planes.iter().map(|(mock, environment)| (mock, environment)).collect();
    let mut daemon = ours::install_for(&queues, false).await;
    daemon.start_launcher().await;
    daemon.tend_runner();
    let served = std::thread::scope(|scope| {
        let daemon = &daemon;
        let threads = ROWS.iter().zip(planes).map(|(row, (mock, environment))| {
            let runtime = tokio::runtime::Handle::current();
            scope.spawn(move || runtime.block_on(live_through(row, mock, &environment, daemon)))
        });
        let threads: Vec<_> = threads.collect();
        threads.into_iter().map(|thread| thread.join().is_ok()).collect::<Vec<_>>()
    });
    let failed: Vec<_> = ROWS.iter().zip(served).filter(|(_, ok)| !ok).map(|(row, _)| row.name).collect();
    assert!(failed.is_empty(), "{failed:?}: {}", daemon.end_of_log());
    daemon.end_with_nothing_left();
}

async fn live_through(row: &Row, mut mock: Mock, environment: &Environment, daemon: &Daemon) {
    let what = row.name;
    let file = format!("ledger-{}", environment.id);
    let ledger = Ledger::new(&mock, environment, &file);
    let names = ["first", "second"];
    // Long enough for whatever happens meanwhile.
    let first = counted(&file, "first", 1.0);
    let mut ids = mock.lock().call_tools(&ledger.session, vec![first]);
    let begun = async {
        while ours::read(daemon, &file).is_empty() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    within(what, begun).await;
    let mut second = counted(&file, "second", 0.1);
    match row.meanwhile {
        Meanwhile::Nothing => {}
        Meanwhile::RevokeTokens => {
            let item = mock.lock().live_item(&ledger.session).expect("an item").id.clone();
            mock.lock().revoke_tokens(&item);
        }
        Meanwhile::Restart => {
            mock.halt().await;
            tokio::time::sleep(Duration::from_secs(2)).await;
            mock.resume().await;
        }
        Meanwhile::CutFrame => second = second.over(Wire::CutAfter(30)),
    }
    ids.extend(mock.lock().call_tools(&ledger.session, vec![second]));
    let effects = if row.meanwhile == Meanwhile::RevokeTokens {
        // A heartbeat that is refused ends what runs and what waits, and the answers say so. They come with the next token.
        for (id, name) in ids.iter().zip(&names) {
            let (result, said) = (mock.result_of(&ledger.session, id).await, format!("said by {name}"));
            assert_eq!(result.is_error, result.text() != said, "{what}: {result:?}");
        }
        let second = mock.result_of(&ledger.session, &ids[1]).await.text();
        if second.ends_with("nothing was run") { "first\n" } else { "first\nsecond\n" }
    } else {
        ledger.assert_answered(what, &mock, &ids, &names).await;
        "first\nsecond\n"
    };
    assert_eq!(ours::read(daemon, &file), effects, "{what}");
    mock.lock().end_turn(&ledger.session, json!({"type": "end_turn"}));
    mock.stopped(&ledger.session).await;
    let plane = mock.lock();
    // Whoever cannot know whether a result has arrived sends it again.
    let mut posts = plane.record.iter().filter(|request| request.endpoint == Some(Endpoint::SendEvents));
    let may_repeat = posts.any(has_lost_its_answer);
    let breaches =
        plane.breaches.iter().filter(|breach| !(may_repeat && matches!(breach, Breach::SecondResult { .. })));
    assert_eq!(breaches.collect::<Vec<_>>(), Vec::<&Breach>::new(), "{what}");
    assert_eq!(plane.session(&ledger.session).events("user.tool_result").len(), 2, "{what}");
    assert!(plane.faults.is_empty(), "{what}: {:?}", plane.faults);
}

/// Whether the answer to a request that had its effect was lost.
fn has_lost_its_answer(request: &Recorded) -> bool {
    matches!(request.fate, Fate::ResponseLost | Fate::Answered(500))
}
