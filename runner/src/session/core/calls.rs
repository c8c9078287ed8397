//! The life of a call: from request to acknowledged result.

use std::sync::Arc;

use super::state::{cancelled_before_start, indeterminate, never_started};
use super::{
    Action, Call, CallId, CallPhase, CancelMode, Code, Core, Phase, Replay, RequestKind, SessionId, SessionPhase,
    ToolFailure, Update, closing, draining, read_only, stale, unknown_session,
};
use crate::work::{CallResult, DrainMode, Gate, Outcome, PreparedCall, ToolCall};

impl Core {
    pub(super) fn call(&mut self, request: ToolCall) {
        if self.calls.contains_key(&request.call_id) {
            return self.repeated(request);
        }
        if let Err(failure) = self.admit_call(&request) {
            let ToolCall { call_id, session_id, epoch, .. } = request;
            return self.refuse(RequestKind::Call, Some(session_id), Some(call_id), epoch, failure);
        }
        let (session_id, call_id) = (request.session_id.clone(), request.call_id.clone());
        if let Some(session) = self.sessions.get_mut(&session_id) {
            session.queue.push_back(call_id.clone());
            session.open += 1;
        }
        self.queued += 1;
        if let Some(within) = request.limits.start_within {
            self.actions.push(Action::ArmStartDeadline { call_id: call_id.clone(), within });
        }
        self.actions.push(Action::WriteAccepted(request.clone()));
        self.calls.insert(call_id, Call::new(request));
        // With a gate, preparing and writing overlap: the sandbox is made ready while the record is on its way to disk.
        self.start_next(&session_id);
    }

    fn repeated(&mut self, request: ToolCall) {
        let Some(call) = self.calls.get(&request.call_id) else { return };
        let (session_id, call_id, epoch) = (request.session_id, request.call_id, request.epoch);
        if call.request.digest != request.digest {
            let failure = ToolFailure::new(
                Code::CallIdReused,
                format!(
                    "call_id: {call_id} was used before for another request (digest {}, now {})",
                    call.request.digest, request.digest
                ),
                "give every call an id of its own",
            );
            return self.refuse(RequestKind::Call, Some(session_id), Some(call_id), epoch, failure);
        }
        // Before the accepted record is written the first answer is still to come, and it will do.
        if !call.accepted {
            return;
        }
        let phase = call.wire_phase();
        let finished = match &call.phase {
            Phase::Finished(result) => Some(Arc::clone(result)),
            _ => None,
        };
        self.tell(Update::CallAccepted {
            call_id: call_id.clone(),
            session_id: session_id.clone(),
            epoch,
            replay: Replay::Duplicate,
            phase,
        });
        if let Some(result) = finished {
            self.tell(Update::CallFinished { call_id, session_id, epoch, result });
        }
    }

    fn admit_call(&mut self, request: &ToolCall) -> Result<(), ToolFailure> {
        let Some(session) = self.sessions.get(&request.session_id) else {
            return Err(unknown_session(&request.session_id));
        };
        if request.epoch != session.epoch {
            return Err(stale(&request.session_id, request.epoch, session.epoch));
        }
        if session.forgotten.contains(&request.call_id) {
            return Err(ToolFailure::new(
                Code::CallForgotten,
                format!("call_id: {} was run and acknowledged earlier", request.call_id),
                "use the result that was acknowledged, or give the call a new id",
            ));
        }
        if self.tombstones.contains(&request.call_id) {
            return Err(ToolFailure::new(
                Code::CancelledBeforeStart,
                format!("call_id: {} was cancelled before it arrived", request.call_id),
                "give the call a new id if it is wanted after all",
            ));
        }
        if matches!(session.phase, SessionPhase::Closing(_)) {
            return Err(closing(&request.session_id));
        }
        if matches!(self.drain, Some(DrainMode::FinishCalls | DrainMode::Now)) {
            return Err(draining());
        }
        if self.read_only {
            return Err(read_only());
        }
        request.input.validate()?;
        let bounds = [
            ("calls waiting in this session", session.queue.len(), self.config.queued_per_session),
            ("calls waiting on this runner", self.queued, self.config.queued_per_runner),
            (
                "results of this session without acknowledgement",
                session.unacknowledged,
                self.config.unacknowledged_per_session,
            ),
        ];
        for (what, present, limit) in bounds {
            if present >= limit {
                return Err(ToolFailure::new(
                    Code::QueueFull,
                    format!("{present} {what}, the limit is {limit}"),
                    "wait for a call to finish, acknowledge results, then send the call again",
                ));
            }
        }
        if session.forgotten.len() >= self.config.forgotten_per_session {
            return Err(ToolFailure::new(
                Code::Capacity,
                format!("this session has served {} calls, the most one session can", session.forgotten.len()),
                "close the session and open a new one",
            ));
        }
        Ok(())
    }

