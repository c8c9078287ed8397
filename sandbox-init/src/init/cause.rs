//! Why a call ended, computed from what process 1 saw. Pure: no clock, no files, no processes.

use proto::init::v1::{
    CancelMode, Cancelled, Exited, ForbiddenSystemCall, NeverStarted, Note, NoteKind, OutOfMemory, Outcome,
    SandboxLost, Signaled, StatusUnknown, TimedOut, outcome::Kind,
};

use crate::sys::child::Exit;

use super::slot::Counters;

/// What was seen at the end of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Its first process has ended; for a bash call that is the shell itself.
    Process(Exit),
    /// The shell lives and reports this status.
    Claimed(i32),
    /// It provably never ran.
    NeverStarted {
        /// Why.
        reason: String,
        /// errno of the failing step, 0 if none.
        errno: i32,
        /// 126, 127 or 125.
        code: i32,
    },
    /// It ran, and nobody can say how it ended.
    Unknown(String),
}

/// Who ended a call, when it did not end by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ender {
    /// Its time was over.
    Timeout {
        /// The limit.
        after_ms: u64,
    },
    /// The runner, with the hardest mode asked for.
    Cancel(CancelMode),
    /// The sandbox is ending.
    Shutdown,
}

/// All that decides.
#[derive(Debug)]
pub(crate) struct Facts<'call> {
    pub(crate) end: End,
    pub(crate) ender: Option<Ender>,
    /// SIGKILL was needed.
    pub(crate) killed: bool,
    pub(crate) used: Counters,
    /// Name of the program, when the call is one process.
    pub(crate) program: Option<&'call str>,
}

const SIGKILL: i32 = libc::SIGKILL;
const SIGSYS: i32 = libc::SIGSYS;

/// The outcome of a call.
pub(crate) fn outcome(facts: &Facts<'_>) -> Outcome {
    Outcome { kind: Some(kind(facts)) }
}

fn kind(facts: &Facts<'_>) -> Kind {
    if let End::NeverStarted { reason, errno, code } = &facts.end {
        return match facts.ender {
            Some(Ender::Cancel(mode)) => {
                Kind::Cancelled(Cancelled { mode: mode.into(), before_start: true, killed: false, code: 0 })
            }
            _ => Kind::NeverStarted(NeverStarted { reason: reason.clone(), errno: *errno, code: *code }),
        };
    }
    let code = status_as_shells_say(&facts.end);
    match facts.ender {
        Some(Ender::Timeout { after_ms }) => {
            return Kind::TimedOut(TimedOut { after_ms, killed: facts.killed, code });
        }
        Some(Ender::Cancel(mode)) => {
            return Kind::Cancelled(Cancelled { mode: mode.into(), before_start: false, killed: facts.killed, code });
        }
        Some(Ender::Shutdown) => {
            return Kind::SandboxLost(SandboxLost {
                reason: "the sandbox was shut down while the call ran".to_owned(),
            });
        }
        None => {}
    }
    let kills = facts.used.memory_kills.unwrap_or(0);
    let was_killed = code == 128_i32.saturating_add(SIGKILL);
    if kills > 0 && was_killed {
        let is_victim = matches!(facts.end, End::Process(Exit::Signal { .. }));
        return Kind::OutOfMemory(OutOfMemory {
            limit_bytes: facts.used.memory_limit.filter(|_| starvation(&facts.used) == Starvation::Own).unwrap_or(0),
            process: facts.program.filter(|_| is_victim).unwrap_or_default().to_owned(),
            kills,
            code: if is_victim { -1 } else { code },
        });
    }
    if code == 128_i32.saturating_add(SIGSYS) {
        return Kind::ForbiddenSystemCall(ForbiddenSystemCall { code });
    }
    match &facts.end {
        End::Process(Exit::Signal { signal, core_dumped }) => {
            Kind::Signaled(Signaled { signal: *signal, core_dumped: *core_dumped })
        }
        End::Process(Exit::Code(code)) | End::Claimed(code) => Kind::Exited(Exited { code: *code }),
        End::Unknown(reason) => Kind::StatusUnknown(StatusUnknown { reason: reason.clone() }),
        End::NeverStarted { reason, errno, code } => {
            Kind::NeverStarted(NeverStarted { reason: reason.clone(), errno: *errno, code: *code })
        }
    }
}

/// The status as `$?` shows it; -1 when there is none.
fn status_as_shells_say(end: &End) -> i32 {
    match end {
        End::Process(Exit::Code(code)) | End::Claimed(code) => *code,
        End::Process(Exit::Signal { signal, .. }) => signal.saturating_add(128),
        End::NeverStarted { code, .. } => *code,
        End::Unknown(_) => -1,
    }
}

/// Whose memory was at its end when a process was killed for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Starvation {
    /// The sandbox had reached its own limit.
    Own,
    /// It had not: the host had none left, or a group around the sandbox.
    Outside,
    /// This host does not count it.
    Unknown,
}

fn starvation(used: &Counters) -> Starvation {
    match used.limit_hits {
        Some(0) => Starvation::Outside,
        Some(_) => Starvation::Own,
        None => Starvation::Unknown,
    }
}

