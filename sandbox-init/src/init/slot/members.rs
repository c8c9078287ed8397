//! Who is in a slot, and signals to them.
//!
//! With cgroups the kernel says who belongs to a call; without, the process table does, as well as it can.

use std::cmp::Reverse;
use std::io::{self, Write as _};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpid};

use super::cgroup::{Standstill, open_write, read_text};
use super::{Slot, SlotId, Slots};
use crate::init::process_table::{Process, descends_from, read_processes};

impl Slots {
    /// The processes of a slot at present.
    pub(crate) fn processes(&self, id: SlotId) -> Vec<Pid> {
        let Some(slot) = self.slots.get(&id) else { return Vec::new() };
        if let Some(cgroup) = &slot.cgroup {
            // A zombie is listed until it is reaped, and counted until then.
            return listed(&read_text(&cgroup.processes)).collect();
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
        let me = getpid();
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
        found.sort_by_key(|pid| (table.depth(*pid), Reverse(pid.as_raw())));
        found
    }

    /// Moves a process into a slot. Takes up to 20 ms: only when nobody waits.
    pub(crate) fn adopt(&self, id: SlotId, pid: Pid) -> io::Result<()> {
        match self.slots.get(&id).and_then(|slot| slot.cgroup.as_ref()) {
            Some(cgroup) => (&cgroup.processes).write_all(pid.to_string().as_bytes()),
            None => Ok(()),
        }
    }

    /// Sends a signal to every process of a slot except one.
    ///
    /// A shell in there must have it before its child dies of it, or it goes on with the rest of its list; and the last member
    /// of a pipeline must not end by itself because an earlier one was hit before it. So the slot stands still meanwhile, which
    /// keeps nobody from dying of SIGKILL; where that is not to be had, parents come first and of children the youngest.
    pub(crate) fn signal(&self, id: SlotId, signal: Signal, except: Option<Pid>) {
        self.signal_after(|| {}, id, signal, except);
    }

    /// The same, with something to do first while the slot stands still already.
    pub(crate) fn signal_after(&self, first: impl FnOnce(), id: SlotId, signal: Signal, except: Option<Pid>) {
        let cgroup = self.slots.get(&id).and_then(|slot| slot.cgroup.as_ref());
        let still = cgroup.map(Standstill::begin);
        first();
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

    /// Whether a process is in any slot.
    pub(crate) fn has_processes(&self) -> bool {
        self.slots.keys().any(|id| !self.processes(*id).is_empty())
    }

    /// Sends a signal to every process of every slot but these.
    pub(crate) fn signal_all_but(&self, others: &[SlotId], signal: Signal) {
        for id in self.slots.keys().filter(|id| !others.contains(id)) {
            self.signal(*id, signal, None);
        }
    }
}

/// The processes in a `cgroup.procs`. One that is reaped while it is read, or that this pid namespace does not have, is there
/// as 0 (cgroups(7)), and a signal to that would be one to the own group.
fn listed(processes: &str) -> impl Iterator<Item = Pid> {
    processes.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0).map(Pid::from_raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entry_of_a_group_that_is_no_process_is_never_signalled() {
        let found: Vec<i32> = listed("7\n0\n-1\n\n 8\n9\n").map(Pid::as_raw).collect();
        assert_eq!(found, [7, 9]);
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
