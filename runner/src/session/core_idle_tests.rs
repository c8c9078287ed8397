//! What becomes of a session without calls.

use std::collections::BTreeMap;
use std::time::Duration;

use super::core::{Action, Config, Core, IdlePolicy, Input, SessionStage};
use super::core_tests::{
    call, cid, close, core, finish, open, outcome, prepared, ready, refusal, run, sandbox_id, sid,
};
use crate::journal::{Recovered, RecoveredSession};
use crate::work::*;

const FREEZE: Duration = Duration::from_secs(60);
const STOP: Duration = Duration::from_secs(300);
const END: Duration = Duration::from_secs(600);

fn with(freeze_after: Option<Duration>, end_after: Option<Duration>) -> Core {
    policy(freeze_after, None, end_after)
}

fn policy(freeze_after: Option<Duration>, stop_after: Option<Duration>, end_after: Option<Duration>) -> Core {
    core(Config { idle: IdlePolicy { freeze_after, stop_after, end_after }, ..Config::default() })
}

fn armed(actions: &[Action]) -> Option<Duration> {
    actions.iter().rev().find_map(|action| match action {
        Action::ArmIdle { within, .. } => Some(*within),
        _ => None,
    })
}

fn passed() -> Input {
    Input::IdlePassed { session_id: sid("s") }
}

fn frozen(result: Result<(), ToolFailure>) -> Input {
    Input::Frozen { session_id: sid("s"), result }
}

fn thawed(result: Result<(), ToolFailure>) -> Input {
    Input::Thawed { session_id: sid("s"), result }
}

fn refused() -> Result<(), ToolFailure> {
    Err(ToolFailure::new(Code::SandboxCreateFailed, "no", "none"))
}

fn stopped(result: Result<(), ToolFailure>) -> Input {
    Input::Stopped { session_id: sid("s"), result }
}

fn stops(actions: &[Action]) -> bool {
    actions.contains(&Action::Stop { session_id: sid("s") })
}

fn freezes(actions: &[Action]) -> bool {
    actions.contains(&Action::Freeze { session_id: sid("s") })
}

fn thaws(actions: &[Action]) -> bool {
    actions.contains(&Action::Thaw { session_id: sid("s") })
}

fn closes(actions: &[Action]) -> bool {
    actions.iter().any(|action| matches!(action, Action::CloseSandbox { .. }))
}

fn stage(core: &Core) -> Option<SessionStage> {
    core.sessions().next().map(|(_, _, stage, _)| stage)
}

/// A session that stands still.
fn at_rest(core: &mut Core) {
    ready(core, "s", 1);
    assert!(freezes(&core.handle(passed())));
    core.handle(frozen(Ok(())));
    assert_eq!(stage(core), Some(SessionStage::Frozen));
}

#[test]
fn a_session_without_calls_is_stopped_and_the_next_call_waits_until_it_goes_on() {
    let mut core = with(Some(FREEZE), None);
    at_rest(&mut core);

    let actions = core.handle(call("s", 1, "c", 0));
    assert!(thaws(&actions) && prepared(&actions).is_empty(), "{actions:?}");
    // It is written down meanwhile, and asked for once.
    assert!(!thaws(&core.handle(Input::Accepted { call_id: cid("c"), durable: true })));
    assert_eq!(prepared(&core.handle(thawed(Ok(())))), ["c"]);
    assert_eq!(stage(&core), Some(SessionStage::Ready));
    core.handle(Input::Prepared { call_id: cid("c") });
    core.handle(Input::StartWritten { call_id: cid("c"), durable: true });
    assert_eq!(armed(&finish(&mut core, "c")), Some(FREEZE), "it is stopped again after its last call");
}

#[test]
fn nothing_is_stopped_while_a_call_runs_or_waits() {
    let mut core = with(Some(FREEZE), Some(END));
    ready(&mut core, "s", 1);
    core.handle(call("s", 1, "runs", 0));
    core.handle(call("s", 1, "waits", 0));
    run(&mut core, "runs");
    assert!(core.handle(passed()).is_empty());
    assert_eq!(armed(&finish(&mut core, "runs")), None, "another one is there");
    run(&mut core, "waits");
    assert_eq!(armed(&finish(&mut core, "waits")), Some(FREEZE));
}

