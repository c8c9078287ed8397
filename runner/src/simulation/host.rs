//! Sandboxes of a machine: what reaches their process 1, what runs in them, and what they report. They outlive runners.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

use crate::work::*;

/// Output up to here travels with the end of a call.
const INLINE: u64 = 1024;

/// What a runner sends to a sandbox. It arrives in order.
#[derive(Debug)]
pub(super) enum Request {
    Prepare(PreparedCall),
    Go(CallId),
    Abort(CallId),
    Cancel(CallId, CancelMode),
    Acknowledge(CallId),
    Deadline(u64),
    EndUnknown,
    Close,
}

/// What a runner hears, in order.
#[derive(Debug)]
pub(super) enum Report {
    Prepared(CallId),
    Unprepared(CallId),
    Aborted(CallId),
    Started(CallId, u64),
    Advanced(CallId, u64),
    Finished(CallId, Box<CallEnd>),
    Closed,
    Lost(String),
}

#[derive(Debug)]
enum State {
    Prepared,
    Running(Option<CancelMode>),
    Finished(Box<CallEnd>),
}

#[derive(Debug)]
struct Held {
    state: State,
    total: u64,
    code: i32,
    hangs: bool,
    produced: u64,
    started_ns: u64,
}

#[derive(Debug)]
pub(super) struct Sandbox {
    pub(super) session_id: SessionId,
    pub(super) alive: bool,
    calls: BTreeMap<CallId, Held>,
    forgotten: BTreeSet<CallId>,
    /// Calls that the runner which serves it does not know.
    pub(super) unknown: BTreeSet<CallId>,
    deadline_ns: u64,
    pub(super) requests: VecDeque<Request>,
    pub(super) reports: VecDeque<Report>,
}

/// The machine.
#[derive(Debug, Default)]
pub(super) struct Host {
    pub(super) sandboxes: BTreeMap<SandboxId, Sandbox>,
    serial: u64,
    /// How often each call has begun, over all runners and sandboxes: what nobody can deny.
    pub(super) ledger: BTreeMap<CallId, u32>,
    /// Sandboxes that ended without anybody asking for it.
    pub(super) losses: u64,
    pub(super) violations: Vec<String>,
    /// Sandboxes and unknown calls that a runner has ended.
    pub(super) ended: u64,
    /// The runner that serves has an old copy of its journal.
    pub(super) is_set_back: bool,
}

/// Byte `offset` of the output of a call.
fn byte_at(call_id: &CallId, offset: u64) -> u8 {
    let seed = call_id.as_str().bytes().fold(7_u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(byte)));
    u8::try_from(seed.wrapping_add(offset.wrapping_mul(2_654_435_761)) >> 7 & 0xff).unwrap_or(0)
}

fn bytes(call_id: &CallId, from: u64, to: u64) -> Vec<u8> {
    (from..to).map(|offset| byte_at(call_id, offset)).collect()
}

impl Host {
    pub(super) fn create(&mut self, session_id: SessionId) -> SandboxId {
        self.serial += 1;
        let sandbox_id = SandboxId::new(format!("sandbox-{}", self.serial)).expect("an id");
        let sandbox = Sandbox {
            session_id,
            alive: true,
            calls: BTreeMap::new(),
            forgotten: BTreeSet::new(),
            unknown: BTreeSet::new(),
            deadline_ns: u64::MAX,
            requests: VecDeque::new(),
            reports: VecDeque::new(),
        };
        self.sandboxes.insert(sandbox_id.clone(), sandbox);
        sandbox_id
    }

    pub(super) fn send(&mut self, sandbox_id: &SandboxId, request: Request) {
        let Some(sandbox) = self.sandboxes.get_mut(sandbox_id) else { return };
        if sandbox.alive {
            sandbox.requests.push_back(request);
        } else {
            sandbox.unanswered(request);
        }
    }

