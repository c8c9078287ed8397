//! What the core remembers about a session and about a call.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use crate::work::{
    CallEnd, CallId, CallPhase, CallResult, CancelMode, Code, Outcome, Receipt, SandboxId, SessionEnd, SessionOpen,
    ToolCall, ToolFailure, ToolInput,
};

/// One session.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) open_request: SessionOpen,
    pub(super) epoch: u64,
    pub(super) phase: SessionPhase,
    pub(super) receipt: Receipt,
    /// Its sandbox, once there is one.
    pub(super) sandbox_id: Option<SandboxId>,
    /// The sandbox that an earlier runner made for it is being taken over.
    pub(super) attaching: bool,
    /// An earlier runner opened it, and since then nobody has said that it goes on. The journal may be an old copy, so what its
    /// sandbox does is nobody's to end: not what the journal does not know, and not for want of calls.
    pub(super) unconfirmed: bool,
    /// A record of its sandbox is on disk.
    pub(super) recorded: bool,
    /// Records of its sandbox that are on their way to disk.
    pub(super) ready_writes: u32,
    /// Newer placements since one was last known to be on disk.
    pub(super) takeovers: u32,
    /// The journal has refused its present placement, so the next runner will know an older one.
    pub(super) unwritten: bool,
    /// Nobody has decided about it after a reconnect: it starts nothing.
    pub(super) suspended: bool,
    /// It came from a work queue, and what the orchestrator grants or withdraws says nothing about it.
    pub(super) own_lease: bool,
    /// That lease, once there is one, with the time that the sandbox lives beyond it.
    pub(super) lease: Option<(u64, Duration)>,
    /// A gate was kept shut because that lease had lapsed; until it is renewed.
    pub(super) lapsed: bool,
    /// Whether its processes run.
    pub(super) rest: Rest,
    /// They could not be made to stand still, so that is not tried again before the next call.
    pub(super) stays_awake: bool,
    /// They could not be ended, so that is not tried again before the next call.
    pub(super) keeps_processes: bool,
    /// Waiting calls, in order.
    pub(super) queue: VecDeque<CallId>,
    /// Calls between preparation and end.
    pub(super) active: HashSet<CallId>,
    /// Calls without a written result.
    pub(super) open: usize,
    /// Calls with a written result that is not acknowledged.
    pub(super) unacknowledged: usize,
    /// Acknowledged calls: a late duplicate must not run again.
    pub(super) forgotten: HashSet<CallId>,
}

/// Whether the processes of a session run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rest {
    /// They do.
    Awake,
    /// They are about to stand still.
    Freezing,
    /// They stand still, and nothing can begin.
    Frozen,
    /// They are being ended.
    Stopping,
    /// There are none, and nothing can begin: where they stood still, so would what is new.
    Stopped,
    /// What is there is about to go on, because something wants to begin.
    Waking,
}

/// Where a session is.
#[derive(Debug, Clone)]
pub(super) enum SessionPhase {
    /// Its sandbox is being made.
    Opening,
    /// Its sandbox is there, and that is being written down.
    Recording,
    /// It takes calls.
    Ready,
    /// It takes nothing more.
    Closing(Ending),
}

/// How a session is ending.
#[derive(Debug, Clone)]
pub(super) struct Ending {
    pub(super) end: SessionEnd,
    pub(super) grace: Duration,
    pub(super) sandbox_gone: bool,
    /// That it ends is being written down.
    pub(super) is_writing: bool,
}

impl Ending {
    pub(super) fn new(end: SessionEnd, grace: Duration) -> Self {
        Self { end, grace, sandbox_gone: false, is_writing: false }
    }
}

/// Where a session is, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SessionStage {
    /// Its sandbox is being made.
    Opening,
    /// It takes calls.
    Ready,
    /// It takes calls, and its processes stand still until one comes.
    Frozen,
    /// It takes calls, and has files but no processes until one comes.
    Stopped,
    /// It takes nothing more.
    Closing,
}

impl Session {
    pub(super) fn new(open_request: SessionOpen) -> Self {
        Self {
            epoch: open_request.epoch,
            own_lease: open_request.session_id.is_of_queue(),
            lease: None,
            lapsed: false,
            open_request,
            phase: SessionPhase::Opening,
            receipt: Receipt::default(),
            sandbox_id: None,
            attaching: false,
            unconfirmed: false,
            recorded: false,
            ready_writes: 0,
            takeovers: 0,
            unwritten: false,
            suspended: false,
            rest: Rest::Awake,
            stays_awake: false,
            keeps_processes: false,
            queue: VecDeque::new(),
            active: HashSet::new(),
            open: 0,
            unacknowledged: 0,
            forgotten: HashSet::new(),
        }
    }

    pub(super) fn may_start(&self) -> bool {
        let most = self.open_request.max_concurrent_calls.max(1) as usize;
        matches!(self.phase, SessionPhase::Ready)
            && !self.suspended
            && self.rest == Rest::Awake
            && self.active.len() < most
            && !self.queue.is_empty()
    }

    /// Something wants to begin or to go on, and nothing can.
    pub(super) fn must_wake(&self) -> bool {
        matches!(self.phase, SessionPhase::Ready)
            && !self.suspended
            && matches!(self.rest, Rest::Frozen | Rest::Stopped)
            && !(self.queue.is_empty() && self.active.is_empty())
    }

