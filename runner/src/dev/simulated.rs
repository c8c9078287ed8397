//! The reference orchestrator without a transport, for the simulation: frames are bytes, and nothing happens by itself.

use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use proto::runner::v1 as pb;
use proto::runner::v1::orchestrator_frame::Body;
use proto::runner::v1::outcome::Kind;
use proto::runner::v1::runner_frame::Body as Said;
use tokio::sync::mpsc;

use super::orchestrator::LinkSettings;
use super::session::Session;
use super::state::{SessionRecord, Shared};
use super::{greeting, intake};

/// Output that may be under way: little, so that credit is always short.
const WINDOW: u64 = 8 * 1024;

/// What all replicas store.
pub(crate) struct Store {
    shared: Arc<Shared>,
}

/// What is known of a call.
#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) accepted: bool,
    pub(crate) sent: bool,
    pub(crate) cancelled: bool,
    /// It has ended, whether or not all of its output is there.
    pub(crate) has_end: bool,
    /// It was refused, with this code.
    pub(crate) refused: Option<String>,
    /// How it ended, when all of its output is there.
    pub(crate) outcome: Option<Kind>,
    /// Output is missing, and that was declared.
    pub(crate) has_holes: bool,
}

impl Store {
    pub(crate) fn new() -> Self {
        let settings =
            LinkSettings { window: WINDOW, heartbeat_every: Duration::from_secs(5), ..LinkSettings::default() };
        let shared = Arc::new(Shared::new(settings));
        // Each session has had placements before.
        shared.state().next_epoch = 8;
        Self { shared }
    }

    /// Another replica goes on with what is stored.
    pub(crate) fn fail_over(&self) {
        self.shared.fail_over();
    }

    pub(crate) fn term(&self) -> u64 {
        self.shared.state().term()
    }

    pub(crate) fn open_session(&self, session_id: &str) {
        let mut state = self.shared.state();
        state.next_epoch += 1;
        let request = pb::OpenSession { session_id: session_id.into(), epoch: state.next_epoch, ..Default::default() };
        let record = SessionRecord { request: request.clone(), ..SessionRecord::default() };
        state.sessions.insert(session_id.into(), record);
        state.send(Body::OpenSession(request));
    }

    pub(crate) fn call(&self, session_id: &str, call_id: &str, command: &str) {
        if let Some(session) = self.session(session_id) {
            let input = pb::BashInput { command: Some(command.into()), ..Default::default() };
            session.send(call_id, pb::call::Input::Bash(input));
        }
    }

    /// Sends a call again that the runner may have, as an orchestrator may at any time; false when it has not been sent yet.
    pub(crate) fn call_again(&self, call_id: &str) -> bool {
        let mut state = self.shared.state();
        let Some(call) = state.calls.get(call_id).filter(|call| call.sent && call.refused.is_none()) else {
            return false;
        };
        let request = call.request.clone();
        state.send(Body::Call(request));
        true
    }

    /// Closes a session in the name of a placement before its present one, as an orchestrator does that was replaced.
    pub(crate) fn close_older_placement(&self, session_id: &str) -> bool {
        let Some(session) = self.session(session_id) else { return false };
        let close = pb::CloseSession { session_id: session_id.into(), epoch: session.epoch - 1, grace: None };
        self.shared.state().send(Body::CloseSession(close));
        true
    }

    /// Whether the runner has said of a session that it was closed.
    pub(crate) fn was_closed(&self, session_id: &str) -> bool {
        let state = self.shared.state();
        let ended = state.sessions.get(session_id).and_then(|record| record.ended.as_ref());
        ended.is_some_and(|ended| ended.reason() == pb::SessionEndReason::Closed)
    }

    /// Whether the runner has confirmed the cancel of a call.
    pub(crate) fn is_cancel_noted(&self, call_id: &str) -> bool {
        self.shared.state().calls.get(call_id).is_some_and(|call| call.cancel_noted)
    }

    pub(crate) fn cancel(&self, session_id: &str, call_id: &str, mode: pb::CancelMode) {
        if let Some(session) = self.session(session_id) {
            session.cancel(call_id, mode);
        }
    }

