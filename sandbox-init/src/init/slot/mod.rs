//! Slots: which processes belong to which call, and what they used.
//!
//! Where there are cgroups, a slot is one directory `c<n>` below the work cgroup of the sandbox, and membership is a fact
//! of the kernel. Where there are none, a slot is "what descends from the first process of the call, or was orphaned,
//! and did not exist when the call began", read from /proc: good enough to signal and to count, not to be certain.
//!
//! Never writes `cgroup.procs` except in [`Slots::adopt`], which is for the moments when nobody waits.
//!
//! This file has the slots and how one is made, taken and left. [`members`] is who is in one, [`counters`] what they have used,
//! [`left`] what becomes of slots whose call is over, [`cgroup`] the files of one.

mod cgroup;
mod counters;
mod left;
mod members;

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::Pid;

use self::cgroup::{Cgroup, open_read};
pub(crate) use self::counters::Counters;
pub use self::counters::V1Counters;
use self::counters::V1Files;
use super::process_table::read_processes;

/// Names a slot. Never reused within one sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SlotId(u64);

/// All slots of a sandbox.
#[derive(Debug)]
pub struct Slots {
    work: Option<OwnedFd>,
    /// Refused forks of the whole sandbox, where the unified tree has the process limit.
    refused: Option<File>,
    /// What the memory limit of the sandbox has done, where the unified tree has it.
    starved: Option<File>,
    v1: Option<V1Files>,
    /// Orphans in this pid namespace become our children, so a child we did not start is an orphan of some call.
    sees_orphans: bool,
    next: u64,
    spare: Option<SlotId>,
    /// A process that waits for its call.
    parked: Option<Pid>,
    slots: BTreeMap<SlotId, Slot>,
    /// Slots of finished calls that still have processes, with the call.
    left: Vec<(SlotId, String)>,
    is_unswept: bool,
}

#[derive(Debug)]
struct Slot {
    name: String,
    cgroup: Option<Cgroup>,
    /// Without cgroups: the processes below which the call is, with their start times, because pids are used again.
    roots: Vec<(Pid, u64)>,
    /// Without cgroups: the call is over, so new orphans are not its own.
    is_over: bool,
    /// Without cgroups: what existed when the call began.
    before: HashSet<(Pid, u64)>,
    /// Numbers when the call began.
    mark: Counters,
    /// Numbers when they were read last.
    last: Counters,
}

impl Slots {
    /// Slots are directories in `work`, in which this process may make directories.
    pub fn cgroup(work: OwnedFd) -> Self {
        Self {
            refused: open_read(&work, "pids.events"),
            starved: open_read(&work, "memory.events.local"),
            work: Some(work),
            ..Self::scan()
        }
    }

    /// No cgroups: slots are read from /proc.
    pub fn scan() -> Self {
        Self {
            work: None,
            refused: None,
            starved: None,
            v1: None,
            sees_orphans: false,
            next: 0,
            spare: None,
            parked: None,
            slots: BTreeMap::new(),
            left: Vec::new(),
            is_unswept: false,
        }
    }

    /// Usage of the whole sandbox is counted in these v1 directories.
    #[must_use]
    pub fn with_v1(mut self, v1: Option<V1Counters>) -> Self {
        self.v1 = v1.as_ref().map(V1Files::open);
        self
    }

    pub(crate) fn set_sees_orphans(&mut self, sees_orphans: bool) {
        self.sees_orphans = sees_orphans;
    }

    /// Makes one slot ahead of need.
    pub(crate) fn prepare(&mut self) -> Result<(), nix::Error> {
        if self.spare.is_none() {
            self.spare = Some(self.make()?);
        }
        Ok(())
    }

    /// Whether a slot was made ahead.
    pub(crate) fn has_spare(&self) -> bool {
        self.spare.is_some()
    }

