//! What a sequence of records amounts to, without the records: where those are that still matter.
//!
//! The one state machine of the journal. Recovery folds every record into it and then reads what is live; compaction copies
//! what is live; so both always agree. A record that makes no sense after those before it is counted and ignored, because a
//! runner that does not start helps nobody. Memory: ids and positions, never inputs or results.

use std::collections::{HashMap, HashSet, VecDeque};

use super::frame::wide;
use super::record::{MOST_STARTS, Record, Recovered, RecoveredCall, RecoveredPhase, RecoveredSession};
use crate::work::{CallId, CancelMode, SessionId};

/// Cancelled calls that never arrived; the oldest goes.
const MOST_TOMBSTONES: usize = 4096;
/// Acknowledged calls of one session; the oldest goes. Sessions take no calls beyond as many.
const MOST_REMEMBERED: usize = 65_536;
/// Ids in one copied record.
const REMEMBERED_PER_RECORD: usize = 4096;

/// Where a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// First number of its segment.
    pub(super) segment: u64,
    /// Of its payload in the file.
    pub(super) offset: u64,
    /// Of its payload.
    pub(super) length: usize,
}

/// A record without what is only read again when it is live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    Events { through: u64 },
    Term { term: u64 },
    SessionOpening { session_id: SessionId, epoch: u64 },
    SessionReady { session_id: SessionId },
    SessionEnded { session_id: SessionId, epoch: u64 },
    Accepted { call_id: CallId, session_id: SessionId },
    Started { call_id: CallId },
    Resumed { call_id: CallId },
    Outlived { call_id: CallId },
    Cancelled { call_id: CallId, mode: CancelMode },
    Finished { call_id: CallId },
    Acknowledged { call_id: CallId },
    Floor { epoch: u64 },
    Remembered { session_id: SessionId, call_ids: Vec<CallId> },
}

impl Step {
    pub(super) fn of(record: &Record) -> Self {
        match record {
            Record::Events { through } => Self::Events { through: *through },
            Record::Term { term } => Self::Term { term: *term },
            Record::SessionOpening(open) => {
                Self::SessionOpening { session_id: open.session_id.clone(), epoch: open.epoch }
            }
            Record::SessionReady { session_id, .. } => Self::SessionReady { session_id: session_id.clone() },
            Record::SessionEnded { session_id, epoch } => {
                Self::SessionEnded { session_id: session_id.clone(), epoch: *epoch }
            }
            Record::Accepted(call) => {
                Self::Accepted { call_id: call.call_id.clone(), session_id: call.session_id.clone() }
            }
            Record::Started { call_id } => Self::Started { call_id: call_id.clone() },
            Record::Resumed { call_id } => Self::Resumed { call_id: call_id.clone() },
            Record::Outlived { call_id } => Self::Outlived { call_id: call_id.clone() },
            Record::Cancelled { call_id, mode } => Self::Cancelled { call_id: call_id.clone(), mode: *mode },
            Record::Finished { call_id, .. } => Self::Finished { call_id: call_id.clone() },
            Record::Acknowledged { call_id } => Self::Acknowledged { call_id: call_id.clone() },
            Record::Floor { epoch } => Self::Floor { epoch: *epoch },
            Record::Remembered { session_id, call_ids } => {
                Self::Remembered { session_id: session_id.clone(), call_ids: call_ids.clone() }
            }
        }
    }

    /// The record again, of the kinds that are nothing but their step.
    pub(super) fn record(&self) -> Option<Record> {
        Some(match self {
            Self::Events { through } => Record::Events { through: *through },
            Self::Term { term } => Record::Term { term: *term },
            Self::Floor { epoch } => Record::Floor { epoch: *epoch },
            Self::Started { call_id } => Record::Started { call_id: call_id.clone() },
            Self::Resumed { call_id } => Record::Resumed { call_id: call_id.clone() },
            Self::Outlived { call_id } => Record::Outlived { call_id: call_id.clone() },
            Self::Cancelled { call_id, mode } => Record::Cancelled { call_id: call_id.clone(), mode: *mode },
            Self::Remembered { session_id, call_ids } => {
                Record::Remembered { session_id: session_id.clone(), call_ids: call_ids.clone() }
            }
            _ => return None,
        })
    }
}

