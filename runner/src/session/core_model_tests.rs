//! The core against everything at once: random requests, random order of answers, losses and refusals.
//!
//! The model keeps no phases. It only watches what goes in and out, and checks the promises of the core: one preparation
//! and one opening of the gate per call, the gate only after both records, one outcome per accepted call, order within a
//! session, and bounds.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use proptest::prelude::*;

use super::core::{Action, Config, Core, IdlePolicy, Input};
use super::core_tests::{call, cancel, close, core, ended, open, sandbox_id, sid};
use crate::work::*;

const SESSIONS: [&str; 3] = ["s0", "s1", "s2"];

#[derive(Debug, Clone)]
enum Step {
    Open(usize),
    Call(usize, u8, u8),
    Cancel(usize, u8, CancelMode),
    Close(usize),
    Acknowledge(u8),
    Lose(usize),
    Suspend(bool),
    Drain(DrainMode),
    Deadline(u8),
    Idle(usize),
    /// Answers one of the open actions: which one, and whether well.
    Answer(usize, bool),
    End(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let mode = prop_oneof![Just(CancelMode::Interrupt), Just(CancelMode::Terminate), Just(CancelMode::Kill)];
    let drain = prop_oneof![Just(DrainMode::FinishCalls), Just(DrainMode::Undo), Just(DrainMode::FinishSessions)];
    prop_oneof![
        3 => (0..3_usize).prop_map(Step::Open),
        8 => (0..3_usize, 0..12_u8, 0..20_u8).prop_map(|(s, c, d)| Step::Call(s, c, u8::from(d == 0))),
        2 => (0..3_usize, 0..12_u8, mode).prop_map(|(s, c, m)| Step::Cancel(s, c, m)),
        1 => (0..3_usize).prop_map(Step::Close),
        3 => (0..12_u8).prop_map(Step::Acknowledge),
        1 => (0..3_usize).prop_map(Step::Lose),
        1 => any::<bool>().prop_map(Step::Suspend),
        1 => drain.prop_map(Step::Drain),
        1 => (0..12_u8).prop_map(Step::Deadline),
        4 => (0..3_usize).prop_map(Step::Idle),
        30 => (0..64_usize, prop::bool::weighted(0.97)).prop_map(|(n, ok)| Step::Answer(n, ok)),
        6 => (0..12_u8).prop_map(Step::End),
    ]
}

#[derive(Default)]
struct Model {
    epochs: BTreeMap<usize, u64>,
    next_epoch: u64,
    /// Actions that wait for an answer.
    open: Vec<Action>,
    accepted: BTreeSet<CallId>,
    start_written: BTreeSet<CallId>,
    prepared: BTreeSet<CallId>,
    gone: BTreeSet<CallId>,
    finished: BTreeMap<CallId, Outcome>,
    acknowledged: BTreeSet<CallId>,
    /// Sessions whose processes stand still, or are about to.
    frozen: BTreeSet<SessionId>,
    /// Sessions whose processes are ended, or are about to be.
    stopped: BTreeSet<SessionId>,
    arrival: BTreeMap<SessionId, Vec<CallId>>,
}

impl Model {
    fn watch(&mut self, actions: Vec<Action>, gated: bool) -> Result<(), TestCaseError> {
        for action in actions {
            match &action {
                Action::WriteAccepted(call) => {
                    prop_assert!(!self.acknowledged.contains(&call.call_id), "an acknowledged call was accepted again");
                    self.arrival.entry(call.session_id.clone()).or_default().push(call.call_id.clone());
                }
                Action::Freeze { session_id } => {
                    prop_assert!(self.frozen.insert(session_id.clone()), "{session_id} stopped twice");
                }
                Action::Stop { session_id } => {
                    prop_assert!(self.stopped.insert(session_id.clone()), "processes of {session_id} ended twice");
                }
                Action::Tell(Update::SessionEnded { session_id, .. }) => {
                    self.frozen.remove(session_id);
                    self.stopped.remove(session_id);
                }
                Action::Prepare { session_id, call } => {
                    prop_assert!(!self.rests(session_id), "{} given to a sandbox that stands still", call.call_id);
                    prop_assert!(self.prepared.insert(call.call_id.clone()), "{} prepared twice", call.call_id);
                    prop_assert!(gated || self.accepted.contains(&call.call_id), "ungated start before acceptance");
                    let order = self.arrival.get(session_id).cloned().unwrap_or_default();
                    let position = order.iter().position(|id| *id == call.call_id);
                    let later: Vec<_> = order.iter().skip(position.unwrap_or(0) + 1).collect();
                    prop_assert!(!later.iter().any(|id| self.prepared.contains(id)), "order of {session_id} is broken");
                }
                Action::Go { session_id, call_id } => {
                    prop_assert!(!self.rests(session_id), "{call_id} let go where everything stands still");
                    prop_assert!(self.gone.insert(call_id.clone()), "gate of {call_id} opened twice");
                    prop_assert!(self.accepted.contains(call_id) && self.start_written.contains(call_id));
                    prop_assert!(gated);
                }
                Action::WriteFinished { call_id, result } => {
                    let outcome = result.end.outcome.clone();
                    let nothing_ran =
                        matches!(outcome, Outcome::NeverStarted { .. } | Outcome::Cancelled { before_start: true, .. });
                    prop_assert!(
                        !(nothing_ran && self.gone.contains(call_id)),
                        "{call_id} ran, but its outcome denies it"
                    );
                    let before = self.finished.insert(call_id.clone(), outcome);
                    prop_assert!(before.is_none(), "{call_id} has two outcomes");
                }
                _ => {}
            }
            if answerable(&action) {
                self.open.push(action);
            }
        }
        Ok(())
    }

