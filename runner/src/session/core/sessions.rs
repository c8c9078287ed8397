//! The life of a session: admitted, its sandbox made, taken over by a newer placement, closed or lost, forgotten.

use std::time::Duration;

use super::failures::{busy_placement, closing, draining, lost, read_only, stale, unknown_session};
use super::state::{Ending, Session};
use super::{
    Action, CancelMode, Code, Core, Receipt, Replay, RequestKind, SandboxId, SessionClose, SessionEnd, SessionId,
    SessionOpen, SessionPhase, ToolFailure, Update,
};
use crate::journal::Record;

/// Placements of a session that may be newer than the one on disk: a disk that hangs must not fill with them.
const MOST_TAKEOVERS: u32 = 4;

impl Core {
    /// Whoever places a session elsewhere waits for that long, so nothing of it may be alive here then.
    pub(super) fn renew(&mut self, until_ns: u64, orphan_time: Duration) {
        let later = self.lease.is_none_or(|(before_ns, _)| until_ns > before_ns);
        self.lease = Some((until_ns, orphan_time));
        let of_orchestrator = |(_, session): &(&SessionId, &Session)| !session.own_lease;
        let ids: Vec<_> = self.sessions.iter().filter(of_orchestrator).map(|(id, _)| id.clone()).collect();
        for session_id in ids {
            self.set_deadline(&session_id);
        }
        // If that has passed as well, the next gate says so.
        if later && std::mem::take(&mut self.lapsed) {
            self.start_everywhere();
        }
    }

    /// The same for one session that came from a work queue: nothing of it begins before it has had a lease.
    pub(super) fn renew_one(&mut self, session_id: &SessionId, until_ns: u64, orphan_time: Duration) {
        let Some(session) = self.sessions.get_mut(session_id).filter(|session| session.own_lease) else { return };
        let later = session.lease.is_none_or(|(before_ns, _)| until_ns > before_ns);
        session.lease = Some((until_ns, orphan_time));
        session.lapsed &= !later;
        self.set_deadline(session_id);
        if later {
            self.start_in(session_id);
        }
    }

    pub(super) fn set_deadline(&mut self, session_id: &SessionId) {
        let (Some(session), Some((until_ns, orphan_time))) = (self.sessions.get(session_id), self.lease_of(session_id))
        else {
            return;
        };
        if matches!(session.phase, SessionPhase::Ready) {
            let orphan_time = session.open_request.orphan_timeout.unwrap_or(orphan_time);
            let nanoseconds = u64::try_from(orphan_time.as_nanos()).unwrap_or(u64::MAX);
            let boottime_ns = until_ns.saturating_add(nanoseconds);
            self.actions.push(Action::Deadline { session_id: session_id.clone(), boottime_ns });
        }
    }

    pub(super) fn set_suspended(&mut self, session_id: &SessionId, suspended: bool) {
        if let Some(session) = self.sessions.get_mut(session_id) {
            session.suspended = suspended;
            self.start_in(session_id);
        }
    }

