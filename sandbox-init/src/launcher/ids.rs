//! Privileged: owns the lock file of the host's id ranges.
//!
//! Id slots. Slot *n* owns the host ids `base + n * per_sandbox` up. A slot is held by a lock on exactly those bytes of one
//! file, whatever map the launcher uses, so two launchers with different policies never overlap. The lock belongs to an
//! open file description of its own (`F_OFD_SETLK`, fcntl(2)) which process 1 inherits: the ids stay taken for as long as
//! the launcher or the sandbox lives, whoever dies first, and nothing but the last close releases them.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, openat};
use nix::sys::stat::Mode;

use super::policy_file::Ids;

/// One range of host ids, held.
#[derive(Debug)]
pub struct Slot {
    /// Its number.
    pub number: u32,
    /// First host id.
    pub base: u32,
    /// Number of ids.
    pub count: u32,
    lock: Option<OwnedFd>,
}

impl Slot {
    /// Whether a host id is one of its own.
    #[must_use]
    pub fn holds(&self, id: u32) -> bool {
        id.checked_sub(self.base).is_some_and(|offset| offset < self.count)
    }

    /// The lock, to be handed to process 1.
    #[must_use]
    pub fn lock(&self) -> Option<BorrowedFd<'_>> {
        self.lock.as_ref().map(AsFd::as_fd)
    }
}

/// All slots.
#[derive(Debug)]
pub struct Slots {
    directory: OwnedFd,
    ids: Ids,
    /// Every sandbox has the same ids, and the slots only bound their number: without privilege there is a single id, and
    /// without namespaces a single sandbox, whichever launcher of the container makes it.
    shared: bool,
    taken: Vec<bool>,
}

/// Why the slots cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdsError {
    /// The lock directory cannot be made or opened.
    #[error("cannot open lock directory {}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Somebody else could take or remove locks.
    #[error("lock directory {} belongs to uid {owner} with mode {mode:o}; it must be ours and writable by nobody else", path.display())]
    Unsafe {
        /// The directory.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Its permission bits.
        mode: u32,
    },
    /// The lock file cannot be opened or locked.
    #[error("cannot lock id slot {number}")]
    Lock {
        /// The slot.
        number: u32,
        /// The cause.
        #[source]
        source: nix::Error,
    },
}

/// `F_WRLCK` and `SEEK_SET` (fcntl.h) in the width of `struct flock`.
const WRITE_LOCK: libc::c_short = 1;
const FROM_START: libc::c_short = 0;

/// The one file; its bytes are the host's ids.
const FILE: &str = "ids.lock";

impl Slots {
    /// Opens the lock directory, which must be ours alone.
    ///
    /// # Errors
    /// [`IdsError::Directory`], [`IdsError::Unsafe`].
    pub fn open(path: &Path, ids: Ids, shared: bool) -> Result<Self, IdsError> {
        let failed = |source| IdsError::Directory { path: path.to_owned(), source };
        match std::fs::create_dir(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
            _ => {}
        }
        let directory = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
            .open(path)
            .map_err(failed)?;
        let found = directory.metadata().map_err(failed)?;
        if found.uid() != nix::unistd::geteuid().as_raw() || found.mode() & 0o022 != 0 {
            return Err(IdsError::Unsafe { path: path.to_owned(), owner: found.uid(), mode: found.mode() & 0o7777 });
        }
        Ok(Self::new(directory.into(), ids, shared))
    }

    /// Uses a lock directory that is open already.
    #[must_use]
    pub fn new(directory: OwnedFd, ids: Ids, shared: bool) -> Self {
        let count = usize::try_from(ids.slots).unwrap_or(usize::MAX);
        Self { directory, ids, shared, taken: vec![false; count] }
    }

    /// Takes the first slot that nobody on this host holds. `None`: all are taken.
    ///
    /// # Errors
    /// [`IdsError::Lock`].
    pub fn take(&mut self) -> Result<Option<Slot>, IdsError> {
        for number in 0..self.ids.slots {
            if self.taken.get(number as usize).copied().unwrap_or(true) {
                continue;
            }
            if let Some(slot) = self.try_lock(number)? {
                return Ok(Some(slot));
            }
        }
        Ok(None)
    }

