//! The core, killed again and again: whatever was not on the disk is forgotten, whatever the sandboxes do goes on.
//!
//! The model is a disk that keeps a prefix of the records, at least as long as what was reported as durable, and sandboxes
//! that remember what reached them. It checks what is promised over all lives of the runner together: a call begins at most
//! once, each accepted call has one outcome, an outcome that was told never changes, and nobody is told that a call did not
//! run which did.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use super::core::{Action, Config, Core, IdlePolicy, Input};
use super::core_tests::{call, cancel, cid, close, core, ended, open, sid};
use crate::journal::{MOST_STARTS, Record, Recovered, RecoveredCall, RecoveredPhase, RecoveredSession};
use crate::work::*;

const SESSIONS: [&str; 2] = ["s0", "s1"];

#[derive(Debug, Clone)]
enum Step {
    Open(usize),
    Call(usize, u8),
    Cancel(usize, u8, CancelMode),
    Close(usize),
    Acknowledge(u8),
    /// Answers one of the open actions.
    Answer(usize),
    /// A running call ends.
    End(usize),
    /// A session has had nothing to do for as long as it may.
    Idle(usize),
    /// The lease lapses unnoticed, or is renewed.
    Lapse(bool),
    /// The runner is killed: how much of what was not reported as durable is kept, which actions were carried out all the
    /// same, and whether the machine went down with it.
    Kill(usize, u64, bool),
}

fn step() -> impl Strategy<Value = Step> {
    let mode = prop_oneof![Just(CancelMode::Interrupt), Just(CancelMode::Kill)];
    prop_oneof![
        2 => (0..2_usize).prop_map(Step::Open),
        6 => (0..2_usize, 0..10_u8).prop_map(|(s, c)| Step::Call(s, c)),
        1 => (0..2_usize, 0..10_u8, mode).prop_map(|(s, c, m)| Step::Cancel(s, c, m)),
        1 => (0..2_usize).prop_map(Step::Close),
        2 => (0..10_u8).prop_map(Step::Acknowledge),
        24 => (0..64_usize).prop_map(Step::Answer),
        5 => (0..8_usize).prop_map(Step::End),
        3 => (0..2_usize).prop_map(Step::Idle),
        1 => any::<bool>().prop_map(Step::Lapse),
        2 => (0..8_usize, any::<u64>(), prop::bool::weighted(0.1)).prop_map(|(n, o, b)| Step::Kill(n, o, b)),
    ]
}

/// What process 1 of a sandbox knows of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum InSandbox {
    Prepared,
    Running,
    Finished,
    Forgotten,
}

#[derive(Default)]
struct World {
    epochs: BTreeMap<usize, u64>,
    next_epoch: u64,
    /// Everything that was asked to be written, in order.
    records: Vec<Record>,
    /// So many of them were reported as durable.
    durable: usize,
    /// Actions that wait for an answer, with the number of records at that time.
    open: Vec<(Action, usize)>,
    /// Living sandboxes by session: their number, and their calls.
    sandboxes: BTreeMap<SessionId, BTreeMap<CallId, InSandbox>>,
    /// What their processes do; those that run are not named.
    resting: BTreeMap<SessionId, Processes>,
    begun: BTreeMap<CallId, u32>,
    /// Placements whose end was told.
    over: BTreeSet<(SessionId, u64)>,
    lapsed: bool,
    renewals: u64,
    accepted: BTreeSet<CallId>,
    outcomes: BTreeMap<CallId, Outcome>,
    told: BTreeMap<CallId, Outcome>,
}

