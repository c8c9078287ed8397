//! Taking over the calls of an earlier runner from a scripted process 1, good and hostile.

use super::*;

use std::sync::Mutex;

use wire::frame::Body;
use wire::request::Body as Ask;

use crate::sandbox::control::ControlEnd;
use crate::sandbox::control::tests::{IMPATIENT, Recorder, frame, process_1};
use crate::work::{BashInput, CallLimits, Gate, OutputMode, PreparedCall, Stream, ToolInput};

/// Shells that process 1 has started before.
const SHELLS: u64 = 4;

fn welcome(request_id: u64) -> Vec<u8> {
    frame(request_id, Body::Welcome(wire::Welcome { major: 1, sandbox_id: "s".into(), shell_generation: SHELLS }))
}

fn started(call_id: &str) -> Vec<u8> {
    frame(0, Body::CallStarted(wire::CallStarted { call_id: call_id.into(), boottime_ns: 5 }))
}

fn advanced(call_id: &str, total_bytes: u64) -> Vec<u8> {
    let streams = vec![wire::StreamLength { stream: wire::Stream::Stdout.into(), total_bytes }];
    frame(0, Body::OutputAdvanced(wire::OutputAdvanced { call_id: call_id.into(), streams }))
}

fn finished(call_id: &str) -> Vec<u8> {
    let outcome = wire::Outcome { kind: Some(wire::outcome::Kind::Exited(wire::Exited { code: 0 })) };
    let body = wire::CallFinished { call_id: call_id.into(), outcome: Some(outcome), ..Default::default() };
    frame(0, Body::CallFinished(body))
}

const PREPARED: wire::CallPhase = wire::CallPhase::Prepared;
const RUNNING: wire::CallPhase = wire::CallPhase::Running;
const OVER: wire::CallPhase = wire::CallPhase::Finished;

fn shown(request_id: u64, calls: &[(&str, wire::CallPhase)]) -> Vec<u8> {
    let call = |(call_id, phase): &(&str, wire::CallPhase)| wire::CallState {
        call_id: (*call_id).into(),
        phase: (*phase).into(),
        streams: Vec::new(),
    };
    let calls = calls.iter().map(call).collect();
    frame(request_id, Body::Snapshot(wire::SnapshotReply { calls, shell_generation: SHELLS, ..Default::default() }))
}

fn done(request_id: u64) -> Vec<u8> {
    frame(request_id, Body::Done(wire::Done {}))
}

/// Says `greeting` behind its welcome, shows `calls`, says `after` behind them, and does whatever else it is asked.
fn holding(
    greeting: Vec<Vec<u8>>,
    calls: &'static [(&'static str, wire::CallPhase)],
    after: Vec<Vec<u8>>,
) -> std::os::fd::OwnedFd {
    process_1(move |request| match request.body {
        Some(Ask::Hello(_)) => [vec![welcome(request.request_id)], greeting.clone()].concat(),
        Some(Ask::Snapshot(_)) => [vec![shown(request.request_id, calls)], after.clone()].concat(),
        _ => vec![done(request.request_id)],
    })
}

fn expected(call_id: &str, gate: Gate, observer: &Arc<Recorder>) -> ExpectedCall {
    let observer = Arc::clone(observer) as Arc<_>;
    ExpectedCall { call_id: id(call_id), gate, time_limit: None, observer }
}

fn id(call_id: &str) -> CallId {
    CallId::new(call_id).expect("valid")
}

async fn attach(socket: std::os::fd::OwnedFd, calls: Vec<ExpectedCall>) -> Result<Resumed, ControlError> {
    Control::attach_over(socket, 7, IMPATIENT, calls).await
}

/// What ended a connection that had to end, while it was taken over or afterwards.
async fn violation(socket: std::os::fd::OwnedFd, calls: Vec<ExpectedCall>) -> Violation {
    let end = match attach(socket, calls).await {
        Err(ControlError::Ended(end)) => end,
        Err(other) => panic!("not an end: {other}"),
        Ok(resumed) => tokio::time::timeout(Duration::from_secs(20), resumed.control.ended()).await.expect("an end"),
    };
    match end {
        ControlEnd::Violated(violation) => violation,
        other => panic!("not a violation: {other}"),
    }
}