    pub(crate) fn close(&self, session_id: &str) {
        let Some(session) = self.session(session_id) else { return };
        let close = pb::CloseSession { session_id: session_id.into(), epoch: session.epoch, grace: None };
        let mut state = self.shared.state();
        if let Some(record) = state.sessions.get_mut(session_id) {
            record.close = Some(close.clone());
        }
        state.send(Body::CloseSession(close));
    }

    /// Once its opening was answered.
    fn session(&self, session_id: &str) -> Option<Session> {
        let state = self.shared.state();
        let record = state.sessions.get(session_id)?;
        record.opened.as_ref()?;
        let (session_id, epoch) = (session_id.to_owned(), record.request.epoch);
        Some(Session { session_id, epoch, receipt: pb::Receipt::default(), shared: Arc::clone(&self.shared) })
    }

    /// Whether a session was opened, and whether it is over.
    pub(crate) fn session_is(&self, session_id: &str) -> (bool, bool) {
        let state = self.shared.state();
        let record = state.sessions.get(session_id);
        let over = record.is_some_and(|record| record.ended.is_some() || record.refused.is_some());
        (record.is_some_and(|record| record.opened.is_some()), over)
    }

    pub(crate) fn known(&self, call_id: &str) -> Option<Known> {
        let state = self.shared.state();
        let call = state.calls.get(call_id)?;
        let outcome = call.end.as_ref().filter(|_| call.complete).and_then(|end| end.outcome.clone()?.kind);
        Some(Known {
            accepted: call.accepted,
            sent: call.sent,
            cancelled: call.cancel.is_some(),
            has_end: call.end.is_some(),
            refused: call.refused.as_ref().map(|failure| failure.code.clone()),
            outcome,
            has_holes: call.transcript.streams.values().any(|stream| !stream.holes.is_empty()),
        })
    }

    /// What was found wrong, and greetings that were refused: no runner of the simulation deserves that.
    pub(crate) fn complaints(&self) -> Vec<String> {
        let state = self.shared.state();
        state.complaints.iter().chain(&state.refused_links).cloned().collect()
    }
}

/// The orchestrator's end of one link.
#[derive(Default)]
pub(crate) struct Conversation {
    number: u64,
    frame_no: u64,
    hello: Option<Box<pb::Hello>>,
    pages: Vec<pb::ResumePage>,
    frames: Option<mpsc::Receiver<Result<pb::OrchestratorFrame, tonic::Status>>>,
}

impl Conversation {
    /// Takes a frame; false when this end has hung up. The same steps as of a link that is served.
    pub(crate) fn take(&mut self, store: &Store, bytes: &[u8]) -> bool {
        let frame = pb::RunnerFrame::decode(bytes).expect("what was encoded");
        let shared = &store.shared;
        self.frame_no += 1;
        match (self.hello.is_some(), frame.body) {
            (false, Some(Said::Hello(hello))) => self.hello = Some(Box::new(hello)),
            (false, _) => {
                shared.complain("a link did not begin with Hello".to_owned());
                return false;
            }
            (true, Some(Said::ResumePage(page))) if self.frames.is_none() => self.pages.push(page),
            (true, _) if self.frames.is_none() => {
                shared.complain("fewer resume pages than announced".to_owned());
                return false;
            }
            (true, body) => {
                let mut state = shared.state();
                if state.link.as_ref().is_none_or(|link| link.number != self.number) {
                    return false;
                }
                if frame.frame_no != self.frame_no {
                    state.complain(format!("frame {} came, {} was expected", frame.frame_no, self.frame_no));
                }
                if let Some(body) = body {
                    intake::take(shared, &mut state, body);
                }
            }
        }
        if let (Some(hello), None) = (&self.hello, &self.frames)
            && self.pages.len() >= hello.resume_pages as usize
        {
            let (sender, frames) = mpsc::channel(8192);
            self.number = greeting::welcome(shared, hello, &self.pages, sender, None);
            self.frames = Some(frames);
        }
        true
    }

    /// The next frame for the runner.
    pub(crate) fn next(&mut self) -> Option<Vec<u8>> {
        let frame = self.frames.as_mut()?.try_recv().ok()?.ok()?;
        Some(frame.encode_to_vec())
    }

    /// The runner has hung up.
    pub(crate) fn end(&mut self, store: &Store) {
        let mut state = store.shared.state();
        if self.frames.is_some() && state.link.as_ref().is_some_and(|link| link.number == self.number) {
            (state.link, state.resumed) = (None, false);
        }
    }
}
