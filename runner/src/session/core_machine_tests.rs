//! The core against a reference: whoever places work, and knows what it has asked for and what it must get for that.
//!
//! The reference draws the requests, because they depend on what was asked before: a session is placed before a call is sent to
//! it, a call is sent before it is repeated, and nothing is asked while the link is lost. What the core asks of journal and
//! sandboxes is its own decision, so these answer by lot, in the `World` of `core_crash_tests`, which also checks what holds
//! over all lives of a runner. After each step the core is compared with the reference: it holds nothing that was not placed
//! or sent, a repeat runs nothing again, what is refused leaves no trace, nothing begins without a link or after a close, and
//! in the end every call that nobody and nothing has disturbed has run once, to its end, and all of its output is there.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proptest_state_machine::{ReferenceStateMachine, StateMachineTest, prop_state_machine};

use super::core::{Action, Core, Input};
use super::core_crash_tests::{World, config};
use super::core_tests::{call, cancel, cid, close, core, open, sid};
use crate::journal::MOST_STARTS;
use crate::work::*;

const SESSIONS: [&str; 2] = ["s0", "s1"];

/// What can happen. Calls are named by their place among all that were sent.
#[derive(Debug, Clone)]
enum Transition {
    /// A session is placed, or placed again as it is.
    Place(usize),
    /// A newer placement takes a session over.
    Replace(usize),
    Send(usize),
    /// A call is sent again; altered, when it asks for something else.
    Repeat(usize, bool),
    Cancel(usize, CancelMode),
    /// A call is cancelled that is sent later, if at all.
    CancelUnsent(usize),
    /// So much output of a call may be sent.
    Grant(usize, u64),
    /// The result of a call is stored, if it is there.
    Acknowledge(usize),
    /// A session is over, or was fenced by a placement elsewhere.
    Close(usize, bool),
    /// A placement that was replaced does not know it.
    CloseOlder(usize),
    Drain(DrainMode),
    Link(bool),
    /// The lease lapses unnoticed, or is renewed.
    Lapse(bool),
    /// One of the open actions is carried out and answered.
    Answer(usize),
    /// The start of a running call is reported.
    Start(usize),
    /// A running call writes so much.
    Write(usize, u64),
    /// A running call ends.
    End(usize),
    /// A session has had nothing to do for as long as it may.
    Idle(usize),
    /// The runner is killed: how much of what was not reported as durable is kept, which actions were carried out all the
    /// same, and whether the machine went down with it.
    Kill(usize, u64, bool),
}

/// A call that was sent, or that will be if somebody repeats it.
#[derive(Debug, Clone)]
struct Order {
    session: usize,
    epoch: u64,
    /// Something was asked or has happened since, so that it need not run to its end.
    is_disturbed: bool,
}

/// The reference: what was asked for.
#[derive(Debug, Clone)]
struct Caller {
    /// The highest placement so far.
    epoch: u64,
    placed: BTreeMap<usize, u64>,
    orders: Vec<Order>,
    is_linked: bool,
    kills: u32,
}

impl Caller {
    fn disturb(&mut self, which: impl Fn(&Order) -> bool) {
        self.orders.iter_mut().filter(|order| which(order)).for_each(|order| order.is_disturbed = true);
    }

    fn next_epoch(&mut self) -> u64 {
        self.epoch += 1;
        self.epoch
    }
}

impl ReferenceStateMachine for Caller {
    type State = Self;
    type Transition = Transition;

    fn init_state() -> BoxedStrategy<Self> {
        Just(Self { epoch: 1, placed: BTreeMap::new(), orders: Vec::new(), is_linked: true, kills: 0 }).boxed()
    }

