//! One life of a runner: core, connector and journal, with a scheduler in place of the session loop and its tasks.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

use futures_util::FutureExt;

use super::host::{Host, HostOutputs, Report, Request};
use super::mistakes::Mistake;
use crate::connector::orchestrator::simulated::Connector;
use crate::connector::tls::Credentials;
use crate::journal::lossy::LossyJournal;
use crate::journal::{Journal, JournalError, JournalMemory, Record, Recovered};
use crate::session::core::{Action, Config, Core, Input};
use crate::session::registry::{Registry, Reserve};
use crate::work::*;

type Written = Result<(), JournalError>;

/// What was asked for and has not been done.
enum Pending {
    Write(BoxFuture<'static, Written>, Box<dyn FnOnce(Written) -> Input>),
    Create(SessionId),
    Attach { session_id: SessionId, sandbox_id: SandboxId, calls: Vec<(CallId, Gate, Option<std::time::Duration>)> },
}

/// A runner that lives.
pub(super) struct Life {
    pub(super) core: Core,
    pub(super) connector: Connector,
    pub(super) journal: Arc<LossyJournal>,
    host: Arc<Mutex<Host>>,
    pub(super) inputs: VecDeque<Input>,
    pending: VecDeque<Pending>,
    pub(super) sandboxes: BTreeMap<SessionId, SandboxId>,
    pub(super) calls: BTreeMap<CallId, SandboxId>,
    clock: fn() -> u64,
    /// What it does wrong.
    pub(super) mistake: Option<Mistake>,
    /// What it has told, for whoever compares lives.
    pub(super) told: Vec<Update>,
    /// When it has opened gates.
    pub(super) gates: Vec<(CallId, u64)>,
}

/// What a runner finds where it begins.
pub(super) struct Surroundings {
    pub(super) host: Arc<Mutex<Host>>,
    pub(super) instance: String,
    pub(super) credentials: Credentials,
    pub(super) clock: fn() -> u64,
    pub(super) mistake: Option<Mistake>,
}

const RESERVE: Reserve =
    Reserve { max_sessions: 64, memory_bytes: 1 << 40, disk_bytes: 1 << 40, pids: 1 << 20, descriptors: 1 << 16 };
const DEFAULTS: ResourceLimits =
    ResourceLimits { cpu_millis: 1000, memory_bytes: 1 << 28, disk_bytes: 1 << 28, pids: 128 };

impl Life {
    pub(super) fn begin(
        (journal, mut recovered): (Arc<LossyJournal>, Recovered),
        Surroundings { host, instance, credentials, clock, mistake }: Surroundings,
    ) -> Self {
        let memory = Arc::new(JournalMemory::new(Arc::clone(&journal) as Arc<dyn Journal>, &recovered));
        let outputs = Arc::new(HostOutputs(Arc::clone(&host)));
        let (memory, outputs) = match mistake {
            Some(mistake) => mistake.of_beginning(&mut recovered, memory, outputs),
            None => (memory as Arc<dyn Memory>, outputs as Arc<dyn OutputSource>),
        };
        let mut life = Self {
            core: Core::new(Config::default(), Registry::new(RESERVE, DEFAULTS)),
            connector: Connector::new(outputs, memory, instance, credentials, clock),
            journal,
            host,
            inputs: VecDeque::new(),
            pending: VecDeque::new(),
            sandboxes: BTreeMap::new(),
            calls: BTreeMap::new(),
            clock,
            mistake,
            told: Vec::new(),
            gates: Vec::new(),
        };
        life.handle(Input::Recovered(Box::new(recovered)));
        life
    }

    pub(super) fn host(&self) -> std::sync::MutexGuard<'_, Host> {
        self.host.lock().unwrap()
    }

    pub(super) fn handle(&mut self, input: Input) {
        self.inputs.push_back(input);
        while let Some(input) = self.inputs.pop_front() {
            for action in self.core.handle(input) {
                match self.mistake {
                    Some(mistake) => self.do_wrong(mistake, action),
                    None => self.execute(action),
                }
            }
        }
    }

    pub(super) fn tell(&mut self, update: Update) {
        self.told.push(update.clone());
        self.connector.tell(update);
    }

    /// The connector's next wish reaches the core.
    pub(super) fn work(&mut self) {
        let Some(item) = self.connector.work() else { return };
        let epoch_of = |id: &SessionId| {
            let mut sessions = self.core.sessions();
            sessions.find_map(|(open, epoch, ..)| (open.session_id == *id).then_some(epoch))
        };
        let item = match self.mistake {
            Some(mistake) => mistake.of_work(item, epoch_of),
            None => item,
        };
        self.handle(Input::Work(item));
    }

