//! What becomes of what an earlier runner left, one row of the table at a time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::core::{Action, Config, Core, IdlePolicy, Input};
use super::core_tests::{call, cid, core, open, sandbox_id, sid};
use crate::journal::{Recovered, RecoveredCall, RecoveredPhase, RecoveredSession};
use crate::work::*;

fn session(acknowledged: &[&str]) -> RecoveredSession {
    let Input::Work(WorkItem::Open(open)) = open("s", 3) else { panic!("an open") };
    RecoveredSession {
        open,
        sandbox: Some((sandbox_id(), Receipt { tier: "full".into(), ..Receipt::default() })),
        acknowledged: acknowledged.iter().map(|id| cid(id)).collect(),
    }
}

pub(super) fn held(id: &str, cancel: Option<CancelMode>, phase: RecoveredPhase) -> RecoveredCall {
    let Input::Work(WorkItem::Call(call)) = call("s", 3, id, 0) else { panic!("a call") };
    let starts = u32::from(phase == RecoveredPhase::Started);
    RecoveredCall { call, cancel, phase, starts, resumes: Some(0) }
}

fn result() -> Arc<CallResult> {
    let end = CallEnd::without_output(Outcome::Exited { code: 7 });
    Arc::new(CallResult { end, presented: ToolResult::text(false, "done"), recovered: false })
}

pub(super) fn left(calls: Vec<RecoveredCall>) -> Recovered {
    Recovered { same_boot: true, epoch_floor: 2, sessions: vec![session(&[])], calls, ..Recovered::default() }
}

/// Restores, attaches with what the sandbox says, and lets work go on. Returns the core and everything that it asked for.
pub(super) fn attached(recovered: Recovered, found: &[(&str, FoundCall)]) -> (Core, Vec<Action>) {
    let mut core = core(Config::default());
    let mut actions = core.handle(Input::Recovered(Box::new(recovered)));
    let found: BTreeMap<_, _> = found.iter().map(|(id, found)| (cid(id), *found)).collect();
    actions.extend(core.handle(Input::SandboxAttached { session_id: sid("s"), found, processes: Processes::Run }));
    actions.extend(core.handle(Input::Work(WorkItem::Resume { session_id: None })));
    written(&mut core, &mut actions);
    (core, actions)
}

/// The starts that were asked for are written down.
fn written(core: &mut Core, actions: &mut Vec<Action>) {
    for action in actions.clone() {
        if let Action::WriteStarted { call_id } = action {
            actions.extend(core.handle(Input::StartWritten { call_id, durable: true }));
        }
    }
}

pub(super) fn outcome_of(actions: &[Action], id: &str) -> Option<Outcome> {
    actions.iter().find_map(|action| match action {
        Action::WriteFinished { call_id, result } if *call_id == cid(id) => Some(result.end.outcome.clone()),
        _ => None,
    })
}

fn is_handed_over(actions: &[Action], id: &str) -> bool {
    actions.iter().any(|action| match action {
        Action::Prepare { call, .. } => call.call_id == cid(id),
        Action::Go { call_id, .. } => *call_id == cid(id),
        _ => false,
    })
}

#[test]
fn nothing_left_is_told_at_once() {
    let actions = core(Config::default()).handle(Input::Recovered(Box::default()));

    assert_eq!(actions, [Action::Tell(Update::Restored)]);
}

fn ends_unknown(actions: &[Action]) -> Vec<Option<SessionId>> {
    let unknown = actions.iter().filter_map(|action| match action {
        Action::EndUnknown { session_id } => Some(session_id.clone()),
        _ => None,
    });
    unknown.collect()
}

fn attach(core: &mut Core) -> Vec<Action> {
    let found = BTreeMap::new();
    core.handle(Input::SandboxAttached { session_id: sid("s"), found, processes: Processes::Run })
}

