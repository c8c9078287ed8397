//! Privileged: CAP_SETUID and CAP_SETGID to enter the id range of one tree; everything is dropped before the first entry
//! of the tree is read.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::{Gid, Uid, UnlinkatFlags, setgroups, setresgid, setresuid, unlinkat};

use super::remove::remove_contents;
use crate::sys::process::{CloneArguments, Cloned, clone3, close_range, exit_now, place_descriptor};

/// Removes the directory `name` below `parent` with everything in it, and waits for the end. The content may belong to the
/// `count` host ids from `base` up (`count` 0: whoever owns the directory itself).
pub fn remove_below(parent: &Path, name: &str, base: u32, count: u32) {
    let directory =
        File::options().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(parent.join(name));
    let Ok(directory) = directory else { return };
    let owners = owners_below(&directory, base, count);
    for entry in ["upper", "work", "output"] {
        // Most sandboxes leave these empty or never had them: no worker is needed to see that.
        if matches!(unlinkat(&directory, entry, UnlinkatFlags::RemoveDir), Ok(()) | Err(Errno::ENOENT)) {
            continue;
        }
        let Ok(inner) = nix::fcntl::openat(&directory, entry, open_flags(), nix::sys::stat::Mode::empty()) else {
            continue;
        };
        // The spool belongs to one id and to the runner's group. That group is in no range, and over a directory with an
        // unmapped group the root of a user namespace has no power but its owner's.
        let owners = if entry == "output" { spool_owner(&inner, owners) } else { owners };
        if let Some((base, count)) = owners {
            run_in_range(&inner, base, count);
        }
        let _ = unlinkat(&directory, entry, UnlinkatFlags::RemoveDir);
    }
    let Ok(parent) = File::open(parent) else { return };
    let _ = unlinkat(&parent, name, UnlinkatFlags::RemoveDir);
}

/// Removes the directory `name` below `parent`, whose `entries` belong each to the user of all that is in it. For a
/// container that allows no namespace: each is emptied by a worker that has become that user.
pub fn remove_owned(parent: &Path, name: &str, entries: &[&str]) {
    let directory =
        File::options().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(parent.join(name));
    let Ok(directory) = directory else { return };
    for entry in entries {
        if matches!(unlinkat(&directory, *entry, UnlinkatFlags::RemoveDir), Ok(()) | Err(Errno::ENOENT)) {
            continue;
        }
        let Ok(inner) = nix::fcntl::openat(&directory, *entry, open_flags(), nix::sys::stat::Mode::empty()) else {
            continue;
        };
        run_as_owner(&inner);
        let _ = unlinkat(&directory, *entry, UnlinkatFlags::RemoveDir);
    }
    let Ok(parent) = File::open(parent) else { return };
    let _ = unlinkat(&parent, name, UnlinkatFlags::RemoveDir);
}

fn run_as_owner(tree: &OwnedFd) {
    let Ok(found) = nix::sys::stat::fstat(tree) else { return };
    let arguments = CloneArguments { exit_signal: libc::SIGCHLD, ..CloneArguments::default() };
    match clone3(&arguments) {
        Ok(Cloned::Child) => exit_now(i32::from(work(tree, found.st_uid, found.st_gid).is_err())),
        Ok(Cloned::Parent { pidfd, .. }) => {
            let _ = waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED);
        }
        Err(_) => {}
    }
}

fn open_flags() -> nix::fcntl::OFlag {
    use nix::fcntl::OFlag;
    OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC
}

/// The range that owns the trees: the one given, or the one that starts at the owner of `upper` or ends at that of `output`.
fn owners_below(directory: &File, base: u32, count: u32) -> Option<(u32, u32)> {
    if count > 0 {
        return Some((base, count));
    }
    let owner = |name| {
        let opened = nix::fcntl::openat(directory, name, open_flags(), nix::sys::stat::Mode::empty()).ok()?;
        File::from(opened).metadata().ok().map(|found| found.uid())
    };
    let low = owner("upper");
    let high = owner("output");
    match (low, high) {
        (Some(low), Some(high)) if high >= low => Some((low, high - low + 1)),
        (_, Some(only)) | (Some(only), None) => Some((only, 1)),
        (None, None) => None,
    }
}

/// The one id that the spool belongs to. That is 0 where the launcher of an ordinary user shares its only id with its
/// sandboxes; elsewhere what is still root's was not given away yet, and then there is nothing in it.
fn spool_owner(spool: &OwnedFd, owners: Option<(u32, u32)>) -> Option<(u32, u32)> {
    let owner = nix::sys::stat::fstat(spool).ok()?.st_uid;
    let is_shared = owners.is_some_and(|(base, _)| base == 0);
    (owner != 0 || is_shared).then_some((owner, 1))
}