async fn over(recorder: &Recorder) {
    let heard = async {
        while recorder.outcome().is_none() {
            recorder.1.notified().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), heard).await.expect("the end is told");
}

#[tokio::test]
async fn sandbox_without_processes_is_known_as_such() {
    for stopped in [true, false] {
        let socket = process_1(move |request| match request.body {
            Some(Ask::Hello(_)) => vec![welcome(request.request_id)],
            _ => {
                let reply = wire::SnapshotReply { shell_generation: SHELLS, stopped, ..Default::default() };
                vec![frame(request.request_id, Body::Snapshot(reply))]
            }
        });
        assert_eq!(attach(socket, Vec::new()).await.expect("taken over").stopped, stopped);
    }
}

#[tokio::test]
async fn calls_of_an_earlier_runner_are_found_and_go_on_being_heard() {
    let [prepared, running, ended, gone] = [(); 4].map(|()| Arc::new(Recorder::default()));
    let socket = holding(
        vec![started("r"), advanced("r", 3), finished("f")],
        &[("p", PREPARED), ("r", RUNNING), ("f", OVER)],
        vec![advanced("r", 9), finished("r")],
    );

    let resumed = attach(
        socket,
        vec![
            expected("p", Gate::Held, &prepared),
            expected("r", Gate::Open, &running),
            expected("f", Gate::Open, &ended),
            expected("gone", Gate::Open, &gone),
        ],
    )
    .await
    .expect("taken over");
    over(&running).await;
    over(&ended).await;

    let wanted = [("p", FoundCall::Prepared), ("r", FoundCall::Running), ("f", FoundCall::Finished)];
    assert_eq!(resumed.found, wanted.map(|(call_id, phase)| (id(call_id), phase)).into());
    assert_eq!((resumed.greeting.sandbox_id.as_str(), resumed.greeting.shell_generation), ("s", SHELLS));
    let events = running.0.lock().expect("not poisoned").clone();
    assert_eq!(events[0], CallEvent::Started { boottime_ns: 5, shell_generation: SHELLS });
    assert!(matches!(events[2], CallEvent::OutputAdvanced(lengths) if lengths.get(Stream::Stdout) == 9), "{events:?}");
    assert!(matches!(ended.0.lock().expect("not poisoned")[..], [CallEvent::Started { .. }, CallEvent::Finished(_)]));
    assert!(prepared.0.lock().expect("not poisoned").is_empty());
    assert_eq!(resumed.control.abort("p").await, Ok(()));
    assert_eq!(resumed.control.acknowledge("f").await, Ok(()));
}

#[tokio::test]
async fn calls_that_nobody_knows_go_on_until_they_are_to_be_ended_and_then_are_dropped_ended_and_acknowledged() {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let heard = Arc::clone(&asked);
    let calls = [("p", PREPARED), ("r", RUNNING), ("f", OVER), ("g", OVER)];
    let socket = process_1(move |request| {
        let request_id = request.request_id;
        let body = request.body.expect("a body");
        heard.lock().expect("not poisoned").push(body.clone());
        match body {
            Ask::Hello(_) => vec![welcome(request_id), started("r"), advanced("r", 1), finished("f")],
            Ask::Snapshot(_) => vec![shown(request_id, &calls), advanced("r", 2), finished("g")],
            Ask::Cancel(cancel) if cancel.call_id == "r" => vec![done(request_id), advanced("r", 3), finished("r")],
            Ask::Cancel(_) => {
                let failure = wire::Failure { code: "CALL_NOT_RUNNING".into(), ..Default::default() };
                vec![frame(request_id, Body::Failure(failure))]
            }
            _ => vec![done(request_id)],
        }
    });

    let resumed = attach(socket, Vec::new()).await.expect("taken over");

    assert!(resumed.found.is_empty());
    let only_looked = |body: &Ask| matches!(body, Ask::Hello(_) | Ask::Snapshot(_));
    assert!(asked.lock().expect("not poisoned").iter().all(only_looked), "a newer state may know them");
    assert!(resumed.control.shared().state().calls.has_strangers());

    let both = tokio::join!(resumed.control.end_strangers(), resumed.control.end_strangers());

    assert_eq!(both, (Ok(()), Ok(())));
    let asked = asked.lock().expect("not poisoned").clone();
    let (mut aborted, mut killed, mut acknowledged) = (Vec::new(), Vec::new(), Vec::new());
    for body in asked {
        match body {
            Ask::Abort(abort) => aborted.push(abort.call_id),
            Ask::Cancel(cancel) if cancel.mode == i32::from(wire::CancelMode::Kill) => killed.push(cancel.call_id),
            Ask::AcknowledgeExit(acknowledge) => acknowledged.push(acknowledge.call_id),
            _ => {}
        }
    }
    acknowledged.sort();
    // Whether the end of that one is read before it is asked to end is chance.
    killed.retain(|call_id| call_id != "g");
    assert_eq!((aborted, killed), (vec!["p".to_owned()], vec!["r".to_owned()]));
    assert_eq!(acknowledged, ["f", "g", "r"]);
    assert!(!resumed.control.shared().state().calls.has_strangers());
}