    fn transitions(state: &Self) -> BoxedStrategy<Transition> {
        let mode = prop_oneof![Just(CancelMode::Interrupt), Just(CancelMode::Kill)];
        let drain = prop_oneof![
            2 => Just(DrainMode::FinishSessions),
            2 => Just(DrainMode::FinishCalls),
            1 => Just(DrainMode::Now),
            8 => Just(DrainMode::Undo),
        ];
        let world = prop_oneof![
            24 => (0..64_usize).prop_map(Transition::Answer),
            2 => (0..8_usize).prop_map(Transition::Start),
            3 => (0..8_usize, 1..100_u64).prop_map(|(n, bytes)| Transition::Write(n, bytes)),
            5 => (0..8_usize).prop_map(Transition::End),
            3 => (0..SESSIONS.len()).prop_map(Transition::Idle),
            1 => any::<bool>().prop_map(Transition::Lapse),
            2 => (0..8_usize, any::<u64>(), prop::bool::weighted(0.1)).prop_map(|(n, o, b)| Transition::Kill(n, o, b)),
        ];
        if !state.is_linked {
            return prop_oneof![3 => world, 1 => Just(Transition::Link(true))].boxed();
        }
        let session = 0..SESSIONS.len();
        let place = session.clone().prop_map(Transition::Place);
        let rest = prop_oneof![
            4 => drain.prop_map(Transition::Drain),
            4 => Just(Transition::Link(false)),
            2 => session.prop_map(Transition::CancelUnsent),
        ];
        let placed: Vec<_> = state.placed.keys().copied().collect();
        if placed.is_empty() {
            return prop_oneof![6 => place, 12 => world, 1 => rest].boxed();
        }
        let session = prop::sample::select(placed);
        let order = 0..state.orders.len().max(1);
        let of_sessions = prop_oneof![
            8 => session.clone().prop_map(Transition::Send),
            1 => session.clone().prop_map(Transition::Replace),
            1 => (session.clone(), any::<bool>()).prop_map(|(s, fenced)| Transition::Close(s, fenced)),
            1 => session.prop_map(Transition::CloseOlder),
        ];
        if state.orders.is_empty() {
            return prop_oneof![1 => place, 12 => of_sessions, 12 => world, 1 => rest].boxed();
        }
        let of_calls = prop_oneof![
            3 => (order.clone(), prop::bool::weighted(0.3)).prop_map(|(n, altered)| Transition::Repeat(n, altered)),
            2 => (order.clone(), mode).prop_map(|(n, mode)| Transition::Cancel(n, mode)),
            2 => (order.clone(), 1..200_u64).prop_map(|(n, bytes)| Transition::Grant(n, bytes)),
            3 => order.prop_map(Transition::Acknowledge),
        ];
        prop_oneof![1 => place, 9 => of_sessions, 9 => of_calls, 40 => world, 1 => rest].boxed()
    }

    fn preconditions(state: &Self, transition: &Transition) -> bool {
        let is_placed = |session: &usize| state.placed.contains_key(session);
        let is_sent = |order: &usize| *order < state.orders.len();
        match transition {
            Transition::Send(session)
            | Transition::Replace(session)
            | Transition::Close(session, _)
            | Transition::CloseOlder(session) => state.is_linked && is_placed(session),
            Transition::Repeat(order, _)
            | Transition::Cancel(order, _)
            | Transition::Grant(order, _)
            | Transition::Acknowledge(order) => state.is_linked && is_sent(order),
            Transition::Place(_) | Transition::CancelUnsent(_) | Transition::Drain(_) => state.is_linked,
            Transition::Link(up) => state.is_linked != *up,
            _ => true,
        }
    }

    fn apply(mut state: Self, transition: &Transition) -> Self {
        match transition {
            Transition::Place(session) if !state.placed.contains_key(session) => {
                let epoch = state.next_epoch();
                state.placed.insert(*session, epoch);
            }
            Transition::Replace(session) => {
                let epoch = state.next_epoch();
                state.placed.insert(*session, epoch);
            }
            Transition::Send(session) => {
                let epoch = state.placed.get(session).copied().unwrap_or(0);
                state.orders.push(Order { session: *session, epoch, is_disturbed: false });
            }
            Transition::CancelUnsent(session) => {
                let epoch = state.placed.get(session).copied().unwrap_or(state.epoch);
                state.orders.push(Order { session: *session, epoch, is_disturbed: true });
            }
            Transition::Cancel(order, _) => state.orders[*order].is_disturbed = true,
            Transition::Close(session, _) => {
                state.placed.remove(session);
                state.disturb(|order| order.session == *session);
            }
            Transition::Drain(DrainMode::Now) => state.disturb(|_| true),
            Transition::Link(up) => state.is_linked = *up,
            Transition::Kill(.., with_machine) => {
                state.kills += 1;
                state.is_linked = false;
                // A call that so many runners have died of is not tried again.
                if *with_machine || state.kills >= MOST_STARTS {
                    state.disturb(|_| true);
                }
            }
            _ => {}
        }
        state
    }
}

