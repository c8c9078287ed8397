//! Whose turn it is: all tool uses one after the other, in the order in which they came, as with the official worker; or those of
//! different threads beside each other, except that commands run one at a time. All threads of a session share its shell, as
//! they do with the official worker: a directory that one of them changes to is where the next command begins.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::threads::Threads;
use super::{Pending, Stage};

/// Tool uses of one session that are handed on at once.
pub(in crate::connector::claude) const MOST_RUNNING: u16 = 16;

/// Those that wait for their turn, in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Turns {
    order: VecDeque<String>,
    /// Threads do not wait for each other.
    parallel: bool,
}

impl Turns {
    pub(super) fn set_parallel(&mut self, parallel: bool) {
        self.parallel = parallel;
    }

    pub(super) fn push(&mut self, id: String) {
        self.order.push_back(id);
    }

    pub(super) fn remove(&mut self, id: &str) {
        self.order.retain(|turn| turn != id);
    }

    /// All that wait.
    pub(super) fn take_all(&mut self) -> Vec<String> {
        self.order.drain(..).collect()
    }

    /// The next one that may be handed on.
    pub(super) fn next(&mut self, pending: &BTreeMap<String, Pending>, threads: &Threads) -> Option<String> {
        let place = self.place(pending, threads)?;
        self.order.remove(place)
    }

    fn place(&self, pending: &BTreeMap<String, Pending>, threads: &Threads) -> Option<usize> {
        // What was interrupted does not begin, so it waits for nobody.
        let interrupted = |id: &String| pending.get(id).is_none_or(|pending| pending.interrupted);
        if let Some(place) = self.order.iter().position(interrupted) {
            return Some(place);
        }
        let running: Vec<_> = pending.values().filter(|pending| pending.stage == Stage::Running).collect();
        let most = if self.parallel { usize::from(MOST_RUNNING) } else { 1 };
        if running.len() >= most {
            return None;
        }
        let shell_is_taken = running.iter().any(|pending| pending.tool_use.is_command());
        let mut busy: BTreeSet<Option<&str>> = running.iter().map(|pending| threads.of(&pending.tool_use)).collect();
        self.order.iter().position(|id| {
            let Some(Pending { tool_use, .. }) = pending.get(id) else { return true };
            let is_free = !busy.contains(&threads.of(tool_use));
            // What comes behind it in its thread waits for it.
            busy.insert(threads.of(tool_use));
            is_free && !(shell_is_taken && tool_use.is_command())
        })
    }
}
