//! Privileged: makes and removes cgroups below a base of our own (CAP_DAC_OVERRIDE on cgroupfs, or delegation).
//!
//! Layout, per sandbox `S`: `S/init` holds process 1 and the spawner, `S/work` holds the slots of the calls and carries the
//! customer's limits. On a host with cgroup v2 controllers both live in the unified tree. On a hybrid host the unified tree
//! carries membership, kill and freeze, and one group per v1 controller (memory, pids, cpu, cpuacct) carries the limits for
//! the whole sandbox, process 1 included: moving a process between v1 groups costs a grace period of 8 to 14 ms, so it is
//! done once, ahead of time, by the background process.
//!
//! [`hierarchy`] and [`base`] find out what this host has for us, [`making`], [`limits`] and [`ending`] are the life of one
//! sandbox's groups, [`account`] reads what the kernel has counted in them, [`reclaim`] asks for memory back.

mod account;
mod base;
mod ending;
mod files;
mod hierarchy;
mod limits;
mod making;
mod reclaim;

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::sys::statfs::TMPFS_MAGIC;

pub use self::account::Account;
pub use self::making::Group;
pub use self::reclaim::Reclaim;

/// How the host's controllers are mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Everything in cgroup v2.
    Unified,
    /// Controllers in v1, membership in v2.
    Hybrid,
    /// Nothing we may write.
    None,
}

impl Mode {
    /// Name for reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Unified => "unified",
            Self::Hybrid => "hybrid",
            Self::None => "none",
        }
    }
}

/// Why a cgroup step failed.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// A file or directory of cgroupfs refused.
    #[error("cannot {action} cgroup {}", path.display())]
    File {
        /// create, open, write, remove.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A limit was refused.
    #[error("cannot set {limit} of cgroup {}: {message}", path.display())]
    Limit {
        /// memory, pids or cpu.
        limit: &'static str,
        /// Where.
        path: PathBuf,
        /// What cgroups-rs says.
        message: String,
    },
}

impl CgroupError {
    /// errno of the cause, 0 if none.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::File { source, .. } => source.raw_os_error().unwrap_or(0),
            Self::Limit { .. } => 0,
        }
    }
}

/// Controllers that we use in the unified tree.
const CONTROLLERS: [&str; 3] = ["memory", "pids", "cpu"];
/// v1 controllers that we use.
pub(super) const V1_CONTROLLERS: [&str; 4] = ["memory", "pids", "cpu", "cpuacct"];

/// The base of our groups in each hierarchy.
#[derive(Clone, Debug)]
pub struct Tree {
    mode: Mode,
    unified: Option<PathBuf>,
    v1: Vec<(&'static str, PathBuf)>,
    /// Controllers that limits can be set with.
    pub controllers: Vec<String>,
    /// Why there is none, when there is none.
    pub failure: Option<std::sync::Arc<CgroupError>>,
    /// Files of process 1 are memory that nothing can take back.
    spools_in_memory: bool,
}

impl Tree {
    /// No groups at all.
    #[must_use]
    pub fn nothing() -> Self {
        Self {
            mode: Mode::None,
            unified: None,
            v1: Vec::new(),
            controllers: Vec::new(),
            failure: None,
            spools_in_memory: false,
        }
    }

    /// Groups of version 2 in a directory of the test's own.
    #[cfg(test)]
    pub(super) fn unified_at(base: &Path) -> Self {
        Self { mode: Mode::Unified, unified: Some(base.to_owned()), ..Self::nothing() }
    }

    /// Looks where the files of sandboxes lie. On a tmpfs what process 1 writes into its spool stays charged to it.
    pub fn look_at_spools(&mut self, directory: &Path) {
        self.spools_in_memory =
            nix::sys::statfs::statfs(directory).is_ok_and(|found| found.filesystem_type() == TMPFS_MAGIC);
    }

    /// How the host's controllers are mounted.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Names with this prefix that have a group here.
    #[must_use]
    pub fn names(&self, prefix: &str) -> Vec<String> {
        let Some(base) = &self.unified else { return Vec::new() };
        let Ok(entries) = fs::read_dir(base) else { return Vec::new() };
        entries
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| name.starts_with(prefix))
            .collect()
    }

    /// Name of our base, the same in each hierarchy; empty where there is none.
    #[must_use]
    pub fn base_name(&self) -> &str {
        self.unified.as_deref().and_then(Path::file_name).and_then(OsStr::to_str).unwrap_or_default()
    }

    fn work(&self, name: &str) -> PathBuf {
        self.unified.clone().unwrap_or_default().join(name).join("work")
    }
}
