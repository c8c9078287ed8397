//! Privileged: reads what the launcher itself was executed from.
//!
//! What this host offers and what it lacks, each with what would add it.

use std::fs;

use proto::launch::v1::{HostReport, MissingLayer};

use super::background::chain;
use super::cgroup::Tree;
use super::host;
use super::nested;
use super::policy_file::Policy;
use super::shape::{Refusal, Shape};
use crate::policy::landlock;

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
