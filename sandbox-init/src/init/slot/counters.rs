//! What the processes of a slot have used.
//!
//! Numbers of a slot are its own where the unified tree has the controllers. With v1 controllers they are those of the whole
//! sandbox, by difference, and shared with every other slot of the moment.

use std::fs::File;
use std::os::fd::OwnedFd;

use super::cgroup::{Cgroup, field, number, open_read, read_at, read_text};
use super::{Slot, SlotId, Slots};

/// Where usage is counted for the whole sandbox on a host with cgroup v1 controllers.
#[derive(Debug)]
pub struct V1Counters {
    /// Directory of the sandbox in the memory hierarchy.
    pub memory: OwnedFd,
    /// Directory of the sandbox in the pids hierarchy.
    pub pids: OwnedFd,
    /// Directory of the sandbox in the cpuacct hierarchy.
    pub cpuacct: OwnedFd,
}

/// Numbers of a slot at one moment; `None` where the host does not measure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counters {
    /// Processes killed for memory.
    pub(crate) memory_kills: Option<u64>,
    /// Most memory used, bytes.
    pub(crate) memory_peak: Option<u64>,
    /// Memory limit that applies, bytes.
    pub(crate) memory_limit: Option<u64>,
    /// How often the sandbox's own memory limit was in the way. A kill during which this stood still has its reason outside.
    pub(crate) limit_hits: Option<u64>,
    /// Processor time, microseconds.
    pub(crate) cpu_usec: Option<u64>,
    /// Forks refused because of the process limit.
    pub(crate) forks_refused: Option<u64>,
    /// The numbers are those of the whole sandbox.
    pub(crate) shared: bool,
}

/// Counters of the whole sandbox, opened once.
#[derive(Debug)]
pub(super) struct V1Files {
    memory_kills: Option<File>,
    memory_peak: Option<File>,
    memory_limit: Option<File>,
    /// Where swap is counted with memory, its limit is the same number and is asked first.
    swap_peak: Option<File>,
    cpu_usage: Option<File>,
    forks_refused: Option<File>,
}

impl Slots {
    /// What was used since [`Slots::mark`].
    pub(crate) fn used(&mut self, id: SlotId) -> Counters {
        let now = self.read_counters(id);
        let mark = match self.slots.get_mut(&id) {
            Some(slot) => {
                slot.last = now;
                slot.mark
            }
            None => Counters::default(),
        };
        let difference = |now: Option<u64>, then: Option<u64>| Some(now?.saturating_sub(then?));
        Counters {
            memory_kills: difference(now.memory_kills, mark.memory_kills),
            // The peak cannot be taken apart: it is that of this call only if it has grown during it.
            memory_peak: now.memory_peak.filter(|peak| mark.memory_peak.is_none_or(|before| *peak > before)),
            memory_limit: now.memory_limit,
            limit_hits: difference(now.limit_hits, mark.limit_hits),
            cpu_usec: difference(now.cpu_usec, mark.cpu_usec),
            forks_refused: difference(now.forks_refused, mark.forks_refused),
            shared: now.shared && self.slots.len() > 1,
        }
    }

    pub(super) fn read_counters(&self, id: SlotId) -> Counters {
        if let Some(v1) = &self.v1 {
            return v1.counters();
        }
        let Some(slot) = self.slots.get(&id) else { return Counters::default() };
        let of_slot = slot.cgroup.as_ref().map(Cgroup::counters).unwrap_or_default();
        // Only asked for after a kill, because it costs an open.
        let work = self.work.as_ref().filter(|_| of_slot.memory_kills > Some(0));
        let memory_limit = work.and_then(|work| number(&read_at(work, "memory.max")));
        // After the kills: the kernel counts the limit first, so every kill that was read has its reason in what is read now.
        let limit_hits = self.limit_hits();
        Counters { memory_limit, limit_hits, forks_refused: self.forks_refused(slot), ..of_slot }
    }

    /// How often the limit of the work cgroup ended in the search for a victim. The kernel counts `oom` where the limit is and
    /// `oom_kill` where the victim is; the file of the cgroup alone leaves out what slots and enclosing groups have counted.
    pub(super) fn limit_hits(&self) -> Option<u64> {
        of_the_limit(&read_text(self.starved.as_ref()?))
    }

    /// Forks refused so far. Up to Linux 6.10 the kernel counts them where the fork was tried, in the slot; from 6.11 on where
    /// the limit is, for the whole sandbox. Each keeps the other number at 0.
    pub(super) fn forks_refused(&self, slot: &Slot) -> Option<u64> {
        let cgroup = slot.cgroup.as_ref()?;
        let max = |file: &Option<File>| field(&read_text(file.as_ref()?), "max");
        let (own, shared) = (max(&cgroup.pids_events), max(&self.refused));
        own.map_or(shared, |own| Some(own.saturating_add(shared.unwrap_or(0))))
    }
}