impl World {
    fn take(&mut self, actions: Vec<Action>) -> Result<(), TestCaseError> {
        for action in actions {
            match &action {
                Action::Note(record) => self.records.push(record.clone()),
                Action::WriteReady { session_id, sandbox_id, receipt } => {
                    let (session_id, sandbox_id) = (session_id.clone(), sandbox_id.clone());
                    self.records.push(Record::SessionReady { session_id, sandbox_id, receipt: receipt.clone() });
                }
                Action::WriteEnded { session_id, epoch } => {
                    self.records.push(Record::SessionEnded { session_id: session_id.clone(), epoch: *epoch });
                }
                Action::CreateSandbox(open) => {
                    let over = self.over.contains(&(open.session_id.clone(), open.epoch));
                    prop_assert!(!over, "{} was over, and gets a sandbox again", open.session_id);
                }
                Action::WriteCancelled { call_id, mode, .. } => {
                    self.records.push(Record::Cancelled { call_id: call_id.clone(), mode: *mode });
                }
                Action::WriteAccepted(call) => self.records.push(Record::Accepted(Box::new(call.clone()))),
                Action::WriteStarted { call_id } => {
                    let record = Record::Started { call_id: call_id.clone() };
                    let before = self.records.iter().filter(|before| **before == record).count();
                    prop_assert!(before < MOST_STARTS as usize, "{call_id} is about to be started {before} times");
                    self.records.push(record);
                }
                Action::WriteFinished { call_id, result } => {
                    self.records.push(Record::Finished { call_id: call_id.clone(), result: Arc::clone(result) });
                }
                Action::Trim { call_id } => self.records.push(Record::Acknowledged { call_id: call_id.clone() }),
                Action::Tell(update) => self.hear(update)?,
                _ => {}
            }
            let at = self.records.len();
            match action {
                Action::Go { .. } if self.lapsed => self.open.push((action, at)),
                Action::Go { .. }
                | Action::Cancel { .. }
                | Action::Acknowledge { .. }
                | Action::ReleaseSandbox { .. } => {
                    self.reach(&action)?;
                }
                Action::WriteReady { .. }
                | Action::WriteEnded { .. }
                | Action::WriteCancelled { .. }
                | Action::WriteAccepted(_)
                | Action::WriteStarted { .. }
                | Action::WriteFinished { .. }
                | Action::CreateSandbox(_)
                | Action::AttachSandbox { .. }
                | Action::CloseSandbox { .. }
                | Action::Prepare { .. }
                | Action::Freeze { .. }
                | Action::Stop { .. }
                | Action::Thaw { .. }
                | Action::Abort { .. } => self.open.push((action, at)),
                _ => {}
            }
        }
        Ok(())
    }

    fn hear(&mut self, update: &Update) -> Result<(), TestCaseError> {
        match update {
            Update::CallAccepted { call_id, .. } => drop(self.accepted.insert(call_id.clone())),
            Update::CallFinished { call_id, result, .. } => {
                let outcome = result.end.outcome.clone();
                let nothing =
                    matches!(outcome, Outcome::NeverStarted { .. } | Outcome::Cancelled { before_start: true, .. });
                let begun = self.begun.get(call_id).copied().unwrap_or(0);
                prop_assert!(!(nothing && begun > 0), "{call_id} began, and its caller was told that it did not");
                prop_assert!(
                    begun > 0 || !matches!(outcome, Outcome::Exited { .. }),
                    "{call_id} ended without a begin"
                );
                let before = self.told.insert(call_id.clone(), outcome.clone());
                prop_assert!(before.is_none_or(|before| before == outcome), "two outcomes of {call_id} were told");
            }
            Update::SessionEnded { session_id, epoch, .. } => drop(self.over.insert((session_id.clone(), *epoch))),
            _ => {}
        }
        Ok(())
    }

