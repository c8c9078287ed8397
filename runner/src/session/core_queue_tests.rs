//! Sessions that came from a work queue: what the orchestrator grants, withdraws and places says nothing about them.

use std::time::Duration;

use super::core::{Action, Config, Core, Input};
use super::core_tests::{call, cancel, cid, close, core, finish, open, prepared, ready, refusal, run, sandbox_id, sid};
use crate::journal::{Recovered, RecoveredCall, RecoveredPhase, RecoveredSession};
use crate::work::{
    CancelMode, Code, FoundCall, ReadInput, Receipt, SessionOpen, ToolCall, ToolInput, Update, WorkItem,
};

const QUEUED: &str = "claude:env_1:s";
const CALL: &str = "claude:env_1:c";

fn lease(session: Option<&str>, until_ns: u64) -> Input {
    let session_id = session.map(sid);
    Input::Work(WorkItem::Lease { session_id, until_ns, orphan_time: Duration::from_nanos(7) })
}

fn suspend(session: Option<&str>) -> Input {
    Input::Work(WorkItem::Suspend { session_id: session.map(sid) })
}

fn resume(session: Option<&str>) -> Input {
    Input::Work(WorkItem::Resume { session_id: session.map(sid) })
}

fn deadlines(actions: &[Action]) -> Vec<(String, u64)> {
    let deadline = |action: &Action| match action {
        Action::Deadline { session_id, boottime_ns } => Some((session_id.to_string(), *boottime_ns)),
        _ => None,
    };
    actions.iter().filter_map(deadline).collect()
}

fn queued() -> Core {
    let mut core = core(Config::default());
    ready(&mut core, QUEUED, 1);
    core
}

#[test]
fn nothing_begins_before_the_lease_of_the_session_and_that_of_the_orchestrator_is_none() {
    let mut core = queued();
    assert_eq!(prepared(&core.handle(call(QUEUED, 1, CALL, 0))), Vec::<String>::new());
    assert_eq!(prepared(&core.handle(lease(None, 1000))), Vec::<String>::new());
    assert_eq!(prepared(&core.handle(resume(None))), Vec::<String>::new());
    assert_eq!(prepared(&core.handle(lease(Some(QUEUED), 10))), [CALL]);
    assert_eq!(core.lease_until_ns(&sid(QUEUED)), Some(10));
}

#[test]
fn orchestrator_that_is_lost_holds_up_its_own_sessions_only() {
    let mut core = queued();
    ready(&mut core, "s", 1);
    core.handle(lease(Some(QUEUED), 10));
    core.handle(suspend(None));
    assert_eq!(prepared(&core.handle(call(QUEUED, 1, CALL, 0))), [CALL]);
    assert_eq!(prepared(&core.handle(call("s", 1, "c", 0))), Vec::<String>::new());
}

#[test]
fn lease_that_has_lapsed_at_the_gate_holds_up_that_session_only() {
    let mut core = queued();
    ready(&mut core, "s", 1);
    core.handle(lease(Some(QUEUED), 10));
    core.handle(call(QUEUED, 1, CALL, 0));
    super::core_tests::run(&mut core, CALL);
    core.handle(Input::GateKept { call_id: cid(CALL) });
    assert_eq!(prepared(&core.handle(call("s", 1, "c", 0))), ["c"]);
    let go = Action::Go { session_id: sid(QUEUED), call_id: cid(CALL) };
    assert!(!core.handle(lease(Some(QUEUED), 10)).contains(&go), "it is not later than the one that has lapsed");
    assert!(core.handle(lease(Some(QUEUED), 20)).contains(&go));
}

#[test]
fn each_lease_moves_the_deadlines_of_its_own_sessions() {
    let mut core = queued();
    ready(&mut core, "s", 1);
    assert_eq!(deadlines(&core.handle(lease(None, 100))), [("s".to_owned(), 107)]);
    assert_eq!(deadlines(&core.handle(lease(Some(QUEUED), 50))), [(QUEUED.to_owned(), 57)]);
    assert_eq!(deadlines(&core.handle(lease(Some("s"), 500))), [], "it is not of a queue");
}

#[test]
fn placements_of_the_orchestrator_and_of_queues_do_not_make_each_other_old() {
    let mut core = queued();
    core.handle(close(QUEUED, 1));
    core.handle(Input::SandboxClosed { session_id: sid(QUEUED) });
    let actions = core.handle(open("s", 1));
    assert!(actions.iter().any(|action| matches!(action, Action::CreateSandbox(_))), "{actions:?}");
    ready(&mut core, "t", 9);
    core.handle(close("t", 9));
    core.handle(Input::SandboxClosed { session_id: sid("t") });
    assert_eq!(refusal(&core.handle(open("u", 9))), Code::StaleEpoch);
    let actions = core.handle(open(QUEUED, 1));
    assert!(actions.iter().any(|action| matches!(action, Action::CreateSandbox(_))), "{actions:?}");
}