    /// Nothing is asked of it.
    pub(super) fn is_idle(&self) -> bool {
        matches!(self.phase, SessionPhase::Ready) && self.open == 0 && !self.attaching && !self.unconfirmed
    }

    pub(super) fn stage(&self) -> SessionStage {
        match self.phase {
            SessionPhase::Opening | SessionPhase::Recording => SessionStage::Opening,
            SessionPhase::Ready if self.rest == Rest::Stopped => SessionStage::Stopped,
            SessionPhase::Ready if self.rest == Rest::Frozen && !self.stays_awake => SessionStage::Frozen,
            SessionPhase::Ready => SessionStage::Ready,
            SessionPhase::Closing(_) => SessionStage::Closing,
        }
    }
}

/// One call.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) request: ToolCall,
    /// Its place among all calls that were taken.
    pub(super) order: u64,
    /// The accepted record is written.
    pub(super) accepted: bool,
    /// The journal has refused the accepted record.
    pub(super) unaccepted: bool,
    /// The started record is written.
    pub(super) start_written: bool,
    /// The started record was asked for in this process.
    pub(super) start_asked: bool,
    /// How often an earlier runner has written it, and died before the call began.
    pub(super) starts: u32,
    /// How often a runner took it over after one that panicked; `None` once a runner has lived on with it.
    pub(super) resumes: Option<u32>,
    /// It ran when the last minute of this process was over.
    pub(super) seen_running: bool,
    /// The sandbox has seen it, so it must be told when the result is stored.
    pub(super) in_sandbox: bool,
    pub(super) cancel: Option<CancelMode>,
    /// An earlier runner took it.
    pub(super) restored: bool,
    pub(super) phase: Phase,
}

/// Where a call is. It only moves down this list.
#[derive(Debug, Clone)]
pub(super) enum Phase {
    /// In its session's queue.
    Queued,
    /// Its start is being written down before it is handed to the sandbox, because an earlier runner may have died of that.
    Recording,
    /// Handed to the sandbox, which has not said yet that it is ready.
    Preparing,
    /// Ready, waiting for the started record.
    Prepared,
    /// Ready, being dropped again; the failure says why if it was not a cancel.
    Aborting(Option<ToolFailure>),
    /// Its gate is open.
    Running,
    /// Over, waiting for the finished record.
    Finishing(Arc<CallResult>),
    /// Over and written down.
    Finished(Arc<CallResult>),
}

/// Where a call is, for people and for resuming a link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CallStage {
    /// Waiting.
    Queued,
    /// Between preparation and start.
    Starting,
    /// Running.
    Running,
    /// Over.
    Finished(Arc<CallResult>),
}

impl Call {
    /// Whether it is for the shell.
    pub(super) fn is_command(&self) -> bool {
        matches!(self.request.input, ToolInput::Bash(_))
    }

    pub(super) fn new(request: ToolCall, order: u64) -> Self {
        Self {
            request,
            order,
            accepted: false,
            unaccepted: false,
            start_written: false,
            start_asked: false,
            starts: 0,
            resumes: Some(0),
            seen_running: false,
            in_sandbox: false,
            cancel: None,
            restored: false,
            phase: Phase::Queued,
        }
    }

    pub(super) fn wire_phase(&self) -> CallPhase {
        match self.phase {
            Phase::Queued | Phase::Recording | Phase::Preparing | Phase::Prepared | Phase::Aborting(_) => {
                CallPhase::Accepted
            }
            Phase::Running => CallPhase::Started,
            Phase::Finishing(_) | Phase::Finished(_) => CallPhase::Finished,
        }
    }

    pub(super) fn stage(&self) -> CallStage {
        match &self.phase {
            Phase::Queued => CallStage::Queued,
            Phase::Recording | Phase::Preparing | Phase::Prepared | Phase::Aborting(_) => CallStage::Starting,
            Phase::Running => CallStage::Running,
            Phase::Finishing(result) | Phase::Finished(result) => CallStage::Finished(Arc::clone(result)),
        }
    }

    /// Whether the sandbox works on it.
    pub(super) fn is_active(&self) -> bool {
        !matches!(self.phase, Phase::Queued | Phase::Finishing(_) | Phase::Finished(_))
    }
}

/// A result for a call that has no end of its own.
pub(super) fn answer(outcome: Outcome) -> Arc<CallResult> {
    let end = CallEnd::without_output(outcome);
    let presented = crate::session::present::failure_text(&end.outcome);
    Arc::new(CallResult { end, presented, recovered: false })
}

/// The result of a call that was cancelled before it ran.
pub(super) fn cancelled_before_start(mode: CancelMode) -> Arc<CallResult> {
    answer(Outcome::Cancelled { mode, before_start: true, killed: false, code: 125 })
}

/// The result of a call that provably never ran.
pub(super) fn never_started(failure: ToolFailure) -> Arc<CallResult> {
    answer(Outcome::NeverStarted { failure, code: 125 })
}

/// The result of a call that may have run.
pub(super) fn indeterminate(code: Code, reason: &str) -> Arc<CallResult> {
    answer(Outcome::Indeterminate {
        failure: ToolFailure::new(
            code,
            format!("the call may have run, but how it ended is not known: {reason}"),
            "look at what the call was meant to change before running it again",
        ),
    })
}