    /// The directory of the slot that was made ahead.
    pub(crate) fn prepared(&self) -> Option<BorrowedFd<'_>> {
        let slot = self.slots.get(self.spare.as_ref()?)?;
        Some(slot.cgroup.as_ref()?.directory.as_fd())
    }

    /// Names the process that waits for the next call; it belongs to none.
    pub(crate) fn set_parked(&mut self, parked: Option<Pid>) {
        self.parked = parked;
    }

    /// An empty slot for a new call.
    pub(crate) fn take(&mut self) -> Result<SlotId, nix::Error> {
        let Some(id) = self.spare.take() else { return self.make() };
        // Its parked process is about to be one of the call.
        self.parked = None;
        // Numbers of the whole sandbox go on while the slot is empty; those of its own cgroup do not.
        if self.work.is_none() || self.v1.is_some() {
            self.mark(id, None);
        } else {
            let refused = self.slots.get(&id).and_then(|slot| self.forks_refused(slot));
            let limit_hits = self.limit_hits();
            if let Some(slot) = self.slots.get_mut(&id) {
                slot.mark.forks_refused = refused;
                slot.mark.limit_hits = limit_hits;
            }
        }
        Ok(id)
    }

    fn make(&mut self) -> Result<SlotId, nix::Error> {
        loop {
            let id = SlotId(self.next);
            self.next = self.next.saturating_add(1);
            let name = format!("c{}", id.0);
            let cgroup = match &self.work {
                None => None,
                Some(work) => match mkdirat(work, name.as_str(), Mode::S_IRWXU | Mode::S_IRGRP | Mode::S_IXGRP) {
                    Ok(()) => Some(Cgroup::open(work, &name)?),
                    Err(Errno::EEXIST) => continue,
                    Err(error) => return Err(error),
                },
            };
            let slot = Slot {
                name,
                cgroup,
                roots: Vec::new(),
                is_over: false,
                before: HashSet::new(),
                mark: Counters::default(),
                last: Counters::default(),
            };
            self.slots.insert(id, slot);
            self.mark(id, None);
            return Ok(id);
        }
    }

    /// A call begins in this slot: numbers count from here. `root` is its first process, if it is known already.
    pub(crate) fn mark(&mut self, id: SlotId, root: Option<Pid>) {
        let counters = self.read_counters(id);
        let by_scan = self.work.is_none();
        let Some(slot) = self.slots.get_mut(&id) else { return };
        slot.begin_from(counters);
        if by_scan {
            let table = read_processes();
            slot.roots = root.and_then(|root| Some((root, table.start_time(root)?))).into_iter().collect();
            slot.before = table.iter().map(|process| (process.pid, process.start_time)).collect();
        }
    }

    /// A call has just ended in this slot and the next one will begin in it: numbers count from what was read at that end.
    pub(crate) fn mark_again(&mut self, id: SlotId, root: Pid) {
        if self.work.is_none() {
            return self.mark(id, Some(root));
        }
        if let Some(slot) = self.slots.get_mut(&id) {
            slot.begin_from(slot.last);
        }
    }

    /// Without cgroups: names the first process of the call after it was started.
    pub(crate) fn set_root(&mut self, id: SlotId, root: Pid) {
        if self.work.is_some() {
            return;
        }
        if let Some(slot) = self.slots.get_mut(&id) {
            slot.roots = read_processes().start_time(root).map(|start_time| (root, start_time)).into_iter().collect();
        }
    }

    /// The shell has left this slot. Without cgroups, what is in it besides the shell is all that is in it from now on.
    pub(crate) fn leave(&mut self, id: SlotId, shell: Pid) {
        if self.work.is_some() {
            return;
        }
        let table = read_processes();
        let others = self.processes(id).into_iter().filter(|pid| *pid != shell);
        let roots = others.filter_map(|pid| Some((pid, table.start_time(pid)?))).collect();
        if let Some(slot) = self.slots.get_mut(&id) {
            slot.roots = roots;
            slot.before.clear();
            slot.is_over = true;
        }
    }

    /// The directory a new process of this slot is put into.
    pub(crate) fn directory(&self, id: SlotId) -> Option<OwnedFd> {
        self.slots.get(&id)?.cgroup.as_ref()?.directory.try_clone().ok()
    }
}
