//! Everything a sandbox could leave behind or change on the host, counted from outside.
//!
//! A snapshot before and one after must be equal. What takes a moment to go away (a mount that the kernel drops lazily, a
//! process that is being reaped) gets a bounded wait; what is still there then is a leak.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// First host id that sandboxes get by default; a process above it belongs to a sandbox.
pub const FIRST_SANDBOX_ID: u32 = 2_013_265_920;

static HOST: RwLock<()> = RwLock::new(());

/// Held by tests that only use the host.
pub fn shared() -> RwLockReadGuard<'static, ()> {
    HOST.read().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Held by tests that count what is on the host: nobody else of this test binary may change it meanwhile.
pub fn exclusive() -> RwLockWriteGuard<'static, ()> {
    HOST.write().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// What the host looks like. Every entry names its kind, so that a difference explains itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    entries: BTreeSet<String>,
    foreign: BTreeSet<String>,
}

/// Names of the cgroups of launchers that run now. A host may have a runner of its own, whose sandboxes come and go while
/// ours are counted.
#[must_use]
pub fn launcher_groups() -> BTreeSet<String> {
    let names = cgroups().into_iter().filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()));
    names.filter(|name| name.starts_with("sandbox-runner-")).collect()
}

impl Snapshot {
    /// Mounts, cgroups, loop devices, settings, and the files below `directories`.
    #[must_use]
    pub fn take(directories: &[&Path]) -> Self {
        Self::take_beside(directories, launcher_groups())
    }

    /// The same, leaving out what happens below the groups of launchers that are not ours.
    #[must_use]
    pub fn take_beside(directories: &[&Path], foreign: BTreeSet<String>) -> Self {
        let mut entries = BTreeSet::new();
        let mut add = |kind: &str, value: String| {
            entries.insert(format!("{kind} {value}"));
        };
        for line in fs::read_to_string("/proc/self/mountinfo").unwrap_or_default().lines() {
            add("mount", line.to_owned());
        }
        for path in cgroups() {
            add("cgroup", path.display().to_string());
        }
        for path in loop_devices() {
            add("loop device", path);
        }
        for (name, value) in settings() {
            add("setting", format!("{name} = {value}"));
        }
        for (pid, name) in sandbox_processes() {
            add("process", format!("{pid} {name} in {}", group_of(pid)));
        }
        for directory in directories {
            for path in files_below(directory) {
                add("file", path.display().to_string());
            }
        }
        Self { entries, foreign }
    }

    /// Leaves out what happens below more groups of others, for instance of launchers that came later.
    pub fn leave_out(&mut self, foreign: BTreeSet<String>) {
        self.foreign.extend(foreign);
    }

    /// What is here and was not in `earlier`, and what is gone since.
    #[must_use]
    pub fn difference(&self, earlier: &Self) -> Vec<String> {
        let new = self.entries.difference(&earlier.entries).map(|entry| format!("new: {entry}"));
        // Processes and groups of others end when they like; what ends is no leak, and canaries watch for damage.
        let ends = |entry: &&String| !entry.starts_with("process ") && !entry.starts_with("cgroup ");
        let gone = earlier.entries.difference(&self.entries).filter(ends).map(|entry| format!("gone: {entry}"));
        new.chain(gone).filter(|entry| !earlier.foreign.iter().any(|group| entry.contains(group))).collect()
    }
}

/// Waits until the host looks as it did, at most `patience`.
///
/// # Panics
/// With every difference, when it does not.
pub fn assert_restored(earlier: &Snapshot, directories: &[&Path], patience: Duration) {
    let deadline = Instant::now() + crate::runner::scaled(patience);
    loop {
        let difference = Snapshot::take(directories).difference(earlier);
        if difference.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "the host is not as it was:\n  {}", difference.join("\n  "));
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The group of a process in the unified tree, which tells whose it is.
fn group_of(pid: u32) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    text.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("?").to_owned()
}

/// Inodes of the namespaces that some process is in, leaving out the sandboxes of foreign launchers.
#[must_use]
pub fn namespaces(foreign: &BTreeSet<String>) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for pid in pids() {
        let group = group_of(pid);
        if foreign.iter().any(|name| group.contains(name)) {
            continue;
        }
        for kind in ["mnt", "uts", "ipc", "pid", "net", "user", "cgroup"] {
            if let Ok(name) = fs::read_link(format!("/proc/{pid}/ns/{kind}")) {
                found.insert(name.display().to_string());
            }
        }
    }
    found
}

