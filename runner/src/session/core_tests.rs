//! What the core promises, one behaviour at a time. The driver answers every action at once unless a test holds it back.

use std::sync::Arc;
use std::time::Duration;

use super::core::{Action, Config, Core, Input};
use super::registry::{Registry, Reserve};
use crate::work::*;

const RESERVE: Reserve =
    Reserve { max_sessions: 100, memory_bytes: 1 << 40, disk_bytes: 1 << 40, pids: 1 << 20, descriptors: 1 << 16 };

fn registry() -> Registry {
    Registry::new(RESERVE, ResourceLimits { cpu_millis: 1, memory_bytes: 1, disk_bytes: 1, pids: 1 })
}

pub(super) fn core(config: Config) -> Core {
    Core::new(config, registry())
}

pub(super) fn sid(text: &str) -> SessionId {
    SessionId::new(text).unwrap()
}

pub(super) fn cid(text: &str) -> CallId {
    CallId::new(text).unwrap()
}

pub(super) fn open(session: &str, epoch: u64) -> Input {
    Input::Work(WorkItem::Open(SessionOpen {
        session_id: sid(session),
        epoch,
        digest: RequestDigest([0; 32]),
        environment: EnvironmentRef::default(),
        limits: ResourceLimits::default(),
        network: Network::None,
        variables: Vec::new(),
        min_tier: String::new(),
        orphan_timeout: None,
        idle_timeout: None,
        max_concurrent_calls: 0,
        tenant: String::new(),
    }))
}

pub(super) fn call(session: &str, epoch: u64, id: &str, digest: u8) -> Input {
    Input::Work(WorkItem::Call(ToolCall {
        call_id: cid(id),
        session_id: sid(session),
        epoch,
        digest: RequestDigest([digest; 32]),
        input: ToolInput::Bash(BashInput { command: Some("true".into()), restart: false }),
        limits: CallLimits { start_within: Some(Duration::from_secs(1)), ..CallLimits::default() },
        output_mode: OutputMode::Merged,
        quiet: false,
    }))
}

pub(super) fn cancel(session: &str, epoch: u64, id: &str, mode: CancelMode) -> Input {
    Input::Work(WorkItem::Cancel { session_id: sid(session), epoch, call_id: cid(id), mode })
}

pub(super) fn close(session: &str, epoch: u64) -> Input {
    let close = SessionClose { session_id: sid(session), epoch, grace: Duration::ZERO, fenced: false };
    Input::Work(WorkItem::Close(close))
}

pub(super) fn ended(id: &str) -> Input {
    let end = CallEnd::without_output(Outcome::Exited { code: 0 });
    let presented = ToolResult::text(false, "done");
    Input::Ended { call_id: cid(id), result: Arc::new(CallResult { end, presented, recovered: false }) }
}

pub(super) fn sandbox_id() -> SandboxId {
    SandboxId::new("sb-1").unwrap()
}

/// A ready session.
pub(super) fn ready(core: &mut Core, session: &str, epoch: u64) {
    core.handle(open(session, epoch));
    core.handle(Input::SandboxReady {
        session_id: sid(session),
        sandbox_id: sandbox_id(),
        receipt: Receipt::default(),
    });
    core.handle(Input::ReadyWritten { session_id: sid(session), durable: true });
}

/// Brings a call to the point where it runs.
pub(super) fn run(core: &mut Core, id: &str) {
    core.handle(Input::Accepted { call_id: cid(id), durable: true });
    core.handle(Input::Prepared { call_id: cid(id) });
    core.handle(Input::StartWritten { call_id: cid(id), durable: true });
}

pub(super) fn finish(core: &mut Core, id: &str) -> Vec<Action> {
    let mut actions = core.handle(ended(id));
    actions.extend(core.handle(Input::EndWritten { call_id: cid(id), durable: true }));
    actions
}