    /// An action reaches a sandbox.
    fn reach(&mut self, action: &Action) -> Result<(), TestCaseError> {
        match action {
            Action::Prepare { session_id, call } => {
                prop_assert_eq!(self.resting.get(session_id), None, "{} given to what stands still", call.call_id);
                if let Some(calls) = self.sandboxes.get_mut(session_id) {
                    let known = calls.entry(call.call_id.clone()).or_insert(InSandbox::Prepared);
                    prop_assert!(*known == InSandbox::Prepared, "{} was handed over again", call.call_id);
                }
            }
            Action::Go { session_id, call_id } => {
                prop_assert_eq!(self.resting.get(session_id), None, "{} let go where everything stands still", call_id);
                let known = self.sandboxes.get_mut(session_id).and_then(|calls| calls.get_mut(call_id));
                if let Some(known) = known.filter(|known| **known == InSandbox::Prepared) {
                    *known = InSandbox::Running;
                    let begun = self.begun.entry(call_id.clone()).or_default();
                    *begun += 1;
                    prop_assert_eq!(*begun, 1, "{} began twice", call_id);
                }
            }
            Action::Abort { session_id, call_id } => {
                let calls = self.sandboxes.entry(session_id.clone()).or_default();
                if calls.get(call_id) == Some(&InSandbox::Prepared) {
                    calls.remove(call_id);
                }
            }
            Action::Acknowledge { call_id } => {
                for calls in self.sandboxes.values_mut() {
                    if calls.contains_key(call_id) {
                        calls.insert(call_id.clone(), InSandbox::Forgotten);
                    }
                }
            }
            Action::CloseSandbox { session_id, .. } | Action::ReleaseSandbox { session_id } => {
                self.sandboxes.remove(session_id);
                self.resting.remove(session_id);
                // Whatever was still asked of this sandbox is not asked of the next one of its session.
                self.open.retain(|(action, _)| match action {
                    Action::Freeze { session_id: of }
                    | Action::Stop { session_id: of }
                    | Action::Thaw { session_id: of } => of != session_id,
                    _ => true,
                });
            }
            Action::Freeze { session_id } | Action::Stop { session_id } => {
                let calls = self.sandboxes.get(session_id).into_iter().flatten();
                let mut open = calls.filter(|(_, state)| matches!(state, InSandbox::Prepared | InSandbox::Running));
                prop_assert_eq!(open.next(), None, "stopped while there is a call");
                let ends = matches!(action, Action::Stop { .. });
                let processes = if ends { Processes::Ended } else { Processes::Frozen };
                if self.sandboxes.contains_key(session_id) {
                    self.resting.insert(session_id.clone(), processes);
                }
            }
            Action::Thaw { session_id } => drop(self.resting.remove(session_id)),
            _ => {}
        }
        Ok(())
    }

    fn answer(&mut self, (action, at): (Action, usize)) -> Result<Vec<Input>, TestCaseError> {
        if let Action::Go { call_id, .. } = action {
            return Ok(vec![Input::GateKept { call_id }]);
        }
        self.reach(&action)?;
        let mut written = || self.durable = self.durable.max(at);
        Ok(match action {
            Action::CreateSandbox(open) => {
                let (session_id, receipt) = (open.session_id, Receipt::default());
                self.sandboxes.insert(session_id.clone(), BTreeMap::new());
                self.resting.remove(&session_id);
                let sandbox_id = SandboxId::new(session_id.as_str()).expect("an id");
                vec![Input::SandboxReady { session_id, sandbox_id, receipt }]
            }
            Action::AttachSandbox { session_id, calls, .. } => self.attach(session_id, &calls)?,
            Action::CloseSandbox { session_id, .. } => vec![Input::SandboxClosed { session_id }],
            Action::WriteReady { session_id, .. } => {
                written();
                vec![Input::ReadyWritten { session_id, durable: true }]
            }
            Action::WriteEnded { session_id, .. } => {
                written();
                vec![Input::EndedWritten { session_id, durable: true }]
            }
            Action::WriteCancelled { call_id, epoch, phase, .. } => {
                written();
                vec![Input::CancelWritten { call_id, epoch, phase, durable: true }]
            }
            Action::WriteAccepted(call) => {
                written();
                vec![Input::Accepted { call_id: call.call_id, durable: true }]
            }
            Action::WriteStarted { call_id } => {
                written();
                vec![Input::StartWritten { call_id, durable: true }]
            }
            Action::WriteFinished { call_id, result } => {
                written();
                self.outcomes.insert(call_id.clone(), result.end.outcome.clone());
                vec![Input::EndWritten { call_id, durable: true }]
            }
            Action::Prepare { session_id, call } if self.sandboxes.contains_key(&session_id) => {
                vec![Input::Prepared { call_id: call.call_id }]
            }
            Action::Abort { call_id, .. } => vec![Input::Aborted { call_id }],
            Action::Freeze { session_id } => vec![Input::Frozen { session_id, result: Ok(()) }],
            Action::Stop { session_id } => vec![Input::Stopped { session_id, result: Ok(()) }],
            Action::Thaw { session_id } => vec![Input::Thawed { session_id, result: Ok(()) }],
            _ => Vec::new(),
        })
    }