/// The core with what it stands on, and what has come of what was asked.
#[derive(Debug)]
struct Runner {
    core: Core,
    world: World,
    /// So much output of each call is stored.
    stored: BTreeMap<CallId, u64>,
    /// The machine went down, and took the output with it that was not stored.
    lost_machine: bool,
    /// Sessions that this process was told to end.
    closed: BTreeSet<SessionId>,
    is_linked: bool,
}

fn name(order: usize) -> CallId {
    cid(&format!("c{order}"))
}

fn send(caller: &Caller, order: usize, digest: u8) -> Input {
    let Order { session, epoch, .. } = caller.orders[order];
    call(SESSIONS[session], epoch, name(order).as_str(), digest)
}

fn is_refusal(action: &Action) -> bool {
    matches!(action, Action::Tell(Update::Refused { .. }))
}

impl Runner {
    fn feed(&mut self, input: Input) -> Vec<Action> {
        let actions = self.core.handle(input);
        for action in &actions {
            match action {
                Action::Go { session_id, call_id } => {
                    assert!(self.is_linked, "{call_id} begins without a link");
                    assert!(!self.closed.contains(session_id), "{call_id} begins in a session that was closed");
                }
                Action::Tell(Update::SessionEnded { session_id, .. }) => drop(self.closed.remove(session_id)),
                _ => {}
            }
        }
        self.world.take(actions.clone()).unwrap();
        actions
    }

    fn feed_all(&mut self, inputs: Vec<Input>) {
        for input in inputs {
            self.feed(input);
        }
    }

    /// What is refused is told, and that is all.
    fn ask(&mut self, input: Input) -> Vec<Action> {
        let before = format!("{:?}", self.core);
        let actions = self.feed(input);
        if actions.iter().any(is_refusal) {
            assert_eq!(actions.len(), 1, "more than a refusal");
            assert_eq!(format!("{:?}", self.core), before, "a request that was refused has left a trace");
        }
        actions
    }

    fn repeat(&mut self, caller: &Caller, order: usize, altered: bool) {
        let id = name(order);
        let held = self.core.request(&id).map(|request| request.digest);
        let was_acknowledged = self.world.acknowledged.contains(&id);
        let digest = u8::from(altered);
        let actions = self.ask(send(caller, order, digest));
        let is_told = |action: &Action| {
            matches!(
                action,
                Action::Tell(Update::CallAccepted { replay: Replay::Duplicate, .. } | Update::CallFinished { .. })
            )
        };
        match held {
            Some(held) if held != RequestDigest([digest; 32]) => {
                let reused = |action: &Action| matches!(action, Action::Tell(Update::Refused { failure, .. }) if failure.code == Code::CallIdReused);
                assert!(
                    actions.iter().all(reused) && actions.len() == 1,
                    "{id} was used for something else: {actions:?}"
                );
            }
            Some(_) => assert!(actions.iter().all(is_told), "a repeat of {id} is more than answered: {actions:?}"),
            None if was_acknowledged => assert!(actions.iter().all(is_refusal), "{id} is over, and is taken again"),
            None => {}
        }
    }

    /// Output arrives in order, from where the last piece has ended.
    fn read(&mut self, call_id: &CallId, most: u64) {
        let stored = self.stored.entry(call_id.clone()).or_default();
        let written = self.world.outputs.get(call_id).copied().unwrap_or(0);
        *stored = written.min(stored.saturating_add(most)).max(*stored);
    }

