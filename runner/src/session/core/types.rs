//! What goes into the core and what comes out of it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::journal::{Record, Recovered};
use crate::work::{
    CallId, CallPhase, CallResult, CancelMode, FoundCall, Gate, PreparedCall, Processes, Receipt, SandboxId, SessionId,
    SessionOpen, ToolCall, ToolFailure, Update, WorkItem,
};

/// Bounds and habits.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// Calls waiting in one session.
    pub queued_per_session: usize,
    /// Calls waiting in all sessions.
    pub queued_per_runner: usize,
    /// Calls between preparation and end in all sessions.
    pub running_per_runner: usize,
    /// Calls whose result is not acknowledged, per session: what a caller that never acknowledges can pile up.
    pub unacknowledged_per_session: usize,
    /// Ids of cancelled calls that were never seen; the oldest goes.
    pub tombstones: usize,
    /// Acknowledged calls whose ids one session remembers; then it takes no more calls.
    pub forgotten_per_session: usize,
    /// Whether starts are written down before a gate is opened.
    pub gated: bool,
    /// Time for processes to end by themselves when the runner ends a session.
    pub drain_grace: Duration,
    /// What becomes of sessions without calls.
    pub idle: IdlePolicy,
}

/// What becomes of a session without calls, counted from the end of the last one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct IdlePolicy {
    /// When its processes are made to stand still, unless the session says otherwise; `None`: never.
    pub freeze_after: Option<Duration>,
    /// When its processes are ended and its files stay, unless the session wants them for longer; `None`: never.
    pub stop_after: Option<Duration>,
    /// When it is ended; `None`: never.
    pub end_after: Option<Duration>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            queued_per_session: crate::work::limits::QUEUED_PER_SESSION,
            queued_per_runner: crate::work::limits::QUEUED_PER_RUNNER,
            running_per_runner: 512,
            unacknowledged_per_session: 256,
            tombstones: 4096,
            forgotten_per_session: 65_536,
            gated: true,
            drain_grace: Duration::from_secs(2),
            idle: IdlePolicy::default(),
        }
    }
}

