//! What processes hold of the machine's memory.

use std::collections::BTreeSet;
use std::fs;

use sandbox_runner_tests::host;

/// Memory of processes and everything that descends from them.
#[derive(Debug)]
pub(crate) struct Memory {
    /// Whose it is.
    pub(crate) processes: BTreeSet<u32>,
    /// Bytes that nobody else has mapped.
    pub(crate) private: u64,
    /// Bytes that are mapped, those that are shared divided by the number of processes that share them.
    pub(crate) proportional: u64,
    /// By how many bytes that what can still be had of the machine became less, page tables and files in memory included. Negative
    /// where others gave back more.
    pub(crate) less_available: i64,
}

impl Memory {
    /// Measures now. `available` is what could be had before the first of the processes was started.
    pub(crate) fn of(roots: &[u32], available: i64) -> Self {
        let less_available = available - self::available();
        let processes: BTreeSet<u32> = roots.iter().flat_map(|root| host::family_of(*root)).collect();
        let (mut private, mut proportional) = (0, 0);
        for pid in &processes {
            // One that has ended meanwhile has none.
            let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
            private += bytes(&text, "Private_Clean:") + bytes(&text, "Private_Dirty:");
            proportional += bytes(&text, "Pss:");
        }
        assert!(private > 0, "the kernel does not tell what is private");
        Self { processes, private, proportional, less_available }
    }
}

/// Bytes that the machine can still give without swapping.
pub(crate) fn available() -> i64 {
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    i64::try_from(bytes(&text, "MemAvailable:")).unwrap()
}

fn bytes(text: &str, key: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
    line.split_whitespace().next().map_or(0, |number| number.parse::<u64>().unwrap() * 1024)
}
