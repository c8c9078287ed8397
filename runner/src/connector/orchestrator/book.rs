//! What this connector knows about sessions and about the output of calls, across links. Pure.
//!
//! It answers three questions: which piece of output is due next under the credit there is, what to tell a new link
//! about the state of things, and when a call is delivered in full, so that it may be forgotten everywhere.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use proto::runner::v1 as pb;

use super::encode::stream_to_wire;
use crate::work::{CallId, CallPhase, RequestDigest, SessionId, Stream, StreamLengths, StreamSummary, limits};

/// A piece this large is sent at once; a smaller one waits for company.
const FLUSH_BYTES: u64 = 32 * 1024;
/// How long a small piece waits at most.
pub(super) const FLUSH_AFTER: Duration = Duration::from_millis(25);

/// Everything that is known.
#[derive(Debug, Default)]
pub(super) struct Book {
    sessions: BTreeMap<SessionId, BookSession>,
    calls: BTreeMap<CallId, BookCall>,
    /// Calls with output to send; each is in here at most once.
    due: VecDeque<CallId>,
    /// Credit and use of the present link.
    link_max: u64,
    link_sent: u64,
    call_max: Option<u64>,
    /// Largest piece the present link takes; 0 until it says so.
    chunk: usize,
}

#[derive(Debug)]
struct BookSession {
    epoch: u64,
    ready: bool,
}

/// One call.
#[derive(Debug)]
struct BookCall {
    session_id: SessionId,
    digest: RequestDigest,
    quiet: bool,
    accepted: bool,
    phase: CallPhase,
    lengths: StreamLengths,
    streams: [BookStream; 4],
    /// The acknowledged end of the call needs nothing more than its output.
    result_acknowledged: bool,
    credit: Option<u64>,
    reading: bool,
    last_sent: Option<Duration>,
}

#[derive(Debug, Clone, Copy, Default)]
struct BookStream {
    sent: u64,
    acknowledged: u64,
    /// Length at the end of the call; `None` while it runs.
    total: Option<u64>,
    /// Its bytes travel with the end of the call.
    inline: bool,
    /// The piece that reaches the end was sent on this link.
    end_sent: bool,
}

impl BookStream {
    fn is_delivered(&self) -> bool {
        self.inline || self.total.is_some_and(|total| self.acknowledged >= total)
    }
}

/// A piece of output to read and send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) call_id: CallId,
    pub(super) stream: Stream,
    pub(super) offset: u64,
    pub(super) max_bytes: usize,
}

/// What can be done about output now.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Read this piece.
    Read(Piece),
    /// Something small waits until then (on the caller's clock).
    Wait(Duration),
    /// Nothing to do until something is reported or credit arrives.
    Idle,
}

impl Book {
    pub(super) fn session_opened(&mut self, session_id: SessionId, epoch: u64) {
        self.sessions.insert(session_id, BookSession { epoch, ready: true });
    }

    pub(super) fn session_restored(&mut self, session_id: SessionId, epoch: u64, ready: bool) {
        self.sessions.insert(session_id, BookSession { epoch, ready });
    }

    pub(super) fn call_restored(
        &mut self,
        call_id: CallId,
        session_id: SessionId,
        digest: RequestDigest,
        phase: CallPhase,
    ) {
        self.call_requested(call_id.clone(), session_id, digest, false);
        if let Some(call) = self.calls.get_mut(&call_id) {
            (call.accepted, call.phase) = (true, phase);
        }
    }

    pub(super) fn session_requested(&mut self, session_id: SessionId, epoch: u64) {
        self.sessions.entry(session_id).or_insert(BookSession { epoch, ready: false });
    }

    pub(super) fn session_ended(&mut self, session_id: &SessionId) {
        self.sessions.remove(session_id);
    }

    /// A refused open leaves a session that was open before untouched.
    pub(super) fn open_refused(&mut self, session_id: &SessionId) {
        if self.sessions.get(session_id).is_some_and(|session| !session.ready) {
            self.sessions.remove(session_id);
        }
    }

    pub(super) fn call_requested(
        &mut self,
        call_id: CallId,
        session_id: SessionId,
        digest: RequestDigest,
        quiet: bool,
    ) {
        self.calls.entry(call_id).or_insert(BookCall {
            session_id,
            digest,
            quiet,
            accepted: false,
            phase: CallPhase::Accepted,
            lengths: StreamLengths::default(),
            streams: [BookStream::default(); 4],
            result_acknowledged: false,
            credit: None,
            reading: false,
            last_sent: None,
        });
    }

