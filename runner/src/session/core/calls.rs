//! A call arrives: taken, known already or refused. And what its caller says of it later: cancel, input, size.

use std::sync::Arc;

use super::failures::{busy_cancel, closing, draining, read_only, stale, unknown_session};
use super::state::cancelled_before_start;
use super::{
    Action, Call, CallId, CallPhase, CancelMode, Code, Core, Phase, Replay, RequestKind, SessionId, SessionPhase,
    ToolFailure, Update,
};
use crate::work::{DrainMode, ToolCall};

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
        let order = self.next_order();
        self.calls.insert(call_id, Call::new(request, order));
        // With a gate, preparing and writing overlap: the sandbox is made ready while the record is on its way to disk.
        self.start_next(&session_id);
    }

    pub(super) fn repeated(&mut self, request: ToolCall) {
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

    pub(super) fn admit_call(&mut self, request: &ToolCall) -> Result<(), ToolFailure> {
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
        // Before the state of its session, which is closing for that reason.
        if matches!(self.drain_mode(), Some(DrainMode::FinishCalls | DrainMode::Now)) {
            return Err(draining());
        }
        if matches!(session.phase, SessionPhase::Closing(_)) {
            return Err(closing(&request.session_id));
        }
        if self.read_only {
            return Err(read_only());
        }
        request.input.validate()?;
        if let Some(failure) = self.pressure.call_refusal(&request.input) {
            return Err(failure);
        }
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
        // The next runner remembers no more ids either, and counts by them.
        let served = session.forgotten.len() + session.unacknowledged + session.open;
        if served >= self.config.forgotten_per_session {
            return Err(ToolFailure::new(
                Code::Capacity,
                format!("this session has taken {served} calls, the most one session can"),
                "close the session and open a new one",
            ));
        }
        Ok(())
    }

    /// Its caller may count on it from here: whatever happens to this process, the call will not run, or will be ended.
    pub(super) fn journalled_cancel(&mut self, call_id: CallId, epoch: u64, phase: Option<CallPhase>, durable: bool) {
        let is_tombstone = self.unwritten_tombstones.remove(&call_id);
        if durable {
            return self.tell(Update::CancelNoted { call_id, epoch, phase });
        }
        if is_tombstone {
            // The next runner may know nothing of it, so a repeat must not be confirmed.
            self.tombstones.retain(|known| *known != call_id);
        }
        self.read_only = true;
        self.refuse(RequestKind::Cancel, None, Some(call_id), epoch, read_only());
    }

    /// A call that has arrived is being ended all the same. One that has not may run when it does: nobody was told otherwise.
    pub(super) fn cancel_refused(&mut self, call_id: CallId, epoch: u64, phase: Option<CallPhase>, reason: &str) {
        if self.unwritten_tombstones.remove(&call_id) {
            self.tombstones.retain(|known| *known != call_id);
        }
        self.refuse(RequestKind::Cancel, None, Some(call_id), epoch, busy_cancel(phase.is_some(), reason));
    }

    pub(super) fn cancel(&mut self, session_id: SessionId, epoch: u64, call_id: &CallId, mode: CancelMode) {
        let Some(call) = self.calls.get_mut(call_id) else {
            let forgotten = self.sessions.get(&session_id).is_some_and(|s| s.forgotten.contains(call_id));
            if forgotten || self.tombstones.contains(call_id) {
                // While the first of them is being written its answer is still to come, and it will do.
                if !self.unwritten_tombstones.contains(call_id) {
                    let phase = forgotten.then_some(CallPhase::Finished);
                    self.tell(Update::CancelNoted { call_id: call_id.clone(), epoch, phase });
                }
                return;
            }
            if self.tombstones.len() >= self.config.tombstones {
                self.tombstones.pop_front();
            }
            self.tombstones.push_back(call_id.clone());
            self.unwritten_tombstones.insert(call_id.clone());
            let call_id = call_id.clone();
            return self.actions.push(Action::WriteCancelled { call_id, epoch, phase: None, mode });
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
        self.actions.push(Action::WriteCancelled { call_id: noted, epoch, phase, mode });
        let running = matches!(call.phase, Phase::Running);
        let queued = matches!(call.phase, Phase::Queued);
        let recording = matches!(call.phase, Phase::Recording);
        if self.config.gated && matches!(call.phase, Phase::Preparing) {
            call.phase = Phase::Aborting(None);
        } else if matches!(call.phase, Phase::Prepared) {
            call.phase = Phase::Aborting(None);
            self.actions.push(Action::Abort { session_id: owner.clone(), call_id: call_id.clone() });
        }
        if queued {
            self.finish_queued(call_id, cancelled_before_start(mode));
            self.start_next(&owner);
        } else if recording {
            self.finish_active(call_id, cancelled_before_start(mode));
        } else if running && harder {
            self.actions.push(Action::Cancel { session_id: owner, call_id: call_id.clone(), mode });
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
