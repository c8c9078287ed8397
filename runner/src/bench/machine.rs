//! The machine around a measurement: without it a figure is worth nothing.
//!
//! Foreign is what processes used that are neither ours (this process and all its descendants) nor the kernel's own
//! threads, which clean up after us and our peers, and what the hypervisor took away. It is added up process by process,
//! the reaped ones with their parents: the difference to all busy time would blame others for processes of ours that
//! nobody reaps, as those of a killed pid namespace.

use std::collections::BTreeMap;
use std::fs;

use serde_json::{Value, json};

use super::BenchError;

/// Ticks of /proc in a second; fixed in the kernel's interface to user space.
const TICKS_PER_SECOND: f64 = 100.0;
/// `PF_KTHREAD` of the flags in /proc/<pid>/stat.
const KERNEL_THREAD: u64 = 0x0020_0000;

/// What was used until one moment, in ticks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    total: u64,
    stolen: u64,
    others: u64,
}

impl Usage {
    /// Reads the machine's state.
    ///
    /// # Errors
    /// [`BenchError::Machine`].
    pub fn now() -> Result<Self, BenchError> {
        let (total, stolen) = processors(&read("/proc/stat")?).unwrap_or_default();
        let processes = processes()?;
        let own = std::process::id();
        let foreign = |(pid, process): &(&u32, &Process)| !process.kernel_thread && !descends(**pid, own, &processes);
        let others = processes.iter().filter(foreign).map(|(_, process)| process.used_and_reaped).sum();
        Ok(Self { total, stolen, others })
    }

    /// Share of all processors that others used since `before`, in percent.
    pub fn foreign_percent_since(&self, before: &Self) -> f64 {
        let span = self.total.saturating_sub(before.total);
        let foreign = self.others.saturating_sub(before.others) + self.stolen.saturating_sub(before.stolen);
        if span == 0 { 0.0 } else { 100.0 * ticks(foreign) / ticks(span) }
    }
}

#[allow(clippy::cast_precision_loss, reason = "tick counts are far below 2^52")]
fn ticks(count: u64) -> f64 {
    count as f64 / TICKS_PER_SECOND
}

/// One process of /proc.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Process {
    parent: u32,
    kernel_thread: bool,
    used_and_reaped: u64,
}

fn processes() -> Result<BTreeMap<u32, Process>, BenchError> {
    let entries = fs::read_dir("/proc").map_err(|source| BenchError::Machine { path: "/proc".to_owned(), source })?;
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    // A process that ends in between is counted by its parent.
    Ok(pids.filter_map(|pid| Some((pid, process(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?))).collect())
}

/// Parses /proc/<pid>/stat; the name in it may contain anything, so fields count from its last parenthesis.
fn process(stat: &str) -> Option<Process> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
    let (user, system, reaped_user, reaped_system) = (number(11)?, number(12)?, number(13)?, number(14)?);
    Some(Process {
        parent: u32::try_from(number(1)?).ok()?,
        kernel_thread: number(6)? & KERNEL_THREAD != 0,
        used_and_reaped: user + system + reaped_user + reaped_system,
    })
}

fn descends(pid: u32, ancestor: u32, processes: &BTreeMap<u32, Process>) -> bool {
    let mut current = pid;
    // Parents could form a circle only if pids were reused while we read, so the way up is bounded.
    for _ in 0..64 {
        if current == ancestor {
            return true;
        }
        match processes.get(&current) {
            Some(process) => current = process.parent,
            None => return false,
        }
    }
    false
}

/// All ticks of all processors, and those that the hypervisor took. Guest time is contained in user time.
fn processors(stat: &str) -> Option<(u64, u64)> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let fields: Vec<u64> = line.split_ascii_whitespace().map_while(|field| field.parse().ok()).take(8).collect();
    Some((fields.iter().sum(), *fields.get(7)?))
}

