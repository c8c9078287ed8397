//! What a call is told as when nobody can say how it ended, which calls its caller may do again, and which one is blamed for the end of
//! a runner.

use std::collections::BTreeMap;

use super::core::{Action, Config, Input};
use super::core_restore_tests::{held, left, outcome_of};
use super::core_tests::{call, cid, close, core, ready, run, sandbox_id, sid};
use crate::journal::{MOST_STARTS, Record, Recovered, RecoveredCall, RecoveredPhase, RecoveredSession};
use crate::work::*;

fn inputs() -> Vec<(ToolInput, bool)> {
    let path = || "f".to_owned();
    vec![
        (ToolInput::Read(ReadInput { file_path: path(), view_range: None }), true),
        (ToolInput::Glob(GlobInput { pattern: "*".into(), path: None }), true),
        (ToolInput::Grep(GrepInput { pattern: "x".into(), path: None }), true),
        (ToolInput::Bash(BashInput { command: Some("true".into()), restart: false }), false),
        (ToolInput::Write(WriteInput { file_path: path(), content: String::new() }), false),
        (
            ToolInput::Edit(EditInput {
                file_path: path(),
                old_string: "a".into(),
                new_string: "b".into(),
                replace_all: false,
            }),
            false,
        ),
        (ToolInput::Exec(ExecInput { argv: vec![b"true".to_vec()], ..ExecInput::default() }), false),
    ]
}

fn tool_call(input: ToolInput) -> ToolCall {
    let Input::Work(WorkItem::Call(call)) = call("s", 3, "a", 0) else { panic!("a call") };
    ToolCall { input, ..call }
}

