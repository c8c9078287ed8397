//! Slots of finished calls.
//!
//! What a call has started may go on after its end. Its slot stays until the last process in it is gone; then a sweep, which is
//! made when nobody waits, removes it.

use nix::errno::Errno;
use nix::unistd::{Pid, UnlinkatFlags, unlinkat};

use super::{SlotId, Slots};

/// Slots of finished calls that may keep processes; beyond it the oldest is killed.
const LEFT_LIMIT: usize = 64;

impl Slots {
    /// The call is over. The slot is removed by a later sweep, as soon as it is empty.
    pub(crate) fn give_back(&mut self, id: SlotId, call_id: &str) {
        if let Some(slot) = self.slots.get_mut(&id)
            && let Some(cgroup) = &mut slot.cgroup
        {
            cgroup.close_counters();
        }
        self.left.push((id, call_id.to_owned()));
        self.is_unswept = true;
        if self.left.len() > LEFT_LIMIT
            && let Some((oldest, _)) = self.left.first()
        {
            self.kill(*oldest);
        }
    }

    /// Gives back the slot that was made ahead, with the process in it. One that is about to be killed is of no use: whoever is
    /// cloned into a group whose kill file was written at any time before is killed at once (Linux 6.18).
    pub(crate) fn drop_spare(&mut self) {
        self.parked = None;
        if let Some(spare) = self.spare.take() {
            self.give_back(spare, "");
        }
    }

    /// Whether a slot was given back since the last sweep.
    pub(crate) fn is_unswept(&self) -> bool {
        self.is_unswept
    }

    /// Removes the slots that have become empty. True when some are left.
    pub(crate) fn sweep(&mut self) -> bool {
        self.is_unswept = false;
        let left = std::mem::take(&mut self.left);
        for (id, call_id) in left {
            if !self.processes(id).is_empty() || !self.remove(id) {
                self.left.push((id, call_id));
            }
        }
        !self.left.is_empty()
    }

    fn remove(&mut self, id: SlotId) -> bool {
        let Some(slot) = self.slots.get(&id) else { return true };
        if let Some(work) = &self.work {
            // EBUSY: a process is still on its way out; the next sweep tries again.
            if let Err(Errno::EBUSY | Errno::EINTR) = unlinkat(work, slot.name.as_str(), UnlinkatFlags::RemoveDir) {
                return false;
            }
        }
        self.slots.remove(&id);
        true
    }

    /// The slots of finished calls that still have processes.
    pub(crate) fn left(&self) -> impl Iterator<Item = (&str, Vec<Pid>)> {
        self.left.iter().map(|(id, call_id)| (call_id.as_str(), self.processes(*id)))
    }

    /// Whether finished calls have left processes.
    pub(crate) fn has_left(&self) -> bool {
        !self.left.is_empty()
    }

    /// Kills what is left and removes what can be removed.
    pub(crate) fn tear_down(&mut self) {
        self.kill_all();
        let all: Vec<SlotId> = self.slots.keys().copied().collect();
        for id in all {
            self.remove(id);
        }
    }
}
