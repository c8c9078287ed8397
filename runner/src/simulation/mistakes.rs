//! Runners that do something wrong on purpose, so that the oracle is known to see it. Each mistake is a small one, of the kind
//! that a change of the code could bring. Nothing of it is in the code that is simulated: it is put between the core and what
//! carries out its actions, between the connector and what it remembers or reads, or into the disk.

use std::sync::Arc;
use std::time::Duration;

use super::host::Request;
use super::life::Life;
use super::lots::Fault;
use crate::journal::{Journal, Record, Recovered};
use crate::session::core::{Action, Input};
use crate::work::*;

/// Worlds in which a mistake must be found.
const WORLDS: u64 = 60;

/// What a runner does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mistake {
    /// A call is confirmed before its record is on the disk.
    AcceptedBeforeWritten,
    /// A gate is opened before the record of the start is on the disk.
    StartedBeforeWritten,
    /// A gate is opened as soon as there is a call behind it.
    GateOpenedUnasked,
    /// A result is told before its record is on the disk.
    EndedBeforeWritten,
    /// The disk says that it has synced, and has not.
    NothingIsSynced,
    /// The next runner does not know which calls were acknowledged.
    DuplicatesForgotten,
    /// A result is told a second time, and it is another one.
    AnsweredInTwoWays,
    /// Output is read one byte too far.
    OutputShifted,
    /// Nobody looks at the lease when a gate is opened.
    LeaseNotCheckedAtGate,
    /// The next runner does not know which term was obeyed.
    TermForgotten,
    /// The next runner uses numbers of events again.
    NumbersUsedAgain,
    /// That a result was acknowledged is written down when it is told.
    ForgottenBeforeAcknowledged,
    /// A sandbox may forget a call before the record of its end is on the disk.
    SandboxForgetsTooEarly,
    /// What an earlier placement of a session asks for is done.
    OlderPlacementObeyed,
    /// A call that may have run is said never to have begun.
    LossToldAsNeverStarted,
    /// A result that an earlier runner has left is not told.
    ResultNotToldAgain,
    /// What the journal does not know is ended before anybody was asked.
    UnknownEndedAtOnce,
}

const MISTAKES: [Mistake; 17] = [
    Mistake::AcceptedBeforeWritten,
    Mistake::StartedBeforeWritten,
    Mistake::GateOpenedUnasked,
    Mistake::EndedBeforeWritten,
    Mistake::NothingIsSynced,
    Mistake::DuplicatesForgotten,
    Mistake::AnsweredInTwoWays,
    Mistake::OutputShifted,
    Mistake::LeaseNotCheckedAtGate,
    Mistake::TermForgotten,
    Mistake::NumbersUsedAgain,
    Mistake::ForgottenBeforeAcknowledged,
    Mistake::SandboxForgetsTooEarly,
    Mistake::OlderPlacementObeyed,
    Mistake::LossToldAsNeverStarted,
    Mistake::ResultNotToldAgain,
    Mistake::UnknownEndedAtOnce,
];

impl Mistake {
    /// What has to happen for it to matter.
    pub(super) fn needs(self) -> &'static [Fault] {
        match self {
            Self::AcceptedBeforeWritten
            | Self::StartedBeforeWritten
            | Self::GateOpenedUnasked
            | Self::NumbersUsedAgain
            | Self::SandboxForgetsTooEarly
            | Self::ResultNotToldAgain => &[Fault::RunnerDies],
            Self::EndedBeforeWritten | Self::NothingIsSynced => &[Fault::PowerCut],
            Self::DuplicatesForgotten => &[Fault::RunnerDies, Fault::SentAgain],
            Self::AnsweredInTwoWays | Self::OutputShifted => &[],
            Self::LeaseNotCheckedAtGate => &[Fault::TimeJump],
            Self::TermForgotten => &[Fault::RunnerDies, Fault::FailOver],
            Self::ForgottenBeforeAcknowledged => &[Fault::RunnerDies, Fault::Cut],
            Self::OlderPlacementObeyed => &[Fault::OlderPlacement],
            Self::LossToldAsNeverStarted => &[Fault::SandboxDies],
            Self::UnknownEndedAtOnce => &[Fault::SetBack],
        }
    }

    /// What a runner knows, remembers and reads from its beginning on.
    pub(super) fn of_beginning(
        self,
        recovered: &mut Recovered,
        memory: Arc<dyn Memory>,
        outputs: Arc<dyn OutputSource>,
    ) -> (Arc<dyn Memory>, Arc<dyn OutputSource>) {
        match self {
            Self::DuplicatesForgotten => {
                recovered.tombstones.clear();
                recovered.sessions.iter_mut().for_each(|session| session.acknowledged.clear());
                (memory, outputs)
            }
            Self::TermForgotten | Self::NumbersUsedAgain => {
                (Arc::new(Forgetful { memory, term: self == Self::TermForgotten }), outputs)
            }
            Self::OutputShifted => (memory, Arc::new(Shifted(outputs))),
            _ => (memory, outputs),
        }
    }

    /// What is asked of the sessions.
    pub(super) fn of_work(self, item: WorkItem, epoch_of: impl Fn(&SessionId) -> Option<u64>) -> WorkItem {
        match item {
            WorkItem::Close(close) if self == Self::OlderPlacementObeyed => {
                let epoch = epoch_of(&close.session_id).unwrap_or(close.epoch);
                WorkItem::Close(SessionClose { epoch, ..close })
            }
            item => item,
        }
    }
}

