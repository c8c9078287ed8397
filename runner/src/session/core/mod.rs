//! The state machine of sessions and calls: event in, actions out.
//!
//! It knows no clock, no file and no runtime, so the same code runs in production, in property tests and in simulation.
//! Its promises: an accepted call gets exactly one outcome; a call is prepared at most once, and its gate is opened only
//! after its start was written down; calls of a session start in the order in which they arrived; everything it holds
//! is bounded by `Config`.

mod begin;
mod blame;
mod calls;
mod end;
mod failures;
mod idle;
mod restore;
mod sessions;
mod state;
mod types;

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use failures::busy;
use state::{Call, Phase, Session, SessionPhase};
pub use state::{CallStage, SessionStage};
pub use types::{Action, Config, IdlePolicy, Input};

use crate::work::{
    CallId, CallPhase, CancelMode, Code, DrainMode, DrainedBy, Pressure, Receipt, Replay, RequestKind, SandboxId,
    SessionClose, SessionEnd, SessionId, SessionOpen, ToolFailure, Update, WorkItem,
};

use super::registry::Registry;

/// All sessions and calls of this runner.
#[derive(Debug)]
pub struct Core {
    config: Config,
    registry: Registry,
    // In an order of their own, so that the same events always lead to the same actions.
    sessions: BTreeMap<SessionId, Session>,
    calls: BTreeMap<CallId, Call>,
    /// Calls that were taken so far, for their order.
    taken: u64,
    tombstones: VecDeque<CallId>,
    /// Those of them whose record is on its way to disk.
    unwritten_tombstones: HashSet<CallId>,
    /// Highest epoch of a session that was forgotten: an unknown session at or below it is a late duplicate.
    epoch_floor: u64,
    queued: usize,
    running: usize,
    /// Sessions that could start a call but for the limit of the whole runner.
    starved: VecDeque<SessionId>,
    /// How the orchestrator and the operator want it emptied.
    drain_asked: [Option<DrainMode>; 2],
    suspended: bool,
    /// Somebody has said that this runner serves.
    confirmed: bool,
    /// A gate was kept shut because the lease had lapsed; until it is renewed.
    lapsed: bool,
    read_only: bool,
    /// Until when an orchestrator may be counted on, and how long sandboxes live beyond it.
    lease: Option<(u64, Duration)>,
    /// What the host is short of.
    pressure: Arc<Pressure>,
    /// Sandboxes of an earlier runner that are being taken over.
    attaching: usize,
    actions: Vec<Action>,
}

impl Core {
    /// An empty runner.
    #[must_use]
    pub fn new(config: Config, registry: Registry) -> Self {
        Self {
            config,
            registry,
            sessions: BTreeMap::new(),
            calls: BTreeMap::new(),
            taken: 0,
            tombstones: VecDeque::new(),
            unwritten_tombstones: HashSet::new(),
            epoch_floor: 0,
            queued: 0,
            running: 0,
            starved: VecDeque::new(),
            drain_asked: [None; 2],
            suspended: false,
            confirmed: false,
            lapsed: false,
            read_only: false,
            lease: None,
            pressure: Arc::default(),
            attaching: 0,
            actions: Vec::new(),
        }
    }