/// F-66: what the journal does not know may be in a newer one.
#[test]
fn what_is_unknown_is_ended_once_and_not_before_somebody_confirms_that_this_runner_serves() {
    let mut core = core(Config::default());
    let resume = || Input::Work(WorkItem::Resume { session_id: None });

    let mut before = core.handle(Input::Recovered(Box::new(left(Vec::new()))));
    before.extend(attach(&mut core));

    assert_eq!(ends_unknown(&before), []);
    assert_eq!(ends_unknown(&core.handle(resume())), [None, Some(sid("s"))]);
    assert_eq!(ends_unknown(&core.handle(resume())), []);
}

#[test]
fn sandbox_that_is_taken_over_after_the_confirmation_is_confirmed_with_it() {
    let mut core = core(Config::default());
    core.handle(Input::Recovered(Box::new(left(Vec::new()))));

    let resumed = core.handle(Input::Work(WorkItem::Resume { session_id: None }));

    assert_eq!(ends_unknown(&resumed), [None]);
    assert_eq!(ends_unknown(&attach(&mut core)), [Some(sid("s"))]);
}

#[test]
fn session_that_an_orchestrator_does_not_mention_keeps_what_the_journal_does_not_know_until_it_is_adopted() {
    let mut core = core(Config::default());
    core.handle(Input::Recovered(Box::new(left(Vec::new()))));
    attach(&mut core);

    let mut actions = core.handle(Input::Work(WorkItem::Suspend { session_id: Some(sid("s")) }));
    actions.extend(core.handle(Input::Work(WorkItem::Resume { session_id: None })));

    assert_eq!(ends_unknown(&actions), [None]);
    let adopted = core.handle(Input::Work(WorkItem::Resume { session_id: Some(sid("s")) }));
    assert_eq!(ends_unknown(&adopted), [Some(sid("s"))]);
}

#[test]
fn session_that_nobody_has_confirmed_is_not_idle() {
    let idle = IdlePolicy { stop_after: Some(Duration::from_secs(9)), ..IdlePolicy::default() };
    let mut core = core(Config { idle, ..Config::default() });
    let mut before = core.handle(Input::Recovered(Box::new(left(Vec::new()))));
    before.extend(attach(&mut core));
    before.extend(core.handle(Input::IdlePassed { session_id: sid("s") }));

    let after = core.handle(Input::Work(WorkItem::Resume { session_id: None }));

    let rests =
        |action: &Action| matches!(action, Action::ArmIdle { .. } | Action::Stop { .. } | Action::Freeze { .. });
    assert!(!before.iter().any(rests), "{before:?}");
    assert!(after.iter().any(rests), "{after:?}");
}

#[test]
fn link_waits_until_every_sandbox_is_attached_or_lost() {
    let mut core = core(Config::default());

    let first = core.handle(Input::Recovered(Box::new(left(Vec::new()))));
    let second = core.handle(Input::SandboxLost { session_id: sid("s"), reason: "gone".into() });

    assert!(!first.contains(&Action::Tell(Update::Restored)));
    assert!(second.contains(&Action::Tell(Update::Restored)));
    assert!(second.iter().any(|action| matches!(action, Action::Tell(Update::SessionEnded { epoch: 3, .. }))));
}

#[test]
fn accepted_call_is_handed_over_in_its_turn_once_it_may_be() {
    let calls = vec![held("a", None, RecoveredPhase::Accepted), held("b", None, RecoveredPhase::Accepted)];
    let mut core = core(Config::default());
    core.handle(Input::Recovered(Box::new(left(calls))));

    let before =
        core.handle(Input::SandboxAttached { session_id: sid("s"), found: BTreeMap::new(), processes: Processes::Run });
    let mut after = core.handle(Input::Work(WorkItem::Resume { session_id: None }));
    assert!(!is_handed_over(&after, "a"), "an earlier runner may have died of it, so this one is counted first");
    written(&mut core, &mut after);

    assert!(!is_handed_over(&before, "a"), "no orchestrator has confirmed it yet");
    assert!(is_handed_over(&after, "a") && !is_handed_over(&after, "b"));
    assert!(
        !before.iter().chain(&after).any(|action| matches!(action, Action::WriteAccepted(_))),
        "it is written down"
    );
}

