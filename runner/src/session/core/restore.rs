//! What becomes of what an earlier runner left: sandboxes are taken over, and every call goes on from where it provably is.
//!
//! A call whose start was not written down has not begun, so it waits in its queue again. One whose start was written down
//! belongs to its sandbox, which says what became of it, or that it never arrived; where that cannot be asked any more, the
//! outcome is unknown and the call is never run again. Before somebody has given a lease, as an orchestrator does, nothing is
//! started, and nothing is ended that the journal does not know: it may be a copy that is older than what it says.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::failures::{poison, rebooted};
use super::state::{Rest, cancelled_before_start, indeterminate, never_started};
use super::{
    Action, Call, CallId, CallPhase, Code, Core, Phase, Replay, Session, SessionEnd, SessionId, SessionPhase, Update,
};
use crate::journal::{MOST_STARTS, Recovered, RecoveredCall, RecoveredPhase, RecoveredSession};
use crate::work::{FoundCall, Gate, Processes};

impl Core {
    pub(super) fn restore(&mut self, recovered: Recovered) {
        self.epoch_floor = recovered.epoch_floor;
        self.tombstones = recovered.tombstones.into();
        self.suspended = !recovered.sessions.is_empty();
        let mut sandboxes = Vec::new();
        for RecoveredSession { open, sandbox, acknowledged } in recovered.sessions {
            let session_id = open.session_id.clone();
            self.registry.reinstate(&session_id, open.limits);
            let mut session = Session::new(open.clone());
            session.forgotten = acknowledged.into_iter().collect();
            if let Some((sandbox_id, receipt)) = &sandbox {
                (session.sandbox_id, session.receipt) = (Some(sandbox_id.clone()), receipt.clone());
                (session.recorded, session.unconfirmed) = (true, true);
            }
            let (epoch, ready, acknowledged) = (session.epoch, sandbox.is_some(), session.forgotten.len() as u64);
            self.sessions.insert(session_id.clone(), session);
            self.tell(Update::SessionRestored { session_id: session_id.clone(), epoch, ready, acknowledged });
            sandboxes.push((session_id, open, sandbox));
        }
        for call in recovered.calls {
            self.restore_call(call);
        }
        let suspect = if recovered.panicked && recovered.same_boot { self.suspect() } else { None };
        for (session_id, open, sandbox) in sandboxes {
            let suspect = suspect.as_ref().filter(|(_, owner)| *owner == session_id).map(|(call_id, _)| call_id);
            match sandbox {
                // Nothing has run in it, so another one is as good.
                None => self.actions.push(Action::CreateSandbox(Box::new(open))),
                Some((sandbox_id, _)) if suspect.is_some_and(|call_id| self.is_poison(call_id)) => {
                    self.discard(&session_id, sandbox_id, suspect);
                }
                Some(_) if recovered.same_boot => {
                    self.attaching += 1;
                    if let Some(session) = self.sessions.get_mut(&session_id) {
                        session.attaching = true;
                    }
                    match suspect {
                        Some(call_id) => self.actions.push(Action::WriteResumed { call_id: call_id.clone() }),
                        None => self.attach(&session_id),
                    }
                }
                Some(_) => self.lose(&session_id, &rebooted(&session_id), SessionEnd::HostRebooted),
            }
        }
        self.tell_when_attached();
    }

    fn restore_call(&mut self, recovered: RecoveredCall) {
        let RecoveredCall { call: request, cancel, phase, starts, resumes } = recovered;
        let (call_id, session_id) = (request.call_id.clone(), request.session_id.clone());
        let (digest, quiet) = (request.digest, request.quiet);
        let order = self.next_order();
        let mut call = Call { accepted: true, restored: true, cancel, starts, resumes, ..Call::new(request, order) };
        let told = match &phase {
            RecoveredPhase::Accepted => CallPhase::Accepted,
            RecoveredPhase::Started => CallPhase::Started,
            RecoveredPhase::Finished(_) => CallPhase::Finished,
        };
        self.tell(Update::CallRestored {
            call_id: call_id.clone(),
            session_id: session_id.clone(),
            digest,
            quiet,
            phase: told,
        });
        match phase {
            RecoveredPhase::Finished(result) => {
                call.in_sandbox = true;
                call.phase = Phase::Finished(Arc::clone(&result));
                self.calls.insert(call_id.clone(), call);
                if let Some(session) = self.sessions.get_mut(&session_id) {
                    session.unacknowledged += 1;
                }
                let epoch = self.epoch_of(&call_id);
                self.tell(Update::CallFinished { call_id, session_id, epoch, result });
            }
            RecoveredPhase::Accepted | RecoveredPhase::Started => {
                self.restore_open_call(call_id, &session_id, call, told)
            }
        }
    }