    /// Takes one given slot, for adoption: its lock is held by the living sandbox.
    #[must_use]
    pub fn adopt(&mut self, number: u32) -> Option<Slot> {
        let place = self.taken.get_mut(number as usize)?;
        *place = true;
        Some(self.slot(number, None))
    }

    /// Gives a slot back. Its cgroup is empty and its upper is gone.
    pub fn release(&mut self, slot: Slot) {
        if let Some(place) = self.taken.get_mut(slot.number as usize) {
            *place = false;
        }
    }

    /// The lock directory.
    #[must_use]
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    fn try_lock(&mut self, number: u32) -> Result<Option<Slot>, IdsError> {
        let failed = |source| IdsError::Lock { number, source };
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        // A description of its own for each slot: closing it must not touch the locks of the others.
        let file = openat(&self.directory, FILE, flags, Mode::S_IRUSR | Mode::S_IWUSR).map_err(failed)?;
        let (start, length) = if self.shared {
            (i64::from(number), 1)
        } else {
            (
                i64::from(self.ids.base) + i64::from(number) * i64::from(self.ids.per_sandbox),
                i64::from(self.ids.per_sandbox),
            )
        };
        let range = libc::flock { l_type: WRITE_LOCK, l_whence: FROM_START, l_start: start, l_len: length, l_pid: 0 };
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&range)) {
            Ok(_) => {
                if let Some(place) = self.taken.get_mut(number as usize) {
                    *place = true;
                }
                Ok(Some(self.slot(number, Some(file))))
            }
            Err(Errno::EAGAIN | Errno::EACCES) => Ok(None),
            Err(source) => Err(failed(source)),
        }
    }

    fn slot(&self, number: u32, lock: Option<OwnedFd>) -> Slot {
        let offset = if self.shared { 0 } else { number * self.ids.per_sandbox };
        Slot { number, base: self.ids.base + offset, count: self.ids.per_sandbox, lock }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(base: u32) -> Ids {
        Ids { base, per_sandbox: 10, slots: 2 }
    }

    #[test]
    fn two_launchers_never_hold_the_same_slot() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let mut first = Slots::open(directory.path(), ids(1000), false).expect("open");
        let mut second = Slots::open(directory.path(), ids(1000), false).expect("open");
        let a = first.take().expect("lock").expect("free");
        let b = second.take().expect("lock").expect("free");
        assert_ne!(a.number, b.number);
        assert_eq!(b.base, 1010);
        assert!(first.take().expect("lock").is_none());
        second.release(b);
        assert!(first.take().expect("lock").is_some());
    }

    #[test]
    fn overlapping_maps_of_two_policies_exclude_each_other() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let mut first = Slots::open(directory.path(), ids(1000), false).expect("open");
        let mut second = Slots::open(directory.path(), ids(1005), false).expect("open");
        let _held = first.take().expect("lock").expect("free");
        assert_eq!(second.take().expect("lock").expect("free").base, 1015);
    }

    #[test]
    fn ids_stay_taken_while_an_inherited_description_is_open() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let mut first = Slots::open(directory.path(), ids(1000), false).expect("open");
        let slot = first.take().expect("lock").expect("free");
        let inherited = slot.lock().expect("held").try_clone_to_owned().expect("duplicate");
        first.release(slot);
        drop(first);
        let mut second = Slots::open(directory.path(), ids(1000), false).expect("open");
        assert_eq!(second.take().expect("lock").expect("free").number, 1);
        drop(inherited);
        assert_eq!(second.take().expect("lock").expect("free").number, 0);
    }

    #[test]
    fn a_lock_directory_that_others_can_write_is_refused() {
        let directory = tempfile::tempdir().expect("temporary directory");
        std::fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777)).expect("chmod");
        assert!(matches!(Slots::open(directory.path(), ids(1000), false), Err(IdsError::Unsafe { .. })));
    }
}
