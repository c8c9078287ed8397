//! What the reference orchestrator remembers, and who waits for a change of it.
//!
//! Whoever receives frames writes it, whoever asked for something reads it; both hold the lock for moments and await nothing under it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use proto::runner::v1 as pb;
use proto::runner::v1::orchestrator_frame::Body;
use tokio::sync::{broadcast, mpsc, watch};
use tokio::time::Instant;

use super::orchestrator::{DevError, Link, LinkSettings};
use super::revocation::{Denied, Holder};
use super::transcript::Transcript;
use crate::work::Code;
use crate::work::limits::FRAME_BYTES;

/// Most that number and kind of a frame add to its body.
const FRAME_HEAD_BYTES: usize = 24;

/// State and its observers.
#[derive(Debug)]
pub(super) struct Shared {
    settings: Mutex<LinkSettings>,
    state: Mutex<State>,
    version: watch::Sender<u64>,
    pub(super) seen: broadcast::Sender<Link>,
}

/// Everything that is remembered.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) link: Option<LinkOut>,
    pub(super) links: u64,
    /// Links that were made while the one before was up.
    pub(super) overlaps: u64,
    pub(super) resumed: bool,
    pub(super) late_runners: u64,
    pub(super) next_epoch: u64,
    pub(super) sessions: BTreeMap<String, SessionRecord>,
    pub(super) calls: BTreeMap<String, CallRecord>,
    pub(super) event_through: u64,
    pub(super) output_received: u64,
    pub(super) credited: u64,
    pub(super) hello: Option<pb::Hello>,
    pub(super) heartbeats: u64,
    pub(super) last_heartbeat: Option<pb::Heartbeat>,
    pub(super) refusals: VecDeque<pb::RequestRefused>,
    pub(super) drain: Option<pb::DrainStatus>,
    pub(super) goodbye: Option<pb::Goodbye>,
    pub(super) replies: BTreeMap<u64, pb::QueryReply>,
    pub(super) complaints: Vec<String>,
    pub(super) refused_handshakes: Vec<String>,
    /// Greetings that were refused, with the reason.
    pub(super) refused_links: Vec<String>,
    /// Whose certificates are not good any more.
    pub(super) denied: Vec<Denied>,
    /// Until when the runner may begin something, as far as this side can know, and some more.
    pub(super) lease_until: Option<Instant>,
    /// Processes of the runner that others have taken the place of.
    pub(super) replaced: BTreeSet<String>,
    /// Sessions that the runner holds and nobody here knows of, with their placement.
    pub(super) strangers: BTreeMap<String, u64>,
    /// Calls whose end came from a placement that does not count any more.
    pub(super) superseded: Vec<String>,
    pub(super) stopped: bool,
    /// How often another replica has taken over.
    pub(super) failovers: u64,
}

/// The sending half of a link.
#[derive(Debug)]
pub(super) struct LinkOut {
    pub(super) number: u64,
    pub(super) sender: mpsc::Sender<Result<pb::OrchestratorFrame, tonic::Status>>,
    pub(super) frame_no: u64,
    /// Frames may flow; before that the handshake has the floor.
    pub(super) live: bool,
    /// Whose certificate it was made with.
    pub(super) holder: Option<Holder>,
}

/// One session, as it was asked for and as it is.
#[derive(Debug, Clone, Default)]
pub(super) struct SessionRecord {
    pub(super) request: pb::OpenSession,
    pub(super) opened: Option<pb::SessionOpened>,
    pub(super) refused: Option<pb::ToolFailure>,
    pub(super) ended: Option<pb::SessionEnded>,
    pub(super) close: Option<pb::CloseSession>,
    /// A newer placement of it is on another runner.
    pub(super) elsewhere: bool,
}

/// One call, as it was asked for and as it is.
#[derive(Debug, Clone, Default)]
pub(super) struct CallRecord {
    pub(super) request: pb::Call,
    /// It was put on a link, so the runner may have it.
    pub(super) sent: bool,
    pub(super) accepted: bool,
    pub(super) started: Option<u64>,
    pub(super) transcript: Transcript,
    pub(super) end: Option<pb::CallFinished>,
    pub(super) complete: bool,
    /// Its bytes are dropped, because nobody will look at them again.
    pub(super) shed: bool,
    pub(super) refused: Option<pb::ToolFailure>,
    pub(super) cancel: Option<pb::CancelCall>,
    pub(super) cancel_noted: bool,
    pub(super) stdin_accepted: u64,
}

