//! Writes the launcher's policy file: everything that the privileged process will ever do for a runner.
//!
//! An installation has `/etc/sandbox-runner/launcher.toml`, written by the operator. When one command starts its own
//! launcher, the policy is generated here. It is the only way in which a path reaches the launcher; no request names one.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

/// First host id of the range used when the operator names none. High enough to collide with no ordinary user.
pub const DEFAULT_ID_BASE: u32 = 2_013_265_920;
/// The first range belongs to the runner itself, so that no sandbox ever has an id of the process that guards it.
pub const RUNNER_ID: u32 = DEFAULT_ID_BASE;
/// Ids of one sandbox when the launcher owns enough of them.
pub const DEFAULT_IDS_PER_SANDBOX: u32 = 65_536;
/// Sandboxes that can exist at once.
pub const DEFAULT_SLOTS: u32 = 64;
/// Lease plus the time an orphaned sandbox may wait for a runner.
pub const DEFAULT_ORPHAN_TIMEOUT_SECONDS: u64 = 8_100;
/// Name of the profile whose workload is uid 0 inside.
pub const PROFILE_DEFAULT: &str = "default";
/// Name of the profile whose workload is an ordinary user inside.
pub const PROFILE_USER: &str = "user";
/// Name of the profile with the narrow system call table and an ordinary user.
pub const PROFILE_STRICT: &str = "strict";

/// Ids of one sandbox where only some 65,536 are mapped at all, as in a pod with a user namespace.
const COMPACT_IDS: u32 = 4_096;

/// Which ids the runner and the sandboxes of an embedded launcher get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdRanges {
    /// The runner, after it gave up root.
    pub runner: u32,
    /// The sandboxes.
    pub sandboxes: Ids,
}

impl IdRanges {
    /// The ranges that fit into the id map of this process, for `sandboxes` at once or more.
    #[must_use]
    pub fn of_this_process(sandboxes: u32) -> Self {
        Self::within(&std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default(), sandboxes)
    }

    /// The ranges that fit into this id map (user_namespaces(7)): the usual ones, or blocks of 4,096 of which the first
    /// belongs to the container itself and to the runner. More than the usual number of sandboxes are promised only where
    /// all their ids are mapped.
    #[must_use]
    pub fn within(uid_map: &str, sandboxes: u32) -> Self {
        let usual = |slots| Self {
            runner: RUNNER_ID,
            sandboxes: Ids {
                base: DEFAULT_ID_BASE + DEFAULT_IDS_PER_SANDBOX,
                per_sandbox: DEFAULT_IDS_PER_SANDBOX,
                slots,
            },
        };
        let ranges: Vec<(u64, u64)> = uid_map
            .lines()
            .filter_map(|line| {
                let mut fields = line.split_whitespace().map(|field| field.parse::<u64>().ok());
                let (start, _, count) = (fields.next()??, fields.next()??, fields.next()??);
                Some((start, count))
            })
            .collect();
        let fits = |slots: u32| {
            let last = u64::from(DEFAULT_ID_BASE) + (u64::from(slots) + 1) * u64::from(DEFAULT_IDS_PER_SANDBOX);
            ranges.iter().any(|(start, count)| *start <= u64::from(RUNNER_ID) && last <= start + count)
        };
        if let Some(slots) = [sandboxes.max(DEFAULT_SLOTS), DEFAULT_SLOTS].into_iter().find(|slots| fits(*slots)) {
            return usual(slots);
        }
        let whole = ranges.iter().find(|(start, _)| *start == 0);
        let blocks = whole.map_or(0, |(_, count)| count / u64::from(COMPACT_IDS));
        if blocks < 2 {
            return usual(DEFAULT_SLOTS);
        }
        let slots = u32::try_from(blocks - 1).unwrap_or(DEFAULT_SLOTS).min(DEFAULT_SLOTS);
        Self { runner: COMPACT_IDS - 1, sandboxes: Ids { base: COMPACT_IDS, per_sandbox: COMPACT_IDS, slots } }
    }
}