#[test]
fn a_call_that_comes_while_the_session_is_being_stopped_wakes_it_afterwards() {
    let mut core = with(Some(FREEZE), None);
    ready(&mut core, "s", 1);
    core.handle(passed());
    let actions = core.handle(call("s", 1, "c", 0));
    assert!(!thaws(&actions) && prepared(&actions).is_empty(), "the two requests may overtake each other: {actions:?}");
    assert!(thaws(&core.handle(frozen(Ok(())))));
    assert_eq!(prepared(&core.handle(thawed(Ok(())))), ["c"]);
}

#[test]
fn a_session_that_cannot_be_stopped_works_on_and_is_woken_to_be_sure() {
    let mut core = with(Some(FREEZE), None);
    ready(&mut core, "s", 1);
    core.handle(passed());
    core.handle(frozen(refused()));
    assert_eq!(stage(&core), Some(SessionStage::Ready));
    assert!(!freezes(&core.handle(passed())), "not before the next call");
    assert!(thaws(&core.handle(call("s", 1, "c", 0))));
    assert_eq!(prepared(&core.handle(thawed(Ok(())))), ["c"]);
}

#[test]
fn a_session_that_cannot_be_woken_fails_what_waits_and_the_next_call_tries_again() {
    let mut core = with(Some(FREEZE), None);
    at_rest(&mut core);
    core.handle(call("s", 1, "c", 0));
    let actions = core.handle(thawed(refused()));
    assert!(matches!(outcome(&actions, "c"), Some(Outcome::NeverStarted { .. })), "{actions:?}");
    core.handle(Input::EndWritten { call_id: cid("c"), durable: true });
    assert!(thaws(&core.handle(call("s", 1, "d", 0))));
    assert_eq!(prepared(&core.handle(thawed(Ok(())))), ["d"]);
}

#[test]
fn a_session_that_nobody_wants_is_ended_and_its_end_says_why() {
    let mut core = with(Some(FREEZE), Some(END));
    ready(&mut core, "s", 1);
    core.handle(passed());
    assert_eq!(armed(&core.handle(frozen(Ok(())))), Some(END - FREEZE));
    assert!(closes(&core.handle(passed())));
    let actions = core.handle(Input::SandboxClosed { session_id: sid("s") });
    let ended = Update::SessionEnded { session_id: sid("s"), epoch: 1, end: SessionEnd::Idle };
    assert!(actions.contains(&Action::Tell(ended)), "{actions:?}");
}

#[test]
fn results_that_are_stored_nowhere_else_keep_a_session() {
    let mut core = with(None, Some(END));
    ready(&mut core, "s", 1);
    core.handle(call("s", 1, "c", 0));
    run(&mut core, "c");
    assert_eq!(armed(&finish(&mut core, "c")), Some(END));
    let actions = core.handle(passed());
    assert!(!closes(&actions) && armed(&actions) == Some(END), "{actions:?}");
    core.handle(Input::Work(WorkItem::Acknowledge { call_id: cid("c") }));
    assert!(closes(&core.handle(passed())));
}

#[test]
fn a_session_may_ask_for_another_time_or_for_none() {
    for (asked, operator, expected) in [
        (Some(5), Some(60), Some(5)),
        (Some(5), None, Some(5)),
        (Some(0), Some(60), None),
        (None, Some(60), Some(60)),
        (None, None, None),
    ] {
        let mut core = with(operator.map(Duration::from_secs), None);
        let actions = ready_with(&mut core, asked);
        assert_eq!(armed(&actions), expected.map(Duration::from_secs), "{asked:?} {operator:?}");
    }
}

/// The session is open, and has asked for this time.
fn ready_with(core: &mut Core, idle_timeout: Option<u64>) -> Vec<Action> {
    let Input::Work(WorkItem::Open(mut request)) = open("s", 1) else { panic!("a request") };
    request.idle_timeout = idle_timeout.map(Duration::from_secs);
    core.handle(Input::Work(WorkItem::Open(request)));
    let (session_id, receipt) = (sid("s"), Receipt::default());
    core.handle(Input::SandboxReady { session_id, sandbox_id: sandbox_id(), receipt });
    core.handle(Input::ReadyWritten { session_id: sid("s"), durable: true })
}

/// A session without processes.
fn without_processes(core: &mut Core) {
    at_rest(core);
    assert!(stops(&core.handle(passed())));
    core.handle(stopped(Ok(())));
    assert_eq!(stage(core), Some(SessionStage::Stopped));
}

