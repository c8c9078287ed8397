//! Puts new content in the place of a file, whole or not at all.
//!
//! The content goes to a file of its own in the same directory, is synced, and takes the name by a rename: a reader sees
//! the old file or the new one, and a link that was put at the name meanwhile is replaced, never followed. Mode and
//! ownership of an existing file stay, except for the set-id bits. A file that other names are linked to gets separated
//! from them.
//!
//! Where a rename cannot do it (the name is a mount point of its own, the directory takes no new names, the owner cannot
//! be kept), the existing file is overwritten in place, as a shell redirection would.
//!
//! What is about to be done is written down before anything of it is, for the case that this process does not live to tell.

use std::{
    ffi::OsString,
    fs::File,
    hash::{BuildHasher, RandomState},
    io::Write,
    os::fd::{AsFd, OwnedFd},
};

use nix::{
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat, renameat},
    sys::stat::{FileStat, Mode, fchmod, fstat, fstatat, mkdirat},
    unistd::{AccessFlags, Gid, Uid, UnlinkatFlags, faccessat, fchown, ftruncate, unlinkat},
};

use crate::tool::intent::Notebook;
use crate::tool::path::{PathError, Place, Slot, errno, is_directory, is_regular, reopen, same_inode};

const NEW_FILE: Mode = Mode::from_bits_truncate(0o644);
const NEW_DIRECTORY: Mode = Mode::from_bits_truncate(0o755);
/// Permission bits that survive: everything but set-user-id and set-group-id.
const KEPT: u32 = 0o1777;
const NAME_ATTEMPTS: u32 = 16;

/// Why nothing was written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReplaceError {
    #[error(transparent)]
    Path(#[from] PathError),
    #[error("the file is no longer the one that was read")]
    Changed,
}

impl From<Errno> for ReplaceError {
    fn from(errno: Errno) -> Self {
        Self::Path(errno.into())
    }
}

/// Makes `content` the content of the file at `place`, which may not exist yet, nor its directory.
///
/// With `expected`, the file is replaced only while it is still that one, unchanged.
///
/// # Errors
/// [`ReplaceError::Changed`] when `expected` does not hold; then, and in every other case but an overwrite in place, the
/// file is what it was before.
pub(crate) fn replace(
    place: &Place,
    content: &[u8],
    expected: Option<&FileStat>,
    notebook: &Notebook<'_>,
) -> Result<(), ReplaceError> {
    let new = New { content, expected, notebook };
    let existing = place.entry.as_ref().map(fstat).transpose()?;
    match &existing {
        Some(status) if is_directory(status) => return Err(Errno::EISDIR.into()),
        Some(status) if !is_regular(status) => return Err(PathError::NotRegular.into()),
        _ => {}
    }
    let slot = place.slot.as_ref().ok_or(Errno::EISDIR)?;
    let Some((entry, status)) = place.entry.as_ref().zip(existing.as_ref()) else {
        let directory = make_directories(slot)?;
        return by_rename(&directory, slot, None, &New { expected: None, ..new }).map_err(Attempt::into_error);
    };
    // A rename would replace a write-protected file without asking; the shell would not.
    faccessat(&slot.directory, slot.name.as_os_str(), AccessFlags::W_OK, AtFlags::AT_EACCESS)?;
    match by_rename(&slot.directory, slot, Some(status), &new) {
        Err(Attempt::Impossible(_)) => {
            check_unchanged(&slot.directory, slot, expected)?;
            in_place(entry, status, slot, &new)
        }
        outcome => outcome.map_err(Attempt::into_error),
    }
}

/// What a file is to become.
struct New<'a> {
    content: &'a [u8],
    expected: Option<&'a FileStat>,
    notebook: &'a Notebook<'a>,
}

/// How a replacement by rename can fail.
enum Attempt {
    /// For good.
    Failed(ReplaceError),
    /// For a reason that does not concern an overwrite in place.
    Impossible(Errno),
}

impl Attempt {
    fn into_error(self) -> ReplaceError {
        match self {
            Self::Failed(error) => error,
            Self::Impossible(errno) => errno.into(),
        }
    }
}