/// Runs the removal as root of a user namespace that holds nothing but the range, without network and without a way out of
/// the tree.
fn run_in_range(tree: &OwnedFd, base: u32, count: u32) {
    let Ok((gate_read, gate_write)) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC) else { return };
    let flags = libc::CLONE_NEWUSER | libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWNET | libc::CLONE_NEWIPC;
    let arguments = CloneArguments {
        flags: u64::try_from(flags).unwrap_or_default(),
        exit_signal: libc::SIGCHLD,
        cgroup: None,
        ..CloneArguments::default()
    };
    match clone3(&arguments) {
        Ok(Cloned::Child) => {
            drop(gate_write);
            let status = i32::from(wait_at(&gate_read).and_then(|()| work(tree, 0, 0)).is_err());
            exit_now(status)
        }
        Ok(Cloned::Parent { pid, pidfd }) => {
            let map = format!("0 {base} {count}\n");
            let mapped = std::fs::write(format!("/proc/{pid}/uid_map"), &map)
                .and_then(|()| std::fs::write(format!("/proc/{pid}/gid_map"), &map));
            if mapped.is_ok() {
                // A worker that is gone shows in the wait below.
                let _ = nix::unistd::write(&gate_write, b"g");
            }
            drop(gate_write);
            let _ = waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED);
        }
        Err(_) => {}
    }
}

/// The map is written when the gate opens.
fn wait_at(gate: &OwnedFd) -> nix::Result<()> {
    let mut byte = [0_u8; 1];
    if nix::unistd::read(gate, &mut byte)? == 1 { Ok(()) } else { Err(nix::Error::EPIPE) }
}

fn work(tree: &OwnedFd, uid: u32, gid: u32) -> nix::Result<()> {
    // A single-id map forbids setgroups; there are no groups to drop then.
    let _ = setgroups(&[]);
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)?;
    setrlimit(Resource::RLIMIT_NOFILE, 1024, 1024)?;
    let raw = crate::sys::process::duplicate_above(tree.as_fd(), 16)?;
    place_descriptor(std::os::fd::AsRawFd::as_raw_fd(&raw), 3)?;
    let tree = crate::sys::process::inherited_descriptor(3)?;
    drop(raw);
    close_range(4, i32::MAX)?;
    confine(&tree)?;
    remove_contents(&tree).map(drop)
}

/// Landlock with the one tree: whatever a name in it says, nothing else can be opened.
fn confine(tree: &OwnedFd) -> nix::Result<()> {
    use landlock::{
        ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr,
    };
    let all = AccessFs::from_all(ABI::V5);
    let restricted = (|| {
        Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(all)?
            .create()?
            .add_rule(PathBeneath::new(tree.as_fd(), all))?
            .restrict_self()
    })();
    restricted.map(drop).map_err(|_| nix::Error::EPERM)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_of_a_foreign_range_is_removed_whole() {
        if !Uid::effective().is_root() {
            println!("SKIPPED: needs root to own a foreign range");
            return;
        }
        let parent = tempfile::tempdir().expect("temporary directory");
        let sandbox = parent.path().join("s-1");
        for name in ["upper/deep/er", "work", "output"] {
            std::fs::create_dir_all(sandbox.join(name)).expect("mkdir");
        }
        std::fs::write(sandbox.join("upper/deep/er/file"), "x").expect("write");
        for (path, id) in [
            ("upper", 2_130_000_000),
            ("upper/deep", 2_130_000_000),
            ("upper/deep/er", 2_130_000_005),
            ("upper/deep/er/file", 2_130_000_009),
            ("work", 2_130_000_000),
            ("output", 2_130_065_535),
        ] {
            std::os::unix::fs::chown(sandbox.join(path), Some(id), Some(id)).expect("chown");
        }
        remove_below(parent.path(), "s-1", 2_130_000_000, 65536);
        assert!(!sandbox.exists());
    }

    #[test]
    fn a_spool_of_a_group_outside_of_the_range_is_removed_whole() {
        if !Uid::effective().is_root() {
            println!("SKIPPED: needs root to own a foreign range");
            return;
        }
        let parent = tempfile::tempdir().expect("temporary directory");
        let sandbox = parent.path().join("s-1");
        std::fs::create_dir_all(sandbox.join("output/below")).expect("mkdir");
        std::fs::write(sandbox.join("output/stdout"), "x").expect("write");
        std::fs::write(sandbox.join("output/below/stdout"), "x").expect("write");
        let (keeper, runner) = (2_130_065_535, 64_013);
        for path in ["output", "output/stdout", "output/below", "output/below/stdout"] {
            std::os::unix::fs::chown(sandbox.join(path), Some(keeper), Some(runner)).expect("chown");
        }
        remove_below(parent.path(), "s-1", 2_130_000_000, 65536);
        assert!(!sandbox.exists());
    }
}
