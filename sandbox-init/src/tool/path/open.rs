//! Opens what a place leads to, and names below a directory, without following a link.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat, openat2};
use nix::sys::stat::{FileStat, Mode, fstat};

use super::{DIRECTORY, PathError, Slot, same_inode};

/// Opens what an `O_PATH` descriptor stands for, with `access`.
///
/// The link below `/proc/self/fd` leads to the very same inode. Where `/proc` is not mounted the name is opened again and
/// the inode compared.
pub(crate) fn reopen(
    entry: BorrowedFd<'_>,
    status: &FileStat,
    slot: Option<&Slot>,
    access: OFlag,
) -> Result<File, PathError> {
    let flags = access | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let link = format!("/proc/self/fd/{}", entry.as_raw_fd());
    match (openat(AT_FDCWD, link.as_str(), flags, Mode::empty()), slot) {
        (Ok(file), _) => Ok(File::from(file)),
        (Err(Errno::ENOENT | Errno::ENOTDIR), Some(slot)) => {
            let file = openat(&slot.directory, slot.name.as_os_str(), flags | OFlag::O_NOFOLLOW, Mode::empty())?;
            if !same_inode(&fstat(&file)?, status) {
                return Err(Errno::ESTALE.into());
            }
            Ok(File::from(file))
        }
        (Err(error), _) => Err(error.into()),
    }
}

/// Opens `relative` below `root`; a link anywhere in it is an error.
///
/// # Errors
/// What the kernel says; `ELOOP` or `ENOTDIR` for a link.
pub(crate) fn open_beneath(root: BorrowedFd<'_>, relative: &Path, flags: OFlag) -> Result<OwnedFd, Errno> {
    match open_beneath_in_kernel(root, relative, flags) {
        Err(Errno::ENOSYS | Errno::EPERM | Errno::E2BIG) => open_beneath_by_steps(root, relative, flags),
        outcome => outcome,
    }
}

pub(super) fn open_beneath_in_kernel(root: BorrowedFd<'_>, relative: &Path, flags: OFlag) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS | ResolveFlag::RESOLVE_NO_SYMLINKS;
    openat2(root, relative, OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve))
}

/// The same for kernels and emulations without `openat2`: one name at a time.
pub(super) fn open_beneath_by_steps(root: BorrowedFd<'_>, relative: &Path, flags: OFlag) -> Result<OwnedFd, Errno> {
    let mut held: Option<OwnedFd> = None;
    let mut names = relative.components().peekable();
    while let Some(component) = names.next() {
        let Component::Normal(name) = component else { return Err(Errno::EXDEV) };
        let directory = held.as_ref().map_or(root, |fd| fd.as_fd());
        let step = if names.peek().is_some() { DIRECTORY } else { flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC };
        held = Some(openat(directory, name, step, Mode::empty())?);
    }
    held.ok_or(Errno::ENOENT)
}
