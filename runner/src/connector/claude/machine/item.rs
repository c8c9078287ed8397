//! A work item: acknowledged, leased, served, and given back on every way out while its lease is held.
//!
//! [`stream`] reads the events of its session, [`post`] has answers posted, [`ending`] are the ways out; this file is the way from
//! delivery to a lease that is held.

mod ending;
mod post;
mod stream;
mod view;

use std::collections::BTreeMap;
use std::time::Duration;

use tracing::{info, warn};

use super::{Action, Beat, Failure, Machine, Rules, SECOND, nanoseconds};
use crate::connector::claude::board::{Happening, Reason};
use crate::connector::claude::conversation::Conversation;
use crate::connector::claude::handover::Held;
use crate::connector::claude::history::History;
use crate::connector::claude::lease::Lease;
use crate::connector::claude::remedy;
use crate::work::SessionId;
use post::Post;
use stream::Link;

/// A delivery that is not acknowledged within this time is delivered again, perhaps to somebody else.
const ACK_WITHIN: u64 = 5 * SECOND;
const ACK_AGAIN_AFTER: u64 = SECOND;

/// Where an item is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// It is being acknowledged.
    Acking { in_flight: bool, again_at: u64 },
    /// Its lease is ours, or about to be.
    Serving,
    /// Nothing more begins; answers are posted until then.
    Ending { until: u64 },
    /// It is being given back.
    Stopping { tries: u32, in_flight: bool, again_at: u64 },
}

#[derive(Debug)]
pub(super) struct Item {
    /// As the server names it; empty for an item that asks for nothing.
    pub(super) session_id: String,
    /// As this runner names it.
    pub(super) core: Option<SessionId>,
    delivered_at: u64,
    /// By an earlier runner.
    was_left: bool,
    stage: Stage,
    lease: Lease,
    pub(super) conversation: Conversation,
    link: Link,
    link_number: u64,
    link_failures: u32,
    /// Since when the stream is whole.
    live_since: u64,
    history: History,
    /// The page of it that was asked for, and how many were.
    page: Option<String>,
    pages: u32,
    /// What was answered and interrupted so far is known: until then nothing of an earlier runner may begin.
    is_reconciled: bool,
    /// When to ask for the session's state; `None` when it is known, or asked.
    fetch_at: Option<u64>,
    posts: BTreeMap<String, Post>,
    /// Why it ends.
    reason: Option<Reason>,
    /// Somebody else is said to have acknowledged it, and that is still to be believed.
    is_handed_on: bool,
}

impl Item {
    /// One that somebody else has acknowledged.
    pub(super) fn claimed(session_id: String, core: Option<SessionId>, now: u64) -> Self {
        let stage = match core {
            Some(_) => Stage::Serving,
            None => Stage::Stopping { tries: 0, in_flight: false, again_at: now },
        };
        Self { stage, is_handed_on: true, ..Self::new(session_id, core, now) }
    }

    pub(super) fn new(session_id: String, core: Option<SessionId>, now: u64) -> Self {
        Self {
            session_id,
            core,
            delivered_at: now,
            was_left: false,
            stage: Stage::Acking { in_flight: true, again_at: now },
            lease: Lease::new(now),
            conversation: Conversation::default(),
            link: Link::Closed { open_at: now },
            link_number: 0,
            link_failures: 0,
            live_since: now,
            history: History::default(),
            is_reconciled: false,
            page: None,
            pages: 0,
            fetch_at: None,
            posts: BTreeMap::new(),
            reason: None,
            is_handed_on: false,
        }
    }

    /// One that an earlier runner has served.
    pub(super) fn left(held: Held, core: SessionId, now: u64) -> Self {
        let Held { session_id, last_heartbeat, ttl_seconds, .. } = held;
        let lease = Lease::left(now, last_heartbeat, ttl_seconds);
        Self { stage: Stage::Serving, lease, was_left: true, ..Self::new(session_id, Some(core), now) }
    }

    /// What the next runner needs to take up its lease.
    pub(super) fn held(&self, work_id: &str) -> Option<Held> {
        Some(Held {
            work_id: work_id.to_owned(),
            session_id: self.session_id.clone(),
            last_heartbeat: self.lease.last_heartbeat()?.to_owned(),
            ttl_seconds: self.lease.ttl() / SECOND,
        })
    }

    pub(super) fn is_reconciled(&self) -> bool {
        self.is_reconciled
    }