/// The whole policy file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LauncherPolicy {
    /// Format of the file.
    pub version: u32,
    /// The only uid whose requests are answered.
    pub runner_uid: u32,
    /// Group that owns sockets and spool directories.
    pub runner_gid: u32,
    /// Where uppers, pools and the launcher's own state live.
    pub state_directory: PathBuf,
    /// Where sockets live.
    pub run_directory: PathBuf,
    /// Where slots are locked: one directory for every launcher of the host, so that two never share a range.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lock_directory: Option<PathBuf>,
    /// Sandboxes kept half-made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool: Option<u32>,
    /// File that the launcher re-executes itself from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub program: Option<PathBuf>,
    /// Socket to listen on; absent when descriptor 0 is the connection.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<PathBuf>,
    /// How long a sandbox outlives its last runner.
    pub orphan_timeout_seconds: u64,
    /// Where the kernel allows no namespace, make sandboxes of the tier `nested`.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub allow_nested: bool,
    /// Host ids of the sandboxes.
    pub ids: Ids,
    /// Directories that may be a root filesystem, by name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rootfs: BTreeMap<String, RootfsDirectory>,
    /// Directories that may be mounted, by name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub volumes: BTreeMap<String, NamedVolume>,
    /// Named sets of rights.
    pub profiles: BTreeMap<String, LauncherProfile>,
    /// Layers left out on purpose.
    pub danger: Danger,
}

/// Host ids of the sandboxes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Ids {
    /// First host id of the range.
    pub base: u32,
    /// Ids of one sandbox.
    pub per_sandbox: u32,
    /// Number of sandboxes at once.
    pub slots: u32,
}

/// A directory that may be a root filesystem.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RootfsDirectory {
    /// Absolute host path.
    pub path: PathBuf,
}

/// A directory that may be mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NamedVolume {
    /// Absolute host path.
    pub path: PathBuf,
    /// Whether a sandbox may write to it.
    pub writable: bool,
}

/// A named set of rights.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LauncherProfile {
    /// The workload is uid 0 inside, with the small capability set.
    pub root: bool,
    /// Name of the system call table.
    pub seccomp: SeccompTable,
    /// Limits of a sandbox that asks for none.
    pub default: PolicyLimits,
    /// Highest limits a sandbox may ask for.
    pub maximum: PolicyLimits,
}

/// System call tables compiled into `sandbox-init`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SeccompTable {
    /// What compilers, package managers and debuggers of ordinary work need.
    Standard,
    /// Narrower.
    Strict,
}

/// Limits of one sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PolicyLimits {
    /// Bytes of memory, swap included.
    pub memory_bytes: u64,
    /// Thousandths of a processor.
    pub cpu_millis: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Bytes written to the root filesystem.
    pub disk_bytes: u64,
}

/// Layers left out on purpose: negative controls of tests. The receipt shows each as missing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Danger {
    /// Names of layers as in the receipt.
    pub without: Vec<String>,
}

/// The host's size, as far as limits depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostSize {
    /// Bytes of memory of the machine.
    pub memory_bytes: u64,
    /// Processors this process may use.
    pub processors: u64,
}

impl LauncherPolicy {
    /// A policy with the three stock profiles for a launcher that serves exactly one runner over descriptor 0.
    pub fn embedded(runner_uid: u32, runner_gid: u32, state: PathBuf, run: PathBuf, host: HostSize) -> Self {
        let profile = |root, seccomp| LauncherProfile {
            root,
            seccomp,
            default: default_limits(host),
            maximum: maximum_limits(host),
        };
        Self {
            version: 1,
            runner_uid,
            runner_gid,
            state_directory: state,
            run_directory: run,
            lock_directory: None,
            pool: None,
            program: None,
            listen: None,
            orphan_timeout_seconds: DEFAULT_ORPHAN_TIMEOUT_SECONDS,
            allow_nested: false,
            ids: Ids {
                base: DEFAULT_ID_BASE + DEFAULT_IDS_PER_SANDBOX,
                per_sandbox: DEFAULT_IDS_PER_SANDBOX,
                slots: DEFAULT_SLOTS,
            },
            rootfs: BTreeMap::new(),
            volumes: BTreeMap::new(),
            profiles: BTreeMap::from([
                (PROFILE_DEFAULT.to_owned(), profile(true, SeccompTable::Standard)),
                (PROFILE_USER.to_owned(), profile(false, SeccompTable::Standard)),
                (PROFILE_STRICT.to_owned(), profile(false, SeccompTable::Strict)),
            ]),
            danger: Danger::default(),
        }
    }

