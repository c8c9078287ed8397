//! What outlives a runner that is killed: a disk that keeps a prefix of the records, at least as long as what was reported as
//! durable, and sandboxes that remember what reached them and go on.
//!
//! It checks what is promised over all lives of the runner together: a call begins at most once, after the record of its
//! start is on the disk, and never after a cancel that was confirmed; each accepted call has one outcome; what was told never
//! changes, and nobody is told that a call did not run which did. Who asks for all that is in `core_machine_tests`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use super::core::{Action, Config, IdlePolicy, Input};
use super::core_tests::{cid, ended, sid};
use crate::journal::{MOST_STARTS, Record, Recovered, RecoveredCall, RecoveredPhase, RecoveredSession};
use crate::work::*;

/// What process 1 of a sandbox knows of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum InSandbox {
    Prepared,
    Running,
    Finished,
    Forgotten,
}

#[derive(Debug, Default)]
pub(super) struct World {
    /// Everything that was asked to be written, in order.
    pub(super) records: Vec<Record>,
    /// So many of them were reported as durable.
    durable: usize,
    /// Actions that wait for an answer, with the number of records at that time.
    pub(super) open: Vec<(Action, usize)>,
    /// Living sandboxes by session: their number, and their calls.
    sandboxes: BTreeMap<SessionId, BTreeMap<CallId, InSandbox>>,
    /// What their processes do; those that run are not named.
    resting: BTreeMap<SessionId, Processes>,
    /// What calls have written, until their sandbox may forget it.
    pub(super) outputs: BTreeMap<CallId, u64>,
    pub(super) begun: BTreeMap<CallId, u32>,
    /// Sessions whose sandbox a runner has ended that did not live to write that down.
    pub(super) cut_off: BTreeSet<SessionId>,
    /// Placements whose end was told.
    over: BTreeSet<(SessionId, u64)>,
    /// The newest placement of a session that was told to be open.
    pub(super) opened: BTreeMap<SessionId, u64>,
    pub(super) lapsed: bool,
    renewals: u64,
    pub(super) accepted: BTreeSet<CallId>,
    /// Cancels that were confirmed before their call began.
    spared: BTreeSet<CallId>,
    /// Calls whose start this runner has heard of.
    started: BTreeSet<CallId>,
    /// What this runner has told of a call so far.
    stages: BTreeMap<CallId, CallPhase>,
    pub(super) told: BTreeMap<CallId, CallEnd>,
    /// Results that the caller has stored.
    pub(super) acknowledged: BTreeSet<CallId>,
}

