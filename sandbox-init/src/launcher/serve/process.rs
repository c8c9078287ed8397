//! Privileged: holds the pidfds of sandboxes.
//!
//! A process 1 that this launcher is the parent of, or has adopted, and where it is in its life.

use std::os::fd::OwnedFd;

use proto::launch::v1 as wire;

use super::making::Waiting;
use crate::launcher::ids::Slot;
use crate::launcher::spawn::Blank;
use crate::launcher::state::Record;

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
    pub(super) slot: Slot,
    pub(super) phase: Phase,
    pub(super) adopted: bool,
    pub(super) record: Option<Record>,
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
