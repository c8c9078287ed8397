//! Which thread a tool use belongs to. A session begins with one thread of its own, and its tool uses name none; those of
//! other agents name theirs.

use std::collections::HashSet;

use crate::connector::claude::wire::{Event, ToolUse};

/// The threads of one session, as far as its events have named them.
#[derive(Debug, Default)]
pub(super) struct Threads {
    /// The session's own: the first one that does something.
    own: Option<String>,
    /// Those of other agents.
    others: HashSet<String>,
    ended: HashSet<String>,
}

impl Threads {
    /// Takes note of the thread that an event names.
    pub(super) fn learn(&mut self, event: &Event) {
        match event {
            Event::ThreadCreated { thread_id } => self.is_other(thread_id),
            Event::Use(ToolUse { thread_id: Some(thread_id), .. }) if self.own.as_ref() != Some(thread_id) => {
                self.is_other(thread_id);
            }
            Event::ThreadSeen { thread_id } | Event::ThreadEnded { thread_id }
                if self.own.is_none() && !self.others.contains(thread_id) =>
            {
                self.own = Some(thread_id.clone());
            }
            _ => {}
        }
    }

    fn is_other(&mut self, thread_id: &str) {
        if !self.others.contains(thread_id) {
            self.others.insert(thread_id.to_owned());
        }
    }

    pub(super) fn end(&mut self, thread_id: &str) {
        self.ended.insert(thread_id.to_owned());
    }

    /// Whether the thread of a tool use has ended.
    pub(super) fn has_ended(&self, tool_use: &ToolUse) -> bool {
        self.of(tool_use).is_some_and(|thread_id| self.ended.contains(thread_id))
    }

    /// Whether what is said of a thread, or of all of them, concerns a tool use.
    pub(super) fn concerns(&self, thread_id: Option<&str>, tool_use: &ToolUse) -> bool {
        thread_id.is_none_or(|thread_id| self.of(tool_use) == Some(thread_id))
    }

    /// `None` while the session's own thread has no name yet.
    pub(super) fn of<'t>(&'t self, tool_use: &'t ToolUse) -> Option<&'t str> {
        tool_use.thread_id.as_deref().or(self.own.as_deref())
    }

    /// Names that are remembered.
    pub(super) fn len(&self) -> usize {
        self.others.len() + self.ended.len()
    }
}
