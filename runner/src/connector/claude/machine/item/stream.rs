//! The events of an item's session: the stream is opened first, then the whole history is read, and only then is anything
//! concluded.

use std::time::Duration;

use tracing::warn;

use crate::connector::claude::board::{Happening, Reason};
use crate::connector::claude::history::{History, MOST_HISTORY};
use crate::connector::claude::machine::{Action, Failure, Machine, Page, SECOND, doubled, nanoseconds};
use crate::connector::claude::wire;

/// Pages of one session's history.
const MOST_PAGES: u32 = 10_000;
/// A stream that was whole for so long has not failed at once.
const HEALTHY_AFTER: u64 = 5 * SECOND;
/// A server that asks for patience gets so much.
const PATIENCE_CEILING: Duration = Duration::from_secs(60);

/// Where the stream of events is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Link {
    Closed { open_at: u64 },
    Opening,
    Listing,
    Live,
}

impl Machine {
    pub(in crate::connector::claude::machine) fn connected(&mut self, work_id: &str, link: u64) {
        let Some(item) = self.items.get_mut(work_id) else { return };
        if item.link != Link::Opening || item.link_number != link {
            return;
        }
        item.link = Link::Listing;
        (item.history, item.page, item.pages) = (History::default(), None, 0);
        item.conversation.connected();
        let (work_id, session_id) = (work_id.to_owned(), item.session_id.clone());
        self.actions.push(Action::List { work_id, session_id, link, page: None });
    }

    pub(in crate::connector::claude::machine) fn listed(
        &mut self,
        work_id: &str,
        link: u64,
        result: Result<Page, Failure>,
    ) {
        let now = self.now;
        let Some(item) = self.items.get_mut(work_id) else { return };
        if item.link != Link::Listing || item.link_number != link {
            return;
        }
        item.pages += 1;
        let leads_on = |page: &Page| page.next.is_none() || page.next != item.page;
        let page = match result {
            // A page that leads to itself has no end.
            Ok(page) if leads_on(&page) && item.pages <= MOST_PAGES => page,
            Ok(_) => {
                self.actions.push(Action::Unstream { work_id: work_id.to_owned() });
                return self.disconnected(work_id, link, Some(&Failure::Malformed));
            }
            // Nothing is concluded from a part of a history: the stream is made again, and then all of it is read.
            Err(failure) => {
                self.actions.push(Action::Unstream { work_id: work_id.to_owned() });
                return self.disconnected(work_id, link, Some(&failure));
            }
        };
        if item.history.add(page.events).is_err() {
            warn!(work_id, "the history of a session is longer than this runner keeps");
            return self.end_item(work_id, Reason::Refused);
        }
        item.page.clone_from(&page.next);
        if let Some(next) = page.next {
            let (work_id, session_id) = (work_id.to_owned(), item.session_id.clone());
            return self.actions.push(Action::List { work_id, session_id, link, page: Some(next) });
        }
        (item.link, item.live_since) = (Link::Live, now);
        let history = item.history.take();
        item.conversation.reconcile(now, history);
        let is_first = !std::mem::replace(&mut item.is_reconciled, true);
        let core = item.core.clone();
        self.carry_out(work_id);
        // What was answered or interrupted meanwhile is cancelled by now, and begins no more.
        if let Some(session_id) = core.filter(|_| is_first) {
            self.grant(&session_id);
        }
    }

    pub(in crate::connector::claude::machine) fn live(&mut self, work_id: &str, link: u64, event: wire::Event) {
        let now = self.now;
        let Some(item) = self.items.get_mut(work_id) else { return };
        if !matches!(item.link, Link::Listing | Link::Live) || item.link_number != link {
            return;
        }
        if !item.conversation.live(now, event) {
            warn!(work_id, "more events came than are kept while a history is read, will read it again");
            self.count(Happening::Overflowed);
            return self.reconnect(work_id);
        }
        if item.link == Link::Live {
            item.link_failures = 0;
        }
        if item.conversation.remembered() > 2 * MOST_HISTORY {
            warn!(work_id, "a session has more events than this runner keeps");
            return self.end_item(work_id, Reason::Refused);
        }
        self.carry_out(work_id);
    }

    pub(in crate::connector::claude::machine) fn disconnected(
        &mut self,
        work_id: &str,
        link: u64,
        failure: Option<&Failure>,
    ) {
        let now = self.now;
        let Some(item) = self.items.get_mut(work_id) else { return };
        if item.link_number != link || matches!(item.link, Link::Closed { .. }) {
            return;
        }
        if let Some(failure) = failure.filter(|failure| failure.is_fatal()) {
            warn!(work_id, error = %failure, "the events of a session are refused");
            item.link = Link::Closed { open_at: u64::MAX };
            return self.end_item(work_id, Reason::Refused);
        }
        if item.link == Link::Live && now.saturating_sub(item.live_since) >= HEALTHY_AFTER {
            item.link_failures = 0;
        }
        let most = doubled(item.link_failures, 0.5, 10.0);
        item.link_failures += 1;
        let asked = failure.and_then(Failure::retry_after).unwrap_or_default().min(PATIENCE_CEILING);
        let open_at = self.within(most / 2.0, most).max(now.saturating_add(nanoseconds(asked)));
        if let Some(item) = self.items.get_mut(work_id) {
            item.link = Link::Closed { open_at };
        }
    }

    /// Closes the stream, and makes it again at once.
    fn reconnect(&mut self, work_id: &str) {
        let Some(item) = self.items.get_mut(work_id) else { return };
        item.link = Link::Closed { open_at: self.now };
        self.actions.push(Action::Unstream { work_id: work_id.to_owned() });
    }

    /// Does for the stream of an item that is served what is due.
    pub(super) fn tend_stream(&mut self, work_id: &str) {
        let now = self.now;
        let Some(item) = self.items.get(work_id) else { return };
        if item.conversation.must_read_again() && item.link == Link::Live {
            self.reconnect(work_id);
        }
        let Some(item) = self.items.get_mut(work_id) else { return };
        if matches!(item.link, Link::Closed { open_at } if now >= open_at) {
            item.link = Link::Opening;
            item.link_number += 1;
            let (session_id, link) = (item.session_id.clone(), item.link_number);
            self.actions.push(Action::Stream { work_id: work_id.to_owned(), session_id, link });
        }
    }
}
