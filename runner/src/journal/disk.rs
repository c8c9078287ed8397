//! The dozen things the journal does with a directory, as a trait: the real one, and in tests one that loses what was not
//! synced, fails on demand and is cut anywhere.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FallocateFlags, FlockOperation, Mode, OFlags};

/// A directory of files. Names are plain names in it.
pub(super) trait Disk: Send {
    /// An open file.
    type File: DiskFile;

    /// Every name.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Makes a file of `bytes` zeros with room for all of them, for its owner only; an old one of that name is emptied.
    fn create(&self, name: &str, bytes: u64) -> io::Result<Self::File>;
    /// Opens a file for reading.
    fn open(&self, name: &str) -> io::Result<Self::File>;
    /// Gives a file another name; one that has it already is replaced.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a name.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Makes names as durable as `DiskFile::sync` makes contents.
    fn sync_names(&self) -> io::Result<()>;
    /// The path, for messages.
    fn path(&self, name: &str) -> PathBuf;
}

/// An open file of a `Disk`.
pub(super) trait DiskFile: Send {
    /// Reads everything.
    fn read(&self) -> io::Result<Vec<u8>>;
    /// Reads exactly `bytes` from `offset`.
    fn read_at(&self, offset: u64, bytes: usize) -> io::Result<Vec<u8>>;
    /// Writes the beginning of `bytes` at `offset`, and says how much of them.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize>;
    /// Returns when contents and size would survive a power cut.
    fn sync(&self) -> io::Result<()>;

    /// Writes all of `bytes`, however small the pieces.
    fn write_all_at(&self, mut offset: u64, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.write_at(offset, bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    bytes = bytes.get(written..).unwrap_or_default();
                    offset += u64::try_from(written).unwrap_or(u64::MAX);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// A directory of this host.
#[derive(Debug)]
pub(super) struct HostDisk {
    path: PathBuf,
    handle: OwnedFd,
}

impl HostDisk {
    /// Opens the directory at `path`.
    pub(super) fn open_directory(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let handle = rustix::fs::open(path, flags, Mode::empty())?;
        Ok(Self { path: path.to_path_buf(), handle })
    }

    /// Locks the directory for as long as this value lives; false when another process has locked it.
    pub(super) fn lock(&self) -> io::Result<bool> {
        match rustix::fs::flock(&self.handle, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

impl Disk for HostDisk {
    type File = File;

    fn list(&self) -> io::Result<Vec<String>> {
        // Names that are not text are not ours.
        let names = std::fs::read_dir(&self.path)?.map(|entry| Ok(entry?.file_name().into_string().ok()));
        names.filter_map(io::Result::transpose).collect()
    }

    fn create(&self, name: &str, bytes: u64) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = File::from(rustix::fs::openat(&self.handle, name, flags, Mode::RUSR | Mode::WUSR)?);
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes) {
            Ok(()) => {}
            // Some file systems cannot set room aside. Then it may be missing later, which is an error like any other.
            Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(bytes)?,
            Err(error) => return Err(error.into()),
        }
        Ok(file)
    }

    fn open(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        Ok(File::from(rustix::fs::openat(&self.handle, name, flags, Mode::empty())?))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(rustix::fs::renameat(&self.handle, from, &self.handle, to)?)
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.handle, name, AtFlags::empty())?)
    }

    fn sync_names(&self) -> io::Result<()> {
        Ok(rustix::fs::fsync(&self.handle)?)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

impl DiskFile for File {
    fn read(&self) -> io::Result<Vec<u8>> {
        let length = usize::try_from(self.metadata()?.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        DiskFile::read_at(self, 0, length)
    }

    fn read_at(&self, offset: u64, bytes: usize) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; bytes];
        self.read_exact_at(&mut buffer, offset)?;
        Ok(buffer)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        FileExt::write_at(self, bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}
