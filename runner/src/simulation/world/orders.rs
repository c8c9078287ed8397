//! What the orchestrator of a world asks for.

use super::*;

impl World {
    pub(super) fn orchestrate(&mut self) {
        if self.scripted {
            return;
        }
        if self.quiet {
            return self.close_what_is_done();
        }
        let draw = self.random.below(20);
        if (self.sessions.len() as u64) < SESSIONS && (draw < 4 || self.sessions.is_empty()) {
            let session_id = format!("session-{}", self.sessions.len());
            self.store.open_session(&session_id);
            self.note(format!("open {session_id}"));
            return self.sessions.push(session_id);
        }
        let session_id = self.sessions[self.random.index(self.sessions.len())].clone();
        if draw < 15 && self.issued < CALLS {
            let (opened, over) = self.store.session_is(&session_id);
            if opened && !over && !self.closed.contains(&session_id) {
                let call_id = format!("call-{}", self.issued);
                let bytes = [0, 100, 700, 5000, 30_000][self.random.index(5)];
                let command = format!("{bytes} {} {}", self.random.below(3), u8::from(self.random.one_in(8)));
                self.store.call(&session_id, &call_id, &command);
                self.note(format!("{call_id} in {session_id}: {command}"));
                self.calls.push((session_id, call_id));
                self.issued += 1;
            }
        } else if draw < 17 && !self.calls.is_empty() && self.random.one_in(6) {
            let (session_id, call_id) = self.calls[self.random.index(self.calls.len())].clone();
            let mode = [pb::CancelMode::Interrupt, pb::CancelMode::Terminate, pb::CancelMode::Kill];
            self.store.cancel(&session_id, &call_id, mode[self.random.index(3)]);
            self.note(format!("cancel {call_id}"));
            self.cancelled.extend(CallId::new(&call_id).ok().map(|call_id| (call_id, false)));
        } else if draw == 19 && self.random.one_in(6) && !self.closed.contains(&session_id) {
            self.close(&session_id);
        }
    }

    pub(super) fn close(&mut self, session_id: &str) {
        if self.store.session_is(session_id).0 && !self.closed.iter().any(|closed| closed == session_id) {
            self.store.close(session_id);
            self.note(format!("close {session_id}"));
            self.closed.push(session_id.to_owned());
        }
    }

    /// What hangs is cancelled, and sessions without open calls are closed.
    pub(super) fn close_what_is_done(&mut self) {
        for (session_id, call_id) in self.calls.clone() {
            if !self.is_final(&call_id) && self.store.known(&call_id).is_some_and(|known| !known.cancelled) {
                self.store.cancel(&session_id, &call_id, pb::CancelMode::Kill);
            }
        }
        for session_id in self.sessions.clone() {
            let open = self.calls.iter().any(|(owner, call_id)| *owner == session_id && !self.is_final(call_id));
            if !open {
                self.close(&session_id);
            }
        }
    }

    pub(super) fn is_final(&self, call_id: &str) -> bool {
        self.store.known(call_id).is_none_or(|known| known.outcome.is_some() || known.refused.is_some())
    }
}
