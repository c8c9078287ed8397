//! One world: what can happen, what does, and what must never.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proto::runner::v1 as pb;
use proto::runner::v1::outcome::Kind;

use super::credentials;
use super::host::Host;
use super::life::Life;
use super::wire::{Peer, Wire};
use crate::connector::orchestrator::simulated::Over;
use crate::dev::simulated::{Conversation, Store};
use crate::journal::lossy::Machine;
use crate::work::{CallId, Outcome, SandboxId, Update};

const SESSIONS: u64 = 3;
const CALLS: u64 = 14;
/// Steps after the last fault until everything must have come to its end.
const PATIENCE: u32 = 60_000;
/// The last so many things that happened are told of a world that fails.
const TOLD: usize = 80;

thread_local! {
    /// CLOCK_BOOTTIME of the world on this thread.
    static BOOTTIME: Cell<u64> = const { Cell::new(0) };
}

fn boottime_ns() -> u64 {
    BOOTTIME.get()
}

/// Lots, drawn from a seed (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    fn index(&mut self, bound: usize) -> usize {
        usize::try_from(self.below(bound as u64)).unwrap_or(0)
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fault {
    Cut,
    Stall,
    OneWay,
    RunnerDies,
    RunnerDiesWriting,
    PowerCut,
    FailOver,
    StaleReplica,
    TimeJump,
    TimePasses,
    SandboxDies,
    SyncFails,
}

const FAULTS: [Fault; 12] = [
    Fault::Cut,
    Fault::Stall,
    Fault::OneWay,
    Fault::RunnerDies,
    Fault::RunnerDiesWriting,
    Fault::PowerCut,
    Fault::FailOver,
    Fault::StaleReplica,
    Fault::TimeJump,
    Fault::TimePasses,
    Fault::SandboxDies,
    Fault::SyncFails,
];

/// What happened in one world or in many.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Tally {
    faults: BTreeMap<Fault, u64>,
    /// How calls ended.
    ends: BTreeMap<&'static str, u64>,
    /// Links, lives of runners, steps.
    counts: [u64; 3],
}

impl Tally {
    pub(super) fn add(&mut self, other: &Self) {
        other.faults.iter().for_each(|(fault, count)| *self.faults.entry(*fault).or_default() += count);
        other.ends.iter().for_each(|(end, count)| *self.ends.entry(end).or_default() += count);
        self.counts.iter_mut().zip(other.counts).for_each(|(sum, count)| *sum += count);
    }

    /// Few worlds may miss a fault; many may not.
    pub(super) fn has_everything(&self) -> bool {
        self.counts[1] < 1000 || FAULTS.iter().all(|fault| self.faults.contains_key(fault))
    }
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
    outcomes: BTreeMap<CallId, Outcome>,
    highest_term: u64,
    tally: Tally,
    told: Vec<String>,
    quiet: bool,
}

impl World {
    pub(super) fn new(seed: u64) -> Self {
        BOOTTIME.set(1_000_000_000);
        let mut random = Random(seed);
        // Each world has its own mix: faults hide one another.
        let enabled = FAULTS.into_iter().filter(|_| random.one_in(2)).collect();
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
            outcomes: BTreeMap::new(),
            highest_term: 0,
            tally: Tally::default(),
            told: Vec::new(),
            quiet: false,
        }
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
            let (up, down) = self.wires[current].under_way();
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

    // --- the orchestrator ---

    fn orchestrate(&mut self) {
        if self.quiet {
            return self.close_what_is_done();
        }
        let draw = self.random.below(20);
        if (self.sessions.len() as u64) < SESSIONS && (draw < 4 || self.sessions.is_empty()) {
            let session_id = format!("session-{}", self.sessions.len());
            self.store.open_session(&session_id);
            self.note(format!("open {session_id}"));
            return self.sessions.push(session_id);
        }
        let session_id = self.sessions[self.random.index(self.sessions.len())].clone();
        if draw < 15 && self.issued < CALLS {
            let (opened, over) = self.store.session_is(&session_id);
            if opened && !over && !self.closed.contains(&session_id) {
                let call_id = format!("call-{}", self.issued);
                let bytes = [0, 100, 700, 5000, 30_000][self.random.index(5)];
                let command = format!("{bytes} {} {}", self.random.below(3), u8::from(self.random.one_in(8)));
                self.store.call(&session_id, &call_id, &command);
                self.note(format!("{call_id} in {session_id}: {command}"));
                self.calls.push((session_id, call_id));
                self.issued += 1;
            }
        } else if draw < 17 && !self.calls.is_empty() && self.random.one_in(6) {
            let (session_id, call_id) = self.calls[self.random.index(self.calls.len())].clone();
            let mode = [pb::CancelMode::Interrupt, pb::CancelMode::Terminate, pb::CancelMode::Kill];
            self.store.cancel(&session_id, &call_id, mode[self.random.index(3)]);
            self.note(format!("cancel {call_id}"));
        } else if draw == 19 && self.random.one_in(6) && !self.closed.contains(&session_id) {
            self.close(&session_id);
        }
    }

