//! The lease of one work item: when to beat, and until when it can be counted on. Pure; times are CLOCK_BOOTTIME in
//! nanoseconds, because a lease goes on while the machine sleeps.
//!
//! A beat swaps the text of the one before it, so of two runners that hold the same item one is refused. What counts is the
//! moment at which a beat was sent: the server may have taken it at once.

use super::wire::Beat;

/// Sent with the first beat.
pub(super) const NO_HEARTBEAT: &str = "NO_HEARTBEAT";
/// What is assumed before the server has said how long a lease is.
const FIRST_TTL: u64 = 90 * SECOND;
const FIRST_INTERVAL: u64 = 30 * SECOND;
const SHORTEST_INTERVAL: u64 = SECOND;
const INTERVAL_CEILING: u64 = 30 * SECOND;
/// After a beat that got no answer.
const AGAIN_AFTER: u64 = SECOND;

pub(super) const SECOND: u64 = 1_000_000_000;

#[derive(Debug)]
pub(super) struct Lease {
    expected: String,
    ttl: u64,
    interval: u64,
    until: u64,
    next_at: u64,
    in_flight: bool,
    held: bool,
}

impl Lease {
    /// The item was acknowledged at `now`; the first beat is due at once.
    pub(super) fn new(now: u64) -> Self {
        Self {
            expected: NO_HEARTBEAT.to_owned(),
            ttl: FIRST_TTL,
            interval: FIRST_INTERVAL,
            until: now.saturating_add(FIRST_TTL),
            next_at: now,
            in_flight: false,
            held: false,
        }
    }

    /// An earlier runner held it, and has left the text of its last heartbeat. Whether that is still so, the first beat tells.
    pub(super) fn left(now: u64, last_heartbeat: String, ttl_seconds: u64) -> Self {
        let ttl = ttl_seconds.saturating_mul(SECOND);
        Self { expected: last_heartbeat, ttl, until: now.saturating_add(ttl), ..Self::new(now) }
    }

    /// The text of the last heartbeat that was taken, by whatever runner.
    pub(super) fn last_heartbeat(&self) -> Option<&str> {
        (self.expected != NO_HEARTBEAT).then_some(self.expected.as_str())
    }

    /// There is reason to ask whether it is still ours.
    pub(super) fn ask_now(&mut self, now: u64) {
        self.next_at = self.next_at.min(now);
    }

    /// The text to swap and the time for the request, when a beat is due.
    pub(super) fn beat(&mut self, now: u64) -> Option<(String, u64)> {
        if self.in_flight || now < self.next_at {
            return None;
        }
        self.in_flight = true;
        Some((self.expected.clone(), self.interval))
    }

    /// A beat that was sent at `sent` was taken. `draw` is random in 0..=1.
    pub(super) fn beaten(&mut self, sent: u64, beat: &Beat, draw: f64) {
        (self.in_flight, self.held) = (false, true);
        self.expected.clone_from(&beat.last_heartbeat);
        if let Some(seconds) = beat.ttl_seconds {
            self.ttl = seconds.saturating_mul(SECOND);
            self.interval = (self.ttl / 2).clamp(SHORTEST_INTERVAL, INTERVAL_CEILING);
        }
        self.until = sent.saturating_add(self.ttl);
        // Runners that began together do not beat together for ever.
        let tenth = std::time::Duration::from_nanos(self.interval / 10).mul_f64(draw.clamp(0.0, 1.0) * 2.0);
        let jitter = u64::try_from(tenth.as_nanos()).unwrap_or(0);
        self.next_at = sent.saturating_add(self.interval - self.interval / 10).saturating_add(jitter);
    }

    /// A beat got no answer of use; whether it was taken is not known.
    pub(super) fn unanswered(&mut self, now: u64) {
        self.in_flight = false;
        self.next_at = now.saturating_add(AGAIN_AFTER);
    }

    /// Somebody else may hold the item from now on.
    pub(super) fn is_lost(&self, now: u64) -> bool {
        now >= self.until
    }

    /// A beat was taken.
    pub(super) fn is_held(&self) -> bool {
        self.held
    }

    pub(super) fn until(&self) -> u64 {
        self.until
    }

    /// How long it lasts.
    pub(super) fn ttl(&self) -> u64 {
        self.ttl
    }

    /// When to look again.
    pub(super) fn wake(&self) -> u64 {
        if self.in_flight { self.until } else { self.next_at.min(self.until) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(text: &str, ttl_seconds: u64) -> Beat {
        Beat { last_heartbeat: text.to_owned(), ttl_seconds: Some(ttl_seconds), goes_on: true }
    }

    #[test]
    fn first_beat_is_due_at_once_and_each_swaps_the_text_before_it() {
        let mut lease = Lease::new(5 * SECOND);
        assert_eq!(lease.beat(5 * SECOND), Some((NO_HEARTBEAT.to_owned(), FIRST_INTERVAL)));
        assert_eq!(lease.beat(6 * SECOND), None, "one at a time");
        lease.beaten(5 * SECOND, &answer("2026-01-01T00:00:00.1+00:00", 120), 0.5);
        assert_eq!(lease.beat(34 * SECOND), None);
        assert_eq!(lease.beat(35 * SECOND).map(|(text, _)| text), Some("2026-01-01T00:00:00.1+00:00".to_owned()));
    }

    #[test]
    fn interval_is_half_of_the_lease_within_bounds_and_a_tenth_of_jitter() {
        for (ttl, seconds) in [(1, 1), (4, 2), (30, 15), (60, 30), (600, 30)] {
            let mut lease = Lease::new(0);
            lease.beat(0);
            for draw in [0.0, 1.0, 7.0] {
                lease.beaten(0, &answer("t", ttl), draw);
                let tenth = seconds * SECOND / 10;
                assert!((seconds * SECOND - tenth..=seconds * SECOND + tenth).contains(&lease.next_at), "{ttl}");
            }
        }
    }

    #[test]
    fn lease_counts_from_the_moment_a_beat_was_sent() {
        let mut lease = Lease::new(0);
        lease.beat(0);
        lease.beaten(10 * SECOND, &answer("t", 20), 0.5);
        assert!(!lease.is_lost(30 * SECOND - 1) && lease.is_lost(30 * SECOND));
    }

    #[test]
    fn unanswered_beats_are_sent_again_and_prolong_nothing() {
        let mut lease = Lease::new(0);
        lease.beat(0);
        lease.unanswered(2 * SECOND);
        assert_eq!(lease.beat(2 * SECOND), None);
        assert_eq!(lease.beat(3 * SECOND).map(|(text, _)| text), Some(NO_HEARTBEAT.to_owned()));
        lease.unanswered(4 * SECOND);
        assert!(!lease.is_lost(FIRST_TTL - 1) && lease.is_lost(FIRST_TTL));
    }
}
