//! From an untrusted path to an opened file inside the session's directories.
//!
//! A [`RequestedPath`] is a claim of the model. [`Roots::resolve`] turns it into a [`Place`]: descriptors that were reached
//! from the root of the file system step by step, each opened without following a link, through one of the permitted
//! roots. Check and use happen on these descriptors, so exchanging a directory for a link in between changes nothing.
//!
//! The meaning of a path is that of the toolset: `.` and `..` of the request are removed lexically, then every link is
//! followed (at most 40), also one that points nowhere; absolute links are fine as long as the end lies inside. Links are
//! read as text, so the magic links below `/proc` lead where their text says and not through the kernel's back door.
//! This module never opens a FIFO, device or socket for reading or writing.

mod open;
mod walk;

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, OFlag, openat},
    sys::stat::{FileStat, Mode, SFlag, fstat},
};

use crate::tool::Context;
use open::open_beneath_in_kernel;
pub(crate) use open::{open_beneath, reopen};
use walk::Walk;

/// Names in a path; longer ones cannot be given to the kernel in one piece anyway.
const MAX_NAMES: usize = 4096;

const PATH_ONLY: OFlag = OFlag::O_PATH.union(OFlag::O_CLOEXEC).union(OFlag::O_NOFOLLOW);
const DIRECTORY: OFlag = PATH_ONLY.union(OFlag::O_DIRECTORY);

/// A path as the model wrote it: a claim, without NUL, not empty.
#[derive(Clone, Debug)]
pub(crate) struct RequestedPath(String);

impl RequestedPath {
    /// `None` when the text holds a NUL character.
    pub(crate) fn new(text: String) -> Option<Self> {
        (!text.contains('\0')).then_some(Self(text))
    }