impl Shared {
    /// Nothing has happened yet.
    pub(super) fn new(settings: LinkSettings) -> Self {
        Self {
            settings: Mutex::new(settings),
            state: Mutex::default(),
            version: watch::channel(0).0,
            seen: broadcast::channel(1024).0,
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn settings(&self) -> LinkSettings {
        *self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set(&self, settings: LinkSettings) {
        *self.settings.lock().unwrap_or_else(PoisonError::into_inner) = settings;
    }

    /// Tells everybody who waits that something has changed.
    pub(super) fn changed(&self) {
        self.version.send_modify(|version| *version += 1);
    }

    /// Another replica goes on with what is stored.
    pub(super) fn fail_over(&self) {
        let mut state = self.state();
        state.failovers += 1;
        (state.link, state.resumed) = (None, false);
    }

    /// Notes a breach of the protocol.
    pub(super) fn complain(&self, problem: String) {
        self.state().complaints.push(problem);
        self.changed();
    }

    pub(super) fn refused_handshake(&self, peer: SocketAddr, error: &std::io::Error) {
        self.state().refused_handshakes.push(format!("{peer}: {error}"));
        self.changed();
    }

    /// Waits until `look` finds something.
    pub(super) async fn until<T>(
        &self,
        mut look: impl FnMut(&State) -> Option<Result<T, DevError>>,
    ) -> Result<T, DevError> {
        let mut version = self.version.subscribe();
        loop {
            {
                let state = self.state();
                if let Some(found) = look(&state) {
                    return found;
                }
                if state.stopped {
                    return Err(DevError::Stopped);
                }
            }
            version.changed().await.map_err(|_| DevError::Stopped)?;
        }
    }
}

impl State {
    /// Of the replica that serves.
    pub(super) fn term(&self) -> u64 {
        self.failovers + 1
    }

    /// Sends a frame on the present link, if there is one. A link whose queue is full is given up.
    pub(super) fn send(&mut self, body: Body) {
        if let (Body::Call(request), Some(LinkOut { live: true, .. })) = (&body, &self.link)
            && let Some(call) = self.calls.get_mut(&request.call_id)
        {
            call.sent = true;
        }
        if self.link.as_ref().is_some_and(|link| link.live) {
            self.send_now(body);
        }
    }

    /// Sends a frame whether or not the handshake is over.
    pub(super) fn send_now(&mut self, body: Body) {
        let Some(link) = &mut self.link else { return };
        link.frame_no += 1;
        let frame = pb::OrchestratorFrame {
            frame_no: link.frame_no,
            kind: kind_of(&body),
            must_understand: true,
            body: Some(body),
        };
        if link.sender.try_send(Ok(frame)).is_err() {
            self.link = None;
        }
    }

    pub(super) fn complain(&mut self, problem: String) {
        self.complaints.push(problem);
    }

    /// Whether what comes of a session here does not count any more.
    pub(super) fn is_elsewhere(&self, session_id: &str) -> bool {
        self.sessions.get(session_id).is_some_and(|record| record.elsewhere)
    }
}

/// Why a request is put on no link: a frame above this size would be refused, or end the link, and be sent again on the next one.
pub(super) fn too_large(body: &Body) -> Option<pb::ToolFailure> {
    let length = body.encoded_len() + FRAME_HEAD_BYTES;
    (length > FRAME_BYTES).then(|| pb::ToolFailure {
        code: Code::TooLarge.as_str().to_owned(),
        blame: pb::Blame::Caller.into(),
        message: format!("the frame has {length} bytes, and at most {FRAME_BYTES} are sent"),
        remediation: "split the input into several calls".to_owned(),
        ..Default::default()
    })
}

fn kind_of(body: &Body) -> u32 {
    match body {
        Body::Welcome(_) => 10,
        Body::ResumeDecisions(_) => 11,
        Body::HeartbeatAck(_) => 12,
        Body::OpenSession(_) => 13,
        Body::CloseSession(_) => 14,
        Body::Call(_) => 15,
        Body::CancelCall(_) => 16,
        Body::EventAck(_) => 17,
        Body::OutputAck(_) => 18,
        Body::Credit(_) => 19,
        Body::Drain(_) => 20,
        Body::GoAway(_) => 21,
        Body::Unsupported(_) => 22,
        Body::WriteStdin(_) => 23,
        Body::ResizeTerminal(_) => 24,
        Body::UpdateNetworkPolicy(_) => 25,
        Body::Query(_) => 26,
        Body::ForwardData(_) => 27,
        Body::SandboxOperation(_) => 28,
    }
}
