//! The state machine of one environment: event in, actions out. It knows no clock, no socket and no runtime.
//!
//! Towards the server it is a worker: it polls while there is room, acknowledges, beats, serves and stops work items. Towards
//! the sessions of this runner it is what an orchestrator is: it opens sessions, sends calls, takes results and acknowledges
//! them when the server has them. The lease of a work item is the lease of its session, so nothing begins that is not ours to
//! begin, and what has begun once is found again by its id.

mod calls;
mod claimed;
mod item;
mod poll;
mod sessions;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::board::Happening;
use super::content;
use super::handover::{Handover, Held};
use super::http::Failure;
use super::lease::SECOND;
use super::wire::{Beat, Delivery, Page};
use crate::work::{CallId, CallResult, IdError, RESERVED_PREFIX, SessionId, Update, WorkItem};
use calls::Known;
use item::Item;
use poll::Poll;
use sessions::Kept;

/// From the order to end until what still runs is ended. With what follows (answers, sandboxes, giving back) it stays below 45 s,
/// as the official worker does.
const ENDING_PATIENCE: u64 = 20 * SECOND;

/// What of the configuration counts here.
#[derive(Debug, Clone)]
pub(super) struct Rules {
    pub(super) environment_id: String,
    /// Work items at once.
    pub(super) max_items: usize,
    /// Sessions at once in this runner, whoever has placed them.
    pub(super) max_sessions: usize,
    /// From the end of a turn until the item is given back; `None`: never.
    pub(super) max_idle: Option<Duration>,
    /// How long an item is held whose session waits for somebody else; `None`: for ever.
    pub(super) max_wait: Option<Duration>,
    /// Tool uses of different threads of a session run beside each other.
    pub(super) parallel_threads: bool,
    /// How long the sandbox of a session is kept after its item.
    pub(super) keep: Duration,
    /// Longest time that a command may ask for.
    pub(super) longest_command: Duration,
}

/// What of the rest of the runner counts here.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Room {
    /// Sessions of the orchestrator, and work items of other queues.
    pub(super) others: usize,
    /// The host is short of something.
    pub(super) closed: bool,
}

/// How the connector is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Finish {
    /// When results are posted.
    Patient,
    /// With what has been posted.
    AtOnce,
}

/// What an answer to a tool use is made of.
#[derive(Debug, Clone)]
pub(super) enum Answer {
    /// The result of a call. With `is_new` it is the first one of a sandbox that has nothing of what the session did before.
    Result { call_id: CallId, result: Arc<CallResult>, interrupted: bool, is_new: bool },
    /// A text of ours about a call that did not run.
    Text(String),
}

/// Everything that can happen.
#[derive(Debug)]
pub(super) enum Event {
    /// Time has passed.
    Tick,
    /// The sessions say something.
    Update(Update),
    /// `Action::Poll` is done.
    Polled(Result<Option<Delivery>, Failure>),
    /// `Action::Ack` is done.
    Acked { work_id: String, result: Result<(), Failure> },
    /// `Action::Beat` is done; it was sent at `sent`.
    Beaten { work_id: String, sent: u64, result: Result<Beat, Failure> },
    /// `Action::Fetch` is done: whether the session is over.
    Fetched { work_id: String, result: Result<bool, Failure> },
    /// The stream of `Action::Stream` is open.
    Connected { work_id: String, link: u64 },
    /// It has brought an event.
    Live { work_id: String, link: u64, event: super::wire::Event },
    /// It is over, or could not be opened.
    Disconnected { work_id: String, link: u64, failure: Option<Failure> },
    /// `Action::List` is done.
    Listed { work_id: String, link: u64, result: Result<Page, Failure> },
    /// `Action::Post` is done.
    Posted { work_id: String, tool_use_id: String, result: Result<(), Failure> },
    /// `Action::Stop` is done.
    Stopped { work_id: String, result: Result<(), Failure> },
    /// Another key is in use.
    KeyReplaced,
    /// The process was told to end: take no more, and go on with what runs for a little.
    Ending,
    /// Take no more, and end.
    Finish(Finish),
}