    /// The next request reaches process 1.
    pub(super) fn deliver(&mut self, sandbox_id: &SandboxId, now_ns: u64) {
        let Some(sandbox) = self.sandboxes.get_mut(sandbox_id).filter(|sandbox| sandbox.alive) else { return };
        let Some(request) = sandbox.requests.pop_front() else { return };
        match request {
            Request::Prepare(call) => {
                let call_id = call.call_id.clone();
                if sandbox.calls.contains_key(&call_id) || sandbox.forgotten.contains(&call_id) {
                    self.violations.push(format!("{call_id} was handed over again"));
                }
                sandbox.calls.insert(call_id.clone(), Held::new(&call));
                sandbox.reports.push_back(Report::Prepared(call_id));
            }
            Request::Go(call_id) => {
                if let Some(call) = sandbox.calls.get_mut(&call_id)
                    && matches!(call.state, State::Prepared)
                {
                    (call.state, call.started_ns) = (State::Running(None), now_ns);
                    sandbox.reports.push_back(Report::Started(call_id.clone(), now_ns));
                    let count = self.ledger.entry(call_id.clone()).or_default();
                    *count += 1;
                    if *count > 1 {
                        self.violations.push(format!("{call_id} began {count} times"));
                    }
                }
            }
            Request::Abort(call_id) => {
                let running = sandbox.calls.get(&call_id).is_some_and(|call| !matches!(call.state, State::Prepared));
                if running {
                    self.violations.push(format!("{call_id} was dropped at its gate, and it had begun"));
                }
                sandbox.calls.remove(&call_id);
                sandbox.reports.push_back(Report::Aborted(call_id));
            }
            Request::Cancel(call_id, mode) => {
                if let Some(call) = sandbox.calls.get_mut(&call_id)
                    && let State::Running(cancel) = &mut call.state
                {
                    *cancel = Some(mode);
                }
            }
            Request::Acknowledge(call_id) => {
                let over = matches!(sandbox.calls.get(&call_id), Some(Held { state: State::Finished(_), .. }) | None);
                if !over {
                    self.violations.push(format!("{call_id} was acknowledged before its end"));
                }
                sandbox.calls.remove(&call_id);
                sandbox.forgotten.insert(call_id);
            }
            Request::Deadline(at) => sandbox.deadline_ns = at,
            Request::EndUnknown => {
                for call_id in std::mem::take(&mut sandbox.unknown) {
                    self.ended += 1;
                    sandbox.calls.remove(&call_id);
                    sandbox.forgotten.insert(call_id);
                }
            }
            Request::Close => {
                self.ended += 1;
                sandbox.close();
            }
        }
    }

    /// Whether the word to begin is on its way to a call.
    pub(super) fn is_about_to_begin(&self, call_id: &CallId) -> bool {
        let mut requests = self.sandboxes.values().flat_map(|sandbox| &sandbox.requests);
        requests.any(|request| matches!(request, Request::Go(other) if other == call_id))
    }

    /// What runs in one goes on: `draw` says how far.
    pub(super) fn proceed(&mut self, sandbox_id: &SandboxId, mut draw: impl FnMut(u64) -> u64) {
        let Some(sandbox) = self.sandboxes.get_mut(sandbox_id).filter(|sandbox| sandbox.alive) else { return };
        for (call_id, call) in &mut sandbox.calls {
            let State::Running(cancel) = call.state else { continue };
            call.produced = (call.produced + draw(call.total + 1)).min(call.total);
            if call.produced > 0 {
                sandbox.reports.push_back(Report::Advanced(call_id.clone(), call.produced));
            }
            let outcome = match cancel {
                Some(mode) => Outcome::Cancelled { mode, before_start: false, killed: false, code: 130 },
                None if call.produced == call.total && !call.hangs => Outcome::Exited { code: call.code },
                None => continue,
            };
            call.end(call_id, outcome, &mut sandbox.reports);
        }
    }

