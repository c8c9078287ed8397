//! A call ends: one outcome, written down, told until it is acknowledged, and forgotten but for its id.

use std::sync::Arc;

use super::state::{cancelled_before_start, indeterminate, never_started};
use super::{Action, Call, CallId, CancelMode, Code, Core, Phase, SessionId, ToolFailure, Update};
use crate::work::{CallResult, Outcome};

impl Core {
    pub(super) fn ended(&mut self, call_id: &CallId, result: Arc<CallResult>) {
        match self.calls.get(call_id) {
            Some(call) if call.is_active() => self.finish_active(call_id, result),
            // Its sandbox says that it has run, and no record does. Whoever is right, it must not run now.
            Some(Call { restored: true, phase: Phase::Queued, .. }) => self.finish_queued(call_id, result),
            _ => {}
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

    pub(super) fn queue_of(&self, session_id: &SessionId) -> Vec<CallId> {
        self.sessions.get(session_id).map(|session| session.queue.iter().cloned().collect()).unwrap_or_default()
    }

    /// Gives every call that the sandbox took with it the most honest outcome there is.
    pub(super) fn settle_active(&mut self, session_id: &SessionId, code: Code, reason: &str) {
        for call_id in self.active_of(session_id) {
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
            let result = if call.request.input.may_write() { result } else { without_effects(result) };
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
        if !durable && nothing_ran {
            // The next runner may find the call as accepted and hand it over, so nobody must hear that it did not run. Also
            // when its acceptance was refused: what a failed sync has left may be there for the next one to read.
            return;
        }
        let (result, is_accepted) = (Arc::clone(result), durable && !call.unaccepted);
        call.phase = Phase::Finished(Arc::clone(&result));
        let session_id = call.request.session_id.clone();
        let epoch = self.epoch_of(call_id);
        if let Some(session) = self.sessions.get_mut(&session_id) {
            session.open -= 1;
            session.unacknowledged += 1;
        }
        // A record vouches for those before it, and nobody hears of an end before the call was accepted.
        if is_accepted {
            self.accept(call_id);
        }
        self.tell(Update::CallFinished { call_id: call_id.clone(), session_id: session_id.clone(), epoch, result });
        self.forget_session_if_done(&session_id);
        self.arm_idle(&session_id);
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
}

/// A call that only looks has changed nothing, however it ended, so its caller may do the same again.
fn without_effects(result: Arc<CallResult>) -> Arc<CallResult> {
    let Outcome::Indeterminate { failure } = &result.end.outcome else { return result };
    // Changing nothing, it has ended three runners.
    if failure.code == Code::Poison {
        return result;
    }
    let failure = ToolFailure {
        retryable: true,
        retry_after: Some(std::time::Duration::from_secs(1)),
        remediation: "send the call again under a new id, to an open session: it changes nothing".to_owned(),
        ..failure.clone()
    };
    let mut result = CallResult::clone(&result);
    result.end.outcome = Outcome::Indeterminate { failure };
    Arc::new(result)
}