    /// Prepares waiting calls of `session_id` as far as limits allow.
    pub(super) fn start_next(&mut self, session_id: &SessionId) {
        // A broken journal takes no start, and the next runner goes on with what waits.
        let may_write = !self.config.gated || !self.read_only;
        while !self.suspended && may_write {
            let Some(session) = self.sessions.get_mut(session_id) else { return };
            if !session.may_start() {
                return;
            }
            if self.running >= self.config.running_per_runner {
                if !self.starved.contains(session_id) {
                    self.starved.push_back(session_id.clone());
                }
                return;
            }
            let Some(call) = session.queue.front().and_then(|call_id| self.calls.get_mut(call_id)) else { return };
            // Without a gate, preparing is starting, and nothing may start before it is accepted.
            if !self.config.gated && !call.accepted {
                return;
            }
            let call_id = call.request.call_id.clone();
            call.phase = Phase::Preparing;
            call.in_sandbox = true;
            session.queue.pop_front();
            session.active.insert(call_id.clone());
            self.queued -= 1;
            self.running += 1;
            let gate = if self.config.gated { Gate::Held } else { Gate::Open };
            let ToolCall { input, limits, output_mode, .. } = call.request.clone();
            // Together with the record of the acceptance, when that is still on its way: one sync for both. What process 1
            // does not know after a crash has not begun, whatever is written down.
            if self.config.gated {
                self.actions.push(Action::WriteStarted { call_id: call_id.clone() });
            }
            self.actions.push(Action::Prepare {
                session_id: session_id.clone(),
                call: PreparedCall { call_id, input, limits, output_mode, gate },
            });
        }
    }

    pub(super) fn start_everywhere(&mut self) {
        let mut ids: Vec<_> = self.sessions.keys().cloned().collect();
        ids.sort();
        for session_id in ids {
            self.start_in(&session_id);
        }
    }

    /// Opens what waited behind a gate while nothing was to begin, then prepares what waits.
    pub(super) fn start_in(&mut self, session_id: &SessionId) {
        let Some(session) = self.sessions.get(session_id) else { return };
        let mut active: Vec<_> = session.active.iter().cloned().collect();
        active.sort();
        for call_id in active {
            self.go_if_written(&call_id);
        }
        self.start_next(session_id);
    }

    pub(super) fn journalled_accepted(&mut self, call_id: &CallId, durable: bool) {
        let Some(call) = self.calls.get_mut(call_id) else { return };
        if !durable {
            self.read_only = true;
            return self.unaccept(call_id, read_only());
        }
        let session_id = call.request.session_id.clone();
        self.accept(call_id);
        self.start_next(&session_id);
    }

    /// The caller may count on the call from here.
    fn accept(&mut self, call_id: &CallId) {
        let Some(call) = self.calls.get_mut(call_id).filter(|call| !call.accepted) else { return };
        call.accepted = true;
        let (session_id, phase) = (call.request.session_id.clone(), call.wire_phase());
        let (epoch, call_id, replay) = (self.epoch_of(call_id), call_id.clone(), Replay::First);
        self.tell(Update::CallAccepted { call_id, session_id, epoch, replay, phase });
    }

    /// Its caller may count on it from here: whatever happens to this process, the call will not run, or will be ended.
    pub(super) fn journalled_tombstone(
        &mut self,
        call_id: CallId,
        epoch: u64,
        phase: Option<CallPhase>,
        durable: bool,
    ) {
        if durable {
            return self.tell(Update::CancelNoted { call_id, epoch, phase });
        }
        self.read_only = true;
        self.refuse(RequestKind::Cancel, None, Some(call_id), epoch, read_only());
    }

    /// The journal refused the call: whatever was prepared is dropped, and its caller hears a refusal.
    pub(super) fn unaccept(&mut self, call_id: &CallId, failure: ToolFailure) {
        let Some(call) = self.calls.get_mut(call_id) else { return };
        match call.phase {
            Phase::Queued => self.finish_queued(call_id, never_started(failure)),
            Phase::Preparing => call.phase = Phase::Aborting(Some(failure)),
            Phase::Prepared => {
                call.phase = Phase::Aborting(Some(failure));
                let session_id = call.request.session_id.clone();
                self.actions.push(Action::Abort { session_id, call_id: call_id.clone() });
            }
            // Cancelled meanwhile: that result stands. The later phases need the record that is missing.
            _ => {}
        }
    }

