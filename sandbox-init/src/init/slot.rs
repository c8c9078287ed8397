//! Slots: which processes belong to which call, and what they used.
//!
//! Where there are cgroups, a slot is one directory `c<n>` below the work cgroup of the sandbox, and membership is a fact
//! of the kernel. Where there are none, a slot is "what descends from the first process of the call, or was orphaned,
//! and did not exist when the call began", read from /proc: good enough to signal and to count, not to be certain.
//!
//! Never writes `cgroup.procs` except in [`Slots::adopt`], which is for the moments when nobody waits.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, mkdirat};
use nix::unistd::{Pid, UnlinkatFlags, unlinkat};

use super::process_table::{Process, descends_from, read_processes};

/// Names a slot. Never reused within one sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SlotId(u64);

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
    /// Processor time, microseconds.
    pub(crate) cpu_usec: Option<u64>,
    /// Forks refused because of the process limit.
    pub(crate) forks_refused: Option<u64>,
    /// The numbers are those of the whole sandbox.
    pub(crate) shared: bool,
}

/// All slots of a sandbox.
#[derive(Debug)]
pub struct Slots {
    work: Option<OwnedFd>,
    /// Refused forks of the whole sandbox, where the unified tree has the process limit.
    refused: Option<File>,
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

/// Counters of the whole sandbox, opened once.
#[derive(Debug)]
struct V1Files {
    memory_kills: Option<File>,
    memory_peak: Option<File>,
    memory_limit: Option<File>,
    cpu_usage: Option<File>,
    forks_refused: Option<File>,
}

/// Files of one slot, opened once: reading an open file costs a tenth of opening it, and every call reads them.
#[derive(Debug)]
struct Cgroup {
    directory: OwnedFd,
    processes: File,
    memory_events: Option<File>,
    memory_peak: Option<File>,
    cpu_stat: Option<File>,
    pids_events: Option<File>,
}

/// A slot whose processes do not run until this is dropped (`cgroup.freeze`, Documentation/admin-guide/cgroup-v2.rst).
struct Standstill(Option<File>);

impl Standstill {
    /// The kernel stops processes one by one, which takes less than a millisecond; one that is busy in the kernel is not
    /// waited for.
    fn begin(cgroup: &Cgroup) -> Self {
        let mut switch = open_write(&cgroup.directory, "cgroup.freeze");
        if switch.as_mut().is_none_or(|file| file.write_all(b"1").is_err()) {
            return Self(None);
        }
        for _ in 0..20 {
            if read_at(&cgroup.directory, "cgroup.events").lines().any(|line| line == "frozen 1") {
                break;
            }
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
        Self(switch)
    }
}

impl Drop for Standstill {
    fn drop(&mut self) {
        if let Some(file) = &mut self.0 {
            // The same file took the other value a moment ago.
            let _ = file.write_all(b"0");
        }
    }
}

/// Slots of finished calls that may keep processes; beyond it the oldest is killed.
const LEFT_LIMIT: usize = 64;

impl Slots {
    /// Slots are directories in `work`, in which this process may make directories.
    pub fn cgroup(work: OwnedFd) -> Self {
        Self { refused: open_read(&work, "pids.events"), work: Some(work), ..Self::scan() }
    }

