//! Client of process 1 of one sandbox.
//!
//! Every frame from a sandbox is hostile: sizes are bounded before anything is kept, answers are matched with what was
//! asked, events with what can follow. The first thing that cannot be ends the connection with a [`Violation`], and whoever
//! owns the sandbox kills it. Never blocks on a slow observer and never holds output in memory.

mod calls;
mod decode;
mod encode;
mod violation;

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prost::Message;
use proto::init::v1 as wire;
use tokio::sync::{oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tracing::{debug, warn};

use super::packet::{Descriptors, PacketError, PacketSocket};
use crate::work::{BoxFuture, CallEnd, CallEvent, CallObserver, CancelMode, OutputChunk, PreparedCall, Stream, limits};
use calls::{AddError, CallTable, Ended, LARGEST_RESULT};
pub use violation::Violation;

/// Largest packet of the protocol.
pub const LARGEST_PACKET: usize = 128 * 1024;
const PROTOCOL_MAJOR: u32 = 1;
/// Requests without an answer yet.
const MOST_OUTSTANDING: usize = 512;
/// What process 1 may need beyond limit and grace before a running call counts as overdue.
const OVERDUE_MARGIN: Duration = Duration::from_secs(30);

/// How patient the client is; tests are less patient.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Longest wait for an answer.
    pub answer: Duration,
    /// Longest wait for the end of a call beyond its limit and grace.
    pub overdue_margin: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { answer: Duration::from_secs(30), overdue_margin: OVERDUE_MARGIN }
    }
}

/// Why the connection is of no use any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlEnd {
    /// Process 1 sent what it must not; the sandbox is to be killed.
    #[error("process 1 broke the protocol: {0}")]
    Violated(#[from] Violation),
    /// Process 1 closed the connection, which it does when it ends or when a newer runner has connected.
    #[error("process 1 closed the connection")]
    Closed,
    /// The kernel refused.
    #[error("the connection to process 1 failed: {0}")]
    Failed(String),
}

/// Why a request was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// The connection has ended.
    #[error(transparent)]
    Ended(#[from] ControlEnd),
    /// Process 1 said no.
    #[error("process 1 refused: {message} ({code})")]
    Refused {
        /// From the protocol's closed list.
        code: String,
        /// What failed.
        message: String,
    },
    /// Does not fit into one packet.
    #[error("the request has {size} bytes, at most {LARGEST_PACKET} fit")]
    TooLarge {
        /// Encoded size.
        size: usize,
    },
    /// Too much is going on in this sandbox.
    #[error("too many {what} in one sandbox")]
    Busy {
        /// Of what.
        what: &'static str,
    },
    /// The id is in use.
    #[error("a call with this id exists in the sandbox")]
    Duplicate,
}

/// What the other side said of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Greeting {
    /// The sandbox behind the socket.
    pub sandbox_id: String,
    /// Counts shells started in this sandbox.
    pub shell_generation: u64,
}

/// Connection to process 1. Cheap to clone; closed when the last clone is dropped.
#[derive(Clone)]
pub struct Control {
    connection: Arc<Connection>,
}

struct Connection {
    shared: Arc<Shared>,
    reader: AbortHandle,
}

impl Drop for Connection {
    fn drop(&mut self) {
        // The reader holds the socket too.
        self.reader.abort();
    }
}

struct Shared {
    socket: PacketSocket,
    generation: u64,
    patience: Patience,
    output_root: String,
    next_id: AtomicU64,
    state: Mutex<State>,
    end: watch::Sender<Option<ControlEnd>>,
}

#[derive(Default)]
struct State {
    outstanding: HashMap<u64, Waiting>,
    calls: CallTable,
    shell_generation: u64,
}

/// A request without an answer.
struct Waiting {
    kind: &'static str,
    since: Instant,
    answer: oneshot::Sender<wire::frame::Body>,
}

impl Control {
    /// Connects to the socket at `path` and greets process 1. `output_root` is where its workload sees the output of calls;
    /// empty is the usual place.
    ///
    /// # Errors
    /// [`ControlEnd`] when nobody answers or the answer is not a welcome.
    pub async fn connect(
        path: &Path,
        output_root: &str,
        generation: u64,
        patience: Patience,
    ) -> Result<(Self, Greeting), ControlEnd> {
        let socket = PacketSocket::connect(path, LARGEST_PACKET, Descriptors::Refused).map_err(end_of)?;
        Self::greet(socket, output_root, generation, patience).await
    }

