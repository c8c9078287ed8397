//! What the runner knows of the calls of one sandbox, and which events can follow. Pure: no socket, no clock.
//!
//! held -> released -> started -> finished -> forgotten, each once, lengths only growing. A short call may finish without
//! having been announced as started. Anything else is a violation; above all, that a call ran whose gate was never opened.
//!
//! Of a sandbox that is taken over, calls that nobody here knows are let into the table until [`super::snapshot`] has
//! settled what there is, so that they can be ended in order; from then on the table is as strict as any other.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::violation::Violation;
use crate::work::{CallEnd, CallId, CallObserver, Outcome, StreamLengths, limits};

/// Calls that one sandbox can hold for us: prepared, running, or finished and not acknowledged.
pub(super) const MOST_CALLS: usize = 256;
/// Longest result of a tool that is kept here: what fits into a frame to the caller, and the frame around a text of that
/// length.
pub(super) const LARGEST_RESULT: usize = limits::INLINE_RESULT_BYTES + 32 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Held,
    Released,
    Started,
    Finished,
}

/// Who gave a call to process 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// We did.
    Here,
    /// An earlier runner, which has left word of it. `recorded`: also that its gate may have been opened.
    Earlier { recorded: bool },
    /// An earlier runner, and nobody knows of it.
    Stranger,
}

/// One call.
pub(super) struct CallRecord {
    pub(super) phase: Phase,
    pub(super) lengths: StreamLengths,
    pub(super) time_limit: Option<Duration>,
    /// Nobody wants to hear of a stranger.
    pub(super) observer: Option<Arc<dyn CallObserver>>,
    /// Result of a tool as far as it was sent ahead.
    pub(super) ahead: Vec<u8>,
    pub(super) origin: Origin,
}

/// What the start of a call sets going.
pub(super) struct Begun {
    /// Whom to tell.
    pub(super) observer: Option<Arc<dyn CallObserver>>,
    /// The time after which it is overdue.
    pub(super) time_limit: Option<Duration>,
    /// It may have begun long before it was announced here.
    pub(super) earlier: bool,
}

/// What the end of a call sets free.
pub(super) struct Ended {
    /// Whom to tell.
    pub(super) observer: Option<Arc<dyn CallObserver>>,
    /// The start has still to be told.
    pub(super) unannounced: bool,
    /// What was sent ahead of the result.
    pub(super) ahead: Vec<u8>,
}

/// Every call of one sandbox that is not forgotten.
#[derive(Default)]
pub(super) struct CallTable {
    pub(super) calls: HashMap<String, CallRecord>,
    /// The sandbox is being taken over, and what it holds is not settled yet.
    pub(super) is_unsettled: bool,
    /// It was taken over, and calls that nobody knows are not to be ended yet.
    pub(super) keeps_strangers: bool,
}

/// Why a call cannot be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AddError {
    /// Its id is in use.
    Duplicate,
    /// The table is full.
    Full,
}

impl CallTable {
    /// Adds a call before it is sent; a `held` one must not run before [`CallTable::release`]. `time_limit` is when process 1
    /// must have ended it at the latest.
    ///
    /// # Errors
    /// [`AddError`].
    pub(super) fn add(
        &mut self,
        call_id: &str,
        held: bool,
        time_limit: Option<Duration>,
        observer: Arc<dyn CallObserver>,
    ) -> Result<(), AddError> {
        let phase = if held { Phase::Held } else { Phase::Released };
        self.insert(
            call_id,
            CallRecord { time_limit, observer: Some(observer), ..CallRecord::new(phase, Origin::Here) },
        )
    }

    pub(super) fn insert(&mut self, call_id: &str, record: CallRecord) -> Result<(), AddError> {
        if self.calls.contains_key(call_id) {
            return Err(AddError::Duplicate);
        }
        if self.calls.len() >= MOST_CALLS {
            return Err(AddError::Full);
        }
        self.calls.insert(call_id.to_owned(), record);
        Ok(())
    }

    /// The call that an event is about.
    fn find(&mut self, call_id: &str, event: &'static str) -> Result<&mut CallRecord, Violation> {
        if self.is_unsettled && CallId::new(call_id).is_ok() {
            // Known already, or too many: the first is as it should be, the second is found out in the next line.
            let _ = self.insert(call_id, CallRecord::new(Phase::Released, Origin::Stranger));
        }
        self.calls.get_mut(call_id).ok_or(Violation::UnknownCall { event })
    }

    /// The gate is about to be opened.
    pub(super) fn release(&mut self, call_id: &str) {
        if let Some(record) = self.calls.get_mut(call_id).filter(|record| record.phase == Phase::Held) {
            record.phase = Phase::Released;
        }
    }

    /// Forgets a call.
    pub(super) fn remove(&mut self, call_id: &str) {
        self.calls.remove(call_id);
    }

