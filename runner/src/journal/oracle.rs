//! What a sequence of records amounts to, said a second time in the plainest way, to compare with.

use super::record::{MOST_STARTS, Record, Recovered, RecoveredCall, RecoveredPhase, RecoveredSession};

/// Folds all of them.
pub(super) fn fold(records: &[Record]) -> Recovered {
    let mut state = Recovered::default();
    records.iter().for_each(|record| take(&mut state, record));
    state
}

fn take(state: &mut Recovered, record: &Record) {
    match record {
        Record::Events { through } => state.events_through = state.events_through.max(*through),
        Record::Term { term } => state.term = state.term.max(*term),
        Record::Floor { epoch } => state.epoch_floor = state.epoch_floor.max(*epoch),
        Record::SessionOpening(open) => {
            match state.sessions.iter_mut().find(|s| s.open.session_id == open.session_id) {
                Some(session) if open.epoch > session.open.epoch => session.open = (**open).clone(),
                Some(_) => {}
                None => {
                    let session = RecoveredSession { open: (**open).clone(), sandbox: None, acknowledged: Vec::new() };
                    state.sessions.push(session);
                }
            }
        }
        Record::SessionReady { session_id, sandbox_id, receipt } => {
            for session in state.sessions.iter_mut().filter(|s| s.open.session_id == *session_id) {
                session.sandbox = Some((sandbox_id.clone(), receipt.clone()));
            }
        }
        Record::SessionEnded { session_id, epoch } => {
            if !session_id.is_of_queue() {
                state.epoch_floor = state.epoch_floor.max(*epoch);
            }
            state.sessions.retain(|session| session.open.session_id != *session_id || session.open.epoch > *epoch);
        }
        Record::Remembered { session_id, call_ids } => {
            for session in state.sessions.iter_mut().filter(|s| s.open.session_id == *session_id) {
                session.acknowledged.extend(call_ids.iter().cloned());
            }
        }
        Record::Accepted(call) => {
            let known = state.calls.iter().any(|known| known.call.call_id == call.call_id);
            let over = state.sessions.iter().any(|session| {
                session.open.session_id == call.session_id && session.acknowledged.contains(&call.call_id)
            });
            if !known && !over {
                state.tombstones.retain(|id| *id != call.call_id);
                let phase = RecoveredPhase::Accepted;
                state.calls.push(RecoveredCall {
                    call: (**call).clone(),
                    cancel: None,
                    phase,
                    starts: 0,
                    resumes: Some(0),
                });
            }
        }
        Record::Started { call_id } => {
            for call in state.calls.iter_mut().filter(|call| call.call.call_id == *call_id) {
                if !matches!(call.phase, RecoveredPhase::Finished(_)) {
                    (call.phase, call.starts) = (RecoveredPhase::Started, MOST_STARTS.min(call.starts + 1));
                }
            }
        }
        Record::Resumed { call_id } | Record::Outlived { call_id } => {
            for call in state.calls.iter_mut().filter(|call| call.call.call_id == *call_id && call.starts > 0) {
                call.resumes = match record {
                    Record::Outlived { .. } => None,
                    _ => call.resumes.map(|times| MOST_STARTS.min(times + 1)),
                };
            }
        }
        Record::Cancelled { call_id, mode } => {
            match state.calls.iter_mut().find(|call| call.call.call_id == *call_id) {
                Some(call) => call.cancel = call.cancel.max(Some(*mode)),
                None if state.tombstones.contains(call_id) => {}
                None => state.tombstones.push(call_id.clone()),
            }
        }
        Record::Finished { call_id, result } => {
            for call in state.calls.iter_mut().filter(|call| call.call.call_id == *call_id) {
                if !matches!(call.phase, RecoveredPhase::Finished(_)) {
                    (call.phase, call.starts, call.resumes) = (RecoveredPhase::Finished(result.clone()), 0, Some(0));
                }
            }
        }
        Record::Acknowledged { call_id } => {
            let is_over = |call: &RecoveredCall| {
                call.call.call_id == *call_id && matches!(call.phase, RecoveredPhase::Finished(_))
            };
            let Some(index) = state.calls.iter().position(is_over) else { return };
            let session_id = state.calls.remove(index).call.session_id;
            let session = state.sessions.iter_mut().find(|session| session.open.session_id == session_id);
            if let Some(session) = session
                && !session.acknowledged.contains(call_id)
            {
                session.acknowledged.push(call_id.clone());
            }
        }
    }
}
