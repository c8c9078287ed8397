//! What process 1 says it holds, beside what an earlier runner has left word of. Pure.
//!
//! The answer has a place in the stream of events: a call that was heard of before it must be in it, with a phase that can
//! follow. A call whose gate nobody wrote down to have been opened must not have run; that it is said to have is told apart
//! from other contradictions, because then its outcome is unknown and not "never started".

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use proto::init::v1 as wire;

use super::calls::{AddError, CallRecord, CallTable, MOST_CALLS, Origin, Phase};
use super::decode;
use super::violation::Violation;
use crate::work::{CallId, ExpectedCall, FoundCall, Gate, Slot, StreamLengths};

const EVENT: &str = "snapshot";
/// Call slots of one sandbox: process 1 makes no more.
const MOST_SLOTS: usize = 256;
/// Process 1 names no more of one slot.
const MOST_PIDS: usize = 64;

/// One call as process 1 shows it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct SeenCall {
    call_id: String,
    phase: FoundCall,
    lengths: StreamLengths,
}

/// What is done about a call that nobody knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Disposal {
    /// It has not begun.
    Abort,
    /// It runs.
    Kill,
    /// It is over, and its end was heard.
    Acknowledge,
}

/// What there is in a sandbox that is taken over.
#[derive(Debug, Default)]
pub(super) struct Settled {
    /// Expected and there.
    pub(super) found: HashMap<String, FoundCall>,
    /// Must be over in that time, and nobody watches yet that it is.
    pub(super) open: Vec<(String, Duration)>,
}

/// Checks an answer. What else it says of streams comes again with the end of the call.
///
/// # Errors
/// [`Violation`] for what cannot be.
pub(super) fn decode(reply: &wire::SnapshotReply) -> Result<Vec<SeenCall>, Violation> {
    if reply.calls.len() > MOST_CALLS {
        return Err(Violation::impossible("snapshot.calls", format!("{} calls", reply.calls.len())));
    }
    let mut ids = HashSet::new();
    let mut seen = Vec::new();
    for call in &reply.calls {
        if CallId::new(&call.call_id).is_err() || !ids.insert(&call.call_id) {
            return Err(Violation::impossible("snapshot.call_id", &call.call_id));
        }
        let phase = match wire::CallPhase::try_from(call.phase) {
            Ok(wire::CallPhase::Prepared) => FoundCall::Prepared,
            Ok(wire::CallPhase::Running) => FoundCall::Running,
            Ok(wire::CallPhase::Finished) => FoundCall::Finished,
            Ok(wire::CallPhase::Unspecified) | Err(_) => {
                return Err(Violation::impossible("snapshot.phase", call.phase));
            }
        };
        let length = |summary: &wire::StreamSummary| wire::StreamLength {
            stream: summary.stream,
            total_bytes: summary.total_bytes,
        };
        let lengths = decode::lengths(&call.streams.iter().map(length).collect::<Vec<_>>())?;
        if phase == FoundCall::Prepared && lengths != StreamLengths::default() {
            return Err(Violation::impossible("snapshot.streams", "output before the start"));
        }
        seen.push(SeenCall { call_id: call.call_id.clone(), phase, lengths });
    }
    Ok(seen)
}

/// The processes that calls have left behind, as they are named in an answer.
///
/// # Errors
/// [`Violation`] for what cannot be.
pub(super) fn slots(reply: &wire::SnapshotReply) -> Result<Vec<Slot>, Violation> {
    if reply.slots.len() > MOST_SLOTS {
        return Err(Violation::impossible("snapshot.slots", format!("{} slots", reply.slots.len())));
    }
    let slot = |slot: &wire::SlotState| {
        let call_id =
            CallId::new(&slot.call_id).map_err(|_| Violation::impossible("snapshot.slots.call_id", &slot.call_id))?;
        if slot.pids.len() > MOST_PIDS {
            return Err(Violation::impossible("snapshot.slots.pids", format!("{} pids", slot.pids.len())));
        }
        Ok(Slot { call_id, pids: slot.pids.clone() })
    };
    reply.slots.iter().map(slot).collect()
}

