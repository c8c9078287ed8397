//! One work item that somebody else has claimed and handed on: it is served, and nothing else is asked for.

use super::item::Item;
use super::{Action, Delivery, Machine};
use crate::connector::claude::wire::Order;

impl Machine {
    /// Serves this item, once what an earlier runner has left is known, and ends with it.
    pub(in crate::connector::claude) fn serve_only(&mut self, delivery: Delivery) {
        (self.claimed, self.is_single) = (Some(delivery), true);
    }

    /// Takes the item that was handed on. Its heartbeats begin at once: whoever handed it on has acknowledged it.
    pub(super) fn take_claimed(&mut self) {
        if !self.restored {
            return;
        }
        let Some(delivery) = self.claimed.take() else { return };
        if self.takes_no_more() {
            return;
        }
        let (session_id, core) = match &delivery.order {
            Order::Session(session_id) => (session_id.clone(), self.session_id(session_id).ok()),
            Order::Nothing(_) => (String::new(), None),
        };
        let item = Item::claimed(session_id, core, self.now);
        self.add_item(delivery.work_id.clone(), item);
        self.actions.push(Action::Take(delivery));
    }
}
