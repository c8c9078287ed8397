//! Privileged: replaces the launcher's program in place.
//!
//! The new program comes only from the file that the policy names, and only while root alone can change it; the runner can
//! ask for the replacement and cannot supply anything. The pid stays, so sandboxes stay children and their exits are not
//! lost. The trimmed mount namespace stays too: what the new program needs from outside of it is handed over as
//! descriptors, the policy as text.

use std::ffi::CString;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};
use nix::unistd::geteuid;

use crate::sys::process::{
    close_range_on_exec, duplicate_above, execute_descriptor, inherited_descriptor, place_descriptor,
};

/// The directory of the program and its name there, opened before the host's tree is left.
#[derive(Debug)]
pub struct Program {
    directory: OwnedFd,
    name: CString,
}

/// Why the program is not replaced.
#[derive(Debug, thiserror::Error)]
pub enum ReplaceError {
    /// The file cannot be opened.
    #[error("cannot open the program that the policy names")]
    Open(#[source] nix::Error),
    /// Somebody else could change it.
    #[error(
        "the program that the policy names {problem}; it must be a regular file of uid {owner} that nobody else can write, in such a directory"
    )]
    Unsafe {
        /// What is wrong.
        problem: &'static str,
        /// The user the launcher runs as.
        owner: u32,
    },
    /// The kernel refused.
    #[error("cannot execute the program that the policy names")]
    Execute(#[source] nix::Error),
}

impl Program {
    /// Opens the directory of `path`.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn open(path: &Path) -> nix::Result<Self> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Err(Errno::EISDIR) };
        let directory = open(parent, OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
        Ok(Self { directory, name: CString::new(name.as_encoded_bytes()).map_err(|_| Errno::EINVAL)? })
    }

    /// Opens the file and checks on the same descriptor that root alone can change it.
    ///
    /// # Errors
    /// [`ReplaceError`].
    pub fn check(&self) -> Result<OwnedFd, ReplaceError> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let file = openat(&self.directory, self.name.as_c_str(), flags, Mode::empty()).map_err(ReplaceError::Open)?;
        let owner = geteuid().as_raw();
        let problem = |found: &FileStat, kind: SFlag| {
            if SFlag::from_bits_truncate(found.st_mode & SFlag::S_IFMT.bits()) != kind {
                Some("is of another kind")
            } else if found.st_uid != owner {
                Some("belongs to somebody else")
            } else if found.st_mode & 0o022 != 0 && !(kind == SFlag::S_IFDIR && found.st_mode & 0o1000 != 0) {
                // The sticky bit keeps others from exchanging a name in a directory; it does not protect a file.
                Some("can be written by others")
            } else {
                None
            }
        };
        let directory = fstat(&self.directory).map_err(ReplaceError::Open)?;
        let found = fstat(&file).map_err(ReplaceError::Open)?;
        match problem(&found, SFlag::S_IFREG).or(problem(&directory, SFlag::S_IFDIR)) {
            Some(problem) => Err(ReplaceError::Unsafe { problem, owner }),
            None => Ok(file),
        }
    }
}

/// What the next program needs.
#[derive(Debug)]
pub struct Handover {
    /// Text of the policy.
    pub policy: String,
    /// Listening socket.
    pub listener: OwnedFd,
    /// Directory of the slot locks.
    pub locks: OwnedFd,
    /// Where the program is, for the time after.
    pub program: Program,
    /// The kernel's log, where it may be read.
    pub kernel_log: Option<OwnedFd>,
}

/// Numbers of the handed descriptors: policy, listener, locks, directory of the program.
const NUMBERS: [i32; 4] = [3, 4, 5, 6];
/// Number of the kernel's log; nothing is open there when there is none, or when the program before did not know of it.
const KERNEL_LOG: i32 = 7;
/// What lies from here on was not handed over.
pub const FIRST_OTHER: i32 = 8;
/// Largest policy text.
const MAX_POLICY_BYTES: u64 = 1 << 20;