#[tokio::test]
async fn call_that_nobody_knows_and_that_does_not_end_delays_nobody_and_is_overdue() {
    let socket = holding(Vec::new(), &[("r", RUNNING)], Vec::new());
    let resumed = attach(socket, Vec::new()).await.expect("taken over");

    resumed.control.end_strangers().await.expect("it is ended behind our back");

    let end = tokio::time::timeout(Duration::from_secs(20), resumed.control.ended()).await.expect("an end");
    assert_eq!(end, ControlEnd::Violated(Violation::Overdue));
}

#[tokio::test]
async fn events_on_both_sides_of_the_snapshot_are_no_contradiction() {
    for greeting in [Vec::new(), vec![started("c")], vec![started("c"), advanced("c", 5)]] {
        let recorder = Arc::new(Recorder::default());
        let has_started = !greeting.is_empty();
        let rest = if has_started { vec![finished("c")] } else { vec![started("c"), finished("c")] };
        let socket = holding(greeting, &[("c", RUNNING)], rest);

        let resumed = attach(socket, vec![expected("c", Gate::Open, &recorder)]).await.expect("taken over");
        over(&recorder).await;

        assert_eq!(resumed.found[&id("c")], FoundCall::Running);
    }
    let recorder = Arc::new(Recorder::default());
    let socket = holding(vec![started("c")], &[("c", OVER)], vec![finished("c")]);

    let resumed = attach(socket, vec![expected("c", Gate::Open, &recorder)]).await.expect("taken over");
    over(&recorder).await;

    assert_eq!(resumed.found[&id("c")], FoundCall::Finished);
}

#[tokio::test]
async fn call_that_never_arrived_can_be_sent_again() {
    let recorder = Arc::new(Recorder::default());
    let socket = process_1(|request| match request.body {
        Some(Ask::Hello(_)) => vec![welcome(request.request_id)],
        Some(Ask::Snapshot(_)) => vec![shown(request.request_id, &[])],
        _ => vec![frame(request.request_id, Body::CallPrepared(wire::CallPrepared { call_id: "c".into() }))],
    });
    let resumed = attach(socket, vec![expected("c", Gate::Held, &recorder)]).await.expect("taken over");
    let call = PreparedCall {
        call_id: id("c"),
        input: ToolInput::Bash(BashInput { command: Some("true".into()), restart: false }),
        limits: CallLimits::default(),
        output_mode: OutputMode::Merged,
        gate: Gate::Held,
    };

    let sent = resumed.control.start_call(&call, recorder).await;

    assert_eq!((resumed.found.len(), sent), (0, Ok(())));
}

#[tokio::test]
async fn event_of_a_call_that_is_not_there_ends_the_sandbox_once_it_is_taken_over() {
    let recorder = Arc::new(Recorder::default());
    for call_id in ["stranger", "absent"] {
        let socket = holding(Vec::new(), &[], vec![started(call_id)]);

        let violation = violation(socket, vec![expected("absent", Gate::Open, &recorder)]).await;

        assert_eq!(violation, Violation::UnknownCall { event: "call_started" });
    }
}

