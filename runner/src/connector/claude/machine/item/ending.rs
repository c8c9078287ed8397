//! The ways out of a work item: its lease is lost, or it is ended, what is left is answered, and it is given back.

use tracing::{info, warn};

use super::stream::Link;
use super::{Item, Stage};
use crate::connector::claude::board::{Happening, Reason};
use crate::connector::claude::machine::{Action, Failure, Finish, Machine, SECOND};
use crate::work::CancelMode;

/// From the end of an item until it is given back whatever is not posted.
const END_PATIENCE: u64 = 10 * SECOND;
/// How often giving an item back is tried; then its lease runs out.
const STOP_TRIES: u32 = 4;

impl Machine {
    pub(in crate::connector::claude::machine) fn stopped(&mut self, work_id: &str, result: Result<(), Failure>) {
        let now = self.now;
        let Some(item) = self.items.get_mut(work_id) else { return };
        let Stage::Stopping { tries, .. } = item.stage else { return };
        match result {
            Err(failure) if !failure.is_fatal() && failure.status() != Some(409) && tries < STOP_TRIES => {
                let again_at = now.saturating_add(SECOND << tries);
                item.stage = Stage::Stopping { tries, in_flight: false, again_at };
            }
            Err(failure) if failure.status() != Some(409) => {
                warn!(work_id, error = %failure, "a work item could not be given back, its lease will run out");
                self.release(work_id);
            }
            _ => {
                info!(work_id, session_id = item.session_id, "work item given back");
                self.release(work_id);
            }
        }
    }

    /// The item is no longer ours: everything stops, and nothing more is posted.
    pub(super) fn lose(&mut self, work_id: &str, why: &str) {
        if self.items.get(work_id).is_some_and(Item::is_doubtful) {
            // It never was ours. What an earlier runner has begun is found by whoever gets the session next.
            info!(work_id, why, "a work item of an earlier runner has run out, it will be delivered again");
            return self.release(work_id);
        }
        warn!(work_id, why, "the lease of a work item is lost, what runs for it is ended");
        if let Some(item) = self.items.get_mut(work_id) {
            item.reason = Some(Reason::LeaseLost);
        }
        self.cancel_all(work_id);
        self.release(work_id);
    }

    pub(super) fn release(&mut self, work_id: &str) {
        let Some(item) = self.items.remove(work_id) else { return };
        self.changes += 1;
        self.actions.push(Action::Forget { work_id: work_id.to_owned() });
        self.count(Happening::Ended(item.reason.unwrap_or(Reason::Nothing)));
        if let Some(core) = item.core {
            self.let_go(&core);
        }
    }

    fn cancel_all(&mut self, work_id: &str) {
        let Some(session_id) = self.items.get(work_id).and_then(|item| item.core.clone()) else { return };
        for call_id in self.unfinished(&session_id) {
            self.cancel_call(&session_id, call_id, CancelMode::Kill);
        }
    }

    /// Ends an item whose lease is held. What was begun for it is ended and answered first, where an answer is still of use.
    pub(in crate::connector::claude::machine) fn end_item(&mut self, work_id: &str, reason: Reason) {
        let now = self.now;
        let Some(item) = self.items.get_mut(work_id) else { return };
        if !matches!(item.stage, Stage::Serving) {
            return;
        }
        if item.is_doubtful() {
            // Whoever has it goes on.
            return self.release(work_id);
        }
        info!(work_id, session_id = item.session_id, ?reason, "work item ends");
        self.actions.push(Action::Unstream { work_id: work_id.to_owned() });
        item.link = Link::Closed { open_at: u64::MAX };
        (item.fetch_at, item.reason) = (None, Some(reason));
        match reason {
            Reason::Idle | Reason::Waited => self.stop(work_id),
            Reason::SessionOver => {
                item.posts.clear();
                let core = item.core.clone();
                self.cancel_all(work_id);
                if let Some(core) = core {
                    self.session_over(&core);
                }
                self.stop(work_id);
            }
            // The last three are of items that are not served.
            Reason::Stopping
            | Reason::Refused
            | Reason::Shutdown
            | Reason::LeaseLost
            | Reason::NotClaimed
            | Reason::Nothing => {
                item.stage = Stage::Ending { until: now.saturating_add(END_PATIENCE) };
                let waiting = item.conversation.take_waiting();
                for tool_use_id in waiting {
                    self.end_waiting(work_id, &tool_use_id);
                }
                self.cancel_all(work_id);
            }
        }
    }

    pub(super) fn stop(&mut self, work_id: &str) {
        let now = self.now;
        if let Some(item) = self.items.get_mut(work_id) {
            item.posts.clear();
            item.stage = Stage::Stopping { tries: 0, in_flight: false, again_at: now };
        }
    }

    pub(super) fn end_if_over(&mut self, work_id: &str) {
        let now = self.now;
        let Some(item) = self.items.get(work_id) else { return };
        let is_over = |at: Option<u64>| at.is_some_and(|at| now >= at);
        let quiet = item.conversation.is_quiet() && item.posts.is_empty();
        match item.stage {
            Stage::Ending { until } if quiet || now >= until || self.finish == Some(Finish::AtOnce) => {
                self.stop(work_id);
                self.tend_item(work_id);
            }
            Stage::Ending { .. } => {}
            _ if item.conversation.has_ended() => self.end_item_now(work_id, Reason::SessionOver),
            _ if self.must_end() => self.end_item_now(work_id, Reason::Shutdown),
            // What is being emptied takes nothing more, and what it has is finished first.
            _ if self.takes_no_more() && quiet && item.link == Link::Live => {
                self.end_item_now(work_id, Reason::Idle);
            }
            _ if is_over(item.idle_at(&self.rules)) => self.end_item_now(work_id, Reason::Idle),
            _ if is_over(item.waited_at(&self.rules)) => self.end_item_now(work_id, Reason::Waited),
            _ => {}
        }
    }

    fn end_item_now(&mut self, work_id: &str, reason: Reason) {
        self.end_item(work_id, reason);
        self.tend_item(work_id);
    }
}
