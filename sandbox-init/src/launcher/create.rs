//! Privileged: CAP_SYS_ADMIN to copy mounts.
//!
//! Turns a blank and a checked request into a boot packet: root filesystem, limits, and what came with the blank.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use prost::Message;
use proto::launch::v1::Layer;

use super::cgroup::{CgroupError, Tree};
use super::files::{FilesError, directory_of};
use super::forecast::{Ahead, AheadRoot, memory_backed};
use super::host::{HostRoot, Places, copy_of};
use super::ids::Slot;
use super::policy_file::{Limits, Policy};
use super::rootfs::{Builder, Plan, RootfsError, Upper, upper_mount};
use super::spawn::Blank;
use super::validate::Checked;
use crate::boot::{Boot, Role};
use crate::sys::mount::{attribute, set_attributes};
use crate::sys::socket::send;

/// Why a sandbox could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The root filesystem.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    /// The limits.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Directories and sockets of a sandbox without namespaces.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// A kernel call.
    #[error("cannot {step}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// The cause.
        #[source]
        source: nix::Error,
    },
}

pub(super) fn step(step: &'static str) -> impl FnOnce(nix::Error) -> CreateError {
    move |source| CreateError::Step { step, source }
}

/// What creation needs of the launcher.
#[derive(Debug)]
pub struct Context<'a> {
    /// The policy.
    pub policy: &'a Policy,
    /// Our cgroups.
    pub tree: &'a Tree,
    /// Builds root filesystems.
    pub builder: &'a mut Builder,
    /// The host's directories.
    pub host_root: &'a HostRoot,
    /// The launcher works in an unprivileged user namespace.
    pub rootless: bool,
    /// Sandboxes die with the launcher.
    pub embedded: bool,
    /// Our directories.
    pub places: &'a Places,
    /// Processors of this host.
    pub processors: &'a [u32],
}

/// Share of the disk limit that spool files may take on top of it.
pub(super) const SPOOL_SHARE: u64 = 4;

/// Bytes of /tmp; /dev/shm has a quarter of it.
fn temporary(limits: &Limits) -> u64 {
    limits.disk_bytes.min(limits.memory_bytes / 4)
}

/// Sends the boot packet. Returns the layers that the launcher itself made.
///
/// # Errors
/// [`CreateError`]; the caller kills the blank.
pub fn boot(
    context: &mut Context<'_>,
    blank: &mut Blank,
    slot: &Slot,
    request: &Checked,
) -> Result<Vec<Layer>, CreateError> {
    let limited = !context.policy.danger.switches_off("cgroup_limits");
    if limited && blank.limits != Some(request.limits) {
        context.tree.limit(&blank.name, &request.limits)?;
    }
    let upper = if request.ephemeral {
        Upper::Memory { bytes: memory_backed(&request.limits) }
    } else {
        Upper::Directory { path: directory_of(&blank.name) }
    };
    let private = blank.private.as_ref().ok_or(Errno::EBADF).map_err(step("find the user namespace of a blank"))?;
    let files = &private.files;
    let plan = Plan {
        lower: &request.lower,
        slot: slot.number,
        base: slot.base,
        user_namespace: private.user_namespace.as_fd(),
        upper,
        rootless: context.rootless,
        add_points: context.rootless && !request.host_rootfs,
    };
    // Refused before what was made ahead is taken apart: dissolving it takes time.
    let volumes = volumes(request)?;
    let (upper, root) = match blank.ahead.take() {
        Some(ahead) if ahead.is_for(request) => (ahead.upper, ahead.root),
        // No second overlay over the same upper: what was made for somebody else goes as a whole.
        other => {
            blank.spent.extend(other.into_iter().flat_map(Ahead::into_mounts));
            (upper_mount(&plan.upper, slot.base, context.rootless)?, None)
        }
    };
    let (root, directories) = match root {
        Some(AheadRoot { built, directories, .. }) => {
            context.builder.learn(&built, context.rootless);
            (built, directories)
        }
        None if request.host_rootfs => {
            (context.builder.build(&plan, &upper)?, context.host_root.copies().map_err(step("copy a mount"))?)
        }
        None => (context.builder.build(&plan, &upper)?, Vec::new()),
    };

    let mut message = message(context, slot, request);
    let mut descriptors: Vec<(Role, BorrowedFd<'_>)> = vec![
        (Role::Root, root.mount.as_fd()),
        (Role::Listener, files.listener.as_fd()),
        (Role::Spool, files.spool.as_fd()),
        (Role::SpoolMount, files.spool_mount.as_fd()),
    ];
    if let Some(group) = &blank.group {
        descriptors.push((Role::WorkCgroup, group.work.as_fd()));
        for (role, name) in [(Role::V1Memory, "memory"), (Role::V1Pids, "pids"), (Role::V1Account, "cpuacct")] {
            if let Some(directory) = group.v1_directory(name) {
                descriptors.push((role, directory));
            }
        }
    }
    if let Some(lock) = slot.lock() {
        descriptors.push((Role::SlotLock, lock));
    }
    let names = context.host_root.directories.iter().map(|name| format!("/{name}"));
    let mut mounts: Vec<(String, OwnedFd)> = names.zip(directories).collect();
    mounts.extend(volumes);
    for (target, mount) in &mounts {
        message.mount_targets.push(target.clone());
        descriptors.push((Role::Mount, mount.as_fd()));
    }
    send_boot(blank, message, &descriptors)?;
    blank.spent.push(upper);
    Ok(layers(context, request, root.idmapped, limited))
}