    /// The same over a connected socket.
    ///
    /// # Errors
    /// As [`Control::connect`].
    pub async fn from_connection(
        connection: OwnedFd,
        generation: u64,
        patience: Patience,
    ) -> Result<(Self, Greeting), ControlEnd> {
        let socket = PacketSocket::new(connection, LARGEST_PACKET, Descriptors::Refused).map_err(end_of)?;
        Self::greet(socket, "", generation, patience).await
    }

    async fn greet(
        socket: PacketSocket,
        output_root: &str,
        generation: u64,
        patience: Patience,
    ) -> Result<(Self, Greeting), ControlEnd> {
        let output_root = if output_root.is_empty() { decode::OUTPUT_ROOT } else { output_root };
        let shared = Arc::new(Shared {
            socket,
            generation,
            patience,
            output_root: output_root.trim_end_matches('/').to_owned(),
            next_id: AtomicU64::new(1),
            state: Mutex::default(),
            end: watch::channel(None).0,
        });
        let reader = tokio::spawn(read_loop(Arc::clone(&shared))).abort_handle();
        let control = Self { connection: Arc::new(Connection { shared, reader }) };
        let hello = wire::request::Body::Hello(wire::Hello { major: PROTOCOL_MAJOR });
        match control.request("hello", hello).await {
            Ok(wire::frame::Body::Welcome(welcome)) if welcome.major == PROTOCOL_MAJOR => {
                control.shared().state().shell_generation = welcome.shell_generation;
                let greeting = Greeting { sandbox_id: welcome.sandbox_id, shell_generation: welcome.shell_generation };
                Ok((control, greeting))
            }
            Err(ControlError::Ended(end)) => Err(end),
            Ok(_) | Err(_) => Err(control.violated(Violation::WrongAnswer { request: "hello" })),
        }
    }