impl CallTable {
    /// The table of a sandbox that is about to be taken over with these calls.
    ///
    /// # Errors
    /// [`AddError`].
    pub(super) fn expecting(calls: Vec<ExpectedCall>) -> Result<Self, AddError> {
        let mut table = Self { is_unsettled: true, keeps_strangers: true, ..Self::default() };
        for call in calls {
            let (phase, recorded) = match call.gate {
                Gate::Held => (Phase::Held, false),
                Gate::Open => (Phase::Released, true),
            };
            let record = CallRecord {
                time_limit: call.time_limit,
                observer: Some(call.observer),
                ..CallRecord::new(phase, Origin::Earlier { recorded })
            };
            // Not bounded like calls that are made here: most of them may never have reached the sandbox, and what it does
            // not know is forgotten when that is settled.
            if table.calls.insert(call.call_id.to_string(), record).is_some() {
                return Err(AddError::Duplicate);
            }
        }
        Ok(table)
    }

    /// Compares what is expected, and what was heard since the greeting, with what there is. Afterwards the table holds what
    /// there is and nothing else.
    ///
    /// # Errors
    /// [`Violation`] when not all of it can be true.
    pub(super) fn settle(&mut self, seen: Vec<SeenCall>) -> Result<Settled, Violation> {
        self.is_unsettled = false;
        let named: HashSet<&str> = seen.iter().map(|call| call.call_id.as_str()).collect();
        // Nobody but us could have made process 1 forget it meanwhile.
        if self.calls.iter().any(|(call_id, record)| !named.contains(call_id.as_str()) && record.was_heard_of()) {
            return Err(Violation::WrongPhase { event: EVENT });
        }
        self.calls.retain(|call_id, _| named.contains(call_id.as_str()));
        let mut settled = Settled::default();
        for SeenCall { call_id, phase, lengths } in seen {
            let stranger = || CallRecord::new(Phase::Released, Origin::Stranger);
            let record = self.calls.entry(call_id.clone()).or_insert_with(stranger);
            record.settle(&call_id, phase, &lengths)?;
            let is_stranger = record.origin == Origin::Stranger;
            let limit = match (phase, record.phase) {
                (FoundCall::Prepared, _) | (_, Phase::Finished) => None,
                // Its end is as good as told.
                (FoundCall::Finished, _) => Some(Duration::ZERO),
                // Until that is ordered.
                (FoundCall::Running, _) if is_stranger => None,
                // Watched since its announcement.
                (FoundCall::Running, Phase::Started) => None,
                (FoundCall::Running, _) => record.time_limit,
            };
            settled.open.extend(limit.map(|limit| (call_id.clone(), limit)));
            if !is_stranger {
                settled.found.insert(call_id, phase);
            }
        }
        Ok(settled)
    }

    /// What ends the calls that nobody knows; from here each is forgotten with its end. Empty when that was asked before.
    pub(super) fn dispose_of_strangers(&mut self) -> Vec<(String, Disposal)> {
        if !std::mem::take(&mut self.keeps_strangers) {
            return Vec::new();
        }
        let strangers = self.calls.iter().filter(|(_, record)| record.origin == Origin::Stranger);
        let disposal = |(call_id, record): (&String, &CallRecord)| {
            let disposal = match record.phase {
                Phase::Held => Disposal::Abort,
                // One that is over and has not said so refuses that, and says so.
                Phase::Released | Phase::Started => Disposal::Kill,
                Phase::Finished => Disposal::Acknowledge,
            };
            (call_id.clone(), disposal)
        };
        strangers.map(disposal).collect()
    }

    /// Whether there are still calls that nobody knows.
    pub(super) fn has_strangers(&self) -> bool {
        self.calls.values().any(|record| record.origin == Origin::Stranger)
    }
}

impl CallRecord {
    fn was_heard_of(&self) -> bool {
        let has_moved = matches!(self.phase, Phase::Started | Phase::Finished) || !self.ahead.is_empty();
        has_moved || self.origin == Origin::Stranger
    }