#[test]
fn a_session_stands_still_then_loses_its_processes_and_is_ended_at_last() {
    let mut core = policy(Some(FREEZE), Some(STOP), Some(END));
    ready(&mut core, "s", 1);
    assert!(freezes(&core.handle(passed())));
    assert_eq!(armed(&core.handle(frozen(Ok(())))), Some(STOP - FREEZE));
    assert!(stops(&core.handle(passed())));
    assert_eq!(armed(&core.handle(stopped(Ok(())))), Some(END - STOP));
    assert!(closes(&core.handle(passed())));
}

#[test]
fn a_session_without_processes_waits_with_its_next_call_until_it_is_woken() {
    let mut core = policy(Some(FREEZE), Some(STOP), None);
    without_processes(&mut core);

    let actions = core.handle(call("s", 1, "c", 0));
    assert!(thaws(&actions) && prepared(&actions).is_empty(), "where they stood still, so would new ones: {actions:?}");
    assert_eq!(prepared(&core.handle(thawed(Ok(())))), ["c"]);
    run(&mut core, "c");
    assert_eq!(armed(&finish(&mut core, "c")), Some(FREEZE), "it begins anew after its last call");
}

#[test]
fn processes_can_be_ended_without_having_stood_still() {
    let mut core = policy(None, Some(STOP), Some(END));
    ready(&mut core, "s", 1);
    let actions = core.handle(passed());
    assert!(stops(&actions) && !freezes(&actions));
    let call = core.handle(call("s", 1, "c", 0));
    assert!(!thaws(&call) && prepared(&call).is_empty(), "the two requests may overtake each other: {call:?}");
    assert!(thaws(&core.handle(stopped(Ok(())))));
    assert_eq!(prepared(&core.handle(thawed(Ok(())))), ["c"]);
}

#[test]
fn processes_that_do_not_end_are_left_alone_until_after_the_next_call() {
    let mut core = policy(Some(FREEZE), Some(STOP), None);
    at_rest(&mut core);
    core.handle(passed());
    assert_eq!(armed(&core.handle(stopped(refused()))), None);
    assert!(!stops(&core.handle(passed())), "not before the next call");
    assert!(thaws(&core.handle(call("s", 1, "c", 0))), "some of it may stand still");
    assert_eq!(prepared(&core.handle(thawed(Ok(())))), ["c"]);
    run(&mut core, "c");
    finish(&mut core, "c");
    assert!(freezes(&core.handle(passed())));
    core.handle(frozen(Ok(())));
    assert!(stops(&core.handle(passed())));
}

/// (asked by the session, freeze and stop of the operator, first step and its time)
#[test]
fn a_session_keeps_its_processes_for_as_long_as_it_has_asked_for() {
    for (asked, freeze, stop, expected) in [
        (None, Some(60), Some(300), Some((false, 60))),
        (None, None, Some(300), Some((true, 300))),
        (Some(100), None, Some(300), Some((false, 100))),
        (Some(400), Some(60), Some(300), Some((true, 400))),
        (Some(0), Some(60), Some(300), None),
    ] {
        let mut core = policy(freeze.map(Duration::from_secs), stop.map(Duration::from_secs), None);
        let actions = ready_with(&mut core, asked);
        assert_eq!(armed(&actions), expected.map(|(_, after)| Duration::from_secs(after)), "{asked:?} {freeze:?}");
        let first = core.handle(passed());
        assert_eq!(stops(&first), expected.is_some_and(|(stops, _)| stops), "{asked:?} {freeze:?}");
    }
}

#[test]
fn a_session_without_processes_is_taken_over_as_such_and_woken_by_its_next_call() {
    let mut core = policy(Some(FREEZE), Some(STOP), Some(END));
    let Input::Work(WorkItem::Open(open)) = open("s", 1) else { panic!("a request") };
    let sandbox = Some((sandbox_id(), Receipt::default()));
    let sessions = vec![RecoveredSession { open, sandbox, acknowledged: Vec::new() }];
    core.handle(Input::Recovered(Box::new(Recovered { same_boot: true, sessions, ..Recovered::default() })));
    let found = BTreeMap::new();
    let attached = Input::SandboxAttached { session_id: sid("s"), found, processes: Processes::Ended };
    core.handle(attached);
    assert_eq!(stage(&core), Some(SessionStage::Stopped));
    assert_eq!(armed(&core.handle(Input::Work(WorkItem::Resume { session_id: None }))), Some(END - STOP));
    assert!(thaws(&core.handle(call("s", 1, "c", 0))));
}