    /// Resolves when the connection is of no use any more.
    pub fn ended(&self) -> BoxFuture<'static, ControlEnd> {
        let mut end = self.shared().end.subscribe();
        Box::pin(async move {
            match end.wait_for(Option::is_some).await {
                Ok(reason) => reason.clone().unwrap_or(ControlEnd::Closed),
                Err(_) => ControlEnd::Closed,
            }
        })
    }

    /// Prepares a call; its events go to `observer`. On error it provably never ran, unless the connection has ended.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn start_call(&self, call: &PreparedCall, observer: Arc<dyn CallObserver>) -> Result<(), ControlError> {
        let encoded = encode::call(call);
        let time_limit = call.limits.timeout.map(|timeout| timeout.saturating_add(call.limits.grace));
        self.start(encoded, time_limit, observer).await
    }

    /// Prepares and starts a built-in tool that is not part of the toolset.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn start_tool(
        &self,
        call_id: &str,
        name: &str,
        timeout: Duration,
        observer: Arc<dyn CallObserver>,
    ) -> Result<(), ControlError> {
        let start = wire::StartCall {
            call_id: call_id.to_owned(),
            start_immediately: true,
            timeout_ms: encode::milliseconds(timeout),
            inline_limit_bytes: u32::try_from(limits::INLINE_OUTPUT_BYTES).unwrap_or(u32::MAX),
            spool_head_bytes: limits::SPOOL_HEAD_BYTES,
            work: Some(wire::start_call::Work::Tool(wire::Tool { name: name.to_owned(), input_json: b"{}".to_vec() })),
            ..Default::default()
        };
        self.start(encode::EncodedCall { input: Vec::new(), start }, Some(timeout), observer).await
    }

    async fn start(
        &self,
        encoded: encode::EncodedCall,
        time_limit: Option<Duration>,
        observer: Arc<dyn CallObserver>,
    ) -> Result<(), ControlError> {
        let call_id = encoded.start.call_id.clone();
        self.shared().state().calls.add(&call_id, !encoded.start.start_immediately, time_limit, observer).map_err(
            |error| match error {
                AddError::Duplicate => ControlError::Duplicate,
                AddError::Full => ControlError::Busy { what: "calls" },
            },
        )?;
        let sent = self.send_call(encoded).await;
        if sent.is_err() {
            self.shared().state().calls.remove(&call_id);
        }
        sent
    }

    async fn send_call(&self, encoded: encode::EncodedCall) -> Result<(), ControlError> {
        let call_id = encoded.start.call_id.clone();
        let mut offset = 0;
        let mut chunks = Vec::new();
        for piece in encoded.input.chunks(encode::LARGEST_INPUT_CHUNK) {
            let chunk = wire::InputChunk { call_id: call_id.clone(), offset, data: piece.to_vec() };
            chunks.push(self.shared().ask("input_chunk", wire::request::Body::InputChunk(chunk)).await?);
            offset += piece.len() as u64;
        }
        // All of it is on its way before the first answer: a call whose input did not arrive whole is refused.
        let prepared = self.shared().ask("start_call", wire::request::Body::StartCall(encoded.start)).await?;
        for chunk in chunks {
            match self.shared().answer(chunk).await? {
                wire::frame::Body::Done(_) => {}
                _ => return Err(self.violated(Violation::WrongAnswer { request: "input_chunk" }).into()),
            }
        }
        match self.shared().answer(prepared).await? {
            wire::frame::Body::CallPrepared(prepared) if prepared.call_id == call_id => Ok(()),
            _ => Err(self.violated(Violation::WrongAnswer { request: "start_call" }).into()),
        }
    }

    /// Opens the gate of a prepared call.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn go(&self, call_id: &str) -> Result<(), ControlError> {
        self.shared().state().calls.release(call_id);
        self.request_done("go", wire::request::Body::Go(wire::Go { call_id: call_id.to_owned() })).await
    }

    /// Drops a prepared call.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn abort(&self, call_id: &str) -> Result<(), ControlError> {
        let abort = wire::Abort { call_id: call_id.to_owned() };
        self.request_done("abort", wire::request::Body::Abort(abort)).await?;
        self.shared().state().calls.remove(call_id);
        Ok(())
    }

    /// Ends a running call; the outcome comes through its observer.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn cancel(&self, call_id: &str, mode: CancelMode) -> Result<(), ControlError> {
        let cancel = wire::Cancel { call_id: call_id.to_owned(), mode: encode::cancel_mode(mode) };
        self.request_done("cancel", wire::request::Body::Cancel(cancel)).await
    }

    /// Writes to standard input. Returns the bytes accepted so far.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn stdin(&self, call_id: &str, offset: u64, data: Vec<u8>, eof: bool) -> Result<u64, ControlError> {
        let highest = offset.saturating_add(data.len() as u64);
        let stdin = wire::Stdin { call_id: call_id.to_owned(), offset, data, eof };
        match self.request("stdin", wire::request::Body::Stdin(stdin)).await? {
            wire::frame::Body::StdinAccepted(answer) if answer.accepted <= highest => Ok(answer.accepted),
            wire::frame::Body::StdinAccepted(answer) => {
                Err(self.violated(Violation::impossible("stdin_accepted.accepted", answer.accepted)).into())
            }
            _ => Err(self.violated(Violation::WrongAnswer { request: "stdin" }).into()),
        }
    }

    /// New size of the terminal of a running call.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn resize(&self, call_id: &str, columns: u16, rows: u16) -> Result<(), ControlError> {
        let resize = wire::Resize { call_id: call_id.to_owned(), columns: u32::from(columns), rows: u32::from(rows) };
        self.request_done("resize", wire::request::Body::Resize(resize)).await
    }

    /// Reads retained output.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn read_output(
        &self,
        call_id: &str,
        stream: Stream,
        offset: u64,
        max_bytes: usize,
    ) -> Result<OutputChunk, ControlError> {
        self.shared().read_output(call_id, stream, offset, max_bytes).await
    }

    /// The result is stored; process 1 may forget the call.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn acknowledge(&self, call_id: &str) -> Result<(), ControlError> {
        let acknowledge = wire::AcknowledgeExit { call_id: call_id.to_owned() };
        self.request_done("acknowledge_exit", wire::request::Body::AcknowledgeExit(acknowledge)).await?;
        self.shared().state().calls.remove(call_id);
        Ok(())
    }

    /// Moves the moment at which process 1 ends the sandbox by itself; 0 disarms.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn deadline(&self, boottime_ns: u64) -> Result<(), ControlError> {
        self.request_done("deadline", wire::request::Body::Deadline(wire::Deadline { boottime_ns })).await
    }

    /// Asks process 1 to end the sandbox gracefully.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn shutdown(&self, grace: Duration) -> Result<(), ControlError> {
        let shutdown = wire::Shutdown { grace_ms: encode::milliseconds(grace) };
        self.request_done("shutdown", wire::request::Body::Shutdown(shutdown)).await
    }

    async fn request_done(&self, kind: &'static str, body: wire::request::Body) -> Result<(), ControlError> {
        match self.request(kind, body).await? {
            wire::frame::Body::Done(_) => Ok(()),
            _ => Err(self.violated(Violation::WrongAnswer { request: kind }).into()),
        }
    }

    async fn request(&self, kind: &'static str, body: wire::request::Body) -> Result<wire::frame::Body, ControlError> {
        self.shared().request(kind, body).await
    }

    fn violated(&self, violation: Violation) -> ControlEnd {
        self.shared().finish(violation.into())
    }

    fn shared(&self) -> &Arc<Shared> {
        &self.connection.shared
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every change under the lock is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn request(&self, kind: &'static str, body: wire::request::Body) -> Result<wire::frame::Body, ControlError> {
        let answer = self.ask(kind, body).await?;
        self.answer(answer).await
    }

    /// Sends a request; its answer is another matter.
    async fn ask(
        &self,
        kind: &'static str,
        body: wire::request::Body,
    ) -> Result<oneshot::Receiver<wire::frame::Body>, ControlError> {
        let request_id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let packet = wire::Request { request_id, generation: self.generation, body: Some(body) }.encode_to_vec();
        if packet.len() > LARGEST_PACKET {
            return Err(ControlError::TooLarge { size: packet.len() });
        }
        let answer = self.expect_answer(request_id, kind)?;
        self.send(&packet).await?;
        Ok(answer)
    }

    /// Waits for an answer. Silence is noticed by the reader, which ends the connection and with it this wait.
    async fn answer(&self, answer: oneshot::Receiver<wire::frame::Body>) -> Result<wire::frame::Body, ControlError> {
        match answer.await {
            Err(_) => Err(self.end.borrow().clone().unwrap_or(ControlEnd::Closed).into()),
            Ok(wire::frame::Body::Failure(failure)) => Err(refusal(failure)),
            Ok(body) => Ok(body),
        }
    }

    async fn send(&self, packet: &[u8]) -> Result<(), ControlEnd> {
        match self.socket.send_now(packet) {
            Err(PacketError::Io { source, .. }) if source.kind() == std::io::ErrorKind::WouldBlock => {}
            outcome => return outcome.map_err(|error| self.finish(end_of(error))),
        }
        let mut end = self.end.subscribe();
        tokio::select! {
            sent = self.socket.send(packet) => sent.map_err(|error| self.finish(end_of(error))),
            _ = end.wait_for(Option::is_some) => Err(self.end.borrow().clone().unwrap_or(ControlEnd::Closed)),
        }
    }

    /// When the oldest request has waited for too long; the connection is at its end if that is now.
    fn next_silence(&self) -> Result<Instant, Violation> {
        let state = self.state();
        let now = Instant::now();
        let patience = self.patience.answer;
        match state.outstanding.values().min_by_key(|waiting| waiting.since) {
            Some(oldest) if oldest.since + patience <= now => {
                Err(Violation::Silence { request: oldest.kind, after: patience })
            }
            Some(oldest) => Ok(oldest.since + patience),
            None => Ok(now + patience),
        }
    }

    fn expect_answer(
        &self,
        request_id: u64,
        kind: &'static str,
    ) -> Result<oneshot::Receiver<wire::frame::Body>, ControlError> {
        let mut state = self.state();
        // Looked at under the lock that `finish` takes, so no request can slip in behind it and wait for ever.
        if let Some(end) = self.end.borrow().clone() {
            return Err(end.into());
        }
        if state.outstanding.len() >= MOST_OUTSTANDING {
            return Err(ControlError::Busy { what: "requests" });
        }
        let (sender, answer) = oneshot::channel();
        state.outstanding.insert(request_id, Waiting { kind, since: Instant::now(), answer: sender });
        Ok(answer)
    }

    async fn read_output(
        &self,
        call_id: &str,
        stream: Stream,
        offset: u64,
        max_bytes: usize,
    ) -> Result<OutputChunk, ControlError> {
        let at_most = max_bytes.clamp(1, limits::CHUNK_BYTES);
        let read = wire::ReadOutput {
            call_id: call_id.to_owned(),
            stream: encode::stream(stream),
            offset,
            max_bytes: u32::try_from(at_most).unwrap_or(u32::MAX),
        };
        match self.request("read_output", wire::request::Body::ReadOutput(read)).await? {
            wire::frame::Body::OutputData(data) if data.call_id == call_id => {
                decode::output(data, stream, offset, at_most).map_err(|violation| self.finish(violation.into()).into())
            }
            _ => Err(self.finish(Violation::WrongAnswer { request: "read_output" }.into()).into()),
        }
    }

    /// Ends the connection for everybody who waits. The first reason stays.
    fn finish(&self, end: ControlEnd) -> ControlEnd {
        let mut state = self.state();
        let first = self.end.borrow().clone();
        if let Some(first) = first {
            return first;
        }
        self.end.send_replace(Some(end.clone()));
        state.outstanding.clear();
        end
    }

    fn deliver(self: &Arc<Self>, bytes: &[u8]) -> Result<(), Violation> {
        let frame = wire::Frame::decode(bytes).map_err(|error| Violation::Undecodable(shorten(&error.to_string())))?;
        if frame.generation != self.generation {
            // Written for our predecessor, which is no fault; written for a successor, which cannot be.
            return if frame.generation < self.generation {
                Ok(())
            } else {
                Err(Violation::Malformed("for a later runner"))
            };
        }
        let body = frame.body.ok_or(Violation::Malformed("without content"))?;
        if frame.request_id == 0 {
            return self.event(body);
        }
        let waiting = self.state().outstanding.remove(&frame.request_id);
        let waiting = waiting.ok_or(Violation::UnknownRequest(frame.request_id))?;
        let body = match body {
            // A call that was over at once: its end says that it was prepared.
            wire::frame::Body::CallFinished(finished) => {
                let prepared = wire::CallPrepared { call_id: finished.call_id.clone() };
                self.event(wire::frame::Body::CallFinished(finished))?;
                wire::frame::Body::CallPrepared(prepared)
            }
            body => body,
        };
        // Who asked may have given up meanwhile.
        drop(waiting.answer.send(body));
        Ok(())
    }

    fn event(self: &Arc<Self>, body: wire::frame::Body) -> Result<(), Violation> {
        match body {
            wire::frame::Body::CallStarted(started) => {
                let (observer, time_limit, shell_generation) = {
                    let mut state = self.state();
                    let (observer, time_limit) = state.calls.started(&started.call_id)?;
                    (observer, time_limit, state.shell_generation)
                };
                if let Some(limit) = time_limit {
                    self.watch_overdue(started.call_id, limit);
                }
                observer.observe(CallEvent::Started { boottime_ns: started.boottime_ns, shell_generation });
            }
            wire::frame::Body::OutputAdvanced(advanced) => {
                let lengths = decode::lengths(&advanced.streams)?;
                let (observer, lengths) = self.state().calls.advanced(&advanced.call_id, lengths)?;
                observer.observe(CallEvent::OutputAdvanced(lengths));
            }
            wire::frame::Body::CallFinished(finished) => {
                let call_id = finished.call_id.clone();
                let end = decode::call_end(finished, &self.output_root)?;
                let (Ended { observer, unannounced, ahead }, shell_generation) = {
                    let mut state = self.state();
                    state.shell_generation = end.shell_generation.max(state.shell_generation);
                    (state.calls.finished(&call_id, &end)?, state.shell_generation)
                };
                if unannounced {
                    observer
                        .observe(CallEvent::Started { boottime_ns: started_before(end.duration), shell_generation });
                }
                self.report_end(call_id, end, ahead, observer);
            }
            wire::frame::Body::OutputData(data) if data.stream == i32::from(wire::Stream::Result) => {
                self.state().calls.sent_ahead(&data.call_id, data.offset, &data.data)?;
            }
            _ => return Err(Violation::Malformed("is an answer without a request")),
        }
        Ok(())
    }

    /// Tells the observer; the result of a tool that did not travel along is fetched first.
    fn report_end(
        self: &Arc<Self>,
        call_id: String,
        mut end: CallEnd,
        ahead: Vec<u8>,
        observer: Arc<dyn CallObserver>,
    ) {
        let result = end.streams.iter().find(|summary| summary.stream == Stream::Result);
        let fetch = match result {
            Some(summary) => match &summary.inline {
                Some(bytes) => {
                    end.result = decode::tool_result(bytes);
                    None
                }
                None if !ahead.is_empty() && summary.total_bytes == ahead.len() as u64 => {
                    end.result = decode::tool_result(&ahead);
                    None
                }
                None if summary.total_bytes <= LARGEST_RESULT as u64 => Some(summary.total_bytes),
                None => None,
            },
            None => None,
        };
        let Some(total) = fetch else {
            observer.observe(CallEvent::Finished(Box::new(end)));
            return;
        };
        let shared = Arc::downgrade(self);
        tokio::spawn(async move {
            if let Some(shared) = shared.upgrade() {
                end.result = fetch_result(&shared, &call_id, total).await.and_then(|bytes| decode::tool_result(&bytes));
            }
            observer.observe(CallEvent::Finished(Box::new(end)));
        });
    }

    /// Process 1 enforces time limits; that it does so is not taken on trust.
    fn watch_overdue(self: &Arc<Self>, call_id: String, limit: Duration) {
        let shared = Arc::downgrade(self);
        let wait = limit.saturating_add(self.patience.overdue_margin);
        let mut end = self.end.subscribe();
        tokio::spawn(async move {
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                _ = end.wait_for(Option::is_some) => return,
            }
            if let Some(shared) = shared.upgrade()
                && shared.state().calls.is_running(&call_id)
            {
                shared.finish(Violation::Overdue.into());
            }
        });
    }
}

