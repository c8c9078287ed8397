//! Privileged: reads and writes files of cgroupfs, which only the launcher may.
//!
//! Directories and files of cgroupfs, by what stands in them.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use super::CgroupError;

pub(super) fn make_directory(path: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(path) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            Err(CgroupError::File { action: "create", path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

pub(super) fn open_directory(path: &Path) -> Result<OwnedFd, CgroupError> {
    open(path, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(|errno| CgroupError::File { action: "open", path: path.to_owned(), source: errno.into() })
}

pub(super) fn enable(directory: &Path, controllers: &[&str]) -> bool {
    let file = directory.join("cgroup.subtree_control");
    let mut all = true;
    for controller in controllers {
        all &= write(&file, &format!("+{controller}")).is_ok();
    }
    all
}

pub(super) fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    let failed = |source| CgroupError::File { action: "write", path: path.to_owned(), source };
    File::options().write(true).open(path).map_err(failed)?.write_all(value.as_bytes()).map_err(failed)
}

/// A file that this kernel or this host does not have is no failure where the receipt shows the effect.
pub(super) fn absent(error: CgroupError) -> Result<(), CgroupError> {
    match &error {
        CgroupError::File { source, .. } if source.kind() == io::ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    }
}

pub(super) fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// A file with one number; "max" and absence read as 0.
pub(super) fn number(path: &Path) -> u64 {
    read(path).trim().parse().unwrap_or(0)
}

/// A field of a flat keyed file.
pub(super) fn field(path: &Path, key: &str) -> u64 {
    read(path).lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok()).unwrap_or(0)
}
