//! A session without calls: after a while its processes stand still, after a longer one they are ended and its files stay, the
//! next call lets it go on, and one that nobody wants any more is ended.
//!
//! Nothing is handed to a sandbox that stands still or has no processes: a call waits in its queue until it goes on, which is
//! asked for when it arrives. Only the workload is meant: a sandbox whose runner is lost ends at its deadline all the same.

use std::time::Duration;

use super::state::{Rest, Session};
use super::{Action, Core, SessionEnd, SessionId, ToolFailure};
use crate::work::Resource;

impl Core {
    /// Begins to count, or counts on, where a session has nothing to do.
    pub(super) fn arm_idle(&mut self, session_id: &SessionId) {
        let Some(session) = self.sessions.get(session_id).filter(|session| session.is_idle()) else { return };
        let (freeze, stop, end) = (self.freeze_after(session), self.stop_after(session), self.config.idle.end_after);
        let (counted, next) = match session.rest {
            Rest::Awake => (None, freeze.or(stop).or(end)),
            Rest::Frozen => (freeze, stop.or(end)),
            Rest::Stopped => (stop, end),
            // Whatever comes of it counts on.
            Rest::Freezing | Rest::Stopping | Rest::Waking => return,
        };
        if let Some(next) = next {
            let within = next.saturating_sub(counted.unwrap_or_default());
            self.actions.push(Action::ArmIdle { session_id: session_id.clone(), within });
        }
    }

    /// When its processes are to stand still; `None` when they are not, or something else comes first.
    fn freeze_after(&self, session: &Session) -> Option<Duration> {
        let asked = session.open_request.idle_timeout.or(self.config.idle.freeze_after);
        let next = self.stop_after(session).or(self.config.idle.end_after);
        asked
            .filter(|after| !after.is_zero() && !session.stays_awake)
            .filter(|after| next.is_none_or(|next| *after < next))
    }

    /// When its processes are to be ended; `None` when they are not, or it is ended before. A session that has asked for them
    /// to run for longer keeps them for as long, and one that wants them never to stand still keeps them to its end.
    fn stop_after(&self, session: &Session) -> Option<Duration> {
        let stop = self.config.idle.stop_after.filter(|_| !session.keeps_processes)?;
        let after = match session.open_request.idle_timeout {
            Some(asked) if asked.is_zero() => return None,
            Some(asked) => stop.max(asked),
            None => stop,
        };
        self.config.idle.end_after.is_none_or(|end| after < end).then_some(after)
    }

    /// Sessions without calls that may stand still need not wait for it when others wait for memory: they would ask for more.
    pub(super) fn freeze_under_pressure(&mut self) {
        if !self.pressure.is_short_of(Resource::Memory) {
            return;
        }
        let may = |session: &&Session| {
            session.is_idle() && session.rest == Rest::Awake && self.freeze_after(session).is_some()
        };
        let mut ids: Vec<_> =
            self.sessions.values().filter(may).map(|session| session.open_request.session_id.clone()).collect();
        ids.sort();
        for session_id in ids {
            self.idle_passed(&session_id);
        }
    }

    pub(super) fn idle_passed(&mut self, session_id: &SessionId) {
        let Some(session) = self.sessions.get(session_id).filter(|session| session.is_idle()) else { return };
        let (freezes, stops) = (self.freeze_after(session).is_some(), self.stop_after(session).is_some());
        match session.rest {
            Rest::Awake if freezes => {
                self.set_rest(session_id, Rest::Freezing);
                self.actions.push(Action::Freeze { session_id: session_id.clone() });
            }
            Rest::Awake | Rest::Frozen if stops => {
                self.set_rest(session_id, Rest::Stopping);
                self.actions.push(Action::Stop { session_id: session_id.clone() });
            }
            Rest::Awake | Rest::Frozen | Rest::Stopped => self.end_idle(session_id),
            Rest::Freezing | Rest::Stopping | Rest::Waking => {}
        }
    }

    /// Ends a session that nobody wants any more. One that holds results which are stored nowhere else is still wanted.
    fn end_idle(&mut self, session_id: &SessionId) {
        let Some(within) = self.config.idle.end_after else { return };
        if self.sessions.get(session_id).is_some_and(|session| session.unacknowledged > 0) {
            return self.actions.push(Action::ArmIdle { session_id: session_id.clone(), within });
        }
        self.begin_close(session_id, SessionEnd::Idle, self.config.drain_grace);
    }

    pub(super) fn frozen(&mut self, session_id: &SessionId, result: &Result<(), ToolFailure>) {
        let Some(session) = self.sessions.get_mut(session_id).filter(|session| session.rest == Rest::Freezing) else {
            return;
        };
        // After an error some of it may stand still, so it is woken like the others when a call comes.
        (session.rest, session.stays_awake) = (Rest::Frozen, result.is_err());
        self.start_in(session_id);
        self.arm_idle(session_id);
    }

    /// After an error some of its processes may be there, standing still or not: it is woken like one that is frozen.
    pub(super) fn stopped(&mut self, session_id: &SessionId, result: &Result<(), ToolFailure>) {
        let Some(session) = self.sessions.get_mut(session_id).filter(|session| session.rest == Rest::Stopping) else {
            return;
        };
        session.keeps_processes = result.is_err();
        session.rest = if result.is_ok() { Rest::Stopped } else { Rest::Frozen };
        self.start_in(session_id);
        self.arm_idle(session_id);
    }

    /// A call came, or was there when the sandbox was taken over.
    pub(super) fn wake(&mut self, session_id: &SessionId) {
        self.set_rest(session_id, Rest::Waking);
        self.actions.push(Action::Thaw { session_id: session_id.clone() });
    }

    pub(super) fn thawed(&mut self, session_id: &SessionId, result: Result<(), ToolFailure>) {
        let Some(session) = self.sessions.get_mut(session_id).filter(|session| session.rest == Rest::Waking) else {
            return;
        };
        match result {
            Ok(()) => {
                (session.rest, session.stays_awake, session.keeps_processes) = (Rest::Awake, false, false);
                self.start_in(session_id);
            }
            // What waits has provably not begun; the next call tries again.
            Err(failure) => {
                session.rest = Rest::Frozen;
                self.fail_queue(session_id, &failure);
            }
        }
        self.arm_idle(session_id);
    }

    fn set_rest(&mut self, session_id: &SessionId, rest: Rest) {
        if let Some(session) = self.sessions.get_mut(session_id) {
            session.rest = rest;
        }
    }
}
