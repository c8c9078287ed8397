//! The history of a session while its pages come. All of it counts, and what it takes is bounded: an input is kept only until
//! its answer is read.

use std::collections::HashMap;

use super::wire::Event;

/// Events of one session's history.
pub(super) const MOST_HISTORY: usize = 200_000;
/// Inputs that have no answer yet.
const MOST_OPEN_BYTES: usize = 64 * 1024 * 1024;

/// It is larger than this runner keeps.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooLong;

#[derive(Debug, Default)]
pub(super) struct History {
    events: Vec<Event>,
    /// Where the tool uses are that have no answer yet.
    open: HashMap<String, usize>,
    open_bytes: usize,
}

impl History {
    /// Takes the next page.
    pub(super) fn add(&mut self, page: Vec<Event>) -> Result<(), TooLong> {
        for event in page {
            match &event {
                Event::Use(tool_use) => {
                    self.open_bytes += tool_use.kept_bytes();
                    self.open.insert(tool_use.id.clone(), self.events.len());
                }
                Event::Answered { tool_use_id } => self.answered(tool_use_id),
                _ => {}
            }
            self.events.push(event);
            if self.events.len() > MOST_HISTORY || self.open_bytes > MOST_OPEN_BYTES {
                return Err(TooLong);
            }
        }
        Ok(())
    }

    fn answered(&mut self, tool_use_id: &str) {
        let place = self.open.remove(tool_use_id);
        if let Some(Event::Use(tool_use)) = place.and_then(|place| self.events.get_mut(place)) {
            self.open_bytes = self.open_bytes.saturating_sub(tool_use.kept_bytes());
            tool_use.input = serde_json::Value::Null;
        }
    }

    /// All of it.
    pub(super) fn take(&mut self) -> Vec<Event> {
        std::mem::take(self).events
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::connector::claude::wire;

    fn tool_use(number: usize) -> Event {
        let input = json!({"content": "x".repeat(1024 * 1024)});
        wire::event(json!({"type": "agent.tool_use", "id": format!("t{number}"), "name": "write", "input": input}))
    }

    fn answer(number: usize) -> Event {
        wire::event(json!({"type": "user.tool_result", "tool_use_id": format!("t{number}")}))
    }

    #[test]
    fn inputs_are_kept_only_until_their_answer_and_only_so_many() {
        let mut history = History::default();
        for number in 0..200 {
            assert_eq!(history.add(vec![tool_use(number), answer(number)]), Ok(()));
        }
        let inputs = history.take().into_iter().filter(|event| matches!(event, Event::Use(u) if !u.input.is_null()));
        assert_eq!(inputs.count(), 0);
        let taken = (0..100).take_while(|number| history.add(vec![tool_use(*number)]).is_ok()).count();
        assert_eq!(taken, 63, "64 of them and what stands around the text are more than 64 MiB");
    }

    #[test]
    fn history_of_too_many_events_is_given_up() {
        let mut history = History::default();
        assert_eq!(history.add(vec![Event::Other; MOST_HISTORY]), Ok(()));
        assert_eq!(history.add(vec![Event::Other]), Err(TooLong));
    }
}
