//! Privileged: holds the pidfds of sandboxes.
//!
//! A process 1 that this launcher is the parent of, or has adopted, and where it is in its life.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use proto::launch::v1 as wire;

use super::making::Waiting;
use crate::launcher::ids::Slot;
use crate::launcher::spawn::Blank;
use crate::launcher::state::{Record, has_ended};
use crate::sys::process::pidfd_signal;

/// What a process 1 is doing.
#[derive(Debug)]
pub(super) enum Phase {
    /// Waits for a request.
    Blank,
    /// Has its boot packet.
    Booting { waiting: Box<Waiting>, layers: Vec<wire::Layer> },
    /// Closed and ready.
    Ready { sandbox_id: String },
    /// Killed; waits for its end.
    Ending { sandbox_id: Option<String>, answer: Option<(u32, u64)> },
}

/// A process 1.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) name: String,
    pub(super) pid: i32,
    pub(super) pidfd: OwnedFd,
    pub(super) boot: Option<OwnedFd>,
    pub(super) blank: Option<Blank>,
    /// Its mounts, to be dissolved by the background process when it has ended; those of an adopted one end with it.
    pub(super) mounts: Option<OwnedFd>,
    pub(super) slot: Slot,
    pub(super) phase: Phase,
    pub(super) adopted: bool,
    pub(super) record: Option<Record>,
    pub(super) memory: Memory,
    /// The newest of those that the kernel has killed for memory in it, in their order.
    pub(super) killed: VecDeque<Killed>,
}

/// A process that the kernel has killed for memory.
#[derive(Clone, Debug)]
pub(super) struct Killed {
    /// Its pid on the host.
    pub(super) pid: u32,
    /// What is told of it.
    pub(super) told: wire::MemoryKill,
}

/// What was asked of the kernel for the memory of a workload that stands still.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Memory {
    /// Nothing.
    #[default]
    Kept,
    /// The background process asks for it.
    Asked,
    /// This came of it.
    Reclaimed(wire::Reclaim),
}

impl Process {
    /// Its id, once it is ready and until it is to end.
    pub(super) fn sandbox_id(&self) -> Option<&str> {
        match &self.phase {
            Phase::Ready { sandbox_id } => Some(sandbox_id),
            Phase::Blank | Phase::Booting { .. } | Phase::Ending { .. } => None,
        }
    }
}

/// A process 1 whose end no event will tell. It is killed, and whether it is gone is tried again and again.
#[derive(Debug)]
pub(super) struct Unwatched {
    pub(super) name: String,
    pub(super) slot: Slot,
    /// Of a child, which nobody else reaps, so that the number stays its own until it is gone.
    pub(super) pid: i32,
    pub(super) pidfd: Option<OwnedFd>,
}

impl Unwatched {
    fn id(&self) -> Id<'_> {
        match &self.pidfd {
            Some(pidfd) => Id::PIDFd(pidfd.as_fd()),
            None => Id::Pid(Pid::from_raw(self.pid)),
        }
    }

    pub(super) fn kill(&self) {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG | WaitPidFlag::WNOWAIT;
        if let Some(pidfd) = &self.pidfd {
            let _ = pidfd_signal(pidfd.as_fd(), libc::SIGKILL);
        } else if waitid(self.id(), flags) == Ok(WaitStatus::StillAlive) {
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        }
    }

    /// Reaps it if it is a child of ours.
    pub(super) fn is_gone(&self) -> bool {
        match waitid(self.id(), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG) {
            Ok(WaitStatus::StillAlive) => false,
            // An earlier launcher was its parent.
            Err(Errno::ECHILD) => self.pidfd.as_ref().is_none_or(has_ended),
            _ => true,
        }
    }
}