/// Notes that follow from the numbers of the slot.
pub(crate) fn notes_of_usage(outcome: &Outcome, used: &Counters) -> Vec<Note> {
    let mut notes = Vec::new();
    let kills = used.memory_kills.unwrap_or(0);
    let is_outcome = matches!(outcome.kind, Some(Kind::OutOfMemory(_)));
    match starvation(used) {
        _ if kills == 0 => {}
        Starvation::Outside => notes.push(note(
            NoteKind::MemoryKills,
            format!(
                "killed for memory: {kills}; the host or a group around the sandbox ran out of memory, not the sandbox at \
                 its own limit; trying again may help"
            ),
        )),
        Starvation::Own | Starvation::Unknown if is_outcome => {}
        Starvation::Own => notes.push(note(
            NoteKind::MemoryKills,
            format!("{kills} processes of this call were killed because the sandbox ran out of memory"),
        )),
        Starvation::Unknown => notes
            .push(note(NoteKind::MemoryKills, format!("{kills} processes of this call were killed for want of memory"))),
    }
    let refused = used.forks_refused.unwrap_or(0);
    if refused > 0 {
        notes.push(note(
            NoteKind::PidsLimit,
            format!("the process limit of the sandbox was reached; {refused} processes could not be started"),
        ));
    }
    notes
}

/// A note.
pub(crate) fn note(kind: NoteKind, text: impl Into<String>) -> Note {
    Note { kind: kind.into(), text: text.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(end: End) -> Facts<'static> {
        Facts { end, ender: None, killed: false, used: Counters::default(), program: Some("eater") }
    }

    fn killed() -> End {
        End::Process(Exit::Signal { signal: SIGKILL, core_dumped: false })
    }

    #[test]
    fn a_kill_without_a_memory_event_is_a_signal_and_with_one_is_out_of_memory() {
        let plain = facts(killed());
        assert_eq!(kind(&plain), Kind::Signaled(Signaled { signal: 9, core_dumped: false }));
        let used =
            Counters { memory_kills: Some(2), memory_limit: Some(4096), limit_hits: Some(1), ..Counters::default() };
        let starved = Facts { used, ..facts(killed()) };
        let expected = OutOfMemory { limit_bytes: 4096, process: "eater".to_owned(), kills: 2, code: -1 };
        assert_eq!(kind(&starved), Kind::OutOfMemory(expected));
    }

    #[test]
    fn a_kill_while_the_own_limit_was_not_reached_names_no_limit_and_says_that_the_reason_is_outside() {
        let used =
            Counters { memory_kills: Some(1), memory_limit: Some(4096), limit_hits: Some(0), ..Counters::default() };
        for end in [killed(), End::Claimed(137), End::Claimed(0)] {
            let outcome = outcome(&Facts { used, ..facts(end) });
            if let Some(Kind::OutOfMemory(memory)) = &outcome.kind {
                assert_eq!(memory.limit_bytes, 0);
            }
            let notes = notes_of_usage(&outcome, &used);
            assert_eq!(notes.len(), 1, "{notes:?}");
            assert!(notes.iter().all(|note| note.text.contains("the host or a group around the sandbox")), "{notes:?}");
        }
    }

    #[test]
    fn a_kill_that_nobody_can_ascribe_names_no_limit_and_accuses_nobody() {
        let used = Counters { memory_kills: Some(1), memory_limit: Some(4096), ..Counters::default() };
        let outcome = outcome(&Facts { used, ..facts(killed()) });
        assert!(matches!(&outcome.kind, Some(Kind::OutOfMemory(memory)) if memory.limit_bytes == 0), "{outcome:?}");
        assert_eq!(notes_of_usage(&outcome, &used), []);
    }

    #[test]
    fn a_shell_that_reports_137_after_a_memory_event_was_not_the_victim() {
        let used = Counters { memory_kills: Some(1), ..Counters::default() };
        let starved = Facts { used, ..facts(End::Claimed(137)) };
        let expected = OutOfMemory { limit_bytes: 0, process: String::new(), kills: 1, code: 137 };
        assert_eq!(kind(&starved), Kind::OutOfMemory(expected));
    }

    #[test]
    fn a_memory_kill_that_the_command_survived_is_a_note() {
        let used = Counters { memory_kills: Some(1), ..Counters::default() };
        let survived = Facts { used, ..facts(End::Claimed(0)) };
        let outcome = outcome(&survived);
        assert_eq!(outcome.kind, Some(Kind::Exited(Exited { code: 0 })));
        let notes = notes_of_usage(&outcome, &used);
        assert_eq!(notes.first().map(Note::kind), Some(NoteKind::MemoryKills));
    }

    #[test]
    fn a_forbidden_system_call_is_seen_through_the_shell_too() {
        let direct = facts(End::Process(Exit::Signal { signal: SIGSYS, core_dumped: false }));
        assert_eq!(kind(&direct), Kind::ForbiddenSystemCall(ForbiddenSystemCall { code: 159 }));
        assert_eq!(kind(&facts(End::Claimed(159))), Kind::ForbiddenSystemCall(ForbiddenSystemCall { code: 159 }));
    }

    #[test]
    fn who_ended_it_decides_over_how_it_ended() {
        let ended = Facts { ender: Some(Ender::Timeout { after_ms: 5 }), killed: true, ..facts(killed()) };
        assert_eq!(kind(&ended), Kind::TimedOut(TimedOut { after_ms: 5, killed: true, code: 137 }));
        let obeyed = Facts { ender: Some(Ender::Cancel(CancelMode::Interrupt)), ..facts(End::Claimed(130)) };
        let expected = Cancelled { mode: CancelMode::Interrupt.into(), before_start: false, killed: false, code: 130 };
        assert_eq!(kind(&obeyed), Kind::Cancelled(expected));
    }

    #[test]
    fn what_never_ran_is_never_reported_as_having_timed_out() {
        let end = End::NeverStarted { reason: "no".to_owned(), errno: 2, code: 127 };
        let never = Facts { ender: Some(Ender::Timeout { after_ms: 5 }), ..facts(end) };
        assert!(matches!(kind(&never), Kind::NeverStarted(_)));
    }
}
