//! A disk for tests that keeps apart what was written and what was synced, fails on demand, and survives crashes of two kinds:
//! of the process (everything written is there) and of the power (only what was synced, and any part of the rest).

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use super::disk::{Disk, DiskFile};
use super::log::BALLAST;

/// What a file has gone through since it was last synced.
#[derive(Debug, Clone)]
enum Change {
    Resize(usize),
    Write(usize, Vec<u8>),
}

#[derive(Debug, Clone, Default)]
struct Inode {
    durable: Vec<u8>,
    cached: Vec<u8>,
    pending: Vec<Change>,
}

#[derive(Debug, Clone)]
enum NameChange {
    Link(String, usize),
    Unlink(String),
}

/// Which operations fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// The n-th sync of a file from here, once; what it should have synced is lost if the power fails.
    Sync(usize),
    /// The n-th sync of a file from here, once, with no room as the reason; as above. The process is dead so many operations after it.
    SyncWithoutRoom(usize, usize),
    /// The n-th write from here, once.
    Write(usize),
    /// The n-th write from here is interrupted by a signal, once.
    InterruptedWrite(usize),
    /// The n-th operation of any kind that changes something, once.
    Any(usize),
    /// The n-th operation of any kind that changes something, and all after it: the process is dead from there.
    Everything(usize),
}

#[derive(Debug, Default)]
struct State {
    inodes: Vec<Inode>,
    durable_names: BTreeMap<String, usize>,
    names: BTreeMap<String, usize>,
    pending_names: Vec<NameChange>,
    fault: Option<Fault>,
    /// Bytes of all files together; writes beyond are refused.
    room: Option<usize>,
    /// Set room aside at once, or only when it is written to.
    lazy: bool,
    /// Most bytes that one write takes.
    shortest: Option<usize>,
    /// Syncs nothing, and says that it has.
    lies: bool,
    operations: usize,
}

/// The disk; clones are the same one.
#[derive(Debug, Clone, Default)]
pub(super) struct SimulatedDisk(Arc<Mutex<State>>, Arc<Mutex<()>>);

/// An open file.
#[derive(Debug)]
pub(super) struct SimulatedFile {
    disk: SimulatedDisk,
    inode: usize,
}

fn eio() -> io::Error {
    io::Error::from_raw_os_error(5)
}

fn enospc() -> io::Error {
    io::Error::from_raw_os_error(28)
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Resize(length) => bytes.resize(*length, 0),
        Change::Write(offset, written) => {
            let end = offset + written.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[*offset..end].copy_from_slice(written);
        }
    }
}

impl State {
    /// Counts an operation that changes something; true when it must fail.
    fn fails(&mut self, is_sync: bool, is_write: bool) -> bool {
        self.operations += 1;
        let (left, next) = match self.fault {
            Some(Fault::Everything(left)) => (left, Some(Fault::Everything(left.saturating_sub(1)))),
            Some(Fault::Any(left)) => (left, left.checked_sub(1).map(Fault::Any)),
            Some(Fault::Sync(left)) if is_sync => (left, left.checked_sub(1).map(Fault::Sync)),
            Some(Fault::SyncWithoutRoom(left, dies)) if is_sync => {
                let next = left.checked_sub(1).map(|left| Fault::SyncWithoutRoom(left, dies));
                (left, next.or(Some(Fault::Everything(dies))))
            }
            Some(Fault::Write(left)) if is_write => (left, left.checked_sub(1).map(Fault::Write)),
            Some(Fault::InterruptedWrite(left)) if is_write => (left, left.checked_sub(1).map(Fault::InterruptedWrite)),
            _ => return false,
        };
        self.fault = next;
        left == 0
    }

    fn used(&self) -> usize {
        // A lazy file system gives room when something is written, and to what was set aside as ballast.
        let size = |(name, inode): (&String, &usize)| {
            let bytes = &self.inodes[*inode].cached;
            let is_sparse = self.lazy && name != BALLAST;
            if is_sparse { bytes.iter().filter(|byte| **byte != 0).count() } else { bytes.len() }
        };
        self.names.iter().map(size).sum()
    }
}

impl SimulatedDisk {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// A disk with these files, all synced.
    pub(super) fn with_files(files: impl IntoIterator<Item = (String, Vec<u8>)>) -> Self {
        let disk = Self::default();
        {
            let mut state = disk.state();
            for (number, (name, bytes)) in files.into_iter().enumerate() {
                state.inodes.push(Inode { durable: bytes.clone(), cached: bytes, pending: Vec::new() });
                state.names.insert(name.clone(), number);
                state.durable_names.insert(name, number);
            }
        }
        disk
    }

    pub(super) fn set_fault(&self, fault: Fault) {
        self.state().fault = Some(fault);
    }

    pub(super) fn set_lies(&self, lies: bool) {
        self.state().lies = lies;
    }

    pub(super) fn set_room(&self, room: Option<usize>, lazy: bool) {
        let mut state = self.state();
        (state.room, state.lazy) = (room, lazy);
    }

    pub(super) fn set_shortest(&self, bytes: usize) {
        self.state().shortest = Some(bytes);
    }