async fn read_loop(shared: Arc<Shared>) {
    let mut buffer = shared.socket.buffer();
    let mut end = shared.end.subscribe();
    // One clock for all requests: setting one for each would cost more than the request.
    let silence = tokio::time::sleep(shared.patience.answer);
    tokio::pin!(silence);
    let reason = loop {
        let packet = tokio::select! {
            packet = shared.socket.receive(&mut buffer) => packet,
            _ = end.wait_for(Option::is_some) => return,
            () = &mut silence => {
                match shared.next_silence() {
                    Ok(next) => silence.as_mut().reset(next),
                    Err(violation) => break violation.into(),
                }
                continue;
            }
        };
        match packet {
            Err(error) => break end_of(error),
            Ok(packet) => {
                if let Err(violation) = shared.deliver(packet.bytes) {
                    break violation.into();
                }
            }
        }
    };
    match &reason {
        ControlEnd::Closed => debug!("process 1 closed its connection"),
        _ => warn!(reason = %reason, "connection to process 1 was given up"),
    }
    shared.finish(reason);
}

async fn fetch_result(shared: &Shared, call_id: &str, total: u64) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < total {
        let chunk = shared
            .read_output(call_id, Stream::Result, bytes.len() as u64, limits::CHUNK_BYTES)
            .await
            .inspect_err(|error| debug!(%error, "result of a tool could not be read"))
            .ok()?;
        if chunk.bytes.is_empty() || chunk.offset != bytes.len() as u64 {
            return None;
        }
        bytes.extend_from_slice(&chunk.bytes);
    }
    (bytes.len() as u64 == total).then_some(bytes)
}