#[test]
fn a_session_without_processes_is_closed_like_any_other() {
    let mut core = policy(Some(FREEZE), Some(STOP), None);
    without_processes(&mut core);
    assert!(closes(&core.handle(close("s", 1))));
    assert!(core.handle(stopped(Ok(()))).is_empty() && core.handle(passed()).is_empty());
}

#[test]
fn a_session_that_would_end_before_it_is_stopped_is_only_ended() {
    let mut core = with(Some(END), Some(END));
    ready(&mut core, "s", 1);
    let actions = core.handle(passed());
    assert!(closes(&actions) && !freezes(&actions));
}

#[test]
fn a_session_at_rest_is_closed_like_any_other() {
    let mut core = with(Some(FREEZE), None);
    at_rest(&mut core);
    assert!(closes(&core.handle(close("s", 1))));
    // What comes later about it is of no interest.
    assert!(core.handle(thawed(Ok(()))).is_empty() && core.handle(passed()).is_empty());
}

#[test]
fn a_session_that_is_taken_over_at_rest_stays_so_until_its_next_call() {
    let mut core = with(Some(FREEZE), Some(END));
    let Input::Work(WorkItem::Open(open)) = open("s", 1) else { panic!("a request") };
    let sandbox = Some((sandbox_id(), Receipt::default()));
    let sessions = vec![RecoveredSession { open, sandbox, acknowledged: Vec::new() }];
    core.handle(Input::Recovered(Box::new(Recovered { same_boot: true, sessions, ..Recovered::default() })));
    let attached =
        Input::SandboxAttached { session_id: sid("s"), found: BTreeMap::new(), processes: Processes::Frozen };
    core.handle(attached);
    assert_eq!(stage(&core), Some(SessionStage::Frozen));
    assert!(!thaws(&core.handle(call("s", 1, "c", 0))), "no orchestrator has renewed the lease");
    assert!(thaws(&core.handle(Input::Work(WorkItem::Resume { session_id: None }))));
    assert_eq!(prepared(&core.handle(thawed(Ok(())))), ["c"]);
}

fn short_of(resource: Resource, closed: Closed) -> Input {
    let shortages = vec![Shortage { resource, closed, measured: "3 are free, 5 are needed".into() }];
    Input::Work(WorkItem::Pressure(std::sync::Arc::new(Pressure { shortages, gauges: Vec::new() })))
}

/// F-53: memory first closes, then stops what is idle; nothing that runs is touched.
#[test]
fn sessions_that_may_be_stopped_are_stopped_at_once_when_others_wait_for_memory() {
    let mut core = with(Some(FREEZE), None);
    ready(&mut core, "s", 1);
    ready(&mut core, "busy", 2);
    core.handle(call("busy", 2, "c", 0));
    let actions = core.handle(short_of(Resource::Memory, Closed::Sessions));
    assert_eq!(actions, [Action::Freeze { session_id: sid("s") }]);
    assert_eq!(refusal(&core.handle(open("new", 3))), Code::MemoryPressure);

    let mut never = with(None, Some(END));
    ready(&mut never, "s", 1);
    assert!(never.handle(short_of(Resource::Memory, Closed::Sessions)).is_empty(), "it must not be stopped, nor ended");
}

#[test]
fn shortage_keeps_new_work_out_and_nothing_else_and_ends_with_its_cause() {
    let mut core = with(None, None);
    ready(&mut core, "s", 1);
    core.handle(call("s", 1, "before", 0));
    run(&mut core, "before");
    core.handle(short_of(Resource::Disk, Closed::Writing));
    assert_eq!(refusal(&core.handle(open("new", 2))), Code::DiskLow);
    assert_eq!(refusal(&core.handle(call("s", 1, "c", 0))), Code::DiskLow);
    assert!(outcome(&finish(&mut core, "before"), "before").is_some());

    core.handle(Input::Work(WorkItem::Pressure(std::sync::Arc::default())));
    assert_eq!(prepared(&core.handle(call("s", 1, "d", 0))), ["d"]);
}
