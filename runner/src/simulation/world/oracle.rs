//! What must hold in a world at every moment and in the end, and what it looks like when something does not.

use std::collections::BTreeMap;
use std::sync::Arc;

use prost::Message;
use proto::runner::v1 as pb;
use proto::runner::v1::orchestrator_frame::Body;
use proto::runner::v1::outcome::Kind;

use super::super::host::Host;
use super::super::lots::Fault;
use super::{LEASE, World, boottime_ns};
use crate::dev::simulated::Store;
use crate::work::{CallId, Outcome, Update};

impl World {
    /// What must hold at every moment.
    pub(super) fn look(&mut self) -> Result<(), String> {
        let host = Arc::clone(&self.host);
        let host = host.lock().unwrap();
        if let Some(problem) = host.violations.first() {
            return Err(format!("I1: {problem}"));
        }
        // Results are told although they cannot be written down. When then their sandbox is gone as well, all that the next
        // runner knows is that it does not know.
        let in_doubt = self.tally.faults.contains_key(&Fault::SyncFails);
        let was_set_back = self.is_set_back || self.tally.faults.contains_key(&Fault::SetBack);
        let excused = |problem: &&String| {
            in_doubt && problem.contains("ended twice") || was_set_back && problem.contains("this state was set back")
        };
        if let Some(problem) = self.store.complaints().iter().find(|problem| !excused(problem)) {
            return Err(format!("I2, I3: the orchestrator complains: {problem}"));
        }
        check_cancels(&mut self.cancelled, &self.store, &host)?;
        // Once it is over, an orchestrator may have the runner close what that holds of it.
        for session_id in self.sessions.iter().filter(|id| self.store.session_is(id).1) {
            let is_new = self.over.insert(session_id.clone());
            if is_new && self.store.was_closed(session_id) && !self.closed.contains(session_id) {
                return Err(format!("I4: {session_id} was closed, and nobody had asked for it"));
            }
        }
        let Some(life) = &mut self.life else { return Ok(()) };
        if self.is_set_back {
            life.told.clear();
            let Some((call_id, _)) = life.gates.first() else { return Ok(()) };
            return Err(format!("I4: a runner whose state was set back has begun {call_id}"));
        }
        for (call_id, at_ns) in life.gates.drain(..) {
            if at_ns >= self.lease_until_ns {
                return Err(format!("I4: the gate of {call_id} was opened when the lease was over"));
            }
        }
        if life.connector.highest_term() < self.highest_term {
            return Err("I4: the term went back".into());
        }
        self.highest_term = life.connector.highest_term();
        if life.connector.unheard() > 1024 {
            return Err("I6: more than 1024 reports wait for the connector".into());
        }
        for update in std::mem::take(&mut life.told) {
            let Update::CallFinished { call_id, result, .. } = update else { continue };
            let outcome = result.end.outcome.clone();
            let begun = host.ledger.get(&call_id).copied().unwrap_or(0);
            // A sandbox that was closed is as gone as one that was lost, when nobody has heard how.
            let owner = self.calls.iter().find(|(_, id)| id == call_id.as_str()).map(|(owner, _)| owner);
            let closed = owner.is_some_and(|owner| self.closed.contains(owner));
            check_honesty(&call_id, &outcome, begun, host.losses > 0 || closed)?;
            let before = self.outcomes.insert(call_id.clone(), outcome.clone());
            let unknown = in_doubt && matches!(outcome, Outcome::Indeterminate { .. });
            if before.as_ref().is_some_and(|before| *before != outcome) && !unknown {
                return Err(format!("I2: {call_id} ended with {before:?}, and now with {outcome:?}"));
            }
        }
        Ok(())
    }

    pub(super) fn is_done(&self) -> bool {
        let delivered =
            self.life.as_ref().is_some_and(|life| life.connector.is_live() && life.connector.is_delivered());
        delivered
            && self.calls.iter().all(|(_, call_id)| self.is_final(call_id))
            && self.sessions.iter().all(|session_id| self.store.session_is(session_id).1)
    }