    /// The text, for messages.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// Why a path leads to nothing that a tool may use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PathError {
    #[error("path is outside the permitted directories")]
    Outside { other_roots: bool },
    #[error("too many levels of symbolic links")]
    TooManyLinks,
    #[error("not a regular file")]
    NotRegular,
    #[error("{}", super::failure::reason(*.0))]
    System(#[from] Errno),
}

/// A permitted directory, held open.
struct Root {
    canonical: PathBuf,
    directory: OwnedFd,
    writable: bool,
}

/// The permitted directories of a call, held open. The first is the working directory.
pub(crate) struct Roots {
    roots: Vec<Root>,
    other_roots: bool,
}

/// Where a path leads: inside a permitted root, proven by descriptors.
pub(crate) struct Place {
    /// The path without links.
    pub(crate) canonical: PathBuf,
    /// What is there, opened with `O_PATH` and not a link; `None` when nothing is.
    pub(crate) entry: Option<OwnedFd>,
    /// The name it has or would get; `None` for a root and for a directory that was reached by `..` in a link.
    pub(crate) slot: Option<Slot>,
    /// The read-only root that contains the place.
    pub(crate) read_only_root: Option<PathBuf>,
}

/// A name in a directory.
pub(crate) struct Slot {
    /// The innermost directory that exists.
    pub(crate) directory: OwnedFd,
    /// Directories that would have to be made below it.
    pub(crate) missing: Vec<OsString>,
    /// The last name.
    pub(crate) name: OsString,
}

/// An opened regular file.
pub(crate) struct SandboxFile {
    pub(crate) file: File,
    pub(crate) status: FileStat,
}

impl Roots {
    /// Opens the working directory and every other root that exists.
    ///
    /// # Errors
    /// The working directory cannot be opened.
    pub(crate) fn open(context: &Context) -> Result<Self, PathError> {
        let mut roots = vec![Root::open(&context.working_directory, true)?];
        let writable = context.allowed_roots.iter().map(|path| (path, true));
        let read_only = context.read_only_roots.iter().map(|path| (path, false));
        for (path, writable) in writable.chain(read_only) {
            match Root::open(path, writable) {
                Ok(root) => roots.push(root),
                Err(PathError::System(Errno::ENOENT | Errno::ENOTDIR | Errno::EACCES)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Self { roots, other_roots: !context.allowed_roots.is_empty() })
    }

    /// Follows `requested` to its end.
    ///
    /// # Errors
    /// [`PathError::Outside`] when the end is in no root, whether or not something exists there.
    pub(crate) fn resolve(&self, requested: &RequestedPath) -> Result<Place, PathError> {
        self.resolve_path(Path::new(&requested.0))
    }

    /// The same for a path that a search has found.
    ///
    /// # Errors
    /// As [`Roots::resolve`].
    pub(crate) fn resolve_path(&self, path: &Path) -> Result<Place, PathError> {
        let names = self.lexical(path);
        if names.len() > MAX_NAMES {
            return Err(Errno::ENAMETOOLONG.into());
        }
        match self.resolve_without_links(&names) {
            Some(place) => Ok(place),
            None => Walk::new(self, names)?.run(),
        }
    }

    /// The names of `path` from the root of the file system, `.` and `..` removed.
    fn lexical(&self, path: &Path) -> Vec<OsString> {
        let mut names = Vec::new();
        for component in self.roots[0].canonical.join(path).components() {
            match component {
                Component::Normal(name) => names.push(name.to_owned()),
                Component::ParentDir => drop(names.pop()),
                Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
            }
        }
        names
    }

    /// The innermost root that contains `path`.
    fn containing(&self, path: &Path) -> Option<&Root> {
        self.roots
            .iter()
            .filter(|root| path.starts_with(&root.canonical))
            // A later root of the same depth wins: read-only roots come last.
            .max_by_key(|root| root.canonical.as_os_str().len())
    }

    /// The usual case in two system calls: no link on the way. Anything else is left to the walk, errors included.
    fn resolve_without_links(&self, names: &[OsString]) -> Option<Place> {
        let canonical = absolute(names);
        let root = self.containing(&canonical)?;
        let relative = canonical.strip_prefix(&root.canonical).ok()?;
        let Some(name) = relative.file_name() else {
            let entry = root.directory.try_clone().ok()?;
            return Some(Place { canonical, entry: Some(entry), slot: None, read_only_root: root.read_only() });
        };
        let parent = relative.parent().filter(|parent| !parent.as_os_str().is_empty());
        let directory = match parent {
            None => root.directory.try_clone().ok()?,
            Some(parent) => open_beneath_in_kernel(root.directory.as_fd(), parent, DIRECTORY).ok()?,
        };
        let entry = match openat(&directory, name, PATH_ONLY, Mode::empty()) {
            Ok(entry) if is_link(&fstat(&entry).ok()?) => return None,
            Ok(entry) => Some(entry),
            Err(Errno::ENOENT) => None,
            Err(_) => return None,
        };
        let slot = Slot { directory, missing: Vec::new(), name: name.to_owned() };
        Some(Place { read_only_root: root.read_only(), canonical, entry, slot: Some(slot) })
    }

    fn place(&self, names: &[OsString], entry: Option<OwnedFd>, slot: Option<Slot>) -> Result<Place, PathError> {
        let canonical = absolute(names);
        let root = self.containing(&canonical).ok_or(self.outside())?;
        Ok(Place { read_only_root: root.read_only(), canonical, entry, slot })
    }

    fn outside(&self) -> PathError {
        PathError::Outside { other_roots: self.other_roots }
    }
}

impl Root {
    fn open(path: &Path, writable: bool) -> Result<Self, PathError> {
        let canonical = path.canonicalize().map_err(|error| PathError::System(errno(&error)))?;
        let directory = openat(AT_FDCWD, &canonical, DIRECTORY, Mode::empty())?;
        Ok(Self { canonical, directory, writable })
    }

    fn read_only(&self) -> Option<PathBuf> {
        (!self.writable).then(|| self.canonical.clone())
    }
}

impl Place {
    /// Opens the regular file that is there, for reading.
    ///
    /// # Errors
    /// [`PathError::NotRegular`] for a directory, FIFO, device or socket, which is never opened.
    pub(crate) fn open_file(&self) -> Result<SandboxFile, PathError> {
        let entry = self.entry.as_ref().ok_or(Errno::ENOENT)?;
        let status = fstat(entry)?;
        if !is_regular(&status) {
            return Err(PathError::NotRegular);
        }
        let file = reopen(entry.as_fd(), &status, self.slot.as_ref(), OFlag::O_RDONLY)?;
        Ok(SandboxFile { file, status })
    }
}

fn absolute(names: &[OsString]) -> PathBuf {
    let mut path = PathBuf::from("/");
    path.extend(names);
    path
}

pub(crate) fn file_kind(status: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(status.st_mode & SFlag::S_IFMT.bits())
}

pub(crate) fn is_regular(status: &FileStat) -> bool {
    file_kind(status) == SFlag::S_IFREG
}

pub(crate) fn is_directory(status: &FileStat) -> bool {
    file_kind(status) == SFlag::S_IFDIR
}

fn is_link(status: &FileStat) -> bool {
    file_kind(status) == SFlag::S_IFLNK
}

pub(crate) fn same_inode(one: &FileStat, other: &FileStat) -> bool {
    one.st_dev == other.st_dev && one.st_ino == other.st_ino
}

/// The error number behind an error of the standard library.
pub(crate) fn errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// Bytes of a name or path, for the model.
pub(crate) fn lossy(path: &OsStr) -> String {
    String::from_utf8_lossy(path.as_bytes()).into_owned()
}

#[cfg(test)]
#[path = "path_tests.rs"]
mod tests;