    pub(super) fn pending(&self) -> usize {
        self.pending.len()
    }

    /// One of the things that were asked for is done, if it can be by now.
    pub(super) fn finish(&mut self, which: usize) {
        let Some(pending) = self.pending.remove(which) else { return };
        match pending {
            Pending::Write(mut future, report) => match (&mut future).now_or_never() {
                Some(written) => {
                    let input = report(written);
                    self.handle(input);
                }
                None => self.pending.insert(which, Pending::Write(future, report)),
            },
            Pending::Create(session_id) => {
                let sandbox_id = self.host().create(session_id.clone());
                self.sandboxes.insert(session_id.clone(), sandbox_id.clone());
                self.handle(Input::SandboxReady { session_id, sandbox_id, receipt: Receipt::default() });
            }
            Pending::Attach { session_id, sandbox_id, calls } => {
                let found = self.host().attach(&sandbox_id, &calls);
                match found {
                    Some(found) => {
                        for call_id in found.keys() {
                            self.calls.insert(call_id.clone(), sandbox_id.clone());
                        }
                        self.sandboxes.insert(session_id.clone(), sandbox_id);
                        self.handle(Input::SandboxAttached { session_id, found, processes: Processes::Run });
                    }
                    None => self.handle(Input::SandboxLost { session_id, reason: "not there".into() }),
                }
            }
        }
    }

    /// The next report of a sandbox is heard, if it serves a session here.
    pub(super) fn hear(&mut self, sandbox_id: &SandboxId) {
        let Some(session_id) = self.sandboxes.iter().find(|(_, one)| *one == sandbox_id).map(|(id, _)| id.clone())
        else {
            return;
        };
        let report = self.host().sandboxes.get_mut(sandbox_id).and_then(|sandbox| sandbox.reports.pop_front());
        let Some(report) = report else { return };
        match report {
            Report::Prepared(call_id) => self.handle(Input::Prepared { call_id }),
            Report::Unprepared(call_id) => {
                let failure = ToolFailure::new(Code::SandboxLost, "its sandbox is gone", "none");
                self.handle(Input::PrepareFailed { call_id, failure });
            }
            Report::Aborted(call_id) => self.handle(Input::Aborted { call_id }),
            Report::Started(call_id, boottime_ns) => {
                self.handle(Input::Started { call_id, boottime_ns, shell_generation: 1 });
            }
            Report::Advanced(call_id, length) => {
                if self.core.request(&call_id).is_none() {
                    return;
                }
                let mut lengths = StreamLengths::default();
                lengths.advance(Stream::Stdout, length);
                self.tell(Update::OutputAdvanced { call_id, session_id, lengths });
            }
            Report::Finished(call_id, end) => {
                if self.core.request(&call_id).is_none() {
                    return;
                }
                let presented = ToolResult { is_error: false, content: vec![Content::Text("over".into())] };
                let recovered = self.core.is_restored(&call_id);
                let result = Arc::new(CallResult { end: *end, presented, recovered });
                self.handle(Input::Ended { call_id, result });
            }
            Report::Closed => self.handle(Input::SandboxClosed { session_id }),
            Report::Lost(reason) => self.handle(Input::SandboxLost { session_id, reason }),
        }
    }

    fn write(&mut self, record: Record, report: impl FnOnce(Written) -> Input + 'static) {
        let written = self.journal.append(record);
        self.pending.push_back(Pending::Write(written, Box::new(report)));
    }