    /// A refused request leaves a call that was accepted before untouched.
    pub(super) fn call_refused(&mut self, call_id: &CallId) {
        if self.calls.get(call_id).is_some_and(|call| !call.accepted) {
            self.calls.remove(call_id);
        }
    }

    pub(super) fn call_accepted(&mut self, call_id: &CallId) {
        if let Some(call) = self.calls.get_mut(call_id) {
            call.accepted = true;
        }
    }

    pub(super) fn call_started(&mut self, call_id: &CallId) {
        if let Some(call) = self.calls.get_mut(call_id) {
            call.phase = CallPhase::Started;
        }
    }

    pub(super) fn advanced(&mut self, call_id: &CallId, lengths: &StreamLengths) {
        if let Some(call) = self.calls.get_mut(call_id) {
            call.lengths.merge(lengths);
            self.mark_due(call_id);
        }
    }

    pub(super) fn finished(&mut self, call_id: &CallId, summaries: &[StreamSummary], content_in_stream: bool) {
        let Some(call) = self.calls.get_mut(call_id) else { return };
        call.phase = CallPhase::Finished;
        for stream in Stream::ALL {
            let state = &mut call.streams[stream.index()];
            let summary = summaries.iter().find(|summary| summary.stream == stream);
            // An end that says nothing of its output, because its sandbox is gone, leaves what was reported as a hole.
            let total = summary.map_or(call.lengths.get(stream), |summary| summary.total_bytes);
            call.lengths.advance(stream, total);
            state.total = Some(total);
            // A result that was decoded travels as content, whatever its size in the stream was.
            let carried = stream == Stream::Result && !content_in_stream;
            state.inline = total == 0 || carried || summary.is_some_and(|summary| summary.inline.is_some());
        }
        self.mark_due(call_id);
    }

    /// The end of the call is stored elsewhere. True: so is its output, and the call may be forgotten.
    pub(super) fn result_acknowledged(&mut self, call_id: &CallId) -> bool {
        if let Some(call) = self.calls.get_mut(call_id) {
            call.result_acknowledged = true;
        }
        self.forget_if_delivered(call_id)
    }

    /// Output up to `through` is stored elsewhere. True: the call may be forgotten.
    pub(super) fn output_acknowledged(&mut self, call_id: &CallId, stream: Stream, through: u64) -> bool {
        if let Some(call) = self.calls.get_mut(call_id) {
            let state = &mut call.streams[stream.index()];
            // Nobody can have stored what was never sent.
            state.acknowledged = state.acknowledged.max(through.min(state.sent));
        }
        self.forget_if_delivered(call_id)
    }

    fn forget_if_delivered(&mut self, call_id: &CallId) -> bool {
        let delivered = self
            .calls
            .get(call_id)
            .is_some_and(|call| call.result_acknowledged && call.streams.iter().all(BookStream::is_delivered));
        if delivered {
            self.calls.remove(call_id);
        }
        delivered
    }

    /// The orchestrator has the result already: the call may be forgotten with its output.
    pub(super) fn forget(&mut self, call_id: &CallId) -> bool {
        let finished = self.calls.get(call_id).is_some_and(|call| call.phase == CallPhase::Finished);
        if finished {
            self.calls.remove(call_id);
        }
        finished
    }

    /// A new link: output is sent again from what is acknowledged.
    pub(super) fn link_opened(&mut self, link_credit: u64, call_credit: Option<u64>) {
        (self.link_max, self.link_sent, self.call_max) = (link_credit, 0, call_credit);
        // Whose turn it was keeps it: where links are short, those at the end of a fixed order would never get one.
        let mut order: Vec<_> = self.due.drain(..).filter(|call_id| self.calls.contains_key(call_id)).collect();
        let turn: BTreeSet<_> = order.iter().cloned().collect();
        order.extend(self.calls.keys().filter(|call_id| !turn.contains(*call_id)).cloned());
        for call_id in order {
            if let Some(call) = self.calls.get_mut(&call_id) {
                (call.reading, call.credit, call.last_sent) = (false, None, None);
                for stream in &mut call.streams {
                    (stream.sent, stream.end_sent) = (stream.acknowledged, false);
                }
            }
            self.mark_due(&call_id);
        }
    }

