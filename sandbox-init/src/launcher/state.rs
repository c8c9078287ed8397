//! The state file: what a later launcher needs to adopt living sandboxes.
//!
//! Written whole to a temporary name and renamed, on every change. A process is known by pid *and* start time *and* boot
//! id, so a pid that was used again is never taken for process 1.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::host::place;

/// Everything in the file.
#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Format; must be 1.
    pub version: u32,
    /// Boot the pids belong to.
    pub boot_id: String,
    /// Living sandboxes.
    pub sandboxes: Vec<Record>,
}

/// One living sandbox.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// The sandbox.
    pub sandbox_id: String,
    /// Name of its cgroups and files.
    pub name: String,
    /// Host pid of process 1.
    pub pid: i32,
    /// Field 22 of `/proc/PID/stat`.
    pub start_time: u64,
    /// Id slot.
    pub slot: u32,
}

/// Format that this program writes and reads.
const VERSION: u32 = 1;

/// A directory that only the launcher's user can write: what stands in the file is believed.
fn path() -> PathBuf {
    Path::new(place::STATE).join("launcher").join("state.json")
}

/// The boot id of this kernel.
#[must_use]
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// Writes the file.
///
/// # Errors
/// The cause; the old file stays.
pub fn store(sandboxes: Vec<Record>) -> io::Result<()> {
    let state = State { version: VERSION, boot_id: boot_id(), sandboxes };
    let text = serde_json::to_vec(&state).map_err(io::Error::other)?;
    let temporary = path().with_extension("new");
    let _ = fs::remove_file(&temporary);
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(&temporary)?;
    file.write_all(&text)?;
    fs::rename(temporary, path())
}

/// Reads the file. A missing file, another boot and an unreadable file are all an empty state: what such a file named is
/// found by its cgroups and killed.
#[must_use]
pub fn load() -> Vec<Record> {
    let Ok(file) = fs::OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path()) else {
        return Vec::new();
    };
    let ours =
        file.metadata().is_ok_and(|found| found.uid() == nix::unistd::geteuid().as_raw() && found.mode() & 0o022 == 0);
    let mut text = Vec::new();
    if !ours || file.take(MAX_BYTES).read_to_end(&mut text).is_err() {
        return Vec::new();
    }
    match serde_json::from_slice::<State>(&text) {
        Ok(state) if state.version == VERSION && state.boot_id == boot_id() => {
            state.sandboxes.into_iter().filter(|record| is_our_name(&record.name)).collect()
        }
        _ => Vec::new(),
    }
}

/// Names that a launcher that can be adopted gives: a name is part of paths.
fn is_our_name(name: &str) -> bool {
    name.strip_prefix("s-").is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-'))
}

/// Largest state file that is read.
const MAX_BYTES: u64 = 4 << 20;

/// Removes the file, when the launcher ends for good.
pub fn clear() {
    let _ = fs::remove_file(path());
}

/// Start time of a process, field 22 of `/proc/PID/stat` (proc(5)).
#[must_use]
pub fn start_time(pid: i32) -> Option<u64> {
    parse_start_time(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn parse_start_time(stat: &str) -> Option<u64> {
    // The second field is a name in parentheses that may itself hold spaces and parentheses.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

/// A pidfd of the process that `record` names, if it is still that process.
#[must_use]
pub fn find(record: &Record) -> Option<OwnedFd> {
    let pidfd = crate::sys::process::pidfd_open(record.pid).ok()?;
    // Opened first, compared second: from here on the pid cannot be used again without us noticing.
    (start_time(record.pid)? == record.start_time).then_some(pidfd)
}

/// Whether the process of `record` is in the groups of its name, as process 1 of a sandbox is.
#[must_use]
pub fn is_in_its_group(record: &Record) -> bool {
    fs::read_to_string(format!("/proc/{}/cgroup", record.pid))
        .is_ok_and(|text| text.lines().any(|line| line.ends_with(&format!("/{}/init", record.name))))
}

/// Whether a pidfd says that its process has ended.
#[must_use]
pub fn has_ended(pidfd: &OwnedFd) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    let mut interest = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    !matches!(poll(&mut interest, PollTimeout::ZERO), Ok(0) | Err(Errno::EINTR))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_a_name_with_spaces_and_parentheses() {
        let fields: Vec<String> = (3..=25).map(|n| n.to_string()).collect();
        assert_eq!(parse_start_time(&format!("7 (a ) b) {}", fields.join(" "))), Some(22));
    }

    #[test]
    fn a_pid_with_another_start_time_is_not_adopted() {
        let pid = i32::try_from(std::process::id()).expect("small");
        let start = start_time(pid).expect("own stat");
        let record = |start_time| Record { sandbox_id: "a".into(), name: "s-a".into(), pid, start_time, slot: 0 };
        assert!(find(&record(start)).is_some());
        assert!(find(&record(start + 1)).is_none());
    }
}
