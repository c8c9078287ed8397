//! The launcher's policy file: what the operator allows a runner to ask for.
//!
//! The file is the only source of paths. It must belong to the user the launcher runs as and must not be writable by
//! anyone else; an unknown key is an error, because a limit with a typing mistake is no limit.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// Everything in the file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Format of the file; must be 1.
    pub version: u32,
    /// The only uid whose connections are answered.
    pub runner_uid: u32,
    /// Group that may read spool files.
    pub runner_gid: u32,
    /// Uppers and spools live below it.
    pub state_directory: PathBuf,
    /// Sockets and the state file live below it.
    pub run_directory: PathBuf,
    /// Where slot locks live; one directory for every launcher of the host.
    #[serde(default)]
    pub lock_directory: Option<PathBuf>,
    /// The file this launcher may replace itself by.
    #[serde(default)]
    pub program: Option<PathBuf>,
    /// Socket to listen on when descriptor 0 is not a connection.
    #[serde(default)]
    pub listen: Option<PathBuf>,
    /// Default and upper bound for the time a sandbox lives without a runner.
    #[serde(default = "default_orphan_timeout")]
    pub orphan_timeout_seconds: u64,
    /// Sandboxes kept half-made, so that a request finds one.
    #[serde(default = "default_pool")]
    pub pool: u32,
    /// Where the kernel allows no namespace, make sandboxes of the tier `nested` instead of refusing to start.
    #[serde(default)]
    pub allow_nested: bool,
    /// Host ids.
    pub ids: Ids,
    /// Directories that may be a root filesystem, by name.
    #[serde(default)]
    pub rootfs: BTreeMap<String, Rootfs>,
    /// Directories that may be mounted, by name.
    #[serde(default)]
    pub volumes: BTreeMap<String, Volume>,
    /// What a sandbox of a name gets.
    pub profiles: BTreeMap<String, Profile>,
    /// Switches for negative controls.
    #[serde(default)]
    pub danger: Danger,
}

/// Host ids.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ids {
    /// First host id of our range.
    pub base: u32,
    /// Ids each sandbox gets.
    pub per_sandbox: u32,
    /// Number of slots.
    pub slots: u32,
}

/// A directory that may be a root filesystem.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rootfs {
    /// Absolute path.
    pub path: PathBuf,
}

/// A directory that may be mounted.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Volume {
    /// Absolute path on the host.
    pub path: PathBuf,
    /// Absolute path inside; `/mnt/NAME` when absent.
    #[serde(default)]
    pub target: Option<PathBuf>,
    /// Whether sandboxes may write.
    #[serde(default)]
    pub writable: bool,
}

/// What a sandbox of this profile gets.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// The workload is uid 0 inside, with a small capability set.
    pub root: bool,
    /// Which seccomp table.
    pub seccomp: SeccompProfile,
    /// Limits where the request names none.
    pub default: Limits,
    /// Limits a request cannot exceed.
    pub maximum: Limits,
}

/// Which seccomp table.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum SeccompProfile {
    /// Everything ordinary development tools need.
    Standard,
    /// Less.
    Strict,
}

/// Limits of one sandbox.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Thousandths of a processor.
    pub cpu_millis: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Bytes of disk.
    pub disk_bytes: u64,
}

/// Switches for negative controls.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Danger {
    /// Layers to leave out. Every receipt shows them missing.
    #[serde(default)]
    pub without: Vec<String>,
}

impl Danger {
    /// Whether this layer is left out.
    #[must_use]
    pub fn switches_off(&self, layer: &str) -> bool {
        self.without.iter().any(|name| name == layer)
    }
}

/// Layers that can be switched off.
pub const SWITCHABLE: [&str; 5] = ["seccomp", "landlock", "capabilities", "proc_masked", "cgroup_limits"];

/// Why a policy cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// It cannot be read.
    #[error("cannot read policy file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
    /// Others could change it.
    #[error("policy file {} belongs to uid {owner} with mode {mode:o}; it must belong to uid {expected} and be writable by nobody else", path.display())]
    Unsafe {
        /// The file.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Its permission bits.
        mode: u32,
        /// The user the launcher runs as.
        expected: u32,
    },
    /// It is not valid TOML of this format.
    #[error("policy file {} is not valid: {message}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What the parser says, names the key.
        message: String,
    },
    /// A value makes no sense.
    #[error("policy file {}: {problem}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// Names the key and the fix.
        problem: String,
    },
}

fn default_orphan_timeout() -> u64 {
    // 2 h 15 min: longer than the longest partition that a two hour command should survive.
    8100
}

fn default_pool() -> u32 {
    4
}

/// A policy file is small; anything larger is not one.
const MAX_BYTES: u64 = 1 << 20;

/// Reads and checks the policy. Returns its text as well.
///
/// # Errors
/// [`PolicyError`] names the file, the key and the fix.
pub fn load(path: &Path) -> Result<(Policy, String), PolicyError> {
    let read = |source| PolicyError::Read { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(read)?;
    let metadata = file.metadata().map_err(read)?;
    let expected = nix::unistd::geteuid().as_raw();
    if metadata.uid() != expected || metadata.mode() & 0o022 != 0 {
        return Err(PolicyError::Unsafe {
            path: path.to_owned(),
            owner: metadata.uid(),
            mode: metadata.mode() & 0o7777,
            expected,
        });
    }
    let mut text = String::new();
    // One byte more than is taken: what is cut would be tables that nobody misses.
    file.by_ref().take(MAX_BYTES + 1).read_to_string(&mut text).map_err(read)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(PolicyError::Value {
            path: path.to_owned(),
            problem: format!("it has more than {MAX_BYTES} bytes, write less into it"),
        });
    }
    Ok((parse(&text, path)?, text))
}

