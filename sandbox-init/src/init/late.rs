//! Output that arrives after its call is over: background processes keep the pipes of the call that started them.
//!
//! Their bytes never reach a newer call. They are kept in a file of the old call, up to a limit, and read on for as long as
//! somebody can write, because a full pipe would stop a server that logs, and a closed one would kill it.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use super::event::Key;
use super::pipe::{Drained, READ_BUDGET, drain};
use super::spool::{SpoolDirectory, SpoolFile};

/// Pipes that are read on; beyond it the oldest is closed.
const PIPES_LIMIT: usize = 64;
/// Bytes kept per pipe; further ones are dropped.
const BYTES_LIMIT: u64 = 1024 * 1024;

/// The pipes of finished calls.
#[derive(Debug, Default)]
pub(crate) struct LateOutput {
    pipes: BTreeMap<(Key, u8), LatePipe>,
}

#[derive(Debug)]
struct LatePipe {
    call_id: String,
    reader: OwnedFd,
    file: Option<SpoolFile>,
    /// The file cannot be made or written any more.
    deaf: bool,
}

impl LateOutput {
    /// Reads on from a pipe that is watched already.
    pub(crate) fn add(&mut self, key: Key, index: u8, call_id: &str, reader: OwnedFd, spool: &mut SpoolDirectory) {
        if self.pipes.len() >= PIPES_LIMIT
            && let Some((_, oldest)) = self.pipes.pop_first()
        {
            oldest.close(spool);
        }
        let pipe = LatePipe { call_id: call_id.to_owned(), reader, file: None, deaf: false };
        self.pipes.insert((key, index), pipe);
    }

    /// The name of the file in which late output of this pipe is kept.
    pub(crate) fn suffix(index: u8) -> &'static str {
        if index == 0 { "late" } else { "late-stderr" }
    }

    /// Whether this pipe is read on.
    pub(crate) fn is_open(&self, key: Key, index: u8) -> bool {
        self.pipes.contains_key(&(key, index))
    }

    /// A late pipe can be read.
    pub(crate) fn read(&mut self, key: Key, index: u8, buffer: &mut [u8], spool: &mut SpoolDirectory) {
        let Some(pipe) = self.pipes.get_mut(&(key, index)) else { return };
        let LatePipe { call_id, reader, file, deaf } = pipe;
        let end = drain(reader, buffer, READ_BUDGET, |bytes| {
            if *deaf {
                return;
            }
            if file.is_none() {
                *file = spool.create(call_id, Self::suffix(index)).ok();
            }
            let Some(file) = file else {
                *deaf = true;
                return;
            };
            let room = usize::try_from(BYTES_LIMIT.saturating_sub(file.length())).unwrap_or(0).min(bytes.len());
            let kept = bytes.get(..room).unwrap_or_default();
            *deaf = spool.append(file, kept).is_err() || room < bytes.len();
        });
        if end == Drained::Closed
            && let Some(pipe) = self.pipes.remove(&(key, index))
        {
            pipe.close(spool);
        }
    }
}

impl LatePipe {
    fn close(self, spool: &mut SpoolDirectory) {
        if let Some(file) = self.file {
            spool.retire(file);
        }
    }
}