    /// Takes one event and returns what must be done, in this order.
    pub fn handle(&mut self, input: Input) -> Vec<Action> {
        let counts = (self.sessions.len(), self.open_calls());
        match input {
            Input::Work(item) => self.work(item),
            Input::Recovered(recovered) => self.restore(*recovered),
            Input::ResumeWritten { call_id, durable } => self.journalled_resume(&call_id, durable),
            Input::MinutePassed => self.minute_passed(),
            Input::SandboxAttached { session_id, found, processes } => {
                self.sandbox_attached(&session_id, &found, processes);
            }
            Input::SandboxReady { session_id, sandbox_id, receipt } => {
                self.sandbox_ready(&session_id, sandbox_id, receipt);
            }
            Input::ReadyWritten { session_id, durable } => self.journalled_ready(&session_id, durable),
            Input::EndedWritten { session_id, durable } => self.journalled_session_end(&session_id, durable),
            Input::SandboxFailed { session_id, failure } => {
                self.end_session(&session_id, SessionEnd::OpenFailed(failure));
            }
            Input::SandboxClosed { session_id } => self.sandbox_closed(&session_id),
            Input::SandboxLost { session_id, reason } => self.sandbox_lost(&session_id, &reason),
            Input::Accepted { call_id, durable } => self.journalled_accepted(&call_id, durable),
            Input::AcceptRefused { call_id, reason } => self.unaccept(&call_id, busy(&reason)),
            Input::CancelWritten { call_id, epoch, phase, durable } => {
                self.journalled_cancel(call_id, epoch, phase, durable);
            }
            Input::GateKept { call_id } => self.gate_kept(&call_id),
            Input::CancelRefused { call_id, epoch, phase, reason } => {
                self.cancel_refused(call_id, epoch, phase, &reason);
            }
            Input::Prepared { call_id } => self.prepared(&call_id),
            Input::PrepareFailed { call_id, failure } => self.prepare_failed(&call_id, failure),
            Input::StartWritten { call_id, durable } => self.journalled_start(&call_id, durable),
            Input::Started { call_id, boottime_ns, shell_generation } => {
                self.started(&call_id, boottime_ns, shell_generation);
            }
            Input::Aborted { call_id } => self.aborted(&call_id),
            Input::Ended { call_id, result } => self.ended(&call_id, result),
            Input::EndWritten { call_id, durable } => self.journalled_end(&call_id, durable),
            Input::StartDeadline { call_id } => self.start_deadline(&call_id),
            Input::IdlePassed { session_id } => self.idle_passed(&session_id),
            Input::Frozen { session_id, result } => self.frozen(&session_id, &result),
            Input::Stopped { session_id, result } => self.stopped(&session_id, &result),
            Input::Thawed { session_id, result } => self.thawed(&session_id, result),
        }
        self.drain_idle_sessions();
        if self.is_draining() && counts != (self.sessions.len(), self.open_calls()) {
            self.report_drain();
        }
        std::mem::take(&mut self.actions)
    }

    /// From when on no call of a session may begin, by CLOCK_BOOTTIME; `None` while nobody has given a lease. Whoever carries
    /// out `Action::Go`, or `Action::Prepare` without a gate, judges it at that moment and answers `Input::GateKept` when it
    /// has passed.
    #[must_use]
    pub fn lease_until_ns(&self, session_id: &SessionId) -> Option<u64> {
        self.lease_of(session_id).map(|(until_ns, _)| until_ns)
    }

    /// The lease that counts for a session.
    fn lease_of(&self, session_id: &SessionId) -> Option<(u64, Duration)> {
        match self.sessions.get(session_id) {
            Some(session) if session.own_lease => session.lease,
            _ => self.lease,
        }
    }

    /// Whether something may begin in a session, as far as that is up to whoever has placed it.
    fn may_begin(&self, session: &Session) -> bool {
        let granted = if session.own_lease {
            session.lease.is_some() && !session.lapsed
        } else {
            !self.suspended && !self.lapsed
        };
        granted && !session.suspended
    }

    /// Calls that have not ended.
    #[must_use]
    pub fn open_calls(&self) -> usize {
        self.sessions.values().map(|session| session.open).sum()
    }

    /// Calls that wait.
    #[must_use]
    pub fn queued_calls(&self) -> usize {
        self.queued
    }

    /// Calls between preparation and end.
    #[must_use]
    pub fn running_calls(&self) -> usize {
        self.running
    }

    /// Whether work is refused because the runner is being emptied.
    #[must_use]
    pub fn is_draining(&self) -> bool {
        self.drain_mode().is_some()
    }

    /// Whether an earlier runner took this call.
    #[must_use]
    pub fn is_restored(&self, call_id: &CallId) -> bool {
        self.calls.get(call_id).is_some_and(|call| call.restored)
    }

    /// Whether the journal has refused a record.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether nothing is left that another process could not do better: the journal takes nothing any more, no session has a
    /// sandbox, and every result that was told is acknowledged. What was accepted and never ran is in the journal, for that one.
    #[must_use]
    pub fn is_spent(&self) -> bool {
        let is_gone =
            |session: &Session| matches!(&session.phase, SessionPhase::Closing(ending) if ending.sandbox_gone);
        self.read_only
            && self.sessions.values().all(is_gone)
            && !self.calls.values().any(|call| matches!(call.phase, Phase::Finished(_)))
    }

    /// Every session with its epoch and stage, for people and for resuming a link.
    pub fn sessions(&self) -> impl Iterator<Item = (&SessionOpen, u64, SessionStage, &Receipt)> {
        self.sessions.values().map(|session| (&session.open_request, session.epoch, session.stage(), &session.receipt))
    }

    /// Every call that is not forgotten, with its stage, for people and for resuming a link.
    pub fn calls(&self) -> impl Iterator<Item = (&crate::work::ToolCall, CallStage)> {
        self.calls.values().map(|call| (&call.request, call.stage()))
    }

