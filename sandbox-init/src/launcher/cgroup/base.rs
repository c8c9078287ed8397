//! Privileged: CAP_DAC_OVERRIDE on cgroupfs, or delegation, to make the base of our groups.
//!
//! Finds the hierarchies that this process may use and tries to make a base of our own in each. A launcher that comes later
//! shares the bases, so they are removed only while nobody has a group in them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::files::{enable, make_directory, read, write};
use super::hierarchy::{Mounts, own_path, own_paths};
use super::{CONTROLLERS, CgroupError, Mode, Tree, V1_CONTROLLERS};
use crate::launcher::own_mounts;

impl Tree {
    /// Finds the hierarchies and makes our base in each. Never fails: what is missing is in `failure` and the receipt.
    ///
    /// `may_mount`: this process is alone in its mount namespace. Where the hierarchies that it finds there cannot be used,
    /// as in a container that shows them read-only, in part, or from another group on, it mounts them itself, with its own
    /// group as their root. That needs CAP_SYS_ADMIN; whether we may make groups in them the kernel decides all the same.
    #[must_use]
    pub fn open(tag: &str, may_mount: bool) -> Self {
        let attempt = || {
            let mut tree = Self::nothing();
            let prepared = tree.prepare(tag);
            // The bases were made to see that they can be; the first sandbox makes them again. A launcher that is killed
            // before it has any leaves none.
            tree.remove_bases();
            prepared.map(|()| tree)
        };
        let found = match attempt() {
            Err(first) if may_mount => own_mounts::mount().map_err(|_| first).and_then(|()| attempt()),
            other => other,
        };
        found.unwrap_or_else(|error| Self { failure: Some(Arc::new(error)), ..Self::nothing() })
    }

    fn prepare(&mut self, tag: &str) -> Result<(), CgroupError> {
        let mounts = Mounts::read();
        let own = own_paths();
        let missing = || CgroupError::File {
            action: "find",
            path: PathBuf::from("/sys/fs/cgroup"),
            source: io::Error::from_raw_os_error(libc::ENOENT),
        };
        let unified = mounts.unified.iter().rev().find(|mount| mount.holds(own_path(&own, ""))).ok_or_else(missing)?;
        if mounts.v1.is_empty() {
            self.mode = Mode::Unified;
            let base = prepare_unified(&unified.point, &unified.locate(own_path(&own, "")), tag)?;
            self.controllers =
                read(&base.join("cgroup.subtree_control")).split_whitespace().map(str::to_owned).collect();
            self.unified = Some(base);
        } else {
            self.mode = Mode::Hybrid;
            let base = unified.locate(own_path(&own, "")).join(format!("sandbox-runner-{tag}"));
            make_directory(&base)?;
            self.unified = Some(base);
            for controller in V1_CONTROLLERS {
                let path = own_path(&own, controller);
                let mut shown = mounts.v1.iter().rev().filter(|(name, _)| name == controller).peekable();
                if shown.peek().is_none() {
                    continue;
                }
                let (_, mount) = shown.find(|(_, mount)| mount.holds(path)).ok_or_else(missing)?;
                let base = mount.locate(path).join(format!("sandbox-runner-{tag}"));
                make_directory(&base)?;
                self.v1.push((controller, base));
                self.controllers.push(controller.to_owned());
            }
        }
        Ok(())
    }

    /// Removes our bases as far as they are empty.
    pub(super) fn remove_bases(&self) {
        for base in self.unified.iter().chain(self.v1.iter().map(|(_, base)| base)) {
            let _ = fs::remove_dir(base);
        }
        if let (Mode::Unified, Some(parent)) = (self.mode, self.unified.as_deref().and_then(Path::parent)) {
            give_room_back(parent);
        }
    }
}

/// Where the processes of a group go that is to have groups with controllers below it.
const HOST_LEAF: &str = "sandbox-runner-host";
/// How the names of bases begin, and that of the leaf.
const OURS: &str = "sandbox-runner-";

/// Moves the processes of a group into a leaf of it. The kernel gives the children of a group with processes no controllers
/// of memory, and if it is given others first, its children can hold no processes at all (cgroup-v2.rst, "Threads"). The
/// root of the tree is excepted; it is the one without a type.
pub(super) fn make_room(parent: &Path) -> Result<(), CgroupError> {
    let members = read(&parent.join("cgroup.procs"));
    if members.trim().is_empty() || !parent.join("cgroup.type").exists() {
        return Ok(());
    }
    let leaf = parent.join(HOST_LEAF);
    make_directory(&leaf)?;
    for pid in members.split_whitespace() {
        // A process that ended in between is no problem, and one that cannot be moved shows in the next step.
        let _ = write(&leaf.join("cgroup.procs"), pid);
    }
    Ok(())
}

/// Undoes [`make_room`] when nobody has a base there any more: otherwise a container would keep a group that it did not
/// make, and whoever runs further programs in it would find its own group closed to them.
fn give_room_back(parent: &Path) {
    let leaf = parent.join(HOST_LEAF);
    let Ok(entries) = fs::read_dir(parent) else { return };
    let mut names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    if !leaf.is_dir() || names.any(|name| name.starts_with(OURS) && name != HOST_LEAF) {
        return;
    }
    // What fails leaves the processes where they are, with the controllers that they have.
    for controller in CONTROLLERS {
        let _ = write(&parent.join("cgroup.subtree_control"), &format!("-{controller}"));
    }
    for pid in read(&leaf.join("cgroup.procs")).split_whitespace() {
        let _ = write(&parent.join("cgroup.procs"), pid);
    }
    let _ = fs::remove_dir(&leaf);
}

/// Makes the base in a unified host and enables the controllers on the way.
///
/// Under systemd with `DelegateSubgroup=launcher` the base is the unit's own group, the parent of ours. Elsewhere it is a
/// group at the root of what we see. In a container that root may hold processes (the container's own first process), and
/// the kernel then refuses to enable controllers below it; those processes are moved into a leaf first.
fn prepare_unified(mount: &Path, own_directory: &Path, tag: &str) -> Result<PathBuf, CgroupError> {
    let parent = if own_directory.file_name().is_some_and(|name| name == "launcher") {
        own_directory.parent().unwrap_or(mount).to_owned()
    } else {
        mount.to_owned()
    };
    make_room(&parent)?;
    enable(&parent, &CONTROLLERS);
    let base = parent.join(format!("sandbox-runner-{tag}"));
    make_directory(&base)?;
    enable(&base, &CONTROLLERS);
    Ok(base)
}
