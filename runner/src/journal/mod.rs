//! What must be on disk before something may happen, as a trait, and what is found there by the next runner.
//!
//! A call is written down three times: accepted before its caller hears so, started before its gate opens, finished
//! before its result is sent. Records are a sequence: after any cut a prefix of it is found, so a record vouches for all
//! that were appended before it, and only those are waited for whose loss would break a promise by itself. `Volatile` is
//! the explicit opt-out: it keeps nothing, so calls need no gate.
//!
//! From the top down: `file` queues records for the one thread that writes, `log` appends batches to segments and copies what
//! is `live`, `scan` finds the records that count, `frame` and `codec` are the bytes. All I/O goes through `disk`.

mod codec;
mod copy;
mod disk;
mod file;
mod frame;
mod inspect;
mod live;
mod log;
mod memory;
mod record;
mod scan;
mod segment;

#[cfg(test)]
mod file_tests;
#[cfg(test)]
mod format_tests;
#[cfg(test)]
mod log_tests;
#[cfg(test)]
pub(crate) mod lossy;
#[cfg(test)]
mod oracle;
#[cfg(test)]
mod room_tests;
#[cfg(test)]
mod samples;
#[cfg(test)]
mod simulated;

use std::collections::BTreeMap;
use std::time::Duration;

use crate::work::BoxFuture;
pub use file::{Condition, FileJournal, OpenError};
pub use inspect::{CallReport, RecordReport, Recovery, Report, SegmentReport, SessionReport, inspect};
pub use memory::JournalMemory;
pub use record::{MOST_STARTS, Record, Recovered, RecoveredCall, RecoveredPhase, RecoveredSession};
pub use scan::{ScanError, Unreadable};

/// Why a record could not be written. After a failed write or sync nothing is written any more: it is never repeated. A disk without
/// room is no failure yet while there is ballast.
#[derive(Debug, Clone, thiserror::Error)]
#[error("journal refused a record ({record}): {reason}")]
pub struct JournalError {
    /// Kind of record.
    pub record: &'static str,
    /// What the file system said.
    pub reason: String,
    /// Every later record is refused as well. If not, this one alone was: the disk is slow or full, and nothing builds on it.
    pub is_final: bool,
}

/// Durable memory of calls.
pub trait Journal: Send + Sync {
    /// Whether records outlive the process; if so, calls are held at a gate until their start is written.
    fn is_durable(&self) -> bool;

    /// Appends a record. It has its place in the sequence when this returns; the future resolves when it would survive a
    /// power cut, and may be dropped by those who need no more than the order.
    fn append(&self, record: Record) -> BoxFuture<'static, Result<(), JournalError>>;

    /// How it is, and for how long it has been busy with the present write.
    fn condition(&self) -> (Condition, Duration) {
        (Condition::Good, Duration::ZERO)
    }

    /// What has happened how often since the start, by the names of metrics.
    fn counters(&self) -> BTreeMap<String, u64> {
        BTreeMap::new()
    }
}

/// Keeps nothing beyond the process.
#[derive(Debug, Default)]
pub struct Volatile;

impl Journal for Volatile {
    fn is_durable(&self) -> bool {
        false
    }

    fn append(&self, _record: Record) -> BoxFuture<'static, Result<(), JournalError>> {
        Box::pin(std::future::ready(Ok(())))
    }
}