    pub(super) fn prepared(&mut self, call_id: &CallId) {
        let Some(call) = self.calls.get_mut(call_id) else { return };
        let session_id = call.request.session_id.clone();
        match call.phase {
            Phase::Preparing if !self.config.gated => {
                call.phase = Phase::Running;
                if let Some(mode) = call.cancel {
                    self.actions.push(Action::Cancel { session_id, call_id: call_id.clone(), mode });
                }
            }
            Phase::Preparing => {
                call.phase = Phase::Prepared;
                self.go_if_written(call_id);
            }
            Phase::Aborting(_) => self.actions.push(Action::Abort { session_id, call_id: call_id.clone() }),
            _ => {}
        }
    }

    /// Opens the gate when there is a call behind it, its start is written down, and something may begin.
    pub(super) fn go_if_written(&mut self, call_id: &CallId) {
        let Some(call) = self.calls.get_mut(call_id) else { return };
        let session = self.sessions.get(&call.request.session_id);
        if self.suspended || session.is_some_and(|session| session.suspended) {
            return;
        }
        if matches!(call.phase, Phase::Prepared) && call.start_written {
            call.phase = Phase::Running;
            let (session_id, call_id) = (call.request.session_id.clone(), call_id.clone());
            self.actions.push(Action::Go { session_id, call_id });
        }
    }

    pub(super) fn prepare_failed(&mut self, call_id: &CallId, failure: ToolFailure) {
        let Some(call) = self.calls.get_mut(call_id) else { return };
        if matches!(call.phase, Phase::Preparing | Phase::Aborting(_)) {
            call.in_sandbox = false;
            let result = match call.cancel {
                Some(mode) => cancelled_before_start(mode),
                None => never_started(failure),
            };
            self.finish_active(call_id, result);
        }
    }

    pub(super) fn journalled_start(&mut self, call_id: &CallId, durable: bool) {
        self.read_only |= !durable;
        let Some(call) = self.calls.get_mut(call_id) else { return };
        if !matches!(call.phase, Phase::Preparing | Phase::Prepared) {
            return;
        }
        if durable {
            call.start_written = true;
            // A record vouches for those before it; who says so first is chance.
            self.accept(call_id);
            return self.go_if_written(call_id);
        }
        let is_prepared = matches!(call.phase, Phase::Prepared);
        call.phase = Phase::Aborting(Some(read_only()));
        if is_prepared {
            let (session_id, call_id) = (call.request.session_id.clone(), call_id.clone());
            self.actions.push(Action::Abort { session_id, call_id });
        }
    }

    pub(super) fn started(&mut self, call_id: &CallId, boottime_ns: u64, shell_generation: u64) {
        let Some(call) = self.calls.get_mut(call_id) else { return };
        let session_id = call.request.session_id.clone();
        // Without a gate the report of the start may overtake the answer to the preparation.
        if matches!(call.phase, Phase::Preparing) && !self.config.gated {
            call.phase = Phase::Running;
            if let Some(mode) = call.cancel {
                let (session_id, call_id) = (session_id.clone(), call_id.clone());
                self.actions.push(Action::Cancel { session_id, call_id, mode });
            }
        }
        // A start before the gate was opened is a lie of the sandbox; its end will be taken, its start is not repeated.
        if matches!(self.calls.get(call_id).map(|call| &call.phase), Some(Phase::Running)) {
            let (epoch, call_id) = (self.epoch_of(call_id), call_id.clone());
            self.tell(Update::CallStarted { call_id, session_id, epoch, boottime_ns, shell_generation });
        }
    }

    pub(super) fn aborted(&mut self, call_id: &CallId) {
        let Some(call) = self.calls.get_mut(call_id) else { return };
        if let Phase::Aborting(failure) = &call.phase {
            call.in_sandbox = false;
            let result = match (failure, call.cancel) {
                (Some(failure), _) => never_started(failure.clone()),
                (None, mode) => cancelled_before_start(mode.unwrap_or(CancelMode::Terminate)),
            };
            self.finish_active(call_id, result);
        }
    }

