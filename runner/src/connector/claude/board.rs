//! How the queue of one environment stands: its work items, what has happened how often, and what keeps it from being served.
//!
//! The loop of the environment writes it after each step; `ps`, `status` and whoever waits for one item read it. It holds no
//! credential and nothing of what tools were given or have answered.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::telemetry::Counters;

/// Stages of a work item, in the order in which it goes through them.
pub(super) const STAGES: [&str; 5] = ["acknowledging", "claimed", "serving", "ending", "stopping"];

/// Why a work item has ended here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The turn is over, and nothing has come for long enough.
    Idle,
    /// Somebody else, who was waited for, has not answered for long enough.
    Waited,
    /// The session is over for good.
    SessionOver,
    /// The server takes it back.
    Stopping,
    /// The server refuses this runner.
    Refused,
    /// This runner ends.
    Shutdown,
    /// Somebody else may hold it.
    LeaseLost,
    /// It could not be acknowledged.
    NotClaimed,
    /// It asks for nothing that this runner knows.
    Nothing,
}

impl Reason {
    /// As a label of a metric.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Waited => "waited",
            Self::SessionOver => "session_over",
            Self::Stopping => "stopping",
            Self::Refused => "refused",
            Self::Shutdown => "shutdown",
            Self::LeaseLost => "lease_lost",
            Self::NotClaimed => "not_claimed",
            Self::Nothing => "nothing",
        }
    }
}

/// A work item as people see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ItemView {
    /// As the server names it.
    pub work_id: String,
    /// The session that it asks to serve; empty for an item that asks for nothing.
    pub session_id: String,
    /// That session as this runner names it.
    pub core: String,
    /// acknowledging, claimed, serving, ending or stopping.
    pub stage: &'static str,
    /// Until when its lease can be counted on, by the clock of leases.
    pub lease_until: u64,
}

/// Something that is counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Happening {
    /// The queue was asked: `item`, `empty`, `failed` or `refused`, and what an operator should know of a refusal or failure.
    Polled { result: &'static str, problem: String },
    /// An item was acknowledged so long after it was delivered.
    Acknowledged { after: Duration },
    /// An acknowledgement failed.
    NotAcknowledged,
    /// A lease was renewed so long before its end.
    Renewed { margin: Duration },
    /// A result was taken by the server so long after it was there.
    Posted { after: Duration },
    /// A result was given up.
    NotPosted,
    /// A stream brought more than is kept while a history is read, and is made again.
    Overflowed,
    /// An item has ended.
    Ended(Reason),
}

/// What is written and read. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Board {
    environment_id: Arc<str>,
    counters: Counters,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    items: Vec<ItemView>,
    problem: String,
    least_margin: Option<Duration>,
    ended: Option<Reason>,
    owed: Option<usize>,
}

impl Board {
    /// Nothing has happened yet.
    #[must_use]
    pub fn new(environment_id: &str) -> Self {
        Self { environment_id: environment_id.into(), counters: Counters::default(), state: Arc::default() }
    }

    /// The environment.
    #[must_use]
    pub fn environment_id(&self) -> &str {
        &self.environment_id
    }

    /// Work items that are here, by their ids.
    #[must_use]
    pub fn items(&self) -> Vec<ItemView> {
        self.lock().items.clone()
    }

    /// Why the last poll brought no answer of use, with what to do; empty when it did.
    #[must_use]
    pub fn problem(&self) -> String {
        self.lock().problem.clone()
    }

    /// Why the last item that ended has ended.
    #[must_use]
    pub fn ended(&self) -> Option<Reason> {
        self.lock().ended
    }

    /// Calls whose results the server does not have; `None` while it is not known what an earlier runner has left.
    #[must_use]
    pub fn owed(&self) -> Option<usize> {
        self.lock().owed
    }

