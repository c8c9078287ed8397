//! Privileged: writes limit files and makes tmpfs mounts.
//!
//! What the next request will probably ask. Most sandboxes of a host are alike, so a blank gets the limits and the empty
//! upper of the last one ahead of need. Whoever asks for something else gets what he asks for, only a little later: what a
//! blank has is compared with every request.

use std::os::fd::OwnedFd;

use super::cgroup::Tree;
use super::policy_file::{Limits, Policy};
use super::rootfs::{Upper, upper_mount};
use super::spawn::{Blank, Range};
use super::validate::Checked;

/// Limits, as the launcher and its background process tell each other.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Amounts {
    /// Bytes of memory.
    #[prost(uint64, tag = "1")]
    pub memory_bytes: u64,
    /// Thousandths of a processor.
    #[prost(uint64, tag = "2")]
    pub cpu_millis: u64,
    /// Processes and threads.
    #[prost(uint64, tag = "3")]
    pub pids: u64,
    /// Bytes of disk.
    #[prost(uint64, tag = "4")]
    pub disk_bytes: u64,
}

impl From<Limits> for Amounts {
    fn from(limits: Limits) -> Self {
        let Limits { memory_bytes, cpu_millis, pids, disk_bytes } = limits;
        Self { memory_bytes, cpu_millis, pids, disk_bytes }
    }
}

impl From<Amounts> for Limits {
    fn from(amounts: Amounts) -> Self {
        let Amounts { memory_bytes, cpu_millis, pids, disk_bytes } = amounts;
        Self { memory_bytes, cpu_millis, pids, disk_bytes }
    }
}

/// Part of an order to the background process.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Forecast {
    /// The limits.
    #[prost(message, required, tag = "1")]
    pub amounts: Amounts,
    /// Changes go to memory.
    #[prost(bool, tag = "2")]
    pub ephemeral: bool,
    /// Limits are written at all.
    #[prost(bool, tag = "3")]
    pub limited: bool,
}

/// An empty upper in memory.
#[derive(Debug)]
pub struct MemoryUpper {
    /// Its size.
    pub bytes: u64,
    /// The detached mount.
    pub mount: OwnedFd,
}

impl Forecast {
    /// Before the first request: the defaults of the first profile.
    #[must_use]
    pub fn first(policy: &Policy) -> Option<Self> {
        let profile = policy.profiles.values().next()?;
        Some(Self::of(profile.default, true, policy))
    }

    /// After a request: the same again.
    #[must_use]
    pub fn after(request: &Checked, policy: &Policy) -> Self {
        Self::of(request.limits, request.ephemeral, policy)
    }

    fn of(limits: Limits, ephemeral: bool, policy: &Policy) -> Self {
        Self { amounts: limits.into(), ephemeral, limited: !policy.danger.switches_off("cgroup_limits") }
    }

    /// Gives a blank what will probably be asked of it. What does not succeed here is done, and reported, at the request.
    pub fn prepare(&self, tree: &Tree, blank: &mut Blank, range: Range, rootless: bool) {
        let limits = Limits::from(self.amounts);
        if self.limited && tree.limit(&blank.name, &limits).is_ok() {
            blank.limits = Some(limits);
        }
        if self.ephemeral {
            let bytes = memory_backed(&limits);
            let made = upper_mount(&Upper::Memory { bytes }, range.base, rootless);
            blank.upper = made.ok().map(|mount| MemoryUpper { bytes, mount });
        }
    }
}

/// Bytes of a root filesystem in memory: half of the memory limit at most. With /tmp, a quarter, and /dev/shm, a sixteenth,
/// the rest is left for processes: files in memory cannot be killed, so if they took all of it, a full disk would end every
/// process of the sandbox, one after the other, instead of being an error of the command that fills it.
#[must_use]
pub fn memory_backed(limits: &Limits) -> u64 {
    limits.disk_bytes.min(limits.memory_bytes / 2)
}
