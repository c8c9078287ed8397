//! Privileged: reads groups that belong to the launcher.
//!
//! What the kernel has counted in the groups of one sandbox. A file that a host does not have reads as 0.

use std::fs;
use std::path::PathBuf;

use super::files::{field, number, read};
use super::{Mode, Tree};

/// The kernel charges so many bytes at once when there is room, and fewer before it gives up (MEMCG_CHARGE_BATCH, 64 pages).
const CHARGED_AT_ONCE: u64 = 64 * 4096;

/// The kernel's account of one sandbox.
#[derive(Clone, Debug, Default)]
pub struct Account {
    /// Bytes in use.
    pub memory_bytes: u64,
    /// Highest use.
    pub memory_peak_bytes: u64,
    /// Kills for memory.
    pub oom_kills: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Forks refused.
    pub pids_refused: u64,
    /// Processor time.
    pub cpu_usec: u64,
    /// Limit in force.
    pub memory_limit: u64,
    /// Limit in force.
    pub pids_limit: u64,
}

impl Tree {
    /// The kernel's account of a sandbox.
    #[must_use]
    pub fn account(&self, name: &str) -> Account {
        let mut account = Account::default();
        match self.mode {
            Mode::Unified => {
                let work = self.work(name);
                account.memory_bytes = number(&work.join("memory.current"));
                account.memory_peak_bytes = number(&work.join("memory.peak"));
                account.oom_kills = self.oom_kills(name);
                account.pids = number(&work.join("pids.current"));
                account.pids_refused = field(&work.join("pids.events"), "max");
                account.cpu_usec = field(&work.join("cpu.stat"), "usage_usec");
                account.memory_limit = number(&work.join("memory.max"));
                account.pids_limit = number(&work.join("pids.max"));
            }
            Mode::Hybrid => {
                for (controller, base) in &self.v1 {
                    let directory = base.join(name);
                    match *controller {
                        "memory" => {
                            account.memory_bytes = number(&directory.join("memory.usage_in_bytes"));
                            account.memory_peak_bytes = number(&directory.join("memory.max_usage_in_bytes"));
                            account.oom_kills = field(&directory.join("memory.oom_control"), "oom_kill");
                            account.memory_limit = number(&directory.join("memory.limit_in_bytes"));
                        }
                        "pids" => {
                            account.pids = number(&directory.join("pids.current"));
                            account.pids_refused = field(&directory.join("pids.events"), "max");
                            account.pids_limit = number(&directory.join("pids.max"));
                        }
                        "cpuacct" => account.cpu_usec = number(&directory.join("cpuacct.usage")) / 1000,
                        _ => {}
                    }
                }
            }
            Mode::None => {}
        }
        account
    }

    /// Processes that the kernel killed because a memory limit was reached. Cheaper than the whole account: it stands
    /// between the end of a sandbox and the answer to whoever waits for it.
    #[must_use]
    pub fn oom_kills(&self, name: &str) -> u64 {
        match self.mode {
            // Also in the group of process 1, which has a limit of its own.
            Mode::Unified => field(&self.sandbox(name).join("memory.events"), "oom_kill"),
            Mode::Hybrid => {
                let memory = self.v1.iter().find(|(controller, _)| *controller == "memory");
                memory.map_or(0, |(_, base)| field(&base.join(name).join("memory.oom_control"), "oom_kill"))
            }
            Mode::None => 0,
        }
    }

    /// The memory limit of a sandbox, if it has ever been reached; 0 when it has not, or that cannot be told. Asked after a kill.
    #[must_use]
    pub fn reached_memory_limit(&self, name: &str) -> u64 {
        match self.mode {
            Mode::Unified => {
                let groups = [self.work(name), self.sandbox(name).join("init")];
                let reached = groups.iter().find(|group| field(&group.join("memory.events.local"), "oom") > 0);
                reached.map_or(0, |group| number(&group.join("memory.max")))
            }
            Mode::Hybrid => {
                let Some((_, base)) = self.v1.iter().find(|(controller, _)| *controller == "memory") else { return 0 };
                let file = |file| number(&base.join(name).join(file));
                let limit = file("memory.limit_in_bytes");
                let peak = file("memory.max_usage_in_bytes").max(file("memory.memsw.max_usage_in_bytes"));
                if peak.saturating_add(CHARGED_AT_ONCE) >= limit { limit } else { 0 }
            }
            Mode::None => 0,
        }
    }

    fn sandbox(&self, name: &str) -> PathBuf {
        self.unified.clone().unwrap_or_default().join(name)
    }

    /// Host pids of every process of the sandbox.
    #[must_use]
    pub fn processes(&self, name: &str) -> Vec<u32> {
        let Some(base) = &self.unified else { return Vec::new() };
        let mut found = Vec::new();
        let mut pending = vec![base.join(name)];
        while let Some(directory) = pending.pop() {
            found.extend(
                read(&directory.join("cgroup.procs")).split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()),
            );
            let Ok(entries) = fs::read_dir(&directory) else { continue };
            pending.extend(entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())).map(|e| e.path()));
        }
        found
    }
}
