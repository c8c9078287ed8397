//! Samples and what is said about them. Pure.

use serde::Serialize;

/// Values of one kind, in the order they were taken.
#[derive(Debug, Clone, Default)]
pub struct Samples {
    values: Vec<f64>,
}

/// What is printed of samples.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    /// Median.
    pub p50: f64,
    /// 99th percentile; with fewer than 100 samples the largest.
    pub p99: f64,
    /// Number of samples.
    pub count: usize,
}

impl Samples {
    /// Adds one.
    pub fn push(&mut self, value: f64) {
        self.values.push(value);
    }

    /// Each of them in another unit.
    #[must_use]
    pub fn map(&self, change: impl Fn(f64) -> f64) -> Self {
        self.values.iter().copied().map(change).collect()
    }

    /// `None` without samples.
    pub fn summary(&self) -> Option<Summary> {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        let count = sorted.len();
        let last = count.checked_sub(1)?;
        let middle = if count % 2 == 1 { sorted[count / 2] } else { (sorted[count / 2 - 1] + sorted[count / 2]) / 2.0 };
        // Nearest rank: the smallest value that 99 of 100 do not exceed.
        let rank = (count * 99).div_ceil(100).max(1) - 1;
        Some(Summary { p50: middle, p99: sorted[rank.min(last)], count })
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<T: IntoIterator<Item = f64>>(values: T) -> Self {
        Self { values: values.into_iter().collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_said_about_no_samples() {
        assert_eq!(Samples::default().summary(), None);
    }

    #[test]
    fn median_lies_between_the_two_middle_values() {
        let samples: Samples = [4.0, 1.0, 2.0, 10.0].into_iter().collect();

        assert_eq!(samples.summary(), Some(Summary { p50: 3.0, p99: 10.0, count: 4 }));
    }

    #[test]
    fn one_outlier_in_a_hundred_is_not_the_99th_percentile() {
        let samples: Samples = (1..=99).map(f64::from).chain([1e9]).collect();

        assert_eq!(samples.summary().map(|summary| summary.p99), Some(99.0));
    }
}