    /// No cgroups: slots are read from /proc.
    pub fn scan() -> Self {
        Self {
            work: None,
            refused: None,
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

    /// The directory of the slot that was made ahead.
    pub(crate) fn prepared(&self) -> Option<BorrowedFd<'_>> {
        let slot = self.slots.get(self.spare.as_ref()?)?;
        Some(slot.cgroup.as_ref()?.directory.as_fd())
    }

    /// The slot that was made ahead, when membership in it is a fact of the kernel.
    pub(crate) fn prepared_group(&self) -> Option<SlotId> {
        self.spare.filter(|_| self.work.is_some())
    }

    /// Names the process that waits for the next call; it belongs to none.
    pub(crate) fn set_parked(&mut self, parked: Option<Pid>) {
        self.parked = parked;
    }

    /// An empty slot for a new call.
    pub(crate) fn take(&mut self) -> Result<SlotId, nix::Error> {
        let Some(id) = self.spare.take() else { return self.make() };
        // Numbers of the whole sandbox go on while the slot is empty; those of its own cgroup do not.
        if self.work.is_none() || self.v1.is_some() {
            self.mark(id, None);
        } else {
            let refused = self.slots.get(&id).and_then(|slot| self.forks_refused(slot));
            if let Some(slot) = self.slots.get_mut(&id) {
                slot.mark.forks_refused = refused;
            }
        }
        Ok(id)
    }

    /// Forks refused so far. Up to Linux 6.10 the kernel counts them where the fork was tried, in the slot; from 6.11 on where
    /// the limit is, for the whole sandbox. Each keeps the other number at 0.
    fn forks_refused(&self, slot: &Slot) -> Option<u64> {
        let cgroup = slot.cgroup.as_ref()?;
        let max = |file: &Option<File>| field(&read_text(file.as_ref()?), "max");
        let (own, shared) = (max(&cgroup.pids_events), max(&self.refused));
        own.map_or(shared, |own| Some(own.saturating_add(shared.unwrap_or(0))))
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

    /// Moves a process into a slot. Takes up to 20 ms: only when nobody waits.
    pub(crate) fn adopt(&self, id: SlotId, pid: Pid) -> std::io::Result<()> {
        match self.slots.get(&id).and_then(|slot| slot.cgroup.as_ref()) {
            Some(cgroup) => (&cgroup.processes).write_all(pid.to_string().as_bytes()),
            None => Ok(()),
        }
    }

    /// The processes of a slot at present.
    pub(crate) fn processes(&self, id: SlotId) -> Vec<Pid> {
        let Some(slot) = self.slots.get(&id) else { return Vec::new() };
        if let Some(cgroup) = &slot.cgroup {
            // A zombie is listed until it is reaped, and counted until then.
            return read_text(&cgroup.processes)
                .lines()
                .filter_map(|line| line.parse().ok().map(Pid::from_raw))
                .collect();
        }
        self.scan_processes(slot)
    }

    fn scan_processes(&self, slot: &Slot) -> Vec<Pid> {
        let table = read_processes();
        let alive = |root: &(Pid, u64)| table.start_time(root.0) == Some(root.1);
        let living =
            |slot: &Slot| slot.roots.iter().filter(|root| alive(root)).map(|root| root.0).collect::<Vec<Pid>>();
        let all_roots: Vec<Pid> = self.slots.values().flat_map(living).collect();
        let roots = living(slot);
        let me = nix::unistd::getpid();
        let mine = |process: &Process| {
            if roots.iter().any(|root| descends_from(process.pid, *root, &table)) {
                return roots.contains(&process.pid) || !slot.before.contains(&(process.pid, process.start_time));
            }
            // An orphan of this call, or a descendant of one: new, ours by adoption, and below no other call.
            self.sees_orphans
                && !slot.is_over
                && process.pid != me
                && Some(process.pid) != self.parked
                && !slot.before.contains(&(process.pid, process.start_time))
                && !all_roots.iter().any(|root| descends_from(process.pid, *root, &table))
                && descends_from(process.pid, me, &table)
        };
        let mut found: Vec<Pid> =
            table.iter().filter(|process| !process.is_zombie && mine(process)).map(|process| process.pid).collect();
        // Parents first, of children the youngest first: see `signal`.
        found.sort_by_key(|pid| (table.depth(*pid), std::cmp::Reverse(pid.as_raw())));
        found
    }

    /// Sends a signal to every process of a slot except one.
    ///
    /// A shell in there must have it before its child dies of it, or it goes on with the rest of its list; and the last member
    /// of a pipeline must not end by itself because an earlier one was hit before it. So the slot stands still meanwhile;
    /// where that is not to be had, parents come first and of children the youngest.
    pub(crate) fn signal(&self, id: SlotId, signal: Signal, except: Option<Pid>) {
        let cgroup = self.slots.get(&id).and_then(|slot| slot.cgroup.as_ref()).filter(|_| signal != Signal::SIGKILL);
        let still = cgroup.map(Standstill::begin);
        for pid in self.processes(id) {
            if Some(pid) != except {
                // A process that has just ended is what we wanted.
                let _ = kill(pid, signal);
            }
        }
        drop(still);
    }

    /// Kills every process of a slot.
    pub(crate) fn kill(&self, id: SlotId) {
        let cgroup = self.slots.get(&id).and_then(|slot| slot.cgroup.as_ref());
        let killed = cgroup.is_some_and(|cgroup| {
            open_write(&cgroup.directory, "cgroup.kill").is_some_and(|mut file| file.write_all(b"1").is_ok())
        });
        if !killed {
            self.signal(id, Signal::SIGKILL, None);
        }
    }

    /// Kills every process of every slot.
    pub(crate) fn kill_all(&self) {
        for id in self.slots.keys() {
            self.kill(*id);
        }
    }

    /// Sends a signal to every process of every slot.
    pub(crate) fn signal_all(&self, signal: Signal) {
        for id in self.slots.keys() {
            self.signal(*id, signal, None);
        }
    }

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
            cpu_usec: difference(now.cpu_usec, mark.cpu_usec),
            forks_refused: difference(now.forks_refused, mark.forks_refused),
            shared: now.shared && self.slots.len() > 1,
        }
    }