/// Parses and checks a policy text.
///
/// # Errors
/// As [`load`].
pub fn parse(text: &str, path: &Path) -> Result<Policy, PolicyError> {
    let policy: Policy = toml::from_str(text).map_err(|error| PolicyError::Syntax {
        path: path.to_owned(),
        message: error.to_string().trim_end().to_owned(),
    })?;
    match check(&policy) {
        None => Ok(policy),
        Some(problem) => Err(PolicyError::Value { path: path.to_owned(), problem }),
    }
}

fn check(policy: &Policy) -> Option<String> {
    if policy.version != 1 {
        return Some(format!("version is {}, this program reads version 1", policy.version));
    }
    let paths = [("state_directory", Some(&policy.state_directory)), ("run_directory", Some(&policy.run_directory))]
        .into_iter()
        .chain([
            ("lock_directory", policy.lock_directory.as_ref()),
            ("program", policy.program.as_ref()),
            ("listen", policy.listen.as_ref()),
        ]);
    for (key, path) in paths {
        if path.is_some_and(|p| !p.is_absolute()) {
            return Some(format!("{key} must be an absolute path"));
        }
    }
    for (name, rootfs) in &policy.rootfs {
        if !rootfs.path.is_absolute() {
            return Some(format!("rootfs.{name}.path must be an absolute path"));
        }
    }
    for (name, volume) in &policy.volumes {
        if !volume.path.is_absolute() || volume.target.as_ref().is_some_and(|t| !t.is_absolute()) {
            return Some(format!("volumes.{name}: path and target must be absolute paths"));
        }
    }
    if policy.ids.per_sandbox == 0 || policy.ids.slots == 0 {
        return Some("ids.per_sandbox and ids.slots must be at least 1".to_owned());
    }
    let ids = u64::from(policy.ids.per_sandbox) * u64::from(policy.ids.slots);
    if u64::from(policy.ids.base) + ids > u64::from(u32::MAX) {
        return Some("ids: base + per_sandbox * slots passes the highest id, 4294967294".to_owned());
    }
    for name in &policy.danger.without {
        if !SWITCHABLE.contains(&name.as_str()) {
            return Some(format!("danger.without: {name:?} is none of {}", SWITCHABLE.join(", ")));
        }
    }
    for (name, profile) in &policy.profiles {
        let (low, high) = (profile.default, profile.maximum);
        if low.memory_bytes > high.memory_bytes
            || low.cpu_millis > high.cpu_millis
            || low.pids > high.pids
            || low.disk_bytes > high.disk_bytes
        {
            return Some(format!("profiles.{name}: a default exceeds its maximum"));
        }
        if low.memory_bytes == 0 || low.cpu_millis == 0 || low.pids == 0 || low.disk_bytes == 0 {
            return Some(format!("profiles.{name}.default: every limit must be at least 1"));
        }
    }
    None
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A policy in which nothing is wrong.
    pub(in crate::launcher) const GOOD: &str = r#"
        version = 1
        runner_uid = 7
        runner_gid = 7
        state_directory = "/s"
        run_directory = "/r"
        [ids]
        base = 2013265920
        per_sandbox = 65536
        slots = 4
        [profiles.default]
        root = true
        seccomp = "standard"
        default = { memory_bytes = 1, cpu_millis = 1, pids = 1, disk_bytes = 1 }
        maximum = { memory_bytes = 2, cpu_millis = 2, pids = 2, disk_bytes = 2 }
    "#;

    /// The same with limits that a sandbox can live with.
    pub(in crate::launcher) fn roomy() -> String {
        ["memory_bytes", "disk_bytes", "pids", "cpu_millis"].into_iter().fold(GOOD.to_owned(), |policy, name| {
            let policy = policy.replace(&format!("{name} = 1"), &format!("{name} = 16777216"));
            policy.replace(&format!("{name} = 2"), &format!("{name} = 16777216"))
        })
    }

    fn problem(text: &str) -> String {
        parse(text, Path::new("/p")).expect_err("must be refused").to_string()
    }

    #[test]
    fn a_complete_policy_is_read() {
        let policy = parse(GOOD, Path::new("/p")).expect("valid");
        assert_eq!(policy.ids.slots, 4);
        assert_eq!(policy.orphan_timeout_seconds, 8100);
    }

    #[test]
    fn an_unknown_key_is_refused_by_name() {
        assert!(problem(&format!("mystery = 1\n{GOOD}")).contains("mystery"));
    }

    #[test]
    fn a_relative_path_is_refused_by_key() {
        assert!(problem(&GOOD.replace("\"/s\"", "\"s\"")).contains("state_directory must be an absolute path"));
    }

    #[test]
    fn a_newer_version_is_refused() {
        assert!(problem(&GOOD.replace("version = 1", "version = 2")).contains("version is 2"));
    }

    #[test]
    fn ids_beyond_the_kernel_limit_are_refused() {
        assert!(problem(&GOOD.replace("2013265920", "4294900000")).contains("highest id"));
    }

    #[test]
    fn a_default_above_its_maximum_is_refused() {
        assert!(problem(&GOOD.replace("memory_bytes = 1,", "memory_bytes = 3,")).contains("exceeds its maximum"));
    }

    #[test]
    fn an_unknown_danger_switch_is_refused() {
        assert!(problem(&format!("{GOOD}\n[danger]\nwithout = [\"everything\"]")).contains("everything"));
    }

    #[test]
    fn a_file_that_others_can_write_is_refused() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("launcher.toml");
        std::fs::write(&path, GOOD).expect("write");
        let mut permissions = std::fs::metadata(&path).expect("metadata").permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o664);
        std::fs::set_permissions(&path, permissions).expect("chmod");
        assert!(load(&path).expect_err("must be refused").to_string().contains("writable by nobody else"));
    }
}
