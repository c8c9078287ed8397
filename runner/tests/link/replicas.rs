//! Another orchestrator takes over, an old one wakes, and one has forgotten the latest of what it knew: none of it ends or
//! repeats anybody's work.

use std::sync::atomic::Ordering;
use std::time::Duration;

use proto::runner::v1 as pb;
use proto::runner::v1::orchestrator_frame::Body;
use proto::runner::v1::outcome::Kind;
use proto::runner::v1::runner_frame::Body as Said;
use runner::dev::LinkSettings;

use crate::fake::bytes_of;
use crate::scripted::{self, Orders, Script, bash, frame, welcome};
use crate::world::{Options, World, within};

/// F-27: a replica with a higher term goes on with what is stored, in the middle of output and with a call that waits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replica_that_takes_over_in_the_middle_of_output_goes_on_with_the_same_placement_and_loses_no_byte() {
    let link = LinkSettings { window: 64 * 1024, ..LinkSettings::default() };
    let world = World::new(Options { link, ..Options::default() }).await;
    let session = within("session", world.session("s")).await;
    let epoch = session.epoch;
    session.send("talks", input(&format!("{}exit 0", "print 200000; pause 30; ".repeat(10))));
    session.send("waits", input("print 100"));
    let first_term = world.orchestrator.term();
    for round in 1..=3 {
        within("output", async {
            let mut seen = world.orchestrator.watch();
            while !matches!(seen.recv().await, Ok(runner::dev::Link::Output(_))) {}
        })
        .await;

        world.orchestrator.fail_over();

        let hello = within("runner", world.orchestrator.runner()).await.unwrap();
        assert_eq!((world.orchestrator.term(), hello.highest_term), (first_term + round, first_term + round - 1));
    }
    for (call_id, size) in [("talks", 2_000_000), ("waits", 100)] {
        let finished = within(call_id, session.outcome(call_id)).await.unwrap();
        assert!(finished.streams[&1].bytes == bytes_of(call_id, size), "output of {call_id} differs");
        assert_eq!((finished.message.epoch, world.fakes.executions_of(call_id)), (epoch, 1), "{call_id}");
    }
    assert_eq!(world.orchestrator.complaints(), Vec::<String>::new());
}

fn input(command: &str) -> pb::call::Input {
    pb::call::Input::Bash(pb::BashInput { command: Some(command.to_owned()), ..Default::default() })
}

/// Everything that an orchestrator could do to a session.
fn orders() -> Orders {
    let (session_id, epoch) = ("s".to_owned(), 9);
    let mode = pb::CancelMode::Kill.into();
    let cancel = pb::CancelCall { call_id: "runs".into(), session_id: session_id.clone(), epoch: 1, mode };
    let close = pb::CloseSession { session_id: session_id.clone(), epoch, grace: None };
    let open = pb::OpenSession { session_id: "other".into(), epoch, ..Default::default() };
    let ack = pb::EventAck { through_event_seq: 1_000 };
    let drain = pb::Drain { mode: pb::DrainMode::Now.into(), ..Default::default() };
    vec![
        (15, Body::Call(bash("stale", "exit 0"))),
        (16, Body::CancelCall(cancel)),
        (13, Body::OpenSession(open)),
        (17, Body::EventAck(ack)),
        (20, Body::Drain(drain)),
        (14, Body::CloseSession(close)),
    ]
}

