//! Privileged: CAP_CHOWN to give process 1 what it needs to make slots.
//!
//! Makes the groups of one sandbox. Process 1 may make slots below `S/work` and clone into them; the limit files stay ours.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};

use super::base::make_room;
use super::files::{absent, enable, make_directory, open_directory, write};
use super::{CONTROLLERS, CgroupError, Mode, Tree};

/// Slots that process 1 may make: one for each of its calls (128), for each finished call that left processes (64), for the
/// shell and for the next call, and some that are on their way out. Fewer, and commands that leave processes behind would
/// keep every later call from starting.
const MAX_SLOTS: &str = "256";
/// Memory of process 1 and the spawner, spool page cache included. Measured: below 2 MiB without cache.
pub(super) const INIT_MEMORY_BYTES: u64 = 64 * 1024 * 1024;

/// Directories of one sandbox, open.
#[derive(Debug)]
pub struct Group {
    /// Name below every base.
    pub name: String,
    /// `S/init` in the unified tree.
    pub init: OwnedFd,
    /// `S/work` in the unified tree.
    pub work: OwnedFd,
    /// v1 directories in the order memory, pids, cpuacct, as far as they exist.
    pub v1: Vec<(&'static str, OwnedFd)>,
}

impl Group {
    /// The v1 directory of `controller`.
    #[must_use]
    pub fn v1_directory(&self, controller: &str) -> Option<BorrowedFd<'_>> {
        self.v1.iter().find(|(name, _)| *name == controller).map(|(_, fd)| fd.as_fd())
    }
}

/// Enables the controllers on the way to what is made below a base.
fn enable_down_to(base: &Path) {
    for directory in base.parent().into_iter().chain([base]) {
        enable(directory, &CONTROLLERS);
    }
}

impl Tree {
    /// Makes the groups of one sandbox and gives process 1 (host uid `keeper`) what it needs to make slots.
    ///
    /// # Errors
    /// [`CgroupError`]; what was made is removed again by [`Tree::remove`].
    pub fn create(&self, name: &str, keeper: u32) -> Result<Group, CgroupError> {
        let Some(base) = &self.unified else {
            return Err(CgroupError::File {
                action: "create",
                path: PathBuf::from(name),
                source: io::Error::from_raw_os_error(libc::ENOENT),
            });
        };
        let sandbox = base.join(name);
        let (init, work) = (sandbox.join("init"), sandbox.join("work"));
        // A group that exists belongs to somebody: joining it would end him with us.
        self.create_below(base, &sandbox)?;
        for directory in [&init, &work] {
            make_directory(directory)?;
        }
        if self.mode == Mode::Unified {
            if !enable(&sandbox, &CONTROLLERS) {
                // Another launcher has just made the base that we share, and has not come to its controllers yet.
                enable_down_to(base);
                enable(&sandbox, &CONTROLLERS);
            }
            enable(&work, &["memory", "pids"]);
            write(&init.join("memory.max"), &INIT_MEMORY_BYTES.to_string()).or_else(absent)?;
            write(&init.join("pids.max"), "16").or_else(absent)?;
            write(&work.join("memory.oom.group"), "0").or_else(absent)?;
        }
        write(&work.join("cgroup.max.descendants"), MAX_SLOTS)?;
        // Process 1 makes the slots below S/work and clones into them; cgroup_attach_permissions() wants cgroup.procs of the
        // common ancestor, S. The limit files stay ours.
        for path in [work.clone(), work.join("cgroup.procs"), sandbox.join("cgroup.procs"), init.join("cgroup.procs")] {
            chown(&path, Some(keeper), Some(keeper)).map_err(|source| CgroupError::File {
                action: "hand over",
                path,
                source,
            })?;
        }
        let mut v1 = Vec::new();
        for (controller, base) in &self.v1 {
            let directory = base.join(name);
            self.create_below(base, &directory)?;
            v1.push((*controller, open_directory(&directory)?));
        }
        Ok(Group { name: name.to_owned(), init: open_directory(&init)?, work: open_directory(&work)?, v1 })
    }

    /// Makes a group of one sandbox. Another launcher that has just ended may have removed the base, which it shared with us.
    fn create_below(&self, base: &Path, directory: &Path) -> Result<(), CgroupError> {
        let failed = |source| CgroupError::File { action: "create", path: directory.to_owned(), source };
        for _ in 0..8 {
            match fs::create_dir(directory) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => return other.map_err(failed),
            }
            if fs::create_dir(base).is_ok() && self.mode == Mode::Unified {
                // While there was no base, a service manager may have taken back what nobody used above it, and processes
                // of a container were where they were before.
                base.parent().map_or(Ok(()), make_room)?;
                enable_down_to(base);
            }
        }
        fs::create_dir(directory).map_err(failed)
    }

    /// Moves `pid` into the v1 groups. Blocks for a grace period per hierarchy: never on a request path.
    ///
    /// # Errors
    /// [`CgroupError::File`].
    pub fn attach_v1(&self, name: &str, pid: i32) -> Result<(), CgroupError> {
        for (_, base) in &self.v1 {
            write(&base.join(name).join("cgroup.procs"), &pid.to_string())?;
        }
        Ok(())
    }
}