    /// The result of a call is stored, with the output that is left.
    fn acknowledge(&mut self, call_id: &CallId) {
        let acknowledge = Input::Work(WorkItem::Acknowledge { call_id: call_id.clone() });
        let Some(end) = self.world.told.get(call_id).cloned() else {
            let before = format!("{:?}", self.core);
            assert!(self.feed(acknowledge).is_empty(), "{call_id} has no end, and an acknowledgement of it is obeyed");
            return assert_eq!(format!("{:?}", self.core), before);
        };
        self.read(call_id, u64::MAX);
        let total: u64 = end.streams.iter().map(|summary| summary.total_bytes).sum();
        let stored = self.stored[call_id];
        if matches!(end.outcome, Outcome::Exited { .. }) && stored != total {
            assert!(stored < total && self.lost_machine, "{stored} of {total} bytes of {call_id} are there");
        }
        self.world.acknowledged.insert(call_id.clone());
        self.feed(acknowledge);
    }

    fn link(&mut self, up: bool) {
        self.is_linked = up;
        if !up {
            return drop(self.feed(Input::Work(WorkItem::Suspend { session_id: None })));
        }
        let held: Vec<_> = self.core.sessions().map(|(open, ..)| open.session_id.clone()).collect();
        self.feed(Input::Work(WorkItem::Resume { session_id: None }));
        for session_id in held {
            self.feed(Input::Work(WorkItem::Resume { session_id: Some(session_id) }));
        }
    }

    fn kill(&mut self, kept: usize, done: u64, with_machine: bool) {
        let recovered = self.world.kill(kept, done, with_machine).unwrap();
        self.core = core(config());
        self.closed.clear();
        self.is_linked = false;
        self.lost_machine |= with_machine;
        self.feed(Input::Recovered(Box::new(recovered)));
    }

    /// Everything is answered, and every call ends.
    fn settle(&mut self) {
        for _ in 0..10_000 {
            let inputs = if self.world.open.is_empty() {
                self.world.end(0)
            } else {
                let action = self.world.open.remove(0);
                self.world.answer(action).unwrap()
            };
            if inputs.is_empty() && self.world.open.is_empty() {
                return;
            }
            self.feed_all(inputs);
        }
        panic!("it does not come to rest");
    }

    fn renew(&mut self) {
        let renewed = self.world.renew();
        self.feed(renewed);
    }

    fn step(&mut self, caller: &Caller, transition: Transition) {
        let epoch = |session: usize| caller.placed.get(&session).copied().unwrap_or(0);
        match transition {
            Transition::Place(session) | Transition::Replace(session) => {
                self.ask(open(SESSIONS[session], epoch(session)));
            }
            Transition::Send(_) => {
                let order = caller.orders.len() - 1;
                self.ask(send(caller, order, 0));
            }
            Transition::Repeat(order, altered) => self.repeat(caller, order, altered),
            Transition::Cancel(order, mode) => {
                let Order { session, epoch: sent, .. } = caller.orders[order];
                let epoch = caller.placed.get(&session).copied().unwrap_or(sent);
                self.ask(cancel(SESSIONS[session], epoch, name(order).as_str(), mode));
            }
            Transition::CancelUnsent(session) => {
                let order = caller.orders.len() - 1;
                let epoch = caller.orders[order].epoch;
                self.ask(cancel(SESSIONS[session], epoch, name(order).as_str(), CancelMode::Terminate));
            }
            Transition::Grant(order, bytes) => self.read(&name(order), bytes),
            Transition::Acknowledge(order) => self.acknowledge(&name(order)),
            Transition::Close(session, fenced) => {
                let session_id = sid(SESSIONS[session]);
                let found = self.core.sessions().find(|(open, ..)| open.session_id == session_id);
                let Some(epoch) = found.map(|(_, epoch, ..)| epoch) else { return };
                let grace = std::time::Duration::ZERO;
                let close = SessionClose { session_id: session_id.clone(), epoch, grace, fenced };
                self.closed.insert(session_id);
                self.ask(Input::Work(WorkItem::Close(close)));
            }
            Transition::CloseOlder(session) => {
                // Of what was only asked for the next runner may know nothing.
                let newest = self.world.opened.get(&sid(SESSIONS[session])).copied().unwrap_or(1);
                let actions = self.ask(close(SESSIONS[session], newest - 1));
                assert!(actions.iter().all(is_refusal), "a placement that was replaced is obeyed: {actions:?}");
            }
            Transition::Drain(mode) => {
                self.feed(Input::Work(WorkItem::Drain { mode, by: DrainedBy::Orchestrator }));
            }
            Transition::Link(up) => self.link(up),
            Transition::Lapse(true) => self.world.lapsed = true,
            Transition::Lapse(false) => self.renew(),
            Transition::Answer(number) => {
                if !self.world.open.is_empty() {
                    let action = self.world.open.remove(number % self.world.open.len());
                    let inputs = self.world.answer(action).unwrap();
                    self.feed_all(inputs);
                }
            }
            Transition::Start(number) => {
                let inputs = self.world.start(number);
                self.feed_all(inputs);
            }
            Transition::Write(number, bytes) => self.world.write(number, bytes),
            Transition::End(number) => {
                let inputs = self.world.end(number);
                self.feed_all(inputs);
            }
            Transition::Idle(session) => {
                self.feed(Input::IdlePassed { session_id: sid(SESSIONS[session]) });
            }
            Transition::Kill(kept, done, with_machine) => self.kill(kept, done, with_machine),
        }
    }
}