/// The one end that is written down, which has to be unknown.
fn unknown(actions: &[Action]) -> ToolFailure {
    let ends = actions.iter().filter_map(|action| match action {
        Action::WriteFinished { result, .. } => Some(&result.end.outcome),
        _ => None,
    });
    match &ends.collect::<Vec<_>>()[..] {
        [Outcome::Indeterminate { failure }] => failure.clone(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn call_that_is_lost_with_its_sandbox_may_be_done_again_exactly_when_it_changes_nothing() {
    for (input, may_be_repeated) in inputs() {
        let mut core = core(Config::default());
        ready(&mut core, "s", 3);
        core.handle(Input::Work(WorkItem::Call(tool_call(input.clone()))));
        run(&mut core, "a");

        let actions = core.handle(Input::SandboxLost { session_id: sid("s"), reason: "gone".into() });

        let failure = unknown(&actions);
        let again = (failure.retryable, failure.retry_after.is_some(), failure.remediation.contains("changes nothing"));
        assert_eq!(again, (may_be_repeated, may_be_repeated, may_be_repeated), "{}: {failure:?}", input.name());
        assert_eq!(failure.code, Code::SandboxLost);
        assert!(!actions.iter().any(|action| matches!(action, Action::Prepare { .. })), "its session is over");
    }
}

#[test]
fn call_that_is_lost_with_its_host_or_its_session_may_be_done_again_exactly_when_it_changes_nothing() {
    for (input, may_be_repeated) in inputs() {
        let call = tool_call(input);
        let phase = RecoveredPhase::Started;
        let held = RecoveredCall { call: call.clone(), cancel: None, phase, starts: 1, resumes: Some(0) };
        let recovered = Recovered { same_boot: false, ..left(vec![held]) };
        let rebooted = unknown(&core(Config::default()).handle(Input::Recovered(Box::new(recovered))));
        assert_eq!((rebooted.code, rebooted.retryable), (Code::HostRebooted, may_be_repeated), "{}", call.input.name());

        let mut core = core(Config::default());
        ready(&mut core, "s", 3);
        core.handle(Input::Work(WorkItem::Call(call.clone())));
        run(&mut core, "a");
        core.handle(close("s", 3));
        let closed = unknown(&core.handle(Input::SandboxClosed { session_id: sid("s") }));
        assert_eq!(closed.retryable, may_be_repeated, "{}", call.input.name());
    }
}

#[test]
fn end_that_a_sandbox_itself_does_not_know_is_judged_in_the_same_way_and_a_known_one_is_left_alone() {
    let failure = ToolFailure::new(Code::OutcomeUnknown, "nobody knows", "look");
    for (input, may_be_repeated) in inputs() {
        for outcome in [Outcome::Indeterminate { failure: failure.clone() }, Outcome::Exited { code: 1 }] {
            let mut core = core(Config::default());
            ready(&mut core, "s", 3);
            core.handle(Input::Work(WorkItem::Call(tool_call(input.clone()))));
            run(&mut core, "a");
            let end = CallEnd::without_output(outcome.clone());
            let presented = ToolResult::text(true, "text");
            let result = std::sync::Arc::new(CallResult { end, presented, recovered: false });

            let actions = core.handle(Input::Ended { call_id: cid("a"), result });

            if outcome == (Outcome::Exited { code: 1 }) {
                let is_same = |action: &Action| matches!(action, Action::WriteFinished { result, .. } if result.end.outcome == outcome);
                assert!(actions.iter().any(is_same));
            } else {
                assert_eq!(unknown(&actions).retryable, may_be_repeated, "{}", input.name());
            }
        }
    }
}

fn running(id: &str, resumes: Option<u32>) -> RecoveredCall {
    RecoveredCall { resumes, ..held(id, None, RecoveredPhase::Started) }
}

fn panicked(calls: Vec<RecoveredCall>) -> Recovered {
    Recovered { panicked: true, ..left(calls) }
}

fn restored(recovered: Recovered) -> (super::core::Core, Vec<Action>) {
    let mut core = core(Config::default());
    let actions = core.handle(Input::Recovered(Box::new(recovered)));
    (core, actions)
}

fn is_attached(actions: &[Action]) -> bool {
    actions.iter().any(|action| matches!(action, Action::AttachSandbox { .. }))
}

fn resumed() -> Action {
    Action::WriteResumed { call_id: cid("a") }
}

/// F-65: it is counted before the sandbox is met, because meeting it may be what ends a runner.
#[test]
fn call_that_alone_may_be_to_blame_for_a_panic_is_counted_before_its_sandbox_is_taken_over() {
    for resumes in 0..MOST_STARTS - 1 {
        let (mut core, actions) = restored(panicked(vec![running("a", Some(resumes))]));
        assert!(actions.contains(&resumed()) && !is_attached(&actions), "{actions:?}");
        assert!(!actions.contains(&Action::Tell(Update::Restored)), "no link before everything is known");

        let counted = core.handle(Input::ResumeWritten { call_id: cid("a"), durable: true });

        assert!(is_attached(&counted), "{counted:?}");
        let found = BTreeMap::from([(cid("a"), FoundCall::Running)]);
        let taken = core.handle(Input::SandboxAttached { session_id: sid("s"), found, processes: Processes::Run });
        assert!(taken.contains(&Action::Tell(Update::Restored)) && outcome_of(&taken, "a").is_none());
    }
}

/// F-65: a running call that three runners have panicked of.
#[test]
fn running_call_that_three_runners_panicked_of_is_answered_as_poison_and_its_sandbox_is_not_met_again() {
    let mut calls = vec![running("a", Some(MOST_STARTS - 1)), held("b", None, RecoveredPhase::Accepted)];
    calls[0].call = ToolCall { input: inputs().remove(0).0, ..calls[0].call.clone() };

    let (mut core, actions) = restored(panicked(calls));

    let Some(Outcome::Indeterminate { failure }) = outcome_of(&actions, "a") else { panic!("{actions:?}") };
    assert_eq!((failure.code, failure.retryable), (Code::Poison, false), "although it changes nothing");
    let Some(Outcome::NeverStarted { failure, .. }) = outcome_of(&actions, "b") else { panic!("{actions:?}") };
    assert_eq!(failure.code, Code::SandboxLost);
    assert!(actions.contains(&Action::DiscardSandbox { sandbox_id: sandbox_id() }) && !is_attached(&actions));
    assert!(!actions.contains(&resumed()) && actions.contains(&Action::Tell(Update::Restored)));
    core.handle(Input::EndWritten { call_id: cid("a"), durable: true });
    let over = core.handle(Input::EndWritten { call_id: cid("b"), durable: true });
    let lost =
        |action: &Action| matches!(action, Action::Tell(Update::SessionEnded { end: SessionEnd::SandboxLost(_), .. }));
    assert!(over.iter().any(lost), "{over:?}");
}

#[test]
fn runner_that_was_killed_stopped_or_replaced_blames_no_call_however_often() {
    let most = running("a", Some(MOST_STARTS));
    for recovered in [left(vec![most.clone()]), left(vec![running("a", Some(0))])] {
        let (_, actions) = restored(recovered);
        assert!(is_attached(&actions) && !actions.contains(&resumed()), "{actions:?}");
    }
    // Nor does a machine that was started again: that has ended everything.
    let (_, actions) = restored(Recovered { same_boot: false, ..panicked(vec![most]) });
    let Some(Outcome::Indeterminate { failure }) = outcome_of(&actions, "a") else { panic!("{actions:?}") };
    assert_eq!(failure.code, Code::HostRebooted);
}

#[test]
fn call_that_a_runner_has_lived_with_or_that_is_one_of_several_is_not_blamed() {
    for calls in [
        vec![running("a", None)],
        vec![running("a", Some(MOST_STARTS)), running("b", Some(0))],
        vec![held("a", None, RecoveredPhase::Accepted)],
    ] {
        let (_, actions) = restored(panicked(calls));
        assert!(is_attached(&actions), "{actions:?}");
        assert!(!actions.iter().any(|action| matches!(action, Action::WriteResumed { .. })), "{actions:?}");
    }
    // The old one is cleared, so the new one is alone.
    let (_, actions) = restored(panicked(vec![running("old", None), running("a", Some(0))]));
    assert!(actions.contains(&resumed()));
}

#[test]
fn only_the_session_of_the_blamed_call_waits_for_the_count() {
    let mut recovered = panicked(vec![running("a", Some(0))]);
    let mut open = recovered.sessions[0].open.clone();
    open.session_id = sid("t");
    let sandbox = Some((SandboxId::new("sb-2").unwrap(), Receipt::default()));
    recovered.sessions.push(RecoveredSession { open, sandbox, acknowledged: Vec::new() });

    let (mut core, actions) = restored(recovered);

    let attached = |actions: &[Action]| -> Vec<SessionId> {
        let sessions = actions.iter().filter_map(|action| match action {
            Action::AttachSandbox { session_id, .. } => Some(session_id.clone()),
            _ => None,
        });
        sessions.collect()
    };
    assert_eq!(attached(&actions), [sid("t")]);
    // A journal that takes nothing counts nothing, and nobody else knows how the call goes on.
    let counted = core.handle(Input::ResumeWritten { call_id: cid("a"), durable: false });
    assert_eq!(attached(&counted), [sid("s")]);
    assert!(core.is_read_only());
}

#[test]
fn call_that_runs_from_one_minute_to_the_next_is_cleared_once() {
    let mut core = core(Config::default());
    ready(&mut core, "s", 3);
    core.handle(call("s", 3, "a", 0));
    assert_eq!(core.handle(Input::MinutePassed), []);
    run(&mut core, "a");
    assert_eq!(core.handle(Input::MinutePassed), [], "it may have begun a moment ago");

    let cleared = core.handle(Input::MinutePassed);

    assert_eq!(cleared, [Action::Note(Record::Outlived { call_id: cid("a") })]);
    assert_eq!(core.handle(Input::MinutePassed), []);
}
