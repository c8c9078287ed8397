//! What has happened how often since the start, by names that a collector understands.
//!
//! Labels come from closed lists, never from a request, so there are few of them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Shared by those who count and those who show. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Counters(Arc<Mutex<BTreeMap<String, u64>>>);

impl Counters {
    /// Counts one more.
    pub fn add(&self, name: &str, labels: &[(&str, &str)]) {
        self.add_many(name, labels, 1);
    }

    /// Counts so many more.
    pub fn add_many(&self, name: &str, labels: &[(&str, &str)], count: u64) {
        let labels: Vec<_> = labels.iter().map(|(label, value)| format!("{label}=\"{value}\"")).collect();
        let name = if labels.is_empty() { name.to_owned() } else { format!("{name}{{{}}}", labels.join(",")) };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(name).or_default() += count;
    }

    /// All of them, by name.
    #[must_use]
    pub fn all(&self) -> BTreeMap<String, u64> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_have_the_form_that_collectors_read() {
        let counters = Counters::default();
        counters.add("frozen_total", &[]);
        counters.clone().add("refused_total", &[("request", "call"), ("code", "QUEUE_FULL")]);
        counters.add("refused_total", &[("request", "call"), ("code", "QUEUE_FULL")]);
        let expected = [("frozen_total", 1), ("refused_total{request=\"call\",code=\"QUEUE_FULL\"}", 2)];
        assert_eq!(counters.all(), expected.map(|(name, value)| (name.to_owned(), value)).into());
    }
}