pub(super) fn refusal(actions: &[Action]) -> Code {
    let codes: Vec<_> = actions
        .iter()
        .filter_map(|action| match action {
            Action::Tell(Update::Refused { failure, .. }) => Some(failure.code),
            _ => None,
        })
        .collect();
    assert_eq!(codes.len(), 1, "one refusal expected in {actions:?}");
    codes[0]
}

pub(super) fn outcome(actions: &[Action], id: &str) -> Option<Outcome> {
    actions.iter().find_map(|action| match action {
        Action::WriteFinished { call_id, result } if *call_id == cid(id) => Some(result.end.outcome.clone()),
        _ => None,
    })
}

pub(super) fn prepared(actions: &[Action]) -> Vec<String> {
    actions
        .iter()
        .filter_map(|action| match action {
            Action::Prepare { call, .. } => Some(call.call_id.to_string()),
            _ => None,
        })
        .collect()
}

#[test]
fn gate_opens_only_after_the_start_is_written() {
    let mut core = core(Config::default());
    ready(&mut core, "s", 1);
    let actions = core.handle(call("s", 1, "c", 0));
    // Preparing overlaps with writing the call down.
    assert_eq!(prepared(&actions), ["c"]);
    assert!(actions.contains(&Action::WriteStarted { call_id: cid("c") }));
    let actions = core.handle(Input::Prepared { call_id: cid("c") });
    assert!(actions.is_empty(), "nothing may happen before the start is written: {actions:?}");
    let actions = core.handle(Input::Accepted { call_id: cid("c"), durable: true });
    assert!(matches!(&actions[..], [Action::Tell(Update::CallAccepted { .. })]), "{actions:?}");
    let actions = core.handle(Input::StartWritten { call_id: cid("c"), durable: true });
    assert_eq!(actions, [Action::Go { session_id: sid("s"), call_id: cid("c") }]);
}

#[test]
fn start_that_is_known_to_be_written_before_its_acceptance_is_vouches_for_it() {
    let mut core = core(Config::default());
    ready(&mut core, "s", 1);
    core.handle(call("s", 1, "c", 0));
    let actions = core.handle(Input::StartWritten { call_id: cid("c"), durable: true });
    assert!(matches!(&actions[..], [Action::Tell(Update::CallAccepted { replay: Replay::First, .. })]), "{actions:?}");
    let actions = core.handle(Input::Prepared { call_id: cid("c") });
    assert_eq!(actions, [Action::Go { session_id: sid("s"), call_id: cid("c") }]);
    assert_eq!(core.handle(Input::Accepted { call_id: cid("c"), durable: true }), []);
}

#[test]
fn without_a_gate_nothing_is_prepared_before_it_is_accepted() {
    let mut core = core(Config { gated: false, ..Config::default() });
    ready(&mut core, "s", 1);
    assert!(prepared(&core.handle(call("s", 1, "c", 0))).is_empty());
    assert_eq!(prepared(&core.handle(Input::Accepted { call_id: cid("c"), durable: true })), ["c"]);
}

#[test]
fn journal_that_refuses_the_start_keeps_the_call_from_running_and_closes_admission() {
    let mut core = core(Config::default());
    ready(&mut core, "s", 1);
    core.handle(call("s", 1, "c", 0));
    core.handle(Input::Accepted { call_id: cid("c"), durable: true });
    core.handle(Input::Prepared { call_id: cid("c") });
    let actions = core.handle(Input::StartWritten { call_id: cid("c"), durable: false });
    assert_eq!(actions, [Action::Abort { session_id: sid("s"), call_id: cid("c") }]);
    let actions = core.handle(Input::Aborted { call_id: cid("c") });
    assert!(
        matches!(outcome(&actions, "c"), Some(Outcome::NeverStarted { failure, .. }) if failure.code == Code::JournalReadOnly)
    );
    assert_eq!(refusal(&core.handle(call("s", 1, "d", 0))), Code::JournalReadOnly);
}