    /// The file's text.
    ///
    /// # Errors
    /// When a path is not UTF-8, which TOML cannot hold.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }
}

/// Half of the host for one sandbox by default, so that one careless command cannot take the machine with it.
fn default_limits(host: HostSize) -> PolicyLimits {
    PolicyLimits {
        memory_bytes: (host.memory_bytes / 2).clamp(64 << 20, 4 << 30),
        cpu_millis: (host.processors * 1000).max(1000),
        pids: 1024,
        disk_bytes: 8 << 30,
    }
}

fn maximum_limits(host: HostSize) -> PolicyLimits {
    PolicyLimits {
        memory_bytes: host.memory_bytes.max(64 << 20),
        cpu_millis: (host.processors * 1000).max(1000),
        pids: 32_768,
        disk_bytes: 1 << 40,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> LauncherPolicy {
        let host = HostSize { memory_bytes: 16 << 30, processors: 4 };
        LauncherPolicy::embedded(2_013_265_920, 2_013_265_920, "/var/lib/sandbox-runner".into(), "/run/x".into(), host)
    }

    #[test]
    fn generated_policy_has_the_documented_keys() {
        let mut policy = policy();
        policy.rootfs.insert("debian".into(), RootfsDirectory { path: "/srv/images/debian".into() });
        policy.danger.without.push("seccomp".into());

        let table: toml::Table = policy.to_toml().expect("utf-8 paths").parse().expect("valid TOML");

        assert_eq!(table["version"].as_integer(), Some(1));
        assert_eq!(table["runner_uid"].as_integer(), Some(2_013_265_920));
        assert_eq!(table["ids"]["slots"].as_integer(), Some(64));
        assert_eq!(table["rootfs"]["debian"]["path"].as_str(), Some("/srv/images/debian"));
        assert_eq!(table["profiles"]["default"]["root"].as_bool(), Some(true));
        assert_eq!(table["profiles"]["strict"]["seccomp"].as_str(), Some("strict"));
        assert_eq!(table["profiles"]["default"]["default"]["memory_bytes"].as_integer(), Some(4 << 30));
        assert_eq!(table["danger"]["without"][0].as_str(), Some("seccomp"));
        assert!(!table.contains_key("listen") && !table.contains_key("program"));
    }

    #[test]
    fn no_sandbox_can_have_the_id_of_the_runner() {
        let ids = policy().ids;

        assert!(!(ids.base..ids.base + ids.per_sandbox * ids.slots).contains(&RUNNER_ID));
        assert!(ids.base.checked_add(ids.per_sandbox * ids.slots).is_some());
    }

    #[test]
    fn pod_with_65536_ids_gives_fifteen_sandboxes_of_4096() {
        let ranges = IdRanges::within("         0    1000000      65536\n", 100);

        assert_eq!(ranges.sandboxes, Ids { base: 4096, per_sandbox: 4096, slots: 15 });
        assert!(ranges.runner < ranges.sandboxes.base);
    }

    #[test]
    fn host_with_all_ids_gives_the_usual_ranges() {
        let ranges = IdRanges::within("         0          0 4294967295\n", 0);

        assert_eq!(ranges.sandboxes.per_sandbox, DEFAULT_IDS_PER_SANDBOX);
        assert_eq!((ranges.runner, ranges.sandboxes.slots), (RUNNER_ID, DEFAULT_SLOTS));
    }

    #[test]
    fn host_with_all_ids_has_a_range_for_every_session_that_was_configured() {
        let slots = |sandboxes| IdRanges::within("         0          0 4294967295\n", sandboxes).sandboxes.slots;

        assert_eq!((slots(1), slots(515)), (DEFAULT_SLOTS, 515));
        // More than there are ids above the first: the launcher then says that every range is in use.
        assert_eq!(slots(u32::MAX), DEFAULT_SLOTS);
    }

    #[test]
    fn default_limits_never_exceed_the_maximum() {
        for memory_bytes in [0, 32 << 20, 1 << 30, 512 << 30] {
            let host = HostSize { memory_bytes, processors: 1 };
            assert!(default_limits(host).memory_bytes <= maximum_limits(host).memory_bytes);
            assert!(default_limits(host).disk_bytes <= maximum_limits(host).disk_bytes);
        }
    }
}
