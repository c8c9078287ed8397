//! Privileged: CAP_KILL over what an earlier launcher left.
//!
//! What outlives this process: the state file names the sandboxes that the next launcher adopts. What it cannot adopt it
//! kills by its group and removes.

use super::process::{Phase, Process};
use super::{Event, Launcher};
use crate::launcher::background::{Order, leftover_names};
use crate::launcher::cgroup::Mode;
use crate::launcher::shape::Shape;
use crate::launcher::state;

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
            let number = self.number();
            if self.watch(&pidfd, Event::Ended(number)).is_err() {
                continue;
            }
            let process = Process {
                name: record.name.clone(),
                pid: record.pid,
                pidfd,
                boot: None,
                blank: None,
                slot,
                phase: Phase::Ready { sandbox_id: record.sandbox_id.clone() },
                adopted: true,
                record: Some(record),
            };
            self.processes.insert(number, process);
        }
        let mut left = self.parts.tree.names("s-");
        left.extend(leftover_names("s-", &self.parts.places));
        left.sort();
        left.dedup();
        for name in left.into_iter().filter(|name| !known.contains(name)) {
            self.order(&Order { remove: name, ..Order::default() });
        }
        self.store();
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