    fn restore_open_call(&mut self, call_id: CallId, session_id: &SessionId, mut call: Call, phase: CallPhase) {
        let cancel = call.cancel;
        let within = call.request.limits.start_within;
        let started = phase == CallPhase::Started;
        if started {
            (call.in_sandbox, call.phase) = (true, Phase::Running);
        }
        self.calls.insert(call_id.clone(), call);
        let epoch = self.epoch_of(&call_id);
        let (told_id, told_session) = (call_id.clone(), session_id.clone());
        let replay = Replay::Duplicate;
        self.tell(Update::CallAccepted { call_id: told_id, session_id: told_session, epoch, replay, phase });
        let Some(session) = self.sessions.get_mut(session_id) else {
            // Its session has ended, which the end of every call precedes; only a damaged journal says otherwise.
            return self.write_end(&call_id, indeterminate(Code::SessionLost, "its session is over"));
        };
        session.open += 1;
        if started {
            session.active.insert(call_id);
            self.running += 1;
            return;
        }
        session.queue.push_back(call_id.clone());
        self.queued += 1;
        match (cancel, within) {
            (Some(mode), _) => self.finish_queued(&call_id, cancelled_before_start(mode)),
            // How long it had waited is not known: the clock of a wait does not outlive the process.
            (None, Some(within)) => self.actions.push(Action::ArmStartDeadline { call_id, within }),
            (None, None) => {}
        }
    }

    pub(super) fn attach(&mut self, session_id: &SessionId) {
        let Some(session) = self.sessions.get(session_id) else { return };
        let Some(sandbox_id) = session.sandbox_id.clone() else { return };
        let (session_id, receipt) = (session_id.clone(), session.receipt.clone());
        let calls = self.expected_of(&session_id);
        self.actions.push(Action::AttachSandbox { session_id, sandbox_id, receipt, calls });
    }

    /// Calls that the sandbox of a session may hold. What provably has not begun is dropped there and handed over anew.
    fn expected_of(&self, session_id: &SessionId) -> Vec<(CallId, Gate, Option<std::time::Duration>)> {
        let mut expected: Vec<_> = self
            .calls
            .iter()
            .filter(|(_, call)| call.request.session_id == *session_id)
            .filter(|(_, call)| call.in_sandbox || matches!(call.phase, Phase::Queued))
            .map(|(call_id, call)| {
                let limits = call.request.limits;
                let gate = if call.in_sandbox { Gate::Open } else { Gate::Held };
                (call_id.clone(), gate, limits.timeout.map(|timeout| timeout.saturating_add(limits.grace)))
            })
            .collect();
        expected.sort_by(|a, b| a.0.cmp(&b.0));
        expected
    }

    pub(super) fn sandbox_attached(
        &mut self,
        session_id: &SessionId,
        found: &BTreeMap<CallId, FoundCall>,
        processes: Processes,
    ) {
        let Some(session) = self.sessions.get_mut(session_id) else { return };
        session.rest = match processes {
            Processes::Run => Rest::Awake,
            Processes::Frozen => Rest::Frozen,
            Processes::Ended => Rest::Stopped,
        };
        let closing = match &session.phase {
            SessionPhase::Closing(ending) => Some(ending.grace),
            SessionPhase::Opening | SessionPhase::Recording | SessionPhase::Ready => None,
        };
        if closing.is_none() {
            session.phase = SessionPhase::Ready;
        }
        let (epoch, takeovers) = (session.epoch, session.takeovers);
        let receipt = session.receipt.clone();
        self.settle_found(session_id, closing.is_some(), found);
        match closing {
            Some(grace) => {
                self.cancel_queue(session_id);
                self.actions.push(Action::CloseSandbox { session_id: session_id.clone(), grace });
            }
            // Whoever has taken it over meanwhile hears so when that is on disk.
            None if takeovers > 0 => self.write_ready(session_id),
            None => {
                let (session_id, replay) = (session_id.clone(), Replay::Duplicate);
                self.tell(Update::SessionOpened { session_id, epoch, receipt, replay });
            }
        }
        self.attached_or_lost(session_id);
        self.set_deadline(session_id);
        self.start_next(session_id);
        self.arm_idle(session_id);
    }