impl World {
    pub(super) fn take(&mut self, actions: Vec<Action>) -> Result<(), TestCaseError> {
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
                Action::WriteAccepted(call) => {
                    let id = &call.call_id;
                    prop_assert!(!has_accepted(&self.records, id), "{id} is taken a second time");
                    self.records.push(Record::Accepted(Box::new(call.clone())));
                }
                Action::WriteStarted { call_id } => {
                    let record = Record::Started { call_id: call_id.clone() };
                    let before = self.records.iter().filter(|before| **before == record).count();
                    prop_assert!(before < MOST_STARTS as usize, "{call_id} is about to be started {before} times");
                    self.records.push(record);
                }
                Action::WriteFinished { call_id, result } => {
                    self.records.push(Record::Finished { call_id: call_id.clone(), result: Arc::clone(result) });
                }
                Action::Trim { call_id } => {
                    prop_assert!(
                        self.acknowledged.contains(call_id),
                        "{call_id} is forgotten, and nobody has its result"
                    );
                    self.records.push(Record::Acknowledged { call_id: call_id.clone() });
                }
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
            Update::SessionOpened { session_id, epoch, .. } => {
                let before = self.opened.insert(session_id.clone(), *epoch);
                prop_assert!(
                    before.is_none_or(|before| before <= *epoch),
                    "{session_id} went back to placement {epoch}"
                );
            }
            // A start is told again by every runner.
            Update::CallRestored { call_id, phase, .. } => {
                let stage = if *phase == CallPhase::Finished { CallPhase::Finished } else { CallPhase::Accepted };
                self.stages.insert(call_id.clone(), stage);
            }
            Update::CallAccepted { call_id, replay: Replay::First, .. } => {
                self.accepted.insert(call_id.clone());
                self.advance(call_id, CallPhase::Accepted)?;
            }
            Update::CallStarted { call_id, .. } => self.advance(call_id, CallPhase::Started)?,
            Update::CancelNoted { call_id, .. } if !self.begun.contains_key(call_id) => {
                self.spared.insert(call_id.clone());
            }
            Update::CallFinished { call_id, result, .. } => {
                let outcome = &result.end.outcome;
                let nothing =
                    matches!(outcome, Outcome::NeverStarted { .. } | Outcome::Cancelled { before_start: true, .. });
                let begun = self.begun.get(call_id).copied().unwrap_or(0);
                prop_assert!(!(nothing && begun > 0), "{call_id} began, and its caller was told that it did not");
                prop_assert!(
                    begun > 0 || !matches!(outcome, Outcome::Exited { .. }),
                    "{call_id} ended without a begin"
                );
                let before = self.told.insert(call_id.clone(), result.end.clone());
                prop_assert!(before.is_none_or(|before| before == result.end), "two ends of {call_id} were told");
                self.stages.insert(call_id.clone(), CallPhase::Finished);
            }
            Update::SessionEnded { session_id, epoch, .. } => drop(self.over.insert((session_id.clone(), *epoch))),
            _ => {}
        }
        Ok(())
    }

    /// What is told of a call goes on, and nothing of it is told twice.
    fn advance(&mut self, call_id: &CallId, stage: CallPhase) -> Result<(), TestCaseError> {
        let before = self.stages.insert(call_id.clone(), stage);
        prop_assert!(
            before.is_none_or(|before| (before as u8) < stage as u8),
            "{call_id} is {stage:?} after it was {before:?}"
        );
        Ok(())
    }

    /// Whether a record of the start of a call is on the disk, and one of its acceptance.
    fn is_start_durable(&self, call_id: &CallId) -> bool {
        let durable = &self.records[..self.durable];
        durable.contains(&Record::Started { call_id: call_id.clone() }) && has_accepted(durable, call_id)
    }

    /// An action reaches a sandbox.
    fn reach(&mut self, action: &Action) -> Result<(), TestCaseError> {
        match action {
            Action::Prepare { session_id, call } => {
                prop_assert_eq!(self.resting.get(session_id), None, "{} given to what stands still", call.call_id);
                if let Some(calls) = self.sandboxes.get_mut(session_id) {
                    let before = calls.insert(call.call_id.clone(), InSandbox::Prepared);
                    prop_assert!(before.is_none(), "{} was handed over again", call.call_id);
                }
            }
            Action::Go { session_id, call_id } => {
                prop_assert_eq!(self.resting.get(session_id), None, "{} let go where everything stands still", call_id);
                let is_durable = self.is_start_durable(call_id);
                let known = self.sandboxes.get_mut(session_id).and_then(|calls| calls.get_mut(call_id));
                if let Some(known) = known.filter(|known| **known == InSandbox::Prepared) {
                    *known = InSandbox::Running;
                    let begun = self.begun.entry(call_id.clone()).or_default();
                    *begun += 1;
                    prop_assert_eq!(*begun, 1, "{} began twice", call_id);
                    prop_assert!(is_durable, "{call_id} began before the record of its start was on the disk");
                    prop_assert!(!self.spared.contains(call_id), "{call_id} began after its cancel was confirmed");
                    self.outputs.insert(call_id.clone(), 0);
                }
            }
            Action::Abort { session_id, call_id } => {
                let calls = self.sandboxes.entry(session_id.clone()).or_default();
                if calls.get(call_id) == Some(&InSandbox::Prepared) {
                    calls.remove(call_id);
                }
            }
            Action::Acknowledge { call_id } => {
                prop_assert!(
                    self.acknowledged.contains(call_id),
                    "the output of {call_id} is dropped, and nobody has it"
                );
                self.outputs.remove(call_id);
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

    pub(super) fn answer(&mut self, (action, at): (Action, usize)) -> Result<Vec<Input>, TestCaseError> {
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
            Action::WriteFinished { call_id, .. } => {
                written();
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
                    inputs.push(end_of(call_id, self.outputs.get(call_id).copied()));
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
    pub(super) fn kill(&mut self, kept: usize, done: u64, with_machine: bool) -> Result<Recovered, TestCaseError> {
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
            self.outputs.clear();
        }
        self.started.clear();
        self.stages.clear();
        let recovered = Recovered { same_boot: !with_machine, ..fold(&self.records) };
        for RecoveredSession { open: SessionOpen { session_id, epoch, .. }, .. } in &recovered.sessions {
            let told = self.opened.get(session_id).copied().unwrap_or(0);
            prop_assert!(
                *epoch >= told,
                "placement {told} of {session_id} was told, and the next runner knows {epoch}"
            );
        }
        let with_sandbox = recovered.sessions.iter().filter(|session| session.sandbox.is_some());
        let gone = with_sandbox.map(|session| &session.open.session_id).filter(|id| !self.sandboxes.contains_key(id));
        self.cut_off.extend(gone.cloned());
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

pub(super) fn config() -> Config {
    let [freeze_after, stop_after, end_after] = [1, 2, 3].map(|seconds| Some(Duration::from_secs(seconds)));
    Config { idle: IdlePolicy { freeze_after, stop_after, end_after }, ..Config::default() }
}

impl World {
    pub(super) fn renew(&mut self) -> Input {
        self.lapsed = false;
        self.renewals += 1;
        Input::Work(WorkItem::Lease { session_id: None, until_ns: self.renewals, orphan_time: Duration::ZERO })
    }

    /// Number `number` of the running calls writes so much.
    pub(super) fn write(&mut self, number: usize, bytes: u64) {
        if let Some((_, call_id)) = self.running(number) {
            *self.outputs.entry(call_id).or_default() += bytes;
        }
    }

    /// Number `number` of the running calls ends.
    pub(super) fn end(&mut self, number: usize) -> Vec<Input> {
        let Some((session_id, call_id)) = self.running(number) else { return Vec::new() };
        let heard = self.is_heard(&session_id);
        if let Some(calls) = self.sandboxes.get_mut(&session_id) {
            calls.insert(call_id.clone(), InSandbox::Finished);
        }
        // A runner that has not attached yet hears it then.
        if heard { vec![end_of(&call_id, self.outputs.get(&call_id).copied())] } else { Vec::new() }
    }

    /// The start of number `number` of the running calls is reported.
    pub(super) fn start(&mut self, number: usize) -> Vec<Input> {
        let Some((session_id, call_id)) = self.running(number) else { return Vec::new() };
        if !self.is_heard(&session_id) || !self.started.insert(call_id.clone()) {
            return Vec::new();
        }
        vec![Input::Started { call_id, boottime_ns: 1, shell_generation: 1 }]
    }

    /// Whether the runner has attached to the sandbox of a session.
    fn is_heard(&self, of: &SessionId) -> bool {
        !self
            .open
            .iter()
            .any(|(action, _)| matches!(action, Action::AttachSandbox { session_id, .. } if session_id == of))
    }

    fn running(&self, number: usize) -> Option<(SessionId, CallId)> {
        let calls =
            self.sandboxes.iter().flat_map(|(session_id, calls)| calls.iter().map(move |call| (session_id, call)));
        let running: Vec<_> = calls.filter(|(_, (_, state))| **state == InSandbox::Running).collect();
        let (session_id, (call_id, _)) = running.get(number % running.len().max(1))?;
        Some(((*session_id).clone(), (*call_id).clone()))
    }
}

fn has_accepted(records: &[Record], call_id: &CallId) -> bool {
    records.iter().any(|record| matches!(record, Record::Accepted(call) if call.call_id == *call_id))
}

/// The end of a call that has run, as its sandbox reports it.
fn end_of(call_id: &CallId, written: Option<u64>) -> Input {
    let mut input = ended(call_id.as_str());
    if let (Input::Ended { result, .. }, Some(total_bytes)) = (&mut input, written) {
        Arc::make_mut(result).end.streams.push(StreamSummary {
            stream: Stream::Stdout,
            total_bytes,
            head_bytes: total_bytes,
            tail_bytes: 0,
            sha256: [0; 32],
            inline: None,
            spool_path: String::new(),
        });
    }
    input
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