/// Everything that can be asked for. What concerns a work item ends with [`Action::Forget`].
#[derive(Debug, Clone)]
pub(super) enum Action {
    Poll,
    /// Take note of a delivery, its credential above all, and acknowledge it.
    Ack(Delivery),
    /// Take note of an item that an earlier runner has served: its credential is the environment's key.
    TakeUp {
        work_id: String,
    },
    /// Take note of a delivery that somebody else has acknowledged.
    Take(Delivery),
    /// Acknowledge it again.
    AckAgain {
        work_id: String,
    },
    Beat {
        work_id: String,
        expected: String,
        within: Duration,
    },
    Fetch {
        work_id: String,
        session_id: String,
    },
    Stream {
        work_id: String,
        session_id: String,
        link: u64,
    },
    /// Close the stream.
    Unstream {
        work_id: String,
    },
    List {
        work_id: String,
        session_id: String,
        link: u64,
        page: Option<String>,
    },
    Post {
        work_id: String,
        session_id: String,
        tool_use_id: String,
        answer: Answer,
    },
    Stop {
        work_id: String,
    },
    /// Give up everything that is under way for an item, and its credential.
    Forget {
        work_id: String,
    },
    /// For the sessions of this runner.
    Work(WorkItem),
    /// Count it.
    Count(Happening),
}

/// One environment.
#[derive(Debug)]
pub(super) struct Machine {
    rules: Rules,
    draw: fn() -> f64,
    now: u64,
    /// A session has just found no place, and there was nothing here to end for it.
    is_room_wanted: bool,
    room: Room,
    poll: Poll,
    /// What an earlier runner has left is known.
    restored: bool,
    draining: bool,
    finish: Option<Finish>,
    /// The process was told to end: when what still runs is ended.
    ends_at: Option<u64>,
    /// The one item that is served, until it is taken.
    claimed: Option<Delivery>,
    /// Nothing but that item is served.
    is_single: bool,
    items: BTreeMap<String, Item>,
    sessions: BTreeMap<SessionId, Kept>,
    calls: BTreeMap<CallId, Known>,
    /// What an earlier runner has left, until that can be taken up.
    left: Vec<Held>,
    /// Calls that have run and whose results are gone.
    dropped: VecDeque<CallId>,
    /// Counts what the next runner must be told.
    changes: u64,
    actions: Vec<Action>,
}

impl Machine {
    /// `draw` is random in 0..=1; `handover` is what an earlier runner has left.
    pub(super) fn new(rules: Rules, draw: fn() -> f64, handover: Handover) -> Self {
        let dropped = handover.dropped.iter().filter_map(|id| CallId::new(id).ok()).collect();
        Self {
            rules,
            draw,
            now: 0,
            is_room_wanted: false,
            room: Room::default(),
            poll: Poll::default(),
            restored: false,
            draining: false,
            finish: None,
            ends_at: None,
            claimed: None,
            is_single: false,
            items: BTreeMap::new(),
            sessions: BTreeMap::new(),
            calls: BTreeMap::new(),
            left: handover.leases,
            dropped,
            changes: 0,
            actions: Vec::new(),
        }
    }

    /// Whether a session of this queue has just found no place, and nothing to end for it here.
    pub(super) fn wants_room(&mut self) -> bool {
        std::mem::take(&mut self.is_room_wanted)
    }

    /// How much room there is for new sessions.
    pub(super) fn set_room(&mut self, room: Room) {
        self.room = room;
    }

    /// Takes one event at `now` and returns what must be done, in this order.
    pub(super) fn handle(&mut self, now: u64, event: Event) -> Vec<Action> {
        self.now = self.now.max(now);
        match event {
            Event::Tick => {}
            Event::Update(update) => self.update(update),
            Event::Polled(result) => self.polled(result),
            Event::Acked { work_id, result } => self.acked(&work_id, result),
            Event::Beaten { work_id, sent, result } => self.beaten(&work_id, sent, result),
            Event::Fetched { work_id, result } => self.fetched(&work_id, result),
            Event::Connected { work_id, link } => self.connected(&work_id, link),
            Event::Live { work_id, link, event } => self.live(&work_id, link, event),
            Event::Disconnected { work_id, link, failure } => self.disconnected(&work_id, link, failure.as_ref()),
            Event::Listed { work_id, link, result } => self.listed(&work_id, link, result),
            Event::Posted { work_id, tool_use_id, result } => self.posted(&work_id, &tool_use_id, result),
            Event::Stopped { work_id, result } => self.stopped(&work_id, result),
            Event::KeyReplaced => self.key_replaced(),
            Event::Ending => {
                self.ends_at.get_or_insert(self.now.saturating_add(ENDING_PATIENCE));
            }
            Event::Finish(finish) => self.finish = self.finish.max(Some(finish)),
        }
        self.pass_time();
        std::mem::take(&mut self.actions)
    }

    /// Changes whenever [`Self::handover`] does.
    pub(super) fn changes(&self) -> u64 {
        self.changes
    }

