//! The directory of one slot and its files.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::thread::sleep;
use std::time::Duration;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use super::Counters;

/// Files of one slot, opened once: reading an open file costs a tenth of opening it, and every call reads them.
#[derive(Debug)]
pub(super) struct Cgroup {
    pub(super) directory: OwnedFd,
    pub(super) processes: File,
    memory_events: Option<File>,
    memory_peak: Option<File>,
    cpu_stat: Option<File>,
    pub(super) pids_events: Option<File>,
}

impl Cgroup {
    pub(super) fn open(work: &OwnedFd, name: &str) -> Result<Self, nix::Error> {
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

    pub(super) fn counters(&self) -> Counters {
        let text = |file: &Option<File>| file.as_ref().map(read_text).unwrap_or_default();
        Counters {
            memory_kills: field(&text(&self.memory_events), "oom_kill"),
            memory_peak: number(&text(&self.memory_peak)),
            memory_limit: None,
            limit_hits: None,
            cpu_usec: field(&text(&self.cpu_stat), "usage_usec"),
            forks_refused: None,
            shared: false,
        }
    }

    /// From Linux 6.12 on, a write starts the peak anew for this descriptor; before, it fails and changes nothing.
    pub(super) fn reset_peak(&self) -> bool {
        self.memory_peak.as_ref().is_some_and(|mut file| file.write_all(b"reset\n").is_ok())
    }

    pub(super) fn close_counters(&mut self) {
        self.memory_events = None;
        self.memory_peak = None;
        self.cpu_stat = None;
        self.pids_events = None;
    }
}

/// A slot whose processes do not run until this is dropped (`cgroup.freeze`, Documentation/admin-guide/cgroup-v2.rst).
pub(super) struct Standstill(Option<File>);

impl Standstill {
    /// The kernel stops processes one by one, which takes less than a millisecond; one that is busy in the kernel is not
    /// waited for.
    pub(super) fn begin(cgroup: &Cgroup) -> Self {
        let mut switch = open_write(&cgroup.directory, "cgroup.freeze");
        if switch.as_mut().is_none_or(|file| file.write_all(b"1").is_err()) {
            return Self(None);
        }
        for _ in 0..20 {
            if read_at(&cgroup.directory, "cgroup.events").lines().any(|line| line == "frozen 1") {
                break;
            }
            sleep(Duration::from_micros(200));
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

pub(super) fn open_read(directory: &OwnedFd, name: &str) -> Option<File> {
    openat(directory, name, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).ok().map(File::from)
}

pub(super) fn open_write(directory: &OwnedFd, name: &str) -> Option<File> {
    openat(directory, name, OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())
        .or_else(|_| openat(directory, name, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty()))
        .ok()
        .map(File::from)
}

pub(super) fn read_at(directory: &OwnedFd, name: &str) -> String {
    open_read(directory, name).map(|file| read_text(&file)).unwrap_or_default()
}

/// Reads a kernel text file from its beginning, however often it was read before.
pub(super) fn read_text(file: &File) -> String {
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
pub(super) fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

pub(super) fn number(text: &str) -> Option<u64> {
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
}
