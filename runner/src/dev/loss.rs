//! An orchestrator that has lost the latest of what it stored: how that is made to happen, and what it does about it.
//!
//! The runner knows more, so the greatest of what both know counts, and nothing is destroyed because it is not known here: a
//! session that nobody remembers is suspended until somebody says what is to become of it.

use std::collections::BTreeMap;

use proto::runner::v1 as pb;

use super::orchestrator::Link;
use super::state::{CallRecord, SessionRecord, Shared, State};
use super::transcript::Transcript;

/// What was stored at one moment.
#[derive(Debug, Clone)]
pub struct Backup {
    next_epoch: u64,
    sessions: BTreeMap<String, SessionRecord>,
    calls: BTreeMap<String, CallRecord>,
    event_through: u64,
    failovers: u64,
}

impl Backup {
    pub(super) fn of(state: &State) -> Self {
        Self {
            next_epoch: state.next_epoch,
            sessions: state.sessions.clone(),
            calls: state.calls.clone(),
            event_through: state.event_through,
            failovers: state.failovers,
        }
    }

    pub(super) fn put_back(self, state: &mut State) {
        let Self { next_epoch, sessions, calls, event_through, failovers } = self;
        (state.next_epoch, state.event_through, state.failovers) = (next_epoch, event_through, failovers);
        (state.sessions, state.calls) = (sessions, calls);
        (state.link, state.resumed) = (None, false);
    }
}

/// Whether what the runner says shows that something was lost here: terms, placements or acknowledgements that nobody here
/// knows of.
pub(super) fn shows(state: &State, hello: &pb::Hello, held: &[&pb::SessionState], another: bool) -> bool {
    // Another process gives numbers far above those of the one before it.
    let events = !another && hello.first_unacked_event_seq > state.event_through.saturating_add(1);
    events || hello.highest_term > state.term() || highest_epoch(held) > state.next_epoch
}

fn highest_epoch(held: &[&pb::SessionState]) -> u64 {
    held.iter().map(|session| session.epoch).max().unwrap_or(0)
}

/// Takes over what the runner knows and this side does not.
pub(super) fn adopt(state: &mut State, hello: &pb::Hello, held: &[&pb::SessionState]) {
    if hello.highest_term > state.term() {
        // The term after the highest: whoever had that one may still be there.
        state.failovers = hello.highest_term;
    }
    state.next_epoch = state.next_epoch.max(highest_epoch(held));
    for session in held {
        adopt_held(state, session);
    }
}

fn adopt_held(state: &mut State, session: &pb::SessionState) {
    if session.phase() != pb::SessionPhase::Lost && !state.sessions.contains_key(&session.session_id) {
        state.strangers.insert(session.session_id.clone(), session.epoch);
    }
    for call in &session.calls {
        let record = state.calls.entry(call.call_id.clone()).or_insert_with(|| {
            let request = pb::Call {
                call_id: call.call_id.clone(),
                session_id: session.session_id.clone(),
                epoch: session.epoch,
                ..Default::default()
            };
            let transcript = Transcript::default();
            CallRecord { request, sent: true, accepted: true, transcript, ..CallRecord::default() }
        });
        for stream in &call.streams {
            record.transcript.lose(stream.stream, stream.acked_through);
        }
    }
}

/// A call that was accepted, has no end here, and is not held there: its end was acknowledged, and lost here. It is not sent
/// again, because it may have run.
pub(super) fn give_up(shared: &Shared, state: &mut State, held: &[&pb::SessionState]) {
    let is_held = |call_id: &str| held.iter().flat_map(|session| &session.calls).any(|call| call.call_id == call_id);
    let mut over = Vec::new();
    for (call_id, call) in state.calls.iter_mut() {
        if !call.accepted || call.end.is_some() || call.refused.is_some() || is_held(call_id) {
            continue;
        }
        let failure = pb::ToolFailure {
            code: "OUTCOME_UNKNOWN".to_owned(),
            blame: pb::Blame::Host.into(),
            retryable: false,
            message: "the call has ended, and the orchestrator has lost how".to_owned(),
            remediation: "look at what the call was meant to change before running it again".to_owned(),
            retry_after: None,
        };
        let kind = pb::outcome::Kind::Indeterminate(pb::Indeterminate { failure: Some(failure) });
        call.end = Some(pb::CallFinished {
            call_id: call_id.clone(),
            session_id: call.request.session_id.clone(),
            epoch: call.request.epoch,
            outcome: Some(pb::Outcome { kind: Some(kind) }),
            ..Default::default()
        });
        call.complete = true;
        over.push(call_id.clone());
    }
    for call_id in over {
        // Only the seen matters here; nobody has to watch.
        let _ = shared.seen.send(Link::Finished(call_id));
    }
}

/// Makes a session that the runner holds one of ours; its placement, if there is such a session.
pub(super) fn adopt_session(state: &mut State, session_id: &str) -> Option<u64> {
    let epoch = state.strangers.remove(session_id)?;
    let request = pb::OpenSession { session_id: session_id.to_owned(), epoch, ..Default::default() };
    let opened = pb::SessionOpened { session_id: session_id.to_owned(), epoch, ..Default::default() };
    let record = SessionRecord { request, opened: Some(opened), ..SessionRecord::default() };
    state.sessions.insert(session_id.to_owned(), record);
    (state.link, state.resumed) = (None, false);
    Some(epoch)
}