/// Processes of sandboxes and of our own program: by id range, by name, or by being run from a memory file of ours.
#[must_use]
pub fn sandbox_processes() -> Vec<(u32, String)> {
    pids().filter_map(|pid| belongs_to_sandbox(pid).map(|name| (pid, name))).collect()
}

/// Host pids of all processes whose command line contains `token`.
#[must_use]
pub fn processes_with(token: &str) -> Vec<u32> {
    pids()
        .filter(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.windows(token.len()).any(|window| window == token.as_bytes())
        })
        .collect()
}

/// Direct children of a process.
#[must_use]
pub fn children_of(parent: u32) -> Vec<u32> {
    pids().filter(|pid| status_field(*pid, "PPid:").and_then(|text| text.parse().ok()) == Some(parent)).collect()
}

/// A process and everything that descends from it, parents first.
#[must_use]
pub fn family_of(pid: u32) -> Vec<u32> {
    let mut family = vec![pid];
    let mut next = 0;
    while let Some(parent) = family.get(next).copied() {
        family.extend(children_of(parent));
        next += 1;
    }
    family
}

/// Whether a process lives in the pid namespace of this test. One that has just ended does not live in any.
#[must_use]
pub fn is_outside(pid: u32) -> bool {
    status_field(pid, "NSpid:").is_some_and(|numbers| numbers.split_whitespace().count() == 1)
}

/// The pid that a process has in its own, innermost pid namespace, when that is not the one of this test.
#[must_use]
pub fn inner_pid(pid: u32) -> Option<u32> {
    let numbers = status_field(pid, "NSpid:")?;
    let mut numbers = numbers.split_whitespace();
    numbers.next()?;
    numbers.next_back()?.parse().ok()
}

/// The pid of the spawner in its sandbox: the first process that process 1 starts.
pub const SPAWNER: u32 = 2;

/// Processes of one sandbox, seen from the host.
#[derive(Debug, Clone, Copy)]
pub struct SandboxPids {
    /// The workload.
    pub workload: u32,
    /// Process 1.
    pub process_1: u32,
    /// The spawner.
    pub spawner: Option<u32>,
}

/// Waits for the workload whose arguments contain `token`, and finds the keepers beside it.
///
/// # Panics
/// When it does not appear.
#[must_use]
pub fn wait_for_sandbox(token: &str, patience: Duration) -> SandboxPids {
    let deadline = Instant::now() + crate::runner::scaled(patience);
    loop {
        if let Some(found) = sandbox_with(token) {
            return found;
        }
        assert!(Instant::now() < deadline, "no workload {token} appeared");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn sandbox_with(token: &str) -> Option<SandboxPids> {
    let workload = processes_with(token).into_iter().find(|pid| inner_pid(*pid).is_some())?;
    let namespace = fs::read_link(format!("/proc/{workload}/ns/pid")).ok()?;
    let members: Vec<u32> =
        pids().filter(|pid| fs::read_link(format!("/proc/{pid}/ns/pid")).is_ok_and(|link| link == namespace)).collect();
    let process_1 = members.iter().copied().find(|pid| inner_pid(*pid) == Some(1))?;
    let spawner = members.iter().copied().find(|pid| inner_pid(*pid) == Some(SPAWNER));
    Some(SandboxPids { workload, process_1, spawner })
}

/// A process that stands still for as long as this exists.
#[derive(Debug)]
pub struct Stopped(Pid);

impl Stopped {
    /// Stops a process, and returns when it stands still.
    ///
    /// # Panics
    /// When it is not there, or does not stop.
    #[must_use]
    pub fn new(pid: u32) -> Self {
        let stopped = Self(Pid::from_raw(pid.cast_signed()));
        kill(stopped.0, Signal::SIGSTOP).expect("a process of ours");
        let deadline = Instant::now() + Duration::from_secs(10);
        while status_field(pid, "State:").is_none_or(|state| !state.starts_with('T')) {
            assert!(Instant::now() < deadline, "process {pid} does not stop");
            std::thread::sleep(Duration::from_millis(1));
        }
        stopped
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // It may have been killed meanwhile.
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

/// Sends SIGKILL; a process that is already gone is fine.
pub fn kill_now(pid: u32) {
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.cast_signed()), nix::sys::signal::Signal::SIGKILL);
}

/// One field of `/proc/PID/status`.
#[must_use]
pub fn status_field(pid: u32, key: &str) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    text.lines().find_map(|line| line.strip_prefix(key)).map(|rest| rest.trim().to_owned())
}

/// Memory of a process that is in use.
#[must_use]
pub fn resident_bytes(pid: u32) -> u64 {
    let text = status_field(pid, "VmRSS:").unwrap_or_default();
    text.split_whitespace().next().and_then(|number| number.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Open descriptors of a process.
#[must_use]
pub fn descriptors(pid: u32) -> u64 {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count) as u64
}

/// Every process.
pub fn pids() -> impl Iterator<Item = u32> {
    fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// Every directory of every cgroup hierarchy.
#[must_use]
pub fn cgroups() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for line in fs::read_to_string("/proc/self/mountinfo").unwrap_or_default().lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        if !(right.starts_with("cgroup ") || right.starts_with("cgroup2 ")) {
            continue;
        }
        if let Some(target) = left.split(' ').nth(4) {
            directories_below(Path::new(target), &mut found);
        }
    }
    found
}

fn directories_below(directory: &Path, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    for entry in entries.flatten() {
        // Groups that tests of other crates make for themselves come and go while ours are counted.
        let of_another_test = entry.file_name().to_string_lossy().starts_with("sbr-");
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) && !of_another_test {
            found.push(entry.path());
            directories_below(&entry.path(), found);
        }
    }
}

