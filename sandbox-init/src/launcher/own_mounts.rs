//! Privileged: CAP_SYS_ADMIN in the launcher's own user namespace, to mount the cgroup hierarchies.
//!
//! In a container the hierarchies may be mounted read-only, in part, or with a root above our own group. The launcher, alone
//! in its mount namespace, then lays mounts of its own over them. A cgroup namespace that begins at our own group goes with
//! them, so nothing outside of that group is in these mounts; and who may write there is the owner of the group, as ever.

use std::ffi::CString;
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;

use super::cgroup::V1_CONTROLLERS;
use crate::sys::mount::{FilesystemContext, attach, attribute};

const PLACE: &str = "/sys/fs/cgroup";

/// Covers the hierarchies of this mount namespace with mounts of our own.
///
/// # Errors
/// What the kernel refuses; `EPERM` without privilege over the own namespaces.
pub(super) fn mount() -> nix::Result<()> {
    let text = fs::read_to_string("/proc/self/cgroup").map_err(|_| Errno::ENOENT)?;
    unshare(CloneFlags::CLONE_NEWCGROUP)?;
    let hierarchies = hierarchies(&text);
    let unified_only = hierarchies.iter().all(|controllers| controllers.is_empty());
    if !unified_only {
        let context = FilesystemContext::open(c"tmpfs")?;
        context.set_string(c"size", c"65536")?;
        context.set_string(c"mode", c"0755")?;
        attach_at(Path::new(PLACE), &context.create(attribute::NO_SET_UID | attribute::NO_DEVICES)?)?;
    }
    for controllers in hierarchies {
        let context = FilesystemContext::open(if controllers.is_empty() { c"cgroup2" } else { c"cgroup" })?;
        for controller in controllers.split(',').filter(|name| !name.is_empty()) {
            context.set_flag(&CString::new(controller).map_err(|_| Errno::EINVAL)?)?;
        }
        let tree = context.create(attribute::NO_SET_UID | attribute::NO_DEVICES | attribute::NO_EXECUTE)?;
        let place = match controllers {
            "" if unified_only => Path::new(PLACE).to_owned(),
            "" => Path::new(PLACE).join("unified"),
            name => Path::new(PLACE).join(name),
        };
        fs::create_dir_all(&place).map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)))?;
        attach_at(&place, &tree)?;
    }
    Ok(())
}

/// The controllers of each hierarchy of `/proc/self/cgroup` that we use; empty for the unified one.
fn hierarchies(text: &str) -> Vec<&str> {
    let used = |controllers: &&str| {
        controllers.is_empty() || controllers.split(',').any(|name| V1_CONTROLLERS.contains(&name))
    };
    text.lines().filter_map(|line| line.split(':').nth(1)).filter(used).collect()
}

fn attach_at(place: &Path, tree: &OwnedFd) -> nix::Result<()> {
    let at = open(place, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    attach(tree.as_fd(), at.as_fd(), c"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joined_named_and_unified_hierarchies_are_told_apart() {
        let text = "9:name=systemd:/\n8:blkio:/\n2:cpu,cpuacct:/a\n1:memory:/a\n0::/b\n";
        assert_eq!(hierarchies(text), ["cpu,cpuacct", "memory", ""]);
    }
}
