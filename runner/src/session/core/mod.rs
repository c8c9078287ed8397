//! The state machine of sessions and calls: event in, actions out.
//!
//! It knows no clock, no file and no runtime, so the same code runs in production, in property tests and in simulation.
//! Its promises: an accepted call gets exactly one outcome; a call is prepared at most once, and its gate is opened only
//! after its start was written down; calls of a session start in the order in which they arrived; everything it holds
//! is bounded by `Config`.

mod calls;
mod restore;
mod state;
mod types;

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use state::{Call, Ending, Phase, Session, SessionPhase};
pub use state::{CallStage, SessionStage};
pub use types::{Action, Config, Input};

use crate::journal::Record;
use crate::work::{
    CallId, CallPhase, CancelMode, Code, DrainMode, Receipt, Replay, RequestKind, SandboxId, SessionClose, SessionEnd,
    SessionId, SessionOpen, ToolFailure, Update, WorkItem,
};

use super::registry::Registry;

/// All sessions and calls of this runner.
#[derive(Debug)]
pub struct Core {
    config: Config,
    registry: Registry,
    sessions: HashMap<SessionId, Session>,
    calls: HashMap<CallId, Call>,
    tombstones: VecDeque<CallId>,
    /// Highest epoch of a session that was forgotten: an unknown session at or below it is a late duplicate.
    epoch_floor: u64,
    queued: usize,
    running: usize,
    /// Sessions that could start a call but for the limit of the whole runner.
    starved: VecDeque<SessionId>,
    drain: Option<DrainMode>,
    suspended: bool,
    read_only: bool,
    /// Until when an orchestrator may be counted on, and how long sandboxes live beyond it.
    lease: Option<(u64, Duration)>,
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
            sessions: HashMap::new(),
            calls: HashMap::new(),
            tombstones: VecDeque::new(),
            epoch_floor: 0,
            queued: 0,
            running: 0,
            starved: VecDeque::new(),
            drain: None,
            suspended: false,
            read_only: false,
            lease: None,
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
            Input::SandboxAttached { session_id, found } => self.sandbox_attached(&session_id, &found),
            Input::SandboxReady { session_id, sandbox_id, receipt } => {
                self.sandbox_ready(&session_id, sandbox_id, receipt);
            }
            Input::ReadyWritten { session_id, durable } => self.journalled_ready(&session_id, durable),
            Input::SandboxFailed { session_id, failure } => {
                self.end_session(&session_id, SessionEnd::OpenFailed(failure));
            }
            Input::SandboxClosed { session_id } => self.sandbox_closed(&session_id),
            Input::SandboxLost { session_id, reason } => self.sandbox_lost(&session_id, &reason),
            Input::Accepted { call_id, durable } => self.journalled_accepted(&call_id, durable),
            Input::AcceptRefused { call_id, reason } => self.unaccept(&call_id, busy(&reason)),
            Input::TombstoneWritten { call_id, epoch, phase, durable } => {
                self.journalled_tombstone(call_id, epoch, phase, durable);
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
        }
        self.drain_idle_sessions();
        if self.drain.is_some() && counts != (self.sessions.len(), self.open_calls()) {
            self.report_drain();
        }
        std::mem::take(&mut self.actions)
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
        self.drain.is_some()
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
                self.start_everywhere();
            }
            WorkItem::Suspend { session_id: Some(session_id) } => self.set_suspended(&session_id, true),
            WorkItem::Resume { session_id: Some(session_id) } => self.set_suspended(&session_id, false),
            WorkItem::Lease { until_ns, orphan_time } => self.renew(until_ns, orphan_time),
            WorkItem::Drain(mode) => self.drain(mode),
        }
    }

    /// Whoever places a session elsewhere waits for that long, so nothing of it may be alive here then.
    fn renew(&mut self, until_ns: u64, orphan_time: Duration) {
        self.lease = Some((until_ns, orphan_time));
        let mut ids: Vec<_> = self.sessions.keys().cloned().collect();
        ids.sort();
        for session_id in ids {
            self.set_deadline(&session_id);
        }
    }

    fn set_deadline(&mut self, session_id: &SessionId) {
        let (Some(session), Some((until_ns, orphan_time))) = (self.sessions.get(session_id), self.lease) else {
            return;
        };
        if matches!(session.phase, SessionPhase::Ready) {
            let orphan_time = session.open_request.orphan_timeout.unwrap_or(orphan_time);
            let nanoseconds = u64::try_from(orphan_time.as_nanos()).unwrap_or(u64::MAX);
            let boottime_ns = until_ns.saturating_add(nanoseconds);
            self.actions.push(Action::Deadline { session_id: session_id.clone(), boottime_ns });
        }
    }

    fn set_suspended(&mut self, session_id: &SessionId, suspended: bool) {
        if let Some(session) = self.sessions.get_mut(session_id) {
            session.suspended = suspended;
            self.start_in(session_id);
        }
    }

    fn open(&mut self, request: SessionOpen) {
        let (session_id, epoch) = (request.session_id.clone(), request.epoch);
        if let Some(session) = self.sessions.get_mut(&session_id) {
            let answered = if epoch < session.epoch {
                Err(stale(&session_id, epoch, session.epoch))
            } else if session.open_request.digest != request.digest {
                Err(ToolFailure::new(
                    Code::SessionConflict,
                    format!("session {session_id} is open with another environment, limits or policy"),
                    "close the session first, or send the request it was opened with",
                ))
            } else {
                if epoch > session.epoch {
                    session.epoch = epoch;
                    let taken_over = SessionOpen { epoch, ..session.open_request.clone() };
                    self.actions.push(Action::Note(Record::SessionOpening(Box::new(taken_over))));
                    // That only the newest placement is obeyed must be known to the next runner before anybody counts on it.
                    if let (SessionPhase::Ready, Some(sandbox_id)) = (&session.phase, session.sandbox_id.clone()) {
                        let receipt = session.receipt.clone();
                        return self.actions.push(Action::WriteReady { session_id, sandbox_id, receipt });
                    }
                }
                match session.phase {
                    SessionPhase::Ready => Ok(Some(session.receipt.clone())),
                    SessionPhase::Opening | SessionPhase::Recording => Ok(None),
                    SessionPhase::Closing(_) => Err(closing(&session_id)),
                }
            };
            match answered {
                Ok(Some(receipt)) => {
                    self.tell(Update::SessionOpened { session_id, epoch, receipt, replay: Replay::Duplicate });
                }
                Ok(None) => {}
                Err(failure) => self.refuse(RequestKind::Open, Some(session_id), None, epoch, failure),
            }
            return;
        }
        match self.admit(&request) {
            Ok(request) => {
                self.sessions.insert(session_id.clone(), Session::new(request.clone()));
                self.actions.push(Action::Note(Record::SessionOpening(Box::new(request.clone()))));
                self.actions.push(Action::CreateSandbox(Box::new(request)));
            }
            Err(failure) => self.refuse(RequestKind::Open, Some(session_id), None, epoch, failure),
        }
    }

    fn admit(&mut self, request: &SessionOpen) -> Result<SessionOpen, ToolFailure> {
        if self.drain.is_some() {
            return Err(draining());
        }
        if self.read_only {
            return Err(read_only());
        }
        if request.epoch <= self.epoch_floor {
            return Err(stale(&request.session_id, request.epoch, self.epoch_floor));
        }
        let limits = self.registry.admit(&request.session_id, request.limits)?;
        Ok(SessionOpen { limits, ..request.clone() })
    }

    fn sandbox_ready(&mut self, session_id: &SessionId, sandbox_id: SandboxId, receipt: Receipt) {
        let Some(session) = self.sessions.get_mut(session_id) else { return };
        session.receipt.clone_from(&receipt);
        session.sandbox_id = Some(sandbox_id.clone());
        match &session.phase {
            SessionPhase::Opening => {
                session.phase = SessionPhase::Recording;
                self.actions.push(Action::WriteReady { session_id: session_id.clone(), sandbox_id, receipt });
            }
            SessionPhase::Closing(ending) => {
                let grace = ending.grace;
                self.actions.push(Action::CloseSandbox { session_id: session_id.clone(), grace });
            }
            SessionPhase::Recording | SessionPhase::Ready => {}
        }
    }

    /// Its caller may count on the session from here: the next runner will find its sandbox.
    fn journalled_ready(&mut self, session_id: &SessionId, durable: bool) {
        self.read_only |= !durable;
        let Some(session) = self.sessions.get_mut(session_id) else { return };
        match (&session.phase, durable) {
            (SessionPhase::Recording, true) => {}
            (SessionPhase::Recording, false) => {
                return self.begin_close(session_id, SessionEnd::OpenFailed(read_only()), Duration::ZERO);
            }
            (SessionPhase::Ready, true) => {
                let (epoch, receipt, replay) = (session.epoch, session.receipt.clone(), Replay::Duplicate);
                return self.tell(Update::SessionOpened { session_id: session_id.clone(), epoch, receipt, replay });
            }
            (SessionPhase::Ready, false) => {
                let epoch = session.epoch;
                return self.refuse(RequestKind::Open, Some(session_id.clone()), None, epoch, read_only());
            }
            (SessionPhase::Opening | SessionPhase::Closing(_), _) => return,
        }
        session.phase = SessionPhase::Ready;
        let (epoch, receipt, replay) = (session.epoch, session.receipt.clone(), Replay::First);
        self.tell(Update::SessionOpened { session_id: session_id.clone(), epoch, receipt, replay });
        self.set_deadline(session_id);
        self.start_next(session_id);
    }

    fn close(&mut self, request: SessionClose) {
        let SessionClose { session_id, epoch, grace, fenced } = request;
        let end = if fenced { SessionEnd::Fenced } else { SessionEnd::Closed };
        let failure = match self.sessions.get(&session_id) {
            None => unknown_session(&session_id),
            Some(session) if epoch != session.epoch => stale(&session_id, epoch, session.epoch),
            Some(_) => return self.begin_close(&session_id, end, grace),
        };
        self.refuse(RequestKind::Close, Some(session_id), None, epoch, failure);
    }

    /// Ends a session whose sandbox still has to be ended.
    fn begin_close(&mut self, session_id: &SessionId, end: SessionEnd, grace: Duration) {
        let Some(session) = self.sessions.get_mut(session_id) else { return };
        let was_ready = match &session.phase {
            SessionPhase::Closing(_) => return,
            phase => matches!(phase, SessionPhase::Recording | SessionPhase::Ready),
        };
        session.phase = SessionPhase::Closing(Ending { end, grace, sandbox_gone: false });
        if was_ready {
            self.actions.push(Action::CloseSandbox { session_id: session_id.clone(), grace });
        }
        self.cancel_queue(session_id);
    }

    fn sandbox_closed(&mut self, session_id: &SessionId) {
        let reason = "the session was closed while the call ran";
        self.settle_active(session_id, Code::OutcomeUnknown, reason);
        self.sandbox_gone(session_id);
    }

    fn sandbox_lost(&mut self, session_id: &SessionId, reason: &str) {
        let Some(session) = self.sessions.get_mut(session_id) else { return };
        let failure = lost(session_id, reason);
        let attaching = session.attaching;
        if !matches!(session.phase, SessionPhase::Closing(_)) {
            let end = SessionEnd::SandboxLost(failure.clone());
            session.phase = SessionPhase::Closing(Ending { end, grace: Duration::ZERO, sandbox_gone: false });
        }
        self.fail_queue(session_id, &failure);
        self.settle_active(session_id, Code::SandboxLost, &failure.message);
        if attaching {
            self.attached_or_lost(session_id);
        }
        self.sandbox_gone(session_id);
    }

    fn end_session(&mut self, session_id: &SessionId, end: SessionEnd) {
        let Some(session) = self.sessions.get_mut(session_id) else { return };
        if let SessionPhase::Opening = session.phase {
            session.phase =
                SessionPhase::Closing(Ending { end: end.clone(), grace: Duration::ZERO, sandbox_gone: false });
        }
        let failure = match end {
            SessionEnd::OpenFailed(failure) | SessionEnd::SandboxLost(failure) => failure,
            _ => closing(session_id),
        };
        self.fail_queue(session_id, &failure);
        self.sandbox_gone(session_id);
    }

    fn sandbox_gone(&mut self, session_id: &SessionId) {
        if let Some(session) = self.sessions.get_mut(session_id)
            && let SessionPhase::Closing(ending) = &mut session.phase
        {
            ending.sandbox_gone = true;
        }
        self.forget_session_if_done(session_id);
    }

    /// A session ends after its last call has its result, so the end of a session is always the last word about it.
    fn forget_session_if_done(&mut self, session_id: &SessionId) {
        let done = self.sessions.get(session_id).is_some_and(
            |session| matches!(&session.phase, SessionPhase::Closing(ending) if ending.sandbox_gone && session.open == 0),
        );
        if !done {
            return;
        }
        let Some(session) = self.sessions.remove(session_id) else { return };
        let SessionPhase::Closing(ending) = session.phase else { return };
        self.registry.release(session_id);
        let ended = Record::SessionEnded { session_id: session_id.clone(), epoch: session.epoch };
        self.actions.push(Action::Note(ended));
        self.epoch_floor = self.epoch_floor.max(session.epoch);
        self.tell(Update::SessionEnded { session_id: session_id.clone(), epoch: session.epoch, end: ending.end });
        self.actions.push(Action::ReleaseSandbox { session_id: session_id.clone() });
    }

    fn drain(&mut self, mode: DrainMode) {
        if mode == DrainMode::Undo {
            self.drain = None;
            return self.start_everywhere();
        }
        self.drain = Some(mode);
        if mode == DrainMode::Now {
            let ids: Vec<_> = self.sessions.keys().cloned().collect();
            for session_id in ids {
                self.begin_close(&session_id, SessionEnd::Drained, self.config.drain_grace);
            }
        }
        self.report_drain();
    }

    fn drain_idle_sessions(&mut self) {
        if self.drain != Some(DrainMode::FinishCalls) {
            return;
        }
        let idle = |session: &&Session| session.open == 0 && !matches!(session.phase, SessionPhase::Closing(_));
        let ids: Vec<_> = self.sessions.values().filter(idle).map(|s| s.open_request.session_id.clone()).collect();
        for session_id in ids {
            self.begin_close(&session_id, SessionEnd::Drained, self.config.drain_grace);
        }
    }

    fn report_drain(&mut self) {
        let (sessions_left, calls_left) = (self.sessions.len(), self.open_calls());
        self.tell(Update::Drained { sessions_left, calls_left });
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

fn unknown_session(session_id: &SessionId) -> ToolFailure {
    ToolFailure::new(
        Code::SessionUnknown,
        format!("session_id: session {session_id} is not open on this runner"),
        "open the session first, with an epoch of its own",
    )
}

fn stale(session_id: &SessionId, given: u64, known: u64) -> ToolFailure {
    ToolFailure::new(
        Code::StaleEpoch,
        format!("epoch: {given} was given for session {session_id}, {known} is known"),
        "the session was placed again since; use the newest epoch",
    )
}

fn closing(session_id: &SessionId) -> ToolFailure {
    ToolFailure::new(
        Code::SessionClosed,
        format!("session {session_id} is closing"),
        "wait for the end of the session, then open it again with a higher epoch",
    )
}

fn lost(session_id: &SessionId, reason: &str) -> ToolFailure {
    ToolFailure::new(
        Code::SandboxLost,
        format!("the sandbox of session {session_id} ended by itself: {reason}"),
        "open the session again with a higher epoch; what was in the sandbox is gone",
    )
}

fn draining() -> ToolFailure {
    ToolFailure::new(Code::Draining, "this runner is being emptied", "place the work on another runner")
}

fn busy(reason: &str) -> ToolFailure {
    ToolFailure::new(
        Code::QueueFull,
        format!("the journal of this runner takes no new call now: {reason}"),
        "send the call again later under a new id, or place the work on another runner",
    )
}

fn read_only() -> ToolFailure {
    ToolFailure::new(
        Code::JournalReadOnly,
        "the journal of this runner refuses writes",
        "place the work on another runner; its operator must look at the disk",
    )
}