    fn close(&mut self, session_id: &str) {
        if self.store.session_is(session_id).0 && !self.closed.iter().any(|closed| closed == session_id) {
            self.store.close(session_id);
            self.note(format!("close {session_id}"));
            self.closed.push(session_id.to_owned());
        }
    }

    /// What hangs is cancelled, and sessions without open calls are closed.
    fn close_what_is_done(&mut self) {
        for (session_id, call_id) in self.calls.clone() {
            if !self.is_final(&call_id) && self.store.known(&call_id).is_some_and(|known| !known.cancelled) {
                self.store.cancel(&session_id, &call_id, pb::CancelMode::Kill);
            }
        }
        for session_id in self.sessions.clone() {
            let open = self.calls.iter().any(|(owner, call_id)| *owner == session_id && !self.is_final(call_id));
            if !open {
                self.close(&session_id);
            }
        }
    }

    fn is_final(&self, call_id: &str) -> bool {
        self.store.known(call_id).is_none_or(|known| known.outcome.is_some() || known.refused.is_some())
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

    // --- faults ---

    /// A process begins, and may die while it recovers what the one before it has left.
    fn begin(&mut self) -> Result<(), String> {
        let dies = !self.quiet && self.enabled.contains(&Fault::RunnerDiesWriting) && self.random.one_in(3);
        let dies_at = dies.then(|| self.random.index(14));
        let Some(opened) = self.machine.open(dies_at)? else {
            self.machine = self.machine.after_process_crash();
            self.note("runner died while it recovered");
            return Ok(());
        };
        if opened.1.term < self.highest_term {
            return Err(format!(
                "I4: term {} was obeyed, and the next runner knows of {}",
                self.highest_term, opened.1.term
            ));
        }
        self.tally.counts[1] += 1;
        let instance = format!("instance-{}", self.tally.counts[1]);
        self.note(format!(
            "{instance} begins with {} sessions, {} calls",
            opened.1.sessions.len(),
            opened.1.calls.len()
        ));
        self.life = Some(Life::begin(opened, Arc::clone(&self.host), instance, credentials(), boottime_ns));
        Ok(())
    }

    /// The runner dies; with `writing`, at that operation of writing what waits.
    fn die(&mut self, writing: Option<usize>) {
        self.hang_up();
        let Some(life) = self.life.take() else { return };
        self.note(format!("runner dies with {} records waiting, writing {writing:?}", life.journal.waiting()));
        if let Some(operation) = writing {
            life.journal.die(operation);
        }
        drop(life);
        let random = &mut self.random;
        self.host.lock().unwrap().runner_died(boottime_ns(), |bound| random.index(bound));
        self.machine = self.machine.after_process_crash();
    }

    async fn fault(&mut self, fault: Fault) -> Result<(), String> {
        let happened = match fault {
            Fault::Cut => {
                self.note("link cut");
                let any = self.current.is_some();
                self.hang_up();
                any
            }
            Fault::Stall | Fault::OneWay => {
                let both = fault == Fault::Stall;
                let way = self.random.index(2);
                match self.current {
                    Some(current) => {
                        let stalled = &mut self.wires[current].stalled;
                        *stalled = if both { [true; 2] } else { [way == 0, way == 1] };
                        self.note(format!("link stalls, both ways: {both}, else {way}"));
                        // It is found to be dead, or goes on, before the next fault of this kind.
                        let wait = Duration::from_secs(self.random.below(45));
                        for _ in 0..self.random.below(60) {
                            self.step().await?;
                        }
                        self.pass(wait, false).await;
                        match self.current {
                            Some(_) if wait >= Duration::from_secs(30) => self.hang_up(),
                            Some(current) => self.wires[current].stalled = [false; 2],
                            None => {}
                        }
                        true
                    }
                    None => false,
                }
            }
            Fault::RunnerDies => {
                let alive = self.life.is_some();
                self.die(None);
                alive
            }
            Fault::RunnerDiesWriting => {
                let waits = self.life.as_ref().is_some_and(|life| life.journal.waiting() > 0);
                let operation = self.random.index(6);
                self.die(Some(operation));
                waits
            }
            Fault::PowerCut => {
                let operation = self.random.index(6);
                self.die(Some(operation));
                self.note("power fails");
                let random = &mut self.random;
                self.machine = self.machine.after_power_cut(|bound| random.index(bound));
                self.host.lock().unwrap().power_cut();
                true
            }
            Fault::FailOver => {
                self.store.fail_over();
                self.note(format!("replica of term {} takes over", self.store.term()));
                true
            }
            Fault::StaleReplica => {
                self.hang_up();
                self.next_is_stale = true;
                self.highest_term > 1
            }
            Fault::TimeJump => {
                let time = Duration::from_secs(60 * self.random.below(200));
                self.note(format!("asleep for {} s", time.as_secs()));
                self.pass(time, true).await;
                true
            }
            Fault::TimePasses => {
                let time = Duration::from_secs(self.random.below(50));
                self.pass(time, false).await;
                true
            }
            Fault::SandboxDies => {
                let sandbox_id = if self.random.one_in(3) { self.some_sandbox() } else { None };
                if let Some(sandbox_id) = &sandbox_id {
                    self.note(format!("{sandbox_id} dies"));
                    self.host.lock().unwrap().lose(sandbox_id, "killed");
                }
                sandbox_id.is_some()
            }
            Fault::SyncFails => match self.life.as_ref().filter(|_| self.random.one_in(3)) {
                Some(life) => {
                    life.journal.fail_sync();
                    self.note("the next sync fails");
                    true
                }
                None => false,
            },
        };
        if happened {
            *self.tally.faults.entry(fault).or_default() += 1;
        }
        Ok(())
    }

    // --- the oracle ---

    /// What must hold at every moment.
    fn look(&mut self) -> Result<(), String> {
        let host = Arc::clone(&self.host);
        let host = host.lock().unwrap();
        if let Some(problem) = host.violations.first() {
            return Err(format!("I1: {problem}"));
        }
        // Results are told although they cannot be written down. When then their sandbox is gone as well, all that the next
        // runner knows is that it does not know.
        let in_doubt = self.tally.faults.contains_key(&Fault::SyncFails);
        let excused = |problem: &&String| in_doubt && problem.contains("ended twice");
        if let Some(problem) = self.store.complaints().iter().find(|problem| !excused(problem)) {
            return Err(format!("I2, I3: the orchestrator complains: {problem}"));
        }
        let Some(life) = &mut self.life else { return Ok(()) };
        if life.connector.highest_term() < self.highest_term {
            return Err("I4: the term went back".into());
        }
        self.highest_term = life.connector.highest_term();
        if life.connector.unheard() > 1024 {
            return Err("I6: more than 1024 reports wait for the connector".into());
        }
        for update in std::mem::take(&mut life.told) {
            let Update::CallFinished { call_id, result, .. } = update else { continue };
            let outcome = result.end.outcome.clone();
            let begun = host.ledger.get(&call_id).copied().unwrap_or(0);
            // A sandbox that was closed is as gone as one that was lost, when nobody has heard how.
            let owner = self.calls.iter().find(|(_, id)| id == call_id.as_str()).map(|(owner, _)| owner);
            let closed = owner.is_some_and(|owner| self.closed.contains(owner));
            check_honesty(&call_id, &outcome, begun, host.losses > 0 || closed)?;
            let before = self.outcomes.insert(call_id.clone(), outcome.clone());
            let unknown = in_doubt && matches!(outcome, Outcome::Indeterminate { .. });
            if before.as_ref().is_some_and(|before| *before != outcome) && !unknown {
                return Err(format!("I2: {call_id} ended with {before:?}, and now with {outcome:?}"));
            }
        }
        Ok(())
    }

    fn is_done(&self) -> bool {
        let delivered =
            self.life.as_ref().is_some_and(|life| life.connector.is_live() && life.connector.is_delivered());
        delivered
            && self.calls.iter().all(|(_, call_id)| self.is_final(call_id))
            && self.sessions.iter().all(|session_id| self.store.session_is(session_id).1)
    }

    /// What must hold in the end.
    fn last_look(&mut self) -> Result<(), String> {
        let host = Arc::clone(&self.host);
        let host = host.lock().unwrap();
        for (session_id, call_id) in &self.calls {
            let Some(known) = self.store.known(call_id) else { return Err(format!("I2: {call_id} is unknown")) };
            let id = CallId::new(call_id).map_err(|error| error.to_string())?;
            let begun = host.ledger.get(&id).copied().unwrap_or(0);
            let end = match (&known.outcome, &known.refused) {
                (Some(Kind::Exited(_)), _) if begun != 1 => {
                    return Err(format!("I1: {call_id} has exited and began {begun} times"));
                }
                (Some(Kind::Exited(_)), _) => "exited",
                (Some(Kind::Cancelled(_)), _) => "cancelled",
                (Some(Kind::NeverStarted(_)), _) => "never started",
                (Some(Kind::Indeterminate(_)), _) => "indeterminate",
                (Some(_), _) => return Err(format!("{call_id} has ended as no call here can")),
                (None, Some(code)) if begun > 0 || known.accepted => {
                    return Err(format!("I2: {call_id} was refused with {code}, after it was taken or had begun"));
                }
                (None, Some(_)) => "refused",
                (None, None) => return Err(format!("I2: {call_id} has no end")),
            };
            let asked = known.cancelled || self.closed.contains(session_id);
            if end == "cancelled" && !asked {
                return Err(format!("I4: {call_id} was cancelled, and nobody had asked for it"));
            }
            if known.has_holes && host.losses == 0 && !self.closed.contains(session_id) {
                return Err(format!("I2: output of {call_id} is missing"));
            }
            if !known.sent && begun > 0 {
                return Err(format!("I1: {call_id} began, and was never sent"));
            }
            *self.tally.ends.entry(end).or_default() += 1;
        }
        let alive = host.sandboxes.iter().find(|(_, sandbox)| sandbox.alive);
        match alive {
            Some((id, sandbox)) => Err(format!("I7: {id} lives, and its session {} is over", sandbox.session_id)),
            None => Ok(()),
        }
    }

    fn state(&self) -> String {
        let open: Vec<_> = self
            .calls
            .iter()
            .filter(|(_, call_id)| !self.is_final(call_id))
            .map(|(owner, call_id)| (owner, call_id, self.store.known(call_id)))
            .collect();
        let sessions: Vec<_> = self.sessions.iter().filter(|id| !self.store.session_is(id).1).collect();
        let life = self.life.as_ref().map(|life| {
            let connector = &life.connector;
            (connector.is_live(), connector.is_delivered(), life.pending(), life.journal.waiting())
        });
        let owed = self.life.as_ref().map(|life| life.connector.owed()).unwrap_or_default();
        format!(
            "open calls {open:?}, open sessions {sessions:?}, runner (live, delivered, pending, waiting) {life:?}, owed {owed}"
        )
    }
}

/// I1 and I5: what a caller is told has to agree with what has happened.
fn check_honesty(call_id: &CallId, outcome: &Outcome, begun: u32, lost: bool) -> Result<(), String> {
    let nothing = matches!(outcome, Outcome::NeverStarted { .. } | Outcome::Cancelled { before_start: true, .. });
    if nothing && begun > 0 {
        return Err(format!("I1: {call_id} began, and its caller was told {outcome:?}"));
    }
    if !nothing && begun == 0 && !matches!(outcome, Outcome::Indeterminate { .. }) {
        return Err(format!("I1: {call_id} never began, and its caller was told {outcome:?}"));
    }
    if matches!(outcome, Outcome::Indeterminate { .. }) && !lost {
        return Err(format!("I5: nothing was lost, and the end of {call_id} is said to be unknown"));
    }
    Ok(())
}
