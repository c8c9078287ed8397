//! Asking for work: only with room for it, one question at a time, slower after failures.

use tracing::{error, warn};

use super::item::Item;
use super::{Action, Delivery, Failure, Machine, SECOND, doubled, nanoseconds};
use crate::connector::claude::board::Happening;
use crate::connector::claude::remedy;
use crate::connector::claude::wire::Order;

/// After a refusal for good reasons there is no hurry, but an operator may repair it at any time.
const REFUSED_SECONDS: f64 = 60.0;

#[derive(Debug, Default)]
pub(super) struct Poll {
    pub(super) in_flight: bool,
    pub(super) next_at: u64,
    failures: u32,
}

impl Machine {
    /// A claimed item that nobody serves is worse than one that waits.
    pub(super) fn may_poll(&self) -> bool {
        let taken = self.items.len();
        let is_open = self.restored && !self.takes_no_more() && !self.room.closed;
        let has_room = taken < self.rules.max_items && taken + self.room.others < self.rules.max_sessions;
        is_open && has_room && !self.poll.in_flight
    }

    pub(super) fn polled(&mut self, result: Result<Option<Delivery>, Failure>) {
        self.poll.in_flight = false;
        self.count(told(&result));
        match result {
            Ok(None) => {
                self.poll.failures = 0;
                self.poll.next_at = self.within(1.0, 3.0);
            }
            Ok(Some(delivery)) => {
                self.poll.failures = 0;
                self.poll.next_at = self.now;
                self.delivered(delivery);
            }
            Err(failure) if failure.is_fatal() => {
                let environment_id = &self.rules.environment_id;
                let remedy = remedy::of_queue(&failure);
                error!(environment_id, error = %failure, remedy, "the work queue refuses this runner, will ask again");
                self.poll.next_at = self.within(REFUSED_SECONDS, 2.0 * REFUSED_SECONDS);
            }
            Err(failure) => {
                self.poll.failures += 1;
                let least = doubled(self.poll.failures, 1.0, 60.0);
                let asked = failure.retry_after().map_or(self.now, |after| self.now.saturating_add(nanoseconds(after)));
                self.poll.next_at = self.within(least, least + 1.0).max(asked.min(self.now + 3600 * SECOND));
                let environment_id = &self.rules.environment_id;
                let remedy = remedy::of_queue(&failure);
                warn!(environment_id, error = %failure, remedy, "the work queue cannot be asked, will ask again");
            }
        }
    }

    /// What was refused may be taken now.
    pub(super) fn key_replaced(&mut self) {
        self.poll.next_at = self.poll.next_at.min(self.now);
    }

    fn delivered(&mut self, delivery: Delivery) {
        if self.takes_no_more() {
            return;
        }
        let now = self.now;
        let serves = |item: &Item| matches!(&delivery.order, Order::Session(id) if *id == item.session_id);
        // Without an acknowledgement it is delivered again, when what is here of it may be over. Perhaps it is: what has a
        // lease is delivered to nobody.
        let served = self.items.iter_mut().find(|(work_id, item)| **work_id == delivery.work_id || serves(item));
        if let Some((_, item)) = served {
            item.ask_now(now);
            self.poll.next_at = self.within(1.0, 3.0);
            return;
        }
        let core = match &delivery.order {
            Order::Session(session_id) => self.session_id(session_id).ok(),
            Order::Nothing(kind) => {
                tracing::info!(
                    work_id = delivery.work_id,
                    kind,
                    "a work item that asks for nothing here is given back"
                );
                None
            }
        };
        let session_id = match &delivery.order {
            Order::Session(session_id) => session_id.clone(),
            Order::Nothing(_) => String::new(),
        };
        let work_id = delivery.work_id.clone();
        self.add_item(work_id, Item::new(session_id, core, self.now));
        self.actions.push(Action::Ack(delivery));
    }
}

/// What is counted of an answer to a poll.
fn told(result: &Result<Option<Delivery>, Failure>) -> Happening {
    let (result, problem) = match result {
        Ok(Some(_)) => ("item", String::new()),
        Ok(None) => ("empty", String::new()),
        Err(failure) => {
            let result = if failure.is_fatal() { "refused" } else { "failed" };
            (result, format!("{failure}; {}", remedy::of_queue(failure)))
        }
    };
    Happening::Polled { result, problem }
}
