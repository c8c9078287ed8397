//! One call, from request to acknowledged result.

use proto::runner::v1 as pb;
use proto::runner::v1::outcome::Kind;
use runner::connector::orchestrator::Stop;

use crate::fake::bytes_of;
use crate::world::{Options, World, within};

fn kind(finished: &runner::dev::CallOutcome) -> Kind {
    finished.message.outcome.clone().unwrap().kind.unwrap()
}

#[tokio::test]
async fn short_call_travels_whole_in_its_end() {
    let world = World::new(Options::default()).await;
    let session = within("session", world.session("s")).await;
    let finished = within("call", session.bash("c", "print 10; exit 3")).await.unwrap();
    assert_eq!(kind(&finished), Kind::Exited(pb::Exited { code: 3 }));
    assert_eq!(finished.message.streams[0].inline, bytes_of("c", 10));
    assert!(finished.message.result.unwrap().is_error);
    assert_eq!(world.orchestrator.complaints(), Vec::<String>::new());
}

#[tokio::test]
async fn long_output_arrives_byte_for_byte_and_the_model_sees_its_tail() {
    let world = World::new(Options::default()).await;
    let session = within("session", world.session("s")).await;
    let finished = within("call", session.bash("c", "print 3000000")).await.unwrap();
    assert!(finished.streams[&1].bytes == bytes_of("c", 3_000_000));
    let result = finished.message.result.unwrap();
    let Some(pb::content_block::Kind::Text(text)) = &result.content[0].kind else { panic!("text expected") };
    assert!(text.starts_with("[output truncated]\n"));
    assert_eq!(world.orchestrator.complaints(), Vec::<String>::new());
}

#[tokio::test]
async fn calls_of_one_session_run_in_order_and_sessions_run_side_by_side() {
    let world = World::new(Options::default()).await;
    let (a, b) = (within("a", world.session("a")).await, within("b", world.session("b")).await);
    let script =
        |command: &str| pb::call::Input::Bash(pb::BashInput { command: Some(command.into()), ..Default::default() });
    a.send("a1", script("hang"));
    a.send("a2", script("exit 0"));
    within("b1", b.bash("b1", "exit 0")).await.unwrap();
    within("a1 started", a.started("a1")).await.unwrap();
    assert_eq!(world.fakes.executions_of("a2"), 0);
    a.cancel("a1", pb::CancelMode::Interrupt);
    assert!(matches!(kind(&within("a1", a.outcome("a1")).await.unwrap()), Kind::Cancelled(_)));
    assert_eq!(kind(&within("a2", a.outcome("a2")).await.unwrap()), Kind::Exited(pb::Exited { code: 0 }));
}

#[tokio::test]
async fn waiting_call_that_is_cancelled_never_runs() {
    let world = World::new(Options::default()).await;
    let session = within("session", world.session("s")).await;
    let script =
        |command: &str| pb::call::Input::Bash(pb::BashInput { command: Some(command.into()), ..Default::default() });
    session.send("c1", script("hang"));
    session.send("c2", script("exit 0"));
    session.cancel("c2", pb::CancelMode::Interrupt);
    let Kind::Cancelled(cancelled) = kind(&within("c2", session.outcome("c2")).await.unwrap()) else { panic!() };
    assert!(cancelled.before_start);
    session.cancel("c1", pb::CancelMode::Kill);
    within("c1", session.outcome("c1")).await.unwrap();
    assert_eq!(world.fakes.executions_of("c2"), 0);
}

#[tokio::test]
async fn sandbox_that_dies_makes_its_call_indeterminate_and_ends_its_session() {
    let world = World::new(Options::default()).await;
    let session = within("session", world.session("s")).await;
    let finished = within("call", session.bash("c", "print 5; die")).await.unwrap();
    let Kind::Indeterminate(lost) = kind(&finished) else { panic!("{finished:?}") };
    assert_eq!(lost.failure.unwrap().code, "SANDBOX_LOST");
    let next = within("next", session.bash("d", "exit 0")).await.unwrap_err();
    assert!(next.to_string().contains("SESSION_UNKNOWN") || next.to_string().contains("SESSION_CLOSED"), "{next}");
}

#[tokio::test]
async fn closing_a_session_cancels_what_runs_and_is_the_last_word() {
    let world = World::new(Options::default()).await;
    let session = within("session", world.session("s")).await;
    let script = pb::BashInput { command: Some("hang".into()), ..Default::default() };
    session.send("c", pb::call::Input::Bash(script));
    within("started", session.started("c")).await.unwrap();
    let ended = within("close", session.close(std::time::Duration::ZERO)).await.unwrap();
    assert_eq!(ended.reason(), pb::SessionEndReason::Closed);
    assert!(matches!(kind(&within("c", session.outcome("c")).await.unwrap()), Kind::Cancelled(_)));
}

#[tokio::test]
async fn runner_says_goodbye_when_everything_is_delivered() {
    let world = World::new(Options::default()).await;
    let session = within("session", world.session("s")).await;
    within("call", session.bash("c", "print 200000")).await.unwrap();
    world.orchestrator.drain(pb::Drain { mode: pb::DrainMode::FinishCalls.into(), ..Default::default() });
    world.stop.send_replace(Stop::WhenDelivered);
    let goodbye = within("goodbye", world.orchestrator.goodbye()).await.unwrap();
    assert!(!goodbye.sandboxes_kept);
    within("end", world.connector.task).await.unwrap();
}

#[tokio::test]
async fn standard_input_is_taken_once_by_offset() {
    let world = World::new(Options::default()).await;
    let session = within("session", world.session("s")).await;
    let script = pb::BashInput { command: Some("hang".into()), ..Default::default() };
    session.send("c", pb::call::Input::Bash(script));
    within("started", session.started("c")).await.unwrap();
    assert_eq!(within("first", session.stdin("c", 0, b"abc", false)).await.unwrap(), 3);
    assert_eq!(within("again", session.stdin("c", 0, b"abcd", true)).await.unwrap(), 4);
    within("call", session.outcome("c")).await.unwrap();
}

#[tokio::test]
async fn receipt_can_be_asked_for_and_what_is_not_built_says_so() {
    let world = World::new(Options::default()).await;
    within("runner", world.orchestrator.runner()).await.unwrap();
    let ask = |query_id, what| world.orchestrator.query(pb::Query { query_id, what: Some(what) });
    let receipt = within("receipt", ask(1, pb::query::What::Receipt(Default::default()))).await.unwrap();
    assert!(matches!(receipt.answer, Some(pb::query_reply::Answer::Receipt(_))));
    let usage = within("usage", ask(2, pb::query::What::Usage(Default::default()))).await.unwrap();
    let Some(pb::query_reply::Answer::Failure(failure)) = usage.answer else { panic!("failure expected") };
    assert_eq!(failure.code, "UNIMPLEMENTED");
}
