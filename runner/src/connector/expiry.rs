//! How near the end of a certificate is, and when to say so again. Pure: the caller brings the clock.
//!
//! A renewal is due after half of the life of a certificate, give or take a tenth, so with less than 40 % left one was missed. What
//! follows are the thresholds at which an operator has less and less time: a quarter left, a tenth or an hour left, none.

use std::fmt;

/// How near the end is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Expiry {
    /// A renewal is not overdue.
    #[default]
    Good,
    /// Less than 40 % of its life are left: a renewal after half of it, give or take a tenth, was missed.
    Late,
    /// Less than 25 % are left.
    Soon,
    /// Less than 10 %, or less than an hour.
    Urgent,
    /// It is over.
    Expired,
}

/// Seconds between two warnings of the same urgency.
const AGAIN_AFTER: i64 = 24 * 3600;
/// Less than this is urgent, however short the life of the certificate is...
const HOUR: i64 = 3600;

impl Expiry {
    /// Of a certificate that is good from `not_before` to `not_after`; all in seconds since 1970.
    #[must_use]
    pub fn of(not_before: i64, not_after: i64, now: i64) -> Self {
        let life = not_after.saturating_sub(not_before).max(1);
        let left = not_after.saturating_sub(now);
        let less_than = |percent: i64| left.saturating_mul(100) < life.saturating_mul(percent);
        // ...but not while a certificate that lives for an hour or two is young.
        let hour = left < HOUR && less_than(40);
        match left {
            ..=0 => Self::Expired,
            _ if less_than(10) || hour => Self::Urgent,
            _ if less_than(25) => Self::Soon,
            _ if less_than(40) => Self::Late,
            _ => Self::Good,
        }
    }

    /// Whether an operator must hear of it.
    #[must_use]
    pub fn is_alarm(self) -> bool {
        self >= Self::Soon
    }

    /// Whether the runner is about to lose its link, or could not make a new one: work is better placed elsewhere. While there
    /// is more time than that, a warning is enough.
    #[must_use]
    pub fn is_degraded(self) -> bool {
        self >= Self::Urgent
    }
}

impl fmt::Display for Expiry {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Good => "good",
            Self::Late => "its renewal is late",
            Self::Soon => "it ends soon",
            Self::Urgent => "it is about to end",
            Self::Expired => "it has expired",
        })
    }
}

/// Remembers what was said, so that it is said when it changes and once a day.
#[derive(Debug, Default)]
pub struct Announcer {
    said: Expiry,
    at: i64,
}

impl Announcer {
    /// Whether `expiry` is to be said at `now`, in seconds since 1970.
    pub fn is_news(&mut self, expiry: Expiry, now: i64) -> bool {
        let again = expiry != Expiry::Good && now.saturating_sub(self.at) >= AGAIN_AFTER;
        let news = expiry > self.said || again;
        if news {
            self.at = now;
        }
        self.said = expiry;
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: i64 = 24 * 3600;

    #[test]
    fn thresholds_are_parts_of_the_life_of_the_certificate() {
        for (left, expected) in [
            (100 * DAY, Expiry::Good),
            (40 * DAY, Expiry::Good),
            (40 * DAY - 1, Expiry::Late),
            (25 * DAY, Expiry::Late),
            (25 * DAY - 1, Expiry::Soon),
            (10 * DAY, Expiry::Soon),
            (10 * DAY - 1, Expiry::Urgent),
            (1, Expiry::Urgent),
            (0, Expiry::Expired),
            (-DAY, Expiry::Expired),
        ] {
            assert_eq!(Expiry::of(0, 100 * DAY, 100 * DAY - left), expected, "{left} s left");
        }
    }

    #[test]
    fn a_quarter_left_is_an_alarm_and_only_a_tenth_an_hour_or_nothing_left_is_ill_health() {
        let all = [Expiry::Good, Expiry::Late, Expiry::Soon, Expiry::Urgent, Expiry::Expired];
        assert_eq!(all.map(Expiry::is_alarm), [false, false, true, true, true]);
        assert_eq!(all.map(Expiry::is_degraded), [false, false, false, true, true]);
    }

    #[test]
    fn last_hour_of_a_day_is_urgent_and_a_young_certificate_of_an_hour_is_not() {
        assert_eq!(Expiry::of(0, DAY, DAY - 3 * HOUR), Expiry::Soon);
        assert_eq!(Expiry::of(0, 5 * HOUR, 4 * HOUR + 1), Expiry::Urgent);
        assert_eq!(Expiry::of(0, HOUR, 60), Expiry::Good);
        assert_eq!(Expiry::of(0, HOUR, HOUR / 2 + HOUR / 5), Expiry::Urgent);
    }

    #[test]
    fn warning_comes_with_each_threshold_and_then_daily_until_the_certificate_is_replaced() {
        let mut announcer = Announcer::default();
        assert!(!announcer.is_news(Expiry::Good, 0));
        assert!(announcer.is_news(Expiry::Soon, 100));
        assert!(!announcer.is_news(Expiry::Soon, 100 + DAY - 1));
        assert!(announcer.is_news(Expiry::Soon, 100 + DAY));
        assert!(announcer.is_news(Expiry::Urgent, 101 + DAY));
        assert!(!announcer.is_news(Expiry::Good, 102 + DAY));
        assert!(announcer.is_news(Expiry::Soon, 103 + DAY));
    }
}
