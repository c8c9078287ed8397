//! Events that the orchestrator has not acknowledged, in order, with their numbers. Pure.
//!
//! An event keeps its number on every link, so a repeat is recognised. Nothing is ever dropped: when the bound is
//! reached, new work is refused until something is acknowledged.

use std::collections::VecDeque;

use prost::Message;
use proto::runner::v1::runner_frame::Body;

use crate::work::CallId;

/// Numbers that are reserved at once.
const RESERVE: u64 = 16_384;

/// Bound on what is kept.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bound {
    pub(super) events: usize,
    pub(super) bytes: usize,
}

impl Default for Bound {
    fn default() -> Self {
        Self { events: 100_000, bytes: 64 * 1024 * 1024 }
    }
}

#[derive(Debug)]
struct Event {
    seq: u64,
    body: Body,
    bytes: usize,
    /// Set for the end of a call: its acknowledgement has consequences.
    finished: Option<CallId>,
}

/// The events.
#[derive(Debug)]
pub(super) struct Outbox {
    bound: Bound,
    events: VecDeque<Event>,
    next_seq: u64,
    bytes: usize,
    /// First event that was not sent on the present link.
    cursor: u64,
    /// Numbers up to here are reserved: no later process will use them for something else.
    reserved: u64,
}

impl Outbox {
    /// `used` is the highest number that an earlier process may have used.
    pub(super) fn new(bound: Bound, used: u64) -> Self {
        let next = used.saturating_add(1);
        Self { bound, events: VecDeque::new(), next_seq: next, bytes: 0, cursor: next, reserved: used }
    }

    /// Numbers that should be reserved now, if any: long before they are needed, so that nothing waits for them.
    pub(super) fn to_reserve(&self) -> Option<u64> {
        (self.reserved < self.next_seq.saturating_add(RESERVE / 2)).then(|| self.next_seq.saturating_add(RESERVE))
    }

    /// Numbers up to `through` may be used.
    pub(super) fn reserve(&mut self, through: u64) {
        self.reserved = self.reserved.max(through);
    }

    /// Adds an event made by `build` from its number.
    pub(super) fn push(&mut self, finished: Option<CallId>, build: impl FnOnce(u64) -> Body) {
        let seq = self.next_seq;
        self.next_seq += 1;
        let body = build(seq);
        let bytes = size_of_body(&body);
        self.bytes += bytes;
        self.events.push_back(Event { seq, body, bytes, finished });
    }

    /// Forgets events up to and including `through`; returns the calls whose end was among them. A number that was
    /// never given acknowledges nothing beyond what exists.
    pub(super) fn acknowledge(&mut self, through: u64) -> Vec<CallId> {
        let mut finished = Vec::new();
        while self.events.front().is_some_and(|event| event.seq <= through) {
            if let Some(event) = self.events.pop_front() {
                self.bytes -= event.bytes;
                finished.extend(event.finished);
            }
        }
        finished
    }

    /// Starts again from the first event that is not acknowledged.
    pub(super) fn rewind(&mut self) {
        self.cursor = self.first_unacked();
    }

    /// The next event to send on this link.
    pub(super) fn next_to_send(&mut self) -> Option<Body> {
        let first = self.first_unacked();
        self.cursor = self.cursor.max(first);
        if self.cursor > self.reserved {
            return None;
        }
        let index = usize::try_from(self.cursor - first).ok()?;
        let body = self.events.get(index)?.body.clone();
        self.cursor += 1;
        Some(body)
    }

    pub(super) fn has_unsent(&self) -> bool {
        let next = self.cursor.max(self.first_unacked());
        next < self.next_seq && next <= self.reserved
    }

    pub(super) fn is_full(&self) -> bool {
        self.events.len() >= self.bound.events || self.bytes >= self.bound.bytes
    }

    pub(super) fn len(&self) -> usize {
        self.events.len()
    }

    pub(super) fn first_unacked(&self) -> u64 {
        self.events.front().map_or(self.next_seq, |event| event.seq)
    }

    pub(super) fn next_seq(&self) -> u64 {
        self.next_seq
    }
}

fn size_of_body(body: &Body) -> usize {
    match body {
        Body::CallFinished(message) => message.encoded_len(),
        Body::SessionOpened(message) => message.encoded_len(),
        Body::SessionEnded(message) => message.encoded_len(),
        _ => 64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proto::runner::v1::CallAccepted;

    fn outbox(bound: Bound) -> Outbox {
        let mut outbox = Outbox::new(bound, 0);
        outbox.reserve(RESERVE);
        outbox
    }

    fn accepted(seq: u64) -> Body {
        Body::CallAccepted(CallAccepted { event_seq: seq, ..Default::default() })
    }

    fn seq_of(body: &Body) -> u64 {
        match body {
            Body::CallAccepted(message) => message.event_seq,
            other => panic!("unexpected {other:?}"),
        }
    }

    #[test]
    fn acknowledged_calls_are_named_once() {
        let mut outbox = outbox(Bound::default());
        let call = CallId::new("c").unwrap();
        outbox.push(None, accepted);
        outbox.push(Some(call.clone()), accepted);
        assert!(outbox.acknowledge(1).is_empty());
        assert_eq!(outbox.acknowledge(2), [call]);
        assert!(outbox.acknowledge(2).is_empty());
    }

    #[test]
    fn full_outbox_says_so_and_drops_nothing() {
        let mut outbox = outbox(Bound { events: 2, bytes: 1 << 20 });
        (0..3).for_each(|_| outbox.push(None, accepted));
        assert!(outbox.is_full() && outbox.len() == 3);
        outbox.acknowledge(2);
        assert!(!outbox.is_full());
    }

    #[test]
    fn no_event_leaves_under_a_number_that_a_later_process_could_use_again() {
        let mut outbox = Outbox::new(Bound::default(), 41);
        outbox.push(None, accepted);
        assert!(!outbox.has_unsent() && outbox.next_to_send().is_none(), "nothing is reserved yet");
        let through = outbox.to_reserve().unwrap();
        outbox.reserve(through);
        assert_eq!(outbox.next_to_send().as_ref().map(seq_of), Some(42));
        assert_eq!(outbox.to_reserve(), None);
        (0..RESERVE).for_each(|_| outbox.push(None, accepted));
        assert!(outbox.to_reserve().is_some());
    }

    proptest! {
        /// Whatever is pushed, sent, acknowledged and cut in whatever order: each link sees the unacknowledged events in
        /// order, without gaps and without repeats.
        #[test]
        fn every_link_sees_unacknowledged_events_in_order(steps in proptest::collection::vec(0_u8..4, 1..200)) {
            let mut outbox = outbox(Bound::default());
            let (mut pushed, mut acked, mut sent) = (0_u64, 0_u64, 0_u64);
            for step in steps {
                match step {
                    0 => { outbox.push(None, accepted); pushed += 1; }
                    1 => if let Some(body) = outbox.next_to_send() {
                        sent = sent.max(acked) + 1;
                        prop_assert_eq!(seq_of(&body), sent);
                    } else {
                        prop_assert_eq!(sent.max(acked), pushed);
                    },
                    2 => { acked = (acked + 2).min(pushed); outbox.acknowledge(acked); }
                    _ => { outbox.rewind(); sent = acked; }
                }
                prop_assert_eq!(outbox.len() as u64, pushed - acked);
                prop_assert_eq!(outbox.has_unsent(), sent.max(acked) < pushed);
            }
        }
    }
}
