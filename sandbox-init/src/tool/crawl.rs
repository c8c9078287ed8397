//! Walks a directory tree with several threads, by descriptor.
//!
//! Every directory is opened beneath the descriptor of the root, and a link anywhere on the way is an error. So what is
//! visited lies in the tree, whatever is renamed during the walk. Links are reported and never followed.

use std::{
    ffi::{CStr, OsStr},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

use nix::{
    dir::{Dir, Type},
    fcntl::{AtFlags, OFlag},
    sys::stat::{SFlag, fstatat},
};

use crate::tool::path::{file_kind, open_beneath};

/// What an entry is, as far as a search cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Link,
}

/// One entry that is not a directory.
pub(crate) struct Found<'a> {
    /// The directory that holds it.
    pub(crate) directory: BorrowedFd<'a>,
    /// Its name there.
    pub(crate) name: &'a CStr,
    /// Its path from the root of the walk.
    pub(crate) relative: &'a [u8],
    pub(crate) kind: Kind,
}

/// What one thread of a walk does with the entries it meets.
pub(crate) trait Visitor: Send {
    /// Whether to go into the directory `relative`, which is `depth` names below the root of the walk.
    fn enters(&self, relative: &[u8], depth: usize) -> bool;
    /// Takes a file or link.
    fn visit(&mut self, found: &Found<'_>);
}

/// Bounds of a walk.
pub(crate) struct Bounds {
    pub(crate) max_entries: u64,
    pub(crate) deadline: Instant,
}

/// Why a walk did not see everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    Entries,
    Time,
}

/// Walks the tree below `start`, a path from `root`, with one thread for each visitor.
///
/// Directories that cannot be read are passed over. Returns what cut the walk short, if anything did.
pub(crate) fn crawl<V: Visitor>(
    root: BorrowedFd<'_>,
    start: &[u8],
    visitors: &mut [V],
    bounds: &Bounds,
) -> Option<Cut> {
    let depth = if start.is_empty() { 0 } else { start.split(|byte| *byte == b'/').count() };
    let crawl = Crawl {
        root,
        bounds,
        queue: Mutex::new(Queue { pending: vec![Pending { relative: start.to_vec(), depth }], busy: 0 }),
        changed: Condvar::new(),
        entries: AtomicU64::new(0),
        too_many: AtomicBool::new(false),
        too_late: AtomicBool::new(false),
    };
    if let Some((own, others)) = visitors.split_first_mut() {
        thread::scope(|scope| {
            for visitor in others {
                // Without a further thread (the process limit) the others do the work.
                if thread::Builder::new().spawn_scoped(scope, || crawl.work(visitor)).is_err() {
                    break;
                }
            }
            crawl.work(own);
        });
    }
    match (crawl.too_late.into_inner(), crawl.too_many.into_inner()) {
        (true, _) => Some(Cut::Time),
        (false, true) => Some(Cut::Entries),
        (false, false) => None,
    }
}

struct Pending {
    relative: Vec<u8>,
    depth: usize,
}

struct Queue {
    pending: Vec<Pending>,
    /// Threads that are inside a directory and may still add to `pending`.
    busy: usize,
}

struct Crawl<'a> {
    root: BorrowedFd<'a>,
    bounds: &'a Bounds,
    queue: Mutex<Queue>,
    changed: Condvar,
    entries: AtomicU64,
    too_many: AtomicBool,
    too_late: AtomicBool,
}

impl Crawl<'_> {
    fn work<V: Visitor>(&self, visitor: &mut V) {
        let mut found = Vec::new();
        while let Some(directory) = self.next() {
            self.read(&directory, visitor, &mut found);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next directory; waits while another thread may still find one.
    fn next(&self) -> Option<Pending> {
        let mut queue = self.lock();
        loop {
            if self.is_over() {
                self.changed.notify_all();
                return None;
            }
            if let Some(directory) = queue.pending.pop() {
                queue.busy += 1;
                return Some(directory);
            }
            if queue.busy == 0 {
                self.changed.notify_all();
                return None;
            }
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn is_over(&self) -> bool {
        self.too_many.load(Ordering::Relaxed) || self.too_late.load(Ordering::Relaxed)
    }

    fn read<V: Visitor>(&self, pending: &Pending, visitor: &mut V, found: &mut Vec<Pending>) {
        if let Ok(mut directory) = self.open(&pending.relative) {
            self.entries_of(&mut directory, pending, visitor, found);
        }
        let mut queue = self.lock();
        queue.pending.append(found);
        queue.busy -= 1;
        self.changed.notify_all();
    }

    fn open(&self, relative: &[u8]) -> Result<Dir, nix::Error> {
        let path = if relative.is_empty() { Path::new(".") } else { Path::new(OsStr::from_bytes(relative)) };
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NONBLOCK;
        let descriptor: OwnedFd = if relative.is_empty() {
            nix::fcntl::openat(self.root, path, flags | OFlag::O_CLOEXEC, nix::sys::stat::Mode::empty())?
        } else {
            open_beneath(self.root, path, flags)?
        };
        Dir::from_fd(descriptor)
    }

    fn entries_of<V: Visitor>(
        &self,
        directory: &mut Dir,
        pending: &Pending,
        visitor: &mut V,
        found: &mut Vec<Pending>,
    ) {
        // The stream and this descriptor share nothing but the directory.
        let Ok(descriptor) = directory.as_fd().try_clone_to_owned() else { return };
        let mut relative = pending.relative.clone();
        if !relative.is_empty() {
            relative.push(b'/');
        }
        let prefix = relative.len();
        for entry in directory.iter().map_while(Result::ok) {
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            if !self.may_continue() {
                return;
            }
            relative.truncate(prefix);
            relative.extend_from_slice(name.to_bytes());
            let kind = match entry.file_type().or_else(|| unlisted_type(descriptor.as_fd(), name)) {
                Some(Type::Directory) => {
                    if visitor.enters(&relative, pending.depth + 1) {
                        found.push(Pending { relative: relative.clone(), depth: pending.depth + 1 });
                    }
                    continue;
                }
                Some(Type::File) => Kind::File,
                Some(Type::Symlink) => Kind::Link,
                _ => continue,
            };
            visitor.visit(&Found { directory: descriptor.as_fd(), name, relative: &relative, kind });
        }
    }

    /// Counts an entry, and looks at the clock every now and then.
    fn may_continue(&self) -> bool {
        let seen = self.entries.fetch_add(1, Ordering::Relaxed);
        if seen >= self.bounds.max_entries {
            self.too_many.store(true, Ordering::Relaxed);
        } else if seen.is_multiple_of(256) && Instant::now() >= self.bounds.deadline {
            self.too_late.store(true, Ordering::Relaxed);
        }
        !self.is_over()
    }
}

/// Some file systems do not list types.
fn unlisted_type(directory: BorrowedFd<'_>, name: &CStr) -> Option<Type> {
    let status = fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW).ok()?;
    match file_kind(&status) {
        SFlag::S_IFDIR => Some(Type::Directory),
        SFlag::S_IFREG => Some(Type::File),
        SFlag::S_IFLNK => Some(Type::Symlink),
        _ => None,
    }
}
