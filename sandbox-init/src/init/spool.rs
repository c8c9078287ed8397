//! Files that keep the output of calls, in a directory that the workload can read and not write.
//!
//! Names are hashes, so nothing the runner or the workload chose becomes part of a path. Every file is counted against
//! one budget; when it is used up, files of acknowledged calls are removed, oldest first, and if that is not enough the
//! write fails and the stream declares a hole. Of small and empty files only so many stay.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{UnlinkatFlags, unlinkat};
use sha2::{Digest as _, Sha256};

/// Why bytes could not be kept.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpoolError {
    /// The budget of the sandbox for kept output is used up.
    #[error("output of this sandbox exceeds its budget of {budget_bytes} bytes")]
    Budget { budget_bytes: u64 },
    /// The disk of the host has no room.
    #[error("the disk that keeps it is full")]
    Full,
    /// The file cannot be made.
    #[error("cannot create spool file {name}")]
    Create { name: String, source: nix::Error },
    /// The file cannot be written.
    #[error("cannot write spool file {name}")]
    Write { name: String, source: std::io::Error },
}

/// Files of acknowledged calls that stay: empty ones cost no bytes, but each costs the host an inode.
const RETIRED_LIMIT: usize = 256;

/// The directory.
#[derive(Debug)]
pub(crate) struct SpoolDirectory {
    directory: OwnedFd,
    path_inside: PathBuf,
    budget_bytes: u64,
    used_bytes: u64,
    retired: VecDeque<(String, u64)>,
}

/// One file, written from the beginning to the end.
#[derive(Debug)]
pub(crate) struct SpoolFile {
    file: File,
    name: String,
    length: u64,
}

impl SpoolDirectory {
    /// Takes over the directory.
    pub(crate) fn new(directory: OwnedFd, path_inside: PathBuf, budget_bytes: u64) -> Self {
        Self { directory, path_inside, budget_bytes, used_bytes: 0, retired: VecDeque::new() }
    }

    /// Makes the file for one stream of one call. `O_EXCL`: a name that exists is somebody else's work.
    pub(crate) fn create(&mut self, call_id: &str, suffix: &str) -> Result<SpoolFile, SpoolError> {
        let name = file_name(call_id, suffix);
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR | Mode::S_IRGRP | Mode::S_IROTH;
        let create = |source| match source {
            nix::Error::ENOSPC | nix::Error::EDQUOT => SpoolError::Full,
            source => SpoolError::Create { name: name.clone(), source },
        };
        let file = openat(&self.directory, name.as_str(), flags, mode).map_err(create)?;
        // The mode must not depend on an inherited umask: the workload, another user, reads these files.
        fchmod(&file, mode).map_err(create)?;
        Ok(SpoolFile { file: File::from(file), name, length: 0 })
    }

    /// Where the workload finds the file.
    pub(crate) fn path_inside(&self, file: &SpoolFile) -> PathBuf {
        self.path_inside.join(Path::new(&file.name))
    }

    /// Where the workload will find the file of a call, made or not.
    pub(crate) fn path_of(&self, call_id: &str, suffix: &str) -> PathBuf {
        self.path_inside.join(file_name(call_id, suffix))
    }

