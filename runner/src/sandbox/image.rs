//! The embedded `sandbox-init` as something that can be executed.
//!
//! Preferred is a sealed memory file: nobody, not even root, can change it while it runs, and nothing stays on disk. Where
//! the kernel refuses to execute memory files (`vm.memfd_noexec=2`), a file of mode 0500 in the state directory takes its
//! place. The bytes come only from this executable, never from a request.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{MemfdFlags, Mode, SealFlags, fchmod, fcntl_add_seals, memfd_create};

/// The program, built by `build.rs`.
static EMBEDDED: &[u8] = include_bytes!(env!("SANDBOX_INIT_IMAGE"));

/// Why the program cannot be executed here.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// No memory file.
    #[error("cannot make the memory file of sandbox-init: {step}")]
    Memory {
        /// What was attempted.
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// No ordinary file either.
    #[error("cannot write sandbox-init to {}", path.display())]
    File {
        /// Where.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// An executable copy of the embedded program.
#[derive(Debug)]
pub enum ExecutableImage {
    /// Sealed memory file, executed by descriptor.
    Memory(OwnedFd),
    /// File of mode 0500 in the state directory.
    File(PathBuf),
}

impl ExecutableImage {
    /// Puts the embedded program into a sealed memory file.
    ///
    /// # Errors
    /// [`ImageError::Memory`] when the kernel has no executable memory files.
    pub fn in_memory() -> Result<Self, ImageError> {
        let step = |step| move |errno: rustix::io::Errno| ImageError::Memory { step, source: errno.into() };
        let base = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let descriptor = memfd_create("sandbox-init", base | MemfdFlags::EXEC)
            // Kernels before 6.3 do not know the flag, and their memory files are always executable.
            .or_else(
                |errno| if errno == rustix::io::Errno::INVAL { memfd_create("sandbox-init", base) } else { Err(errno) },
            )
            .map_err(step("memfd_create"))?;
        let mut file = File::from(descriptor);
        file.write_all(EMBEDDED).map_err(|source| ImageError::Memory { step: "write", source })?;
        // Process 1 executes it as root of a namespace that owns nothing here: the bits for others count.
        fchmod(&file, Mode::from_raw_mode(0o555)).map_err(step("fchmod"))?;
        let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
        // With the mode as well: where there is a single id, the workload owns this file and finds it behind the `exe` of a file
        // tool. Without its execute bits no further sandbox could be made. Kernels before 6.3 cannot seal them.
        fcntl_add_seals(&file, seals | SealFlags::EXEC)
            .or_else(|errno| if errno == rustix::io::Errno::INVAL { fcntl_add_seals(&file, seals) } else { Err(errno) })
            .map_err(step("sealing"))?;
        Ok(Self::Memory(file.into()))
    }

    /// Puts the embedded program into `directory`, which only this user can write to.
    ///
    /// The name carries the length and the process id; the content is written to a new file and renamed, so a half
    /// written or foreign file is never executed.
    ///
    /// # Errors
    /// [`ImageError::File`] when the directory cannot be written.
    pub fn in_directory(directory: &Path) -> Result<Self, ImageError> {
        let path = directory.join("sandbox-init");
        let temporary = directory.join(format!(".sandbox-init.{}", std::process::id()));
        let written = (|| {
            if is_current(&path) {
                return Ok(());
            }
            let _ = fs::remove_file(&temporary);
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o500).open(&temporary)?;
            file.write_all(EMBEDDED)?;
            file.sync_all()?;
            // Closed before the rename: a file open for writing cannot be executed.
            drop(file);
            fs::rename(&temporary, &path)
        })();
        match written {
            Ok(()) => Ok(Self::File(path)),
            Err(source) => {
                let _ = fs::remove_file(&temporary);
                Err(ImageError::File { path, source })
            }
        }
    }

    /// The path that executes this image in this process and in a child that has inherited its descriptors.
    pub fn path(&self) -> PathBuf {
        match self {
            Self::Memory(descriptor) => PathBuf::from(format!("/proc/self/fd/{}", descriptor.as_raw_fd())),
            Self::File(path) => path.clone(),
        }
    }
}

fn is_current(path: &Path) -> bool {
    let Ok(metadata) = fs::symlink_metadata(path) else { return false };
    metadata.is_file()
        && metadata.uid() == nix::unistd::geteuid().as_raw()
        && metadata.mode() & 0o022 == 0
        && fs::read(path).is_ok_and(|content| content == EMBEDDED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_image_holds_the_program_and_refuses_every_change() {
        let image = ExecutableImage::in_memory().expect("memory files are available");

        assert_eq!(fs::read(image.path()).expect("readable"), EMBEDDED);
        let ExecutableImage::Memory(descriptor) = &image else { panic!("not in memory") };
        assert_eq!(rustix::io::pwrite(descriptor, b"x", 0), Err(rustix::io::Errno::PERM));
        assert_eq!(rustix::fs::ftruncate(descriptor, 1), Err(rustix::io::Errno::PERM));
        assert_eq!(fchmod(descriptor, Mode::from_raw_mode(0o444)), Err(rustix::io::Errno::PERM));
    }

    #[test]
    fn file_image_replaces_a_file_with_other_content() {
        let directory = tempfile::tempdir().expect("temporary directory");
        fs::write(directory.path().join("sandbox-init"), "something else").expect("write");

        let image = ExecutableImage::in_directory(directory.path()).expect("written");

        assert_eq!(fs::read(image.path()).expect("readable"), EMBEDDED);
        assert_eq!(fs::metadata(image.path()).expect("exists").mode() & 0o777, 0o500);
        assert_eq!(fs::read_dir(directory.path()).expect("listed").count(), 1);
    }
}