/// Ids in the order in which they came, each once, bounded.
#[derive(Debug, Default)]
struct Ids {
    order: VecDeque<CallId>,
    known: HashSet<CallId>,
}

impl Ids {
    fn insert(&mut self, call_id: CallId, most: usize) {
        if !self.known.insert(call_id.clone()) {
            return;
        }
        self.order.push_back(call_id);
        if self.order.len() > most
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
    }

    fn remove(&mut self, call_id: &CallId) {
        if self.known.remove(call_id) {
            self.order.retain(|known| known != call_id);
        }
    }
}

#[derive(Debug)]
struct Session {
    order: u64,
    epoch: u64,
    open: Place,
    ready: Option<Place>,
    acknowledged: Ids,
}

#[derive(Debug)]
struct Call {
    order: u64,
    session_id: SessionId,
    accepted: Place,
    cancel: Option<CancelMode>,
    phase: Phase,
    /// As in `RecoveredCall`.
    resumes: Option<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Accepted,
    /// So many times.
    Started(u32),
    Finished(Place),
}

/// One record of what is live.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) step: Step,
    /// Where it can be copied from; `None` for one that is written anew.
    pub(super) place: Option<Place>,
}

/// What is live.
#[derive(Debug, Default)]
pub(super) struct Live {
    events_through: u64,
    term: u64,
    epoch_floor: u64,
    tombstones: Ids,
    sessions: HashMap<SessionId, Session>,
    calls: HashMap<CallId, Call>,
    /// Counts sessions and calls, for their order.
    seen: u64,
    ignored: u64,
}

impl Live {
    /// Takes the next record, which is at `place`.
    pub(super) fn apply(&mut self, step: Step, place: Place) {
        let makes_sense = match step {
            Step::Events { through } => {
                self.events_through = self.events_through.max(through);
                true
            }
            Step::Term { term } => {
                self.term = self.term.max(term);
                true
            }
            Step::Floor { epoch } => {
                self.epoch_floor = self.epoch_floor.max(epoch);
                true
            }
            Step::SessionOpening { session_id, epoch } => self.session_opening(session_id, epoch, place),
            Step::SessionReady { session_id } => {
                self.sessions.get_mut(&session_id).map(|session| session.ready = Some(place)).is_some()
            }
            Step::SessionEnded { session_id, epoch } => self.session_ended(&session_id, epoch),
            Step::Remembered { session_id, call_ids } => self.remembered(&session_id, call_ids),
            Step::Accepted { call_id, session_id } => self.accepted(call_id, session_id, place),
            Step::Started { call_id } => self.advance(&call_id, Phase::Started(1)),
            Step::Resumed { call_id } => {
                self.suspect(&call_id, |resumes| resumes.map(|times| MOST_STARTS.min(times + 1)))
            }
            Step::Outlived { call_id } => self.suspect(&call_id, |_| None),
            Step::Finished { call_id } => self.advance(&call_id, Phase::Finished(place)),
            Step::Cancelled { call_id, mode } => self.cancelled(call_id, mode),
            Step::Acknowledged { call_id } => self.acknowledged(call_id),
        };
        self.ignored += u64::from(!makes_sense);
    }

    /// Records so far that made no sense.
    pub(super) fn ignored(&self) -> u64 {
        self.ignored
    }

    /// Bytes that a copy of what is live would take, about.
    pub(super) fn bytes(&self) -> u64 {
        let ids = |ids: &Ids| ids.order.iter().map(|id| id.as_str().len()).sum::<usize>();
        let sessions = self.sessions.values().map(|session| {
            session.open.length + session.ready.map_or(0, |place| place.length) + ids(&session.acknowledged)
        });
        let calls = self.calls.values().map(|call| match call.phase {
            Phase::Finished(place) => call.accepted.length + place.length,
            _ => call.accepted.length,
        });
        wide(ids(&self.tombstones) + sessions.sum::<usize>() + calls.sum::<usize>())
    }

