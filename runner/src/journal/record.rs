//! What is written down, and what a sequence of records amounts to.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::work::{CallId, CallResult, CancelMode, Receipt, SandboxId, SessionId, SessionOpen, ToolCall};

/// How often a call is about to be started by a runner that dies then; after that it is not tried again. As many runners may panic
/// while it alone may be to blame.
pub const MOST_STARTS: u32 = 3;

/// One step of a runner, a session or a call. Names of variants and fields are part of the format of the files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Record {
    /// Numbers of events up to here may have been used.
    Events {
        /// The last of them.
        through: u64,
    },
    /// An orchestrator of this term has been obeyed; an older one no more.
    Term {
        /// The term.
        term: u64,
    },
    /// A session has a place; its sandbox is being made. A repeat with a higher epoch takes the session over, with the
    /// sandbox that it has.
    SessionOpening(Box<SessionOpen>),
    /// The sandbox of a session can take calls.
    SessionReady {
        /// The session.
        session_id: SessionId,
        /// Its sandbox.
        sandbox_id: SandboxId,
        /// What protects it.
        receipt: Receipt,
    },
    /// A session and its sandbox are gone.
    SessionEnded {
        /// The session.
        session_id: SessionId,
        /// Its placement; sessions at or below it that are not known are late duplicates.
        epoch: u64,
    },
    /// A call will get exactly one outcome.
    Accepted(Box<ToolCall>),
    /// A call may have effects from here. Once more for each runner that is about to start it, which it provably has not begun
    /// under the one before.
    Started {
        /// The call.
        call_id: CallId,
    },
    /// A runner is about to take over the sandbox of a call that was running, alone among those that may be to blame, when the
    /// runner before it panicked.
    Resumed {
        /// The call.
        call_id: CallId,
    },
    /// A runner has lived on while the call ran: it is none that runners die of.
    Outlived {
        /// The call.
        call_id: CallId,
    },
    /// A call was cancelled. One that is not known leaves a tombstone: it must not run when it arrives after all.
    Cancelled {
        /// The call.
        call_id: CallId,
        /// How hard.
        mode: CancelMode,
    },
    /// A call is over.
    Finished {
        /// The call.
        call_id: CallId,
        /// What happened.
        result: Arc<CallResult>,
    },
    /// The result is stored elsewhere; only the id is remembered, as long as its session is.
    Acknowledged {
        /// The call.
        call_id: CallId,
    },
    /// Sessions up to this epoch have ended. Written by the journal itself, for the ends that it no longer keeps.
    Floor {
        /// The highest of them.
        epoch: u64,
    },
    /// Calls of an open session that were acknowledged. Written by the journal itself, for calls that it no longer keeps.
    Remembered {
        /// The session.
        session_id: SessionId,
        /// The calls, oldest first.
        call_ids: Vec<CallId>,
    },
}

impl Record {
    /// What it is, for people.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Events { .. } => "events",
            Self::Term { .. } => "term",
            Self::SessionOpening(_) => "session opening",
            Self::SessionReady { .. } => "session ready",
            Self::SessionEnded { .. } => "session ended",
            Self::Accepted(_) => "accepted",
            Self::Started { .. } => "started",
            Self::Resumed { .. } => "resumed",
            Self::Outlived { .. } => "outlived",
            Self::Cancelled { .. } => "cancelled",
            Self::Finished { .. } => "finished",
            Self::Acknowledged { .. } => "acknowledged",
            Self::Floor { .. } => "floor",
            Self::Remembered { .. } => "remembered",
        }
    }

    /// The session it names.
    #[must_use]
    pub fn session_id(&self) -> Option<&SessionId> {
        match self {
            Self::SessionOpening(open) => Some(&open.session_id),
            Self::Accepted(call) => Some(&call.session_id),
            Self::SessionReady { session_id, .. }
            | Self::SessionEnded { session_id, .. }
            | Self::Remembered { session_id, .. } => Some(session_id),
            _ => None,
        }
    }

    /// The call it is about.
    #[must_use]
    pub fn call_id(&self) -> Option<&CallId> {
        match self {
            Self::Accepted(call) => Some(&call.call_id),
            Self::Started { call_id }
            | Self::Resumed { call_id }
            | Self::Outlived { call_id }
            | Self::Cancelled { call_id, .. }
            | Self::Finished { call_id, .. }
            | Self::Acknowledged { call_id } => Some(call_id),
            _ => None,
        }
    }
}

/// What an earlier runner left.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Recovered {
    /// The machine has not been started anew since, so sandboxes may live.
    pub same_boot: bool,
    /// The runner before this one panicked. Not in the journal, which it may not have been able to write any more.
    pub panicked: bool,
    /// Highest number of an event that may have been used.
    pub events_through: u64,
    /// Highest term that was obeyed.
    pub term: u64,
    /// Highest epoch of a session that is forgotten.
    pub epoch_floor: u64,
    /// Calls that were cancelled before they arrived, oldest first.
    pub tombstones: Vec<CallId>,
    /// Sessions that have not ended.
    pub sessions: Vec<RecoveredSession>,
    /// Calls whose result is not acknowledged, in the order in which they were accepted.
    pub calls: Vec<RecoveredCall>,
}

/// A session that has not ended.
#[derive(Debug, Clone, PartialEq)]
pub struct RecoveredSession {
    /// What was asked for, with the newest epoch.
    pub open: SessionOpen,
    /// Its sandbox; `None` while it was being made, and then no call has run in it.
    pub sandbox: Option<(SandboxId, Receipt)>,
    /// Calls whose results are stored elsewhere.
    pub acknowledged: Vec<CallId>,
}

/// A call whose result is not acknowledged.
#[derive(Debug, Clone, PartialEq)]
pub struct RecoveredCall {
    /// The request.
    pub call: ToolCall,
    /// The hardest cancel so far.
    pub cancel: Option<CancelMode>,
    /// How far it had come.
    pub phase: RecoveredPhase,
    /// How often its start was written down, up to `MOST_STARTS`; 0 unless the phase is `Started`.
    pub starts: u32,
    /// How often a runner took it over after one that panicked, up to `MOST_STARTS`; `None` when a runner has lived on with it.
    pub resumes: Option<u32>,
}

/// How far a call had come.
#[derive(Debug, Clone, PartialEq)]
pub enum RecoveredPhase {
    /// It provably has not begun.
    Accepted,
    /// It may have begun.
    Started,
    /// It is over.
    Finished(Arc<CallResult>),
}