/// F-28: an old replica wakes, is dialled, and sends all that it can behind its welcome.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_that_a_replica_of_an_older_term_sends_is_obeyed() {
    let script = Script::answering([
        (welcome(5), Vec::new()),
        (welcome(3), orders()),
        (welcome(4), orders()),
        (welcome(6), Vec::new()),
    ]);
    let mut world = scripted::World::with(Options::default(), script).await;
    world.open().await;
    let call = bash("runs", "print 70000; hang");
    world.send(|number| frame(number, 15, Body::Call(call)));
    world.hears("its start", |said| matches!(said, Said::CallStarted(_)).then_some(())).await;

    // What ends the link is of no importance.
    world.send(|_| vec![0xff; 64]);

    for _ in 0..3 {
        let term = world
            .hears("a greeting", |said| if let Said::Hello(hello) = said { Some(hello.highest_term) } else { None });
        assert_eq!(term.await, 5, "an older replica has changed what is obeyed");
    }
    world.hears("a heartbeat", |said| matches!(said, Said::Heartbeat(_)).then_some(())).await;
    let fakes = &world.runner.fakes;
    assert_eq!((fakes.executions_of("stale"), fakes.executions_of("runs")), (0, 1));
    assert_eq!((fakes.created.load(Ordering::SeqCst), fakes.closed.load(Ordering::SeqCst)), (1, 0));
    // The one that serves is obeyed, and hears of the end that nobody has acknowledged.
    let mode = pb::CancelMode::Kill.into();
    let cancel = pb::CancelCall { call_id: "runs".into(), session_id: "s".into(), epoch: 1, mode };
    world.send(|number| frame(number, 16, Body::CancelCall(cancel)));
    let end = world.hears("its end", |said| if let Said::CallFinished(end) = said { Some(end) } else { None }).await;
    assert!(matches!(end.outcome.unwrap().kind, Some(Kind::Cancelled(_))));
}

/// F-29: what was stored is set back by some sessions, calls, acknowledgements and a term.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orchestrator_that_has_lost_its_latest_data_adopts_what_the_runner_knows_and_ends_nothing() {
    let world = World::new(Options::default()).await;
    let orchestrator = &world.orchestrator;
    let known = within("session", world.session("known")).await;
    known.send("runs", input("print 70000; hang"));
    known.send("over", input("print 10"));
    within("start", known.started("runs")).await.unwrap();
    within("acceptance", async {
        while orchestrator.waiting().is_empty() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    let backup = orchestrator.backup();

    orchestrator.fail_over();
    within("runner", orchestrator.runner()).await.unwrap();
    known.cancel("runs", pb::CancelMode::Interrupt);
    within("over", known.outcome("over")).await.unwrap();
    within("one that is forgotten", known.bash("forgotten", "print 5")).await.unwrap();
    let unknown = within("session", world.session("unknown")).await;
    unknown.send("goes-on", input("print 70000; pause 600; print 5"));
    unknown.send("waits", input("print 5"));
    within("start", unknown.started("goes-on")).await.unwrap();
    let (epoch, term) = (unknown.epoch, orchestrator.term());
    within("acknowledgement", async {
        let over = |call_id: &str| ["runs", "over", "forgotten"].contains(&call_id);
        loop {
            let view = world.sessions.view().await.unwrap();
            let mut calls = view.sessions.iter().flat_map(|session| &session.calls);
            if !calls.any(|call| over(call.request.call_id.as_str())) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;

    orchestrator.restore(backup);

    within("runner", orchestrator.runner()).await.unwrap();
    assert_eq!(orchestrator.strangers(), ["unknown"]);
    assert!(orchestrator.term() > term, "a term was given twice");
    // What ended meanwhile is not run again; how it ended nobody knows any more.
    for call_id in ["runs", "over"] {
        let finished = within(call_id, known.outcome(call_id)).await.unwrap();
        assert!(matches!(finished.message.outcome.unwrap().kind, Some(Kind::Indeterminate(_))), "{call_id}");
        assert_eq!(world.fakes.executions_of(call_id), 1, "{call_id}");
    }
    // The session that nobody knows is suspended: what runs goes on, and what waits does not begin.
    let ended = within("goes-on", unknown.ended("goes-on")).await.unwrap();
    assert!(matches!(ended.outcome.unwrap().kind, Some(Kind::Exited(_))));
    within("a call of the other session", known.bash("after", "print 5")).await.unwrap();
    assert_eq!((world.fakes.executions_of("waits"), world.fakes.closed.load(Ordering::SeqCst)), (0, 0));

    let adopted = orchestrator.adopt("unknown").unwrap();

    assert_eq!(adopted.epoch, epoch);
    within("waits", adopted.outcome("waits")).await.unwrap();
    let next = within("session", world.session("next")).await;
    assert!(next.epoch > epoch, "a placement was given twice");
    for call_id in ["goes-on", "waits", "forgotten"] {
        assert_eq!(world.fakes.executions_of(call_id), 1, "{call_id}");
    }
    assert_eq!(orchestrator.complaints(), Vec::<String>::new());
}
