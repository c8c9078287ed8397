//! One world: what can happen and what does. What goes wrong is in `faults`, what is asked for in `orders`, and what must never
//! happen in `oracle`.

mod black_hole;
mod faults;
mod late_greeting;
mod oracle;
mod orders;
mod set_back;

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proto::runner::v1 as pb;

use super::credentials;
use super::host::Host;
use super::life::{Life, Surroundings};
use super::lots::{FAULTS, FIRST, Fault, Random, Tally};
use super::mistakes::Mistake;
use super::wire::{Peer, Wire};
use crate::connector::orchestrator::simulated::Over;
use crate::dev::simulated::{Conversation, Store};
use crate::journal::lossy::Machine;
use crate::work::{CallId, Outcome, SandboxId};

const SESSIONS: u64 = 3;
const CALLS: u64 = 14;
/// Steps after the last fault until everything must have come to its end.
const PATIENCE: u32 = 60_000;
/// As the orchestrator of a world gives it.
const LEASE: Duration = Duration::from_secs(30);
/// The last so many things that happened are told of a world that fails.
const TOLD: usize = 80;

thread_local! {
    /// CLOCK_BOOTTIME of the world on this thread.
    static BOOTTIME: Cell<u64> = const { Cell::new(0) };
}

fn boottime_ns() -> u64 {
    BOOTTIME.get()
}

