//! How long this runner may start things without hearing from the orchestrator. Pure: the caller brings the clock, which
//! must be one that counts while the machine sleeps.

use std::collections::VecDeque;
use std::time::Duration;

/// Heartbeats that may be under way; older ones are given up.
const PENDING: usize = 64;

/// The lease.
#[derive(Debug)]
pub(super) struct Lease {
    ttl: Duration,
    next_seq: u64,
    sent: VecDeque<(u64, u64)>,
    expires_ns: Option<u64>,
}

impl Lease {
    pub(super) fn new() -> Self {
        Self { ttl: Duration::from_secs(30), next_seq: 1, sent: VecDeque::new(), expires_ns: None }
    }

    /// A link was opened with a Hello sent at `sent_ns`.
    pub(super) fn welcomed(&mut self, sent_ns: u64, ttl: Option<Duration>) {
        self.ttl = ttl.filter(|ttl| !ttl.is_zero()).unwrap_or(self.ttl);
        self.sent.clear();
        self.extend(sent_ns);
    }

    /// Number for a heartbeat that is sent at `now_ns`.
    pub(super) fn beat(&mut self, now_ns: u64) -> u64 {
        let seq = self.next_seq;
        self.next_seq += 1;
        if self.sent.len() >= PENDING {
            self.sent.pop_front();
        }
        self.sent.push_back((seq, now_ns));
        seq
    }

    /// A heartbeat was answered: the lease counts from the moment it was sent.
    pub(super) fn acknowledged(&mut self, seq: u64, ttl: Option<Duration>) {
        let Some(position) = self.sent.iter().position(|(sent, _)| *sent == seq) else { return };
        self.ttl = ttl.filter(|ttl| !ttl.is_zero()).unwrap_or(self.ttl);
        let (_, sent_ns) = self.sent[position];
        self.sent.drain(..=position);
        self.extend(sent_ns);
    }

    fn extend(&mut self, sent_ns: u64) {
        let until = sent_ns.saturating_add(u64::try_from(self.ttl.as_nanos()).unwrap_or(u64::MAX));
        self.expires_ns = Some(self.expires_ns.map_or(until, |before| before.max(until)));
    }

    /// Until when the lease holds, if there is one.
    pub(super) fn until_ns(&self) -> Option<u64> {
        self.expires_ns
    }

    /// Whether there was a lease and it has lapsed.
    pub(super) fn has_lapsed(&self, now_ns: u64) -> bool {
        self.expires_ns.is_some_and(|until| now_ns >= until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn lease_counts_from_the_moment_the_heartbeat_was_sent() {
        let mut lease = Lease::new();
        lease.welcomed(0, Some(Duration::from_secs(30)));
        let seq = lease.beat(10 * SECOND);
        lease.acknowledged(seq, None);
        assert!(!lease.has_lapsed(40 * SECOND - 1) && lease.has_lapsed(40 * SECOND));
    }

    #[test]
    fn late_or_unknown_answers_never_shorten_or_invent_a_lease() {
        let mut lease = Lease::new();
        assert!(!lease.has_lapsed(u64::MAX));
        lease.acknowledged(7, None);
        assert!(!lease.has_lapsed(u64::MAX));
        lease.welcomed(100 * SECOND, None);
        let first = lease.beat(101 * SECOND);
        let second = lease.beat(110 * SECOND);
        lease.acknowledged(second, None);
        lease.acknowledged(first, None);
        assert!(!lease.has_lapsed(139 * SECOND) && lease.has_lapsed(140 * SECOND));
    }
}