    /// As `Sandboxes::attach` promises.
    fn attach(
        &mut self,
        session_id: SessionId,
        expected: &[(CallId, Gate, Option<Duration>)],
    ) -> Result<Vec<Input>, TestCaseError> {
        let Some(calls) = self.sandboxes.get_mut(&session_id) else {
            return Ok(vec![Input::SandboxLost { session_id, reason: "not there".into() }]);
        };
        let is_open = |id: &CallId| expected.iter().any(|(expected, gate, _)| expected == id && *gate == Gate::Open);
        for (call_id, state) in calls.iter() {
            let alive = matches!(state, InSandbox::Running | InSandbox::Finished);
            prop_assert!(!alive || is_open(call_id), "{call_id} began, and the next runner does not know of it");
        }
        calls.retain(|id, state| *state != InSandbox::Prepared || is_open(id));
        let mut found = BTreeMap::new();
        let mut inputs = Vec::new();
        for (call_id, ..) in expected {
            let known = match calls.get(call_id) {
                Some(InSandbox::Prepared) => FoundCall::Prepared,
                Some(InSandbox::Running) => FoundCall::Running,
                Some(InSandbox::Finished) => {
                    inputs.push(ended(call_id.as_str()));
                    FoundCall::Finished
                }
                Some(InSandbox::Forgotten) | None => continue,
            };
            found.insert(call_id.clone(), known);
        }
        let processes = self.resting.get(&session_id).copied().unwrap_or(Processes::Run);
        inputs.insert(0, Input::SandboxAttached { session_id, found, processes });
        Ok(inputs)
    }

    /// The runner dies. `kept` records beyond the durable ones are there; bit n of `done` says whether open action n was
    /// carried out before.
    fn kill(&mut self, kept: usize, done: u64, with_machine: bool) -> Result<Recovered, TestCaseError> {
        for (number, (action, _)) in std::mem::take(&mut self.open).into_iter().enumerate() {
            let sandbox = matches!(
                action,
                Action::Prepare { .. }
                    | Action::Abort { .. }
                    | Action::CloseSandbox { .. }
                    | Action::Freeze { .. }
                    | Action::Stop { .. }
                    | Action::Thaw { .. }
            );
            if sandbox && done >> (number % 64) & 1 == 1 {
                self.reach(&action)?;
            }
        }
        self.records.truncate(self.records.len().min(self.durable + kept));
        self.durable = self.records.len();
        if with_machine {
            self.sandboxes.clear();
        }
        let recovered = Recovered { same_boot: !with_machine, ..fold(&self.records) };
        // Nobody counts on a sandbox that no session has.
        let kept: BTreeSet<_> =
            recovered.sessions.iter().filter(|s| s.sandbox.is_some()).map(|s| s.open.session_id.clone()).collect();
        self.sandboxes.retain(|session_id, _| kept.contains(session_id));
        let sandboxes = &self.sandboxes;
        self.resting.retain(|session_id, _| sandboxes.contains_key(session_id));
        Ok(recovered)
    }
}

