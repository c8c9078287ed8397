//! Connections between runner and orchestrator: each direction in order, both with a life of their own.

use std::collections::VecDeque;

use prost::Message;
use proto::runner::v1 as pb;
use proto::runner::v1::orchestrator_frame::Body;
use proto::runner::v1::runner_frame::Body as Said;

use crate::dev::simulated::{Conversation, Store};

/// Who is at the other end.
pub(super) enum Peer {
    /// The replica that serves.
    Current(Conversation),
    /// One that was replaced and does not know it: it wants everything ended.
    Stale { term: u64, sessions: Vec<String>, calls: Vec<(String, String)> },
}

/// One connection.
pub(super) struct Wire {
    pub(super) peer: Peer,
    up: VecDeque<Vec<u8>>,
    down: VecDeque<Vec<u8>>,
    pub(super) runner_is_there: bool,
    pub(super) orchestrator_is_there: bool,
    /// Nothing arrives in this direction, and nobody is told: to the orchestrator, to the runner.
    pub(super) stalled: [bool; 2],
}

impl Wire {
    pub(super) fn to(peer: Peer) -> Self {
        let mut wire = Self {
            peer,
            up: VecDeque::new(),
            down: VecDeque::new(),
            runner_is_there: true,
            orchestrator_is_there: true,
            stalled: [false; 2],
        };
        if let Peer::Stale { term, sessions, calls } = &wire.peer {
            wire.down = stale_frames(*term, sessions, calls);
        }
        wire
    }

    pub(super) fn is_stale(&self) -> bool {
        matches!(self.peer, Peer::Stale { .. })
    }

    pub(super) fn send(&mut self, frame: Vec<u8>) {
        if self.orchestrator_is_there {
            self.up.push_back(frame);
        }
    }

    /// The next frame reaches the orchestrator, or the end of the wire does.
    pub(super) fn arrive(&mut self, store: &Store) {
        if self.stalled[0] || !self.orchestrator_is_there {
            return;
        }
        let Peer::Current(conversation) = &mut self.peer else { return self.up.clear() };
        match self.up.pop_front() {
            Some(frame) if conversation.take(store, &frame) => {}
            None if self.runner_is_there => {}
            Some(_) | None => {
                conversation.end(store);
                self.orchestrator_is_there = false;
            }
        }
    }

    /// What the orchestrator says comes onto the wire.
    pub(super) fn answer(&mut self) {
        let Peer::Current(conversation) = &mut self.peer else { return };
        if self.orchestrator_is_there
            && let Some(frame) = conversation.next()
        {
            self.down.push_back(frame);
        }
    }

    /// The next frame that reaches the runner.
    pub(super) fn next(&mut self) -> Option<Vec<u8>> {
        if self.stalled[1] { None } else { self.down.pop_front() }
    }

    /// Whether the runner would notice that nobody is there.
    pub(super) fn has_ended(&self) -> bool {
        !self.orchestrator_is_there && !self.stalled[1] && self.down.is_empty()
    }

    /// It is cut: of what is under way so many frames arrive at either end.
    pub(super) fn cut(&mut self, up: usize, down: usize) {
        self.up.truncate(up);
        self.down.truncate(down);
        self.runner_is_there = false;
        self.stalled = [false; 2];
    }

    /// Whether the last of a call may be on its way to the orchestrator; of one that has ended only output is missing.
    pub(super) fn may_complete(&self, call_id: &str, has_ended: bool) -> bool {
        let body = |frame: &Vec<u8>| pb::RunnerFrame::decode(frame.as_slice()).ok().and_then(|frame| frame.body);
        self.up.iter().filter_map(body).any(|body| match body {
            Said::CallFinished(end) => end.call_id == call_id,
            Said::Output(chunk) => has_ended && chunk.call_id == call_id,
            _ => false,
        })
    }

    /// Frames on their way to the orchestrator and to the runner.
    pub(super) fn under_way(&self) -> (usize, usize) {
        (self.up.len(), self.down.len())
    }

    /// Nothing can come of it any more.
    pub(super) fn is_over(&self) -> bool {
        !self.runner_is_there && (!self.orchestrator_is_there || self.is_stale())
    }
}

fn stale_frames(term: u64, sessions: &[String], calls: &[(String, String)]) -> VecDeque<Vec<u8>> {
    let welcome = pb::Welcome { link_id: "stale".into(), term, ..Default::default() };
    let cancel = |(session_id, call_id): &(String, String)| {
        let (session_id, call_id) = (session_id.clone(), call_id.clone());
        (16, Body::CancelCall(pb::CancelCall { call_id, session_id, epoch: u64::from(u32::MAX), mode: 3 }))
    };
    let close = |session_id: &String| {
        let session_id = session_id.clone();
        (14, Body::CloseSession(pb::CloseSession { session_id, epoch: u64::from(u32::MAX), grace: None }))
    };
    let bodies = std::iter::once((10, Body::Welcome(welcome)));
    let bodies = bodies.chain(calls.iter().map(cancel)).chain(sessions.iter().map(close));
    let frame = |(frame_no, (kind, body)): (u64, (u32, Body))| {
        pb::OrchestratorFrame { frame_no, kind, must_understand: true, body: Some(body) }.encode_to_vec()
    };
    (1..).zip(bodies).map(frame).collect()
}
