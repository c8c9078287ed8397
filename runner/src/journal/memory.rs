//! What a connector keeps beyond the process: numbers of events that are used up, and the term it has obeyed.

use std::sync::Arc;
use std::time::Duration;

use tracing::error;

use super::{Condition, Journal, Record, Recovered};
use crate::work::{BoxFuture, Memory, Trouble};

/// What a connector has remembered, in the journal of the calls.
pub struct JournalMemory {
    events_through: u64,
    term: u64,
    is_after_reboot: bool,
    journal: Arc<dyn Journal>,
}

impl std::fmt::Debug for JournalMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JournalMemory").field("term", &self.term).finish_non_exhaustive()
    }
}

impl JournalMemory {
    /// What `recovered` says, and from here `journal`.
    #[must_use]
    pub fn new(journal: Arc<dyn Journal>, recovered: &Recovered) -> Self {
        let Recovered { events_through, term, .. } = *recovered;
        // Each process reserves numbers before it dials.
        let is_after_reboot = events_through > 0 && !recovered.same_boot;
        Self { events_through, term, is_after_reboot, journal }
    }

    fn write(&self, record: Record) -> BoxFuture<'static, bool> {
        let written = self.journal.append(record);
        Box::pin(async move {
            let written = written.await;
            if let Err(error) = &written {
                error!(error = error as &dyn std::error::Error, "a record is not in the journal");
            }
            written.is_ok()
        })
    }
}

impl Memory for JournalMemory {
    fn events_through(&self) -> u64 {
        self.events_through
    }

    fn term(&self) -> u64 {
        self.term
    }

    fn is_after_reboot(&self) -> bool {
        self.is_after_reboot
    }

    fn trouble(&self) -> (Option<Trouble>, Duration) {
        let (condition, busy) = self.journal.condition();
        let trouble = match condition {
            Condition::Good => None,
            Condition::OutOfSpace => Some(Trouble::NoSpace),
            Condition::Broken(reason) => Some(Trouble::Broken(reason)),
        };
        (trouble, busy)
    }

    fn reserve_events(&self, through: u64) -> BoxFuture<'static, bool> {
        self.write(Record::Events { through })
    }

    fn obey(&self, term: u64) -> BoxFuture<'static, bool> {
        self.write(Record::Term { term })
    }
}
