//! Privileged: writes limit files and makes mounts.
//!
//! What the next request will probably ask. Most sandboxes of a host are alike, so a blank gets the limits and the root
//! filesystem of the last one ahead of need, over an upper of its own that is empty. Whoever asks for something else gets
//! what he asks for, only a little later: what a blank has is compared with every request.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::cgroup::Tree;
use super::host::{HostRoot, place};
use super::policy_file::{Limits, Policy};
use super::rootfs::{Builder, Built, Plan, Upper, upper_mount};
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
#[derive(Clone, PartialEq, Eq, prost::Message)]
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
    /// The lower directory in the trimmed namespace.
    #[prost(string, tag = "4")]
    pub lower: String,
    /// The lower is our skeleton and the host's own directories are mounted over it.
    #[prost(bool, tag = "5")]
    pub host_rootfs: bool,
}

/// An empty upper in memory, and what was mounted over it. Dropping any of it dissolves a mount, which waits for all
/// processors.
#[derive(Debug)]
pub struct Ahead {
    /// Size of the upper.
    pub bytes: u64,
    /// The detached mount of the upper.
    pub upper: OwnedFd,
    /// The root filesystem.
    pub root: Option<AheadRoot>,
}

impl Ahead {
    /// Whether it is what this request asks.
    #[must_use]
    pub fn is_for(&self, request: &Checked) -> bool {
        let root_matches = self.root.as_ref().is_none_or(|root| root.lower == request.lower);
        request.ephemeral && self.bytes == memory_backed(&request.limits) && root_matches
    }

    /// Everything that holds a mount.
    pub fn into_mounts(self) -> impl Iterator<Item = OwnedFd> {
        let root = self.root.into_iter().flat_map(|root| root.directories.into_iter().chain([root.built.mount]));
        root.chain([self.upper])
    }
}

/// A root filesystem that nobody has asked for yet.
#[derive(Debug)]
pub struct AheadRoot {
    /// Its lower directory in the trimmed namespace.
    pub lower: PathBuf,
    /// The overlay.
    pub built: Built,
    /// Copies of the host's directories, in the order of [`HostRoot`]; none where the lower is not the host.
    pub directories: Vec<OwnedFd>,
}

impl Forecast {
    /// Before the first request: the defaults of the first profile on the host's root filesystem.
    #[must_use]
    pub fn first(policy: &Policy) -> Option<Self> {
        let profile = policy.profiles.values().next()?;
        Some(Self::of(profile.default, true, (Path::new(place::SKELETON), true), policy))
    }

    /// After a request: the same again.
    #[must_use]
    pub fn after(request: &Checked, policy: &Policy) -> Self {
        Self::of(request.limits, request.ephemeral, (&request.lower, request.host_rootfs), policy)
    }

    fn of(limits: Limits, ephemeral: bool, (lower, host_rootfs): (&Path, bool), policy: &Policy) -> Self {
        // Names of the policy: ASCII.
        let lower = lower.to_string_lossy().into_owned();
        let limited = !policy.danger.switches_off("cgroup_limits");
        Self { amounts: limits.into(), ephemeral, limited, lower, host_rootfs }
    }

    /// Gives a blank what will probably be asked of it. What does not succeed here is done, and reported, at the request.
    pub fn prepare(&self, site: &mut Site<'_>, blank: &mut Blank, range: Range) {
        let limits = Limits::from(self.amounts);
        if self.limited && site.tree.limit(&blank.name, &limits).is_ok() {
            blank.limits = Some(limits);
        }
        if self.ephemeral {
            let bytes = memory_backed(&limits);
            blank.ahead = upper_mount(&Upper::Memory { bytes }, range.base, site.rootless).ok().map(|upper| {
                let root = self.root(site, blank, range, bytes, &upper);
                Ahead { bytes, upper, root }
            });
        }
    }

    fn root(&self, site: &mut Site<'_>, blank: &Blank, range: Range, bytes: u64, upper: &OwnedFd) -> Option<AheadRoot> {
        let private = blank.private.as_ref()?;
        let lower = PathBuf::from(&self.lower);
        let plan = Plan {
            lower: &lower,
            slot: range.slot,
            base: range.base,
            user_namespace: private.user_namespace.as_fd(),
            upper: Upper::Memory { bytes },
            rootless: site.rootless,
            add_points: site.rootless && !self.host_rootfs,
        };
        // The overlay last: an upper that has carried one carries no other.
        let directories = if self.host_rootfs { site.host_root.copies().ok()? } else { Vec::new() };
        let built = site.builder.build_by_descriptors(&plan, upper)?;
        Some(AheadRoot { lower, built, directories })
    }
}

/// What preparing needs of whoever does it.
#[derive(Debug)]
pub struct Site<'a> {
    /// Our cgroups.
    pub tree: &'a Tree,
    /// Builds root filesystems.
    pub builder: &'a mut Builder,
    /// The host's directories.
    pub host_root: &'a HostRoot,
    /// Without privilege over the host's filesystems.
    pub rootless: bool,
}

/// Bytes of a root filesystem in memory: half of the memory limit at most. With /tmp, a quarter, and /dev/shm, a sixteenth,
/// the rest is left for processes: files in memory cannot be killed, so if they took all of it, a full disk would end every
/// process of the sandbox, one after the other, instead of being an error of the command that fills it.
#[must_use]
pub fn memory_backed(limits: &Limits) -> u64 {
    limits.disk_bytes.min(limits.memory_bytes / 2)
}

#[cfg(test)]
mod tests {
    use proto::launch::v1::{CreateSandbox, HostRootfs, create_sandbox::Rootfs};

    use super::*;
    use crate::launcher::policy_file::{self, tests::roomy};
    use crate::launcher::validate::check;

    fn ahead(bytes: u64, lower: &str) -> Ahead {
        let descriptor = || OwnedFd::from(std::fs::File::open("/dev/null").expect("a descriptor"));
        let built = Built { mount: descriptor(), idmapped: true };
        let root = AheadRoot { lower: lower.into(), built, directories: vec![descriptor()] };
        Ahead { bytes, upper: descriptor(), root: Some(root) }
    }

    #[test]
    fn what_was_made_ahead_goes_only_to_a_request_that_asks_for_the_same_root_filesystem() {
        let policy = policy_file::parse(&roomy(), Path::new("/p")).expect("valid policy");
        let request = |ephemeral| {
            let rootfs = Some(Rootfs::Host(HostRootfs {}));
            let (sandbox_id, profile) = ("a".to_owned(), "default".to_owned());
            let request = CreateSandbox { sandbox_id, profile, rootfs, ephemeral, ..CreateSandbox::default() };
            check(&request, &policy).expect("allowed")
        };
        let bytes = memory_backed(&request(true).limits);
        assert!(ahead(bytes, place::SKELETON).is_for(&request(true)));
        assert!(!ahead(bytes, place::SKELETON).is_for(&request(false)), "changes would be lost");
        assert!(!ahead(bytes + 4096, place::SKELETON).is_for(&request(true)), "another disk limit");
        assert!(!ahead(bytes, "/rootfs/other").is_for(&request(true)), "another root filesystem");
        assert_eq!(ahead(bytes, "/rootfs/other").into_mounts().count(), 3, "a mount is left");
    }
}