/// F-33: what a failed sync has left may be there for the next runner to read, and that one would hand the call over.
#[test]
fn call_whose_acceptance_was_refused_is_not_said_to_have_never_run() {
    let mut core = core(Config::default());
    ready(&mut core, "s", 1);
    let mut actions = core.handle(call("s", 1, "c", 0));
    for input in [
        Input::Accepted { call_id: cid("c"), durable: false },
        Input::Prepared { call_id: cid("c") },
        Input::StartWritten { call_id: cid("c"), durable: false },
        Input::Aborted { call_id: cid("c") },
        Input::EndWritten { call_id: cid("c"), durable: false },
    ] {
        actions.extend(core.handle(input));
    }
    assert!(actions.iter().any(|action| matches!(action, Action::WriteFinished { .. })), "{actions:?}");
    assert!(!actions.iter().any(|action| matches!(action, Action::Go { .. })), "{actions:?}");
    assert!(
        !actions
            .iter()
            .any(|action| matches!(action, Action::Tell(Update::CallFinished { .. } | Update::Refused { .. }))),
        "{actions:?}"
    );
}

#[test]
fn sandbox_keeps_a_call_whose_end_is_not_written_down() {
    let mut core = core(Config::default());
    ready(&mut core, "s", 1);
    core.handle(call("s", 1, "c", 0));
    run(&mut core, "c");
    core.handle(ended("c"));
    core.handle(Input::EndWritten { call_id: cid("c"), durable: false });

    let actions = core.handle(Input::Work(WorkItem::Acknowledge { call_id: cid("c") }));

    assert_eq!(actions, [Action::Trim { call_id: cid("c") }]);
}

#[test]
fn accepted_call_is_not_said_to_have_never_run_when_that_cannot_be_written_down() {
    let mut core = core(Config::default());
    ready(&mut core, "s", 1);
    core.handle(call("s", 1, "c", 0));
    core.handle(call("s", 1, "waits", 0));
    core.handle(Input::Accepted { call_id: cid("waits"), durable: true });
    run(&mut core, "c");
    core.handle(ended("c"));

    let told = core.handle(Input::EndWritten { call_id: cid("c"), durable: false });
    core.handle(cancel("s", 1, "waits", CancelMode::Kill));
    core.handle(Input::Prepared { call_id: cid("waits") });
    let cancelled = core.handle(Input::Aborted { call_id: cid("waits") });
    let quiet = core.handle(Input::EndWritten { call_id: cid("waits"), durable: false });

    assert!(matches!(&told[..], [Action::Tell(Update::CallFinished { .. })]), "what ran is told: {told:?}");
    assert!(outcome(&cancelled, "waits").is_some());
    assert_eq!(quiet, [], "the next runner would run it");
}

#[test]
fn calls_of_a_session_start_in_order_one_at_a_time() {
    let mut core = core(Config::default());
    ready(&mut core, "s", 1);
    for id in ["a", "b", "c"] {
        core.handle(call("s", 1, id, 0));
    }
    run(&mut core, "a");
    assert_eq!(prepared(&finish(&mut core, "a")), ["b"]);
    run(&mut core, "b");
    assert_eq!(prepared(&finish(&mut core, "b")), ["c"]);
}

#[test]
fn repeat_is_answered_with_the_result_and_another_request_under_the_same_id_is_refused() {
    let mut core = core(Config::default());
    ready(&mut core, "s", 1);
    core.handle(call("s", 1, "c", 0));
    run(&mut core, "c");
    finish(&mut core, "c");
    let actions = core.handle(call("s", 1, "c", 0));
    assert!(matches!(
        &actions[..],
        [
            Action::Tell(Update::CallAccepted { replay: Replay::Duplicate, .. }),
            Action::Tell(Update::CallFinished { .. })
        ]
    ));
    assert_eq!(refusal(&core.handle(call("s", 1, "c", 1))), Code::CallIdReused);
}

#[test]
fn acknowledged_call_is_never_run_again() {
    let mut core = core(Config::default());
    ready(&mut core, "s", 1);
    core.handle(call("s", 1, "c", 0));
    run(&mut core, "c");
    finish(&mut core, "c");
    core.handle(Input::Work(WorkItem::Acknowledge { call_id: cid("c") }));
    assert_eq!(refusal(&core.handle(call("s", 1, "c", 0))), Code::CallForgotten);
}

