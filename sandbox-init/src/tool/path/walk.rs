//! The general way to a place: one name at a time from the root of the file system, each link read as text and followed.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Component, Path};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, openat, readlinkat};
use nix::sys::stat::{Mode, fstat};

use super::{DIRECTORY, MAX_NAMES, PATH_ONLY, PathError, Place, Roots, Slot, absolute, errno, is_link};

/// Links followed before a path counts as a loop.
pub(super) const MAX_LINKS: u32 = 40;

/// The general way: one name at a time from the root of the file system.
pub(super) struct Walk<'a> {
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
    pub(super) fn new(roots: &'a Roots, names: Vec<OsString>) -> Result<Self, PathError> {
        let pending = names.into_iter().rev().collect();
        Ok(Self { roots, pending, names: Vec::new(), directory: file_system_root()?, links: 0 })
    }

    pub(super) fn run(mut self) -> Result<Place, PathError> {
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
