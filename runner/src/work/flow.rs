//! What connectors and sessions say to each other. Joined by bounded channels in `daemon`; neither knows the other.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{
    CallId, CallResult, CancelMode, EnvironmentRef, Network, Pressure, Receipt, RequestDigest, ResourceLimits,
    SessionId, StreamLengths, ToolCall, ToolFailure,
};

/// From a connector to the sessions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WorkItem {
    /// Open a session, or hear its present state again.
    Open(SessionOpen),
    /// Run a call, or hear its present state again.
    Call(ToolCall),
    /// End a call.
    Cancel {
        /// The session the caller believes the call is in.
        session_id: SessionId,
        /// Placement the caller believes in.
        epoch: u64,
        /// The call; unknown ones leave a tombstone.
        call_id: CallId,
        /// How hard.
        mode: CancelMode,
    },
    /// The result and all wanted output are stored elsewhere.
    Acknowledge {
        /// The finished call.
        call_id: CallId,
    },
    /// Bytes for standard input.
    Stdin {
        /// The running call.
        call_id: CallId,
        /// Position of data in the whole input.
        offset: u64,
        /// The bytes.
        data: Vec<u8>,
        /// Close after data.
        eof: bool,
    },
    /// New size of a terminal.
    Resize {
        /// The running call.
        call_id: CallId,
        /// Columns.
        columns: u16,
        /// Rows.
        rows: u16,
    },
    /// End a session.
    Close(SessionClose),
    /// Start nothing new until told otherwise: the lease has lapsed, or nobody has decided about one session.
    Suspend {
        /// One session, or all of the orchestrator.
        session_id: Option<SessionId>,
    },
    /// Starting is allowed again.
    Resume {
        /// One session, or all of the orchestrator that were not suspended by themselves.
        session_id: Option<SessionId>,
    },
    /// Whoever places sessions may be counted on until then. A sandbox lives beyond it for its orphan time, whatever becomes of
    /// this process and of the link.
    Lease {
        /// One session that came from a work queue, or all sessions of the orchestrator.
        session_id: Option<SessionId>,
        /// CLOCK_BOOTTIME.
        until_ns: u64,
        /// For sessions that name none of their own.
        orphan_time: Duration,
    },
    /// Take no more work, in one of several ways. What counts is the harder of what both have asked for.
    Drain {
        /// How.
        mode: DrainMode,
        /// Who; each can undo only what it has asked for itself.
        by: DrainedBy,
    },
    /// How the host stands; what it is short of keeps new work out until it is told otherwise.
    Pressure(std::sync::Arc<Pressure>),
}

/// What is wrong with the memory of a runner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// The disk is full: calls that were taken are finished, and no new one is taken.
    NoSpace,
    /// Nothing is remembered any more, because of this.
    Broken(String),
}

impl Trouble {
    /// What people are told of a full disk.
    pub const NO_SPACE: &'static str = "the disk of the journal is full";
}

/// What a connector has remembered beyond the process.
pub trait Memory: Send + Sync {
    /// Highest number of an event that an earlier process may have used.
    fn events_through(&self) -> u64;

    /// Highest term that an earlier process has obeyed.
    fn term(&self) -> u64;

    /// Whether there was an earlier process, and the machine was started again since.
    fn is_after_reboot(&self) -> bool;

    /// Why it takes nothing more, or no new calls, if that is so; and for how long it has been busy with one write.
    fn trouble(&self) -> (Option<Trouble>, Duration) {
        (None, Duration::ZERO)
    }

    /// Resolves with true when numbers of events up to `through` may be used.
    fn reserve_events(&self, through: u64) -> super::BoxFuture<'static, bool>;

    /// Resolves with true when no process after this one will obey an orchestrator of an older term.
    fn obey(&self, term: u64) -> super::BoxFuture<'static, bool>;
}

/// Request to open a session.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionOpen {
    /// Chosen by the caller.
    pub session_id: SessionId,
    /// Placement; a newer one takes the session over, an older one is refused.
    pub epoch: u64,
    /// Tells a repeat from another request under the same id.
    pub digest: RequestDigest,
    /// Which environment.
    pub environment: EnvironmentRef,
    /// How much it may use; zeros mean the operator's default.
    pub limits: ResourceLimits,
    /// What it may reach.
    pub network: Network,
    /// NAME and value for every process.
    pub variables: Vec<(String, String)>,
    /// Lowest acceptable isolation tier by name; empty means the operator's floor.
    pub min_tier: String,
    /// How long the sandbox may live without a runner; `None` means the operator's default.
    pub orphan_timeout: Option<Duration>,
    /// How long it may be without a call until its processes are stopped; zero means for ever, `None` means what the operator
    /// says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_timeout: Option<Duration>,
    /// Calls that may run at once; 0 means one.
    pub max_concurrent_calls: u32,
    /// Label for sharing, limits and usage.
    pub tenant: String,
}

/// Values of variables may be secrets.
impl std::fmt::Debug for SessionOpen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SessionOpen")
            .field("session_id", &self.session_id)
            .field("epoch", &self.epoch)
            .field("environment", &self.environment)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// Request to end a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionClose {
    /// The session.
    pub session_id: SessionId,
    /// Placement the caller believes in.
    pub epoch: u64,
    /// Time for running processes to end by themselves.
    pub grace: Duration,
    /// A newer placement lives elsewhere.
    pub fenced: bool,
}

