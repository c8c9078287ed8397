//! Figures with a fixed limit: what is promised in milliseconds, megabytes or kibibytes and not beside somebody else.

use crate::bench::row::{Row, Statistic, Unit};
use crate::bench::sample::{Samples, Summary};

/// A limit of a median, of a 99th percentile, or of both.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Objective {
    pub(super) p50: Option<f64>,
    pub(super) p99: Option<f64>,
}

impl Objective {
    /// One row for each limit. The limit stands where a floor does, because it is what the figure is divided by.
    pub(super) fn rows(self, goal: &str, what: &str, unit: Unit, samples: &Samples, note: &str) -> Vec<Row> {
        let row = |limit: f64, statistic, name: &str| {
            let limit = Summary { p50: limit, p99: limit, count: 1 };
            let row = Row::new(goal, format!("{what}, {name}"), unit, samples.summary());
            Row { statistic, ..row.floor("the goal itself", Ok(limit), 1.0).note(note) }
        };
        let median = self.p50.map(|limit| row(limit, Statistic::Median, "p50"));
        let tail = self.p99.map(|limit| row(limit, Statistic::Tail, "p99"));
        median.into_iter().chain(tail).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::row::Verdict;

    #[test]
    fn median_and_tail_are_held_to_their_own_limits() {
        let samples: Samples = (1..=100).map(f64::from).collect();
        let objective = Objective { p50: Some(60.0), p99: Some(90.0) };

        let rows = objective.rows("S0", "something", Unit::Milliseconds, &samples, "");

        let verdicts: Vec<_> = rows.iter().map(Row::verdict).collect();
        assert_eq!(verdicts, [Verdict::Met, Verdict::Missed]);
        assert!(rows[1].to_line().contains("something, p99"), "{}", rows[1].to_line());
    }
}