    fn settle(&mut self, call_id: &str, seen: FoundCall, lengths: &StreamLengths) -> Result<(), Violation> {
        match (self.phase, seen) {
            // Its gate was not opened, whatever was written down, and nobody but us can open it from here.
            (Phase::Held | Phase::Released, FoundCall::Prepared) if self.ahead.is_empty() => self.phase = Phase::Held,
            // Whether it ran before it was over is told by its end.
            (Phase::Held, FoundCall::Finished)
            | (Phase::Released | Phase::Started, FoundCall::Running | FoundCall::Finished)
            | (Phase::Finished, FoundCall::Finished) => {}
            _ => return Err(self.wrong_phase(call_id, EVENT)),
        }
        self.grow("snapshot.total_bytes", lengths)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::work::{CallEnd, CallEvent, CallObserver, Outcome, Stream};

    struct Nobody;
    impl CallObserver for Nobody {
        fn observe(&self, _: CallEvent) {}
    }

    fn expecting(calls: &[(&str, Gate)]) -> CallTable {
        let call = |(call_id, gate): &(&str, Gate)| ExpectedCall {
            call_id: CallId::new(call_id).expect("valid"),
            gate: *gate,
            time_limit: Some(Duration::from_secs(9)),
            observer: Arc::new(Nobody),
        };
        CallTable::expecting(calls.iter().map(call).collect()).expect("few, and each once")
    }

    fn seen(call_id: &str, phase: FoundCall) -> SeenCall {
        SeenCall { call_id: call_id.into(), phase, lengths: StreamLengths::default() }
    }

    fn shown(call_id: &str, phase: wire::CallPhase) -> wire::CallState {
        wire::CallState { call_id: call_id.into(), phase: phase.into(), streams: Vec::new() }
    }

    fn ended() -> CallEnd {
        CallEnd::without_output(Outcome::Exited { code: 0 })
    }

    #[test]
    fn impossible_snapshots_are_violations() {
        let stream = |total_bytes| wire::StreamSummary {
            stream: wire::Stream::Stdout.into(),
            total_bytes,
            ..Default::default()
        };
        let state = shown("a", wire::CallPhase::Running);
        let cases = [
            vec![shown("", wire::CallPhase::Running)],
            vec![shown("a\n", wire::CallPhase::Running)],
            vec![shown(&"x".repeat(200), wire::CallPhase::Running)],
            vec![shown("a", wire::CallPhase::Unspecified)],
            vec![wire::CallState { phase: 77, ..state.clone() }],
            vec![state.clone(), shown("a", wire::CallPhase::Finished)],
            vec![wire::CallState { streams: vec![stream(1), stream(2)], ..state.clone() }],
            vec![wire::CallState { streams: vec![stream(1)], ..shown("a", wire::CallPhase::Prepared) }],
            (0..=MOST_CALLS).map(|index| shown(&index.to_string(), wire::CallPhase::Finished)).collect(),
        ];
        for calls in cases {
            assert!(decode(&wire::SnapshotReply { calls, ..Default::default() }).is_err());
        }
        assert!(decode(&wire::SnapshotReply { calls: vec![state], ..Default::default() }).is_ok());
    }

    #[test]
    fn calls_that_are_there_are_found_and_the_others_forgotten() {
        let mut table = expecting(&[("p", Gate::Held), ("r", Gate::Open), ("f", Gate::Open), ("gone", Gate::Open)]);

        let settled = table
            .settle(vec![seen("p", FoundCall::Prepared), seen("r", FoundCall::Running), seen("f", FoundCall::Finished)])
            .expect("all of it can be");

        let wanted = [("p", FoundCall::Prepared), ("r", FoundCall::Running), ("f", FoundCall::Finished)];
        assert_eq!(settled.found, wanted.map(|(call_id, phase)| (call_id.to_owned(), phase)).into());
        assert_eq!(settled.open, [("r".to_owned(), Duration::from_secs(9)), ("f".to_owned(), Duration::ZERO)]);
        assert_eq!(table.started("gone").err(), Some(Violation::UnknownCall { event: "call_started" }));
        assert!(table.dispose_of_strangers().is_empty() && !table.has_strangers());
    }

    #[test]
    fn strangers_are_let_in_until_it_is_settled_what_becomes_of_them_and_nobody_else_afterwards() {
        let mut table = expecting(&[]);
        table.started("r").expect("may be a stranger");
        table.finished("f", &ended()).expect("may be a stranger");

        table
            .settle(vec![
                seen("p", FoundCall::Prepared),
                seen("r", FoundCall::Running),
                seen("f", FoundCall::Finished),
                seen("unheard", FoundCall::Finished),
            ])
            .expect("all of it can be");

        assert!(table.keeps_strangers, "nobody has said that they are to be ended");
        let disposals: HashMap<_, _> = table.dispose_of_strangers().into_iter().collect();
        let wanted =
            [("p", Disposal::Abort), ("r", Disposal::Kill), ("f", Disposal::Acknowledge), ("unheard", Disposal::Kill)];
        assert_eq!(disposals, wanted.map(|(call_id, disposal)| (call_id.to_owned(), disposal)).into());
        assert!(table.dispose_of_strangers().is_empty(), "once");
        assert!(table.finished("unheard", &ended()).is_ok(), "its end is still to come");
        assert!(table.started("other").is_err(), "the usual strictness");
    }

    #[test]
    fn more_calls_may_be_expected_than_a_sandbox_can_hold() {
        let ids: Vec<_> = (0..=MOST_CALLS).map(|index| index.to_string()).collect();
        let calls: Vec<_> = ids.iter().map(|id| (id.as_str(), Gate::Open)).collect();
        let mut table = expecting(&calls);

        let settled = table.settle(vec![seen("7", FoundCall::Running)]).expect("it can be");

        assert_eq!((settled.found.len(), table.calls.len()), (1, 1));
    }

    #[test]
    fn strangers_cannot_fill_the_memory() {
        let mut table = expecting(&[]);
        table.sent_ahead("s", 0, &[0; 65_536]).expect("may be a stranger");
        assert!(table.calls["s"].ahead.is_empty(), "what a stranger sends is not kept");
        for index in 1..MOST_CALLS {
            table.started(&index.to_string()).expect("may be a stranger");
        }

        assert!(table.started("one-more").is_err());
        assert!(expecting(&[]).started("no id").is_err());
    }

    #[test]
    fn held_call_that_is_said_to_have_run_is_told_apart() {
        let unrecorded = |event| Some(Violation::Unrecorded { event, call_id: "h".into() });

        let snapshot = expecting(&[("h", Gate::Held)]).settle(vec![seen("h", FoundCall::Running)]);
        let started = expecting(&[("h", Gate::Held)]).started("h").err();
        let mut over = expecting(&[("h", Gate::Held)]);
        over.settle(vec![seen("h", FoundCall::Finished)]).expect("it may have been cancelled");
        let finished = over.finished("h", &ended()).err();

        assert_eq!(snapshot.err(), unrecorded("snapshot"));
        assert_eq!(started, unrecorded("call_started"));
        assert_eq!(finished, unrecorded("call_finished"));
    }

    #[test]
    fn recorded_call_that_waits_at_its_gate_is_held_again() {
        let mut table = expecting(&[("c", Gate::Open)]);
        table.settle(vec![seen("c", FoundCall::Prepared)]).expect("its gate was not opened");

        assert_eq!(table.started("c").err(), Some(Violation::WrongPhase { event: "call_started" }));
        table.release("c");
        assert!(table.started("c").is_ok());
    }

    #[test]
    fn snapshot_that_contradicts_what_was_heard_is_a_violation() {
        let heard = |finished: bool| {
            let mut table = expecting(&[("c", Gate::Open)]);
            table.started("c").expect("released");
            if finished {
                table.finished("c", &ended()).expect("started");
            }
            table
        };
        let mut lengths = StreamLengths::default();
        lengths.advance(Stream::Stdout, 9);
        let mut longer = heard(false);
        longer.advanced("c", lengths).expect("started");
        lengths = StreamLengths::default();
        lengths.advance(Stream::Stdout, 8);

        assert!(heard(false).settle(vec![seen("c", FoundCall::Prepared)]).is_err());
        assert!(heard(true).settle(vec![seen("c", FoundCall::Running)]).is_err());
        assert!(heard(true).settle(Vec::new()).is_err(), "nobody acknowledged it");
        assert!(longer.settle(vec![SeenCall { lengths, ..seen("c", FoundCall::Running) }]).is_err());
        assert!(heard(false).settle(vec![seen("c", FoundCall::Finished)]).is_ok(), "it ended in between");
    }

    #[test]
    fn slots_that_cannot_be_are_a_violation() {
        let slot = |call_id: &str, pids: usize| wire::SlotState { call_id: call_id.to_owned(), pids: vec![7; pids] };
        let reply = |slots| wire::SnapshotReply { slots, ..wire::SnapshotReply::default() };

        let good = reply(vec![slot("c", MOST_PIDS), slot("d", 0)]);
        let pids: Vec<usize> = slots(&good).expect("as it is").iter().map(|slot| slot.pids.len()).collect();
        assert_eq!(pids, [MOST_PIDS, 0]);
        for (bad, field) in [
            (vec![slot("c", MOST_PIDS + 1)], "snapshot.slots.pids"),
            (vec![slot("", 1)], "snapshot.slots.call_id"),
            (vec![slot("c", 1); MOST_SLOTS + 1], "snapshot.slots"),
        ] {
            let violation = slots(&reply(bad)).expect_err("a violation");
            assert!(matches!(violation, Violation::Impossible { field: found, .. } if found == field), "{violation}");
        }
    }
}
