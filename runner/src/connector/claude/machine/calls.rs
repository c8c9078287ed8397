//! Calls in the hands of the sessions: handed on, found again after a restart, answered, and acknowledged when the server has
//! the answer.

use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tracing::warn;

use super::{Answer, Machine, nanoseconds};
use crate::connector::claude::conversation::{Ask, Fate};
use crate::connector::claude::handover::MOST_DROPPED;
use crate::connector::claude::input;
use crate::connector::claude::wire::ToolUse;
use crate::work::limits::INLINE_INPUT_BYTES;
use crate::work::{
    CallId, CallResult, CancelMode, Outcome, OutputMode, RequestDigest, SessionId, ToolCall, Update, WorkItem,
};

/// Results that nobody has asked for are kept so long: their session may come back. Later it hears that they are gone.
pub(super) const KEEP_RESULTS: Duration = Duration::from_secs(24 * 3600);
/// What is told of a call that has run and whose result is gone.
pub(super) const NOT_KEPT: &str = "the call has run, and its result is not kept any more; look at what it was to do";

/// A call that the sessions know.
#[derive(Debug)]
pub(super) struct Known {
    session_id: SessionId,
    /// How it ended.
    result: Option<Arc<CallResult>>,
    /// When that was heard.
    since: u64,
    /// Nobody wants its result.
    is_settled: bool,
    /// Its result says that its sandbox is a new one.
    is_new: bool,
}

impl Known {
    fn begun(session_id: SessionId, now: u64) -> Self {
        Self { session_id, result: None, since: now, is_settled: false, is_new: false }
    }
}

impl Machine {
    /// Carries out what the conversation of an item wants.
    pub(super) fn carry_out(&mut self, work_id: &str) {
        loop {
            let asks = match self.items.get_mut(work_id) {
                Some(item) => item.conversation.asks(),
                None => return,
            };
            if asks.is_empty() {
                return;
            }
            for ask in asks {
                match ask {
                    Ask::Run { tool_use, interrupted } => self.run(work_id, &tool_use, interrupted),
                    Ask::Cancel { tool_use_id, mode } => self.cancel(work_id, &tool_use_id, mode),
                    Ask::Settled { tool_use_id } => {
                        self.withdraw(work_id, &tool_use_id);
                        self.settled(work_id, &tool_use_id);
                    }
                }
            }
        }
    }

    fn run(&mut self, work_id: &str, tool_use: &ToolUse, interrupted: bool) {
        let Ok(call_id) = self.call_id(&tool_use.id) else { return };
        match self.calls.get(&call_id) {
            Some(Known { result: Some(result), .. }) => {
                let result = Arc::clone(result);
                return self.answer(work_id, &tool_use.id, call_id, result);
            }
            // It was begun before, and its end will come.
            Some(_) => {
                if interrupted {
                    self.cancel(work_id, &tool_use.id, CancelMode::Interrupt);
                }
                return;
            }
            None => {}
        }
        if self.dropped.contains(&call_id) {
            return self.answer_text(work_id, &tool_use.id, Answer::text(NOT_KEPT));
        }
        if interrupted {
            return self.answer_text(work_id, &tool_use.id, Answer::interrupted());
        }
        if tool_use.is_oversized() {
            let (name, bytes, most) = (&tool_use.name, tool_use.input_bytes, INLINE_INPUT_BYTES);
            let text =
                format!("{name} input has {bytes} bytes; at most {most} are allowed; split it into several calls");
            return self.answer_text(work_id, &tool_use.id, Answer::text(text));
        }
        let Some(session_id) = self.items.get(work_id).and_then(|item| item.core.clone()) else { return };
        match input::read(&tool_use.name, &tool_use.input, self.rules.longest_command) {
            Err(text) => self.answer_text(work_id, &tool_use.id, Answer::text(text)),
            Ok((input, limits)) => {
                let digest = digest(tool_use);
                let call = ToolCall {
                    call_id: call_id.clone(),
                    session_id: session_id.clone(),
                    epoch: super::sessions::EPOCH,
                    digest,
                    input,
                    limits,
                    output_mode: OutputMode::Merged,
                    // Nobody reads along.
                    quiet: true,
                };
                self.calls.insert(call_id, Known::begun(session_id, self.now));
                self.send(call);
            }
        }
    }

    fn answer(&mut self, work_id: &str, tool_use_id: &str, call_id: CallId, result: Arc<CallResult>) {
        let now = self.now;
        let Some(item) = self.items.get_mut(work_id) else { return };
        match item.conversation.finished(now, tool_use_id) {
            Fate::Post { interrupted } => {
                let is_new = has_run(&result.end.outcome) && self.note_run(work_id, &call_id);
                let answer = Answer::Result { call_id, result, interrupted, is_new };
                self.deliver(work_id, tool_use_id.to_owned(), answer);
            }
            Fate::Drop => self.stored(tool_use_id),
        }
    }

