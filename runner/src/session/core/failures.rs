//! What callers are told when the core itself says no.

use crate::work::{Code, SessionId, ToolFailure};

pub(super) fn unknown_session(session_id: &SessionId) -> ToolFailure {
    ToolFailure::new(
        Code::SessionUnknown,
        format!("session_id: session {session_id} is not open on this runner"),
        "open the session first, with an epoch of its own",
    )
}

pub(super) fn stale(session_id: &SessionId, given: u64, known: u64) -> ToolFailure {
    ToolFailure::new(
        Code::StaleEpoch,
        format!("epoch: {given} was given for session {session_id}, {known} is known"),
        "the session was placed again since; use the newest epoch",
    )
}

pub(super) fn closing(session_id: &SessionId) -> ToolFailure {
    ToolFailure::new(
        Code::SessionClosed,
        format!("session {session_id} is closing"),
        "wait for the end of the session, then open it again with a higher epoch",
    )
}

pub(super) fn lost(session_id: &SessionId, reason: &str) -> ToolFailure {
    ToolFailure::new(
        Code::SandboxLost,
        format!("the sandbox of session {session_id} ended by itself: {reason}"),
        "open the session again with a higher epoch; what was in the sandbox is gone",
    )
}

pub(super) fn rebooted(session_id: &SessionId) -> ToolFailure {
    ToolFailure::new(
        Code::HostRebooted,
        format!("the machine was started again, and the sandbox of session {session_id} is gone"),
        "open the session again with a higher epoch; what was in the sandbox is gone",
    )
}

pub(super) fn draining() -> ToolFailure {
    ToolFailure::new(Code::Draining, "this runner is being emptied", "place the work on another runner")
}

pub(super) fn poison(starts: u32) -> ToolFailure {
    ToolFailure::new(
        Code::Poison,
        format!("the call did not run: the runner died each of the {starts} times when it was about to start it"),
        "do not send the same call again; its operator should look at why the runner died",
    )
}

/// Of a call that was running, so that nobody can say what it has done.
pub(super) fn poison_while_running(panics: u32) -> String {
    format!("the runner panicked each of {panics} times while it ran, and nothing else that is new did")
}

pub(super) fn busy(reason: &str) -> ToolFailure {
    ToolFailure::new(
        Code::QueueFull,
        format!("the journal of this runner takes no new call now: {reason}"),
        "send the call again later under a new id, or place the work on another runner",
    )
}

/// `is_known`: the call has arrived, and is being ended.
pub(super) fn busy_cancel(is_known: bool, reason: &str) -> ToolFailure {
    let done =
        if is_known { "the call is being ended, but a runner after this one may not know" } else { "nothing was done" };
    ToolFailure::new(
        Code::QueueFull,
        format!("the journal of this runner takes no cancel now, {done}: {reason}"),
        "send the cancel again later",
    )
}

pub(super) fn busy_placement(session_id: &SessionId) -> ToolFailure {
    ToolFailure::new(
        Code::QueueFull,
        format!("epoch: several newer placements of session {session_id} are not on the disk of this runner yet"),
        "send the request again later",
    )
}

pub(super) fn read_only() -> ToolFailure {
    ToolFailure::new(
        Code::JournalReadOnly,
        "the journal of this runner refuses writes",
        "place the work on another runner; its operator must look at the disk",
    )
}