#[test]
fn started_call_that_waits_at_its_gate_is_told_to_go() {
    let calls = vec![held("a", None, RecoveredPhase::Started)];

    let (_, actions) = attached(left(calls), &[("a", FoundCall::Prepared)]);

    assert!(actions.contains(&Action::Go { session_id: sid("s"), call_id: cid("a") }));
    assert!(!actions.iter().any(|action| matches!(action, Action::Prepare { .. })));
}

/// F-65: each of three runners has died when it was about to start it.
#[test]
fn call_that_three_runners_died_of_is_answered_as_poison_and_the_next_one_has_its_turn() {
    let poison = |starts| RecoveredCall { starts, ..held("a", None, RecoveredPhase::Started) };
    let calls = |starts| left(vec![poison(starts), held("b", None, RecoveredPhase::Accepted)]);

    let (_, tried) = attached(calls(2), &[]);
    assert!(is_handed_over(&tried, "a") && outcome_of(&tried, "a").is_none(), "{tried:?}");

    let (_, absent) = attached(calls(3), &[]);
    assert!(!is_handed_over(&absent, "a") && is_handed_over(&absent, "b"), "{absent:?}");
    let is_poison =
        |outcome| matches!(outcome, Some(Outcome::NeverStarted { failure, .. }) if failure.code == Code::Poison);
    assert!(is_poison(outcome_of(&absent, "a")), "{absent:?}");

    let (mut core, gated) = attached(calls(3), &[("a", FoundCall::Prepared)]);
    assert!(gated.contains(&Action::Abort { session_id: sid("s"), call_id: cid("a") }) && !is_handed_over(&gated, "a"));
    assert!(is_poison(outcome_of(&core.handle(Input::Aborted { call_id: cid("a") }), "a")));
}

/// F-65: a gate that nobody may open yet says nothing about the call behind it.
#[test]
fn restart_without_a_lease_is_not_counted_against_a_call_that_waits_at_its_gate() {
    let mut core = core(Config::default());
    core.handle(Input::Recovered(Box::new(left(vec![held("a", None, RecoveredPhase::Started)]))));
    let found = BTreeMap::from([(cid("a"), FoundCall::Prepared)]);

    let attached = core.handle(Input::SandboxAttached { session_id: sid("s"), found, processes: Processes::Run });
    let resumed = core.handle(Input::Work(WorkItem::Resume { session_id: None }));

    assert!(!attached.contains(&Action::WriteStarted { call_id: cid("a") }), "{attached:?}");
    let unknown = [None, Some(sid("s"))].map(|session_id| Action::EndUnknown { session_id });
    assert_eq!(resumed, [&unknown[..], &[Action::WriteStarted { call_id: cid("a") }]].concat());
}

#[test]
fn cancel_ends_a_restored_call_whose_start_is_being_written_down() {
    let mut core = core(Config::default());
    core.handle(Input::Recovered(Box::new(left(vec![held("a", None, RecoveredPhase::Accepted)]))));
    core.handle(Input::SandboxAttached { session_id: sid("s"), found: BTreeMap::new(), processes: Processes::Run });
    core.handle(Input::Work(WorkItem::Resume { session_id: None }));

    let cancelled = core.handle(super::core_tests::cancel("s", 3, "a", CancelMode::Kill));
    let late = core.handle(Input::StartWritten { call_id: cid("a"), durable: true });

    assert!(matches!(outcome_of(&cancelled, "a"), Some(Outcome::Cancelled { before_start: true, .. })));
    assert_eq!(late, []);
}

#[test]
fn call_that_never_arrived_is_answered_when_its_session_is_closed_meanwhile() {
    let mut core = core(Config::default());
    core.handle(Input::Recovered(Box::new(left(vec![held("a", None, RecoveredPhase::Started)]))));
    core.handle(super::core_tests::close("s", 3));

    let actions =
        core.handle(Input::SandboxAttached { session_id: sid("s"), found: BTreeMap::new(), processes: Processes::Run });

    assert!(matches!(outcome_of(&actions, "a"), Some(Outcome::Cancelled { before_start: true, .. })), "{actions:?}");
    assert!(actions.iter().any(|action| matches!(action, Action::CloseSandbox { .. })));
}