    /// Takes note that a call has run, and says whether its result is the first one of a sandbox that has nothing of what its session
    /// has done before. It says so each time that it is posted.
    fn note_run(&mut self, work_id: &str, call_id: &CallId) -> bool {
        let Some(known) = self.calls.get(call_id) else { return false };
        let (session_id, was_told) = (known.session_id.clone(), known.is_new);
        let is_new = self.take_is_new(&session_id) || was_told;
        if let Some(item) = self.items.get_mut(work_id) {
            item.conversation.ran();
        }
        if let Some(known) = self.calls.get_mut(call_id) {
            known.is_new = is_new;
        }
        is_new
    }

    fn answer_text(&mut self, work_id: &str, tool_use_id: &str, answer: Answer) {
        let now = self.now;
        let Some(item) = self.items.get_mut(work_id) else { return };
        if let Fate::Post { .. } = item.conversation.finished(now, tool_use_id) {
            self.deliver(work_id, tool_use_id.to_owned(), answer);
        }
    }

    pub(super) fn cancel(&mut self, work_id: &str, tool_use_id: &str, mode: CancelMode) {
        let Some(session_id) = self.items.get(work_id).and_then(|item| item.core.clone()) else { return };
        let Ok(call_id) = self.call_id(tool_use_id) else { return };
        if self.calls.get(&call_id).is_some_and(|known| known.result.is_none()) {
            self.cancel_call(&session_id, call_id, mode);
        }
    }

    pub(super) fn cancel_call(&mut self, session_id: &SessionId, call_id: CallId, mode: CancelMode) {
        let session_id = session_id.clone();
        self.work(WorkItem::Cancel { session_id, epoch: super::sessions::EPOCH, call_id, mode });
    }

    /// Calls of a session that have no result yet, also those that an earlier runner has begun.
    pub(super) fn unfinished(&self, session_id: &SessionId) -> Vec<CallId> {
        let is_one = |known: &Known| known.session_id == *session_id && known.result.is_none();
        self.calls.iter().filter(|(_, known)| is_one(known)).map(|(id, _)| id.clone()).collect()
    }

    /// A tool use that has not had its turn, and gets none any more.
    pub(super) fn end_waiting(&mut self, work_id: &str, tool_use_id: &str) {
        let Ok(call_id) = self.call_id(tool_use_id) else { return };
        match self.calls.get(&call_id).map(|known| known.result.clone()) {
            Some(Some(result)) => self.answer(work_id, tool_use_id, call_id, result),
            // An earlier runner has begun it, and its end will come.
            Some(None) => {}
            None => {
                let text = "cancelled before it started; nothing was run";
                self.answer_text(work_id, tool_use_id, Answer::text(text));
            }
        }
    }

    /// The server has the answer, or nobody wants it: the sessions may forget the call.
    pub(super) fn stored(&mut self, tool_use_id: &str) {
        let Ok(call_id) = self.call_id(tool_use_id) else { return };
        if self.calls.get(&call_id).is_some_and(|known| known.result.is_some()) {
            self.calls.remove(&call_id);
            self.work(WorkItem::Acknowledge { call_id });
        }
    }

    /// The server has an answer that did not come from this run: an earlier runner gave it, or somebody else.
    fn settled(&mut self, work_id: &str, tool_use_id: &str) {
        let Ok(call_id) = self.call_id(tool_use_id) else { return };
        let Some(known) = self.calls.get_mut(&call_id) else { return };
        if known.result.is_none() && !std::mem::replace(&mut known.is_settled, true) {
            self.cancel(work_id, tool_use_id, CancelMode::Interrupt);
        }
        self.stored(tool_use_id);
    }

    /// What the sessions say.
    pub(super) fn update(&mut self, update: Update) {
        match update {
            Update::Restored => {
                self.restored = true;
                self.take_up();
            }
            Update::Drained { draining, .. } => self.draining = draining,
            Update::SessionRestored { session_id, ready, .. } => self.session_restored(session_id, ready),
            Update::CallRestored { call_id, session_id, .. } => {
                self.calls.insert(call_id, Known::begun(session_id, self.now));
            }
            Update::SessionOpened { session_id, .. } => self.session_opened(&session_id),
            Update::SessionEnded { session_id, .. } => self.session_ended(&session_id),
            Update::CallAccepted { call_id, session_id, .. } => self.accepted(&session_id, &call_id),
            Update::CallFinished { call_id, session_id, result, .. } => self.finished(call_id, session_id, result),
            Update::Refused { request, session_id, call_id, failure, .. } => {
                self.refused(request, session_id, call_id, failure);
            }
            Update::CallStarted { .. }
            | Update::OutputAdvanced { .. }
            | Update::CancelNoted { .. }
            | Update::StdinAccepted { .. } => {}
        }
    }