impl Life {
    /// Carries out an action as a runner that makes this mistake would.
    pub(super) fn do_wrong(&mut self, mistake: Mistake, action: Action) {
        match (mistake, action) {
            (Mistake::AcceptedBeforeWritten, Action::WriteAccepted(call)) => {
                let call_id = call.call_id.clone();
                self.write_unseen(Record::Accepted(Box::new(call)), Input::Accepted { call_id, durable: true });
            }
            (Mistake::StartedBeforeWritten, Action::WriteStarted { call_id }) => {
                let record = Record::Started { call_id: call_id.clone() };
                self.write_unseen(record, Input::StartWritten { call_id, durable: true });
            }
            (Mistake::EndedBeforeWritten, Action::WriteFinished { call_id, result }) => {
                let record = Record::Finished { call_id: call_id.clone(), result };
                self.write_unseen(record, Input::EndWritten { call_id, durable: true });
            }
            (Mistake::GateOpenedUnasked, Action::Prepare { session_id, call }) => {
                let call_id = call.call_id.clone();
                self.execute(Action::Prepare { session_id: session_id.clone(), call });
                self.go(&session_id, call_id);
            }
            (Mistake::LeaseNotCheckedAtGate, Action::Go { session_id, call_id }) => self.go(&session_id, call_id),
            (Mistake::AnsweredInTwoWays, Action::Tell(Update::CallFinished { call_id, session_id, epoch, result }))
                if matches!(result.end.outcome, Outcome::Exited { .. }) =>
            {
                let told = Update::CallFinished { call_id, session_id, epoch, result };
                self.execute(Action::Tell(told.clone()));
                self.execute(Action::Tell(with_outcome(told, |_| Outcome::Exited { code: 99 })));
            }
            (Mistake::LossToldAsNeverStarted, Action::Tell(told @ Update::CallFinished { .. })) => {
                self.execute(Action::Tell(with_outcome(told, |outcome| match outcome {
                    Outcome::Indeterminate { failure } => Outcome::NeverStarted { failure, code: 125 },
                    outcome => outcome,
                })));
            }
            (Mistake::ResultNotToldAgain, Action::Tell(Update::CallFinished { call_id, .. }))
                if self.core.is_restored(&call_id) => {}
            (Mistake::ForgottenBeforeAcknowledged, Action::Tell(told @ Update::CallFinished { .. })) => {
                if let Update::CallFinished { call_id, .. } = &told {
                    drop(self.journal.append(Record::Acknowledged { call_id: call_id.clone() }));
                }
                self.execute(Action::Tell(told));
            }
            (Mistake::SandboxForgetsTooEarly, Action::WriteFinished { call_id, result }) => {
                if let Some(sandbox_id) = self.calls.remove(&call_id) {
                    self.host().send(&sandbox_id, Request::Acknowledge(call_id.clone()));
                }
                self.execute(Action::WriteFinished { call_id, result });
            }
            (Mistake::UnknownEndedAtOnce, Action::Tell(Update::Restored)) => {
                self.end_others();
                for session_id in self.sandboxes.keys().cloned().collect::<Vec<_>>() {
                    self.end_unknown(&session_id);
                }
                self.execute(Action::Tell(Update::Restored));
            }
            (_, action) => self.execute(action),
        }
    }

    /// Nobody waits for the record.
    fn write_unseen(&mut self, record: Record, written: Input) {
        drop(self.journal.append(record));
        self.inputs.push_back(written);
    }
}

fn with_outcome(told: Update, change: impl FnOnce(Outcome) -> Outcome) -> Update {
    let Update::CallFinished { call_id, session_id, epoch, result } = told else { return told };
    let mut result = CallResult::clone(&result);
    result.end.outcome = change(result.end.outcome);
    Update::CallFinished { call_id, session_id, epoch, result: Arc::new(result) }
}

/// Remembers all but one thing.
struct Forgetful {
    memory: Arc<dyn Memory>,
    /// The term; otherwise the numbers of events.
    term: bool,
}

impl Memory for Forgetful {
    fn events_through(&self) -> u64 {
        if self.term { self.memory.events_through() } else { 0 }
    }

    fn term(&self) -> u64 {
        if self.term { 0 } else { self.memory.term() }
    }

    fn is_after_reboot(&self) -> bool {
        self.memory.is_after_reboot()
    }

    fn trouble(&self) -> (Option<Trouble>, Duration) {
        self.memory.trouble()
    }

    fn reserve_events(&self, through: u64) -> BoxFuture<'static, bool> {
        self.memory.reserve_events(through)
    }

    fn obey(&self, term: u64) -> BoxFuture<'static, bool> {
        self.memory.obey(term)
    }
}

/// Reads one byte too far.
struct Shifted(Arc<dyn OutputSource>);

impl OutputSource for Shifted {
    fn read_output(
        &self,
        call_id: &CallId,
        stream: Stream,
        offset: u64,
        most: usize,
    ) -> BoxFuture<'static, Result<OutputChunk, ToolFailure>> {
        let read = self.0.read_output(call_id, stream, offset + 1, most);
        Box::pin(async move { read.await.map(|chunk| OutputChunk { offset, ..chunk }) })
    }
}

#[test]
#[allow(clippy::print_stdout, reason = "how soon each is found is of interest")]
fn every_mistake_is_found_and_the_same_worlds_without_it_are_good() {
    let mut unfound = Vec::new();
    for mistake in MISTAKES {
        let found = (1..=WORLDS).find_map(|seed| Some((seed, super::run_making(seed, mistake).err()?)));
        let Some((seed, problem)) = found else {
            unfound.push(mistake);
            continue;
        };
        println!("{mistake:?}: world {seed}: {}", problem.split("; faults").next().unwrap_or_default());
        if let Err(problem) = super::run_with(seed, mistake.needs()) {
            panic!("world {seed} of {mistake:?} fails without it: {problem}");
        }
    }
    assert!(unfound.is_empty(), "nobody has noticed {unfound:?} in {WORLDS} worlds each");
}