    /// Largest piece the present link takes; 0 means the default.
    pub(super) fn max_chunk(&mut self, bytes: u32) {
        self.chunk = usize::try_from(bytes).unwrap_or(limits::CHUNK_BYTES);
    }

    /// A new link knows output up to here. True: the call may be forgotten; the acknowledgement that said so before was
    /// lost with its link.
    pub(super) fn stored_through(&mut self, call_id: &CallId, stream: Stream, through: u64) -> bool {
        if let Some(call) = self.calls.get_mut(call_id) {
            let known = call.lengths.get(stream);
            let state = &mut call.streams[stream.index()];
            state.acknowledged = state.acknowledged.max(through.min(known));
            state.sent = state.sent.max(state.acknowledged);
        }
        self.forget_if_delivered(call_id)
    }

    pub(super) fn credit(&mut self, link_max: u64, calls: &[(CallId, u64)]) {
        self.link_max = self.link_max.max(link_max);
        for (call_id, max) in calls {
            if let Some(call) = self.calls.get_mut(call_id) {
                call.credit = Some(call.credit.unwrap_or(0).max(*max));
            }
        }
    }

    fn mark_due(&mut self, call_id: &CallId) {
        if !self.due.contains(call_id) && self.calls.get(call_id).is_some_and(|call| call.next_stream().is_some()) {
            self.due.push_back(call_id.clone());
        }
    }

    /// The next piece under credit, in turn of calls. `now` is any clock that does not run backwards.
    pub(super) fn next_piece(&mut self, now: Duration) -> Next {
        let mut wait: Option<Duration> = None;
        for _ in 0..self.due.len() {
            let Some(call_id) = self.due.pop_front() else { break };
            let Some(call) = self.calls.get_mut(&call_id) else { continue };
            let Some(stream) = call.next_stream() else { continue };
            self.due.push_back(call_id.clone());
            if call.reading {
                continue;
            }
            let offset = call.streams[stream.index()].sent;
            let available = call.lengths.get(stream) - offset;
            let sent: u64 = call.streams.iter().map(|state| state.sent).sum();
            let call_credit = call.credit.or(self.call_max).map_or(u64::MAX, |max| max.saturating_sub(sent));
            let credit = call_credit.min(self.link_max.saturating_sub(self.link_sent));
            // The mark of an end costs nothing, and it is all that is left of a stream that was read to its end.
            if credit == 0 && available > 0 {
                continue;
            }
            let ripe = call.last_sent.map(|last| last.saturating_add(FLUSH_AFTER)).filter(|ripe| now < *ripe);
            if let Some(ripe) = ripe
                && available < FLUSH_BYTES
                && call.phase != CallPhase::Finished
            {
                wait = Some(wait.map_or(ripe, |before| before.min(ripe)));
                continue;
            }
            call.reading = true;
            let chunk = if self.chunk == 0 { limits::CHUNK_BYTES } else { self.chunk.min(limits::CHUNK_BYTES) };
            let max_bytes = usize::try_from(credit).unwrap_or(usize::MAX).min(chunk);
            self.link_sent += max_bytes as u64;
            return Next::Read(Piece { call_id, stream, offset, max_bytes });
        }
        wait.map_or(Next::Idle, Next::Wait)
    }

    /// A piece was read. Returns what to send: offset, bytes skipped before it, and whether the stream ends with it.
    pub(super) fn piece_read(
        &mut self,
        piece: &Piece,
        offset: u64,
        length: usize,
        now: Duration,
    ) -> Option<(u64, u64, bool)> {
        let length = length as u64;
        self.link_sent = self.link_sent.saturating_sub((piece.max_bytes as u64).saturating_sub(length));
        let call = self.calls.get_mut(&piece.call_id)?;
        call.reading = false;
        let known = call.lengths.get(piece.stream);
        let state = &mut call.streams[piece.stream.index()];
        if state.sent != piece.offset || offset < piece.offset {
            return None;
        }
        let reached = offset.saturating_add(length);
        let end = state.total.is_some_and(|total| reached >= total);
        if length == 0 && !end {
            // The report ran ahead of the bytes; they are asked for again with the next report.
            call.lengths = lengths_without(call.lengths, piece.stream, state.sent);
            return None;
        }
        state.sent = reached;
        state.end_sent |= end;
        call.lengths.advance(piece.stream, reached.max(known));
        call.last_sent = Some(now);
        self.mark_due(&piece.call_id);
        Some((offset, offset - piece.offset, end))
    }

