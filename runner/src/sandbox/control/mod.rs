//! Client of process 1 of one sandbox.
//!
//! Every frame from a sandbox is hostile: sizes are bounded before anything is kept, answers are matched with what was
//! asked, events with what can follow. The first thing that cannot be ends the connection with a [`Violation`], and whoever
//! owns the sandbox kills it. Never blocks on a slow observer and never holds output in memory.

mod attach;
mod calls;
mod decode;
mod encode;
mod exchange;
mod reader;
mod snapshot;
mod violation;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proto::init::v1 as wire;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::AbortHandle;

use super::packet::{Descriptors, PacketSocket};
use crate::work::{BoxFuture, CallObserver, CancelMode, OutputChunk, PreparedCall, Slot, Stream, limits};
pub use attach::Resumed;
use calls::{AddError, CallTable};
use exchange::{Shared, State, end_of};
pub use violation::Violation;

/// Largest packet of the protocol.
pub const LARGEST_PACKET: usize = 128 * 1024;
const PROTOCOL_MAJOR: u32 = 1;
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

impl From<AddError> for ControlError {
    fn from(error: AddError) -> Self {
        match error {
            AddError::Duplicate => Self::Duplicate,
            AddError::Full => Self::Busy { what: "calls" },
        }
    }
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
        // The reader holds the socket too, and so does whoever still waits for an answer.
        self.reader.abort();
        self.shared.finish(ControlEnd::Closed);
    }
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
        Self::greet(socket, output_root, generation, patience, CallTable::default()).await
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
        Self::greet(socket, "", generation, patience, CallTable::default()).await
    }

    async fn greet(
        socket: PacketSocket,
        output_root: &str,
        generation: u64,
        patience: Patience,
        calls: CallTable,
    ) -> Result<(Self, Greeting), ControlEnd> {
        let output_root = if output_root.is_empty() { decode::OUTPUT_ROOT } else { output_root };
        let shared = Arc::new(Shared {
            socket,
            generation,
            patience,
            output_root: output_root.trim_end_matches('/').to_owned(),
            next_id: AtomicU64::new(1),
            turn: tokio::sync::Mutex::default(),
            places: Arc::new(Semaphore::new(exchange::MOST_OUTSTANDING)),
            of_callers: Shared::places_of_callers(),
            state: Mutex::new(State { calls, ..State::default() }),
            end: watch::channel(None).0,
            stranger_gone: Notify::new(),
            ending_strangers: tokio::sync::Mutex::default(),
        });
        let reader = tokio::spawn(reader::read_loop(Arc::clone(&shared))).abort_handle();
        let control = Self { connection: Arc::new(Connection { shared, reader }) };
        let hello = wire::request::Body::Hello(wire::Hello { major: PROTOCOL_MAJOR });
        match control.request("hello", hello).await {
            Ok(wire::frame::Body::Welcome(welcome)) if welcome.major == PROTOCOL_MAJOR => {
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
        self.shared()
            .state()
            .calls
            .add(&call_id, !encoded.start.start_immediately, time_limit, observer)
            .map_err(ControlError::from)?;
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
        match self.shared().request_of_caller("stdin", wire::request::Body::Stdin(stdin)).await? {
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
        match self.shared().request_of_caller("resize", wire::request::Body::Resize(resize)).await? {
            wire::frame::Body::Done(_) => Ok(()),
            _ => Err(self.violated(Violation::WrongAnswer { request: "resize" }).into()),
        }
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

    /// Ends every process of the workload, also where it stands still; the files stay. Returns when nothing of it is there.
    ///
    /// # Errors
    /// [`ControlError`]; after a refusal some of it may be gone.
    pub async fn stop_work(&self) -> Result<(), ControlError> {
        self.request_done("stop_work", wire::request::Body::StopWork(wire::StopWork {})).await
    }

    /// The processes that calls have left behind, by call.
    ///
    /// # Errors
    /// [`ControlError`].
    pub async fn slots(&self) -> Result<Vec<Slot>, ControlError> {
        // Of another kind than the question of who takes a sandbox over: no call is settled by the answer.
        let kind = "slots";
        let answer = match self.request(kind, wire::request::Body::Snapshot(wire::Snapshot {})).await? {
            wire::frame::Body::Snapshot(reply) => snapshot::slots(&reply),
            _ => Err(Violation::WrongAnswer { request: kind }),
        };
        Ok(answer.map_err(|violation| self.violated(violation))?)
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

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
