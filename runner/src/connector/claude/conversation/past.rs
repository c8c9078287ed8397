//! What the history of a session says of it, before anything is concluded from its stream.

use std::collections::HashSet;

use super::{Conversation, runs_here};
use crate::connector::claude::wire::{Event, Permission, ToolUse};

impl Conversation {
    /// The whole history is there: what is in it and has no answer is routed, and then what has come meanwhile.
    pub(in crate::connector::claude) fn reconcile(&mut self, now: u64, history: Vec<Event>) {
        let was_idle_since = self.was_idle_since.take();
        let is_old = self.buffered.is_empty() && history.len() == self.known_events;
        self.known_events = history.len();
        self.learn(&history);
        let mut open: Vec<(ToolUse, bool)> = Vec::new();
        let mut opened: HashSet<String> = HashSet::new();
        (self.turn_ended, self.rests) = (false, false);
        for event in history {
            self.follow(&event);
            match event {
                Event::Use(tool_use) if !self.answered.contains(&tool_use.id) && opened.insert(tool_use.id.clone()) => {
                    open.push((tool_use, false));
                }
                // It concerns what was asked for before it.
                Event::Interrupt { thread_id } => {
                    for (tool_use, interrupted) in &mut open {
                        *interrupted |= self.threads.concerns(thread_id.as_deref(), tool_use);
                    }
                }
                Event::Ended => self.ended = true,
                _ => {}
            }
        }
        for (tool_use, interrupted) in open {
            self.route(tool_use, interrupted);
        }
        self.reconciled = true;
        for event in std::mem::take(&mut self.buffered) {
            self.take(event);
        }
        self.idle_since = was_idle_since.filter(|_| is_old);
        self.settle(now);
    }

    /// Whether the turn has ended, and whether the session is at work, after an event.
    pub(super) fn follow(&mut self, event: &Event) {
        match event {
            Event::Idle { ends_turn } => (self.turn_ended, self.rests) = (*ends_turn, true),
            Event::Verdict { .. } | Event::ThreadEnded { .. } | Event::Ended => {}
            Event::Answered { .. } => self.turn_ended = false,
            _ => (self.turn_ended, self.rests) = (false, false),
        }
    }

    /// What the history says regardless of order.
    fn learn(&mut self, history: &[Event]) {
        for event in history {
            self.threads.learn(event);
            match event {
                Event::Answered { tool_use_id } => self.answer(tool_use_id),
                Event::Verdict { tool_use_id, allow } => self.verdict(tool_use_id, *allow),
                Event::ThreadEnded { thread_id } => self.end_thread(thread_id),
                _ => {}
            }
        }
        self.has_run |= self.has_run_in(history);
    }

    /// Whether a call that was allowed has been answered. The server answers for those that were denied.
    fn has_run_in(&self, history: &[Event]) -> bool {
        let answers: HashSet<&str> = history
            .iter()
            .filter_map(|event| match event {
                Event::Answered { tool_use_id } => Some(tool_use_id.as_str()),
                _ => None,
            })
            .collect();
        let is_allowed = |tool_use: &ToolUse| match self.verdicts.get(&tool_use.id) {
            Some(allow) => *allow && tool_use.permission != Permission::Denied,
            None => tool_use.permission == Permission::Allowed,
        };
        history.iter().any(|event| match event {
            Event::Use(tool_use) => {
                runs_here(tool_use) && is_allowed(tool_use) && answers.contains(tool_use.id.as_str())
            }
            _ => false,
        })
    }
}
