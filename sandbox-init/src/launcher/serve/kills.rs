//! Privileged by its place only: keeps what the kernel's log says about the sandboxes of this launcher.
//!
//! The log is read when somebody asks about a sandbox in which the kernel has killed for memory, and never else. A record
//! counts for the sandbox whose group and whose ids it names. The kernel says of every kill that there was one, and of ten in five
//! seconds, on the whole host, in which group: a kill without a name is kept as one, so that the count of the kernel tells which
//! kill a name belongs to. Where records were lost, the kills before them are not told.

use std::collections::VecDeque;

use proto::launch::v1 as wire;

use super::Launcher;
use super::process::{Killed, Process};
use crate::launcher::kernel_log::{Entry, Victim};

/// Kills that are kept of one sandbox.
const MOST_KILLS: usize = 8;

impl Launcher<'_> {
    /// Takes from the kernel's log what it says since the last time. Of nothing that it does not say anybody is told.
    pub(super) fn learn_of_kills(&mut self) {
        let entries = self.parts.kernel_log.read(self.parts.tree.base_name());
        for entry in entries {
            match entry {
                Entry::Victim(victim) => self.note_victim(victim),
                Entry::Used { pid, uid, bytes } => self.note_use(pid, uid, bytes),
                Entry::Gap => self.processes.values_mut().for_each(|process| {
                    process.killed.retain(|killed| killed.told.number > 0);
                }),
            }
        }
        for process in self.processes.values_mut().filter(|process| is_new(process.killed.back())) {
            number(&mut process.killed, self.parts.tree.oom_kills(&process.name));
        }
    }

    fn note_victim(&mut self, victim: Victim) {
        let Victim { sandbox, pid, uid, process: name } = victim;
        let is_meant = |process: &&mut Process| process.name == sandbox && process.slot.holds(uid);
        let Some(process) = self.processes.values_mut().find(is_meant) else { return };
        note(process, pid, name, 0);
    }

    fn note_use(&mut self, pid: u32, uid: u32, bytes: u64) {
        let Some(process) = self.processes.values_mut().find(|process| process.slot.holds(uid)) else { return };
        match process.killed.back_mut().filter(|killed| killed.pid == pid && killed.told.used_bytes == 0) {
            Some(killed) => killed.told.used_bytes = bytes,
            // The kernel has not said in which group.
            None => note(process, pid, String::new(), bytes),
        }
    }
}

fn note(process: &mut Process, pid: u32, name: String, used_bytes: u64) {
    if process.killed.len() == MOST_KILLS {
        process.killed.pop_front();
    }
    let told = wire::MemoryKill { number: 0, process: name, used_bytes };
    process.killed.push_back(Killed { pid, told });
}

/// The kills of a sandbox whose victims have a name.
pub(super) fn named(killed: &VecDeque<Killed>) -> impl DoubleEndedIterator<Item = &wire::MemoryKill> {
    killed.iter().map(|killed| &killed.told).filter(|told| !told.process.is_empty())
}

fn is_new(killed: Option<&Killed>) -> bool {
    killed.is_some_and(|killed| killed.told.number == 0)
}