/// Everything that can happen.
#[derive(Debug, Clone)]
pub enum Input {
    /// What an earlier runner left; before anything else, and once.
    Recovered(Box<Recovered>),
    /// `Action::AttachSandbox` is done. When it failed, `SandboxLost` says so instead.
    SandboxAttached {
        /// Its session.
        session_id: SessionId,
        /// The calls that it knows.
        found: BTreeMap<CallId, FoundCall>,
        /// What its processes do.
        processes: Processes,
    },
    /// `Action::WriteResumed` is done.
    ResumeWritten {
        /// The call.
        call_id: CallId,
        /// False: the journal refused.
        durable: bool,
    },
    /// Another minute of this process is over.
    MinutePassed,
    /// A connector brought something.
    Work(WorkItem),
    /// A sandbox can take calls.
    SandboxReady {
        /// Its session.
        session_id: SessionId,
        /// Its name on this host.
        sandbox_id: SandboxId,
        /// What protects it.
        receipt: Receipt,
    },
    /// `Action::WriteReady` is done.
    ReadyWritten {
        /// The session.
        session_id: SessionId,
        /// False: the journal refused.
        durable: bool,
    },
    /// `Action::WriteEnded` is done.
    EndedWritten {
        /// The session.
        session_id: SessionId,
        /// False: the journal refused.
        durable: bool,
    },
    /// A sandbox could not be made.
    SandboxFailed {
        /// Its session.
        session_id: SessionId,
        /// Why.
        failure: ToolFailure,
    },
    /// `Action::CloseSandbox` is done.
    SandboxClosed {
        /// Its session.
        session_id: SessionId,
    },
    /// A sandbox ended by itself.
    SandboxLost {
        /// Its session.
        session_id: SessionId,
        /// Why.
        reason: String,
    },
    /// `Action::WriteAccepted` is done.
    Accepted {
        /// The call.
        call_id: CallId,
        /// False: the journal refused.
        durable: bool,
    },
    /// `Action::WriteAccepted` was refused for now: the disk is slow or full. Other calls may be taken later.
    AcceptRefused {
        /// The call.
        call_id: CallId,
        /// What the journal said.
        reason: String,
    },
    /// `Action::WriteCancelled` is done.
    CancelWritten {
        /// The call.
        call_id: CallId,
        /// Placement as named in the request.
        epoch: u64,
        /// How far the call had come, if it is known.
        phase: Option<CallPhase>,
        /// False: the journal refused.
        durable: bool,
    },
    /// `Action::Go`, or `Action::Prepare` without a gate, was not carried out: the lease has lapsed.
    GateKept {
        /// The call.
        call_id: CallId,
    },
    /// `Action::WriteCancelled` was refused for now: the disk is slow. Later ones may be taken.
    CancelRefused {
        /// The call.
        call_id: CallId,
        /// Placement as named in the request.
        epoch: u64,
        /// How far the call had come, if it is known.
        phase: Option<CallPhase>,
        /// What the journal said.
        reason: String,
    },
    /// `Action::Prepare` is done.
    Prepared {
        /// The call.
        call_id: CallId,
    },
    /// `Action::Prepare` failed; the call provably never ran.
    PrepareFailed {
        /// The call.
        call_id: CallId,
        /// Why.
        failure: ToolFailure,
    },
    /// `Action::WriteStarted` is done.
    StartWritten {
        /// The call.
        call_id: CallId,
        /// False: the journal refused.
        durable: bool,
    },
    /// The call has begun.
    Started {
        /// The call.
        call_id: CallId,
        /// CLOCK_BOOTTIME.
        boottime_ns: u64,
        /// Counts shells started in the sandbox.
        shell_generation: u64,
    },
    /// `Action::Abort` is done.
    Aborted {
        /// The call.
        call_id: CallId,
    },
    /// The call is over.
    Ended {
        /// The call.
        call_id: CallId,
        /// What happened.
        result: Arc<CallResult>,
    },
    /// `Action::WriteFinished` is done.
    EndWritten {
        /// The call.
        call_id: CallId,
        /// False: the journal refused; the result is reported all the same.
        durable: bool,
    },
    /// A call has waited as long as its caller allowed.
    StartDeadline {
        /// The call.
        call_id: CallId,
    },
    /// The time of `Action::ArmIdle` is over.
    IdlePassed {
        /// The session.
        session_id: SessionId,
    },
    /// `Action::Freeze` is done, or failed.
    Frozen {
        /// The session.
        session_id: SessionId,
        /// Whether its processes stand still.
        result: Result<(), ToolFailure>,
    },
    /// `Action::Stop` is done, or failed.
    Stopped {
        /// The session.
        session_id: SessionId,
        /// Whether none of its processes is there.
        result: Result<(), ToolFailure>,
    },
    /// `Action::Thaw` is done, or failed.
    Thawed {
        /// The session.
        session_id: SessionId,
        /// Whether its processes go on.
        result: Result<(), ToolFailure>,
    },
}