    pub(super) fn ended(&mut self, call_id: &CallId, result: Arc<CallResult>) {
        match self.calls.get(call_id) {
            Some(call) if call.is_active() => self.finish_active(call_id, result),
            // Its sandbox says that it has run, and no record does. Whoever is right, it must not run now.
            Some(Call { restored: true, phase: Phase::Queued, .. }) => self.finish_queued(call_id, result),
            _ => {}
        }
    }

    pub(super) fn start_deadline(&mut self, call_id: &CallId) {
        if matches!(self.calls.get(call_id), Some(Call { phase: Phase::Queued, .. })) {
            let failure = ToolFailure::new(
                Code::StartDeadlinePassed,
                "start_within: the call waited longer than it was allowed to, and did not run",
                "send it again under a new id, with a longer start_within or to a session with fewer calls",
            );
            self.finish_queued(call_id, never_started(failure));
        }
    }

    pub(super) fn cancel(&mut self, session_id: SessionId, epoch: u64, call_id: &CallId, mode: CancelMode) {
        let Some(call) = self.calls.get_mut(call_id) else {
            let forgotten = self.sessions.get(&session_id).is_some_and(|s| s.forgotten.contains(call_id));
            if !forgotten && !self.tombstones.contains(call_id) {
                if self.tombstones.len() >= self.config.tombstones {
                    self.tombstones.pop_front();
                }
                self.tombstones.push_back(call_id.clone());
            }
            if !forgotten {
                let call_id = call_id.clone();
                return self.actions.push(Action::WriteTombstone { call_id, epoch, phase: None, mode });
            }
            let phase = Some(CallPhase::Finished);
            return self.tell(Update::CancelNoted { call_id: call_id.clone(), epoch, phase });
        };
        let owner = call.request.session_id.clone();
        let known = self.sessions.get(&owner).map_or(call.request.epoch, |session| session.epoch);
        if epoch != known || owner != session_id {
            let failure = if owner == session_id {
                stale(&owner, epoch, known)
            } else {
                ToolFailure::invalid(
                    "session_id",
                    format!("call {call_id} does not belong to session {session_id}"),
                    "name the session of the call",
                )
            };
            return self.refuse(RequestKind::Cancel, Some(session_id), Some(call_id.clone()), epoch, failure);
        }
        let phase = call.wire_phase();
        let harder = call.cancel.is_none_or(|before| mode > before);
        if harder {
            call.cancel = Some(mode);
        }
        let (noted, phase) = (call_id.clone(), Some(phase));
        self.actions.push(Action::WriteTombstone { call_id: noted, epoch, phase, mode });
        let running = matches!(call.phase, Phase::Running);
        let queued = matches!(call.phase, Phase::Queued);
        if self.config.gated && matches!(call.phase, Phase::Preparing) {
            call.phase = Phase::Aborting(None);
        } else if matches!(call.phase, Phase::Prepared) {
            call.phase = Phase::Aborting(None);
            self.actions.push(Action::Abort { session_id: owner.clone(), call_id: call_id.clone() });
        }
        if queued {
            self.finish_queued(call_id, cancelled_before_start(mode));
        } else if running && harder {
            self.actions.push(Action::Cancel { session_id: owner, call_id: call_id.clone(), mode });
        }
    }

    pub(super) fn cancel_queue(&mut self, session_id: &SessionId) {
        for call_id in self.queue_of(session_id) {
            self.finish_queued(&call_id, cancelled_before_start(CancelMode::Terminate));
        }
    }

    pub(super) fn fail_queue(&mut self, session_id: &SessionId, failure: &ToolFailure) {
        for call_id in self.queue_of(session_id) {
            self.finish_queued(&call_id, never_started(failure.clone()));
        }
    }

    fn queue_of(&self, session_id: &SessionId) -> Vec<CallId> {
        self.sessions.get(session_id).map(|session| session.queue.iter().cloned().collect()).unwrap_or_default()
    }

    /// Gives every call that the sandbox took with it the most honest outcome there is.
    pub(super) fn settle_active(&mut self, session_id: &SessionId, code: Code, reason: &str) {
        let Some(session) = self.sessions.get(session_id) else { return };
        let mut active: Vec<_> = session.active.iter().cloned().collect();
        active.sort();
        for call_id in active {
            let Some(call) = self.calls.get(&call_id) else { continue };
            // A gate that was never opened proves that nothing ran; without a gate, preparing may have been running.
            let ran = matches!(call.phase, Phase::Running) || !self.config.gated;
            let result = match (ran, call.cancel) {
                (true, _) => indeterminate(code, reason),
                (false, Some(mode)) => cancelled_before_start(mode),
                (false, None) => never_started(ToolFailure::new(
                    code,
                    format!("the call did not run: {reason}"),
                    "send the call again, under a new id, to an open session",
                )),
            };
            self.finish_active(&call_id, result);
        }
    }