/// CLOCK_BOOTTIME that long ago, for a call whose start was not announced because its end came first.
fn started_before(duration: Duration) -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default();
    u64::try_from(now.saturating_sub(duration).as_nanos()).unwrap_or(u64::MAX)
}

fn refusal(failure: wire::Failure) -> ControlError {
    const CODES: [&str; 7] =
        ["CALL_UNKNOWN", "CALL_ID_REUSED", "CALL_BUSY", "INVALID_FIELD", "TOO_LARGE", "NOT_SUPPORTED", "INTERNAL"];
    let code = CODES.iter().find(|code| **code == failure.code).map_or("INTERNAL", |code| *code);
    ControlError::Refused { code: code.to_owned(), message: shorten(&failure.message) }
}

fn end_of(error: PacketError) -> ControlEnd {
    match error {
        PacketError::Closed => ControlEnd::Closed,
        PacketError::TooLarge { limit } => Violation::Oversize(limit).into(),
        PacketError::UnexpectedDescriptors => Violation::Descriptors.into(),
        PacketError::Io { step, source } => ControlEnd::Failed(format!("{step}: {source}")),
    }
}

/// Text of a sandbox, harmless for a log or a terminal.
fn shorten(text: &str) -> String {
    text.chars().take(500).filter(|character| !character.is_control()).collect()
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
