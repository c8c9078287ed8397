//! A call begins: prepared in its turn, its start written down, and then, while something may begin, its gate opened.

use super::failures::read_only;
use super::state::{Rest, cancelled_before_start, indeterminate, never_started};
use super::{
    Action, Call, CallId, CancelMode, Code, Core, Phase, Replay, SessionId, SessionPhase, ToolFailure, Update,
};
use crate::work::{Gate, PreparedCall, ToolCall};

impl Core {
    /// Prepares waiting calls of `session_id` as far as limits allow.
    pub(super) fn start_next(&mut self, session_id: &SessionId) {
        self.confirm(session_id);
        // A broken journal takes no start, and the next runner goes on with what waits.
        if self.config.gated && self.read_only {
            return;
        }
        while self.sessions.get(session_id).is_some_and(|session| self.may_begin(session)) {
            let Some(session) = self.sessions.get_mut(session_id) else { return };
            if session.must_wake() {
                return self.wake(session_id);
            }
            if !session.may_start() {
                return;
            }
            if self.running >= self.config.running_per_runner {
                if !self.starved.contains(session_id) {
                    self.starved.push_back(session_id.clone());
                }
                return;
            }
            // A sandbox has one shell, whatever else may run at once.
            let is_command = |call_id: &CallId| self.calls.get(call_id).is_some_and(Call::is_command);
            if session.queue.front().is_some_and(is_command) && session.active.iter().any(is_command) {
                return;
            }
            let Some(call) = session.queue.front().and_then(|call_id| self.calls.get_mut(call_id)) else { return };
            // Without a gate, preparing is starting, and nothing may start before it is accepted.
            if !self.config.gated && !call.accepted {
                return;
            }
            let call_id = call.request.call_id.clone();
            let recording = self.config.gated && call.restored;
            call.phase = if recording { Phase::Recording } else { Phase::Preparing };
            call.start_asked = self.config.gated;
            session.queue.pop_front();
            session.active.insert(call_id.clone());
            self.queued -= 1;
            self.running += 1;
            // Together with the record of the acceptance, when that is still on its way: one sync for both. What process 1
            // does not know after a crash has not begun, whatever is written down.
            if self.config.gated {
                self.actions.push(Action::WriteStarted { call_id: call_id.clone() });
            }
            // An earlier runner may have died of handing it over. So that one is counted before it is tried again.
            if !recording {
                self.hand_over(&call_id);
            }
        }
    }