/// Reads `memory.events.local` of the cgroup that has the limit.
fn of_the_limit(text: &str) -> Option<u64> {
    field(text, "oom")
}

/// The kernel charges so many bytes at once when there is room, and fewer before it gives up (MEMCG_CHARGE_BATCH, 64 pages).
const CHARGED_AT_ONCE: u64 = 64 * 4096;

/// Kills of a v1 group, as far as it has ever been at its limit; else they came from outside. `memory.failcnt` would be the answer, but
/// Linux 6.18 does not count it. Necessary for a kill at that limit, not sufficient: the group may have been there before.
fn kills_at_the_limit(kills: Option<u64>, peaks: [Option<u64>; 2], limit: Option<u64>) -> Option<u64> {
    match kills? {
        0 => Some(0),
        kills => {
            let peak = peaks.into_iter().flatten().max()?;
            Some(if peak.saturating_add(CHARGED_AT_ONCE) >= limit? { kills } else { 0 })
        }
    }
}

impl Slot {
    /// Numbers of this slot count from here.
    pub(super) fn begin_from(&mut self, counters: Counters) {
        let is_new = self.cgroup.as_ref().is_some_and(Cgroup::reset_peak);
        // A peak that begins anew is that of the coming call, however low it is.
        let memory_peak = counters.memory_peak.filter(|_| !is_new);
        self.mark = Counters { memory_peak, ..counters };
    }
}

impl V1Files {
    pub(super) fn open(directories: &V1Counters) -> Self {
        Self {
            memory_kills: open_read(&directories.memory, "memory.oom_control"),
            memory_peak: open_read(&directories.memory, "memory.max_usage_in_bytes"),
            memory_limit: open_read(&directories.memory, "memory.limit_in_bytes"),
            swap_peak: open_read(&directories.memory, "memory.memsw.max_usage_in_bytes"),
            cpu_usage: open_read(&directories.cpuacct, "cpuacct.usage"),
            forks_refused: open_read(&directories.pids, "pids.events"),
        }
    }

    fn counters(&self) -> Counters {
        let text = |file: &Option<File>| file.as_ref().map(read_text).unwrap_or_default();
        let memory_kills = field(&text(&self.memory_kills), "oom_kill");
        let memory_peak = number(&text(&self.memory_peak));
        // Only told, and only of interest, after a kill.
        let after_a_kill = |file| memory_kills.filter(|kills| *kills > 0).and_then(|_| number(&text(file)));
        let memory_limit = after_a_kill(&self.memory_limit);
        let peaks = [memory_peak, after_a_kill(&self.swap_peak)];
        Counters {
            memory_kills,
            memory_peak,
            memory_limit,
            limit_hits: kills_at_the_limit(memory_kills, peaks, memory_limit),
            cpu_usec: number(&text(&self.cpu_usage)).map(|nanoseconds| nanoseconds / 1000),
            forks_refused: field(&text(&self.forks_refused), "max"),
            shared: true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limit_of_the_work_group_is_counted_by_oom_and_not_by_victims_or_refused_memory() {
        let enclosing = "low 0\nhigh 0\nmax 0\noom 0\noom_kill 1\noom_group_kill 0\nsock_throttled 0\n";
        let reclaimed = "low 0\nhigh 0\nmax 812\noom 0\noom_kill 0\noom_group_kill 0\n";
        let own = "low 0\nhigh 0\nmax 31\noom 2\noom_kill 0\noom_group_kill 0\n";

        assert_eq!(of_the_limit(enclosing), Some(0));
        assert_eq!(of_the_limit(reclaimed), Some(0));
        assert_eq!(of_the_limit(own), Some(2));
        assert_eq!(of_the_limit(""), None);
    }

    #[test]
    fn kills_of_a_v1_group_count_as_its_own_only_when_it_was_at_its_limit() {
        let limit = Some(1 << 30);
        let near = Some((1 << 30) - 4096);
        let far = Some((1 << 30) - (1 << 20));
        assert_eq!(kills_at_the_limit(Some(2), [limit, None], limit), Some(2));
        assert_eq!(kills_at_the_limit(Some(2), [near, None], limit), Some(2));
        assert_eq!(kills_at_the_limit(Some(2), [far, limit], limit), Some(2), "with swap");
        assert_eq!(kills_at_the_limit(Some(2), [far, far], limit), Some(0));
        assert_eq!(kills_at_the_limit(Some(0), [limit, None], None), Some(0));
        assert_eq!(kills_at_the_limit(Some(1), [None, None], limit), None);
        assert_eq!(kills_at_the_limit(Some(1), [limit, None], None), None);
        assert_eq!(kills_at_the_limit(None, [limit, None], limit), None);
    }
}