    /// Lets every sync hang until the guard is dropped.
    pub(super) fn hold(&self) -> MutexGuard<'_, ()> {
        self.1.lock().unwrap()
    }

    pub(super) fn used(&self) -> usize {
        self.state().used()
    }

    pub(super) fn operations(&self) -> usize {
        self.state().operations
    }

    /// What the next process finds when only this one has died.
    pub(super) fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let state = self.state();
        state.names.iter().map(|(name, inode)| (name.clone(), state.inodes[*inode].cached.clone())).collect()
    }

    /// The same files on a disk without faults, and still with what is not synced.
    pub(super) fn after_process_crash(&self) -> Self {
        let state = self.state();
        let left = State {
            inodes: state.inodes.clone(),
            durable_names: state.durable_names.clone(),
            names: state.names.clone(),
            pending_names: state.pending_names.clone(),
            ..State::default()
        };
        Self(Arc::new(Mutex::new(left)), Arc::default())
    }

    /// What is left when the power fails: of what was not synced, `keeps` decides each change, and how much of a write.
    pub(super) fn after_power_cut(&self, mut keeps: impl FnMut(usize) -> usize) -> Self {
        let state = self.state();
        let mut names = state.durable_names.clone();
        for change in &state.pending_names {
            if keeps(2) == 1 {
                match change {
                    NameChange::Link(name, inode) => drop(names.insert(name.clone(), *inode)),
                    NameChange::Unlink(name) => drop(names.remove(name)),
                }
            }
        }
        let mut contents = |inode: &Inode| {
            let mut bytes = inode.durable.clone();
            for change in &inode.pending {
                match change {
                    Change::Resize(_) if keeps(2) == 1 => apply(&mut bytes, change),
                    Change::Resize(_) => {}
                    Change::Write(offset, written) => {
                        // Any part of it from any byte on.
                        let from = keeps(written.len() + 1);
                        let to = from + keeps(written.len() + 1 - from);
                        apply(&mut bytes, &Change::Write(offset + from, written[from..to].to_vec()));
                    }
                }
            }
            bytes
        };
        Self::with_files(names.iter().map(|(name, inode)| (name.clone(), contents(&state.inodes[*inode]))))
    }
}

impl Disk for SimulatedDisk {
    type File = SimulatedFile;

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.state().names.keys().cloned().collect())
    }

    fn create(&self, name: &str, bytes: u64) -> io::Result<SimulatedFile> {
        let bytes = usize::try_from(bytes).unwrap();
        let mut state = self.state();
        if state.fails(false, false) {
            return Err(eio());
        }
        state.names.remove(name);
        let full = !state.lazy && state.room.is_some_and(|room| state.used() + bytes > room);
        let size = if full { 0 } else { bytes };
        let inode = state.inodes.len();
        state.inodes.push(Inode { durable: Vec::new(), cached: vec![0; size], pending: vec![Change::Resize(size)] });
        state.names.insert(name.to_owned(), inode);
        state.pending_names.push(NameChange::Link(name.to_owned(), inode));
        if full { Err(enospc()) } else { Ok(SimulatedFile { disk: self.clone(), inode }) }
    }

    fn open(&self, name: &str) -> io::Result<SimulatedFile> {
        let inode = *self.state().names.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(SimulatedFile { disk: self.clone(), inode })
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.state();
        if state.fails(false, false) {
            return Err(eio());
        }
        let inode = state.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        state.names.insert(to.to_owned(), inode);
        state.pending_names.push(NameChange::Link(to.to_owned(), inode));
        state.pending_names.push(NameChange::Unlink(from.to_owned()));
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut state = self.state();
        if state.fails(false, false) {
            return Err(eio());
        }
        state.names.remove(name).ok_or(io::ErrorKind::NotFound)?;
        state.pending_names.push(NameChange::Unlink(name.to_owned()));
        Ok(())
    }

    fn sync_names(&self) -> io::Result<()> {
        let mut state = self.state();
        if state.fails(false, false) {
            return Err(eio());
        }
        state.durable_names = state.names.clone();
        state.pending_names.clear();
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from("simulated").join(name)
    }
}

impl DiskFile for SimulatedFile {
    fn read(&self) -> io::Result<Vec<u8>> {
        Ok(self.disk.state().inodes[self.inode].cached.clone())
    }

    fn read_at(&self, offset: u64, bytes: usize) -> io::Result<Vec<u8>> {
        let offset = usize::try_from(offset).unwrap();
        let state = self.disk.state();
        let found = state.inodes[self.inode].cached.get(offset..offset + bytes);
        Ok(found.ok_or(io::ErrorKind::UnexpectedEof)?.to_vec())
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<usize> {
        let offset = usize::try_from(offset).unwrap();
        let mut state = self.disk.state();
        let is_interrupted = matches!(state.fault, Some(Fault::InterruptedWrite(_)));
        if state.fails(false, true) {
            return Err(if is_interrupted { io::ErrorKind::Interrupted.into() } else { eio() });
        }
        let mut length = state.shortest.unwrap_or(bytes.len()).min(bytes.len());
        if state.lazy
            && let Some(room) = state.room
        {
            // What fits is written before the rest is refused.
            length = length.min(room.saturating_sub(state.used()));
            if length == 0 {
                return Err(enospc());
            }
        }
        let change = Change::Write(offset, bytes[..length].to_vec());
        let inode = &mut state.inodes[self.inode];
        apply(&mut inode.cached, &change);
        inode.pending.push(change);
        Ok(length)
    }

    fn sync(&self) -> io::Result<()> {
        drop(self.disk.1.lock().unwrap());
        let mut state = self.disk.state();
        let is_dead = matches!(state.fault, Some(Fault::Everything(_)));
        let error = if matches!(state.fault, Some(Fault::SyncWithoutRoom(..))) { enospc() } else { eio() };
        let failed = state.fails(true, false);
        if state.lies && !failed {
            return Ok(());
        }
        let inode = &mut state.inodes[self.inode];
        if failed {
            // As Linux does it: what could not be written counts as written from here on. A process that is dead has not
            // asked for it, so that what it had written is still on its way.
            if !is_dead {
                inode.pending.clear();
            }
            return Err(error);
        }
        let pending = std::mem::take(&mut inode.pending);
        pending.iter().for_each(|change| apply(&mut inode.durable, change));
        Ok(())
    }
}
