//! The installed units, brought to a known state before every test.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use proto::launch::v1::{CreateSandbox, ListSandboxes, SandboxCreated, SandboxEntry, reply, request};
use sandbox_runner_tests::launcher::{Connection, plain_sandbox};

pub(crate) const LAUNCHER: &str = "sandbox-launcher.service";
pub(crate) const RUNNER: &str = "sandbox-runner.service";
pub(crate) const POLICY: &str = "/etc/sandbox-runner/launcher.toml";
pub(crate) const CONFIG: &str = "/etc/sandbox-runner/config.toml";
/// What the runner has written down.
const JOURNAL: &str = "/var/lib/sandbox-runner/journal";
/// The group of the launcher's unit.
pub(crate) const GROUP: &str = "/sys/fs/cgroup/sandbox.slice/sandbox-launcher.service";
/// Everything here ends within seconds; emulated machines are slow.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

static MACHINE: Mutex<()> = Mutex::new(());

/// Both units stopped, both files as they were installed. Held for the whole test; the next one begins anew.
pub(crate) struct Units {
    _machine: MutexGuard<'static, ()>,
    policy: &'static str,
    config: &'static str,
}

impl Units {
    pub(crate) fn stopped() -> Self {
        static INSTALLED: OnceLock<(String, String)> = OnceLock::new();
        let machine = MACHINE.lock().unwrap_or_else(PoisonError::into_inner);
        systemctl(&["stop", RUNNER, LAUNCHER]);
        // Nothing to reset is no problem.
        let _ = Command::new("systemctl").args(["reset-failed", RUNNER, LAUNCHER]).output();
        // Each test brings an orchestrator of its own, which must not be told what another one was owed.
        for file in fs::read_dir(JOURNAL).into_iter().flatten().flatten() {
            fs::remove_file(file.path()).expect("a file of the journal");
        }
        let read = |path: &str| fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let (policy, config) = INSTALLED.get_or_init(|| (read(POLICY), read(CONFIG)));
        let units = Self { _machine: machine, policy, config };
        units.write_policy(policy);
        units.write_config(config);
        units
    }

    pub(crate) fn with_launcher() -> Self {
        let units = Self::stopped();
        systemctl(&["start", LAUNCHER]);
        units
    }

    pub(crate) fn policy(&self) -> &'static str {
        self.policy
    }

    pub(crate) fn config(&self) -> &'static str {
        self.config
    }

    /// Owner and mode of the file stay.
    pub(crate) fn write_policy(&self, text: &str) {
        fs::write(POLICY, text).expect("the policy");
    }

    pub(crate) fn write_config(&self, text: &str) {
        fs::write(CONFIG, text).expect("the configuration");
    }
}

impl Drop for Units {
    fn drop(&mut self) {
        // Files that cannot be written any more are the smaller problem of a test that is failing already.
        let _ = fs::write(POLICY, self.policy);
        let _ = fs::write(CONFIG, self.config);
    }
}

/// Runs systemctl, which must succeed.
pub(crate) fn systemctl(arguments: &[&str]) {
    let finished = Command::new("systemctl").args(arguments).output().expect("systemctl");
    assert!(
        finished.status.success(),
        "systemctl {arguments:?}: {}\n{}",
        String::from_utf8_lossy(&finished.stderr),
        journal()
    );
}

/// The end of what both units have logged.
pub(crate) fn journal() -> String {
    let arguments = ["--no-pager", "--lines=40", "--unit", LAUNCHER, "--unit", RUNNER];
    let finished = Command::new("journalctl").args(arguments).output().expect("journalctl");
    String::from_utf8_lossy(&finished.stdout).into_owned()
}

pub(crate) fn property(unit: &str, name: &str) -> String {
    let arguments = ["show", "--value", "--property", name, unit];
    let finished = Command::new("systemctl").args(arguments).output().expect("systemctl show");
    String::from_utf8_lossy(&finished.stdout).trim().to_owned()
}

pub(crate) fn main_pid(unit: &str) -> u32 {
    property(unit, "MainPID").parse().expect("a number")
}

/// Waits until `found` says what is to be found.
pub(crate) fn until<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}: {what}\n{}", journal());
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Waits until systemd has replaced the main process of a unit.
pub(crate) fn replaced(unit: &str, before: u32) -> u32 {
    until("a new main process", || {
        let now = main_pid(unit);
        (now != 0 && now != before && property(unit, "ActiveState") == "active").then_some(now)
    })
}

/// The user that the runner's unit works as.
pub(crate) fn runner_uid() -> u32 {
    let finished = Command::new("id").args(["-u", "sandbox-runner"]).output().expect("id");
    String::from_utf8_lossy(&finished.stdout).trim().parse().expect("the user of the runner's unit")
}

/// A connection with the runner's uid, as soon as the launcher serves.
pub(crate) fn connect() -> Connection {
    let socket = Path::new("/run/sandbox-runner/launcher.sock");
    let uid = runner_uid();
    until("a launcher that serves", || Connection::greeted_as(socket, uid).ok())
}

pub(crate) fn create(connection: &Connection, sandbox: CreateSandbox) -> SandboxCreated {
    connection.create(sandbox).unwrap_or_else(|error| panic!("{error}\n{}", journal()))
}

pub(crate) fn create_plain(sandbox_id: &str) -> SandboxCreated {
    create(&connect(), plain_sandbox(sandbox_id))
}

pub(crate) fn list(connection: &Connection) -> Vec<SandboxEntry> {
    match connection.ask(request::Body::ListSandboxes(ListSandboxes::default())).expect("an answer").body {
        Some(reply::Body::SandboxList(list)) => list.sandboxes,
        other => panic!("no list: {other:?}"),
    }
}

/// Every group of the unit, the launcher's own left out.
pub(crate) fn groups_of_sandboxes() -> Vec<PathBuf> {
    let mut found = Vec::new();
    for base in fs::read_dir(GROUP).into_iter().flatten().flatten() {
        if base.file_name().to_string_lossy().starts_with("sandbox-runner-") {
            let below = fs::read_dir(base.path()).into_iter().flatten().flatten();
            found.extend(below.filter(|entry| entry.path().is_dir()).map(|entry| entry.path()));
        }
    }
    found
}

/// What is in the directories of the sandboxes.
pub(crate) fn files_of_sandboxes() -> Vec<PathBuf> {
    ["/var/lib/sandbox-runner/sandboxes", "/run/sandbox-runner/sandboxes"]
        .iter()
        .flat_map(|directory| fs::read_dir(directory).into_iter().flatten().flatten())
        .map(|entry| entry.path())
        .collect()
}
