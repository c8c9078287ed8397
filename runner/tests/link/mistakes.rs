//! Mistakes of an orchestrator: each is answered with the field and the fix, and the link goes on.

use proto::runner::v1 as pb;
use proto::runner::v1::orchestrator_frame::Body;
use runner::dev::DevError;

use crate::world::{Options, World, within};

fn call(call_id: &str, session_id: &str, command: &str) -> pb::Call {
    let input = pb::BashInput { command: Some(command.into()), ..Default::default() };
    pb::Call {
        call_id: call_id.into(),
        session_id: session_id.into(),
        epoch: 1,
        input: Some(pb::call::Input::Bash(input)),
        ..Default::default()
    }
}

async fn refusal_of(world: &World, body: Body) -> pb::RequestRefused {
    world.orchestrator.send_raw(body);
    within("refusal", world.orchestrator.refusal()).await.unwrap()
}

#[tokio::test]
async fn every_mistake_is_answered_and_the_link_goes_on() {
    let world = World::new(Options::default()).await;
    let session = within("session", world.session("s")).await;
    within("first", session.bash("used", "exit 0")).await.unwrap();
    let stale = pb::Call { epoch: 9, ..call("c2", "s", "exit 0") };
    let nul = call("c4", "s", "a\0b");
    let huge = call("c5", "s", &"x".repeat(300_000));
    let oversized = call("c6", "s", &"x".repeat(2 * 1024 * 1024));
    let mode =
        pb::Call { output: Some(pb::OutputPolicy { mode: 99, ..Default::default() }), ..call("c7", "s", "exit 0") };
    let empty = pb::Call { input: None, ..call("c8", "s", "") };
    let nameless = call("", "s", "exit 0");
    let cases = [
        (Body::Call(call("c1", "nowhere", "exit 0")), "c1", "SESSION_UNKNOWN", "session_id: session nowhere"),
        (Body::Call(stale), "c2", "STALE_EPOCH", "epoch: 9"),
        (Body::Call(nul), "c4", "INVALID_FIELD", "bash.command: contains a NUL"),
        (Body::Call(huge), "c5", "TOO_LARGE", "bash input has 300000 bytes"),
        (Body::Call(oversized), "c6", "TOO_LARGE", "the frame has 20971"),
        (Body::Call(mode), "c7", "INVALID_FIELD", "output.mode: 99"),
        (Body::Call(empty), "c8", "INVALID_FIELD", "input: no tool is set"),
        (Body::Call(nameless), "", "INVALID_FIELD", "call_id is empty"),
        (Body::ForwardData(pb::ForwardData::default()), "", "UNIMPLEMENTED", "forward_data"),
        (
            Body::WriteStdin(pb::WriteStdin { call_id: "used".into(), ..Default::default() }),
            "used",
            "CALL_UNKNOWN",
            "call_id: call used is not running",
        ),
        (
            Body::OpenSession(pb::OpenSession { session_id: "t".into(), ..Default::default() }),
            "",
            "INVALID_FIELD",
            "epoch: is missing",
        ),
    ];
    for (body, call_id, code, text) in cases {
        let refused = refusal_of(&world, body).await;
        let failure = refused.failure.unwrap();
        assert_eq!((refused.call_id.as_str(), failure.code.as_str()), (call_id, code), "{}", failure.message);
        assert!(failure.message.starts_with(text), "{} does not start with {text}", failure.message);
        assert!(!failure.remediation.is_empty());
    }
    let counted = world.sessions.counters.all();
    let refused: u64 =
        counted.iter().filter(|(name, _)| name.starts_with("refused_total{")).map(|(_, count)| count).sum();
    assert_eq!(refused, 11, "each is counted once, here or by the sessions: {counted:?}");
    assert_eq!(counted["refused_total{request=\"call\",code=\"TOO_LARGE\"}"], 2);
    assert_eq!(counted["refused_total{request=\"open\",code=\"INVALID_FIELD\"}"], 1);
    within("last", session.bash("after", "exit 0")).await.unwrap();
    assert_eq!(world.orchestrator.links(), 1);
    assert_eq!(world.orchestrator.complaints(), Vec::<String>::new());
}

/// F-39: one id for two calls.
#[tokio::test]
async fn same_id_with_other_arguments_is_refused_and_the_first_call_goes_on() {
    let world = World::new(Options::default()).await;
    let session = within("session", world.session("s")).await;
    session.send_call(call("c", "s", "hang"));
    within("started", session.started("c")).await.unwrap();
    let refused = refusal_of(&world, Body::Call(call("c", "s", "exit 1"))).await;
    assert_eq!(refused.failure.unwrap().code, "CALL_ID_REUSED");
    session.cancel("c", pb::CancelMode::Interrupt);
    within("c", session.outcome("c")).await.unwrap();
    assert_eq!(world.fakes.executions_of("c"), 1);
}