impl StateMachineTest for Runner {
    type SystemUnderTest = Self;
    type Reference = Caller;

    fn init_test(_: &Caller) -> Self {
        Self {
            core: core(config()),
            world: World::default(),
            stored: BTreeMap::new(),
            lost_machine: false,
            closed: BTreeSet::new(),
            is_linked: true,
        }
    }

    fn apply(mut runner: Self, caller: &Caller, transition: Transition) -> Self {
        runner.step(caller, transition);
        runner
    }

    fn check_invariants(runner: &Self, caller: &Caller) {
        for (open, epoch, ..) in runner.core.sessions() {
            assert!(epoch <= caller.epoch, "{} has a placement that nobody gave it", open.session_id);
        }
        let orders: BTreeMap<_, _> = caller.orders.iter().enumerate().map(|(n, order)| (name(n), order)).collect();
        for (request, _) in runner.core.calls() {
            let order = orders.get(&request.call_id);
            let session = order.map(|order| SESSIONS[order.session]);
            assert_eq!(session, Some(request.session_id.as_str()), "{} was never sent", request.call_id);
        }
        for call_id in runner.world.begun.keys() {
            assert!(orders.contains_key(call_id), "{call_id} began, and was never sent");
        }
        let core = &runner.core;
        assert!(core.queued_calls() + core.running_calls() <= core.open_calls());
    }

    /// Everything comes to its end, and each call to the one that it must have.
    fn teardown(mut runner: Self, caller: Caller) {
        runner.feed(Input::Work(WorkItem::Drain { mode: DrainMode::Undo, by: DrainedBy::Orchestrator }));
        runner.link(true);
        for _ in 0..2 {
            runner.renew();
            runner.settle();
        }
        for (number, order) in caller.orders.iter().enumerate() {
            let id = name(number);
            let begun = runner.world.begun.get(&id).copied().unwrap_or(0);
            let end = runner.world.told.get(&id);
            let is_accepted = runner.world.accepted.contains(&id);
            assert!(end.is_some() || (begun == 0 && !is_accepted), "{id} was taken, and has no end");
            let has_run = end.is_some_and(|end| matches!(end.outcome, Outcome::Exited { .. })) && begun == 1;
            let is_disturbed = order.is_disturbed || runner.world.cut_off.contains(&sid(SESSIONS[order.session]));
            assert!(has_run || is_disturbed || !is_accepted, "nobody has disturbed {id}, and it ended as {end:?}");
            runner.acknowledge(&id);
        }
        assert_eq!(runner.core.calls().count(), 0, "what was acknowledged is still there");
        runner.feed(Input::Work(WorkItem::Drain { mode: DrainMode::Now, by: DrainedBy::Operator }));
        runner.settle();
        assert_eq!(runner.core.sessions().count(), 0, "what was drained is still there");
    }
}

prop_state_machine! {
    #![proptest_config(ProptestConfig { cases: 600, max_shrink_iters: 4000, ..ProptestConfig::default() })]

    #[test]
    fn core_gives_what_was_asked_for_once_whoever_dies_meanwhile(sequential 1..160 => Runner);
}
