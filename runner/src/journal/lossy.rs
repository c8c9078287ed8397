//! A journal on a simulated disk, without a thread of its own: the simulation says when a batch is written, at which
//! operation its process dies, and when the power fails.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::oneshot;

use super::live::Step;
use super::log::{Entry, Log, LogOpenError, Sizes};
use super::segment::Identity;
use super::simulated::{Fault, SimulatedDisk};
use super::{Condition, Journal, JournalError, Record, Recovered, codec};
use crate::work::BoxFuture;

/// Small, so that segments are begun and copied all the time.
const SIZES: Sizes = Sizes { segment: 16 << 10, ballast: 1 << 10, closed: 2 };
/// No fault comes after so many operations.
const NEVER: usize = usize::MAX;

/// The disk of a machine, and which start of the machine this is.
#[derive(Debug, Clone, Default)]
pub(crate) struct Machine {
    disk: SimulatedDisk,
    boot: u32,
    /// The disk says that it has synced, and has not.
    pub(crate) syncs_nothing: bool,
}

impl Machine {
    /// Opens the journal; with `dies_at` the process dies at that operation, and then there is none.
    pub(crate) fn open(&self, dies_at: Option<usize>) -> Result<Option<(Arc<LossyJournal>, Recovered)>, String> {
        let identity = Identity { state_id: "simulated".into(), boot_id: format!("boot-{}", self.boot) };
        self.disk.set_lies(self.syncs_nothing);
        self.disk.set_fault(Fault::Everything(dies_at.unwrap_or(NEVER)));
        match Log::open(self.disk.clone(), identity, SIZES) {
            Ok((log, recovered)) => {
                self.disk.set_fault(Fault::Everything(NEVER));
                let inner = Inner { log, entries: Vec::new(), done: Vec::new(), broken: None };
                let journal = LossyJournal { inner: Mutex::new(inner), disk: self.disk.clone() };
                Ok(Some((Arc::new(journal), recovered)))
            }
            Err(_) if dies_at.is_some() => Ok(None),
            Err(LogOpenError::Scan(error)) => Err(format!("the journal cannot be read: {error:?}")),
            Err(LogOpenError::Log(error)) => Err(format!("the journal cannot be begun: {error:?}")),
        }
    }

    /// What is there when only a process has died.
    pub(crate) fn after_process_crash(&self) -> Self {
        Self { disk: self.disk.after_process_crash(), ..*self }
    }

    /// What is there when the power has failed; `keeps` decides about everything that was not synced.
    pub(crate) fn after_power_cut(&self, keeps: impl FnMut(usize) -> usize) -> Self {
        Self { disk: self.disk.after_power_cut(keeps), boot: self.boot + 1, ..*self }
    }
}

struct Inner {
    log: Log<SimulatedDisk>,
    entries: Vec<Entry>,
    done: Vec<oneshot::Sender<Result<(), String>>>,
    broken: Option<String>,
}

/// The journal.
pub(crate) struct LossyJournal {
    inner: Mutex<Inner>,
    disk: SimulatedDisk,
}

impl LossyJournal {
    /// Writes up to `most` of what waits as one batch.
    pub(crate) fn write(&self, most: usize) {
        let mut inner = self.inner.lock().unwrap();
        let count = inner.entries.len().min(most);
        if count == 0 || inner.broken.is_some() {
            return;
        }
        let rest = inner.entries.split_off(count);
        let entries = std::mem::replace(&mut inner.entries, rest);
        let rest = inner.done.split_off(count);
        let mut done = std::mem::replace(&mut inner.done, rest).into_iter();
        let written = inner.log.append(&entries, |count| {
            for done in done.by_ref().take(count) {
                // Nobody may be waiting for it.
                let _ = done.send(Ok(()));
            }
        });
        let Err(error) = written else { return };
        let reason = format!("{error}: {}", error.source);
        inner.broken = Some(reason.clone());
        let waiting = std::mem::take(&mut inner.done);
        inner.entries.clear();
        for done in done.chain(waiting) {
            // As above.
            let _ = done.send(Err(reason.clone()));
        }
    }

    /// The next sync fails, once.
    pub(crate) fn fail_sync(&self) {
        self.disk.set_fault(Fault::Sync(0));
    }

    /// The process dies at that operation of writing what waits. Whatever it has written is on its way to the disk.
    pub(crate) fn die(&self, operation: usize) {
        let mut inner = self.inner.lock().unwrap();
        if inner.broken.is_some() {
            return;
        }
        let entries = std::mem::take(&mut inner.entries);
        self.disk.set_fault(Fault::Everything(operation));
        // Nobody is left who could hear of it.
        let _ = inner.log.append(&entries, |_| {});
    }

    /// Records that wait to be written.
    pub(crate) fn waiting(&self) -> usize {
        self.inner.lock().unwrap().entries.len()
    }

    /// Whether nothing is written any more.
    pub(crate) fn is_broken(&self) -> bool {
        self.inner.lock().unwrap().broken.is_some()
    }
}

impl Journal for LossyJournal {
    fn is_durable(&self) -> bool {
        true
    }

    fn append(&self, record: Record) -> BoxFuture<'static, Result<(), JournalError>> {
        let kind = record.kind();
        let failed = move |reason| JournalError { record: kind, reason, is_final: true };
        let mut inner = self.inner.lock().unwrap();
        if let Some(reason) = inner.broken.clone() {
            return Box::pin(std::future::ready(Err(failed(reason))));
        }
        let payload = codec::encode(&record).expect("nothing of a record can make it fail");
        let (done, result) = oneshot::channel();
        inner.entries.push(Entry { step: Step::of(&record), payload });
        inner.done.push(done);
        Box::pin(async move {
            let result = result.await.unwrap_or_else(|_| Err("the process has died".into()));
            result.map_err(failed)
        })
    }

    fn condition(&self) -> (Condition, Duration) {
        let broken = self.inner.lock().unwrap().broken.clone();
        (broken.map_or(Condition::Good, Condition::Broken), Duration::ZERO)
    }
}