    /// Sandboxes whose time without a runner is over end.
    pub(super) fn expire(&mut self, now_ns: u64) {
        let over = |sandbox: &Sandbox| sandbox.alive && now_ns >= sandbox.deadline_ns;
        let ids: Vec<_> = self.sandboxes.iter().filter(|(_, one)| over(one)).map(|(id, _)| id.clone()).collect();
        for sandbox_id in ids {
            self.lose(&sandbox_id, "its time is over");
        }
    }

    pub(super) fn lose(&mut self, sandbox_id: &SandboxId, reason: &str) {
        let Some(sandbox) = self.sandboxes.get_mut(sandbox_id).filter(|sandbox| sandbox.alive) else { return };
        self.losses += 1;
        sandbox.alive = false;
        while let Some(request) = sandbox.requests.pop_front() {
            sandbox.unanswered(request);
        }
        sandbox.calls.clear();
        sandbox.reports.push_back(Report::Lost(reason.to_owned()));
    }

    /// The machine goes down.
    pub(super) fn power_cut(&mut self) {
        self.losses += 1;
        self.sandboxes.clear();
    }

    /// Nobody listens any more. What was sent is delivered up to `heard` requests of each; the rest is lost with the
    /// connection.
    pub(super) fn runner_died(&mut self, now_ns: u64, mut heard: impl FnMut(usize) -> usize) {
        let ids: Vec<_> = self.sandboxes.keys().cloned().collect();
        for sandbox_id in ids {
            let count = self.sandboxes.get(&sandbox_id).map_or(0, |sandbox| heard(sandbox.requests.len() + 1));
            for _ in 0..count {
                self.deliver(&sandbox_id, now_ns);
            }
            if let Some(sandbox) = self.sandboxes.get_mut(&sandbox_id) {
                sandbox.requests.clear();
                sandbox.reports.clear();
            }
        }
        self.sandboxes.retain(|_, sandbox| sandbox.alive);
    }

    /// A runner has what nobody counts on ended.
    pub(super) fn end_others(&mut self, wanted: &BTreeSet<SandboxId>) {
        self.ended += self.sandboxes.iter().filter(|(id, one)| one.alive && !wanted.contains(*id)).count() as u64;
        self.sandboxes.retain(|sandbox_id, _| wanted.contains(sandbox_id));
    }

    /// As `Sandboxes::attach` promises; `None` when there is no such sandbox, or it says what cannot be.
    pub(super) fn attach(
        &mut self,
        sandbox_id: &SandboxId,
        expected: &[(CallId, Gate, Option<std::time::Duration>)],
    ) -> Option<BTreeMap<CallId, FoundCall>> {
        let sandbox = self.sandboxes.get_mut(sandbox_id).filter(|sandbox| sandbox.alive)?;
        let is_open = |id: &CallId| expected.iter().any(|(expected, gate, _)| expected == id && *gate == Gate::Open);
        for (call_id, call) in &sandbox.calls {
            // One that is over may have been acknowledged, and the sandbox has not heard of it.
            if matches!(call.state, State::Running(_)) && !is_open(call_id) && !self.is_set_back {
                self.violations.push(format!("{call_id} has begun, and the next runner does not know of it"));
            }
        }
        sandbox.calls.retain(|id, call| is_open(id) || !matches!(call.state, State::Prepared));
        sandbox.unknown = sandbox.calls.keys().filter(|id| !is_open(id)).cloned().collect();
        if expected.iter().any(|(id, gate, _)| *gate == Gate::Held && sandbox.unknown.contains(id)) {
            return None;
        }
        let mut found = BTreeMap::new();
        for (call_id, ..) in expected {
            let Some(call) = sandbox.calls.get(call_id) else { continue };
            if !matches!(call.state, State::Prepared) {
                sandbox.reports.push_back(Report::Started(call_id.clone(), call.started_ns));
                sandbox.reports.push_back(Report::Advanced(call_id.clone(), call.produced));
            }
            let known = match &call.state {
                State::Prepared => FoundCall::Prepared,
                State::Running(_) => FoundCall::Running,
                State::Finished(end) => {
                    sandbox.reports.push_back(Report::Finished(call_id.clone(), end.clone()));
                    FoundCall::Finished
                }
            };
            found.insert(call_id.clone(), known);
        }
        Some(found)
    }

