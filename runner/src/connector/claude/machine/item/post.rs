//! Answers to tool uses: posted until the server has them, for as long as a lease lasts.

use std::time::Duration;

use tracing::warn;

use crate::connector::claude::board::Happening;
use crate::connector::claude::machine::{Action, Answer, Failure, Machine, doubled, nanoseconds};

/// An answer that is to be posted.
#[derive(Debug)]
pub(super) struct Post {
    answer: Answer,
    since: u64,
    pub(super) next_at: u64,
    pub(super) in_flight: bool,
    tries: u32,
    /// It was refused as too large, and a text stands in its place.
    shortened: bool,
}

impl Machine {
    pub(in crate::connector::claude::machine) fn deliver(
        &mut self,
        work_id: &str,
        tool_use_id: String,
        answer: Answer,
    ) {
        let now = self.now;
        let Some(item) = self.items.get_mut(work_id) else { return };
        let post = Post { answer, since: now, next_at: now, in_flight: false, tries: 0, shortened: false };
        item.posts.insert(tool_use_id, post);
    }

    pub(in crate::connector::claude::machine) fn posted(
        &mut self,
        work_id: &str,
        tool_use_id: &str,
        result: Result<(), Failure>,
    ) {
        let now = self.now;
        let tries = self.items.get(work_id).and_then(|item| item.posts.get(tool_use_id)).map_or(0, |post| post.tries);
        let most = doubled(tries, 1.0, 30.0);
        let again_at = self.within(most / 2.0, most);
        let Some(item) = self.items.get_mut(work_id) else { return };
        let window = item.lease.ttl();
        let Some(post) = item.posts.get_mut(tool_use_id) else { return };
        post.in_flight = false;
        let failure = match result {
            Ok(()) => {
                let after = Duration::from_nanos(now.saturating_sub(post.since));
                item.posts.remove(tool_use_id);
                item.conversation.posted(now, tool_use_id);
                self.count(Happening::Posted { after });
                self.stored(tool_use_id);
                return self.carry_out(work_id);
            }
            Err(failure) => failure,
        };
        // An image that it does not take, for example. Without any answer the session would wait for ever.
        if matches!(failure.status(), Some(400 | 413 | 422)) && !post.shortened {
            let text = match failure.status() {
                Some(413) => "the result was refused by the control plane as too large; ask for less at once",
                _ => "the result was refused by the control plane; the call has run",
            };
            (post.answer, post.shortened, post.next_at) = (Answer::text(text), true, now);
            return;
        }
        post.tries += 1;
        if !failure.is_fatal() && now.saturating_sub(post.since) < window {
            let asked = nanoseconds(failure.retry_after().unwrap_or_default());
            post.next_at = again_at.max(now.saturating_add(asked.min(window / 2)));
            return;
        }
        warn!(work_id, tool_use_id, error = %failure, "a result could not be posted");
        item.posts.remove(tool_use_id);
        item.conversation.give_up(now, tool_use_id);
        self.count(Happening::NotPosted);
        self.carry_out(work_id);
    }

    /// Nobody waits for this answer any more.
    pub(in crate::connector::claude::machine) fn withdraw(&mut self, work_id: &str, tool_use_id: &str) {
        let now = self.now;
        let Some(post) = self.items.get_mut(work_id).and_then(|item| item.posts.remove(tool_use_id)) else { return };
        // The stream tells that the server has it before the answer to the request does.
        if post.in_flight {
            self.count(Happening::Posted { after: Duration::from_nanos(now.saturating_sub(post.since)) });
        }
    }

    /// Asks for the answers of an item that are due, while its lease is held.
    pub(super) fn tend_posts(&mut self, work_id: &str) {
        let now = self.now;
        let Some(item) = self.items.get_mut(work_id).filter(|item| item.is_leased()) else { return };
        for (tool_use_id, post) in item.posts.iter_mut().filter(|(_, post)| !post.in_flight && now >= post.next_at) {
            post.in_flight = true;
            let (tool_use_id, answer) = (tool_use_id.clone(), post.answer.clone());
            let (work_id, session_id) = (work_id.to_owned(), item.session_id.clone());
            self.actions.push(Action::Post { work_id, session_id, tool_use_id, answer });
        }
    }
}
