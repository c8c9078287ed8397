//! Privileged: reads what the launcher itself was executed from.
//!
//! What this host offers and what it lacks, each with what would add it.

use std::fs;

use nix::errno::Errno;
use proto::launch::v1::{HostReport, MissingLayer};

use super::background::chain;
use super::cgroup::Tree;
use super::host;
use super::nested;
use super::policy_file::Policy;
use super::shape::{Refusal, Shape};
use crate::policy::landlock::{self, Achieved, WITHOUT_SCOPES};

/// What the launcher found out about the host, for its first answer.
pub(super) fn report(policy: &Policy, tree: &Tree, shape: Shape, refusal: Option<&Refusal>) -> HostReport {
    let rootless = shape == Shape::Unprivileged;
    let mut missing = refusal.map(nested::missing).unwrap_or_default();
    if let Some(failure) = &tree.failure {
        missing.extend(["cgroup_memory", "cgroup_pids", "cgroup_cpu", "cgroup_kill"].map(|layer| MissingLayer {
            layer: layer.to_owned(),
            attempt: chain(failure.as_ref()),
            errno: failure.errno(),
            remedy: cgroup_remedy(rootless).to_owned(),
        }));
    }
    if rootless {
        missing.push(MissingLayer {
            layer: "separate_principals".to_owned(),
            attempt: "only one id can be mapped".to_owned(),
            errno: libc::EPERM,
            remedy: "run as root: an ordinary user can map only its own id".to_owned(),
        });
    }
    missing.extend(without_landlock(landlock::offered_here()));
    let image_source = fs::read_link("/proc/self/exe")
        .map(|link| if link.to_string_lossy().starts_with("/memfd:") { "memfd" } else { "file" })
        .unwrap_or("file");
    HostReport {
        cgroup_mode: tree.mode().name().to_owned(),
        cgroup_controllers: tree.controllers.clone(),
        landlock_abi: landlock::kernel_abi().and_then(|abi| u32::try_from(abi).ok()).unwrap_or(0),
        ids_per_sandbox: policy.ids.per_sandbox,
        slots: policy.ids.slots,
        rootless,
        image_source: image_source.to_owned(),
        idmapped_lowers: shape == Shape::Privileged,
        missing,
        shape: shape.name().to_owned(),
        switched_off: policy.danger.without.clone(),
    }
}

/// The layers of landlock that this kernel does not give.
fn without_landlock(offered: Achieved) -> Vec<MissingLayer> {
    let entry = |layer: &str, errno: Errno, remedy: String| MissingLayer {
        layer: layer.to_owned(),
        attempt: "landlock_create_ruleset".to_owned(),
        errno: errno as i32,
        remedy,
    };
    match offered.not_applied {
        Some(reason) => {
            ["landlock", "landlock_scopes"].map(|layer| entry(layer, reason.errno(), reason.to_string())).into()
        }
        None if offered.scopes => Vec::new(),
        None => vec![entry("landlock_scopes", WITHOUT_SCOPES, "Linux 6.12 is needed".to_owned())],
    }
}

fn cgroup_remedy(rootless: bool) -> &'static str {
    if rootless {
        "run as root: the groups of an ordinary user are not used"
    } else if host::in_user_namespace() {
        "give the container's own cgroup to the container's root: with cgroup version 2 a privileged container with its own \
         cgroup namespace has that; with version 1 the directory of the container, and in the unified one cgroup.procs, \
         must be chowned to its root in every hierarchy"
    } else {
        "let root write to the cgroup tree: on a host that is mounted at /sys/fs/cgroup, in a container run it privileged"
    }
}