    fn read(&self, call_id: &CallId, stream: Stream, offset: u64, most: usize) -> Result<OutputChunk, ToolFailure> {
        let held = self.sandboxes.values().filter(|one| one.alive).find_map(|one| one.calls.get(call_id));
        let Some(call) = held else {
            return Err(ToolFailure::new(Code::OutputGone, "its sandbox is gone", "none"));
        };
        let to = call.produced.min(offset.saturating_add(most as u64));
        let end = matches!(call.state, State::Finished(_)) && to >= call.produced;
        Ok(OutputChunk { stream, offset, bytes: bytes(call_id, offset, to.max(offset)), end })
    }
}

impl Sandbox {
    fn close(&mut self) {
        let kill = Outcome::Cancelled { mode: CancelMode::Kill, before_start: false, killed: true, code: 137 };
        for (call_id, call) in &mut self.calls {
            if matches!(call.state, State::Running(_)) {
                call.end(call_id, kill.clone(), &mut self.reports);
            }
        }
        self.alive = false;
        while let Some(request) = self.requests.pop_front() {
            self.unanswered(request);
        }
        self.calls.clear();
        self.reports.push_back(Report::Closed);
    }

    /// Nobody is there to answer it.
    fn unanswered(&mut self, request: Request) {
        match request {
            Request::Prepare(call) => self.reports.push_back(Report::Unprepared(call.call_id)),
            Request::Abort(call_id) => self.reports.push_back(Report::Aborted(call_id)),
            // What is closed again was closed before.
            Request::Close => self.reports.push_back(Report::Closed),
            Request::Go(_)
            | Request::Cancel(..)
            | Request::Acknowledge(_)
            | Request::Deadline(_)
            | Request::EndUnknown => {}
        }
    }
}

impl Held {
    /// Its command is three numbers: bytes to print, exit code, and whether it waits for its cancel.
    fn new(call: &PreparedCall) -> Self {
        let ToolInput::Bash(BashInput { command: Some(command), .. }) = &call.input else {
            unreachable!("the simulation sends commands only");
        };
        let mut numbers = command.split(' ').map(|word| word.parse::<u16>().expect("a number"));
        let mut next = || numbers.next().expect("three numbers");
        let (total, code, hangs) = (u64::from(next()), i32::from(next()), next() > 0);
        Self { state: State::Prepared, total, code, hangs, produced: 0, started_ns: 0 }
    }

    fn end(&mut self, call_id: &CallId, outcome: Outcome, reports: &mut VecDeque<Report>) {
        let all = bytes(call_id, 0, self.produced);
        let mut end = CallEnd::without_output(outcome);
        end.streams.push(StreamSummary {
            stream: Stream::Stdout,
            total_bytes: self.produced,
            head_bytes: self.produced,
            tail_bytes: 0,
            sha256: Sha256::digest(&all).into(),
            inline: (self.produced <= INLINE).then_some(all),
            spool_path: String::new(),
        });
        self.state = State::Finished(Box::new(end.clone()));
        reports.push_back(Report::Finished(call_id.clone(), Box::new(end)));
    }
}

/// The output of what a host runs.
pub(super) struct HostOutputs(pub(super) Arc<Mutex<Host>>);

impl OutputSource for HostOutputs {
    fn read_output(
        &self,
        call_id: &CallId,
        stream: Stream,
        offset: u64,
        max_bytes: usize,
    ) -> BoxFuture<'static, Result<OutputChunk, ToolFailure>> {
        let chunk = self.0.lock().unwrap().read(call_id, stream, offset, max_bytes);
        Box::pin(std::future::ready(chunk))
    }
}