impl Handover {
    /// Becomes the new program. Returns only on failure, which leaves sandboxes to be adopted by the next launcher.
    ///
    /// # Errors
    /// [`ReplaceError`].
    pub fn execute(self, file: &OwnedFd) -> ReplaceError {
        let prepare = || -> nix::Result<OwnedFd> {
            let policy = memfd_create(c"policy", MFdFlags::MFD_CLOEXEC)?;
            let mut policy = std::fs::File::from(policy);
            policy.write_all(self.policy.as_bytes()).map_err(|_| Errno::ENOSPC)?;
            let policy = OwnedFd::from(policy);
            let sources = [
                policy.as_fd(),
                self.listener.as_fd(),
                self.locks.as_fd(),
                self.program.directory.as_fd(),
                file.as_fd(),
            ];
            let mut high = Vec::new();
            for source in sources {
                high.push(duplicate_above(source, 64)?);
            }
            let log = self.kernel_log.as_ref().map(|log| duplicate_above(log.as_fd(), 64)).transpose()?;
            close_range_on_exec(3)?;
            for (source, number) in high.iter().zip(NUMBERS) {
                place_descriptor(source.as_raw_fd(), number)?;
            }
            if let Some(log) = &log {
                place_descriptor(log.as_raw_fd(), KERNEL_LOG)?;
            }
            // Its number may be one of those just taken; closing it here would close what the next program needs.
            std::mem::forget(policy);
            high.pop().ok_or(Errno::EBADF)
        };
        let name = self.program.name.clone();
        match prepare() {
            Ok(image) => {
                let argv =
                    [CString::from(c"sandbox-runner"), CString::from(c"launcher"), CString::from(c"--resume"), name];
                ReplaceError::Execute(execute_descriptor(image.as_fd(), &argv, &[]))
            }
            Err(errno) => ReplaceError::Execute(errno),
        }
    }

    /// Takes over what the program before left.
    ///
    /// # Errors
    /// `EBADF` when this program was not started by [`Handover::execute`].
    pub fn receive(name: CString) -> nix::Result<Self> {
        let [policy, listener, locks, directory] = NUMBERS.map(inherited_descriptor);
        let mut policy = std::fs::File::from(policy?);
        policy.rewind().map_err(|_| Errno::EBADF)?;
        let mut text = String::new();
        policy.take(MAX_POLICY_BYTES).read_to_string(&mut text).map_err(|_| Errno::EBADMSG)?;
        let program = Program { directory: directory?, name };
        let kernel_log = inherited_descriptor(KERNEL_LOG).ok();
        Ok(Self { policy: text, listener: listener?, locks: locks?, program, kernel_log })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    fn program(mode: u32) -> (tempfile::TempDir, Program) {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("program");
        fs::write(&path, "x").expect("write");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("chmod");
        let program = Program::open(&path).expect("open");
        (directory, program)
    }

    #[test]
    fn a_program_of_the_own_user_is_accepted() {
        let (_directory, program) = program(0o755);
        assert!(program.check().is_ok());
    }

    #[test]
    fn a_program_that_others_can_write_is_refused() {
        let (_directory, program) = program(0o775);
        assert!(program.check().expect_err("must be refused").to_string().contains("can be written by others"));
    }

    #[test]
    fn a_program_that_others_can_write_is_refused_with_the_sticky_bit_as_well() {
        let (_directory, program) = program(0o1777);
        assert!(program.check().expect_err("must be refused").to_string().contains("can be written by others"));
    }

    #[test]
    fn a_program_in_a_directory_where_nobody_can_exchange_it_is_accepted() {
        let (directory, program) = program(0o755);
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o1777)).expect("chmod");
        assert!(program.check().is_ok());
    }

    #[test]
    fn a_link_in_the_place_of_the_program_is_refused() {
        let (directory, program) = program(0o755);
        fs::rename(directory.path().join("program"), directory.path().join("other")).expect("rename");
        std::os::unix::fs::symlink("other", directory.path().join("program")).expect("symlink");
        assert!(matches!(program.check(), Err(ReplaceError::Open(Errno::ELOOP))));
    }

    #[test]
    fn a_program_in_a_directory_that_others_can_write_is_refused() {
        let (directory, program) = program(0o755);
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).expect("chmod");
        assert!(program.check().is_err());
    }
}