    pub(super) fn execute(&mut self, action: Action) {
        match action {
            Action::Tell(update) => self.tell(update),
            Action::CreateSandbox(open) => self.pending.push_back(Pending::Create(open.session_id)),
            Action::AttachSandbox { session_id, sandbox_id, calls, .. } => {
                self.pending.push_back(Pending::Attach { session_id, sandbox_id, calls });
            }
            Action::EndUnknown { session_id: None } => self.end_others(),
            Action::EndUnknown { session_id: Some(session_id) } => self.end_unknown(&session_id),
            Action::ReleaseSandbox { session_id } => drop(self.sandboxes.remove(&session_id)),
            // Nobody waits for these.
            Action::Note(record) => drop(self.journal.append(record)),
            Action::Trim { call_id } => drop(self.journal.append(Record::Acknowledged { call_id })),
            Action::WriteReady { session_id, sandbox_id, receipt } => {
                let record = Record::SessionReady { session_id: session_id.clone(), sandbox_id, receipt };
                self.write(record, |written| Input::ReadyWritten { session_id, durable: written.is_ok() });
            }
            Action::WriteCancelled { call_id, epoch, phase, mode } => {
                let record = Record::Cancelled { call_id: call_id.clone(), mode };
                self.write(record, move |written| match written {
                    Err(error) if !error.is_final => {
                        Input::CancelRefused { call_id, epoch, phase, reason: error.reason }
                    }
                    written => Input::CancelWritten { call_id, epoch, phase, durable: written.is_ok() },
                });
            }
            Action::WriteAccepted(call) => {
                let call_id = call.call_id.clone();
                self.write(Record::Accepted(Box::new(call)), |written| Input::Accepted {
                    call_id,
                    durable: written.is_ok(),
                });
            }
            Action::WriteStarted { call_id } => {
                let record = Record::Started { call_id: call_id.clone() };
                self.write(record, |written| Input::StartWritten { call_id, durable: written.is_ok() });
            }
            Action::WriteEnded { session_id, epoch } => {
                let record = Record::SessionEnded { session_id: session_id.clone(), epoch };
                self.write(record, |written| Input::EndedWritten { session_id, durable: written.is_ok() });
            }
            Action::WriteFinished { call_id, result } => {
                let record = Record::Finished { call_id: call_id.clone(), result };
                self.write(record, |written| Input::EndWritten { call_id, durable: written.is_ok() });
            }
            Action::WriteResumed { call_id } => {
                let record = Record::Resumed { call_id: call_id.clone() };
                self.write(record, |written| Input::ResumeWritten { call_id, durable: written.is_ok() });
            }
            Action::Acknowledge { call_id } => {
                if let Some(sandbox_id) = self.calls.remove(&call_id) {
                    self.host().send(&sandbox_id, Request::Acknowledge(call_id));
                }
            }
            Action::Prepare { session_id, call } => match self.sandboxes.get(&session_id).cloned() {
                Some(sandbox_id) => {
                    self.calls.insert(call.call_id.clone(), sandbox_id.clone());
                    self.host().send(&sandbox_id, Request::Prepare(call));
                }
                None => {
                    let failure = ToolFailure::new(Code::SessionLost, "it has no sandbox any more", "none");
                    self.inputs.push_back(Input::PrepareFailed { call_id: call.call_id, failure });
                }
            },
            Action::Go { session_id, call_id } if self.lease_has_lapsed(&session_id) => {
                self.inputs.push_back(Input::GateKept { call_id });
            }
            Action::Go { session_id, call_id } => self.go(&session_id, call_id),
            Action::Abort { session_id, call_id } => self.send(&session_id, Request::Abort(call_id)),
            Action::Cancel { session_id, call_id, mode } => self.send(&session_id, Request::Cancel(call_id, mode)),
            Action::Deadline { session_id, boottime_ns } => self.send(&session_id, Request::Deadline(boottime_ns)),
            Action::CloseSandbox { session_id, .. } => self.send(&session_id, Request::Close),
            // No runner here panics, no call has a standard input or waits for a limited time, and no session rests.
            Action::DiscardSandbox { .. }
            | Action::Stdin { .. }
            | Action::Resize { .. }
            | Action::ArmStartDeadline { .. }
            | Action::ArmIdle { .. }
            | Action::Freeze { .. }
            | Action::Stop { .. }
            | Action::Thaw { .. } => {}
        }
    }

    /// Opens a gate.
    pub(super) fn go(&mut self, session_id: &SessionId, call_id: CallId) {
        self.gates.push((call_id.clone(), (self.clock)()));
        self.send(session_id, Request::Go(call_id));
    }

    fn lease_has_lapsed(&self, session_id: &SessionId) -> bool {
        self.core.lease_until_ns(session_id).is_some_and(|until_ns| (self.clock)() >= until_ns)
    }

    pub(super) fn end_unknown(&mut self, session_id: &SessionId) {
        let holds_some = |id: &SandboxId| self.host().sandboxes.get(id).is_some_and(|one| !one.unknown.is_empty());
        if self.sandboxes.get(session_id).is_some_and(holds_some) {
            self.send(session_id, Request::EndUnknown);
        }
    }

    pub(super) fn end_others(&mut self) {
        let attaching = self.pending.iter().filter_map(|pending| match pending {
            Pending::Attach { sandbox_id, .. } => Some(sandbox_id.clone()),
            Pending::Write(..) | Pending::Create(_) => None,
        });
        let wanted = attaching.chain(self.sandboxes.values().cloned()).collect();
        self.host().end_others(&wanted);
    }

    pub(super) fn send(&mut self, session_id: &SessionId, request: Request) {
        if let Some(sandbox_id) = self.sandboxes.get(session_id) {
            self.host().send(sandbox_id, request);
        }
    }
}
