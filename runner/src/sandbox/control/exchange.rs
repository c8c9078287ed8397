//! Requests to process 1 and their answers: one packet each way, matched by number, bounded in number and in patience.
//!
//! Requests leave in the order in which they were first polled, also when process 1 does not read for a while or owes many
//! answers: then they wait for their turn. So nothing overtakes what was said before it. What callers can send without end, input and
//! sizes of terminals, is refused before it has a turn; everything else is bounded by the calls of the sandbox.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prost::Message;
use proto::init::v1 as wire;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::task::unconstrained;
use tokio::time::Instant;

use super::calls::CallTable;
use super::snapshot::Settled;
use super::violation::Violation;
use super::{ControlEnd, ControlError, LARGEST_PACKET, Patience, decode, encode};
use crate::sandbox::packet::{PacketError, PacketSocket};
use crate::work::{OutputChunk, Stream, limits};

/// Requests without an answer yet; the next one waits for its turn.
pub(super) const MOST_OUTSTANDING: usize = 512;
/// Input and sizes of terminals that wait for their turn or their answer. Fewer than the places, so that they never keep the steps of
/// a call from having one.
const MOST_OF_CALLERS: usize = 256;

/// What the askers and the reading task share.
pub(super) struct Shared {
    pub(super) socket: PacketSocket,
    pub(super) generation: u64,
    pub(super) patience: Patience,
    pub(super) output_root: String,
    pub(super) next_id: AtomicU64,
    /// Held by whoever sends next. It is handed on in the order of asking.
    pub(super) turn: tokio::sync::Mutex<()>,
    /// One for each request without an answer.
    pub(super) places: Arc<Semaphore>,
    pub(super) of_callers: Arc<Semaphore>,
    pub(super) state: Mutex<State>,
    pub(super) end: watch::Sender<Option<ControlEnd>>,
    /// Wakes whoever waits for the end of calls that nobody knows.
    pub(super) stranger_gone: Notify,
    /// Held while they are ended.
    pub(super) ending_strangers: tokio::sync::Mutex<()>,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) outstanding: HashMap<u64, Waiting>,
    pub(super) calls: CallTable,
    pub(super) shell_generation: u64,
    /// What was found in a sandbox that is taken over.
    pub(super) settled: Option<Settled>,
}

/// A request without an answer.
pub(super) struct Waiting {
    pub(super) kind: &'static str,
    pub(super) since: Instant,
    pub(super) answer: oneshot::Sender<wire::frame::Body>,
    /// Free again with the answer, or with the end of the connection.
    pub(super) _place: OwnedSemaphorePermit,
}

impl Shared {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // Every change under the lock is complete before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) async fn request(
        &self,
        kind: &'static str,
        body: wire::request::Body,
    ) -> Result<wire::frame::Body, ControlError> {
        let answer = self.ask(kind, body).await?;
        self.answer(answer).await
    }

    /// The same for what a caller can ask for as often as it likes: refused while too many of these wait.
    pub(super) async fn request_of_caller(
        &self,
        kind: &'static str,
        body: wire::request::Body,
    ) -> Result<wire::frame::Body, ControlError> {
        let _held = self.of_callers.try_acquire().map_err(|_| ControlError::Busy { what: "requests" })?;
        self.request(kind, body).await
    }

    /// Sends a request in its turn; its answer is another matter.
    pub(super) async fn ask(
        &self,
        kind: &'static str,
        body: wire::request::Body,
    ) -> Result<oneshot::Receiver<wire::frame::Body>, ControlError> {
        let request_id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let packet = wire::Request { request_id, generation: self.generation, body: Some(body) }.encode_to_vec();
        if packet.len() > LARGEST_PACKET {
            return Err(ControlError::TooLarge { size: packet.len() });
        }
        // Without the budget of the task, which would have whoever has used it up wait outside of the queue.
        let _turn = unconstrained(self.turn.lock()).await;
        // The semaphore is never closed: with the connection every place becomes free, and what has ended is seen below.
        let place = unconstrained(Arc::clone(&self.places).acquire_owned()).await.map_err(|_| ControlEnd::Closed)?;
        let answer = self.expect_answer(request_id, kind, place)?;
        self.send(&packet).await?;
        Ok(answer)
    }

    /// Waits for an answer. Silence is noticed by the reader, which ends the connection and with it this wait.
    pub(super) async fn answer(
        &self,
        answer: oneshot::Receiver<wire::frame::Body>,
    ) -> Result<wire::frame::Body, ControlError> {
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
    pub(super) fn next_silence(&self) -> Result<Instant, Violation> {
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
        place: OwnedSemaphorePermit,
    ) -> Result<oneshot::Receiver<wire::frame::Body>, ControlError> {
        let mut state = self.state();
        // Looked at under the lock that `finish` takes, so no request can slip in behind it and wait for ever.
        if let Some(end) = self.end.borrow().clone() {
            return Err(end.into());
        }
        let (sender, answer) = oneshot::channel();
        state.outstanding.insert(request_id, Waiting { kind, since: Instant::now(), answer: sender, _place: place });
        Ok(answer)
    }

    /// Places for requests of callers.
    pub(super) fn places_of_callers() -> Arc<Semaphore> {
        Arc::new(Semaphore::new(MOST_OF_CALLERS))
    }

    pub(super) async fn read_output(
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
    pub(super) fn finish(&self, end: ControlEnd) -> ControlEnd {
        let mut state = self.state();
        let first = self.end.borrow().clone();
        if let Some(first) = first {
            return first;
        }
        self.end.send_replace(Some(end.clone()));
        state.outstanding.clear();
        end
    }
}

fn refusal(failure: wire::Failure) -> ControlError {
    const CODES: [&str; 7] =
        ["CALL_UNKNOWN", "CALL_ID_REUSED", "CALL_BUSY", "INVALID_FIELD", "TOO_LARGE", "NOT_SUPPORTED", "INTERNAL"];
    let code = CODES.iter().find(|code| **code == failure.code).map_or("INTERNAL", |code| *code);
    ControlError::Refused { code: code.to_owned(), message: shorten(&failure.message) }
}

pub(super) fn end_of(error: PacketError) -> ControlEnd {
    match error {
        PacketError::Closed => ControlEnd::Closed,
        PacketError::TooLarge { limit } => Violation::Oversize(limit).into(),
        PacketError::UnexpectedDescriptors => Violation::Descriptors.into(),
        PacketError::Io { step, source } => ControlEnd::Failed(format!("{step}: {source}")),
    }
}

/// Text of a sandbox, harmless for a log or a terminal.
pub(super) fn shorten(text: &str) -> String {
    text.chars().take(500).filter(|character| !character.is_control()).collect()
}