#[test]
fn cancel_in_every_phase_before_the_gate_means_that_nothing_ran() {
    // Number of steps taken before the cancel: queued behind another, preparing, prepared, starting.
    for steps in 0..4 {
        let mut core = core(Config::default());
        ready(&mut core, "s", 1);
        if steps == 0 {
            core.handle(call("s", 1, "first", 0));
        }
        core.handle(call("s", 1, "c", 0));
        if steps == 2 {
            core.handle(Input::Prepared { call_id: cid("c") });
        }
        if steps == 3 {
            core.handle(Input::Prepared { call_id: cid("c") });
            core.handle(Input::Accepted { call_id: cid("c"), durable: true });
        }
        let mut actions = core.handle(cancel("s", 1, "c", CancelMode::Interrupt));
        actions.extend(core.handle(Input::Prepared { call_id: cid("c") }));
        actions.extend(core.handle(Input::StartWritten { call_id: cid("c"), durable: true }));
        actions.extend(core.handle(Input::Aborted { call_id: cid("c") }));
        assert!(!actions.iter().any(|action| matches!(action, Action::Go { .. })), "step {steps}: {actions:?}");
        assert!(
            matches!(outcome(&actions, "c"), Some(Outcome::Cancelled { before_start: true, .. })),
            "step {steps}: {actions:?}"
        );
    }
}

#[test]
fn running_call_is_cancelled_once_per_hardness() {
    let mut core = core(Config::default());
    ready(&mut core, "s", 1);
    core.handle(call("s", 1, "c", 0));
    run(&mut core, "c");
    let sent = |actions: Vec<Action>| actions.iter().any(|action| matches!(action, Action::Cancel { .. }));
    assert!(sent(core.handle(cancel("s", 1, "c", CancelMode::Interrupt))));
    assert!(!sent(core.handle(cancel("s", 1, "c", CancelMode::Interrupt))));
    assert!(sent(core.handle(cancel("s", 1, "c", CancelMode::Kill))));
    assert!(!sent(core.handle(cancel("s", 1, "c", CancelMode::Terminate))));
}

#[test]
fn cancel_of_an_unknown_call_leaves_a_tombstone_and_tombstones_are_bounded() {
    let mut core = core(Config { tombstones: 2, ..Config::default() });
    ready(&mut core, "s", 1);
    for id in ["a", "b", "c"] {
        let actions = core.handle(cancel("s", 1, id, CancelMode::Kill));
        assert!(matches!(&actions[..], [Action::WriteCancelled { epoch: 1, .. }]));
    }
    assert_eq!(refusal(&core.handle(call("s", 1, "c", 0))), Code::CancelledBeforeStart);
    assert!(!core.handle(call("s", 1, "a", 0)).iter().any(|a| matches!(a, Action::Tell(Update::Refused { .. }))));
}

/// Seed 4640 of the simulation: the next runner knew nothing of a cancel that had been confirmed.
#[test]
fn cancel_that_the_journal_has_refused_is_not_confirmed_when_it_is_repeated() {
    let mut core = core(Config::default());
    ready(&mut core, "s", 1);
    core.handle(cancel("s", 1, "c", CancelMode::Kill));
    let written = |durable| Input::CancelWritten { call_id: cid("c"), epoch: 1, phase: None, durable };
    assert_eq!(refusal(&core.handle(written(false))), Code::JournalReadOnly);

    let repeated = core.handle(cancel("s", 1, "c", CancelMode::Kill));

    assert!(matches!(&repeated[..], [Action::WriteCancelled { epoch: 1, .. }]), "{repeated:?}");
    assert_eq!(refusal(&core.handle(written(false))), Code::JournalReadOnly);
}