    /// A sequence of records that amounts to the same.
    pub(super) fn kept(&self) -> Vec<Kept> {
        let mut kept = Vec::new();
        let mut new = |step| kept.push(Kept { step, place: None });
        new(Step::Events { through: self.events_through });
        new(Step::Term { term: self.term });
        new(Step::Floor { epoch: self.epoch_floor });
        for call_id in &self.tombstones.order {
            new(Step::Cancelled { call_id: call_id.clone(), mode: CancelMode::Kill });
        }
        for (session_id, session) in self.sessions_in_order() {
            let (session_id, epoch) = (session_id.clone(), session.epoch);
            let opening = Step::SessionOpening { session_id: session_id.clone(), epoch };
            kept.push(Kept { step: opening, place: Some(session.open) });
            if let Some(place) = session.ready {
                kept.push(Kept { step: Step::SessionReady { session_id: session_id.clone() }, place: Some(place) });
            }
            let ids: Vec<_> = session.acknowledged.order.iter().cloned().collect();
            for ids in ids.chunks(REMEMBERED_PER_RECORD) {
                let step = Step::Remembered { session_id: session_id.clone(), call_ids: ids.to_vec() };
                kept.push(Kept { step, place: None });
            }
        }
        for (call_id, call) in self.calls_in_order() {
            let accepted = Step::Accepted { call_id: call_id.clone(), session_id: call.session_id.clone() };
            kept.push(Kept { step: accepted, place: Some(call.accepted) });
            if let Some(mode) = call.cancel {
                kept.push(Kept { step: Step::Cancelled { call_id: call_id.clone(), mode }, place: None });
            }
            match call.phase {
                Phase::Accepted => {}
                Phase::Started(times) => {
                    let started = || Kept { step: Step::Started { call_id: call_id.clone() }, place: None };
                    kept.extend((0..times).map(|_| started()));
                    let resumed = || Kept { step: Step::Resumed { call_id: call_id.clone() }, place: None };
                    match call.resumes {
                        Some(times) => kept.extend((0..times).map(|_| resumed())),
                        None => kept.push(Kept { step: Step::Outlived { call_id: call_id.clone() }, place: None }),
                    }
                }
                Phase::Finished(place) => {
                    kept.push(Kept { step: Step::Finished { call_id: call_id.clone() }, place: Some(place) });
                }
            }
        }
        kept
    }

    /// What the next runner needs; `read` gets the record at a place.
    ///
    /// # Errors
    /// What `read` said. A record that is not of the kind it was is passed to `wrong`.
    pub(super) fn recovered<E>(
        &self,
        same_boot: bool,
        mut read: impl FnMut(Place) -> Result<Record, E>,
        wrong: impl Fn(Place) -> E,
    ) -> Result<Recovered, E> {
        let mut sessions = Vec::with_capacity(self.sessions.len());
        for (_, session) in self.sessions_in_order() {
            let Record::SessionOpening(open) = read(session.open)? else { return Err(wrong(session.open)) };
            let sandbox = match session.ready {
                None => None,
                Some(place) => match read(place)? {
                    Record::SessionReady { sandbox_id, receipt, .. } => Some((sandbox_id, receipt)),
                    _ => return Err(wrong(place)),
                },
            };
            let acknowledged = session.acknowledged.order.iter().cloned().collect();
            sessions.push(RecoveredSession { open: *open, sandbox, acknowledged });
        }
        let mut calls = Vec::with_capacity(self.calls.len());
        for (_, call) in self.calls_in_order() {
            let Record::Accepted(request) = read(call.accepted)? else { return Err(wrong(call.accepted)) };
            let phase = match call.phase {
                Phase::Accepted => RecoveredPhase::Accepted,
                Phase::Started(_) => RecoveredPhase::Started,
                Phase::Finished(place) => match read(place)? {
                    Record::Finished { result, .. } => RecoveredPhase::Finished(result),
                    _ => return Err(wrong(place)),
                },
            };
            let starts = match call.phase {
                Phase::Started(times) => times,
                Phase::Accepted | Phase::Finished(_) => 0,
            };
            let resumes = if starts == 0 { Some(0) } else { call.resumes };
            calls.push(RecoveredCall { call: *request, cancel: call.cancel, phase, starts, resumes });
        }
        Ok(Recovered {
            same_boot,
            panicked: false,
            events_through: self.events_through,
            term: self.term,
            epoch_floor: self.epoch_floor,
            tombstones: self.tombstones.order.iter().cloned().collect(),
            sessions,
            calls,
        })
    }

