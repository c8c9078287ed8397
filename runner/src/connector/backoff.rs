//! How long to wait before dialling again: windowed full jitter. Pure: the caller brings the randomness.
//!
//! A window doubles with each failure and the delay is drawn from all of it, so that a thousand runners that lost the
//! same orchestrator do not come back together. The window shrinks back only after a link that lived for a while:
//! an orchestrator that accepts and drops at once is as broken as one that refuses.

use std::time::Duration;

/// Delays between attempts.
#[derive(Debug, Clone)]
pub struct Backoff {
    least: Duration,
    most: Duration,
    window: Duration,
}

/// A link that lived this long was a good one.
pub const GOOD_LINK: Duration = Duration::from_secs(30);

impl Default for Backoff {
    fn default() -> Self {
        Self::new(Duration::from_millis(500), Duration::from_secs(30))
    }
}

impl Backoff {
    /// Windows from `least` to `most`.
    #[must_use]
    pub fn new(least: Duration, most: Duration) -> Self {
        Self { least, most, window: least }
    }

    /// The delay before the next attempt. `draw` is random in 0..=1.
    pub fn next_delay(&mut self, draw: f64) -> Duration {
        let delay = self.window.mul_f64(draw.clamp(0.0, 1.0));
        self.window = self.window.saturating_mul(2).min(self.most);
        delay
    }

    /// Takes note of how long a link lived.
    pub fn link_lived(&mut self, lived: Duration) {
        if lived >= GOOD_LINK {
            self.window = self.least;
        }
    }
}

/// A random number in 0..=1, good enough to spread retries.
#[must_use]
pub fn draw() -> f64 {
    let [a, b, c, d, ..] = *uuid::Uuid::new_v4().as_bytes();
    f64::from(u32::from_le_bytes([a, b, c, d])) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn window_doubles_to_its_most_and_shrinks_only_after_a_good_link() {
        let mut backoff = Backoff::default();
        let delays: Vec<_> = (0..8).map(|_| backoff.next_delay(1.0).as_millis()).collect();
        assert_eq!(delays, [500, 1000, 2000, 4000, 8000, 16000, 30000, 30000]);
        backoff.link_lived(Duration::from_secs(29));
        assert_eq!(backoff.next_delay(1.0), Duration::from_secs(30));
        backoff.link_lived(Duration::from_secs(30));
        assert_eq!(backoff.next_delay(1.0), Duration::from_millis(500));
    }

    /// F-64: the bound on attempts, with the usual delays and an orchestrator that is away for five minutes.
    #[test]
    fn five_hundred_runners_ask_at_most_fifty_times_in_a_second_and_are_all_back_after_the_longest_delay() {
        const AWAY: Duration = Duration::from_secs(300);
        let mut seed = 7_u64;
        let mut draw = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            f64::from(u32::try_from(seed >> 32).unwrap()) / f64::from(u32::MAX)
        };
        let mut attempts = vec![0_u32; 332];
        for _ in 0..500 {
            let (mut backoff, mut now) = (Backoff::default(), Duration::ZERO);
            while now < AWAY {
                now += backoff.next_delay(draw());
                attempts[usize::try_from(now.as_secs()).unwrap()] += 1;
            }
            assert!(now <= AWAY + Duration::from_secs(30), "back only after {now:?}");
        }
        // All lose their link in the same moment, and try again at once.
        assert!(attempts[0] < 1250, "{} in the first second", attempts[0]);
        let later = attempts[60..].iter().max().unwrap();
        assert!(*later <= 50, "{later} in one second after the first minute");
    }

    proptest! {
        #[test]
        fn delay_is_always_within_the_window(draws in proptest::collection::vec(-1.0_f64..2.0, 1..40)) {
            let mut backoff = Backoff::default();
            for draw in draws {
                prop_assert!(backoff.next_delay(draw) <= Duration::from_secs(30));
            }
        }
    }
}