#[test]
fn call_whose_output_was_not_to_be_sent_while_it_runs_stays_so() {
    let mut quiet = held("a", None, RecoveredPhase::Started);
    quiet.call.quiet = true;
    let (_, actions) = attached(left(vec![quiet]), &[("a", FoundCall::Running)]);
    let told = |action: &Action| matches!(action, Action::Tell(Update::CallRestored { quiet: true, .. }));
    assert!(actions.iter().any(told), "{actions:?}");
}

#[test]
fn running_call_is_left_alone_and_its_end_is_written_down() {
    let calls = vec![held("a", None, RecoveredPhase::Started)];
    let (mut core, actions) = attached(left(calls), &[("a", FoundCall::Running)]);
    assert!(!is_handed_over(&actions, "a") && outcome_of(&actions, "a").is_none());
    assert!(core.is_restored(&cid("a")));

    let end = core.handle(Input::Ended { call_id: cid("a"), result: result() });

    assert_eq!(outcome_of(&end, "a"), Some(Outcome::Exited { code: 7 }));
}

#[test]
fn started_call_that_never_arrived_in_its_sandbox_is_handed_over_before_those_that_waited() {
    let calls = vec![held("b", None, RecoveredPhase::Started), held("a", None, RecoveredPhase::Accepted)];

    let (core, actions) = attached(left(calls), &[]);

    assert!(is_handed_over(&actions, "b") && !is_handed_over(&actions, "a"), "{actions:?}");
    assert_eq!(outcome_of(&actions, "b"), None);
    let armed = |action: &Action| matches!(action, Action::ArmStartDeadline { call_id, .. } if *call_id == cid("b"));
    assert!(actions.iter().any(armed), "it waits no longer than its caller allowed");
    assert_eq!((core.running_calls(), core.queued_calls()), (1, 1));
}

/// F-66: a runner whose state was set back had the sandbox meanwhile, and dropped what it did not know.
#[test]
fn call_whose_id_its_sandbox_remembers_has_begun_there_and_its_outcome_is_unknown() {
    for cancel in [None, Some(CancelMode::Kill)] {
        let (mut core, actions) = attached(left(vec![held("a", None, RecoveredPhase::Started)]), &[]);
        assert!(is_handed_over(&actions, "a"), "{actions:?}");
        if let Some(mode) = cancel {
            core.handle(Input::Work(WorkItem::Cancel { session_id: sid("s"), epoch: 3, call_id: cid("a"), mode }));
        }
        let failure = ToolFailure::new(Code::CallIdReused, "another call has this id", "none");

        let actions = core.handle(Input::PrepareFailed { call_id: cid("a"), failure });

        let Some(Outcome::Indeterminate { failure }) = outcome_of(&actions, "a") else { panic!("{actions:?}") };
        assert_eq!(failure.code, Code::OutcomeUnknown);
    }
}

#[test]
fn calls_that_never_arrived_wait_again_in_the_order_in_which_they_were_accepted() {
    let mut calls = ["c", "a", "b"].map(|id| held(id, None, RecoveredPhase::Started));
    for held in &mut calls {
        held.call.input = ToolInput::Read(ReadInput { file_path: "f".into(), view_range: None });
    }
    let mut recovered = left(calls.to_vec());
    recovered.sessions[0].open.max_concurrent_calls = 3;

    let (_, actions) = attached(recovered, &[]);

    let prepared = actions.iter().filter_map(|action| match action {
        Action::Prepare { call, .. } => Some(call.call_id.as_str()),
        _ => None,
    });
    assert_eq!(prepared.collect::<Vec<_>>(), ["c", "a", "b"]);
}