/// F-38, F-40: dispatched several times, and again after its result was acknowledged.
#[tokio::test]
async fn repeated_dispatch_runs_once_and_is_answered_again() {
    let world = World::new(Options::default()).await;
    let session = within("session", world.session("s")).await;
    session.send_call(call("c", "s", "print 5; pause 50"));
    (0..5).for_each(|_| world.orchestrator.send_raw(Body::Call(call("c", "s", "print 5; pause 50"))));
    within("c", session.outcome("c")).await.unwrap();
    assert_eq!(world.fakes.executions_of("c"), 1);
    // The result was acknowledged, so the id is all that is left of it.
    within("forgotten", async {
        loop {
            let refused = refusal_of(&world, Body::Call(call("c", "s", "print 5; pause 50"))).await;
            if refused.failure.unwrap().code == "CALL_FORGOTTEN" {
                return;
            }
        }
    })
    .await;
    assert_eq!(world.fakes.executions_of("c"), 1);
}

/// F-41: cancelled before it has come.
#[tokio::test]
async fn cancel_that_overtakes_its_call_keeps_it_from_running() {
    let world = World::new(Options::default()).await;
    let session = within("session", world.session("s")).await;
    session.cancel("c", pb::CancelMode::Terminate);
    session.send_call(call("c", "s", "exit 0"));
    let error = within("c", session.outcome("c")).await.unwrap_err();
    assert!(error.to_string().contains("CANCELLED_BEFORE_START"), "{error}");
    assert_eq!(world.fakes.executions_of("c"), 0);
}

#[tokio::test]
async fn full_queue_refuses_with_a_hint_when_to_come_back() {
    let world = World::new(Options::default()).await;
    let session = within("session", world.session("s")).await;
    session.send_call(call("running", "s", "hang"));
    within("started", session.started("running")).await.unwrap();
    for number in 0..33 {
        session.send_call(call(&format!("q{number}"), "s", "exit 0"));
    }
    let refused = within("refusal", world.orchestrator.refusal()).await.unwrap();
    let failure = refused.failure.unwrap();
    assert_eq!((refused.call_id.as_str(), failure.code.as_str()), ("q32", "QUEUE_FULL"));
    assert!(failure.retryable && failure.retry_after.is_some());
    assert_eq!(world.sessions.counters.all().get("refused_total{request=\"call\",code=\"QUEUE_FULL\"}"), Some(&1));
    session.cancel("running", pb::CancelMode::Kill);
    within("q31", session.outcome("q31")).await.unwrap();
}

#[tokio::test]
async fn session_that_cannot_be_made_says_why_and_leaves_its_place() {
    let world = World::new(Options::default()).await;
    world.fakes.fail_create.store(true, std::sync::atomic::Ordering::SeqCst);
    let request = pb::OpenSession { session_id: "s".into(), ..Default::default() };
    let error = within("open", world.orchestrator.open_session(request)).await.unwrap_err();
    assert!(error.to_string().contains("no room in memory (SANDBOX_CREATE_FAILED)"), "{error}");
    world.fakes.fail_create.store(false, std::sync::atomic::Ordering::SeqCst);
    within("again", world.session("s")).await;
}

#[tokio::test]
async fn admission_names_the_limit_that_is_reached() {
    let reserve = runner::session::registry::Reserve { max_sessions: 1, ..crate::world::RESERVE };
    let world = World::new(Options { reserve, ..Default::default() }).await;
    within("first", world.session("a")).await;
    let request = pb::OpenSession { session_id: "b".into(), ..Default::default() };
    let error = within("second", world.orchestrator.open_session(request)).await.unwrap_err();
    assert!(error.to_string().contains("sessions: 1 asked, 1 of 1 are reserved"), "{error}");
}

/// A reference orchestrator that sent it would lose its link again and again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn call_that_no_frame_can_hold_is_refused_before_it_is_sent_and_the_link_stays() {
    let world = World::new(Options::default()).await;
    let session = within("session", world.session("s")).await;

    let huge = pb::BashInput { command: Some("x".repeat(5 << 20)), ..Default::default() };
    let error = within("huge", session.run("huge", pb::call::Input::Bash(huge))).await.unwrap_err();
    let variables = [("A".to_owned(), "x".repeat(5 << 20))].into();
    let request = pb::OpenSession { session_id: "t".into(), variables, ..Default::default() };
    let other = within("t", world.orchestrator.open_session(request)).await.unwrap_err();

    for error in [error, other] {
        let DevError::Refused { failure, .. } = error else { panic!("{error}") };
        assert_eq!((failure.code.as_str(), failure.retryable), ("TOO_LARGE", false));
        assert!(failure.message.starts_with("the frame has 52") && !failure.remediation.is_empty(), "{failure:?}");
    }
    world.wire.cut();
    within("next", session.bash("next", "print 5")).await.unwrap();
    assert_eq!(world.fakes.executions_of("huge"), 0);
    assert_eq!(world.orchestrator.complaints(), Vec::<String>::new());
}