/// Every name below a directory.
#[must_use]
pub fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let Ok(entries) = fs::read_dir(directory) else { return found };
    for entry in entries.flatten() {
        found.push(entry.path());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(files_below(&entry.path()));
        }
    }
    found
}

fn loop_devices() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/sys/block") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let file = fs::read_to_string(entry.path().join("loop/backing_file")).ok()?;
            Some(format!("{} on {}", entry.file_name().to_string_lossy(), file.trim()))
        })
        .collect()
}

/// Settings that an escape would want to change. Values that move by themselves are not among them.
fn settings() -> Vec<(&'static str, String)> {
    const NAMES: &[&str] = &[
        "kernel/core_pattern",
        "kernel/core_pipe_limit",
        "kernel/dmesg_restrict",
        "kernel/domainname",
        "kernel/hostname",
        "kernel/kptr_restrict",
        "kernel/modprobe",
        "kernel/msgmax",
        "kernel/panic",
        "kernel/perf_event_paranoid",
        "kernel/pid_max",
        "kernel/randomize_va_space",
        "kernel/shmmax",
        "kernel/sysrq",
        "kernel/threads-max",
        "kernel/unprivileged_bpf_disabled",
        "fs/file-max",
        "fs/inotify/max_user_instances",
        "fs/mqueue/queues_max",
        "fs/protected_symlinks",
        "fs/suid_dumpable",
        "net/core/somaxconn",
        "net/ipv4/ip_forward",
        "net/ipv4/ip_unprivileged_port_start",
        "user/max_user_namespaces",
        "vm/overcommit_memory",
        "vm/swappiness",
    ];
    NAMES
        .iter()
        .filter_map(|name| Some((*name, fs::read_to_string(Path::new("/proc/sys").join(name)).ok()?.trim().to_owned())))
        .collect()
}

/// Whether a process has ended and only its status is left, which the host's own init collects when it sees fit.
#[must_use]
pub fn is_ended_orphan(pid: u32) -> bool {
    let state = status_field(pid, "State:");
    state.is_none_or(|state| state.starts_with('Z')) && status_field(pid, "PPid:").is_none_or(|parent| parent == "1")
}

fn belongs_to_sandbox(pid: u32) -> Option<String> {
    if is_ended_orphan(pid) {
        return None;
    }
    let owner = fs::metadata(format!("/proc/{pid}")).ok()?.uid();
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let name = String::from_utf8_lossy(&line).replace('\0', " ");
    let first = name.split(' ').next().unwrap_or_default();
    let ours = first.ends_with("sandbox-init") || first.ends_with("sandbox-runner");
    let memory =
        fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe.to_string_lossy().contains("memfd:sandbox-init"));
    ((FIRST_SANDBOX_ID..u32::MAX - 1).contains(&owner) || ours || memory).then(|| name.trim().to_owned())
}
