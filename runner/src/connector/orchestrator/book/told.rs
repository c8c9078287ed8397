//! What a new link is told about the state of things.

use std::collections::BTreeMap;

use proto::runner::v1 as pb;

use super::{Book, BookCall};
use crate::connector::orchestrator::encode::{phase_to_wire, stream_to_wire};
use crate::work::{CallId, SessionId, Stream};

impl Book {
    /// Sessions that are open here.
    pub(in crate::connector::orchestrator) fn session_epochs(&self) -> Vec<(SessionId, u64)> {
        self.sessions.iter().map(|(id, session)| (id.clone(), session.epoch)).collect()
    }

    /// Session of a call.
    pub(in crate::connector::orchestrator) fn session_of(&self, call_id: &CallId) -> Option<(SessionId, u64)> {
        let session_id = &self.calls.get(call_id)?.session_id;
        Some((session_id.clone(), self.sessions.get(session_id)?.epoch))
    }

    /// What a new link is told: every session, with its calls, on pages of at most 512 KiB.
    pub(in crate::connector::orchestrator) fn resume_pages(&self) -> Vec<pb::ResumePage> {
        let mut states: BTreeMap<&SessionId, pb::SessionState> = BTreeMap::new();
        for (session_id, session) in &self.sessions {
            let phase = if session.ready { pb::SessionPhase::Ready } else { pb::SessionPhase::Opening };
            let calls_accepted = session.accepted;
            let state = pb::SessionState { calls_accepted, ..state_of(session_id, session.epoch, phase) };
            states.insert(session_id, state);
        }
        for (call_id, call) in &self.calls {
            let lost = || state_of(&call.session_id, 0, pb::SessionPhase::Lost);
            states.entry(&call.session_id).or_insert_with(lost).calls.push(call.to_wire(call_id));
        }
        let mut pages: Vec<pb::ResumePage> = Vec::new();
        let mut size = usize::MAX;
        for state in states.into_values() {
            let length = prost::Message::encoded_len(&state);
            if size.saturating_add(length) > 512 * 1024 {
                pages.push(pb::ResumePage {
                    index: u32::try_from(pages.len()).unwrap_or(u32::MAX),
                    sessions: Vec::new(),
                });
                size = 0;
            }
            size += length;
            if let Some(page) = pages.last_mut() {
                page.sessions.push(state);
            }
        }
        pages
    }
}

fn state_of(session_id: &SessionId, epoch: u64, phase: pb::SessionPhase) -> pb::SessionState {
    pb::SessionState { session_id: session_id.to_string(), epoch, phase: phase.into(), ..Default::default() }
}

impl BookCall {
    fn to_wire(&self, call_id: &CallId) -> pb::CallState {
        let stream_state = |stream: Stream| pb::StreamState {
            stream: stream_to_wire(stream).into(),
            length: self.lengths.get(stream),
            acked_through: self.streams[stream.index()].acknowledged,
            oldest_retained: 0,
        };
        pb::CallState {
            call_id: call_id.to_string(),
            phase: phase_to_wire(self.phase).into(),
            request_sha256: self.digest.0.to_vec(),
            streams: Stream::ALL.into_iter().filter(|s| self.lengths.get(*s) > 0).map(stream_state).collect(),
        }
    }
}