    /// Everything that is measured and counted, by name. `now` is of the clock of leases.
    #[must_use]
    pub fn numbers(&self, now: u64) -> Vec<(String, u64)> {
        let mut numbers: Vec<_> = self.counters.all().into_iter().collect();
        let environment = &self.environment_id;
        let state = self.lock();
        for stage in STAGES {
            let count = state.items.iter().filter(|item| item.stage == stage).count();
            numbers.push((
                format!("claude_items{{environment=\"{environment}\",state=\"{stage}\"}}"),
                u64::try_from(count).unwrap_or(u64::MAX),
            ));
        }
        let left = state.items.iter().map(|item| item.lease_until.saturating_sub(now)).min();
        let gauges = [
            ("claude_lease_left_milliseconds", left.map(Duration::from_nanos)),
            ("claude_lease_margin_least_milliseconds", state.least_margin),
        ];
        for (name, value) in gauges {
            if let Some(value) = value {
                numbers.push((format!("{name}{{environment=\"{environment}\"}}"), milliseconds(value)));
            }
        }
        numbers
    }

    pub(super) fn show(&self, items: Vec<ItemView>, owed: Option<usize>) {
        let mut state = self.lock();
        (state.items, state.owed) = (items, owed);
    }

    pub(super) fn count(&self, happening: Happening) {
        match happening {
            Happening::Polled { result, problem } => {
                self.add("claude_polls_total", Some(("result", result)), 1);
                self.lock().problem = problem;
            }
            Happening::Acknowledged { after } => {
                self.add("claude_acks_total", Some(("result", "taken")), 1);
                self.add("claude_ack_milliseconds_total", None, milliseconds(after));
            }
            Happening::NotAcknowledged => self.add("claude_acks_total", Some(("result", "failed")), 1),
            Happening::Renewed { margin } => {
                self.add("claude_leases_renewed_total", None, 1);
                let mut state = self.lock();
                state.least_margin = Some(state.least_margin.map_or(margin, |least| least.min(margin)));
            }
            Happening::Posted { after } => {
                self.add("claude_results_total", Some(("result", "posted")), 1);
                self.add("claude_result_milliseconds_total", None, milliseconds(after));
            }
            Happening::NotPosted => self.add("claude_results_total", Some(("result", "failed")), 1),
            Happening::Overflowed => self.add("claude_streams_overflowed_total", None, 1),
            Happening::Ended(reason) => {
                self.add("claude_items_ended_total", Some(("reason", reason.name())), 1);
                self.lock().ended = Some(reason);
            }
        }
    }

    fn add(&self, name: &str, label: Option<(&str, &str)>, by: u64) {
        let labels: Vec<_> = std::iter::once(("environment", &*self.environment_id)).chain(label).collect();
        self.counters.add_many(name, &labels, by);
    }

    /// Nothing is left half-done under this lock, so a panic of another holder changes nothing.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_environment_and_sums_of_times() {
        let board = Board::new("env_1");
        for after in [5, 7] {
            board.count(Happening::Posted { after: Duration::from_millis(after) });
        }
        for margin in [90, 60, 70] {
            board.count(Happening::Renewed { margin: Duration::from_secs(margin) });
        }
        board.count(Happening::Polled { result: "refused", problem: "no".to_owned() });
        let item = ItemView {
            work_id: "work_1".into(),
            session_id: "s".into(),
            core: "c".into(),
            stage: "serving",
            lease_until: 9_000_000_000,
        };
        board.show(vec![item], Some(1));

        let numbers: std::collections::BTreeMap<_, _> = board.numbers(2_000_000_000).into_iter().collect();
        for (name, value) in [
            ("claude_results_total{environment=\"env_1\",result=\"posted\"}", 2),
            ("claude_result_milliseconds_total{environment=\"env_1\"}", 12),
            ("claude_lease_margin_least_milliseconds{environment=\"env_1\"}", 60_000),
            ("claude_lease_left_milliseconds{environment=\"env_1\"}", 7_000),
            ("claude_items{environment=\"env_1\",state=\"serving\"}", 1),
            ("claude_items{environment=\"env_1\",state=\"ending\"}", 0),
            ("claude_polls_total{environment=\"env_1\",result=\"refused\"}", 1),
        ] {
            assert_eq!(numbers.get(name), Some(&value), "{name} in {numbers:#?}");
        }
        assert_eq!((board.problem().as_str(), board.owed()), ("no", Some(1)));
    }

    #[test]
    fn problem_is_over_with_the_next_answer() {
        let board = Board::new("env_1");
        board.count(Happening::Polled { result: "failed", problem: "no".to_owned() });
        board.count(Happening::Polled { result: "empty", problem: String::new() });
        assert_eq!(board.problem(), "");
    }
}