#[test]
fn stale_epochs_are_refused_and_a_newer_one_takes_the_session_over() {
    let mut core = core(Config::default());
    ready(&mut core, "s", 5);
    assert_eq!(refusal(&core.handle(open("s", 4))), Code::StaleEpoch);
    assert_eq!(refusal(&core.handle(call("s", 4, "c", 0))), Code::StaleEpoch);
    assert_eq!(refusal(&core.handle(close("s", 4))), Code::StaleEpoch);
    core.handle(open("s", 6));
    let actions = core.handle(Input::ReadyWritten { session_id: sid("s"), durable: true });
    let told = Update::SessionOpened {
        session_id: sid("s"),
        epoch: 6,
        receipt: Receipt::default(),
        replay: Replay::Duplicate,
    };
    assert_eq!(actions.last(), Some(&Action::Tell(told)));
    assert_eq!(
        refusal(
            &core
                .handle(cancel("s", 5, "x", CancelMode::Kill))
                .into_iter()
                .chain(core.handle(call("s", 5, "d", 0)))
                .collect::<Vec<_>>()
        ),
        Code::StaleEpoch
    );
}

#[test]
fn late_duplicate_of_an_ended_session_is_refused() {
    let mut core = core(Config::default());
    ready(&mut core, "s", 5);
    core.handle(close("s", 5));
    let actions = core.handle(Input::SandboxClosed { session_id: sid("s") });
    assert!(actions.iter().any(|a| matches!(a, Action::Tell(Update::SessionEnded { end: SessionEnd::Closed, .. }))));
    assert_eq!(refusal(&core.handle(open("s", 5))), Code::StaleEpoch);
    assert!(core.handle(open("s", 6)).iter().any(|a| matches!(a, Action::CreateSandbox(_))));
}

#[test]
fn lost_sandbox_leaves_honest_outcomes_and_the_end_of_the_session_comes_last() {
    let mut core = core(Config::default());
    ready(&mut core, "s", 1);
    core.handle(call("s", 1, "running", 0));
    core.handle(call("s", 1, "waiting", 0));
    run(&mut core, "running");
    core.handle(Input::Accepted { call_id: cid("waiting"), durable: true });
    let actions = core.handle(Input::SandboxLost { session_id: sid("s"), reason: "gone".into() });
    assert!(matches!(outcome(&actions, "running"), Some(Outcome::Indeterminate { .. })));
    assert!(matches!(outcome(&actions, "waiting"), Some(Outcome::NeverStarted { .. })));
    let ends = |actions: &[Action]| actions.iter().any(|a| matches!(a, Action::Tell(Update::SessionEnded { .. })));
    assert!(!ends(&actions));
    assert!(!ends(&core.handle(Input::EndWritten { call_id: cid("running"), durable: true })));
    assert!(ends(&core.handle(Input::EndWritten { call_id: cid("waiting"), durable: true })));
}

#[test]
fn full_queues_refuse_and_never_grow() {
    let mut core = core(Config { queued_per_session: 2, queued_per_runner: 3, ..Config::default() });
    ready(&mut core, "a", 1);
    ready(&mut core, "b", 2);
    for id in ["a0", "a1", "a2"] {
        core.handle(call("a", 1, id, 0));
    }
    assert_eq!(refusal(&core.handle(call("a", 1, "a3", 0))), Code::QueueFull);
    core.handle(call("b", 2, "b0", 0));
    core.handle(call("b", 2, "b1", 0));
    assert_eq!(refusal(&core.handle(call("b", 2, "b2", 0))), Code::QueueFull);
    assert_eq!(core.queued_calls(), 3);
}

#[test]
fn limit_of_the_whole_runner_is_shared_in_turn() {
    let mut core = core(Config { running_per_runner: 1, ..Config::default() });
    ready(&mut core, "a", 1);
    ready(&mut core, "b", 2);
    core.handle(call("a", 1, "a0", 0));
    core.handle(call("a", 1, "a1", 0));
    assert!(prepared(&core.handle(call("b", 2, "b0", 0))).is_empty());
    run(&mut core, "a0");
    let started = prepared(&finish(&mut core, "a0"));
    assert_eq!(started.len(), 1);
    run(&mut core, &started[0]);
    let mut all = started;
    let next = prepared(&finish(&mut core, &all[0].clone()));
    all.extend(next);
    all.sort();
    assert_eq!(all, ["a1", "b0"]);
}

