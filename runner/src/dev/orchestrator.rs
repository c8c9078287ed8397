//! What the reference orchestrator knows, and what its user may ask of it.

use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use proto::runner::v1 as pb;
use proto::runner::v1::orchestrator_frame::Body;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use super::pki::{Authority, Issued, PkiError, Validity};
use super::transcript::{Finished, Transcript};
use crate::connector::tls::TlsFiles;

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum DevError {
    /// Certificates.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// The listening socket.
    #[error("cannot listen on a loopback port: {0}")]
    Listen(std::io::Error),
    /// The runner refused a request.
    #[error("{what} was refused: {} ({})", failure.message, failure.code)]
    Refused {
        /// Session or call.
        what: String,
        /// Why.
        failure: Box<pb::ToolFailure>,
    },
    /// A session ended before it could take calls.
    #[error("session {session_id} ended: {reason}")]
    SessionEnded {
        /// The session.
        session_id: String,
        /// Why.
        reason: String,
    },
    /// The orchestrator was stopped.
    #[error("the orchestrator was stopped")]
    Stopped,
}

/// How links are kept.
#[derive(Debug, Clone, Copy)]
pub struct LinkSettings {
    /// Output bytes that may be under way; 0 means that no output is ever asked for.
    pub window: u64,
    /// Acknowledge events and output as they come.
    pub acknowledge: bool,
    /// Lease of the runner.
    pub lease_ttl: Duration,
    /// How often it says that it is alive.
    pub heartbeat_every: Duration,
    /// Flow control windows of HTTP/2 that hold what is under way over a long distance; without, the transport's own.
    /// Fixed when the orchestrator starts.
    pub windows: bool,
}

impl Default for LinkSettings {
    fn default() -> Self {
        Self {
            window: 1024 * 1024,
            acknowledge: true,
            lease_ttl: Duration::from_secs(30),
            heartbeat_every: Duration::from_secs(10),
            windows: true,
        }
    }
}

/// What is seen while it happens. Slow readers miss some; the transcript misses nothing.
#[derive(Debug, Clone)]
pub enum Link {
    /// A runner has come or come back.
    Resumed(Box<pb::Hello>),
    /// A call has begun.
    Started(String),
    /// New output of a call.
    Output(pb::OutputChunk),
    /// A call is over.
    Finished(String),
    /// A heartbeat came.
    Heartbeat(pb::Heartbeat),
}

/// A finished call.
pub type CallOutcome = Finished;

/// One runner's orchestrator.
#[derive(Debug)]
pub struct Orchestrator {
    shared: Arc<Shared>,
    address: SocketAddr,
    authority: Authority,
    stop: Option<oneshot::Sender<()>>,
}

/// An open session.
#[derive(Debug, Clone)]
pub struct Session {
    /// Its id.
    pub session_id: String,
    /// Its placement.
    pub epoch: u64,
    /// What protects it.
    pub receipt: pb::Receipt,
    shared: Arc<Shared>,
}

/// State and its observers.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) settings: Mutex<LinkSettings>,
    state: Mutex<State>,
    version: watch::Sender<u64>,
    pub(super) seen: broadcast::Sender<Link>,
}

/// Everything that is remembered.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) link: Option<LinkOut>,
    pub(super) links: u64,
    pub(super) resumed: bool,
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
    complaints: Vec<String>,
    refused_handshakes: Vec<String>,
    stopped: bool,
}

/// The sending half of a link.
#[derive(Debug)]
pub(super) struct LinkOut {
    pub(super) number: u64,
    pub(super) sender: mpsc::Sender<Result<pb::OrchestratorFrame, tonic::Status>>,
    pub(super) frame_no: u64,
    /// Frames may flow; before that the handshake has the floor.
    pub(super) live: bool,
}

/// One session, as it was asked for and as it is.
#[derive(Debug)]
pub(super) struct SessionRecord {
    pub(super) request: pb::OpenSession,
    pub(super) opened: Option<pb::SessionOpened>,
    pub(super) refused: Option<pb::ToolFailure>,
    pub(super) ended: Option<pb::SessionEnded>,
    pub(super) close: Option<pb::CloseSession>,
}