    /// An earlier runner has left it, and whether its lease is still held is not known.
    fn is_doubtful(&self) -> bool {
        self.was_left && !self.lease.is_held()
    }

    /// The queue has delivered it, or its session, once more: somebody must ask whether the lease is still ours.
    pub(super) fn ask_now(&mut self, now: u64) {
        self.lease.ask_now(now);
    }

    #[cfg(test)]
    pub(super) fn link_number(&self) -> u64 {
        self.link_number
    }

    /// Its lease is ours, as far as this runner knows.
    fn is_leased(&self) -> bool {
        self.lease.is_held() && matches!(self.stage, Stage::Serving | Stage::Ending { .. })
    }

    /// Calls may begin.
    pub(super) fn is_serving(&self) -> bool {
        self.stage == Stage::Serving && self.lease.is_held()
    }

    pub(super) fn lease_until(&self) -> u64 {
        self.lease.until()
    }

    /// When there has been nothing to do for long enough.
    fn idle_at(&self, rules: &Rules) -> Option<u64> {
        Some(self.conversation.idle_since()?.saturating_add(nanoseconds(rules.max_idle?)))
    }

    /// When somebody else has been waited for long enough. What has come while the stream was not whole is not known yet.
    fn waited_at(&self, rules: &Rules) -> Option<u64> {
        if self.link != Link::Live {
            return None;
        }
        Some(self.conversation.waits_since()?.saturating_add(nanoseconds(rules.max_wait?)))
    }

    /// When to look again.
    pub(super) fn wake(&self, rules: &Rules) -> u64 {
        match self.stage {
            Stage::Acking { in_flight, again_at } => {
                let over = self.delivered_at.saturating_add(ACK_WITHIN);
                if in_flight { over } else { again_at.min(over) }
            }
            Stage::Stopping { in_flight: true, .. } => self.lease.until(),
            Stage::Stopping { again_at, .. } => again_at.min(self.lease.until()),
            Stage::Serving | Stage::Ending { .. } => {
                let link = match self.link {
                    Link::Closed { open_at } if self.is_serving() => Some(open_at),
                    _ => None,
                };
                let until = if let Stage::Ending { until } = self.stage { Some(until) } else { None };
                let posts = self.posts.values().filter(|post| !post.in_flight).map(|post| post.next_at);
                let ends = [self.idle_at(rules), self.waited_at(rules)].into_iter().flatten();
                let other = [link, until, self.fetch_at, ends.min(), Some(self.lease.wake())];
                posts.chain(other.into_iter().flatten()).min().unwrap_or(u64::MAX)
            }
        }
    }
}

impl Machine {
    pub(super) fn acked(&mut self, work_id: &str, result: Result<(), Failure>) {
        let now = self.now;
        let Some(item) = self.items.get_mut(work_id) else { return };
        let Stage::Acking { .. } = item.stage else { return };
        match result {
            // Somebody has acknowledged it, perhaps we did and the answer was lost: who has it is for the first beat to say.
            Err(failure) if failure.status() != Some(409) => {
                warn!(work_id, error = %failure, "a work item could not be acknowledged");
                if failure.is_fatal() {
                    item.reason = Some(Reason::NotClaimed);
                    self.stop(work_id);
                } else {
                    item.stage = Stage::Acking { in_flight: false, again_at: now.saturating_add(ACK_AGAIN_AFTER) };
                }
                self.count(Happening::NotAcknowledged);
            }
            _ if item.core.is_none() => self.stop(work_id),
            _ => {
                item.stage = Stage::Serving;
                item.lease = Lease::new(now);
                let after = Duration::from_nanos(now.saturating_sub(item.delivered_at));
                self.count(Happening::Acknowledged { after });
            }
        }
    }