/// Who empties the runner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DrainedBy {
    /// Whoever sends work, on the link.
    Orchestrator,
    /// Whoever runs this process, with a signal: it is about to end.
    Operator,
}

/// How the runner is emptied; the order is the order of hardness.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum DrainMode {
    /// No new sessions; open ones go on until they are closed.
    FinishSessions,
    /// No new sessions or calls; accepted calls end, then sessions are closed.
    FinishCalls,
    /// Running calls are ended, sessions are closed.
    Now,
    /// Take work again.
    Undo,
}

/// Phase of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CallPhase {
    /// Waiting.
    Accepted,
    /// Running.
    Started,
    /// Over, not acknowledged.
    Finished,
}

/// What a refused request asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RequestKind {
    /// `WorkItem::Open`.
    Open,
    /// `WorkItem::Close`.
    Close,
    /// `WorkItem::Call`.
    Call,
    /// `WorkItem::Cancel`.
    Cancel,
    /// `WorkItem::Stdin`.
    Stdin,
    /// `WorkItem::Resize`.
    Resize,
}

impl RequestKind {
    /// Its name, for people and collectors.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Close => "close",
            Self::Call => "call",
            Self::Cancel => "cancel",
            Self::Stdin => "stdin",
            Self::Resize => "resize",
        }
    }
}

/// Whether an answer is the first of its kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replay {
    /// The first answer.
    First,
    /// The request was seen before; nothing was done again.
    Duplicate,
}

/// Why a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionEnd {
    /// On request.
    Closed,
    /// It could not be opened.
    OpenFailed(ToolFailure),
    /// Its sandbox ended by itself.
    SandboxLost(ToolFailure),
    /// The machine was started again, and its sandbox with it.
    HostRebooted,
    /// A newer placement took it elsewhere.
    Fenced,
    /// The runner was emptied.
    Drained,
    /// Nobody asked anything of it for as long as the operator keeps a session.
    Idle,
}

/// From the sessions to the connector that brought the session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Update {
    /// A session of an earlier runner is open here.
    SessionRestored {
        /// The session.
        session_id: SessionId,
        /// Its placement.
        epoch: u64,
        /// Its sandbox takes calls; otherwise it is being made anew, and nothing has run in it.
        ready: bool,
        /// Calls of it whose end was acknowledged.
        acknowledged: u64,
    },
    /// A call of an earlier runner is known here; whatever it waits for is told as for any other call.
    CallRestored {
        /// The call.
        call_id: CallId,
        /// Its session, which may be over.
        session_id: SessionId,
        /// Tells a repeat from another request under the same id.
        digest: RequestDigest,
        /// Its output is not sent while it runs.
        quiet: bool,
        /// Where it is now.
        phase: CallPhase,
    },
    /// All that an earlier runner left is known now; the first link may be made.
    Restored,
    /// The session can take calls.
    SessionOpened {
        /// The session.
        session_id: SessionId,
        /// Its placement.
        epoch: u64,
        /// What protects it.
        receipt: Receipt,
        /// First answer or repeat.
        replay: Replay,
    },
    /// A request was refused and nothing of it was done; what was there before is untouched.
    Refused {
        /// What was asked.
        request: RequestKind,
        /// The session it named.
        session_id: Option<SessionId>,
        /// The call it named.
        call_id: Option<CallId>,
        /// The placement it named; 0 if it named none.
        epoch: u64,
        /// Why.
        failure: ToolFailure,
    },
    /// The session is over.
    SessionEnded {
        /// The session.
        session_id: SessionId,
        /// Its placement.
        epoch: u64,
        /// Why.
        end: SessionEnd,
    },
    /// The call is known durably and will get exactly one outcome.
    CallAccepted {
        /// The call.
        call_id: CallId,
        /// Its session.
        session_id: SessionId,
        /// Placement.
        epoch: u64,
        /// First answer or repeat.
        replay: Replay,
        /// Where it is now.
        phase: CallPhase,
    },
    /// From here the call may have had effects.
    CallStarted {
        /// The call.
        call_id: CallId,
        /// Its session.
        session_id: SessionId,
        /// Placement.
        epoch: u64,
        /// CLOCK_BOOTTIME.
        boottime_ns: u64,
        /// Counts shells started in the sandbox.
        shell_generation: u64,
    },
    /// More output can be read. Cumulative.
    OutputAdvanced {
        /// The call.
        call_id: CallId,
        /// Its session.
        session_id: SessionId,
        /// Present lengths.
        lengths: StreamLengths,
    },
    /// The call is over.
    CallFinished {
        /// The call.
        call_id: CallId,
        /// Its session.
        session_id: SessionId,
        /// Placement.
        epoch: u64,
        /// What happened.
        result: std::sync::Arc<CallResult>,
    },
    /// A cancel has been taken note of.
    CancelNoted {
        /// The call.
        call_id: CallId,
        /// Placement as named in the request.
        epoch: u64,
        /// Where the call was; `None` when it is unknown here and a tombstone was left.
        phase: Option<CallPhase>,
    },
    /// Bytes of standard input taken so far.
    StdinAccepted {
        /// The call.
        call_id: CallId,
        /// Bytes accepted.
        accepted: u64,
    },
    /// How far emptying the runner has come.
    Drained {
        /// Whether it is being emptied at all; it takes work again otherwise.
        draining: bool,
        /// Sessions left.
        sessions_left: usize,
        /// Calls left.
        calls_left: usize,
    },
}
