//! Which piece of output is due next under the credit there is, and what became of it.

use std::time::Duration;

use super::{Book, BookCall};
use crate::work::{CallId, CallPhase, Stream, StreamLengths, limits};

/// A piece this large is sent at once; a smaller one waits for company.
pub(super) const FLUSH_BYTES: u64 = 32 * 1024;
/// How long a small piece waits at most.
pub(super) const FLUSH_AFTER: Duration = Duration::from_millis(25);

/// A piece of output to read and send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::connector::orchestrator) struct Piece {
    pub(in crate::connector::orchestrator) call_id: CallId,
    pub(in crate::connector::orchestrator) stream: Stream,
    pub(in crate::connector::orchestrator) offset: u64,
    pub(in crate::connector::orchestrator) max_bytes: usize,
}

/// What can be done about output now.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::connector::orchestrator) enum Next {
    /// Read this piece.
    Read(Piece),
    /// Something small waits until then (on the caller's clock).
    Wait(Duration),
    /// Nothing to do until something is reported or credit arrives.
    Idle,
}

impl Book {
    /// Largest piece the present link takes; 0 means the default.
    pub(in crate::connector::orchestrator) fn max_chunk(&mut self, bytes: u32) {
        self.chunk = usize::try_from(bytes).unwrap_or(limits::CHUNK_BYTES);
    }

    pub(in crate::connector::orchestrator) fn credit(&mut self, link_max: u64, calls: &[(CallId, u64)]) {
        self.link_max = self.link_max.max(link_max);
        for (call_id, max) in calls {
            if let Some(call) = self.calls.get_mut(call_id) {
                call.credit = Some(call.credit.unwrap_or(0).max(*max));
            }
        }
    }

    pub(in crate::connector::orchestrator) fn mark_due(&mut self, call_id: &CallId) {
        if !self.due.contains(call_id) && self.calls.get(call_id).is_some_and(|call| call.next_stream().is_some()) {
            self.due.push_back(call_id.clone());
        }
    }

    /// The next piece under credit, in turn of calls. `now` is any clock that does not run backwards.
    pub(in crate::connector::orchestrator) fn next_piece(&mut self, now: Duration) -> Next {
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
    pub(in crate::connector::orchestrator) fn piece_read(
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
    pub(in crate::connector::orchestrator) fn piece_gone(&mut self, piece: &Piece) -> Option<(u64, u64, bool)> {
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
    pub(in crate::connector::orchestrator) fn unacknowledged_bytes(&self) -> u64 {
        let of_call = |call: &BookCall| -> u64 {
            let open = |stream: &Stream| !call.streams[stream.index()].inline;
            let rest =
                |stream: Stream| call.lengths.get(stream).saturating_sub(call.streams[stream.index()].acknowledged);
            Stream::ALL.into_iter().filter(open).map(rest).sum()
        };
        self.calls.values().map(of_call).sum()
    }
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
}
