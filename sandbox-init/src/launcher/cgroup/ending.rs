//! Privileged: kills and freezes everything in a group.
//!
//! Stops, ends and removes the groups of sandboxes. A group goes when the last process in it is gone, so removal is tried again
//! by whoever may wait.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use super::files::{number, write};
use super::{CgroupError, Tree};

impl Tree {
    /// Freezes or thaws the workload.
    ///
    /// # Errors
    /// [`CgroupError::File`].
    pub fn freeze(&self, name: &str, frozen: bool) -> Result<(), CgroupError> {
        write(&self.work(name).join("cgroup.freeze"), if frozen { "1" } else { "0" })
    }

    /// Whether the workload is frozen. The kernel remembers it, so it needs no place in the state file.
    #[must_use]
    pub fn is_frozen(&self, name: &str) -> bool {
        self.unified.is_some() && number(&self.work(name).join("cgroup.freeze")) == 1
    }

    /// Kills everything in the sandbox. A frozen v2 group dies too.
    pub fn kill(&self, name: &str) {
        if let Some(base) = &self.unified {
            // Absent below Linux 5.14; the caller has killed process 1, and its pid namespace with it, already.
            let _ = write(&base.join(name).join("cgroup.kill"), "1");
        }
    }

    /// Removes the groups of a sandbox. False: something is still inside, try again later.
    #[must_use]
    pub fn remove(&self, name: &str) -> bool {
        let mut gone = true;
        if let Some(base) = &self.unified {
            gone &= remove_tree(&base.join(name), 3);
        }
        for (_, base) in &self.v1 {
            gone &= remove_tree(&base.join(name), 1);
        }
        gone
    }

    /// Removes every group with this prefix, and our bases unless another launcher uses them, when the launcher ends for good.
    pub fn close(&self, prefix: &str) {
        for name in self.names(prefix) {
            self.kill(&name);
            for _ in 0..200 {
                if self.remove(&name) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        self.remove_bases();
    }
}

/// Removes a tree of groups of at most `depth` levels below `directory`.
fn remove_tree(directory: &Path, depth: u32) -> bool {
    // A group without children goes at once; listing one costs more than removing it.
    if is_removed(directory) {
        return true;
    }
    if depth == 0 {
        return false;
    }
    let Ok(entries) = fs::read_dir(directory) else { return false };
    let mut children = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    children.all(|child| remove_tree(&child.path(), depth - 1)) && is_removed(directory)
}

fn is_removed(directory: &Path) -> bool {
    fs::remove_dir(directory).err().is_none_or(|error| error.kind() == io::ErrorKind::NotFound)
}