    /// What the next runner needs to go on.
    pub(super) fn handover(&self) -> Handover {
        let leases = self.items.iter().filter_map(|(work_id, item)| item.held(work_id));
        let dropped = self.dropped.iter().map(CallId::to_string);
        // What was not taken up yet is left as it was.
        Handover { leases: leases.chain(self.left.iter().cloned()).collect(), dropped: dropped.collect() }
    }

    /// Goes on with the work items of an earlier runner whose leases may still be held: the first heartbeat tells.
    fn take_up(&mut self) {
        for held in std::mem::take(&mut self.left) {
            let Ok(core) = self.session_id(&held.session_id) else { continue };
            let work_id = held.work_id.clone();
            self.add_item(work_id.clone(), Item::left(held, core, self.now));
            self.actions.push(Action::TakeUp { work_id });
        }
    }

    /// Nothing more is taken: the process ends.
    fn takes_no_more(&self) -> bool {
        self.draining || self.ends_at.is_some() || self.finish.is_some()
    }

    /// What still runs is to be ended.
    fn must_end(&self) -> bool {
        self.finish.is_some() || self.ends_at.is_some_and(|at| self.now >= at)
    }

    fn add_item(&mut self, work_id: String, mut item: Item) {
        item.conversation.set_parallel(self.rules.parallel_threads);
        self.items.insert(work_id, item);
    }

    /// Work items that are ours, or about to be, and the one that is being asked for.
    pub(super) fn claims(&self) -> usize {
        self.items.len() + usize::from(self.poll.in_flight)
    }

    /// Nothing is left to do, and nothing will come.
    pub(super) fn is_done(&self) -> bool {
        let ends = self.finish.is_some() || (self.is_single && self.claimed.is_none());
        ends && self.items.is_empty()
    }

    /// When to look again, if nothing happens before.
    pub(super) fn wake(&self) -> u64 {
        let poll = self.may_poll().then_some(self.poll.next_at);
        let items = self.items.values().map(|item| item.wake(&self.rules));
        let ends = self.ends_at.filter(|_| self.items.values().any(Item::is_serving));
        let sessions = self.sessions.values().map(Kept::wake);
        poll.into_iter().chain(ends).chain(items).chain(sessions).min().unwrap_or(u64::MAX)
    }

    fn pass_time(&mut self) {
        self.take_claimed();
        let works: Vec<_> = self.items.keys().cloned().collect();
        for work_id in works {
            self.tend_item(&work_id);
        }
        self.tend_sessions();
        self.forget_old_results();
        if self.may_poll() && self.now >= self.poll.next_at {
            self.poll.in_flight = true;
            self.actions.push(Action::Poll);
        }
    }

    fn count(&mut self, happening: Happening) {
        self.actions.push(Action::Count(happening));
    }

    fn work(&mut self, item: WorkItem) {
        self.actions.push(Action::Work(item));
    }

    /// A time from now that is spread over `least` to `most` seconds.
    fn within(&self, least: f64, most: f64) -> u64 {
        let draw = (self.draw)().clamp(0.0, 1.0);
        self.now.saturating_add(nanoseconds(Duration::from_secs_f64(least + (most - least) * draw)))
    }

    /// The name of a session in this runner.
    fn session_id(&self, session_id: &str) -> Result<SessionId, IdError> {
        SessionId::new(scoped(&self.rules.environment_id, session_id))
    }

    /// The name of a tool use in this runner.
    fn call_id(&self, tool_use_id: &str) -> Result<CallId, IdError> {
        CallId::new(scoped(&self.rules.environment_id, tool_use_id))
    }
}

/// What begins every name that this environment gives.
pub(super) fn scope(environment_id: &str) -> String {
    format!("{RESERVED_PREFIX}{environment_id}:")
}

/// An id of the server as one of this runner: the ids of two servers may be alike. One that becomes too long is hashed, with a
/// dot before it, which no id of a server has.
fn scoped(environment_id: &str, id: &str) -> String {
    let name = format!("{}{id}", scope(environment_id));
    if name.len() <= 128 {
        return name;
    }
    let digest: String = Sha256::digest(id).iter().take(24).map(|byte| format!("{byte:02x}")).collect();
    format!("{}.{digest}", scope(environment_id))
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Doubled with each failure, up to `most` seconds.
fn doubled(failures: u32, first: f64, most: f64) -> f64 {
    (first * 2_f64.powi(i32::try_from(failures.min(20)).unwrap_or(20))).min(most)
}

impl Answer {
    /// A text that says that nothing was run.
    fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }

    fn interrupted() -> Self {
        Self::text(content::INTERRUPTED)
    }
}
