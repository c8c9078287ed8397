//! What every command with a launcher of its own needs: directories, policy, launcher, and a clean end.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::config::launcher_policy::{HostSize, IdRanges, LauncherPolicy, RootfsDirectory};
use crate::sandbox::HostSandboxes;
use crate::sandbox::home::{Home, Surroundings};
use crate::sandbox::identity::runner_identity;
use crate::sandbox::launch::{LaunchError, Launcher};
use crate::sandbox::start::{LauncherProcess, StartError, StartedLauncher, start_launcher};

/// Name under which a directory given on the command line stands in the generated policy.
pub(super) const GIVEN_ROOTFS: &str = "given";

/// What a command wants from its launcher.
#[derive(Debug, Default)]
pub(super) struct Wishes {
    /// `--state-dir`.
    pub(super) state_directory: Option<PathBuf>,
    /// Absolute path of a root filesystem, reachable under [`GIVEN_ROOTFS`].
    pub(super) rootfs: Option<PathBuf>,
    /// Layers to leave out.
    pub(super) without: Vec<String>,
    /// Where no namespace can be made, go on without: the command compares the tier with a floor, or says what it is.
    pub(super) allow_nested: bool,
    /// Sandboxes kept half-made; 0 for commands that make one and end.
    pub(super) pool: u32,
    /// Sandboxes at once, when they may be more than usual.
    pub(super) sandboxes: u32,
}

/// Starts a launcher for these wishes and gives up root. Call before any thread exists.
pub(super) fn start(wishes: &Wishes) -> Result<StartedLauncher, StartError> {
    start_in(&home(wishes.state_directory.as_deref()), wishes)
}

/// The same in these directories.
pub(super) fn start_in(home: &Home, wishes: &Wishes) -> Result<StartedLauncher, StartError> {
    let ranges = IdRanges::of_this_process(wishes.sandboxes.saturating_add(wishes.pool));
    let identity = runner_identity(ranges.runner);
    let mut policy =
        LauncherPolicy::embedded(identity.uid, identity.gid, home.state.clone(), home.run.clone(), host_size());
    policy.ids = ranges.sandboxes;
    policy.pool = Some(wishes.pool);
    policy.allow_nested = wishes.allow_nested;
    // Root's launchers share one range of ids, wherever each keeps its state.
    policy.lock_directory = nix::unistd::geteuid().is_root().then(|| PathBuf::from("/run/sandbox-runner-ids"));
    policy.danger.without.clone_from(&wishes.without);
    if let Some(path) = &wishes.rootfs {
        policy.rootfs = BTreeMap::from([(GIVEN_ROOTFS.to_owned(), RootfsDirectory { path: path.clone() })]);
    }
    start_launcher(home, &policy)
}

/// Directories of this user; `given` is `--state-dir`.
pub(super) fn home(given: Option<&Path>) -> Home {
    let (home, state_home) = (std::env::var_os("HOME"), std::env::var_os("XDG_STATE_HOME"));
    let uid = nix::unistd::geteuid().as_raw();
    Home::choose(given, Surroundings { uid, home: home.as_deref(), state_home: state_home.as_deref() })
}

/// The launcher after the runtime exists.
pub(super) fn sandboxes(started: StartedLauncher) -> Result<(HostSandboxes, LauncherProcess), LaunchError> {
    let launcher = Launcher::from_connection(started.connection)?;
    // Every sandbox of this launcher is ours alone, so there is no earlier runner to be told from.
    Ok((HostSandboxes::new(launcher, started.host, started.home.sandboxes(), 1), started.process))
}

/// Memory and processors of this machine.
pub(super) fn host_size() -> HostSize {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let processors = std::thread::available_parallelism().map_or(1, |count| count.get() as u64);
    HostSize { memory_bytes: total_memory(&meminfo).unwrap_or(1 << 30), processors }
}

fn total_memory(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// A path as the user typed it, made absolute; links are resolved by the launcher's policy, not by us.
pub(super) fn absolute(path: &Path) -> std::io::Result<PathBuf> {
    fs::canonicalize(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn total_memory_is_read_in_bytes() {
        assert_eq!(total_memory("MemTotal:       24689764 kB\nMemFree: 1 kB\n"), Some(24_689_764 * 1024));
        assert_eq!(total_memory("MemFree: 1 kB\n"), None);
    }
}