/// F-18: what ran is indeterminate, and everybody hears why.
#[test]
fn another_boot_loses_the_sandbox_and_leaves_each_call_with_what_is_known() {
    let calls = vec![
        held("started", None, RecoveredPhase::Started),
        held("queued", None, RecoveredPhase::Accepted),
        held("done", None, RecoveredPhase::Finished(result())),
    ];
    let mut core = core(Config::default());

    let actions = core.handle(Input::Recovered(Box::new(Recovered { same_boot: false, ..left(calls) })));

    let Some(Outcome::Indeterminate { failure }) = outcome_of(&actions, "started") else { panic!("{actions:?}") };
    assert_eq!(failure.code, Code::HostRebooted);
    let Some(Outcome::NeverStarted { failure, .. }) = outcome_of(&actions, "queued") else { panic!("{actions:?}") };
    assert_eq!(failure.code, Code::HostRebooted);
    assert_eq!(outcome_of(&actions, "done"), None, "it has its outcome");
    let told = |action: &Action| matches!(action, Action::Tell(Update::CallFinished { call_id, .. }) if *call_id == cid("done"));
    assert!(actions.iter().any(told));
    assert!(!actions.iter().any(|action| matches!(action, Action::AttachSandbox { .. })));
    assert!(actions.contains(&Action::Tell(Update::Restored)));
    core.handle(Input::EndWritten { call_id: cid("started"), durable: true });
    let over = core.handle(Input::EndWritten { call_id: cid("queued"), durable: true });
    let end = Update::SessionEnded { session_id: sid("s"), epoch: 3, end: SessionEnd::HostRebooted };
    assert!(over.contains(&Action::Tell(end)), "{over:?}");
}

#[test]
fn cancel_is_applied_again_or_ends_what_has_not_begun() {
    let cancel = Some(CancelMode::Terminate);
    let calls =
        vec![held("running", cancel, RecoveredPhase::Started), held("queued", cancel, RecoveredPhase::Accepted)];
    let (_, actions) = attached(left(calls), &[("running", FoundCall::Running)]);
    let again = Action::Cancel { session_id: sid("s"), call_id: cid("running"), mode: CancelMode::Terminate };
    assert!(actions.contains(&again));
    assert!(matches!(outcome_of(&actions, "queued"), Some(Outcome::Cancelled { before_start: true, .. })));

    let calls = vec![held("gated", cancel, RecoveredPhase::Started)];
    let (_, actions) = attached(left(calls), &[("gated", FoundCall::Prepared)]);
    assert!(actions.contains(&Action::Abort { session_id: sid("s"), call_id: cid("gated") }));
    assert!(!is_handed_over(&actions, "gated"));
}

#[test]
fn finished_call_is_told_again_until_it_is_acknowledged() {
    let (mut core, actions) =
        attached(left(vec![held("a", None, RecoveredPhase::Finished(result()))]), &[("a", FoundCall::Finished)]);
    assert!(actions.iter().any(|action| matches!(action, Action::Tell(Update::CallFinished { .. }))));

    let actions = core.handle(Input::Work(WorkItem::Acknowledge { call_id: cid("a") }));

    assert_eq!(actions, [Action::Trim { call_id: cid("a") }, Action::Acknowledge { call_id: cid("a") }]);
}

#[test]
fn acknowledged_and_cancelled_ids_do_not_run_after_a_restart() {
    let recovered = Recovered {
        tombstones: vec![cid("cancelled")],
        sessions: vec![session(&["acknowledged"])],
        ..left(Vec::new())
    };
    let (mut core, _) = attached(recovered, &[]);

    for id in ["acknowledged", "cancelled"] {
        let actions = core.handle(call("s", 3, id, 0));
        assert!(matches!(&actions[..], [Action::Tell(Update::Refused { .. })]), "{id}: {actions:?}");
    }
}

#[test]
fn late_duplicate_of_a_forgotten_session_is_refused_and_a_repeat_of_a_known_call_runs_once() {
    let (mut core, _) = attached(left(vec![held("a", None, RecoveredPhase::Started)]), &[("a", FoundCall::Running)]);

    let repeated = core.handle(call("s", 3, "a", 0));
    let late = core.handle(open("old", 2));

    assert!(matches!(&repeated[..], [Action::Tell(Update::CallAccepted { replay: Replay::Duplicate, .. })]));
    assert!(matches!(&late[..], [Action::Tell(Update::Refused { .. })]), "{late:?}");
}