/// Everything that can be asked for. Each line that waits for something says which input answers it.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Tell the connector.
    Tell(Update),
    /// Make a sandbox: `SandboxReady` or `SandboxFailed`.
    CreateSandbox(Box<SessionOpen>),
    /// Whoever may say so has confirmed that this runner serves: what the sandbox of this session holds and the journal does not
    /// know is ended, or, without a session, every sandbox that nobody counts on.
    EndUnknown {
        /// The session; `None` for what belongs to none.
        session_id: Option<SessionId>,
    },
    /// Take over the sandbox of an earlier runner: `SandboxAttached` or `SandboxLost`.
    AttachSandbox {
        /// Its session.
        session_id: SessionId,
        /// Its name on this host.
        sandbox_id: SandboxId,
        /// What protects it.
        receipt: Receipt,
        /// Calls that it may hold, and how long they may take; with `Gate::Held` when the call provably has not begun.
        calls: Vec<(CallId, Gate, Option<Duration>)>,
    },
    /// Write down that a sandbox is about to be taken over although the last runner may have panicked because of this call, which
    /// runs in it: `ResumeWritten`.
    WriteResumed {
        /// The call.
        call_id: CallId,
    },
    /// End a sandbox of an earlier runner without speaking to it.
    DiscardSandbox {
        /// Its name on this host.
        sandbox_id: SandboxId,
    },
    /// End a sandbox: `SandboxClosed`.
    CloseSandbox {
        /// Its session.
        session_id: SessionId,
        /// Time for processes to end by themselves.
        grace: Duration,
    },
    /// The session is over; its sandbox lives on only in calls that are not acknowledged.
    ReleaseSandbox {
        /// The ended session.
        session_id: SessionId,
    },
    /// Write down something that nobody waits for: its place in the sequence is what counts.
    Note(Record),
    /// Write down that a session has its sandbox: `ReadyWritten`.
    WriteReady {
        /// The session.
        session_id: SessionId,
        /// Its sandbox.
        sandbox_id: SandboxId,
        /// What protects it.
        receipt: Receipt,
    },
    /// Write down that a session is over which never had a sandbox on record: `EndedWritten`.
    WriteEnded {
        /// The session.
        session_id: SessionId,
        /// Its placement.
        epoch: u64,
    },
    /// Write down that a call was cancelled, one that has arrived or one that has not: `CancelWritten` or `CancelRefused`.
    WriteCancelled {
        /// The call.
        call_id: CallId,
        /// Placement as named in the request.
        epoch: u64,
        /// How far the call had come, if it is known.
        phase: Option<CallPhase>,
        /// How hard.
        mode: CancelMode,
    },
    /// Write down that a call is accepted: `Accepted`.
    WriteAccepted(ToolCall),
    /// Write down that a call starts: `StartWritten`.
    WriteStarted {
        /// The call.
        call_id: CallId,
    },
    /// Write down how a call ended: `EndWritten`.
    WriteFinished {
        /// The call.
        call_id: CallId,
        /// What happened.
        result: Arc<CallResult>,
    },
    /// The record of a call may go.
    Trim {
        /// The call.
        call_id: CallId,
    },
    /// Hand a call to its sandbox: `Prepared` or `PrepareFailed`; without a gate also `GateKept`.
    Prepare {
        /// Its session.
        session_id: SessionId,
        /// The call.
        call: PreparedCall,
    },
    /// Open the gate: `Started` and `Ended` follow, or `GateKept`.
    Go {
        /// Its session.
        session_id: SessionId,
        /// The call.
        call_id: CallId,
    },
    /// Drop a prepared call whose gate was not opened: `Aborted`.
    Abort {
        /// Its session.
        session_id: SessionId,
        /// The call.
        call_id: CallId,
    },
    /// Move the moment at which the sandbox ends by itself.
    Deadline {
        /// Its session.
        session_id: SessionId,
        /// CLOCK_BOOTTIME.
        boottime_ns: u64,
    },
    /// End a running call: `Ended` follows.
    Cancel {
        /// Its session.
        session_id: SessionId,
        /// The call.
        call_id: CallId,
        /// How hard.
        mode: CancelMode,
    },
    /// The sandbox may forget a call.
    Acknowledge {
        /// The call.
        call_id: CallId,
    },
    /// Feed standard input.
    Stdin {
        /// Its session.
        session_id: SessionId,
        /// The call.
        call_id: CallId,
        /// Position of data.
        offset: u64,
        /// The bytes.
        data: Vec<u8>,
        /// Close after data.
        eof: bool,
    },
    /// Resize a terminal.
    Resize {
        /// Its session.
        session_id: SessionId,
        /// The call.
        call_id: CallId,
        /// Columns.
        columns: u16,
        /// Rows.
        rows: u16,
    },
    /// Feed `StartDeadline` after this time.
    ArmStartDeadline {
        /// The call.
        call_id: CallId,
        /// Time in the queue.
        within: Duration,
    },
    /// Feed `IdlePassed` after this time, and not at an earlier moment that was named for this session.
    ArmIdle {
        /// The session.
        session_id: SessionId,
        /// From now.
        within: Duration,
    },
    /// Make the processes of a sandbox stand still: `Frozen`.
    Freeze {
        /// Its session.
        session_id: SessionId,
    },
    /// End the processes of a sandbox, and keep the sandbox: `Stopped`.
    Stop {
        /// Its session.
        session_id: SessionId,
    },
    /// Let the processes of a sandbox go on: `Thawed`.
    Thaw {
        /// Its session.
        session_id: SessionId,
    },
}
