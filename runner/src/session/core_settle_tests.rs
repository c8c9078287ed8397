//! What a call is told as when nobody can say how it ended, and which calls its caller may do again.

use super::core::{Action, Config, Input};
use super::core_restore_tests::left;
use super::core_tests::{call, cid, close, core, ready, run, sid};
use crate::journal::{Recovered, RecoveredCall, RecoveredPhase};
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
        let held = RecoveredCall { call: call.clone(), cancel: None, phase: RecoveredPhase::Started, starts: 1 };
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
