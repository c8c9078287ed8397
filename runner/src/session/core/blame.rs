//! Which running call a runner may have panicked of, and what becomes of one that several have.
//!
//! What a call prints and how it ends is read by the runner for as long as the call runs, so a call that no runner can bear
//! would end each of them as soon as it has taken the sandbox over. Blamed is only what plausibly did it: the runner has panicked, which it
//! leaves word of; one call alone was running then that no runner has lived with for a minute yet. A runner that was
//! killed, stopped or replaced says nothing about its calls, and a call that runs for long is cleared once and for all.

use super::failures::{lost, poison_while_running};
use super::state::indeterminate;
use super::{Action, CallId, Code, Core, Phase, SandboxId, SessionEnd, SessionId};
use crate::journal::{MOST_STARTS, Record};

impl Core {
    /// The one call of an earlier runner that may be to blame for its end, with its session.
    pub(super) fn suspect(&self) -> Option<(CallId, SessionId)> {
        let mut suspects = self
            .calls
            .iter()
            .filter(|(_, call)| call.restored && matches!(call.phase, Phase::Running) && call.resumes.is_some());
        let (call_id, call) = suspects.next()?;
        suspects.next().is_none().then(|| (call_id.clone(), call.request.session_id.clone()))
    }

    /// Whether so many runners have panicked of it that the next one must not meet it: the one that began it, and those that
    /// took it over.
    pub(super) fn is_poison(&self, call_id: &CallId) -> bool {
        let resumes = self.calls.get(call_id).and_then(|call| call.resumes);
        resumes.is_some_and(|resumes| resumes.saturating_add(1) >= MOST_STARTS)
    }

    /// Ends a session whose sandbox nobody can speak to and live. Its calls are settled as with any sandbox that is lost.
    pub(super) fn discard(&mut self, session_id: &SessionId, sandbox_id: SandboxId, poison: Option<&CallId>) {
        if let Some(call_id) = poison {
            self.finish_active(call_id, indeterminate(Code::Poison, &poison_while_running(MOST_STARTS)));
        }
        self.actions.push(Action::DiscardSandbox { sandbox_id });
        let failure = lost(session_id, "it was ended, because runners panicked of a call in it");
        self.lose(session_id, &failure, SessionEnd::SandboxLost(failure.clone()));
    }

    /// It is counted, so it may be met. When that could not be written down nobody can count any more, and there is no
    /// other way to learn what became of the call.
    pub(super) fn journalled_resume(&mut self, call_id: &CallId, durable: bool) {
        self.read_only |= !durable;
        let Some(session_id) = self.calls.get(call_id).map(|call| call.request.session_id.clone()) else { return };
        if self.sessions.get(&session_id).is_some_and(|session| session.attaching) {
            self.attach(&session_id);
        }
    }

    /// Clears the calls that have run since the minute before this one was over.
    pub(super) fn minute_passed(&mut self) {
        for (call_id, call) in &mut self.calls {
            if !matches!(call.phase, Phase::Running) || call.resumes.is_none() {
                continue;
            }
            if std::mem::replace(&mut call.seen_running, true) {
                call.resumes = None;
                self.actions.push(Action::Note(Record::Outlived { call_id: call_id.clone() }));
            }
        }
    }
}