/// Sends a blank its boot packet with the descriptors that it names.
pub(super) fn send_boot(
    blank: &Blank,
    mut message: Boot,
    descriptors: &[(Role, BorrowedFd<'_>)],
) -> Result<(), CreateError> {
    message.roles = descriptors.iter().map(|(role, _)| *role as i32).collect();
    let raw: Vec<i32> = descriptors.iter().map(|(_, fd)| fd.as_raw_fd()).collect();
    send(&blank.boot, &message.encode_to_vec(), &raw).map_err(step("send the boot packet"))
}

/// What the boot packet says whatever the shape of the sandbox; without descriptors.
pub(super) fn message(context: &Context<'_>, slot: &Slot, request: &Checked) -> Boot {
    // A whole number of processors is also an affinity, so that nproc and thread pools see the limit.
    let wanted = usize::try_from(request.limits.cpu_millis.div_ceil(1000)).unwrap_or(usize::MAX);
    let first = usize::try_from(slot.number).unwrap_or(0);
    let count = context.processors.len();
    let processors = if wanted < count {
        (0..wanted).filter_map(|n| context.processors.get((first + n) % count)).copied().collect()
    } else {
        Vec::new()
    };
    Boot {
        sandbox_id: request.sandbox_id.clone(),
        hostname: request.hostname.clone(),
        environment: request.environment.clone(),
        working_directory: request.working_directory.clone().into_bytes(),
        orphan_timeout_ms: request.orphan_timeout_ms,
        root: request.profile.root || slot.count == 1,
        strict: request.profile.seccomp == super::policy_file::SeccompProfile::Strict,
        id_count: slot.count,
        temporary_bytes: temporary(&request.limits),
        spool_budget_bytes: request.limits.disk_bytes / SPOOL_SHARE,
        without: context.policy.danger.without.clone(),
        processors,
        die_with_launcher: context.embedded,
        mount_targets: Vec::new(),
        roles: Vec::new(),
        memory_bytes: request.limits.memory_bytes,
        own_skeleton: request.host_rootfs,
        nested: None,
    }
}

fn volumes(request: &Checked) -> Result<Vec<(String, OwnedFd)>, CreateError> {
    let mut mounts = Vec::new();
    for volume in &request.volumes {
        let mount = copy_of(&volume.source).map_err(step("copy a volume"))?;
        if volume.read_only {
            set_attributes(mount.as_fd(), attribute::READ_ONLY, 0, None, false)
                .map_err(step("make a volume read-only"))?;
        }
        mounts.push((volume.target.clone(), mount));
    }
    Ok(mounts)
}

pub(super) fn layer(name: &str, requested: impl Into<String>, enforced: impl Into<String>, errno: i32) -> Layer {
    Layer { name: name.to_owned(), requested: requested.into(), enforced: enforced.into(), errno }
}

fn layers(context: &Context<'_>, request: &Checked, idmapped: bool, limited: bool) -> Vec<Layer> {
    let limits = &request.limits;
    let errno = context.tree.failure.as_ref().map_or(0, |failure| failure.errno());
    let has = |name: &str| limited && context.tree.controllers.iter().any(|controller| controller == name);
    let enforced = |name: &str, text: String| if has(name) { text } else { String::new() };
    let memory = format!("{} bytes", limits.memory_bytes);
    let pids = format!("{} processes", limits.pids);
    let cpu = format!("{} thousandths of a processor", limits.cpu_millis);
    let disk = format!("{} bytes", limits.disk_bytes);
    let disk_in_memory = format!("{} bytes, tmpfs charged to memory", memory_backed(limits));
    vec![
        layer("cgroup_memory", memory.clone(), enforced("memory", memory), errno),
        layer("cgroup_pids", pids.clone(), enforced("pids", pids), errno),
        layer("cgroup_cpu", cpu.clone(), enforced("cpu", cpu), errno),
        layer(
            "cgroup_kill",
            "cgroup.kill",
            if context.tree.mode() == super::cgroup::Mode::None { "" } else { "cgroup.kill" },
            errno,
        ),
        layer(
            "disk_limit",
            disk,
            if request.ephemeral { disk_in_memory } else { String::new() },
            if request.ephemeral { 0 } else { libc::ENOTSUP },
        ),
        layer(
            "idmapped_lowers",
            "idmapped",
            if idmapped { "idmapped" } else { "" },
            if idmapped { 0 } else { libc::EINVAL },
        ),
    ]
}