    /// The call has begun.
    ///
    /// # Errors
    /// [`Violation`] when that cannot be.
    pub(super) fn started(&mut self, call_id: &str) -> Result<Begun, Violation> {
        const EVENT: &str = "call_started";
        let record = self.find(call_id, EVENT)?;
        if record.phase != Phase::Released {
            return Err(record.wrong_phase(call_id, EVENT));
        }
        record.phase = Phase::Started;
        let earlier = record.origin != Origin::Here;
        Ok(Begun { observer: record.observer.clone(), time_limit: record.time_limit, earlier })
    }

    /// More output can be read. Returns whom to tell what.
    ///
    /// # Errors
    /// [`Violation`] when that cannot be.
    pub(super) fn advanced(
        &mut self,
        call_id: &str,
        lengths: StreamLengths,
    ) -> Result<(Option<Arc<dyn CallObserver>>, StreamLengths), Violation> {
        const EVENT: &str = "output_advanced";
        let record = self.find(call_id, EVENT)?;
        if record.phase != Phase::Started {
            return Err(record.wrong_phase(call_id, EVENT));
        }
        record.grow("output_advanced.total_bytes", &lengths)?;
        Ok((record.observer.clone(), record.lengths))
    }

    /// A piece of the result of a tool has come ahead of the end of the call.
    ///
    /// # Errors
    /// [`Violation`] when that cannot be.
    pub(super) fn sent_ahead(&mut self, call_id: &str, offset: u64, bytes: &[u8]) -> Result<(), Violation> {
        const EVENT: &str = "output_data";
        let record = self.find(call_id, EVENT)?;
        if !matches!(record.phase, Phase::Released | Phase::Started) {
            return Err(record.wrong_phase(call_id, EVENT));
        }
        if record.origin == Origin::Stranger {
            return Ok(());
        }
        if offset != record.ahead.len() as u64 || bytes.is_empty() {
            return Err(Violation::impossible("output_data.offset", offset));
        }
        if record.ahead.len() + bytes.len() > LARGEST_RESULT {
            return Err(Violation::impossible("output_data.data", format!("{} bytes", bytes.len())));
        }
        record.ahead.extend_from_slice(bytes);
        Ok(())
    }

    /// The call is over.
    ///
    /// # Errors
    /// [`Violation`] when it was over before, ran although it was held, or had more output than it admits.
    pub(super) fn finished(&mut self, call_id: &str, end: &CallEnd) -> Result<Ended, Violation> {
        const EVENT: &str = "call_finished";
        let record = self.find(call_id, EVENT)?;
        let ran = !matches!(
            end.outcome,
            Outcome::NeverStarted { .. }
                | Outcome::Cancelled { before_start: true, .. }
                | Outcome::Indeterminate { .. }
        );
        if record.phase == Phase::Finished || (record.phase == Phase::Held && ran) {
            return Err(record.wrong_phase(call_id, EVENT));
        }
        for summary in &end.streams {
            if summary.total_bytes < record.lengths.get(summary.stream) {
                return Err(Violation::impossible("call_finished.total_bytes", summary.total_bytes));
            }
        }
        let unannounced = record.phase == Phase::Released && ran;
        record.phase = Phase::Finished;
        let ahead = std::mem::take(&mut record.ahead);
        Ok(Ended { observer: record.observer.clone(), unannounced, ahead })
    }

    /// Whether the end of the call is still to come.
    pub(super) fn is_open(&self, call_id: &str) -> bool {
        self.calls.get(call_id).is_some_and(|record| record.phase != Phase::Finished)
    }

    /// Who hears of a call.
    pub(super) fn observer(&self, call_id: &str) -> Option<Arc<dyn CallObserver>> {
        self.calls.get(call_id)?.observer.clone()
    }
}

impl CallRecord {
    /// A call that nothing was heard of yet.
    pub(super) fn new(phase: Phase, origin: Origin) -> Self {
        let lengths = StreamLengths::default();
        Self { phase, lengths, time_limit: None, observer: None, ahead: Vec::new(), origin }
    }

    /// What it means that `event` came in this phase.
    pub(super) fn wrong_phase(&self, call_id: &str, event: &'static str) -> Violation {
        match (self.phase, self.origin) {
            (Phase::Held, Origin::Earlier { recorded: false }) => {
                Violation::Unrecorded { event, call_id: call_id.to_owned() }
            }
            _ => Violation::WrongPhase { event },
        }
    }