    /// What must hold in the end.
    pub(super) fn last_look(&mut self) -> Result<(), String> {
        let host = Arc::clone(&self.host);
        let host = host.lock().unwrap();
        for (session_id, call_id) in &self.calls {
            let Some(known) = self.store.known(call_id) else { return Err(format!("I2: {call_id} is unknown")) };
            let id = CallId::new(call_id).map_err(|error| error.to_string())?;
            let begun = host.ledger.get(&id).copied().unwrap_or(0);
            let end = match (&known.outcome, &known.refused) {
                (Some(Kind::Exited(_)), _) if begun != 1 => {
                    return Err(format!("I1: {call_id} has exited and began {begun} times"));
                }
                (Some(Kind::Exited(_)), _) => "exited",
                (Some(Kind::Cancelled(_)), _) => "cancelled",
                (Some(Kind::NeverStarted(_)), _) => "never started",
                (Some(Kind::Indeterminate(_)), _) => "indeterminate",
                (Some(_), _) => return Err(format!("{call_id} has ended as no call here can")),
                (None, Some(code)) if begun > 0 || known.accepted => {
                    return Err(format!("I2: {call_id} was refused with {code}, after it was taken or had begun"));
                }
                (None, Some(_)) => "refused",
                (None, None) => return Err(format!("I2: {call_id} has no end")),
            };
            let asked = known.cancelled || self.closed.contains(session_id);
            if end == "cancelled" && !asked {
                return Err(format!("I4: {call_id} was cancelled, and nobody had asked for it"));
            }
            if known.has_holes && host.losses == 0 && !self.closed.contains(session_id) {
                return Err(format!("I2: output of {call_id} is missing"));
            }
            if !known.sent && begun > 0 {
                return Err(format!("I1: {call_id} began, and was never sent"));
            }
            *self.tally.ends.entry(end).or_default() += 1;
        }
        let alive = host.sandboxes.iter().find(|(_, sandbox)| sandbox.alive);
        match alive {
            Some((id, sandbox)) => Err(format!("I7: {id} lives, and its session {} is over", sandbox.session_id)),
            None => Ok(()),
        }
    }

    pub(super) fn state(&self) -> String {
        let open: Vec<_> = self
            .calls
            .iter()
            .filter(|(_, call_id)| !self.is_final(call_id))
            .map(|(owner, call_id)| (owner, call_id, self.store.known(call_id)))
            .collect();
        let sessions: Vec<_> = self.sessions.iter().filter(|id| !self.store.session_is(id).1).collect();
        let life = self.life.as_ref().map(|life| {
            let connector = &life.connector;
            (connector.is_live(), connector.is_delivered(), life.pending(), life.journal.waiting())
        });
        let owed = self.life.as_ref().map(|life| life.connector.owed()).unwrap_or_default();
        format!(
            "open calls {open:?}, open sessions {sessions:?}, runner (live, delivered, pending, waiting) {life:?}, owed {owed}"
        )
    }
}

/// Until when a frame may have renewed the lease. It counts from what the runner has sent; from the answer on is the most that
/// it can be.
pub(super) fn lease_of(frame: &[u8]) -> Option<u64> {
    let body = pb::OrchestratorFrame::decode(frame).ok()?.body?;
    let most = boottime_ns().saturating_add(u64::try_from(LEASE.as_nanos()).unwrap_or(u64::MAX));
    matches!(body, Body::Welcome(_) | Body::HeartbeatAck(_)).then_some(most)
}

/// I4: what was cancelled before it began, and that was confirmed, does not begin.
fn check_cancels(cancelled: &mut BTreeMap<CallId, bool>, store: &Store, host: &Host) -> Result<(), String> {
    for (call_id, is_spared) in cancelled {
        let begun = host.ledger.contains_key(call_id);
        if begun && *is_spared {
            return Err(format!("I4: {call_id} began after its cancel was confirmed"));
        }
        if !begun && !*is_spared && store.is_cancel_noted(call_id.as_str()) {
            *is_spared = !host.is_about_to_begin(call_id);
        }
    }
    Ok(())
}

/// I1 and I5: what a caller is told has to agree with what has happened.
fn check_honesty(call_id: &CallId, outcome: &Outcome, begun: u32, lost: bool) -> Result<(), String> {
    let nothing = matches!(outcome, Outcome::NeverStarted { .. } | Outcome::Cancelled { before_start: true, .. });
    if nothing && begun > 0 {
        return Err(format!("I1: {call_id} began, and its caller was told {outcome:?}"));
    }
    if !nothing && begun == 0 && !matches!(outcome, Outcome::Indeterminate { .. }) {
        return Err(format!("I1: {call_id} never began, and its caller was told {outcome:?}"));
    }
    if matches!(outcome, Outcome::Indeterminate { .. }) && !lost {
        return Err(format!("I5: nothing was lost, and the end of {call_id} is said to be unknown"));
    }
    Ok(())
}