    fn rests(&self, session_id: &SessionId) -> bool {
        self.frozen.contains(session_id) || self.stopped.contains(session_id)
    }

    fn answer(&mut self, action: Action, well: bool, gated: bool) -> Option<Input> {
        Some(match action {
            Action::CreateSandbox(open) if well => Input::SandboxReady {
                session_id: open.session_id,
                sandbox_id: sandbox_id(),
                receipt: Receipt::default(),
            },
            Action::CreateSandbox(open) => {
                let failure = ToolFailure::new(Code::SandboxCreateFailed, "no", "none");
                Input::SandboxFailed { session_id: open.session_id, failure }
            }
            Action::WriteReady { session_id, .. } => Input::ReadyWritten { session_id, durable: well },
            Action::WriteEnded { session_id, .. } => Input::EndedWritten { session_id, durable: well },
            Action::WriteCancelled { call_id, epoch, phase, .. } => {
                Input::CancelWritten { call_id, epoch, phase, durable: true }
            }
            Action::CloseSandbox { session_id, .. } => Input::SandboxClosed { session_id },
            Action::WriteAccepted(call) => {
                self.accepted.insert(call.call_id.clone());
                Input::Accepted { call_id: call.call_id, durable: true }
            }
            Action::WriteStarted { call_id } => {
                self.start_written.insert(call_id.clone());
                // The acceptance is before it in the sequence.
                self.accepted.insert(call_id.clone());
                Input::StartWritten { call_id, durable: true }
            }
            Action::WriteFinished { call_id, .. } => Input::EndWritten { call_id, durable: true },
            Action::Prepare { call, .. } if well => {
                if !gated {
                    self.gone.insert(call.call_id.clone());
                }
                Input::Prepared { call_id: call.call_id }
            }
            Action::Prepare { call, .. } => {
                let failure = ToolFailure::new(Code::Internal, "no", "none");
                Input::PrepareFailed { call_id: call.call_id, failure }
            }
            Action::Abort { call_id, .. } => Input::Aborted { call_id },
            Action::Freeze { session_id } => Input::Frozen { session_id, result: answered(well) },
            Action::Stop { session_id } => Input::Stopped { session_id, result: answered(well) },
            Action::Thaw { session_id } => {
                // What could not be woken may be there in part, and its processes are ended again.
                if self.stopped.remove(&session_id) && !well {
                    self.frozen.insert(session_id.clone());
                }
                if well {
                    self.frozen.remove(&session_id);
                }
                Input::Thawed { session_id, result: answered(well) }
            }
            _ => return None,
        })
    }
}

fn answered(well: bool) -> Result<(), ToolFailure> {
    if well { Ok(()) } else { Err(ToolFailure::new(Code::SandboxCreateFailed, "no", "none")) }
}

fn answerable(action: &Action) -> bool {
    matches!(
        action,
        Action::CreateSandbox(_)
            | Action::CloseSandbox { .. }
            | Action::WriteReady { .. }
            | Action::WriteEnded { .. }
            | Action::WriteCancelled { .. }
            | Action::WriteAccepted(_)
            | Action::WriteStarted { .. }
            | Action::WriteFinished { .. }
            | Action::Prepare { .. }
            | Action::Abort { .. }
            | Action::Freeze { .. }
            | Action::Stop { .. }
            | Action::Thaw { .. }
    )
}

fn input_of(step: &Step, model: &mut Model, gated: bool) -> Option<Input> {
    let epoch = |model: &Model, session: &usize| model.epochs.get(session).copied().unwrap_or(0);
    // An id is used in one placement only: after its session has ended, nobody remembers it.
    let name = |model: &Model, session: &usize, call: &u8| format!("c{call}-{session}-{}", epoch(model, session));
    let pick = |ids: Vec<CallId>, number: &u8| ids.get(usize::from(*number) % ids.len().max(1)).cloned();
    Some(match step {
        Step::Open(session) => {
            model.next_epoch += 1;
            model.epochs.insert(*session, model.next_epoch);
            open(SESSIONS[*session], model.next_epoch)
        }
        Step::Call(session, id, digest) => {
            call(SESSIONS[*session], epoch(model, session), &name(model, session, id), *digest)
        }
        Step::Cancel(session, id, mode) => {
            cancel(SESSIONS[*session], epoch(model, session), &name(model, session, id), *mode)
        }
        Step::Close(session) => close(SESSIONS[*session], epoch(model, session)),
        Step::Acknowledge(number) => {
            let call_id = pick(model.finished.keys().cloned().collect(), number)?;
            let unwritten = |a: &Action| matches!(a, Action::WriteFinished { call_id: c, .. } if *c == call_id);
            if model.open.iter().any(unwritten) || !model.acknowledged.insert(call_id.clone()) {
                return None;
            }
            Input::Work(WorkItem::Acknowledge { call_id })
        }
        Step::Lose(session) => {
            let session_id = sid(SESSIONS[*session]);
            // A sandbox that is being made or closed reports that instead.
            let busy = |action: &Action| match action {
                Action::CreateSandbox(open) => open.session_id == session_id,
                Action::CloseSandbox { session_id: closing, .. } => *closing == session_id,
                _ => false,
            };
            if model.open.iter().any(busy) {
                return None;
            }
            Input::SandboxLost { session_id, reason: "gone".into() }
        }
        Step::Suspend(true) => Input::Work(WorkItem::Suspend { session_id: None }),
        Step::Suspend(false) => Input::Work(WorkItem::Resume { session_id: None }),
        Step::Drain(mode) => Input::Work(WorkItem::Drain { mode: *mode, by: DrainedBy::Orchestrator }),
        Step::Deadline(number) => {
            let known = model.arrival.values().flatten().cloned().collect();
            Input::StartDeadline { call_id: pick(known, number)? }
        }
        Step::Idle(session) => Input::IdlePassed { session_id: sid(SESSIONS[*session]) },
        Step::Answer(number, well) => {
            if model.open.is_empty() {
                return None;
            }
            let action = model.open.remove(number % model.open.len());
            return model.answer(action, *well, gated);
        }
        Step::End(number) => ended(pick(model.gone.iter().cloned().collect(), number)?.as_str()),
    })
}

fn check_bounds(core: &Core, config: &Config) -> Result<(), TestCaseError> {
    prop_assert!(core.queued_calls() <= config.queued_per_runner);
    prop_assert!(core.running_calls() <= config.running_per_runner);
    prop_assert!(core.queued_calls() + core.running_calls() <= core.open_calls());
    Ok(())
}

fn check(steps: &[Step], gated: bool) -> Result<(), TestCaseError> {
    let [freeze_after, stop_after, end_after] = [1, 2, 3].map(|seconds| Some(Duration::from_secs(seconds)));
    let idle = IdlePolicy { freeze_after, stop_after, end_after };
    let config =
        Config { gated, queued_per_session: 3, queued_per_runner: 5, running_per_runner: 2, idle, ..Config::default() };
    let mut core = core(config);
    let mut model = Model::default();
    for step in steps {
        if let Some(input) = input_of(step, &mut model, gated) {
            let actions = core.handle(input);
            model.watch(actions, gated)?;
            check_bounds(&core, &config)?;
        }
    }
    settle(&mut core, &mut model, gated)
}

/// Lets everything come to an end: then every accepted call has an outcome and nothing is left.
fn settle(core: &mut Core, model: &mut Model, gated: bool) -> Result<(), TestCaseError> {
    let drain = WorkItem::Drain { mode: DrainMode::Now, by: DrainedBy::Operator };
    let mut last: Vec<Input> = vec![Input::Work(WorkItem::Resume { session_id: None }), Input::Work(drain)];
    for _ in 0..2000 {
        let input = match last.pop() {
            Some(input) => input,
            None if model.open.is_empty() => break,
            None => {
                let action = model.open.remove(0);
                match model.answer(action, true, gated) {
                    Some(input) => input,
                    None => continue,
                }
            }
        };
        let actions = core.handle(input);
        model.watch(actions, gated)?;
    }
    prop_assert_eq!(core.sessions().count(), 0, "sessions are left");
    prop_assert_eq!((core.open_calls(), core.queued_calls(), core.running_calls()), (0, 0, 0));
    for call_id in &model.accepted {
        prop_assert!(model.finished.contains_key(call_id), "{} has no outcome", call_id);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn promises_hold_with_a_gate(steps in prop::collection::vec(step(), 1..250)) {
        check(&steps, true)?;
    }

    #[test]
    fn promises_hold_without_a_gate(steps in prop::collection::vec(step(), 1..250)) {
        check(&steps, false)?;
    }
}