#[test]
fn session_whose_sandbox_was_being_made_gets_another_one() {
    let mut recovered = left(vec![held("a", None, RecoveredPhase::Accepted)]);
    recovered.sessions[0].sandbox = None;
    let mut core = core(Config::default());

    let actions = core.handle(Input::Recovered(Box::new(recovered)));
    assert!(actions.iter().any(|action| matches!(action, Action::CreateSandbox(open) if open.epoch == 3)));

    core.handle(Input::Work(WorkItem::Resume { session_id: None }));
    let ready = Input::SandboxReady { session_id: sid("s"), sandbox_id: sandbox_id(), receipt: Receipt::default() };
    let recorded = core.handle(ready);
    assert!(matches!(&recorded[..], [Action::WriteReady { .. }]));
    let mut actions = core.handle(Input::ReadyWritten { session_id: sid("s"), durable: true });
    written(&mut core, &mut actions);
    assert!(is_handed_over(&actions, "a"));
}

#[test]
fn session_and_tombstone_are_promised_only_when_they_are_written_down() {
    let mut core = core(Config::default());
    core.handle(open("s", 1));
    let ready = Input::SandboxReady { session_id: sid("s"), sandbox_id: sandbox_id(), receipt: Receipt::default() };
    assert!(!core.handle(ready).iter().any(|action| matches!(action, Action::Tell(_))));
    let refused = core.handle(Input::ReadyWritten { session_id: sid("s"), durable: false });
    assert!(refused.iter().any(|action| matches!(action, Action::CloseSandbox { .. })), "{refused:?}");
    assert!(core.is_read_only());

    let cancel = super::core_tests::cancel("s", 1, "unseen", CancelMode::Kill);
    let actions = core.handle(cancel);
    assert!(matches!(&actions[..], [Action::WriteCancelled { .. }]), "{actions:?}");
    let written = Input::CancelWritten { call_id: cid("unseen"), epoch: 1, phase: None, durable: true };
    assert!(matches!(&core.handle(written)[..], [Action::Tell(Update::CancelNoted { phase: None, .. })]));
}

#[test]
fn cancel_that_the_disk_does_not_take_is_refused_and_leaves_nothing_that_was_promised_before() {
    let (mut core, _) = attached(Recovered { tombstones: vec![cid("promised")], ..left(Vec::new()) }, &[]);
    let kill = |id| super::core_tests::cancel("s", 3, id, CancelMode::Kill);
    let again = core.handle(kill("promised"));
    assert!(matches!(&again[..], [Action::Tell(Update::CancelNoted { phase: None, .. })]), "{again:?}");
    core.handle(kill("unseen"));
    assert_eq!(core.handle(kill("unseen")), [], "its answer is on its way");

    let reason = "4 records wait".to_owned();
    let refused = core.handle(Input::CancelRefused { call_id: cid("unseen"), epoch: 3, phase: None, reason });

    assert!(
        matches!(&refused[..], [Action::Tell(Update::Refused { failure, .. })] if failure.retryable),
        "{refused:?}"
    );
    assert!(!core.is_read_only());
    assert!(core.handle(call("s", 3, "unseen", 0)).iter().any(|action| matches!(action, Action::WriteAccepted(_))));
    let late = core.handle(call("s", 3, "promised", 0));
    assert!(matches!(&late[..], [Action::Tell(Update::Refused { .. })]), "{late:?}");
}

#[test]
fn cancel_of_a_call_that_waits_is_told_when_it_is_written_down() {
    let calls = vec![held("a", None, RecoveredPhase::Accepted)];
    let mut core = core(Config::default());
    core.handle(Input::Recovered(Box::new(left(calls))));

    let actions = core.handle(super::core_tests::cancel("s", 3, "a", CancelMode::Kill));
    assert!(!actions.iter().any(|action| matches!(action, Action::Tell(_))), "{actions:?}");
    assert!(matches!(&actions[..], [Action::WriteCancelled { .. }, Action::WriteFinished { .. }]), "{actions:?}");

    let phase = Some(CallPhase::Accepted);
    let written = Input::CancelWritten { call_id: cid("a"), epoch: 3, phase, durable: true };
    assert!(matches!(&core.handle(written)[..], [Action::Tell(Update::CancelNoted { .. })]));
}

