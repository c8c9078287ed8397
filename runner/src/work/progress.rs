//! Proof of progress: a counter that a loop bumps each time round, and that others compare with what they saw before.
//!
//! It reads no clock. Whoever feeds a watchdog or a lease decides how long standing still is too long; a wedged daemon
//! must lose its lease, not renew it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Shared between one loop and its observers.
#[derive(Debug, Clone, Default)]
pub struct Progress(Arc<AtomicU64>);

impl Progress {
    /// The loop went round once more.
    pub fn tick(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    /// How often the loop went round.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
