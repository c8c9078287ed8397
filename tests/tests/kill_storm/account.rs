//! What everybody in a storm shares: what may be attacked, what was said about calls, and every breach of a promise.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use sandbox_runner_tests::daemon::Workspace;
use sandbox_runner_tests::ledger::Ledger;

use crate::victims::Victim;

/// What was said about a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Verdict {
    Completed,
    /// It ran and something ended it; the cause is named.
    Ended,
    /// It was cancelled before it ran.
    Withdrawn,
    NeverStarted,
    Refused,
    Indeterminate,
}

/// A promise that was broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Breach {
    ExecutedTwice,
    LostOutcome,
    MissingBytes,
    LeakedSandbox,
    /// What was said does not agree with what happened.
    Untrue,
}

impl Breach {
    const ALL: [(Self, &str); 5] = [
        (Self::ExecutedTwice, "executed twice"),
        (Self::LostOutcome, "lost outcomes"),
        (Self::MissingBytes, "undeclared missing bytes"),
        (Self::LeakedSandbox, "leaked sandboxes"),
        (Self::Untrue, "untrue outcomes"),
    ];
}

/// What a run counts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Figures {
    pub(crate) killed: BTreeMap<Victim, u64>,
    pub(crate) verdicts: BTreeMap<Verdict, u64>,
    /// Sessions that were opened, and those that did not live as long as they were meant to.
    pub(crate) sessions: u64,
    pub(crate) lost_sessions: u64,
    /// Calls whose number of beginnings the ledger, or an edited file, was asked for.
    pub(crate) counted: u64,
    /// Output that is what the command printed, by its sum.
    pub(crate) bytes_checked: u64,
    /// Output that was declared missing.
    pub(crate) bytes_declared_missing: u64,
    /// Calls that came to their end while no process of the runner was there.
    pub(crate) ended_alone: u64,
}

#[derive(Debug)]
pub(crate) struct Account {
    over: AtomicBool,
    /// Sandboxes that may be attacked, by session.
    workspaces: Mutex<BTreeMap<String, Arc<Workspace>>>,
    pub(crate) ledger: Arc<Ledger>,
    figures: Mutex<Figures>,
    breaches: Mutex<Vec<(Breach, String)>>,
    /// Sessions whose sandbox was attacked itself.
    hit: Mutex<BTreeSet<String>>,
    /// Times at which every sandbox was attacked at once.
    all_hit: AtomicU64,
    /// When no process of the runner was there, in nanoseconds since 1970.
    alone: Mutex<Vec<(u128, u128)>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Nanoseconds since 1970: what `date` says in a sandbox.
pub(crate) fn wall_ns() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |passed| passed.as_nanos())
}

impl Account {
    pub(crate) fn new() -> Self {
        Self {
            over: AtomicBool::new(false),
            workspaces: Mutex::default(),
            ledger: Ledger::new(),
            figures: Mutex::default(),
            breaches: Mutex::default(),
            hit: Mutex::default(),
            all_hit: AtomicU64::new(0),
            alone: Mutex::default(),
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    pub(crate) fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
    }

    pub(crate) fn workspaces(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Workspace>>> {
        locked(&self.workspaces)
    }

    pub(crate) fn figures(&self) -> MutexGuard<'_, Figures> {
        locked(&self.figures)
    }

    pub(crate) fn breach(&self, what: Breach, text: String) {
        println!("{what:?}: {text}");
        locked(&self.breaches).push((what, text));
    }

    /// Notes before the kill that the sandbox of a session is about to be lost.
    pub(crate) fn hits(&self, session_id: &str) {
        locked(&self.hit).insert(session_id.to_owned());
    }

    pub(crate) fn hits_all(&self) {
        self.all_hit.fetch_add(1, Ordering::SeqCst);
    }

    pub(crate) fn all_hit(&self) -> u64 {
        self.all_hit.load(Ordering::SeqCst)
    }

    /// Whether somebody was killed who takes the sandbox of this session along. `all_hit` is from before it was opened.
    pub(crate) fn is_hit(&self, session_id: &str, all_hit: u64) -> bool {
        self.all_hit() != all_hit || locked(&self.hit).contains(session_id)
    }

    pub(crate) fn was_alone(&self, from_ns: u128, to_ns: u128) {
        locked(&self.alone).push((from_ns, to_ns));
    }

    pub(crate) fn is_alone_at(&self, at_ns: u128) -> bool {
        locked(&self.alone).iter().any(|(from, to)| (*from..*to).contains(&at_ns))
    }

    /// The figures in lines; the last one is for the record of the promise.
    pub(crate) fn summary(&self, late_runners: u64) -> String {
        let figures = self.figures().clone();
        let kills: u64 = figures.killed.values().sum();
        let calls: u64 = figures.verdicts.values().sum();
        let begun: u64 = self.ledger.entries().values().map(|entry| entry.begun).sum();
        let breaches = Breach::ALL.map(|(breach, name)| {
            let count = locked(&self.breaches).iter().filter(|(what, _)| *what == breach).count();
            format!("{name} {count}")
        });
        let [missing, checked] = [figures.bytes_declared_missing, figures.bytes_checked];
        format!(
            "kills {:?}\ncalls {:?}\nledger: {begun} beginnings; {} calls counted\nsessions {}, lost {}\n\
             bytes right by sha256 {checked}, declared missing {missing}\n\
             calls that ended while no runner was there {}, runners heard after their successor {late_runners}\n\
             figures: {kills} kills, {calls} calls, {} MB of output: {}",
            figures.killed,
            figures.verdicts,
            figures.counted,
            figures.sessions,
            figures.lost_sessions,
            figures.ended_alone,
            checked / 1_000_000,
            breaches.join(", "),
        )
    }

    /// # Panics
    /// When a promise was broken.
    pub(crate) fn assert_kept(&self) {
        let breaches = locked(&self.breaches);
        assert!(
            breaches.is_empty(),
            "{} breaches, among them {:#?}",
            breaches.len(),
            &breaches[..breaches.len().min(20)]
        );
    }
}