#[test]
fn every_ready_session_lives_as_long_as_the_lease_and_its_orphan_time() {
    let (mut core, _) = attached(left(Vec::new()), &[]);
    let lease =
        |until_ns| Input::Work(WorkItem::Lease { session_id: None, until_ns, orphan_time: Duration::from_nanos(7) });
    let deadline = |session: &str, boottime_ns| Action::Deadline { session_id: sid(session), boottime_ns };

    assert_eq!(core.handle(lease(100)), [deadline("s", 107)]);

    core.handle(open("later", 5));
    let ready = Input::SandboxReady { session_id: sid("later"), sandbox_id: sandbox_id(), receipt: Receipt::default() };
    core.handle(ready);
    let actions = core.handle(Input::ReadyWritten { session_id: sid("later"), durable: true });
    assert!(actions.contains(&deadline("later", 107)), "{actions:?}");
    assert_eq!(core.handle(lease(200)), [deadline("later", 207), deadline("s", 207)]);
}

#[test]
fn session_that_is_closed_while_its_sandbox_is_taken_over_begins_nothing_and_ends() {
    let calls = vec![
        held("gated", None, RecoveredPhase::Started),
        held("absent", None, RecoveredPhase::Started),
        held("queued", None, RecoveredPhase::Accepted),
    ];
    let mut core = core(Config::default());
    core.handle(Input::Recovered(Box::new(left(calls))));
    core.handle(Input::Work(WorkItem::Resume { session_id: None }));
    let mut actions = core.handle(super::core_tests::close("s", 3));

    let found = BTreeMap::from([(cid("gated"), FoundCall::Prepared)]);
    actions.extend(core.handle(Input::SandboxAttached { session_id: sid("s"), found, processes: Processes::Run }));
    actions.extend(core.handle(Input::Aborted { call_id: cid("gated") }));

    for id in ["gated", "absent", "queued"] {
        assert!(!is_handed_over(&actions, id), "{id}");
        assert!(matches!(outcome_of(&actions, id), Some(Outcome::Cancelled { before_start: true, .. })), "{id}");
        core.handle(Input::EndWritten { call_id: cid(id), durable: true });
    }
    let over = core.handle(Input::SandboxClosed { session_id: sid("s") });
    assert!(over.iter().any(|action| matches!(action, Action::Tell(Update::SessionEnded { .. }))), "{over:?}");
}

#[test]
fn gate_of_an_earlier_runner_is_opened_only_when_an_orchestrator_has_confirmed_that_it_may_be() {
    let mut core = core(Config::default());
    core.handle(Input::Recovered(Box::new(left(vec![held("a", None, RecoveredPhase::Started)]))));
    let found = BTreeMap::from([(cid("a"), FoundCall::Prepared)]);

    let attached = core.handle(Input::SandboxAttached { session_id: sid("s"), found, processes: Processes::Run });
    let alone = core.handle(Input::Work(WorkItem::Suspend { session_id: Some(sid("s")) }));
    let lease = core.handle(Input::Work(WorkItem::Resume { session_id: None }));
    let decided = core.handle(Input::Work(WorkItem::Resume { session_id: Some(sid("s")) }));

    assert!(![&attached, &alone, &lease].iter().any(|actions| is_handed_over(actions, "a")));
    let unknown = Action::EndUnknown { session_id: Some(sid("s")) };
    assert_eq!(decided, [unknown, Action::WriteStarted { call_id: cid("a") }]);
    let written = core.handle(Input::StartWritten { call_id: cid("a"), durable: true });
    assert_eq!(written, [Action::Go { session_id: sid("s"), call_id: cid("a") }]);
}