    fn hand_over(&mut self, call_id: &CallId) {
        let Some(call) = self.calls.get_mut(call_id) else { return };
        (call.phase, call.in_sandbox) = (Phase::Preparing, true);
        let gate = if self.config.gated { Gate::Held } else { Gate::Open };
        let ToolCall { call_id, session_id, input, limits, output_mode, .. } = call.request.clone();
        let call = PreparedCall { call_id, input, limits, output_mode, gate };
        self.actions.push(Action::Prepare { session_id, call });
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
        self.confirm(session_id);
        for call_id in self.active_of(session_id) {
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
    pub(super) fn accept(&mut self, call_id: &CallId) {
        let Some(call) = self.calls.get_mut(call_id).filter(|call| !call.accepted) else { return };
        call.accepted = true;
        let (session_id, phase) = (call.request.session_id.clone(), call.wire_phase());
        let (epoch, call_id, replay) = (self.epoch_of(call_id), call_id.clone(), Replay::First);
        self.tell(Update::CallAccepted { call_id, session_id, epoch, replay, phase });
    }

    /// The journal refused the call: whatever was prepared is dropped, and its caller hears a refusal.
    pub(super) fn unaccept(&mut self, call_id: &CallId, failure: ToolFailure) {
        let Some(call) = self.calls.get_mut(call_id) else { return };
        call.unaccepted = true;
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
        let Some(call) = self.calls.get(call_id) else { return };
        let Some(session) = self.sessions.get(&call.request.session_id) else { return };
        // Of a session that is closing nothing begins any more, however long its processes have to end.
        let takes_calls = matches!(session.phase, SessionPhase::Ready);
        if !takes_calls || session.rest != Rest::Awake || !self.may_begin(session) {
            return;
        }
        let Some(call) = self.calls.get_mut(call_id) else { return };
        if !matches!(call.phase, Phase::Prepared) {
            return;
        }
        let (session_id, call_id) = (call.request.session_id.clone(), call_id.clone());
        if call.start_written {
            call.phase = Phase::Running;
            self.actions.push(Action::Go { session_id, call_id });
        } else if !call.start_asked {
            // It waits there since an earlier runner, which may have died of opening its gate.
            call.start_asked = true;
            self.actions.push(Action::WriteStarted { call_id });
        }
    }

    /// The machine slept, or this process stood still, between the decision and the gate: the call has not begun.
    pub(super) fn gate_kept(&mut self, call_id: &CallId) {
        let Some(call) = self.calls.get_mut(call_id) else { return };
        let session_id = call.request.session_id.clone();
        match self.sessions.get_mut(&session_id) {
            Some(session) if session.own_lease => session.lapsed = true,
            _ => self.lapsed = true,
        }
        let session = self.sessions.get(&session_id);
        let takes_calls = session.is_some_and(|session| matches!(session.phase, SessionPhase::Ready));
        match (&call.phase, call.cancel) {
            (Phase::Running, None) => call.phase = Phase::Prepared,
            (Phase::Running, Some(_)) => {
                call.phase = Phase::Aborting(None);
                self.actions.push(Action::Abort { session_id, call_id: call_id.clone() });
            }
            (Phase::Preparing, None) if !self.config.gated && takes_calls => self.wait_again(call_id),
            (Phase::Preparing, mode) if !self.config.gated => {
                call.in_sandbox = false;
                self.finish_active(call_id, cancelled_before_start(mode.unwrap_or(CancelMode::Terminate)));
            }
            _ => {}
        }
    }

    pub(super) fn prepare_failed(&mut self, call_id: &CallId, failure: ToolFailure) {
        let Some(call) = self.calls.get_mut(call_id) else { return };
        if matches!(call.phase, Phase::Preparing | Phase::Aborting(_)) {
            call.in_sandbox = false;
            let result = match call.cancel {
                // A sandbox remembers what was there, whatever this runner knows of it.
                _ if failure.code == Code::CallIdReused => {
                    indeterminate(Code::OutcomeUnknown, "its sandbox has had a call with this id")
                }
                Some(mode) => cancelled_before_start(mode),
                None => never_started(failure),
            };
            self.finish_active(call_id, result);
        }
    }

    pub(super) fn journalled_start(&mut self, call_id: &CallId, durable: bool) {
        self.read_only |= !durable;
        let Some(call) = self.calls.get_mut(call_id) else { return };
        if !matches!(call.phase, Phase::Recording | Phase::Preparing | Phase::Prepared) {
            return;
        }
        let recording = matches!(call.phase, Phase::Recording);
        if durable {
            call.start_written = true;
            let session = self.sessions.get(&call.request.session_id);
            // In a session that is closing it gets its outcome with the end of the sandbox.
            let takes_calls = session.is_some_and(|session| matches!(session.phase, SessionPhase::Ready));
            // A record vouches for those before it; who says so first is chance.
            self.accept(call_id);
            return match recording {
                true if takes_calls => self.hand_over(call_id),
                true => {}
                false => self.go_if_written(call_id),
            };
        }
        if recording {
            return self.finish_active(call_id, never_started(read_only()));
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

    pub(super) fn start_deadline(&mut self, call_id: &CallId) {
        if let Some(Call { phase: Phase::Queued, request, .. }) = self.calls.get(call_id) {
            let session_id = request.session_id.clone();
            let failure = ToolFailure::new(
                Code::StartDeadlinePassed,
                "start_within: the call waited longer than it was allowed to, and did not run",
                "send it again under a new id, with a longer start_within or to a session with fewer calls",
            );
            self.finish_queued(call_id, never_started(failure));
            // It may have stood before one that need not wait.
            self.start_next(&session_id);
        }
    }
}