/// One call, as it was asked for and as it is.
#[derive(Debug)]
pub(super) struct CallRecord {
    pub(super) request: pb::Call,
    /// It was put on a link, so the runner may have it.
    pub(super) sent: bool,
    pub(super) accepted: bool,
    pub(super) started: Option<u64>,
    pub(super) transcript: Transcript,
    pub(super) end: Option<pb::CallFinished>,
    pub(super) complete: bool,
    pub(super) refused: Option<pb::ToolFailure>,
    pub(super) cancel: Option<pb::CancelCall>,
    pub(super) cancel_noted: bool,
    pub(super) stdin_accepted: u64,
}

impl Shared {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn settings(&self) -> LinkSettings {
        *self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells everybody who waits that something has changed.
    pub(super) fn changed(&self) {
        self.version.send_modify(|version| *version += 1);
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
    async fn until<T>(&self, mut look: impl FnMut(&State) -> Option<Result<T, DevError>>) -> Result<T, DevError> {
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

impl Orchestrator {
    /// Starts on a free loopback port, with an authority of its own and a good certificate for `localhost`.
    ///
    /// # Errors
    /// `DevError::Pki` or `DevError::Listen`.
    pub async fn start(settings: LinkSettings) -> Result<Self, DevError> {
        let authority = Authority::new("sandbox-runner throw-away authority")?;
        let server = authority.server("localhost", Validity::Now)?;
        Self::start_with(authority, &server, settings).await
    }

    /// Starts with this authority for runners and this certificate of its own.
    ///
    /// # Errors
    /// `DevError::Pki` or `DevError::Listen`.
    pub async fn start_with(authority: Authority, server: &Issued, settings: LinkSettings) -> Result<Self, DevError> {
        let tls = authority.server_config(server)?;
        let (listener, address) = super::server::listen().await.map_err(DevError::Listen)?;
        let shared = Arc::new(Shared {
            settings: Mutex::new(settings),
            state: Mutex::default(),
            version: watch::channel(0).0,
            seen: broadcast::channel(1024).0,
        });
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = super::server::serve(listener, tls, Arc::clone(&shared), async {
            // Dropping the sender stops as well.
            let _ = stopped.await;
        });
        tokio::spawn(serving);
        Ok(Self { shared, address, authority, stop: Some(stop) })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The authority that runners and tests get their certificates from.
    #[must_use]
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// Writes certificate files for the runner `runner_id`.
    ///
    /// # Errors
    /// `DevError::Pki`.
    pub fn write_client_files(&self, directory: &Path, runner_id: &str) -> Result<TlsFiles, DevError> {
        let client = self.authority.client(runner_id, Validity::Now)?;
        Ok(self.authority.write_client_files(directory, &client)?)
    }

    /// Waits for a runner.
    ///
    /// # Errors
    /// `DevError::Stopped`.
    pub async fn runner(&self) -> Result<pb::Hello, DevError> {
        self.shared.until(|state| state.resumed.then(|| state.hello.clone().ok_or(DevError::Stopped))).await
    }

    /// What is seen from now on.
    #[must_use]
    pub fn watch(&self) -> broadcast::Receiver<Link> {
        self.shared.seen.subscribe()
    }

    /// Opens a session. `request` needs no epoch: a new one is given.
    ///
    /// # Errors
    /// `DevError::Refused` or `DevError::SessionEnded`.
    pub async fn open_session(&self, mut request: pb::OpenSession) -> Result<Session, DevError> {
        let session_id = request.session_id.clone();
        {
            let mut state = self.shared.state();
            state.next_epoch += 1;
            request.epoch = state.next_epoch;
            let record =
                SessionRecord { request: request.clone(), opened: None, refused: None, ended: None, close: None };
            state.sessions.insert(session_id.clone(), record);
            state.send(Body::OpenSession(request.clone()));
        }
        let found = |state: &State| {
            let record = state.sessions.get(&session_id)?;
            if let Some(failure) = &record.refused {
                let (what, failure) = (format!("session {session_id}"), Box::new(failure.clone()));
                return Some(Err(DevError::Refused { what, failure }));
            }
            if let Some(ended) = &record.ended {
                return Some(Err(session_ended(ended)));
            }
            record.opened.clone().map(Ok)
        };
        let opened = self.shared.until(found).await?;
        let receipt = opened.receipt.unwrap_or_default();
        Ok(Session { session_id, epoch: request.epoch, receipt, shared: Arc::clone(&self.shared) })
    }

    /// Empties the runner.
    pub fn drain(&self, drain: pb::Drain) {
        self.shared.state().send(Body::Drain(drain));
    }

    /// Asks the runner something.
    ///
    /// # Errors
    /// `DevError::Stopped`.
    pub async fn query(&self, query: pb::Query) -> Result<pb::QueryReply, DevError> {
        let query_id = query.query_id;
        self.shared.state().send(Body::Query(query));
        self.shared.until(|state| state.replies.get(&query_id).cloned().map(Ok)).await
    }

    /// Sends any frame, for tests of what a runner makes of it.
    pub fn send_raw(&self, body: Body) {
        self.shared.state().send(body);
    }

    /// Drops the present link without a word.
    pub fn cut(&self) {
        self.shared.state().link = None;
        self.shared.changed();
    }

    /// Changes how links are kept; the credit takes effect at once.
    pub fn set(&self, settings: LinkSettings) {
        *self.shared.settings.lock().unwrap_or_else(PoisonError::into_inner) = settings;
        let mut state = self.shared.state();
        let link_max_bytes = state.output_received + settings.window;
        state.credited = state.credited.max(link_max_bytes);
        state.send(Body::Credit(pb::Credit { link_max_bytes, calls: Vec::new() }));
        if settings.acknowledge {
            let through_event_seq = state.event_through;
            state.send(Body::EventAck(pb::EventAck { through_event_seq }));
        }
    }

    /// Breaches of the protocol so far. A conforming runner causes none.
    #[must_use]
    pub fn complaints(&self) -> Vec<String> {
        self.shared.state().complaints.clone()
    }

    /// Handshakes that were refused, with the reason.
    #[must_use]
    pub fn refused_handshakes(&self) -> Vec<String> {
        self.shared.state().refused_handshakes.clone()
    }

    /// Waits for the next refusal of a request.
    ///
    /// # Errors
    /// `DevError::Stopped`.
    pub async fn refusal(&self) -> Result<pb::RequestRefused, DevError> {
        self.shared.until(|state| state.refusals.front().cloned().map(Ok)).await?;
        self.shared.state().refusals.pop_front().ok_or(DevError::Stopped)
    }

    /// Waits for the goodbye of the runner.
    ///
    /// # Errors
    /// `DevError::Stopped`.
    pub async fn goodbye(&self) -> Result<pb::Goodbye, DevError> {
        self.shared.until(|state| state.goodbye.clone().map(Ok)).await
    }

    /// Links so far.
    #[must_use]
    pub fn links(&self) -> u64 {
        self.shared.state().links
    }

    /// Heartbeats so far, and the last one.
    #[must_use]
    pub fn heartbeats(&self) -> (u64, Option<pb::Heartbeat>) {
        let state = self.shared.state();
        (state.heartbeats, state.last_heartbeat.clone())
    }

    /// For each session, how many calls the runner has accepted and, as far as it has told, neither started nor ended.
    #[must_use]
    pub fn waiting(&self) -> BTreeMap<String, usize> {
        let state = self.shared.state();
        let waits = |call: &&CallRecord| call.accepted && call.started.is_none() && call.end.is_none();
        let mut counts = BTreeMap::new();
        for call in state.calls.values().filter(waits) {
            *counts.entry(call.request.session_id.clone()).or_default() += 1;
        }
        counts
    }

    /// How many calls are queued, running (some output seen or not), and finished without acknowledgement, as far as
    /// the orchestrator can tell at this moment.
    #[must_use]
    pub fn phases(&self) -> [usize; 3] {
        let state = self.shared.state();
        let open = |call: &&CallRecord| call.refused.is_none() && !call.complete;
        let mut counts = [0; 3];
        for call in state.calls.values().filter(open) {
            let phase = if call.end.is_some() { 2 } else { usize::from(call.started.is_some()) };
            counts[phase] += 1;
        }
        counts
    }
}

impl Drop for Orchestrator {
    fn drop(&mut self) {
        self.stop.take();
        self.shared.state().stopped = true;
        self.shared.state().link = None;
        self.shared.changed();
    }
}

fn session_ended(ended: &pb::SessionEnded) -> DevError {
    let reason = match &ended.failure {
        Some(failure) => format!("{} ({})", failure.message, failure.code),
        None => ended.reason().as_str_name().to_owned(),
    };
    DevError::SessionEnded { session_id: ended.session_id.clone(), reason }
}

impl Session {
    /// Sends a call without waiting for anything.
    pub fn send(&self, call_id: &str, input: pb::call::Input) {
        let request = pb::Call { call_id: call_id.to_owned(), input: Some(input), ..Default::default() };
        self.send_call(request);
    }

    /// Sends a call with everything set but session and epoch.
    pub fn send_call(&self, mut request: pb::Call) {
        request.session_id.clone_from(&self.session_id);
        request.epoch = self.epoch;
        let mut state = self.shared.state();
        let record = CallRecord {
            request: request.clone(),
            sent: false,
            accepted: false,
            started: None,
            transcript: Transcript::default(),
            end: None,
            complete: false,
            refused: None,
            cancel: None,
            cancel_noted: false,
            stdin_accepted: 0,
        };
        state.calls.insert(request.call_id.clone(), record);
        state.send(Body::Call(request));
    }

    /// Waits for the end of a call with all its output.
    ///
    /// # Errors
    /// `DevError::Refused`.
    pub async fn outcome(&self, call_id: &str) -> Result<CallOutcome, DevError> {
        let found = |state: &State| {
            let call = state.calls.get(call_id)?;
            if let Some(failure) = &call.refused {
                let (what, failure) = (format!("call {call_id}"), Box::new(failure.clone()));
                return Some(Err(DevError::Refused { what, failure }));
            }
            let message = call.end.clone().filter(|_| call.complete)?;
            Some(Ok(Finished { message, streams: call.transcript.streams.clone() }))
        };
        self.shared.until(found).await
    }

    /// Waits until a call has begun.
    ///
    /// # Errors
    /// `DevError::Stopped`.
    pub async fn started(&self, call_id: &str) -> Result<(), DevError> {
        let found = |state: &State| {
            let call = state.calls.get(call_id)?;
            (call.started.is_some() || call.end.is_some()).then_some(Ok(()))
        };
        self.shared.until(found).await
    }

    /// Waits for the end of a call, whether or not its output has come.
    ///
    /// # Errors
    /// `DevError::Stopped`.
    pub async fn ended(&self, call_id: &str) -> Result<pb::CallFinished, DevError> {
        self.shared.until(|state| state.calls.get(call_id)?.end.clone().map(Ok)).await
    }

    /// Runs a call and waits for it.
    ///
    /// # Errors
    /// `DevError::Refused`.
    pub async fn run(&self, call_id: &str, input: pb::call::Input) -> Result<CallOutcome, DevError> {
        self.send(call_id, input);
        self.outcome(call_id).await
    }

    /// Runs a command in the shell and waits for it.
    ///
    /// # Errors
    /// `DevError::Refused`.
    pub async fn bash(&self, call_id: &str, command: &str) -> Result<CallOutcome, DevError> {
        let input = pb::BashInput { command: Some(command.to_owned()), ..Default::default() };
        self.run(call_id, pb::call::Input::Bash(input)).await
    }

    /// Ends a call; its outcome comes as that of the call.
    pub fn cancel(&self, call_id: &str, mode: pb::CancelMode) {
        let cancel = pb::CancelCall {
            call_id: call_id.to_owned(),
            session_id: self.session_id.clone(),
            epoch: self.epoch,
            mode: mode.into(),
        };
        let mut state = self.shared.state();
        if let Some(call) = state.calls.get_mut(call_id) {
            (call.cancel, call.cancel_noted) = (Some(cancel.clone()), false);
        }
        state.send(Body::CancelCall(cancel));
    }

    /// Feeds standard input and waits until everything up to its end is taken.
    ///
    /// # Errors
    /// `DevError::Stopped`.
    pub async fn stdin(&self, call_id: &str, offset: u64, data: &[u8], eof: bool) -> Result<u64, DevError> {
        let message = pb::WriteStdin { call_id: call_id.to_owned(), offset, data: data.to_vec(), eof };
        self.shared.state().send(Body::WriteStdin(message));
        let wanted = offset + data.len() as u64;
        let taken = |state: &State| {
            let taken = state.calls.get(call_id)?.stdin_accepted;
            (taken >= wanted).then_some(Ok(taken))
        };
        self.shared.until(taken).await
    }

    /// Ends the session and waits until it is over.
    ///
    /// # Errors
    /// `DevError::Stopped`.
    pub async fn close(&self, grace: Duration) -> Result<pb::SessionEnded, DevError> {
        let close =
            pb::CloseSession { session_id: self.session_id.clone(), epoch: self.epoch, grace: grace.try_into().ok() };
        {
            let mut state = self.shared.state();
            if let Some(record) = state.sessions.get_mut(&self.session_id) {
                record.close = Some(close.clone());
            }
            state.send(Body::CloseSession(close));
        }
        self.shared.until(|state| state.sessions.get(&self.session_id)?.ended.clone().map(Ok)).await
    }
}
