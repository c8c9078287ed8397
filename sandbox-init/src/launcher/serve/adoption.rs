//! Privileged: CAP_KILL over what an earlier launcher left.
//!
//! What outlives this process: the state file names the sandboxes that the next launcher adopts. What it cannot adopt it
//! kills by its group and removes.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use super::process::{Memory, Phase, Process, Unwatched};
use super::{Event, Launcher};
use crate::launcher::background::{Order, leftover_names};
use crate::launcher::cgroup::Mode;
use crate::launcher::ids::Slot;
use crate::launcher::shape::Shape;
use crate::launcher::state::{self, Record};

impl Launcher<'_> {
    /// Takes over what an earlier launcher left: living sandboxes are adopted, everything else of ours is killed and removed.
    pub(super) fn adopt(&mut self) {
        if self.embedded {
            return;
        }
        let mut known = Vec::new();
        for record in if self.adopts() { state::load() } else { Vec::new() } {
            known.push(record.name.clone());
            let slot = self.parts.slots.adopt(record.slot);
            let found = state::find(&record)
                .filter(|_| state::is_in_its_group(&record) || self.parts.tree.mode() == Mode::None);
            let (pidfd, slot) = match (found, slot) {
                (Some(pidfd), Some(slot)) => (pidfd, slot),
                (_, slot) => {
                    // It died while nobody looked: what it left is removed below, its ids are free.
                    known.pop();
                    if let Some(slot) = slot {
                        self.parts.slots.release(slot);
                    }
                    continue;
                }
            };
            self.take_over(record, pidfd, slot);
        }
        let mut left = self.parts.tree.names("s-");
        left.extend(leftover_names("s-", &self.parts.places));
        left.sort();
        left.dedup();
        for name in left.into_iter().filter(|name| !known.contains(name)) {
            self.order(&Order { remove: name, ..Order::default() }, None);
        }
        self.store();
    }

    /// Adopts a living sandbox. One that cannot be watched would live on without anybody who ends it, so it is killed.
    fn take_over(&mut self, record: Record, pidfd: OwnedFd, slot: Slot) {
        let number = self.number();
        if self.watch(&pidfd, Event::Ended(number)).is_err() {
            let Record { name, pid, .. } = record;
            return self.kill_unwatched(Unwatched { name, slot, pid, pidfd: Some(pidfd) });
        }
        let process = Process {
            name: record.name.clone(),
            pid: record.pid,
            pidfd,
            boot: None,
            blank: None,
            mounts: None,
            slot,
            phase: Phase::Ready { sandbox_id: record.sandbox_id.clone() },
            adopted: true,
            record: Some(record),
            memory: Memory::default(),
            killed: VecDeque::new(),
        };
        self.processes.insert(number, process);
    }

    /// Writes the state file: the sandboxes that are ready.
    pub(super) fn store(&mut self) {
        if !self.adopts() {
            return;
        }
        let records = self
            .processes
            .values()
            .filter(|process| matches!(process.phase, Phase::Ready { .. }))
            .filter_map(|process| process.record.clone())
            .collect();
        // A state file that cannot be written costs the adoption after a crash, not the sandbox.
        let _ = state::store(records);
    }

    /// Whether a later launcher takes over what lives. In a container that allows no namespace it ends it instead.
    pub(super) fn adopts(&self) -> bool {
        !self.embedded && self.parts.shape != Shape::Nested
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::super::pool::tests::{is_removal_ordered, launcher, pair, until_buried};
    use super::*;
    use crate::sys::process::pidfd_open;

    #[test]
    fn a_sandbox_that_cannot_be_watched_is_killed_and_removed() {
        let directory = tempfile::tempdir().expect("a directory");
        let ((background, theirs), (connection, _runner)) = (pair(), pair());
        let mut launcher = launcher(directory.path(), background, connection);
        let slot = launcher.parts.slots.adopt(0).expect("a slot");
        let mut child = Command::new("sleep").arg("600").spawn().expect("a process");
        let pid = i32::try_from(child.id()).expect("a pid");
        let pidfd = pidfd_open(pid).expect("a pidfd");
        // epoll refuses a descriptor that it has already.
        launcher.watch(&pidfd, Event::Ended(99)).expect("room");
        let record = Record { sandbox_id: "a".to_owned(), name: "s-test-1".to_owned(), pid, start_time: 1, slot: 0 };

        launcher.take_over(record, pidfd, slot);
        until_buried(&mut launcher);

        assert!(child.wait().is_err(), "it lives, or was left for somebody else to reap");
        assert!(launcher.processes.is_empty());
        assert!(is_removal_ordered(&theirs));
        assert!(launcher.removing.contains_key("s-test-1"), "its ids come back when it has been removed");
    }
}