impl<E: Into<ReplaceError>> From<E> for Attempt {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

fn by_rename(directory: &OwnedFd, slot: &Slot, existing: Option<&FileStat>, new: &New<'_>) -> Result<(), Attempt> {
    let mut draft = Draft::create(directory, new.notebook).map_err(|error| match error {
        Errno::EACCES | Errno::EPERM => Attempt::Impossible(error),
        other => other.into(),
    })?;
    let own = fstat(&draft.file)?;
    new.notebook.will_rename(&draft.name, &own)?;
    draft.adopt(existing, &own)?;
    draft.file.write_all(new.content).map_err(|error| errno(&error))?;
    draft.file.sync_all().map_err(|error| errno(&error))?;
    check_unchanged(directory, slot, new.expected)?;
    match renameat(directory, draft.name.as_os_str(), directory, slot.name.as_os_str()) {
        Ok(()) => {
            draft.renamed = true;
            Ok(())
        }
        Err(error @ (Errno::EBUSY | Errno::EXDEV | Errno::EACCES | Errno::EPERM)) => Err(Attempt::Impossible(error)),
        Err(error) => Err(error.into()),
    }
}

fn check_unchanged(directory: &OwnedFd, slot: &Slot, expected: Option<&FileStat>) -> Result<(), ReplaceError> {
    let Some(expected) = expected else { return Ok(()) };
    match fstatat(directory, slot.name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(now) if same_inode(&now, expected) && same_version(&now, expected) => Ok(()),
        Ok(_) | Err(Errno::ENOENT) => Err(ReplaceError::Changed),
        Err(error) => Err(error.into()),
    }
}

fn same_version(one: &FileStat, other: &FileStat) -> bool {
    // The change time moves with every write and cannot be set by a program, unlike the modification time.
    (one.st_size, one.st_ctime, one.st_ctime_nsec) == (other.st_size, other.st_ctime, other.st_ctime_nsec)
}

fn in_place(entry: &OwnedFd, status: &FileStat, slot: &Slot, new: &New<'_>) -> Result<(), ReplaceError> {
    let mut file = reopen(entry.as_fd(), status, Some(slot), OFlag::O_WRONLY)?;
    new.notebook.will_overwrite(status, new.content)?;
    ftruncate(&file, 0)?;
    file.write_all(new.content).and_then(|()| file.sync_all()).map_err(|error| errno(&error))?;
    Ok(())
}

/// The new content under a name of its own; the name goes away again unless the rename took place.
struct Draft<'a> {
    directory: &'a OwnedFd,
    name: OsString,
    file: File,
    renamed: bool,
}

impl<'a> Draft<'a> {
    fn create(directory: &'a OwnedFd, notebook: &Notebook<'_>) -> Result<Self, Errno> {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        for attempt in 0..NAME_ATTEMPTS {
            // The hasher is seeded by the kernel; the name has to be unused, not secret: O_EXCL does the rest.
            let name = OsString::from(format!(".tmp-{:016x}", RandomState::new().hash_one(attempt)));
            notebook.will_create(&name)?;
            match openat(directory, name.as_os_str(), flags, Mode::from_bits_truncate(0o600)) {
                Ok(file) => return Ok(Self { directory, name, file: File::from(file), renamed: false }),
                Err(Errno::EEXIST) => {}
                Err(error) => return Err(error),
            }
        }
        Err(Errno::EEXIST)
    }

    /// Takes over owner and mode of the file that is replaced; owner first, because changing it clears mode bits.
    fn adopt(&self, existing: Option<&FileStat>, own: &FileStat) -> Result<(), Attempt> {
        let Some(existing) = existing else {
            return Ok(fchmod(&self.file, NEW_FILE)?);
        };
        if (own.st_uid, own.st_gid) != (existing.st_uid, existing.st_gid) {
            fchown(&self.file, Some(Uid::from_raw(existing.st_uid)), Some(Gid::from_raw(existing.st_gid)))
                .map_err(Attempt::Impossible)?;
        }
        Ok(fchmod(&self.file, Mode::from_bits_truncate(existing.st_mode & KEPT))?)
    }
}

impl Drop for Draft<'_> {
    fn drop(&mut self) {
        if !self.renamed {
            // Nothing can be done about a failure, and the error that led here is the one to report.
            let _ = unlinkat(self.directory, self.name.as_os_str(), UnlinkatFlags::NoRemoveDir);
        }
    }
}

/// Makes what is missing on the way to `slot` and returns its directory.
fn make_directories(slot: &Slot) -> Result<OwnedFd, ReplaceError> {
    let mut directory = slot.directory.try_clone().map_err(|error| errno(&error))?;
    for name in &slot.missing {
        let name = name.as_os_str();
        let made = match mkdirat(&directory, name, NEW_DIRECTORY) {
            Ok(()) => true,
            Err(Errno::EEXIST) => false,
            Err(error) => return Err(error.into()),
        };
        // A link that was put here meanwhile is not a directory to O_NOFOLLOW.
        let access = if made { OFlag::O_RDONLY } else { OFlag::O_PATH };
        let flags = access | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let next = openat(&directory, name, flags, Mode::empty())?;
        if made {
            fchmod(&next, NEW_DIRECTORY)?;
        }
        directory = next;
    }
    Ok(directory)
}

#[cfg(test)]
#[path = "replace_tests.rs"]
mod tests;