#[tokio::test]
async fn held_call_that_has_run_ends_the_sandbox_and_is_told_to_be_unknown() {
    let cases = [
        holding(vec![started("h")], &[("h", RUNNING)], Vec::new()),
        holding(vec![finished("h")], &[("h", OVER)], Vec::new()),
        holding(Vec::new(), &[("h", RUNNING)], Vec::new()),
        holding(Vec::new(), &[("h", OVER)], vec![finished("h")]),
        holding(Vec::new(), &[("h", PREPARED)], vec![started("h")]),
    ];
    for socket in cases {
        let recorder = Arc::new(Recorder::default());

        let violation = violation(socket, vec![expected("h", Gate::Held, &recorder)]).await;

        assert!(matches!(&violation, Violation::Unrecorded { call_id, .. } if call_id == "h"), "{violation}");
        let events = recorder.0.lock().expect("not poisoned").clone();
        let [CallEvent::Finished(end)] = &events[..] else { panic!("{events:?}") };
        assert!(matches!(&end.outcome, Outcome::Indeterminate { failure } if failure.code == Code::OutcomeUnknown));
    }
}

#[tokio::test]
async fn hostile_snapshots_end_the_sandbox() {
    let recorder = Arc::new(Recorder::default());
    let calls = || vec![expected("c", Gate::Open, &recorder)];
    let heard_and_gone = holding(vec![started("c")], &[], Vec::new());
    let stranger_heard_and_gone = holding(vec![started("x")], &[], Vec::new());
    let twice = holding(Vec::new(), &[("c", RUNNING), ("c", OVER)], Vec::new());
    let backwards = process_1(|request| match request.body {
        Some(Ask::Hello(_)) => vec![welcome(request.request_id)],
        _ => vec![frame(request.request_id, Body::Snapshot(wire::SnapshotReply::default()))],
    });
    let something_else = process_1(|request| match request.body {
        Some(Ask::Hello(_)) => vec![welcome(request.request_id)],
        _ => vec![done(request.request_id)],
    });
    let as_greeting = process_1(|request| vec![shown(request.request_id, &[])]);
    let silent = process_1(|request| match request.body {
        Some(Ask::Hello(_)) => vec![welcome(request.request_id)],
        _ => Vec::new(),
    });

    assert_eq!(violation(heard_and_gone, calls()).await, Violation::WrongPhase { event: "snapshot" });
    assert_eq!(violation(stranger_heard_and_gone, calls()).await, Violation::WrongPhase { event: "snapshot" });
    assert_eq!(violation(twice, calls()).await, Violation::impossible("snapshot.call_id", "c"));
    assert_eq!(violation(backwards, calls()).await, Violation::impossible("snapshot.shell_generation", 0));
    assert_eq!(violation(something_else, calls()).await, Violation::WrongAnswer { request: "snapshot" });
    assert_eq!(violation(as_greeting, calls()).await, Violation::WrongAnswer { request: "hello" });
    let silence = Violation::Silence { request: "snapshot", after: IMPATIENT.answer };
    assert_eq!(violation(silent, calls()).await, silence);
}

#[tokio::test]
async fn time_limit_of_a_call_that_runs_is_counted_from_its_start_and_holds_without_an_announcement() {
    let recorder = Arc::new(Recorder::default());
    let running_since_boot = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).map(Duration::from);
    let limit = running_since_boot.expect("a clock") / 2;
    let call = |time_limit| ExpectedCall { time_limit: Some(time_limit), ..expected("c", Gate::Open, &recorder) };
    let announced = holding(vec![started("c")], &[("c", RUNNING)], Vec::new());
    let silent = holding(Vec::new(), &[("c", RUNNING)], Vec::new());
    let over_and_not_told = holding(Vec::new(), &[("c", OVER)], Vec::new());

    assert_eq!(violation(announced, vec![call(limit)]).await, Violation::Overdue);
    assert_eq!(violation(silent, vec![call(Duration::from_millis(50))]).await, Violation::Overdue);
    assert_eq!(violation(over_and_not_told, vec![call(limit)]).await, Violation::Overdue);
}

#[tokio::test]
async fn the_same_call_expected_twice_is_refused_before_anything_is_sent() {
    let recorder = Arc::new(Recorder::default());
    let socket = process_1(|request| panic!("asked {request:?}"));
    let call = || expected("c", Gate::Open, &recorder);

    let error = attach(socket, vec![call(), call()]).await.expect_err("refused");

    assert_eq!(error, ControlError::Duplicate);
}