#[test]
fn waiting_too_long_refuses_to_start() {
    let mut core = core(Config::default());
    ready(&mut core, "s", 1);
    core.handle(call("s", 1, "a", 0));
    let actions = core.handle(call("s", 1, "b", 0));
    assert!(actions.contains(&Action::ArmStartDeadline { call_id: cid("b"), within: Duration::from_secs(1) }));
    let actions = core.handle(Input::StartDeadline { call_id: cid("b") });
    assert!(
        matches!(outcome(&actions, "b"), Some(Outcome::NeverStarted { failure, .. }) if failure.code == Code::StartDeadlinePassed)
    );
    // A call that was prepared is not subject to it any more.
    assert!(core.handle(Input::StartDeadline { call_id: cid("a") }).is_empty());
}

#[test]
fn suspended_runner_starts_nothing_until_it_is_resumed() {
    let mut core = core(Config::default());
    ready(&mut core, "s", 1);
    core.handle(Input::Work(WorkItem::Suspend { session_id: None }));
    assert!(prepared(&core.handle(call("s", 1, "c", 0))).is_empty());
    assert_eq!(prepared(&core.handle(Input::Work(WorkItem::Resume { session_id: None }))), ["c"]);
}

fn drain(core: &mut Core, mode: DrainMode, by: DrainedBy) -> Vec<Action> {
    core.handle(Input::Work(WorkItem::Drain { mode, by }))
}

/// F-63: what each mode refuses, and what goes on.
#[test]
fn each_mode_of_a_drain_refuses_what_it_says_and_nothing_else() {
    let mut core = core(Config::default());
    ready(&mut core, "s", 1);
    core.handle(call("s", 1, "running", 0));
    run(&mut core, "running");

    drain(&mut core, DrainMode::FinishSessions, DrainedBy::Orchestrator);
    assert_eq!(refusal(&core.handle(open("new", 2))), Code::Draining);
    let taken = core.handle(call("s", 1, "waiting", 0));
    assert!(taken.iter().any(|action| matches!(action, Action::WriteAccepted(_))), "{taken:?}");

    let calls = drain(&mut core, DrainMode::FinishCalls, DrainedBy::Orchestrator);
    assert!(!calls.iter().any(|action| matches!(action, Action::CloseSandbox { .. })), "a call runs: {calls:?}");
    assert_eq!(refusal(&core.handle(call("s", 1, "late", 0))), Code::Draining);

    let now = drain(&mut core, DrainMode::Now, DrainedBy::Orchestrator);
    assert!(now.iter().any(|action| matches!(action, Action::CloseSandbox { .. })), "{now:?}");
    assert!(matches!(outcome(&now, "waiting"), Some(Outcome::Cancelled { before_start: true, .. })), "{now:?}");
    assert_eq!(refusal(&core.handle(call("s", 1, "later", 0))), Code::Draining);

    let undone = drain(&mut core, DrainMode::Undo, DrainedBy::Orchestrator);
    assert!(matches!(&undone[..], [Action::Tell(Update::Drained { draining: false, .. })]), "{undone:?}");
    assert!(core.handle(open("new", 2)).iter().any(|action| matches!(action, Action::CreateSandbox(_))));
}

/// F-63: a process that was told to end does so, whatever comes on the link meanwhile.
#[test]
fn orchestrator_can_neither_undo_nor_soften_what_the_operator_has_asked_for() {
    let mut core = core(Config::default());
    drain(&mut core, DrainMode::FinishCalls, DrainedBy::Operator);
    for mode in [DrainMode::Undo, DrainMode::FinishSessions] {
        let told = drain(&mut core, mode, DrainedBy::Orchestrator);
        assert!(matches!(&told[..], [Action::Tell(Update::Drained { draining: true, .. })]), "{told:?}");
        assert_eq!(refusal(&core.handle(open("new", 2))), Code::Draining);
    }
}

