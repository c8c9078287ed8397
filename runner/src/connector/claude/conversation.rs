//! What of one session's events is to run, in which order, and when the session has nothing left to do. Pure.
//!
//! What was *seen* and what is *answered* are kept apart: a tool use is answered when its result is stored at the server,
//! whoever gave it, and nothing else makes it so. The gate fails closed: what is not clearly allowed waits or is denied.
//! Tools that do not run here are left to their owner.

mod past;
mod threads;
pub(super) mod turns;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use super::input::TOOLS;
use super::wire::{Event, Permission, ToolUse};
use crate::work::CancelMode;
use threads::Threads;
use turns::Turns;

/// Tool uses without an answer that are kept in memory; what comes beyond it is read again from the history.
const MOST_PENDING: usize = 256;
/// Their inputs.
const MOST_PENDING_BYTES: usize = 64 * 1024 * 1024;
/// Live events that wait until the history is read.
const MOST_BUFFERED: usize = 4096;
/// The inputs in them.
const MOST_BUFFERED_BYTES: usize = 64 * 1024 * 1024;

/// What the conversation wants.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Ask {
    /// Have it run, or find out what has become of it. With `interrupted` it must not begin any more.
    Run { tool_use: ToolUse, interrupted: bool },
    /// End it.
    Cancel { tool_use_id: String, mode: CancelMode },
    /// Somebody has answered it, or nobody wants an answer.
    Settled { tool_use_id: String },
}

/// What is done with the result of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It is posted.
    Post { interrupted: bool },
    /// Nobody wants it.
    Drop,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// It waits for a verdict.
    Held,
    /// It waits for its turn.
    Waiting,
    /// It was handed on.
    Running,
    /// Its answer is being posted.
    Posting,
}

#[derive(Debug)]
struct Pending {
    tool_use: ToolUse,
    stage: Stage,
    interrupted: bool,
    /// Its thread has ended or it was answered: its result goes nowhere.
    unwanted: bool,
}

/// One session, as far as its events are known.
#[derive(Debug, Default)]
pub(super) struct Conversation {
    pending: BTreeMap<String, Pending>,
    turns: Turns,
    answered: HashSet<String>,
    /// The server refused their answers: they are not tried again in this run.
    given_up: HashSet<String>,
    verdicts: HashMap<String, bool>,
    threads: Threads,
    /// Unanswered tool uses of somebody else.
    foreign: BTreeSet<String>,
    reconciled: bool,
    buffered: Vec<Event>,
    buffered_bytes: usize,
    /// Something was passed over for want of room; the history has it.
    overflowed: bool,
    /// The turn has ended, and nothing has come since.
    turn_ended: bool,
    /// The same, or the turn waits for somebody: nothing is at work at the server.
    rests: bool,
    idle_since: Option<u64>,
    /// Everything that is open waits for somebody else.
    waits_since: Option<u64>,
    /// A call of it has been answered before.
    has_run: bool,
    /// Events that were known when the stream was last whole; a history of so many has nothing new.
    known_events: usize,
    /// Since when it was idle before the stream broke.
    was_idle_since: Option<u64>,
    ended: bool,
    asks: Vec<Ask>,
}

impl Conversation {
    /// Whether tool uses of different threads run beside each other, or all of them in the order in which they came.
    pub(super) fn set_parallel(&mut self, parallel: bool) {
        self.turns.set_parallel(parallel);
    }

    /// A stream is open, and the history is about to be read.
    pub(super) fn connected(&mut self) {
        // A stream that breaks is no sign of life.
        self.was_idle_since = self.idle_since.take().or(self.was_idle_since);
        (self.reconciled, self.overflowed) = (false, false);
        (self.buffered, self.buffered_bytes) = (Vec::new(), 0);
    }

    /// An event has come on the stream. False when there is no room for it: then the stream is made again.
    pub(super) fn live(&mut self, now: u64, event: Event) -> bool {
        if self.reconciled {
            self.take(event);
            self.settle(now);
            return true;
        }
        if let Event::Use(tool_use) = &event {
            self.buffered_bytes += tool_use.kept_bytes();
        }
        if self.buffered.len() >= MOST_BUFFERED || self.buffered_bytes > MOST_BUFFERED_BYTES {
            return false;
        }
        self.buffered.push(event);
        true
    }