/// What a journal would give, written a second time and in the simplest way.
fn fold(records: &[Record]) -> Recovered {
    let mut recovered = Recovered::default();
    for record in records {
        let calls = &mut recovered.calls;
        let position = |calls: &[RecoveredCall], id: &CallId| calls.iter().position(|held| held.call.call_id == *id);
        match record {
            Record::SessionOpening(open) => {
                match recovered.sessions.iter_mut().find(|session| session.open.session_id == open.session_id) {
                    Some(session) => session.open.epoch = open.epoch,
                    None => recovered.sessions.push(RecoveredSession {
                        open: (**open).clone(),
                        sandbox: None,
                        acknowledged: Vec::new(),
                    }),
                }
            }
            Record::SessionReady { session_id, sandbox_id, receipt } => {
                for session in recovered.sessions.iter_mut().filter(|session| session.open.session_id == *session_id) {
                    session.sandbox = Some((sandbox_id.clone(), receipt.clone()));
                }
            }
            Record::SessionEnded { session_id, epoch } => {
                recovered.sessions.retain(|session| session.open.session_id != *session_id);
                recovered.epoch_floor = recovered.epoch_floor.max(*epoch);
            }
            Record::Accepted(call) => {
                let phase = RecoveredPhase::Accepted;
                calls.push(RecoveredCall { call: (**call).clone(), cancel: None, phase, starts: 0, resumes: Some(0) });
            }
            Record::Started { call_id } => {
                if let Some(at) = position(calls, call_id) {
                    (calls[at].phase, calls[at].starts) = (RecoveredPhase::Started, calls[at].starts + 1);
                }
            }
            Record::Cancelled { call_id, mode } => match position(calls, call_id) {
                Some(at) => calls[at].cancel = Some(*mode),
                None => recovered.tombstones.push(call_id.clone()),
            },
            Record::Finished { call_id, result } => {
                if let Some(at) = position(calls, call_id) {
                    calls[at].phase = RecoveredPhase::Finished(Arc::clone(result));
                }
            }
            Record::Acknowledged { call_id } => {
                if let Some(at) = position(calls, call_id) {
                    let call = calls.remove(at).call;
                    for session in recovered.sessions.iter_mut().filter(|s| s.open.session_id == call.session_id) {
                        session.acknowledged.push(call_id.clone());
                    }
                }
            }
            _ => {}
        }
    }
    recovered
}

fn config() -> Config {
    let [freeze_after, stop_after, end_after] = [1, 2, 3].map(|seconds| Some(Duration::from_secs(seconds)));
    Config { idle: IdlePolicy { freeze_after, stop_after, end_after }, ..Config::default() }
}

fn live(steps: Vec<Step>) -> Result<(), TestCaseError> {
    let mut world = World::default();
    let mut core = core(config());
    let name = |world: &World, session: usize, call: u8| {
        format!("c{call}-{session}-{}", world.epochs.get(&session).copied().unwrap_or(0))
    };
    let resume = || Input::Work(WorkItem::Resume { session_id: None });
    for step in steps {
        let inputs = match step {
            Step::Open(session) => {
                world.next_epoch += 1;
                let is_open = core.sessions().any(|(open, ..)| open.session_id == sid(SESSIONS[session]));
                // A takeover would give calls of the earlier placement another name.
                let epoch = if is_open { world.epochs[&session] } else { world.next_epoch };
                world.epochs.insert(session, epoch);
                vec![open(SESSIONS[session], epoch)]
            }
            Step::Call(session, number) => {
                let epoch = world.epochs.get(&session).copied().unwrap_or(0);
                vec![call(SESSIONS[session], epoch, &name(&world, session, number), 0)]
            }
            Step::Cancel(session, number, mode) => {
                let epoch = world.epochs.get(&session).copied().unwrap_or(0);
                vec![cancel(SESSIONS[session], epoch, &name(&world, session, number), mode)]
            }
            Step::Close(session) => vec![close(SESSIONS[session], world.epochs.get(&session).copied().unwrap_or(0))],
            Step::Acknowledge(number) => {
                let id = world.told.keys().nth(usize::from(number)).cloned();
                id.map(|call_id| Input::Work(WorkItem::Acknowledge { call_id })).into_iter().collect()
            }
            Step::Answer(number) => {
                if world.open.is_empty() {
                    continue;
                }
                let action = world.open.remove(number % world.open.len());
                world.answer(action)?
            }
            Step::End(number) => world.end(number),
            Step::Idle(session) => vec![Input::IdlePassed { session_id: sid(SESSIONS[session]) }],
            Step::Lapse(true) => {
                world.lapsed = true;
                Vec::new()
            }
            Step::Lapse(false) => vec![world.renew()],
            Step::Kill(kept, done, with_machine) => {
                let recovered = world.kill(kept, done, with_machine)?;
                core = super::core_tests::core(config());
                vec![Input::Recovered(Box::new(recovered)), resume()]
            }
        };
        for input in inputs {
            let actions = core.handle(input);
            world.take(actions)?;
        }
    }
    let renewed = core.handle(world.renew());
    world.take(renewed)?;
    settle(&mut core, &mut world)?;
    let renewed = core.handle(world.renew());
    world.take(renewed)?;
    settle(&mut core, &mut world)?;
    for call_id in &world.accepted {
        prop_assert!(world.told.contains_key(call_id), "{call_id} was accepted and never answered");
    }
    Ok(())
}