/// F-02: a call that waits at its gate since an earlier runner begins when its session has a lease again.
#[test]
fn restored_session_waits_for_its_own_lease() {
    let Input::Work(WorkItem::Open(open)) = open(QUEUED, 1) else { panic!("an opening") };
    let Input::Work(WorkItem::Call(call)) = call(QUEUED, 1, CALL, 0) else { panic!("a call") };
    let mut core = core(Config::default());
    core.handle(Input::Recovered(Box::new(recovered(open, call))));
    let found = [(cid(CALL), FoundCall::Prepared)].into();
    core.handle(Input::SandboxAttached { session_id: sid(QUEUED), found, processes: crate::work::Processes::Run });
    core.handle(lease(None, 1000));
    let started = Action::WriteStarted { call_id: cid(CALL) };
    assert!(!core.handle(resume(None)).contains(&started));
    core.handle(suspend(Some(QUEUED)));
    assert!(!core.handle(lease(Some(QUEUED), 100)).contains(&started), "its sandbox lives, and nobody serves it");
    assert!(core.handle(resume(Some(QUEUED))).contains(&started));
}

fn recovered(open: SessionOpen, call: ToolCall) -> Recovered {
    let sandbox = Some((sandbox_id(), Receipt::default()));
    let session = RecoveredSession { open, sandbox, acknowledged: Vec::new() };
    let call = RecoveredCall { call, cancel: None, phase: RecoveredPhase::Started, starts: 1, resumes: None };
    Recovered { same_boot: true, sessions: vec![session], calls: vec![call], ..Recovered::default() }
}

#[test]
fn drain_is_of_the_whole_runner() {
    let mut core = queued();
    let mode = crate::work::DrainMode::Now;
    let actions = core.handle(Input::Work(WorkItem::Drain { mode, by: crate::work::DrainedBy::Operator }));
    assert!(actions.iter().any(|action| matches!(action, Action::CloseSandbox { .. })), "{actions:?}");
    assert!(actions.iter().any(|action| matches!(action, Action::Tell(Update::Drained { draining: true, .. }))));
}

/// A session that may have four calls at once, and a call of it that is no command.
fn side_by_side() -> (Core, Input) {
    let mut core = core(Config::default());
    let Input::Work(WorkItem::Open(open)) = open(QUEUED, 1) else { panic!("an opening") };
    core.handle(Input::Work(WorkItem::Open(SessionOpen { max_concurrent_calls: 4, ..open })));
    let (session_id, sandbox_id) = (sid(QUEUED), sandbox_id());
    core.handle(Input::SandboxReady { session_id, sandbox_id, receipt: Receipt::default() });
    core.handle(Input::ReadyWritten { session_id: sid(QUEUED), durable: true });
    core.handle(lease(Some(QUEUED), 10));
    let Input::Work(WorkItem::Call(read)) = call(QUEUED, 1, "claude:env_1:read", 0) else { panic!("a call") };
    let input = ToolInput::Read(ReadInput { file_path: "f".into(), view_range: None });
    (core, Input::Work(WorkItem::Call(ToolCall { input, ..read })))
}

#[test]
fn commands_run_one_at_a_time_whatever_else_may_run_beside_them() {
    let (mut core, read) = side_by_side();

    assert_eq!(prepared(&core.handle(call(QUEUED, 1, CALL, 0))), [CALL]);
    run(&mut core, CALL);
    let beside = core.handle(read);
    assert_eq!(prepared(&beside), ["claude:env_1:read"]);
    assert_eq!(prepared(&core.handle(call(QUEUED, 1, "claude:env_1:next", 0))), Vec::<String>::new());
    assert_eq!(prepared(&finish(&mut core, CALL)), ["claude:env_1:next"]);
}

#[test]
fn call_behind_a_command_that_waits_begins_when_that_one_is_cancelled() {
    let (mut core, read) = side_by_side();
    core.handle(call(QUEUED, 1, CALL, 0));
    run(&mut core, CALL);
    core.handle(call(QUEUED, 1, "claude:env_1:next", 0));
    assert!(prepared(&core.handle(read)).is_empty());

    assert_eq!(
        prepared(&core.handle(cancel(QUEUED, 1, "claude:env_1:next", CancelMode::Terminate))),
        ["claude:env_1:read"]
    );
}