    fn finished(&mut self, call_id: CallId, session_id: SessionId, result: Arc<CallResult>) {
        self.accepted(&session_id, &call_id);
        let is_settled = self.calls.get(&call_id).is_some_and(|known| known.is_settled);
        let (result_kept, begun) = (Some(Arc::clone(&result)), Known::begun(session_id.clone(), self.now));
        self.calls.insert(call_id.clone(), Known { result: result_kept, is_settled, ..begun });
        if is_settled || self.is_over(&session_id) {
            self.calls.remove(&call_id);
            return self.work(WorkItem::Acknowledge { call_id });
        }
        let Some((work_id, tool_use_id)) = self.waits_for(&session_id, &call_id) else { return };
        self.answer(&work_id, &tool_use_id, call_id, result);
        self.carry_out(&work_id);
    }

    /// The item and the tool use that wait for a call.
    pub(super) fn waits_for(&self, session_id: &SessionId, call_id: &CallId) -> Option<(String, String)> {
        let (work_id, item) = self.items.iter().find(|(_, item)| item.core.as_ref() == Some(session_id))?;
        let running = item.conversation.running();
        let tool_use_id = running.into_iter().find(|id| self.call_id(id).as_ref() == Ok(call_id))?;
        Some((work_id.clone(), tool_use_id))
    }

    /// A call that the sessions did not take and that is not tried again.
    pub(super) fn give_up_call(&mut self, session_id: &SessionId, call_id: &CallId, text: String) {
        self.calls.remove(call_id);
        let Some((work_id, tool_use_id)) = self.waits_for(session_id, call_id) else { return };
        self.answer_text(&work_id, &tool_use_id, Answer::text(text));
        self.carry_out(&work_id);
    }

    /// A call that the sessions do not know and that has no result.
    pub(super) fn forget_unless_finished(&mut self, call_id: &CallId) {
        if self.calls.get(call_id).is_some_and(|known| known.result.is_none()) {
            self.calls.remove(call_id);
        }
    }

    /// Whether results of a session are not at the server yet, or on their way.
    pub(super) fn owes(&self, session_id: &SessionId) -> bool {
        self.calls.values().any(|known| known.session_id == *session_id)
    }

    /// Nobody will ever ask for the results of a session.
    pub(super) fn drop_results(&mut self, session_id: &SessionId) {
        let is_over = |known: &Known| known.session_id == *session_id && known.result.is_some();
        let ids: Vec<_> = self.calls.iter().filter(|(_, known)| is_over(known)).map(|(id, _)| id.clone()).collect();
        for call_id in ids {
            self.calls.remove(&call_id);
            self.work(WorkItem::Acknowledge { call_id });
        }
    }

    pub(super) fn forget_old_results(&mut self) {
        let before = self.now.saturating_sub(nanoseconds(KEEP_RESULTS));
        if before == 0 {
            return;
        }
        let is_old = |known: &Known| known.result.is_some() && known.since < before;
        let old: Vec<_> = self.calls.iter().filter(|(_, known)| is_old(known)).map(|(id, _)| id.clone()).collect();
        for call_id in old {
            let session_id = self.calls[&call_id].session_id.clone();
            if self.items.values().any(|item| item.core.as_ref() == Some(&session_id)) {
                continue;
            }
            warn!(tool_call_id = %call_id, "nobody has asked for a result for a day, it is not kept any more");
            self.calls.remove(&call_id);
            if self.dropped.len() >= MOST_DROPPED {
                self.dropped.pop_front();
            }
            self.dropped.push_back(call_id.clone());
            self.changes += 1;
            self.work(WorkItem::Acknowledge { call_id });
        }
    }
}

/// Whether a call that ended so may have changed something.
fn has_run(outcome: &Outcome) -> bool {
    !matches!(outcome, Outcome::NeverStarted { .. } | Outcome::Cancelled { before_start: true, .. })
}

/// The same tool use is the same call, whichever runner reads it.
fn digest(tool_use: &ToolUse) -> RequestDigest {
    let mut hash = Sha256::new();
    for text in [tool_use.name.as_str(), tool_use.input.to_string().as_str()] {
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    }
    RequestDigest(hash.finalize().into())
}
