//! What this connector knows about sessions and about the output of calls, across links. Pure.
//!
//! It answers three questions: which piece of output is due next under the credit there is, what to tell a new link
//! about the state of things, and when a call is delivered in full, so that it may be forgotten everywhere.

mod output;
mod told;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use crate::work::{CallId, CallPhase, RequestDigest, SessionId, Stream, StreamLengths, StreamSummary};
pub(super) use output::{Next, Piece};

/// Requests of one call without an answer, more than can be on their way to the sessions: so many are repeats of one that waits
/// for the disk, and will be accepted.
const MOST_REPEATS: usize = 1024;

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
    /// It is open: it was opened, or an earlier runner left it.
    held: bool,
    /// Calls that were accepted, also by earlier runners, and also those that are forgotten here.
    accepted: u64,
    /// Opens without an answer, by epoch. The first of them may be what it is being made for.
    asked: BTreeMap<u64, u32>,
}

impl BookSession {
    fn asked_for(epoch: u64) -> Self {
        Self { epoch, ready: false, held: false, accepted: 0, asked: BTreeMap::new() }
    }

    fn open(epoch: u64, ready: bool) -> Self {
        Self { ready, held: true, ..Self::asked_for(epoch) }
    }
}

/// What a call was asked for with.
#[derive(Debug, Clone)]
struct Asked {
    session_id: SessionId,
    digest: RequestDigest,
    quiet: bool,
}

/// One call.
#[derive(Debug)]
struct BookCall {
    session_id: SessionId,
    digest: RequestDigest,
    quiet: bool,
    accepted: bool,
    /// Requests without an answer behind the one that it is known by, in their order, until one is accepted.
    repeats: VecDeque<Asked>,
    phase: CallPhase,
    lengths: StreamLengths,
    streams: [BookStream; 4],
    /// The acknowledged end of the call needs nothing more than its output.
    result_acknowledged: bool,
    credit: Option<u64>,
    reading: bool,
    last_sent: Option<Duration>,
}

impl BookCall {
    fn asked_for(Asked { session_id, digest, quiet }: Asked) -> Self {
        Self {
            session_id,
            digest,
            quiet,
            accepted: false,
            repeats: VecDeque::new(),
            phase: CallPhase::Accepted,
            lengths: StreamLengths::default(),
            streams: [BookStream::default(); 4],
            result_acknowledged: false,
            credit: None,
            reading: false,
            last_sent: None,
        }
    }
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

impl Book {
    pub(super) fn session_opened(&mut self, session_id: SessionId, epoch: u64) {
        let session = self.sessions.entry(session_id).or_insert_with(|| BookSession::asked_for(epoch));
        (session.epoch, session.ready, session.held) = (epoch, true, true);
        session.asked.retain(|asked, _| *asked > epoch);
    }

    pub(super) fn session_restored(&mut self, session_id: SessionId, epoch: u64, ready: bool, acknowledged: u64) {
        let session = BookSession { accepted: acknowledged, ..BookSession::open(epoch, ready) };
        self.sessions.insert(session_id, session);
    }

    pub(super) fn call_restored(
        &mut self,
        call_id: CallId,
        session_id: SessionId,
        (digest, quiet): (RequestDigest, bool),
        phase: CallPhase,
    ) {
        self.call_requested(call_id.clone(), session_id, digest, quiet);
        self.call_accepted(&call_id);
        if let Some(call) = self.calls.get_mut(&call_id) {
            call.phase = phase;
        }
    }

    pub(super) fn session_requested(&mut self, session_id: SessionId, epoch: u64) {
        let session = self.sessions.entry(session_id).or_insert_with(|| BookSession::asked_for(epoch));
        *session.asked.entry(epoch).or_default() += 1;
    }

    /// The placement of this epoch is over. One that was asked for since is not.
    pub(super) fn session_ended(&mut self, session_id: &SessionId, epoch: u64) {
        let Some(session) = self.sessions.get_mut(session_id) else { return };
        session.asked.retain(|asked, _| *asked > epoch);
        match session.asked.first_key_value() {
            None => drop(self.sessions.remove(session_id)),
            Some((asked, _)) => {
                let next = BookSession::asked_for(*asked);
                *session = BookSession { asked: std::mem::take(&mut session.asked), ..next };
            }
        }
    }

    /// A refused open leaves a session untouched that is open, or that another open is still to be answered for: a link that
    /// was not told of it would be told that its calls are lost, and could not cancel them.
    pub(super) fn open_refused(&mut self, session_id: &SessionId, epoch: u64) {
        let Some(session) = self.sessions.get_mut(session_id) else { return };
        if let Some(count) = session.asked.get_mut(&epoch) {
            *count -= 1;
            session.asked.retain(|_, count| *count > 0);
        }
        match session.asked.first_key_value() {
            _ if session.held || session.asked.contains_key(&session.epoch) => {}
            Some((asked, _)) => session.epoch = *asked,
            None => drop(self.sessions.remove(session_id)),
        }
    }

    pub(super) fn call_requested(
        &mut self,
        call_id: CallId,
        session_id: SessionId,
        digest: RequestDigest,
        quiet: bool,
    ) {
        let asked = Asked { session_id, digest, quiet };
        match self.calls.entry(call_id) {
            Entry::Vacant(entry) => drop(entry.insert(BookCall::asked_for(asked))),
            Entry::Occupied(mut entry) if !entry.get().accepted && entry.get().repeats.len() < MOST_REPEATS => {
                entry.get_mut().repeats.push_back(asked);
            }
            Entry::Occupied(_) => {}
        }
    }

    /// A refused request leaves a call untouched that was accepted before. One that was asked for again since is known by that
    /// request, which may be accepted: without it a link would be told of fewer calls than were, and get no output of this one.
    pub(super) fn call_refused(&mut self, call_id: &CallId) {
        let Some(call) = self.calls.get_mut(call_id).filter(|call| !call.accepted) else { return };
        match call.repeats.pop_front() {
            Some(next) => {
                let repeats = std::mem::take(&mut call.repeats);
                *call = BookCall { repeats, ..BookCall::asked_for(next) };
            }
            None => drop(self.calls.remove(call_id)),
        }
    }

    pub(super) fn call_accepted(&mut self, call_id: &CallId) {
        let Some(call) = self.calls.get_mut(call_id) else { return };
        call.repeats.clear();
        if !std::mem::replace(&mut call.accepted, true)
            && let Some(session) = self.sessions.get_mut(&call.session_id)
        {
            session.accepted += 1;
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
}

#[cfg(test)]
mod tests;