    pub(super) fn finish_queued(&mut self, call_id: &CallId, result: Arc<CallResult>) {
        let Some(call) = self.calls.get(call_id) else { return };
        if let Some(session) = self.sessions.get_mut(&call.request.session_id) {
            session.queue.retain(|queued| queued != call_id);
            self.queued -= 1;
        }
        self.write_end(call_id, result);
    }

    pub(super) fn finish_active(&mut self, call_id: &CallId, result: Arc<CallResult>) {
        let Some(call) = self.calls.get(call_id) else { return };
        let session_id = call.request.session_id.clone();
        if let Some(session) = self.sessions.get_mut(&session_id)
            && session.active.remove(call_id)
        {
            self.running -= 1;
        }
        self.write_end(call_id, result);
        // The sandbox is free already: the next call does not wait for the record of this one.
        self.start_next(&session_id);
        while self.running < self.config.running_per_runner
            && let Some(starved) = self.starved.pop_front()
        {
            self.start_next(&starved);
        }
    }

    pub(super) fn write_end(&mut self, call_id: &CallId, result: Arc<CallResult>) {
        if let Some(call) = self.calls.get_mut(call_id) {
            call.phase = Phase::Finishing(Arc::clone(&result));
            self.actions.push(Action::WriteFinished { call_id: call_id.clone(), result });
        }
    }

    pub(super) fn journalled_end(&mut self, call_id: &CallId, durable: bool) {
        self.read_only |= !durable;
        let Some(call) = self.calls.get_mut(call_id) else { return };
        let Phase::Finishing(result) = &call.phase else { return };
        let nothing_ran =
            matches!(result.end.outcome, Outcome::NeverStarted { .. } | Outcome::Cancelled { before_start: true, .. });
        if !durable && call.accepted && nothing_ran {
            // The next runner finds the call as accepted and hands it over, so nobody must hear that it did not run.
            return;
        }
        let result = Arc::clone(result);
        call.phase = Phase::Finished(Arc::clone(&result));
        let session_id = call.request.session_id.clone();
        let epoch = self.epoch_of(call_id);
        if let Some(session) = self.sessions.get_mut(&session_id) {
            session.open -= 1;
            session.unacknowledged += 1;
        }
        self.tell(Update::CallFinished { call_id: call_id.clone(), session_id: session_id.clone(), epoch, result });
        self.forget_session_if_done(&session_id);
    }

    pub(super) fn acknowledge(&mut self, call_id: &CallId) {
        if !matches!(self.calls.get(call_id), Some(Call { phase: Phase::Finished(_), .. })) {
            return;
        }
        let Some(call) = self.calls.remove(call_id) else { return };
        let session_id = call.request.session_id;
        self.actions.push(Action::Trim { call_id: call_id.clone() });
        // Without a record of its end the next runner must find it there, or it would take it for one that never began.
        if call.in_sandbox && !self.read_only {
            self.actions.push(Action::Acknowledge { call_id: call_id.clone() });
        }
        // The session may be a later placement under the same id, which never saw this call.
        if let Some(session) = self.sessions.get_mut(&session_id) {
            session.unacknowledged = session.unacknowledged.saturating_sub(1);
            session.forgotten.insert(call_id.clone());
        }
    }

    /// The placement of the call's session now: a session may have been taken over since the call was made.
    pub(super) fn epoch_of(&self, call_id: &CallId) -> u64 {
        self.calls.get(call_id).map_or(0, |call| {
            self.sessions.get(&call.request.session_id).map_or(call.request.epoch, |session| session.epoch)
        })
    }

    pub(super) fn running_session(&mut self, call_id: &CallId, request: RequestKind) -> Option<SessionId> {
        if let Some(call) = self.calls.get(call_id)
            && matches!(call.phase, Phase::Running)
        {
            return Some(call.request.session_id.clone());
        }
        let failure = ToolFailure::new(
            Code::CallUnknown,
            format!("call_id: call {call_id} is not running"),
            "send this while the call runs, after CallStarted",
        );
        self.refuse(request, None, Some(call_id.clone()), 0, failure);
        None
    }
}
