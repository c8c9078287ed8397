//! Privileged: writes `memory.reclaim` of groups that belong to the launcher.
//!
//! Asks the kernel for the memory of a workload that stands still (Documentation/admin-guide/cgroup-v2.rst, `memory.reclaim`,
//! Linux 5.19): what is on a disk already is dropped, the rest goes to swap where there is any. A write returns when the kernel
//! has tried all of it, so it is asked in steps, between which whoever asks does what others wait for. Controllers of version 1
//! have nothing like it: `memory.force_empty` waits for all of it and is for groups without processes.

use std::path::Path;

use super::files::{number, write};
use super::{Mode, Tree};

/// Bytes asked for in one write. To a swap that takes 50 MB in a second they are a fiftieth of one.
const STEP_BYTES: u64 = 1 << 20;

/// The memory of one workload that is being asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reclaim {
    /// Name of its groups.
    pub name: String,
    /// Bytes that are still to be asked for; `None` before the first step. No more than there were at its beginning: what
    /// goes to compressed memory comes back to the account.
    left: Option<u64>,
    /// Bytes that the group has fewer since.
    pub bytes: u64,
}

impl Reclaim {
    /// Of the group with this name, from its beginning.
    #[must_use]
    pub fn new(name: String) -> Self {
        Self { name, left: None, bytes: 0 }
    }

    /// Asks for the next piece. What ended it, 0 when all was asked for; `None` when there is more.
    pub fn step(&mut self, tree: &Tree) -> Option<i32> {
        // Its workload needs its memory again, or it is gone.
        if !tree.is_frozen(&self.name) {
            return Some(libc::ECANCELED);
        }
        self.step_in(&tree.work(&self.name))
    }

    fn step_in(&mut self, work: &Path) -> Option<i32> {
        let current = || number(&work.join("memory.current"));
        let before = current();
        let left = *self.left.get_or_insert(before);
        let wanted = left.min(STEP_BYTES);
        // A group without any says in the same way as one with a gibibyte that the file is missing.
        let result = write(&work.join("memory.reclaim"), &wanted.to_string());
        self.bytes = self.bytes.saturating_add(before.saturating_sub(current()));
        self.left = Some(left.saturating_sub(wanted));
        match result {
            Err(error) => Some(error.errno()),
            Ok(()) => (left <= wanted).then_some(0),
        }
    }
}

impl Tree {
    /// Whether the kernel can be asked for memory of a group: not with controllers of version 1.
    #[must_use]
    pub fn reclaims(&self) -> bool {
        self.mode == Mode::Unified
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn group(current: u64) -> tempfile::TempDir {
        let directory = tempfile::tempdir().expect("a directory");
        fs::write(directory.path().join("memory.current"), format!("{current}\n")).expect("written");
        fs::write(directory.path().join("memory.reclaim"), "").expect("written");
        directory
    }

    #[test]
    fn memory_is_asked_for_in_steps_and_no_more_of_it_than_there_was() {
        let group = group(2 * STEP_BYTES + 4096);
        let mut reclaim = Reclaim::new("s-a".to_owned());
        let asked = || {
            let path = group.path().join("memory.reclaim");
            let text = fs::read_to_string(&path).expect("read");
            fs::write(&path, "").expect("emptied");
            text
        };

        assert_eq!((reclaim.step_in(group.path()), asked()), (None, STEP_BYTES.to_string()));
        // A group that never gets smaller is asked all the same, once for each of its bytes.
        assert_eq!((reclaim.step_in(group.path()), asked()), (None, STEP_BYTES.to_string()));
        assert_eq!((reclaim.step_in(group.path()), asked()), (Some(0), "4096".to_owned()));
        assert_eq!(reclaim.bytes, 0);
    }

    #[test]
    fn a_kernel_that_has_no_such_file_is_named_by_its_errno() {
        let group = group(4096);
        fs::remove_file(group.path().join("memory.reclaim")).expect("removed");
        assert_eq!(Reclaim::new("s-a".to_owned()).step_in(group.path()), Some(libc::ENOENT));
    }

    #[test]
    fn what_does_not_stand_still_is_not_asked() {
        assert_eq!(Reclaim::new("s-a".to_owned()).step(&Tree::nothing()), Some(libc::ECANCELED));
    }
}