    fn sessions_in_order(&self) -> Vec<(&SessionId, &Session)> {
        let mut sessions: Vec<_> = self.sessions.iter().collect();
        sessions.sort_by_key(|(_, session)| session.order);
        sessions
    }

    fn calls_in_order(&self) -> Vec<(&CallId, &Call)> {
        let mut calls: Vec<_> = self.calls.iter().collect();
        calls.sort_by_key(|(_, call)| call.order);
        calls
    }

    fn session_opening(&mut self, session_id: SessionId, epoch: u64, place: Place) -> bool {
        if let Some(session) = self.sessions.get_mut(&session_id) {
            if epoch <= session.epoch {
                return false;
            }
            (session.epoch, session.open) = (epoch, place);
            return true;
        }
        self.seen += 1;
        let session = Session { order: self.seen, epoch, open: place, ready: None, acknowledged: Ids::default() };
        self.sessions.insert(session_id, session);
        true
    }

    /// The end of an older placement says nothing about a session that was taken over.
    fn session_ended(&mut self, session_id: &SessionId, epoch: u64) -> bool {
        if !session_id.is_of_queue() {
            self.epoch_floor = self.epoch_floor.max(epoch);
        }
        if self.sessions.get(session_id).is_some_and(|session| session.epoch <= epoch) {
            self.sessions.remove(session_id);
            return true;
        }
        false
    }

    fn remembered(&mut self, session_id: &SessionId, call_ids: Vec<CallId>) -> bool {
        let Some(session) = self.sessions.get_mut(session_id) else { return false };
        for call_id in call_ids {
            session.acknowledged.insert(call_id, MOST_REMEMBERED);
        }
        true
    }

    fn accepted(&mut self, call_id: CallId, session_id: SessionId, place: Place) -> bool {
        let session = self.sessions.get(&session_id);
        let is_over = session.is_some_and(|session| session.acknowledged.known.contains(&call_id));
        if is_over || self.calls.contains_key(&call_id) {
            return false;
        }
        self.tombstones.remove(&call_id);
        self.seen += 1;
        let phase = Phase::Accepted;
        let call = Call { order: self.seen, session_id, accepted: place, cancel: None, phase, resumes: Some(0) };
        self.calls.insert(call_id, call);
        true
    }

    /// A call only moves on, and the first end is the end.
    fn advance(&mut self, call_id: &CallId, phase: Phase) -> bool {
        let Some(call) = self.calls.get_mut(call_id) else { return false };
        call.phase = match (call.phase, phase) {
            (Phase::Started(times), Phase::Started(more)) => Phase::Started((times + more).min(MOST_STARTS)),
            (Phase::Finished(_), _) => return false,
            (Phase::Accepted | Phase::Started(_), next) => next,
        };
        true
    }

    /// Only a call that may have begun can be to blame.
    fn suspect(&mut self, call_id: &CallId, then: impl FnOnce(Option<u32>) -> Option<u32>) -> bool {
        let Some(call) = self.calls.get_mut(call_id).filter(|call| matches!(call.phase, Phase::Started(_))) else {
            return false;
        };
        call.resumes = then(call.resumes);
        true
    }

    fn cancelled(&mut self, call_id: CallId, mode: CancelMode) -> bool {
        match self.calls.get_mut(&call_id) {
            Some(call) => call.cancel = call.cancel.max(Some(mode)),
            None => self.tombstones.insert(call_id, MOST_TOMBSTONES),
        }
        true
    }

    fn acknowledged(&mut self, call_id: CallId) -> bool {
        if !self.calls.get(&call_id).is_some_and(|call| matches!(call.phase, Phase::Finished(_))) {
            return false;
        }
        let Some(call) = self.calls.remove(&call_id) else { return false };
        if let Some(session) = self.sessions.get_mut(&call.session_id) {
            session.acknowledged.insert(call_id, MOST_REMEMBERED);
        }
        true
    }
}