impl World {
    fn renew(&mut self) -> Input {
        self.lapsed = false;
        self.renewals += 1;
        Input::Work(WorkItem::Lease { session_id: None, until_ns: self.renewals, orphan_time: Duration::ZERO })
    }

    /// Number `number` of the running calls ends.
    fn end(&mut self, number: usize) -> Vec<Input> {
        let running: Vec<_> = self
            .sandboxes
            .iter()
            .flat_map(|(session, calls)| calls.iter().map(move |(id, state)| (session.clone(), id.clone(), *state)))
            .filter(|(.., state)| *state == InSandbox::Running)
            .collect();
        let Some((session_id, call_id, _)) = running.get(number % running.len().max(1)).cloned() else {
            return Vec::new();
        };
        let attaching = |(action, _): &(Action, usize)| matches!(action, Action::AttachSandbox { session_id: attaching, .. } if *attaching == session_id);
        let heard = !self.open.iter().any(attaching);
        if let Some(calls) = self.sandboxes.get_mut(&session_id) {
            calls.insert(call_id.clone(), InSandbox::Finished);
        }
        // A runner that has not attached yet hears it then.
        if heard { vec![ended(call_id.as_str())] } else { Vec::new() }
    }
}

/// Everything is answered and every call ends.
fn settle(core: &mut Core, world: &mut World) -> Result<(), TestCaseError> {
    for _ in 0..10_000 {
        let inputs = match world.open.is_empty() {
            false => {
                let action = world.open.remove(0);
                world.answer(action)?
            }
            true => world.end(0),
        };
        if inputs.is_empty() && world.open.is_empty() {
            return Ok(());
        }
        for input in inputs {
            let actions = core.handle(input);
            world.take(actions)?;
        }
    }
    Err(TestCaseError::fail("it does not come to rest"))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, max_shrink_iters: 4000, ..ProptestConfig::default() })]

    #[test]
    fn no_kill_makes_a_call_begin_twice_or_lose_its_outcome(steps in prop::collection::vec(step(), 1..160)) {
        live(steps)?;
    }
}

#[test]
fn the_model_notices_a_call_that_begins_twice() {
    let mut world = World::default();
    world.sandboxes.insert(sid("s0"), BTreeMap::new());
    let go = Action::Go { session_id: sid("s0"), call_id: cid("c") };
    for _ in 0..2 {
        world.sandboxes.entry(sid("s0")).or_default().insert(cid("c"), InSandbox::Prepared);
        let reached = world.reach(&go);
        if world.begun[&cid("c")] == 2 {
            assert!(reached.is_err());
        }
    }
}