    fn settle_found(&mut self, session_id: &SessionId, is_closing: bool, found: &BTreeMap<CallId, FoundCall>) {
        let (mut waiting, mut over) = (Vec::new(), Vec::new());
        for call_id in self.active_of(session_id) {
            let Some(call) = self.calls.get_mut(&call_id) else { continue };
            let (session_id, cancel) = (session_id.clone(), call.cancel);
            let poisoned = (call.starts >= MOST_STARTS).then(|| poison(call.starts));
            match (found.get(&call_id), cancel) {
                // Its start is written down, and the word to go was lost on the way. It begins when something may begin again.
                (Some(FoundCall::Prepared), None) if !is_closing && poisoned.is_none() => {
                    call.phase = Phase::Prepared;
                    self.go_if_written(&call_id);
                }
                (Some(FoundCall::Prepared), cancel) => {
                    call.phase = Phase::Aborting(poisoned.filter(|_| cancel.is_none()));
                    self.actions.push(Action::Abort { session_id, call_id });
                }
                (Some(FoundCall::Running), Some(mode)) => {
                    self.actions.push(Action::Cancel { session_id, call_id, mode });
                }
                // Its end is on the way.
                (Some(FoundCall::Running | FoundCall::Finished), _) => {}
                // A sandbox forgets a call that was acknowledged, which this one was not, or that was dropped at its gate.
                // So it has not begun: it never arrived there, because its start was written down at the same time.
                (None, Some(mode)) => over.push((call_id, cancelled_before_start(mode))),
                (None, None) => match poisoned {
                    Some(failure) => over.push((call_id, never_started(failure))),
                    None => waiting.push(call_id),
                },
            }
        }
        // They were there before everything that waits.
        for call_id in waiting.into_iter().rev() {
            self.wait_again(&call_id);
        }
        for (call_id, result) in over {
            if let Some(call) = self.calls.get_mut(&call_id) {
                call.in_sandbox = false;
            }
            self.finish_active(&call_id, result);
        }
    }

    pub(super) fn wait_again(&mut self, call_id: &CallId) {
        let Some(call) = self.calls.get_mut(call_id) else { return };
        (call.in_sandbox, call.phase) = (false, Phase::Queued);
        if let Some(session) = self.sessions.get_mut(&call.request.session_id)
            && session.active.remove(call_id)
        {
            self.running -= 1;
            session.queue.push_front(call_id.clone());
            self.queued += 1;
            if let Some(within) = call.request.limits.start_within {
                self.actions.push(Action::ArmStartDeadline { call_id: call_id.clone(), within });
            }
        }
    }

    /// One sandbox less to wait for.
    pub(super) fn attached_or_lost(&mut self, session_id: &SessionId) {
        let session = self.sessions.get_mut(session_id);
        if session.is_some_and(|session| std::mem::take(&mut session.attaching)) {
            self.attaching -= 1;
            self.tell_when_attached();
        }
    }

    /// Whoever has placed it says that it goes on. An orchestrator looks at the greeting before it does, and refuses a runner
    /// whose state was set back. A queue cannot see that, so of its sessions the lease is enough.
    pub(super) fn confirm(&mut self, session_id: &SessionId) {
        let Some(session) = self.sessions.get(session_id) else { return };
        let goes_on = if session.own_lease { session.lease.is_some() } else { self.may_begin(session) };
        if !session.unconfirmed || session.attaching || !goes_on {
            return;
        }
        if let Some(session) = self.sessions.get_mut(session_id) {
            session.unconfirmed = false;
        }
        self.actions.push(Action::EndUnknown { session_id: Some(session_id.clone()) });
        self.arm_idle(session_id);
    }

    fn tell_when_attached(&mut self) {
        if self.attaching == 0 {
            self.tell(Update::Restored);
        }
    }
}
