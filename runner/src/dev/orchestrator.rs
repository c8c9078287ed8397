//! What the user of the reference orchestrator may ask of it: links, sessions, and what a runner has told.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use proto::runner::v1 as pb;
use proto::runner::v1::orchestrator_frame::Body;
use tokio::sync::{broadcast, oneshot};

use super::enrollment::Enrollment;
use super::loss::Backup;
use super::pki::{Authority, Issued, PkiError, Validity};
use super::revocation::Denied;
use super::session::Session;
use super::state::{CallRecord, SessionRecord, Shared, State, too_large};
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
    /// A newer placement of the session is on another runner.
    #[error("session {session_id} was placed elsewhere, what came of it here does not count")]
    Elsewhere {
        /// The session.
        session_id: String,
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

/// One runner's orchestrator.
#[derive(Debug)]
pub struct Orchestrator {
    shared: Arc<Shared>,
    address: SocketAddr,
    authority: Arc<Authority>,
    tls: Arc<ArcSwap<rustls::ServerConfig>>,
    stop: Option<oneshot::Sender<()>>,
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
        let tls = Arc::new(ArcSwap::from_pointee(authority.server_config(server)?));
        let (listener, address) = super::server::listen().await.map_err(DevError::Listen)?;
        let shared = Arc::new(Shared::new(settings));
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = super::server::serve(listener, Arc::clone(&tls), Arc::clone(&shared), async {
            // Dropping the sender stops as well.
            let _ = stopped.await;
        });
        tokio::spawn(serving);
        Ok(Self { shared, address, authority: Arc::new(authority), tls, stop: Some(stop) })
    }

    /// What the next connection gets: another certificate, other authorities. Those that exist go on.
    pub fn set_tls(&self, tls: rustls::ServerConfig) {
        self.tls.store(Arc::new(tls));
    }

    /// Starts a service beside it that enrols runners: certificates of the same authority, and a port of its own.
    ///
    /// # Errors
    /// `DevError::Pki` or `DevError::Listen`.
    pub async fn start_enrollment(&self) -> Result<Enrollment, DevError> {
        Enrollment::start(Arc::clone(&self.authority), Arc::clone(&self.shared)).await
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

    /// Waits until the lease of the runner is over, as far as this side can know: from then on the runner is unreachable, begins
    /// nothing, and what it holds may be placed elsewhere. A margin is in it.
    ///
    /// # Errors
    /// `DevError::Stopped`.
    pub async fn lease_over(&self) -> Result<(), DevError> {
        let mut known = self.shared.until(|state| state.lease_until.map(Ok)).await?;
        loop {
            tokio::time::sleep_until(known).await;
            // What was heard meanwhile has renewed it.
            match self.shared.until(|state| state.lease_until.map(Ok)).await? {
                until if until <= known => return Ok(()),
                until => known = until,
            }
        }
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
            let body = Body::OpenSession(request.clone());
            if let Some(failure) = too_large(&body).map(Box::new) {
                return Err(DevError::Refused { what: format!("session {session_id}"), failure });
            }
            let record = SessionRecord { request: request.clone(), ..SessionRecord::default() };
            state.sessions.insert(session_id.clone(), record);
            state.send(body);
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

    /// Waits until the present link has said how far a drain has come, and it is `enough`.
    ///
    /// # Errors
    /// `DevError::Stopped`.
    pub async fn drained(&self, enough: impl Fn(&pb::DrainStatus) -> bool) -> Result<pb::DrainStatus, DevError> {
        self.shared.until(|state| state.drain.filter(&enough).map(Ok)).await
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

    /// Another replica takes over with what is stored: the present link ends, and the term rises.
    pub fn fail_over(&self) {
        self.shared.fail_over();
        self.shared.changed();
    }

    /// What is stored at this moment.
    #[must_use]
    pub fn backup(&self) -> Backup {
        Backup::of(&self.shared.state())
    }

    /// What is stored is set back to `backup`, as after the loss of everything since, and a replica goes on with it.
    pub fn restore(&self, backup: Backup) {
        backup.put_back(&mut self.shared.state());
        self.shared.changed();
    }

    /// Sessions that the runner holds and nobody here knows of. They are suspended until somebody adopts or closes them.
    #[must_use]
    pub fn strangers(&self) -> Vec<String> {
        self.shared.state().strangers.keys().cloned().collect()
    }

    /// Takes a session that the runner holds as one of ours. That is decided when a link is made, so the present one ends.
    #[must_use]
    pub fn adopt(&self, session_id: &str) -> Option<Session> {
        let epoch = super::loss::adopt_session(&mut self.shared.state(), session_id)?;
        self.shared.changed();
        let (session_id, shared) = (session_id.to_owned(), Arc::clone(&self.shared));
        Some(Session { session_id, epoch, receipt: pb::Receipt::default(), shared })
    }

    /// A newer placement of the session is made elsewhere: from here on nothing that comes of it counts, and whenever the runner
    /// comes back, it is told to end it at once. That is decided when a link is made, so the present one ends.
    pub fn place_elsewhere(&self, session_id: &str) {
        let mut state = self.shared.state();
        if let Some(record) = state.sessions.get_mut(session_id) {
            record.elsewhere = true;
        }
        (state.link, state.resumed) = (None, false);
        drop(state);
        self.shared.changed();
    }

    /// Calls whose end came from a placement that does not count any more.
    #[must_use]
    pub fn superseded(&self) -> Vec<String> {
        self.shared.state().superseded.clone()
    }

    /// From here on no link is made with such a certificate, and the one that was made with it ends.
    pub fn deny(&self, denied: Denied) {
        super::revocation::deny(&mut self.shared.state(), denied);
        self.shared.changed();
    }

    /// Greetings that were refused, with the reason.
    #[must_use]
    pub fn refused_links(&self) -> Vec<String> {
        self.shared.state().refused_links.clone()
    }

    /// Term of the replica that serves.
    #[must_use]
    pub fn term(&self) -> u64 {
        self.shared.state().term()
    }

    /// Changes how links are kept; the credit takes effect at once.
    pub fn set(&self, settings: LinkSettings) {
        self.shared.set(settings);
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

    /// How many of them were made while the one before was up.
    #[must_use]
    pub fn overlaps(&self) -> u64 {
        self.shared.state().overlaps
    }

    /// Processes of the runner from which a frame came after another had taken their place. What such a frame says is left
    /// out.
    #[must_use]
    pub fn late_runners(&self) -> u64 {
        self.shared.state().late_runners
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