    pub(super) fn beaten(&mut self, work_id: &str, sent: u64, result: Result<Beat, Failure>) {
        let (now, draw) = (self.now, (self.draw)());
        let Some(item) = self.items.get_mut(work_id) else { return };
        // Whoever has lost it does not give it back either.
        let is_lost = matches!(&result, Err(failure) if failure.status() == Some(412));
        if matches!(item.stage, Stage::Acking { .. }) || (matches!(item.stage, Stage::Stopping { .. }) && !is_lost) {
            return;
        }
        match result {
            Ok(beat) => {
                let is_first = !item.lease.is_held();
                let margin = Duration::from_nanos(item.lease.until().saturating_sub(now));
                item.lease.beaten(sent, &beat, draw);
                item.is_handed_on = false;
                if !beat.goes_on {
                    if is_first {
                        warn!(work_id, "a work item was taken back before it was served");
                    }
                    return self.end_item(work_id, Reason::Stopping);
                }
                if is_first {
                    item.fetch_at = Some(now);
                    item.link = Link::Closed { open_at: now };
                    info!(work_id, session_id = item.session_id, taken_up = item.was_left, "work item claimed");
                }
                self.changes += 1;
                self.lease_renewed(work_id, is_first);
                if !is_first {
                    self.count(Happening::Renewed { margin });
                }
            }
            Err(failure) if failure.status() == Some(412) => self.lose(work_id, "somebody else holds it"),
            // Nobody has acknowledged it any more (409), or it is gone: it will be delivered again, or not.
            Err(failure) if item.is_doubtful() && (failure.is_fatal() || failure.status() == Some(409)) => {
                self.lose(work_id, "its server refuses it");
            }
            // It was handed on without having been acknowledged.
            Err(failure) if failure.status() == Some(409) && item.is_handed_on => {
                (item.is_handed_on, item.delivered_at) = (false, now);
                item.stage = Stage::Acking { in_flight: false, again_at: now };
            }
            Err(failure) if failure.is_fatal() => {
                let remedy = remedy::of_item(&failure);
                warn!(work_id, error = %failure, remedy, "a heartbeat was refused");
                // The lease may still be ours for a while, and giving it back needs no more beats.
                item.lease.unanswered(now);
                self.end_item(work_id, Reason::Refused);
            }
            Err(failure) => {
                warn!(work_id, error = %failure, "a heartbeat got no answer, will beat again");
                item.lease.unanswered(now);
            }
        }
    }

    pub(super) fn fetched(&mut self, work_id: &str, result: Result<bool, Failure>) {
        let again_at = self.within(1.0, 3.0);
        let Some(item) = self.items.get_mut(work_id) else { return };
        match result {
            Ok(false) => {}
            Ok(true) => self.end_item(work_id, Reason::SessionOver),
            Err(failure) if failure.is_fatal() => {
                warn!(work_id, error = %failure, "the session of a work item cannot be looked at");
                self.end_item(work_id, Reason::Refused);
            }
            Err(_) => item.fetch_at = Some(again_at),
        }
    }

    /// Does for an item what is due.
    pub(super) fn tend_item(&mut self, work_id: &str) {
        let now = self.now;
        let Some(item) = self.items.get_mut(work_id) else { return };
        match item.stage {
            Stage::Acking { in_flight, again_at } => {
                if now >= item.delivered_at.saturating_add(ACK_WITHIN) {
                    warn!(work_id, "a work item was not acknowledged in time, it is left for another delivery");
                    item.reason = Some(Reason::NotClaimed);
                    return self.release(work_id);
                }
                if !in_flight && now >= again_at {
                    item.stage = Stage::Acking { in_flight: true, again_at };
                    self.actions.push(Action::AckAgain { work_id: work_id.to_owned() });
                }
            }
            // Somebody else may have it by now.
            Stage::Stopping { .. } if item.lease.is_lost(now) => {
                self.lose(work_id, "it ran out before it was given back");
            }
            Stage::Stopping { tries, in_flight: false, again_at } if now >= again_at => {
                item.stage = Stage::Stopping { tries: tries + 1, in_flight: true, again_at };
                self.actions.push(Action::Stop { work_id: work_id.to_owned() });
            }
            Stage::Stopping { .. } => {}
            Stage::Serving | Stage::Ending { .. } => self.tend_leased(work_id),
        }
    }

    fn tend_leased(&mut self, work_id: &str) {
        let now = self.now;
        let Some(item) = self.items.get_mut(work_id) else { return };
        if item.lease.is_lost(now) {
            return self.lose(work_id, "no heartbeat was answered for as long as it lasts");
        }
        if let Some((expected, interval)) = item.lease.beat(now) {
            let within = Duration::from_nanos(interval);
            self.actions.push(Action::Beat { work_id: work_id.to_owned(), expected, within });
        }
        self.end_if_over(work_id);
        let Some(item) = self.items.get_mut(work_id) else { return };
        let session_id = item.session_id.clone();
        if item.is_serving() {
            if item.fetch_at.is_some_and(|at| now >= at) {
                item.fetch_at = None;
                self.actions.push(Action::Fetch { work_id: work_id.to_owned(), session_id });
            }
            self.tend_stream(work_id);
        }
        self.tend_posts(work_id);
    }
}