    fn read_counters(&self, id: SlotId) -> Counters {
        if let Some(v1) = &self.v1 {
            return v1.counters();
        }
        let Some(slot) = self.slots.get(&id) else { return Counters::default() };
        let of_slot = slot.cgroup.as_ref().map(Cgroup::counters).unwrap_or_default();
        // Only asked for after a kill, because it costs an open.
        let work = self.work.as_ref().filter(|_| of_slot.memory_kills > Some(0));
        let memory_limit = work.and_then(|work| number(&read_at(work, "memory.max")));
        Counters { memory_limit, forks_refused: self.forks_refused(slot), ..of_slot }
    }

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

impl Slot {
    /// Numbers of this slot count from here.
    fn begin_from(&mut self, counters: Counters) {
        let is_new = self.cgroup.as_ref().is_some_and(Cgroup::reset_peak);
        // A peak that begins anew is that of the coming call, however low it is.
        let memory_peak = counters.memory_peak.filter(|_| !is_new);
        self.mark = Counters { memory_peak, ..counters };
    }
}

impl V1Files {
    fn open(directories: &V1Counters) -> Self {
        Self {
            memory_kills: open_read(&directories.memory, "memory.oom_control"),
            memory_peak: open_read(&directories.memory, "memory.max_usage_in_bytes"),
            memory_limit: open_read(&directories.memory, "memory.limit_in_bytes"),
            cpu_usage: open_read(&directories.cpuacct, "cpuacct.usage"),
            forks_refused: open_read(&directories.pids, "pids.events"),
        }
    }

