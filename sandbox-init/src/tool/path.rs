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

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat, openat2, readlinkat},
    sys::stat::{FileStat, Mode, SFlag, fstat},
};

use crate::tool::Context;

/// Links followed before a path counts as a loop.
const MAX_LINKS: u32 = 40;
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

fn open_beneath_in_kernel(root: BorrowedFd<'_>, relative: &Path, flags: OFlag) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS | ResolveFlag::RESOLVE_NO_SYMLINKS;
    openat2(root, relative, OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(resolve))
}

/// The same for kernels and emulations without `openat2`: one name at a time.
fn open_beneath_by_steps(root: BorrowedFd<'_>, relative: &Path, flags: OFlag) -> Result<OwnedFd, Errno> {
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

/// The general way: one name at a time from the root of the file system.
struct Walk<'a> {
    roots: &'a Roots,
    /// Names that remain, the next one last.
    pending: Vec<OsString>,
    /// Names behind us; none of them is a link.
    names: Vec<OsString>,
    /// The directory that `names` leads to.
    directory: OwnedFd,
    links: u32,
}

impl<'a> Walk<'a> {
    fn new(roots: &'a Roots, names: Vec<OsString>) -> Result<Self, PathError> {
        let pending = names.into_iter().rev().collect();
        Ok(Self { roots, pending, names: Vec::new(), directory: file_system_root()?, links: 0 })
    }

    fn run(mut self) -> Result<Place, PathError> {
        while let Some(name) = self.pending.pop() {
            if name == ".." {
                // Only the text of a link brings these. The parent is found by name again and not by opening "..":
                // a directory that was moved meanwhile has another parent.
                self.names.pop();
                self.reopen_directory()?;
                continue;
            }
            let entry = match openat(&self.directory, name.as_os_str(), PATH_ONLY, Mode::empty()) {
                Ok(entry) => entry,
                Err(error) => return self.stop_at(name, error),
            };
            let status = fstat(&entry)?;
            if is_link(&status) {
                match readlinkat(&entry, "") {
                    Ok(target) => self.follow(Path::new(&target))?,
                    Err(error) => return self.stop_at(name, error),
                }
            } else if self.pending.is_empty() {
                return self.finish(name, entry);
            } else {
                self.enter(name, entry)?;
            }
        }
        let entry = self.directory.try_clone().map_err(|error| errno(&error))?;
        self.roots.place(&self.names, Some(entry), None)
    }

    fn follow(&mut self, target: &Path) -> Result<(), PathError> {
        self.links += 1;
        if self.links > MAX_LINKS {
            return Err(PathError::TooManyLinks);
        }
        let before = self.pending.len();
        for component in target.components() {
            match component {
                Component::RootDir => {
                    self.names.clear();
                    self.directory = file_system_root()?;
                }
                Component::Normal(name) => self.pending.push(name.to_owned()),
                Component::ParentDir => self.pending.push("..".into()),
                Component::CurDir | Component::Prefix(_) => {}
            }
        }
        self.pending[before..].reverse();
        if self.pending.len() > MAX_NAMES { Err(Errno::ENAMETOOLONG.into()) } else { Ok(()) }
    }

    /// Goes one directory down. A root is entered through the descriptor that was opened first of all.
    fn enter(&mut self, name: OsString, entry: OwnedFd) -> Result<(), PathError> {
        self.names.push(name);
        self.directory = match self.root_here() {
            Some(directory) => directory.try_clone().map_err(|error| errno(&error))?,
            None => entry,
        };
        Ok(())
    }

    fn root_here(&self) -> Option<&'a OwnedFd> {
        let here = absolute(&self.names);
        self.roots.roots.iter().find(|root| root.canonical == here).map(|root| &root.directory)
    }

    fn reopen_directory(&mut self) -> Result<(), PathError> {
        self.directory = file_system_root()?;
        for name in std::mem::take(&mut self.names) {
            let entry = openat(&self.directory, name.as_os_str(), DIRECTORY, Mode::empty())?;
            self.enter(name, entry)?;
        }
        Ok(())
    }

    fn finish(mut self, name: OsString, entry: OwnedFd) -> Result<Place, PathError> {
        self.names.push(name.clone());
        if let Some(root) = self.root_here() {
            let entry = root.try_clone().map_err(|error| errno(&error))?;
            return self.roots.place(&self.names, Some(entry), None);
        }
        let slot = Slot { directory: self.directory, missing: Vec::new(), name };
        self.roots.place(&self.names, Some(entry), Some(slot))
    }

    /// The way ends at `name`. What remains is kept as it is spelled, so that a place outside is called outside whether
    /// it exists or not.
    fn stop_at(mut self, name: OsString, error: Errno) -> Result<Place, PathError> {
        let mut rest = vec![name];
        let mut climbs = false;
        while let Some(name) = self.pending.pop() {
            climbs |= name == "..";
            rest.push(name);
        }
        let mut names = self.names.clone();
        for name in &rest {
            if name == ".." {
                names.pop();
            } else {
                names.push(name.clone());
            }
        }
        let place = self.roots.place(&names, None, None)?;
        // When a root itself was removed under us, its parent is no place to make things in.
        let held = self.roots.containing(&absolute(&self.names)).is_some();
        match rest.pop() {
            Some(name) if error == Errno::ENOENT && held && !climbs => {
                Ok(Place { slot: Some(Slot { directory: self.directory, missing: rest, name }), ..place })
            }
            _ => Err(error.into()),
        }
    }
}

fn file_system_root() -> Result<OwnedFd, PathError> {
    Ok(openat(AT_FDCWD, "/", DIRECTORY, Mode::empty())?)
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