    pub(super) fn open(&mut self, request: SessionOpen) {
        let (session_id, epoch) = (request.session_id.clone(), request.epoch);
        if let Some(session) = self.sessions.get_mut(&session_id) {
            let answered = if epoch < session.epoch {
                Err(stale(&session_id, epoch, session.epoch))
            } else if matches!(session.phase, SessionPhase::Closing(_)) {
                // Nobody takes it over any more: a record of that would outlive the one of its end.
                Err(closing(&session_id))
            } else if session.open_request.digest != request.digest {
                Err(ToolFailure::new(
                    Code::SessionConflict,
                    format!("session {session_id} is open with another environment, limits or policy"),
                    "close the session first, or send the request it was opened with",
                ))
            } else if epoch > session.epoch && session.takeovers >= MOST_TAKEOVERS {
                Err(busy_placement(&session_id))
            } else {
                if epoch > session.epoch {
                    session.epoch = epoch;
                    session.takeovers += 1;
                    let taken_over = SessionOpen { epoch, ..session.open_request.clone() };
                    self.actions.push(Action::Note(Record::SessionOpening(Box::new(taken_over))));
                    // That only the newest placement is obeyed must be known to the next runner before anybody counts on it.
                    if matches!(session.phase, SessionPhase::Recording | SessionPhase::Ready) {
                        return self.write_ready(&session_id);
                    }
                }
                match session.phase {
                    SessionPhase::Ready if session.unwritten => Err(read_only()),
                    // While a takeover is being written the answer is still to come, and it will do.
                    SessionPhase::Ready if session.ready_writes == 0 => Ok(Some(session.receipt.clone())),
                    _ => Ok(None),
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

    pub(super) fn admit(&mut self, request: &SessionOpen) -> Result<SessionOpen, ToolFailure> {
        if self.is_draining() {
            return Err(draining());
        }
        if self.read_only {
            return Err(read_only());
        }
        if request.epoch <= self.epoch_floor && !request.session_id.is_of_queue() {
            return Err(stale(&request.session_id, request.epoch, self.epoch_floor));
        }
        if let Some(failure) = self.pressure.session_refusal() {
            return Err(failure);
        }
        let limits = self.registry.admit(&request.session_id, request.limits)?;
        Ok(SessionOpen { limits, ..request.clone() })
    }

    pub(super) fn sandbox_ready(&mut self, session_id: &SessionId, sandbox_id: SandboxId, receipt: Receipt) {
        let Some(session) = self.sessions.get_mut(session_id) else { return };
        (session.receipt, session.sandbox_id) = (receipt, Some(sandbox_id));
        match &session.phase {
            SessionPhase::Opening => {
                session.phase = SessionPhase::Recording;
                self.write_ready(session_id);
            }
            SessionPhase::Closing(ending) => {
                let grace = ending.grace;
                self.actions.push(Action::CloseSandbox { session_id: session_id.clone(), grace });
            }
            SessionPhase::Recording | SessionPhase::Ready => {}
        }
    }

    /// Has the sandbox of a session written down, with the placements that were noted before.
    pub(super) fn write_ready(&mut self, session_id: &SessionId) {
        let Some(session) = self.sessions.get_mut(session_id) else { return };
        let Some(sandbox_id) = session.sandbox_id.clone() else { return };
        session.ready_writes += 1;
        let (session_id, receipt) = (session_id.clone(), session.receipt.clone());
        self.actions.push(Action::WriteReady { session_id, sandbox_id, receipt });
    }

    /// Its caller may count on the session from here: the next runner will find its sandbox.
    pub(super) fn journalled_ready(&mut self, session_id: &SessionId, durable: bool) {
        self.read_only |= !durable;
        let Some(session) = self.sessions.get_mut(session_id) else { return };
        session.ready_writes = session.ready_writes.saturating_sub(1);
        session.recorded |= durable;
        // A newer placement is on its way to disk, and only that is told.
        if durable && session.ready_writes > 0 {
            return;
        }
        session.takeovers = 0;
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
                session.unwritten = true;
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
        self.arm_idle(session_id);
    }

    pub(super) fn close(&mut self, request: SessionClose) {
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
    pub(super) fn begin_close(&mut self, session_id: &SessionId, end: SessionEnd, grace: Duration) {
        let Some(session) = self.sessions.get_mut(session_id) else { return };
        let was_ready = match &session.phase {
            SessionPhase::Closing(_) => return,
            phase => matches!(phase, SessionPhase::Recording | SessionPhase::Ready),
        };
        session.phase = SessionPhase::Closing(Ending::new(end, grace));
        if was_ready {
            self.actions.push(Action::CloseSandbox { session_id: session_id.clone(), grace });
        }
        self.cancel_queue(session_id);
    }

    pub(super) fn sandbox_closed(&mut self, session_id: &SessionId) {
        // What has not begun ends like what waited in the queue when the session was closed.
        for call_id in self.active_of(session_id) {
            if let Some(call) = self.calls.get_mut(&call_id) {
                call.cancel.get_or_insert(CancelMode::Terminate);
            }
        }
        let reason = "its session was closed";
        self.settle_active(session_id, Code::OutcomeUnknown, reason);
        self.sandbox_gone(session_id);
    }

    pub(super) fn sandbox_lost(&mut self, session_id: &SessionId, reason: &str) {
        let failure = lost(session_id, reason);
        self.lose(session_id, &failure, SessionEnd::SandboxLost(failure.clone()));
    }

    /// The sandbox of a session is gone, and not because somebody has asked for it.
    pub(super) fn lose(&mut self, session_id: &SessionId, failure: &ToolFailure, end: SessionEnd) {
        let Some(session) = self.sessions.get_mut(session_id) else { return };
        let attaching = session.attaching;
        if !matches!(session.phase, SessionPhase::Closing(_)) {
            session.phase = SessionPhase::Closing(Ending::new(end, Duration::ZERO));
        }
        self.fail_queue(session_id, failure);
        self.settle_active(session_id, failure.code, &failure.message);
        if attaching {
            self.attached_or_lost(session_id);
        }
        self.sandbox_gone(session_id);
    }

    pub(super) fn end_session(&mut self, session_id: &SessionId, end: SessionEnd) {
        let Some(session) = self.sessions.get_mut(session_id) else { return };
        if let SessionPhase::Opening = session.phase {
            session.phase = SessionPhase::Closing(Ending::new(end.clone(), Duration::ZERO));
        }
        let failure = match end {
            SessionEnd::OpenFailed(failure) | SessionEnd::SandboxLost(failure) => failure,
            _ => closing(session_id),
        };
        self.fail_queue(session_id, &failure);
        self.sandbox_gone(session_id);
    }

    pub(super) fn sandbox_gone(&mut self, session_id: &SessionId) {
        if let Some(session) = self.sessions.get_mut(session_id)
            && let SessionPhase::Closing(ending) = &mut session.phase
        {
            ending.sandbox_gone = true;
        }
        self.forget_session_if_done(session_id);
    }

    /// A session ends after its last call has its result, so the end of a session is always the last word about it.
    pub(super) fn forget_session_if_done(&mut self, session_id: &SessionId) {
        let Some(session) = self.sessions.get_mut(session_id) else { return };
        let SessionPhase::Closing(ending) = &mut session.phase else { return };
        if !ending.sandbox_gone || session.open > 0 || ending.is_writing {
            return;
        }
        let (session_id, epoch) = (session_id.clone(), session.epoch);
        // The next runner would make another sandbox for a placement that is known to be over.
        if self.config.gated && (!session.recorded || session.takeovers > 0) {
            ending.is_writing = true;
            return self.actions.push(Action::WriteEnded { session_id, epoch });
        }
        self.actions.push(Action::Note(Record::SessionEnded { session_id: session_id.clone(), epoch }));
        self.forget_session(&session_id);
    }

    /// When the journal is broken the next runner does begin with that session, and the orchestrator decides about it then.
    pub(super) fn journalled_session_end(&mut self, session_id: &SessionId, durable: bool) {
        self.read_only |= !durable;
        let session = self.sessions.get(session_id);
        if session.is_some_and(|session| matches!(&session.phase, SessionPhase::Closing(ending) if ending.is_writing)) {
            self.forget_session(session_id);
        }
    }

    fn forget_session(&mut self, session_id: &SessionId) {
        let Some(session) = self.sessions.remove(session_id) else { return };
        let SessionPhase::Closing(ending) = session.phase else { return };
        self.registry.release(session_id);
        // Whoever serves a queue opens sessions in this process, so no late duplicate comes.
        if !session.own_lease {
            self.epoch_floor = self.epoch_floor.max(session.epoch);
        }
        self.tell(Update::SessionEnded { session_id: session_id.clone(), epoch: session.epoch, end: ending.end });
        self.actions.push(Action::ReleaseSandbox { session_id: session_id.clone() });
    }
}
