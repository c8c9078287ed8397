//! The task that looks at the host once a second and tells whoever takes work.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tracing::{info, warn};

use super::judge::{Judge, Marks, Reading};
use super::read::read;
use crate::work::{Memory, Pressure, Resource, Trouble, WorkItem};

/// Between two looks.
const EVERY: Duration = Duration::from_secs(1);
/// Descriptors that are held and given back in need: what is written down, and a link that is made again, must not fail.
const HELD_DESCRIPTORS: usize = 16;

/// What is looked at.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// When work is not taken any more.
    pub marks: Marks,
    /// Directories that the runner writes to, and what they hold; none of them: no disk is judged.
    pub places: Vec<(&'static str, PathBuf)>,
}

/// The task, and what it sees. Ends with its handle.
#[derive(Debug)]
pub struct Watch {
    /// How the host stands.
    pub pressure: watch::Receiver<Arc<Pressure>>,
    task: AbortHandle,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Looks once, and then beside the caller: at the host, and whether `memory` has room. Must be called inside a tokio runtime.
#[must_use]
pub fn start(settings: Settings, memory: Arc<dyn Memory>, work: mpsc::Sender<WorkItem>) -> Watch {
    let began = Instant::now();
    let mut looking = Looking { judge: Judge::new(settings.marks), last: Pressure::default(), held: Vec::new() };
    looking.hold();
    // Before anybody can bring work, so the channel has room.
    let first = looking.take(look(Duration::ZERO, &settings.places, &*memory));
    let told = first.as_ref().is_none_or(|item| work.try_send(item.clone()).is_ok());
    let (sender, pressure) = watch::channel(Arc::new(looking.last.clone()));
    let task = tokio::spawn(async move {
        if let Some(item) = first.filter(|_| !told)
            && work.send(item).await.is_err()
        {
            return;
        }
        loop {
            tokio::time::sleep(EVERY).await;
            let (places, memory) = (settings.places.clone(), Arc::clone(&memory));
            // On a thread of its own: a file system may hang.
            let looked = tokio::task::spawn_blocking(move || look(began.elapsed(), &places, &*memory));
            let Ok(reading) = looked.await else { return };
            let item = looking.take(reading);
            sender.send_replace(Arc::new(looking.last.clone()));
            if let Some(item) = item
                && work.send(item).await.is_err()
            {
                return;
            }
        }
    });
    Watch { pressure, task: task.abort_handle() }
}

fn look(at: Duration, places: &[(&'static str, PathBuf)], memory: &dyn Memory) -> Reading {
    let journal_is_full = memory.trouble().0 == Some(Trouble::NoSpace);
    Reading { journal_is_full, ..read(at, places) }
}

struct Looking {
    judge: Judge,
    last: Pressure,
    held: Vec<File>,
}

impl Looking {
    /// What the sessions must hear of this reading, if it is new to them.
    fn take(&mut self, mut reading: Reading) -> Option<WorkItem> {
        if let Some((used, _)) = &mut reading.descriptors {
            // What is held is free, or giving it back would look like relief.
            *used = used.saturating_sub(self.held.len() as u64);
        }
        let now = self.judge.judge(&reading);
        let before = std::mem::replace(&mut self.last, now);
        let degrees = |pressure: &Pressure| -> Vec<_> {
            pressure.shortages.iter().map(|shortage| (shortage.resource, shortage.closed)).collect()
        };
        if degrees(&before) != degrees(&self.last) {
            for shortage in &self.last.shortages {
                let (resource, closed) = (shortage.resource, shortage.closed);
                warn!(
                    ?resource,
                    ?closed,
                    measured = shortage.measured,
                    "host is short of something, new work is refused"
                );
            }
            if self.last.shortages.is_empty() {
                info!("host is short of nothing any more, work is taken");
            }
        }
        if self.last.is_short_of(Resource::Descriptors) {
            self.held.clear();
        } else {
            self.hold();
        }
        (before.shortages != self.last.shortages).then(|| WorkItem::Pressure(Arc::new(self.last.clone())))
    }

    fn hold(&mut self) {
        while self.held.len() < HELD_DESCRIPTORS {
            match File::open("/dev/null") {
                Ok(file) => self.held.push(file),
                // Then they are needed already.
                Err(_) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pressure::judge::Disk;

    fn looking() -> Looking {
        Looking { judge: Judge::new(Marks::default()), last: Pressure::default(), held: Vec::new() }
    }

    #[test]
    fn descriptors_are_held_while_there_are_enough_and_given_back_in_need() {
        let mut looking = looking();
        let at = |used| Reading { descriptors: Some((used, 256)), ..Reading::default() };
        assert!(looking.take(at(50)).is_none());
        assert_eq!(looking.held.len(), HELD_DESCRIPTORS);
        assert!(looking.take(at(200)).is_none(), "what is held is free");
        assert!(looking.take(at(210)).is_some());
        assert!(looking.held.is_empty());
        looking.take(at(194));
        assert!(looking.held.is_empty(), "the same need, with what was held given back");
        looking.take(at(150));
        assert_eq!(looking.held.len(), HELD_DESCRIPTORS);
    }

    #[test]
    fn sessions_hear_of_changes_and_of_nothing_else() {
        let mut looking = looking();
        let at = |free_bytes| {
            let disk = Disk { name: "state", free_bytes, total_bytes: 100 << 30, free_inodes: 0, total_inodes: 0 };
            Reading { disks: vec![disk], ..Reading::default() }
        };
        assert!(looking.take(at(50 << 30)).is_none());
        assert!(looking.take(at(51 << 30)).is_none(), "another number is no shortage");
        assert!(matches!(looking.take(at(5 << 30)), Some(WorkItem::Pressure(now)) if now.is_short_of(Resource::Disk)));
        assert!(looking.take(at(5 << 30)).is_none());
        assert!(matches!(looking.take(at(60 << 30)), Some(WorkItem::Pressure(now)) if now.shortages.is_empty()));
    }
}