/// Everything about the machine that belongs beside published figures.
pub fn description() -> Result<(String, String), BenchError> {
    let cpuinfo = read("/proc/cpuinfo")?;
    let values = |key: &'static str| {
        cpuinfo
            .lines()
            .filter_map(move |line| line.split_once(':').filter(|(name, _)| name.trim() == key))
            .map(|(_, v)| v.trim())
    };
    let model = values("model name").next().unwrap_or("unknown processor");
    let memory = kilobytes(&read("/proc/meminfo")?, "MemTotal:").unwrap_or(0) / 1024;
    let hardware = format!("{} x {model}, {memory} MiB", values("processor").count());
    Ok((hardware, read("/proc/sys/kernel/osrelease")?.trim().to_owned()))
}

/// What has to be known about the moment of the measurement.
pub fn guards(foreign_percent: f64) -> Result<Value, BenchError> {
    let meminfo = read("/proc/meminfo")?;
    let loadavg = read("/proc/loadavg")?;
    Ok(json!({
        "processes": processes()?.len(),
        "tasks": loadavg.split_ascii_whitespace().nth(3).and_then(|field| field.split('/').nth(1)?.parse::<u64>().ok()),
        "load": loadavg.split_ascii_whitespace().next(),
        "available_mib": kilobytes(&meminfo, "MemAvailable:").map(|size| size / 1024),
        "free_mib": kilobytes(&meminfo, "MemFree:").map(|size| size / 1024),
        "foreign_cpu_percent": foreign_percent,
        "foreign_cpu_limit_percent": super::row::FOREIGN_LIMIT_PERCENT,
    }))
}

/// Memory that nobody uses, in KiB.
///
/// # Errors
/// [`BenchError::Machine`].
pub fn free_kib() -> Result<u64, BenchError> {
    Ok(kilobytes(&read("/proc/meminfo")?, "MemFree:").unwrap_or(0))
}

/// Memory that could be used without anything being moved out of the way, in KiB.
///
/// # Errors
/// [`BenchError::Machine`].
pub fn available_kib() -> Result<u64, BenchError> {
    Ok(kilobytes(&read("/proc/meminfo")?, "MemAvailable:").unwrap_or(0))
}

fn kilobytes(meminfo: &str, key: &str) -> Option<u64> {
    meminfo.lines().find_map(|line| line.strip_prefix(key))?.trim().strip_suffix("kB")?.trim().parse().ok()
}

fn read(path: &str) -> Result<String, BenchError> {
    fs::read_to_string(path).map_err(|source| BenchError::Machine { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_of_a_process_cannot_shift_its_fields() {
        let stat = "7 (a) b 1 (c) S 5 7 7 0 -1 2097152 1 2 3 4 10 20 30 40 20 0";

        let expected = Process { parent: 5, kernel_thread: true, used_and_reaped: 100 };
        assert_eq!(process(stat), Some(expected));
    }

    #[test]
    fn guest_time_is_not_counted_twice_and_stolen_time_is_known() {
        assert_eq!(processors("cpu  10 1 5 100 20 2 3 4 7 0\ncpu0 1\n"), Some((145, 4)));
    }

    #[test]
    fn what_others_used_and_what_was_stolen_is_foreign() {
        let before = Usage::default();
        let after = Usage { total: 200, stolen: 5, others: 15 };

        assert!((after.foreign_percent_since(&before) - 10.0).abs() < 1e-9);
        assert!((before.foreign_percent_since(&after)).abs() < 1e-9);
    }

    #[test]
    fn descendants_of_descendants_are_ours_and_kernel_threads_are_not() {
        let one = |parent| Process { parent, kernel_thread: false, used_and_reaped: 0 };
        let processes = BTreeMap::from([(1, one(0)), (2, one(0)), (5, one(1)), (6, one(5)), (7, one(2))]);

        assert!(descends(6, 5, &processes) && descends(5, 5, &processes));
        assert!(!descends(7, 5, &processes) && !descends(1, 5, &processes));
    }
}