    /// A piece cannot be read any more: the rest of its stream is a declared hole.
    pub(super) fn piece_gone(&mut self, piece: &Piece) -> Option<(u64, u64, bool)> {
        self.link_sent = self.link_sent.saturating_sub(piece.max_bytes as u64);
        let call = self.calls.get_mut(&piece.call_id)?;
        call.reading = false;
        let state = &mut call.streams[piece.stream.index()];
        let Some(total) = state.total else {
            // The call still runs or its end is on the way; then there is a total.
            call.lengths = lengths_without(call.lengths, piece.stream, state.sent);
            return None;
        };
        (state.sent, state.end_sent) = (total, true);
        Some((total, total.saturating_sub(piece.offset), true))
    }

    /// Output bytes that were reported and are not acknowledged.
    pub(super) fn unacknowledged_bytes(&self) -> u64 {
        let of_call = |call: &BookCall| -> u64 {
            let open = |stream: &Stream| !call.streams[stream.index()].inline;
            let rest =
                |stream: Stream| call.lengths.get(stream).saturating_sub(call.streams[stream.index()].acknowledged);
            Stream::ALL.into_iter().filter(open).map(rest).sum()
        };
        self.calls.values().map(of_call).sum()
    }

    /// Numbers for a heartbeat: sessions, running calls, waiting calls.
    pub(super) fn counts(&self) -> (u32, u32, u32) {
        let count = |phase| u32::try_from(self.calls.values().filter(|c| c.phase == phase).count()).unwrap_or(u32::MAX);
        let sessions = u32::try_from(self.sessions.len()).unwrap_or(u32::MAX);
        (sessions, count(CallPhase::Started), count(CallPhase::Accepted))
    }

    /// Every call is delivered.
    pub(super) fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    /// Sessions that are open here.
    pub(super) fn session_epochs(&self) -> Vec<(SessionId, u64)> {
        self.sessions.iter().map(|(id, session)| (id.clone(), session.epoch)).collect()
    }

    /// Session of a call.
    pub(super) fn session_of(&self, call_id: &CallId) -> Option<(SessionId, u64)> {
        let session_id = &self.calls.get(call_id)?.session_id;
        Some((session_id.clone(), self.sessions.get(session_id)?.epoch))
    }

    /// What a new link is told: every session, with its calls, on pages of at most 512 KiB.
    pub(super) fn resume_pages(&self) -> Vec<pb::ResumePage> {
        let mut states: BTreeMap<&SessionId, pb::SessionState> = BTreeMap::new();
        for (session_id, session) in &self.sessions {
            let phase = if session.ready { pb::SessionPhase::Ready } else { pb::SessionPhase::Opening };
            states.insert(session_id, state_of(session_id, session.epoch, phase));
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

fn lengths_without(lengths: StreamLengths, stream: Stream, sent: u64) -> StreamLengths {
    let mut reduced = StreamLengths::default();
    for other in Stream::ALL {
        reduced.advance(other, if other == stream { sent } else { lengths.get(other) });
    }
    reduced
}

impl BookCall {
    /// The first stream with something to send.
    fn next_stream(&self) -> Option<Stream> {
        if self.quiet && self.phase != CallPhase::Finished {
            return None;
        }
        Stream::ALL.into_iter().find(|stream| {
            let state = &self.streams[stream.index()];
            let unmarked = state.total.is_some_and(|total| total > 0 && state.sent >= total) && !state.end_sent;
            // What is acknowledged to the end needs no mark on a later link.
            let wanted = state.sent < self.lengths.get(*stream) || (unmarked && !state.is_delivered());
            !state.inline && wanted
        })
    }

    fn to_wire(&self, call_id: &CallId) -> pb::CallState {
        let stream_state = |stream: Stream| pb::StreamState {
            stream: stream_to_wire(stream).into(),
            length: self.lengths.get(stream),
            acked_through: self.streams[stream.index()].acknowledged,
            oldest_retained: 0,
        };
        pb::CallState {
            call_id: call_id.to_string(),
            phase: super::encode::phase_to_wire(self.phase).into(),
            request_sha256: self.digest.0.to_vec(),
            streams: Stream::ALL.into_iter().filter(|s| self.lengths.get(*s) > 0).map(stream_state).collect(),
        }
    }
}

#[cfg(test)]
#[path = "book_tests.rs"]
mod tests;