/// Numbers what was read just now: the newest is the last that the kernel has counted, or one that it is about to count, because
/// it does that behind the record. There are never more records than kills.
fn number(killed: &mut VecDeque<Killed>, counted: u64) {
    let before = killed.iter().map(|killed| killed.told.number).max().unwrap_or_default();
    let new = killed.iter().filter(|killed| killed.told.number == 0).count();
    let last = counted.max(before.saturating_add(u64::try_from(new).unwrap_or(u64::MAX)));
    let new = killed.iter_mut().rev().take_while(|killed| killed.told.number == 0);
    for (killed, number) in new.zip((1..=last).rev()) {
        killed.told.number = number;
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::path::Path;

    use super::super::pool::tests::{launcher, pair};
    use super::super::process::{Memory, Phase};
    use super::*;
    use crate::launcher::cgroup::Tree;
    use crate::launcher::kernel_log::KernelLog;
    use crate::sys::process::pidfd_open;

    const BASE: &str = "sandbox-runner-6867e7a6";

    /// A launcher with one sandbox, number 7, in which the kernel has counted so many kills.
    fn with_sandbox(directory: &Path, kills: u64) -> Launcher<'static> {
        let base = directory.join(BASE);
        std::fs::create_dir_all(base.join("s-test-5")).expect("a directory");
        std::fs::write(base.join("s-test-5/memory.events"), format!("oom_kill {kills}\n")).expect("written");
        // Nobody is at the other ends.
        let ((background, _), (connection, _)) = (pair(), pair());
        let mut launcher = launcher(directory, background, connection);
        launcher.parts.tree = Tree::unified_at(&base);
        let pid = i32::try_from(std::process::id()).expect("a pid");
        let process = Process {
            name: "s-test-5".to_owned(),
            pid,
            pidfd: pidfd_open(pid).expect("a pidfd"),
            boot: None,
            blank: None,
            mounts: None,
            slot: launcher.parts.slots.adopt(0).expect("a slot"),
            phase: Phase::Ready { sandbox_id: "a".to_owned() },
            adopted: true,
            record: None,
            memory: Memory::default(),
            killed: VecDeque::new(),
        };
        launcher.processes.insert(7, process);
        launcher
    }

    fn victim(sandbox: &str, process: &str, pid: u32, uid: u32) -> String {
        format!(
            "6,1,1,-;oom-kill:constraint=CONSTRAINT_MEMCG,oom_memcg=/{BASE}/{sandbox},task_memcg=/{BASE}/{sandbox},\
             task={process},pid={pid},uid={uid}\n"
        )
    }

    fn used(pid: u32, uid: u32) -> String {
        format!(
            "3,1,1,-;Memory cgroup out of memory: Killed process {pid} (x) total-vm:9kB, anon-rss:4kB, file-rss:0kB, \
             shmem-rss:0kB, UID:{uid} pgtables:1kB oom_score_adj:0\n"
        )
    }

    /// A log in which every record is one read, as the kernel gives them.
    fn log_of(records: &[String]) -> KernelLog {
        let flags = nix::sys::socket::SockFlag::SOCK_NONBLOCK;
        let (reader, writer) = nix::sys::socket::socketpair(
            nix::sys::socket::AddressFamily::Unix,
            nix::sys::socket::SockType::SeqPacket,
            None,
            flags,
        )
        .expect("a socket pair");
        let mut writer = std::fs::File::from(writer);
        for record in records {
            writer.write_all(record.as_bytes()).expect("written");
        }
        KernelLog::handed_over(Some(reader))
    }

    #[test]
    fn only_kills_in_the_group_and_with_the_ids_of_a_sandbox_are_told_of_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut launcher = with_sandbox(directory.path(), 3);
        let (first, count) = (launcher.processes[&7].slot.base, launcher.processes[&7].slot.count);
        let (last, foreign) = (first + count - 1, first + count);
        launcher.parts.kernel_log = log_of(&[
            victim("s-test-55", "longer", 1, first),
            victim("s-test-", "shorter", 2, first),
            victim("s-test-5", "foreign", 3, foreign),
            victim("s-test-5", "below", 4, first - 1),
            used(4, first),
            victim("s-test-5", "one", 5, first),
            used(5, first),
            used(5, foreign),
            victim("s-test-5", "x,pid=1,uid=0", 7, last),
        ]);

        launcher.learn_of_kills();

        let told: Vec<_> = named(&launcher.processes[&7].killed).cloned().collect();
        let kill =
            |number, process: &str, used_bytes| wire::MemoryKill { number, process: process.to_owned(), used_bytes };
        assert_eq!(told, [kill(2, "one", 4096), kill(3, "x,pid=1,uid=0", 0)]);
    }

    /// The kernel names ten victims in five seconds, on the whole host, and no group of those that follow.
    #[test]
    fn kill_without_a_name_is_not_told_with_the_name_of_the_one_before_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut launcher = with_sandbox(directory.path(), 2);
        let uid = launcher.processes[&7].slot.base;
        launcher.parts.kernel_log = log_of(&[victim("s-test-5", "one", 5, uid), used(5, uid), used(6, uid)]);

        launcher.learn_of_kills();

        let told: Vec<_> = named(&launcher.processes[&7].killed).cloned().collect();
        assert_eq!(told, [wire::MemoryKill { number: 1, process: "one".to_owned(), used_bytes: 4096 }]);
        assert_eq!(launcher.processes[&7].killed.back().map(|killed| killed.told.number), Some(2));
    }

    #[test]
    fn the_newest_kills_are_kept_and_have_the_numbers_of_the_last_that_were_counted() {
        let mut killed = VecDeque::new();
        let add =
            |killed: &mut VecDeque<Killed>| killed.push_back(Killed { pid: 1, told: wire::MemoryKill::default() });
        let numbers = |killed: &VecDeque<Killed>| killed.iter().map(|killed| killed.told.number).collect::<Vec<_>>();
        add(&mut killed);
        number(&mut killed, 1);
        // Two more kills, of which the log has lost one.
        add(&mut killed);
        number(&mut killed, 3);
        assert_eq!(numbers(&killed), [1, 3]);
        // A record is there before its kill is counted.
        add(&mut killed);
        add(&mut killed);
        number(&mut killed, 4);
        assert_eq!(numbers(&killed), [1, 3, 4, 5]);
        number(&mut killed, 5);
        assert_eq!(numbers(&killed), [1, 3, 4, 5]);
    }
}