pub(super) struct World {
    random: Random,
    enabled: Vec<Fault>,
    machine: Machine,
    host: Arc<Mutex<Host>>,
    life: Option<Life>,
    wires: Vec<Wire>,
    /// The runner's end of this wire is in use.
    current: Option<usize>,
    next_is_stale: bool,
    store: Store,
    issued: u64,
    sessions: Vec<String>,
    calls: Vec<(String, String)>,
    closed: Vec<String>,
    /// Sessions that the orchestrator knows to be over.
    over: BTreeSet<String>,
    outcomes: BTreeMap<CallId, Outcome>,
    highest_term: u64,
    tally: Tally,
    told: Vec<String>,
    quiet: bool,
    /// Nothing is asked for but by a script.
    scripted: bool,
    /// Nothing passes on any wire.
    black_hole: bool,
    /// An old copy of the state.
    copy: Option<Machine>,
    /// It is in the place of the newest one.
    is_set_back: bool,
    /// Until when the runner may begin something, at most.
    lease_until_ns: u64,
    /// Calls whose cancel was asked for, and whether it was confirmed before they began.
    cancelled: BTreeMap<CallId, bool>,
    /// What the runner does wrong.
    mistake: Option<Mistake>,
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        let mut lots = Random(!seed);
        let later: Vec<_> = FAULTS[FIRST..].iter().copied().filter(|_| lots.one_in(2)).collect();
        Self::of_first_form(seed).with(&later)
    }

    /// One without the faults that came later.
    pub(super) fn of_first_form(seed: u64) -> Self {
        BOOTTIME.set(1_000_000_000);
        let mut random = Random(seed);
        // Each world has its own mix: faults hide one another.
        let enabled = FAULTS[..FIRST].iter().copied().filter(|_| random.one_in(2)).collect();
        Self {
            random,
            enabled,
            machine: Machine::default(),
            host: Arc::default(),
            life: None,
            wires: Vec::new(),
            current: None,
            next_is_stale: false,
            store: Store::new(),
            issued: 0,
            sessions: Vec::new(),
            calls: Vec::new(),
            closed: Vec::new(),
            over: BTreeSet::new(),
            outcomes: BTreeMap::new(),
            highest_term: 0,
            tally: Tally::default(),
            told: Vec::new(),
            quiet: false,
            scripted: false,
            black_hole: false,
            copy: None,
            is_set_back: false,
            lease_until_ns: 0,
            cancelled: BTreeMap::new(),
            mistake: None,
        }
    }

    /// The same in which these faults happen as well.
    pub(super) fn with(mut self, faults: &[Fault]) -> Self {
        let missing: Vec<_> = faults.iter().filter(|fault| !self.enabled.contains(fault)).copied().collect();
        self.enabled.extend(missing);
        self
    }

    /// The same with a runner that makes a mistake.
    pub(super) fn making(mut self, mistake: Mistake) -> Self {
        self.mistake = Some(mistake);
        self.machine.syncs_nothing = mistake == Mistake::NothingIsSynced;
        self
    }

    pub(super) async fn run(mut self) -> Result<Tally, String> {
        let result = self.live().await;
        result.map(|()| self.tally.clone()).map_err(|problem| {
            let mut text = format!("{problem}; faults {:?}; before that:", self.enabled);
            for line in &self.told[self.told.len().saturating_sub(TOLD)..] {
                let _ = write!(text, "\n  {line}");
            }
            text
        })
    }

    async fn live(&mut self) -> Result<(), String> {
        let steps = 1500 + self.random.below(4500);
        let quiet_steps = 20 << self.random.below(5);
        for _ in 0..steps {
            if self.random.one_in(quiet_steps) && !self.enabled.is_empty() {
                let which = self.random.index(self.enabled.len());
                self.fault(self.enabled[which]).await?;
            }
            self.step().await?;
        }
        self.quiet = true;
        self.wires.iter_mut().for_each(|wire| wire.stalled = [false; 2]);
        self.note("faults are over");
        for _ in 0..PATIENCE {
            if self.is_done() {
                return self.last_look();
            }
            if self.life.as_ref().is_some_and(|life| life.journal.is_broken()) {
                self.die(None);
            }
            self.step().await?;
        }
        Err(format!("I8: not done {PATIENCE} steps after the last fault: {}", self.state()))
    }

    fn note(&mut self, text: impl Into<String>) {
        self.told.push(format!("{:.3} s: {}", Duration::from_nanos(boottime_ns()).as_secs_f64(), text.into()));
    }

    async fn pass(&mut self, time: Duration, while_asleep: bool) {
        BOOTTIME.set(boottime_ns() + u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
        // The other clock stands still while a machine sleeps.
        if !while_asleep {
            tokio::time::advance(time).await;
        }
        self.host.lock().unwrap().expire(boottime_ns());
    }

    /// Something happens.
    async fn step(&mut self) -> Result<(), String> {
        self.tally.counts[2] += 1;
        if self.random.one_in(4) {
            let time = Duration::from_millis(self.random.below(40));
            self.pass(time, false).await;
        }
        match self.random.below(30) {
            0 => self.orchestrate(),
            1 if self.life.is_none() => self.begin()?,
            1 => self.dial()?,
            2..=5 => self.with_life(|life, random| {
                let which = random.index(life.pending());
                life.finish(which);
                Ok(())
            })?,
            6..=9 => self.hear_sandbox()?,
            10..=12 => self.deliver(),
            13 => {
                let sandbox_id = self.some_sandbox();
                if let Some(sandbox_id) = sandbox_id {
                    let random = &mut self.random;
                    self.host.lock().unwrap().proceed(&sandbox_id, |bound| random.below(bound));
                }
            }
            14..=16 => self.with_life(|life, _| life.connector.hear())?,
            17 => self.with_life(|life, _| life.connector.look_around())?,
            18..=19 => self.with_life(|life, _| {
                life.work();
                Ok(())
            })?,
            20..=22 => self.send(),
            23 => self.with_life(|life, _| life.connector.turn())?,
            24..=25 => self.arrive(),
            26..=27 => self.receive()?,
            28 => {
                if let Some(current) = self.current {
                    self.wires[current].answer();
                    self.wires[current].answer();
                }
            }
            _ => {
                let most = 1 + self.random.index(8);
                self.with_life(|life, _| {
                    life.journal.write(most);
                    Ok(())
                })?;
            }
        }
        self.look()
    }

    fn with_life(&mut self, act: impl FnOnce(&mut Life, &mut Random) -> Result<(), Over>) -> Result<(), String> {
        let Some(life) = &mut self.life else { return Ok(()) };
        let result = act(life, &mut self.random);
        self.link_result(result)
    }

    /// A link that is over, for whatever reason, is dropped. A replica that serves is never found wrong.
    fn link_result(&mut self, result: Result<(), Over>) -> Result<(), String> {
        let Err(over) = result else { return Ok(()) };
        self.note(format!("link over: {over:?}"));
        let stale = self.current.is_some_and(|current| self.wires[current].is_stale());
        self.hang_up();
        match over {
            Over::Violation(problem) if stale && problem.contains("is older than") => Ok(()),
            Over::Violation(problem) => Err(format!("the runner finds the orchestrator wrong: {problem}")),
            Over::Ended(_) => Ok(()),
        }
    }

    fn hang_up(&mut self) {
        if let Some(life) = &mut self.life {
            life.connector.hang_up();
        }
        if let Some(current) = self.current.take() {
            let (up, down) = if self.black_hole { (0, 0) } else { self.wires[current].under_way() };
            let (up, down) = (self.random.index(up + 1), self.random.index(down + 1));
            self.wires[current].cut(up, down);
        }
        self.forget_wires();
    }

    /// Wires that are over go; the current one keeps its place by being the last.
    fn forget_wires(&mut self) {
        if self.current.is_none() {
            self.wires.retain(|wire| !wire.is_over());
        }
    }

    // --- the wire ---

    fn dial(&mut self) -> Result<(), String> {
        let Some(life) = &mut self.life else { return Ok(()) };
        if life.connector.may_dial() {
            let result = life.connector.dial();
            return self.link_result(result);
        }
        if !life.connector.is_dialling() {
            return Ok(());
        }
        life.connector.connect();
        let peer = if std::mem::take(&mut self.next_is_stale) && self.highest_term > 1 {
            let term = 1 + self.random.below(self.highest_term - 1);
            Peer::Stale { term, sessions: self.sessions.clone(), calls: self.calls.clone() }
        } else {
            Peer::Current(Conversation::default())
        };
        self.forget_wires();
        self.wires.push(Wire::to(peer));
        if let Some(wire) = self.wires.last_mut() {
            wire.stalled = [self.black_hole; 2];
        }
        self.current = Some(self.wires.len() - 1);
        self.tally.counts[0] += 1;
        self.note("connected");
        Ok(())
    }

    fn send(&mut self) {
        if let (Some(life), Some(current)) = (&mut self.life, self.current)
            && let Some(frame) = life.connector.send()
        {
            self.wires[current].send(frame);
        }
    }

    /// A frame arrives on any wire: an old one may be slower than a new one.
    fn arrive(&mut self) {
        if !self.wires.is_empty() {
            let which = self.random.index(self.wires.len());
            self.wires[which].arrive(&self.store);
        }
    }

    fn receive(&mut self) -> Result<(), String> {
        let (Some(life), Some(current)) = (&mut self.life, self.current) else { return Ok(()) };
        if self.wires[current].has_ended() {
            self.hang_up();
            return Ok(());
        }
        if !life.connector.reads() {
            return Ok(());
        }
        let Some(frame) = self.wires[current].next() else { return Ok(()) };
        if !self.wires[current].is_stale() {
            self.lease_until_ns = oracle::lease_of(&frame).unwrap_or(self.lease_until_ns);
        }
        let result = life.connector.receive(&frame);
        if self.wires[current].is_stale() && !matches!(result, Err(Over::Violation(_))) {
            return Err("I4: a replica of an older term was obeyed".into());
        }
        self.link_result(result)
    }

    // --- sandboxes ---

    fn some_sandbox(&mut self) -> Option<SandboxId> {
        let host = self.host.lock().unwrap();
        let count = host.sandboxes.len();
        let which = self.random.index(count);
        host.sandboxes.keys().nth(which).cloned()
    }

    fn deliver(&mut self) {
        if let Some(sandbox_id) = self.some_sandbox() {
            self.host.lock().unwrap().deliver(&sandbox_id, boottime_ns());
        }
    }

    fn hear_sandbox(&mut self) -> Result<(), String> {
        let Some(sandbox_id) = self.some_sandbox() else { return Ok(()) };
        self.with_life(|life, _| {
            life.hear(&sandbox_id);
            Ok(())
        })
    }
}