    fn counters(&self) -> Counters {
        let text = |file: &Option<File>| file.as_ref().map(read_text).unwrap_or_default();
        let memory_kills = field(&text(&self.memory_kills), "oom_kill");
        Counters {
            memory_kills,
            memory_peak: number(&text(&self.memory_peak)),
            // Only told after a kill.
            memory_limit: memory_kills.filter(|kills| *kills > 0).and_then(|_| number(&text(&self.memory_limit))),
            cpu_usec: number(&text(&self.cpu_usage)).map(|nanoseconds| nanoseconds / 1000),
            forks_refused: field(&text(&self.forks_refused), "max"),
            shared: true,
        }
    }
}

impl Cgroup {
    fn open(work: &OwnedFd, name: &str) -> Result<Self, nix::Error> {
        let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let directory = openat(work, name, flags, Mode::empty())?;
        let processes = openat(&directory, "cgroup.procs", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())?;
        let open = |name| open_read(&directory, name);
        Ok(Self {
            memory_events: open("memory.events.local").or_else(|| open("memory.events")),
            memory_peak: open_write(&directory, "memory.peak").or_else(|| open("memory.peak")),
            cpu_stat: open("cpu.stat"),
            pids_events: open("pids.events"),
            processes: File::from(processes),
            directory,
        })
    }

    fn counters(&self) -> Counters {
        let text = |file: &Option<File>| file.as_ref().map(read_text).unwrap_or_default();
        Counters {
            memory_kills: field(&text(&self.memory_events), "oom_kill"),
            memory_peak: number(&text(&self.memory_peak)),
            memory_limit: None,
            cpu_usec: field(&text(&self.cpu_stat), "usage_usec"),
            forks_refused: None,
            shared: false,
        }
    }

    /// From Linux 6.12 on, a write starts the peak anew for this descriptor; before, it fails and changes nothing.
    fn reset_peak(&self) -> bool {
        self.memory_peak.as_ref().is_some_and(|mut file| file.write_all(b"reset\n").is_ok())
    }

    fn close_counters(&mut self) {
        self.memory_events = None;
        self.memory_peak = None;
        self.cpu_stat = None;
        self.pids_events = None;
    }
}

fn open_read(directory: &OwnedFd, name: &str) -> Option<File> {
    openat(directory, name, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).ok().map(File::from)
}

fn open_write(directory: &OwnedFd, name: &str) -> Option<File> {
    openat(directory, name, OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
        .or_else(|_| openat(directory, name, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty()))
        .ok()
        .map(File::from)
}

fn read_at(directory: &OwnedFd, name: &str) -> String {
    open_read(directory, name).map(|file| read_text(&file)).unwrap_or_default()
}

/// Reads a kernel text file from its beginning, however often it was read before.
fn read_text(file: &File) -> String {
    let mut text = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(length) = file.read_at(&mut buffer, text.len() as u64) {
        if length == 0 {
            break;
        }
        text.extend_from_slice(buffer.get(..length).unwrap_or_default());
        // The kernel fills the buffer up to a whole line, and no line of these files is that long.
        if length < buffer.len() - 512 {
            break;
        }
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// The number behind a word at the beginning of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_matched_by_its_whole_name() {
        let text = "low 0\noom 3\noom_kill 2\noom_group_kill 1\n";
        assert_eq!(field(text, "oom_kill"), Some(2));
        assert_eq!(field(text, "oom"), Some(3));
        assert_eq!(field(text, "max"), None);
        assert_eq!(field("max max\n", "max"), None);
    }

    #[test]
    fn without_cgroups_a_slot_holds_the_descendants_of_its_root_and_nobody_else() {
        let mut stranger = std::process::Command::new("sleep").arg("30").spawn().unwrap();
        let mut slots = Slots::scan();
        let slot = slots.take().unwrap();
        let mut child = std::process::Command::new("sh").args(["-c", "sleep 30 & wait"]).spawn().unwrap();
        let root = Pid::from_raw(i32::try_from(child.id()).unwrap());
        slots.set_root(slot, root);
        while slots.processes(slot).len() < 2 {
            std::thread::yield_now();
        }
        let found = slots.processes(slot);
        assert!(found.contains(&root));
        assert!(!found.contains(&Pid::from_raw(i32::try_from(stranger.id()).unwrap())));
        slots.kill(slot);
        child.wait().unwrap();
        assert!(stranger.try_wait().unwrap().is_none(), "a process of somebody else was killed");
        stranger.kill().unwrap();
        stranger.wait().unwrap();
    }
}