    /// Takes over lengths that were reported. A report names the streams that grew; one that is absent reads as 0 and is left
    /// alone.
    pub(super) fn grow(&mut self, field: &'static str, lengths: &StreamLengths) -> Result<(), Violation> {
        for stream in crate::work::Stream::ALL {
            if lengths.get(stream) != 0 && lengths.get(stream) < self.lengths.get(stream) {
                return Err(Violation::impossible(field, lengths.get(stream)));
            }
        }
        self.lengths.merge(lengths);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::work::{CallEvent, Stream, StreamSummary};

    struct Nobody;
    impl CallObserver for Nobody {
        fn observe(&self, _: CallEvent) {}
    }

    fn table_with(call_id: &str) -> CallTable {
        let mut table = CallTable::default();
        table.add(call_id, false, None, Arc::new(Nobody)).expect("added");
        table
    }

    fn ended(total_bytes: u64) -> CallEnd {
        let summary = StreamSummary {
            stream: Stream::Stdout,
            total_bytes,
            head_bytes: 0,
            tail_bytes: 0,
            sha256: [0; 32],
            inline: None,
            spool_path: String::new(),
        };
        CallEnd { streams: vec![summary], ..CallEnd::without_output(Outcome::Exited { code: 0 }) }
    }

    fn stdout(total: u64) -> StreamLengths {
        let mut lengths = StreamLengths::default();
        lengths.advance(Stream::Stdout, total);
        lengths
    }

    #[test]
    fn call_runs_through_its_phases_once() {
        let mut table = table_with("a");

        assert!(table.started("a").is_ok());
        assert!(table.advanced("a", stdout(5)).is_ok());
        assert!(table.finished("a", &ended(5)).is_ok());

        assert_eq!(table.started("a").err(), Some(Violation::WrongPhase { event: "call_started" }));
        assert_eq!(table.advanced("a", stdout(6)).err(), Some(Violation::WrongPhase { event: "output_advanced" }));
        assert_eq!(table.finished("a", &ended(5)).err(), Some(Violation::WrongPhase { event: "call_finished" }));
    }

    #[test]
    fn events_for_a_call_nobody_made_are_violations() {
        let mut table = CallTable::default();

        assert!(matches!(table.started("x"), Err(Violation::UnknownCall { .. })));
        assert!(matches!(table.advanced("x", stdout(1)), Err(Violation::UnknownCall { .. })));
        assert!(matches!(table.finished("x", &ended(0)), Err(Violation::UnknownCall { .. })));
    }

    #[test]
    fn output_that_shrinks_is_a_violation() {
        let mut table = table_with("a");
        table.started("a").expect("started");
        table.advanced("a", stdout(10)).expect("advanced");

        assert!(table.advanced("a", stdout(9)).is_err());
        assert!(table.finished("a", &ended(9)).is_err());
    }

    #[test]
    fn held_call_that_ran_is_a_violation_until_its_gate_was_opened() {
        let mut table = CallTable::default();
        table.add("a", true, None, Arc::new(Nobody)).expect("added");

        assert!(table.started("a").is_err());
        assert!(table.finished("a", &ended(0)).is_err());
        table.release("a");
        assert!(table.started("a").is_ok());
    }

    #[test]
    fn short_call_may_finish_unannounced_and_the_start_is_still_to_be_told() {
        let mut table = table_with("a");

        let ended = table.finished("a", &ended(0)).expect("good");

        assert!(ended.unannounced);
    }

    #[test]
    fn result_comes_ahead_in_order_and_bounded_or_is_a_violation() {
        let mut table = table_with("a");

        assert!(table.sent_ahead("a", 0, b"ab").is_ok());
        assert!(table.sent_ahead("a", 2, b"c").is_ok());
        assert!(table.sent_ahead("a", 2, b"c").is_err(), "the same piece twice");
        assert!(table.sent_ahead("a", 9, b"c").is_err(), "a gap");
        assert!(table.sent_ahead("a", 3, b"").is_err(), "an empty piece, for ever");
        assert!(table.sent_ahead("a", 3, &vec![0; LARGEST_RESULT]).is_err(), "too much");
        assert!(table.sent_ahead("x", 0, b"c").is_err(), "for a call nobody made");
        assert_eq!(table.finished("a", &ended(0)).expect("good").ahead, b"abc");
        assert!(table.sent_ahead("a", 0, b"c").is_err(), "behind the end");
    }

    #[test]
    fn nothing_comes_ahead_of_a_held_call() {
        let mut table = CallTable::default();
        table.add("a", true, None, Arc::new(Nobody)).expect("added");

        assert_eq!(table.sent_ahead("a", 0, b"c"), Err(Violation::WrongPhase { event: "output_data" }));
    }

    #[test]
    fn table_is_bounded_and_ids_are_unique() {
        let mut table = table_with("0");
        for index in 1..MOST_CALLS {
            table.add(&index.to_string(), false, None, Arc::new(Nobody)).expect("added");
        }

        assert_eq!(table.add("0", false, None, Arc::new(Nobody)), Err(AddError::Duplicate));
        assert_eq!(table.add("one more", false, None, Arc::new(Nobody)), Err(AddError::Full));
    }
}