    fn take(&mut self, event: Event) {
        self.known_events += 1;
        self.follow(&event);
        self.threads.learn(&event);
        match event {
            Event::Use(tool_use) => self.route(tool_use, false),
            Event::Answered { tool_use_id } => self.answer(&tool_use_id),
            Event::Verdict { tool_use_id, allow } => self.verdict(&tool_use_id, allow),
            Event::Interrupt { thread_id } => self.interrupt(thread_id.as_deref()),
            Event::ThreadEnded { thread_id } => self.end_thread(&thread_id),
            Event::Ended => self.ended = true,
            Event::ThreadCreated { .. } | Event::ThreadSeen { .. } | Event::Idle { .. } | Event::Other => {}
        }
    }

    fn route(&mut self, tool_use: ToolUse, interrupted: bool) {
        let id = tool_use.id.clone();
        if self.answered.contains(&id) || self.given_up.contains(&id) {
            return;
        }
        if self.pending.contains_key(&id) {
            if interrupted {
                self.interrupt_one(&id);
            }
            return;
        }
        if self.threads.has_ended(&tool_use) {
            return self.close(&id);
        }
        let stage = match (tool_use.permission, self.verdicts.get(&id).copied()) {
            (Permission::Denied, _) | (_, Some(false)) => return self.close(&id),
            (_, Some(true)) | (Permission::Allowed, None) => Stage::Waiting,
            (Permission::Asked, None) => Stage::Held,
        };
        if !runs_here(&tool_use) {
            self.foreign.insert(id);
            return;
        }
        if self.pending.len() >= MOST_PENDING || self.pending_bytes() + tool_use.kept_bytes() > MOST_PENDING_BYTES {
            self.overflowed = true;
            return;
        }
        if stage == Stage::Waiting {
            self.turns.push(id.clone());
        }
        self.pending.insert(id, Pending { tool_use, stage, interrupted, unwanted: false });
    }

    fn verdict(&mut self, id: &str, allow: bool) {
        self.verdicts.insert(id.to_owned(), allow);
        let Some(pending) = self.pending.get_mut(id).filter(|pending| pending.stage == Stage::Held) else { return };
        if allow {
            pending.stage = Stage::Waiting;
            self.turns.push(id.to_owned());
        } else {
            self.close(id);
        }
    }

    /// The server has an answer.
    fn answer(&mut self, id: &str) {
        self.foreign.remove(id);
        self.close(id);
    }

    /// Nobody wants an answer from here any more. Also an earlier runner may have begun it.
    fn close(&mut self, id: &str) {
        let is_new = self.answered.insert(id.to_owned());
        if self.pending.contains_key(id) {
            self.unwant(id);
        } else if is_new {
            self.asks.push(Ask::Settled { tool_use_id: id.to_owned() });
        }
    }

    fn end_thread(&mut self, thread_id: &str) {
        self.threads.end(thread_id);
        let of_thread = |pending: &Pending| self.threads.concerns(Some(thread_id), &pending.tool_use);
        let ids: Vec<_> = self.pending.iter().filter(|(_, p)| of_thread(p)).map(|(id, _)| id.clone()).collect();
        for id in ids {
            self.close(&id);
        }
    }

    /// Nobody waits for the result any more.
    fn unwant(&mut self, id: &str) {
        let Some(pending) = self.pending.get_mut(id) else { return };
        if pending.stage == Stage::Running {
            if !std::mem::replace(&mut pending.unwanted, true) {
                // The shell is for the calls that come after it.
                self.asks.push(Ask::Cancel { tool_use_id: id.to_owned(), mode: CancelMode::Interrupt });
            }
            return;
        }
        self.pending.remove(id);
        self.turns.remove(id);
        self.asks.push(Ask::Settled { tool_use_id: id.to_owned() });
    }

    fn interrupt(&mut self, thread_id: Option<&str>) {
        let concerned = |pending: &Pending| self.threads.concerns(thread_id, &pending.tool_use);
        let ids: Vec<_> = self.pending.iter().filter(|(_, p)| concerned(p)).map(|(id, _)| id.clone()).collect();
        for id in ids {
            self.interrupt_one(&id);
        }
    }

    fn interrupt_one(&mut self, id: &str) {
        let Some(pending) = self.pending.get_mut(id) else { return };
        if std::mem::replace(&mut pending.interrupted, true) {
            return;
        }
        match pending.stage {
            Stage::Running => {
                let (tool_use_id, mode) = (id.to_owned(), CancelMode::Interrupt);
                self.asks.push(Ask::Cancel { tool_use_id, mode });
            }
            // It has not begun in this run. Whether it has in another is for others to say.
            Stage::Waiting => {}
            Stage::Held => {
                pending.stage = Stage::Waiting;
                self.turns.push(id.to_owned());
            }
            Stage::Posting => {}
        }
    }