    /// The request of a call that is not forgotten.
    #[must_use]
    pub fn request(&self, call_id: &CallId) -> Option<&crate::work::ToolCall> {
        self.calls.get(call_id).map(|call| &call.request)
    }

    fn work(&mut self, item: WorkItem) {
        match item {
            WorkItem::Open(request) => self.open(request),
            WorkItem::Call(call) => self.call(call),
            WorkItem::Cancel { session_id, epoch, call_id, mode } => self.cancel(session_id, epoch, &call_id, mode),
            WorkItem::Acknowledge { call_id } => self.acknowledge(&call_id),
            WorkItem::Stdin { call_id, offset, data, eof } => {
                if let Some(session_id) = self.running_session(&call_id, RequestKind::Stdin) {
                    self.actions.push(Action::Stdin { session_id, call_id, offset, data, eof });
                }
            }
            WorkItem::Resize { call_id, columns, rows } => {
                if let Some(session_id) = self.running_session(&call_id, RequestKind::Resize) {
                    self.actions.push(Action::Resize { session_id, call_id, columns, rows });
                }
            }
            WorkItem::Close(request) => self.close(request),
            WorkItem::Suspend { session_id: None } => self.suspended = true,
            WorkItem::Resume { session_id: None } => {
                self.suspended = false;
                if !std::mem::replace(&mut self.confirmed, true) {
                    self.actions.push(Action::EndUnknown { session_id: None });
                }
                self.start_everywhere();
            }
            WorkItem::Suspend { session_id: Some(session_id) } => self.set_suspended(&session_id, true),
            WorkItem::Resume { session_id: Some(session_id) } => self.set_suspended(&session_id, false),
            WorkItem::Lease { session_id: None, until_ns, orphan_time } => self.renew(until_ns, orphan_time),
            WorkItem::Lease { session_id: Some(session_id), until_ns, orphan_time } => {
                self.renew_one(&session_id, until_ns, orphan_time);
            }
            WorkItem::Drain { mode, by } => self.drain(mode, by),
            WorkItem::Pressure(pressure) => {
                self.pressure = pressure;
                self.freeze_under_pressure();
            }
        }
    }

    /// The harder of what was asked for.
    fn drain_mode(&self) -> Option<DrainMode> {
        self.drain_asked.into_iter().max().flatten()
    }

    fn drain(&mut self, mode: DrainMode, by: DrainedBy) {
        let [by_orchestrator, by_operator] = &mut self.drain_asked;
        *match by {
            DrainedBy::Orchestrator => by_orchestrator,
            DrainedBy::Operator => by_operator,
        } = (mode != DrainMode::Undo).then_some(mode);
        if self.drain_mode() == Some(DrainMode::Now) {
            let ids: Vec<_> = self.sessions.keys().cloned().collect();
            for session_id in ids {
                self.begin_close(&session_id, SessionEnd::Drained, self.config.drain_grace);
            }
        }
        self.report_drain();
    }

    fn drain_idle_sessions(&mut self) {
        if self.drain_mode() != Some(DrainMode::FinishCalls) {
            return;
        }
        let idle = |session: &&Session| session.open == 0 && !matches!(session.phase, SessionPhase::Closing(_));
        let ids: Vec<_> = self.sessions.values().filter(idle).map(|s| s.open_request.session_id.clone()).collect();
        for session_id in ids {
            self.begin_close(&session_id, SessionEnd::Drained, self.config.drain_grace);
        }
    }

    /// The place of the next call that is taken.
    fn next_order(&mut self) -> u64 {
        self.taken += 1;
        self.taken
    }

    /// Calls between preparation and end of a session, in the order in which they were taken.
    fn active_of(&self, session_id: &SessionId) -> Vec<CallId> {
        let Some(session) = self.sessions.get(session_id) else { return Vec::new() };
        let mut active: Vec<_> = session.active.iter().cloned().collect();
        active.sort_by_key(|call_id| self.calls.get(call_id).map(|call| call.order));
        active
    }

    fn report_drain(&mut self) {
        let (sessions_left, calls_left) = (self.sessions.len(), self.open_calls());
        let draining = self.is_draining();
        self.tell(Update::Drained { draining, sessions_left, calls_left });
    }

    fn tell(&mut self, update: Update) {
        self.actions.push(Action::Tell(update));
    }

    fn refuse(
        &mut self,
        request: RequestKind,
        session_id: Option<SessionId>,
        call_id: Option<CallId>,
        epoch: u64,
        failure: ToolFailure,
    ) {
        self.tell(Update::Refused { request, session_id, call_id, epoch, failure });
    }
}