#[test]
fn drain_of_calls_refuses_new_ones_and_closes_sessions_when_they_are_idle() {
    let mut core = core(Config::default());
    ready(&mut core, "idle", 1);
    ready(&mut core, "busy", 2);
    core.handle(call("busy", 2, "c", 0));
    run(&mut core, "c");
    let closes = |actions: &[Action]| -> Vec<String> {
        actions
            .iter()
            .filter_map(|action| match action {
                Action::CloseSandbox { session_id, .. } => Some(session_id.to_string()),
                _ => None,
            })
            .collect()
    };
    assert_eq!(closes(&drain(&mut core, DrainMode::FinishCalls, DrainedBy::Orchestrator)), ["idle"]);
    assert_eq!(refusal(&core.handle(call("busy", 2, "d", 0))), Code::Draining);
    assert_eq!(refusal(&core.handle(open("new", 3))), Code::Draining);
    assert_eq!(closes(&finish(&mut core, "c")), ["busy"]);
}

#[test]
fn close_while_the_sandbox_is_being_made_ends_it_as_soon_as_it_is_there() {
    let mut core = core(Config::default());
    core.handle(open("s", 1));
    assert!(core.handle(close("s", 1)).is_empty());
    let actions = core.handle(Input::SandboxReady {
        session_id: sid("s"),
        sandbox_id: sandbox_id(),
        receipt: Receipt::default(),
    });
    assert!(matches!(&actions[..], [Action::CloseSandbox { .. }]));
    // The next runner would make its sandbox anew, so that it is over is on disk before it is told.
    let actions = core.handle(Input::SandboxClosed { session_id: sid("s") });
    assert_eq!(actions, [Action::WriteEnded { session_id: sid("s"), epoch: 1 }]);
    let actions = core.handle(Input::EndedWritten { session_id: sid("s"), durable: true });
    assert!(actions.iter().any(|a| matches!(a, Action::Tell(Update::SessionEnded { .. }))));
}

#[test]
fn call_that_is_ready_when_its_session_is_closed_does_not_begin() {
    let mut core = core(Config::default());
    ready(&mut core, "s", 1);
    core.handle(call("s", 1, "c", 0));
    core.handle(Input::Prepared { call_id: cid("c") });
    core.handle(close("s", 1));

    // Its processes may still have time to end.
    assert_eq!(
        core.handle(Input::StartWritten { call_id: cid("c"), durable: true }).len(),
        1,
        "only its acceptance is told"
    );
    let actions = core.handle(Input::SandboxClosed { session_id: sid("s") });

    let cancelled = Outcome::Cancelled { mode: CancelMode::Terminate, before_start: true, killed: false, code: 125 };
    assert_eq!(outcome(&actions, "c"), Some(cancelled));
}

#[test]
fn end_of_a_call_is_told_after_its_acceptance_whichever_is_heard_first_to_be_on_the_disk() {
    for is_taken in [true, false] {
        let mut core = core(Config::default());
        ready(&mut core, "s", 1);
        core.handle(call("s", 1, "runs", 0));
        core.handle(call("s", 1, "waits", 0));
        core.handle(cancel("s", 1, "waits", CancelMode::Terminate));
        if !is_taken {
            core.handle(Input::AcceptRefused { call_id: cid("waits"), reason: "the disk is slow".into() });
        }

        let told = core.handle(Input::EndWritten { call_id: cid("waits"), durable: true });

        let is_accepted = |action: &Action| matches!(action, Action::Tell(Update::CallAccepted { .. }));
        let is_finished = |action: &Action| matches!(action, Action::Tell(Update::CallFinished { .. }));
        assert_eq!(told.first().is_some_and(is_accepted), is_taken, "{told:?}");
        assert_eq!(told.iter().position(is_finished), Some(usize::from(is_taken)), "{told:?}");
        if is_taken {
            let late = core.handle(Input::Accepted { call_id: cid("waits"), durable: true });
            assert!(late.is_empty(), "told again: {late:?}");
        }
    }
}