    /// Hands on what has its turn.
    fn hand_on(&mut self) {
        while let Some(id) = self.turns.next(&self.pending, &self.threads) {
            let Some(pending) = self.pending.get_mut(&id) else { continue };
            pending.stage = Stage::Running;
            let (tool_use, interrupted) = (pending.tool_use.clone(), pending.interrupted);
            self.asks.push(Ask::Run { tool_use, interrupted });
        }
    }

    fn pending_bytes(&self) -> usize {
        self.pending.values().map(|pending| pending.tool_use.kept_bytes()).sum()
    }

    fn settle(&mut self, now: u64) {
        self.hand_on();
        let quiet = self.turn_ended && self.reconciled && self.pending.is_empty() && self.foreign.is_empty();
        self.idle_since = if quiet { self.idle_since.or(Some(now)) } else { None };
        let is_open = !(self.pending.is_empty() && self.foreign.is_empty());
        // A stream that breaks is no answer of those that are waited for.
        let waits = is_open && self.rests && self.is_quiet();
        self.waits_since = if waits { self.waits_since.or(Some(now)) } else { None };
    }

    /// What it wants, in this order.
    pub(super) fn asks(&mut self) -> Vec<Ask> {
        std::mem::take(&mut self.asks)
    }

    /// A call is over, or needs no run; says what is done with its result.
    pub(super) fn finished(&mut self, now: u64, id: &str) -> Fate {
        let Some(pending) = self.pending.get_mut(id) else { return Fate::Drop };
        if pending.unwanted {
            self.pending.remove(id);
            self.settle(now);
            return Fate::Drop;
        }
        pending.stage = Stage::Posting;
        let interrupted = pending.interrupted;
        self.settle(now);
        Fate::Post { interrupted }
    }

    /// Its answer is at the server.
    pub(super) fn posted(&mut self, now: u64, id: &str) {
        self.pending.remove(id);
        self.answered.insert(id.to_owned());
        self.settle(now);
    }

    /// The server does not take its answer.
    pub(super) fn give_up(&mut self, now: u64, id: &str) {
        self.pending.remove(id);
        self.given_up.insert(id.to_owned());
        self.settle(now);
    }

    /// Tool uses that are not answered and were not handed on: they are not handed on any more.
    pub(super) fn take_waiting(&mut self) -> Vec<String> {
        let waiting = self.turns.take_all();
        for id in &waiting {
            if let Some(pending) = self.pending.get_mut(id) {
                pending.stage = Stage::Running;
            }
        }
        waiting
    }

    /// Calls that were handed on and are not over.
    pub(super) fn running(&self) -> Vec<String> {
        let running = self.pending.iter().filter(|(_, pending)| pending.stage == Stage::Running);
        running.map(|(id, _)| id.clone()).collect()
    }

    /// Nothing runs, waits for its turn or is being posted; what waits for a verdict does not count.
    pub(super) fn is_quiet(&self) -> bool {
        self.pending.values().all(|pending| pending.stage == Stage::Held)
    }

    /// Since when the turn is over and nothing is left to do.
    pub(super) fn idle_since(&self) -> Option<u64> {
        self.idle_since
    }

    /// Since when the session does nothing, and everything that is open waits for a verdict or for the owner of a tool that does
    /// not run here.
    pub(super) fn waits_since(&self) -> Option<u64> {
        self.waits_since
    }

    /// A call of it has run here.
    pub(super) fn ran(&mut self) {
        self.has_run = true;
    }

    /// Whether a call of it has run before, here or elsewhere. One that was allowed and answered counts.
    pub(super) fn has_run(&self) -> bool {
        self.has_run
    }

    /// The session is over for good.
    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }

    /// What is remembered of its events beyond what is pending.
    pub(super) fn remembered(&self) -> usize {
        let answers = self.answered.len() + self.given_up.len() + self.foreign.len();
        answers + self.verdicts.len() + self.threads.len()
    }

    /// Something was passed over, and there is room for it again.
    pub(super) fn must_read_again(&self) -> bool {
        self.overflowed && self.reconciled && self.pending.len() < MOST_PENDING / 2
    }
}

/// Whether this runner has a tool. Others are left to whoever has them.
fn runs_here(tool_use: &ToolUse) -> bool {
    !tool_use.is_custom && TOOLS.contains(&tool_use.name.as_str())
}
