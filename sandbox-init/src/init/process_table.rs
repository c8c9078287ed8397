//! The processes of this pid namespace as /proc shows them. Only read where there are no cgroups.

use std::collections::HashMap;

use nix::unistd::Pid;

/// One line of the table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Process {
    /// Its pid.
    pub(crate) pid: Pid,
    /// Its parent.
    pub(crate) parent: Pid,
    /// Clock ticks after boot; with the pid it names a process for good.
    pub(crate) start_time: u64,
    /// It has ended and was not reaped.
    pub(crate) is_zombie: bool,
}

/// A table that can be searched by pid.
#[derive(Debug, Default)]
pub(crate) struct ProcessTable {
    by_pid: HashMap<Pid, Process>,
}

impl ProcessTable {
    /// All of them, in no order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Process> {
        self.by_pid.values()
    }

    /// How many processes of the table are above this one.
    pub(crate) fn depth(&self, pid: Pid) -> usize {
        let parent = |pid: &Pid| self.by_pid.get(pid).map(|process| process.parent);
        std::iter::successors(parent(&pid), parent).take(self.by_pid.len()).count()
    }

    /// When this process was started.
    pub(crate) fn start_time(&self, pid: Pid) -> Option<u64> {
        self.by_pid.get(&pid).map(|process| process.start_time)
    }
}

/// Reads the table; a process that ends meanwhile is left out.
pub(crate) fn read_processes() -> ProcessTable {
    let mut by_pid = HashMap::new();
    let Ok(entries) = std::fs::read_dir("/proc") else { return ProcessTable { by_pid } };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(stat) = std::fs::read(entry.path().join("stat")) else { continue };
        if let Some(process) = parse_stat(pid, &stat) {
            by_pid.insert(process.pid, process);
        }
    }
    ProcessTable { by_pid }
}

/// Whether `pid` is `ancestor` or was started below it.
pub(crate) fn descends_from(pid: Pid, ancestor: Pid, table: &ProcessTable) -> bool {
    let mut at = pid;
    // Parents form no circle, but the table was not read in one moment.
    for _ in 0..table.by_pid.len().saturating_add(1) {
        if at == ancestor {
            return true;
        }
        match table.by_pid.get(&at) {
            Some(process) => at = process.parent,
            None => return false,
        }
    }
    false
}

/// The name is chosen by the process and may contain spaces and parentheses, so fields are counted from its last ')'.
fn parse_stat(pid: i32, stat: &[u8]) -> Option<Process> {
    let end = stat.iter().rposition(|byte| *byte == b')')?;
    let rest = std::str::from_utf8(stat.get(end.saturating_add(1)..)?).ok()?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let parent = fields.get(1)?.parse().ok()?;
    let start_time = fields.get(19)?.parse().ok()?;
    let is_zombie = matches!(fields.first().copied(), Some("Z" | "X"));
    Some(Process { pid: Pid::from_raw(pid), parent: Pid::from_raw(parent), start_time, is_zombie })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_cannot_lie_with_its_name() {
        let stat = b"7 (a) Z 1 (b) S 42 7 7 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 12345 0 0";
        let process = parse_stat(7, stat).unwrap();
        assert_eq!((process.parent, process.start_time, process.is_zombie), (Pid::from_raw(42), 12345, false));
    }

    #[test]
    fn this_process_descends_from_its_parent_and_not_from_its_child() {
        let table = read_processes();
        let me = nix::unistd::getpid();
        assert!(descends_from(me, nix::unistd::getppid(), &table));
        assert!(!descends_from(nix::unistd::getppid(), me, &table));
    }
}