    /// Appends to a file. Bytes before a failure may have been written; [`SpoolFile::length`] tells.
    pub(crate) fn append(&mut self, file: &mut SpoolFile, bytes: &[u8]) -> Result<(), SpoolError> {
        let wanted = bytes.len() as u64;
        self.make_room(wanted);
        if self.used_bytes.saturating_add(wanted) > self.budget_bytes {
            return Err(SpoolError::Budget { budget_bytes: self.budget_bytes });
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            let failed = |source: std::io::Error| match source.kind() {
                std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => SpoolError::Full,
                _ => SpoolError::Write { name: file.name.clone(), source },
            };
            match file.file.write_at(rest, file.length) {
                Ok(0) => return Err(failed(std::io::Error::from(std::io::ErrorKind::WriteZero))),
                Ok(written) => {
                    rest = rest.get(written..).unwrap_or_default();
                    file.length = file.length.saturating_add(written as u64);
                    self.used_bytes = self.used_bytes.saturating_add(written as u64);
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(())
    }

    /// The call is acknowledged: its file stays for the workload to read until the room is needed.
    pub(crate) fn retire(&mut self, file: SpoolFile) {
        self.retired.push_back((file.name, file.length));
        if self.retired.len() > RETIRED_LIMIT {
            self.remove_oldest();
        }
    }

    fn make_room(&mut self, wanted: u64) {
        while self.used_bytes.saturating_add(wanted) > self.budget_bytes && self.remove_oldest() {}
    }

    /// Whether there was one.
    fn remove_oldest(&mut self) -> bool {
        let Some((name, length)) = self.retired.pop_front() else { return false };
        // A file that cannot be removed still takes its room, so the account is only changed on success.
        if unlinkat(&self.directory, name.as_str(), UnlinkatFlags::NoRemoveDir).is_ok() {
            self.used_bytes = self.used_bytes.saturating_sub(length);
        }
        true
    }
}

impl SpoolFile {
    /// Bytes written so far.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }

    /// Reads kept bytes back; fewer than asked at the end.
    pub(crate) fn read(&self, offset: u64, length: usize) -> std::io::Result<Vec<u8>> {
        let available = self.length.saturating_sub(offset);
        let length = length.min(usize::try_from(available).unwrap_or(usize::MAX));
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }
}

/// A name made of a hash of the call id and a fixed suffix.
fn file_name(call_id: &str, suffix: &str) -> String {
    let digest = Sha256::digest(call_id.as_bytes());
    let mut name = String::with_capacity(40);
    for byte in digest.iter().take(12) {
        use std::fmt::Write as _;
        // Writing to a String cannot fail.
        let _ = write!(name, "{byte:02x}");
    }
    name.push('.');
    name.push_str(suffix);
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spool(directory: &tempfile::TempDir, budget_bytes: u64) -> SpoolDirectory {
        let opened = File::open(directory.path()).unwrap();
        SpoolDirectory::new(OwnedFd::from(opened), PathBuf::from("/inside"), budget_bytes)
    }

    #[test]
    fn names_are_hashes_and_never_paths() {
        let name = file_name("../../etc/passwd", "stdout");
        assert_eq!(name.len(), 24 + 1 + 6);
        assert!(!name.contains('/'));
    }

    #[test]
    fn a_planted_file_or_link_is_never_written_through() {
        let directory = tempfile::tempdir().unwrap();
        let victim = directory.path().join("victim");
        std::fs::write(&victim, "before").unwrap();
        std::os::unix::fs::symlink(&victim, directory.path().join(file_name("call", "stdout"))).unwrap();
        let refused = spool(&directory, 1000).create("call", "stdout").unwrap_err();
        assert!(matches!(refused, SpoolError::Create { source: nix::Error::EEXIST, .. }), "{refused:?}");
        assert_eq!(std::fs::read(&victim).unwrap(), b"before");
    }

    #[test]
    fn disk_without_room_is_told_as_that_and_names_no_file() {
        let directory = tempfile::tempdir().unwrap();
        let mut spool = spool(&directory, 100);
        let full = File::options().write(true).open("/dev/full").unwrap();
        let mut file = SpoolFile { file: full, name: "0123.stdout".into(), length: 0 };
        let refused = spool.append(&mut file, b"output").unwrap_err();
        assert_eq!(refused.to_string(), "the disk that keeps it is full");
        assert_eq!((file.length(), spool.used_bytes), (0, 0));
    }

    #[test]
    fn empty_files_of_acknowledged_calls_do_not_pile_up() {
        let directory = tempfile::tempdir().unwrap();
        let mut spool = spool(&directory, 100);
        for number in 0..RETIRED_LIMIT + 5 {
            let file = spool.create(&format!("call-{number}"), "stdout").unwrap();
            spool.retire(file);
        }
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), RETIRED_LIMIT);
        assert!(!directory.path().join(file_name("call-4", "stdout")).exists());
    }

    #[test]
    fn room_is_made_by_removing_acknowledged_output_oldest_first() {
        let directory = tempfile::tempdir().unwrap();
        let mut spool = spool(&directory, 100);
        let mut first = spool.create("first", "stdout").unwrap();
        let mut second = spool.create("second", "stdout").unwrap();
        spool.append(&mut first, &[1; 40]).unwrap();
        spool.append(&mut second, &[2; 40]).unwrap();
        let mut third = spool.create("third", "stdout").unwrap();
        let refused = spool.append(&mut third, &[3; 40]).unwrap_err();
        assert_eq!(refused.to_string(), "output of this sandbox exceeds its budget of 100 bytes");
        spool.retire(first);
        spool.append(&mut third, &[3; 40]).unwrap();
        assert!(!directory.path().join(file_name("first", "stdout")).exists());
        assert!(directory.path().join(file_name("second", "stdout")).exists());
    }
}
